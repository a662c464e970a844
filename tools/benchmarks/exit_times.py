"""How long the service takes from SIGTERM to its exit, idle and with in-flight messages; on RabbitMQ beside others."""

import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tools.benchmarks.figures import Figure
from tools.benchmarks.service import Queue, Service

IN_FLIGHT = 10
HANDLER_SECONDS = 0.2

FRAMEWORKS = "tools.benchmarks.frameworks"
OURS = "the generated service"
CONTENDERS = {
    OURS: None,
    "FastStream": "faststream",
    "FastStream, graceful_timeout=25": "faststream_waiting",
    "taskiq, one worker": "taskiq",
}
"""On RabbitMQ; of the other brokers the service alone is measured."""


@dataclass(frozen=True)
class Stop:
    seconds: float
    finished: int
    """How many of the handlers that had begun finished."""


def measure(service: Service, stops: int) -> Iterator[Figure]:
    part = f"{service.broker}: from SIGTERM to exit"
    contenders = CONTENDERS if service.broker == "rabbitmq" else {OURS: None}
    print(f"{service.broker}: {2 * stops * len(contenders)} stops", file=sys.stderr)
    idle: dict[str, list[Stop]] = {name: [] for name in contenders}
    busy: dict[str, list[Stop]] = {name: [] for name in contenders}
    with service.queue() as queue:
        for _ in range(stops):
            for name in random.sample(list(contenders), len(contenders)):
                with _consumed_queue(queue, contenders[name]):
                    idle[name].append(_stop(queue, contenders[name], in_flight=0))
                with _consumed_queue(queue, contenders[name], messages=4 * IN_FLIGHT):
                    busy[name].append(_stop(queue, contenders[name], in_flight=IN_FLIGHT))
    for name in contenders:
        subject = f"{name}: "
        yield Figure(part, f"{subject}idle", [stop.seconds for stop in idle[name]], "s")
        handlers = f"{subject}{IN_FLIGHT} handlers of {HANDLER_SECONDS} s just begun"
        yield Figure(part, handlers, [stop.seconds for stop in busy[name]], "s")
        finished = [float(stop.finished) for stop in busy[name]]
        at_least = IN_FLIGHT if name == OURS else None
        yield Figure(part, f"{subject}handlers finished", finished, at_least=at_least)


@contextmanager
def _consumed_queue(queue: Queue, contender: str | None, messages: int = 0) -> Iterator[None]:
    """The queue with this many messages in the contender's form; it is cleared afterwards."""
    queue.begin()
    if contender == "taskiq":
        queue.run(
            [sys.executable, "-m", FRAMEWORKS, contender, str(messages)], concurrency=IN_FLIGHT
        )
    else:
        with queue.publishing(messages):  # of none, which makes the queue
            pass
    try:
        yield
    finally:
        queue.clear()


def _stop(queue: Queue, contender: str | None, in_flight: int) -> Stop:
    """Start a consumer, and shut it down when it has this many in-flight messages."""
    command = None if contender is None else [sys.executable, "-m", FRAMEWORKS, contender]
    with queue.start(
        command, concurrency=IN_FLIGHT, BENCH_HANDLER_SECONDS=HANDLER_SECONDS
    ) as program:
        assert program.stdout is not None
        events = (json.loads(line)["event"] for line in program.stdout)
        awaited = ["consuming", *["handling"] * in_flight]
        while awaited:
            with suppress(ValueError):
                awaited.remove(next(events))
        program.send_signal(signal.SIGTERM)
        sent_at = time.perf_counter()
        rest = list(events)  # up to the end of its output, which comes with its exit
        seconds = time.perf_counter() - sent_at
    finished = rest.count("handled")
    if contender is None and (program.returncode, finished) != (0, in_flight):
        msg = f"the service ended with {program.returncode}, and finished {finished}: {rest}"
        raise RuntimeError(msg)
    return Stop(seconds, finished)
