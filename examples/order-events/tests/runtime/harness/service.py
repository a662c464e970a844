# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A service on the real runtime whose messages define how long its handler works.

The tests run it as a child process: ``python harness/service.py run``. Each handler call is appended to the file
that LEDGER names, one line for each start and each end, and survives SIGKILL.
"""

import asyncio
import os
import sys
from pathlib import Path

import structlog
from pydantic import BaseModel

from runtime.message import Message
from runtime.operate.cli import Service, main

log = structlog.get_logger()


class Task(BaseModel):
    id: str
    seconds: float = 0


def write(what: str, task_id: str) -> None:
    with Path(os.environ["LEDGER"]).open("a", encoding="utf-8") as ledger:
        ledger.write(f"{what} {task_id} {os.getpid()}\n")


async def work(task: Task, message: Message) -> None:
    write("start", task.id)
    log.info("handling", task=task.id, attempt=message.attempt)
    await asyncio.sleep(task.seconds)
    write("end", task.id)


if __name__ == "__main__":
    sys.exit(main(Service(name="service-of-the-tests", handlers={"work": work})))
