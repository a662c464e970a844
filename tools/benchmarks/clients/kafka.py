"""Kafka consumers that the generated service is compared with: ``python -m tools.benchmarks.clients.kafka NAME``.

As in every file of this folder, they take the same messages from the same topic, call the same stopwatch, and
read the service's environment variables. Each is written as its library's own documentation writes it.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from aiokafka import AIOKafkaConsumer, TopicPartition
from confluent_kafka.aio import AIOConsumer
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker

from tools.benchmarks.stopwatch import Stopwatch

ADDRESS = urlsplit(os.environ["CONSUMER_BROKER_URL"]).netloc
TOPIC = os.environ["CONSUMER_SOURCE"]
GROUP = os.environ["CONSUMER_GROUP"]
PREFETCH = int(os.environ["CONSUMER_PREFETCH"])
COMMIT_SECONDS = 0.25
"""As often as the service."""

stopwatch = Stopwatch()


async def bare() -> None:
    """aiokafka's ``getmany()``, and a commit every quarter of a second."""
    async with _consumer() as (consumer, stop):
        committed_at = time.monotonic()
        offsets = {}
        while not stop.is_set():
            batch = await consumer.getmany(timeout_ms=250, max_records=PREFETCH)
            for partition, messages in batch.items():
                for _ in messages:
                    stopwatch.tick()
                offsets[partition] = messages[-1].offset + 1
            if offsets and time.monotonic() - committed_at > COMMIT_SECONDS:
                await consumer.commit(offsets)
                committed_at = time.monotonic()
                offsets = {}


async def bare_single() -> None:
    """aiokafka's ``getone()``, and a commit for each message."""
    async with _consumer() as (consumer, stop):
        consuming = asyncio.create_task(_consume_each(consumer))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({consuming, stopping}, return_when=asyncio.FIRST_COMPLETED)
        consuming.cancel()


async def _consume_each(consumer: AIOKafkaConsumer) -> None:
    async for message in consumer:
        stopwatch.tick()
        partition = TopicPartition(message.topic, message.partition)
        await consumer.commit({partition: message.offset + 1})


async def librdkafka() -> None:
    """confluent-kafka's ``AIOConsumer.consume()``, and a commit every quarter of a second."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    config = {"bootstrap.servers": ADDRESS, "group.id": GROUP, "auto.offset.reset": "earliest"}
    consumer = AIOConsumer({**config, "enable.auto.commit": False})
    await consumer.subscribe([TOPIC])
    committed_at, last = time.monotonic(), None
    while not stop.is_set():
        for message in await consumer.consume(PREFETCH, 0.25):
            message.value()
            stopwatch.tick()
            last = message
        if last is not None and time.monotonic() - committed_at > COMMIT_SECONDS:
            await consumer.commit(asynchronous=False)
            committed_at, last = time.monotonic(), None
    await consumer.close()


async def faststream() -> None:
    """FastStream's default, ``AckPolicy.ACK_FIRST``: Kafka's commits, before the handler ends: at most once."""
    await _run(KafkaBroker(ADDRESS))


async def faststream_ack() -> None:
    """A commit after each message, which is at least once."""
    await _run(KafkaBroker(ADDRESS, ack_policy=AckPolicy.ACK))


async def _run(broker: KafkaBroker) -> None:
    @broker.subscriber(TOPIC, group_id=GROUP, auto_offset_reset="earliest")
    async def handle(body: bytes) -> None:
        stopwatch.tick()

    await FastStream(broker).run()


@asynccontextmanager
async def _consumer() -> AsyncIterator[tuple[AIOKafkaConsumer, asyncio.Event]]:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    consumer = AIOKafkaConsumer(
        TOPIC,
        bootstrap_servers=ADDRESS,
        group_id=GROUP,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    async with consumer:
        yield consumer, stop


CONSUMERS = {
    consumer.__name__: consumer
    for consumer in (bare, bare_single, librdkafka, faststream, faststream_ack)
}

if __name__ == "__main__":
    asyncio.run(CONSUMERS[sys.argv[1]]())
