"""The runtime's own cost for each message, on any broker: the worker loop on a source in memory.

Measured from the source's buffer, through a trivial raw handler, to the ack, which puts the message into the buffer
again. No service can cost less than its client and this. ``python -m tools.benchmarks.worker_loop MESSAGES`` measures
the runtime on PYTHONPATH, which may be that of another commit: see against.py.
"""

import asyncio
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, Self

from runtime.brokers.source import Source
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.handlers import Router
from runtime.message import Message
from runtime.settings import ConsumerSettings
from tools.benchmarks.figures import Figure

PREFETCH = 100
"""Also the concurrency, as beside the clients of the brokers."""


class MemorySource(Source):
    """Delivers the same messages again and again, and implements nothing else."""

    capabilities: ClassVar[Any] = SimpleNamespace(delayed_retry=False)
    connectivity: Any = SimpleNamespace(outage_count=0)
    connected = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def prepare(self) -> None:
        pass

    async def start(self) -> None:
        for number in range(self.prefetch):
            self.buffer.put(Message(b"x" * 200, str(number)))

    async def stop(self) -> None:
        self.buffer.close()

    async def ack(self, message: Message) -> None:
        self.buffer.put(message)


MemorySource.__abstractmethods__ = frozenset()


async def microseconds_per_message(messages: int) -> float:
    """CPU time, from the first message in its handler to the last; the loop never idles."""
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

    settings = ConsumerSettings.model_validate(
        {"broker_url": "sqlite:///unused", "source": "memory", "concurrency": PREFETCH}
    )
    source = MemorySource(settings, PREFETCH)  # type: ignore[abstract]
    assert await Consumer(source, Router({"memory": handle}), event, settings).run() == 0
    started, ended = times
    return (ended - started) * 1e6 / (messages - 1)


def measure(messages: int, rounds: int) -> Iterator[Figure]:
    print(f"worker loop: {rounds} rounds of {messages:,} messages", file=sys.stderr)
    values = [asyncio.run(microseconds_per_message(messages)) for _ in range(rounds)]
    yield Figure("The worker loop, without a broker", "CPU per message", values, "µs")


if __name__ == "__main__":
    result = asyncio.run(microseconds_per_message(int(sys.argv[1])))
    print(result, file=sys.stderr)  # standard output has the log
