"""Messages of other programs on NATS: the core publish of nats-py, JetStream's, and CloudEvents."""

import gzip
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from pydantic import BaseModel

from consumer_harness import consume
from harness.contract import opened, take
from harness.servers import Server
from runtime.brokers import make_source
from runtime.consumer import Consumer
from runtime.message import Message
from runtime.settings import ConsumerSettings

pytestmark = pytest.mark.parametrize("broker", ["nats"], indirect=True, scope="session")


class Order(BaseModel):
    number: int


@pytest.fixture
async def producer(broker: Server, queue: str) -> AsyncIterator[Client]:
    """A client of another program, for the subjects of a stream that operations created."""
    async with await nats.connect(broker.url) as client:
        await client.jetstream().add_stream(name=queue, subjects=[f"{queue}.>"])
        yield client


def done(count: int) -> Callable[[Consumer], bool]:
    return lambda consumer: consumer.handled_count + consumer.rejected_count >= count


async def handled(settings: ConsumerSettings, *types: str) -> list[tuple[Any, Message]]:
    """The messages that the handlers of these types got: as many as there are types."""
    taken: list[tuple[Any, Message]] = []

    async def handle(order: Order, message: Message) -> None:
        taken.append((order.number, message))

    handlers = {**dict.fromkeys(types, handle), "other": handle}
    await consume(make_source(settings), settings, done(len(types)), handlers)
    return taken


async def test_a_core_publish_without_headers_is_read_by_its_subject(
    settings_for: Callable[..., ConsumerSettings], producer: Client, queue: str
) -> None:
    await producer.publish(f"{queue}.eu.order_created", b'{"number": 7}')
    await producer.flush()
    settings = settings_for(type_from="subject")
    [(number, message)] = await handled(settings, f"{queue}.*.order_created")
    assert (number, message.type) == (7, f"{queue}.eu.order_created")
    assert message.origin == {"subject": f"{queue}.eu.order_created", "source": queue}
    assert (message.headers, message.key, message.correlation_id) == ({}, "", "")
    assert message.id.startswith("1-")
    assert message.published_at is not None
    assert timedelta() <= datetime.now(UTC) - message.published_at < timedelta(minutes=1)


async def test_without_a_setting_a_subject_is_no_type(
    settings_for: Callable[..., ConsumerSettings], producer: Client, queue: str
) -> None:
    await producer.publish(f"{queue}.order_created", b"x")
    await producer.flush()
    settings = settings_for()
    async with opened(make_source(settings)) as source:
        await source.start()
        [message] = await take(source, 1)
        assert message.type == ""
        await source.ack(message)


async def test_headers_are_read_with_the_properties_among_them(
    settings_for: Callable[..., ConsumerSettings], producer: Client, queue: str
) -> None:
    headers = {
        "Nats-Msg-Id": "id-7",
        "event": "OrderCreated",
        "Content-Type": "application/json",
        "correlation-id": "c-1",
        "message-key": "k-1",
        "tenant": "acme",
    }
    await producer.jetstream().publish(f"{queue}.a", b'{"number": 7}', headers=headers)
    [(_, message)] = await handled(settings_for(type_from="header:event"), "OrderCreated")
    assert (message.id, message.type) == ("id-7", "OrderCreated")
    assert (message.content_type, message.correlation_id) == ("application/json", "c-1")
    assert (message.key, message.headers["tenant"]) == ("k-1", "acme")


async def test_a_cloud_event_needs_no_setting(
    settings_for: Callable[..., ConsumerSettings], producer: Client, queue: str
) -> None:
    """The binding for NATS, binary and structured."""
    type = "com.acme.order.created.v1"
    binary = {
        "ce-specversion": "1.0",
        "ce-id": "e-1",
        "ce-source": "/shop",
        "ce-type": type,
        "content-type": "application/json",
    }
    structured = {"content-type": "application/cloudevents+json; charset=UTF-8"}
    event = b'{"specversion":"1.0","id":"e-2","source":"/shop","type":"%s","data":{"number":2}}'
    await producer.publish(f"{queue}.a", b'{"number": 1}', headers=binary)
    await producer.publish(f"{queue}.a", event % type.encode(), headers=structured)
    await producer.flush()
    taken = await handled(settings_for(), "com.acme.order.*", "com.acme.other")
    assert sorted((number, message.id, message.type) for number, message in taken) == [
        (1, "e-1", type),
        (2, "e-2", type),
    ]


async def test_a_gzipped_body_is_unpacked_for_the_handler_and_stays_packed_in_a_dead_letter(
    settings_for: Callable[..., ConsumerSettings], producer: Client, queue: str
) -> None:
    headers = {"content-encoding": "gzip", "ce-type": "order"}
    bad = gzip.compress(b"not JSON")
    for body in (gzip.compress(b'{"number": 7}'), bad):
        await producer.publish(f"{queue}.a", body, headers=headers)
    await producer.flush()
    settings = settings_for()
    assert [number for number, _ in await handled(settings, "order", "more")] == [7]
    async with opened(make_source(settings)) as source:
        [letter] = [letter async for letter in source.dead_letters(2)]
        assert letter.body == bad


async def test_where_a_message_came_from_is_known_after_a_retry_a_dead_letter_and_a_replay(
    settings_for: Callable[..., ConsumerSettings], producer: Client, queue: str
) -> None:
    subject = f"{queue}.eu.created"
    await producer.publish(subject, b"x")
    await producer.flush()
    first = {"subject": subject, "source": queue}
    async with opened(make_source(settings_for(type_from="subject"))) as source:
        await source.start()
        [message] = await take(source, 1)
        await source.retry(message, 0.1, "not now")
        [message] = await take(source, 1)
        assert (message.attempt, message.origin, message.type) == (2, first, subject)
        await source.reject(message, "bad")
        [letter] = [letter async for letter in source.dead_letters(2)]
        assert (letter.type, letter.origin["subject"]) == (subject, subject)
        assert [moved async for moved in source.replay_dead_letters()] == [1]
        [message] = await take(source, 1)
        assert (message.attempt, message.origin, message.type) == (1, first, subject)
        await source.ack(message)
