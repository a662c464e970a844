"""Renders a service, runs it, shuts it down with in-flight messages, and counts: ``python3 tasks.py demo``.

It writes only into ``.demo`` of the repository. The figures at the end are counted in the two databases, and not taken
from log lines.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from tools import ROOT
from tools.scaffold import install, scaffold, user_environment

SCRATCH = ROOT / ".demo"
MESSAGES = 60
PUBLISH_EVERY_SECONDS = 0.08
WAIT_SECONDS = 60

ON_WINDOWS = os.name == "nt"
STOP = signal.CTRL_BREAK_EVENT if ON_WINDOWS else signal.SIGTERM  # type: ignore[attr-defined,unused-ignore]  # Windows only

HANDLER = '''"""The demo's handler: a third of a second of work, which it writes into a database of its own."""

import asyncio
import os
import sqlite3
from contextlib import closing

from pydantic import BaseModel

from ..runtime.message import Message

EXAMPLE = b'{"number": 1}'


class OrderCreated(BaseModel):
    number: int


async def handle(event: OrderCreated, message: Message) -> None:
    await asyncio.sleep(0.3)
    with closing(sqlite3.connect(os.environ["DEMO_EFFECTS"])) as effects, effects:
        effects.execute("INSERT INTO effects VALUES (?, ?)", (event.number, os.getpid()))
'''


def main() -> int:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir()
    project = scaffold(SCRATCH, handler=HANDLER)
    say("scaffolded", f"{project.relative_to(ROOT).as_posix()}, with the default answers")
    started = time.monotonic()
    program = install(project)
    say("installed", f"from its own pyproject.toml, in {time.monotonic() - started:.0f} s")

    queue, effects = SCRATCH / "queue.db", SCRATCH / "effects.db"
    with closing(sqlite3.connect(effects)) as database, database:
        database.execute("CREATE TABLE effects (number INTEGER, process INTEGER)")
    environment = {
        **user_environment(),
        "CONSUMER_BROKER_URL": f"sqlite:///{queue.as_posix()}",
        "CONSUMER_CONCURRENCY": "2",
        "CONSUMER_PREFETCH": "6",
        "DEMO_EFFECTS": str(effects),
    }
    publisher = Publisher(program, environment)
    say("publishing", f"{MESSAGES} messages, by another process, into {queue.name}")

    first = Run(program, environment)
    first.wait_until(lambda: count(effects, "SELECT count(*) FROM effects") >= 6)
    in_flight, seconds = first.stop()
    done = count(effects, "SELECT count(*) FROM effects")
    say(
        "stopped",
        f"{STOP.name} with {in_flight} messages in flight: it finished them, took no other,",
    )
    say("", f"and exited after {seconds:.2f} s with exit code {first.exit_code}")
    requeued = first.event("drained")["requeued"]
    say("", f"{done} handled so far; {requeued} prefetched and not started were requeued")

    second = Run(program, environment)
    say("started", "again: it continues where the first one stopped")
    publisher.finish()
    second.wait_until(lambda: count(queue, "SELECT count(*) FROM messages") == 0)
    _, seconds = second.stop()
    say("stopped", f"with nothing left to do, after {seconds:.2f} s, exit code {second.exit_code}")
    return report(queue, effects, [first, second])


def report(queue: Path, effects: Path, runs: list["Run"]) -> int:
    with closing(sqlite3.connect(effects)) as database:
        handled = Counter(number for (number,) in database.execute("SELECT number FROM effects"))
    left = count(queue, "SELECT count(*) FROM messages")
    dead = count(queue, "SELECT count(*) FROM dead_letters")
    published = count(queue, "SELECT seq FROM sqlite_sequence WHERE name = 'messages'")
    lost = published - len(handled) - left - dead
    twice = sum(times - 1 for times in handled.values())
    by_run = [
        count(effects, "SELECT count(*) FROM effects WHERE process = ?", run.process.pid)
        for run in runs
    ]
    print("\nCounted in the two databases:\n")
    print(f"    published       {published:4}")
    print(
        f"    handled         {len(handled):4}   {by_run[0]} before the shutdown, {by_run[1]} after it"
    )
    print(f"    left, dead      {left + dead:4}")
    print(f"    lost            {lost:4}")
    print(f"    handled twice   {twice:4}")
    well = (published, len(handled), lost, twice) == (MESSAGES, MESSAGES, 0, 0)
    well = well and [run.exit_code for run in runs] == [0, 0]
    where = f"{SCRATCH.name}/order-events"
    print(f"\nThe service is yours to look at: {where}" if well else "\nThat is not as promised.")
    return 0 if well else 1


class Publisher(threading.Thread):
    """Feeds ``order-events publish -``, a separate process, one JSON line at a time."""

    def __init__(self, program: Path, environment: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self._process = subprocess.Popen(
            [program, "publish", "-"],
            env=environment,
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.start()

    def run(self) -> None:
        assert self._process.stdin is not None
        for number in range(1, MESSAGES + 1):
            self._process.stdin.write(json.dumps({"number": number}) + "\n")
            self._process.stdin.flush()
            time.sleep(PUBLISH_EVERY_SECONDS)
        self._process.stdin.close()

    def finish(self) -> None:
        self.join(WAIT_SECONDS)
        if self._process.wait(WAIT_SECONDS) != 0:
            sys.exit("the publisher failed")


class Run:
    """One life of the service: a child process and its log events."""

    def __init__(self, program: Path, environment: dict[str, str]) -> None:
        self.exit_code: int | None = None
        self._events: list[dict[str, Any]] = []
        new_group = subprocess.CREATE_NEW_PROCESS_GROUP if ON_WINDOWS else 0  # type: ignore[attr-defined,unused-ignore]  # Windows only
        self.process = subprocess.Popen(
            [program, "run"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            creationflags=new_group,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.append(json.loads(line))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self._events if event["event"] == name]

    def event(self, name: str) -> dict[str, Any]:
        return self.events(name)[0]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > give_up_at or self.process.poll() is not None:
                self.process.kill()
                sys.exit("the service made no progress")
            time.sleep(0.01)

    def stop(self) -> tuple[int, float]:
        """Send the signal; returns the in-flight messages at that time, and the seconds to the exit."""
        sent_at = time.monotonic()
        self.process.send_signal(STOP)
        seconds = self.wait() - sent_at
        return self.event("draining")["in_flight"], seconds

    def wait(self) -> float:
        """Wait for the exit; returns its time, by the monotonic clock."""
        self.exit_code = self.process.wait(WAIT_SECONDS)
        ended_at = time.monotonic()
        self._reader.join()
        return ended_at


def count(database: Path, query: str, *parameters: object) -> int:
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        row = connection.execute(query, parameters).fetchone()
    return int(row[0])


def say(what: str, text: str) -> None:
    print(f"  {what:12}{text}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
