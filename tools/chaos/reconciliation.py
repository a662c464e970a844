"""The invariant of an experiment: published = done + still in the broker + dead-lettered, and nothing is done twice.

It does not depend on a broker or the runtime: its input is the published messages, the handlers' ledger, the broker's
counts and how each process ended, and it returns a sentence for each violation.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OF_HANDLERS = (
    "message_retried",
    "message_rejected",
    "handler_overrun",
    "handlers_abandoned",
    "event_loop_blocked",
)
"""Events that show where a handler failed or hung: only these may have a traceback."""
SHOWN = 5
"""The most ids of a list that are shown."""


@dataclass(frozen=True)
class Ending:
    """How one process ended."""

    process: str
    exit_code: int
    """Negative for the signal that ended it."""
    allowed: frozenset[int]
    seconds: float
    """From the signal to the end."""
    bound_seconds: float
    stderr: str = ""
    events: tuple[Mapping[str, Any], ...] = ()
    noise: tuple[str, ...] = ()
    """Words that no event may contain, unless it is about a handler."""

    def faults(self) -> Iterable[str]:
        if self.exit_code not in self.allowed:
            allowed = " or ".join(map(str, sorted(self.allowed)))
            yield f"{self.process} ended with {self.exit_code}, not {allowed}"
        if self.seconds > self.bound_seconds:
            yield f"{self.process} took {self.seconds:.1f} s to end, not {self.bound_seconds:.1f}"
        if self.stderr:
            yield f"{self.process} wrote to standard error: {self.stderr[-500:]}"
        for event in self.events:
            if event.get("event") not in OF_HANDLERS:
                text = json.dumps(event)
                if noise := [word for word in self.noise if word in text] or (
                    ["no JSON"] if event.get("event") == "not_json" else []
                ):
                    yield f"{self.process} logged {noise[0]}: {text[:1500]}"


@dataclass
class Reconciliation:
    """All counts of one experiment."""

    published: dict[str, bool] = field(default_factory=dict)
    """Each id that the broker confirmed, and whether its handler succeeds sooner or later."""
    unconfirmed: set[str] = field(default_factory=set)
    """Ids that the broker never confirmed: it may have these messages."""
    ended: list[str] = field(default_factory=list)
    """An id for each time that a handler finished."""
    dead: list[str] | None = None
    """The ids of the dead letters; None if the broker only counts them."""
    dead_count: int = 0
    at_rest: int | None = None
    """The broker's messages, including dead letters, when all processes had ended and before the rest was handled."""
    done_at_rest: int = 0
    """How many different ids were done by then."""
    left: int = 0
    """The broker's messages, except dead letters, after all was handled."""
    graceful: bool = True
    """Whether no process was killed and no connection broken: then no message may be done twice."""
    most_repeated: float = 0
    """How many repetitions the kills and the broken connections explain."""
    endings: list[Ending] = field(default_factory=list)

    @property
    def done(self) -> set[str]:
        return set(self.ended)

    @property
    def twice(self) -> int:
        return len(self.ended) - len(self.done)

    @property
    def lost(self) -> set[str]:
        """Confirmed, never done, and no dead letter; if dead letters are only counted, those that should be done."""
        missing = set(self.published) - self.done
        if self.dead is not None:
            return missing - set(self.dead)
        return {i for i in missing if self.published[i]}

    def violations(self) -> list[str]:
        return [*self._of_messages(), *(f for ending in self.endings for f in ending.faults())]

    def _of_messages(self) -> Iterable[str]:
        known = set(self.published) | self.unconfirmed
        if self.lost:
            yield f"lost: {_list(self.lost)}"
        if self.left:
            yield f"the broker still has {self.left} messages that it delivers to no consumer"
        if self.at_rest is not None:
            found, expected = self.done_at_rest + self.at_rest, len(self.published)
            too_many = self.graceful and not self.unconfirmed and found > expected
            if found < expected or too_many:
                yield f"{self.done_at_rest} done and {self.at_rest} in the broker are not {expected} published"
        allowed = 0 if self.graceful else self.most_repeated
        if self.twice > allowed:
            again = Counter(self.ended) - Counter(self.done)
            yield f"done twice: {_list(again)}; allowed: {allowed:.0f}"
        if unknown := self.done - known:
            yield f"done, and never published: {_list(unknown)}"
        if self.dead is None:
            hopeless = sum(not good for good in self.published.values())
            if self.dead_count < hopeless:
                yield f"{self.dead_count} dead letters, expected at least {hopeless}"
            return
        if harmed := {i for i in self.dead if self.published.get(i, i in self.unconfirmed)}:
            yield f"dead letters whose handler would have succeeded: {_list(harmed)}"
        if self.graceful and (again := Counter(self.dead) - Counter(set(self.dead))):
            yield f"dead-lettered twice: {_list(again)}"


def _list(ids: Iterable[str]) -> str:
    first, *rest = sorted(ids)
    shown = ", ".join([first, *rest][:SHOWN])
    return f"{len(rest) + 1} ({shown}{', ...' if len(rest) >= SHOWN else ''})"
