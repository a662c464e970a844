"""The service of the harness, with handlers and a lifespan that misbehave, run as that is.

Environment variables set some constants of the runtime, so that no test waits for their full time.
"""

import asyncio
import hashlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

from pydantic import model_validator

from harness.service import Task, begin, finish, log, run, work, write
from runtime import telemetry, watchdog
from runtime.brokers import sqlite
from runtime.message import Message, Retry


class LongTask(Task):
    steps: int


class TaskInBatch(Task):
    """Its handler starts when the batch is full; the ledger has it as soon as the consumer does."""

    @model_validator(mode="after")
    def _write(self) -> Self:
        write("take", self.id)
        return self


async def misbehave(task: Task, message: Message) -> None:
    if task.end not in ("block", "block in C", "checkpoint", "swallow"):
        return await work(task, message)
    begin(task, message)
    if task.end == "block":
        time.sleep(task.seconds)  # noqa: ASYNC251  # a handler with a bug: it blocks the event loop
    elif task.end == "block in C":  # where no signal handler of Python runs
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(task.seconds * 500_000))
    elif task.end == "checkpoint":
        await message.stopping.wait()
        log.info("checkpoint", seconds_left=message.seconds_left())
    else:
        await swallow_cancellations(task)
    return finish(task)


async def swallow_cancellations(task: Task) -> None:
    ends_at = time.monotonic() + task.seconds
    while (seconds := ends_at - time.monotonic()) > 0:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            continue


def thread(task: Task, message: Message) -> None:
    begin(task, message)
    if task.end == "checkpoint":
        while not message.stopping.is_set() or message.seconds_left() == 20:
            time.sleep(0.01)
        log.info("checkpoint", seconds_left=message.seconds_left())
    time.sleep(task.seconds)
    finish(task)


def place_of(task: Task) -> int:
    return Path(os.environ["LEDGER"]).read_text(encoding="utf-8").count(f"step {task.id} ")


async def long(task: LongTask, message: Message) -> None:
    """Many steps; on shutdown it retries, and resumes at the step that the ledger has stored."""
    place = place_of(task)
    begin(task, message, place=place)
    for _ in range(place, task.steps):
        if message.stopping.is_set():
            raise Retry("stopping")
        await asyncio.sleep(task.seconds)
        write("step", task.id)
        log.info("step")
    finish(task)


async def batch(tasks: list[TaskInBatch]) -> None:
    for task in tasks:
        write("start", task.id)
    log.info("handling", tasks=[task.id for task in tasks])
    await asyncio.sleep(max(task.seconds for task in tasks))
    for task in tasks:
        finish(task)


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    fails = os.environ.get("LIFESPAN_FAILS")
    if fails == "enter":
        msg = "the database is down"
        raise RuntimeError(msg)
    if os.environ.get("LIFESPAN_LISTENS"):
        ours = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(ours)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, log.info, "reloading")
        while (now := signal.set_wakeup_fd(-1)) != ours:  # the watchdog comes back
            signal.set_wakeup_fd(now)
            await asyncio.sleep(0.01)
        signal.set_wakeup_fd(now)
    yield
    if fails == "hang":
        await asyncio.sleep(3600)
    if fails == "exit":
        msg = "the pool does not close"
        raise RuntimeError(msg)


if __name__ == "__main__":
    for module, name in (
        (watchdog, "CLOSE_SECONDS"),
        (watchdog, "FORCED_SECONDS"),
        (sqlite, "PATIENCE_SECONDS"),
    ):
        setattr(module, name, float(os.environ.get(name, getattr(module, name))))
    if kind := os.environ.get("TELEMETRY"):
        telemetry.KINDS = (kind,)  # type: ignore[assignment]  # a service has one kind at most
    sys.exit(run({"work": misbehave, "thread": thread, "long": long, "batch": batch}, lifespan))
