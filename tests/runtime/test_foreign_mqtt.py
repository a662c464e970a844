"""Messages of other programs on MQTT: paho's, of version 5 and 3.1.1, and CloudEvents."""

import asyncio
import gzip
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from paho.mqtt.client import Client, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from pydantic import BaseModel

from consumer_harness import consume
from harness.contract import opened, take
from harness.servers import Counts, Server
from runtime.brokers import make_source
from runtime.consumer import Consumer
from runtime.message import Message
from runtime.settings import ConsumerSettings
from steps import start_once

pytestmark = pytest.mark.parametrize("broker", ["mqtt"], indirect=True, scope="session")

QUICK: dict[str, Any] = {"retry_seconds": 0.1, "retry_max_seconds": 0.2}


class Order(BaseModel):
    number: int


async def publish(
    broker: Server, topic: str, body: bytes, version: Any = MQTTv5, **properties: Any
) -> None:
    """Publish like another program."""

    def publish() -> None:
        client = Client(CallbackAPIVersion.VERSION2, protocol=version)
        connected = threading.Event()
        client.on_connect = lambda *_: connected.set()
        client.connect("127.0.0.1", urlsplit(broker.url).port or 0)
        client.loop_start()
        assert connected.wait(10)
        described: Any = None
        if properties:
            described = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            for name, value in properties.items():
                setattr(described, name, value)
        client.publish(topic, body, 1, properties=described).wait_for_publish(10)
        client.disconnect()
        client.loop_stop()

    await asyncio.to_thread(publish)


async def started(settings: ConsumerSettings) -> ConsumerSettings:
    await start_once(settings)
    return settings


def done(count: int) -> Callable[[Consumer], bool]:
    return lambda consumer: consumer.handled_count + consumer.rejected_count >= count


async def handled(settings: ConsumerSettings, *types: str) -> list[tuple[int, Message]]:
    """The messages that the handlers of these types got: as many as there are types."""
    taken: list[tuple[int, Message]] = []

    async def handle(order: Order, message: Message) -> None:
        taken.append((order.number, message))

    handlers = {**dict.fromkeys(types, handle), "other": handle}
    await consume(make_source(settings), settings, done(len(types)), handlers)
    return taken


@pytest.mark.parametrize("version", [MQTTv5, MQTTv311])
async def test_a_message_without_properties_is_read_by_its_topic(
    settings_for: Callable[..., ConsumerSettings], broker: Server, queue: str, version: Any
) -> None:
    settings = await started(settings_for(type_from="topic"))
    await publish(broker, queue, b'{"number": 7}', version)
    [(number, message)] = await handled(settings, queue)
    assert (number, message.type, message.origin["topic"]) == (7, queue, queue)
    assert (message.headers, message.key, message.published_at) == ({}, "", None)
    assert len(message.id) == 32


async def test_the_properties_of_the_protocol_are_those_of_the_message(
    settings_for: Callable[..., ConsumerSettings], broker: Server, queue: str
) -> None:
    settings = await started(settings_for(type_from="header:event"))
    await publish(
        broker,
        queue,
        b'{"number": 7}',
        ContentType="application/json",
        CorrelationData=b"c-1",
        ResponseTopic="answers/7",
        UserProperty=[("event", "OrderCreated"), ("message-key", "k-1"), ("reply-to", "ignored")],
    )
    [(_, message)] = await handled(settings, "OrderCreated")
    assert (message.content_type, message.correlation_id) == ("application/json", "c-1")
    assert (message.reply_to, message.key) == ("answers/7", "k-1")
    assert message.headers["event"] == "OrderCreated"


async def test_a_cloud_event_needs_no_setting(
    settings_for: Callable[..., ConsumerSettings], broker: Server, queue: str
) -> None:
    """The binding for MQTT, binary and structured."""
    settings = await started(settings_for())
    type = "com.acme.order.created.v1"
    attributes = {"specversion": "1.0", "id": "e-1", "source": "/shop", "type": type}
    await publish(
        broker,
        queue,
        b'{"number": 1}',
        ContentType="application/json",
        UserProperty=[*attributes.items()],
    )
    event = b'{"specversion":"1.0","id":"e-2","source":"/shop","type":"%s","data":{"number":2}}'
    await publish(
        broker,
        queue,
        event % type.encode(),
        ContentType="application/cloudevents+json; charset=utf-8",
    )
    taken = await handled(settings, "com.acme.order.*", "com.acme.other")
    assert sorted((number, message.id, message.type) for number, message in taken) == [
        (1, "e-1", type),
        (2, "e-2", type),
    ]


async def test_an_id_and_a_type_of_a_message_that_is_no_cloud_event_are_headers_only(
    settings_for: Callable[..., ConsumerSettings], broker: Server, queue: str
) -> None:
    settings = await started(settings_for())
    await publish(broker, queue, b"x", UserProperty=[("id", "7"), ("type", "sensor")])
    async with opened(make_source(settings)) as source:
        await source.start()
        [message] = await take(source, 1)
        assert (message.type, message.headers) == ("", {"id": "7", "type": "sensor"})
        assert message.id != "7"
        await source.ack(message)


async def test_a_gzipped_body_is_unpacked_for_the_handler_or_a_dead_letter(
    settings_for: Callable[..., ConsumerSettings], broker: Server, queue: str
) -> None:
    settings = await started(settings_for(type_from="header:kind"))
    packed = [("content-encoding", "gzip"), ("kind", "order")]
    bad = gzip.compress(b"not JSON")
    for body in (gzip.compress(b'{"number": 7}'), bad):
        await publish(broker, queue, body, UserProperty=packed)
    assert [number for number, _ in await handled(settings, "order", "more")] == [7]
    counts = await asyncio.to_thread(broker.counts, queue)
    assert counts == Counts(ready=0, delayed=0, dead=1)


async def test_where_a_message_came_from_is_known_after_a_retry(
    settings_for: Callable[..., ConsumerSettings], broker: Server, queue: str
) -> None:
    """Also for a filter with wildcards."""
    settings = settings_for(source=f"{queue}/+/status", group=queue, type_from="topic", **QUICK)
    await started(settings)
    topic = f"{queue}/device-7/status"
    await publish(broker, topic, b"x")
    async with opened(make_source(settings)) as source:
        await source.start()
        [message] = await take(source, 1)
        await source.retry(message, 0.1, "not now")
        [message] = await take(source, 1)
        assert message.attempt == 2
        assert (message.origin["topic"], message.type) == (topic, topic)
        assert message.receipt.incoming.topic == f"consumer/retry/{queue}"
        await source.ack(message)
