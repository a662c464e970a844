"""The NATS consumers that the generated service is compared with: ``python -m tools.benchmarks.clients.nats NAME``.

They pull the same messages from the same durable consumer, call the same stopwatch, and read the service's
environment variables. Each is written as its library's own documentation writes it.
"""

import asyncio
import os
import signal
import sys
from contextlib import suppress

import nats
from faststream import FastStream
from faststream.nats import JStream, NatsBroker, PullSub
from nats.js import JetStreamContext

from tools.benchmarks.stopwatch import Stopwatch

URL = os.environ["CONSUMER_BROKER_URL"].partition("?")[0]
STREAM = os.environ["CONSUMER_SOURCE"]
GROUP = os.environ.get("CONSUMER_GROUP", STREAM)
PREFETCH = int(os.environ["CONSUMER_PREFETCH"])

stopwatch = Stopwatch()


async def bare() -> None:
    """nats-py's ``fetch(PREFETCH)``, and ``await message.ack()``, which waits for nothing and is flushed in batches."""
    await _fetch(PREFETCH)


async def bare_single() -> None:
    """One message at a time: ``fetch(1)``, and an ack before the next."""
    await _fetch(1)


async def _fetch(count: int) -> None:
    stop = _stop_event()
    client = await nats.connect(URL)
    context: JetStreamContext = client.jetstream()
    pull = await context.pull_subscribe_bind(durable=GROUP, stream=STREAM)
    while not stop.is_set():
        with suppress(TimeoutError):  # no message came
            for message in await pull.fetch(count, timeout=1):
                stopwatch.tick()
                await message.ack()
    await client.drain()


async def faststream() -> None:
    """FastStream's pull subscriber on the durable consumer."""
    await _run(NatsBroker(URL))


async def faststream_quiet() -> None:
    """FastStream without the two lines that it logs for each message."""
    await _run(NatsBroker(URL, logger=None))


async def _run(broker: NatsBroker) -> None:
    @broker.subscriber(
        STREAM,
        durable=GROUP,
        stream=JStream(STREAM, declare=False),
        pull_sub=PullSub(batch_size=PREFETCH),
    )
    async def handle(body: bytes) -> None:
        stopwatch.tick()

    await FastStream(broker).run()


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


CONSUMERS = {
    consumer.__name__: consumer for consumer in (bare, bare_single, faststream, faststream_quiet)
}

if __name__ == "__main__":
    asyncio.run(CONSUMERS[sys.argv[1]]())
