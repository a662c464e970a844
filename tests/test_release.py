"""One command makes a version in all its places, and refuses a version without upgrade notes."""

import json
import re
import shutil
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

from support.rendered import TEMPLATE, Result, Service, cookiecutter, parse_yaml, run, run_tool
from support.repositories import IDENTITY, commit_all, git, scaffold, without_git

NOTES = "## 9.9.0 (not released)\n\n- A change.\n\n### Upgrade notes\n\nTurn it off and on.\n\n"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A copy of this repository, with the next version's section in its changes."""
    folder = tmp_path / "template"
    parts = (
        ".gitignore",
        "*.py",
        "tools",
        "*.json",
        "pyproject.toml",
        "CHANGELOG.md",
        "README.md",
        "docs",
        "hooks",
        "tests",
        "examples",
        "{{*",
    )
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis")
    folder.mkdir()
    for part in [path for pattern in parts for path in TEMPLATE.glob(pattern)]:
        if part.is_dir():
            shutil.copytree(part, folder / part.name, ignore=ignored)
        else:
            shutil.copy(part, folder)
    write_section(folder, NOTES)
    return folder


def write_section(template: Path, section: str) -> None:
    changes = template / "CHANGELOG.md"
    text = changes.read_text(encoding="utf-8")
    changes.write_text(text.replace("## 0.1.0", f"{section}## 0.1.0"), encoding="utf-8")


def release(template: Path, *arguments: str) -> Result:
    return run_tool("release", *arguments, cwd=template, check=False)


def test_a_release_is_the_version_in_all_its_places(template: Path, tmp_path: Path) -> None:
    result = release(template, "9.9.0")
    assert result.returncode == 0, result.stdout
    documents = [(template / name).read_text("utf-8") for name in ("README.md", "docs/updates.md")]
    shown = re.findall(r"--checkout v([\d.]+)\b", "".join(documents))
    assert set(shown) == {"9.9.0"}
    today = datetime.now(UTC).date()
    assert f"\n## 9.9.0 ({today})\n" in (template / "CHANGELOG.md").read_text("utf-8")
    assert '\nversion = "9.9.0"\n' in (template / "pyproject.toml").read_text("utf-8")
    runtime = next(template.glob("{{*/src/*/runtime/settings.py")).read_text("utf-8")
    assert '\nTEMPLATE_VERSION = "9.9.0"\n' in runtime
    old = re.compile(r"^# cookiecutter-consumer (?!9\.9\.0 )\S+ \|")
    files = [path for path in template.rglob("*.py") if path.name != "release.py"]
    assert [path for path in files if old.match(path.read_text("utf-8"))] == []

    rendered = cookiecutter(tmp_path, "--no-input", template=template)
    assert rendered.returncode == 0, rendered.stdout
    service = Service(tmp_path / "order-events", "order_events")
    example = Service(template / "examples/order-events", "order_events")
    assert json.loads(service.read(".template-answers.json"))["version"] == "9.9.0"
    del (ours := service.files)[".template-answers.json"]
    del (theirs := example.files)[".template-answers.json"]
    assert ours == theirs
    runtime = service.read("src/order_events/runtime/settings.py")
    assert '\nTEMPLATE_VERSION = "9.9.0"\n' in runtime
    assert release(template, "9.9.0").returncode == 2, "it is released"
    updating = (template / "tools/updating.py").read_text("utf-8")
    assert f'\nCOOKIECUTTER = "{metadata.version("cookiecutter")}"\n' in updating
    assert f'\nCOOKIECUTTER_UNTIL = "{today}"\n' in updating


@without_git
def test_the_commands_that_it_ends_with_make_a_tag_that_can_be_rendered(
    template: Path, tmp_path: Path
) -> None:
    git(template, "init", "--quiet", "--initial-branch=main")
    commit_all(template, "Before")
    git(tmp_path, "init", "--quiet", "--bare", "origin.git")
    git(template, "remote", "add", "origin", str(tmp_path / "origin.git"))
    printed = release(template, "9.9.0").stdout
    next_commands = re.search(r"^Next: (.*)$", printed, re.M)
    assert next_commands
    run("sh", "-ec", next_commands[1], cwd=template, env=IDENTITY)
    assert git(template, "status", "--porcelain") == ""
    service = scaffold(tmp_path / "origin.git", tmp_path, "--checkout", "v9.9.0")
    recorded = json.loads(service.read(".template-answers.json"))
    assert recorded["version"] == "9.9.0"
    assert recorded["commit"] == git(template, "rev-parse", "v9.9.0^{commit}").strip()


def test_the_instructions_for_maintainers_are_what_it_ends_with(template: Path) -> None:
    printed = release(template, "9.9.0").stdout
    told = (TEMPLATE / "CONTRIBUTING.md").read_text("utf-8").partition("## Make a release")[2]
    lines = [line.partition("  #")[0].strip() for line in told.splitlines()]
    commands = [line.replace("X.Y.Z", "9.9.0") for line in lines if line.startswith("git ")]
    assert f"Next: {' && '.join(commands)}\n" in printed


@pytest.mark.parametrize(
    ("version", "section", "sentence"),
    [
        ("9.9", NOTES, "'9.9' is no version"),
        ("9.9.1", NOTES, "has no section 9.9.1"),
        ("9.9.0", NOTES.partition("###")[0], "has no upgrade notes"),
        ("9.9.0", NOTES.replace("Turn it off and on.\n\n", ""), "has no upgrade notes"),
        ("9.9.0", NOTES.replace("### U", "### Security\n\n### U"), "has no security"),
        ("0.0.1", NOTES.replace("9.9.0", "0.0.1"), "0.0.1 is older than"),
    ],
)
def test_what_cannot_be_a_release_is_one_sentence_and_changes_nothing(
    template: Path, version: str, section: str, sentence: str
) -> None:
    shutil.copy(TEMPLATE / "CHANGELOG.md", template)
    write_section(template, section)
    before = Service(template, "").files
    result = release(template, version)
    assert result.returncode == 2
    assert sentence in result.stdout
    assert result.stdout.count("\n") == 1
    assert Service(template, "").files == before


def test_the_page_of_a_release_has_its_section_with_the_upgrade_notes(template: Path) -> None:
    """The steps of .github/workflows/release.yml that need no GitHub."""
    workflow = parse_yaml((TEMPLATE / ".github/workflows/release.yml").read_text("utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["release"]["steps"] if "run" in step]
    release(template, "9.9.0")
    for tag, exit_code in (("v9.9.0", 0), ("v9.9.9", 1)):
        env = {"TAG": tag, "RUNNER_TEMP": str(template)}
        script = "\n".join(steps[:-1])
        assert run("sh", "-ec", script, cwd=template, check=False, env=env).returncode == exit_code
    notes = (template / "notes.md").read_text("utf-8")
    assert notes == "- A change.\n\n### Upgrade notes\n\nTurn it off and on.\n"
    assert steps[-1].startswith("gh release create")
