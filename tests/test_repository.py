"""The template's own files agree with each other, and tasks.py needs only Python and pip."""

import re
import shutil
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import tasks
from support.rendered import CHOICES, QUESTIONS, TEMPLATE, TREE, Render, Service, run
from tasks import COMMANDS
from tools.example import normalised

PROJECT = tomllib.loads((TEMPLATE / "pyproject.toml").read_text("utf-8"))
BASE_PYTHON = str(Path(sys.base_prefix, "bin/python3"))


def test_the_version_is_the_same_everywhere() -> None:
    """The newest section of the changes is the next version's, until `tasks.py release` makes it the present one."""
    changes = (TEMPLATE / "CHANGELOG.md").read_text("utf-8")
    sections = re.findall(r"^## (\d+\.\d+\.\d+)( \(not released\))?", changes, re.M)
    released = [version for version, not_released in sections if not not_released]
    first = [version for version, _ in sections][-1:]
    assert PROJECT["project"]["version"] == QUESTIONS["_template_version"] == [*released, *first][0]


def test_the_example_is_a_fresh_render(render: Render) -> None:
    """If it fails: `python3 tasks.py example`."""
    fresh, example = render(), Service(TEMPLATE / "examples/order-events", "order_events")
    expected = fresh.files
    answers = ".template-answers.json"
    expected[answers] = normalised(fresh.read(answers)).encode()
    names = expected.keys() | example.files.keys()
    assert [name for name in names if expected.get(name) != example.files.get(name)] == []


def test_the_readme_shows_every_part_of_a_service() -> None:
    tree = (TEMPLATE / "README.md").read_text("utf-8").partition("## What you get")[2]
    tree = tree.partition("\n## ")[0]
    runtime = TREE / "src/{{cookiecutter.package_name}}/runtime"
    parts = [*runtime.glob("[!_]*.py"), *runtime.glob("[!_]*/"), *(TREE / "tools").glob("*.py")]
    assert parts
    assert [path.name for path in parts if not re.search(rf"\b{path.name}\b", tree)] == []


def test_contributing_says_of_every_folder_what_it_is_for() -> None:
    table = (TEMPLATE / "CONTRIBUTING.md").read_text("utf-8").partition("## What is where")[2]
    folders = [path.name for path in TEMPLATE.glob("[!.]*/") if path.name != "__pycache__"]
    assert folders
    assert [name for name in folders if f"`{name}/" not in table] == []


def test_the_tasks_use_what_a_service_uses(render: Render) -> None:
    declared: set[str] = set()
    for question in ("broker", "telemetry"):
        for answer in QUESTIONS[question]:
            declared |= set(render(**{question: answer}).metadata["project"]["dependencies"])
    assert set(PROJECT["dependency-groups"]["service"]) == declared
    assert set(render().metadata["dependency-groups"]["lint"]) <= set(tasks.requirements("lint"))


RUNTIME_TESTS = [TEMPLATE / "tests/runtime", TREE / "tests/runtime"]
DOCUMENTS = [TEMPLATE / "README.md", *sorted((TEMPLATE / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    check_named_tests(document.read_text("utf-8"), [TEMPLATE, TREE, *RUNTIME_TESTS])


NO_TESTS = {"idle_in_transaction_session_timeout"}  # a setting of PostgreSQL


@pytest.mark.parametrize(
    "page", sorted((TEMPLATE / "docs/brokers").glob("*.md")), ids=lambda path: path.name
)
def test_what_the_page_of_a_broker_promises_has_its_test(page: Path) -> None:
    """The pages name a test by its name alone, or by the beginning of its name."""
    files = [*(TEMPLATE / "tests").rglob("*.py"), *(TREE / "tests").rglob("*.py")]
    tests = set(
        chain(*(re.findall(r"def test_(\w+)\(", file.read_text("utf-8")) for file in files))
    )
    named = re.findall(r"`(?:test_)?((?:[a-z0-9]+_){3,}[a-z0-9]+)`", page.read_text("utf-8"))
    assert named
    missing = {name for name in named if not any(test.startswith(name) for test in tests)}
    assert missing <= NO_TESTS


def test_every_test_that_the_readme_of_a_service_names_exists(render: Render) -> None:
    answers = [(q, answer) for q in CHOICES for answer in QUESTIONS[q]]
    for question, answer in answers:
        service = render(**{question: answer})
        check_named_tests(service.read("README.md"), [service.path / "tests/runtime"])


def check_named_tests(text: str, folders: list[Path]) -> None:
    for name, function in re.findall(r"`((?:tests/)?test_\w+\.py)(?:::(\w+))?`", text):
        files = [folder / name for folder in folders if (folder / name).exists()]
        assert files, f"there is no {name}"
        assert not function or f"def {function}(" in files[0].read_text("utf-8"), function


@pytest.mark.parametrize("arguments", [["unknown"], []])
def test_an_unknown_task_is_one_sentence(arguments: list[str]) -> None:
    result = run(BASE_PYTHON, "tasks.py", *arguments, cwd=TEMPLATE, check=False)
    assert result.returncode == 2
    assert result.stdout.count("\n") == 1
    assert f"tasks.py knows {', '.join(COMMANDS)}; it was given" in result.stdout


def test_tasks_need_only_python_and_pip(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    for name in ("tasks.py", "tools/__init__.py", "tools/test.py"):
        shutil.copy(TEMPLATE / name, tmp_path / name)
    (tmp_path / "test_one.py").write_text("def test_one() -> None: ...\n")
    declared = tmp_path / "pyproject.toml"
    declared.write_text(
        '[dependency-groups]\ntest = [{ include-group = "a" }]\na = ["pytest>=9"]\n'
    )

    def run_test() -> str:
        command = [BASE_PYTHON, "tasks.py", "test", "test_one.py"]
        return run(*command, cwd=tmp_path, env={"PATH": str(tmp_path)}).stdout

    first, second = run_test(), run_test()
    assert "Installing what `test` needs" in first
    assert "Installing" not in second
    assert "1 passed" in second
    declared.write_text(declared.read_text().replace('"pytest>=9"', '"pytest>=9", "iniconfig>=2"'))
    assert "Installing what `test` needs" in run_test()
