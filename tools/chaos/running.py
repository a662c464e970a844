"""One process of a round: the signals sent to it, and the exit codes and the latest time of its end."""

import signal
import time
from typing import Any

GENTLE_DRAIN_SECONDS, ROUGH_DRAIN_SECONDS = 10, 2
CLOSE_SECONDS = 10 + 1
"""The watchdog's time limit after the drain time, and a second for its last log lines."""
SLACK_SECONDS = 5
"""Added for a loaded machine."""
FORCED_SECONDS = 2 + 1
"""The time from the second SIGINT to the end, even if handlers go on."""


class Running:
    """One process, and how it may end."""

    def __init__(self, process: Any, slot: int, drain_seconds: float) -> None:
        self.process = process
        self.slot = slot
        self.drain_seconds = drain_seconds
        self.allowed: set[int] = set()
        self.must_end_by: float | None = None
        self.first_signal_at = 0.0
        self.paused = False

    def signal(self, signum: signal.Signals) -> None:
        """Send a shutdown signal. Before the service has installed its signal handlers, the signal ends the process."""
        self.resume()
        started = bool(self.process.find("starting"))
        if not started:
            signum = signal.SIGTERM  # until then, Python answers SIGINT with a traceback
            self.allowed.add(-signum)
        self.process.send(signum)
        now = time.monotonic()
        if self.must_end_by is None:
            self.first_signal_at = now
            self.must_end_by = now + self.drain_seconds + CLOSE_SECONDS + SLACK_SECONDS
        elif signum is signal.SIGINT:
            self.allowed.add(128 + signum)
            self.must_end_by = min(self.must_end_by, now + FORCED_SECONDS + SLACK_SECONDS)
        self.allowed |= {0} if self.drain_seconds == GENTLE_DRAIN_SECONDS else {0, 75}

    def kill(self) -> None:
        self.process.send(signal.SIGKILL)
        self.allowed.add(-signal.SIGKILL)
        self.must_end_by = self.must_end_by or time.monotonic() + SLACK_SECONDS

    def pause(self) -> bool:
        if self.must_end_by is None and not self.paused:
            self.process.send(signal.SIGSTOP)
            self.paused = True
            return True
        return False

    def resume(self) -> None:
        if self.paused:
            self.process.send(signal.SIGCONT)
            self.paused = False
