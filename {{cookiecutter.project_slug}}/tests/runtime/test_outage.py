# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""The broker goes away: the real program, and a real server that is killed and started again.

The invariant is that of test_shutdown.py: published = done + still in the broker + dead letters. What may
be done twice is what the broker's own nature says (``most_repeated`` in servers/).
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from {{ cookiecutter.package_name }}.runtime.brokers import make_source

from .process import ask
from .servers import SERVED_BROKERS, Counts, PrivateServer, let_store, server_module
from .test_contract import become
from .test_shutdown import (
    AT_ONCE_SECONDS,
    Scene,
    assert_quiet,
    free_port,
    has_ended,
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
    process = scene.start(concurrency=CONCURRENCY)
    wait_until(lambda: has_ended(scene, 30))
    server.kill()
    process.wait_for("reconnecting")
    server.restart()
    process.wait_for("connected", count=2)
    tasks += scene.publish(20)
    wait_until(lambda: set(scene.ledger.ended) == set(tasks))
    wait_until(lambda: scene.broker.counts(scene.queue) == Counts(0, 0, 0))  # what came twice, too
    exit_code, _ = process.stop()
    assert exit_code == 0
    assert_quiet(process)
    repeated = Counter(scene.ledger.ended) - Counter(tasks)
    assert repeated.total() <= server_module(broker_name).most_repeated(CONCURRENCY)
    assert len(process.find("reconnecting")) == 1
    counts = scene.broker.counts(scene.queue)
    assert (counts.ready, counts.delayed, counts.dead) == (0, 0, 0)


def test_while_the_server_is_away_the_service_is_live_and_not_ready(
    scene: Scene, server: PrivateServer
) -> None:
    port = free_port()
    process = scene.start(probe_port=port)
    wait_until(lambda: ask(port, "/readyz")[0] == 200)
    server.kill()
    process.wait_for("reconnecting")
    assert ask(port, "/readyz") == (503, "the broker cannot be reached\n")
    assert ask(port, "/livez")[0] == 200
    server.restart()
    wait_until(lambda: ask(port, "/readyz")[0] == 200)
    status, metrics = ask(port, "/metrics")
    assert status == 404 or "consumer_reconnects_total 1.0" in metrics  # 404: made without them
    exit_code, _ = process.stop()
    assert exit_code == 0
    assert_quiet(process)


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


def test_a_stop_while_the_server_is_away_finishes_what_is_in_hand(
    scene: Scene, server: PrivateServer
) -> None:
    tasks = scene.publish(3, seconds=1)
    let_store(server)
    process = scene.start(concurrency=1)
    process.wait_for("handling")
    server.kill()
    process.wait_for("reconnecting")
    exit_code, seconds = process.stop()
    assert exit_code == 0
    assert seconds < 1 + AT_ONCE_SECONDS
    assert_quiet(process)
    assert len(scene.ledger.ended) >= 1
    server.restart()
    scene.drain_the_rest()
    assert set(scene.ledger.ended) == set(tasks)


def test_a_service_that_starts_before_its_server_waits_for_it(
    scene: Scene, server: PrivateServer
) -> None:
    server.kill()
    process = scene.start(consuming=False)
    process.wait_for("reconnecting")
    server.restart()
    process.wait_for("consuming")
    tasks = scene.publish(5)
    wait_until(lambda: has_ended(scene, 5))
    exit_code, _ = process.stop()
    assert exit_code == 0
    assert_quiet(process)
    assert Counter(scene.ledger.ended) == Counter(tasks)
