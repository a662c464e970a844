"""The worker as a process, with a RabbitMQ at AMQP_URL."""

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aio_pika
import pytest

URL = os.environ.get("AMQP_URL", "")
pytestmark = pytest.mark.skipif(not URL, reason="AMQP_URL is not set")


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[str]:
    """The queue of a worker that runs."""
    name = f"invoices-{uuid.uuid4().hex}"
    env = {**os.environ, "INVOICES_QUEUE": name, "INVOICES_FOLDER": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-m", "invoices.worker"], env=env) as worker:
        yield name
        worker.terminate()


async def publish(queue: str, *orders: dict[str, Any]) -> None:
    async with await aio_pika.connect(URL) as connection:
        channel = await connection.channel(on_return_raises=True)
        for order in orders:
            message = aio_pika.Message(json.dumps(order).encode(), delivery_mode=2)
            for _ in range(200):  # until the worker has made its queue
                try:
                    await channel.default_exchange.publish(message, queue, mandatory=True)
                    break
                except aio_pika.exceptions.DeliveryError:
                    await asyncio.sleep(0.05)


def wait_for(file: Path) -> str:
    for _ in range(400):
        if file.exists() and (text := file.read_text()):
            return text
        time.sleep(0.05)
    raise TimeoutError(file)


def test_each_order_gets_an_invoice(queue: str, tmp_path: Path) -> None:
    asyncio.run(publish(queue, *({"reference": f"A-{n}", "cents": 100 * n} for n in (1, 2, 3))))
    assert [wait_for(tmp_path / f"A-{n}.txt") for n in (1, 2, 3)] == [
        f"Order A-{n}: {n}.00 EUR" for n in (1, 2, 3)
    ]


def test_a_bad_order_does_not_hold_up_the_next(queue: str, tmp_path: Path) -> None:
    asyncio.run(publish(queue, {"cents": 100}, {"reference": "A-2", "cents": 200}))
    assert wait_for(tmp_path / "A-2.txt") == "Order A-2: 2.00 EUR"
