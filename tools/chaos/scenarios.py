"""The experiments without a plan: rolling restarts, SIGKILLs, failovers, and SIGTERM at every moment of the start."""

import json
import math
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

from tools.chaos import Stuck
from tools.chaos.plan import CONCURRENCY, SLOTS
from tools.chaos.reconciliation import Reconciliation
from tools.chaos.running import CLOSE_SECONDS, GENTLE_DRAIN_SECONDS, SLACK_SECONDS
from tools.chaos.testbed import Experiment, Publisher, Queue, Testbed, ending, wait

AT_ONCE = 500
"""Messages published at a time."""
WORK_SECONDS = 0.005
FEW = 10
"""The fewest ready messages during the sweep."""
PROGRESS_SECONDS = 120
"""The time limit until another handler finishes."""


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
        msg = f"{queue.ended_count} handlers finished, not {ended_count}"
        raise Stuck(msg)


def stop(reconciliation: Reconciliation, process: Any) -> None:
    exit_code, seconds = process.stop()
    bound = GENTLE_DRAIN_SECONDS + CLOSE_SECONDS + SLACK_SECONDS
    reconciliation.endings.append(ending(process, exit_code, {0}, seconds, bound))


def stop_all(run: Experiment, running: list[Any]) -> None:
    """The end of an experiment: all processes stop gracefully, and others handle the rest."""
    for process in running:
        process.wait_for("consuming")
    for process in running:
        stop(run.reconciliation, process)
        run.stops += 1
    run.queue.rest(run.reconciliation)
    run.queue.finish(run.reconciliation, SLOTS)


class Rolling(Experiment):
    """The older of two processes is shut down and replaced, repeatedly, while they work."""

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
            stop(self.reconciliation, running.pop(0))
            running.append(start(self.queue, impatient=False))
            self.stops += 1
        stop_all(self, running)

    def text(self) -> str:
        return f"{self.restarts} restarts over {self.ids} ids\n"


class Kills(Experiment):
    """One of two processes is killed whenever a random number of messages is done: at work or during its start."""

    def __init__(self, queue: Queue, kills: int, ids: int, seed: int) -> None:
        super().__init__(queue)
        self.ids = ids
        self.reconciliation.graceful = False
        self.reconciliation.most_repeated = kills * most_unacked(queue.testbed)
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
            self.reconciliation.endings.append(
                ending(running[slot], exit_code, allowed, seconds, SLACK_SECONDS)
            )
            running[slot] = start(self.queue, impatient=True)
            self.kills += 1
        stop_all(self, running)

    def text(self) -> str:
        return "".join(f"{json.dumps({'ended': e, 'kill': slot})}\n" for e, slot in self.at)


class Failover(Experiment):
    """A cluster: the node that leads the queue is killed and later started again, repeatedly, under load.

    Half of the messages are published before the first kill, and the others meanwhile, a few at a time.
    """

    def __init__(self, queue: Queue, kills: int, ids: int) -> None:
        super().__init__(queue)
        self.ids = ids
        self.log: list[str] = []
        self.reconciliation.graceful = False
        # Both processes may lose their connection, and the settlements on it; and again when the node is back.
        # Redis replicates later: no number limits the acks that a leader answered just before it died.
        most = math.inf if queue.testbed.broker.startswith("redis") else 4 * SLOTS * CONCURRENCY
        self.reconciliation.most_repeated = kills * most
        self.at = [number * ids // 2 // (2 * kills + 1) for number in range(1, 2 * kills + 1)]

    def run(self) -> None:
        server = self.queue.testbed.server
        publish(self.queue, self.ids // 2)
        running = [start(self.queue, impatient=True) for _ in range(SLOTS)]
        publisher = Publisher(self.queue)
        for first in range(self.ids // 2, self.ids, AT_ONCE // 10):
            numbers = range(first, min(first + AT_ONCE // 10, self.ids))
            publisher.put(
                [{"id": f"work-{n}", "how": "work", "seconds": WORK_SECONDS} for n in numbers]
            )
        for kill_at, restart_at in zip(self.at[::2], self.at[1::2], strict=True):
            reach(self.queue, kill_at)
            server.kill()
            self.kills += 1
            self.log.append(json.dumps({"ended": kill_at, "killed": server.down}))
            reach(self.queue, restart_at)
            server.restart()
        publisher.finish()
        stop_all(self, running)

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.log)


def most_unacked(testbed: Testbed) -> float:
    """How many messages of one process may be redelivered: its prefetch; on Kafka what it had not committed.

    On MQTT no number limits them (docs/chaos.md).
    """
    return {"kafka": CONCURRENCY + 50, "mqtt": float("inf")}.get(testbed.broker, CONCURRENCY)


class Sweep(Experiment):
    """SIGTERM 0, 5, 10, ... milliseconds after the start of a process, until the time when it consumes."""

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
        self.queue.finish(self.reconciliation)

    def _stop_after(self, at_ms: int) -> tuple[int, str]:
        """Returns the exit code, and the violations or an empty text."""
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
    """The slowest of three starts and 10 % more, so that the sweep covers all of it."""
    slowest = 0.0
    for _ in range(3):
        began_at = time.monotonic()
        process = start(queue, impatient=False)
        process.wait_for("consuming")
        slowest = max(slowest, time.monotonic() - began_at)
        process.stop()
    return round(1000 * slowest * 1.1)


def _unacked(queue: Queue) -> Iterator[str]:
    """Violations of the rule that a consumed message is done, or in the broker again."""
    published = len(queue.published)

    def balance() -> tuple[int, int]:
        counts = queue.counts()
        return len(queue.ledger.ended), counts.ready + counts.delayed

    if not wait(lambda: sum(balance()) == published, SLACK_SECONDS):
        done, ready = balance()
        yield f"{done} done and {ready} in the broker are not {published} published"
