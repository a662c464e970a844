# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Messages whose retry or dead letter the broker did not store: they stay unacked in this process, and are tried again.

A requeue would redeliver them at once, endlessly. No worker waits for them; other messages are handled.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from ..message import Message

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0
"""The first and the longest wait before another try."""
END_SECONDS = 0.5
"""The time limit for tries that are under way when the source stops."""

Store = Callable[[Message, str, str, float], Coroutine[Any, Any, None]]
"""Takes the message, the settlement ("retry" or "reject"), its reason, and the delay of a retry in seconds."""


class PutOffs:
    """One source's put-off messages. The functions are the source's: ``held`` says if a message can be settled."""

    def __init__(
        self,
        held: Callable[[Message], bool],
        release: Callable[[Message], None],
        deliver: Callable[[Message], None],
        store: Store,
    ) -> None:
        self.reason = ""
        """Why messages are put off; empty if none is."""
        self._held, self._release, self._deliver, self._store = held, release, deliver, store
        self.counts: dict[Message, int] = {}
        """How often each unsettled message was put off."""
        self.timers: dict[Message, asyncio.TimerHandle] = {}
        self._storing: dict[asyncio.Task[None], Message] = {}

    def add(
        self, message: Message, why: str, settlement: str, reason: str, delay_seconds: float
    ) -> None:
        """Try again after a pause that grows with each time.

        A dead letter, or a retry whose delay has not passed, is stored again; another retry happens in this process.
        """
        self.reason = why
        count = self.counts[message] = self.counts.get(message, 0) + 1
        pause = backoff_seconds(count, FIRST_SECONDS, LONGEST_SECONDS)
        pause = max(pause, min(delay_seconds, LONGEST_SECONDS))
        self.timers[message] = asyncio.get_running_loop().call_later(
            pause, self._due, message, settlement, reason, delay_seconds - pause
        )

    def _due(self, message: Message, settlement: str, reason: str, delay_seconds: float) -> None:
        del self.timers[message]
        if not self._held(message):
            self._release(message)
        elif settlement == "retry" and delay_seconds <= 0:
            message.attempt += 1
            self._deliver(message)
        else:
            storing = asyncio.create_task(self._store(message, settlement, reason, delay_seconds))
            self._storing[storing] = message
            storing.add_done_callback(lambda task: self._storing.pop(task, None))

    def forget(self, message: Message) -> None:
        """The message is settled, or the broker has taken it back."""
        if self.counts.pop(message, None) is not None:
            if (timer := self.timers.pop(message, None)) is not None:
                timer.cancel()
            if not self.counts:
                self.reason = ""

    async def end(self) -> list[Message]:
        """Stop trying, and return the messages that are still put off."""
        messages = list(self.timers)
        for timer in self.timers.values():
            timer.cancel()
        self.timers.clear()
        if self._storing:
            await asyncio.wait(self._storing, timeout=END_SECONDS)
        for task in self._storing:
            task.cancel()
        return [*messages, *self._storing.values()]


def backoff_seconds(
    attempt: int, first: float, longest: float, factor: float = 2.0, least: float = 0.5
) -> float:
    """Exponential, with jitter: between ``least`` of the delay and all of it."""
    exponential = first * factor ** min(attempt - 1, 60)
    return min(exponential, longest) * random.uniform(least, 1)
