"""Runs the tests: ``python3 tasks.py test [--all] [PYTEST ARGUMENTS]``.

Without ``--all``, the tests in LEFT_OUT are left out, unless an argument names a path: then exactly that runs. It
prints first what runs, what is left out, and how long each part took when it was measured. ``--measure`` runs all
and writes these figures.

Ctrl-C and SIGTERM end it in about a second: pytest has most of it for its own cleanup, then every process that the
tests started is killed, and their temporary folder is deleted. ``--basetemp`` keeps the files of failed tests elsewhere.
"""

import ast
import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tools import ROOT, TREE

SERVICE_TESTS = f"{TREE.name}/tests/runtime"
LEFT_OUT: dict[str, str] = {
    "tests/test_suites.py": "every service's own tests, each in an environment of its own",
}
"""Only with --all, and why: node ids as pytest prints them, or the beginning of such ids."""
LEFT_OUT_MARKERS = ("very_slow",)
"""Tests with one of these run only with --all, too."""
FOLDERS = {
    "tests/runtime": "the runtime where it lies, on the brokers that are installed",
    SERVICE_TESTS: "the tests that every service gets, here on the brokers that are installed",
}
"""Their files are one line of the overview."""
FIGURES = Path(__file__).with_name("test_seconds.json")
"""Seconds of each line of the overview, without and with LEFT_OUT: written by ``python3 tasks.py test --measure``."""

CLEANUP_SECONDS = 0.7
"""For pytest, after Ctrl-C."""
KILL_SECONDS = 5.0
"""For the kernel, to end what was killed."""
DELETE_SECONDS = 1.0
"""For the temporary folder, after Ctrl-C; a large one is deleted in the background."""


def main(arguments: list[str]) -> int:
    measure = "--measure" in arguments
    everything = measure or "--all" in arguments
    rest = [one for one in arguments if one not in ("--all", "--measure")]
    if any(Path(one.partition("::")[0]).exists() for one in rest):
        return run_pytest(rest)
    print(overview(everything), flush=True)
    if measure:
        return run_pytest(["-p", "tools.test", *rest])
    return run_pytest([*([] if everything else selection()), *rest])


def selection() -> list[str]:
    """The arguments of pytest that leave out what only --all runs."""
    markers = " and ".join(f"not {marker}" for marker in LEFT_OUT_MARKERS)
    return ["-m", markers, *(f"--deselect={tests}" for tests in LEFT_OUT)]


# -- the overview


def overview(everything: bool) -> str:
    """What runs, what is left out, and the seconds of each."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    seconds: dict[str, list[float]] = figures.get("seconds", {})
    runs = [(lasts(seconds, name, 0), name, about) for name, about in lines()]
    left_out = [(lasts(seconds, name, 1), name, about) for name, about in left_out_lines()]
    if everything:
        total, others = minutes(seconds, everything=True), [*runs, *left_out]
        head = [f"All tests, about {total}:"]
    else:
        total, others = minutes(seconds, everything=False), runs
        head = [f"These tests, about {total}:"]
    text = [*head, "", *map(row, others), ""]
    if not everything:
        text += ["Left out:", "", *map(row, left_out), ""]
        whole = minutes(seconds, everything=True)
        text += [f"`python3 tasks.py test --all` runs them too, in about {whole}."]
    measured = figures.get("measured", "never: `python3 tasks.py test --measure`")
    text += [f"Seconds were measured {measured}. Paths and options go to pytest."]
    text += ["Tests of a broker whose server is missing are skipped, with the reason.", ""]
    return "\n".join(text)


def lines() -> Iterator[tuple[str, str]]:
    """Each line of the overview that runs without --all: its path, and the first sentence of its docstring."""
    yield from FOLDERS.items()
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        name = file.relative_to(ROOT).as_posix()
        if name not in LEFT_OUT:
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            yield name, " ".join(docstring.partition("\n\n")[0].split())


def left_out_lines() -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        yield folder, f"tests that are marked {' or '.join(LEFT_OUT_MARKERS)}"
    yield from LEFT_OUT.items()


def row(cells: tuple[str, str, str]) -> str:
    seconds, name, about = cells
    return f"  {seconds:>6}  {name}: {about}"


def lasts(seconds: dict[str, list[float]], name: str, part: int) -> str:
    return f"{seconds[name][part]:.0f} s" if name in seconds else "?"


def minutes(seconds: dict[str, list[float]], *, everything: bool) -> str:
    total = sum(sum(both) if everything else both[0] for both in seconds.values())
    return f"{total // 60:.0f} min {total % 60:.0f} s" if total else "? min"


# -- the figures: with --measure, pytest loads this module as a plugin


def line_of(node_id: str) -> str:
    """The line of the overview to which a test belongs."""
    for name in (*LEFT_OUT, *FOLDERS):
        if node_id.startswith(name):
            return name
    return node_id.partition("::")[0]


def is_left_out(node_id: str, keywords: Iterable[str]) -> bool:
    return node_id.startswith(tuple(LEFT_OUT)) or not set(LEFT_OUT_MARKERS).isdisjoint(keywords)


class Figures:
    """Adds up the seconds of the tests."""

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.seconds: dict[str, list[float]] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        both = self.seconds.setdefault(line_of(report.nodeid), [0.0, 0.0])
        both[is_left_out(report.nodeid, report.keywords)] += report.duration

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        """Tests run side by side, so the sum of their seconds is more than the time that passed."""
        share = (time.monotonic() - self.began_at) / max(1, sum(map(sum, self.seconds.values())))
        rounded = {
            name: [round(part * share, 1) for part in both]
            for name, both in sorted(self.seconds.items())
        }
        today = datetime.now(UTC).date()
        measured = f"on {today}, {os.cpu_count()} cores, Python {platform.python_version()}"
        text = json.dumps({"measured": measured, "seconds": rounded}, indent=1)
        FIGURES.write_text(f"{text}\n", encoding="utf-8", newline="\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Figures())


# -- the process


def run_pytest(arguments: list[str]) -> int:
    """Run pytest with a temporary folder of its own; nothing of it is left when this returns."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="tests-")).resolve()
    # A test that passed needs its files no longer: there may be gigabytes of them.
    command = [sys.executable, "-m", "pytest", "-o", "tmp_path_retention_policy=failed", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)})
    seconds: float | None = None
    try:
        return process.wait()
    except KeyboardInterrupt:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)  # nothing may interrupt the cleanup
        seconds = DELETE_SECONDS
        with suppress(subprocess.TimeoutExpired):
            process.wait(CLEANUP_SECONDS)
        print("\nInterrupted: the processes of the tests are killed.", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
        kill_descendants()
        delete(folder, seconds)


def delete(folder: Path, seconds: float | None) -> None:
    """Delete it; what is left after this time, another process deletes."""
    for mounted in mounts_below(folder):
        subprocess.run(["umount", "-l", mounted], check=False)
    if os.name == "nt":
        shutil.rmtree(folder, ignore_errors=True)
        return
    deleting = subprocess.Popen(["rm", "-rf", str(folder)], start_new_session=True)
    try:
        deleting.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"{folder} is being deleted.", file=sys.stderr)


def mounts_below(folder: Path) -> list[str]:
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return []
    points = [line.split()[1] for line in mounts.read_text().splitlines()]
    return [point for point in points if point.startswith(f"{folder}/")]


def adopt_orphans() -> None:
    """Make this process the parent of every descendant that loses its own, as a server that became a daemon does."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def kill_descendants() -> None:
    """Kill until there are none: one may start another meanwhile. Only on Linux; elsewhere pytest's cleanup must do."""
    give_up_at = time.monotonic() + KILL_SECONDS
    while (found := descendants()) and time.monotonic() < give_up_at:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def descendants() -> set[int]:
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            _, _, rest = file.read_text(errors="replace").rpartition(")")
            parents[int(file.parent.name)] = int(rest.split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
