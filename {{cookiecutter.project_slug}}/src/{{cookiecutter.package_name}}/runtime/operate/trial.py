# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""One trial of a rehearsal, in a child process: the whole service, disturbed at one moment of its handler.

A moment is a line of the service's own code, or the begin or end of an await of the handler. Moments are counted, so
the same number is the same place in each run. The events of a trial are written to standard output, with the log.
"""

import asyncio
import functools
import json
import os
import sys
import threading
import time
import types
from collections.abc import Coroutine, Generator, Sequence
from contextvars import ContextVar
from pathlib import Path
from signal import Signals
from types import FrameType
from typing import Any, Literal

from ..brokers.source import Source
from ..consumer import Consumer
from ..handlers import Handler
from ..message import Message, OutgoingMessage, Pause
from ..telemetry import Outcome, Telemetry

RUNTIME, LIBRARY = str(Path(__file__).resolve().parents[1]), str(Path(os.__file__).parent)
LONGEST_RUN_SECONDS = 10.0
"""A handler that runs longer than this, or than the drain time, gets SIGTERM."""
LONGEST_DELAY_SECONDS = 0.02  # also the longest backoff: RabbitMQ has a queue for each length
MOST_MOMENTS = 10_000
AFTER = -1
"""The moment between the work and its acknowledgement."""

Kind = Literal["undisturbed", "SIGTERM", "SIGKILL", "deadline", "failure"]


def note(**what: Any) -> None:
    """Write a note in one write, so that SIGKILL cuts no line."""
    os.write(1, f"{json.dumps(what)}\n".encode())


@functools.cache
def is_ours(file: str) -> bool:
    """Whether the file has code of the service, not of the runtime or a library."""
    return not file.startswith((RUNTIME, LIBRARY, "<")) and "-packages" not in file


class Trial(Telemetry):
    """The telemetry of a consumer: it disturbs the consumer, and ends it when ``expected`` messages are settled."""

    def __init__(
        self, kind: Kind, moment: int, expected: int, failure: BaseException, traced: bool
    ) -> None:
        """The first moment is 1; with 0, the trial disturbs nothing."""
        super().__init__()
        self._kind, self._moment = kind, moment
        self._expected, self._failure, self._traced = expected, failure, traced
        self._moments: list[tuple[str, str, bool]] = []
        self._count = 0
        self._where = ""
        self._last_lines: dict[FrameType, int] = {}
        self._step_began_at = self._line_began_at = 0.0
        self._blocked_seconds = self._longest_line_seconds = 0.0
        self._longest_line = ""
        self._in_handler: ContextVar[bool] = ContextVar("in_handler", default=False)
        self._tasks: list[asyncio.Task[Any]] = []
        self._threads: set[threading.Thread] = set()

    def watch(self, consumer: Consumer) -> None:
        super().watch(consumer)
        self._event, self._drain_seconds = consumer.event, consumer.settings.drain_seconds
        self._loop = asyncio.get_running_loop()
        self._loop.set_task_factory(self._make_task)
        for handler in consumer.router.handlers.values():
            handler.function = self._watched(handler)
        source: Any = consumer.source
        ack, retry, reject = source.ack, source.retry, source.reject

        async def watched_ack(message: Message) -> None:
            if self._moment == AFTER:
                self._strike("")
            note(settled=message.id)
            await ack(message)

        async def watched_reject(message: Message, reason: str) -> None:
            note(settled=message.id, rejected=reason)
            await reject(message, reason)

        async def record(messages: Sequence[OutgoingMessage]) -> None:
            for one in messages:
                note(published=(f"published {one.type or 'a message'} to {one.to}", one.id))

        async def retry_soon(message: Message, seconds: float, reason: str) -> None:
            await retry(message, min(seconds, LONGEST_DELAY_SECONDS), reason)

        source.ack, source.retry, source.reject = watched_ack, retry_soon, watched_reject
        source.publish = record
        source.publish_and_ack = functools.partial(Source.publish_and_ack, source)  # in two steps

    # -- called by the consumer

    def handling(self, handler: str, messages: Sequence[Message]) -> float:
        self._threads = set(threading.enumerate())
        if self._kind == "undisturbed":
            seconds = min(self._drain_seconds, LONGEST_RUN_SECONDS)
            self._loop.call_later(seconds, self._end_long_run)
        return time.monotonic()

    def handled(self, handling: float, failure: BaseException | None) -> None:
        if isinstance(failure, Pause):
            failure.seconds = 0.0  # the shortest pause
        note(
            ended=type(failure).__name__ if failure is not None else "",
            run_seconds=time.monotonic() - handling,
            moments=self._moments,
            blocked_seconds=self._blocked_seconds,
            longest_line=self._longest_line,
            left=[*self._left_tasks(), *self._left_threads()] if failure is None else [],
        )

    def settled(self, handler: str, outcome: Outcome) -> None:
        super().settled(handler, outcome)
        done = sum(n for (_, how), n in self.outcomes.items() if how in ("handled", "rejected"))
        if done >= self._expected:
            self._event.set("the trial is over")

    def _end_long_run(self) -> None:
        if not self._event.is_set():
            os.kill(os.getpid(), Signals.SIGTERM)

    # -- tasks and threads that outlive their handler

    def _make_task(self, loop: Any, work: Any, **options: Any) -> Any:
        task = asyncio.Task(work, loop=loop, **options)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and f"{os.sep}asyncio{os.sep}" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None and self._in_handler.get() and is_ours(frame.f_code.co_filename):
            self._tasks.append(task)
        return task

    def _left_tasks(self) -> list[str]:
        return [
            f"the task of {getattr(task.get_coro(), '__qualname__', task.get_name())}()"
            for task in self._tasks
            if not task.done() and not task.cancelling()
        ]

    def _left_threads(self) -> list[str]:
        frames = sys._current_frames()
        return [
            f"the thread {thread.name}"
            for thread in set(threading.enumerate()) - self._threads
            if not thread.name.startswith("handler")
            and self._works_for_us(frames.get(thread.ident or 0))
        ]

    def _works_for_us(self, frame: FrameType | None) -> bool:
        while frame is not None and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        return frame is not None

    # -- the moments of a handler

    def _watched(self, handler: Handler) -> Any:
        function = handler.function

        @functools.wraps(function)
        def in_thread(*arguments: Any) -> Any:
            self._in_handler.set(True)
            self._trace()
            try:
                return function(*arguments)
            finally:
                sys.settrace(None)

        @functools.wraps(function)
        async def in_steps(*arguments: Any) -> Any:
            self._in_handler.set(True)
            return await self._step(function(*arguments))

        return in_thread if handler.blocking else in_steps

    @types.coroutine
    def _step(self, call: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        steps = call.__await__()  # `limits.stack_of_task` finds the stack by the name `call`
        thrown: BaseException | None = None
        while True:
            self._step_began_at = time.monotonic()
            self._trace()
            try:
                awaited: Any = steps.send(None) if thrown is None else steps.throw(thrown)
            except StopIteration as end:
                return end.value
            finally:
                sys.settrace(None)
                seconds = time.monotonic() - self._step_began_at
                self._blocked_seconds = max(self._blocked_seconds, seconds)
            try:
                if self._reach("suspended", self._where) and self._kind == "deadline":
                    try:
                        yield from self._loop.create_future()  # never done, so the handler waits
                    except BaseException:
                        if awaited is not None:
                            awaited.cancel()
                        raise
                yield awaited
                thrown = None
            except BaseException as error:
                thrown = error
            self._reach("resumed", self._where)

    def _trace(self) -> None:
        self._line_began_at = time.monotonic()
        if self._traced:
            sys.settrace(self._on_call)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._on_line if is_ours(frame.f_code.co_filename) else None

    def _on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        now = time.monotonic()
        if (seconds := now - self._line_began_at) > self._longest_line_seconds:
            self._longest_line_seconds, self._longest_line = seconds, self._where
        if event == "line":
            self._where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            # Not in the head of a `with` that ends: it would not close its context.
            forward = frame.f_lineno > self._last_lines.get(frame, 0)
            self._last_lines[frame] = frame.f_lineno
            if self._reach("line", self._where, forward) and self._kind == "failure":
                raise self._failure
        self._line_began_at = time.monotonic()
        return self._on_line

    def _reach(self, kind: str, where: str, may_fail: bool = False) -> bool:
        """Count the moment; returns whether it is the one to disturb."""
        self._count += 1
        if len(self._moments) < MOST_MOMENTS and self._kind == "undisturbed":
            self._moments.append((kind, where, may_fail))
        if self._count != self._moment:
            return False
        self._strike(where)
        return True

    def _strike(self, where: str) -> None:
        if self._kind != "undisturbed":
            note(struck=where)
        name = "SIGTERM" if self._kind == "deadline" else self._kind
        if name in Signals.__members__:
            os.kill(os.getpid(), Signals[name])
