"""Loses an item by the common way to end a loop, and does not lose it by `cancellable_aiter`. Needs only Python::

    PYTHONPATH=examples/order-events/src/order_events python3 examples/lost_item.py

An item comes some iterations of the event loop after the event that ends the loop. Afterwards it was handled, or it is
still in the source; else it is lost.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

from runtime.cancellation import cancellable_aiter


class Source:
    """Delivers an item to a waiting consumer, or keeps it."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.waiter: asyncio.Future[str] | None = None

    def put(self, item: str) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(item)  # from here on the source no longer has it
        else:
            self.kept.append(item)

    def __aiter__(self) -> "Source":
        return self

    async def __anext__(self) -> str:
        if self.kept:
            return self.kept.pop(0)
        self.waiter = asyncio.get_running_loop().create_future()
        return await self.waiter


async def naive(source: Source, event: asyncio.Event) -> AsyncIterator[str]:
    """Wait for an item or the event; when the event wins, cancel the other."""
    stop = asyncio.create_task(event.wait())
    while not event.is_set():
        item = asyncio.ensure_future(anext(source))
        await asyncio.wait([item, stop], return_when=asyncio.FIRST_COMPLETED)
        if item.done():
            yield item.result()
        else:
            item.cancel()


Form = Callable[[Source, asyncio.Event], AsyncIterator[str]]


async def where_it_is(form: Form, iterations: int) -> str:
    source, event, handled = Source(), asyncio.Event(), []

    async def consume() -> None:
        async for item in form(source, event):
            handled.append(item)

    consumer = asyncio.create_task(consume())
    await let_it_wait()
    event.set()
    for _ in range(iterations):
        await asyncio.sleep(0)
    source.put("item")
    await let_it_wait()
    await consumer
    return "handled" if handled else "kept" if source.kept else "LOST"


async def let_it_wait() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def main() -> None:
    print("iterations after the event   cancel the waiting task   cancellable_aiter")
    for iterations in range(5):
        ours, theirs = [await where_it_is(form, iterations) for form in (cancellable_aiter, naive)]
        print(f"{iterations:26}   {theirs:23}   {ours}")


asyncio.run(main())
