"""CPU time of the consumer's process for each message: the service beside the clients in clients/.

Measured inside the process, from the first message in its handler until every ack is written; so without
start and shutdown, and without the broker's CPU time. In each round every consumer gets its turn, in random order,
on the same queue: the service's own, filled before the consumer starts.
"""

import random
import sys
from collections.abc import Iterator

from tools.benchmarks.figures import Figure
from tools.benchmarks.service import Service

SLOW_SERVERS = {"sqs": 10}
"""The stand-in for SQS is this many times slower, so it gets that many times fewer messages."""
PREFETCH = 100
"""Also the service's concurrency: with callbacks, that many handlers may run at a time, too."""

OURS = "the generated service"
TITLES = {
    "bare": "the bare client, fetching and acknowledging in batches",
    "bare_single": "the bare client, one ack for each message",
    "librdkafka": "confluent-kafka's AIOConsumer, fetching and committing in batches",
    "article": "the 2019 form on the client's own iterator",
    "faststream": "FastStream",
    "faststream_quiet": "FastStream, logger=None",
    "faststream_ack": "FastStream, ack_policy=ACK",
}
# Our highest cost, relative to each consumer in clients/; None is for comparison only. Beside the batches of bare
# asyncpg, 1.2 is missed and stays the target, though the worker loop alone exceeds it: docs/brokers/postgres.md.
AT_MOST: dict[str, dict[str, float | None]] = {
    "rabbitmq": {"bare_single": 0.8, "article": None, "faststream": 0.4, "faststream_quiet": None},
    "nats": {"bare": 1.2, "bare_single": 1, "faststream": None, "faststream_quiet": 0.25},
    "redis": {"bare": 1.2, "bare_single": 1, "faststream": None, "faststream_quiet": 0.25},
    "kafka": {
        **{"bare": 2, "bare_single": 1, "librdkafka": None},
        **{"faststream": None, "faststream_ack": 0.25},
    },
    "sqs": {"bare": 1.2, "bare_single": 1},
    "postgres": {"bare": 1.2, "bare_single": 1},
    "mqtt": {"bare": 1.2, "bare_single": 1, "faststream": None, "faststream_quiet": None},
}


def measure(service: Service, messages: int, rounds: int) -> Iterator[Figure]:
    broker = service.broker
    messages //= SLOW_SERVERS.get(broker, 1)
    part = f"{broker}: CPU per message of 200 bytes, {messages:,} of them, prefetch {PREFETCH}"
    microseconds: dict[str, list[float]] = {name: [] for name in (OURS, *AT_MOST[broker])}
    with service.queue() as queue:
        for number in range(rounds):
            for name in random.sample(list(microseconds), len(microseconds)):
                print(f"{broker}, round {number + 1} of {rounds}: {name}", file=sys.stderr)
                queue.begin()
                with queue.publishing(messages):
                    pass
                client = [sys.executable, "-m", f"tools.benchmarks.clients.{broker}", name]
                report = queue.consume(
                    messages,
                    None if name == OURS else client,
                    prefetch=PREFETCH,
                    concurrency=PREFETCH,
                )
                microseconds[name].append(report["cpu_seconds"] * 1e6 / messages)
    for name, values in microseconds.items():
        yield Figure(part, TITLES.get(name, name), values, "µs")
    ours = microseconds[OURS]
    for name, at_most in AT_MOST[broker].items():
        ratio = [own / other for own, other in zip(ours, microseconds[name], strict=True)]
        yield Figure(part, f"ours / {TITLES[name]}", ratio, at_most=at_most)
