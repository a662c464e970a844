# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Traces and metrics for OpenTelemetry, sent by OTLP over HTTP.

The standard ``OTEL_...`` variables configure it. Without ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or the one for
traces or metrics) nothing is recorded: the SDK would keep trying a port of this machine.

Names are those of the semantic conventions for messaging. A span of processing is a trace of its own, *linked*
to the span that published the message, as the conventions say: so one message and a batch of many look
the same, and a message that is retried tomorrow, or replayed next month, does not prolong today's trace.
"""

import asyncio
import contextvars
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, get_args
from urllib.parse import urlsplit

import structlog
from opentelemetry import context, metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode

from ..brokers import MODULE_OF_SCHEME
from ..message import Message, OutgoingMessage
from ..settings import ConsumerSettings
from . import CLOSE_SECONDS, ConsumerView, State, Telemetry

log = structlog.get_logger()

SCOPE = "cookiecutter-consumer"
REGISTERED_SYSTEMS = {"sqs": "aws_sqs", "postgres": "postgresql"}
"""Names of the conventions that differ from this package's."""
SYSTEMS_WITH_GROUPS = {"kafka", "nats", "redis", "mqtt"}
BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Those of the conventions."""

Attributes = dict[str, str | int]


class Handling(NamedTuple):
    span: Span
    token: contextvars.Token[Context]
    started: float


class OpenTelemetry(Telemetry):
    def __init__(
        self, settings: ConsumerSettings, tracers: TracerProvider, meters: MeterProvider
    ) -> None:
        super().__init__()
        self._providers = (meters, tracers)
        self._tracer = tracers.get_tracer(SCOPE)
        self._meter = meters.get_meter(SCOPE)
        self._destination = settings.source
        attributes = attributes_of_broker(settings)
        self._process = {**attributes, "messaging.operation.name": "process"}
        self._process_span = {**self._process, "messaging.operation.type": "process"}
        self._send = {**attributes, "messaging.operation.name": "send"}
        self._send.pop("messaging.consumer.group.name", None)
        self._duration = self._meter.create_histogram(
            "messaging.process.duration",
            "s",
            "Duration of processing operation.",
            explicit_bucket_boundaries_advisory=BUCKETS_SECONDS,
        )
        self._operation = self._meter.create_histogram(
            "messaging.client.operation.duration",
            "s",
            "Duration of messaging operation initiated by a producer or consumer client.",
            explicit_bucket_boundaries_advisory=BUCKETS_SECONDS,
        )
        self._sent = self._meter.create_counter(
            "messaging.client.sent.messages",
            "{message}",
            "Number of messages producer attempted to send to the broker.",
        )
        self._shutdown = self._meter.create_gauge(
            "consumer.shutdown.duration", "s", "Duration of the graceful shutdown."
        )

    def watch(self, consumer: ConsumerView) -> None:
        """Counts are read at each export: a call of the SDK for each message costs twenty times as much."""
        super().watch(consumer)

        def consumed(_: CallbackOptions) -> Iterable[Observation]:
            yield Observation(sum(self.outcomes.values()), self._process)

        def outcomes(_: CallbackOptions) -> Iterable[Observation]:
            for (handler, outcome), count in self.outcomes.items():
                yield Observation(count, {"consumer.handler": handler, "consumer.outcome": outcome})

        def in_flight(_: CallbackOptions) -> Iterable[Observation]:
            yield Observation(len(consumer.in_flight))

        def reconnects(_: CallbackOptions) -> Iterable[Observation]:
            yield Observation(consumer.outage_count)

        def state(_: CallbackOptions) -> Iterable[Observation]:
            for name in get_args(State):
                yield Observation(int(name == consumer.state), {"consumer.state": name})

        self._meter.create_observable_counter(
            "messaging.client.consumed.messages",
            [consumed],
            "{message}",
            "Number of messages that were delivered to the application.",
        )
        # The conventions have no names for these.
        self._meter.create_observable_counter(
            "consumer.messages", [outcomes], "{message}", "Deliveries by handler and outcome."
        )
        self._meter.create_observable_up_down_counter(
            "consumer.messages.in_flight", [in_flight], "{message}", "In-flight messages."
        )
        self._meter.create_observable_counter(
            "consumer.reconnects",
            [reconnects],
            "{reconnect}",
            "How many times the broker was lost.",
        )
        self._meter.create_observable_up_down_counter(
            "consumer.state", [state], "1", "1 for the current state, 0 for the others."
        )

    def handling(self, handler: str, messages: Sequence[Message]) -> Handling:
        attributes: Attributes = {**self._process_span, "consumer.handler": handler}
        links = []
        sender = Context()
        for message in messages:
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
            f"process {self._destination}",
            Context(),  # a trace of its own, whatever span may be current
            SpanKind.CONSUMER,
            attributes,
            links,
        )
        token = context.attach(trace.set_span_in_context(span, sender))
        trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        structlog.contextvars.bind_contextvars(trace_id=trace_id)
        return Handling(span, token, time.perf_counter())

    def handled(self, handling: Handling, failure: BaseException | None) -> None:
        attributes = self._process
        if failure is not None:
            # Only its type: its text is in the log, where passwords are masked.
            kind = type(failure).__qualname__
            attributes = {**attributes, "error.type": kind}
            handling.span.set_attribute("error.type", kind)
            handling.span.set_status(StatusCode.ERROR)
        self._duration.record(time.perf_counter() - handling.started, attributes)
        context.detach(handling.token)
        handling.span.end()

    def refused(self, handler: str, message: Message, rejection: BaseException) -> None:
        self.handled(self.handling(handler, [message]), rejection)

    def stopped(self, seconds: float) -> None:
        self._shutdown.set(seconds)

    @contextmanager
    def publishing(self, messages: Sequence[OutgoingMessage]) -> Iterator[None]:
        attributes: Attributes = {**self._send, "messaging.operation.type": "send"}
        if len(messages) == 1:
            attributes["messaging.message.id"] = messages[0].id
        else:
            attributes["messaging.batch.message_count"] = len(messages)
        with self._tracer.start_as_current_span(
            f"send {self._destination}",
            kind=SpanKind.PRODUCER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            metered = self._send
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
        # In a daemon thread, as the SDK exceeds its own bounds: a collector that accepts and never
        # answers must block neither the event loop nor the interpreter's exit.
        loop, flushed = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            for provider in self._providers:
                with suppress(Exception):  # a reader that had no time left
                    provider.shutdown()
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(flushed.set)

        threading.Thread(target=flush, name="telemetry", daemon=True).start()
        try:
            async with asyncio.timeout(within_seconds):
                await flushed.wait()
        except TimeoutError:
            log.warning("telemetry_lost", reason=f"not taken within {within_seconds:.1f} s")


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
    return attributes


def span_limits(settings: ConsumerSettings) -> SpanLimits:
    """A batch has as many links as messages; the SDK silently drops links beyond 128."""
    if "OTEL_SPAN_LINK_COUNT_LIMIT" in os.environ:
        return SpanLimits()
    return SpanLimits(max_links=max(128, settings.batch_size))


def make_telemetry(service: str, settings: ConsumerSettings) -> Telemetry:
    """Reads the ``OTEL_...`` variables, and makes the providers known to all instrumentation."""
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
        return Telemetry()
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if named else {"service.name": service})
    # No shutdown at exit, the default: it would wait half a minute for an unresponsive collector.
    tracers = TracerProvider(
        resource=resource, shutdown_on_exit=False, span_limits=span_limits(settings)
    )
    if "TRACES" in signals:
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    readers = [PeriodicExportingMetricReader(OTLPMetricExporter())] if "METRICS" in signals else []
    meters = MeterProvider(readers, resource=resource, shutdown_on_exit=False)
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(meters)
    return OpenTelemetry(settings, tracers, meters)
