"""What the runtime itself costs for each message, whatever the broker: the worker loop on a source in memory.

From the buffer of the source, through a trivial raw handler, to the ack, which puts the message into the buffer
again. No service can be cheaper than its client and this.
"""

import asyncio
import sys
import time
from collections.abc import Iterator
from typing import Self

from runtime.brokers.sqlite import SqliteSource
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.handlers import Router
from runtime.message import Message
from runtime.settings import ConsumerSettings

from tools.benchmarks.figures import Figure

PREFETCH = 100
"""Also the concurrency, as beside the clients of the brokers."""


class MemorySource(SqliteSource):
    """Delivers the same messages again and again."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def start(self) -> None:
        for number in range(self.prefetch):
            self.buffer.put(Message(b"x" * 200, str(number)))

    async def stop(self) -> None:
        self.buffer.close()

    async def ack(self, message: Message) -> None:
        self.buffer.put(message)


async def microseconds_per_message(messages: int) -> float:
    """CPU time, from the first message in its handler to the last; nothing here ever idles."""
    event = CancellationEvent(asyncio.get_running_loop())
    times: list[float] = []
    count = 0

    async def handle(_body: bytes) -> None:
        nonlocal count
        count += 1
        if count in (1, messages):
            times.append(time.process_time())
        if count == messages:
            event.set("the last message")

    chosen = ConsumerSettings(broker_url="sqlite:///unused", source="memory", concurrency=PREFETCH)
    source, router = MemorySource(chosen, PREFETCH), Router({"memory": handle})
    service = Consumer(source, router, event, chosen)
    assert await service.run() == 0
    started, ended = times
    return (ended - started) * 1e6 / (messages - 1)


def measure(messages: int, rounds: int) -> Iterator[Figure]:
    print(f"worker loop: {rounds} rounds of {messages:,} messages", file=sys.stderr)
    values = [asyncio.run(microseconds_per_message(messages)) for _ in range(rounds)]
    yield Figure("The worker loop, without a broker", "CPU per message", values, "µs")
