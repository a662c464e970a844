"""1, 2, 4 and 8 processes on one queue: throughput, fairness, duplicates, losses, and a redelivery.

The handlers begin no message while a run's messages are published, so that all begin at one moment with a full
queue, and no publisher is measured (ledger_handler.py). One kind of handler waits, like most: so two cores can run
many processes. The other returns at once: so it shows the maximum of the broker and the cores.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmarks.figures import Figure
from tools.benchmarks.per_message import PREFETCH, SLOW_SERVERS
from tools.benchmarks.service import Queue, Service

PROCESSES = (1, 2, 4, 8)
CONCURRENCY = 10
HANDLER_SECONDS = 0.1
IN_FLIGHT = CONCURRENCY
"""In-flight messages of a process when it is killed."""
NEVER_SECONDS = 3600
WAIT_SECONDS = 60
"""The time limit for messages to be handled; a redelivery after the shortest lease is much shorter."""

BEGIN, BEGIN_NOTHING = signal.SIGUSR1, signal.SIGUSR2
"""The signals for the handlers."""

WAITING = "handlers that wait 100 ms, 10 at a time"
TRIVIAL = "handlers that do nothing, 100 at a time"
REDELIVERY = "redelivery from a process that was killed with 10 in-flight messages"

RATE = "messages per second"
LEAST = "least busy process, of an equal share"
MOST = "most busy process, of an equal share"
CPU = "CPU of the processes for each message"
TWICE = "handled twice"
LOST = "lost"
UNTIL = "until all of them are handled"

PARTITIONS = {"kafka": 4}
"""The partitions of the topics that the service's tests create."""

Line = tuple[str, int, float]
"""A handler's event, its message's number, and the time."""


@dataclass(frozen=True)
class Sizes:
    processes: tuple[int, ...]
    messages: int
    """Messages for each process that waits."""
    trivial: int
    """Messages for all processes that return at once; the stand-in for SQS gets a fraction, since it is so slow."""
    kills: int


@dataclass
class Member:
    """One process, and the ledger of its handlers."""

    process: Any
    ledger: Path
    _read_to: int = 0
    lines: list[Line] = field(default_factory=list)

    def read(self) -> list[Line]:
        with self.ledger.open("rb") as file:
            file.seek(self._read_to)
            new, end, _ = file.read().rpartition(b"\n")
        self._read_to += len(new) + len(end)
        for line in new.decode().splitlines():
            what, number, at = line.split()
            self.lines.append((what, int(number), float(at)))
        return self.lines

    def all_that(self, what: str) -> list[Line]:
        return [line for line in self.read() if line[0] == what]


class Group:
    """The processes that share a queue; it may grow."""

    def __init__(self, queue: Queue, folder: Path, **settings: object) -> None:
        self.queue = queue
        self._folder = folder
        self._settings = settings
        self.members: list[Member] = []
        self.published = 0

    def start(self, name: str = "", *, impatient: bool = False, **settings: object) -> Member:
        """Start a process, without waiting for it."""
        ledger = self._folder / f"{self.queue.name}-{len(self.members)}"
        ledger.touch()
        process = self.queue.process(
            name or str(len(self.members)),
            impatient=impatient,
            BENCH_LEDGER=ledger,
            **(self._settings | settings),
        )
        self.members.append(Member(process, ledger))
        return self.members[-1]

    def grow(self, processes: int) -> None:
        new = [self.start() for _ in range(processes - len(self.members))]
        for member in new:
            member.process.wait_for("consuming")

    def publish(self, messages: int) -> None:
        with self.queue.publishing(messages, self.published):
            self.published += messages

    def ended(self) -> list[Line]:
        return [line for member in self.members for line in member.all_that("end")]

    def wait_until_handled(self) -> None:
        """Wait until all are handled, or for too long: then the missing messages count as lost."""
        wait(lambda: len({number for _, number, _ in self.ended()}) >= self.published)

    def account(self) -> tuple[int, int]:
        """How many messages were handled twice, and how many were never handled."""
        numbers = [number for _, number, _ in self.ended()]
        return len(numbers) - len(set(numbers)), self.published - len(set(numbers))

    def stop(self) -> None:
        for member in self.members:
            member.process.send(signal.SIGTERM)
        for member in self.members:
            member.process.wait()

    def close(self) -> None:
        for member in self.members:
            member.process.close()


def measure(scratch: Path, broker: str, sizes: Sizes) -> Iterator[Figure]:
    service = Service(scratch, broker, "ledger_handler.py")
    with service.queue() as queue:
        waiting = {"concurrency": CONCURRENCY, "BENCH_HANDLER_SECONDS": HANDLER_SECONDS}
        with _group(service, queue.another("waiting"), **waiting) as group:
            for number in sizes.processes:
                yield from _measure(group, f"{broker}: {WAITING}", number, number * sizes.messages)
        idle = {"concurrency": PREFETCH, "prefetch": PREFETCH}
        trivial = sizes.trivial * 2 // 5 if broker in SLOW_SERVERS else sizes.trivial
        with _group(service, queue.another("trivial"), **idle) as group:
            for number in sizes.processes:
                yield from _measure(group, f"{broker}: {TRIVIAL}", number, trivial)
        with _group(service, queue.another("killed"), **waiting) as group:
            yield from _redelivery(group, broker, sizes.kills)


@contextmanager
def _group(service: Service, queue: Queue, **settings: object) -> Iterator[Group]:
    with queue.deleted_afterwards():
        group = Group(queue, service.scratch, **settings)
        try:
            yield group
            group.stop()
        finally:
            group.close()


def _measure(group: Group, part: str, processes: int, messages: int) -> Iterator[Figure]:
    print(f"{part}: {processes} of them, {messages:,} messages", file=sys.stderr)
    group.grow(processes)
    handled_before = [len(member.all_that("end")) for member in group.members]
    for member in group.members:
        member.process.send(BEGIN_NOTHING)
    group.publish(messages)
    cpu_before = cpu_seconds(group)
    began_at = time.monotonic()
    for member in group.members:
        member.process.send(BEGIN)
    group.wait_until_handled()
    cpu = cpu_seconds(group) - cpu_before
    handled = [
        member.all_that("end")[before:]
        for member, before in zip(group.members, handled_before, strict=True)
    ]
    shares = [len(lines) * processes / messages for lines in handled]
    twice, lost = group.account()
    name = f"{processes} process{'es' if processes > 1 else ''}: "
    seconds = max(at for lines in handled for _, _, at in lines) - began_at
    yield Figure(part, f"{name}{RATE}", [messages / seconds])
    yield Figure(part, f"{name}{LEAST}", [min(shares)])
    yield Figure(part, f"{name}{MOST}", [max(shares)])
    if cpu:
        yield Figure(part, f"{name}{CPU}", [cpu * 1e6 / messages], "µs")
    yield Figure(part, f"{name}{TWICE}", [twice], at_most=0)
    yield Figure(part, f"{name}{LOST}", [lost], at_most=0)


def _redelivery(group: Group, broker: str, kills: int) -> Iterator[Figure]:
    """One process has ten in-flight messages that it never finishes; a kill makes the broker redeliver them to the other.

    On MQTT only a process with the same name gets them, so it is started then.
    """
    print(f"{broker}: {kills} kills", file=sys.stderr)
    other = group.start("other", impatient=True)
    other.process.wait_for("consuming")
    seconds = []
    for _ in range(kills):
        victim = group.start("victim", impatient=True, BENCH_HANDLER_SECONDS=NEVER_SECONDS)
        victim.process.wait_for("consuming")
        other.process.send(BEGIN_NOTHING)  # otherwise it may have all before the victim has ten
        group.publish(4 * IN_FLIGHT)
        if not wait(partial(_has_begun, victim, IN_FLIGHT)):
            msg = f"{broker}: one process of two did not get {IN_FLIGHT} messages"
            raise RuntimeError(msg)
        in_flight = {number for _, number, _ in victim.lines}
        other.process.send(BEGIN)
        killed_at = victim.process.send(signal.SIGKILL)
        heir = group.start("victim", impatient=True) if broker == "mqtt" else None
        group.wait_until_handled()
        seconds.append(
            max(at for _, number, at in group.ended() if number in in_flight) - killed_at
        )
        if heir:
            heir.process.stop()
    twice, lost = group.account()
    part = f"{broker}: {REDELIVERY}"
    yield Figure(part, UNTIL, seconds, "s", note=group.queue.impatient_options)
    yield Figure(part, TWICE, [twice], at_most=0)
    yield Figure(part, LOST, [lost], at_most=0)


def _has_begun(member: Member, messages: int) -> bool:
    return len(member.all_that("begin")) >= messages


def cpu_seconds(group: Group) -> float:
    """The CPU time of the processes so far; 0 where the system has no /proc."""
    threads = [
        file
        for member in group.members
        for file in Path("/proc").glob(f"{member.process.pid}/task/*/schedstat")
    ]
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def wait(condition: Callable[[], bool]) -> bool:
    """Poll until the condition is true; returns whether it became true in time."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
