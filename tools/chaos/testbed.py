"""A service on a private broker: an experiment publishes to it, starts it, disturbs it and counts.

Servers, proxy and processes are those of every service's own tests; the runtime runs in place.
"""

import asyncio
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import structlog

from harness.process import NOISE, Ledger, ServiceProcess, service_environment
from harness.servers import Counts, ServerMissing, server_module
from harness.servers.proxy import proxy_type
from runtime.brokers import make_source
from runtime.errors import BrokerError, BrokerUnavailable
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings
from tools.chaos.clusters import CLUSTERS, patiently
from tools.chaos.reconciliation import Ending, Reconciliation

SERVICE = [sys.executable, "-X", "dev", "-W", "error", "-m", "tools.chaos.service", "run"]
DISK_MIB = 24
SLOW_BYTES = 64
"""The bytes that a throttled connection passes on at a time."""
PROXIES = {"mqtt": 1}
"""Fewer than two: a client's name is locked for its address."""
SETTLE_SECONDS = 60
"""The time limit for the broker, after a round, to show all of its messages and to deliver them."""
MOST_DEAD = 100_000
FINISHES = 3
"""Messages in flight when the last process stops wait for another process; it must not wait forever."""


class Unavailable(Exception):
    """There is no server of this broker here; the text says why."""


class Testbed:
    """One broker, the network to it, and its disk."""

    def __init__(
        self, broker: str, scratch: Path, running: ExitStack, *, cluster: bool = False
    ) -> None:
        self.broker = broker
        self.scratch = scratch
        # The runtime in this process only publishes and counts, and must not log outages.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        logging.disable(logging.CRITICAL)
        module: Any = server_module(broker.partition("-")[0])
        embedded = not hasattr(module, "private")
        start = module.shared if embedded else module.private
        if cluster:
            start = CLUSTERS[broker]
        self.disk = Disk(scratch / "server", running, small=embedded)
        try:
            self.server = running.enter_context(start(self.disk.folder))
        except ServerMissing as missing:
            raise Unavailable(str(missing)) from None
        self.proxies: list[Any] = []
        if not embedded and not cluster:
            proxy = type("ThrottledProxy", (Throttled, proxy_type(self.server.url)), {})
            number = PROXIES.get(broker, 2)
            self.proxies = [running.enter_context(proxy(self.server.url)) for _ in range(number)]
        self._names = count()

    @property
    def abilities(self) -> set[str]:
        can = {
            "proxy": bool(self.proxies),
            "broker_kill": bool(self.proxies),
            "disk_full": self.disk.can_be_full,
        }
        return {ability for ability, is_there in can.items() if is_there}

    def proxy(self, number: int) -> Any:
        return self.proxies[number % len(self.proxies)]

    def queue(self) -> "Queue":
        folder = self.scratch / f"run-{next(self._names)}"
        folder.mkdir()
        return Queue(self, f"chaos-{os.getpid()}-{folder.name}", folder)


class Throttled:
    """Mixed into a proxy: its connections may be slow."""

    bytes_per_second: float | None = None
    """The bytes of each connection per second, each way, while this is set."""

    async def _pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        while data:
            rate = self.bytes_per_second
            size = len(data) if rate is None else SLOW_BYTES
            writer.write(data[:size])
            await writer.drain()
            data = data[size:]
            if rate is not None:
                await asyncio.sleep(size / rate)


class Disk:
    """The broker's folder; a small one is a file system of its own, if this process may mount one."""

    def __init__(self, folder: Path, running: ExitStack, *, small: bool) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(folder)]
        self.can_be_full = False
        if small and sys.platform == "linux" and os.geteuid() == 0:
            self.can_be_full = subprocess.run(mount, capture_output=True).returncode == 0
        if self.can_be_full:
            running.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)

    def fill(self) -> None:
        with (self.folder / "filling").open("wb", buffering=0) as file, suppress(OSError):
            for size in (1 << 16, 1 << 12, 1):
                with suppress(OSError):
                    while file.write(b"\0" * size) == size:
                        pass

    def free(self) -> None:
        (self.folder / "filling").unlink(missing_ok=True)


class Process(ServiceProcess):
    """A service process with its own name and clock, which may be wrong."""

    def __init__(self, name: str, clock: Path, environment: dict[str, str]) -> None:
        super().__init__(SERVICE, environment)
        self.name = name
        self.clock = clock


class Queue:
    """One queue, the messages published to it, and their outcome."""

    def __init__(self, testbed: Testbed, name: str, folder: Path) -> None:
        self.testbed = testbed
        self.name = name
        self.folder = folder
        (folder / "marks").mkdir()
        self.ledger = Ledger(folder / "ledger")
        self.published: dict[str, bool] = {}
        """Each id that the broker has confirmed, and whether its handler succeeds sooner or later."""
        self.unconfirmed: set[str] = set()
        self.processes: list[Process] = []
        self._read_to = 0
        self._ended = 0
        self.settings = ConsumerSettings.model_validate(
            {
                "broker_url": testbed.server.url,
                "source": name,
                "group": name,
                "retry_seconds": 0.1,
                "retry_max_seconds": 0.4,
            }
        )
        asyncio.run(testbed.server.introduce_consumer(self.settings))

    def start(self, *, impatient: bool, proxy: int | None = None, **variables: object) -> Process:
        """Start a process on this queue, through this proxy; does not wait for it."""
        url = self.testbed.server.impatient_url if impatient else self.testbed.server.url
        if proxy is not None and self.testbed.proxies:
            chosen = self.testbed.proxy(proxy)
            url = url.replace(
                self.testbed.server.url.partition("?")[0], chosen.url.partition("?")[0]
            )
        # The consumers on one machine have one clock; those of a server may be anywhere.
        clock = self.folder / (f"clock-{len(self.processes)}" if self.testbed.proxies else "clock")
        if not clock.exists():
            clock.write_text("0")
        environment = service_environment(
            url,
            self.name,
            self.ledger,
            MARKS=self.folder / "marks",
            CLOCK=clock,
            # Planned failures fail by themselves, so no pause would help.
            **{
                "concurrency": 4,
                "retry_seconds": 0.1,
                "retry_max_seconds": 0.4,
                "breaker_failures": 0,
            }
            | variables,
        )
        process = Process(f"process {len(self.processes)}", clock, environment)
        self.processes.append(process)
        return process

    def publish(self, tasks: Iterable[dict[str, Any]]) -> None:
        """Publish once; unconfirmed messages are recorded and not published again."""
        tasks = list(tasks)
        good = {task["id"]: task["how"] not in ("fail", "reject") for task in tasks}
        messages = [
            OutgoingMessage(json.dumps(task).encode(), "task", task["id"]) for task in tasks
        ]
        asyncio.run(self._publish(messages, good))

    async def _publish(self, messages: list[OutgoingMessage], good: dict[str, bool]) -> None:
        sent = False
        while not sent:
            try:
                async with make_source(self.settings) as source:
                    await source.declare()
                    sent = True
                    await source.publish(messages)
                    self.published |= good
            except BrokerError:
                if sent and not good.keys() <= self.published.keys():
                    self.unconfirmed |= good.keys()
                await asyncio.sleep(0.2)  # an outage: try again

    @property
    def ended_count(self) -> int:
        """How often a handler has finished so far; reads only the new lines of the ledger."""
        with self.ledger.path.open("rb") as file:
            file.seek(self._read_to)
            new, _, _ = file.read().rpartition(b"\n")
        self._read_to += len(new) + bool(new)
        self._ended += sum(line.startswith(b"end ") for line in new.split(b"\n"))
        return self._ended

    def counts(self) -> Counts:
        counts: Counts = self.testbed.server.counts(self.name)
        return counts

    def rest(self, reconciliation: Reconciliation) -> None:
        """When all processes have ended: record what is done and what the broker has."""
        expected = len(self.published)

        def found() -> int:
            counts = self.counts()
            reconciliation.done_at_rest = len(set(self.ledger.ended) & self.published.keys())
            reconciliation.at_rest = counts.ready + counts.delayed + counts.dead
            return reconciliation.done_at_rest + reconciliation.at_rest

        wait(lambda: found() >= expected)

    def finish(self, reconciliation: Reconciliation, processes: int = 1) -> None:
        """Have healthy processes handle the rest, and fill in the reconciliation."""
        for clock in self.folder.glob("clock*"):
            clock.write_text("0")
        for _ in range(FINISHES):
            self._finish(reconciliation, processes)
            counts = self.counts()
            reconciliation.left = counts.ready + counts.delayed
            if not reconciliation.left:  # otherwise one of them had it, and requeued it
                break
        reconciliation.dead_count = counts.dead
        reconciliation.dead = patiently(
            f"dead letters of {self.name}", lambda: asyncio.run(self._dead()), (BrokerUnavailable,)
        )
        self.fill_in(reconciliation)

    def fill_in(self, reconciliation: Reconciliation) -> None:
        reconciliation.published, reconciliation.unconfirmed = self.published, self.unconfirmed
        reconciliation.ended = self.ledger.ended

    def _finish(self, reconciliation: Reconciliation, processes: int) -> None:
        good = {i for i, is_good in self.published.items() if is_good}
        hopeless = len(self.published) - len(good)
        finishing = [
            self.start(impatient=True, concurrency=10, drain_seconds=20, WELL=1)
            for _ in range(processes)
        ]

        def all_done() -> bool:
            if not good <= set(self.ledger.ended):
                return False
            counts = self.counts()
            return bool(counts.ready + counts.delayed == 0 and counts.dead >= hopeless)

        wait(all_done)
        for process in finishing:
            process.wait_for("consuming")
        for process in finishing:
            exit_code, seconds = process.stop()
            reconciliation.endings.append(ending(process, exit_code, {0}, seconds, 35))

    async def _dead(self) -> list[str] | None:
        async with make_source(self.settings) as source:
            if not source.capabilities.dead_letters:
                return None
            return [letter.id async for letter in source.dead_letters(MOST_DEAD)]

    def close(self) -> None:
        for process in self.processes:
            process.close()

    def keep(self, folder: Path) -> None:
        """Write the log of each process and the ledger, to investigate a failure."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ledger").write_bytes(self.ledger.path.read_bytes())
        for process in self.processes:
            lines = [json.dumps(event) for event in process.events] + [process.stderr]
            (folder / f"{process.name.replace(' ', '-')}.jsonl").write_text("\n".join(lines))


class Experiment(ABC):
    """The faults of the processes of a queue, and the reconciliation of its messages."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.reconciliation = Reconciliation()
        self.stops = self.kills = 0
        self.violations: list[str] = []
        """Violations in addition to the counts."""

    @abstractmethod
    def run(self) -> None: ...

    @abstractmethod
    def text(self) -> str:
        """The steps, for the log of the experiment."""


class Publisher(threading.Thread):
    """Publishes one batch after the other, in a thread."""

    def __init__(self, to: Queue) -> None:
        super().__init__(daemon=True)
        self._queue = to
        self._batches: queue.SimpleQueue[list[dict[str, Any]] | None] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self.start()

    def put(self, tasks: list[dict[str, Any]]) -> None:
        self._batches.put(tasks)

    def run(self) -> None:
        try:
            while (tasks := self._batches.get()) is not None:
                self._queue.publish(tasks)
        except BaseException as failure:
            self.failure = failure

    def finish(self) -> None:
        """Wait until all is published. Raises its failure."""
        self._batches.put(None)
        self.join(SETTLE_SECONDS)
        if self.failure is not None:
            raise self.failure


@contextmanager
def testbed(broker: str, *, cluster: bool) -> Iterator[Testbed]:
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, ExitStack() as running:
        yield Testbed(broker, Path(scratch), running, cluster=cluster)


def ending(
    process: Process, exit_code: int, allowed: Iterable[int], seconds: float, bound_seconds: float
) -> Ending:
    return Ending(
        process.name,
        exit_code,
        frozenset(allowed),
        seconds,
        bound_seconds,
        process.stderr,
        tuple(process.events),
        NOISE,
    )


def wait(condition: Callable[[], bool], seconds: float = SETTLE_SECONDS) -> bool:
    """Wait until the condition is true; returns whether it became true in this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
