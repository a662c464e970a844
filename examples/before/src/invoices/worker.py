"""Consumes orders and writes invoices: ``python -m invoices.worker``."""

import asyncio
import json
import logging
import os

import aio_pika

from .billing import invoice, keep

log = logging.getLogger(__name__)


async def main() -> None:
    connection = await aio_pika.connect_robust(os.environ["AMQP_URL"])
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=10)
        queue = await channel.declare_queue(os.environ["INVOICES_QUEUE"], durable=True)
        async with queue.iterator() as messages:
            async for message in messages:
                try:
                    async with message.process():
                        order = json.loads(message.body)
                        text = invoice(order["reference"], order["cents"])
                        await asyncio.sleep(
                            float(os.environ.get("INVOICES_SECONDS", "0"))
                        )  # the printer
                        keep(order["reference"], text)
                except Exception:
                    log.exception("an order was thrown away")


if __name__ == "__main__":
    asyncio.run(main())
