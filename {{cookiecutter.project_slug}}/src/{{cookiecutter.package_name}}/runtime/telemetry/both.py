# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Prometheus and OpenTelemetry together; or the one that is configured.

A duration on ``/metrics`` has the trace of the last sampled message in its bucket, as an exemplar of OpenMetrics.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.core import Exemplar

from ..message import Message, OutgoingMessage
from ..settings import ConsumerSettings
from . import CLOSE_SECONDS, Outcome, Telemetry, prometheus

if TYPE_CHECKING:
    from ..consumer import Consumer
    from .opentelemetry import OpenTelemetry


class HistogramWithTraces(prometheus.Histogram):
    def __init__(
        self, current_trace: Callable[[], dict[str, str] | None], bounds: Sequence[float]
    ) -> None:
        super().__init__(bounds)
        self._current_trace = current_trace
        self._exemplars: dict[int, Exemplar] = {}

    def observe(self, seconds: float) -> int:
        bucket = super().observe(seconds)
        if (trace := self._current_trace()) is not None:
            self._exemplars[bucket] = Exemplar(trace, seconds, time.time())
        return bucket

    def so_far(self) -> tuple[list[Any], float]:
        buckets, total = super().so_far()
        return [(*one, self._exemplars.get(at)) for at, one in enumerate(buckets)], total


class Both(Telemetry):
    exports = "both"

    def __init__(self, scraped: prometheus.PrometheusTelemetry, sent: "OpenTelemetry") -> None:
        super().__init__()
        self._scraped, self._sent = scraped, sent
        self._parts: tuple[Telemetry, Telemetry] = scraped, sent

    def watch(self, consumer: "Consumer") -> None:
        for part in self._parts:
            part.version, part.event_loop_lag = self.version, self.event_loop_lag
            part.watch(consumer)
        self.outcomes = self._scraped.outcomes

    def handling(self, handler: str, messages: Sequence[Message]) -> tuple[Any, Any]:
        sent = self._sent.handling(handler, messages)
        return self._scraped.handling(handler, messages), sent

    def handled(self, handling: tuple[Any, Any], failure: BaseException | None) -> None:
        self._scraped.handled(handling[0], failure)  # while the span is the current one
        self._sent.handled(handling[1], failure)

    def refused(self, handler: str, message: Message, rejection: BaseException) -> None:
        for part in self._parts:
            part.refused(handler, message, rejection)

    def failed(self, handler: str, failure: BaseException, messages: int = 1) -> str:
        self._scraped.failed(handler, failure, messages)
        return self._sent.failed(handler, failure, messages)

    def settled(self, handler: str, outcome: Outcome) -> None:
        for part in self._parts:
            part.settled(handler, outcome)

    def publishing(self, messages: Sequence[OutgoingMessage]) -> AbstractContextManager[object]:
        return self._sent.publishing(messages)

    def count_published(self, messages: Sequence[OutgoingMessage]) -> None:
        for part in self._parts:
            part.count_published(messages)

    def scrape(self, accept: str) -> tuple[bytes, str] | None:
        return self._scraped.scrape(accept)

    async def close(self, within_seconds: float = CLOSE_SECONDS) -> None:
        await self._sent.close(within_seconds)


def make_telemetry(service: str, settings: ConsumerSettings) -> Telemetry | None:
    """Both, or the configured one: by the probe port, or by the ``OTEL_...`` variables. Raises SettingsError."""
    sent = None
    if any(name.startswith("OTEL_") and name.endswith("_ENDPOINT") for name in os.environ):
        from . import opentelemetry  # imported here: the SDK's import takes as long as all others

        sent = opentelemetry.make_telemetry(service, settings)
    if sent is None or not settings.probe_port:
        return sent or prometheus.make_telemetry(service, settings)
    scraped = prometheus.PrometheusTelemetry(REGISTRY)
    scraped.histogram = partial(HistogramWithTraces, opentelemetry.current_trace)
    return Both(scraped, sent)
