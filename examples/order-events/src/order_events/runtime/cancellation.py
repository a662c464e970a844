# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Stop an ``async for`` between two items, never in the middle of one.

An event is set by SIGINT or SIGTERM, and an iterator ends when the event is set. The loop body,
the in-flight item, is never interrupted::

    async def ticker(seconds: float) -> AsyncIterator[datetime]:
        while True:
            await asyncio.sleep(seconds)
            yield datetime.now()

    async def main() -> None:
        cancellation_event = make_cancellation_event()
        async for now in cancellable_aiter(ticker(1), cancellation_event):
            print(f"now: {now.isoformat()}")
        print("Done")

    asyncio.run(main())

The pattern is from the 2019 article "A Python asyncio cancellation pattern". Standard library only.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class CancellationRequested(Exception):
    """The event was set before the awaited result arrived."""


class CancellationEvent(asyncio.Event):
    """An event that a signal sets, that any thread may set, and that knows why and when it was set.

    ``reason`` is the signal, or the argument of `set`; ``set_at`` is the event loop's time in
    seconds. Both are None until the event is set. ``signals`` lists every signal received with its
    ``time.monotonic()``; it grows even while Python code blocks the event loop. ``on_repeat`` is called
    in the event loop with each signal that arrives when the event is already set.

    As a context manager, or by `restore_signals`, it restores the earlier signal handlers.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.reason: signal.Signals | str | None = None
        self.set_at: float | None = None
        self.signals: list[tuple[signal.Signals, float]] = []
        self.on_repeat: Callable[[signal.Signals], None] | None = None
        self._loop_to_wake = loop
        self._earlier_handlers: dict[signal.Signals, Any] = {}

    def set(self, reason: signal.Signals | str | None = None) -> None:
        """Set the event, from any thread; only the first reason counts.

        Outside its running event loop, that happens on the loop's next iteration.
        """
        if asyncio._get_running_loop() is not self._loop_to_wake:
            # asyncio.Event.set() from another thread does not wake the loop, and raises in debug mode.
            self._loop_to_wake.call_soon_threadsafe(self.set, reason)
        elif not self.is_set():
            self.reason = reason
            self.set_at = self._loop_to_wake.time()
            super().set()

    def clear(self) -> None:
        """Make the event usable again. Iterators that saw it set have ended and stay ended."""
        super().clear()
        self.reason = self.set_at = None

    def install_signals(self, signals: Iterable[signal.Signals]) -> None:
        """Set the event on each of these signals. Raises RuntimeError outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            msg = "signals reach only the main thread: make the cancellation event there"
            raise RuntimeError(msg)
        for signum in signals:
            # signal.signal and not loop.add_signal_handler: it exists on every system, leaves no
            # moment without a handler, and runs (see `signals`) when the loop itself is blocked.
            self._earlier_handlers.setdefault(signum, signal.signal(signum, self._on_signal))
        if self not in _with_handlers:
            _with_handlers.append(self)

    def restore_signals(self) -> None:
        """Restore the handlers that `install_signals` replaced."""
        with suppress(ValueError):
            _with_handlers.remove(self)
        while self._earlier_handlers:
            signum, handler = self._earlier_handlers.popitem()
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore_signals()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        signum = signal.Signals(number)
        if self._loop_to_wake.is_closed():
            self.restore_signals()  # the event loop is closed: the earlier handlers apply
            signal.raise_signal(signum)
            return
        self.signals.append((signum, time.monotonic()))
        self._loop_to_wake.call_soon_threadsafe(self._take_signal, signum)

    def _take_signal(self, signum: signal.Signals) -> None:
        if not self.is_set():
            self.set(signum)
        elif self.on_repeat is not None:
            self.on_repeat(signum)


_with_handlers: list[CancellationEvent] = []
"""Events with installed signal handlers, in order of installation."""


def _restore_signals_in_a_forked_child() -> None:
    # At once: a handler written in Python has to wait for the child's current call, which may never return.
    for event in reversed(_with_handlers.copy()):
        event.restore_signals()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_restore_signals_in_a_forked_child)


def make_cancellation_event(
    signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
    loop: asyncio.AbstractEventLoop | None = None,
) -> CancellationEvent:
    """Make an event that these signals set. Make it before connecting to anything.

    Without ``loop`` it is for the running event loop. Raises RuntimeError outside the main thread.
    """
    event = CancellationEvent(asyncio.get_running_loop() if loop is None else loop)
    event.install_signals(signals)
    return event


async def cancellable_aiter(
    source: AsyncIterable[T], event: asyncio.Event
) -> AsyncGenerator[T, None]:
    """Iterate over ``source`` until it ends or ``event`` is set.

    No item that the source hands over is lost: if an item and the event come at the same instant, the
    item is delivered and then the loop ends. If the event is set already, no item is taken. Errors of the
    source, and a cancellation from outside, pass through. The source's iterator is closed at the end if it
    has ``aclose``; after a ``break`` that happens when this generator is closed (`contextlib.aclosing`).

    What the source awaits is seen through tasks and `asyncio.gather`. A source that waits behind anything
    else (a thread, `asyncio.shield`, a TaskGroup) must itself keep what it took when it is cancelled.
    """
    # The consuming task itself is cancelled, and only while it is inside `anext`; then `uncancel` reverts
    # that, as asyncio.timeout does. So there is no task per item, and context variables flow.
    loop = asyncio.get_running_loop()
    iterator = aiter(source)
    waiting = event.wait()
    pulling: asyncio.Task[Any] | None  # bound before anything can call `interrupt`
    outside_cancellations = 0

    def interrupt(_: object = None) -> None:
        nonlocal pulling
        if pulling is None:
            return  # the task is in the loop body, and will see the event before the next item
        if _holds_a_result(pulling):
            loop.call_soon(interrupt)
        else:
            pulling.cancel()
            pulling = None

    try:
        if event.is_set():
            return
        # Step the coroutine of wait() by hand: it hands out the future that set() resolves. This costs
        # no task, and closing the coroutine takes the future out of the event again.
        stop: asyncio.Future[bool] = waiting.send(None)
        stop.add_done_callback(interrupt)
        while not stop.done():
            pulling = task = asyncio.current_task(loop)
            assert task is not None
            cancelling_before = task.cancelling()
            try:
                item = await anext(iterator)
            except StopAsyncIteration:
                break
            except asyncio.CancelledError:
                if pulling is not None:  # `interrupt` was not the cause
                    raise
                break
            finally:
                # The source may already have uncancelled the task.
                if pulling is None and task.cancelling() > cancelling_before:
                    outside_cancellations = task.uncancel() - cancelling_before
                pulling = None
            yield item
        if outside_cancellations > 0:
            # Another caller cancelled the task at the same time. An anyio scope cancels again on the next loop
            # iteration, and catches only that CancelledError, which names the scope: yield to it.
            await asyncio.sleep(0)
            raise asyncio.CancelledError
    finally:
        waiting.close()
        if (aclose := getattr(iterator, "aclose", None)) is not None:
            await aclose()


def _holds_a_result(awaited: Any) -> bool:
    """Whether ``awaited``, and all that it awaits, is done: a cancellation now would discard its result."""
    if isinstance(awaited, asyncio.Task) and not awaited.done():
        return _holds_a_result(awaited._fut_waiter)  # type: ignore[attr-defined]  # as anyio does
    if children := getattr(awaited, "_children", None):  # of asyncio.gather
        return all(map(_holds_a_result, children))
    return awaited is not None and awaited.done()


async def cancellable_wait(awaitable: Awaitable[T], event: asyncio.Event) -> T:
    """Wait for a result or for the event, whichever is first; a result at the same instant wins.

    Raises CancellationRequested if the event was first; the awaitable is then cancelled. If the event is
    set already, the awaitable is not started.
    """

    async def one_item() -> AsyncGenerator[T, None]:
        yield await awaitable

    results = [result async for result in cancellable_aiter(one_item(), event)]
    if results:
        return results[0]
    if isinstance(awaitable, Coroutine):
        awaitable.close()
    elif asyncio.isfuture(awaitable):
        awaitable.cancel()
    raise CancellationRequested


async def cancellable_sleep(seconds: float, event: asyncio.Event) -> bool:
    """Sleep, but at most until the event is set. Returns whether it slept for the whole time."""
    with suppress(CancellationRequested):
        await cancellable_wait(asyncio.sleep(seconds), event)
        return True
    return False
