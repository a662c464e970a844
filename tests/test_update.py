"""A service takes up what changed in the template and keeps what its team changed: tools/update.py, and cruft."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from rendered import QUESTIONS, TEMPLATE, Result, Service, run

OLD_LINE = '"""One log line for each event, as it was."""'
PRESENT_LINE = '"""One log line for each event: JSON for machines, or aligned text for people."""'
LOGS = "src/order_events/runtime/logs.py"
STUB = "{{cookiecutter.project_slug}}/stubs/json/handler.py"
HANDLER = "src/order_events/handlers/order_created.py"
TREE_LOGS = "{{cookiecutter.project_slug}}/src/{{cookiecutter.package_name}}/runtime/logs.py"
IDENTITY = {
    **{f"GIT_{role}_NAME": "Somebody" for role in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{role}_EMAIL": "somebody@example.com" for role in ("AUTHOR", "COMMITTER")},
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    return run("git", *arguments, cwd=folder, env=IDENTITY).stdout


def commit_all(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with an older state of the template, v0.0.1, and the present one."""
    folder = tmp_path_factory.mktemp("repository") / "cookiecutter-consumer"
    ours = git(TEMPLATE, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, ours):
        if (TEMPLATE / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TEMPLATE / name, folder / name)
    git(folder, "init", "--quiet")
    logs, questions, stub = (folder / name for name in (TREE_LOGS, "cookiecutter.json", STUB))
    present = {path: path.read_text(encoding="utf-8") for path in (logs, questions, stub)}
    assert "Your work goes here" in present[stub]
    stub.write_text(present[stub].replace("Your work goes here", "Work here"), encoding="utf-8")
    assert PRESENT_LINE in present[logs]
    logs.write_text(present[logs].replace(PRESENT_LINE, OLD_LINE), encoding="utf-8")
    version = f'"_template_version": "{QUESTIONS["_template_version"]}"'
    questions.write_text(
        present[questions].replace(version, '"_template_version": "0.0.1"'), encoding="utf-8"
    )
    commit_all(folder, "0.0.1")
    git(folder, "tag", "v0.0.1")
    for path, text in present.items():
        path.write_text(text, encoding="utf-8")
    commit_all(folder, "The present state")
    return folder


def scaffold(template: Path, folder: Path, *arguments: str) -> Service:
    command = [sys.executable, "-m", "cookiecutter", f"git+{template.as_uri()}", "--no-input"]
    env = {**IDENTITY, "HOME": str(folder)}
    run(*command, "-o", str(folder), *arguments, cwd=folder, env=env)
    service = Service(folder / "order-events", "order_events")
    git(service.path, "init", "--quiet")
    commit_all(service.path, "As scaffolded")
    return service


def update(service: Service, *arguments: str) -> Result:
    env = {**IDENTITY, "HOME": str(service.path.parent)}
    command = [sys.executable, "tools/update.py", *arguments]
    return run(*command, cwd=service.path, check=False, env=env)


EDITS = {
    "src/order_events/handlers/order_created.py": (
        "class OrderCreated",
        "# ours\nclass OrderCreated",
    ),
    "src/order_events/settings.py": ('"""', '"""Ours. '),
    "README.md": ("# Order events", "# Order events of ours"),
    "src/order_events/runtime/message.py": ("import", "# ours\nimport"),
}


def edit(service: Service, edits: dict[str, tuple[str, str]]) -> None:
    for name, (old, new) in edits.items():
        assert old in service.read(name)
        service.write(name, service.read(name).replace(old, new, 1))
    commit_all(service.path, "Ours")


@pytest.fixture
def old_service(template: Path, tmp_path: Path) -> Service:
    return scaffold(template, tmp_path, "--checkout", "v0.0.1")


def test_an_update_keeps_local_edits_and_brings_the_change(old_service: Service) -> None:
    assert OLD_LINE in old_service.read(LOGS)
    edit(old_service, EDITS)
    handler = old_service.read(HANDLER)
    result = update(old_service)
    assert result.returncode == 0, result.stdout
    assert PRESENT_LINE in old_service.read(LOGS)
    assert old_service.read(HANDLER) == handler, "its stub has changed, but it is the team's"
    assert [name for name, (_, new) in EDITS.items() if new not in old_service.read(name)] == []
    recorded = json.loads(old_service.read(".template-answers.json"))
    assert recorded["version"] == QUESTIONS["_template_version"]
    assert git(old_service.path, "status", "--porcelain") == ""
    again = update(old_service)
    assert (again.returncode, again.stdout) == (0, "Already up to date.\n")


def test_an_edit_of_a_vendored_file_is_named_before_and_after_an_update(
    old_service: Service,
) -> None:
    edit(old_service, EDITS)
    for _ in range(2):
        command = ["python", "-m", "pytest", "-q", "tests/runtime/test_drift.py"]
        result = old_service.run(*command, environment=old_service.environment())
        assert "src/order_events/runtime/message.py" in result.stdout
        assert LOGS not in result.stdout
        update(old_service)


def test_a_conflict_is_reported_and_not_hidden(old_service: Service) -> None:
    edit(old_service, {LOGS: (OLD_LINE, '"""Ours."""')})
    result = update(old_service)
    assert result.returncode == 1
    assert f"Merge conflict in {LOGS}" in result.stdout
    assert git(old_service.path, "diff", "--name-only", "--diff-filter=U").split() == [LOGS]


def test_uncommitted_changes_are_not_touched(old_service: Service) -> None:
    old_service.write("README.md", "ours")
    result = update(old_service)
    assert result.returncode == 1
    assert result.stdout == "update.py: commit or stash your changes first.\n"
    assert old_service.read("README.md") == "ours"


def cruft(folder: Path, *arguments: str) -> Result:
    env = {**IDENTITY, "HOME": str(folder), "PYTHONWARNINGS": "ignore"}
    return run(sys.executable, "-m", "cruft", *arguments, cwd=folder, check=False, env=env)


def test_cruft_keeps_local_edits_and_brings_the_change(template: Path, tmp_path: Path) -> None:
    made = cruft(tmp_path, "create", template.as_uri(), "--no-input", "--checkout", "v0.0.1")
    assert made.returncode == 0, made.stdout
    service = Service(tmp_path / "order-events", "order_events")
    git(service.path, "init", "--quiet")
    commit_all(service.path, "As scaffolded")
    edit(service, EDITS)
    handler = service.read(HANDLER)
    head = git(template, "rev-parse", "HEAD").strip()
    newest = ("--checkout", head)  # cruft would compare with v0.0.1, which it was made from
    assert cruft(service.path, "check", *newest).returncode == 1
    assert "# Order events of ours" in cruft(service.path, "diff").stdout
    updated = cruft(service.path, "update", "--skip-apply-ask", *newest)
    assert updated.returncode == 0, updated.stdout
    assert PRESENT_LINE in service.read(LOGS)
    assert service.read(HANDLER) == handler, "its stub has changed, but it is the team's"
    assert [name for name, (_, new) in EDITS.items() if new not in service.read(name)] == []
    assert cruft(service.path, "check", *newest).returncode == 0


@pytest.mark.parametrize("answer", ["broker", "colour=red"])
def test_a_wrong_answer_is_one_sentence(old_service: Service, answer: str) -> None:
    before = git(old_service.path, "rev-parse", "HEAD")
    result = update(old_service, answer)
    assert result.returncode == 2
    assert repr(answer.partition("=")[0]) in result.stdout
    assert git(old_service.path, "rev-parse", "HEAD") == before


def test_without_its_answers_it_is_one_sentence(old_service: Service) -> None:
    old_service.write(".template-answers.json", "{}")
    result = update(old_service)
    assert result.returncode == 1
    assert result.stdout.startswith("update.py: .template-answers.json does not tell")
    assert result.stdout.count("\n") == 1


def test_an_answer_that_the_template_refuses_changes_nothing(old_service: Service) -> None:
    before = git(old_service.path, "rev-parse", "HEAD")
    result = update(old_service, "description=")
    assert result.returncode == 1
    assert "description is empty." in result.stdout
    assert git(old_service.path, "rev-parse", "HEAD") == before
    assert git(old_service.path, "branch", "--list", "template") == ""


def check_fresh_but_for_ours(service: Service, template: Path, broker: str, ours: set[str]) -> None:
    folder = service.path.parent / f"fresh-{broker}"
    fresh = Service(folder / "order-events", service.package)
    if not folder.exists():
        folder.mkdir()
        scaffold(template, folder, f"broker={broker}")
    expected, found = fresh.files, service.files
    names = {name for name in expected.keys() | found.keys() if not name.startswith(".git/")}
    assert {name for name in names if expected.get(name) != found.get(name)} == ours


@pytest.mark.parametrize("broker", QUESTIONS["broker"][:-1])
def test_a_service_moves_between_any_two_brokers_by_one_answer(
    template: Path, tmp_path: Path, broker: str
) -> None:
    """There and back, from each broker to all that come after it in the list."""
    service = scaffold(template, tmp_path, f"broker={broker}")
    ours = dict(list(EDITS.items())[:2])
    edit(service, ours)
    kept = {name: service.read(name) for name in ours}
    brokers = QUESTIONS["broker"]
    for other in brokers[brokers.index(broker) + 1 :]:
        for wanted in (other, broker):
            result = update(service, f"broker={wanted}")
            assert result.returncode == 0, result.stdout
            check_fresh_but_for_ours(service, template, wanted, set(ours))
            assert {name: service.read(name) for name in ours} == kept


def test_a_service_is_renamed_by_two_answers(template: Path, tmp_path: Path) -> None:
    service = scaffold(template, tmp_path, "broker=sqlite")
    edit(service, {name: EDITS[name] for name in list(EDITS)[:2]})
    result = update(service, "project_slug=shop-events", "package_name=shop_events")
    assert result.returncode == 0, result.stdout
    renamed = Service(service.path, "shop_events")
    assert not renamed.has("src/order_events")
    assert "# ours" in renamed.read("src/shop_events/handlers/order_created.py")
    command = ["python", "-m", "pytest", "-q", "tests/handlers", "tests/runtime/test_drift.py"]
    passed = renamed.run(*command, environment=renamed.environment())
    assert passed.returncode == 0, passed.stdout
