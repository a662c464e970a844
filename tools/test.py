"""Runs the tests: ``python3 tasks.py test [--all | --measure] [PYTEST ARGUMENTS]``.

It prints first which tests run, which are left out, and their measured seconds. Without ``--all`` it leaves
out LEFT_OUT, and of the runtime's tests those of BROKERS_LEFT_OUT. ``--measure`` runs all and writes the figures. With a
path among the arguments, exactly that runs.

Ctrl-C and SIGTERM end it in about a second: pytest has most of it for its own cleanup, then every process that the
tests started is killed, and their temporary folder is deleted. ``--basetemp`` keeps the files of failed tests elsewhere.
"""

import ast
import ctypes
import json
import os
import platform
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

LEFT_OUT: dict[str, str] = {
    "tests/test_suites.py": "every service's own tests, on other Pythons, with the oldest dependencies",
    "tests/test_servers.py::test_the_runtime_passes_its_tests_on_rabbitmq_4": "RabbitMQ 4 of Debian 13",
    "tests/test_servers.py::test_only_a_command": "the same root, by its programs",
    "tests/test_servers.py::test_an_interrupted_run": "Ctrl-C while that runs",
    "tests/test_under_systemd.py": "the unit of a service, under a real systemd",
    "tests/test_render.py::test_every_combination_is_complete": "all combinations of answers, rendered",
    "tests/test_render.py::test_it_is_typed": "mypy on every distinct service",
    "tests/test_install.py::test_the_commands_of_the_readme_work": "README commands, by uv and pip",
    "tests/test_install.py::test_an_installed_service_needs": "a wheel of each broker's service",
    "tests/test_dependencies.py": "the dependencies resolve, newest and oldest",
    "tests/test_deploy.py": "images, Kubernetes, Compose, systemd",
    "tests/test_ci.py::test_the_steps_that_need_no_server_pass": "the steps of CI files, run",
    "tests/test_systems.py::test_the_runtime_names_nothing": "mypy for Windows and macOS",
    "tests/test_update.py": "updates that keep what a team has edited",
    "tests/test_update_states.py": "repositories in which an update must refuse or lose nothing",
    "tests/test_new_handler.py": "handlers that are added, for types of all kinds",
    "tests/test_image.py": "the Dockerfile, built and run",
    "tests/runtime/test_nats.py": "NATS and its clusters",
    "tests/runtime/test_replay.py": "replays that are interrupted",
    "tests/runtime/test_rehearse.py": "right and wrong handlers, rehearsed",
    "tests/runtime/test_browse.py": "the page of dead letters, in Chromium",
    "tests/runtime/test_letters.py::test_of_ten_thousand": "10,000 dead letters",
    "tests/runtime/test_topology.py::test_bindings_need": "a user who has just the documented rights",
    "tests/test_alerts.py": "each alert and panel, by promtool and Prometheus",
    "tests/test_howtos.py": "the how-tos of docs/, followed",
    "tests/test_tutorial.py": "the tutorial, followed",
    "tests/test_first_incident.py": "docs/first-incident.md, followed",
    "tests/test_rehearsals.py": "each handler of the documentation, rehearsed",
    "tests/test_update_jobs.py": "the weekly update jobs, on a real remote",
    "tests/test_own_broker.py": "docs/own-broker.md, followed",
    "tests/test_idempotency.py": "docs/idempotency.md, followed",
    "tests/test_mutation.py": "mutants of one function",
    "tests/test_benchmarks.py::test_the_benchmarks_hold": "each benchmark in short",
    "tests/test_scaling.py::test_two_processes_share": "the scaling benchmark in short",
    "tests/test_adopt.py": "docs/adopt.md, followed",
    "tests/test_chaos.py::test_chaos_loses_nothing": "a round of chaos on each of two brokers",
    "tests/test_chaos.py::test_twenty_rolling_restarts": "20 restarts and 50 SIGKILLs",
    "tests/test_chaos.py::test_a_cluster_whose": "three nodes, the leader killed three times",
    "tests/test_chaos.py::test_a_cluster_tells": "counts of clusters without a leader",
    "tests/test_chaos.py::test_sigterm_at_any_moment": "SIGTERM every 25 ms of the start",
}
"""Tests that run only with --all, and what they are: ids as pytest prints them, or their beginnings."""
BROKERS_LEFT_OUT = ("rabbitmq", "redis", "kafka", "sqs", "postgres", "mqtt")
"""Brokers in RUNTIME_TESTS only with --all: their servers are not on PyPI, or slow. SQLite and NATS stay."""
MARKER_LEFT_OUT = "very_slow"
RUNTIME_TESTS = {
    "tests/runtime": "the runtime where it lies",
    f"{TREE.name}/tests/runtime": "the tests that every service gets",
}
"""The files of each folder that are one line of the overview."""
FIGURES = Path(__file__).with_name("test_seconds.json")
"""Seconds of each line of the overview, without and only with --all. ``python3 tasks.py test --measure`` writes them."""

CLEANUP_SECONDS = 0.7
"""The time for pytest's cleanup after Ctrl-C."""
KILL_SECONDS = 5.0
"""The time for the kernel to end killed processes."""
MEMORY = Path("/dev/shm")
ROOM_BYTES = 12 * 2**30
"""Several times the size of the files of a whole run and its servers."""
DELETE_SECONDS = 1.0
"""The time to delete the temporary folder after Ctrl-C; a large folder is deleted in the background."""


def main(arguments: list[str]) -> int:
    if any(Path(one.partition("::")[0]).exists() for one in arguments):
        return run_pytest(arguments)
    print(overview(everything="--all" in arguments or "--measure" in arguments), flush=True)
    return run_pytest(["-p", "tools.test", *arguments])


# -- the overview


def overview(everything: bool) -> str:
    """The tests that run, those left out, and the seconds of each."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    seconds: dict[str, list[float]] = figures.get("seconds", {})
    runs = [(seconds.get(name, [])[:1], name, about) for name, about in lines()]
    left_out = [(seconds.get(name, [])[1:], name, about) for name, about in left_out_lines()]
    whole = minutes([*runs, *left_out])
    if everything:
        text = [f"All tests, about {whole}:", "", *map(row, [*runs, *left_out]), ""]
    else:
        text = [f"A selection of the tests, about {minutes(runs)}:", "", *map(row, runs), ""]
        text += ["Left out:", "", *map(row, left_out), ""]
        text += [f"`python3 tasks.py test --all` runs these too, all in about {whole}."]
    measured = figures.get("measured", "never: `python3 tasks.py test --measure`")
    text += [f"The seconds were measured {measured}. Paths and options go to pytest."]
    text += ["Tests of a broker whose server is missing are skipped, with the reason.", ""]
    return "\n".join(text)


Line = tuple[list[float], str, str]
"""The seconds, if they were measured; the path; the description."""


def lines() -> Iterator[tuple[str, str]]:
    """The tests without --all: paths, each with the first sentence of its docstring."""
    for folder, about in RUNTIME_TESTS.items():
        yield folder, f"{about}, on the embedded broker and NATS"
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        name = file.relative_to(ROOT).as_posix()
        if name not in LEFT_OUT:
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            yield name, " ".join(docstring.partition("\n\n")[0].split())


def left_out_lines() -> Iterator[tuple[str, str]]:
    for folder, about in RUNTIME_TESTS.items():
        yield folder, f"{about}, on {', '.join(BROKERS_LEFT_OUT)}, and what waits for time-outs"
    yield from LEFT_OUT.items()


def row(line: Line) -> str:
    seconds, name, about = line
    return f"  {f'{sum(seconds):.0f} s' if seconds else '?':>6}  {name}: {about}"


def minutes(of: Iterable[Line]) -> str:
    total = sum(sum(seconds) for seconds, _, _ in of)
    return f"{total // 60:.0f} min {total % 60:.0f} s" if total else "? min"


# -- pytest's plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="leave nothing out")
    parser.addoption("--measure", action="store_true", help="as --all, and write the figures")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--measure") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Figures())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all") and not config.getoption("--measure"):
        left_out = [item for item in items if is_left_out(item.nodeid, item.keywords)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def is_left_out(node_id: str, keywords: Iterable[str]) -> bool:
    if node_id.startswith(tuple(LEFT_OUT)):
        return True
    if node_id.startswith(tuple(RUNTIME_TESTS)):
        # A broker's tests are the files with its name, and the tests with its name as a parameter.
        return MARKER_LEFT_OUT in keywords or any(name in node_id for name in BROKERS_LEFT_OUT)
    return False


class Figures:
    """Adds up the seconds of the tests, for the lines of the overview."""

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.seconds: dict[str, list[float]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        names = [*LEFT_OUT, *RUNTIME_TESTS, report.nodeid.partition("::")[0]]
        name = next(name for name in names if report.nodeid.startswith(name))
        both = self.seconds.setdefault(name, [0.0, 0.0])
        both[is_left_out(report.nodeid, report.keywords)] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Tests run in parallel, so the sum of their seconds exceeds the elapsed time."""
        share = (time.monotonic() - self.began_at) / max(1, sum(map(sum, self.seconds.values())))
        rounded = {
            name: [round(part * share, 1) for part in both]
            for name, both in sorted(self.seconds.items())
        }
        today = datetime.now(UTC).date()
        measured = f"on {today}, {os.cpu_count()} cores, Python {platform.python_version()}"
        text = json.dumps({"measured": measured, "seconds": rounded}, indent=1)
        FIGURES.write_text(f"{text}\n", encoding="utf-8", newline="\n")


# -- the process


def run_pytest(arguments: list[str]) -> int:
    """Run pytest with its own temporary folder; nothing is left of it when this returns."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir=in_memory())).resolve()
    folder.chmod(0o711)  # some tests run as another user
    # A passed test no longer needs its files: they may take gigabytes.
    command = [sys.executable, "-m", "pytest", "-o", "tmp_path_retention_policy=failed", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)})
    seconds: float | None = None
    try:
        return wait_for(process)
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


def in_memory(folder: Path = MEMORY, room_bytes: int = ROOM_BYTES) -> Path | None:
    """A folder in memory with this room, where programs may run, unless TMPDIR names another folder; otherwise None.

    Creating, writing and deleting a file there takes a twentieth of the CPU time of ext4. No test needs
    its files after a crash of the machine, which only a disk would keep.
    """
    meminfo = Path("/proc/meminfo")
    if "TMPDIR" in os.environ or not (folder.is_dir() and meminfo.exists()):
        return None
    found = os.statvfs(folder)
    free_kb = int(meminfo.read_text().partition("MemAvailable:")[2].split()[0])
    room = min(found.f_bavail * found.f_frsize, free_kb * 1024)
    may = os.access(folder, os.W_OK) and not found.f_flag & os.ST_NOEXEC
    return folder if may and room >= room_bytes else None


def delete(folder: Path, seconds: float | None) -> None:
    """Delete the folder; another process deletes the rest after this time."""
    for mounted in mounts_below(folder):
        subprocess.run(["umount", "-l", mounted], check=False)
    program = "import shutil, sys; shutil.rmtree(sys.argv[1], ignore_errors=True)"
    command = [sys.executable, "-c", program, str(folder)]
    deleting = subprocess.Popen(command, start_new_session=True)
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
    """Make this process the parent of every descendant whose parent ends, such as a server that became a daemon."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """The exit code of pytest; adopted processes that end meanwhile are reaped, since a zombie looks alive to others."""
    while sys.platform == "linux" and process.returncode is None:
        pid, status = os.waitpid(-1, 0)
        if pid == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
    return process.wait()


def kill_descendants() -> None:
    """Kill until no descendant is left: one may start another meanwhile. Only on Linux; elsewhere pytest must."""
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
