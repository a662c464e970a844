# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The broker is lost or unresponsive: a real server is killed, and a proxy cuts or blocks connections.

The invariant is that of test_shutdown.py: published = handled + still in the broker + dead letters. Which messages may be
handled twice depends on the broker (harness/servers).
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.contract import (
    Connect,
    Counted,
    Event,
    ack,
    ack_all,
    as_promised,
    buffer_holds,
    eventually_logged,
    eventually_reconnected,
    find,
    ids,
    publish,
    take,
)
from harness.fixtures import over_the_network
from harness.process import ask
from harness.scene import (
    AT_ONCE_SECONDS,
    Scene,
    assert_clean_shutdown,
    assert_quiet,
    has_ended,
    is_empty,
    wait_until,
)
from harness.servers import (
    SERVED_BROKERS,
    PrivateServer,
    Server,
    server_module,
    with_options,
)
from harness.servers.local import free_port
from harness.servers.proxy import Proxy
from runtime.brokers.source import Source
from runtime.errors import BrokerUnavailable

pytestmark = pytest.mark.slow

CONCURRENCY = 4
SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": 0.4}

Shorten = Callable[..., None]


@pytest.fixture(autouse=True)
def reconnects_soon(shorten: Shorten) -> None:
    shorten(0.2, "FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS")


# -- the process


@pytest.mark.parametrize("name", SERVED_BROKERS)
def test_a_server_killed_and_restarted_in_mid_work_loses_nothing(
    name: str, private_server: Callable[[str], PrivateServer], tmp_path: Path
) -> None:
    server = private_server(name)
    scene = Scene(server, f"ccc-test-{uuid.uuid4().hex[:12]}", tmp_path)
    tasks = scene.publish(150, seconds=0.02)
    port = free_port()
    with scene:
        process = scene.start(concurrency=CONCURRENCY, probe_port=port)
        wait_until(lambda: has_ended(scene, 30))
        assert ask(port, "/readyz")[0] == 200
        server.kill()
        process.wait_for("reconnecting")
        assert ask(port, "/readyz")[0] == 503
        assert ask(port, "/livez")[0] == 200
        server.restart()
        process.wait_for("connected", count=2)
        wait_until(lambda: ask(port, "/readyz")[0] == 200)
        tasks += scene.publish(20)
        wait_until(lambda: set(scene.ledger.ended) == set(tasks))
        wait_until(lambda: is_empty(scene))
        status, metrics = ask(port, "/metrics")
        assert status == 404 or "consumer_reconnects_total 1.0" in metrics  # 404: without telemetry
        assert_clean_shutdown(process)
    repeated = Counter(scene.ledger.ended) - Counter(tasks)
    assert repeated.total() <= server_module(name).most_repeated(CONCURRENCY)
    assert len(process.find("reconnecting")) == 1
    scene.assert_left()


@over_the_network
def test_a_rolling_restart_during_an_outage_loses_nothing(scene: Scene, proxy: Proxy) -> None:
    tasks = scene.publish(3, seconds=1)
    url = with_options(proxy.url, scene.broker.lease_option)
    old = scene.start(url=url, concurrency=1)
    old.wait_for("handling")
    proxy.refuse()
    old.wait_for("reconnecting")
    exit_code, seconds = old.stop()
    assert exit_code == 0
    assert seconds < 1 + AT_ONCE_SECONDS
    assert_quiet(old)
    assert len(scene.ledger.ended) >= 1, "the in-flight message is finished"
    new = scene.start(url=url, consuming=False)
    new.wait_for("reconnecting")  # and it goes on waiting
    proxy.resume()
    new.wait_for("consuming")
    published_since = scene.publish(5)
    wait_until(lambda: set(scene.ledger.ended) == {*tasks, *published_since})
    assert_clean_shutdown(new)
    new_ones = [id for id in scene.ledger.ended if id in published_since]
    assert Counter(new_ones) == Counter(published_since)


# -- an outage


@over_the_network
async def test_an_outage_of_several_attempts_is_logged_and_counted_once(
    connect: Connect, proxy: Proxy, events: list[Event]
) -> None:
    async with connect(broker_url=proxy.url) as source:
        assert source.outage_count == 0
        proxy.refuse()
        await eventually_logged(events, "reconnect_failed", count=2)
        assert not source.connected
        proxy.resume()
        await eventually_reconnected(source, events)
        published = await publish(source, 20)
        assert as_promised(source, await ack_all(source, 20)) == as_promised(source, published)
        assert source.outage_count == 1
        assert source.buffer.failure is None
    assert len(find(events, "reconnecting")) == 1
    assert {event["level"] for event in find(events, "reconnect_failed")} == {"debug"}


@over_the_network
async def test_after_an_outage_no_message_is_lost_and_only_in_flight_ones_are_redelivered(
    connect: Connect,
    counted: Counted,
    proxy: Proxy,
    events: list[Event],
    caplog: pytest.LogCaptureFixture,
    broker: Server,
) -> None:
    async with connect(prefetch=50, broker_url=proxy.url) as source:
        published = await publish(source, 40)
        in_flight = await take(source, 3)
        await buffer_holds(source, 37)
        proxy.refuse()
        await eventually_logged(events, "reconnecting")
        await ack(source, in_flight)  # their handlers have finished
        proxy.resume()
        repeated = ids(in_flight) if broker.requeues_on_disconnect else []
        handled = ids(in_flight) + await ack_all(source, 37 + len(repeated))
        assert Counter(handled) == Counter(published + repeated)
        await eventually_reconnected(source, events)
    await counted()
    assert [event["id"] for event in find(events, "settlement_lost")] == repeated
    assert len(find(events, "reconnecting")) == 1
    assert caplog.records == []  # client libraries log each attempt, with tracebacks


@over_the_network
async def test_without_a_broker_connecting_fails_and_can_be_repeated(
    source_for: Callable[..., Source], proxy: Proxy
) -> None:
    source = source_for(broker_url=proxy.url)
    proxy.refuse()
    for _ in range(2):
        with pytest.raises(BrokerUnavailable, match=f"localhost:{proxy.port}"):
            await source.__aenter__()
        assert not source.connected
    proxy.resume()
    async with source:
        assert source.connected


@over_the_network
async def test_a_deleted_queue_is_created_again_and_consumed(
    connect: Connect, broker: Server, queue: str, events: list[Event]
) -> None:
    broker.need("recreated queues")
    async with connect() as source:
        assert await publish(source, 1) == await ack_all(source, 1)  # now it consumes
        await asyncio.to_thread(broker.delete, queue)
        await eventually_reconnected(source, events)
        published = await publish(source, 5)
        assert as_promised(source, await ack_all(source, 5)) == as_promised(source, published)
