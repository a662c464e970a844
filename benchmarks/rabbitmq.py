"""CPU time of the consumer's process for each message from RabbitMQ: the service beside the bare clients.

Measured inside the process, from the first message in its handler until every ack is written; so without
start and stop, and without what the broker uses. In each round every consumer gets its turn, in random order,
on the same queue: the service's own quorum queue, filled before the consumer starts.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from figures import Figure
from service import Service

PREFETCH = 100
"""Also the service's concurrency: with callbacks, that many handlers may run at a time too."""

OURS = "the generated service"
BARE = "aio-pika consume(callback), await ack()"
ARTICLE = "the 2019 form on aio-pika's iterator"
FASTSTREAM = "FastStream's default subscriber"
FASTSTREAM_QUIET = "FastStream without its log lines"
CONSUMERS = Path(__file__).with_name("consumers.py")
COMMANDS = {
    OURS: None,
    BARE: "bare",
    ARTICLE: "article",
    FASTSTREAM: "faststream",
    FASTSTREAM_QUIET: "faststream_quiet",
}


def measure(service: Service, messages: int, rounds: int) -> Iterator[Figure]:
    part = f"RabbitMQ: CPU per message of 200 bytes, {messages:,} of them, prefetch {PREFETCH}"
    microseconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with service.queue("rabbitmq") as queue:
        for number in range(rounds):
            for name in random.sample(list(COMMANDS), len(COMMANDS)):
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
                with queue.publishing(messages):
                    pass
                command = COMMANDS[name]
                report = queue.consume(
                    messages,
                    [sys.executable, str(CONSUMERS), command] if command else None,
                    prefetch=PREFETCH,
                    concurrency=PREFETCH,
                )
                microseconds[name].append(report["cpu_seconds"] * 1e6 / messages)
    for name, values in microseconds.items():
        yield Figure(part, name, values, "µs")

    def ratio(other: str) -> list[float]:
        return [a / b for a, b in zip(microseconds[OURS], microseconds[other], strict=True)]

    yield Figure(part, f"ours / {BARE}", ratio(BARE), at_most=0.8)
    yield Figure(part, f"ours / {ARTICLE}", ratio(ARTICLE))
    yield Figure(part, f"ours / {FASTSTREAM}", ratio(FASTSTREAM), at_most=0.4)
    yield Figure(part, f"ours / {FASTSTREAM_QUIET}", ratio(FASTSTREAM_QUIET))
