"""RabbitMQ consumers that the generated service is compared with: ``python -m tools.benchmarks.clients.rabbitmq NAME``.

As in every file of this folder, they take the same messages from the same queue, call the same stopwatch, and
read the service's environment variables. Each is written as its library's own documentation writes it.
"""

import asyncio
import os
import signal
import sys

import aio_pika
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue, AbstractRobustConnection
from faststream import FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

from tools.benchmarks.article_2019 import cancellable_aiter
from tools.benchmarks.stopwatch import Stopwatch

URL = os.environ["CONSUMER_BROKER_URL"]
QUEUE = os.environ["CONSUMER_SOURCE"]
PREFETCH = int(os.environ["CONSUMER_PREFETCH"])

stopwatch = Stopwatch()


async def bare_single() -> None:
    """aio-pika's ``queue.consume(callback)`` and ``await message.ack()``."""
    stop = _stop_event()
    connection, queue = await _connect()

    async def on_message(message: AbstractIncomingMessage) -> None:
        stopwatch.tick()
        await message.ack()

    async with connection:
        await queue.consume(on_message)
        await stop.wait()


async def article() -> None:
    """The 2019 article's pattern, around aio-pika's own iterator."""
    stop = _stop_event()
    connection, queue = await _connect()

    async def consume() -> None:
        async for message in cancellable_aiter(queue.iterator(), stop):
            stopwatch.tick()
            await message.ack()

    async with connection:
        consuming = asyncio.create_task(consume())
        await stop.wait()
        consuming.cancel()  # otherwise the article's iterator waits for one more message


async def faststream() -> None:
    """FastStream's default subscriber; only the prefetch is set, which it would leave unlimited."""
    await _run(RabbitBroker(URL, default_channel=Channel(prefetch_count=PREFETCH)))


async def faststream_quiet() -> None:
    """FastStream without the two lines that it logs for each message."""
    await _run(RabbitBroker(URL, default_channel=Channel(prefetch_count=PREFETCH), logger=None))


async def _run(broker: RabbitBroker) -> None:
    @broker.subscriber(RabbitQueue(QUEUE, declare=False))
    async def handle(body: bytes) -> None:
        stopwatch.tick()

    await FastStream(broker).run()


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


async def _connect() -> tuple[AbstractRobustConnection, AbstractQueue]:
    connection = await aio_pika.connect_robust(URL)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=PREFETCH)
    return connection, await channel.get_queue(QUEUE)


CONSUMERS = {
    consumer.__name__: consumer for consumer in (bare_single, article, faststream, faststream_quiet)
}

if __name__ == "__main__":
    asyncio.run(CONSUMERS[sys.argv[1]]())
