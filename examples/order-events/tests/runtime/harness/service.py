# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""A service on the real runtime whose messages define how its handlers behave.

The tests run it as a child process: ``python harness/service.py run``. Each handler call is appended to the file
that LEDGER names, one line for each start and each end, and survives SIGKILL.
"""

import asyncio
import os
import sys
from typing import Any

import structlog
from pydantic import BaseModel

from runtime.consumer import Lifespan
from runtime.handlers import HandlerFunction
from runtime.message import Message, Reject, Retry
from runtime.operate.cli import main

log = structlog.get_logger()


class Task(BaseModel):
    """The task of the handler: work for this many seconds, then end this way."""

    id: str
    seconds: float = 0
    retry_after_seconds: float | None = None
    end: str = "return"


def write(what: str, task_id: str) -> None:
    line = f"{what} {task_id} {os.getpid()}\n".encode()
    descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line)
    os.close(descriptor)


def begin(task: Task, message: Message, **details: Any) -> None:
    write("start", task.id)
    headers = sorted(message.headers)
    log.info("handling", task=task.id, attempt=message.attempt, headers=headers, **details)


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
    begin(task, message)
    await asyncio.sleep(task.seconds)
    finish(task)


def run(handlers: dict[str, HandlerFunction], lifespan: Lifespan | None = None) -> int:
    chosen = os.environ.get("HANDLERS", "work").split(",")
    handlers = {name: handlers[name] for name in chosen}
    return main(name="service-of-the-tests", handlers=handlers, lifespan=lifespan)


if __name__ == "__main__":
    sys.exit(run({"work": work}))
