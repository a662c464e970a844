"""The strictest source for the cancellation tests: an item given to a waiter that is then cancelled is lost.

Queues and brokers keep an item until it is taken. This source does not, so it shows every loss.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio


class Handoff:
    """Gives each item to its waiter. ``left`` has the items that had no waiter."""

    def __init__(self) -> None:
        self.left: deque[int | Exception | None] = deque()
        self.takes = 0
        """How many times an item was requested."""
        self.closed = False
        """Whether the source's iterator was closed, or ended, after it had started."""
        self._waiter: asyncio.Future[int | None] | None = None

    def put(self, item: int | Exception | None) -> None:
        """Hand over an item, an error, or None for the end."""
        if self._waiter is None or self._waiter.done():
            self.left.append(item)
        elif isinstance(item, Exception):
            self._waiter.set_exception(item)
        else:
            self._waiter.set_result(item)

    async def get(self) -> int | None:
        self.takes += 1
        if not self.left:
            self._waiter = asyncio.get_running_loop().create_future()
            return await self._waiter
        if isinstance(item := self.left.popleft(), Exception):
            raise item
        return item


class PlainIterator:
    """An iterator without ``aclose``, like the runtime's own sources."""

    def __init__(self, handoff: Handoff) -> None:
        self._handoff = handoff

    def __aiter__(self) -> "PlainIterator":
        return self

    async def __anext__(self) -> int:
        if (item := await self._handoff.get()) is None:
            raise StopAsyncIteration
        return item


async def generator(handoff: Handoff) -> AsyncIterator[int]:
    try:
        while (item := await handoff.get()) is not None:
            yield item
    finally:
        handoff.closed = True


class PlainIterable:
    """Not an iterator: each ``aiter`` creates a new one."""

    def __init__(self, handoff: Handoff) -> None:
        self._handoff = handoff

    def __aiter__(self) -> AsyncIterator[int]:
        return generator(self._handoff)


async def generator_of_a_generator(handoff: Handoff) -> AsyncIterator[int]:
    async for item in generator(handoff):
        yield item


async def task(handoff: Handoff) -> AsyncIterator[int]:
    while (item := await asyncio.create_task(handoff.get())) is not None:
        yield item


async def task_in_a_task(handoff: Handoff) -> AsyncIterator[int]:
    async def get() -> int | None:
        return await asyncio.create_task(handoff.get())

    while (item := await asyncio.create_task(get())) is not None:
        yield item


async def gather(handoff: Handoff) -> AsyncIterator[int]:
    while (item := (await asyncio.gather(handoff.get()))[0]) is not None:
        yield item


async def polling(handoff: Handoff) -> AsyncIterator[int]:
    """Awaits nothing that can be cancelled: it only yields to the event loop."""
    while True:
        for _ in range(1000):
            if handoff.left:
                break
            await asyncio.sleep(0)
        else:
            msg = "nobody stopped it"
            raise AssertionError(msg)
        if (item := await handoff.get()) is None:
            return
        yield item


def within(
    scope: Callable[[float], AbstractAsyncContextManager[object]],
) -> Callable[[Handoff], AsyncIterator[int]]:
    """A source that holds a scope open from one item to the next."""

    async def within_a_scope(handoff: Handoff) -> AsyncIterator[int]:
        while True:
            async with scope(3600):
                if (item := await handoff.get()) is None:
                    return
                yield item

    return within_a_scope


@asynccontextmanager
async def anyio_scope(seconds: float) -> AsyncIterator[None]:
    with anyio.fail_after(seconds):
        yield


SOURCES: dict[str, Callable[[Handoff], AsyncIterator[int] | PlainIterable]] = {
    "iterator": PlainIterator,
    "iterable": PlainIterable,
    "generator": generator,
    "generator_of_a_generator": generator_of_a_generator,
    "task": task,
    "task_in_a_task": task_in_a_task,
    "gather": gather,
    "polling": polling,
    "timeout_across_yield": within(asyncio.timeout),
    "anyio_scope_across_yield": within(anyio_scope),
}
