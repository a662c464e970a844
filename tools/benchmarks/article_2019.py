"""The pattern of the 2019 article "A Python asyncio cancellation pattern", to compare with.

The only changes are those that today's Python requires: `asyncio.wait` takes no bare coroutines since 3.11, so each
coroutine is wrapped by `asyncio.ensure_future`. The indentation, which the article's web page lost, follows its text.
tests/test_article.py shows its losses.
"""

import asyncio
from asyncio import Event
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def handwritten_loop(
    ticker: AsyncIterable[T], cancellation_event: Event, handle: Callable[[T], None]
) -> None:
    """The loop that the article calls hideous; ``handle`` replaces its ``print``."""
    cancellation_task: asyncio.Task[Any] = asyncio.create_task(cancellation_event.wait())
    ticker_iter = ticker.__aiter__()
    while not cancellation_event.is_set():
        done, pending = await asyncio.wait(
            [cancellation_task, asyncio.ensure_future(ticker_iter.__anext__())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        for done_task in done:
            if done_task == cancellation_task:
                for pending_task in pending:
                    pending_task.cancel()
                break
            else:
                handle(done_task.result())


async def cancellable_aiter(
    async_iterator: AsyncIterable[T], cancellation_event: Event
) -> AsyncIterator[T]:
    """The iterator that the article ends with."""
    cancellation_task: asyncio.Task[Any] = asyncio.create_task(cancellation_event.wait())
    result_iter = async_iterator.__aiter__()
    while not cancellation_event.is_set():
        done, pending = await asyncio.wait(
            [cancellation_task, asyncio.ensure_future(result_iter.__anext__())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        for done_task in done:
            if done_task == cancellation_task:
                for pending_task in pending:
                    await pending_task
                break
            else:
                yield done_task.result()
