# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""The broker goes away: the real program, and a real server that is killed and started again.

The invariant is that of test_shutdown.py: published = done + still in the broker + dead letters. What may
be done twice is what the broker's own nature says (``most_repeated`` in servers/).
"""

import asyncio
import gc
import os
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.brokers import make_source

from .process import ask
from .servers import SERVED_BROKERS, PrivateServer, let_store, local, server_module
from .servers.proxy import Proxy
from .test_contract import become
from .test_shutdown import (
    AT_ONCE_SECONDS,
    Scene,
    assert_quiet,
    free_port,
    has_ended,
    is_empty,
    wait_until,
)

pytestmark = pytest.mark.slow

CONCURRENCY = 4


@pytest.fixture(scope="module", params=SERVED_BROKERS)
def broker_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def server(broker_name: str, private_server: Callable[[str], PrivateServer]) -> PrivateServer:
    return private_server(broker_name)


@pytest.fixture
def scene(server: PrivateServer, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(server, f"ccc-test-{uuid.uuid4().hex[:12]}", tmp_path)
    yield scene
    scene.close()


def test_a_server_killed_and_started_again_in_mid_work_loses_nothing(
    scene: Scene, server: PrivateServer, broker_name: str
) -> None:
    tasks = scene.publish(150, seconds=0.02)
    let_store(server)
    port = free_port()
    process = scene.start(concurrency=CONCURRENCY, probe_port=port)
    wait_until(lambda: has_ended(scene, 30))
    assert ask(port, "/readyz")[0] == 200
    server.kill()
    process.wait_for("reconnecting")
    assert ask(port, "/readyz") == (503, "the broker cannot be reached\n")
    assert ask(port, "/livez")[0] == 200
    server.restart()
    process.wait_for("connected", count=2)
    wait_until(lambda: ask(port, "/readyz")[0] == 200)
    tasks += scene.publish(20)
    wait_until(lambda: set(scene.ledger.ended) == set(tasks))
    wait_until(lambda: is_empty(scene))
    status, metrics = ask(port, "/metrics")
    assert status == 404 or "consumer_reconnects_total 1.0" in metrics  # 404: made without them
    exit_code, _ = process.stop()
    assert exit_code == 0
    assert_quiet(process)
    repeated = Counter(scene.ledger.ended) - Counter(tasks)
    assert repeated.total() <= server_module(broker_name).most_repeated(CONCURRENCY)
    assert len(process.find("reconnecting")) == 1
    scene.assert_left()


@pytest.mark.very_slow
async def test_an_outage_is_counted_once_and_is_not_the_end_of_the_source(
    scene: Scene, server: PrivateServer
) -> None:
    source = make_source(scene.settings)

    async def connected() -> bool:
        return source.connected

    async with source:
        await source.start()
        assert source.outage_count == 0
        await asyncio.to_thread(server.kill)
        await become(False, connected)
        await asyncio.sleep(1)  # for some attempts that fail
        assert source.outage_count == 1
        await asyncio.to_thread(server.restart)
        await become(True, connected)
        assert source.outage_count == 1
        assert source.buffer.failure is None
        await source.stop()


@pytest.mark.very_slow
def test_a_rolling_restart_while_the_server_is_away_loses_nothing(
    scene: Scene, server: PrivateServer
) -> None:
    tasks = scene.publish(3, seconds=1)
    let_store(server)
    old = scene.start(concurrency=1)
    old.wait_for("handling")
    server.kill()
    old.wait_for("reconnecting")
    exit_code, seconds = old.stop()
    assert exit_code == 0
    assert seconds < 1 + AT_ONCE_SECONDS
    assert_quiet(old)
    assert len(scene.ledger.ended) >= 1, "what is in hand is finished"
    new = scene.start(consuming=False)
    new.wait_for("reconnecting")  # and it goes on waiting
    server.restart()
    new.wait_for("consuming")
    published_since = scene.publish(5)
    wait_until(lambda: set(scene.ledger.ended) == {*tasks, *published_since})
    exit_code, _ = new.stop()
    assert exit_code == 0
    assert_quiet(new)
    new_ones = [id for id in scene.ledger.ended if id in published_since]
    assert Counter(new_ones) == Counter(published_since)


def test_a_proxy_closes_the_connections_that_come_while_it_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as target, ExitStack() as clients:
        for _ in range(100):
            with Proxy(f"any://127.0.0.1:{target.getsockname()[1]}") as proxy:
                for _ in range(5):
                    client = clients.enter_context(socket.socket())
                    client.setblocking(False)
                    client.connect_ex(("127.0.0.1", proxy.port))
    gc.collect()  # what was left open says so, and that is an error here


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
        return local.one_for_all_workers("any", tmp_path / f"gw{number}" / "server", start)

    with ExitStack() as others:
        first = ExitStack()
        assert first.enter_context(worker(0)) == "server 0"
        assert others.enter_context(worker(1)) == "server 0"
        leaving = threading.Thread(target=first.close)
        leaving.start()
        leaving.join(0.2)
        assert leaving.is_alive()  # it waits for the other one
        joining = threading.Thread(target=lambda: others.enter_context(worker(2)))
        joining.start()
        joining.join(10)
        assert not joining.is_alive(), "who comes meanwhile need not wait"
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
