"""RabbitMQ alone: outages, its topology, its limits. Tests of every broker are in test_every_source.py."""

import asyncio
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import reduce
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock, patch
from urllib.parse import quote, urlsplit

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from aiormq.abc import ChannelFrame, DeliveredMessage
from aiormq.channel import Channel
from aiormq.exceptions import ChannelInvalidStateError, ChannelNotFoundEntity
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.commands import Channel as AmqpChannel
from pamqp.header import ContentHeader

from harness.contract import eventually, opened, take
from harness.fixtures import StartServer
from harness.scene import Scene, assert_clean_shutdown, is_empty, wait_until
from harness.servers import (
    Counts,
    PrivateServer,
    Server,
)
from harness.servers.proxy import Proxy
from harness.servers.rabbitmq import DISK_FREE_BYTES, PrivateRabbit
from rabbitmq_client import open_channel, publish_raw
from rabbitmqctl import control_of
from runtime.brokers import connectivity, make_source, rabbitmq
from runtime.brokers.delivery import ATTEMPTS, DEAD_LETTERED_AT, REASON
from runtime.brokers.rabbitmq import (
    UNSTORED_SETTLEMENTS,
    RabbitBroker,
    delays_ms,
)
from runtime.brokers.source import MISSING
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.errors import BrokerDenied, BrokerRefused, BrokerUnavailable, SourceFailed
from runtime.handlers import HandlerFunction, Router
from runtime.message import Message, OutgoingMessage, Retry
from runtime.settings import ConsumerSettings
from runtime.watchdog import CLOSE_SECONDS
from secured import ODD_USER, ODD_VHOST, READER, Start, rabbitmq_with_users, with_user
from steps import Event, ack_all, eventually_counts, eventually_logged, find, ids, publish

pytestmark = pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True, scope="session")

SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": 0.4}

WAIT_SECONDS = 30


def table_of(fields: bytes) -> bytes:
    return struct.pack(">I", len(fields)) + fields


DEEP = reduce(lambda fields, _: b"\x01aF" + table_of(fields), range(3000), b"")
UNREADABLE: dict[str, tuple[dict[str, Any], tuple[bytes, bytes], str]] = {
    "type": ({"message_type": "TYPE"}, (b"TYPE", b"\xff\xfe\xfd\xfc"), "dead letter"),
    "long type": ({"message_type": "T" * 255}, (b"T" * 255, b"\xff" * 255), "dead letter"),
    "name of a header": (
        {"message_type": "order", "headers": {"NAME": 1}},
        (b"NAME", b"gr\xf6\xdf"),
        "handled",
    ),
    "routing key": (
        {"message_type": "order"},
        (b"ROUTING KEY", b"\xff" * len(b"ROUTING KEY")),
        "handled",
    ),
    "time": (
        {"message_type": "order", "timestamp": datetime.fromtimestamp(0x61626364, UTC)},
        (struct.pack(">Q", 0x61626364), b"\x7f" * 8),
        "handled",
    ),
    "depth": (
        {"message_type": "order", "headers": {"deep": "x" * len(DEEP)}},
        (b"S" + struct.pack(">I", len(DEEP)) + b"x" * len(DEEP), b"F" + table_of(DEEP)),
        "handled",
    ),
}
"""Properties, the bytes of them to replace, and the outcome of the message."""

Connect = Callable[..., AbstractAsyncContextManager[RabbitBroker]]


@pytest.fixture
def node(start_server: StartServer) -> PrivateServer:
    """A RabbitMQ whose disk may run full."""
    server: PrivateServer = start_server("private", "rabbitmq")
    return server


@pytest.fixture
def with_users(start_secured: Start) -> str:
    """The URL of a RabbitMQ with the users `ODD_USER` and `READER`."""
    return start_secured(rabbitmq_with_users)


@asynccontextmanager
async def alarm(server: PrivateRabbit) -> AsyncIterator[None]:
    """A context in which less of the disk is free than the broker requires."""
    # In a thread: rabbitmqctl takes seconds, and meanwhile the event loop must send heartbeats.
    await asyncio.to_thread(control_of(server), "set_disk_free_limit", str(10**15))
    try:
        yield
    finally:
        await asyncio.to_thread(control_of(server), "set_disk_free_limit", str(DISK_FREE_BYTES))


NO, ALL = "^$", r"^orders(\..*)?$"
DEFAULT_EXCHANGE = r"^amq\.default$"
RIGHTS = {
    "check": (NO, NO, NO),
    "publish": (NO, DEFAULT_EXCHANGE, NO),
    "declare": (ALL, DEFAULT_EXCHANGE, ALL),
    "run": (NO, DEFAULT_EXCHANGE, "^orders$"),
    "dead-letters list": (NO, NO, r"^orders\.dead$"),
    "dead-letters replay": (NO, DEFAULT_EXCHANGE, r"^orders\.dead$"),
    "dead-letters purge": (NO, NO, r"^orders\.dead$"),
}
"""The rights to configure, to write and to read, from docs/brokers/rabbitmq.md."""


class TestAcksThatWereNotSent:
    async def test_are_logged_when_the_event_loop_was_blocked_beyond_the_heartbeats(
        self, connect: Connect, broker: Server, events: list[Event]
    ) -> None:
        """The broker has closed the connection, and this process detects that only after it has sent the ack."""
        async with connect(prefetch=1, broker_url=f"{broker.url}?heartbeat=1") as source:
            (published,) = await publish(source, 1)
            (message,) = await take(source, 1)
            time.sleep(5)  # noqa: ASYNC251
            await source.ack(message)
            await eventually_logged(events, "settlement_lost")
            assert await ack_all(source, 1) == [published]
        (lost,) = find(events, "settlement_lost")
        assert lost["message_id"] == published
        assert "the event loop was blocked for 5 seconds" in lost["reason"]

    async def test_are_logged_once_when_the_channel_closes(
        self, broker: Server, events: list[Event]
    ) -> None:
        deliveries = rabbitmq._Deliveries(fake_channel(), 10)
        for tag, id in ((1, "first"), (3, "second"), (4, "requeued"), (5, "unacked")):
            deliveries.add(tag, Message(b"", id))
        deliveries.ack(1)
        deliveries.ack(3)
        deliveries.requeue(4)
        deliveries.close()
        deliveries.close()
        await asyncio.gather(*deliveries.tasks, return_exceptions=True)
        assert [event["message_id"] for event in find(events, "settlement_lost")] == [
            "first",
            "second",
        ]

    async def test_are_logged_when_the_channel_closes_while_they_are_written(
        self, broker: Server, events: list[Event]
    ) -> None:
        deliveries = rabbitmq._Deliveries(channel := fake_channel(), 10)
        channel.basic_ack = AsyncMock(side_effect=ChannelInvalidStateError)
        deliveries.add(1, Message(b"", "first"))
        deliveries.ack(1)
        await asyncio.gather(*deliveries.tasks)
        channel.closing.set_exception(ConnectionResetError("reset"))
        await asyncio.sleep(0)
        (lost,) = find(events, "settlement_lost")
        assert (lost["message_id"], lost["settlement"]) == ("first", "ack")
        assert deliveries.ended.is_set()
        assert deliveries.end_reason == "reset"

    async def test_never_cover_what_is_requeued_while_the_broker_is_asked(
        self, broker: Server
    ) -> None:
        """After a blocked event loop the broker is asked before acks are written, which takes a while."""
        deliveries = rabbitmq._Deliveries(channel := fake_channel(), 10)
        asked, answered, written = asyncio.Event(), asyncio.Event(), []

        async def flow(_: bool) -> None:
            asked.set()
            await answered.wait()

        channel.flow = flow
        channel.basic_ack = AsyncMock(side_effect=lambda tag, **_: written.append(("ack", tag)))
        channel.basic_nack = AsyncMock(side_effect=lambda tag, **_: written.append(("nack", tag)))
        for tag in (1, 2):
            deliveries.add(tag, Message(b"", str(tag)))
        deliveries._blocked_seconds = 3.0
        deliveries.ack(2)
        await asked.wait()
        deliveries.requeue(1)
        answered.set()
        await deliveries.written.wait()
        deliveries.close()
        await asyncio.gather(*deliveries.tasks, return_exceptions=True)
        assert written == [("nack", 1), ("ack", 2)]


def fake_channel() -> Any:
    loop = asyncio.get_running_loop()
    return SimpleNamespace(
        closing=loop.create_future(), loop=loop, on_consumer_cancel_callbacks=set()
    )


async def count(source: RabbitBroker) -> None:
    await source.count_dead_letters()


async def publish_alone(source: RabbitBroker) -> None:
    source._publisher._exchanges = {""}  # like before the first message to this exchange
    with pytest.raises(BrokerRefused, match="no queue for the message"):
        await source.publish([OutgoingMessage(b"", to="exchange:amq.direct/nowhere")])


class TestOutages:
    @pytest.mark.parametrize("step", ["open", "basic_consume"])
    async def test_a_failed_start_can_be_repeated_and_consumes_once(
        self,
        source_for: Callable[..., RabbitBroker],
        broker: Server,
        proxy: Proxy,
        queue: str,
        monkeypatch: pytest.MonkeyPatch,
        step: str,
    ) -> None:
        """The connection is lost in the first step of the start, or in the last."""
        async with opened(source_for(10, broker_url=proxy.url)) as source:
            whole = getattr(Channel, step)

            async def lose(*_: object, **__: object) -> None:
                monkeypatch.setattr(Channel, step, whole)
                proxy.cut()
                raise ConnectionResetError

            monkeypatch.setattr(Channel, step, lose)
            with pytest.raises(BrokerUnavailable):
                await source.start()

            async def starts() -> bool:
                with suppress(BrokerUnavailable):
                    await source.start()
                    return True
                return False

            await eventually(True, starts)
            await publish(source, 5)
            assert len(await ack_all(source, 5)) == 5
            assert broker.consumers(queue) == 1

    @pytest.mark.very_slow
    @pytest.mark.timeout(240)
    async def test_an_outage_of_two_minutes_is_survived(
        self, connect: Connect, proxy: Proxy, events: list[Event]
    ) -> None:
        async with connect(broker_url=proxy.url) as source:
            waiting = asyncio.ensure_future(anext(source))  # aio-pika's own iterator gives up now
            proxy.refuse()
            await asyncio.sleep(121)
            assert not waiting.done()
            proxy.resume()
            await eventually_logged(events, "connected", count=2)
            published = await publish(source, 20)
            message = await waiting
            await source.ack(message)
            assert [message.id, *await ack_all(source, 19)] == published

    @pytest.mark.very_slow
    async def test_an_unresponsive_connection_is_noticed_by_the_heartbeat(
        self, connect: Connect, proxy: Proxy, events: list[Event]
    ) -> None:
        async with connect(prefetch=2, broker_url=f"{proxy.url}?heartbeat=1") as source:
            published = await publish(source, 2)
            first, second = await take(source, 2)
            proxy.black_hole()
            await source.retry(first, 0.1, "waits for the broker's word, and is not cancelled")
            await eventually_logged(events, "reconnecting")
            await source.ack(second)
            proxy.resume()
            # The retry may have arrived before the connection broke; the rest is certain.
            handled = await ack_all(source, 2)
            assert set(handled) <= set(published)
            await eventually_logged(events, "connected", count=2)
        assert {event["message_id"] for event in find(events, "settlement_lost")} == set(published)

    @pytest.mark.very_slow
    async def test_in_an_alarm_acks_arrive_and_a_retry_waits_and_is_published_once(
        self,
        connect: Connect,
        node: PrivateServer,
        events: list[Event],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(rabbitmq, "ANSWER_SECONDS", 0.5)
        assert isinstance(node, PrivateRabbit)
        async with connect(prefetch=4, broker_url=f"{node.url}?heartbeat=1") as source:
            published = await publish(source, 30)
            failed, *others = await take(source, 4)
            async with alarm(node):
                retrying = asyncio.create_task(source.retry(failed, 0.1, "not now"))
                for message in others:
                    await source.ack(message)
                handled = [*ids(others), *await ack_all(source, 26)]
                assert handled == [id for id in published if id != failed.id]
                await eventually_logged(events, "reconnecting")
                await asyncio.sleep(8)  # longer than a connection without heartbeats is kept
                assert not source.connected
                assert not retrying.done()
            await retrying
            (again,) = await take(source, 1)
            assert (again.id, again.attempt) == (failed.id, 2)
            await source.ack(again)
            await eventually_logged(events, "connected", count=2)
        (outage,) = find(events, "reconnecting")
        assert outage["reason"] == "it confirms no message; it may be short of memory or disk"
        await eventually_counts(node, source.settings.source, Counts(ready=0, delayed=0, dead=0))
        assert find(events, "settlement_lost") == []

    @pytest.mark.very_slow
    async def test_an_alarm_cannot_delay_the_shutdown(
        self, connect: Connect, node: PrivateServer
    ) -> None:
        assert isinstance(node, PrivateRabbit)
        async with connect(broker_url=node.url) as source:
            published = await publish(source, 1)
        async with alarm(node):
            async with connect(prefetch=1, broker_url=node.url) as source:
                (message,) = await take(source, 1)
                retrying = asyncio.create_task(source.retry(message, 0.1, "not now"))

                async def sent() -> bool:
                    return bool(source._publisher._unconfirmed)

                await eventually(True, sent)
                retrying.cancel()
                await source.requeue(message)
                left_at = time.monotonic()
            assert time.monotonic() - left_at < 1.5
            async with connect(prefetch=1, broker_url=node.url) as source:
                assert await ack_all(source, 1) == published

    def test_a_connection_cut_while_a_handler_runs_does_not_interrupt_it(
        self, scene: Scene, proxy: Proxy
    ) -> None:
        scene.publish(1, seconds=1)
        process = scene.start(url=proxy.url)
        process.wait_for("handling")
        proxy.cut()
        process.wait_for("connected", count=2)
        wait_until(lambda: is_empty(scene))
        assert_clean_shutdown(process)
        assert scene.ledger.ended == scene.ledger.started
        assert len(scene.ledger.started) <= 2

    async def test_a_consumer_that_the_broker_cancels_is_restored(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=10) as source:
            assert source._deliveries is not None
            channel: Any = source._deliveries.channel
            [tag] = source._deliveries.consumers
            callback = channel.consumers[tag]
            await channel.basic_cancel(tag)
            # Ended at the broker, while this process does not know it yet.
            channel.consumers[tag] = callback
            header = ContentHeader(properties=Basic.Properties(message_id="first"), body_size=1)
            for frame in (
                Basic.Deliver(tag, 1, False, "", queue),
                header,
                ContentBody(b"1"),
                Basic.Cancel(tag, True),
            ):
                channel.frames.put_nowait((0, frame))
            await eventually_logged(events, "reconnecting")
            await eventually_logged(events, "connected", count=2)
            assert broker.consumers(queue) == 1

    async def test_a_queue_recreated_with_other_arguments_is_consumed_as_it_is(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect() as source, open_channel(broker.url) as channel:
            await channel.queue_delete(queue)
            await channel.declare_queue(queue, durable=True)
            await publish_raw(channel, queue, message_id="id-1")
            assert await ack_all(source, 1) == ["id-1"]

    async def test_a_queue_recreated_as_a_stream_ends_the_consumption(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect() as source, open_channel(broker.url) as channel:
            await channel.queue_delete(queue)
            arguments: dict[str, Any] = {"x-queue-type": "stream"}
            await channel.declare_queue(queue, durable=True, arguments=arguments)
            async with asyncio.timeout(WAIT_SECONDS):
                with pytest.raises(SourceFailed, match="inequivalent arg"):
                    await anext(source)

    async def test_a_foreign_queue_is_never_made_again_as_one_of_ours(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with open_channel(broker.url) as channel:
            await channel.declare_queue(queue, durable=True)
            async with connect() as source:
                await channel.queue_delete(queue)
                async with asyncio.timeout(WAIT_SECONDS):
                    with pytest.raises(SourceFailed, match="does not exist: create it again"):
                        await anext(source)

    async def test_a_channel_that_the_broker_closes_is_opened_again(
        self, connect: Connect, events: list[Event]
    ) -> None:
        async with connect(prefetch=5) as source:
            published = await publish(source, 20)
            (in_flight,) = await take(source, 1)
            receipt = in_flight.receipt
            await receipt.deliveries.channel.basic_ack(4711)  # PRECONDITION_FAILED

            async def gone() -> bool:
                return bool(receipt.deliveries.channel.is_closed)

            await eventually(True, gone)
            await source.ack(in_flight)
            assert Counter(await ack_all(source, 20)) == Counter(published)
            await eventually_logged(events, "connected", count=2)
        assert [event["message_id"] for event in find(events, "settlement_lost")] == [in_flight.id]
        (lost,) = find(events, "reconnecting")
        assert "unknown delivery tag 4711" in lost["reason"]


class TestCancelledRequests:
    @pytest.mark.parametrize("request_of", [count, publish_alone])
    async def test_a_request_that_is_cancelled_while_its_channel_closes_leaves_the_connection_open(
        self,
        connect: Connect,
        events: list[Event],
        monkeypatch: pytest.MonkeyPatch,
        request_of: Callable[[RabbitBroker], Awaitable[object]],
    ) -> None:
        """The broker ends a connection on which a channel is closed twice."""
        async with connect() as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            await request_of(source)  # it has opened its connection
            clients = (source._client, source._publisher.client)
            connections = [client._connection for client in clients]
            request = asyncio.ensure_future(request_of(source))
            marshall = ChannelFrame.marshall

            def cancelling(frames: list[Any], **options: Any) -> ChannelFrame:
                if isinstance(frames[0], AmqpChannel.Close):
                    asyncio.get_running_loop().call_soon(request.cancel)
                return marshall(frames=frames, **options)

            monkeypatch.setattr(ChannelFrame, "marshall", staticmethod(cancelling))
            with pytest.raises(asyncio.CancelledError):
                await request
            monkeypatch.undo()
            await request_of(source)
            assert [client._connection for client in clients] == connections
            assert not find(events, "reconnecting")
            await source.ack(message)


class TestStopping:
    async def test_a_message_that_kills_its_consumer_each_time_ends_as_a_dead_letter(
        self,
        connect: Connect,
        broker: Server,
        queue: str,
        events: list[Event],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(rabbitmq, "DELIVERY_LIMIT", 3)
        monkeypatch.setattr(connectivity, "LONGEST_PAUSE_SECONDS", 0.1)
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            for _ in range(4):
                await take(source, 1)
                source._client.cut()
            await eventually_logged(events, "connected", count=2)
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [letter] = [letter async for letter in source.dead_letters(10)]
            assert letter.reason == "dead-lettered by the broker: delivery_limit"
            assert letter.attempts == 0  # no handler failed on it
            assert abs(letter.dead_lettered_at - time.time()) < 60

    @pytest.mark.very_slow
    @pytest.mark.parametrize("in_flight", [0, 1])
    def test_an_unresponsive_broker_cannot_delay_the_exit(
        self, scene: Scene, proxy: Proxy, in_flight: int
    ) -> None:
        scene.publish(in_flight, seconds=3600)
        process = scene.start(url=proxy.url, drain_seconds=1)
        if in_flight:
            process.wait_for("handling")
        proxy.black_hole()
        exit_code, seconds = process.stop()
        assert exit_code == (75 if in_flight else 0)
        assert seconds < 1 + CLOSE_SECONDS
        proxy.cut()
        again = scene.start(drain_seconds=0)
        if in_flight:
            again.wait_for("handling")
        again.stop()

    @pytest.mark.very_slow
    def test_a_drain_longer_than_the_broker_waits_for_a_heartbeat_keeps_the_connection(
        self, scene: Scene
    ) -> None:
        scene.publish(1, seconds=4)
        process = scene.start(url=f"{scene.broker.url}?heartbeat=1")
        process.wait_for("handling")
        assert assert_clean_shutdown(process) > 3
        assert not process.find("reconnecting")
        assert not process.find("settlement_lost")
        assert scene.ledger.ended == ["task-0"]
        scene.assert_left()


class TestSettlements:
    async def test_a_backlog_is_delivered_in_its_order(self, connect: Connect) -> None:
        async with connect(prefetch=0) as source:
            published = await publish(source, 200)
        async with connect(prefetch=40) as source:
            assert await ack_all(source, 200) == published

    async def test_consecutive_acks_are_sent_together(self, connect: Connect, proxy: Proxy) -> None:
        async with connect(prefetch=100, broker_url=proxy.url) as source:
            await publish(source, 1000)
            sent_before = proxy.bytes_to_broker

            async def work() -> None:
                async for message in source:
                    await source.ack(message)

            workers = [asyncio.create_task(work()) for _ in range(10)]

            async def acked() -> int:
                described = await source.describe()
                return int(described[source.settings.source]) + len(source.buffer)

            await eventually(0, acked)
            await source.stop()
            await asyncio.gather(*workers)
        ack_bytes = 21
        assert proxy.bytes_to_broker - sent_before < 1000 * ack_bytes / 4

    async def test_quick_handlers_get_the_whole_prefetch(self, connect: Connect) -> None:
        """Also if there are never as many unacked messages as fit by the first estimate of their size."""
        async with connect(prefetch=40, max_body_bytes=10_000_000) as source:
            for _ in range(10):
                await publish(source, 1)
                await ack_all(source, 1)
            assert source._deliveries is not None
            assert sum(source._deliveries.consumers.values()) == 40

    @pytest.mark.parametrize("prefetch", [UNSTORED_SETTLEMENTS, 100])
    async def test_no_ack_is_dropped_because_the_queue_is_slower_than_the_close(
        self, connect: Connect, broker: Server, queue: str, prefetch: int
    ) -> None:
        """A channel holds acks back; each ack is its own frame, since every other message stays unacked."""
        async with connect(prefetch=0) as source:
            await publish(source, 400)
        for _ in range(6):
            async with connect(prefetch=prefetch) as source:
                messages = await take(source, prefetch)
                await source.stop()
                for message in messages[1::2]:
                    await source.ack(message)
                    await asyncio.sleep(0)
        await eventually_counts(
            broker, queue, Counts(ready=400 - 6 * (prefetch // 2), delayed=0, dead=0)
        )

    async def test_no_ack_covers_a_delivery_that_was_never_seen(
        self, source_for: Callable[..., RabbitBroker], broker: Server, queue: str
    ) -> None:
        source = source_for(prefetch=10)
        receive = source._on_delivery

        async def drop_one(delivered: DeliveredMessage) -> None:
            if delivered.body != b"3":  # as if aiormq had failed to decode it
                await receive(delivered)

        source._on_delivery = drop_one  # type: ignore[method-assign]
        async with opened(source):
            await source.start()
            await publish(source, 8)
            for message in await take(source, 7):
                await source.ack(message)
        await eventually_counts(broker, queue, Counts(ready=1, delayed=0, dead=0))


class TestMoving:
    @pytest.mark.parametrize("priority", [None, 0])
    async def test_a_priority_stays_as_it_is_and_an_absent_one_absent(
        self, connect: Connect, broker: Server, queue: str, priority: int | None
    ) -> None:
        """RabbitMQ 4.3 takes an absent priority for 4: with 0 a message would be behind all others."""
        seen = []
        async with connect(prefetch=1) as source, open_channel(broker.url) as channel:
            await publish_frames(channel, queue, Basic.Properties(priority=priority))
            (message,) = await take(source, 1)
            seen.append(message.receipt.properties.priority)
            await source.retry(message, 0.1, "not now")
            (message,) = await take(source, 1)
            seen.append(message.receipt.properties.priority)
            await source.reject(message, "bad")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            (message,) = await take(source, 1)
            seen.append(message.receipt.properties.priority)
            await source.ack(message)
        assert seen == [priority] * 3

    async def test_a_replayed_dead_letter_comes_before_what_is_published_after_it(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """On RabbitMQ 4.3 only if its priority is absent, like theirs."""
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (dead,) = await take(source, 1)
            await source.reject(dead, "bad")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            early = await publish(source, 10)
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            late = await publish(source, 10)
            assert await ack_all(source, 21) == [*early, dead.id, *late]

    @pytest.mark.parametrize(
        "attempts", ["many", "2", -1, 2**40, 1.5, True, None, [1], {"a": 1}, datetime.now(UTC)]
    )
    async def test_an_attempts_header_of_another_program_ends_no_consumer(
        self, connect: Connect, broker: Server, queue: str, attempts: Any
    ) -> None:
        headers = {ATTEMPTS: attempts}
        async with connect(prefetch=1) as source, open_channel(broker.url) as channel:
            await publish_frames(channel, queue, Basic.Properties(headers=headers))
            (message,) = await take(source, 1)
            assert message.attempt in (1, 2, 3)
            await source.reject(message, "bad")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))

    async def test_a_dead_letter_that_another_program_moved_back_is_retried(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """Because of its old x-death, RabbitMQ 3.10 took the retry for a cycle, and kept it forever."""
        async with connect(prefetch=0) as source, open_channel(broker.url) as channel:
            await publish_raw(channel, queue, message_id="id-1", expiration=0.05)
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [listed] = [letter async for letter in source.dead_letters(10)]
            assert listed.reason == "dead-lettered by the broker: expired"
            letters = await channel.get_queue(f"{queue}.dead", ensure=False)
            letter = await letters.get()
            assert "x-death" in letter.headers
            moved = aio_pika.Message(letter.body, headers=letter.headers, message_id="id-1")
            await channel.default_exchange.publish(moved, routing_key=queue)
            await letter.ack()
        async with connect(prefetch=1) as source:
            (message,) = await take(source, 1)
            await source.retry(message, 0.1, "not now")
            (message,) = await take(source, 1)
            assert (message.id, message.attempt) == ("id-1", 2)
            await source.ack(message)

    async def test_a_message_without_an_id_gets_one_and_keeps_it(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=1) as source, open_channel(broker.url) as channel:
            await publish_frames(channel, queue, Basic.Properties())
            (first,) = await take(source, 1)
            await source.retry(first, 0.1, "not now")
            (second,) = await take(source, 1)
            assert first.id == second.id != ""
            await source.ack(second)

    async def test_a_retry_is_not_delivered_again_to_the_queues_in_cc(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=1) as source, open_channel(broker.url) as channel:
            copies = await channel.declare_queue(f"{queue}.copies", exclusive=True)
            await publish_raw(channel, queue, headers={"CC": [copies.name]})
            (message,) = await take(source, 1)
            await source.retry(message, 0.1, "not now")
            await ack_all(source, 1)
            assert (await copies.declare()).message_count == 1

    async def test_headers_that_are_not_text_survive_a_retry(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=1) as source, open_channel(broker.url) as channel:
            properties = Basic.Properties(headers={"list": ["TEXT"]})
            await publish_frames(channel, queue, properties, replace=(b"TEXT", b"\xff\xfe\xfd\xfc"))
            (message,) = await take(source, 1)
            await source.retry(message, 0.1, "not now")
            (message,) = await take(source, 1)
            assert message.attempt == 2
            assert bytes(message.headers["list"][0]) == b"\xff\xfe\xfd\xfc"
            await source.ack(message)

    @pytest.mark.parametrize("case", UNREADABLE)
    async def test_a_message_that_the_client_library_cannot_decode_is_delivered_and_ends_no_connection(
        self,
        settings_for: Callable[..., ConsumerSettings],
        broker: Server,
        queue: str,
        events: list[Event],
        case: str,
    ) -> None:
        properties, (text, odd), outcome = UNREADABLE[case]
        settings = settings_for(**SETTINGS, max_attempts=2)
        seen: list[str] = []

        async def order(body: bytes, message: Message) -> None:
            seen.append(message.id)
            if message.id == "odd" and message.attempt == 1:
                raise Retry

        async def other(body: bytes) -> None: ...

        async with opened(make_source(settings)) as publisher, open_channel(broker.url) as channel:
            fanout = await channel.declare_exchange(f"{queue}.all", "fanout", auto_delete=True)
            await (await channel.get_queue(queue)).bind(fanout)
            odd_properties = Basic.Properties(message_id="odd", **properties)
            await publish_frames(channel, "ROUTING KEY", odd_properties, (text, odd), fanout.name)
            await publisher.publish([OutgoingMessage(b"", "order", str(n)) for n in range(20)])
        await handle(settings, 21, {"order": order, "other": other})
        assert Counter(seen) == {
            **{str(number): 1 for number in range(20)},
            **({"odd": 2} if outcome == "handled" else {}),
        }
        assert find(events, "reconnecting") == []
        counts = Counts(ready=0, delayed=0, dead=0 if outcome == "handled" else 1)
        await eventually_counts(broker, queue, counts)
        async with make_source(settings) as source:
            assert [n async for n in source.replay_dead_letters()] == [1] * counts.dead

    async def test_headers_at_the_frame_limit_become_a_dead_letter_without_them_and_harm_no_other(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        """A longer frame ends the connection, on which the dead letters of other messages are sent."""
        async with connect(prefetch=21) as source, open_channel(broker.url) as channel:
            headers: dict[str, Any] = {"stack": "x" * 130_950}
            await publish_frames(channel, queue, Basic.Properties(headers=headers))
            published = await publish(source, 20)
            messages = await take(source, 21)
            (large,) = (message for message in messages if message.id not in published)
            assert large.headers == headers
            await asyncio.gather(*(source.reject(message, "bad") for message in messages))
            assert source.put_offs.reason == ""
            await eventually_counts(broker, queue, Counts(0, 0, 21))
            letters = [letter async for letter in source.dead_letters(30)]
            assert sorted(ids(letters)) == sorted(ids(messages))
            assert {(letter.reason, letter.body) for letter in letters} == {
                ("bad", message.body) for message in messages
            }
        assert find(events, "settlement_lost") == []
        assert find(events, "reconnecting") == []

    async def test_a_retry_whose_headers_do_not_fit_is_put_off(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=1) as source, open_channel(broker.url) as channel:
            headers: dict[str, Any] = {"stack": "x" * 130_950}
            await publish_frames(channel, queue, Basic.Properties(headers=headers))
            (message,) = await take(source, 1)
            await source.retry(message, 0.1, "not now")
            assert "its headers have 131" in source.put_offs.reason
            (again,) = await take(source, 1)
            assert (again, again.attempt) == (message, 2)
            await source.ack(again)
        assert len(find(events, "settlement_lost")) == 1
        assert find(events, "reconnecting") == []

    async def test_a_delay_beyond_the_longest_back_off_has_a_queue_of_its_own(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=1) as source, open_channel(broker.url) as channel:
            await publish(source, 1)
            (message,) = await take(source, 1)
            retried_at = time.monotonic()
            await source.retry(message, 1.2, "later")
            await ack_all(source, 1)
            assert 1.19 <= time.monotonic() - retried_at < 5
            await channel.queue_delete(f"{queue}.retry.1600")

    async def test_a_missing_retry_queue_is_declared_by_the_retry_that_needs_it(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=1) as source, open_channel(broker.url) as channel:
            await publish(source, 1)
            (message,) = await take(source, 1)
            await channel.queue_delete(f"{queue}.retry.100")
            await source.retry(message, 0.1, "not now")
            (message,) = await take(source, 1)
            assert message.attempt == 2
            await source.ack(message)

    async def test_messages_with_one_id_are_all_kept_when_the_queue_for_them_is_missing(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=3) as source, open_channel(broker.url) as channel:
            await source.publish([OutgoingMessage(body, "", "same") for body in (b"A", b"B", b"C")])
            messages = await take(source, 3)
            await channel.queue_delete(f"{queue}.dead")
            await asyncio.gather(*(source.reject(message, "bad") for message in messages))

        async def kept() -> int:
            counts = await asyncio.to_thread(broker.counts, queue)
            return counts.dead + counts.ready  # requeued if the new queue was not ready

        await eventually(3, kept)

    async def test_a_short_delay_behind_a_long_one_waits_no_longer_than_its_own_back_off(
        self, connect: Connect
    ) -> None:
        async with connect(prefetch=2, retry_seconds=1, retry_max_seconds=300) as source:
            await publish(source, 2)
            one, other = await take(source, 2)
            retried_at = time.monotonic()
            await source.retry(one, 50, "long")
            await source.retry(other, 0.15, "short")
            (message,) = await take(source, 1)
            assert message.id == other.id
            assert message.headers["x-death"][0]["original-expiration"] == "150"
            assert time.monotonic() - retried_at < 5

    @pytest.mark.parametrize(
        ("first", "longest", "expected"),
        [
            (1, 8, [1000, 2000, 4000, 8000]),
            (1, 10, [1000, 2000, 4000, 8000, 10000]),
            (5, 5, [5000]),
            (0.0001, 0.0001, [1]),
        ],
    )
    def test_there_is_a_queue_for_each_step_of_the_back_off(
        self, broker: Server, first: float, longest: float, expected: list[int]
    ) -> None:
        assert delays_ms(first, longest) == expected

    def test_there_are_never_more_than_twelve_retry_queues(self, broker: Server) -> None:
        delays = delays_ms(0.01, 86_400)
        assert len(delays) == 12
        assert (delays[0], delays[-1]) == (10, 86_400_000)


class TestPublishing:
    async def test_what_many_handlers_publish_at_once_is_one_write_and_each_hears_of_its_own(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """Also behind a message that cannot be written, and beside a message that reaches no queue."""
        async with connect(prefetch=0) as source:
            await publish(source, 1)
            client = source._publisher.client
            client.writer = Mock(wraps=client.writer)
            wrong = {3: "exchange:/" + "x" * 256, 50: f"queue:{queue}-missing"}
            sent = [OutgoingMessage(b"%d" % n, to=wrong.get(n, "")) for n in range(100)]
            outcomes = await asyncio.gather(
                *(source.publish([message]) for message in sent), return_exceptions=True
            )
            failures = {n: str(error) for n, error in enumerate(outcomes) if error is not None}
            assert failures.keys() == wrong.keys()
            assert "cannot be sent" in failures[3]
            assert "no queue for the message" in failures[50]
            client.writer.write.assert_called_once()
        await eventually_counts(broker, queue, Counts(ready=99, delayed=0, dead=0))

    async def test_a_first_burst_to_an_exchange_has_few_channels(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """A server closes the connection at its limit of channels."""
        async with connect(prefetch=0) as source, open_channel(broker.url) as channel:
            exchange = await channel.declare_exchange(f"{queue}-events", "fanout")
            await (await channel.get_queue(queue)).bind(exchange)
            client = source._publisher.client
            with patch.object(client, "channel", Mock(wraps=client.channel)) as opening:
                to = f"exchange:{exchange.name}/"
                await source.publish([OutgoingMessage(b"x", to=to) for _ in range(100)])
            assert 1 < opening.call_count <= 10
            await exchange.delete()
        await eventually_counts(broker, queue, Counts(ready=100, delayed=0, dead=0))

    async def test_each_burst_to_a_missing_exchange_is_refused_and_harms_no_other_message(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """A channel does not get a number before the broker knows that it is free."""
        async with connect(prefetch=0) as source:
            missing = [OutgoingMessage(b"x", to=f"exchange:{queue}-missing/") for _ in range(100)]
            for number in range(3):
                refused = source.publish(missing)
                outcomes = await asyncio.gather(refused, publish(source, 1), return_exceptions=True)
                assert isinstance(outcomes[0], BrokerRefused), number
                assert "no exchange" in str(outcomes[0])
                assert isinstance(outcomes[1], list), number
        await eventually_counts(broker, queue, Counts(ready=3, delayed=0, dead=0))

    async def test_another_client_reads_bodies_of_every_number_of_frames(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """The frames are the runtime's; several in one write, of any size, do not mix."""
        pika = pytest.importorskip("pika")
        async with connect(prefetch=0) as source:
            await publish(source, 1)
            most = source._publisher._channel.max_content_size  # type: ignore[union-attr]
            sizes = [0, 1, most - 1, most, most + 1, 2 * most, 1_000_000]
            bodies = [bytes([n]) * size for n, size in enumerate(sizes)]
            sent = [OutgoingMessage(body, "t", str(n)) for n, body in enumerate(bodies)]
            await asyncio.gather(*(source.publish([message]) for message in sent))

        def read() -> dict[str, bytes]:
            with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
                channel = connection.channel()
                found = [channel.basic_get(queue, auto_ack=True) for _ in range(len(sent) + 1)]
            return {properties.message_id: body for _, properties, body in found}

        found = await asyncio.to_thread(read)
        assert [found[message.id] for message in sent] == bodies


class TestDeadLetters:
    @pytest.mark.parametrize("count", [33, 250])
    async def test_a_replay_leaves_no_dead_letter_behind(
        self, connect: Connect, broker: Server, queue: str, count: int
    ) -> None:
        """The close of a quorum queue's channel drops more than 32 acks that the queue has not stored."""
        async with connect(prefetch=0) as source, open_channel(broker.url) as channel:
            for number in range(count):
                await publish_raw(channel, f"{queue}.dead", message_id=str(number))
            moved = [moved async for moved in source.replay_dead_letters()]
            assert moved == [*range(100, count, 100), count]
        await eventually_counts(broker, queue, Counts(ready=count, delayed=0, dead=0))
        async with connect(prefetch=1) as source:
            assert await ack_all(source, count) == [str(number) for number in range(count)]

    @pytest.mark.parametrize(
        "headers",
        [
            {ATTEMPTS: "many", DEAD_LETTERED_AT: "yesterday"},
            {ATTEMPTS: [], DEAD_LETTERED_AT: [1]},
            {REASON: {"a": 1}, DEAD_LETTERED_AT: -1.5},
            {"x-death": "often"},
            {"x-death": []},
            {"x-death": ["often"]},
            {"x-death": [{"reason": 7, "time": "yesterday"}]},
        ],
        ids=str,
    )
    async def test_letters_of_other_programs_are_listed(
        self, connect: Connect, broker: Server, queue: str, headers: dict[str, Any]
    ) -> None:
        async with connect(prefetch=0) as source, open_channel(broker.url) as channel:
            for id in ("id-1", "id-2"):
                properties = Basic.Properties(message_id=id, headers=headers)
                await publish_frames(channel, f"{queue}.dead", properties)
            await eventually(2, source.count_dead_letters)
            letters = [letter async for letter in source.dead_letters(10)]
            assert ids(letters) == ["id-1", "id-2"]
            assert {(letter.attempts, letter.dead_lettered_at) for letter in letters} == {(0, 0)}
            assert all(isinstance(letter.reason, str) for letter in letters)


class TestTopology:
    async def test_services_of_other_versions_find_their_queues_unchanged(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """Every service refuses queues with other arguments, until their messages are moved."""
        quorum = {"x-queue-type": "quorum"}
        reliably = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        to_dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{queue}.dead"}
        back = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}
        expected: dict[str, dict[str, Any]] = {
            queue: {**quorum, **reliably, **to_dead, "x-delivery-limit": 1000},
            f"{queue}.dead": {**quorum, "x-delivery-limit": 1_000_000},
            **{
                f"{queue}.retry.{ms}": {**quorum, **reliably, **back, "x-message-ttl": ms}
                for ms in (100, 200, 400)
            },
        }
        async with connect() as source, open_channel(broker.url) as channel:
            assert set(source._queues) == set(expected)
            for name, arguments in expected.items():
                await channel.declare_queue(name, durable=True, arguments=arguments)

    async def test_a_queue_of_ours_with_other_arguments_is_one_sentence(
        self, source_for: Callable[..., RabbitBroker], broker: Server, queue: str
    ) -> None:
        async with open_channel(broker.url) as channel:
            await channel.declare_queue(f"{queue}.dead", durable=True)
        async with source_for() as source:
            with pytest.raises(
                BrokerRefused, match=f"the queue '{queue}.dead' already exists with"
            ) as refused:
                await source.declare()
        assert "inequivalent arg" in str(refused.value)
        assert "\n" not in str(refused.value)

    @pytest.mark.very_slow
    async def test_a_user_without_the_right_to_declare_uses_existing_queues(
        self, connect: Connect, with_users: str, queue: str
    ) -> None:
        why = f"the queue '{queue}.dead' does not exist, and cannot be created: ACCESS_REFUSED - "
        with pytest.raises(BrokerDenied, match=f"{why}(configure )?access to queue '{queue}.dead'"):
            async with connect(broker_url=with_user(with_users, *READER)):
                pass
        async with connect(prefetch=0, broker_url=with_users) as owner:
            # Another user publishes, and the message names this user: RabbitMQ checks the name.
            async with open_channel(with_users) as channel:
                await publish_raw(channel, queue, message_id="id-1", user_id="guest")
            async with connect(prefetch=1, broker_url=with_user(with_users, *READER)) as source:
                (message,) = await take(source, 1)
                await source.retry(message, 0.1, "not now")
                (message,) = await take(source, 1)
                assert (message.id, message.attempt) == ("id-1", 2)
                await source.ack(message)
                await owner.describe()

    async def test_the_server_is_described_with_its_version(self, connect: Connect) -> None:
        async with connect(prefetch=0) as source:
            assert str((await source.describe())["server"]).startswith("RabbitMQ ")


class TestLooking:
    async def test_a_missing_topology_is_told_and_not_created(
        self, source_for: Callable[..., RabbitBroker], broker: Server, queue: str
    ) -> None:
        async with source_for() as source, open_channel(broker.url) as channel:
            described = await source.describe()
            assert {described[name] for name in source._needed} == {MISSING}
            assert await source.count_dead_letters() == 0
            assert [letter async for letter in source.dead_letters(10)] == []
            assert [moved async for moved in source.replay_dead_letters()] == []
            assert [deleted async for deleted in source.purge_dead_letters()] == []
            with pytest.raises(ChannelNotFoundEntity):
                await channel.declare_queue(f"{queue}.dead", passive=True)

    @pytest.mark.very_slow
    @pytest.mark.parametrize("command", RIGHTS)
    async def test_each_command_needs_just_the_rights_that_the_page_names(
        self,
        source_for: Callable[..., RabbitBroker],
        node: PrivateServer,
        command: str,
        queue: str,
    ) -> None:
        user = f"user-of-{queue}"
        control = control_of(node)
        control("add_user", user, "secret")
        rights = [right.replace("orders", queue) for right in RIGHTS[command]]
        lacking = [
            [*rights[:place], NO, *rights[place + 1 :]]
            for place, right in enumerate(rights)
            if right != NO
        ]
        for given in (rights, *lacking):
            if command != "declare":
                async with opened(source_for(broker_url=node.url)) as owner:
                    await publish(owner, 1)
                    async with open_channel(node.url) as channel:
                        await publish_raw(channel, f"{queue}.dead")
            control("set_permissions", user, *given)
            async with source_for(1, broker_url=with_user(node.url, user, "secret")) as source:
                if given is rights:
                    await use(source, command)
                else:
                    with pytest.raises(BrokerDenied, match="ACCESS_REFUSED - "):
                        await use(source, command)
            async with open_channel(node.url) as channel:
                for name in source._queues:
                    await channel.queue_delete(name)
        control("delete_user", user)


async def use(source: RabbitBroker, command: str) -> None:
    """Use the source like the command line."""
    if command == "check":
        await source.describe()
    elif command.startswith("publish"):
        await source.declare()
        await publish(source, 1)
    elif command.startswith("declare"):
        await source.declare()
    elif command == "dead-letters list":
        [letter async for letter in source.dead_letters(10)]
    elif command.startswith("dead-letters replay"):
        await source.declare()
        [moved async for moved in source.replay_dead_letters()]
    elif command == "dead-letters purge":
        [deleted async for deleted in source.purge_dead_letters()]
    else:
        await source.declare()
        await source.start()
        (message,) = await take(source, 1)
        await source.retry(message, 0.1, "not now")
        if source.put_offs.reason:
            raise BrokerDenied(source.put_offs.reason)
        (message,) = await take(source, 1)
        await source.reject(message, "bad")


@pytest.mark.very_slow
class TestRefusals:
    """On a private server, which rabbitmqctl can limit."""

    @pytest.mark.parametrize(
        ("limit", "unlimit", "reason"),
        [
            (
                ["set_vhost_limits", "-p", "other", '{"max-connections": 0}'],
                ["clear_vhost_limits", "-p", "other"],
                "connection limit",
            ),
            (
                ["set_user_limits", "guest", '{"max-connections": 0}'],
                ["clear_user_limits", "guest", "all"],
                "user connection limit",
            ),
            (
                ["eval", 'rabbit_vhost_sup_sup:stop_and_delete_vhost(<<"other">>).'],
                ["restart_vhost", "-p", "other"],
                "is down",
            ),
        ],
        ids=["limit of the virtual host", "limit of the user", "a virtual host that is down"],
    )
    async def test_a_connection_that_is_refused_for_now_may_be_tried_again(
        self,
        source_for: Callable[..., RabbitBroker],
        node: PrivateServer,
        limit: list[str],
        unlimit: list[str],
        reason: str,
    ) -> None:
        control = control_of(node)
        with suppress(CalledProcessError):  # it already exists
            control("add_vhost", "other")
        control("set_permissions", "-p", "other", "guest", ".*", ".*", ".*")
        source = source_for(broker_url=f"{node.url}other")
        control(*limit)
        try:
            with pytest.raises(BrokerUnavailable, match=reason) as unavailable:
                await source.__aenter__()
        finally:
            control(*unlimit)
        assert "\n" not in str(unavailable.value)
        assert "refused for now" in str(unavailable.value)
        async with source_for(broker_url=f"{node.url}other"):
            pass

    async def test_a_limit_of_queues_is_one_sentence(
        self, source_for: Callable[..., RabbitBroker], node: PrivateServer
    ) -> None:
        control = control_of(node)
        control("set_vhost_limits", "-p", "/", '{"max-queues": 1}')
        try:
            async with source_for(broker_url=node.url) as source:
                with pytest.raises(BrokerRefused, match=r"cannot be created: .*queue limit"):
                    await source.declare()
        finally:
            control("clear_vhost_limits", "-p", "/")

    @pytest.mark.parametrize("emptied", [True, False], ids=["emptied", "without the limit"])
    async def test_a_full_queue_of_dead_letters_puts_off_what_it_refuses(
        self,
        connect: Connect,
        node: PrivateServer,
        queue: str,
        events: list[Event],
        emptied: bool,
    ) -> None:
        control = control_of(node)
        full = '{"max-length": 5, "overflow": "reject-publish"}'
        async with connect(prefetch=10, broker_url=node.url) as source:
            await publish(source, 12)
            control("set_policy", "full", f"^{queue}.dead$", full)
            for message in await take(source, 10):
                await source.reject(message, "bad")
            assert "it is full" in source.put_offs.reason
            assert len(await ack_all(source, 2)) == 2  # others are still handled
            letters = await source.count_dead_letters()
            assert letters < 10
            if emptied:
                assert [n async for n in source.purge_dead_letters()] == [letters]
            else:
                letters = 0
            control("clear_policy", "full")
            await eventually_counts(node, queue, Counts(0, 0, 10 - letters))
            assert source.put_offs.reason == ""
        assert find(events, "reconnecting") == []

    async def test_a_replay_into_a_queue_that_gets_full_doubles_none(
        self, connect: Connect, node: PrivateServer, queue: str
    ) -> None:
        control = control_of(node)
        async with (
            connect(prefetch=0, broker_url=node.url) as source,
            open_channel(node.url) as channel,
        ):
            for number in range(300):
                await publish_raw(channel, f"{queue}.dead", message_id=str(number))
            limit = '{"max-length": 5, "overflow": "reject-publish"}'
            control("set_policy", "small", f"^{queue}$", limit)
            await publish(source, 5)
            steps = [0]

            async def replay() -> None:
                async for moved in source.replay_dead_letters():
                    steps.append(moved)

            with pytest.raises(BrokerRefused, match="it is full"):
                await replay()
            control("clear_policy", "small")
            await eventually_counts(node, queue, Counts(5 + steps[-1], 0, 300 - steps[-1]))

    async def test_a_missing_right_puts_off_with_the_reason_of_the_broker(
        self, connect: Connect, node: PrivateServer, queue: str, events: list[Event]
    ) -> None:
        control = control_of(node)
        async with connect(prefetch=0, broker_url=node.url) as publisher:
            await publish(publisher, 3)
        async with connect(prefetch=3, broker_url=node.url) as source:
            control("set_permissions", "guest", ".*", "^$", ".*")
            try:
                retried, rejected, other = await take(source, 3)
                await asyncio.gather(
                    source.retry(retried, 0.1, "not now"), source.reject(rejected, "bad")
                )
                assert "ACCESS_REFUSED" in source.put_offs.reason
                assert "amq.default" in source.put_offs.reason
            finally:
                control("set_permissions", "guest", ".*", ".*", ".*")
            (again,) = await take(source, 1)
            assert (again, again.attempt) == (retried, 2)
            await source.ack(again)
            await source.ack(other)
            await eventually_counts(node, queue, Counts(0, 0, 1))
        assert find(events, "reconnecting") == []

    async def test_a_body_above_a_new_limit_of_the_broker_becomes_a_shortened_dead_letter(
        self, connect: Connect, node: PrivateServer, queue: str, events: list[Event]
    ) -> None:
        """Like after an update to RabbitMQ 4, whose limit is 16 MiB in place of 128."""
        control = control_of(node)
        async with connect(prefetch=0, broker_url=node.url) as source:
            await source.publish([OutgoingMessage(b"x" * 4_000_000, id="large")])
            await publish(source, 9)
        control("eval", "application:set_env(rabbit, max_message_size, 2000000).")
        try:
            async with connect(prefetch=10, broker_url=node.url) as source:
                messages = await take(source, 10)
                await asyncio.gather(*(source.reject(message, "bad") for message in messages))
                assert "4000000" in source.put_offs.reason
                await eventually_counts(node, queue, Counts(0, 0, 10))
                letters = {letter.id: letter async for letter in source.dead_letters(10)}
                assert len(letters) == 10
                assert letters["large"].body == b"x" * 2_000_000
                with pytest.raises(BrokerRefused, match="the broker takes 2000000"):
                    await source.publish([OutgoingMessage(b"x" * 2_000_001)])
        finally:
            control("eval", "application:set_env(rabbit, max_message_size, 134217728).")
        assert find(events, "reconnecting") == []

    @pytest.mark.parametrize("id", ["id-1", None], ids=["with an id", "without an id"])
    async def test_a_message_that_waits_too_long_for_its_ack_is_not_handled_twice_at_once(
        self,
        settings_for: Callable[..., ConsumerSettings],
        node: PrivateServer,
        events: list[Event],
        id: str | None,
    ) -> None:
        control = control_of(node)

        def time_out_after(milliseconds: int, look_every: int) -> None:
            for name, value in (
                ("consumer_timeout", milliseconds),
                ("channel_tick_interval", look_every),
            ):
                control("eval", f"application:set_env(rabbit, {name}, {value}).")

        started: list[Message] = []
        redelivered = asyncio.Event()

        async def order(body: bytes, message: Message) -> None:
            started.append(message)
            await redelivered.wait()

        settings = settings_for(**SETTINGS, broker_url=node.url)
        event = CancellationEvent(asyncio.get_running_loop())
        source = RabbitBroker(settings, 5)
        consumer = Consumer(source, Router({"order": order}), event, settings)

        async def is_redelivered() -> bool:
            return len(started) > 1 or (
                source._deliveries is not earlier and source._is_held(started[0])
            )

        async def handled() -> int:
            return consumer.handled_count

        async with opened(make_source(settings)), open_channel(node.url) as channel:
            await publish_frames(channel, settings.source, Basic.Properties(message_id=id))
        await asyncio.to_thread(time_out_after, 1000, 200)
        running = asyncio.create_task(consumer.run())
        try:
            await eventually_logged(events, "reconnecting", count=2)
            await asyncio.to_thread(time_out_after, 1_800_000, 60_000)
            earlier = source._deliveries  # its channel may still have the short timeout
            await asyncio.to_thread(control, "close_all_connections", "the timeout has changed")
            await eventually(True, is_redelivered)
            redelivered.set()
            await eventually(len(started), handled)
        finally:
            await asyncio.to_thread(time_out_after, 1_800_000, 60_000)
            redelivered.set()
            event.set("test")
            assert await running == 0
        assert len(started) == 1
        assert find(events, "settlement_lost") == []
        await eventually_counts(node, settings.source, Counts(0, 0, 0))


class TestCredentials:
    async def test_a_url_without_a_login_has_the_one_of_a_new_server_as_in_compose(
        self, connect: Connect, broker: Server
    ) -> None:
        assert "//guest:guest@" in broker.url
        async with connect(broker_url=broker.url.replace("guest:guest@", "")) as source:
            assert await publish(source, 1) == await ack_all(source, 1)

    @pytest.mark.very_slow
    async def test_user_password_and_virtual_host_may_have_any_character(
        self, connect: Connect, with_users: str, queue: str
    ) -> None:
        vhost = quote(ODD_VHOST, safe="")
        url = urlsplit(with_user(with_users, *ODD_USER))._replace(path=f"/{vhost}").geturl()
        async with connect(prefetch=1, broker_url=url) as source:
            published = await publish(source, 1)
            assert await ack_all(source, 1) == published
        async with open_channel(url) as channel:
            for name in source._queues:
                await channel.queue_delete(name)

    async def test_the_name_of_a_queue_is_any_text(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        name = f"{queue}-commandes créées|注文"
        async with connect(prefetch=1, source=name) as source, open_channel(broker.url) as channel:
            published = await publish(source, 1)
            assert (await source.describe())[name] in (0, 1)
            assert await ack_all(source, 1) == published
            for each in source._queues:
                await channel.queue_delete(each)

    async def test_the_name_of_a_queue_that_is_too_long_is_one_sentence(
        self, source_for: Callable[..., RabbitBroker], broker: Server
    ) -> None:
        source_for(source="é" * 122)  # 244 bytes, and 10 for the suffix of a retry queue
        with pytest.raises(BrokerRefused, match=r"^CONSUMER_SOURCE: .* 255 bytes"):
            source_for(source="é" * 123)

    async def test_a_virtual_host_that_does_not_exist_is_one_sentence(
        self, source_for: Callable[..., RabbitBroker], broker: Server
    ) -> None:
        url = urlsplit(broker.url)._replace(path="/no-such-vhost").geturl()
        with pytest.raises(
            BrokerRefused, match=r"no such virtual host: NOT_ALLOWED - vhost .* not found"
        ) as refused:
            await source_for(broker_url=url).__aenter__()
        assert "guest:" not in str(refused.value)


async def handle(
    settings: ConsumerSettings, count: int, functions: dict[str, HandlerFunction]
) -> None:
    """Run these handlers until this many messages are handled or rejected; then shut down."""
    event = CancellationEvent(asyncio.get_running_loop())
    consumer = Consumer(make_source(settings, 5), Router(functions), event, settings)
    running = asyncio.create_task(consumer.run())

    async def settled_count() -> int:
        return consumer.handled_count + consumer.rejected_count

    await eventually(count, settled_count)
    event.set("test")
    assert await running == 0


async def publish_frames(
    channel: AbstractChannel,
    routing_key: str,
    properties: Basic.Properties,
    replace: tuple[bytes, bytes] = (b"", b""),
    exchange: str = "",
) -> None:
    """Publish messages that other clients can send and aio-pika cannot; aio-pika also gives each message an id.

    aio-pika does not count these: nothing else can be published on this channel.
    """
    underlay: Any = await channel.get_underlay_channel()
    frames: list[Any] = [
        Basic.Publish(exchange=exchange, routing_key=routing_key),
        ContentHeader(body_size=4, properties=properties),
        ContentBody(b"body"),
    ]
    payload = ChannelFrame.marshall(underlay.number, frames).payload
    if replace[0]:
        payload = payload.replace(*replace)
    await underlay.write_queue.put(ChannelFrame(payload=payload, should_close=False))
    await underlay.basic_qos(prefetch_count=1)  # answered when the message has been seen
