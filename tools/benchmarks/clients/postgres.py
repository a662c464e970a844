"""Bare asyncpg on the service's own table, for comparison: ``python -m tools.benchmarks.clients.postgres NAME``.

Both loops take the same messages, call the same stopwatch, and read the service's environment variables. Neither has
leases, retries or dead letters; FastStream does not support PostgreSQL.
"""

import asyncio
import os
import signal
import sys
from typing import Any

import asyncpg

from tools.benchmarks.stopwatch import Stopwatch

URL = os.environ["CONSUMER_BROKER_URL"]
QUEUE = os.environ["CONSUMER_SOURCE"]
PREFETCH = int(os.environ["CONSUMER_PREFETCH"])

SETTINGS = {"enable_seqscan": "off", "jit": "off"}  # like the service
IDLE_SECONDS = 0.05

EXCHANGE = """
WITH acked AS (
    DELETE FROM consumer.messages AS m USING unnest($2::bigint[]) AS acked (seq) WHERE m.seq = acked.seq
), ready AS MATERIALIZED (
    SELECT seq FROM consumer.messages WHERE source = $1 AND consumer IS NULL AND due_at <= '-infinity'
    ORDER BY due_at, seq LIMIT $3 FOR UPDATE SKIP LOCKED
)
UPDATE consumer.messages SET consumer = -1
WHERE seq = ANY (ARRAY(SELECT seq FROM ready))
RETURNING seq, body, id, type, headers, failures
"""
ACK = "DELETE FROM consumer.messages WHERE seq = $1"

stopwatch = Stopwatch()


async def bare() -> None:
    """One statement acknowledges a batch and takes the next batch, like the service."""
    stop, connection = await _connect()
    acked: list[int] = []
    while not stop.is_set():
        rows = await connection.fetch(EXCHANGE, QUEUE, acked, PREFETCH)
        acked = []
        for seq, _body, _id, _type, _headers, _failures in rows:
            stopwatch.tick()
            acked.append(seq)
        if not rows:
            await asyncio.sleep(IDLE_SECONDS)
    await connection.close()


async def bare_single() -> None:
    """Batches are taken, and each message is acknowledged by a statement of its own."""
    stop, connection = await _connect()
    while not stop.is_set():
        rows = await connection.fetch(EXCHANGE, QUEUE, [], PREFETCH)
        for seq, _body, _id, _type, _headers, _failures in rows:
            stopwatch.tick()
            await connection.execute(ACK, seq)
        if not rows:
            await asyncio.sleep(IDLE_SECONDS)
    await connection.close()


async def _connect() -> tuple[asyncio.Event, Any]:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop, await asyncpg.connect(URL, server_settings=SETTINGS)


CONSUMERS = {consumer.__name__: consumer for consumer in (bare, bare_single)}

if __name__ == "__main__":
    asyncio.run(CONSUMERS[sys.argv[1]]())
