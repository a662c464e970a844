"""In any state of a repository, an update keeps the team's files, and changes nothing when it must refuse."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.rendered import Result, Service, run
from support.repositories import (
    IDENTITY,
    LOGS,
    OLD_LINE,
    PRESENT_LINE,
    commit_all,
    git,
    scaffold,
    update,
    without_git,
)

pytestmark = without_git

RECORD = ".template-answers.json"
State = Callable[[Service], object]


@pytest.fixture(scope="module")
def as_scaffolded(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    answers = ("broker=sqlite", "deploy=none", "ci=none")
    return scaffold(template, tmp_path_factory.mktemp("old"), "--checkout", "v0.0.1", *answers)


@pytest.fixture
def service(as_scaffolded: Service, tmp_path: Path) -> Service:
    """A service of v0.0.1, in its own repository, with a second commit."""
    shutil.copytree(as_scaffolded.path, tmp_path / "order-events", symlinks=True)
    service = Service(tmp_path / "order-events", "order_events")
    service.write("NOTES.md", "Ours.\n")
    commit_all(service.path, "Ours")
    return service


def snapshot(folder: Path) -> object:
    """All refs, HEAD, the index, any operation in progress, and every file with its content."""
    refs = git(folder, "for-each-ref") + (folder / ".git/HEAD").read_text()
    states = {path.name for path in (folder / ".git").iterdir()} - {"ORIG_HEAD", "objects", "index"}
    files = {
        path: path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink()) and ".git" not in path.parts
    }
    config = (folder / ".git/config").read_bytes()
    return refs, git(folder, "ls-files", "--stage", "-t"), states, config, files


def check_refused(service: Service, result: Result, before: object, sentence: str) -> None:
    assert result.returncode == 1, result.stdout
    assert f"update.py: {sentence}" in result.stdout
    assert "Traceback" not in result.stdout
    assert snapshot(service.path) == before


def branch(folder: Path, *arguments: str) -> None:
    """Create another branch with its own commit."""
    git(folder, "switch", "--quiet", "--create", "other", *arguments)
    (folder / "README.md").write_text("Theirs.\n")
    commit_all(folder, "Theirs")
    git(folder, "switch", "--quiet", "-")
    (folder / "README.md").write_text("Ours.\n")
    commit_all(folder, "Ours")


def failing(folder: Path, *command: str) -> None:
    assert run("git", *command, cwd=folder, check=False, env=IDENTITY).returncode != 0


def merging(service: Service) -> None:
    branch(service.path)
    failing(service.path, "merge", "other")
    git(service.path, "checkout", "--ours", "README.md")
    git(service.path, "add", "README.md")


def picking(service: Service) -> None:
    branch(service.path)
    failing(service.path, "cherry-pick", "other")
    git(service.path, "checkout", "--ours", "README.md")
    git(service.path, "add", "README.md")


def reverting(service: Service) -> None:
    branch(service.path)
    failing(service.path, "revert", "--no-edit", "other")
    git(service.path, "checkout", "--ours", "README.md")
    git(service.path, "add", "README.md")


def applying(service: Service) -> None:
    (service.path.parent / "a.patch").write_text(
        "From 0 Mon Sep 17 00:00:00 2001\nFrom: a <a@b.c>\nDate: Mon, 1 Jan 2024 00:00:00 +0000\nSubject: x\n\n"
        "---\n\ndiff --git a/no b/no\n--- a/no\n+++ b/no\n@@ -1 +1 @@\n-a\n+b\n"
    )
    failing(service.path, "am", str(service.path.parent / "a.patch"))


def in_the_way(name: str, link: str = "", ignored: bool = False) -> State:
    def prepare(service: Service) -> None:
        path = service.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if link:
            path.symlink_to(link)
        else:
            path.write_text("Ours.\n")
        if ignored:
            (service.path / ".git/info/exclude").write_text(f"{name}\n")

    return prepare


def deleted_and_ignored(name: str) -> State:
    """Deleted in git, but still a file."""

    def prepare(service: Service) -> None:
        git(service.path, "rm", "--quiet", "--cached", name)
        commit_all_but(service, name)

    return prepare


def commit_all_but(service: Service, name: str) -> None:
    (service.path / ".git/info/exclude").write_text(f"{name}\n")
    commit_all(service.path, "Ours alone")


def hook(name: str) -> State:
    def prepare(service: Service) -> None:
        path = service.path / ".git/hooks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\necho we say no >&2\nexit 1\n")
        path.chmod(0o755)

    return prepare


def config(*pair: str) -> State:
    return lambda service: git(service.path, "config", *pair)


def unsigned(service: Service) -> None:
    git(service.path, "config", "commit.gpgSign", "true")
    git(service.path, "config", "gpg.program", "false")


REFUSED: list[tuple[str, State, tuple[str, ...], str]] = [
    ("detached", lambda s: git(s.path, "checkout", "--quiet", "--detach"), (), "HEAD is detached"),
    ("merging", merging, (), "finish or abort first what git has in progress (MERGE_HEAD)"),
    ("picking", picking, (), "finish or abort first what git has in progress (CHERRY_PICK_HEAD)"),
    ("reverting", reverting, (), "finish or abort first what git has in progress (REVERT_HEAD)"),
    ("rebasing", lambda s: failing(s.path, "rebase", "--exec", "false", "HEAD~1"), (),
     "finish or abort first what git has in progress (rebase-merge)"),
    ("applying", applying, (), "finish or abort first what git has in progress (rebase-apply)"),
    ("bisecting", lambda s: git(s.path, "bisect", "start"), (),
     "finish or abort first what git has in progress (BISECT_LOG)"),
    ("edited", lambda s: s.write("README.md", "Ours."), (), "commit or stash"),
    ("edited elsewhere", lambda s: s.write("NOTES.md", "Ours."), (), "commit or stash"),
    ("deleted", lambda s: (s.path / "README.md").unlink(), (), "commit or stash"),
    ("staged", lambda s: git(s.path, "rm", "--cached", "NOTES.md"), (), "commit or stash"),
    ("untracked in the way", in_the_way("renovate.json"), ("ci=gitlab",), "renovate.json is in the way"),
    ("ignored in the way", in_the_way("renovate.json", ignored=True), ("ci=gitlab",),
     "renovate.json is in the way"),
    ("a folder in the way", in_the_way("renovate.json/x", ignored=True), ("ci=gitlab",),
     "renovate.json/x is in the way"),
    ("a link in the way", in_the_way("deploy/systemd", link="/tmp", ignored=True), ("deploy=systemd",),
     "deploy/systemd is in the way"),
    ("a file in the way", in_the_way("deploy/systemd", ignored=True), ("deploy=systemd",),
     "deploy/systemd is in the way"),
    ("a file in the way of a rename", in_the_way("src/shop_events", ignored=True),
     ("package_name=shop_events",), "src/shop_events is in the way"),
    ("a hook", hook("prepare-commit-msg"), (), "git did not commit the update"),
    ("a hook after a rename", hook("prepare-commit-msg"), ("package_name=shop_events",),
     "git did not commit the update"),
    ("no key", unsigned, (), "git did not commit the update"),
    ("ignored in the way of a conflict", deleted_and_ignored(LOGS), (), f"{LOGS} is in the way"),
    ("bare", config("core.bare", "true"), (), "commit this project to a git repository first"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "arguments", "sentence"),
    [pytest.param(*case, id=name) for name, *case in REFUSED],
)
def test_it_refuses_with_one_sentence_and_all_is_as_it_was(
    service: Service, state: State, arguments: tuple[str, ...], sentence: str
) -> None:
    state(service)
    before = snapshot(service.path)
    check_refused(service, update(service, *arguments), before, sentence)


def test_a_project_that_is_not_committed_is_refused(service: Service) -> None:
    shutil.rmtree(service.path / ".git")
    result = update(service)
    assert (result.returncode, result.stdout.count("\n")) == (1, 1)
    assert (
        "update.py: git rev-parse --absolute-git-dir failed: fatal: not a git repository"
        in result.stdout
    )
    git(service.path, "init", "--quiet")
    assert update(service).stdout == "update.py: commit this project to a git repository first.\n"
    git(service.path, "add", RECORD)
    assert update(service).stdout == "update.py: commit or stash your changes first.\n"
    assert git(service.path, "ls-files") == f"{RECORD}\n"


def test_without_git_and_without_the_template_it_is_one_sentence(
    service: Service, tmp_path: Path
) -> None:
    command = [sys.executable, "tools/update.py"]
    before = snapshot(service.path)
    result = run(*command, cwd=service.path, check=False, env={"PATH": str(tmp_path)})
    assert result.stdout == "update.py: git is not installed.\n"
    result = update(service, "--template", "https://127.0.0.1:9/nowhere")
    check_refused(service, result, before, "no update from https://127.0.0.1:9/nowhere")
    assert "fatal: unable to access" in result.stdout
    assert result.stdout.count("\n") == 1
    result = update(service, "broker=rabit")
    check_refused(service, result, before, "cookiecutter could not render refs/tags/v0.1.0")
    assert "rabit" in result.stdout
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("question", ["handlers=order_created,x", "handler_stub=raw"])
def test_handlers_are_not_added_by_an_update(service: Service, question: str) -> None:
    before = snapshot(service.path)
    result = update(service, question)
    assert result.returncode == 2
    assert "`new-handler` adds a handler" in result.stdout
    assert snapshot(service.path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"template": "ext::sh -c 'touch ../pwned'"},
        {"template": "git+ext::sh -c 'touch ../pwned'"},
        {"template": "--config-file=/etc/passwd"},
        {"template": "-h"},
        {"template": "../../outside\ngh:x/y"},
        {"template": "a\0b"},
        {"template": 7},
        {"template": "\x1b]0;title\x07/x"},
        {"template": "--upload-pack=touch ../pwned"},
        {"template": "fd::17"},
        {"template": "ssh://-oProxyCommand=touch ../pwned/x"},
        {"directory": "-x"},
        {"directory": "a\nb"},
        {"directory": "/etc"},
        {"directory": "docs/.."},
        {"directory": "../.."},
        {"directory": ["a"]},
        {"commit": "--orphan=x"},
        {"commit": "-h"},
        {"commit": 7},
        {"commit": "", "version": "0.0.1 --upload-pack=x"},
        {"answers": []},
        {"answers": {"package_name": None}},
        {"answers": {"package_name": "../../outside"}},
        {"answers": {"--replay": "x"}},
        {"answers": {"_extensions": "x"}},
        {"answers": {"description": "two\nlines"}},
        {"answers": {"description": "{{ 7 * 7 }}"}},
        {"answers": {"project_slug": "../outside"}},
    ],
    ids=str,
)
def test_a_hostile_record_is_one_sentence(service: Service, changes: dict[str, object]) -> None:
    recorded = json.loads(service.read(RECORD))
    if isinstance(changes.get("answers"), dict):
        changes = {"answers": recorded["answers"] | changes["answers"]}
    service.write(RECORD, json.dumps(recorded | changes))
    commit_all(service.path, "Hostile")
    before, around = snapshot(service.path), set(service.path.parent.iterdir())
    result = update(service)
    check_refused(service, result, before, "")
    assert result.stdout.count("\n") == 1, result.stdout
    assert {path.name for path in set(service.path.parent.iterdir()) - around} <= {
        ".cookiecutters",
        ".cookiecutter_replay",
    }


def test_a_template_is_no_command_where_git_would_allow_one(service: Service) -> None:
    pwned = service.path.parent / "pwned"
    allowed = "[protocol]\n\tallow = always\n"
    service.path.parent.joinpath(".gitconfig").write_text(allowed)
    for place in (f"ext::touch {pwned}", f"git+ext::touch {pwned}"):
        recorded = json.loads(service.read(RECORD))
        service.write(RECORD, json.dumps({**recorded, "template": place}))
        commit_all(service.path, "Hostile")
        before = snapshot(service.path)
        check_refused(service, update(service), before, "no update from ext::touch ")
    assert not pwned.exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", "\ufeff{}", "{", '{"template": "x"'])
def test_a_record_that_is_none_is_one_sentence(service: Service, text: str) -> None:
    service.write(RECORD, text)
    commit_all(service.path, "Broken")
    before = snapshot(service.path)
    result = update(service)
    check_refused(service, result, before, f"{RECORD} does not record")
    assert result.stdout.count("\n") == 1


# -- where it updates


def template_branch_with_work(service: Service) -> None:
    git(service.path, "switch", "--quiet", "--create", "template")
    service.write("wip.txt", "wip\n")
    commit_all(service.path, "wip")
    git(service.path, "switch", "--quiet", "-")


def forged(service: Service) -> None:
    for name in ("heads/template", "heads/cookiecutter-consumer", "cookiecutter-consumer/template"):
        git(service.path, "update-ref", f"refs/{name}", "HEAD~1")


def hostile_config(service: Service) -> None:
    for name, value in {
        "merge.ff": "only",
        "pull.rebase": "true",
        "alias.cherry-pick": "!false",
        "alias.merge": "!false",
        "core.autocrlf": "true",
        "core.safecrlf": "true",
        "core.abbrev": "4",
        "core.quotePath": "true",
        "color.ui": "always",
        "diff.external": "false",
        "diff.relative": "true",
        "diff.noprefix": "true",
        "merge.renames": "false",
        "merge.conflictStyle": "diff3",
        "status.showUntrackedFiles": "all",
        "log.showSignature": "true",
        "core.editor": "false",
        "core.pager": "false",
        "user.useConfigOnly": "true",
    }.items():
        git(service.path, "config", name, value)


def odd_names(service: Service) -> None:
    Path(os.fsdecode(os.fsencode(service.path) + b"/caf\xe9 \n\t.txt")).write_text("x")
    service.path.joinpath("nowhere").symlink_to("/nowhere/at/all")
    commit_all(service.path, "Odd names")


def untracked(service: Service) -> None:
    service.write("scratch.txt", "x")
    service.write("src/order_events/runtime/mine.py", "x = 1\n")


@pytest.mark.parametrize(
    "state",
    [
        lambda s: git(s.path, "branch", "template"),
        template_branch_with_work,
        forged,
        hostile_config,
        odd_names,
        untracked,
        hook("pre-commit"),
        hook("pre-merge-commit"),
        hook("post-commit"),
        hook("commit-msg"),
    ],
    ids=[
        *("template at HEAD", "template with work", "forged", "config", "odd names", "untracked"),
        *("pre-commit", "pre-merge-commit", "post-commit", "commit-msg"),
    ],
)
def test_it_updates_and_touches_nothing_else(service: Service, state: State) -> None:
    """With a branch `template`, an update once removed a team's work."""
    service.write("src/order_events/mine.py", "x = 1\n")
    service.write("README.md", service.read("README.md") + "\nOurs.\n")
    commit_all(service.path, "Our work")
    state(service)
    head = git(service.path, "symbolic-ref", "HEAD").strip()

    def refs() -> set[str]:
        lines = git(service.path, "for-each-ref").splitlines()
        return {line for line in lines if not line.endswith(f"\t{head}")}

    before, files, tip = refs(), service.files, git(service.path, "rev-parse", "HEAD").strip()
    result = update(service)
    assert result.returncode == 0, result.stdout
    assert PRESENT_LINE in service.read(LOGS)
    assert refs() == before
    assert git(service.path, "rev-parse", "HEAD~1").strip() == tip, "one commit, on top of ours"
    changed = {name for name, text in files.items() if service.files.get(name) != text}
    assert not changed & {"src/order_events/mine.py", "NOTES.md", "wip.txt", "scratch.txt"}
    assert service.read("README.md").endswith("\nOurs.\n")
    assert git(service.path, "status", "--porcelain", "--untracked-files=no") == ""
    assert update(service).stdout == "Already up to date.\n"


def test_an_aborted_update_leaves_all_as_it_was(service: Service) -> None:
    service.write(LOGS, service.read(LOGS).replace(OLD_LINE, '"""Ours."""'))
    commit_all(service.path, "Ours")
    before = snapshot(service.path)
    result = update(service)
    assert result.returncode == 1
    assert "conflicts in the files above: resolve them" in result.stdout
    git(service.path, "cherry-pick", "--abort")
    assert snapshot(service.path) == before


def test_a_shallow_clone_is_updated(service: Service, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", "--depth", "1", service.path.as_uri(), "shallow")
    shallow = Service(tmp_path / "shallow", "order_events")
    result = update(shallow)
    assert result.returncode == 0, result.stdout
    assert PRESENT_LINE in shallow.read(LOGS)


def test_a_worktree_is_updated_and_no_other(service: Service, tmp_path: Path) -> None:
    git(service.path, "worktree", "add", "--quiet", "-b", "other", str(tmp_path / "other"))
    other, tip = Service(tmp_path / "other", "order_events"), git(service.path, "rev-parse", "HEAD")
    result = update(other)
    assert result.returncode == 0, result.stdout
    assert PRESENT_LINE in other.read(LOGS)
    assert OLD_LINE in service.read(LOGS)
    assert git(service.path, "rev-parse", "HEAD") == tip
    assert git(service.path, "status", "--porcelain") == ""


def larger(tmp_path: Path, *services: Service, submodules: bool = False) -> Path:
    """A repository with files of the same names, and these services in its folders."""
    root = tmp_path / "larger"
    (root / "services").mkdir(parents=True)
    for name in ("README.md", "pyproject.toml", ".gitignore", "compose.yaml"):
        (root / name).write_text(f"# {name} of the root\n")
    git(root, "init", "--quiet")
    for number, service in enumerate(services):
        name = f"services/order events {number}"
        if submodules:
            url = ("-c", "protocol.file.allow=always", "submodule", "--quiet", "add")
            git(root, *url, str(service.path), name)
        else:
            shutil.copytree(service.path, root / name, symlinks=True)
            shutil.rmtree(root / name / ".git")
    commit_all(root, "Larger")
    return root


def test_services_in_a_larger_repository_are_updated_one_by_one(
    service: Service, tmp_path: Path
) -> None:
    root = larger(tmp_path, service, service)
    first, second = (Service(root / f"services/order events {n}", "order_events") for n in (0, 1))
    (second.path / LOGS).unlink()  # as if the first's file were at the new place of the second's
    commit_all(root, "Ours")
    first.write("README.md", first.read("README.md") + "\nOurs.\n")
    commit_all(root, "Ours, too")
    for one, other in ((first, second), (second, first)):
        files = other.files
        result = update(one, "ci=gitlab")
        if one is first:
            assert result.returncode == 0, result.stdout
            assert PRESENT_LINE in one.read(LOGS)
            assert one.read("README.md").endswith("\nOurs.\n")
        else:
            assert result.returncode == 1
            assert f"CONFLICT (modify/delete): services/order events 1/{LOGS}" in result.stdout
        assert one.has("renovate.json")
        assert other.files == files
        for name in ("README.md", "pyproject.toml", ".gitignore", "compose.yaml"):
            assert (root / name).read_text() == f"# {name} of the root\n"
    assert {path.name for path in root.iterdir()} == {
        ".git", ".gitignore", "README.md", "compose.yaml", "pyproject.toml", "services",
    }  # fmt: skip
    git(root, "cherry-pick", "--abort")
    result = update(first, "package_name=shop_events", "project_slug=shop-events")
    assert result.returncode == 0, result.stdout
    assert first.has("src/shop_events/handlers/order_created.py")
    assert not first.has("src/order_events")
    assert second.has("src/order_events")


def test_what_a_larger_repository_has_not_committed_is_refused(
    service: Service, tmp_path: Path
) -> None:
    root = larger(tmp_path)
    shutil.copytree(service.path, root / "services/new", ignore=shutil.ignore_patterns(".git"))
    new, before = Service(root / "services/new", "order_events"), snapshot(root)
    assert update(new).stdout == "update.py: commit this project to a git repository first.\n"
    (root / ".gitignore").write_text("services/new\n")
    commit_all(root, "Ignored")
    before = snapshot(root)
    assert update(new).stdout == "update.py: commit this project to a git repository first.\n"
    assert snapshot(root) == before


def test_a_rename_does_not_drop_a_submodule(service: Service, as_scaffolded: Service) -> None:
    url = ("-c", "protocol.file.allow=always", "submodule", "--quiet", "add")
    git(service.path, *url, str(as_scaffolded.path), "inner")
    commit_all(service.path, "A submodule")
    before, tip = service.files, git(service.path, "rev-parse", "HEAD")
    result = update(service, "package_name=shop_events")
    assert (result.returncode, result.stdout.count("\n")) == (1, 1)
    assert "no rename: there is a submodule" in result.stdout
    assert (service.files, git(service.path, "rev-parse", "HEAD")) == (before, tip)
    assert update(service).returncode == 0
    assert git(service.path, "ls-files", "--stage", "inner").startswith("160000")


def test_a_submodule_is_updated_and_not_what_contains_it(service: Service, tmp_path: Path) -> None:
    root = larger(tmp_path, service, submodules=True)
    inner = Service(root / "services/order events 0", "order_events")
    tip = git(root, "rev-parse", "HEAD")
    result = update(inner)
    assert result.returncode == 0, result.stdout
    assert PRESENT_LINE in inner.read(LOGS)
    assert git(root, "rev-parse", "HEAD") == tip
    assert git(root, "diff", "--name-only").strip() == "services/order events 0"


def test_a_link_in_the_template_writes_only_here(service: Service, template: Path) -> None:
    """A compromised template has a link to the outside, and one in place of a file of the team."""
    evil = service.path.parent / "evil"
    git(service.path.parent, "clone", "--quiet", str(template), "evil")
    tree = evil / "{{cookiecutter.project_slug}}"
    (service.path.parent / "outside").mkdir()
    (tree / "link").symlink_to(service.path.parent / "outside")
    (tree / "file").symlink_to("/etc/hostname")
    commit_all(evil, "Links")
    update(service, "--template", str(evil))
    assert list((service.path.parent / "outside").iterdir()) == []
    assert service.read("NOTES.md") == "Ours.\n"
