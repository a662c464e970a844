"""Traces and metrics: the exports of a service, by the messaging conventions; no collector delays a shutdown."""

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import structlog
from opentelemetry import baggage, trace
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricsData
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)

from harness.contract import opened
from harness.process import Ledger, ask, service_command, service_environment
from harness.scene import AT_ONCE_SECONDS, Scene, assert_quiet, wait_until
from harness.servers.local import free_port
from processes import MISBEHAVING
from runtime import logs, watchdog
from runtime.brokers import make_source
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.errors import ExitCode, SettingsError
from runtime.handlers import HandlerFunction, Router
from runtime.message import Message, OutgoingMessage, Retry
from runtime.settings import ConsumerSettings
from runtime.telemetry import CLOSE_SECONDS, Telemetry, opentelemetry
from runtime.telemetry.both import Both
from runtime.telemetry.opentelemetry import (
    FailedExports,
    MetricsExporter,
    OpenTelemetry,
    RedactingExporter,
    attributes_of_broker,
    check_protocol,
    resource_of,
    span_limits,
)

ENABLED: dict[str, Any] = {"TELEMETRY": "opentelemetry"}
"""Variables of the service in `MISBEHAVING`: only here does a runtime have two kinds of telemetry."""

on_one_broker = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
"""The header of a message from a publisher, somewhere else, that was traced."""

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
    """The exports that an OTLP/HTTP receiver got."""

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
    def resources(self) -> list[Attributes]:
        """The resources of the metrics."""
        requests = map(ExportMetricsServiceRequest.FromString, self.bodies["/v1/metrics"])
        resources = [found.resource for request in requests for found in request.resource_metrics]
        return [attributes_of(resource.attributes) for resource in resources]

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
    """On every broker: the message's headers have the context."""
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
    assert handling["span_id"] == processed.span_id.hex()
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
    [starting] = process.find("starting")
    assert starting["telemetry"] == "otlp"


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
    assert durations == {None: 8, "Reject": 2, "CancelledError": 2}
    assert {a["consumer.handler"] for a, _ in metrics["messaging.process.duration"]} == {"work"}
    failures = {a["error.type"]: p.as_int for a, p in metrics["consumer.failures"]}
    assert failures == {"Reject": 2, "CancelledError": 2}
    [(_, queued)] = metrics["consumer.message.queue"]
    assert queued.count == 11  # the message that is not JSON reached no handler
    assert 0 <= queued.sum < 60 * queued.count
    assert max(queued.explicit_bounds) == 600
    assert any(point.exemplars for _, point in metrics["messaging.process.duration"])
    of_the_collector = {span.trace_id for span in collector.spans}
    exemplars = [e for _, p in metrics["messaging.process.duration"] for e in p.exemplars]
    assert {exemplar.trace_id for exemplar in exemplars} <= of_the_collector
    assert [point.as_int for _, point in metrics["consumer.messages.in_flight"]] == [0]
    [(_, shutdown)] = metrics["consumer.shutdown.duration"]
    assert 0.5 <= shutdown.as_double < 5
    assert collector.services == {"orders"}
    assert len(collector.spans) == 12


@contextmanager
def black_hole() -> Iterator[str]:
    """A collector that accepts connections and never answers."""
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
    dog = watchdog.Watchdog(event, [], 0, {}, lambda *_: None)
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


@pytest.mark.slow
@on_one_broker
def test_an_outage_of_the_collector_is_one_line_in_a_minute(scene: Scene) -> None:
    """Each interval has several attempts, for the traces and for the metrics."""
    attempts = 0

    def refuse(listener: socket.socket) -> None:
        nonlocal attempts
        with suppress(OSError):  # the socket is closed
            while True:
                listener.accept()[0].close()
                attempts += 1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, args=[listener], daemon=True).start()
        variables: dict[str, Any] = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{listener.getsockname()[1]}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": 1,
            "OTEL_METRIC_EXPORT_INTERVAL": 50,
            "OTEL_BSP_SCHEDULE_DELAY": 50,
        }
        process = scene.start(**ENABLED, **variables)
        scene.publish(3)
        wait_until(lambda: attempts >= 20)
        assert process.stop()[0] == 0
        listener.shutdown(socket.SHUT_RDWR)
    [failed] = process.find("export_failed")
    assert (failed["level"], len(failed["reason"]) <= 300) == ("warning", True)
    names = {event["event"] for event in process.events}
    # A sentence of the SDK is not; but asyncio warns about a slow machine.
    assert not [name for name in names if " " in name and not name.startswith("Executing <")]
    assert process.stderr == ""


def test_a_line_of_an_outage_of_the_collector_says_how_long_it_has_lasted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traces and metrics are independent: a collector may accept only one of them."""
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(opentelemetry, "log", structlog.wrap_logger(None, processors=[keep(said)]))
    now = 1_000.0
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now))
    failed = FailedExports()
    monkeypatch.setattr(opentelemetry, "FAILED_EXPORTS", failed)
    logger = logging.getLogger("opentelemetry.exporter")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [failed])
    status = 400

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if self.path == "/v1/traces" else status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        traces = RedactingExporter(endpoint=f"{url}/v1/traces")
        metrics = MetricsExporter(endpoint=f"{url}/v1/metrics")
        for seconds, answer in ((0, 400), (30, 400), (90, 400), (100, 200), (200, 404)):
            now, status = 1_000.0 + seconds, answer
            metrics.export(MetricsData([]))
            in_a_thread(lambda: traces.export([]))
        server.shutdown()
    assert [(line["event"], line["outage_seconds"]) for line in said] == [
        ("export_failed", 0),
        ("export_failed", 90),
        ("export_failed", 0),
    ]
    assert "404" in said[-1]["reason"] or "Not Found" in said[-1]["reason"]


def keep(said: list[dict[str, Any]]) -> Callable[..., Any]:
    def keep(_: object, __: str, event: dict[str, Any]) -> None:
        said.append(event)
        raise structlog.DropEvent

    return keep


def in_a_thread(call: Callable[[], object]) -> None:
    """Like the SDK, which exports traces and metrics in a thread each."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


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
        made = self.make_settings(**{"max_attempts": 1, **settings})
        tracers = TracerProvider(shutdown_on_exit=False, span_limits=span_limits(made))
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.telemetry = OpenTelemetry(made, tracers, meters)
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

    def points(self, metric: str) -> dict[Any, Any]:
        """The value, or the count, of each source or destination."""
        [resource] = self.reader.get_metrics_data().resource_metrics  # type: ignore[union-attr]
        [found] = [one for one in resource.scope_metrics[0].metrics if one.name == metric]
        points: Any = found.data.data_points
        return {
            point.attributes["messaging.destination.name"]: getattr(point, "count", None)
            or getattr(point, "value", 0)
            for point in points
        }


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
async def test_each_span_and_metric_has_the_source_of_its_message_and_the_destination_of_what_follows(
    bench: Bench, queue: str
) -> None:
    """Not all names of CONSUMER_SOURCE; a batch from several sources has no name."""
    one, two, third = f"{queue}-a", f"{queue}-b", f"{queue}-c"

    async def handle(body: bytes) -> OutgoingMessage | None:
        return OutgoingMessage(b"", to=f"source:{third}") if body == b"2" else None

    messages = [OutgoingMessage(b"%d" % n, to=f"source:{(one, two, two)[n]}") for n in range(3)]
    spans = await bench.run(messages, handle, source=f"{one},{two}", concurrency=1)
    destinations = [span.attributes["messaging.destination.name"] for span in spans]  # type: ignore[index]
    assert sorted(map(str, destinations)) == [one, two, two, third]
    assert {span.name for span in spans} == {f"process {one}", f"process {two}", f"send {third}"}
    assert bench.points("messaging.process.duration") == {one: 1, two: 2}
    assert bench.points("messaging.client.consumed.messages") == {one: 1, two: 2}
    assert bench.points("messaging.client.sent.messages") == {third: 1}

    async def handle_batch(bodies: list[bytes]) -> None: ...

    bench.exporter.clear()
    settings = {"source": f"{one},{two}", "batch_size": 3, "batch_seconds": 5}
    [span] = await bench.run(messages, handle_batch, **settings)
    assert span.name == "process"
    assert "messaging.destination.name" not in (span.attributes or {})


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
async def test_invalid_headers_are_ignored(
    bench: Bench, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    # Old versions warn with the header's text, which a report of pytest-xdist cannot contain.
    caplog.set_level(logging.CRITICAL, "opentelemetry")

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


def test_what_a_handler_writes_into_a_span_is_redacted_when_it_is_sent(
    collector: Collector,
) -> None:
    exporter = RedactingExporter(endpoint=f"{collector.url}/v1/traces")
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(exporter))
    link = Link(SpanContext(int(TRACE_ID, 16), int(SPAN_ID, 16), True), {"token": "PLANTED"})
    with tracers.get_tracer("handler", "1.2").start_as_current_span(
        "GET https://api/?api_key=PLANTED", kind=SpanKind.CLIENT, links=[link]
    ) as span:
        span.set_attribute("db.password", "PLANTED")
        span.set_attributes({"statements": ["password=PLANTED", "two"], "count": 7})
        span.record_exception(OSError("no route to amqp://app:PLANTED@host"))
        span.set_status(StatusCode.ERROR, "Authorization: Bearer PLANTED")
        parent = span.get_span_context()
        tracers.get_tracer("handler").start_span("child").end()
    tracers.shutdown()
    assert b"PLANTED" not in b"".join(collector.bodies["/v1/traces"])
    child, sent = collector.spans
    assert (sent.name, sent.kind) == ("GET https://api/?api_key=***", Span.SPAN_KIND_CLIENT)
    assert child.parent_span_id == sent.span_id == parent.span_id.to_bytes(8)
    attributes = attributes_of(sent.attributes)
    assert (attributes["db.password"], attributes["count"]) == ("***", 7)
    [event], [linked] = sent.events, sent.links
    assert attributes_of(event.attributes)["exception.message"] == "no route to amqp://***@host"
    assert linked.trace_id.hex() == TRACE_ID
    assert sent.status.message == "Authorization: Bearer ***"
    assert sent.end_time_unix_nano > sent.start_time_unix_nano > 0


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
        assert attributes.get("server.port") == urlsplit(url).port
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
    """In a separate process: the providers belong to the whole process."""
    program = (
        "from runtime.settings import ConsumerSettings\n"
        "from runtime.telemetry.opentelemetry import make_telemetry\n"
        "telemetry = make_telemetry('orders', ConsumerSettings(broker_url='sqlite:///x'))\n"
        "print(telemetry is not None)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**service_environment("", "", Ledger(tmp_path / "ledger")), **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.stdout == f"{records}\n"


@on_one_broker
async def test_a_planned_retry_is_no_error(bench: Bench) -> None:
    async def handle(body: bytes, message: Message) -> None:
        if message.attempt == 1:
            raise Retry("not yet", delay_seconds=0)

    spans = await bench.run([OutgoingMessage(b"")], handle, max_attempts=2)
    assert len(spans) == 2
    assert {span.status.status_code for span in spans} == {StatusCode.UNSET}
    assert not any("error.type" in (span.attributes or {}) for span in spans)
    assert bench.telemetry.failures == {}


@pytest.mark.slow
@on_one_broker
def test_the_resource_names_version_and_instance_unless_the_environment_does(
    scene: Scene, collector: Collector
) -> None:
    said = {"deployment.environment.name": "production", "service.version": "1.2.3"}
    pairs = ",".join(f"{name}={value}" for name, value in said.items())
    environment: dict[str, Any] = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_RESOURCE_ATTRIBUTES": pairs,
    }
    scene.publish(1)
    for count in (1, 2):
        process = scene.start(**ENABLED, **environment)
        process.wait_for("consuming")
        assert process.stop()[0] == 0, count
    resources = collector.resources
    assert all(said.items() <= resource.items() for resource in resources)
    assert {resource["service.name"] for resource in resources} == {"service-of-the-tests"}
    assert len({resource["service.instance.id"] for resource in resources}) == 2


def test_the_resource_has_the_version_of_the_installed_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = resource_of("pytest").attributes
    assert resource["service.version"] == pytest.__version__
    assert (
        resource["service.instance.id"] != resource_of("pytest").attributes["service.instance.id"]
    )
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.version=7,service.instance.id=pod-1")
    told = resource_of("pytest").attributes
    assert (told["service.version"], told["service.instance.id"]) == ("7", "pod-1")


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", True),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc", True),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", True),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", False),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "", False),
    ],
)
def test_another_protocol_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, refused: bool
) -> None:
    monkeypatch.setenv(name, value)
    if not refused:
        return check_protocol("TRACES")
    with pytest.raises(SettingsError, match=f"^{name}: {value} is not supported: set it to http"):
        check_protocol("TRACES")
    return None


@on_one_broker
def test_a_service_that_is_told_to_use_grpc_does_not_start(scene: Scene) -> None:
    process = scene.start(
        **ENABLED,
        consuming=False,
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4317",
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
    )
    assert process.wait() == ExitCode.USAGE
    assert process.stderr.count("OTEL_EXPORTER_OTLP_PROTOCOL: grpc is not supported") == 1
    assert process.stderr.count("\n") == 1


# -- both


@pytest.mark.slow
@on_one_broker
def test_both_scrape_and_collector_see_the_same(scene: Scene, collector: Collector) -> None:
    port = free_port()
    process = scene.start(
        TELEMETRY="both", probe_port=port, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url
    )
    assert process.wait_for("starting")["telemetry"] == "both"
    scene.publish(5)
    scene.publish(2, end="reject")
    scene.publish_bodies([b"not JSON"], kind="work")
    wait_until(lambda: scene.broker.counts(scene.queue).dead == 3)
    wait_until(lambda: "\nconsumer_event_loop_lag_seconds 0.0\n" not in ask(port, "/metrics")[1])
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics",
        headers={"Accept": "application/openmetrics-text; version=1.0.0"},
    )
    with urllib.request.urlopen(request) as answer:
        families = parse_openmetrics(answer.read().decode())  # type: ignore[no-untyped-call]  # it has no types
    samples = [sample for family in families for sample in family.samples]
    assert process.stop()[0] == 0
    outcomes = {
        (s.labels["handler"], s.labels["outcome"]): int(s.value)
        for s in samples
        if s.name == "consumer_messages_total"
    }
    assert +Counter(outcomes) == {("work", "handled"): 5, ("work", "rejected"): 3}
    sent = {
        (attributes["consumer.handler"], attributes["consumer.outcome"]): point.as_int
        for attributes, point in collector.metrics["consumer.messages"]
    }
    assert sent == outcomes
    exemplars = [s.exemplar.labels for s in samples if s.exemplar is not None]
    traces = {(span.trace_id.hex(), span.span_id.hex()) for span in collector.spans}
    assert exemplars
    assert {(one["trace_id"], one["span_id"]) for one in exemplars} <= traces
    [lag] = collector.metrics["consumer.event_loop.lag"]
    assert lag[1].as_double > 0


@on_one_broker
def test_with_both_a_shutdown_says_what_finished(scene: Scene, collector: Collector) -> None:
    scene.publish(4, seconds=1)
    process = scene.start(
        TELEMETRY="both",
        probe_port=free_port(),
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        concurrency=2,
        prefetch=4,
    )
    process.wait_for("handling", count=2)
    assert process.stop()[0] == 0
    [stopped] = process.find("stopped")
    assert (stopped["in_flight"], stopped["finished"], stopped["requeued"]) == (2, 2, 2)
    [drained] = process.find("drained")
    assert (drained["handled"], drained["requeued"]) == (2, 2)


def test_both_exporters_have_all_that_the_consumer_counts() -> None:
    methods = {name for name, method in vars(Telemetry).items() if callable(method)}
    assert methods - vars(Both).keys() == {"readings"}  # each part has its own
    parts = Telemetry(), Telemetry()
    both = Both(*parts)  # type: ignore[arg-type]  # any two
    both.watch(SimpleNamespace(router=SimpleNamespace(types={"work"})))  # type: ignore[arg-type]
    both.settled("work", "handled")
    both.refused("none", Message(b"", "id", "other"), ValueError("unknown"))
    both.failed("work", KeyError("in publishing"), 3)
    both.count_published([OutgoingMessage(b"", to="queue:next")])
    for counts in (both, *parts):
        assert +Counter(counts.outcomes) == {("work", "handled"): 1}
    for part in parts:
        assert part.failures == {("none", "ValueError"): 1, ("work", "KeyError"): 3}
        assert part.published == {"queue:next": 1}


@on_one_broker
@pytest.mark.parametrize(
    ("settings", "told"),
    [({}, "off"), ({"probe_port": True}, "prometheus"), ({"endpoint": True}, "otlp")],
)
def test_both_is_what_is_configured(scene: Scene, settings: dict[str, bool], told: str) -> None:
    environment: dict[str, Any] = {"TELEMETRY": "both"}
    if settings.get("probe_port"):
        environment["probe_port"] = free_port()
    if settings.get("endpoint"):
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{free_port()}"
    process = scene.start(**environment)
    assert process.wait_for("starting")["telemetry"] == told
    process.wait_for("consuming")
    assert process.stop()[0] == 0
