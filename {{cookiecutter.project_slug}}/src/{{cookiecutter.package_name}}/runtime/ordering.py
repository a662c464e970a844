# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Messages that wait for others in the buffer: by ``CONSUMER_ORDER_BY``, or by a handler's own ``concurrency``."""

from collections import deque
from collections.abc import Callable, Collection, Mapping

from .brokers.buffer import Buffer
from .message import Message


class Gate:
    """Lets one message of each key pass at a time; with ``limits``, as many as its limit, and all of other keys."""

    def __init__(
        self, read: Callable[[Message], object], limits: Mapping[str, int] | None = None
    ) -> None:
        self._read, self._limits = read, limits
        self.has_limits = limits is not None
        self._passed: dict[Message, str] = {}  # takeable, or in flight
        self._counts: dict[str, int] = {}  # how many of them, by key
        self._queues: dict[str, deque[Message]] = {}

    def key_of(self, message: Message) -> str | None:
        """The message's key; None for a message without one, which waits for no other. 7 and "7" are equal."""
        value = self._read(message)
        return None if value is None else str(value)

    def pass_or_queue(self, message: Message) -> bool:
        """Whether the message may be taken now; otherwise it waits here."""
        key = self.key_of(message)
        limit = 1 if self._limits is None else self._limits.get(key or "")
        if key is None or limit is None:
            return True
        count = self._counts.get(key, 0)
        if count >= limit:
            self._queues.setdefault(key, deque()).append(message)
            return False
        self._passed[message], self._counts[key] = key, count + 1
        return True

    def settled(self, message: Message) -> Message | None:
        """The message is settled: returns the message that passes in its place, if one waits."""
        key = self._passed.pop(message, None)
        if key is not None and (queue := self._queues.get(key)) is not None:
            self._passed[following := queue.popleft()] = key
            if not queue:
                del self._queues[key]
            return following
        if key is not None and (count := self._counts.pop(key)) > 1:
            self._counts[key] = count - 1
        return None

    def drop(self, messages: Collection[Message]) -> None:
        """Forget ``messages``, which are all that are in the buffer."""
        self._queues.clear()
        for message in messages:
            self.settled(message)


class OrderedBuffer(Buffer):
    """Each message passes all gates before it can be taken.

    Keys take turns: the next message of a key queues behind those that can be taken already, so no key starves
    another.
    """

    def __init__(self, *gates: Gate) -> None:
        super().__init__()
        self.gates = gates
        self._here: dict[Message, None] = {}  # in the order of delivery

    def __len__(self) -> int:
        return len(self._here)

    def put(self, message: Message) -> None:
        self._here[message] = None
        self._enter(message, self.gates)

    def _enter(self, message: Message, gates: Collection[Gate]) -> None:
        if all(gate.pass_or_queue(message) for gate in gates):
            super().put(message)

    async def get(self) -> Message:
        message = await super().get()
        del self._here[message]
        return message

    def settled(self, message: Message) -> None:
        if message.context is not None and message.context.event.is_set():
            return  # a shutdown requeues the waiting messages: no worker may take one
        for place, gate in enumerate(self.gates, 1):
            if (following := gate.settled(message)) is not None:
                self._enter(following, self.gates[place:])

    def put_back(self, message: Message) -> None:
        """Add it before the others of its key, but behind the others of its handler, so that each message is tried."""
        limits = [gate for gate in self.gates if gate.has_limits]  # the last one, if any
        for gate in limits:
            if (following := gate.settled(message)) is not None:
                super().put(following)
        self._here = {message: None, **self._here}
        self._enter(message, limits)

    def take_all(self) -> list[Message]:
        messages = list(self._here)
        self._here.clear()
        self.takeable.clear()
        for gate in self.gates:
            gate.drop(messages)
        return messages
