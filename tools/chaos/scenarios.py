"""The runs with a name: rolling restarts, SIGKILLs, and SIGTERM at every moment of the start."""

import json
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

from account import Account
from plan import CONCURRENCY, SLOTS
from running import CLOSE_SECONDS, GENTLE_DRAIN_SECONDS, SLACK_SECONDS
from scene import Queue, Rig, Run, ending, wait

AT_ONCE = 500
"""So many ids are published at a time."""
WORK_SECONDS = 0.005
FEW = 10
"""At least so many wait during the sweep."""
PROGRESS_SECONDS = 120
"""Within so long a queue must move on."""


class Stuck(Exception):
    """Nothing moves any more; the text says where it stood."""


def publish(queue: Queue, ids: int, seconds: float = WORK_SECONDS) -> None:
    first = len(queue.published)
    for start in range(first, first + ids, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, first + ids))
        queue.publish({"id": f"work-{n}", "how": "work", "seconds": seconds} for n in numbers)


def start(queue: Queue, *, impatient: bool, proxy: int | None = None, **variables: object) -> Any:
    return queue.start(
        impatient=impatient,
        proxy=proxy,
        concurrency=CONCURRENCY,
        drain_seconds=GENTLE_DRAIN_SECONDS,
        max_attempts=3,
        **variables,
    )


def reach(queue: Queue, ended_count: int) -> None:
    if not wait(lambda: queue.ended_count >= ended_count, PROGRESS_SECONDS):
        msg = f"{queue.ended_count} handlers came to their end, not {ended_count}"
        raise Stuck(msg)


def stop(account: Account, process: Any) -> None:
    exit_code, seconds = process.stop()
    bound = GENTLE_DRAIN_SECONDS + CLOSE_SECONDS + SLACK_SECONDS
    account.endings.append(ending(process, exit_code, {0}, seconds, bound))


def stop_all(run: Run, running: list[Any]) -> None:
    """The end of a run: all stop gracefully, and others handle what is left."""
    for process in running:
        process.wait_for("consuming")
    for process in running:
        stop(run.account, process)
        run.stops += 1
    run.queue.rest(run.account)
    run.queue.finish(run.account, SLOTS)


class Rolling(Run):
    """Of two processes the older is stopped and replaced, again and again, while they work."""

    def __init__(self, queue: Queue, restarts: int, ids: int) -> None:
        super().__init__(queue)
        self.restarts = restarts
        self.ids = ids

    def run(self) -> None:
        running = [start(self.queue, impatient=False) for _ in range(SLOTS)]
        publish(self.queue, self.ids)
        for restart in range(self.restarts):
            reach(self.queue, (restart + 1) * self.ids // (self.restarts + 2))
            for process in running:
                process.wait_for("consuming")
            stop(self.account, running.pop(0))
            running.append(start(self.queue, impatient=False))
            self.stops += 1
        stop_all(self, running)

    def text(self) -> str:
        return f"{self.restarts} restarts over {self.ids} ids\n"


class Kills(Run):
    """One of two processes is killed whenever so many are done as was drawn, be it at work or just starting."""

    def __init__(self, queue: Queue, kills: int, ids: int, seed: int) -> None:
        super().__init__(queue)
        self.ids = ids
        self.account.graceful = False
        self.account.most_twice = kills * most_unsettled(queue.rig)
        chance = random.Random(seed)
        self.at = [
            (ended_count, chance.randrange(SLOTS))
            for ended_count in sorted(chance.sample(range(ids * 9 // 10), kills))
        ]

    def run(self) -> None:
        publish(self.queue, self.ids)
        running = [start(self.queue, impatient=True) for _ in range(SLOTS)]
        for ended_count, slot in self.at:
            reach(self.queue, ended_count)
            exit_code, seconds = running[slot].stop(signal.SIGKILL)
            allowed = {-signal.SIGKILL}
            self.account.endings.append(
                ending(running[slot], exit_code, allowed, seconds, SLACK_SECONDS)
            )
            running[slot] = start(self.queue, impatient=True)
            self.kills += 1
        stop_all(self, running)

    def text(self) -> str:
        return "".join(f"{json.dumps({'ended': e, 'kill': slot})}\n" for e, slot in self.at)


def most_unsettled(rig: Rig) -> float:
    """How many messages of one process may come again: its prefetch; on Kafka what it had not committed.

    On MQTT no number holds (docs/chaos.md).
    """
    return {"kafka": CONCURRENCY + 50, "mqtt": float("inf")}.get(rig.broker, CONCURRENCY)


class Sweep(Run):
    """SIGTERM so many milliseconds after the start of a process, for each time until it consumes."""

    def __init__(self, queue: Queue, every_ms: int) -> None:
        super().__init__(queue)
        self.every_ms = every_ms
        self.log: list[str] = []

    def run(self) -> None:
        publish(self.queue, FEW, seconds=0)
        for at_ms in range(0, consuming_after_ms(self.queue) + 1, self.every_ms):
            if len(self.queue.published) - len(self.queue.ledger.ended) < FEW:
                publish(self.queue, FEW, seconds=0)
            exit_code, fault = self._stop_after(at_ms)
            self.log.append(json.dumps({"at_ms": at_ms, "exit_code": exit_code, "fault": fault}))
            if fault:
                self.violations.append(f"SIGTERM after {at_ms} ms: {fault}")
        self.queue.finish(self.account)

    def _stop_after(self, at_ms: int) -> tuple[int, str]:
        """Returns the exit code, and what is wrong."""
        began_at = time.monotonic()
        process = start(self.queue, impatient=False)
        time.sleep(max(0, began_at + at_ms / 1000 - time.monotonic()))
        exit_code, seconds = process.stop()
        self.stops += 1
        found = ending(process, exit_code, {0, -signal.SIGTERM}, seconds, SLACK_SECONDS)
        faults = [*found.faults(), *_unacked(self.queue)]
        process.close()
        self.queue.processes.remove(process)
        return exit_code, "; ".join(faults)

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.log)


def consuming_after_ms(queue: Queue) -> int:
    """Of three starts the slowest, and a little more: then the sweep is sure to have seen all of it."""
    slowest = 0.0
    for _ in range(3):
        began_at = time.monotonic()
        process = start(queue, impatient=False)
        process.wait_for("consuming")
        slowest = max(slowest, time.monotonic() - began_at)
        process.stop()
    return round(1000 * slowest * 1.1)


def _unacked(queue: Queue) -> Iterator[str]:
    """A message that was consumed is done, or the broker has it again."""
    published = len(queue.published)

    def balance() -> tuple[int, int]:
        counts = queue.counts()
        return len(queue.ledger.ended), counts.ready + counts.delayed

    if not wait(lambda: sum(balance()) == published, SLACK_SECONDS):
        done, ready = balance()
        yield f"{done} done and {ready} there are not {published} published"
