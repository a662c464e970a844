"""The template in its own repository, with an older state; and services from there."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from support.rendered import QUESTIONS, TEMPLATE, Result, Service, run

without_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
PROGRAMS = Path(__file__).with_name("programs")
"""A cookiecutter that takes less time; tools/update.py finds it there too."""
IDENTITY = {
    **{f"GIT_{role}_NAME": "Somebody" for role in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{role}_EMAIL": "somebody@example.com" for role in ("AUTHOR", "COMMITTER")},
    "PATH": os.pathsep.join(map(str, (PROGRAMS, Path(sys.executable).parent, os.environ["PATH"]))),
}

LOGS = "src/order_events/runtime/logs.py"
OLD_LINE = '"""One log line for each event, as it was."""'
PRESENT_LINE = (
    '"""One log line for each event: JSON, or human-readable text, redacted. '
    'Also Kubernetes\' termination message."""'
)

TREE = "{{cookiecutter.project_slug}}"
PACKAGE = f"{TREE}/src/{{{{cookiecutter.package_name}}}}"
OLD_STATE = {
    "cookiecutter.json": (
        f'"_template_version": "{QUESTIONS["_template_version"]}"',
        '"_template_version": "0.0.1"',
    ),
    f"{PACKAGE}/runtime/logs.py": (PRESENT_LINE, OLD_LINE),
    # The team's files were written differently then: a registry, a model, a test and the settings.
    f"{TREE}/stubs/registry.py": ('"""', '"""As it was. '),
    f"{TREE}/stubs/json/handler.py": ("(min_length=1)", "(min_length=2)"),
    f"{TREE}/stubs/json/test_handler.py": ('b"{}"', 'b"[]"'),
    f"{PACKAGE}/settings.py": ('"""', '"""As it was. '),
    f"{TREE}/tests/test_rehearsal.py": ('"""', '"""As it was. '),
}
"""The differences of v0.0.1: in each file the present text, and the old text."""


def git(folder: Path, *arguments: str) -> str:
    return run("git", *arguments, cwd=folder, env=IDENTITY).stdout


def commit_all(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)


def copy_present_state(folder: Path) -> None:
    """Copy the working tree, with its uncommitted files."""
    ours = git(TEMPLATE, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, ours):
        if (TEMPLATE / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TEMPLATE / name, folder / name)


def write_template(folder: Path) -> Path:
    """A repository with two releases of the template: an older state, v0.0.1, and the present state."""
    copy_present_state(folder)
    git(folder, "init", "--quiet")
    present = {folder / name: (folder / name).read_text("utf-8") for name in OLD_STATE}
    for path, (new, old) in zip(present, OLD_STATE.values(), strict=True):
        assert new in present[path], path
        path.write_text(present[path].replace(new, old, 1), encoding="utf-8")
    commit_all(folder, "0.0.1")
    git(folder, "tag", "v0.0.1")
    for path, text in present.items():
        path.write_text(text, encoding="utf-8")
    commit_all(folder, "The present state")
    git(folder, "tag", f"v{QUESTIONS['_template_version']}")
    git(folder, "repack", "-a", "-d", "--quiet")  # once, and not for each clone
    return folder


def clone_template(folder: Path) -> Path:
    """This repository with its own history, and the present state as its last commit."""
    git(TEMPLATE, "clone", "--quiet", "--no-checkout", TEMPLATE.as_uri(), str(folder))
    copy_present_state(folder)
    commit_all(folder, "The present state")
    return folder


def scaffold(template: Path, folder: Path, *arguments: str) -> Service:
    command = ["cookiecutter", f"git+{template.as_uri()}", "--no-input"]
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
