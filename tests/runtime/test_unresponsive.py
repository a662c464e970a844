"""A broker that is away or does not respond loses and delays nothing; a shutdown meanwhile is as graceful as any."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable

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
    need,
    publish,
    take,
)
from harness.fixtures import over_the_network
from harness.servers import Server, with_options
from harness.servers.proxy import Proxy
from runtime.brokers.source import Source
from runtime.errors import BrokerUnavailable

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
    connect: Connect, proxy: Proxy, broker: Server, events: list[Event], shorten: Shorten
) -> None:
    shorten(1, "ANSWER_SECONDS")
    url = with_options(proxy.url, broker.silence_option)
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
            assert broker.requeues_on_disconnect


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
async def test_a_shutdown_during_an_outage_is_immediate(
    connect: Connect, proxy: Proxy, events: list[Event]
) -> None:
    async with connect(broker_url=proxy.url) as source:
        await publish(source, 5)
        first, message = await take(source, 2)
        proxy.refuse()
        await source.ack(first)
        await eventually_logged(events, "reconnecting")
        began_at = time.monotonic()
        await source.stop()
        await source.ack(message)
    assert time.monotonic() - began_at < 2
    assert message.id in [event["id"] for event in find(events, "settlement_lost")]


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
