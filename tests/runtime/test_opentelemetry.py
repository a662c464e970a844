"""Traces and metrics: what a collector receives, by the messaging conventions; and no collector delays a shutdown."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry import baggage, trace
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from harness.contract import opened
from harness.process import Ledger, service_command, service_environment
from harness.scene import AT_ONCE_SECONDS, Scene, assert_quiet, wait_until
from harness.servers.local import free_port
from processes import MISBEHAVING
from runtime import watchdog
from runtime.brokers import make_source
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.handlers import HandlerFunction, Router
from runtime.message import Message, OutgoingMessage
from runtime.settings import ConsumerSettings
from runtime.telemetry import CLOSE_SECONDS
from runtime.telemetry.opentelemetry import (
    OpenTelemetry,
    attributes_of_broker,
    span_limits,
)

ENABLED: dict[str, Any] = {"TELEMETRY": "opentelemetry"}
"""For the service in `MISBEHAVING`: only here does a runtime have two kinds of telemetry."""

on_one_broker = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
"""The header of a message whose publisher, somewhere else, was traced."""

SYSTEMS = {
    "amqp": ("rabbitmq", False),
    "nats": ("nats", True),
    "redis": ("redis", True),
    "kafka": ("kafka", True),
    "sqs": ("aws_sqs", False),
    "postgres": ("postgresql", False),
    "postgresql": ("postgresql", False),
    "mqtt": ("mqtt", True),
    "sqlite": ("sqlite", False),
}
"""``messaging.system`` by the scheme of the URL, and whether that broker has groups."""

Attributes = dict[str, Any]


def attributes_of(pairs: Any) -> Attributes:
    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, pair.value.WhichOneof("value") or "string_value")

    return {pair.key: value(pair) for pair in pairs}


class Collector:
    """What an OTLP/HTTP receiver got."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.bodies: dict[str, list[bytes]] = {"/v1/traces": [], "/v1/metrics": []}

    @property
    def spans(self) -> list[Span]:
        requests = map(ExportTraceServiceRequest.FromString, self.bodies["/v1/traces"])
        resources = [spans for request in requests for spans in request.resource_spans]
        return [span for r in resources for scope in r.scope_spans for span in scope.spans]

    def spans_of_kind(self, kind: Any) -> list[Span]:
        return [span for span in self.spans if span.kind == kind]

    @property
    def metrics(self) -> dict[str, list[tuple[Attributes, Any]]]:
        """The points of the last export of each metric, with their attributes."""
        requests = map(ExportMetricsServiceRequest.FromString, self.bodies["/v1/metrics"])
        resources = [metrics for request in requests for metrics in request.resource_metrics]
        found = {}
        for metric in (m for r in resources for scope in r.scope_metrics for m in scope.metrics):
            data = getattr(metric, metric.WhichOneof("data") or "")
            found[metric.name] = [(attributes_of(p.attributes), p) for p in data.data_points]
        return found

    @property
    def services(self) -> set[str]:
        requests = map(ExportTraceServiceRequest.FromString, self.bodies["/v1/traces"])
        resources = [spans.resource for request in requests for spans in request.resource_spans]
        return {attributes_of(resource.attributes)["service.name"] for resource in resources}


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Receive(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.bodies[self.path].append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Receive) as server:
        received = Collector(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield received
        server.shutdown()
        thread.join()


# -- the real program, and a real receiver


def publish_by_command(scene: Scene, endpoint: str, task: dict[str, Any]) -> None:
    environment = service_environment(
        scene.broker.url, scene.queue, scene.ledger, **ENABLED, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint
    )
    command = service_command("publish", "--type", "work", json.dumps(task), service=MISBEHAVING)
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=30, cwd=scene.ledger.path.parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert result.stdout == f"published 1 message to {scene.queue}\n"


@pytest.mark.slow
def test_a_published_message_is_linked_to_its_processing(
    scene: Scene, collector: Collector
) -> None:
    """On every broker: the context travels in the message's headers."""
    publish_by_command(scene, collector.url, {"id": "task-0"})
    [sent] = collector.spans_of_kind(Span.SPAN_KIND_PRODUCER)
    assert sent.name == f"send {scene.queue}"
    [(sent_metric, point)] = collector.metrics["messaging.client.sent.messages"]
    assert point.as_int == 1
    [(duration, point)] = collector.metrics["messaging.client.operation.duration"]
    assert point.count == 1
    assert duration == sent_metric
    assert duration["messaging.operation.name"] == "send"
    process = scene.start(**ENABLED, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    handling = process.wait_for("handling")
    wait_until(lambda: scene.ledger.ended == ["task-0"])
    assert process.stop()[0] == 0
    assert_quiet(process)
    [processed] = collector.spans_of_kind(Span.SPAN_KIND_CONSUMER)
    assert processed.name == f"process {scene.queue}"
    [link] = processed.links
    assert (link.trace_id, link.span_id) == (sent.trace_id, sent.span_id)
    assert processed.parent_span_id == b""
    assert processed.trace_id != sent.trace_id
    assert handling["trace_id"] == processed.trace_id.hex()
    attributes = attributes_of(processed.attributes)
    assert attributes["messaging.message.id"] == handling["message_id"]
    assert attributes["messaging.destination.name"] == scene.queue
    assert attributes["messaging.operation.type"] == "process"
    assert attributes["messaging.operation.name"] == "process"
    system, has_groups = SYSTEMS[urlsplit(scene.broker.url).scheme]
    assert attributes["messaging.system"] == system
    of_group = {"messaging.consumer.group.name": scene.queue} if has_groups else {}
    assert of_group.items() <= attributes.items()
    assert len(of_group) == sum("group" in name for name in attributes)
    sender = attributes_of(sent.attributes)
    assert sender["messaging.system"] == system
    assert "messaging.consumer.group.name" not in sender, "a message is for every group"
    assert collector.services == {"service-of-the-tests"}


@pytest.mark.slow
@on_one_broker
def test_after_a_known_run_the_metrics_equal_the_ledger(scene: Scene, collector: Collector) -> None:
    process = scene.start(
        **ENABLED,
        drain_seconds=0.5,
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_SERVICE_NAME="orders",
    )
    scene.publish(5)
    scene.publish(3, end="retry", retry_after_seconds=3600)
    scene.publish(1, end="reject")
    scene.publish_bodies([b"not JSON"], kind="work")
    wait_until(lambda: len(scene.ledger.ended) == 9)
    wait_until(lambda: scene.broker.counts(scene.queue).dead == 2)
    scene.publish(2, seconds=60)
    process.wait_for("handling", count=11)
    assert process.stop()[0] == 75
    metrics = collector.metrics
    assert {
        (attributes["consumer.handler"], attributes["consumer.outcome"]): point.as_int
        for attributes, point in metrics["consumer.messages"]
        if point.as_int
    } == {
        ("work", "handled"): 5,
        ("work", "retried"): 3,
        ("work", "rejected"): 2,
        ("work", "abandoned"): 2,
    }
    [(consumed, point)] = metrics["messaging.client.consumed.messages"]
    assert point.as_int == 12
    assert consumed["messaging.destination.name"] == scene.queue
    durations = {a.get("error.type"): p.count for a, p in metrics["messaging.process.duration"]}
    assert durations == {None: 5, "Retry": 3, "Reject": 2, "CancelledError": 2}
    assert [point.as_int for _, point in metrics["consumer.messages.in_flight"]] == [0]
    [(_, shutdown)] = metrics["consumer.shutdown.duration"]
    assert 0.5 <= shutdown.as_double < 5
    assert collector.services == {"orders"}
    assert len(collector.spans) == 12


@contextmanager
def black_hole() -> Iterator[str]:
    """A collector that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
@on_one_broker
def test_an_unresponsive_collector_does_not_delay_the_exit(scene: Scene) -> None:
    with black_hole() as url:
        scene.publish(3)
        process = scene.start(**ENABLED, OTEL_EXPORTER_OTLP_ENDPOINT=url)
        wait_until(lambda: len(scene.ledger.ended) == 3)
        exit_code, seconds = process.stop()
    assert exit_code == 0
    assert seconds < CLOSE_SECONDS + AT_ONCE_SECONDS
    assert process.find("telemetry_lost")
    assert [event["exit_code"] for event in process.find("stopped")] == [0]
    assert process.stderr == ""


async def test_a_flush_gets_no_more_time_than_the_shutdown_has_left() -> None:
    left_seconds = 1.5
    event = CancellationEvent(asyncio.get_running_loop())
    signalled_at = time.monotonic() - watchdog.CLOSE_SECONDS + left_seconds
    event.signals.append((signal.SIGTERM, signalled_at))
    dog = watchdog.Watchdog(event, [], 0, {})
    assert dog.finish(0, CLOSE_SECONDS) == pytest.approx(left_seconds - 1, abs=0.2)


async def test_a_flush_ends_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    settings = ConsumerSettings.model_validate({"broker_url": "sqlite:///x", "source": "q"})
    tracers = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(tracers, "shutdown", released.wait)
    telemetry = OpenTelemetry(settings, tracers, MeterProvider(shutdown_on_exit=False))
    began = time.monotonic()
    await telemetry.close(0.1)
    assert time.monotonic() - began < AT_ONCE_SECONDS
    released.set()


@pytest.mark.slow
@on_one_broker
def test_an_unreachable_collector_changes_no_exit_code(scene: Scene) -> None:
    scene.publish(1)
    process = scene.start(**ENABLED, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    wait_until(lambda: scene.ledger.ended == ["task-0"])
    exit_code, seconds = process.stop()
    assert exit_code == 0
    assert seconds < CLOSE_SECONDS + AT_ONCE_SECONDS
    assert process.stderr == ""


# -- in this process


class Bench:
    """A consumer on the embedded broker, whose spans stay in memory."""

    def __init__(self, make_settings: Callable[..., ConsumerSettings]) -> None:
        self.make_settings = make_settings
        self.exporter = InMemorySpanExporter()

    async def run(
        self, messages: list[OutgoingMessage], handle: HandlerFunction, **settings: Any
    ) -> list[ReadableSpan]:
        """Consume the messages, each once; returns the spans."""
        made = self.make_settings(max_attempts=1, **settings)
        tracers = TracerProvider(shutdown_on_exit=False, span_limits=span_limits(made))
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = OpenTelemetry(made, tracers, MeterProvider(shutdown_on_exit=False))
        event = CancellationEvent(asyncio.get_running_loop())
        source = make_source(made, made.prefetch or 10)
        consumer = Consumer(source, Router({"n": handle}), event, made, None, self.telemetry)
        async with opened(make_source(made)) as publisher:
            await publisher.publish(messages)
        consuming = asyncio.create_task(consumer.run())
        async with asyncio.timeout(20):
            while consumer.handled_count + consumer.rejected_count < len(messages):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        event.set("test")
        assert await consuming == 0
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def bench(broker: object, settings_for: Callable[..., ConsumerSettings]) -> Bench:
    return Bench(settings_for)


@on_one_broker
async def test_a_span_is_a_trace_of_its_own_and_linked_to_the_publishers(bench: Bench) -> None:
    inside: list[trace.SpanContext] = []

    async def handle(body: bytes) -> None:
        inside.append(trace.get_current_span().get_span_context())

    [span] = await bench.run([OutgoingMessage(b"", id="m-1", headers=PARENT)], handle)
    assert span.kind is SpanKind.CONSUMER
    assert span.parent is None
    [link] = span.links
    assert trace.format_trace_id(link.context.trace_id) == TRACE_ID
    assert trace.format_span_id(link.context.span_id) == SPAN_ID
    [own] = inside
    assert own == span.get_span_context()
    assert own.trace_id != link.context.trace_id


@on_one_broker
async def test_a_handler_sees_the_publishers_baggage_also_in_a_thread(bench: Bench) -> None:
    seen: list[object] = []

    def handle(body: bytes) -> None:
        seen.append(baggage.get_baggage("tenant"))

    headers = {**PARENT, "baggage": "tenant=acme"}
    await bench.run([OutgoingMessage(b"", headers=headers), OutgoingMessage(b"")], handle)
    assert sorted(map(str, seen)) == ["None", "acme"]


@on_one_broker
async def test_a_batch_is_one_span_with_a_link_for_each_message(bench: Bench) -> None:
    async def handle(bodies: list[bytes]) -> None: ...

    headers = [{"traceparent": f"00-{TRACE_ID}-{number:016x}-01"} for number in (1, 2)]
    messages = [OutgoingMessage(b"", id=f"m-{n}", headers=h) for n, h in enumerate(headers)]
    [span] = await bench.run([*messages, OutgoingMessage(b"")], handle, batch_size=3)
    assert span.attributes is not None
    assert span.attributes["messaging.batch.message_count"] == 3
    assert "messaging.message.id" not in span.attributes
    links = [(link.context.span_id, dict(link.attributes or {})) for link in span.links]
    assert links == [
        (1, {"messaging.message.id": "m-0"}),
        (2, {"messaging.message.id": "m-1"}),
    ]


@on_one_broker
async def test_a_large_batch_has_all_its_links(bench: Bench) -> None:
    async def handle(bodies: list[bytes]) -> None: ...

    messages = [OutgoingMessage(b"", headers=PARENT) for _ in range(200)]
    spans = await bench.run(messages, handle, batch_size=200, prefetch=200)
    assert sum(len(span.links) for span in spans) == 200
    assert max(len(span.links) for span in spans) > 128


@on_one_broker
async def test_a_failure_is_named_by_its_type_and_its_text_stays_in_the_log(
    bench: Bench,
) -> None:
    async def handle(body: bytes) -> None:
        msg = "no route to amqp://user:hunter2@host"
        raise ConnectionError(msg)

    [span] = await bench.run([OutgoingMessage(b"")], handle)
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ConnectionError"
    assert "hunter2" not in span.to_json()


@on_one_broker
async def test_a_payload_that_does_not_validate_has_a_span_too(bench: Bench) -> None:
    async def handle(number: int) -> None: ...

    [span] = await bench.run([OutgoingMessage(b"one", headers=PARENT)], handle)
    assert span.attributes is not None
    assert span.attributes["error.type"] == "Reject"
    assert len(span.links) == 1


@on_one_broker
@pytest.mark.parametrize(
    "value", ["", "00-zz", 7, None, ["00"], {"a": 1}, "\udce9", PARENT["traceparent"].upper()]
)
async def test_invalid_headers_are_ignored(bench: Bench, value: object) -> None:
    async def handle(body: bytes) -> None: ...

    message = OutgoingMessage(b"", headers={"traceparent": value, "baggage": value})
    [span] = await bench.run([message], handle)
    assert list(span.links) == []


@on_one_broker
async def test_headers_may_be_bytes(bench: Bench) -> None:
    async def handle(body: bytes) -> None: ...

    await bench.run([], handle)
    headers = {name: value.encode() for name, value in PARENT.items()}
    message = Message(b"", headers=headers)
    bench.telemetry.handled(bench.telemetry.handling("n", [message]), None)
    [span] = bench.exporter.get_finished_spans()
    assert len(span.links) == 1


@on_one_broker
async def test_publishing_within_a_span_belongs_to_it(bench: Bench) -> None:
    async def handle(body: bytes) -> None: ...

    await bench.run([], handle)
    messages = [OutgoingMessage(b"", headers={"mine": "1"}), OutgoingMessage(b"")]
    with bench.telemetry.publishing(messages):
        pass
    [span] = bench.exporter.get_finished_spans()
    assert span.kind is SpanKind.PRODUCER
    assert span.context is not None
    here = trace.format_trace_id(span.context.trace_id)
    assert [message.headers["traceparent"].split("-")[1] for message in messages] == [here, here]
    assert messages[0].headers["mine"] == "1"


@pytest.mark.parametrize(
    ("url", "system", "address"),
    [
        ("amqps://user:hunter2@broker.example:5671/orders", "rabbitmq", "broker.example"),
        ("nats://user:hunter2@nats.example", "nats", "nats.example"),
        ("tls://nats.example", "nats", "nats.example"),
        ("redis://:hunter2@redis.example/0", "redis", "redis.example"),
        ("unix:///run/redis.sock", "redis", None),
        ("mqtts://user:hunter2@mqtt.example", "mqtt", "mqtt.example"),
        ("postgresql://user:hunter2@db.example/orders", "postgresql", "db.example"),
        ("kafka://one.example:9092", "kafka", "one.example"),
        ("sqs://eu-central-1", "aws_sqs", None),
        ("sqs://key:hunter2@127.0.0.1:4566/eu-central-1", "aws_sqs", "127.0.0.1"),
        ("sqlite:///messages.db", "sqlite", None),
    ],
)
def test_a_broker_is_named_as_the_conventions_do(
    url: str, system: str, address: str | None
) -> None:
    for group, of_group in {"": "orders", "billing": "billing"}.items():
        settings = ConsumerSettings.model_validate(
            {"broker_url": url, "source": "orders", "group": group}
        )
        attributes = attributes_of_broker(settings)
        assert attributes["messaging.system"] == system
        assert attributes["messaging.destination.name"] == "orders"
        has_groups = dict(SYSTEMS.values())[system]
        expected = of_group if has_groups else None
        assert attributes.get("messaging.consumer.group.name") == expected
        assert attributes.get("server.address") == address
        assert "hunter2" not in str(attributes)


@pytest.mark.parametrize(
    ("variables", "records"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:9"}, True),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
            False,
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
                "OTEL_TRACES_EXPORTER": "none",
                "OTEL_METRICS_EXPORTER": "none",
            },
            False,
        ),
    ],
)
def test_nothing_is_recorded_unless_a_collector_is_named(
    tmp_path: Path, variables: dict[str, str], records: bool
) -> None:
    """In a process of its own: the providers are the whole process's."""
    program = (
        "from runtime.settings import ConsumerSettings\n"
        "from runtime.telemetry import Telemetry\n"
        "from runtime.telemetry.opentelemetry import make_telemetry\n"
        "telemetry = make_telemetry('orders', ConsumerSettings(broker_url='sqlite:///x'))\n"
        "print(type(telemetry) is not Telemetry)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**service_environment("", "", Ledger(tmp_path / "ledger")), **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.stdout == f"{records}\n"
