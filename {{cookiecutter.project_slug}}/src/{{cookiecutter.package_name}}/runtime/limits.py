# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Time limits of handlers, by one timer for all calls: `asyncio.timeout` would cost each message 4 µs.

A coroutine that exceeds its limit is cancelled, and counts as failed. A call that cannot be cancelled, since it runs in
a thread or swallows its cancellation, is *lost*: it is logged, and keeps its slot and its message until it ends.
"""

import asyncio
import math
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import structlog

from .brokers.source import Source
from .cancellation import CancellationEvent
from .handlers import Handler, Router, call_in_thread, not_raised
from .message import Message
from .ordering import Gate, OrderedBuffer
from .settings import ConsumerSettings

log = structlog.get_logger()

SWALLOWED_SECONDS = 5.0
"""A call that still runs this long after its cancellation counts as lost."""
MOST_NAMES = 5


@dataclass(slots=True, eq=False, weakref_slot=True)
class Call:
    """A task's present call, if it has messages. The consumer reuses it: a new object for each call costs too much."""

    task: Any  # of asyncio
    handler: Any = None
    messages: Sequence[Message] = ()
    ends_at: float = math.inf  # its time limit; time.monotonic()
    look_at: float = 0.0  # when to look again, once the time limit has passed
    is_cancelled: bool = False
    is_lost: bool = False


class Limits:
    def __init__(
        self,
        router: Router,
        source: Source,
        settings: ConsumerSettings,
        event: CancellationEvent,
        judge: Callable[..., None],
    ) -> None:
        self._judge = judge
        self._source, self._concurrency, self._event = source, settings.concurrency, event
        for handler in router.handlers.values():
            handler.limit(settings)
        if router.most_calls:
            gate = Gate(lambda m: getattr(router.find(m.type), "name", None), router.most_calls)
            buffer = OrderedBuffer(*source.buffer.gates, gate)
            for one in (source, *source.parts):
                one.buffer = buffer
        self._calls = WeakKeyDictionary[Call, None]()  # a call ends with its task
        # No call that has begun since the last look can exceed its limit before the next look.
        self._period = min(handler.seconds for handler in router.handlers.values())
        self._timer: asyncio.TimerHandle | None = None

    def calls_of(self, task: Any) -> Call:
        self._calls[call := Call(task)] = None
        if self._timer is None:
            self._look()
        return call

    def end(self, call: Call, failure: BaseException | None) -> BaseException | None:
        """The failure of a call that exceeded its limit and has ended, even if it swallowed its cancellation."""
        if call.is_cancelled:
            call.task.uncancel()
            if isinstance(failure, asyncio.CancelledError | None):
                cause, failure = failure, overrun(call.handler)
                failure.__cause__ = cause  # its traceback shows where the handler was
        call.look_at, call.is_cancelled, call.is_lost = 0.0, False, False
        return failure

    def _look(self) -> None:
        self._timer, now = None, time.monotonic()
        for call in self._calls:
            if (call.look_at or call.ends_at) > now:
                continue
            if call.handler.in_thread or call.is_cancelled:
                self._lose(call)
            else:
                call.is_cancelled, call.look_at = True, now + SWALLOWED_SECONDS
                call.task.cancel()
        seconds = min([self._period, *((c.look_at or c.ends_at) - now for c in self._calls)])
        if self._calls and seconds < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(0.001, seconds), self._look)

    def _lose(self, call: Call) -> None:
        call.is_lost, call.look_at = True, math.inf
        # The breaker counts it as failed: if it is the probe, the next message is tried.
        failure = overrun(call.handler)
        self._judge(call.messages, dict.fromkeys(call.messages, failure), call.handler)
        is_thread = not call.is_cancelled
        message = call.messages if call.handler.batched else call.messages[0]
        log.error(
            "handler_overrun",
            handler=call.handler.name,
            message_ids=[message.id for message in call.messages[:MOST_NAMES]],
            seconds=call.handler.seconds,
            reason="a thread cannot be cancelled" if is_thread else "it swallows its cancellation",
            stacks=stacks_of_threads(message) if is_thread else [stack_of_task(call.task)],
        )

    def why_stuck(self) -> str:
        """Why every slot, of the service or of a handler, is lost; empty if one is not lost, and on shutdown."""
        lost = [call for call in self._calls if call.is_lost]
        if not lost or self._event.is_set():
            return ""
        held = {message for call in lost for message in call.messages}
        slots = Counter(call.handler.batched for call in lost)  # batches have as many more slots
        own = Counter(call.handler for call in lost)
        source = self._source
        full = any(
            Source._room(one) <= 0
            and not one._has_takeable()
            and held.issuperset(m for m in source.in_flight if one._is_ours(m))
            for one in source.parts
        )
        suspects = source.suspects.waiting and any(map(source.suspects.is_one, held))
        if (
            max(slots.values()) < self._concurrency
            and all(count < (h.own.concurrency or math.inf) for h, count in own.items())
            and not full  # a broker delivers no more
            and not suspects  # the other suspects wait for this one
        ):
            return ""
        names = [f"{one.handler.name} (message {one.messages[0].id})" for one in lost[:MOST_NAMES]]
        return f"every slot is held by a handler past its time limit: {', '.join(names)}"


def overrun(handler: Handler) -> BaseException:
    seconds = f"{handler.seconds:g} s"
    return not_raised(TimeoutError(f"the handler took longer than its time limit of {seconds}"))


def stack_of_task(task: asyncio.Task[Any]) -> str:
    """The stack of a suspended task, outermost first; asyncio's own get_stack() shows one frame only."""
    lines = [task.get_name()]
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        lines.append(f"  {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}")
        awaited = awaited.cr_await
        if (generator := getattr(awaited, "gi_frame", None)) is not None:
            awaited = generator.f_locals.get("call")  # see consumer._in_a_context_of_its_own
    return "\n".join(lines)


def stacks_of_threads(message: object = None) -> list[str]:
    """The stacks of the threads that handle messages; or only of the thread that handles ``message``, or this batch."""
    stacks = []
    for thread in threading.enumerate():
        frame = sys._current_frames().get(thread.ident or 0)
        for one, _ in traceback.walk_stack(frame) if frame is not None else ():
            if one.f_code is call_in_thread.__code__ and message in (None, one.f_locals["message"]):
                stacks.append(f"{thread.name}\n{''.join(traceback.format_stack(frame))}")
    return stacks
