"""An update merges the template's changes and keeps the team's: tools/update.py, and cruft."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from support.documents import SOMEWHERE
from support.rendered import CHOICES, QUESTIONS, TEMPLATE, Result, Service, cookiecutter, run
from support.repositories import (
    IDENTITY,
    LOGS,
    OLD_LINE,
    PRESENT_LINE,
    clone_template,
    commit_all,
    git,
    scaffold,
    update,
    without_git,
)

pytestmark = without_git

ANSWERS = ".template-answers.json"
HANDLERS = "src/order_events/handlers"
IN_YOURS = {
    f"{HANDLERS}/__init__.py": ('"""', '"""Ours. '),
    f"{HANDLERS}/order_created.py": ("    occurred_at", "    ours: str = ''\n    occurred_at"),
    "tests/handlers/test_order_created.py": ('"no reference"', '"ours"'),
    "src/order_events/settings.py": ('"""', '"""Ours. '),
    "tests/test_rehearsal.py": ('"""', '"""Ours. '),
}
"""Edits in the team's files, each beside or in a line that the template changes as well."""
EDITS = {
    **IN_YOURS,
    "README.md": ("# Order events", "# Order events of ours"),
    "src/order_events/runtime/message.py": ("import", "# ours\nimport"),
}


def edit(service: Service, edits: dict[str, tuple[str, str]]) -> None:
    for name, (old, new) in edits.items():
        assert old in service.read(name)
        service.write(name, service.read(name).replace(old, new, 1))
    commit_all(service.path, "Ours")


def texts_of(service: Service, names: dict[str, tuple[str, str]] = IN_YOURS) -> dict[str, str]:
    return {name: service.read(name) for name in names}


def check_edits(service: Service, edits: dict[str, tuple[str, str]] = EDITS) -> None:
    assert [name for name, (_, new) in edits.items() if new not in service.read(name)] == []


def check_fresh_but_for(
    edits: dict[str, tuple[str, str]], service: Service, template: Path, *answers: str
) -> None:
    folder = service.path.parent / "-".join(["fresh", *answers])
    fresh = Service(folder / "order-events", service.package)
    if not folder.exists():
        folder.mkdir()
        scaffold(template, folder, *answers)
    expected, found = fresh.files, service.files
    names = {name for name in expected.keys() | found.keys() if not name.startswith(".git/")}
    assert {name for name in names if expected.get(name) != found.get(name)} == set(edits)


@pytest.fixture(scope="module")
def as_scaffolded(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return scaffold(template, tmp_path_factory.mktemp("old"), "--checkout", "v0.0.1")


@pytest.fixture
def old_service(as_scaffolded: Service, tmp_path: Path) -> Service:
    return as_scaffolded.copy_to(tmp_path)


def recorded_commit(service: Service) -> str:
    return str(json.loads(service.read(ANSWERS))["commit"])


@pytest.mark.parametrize(
    ("revision", "arguments"), [("v0.0.1", ["--checkout", "v0.0.1"]), ("HEAD", [])]
)
def test_the_commit_that_was_rendered_is_recorded(
    template: Path, tmp_path: Path, revision: str, arguments: list[str]
) -> None:
    service = scaffold(template, tmp_path, *arguments)
    assert recorded_commit(service) == git(template, "rev-parse", revision).strip()


def test_it_is_recorded_of_a_branch_that_git_has_packed_away(
    template: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(template), clone.name)
    git(clone, "pack-refs", "--all")
    assert list(clone.glob(".git/refs/heads/*")) == []
    made = cookiecutter(tmp_path, "--no-input", template=clone)
    assert made.returncode == 0, made.stdout
    service = Service(tmp_path / "order-events", "order_events")
    assert recorded_commit(service) == git(template, "rev-parse", "HEAD").strip()


def test_an_update_keeps_local_edits_and_brings_the_change(
    old_service: Service, template: Path
) -> None:
    assert OLD_LINE in old_service.read(LOGS)
    edit(old_service, EDITS)
    yours = texts_of(old_service)
    result = update(old_service)
    assert result.returncode == 0, result.stdout
    assert PRESENT_LINE in old_service.read(LOGS)
    assert texts_of(old_service) == yours, "the template's have changed, but they are the team's"
    check_edits(old_service)
    assert json.loads(old_service.read(ANSWERS))["version"] == QUESTIONS["_template_version"]
    assert recorded_commit(old_service) == git(template, "rev-parse", "HEAD").strip()
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


FIRST_UPDATABLE = "56b63d1dedf3f041cfd466d317fd3894e1105b09"
"""A commit of this repository's own history, from the day when services became updatable."""


def test_the_place_and_the_version_of_the_template_can_be_given(
    template: Path, tmp_path: Path
) -> None:
    """Neither is recorded correctly: the template has moved, and was no clone when it was rendered."""
    service = scaffold(template, tmp_path, "--checkout", "v0.0.1")
    recorded = json.loads(service.read(ANSWERS))
    lost = {**recorded, "template": f"{template.as_uri()}-moved", "version": "0.0.0", "commit": ""}
    service.write(ANSWERS, json.dumps(lost, indent=2))
    edit(service, EDITS)
    yours = texts_of(service)
    place, came_from = ("--template", recorded["template"]), ("--came-from", "v0.0.1")
    moved = f"no update from {template.as_uri()}-moved (--template names another): fatal: "
    for told, sentence in ((came_from, moved), (place, "cookiecutter could not render v0.0.0")):
        refused = update(service, *told)
        assert refused.returncode == 1
        assert f"update.py: {sentence}" in refused.stdout
        assert refused.stdout.count("\n") == 1
    result = update(service, *place, *came_from)
    assert result.returncode == 0, result.stdout
    check_fresh_but_for(EDITS, service, template)
    assert texts_of(service) == yours
    again = update(service)
    assert (again.returncode, again.stdout) == (0, "Already up to date.\n")


def rendered_here(
    folder: Path, *arguments: str, place: str, config: str = "", cwd: str = "."
) -> Service:
    """A service of a template that is named by an abbreviation, in its own repository."""
    (folder / "rc").write_text(config)
    command = ("cookiecutter", place, "--no-input", "--config-file", str(folder / "rc"))
    env = {**IDENTITY, "HOME": str(folder)}
    run(*command, "-o", str(folder), *arguments, "broker=sqlite", cwd=folder / cwd, env=env)
    service = Service(folder / "order-events", "order_events")
    git(service.path, "init", "--quiet")
    commit_all(service.path, "As rendered")
    return service


def change_template(template: Path, below: str = ".") -> None:
    """Commit a new version of the template."""
    logs = next((template / below).glob("*cookiecutter*/src/*/runtime/logs.py"))
    logs.write_text(logs.read_text("utf-8").replace(PRESENT_LINE, OLD_LINE), "utf-8")
    commit_all(template, "Changed")
    git(template, "tag", "v0.9.0")


@pytest.mark.parametrize(("place", "cwd"), [("../copy", "x"), (".", "copy"), ("ours:copy", ".")])
def test_a_template_that_was_named_for_this_folder_or_user_is_found_again(
    template: Path, tmp_path: Path, place: str, cwd: str
) -> None:
    (tmp_path / "x").mkdir()
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "--quiet", str(template), "copy")
    config = f"abbreviations:\n  ours: git+{tmp_path.as_uri()}/{{0}}\n"
    service = rendered_here(tmp_path, place=place, config=config, cwd=cwd)
    found = {str(copy), f"git+{copy.as_uri()}", copy.as_uri()}
    assert json.loads(service.read(ANSWERS))["template"] in found
    change_template(copy)
    result = update(service)
    assert result.returncode == 0, result.stdout
    assert OLD_LINE in service.read(LOGS)


def test_a_template_in_the_folder_of_cookiecutter_s_clones_stays_there(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cookiecutter deletes a clone there before it clones a template of the same name again."""
    monkeypatch.setenv("HOME", str(tmp_path))
    clone = tmp_path / ".cookiecutters/copy"
    clone.parent.mkdir()
    git(tmp_path, "clone", "--quiet", str(template), str(clone))
    service = rendered_here(tmp_path, place=str(clone))
    change_template(clone)  # with a commit that no other clone has
    before = git(clone, "rev-parse", "HEAD")
    result = update(service)
    assert result.returncode == 0, result.stdout
    assert git(clone, "rev-parse", "HEAD") == before
    assert OLD_LINE in service.read(LOGS)


@pytest.mark.parametrize("by_path", [True, False])
def test_a_template_in_a_folder_of_a_repository_is_found_again(
    template: Path, tmp_path: Path, by_path: bool
) -> None:
    ours = tmp_path / "ours"
    git(tmp_path, "clone", "--quiet", str(template), "ours/templates/consumer")
    shutil.rmtree(ours / "templates/consumer/.git")
    git(ours, "init", "--quiet")
    commit_all(ours, "Templates")
    if by_path:
        service = rendered_here(tmp_path, place=str(ours / "templates/consumer"))
    else:
        directory = ("--directory", "templates/consumer")
        service = rendered_here(tmp_path, *directory, place=f"git+{ours.as_uri()}")
    recorded = json.loads(service.read(ANSWERS))
    assert recorded["directory"] == "templates/consumer"
    assert recorded["commit"] == git(ours, "rev-parse", "HEAD").strip()
    change_template(ours, "templates/consumer")
    result = update(service)
    assert result.returncode == 0, result.stdout
    assert OLD_LINE in service.read(LOGS)


def test_a_template_that_is_no_repository_has_no_other_version(
    template: Path, tmp_path: Path
) -> None:
    git(template, "archive", "--output", str(tmp_path / "t.zip"), "--prefix", "t/", "HEAD")
    service = rendered_here(tmp_path, place=str(tmp_path / "t.zip"))
    tip = git(service.path, "rev-parse", "HEAD")
    result = update(service)
    assert (result.returncode, result.stdout.count("\n")) == (1, 1)
    assert f"no update from {tmp_path / 't.zip'} (--template names another)" in result.stdout
    result = update(service, "--template", str(template), "--came-from", "HEAD~1")
    assert result.returncode == 0, result.stdout
    assert git(service.path, "rev-parse", "HEAD~1") == tip


@pytest.mark.parametrize("program", ["its own of that day", "today's"])
def test_a_service_of_the_first_days_comes_up_to_date(tmp_path: Path, program: str) -> None:
    """With edits in the team's files, the README and a vendored file."""
    there = run("git", "cat-file", "-e", FIRST_UPDATABLE, cwd=TEMPLATE, check=False)
    if there.returncode != 0:
        pytest.skip("the history is not here: a shallow clone")
    template = clone_template(tmp_path / "cookiecutter-consumer")
    service = scaffold(template, tmp_path, "--checkout", FIRST_UPDATABLE)
    edits = {name: change for name, change in EDITS.items() if (service.path / name).exists()}
    assert EDITS.keys() - edits.keys() == {"tests/test_rehearsal.py"}
    edit(service, edits)
    names = {name: change for name, change in IN_YOURS.items() if name in edits}
    yours = texts_of(service, names)
    if program == "today's":
        command = (sys.executable, str(TEMPLATE / "tools/updating.py"), "--checkout=HEAD")
        git(tmp_path, "clone", "--quiet", "--bare", str(template), "bare")
        places = (f"--project={service.path}", f"--clone={tmp_path / 'bare'}")
        result = run(*command, *places, cwd=tmp_path, check=False, env=IDENTITY)
    else:
        result = update(service)
    assert result.returncode == 0, result.stdout
    assert texts_of(service, names) == yours
    check_edits(service, edits)
    description = json.loads(service.read(".template-answers.json"))["answers"]["description"]
    check_fresh_but_for(edits, service, template, f"description={description}")


# -- the version, and the program


def fork_of(template: Path, folder: Path) -> Path:
    git(folder, "clone", "--quiet", str(template), "fork")
    return folder / "fork"


def with_line(fork: Path, line: str, *tags: str) -> None:
    """A commit in which the runtime's logs.py begins with this line."""
    [logs] = fork.glob(f"*cookiecutter*/{LOGS.replace('order_events', '*')}")
    first, _, rest = logs.read_text("utf-8").partition("\n")
    logs.write_text(f'{first}\n"""{line}"""\n' + rest.partition("\n")[2], "utf-8")
    commit_all(fork, line)
    for tag in tags:
        git(fork, "tag", tag)


def test_the_newest_release_is_taken_and_not_a_pre_release_or_the_head(
    old_service: Service, template: Path, tmp_path: Path
) -> None:
    fork = fork_of(template, tmp_path)
    with_line(fork, "The newest.", "v0.10.0")
    with_line(fork, "A fix of an older one.", "v0.9.9")
    with_line(
        fork, "None of them.", "v0.11.0rc1", "v0.11.0-rc.1", "v1", "v1.0", "1.0.0", "x/v2.0.0"
    )
    git(fork, "branch", "v3.0.0")
    result = update(old_service, "--template", str(fork))
    assert result.returncode == 0, result.stdout
    assert "The newest." in old_service.read(LOGS)
    assert recorded_commit(old_service) == git(fork, "rev-parse", "v0.10.0").strip()
    assert json.loads(old_service.read(ANSWERS))["template"] == str(fork)
    assert not (tmp_path / ".cookiecutters").exists()
    assert "no release" not in result.stdout


def test_a_service_that_is_newer_than_the_newest_release_is_not_taken_back(
    old_service: Service, template: Path, tmp_path: Path
) -> None:
    fork = fork_of(template, tmp_path)
    with_line(fork, "Not released yet.")
    place = ("--template", str(fork))
    assert update(old_service, *place, "--checkout", "HEAD").returncode == 0
    again = update(old_service)
    assert (again.returncode, again.stdout) == (0, "Already up to date.\n")
    result = update(old_service, "telemetry=none")
    assert result.returncode == 0, result.stdout
    assert "Not released yet." in old_service.read(LOGS)
    back = update(old_service, "--checkout", f"v{QUESTIONS['_template_version']}")
    assert back.returncode == 0, back.stdout
    assert "Not released yet." not in old_service.read(LOGS)


def test_before_the_first_release_the_head_is_taken_and_a_line_says_so(
    old_service: Service, template: Path, tmp_path: Path
) -> None:
    fork = fork_of(template, tmp_path)
    git(fork, "tag", "--delete", *git(fork, "tag").split())
    with_line(fork, "The head.", "v1.0.0rc1")
    result = update(old_service, "--template", str(fork))
    assert result.returncode == 0, result.stdout
    assert "update.py: the template has no release yet: taking its HEAD.\n" in result.stdout
    assert "The head." in old_service.read(LOGS)


def test_an_older_version_is_merged_by_the_program_of_the_newest(
    old_service: Service, template: Path, tmp_path: Path
) -> None:
    fork = fork_of(template, tmp_path)
    program = fork / "tools/updating.py"
    newest = program.read_text("utf-8")
    program.write_text("raise SystemExit('an older program')\n")
    with_line(fork, "Older.", "v0.5.0")
    program.write_text(newest, "utf-8")
    with_line(fork, "Newer.", "v0.6.0")
    result = update(old_service, "--template", str(fork), "--checkout", "v0.5.0")
    assert result.returncode == 0, result.stdout
    assert "Older." in old_service.read(LOGS)


def test_a_template_without_the_program_is_one_sentence(
    old_service: Service, template: Path, tmp_path: Path
) -> None:
    fork = fork_of(template, tmp_path)
    (fork / "tools/updating.py").unlink()
    with_line(fork, "Newer.", "v0.6.0")
    result = update(old_service, "--template", str(fork))
    assert (result.returncode, result.stdout.count("\n")) == (1, 1)
    assert "path 'tools/updating.py' does not exist in 'refs/tags/v0.6.0'" in result.stdout


UVX = """#!/bin/sh
echo "$@" >> '{log}'
exec '{uvx}' "$@"
"""


def test_a_cookiecutter_that_uvx_gets_is_pinned_and_bounded_in_time(
    old_service: Service, tmp_path: Path
) -> None:
    """With git and uv, and without cookiecutter."""
    uvx, log = shutil.which("uvx"), tmp_path / "log"
    assert uvx
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "uvx").write_text(UVX.format(log=log, uvx=uvx))
    (programs / "uvx").chmod(0o755)
    for name in ("git", "sh", "env", "dirname", "realpath"):  # the last two for uv's scripts
        (programs / name).symlink_to(shutil.which(name) or name)
    env = {**IDENTITY, "HOME": str(tmp_path), "PATH": str(programs)}
    command = (sys.executable, "tools/update.py")
    result = run(*command, cwd=old_service.path, check=False, env=env)
    assert result.returncode == 0, result.stdout
    assert PRESENT_LINE in old_service.read(LOGS)
    calls = log.read_text().splitlines()
    assert len(calls) == 2
    for call in calls:
        python, until, cookiecutter_at, *_ = call.split()
        assert python == f"--python={sys.executable}"
        assert re.fullmatch(r"--exclude-newer=\d{4}-\d\d-\d\d", until)
        assert re.fullmatch(r"cookiecutter@\d+\.\d+\.\d+", cookiecutter_at)


def test_the_program_is_small_in_a_service(old_service: Service) -> None:
    assert old_service.read("tools/update.py").count("\n") <= 70


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
    yours = texts_of(service)
    head = git(template, "rev-parse", "HEAD").strip()
    newest = ("--checkout", head)  # cruft would compare with v0.0.1, the service's
    assert cruft(service.path, "check", *newest).returncode == 1
    assert "# Order events of ours" in cruft(service.path, "diff").stdout
    updated = cruft(service.path, "update", "--skip-apply-ask", *newest)
    assert updated.returncode == 0, updated.stdout
    assert PRESENT_LINE in service.read(LOGS)
    assert texts_of(service) == yours, "the template's have changed, but they are the team's"
    check_edits(service)
    assert cruft(service.path, "check", *newest).returncode == 0


def test_a_service_that_cookiecutter_rendered_joins_cruft_with_its_own_answers(
    template: Path, tmp_path: Path
) -> None:
    answers = ("broker=sqlite", "telemetry=none", "deploy=systemd")
    service = scaffold(template, tmp_path, "--checkout", "v0.0.1", *answers)
    page = (TEMPLATE / "docs/updates.md").read_text("utf-8")
    [command] = re.findall(r"^```sh\n(recorded.*?)\n```", page, re.M | re.S)
    env = {**IDENTITY, "HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    run("sh", "-ec", command.replace(SOMEWHERE, template.as_uri()), cwd=service.path, env=env)
    commit_all(service.path, "Joined")
    updated = cruft(service.path, "update", "--skip-apply-ask", "--checkout", "HEAD")
    assert updated.returncode == 0, updated.stdout
    joined = {".cruft.json": ("", "")}
    check_fresh_but_for({**IN_YOURS, **joined}, service, template, *answers)


@pytest.mark.parametrize("answer", ["broker", "colour=red"])
def test_a_wrong_answer_is_one_sentence(old_service: Service, answer: str) -> None:
    before = git(old_service.path, "rev-parse", "HEAD")
    result = update(old_service, answer)
    assert result.returncode == 2
    assert repr(answer.partition("=")[0]) in result.stdout
    assert git(old_service.path, "rev-parse", "HEAD") == before


def test_without_its_answers_it_is_one_sentence(old_service: Service) -> None:
    old_service.write(ANSWERS, "{}")
    result = update(old_service)
    assert result.returncode == 1
    assert result.stdout.startswith("update.py: .template-answers.json does not record")
    assert result.stdout.count("\n") == 1


def test_an_answer_that_the_template_refuses_changes_nothing(old_service: Service) -> None:
    before = git(old_service.path, "rev-parse", "HEAD")
    result = update(old_service, "description=")
    assert result.returncode == 1
    assert "description is empty." in result.stdout
    assert git(old_service.path, "rev-parse", "HEAD") == before
    assert len(git(old_service.path, "branch").split("\n")) == 2


@pytest.mark.parametrize("question", ["broker", "telemetry", "deploy", "ci"])
def test_a_service_moves_from_answer_to_answer_by_updates(
    template: Path, tmp_path: Path, question: str
) -> None:
    """Through all answers and back to the first: each answer's files are added once, and deleted once."""
    first, *others = CHOICES[question]
    service = scaffold(template, tmp_path, f"{question}={first}")
    edit(service, IN_YOURS)
    yours = texts_of(service)
    for answer in (*others, first):
        result = update(service, f"{question}={answer}")
        assert result.returncode == 0, result.stdout
        check_fresh_but_for(IN_YOURS, service, template, f"{question}={answer}")
        assert texts_of(service) == yours


OF_OURS = """import importlib

from {0}.handlers import refund_issued


def test_ours() -> None:
    order_events = [importlib.import_module("{0}.settings")]
    order_events.append(refund_issued)
    assert len(order_events) == 2
"""


def test_a_service_is_renamed_by_two_answers(old_service: Service) -> None:
    """With handlers that were added, while the template changes too."""
    edit(old_service, IN_YOURS)
    run(sys.executable, "tools/new_handler.py", "refund_issued", cwd=old_service.path)
    old_service.write("tests/handlers/test_ours.py", OF_OURS.format("order_events"))
    commit_all(old_service.path, "Another handler")
    result = update(old_service, "project_slug=shop-events", "package_name=shop_events")
    assert result.returncode == 0, result.stdout
    renamed = Service(old_service.path, "shop_events")
    assert not renamed.has("src/order_events")
    check_edits(
        renamed, {name.replace("order_events", "shop_events"): IN_YOURS[name] for name in IN_YOURS}
    )
    assert PRESENT_LINE in renamed.read(LOGS.replace("order_events", "shop_events"))
    assert renamed.read("tests/handlers/test_ours.py") == OF_OURS.format("shop_events")
    command = ["python", "-m", "pytest", "-q", "tests/handlers", "tests/runtime/test_drift.py"]
    passed = renamed.run(*command, environment=renamed.environment())
    assert passed.returncode == 0, passed.stdout
    again = update(renamed)
    assert (again.returncode, again.stdout) == (0, "Already up to date.\n")


def test_a_rename_brings_what_was_proposed_and_not_merged_yet(old_service: Service) -> None:
    before = git(old_service.path, "rev-parse", "HEAD").strip()
    assert update(old_service).returncode == 0
    git(old_service.path, "reset", "--quiet", "--hard", before)
    result = update(old_service, "package_name=shop_events")
    assert result.returncode == 0, result.stdout
    assert PRESENT_LINE in old_service.read(LOGS.replace("order_events", "shop_events"))
