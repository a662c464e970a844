"""Whether the service's memory stays flat over many messages, which another process publishes meanwhile."""

import sys
from collections.abc import Iterator

from tools.benchmarks.figures import Figure
from tools.benchmarks.service import Service, Unavailable
from tools.benchmarks.stopwatch import STATM

MIB = 2**20
FLAT_MIB = 5


def measure(service: Service, messages: int) -> Iterator[Figure]:
    part = f"{service.broker}: memory of the service over {messages:,} messages"
    if not STATM.exists():
        raise Unavailable(f"the size of a process is read from {STATM}, which this system lacks")
    print(f"{service.broker}: {messages:,} messages", file=sys.stderr)
    with service.queue() as queue, queue.publishing(messages):
        report = queue.consume(messages, prefetch=100, concurrency=100)
    early, *_, late = [size / MIB for size in report["resident_bytes"]]
    yield Figure(part, "after a tenth", [early], "MiB")
    yield Figure(part, "at the end", [late], "MiB")
    yield Figure(part, "growth", [late - early], "MiB", at_most=FLAT_MIB)
