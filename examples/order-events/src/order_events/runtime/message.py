# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The message as a handler sees it, what it can publish, and the three exceptions by which it settles the message."""

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic_core import to_json

LONGEST_DELAY_SECONDS = 14 * 86_400.0
"""The longest retention of SQS."""


class Retry(Exception):
    """Raised by a handler: deliver this message again later.

    ``delay_seconds``, at most two weeks, overrides the backoff. The attempt counts towards ``CONSUMER_MAX_ATTEMPTS``.
    During shutdown, without ``delay_seconds``, no attempt is counted and the message is requeued at once.
    """

    def __init__(self, reason: str = "", *, delay_seconds: float | None = None) -> None:
        super().__init__(reason)
        if delay_seconds is not None:
            if delay_seconds > LONGEST_DELAY_SECONDS:
                msg = f"{type(self).__name__}: a delay of {delay_seconds:g} seconds exceeds the maximum, {LONGEST_DELAY_SECONDS:g}"
                raise ValueError(msg)
            # A computed delay may be negative or not a number.
            delay_seconds = max(0.0, delay_seconds)
        self.delay_seconds = delay_seconds


class Pause(Retry):
    """Raised by a handler when a dependency is down, for every message.

    No attempt is counted. The service takes no message for ``seconds``, then tries one, and resumes if it succeeds.
    """

    def __init__(self, seconds: float, reason: str = "") -> None:
        super().__init__(reason, delay_seconds=seconds)  # checks the delay
        self.seconds, self.delay_seconds = self.delay_seconds or 0.0, None


REASON_CHARACTERS = 500
"""The length to which a reason is cut."""


class Reject(Exception):
    """Raised by a handler: the message becomes a dead letter with this reason, without another attempt."""


class Failed(NamedTuple):
    """Returned by a batch handler: this message of the batch failed, as if its own handler had raised this."""

    message: "Message"
    failure: Exception


@dataclass(slots=True)
class OutgoingMessage:
    """A message to publish.

    A handler returns it, or several: they are published, and confirmed, before its own message is acknowledged. Without
    an ``id`` it gets one that is derived from the handler's message: published twice, it has the same id twice.
    """

    body: Any
    """Bytes are sent unchanged; anything else that pydantic can serialize, such as a model, becomes JSON."""
    type: str = ""
    id: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict)
    to: str = ""
    """The destination, such as ``queue:invoices``: see the page of the broker. A handler must set it; only the command `publish` leaves it empty, for the service's own source."""
    key: str = ""
    """Selects the partition on Kafka, or the message group of an SQS FIFO queue."""
    correlation_id: str = ""
    """By default the correlation id of the incoming message, or its id if it has none."""
    content_type: str = ""
    delay_seconds: float = 0.0
    """Only if the broker can delay a message: see `Capabilities.delayed_publish`."""
    caused_by: "Message | None" = None
    """In a batch, the incoming message to which it belongs: its id is derived from that one's, and only that one fails if it cannot be sent."""
    has_random_id: bool = field(init=False)

    def __post_init__(self) -> None:
        self.has_random_id = not self.id
        self.id = self.id or uuid.uuid4().hex
        if not isinstance(self.body, bytes):
            self.body = to_json(self.body)
            self.content_type = self.content_type or "application/json"


@dataclass
class HandlerContext:
    """Shared by the messages of one process: its shutdown, the time left, and how to publish."""

    event: asyncio.Event
    drain_seconds: float = math.inf
    publish: "Callable[[Message, list[OutgoingMessage]], Awaitable[None]] | None" = None
    deadline: float | None = None  # time.monotonic(), set when the drain begins

    def seconds_left(self) -> float:
        if self.deadline is None:
            return self.drain_seconds
        return max(0.0, self.deadline - time.monotonic())  # a clock that threads can read


@dataclass(slots=True, eq=False)
class Message:
    """One delivery. ``attempt`` is 1 at the first delivery; only failures count, not redeliveries."""

    body: bytes
    id: str = ""
    type: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1
    published_at_seconds: float = 0.0  # Unix time; 0 if unknown
    origin: Mapping[str, Any] = field(default_factory=dict)
    """The message's origin, such as exchange and routing_key, subject, or topic, partition and offset."""
    receipt: Any = None  # the broker's own handle of this delivery, for its source only
    key: str = ""
    content_type: str = ""
    content_encoding: str = ""
    correlation_id: str = ""
    reply_to: str = ""
    handler: str = ""  # the key in HANDLERS of its handler
    taken_at: float = 0.0  # when a worker took it; time.monotonic()
    call: Any = None  # its handler's call: see `limits.Call`
    source: Any = None  # the source that delivered it
    context: HandlerContext | None = None
    deliveries: int = 1
    """1, and one more for each delivery that ended with neither a settlement nor a shutdown, as by a crash."""
    published_count: int = 0  # by its handler: the id of each message contains this number
    was_tried: bool = False
    """Whether this process has called its handler without counting an attempt."""

    @property
    def published_at(self) -> datetime | None:
        """The time of publishing, by the clock of the publisher or of the broker; None if it is unknown."""
        seconds = self.published_at_seconds
        return datetime.fromtimestamp(seconds, UTC) if seconds else None

    @property
    def stopping(self) -> asyncio.Event:
        """Set on shutdown: finish soon, or save your progress and raise `Retry`."""
        if self.context is None:
            self.context = HandlerContext(asyncio.Event())
        return self.context.event

    def seconds_left(self) -> float:
        """Seconds until the handler is cancelled, by its time limit or by the drain time, which starts to run with a shutdown."""
        drain = math.inf if self.context is None else self.context.seconds_left()
        return min(drain, max(0.0, getattr(self.call, "ends_at", math.inf) - time.monotonic()))

    async def publish(self, *messages: OutgoingMessage) -> None:
        """Publish at once; returns when the broker has confirmed all. Raises BrokerError.

        For what must not wait for the end of the handler; what a handler returns is published if it succeeds only.
        """
        if self.context is None or self.context.publish is None:
            raise RuntimeError("publish() needs a message that the consumer delivered")
        await self.context.publish(self, [*messages])


@dataclass(slots=True, eq=False)
class DeadLetter(Message):
    """A message that was rejected, or failed too often; a replay delivers the same message."""

    reason: str = ""
    attempts: int = 0
    """How many attempts failed."""
    dead_lettered_at: float = 0.0
    """Unix time in seconds."""
