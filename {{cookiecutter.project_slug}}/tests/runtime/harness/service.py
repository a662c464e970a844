# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""A service on the real runtime whose messages say how its handlers are to behave.

The tests run it as a child process: ``python harness/service.py run``. What handlers did is appended to the file
that LEDGER names, one line for each start and each end, and survives SIGKILL.
"""

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, Self

import structlog
from pydantic import BaseModel, model_validator

from runtime import watchdog
from runtime.brokers import sqlite
from runtime.handlers import HandlerFunction
from runtime.message import Message, Reject, Retry
from runtime.operate.cli import main

log = structlog.get_logger()


class Task(BaseModel):
    """What the handler is to do: work for so many seconds, then end this way."""

    id: str
    seconds: float = 0
    retry_after_seconds: float | None = None
    steps: int = 0
    end: Literal[
        "return", "raise", "reject", "retry", "swallow", "block", "block in C", "checkpoint"
    ] = "return"


class TaskInBatch(Task):
    """Its handler starts when the batch is full: that the consumer has it is told before."""

    @model_validator(mode="after")
    def _write(self) -> Self:
        write("take", self.id)
        return self


def write(what: str, task_id: str) -> None:
    line = f"{what} {task_id} {os.getpid()}\n".encode()
    descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line)
    os.close(descriptor)


def finish(task: Task) -> None:
    write("end", task.id)
    if task.end == "raise":
        msg = "as the message asked for"
        raise RuntimeError(msg)
    if task.end == "reject":
        raise Reject("as the message asked for")
    if task.end == "retry":
        raise Retry("as the message asked for", delay_seconds=task.retry_after_seconds)


async def work(task: Task, message: Message) -> None:
    write("start", task.id)
    log.info("handling", task=task.id, attempt=message.attempt, headers=sorted(message.headers))
    if task.end == "block":
        time.sleep(task.seconds)  # noqa: ASYNC251  # a handler with a bug: it blocks the event loop
    elif task.end == "block in C":  # where no signal handler of Python runs
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(task.seconds * 500_000))
    elif task.end == "checkpoint":
        await message.stopping.wait()
        log.info("checkpoint", seconds_left=message.seconds_left())
    else:
        await sleep(task)
    finish(task)


async def sleep(task: Task) -> None:
    ends_at = time.monotonic() + task.seconds
    while (seconds := ends_at - time.monotonic()) > 0:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            if task.end != "swallow":
                raise


def place_of(task: Task) -> int:
    return Path(os.environ["LEDGER"]).read_text(encoding="utf-8").count(f"step {task.id} ")


async def long(task: Task, message: Message) -> None:
    """Many steps; told to stop, it leaves, and goes on from the place that the ledger has kept."""
    place = place_of(task)
    write("start", task.id)
    log.info("handling", task=task.id, attempt=message.attempt, place=place)
    for _ in range(place, task.steps):
        if message.stopping.is_set():
            log.info("checkpoint", seconds_left=message.seconds_left())
            raise Retry("stopping")
        await asyncio.sleep(task.seconds)
        write("step", task.id)
        log.info("step")
    finish(task)


def thread(task: Task, message: Message) -> None:
    write("start", task.id)
    log.info("handling", task=task.id)
    if task.end == "checkpoint":
        while not message.stopping.is_set() or message.seconds_left() == 20:
            time.sleep(0.01)
        log.info("checkpoint", seconds_left=message.seconds_left())
    time.sleep(task.seconds)
    finish(task)


async def batch(tasks: list[TaskInBatch]) -> None:
    for task in tasks:
        write("start", task.id)
    log.info("handling", tasks=[task.id for task in tasks])
    await asyncio.sleep(max(task.seconds for task in tasks))
    for task in tasks:
        finish(task)


HANDLERS: dict[str, HandlerFunction] = {
    "work": work,
    "long": long,
    "thread": thread,
    "batch": batch,
}


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    fails = os.environ.get("LIFESPAN_FAILS")
    if fails == "enter":
        msg = "the database is down"
        raise RuntimeError(msg)
    yield
    if fails == "hang":
        await asyncio.sleep(3600)
    log.info("lifespan_closed")
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
    chosen = os.environ.get("HANDLERS", "work").split(",")
    handlers = {name: HANDLERS[name] for name in chosen}
    sys.exit(main(name="shutdown-suite", handlers=handlers, lifespan=lifespan))
