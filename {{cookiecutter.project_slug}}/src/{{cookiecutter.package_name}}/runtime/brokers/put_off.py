# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Messages whose retry or dead letter the broker did not store: they stay unacked in this process, and are tried again.

Requeued, they would be delivered again at once and without end. No worker waits for them, and no other message suffers.
"""

import asyncio
import random
from collections.abc import Callable

from ..message import Message

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0
"""Until the next try."""


class PutOffs:
    def __init__(self) -> None:
        self.reason = ""
        """Why, while there are some; else empty."""
        self._counts: dict[Message, int] = {}
        self._timers: dict[Message, asyncio.TimerHandle] = {}

    def add(
        self, message: Message, reason: str, delay_seconds: float, again: Callable[[], None]
    ) -> None:
        """Call ``again`` after the delay, or after a pause that grows with each time if that is longer."""
        self.reason = reason
        count = self._counts[message] = self._counts.get(message, 0) + 1
        pause = backoff_seconds(count, FIRST_SECONDS, LONGEST_SECONDS)
        self._timers[message] = asyncio.get_running_loop().call_later(
            max(pause, delay_seconds), self._due, message, again
        )

    def _due(self, message: Message, again: Callable[[], None]) -> None:
        del self._timers[message]
        again()

    def forget(self, message: Message) -> None:
        """The message is settled, or the broker has taken it back."""
        if self._counts.pop(message, None) is not None:
            if (timer := self._timers.pop(message, None)) is not None:
                timer.cancel()
            if not self._counts:
                self.reason = ""

    def __contains__(self, message: Message) -> bool:
        """Whether it was put off before, and is not settled yet."""
        return message in self._counts

    def waiting(self) -> list[Message]:
        return list(self._timers)


def backoff_seconds(attempt: int, first: float, longest: float) -> float:
    """Exponential, with jitter: between half of the delay and all of it."""
    exponential = first * 2.0 ** min(attempt - 1, 60)
    return min(exponential, longest) * random.uniform(0.5, 1)
