"""A rendered service on a private broker: what the suite publishes to, starts, disturbs and counts.

The servers, the proxy and the processes are those of the service's own tests, so they are imported from it;
a process can do that for one service only.
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
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import structlog
from account import Account, Ending

from scaffold import scaffold

HERE = Path(__file__).resolve().parent
SERVICE = [sys.executable, "-P", "-X", "dev", "-W", "error", str(HERE / "service.py"), "run"]
ANSWERS = ["project_slug=order-events", "deploy=none", "ci=none", "telemetry=none"]
DISK_MIB = 24
PROXIES = {"mqtt": 1}
"""Where there are not two: a client's name is locked for the address that it connects to."""
SETTLE_SECONDS = 60
"""How long the broker has, after a round, to show what it has and to hand it out."""
MOST_DEAD = 100_000
FINISHES = 3
"""What is in hand when the last process stops waits for another one; it must not wait for ever."""


def lacking() -> list[str]:
    """What a server that stands in for the broker cannot do."""
    return os.environ.get("CONSUMER_TEST_BROKER_LACKS", "").split(",")


class Unavailable(Exception):
    """This broker is not to be had here; the text says why."""


class Rig:
    """One broker, its service, the network between them, and the disk below."""

    def __init__(self, broker: str, scratch: Path, running: ExitStack) -> None:
        self.broker = broker
        self.scratch = scratch
        project = scaffold(scratch, f"broker={broker}", *ANSWERS)
        sys.path += [str(project), str(project / "src")]
        # The runtime in this process only publishes and counts, and is to be silent about outages.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        logging.disable(logging.CRITICAL)
        self.process = import_module("tests.runtime.process")
        self.contract = import_module("tests.runtime.test_contract")
        self.runtime = import_module("order_events.runtime.brokers")
        self.source = import_module("order_events.runtime.brokers.source")
        self.message = import_module("order_events.runtime.message")
        self.settings = import_module("order_events.runtime.settings")
        servers = import_module("tests.runtime.servers")
        self.module = servers.server_module(broker)
        embedded = not hasattr(self.module, "private")
        self.may_be_killed = not embedded and "restart" not in lacking()
        start = self.module.private if self.may_be_killed else self.module.shared
        self.disk = Disk(scratch / "server", running, small=embedded)
        try:
            self.server = running.enter_context(start(self.disk.folder))
        except servers.ServerMissing as missing:
            raise Unavailable(str(missing)) from None
        self.proxies: list[Any] = []
        if not embedded:
            proxy = import_module("tests.runtime.servers.proxy").Proxy
            proxy = getattr(self.module, "KafkaProxy", proxy)
            number = PROXIES.get(broker, 2)
            self.proxies = [running.enter_context(proxy(self.server.url)) for _ in range(number)]
        self._names = count()

    @property
    def abilities(self) -> set[str]:
        can = {
            "proxy": bool(self.proxies),
            "broker_kill": self.may_be_killed,
            "disk_full": self.disk.can_be_full,
        }
        return {ability for ability, is_there in can.items() if is_there}

    def proxy(self, number: int) -> Any:
        return self.proxies[number % len(self.proxies)]

    def queue(self) -> "Queue":
        folder = self.scratch / f"run-{next(self._names)}"
        folder.mkdir()
        return Queue(self, f"chaos-{os.getpid()}-{folder.name}", folder)


class Disk:
    """The broker's folder; a small one is a file system of its own, where root can mount one."""

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


class Queue:
    """One queue, what was published to it, and what came of it."""

    def __init__(self, rig: Rig, name: str, folder: Path) -> None:
        self.rig = rig
        self.name = name
        self.folder = folder
        (folder / "marks").mkdir()
        self.ledger = rig.process.Ledger(folder / "ledger")
        self.published: dict[str, bool] = {}
        """Each id that the broker has confirmed, and whether its handler does it sooner or later."""
        self.unconfirmed: set[str] = set()
        self.processes: list[Any] = []
        self._read_to = 0
        self._ended = 0
        self.settings = rig.settings.ConsumerSettings.model_validate(
            {
                "broker_url": rig.server.url,
                "source": name,
                "group": name,
                "retry_seconds": 0.1,
                "retry_max_seconds": 0.4,
            }
        )
        asyncio.run(rig.contract.start_once(self.settings))

    def start(self, *, impatient: bool, proxy: int | None = None, **variables: object) -> Any:
        """A process on this queue, by way of this proxy; not waited for."""
        url = self.rig.server.impatient_url if impatient else self.rig.server.url
        if proxy is not None and self.rig.proxies:
            chosen = self.rig.proxy(proxy)
            url = url.replace(self.rig.server.url.partition("?")[0], chosen.url.partition("?")[0])
        # One machine, one clock; the consumers of a server may be anywhere.
        clock = self.folder / (f"clock-{len(self.processes)}" if self.rig.proxies else "clock")
        if not clock.exists():
            clock.write_text("0")
        environment = self.rig.process.service_environment(
            url,
            self.name,
            self.ledger,
            MARKS=self.folder / "marks",
            CLOCK=clock,
            **{"concurrency": 4, "retry_seconds": 0.1, "retry_max_seconds": 0.4} | variables,
        )
        process = self.rig.process.ServiceProcess(SERVICE, environment)
        process.clock = clock
        process.noise = self.rig.process.NOISE
        process.name = f"process {len(self.processes)}"
        self.processes.append(process)
        return process

    def publish(self, tasks: Iterable[dict[str, Any]]) -> None:
        """Publish once; what the broker did not confirm is noted, and not sent again."""
        tasks = list(tasks)
        good = {task["id"]: task["how"] not in ("fail", "reject") for task in tasks}
        messages = [
            self.rig.message.OutgoingMessage(json.dumps(task).encode(), "task", task["id"])
            for task in tasks
        ]
        asyncio.run(self._publish(messages, good))

    async def _publish(self, messages: list[Any], good: dict[str, bool]) -> None:
        sent = False
        while not sent:
            try:
                async with self.rig.runtime.make_source(self.settings) as source:
                    sent = True
                    await source.publish(messages)
                    self.published |= good
            except self.rig.source.BrokerError:
                if sent and not good.keys() <= self.published.keys():
                    self.unconfirmed |= good.keys()
                await asyncio.sleep(0.2)  # it is away: ask again

    @property
    def ended_count(self) -> int:
        """How often a handler came to its end, so far; reads only what is new."""
        with self.ledger.path.open("rb") as file:
            file.seek(self._read_to)
            new, _, _ = file.read().rpartition(b"\n")
        self._read_to += len(new) + bool(new)
        self._ended += sum(line.startswith(b"end ") for line in new.split(b"\n"))
        return self._ended

    def counts(self) -> Any:
        return self.rig.server.counts(self.name)

    def rest(self, account: Account) -> None:
        """When all processes are gone: note what is done and what the broker has."""
        expected = len(self.published)

        def found() -> int:
            counts = self.counts()
            account.done_at_rest = len(set(self.ledger.ended) & self.published.keys())
            account.at_rest = counts.ready + counts.delayed + counts.dead
            return account.done_at_rest + account.at_rest

        wait(lambda: found() >= expected)

    def finish(self, account: Account, processes: int = 1) -> None:
        """Have healthy processes handle what is left, and fill in the rest of the account."""
        for clock in self.folder.glob("clock*"):
            clock.write_text("0")
        for _ in range(FINISHES):
            self._finish(account, processes)
            counts = self.counts()
            account.left = counts.ready + counts.delayed
            if not account.left:  # else one of them had it, and gave it back
                break
        account.dead_count = counts.dead
        account.dead = asyncio.run(self._dead())
        self.close_account(account)

    def close_account(self, account: Account) -> None:
        account.published, account.unconfirmed = self.published, self.unconfirmed
        account.ended = self.ledger.ended

    def _finish(self, account: Account, processes: int) -> None:
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
            account.endings.append(ending(process, exit_code, {0}, seconds, 35))

    async def _dead(self) -> list[str] | None:
        async with self.rig.runtime.make_source(self.settings) as source:
            if not source.capabilities.dead_letters:
                return None
            return [letter.id async for letter in source.dead_letters(MOST_DEAD)]

    def close(self) -> None:
        for process in self.processes:
            process.close()

    def keep(self, folder: Path) -> None:
        """Write what the processes said, and the ledger, for whoever looks into a failure."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ledger").write_bytes(self.ledger.path.read_bytes())
        for process in self.processes:
            lines = [json.dumps(event) for event in process.events] + [process.stderr]
            (folder / f"{process.name.replace(' ', '-')}.jsonl").write_text("\n".join(lines))


class Run(ABC):
    """Something that is done to a queue, and what came of it."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.account = Account()
        self.stops = self.kills = 0
        self.violations: list[str] = []
        """What is wrong, beside the account."""

    @abstractmethod
    def run(self) -> None: ...

    @abstractmethod
    def text(self) -> str:
        """What was done, for whoever wants to know."""


class Publisher(threading.Thread):
    """Publishes beside what else happens, each batch after the other."""

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
        """Wait until all is published. Raises what went wrong."""
        self._batches.put(None)
        self.join(SETTLE_SECONDS)
        if self.failure is not None:
            raise self.failure


@contextmanager
def rig(broker: str) -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, ExitStack() as running:
        yield Rig(broker, Path(scratch), running)


def ending(
    process: Any, exit_code: int, allowed: Iterable[int], seconds: float, bound_seconds: float
) -> Ending:
    return Ending(
        process.name,
        exit_code,
        frozenset(allowed),
        seconds,
        bound_seconds,
        process.stderr,
        tuple(process.events),
        process.noise,
    )


def wait(condition: Callable[[], bool], seconds: float = SETTLE_SECONDS) -> bool:
    """Look until it is so; returns whether it came to be."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
