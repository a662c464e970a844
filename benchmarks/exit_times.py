"""How long the service takes from SIGTERM to its exit: idle, and with handlers in hand."""

import sys
from collections.abc import Iterator

from figures import Figure
from service import Queue, Service

IN_HAND = 10
HANDLER_SECONDS = 0.2


def measure(service: Service, broker: str, stops: int) -> Iterator[Figure]:
    part = f"From SIGTERM to exit, {broker}"
    print(f"{broker}: {2 * stops} stops", file=sys.stderr)
    with service.queue(broker) as queue:
        idle = [_stop(queue, in_hand=0) for _ in range(stops)]
        with queue.publishing(2 * IN_HAND * stops):
            pass
        busy = [_stop(queue, in_hand=IN_HAND) for _ in range(stops)]
    yield Figure(part, "idle", idle, "s")
    yield Figure(part, f"{IN_HAND} handlers of {HANDLER_SECONDS} s just begun", busy, "s")


def _stop(queue: Queue, in_hand: int) -> float:
    """Start the service, stop it when it has so many in hand; returns the seconds the stop took."""
    process = queue.start(concurrency=IN_HAND, BENCH_HANDLER_SECONDS=HANDLER_SECONDS)
    try:
        process.wait_for("consuming")
        if in_hand:
            process.wait_for("handling", count=in_hand)
        exit_code, seconds = process.stop()
        found = process.wait_for("draining")["in_flight"]
        if (exit_code, found) != (0, in_hand):
            msg = f"stopped with {exit_code} and {found} in hand: {process.events} {process.stderr}"
            raise RuntimeError(msg)
    finally:
        process.close()
    return float(seconds)
