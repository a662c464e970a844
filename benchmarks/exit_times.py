"""How long the service takes from SIGTERM to its exit: idle, and with handlers in hand."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from figures import Figure
from service import Queue, Service

IN_HAND = 10
HANDLER_SECONDS = 0.2


def measure(service: Service, stops: int) -> Iterator[Figure]:
    part = f"{service.broker}: from SIGTERM to exit"
    print(f"{service.broker}: {2 * stops} stops", file=sys.stderr)
    with service.queue() as queue:
        idle = [_stop(queue, in_hand=0) for _ in range(stops)]
        with queue.publishing(4 * IN_HAND * stops):
            pass
        busy = [_stop(queue, in_hand=IN_HAND) for _ in range(stops)]
    yield Figure(part, "idle", idle, "s")
    yield Figure(part, f"{IN_HAND} handlers of {HANDLER_SECONDS} s just begun", busy, "s")


def _stop(queue: Queue, in_hand: int) -> float:
    """Start the service, stop it when it has so many in hand; returns the seconds the stop took."""
    with queue.start(concurrency=IN_HAND, BENCH_HANDLER_SECONDS=HANDLER_SECONDS) as program:
        assert program.stdout is not None
        events = map(json.loads, program.stdout)
        awaited = ["consuming", *["handling"] * in_hand]
        while awaited:
            with suppress(ValueError):
                awaited.remove(next(events)["event"])
        program.send_signal(signal.SIGTERM)
        sent_at = time.perf_counter()
        rest = list(events)  # up to the end of its output, which comes with its exit
        seconds = time.perf_counter() - sent_at
    [found] = [event["in_flight"] for event in rest if event["event"] == "draining"]
    if (program.returncode, found) != (0, in_hand):
        msg = f"the service ended with {program.returncode}, and with {found} in hand: {rest}"
        raise RuntimeError(msg)
    return seconds
