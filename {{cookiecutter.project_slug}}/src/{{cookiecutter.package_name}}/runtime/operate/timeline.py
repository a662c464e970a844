# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A graceful shutdown, drawn in the terminal: ``demo --timeline``. Its only sources are telemetry and the log."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..message import Message
from ..telemetry import Telemetry

COLUMNS = 48
"""The width of the bars, in characters."""
STEPS = {
    "deliveries": "deliveries stopped; messages that no worker took are requeued",
    "requeue": "in-flight messages are requeued",
    "source": "the connection is closed",
    "lifespan": "the lifespan is closed",
}
SHOWN = ("reason", "in_flight", "message_id", "step", "handled", "requeued", "abandoned")
MARKS = ("stop_requested", "draining", "message_abandoned", "forced", "close_failed", "drained")


@dataclass
class _Call:
    """One call of a handler; times are time.monotonic()."""

    handler: str
    began_at: float
    ended_at: float | None = None
    outcome: str = "did not end"


class Timeline(Telemetry):
    """The telemetry of a consumer whose shutdown `drawn` shows afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []
        self._marks: list[tuple[float, str]] = []
        """The log events of the shutdown, each with its time.monotonic()."""
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.DEBUG)  # `step_done` is a debug event
        root.handlers[0].addFilter(self._note)

    def handling(self, handler: str, messages: Sequence[Message]) -> _Call:
        self._calls.append(call := _Call(handler, time.monotonic()))
        return call

    def handled(self, handling: _Call, failure: BaseException | None) -> None:
        handling.ended_at = time.monotonic()
        handling.outcome = "handled" if failure is None else type(failure).__name__

    def _note(self, record: logging.LogRecord) -> bool:
        event: Any = record.msg
        name = event["event"] if isinstance(event, dict) else ""  # empty for a library's record
        if name == "step_done":
            self._marks.append((time.monotonic(), STEPS[event["step"]]))
        elif name in MARKS:
            details = [f"{key} {event[key]}" for key in SHOWN if key in event]
            self._marks.append((time.monotonic(), f"{name}: {', '.join(details)}"))
        return record.levelno >= self._level  # the log is unchanged

    def drawn(self, zero: float | None) -> str:
        """A line for each handler in flight at the signal (at ``zero``), and one for each event after it."""
        if zero is None or not self._marks:
            return "there was no shutdown"
        end = self._marks[-1][0]
        calls = [c for c in self._calls if c.ended_at is None or c.ended_at > zero]
        # A handler that started long before the signal is shown from the middle of its run.
        begin = max(min([zero, *(call.began_at for call in calls)]), zero - (end - zero))
        scale = COLUMNS / max(end - begin, 0.001)
        width = max((len(call.handler) for call in calls), default=0)
        lines = ["the shutdown, in seconds after the signal"]
        for call in calls:
            first, until = max(call.began_at, begin), call.ended_at or end
            before = round((min(zero, until) - first) * scale)
            after = round((until - max(zero, first)) * scale)
            bar = f"{' ' * round((first - begin) * scale)}{'-' * before}|{'=' * after}"
            lines.append(f"{call.handler:>{width}}  {bar} {call.outcome}")
        lines += [f"{at - zero:{width + 2}.2f}  {mark}" for at, mark in self._marks if at >= zero]
        return "\n".join(lines)
