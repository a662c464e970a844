# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The interfaces of a broker: `Publisher`, `Source` for the consumer, and `DeadLetters` for the commands.

A source also publishes the messages that handlers return; `Broker` is all three. `Source` implements the shutdown for
every broker: each delivery is settled once, ``stop`` requeues every message that no worker took, and each settlement
that cannot reach the broker is logged once as ``settlement_lost``. Each broker writes settlements in its own way.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, Self

import structlog

from ..errors import BrokerRefused
from ..message import Message, OutgoingMessage
from ..ordering import Gate, OrderedBuffer
from ..settings import ConsumerSettings
from ..suspects import Suspects
from .buffer import Buffer
from .connectivity import Connectivity
from .dead_letters import DeadLetters
from .delivery import MadeUpId, text_of, value_reader
from .put_off import PutOffs

log = structlog.get_logger()

MOST_BYTES = 48 * 2**20
"""The limit for all unacked bodies of this process, where the source chooses how many messages to request."""
MISSING = "does not exist"
"""The description of a queue, topic, stream or table that does not exist, in `Connected.describe`."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The abilities of a broker. One that it lacks is declared as False, never silently emulated."""

    delayed_retry: bool = True
    """`Source.retry` delivers the message again after its delay; otherwise at once."""
    attempts: bool = True
    """``attempt`` counts failures, also across processes."""
    requeue: bool = True
    """A message that shutdown requeues goes to another consumer at once."""
    dead_letters: bool = True
    """Rejected messages are stored, and can be listed, replayed and purged."""
    order: bool = True
    """One consumer with a prefetch of 1 gets messages in the order of publishing, except retries."""
    retains_before_first_consumer: bool = True
    """The broker stores messages that are published before a consumer has ever started."""
    competing_consumers: bool = True
    """A waiting message goes to any consumer with room; otherwise consumers have fixed shares, or buffer it at once."""
    counts_crashes: bool = True
    """``deliveries`` counts crashes, so that a message that kills its process becomes a dead letter."""
    delayed_publish: bool = False
    """A message can be published with ``delay_seconds``."""
    queue_metrics: bool = True
    """The broker reports the number of waiting messages and of consumers."""


class Connected(ABC):
    """An open connection to one queue (stream, topic) of one broker, as an async context manager."""

    capabilities: ClassVar[Capabilities]
    connectivity: Connectivity
    """Made by each subclass, with the broker's address."""
    largest_body_bytes: ClassVar[int | None] = None
    """The longest body that can be published, with any bytes. None: only memory limits it."""

    def __init__(self, settings: ConsumerSettings) -> None:
        self.settings = settings

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Connect once, and create nothing. Raises BrokerUnavailable or BrokerRefused, and then leaves nothing open."""

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None:
        """Flush settlements, then close. Bounded in time, even if the broker does not answer."""

    @abstractmethod
    async def declare(self) -> None:
        """Create the missing part of the topology. Raises as `__aenter__`; may be called again."""

    async def prepare(self) -> None:
        """`declare`, or with CONSUMER_DECLARE=no check that the topology exists. Raises as `__aenter__`."""
        if self.settings.declare:
            return await self.declare()
        missing = [name for name, value in (await self.describe()).items() if value == MISSING]
        if missing:
            msg = f"{self.connectivity.address}: {', '.join(missing)} {MISSING}: run `declare`, or set CONSUMER_DECLARE=yes"
            raise BrokerRefused(msg)

    async def delete(self) -> None:  # noqa: B027 # some brokers keep nothing
        """Delete what `declare` has created, and its messages. Only a rehearsal calls this, on a source of its own."""

    @abstractmethod
    async def describe(self) -> dict[str, int | str]:
        """The topology and its counts, for `check`: name to number, text or `MISSING`. Raises as `__aenter__`."""


class Publisher(Connected):
    destinations: ClassVar[Mapping[str, str]]
    """The syntax of each kind of destination: ``{"queue": "queue:NAME"}``. A source can consume the first kind."""

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        """Publish each message to its destination; returns when the broker has confirmed every one.

        Raises BrokerUnavailable, or BrokerRefused: a destination that does not exist or is full, or a message that the
        broker does not take. Then some of the messages may be published.
        """
        for message in messages:
            self.destination_of(message)
        await self._publish_all(messages)

    @abstractmethod
    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        """As `publish`, with destinations that were checked."""

    def destination_of(self, message: OutgoingMessage) -> tuple[str, str]:
        """The kind and the name of the destination; by default this source. Raises BrokerRefused for a wrong one."""
        kind, _, name = message.to.partition(":")
        problem = ""
        if message.delay_seconds and not self.capabilities.delayed_publish:
            problem = "this broker cannot delay a message: publish it without delay_seconds"
        if not message.to:
            kind, name = next(iter(self.destinations)), self.settings.sources[0]
        elif not (kind in self.destinations and name):
            known = ", ".join(self.destinations.values())
            problem = f"unknown destination {message.to[:200]!r}; known are {known}"
        if problem:
            raise BrokerRefused(f"{self.connectivity.address}: {problem}")
        return kind, name


class Source(Publisher):
    """One queue to consume, and an iterator that many workers share. Used once.

    Life: ``async with source`` connects; `declare` makes the topology; `start` asks for deliveries; `stop`
    ends them and requeues the messages that no worker took; leaving the context flushes settlements and closes.

    Each delivery is settled once, by `ack`, `retry`, `reject` or `requeue`, which also updates the buffer. When the
    broker has taken the delivery back, settling logs ``settlement_lost`` and returns: the broker delivers it again.
    A retry or a dead letter that cannot be stored is put off: see `_put_off`.
    """

    origins: ClassVar[Collection[str]] = ()
    """The parts of `Message.origin` that CONSUMER_TYPE_FROM may name."""
    longest_hold_seconds: ClassVar = math.inf
    """During a pause, buffered messages are requeued at this interval."""
    has_patterns = False  # whether a source may be a pattern, such as ``^orders.*``
    bounds_bytes = True  # whether a source requests fewer messages if they are large; otherwise always the prefetch
    acks_late = False  # whether an ack is sent without asking `_lost_because`

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings)
        self.prefetch = prefetch
        """How many deliveries may be unacked at a time, in the buffer and in flight together."""
        order_by, most = settings.order_by, settings.max_body_bytes or math.inf
        self.buffer = OrderedBuffer(Gate(value_reader(order_by, most))) if order_by else Buffer()
        self._large_bytes = settings.max_body_bytes or 2**20
        """The size of the largest recent body; at first an estimate."""
        self.unacked: set[Message] = set()
        """Delivered to this process, and not settled yet."""
        self.in_flight: Iterable[Message] = ()
        """The messages that handlers work on, even if the broker has taken the delivery back. The consumer sets it."""
        # A lambda, because `Several` and `Limits` replace the buffer later.
        self.put_offs = PutOffs(
            self._is_held, self._release, lambda one: self.buffer.put(one), self._try_to_store
        )
        """Messages whose retry or dead letter the broker did not store."""
        self.requeued_count = 0
        """How many messages `stop` and `requeue` requeued."""
        self.suspects = Suspects(settings)
        """Messages that may crash the process. If the broker counts requeues too, `_requeue` restarts their count."""
        self.stopped = self.ended = False
        """Whether `stop` was called, and whether it has begun to requeue: then later deliveries are requeued, too."""
        self.parts: Sequence[Source] = [self]
        """All sources of this process, if there are several; ``share_count`` is their number."""
        self.share_count = 1
        place = settings.type_from
        if place and ":" not in place and place not in self.origins:
            known = ", ".join((*self.origins, "header:NAME", "body:FIELD"))
            raise BrokerRefused(f"CONSUMER_TYPE_FROM: this broker has no {place}; it has {known}")
        self._type_of = value_reader(place, most) if place else None
        if settings.source.startswith("^") and not self.has_patterns:
            msg = f"CONSUMER_SOURCE: {settings.source!r} is a pattern, which only Kafka has"
            raise BrokerRefused(msg)
        if settings.bindings and "exchange" not in self.destinations:
            raise BrokerRefused("CONSUMER_BINDINGS: this broker has no bindings")

    # -- taking

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Message]:
        return self.buffer.get()

    @property
    def connected(self) -> bool:
        """Whether deliveries can arrive now; False during an outage."""
        return self.connectivity.up

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
        self.ended = True
        await self.requeue_buffered(*await self.put_offs.end())
        self.buffer.close()
        await self.flush()

    async def requeue_buffered(self, *others: Message) -> None:
        """Requeue every message that no worker took, and ``others``."""
        messages = [*others, *self._take_back()]
        for lost in [one for one in messages if not self._is_held(one)]:
            self._release(lost)
        # Concurrently, so that one time limit bounds the requests that some brokers await for each message.
        await asyncio.gather(*map(self.requeue, filter(self._is_held, messages)))

    @abstractmethod
    async def _stop_fetching(self) -> None:
        """Tell the broker that no more deliveries are wanted, and wait for its answer. Bounded in time."""

    async def flush(self) -> None:
        """Wait until every settlement has reached the broker. Bounded in time."""

    async def begin_alone(self, message: Message) -> None:
        """Record that this suspect's handler begins, where the broker may redeliver other waiting suspects first."""

    def _is_ours(self, message: Message) -> bool:
        return message.source is self

    def _has_takeable(self) -> bool:
        return self in map(attrgetter("source"), self.buffer.takeable)  # runs for each message

    def _take_back(self) -> list[Message]:
        """Remove the messages of this source that no handler has yet, and return them."""
        messages = self.buffer.take_all()
        for other in messages:
            if other.source is not self:
                self.buffer.put(other)
        aside = [*filter(self._is_ours, self.suspects.waiting)]
        self.suspects.waiting = [one for one in self.suspects.waiting if not self._is_ours(one)]
        for suspect in aside:
            self.buffer.settled(suspect)  # it has passed the gates
        return [*aside, *filter(self._is_ours, messages)]

    def _room(self) -> int:
        """How many messages to ask the broker for, where it lets us choose."""
        known = self.share_count * self._large_bytes
        most = MOST_BYTES // known if self.bounds_bytes else self.prefetch
        return min(self.prefetch, most or 1) - len(self.unacked)

    def _deliver(self, *messages: Message) -> bool:
        """Offer deliveries to the workers. Returns False once `stop` requeues: then the fetcher must requeue them."""
        for message in messages:
            if self._type_of is not None:
                self._complete(message)
            message.source = self
            if "source" not in message.origin:
                message.origin = {**message.origin, "source": self.settings.source}
            size, shrunk = len(message.body), self._large_bytes - (self._large_bytes >> 2)
            self._large_bytes = size if size > shrunk else shrunk
        self.unacked.update(messages)
        if not self.ended:
            for message in messages:
                self.buffer.put(message)
        return not self.ended

    async def _deliver_fetched(self, messages: Sequence[Message]) -> None:
        """Deliver or requeue the messages, except redeliveries of in-flight messages, whose handlers settle them."""
        known = (*self.in_flight, *self.suspects.waiting)
        if not all(map(self._is_held, filter(self._is_ours, known))):
            messages = [one for one in messages if not self._still_in_flight(one)]
        if not self._deliver(*messages):
            for message in messages:
                await self.requeue(message)

    def _complete(self, message: Message) -> None:
        """Give a message without a type the type that CONSUMER_TYPE_FROM names."""
        if not message.type and self._type_of is not None:
            message.type = text_of(self._type_of(message))

    def _is_held(self, message: Message) -> bool:
        return message in self.unacked and not self._lost_because(message)

    def _still_in_flight(self, message: Message) -> Message | None:
        """The message that a handler works on, if this is its redelivery: the handler then settles this delivery."""
        self._complete(message)
        for known in (*self.in_flight, *self.suspects.waiting):
            made_up = isinstance(known.id, MadeUpId) and isinstance(message.id, MadeUpId)
            same = known.headers == message.headers if made_up else known.id == message.id
            same = same and (known.type, known.body) == (message.type, message.body)
            if same and known.source is self and not self._is_held(known):
                known.receipt, known.deliveries = message.receipt, message.deliveries
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
        while not self._is_taken(message := await self.buffer.get()):
            pass
        return message

    def _is_taken(self, message: Message) -> bool:
        """A worker takes this message: False if the broker has taken the delivery back."""
        if not self._lost_because(message):
            return True
        self._release(message)
        self.buffer.settled(message)
        return False

    # -- settling

    def ack(self, message: Message) -> Coroutine[Any, Any, None]:
        """Acknowledge the message. May be sent later, together with others."""
        # No coroutine of its own, and few calls: this runs for each message.
        if self.buffer.gates:
            self.buffer.settled(message)
        if message in self.unacked and (self.acks_late or not self._lost_because(message)):
            self._release(message)
            return self._ack(message)
        self._holds(message, "ack")  # returns False, and logs why
        return asyncio.sleep(0)

    async def publish_and_ack(self, message: Message, outgoing: Sequence[OutgoingMessage]) -> None:
        """Publish the outgoing messages, then acknowledge the message; in one step where the broker can.

        Raises as `publish`: then the message is not settled.
        """
        await self.publish(outgoing)
        await self.ack(message)

    def put_back(self, message: Message) -> None:
        """Buffer the message again, as it was delivered, without a request to the broker."""
        if self._holds(message, "requeue"):
            self.buffer.put_back(message)
        else:
            self.buffer.settled(message)

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
        except Exception as error:  # an encoder also fails on a hostile message, which must not affect other messages
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
        """Whether the message can be settled; otherwise logs why not."""
        if not (reason := self._lost_because(message)) and message in self.unacked:
            return True
        self._release(message)
        reason = reason or "it was settled before, or the broker has taken it back"
        log_settlement_lost(message, settlement, reason)
        return False

    def _lost_because(self, message: Message) -> str:
        """Why the broker has taken this delivery back, such as a lost connection; otherwise empty."""
        return ""

    async def _move(
        self, message: Message, settlement: str, publishing: Awaitable[object], settle: Any = None
    ) -> None:
        """Retry or reject by publishing first: the message is acked when the broker has confirmed the copy.

        A crash in between makes a duplicate, never a loss. Raises as ``publishing``.
        ``settle`` is used in place of the ack.
        """
        await publishing
        # The deadline of a shutdown may have requeued the message meanwhile.
        requeued = message not in self.unacked and not self._lost_because(message)
        if not requeued and self._holds(message, settlement):
            self._release(message)
            await (settle or self._ack)(message)

    async def _put_off(
        self, message: Message, settlement: str, error: Exception, reason: str, seconds: float = 0.0
    ) -> None:
        """A retry or dead letter of this message was not stored: try again later, or requeue it after `stop`."""
        log_settlement_lost(message, settlement, error)
        if not self._is_held(message):
            self._release(message)
        elif self.stopped:
            await self.requeue(message)
        else:
            why = f"a message could not be stored ({settlement}): {error}"
            self.put_offs.add(message, why, settlement, reason, seconds)


class Broker(Source, DeadLetters):
    """All three interfaces in one class."""


def log_settlement_lost(message: Message, settlement: str, reason: Any) -> None:
    """The broker does not know how the message was settled, and will deliver it again."""
    log.warning("settlement_lost", message_id=message.id, settlement=settlement, reason=str(reason))
