# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Workers take messages, run handlers and settle the messages; on shutdown they drain.

Each worker is the loop of the article::

    async for message in cancellable_aiter(source, cancellation_event):
        await process(message)

Graceful shutdown, in this order: fetching stops, and messages that no worker took are requeued; workers finish the
in-flight messages within ``drain_seconds``; at that deadline the remaining handlers are cancelled and their messages
requeued, never acked and never dead-lettered; settlements are flushed and everything is closed, each step bounded.
"""

import asyncio
import contextvars
import math
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from signal import Signals
from time import monotonic
from typing import Any, TypeVar

import structlog
from structlog.contextvars import bind_contextvars, unbind_contextvars

from .brokers.put_off import backoff_seconds
from .brokers.source import Source
from .cancellation import (
    CancellationEvent,
    CancellationRequested,
    cancellable_aiter,
    cancellable_sleep,
    cancellable_wait,
)
from .errors import BrokerUnavailable, ExitCode, HandlerError, SourceFailed, forced_exit_code
from .handlers import Handler, Router, not_raised
from .limits import Call, Limits, overrun, stack_of_task, stacks_of_threads
from .logs import Seldom, Tracebacks
from .message import REASON_CHARACTERS, HandlerContext, Message, Pause, Reject, Retry
from .pause import Breaker
from .publishing import Publishing, read_results
from .redaction import redacted
from .settings import ConsumerSettings
from .signals import forces, name_of
from .suspects import name_in_flight
from .telemetry import NO_HANDLER, Outcome, State, Telemetry

T = TypeVar("T")

log = structlog.get_logger()

IDLE_SECONDS = 0.1
"""The least time for idle workers to notice the shutdown, even with a shorter drain time."""
FACTOR, LEAST = 4.0, 0.92
"""The growth of the backoff, and its jitter: the default of twelve attempts spans more than an hour."""
CANCEL_AGAIN_SECONDS = 0.5
STOP_SOURCE_SECONDS = 3
CANCEL_SECONDS = 1
REQUEUE_SECONDS = 0.5
CLOSE_SOURCE_SECONDS = 3.25
CLOSE_LIFESPAN_SECONDS = 2.75
"""The source stops while handlers finish or are cancelled: the sum of all steps is below `watchdog.CLOSE_SECONDS`."""

# The variable behind bind_contextvars(message_id=...), at a tenth of the cost for each message.
_message_id = contextvars.Context().run(bind_contextvars, message_id="")["message_id"].var

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]


class Consumer:
    """Runs one service from the first connection to the last close. Used once."""

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
        self.handled_count = self.rejected_count = self._requeued_count = 0
        self.abandoned: list[tuple[str, str]] = []
        """The id and the handler of each message that was requeued at the deadline."""
        self.at_signal: tuple[int, int, int] | None = None
        """The `counts` when the shutdown began."""
        self.errors: list[BaseException] = []
        self.notify: Callable[..., None] = lambda *lines: None
        """Notifies the process manager, if there is one: see systemd.py."""
        self._delays_retries = source.capabilities.delayed_retry
        self._publishing = Publishing(source, settings.group or settings.source, self.telemetry)
        self._context = HandlerContext(event, settings.drain_seconds, self._publishing.send)
        self._tracebacks = Tracebacks()
        self.breaker = Breaker(source, settings, self._start)
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancelling_handlers = False
        self._fetching_stopped = asyncio.Event()
        self._open_batches: dict[Handler, _Batch] = {}
        self._batch_slots = asyncio.Semaphore(settings.concurrency)
        self._debugs = settings.log_level == "debug"
        self.limits = Limits(router, source, settings, event, self.breaker.judge)
        self._threads = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="handler")
        self._loop = asyncio.get_running_loop()
        self._forced: asyncio.Future[Signals] = self._loop.create_future()
        event.on_repeat = self._on_repeated_signal
        self.telemetry.watch(self)

    def counts(self) -> tuple[int, int, int]:
        """The numbers of messages in flight, settled by handlers, and requeued."""
        outcomes = self.telemetry.outcomes.copy().items()
        settled = sum(count for (_, outcome), count in outcomes if outcome != "abandoned")
        settled -= self._requeued_count
        requeued = sum(source.requeued_count for source in self.source.parts)
        return len(self.in_flight), settled, requeued

    async def run(self) -> int:
        """Consume until the event is set; returns the exit code.

        Raises BrokerUnavailable or BrokerRefused if it could not start.
        """
        exit_code: int = ExitCode.DRAINED
        try:
            exit_code = await self._run_in_lifespan()
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError  # from outside: a task group uncancels its own
        except CancellationRequested:  # while starting: no message was taken
            log.info("stop_requested", reason=name_of(self.event.reason))
        finally:
            self.state = "stopped"
            self._threads.shutdown(wait=False, cancel_futures=True)
            # One failure of the source ends every worker: it is logged once.
            for error in {id(error.__cause__ or error): error for error in self.errors}.values():
                log.error("crashed", error=str(error), exc_info=error)
        return ExitCode.CRASHED if self.errors and exit_code == ExitCode.DRAINED else exit_code

    async def _run_in_lifespan(self) -> int:
        if self.lifespan is None:
            self.router.give(None)
            return await self._run_on_source()
        if not isinstance(self.lifespan, AbstractAsyncContextManager):
            msg = "lifespan in handlers/__init__.py is not an async context manager: is @asynccontextmanager missing?"
            raise HandlerError(msg)
        opened = await cancellable_wait(self.lifespan.__aenter__(), self.event)
        try:
            self.router.give(opened)
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
            except asyncio.CancelledError:  # anyio cancels again and again
                self.event.set("failure")
        return task.result()

    async def _run_on_source(self) -> int:
        settings = self.settings
        until = self._loop.time() + settings.connect_seconds
        await self._insist(self.source.__aenter__, until)
        try:
            await self._insist(self.source.prepare, until)
            await self._insist(self.source.start, until)
            self.state = "consuming"
            self.notify("READY=1", "STATUS=consuming")
            log.info("consuming", source=settings.source, concurrency=settings.concurrency)
            for number in range(settings.concurrency):
                self._start(self._work(), name=f"worker-{number}")
            await self.event.wait()
            return await self._drain()
        finally:
            await self._step(
                "source", self.source.__aexit__(None, None, None), CLOSE_SOURCE_SECONDS
            )

    async def _insist(self, step: Callable[[], Coroutine[Any, Any, object]], until: float) -> None:
        """Run one step of the start; repeat it while the broker is unavailable, until ``until`` (event loop time)."""
        attempt, warning = 0, Seldom()
        while True:
            try:
                await unless_set(step(), self.event)
                return
            except BrokerUnavailable as error:
                attempt += 1
                delay = backoff_seconds(attempt, first=0.5, longest=10)
                if self._loop.time() + delay > until:
                    raise
                details = {"reason": str(error), "attempt": attempt, "seconds": round(delay, 1)}
                if warning.is_due():
                    log.warning("reconnecting", outage_seconds=warning.seconds, **details)
                else:
                    log.debug("reconnect_failed", **details)
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
            self.event.set("failure")  # do not idle: the other workers finish, then it exits

    async def _work(self) -> None:
        suspects, call = self.source.suspects, self.limits.calls_of(asyncio.current_task())
        async for message in cancellable_aiter(self.source, self.event):
            if message.deliveries > suspects.many or len(message.body) > suspects.most_bytes:
                await self._handle_alone(message, call)
            elif (handling := self._begin(message, call)) is not None:
                await handling
        if not self.event.is_set():
            raise SourceFailed("the source ended without a shutdown")

    async def _handle_alone(self, message: Message, call: Call) -> None:
        """Handle suspects with one worker, including those that other workers add meanwhile."""
        suspects = self.source.suspects
        suspects.waiting.append(message)
        if not suspects.lock.locked():
            async with suspects.lock:
                while suspects.waiting and not self.event.is_set():
                    if self.source.buffer.held:
                        with suppress(CancellationRequested):
                            await cancellable_wait(self.source.buffer.released(), self.event)
                        continue
                    await self.source.begin_alone(suspect := suspects.waiting[0])
                    if self.event.is_set() or suspect not in suspects.waiting:
                        continue  # requeued meanwhile
                    suspects.waiting.remove(suspect)
                    if not suspect.source._is_held(suspect):
                        suspect.source._release(suspect)
                        self.source.buffer.settled(suspect)
                    elif (handling := self._begin(suspect, call, alone=True)) is not None:
                        await handling
                        await self.source.flush()

    def _begin(
        self, message: Message, call: Call, alone: bool = False
    ) -> Coroutine[Any, Any, None] | None:
        """The call to await; None for a batch. This is not a coroutine, because it runs for each message."""
        _message_id.set(message.id)
        message.context, message.call, message.taken_at = self._context, call, monotonic()
        if self.breaker.tried or self.breaker.reason:
            self.breaker.taken(message)
        name = NO_HANDLER
        try:
            if alone:
                self.source.suspects.check(message)
            handler = self.router.route(message)
            self.in_flight[message] = message.handler = name = handler.name
            if message.deliveries > 1:
                name_in_flight(self.in_flight)
            if message.was_tried:
                self.breaker.pass_over(message)
            payload = handler.decode(message)
        except (Reject, Retry) as failure:
            self.in_flight[message] = name
            self.telemetry.refused(name, message, failure)
            return self._refuse(message, name, failure)
        if handler.batched and not alone:
            self._add_to_batch(handler, message, payload)
            return None
        if handler.batched and handler.slots:
            return self._process_within(handler.slots, call, handler, [message], [payload])
        return self._process(call, handler, [message], [payload])

    async def _process_within(self, slots: list[asyncio.Semaphore], *arguments: Any) -> None:
        async with slots[0]:
            await self._process(*arguments)

    async def _refuse(self, message: Message, name: str, failure: Reject | Retry) -> None:
        self.breaker.judge([message], {message: failure})
        self._settled(message, name, await self._fail(message, failure))

    async def _process(
        self, call: Call, handler: Handler, messages: list[Message], payloads: list[Any]
    ) -> None:
        result, failure, task = None, None, call.task
        for message in messages if self._debugs else ():
            log.debug("handling", message_id=message.id, handler=handler.name)
        handling = self.telemetry.handling(handler.name, messages)
        call.handler, call.messages = handler, messages
        call.ends_at = monotonic() + handler.seconds
        try:
            calling = handler.call(payloads, messages, self._threads)
            if handler.has_result:
                results: list[Any] = []
                calling = _kept(calling, results)
            # With a context of its own: variables that the handler sets, or binds for the log, end with the call.
            # A task would do that too, at twenty times the cost.
            context, steps = contextvars.copy_context(), calling.__await__()
            if (awaited := context.run(next, steps, calling)) is not calling:
                await _in_a_context_of_its_own(calling, context, steps, awaited)
            if handler.has_result:
                [result] = results
        except BaseException as error:  # also SystemExit, and the panics of extensions in Rust
            failure = error
        if call.look_at:
            failure = self.limits.end(call, failure)
        self.telemetry.handled(handling, failure)
        if task.cancelling():
            if self._cancelling_handlers:
                call.look_at = math.inf  # it has ended; `call.ends_at` says whether in time
                # Also after a swallowed cancellation: the handler's progress is unknown.
                await self._requeue(messages)
                raise asyncio.CancelledError
            call.ends_at = math.inf
            # The handler cancelled its own task without `uncancel`.
            while task.uncancel():
                pass
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        call.ends_at, call.messages, acked, failures = math.inf, (), False, None
        if failure is not None:
            failures = dict.fromkeys(messages, failure)
        elif result is not None:
            acked, failures = await self._publish_results(handler, messages, result)
        if failures or self.breaker.alert:
            self.breaker.judge(messages, failures or {}, handler)
        if failures:  # handled messages do not wait until the broker has stored the failed ones
            messages = sorted(messages, key=failures.__contains__)
        for message in messages:
            outcome: Outcome = "handled"
            if failures and (cause := failures.get(message)) is not None:
                outcome = await self._fail(message, cause)
            else:
                self.handled_count += 1
                if not acked:
                    await self.source.ack(message)
            self._settled(message, handler.name, outcome)

    async def _publish_results(
        self, handler: Handler, messages: list[Message], result: object
    ) -> tuple[bool, dict[Message, BaseException]]:
        """Returns whether publishing has also acknowledged the messages, and which messages failed."""
        try:
            outgoing, failures = read_results(result, handler.batched)
            if not failures.keys() <= set(messages):
                raise TypeError("Failed was returned for a message that is not of its batch")
            acked = bool(outgoing) and not handler.batched
            if acked:
                await self._publishing.send(messages[0], outgoing, is_result=True)
            elif outgoing:
                refused = await self._publishing.send_results(messages, outgoing)
                failures |= {message: not_raised(error) for message, error in refused.items()}
        except Exception as error:
            not_raised(error)
            self.telemetry.failed(handler.name, error, len(messages))
            return False, dict.fromkeys(messages, error)
        for failure in failures.values():
            self.telemetry.failed(handler.name, failure)
        return acked, failures

    def _settled(self, message: Message, handler_name: str, outcome: Outcome) -> None:
        self.telemetry.settled(handler_name, outcome)
        self.in_flight.pop(message, None)
        if message.deliveries > 1:
            name_in_flight(self.in_flight)

    def _add_to_batch(self, handler: Handler, message: Message, payload: Any) -> None:
        if (batch := self._open_batches.get(handler)) is None:
            batch = self._open_batches[handler] = _Batch(self.limits.calls_of(None))
            self._start(self._process_batch(handler, batch), name=f"batch-{handler.name}")
        message.call = batch.call
        batch.messages.append(message)
        batch.payloads.append(payload)
        if len(batch.messages) >= self.settings.batch_size:
            del self._open_batches[handler]
            batch.full.set()

    async def _process_batch(self, handler: Handler, batch: "_Batch") -> None:
        unbind_contextvars("message_id")  # this task inherited the id of its first message
        slots = [*handler.slots, self._batch_slots]
        try:
            with suppress(TimeoutError, CancellationRequested):
                async with asyncio.timeout(self.settings.batch_seconds):
                    await cancellable_wait(batch.full.wait(), self.event)
            if self._open_batches.get(handler) is batch:
                del self._open_batches[handler]
            for each in slots:
                await each.acquire()
        except asyncio.CancelledError:
            await self._requeue(batch.messages)
            raise
        try:
            batch.call.task = asyncio.current_task()
            await self._process(batch.call, handler, batch.messages, batch.payloads)
        finally:
            for each in slots:
                each.release()

    # -- settling failed messages

    async def _fail(
        self, message: Message, failure: BaseException, *, may_keep: bool = True
    ) -> Outcome:
        text, is_reject = _text_of(failure), isinstance(failure, Reject)
        reason = _storable(text if is_reject else f"{type(failure).__name__}: {text}")
        kept = may_keep and self.breaker.keeps(failure)
        handler = self.router.handlers.get(message.handler)
        if is_reject or handler is None or handler.rejects(failure):
            await self._reject(message, reason)
        elif self.event.is_set() and (
            kept or (isinstance(failure, Retry) and failure.delay_seconds is None)
        ):
            # After fetching has stopped: otherwise the broker could deliver it to this process again.
            await self._fetching_stopped.wait()
            self._requeued_count += 1
            await self.source.requeue(message)
            return "retried"
        elif not kept and message.attempt >= handler.max_attempts:
            await self._reject(
                message, f"failed {message.attempt} times, last with {reason}", failure
            )
        else:
            planned = failure.delay_seconds if isinstance(failure, Retry) else None
            stays = isinstance(failure, Pause) or (kept and not self._delays_retries)
            delay = self.breaker.seconds_left if stays else planned
            if delay is None:
                first, longest = self.settings.retry_seconds, self.settings.retry_max_seconds
                delay = backoff_seconds(message.attempt, first, longest, FACTOR, LEAST)
                delay = max(delay, self.breaker.least_delay() if kept else 0.0)
            log.warning(
                "message_retried",
                message_id=message.id,
                type=message.type,
                handler=message.handler,
                attempt=message.attempt,
                seconds=round(delay, 3),
                reason=reason,
                **self._tracebacks.of(None if isinstance(failure, Retry) else failure),
                **({"paused": True} if kept else {}),
            )
            message.published_count = 0
            if kept:
                self.breaker.keep(message, stays=stays)
            if stays:
                self.source.put_back(message)
            else:
                message.attempt -= kept
                await self.source.retry(message, delay, reason)
            return "retried"
        return "rejected"

    async def _reject(
        self, message: Message, reason: str, failure: BaseException | None = None
    ) -> None:
        log.error(
            "message_rejected",
            message_id=message.id,
            type=message.type,
            handler=message.handler or NO_HANDLER,
            attempt=message.attempt,
            reason=reason,
            **self._tracebacks.of(failure),
        )
        self.rejected_count += 1
        await self.source.reject(message, reason)

    async def _requeue(self, messages: list[Message]) -> None:
        ours = [message for message in messages if self.in_flight.pop(message, None) is not None]
        await asyncio.gather(*map(self._requeue_or_fail, ours))

    async def _requeue_or_fail(self, message: Message) -> None:
        if message.call.ends_at > monotonic():
            return await self.source.requeue(message)
        # It would block each process that gets it, forever.
        await self._fail(message, overrun(self.router.handlers[message.handler]), may_keep=False)

    # -- draining

    async def _drain(self) -> int:
        requested_at = self.event.set_at if self.event.set_at is not None else self._loop.time()
        deadline = requested_at + self.settings.drain_seconds
        self._context.deadline = monotonic() + deadline - self._loop.time()
        self.state, self.at_signal = "draining", self.counts()
        self.notify("STOPPING=1", f"STATUS=draining, {len(self.in_flight)} in flight")
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
        log.info(
            "drained",
            handled=self.handled_count,
            requeued=self.counts()[2],
            abandoned=len(self.abandoned),
            seconds=round(self._loop.time() - requested_at, 3),
        )
        if self._forced.done():
            return forced_exit_code(self._forced.result())
        return ExitCode.DEADLINE if self.abandoned else ExitCode.DRAINED

    async def _wait_for_handlers(self, deadline: float) -> None:
        """Wait until all have finished, the deadline (event loop time) passes, or a second signal forces the end."""
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
        self.abandoned = [(message.id, name) for message, name in self.in_flight.items()]
        for message, name in self.in_flight.items():
            log.error(
                "message_abandoned", message_id=message.id, handler=name, attempt=message.attempt
            )
            self.telemetry.settled(name, "abandoned")
        stacks = [*map(stack_of_task, self._tasks), *stacks_of_threads()]
        log.error("handlers_abandoned", stacks=stacks)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=CANCEL_SECONDS)
        # A handler that swallows its cancellation is abandoned; its message is requeued.
        await self._step("requeue", self._requeue(list(self.in_flight)), REQUEUE_SECONDS)

    async def _step(self, name: str, work: Awaitable[object], seconds: float) -> None:
        """Run one step of closing, with a time limit. If it fails, the exit code is 1 and the next step runs anyway."""
        try:
            async with asyncio.timeout(seconds):
                await work
            log.debug("step_done", step=name)
        except (Exception, asyncio.CancelledError) as error:  # some clients cancel themselves
            log.error("close_failed", step=name, error=str(error) or type(error).__name__)
            self.errors.append(error)

    def _on_repeated_signal(self, signum: Signals) -> None:
        # Several signals may have arrived while the event loop was blocked: each counts with its own time.
        first = self.event.signals[0][1]
        forcing = [one for one, received in self.event.signals if forces(one, received - first)]
        if forcing and not self._forced.done():
            self._forced.set_result(forcing[0])
        else:
            log.info("signal_ignored", signal=signum.name, reason="already shutting down")


async def unless_set(work: Coroutine[Any, Any, T], event: asyncio.Event) -> T:
    """Do the work; if the event is set first, cancel the work until it ends, and raise CancellationRequested.

    One cancellation is not enough: `asyncio.wait_for` of Python 3.11, which clients use, loses a cancellation that
    comes with the awaited result.
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


class _Batch:
    """The messages of one call of a batch handler."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.messages: list[Message] = []
        self.payloads: list[Any] = []
        self.full = asyncio.Event()


async def _kept(call: Awaitable[Any], results: list[Any]) -> None:
    """Ends the call without a result: with one, its last step raises StopIteration, at the cost of all others."""
    results.append(await call)


@types.coroutine
def _in_a_context_of_its_own(
    call: Awaitable[None], context: contextvars.Context, steps: Any, awaited: Any
) -> Generator[Any, None, None]:
    """Await the call after its first step, which awaited ``awaited``."""
    try:
        while awaited is not call:
            run: Any = next, steps, call
            try:
                yield awaited
            except BaseException as error:
                run = steps.throw, error
            awaited = context.run(*run)
    except StopIteration:
        return  # the call ended with the exception that was thrown


def _text_of(failure: BaseException) -> str:
    try:
        return str(failure)
    except Exception as error:  # a bug in the exception's __str__ must not end the service
        return f"<{type(error).__name__} in __str__>"


def _storable(reason: str) -> str:
    """The text without lone surrogates: errors get them from file names and JSON, and brokers reject them."""
    reason = redacted(reason[: 20 * REASON_CHARACTERS])  # to redact megabytes would take seconds
    return reason[:REASON_CHARACTERS].encode(errors="replace").decode()
