"""A service is mostly the team's own: its number of lines, and the folders that are marked as vendored."""

import re
import subprocess
from pathlib import Path

import pytest

from support.rendered import CHOICES, TEMPLATE, Render, Service
from support.repositories import commit_all, git, without_git

WAY_OF_A_MESSAGE = ("message", "cancellation", "consumer", "handlers", "brokers/source")
"""The files of the runtime on the path of a message, without its broker."""


def lines(service: Service, *beginnings: str) -> int:
    """The number of lines in the files with these beginnings of names."""
    texts = [text for name, text in service.files.items() if name.startswith(beginnings)]
    assert texts
    return sum(text.count(b"\n") for text in texts)


def test_a_default_service_has_no_more_lines_than_these(render: Render) -> None:
    """docs/decisions.md has the cost of each part; the aim is 9,000."""
    assert lines(render(), "") <= 12_092


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_a_service_has_at_most_2500_lines_of_vendored_tests(render: Render, broker: str) -> None:
    """On the default broker; the tests need a few more lines to read some servers."""
    most = 2_500 if broker == "rabbitmq" else 2_550
    assert lines(render(broker=broker), "tests/runtime/") <= most


def test_the_way_of_a_message_has_no_more_lines_than_these(render: Render) -> None:
    """The files that a reader follows from the delivery to the acknowledgement; the aim is 2,500."""
    service = render()
    files = [f"src/{service.package}/runtime/{name}.py" for name in WAY_OF_A_MESSAGE]
    assert lines(service, *files) <= 1_815
    assert lines(service, *files, f"src/{service.package}/runtime/brokers/rabbitmq.py") <= 2_907


YOURS = ("handlers/", "settings.py", "__main__.py")


def test_the_readme_says_the_size(render: Render) -> None:
    """Within two percent, so that not each line changes it."""
    service, readme = render(), (TEMPLATE / "README.md").read_text(encoding="utf-8")
    yours = lines(
        service,
        "tests/handlers/",
        "tests/test_rehearsal.py",
        *(f"src/{service.package}/{name}" for name in YOURS),
    )
    sizes = {
        r"about ([\d,]+) lines in \d+ files": lines(service, ""),
        r"lines in (\d+) files": len(service.files),
        r"(\d+) of these lines are yours": yours,
        r"About ([\d,]+) of the vendored lines are tests": lines(service, "tests/runtime/"),
    }
    for sentence, size in sizes.items():
        [said] = re.findall(sentence, readme)
        assert int(said.replace(",", "")) == pytest.approx(size, rel=0.02), sentence


@without_git
def test_exactly_the_vendored_folders_are_marked_as_such(render_own: Render) -> None:
    service = render_own()
    git(service.path, "init", "--quiet")
    commit_all(service.path, "As rendered")
    names = git(service.path, "ls-files", "-z")
    asked = subprocess.run(
        ["git", "check-attr", "-z", "--stdin", "linguist-vendored"],
        cwd=service.path, input=names, text=True, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    answers = asked.stdout.split("\0")
    marked = {
        name for name, value in zip(answers[::3], answers[2::3], strict=False) if value == "set"
    }
    folders = (Path("src", service.package, "runtime"), Path("tests/runtime"))
    vendored = {name for name in service.files if set(Path(name).parents).intersection(folders)}
    assert marked == vendored
    assert len(marked) > 40
