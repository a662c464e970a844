"""How long the service takes from SIGTERM to its exit, idle and with in-flight messages. Beside others: behaviour.py."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from tools.benchmarks.figures import Figure
from tools.benchmarks.service import Queue, Service

IN_FLIGHT = 10
HANDLER_SECONDS = 0.2


def measure(service: Service, stops: int) -> Iterator[Figure]:
    part = f"{service.broker}: from SIGTERM to exit"
    print(f"{service.broker}: {2 * stops} stops", file=sys.stderr)
    idle, busy = [], []
    with service.queue() as queue:
        for _ in range(stops):
            idle.append(_stop(queue, in_flight=0))
            busy.append(_stop(queue, in_flight=IN_FLIGHT))
    yield Figure(part, "idle", [seconds for seconds, _ in idle], "s")
    handlers = f"{IN_FLIGHT} handlers of {HANDLER_SECONDS} s just begun"
    yield Figure(part, handlers, [seconds for seconds, _ in busy], "s")
    finished = [float(finished) for _, finished in busy]
    yield Figure(part, "handlers finished", finished, at_least=IN_FLIGHT)


def _stop(queue: Queue, in_flight: int) -> tuple[float, int]:
    """Shut the service down while it has this many in-flight messages of four times as many.

    Returns the seconds, and how many of the handlers that had begun have finished.
    """
    queue.begin()
    with queue.publishing(4 * in_flight):  # publishing none creates the queue
        pass
    with queue.start(concurrency=IN_FLIGHT, BENCH_HANDLER_SECONDS=HANDLER_SECONDS) as program:
        assert program.stdout is not None
        events = (json.loads(line)["event"] for line in program.stdout)
        awaited = ["consuming", *["handling"] * in_flight]
        while awaited:
            with suppress(ValueError):
                awaited.remove(next(events))
        program.send_signal(signal.SIGTERM)
        sent_at = time.perf_counter()
        rest = list(events)  # up to the end of its output, at its exit
        seconds = time.perf_counter() - sent_at
    queue.clear()
    if program.returncode != 0:
        msg = f"the service ended with {program.returncode}: {rest}"
        raise RuntimeError(msg)
    return seconds, rest.count("handled")
