# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The interface between the consumer and telemetry: the consumer calls `Telemetry`, which reads a `ConsumerView`.

A new kind of telemetry is one file with a subclass of `Telemetry`, a function ``make_telemetry`` like the
one here, and its name in `KINDS`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal, Protocol, get_args

from ..message import Message, OutgoingMessage
from ..settings import ConsumerSettings

KINDS = ("prometheus", "opentelemetry")

CLOSE_SECONDS = 2.0
"""How long `Telemetry.close` may take, unless there is less time left."""

Outcome = Literal["handled", "retried", "rejected", "abandoned"]
"""How a delivery ended: each has exactly one."""

NO_HANDLER = "none"
"""Stands for the handler of a message whose type no handler has."""


State = Literal["starting", "consuming", "draining", "stopped"]


class ConsumerView(Protocol):
    """The part of a consumer that telemetry reads, whenever it is scraped or exports."""

    @property
    def handler_types(self) -> Sequence[str]: ...
    @property
    def state(self) -> State: ...
    @property
    def in_flight(self) -> Mapping[Message, str]:
        """The in-flight messages, each with its handler's name."""

    @property
    def outage_count(self) -> int:
        """How many times the broker was lost."""

    @property
    def abandoned_count(self) -> int:
        """Messages that were requeued at the drain deadline."""

    @property
    def shutdown_began_at(self) -> float | None:
        """In the event loop's time, in seconds; None before."""


class Telemetry:
    """Counts only, and exports nothing: the telemetry of a service without any.

    All methods but `close` are called in the event loop, for each message: they must not wait or raise.
    """

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, Outcome], int] = {}
        """Messages by handler and outcome. Every combination exists from the start: a rate needs the zero."""

    def watch(self, consumer: ConsumerView) -> None:
        """Called once, before the consumer runs."""
        possible = product(consumer.handler_types, get_args(Outcome))
        self.outcomes = dict.fromkeys(
            [*possible, (NO_HANDLER, "rejected"), (NO_HANDLER, "abandoned")], 0
        )

    def handling(self, handler: str, messages: Sequence[Message]) -> Any:
        """A handler starts; the result is passed to `handled`."""

    def handled(self, handling: Any, failure: BaseException | None) -> None:
        """The handler has ended, in the same task. Its messages are settled next."""

    def refused(self, handler: str, message: Message, rejection: BaseException) -> None:
        """A message that reaches no handler: unknown type (`NO_HANDLER`) or invalid payload. It is settled next."""

    def settled(self, handler: str, outcome: Outcome) -> None:
        """One message is settled."""
        self.outcomes[handler, outcome] += 1

    def stopped(self, seconds: float) -> None:
        """The drain has ended, this long after the signal."""

    def publishing(self, messages: Sequence[OutgoingMessage]) -> AbstractContextManager[object]:
        """Around the publishing of messages, to which it may add headers."""
        return nullcontext()

    def scrape(self, accept: str) -> tuple[bytes, str] | None:
        """The body of ``/metrics`` and its content type; None without that page."""
        return None

    async def close(self, within_seconds: float = CLOSE_SECONDS) -> None:
        """Export the rest, bounded in time, whatever the collector does."""


def make_telemetry(service: str, settings: ConsumerSettings) -> Telemetry:
    """The telemetry of this service, whose name is ``service``."""
    for kind in KINDS:
        if find_spec(f".{kind}", __name__):
            made: Telemetry = import_module(f".{kind}", __name__).make_telemetry(service, settings)
            return made
    return Telemetry()
