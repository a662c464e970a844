"""The behaviour of every broker, in addition to test_contract.py, which services have too."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest

from facts import LEASE_SECONDS
from harness.contract import WAIT_SECONDS, Connect, Counted, eventually, need, take
from harness.servers import Server
from runtime.brokers import source as source_module
from runtime.brokers.source import Source
from runtime.errors import SourceFailed
from runtime.message import OutgoingMessage
from steps import (
    Event,
    ack,
    ack_all,
    as_promised,
    buffer_holds,
    consume,
    find,
    ids,
    last,
    length_of,
    publish,
    start_once,
)

AT_ONCE_SECONDS = 5.0
RETRY_SECONDS = 0.2
LONG_RETRY_SECONDS = 0.4
SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": LONG_RETRY_SECONDS}


@pytest.fixture
async def connect(connect: Connect, source_for: Callable[..., Source]) -> Connect:
    """Connects to a queue on which a consumer has started once, so that each broker retains published messages."""
    await start_once(source_for().settings)
    return connect


async def test_workers_share_one_source(connect: Connect) -> None:
    handled: list[str] = []
    async with connect(prefetch=5) as source:
        all_busy = asyncio.Barrier(5)

        async def work() -> None:
            (message,) = await take(source, 1)
            await all_busy.wait()
            handled.append(message.id)
            await source.ack(message)
            await consume(source, handled)

        workers = [asyncio.create_task(work()) for _ in range(5)]
        published = await publish(source, 60)
        await eventually(60, length_of(handled))
        await source.stop()
        await asyncio.gather(*workers)
    assert Counter(handled) == Counter(published)


async def test_a_message_says_when_it_was_published_also_as_a_retry(connect: Connect) -> None:
    """The time is exact to the second: RabbitMQ's property has no more."""
    async with connect() as source:
        before = datetime.now(UTC).replace(microsecond=0)
        await publish(source, 1)
        [message] = await take(source, 1)
        assert message.published_at is not None
        assert before <= message.published_at <= datetime.now(UTC)
        await source.retry(message, RETRY_SECONDS, "again")
        [again] = await take(source, 1)
        assert again.published_at is not None
        assert abs(again.published_at - message.published_at) < timedelta(milliseconds=2)
        await source.ack(again)
        await source.stop()


@pytest.mark.slow
async def test_cancelling_anext_300_times_loses_nothing(connect: Connect) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    received: list[str] = []
    published: list[str] = []

    async with connect(prefetch=4) as source, connect(prefetch=0) as publisher:

        async def publish_slowly() -> None:
            for _ in range(20):
                published.extend(await publish(publisher, chance.randrange(1, 6)))

        publishing = asyncio.create_task(publish_slowly())
        for _ in range(300):
            pull = asyncio.ensure_future(anext(source))
            for _ in range(chance.randrange(8)):
                await asyncio.sleep(chance.choice([0, 0, 0.001]))
            pull.cancel()
            with suppress(asyncio.CancelledError):
                message = await pull
                received.append(message.id)
                await source.ack(message)
        await publishing
        while len(received) < len(published):
            received += await ack_all(source, 1)
    assert Counter(received) == Counter(published)


async def test_stop_ends_waiting_workers(connect: Connect) -> None:
    async with connect(prefetch=3) as source:
        workers = [asyncio.create_task(consume(source, [])) for _ in range(3)]
        await asyncio.sleep(0)
        await source.stop()
        async with asyncio.timeout(WAIT_SECONDS):
            await asyncio.gather(*workers)


async def test_a_failed_fetcher_makes_every_worker_raise(connect: Connect) -> None:
    async with connect(prefetch=2) as source:
        workers = [asyncio.ensure_future(anext(source)) for _ in range(3)]
        await asyncio.sleep(0)
        source.buffer.fail(RuntimeError("out of order"))
        for worker in workers:
            with pytest.raises(SourceFailed, match="out of order"):
                await worker
        with pytest.raises(SourceFailed, match="out of order"):
            await anext(source)


async def test_a_source_is_connected_from_entering_to_leaving(connect: Connect) -> None:
    async with connect(prefetch=1) as source:
        assert source.connected
        await source.stop()
        assert source.connected  # in-flight messages can still be settled
    assert not source.connected


async def test_describe_counts_the_messages_and_the_consumers(
    connect: Connect, broker: Server, queue: str
) -> None:
    async with connect(prefetch=0) as source:
        need(source, "queue_metrics")
        await publish(source, 3)
        described = await source.describe()
        assert described[queue] == 3
        if f"{queue} consumers" not in described:
            pytest.skip("this broker counts no consumers")
        assert described[f"{queue} consumers"] == 0
        async with connect(prefetch=1):

            async def count_consumers() -> object:
                return (await source.describe())[f"{queue} consumers"]

            await eventually(1, count_consumers)


async def test_two_consumers_and_a_publisher_at_once_handle_everything_once(
    connect: Connect, counted: Counted
) -> None:
    handled: list[str] = []
    published: list[str] = []
    async with (
        connect(prefetch=7) as one,
        connect(prefetch=3) as other,
        connect(prefetch=0) as publisher,
    ):
        workers = [
            asyncio.create_task(consume(source, handled))
            for source in (one, one, one, other, other)
        ]
        for _ in range(20):
            published += await publish(publisher, 20)
        await eventually(len(published), length_of(handled))
        await asyncio.gather(one.stop(), other.stop())
        await asyncio.gather(*workers)
    assert Counter(handled) == Counter(published)
    await counted()


async def test_settling_twice_changes_nothing(connect: Connect, counted: Counted) -> None:
    async with connect(prefetch=3) as source:
        await publish(source, 3)
        done, rejected, requeued = await take(source, 3)
        await source.stop()
        await source.ack(done)
        await source.requeue(requeued)
        await source.reject(rejected, "bad")
        for message in (done, requeued, rejected):
            await source.ack(message)
            await source.requeue(message)
            await source.retry(message, RETRY_SECONDS, "not now")
            await source.reject(message, "bad")
        assert source.requeued_count == 1
    await counted(ready=1, dead=1)


async def test_settling_after_the_connection_is_lost_changes_nothing(
    connect: Connect, counted: Counted
) -> None:
    async with connect(prefetch=4) as source:
        await publish(source, 4)
        done, later, bad, back = await take(source, 4)
    await source.ack(done)
    await source.retry(later, RETRY_SECONDS, "not now")
    await source.reject(bad, "bad")
    await source.requeue(back)
    await counted(ready=4)


@pytest.mark.parametrize("seed", [0, 1])
async def test_settlements_in_any_order_settle_exactly_their_messages(
    connect: Connect, counted: Counted, seed: int
) -> None:
    chance = random.Random(seed)
    done, dead, delayed = 0, 0, 0
    async with connect(prefetch=150, retry_seconds=1, retry_max_seconds=300) as source:
        need(source, "requeue")
        await publish(source, 150)
        messages = await take(source, 150)
        await source.stop()
        chance.shuffle(messages)
        for message in messages:
            match chance.randrange(10):
                case 0:
                    await source.requeue(message)
                case 1:
                    await source.reject(message, "bad")
                    dead += 1
                case 2:
                    await source.retry(message, 300, "not now")
                    delayed += 1
                case 3 if seed % 2:
                    pass  # leaving the context requeues the messages
                case _:
                    await source.ack(message)
                    done += 1
            if chance.random() < 0.3:
                await asyncio.sleep(0)
    ready = 150 - done - dead - delayed
    await counted(ready=ready, delayed=delayed, dead=dead)


@pytest.mark.parametrize("broker", ["redis", "sqs"], indirect=True, scope="session")
@pytest.mark.parametrize("verb", ["ack", "reject"])
async def test_what_is_settled_sooner_than_it_is_written_has_a_bound(
    connect: Connect, counted: Counted, verb: str
) -> None:
    """Fetching and settling are separate requests here: a shutdown still writes the rest of many rejects in time."""
    prefetch, count = 20, 400
    async with connect(prefetch=prefetch) as source:
        await publish(source, count)
        for _ in range(count):
            [message] = await take(source, 1)
            await (source.ack(message) if verb == "ack" else source.reject(message, "bad"))
            sqs = type(source).__name__ == "SqsBroker"
            unwritten = source._settlements if sqs else source._unwritten.values()
            assert len({settlement.message for settlement in unwritten}) <= 2 * prefetch
        await source.stop()
    await counted(dead=count if verb == "reject" else 0)


async def test_every_ack_has_reached_the_broker_when_the_source_is_closed(
    connect: Connect, counted: Counted, shorten: Callable[..., None]
) -> None:
    shorten(50, "QUIET_TURNS")  # acks that are sent together wait for each other
    async with connect(prefetch=1000) as source:
        await publish(source, 300)
        await ack(source, await take(source, 300))
    await counted()


async def test_publish_returns_when_every_message_is_in_the_queue(
    connect: Connect, counted: Counted
) -> None:
    async with connect(prefetch=0) as source:
        await publish(source, 1000)
        await counted(ready=1000)


async def test_prefetch_is_never_exceeded(connect: Connect) -> None:
    async with connect(prefetch=3) as few:
        need(few, "competing_consumers")
        await publish(few, 30)
        held = await take(few, 3)
        async with connect(prefetch=30) as many:
            others = await take(many, 27)  # fewer than 27 if the first had more than its three
            await ack(many, others)
        await ack(few, held)


async def test_the_bytes_of_unacked_bodies_have_a_bound_and_small_ones_fill_the_prefetch(
    connect: Connect, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "MOST_BYTES", 40_000)
    async with connect(prefetch=0) as publisher:
        need(publisher, "competing_consumers")
        await publisher.publish([OutgoingMessage(b"x" * 4_000) for _ in range(25)])
        async with connect(prefetch=20, max_body_bytes=4_000) as source:
            large = await take(source, 10)
            await counted(ready=15)
            assert len(source.buffer) == 0
            await ack(source, large)
            await ack_all(source, 15)
            await publish(publisher, 45)
            await ack_all(source, 20)
            await take(source, 20)
            await counted(ready=5)


async def test_closing_requeues_in_flight_messages(connect: Connect, counted: Counted) -> None:
    async with connect(prefetch=4) as source:  # more than are published, so it may wait for more
        published = await publish(source, 2)
        await take(source, 1)
    await counted(ready=2)
    async with connect(prefetch=2) as source:
        messages = await take(source, 2)
        assert {(m.id, m.attempt) for m in messages} == {(id, 1) for id in published}
        await ack(source, messages)


@pytest.mark.slow
async def test_rolling_restarts_count_no_attempts(connect: Connect) -> None:
    async with connect(prefetch=0) as source:
        need(source, "requeue")
        await publish(source, 1)
    for _ in range(25):  # RabbitMQ 4 by default makes it a dead letter after 20
        async with connect(prefetch=1) as source:
            await buffer_holds(source, 1)
            await source.stop()
            assert source.requeued_count == 1
    async with connect(prefetch=1) as source:
        (message,) = await take(source, 1)
        assert message.attempt == 1
        await source.ack(message)


@pytest.mark.slow
async def test_an_in_flight_message_stays_with_its_consumer_for_longer_than_the_lease(
    connect: Connect, counted: Counted, broker: Server, broker_name: str, events: list[Event]
) -> None:
    if (lease_seconds := LEASE_SECONDS.get(broker_name)) is None:
        pytest.skip("the broker has no leases")
    async with connect(prefetch=3, broker_url=broker.impatient_url) as source:
        await publish(source, 3)
        messages = await take(source, 2)
        await buffer_holds(source, 1)
        async with connect(prefetch=3, broker_url=broker.impatient_url) as other:
            await asyncio.sleep(1.5 * lease_seconds)
            assert len(other.buffer) == 0
            await source.ack(messages[0])
            await other.stop()
            await source.stop()
            await asyncio.sleep(1.5 * lease_seconds)  # the lease is kept during the drain
            await source.ack(messages[1])
    await counted(ready=1)
    assert not find(events, "settlement_lost")


@pytest.mark.slow
async def test_a_message_that_waits_for_its_retry_delays_no_other(connect: Connect) -> None:
    async with connect(prefetch=1) as source:
        need(source, "delayed_retry")
        published = await publish(source, 3)
        (first,) = await take(source, 1)
        await source.retry(first, LONG_RETRY_SECONDS, "not now")
        order = await ack_all(source, 3)
        others = [id for id in published if id != first.id]
        assert as_promised(source, order[:-1]) == as_promised(source, others)
        assert order[-1] == first.id


async def test_in_flight_messages_can_be_settled_after_stop(
    connect: Connect, counted: Counted
) -> None:
    async with connect(prefetch=4) as source:
        await publish(source, 4)
        done, later, bad, back = await take(source, 4)
        await source.stop()
        await source.ack(done)
        await source.retry(later, RETRY_SECONDS, "not now")
        await source.reject(bad, "bad")
        await source.requeue(back)
    await counted(ready=2, dead=1)


async def test_purged_dead_letters_are_gone_and_counted(connect: Connect, counted: Counted) -> None:
    async with connect(prefetch=3) as source:
        need(source, "dead_letters")
        await publish(source, 3)
        for message in await take(source, 3):
            await source.reject(message, "bad")
        await counted(dead=3)
        assert await last(source.purge_dead_letters()) == 3
        assert await last(source.purge_dead_letters()) == 0
        assert [moved async for moved in source.replay_dead_letters()] == []
    await counted()


async def test_messages_published_before_the_start_are_delivered(connect: Connect) -> None:
    async with connect(prefetch=0) as publisher:
        published = await publish(publisher, 3)
    async with connect(prefetch=1) as source:
        received = await ack_all(source, 3)
        assert as_promised(source, received) == as_promised(source, published)


async def test_a_requeued_message_goes_to_another_consumer_at_once_and_unchanged(
    connect: Connect,
) -> None:
    async with connect(prefetch=1) as one, connect(prefetch=1) as other:
        need(one, "requeue")
        await publish(one, 2)
        (held,) = await take(other, 1)
        (message,) = await take(one, 1)
        await one.retry(message, RETRY_SECONDS, "not now")
        (message,) = await take(one, 1)
        await one.stop()
        await other.ack(held)
        requeued_at = time.monotonic()
        await one.requeue(message)
        (again,) = await take(other, 1)
        assert time.monotonic() - requeued_at < AT_ONCE_SECONDS
        assert (again.id, again.attempt) == (message.id, 2)
        assert one.requeued_count == 1
        await other.ack(again)


async def test_dead_letters_are_listed_oldest_first_and_stay(connect: Connect) -> None:
    async with connect(prefetch=5) as source:
        need(source, "dead_letters")
        published = await publish(source, 5)
        for message in await take(source, 5):
            await source.reject(message, f"reason {message.body.decode()}")
        await source.stop()
        for _ in range(2):
            limit = 3 if source.capabilities.order else 5
            letters = [letter async for letter in source.dead_letters(limit)]
            assert as_promised(source, ids(letters)) == as_promised(source, published[:limit])
            assert all(letter.reason == f"reason {letter.body.decode()}" for letter in letters)
            await eventually(5, source.count_dead_letters)


async def test_an_acknowledged_message_is_gone(connect: Connect, counted: Counted) -> None:
    async with connect(prefetch=10) as source:
        published = await publish(source, 3)
        messages = await take(source, 3)
        assert as_promised(source, ids(messages)) == as_promised(source, published)
        await ack(source, messages)
    await counted()


async def test_stop_requeues_untaken_messages_and_ends_deliveries(connect: Connect) -> None:
    published: list[str] = []

    async def others_get_everything() -> None:
        async with connect(prefetch=12) as other:
            messages = await take(other, 12)
            assert Counter(ids(messages)) == Counter(published)
            assert {message.attempt for message in messages} == {1}
            await ack(other, messages)

    async with connect(prefetch=0) as publisher:
        async with connect(prefetch=10) as one:
            published += await publish(publisher, 10)
            await eventually(10, length_of(one.buffer))
            await one.stop()
            published += await publish(publisher, 2)
            with pytest.raises(StopAsyncIteration):
                await anext(one)
            assert one.requeued_count == 10
            if one.capabilities.requeue:
                await others_get_everything()  # the first consumer is still connected
        if not one.capabilities.requeue:
            await others_get_everything()


@pytest.mark.parametrize(
    "broker",
    ["rabbitmq", "nats", "redis", "postgres", "sqlite"],
    indirect=True,
    scope="session",
)
async def test_what_arrives_while_deliveries_end_is_requeued_behind_what_came_before(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except on MQTT, whose session keeps its place, and on Kafka and SQS."""
    async with connect(prefetch=0) as publisher:
        async with connect(prefetch=10) as one:
            published = await publish(publisher, 2)
            await buffer_holds(one, 2)
            end = one._stop_fetching

            async def end_later() -> None:
                published.extend(await publish(publisher, 1))
                await eventually(3, length_of(one.unacked))
                await end()

            monkeypatch.setattr(one, "_stop_fetching", end_later)
            await one.stop()
            assert one.requeued_count == 3
        async with connect(prefetch=10) as other:
            messages = await take(other, 3)
            assert ids(messages) == published
            await ack(other, messages)


async def test_replayed_dead_letters_are_new_messages(connect: Connect, counted: Counted) -> None:
    async with connect(prefetch=3) as source:
        need(source, "dead_letters")
        await publish(source, 3, type="kind", headers={"trace": "t"})
        rejected = await take(source, 3)
        for message in rejected:
            await source.reject(message, "bad")
        await counted(dead=3)
        progress = [moved async for moved in source.replay_dead_letters()]
        assert progress == sorted(progress)
        assert progress[-1] == 3
        messages = await take(source, 3)
        assert as_promised(source, ids(messages)) == as_promised(source, ids(rejected))
        for message in messages:
            assert (message.attempt, message.type) == (1, "kind")
            assert dict(message.headers) == {"trace": "t"}
            await source.ack(message)
    await counted()
