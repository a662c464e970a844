"""A consumer in this process, on the embedded broker, with a second source on its queue."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from structlog.testing import capture_logs

from harness.contract import opened
from harness.servers import Server
from runtime.brokers import make_source
from runtime.brokers.source import Source
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer, Lifespan
from runtime.handlers import HandlerFunction, Router
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings

AT_ONCE: dict[str, Any] = {"retry_seconds": 1e-6, "retry_max_seconds": 1e-6}
"""Settings: a retry is due before the embedded broker looks for it, so no test waits for a retry."""


class Number(BaseModel):
    number: int


class ConsumerHarness:
    """A consumer, and a second source that publishes to its queue and counts its messages."""

    def __init__(
        self, broker: Server, queue: str, make_settings: Callable[..., ConsumerSettings]
    ) -> None:
        self.broker = broker
        self.queue = queue
        self.make_settings = make_settings
        self.logs: list[Any] = []

    async def run(
        self,
        bodies: list[bytes],
        until: Callable[[Consumer], bool],
        *,
        message_type: str = "",
        key: str = "",
        handlers: Mapping[str, HandlerFunction],
        lifespan: Lifespan | None = None,
        before: Callable[[Consumer], None] = lambda consumer: None,
        **settings: Any,
    ) -> tuple[int, Consumer]:
        """Publish, consume until the condition is true, shut down; returns the exit code and the consumer.

        ``before`` may change the consumer before it runs, for example break its source.
        """
        made = self.make_settings(**settings)
        event = CancellationEvent(asyncio.get_running_loop())
        source = make_source(made, made.prefetch or 10)
        consumer = Consumer(source, Router(handlers), event, made, lifespan)
        before(consumer)
        async with opened(make_source(made)) as publisher:
            await publisher.publish(
                [OutgoingMessage(body, message_type, key=key) for body in bodies]
            )
            with capture_logs() as self.logs:
                consuming = asyncio.create_task(consumer.run())
                async with asyncio.timeout(20):
                    # Polled, since a condition may depend on anything.
                    while not until(consumer) and not consuming.done():  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                event.set("test")
                exit_code = await consuming
        return exit_code, consumer

    @property
    def left(self) -> tuple[int, int]:
        """How many messages are ready or delayed, and how many are dead letters."""
        counts = self.broker.counts(self.queue)
        return counts.ready + counts.delayed, counts.dead

    def events(self, name: str) -> list[Any]:
        return [entry for entry in self.logs if entry["event"] == name]


def done(count: int) -> Callable[[Consumer], bool]:
    return lambda consumer: consumer.handled_count + consumer.rejected_count >= count


def numbers(count: int) -> list[bytes]:
    return [json.dumps({"number": number}).encode() for number in range(count)]


async def consume(
    source: Source,
    settings: ConsumerSettings,
    until: Callable[[Consumer], bool],
    handlers: Mapping[str, HandlerFunction],
) -> Consumer:
    """Consume from this source until the condition is true, and shut down gracefully."""
    event = CancellationEvent(asyncio.get_running_loop())
    consumer = Consumer(source, Router(handlers), event, settings)
    consuming = asyncio.create_task(consumer.run())
    async with asyncio.timeout(20):
        while not until(consumer) and not consuming.done():  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.005)
    event.set("test")
    assert await consuming == 0
    return consumer
