"""RabbitMQ without the runtime, like another program uses it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel


@asynccontextmanager
async def open_channel(url: str) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        yield channel


async def publish_raw(channel: AbstractChannel, queue: str, **properties: Any) -> None:
    message = aio_pika.Message(b"body", **properties)
    await channel.default_exchange.publish(message, routing_key=queue)
