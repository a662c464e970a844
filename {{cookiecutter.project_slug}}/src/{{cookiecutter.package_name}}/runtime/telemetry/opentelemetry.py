# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Traces and metrics for OpenTelemetry, sent by OTLP over HTTP.

The standard ``OTEL_...`` variables configure it. Without ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or the one for
traces or metrics) nothing is recorded: the SDK would keep trying a port of this machine.

Names are those of the semantic conventions for messaging. A span of processing is a trace of its own, *linked*
to the span that published the message, as the conventions say: so one message and a batch of many look
the same, and a message that is retried tomorrow, or replayed next month, does not prolong today's trace.
"""

import asyncio
import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import structlog
from opentelemetry import context, metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.util import types

from ..brokers import MODULE_OF_SCHEME
from ..errors import SettingsError
from ..logs import Seldom
from ..message import Message, OutgoingMessage
from ..redaction import redacted, redacted_value
from ..settings import ConsumerSettings
from . import CLOSE_SECONDS, MOST_VALUES, OTHER, Reading, Telemetry, queue_seconds

if TYPE_CHECKING:
    from ..consumer import Consumer

log = structlog.get_logger()

SCOPE = "cookiecutter-consumer"
PROTOCOL = "http/protobuf"
REGISTERED_SYSTEMS = {"sqs": "aws_sqs", "postgres": "postgresql"}
"""Names of the conventions that differ from this package's names."""
SYSTEMS_WITH_GROUPS = {"kafka", "nats", "redis", "mqtt"}
OTHER_LABELS = {"error": "error.type"}
"""Attributes with a name of the conventions."""

Attributes = dict[str, str | int]


class Handling(NamedTuple):
    handler: str
    messages: int
    span: Span
    about: "Attributes"
    started: float


class OpenTelemetry(Telemetry):
    exports = "otlp"

    def __init__(
        self, settings: ConsumerSettings, tracers: TracerProvider, meters: MeterProvider
    ) -> None:
        super().__init__()
        self._providers = (meters, tracers)
        self._tracer = tracers.get_tracer(SCOPE)
        self._meter = meters.get_meter(SCOPE)
        self._settings = settings
        self._operations: dict[tuple[str, str], Attributes] = {}
        self._consumed = Counter(dict.fromkeys(settings.sources, 0))
        bounds = sorted(settings.duration_buckets)
        self._duration = self._meter.create_histogram(
            "messaging.process.duration",
            "s",
            "Duration of processing operation.",
            explicit_bucket_boundaries_advisory=bounds,
        )
        self._operation = self._meter.create_histogram(
            "messaging.client.operation.duration",
            "s",
            "Duration of messaging operation initiated by a producer or consumer client.",
            explicit_bucket_boundaries_advisory=bounds,
        )
        self._sent = self._meter.create_counter(
            "messaging.client.sent.messages",
            "{message}",
            "Number of messages producer attempted to send to the broker.",
        )
        self._queued = self._meter.create_histogram(
            "consumer.message.queue",
            "s",
            "Time from publishing to a handler's first call, where the time of publishing is known.",
            explicit_bucket_boundaries_advisory=bounds,
        )

    def watch(self, consumer: "Consumer") -> None:
        """Readings are read at each export: an SDK call for each message costs twenty times as much."""
        super().watch(consumer)
        for reading in self.readings(consumer):
            self._observe(consumer, reading)

        def consumed(_: CallbackOptions) -> Iterable[Observation]:
            for source, count in self._consumed.copy().items():
                yield Observation(count, self._about("process", source))

        self._meter.create_observable_counter(
            "messaging.client.consumed.messages",
            [consumed],
            "{message}",
            "Number of messages that were delivered to the application.",
        )

    def _observe(self, consumer: "Consumer", reading: Reading) -> None:
        """Export a reading that has no name in the conventions."""
        names = [OTHER_LABELS.get(label, f"consumer.{label}") for label in reading.labels]

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            [now] = [one for one in self.readings(consumer) if one.name == reading.name]
            for labels, value in now.points.items():
                yield Observation(value, dict(zip(names, labels, strict=True)))

        unit = "s" if reading.kind == "seconds" else ""
        about = (f"consumer.{reading.name}", [observe], unit, reading.meaning)
        if reading.kind == "counter":
            self._meter.create_observable_counter(*about)
        else:
            self._meter.create_observable_gauge(*about)

    def _about(self, operation: str, destination: str) -> Attributes:
        """The attributes of an operation on this destination; without a name if a batch has several."""
        key = operation, destination
        if key not in self._operations and len(self._operations) >= MOST_VALUES:
            key = operation, OTHER
        if key not in self._operations:
            about = attributes_of_broker(self._settings.model_copy(update={"source": key[1]}))
            self._operations[key] = {**about, "messaging.operation.name": operation}
            if operation == "send":
                self._operations[key].pop("messaging.consumer.group.name", None)
            if not destination:
                del self._operations[key]["messaging.destination.name"]
        return self._operations[key]

    def handling(self, handler: str, messages: Sequence[Message]) -> Handling:
        for message in messages:
            if (seconds := queue_seconds(message)) is not None:
                self._queued.record(seconds)  # with attributes it costs twice as much
        return self._begin(handler, messages)

    def _begin(self, handler: str, messages: Sequence[Message]) -> Handling:
        source = _only(str(message.origin.get("source", "")) for message in messages)
        about: Attributes = {**self._about("process", source), "consumer.handler": handler}
        attributes: Attributes = {**about, "messaging.operation.type": "process"}
        links = []
        sender = Context()
        for message in messages:
            self._consumed[str(message.origin.get("source", ""))] += 1
            if not message.headers:
                continue
            sender = Context()
            with suppress(Exception):  # propagators should not raise, but do for some headers
                sender = propagate.extract(message.headers, Context(), _HEADERS)
            publisher = trace.get_current_span(sender).get_span_context()
            if publisher.is_valid:
                links.append(Link(publisher, {"messaging.message.id": message.id}))
        if len(messages) == 1:
            attributes["messaging.message.id"] = messages[0].id
        else:
            attributes["messaging.batch.message_count"] = len(messages)
            sender = Context()  # a batch has no one sender, whose baggage it could carry
        span = self._tracer.start_span(
            _span_name(about),
            Context(),  # a separate trace, even during another span
            SpanKind.CONSUMER,
            attributes,
            links,
        )
        # Not detached: the handler's results are published later. The next message has a context of its own.
        context.attach(trace.set_span_in_context(span, sender))
        structlog.contextvars.bind_contextvars(**ids_of(span))
        return Handling(handler, len(messages), span, about, time.perf_counter())

    def handled(self, handling: Handling, failure: BaseException | None) -> None:
        attributes = handling.about
        # Only its type: the text is in the log, where passwords are masked.
        if failure is not None and (
            error := self.failed(handling.handler, failure, handling.messages)
        ):
            attributes["error.type"] = error
            handling.span.set_attribute("error.type", error)
            handling.span.set_status(StatusCode.ERROR)
        self._duration.record(time.perf_counter() - handling.started, attributes)
        handling.span.end()

    def refused(self, handler: str, message: Message, rejection: BaseException) -> None:
        self.handled(self._begin(handler, [message]), rejection)

    @contextmanager
    def publishing(self, messages: Sequence[OutgoingMessage]) -> Iterator[None]:
        first = self._settings.sources[0]
        destination = _only(one.to.partition(":")[2] or first for one in messages)
        metered = self._about("send", destination)
        attributes: Attributes = {**metered, "messaging.operation.type": "send"}
        if len(messages) == 1:
            attributes["messaging.message.id"] = messages[0].id
        else:
            attributes["messaging.batch.message_count"] = len(messages)
        with self._tracer.start_as_current_span(
            _span_name(metered),
            kind=SpanKind.PRODUCER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            started = time.perf_counter()
            try:
                for message in messages:
                    headers = dict(message.headers)
                    propagate.inject(headers)
                    message.headers = headers
                yield
            except BaseException as error:
                metered = {**metered, "error.type": type(error).__qualname__}
                span.set_attribute("error.type", type(error).__qualname__)
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                self._operation.record(time.perf_counter() - started, metered)
                self._sent.add(len(messages), metered)

    async def close(self, within_seconds: float = CLOSE_SECONDS) -> None:
        # In a daemon thread, since the SDK exceeds its own time limits: a collector that accepts and never
        # answers must block neither the event loop nor the interpreter's exit.
        loop, flushed = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            for provider in self._providers:
                with suppress(Exception):  # a reader may have no time left
                    provider.shutdown()
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(flushed.set)

        threading.Thread(target=flush, name="telemetry", daemon=True).start()
        try:
            async with asyncio.timeout(within_seconds):
                await flushed.wait()
        except TimeoutError:
            log.warning("telemetry_lost", reason=f"not accepted within {within_seconds:.1f} s")


class RedactingExporter(OTLPSpanExporter):
    """Redacts text that handlers and instrumentation write into spans, such as that of an exception."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export([redacted_span(span) for span in spans])
        if result is SpanExportResult.SUCCESS:
            FAILED_EXPORTS.succeeded()
        return result


class MetricsExporter(OTLPMetricExporter):
    def export(self, *args: Any, **options: Any) -> MetricExportResult:
        result = super().export(*args, **options)
        if result is MetricExportResult.SUCCESS:
            FAILED_EXPORTS.succeeded()
        return result


def redacted_span(span: ReadableSpan) -> ReadableSpan:
    status = span.status
    return ReadableSpan(
        redacted(span.name),
        span.context,
        span.parent,
        span.resource,
        _redacted(span.attributes),
        [Event(redacted(e.name), _redacted(e.attributes), e.timestamp) for e in span.events],
        [Link(link.context, _redacted(link.attributes)) for link in span.links],
        span.kind,
        status=Status(status.status_code, status.description and redacted(status.description)),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _redacted(attributes: types.Attributes) -> types.Attributes:
    return {name: redacted_value(value, name) for name, value in (attributes or {}).items()}


class FailedExports(logging.Handler):
    """Logs the failures of a collector as our own event, at first and then once a minute.

    The exporters log a long sentence for each attempt, and make several attempts in each interval.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._warning = Seldom()
        self._outages: dict[int | None, Seldom] = {}  # by thread: traces and metrics have one each

    def succeeded(self) -> None:
        """An export has succeeded in this thread."""
        self._outages.pop(threading.get_ident(), None)

    def emit(self, record: logging.LogRecord) -> None:
        outage = self._outages.setdefault(record.thread, Seldom())
        if self._warning.is_due():
            reason = redacted(record.getMessage())[:300]
            log.warning("export_failed", outage_seconds=outage.seconds, reason=reason)


FAILED_EXPORTS = FailedExports()


def _only(names: Iterable[str]) -> str:
    """The name if all are equal; otherwise empty, since the conventions have no name for several."""
    found = {*names}
    return found.pop() if len(found) == 1 else ""


def _span_name(about: Attributes) -> str:
    destination = about.get("messaging.destination.name", "")
    return f"{about['messaging.operation.name']} {destination}".rstrip()


class _Headers(Getter[Mapping[str, Any]]):
    """Headers as brokers deliver them: some deliver bytes, and a producer may have written any value."""

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        value = carrier.get(key)
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace")
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Mapping[str, Any]) -> list[str]:
        return list(carrier)


_HEADERS = _Headers()


def ids_of(span: Span) -> dict[str, str]:
    """The ids as they are in the log and in Prometheus' exemplars."""
    about = span.get_span_context()
    return {
        "trace_id": trace.format_trace_id(about.trace_id),
        "span_id": trace.format_span_id(about.span_id),
    }


def current_trace() -> dict[str, str] | None:
    """The ids for an exemplar; None if the trace is not sampled, and so is not stored."""
    span = trace.get_current_span()
    return ids_of(span) if span.get_span_context().trace_flags.sampled else None


def attributes_of_broker(settings: ConsumerSettings) -> Attributes:
    module = MODULE_OF_SCHEME.get(settings.broker_scheme, settings.broker_scheme)
    attributes: Attributes = {
        "messaging.system": REGISTERED_SYSTEMS.get(module, module),
        "messaging.destination.name": settings.source,
    }
    if module in SYSTEMS_WITH_GROUPS:
        attributes["messaging.consumer.group.name"] = settings.group or settings.source
    with suppress(ValueError):
        url = urlsplit(settings.broker_url.get_secret_value())
        is_region = module == "sqs" and url.path in ("", "/")
        if url.hostname and not is_region:
            attributes["server.address"] = url.hostname
            if url.port:
                attributes["server.port"] = url.port
    return attributes


def span_limits(settings: ConsumerSettings) -> SpanLimits:
    """A batch has as many links as messages; the SDK silently drops links beyond 128."""
    if "OTEL_SPAN_LINK_COUNT_LIMIT" in os.environ:
        return SpanLimits()
    return SpanLimits(max_links=max(128, settings.batch_size))


def make_telemetry(service: str, settings: ConsumerSettings) -> OpenTelemetry | None:
    """Reads the ``OTEL_...`` variables, and makes the providers known to all instrumentation. Raises SettingsError."""
    signals = [
        signal
        for signal in ("TRACES", "METRICS")
        if os.environ.get(f"OTEL_{signal}_EXPORTER", "otlp") != "none"
        and (
            os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
            or os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
        )
    ]
    if not signals or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    for signal in signals:
        check_protocol(signal)
    resource = resource_of(service)
    # No shutdown at exit, the default: it would wait half a minute for an unresponsive collector.
    tracers = TracerProvider(
        resource=resource, shutdown_on_exit=False, span_limits=span_limits(settings)
    )
    if "TRACES" in signals:
        tracers.add_span_processor(BatchSpanProcessor(RedactingExporter()))
    readers = [PeriodicExportingMetricReader(MetricsExporter())] if "METRICS" in signals else []
    meters = MeterProvider(readers, resource=resource, shutdown_on_exit=False)
    for name in ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).propagate = False
        logging.getLogger(name).addHandler(FAILED_EXPORTS)
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(meters)
    return OpenTelemetry(settings, tracers, meters)


def check_protocol(signal: str) -> None:
    """Raises SettingsError for gRPC: the SDK would send HTTP to its port, and retry forever."""
    for name in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := os.environ.get(name):
            if protocol != PROTOCOL:
                msg = f"{name}: {protocol} is not supported: set it to {PROTOCOL}, and the endpoint to that port (4318)"
                raise SettingsError(msg)
            return


def resource_of(service: str) -> Resource:
    """The attributes from ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES``, with defaults for the usual ones."""
    ours = {"service.name": service, "service.instance.id": str(uuid.uuid4())}
    for distribution in metadata.distributions(name=service):
        ours["service.version"] = distribution.version
    said = OTELResourceDetector().detect().attributes
    return Resource.create({name: value for name, value in ours.items() if name not in said})
