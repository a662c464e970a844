"""Properties of foreign producers stay unchanged through a retry, a dead letter and a replay: on RabbitMQ's wire."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import pytest
from aiormq.abc import ChannelFrame
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from harness.contract import opened, take
from harness.servers import Counts, Server
from runtime.brokers.rabbitmq import RabbitBroker
from runtime.message import Message, OutgoingMessage
from steps import eventually_counts, publish

pytestmark = pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True, scope="session")

SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": 0.4}

Encoded = dict[str, bytes]
"""The bytes of each value, by the name of a property or a header."""


# -- bytes that any producer can write


def long(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def short(text: str) -> bytes:
    value = text.encode()
    return bytes([len(value)]) + value


def table(fields: Encoded) -> bytes:
    return long(b"".join(short(name) + value for name, value in fields.items()))


def of_type(kind: bytes, values: "st.SearchStrategy[bytes]") -> "st.SearchStrategy[bytes]":
    return values.map(lambda value: kind + value)


def sized(size: int) -> "st.SearchStrategy[bytes]":
    return st.binary(min_size=size, max_size=size)


FINITE: Any = {"allow_nan": False, "allow_infinity": False}  # which Erlang cannot represent
SHORT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
NAMES = SHORT.map(lambda name: f"h-{name}")
SCALARS = st.one_of(
    of_type(b"t", st.sampled_from([b"\0", b"\1"])),
    *(of_type(kind, sized(1)) for kind in (b"b", b"B")),
    *(of_type(kind, sized(2)) for kind in (b"s", b"u")),
    *(of_type(kind, sized(4)) for kind in (b"I", b"i")),
    *(of_type(kind, sized(8)) for kind in (b"l", b"T")),
    of_type(b"D", sized(5)),
    of_type(b"f", st.floats(width=32, **FINITE).map(struct.Struct(">f").pack)),
    of_type(b"d", st.floats(**FINITE).map(struct.Struct(">d").pack)),
    of_type(b"d", st.sampled_from([1e300, 0.1, 1764394266.731]).map(struct.Struct(">d").pack)),
    *(of_type(kind, st.binary(max_size=20).map(long)) for kind in (b"S", b"x")),
    st.just(b"V"),
)
VALUES = st.recursive(
    SCALARS,
    lambda values: (
        of_type(b"A", st.lists(values, max_size=3).map(lambda items: long(b"".join(items))))
        | of_type(b"F", st.dictionaries(SHORT, values, max_size=3).map(table))
    ),
    max_leaves=5,
)
PROPERTIES: dict[str, "st.SearchStrategy[bytes]"] = {
    "content_type": SHORT.map(short),
    "content_encoding": SHORT.map(short),
    "headers": st.dictionaries(NAMES, VALUES, max_size=6).map(table),
    "delivery_mode": st.sampled_from([b"\1", b"\2"]),
    "priority": sized(1),
    "correlation_id": SHORT.map(short),
    "reply_to": SHORT.map(short),
    "expiration": st.just(short("1000000000")),
    "message_id": SHORT.map(short),
    "timestamp": sized(8),
    "message_type": SHORT.map(short),
    "user_id": st.just(short("guest")),  # the broker refuses any other name
    "app_id": SHORT.map(short),
    "cluster_id": SHORT.map(short),
}
"""The properties in the order on the wire."""
FLAGS = {name: 1 << 15 - place for place, name in enumerate(PROPERTIES)}
CHANGED = {"headers", "delivery_mode", "expiration", "message_id", "user_id"}
"""The headers get those of the runtime; a copy is persistent, has no expiration, and has an id."""
SIZES = {b"V": 0, b"D": 5} | {bytes([kind]): 1 for kind in b"tbB"}
SIZES |= {b"s": 2, b"u": 2, b"I": 4, b"i": 4, b"f": 4, b"d": 8, b"l": 8, b"T": 8}


class Raw(Basic.Properties):
    """Properties with these bytes."""

    def __init__(self, encoded: Encoded) -> None:
        super().__init__()
        self.encoded = encoded

    def marshal(self) -> bytes:
        flags = sum(FLAGS[name] for name in self.encoded)
        values = [self.encoded[name] for name in PROPERTIES if name in self.encoded]
        return struct.pack(">H", flags) + b"".join(values)


def parse(flags: int, data: bytes) -> Encoded:
    encoded = {}
    for name in PROPERTIES:
        if flags & FLAGS[name]:
            size = {"headers": 4, "delivery_mode": 0, "priority": 0, "timestamp": 0}.get(name, 1)
            fixed = {"delivery_mode": 1, "priority": 1, "timestamp": 8}.get(name, size)
            end = fixed + int.from_bytes(data[:size])
            encoded[name], data = data[:end], data[end:]
    assert data == b""
    return encoded


def parse_table(data: bytes) -> Encoded:
    encoded, data = {}, data[4:]
    while data:
        name, data = data[1 : 1 + data[0]].decode(), data[1 + data[0] :]
        end = 1 + SIZES.get(data[:1], 4 + int.from_bytes(data[1:5]))
        assert name not in encoded
        encoded[name], data = data[:end], data[end:]
    return encoded


@pytest.fixture(autouse=True)
def keep_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each received `Basic.Properties` has the bytes on the wire, as ``seen``."""
    unmarshal = Basic.Properties.unmarshal

    def unmarshal_and_keep(self: Any, flags: int, data: bytes) -> None:
        self.seen = parse(flags, data)
        unmarshal(self, flags, data)

    monkeypatch.setattr(Basic.Properties, "unmarshal", unmarshal_and_keep)


def seen(message: Message) -> Encoded:
    encoded: Encoded = message.receipt.properties.seen
    return encoded


@asynccontextmanager
async def raw_publisher(url: str, queue: str) -> AsyncIterator[Callable[[int, Encoded], Any]]:
    """Publishes a message with this number as its body, and with these properties."""
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        underlay: Any = await channel.get_underlay_channel()

        async def send(number: int, encoded: Encoded) -> None:
            body = b"%d" % number
            frames: list[Any] = [
                Basic.Publish(routing_key=queue),
                ContentHeader(body_size=len(body), properties=Raw(encoded)),
                ContentBody(body),
            ]
            payload = ChannelFrame.marshall(underlay.number, frames).payload
            await underlay.write_queue.put(ChannelFrame(payload=payload, should_close=False))

        yield send
        await underlay.basic_qos(prefetch_count=1)  # answered when all have been seen


async def travel(
    source: RabbitBroker, broker: Server, published: list[Encoded]
) -> list[list[Message]]:
    """Each message in the order of publishing: at first, after a retry, and after a dead letter and a replay."""
    queue, count = source.settings.source, len(published)
    async with raw_publisher(broker.url, queue) as send:
        for number, encoded in enumerate(published):
            await send(number, encoded)

    async def taken() -> list[Message]:
        return sorted(await take(source, count), key=lambda message: int(message.body))

    first = await taken()
    await asyncio.gather(*(source.retry(message, 0.1, "not now") for message in first))
    second = await taken()
    await asyncio.gather(*(source.reject(message, "bad") for message in second))
    await eventually_counts(broker, queue, Counts(0, 0, count))
    assert [moved async for moved in source.replay_dead_letters()][-1] == count
    third = await taken()
    for message in third:
        await source.ack(message)
    return [first, second, third]


@settings(
    max_examples=5,
    phases=[Phase.generate],  # each example takes seconds: too long to shrink one
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(published=st.lists(st.fixed_dictionaries({}, optional=PROPERTIES), min_size=20, max_size=40))
def test_all_properties_survive_a_retry_a_dead_letter_and_a_replay(
    source_for: Callable[..., RabbitBroker], broker: Server, published: list[Encoded]
) -> None:
    async def run() -> list[list[Message]]:
        async with opened(source_for(50)) as source:
            await source.start()
            return await travel(source, broker, published)

    first, second, third = asyncio.run(run())
    for sent, *travelled in zip(published, first, second, third, strict=True):
        headers = parse_table(sent.get("headers", table({})))
        for message in travelled:
            came = seen(message)
            for name in PROPERTIES.keys() - CHANGED:
                assert came.get(name) == sent.get(name), name
            assert came.get("message_id") == sent.get("message_id", came.get("message_id"))
            came_headers = parse_table(came.get("headers", table({})))
            assert {name: came_headers.get(name) for name in headers} == headers
        _, retried, replayed = map(seen, travelled)
        assert parse_table(replayed["headers"]) == headers  # and no other
        assert retried["delivery_mode"] == replayed["delivery_mode"] == b"\2"
        assert not {"expiration", "user_id"} & (retried.keys() | replayed.keys())


async def test_a_float_is_published_as_a_double(connect: Callable[..., Any], queue: str) -> None:
    """aio-pika's client sends floats of 32 bits: half a minute off for a time, and an error above 3e38."""
    numbers = {"time": 1764394266.731, "large": 1e300, "list": [0.1, {"deep": -0.1}]}
    async with connect(prefetch=1) as source:
        await source.publish([OutgoingMessage(b"", headers=numbers)])
        (message,) = await take(source, 1)
        assert message.headers == numbers
        await source.ack(message)


async def test_what_cannot_be_decoded_survives_too(
    source_for: Callable[..., RabbitBroker], broker: Server
) -> None:
    """A time after the year 9999 as a property and as a header, and text that is not UTF-8."""
    odd = {
        "headers": table(
            {"late": b"T\x7f" + bytes(7), "latin": b"S" + long(b"gr\xf6\xdfe"), "n": b"b\7"}
        ),
        "timestamp": b"\x7f" * 8,
        "app_id": b"\x05gr\xf6\xdfe",
    }
    async with opened(source_for(50)) as source:
        await source.start()
        for (message,) in await travel(source, broker, [odd]):
            assert seen(message)["timestamp"] == odd["timestamp"]
            assert seen(message)["app_id"] == odd["app_id"]
            headers = parse_table(seen(message)["headers"])
            assert headers.items() >= parse_table(odd["headers"]).items()
            assert message.headers["n"] == 7
        assert message.headers["late"] is None


async def test_a_message_published_by_the_runtime_is_read_as_it_was_written(
    connect: Callable[..., Any],
) -> None:
    async with connect(prefetch=1) as source:
        (id,) = await publish(source, 1, type="order", headers={"a": "b"})
        (message,) = await take(source, 1)
        assert (message.id, message.type, message.headers) == (id, "order", {"a": "b"})
        await source.ack(message)
