# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""Metrics for Prometheus, on ``/metrics`` of the probe port.

They are in the client library's default registry, so the service's own metrics are on the same page: a
``prometheus_client.Counter`` at the top of a handler's file is enough.

All is put together when somebody scrapes. A message costs a few additions to plain numbers, which is enough as
only the event loop uses them: the library's own metrics take locks, for each message several.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

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
from . import Outcome, Telemetry

if TYPE_CHECKING:
    from ..consumer import Consumer

BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BUCKETS = [*map(str, BUCKETS_SECONDS), "+Inf"]


class PrometheusTelemetry(Telemetry, Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._registry = registry
        self._consumer: Consumer | None = None
        self._last_message_at = 0.0
        self._shutdown_seconds: float | None = None
        self._durations = [0] * (len(BUCKETS_SECONDS) + 1)
        self._duration_sum = 0.0
        registry.register(self)

    def watch(self, consumer: "Consumer") -> None:
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
        """For the registry, so that it need not `collect` to know the names."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        consumer = self._consumer
        if consumer is None:
            return
        messages = CounterMetricFamily(
            "consumer_messages",
            "Deliveries by what became of them.",
            labels=["handler", "outcome"],
        )
        for (handler, outcome), count in self.outcomes.items():
            messages.add_metric([handler, outcome], count)
        yield messages
        yield HistogramMetricFamily(
            "consumer_message_duration_seconds",
            "How long a handler took, for a message or for a batch.",
            list(zip(BUCKETS, accumulate(self._durations), strict=True)),
            self._duration_sum,
        )
        state = GaugeMetricFamily(
            "consumer_state", "1 for the state it is in, 0 for the others.", labels=["state"]
        )
        for name in consumer.states:
            state.add_metric([name], float(name == consumer.state))
        yield state
        yield GaugeMetricFamily(
            "consumer_messages_in_flight", "Messages in hand.", len(consumer.in_flight)
        )
        yield GaugeMetricFamily(
            "consumer_last_message_timestamp_seconds",
            "When the last message was done with, in Unix time; 0 before the first.",
            self._last_message_at,
        )
        yield CounterMetricFamily(
            "consumer_reconnects",
            "How often the broker was lost, and connected to again.",
            consumer.source.outage_count,
        )
        yield CounterMetricFamily(
            "consumer_messages_abandoned",
            "Messages that went back to the broker as the drain time had passed.",
            consumer.abandoned_count,
        )
        yield GaugeMetricFamily(
            "consumer_shutdown_duration_seconds",
            "How long the stop has taken, so far or in all; 0 before it.",
            self._seconds_since_stop(consumer),
        )

    def _seconds_since_stop(self, consumer: "Consumer") -> float:
        if self._shutdown_seconds is not None:
            return self._shutdown_seconds
        set_at = consumer.event.set_at
        return 0.0 if set_at is None else asyncio.get_running_loop().time() - set_at


def make_telemetry(service: str, settings: ConsumerSettings) -> Telemetry:
    """Nothing is counted when there is no port to ask on."""
    return PrometheusTelemetry(REGISTRY) if settings.probe_port else Telemetry()
