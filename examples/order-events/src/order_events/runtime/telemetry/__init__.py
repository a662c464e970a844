# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The interface between the consumer and telemetry: the consumer calls `Telemetry`, which reads the consumer.

A new kind of telemetry is one file with a subclass of `Telemetry`, a function ``make_telemetry`` like the
one here, and its name in `KINDS`. It exports `Telemetry.readings`, and the two durations.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from ..message import Message, OutgoingMessage, Retry
from ..settings import TEMPLATE_VERSION, ConsumerSettings

if TYPE_CHECKING:
    from ..consumer import Consumer

KINDS = ("both", "prometheus", "opentelemetry")
"""The service uses the first of these that it has."""

CLOSE_SECONDS = 2.0
"""How long `Telemetry.close` may take, unless there is less time left."""

Outcome = Literal["handled", "retried", "rejected", "abandoned"]
"""How a delivery ended: each has exactly one."""

NO_HANDLER = "none"
"""Stands for the handler of a message whose type no handler has."""
MOST_VALUES = 50
OTHER = "_OTHER"
"""Stands for the types of errors, and the destinations, above MOST_VALUES, as in the conventions of OpenTelemetry."""

State = Literal["starting", "consuming", "draining", "stopped"]


class Reading(NamedTuple):
    """One metric, as it is now."""

    kind: Literal["counter", "gauge", "seconds", "histogram"]
    """``seconds`` is a gauge with that unit."""
    name: str
    """The name below ``consumer.``; for Prometheus, ``_`` replaces the dots, and the unit is appended."""
    meaning: str
    value: Any
    """A number, or numbers by a tuple of the labels' values; None if there is none yet."""
    labels: tuple[str, ...] = ()

    @property
    def points(self) -> Mapping[tuple[str, ...], Any]:
        found: Mapping[tuple[str, ...], Any] = self.value if self.labels else {(): self.value}
        return {labels: value for labels, value in found.items() if value is not None}


class Telemetry:
    """Counts only, and exports nothing: for a service without telemetry.

    All methods except `readings` and `close` run in the event loop, many for each message: they must not wait or raise.
    """

    exports: ClassVar[str] = "off"
    """The value in the log event `starting`: prometheus, otlp, both or off."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, Outcome], int] = {}
        """Messages by handler and outcome. Every combination exists from the start: a rate needs the zero."""
        self.failures: Counter[tuple[str, str]] = Counter()
        """Messages by handler and type of error."""
        self.published: Counter[str] = Counter()
        """Messages that handlers published, by destination."""
        self.version = "unknown"
        self.event_loop_lag: Callable[[], float] = lambda: 0.0
        """The longest lag of the last minute, in seconds."""
        self._last_at: float | None = None

    def watch(self, consumer: "Consumer") -> None:
        """Called once, before the consumer runs."""
        possible = product(consumer.router.types, get_args(Outcome))
        self.outcomes = dict.fromkeys(
            [*possible, (NO_HANDLER, "rejected"), (NO_HANDLER, "abandoned")], 0
        )

    def handling(self, handler: str, messages: Sequence[Message]) -> Any:
        """A handler starts; the result is passed to `handled`."""

    def handled(self, handling: Any, failure: BaseException | None) -> None:
        """The handler has ended, in the same task. Its messages are settled next."""

    def refused(self, handler: str, message: Message, rejection: BaseException) -> None:
        """A message reaches no handler: unknown type (`NO_HANDLER`) or invalid payload. It is settled next."""
        self.failed(handler, rejection)

    def failed(self, handler: str, failure: BaseException, messages: int = 1) -> str:
        """Count the messages of a failure; returns its type. A `Retry` is planned: not counted, without a type."""
        if isinstance(failure, Retry):
            return ""
        error = type(failure).__qualname__
        if (handler, error) not in self.failures and len(self.failures) >= MOST_VALUES:
            error = OTHER
        self.failures[handler, error] += messages
        return error

    def settled(self, handler: str, outcome: Outcome) -> None:
        """One message is settled."""
        self.outcomes[handler, outcome] += 1
        self._last_at = time.time()

    def publishing(self, messages: Sequence[OutgoingMessage]) -> AbstractContextManager[object]:
        """A context for publishing messages, to which it may add headers."""
        return nullcontext()

    def count_published(self, messages: Sequence[OutgoingMessage]) -> None:
        """The broker has confirmed these messages of a handler."""
        for message in messages:
            known = message.to in self.published or len(self.published) < MOST_VALUES
            self.published[message.to if known else OTHER] += 1

    def scrape(self, accept: str) -> tuple[bytes, str] | None:
        """The body of ``/metrics`` and its content type; None if there is no such page."""
        return None

    async def close(self, within_seconds: float = CLOSE_SECONDS) -> None:
        """Export what is left, within this time, even if the collector does not answer."""

    def readings(self, consumer: "Consumer") -> list[Reading]:
        """All metrics except the durations. May be called in another thread."""
        outcomes, failed = self.outcomes.copy(), self.failures.copy()
        published = {(destination,): count for destination, count in self.published.copy().items()}
        in_flight, now = [*consumer.in_flight], time.monotonic()
        age = now - in_flight[0].taken_at if in_flight else 0.0  # the oldest is the first
        source, abandoned = consumer.source, len(consumer.abandoned)
        outages = sum(one.connectivity.outage_count for one in source.parts)
        requeued = sum(one.requeued_count for one in source.parts)
        began_at = consumer.event.set_at
        shutdown = 0.0 if began_at is None else now - began_at
        states = {(name,): float(name == consumer.state) for name in get_args(State)}
        build = {(self.version, TEMPLATE_VERSION, consumer.settings.broker_scheme): 1.0}
        rows: list[tuple[Any, ...]] = [
            ("counter", "messages", "Deliveries by outcome.", outcomes, ("handler", "outcome")),
            ("counter", "failures", "Failures; not planned retries.", failed, ("handler", "error")),
            ("counter", "published", "Published by handlers.", published, ("destination",)),
            ("gauge", "state", "1 for the current state, 0 for the others.", states, ("state",)),
            ("gauge", "paused", "1 during a pause.", float(bool(consumer.breaker.reason))),
            ("gauge", "messages.in_flight", "In a handler, not settled yet.", len(in_flight)),
            ("seconds", "oldest_in_flight", "Age of the oldest in-flight message; 0 if none.", age),
            ("gauge", "concurrency", "Maximum concurrent handlers.", consumer.settings.concurrency),
            ("seconds", "event_loop.lag", "Longest lag in the last minute.", self.event_loop_lag()),
            ("seconds", "last_message.timestamp", "Time of the last settlement.", self._last_at),
            ("gauge", "broker.connected", "1 while connected.", float(source.connected)),
            ("counter", "reconnects", "Lost connections to the broker.", outages),
            ("counter", "messages.abandoned", "Requeued at the drain deadline.", abandoned),
            ("counter", "messages.requeued", "Requeued unhandled.", requeued),
            ("seconds", "shutdown.duration", "Time since the signal; 0 before it.", shutdown),
            ("gauge", "build_info", "Always 1.", build, ("version", "template", "broker")),
        ]
        return [Reading(*row) for row in rows]


def queue_seconds(message: Message) -> float | None:
    """How long the message waited for its first attempt; None for later ones, or without a publishing time."""
    if message.attempt > 1 or message.was_tried or not message.published_at_seconds:
        return None
    seconds = time.time() - message.published_at_seconds
    return seconds if seconds > 0 else 0.0  # negative if the clocks of two machines differ


def make_telemetry(service: str, settings: ConsumerSettings) -> Telemetry:
    """The telemetry of the service with this name. Raises SettingsError."""
    made = Telemetry()
    for kind in KINDS:
        if find_spec(f".{kind}", __name__):
            made = import_module(f".{kind}", __name__).make_telemetry(service, settings) or made
            break
    for distribution in metadata.distributions(name=service):  # none if it runs from its sources
        made.version = distribution.version
    return made
