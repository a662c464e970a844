# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Metrics for Prometheus, on ``/metrics`` of the probe port.

They are in the client library's default registry, so the service's own metrics are on the same page: a
``prometheus_client.Counter`` at the top of a handler's file is enough.

The page is built at each scrape. A message costs a few additions to plain numbers, since only the event loop uses
them: the library's own metrics take several locks for each message.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import get_args

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..message import Message
from ..settings import ConsumerSettings
from . import ConsumerView, Outcome, State, Telemetry

BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BUCKETS = [*map(str, BUCKETS_SECONDS), "+Inf"]


class PrometheusTelemetry(Telemetry, Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._registry = registry
        self._consumer: ConsumerView | None = None
        self._last_message_at = 0.0
        self._shutdown_seconds: float | None = None
        self._durations = [0] * (len(BUCKETS_SECONDS) + 1)
        self._duration_sum = 0.0
        registry.register(self)

    def watch(self, consumer: ConsumerView) -> None:
        super().watch(consumer)
        self._consumer = consumer

    def handling(self, handler: str, messages: Sequence[Message]) -> float:
        return time.perf_counter()

    def handled(self, handling: float, failure: BaseException | None) -> None:
        seconds = time.perf_counter() - handling
        self._durations[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self._duration_sum += seconds

    def settled(self, handler: str, outcome: Outcome) -> None:
        super().settled(handler, outcome)
        self._last_message_at = time.time()

    def stopped(self, seconds: float) -> None:
        self._shutdown_seconds = seconds

    def scrape(self, accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def describe(self) -> Iterator[Metric]:
        """For the registry, which would otherwise `collect` to learn the names."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        consumer = self._consumer
        if consumer is None:
            return
        messages = CounterMetricFamily(
            "consumer_messages",
            "Deliveries by handler and outcome.",
            labels=["handler", "outcome"],
        )
        for (handler, outcome), count in self.outcomes.items():
            messages.add_metric([handler, outcome], count)
        yield messages
        yield HistogramMetricFamily(
            "consumer_message_duration_seconds",
            "Duration of a handler's call, for a message or a batch.",
            list(zip(BUCKETS, accumulate(self._durations), strict=True)),
            self._duration_sum,
        )
        state = GaugeMetricFamily(
            "consumer_state", "1 for the current state, 0 for the others.", labels=["state"]
        )
        for name in get_args(State):
            state.add_metric([name], float(name == consumer.state))
        yield state
        yield GaugeMetricFamily(
            "consumer_messages_in_flight",
            "In-flight messages: delivered to a handler, not settled yet.",
            len(consumer.in_flight),
        )
        yield GaugeMetricFamily(
            "consumer_last_message_timestamp_seconds",
            "When the last message was settled, in Unix time; 0 before the first.",
            self._last_message_at,
        )
        yield CounterMetricFamily(
            "consumer_reconnects",
            "How many times the broker was lost.",
            consumer.outage_count,
        )
        yield CounterMetricFamily(
            "consumer_messages_abandoned",
            "Messages that were requeued at the drain deadline.",
            consumer.abandoned_count,
        )
        yield GaugeMetricFamily(
            "consumer_shutdown_duration_seconds",
            "Duration of the graceful shutdown, so far or in all; 0 before it.",
            self._shutdown_seconds_so_far(consumer),
        )

    def _shutdown_seconds_so_far(self, consumer: ConsumerView) -> float:
        if self._shutdown_seconds is not None:
            return self._shutdown_seconds
        began_at = consumer.shutdown_began_at
        return 0.0 if began_at is None else asyncio.get_running_loop().time() - began_at


def make_telemetry(service: str, settings: ConsumerSettings) -> Telemetry:
    """The probe port serves the metrics; without it, none are collected."""
    return PrometheusTelemetry(REGISTRY) if settings.probe_port else Telemetry()
