# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The deliveries that no worker has taken yet: ``anext(source)`` awaits nothing else.

A *fetcher* (a client's callback, or one task) puts deliveries in; workers take them out. Cancelling a worker that
waits loses no message, whereas the awaitables of most client libraries may. If the fetcher fails, every
worker's next `get` raises `SourceFailed`, so that no service idles.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..errors import BrokerError, SourceFailed
from ..message import Message


class Buffer:
    """A queue of deliveries for many workers; `ordering.OrderedBuffer` also has deliveries that wait for others.

    While it has deliveries, at least one worker is awake; a woken worker that leaves messages behind wakes
    two more. So all handlers start within a few turns of the event loop, and yet a worker whose handler never waits
    empties the buffer by itself, without waking a hundred others needlessly.
    """

    gates: Sequence[Any] = ()  # of an OrderedBuffer: only it needs `settled`

    def __init__(self) -> None:
        self.takeable: deque[Message] = deque()
        """The messages that a worker can take now."""
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._woken_count = 0
        """How many woken workers have not run yet."""
        self._closed = False
        self.held = False
        """Whether workers must leave the deliveries here, during a pause."""
        self.failure: BaseException | None = None
        """Why the fetcher failed, if it did."""

    def __len__(self) -> int:
        return len(self.takeable)

    def put(self, message: Message) -> None:
        self.takeable.append(message)
        if self._waiters and not self._woken_count:
            self._wake(1)

    def settled(self, message: Message) -> None:
        """A message that `get` returned is settled, or was dropped."""

    def take_all(self) -> list[Message]:
        """Empty the buffer, to requeue or drop messages that no worker took."""
        messages = list(self.takeable)
        self.takeable.clear()
        return messages

    def put_back(self, message: Message) -> None:
        """Add a message again that `get` returned, behind the others: no worker handles it now."""
        self.put(message)

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False
        self._wake(len(self._waiters))

    async def released(self) -> None:
        while self.held:
            await self._wait()

    def close(self) -> None:
        """End the iteration of every worker once the buffer is empty."""
        self._closed = True
        self._wake(len(self._waiters))

    def fail(self, failure: BaseException) -> None:
        """Make every worker's next `get` raise `SourceFailed`, even with deliveries left in the buffer."""
        self.failure = failure
        self._wake(len(self._waiters))

    async def get(self) -> Message:
        woken = False
        while not self.takeable or self.held or self.failure is not None:
            if (failure := self.failure) is not None:
                # A broker's error is a sentence; the text of another exception needs its type.
                kind = "" if isinstance(failure, BrokerError) else f"{type(failure).__name__}: "
                raise SourceFailed(f"the source stopped delivering: {kind}{failure}") from failure
            if self._closed:
                raise StopAsyncIteration
            await self._wait()
            woken = True
        message = self.takeable.popleft()
        if woken and self.takeable:
            self._wake(2)
        return message

    async def _wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            if not waiter.done() or waiter.cancelled():
                with suppress(ValueError):  # a put at the same instant has removed it
                    self._waiters.remove(waiter)
            else:
                self._woken_count -= 1
                if self.takeable:
                    self._wake(1)  # this worker was woken for a message: wake another
            raise
        self._woken_count -= 1

    def _wake(self, count: int) -> None:
        while count and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._woken_count += 1
                count -= 1
