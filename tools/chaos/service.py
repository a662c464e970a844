"""The service of the experiments: the runtime in place, with a handler that misbehaves.

The handler misbehaves at the first delivery of its message, in any process, and works at the next; ``fail`` and
``reject`` never work. With ``WELL`` set, none of the others misbehaves. ``CLOCK`` names a file
with the seconds by which the wall clock is wrong.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from pydantic import BaseModel

from harness.service import write
from runtime.message import Message, Reject, Retry
from runtime.operate.cli import Service, main


class Task(BaseModel):
    id: str
    how: str = "work"
    seconds: float = 0


def first_time(task: Task) -> bool:
    if "WELL" in os.environ:
        return False
    try:
        (Path(os.environ["MARKS"]) / task.id).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def handle(task: Task, message: Message) -> None:
    write("start", task.id)
    if task.how == "reject":
        raise Reject("as the plan says")
    if task.how == "fail" or (task.how == "fail_once" and first_time(task)):
        msg = "as the plan says"
        raise RuntimeError(msg)
    if task.how == "retry_once" and first_time(task):
        raise Retry("as the plan says", delay_seconds=task.seconds)
    if task.how == "hang" and first_time(task):
        await asyncio.sleep(3600)
    if task.how == "swallow" and first_time(task):
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                continue
    if task.how == "block" and first_time(task):
        time.sleep(task.seconds)  # noqa: ASYNC251  # a handler with a bug: it blocks the event loop
    else:
        await asyncio.sleep(task.seconds)
    write("end", task.id)


def set_the_clock(file: Path) -> None:
    """Shift time.time() by the seconds in the file; time.monotonic(), which deadlines use, stays right."""
    right, seen, offset = time.time, 0, 0.0

    def wrong() -> float:
        nonlocal seen, offset
        if (changed := file.stat().st_mtime_ns) != seen:
            seen, offset = changed, float(file.read_text() or 0)
        return right() + offset

    time.time = wrong


if __name__ == "__main__":
    if "CLOCK" in os.environ:
        set_the_clock(Path(os.environ["CLOCK"]))
    sys.exit(main(Service(name="chaos", handlers={"task": handle})))
