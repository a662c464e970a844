# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Workers take messages, run handlers and settle; on shutdown they drain.

Each worker is the loop of the article::

    async for message in cancellable_aiter(source, cancellation_event):
        await process(message)

Graceful shutdown, in this order: fetching stops, and messages that no worker took are requeued; workers finish the
in-flight messages within ``drain_seconds``; at that deadline the remaining handlers are cancelled and their messages
requeued, never acked and never dead-lettered; settlements are flushed and everything is closed, each step bounded.
"""

import asyncio
import contextvars
import sys
import threading
import time
import traceback
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from signal import Signals
from typing import Any, TypeVar

import structlog
from structlog.contextvars import bind_contextvars, unbind_contextvars

from . import systemd
from .brokers.put_off import backoff_seconds
from .brokers.source import Source
from .cancellation import (
    CancellationEvent,
    CancellationRequested,
    cancellable_aiter,
    cancellable_sleep,
    cancellable_wait,
)
from .errors import BrokerUnavailable, ExitCode, SourceFailed, forced_exit_code
from .handlers import Handler, Router
from .logs import without_input
from .message import REASON_CHARACTERS, Message, Reject, Retry, Shutdown
from .settings import ConsumerSettings
from .signals import forces, name_of
from .telemetry import NO_HANDLER, Outcome, State, Telemetry

T = TypeVar("T")

log = structlog.get_logger()

IDLE_SECONDS = 0.1
"""For idle workers to notice the shutdown, however short the drain time is."""
CANCEL_AGAIN_SECONDS = 0.5
STOP_SOURCE_SECONDS = 3
CANCEL_SECONDS = 1
REQUEUE_SECONDS = 0.5
CLOSE_SOURCE_SECONDS = 3.25
CLOSE_LIFESPAN_SECONDS = 2.75
"""The source stops while handlers finish or are cancelled; with that, the sum is below `watchdog.CLOSE_SECONDS`."""

# The variable behind bind_contextvars(message_id=...), at a tenth of the cost for each message.
_message_id = contextvars.Context().run(bind_contextvars, message_id="")["message_id"].var

Lifespan = Callable[[], AbstractAsyncContextManager[None]]


class Consumer:
    """Runs one service from the first connection to the last close. Used once. See `telemetry.ConsumerView`."""

    def __init__(
        self,
        source: Source,
        router: Router,
        event: CancellationEvent,
        settings: ConsumerSettings,
        lifespan: Lifespan | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.source = source
        self.router = router
        self.event = event
        self.settings = settings
        self.lifespan = lifespan() if lifespan is not None else None
        self.telemetry = telemetry if telemetry is not None else Telemetry()
        self.state: State = "starting"
        self.in_flight: dict[Message, str] = {}
        """Messages delivered to a handler and not settled yet, each with its handler's name."""
        source.in_flight = self.in_flight
        self.handled_count = 0
        self.rejected_count = 0
        self.abandoned_count = 0
        self.errors: list[BaseException] = []
        self._shutdown = Shutdown(event, settings.drain_seconds)
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancelling_handlers = False
        self._fetching_stopped = asyncio.Event()
        self._open_batches: dict[Handler, _Batch] = {}
        self._batch_slots = asyncio.Semaphore(settings.concurrency)
        self._threads = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="handler")
        self._loop = asyncio.get_running_loop()
        self._forced: asyncio.Future[Signals] = self._loop.create_future()
        event.on_repeat = self._on_repeated_signal
        self.telemetry.watch(self)

    async def run(self) -> int:
        """Consume until the event is set; returns the exit code.

        Raises BrokerUnavailable or BrokerRefused if it could not start.
        """
        exit_code: int = ExitCode.DRAINED
        try:
            exit_code = await self._run_in_lifespan()
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError  # from outside: a task group takes back its own
        except CancellationRequested:  # while starting: no message was taken
            log.info("stop_requested", reason=name_of(self.event.reason))
        finally:
            self.state = "stopped"
            self._threads.shutdown(wait=False, cancel_futures=True)
            for error in _distinct(self.errors):
                log.error("crashed", error=str(error), exc_info=error)
        crashed = self.errors and exit_code == ExitCode.DRAINED
        return ExitCode.CRASHED if crashed else exit_code

    @property
    def handler_types(self) -> Sequence[str]:
        return self.router.types

    @property
    def outage_count(self) -> int:
        return self.source.outage_count

    @property
    def shutdown_began_at(self) -> float | None:
        return self.event.set_at

    async def _run_in_lifespan(self) -> int:
        if self.lifespan is None:
            return await self._run_on_source()
        await cancellable_wait(self.lifespan.__aenter__(), self.event)
        try:
            return await self._outlive_cancellation(self._run_on_source())
        finally:
            await self._step(
                "lifespan", self.lifespan.__aexit__(None, None, None), CLOSE_LIFESPAN_SECONDS
            )

    async def _outlive_cancellation(self, work: Coroutine[Any, Any, int]) -> int:
        """Drain when this task is cancelled, as a task group of the lifespan does when one of its tasks fails."""
        task = asyncio.create_task(work, name="consumer")
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:  # by anyio again and again
                self.event.set("failure")
        return task.result()

    async def _run_on_source(self) -> int:
        until = self._loop.time() + self.settings.connect_seconds
        await self._insist(self.source.__aenter__, until)
        try:
            await self._insist(self.source.declare, until)
            await self._insist(self.source.start, until)
            self.state = "consuming"
            systemd.notify("READY=1", "STATUS=consuming")
            log.info(
                "consuming", source=self.settings.source, concurrency=self.settings.concurrency
            )
            for number in range(self.settings.concurrency):
                self._start(self._work(), name=f"worker-{number}")
            await self.event.wait()
            return await self._drain()
        finally:
            await self._step(
                "source", self.source.__aexit__(None, None, None), CLOSE_SOURCE_SECONDS
            )

    async def _insist(self, step: Callable[[], Coroutine[Any, Any, object]], until: float) -> None:
        """Run one step of the start; repeat it while the broker is unavailable, until that time."""
        attempt = 0
        while True:
            try:
                await unless_set(step(), self.event)
                return
            except BrokerUnavailable as error:
                attempt += 1
                delay = backoff_seconds(attempt, first=0.5, longest=10)
                if self._loop.time() + delay > until:
                    raise
                log.warning(
                    "reconnecting", reason=str(error), attempt=attempt, seconds=round(delay, 1)
                )
            if not await cancellable_sleep(delay, self.event):
                raise CancellationRequested

    # -- handling

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_finished)

    def _on_finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)
            self.event.set("failure")  # do not idle: the other workers finish, the process exits

    async def _work(self) -> None:
        async for message in cancellable_aiter(self.source, self.event):
            _message_id.set(message.id)
            message.shutdown = self._shutdown
            name = NO_HANDLER
            try:
                handler = self.router.route(message)
                name = handler.name
                payload = handler.decode(message)
            except Reject as rejection:
                self.in_flight[message] = name
                self.telemetry.refused(name, message, rejection)
                await self._reject(message, str(rejection))
                self._settled(message, name, "rejected")
                continue
            self.in_flight[message] = name
            if handler.batched:
                self._add_to_batch(handler, message, payload)
            else:
                await self._process(handler, [message], [payload])
        if not self.event.is_set():
            msg = "the source ended without a shutdown"
            raise SourceFailed(msg)

    async def _process(
        self, handler: Handler, messages: list[Message], payloads: list[Any]
    ) -> None:
        failure: BaseException | None = None
        handling = self.telemetry.handling(handler.name, messages)
        try:
            await _in_a_context_of_its_own(handler.call(payloads, messages, self._threads))
        except BaseException as error:  # also SystemExit, and the panics of extensions in Rust
            failure = error
        self.telemetry.handled(handling, failure)
        task = asyncio.current_task(self._loop)
        assert task is not None
        if task.cancelling():
            if self._cancelling_handlers:
                # Also after a swallowed cancellation: the handler's progress is unknown.
                await self._requeue(messages)
                raise asyncio.CancelledError
            # The handler cancelled its own task without `uncancel`.
            while task.uncancel():
                pass
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        for message in messages:
            outcome: Outcome = "handled"
            if failure is None:
                self.handled_count += 1
                await self.source.ack(message)
            else:
                outcome = await self._fail(message, failure)
            self._settled(message, handler.name, outcome)

    def _settled(self, message: Message, handler_name: str, outcome: Outcome) -> None:
        self.telemetry.settled(handler_name, outcome)
        self.in_flight.pop(message, None)

    def _add_to_batch(self, handler: Handler, message: Message, payload: Any) -> None:
        batch = self._open_batches.get(handler)
        if batch is None:
            batch = self._open_batches[handler] = _Batch()
            self._start(self._process_batch(handler, batch), name=f"batch-{handler.name}")
        batch.messages.append(message)
        batch.payloads.append(payload)
        if len(batch.messages) >= self.settings.batch_size:
            del self._open_batches[handler]
            batch.full.set()

    async def _process_batch(self, handler: Handler, batch: "_Batch") -> None:
        unbind_contextvars("message_id")  # this task inherited its first one's
        try:
            with suppress(TimeoutError, CancellationRequested):
                async with asyncio.timeout(self.settings.batch_seconds):
                    await cancellable_wait(batch.full.wait(), self.event)
            if self._open_batches.get(handler) is batch:
                del self._open_batches[handler]
            await self._batch_slots.acquire()
        except asyncio.CancelledError:
            await self._requeue(batch.messages)
            raise
        try:
            await self._process(handler, batch.messages, batch.payloads)
        finally:
            self._batch_slots.release()

    # -- settling what failed

    async def _fail(self, message: Message, failure: BaseException) -> Outcome:
        reason = _storable(f"{type(failure).__name__}: {_text_of(failure)}")
        if isinstance(failure, Reject):
            await self._reject(message, _storable(_text_of(failure)))
        elif _is_checkpoint(failure) and self.event.is_set():
            # After fetching has stopped: else the broker could deliver it to this process again.
            await self._fetching_stopped.wait()
            await self.source.requeue(message)
            return "retried"
        elif message.attempt >= self.settings.max_attempts:
            await self._reject(
                message, f"failed {message.attempt} times, last with {reason}", failure
            )
        else:
            delay = failure.delay_seconds if isinstance(failure, Retry) else None
            if delay is None:
                delay = backoff_seconds(
                    message.attempt, self.settings.retry_seconds, self.settings.retry_max_seconds
                )
            log.warning(
                "message_retried",
                id=message.id,
                attempt=message.attempt,
                seconds=round(delay, 3),
                reason=reason,
                exc_info=None if isinstance(failure, Retry) else failure,
            )
            await self.source.retry(message, delay, reason)
            return "retried"
        return "rejected"

    async def _reject(
        self, message: Message, reason: str, failure: BaseException | None = None
    ) -> None:
        log.error(
            "message_rejected",
            id=message.id,
            attempt=message.attempt,
            reason=reason,
            exc_info=failure,
        )
        self.rejected_count += 1
        await self.source.reject(message, reason)

    async def _requeue(self, messages: list[Message]) -> None:
        for message in messages:
            if self.in_flight.pop(message, None) is not None:
                await self.source.requeue(message)

    # -- draining

    async def _drain(self) -> int:
        loop = asyncio.get_running_loop()
        requested_at = self.event.set_at if self.event.set_at is not None else loop.time()
        deadline = requested_at + self.settings.drain_seconds
        self._shutdown.deadline = time.monotonic() + deadline - loop.time()
        self.state = "draining"
        systemd.notify("STOPPING=1", f"STATUS=draining, {len(self.in_flight)} in flight")
        log.info("stop_requested", reason=name_of(self.event.reason))
        log.info("draining", in_flight=len(self.in_flight), seconds=self.settings.drain_seconds)
        stopping = asyncio.create_task(
            self._step("deliveries", self.source.stop(), STOP_SOURCE_SECONDS), name="stop-source"
        )
        stopping.add_done_callback(lambda _: self._fetching_stopped.set())
        await self._wait_for_handlers(deadline)
        if self._tasks:
            await self._cancel_handlers()
        await stopping
        self.telemetry.stopped(loop.time() - requested_at)
        log.info(
            "drained",
            handled=self.handled_count,
            requeued=self.source.requeued_count,
            abandoned=self.abandoned_count,
            seconds=round(loop.time() - requested_at, 3),
        )
        if self._forced.done():
            return forced_exit_code(self._forced.result())
        return ExitCode.DEADLINE if self.abandoned_count else ExitCode.DRAINED

    async def _wait_for_handlers(self, deadline: float) -> None:
        """Until all have finished, the deadline (event loop time) passes, or a second signal forces."""
        loop = asyncio.get_running_loop()
        deadline = max(deadline, loop.time() + IDLE_SECONDS)
        while self._tasks and not self._forced.done() and (seconds := deadline - loop.time()) > 0:
            ends: set[asyncio.Future[Any]] = {self._forced, *self._tasks}
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self._forced.done():
            log.warning("forced", reason=name_of(self._forced.result()))

    async def _cancel_handlers(self) -> None:
        """Cancel the remaining handlers, and requeue their messages."""
        self._cancelling_handlers = True
        self.abandoned_count = len(self.in_flight)
        for message, name in self.in_flight.items():
            log.error("message_abandoned", id=message.id, handler=name, attempt=message.attempt)
            self.telemetry.settled(name, "abandoned")
        stacks = [*map(_stack_of_task, self._tasks), *_stacks_of_threads()]
        log.error("handlers_abandoned", stacks=stacks)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=CANCEL_SECONDS)
        # A handler that swallows its cancellation is abandoned; its message is requeued.
        await self._step("requeue", self._requeue(list(self.in_flight)), REQUEUE_SECONDS)

    async def _step(self, name: str, work: Awaitable[object], seconds: float) -> None:
        """One bounded step of closing. If it fails, the exit code is 1 and the next step runs anyway."""
        try:
            async with asyncio.timeout(seconds):
                await work
            log.debug("step_done", step=name)
        except (Exception, asyncio.CancelledError) as error:  # some clients cancel themselves
            log.error("close_failed", step=name, error=str(error) or type(error).__name__)
            self.errors.append(error)

    def _on_repeated_signal(self, signum: Signals) -> None:
        # Several may have arrived while the event loop was blocked: each counts with its own time.
        first = self.event.signals[0][1]
        forcing = [one for one, received in self.event.signals if forces(one, received - first)]
        if forcing and not self._forced.done():
            self._forced.set_result(forcing[0])
        else:
            log.info("signal_ignored", signal=signum.name, reason="already shutting down")


async def unless_set(work: Coroutine[Any, Any, T], event: asyncio.Event) -> T:
    """Do the work; if the event is set first, cancel it until it ends and raise CancellationRequested.

    Once is not enough: `asyncio.wait_for` of Python 3.11, which clients use, loses a cancellation that comes with
    the result it waits for.
    """
    task = asyncio.create_task(work)
    try:
        await cancellable_wait(asyncio.wait({task}), event)
    except BaseException as stop:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_AGAIN_SECONDS)
        if task.cancelled() or not isinstance(stop, CancellationRequested):
            raise
    return task.result()


def _distinct(errors: list[BaseException]) -> list[BaseException]:
    """One failure of the source ends every worker: it is logged once."""
    return list({id(error.__cause__ or error): error for error in errors}.values())


class _Batch:
    """The messages of one call of a batch handler."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.payloads: list[Any] = []
        self.full = asyncio.Event()


@types.coroutine
def _in_a_context_of_its_own(
    call: Coroutine[Any, Any, None],
) -> Generator[Any, None, None]:
    """Await the call with its own context: variables that it sets, or binds for the log, end with it.

    A task would do that too, at twenty times the cost.
    """
    context = contextvars.copy_context()
    resume: Callable[[Any], Any] = call.send
    value: Any = None
    while True:
        try:
            awaited = context.run(resume, value)
        except StopIteration:
            return
        try:
            yield awaited
            resume, value = call.send, None
        except BaseException as thrown:
            resume, value = call.throw, thrown


def _is_checkpoint(failure: BaseException) -> bool:
    """Whether the handler asks for a redelivery without a delay."""
    return isinstance(failure, Retry) and failure.delay_seconds is None


def _text_of(failure: BaseException) -> str:
    try:
        return str(failure)
    except Exception as error:  # a bug in its __str__ must not end the service
        return f"<{type(error).__name__} in __str__>"


def _storable(reason: str) -> str:
    """The text without lone surrogates: errors get them from file names and JSON, and brokers reject them."""
    return without_input(reason)[:REASON_CHARACTERS].encode(errors="replace").decode()


def _stack_of_task(task: asyncio.Task[None]) -> str:
    """The stack of a suspended task, outermost first; asyncio's own get_stack() shows one frame only."""
    lines = [task.get_name()]
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        lines.append(f"  {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}")
        awaited = awaited.cr_await
        if (generator := getattr(awaited, "gi_frame", None)) is not None:
            awaited = generator.f_locals.get("call")  # see _in_a_context_of_its_own
    return "\n".join(lines)


def _stacks_of_threads() -> list[str]:
    frames = sys._current_frames()
    return [
        f"{thread.name}\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threading.enumerate()
        if thread.name.startswith("handler") and thread.ident in frames
    ]
