"""Messages that other programs publish with their own clients: the type selects the handler of the payload."""

import asyncio
import base64
import gzip
import json
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from pydantic import BaseModel

from consumer_harness import AT_ONCE, ConsumerHarness, consume
from harness.contract import eventually, opened, take
from harness.servers import Server
from rabbitmq_client import open_channel, publish_raw
from runtime.brokers import make_source
from runtime.brokers.dead_letters import Selection
from runtime.brokers.delivery import make_message
from runtime.consumer import Consumer
from runtime.handlers import Handler, Router
from runtime.message import Message, OutgoingMessage, Reject, Retry
from runtime.settings import ConsumerSettings
from steps import start_once

SettingsFor = Callable[..., ConsumerSettings]

rabbitmq = pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True, scope="session")


class Order(BaseModel):
    id: str


ORDER = '{"id": "o-1"}'


def attribute(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}


class Received:
    """A service with one handler for each of these types; it records the handled messages."""

    def __init__(self, *types: str) -> None:
        self.calls: list[tuple[str, Order | None, Message]] = []
        self.handlers = {name: self._handler(name) for name in types}

    def _handler(self, name: str) -> Callable[..., Any]:
        async def handle(event: Order | None, message: Message) -> None:
            self.calls.append((name, event, message))

        return handle

    async def consume(self, settings: ConsumerSettings, count: int = 1) -> list[tuple[str, str]]:
        """The handler and the order's id of each message; no message may be rejected."""
        consumer = await consume(
            make_source(settings, 5),
            settings,
            lambda c: c.handled_count + c.rejected_count >= count,
            self.handlers,
        )
        assert consumer.rejected_count == 0
        return [(name, event.id if event else "") for name, event, _ in self.calls]


# -- CloudEvents, compressed bodies and other formats, on every broker

EVENT: dict[str, Any] = {
    "specversion": "1.0",
    "id": "e-1",
    "source": "/orders",
    "type": "com.acme.order.created.v1",
}


async def test_a_structured_cloud_event_selects_its_handler_on_every_broker(
    settings_for: SettingsFor,
) -> None:
    settings = settings_for()
    body = json.dumps({**EVENT, "data": {"id": "o-1"}}).encode()
    content_type = "application/cloudevents+json; charset=utf-8"
    await start_once(settings)
    async with opened(make_source(settings)) as source:
        await source.publish([OutgoingMessage(body, content_type=content_type)])
    received = Received("com.acme.order.*", "other")
    assert await received.consume(settings) == [("com.acme.order.*", "o-1")]
    [(_, _, message)] = received.calls
    assert (message.type, message.body) == (EVENT["type"], body)


@pytest.mark.parametrize("prefix", ["ce_", "ce-", "cloudEvents:", "cloudEvents_"])
def test_a_binary_cloud_event_has_its_id_and_type_in_headers(prefix: str) -> None:
    headers = {f"{prefix}{name}": value for name, value in EVENT.items()}
    message = make_message(b"{}", id=None, type=None, headers=headers)
    assert (message.id, message.type) == ("e-1", EVENT["type"])
    message = make_message(b"{}", id="own", type="own", headers=headers)
    assert (message.id, message.type) == ("own", "own")


@pytest.mark.parametrize("structured", [False, True])
def test_a_long_id_of_a_cloud_event_becomes_a_short_one_that_is_as_distinct(
    structured: bool,
) -> None:
    """A broker must be able to store it again: AMQP allows 255 bytes for an id."""

    def id_of(event_id: str) -> str:
        event = {**EVENT, "id": event_id}
        headers = {"content-type": "application/cloudevents+json"}
        if not structured:
            headers = {f"ce_{name}": value for name, value in event.items()}
        return make_message(json.dumps(event), id=None, type=None, headers=headers).id

    assert id_of("x" * 255) == "x" * 255
    long_ids = [id_of("x" * 300_000), id_of("x" * 300_001), id_of("\u00e9" * 128)]
    assert len(set(long_ids)) == 3
    assert max(map(len, long_ids)) <= 64
    assert id_of("x" * 300_000) == long_ids[0]


def unpacked(body: bytes, **fields: Any) -> Any:
    async def handle(event: Order) -> None: ...

    return Handler("order", handle).decode(Message(body, **fields))


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress)],
)
def test_a_compressed_body_is_decompressed(
    encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    assert unpacked(compress(b'{"id": "o-1"}'), content_encoding=encoding).id == "o-1"


@pytest.mark.parametrize(
    ("body", "encoding", "reason"),
    [
        (b"plain", "gzip", "its body is not gzip"),
        (gzip.compress(b'{"id": "o-1"}')[:-5], "gzip", "its body is not gzip: it is cut off"),
        (gzip.compress(bytes(30_000_000)), "gzip", "its body has more than 5000000 bytes"),
        (b"x", "br", "unknown content encoding 'br'"),
        (gzip.compress(b"1") + gzip.compress(b"2"), "gzip", "something follows its end"),
    ],
    ids=["plain", "cut off", "a bomb", "unknown", "two members"],
)
def test_a_body_that_cannot_be_decompressed_is_rejected(
    body: bytes, encoding: str, reason: str
) -> None:
    with pytest.raises(Reject, match=reason):
        unpacked(body, content_encoding=encoding)


@pytest.mark.parametrize("encoding", ["binary", "utf8", "us-ascii", "none", "7bit"])
def test_a_content_encoding_that_changes_nothing_is_ignored(encoding: str) -> None:
    assert unpacked(b'{"id": "o-1"}', content_encoding=encoding).id == "o-1"


def test_a_handler_of_bytes_gets_a_body_of_any_encoding() -> None:
    async def handle(body: bytes) -> None: ...

    message = Message(b"x", content_encoding="zstd", content_type="application/json")
    assert Handler("order", handle).decode(message) == b"x"


def test_a_service_may_have_decoders_of_its_own() -> None:
    async def handle(event: Order) -> None: ...

    def lines(body: bytes) -> dict[str, str]:
        return dict(line.split("=", 1) for line in body.decode().splitlines())

    router = Router({"order": handle}, decoders={"text/x-lines": lines})
    decode = router.handlers["order"].decode
    assert decode(Message(b"id=o-1", content_type="Text/X-Lines; charset=utf-8")).id == "o-1"
    assert decode(Message(b'{"id": "o-2"}', content_type="application/json")).id == "o-2"
    with pytest.raises(Reject, match="invalid text/x-lines: ValueError: "):
        decode(Message(b"no line", content_type="text/x-lines"))


def test_a_body_without_a_content_type_has_a_decoder_too() -> None:
    async def handle(event: Order) -> None: ...

    async def handle_raw(body: bytes) -> None: ...

    def framed(body: bytes) -> bytes:
        if body[:1] != b"\0":
            raise ValueError("no frame")
        return body[1:]

    router = Router({"order": handle, "raw": handle_raw}, decoders={"": framed})
    decode = router.handlers["order"].decode
    assert decode(Message(b'\0{"id": "o-1"}')).id == "o-1"
    assert decode(Message(b'{"id": "o-2"}', content_type="application/json")).id == "o-2"
    assert router.handlers["raw"].decode(Message(b"\0")) == b"\0"
    with pytest.raises(Reject, match=r"^invalid body: ValueError: no frame$"):
        decode(Message(b'{"id": "o-3"}'))


async def test_what_a_decoder_cannot_read_is_a_dead_letter_and_what_it_cannot_read_yet_is_retried(
    harness: ConsumerHarness, settings_for: SettingsFor
) -> None:
    await start_once(settings_for())
    missing = ["schema"]
    seen: list[tuple[str, str]] = []

    async def handle(event: Order, message: Message) -> None:
        seen.append((event.id, message.handler))

    def decode(body: bytes) -> object:
        if body == b"later" and missing:
            raise Retry(f"no {missing.pop()}")
        return {"id": str(int(body) if body != b"later" else 7)}

    def with_decoder(consumer: Consumer) -> None:
        consumer.router = Router({"order": handle}, decoders={"": decode})
        consumer.router.handlers["order"].limit(consumer.settings)

    _, consumer = await harness.run(
        [b"later", b"\xff broken"],
        lambda c: c.handled_count + c.rejected_count == 2,
        message_type="order",
        handlers={"order": handle},
        before=with_decoder,
        **AT_ONCE,
    )
    assert (consumer.handled_count, seen) == (1, [("7", "order")])
    [retried] = harness.events("message_retried")
    assert (retried["reason"], retried["handler"]) == ("Retry: no schema", "order")
    [rejected] = harness.events("message_rejected")
    assert rejected["reason"].startswith("invalid body: ValueError: invalid literal for int()")
    if make_source(harness.make_settings()).capabilities.dead_letters:
        async with make_source(harness.make_settings()) as source:
            [letter] = [one async for one in source.dead_letters(10)]
        assert (letter.body, letter.reason) == (b"\xff broken", rejected["reason"])


def test_the_raw_handler_gets_the_body_decompressed_but_not_decoded() -> None:
    async def handle(body: bytes) -> None: ...

    router = Router({"order": handle}, decoders={"text/x-lines": lambda body: {}})
    message = Message(gzip.compress(b"a=1"), content_type="text/x-lines", content_encoding="gzip")
    assert router.handlers["order"].decode(message) == b"a=1"


async def test_an_empty_body_is_a_tombstone_for_a_handler_that_takes_none(
    settings_for: SettingsFor,
) -> None:
    settings = settings_for()
    await start_once(settings)
    async with opened(make_source(settings)) as source:
        await source.publish([OutgoingMessage(b"", "order")])
    received = Received("order")
    assert await received.consume(settings) == [("order", "")]


# -- a producer's type needs no setting; the CloudEvents of Kafka, NATS and MQTT are in their own files


def type_by_pika(url: str, queue: str) -> None:
    pika = pytest.importorskip("pika")
    connection = pika.BlockingConnection(pika.URLParameters(url))
    properties = pika.BasicProperties(type="order.created")
    connection.channel().basic_publish("", queue, ORDER, properties)
    connection.close()


def type_by_redis_py(url: str, queue: str) -> None:
    with pytest.importorskip("redis").Redis.from_url(url) as client:
        client.xadd(queue, {"type": "order.created", "id": "o-1"})


def type_by_boto3(url: str, queue: str) -> None:
    arguments = import_module("runtime.brokers.sqs").parse_url(url).client_arguments
    client = pytest.importorskip("boto3").client("sqs", **arguments)
    client.send_message(
        QueueUrl=client.get_queue_url(QueueName=queue)["QueueUrl"],
        MessageBody=ORDER,
        MessageAttributes={"type": attribute("order.created")},
    )
    client.close()


def type_by_asyncpg(url: str, queue: str) -> None:
    asyncpg = pytest.importorskip("asyncpg")
    insert = "INSERT INTO consumer.messages (source, type, body) VALUES ($1, 'order.created', $2)"

    async def produce() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(insert, queue, ORDER.encode())
        await connection.close()

    asyncio.run(produce())


TYPED = {
    "rabbitmq": type_by_pika,
    "redis": type_by_redis_py,
    "sqs": type_by_boto3,
    "postgres": type_by_asyncpg,
}


@pytest.mark.parametrize("broker", [*TYPED], indirect=True, scope="session")
@pytest.mark.parametrize("type_from", ["", "body:id"], ids=["no setting", "a setting"])
async def test_a_type_that_the_producer_says_needs_no_setting_and_comes_before_one(
    settings_for: SettingsFor, broker_name: str, broker: Server, queue: str, type_from: str
) -> None:
    async with opened(make_source(settings := settings_for(type_from=type_from))):
        pass
    await asyncio.to_thread(TYPED[broker_name], broker.url, queue)
    received = Received("order.created", "other")
    assert await received.consume(settings) == [("order.created", "o-1")]


async def test_a_dead_letter_has_the_type_that_the_setting_says(
    settings_for: SettingsFor, broker_name: str
) -> None:
    """So the commands find the letter by its type, and try the handler of that type."""
    settings = settings_for(type_from="body:event")
    await start_once(settings)
    if not make_source(settings).capabilities.dead_letters:
        pytest.skip(f"{broker_name} has no dead letters")
    async with opened(make_source(settings, 2)) as source:
        paid, sent = (OutgoingMessage({"event": f"order.{what}"}) for what in ("paid", "sent"))
        await source.publish([paid, sent])
        await source.start()
        for message in await take(source, 2):
            await source.reject(message, "bad")
        await eventually(2, source.count_dead_letters)
        letters = {letter.id: letter.type async for letter in source.dead_letters(3)}
        assert letters == {paid.id: "order.paid", sent.id: "order.sent"}
        moved = [moved async for moved in source.replay_dead_letters(Selection(type="*.sent"))]
        assert moved == [1]
        [replayed] = await take(source, 1)
        assert (replayed.id, replayed.type) == (sent.id, "order.sent")
        await source.ack(replayed)
        await source.stop()


# -- RabbitMQ: pika, kombu, and py-amqp as Celery uses it


@rabbitmq
async def test_pika_publishes_with_and_without_a_type(
    settings_for: SettingsFor, broker: Server, queue: str
) -> None:
    pika = pytest.importorskip("pika")
    settings = settings_for(type_from="header:event")
    async with opened(make_source(settings)):
        pass

    def produce() -> None:
        connection = pika.BlockingConnection(pika.URLParameters(broker.url))
        channel = connection.channel()
        for properties in (
            pika.BasicProperties(type="order.created", message_id="m-1", correlation_id="c-1"),
            pika.BasicProperties(headers={"event": "order.paid"}, reply_to="answers"),
        ):
            channel.basic_publish("", queue, b'{"id": "o-1"}', properties)
        connection.close()

    await asyncio.to_thread(produce)
    received = Received("order.created", "order.*")
    assert sorted(await received.consume(settings, 2)) == [
        ("order.*", "o-1"),
        ("order.created", "o-1"),
    ]
    [created] = [message for name, _, message in received.calls if name == "order.created"]
    assert (created.id, created.correlation_id) == ("m-1", "c-1")
    [paid] = [message for name, _, message in received.calls if name == "order.*"]
    assert (paid.type, paid.reply_to) == ("order.paid", "answers")


@rabbitmq
async def test_kombu_publishes_compressed_json_through_an_exchange(
    settings_for: SettingsFor, broker: Server, queue: str
) -> None:
    kombu = pytest.importorskip("kombu")
    settings = settings_for(bindings=f"{queue}-events/order.#", type_from="routing-key")
    exchange = kombu.Exchange(f"{queue}-events", "topic", durable=True)

    def produce() -> None:
        with kombu.Connection(broker.url) as connection:
            producer = kombu.Producer(connection, exchange, serializer="json")
            producer.publish({"id": "o-1"}, routing_key="order.created", compression="gzip")
            producer.publish({"id": "o-2"}, routing_key="order.created", compression=None)

    def declare() -> None:
        with kombu.Connection(broker.url) as connection:
            exchange(connection).declare()

    await asyncio.to_thread(declare)
    async with opened(make_source(settings)):
        await asyncio.to_thread(produce)
    received = Received("order.created", "other")
    assert sorted(await received.consume(settings, 2)) == [
        ("order.created", "o-1"),
        ("order.created", "o-2"),
    ]
    async with open_channel(broker.url) as channel:
        await channel.exchange_delete(exchange.name)


@rabbitmq
async def test_a_celery_task_selects_its_handler_by_its_header(
    settings_for: SettingsFor, broker: Server, queue: str
) -> None:
    amqp = pytest.importorskip("amqp")
    settings = settings_for(type_from="header:task")
    async with opened(make_source(settings)):
        pass

    def produce() -> None:
        """Protocol 2 of Celery: the body is [args, kwargs, options]."""
        host, port = broker.url.removeprefix("amqp://").split("@")[-1].split("/")[0].split(":")
        body = json.dumps([[], {"id": "o-1"}, {"callbacks": None}])
        headers = {"lang": "py", "task": "billing.create_order", "id": "t-1", "retries": 0}
        with amqp.Connection(f"{host}:{port}") as connection:
            message = amqp.Message(
                body,
                application_headers=headers,
                content_type="application/json",
                content_encoding="utf-8",
                correlation_id="t-1",
            )
            connection.channel().basic_publish(message, routing_key=queue)

    await asyncio.to_thread(produce)
    calls: list[tuple[Any, Message]] = []

    async def create_order(task: tuple[list[Any], Order, dict[str, Any]], message: Message) -> None:
        calls.append((task[1], message))

    async def other(body: bytes) -> None: ...

    await consume(
        make_source(settings, 5),
        settings,
        lambda c: c.handled_count + c.rejected_count >= 1,
        {"billing.create_order": create_order, "other": other},
    )
    [(order, message)] = calls
    assert (order.id, message.correlation_id) == ("o-1", "t-1")


# -- PostgreSQL: another program's INSERT, in its own transaction


postgres = pytest.mark.parametrize("broker", ["postgres"], indirect=True, scope="session")


@postgres
async def test_a_row_is_inserted_in_the_transaction_of_another_program(
    settings_for: SettingsFor, broker: Server, queue: str
) -> None:
    asyncpg = pytest.importorskip("asyncpg")
    settings = settings_for(type_from="body:event")
    async with opened(make_source(settings)):
        pass
    insert = "INSERT INTO consumer.messages (source, type, headers, body) VALUES ($1, $2, $3, $4)"
    packed = gzip.compress(b'{"id": "o-3"}')
    rows = [
        ("order.created", {"message-key": "k", "correlation-id": "c-1"}, b'{"id": "o-1"}'),
        ("", {}, b'{"id": "o-2", "event": "order.paid"}'),
        ("order.packed", {"content-encoding": "gzip"}, packed),
        ("", {"ce-id": "e-4", "ce-type": "order.shipped"}, b'{"id": "o-4"}'),
    ]
    connection = await asyncpg.connect(broker.url)
    async with connection.transaction():
        for type, headers, body in rows:
            await connection.execute(insert, queue, type, json.dumps(headers), body)
    await connection.close()
    types = ("order.created", "order.paid", "order.packed", "order.shipped")
    received = Received(*types)
    orders = [f"o-{number}" for number in (1, 2, 3, 4)]
    assert sorted(await received.consume(settings, 4)) == sorted(zip(types, orders, strict=True))
    messages = {name: message for name, _, message in received.calls}
    created = messages["order.created"]
    assert (created.key, created.correlation_id) == ("k", "c-1")
    assert created.origin == {"source": queue}
    assert messages["order.packed"].body == packed
    assert messages["order.shipped"].id != "e-4"  # a row has its own id


# -- Redis: redis-py's XADD


redis = pytest.mark.parametrize("broker", ["redis"], indirect=True, scope="session")


@redis
async def test_redis_py_adds_entries_with_and_without_a_body(
    settings_for: SettingsFor, broker: Server, queue: str
) -> None:
    client_of = pytest.importorskip("redis").Redis.from_url
    settings = settings_for(type_from="body:event")
    entries: list[dict[str, Any]] = [
        {"type": "order.created", "id": "o-1"},
        {"event": "order.paid", "id": "o-2"},
        {
            "type": "order.packed",
            "body": gzip.compress(b'{"id": "o-3"}'),
            "content-encoding": "gzip",
        },
        {"ce-type": "order.shipped", "ce-id": "e-4", "body": '{"id": "o-4"}', "tenant": "acme"},
    ]
    with client_of(broker.url) as client:
        added = [client.xadd(queue, entry).decode() for entry in entries]
    types = ("order.created", "order.paid", "order.packed", "order.shipped")
    received = Received(*types)
    assert await received.consume(settings, 4) == [
        (type, f"o-{number}") for number, type in enumerate(types, 1)
    ]
    messages = [message for _, _, message in received.calls]
    assert [message.id for message in messages] == [*added[:3], "e-4"]
    assert messages[3].headers["tenant"] == "acme"
    assert json.loads(messages[0].body) == entries[0]


# -- SQS: boto3, with and without SNS, EventBridge and S3


sqs = pytest.mark.parametrize("broker", ["sqs"], indirect=True, scope="session")


@pytest.fixture
def aws(broker: Server) -> Callable[[str], Any]:
    """Clients of another program for each service."""
    boto3 = pytest.importorskip("boto3")
    arguments = import_module("runtime.brokers.sqs").parse_url(broker.url).client_arguments
    return lambda service: boto3.client(service, **arguments)


@pytest.fixture
async def queue_arn(
    settings_for: SettingsFor, broker: Server, queue: str, aws: Callable[[str], Any]
) -> str:
    """The ARN of the queue, which exists."""
    async with opened(make_source(settings_for())):
        pass
    client = aws("sqs")
    url = client.get_queue_url(QueueName=queue)["QueueUrl"]
    answer = client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
    return str(answer["Attributes"]["QueueArn"])


async def eventually_sent(broker: Server, queue: str, count: int) -> None:
    async def look() -> int:
        return (await asyncio.to_thread(broker.counts, queue)).ready

    await eventually(count, look)


@sqs
async def test_boto3_sends_to_the_queue(
    settings_for: SettingsFor, queue: str, queue_arn: str, aws: Callable[[str], Any]
) -> None:
    settings = settings_for(type_from="body:event")
    client = aws("sqs")
    url = client.get_queue_url(QueueName=queue)["QueueUrl"]
    packed = base64.b64encode(gzip.compress(b'{"id": "o-3"}')).decode()
    bodies: list[tuple[str, dict[str, str]]] = [
        ('{"id": "o-1"}', {"type": "order.created", "correlation-id": "c-1"}),
        ('{"id": "o-2", "event": "order.paid"}', {}),
        (packed, {"type": "order.packed", "Content-Encoding": "gzip"}),
        ('{"id": "o-4"}', {"ce-type": "order.shipped", "ce-id": "e-4"}),
    ]
    for body, attributes in bodies:
        named = {name: attribute(value) for name, value in attributes.items()}
        client.send_message(QueueUrl=url, MessageBody=body, MessageAttributes=named)
    types = ("order.created", "order.paid", "order.packed", "order.shipped")
    received = Received(*types)
    orders = [f"o-{number}" for number in (1, 2, 3, 4)]
    assert sorted(await received.consume(settings, 4)) == sorted(zip(types, orders, strict=True))
    messages = {name: message for name, _, message in received.calls}
    assert messages["order.created"].correlation_id == "c-1"
    assert messages["order.shipped"].id == "e-4"
    assert messages["order.created"].origin == {"queue": queue, "source": queue}


@sqs
@pytest.mark.parametrize("raw", ["true", "false"], ids=["raw delivery", "in the envelope of SNS"])
async def test_boto3_publishes_to_a_topic_of_sns(
    settings_for: SettingsFor,
    broker: Server,
    queue: str,
    queue_arn: str,
    aws: Callable[[str], Any],
    raw: str,
) -> None:
    """Also a message that SNS and the queue have received from a CloudEvents producer, and a message without a type."""
    client = aws("sns")
    topic = client.create_topic(Name=f"{queue}-events")["TopicArn"]
    options = {"RawMessageDelivery": raw}
    client.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue_arn, Attributes=options)
    typed = {"type": attribute("order.created"), "tenant": attribute("acme")}
    sent = client.publish(
        TopicArn=topic, Message=ORDER, Subject="An order", MessageAttributes=typed
    )
    event = {"ce-type": attribute("order.paid"), "ce-id": attribute("e-1")}
    client.publish(TopicArn=topic, Message=ORDER, MessageAttributes=event)
    client.publish(TopicArn=topic, Message='{"id": "o-1", "event": "order.shipped"}')
    await eventually_sent(broker, queue, 3)
    types = ("order.created", "order.paid", "order.shipped")
    received = Received(*types)
    settings = settings_for(type_from="body:event")
    assert sorted(await received.consume(settings, 3)) == [(type, "o-1") for type in types]
    messages = {name: message for name, _, message in received.calls}
    created = messages["order.created"]
    assert (created.body, created.headers["tenant"]) == (ORDER.encode(), "acme")
    assert messages["order.paid"].id == "e-1"
    assert created.published_at is not None
    if raw == "false":
        assert created.id == sent["MessageId"]
        assert created.headers["Subject"] == "An order"
        topics = {"topic": f"{queue}-events", "topic_arn": topic}
        assert created.origin == {"queue": queue, **topics, "source": queue}
    client.delete_topic(TopicArn=topic)


@sqs
async def test_the_topic_of_sns_may_be_the_type(
    settings_for: SettingsFor, broker: Server, queue: str, queue_arn: str, aws: Callable[[str], Any]
) -> None:
    client = aws("sns")
    topic = client.create_topic(Name=f"{queue}-created")["TopicArn"]
    client.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue_arn)
    client.publish(TopicArn=topic, Message=ORDER)
    await eventually_sent(broker, queue, 1)
    received = Received("*-created", "other")
    assert await received.consume(settings_for(type_from="topic")) == [("*-created", "o-1")]
    client.delete_topic(TopicArn=topic)


@sqs
async def test_an_event_of_eventbridge_is_its_detail(
    settings_for: SettingsFor, broker: Server, queue: str, queue_arn: str, aws: Callable[[str], Any]
) -> None:
    client = aws("events")
    pattern = json.dumps({"source": [queue]})
    client.put_rule(Name=queue, EventPattern=pattern, State="ENABLED")
    client.put_targets(Rule=queue, Targets=[{"Id": "1", "Arn": queue_arn}])
    entry = {"Source": queue, "DetailType": "OrderCreated", "Detail": ORDER, "Resources": ["arn:x"]}
    [put] = client.put_events(Entries=[entry])["Entries"]
    await eventually_sent(broker, queue, 1)
    received = Received("OrderCreated", "other")
    assert await received.consume(settings_for()) == [("OrderCreated", "o-1")]
    [(_, _, message)] = received.calls
    assert (message.id, message.headers["source"]) == (put["EventId"], queue)
    assert json.loads(message.body) == {"id": "o-1"}
    client.remove_targets(Rule=queue, Ids=["1"])
    client.delete_rule(Name=queue)


@sqs
async def test_a_notification_of_s3_is_itself_and_its_event_is_the_type(
    settings_for: SettingsFor, broker: Server, queue: str, queue_arn: str, aws: Callable[[str], Any]
) -> None:
    client = aws("s3")
    place = {"LocationConstraint": "eu-central-1"}
    client.create_bucket(Bucket=queue, CreateBucketConfiguration=place)
    notifying = {"QueueArn": queue_arn, "Events": ["s3:ObjectCreated:*"]}
    client.put_bucket_notification_configuration(
        Bucket=queue, NotificationConfiguration={"QueueConfigurations": [notifying]}
    )
    client.put_object(Bucket=queue, Key="invoice.pdf", Body=b"x")
    await eventually_sent(broker, queue, 2)
    types: list[str] = []
    keys: list[str] = []

    async def created(event: dict[str, Any], message: Message) -> None:
        types.append(message.type)
        keys.append(event["Records"][0]["s3"]["object"]["key"])

    async def test(event: dict[str, Any], message: Message) -> None:
        types.append(message.type)

    settings = settings_for()
    consumer = await consume(
        make_source(settings, 5),
        settings,
        lambda c: c.handled_count + c.rejected_count >= 2,
        {"ObjectCreated:*": created, "s3:TestEvent": test},
    )
    assert (consumer.rejected_count, keys) == (0, ["invoice.pdf"])
    assert sorted(types) == ["ObjectCreated:Put", "s3:TestEvent"]
    client.delete_object(Bucket=queue, Key="invoice.pdf")
    client.delete_bucket(Bucket=queue)


@rabbitmq
async def test_a_hostile_cloud_event_can_be_retried_and_rejected(
    settings_for: SettingsFor, broker: Server, queue: str
) -> None:
    settings = settings_for(retry_seconds=0.1, retry_max_seconds=0.4)
    headers: dict[str, Any] = {
        "cloudEvents:type": "order",
        "cloudEvents:id": "\u00e9" * 300,
        "x-consumer-origin": {"exchange": "x", "routing_key": 7, "more": [1, {"a": None}]},
    }
    async with opened(make_source(settings, 5)) as source, open_channel(broker.url) as channel:
        await source.start()
        await publish_raw(channel, queue, headers=headers)
        (message,) = await take(source, 1)
        assert message.origin == {"exchange": "x", "routing_key": "7", "source": queue}
        await source.retry(message, 0.1, "not now")
        (again,) = await take(source, 1)
        assert (again.id, again.attempt) == (message.id, 2)
        await source.reject(again, "bad")
        assert [letter.id async for letter in source.dead_letters(2)] == [message.id]
        await source.stop()
