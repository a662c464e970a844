# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The interfaces of a broker: `Source` for the consumer, `Publisher` and `DeadLetters` for the commands.

One class may implement all three, as `Broker` does. `Source` carries what a graceful shutdown promises on every
broker: each delivery is settled once, ``stop`` requeues every message that no worker took, and each settlement
that cannot reach the broker is one ``settlement_lost`` in the log. How settlements are written is each broker's own.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import structlog

from ..cancellation import cancellable_sleep
from ..errors import BrokerError, BrokerRefused, BrokerUnavailable
from ..message import DeadLetter, Message, OutgoingMessage
from ..ordering import OrderedBuffer, key_reader
from ..settings import ConsumerSettings
from .buffer import Buffer
from .put_off import PutOffs, backoff_seconds

log = structlog.get_logger()

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 5.0
"""Between two attempts to reach a broker during an outage."""
REFUSAL_SECONDS = 60.0
"""How often a login that is refused in an outage is logged at warning: somebody has to act."""
MISSING = "does not exist"
"""What `Connected.describe` says of a queue, topic, stream or table that is not there."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The abilities of a broker. One that it lacks is declared here, never silently emulated."""

    delayed_retry: bool
    """`Source.retry` delivers the message again after its delay; else at once."""
    attempts: bool
    """``attempt`` counts failures, also across processes."""
    requeue: bool
    """A message that shutdown requeues goes to another consumer at once."""
    dead_letters: bool
    """Rejected messages are stored, and can be listed, replayed and purged."""
    order: bool
    """One consumer with a prefetch of 1 gets messages in the order of publishing, except retries."""
    retains_before_first_consumer: bool = True
    """The broker stores messages that are published before a consumer has ever started."""
    competing_consumers: bool = True
    """A waiting message goes to any consumer with room; else consumers have fixed shares, or buffer it at once."""
    queue_metrics: bool = True
    """The broker reports the number of waiting messages and of consumers."""


class Connected(ABC):
    """An open connection to one queue (stream, topic) of one broker, as an async context manager."""

    capabilities: ClassVar[Capabilities]
    connectivity: "Connectivity"
    """Made by each subclass, with the broker's address."""
    largest_body_bytes: ClassVar[int | None] = None
    """Any body up to this length can be published, whatever is in it. None: only memory limits it."""

    def __init__(self, settings: ConsumerSettings) -> None:
        self.settings = settings

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Connect once; creates nothing. Raises BrokerUnavailable or BrokerRefused; leaves nothing open if it does."""

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None:
        """Flush settlements, then close. Bounded in time, whatever the broker does."""

    @abstractmethod
    async def declare(self) -> None:
        """Make the part of the topology that is missing. Raises as `__aenter__`; may be called again."""

    @abstractmethod
    async def describe(self) -> dict[str, int | str]:
        """The topology and its counts, for `check`: name to number, text or `MISSING`. Raises as `__aenter__`."""


class Publisher(Connected):
    @abstractmethod
    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        """Publish to this queue; returns when the broker has confirmed every message."""


class DeadLetters(Connected):
    @abstractmethod
    def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        """The oldest dead letters, which stay where they are."""

    @abstractmethod
    async def count_dead_letters(self) -> int: ...

    @abstractmethod
    def replay_dead_letters(self) -> AsyncIterator[int]:
        """Move the present dead letters back to the queue, as new messages with attempt 1.

        Yields the number moved so far, after each confirmed step.
        """

    @abstractmethod
    def purge_dead_letters(self) -> AsyncIterator[int]:
        """Delete all dead letters. Yields the number deleted so far, after each step."""


class Source(Connected):
    """One queue to consume, and an iterator that many workers share. Used once.

    Life: ``async with source`` connects; `declare` makes the topology; `start` asks for deliveries; `stop`
    ends them and requeues the messages that no worker took; leaving the context flushes settlements and closes.

    Each delivery is settled once, by `ack`, `retry`, `reject` or `requeue`, which also updates the buffer. When the
    broker has taken the delivery back, settling logs ``settlement_lost`` and returns: the broker delivers it again.
    A retry or a dead letter that cannot be stored is put off: see `_put_off`.
    """

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings)
        self.prefetch = prefetch
        """How many deliveries may be unacked at a time, in the buffer and in flight together."""
        order_by = settings.order_by
        self.buffer = OrderedBuffer(key_reader(order_by)) if order_by else Buffer()
        self.unacked: set[Message] = set()
        """Delivered to this process, and not settled yet."""
        self.in_flight: Collection[Message] = ()
        """Those that handlers work on, also when the broker has taken their delivery back. The consumer sets it."""
        self.put_offs = PutOffs(self._is_held, self._release, self.buffer.put, self._try_to_store)
        """Messages whose retry or dead letter the broker did not store."""
        self.requeued_count = 0
        """How many messages `stop` and `requeue` requeued."""
        self.stopped = False
        """Whether `stop` was called: later deliveries are requeued."""

    # -- taking

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[Message]:
        return self.buffer.get()

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether deliveries can arrive now; False during an outage."""

    @property
    def outage_count(self) -> int:
        """How many times the broker was lost since the start."""
        return self.connectivity.outage_count

    @abstractmethod
    async def start(self) -> None:
        """Ask the broker for deliveries, until `stop`; after an outage they resume without another call.

        Raises BrokerUnavailable or BrokerRefused; after the former it may be called again.
        """

    async def stop(self) -> None:
        """End deliveries, and requeue at once every message that no worker took. Bounded in time.

        In-flight messages can still be settled.
        """
        if self.stopped:
            return
        self.stopped = True
        await self._stop_fetching()
        for message in [*self.buffer.take_all(), *await self.put_offs.end()]:
            if self._lost_because(message):
                self._release(message)
            else:
                await self.requeue(message)
        self.buffer.close()
        await self._flush()

    @abstractmethod
    async def _stop_fetching(self) -> None:
        """Tell the broker that no more deliveries are wanted, and wait for its answer. Bounded in time."""

    async def _flush(self) -> None:
        """Wait until every requeue has reached the broker. Bounded in time."""

    def _deliver(self, message: Message) -> bool:
        """Offer a delivery to the workers; False after `stop`: then the fetcher must requeue it."""
        self.unacked.add(message)
        if not self.stopped:
            self.buffer.put(message)
        return not self.stopped

    def _is_held(self, message: Message) -> bool:
        return message in self.unacked and not self._lost_because(message)

    def _some_in_flight_is_lost(self) -> bool:
        """Whether `_still_in_flight` can find one: to ask once for many deliveries."""
        return not all(map(self._is_held, self.in_flight))

    def _still_in_flight(self, message: Message) -> Message | None:
        """The message that a handler works on, if this is a redelivery of it: the handler then settles this delivery."""
        for known in self.in_flight:
            same = (known.id, known.type, known.body) == (message.id, message.type, message.body)
            if same and not self._is_held(known):
                known.receipt = message.receipt
                self.unacked.add(known)
                return known
        return None

    def _release(self, message: Message) -> None:
        """The message is settled, or the broker has taken it back. May be called again for the same message."""
        self.unacked.discard(message)
        if self.put_offs.reason:
            self.put_offs.forget(message)

    async def _next_held(self) -> Message:
        """For ``__anext__`` of brokers that take deliveries back: skips deliveries that the broker has taken back."""
        while True:
            message = await self.buffer.get()
            if not self._lost_because(message):
                return message
            self._release(message)
            self.buffer.settled(message)

    # -- settling

    def ack(self, message: Message) -> Coroutine[Any, Any, None]:
        """Acknowledge the message. May be sent later, together with others."""
        # No coroutine of its own: this runs for each message.
        self.buffer.settled(message)
        if not self._holds(message, "ack"):
            return _nothing()
        self._release(message)
        return self._ack(message)

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        """Deliver the message again after the delay, with ``attempt`` one higher."""
        if self._holds(message, "retry"):
            await self._try_to_store(message, "retry", reason, delay_seconds)
        self.buffer.settled(message)

    async def reject(self, message: Message, reason: str) -> None:
        """Make the message a dead letter."""
        if self._holds(message, "reject"):
            await self._try_to_store(message, "reject", reason, 0.0)
        self.buffer.settled(message)

    async def _try_to_store(
        self, message: Message, settlement: str, reason: str, delay_seconds: float
    ) -> None:
        try:
            if settlement == "retry":
                await self._retry(message, delay_seconds, reason)
            else:
                await self._reject(message, reason)
        except BrokerError as error:
            await self._put_off(message, settlement, error, reason, delay_seconds)
        else:
            self._release(message)

    async def requeue(self, message: Message) -> None:
        """Requeue the message unhandled: ready for other consumers at once, with the same ``attempt``."""
        if self._holds(message, "requeue"):
            self._release(message)
            self.requeued_count += 1
            await self._requeue(message)
        self.buffer.settled(message)

    @abstractmethod
    async def _ack(self, message: Message) -> None: ...

    @abstractmethod
    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None: ...

    @abstractmethod
    async def _reject(self, message: Message, reason: str) -> None: ...

    @abstractmethod
    async def _requeue(self, message: Message) -> None: ...

    def _holds(self, message: Message, settlement: str) -> bool:
        """Whether the message can be settled; if not, that is logged."""
        if not (reason := self._lost_because(message)) and message in self.unacked:
            return True
        self._release(message)
        reason = reason or "it was settled before, or the broker has taken it back"
        log_settlement_lost(message, settlement, reason)
        return False

    def _lost_because(self, message: Message) -> str:
        """Why the broker has taken this delivery back, as a connection or a lease ends; else empty."""
        return ""

    async def _move(
        self,
        message: Message,
        settlement: str,
        publishing: Awaitable[object],
        settle: Callable[[Message], Awaitable[None]] | None = None,
    ) -> None:
        """Retry or reject by publishing first: the message is acked when the broker has confirmed the copy.

        A crash in between makes a duplicate, never a loss. Raises as the publishing does.
        ``settle`` is used in place of the ack.
        """
        await publishing
        # If it was requeued, that happened meanwhile, at the deadline.
        requeued = message not in self.unacked and not self._lost_because(message)
        if not requeued and self._holds(message, settlement):
            self._release(message)
            await (settle or self._ack)(message)

    async def _put_off(
        self,
        message: Message,
        settlement: str,
        error: BrokerError,
        reason: str,
        delay_seconds: float = 0.0,
    ) -> None:
        """The broker did not store a retry or a dead letter of this message: try again later, unless it stops."""
        log_settlement_lost(message, settlement, error)
        if not self._is_held(message):
            self._release(message)
        elif self.stopped:
            await self.requeue(message)
        else:
            why = f"a message could not be stored ({settlement}): {error}"
            self.put_offs.add(message, why, settlement, reason, delay_seconds)


class Broker(Source, Publisher, DeadLetters):
    """All three on one connection."""


class Connectivity:
    """Whether the broker can be reached: logs each change once, and keeps trying through outages."""

    def __init__(self, address: str) -> None:
        self.address = address
        """The broker's, without credentials."""
        self.up = False
        self.reason = ""  # of the outage
        self.outage_count = self._failures = 0
        self._refusal_due_at = 0.0

    def established(self) -> None:
        self._failures = 0
        if not self.up:
            self.up = True
            log.info("connected", broker=self.address)

    def lost(self, reason: object) -> None:
        self.reason = str(reason)
        refused = isinstance(getattr(reason, "__cause__", None), BrokerRefused)
        if self.up or (refused and time.monotonic() > self._refusal_due_at):
            self._refusal_due_at = time.monotonic() + refused * REFUSAL_SECONDS
            self.outage_count += self.up
            self.up = False
            log.warning("reconnecting", broker=self.address, reason=self.reason)
        else:
            log.debug("reconnect_failed", broker=self.address, reason=self.reason)

    async def keep(self, work: Callable[[], Awaitable[None]], until: asyncio.Event) -> None:
        """Repeat the work until the event is set; after BrokerUnavailable with growing pauses.

        The work calls `established` once it is connected. It is not cancelled; other exceptions pass through.
        """
        while not until.is_set():
            try:
                await work()
            except BrokerUnavailable as outage:
                self.lost(outage)
                self._failures += 1
                pause = backoff_seconds(self._failures, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
                await cancellable_sleep(pause, until)


async def _nothing() -> None:
    """A settlement that is already logged as lost."""


def log_settlement_lost(message: Message, settlement: str, reason: Any) -> None:
    """The broker does not know how the message was settled, and will deliver it again."""
    log.warning("settlement_lost", id=message.id, settlement=settlement, reason=str(reason))
