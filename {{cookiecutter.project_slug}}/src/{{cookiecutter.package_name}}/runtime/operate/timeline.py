# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""A stop, drawn in the terminal: ``demo --timeline``. It shows what telemetry and log were told, and nothing else."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .message import Message
from .telemetry import Telemetry

if TYPE_CHECKING:
    from .consumer import Consumer

COLUMNS = 48
"""The width of the bars, in characters."""
STEPS = {
    "deliveries": "the broker delivers no more; what was not begun is given back",
    "return": "what was in hand is given back",
    "source": "the connection is closed",
    "lifespan": "what the handlers share is closed",
}
MARKS = ("stop_requested", "draining", "message_abandoned", "forced", "close_failed", "drained")


@dataclass
class _Call:
    """One call of a handler; times are time.monotonic()."""

    handler: str
    began_at: float
    ended_at: float | None = None
    outcome: str = "did not end"


class _Listener(logging.Handler):
    """Notes what the log says of a stop."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[float, str]] = []
        """Each with its time.monotonic()."""

    def emit(self, record: logging.LogRecord) -> None:
        event: Any = record.msg
        if not isinstance(event, dict):  # of a library
            return
        name = event["event"]
        if name == "step_done":
            self.marks.append((time.monotonic(), STEPS[event["step"]]))
        elif name in MARKS:
            shown = ("reason", "in_flight", "id", "step", "handled", "returned", "abandoned")
            details = [f"{key} {event[key]}" for key in shown if key in event]
            self.marks.append((time.monotonic(), f"{name}: {', '.join(details)}"))


class Timeline(Telemetry):
    """Give it to a consumer; `drawn` tells afterwards how that stopped."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []
        listener = _Listener()
        self._marks = listener.marks
        root = logging.getLogger()
        for handler in root.handlers:
            handler.setLevel(root.level)  # the log stays as it is
        root.setLevel(logging.DEBUG)  # the steps of a stop are not in it
        root.addHandler(listener)

    def watch(self, consumer: "Consumer") -> None:
        super().watch(consumer)
        self._event = consumer.event

    def handling(self, handler: str, messages: Sequence[Message]) -> _Call:
        self._calls.append(call := _Call(handler, time.monotonic()))
        return call

    def handled(self, handling: _Call, failure: BaseException | None) -> None:
        handling.ended_at = time.monotonic()
        handling.outcome = "handled" if failure is None else type(failure).__name__

    def drawn(self) -> str:
        """A line for each call that the stop found at work, and one for each thing that happened since."""
        zero = self._event.set_at
        if zero is None or not self._marks:
            return "there was no stop"
        end = self._marks[-1][0]
        calls = [c for c in self._calls if c.ended_at is None or c.ended_at > zero]
        # A handler that had begun long ago is shown from the middle of its work.
        begin = max(min([zero, *(call.began_at for call in calls)]), zero - (end - zero))
        scale = COLUMNS / max(end - begin, 0.001)
        width = max((len(call.handler) for call in calls), default=0)
        lines = ["the stop, in seconds after it was asked for"]
        for call in calls:
            first, until = max(call.began_at, begin), call.ended_at or end
            before = round((min(zero, until) - first) * scale)
            after = round((until - max(zero, first)) * scale)
            bar = f"{' ' * round((first - begin) * scale)}{'-' * before}|{'=' * after}"
            lines.append(f"{call.handler:>{width}}  {bar} {call.outcome}")
        lines += [f"{at - zero:{width + 2}.2f}  {mark}" for at, mark in self._marks if at >= zero]
        return "\n".join(lines)
