# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Metrics for Prometheus, on ``/metrics`` of the probe port.

They are in the client library's default registry, so the service's own metrics are on the same page: a
``prometheus_client.Counter`` at the top of a handler's file is enough.

The page is built at each scrape. A message costs a few additions to plain numbers, since only the event loop uses
them: the library's own metrics take several locks for each message.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry, core
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..message import Message
from ..settings import ConsumerSettings
from . import Reading, Telemetry, queue_seconds

if TYPE_CHECKING:
    from ..consumer import Consumer


DURATION = "Duration of a handler's call, for a message or a batch."
QUEUE = "Time from publishing to a handler's first call, where the time of publishing is known."
FAMILIES = {"counter": core.CounterMetricFamily, "histogram": core.HistogramMetricFamily}


class Histogram:
    """Durations in seconds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> int:
        """Returns the index of the bucket."""
        bucket = bisect_left(self._bounds, seconds)
        self._counts[bucket] += 1
        self._sum += seconds
        return bucket

    def so_far(self) -> tuple[list[Any], float]:
        """The buckets with their bounds, and the sum."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True)), self._sum


class PrometheusTelemetry(Telemetry, Collector):
    exports = "prometheus"

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self.histogram: Callable[[Sequence[float]], Histogram] = Histogram
        self._registry = registry

    def watch(self, consumer: "Consumer") -> None:
        super().watch(consumer)
        bounds = sorted(consumer.settings.duration_buckets)
        self._durations = {handler: self.histogram(bounds) for handler in consumer.router.types}
        self._queued = self.histogram(bounds)
        self._consumer = consumer
        self._registry.register(self)

    def handling(self, handler: str, messages: Sequence[Message]) -> tuple[str, int, float]:
        for message in messages:
            if (seconds := queue_seconds(message)) is not None:
                self._queued.observe(seconds)
        return handler, len(messages), time.perf_counter()

    def handled(self, handling: tuple[str, int, float], failure: BaseException | None) -> None:
        handler, messages, began = handling
        self._durations[handler].observe(time.perf_counter() - began)
        if failure is not None:
            self.failed(handler, failure, messages)

    def scrape(self, accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[core.Metric]:
        queue = Reading("histogram", "message.queue", QUEUE, self._queued.so_far())
        durations = {(handler,): one.so_far() for handler, one in self._durations.items()}
        duration = Reading("histogram", "message.duration", DURATION, durations, ("handler",))
        for reading in (*self.readings(self._consumer), duration, queue):
            unit = "_seconds" if reading.kind in ("seconds", "histogram") else ""
            name = f"consumer_{reading.name.replace('.', '_')}{unit}"
            family: Any = FAMILIES.get(reading.kind, core.GaugeMetricFamily)
            metric = family(name, reading.meaning, labels=reading.labels)
            for labels, value in reading.points.items():
                metric.add_metric(labels, *(value if reading.kind == "histogram" else [value]))
            yield metric


def make_telemetry(service: str, settings: ConsumerSettings) -> PrometheusTelemetry | None:
    """The probe port serves the metrics; without the port, none are collected."""
    return PrometheusTelemetry(REGISTRY) if settings.probe_port else None
