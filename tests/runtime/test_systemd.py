"""The notifications to systemd: the real program, real signals, and a socket that replaces systemd's."""

import os
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from harness.process import WAIT_SECONDS, ServiceProcess, service_environment
from harness.scene import Scene, assert_clean_shutdown, wait_until
from harness.servers.sqlite import SqliteFile
from runtime import systemd

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("broker", ["sqlite"], indirect=True),
    pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here"),
]

PING = "WATCHDOG=1"
WATCHDOG_SECONDS = 0.2
LONGEST_PATH = 100
"""The address of a Unix socket has 108 bytes."""


class Manager:
    """Replaces systemd: records each message, and its time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.messages: list[tuple[float, list[str]]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{path[1:]}" if path.startswith("@") else path)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while message := self._socket.recv(4096):
            self.messages.append((time.monotonic(), message.decode().splitlines()))

    def told(self, *, pings: bool = False) -> list[str]:
        """The first line of each message."""
        firsts = [lines[0] for _, lines in list(self.messages)]
        return [line for line in firsts if (line == PING) == pings]

    def ping_times(self, since: float) -> list[float]:
        return [at for at, lines in list(self.messages) if lines == [PING] and at > since]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self._reader.join(WAIT_SECONDS)
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    path = tmp_path / "notify"
    if len(bytes(path)) > LONGEST_PATH:
        path = Path(tempfile.mkdtemp()) / "notify"
    manager = Manager(str(path))
    yield manager
    manager.close()


@pytest.fixture
def told(manager: Manager) -> Callable[[str], Callable[[], bool]]:
    return lambda line: lambda: line in manager.told()


def test_ready_is_sent_when_messages_are_taken_and_not_before(
    scene: Scene, manager: Manager, told: Callable[[str], Callable[[], bool]]
) -> None:
    assert isinstance(scene.broker, SqliteFile)
    scene.publish(1)
    with closing(sqlite3.connect(scene.broker.file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        process = scene.start(consuming=False, NOTIFY_SOCKET=manager.path, PATIENCE_SECONDS=1)
        process.wait_for("reconnecting")
        assert manager.told() == []
        other.execute("ROLLBACK")
    wait_until(told("READY=1"))
    process.wait_for("handling")
    assert manager.messages[0][1] == ["READY=1", "STATUS=consuming"]


def test_stopping_is_sent_at_the_signal_while_the_handler_still_works(
    scene: Scene, manager: Manager, told: Callable[[str], Callable[[], bool]]
) -> None:
    scene.publish(1, end="checkpoint")  # ends on shutdown, so after the signal
    process = scene.start(NOTIFY_SOCKET=manager.path)
    process.wait_for("handling")
    wait_until(lambda: manager.told() == ["READY=1"])
    assert_clean_shutdown(process)
    wait_until(told("STOPPING=1"))
    assert manager.messages[-1][1] == ["STOPPING=1", "STATUS=draining, 1 in flight"]
    assert scene.ledger.ended == scene.published


def test_the_first_message_after_a_signal_is_stopping(scene: Scene, manager: Manager) -> None:
    scene.publish(1, seconds=3600)
    process = scene.start(NOTIFY_SOCKET=manager.path, drain_seconds=1)
    process.wait_for("handling")
    process.send(signal.SIGTERM)
    wait_until(lambda: manager.told() == ["READY=1", "STOPPING=1"])
    assert process.find("drained") == []
    assert process.wait() == 75


def test_the_watchdog_is_pinged_while_the_event_loop_turns_and_not_while_it_is_blocked(
    scene: Scene, manager: Manager
) -> None:
    process = scene.start(NOTIFY_SOCKET=manager.path, WATCHDOG_USEC=int(WATCHDOG_SECONDS * 1e6))
    wait_until(lambda: len(manager.told(pings=True)) >= 5)
    scene.publish(1, end="block", seconds=10 * WATCHDOG_SECONDS)
    process.wait_for("handling")
    blocked_at = time.monotonic()
    wait_until(lambda: scene.ledger.ended == scene.published)
    # A message that was sent just before may be read just after.
    while_blocked = manager.ping_times(since=blocked_at + WATCHDOG_SECONDS)
    assert [at for at in while_blocked if at < blocked_at + 8 * WATCHDOG_SECONDS] == []
    wait_until(lambda: bool(manager.ping_times(since=blocked_at + 8 * WATCHDOG_SECONDS)))
    assert_clean_shutdown(process)


def test_the_watchdog_is_not_pinged_while_every_handler_is_past_its_time_limit(
    scene: Scene, manager: Manager
) -> None:
    process = scene.start(
        HANDLERS="thread", concurrency=1, handler_seconds=0.1,
        NOTIFY_SOCKET=manager.path, WATCHDOG_USEC=int(WATCHDOG_SECONDS * 1e6),
    )  # fmt: skip
    scene.publish(1, kind="thread", seconds=10 * WATCHDOG_SECONDS)
    process.wait_for("handler_overrun")
    stuck_at = time.monotonic()
    wait_until(lambda: scene.ledger.ended == scene.published)
    while_stuck = manager.ping_times(since=stuck_at + WATCHDOG_SECONDS)
    assert [at for at in while_stuck if at < stuck_at + 8 * WATCHDOG_SECONDS] == []
    wait_until(lambda: bool(manager.ping_times(since=stuck_at + 8 * WATCHDOG_SECONDS)))
    assert_clean_shutdown(process)


def test_the_signal_of_the_watchdog_leaves_the_stack_of_the_blocked_handler(scene: Scene) -> None:
    scene.publish(1, end="block", seconds=WAIT_SECONDS)
    environment = service_environment(scene.broker.url, scene.queue, scene.ledger)
    # Without -X dev, which enables faulthandler by itself.
    process = ServiceProcess([sys.executable, str(scene.service), "run"], environment)
    scene.processes.append(process)
    process.wait_for("handling")
    process.send(signal.SIGABRT)
    assert process.wait() == -signal.SIGABRT
    assert " in misbehave\n" in process.stderr


@pytest.mark.parametrize(
    ("microseconds", "pid"),
    [("", ""), ("1000", str(os.getpid())), ("soon", "")],
    ids=["none", "of another process", "no number"],
)
def test_without_a_watchdog_of_its_own_the_service_sends_no_ping(
    scene: Scene, manager: Manager, microseconds: str, pid: str
) -> None:
    process = scene.start(NOTIFY_SOCKET=manager.path, WATCHDOG_USEC=microseconds, WATCHDOG_PID=pid)
    assert_clean_shutdown(process)
    wait_until(lambda: manager.told() == ["READY=1", "STOPPING=1"])
    assert manager.told(pings=True) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sockets in no file system")
def test_an_abstract_socket_is_notified_too(scene: Scene) -> None:
    with closing(Manager(f"@{uuid.uuid4()}")) as manager:
        assert_clean_shutdown(scene.start(NOTIFY_SOCKET=manager.path))
        wait_until(lambda: manager.told() == ["READY=1", "STOPPING=1"])


def test_a_missing_manager_is_logged_and_changes_nothing(scene: Scene) -> None:
    process = scene.start(NOTIFY_SOCKET=str(scene.ledger.path.parent / "nobody"))
    assert_clean_shutdown(process)
    assert process.find("notify_failed")


@pytest.mark.usefixtures("broker")
def test_without_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr(socket, "socket", None)
    systemd.notify("READY=1")
