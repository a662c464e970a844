# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The message as a handler sees it, and the two exceptions by which the handler settles it."""

import asyncio
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LONGEST_DELAY_SECONDS = 14 * 86_400.0
"""SQS keeps no message longer."""


class Retry(Exception):
    """Raised by a handler: deliver this message again later.

    ``delay_seconds``, at most two weeks, overrides the back-off. The attempt counts towards ``CONSUMER_MAX_ATTEMPTS``.
    During shutdown, without ``delay_seconds``, no attempt is counted and the message is requeued at once.
    """

    def __init__(self, reason: str = "", *, delay_seconds: float | None = None) -> None:
        super().__init__(reason)
        if delay_seconds is not None:
            if delay_seconds > LONGEST_DELAY_SECONDS:
                msg = f"Retry: delay_seconds is {delay_seconds:g}, and at most {LONGEST_DELAY_SECONDS:g}"
                raise ValueError(msg)
            delay_seconds = max(
                0.0, delay_seconds
            )  # a computed one may be negative or not a number
        self.delay_seconds = delay_seconds


REASON_CHARACTERS = 500
"""The length to which a reason is cut."""


class Reject(Exception):
    """Raised by a handler: the message becomes a dead letter with this reason, without another attempt."""


class Shutdown:
    """The shutdown as the consumer and the handlers see it: its event, and the time left."""

    def __init__(self, event: asyncio.Event, drain_seconds: float = math.inf) -> None:
        self.event = event
        self.drain_seconds = drain_seconds
        self.deadline: float | None = None  # time.monotonic(), set when the drain begins

    def seconds_left(self) -> float:
        if self.deadline is None:
            return self.drain_seconds
        return max(0.0, self.deadline - time.monotonic())  # also for handlers in a thread


@dataclass(slots=True, eq=False)
class Message:
    """One delivery. ``attempt`` is 1 at the first delivery; only failures count, not redeliveries."""

    body: bytes
    id: str = ""
    type: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1
    receipt: Any = None
    """The broker's own handle of this delivery, for its source only."""
    shutdown: Shutdown | None = None

    @property
    def stopping(self) -> asyncio.Event:
        """Set on shutdown: finish soon, or save your progress and raise `Retry`."""
        if self.shutdown is None:
            self.shutdown = Shutdown(asyncio.Event())
        return self.shutdown.event

    def seconds_left(self) -> float:
        """Seconds until the handler is cancelled and the message requeued; the whole drain time before shutdown."""
        return math.inf if self.shutdown is None else self.shutdown.seconds_left()


@dataclass(slots=True)
class OutgoingMessage:
    """A message to publish. It gets a new id when it has none."""

    body: bytes
    type: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    headers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class DeadLetter:
    """A message that was rejected, or failed too often. ``attempts`` is how often a handler failed on it."""

    body: bytes
    id: str
    type: str
    reason: str
    attempts: int
    dead_lettered_at: float
    """Unix time in seconds."""
