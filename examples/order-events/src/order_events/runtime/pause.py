# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Pauses the service while a dependency of its handlers is down: by `message.Pause`, or after many failures.

In a pause no worker takes a message, except the probe: one message each time that a pause has passed. Deliveries
stay unacked in the buffer, at most `prefetch` messages, and the fetcher keeps connection and leases alive. A message
that asks for a pause is put back there. A message that fails is retried by the broker with no attempt counted:
otherwise poison messages would fill the buffer, and none that could end the pause would be delivered.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import structlog

from .brokers.delivery import MadeUpId
from .brokers.source import Source
from .handlers import Handler
from .message import Message, Pause, Reject, Retry
from .settings import ConsumerSettings

log = structlog.get_logger()

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0
"""The first and the longest of the pauses after failures, which double."""
MOST_TRIED = 1000


class Passed(Retry):
    """Raised in place of a call: the message failed in this pause, and another waiting message may end it."""


class Breaker:
    def __init__(
        self,
        source: Source,
        settings: ConsumerSettings,
        start: Callable[[Coroutine[Any, Any, None], str], None],
    ) -> None:
        self.reason = ""
        """Why the service is paused; empty if it is not."""
        self.alert = False
        """Whether it must see each result: in a pause, and after a failure."""
        self._source, self._start = source, start
        self._loop = asyncio.get_running_loop()
        most = settings.breaker_failures
        self._most = max(most, 2 * settings.concurrency) if most else math.inf
        self._longest = settings.retry_max_seconds
        self._failures: Counter[object] = Counter()  # since the last success, by message
        self.tried: dict[str, bool] = {}
        """The ids of the last messages that failed with no attempt counted; True if retried in this pause."""
        self._probe: Message | None = None
        self._passed = self._waited_after = 0
        """How many were passed over since the last probe, and up to the last wait for the broker's next delivery."""
        self._next_seconds, self._pause_number = FIRST_SECONDS, 1
        self.seconds = 0.0  # of the last pause
        self._began_at = self._ends_at = self._buffered_at = 0.0  # event loop time
        self._timer: asyncio.TimerHandle | None = None

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._ends_at - self._loop.time())

    def taken(self, message: Message) -> None:
        """A worker took the message. In a pause the message is the probe, and the next one waits for its result."""
        message.was_tried = message.id in self.tried
        if self.reason:
            self._probe = message
            self._source.buffer.hold()

    def keeps(self, failure: BaseException) -> bool:
        """Whether this failure counts no attempt. A retry with a delay of its own counts one."""
        return isinstance(failure, Pause | Passed) or bool(self.reason and not _is_planned(failure))

    def keep(self, message: Message, *, stays: bool) -> None:
        message.was_tried, self.tried[message.id] = True, not stays
        if len(self.tried) > MOST_TRIED:
            del self.tried[next(iter(self.tried))]

    def pass_over(self, message: Message) -> None:
        """Raises Passed: some brokers deliver due retries before other messages, which might end the pause."""
        if not (self.reason and self.tried.get(message.id) and self._passed < len(self.tried)):
            return
        delay, waiting = self.least_delay(), self._source.buffer.takeable
        all_tried = all(self.tried.get(one.id) for one in waiting)
        if self._passed == self._waited_after and all_tried and Source._room(message.source) > 0:
            return  # the broker has no other message
        if not waiting:
            self._ends_at = self._loop.time() + FIRST_SECONDS
            delay = min(delay, (len(self.tried) + 1) * FIRST_SECONDS)  # then all have had a turn
            self._waited_after = self._passed + 1
            self._wait()
        self._passed += 1
        raise Passed("others are tried first", delay_seconds=delay)

    def least_delay(self) -> float:
        """The least delay of a retry that counts no attempt: it grows."""
        return min(self._pause_number * (self.seconds_left or self._next_seconds), self._longest)

    def judge(
        self,
        messages: Sequence[Message],
        failures: Mapping[Message, BaseException],
        handler: Handler | None = None,
    ) -> None:
        """Learn the result of a call, or a refusal; messages without a failure were handled."""
        self.alert = True
        if is_probe := self._probe in messages:
            self._probe = None
        pauses = [one for one in failures.values() if isinstance(one, Pause)]
        unplanned = [
            one
            for one, failure in failures.items()
            if not (_is_planned(failure) or (handler and handler.rejects(failure)))
        ]
        if pauses:
            longest = max(pauses, key=lambda one: one.seconds)
            self._pause(longest.seconds, str(longest), is_new=is_probe or not self.reason)
        elif len(failures) < len(messages):
            self._failures.clear()
            if is_probe and not self.seconds_left:
                self._resume()
            self.alert = bool(self.reason)
        elif not unplanned:
            if is_probe and not self.seconds_left:  # this probe shows nothing: the next one will
                self._source.buffer.release()
        elif not self.reason and self._most < math.inf:
            first = unplanned[0]
            self._failures[hash(first.body) if isinstance(first.id, MadeUpId) else first.id] += 1
            count = self._failures.total()
            if count >= self._most and len(self._failures) > 1:  # one message alone shows no outage
                self._pause_after(f"{count} failures in a row", failures[unplanned[0]])
        elif is_probe:
            self._pause_after("it failed again", failures[unplanned[0]])

    def _pause_after(self, what: str, failure: BaseException) -> None:
        seconds, self._pause_number = self._next_seconds, self._pause_number + 1
        self._next_seconds = min(2 * seconds, LONGEST_SECONDS)
        self._passed = self._waited_after = 0
        self._pause(seconds, f"{what}, last with {type(failure).__name__}", is_new=True)

    def _pause(self, seconds: float, reason: str, *, is_new: bool) -> None:
        now = self._loop.time()
        if not self.reason:
            self._began_at = self._buffered_at = now
        self.reason = reason or "Pause"
        self.seconds = max(seconds, FIRST_SECONDS)
        self._ends_at = max(self._ends_at, now + self.seconds)
        self._source.buffer.hold()
        if is_new:
            log.warning("paused", seconds=round(self.seconds_left, 3), reason=self.reason)
        self._wait()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # The pause may have passed before its timer is set, if the process was stopped meanwhile.
        passed = 0.0 if self._source.buffer.held and self._probe is None else math.inf
        seconds = min(self.seconds_left or passed, self._source.longest_hold_seconds)
        if seconds < math.inf:
            self._timer = self._loop.call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        if not self.reason or self._source.stopped:
            return
        if self._loop.time() - self._buffered_at >= self._source.longest_hold_seconds:
            self._buffered_at = self._loop.time()
            self._start(self._source.requeue_buffered(), "requeue-buffered")
        if not self.seconds_left and self._probe is None:
            self._source.buffer.release()
        self._wait()

    def _resume(self) -> None:
        log.info("resumed", seconds=round(self._loop.time() - self._began_at, 3))
        self.tried = dict.fromkeys(self.tried, False)
        self.reason, self._next_seconds, self._pause_number = "", FIRST_SECONDS, 1
        self._source.buffer.release()


def _is_planned(failure: BaseException) -> bool:
    """Whether the handler has decided about this message alone: such a failure shows no outage."""
    return isinstance(failure, Reject) or (
        isinstance(failure, Retry) and failure.delay_seconds is not None
    )
