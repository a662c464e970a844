# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""The one shape that every broker has: a source of messages that workers share.

A *fetcher* (a client's callback, or one task) puts deliveries into a buffer; ``anext(source)`` awaits
nothing but that buffer. Cancelling it can therefore lose nothing, which is not so for the awaitables of
most client libraries. A fetcher that dies makes ``anext`` raise, so no service is ever alive and idle.

A new broker is one file with a subclass of `Source`, and one row in `brokers/__init__.py`.
"""

import asyncio
import json
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import structlog

from ..cancellation import cancellable_sleep
from ..message import DeadLetter, Message, OutgoingMessage
from ..ordering import key_reader
from ..settings import ConsumerSettings

log = structlog.get_logger()

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 5.0
"""Between two attempts to reach a broker that went away."""


class BrokerError(Exception):
    """Something about the broker, in one sentence for people. Never holds a password."""


class BrokerUnavailable(BrokerError):
    """The broker does not answer, for now: worth trying again. At start, exit code 69."""


class BrokerRefused(BrokerError):
    """The broker answered no (credentials, another topology, a foreign file): exit code 2, no retry."""


class SourceFailed(BrokerError):
    """The source broke while consuming and cannot mend itself: the service stops with exit code 1."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a broker can do by itself. What it lacks is declared here, never silently emulated."""

    delayed_retry: bool
    """`retry` brings a message back after its delay; else at once."""
    attempts: bool
    """``attempt`` counts failures, also across processes."""
    requeue: bool
    """What is not started or not finished at a stop goes to another consumer at once."""
    dead_letters: bool
    """Rejected messages are kept, and can be listed, replayed and purged."""
    order: bool
    """One consumer with a prefetch of 1 gets messages in the order of their publishing, retries aside."""
    retains_before_first_consumer: bool = True
    """What is published before a consumer has ever started waits for it."""
    competing_consumers: bool = True
    """What waits goes to whichever consumer has room; else each has a share, or is dealt it at once."""
    queue_metrics: bool = True
    """The broker tells how many messages wait, and how many consumers there are."""


class Buffer:
    """Deliveries that no worker has taken yet, and the workers that wait for one.

    While there are some, a worker is awake that will look: whoever was woken, and leaves some behind, wakes two
    more. So many handlers start within a few turns of the loop, and yet a worker whose handler never waits
    empties the buffer by itself, without a hundred others that wake up for nothing.
    """

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._woken_count = 0
        """How many workers were woken that have not run yet."""
        self._closed = False
        self.failure: BaseException | None = None
        """Why the fetcher died, if it did."""

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def takeable(self) -> int:
        """How many of them a worker can take now."""
        return len(self._messages)

    def put(self, message: Message) -> None:
        self._messages.append(message)
        if not self._woken_count:
            self._wake(1)

    def done(self, message: Message) -> None:
        """What `get` returned is settled, or was dropped: see `OrderedBuffer`."""

    def take_all(self) -> list[Message]:
        """Empty the buffer, for giving back or dropping what nobody started."""
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def close(self) -> None:
        """End the iteration of every worker once the buffer is empty."""
        self._closed = True
        self._wake_all()

    def fail(self, failure: BaseException) -> None:
        """Make every worker's next `get` raise `SourceFailed`, whatever is still in the buffer."""
        self.failure = failure
        self._wake_all()

    async def get(self) -> Message:
        woken = False
        while not self._messages or self.failure is not None:
            if self.failure is not None:
                msg = f"the source stopped delivering: {self.failure}"
                raise SourceFailed(msg) from self.failure
            if self._closed:
                raise StopAsyncIteration
            await self._wait()
            woken = True
        message = self._messages.popleft()
        if woken and self._messages:
            self._wake(2)
        return message

    async def _wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            if not waiter.done() or waiter.cancelled():
                with suppress(ValueError):  # a put at the same instant has taken it out
                    self._waiters.remove(waiter)
            else:
                self._woken_count -= 1
                if self._messages:
                    self._wake(1)  # this worker was woken for a message: pass the call on
            raise
        self._woken_count -= 1

    def _wake(self, count: int) -> None:
        while count and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._woken_count += 1
                count -= 1

    def _wake_all(self) -> None:
        self._wake(len(self._waiters))


class OrderedBuffer(Buffer):
    """Of messages with equal keys one is out at a time; the next can be taken when that one is done.

    Keys take turns: the next of a key stands behind what can be taken already, so none starves another.
    """

    def __init__(self, key_of: Callable[[Message], str | None]) -> None:
        super().__init__()
        self._key_of = key_of
        self._keys: dict[Message, str | None] = {}  # of all that are here, in the order of delivery
        self._keys_out: dict[Message, str] = {}
        self._queues: dict[str, deque[Message]] = {}  # behind the one that is out, or can be taken

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, message: Message) -> None:
        key = self._keys[message] = self._key_of(message)
        if key is not None and key in self._queues:
            self._queues[key].append(message)
            return
        if key is not None:
            self._queues[key] = deque()
        super().put(message)

    async def get(self) -> Message:
        message = await super().get()
        if (key := self._keys.pop(message)) is not None:
            self._keys_out[message] = key
        return message

    def done(self, message: Message) -> None:
        if (key := self._keys_out.pop(message, None)) is None:
            return
        if self._queues[key]:
            super().put(self._queues[key].popleft())
        else:
            del self._queues[key]

    def take_all(self) -> list[Message]:
        messages = list(self._keys)
        self._keys.clear()
        self._messages.clear()
        self._queues = {key: deque() for key in self._keys_out.values()}
        return messages


def log_settlement_lost(message: Message, reason: object) -> None:
    """That what became of the message could not be told to the broker, which will deliver it again."""
    log.warning("settlement_lost", id=message.id, reason=str(reason))


def headers_from(text: str | bytes) -> dict[str, Any]:
    """The JSON object that it is; no headers if some producer wrote anything else there."""
    with suppress(ValueError, RecursionError):
        headers = json.loads(text)
        if isinstance(headers, dict):
            return headers
    return {}


def backoff_seconds(attempt: int, first: float, longest: float) -> float:
    """Exponential, with jitter: between half of the delay and all of it."""
    exponential = first * 2.0 ** min(attempt - 1, 60)
    return min(exponential, longest) * random.uniform(0.5, 1)


class Connectivity:
    """Whether the broker can be reached: says so once in the log when that changes, and outlives outages."""

    def __init__(self, broker: str) -> None:
        self.broker = broker
        """Its address, for people; without credentials."""
        self.up = False
        self.outage_count = 0
        self._failed_attempts = 0

    def established(self) -> None:
        self._failed_attempts = 0
        if not self.up:
            self.up = True
            log.info("connected", broker=self.broker)

    def lost(self, reason: object) -> None:
        if self.up:
            self.up = False
            self.outage_count += 1
            log.warning("reconnecting", broker=self.broker, reason=str(reason))
        else:
            log.debug("reconnect_failed", broker=self.broker, reason=str(reason))

    async def keep(self, work: Callable[[], Awaitable[None]], until: asyncio.Event) -> None:
        """Do the work again and again until the event is set; after BrokerUnavailable with growing pauses.

        The work calls `established` when it has the broker. It is not cancelled; what else it raises passes through.
        """
        while not until.is_set():
            try:
                await work()
            except BrokerUnavailable as outage:
                self.lost(outage)
                self._failed_attempts += 1
                pause = backoff_seconds(
                    self._failed_attempts, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS
                )
                await cancellable_sleep(pause, until)


class Source(ABC):
    """One queue of one broker: an async context manager, and an iterator that many workers share.

    Life: ``async with source`` connects and declares the topology; `start` asks for deliveries; `stop`
    ends them and gives back what no worker took; leaving the context flushes settlements and closes.
    Publishing and dead letters need no `start`.

    Each delivery is settled once, by `ack`, `retry`, `reject` or `requeue`. When the connection that
    delivered it is gone, settling logs ``settlement_lost`` and returns: the broker delivers it again.
    """

    capabilities: ClassVar[Capabilities]
    link: Connectivity
    """Made by each subclass, with what its broker is called."""
    largest_body_bytes: ClassVar[int | None] = None
    """Any body up to this length can be published, whatever is in it. None: only memory limits it."""

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        self.settings = settings
        self.prefetch = prefetch
        """How many deliveries may be unacked at a time, in the buffer and in hand together."""
        order_by = settings.order_by
        self.buffer = OrderedBuffer(key_reader(order_by)) if order_by else Buffer()
        self.requeued_count = 0
        """How many messages `stop` and `requeue` returned to the broker."""

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[Message]:
        return self.buffer.get()

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Connect once. Raises BrokerUnavailable or BrokerRefused; leaves nothing open if it does."""

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None:
        """Flush what is settled, then close. Bounded in time, whatever the broker does."""

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether deliveries can arrive now; False during an outage."""

    @property
    def outage_count(self) -> int:
        """How often the broker was lost since the start."""
        return self.connectivity.outage_count

    @abstractmethod
    async def start(self) -> None:
        """Ask the broker for deliveries, until `stop`; after an outage they go on by themselves.

        Raises BrokerUnavailable or BrokerRefused; after the former it may be called again.
        """

    @abstractmethod
    async def stop(self) -> None:
        """No more deliveries, and back to the broker at once with what no worker took. Bounded in time.

        Messages in hand can still be settled.
        """

    @abstractmethod
    async def ack(self, message: Message) -> None:
        """The message is done. May be sent later, together with others."""

    @abstractmethod
    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        """Deliver the message again after the delay, with ``attempt`` one higher."""

    @abstractmethod
    async def reject(self, message: Message, reason: str) -> None:
        """Make the message a dead letter."""

    @abstractmethod
    async def requeue(self, message: Message) -> None:
        """Return a message in hand unhandled: ready for others at once, with the same ``attempt``."""

    @abstractmethod
    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        """Publish to this queue; returns when the broker has confirmed every message."""

    @abstractmethod
    async def describe(self) -> dict[str, int | str]:
        """The topology and its counts, for `check`: name to number or text. Raises as `__aenter__`."""

    @abstractmethod
    def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        """The oldest dead letters, which stay where they are."""

    @abstractmethod
    async def count_dead_letters(self) -> int: ...

    @abstractmethod
    def replay_dead_letters(self) -> AsyncIterator[int]:
        """Move the dead letters that are there now back to the queue, as new messages with attempt 1.

        Yields the number moved so far, after each confirmed step.
        """

    @abstractmethod
    def purge_dead_letters(self) -> AsyncIterator[int]:
        """Delete all dead letters. Yields the number deleted so far, after each step; perhaps nothing if there is none."""
