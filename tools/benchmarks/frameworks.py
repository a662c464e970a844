"""The consumers of RabbitMQ that the generated service is compared with in behaviour.py and latency.py.

Each is written and started as its own documentation shows, with its own defaults, including its own kind of queue. The
arguments that are not defaults are listed, with the reasons, in defaults.py. All have one process and a prefetch of 10,
the handler of ledger_handler.py, and the messages of ``python -m tools.benchmarks.frameworks publish NAME MESSAGES PER_SECOND``.
"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable

import aio_pika
from aio_pika.abc import AbstractIncomingMessage
from faststream import FastStream
from faststream.rabbit import Channel, RabbitBroker
from taskiq_aio_pika import AioPikaBroker

from tools.benchmarks.ledger_handler import handle, write

URL = os.environ["CONSUMER_BROKER_URL"]
QUEUE = os.environ["CONSUMER_SOURCE"]
PREFETCH = int(os.environ["CONSUMER_CONCURRENCY"])


def faststream() -> FastStream:
    """Its first example: a function, and no settings of the queue."""
    return _app(RabbitBroker(URL, default_channel=Channel(prefetch_count=PREFETCH)))


def faststream_none() -> FastStream:
    """Its default before 0.7.8."""
    channel = Channel(prefetch_count=PREFETCH)
    return _app(RabbitBroker(URL, default_channel=channel, graceful_timeout=None))


def faststream_one() -> FastStream:
    channel = Channel(prefetch_count=PREFETCH)
    return _app(RabbitBroker(URL, default_channel=channel, graceful_timeout=1))


def _app(broker: RabbitBroker) -> FastStream:
    broker.subscriber(QUEUE)(handle)
    return FastStream(broker)


taskiq_broker = AioPikaBroker(URL)


@taskiq_broker.task
async def task(body: str) -> None:
    await handle(body.encode())


async def aio_pika_worker() -> None:
    """The worker of its tutorial, "Work queues"."""
    await _work({})


async def aio_pika_quorum() -> None:
    """The tutorial's worker on a queue of the kind that the service and taskiq declare."""
    await _work({"x-queue-type": "quorum"})


async def _work(queue_arguments: dict[str, str]) -> None:
    async def on_message(message: AbstractIncomingMessage) -> None:
        async with message.process():
            await handle(message.body)

    connection = await aio_pika.connect(URL)
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.declare_queue(QUEUE, durable=True, arguments=queue_arguments)
        await queue.consume(on_message)
        await asyncio.Future()


async def publish(name: str, messages: int, per_second: float) -> None:
    """Publish this many messages at an even rate, each written to the ledger before it is sent."""
    if name.startswith("taskiq"):
        await taskiq_broker.startup()
        await _paced(task.kiq, messages, per_second)
        await taskiq_broker.shutdown()
        return
    async with await aio_pika.connect(URL) as connection:
        exchange = (await connection.channel()).default_exchange

        def send(body: str) -> Awaitable[object]:
            persistent = aio_pika.DeliveryMode.PERSISTENT
            return exchange.publish(
                aio_pika.Message(body.encode(), delivery_mode=persistent), QUEUE
            )

        await _paced(send, messages, per_second)


async def _paced(
    send: Callable[[str], Awaitable[object]], messages: int, per_second: float
) -> None:
    async def send_one(body: str) -> None:
        write("sent", body.encode())
        await send(body)

    began_at = time.monotonic()
    async with asyncio.TaskGroup() as sending:
        for number in range(messages):
            await asyncio.sleep(max(0, began_at + number / per_second - time.monotonic()))
            sending.create_task(send_one(f'"{number}"'))


if __name__ == "__main__":
    if sys.argv[1] == "publish":
        # Imported like taskiq's worker imports it: the name of a task has its module.
        from tools.benchmarks import frameworks

        asyncio.run(frameworks.publish(sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
    else:
        asyncio.run(globals()[sys.argv[1]]())
