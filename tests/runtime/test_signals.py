"""The event that a signal sets: in this process with `raise_signal`, and in child processes with real ones."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from handoff import Handoff, PlainIterator
from processes import WAIT_SECONDS, Child
from runtime import (
    cancellation,
)
from runtime.cancellation import (
    CancellationEvent,
    cancellable_aiter,
    make_cancellation_event,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
both_signals = pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
if find_spec("uvloop"):
    LOOPS["uvloop"] = import_module("uvloop").new_event_loop
every_loop = pytest.mark.parametrize("new_loop", LOOPS.values(), ids=LOOPS.keys())


def nobody_took_it(*_: object) -> None:
    msg = "nobody took the signal"
    raise AssertionError(msg)


@pytest.fixture(autouse=True)
def signal_handlers_are_as_they_were() -> Iterator[None]:
    found = [signal.getsignal(signum) for signum in SIGNALS]
    signal.signal(signal.SIGTERM, nobody_took_it)
    yield
    left = [signal.getsignal(signum) for signum in SIGNALS]
    for signum, handler in zip(SIGNALS, found, strict=True):
        signal.signal(signum, handler)
    assert left == [nobody_took_it, found[1]]


async def let_all_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(
    main: Any, new_loop: Callable[..., Any] = asyncio.new_event_loop, debug: bool | None = None
) -> Any:
    async def at_most() -> Any:
        async with asyncio.timeout(WAIT_SECONDS):
            return await main

    with asyncio.Runner(loop_factory=new_loop, debug=debug) as runner:
        return runner.run(at_most())


# Setting the event.


@both_signals
async def test_a_signal_sets_the_event_and_is_its_reason(signum: signal.Signals) -> None:
    with make_cancellation_event() as event:
        before, loop_before = time.monotonic(), asyncio.get_running_loop().time()
        signal.raise_signal(signum)
        await event.wait()
        assert event.reason is signum
        assert event.set_at is not None
        assert event.set_at >= loop_before
        [(received, received_at)] = event.signals
        assert received is signum
        assert before <= received_at <= time.monotonic()


@both_signals
async def test_a_signal_ends_the_loop_and_not_the_body(signum: signal.Signals) -> None:
    handoff = Handoff()
    for item in (1, 2, 3):
        handoff.put(item)
    handled = []
    with make_cancellation_event() as event:
        async for item in cancellable_aiter(PlainIterator(handoff), event):
            if item == 2:
                signal.raise_signal(signum)
                await event.wait()
                await let_all_run()
            handled.append(item)
    assert (handled, list(handoff.left)) == ([1, 2], [3])


async def test_only_the_signals_asked_for_are_caught() -> None:
    earlier = signal.getsignal(signal.SIGINT)
    with make_cancellation_event(signals=[signal.SIGTERM]) as event:
        assert signal.getsignal(signal.SIGINT) is earlier
        assert signal.getsignal(signal.SIGTERM) == event._on_signal


async def test_each_further_signal_is_given_to_on_repeat() -> None:
    repeated: list[signal.Signals] = []
    with make_cancellation_event() as event:
        event.on_repeat = repeated.append
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(signum)
        await let_all_run()
        assert (event.reason, repeated) == (signal.SIGTERM, [signal.SIGTERM, signal.SIGINT])
        assert [signum for signum, _ in event.signals] == [signal.SIGTERM, *repeated]


async def test_further_signals_without_on_repeat_change_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with make_cancellation_event() as event:
        event.set("the queue is gone")
        signal.raise_signal(signal.SIGTERM)
        await let_all_run()
        assert event.reason == "the queue is gone"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_signals_are_counted_while_the_event_loop_is_blocked_and_set_the_event_after() -> (
    None
):
    with make_cancellation_event() as event:
        event.on_repeat = lambda _: None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        # No iteration of the event loop has run since: as if a handler computed all the time.
        assert [signum for signum, _ in event.signals] == [signal.SIGTERM, signal.SIGINT]
        assert not event.is_set()
        await let_all_run()
        assert event.reason is signal.SIGTERM


# From other threads.


@every_loop
@pytest.mark.parametrize("debug", [True, False], ids=["debug", "no_debug"])
def test_set_from_another_thread_wakes_an_idle_event_loop(new_loop: Any, debug: bool) -> None:
    async def wait() -> str | None:
        event = CancellationEvent(asyncio.get_running_loop())
        setter = threading.Thread(target=event.set, args=("from a thread",))
        # The thread starts when all else sleeps.
        asyncio.get_running_loop().call_soon(setter.start)
        async for _ in cancellable_aiter(PlainIterator(Handoff()), event):
            pass
        setter.join()
        return str(event.reason)

    assert run(wait(), new_loop, debug) == "from a thread"


@every_loop
def test_a_signal_wakes_an_idle_event_loop(new_loop: Any) -> None:
    async def wait() -> object:
        with make_cancellation_event() as event:
            main_thread = threading.main_thread().ident
            assert main_thread is not None
            sender = threading.Thread(
                target=signal.pthread_kill, args=(main_thread, signal.SIGTERM)
            )
            asyncio.get_running_loop().call_soon(sender.start)
            await event.wait()
            sender.join()
            return event.reason

    assert run(wait(), new_loop) is signal.SIGTERM


@every_loop
def test_an_item_that_comes_with_the_signal_is_delivered_on_every_event_loop(new_loop: Any) -> None:
    async def consume() -> list[int]:
        handoff = Handoff()
        with make_cancellation_event() as event:

            def both() -> None:
                signal.raise_signal(signal.SIGTERM)
                asyncio.get_running_loop().call_soon(handoff.put, 1)

            asyncio.get_running_loop().call_soon(both)
            return [item async for item in cancellable_aiter(PlainIterator(handoff), event)]

    assert run(consume(), new_loop) == [1]


@every_loop
def test_an_event_loop_in_another_thread_is_stopped_by_a_signal(new_loop: Any) -> None:
    """Only the main thread receives signals, so the event is created there, with ``loop``."""
    loop = new_loop()
    waiting = threading.Event()

    async def wait(event: CancellationEvent) -> object:
        waiting.set()
        async with asyncio.timeout(WAIT_SECONDS):
            await event.wait()
        return event.reason

    reasons: list[object] = []
    with make_cancellation_event(loop=loop) as event:
        thread = threading.Thread(
            target=lambda: reasons.append(loop.run_until_complete(wait(event)))
        )
        thread.start()
        assert waiting.wait(WAIT_SECONDS)
        signal.raise_signal(signal.SIGTERM)
        thread.join(WAIT_SECONDS)
        loop.close()
    assert reasons == [signal.SIGTERM]


async def test_outside_the_main_thread_signals_are_a_clear_error() -> None:
    async def make() -> None:
        make_cancellation_event()

    with pytest.raises(RuntimeError, match=r"^signals reach only the main thread: .* there$"):
        await asyncio.to_thread(asyncio.run, make())


# Before the event loop runs, and after.


@every_loop
def test_a_signal_before_the_event_loop_runs_is_not_lost(new_loop: Any) -> None:
    loop = new_loop()
    with make_cancellation_event(loop=loop) as event:
        signal.raise_signal(signal.SIGTERM)
        loop.run_until_complete(event.wait())
        loop.close()
    assert event.reason is signal.SIGTERM


@pytest.mark.parametrize(
    "earlier", [signal.SIG_IGN, signal.SIG_DFL, print], ids=["ignored", "default", "a function"]
)
def test_the_earlier_handlers_are_restored(earlier: Any) -> None:
    found = [signal.signal(signum, earlier) for signum in SIGNALS]
    try:

        async def main() -> None:
            with make_cancellation_event() as event:
                assert signal.getsignal(signal.SIGTERM) == event._on_signal

        run(main())
        assert [signal.getsignal(signum) for signum in SIGNALS] == [earlier, earlier]
    finally:
        for signum, handler in zip(SIGNALS, found, strict=True):
            signal.signal(signum, handler)


async def test_for_a_handler_that_is_not_pythons_the_default_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program that embeds Python has such a handler: its own handler cannot be restored."""
    found, set_handler = signal.getsignal(signal.SIGINT), signal.signal
    event = make_cancellation_event(signals=[])
    with monkeypatch.context() as embedded:
        embedded.setattr(signal, "signal", lambda *arguments: set_handler(*arguments) and None)
        event.install_signals([signal.SIGINT])
    event.restore_signals()
    left = set_handler(signal.SIGINT, found)
    assert left == signal.SIG_DFL


async def test_signals_that_are_installed_twice_are_restored() -> None:
    event = make_cancellation_event()
    event.install_signals(SIGNALS)
    event.restore_signals()  # the fixture checks the handlers
    event.restore_signals()


async def test_the_inner_one_of_two_events_has_the_signals_until_it_is_left() -> None:
    with make_cancellation_event() as outer:
        with make_cancellation_event() as inner:
            signal.raise_signal(signal.SIGTERM)
            await let_all_run()
            assert (inner.is_set(), outer.is_set()) == (True, False)
        signal.raise_signal(signal.SIGTERM)
        await let_all_run()
        assert outer.is_set()


@both_signals
def test_a_signal_after_the_event_loop_has_closed_reaches_the_earlier_handlers(
    signum: signal.Signals,
) -> None:
    reached: list[int] = []
    found = signal.signal(signum, lambda number, _: reached.append(number))
    try:
        loop = asyncio.new_event_loop()
        events = [make_cancellation_event([signum], loop) for _ in range(2)]
        loop.close()
        signal.raise_signal(signum)
        signal.raise_signal(signum)
        assert reached == [signum, signum]
        assert [event.signals for event in events] == [[], []]
    finally:
        signal.signal(signum, found)


def test_the_runner_does_not_cancel_the_main_task_on_sigint_too() -> None:
    async def main() -> int:
        runners_own = signal.getsignal(signal.SIGINT)
        with make_cancellation_event() as event:
            signal.raise_signal(signal.SIGINT)
            await event.wait()
            await let_all_run()
        assert signal.getsignal(signal.SIGINT) is runners_own
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert run(main()) == 0


def test_an_event_made_for_the_loop_of_a_runner_keeps_sigint_from_it() -> None:
    with (
        asyncio.Runner() as runner,
        make_cancellation_event(loop=runner.get_loop()) as event,
    ):

        async def main() -> None:
            signal.raise_signal(signal.SIGINT)
            await event.wait()

        runner.run(main())
        assert event.reason is signal.SIGINT


async def test_an_event_loop_without_add_signal_handler_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_there(*_: object) -> None:
        raise NotImplementedError  # event loops without signal handlers raise this

    monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", not_there)
    with make_cancellation_event() as event:
        signal.raise_signal(signal.SIGTERM)
        await event.wait()


# Real processes.


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.slow
@both_signals
def test_an_idle_process_ends_quietly_on_a_signal(signum: signal.Signals) -> None:
    with Child("asyncio.run(main())") as child:
        assert child.line() == "ready"
        child.kill(signum)
        assert child.end() == (f"stopped by {signum.name}", 0)


@pytest.mark.slow
def test_a_process_that_was_started_with_sigint_ignored_is_stopped_by_it() -> None:
    """Shells start background jobs like this."""
    with Child("asyncio.run(main())", preexec_fn=ignore_sigint) as child:
        assert child.line() == "ready"
        child.kill(signal.SIGINT)
        assert child.end() == ("stopped by SIGINT", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "end"),
    [(signal.SIGTERM, ("", -signal.SIGTERM)), (signal.SIGINT, ("interrupted", 1))],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_process_can_be_killed_when_its_event_loop_has_closed(
    signum: signal.Signals, end: tuple[str, int]
) -> None:
    with Child(
        """
        import time

        asyncio.run(main())
        try:
            print("closed", flush=True)
            while True:  # signal.pause would sleep through a signal that comes just before it
                time.sleep(0.01)
        except KeyboardInterrupt:
            sys.exit("interrupted")
        """
    ) as child:
        assert child.line() == "ready"
        child.kill(signal.SIGTERM)
        assert child.line() == "stopped by SIGTERM"
        assert child.line() == "closed"
        child.kill(signum)
        assert child.end() == end


async def test_a_fork_restores_the_earlier_handlers_first_in_the_child() -> None:
    earlier = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    known = cancellation._with_handlers.copy()
    with make_cancellation_event(), make_cancellation_event():
        cancellation._restore_signals_in_a_forked_child()
        assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == earlier
    assert cancellation._with_handlers == []
    cancellation._with_handlers.extend(known)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_the_earlier_handlers() -> None:
    """Otherwise it would swallow SIGTERM, and `multiprocessing.Pool.terminate` would wait forever."""
    with Child(
        """
        import multiprocessing

        earlier = signal.getsignal(signal.SIGTERM)

        def look():
            sys.exit(signal.getsignal(signal.SIGTERM) != earlier)

        def run(ready):
            ready.set()
            signal.pause()

        async def fork():
            with make_cancellation_event(), make_cancellation_event() as event:
                context = multiprocessing.get_context("fork")
                looking = context.Process(target=look)
                looking.start()
                looking.join()
                assert looking.exitcode == 0
                ready = context.Event()
                forked = context.Process(target=run, args=(ready,))
                forked.start()
                ready.wait()
                forked.terminate()
                forked.join()
                print(forked.exitcode, event.signals)

        asyncio.run(fork())
        """
    ) as child:
        assert child.end() == (f"{-signal.SIGTERM} []", 0)
