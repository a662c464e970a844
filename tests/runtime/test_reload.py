"""``run --reload``: the real program, changed files and real signals."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from harness.process import ServiceProcess
from harness.scene import wait_until

SOURCES = Path(__file__).parents[2] / "examples/order-events/src"
HANDLERS = """
import asyncio

from order_events.runtime.message import Message


async def work(body: bytes, message: Message) -> None:
    print('{"event": "working"}', flush=True)
    await asyncio.sleep(1)
    print('{"event": "worked VERSION"}', flush=True)


HANDLERS = {"work": work}
"""


class Reloading:
    """A copy of the example's service, and its process."""

    def __init__(self, folder: Path) -> None:
        subprocess.run(["cp", "-r", str(SOURCES), str(folder / "src")], check=True)
        self.handlers = folder / "src/order_events/handlers/__init__.py"
        self.write(1)
        self.environment = {
            "CONSUMER_BROKER_URL": f"sqlite:///{folder.as_posix()}/queue.db",
            "LEDGER": str(folder / "ledger"),
            "PYTHONPATH": os.pathsep.join([str(folder / "src"), os.environ.get("PYTHONPATH", "")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": os.environ["PATH"],
        }
        self.command = [sys.executable, "-m", "order_events"]

    def write(self, version: object) -> None:
        self.handlers.write_text(HANDLERS.replace("VERSION", str(version)), encoding="utf-8")

    def start(self) -> ServiceProcess:
        return ServiceProcess([*self.command, "run", "--reload"], self.environment)

    def publish(self) -> None:
        command = [*self.command, "publish", "{}"]
        folder = Path(self.environment["LEDGER"]).parent
        subprocess.run(command, env=self.environment, cwd=folder, check=True, capture_output=True)


@pytest.fixture
def reloading(tmp_path: Path) -> Reloading:
    pytest.importorskip("watchfiles")
    return Reloading(tmp_path)


@pytest.fixture
def process(reloading: Reloading) -> Iterator[ServiceProcess]:
    process = reloading.start()
    yield process
    process.child.terminate()
    process.wait()
    process.close()


def count(process: ServiceProcess, event: str) -> int:
    return sum(found["event"] == event for found in process.events)


def wait_for(process: ServiceProcess, event: str, times: int) -> None:
    wait_until(lambda: count(process, event) >= times or process.child.poll() is not None)
    assert count(process, event) == times, (process.events, process.stderr)


@pytest.mark.slow
def test_a_changed_file_ends_the_service_gracefully_and_starts_it_again(
    reloading: Reloading, process: ServiceProcess
) -> None:
    wait_for(process, "consuming", 1)
    reloading.publish()
    wait_for(process, "working", 1)
    reloading.write(2)
    wait_for(process, "consuming", 2)
    names = [event["event"] for event in process.events]
    assert names.index("worked 1") < names.index("drained") < names.index("stopped")
    assert "handlers/__init__.py has changed" in process.stderr
    reloading.publish()
    wait_for(process, "working", 2)
    process.child.send_signal(signal.SIGINT)
    assert process.child.wait(30) == 0
    wait_for(process, "worked 2", 1)
    assert count(process, "drained") == 2
    assert count(process, "message_abandoned") == 0


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_service_that_cannot_start_waits_for_the_next_change(
    reloading: Reloading, process: ServiceProcess, signum: signal.Signals
) -> None:
    wait_for(process, "consuming", 1)
    reloading.write("'\n(")
    wait_until(lambda: "ended with exit code 1; waiting for a change" in process.stderr)
    assert "SyntaxError" in process.stderr
    reloading.write(2)
    wait_for(process, "consuming", 2)
    process.child.send_signal(signum)
    assert process.child.wait(30) == 0
    wait_for(process, "stopped", 2)


@pytest.mark.slow
def test_env_is_read_again_each_time_that_an_editor_has_replaced_it(
    reloading: Reloading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first it does not exist."""
    monkeypatch.chdir(tmp_path)
    with closing(reloading.start()) as process:
        wait_for(process, "consuming", 1)
        for times in (2, 3):
            (tmp_path / "saved").write_text(f"CONSUMER_CONCURRENCY={times}\n", encoding="utf-8")
            (tmp_path / "saved").replace(tmp_path / ".env")
            wait_for(process, "consuming", times)
        found = [one["concurrency"] for one in process.events if one["event"] == "consuming"]
        assert found == [10, 2, 3]
        assert process.stderr.count(".env has changed") == 2
        assert process.stop()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["handlers/__init__.py", "settings.py"])
def test_it_starts_with_an_error_in_a_file_and_waits_for_the_change_that_fixes_it(
    reloading: Reloading, name: str
) -> None:
    path = reloading.handlers.parents[1] / name
    correct = path.read_text(encoding="utf-8")
    path.write_text("(", encoding="utf-8")
    with closing(reloading.start()) as process:
        wait_until(
            lambda: "waiting for a change" in process.stderr or process.child.poll() is not None
        )
        assert "SyntaxError" in process.stderr
        path.write_text(correct, encoding="utf-8")
        wait_for(process, "consuming", 1)
        assert process.stop()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("error", ["OSError", "RuntimeError"])
def test_files_that_cannot_be_watched_are_one_sentence_and_end_the_service(
    reloading: Reloading, tmp_path: Path, error: str
) -> None:
    """Like at the limit of inotify; the first watch begins when the service consumes."""
    watch = (
        "import pathlib, time\n\n\ndef watch(*paths, **options):\n"
        "    while not pathlib.Path('started').exists():\n        time.sleep(0.01)\n"
        f"    raise {error}('file watch limit reached')\n    yield\n"
    )
    (tmp_path / "src/watchfiles.py").write_text(watch, encoding="utf-8")
    with closing(reloading.start()) as process:
        wait_for(process, "consuming", 1)
        (tmp_path / "started").touch()
        assert process.wait() == 2
        assert count(process, "drained") == 1
        [sentence] = [line for line in process.stderr.splitlines() if "order-events:" in line]
        assert sentence == (
            "order-events: run --reload cannot watch the files: file watch limit reached"
        )
        assert "Traceback" not in process.stderr


def test_without_watchfiles_one_sentence_says_how_to_get_it(tmp_path: Path) -> None:
    reloading = Reloading(tmp_path)
    (tmp_path / "src/watchfiles.py").write_text("raise ImportError\n", encoding="utf-8")
    result = subprocess.run(
        [*reloading.command, "run", "--reload"],
        env=reloading.environment,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == (
        "order-events: run --reload needs watchfiles, of the dependency group dev: run `uv sync`\n"
    )
