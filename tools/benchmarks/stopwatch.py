"""Counts the messages in a consumer's process; after the last one it reports their cost, and stops the process.

Every compared consumer calls `tick` from its handler, and does nothing else there. BENCH_MESSAGES is
the number of messages; the report is written, as JSON, to the file that BENCH_REPORT names.
"""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

SETTLE_SECONDS = 0.5
"""The time after the last message, so that all acks are within the measured time."""

STATM = Path("/proc/self/statm")


class Stopwatch:
    def __init__(self) -> None:
        self._messages = int(os.environ["BENCH_MESSAGES"])
        self._tenth = max(1, self._messages // 10)
        self._count = 0
        self._cpu_started = 0.0
        self._resident_bytes: list[int] = []

    def tick(self) -> None:
        if self._count == 0:
            self._cpu_started = time.process_time()
        self._count += 1
        if self._count % self._tenth == 0:
            self._resident_bytes.append(resident_bytes())
        if self._count == self._messages:
            asyncio.get_running_loop().call_later(SETTLE_SECONDS, self._report)

    def _report(self) -> None:
        report = {
            "cpu_seconds": time.process_time() - self._cpu_started,
            "resident_bytes": self._resident_bytes,
        }
        Path(os.environ["BENCH_REPORT"]).write_text(json.dumps(report), encoding="utf-8")
        signal.raise_signal(signal.SIGTERM)


def resident_bytes() -> int:
    """The memory of this process that is in RAM; 0 if the system has no /proc."""
    if not STATM.exists():
        return 0
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
