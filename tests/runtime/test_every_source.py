"""More tests of every source, whose code is shared: here on each broker, and not again in services."""

import asyncio
import random
from collections import Counter
from contextlib import suppress

import pytest

from harness.contract import (
    WAIT_SECONDS,
    Connect,
    ack_all,
    consume,
    eventually,
    length_of,
    need,
    publish,
    take,
)
from harness.servers import Server
from runtime.errors import SourceFailed


async def test_workers_share_one_source(connect: Connect) -> None:
    handled: list[str] = []
    async with connect(prefetch=5) as source:
        all_busy = asyncio.Barrier(5)

        async def work() -> None:
            (message,) = await take(source, 1)
            await all_busy.wait()
            handled.append(message.id)
            await source.ack(message)
            await consume(source, handled)

        workers = [asyncio.create_task(work()) for _ in range(5)]
        published = await publish(source, 60)
        await eventually(60, length_of(handled))
        await source.stop()
        await asyncio.gather(*workers)
    assert Counter(handled) == Counter(published)


@pytest.mark.slow
async def test_cancelling_anext_300_times_loses_nothing(connect: Connect) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    received: list[str] = []
    published: list[str] = []

    async with connect(prefetch=4) as source, connect(prefetch=0) as publisher:

        async def publish_slowly() -> None:
            for _ in range(20):
                published.extend(await publish(publisher, chance.randrange(1, 6)))

        publishing = asyncio.create_task(publish_slowly())
        for _ in range(300):
            pull = asyncio.ensure_future(anext(source))
            for _ in range(chance.randrange(8)):
                await asyncio.sleep(chance.choice([0, 0, 0.001]))
            pull.cancel()
            with suppress(asyncio.CancelledError):
                message = await pull
                received.append(message.id)
                await source.ack(message)
        await publishing
        while len(received) < len(published):
            received += await ack_all(source, 1)
    assert Counter(received) == Counter(published)


async def test_stop_ends_waiting_workers(connect: Connect) -> None:
    async with connect(prefetch=3) as source:
        workers = [asyncio.create_task(consume(source, [])) for _ in range(3)]
        await asyncio.sleep(0)
        await source.stop()
        async with asyncio.timeout(WAIT_SECONDS):
            await asyncio.gather(*workers)


async def test_a_failed_fetcher_makes_every_worker_raise(connect: Connect) -> None:
    async with connect(prefetch=2) as source:
        workers = [asyncio.ensure_future(anext(source)) for _ in range(3)]
        await asyncio.sleep(0)
        source.buffer.fail(RuntimeError("out of order"))
        for worker in workers:
            with pytest.raises(SourceFailed, match="out of order"):
                await worker
        with pytest.raises(SourceFailed, match="out of order"):
            await anext(source)


async def test_a_source_is_connected_from_entering_to_leaving(connect: Connect) -> None:
    async with connect(prefetch=1) as source:
        assert source.connected
        await source.stop()
        assert source.connected  # what is in flight can still be settled
    assert not source.connected


async def test_describe_counts_the_messages_and_the_consumers(
    connect: Connect, broker: Server, queue: str
) -> None:
    async with connect(prefetch=0) as source:
        need(source, "queue_metrics")
        await publish(source, 3)
        described = await source.describe()
        assert described[queue] == 3
        if f"{queue} consumers" not in described:
            pytest.skip("this broker counts no consumers")
        assert described[f"{queue} consumers"] == 0
        async with connect(prefetch=1):

            async def count_consumers() -> object:
                return (await source.describe())[f"{queue} consumers"]

            await eventually(1, count_consumers)
