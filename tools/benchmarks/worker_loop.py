"""The runtime's own cost for each message, on any broker: the worker loop on a source in memory.

From the buffer of the source, through a trivial raw handler, to the ack, which puts the message into the buffer
again. No service can be cheaper than its client and this.
"""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

from runtime.brokers.connectivity import Connectivity
from runtime.brokers.source import Capabilities, Source
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.handlers import Router
from runtime.message import Message, OutgoingMessage
from runtime.settings import ConsumerSettings
from tools.benchmarks.figures import Figure

PREFETCH = 100
"""Also the concurrency, as beside the clients of the brokers."""


class MemorySource(Source):
    """Delivers the same messages again and again."""

    capabilities = Capabilities(
        delayed_retry=False, attempts=False, requeue=False, dead_letters=False, order=True
    )
    destinations: ClassVar = {}
    connectivity = Connectivity("memory")
    connected = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def declare(self) -> None:
        pass

    async def describe(self) -> dict[str, int | str]:
        return {}

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        raise NotImplementedError  # its handler publishes nothing

    async def start(self) -> None:
        for number in range(self.prefetch):
            self._deliver(Message(b"x" * 200, str(number)))

    async def _stop_fetching(self) -> None:
        pass

    async def _ack(self, message: Message) -> None:
        self._deliver(message)

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        raise NotImplementedError  # its handler never fails

    async def _reject(self, message: Message, reason: str) -> None:
        raise NotImplementedError  # its handler rejects nothing

    async def _requeue(self, message: Message) -> None:
        pass


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
    source, router = MemorySource(settings, PREFETCH), Router({"memory": handle})
    assert await Consumer(source, router, event, settings).run() == 0
    started, ended = times
    return (ended - started) * 1e6 / (messages - 1)


def measure(messages: int, rounds: int) -> Iterator[Figure]:
    print(f"worker loop: {rounds} rounds of {messages:,} messages", file=sys.stderr)
    values = [asyncio.run(microseconds_per_message(messages)) for _ in range(rounds)]
    yield Figure("The worker loop, without a broker", "CPU per message", values, "µs")
