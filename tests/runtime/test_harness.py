"""The harness of the runtime's tests: its proxy, its servers, Docker."""

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sharing
from harness.servers import Counts, ServerMissing, local, mqtt, skip_without_server
from harness.servers.proxy import Proxy


def test_a_proxy_closes_the_connections_that_arrive_while_it_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as target, ExitStack() as clients:
        for _ in range(100):
            with Proxy(f"any://127.0.0.1:{target.getsockname()[1]}") as proxy:
                for _ in range(5):
                    client = clients.enter_context(socket.socket())
                    client.setblocking(False)
                    client.connect_ex(("127.0.0.1", proxy.port))
    gc.collect()  # an open connection would warn, which is an error here


def test_a_free_port_is_not_given_again_until_a_server_binds_it() -> None:
    ports = local.free_ports(200)
    others = set()
    for _ in range(2_000):
        with socket.create_server(("127.0.0.1", 0)) as other:
            others.add(other.getsockname()[1])
    assert not others & {*ports}
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_the_server_of_all_workers_stays_until_the_last_of_them_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("fcntl", reason="Windows has no flock")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    up: list[str] = []
    numbers = count()

    @contextmanager
    def start(_: Path) -> Iterator[Any]:
        up.append(f"server {next(numbers)}")
        yield SimpleNamespace(url=up[-1])
        up.pop()

    def worker(number: int) -> AbstractContextManager[str]:
        return sharing.one_for_all_workers("any", tmp_path / f"gw{number}" / "server", start)

    with ExitStack() as others:
        first = ExitStack()
        assert first.enter_context(worker(0)) == "server 0"
        sharing._started_here.clear()  # like another process
        assert others.enter_context(worker(1)) == "server 0"
        leaving = threading.Thread(target=first.close)
        leaving.start()
        leaving.join(0.2)
        assert leaving.is_alive()  # it waits for the other process
        joining = threading.Thread(target=lambda: others.enter_context(worker(2)))
        joining.start()
        joining.join(10)
        assert not joining.is_alive(), "a process that joins meanwhile must not wait"
        assert up == ["server 0"]
    leaving.join(10)
    assert up == []
    with worker(3) as url:
        assert (url, up) == ("server 1", ["server 1"])


@pytest.mark.parametrize(
    ("client", "found"),
    [("exit 0", True), ("exit 1", False), ("exec sleep 600", False), (None, False)],
    ids=["answered", "no daemon", "silent daemon", "no client"],
)
def test_docker_counts_only_with_a_daemon_that_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, client: str | None, found: bool
) -> None:
    if client is not None:
        program = tmp_path / "docker"
        program.write_text(f"#!/bin/sh\n{client}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(local, "DOCKER_SECONDS", 0.5)
    assert local.has_docker.__wrapped__() is found


DOCKER = """#!/bin/sh
cd "{folder}"
echo "$1" >> asked
case $1 in
    create) echo container ;;
    start) echo $$ > new; mv new pid; [ -f broken ] || exec sleep 600 ;;
    kill) kill -9 "$(cat pid)" && rm pid ;;
esac
"""


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a client whose containers sleep."""
    program = tmp_path / "docker"
    program.write_text(DOCKER.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_a_container_is_killed_started_again_and_removed(docker: Path) -> None:
    answers = (docker / "pid").exists
    container = local.ServerContainer("image", 1, 2, docker, answers)
    first = (docker / "pid").read_text()
    container.kill()
    assert not answers()
    container.restart()
    assert (docker / "pid").read_text() != first
    container.close()
    assert (docker / "asked").read_text().split() == [
        *("create", "start", "kill"),
        *("kill", "start", "kill", "rm"),
    ]


def test_a_container_that_does_not_start_is_removed(docker: Path) -> None:
    (docker / "broken").touch()
    with pytest.raises(RuntimeError, match="docker did not start"):
        local.ServerContainer("image", 1, 2, docker, lambda: False)
    assert (docker / "asked").read_text().split() == ["create", "start", "rm"]


def test_mosquittos_database_is_read_also_when_two_are_written_in_one_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An autosave and a signal write them: the second file may have the inode number of the file before both."""
    with ExitStack() as stack:
        try:
            broker = stack.enter_context(mqtt.private(tmp_path))
        except ServerMissing as missing:
            skip_without_server(missing)
        assert isinstance(broker, mqtt.PrivateMosquitto)
        send, output = broker.instance.send, tmp_path / "output"
        assert broker.counts("none") == Counts(0, 0, 0)
        if "mosquitto version 2.0." not in output.read_text():
            pytest.skip("later versions write their database in another way")

        def send_twice(signum: signal.Signals) -> None:
            for _ in range(2):
                written = output.read_text().count("Saving")
                send(signum)
                give_up_at = time.monotonic() + 20
                while output.read_text().count("Saving") == written:
                    assert mqtt._answers(broker._port)
                    assert time.monotonic() < give_up_at

        monkeypatch.setattr(broker.instance, "send", send_twice)
        monkeypatch.setattr(mqtt, "WRITE_SECONDS", 30)
        for _ in range(3):
            assert broker.counts("none") == Counts(0, 0, 0)
