"""The service of the harness, with handlers and a lifespan that misbehave; it runs like the harness's service.

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
from typing import Any, Self

from pydantic import model_validator

from harness import service
from harness.service import log, write
from runtime import telemetry, watchdog
from runtime.brokers import sqlite
from runtime.consumer import Lifespan
from runtime.handlers import HandlerFunction, Handles
from runtime.message import Message, OutgoingMessage, Reject, Retry
from runtime.operate.cli import Service, main


class Task(service.Task):
    """The handler works for this many seconds, then ends this way."""

    retry_after_seconds: float | None = None
    end: str = "return"


class LongTask(Task):
    steps: int


class LargeTask(Task):
    padding: str


class TaskInBatch(Task):
    """Its handler starts when the batch is full; the ledger has the task as soon as the consumer has it."""

    @model_validator(mode="after")
    def _write(self) -> Self:
        write("take", self.id)
        return self


def begin(task: Task, message: Message, **details: Any) -> None:
    write("start", task.id)
    details |= {"headers": sorted(message.headers), "deliveries": message.deliveries}
    log.info("handling", task=task.id, attempt=message.attempt, **details)


def finish(task: Task) -> None:
    write("end", task.id)
    if task.end == "raise":
        msg = "as the message asked for"
        raise RuntimeError(msg)
    if task.end == "reject":
        raise Reject("as the message asked for")
    if task.end == "retry":
        raise Retry("as the message asked for", delay_seconds=task.retry_after_seconds)


async def misbehave(task: Task, message: Message) -> None:
    begin(task, message)
    if task.end == "block":
        time.sleep(task.seconds)  # noqa: ASYNC251  # a handler with a bug: it blocks the event loop
    elif task.end == "block in C":  # signal handlers in Python do not run there
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(task.seconds * 500_000))
    elif task.end == "checkpoint":
        await message.stopping.wait()
        log.info("checkpoint", seconds_left=message.seconds_left())
    elif task.end == "exit":
        os._exit(137)  # like a process that is killed for its memory
    elif task.end == "swallow":
        await swallow_cancellations(task)
    else:
        await asyncio.sleep(task.seconds)
    finish(task)


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
    """Many steps; on shutdown it retries, and resumes at the step in the ledger."""
    place = place_of(task)
    begin(task, message, place=place)
    for _ in range(place, task.steps):
        if message.stopping.is_set():
            raise Retry("stopping")
        await asyncio.sleep(task.seconds)
        write("step", task.id)
        log.info("step")
    finish(task)


async def forward(task: Task, message: Message) -> OutgoingMessage | None:
    """Publish the task's id to FORWARD_TO; the first process ends between the publish and the ack."""
    begin(task, message)
    outgoing = OutgoingMessage(task.id.encode(), "forwarded", to=os.environ["FORWARD_TO"])
    if task.end == "exit" and "KILLED" not in os.environ:
        await message.publish(outgoing)
        os._exit(137)
    write("end", task.id)
    return outgoing


async def relay(task: Task, message: Message) -> OutgoingMessage:
    """Publish the task to FORWARD_TO, after some work."""
    begin(task, message)
    await asyncio.sleep(task.seconds)
    return OutgoingMessage(task, "relay", to=os.environ["FORWARD_TO"])


async def sink(task: Task, message: Message) -> None:
    """Record the task and the message's id."""
    begin(task, message)
    write("sink", f"{task.id}/{message.id}")
    finish(task)


async def batch(tasks: list[TaskInBatch]) -> None:
    for task in tasks:
        write("start", task.id)
    log.info("handling", tasks=[task.id for task in tasks])
    await asyncio.sleep(max(task.seconds for task in tasks))
    for task in tasks:
        finish(task)


def large(task: LargeTask, message: Message) -> None:
    """Holds its payload until HOLD such handlers have started."""
    begin(task, message)
    ledger = Path(os.environ["LEDGER"])
    while ledger.read_text(encoding="utf-8").count("start") < int(os.environ["HOLD"]):
        time.sleep(0.05)
    finish(task)


async def large_batch(tasks: list[LargeTask]) -> None:
    """Holds its payloads while others arrive."""
    await asyncio.sleep(1)
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
        while (now := signal.set_wakeup_fd(-1)) != ours:  # the watchdog sets its own again
            signal.set_wakeup_fd(now)
            await asyncio.sleep(0.01)
        signal.set_wakeup_fd(now)
    yield
    if fails == "hang":
        await asyncio.sleep(3600)
    if fails == "exit":
        msg = "the pool does not close"
        raise RuntimeError(msg)


def run(handlers: dict[str, HandlerFunction], lifespan: Lifespan | None = None) -> int:
    chosen = os.environ.get("HANDLERS", "work").split(",")
    handlers = {name: handlers[name] for name in chosen}
    return main(Service(name="service-of-the-tests", handlers=handlers, lifespan=lifespan))


if __name__ == "__main__":
    for module, name in (
        (watchdog, "CLOSE_SECONDS"),
        (watchdog, "FORCED_SECONDS"),
        (sqlite, "PATIENCE_SECONDS"),
    ):
        setattr(module, name, float(os.environ.get(name, getattr(module, name))))
    if kind := os.environ.get("TELEMETRY"):
        telemetry.KINDS = (kind,)  # type: ignore[assignment]  # a service has one of them
    handlers: dict[str, HandlerFunction] = {"work": misbehave, "thread": thread, "long": long}
    handlers |= {"forward": forward, "relay": relay, "sink": sink}
    handlers |= {"batch": batch, "large": large, "large_batch": large_batch}
    handlers |= {"wrong": lambda: None, "wrong_limit": Handles(misbehave, concurrency=0)}
    sys.exit(run(handlers, lifespan))
