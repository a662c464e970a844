"""The rules of cancellation.py, one test for each; every interleaving is in test_cancellation_properties.py."""

import asyncio
import contextvars
import gc
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest

from handoff import SOURCES, Handoff, PlainIterator, anyio_scope, generator, within
from runtime.cancellation import (
    CancellationEvent,
    CancellationRequested,
    cancellable_aiter,
    cancellable_sleep,
    cancellable_wait,
)

every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


@pytest.fixture(autouse=True)
def nothing_is_reported_by_the_event_loop(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails for errors such as a task that was destroyed while it was pending, or an exception never retrieved."""
    yield
    records = caplog.get_records("call")
    assert [r for r in records if r.name == "asyncio" and r.levelno >= logging.ERROR] == []


async def let_all_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def collect(source: Any, event: asyncio.Event) -> list[int]:
    async with aclosing(cancellable_aiter(source, event)) as items:
        return [item async for item in items]


async def waiting(
    source: Any, event: asyncio.Event, make_task: Callable[..., Any] = asyncio.create_task
) -> asyncio.Task[list[int]]:
    """A task that collects the items, and now waits for the next item."""
    consumer: asyncio.Task[list[int]] = make_task(collect(source, event))
    await let_all_run()
    return consumer


# Rule 1: the item or the event, whichever is first.


@every_source
async def test_no_item_is_taken_when_the_event_is_already_set(source: Any) -> None:
    handoff, event = Handoff(), asyncio.Event()
    handoff.put(1)
    event.set()
    assert await collect(source(handoff), event) == []
    assert (handoff.takes, list(handoff.left)) == (0, [1])


@every_source
@pytest.mark.parametrize("event_first", [True, False])
async def test_an_item_at_the_same_instant_as_the_event_is_delivered_and_then_the_loop_ends(
    source: Any, event_first: bool
) -> None:
    handoff, event = Handoff(), asyncio.Event()
    consumer = await waiting(source(handoff), event)
    if event_first:
        event.set()
    handoff.put(1)
    event.set()
    handoff.put(2)
    assert await consumer == [1]
    assert list(handoff.left) == [2]


@every_source
async def test_an_event_that_is_set_in_the_body_ends_the_loop_before_the_next_item(
    source: Any,
) -> None:
    handoff, event = Handoff(), asyncio.Event()
    handoff.put(1)
    handoff.put(2)
    handled = []
    async for item in cancellable_aiter(source(handoff), event):
        event.set()
        await let_all_run()
        handled.append(item)
    assert (handled, list(handoff.left)) == ([1], [2])


# Rule 2: no item is lost, and every wait can be stopped.


@every_source
async def test_a_source_that_waits_is_stopped_by_the_event(source: Any) -> None:
    handoff, event = Handoff(), asyncio.Event()
    consumer = await waiting(source(handoff), event)
    event.set()
    assert await consumer == []
    handoff.put(1)
    assert list(handoff.left) == [1]


async def test_gather_is_stopped_while_one_of_its_results_is_missing() -> None:
    async def pairs() -> AsyncIterator[tuple[int, None]]:
        yield await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(3600))

    event = asyncio.Event()
    consumer = await waiting(pairs(), event)
    event.set()
    assert await consumer == []


async def test_a_source_that_skips_an_item_is_stopped_at_its_next_wait() -> None:
    handoff, event = Handoff(), asyncio.Event()

    async def odd_numbers() -> AsyncIterator[int]:
        async for item in generator(handoff):
            if item % 2:
                yield item

    consumer = await waiting(odd_numbers(), event)
    handoff.put(2)
    event.set()
    assert await consumer == []


# Rule 3: no task for an item.


async def test_the_source_runs_in_the_consuming_task_and_no_task_is_made() -> None:
    made: list[Any] = []

    def count_and_make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        made.append(coro)
        return asyncio.Task(coro, loop=loop, **options)

    async def where_the_source_runs() -> AsyncIterator[asyncio.Task[Any]]:
        for _ in range(10):
            await asyncio.sleep(0)
            yield this_task()

    asyncio.get_running_loop().set_task_factory(count_and_make)
    async for task in cancellable_aiter(where_the_source_runs(), asyncio.Event()):
        assert task is this_task()
    assert made == []


async def test_no_item_costs_a_search_for_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be half of this module's cost for an item: each search asks the system for the process id."""
    asked_for, current_task = [], asyncio.current_task

    def listen(loop: asyncio.AbstractEventLoop | None = None) -> asyncio.Task[Any] | None:
        asked_for.append(loop)
        return current_task(loop)

    handoff = Handoff()
    for item in (1, 2, None):
        handoff.put(item)
    monkeypatch.setattr(asyncio, "current_task", listen)
    await collect(PlainIterator(handoff), asyncio.Event())
    assert asked_for == [asyncio.get_running_loop()] * 3


# Rule 4: the body belongs to the consumer, and cancellation from outside to its caller.


async def test_the_event_does_not_interrupt_the_body() -> None:
    handoff, event = Handoff(), asyncio.Event()
    handoff.put(1)
    asyncio.get_running_loop().call_soon(event.set)
    async for _ in cancellable_aiter(generator(handoff), event):
        await event.wait()
        await let_all_run()
    assert this_task().cancelling() == 0


@every_source
async def test_a_cancellation_from_outside_passes_through(source: Any) -> None:
    consumer = await waiting(source(Handoff()), asyncio.Event())
    consumer.cancel("from outside")
    with pytest.raises(asyncio.CancelledError, match="from outside"):
        await consumer


@every_source
@pytest.mark.parametrize("event_first", [True, False])
async def test_a_cancellation_from_outside_passes_through_also_with_the_event(
    source: Any, event_first: bool
) -> None:
    event = asyncio.Event()
    consumer = await waiting(source(Handoff()), event)
    if event_first:
        event.set()
        await asyncio.sleep(0)  # now the consumer is cancelled by the event, but has not run yet
    consumer.cancel()
    event.set()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert consumer.cancelling() == 1


@pytest.mark.parametrize("in_a_task", [True, False], ids=["in_a_task", "directly"])
@pytest.mark.parametrize("answer", ["an item", "the end"])
async def test_a_source_that_answers_the_event_swallows_no_cancellation_from_outside(
    answer: str, in_a_task: bool
) -> None:
    async def wait_and_answer() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        return answer

    async def answering() -> AsyncIterator[str]:
        while (
            item := await (
                asyncio.create_task(wait_and_answer()) if in_a_task else wait_and_answer()
            )
        ) != "the end":
            yield item

    event, handled = asyncio.Event(), []

    async def consume() -> None:
        async for item in cancellable_aiter(answering(), event):
            await let_all_run()
            handled.append(item)

    consumer = asyncio.create_task(consume())
    await let_all_run()
    event.set()
    await asyncio.sleep(0)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert handled == (["an item"] if answer == "an item" else [])


async def test_a_cancellation_while_the_source_answers_the_event_passes_through() -> None:
    cleaning_up = asyncio.Event()

    async def slow_to_stop() -> AsyncIterator[int]:
        try:
            await asyncio.sleep(3600)
            yield 1
        finally:
            cleaning_up.set()
            await asyncio.sleep(3600)

    event = asyncio.Event()
    consumer = await waiting(slow_to_stop(), event)
    event.set()
    await cleaning_up.wait()
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer


async def test_a_timeout_around_the_loop_still_fires() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await collect(generator(Handoff()), asyncio.Event())
    assert this_task().cancelling() == 0


async def test_a_failing_sibling_in_a_task_group_still_cancels_the_loop() -> None:
    async def fail() -> None:
        raise LookupError

    async def consume_beside_it() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await collect(generator(Handoff()), asyncio.Event())

    with pytest.raises(ExceptionGroup) as raised:
        await consume_beside_it()
    assert raised.group_contains(LookupError)


async def test_an_anyio_scope_around_the_loop_still_cancels_it() -> None:
    with anyio.move_on_after(0) as scope:
        await collect(generator(Handoff()), asyncio.Event())
    assert scope.cancelled_caught
    assert this_task().cancelling() == 0


async def waiting_for_ever() -> AsyncIterator[int]:
    await asyncio.sleep(3600)
    yield 1


async def taking_the_cancellation_back() -> AsyncIterator[int]:
    """Python requires this of code that suppresses a cancellation."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(3600)
        yield 1
    this_task().uncancel()


@pytest.mark.parametrize("source", [waiting_for_ever, taking_the_cancellation_back])
@pytest.mark.parametrize("earlier", [0, 1, 2])
async def test_the_cancellation_count_is_unchanged(source: Any, earlier: int) -> None:
    event, counts = asyncio.Event(), []

    async def consume_although_cancelled() -> None:
        for _ in range(earlier):
            this_task().cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        counts.append(this_task().cancelling())
        assert await collect(source(), event) == []
        counts.append(this_task().cancelling())
        await let_all_run()  # nothing is left to be delivered

    consumer = asyncio.create_task(consume_although_cancelled())
    await let_all_run()
    event.set()
    await consumer
    assert counts == [earlier, earlier]


@pytest.mark.parametrize("answer", ["an item", "the end", "an error"])
async def test_the_cancellation_count_is_unchanged_however_the_source_reacts(
    answer: str,
) -> None:
    async def answering() -> AsyncIterator[int]:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if answer == "an error":
                raise LookupError from None
            if answer == "an item":
                yield 1

    event = asyncio.Event()
    asyncio.get_running_loop().call_soon(event.set)
    with suppress(LookupError):
        await collect(answering(), event)
    assert this_task().cancelling() == 0


async def test_after_the_event_the_same_task_can_be_timed_out_and_cancelled() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_soon(event.set)
    assert await collect(generator(Handoff()), event) == []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.sleep(3600)
    asyncio.get_running_loop().call_soon(this_task().cancel)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(3600)
    this_task().uncancel()


# Rule 5: how it ends, and that no task or waiter is left.


@asynccontextmanager
async def leaves_nothing_in(event: asyncio.Event) -> AsyncIterator[None]:
    yield
    assert list(event._waiters) == []


@pytest.mark.parametrize(
    "ending", ["event", "event in the body", "end", "error", "outside", "break"]
)
async def test_the_source_is_closed_and_the_event_is_left_however_the_loop_ends(
    ending: str,
) -> None:
    handoff, event = Handoff(), asyncio.Event()
    handoff.put(1)

    async def consume() -> None:
        async with aclosing(cancellable_aiter(generator(handoff), event)) as items:
            async for _ in items:
                if ending == "break":
                    break
                if ending == "event in the body":
                    event.set()
        assert handoff.closed

    async with leaves_nothing_in(event):
        consumer = asyncio.create_task(consume())
        await let_all_run()
        match ending:
            case "event":
                event.set()
            case "end":
                handoff.put(None)
            case "error":
                handoff.put(LookupError())
            case "outside":
                consumer.cancel()
        with suppress(LookupError, asyncio.CancelledError):
            await consumer
        assert handoff.closed


async def test_a_source_that_ends_by_itself_ends_the_loop() -> None:
    handoff, event = Handoff(), asyncio.Event()
    for item in (1, 2, None):
        handoff.put(item)
    async with leaves_nothing_in(event):
        assert await collect(PlainIterator(handoff), event) == [1, 2]


@every_source
async def test_the_error_of_a_source_is_passed_on_as_it_is(source: Any) -> None:
    handoff, error = Handoff(), LookupError("no such queue")
    consumer = await waiting(source(handoff), asyncio.Event())
    handoff.put(error)
    with pytest.raises(LookupError) as raised:
        await consumer
    assert raised.value is error


@every_source
async def test_an_error_at_the_same_instant_as_the_event_is_passed_on(source: Any) -> None:
    handoff, event = Handoff(), asyncio.Event()
    consumer = await waiting(source(handoff), event)
    event.set()
    handoff.put(LookupError())
    with pytest.raises(LookupError):
        await consumer


async def answering_the_stop(answer: Callable[[], int]) -> AsyncIterator[int]:
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        yield answer()
        yield 2


async def test_an_item_that_answers_the_cancellation_is_delivered_and_then_the_loop_ends() -> None:
    event = asyncio.Event()
    consumer = await waiting(answering_the_stop(lambda: 1), event)
    event.set()
    assert await consumer == [1]


@pytest.mark.parametrize(
    "error", [ConnectionError("lost"), ExceptionGroup("two", [OSError(1), ValueError("x")])]
)
async def test_an_error_that_answers_the_cancellation_is_passed_on(error: Exception) -> None:
    def fail() -> int:
        raise error

    event = asyncio.Event()
    consumer = await waiting(answering_the_stop(fail), event)
    event.set()
    with pytest.raises(type(error)) as raised:
        await consumer
    assert raised.value is error


async def test_an_error_on_closing_the_source_is_passed_on() -> None:
    class BreaksOnClose(PlainIterator):
        async def aclose(self) -> None:
            raise ConnectionError("lost on closing")

    event = asyncio.Event()
    consumer = await waiting(BreaksOnClose(Handoff()), event)
    async with leaves_nothing_in(event):
        event.set()
        with pytest.raises(ConnectionError, match="lost on closing"):
            await consumer


async def test_closing_may_take_its_time() -> None:
    handoff, event, closed = Handoff(), asyncio.Event(), []

    async def slow_to_close() -> AsyncIterator[int]:
        try:
            async for item in generator(handoff):
                yield item
        finally:
            await let_all_run()
            closed.append(True)

    consumer = await waiting(slow_to_close(), event)
    event.set()
    assert await consumer == []
    assert closed == [True]


async def test_an_argument_that_is_not_an_async_iterable_is_a_clear_error() -> None:
    with pytest.raises(TypeError, match="async iterable"):
        await collect([1, 2], asyncio.Event())


async def test_an_abandoned_loop_is_closed_when_it_is_collected() -> None:
    handoff, event = Handoff(), asyncio.Event()
    handoff.put(1)
    async for _ in cancellable_aiter(generator(handoff), event):
        break
    async with leaves_nothing_in(event):
        gc.collect()
        await let_all_run()
        assert handoff.closed


async def test_an_iterator_that_was_never_started_leaves_nothing() -> None:
    handoff, event = Handoff(), asyncio.Event()
    cancellable_aiter(generator(handoff), event)
    gc.collect()
    await let_all_run()
    assert handoff.takes == 0


async def test_a_thousand_loops_end_with_one_event() -> None:
    event = asyncio.Event()
    handoffs = [Handoff() for _ in range(1000)]
    async with leaves_nothing_in(event):
        consumers = [asyncio.create_task(collect(generator(h), event)) for h in handoffs]
        await asyncio.sleep(0)
        handoffs[500].put(1)
        event.set()
        everything = await asyncio.gather(*consumers)
    assert [items for items in everything if items] == [[1]]
    assert all(handoff.closed for handoff in handoffs)


# Rule 6: the consumer's own context; one at a time; every Python and every event loop.


async def test_context_variables_flow_both_ways() -> None:
    number: contextvars.ContextVar[int] = contextvars.ContextVar("number")
    seen_by_the_source = []

    async def setting_it() -> AsyncIterator[None]:
        for value in (1, 2):
            number.set(value)
            yield
            seen_by_the_source.append(number.get())

    seen_by_the_body = []
    async for _ in cancellable_aiter(setting_it(), asyncio.Event()):
        seen_by_the_body.append(number.get())
        number.set(number.get() * 10)
    assert (seen_by_the_body, seen_by_the_source) == ([1, 2], [10, 20])


async def test_a_second_anext_at_the_same_time_is_a_clear_error_and_does_not_disturb_the_first() -> (
    None
):
    handoff, event = Handoff(), asyncio.Event()
    async with aclosing(cancellable_aiter(generator(handoff), event)) as items:

        async def take() -> int:
            return await anext(items)

        first = asyncio.create_task(take())
        await let_all_run()
        with pytest.raises(RuntimeError, match="already running"):
            await take()
        handoff.put(1)
        assert await first == 1


async def test_the_event_stops_the_task_that_is_waiting_now() -> None:
    """An iterator may move from one task to another between two items."""
    handoff, event = Handoff(), asyncio.Event()
    handoff.put(1)
    items = cancellable_aiter(PlainIterator(handoff), event)

    async def take() -> int:
        return await anext(items, 0)

    assert await asyncio.create_task(take()) == 1
    consumer = asyncio.create_task(take())
    await let_all_run()
    event.set()
    await let_all_run()
    assert consumer.done()
    assert consumer.result() == 0


async def test_a_cleared_event_can_be_used_again_and_iterators_that_saw_it_have_ended() -> None:
    event = CancellationEvent(asyncio.get_running_loop())
    handoff = Handoff()
    consumer = await waiting(generator(handoff), event)
    event.set()
    event.clear()
    assert await consumer == []
    handoff.put(2)
    handoff.put(None)
    assert await collect(generator(handoff), event) == [2]


async def test_the_event_of_another_event_loop_is_a_clear_error_and_the_source_is_closed() -> None:
    event = asyncio.Event()

    async def bind() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                await event.wait()

    await asyncio.to_thread(asyncio.run, bind())
    handoff = Handoff()
    with pytest.raises(RuntimeError, match="different event loop"):
        await collect(PlainIterator(handoff), event)
    assert handoff.takes == 0


@pytest.mark.parametrize(
    "scope", [asyncio.timeout, anyio_scope], ids=["asyncio_timeout", "anyio_scope"]
)
async def test_a_scope_that_a_source_holds_open_across_items_still_works(scope: Any) -> None:
    event, handoff = asyncio.Event(), Handoff()
    handoff.put(1)
    consumer = await waiting(within(lambda _: scope(0.01))(handoff), event)
    with pytest.raises(TimeoutError):
        await consumer


async def test_a_task_group_that_a_source_holds_open_is_left_in_order() -> None:
    """The source waits. At a ``yield``, closing a task group is an error with or without this module."""
    ended = []

    async def with_a_helper() -> AsyncIterator[int]:
        async def help_out() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(True)

        async with asyncio.TaskGroup() as group:
            group.create_task(help_out())
            async for item in generator(Handoff()):
                yield item

    event = asyncio.Event()
    consumer = await waiting(with_a_helper(), event)
    event.set()
    assert await consumer == []
    assert ended == [True]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are new in Python 3.12")
@every_source
async def test_it_works_in_and_around_eager_tasks(source: Any) -> None:
    eager = getattr(asyncio, "eager_task_factory")  # noqa: B009  # unknown to mypy on Python 3.11
    asyncio.get_running_loop().set_task_factory(eager)
    handoff, event = Handoff(), asyncio.Event()
    consumer = await waiting(source(handoff), event)
    handoff.put(1)
    await let_all_run()
    handoff.put(2)
    event.set()
    assert await consumer == [1, 2]


# Waiting for one result.


async def test_wait_returns_the_result() -> None:
    for result in ("result", None):
        assert await cancellable_wait(asyncio.sleep(0, result), asyncio.Event()) is result


async def test_wait_passes_an_error_on() -> None:
    async def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await cancellable_wait(fail(), asyncio.Event())


Waitable = Callable[[Coroutine[Any, Any, str]], Awaitable[str]]
coroutine_or_task = pytest.mark.parametrize(
    "waitable", [lambda coroutine: coroutine, asyncio.ensure_future], ids=["coroutine", "task"]
)


@coroutine_or_task
async def test_wait_ends_with_the_event_after_the_awaitable_has_ended(
    waitable: Waitable,
) -> None:
    event, ended = asyncio.Event(), []

    async def slow() -> str:
        try:
            return await asyncio.sleep(3600, "result")
        finally:
            await let_all_run()
            ended.append(True)

    asyncio.get_running_loop().call_soon(event.set)
    async with leaves_nothing_in(event):
        with pytest.raises(CancellationRequested):
            await cancellable_wait(waitable(slow()), event)
    assert ended == [True]
    assert this_task().cancelling() == 0


async def test_wait_starts_no_awaitable_of_another_kind_either() -> None:
    class Started:
        def __await__(self) -> Generator[None, None, None]:
            raise AssertionError
            yield

    event = asyncio.Event()
    event.set()
    with pytest.raises(CancellationRequested):
        await cancellable_wait(Started(), event)


@coroutine_or_task
async def test_wait_starts_no_awaitable_when_the_event_is_already_set(waitable: Waitable) -> None:
    event, started = asyncio.Event(), []

    async def start() -> str:
        started.append(True)
        return "result"

    event.set()
    with pytest.raises(CancellationRequested):
        await cancellable_wait(waitable(start()), event)
    await let_all_run()
    gc.collect()  # a coroutine that was never awaited would be reported
    assert started == []


async def test_wait_takes_no_item_from_an_iterator_when_the_event_is_already_set() -> None:
    event, handoff = asyncio.Event(), Handoff()
    event.set()
    with pytest.raises(CancellationRequested):
        await cancellable_wait(anext(generator(handoff)), event)
    gc.collect()
    assert handoff.takes == 0


async def test_wait_cancels_a_bare_future() -> None:
    event = asyncio.Event()
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    event.set()
    with pytest.raises(CancellationRequested):
        await cancellable_wait(future, event)
    assert future.cancelled()


async def test_wait_returns_the_result_of_a_future_that_is_done() -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    future.set_result("result")
    assert await cancellable_wait(future, asyncio.Event()) == "result"


@pytest.mark.parametrize("event_first", [True, False])
async def test_wait_returns_a_result_at_the_same_instant_as_the_event(event_first: bool) -> None:
    event = asyncio.Event()
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    at_once = (event.set, lambda: future.set_result("result"))
    for action in at_once if event_first else reversed(at_once):
        asyncio.get_running_loop().call_soon(action)
    assert await cancellable_wait(future, event) == "result"


async def test_wait_returns_the_result_that_answers_the_cancellation() -> None:
    event = asyncio.Event()

    async def finish() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        return "result"

    asyncio.get_running_loop().call_soon(event.set)
    assert await cancellable_wait(finish(), event) == "result"


async def test_wait_lets_a_cancellation_from_outside_through() -> None:
    event, ended = asyncio.Event(), []

    async def slow() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    waiter = asyncio.create_task(cancellable_wait(slow(), event))
    await let_all_run()
    async with leaves_nothing_in(event):
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
    assert ended == [True]


async def test_wait_lets_a_cancellation_through_that_came_with_the_event_and_was_swallowed() -> (
    None
):
    event = asyncio.Event()

    async def finish() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        return "result"

    waiter = asyncio.create_task(cancellable_wait(finish(), event))
    await let_all_run()
    event.set()
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_sleep_returns_whether_it_slept_for_the_whole_time() -> None:
    event = asyncio.Event()
    assert await cancellable_sleep(0, event) is True
    asyncio.get_running_loop().call_soon(event.set)
    assert await cancellable_sleep(3600, event) is False
    assert await cancellable_sleep(0, event) is False


# The event.


async def test_the_event_keeps_its_first_reason_and_the_time_it_was_set() -> None:
    loop = asyncio.get_running_loop()
    event = CancellationEvent(loop)
    assert (event.reason, event.set_at) == (None, None)
    before = loop.time()
    event.set("the queue is gone")
    first_set_at = event.set_at
    assert first_set_at is not None
    assert before <= first_set_at <= loop.time()
    event.set("something else")
    assert (event.reason, event.set_at) == ("the queue is gone", first_set_at)


async def test_a_cleared_event_has_no_reason() -> None:
    event = CancellationEvent(asyncio.get_running_loop())
    event.set("once")
    event.clear()
    assert (event.is_set(), event.reason, event.set_at) == (False, None, None)
    event.set("again")
    assert event.reason == "again"
