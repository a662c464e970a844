"""Windows and macOS, as far as Linux tests them: names of files, line ends, and the names that Python lacks there."""

import fnmatch
import ntpath
import re
import shutil
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from support.rendered import CACHES, QUESTIONS, TEMPLATE, TREE, Render, Service, mypy_cache, run

# Every Python with it on its path imports it at start: it removes the names that Windows lacks.
LIKE_WINDOWS = """
import asyncio
import os
import signal
import subprocess
import sys

THERE = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
for name in [name for name in vars(signal) if name.startswith("SIG") and name not in THERE]:
    delattr(signal, name)
    signal.Signals._member_map_.pop(name, None)
for name in (
    "fork", "forkpty", "getegid", "geteuid", "getgid", "getpgid", "getpgrp", "getppid", "getuid", "killpg",
    "setpgid", "setsid", "uname", "wait3",
):
    delattr(os, name)
for name in ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None

def not_there(*_, **__):
    raise NotImplementedError("LIKE WINDOWS: not there")

for name in (
    "add_signal_handler", "remove_signal_handler", "add_reader", "add_writer", "connect_read_pipe",
    "connect_write_pipe", "create_unix_connection", "create_unix_server",
):
    setattr(asyncio.SelectorEventLoop, name, not_there)
"""


@pytest.fixture
def like_windows(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "like-windows"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(LIKE_WINDOWS)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    "program",
    [
        "import signal; signal.SIGKILL",
        "import signal; signal.Signals['SIGHUP']",
        "import os; os.killpg(1, 0)",
        "import fcntl",
        "import asyncio; asyncio.new_event_loop().add_signal_handler(2, print)",
    ],
)
def test_what_windows_lacks_is_not_there(
    tmp_path: Path, like_windows: dict[str, str], program: str
) -> None:
    run(sys.executable, "-c", program, cwd=tmp_path)
    assert run(
        sys.executable, "-c", program, cwd=tmp_path, check=False, env=like_windows
    ).returncode


def copy_template(folder: Path) -> Path:
    """The template's files in git that a render or the demo needs."""
    copy = folder / "template"
    copy.mkdir()
    for name in ("cookiecutter.json", "local_extensions.py", ".gitattributes"):
        shutil.copy(TEMPLATE / name, copy)
    for name in ("hooks", "tools", TREE.name):
        shutil.copytree(TEMPLATE / name, copy / name, ignore=shutil.ignore_patterns(*CACHES))
    return copy


def test_the_demo_needs_nothing_that_windows_lacks(
    tmp_path: Path, like_windows: dict[str, str]
) -> None:
    template = copy_template(tmp_path)
    shown = run(sys.executable, "-m", "tools.demo", cwd=template, env=like_windows).stdout
    counted = dict(re.findall(r"^ +(published|handled|lost|handled twice) +(\d+)", shown, re.M))
    assert counted == {"published": "60", "handled": "60", "lost": "0", "handled twice": "0"}


def test_the_demo_of_a_service_needs_nothing_that_windows_lacks(
    render: Render, like_windows: dict[str, str]
) -> None:
    service = render(broker="sqlite")
    path = f"{service.path / 'src'}:{like_windows['PYTHONPATH']}"
    environment = service.environment()
    shown = run(
        str(environment / "bin/python"), "-m", "order_events", "demo",
        cwd=service.path, env={"PYTHONPATH": path},
    )  # fmt: skip
    assert "published 20, handled 20, dead letters 0" in shown.stdout


# MQTT is not for Windows, and docs/brokers/mqtt.md says so.
@pytest.mark.parametrize(
    ("broker", "system"),
    [
        pair
        for pair in product(QUESTIONS["broker"], ["win32", "darwin"])
        if pair != ("mqtt", "win32")
    ],
)
def test_the_runtime_names_nothing_that_a_system_lacks(
    render: Render, broker: str, system: str
) -> None:
    """mypy knows for each name in the standard library on which systems it exists."""
    service = render(broker=broker)
    check = ["mypy", f"--platform={system}", f"--cache-dir={mypy_cache().name}/{system}", "src"]
    result = service.run(*check, environment=service.environment())
    assert result.returncode == 0, result.stdout


def test_that_check_sees(render_own: Render) -> None:
    service = render_own(broker="sqlite")
    service.write("src/order_events/settings.py", "import signal\n\nSIGNAL = signal.SIGKILL\n")
    check = ["mypy", "--platform=win32", f"--cache-dir={mypy_cache().name}/win32", "src"]
    result = service.run(*check, environment=service.environment())
    assert 'Module has no attribute "SIGKILL"' in result.stdout


def test_what_is_not_rendered_is_found_with_the_separators_of_windows_too() -> None:
    """Cookiecutter matches paths with the system's separators; fnmatch normalizes both sides first."""
    patterns = [ntpath.normcase(pattern) for pattern in QUESTIONS["_copy_without_render"]]
    of_the_runtime = [*(TREE / "src").glob("*/runtime/**/*.py"), *(TREE / "stubs").rglob("*.py")]
    assert of_the_runtime
    for file in of_the_runtime:
        path = ntpath.normcase(ntpath.join(*file.relative_to(TREE).parts))
        assert any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns), path


def test_hooks_write_paths_that_mean_the_same_everywhere(render: Render) -> None:
    manifest = render().read("src/order_events/runtime/MANIFEST.sha256")
    assert "\\" not in manifest
    assert "\r" not in manifest


@pytest.mark.parametrize("what", ["the template", "a service"])
def test_no_two_files_differ_only_in_case_and_none_has_a_name_of_windows(
    render: Render, what: str
) -> None:
    if what == "the template":
        listed = run("git", "ls-files", "-z", cwd=TEMPLATE).stdout.split("\0")
        paths = [path for path in listed if path and "{" not in path]
    else:
        paths = [*render(handlers="order_created, ORDERcreated, console").files]
    assert [path for path, times in Counter(map(str.lower, paths)).items() if times > 1] == []
    names = {Path(part).stem.lower() for path in paths for part in Path(path).parts}
    assert not names & {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(10))}
    assert not re.search(r'[<>:"|?*\\]', "".join(paths))


@pytest.mark.parametrize("what", ["the template", "a service"])
def test_a_checkout_of_git_for_windows_has_the_same_bytes(
    render: Render, tmp_path: Path, what: str
) -> None:
    """Git for Windows sets core.autocrlf, and the manifest's hashes would fit no file with other line ends."""
    folder = copy_template(tmp_path) if what == "the template" else render().copy_to(tmp_path).path
    original, checkout = Service(folder, "order_events"), checked_out(folder, tmp_path / "checkout")
    assert checkout.files == original.files


def test_without_gitattributes_it_would_not(render_own: Render, tmp_path: Path) -> None:
    service = render_own()
    (service.path / ".gitattributes").unlink()
    checkout = checked_out(service.path, tmp_path / "checkout")
    assert b"\r\n" in checkout.files["src/order_events/runtime/service.py"]


def checked_out(folder: Path, checkout: Path) -> Service:
    """The files of a clone, with git's conversion of line ends to those of Windows."""
    git = ["git", "-c", "core.autocrlf=true", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    git += ["-c", "commit.gpgsign=false", "-c", "core.safecrlf=false"]
    run(*git, "init", "--quiet", cwd=folder)
    run(*git, "add", "--all", "--force", cwd=folder)
    run(*git, "commit", "--quiet", "--message=x", cwd=folder)
    shutil.move(folder / ".git", checkout.with_suffix(".git"))
    run(*git, "clone", "--quiet", str(checkout.with_suffix(".git")), str(checkout), cwd=folder)
    shutil.rmtree(checkout / ".git")
    return Service(checkout, "order_events")
