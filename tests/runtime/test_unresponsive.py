"""A broker that is down or unresponsive loses and delays nothing; a shutdown meanwhile is graceful, too."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import structlog

from facts import RECREATES_NO_QUEUE, REQUEUES_ON_DISCONNECT, SILENCE_OPTION
from harness.contract import WAIT_SECONDS, Connect, Counted, eventually, need, take
from harness.scene import AT_ONCE_SECONDS, Scene, assert_clean_shutdown, assert_quiet, wait_until
from harness.servers import Server
from harness.servers.proxy import Proxy
from runtime import logs
from runtime.brokers.source import Source
from runtime.errors import BrokerUnavailable
from steps import (
    Event,
    ack,
    ack_all,
    as_promised,
    buffer_holds,
    eventually_logged,
    eventually_reconnected,
    find,
    ids,
    over_the_network,
    publish,
    with_options,
)

pytestmark = pytest.mark.slow

Shorten = Callable[..., None]


@pytest.fixture(autouse=True)
def reconnects_soon(shorten: Shorten) -> None:
    shorten(0.2, "FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS")


# -- an unresponsive broker


@over_the_network
async def test_an_unresponsive_broker_is_unavailable_after_the_timeout(
    source_for: Callable[..., Source], proxy: Proxy, shorten: Shorten
) -> None:
    shorten(0.3, "CONNECT_SECONDS", "ANSWER_SECONDS")
    proxy.black_hole()
    began_at = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=f"localhost:{proxy.port}"):
        await source_for(broker_url=proxy.url).__aenter__()
    assert time.monotonic() - began_at < 2


@over_the_network
async def test_a_broker_that_stops_responding_is_an_outage(
    connect: Connect, proxy: Proxy, broker_name: str, events: list[Event], shorten: Shorten
) -> None:
    shorten(1, "ANSWER_SECONDS")
    url = with_options(proxy.url, SILENCE_OPTION.get(broker_name, ""))
    async with connect(broker_url=url) as source:
        shorten(1, "CONNECT_SECONDS")
        published = await publish(source, 2)
        messages = await take(source, 2)
        proxy.black_hole()
        await eventually_logged(events, "reconnecting")
        proxy.cut()
        proxy.resume()
        await eventually_reconnected(source, events)
        await ack(source, messages)
        published += await publish(source, 1)
        while (await ack_all(source, 1)) != published[-1:]:
            assert broker_name in REQUEUES_ON_DISCONNECT


@over_the_network
async def test_an_ack_does_not_wait_for_the_broker(connect: Connect, proxy: Proxy) -> None:
    async with connect(prefetch=1, broker_url=proxy.url) as source:
        await publish(source, 1)
        (message,) = await take(source, 1)
        proxy.black_hole()
        async with asyncio.timeout(0.5):
            await source.ack(message)
        proxy.resume()


# -- shutdown in an outage


@over_the_network
async def test_an_unresponsive_broker_cannot_delay_the_shutdown(
    connect: Connect, proxy: Proxy
) -> None:
    async with connect(broker_url=proxy.url) as source:
        await publish(source, 10)
        (message,) = await take(source, 1)
        proxy.black_hole()
        began_at = time.monotonic()
        await source.stop()
        await source.ack(message)
    assert time.monotonic() - began_at < 5


@over_the_network
async def test_many_suspects_cannot_delay_a_shutdown_at_an_unresponsive_broker(
    connect: Connect, proxy: Proxy
) -> None:
    """If a copy or a record of each begins a new count, all of them share one time limit."""
    async with connect(broker_url=proxy.url, prefetch=20) as source:
        need(source, "counts_crashes")
        await publish(source, 20)
        await buffer_holds(source, 20)
        for message in source.unacked:
            message.deliveries = 1000
        proxy.black_hole()
        began_at = time.monotonic()
        await source.stop()
        assert time.monotonic() - began_at < 15


@over_the_network
async def test_a_shutdown_during_an_outage_is_immediate(
    connect: Connect, proxy: Proxy, events: list[Event], shorten: Shorten
) -> None:
    """It waits for none of the time limits for a reachable broker: here they are a minute long."""
    shorten(60, "STOP_SECONDS", "CANCEL_SECONDS", "FLUSH_SECONDS", "CLOSE_SECONDS")
    async with connect(broker_url=proxy.url) as source:
        await publish(source, 5)
        first, message = await take(source, 2)
        proxy.refuse()
        await source.ack(first)
        await eventually_logged(events, "reconnecting")
        began_at = time.monotonic()
        await source.stop()
        await source.ack(message)
    assert time.monotonic() - began_at < WAIT_SECONDS
    assert message.id in [event["message_id"] for event in find(events, "settlement_lost")]


@over_the_network
async def test_a_stopped_source_gets_no_deliveries_after_an_outage(
    connect: Connect, counted: Counted, proxy: Proxy, broker: Server, events: list[Event]
) -> None:
    url = with_options(proxy.url, broker.lease_option)
    async with connect(prefetch=0) as publisher, connect(broker_url=url) as source:
        need(source, "requeue")
        await publish(publisher, 3)
        await buffer_holds(source, 3)
        proxy.refuse()
        await eventually_logged(events, "reconnecting")
        await source.stop()
        proxy.resume()
        await publish(publisher, 1)
        await counted(ready=4)
        assert len(source.buffer) == 0


@over_the_network
async def test_deliveries_that_arrive_after_stop_are_requeued(
    connect: Connect, counted: Counted, proxy: Proxy, broker: Server, shorten: Shorten
) -> None:
    shorten(0.1, "STOP_SECONDS", "CANCEL_SECONDS")
    url = with_options(proxy.url, broker.lease_option)
    async with connect(prefetch=0) as publisher, connect(broker_url=url) as source:
        need(source, "requeue")
        proxy.black_hole()
        await publish(publisher, 3)
        await source.stop()
        proxy.resume()  # the deliveries arrive before the broker has received the stop
        await counted(ready=3)


@over_the_network
async def test_an_outage_of_several_attempts_is_logged_and_counted_once(
    connect: Connect, proxy: Proxy, events: list[Event]
) -> None:
    async with connect(broker_url=proxy.url) as source:
        assert source.connectivity.outage_count == 0
        proxy.refuse()
        await eventually_logged(events, "reconnect_failed", count=2)
        assert not source.connected
        proxy.resume()
        await eventually_reconnected(source, events)
        published = await publish(source, 20)
        assert as_promised(source, await ack_all(source, 20)) == as_promised(source, published)
        assert source.connectivity.outage_count == 1
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
    broker_name: str,
) -> None:
    async with connect(prefetch=50, broker_url=proxy.url) as source:
        published = await publish(source, 40)
        in_flight = await take(source, 3)
        await buffer_holds(source, 37)
        proxy.refuse()
        await eventually_logged(events, "reconnecting")
        await ack(source, in_flight)  # their handlers have finished
        proxy.resume()
        repeated = ids(in_flight) if broker_name in REQUEUES_ON_DISCONNECT else []
        handled = ids(in_flight) + await ack_all(source, 37 + len(repeated))
        assert Counter(handled) == Counter(published + repeated)
        await eventually_reconnected(source, events)
    await counted()
    assert [event["message_id"] for event in find(events, "settlement_lost")] == repeated
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
    connect: Connect, broker: Server, broker_name: str, queue: str, events: list[Event]
) -> None:
    if broker_name in RECREATES_NO_QUEUE:
        pytest.skip("the broker or its server recreates no queue")
    async with connect() as source:
        assert await publish(source, 1) == await ack_all(source, 1)  # now it consumes
        await asyncio.to_thread(broker.delete, queue)
        await eventually_reconnected(source, events)
        published = await publish(source, 5)
        assert as_promised(source, await ack_all(source, 5)) == as_promised(source, published)


# -- the log of an outage


@over_the_network
async def test_a_long_outage_is_a_line_a_minute_with_its_duration(
    connect: Connect,
    proxy: Proxy,
    shorten: Shorten,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the log has no lines of client libraries. Its clock is ahead by a minute after 10 attempts."""
    ahead_seconds = 0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_seconds)
    monkeypatch.setattr(logs, "time", clock)
    shorten(0.02, "FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS")
    logs.configure_logs("json", "info")
    structlog.configure(cache_logger_on_first_use=False)
    try:
        async with connect(broker_url=proxy.url) as source:
            capsys.readouterr()
            proxy.refuse()
            for minute in (1, 2, 3):
                await eventually_failed(source, 10 * minute)
                ahead_seconds = 60 * minute
            said = capsys.readouterr().out.splitlines()
            proxy.resume()
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    lines = [json.loads(line) for line in said]
    assert {line["event"] for line in lines} == {"reconnecting"}
    assert [line["outage_seconds"] // 60 for line in lines] == [0, 1, 2]
    assert all(line["reason"] for line in lines)


async def eventually_failed(source: Source, attempts: int) -> None:
    async def failed() -> bool:
        return bool(source.connectivity._failures >= attempts)

    await eventually(True, failed)


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
    new.wait_for("reconnecting")  # and it continues to wait
    proxy.resume()
    new.wait_for("consuming")
    published_since = scene.publish(5)
    wait_until(lambda: set(scene.ledger.ended) == {*tasks, *published_since})
    assert_clean_shutdown(new)
    new_ones = [id for id in scene.ledger.ended if id in published_since]
    assert Counter(new_ones) == Counter(published_since)
