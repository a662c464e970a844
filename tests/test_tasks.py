"""``python3 tasks.py test`` prints what it leaves out and how long it takes, and ends every process after Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from support.dealing import dealt
from support.rendered import TEMPLATE
from tools.test import FIGURES, LEFT_OUT, in_memory, lines, overview

MOST_SECONDS = 300
"""The time limit of the tests without --all."""
AT_ONCE_SECONDS = 10
"""An interrupted run takes a second and a half on an idle machine."""


def test_what_is_left_out_exists() -> None:
    for node_id in LEFT_OUT:
        file, _, function = node_id.partition("::")
        text = (TEMPLATE / file).read_text("utf-8")
        assert re.search(rf"^(    )?(async )?def {function}", text, re.M), node_id


def test_every_test_file_has_a_figure_and_those_without_all_take_less_than_five_minutes() -> None:
    """If it fails: `python3 tasks.py test --measure`, and a longer LEFT_OUT in tools/test.py."""
    seconds = json.loads(FIGURES.read_text("utf-8"))["seconds"]
    assert seconds.keys() >= {name for name, _ in lines()} | LEFT_OUT.keys()
    assert sum(without for without, _ in seconds.values()) < MOST_SECONDS


def test_the_overview_says_what_runs_and_what_is_left_out() -> None:
    runs, _, left_out = overview(everything=False).partition("Left out")
    assert "tests/test_tasks.py: ``python3 tasks.py test`` prints what it leaves out" in runs
    for node_id, about in LEFT_OUT.items():
        assert f"{node_id}: {about}" in left_out
        assert f"{node_id}: {about}" not in runs
    assert "tasks.py test --all" in left_out
    everything = overview(everything=True)
    assert "Left out" not in everything
    assert all(f"{node_id}: {about}" in everything for node_id, about in LEFT_OUT.items())


def test_the_longest_tests_begin_at_once_on_every_worker_but_the_first() -> None:
    items = list(range(41))
    order = dealt(items, [number % 8 == 7 for number in items], workers=4)
    assert sorted(order) == items
    parts = [order[start:end] for start, end in pairwise((0, 10, 20, 30, 41))]  # like xdist deals
    assert [part[:2] for part in parts] == [[0, 1], [7, 31], [15, 39], [23, 29]]
    assert dealt([1, 2], [False, True], workers=4) == [2, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /dev/shm")
def test_the_files_of_the_tests_are_in_memory_where_there_is_room_and_nothing_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR")
    assert in_memory(tmp_path, room_bytes=1) == tmp_path
    assert in_memory(tmp_path, room_bytes=2**60) is None
    assert in_memory(tmp_path / "missing", room_bytes=1) is None
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert in_memory(tmp_path, room_bytes=1) is None


# -- Ctrl-C

SLOW_TESTS = '''
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

STUBBORN = """
import os, signal, sys, time
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(signum, signal.SIG_IGN)
if sys.argv[1] == "daemon" and os.fork():
    sys.exit()
open(sys.argv[2], "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["child", "session", "daemon"])
def test_slow(how, tmp_path):
    folder = tempfile.mkdtemp()
    started = f"{os.environ['STARTED']}/{how}"
    command = [sys.executable, "-c", STUBBORN, how, started]
    subprocess.Popen(command, cwd=folder, start_new_session=how != "child").wait()
    signal.pause()
'''
"""Each starts a process that ignores every signal: in the group of the tests, in its own group, and as a daemon."""


def processes_of(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Returns the seconds that it took."""
    began_at = time.monotonic()
    while not condition():
        assert time.monotonic() < began_at + seconds
        time.sleep(0.02)
    return time.monotonic() - began_at


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_run_of_the_tests_leaves_nothing_behind(
    tmp_path: Path, signum: signal.Signals
) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW_TESTS)
    started, temporary = tmp_path / "started", tmp_path / "temporary"
    started.mkdir()
    temporary.mkdir()
    arguments = ["-n", "3", "-p", "no:cacheprovider", str(tmp_path / "test_slow.py")]
    command = [sys.executable, "tasks.py", "test", *arguments]
    environment = {**os.environ, "STARTED": str(started), "TMPDIR": str(temporary)}
    with (tmp_path / "output").open("wb") as output:
        run = subprocess.Popen(
            command,
            cwd=TEMPLATE,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a terminal also gives each command its own group
        )
    try:
        wait_until(lambda: len([*started.iterdir()]) == 3, seconds=60)
        wait_until(lambda: len(processes_of(str(started))) == 3, seconds=10)
        os.killpg(run.pid, signum) if signum == signal.SIGINT else run.send_signal(signum)
        wait_until(lambda: run.poll() is not None, seconds=AT_ONCE_SECONDS)
        assert run.returncode == 130, (tmp_path / "output").read_text()
        assert processes_of(str(started)) == processes_of(str(temporary)) == []
        assert [*temporary.iterdir()] == []
    finally:
        run.kill()
        for pid in processes_of(str(started)):
            os.kill(pid, signal.SIGKILL)
