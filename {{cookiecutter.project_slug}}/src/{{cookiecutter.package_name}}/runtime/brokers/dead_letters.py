# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Dead letters: the interface of a broker, and the filters and steps of replay and purge, shared by all brokers."""

import asyncio
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from ..message import DeadLetter, Message
from ..redaction import redacted_value

STEP_BYTES = 2**23
"""The limit for the bodies of the letters that are moved in one step."""


class Page:
    """How many letters one request reads: one at first, later twice as many each time, fewer if one is large."""

    def __init__(self, second: int = 2, most: int = 100) -> None:
        self.count, self._second, self._most, self._largest = 1, second, most, 1

    def saw(self, letter_bytes: int) -> None:
        self._largest = max(self._largest, letter_bytes)

    def turn(self) -> None:
        self.count = max(
            1, min(max(2 * self.count, self._second), self._most, STEP_BYTES // self._largest)
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters to use; by default all."""

    ids: Collection[str] | None = None
    """The ids as they are, or redacted, as they are shown."""
    type: str | None = None
    """``*`` stands for any text, as in HANDLERS."""
    reason: str = ""
    """A part of the reason."""
    before: float = math.inf
    """Dead-lettered before this Unix time; an unknown time is 0."""
    after: float = 0.0
    limit: float = math.inf
    """The most letters, the oldest first."""
    rate: float = math.inf
    """The most letters a second that are moved or deleted."""

    def matches(self, letter: DeadLetter) -> bool:
        pattern = None if self.type is None else re.sub(r"[\[?]", r"[\g<0>]", self.type)
        return (
            (self.ids is None or not {letter.id, redacted_value(letter.id)}.isdisjoint(self.ids))
            and (pattern is None or fnmatchcase(letter.type, pattern))
            and self.reason in letter.reason
            and self.after <= letter.dead_lettered_at < self.before
        )

    async def among(
        self, letters: AsyncIterator[DeadLetter], complete: Callable[[Message], None]
    ) -> AsyncGenerator[DeadLetter, None]:
        """The letters that match after ``complete``, up to the limit."""
        left = self.limit
        if left > 0:
            async for letter in letters:
                complete(letter)
                if self.matches(letter):
                    yield letter
                    left -= 1
                    if left <= 0:
                        return


EVERY = Selection()


class DeadLetters(ABC):
    """A broker implements how to read its dead letters, and how to take some of them; the rest is here."""

    dead_letters_at_once: ClassVar[int] = 100
    """How many letters are moved or deleted in one step; a kill duplicates at most as many."""
    _complete: Callable[[Message], None]

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[Any]:
        """A context for `_present_letters` and `_take_letters`, which get its value; at its end the rest stays."""
        yield None

    @abstractmethod
    def _present_letters(self, reading: Any) -> AsyncGenerator[DeadLetter, None]:
        """The letters that are present now, the oldest first; ``receipt`` is the broker's handle of each."""

    @abstractmethod
    def _take_letters(
        self, reading: Any, letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        """Move some of the letters that were read to the queue, or delete them. Yields how many were confirmed."""

    @abstractmethod
    async def count_dead_letters(self) -> int: ...

    async def dead_letters(
        self, limit: float = math.inf, selection: Selection = EVERY
    ) -> AsyncIterator[DeadLetter]:
        """The oldest of the selected dead letters, without changing any."""
        selection = replace(selection, limit=min(limit, selection.limit))
        async with (
            self._reading() as reading,
            aclosing(self._present_letters(reading)) as letters,
            aclosing(selection.among(letters, self._complete)) as selected,
        ):
            async for letter in selected:
                yield letter

    def replay_dead_letters(self, selection: Selection = EVERY) -> AsyncIterator[int]:
        """Move the present dead letters back to the queue, as new messages with attempt 1.

        Yields the number moved so far, after each confirmed step.
        """
        return self._in_steps(selection, replay=True)

    def purge_dead_letters(self, selection: Selection = EVERY) -> AsyncIterator[int]:
        """Delete dead letters. Yields the number deleted so far, after each step."""
        everything = self._purge_all() if selection == EVERY else None
        return everything or self._in_steps(selection, replay=False)

    def _purge_all(self) -> AsyncIterator[int] | None:
        """As `purge_dead_letters`, where the broker can delete all in one request."""
        return None

    async def _in_steps(self, selection: Selection, *, replay: bool) -> AsyncIterator[int]:
        most = max(1, min(self.dead_letters_at_once, selection.rate))
        started, done, so_far, step, size = time.monotonic(), 0, 0, list[DeadLetter](), 0
        async with (
            self._reading() as reading,
            aclosing(self._present_letters(reading)) as letters,
            aclosing(selection.among(letters, self._complete)) as selected,
        ):
            while True:
                letter = await anext(selected, None)
                if letter is not None:
                    step.append(letter)
                    size += len(letter.body)
                if step and (letter is None or len(step) >= most or size >= STEP_BYTES):
                    async for taken in self._take_letters(reading, step, replay=replay):
                        so_far = done + taken
                        yield so_far
                    done, step, size = so_far, [], 0
                    await asyncio.sleep(started + done / selection.rate - time.monotonic())
                if letter is None:
                    return
