"""A handler that waits, like a handler that calls another service, and writes a ledger of its process's messages.

A line for each beginning, if it waits at all, and for each end: event, message's number, and time, which all
processes of a machine share. The lines survive a kill of the process.

With BENCH_HANDLER_FAILS it raises at the end. SIGUSR2 holds handlers back until SIGUSR1: so all begin together.
"""

import asyncio
import os
import signal
import time

EXAMPLE = b'"0"'
SECONDS = float(os.environ.get("BENCH_HANDLER_SECONDS", "0"))
FAILS = "BENCH_HANDLER_FAILS" in os.environ

ledger = os.open(os.environ.get("BENCH_LEDGER", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
may_begin = asyncio.Event()
may_begin.set()
loops: set[asyncio.AbstractEventLoop] = set()
"""The event to set, once it exists."""


def obey(signum: int, _: object) -> None:
    change = may_begin.set if signum == signal.SIGUSR1 else may_begin.clear
    for loop in loops:
        loop.call_soon_threadsafe(change)
    if not loops:
        change()


signal.signal(signal.SIGUSR1, obey)
signal.signal(signal.SIGUSR2, obey)


def write(what: str, body: bytes) -> None:
    number = int(body.strip(b'"'))
    os.write(ledger, f"{what} {number} {time.monotonic()}\n".encode())


async def handle(body: bytes) -> None:
    if not loops:
        loops.add(asyncio.get_running_loop())
    if not may_begin.is_set():
        await may_begin.wait()
    if SECONDS:
        write("begin", body)
        await asyncio.sleep(SECONDS)
    if FAILS:
        raise RuntimeError("this handler always fails")
    write("end", body)
