"""The trivial handler that the benchmarks put into a generated service, in place of the raw stub's handler."""

import asyncio
import os

import structlog

from tools.benchmarks.stopwatch import Stopwatch

log = structlog.get_logger()

EXAMPLE = b"{}"
SECONDS = float(os.environ.get("BENCH_HANDLER_SECONDS", "0"))

stopwatch = Stopwatch()


async def handle(body: bytes) -> None:
    if SECONDS:
        log.info("handling")
        await asyncio.sleep(SECONDS)
        log.info("handled")
    stopwatch.tick()
