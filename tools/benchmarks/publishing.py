"""CPU time of publishing a message to RabbitMQ: the service's publisher beside the bare client's batched confirms.

Both publish batches of 100 persistent messages of 200 bytes to a quorum queue, and wait for the confirms of each batch.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aio_pika
from pydantic import SecretStr

from harness.servers import ServerMissing, server_module
from runtime.brokers.rabbitmq import RabbitBroker
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings
from tools.benchmarks.figures import Figure
from tools.benchmarks.service import Unavailable

BATCH = 100
BODY = b"x" * 200
OURS = "a service's publisher"
BARE = "aio-pika, 100 publishes gathered"
AT_MOST = 1.0


def measure(folder: Path, messages: int, rounds: int) -> Iterator[Figure]:
    """Raises Unavailable without a RabbitMQ."""
    try:
        with server_module("rabbitmq").private(folder) as server:
            values = asyncio.run(_measure(server.url, messages, rounds))
    except ServerMissing as missing:
        raise Unavailable(str(missing)) from None
    part = f"RabbitMQ: publishing {messages:,} messages of 200 bytes, {BATCH} at a time"
    for name, (cpu, per_second) in values.items():
        yield Figure(part, name, cpu, "µs of CPU per message")
        yield Figure(part, f"{name}, rate", per_second, "messages per second")
    pairs = zip(values[OURS][0], values[BARE][0], strict=True)
    yield Figure(part, f"{OURS} / {BARE}", [ours / bare for ours, bare in pairs], at_most=AT_MOST)


async def _measure(
    url: str, messages: int, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """The microseconds of CPU per message, and the messages per second, of each."""
    settings = ConsumerSettings(broker_url=SecretStr(url), source="published")
    async with RabbitBroker(settings) as source, await aio_pika.connect(url) as connection:
        await source.declare()
        channel = await connection.channel()
        queue = await channel.get_queue(settings.source)

        async def ours() -> None:
            await source.publish(
                [OutgoingMessage(BODY, "t", to="queue:published") for _ in range(BATCH)]
            )

        async def bare() -> None:
            persistent = aio_pika.DeliveryMode.PERSISTENT
            publishing = (
                channel.default_exchange.publish(
                    aio_pika.Message(BODY, type="t", delivery_mode=persistent), "published"
                )
                for _ in range(BATCH)
            )
            await asyncio.gather(*publishing)

        contenders: dict[str, Callable[[], Awaitable[None]]] = {OURS: ours, BARE: bare}
        values: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}
        for publish in contenders.values():
            await publish()
        for _ in range(rounds):
            for name in random.sample(list(contenders), len(contenders)):
                cpu, clock = time.process_time(), time.perf_counter()
                for _ in range(messages // BATCH):
                    await contenders[name]()
                values[name][0].append((time.process_time() - cpu) * 1e6 / messages)
                values[name][1].append(messages / (time.perf_counter() - clock))
                await queue.purge()
    return values
