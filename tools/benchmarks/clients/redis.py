"""Redis Streams consumers to compare the generated service with: ``python -m tools.benchmarks.clients.redis NAME``.

They read the service's environment variables, take the same entries from the same stream as its group does,
and call the same stopwatch. An acknowledged entry is deleted, like the service does: the stream is a
queue, and would grow forever.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

from faststream import FastStream
from faststream.redis import RedisBroker, StreamSub
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tools.benchmarks.stopwatch import Stopwatch

URL = os.environ["CONSUMER_BROKER_URL"].partition("?")[0]
STREAM = os.environ["CONSUMER_SOURCE"]
GROUP = os.environ.get("CONSUMER_GROUP") or STREAM
PREFETCH = int(os.environ["CONSUMER_PREFETCH"])

stopwatch = Stopwatch()

Settle = Callable[[Redis, list[bytes]], Awaitable[None]]


async def bare() -> None:
    """redis-py's ``xreadgroup(count=prefetch)``, and XACK and XDEL of all entries in one pipeline."""

    async def settle_all(client: Redis, ids: list[bytes]) -> None:
        async with client.pipeline(transaction=True) as pipeline:
            pipeline.xack(STREAM, GROUP, *ids)
            pipeline.xdel(STREAM, *ids)
            await pipeline.execute()

    await _consume(settle_all)


async def bare_single() -> None:
    """The same reads, with one XACK and one XDEL for each message."""

    async def settle_each(client: Redis, ids: list[bytes]) -> None:
        for id in ids:
            await client.xack(STREAM, GROUP, id)
            await client.xdel(STREAM, id)

    await _consume(settle_each)


async def faststream() -> None:
    """FastStream's stream subscriber with a group; each message is acknowledged when its handler has returned.

    FastStream passes the fields of an entry that it did not write as a dict.
    Acknowledged entries stay in the stream, so it is deleted at the end.
    """
    await _run(RedisBroker(URL))


async def faststream_quiet() -> None:
    """FastStream without the two lines that it logs for each message."""
    await _run(RedisBroker(URL, logger=None))


async def _run(broker: RedisBroker) -> None:
    await _make_group()

    @broker.subscriber(
        stream=StreamSub(STREAM, group=GROUP, consumer="bench", max_records=PREFETCH)
    )
    async def handle(body: dict[str, str]) -> None:
        stopwatch.tick()

    await FastStream(broker).run()
    async with Redis.from_url(URL) as client:
        await client.delete(STREAM)


async def _consume(settle: Settle) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await _make_group()
    async with Redis.from_url(URL) as client:
        while not stop.is_set():
            streams = await client.xreadgroup(
                GROUP, "bench", {STREAM: ">"}, count=PREFETCH, block=100
            )
            for _, entries in streams.items() if isinstance(streams, dict) else streams or ():
                for _ in entries:
                    stopwatch.tick()
                await settle(client, [id for id, _ in entries])


async def _make_group() -> None:
    async with Redis.from_url(URL) as client:
        with suppress(ResponseError):
            await client.xgroup_create(STREAM, GROUP, "0", mkstream=True)


CONSUMERS = {
    consumer.__name__: consumer for consumer in (bare, bare_single, faststream, faststream_quiet)
}

if __name__ == "__main__":
    asyncio.run(CONSUMERS[sys.argv[1]]())
