# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""What the consumer tells of its work, and to whom: the module beside this one, if there is one.

A new kind of telemetry is one file with a subclass of `Telemetry`, a function ``make_telemetry`` like the
one here, and its name in `KINDS`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..message import Message, OutgoingMessage
from ..settings import ConsumerSettings

if TYPE_CHECKING:
    from ..consumer import Consumer

KINDS = ("prometheus", "opentelemetry")

CLOSE_SECONDS = 2.0
"""How long `Telemetry.close` may take, unless there is less time left."""

Outcome = Literal["handled", "retried", "rejected", "abandoned"]
"""What became of a delivery: each has exactly one."""

NO_HANDLER = "none"
"""In a handler's place, for messages whose type no handler has."""


class Telemetry:
    """Counts, and tells nobody: the telemetry of a service that was made without any.

    All but `close` are called in the event loop, for each message: they must not wait, and must not raise.
    """

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, Outcome], int] = {}
        """How many messages of which handler had which outcome. All that can be are there from the start:
        a rate needs the zero before the one."""

    def watch(self, consumer: "Consumer") -> None:
        """Once, before it runs. What can be read from it at any time is not told by calls."""
        possible = product(consumer.router.types, get_args(Outcome))
        self.outcomes = dict.fromkeys(
            [*possible, (NO_HANDLER, "rejected"), (NO_HANDLER, "abandoned")], 0
        )

    def handling(self, handler: str, messages: Sequence[Message]) -> Any:
        """A handler begins; returns what `handled` needs to know of that."""

    def handled(self, handling: Any, failure: BaseException | None) -> None:
        """It has ended, in the same task. The messages are settled next."""

    def refused(self, handler: str, message: Message, rejection: BaseException) -> None:
        """No handler had it: its type is unknown (`NO_HANDLER`) or its payload invalid. It is settled next."""

    def settled(self, handler: str, outcome: Outcome) -> None:
        """One message is done with."""
        self.outcomes[handler, outcome] += 1

    def stopped(self, seconds: float) -> None:
        """The stop is over: so long after it was asked for."""

    def publishing(self, messages: Sequence[OutgoingMessage]) -> AbstractContextManager[object]:
        """Around the publishing of messages, which may get further headers."""
        return nullcontext()

    def scrape(self, accept: str) -> tuple[bytes, str] | None:
        """What ``/metrics`` answers, with its content type; None if it is not there."""
        return None

    async def close(self, within_seconds: float = CLOSE_SECONDS) -> None:
        """Send what is still to be sent, whatever listens at the other end."""


def make_telemetry(service: str, settings: ConsumerSettings) -> Telemetry:
    """The telemetry that is in this service; ``service`` is its name."""
    for kind in KINDS:
        if find_spec(f".{kind}", __name__):
            made: Telemetry = import_module(f".{kind}", __name__).make_telemetry(service, settings)
            return made
    return Telemetry()
