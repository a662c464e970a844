"""The SQS consumers that the generated service is compared with: ``python -m tools.benchmarks.clients.sqs NAME``.

They take the same messages from the same queue, call the same stopwatch, and read the service's environment
variables. FastStream 0.7.8 has no SQS.
"""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

from aiobotocore.session import get_session

from tools.benchmarks.stopwatch import Stopwatch

URL = urlsplit(os.environ["CONSUMER_BROKER_URL"])
QUEUE = os.environ["CONSUMER_SOURCE"]
PREFETCH = int(os.environ["CONSUMER_PREFETCH"])
TEN = 10
WAIT_SECONDS = 1

stopwatch = Stopwatch()


async def bare() -> None:
    """``receive_message`` of ten, ``delete_message_batch`` of ten, as many loops as fill the prefetch."""

    async def consume(client: Any, queue_url: str) -> None:
        while messages := await _receive(client, queue_url):
            for _ in messages:
                stopwatch.tick()
            entries = [
                {"Id": str(number), "ReceiptHandle": message["ReceiptHandle"]}
                for number, message in enumerate(messages)
            ]
            await client.delete_message_batch(QueueUrl=queue_url, Entries=entries)

    await _run(consume)


async def bare_single() -> None:
    """The same receives, with one ``delete_message`` for each message."""

    async def consume(client: Any, queue_url: str) -> None:
        while messages := await _receive(client, queue_url):
            for message in messages:
                stopwatch.tick()
                await client.delete_message(
                    QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"]
                )

    await _run(consume)


async def _receive(client: Any, queue_url: str) -> list[dict[str, Any]]:
    answer = await client.receive_message(
        QueueUrl=queue_url,
        MaxNumberOfMessages=TEN,
        WaitTimeSeconds=WAIT_SECONDS,
        MessageAttributeNames=["All"],
    )
    return answer.get("Messages", [])


async def _run(consume: Any) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with get_session().create_client(
        "sqs",
        region_name=URL.path.strip("/"),
        endpoint_url=f"http://{URL.hostname}:{URL.port}",
        aws_access_key_id=URL.username,
        aws_secret_access_key=unquote(URL.password or ""),
    ) as client:
        queue_url = (await client.get_queue_url(QueueName=QUEUE))["QueueUrl"]
        loops = [consume(client, queue_url) for _ in range(-(-PREFETCH // TEN))]
        consuming = asyncio.gather(*loops)
        await stop.wait()
        consuming.cancel()
        with suppress(asyncio.CancelledError):
            await consuming


CONSUMERS = {consumer.__name__: consumer for consumer in (bare, bare_single)}

if __name__ == "__main__":
    asyncio.run(CONSUMERS[sys.argv[1]]())
