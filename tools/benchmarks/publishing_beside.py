"""CPU time of publishing to Kafka, NATS and Redis: by the service, and by each bare client in its own way of batching.

Batches of 100 messages of 200 bytes, each confirmed, one or ten in flight at a time, as in publishing.py. The bare
clients follow their libraries' documentation, and give each message a type and an id too, on Kafka also as its key.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit
from uuid import uuid4

import nats
from aiokafka import AIOKafkaProducer
from redis.asyncio import Redis

from harness.servers import Server, ServerMissing, server_module
from runtime.brokers import make_source
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings
from tools.benchmarks.figures import Figure
from tools.benchmarks.publishing import (
    BARE,
    BATCH,
    BODY,
    IN_FLIGHT,
    OURS,
    BothSides,
    figures_of,
    timed,
)
from tools.benchmarks.service import Unavailable
from tools.kafka import variables_for

NAME = "published"
Publish = Callable[[], Awaitable[object]]


@asynccontextmanager
async def aiokafka(url: str) -> AsyncIterator[Publish]:
    async with AIOKafkaProducer(bootstrap_servers=urlsplit(url).netloc, acks="all") as producer:

        async def publish() -> None:
            sent = []
            for _ in range(BATCH):
                id = uuid4().hex.encode()
                headers = [("id", id), ("type", b"t")]
                sent.append(await producer.send(NAME, BODY, key=id, headers=headers))
            await asyncio.gather(*sent)

        yield publish


@asynccontextmanager
async def nats_py(url: str) -> AsyncIterator[Publish]:
    async with await nats.connect(url) as client:
        manager = client.jetstream()

        async def publish() -> None:
            sent = []
            for _ in range(BATCH):
                headers = {"Nats-Msg-Id": uuid4().hex, "type": "t"}
                sent.append(await manager.publish_async(NAME, BODY, headers=headers))
            await asyncio.gather(*sent)

        yield publish


@asynccontextmanager
async def redis_py(url: str) -> AsyncIterator[Publish]:
    async with Redis.from_url(url) as client:

        async def publish() -> None:
            async with client.pipeline(transaction=False) as pipeline:
                for _ in range(BATCH):
                    pipeline.xadd(NAME, {"type": "t", "id": uuid4().hex, "body": BODY})
                await pipeline.execute()

        yield publish


CLIENTS: dict[str, tuple[str, str, Any]] = {
    "kafka": ("Kafka", "aiokafka, 100 sends, then their futures", aiokafka),
    "nats": ("NATS", "nats-py, 100 publish_async, then their futures", nats_py),
    "redis": ("Redis", "redis-py, 100 XADDs in a pipeline", redis_py),
}


def measure(broker: str, folder: Path, messages: int, rounds: int) -> Iterator[Figure]:
    """Raises Unavailable if there is no such server."""
    title, bare, client = CLIENTS[broker]
    try:
        with (
            patch.dict(os.environ, variables_for(broker)),
            server_module(broker).private(folder) as server,
        ):
            rates = asyncio.run(_rates(server, client, messages, rounds))
    except ServerMissing as missing:
        raise Unavailable(str(missing)) from None
    for in_flight in IN_FLIGHT:
        plural = f"{in_flight} batches" if in_flight > 1 else "one batch"
        part = f"{title}: publishing {messages:,} messages, {plural} of {BATCH} in flight"
        ours, theirs = (rates[in_flight][who] for who in (OURS, BARE))
        yield from figures_of(part, bare, in_flight, ours, theirs)


async def _rates(
    server: Server, client: Any, messages: int, rounds: int
) -> dict[int, dict[str, list[BothSides]]]:
    """The results by the number of batches in flight, and by publisher."""
    settings = ConsumerSettings.model_validate({"broker_url": server.url, "source": NAME})
    rates: dict[int, dict[str, list[BothSides]]] = {n: {} for n in IN_FLIGHT}
    async with make_source(settings) as source, client(server.url) as bare:
        await source.declare()
        kind = next(iter(source.destinations))

        async def ours() -> None:
            await source.publish(
                [OutgoingMessage(BODY, "t", to=f"{kind}:{NAME}") for _ in range(BATCH)]
            )

        contenders: dict[str, Publish] = {OURS: ours, BARE: bare}
        for publish in contenders.values():
            await publish()
        cases = [(n, who) for n in IN_FLIGHT for who in contenders]
        for _ in range(rounds):
            for in_flight, who in random.sample(cases, len(cases)):
                measured = await timed(server, contenders[who], messages, in_flight)
                rates[in_flight].setdefault(who, []).append(measured)
    return rates
