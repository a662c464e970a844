"""The service and other consumers on a private RabbitMQ: one process at a time, its ledger, its log and its queues."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aio_pika

from harness.process import service_environment
from harness.servers import Server, ServerMissing, server_module
from tools.benchmarks.scaling import Line, wait
from tools.benchmarks.service import SERVICE, Service, Unavailable

PREFETCH = 10
"""The prefetch of all; it is the default concurrency of the service and of taskiq, FastStream has no limit."""
EXIT_SECONDS = 60


FRAMEWORKS = "tools.benchmarks.frameworks"
_FASTSTREAM = ("-m", "faststream", "run", "--factory")
_TASKIQ = ("-m", "taskiq", "worker", f"{FRAMEWORKS}:taskiq_broker", "--workers", "1")
COMMANDS = {
    "service": (*SERVICE[1:], "run"),
    "faststream": (*_FASTSTREAM, f"{FRAMEWORKS}:faststream"),
    "faststream_none": (*_FASTSTREAM, f"{FRAMEWORKS}:faststream_none"),
    "faststream_one": (*_FASTSTREAM, f"{FRAMEWORKS}:faststream_one"),
    "taskiq": _TASKIQ,
    "taskiq_one": (*_TASKIQ, "--wait-tasks-timeout", "1"),
    "aio_pika_worker": ("-m", FRAMEWORKS, "aio_pika_worker"),
    "aio_pika_quorum": ("-m", FRAMEWORKS, "aio_pika_quorum"),
}
"""The arguments of Python that start each contender."""


@dataclass(frozen=True)
class Contender:
    title: str
    name: str
    """A key of COMMANDS."""
    settings: dict[str, object] = field(default_factory=dict, hash=False)
    """Settings of the service."""


OURS = Contender("the generated service", "service")
FASTSTREAM = Contender("FastStream", "faststream")
FASTSTREAM_NONE = Contender("FastStream, graceful_timeout=None", "faststream_none")
TASKIQ = Contender("taskiq, one worker", "taskiq")
AIO_PIKA = Contender("aio-pika's tutorial worker", "aio_pika_worker")
AIO_PIKA_QUORUM = Contender("aio-pika's tutorial worker, quorum queue", "aio_pika_quorum")


class Contest:
    """One contender with its own queue, for one measurement."""

    def __init__(self, service: Service, server: Server, contender: Contender, name: str) -> None:
        self._service = service
        self._server = server
        self.contender = contender
        taskiq = contender.name.startswith("taskiq")
        self.queue = "taskiq" if taskiq else name
        self.dead = "taskiq.dead_letter" if taskiq else f"{name}.dead"
        self._ledger = service.scratch / f"{name}.ledger"
        self._output = service.scratch / f"{name}.output"
        settings = {"concurrency": PREFETCH, "BENCH_LEDGER": self._ledger, **contender.settings}
        self._environment = {
            **service_environment(server.url, name, service.ledger, **settings),
            "PYTHONPATH": service.python_path,
        }
        self._ledger.touch()
        self._seen = 0

    @contextmanager
    def consuming(self, **variables: object) -> Iterator[subprocess.Popen[bytes]]:
        """The contender, from its first look at the queue; its remaining processes are killed at the end."""
        with self._output.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *COMMANDS[self.contender.name]],
                env=self._environment | {key: str(value) for key, value in variables.items()},
                cwd=self._service.scratch,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            ready = wait(
                lambda: process.poll() is not None or self._server.consumers(self.queue) > 0
            )
            if not ready or process.poll() is not None:
                raise RuntimeError(f"{self.contender.title}: {self._output.read_text()[-2000:]}")
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def publish(self, messages: int, per_second: float = 1e6) -> None:
        arguments = ["publish", self.contender.name, str(messages), str(per_second)]
        subprocess.run(
            [sys.executable, "-m", FRAMEWORKS, *arguments],
            env=self._environment,
            cwd=self._service.scratch,
            check=True,
        )

    def lines(self, what: str) -> list[Line]:
        fields = (line.split() for line in self._ledger.read_text().splitlines())
        return [(kind, int(number), float(at)) for kind, number, at in fields if kind == what]

    def wait_for(self, what: str, count: int) -> None:
        if not wait(lambda: len(self.lines(what)) >= count):
            found = len(self.lines(what))
            msg = f"{self.contender.title}: {found} of {count} {what}: {self._output.read_text()[-2000:]}"
            raise RuntimeError(msg)

    def wait_for_silence(self, seconds: float) -> None:
        """Wait until its handlers have begun no message for this long."""
        latest = len(self.lines("begin"))
        since = time.monotonic()
        while time.monotonic() - since < seconds:
            time.sleep(0.1)
            if (count := len(self.lines("begin"))) != latest:
                latest, since = count, time.monotonic()

    def left(self) -> int:
        counts = self._server.counts(self.queue)
        return counts.ready + counts.delayed

    def dead_lettered(self) -> int:
        return self._server.counts(self.dead).ready

    def said(self) -> list[str]:
        """The lines of its log since the last call."""
        text = self._output.read_text(errors="replace")
        new, self._seen = text[self._seen :], len(text)
        return [line for line in new.splitlines() if line.strip()]

    def stop(self, process: Any) -> tuple[float, float]:
        """Send SIGTERM to the first process alone, like an orchestrator; returns when, and the seconds it took."""
        self.said()
        sent_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(EXIT_SECONDS)
        return sent_at, time.monotonic() - sent_at


@contextmanager
def arena(scratch: Path) -> Iterator["Arena"]:
    """A private RabbitMQ. Raises Unavailable if there is none."""
    folder = scratch / "rabbitmq"
    folder.mkdir()
    service = Service(scratch / "service", "rabbitmq", "ledger_handler.py")
    try:
        with server_module("rabbitmq").private(folder) as server:
            yield Arena(service, server)
    except ServerMissing as missing:
        raise Unavailable(str(missing)) from None


class Arena:
    def __init__(self, service: Service, server: Server) -> None:
        self._service = service
        self._server = server
        self._count = 0

    def version(self) -> str:
        """The version of RabbitMQ."""

        async def ask() -> str:
            async with await aio_pika.connect(self._server.url) as connection:
                assert connection.transport is not None
                return str(connection.transport.connection.server_properties["version"])

        return asyncio.run(ask())

    @contextmanager
    def contest(self, contender: Contender) -> Iterator[Contest]:
        self._count += 1
        contest = Contest(self._service, self._server, contender, f"contest-{self._count}")
        print(f"{self._count}: {contender.title}", file=sys.stderr)
        try:
            yield contest
        finally:
            for queue in (contest.queue, contest.dead):
                self._server.delete(queue)
