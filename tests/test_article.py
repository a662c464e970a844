"""Every form of the 2019 article "A Python asyncio cancellation pattern", on today's Python.

Three facts are shown: that the article's own listings no longer run, that each of its forms has a successor in
runtime/cancellation.py, and which items the old form (tools/benchmarks/article_2019.py) lost and ours keeps.
"""

import asyncio
import gc
import re
import signal
import subprocess
import sys
import textwrap
from asyncio import Event
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import datetime
from typing import Any

import pytest

from runtime import cancellation
from runtime.cancellation import (
    CancellationEvent,
    CancellationRequested,
    cancellable_aiter,
    cancellable_wait,
    make_cancellation_event,
)
from support.rendered import TREE
from tools.benchmarks import article_2019


async def async_time(delay: float) -> datetime:
    await asyncio.sleep(delay)
    return datetime.now()


async def async_time_ticker(delay: float) -> AsyncIterator[datetime]:
    while True:
        await asyncio.sleep(delay)
        yield datetime.now()


class Handoff:
    """A source that gives each item to its waiter, or keeps it in ``left``."""

    def __init__(self) -> None:
        self.left: list[int] = []
        self._waiter: asyncio.Future[int] | None = None

    def put(self, item: int) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(item)
        else:
            self.left.append(item)

    def __aiter__(self) -> "Handoff":
        return self

    async def __anext__(self) -> int:
        if self.left:
            return self.left.pop(0)
        self._waiter = asyncio.get_running_loop().create_future()
        return await self._waiter


async def let_all_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def tasks_left_behind() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def cancel_what_is_left() -> None:
    left = tasks_left_behind()
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


# The article's own listings.


async def articles_own_cancellable_aiter(
    async_iterator: AsyncIterator[Any], cancellation_event: Event
) -> AsyncIterator[Any]:
    """Its last listing, word for word, except the types."""
    cancellation_task: Any = asyncio.create_task(cancellation_event.wait())
    result_iter: Any = async_iterator.__aiter__()
    while not cancellation_event.is_set():
        done, pending = await asyncio.wait(
            [cancellation_task, result_iter.__anext__()],
            return_when=asyncio.FIRST_COMPLETED
        )  # fmt: skip
        for done_task in done:
            if done_task == cancellation_task:
                for pending_task in pending:
                    await pending_task
                break
            else:
                yield done_task.result()


async def test_the_articles_first_listing_no_longer_runs() -> None:
    cancellation_event = asyncio.Event()
    waiting, sleeping = cancellation_event.wait(), asyncio.sleep(30)
    bare_coroutines: Any = [waiting, sleeping]
    with pytest.raises(TypeError, match="Passing coroutines is forbidden"):
        await asyncio.wait(bare_coroutines, return_when=asyncio.FIRST_COMPLETED)
    waiting.close()
    sleeping.close()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_the_articles_last_listing_no_longer_runs() -> None:
    with pytest.raises(TypeError, match="Passing coroutines is forbidden"):
        async for _ in articles_own_cancellable_aiter(Handoff(), asyncio.Event()):
            pass
    await cancel_what_is_left()
    gc.collect()


# Its forms, today.


async def test_waiting_for_a_result_or_the_event_gives_the_result() -> None:
    now = await cancellable_wait(async_time(0), CancellationEvent(asyncio.get_running_loop()))
    assert isinstance(now, datetime)


async def test_waiting_for_a_result_or_the_event_ends_with_the_event() -> None:
    with make_cancellation_event() as cancellation_event:
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
        with pytest.raises(CancellationRequested):
            await cancellable_wait(async_time(3600), cancellation_event)
    assert cancellation_event.reason is signal.SIGINT
    assert tasks_left_behind() == set()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_ticker_ticks_until_a_signal_and_the_in_flight_tick_is_finished(
    signum: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main_async() -> None:
        with make_cancellation_event() as cancellation_event:
            ticker = async_time_ticker(0.001)
            ticks = 0
            async for now in cancellable_aiter(ticker, cancellation_event):
                ticks += 1
                if ticks == 3:
                    signal.raise_signal(signum)
                    await cancellation_event.wait()
                print(f"now: {now.isoformat()}")
            print("Done")

    asyncio.run(main_async())
    *nows, done = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in nows] == ["now: "] * 3
    assert done == "Done"


IMPORTS = """
import asyncio
from collections.abc import AsyncIterator
from datetime import datetime

from runtime.cancellation import cancellable_aiter, make_cancellation_event
"""


def test_the_example_in_the_docstring_of_the_module_runs_and_shuts_down() -> None:
    assert cancellation.__doc__
    [example] = re.findall(r"::\n\n((?:    .*\n|\n)+)", cancellation.__doc__)
    quick = textwrap.dedent(example).replace("ticker(1)", "ticker(0.05)")
    assert "ticker(0.05)" in quick
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-u", "-c", IMPORTS + quick],
        cwd=TREE / "src/{{cookiecutter.package_name}}",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if [line[:5] for line in lines] == ["now: "] * 2:
                process.send_signal(signal.SIGTERM)
            elif len(lines) == 50:
                process.kill()  # it does not stop
    assert process.returncode == 0, "".join(lines)
    *nows, done = lines
    assert len(nows) >= 2
    assert {line[:5] for line in nows} == {"now: "}
    assert done == "Done\n"


# The 2019 form, and its losses.


def item_by_item(form: Callable[[Any, Event], AsyncIterator[int]]) -> Any:
    """The iterator as a loop that gives each item to a function, like the hand-written loop."""

    async def loop(source: Any, event: Event, handle: Callable[[int], None]) -> None:
        async with aclosing(form(source, event)) as items:  # type: ignore[type-var]  # typed as in 2019
            async for item in items:
                handle(item)

    return loop


OURS = item_by_item(cancellable_aiter)
ITERATOR = item_by_item(article_2019.cancellable_aiter)
LOOP = article_2019.handwritten_loop


@pytest.mark.parametrize("loop", [OURS, ITERATOR, LOOP], ids=["ours", "2019 iterator", "2019 loop"])
async def test_every_form_gives_the_items_in_order(loop: Any) -> None:
    source, event = Handoff(), asyncio.Event()
    handled: list[int] = []
    consumer = asyncio.create_task(loop(source, event, handled.append))
    for item in (1, 2, 3):
        source.put(item)
        await let_all_run()
    assert handled == [1, 2, 3]
    event.set()
    await let_all_run()
    source.put(4)  # the article's iterator waits for one more item
    await consumer
    await cancel_what_is_left()


@pytest.mark.parametrize(("loop", "loses"), [(OURS, False), (ITERATOR, True), (LOOP, True)])
async def test_an_item_soon_after_the_event_was_lost_in_2019(loop: Any, loses: bool) -> None:
    """The article's iterator waits for one more item and throws it away; its loop cancels the task that has it."""

    async def lost(iterations_after_the_event: int) -> bool:
        source, event = Handoff(), asyncio.Event()
        handled: list[int] = []
        consumer = asyncio.create_task(loop(source, event, handled.append))
        await let_all_run()
        event.set()
        for _ in range(iterations_after_the_event):
            await asyncio.sleep(0)
        source.put(1)
        await consumer
        await cancel_what_is_left()
        return 1 not in handled + source.left

    assert any([await lost(iterations) for iterations in range(6)]) is loses


@pytest.mark.parametrize(("loop", "ends"), [(OURS, True), (ITERATOR, False), (LOOP, True)])
async def test_the_articles_iterator_did_not_end_before_one_more_item(
    loop: Any, ends: bool
) -> None:
    source, event = Handoff(), asyncio.Event()
    consumer = asyncio.create_task(loop(source, event, print))
    await let_all_run()
    event.set()
    await let_all_run()
    assert consumer.done() is ends
    source.put(1)
    await consumer
    await cancel_what_is_left()


@pytest.mark.parametrize(
    ("form", "left"), [(cancellable_aiter, 0), (article_2019.cancellable_aiter, 1)]
)
async def test_a_loop_that_ended_early_left_a_task_behind_in_2019(form: Any, left: int) -> None:
    source = Handoff()
    source.put(1)
    async with aclosing(form(source, asyncio.Event())) as items:
        async for _ in items:
            break
    assert len(tasks_left_behind()) == left
    await cancel_what_is_left()


@pytest.mark.parametrize(
    ("form", "error"), [(cancellable_aiter, None), (article_2019.cancellable_aiter, RuntimeError)]
)
async def test_a_source_that_ended_was_an_error_in_2019(
    form: Any, error: type[Exception] | None
) -> None:
    async def two_items() -> AsyncIterator[int]:
        yield 1
        yield 2

    handled = []

    async def consume() -> None:
        async for item in form(two_items(), asyncio.Event()):
            handled.append(item)

    if error is None:
        await consume()
    else:
        with pytest.raises(error, match="StopAsyncIteration"):
            await consume()
    assert handled == [1, 2]
    await cancel_what_is_left()
