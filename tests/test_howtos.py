"""The how-to pages about handlers, followed to the letter in a new service on the embedded broker; mypy understands them."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import confluent_kafka
import pytest
import redis.asyncio
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from harness.servers import ServerMissing, server_module, skip_without_server
from support.answering import answering
from support.documents import steps
from support.rendered import TEMPLATE, Render, Service, run
from support.terminal import run_until


def follow(
    page: str,
    service: Service,
    awaited: str,
    before_run: Callable[[], object] = lambda: None,
    **variables: str,
) -> list[str]:
    """Write the files of the page, and run its commands; returns the output of each command."""
    printed = []
    for file, text in steps(TEMPLATE / "docs" / page):
        if file:
            service.write(file, text)
        elif text.endswith(" run"):
            before_run()
            printed.append(run_until(awaited, text, service.path))
        else:
            printed.append(run("sh", "-c", text, cwd=service.path, env=variables).stdout)
    return printed


def assert_typed(service: Service) -> None:
    result = service.run("mypy", "src", environment=service.environment())
    assert result.returncode == 0, result.stdout


def test_publish_what_follows(render_own: Render) -> None:
    service = render_own(broker="sqlite")
    *_, ran, billing = follow("publishing.md", service, "billing")
    assert re.search(r'"handled": 1', ran)
    assert re.search(r"^ +billing: 1$", billing, re.M)
    assert_typed(service)


def test_what_a_handler_is_given(render_own: Render) -> None:
    service = render_own(broker="sqlite")
    *_, ran = follow("handlers.md", service, "stored")
    [stored] = [line for line in ran.splitlines() if '"stored"' in line]
    assert '"cents": 50' in stored
    assert '"tenant": "none"' in stored
    assert_typed(service)


MISTAKES = """
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from .runtime.consumer import Lifespan
from .runtime.formats import Decoder
from .runtime.handlers import Around
from .runtime.message import Failed, Message, OutgoingMessage

async def handle(message: Message) -> list[OutgoingMessage | Failed]:
    await message.publish(OutgoingMessage(b"", to="source:x", delay_seconds=1.5))
    await message.publish(b"")  # wrong
    message.attempts  # wrong
    if message.published_at > 0:  # wrong
        return [b""]  # wrong
    return [OutgoingMessage(b"", tpye="x"), Failed(message, ValueError())]  # wrong

async def one_argument(call: Callable[[], Awaitable[Any]]) -> Any: ...
async def generator(): yield  # wrong

around: Around = one_argument  # wrong
lifespan: Lifespan = handle  # wrong
decoders: Mapping[str, Decoder] = {"a": bytes.decode, "b": len}
no_decoders: Mapping[str, Decoder] = {"text/csv": str.upper}  # wrong
"""


def test_mypy_finds_each_mistake_and_nothing_else(render_own: Render) -> None:
    service = render_own(broker="sqlite")
    service.write("src/order_events/mistakes.py", MISTAKES)
    checked = service.run("mypy", "src", environment=service.environment())
    found = {int(line) for line in re.findall(r"mistakes.py:(\d+): error", checked.stdout)}
    lines = enumerate(MISTAKES.splitlines(), 1)
    assert found == {number for number, line in lines if line.endswith("# wrong")}, checked.stdout


def test_errors_are_reported_to_sentry_without_the_body(
    render_own: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = render_own(broker="sqlite")
    events: list[dict[str, Any]] = []

    def receive(_path: str, envelope: bytes) -> tuple[int, bytes]:
        time.sleep(0.5)  # a network's delay: the process ends before it unless it flushes
        header, *items = envelope.splitlines()
        events.extend(json.loads(one) for one in items if b'"exception"' in one)
        return 200, json.dumps({"id": json.loads(header)["event_id"]}).encode()

    with answering(receive) as address:
        monkeypatch.setenv("ORDER_EVENTS_SENTRY_DSN", f"http://0123456789abcdef@{address}/1")
        *_, ran = follow("sentry.md", service, "message_retried")
    [event] = events
    assert event["tags"] == {"handler": "order_created", "message.type": "order_created"}
    [message_id] = event["contexts"]["messages"]["ids"]
    [retried] = [json.loads(line) for line in ran.splitlines() if '"message_retried"' in line]
    assert retried["message_id"] == message_id
    [exception] = event["exception"]["values"]
    assert (exception["type"], exception["value"]) == ("ValueError", "an order without pieces")
    assert exception["stacktrace"]["frames"][-1]["function"] == "handle"
    assert "A-1001" not in json.dumps({**event, "exception": without_source(exception)})
    assert "0123456789abcdef" not in ran + json.dumps(event)
    assert "Sentry is attempting to send" not in ran, "flushed by lifespan, not left to the exit"
    assert_typed(service)


def without_source(exception: dict[str, Any]) -> dict[str, Any]:
    """The lines around the failing line have EXAMPLE among them."""
    source = {"pre_context", "context_line", "post_context"}
    frames = [
        {name: value for name, value in frame.items() if name not in source}
        for frame in exception["stacktrace"]["frames"]
    ]
    return {**exception, "stacktrace": frames}


ORDER = {
    "type": "record",
    "name": "Order",
    "fields": [{"name": "reference", "type": "string"}, {"name": "cents", "type": "long"}],
}
PRODUCE = """
import asyncio, io, json, struct, sys
import fastavro
from order_events.order_pb2 import Order
from order_events.runtime.brokers import make_source
from order_events.runtime.message import OutgoingMessage
from order_events.runtime.settings import ConsumerSettings

data = io.BytesIO()
schema = fastavro.parse_schema(json.loads(sys.argv[1]))
fastavro.schemaless_writer(data, schema, {"reference": "from-avro", "cents": 1})
avro = struct.pack(">bI", 0, 7) + data.getvalue()
protobuf = struct.pack(">bIb", 0, 8, 0) + Order(reference="from-protobuf", cents=2**40).SerializeToString()
kind = "application/protobuf"

async def publish():
    settings = ConsumerSettings(source="order-events")
    async with make_source(settings) as source:
        await source.declare()
        await source.publish([
            OutgoingMessage(b"hello", "order_created", "no frame"),
            OutgoingMessage(struct.pack(">bI", 0, 9) + b"x", "order_created", "no schema"),
            OutgoingMessage(protobuf[:-3], "order_created", "cut off", content_type=kind),
            OutgoingMessage(protobuf, "order_created", "protobuf", content_type=kind),
            OutgoingMessage(avro, "order_created", "avro"),
            OutgoingMessage(avro[:-1], "order_created", "cut"),
            OutgoingMessage(avro + b"x", "order_created", "long"),
        ])

asyncio.run(publish())
"""


def test_avro_and_protobuf_are_decoded_in_the_frame_of_a_schema_registry(
    render_own: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = render_own(broker="sqlite")
    schema = json.dumps({"schema": json.dumps(ORDER)}).encode()
    answers = {"/schemas/ids/9": [(404, b"")], "/schemas/ids/7": [(200, schema), (503, b"")]}

    def produce() -> None:
        run("uv", "run", "python", "-c", PRODUCE, json.dumps(ORDER), cwd=service.path)

    with answering(lambda path, _body: answers[path].pop()) as address:
        monkeypatch.setenv("ORDER_EVENTS_SCHEMA_REGISTRY", f"http://{address}")
        monkeypatch.setenv("CONSUMER_CONCURRENCY", "1")
        *_, ran = follow("formats.md", service, "from-avro", produce)
    assert answers == {"/schemas/ids/9": [], "/schemas/ids/7": []}, "each schema is fetched once"
    entries = [json.loads(line) for line in ran.splitlines() if line.startswith("{")]
    billed = {one["reference"]: one["cents"] for one in entries if one["event"] == "billed"}
    assert billed == {"from-protobuf": 2**40, "from-avro": 1}
    [retried] = [one for one in entries if one["event"] == "message_retried"]
    assert retried["message_id"] == "avro"
    assert retried["reason"].startswith("Retry: the schema registry: HTTP Error 503")
    rejected = [one for one in entries if one["event"] == "message_rejected"]
    reasons = {one["message_id"]: one["reason"] for one in rejected}
    assert reasons.keys() == {"no frame", "no schema", "cut off", "cut", "long"}
    assert reasons["no frame"] == "invalid body: ValueError: it begins with 104 instead of 0"
    assert reasons["no schema"] == "invalid body: ValueError: the registry has no schema 9"
    assert reasons["cut off"].startswith("invalid application/protobuf: DecodeError: ")
    assert reasons["cut"].startswith("invalid body: EOFError")
    assert reasons["long"] == "invalid body: ValueError: something follows its end"
    assert_typed(service)


async def create_queue(url: str, messages: list[dict[str, str]]) -> None:
    """A classic queue of another program, which pika has filled."""
    pika: Any = import_module("pika")  # no types
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.queue_declare("orders", durable=True)
        for message in messages:
            channel.basic_publish("", "orders", json.dumps(message).encode())


async def create_stream(url: str, messages: list[dict[str, str]]) -> None:
    async with redis.asyncio.from_url(url) as client:
        for fields in messages:
            entry: Any = fields
            await client.xadd("orders", entry)


async def create_topic(url: str, messages: list[dict[str, str]]) -> None:
    servers: dict[str, Any] = {"bootstrap.servers": urlsplit(url).netloc}
    admin = AdminClient(servers)
    created = admin.create_topics([NewTopic("orders", 1)])["orders"]
    await asyncio.to_thread(created.result, 30)
    producer = confluent_kafka.Producer(servers)
    for message in messages:
        producer.produce("orders", json.dumps(message).encode())
    assert await asyncio.to_thread(producer.flush, 30) == 0


CREATE = {"rabbitmq": create_queue, "redis": create_stream, "kafka": create_topic}


@pytest.mark.parametrize("broker", CREATE)
async def test_what_exists_is_consumed(
    broker: str, render_own: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = render_own(broker=broker)
    messages = [
        {"type": "order.created", "reference": "A-1001"},
        {"reference": "of no type"},
        {"type": "order.paid", "reference": "A-1001"},
    ]
    (folder := tmp_path / "server").mkdir()
    try:
        with server_module(broker).private(folder) as server:
            await CREATE[broker](server.url, messages)
            monkeypatch.setenv("CONSUMER_BROKER_URL", server.url)
            monkeypatch.setenv("CONSUMER_CONCURRENCY", "1")
            *_, checked, _, _, ran = await asyncio.to_thread(
                follow, "existing.md", service, "order.paid", CONSUMER_BROKER_URL=server.url
            )
    except ServerMissing as missing:
        skip_without_server(missing)
    assert re.search(r"^ +orders: 3$", checked, re.M)
    entries = [json.loads(line) for line in ran.splitlines() if line.startswith("{")]
    [shipping] = [one for one in entries if one["event"] == "shipping"]
    assert shipping["reference"] == "A-1001"
    assert [one["type"] for one in entries if one["event"] == "ignored"] == ["", "order.paid"]
    assert_typed(service)


def test_test_your_handlers(render_own: Render) -> None:
    service = render_own(broker="sqlite")
    [ran] = follow("testing.md", service, "")
    assert "4 passed" in ran
    result = service.run("mypy", "src", "tests", environment=service.environment())
    assert result.returncode == 0, result.stdout
