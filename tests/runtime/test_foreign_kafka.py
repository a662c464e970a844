"""Records of other programs on Kafka: librdkafka's producer, CloudEvents by its SDK, and the format of Debezium."""

import asyncio
import gzip
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import BaseModel

pytest.importorskip("cloudevents")
pytest.importorskip("confluent_kafka")

from cloudevents.core.bindings import kafka as binding
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka import Producer

from consumer_harness import consume
from harness.contract import opened, take
from harness.servers import Server
from runtime.brokers import make_source
from runtime.consumer import Consumer
from runtime.message import Message
from runtime.settings import ConsumerSettings

pytestmark = pytest.mark.parametrize("broker", ["kafka"], indirect=True, scope="session")

QUICK: dict[str, Any] = {"retry_seconds": 0.1, "retry_max_seconds": 0.2}

Produce = Callable[..., None]


class Order(BaseModel):
    number: int


class Row(BaseModel):
    id: int
    email: str


class Change(BaseModel):
    """The parts of a Debezium record that a handler needs."""

    before: Row | None
    after: Row | None
    op: str


@pytest.fixture
def produce(broker: Server, queue: str) -> Iterator[Produce]:
    producer = Producer({"bootstrap.servers": urlsplit(broker.url).netloc, "log_level": 0})

    def produce(value: bytes | None, key: bytes | None = None, **record: Any) -> None:
        producer.produce(queue, value, key, **record)
        assert producer.flush(10) == 0

    yield produce
    producer.flush(1)


async def declared(settings: ConsumerSettings) -> ConsumerSettings:
    async with opened(make_source(settings)):
        return settings


def done(count: int) -> Callable[[Consumer], bool]:
    return lambda consumer: consumer.handled_count + consumer.rejected_count >= count


async def test_a_record_is_read_with_its_key_its_headers_and_its_place(
    settings_for: Callable[..., ConsumerSettings], produce: Produce, queue: str
) -> None:
    settings = await declared(settings_for(type_from="topic"))
    headers = [
        ("content-type", b"application/json"),
        ("correlation-id", b"c-1"),
        ("tenant", b"acme"),
        ("none", None),
    ]
    await asyncio.to_thread(produce, b'{"number": 7}', b"key-7", headers=headers, partition=2)
    taken: list[tuple[Order, Message]] = []

    async def handle(order: Order, message: Message) -> None:
        taken.append((order, message))

    await consume(make_source(settings), settings, done(1), {queue: handle, "other": handle})
    [(order, message)] = taken
    assert (order.number, message.type, message.key) == (7, queue, "key-7")
    assert (message.content_type, message.correlation_id) == ("application/json", "c-1")
    assert (message.headers["tenant"], message.headers["none"]) == ("acme", None)
    assert message.origin == {"topic": queue, "partition": 2, "offset": 0, "source": queue}
    assert message.published_at is not None
    assert timedelta() <= datetime.now(UTC) - message.published_at < timedelta(minutes=1)


@pytest.mark.parametrize("mode", [binding.to_binary, binding.to_structured])
async def test_a_cloud_event_needs_no_setting(
    settings_for: Callable[..., ConsumerSettings], produce: Produce, mode: Callable[..., Any]
) -> None:
    settings = await declared(settings_for())
    attributes = {"id": "e-1", "source": "/shop", "type": "com.acme.order.created.v1"}
    attributes |= {"datacontenttype": "application/json", "partitionkey": "e-1"}
    record = mode(CloudEvent(attributes, {"number": 7}), JSONFormat())
    headers = [*record.headers.items()]
    await asyncio.to_thread(produce, record.value, record.key.encode(), headers=headers)
    taken: list[tuple[Order, Message]] = []

    async def handle(order: Order, message: Message) -> None:
        taken.append((order, message))

    handlers = {"com.acme.order.*": handle, "other": handle}
    await consume(make_source(settings), settings, done(1), handlers)
    [(order, message)] = taken
    assert (order.number, message.id, message.key) == (7, "e-1", "e-1")
    assert message.type == "com.acme.order.created.v1"


def debezium(op: str, before: Any, after: Any) -> bytes:
    source = {"connector": "postgresql", "db": "inventory", "table": "customers", "lsn": 24_023_128}
    change = {"before": before, "after": after, "source": source, "op": op, "ts_ms": 1_559_033_904}
    return json.dumps(change).encode()


async def test_changes_of_debezium_and_their_tombstones_are_handled_by_the_name_of_the_topic(
    settings_for: Callable[..., ConsumerSettings], produce: Produce, queue: str
) -> None:
    settings = await declared(settings_for(type_from="topic", **QUICK))
    key, row = b'{"id": 1004}', {"id": 1004, "email": "annek@noanswer.org"}
    headers = [("content-type", b"application/json"), ("__debezium.context.task", b"0")]
    for value in (debezium("c", None, row), debezium("d", row, None), None):
        await asyncio.to_thread(produce, value, key, headers=headers)
    taken: list[tuple[str, str, int]] = []

    async def handle(change: Change | None, message: Message) -> None:
        if message.attempt == 1:
            raise RuntimeError("not now")
        taken.append((change.op if change else "tombstone", message.key, message.attempt))

    consumer = await consume(
        make_source(settings), settings, done(3), {queue: handle, "other": handle}
    )
    assert (consumer.handled_count, consumer.rejected_count) == (3, 0)
    assert sorted(taken) == [(op, key.decode(), 2) for op in ("c", "d", "tombstone")]


async def test_a_tombstone_is_a_dead_letter_where_the_handler_takes_none(
    settings_for: Callable[..., ConsumerSettings], produce: Produce, queue: str
) -> None:
    settings = await declared(settings_for(max_attempts=1))
    await asyncio.to_thread(produce, None, b"key")

    async def handle(order: Order) -> None:
        pass

    consumer = await consume(make_source(settings), settings, done(1), {"any": handle})
    assert consumer.rejected_count == 1
    async with opened(make_source(settings)) as source:
        [letter] = [letter async for letter in source.dead_letters(2)]
        assert (letter.body, "invalid payload" in letter.reason) == (b"", True)


async def test_the_event_router_of_debezium_needs_one_setting(
    settings_for: Callable[..., ConsumerSettings], produce: Produce
) -> None:
    """The option is ``table.fields.additional.placement=type:header:eventType``."""
    settings = await declared(settings_for(type_from="header:eventType"))
    headers = [("id", b"f2e1"), ("eventType", b"OrderCreated")]
    await asyncio.to_thread(produce, b'{"number": 1}', b"1", headers=headers)
    taken: list[Message] = []

    async def handle(order: Order, message: Message) -> None:
        taken.append(message)

    await consume(
        make_source(settings), settings, done(1), {"OrderCreated": handle, "other": handle}
    )
    assert [(m.type, m.headers["id"]) for m in taken] == [("OrderCreated", "f2e1")]


async def test_a_gzipped_body_is_unpacked_for_the_handler_and_stays_packed_in_a_dead_letter(
    settings_for: Callable[..., ConsumerSettings], produce: Produce
) -> None:
    settings = await declared(settings_for())
    headers = [("content-encoding", b"gzip"), ("ce_type", b"order")]
    good, bad = gzip.compress(b'{"number": 7}'), gzip.compress(b"not JSON")
    for body in (good, bad):
        await asyncio.to_thread(produce, body, headers=headers)
    taken: list[int] = []

    async def handle(order: Order) -> None:
        taken.append(order.number)

    consumer = await consume(make_source(settings), settings, done(2), {"order": handle})
    assert (taken, consumer.rejected_count) == ([7], 1)
    async with opened(make_source(settings)) as source:
        [letter] = [letter async for letter in source.dead_letters(2)]
        assert letter.body == bad


async def test_where_a_record_came_from_is_known_after_a_retry_a_dead_letter_and_a_replay(
    settings_for: Callable[..., ConsumerSettings], produce: Produce, queue: str
) -> None:
    settings = settings_for(type_from="topic", **QUICK)
    first = {"topic": queue, "partition": 1, "offset": 0, "source": queue}
    async with opened(make_source(settings)) as source:
        await source.start()
        await asyncio.to_thread(produce, b"x", b"key", partition=1)
        [message] = await take(source, 1)
        assert message.origin == first
        await source.retry(message, 0.1, "not now")
        [message] = await take(source, 1)
        assert (message.attempt, message.origin, message.type) == (2, first, queue)
        await source.reject(message, "bad")
        [letter] = [letter async for letter in source.dead_letters(2)]
        assert (letter.type, letter.origin["topic"]) == (queue, queue)
        assert [moved async for moved in source.replay_dead_letters()] == [1]
        [message] = await take(source, 1)
        assert (message.attempt, message.origin, message.type) == (1, first, queue)
        assert (message.key, message.receipt[0].topic_partition.topic) == (
            "key",
            f"{queue}.{queue}.retry",
        )
        await source.ack(message)
