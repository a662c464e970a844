"""A second queue, to which handlers publish, and the service that consumes it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from harness.contract import opened
from runtime.brokers import make_source
from runtime.brokers.source import Broker
from runtime.message import Message
from runtime.settings import ConsumerSettings
from steps import start_once


class Next:
    """Another queue of the same broker, and the service that consumes it."""

    def __init__(self, settings: ConsumerSettings) -> None:
        self.settings = settings
        kind = next(iter(make_source(settings).destinations))
        self.to = f"{kind}:{settings.source}"

    async def declare(self) -> None:
        async with opened(make_source(self.settings)):
            pass
        await start_once(self.settings)

    @asynccontextmanager
    async def consuming(self) -> AsyncIterator[Broker]:
        async with opened(make_source(self.settings, 10)) as source:
            await source.start()
            yield source

    async def take(self, count: int = 1) -> list[Message]:
        """Take this many messages, and acknowledge them; there are no more."""
        async with self.consuming() as source, asyncio.timeout(30):
            messages = [await anext(source) for _ in range(count)]
            for message in messages:
                await source.ack(message)
        return messages
