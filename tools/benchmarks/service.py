"""A real generated service for the benchmarks, with its own queue on each broker."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness.process import Ledger, ServiceProcess, service_environment
from harness.servers import Server, ServerMissing, server_module
from harness.servers.kafka import IMPATIENT
from runtime.brokers import make_source
from runtime.settings import ConsumerSettings
from tools import ROOT
from tools.kafka import variables_for
from tools.scaffold import scaffold

HERE = Path(__file__).resolve().parent
SERVICE = [sys.executable, "-m", "order_events"]
BODY_BYTES = 200
PROGRAM_SECONDS = 3600
"""The longest time of a benchmark's program."""


class Unavailable(Exception):
    """A measurement is not possible here; the text says why."""


class Service:
    """A service of one broker, rendered into an empty folder, with the handler in the file of this name.

    It is not installed: this interpreter runs it, and has its dependencies.
    """

    def __init__(
        self, scratch: Path, broker: str, handler: str = "handler.py", template: Path = ROOT
    ) -> None:
        self.scratch = scratch
        self.broker = broker
        text = (HERE / handler).read_text(encoding="utf-8")
        project = scaffold(
            scratch, f"broker={broker}", "handler_stub=raw", handler=text, template=template
        )
        # The handler imports the stopwatch from here.
        self.python_path = os.pathsep.join(map(str, (project / "src", ROOT)))
        self.ledger = Ledger(scratch / "ledger")

    @contextmanager
    def queue(self) -> Iterator["Queue"]:
        """A queue that is deleted afterwards. Raises Unavailable, with the reason, if there is no broker."""
        folder = self.scratch / "server"
        folder.mkdir(exist_ok=True)
        try:
            with (
                patch.dict(os.environ, variables_for(self.broker)),
                server_module(self.broker).shared(folder) as server,
                Queue(
                    self, server, f"ccc-bench-{self.scratch.name}-{os.getpid()}"
                ).deleted_afterwards() as queue,
            ):
                yield queue
        except ServerMissing as missing:
            raise Unavailable(str(missing)) from None


class Queue:
    """Publishes to one queue and consumes from it, in child processes."""

    def __init__(self, service: Service, server: Server, name: str) -> None:
        self.name = name
        self._service = service
        self._server = server
        # A client gets the messages that another client has left only under the same name.
        self._url = (
            f"{server.url}?client_id={self.name}" if service.broker == "mqtt" else server.url
        )
        self._output = service.scratch / "output"

    @contextmanager
    def deleted_afterwards(self) -> Iterator["Queue"]:
        try:
            yield self
        finally:
            self._server.delete(self.name)

    def another(self, name: str) -> "Queue":
        """One more queue of the same broker."""
        return Queue(self._service, self._server, f"{self.name}-{name}")

    def begin(self) -> None:
        """Let a consumer start and stop: some brokers retain messages only for a consumer that they know.

        This happens each time, since another consumer of the benchmark may have ended the session.
        """
        settings = ConsumerSettings.model_validate({"broker_url": self._url, "source": self.name})
        source = make_source(settings)

        async def start_and_stop() -> None:
            async with source:
                await source.declare()
                await source.start()
                await source.stop()

        if not source.capabilities.retains_before_first_consumer:
            asyncio.run(start_and_stop())

    @contextmanager
    def publishing(self, messages: int, first: int = 0) -> Iterator[None]:
        """Run ``order-events publish -`` with this many messages of 200 bytes; it ends before the block does."""
        lines = self._service.scratch / f"{first}-{messages}.jsonl"
        if not lines.exists():
            numbers = range(first, first + messages)
            with lines.open("w", encoding="ascii") as file:
                file.writelines(f'"{number:0>{BODY_BYTES - 2}}"\n' for number in numbers)
        environment = self._environment(messages)
        with (
            lines.open("rb") as stdin,
            self._running([*SERVICE, "publish", "-"], environment, stdin),
        ):
            yield

    def consume(
        self, messages: int, command: list[str] | None = None, **settings: object
    ) -> dict[str, Any]:
        """Run a consumer, by default the service, until it has had all messages; returns its stopwatch's report.

        Raises RuntimeError if the broker still has some of them.
        """
        report = self._service.scratch / "report.json"
        report.unlink(missing_ok=True)
        environment = self._environment(messages, BENCH_REPORT=report, **settings)
        with self._running(command or [*SERVICE, "run"], environment):
            pass
        if left := self._server.counts(self.name).ready:
            msg = f"{left} of {messages} messages were not acknowledged"
            raise RuntimeError(msg)
        reported: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return reported

    def clear(self) -> None:
        self._server.delete(self.name)

    def start(self, **settings: object) -> subprocess.Popen[str]:
        """Start the service; its standard output has its log events, as JSON lines."""
        return subprocess.Popen(
            [*SERVICE, "run"],
            env=self._environment(0, **settings),
            cwd=self._service.scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def process(self, name: str, *, impatient: bool = False, **settings: object) -> ServiceProcess:
        """A service on the queue, beside others, with readable log events.

        The messages of an impatient service are redelivered to others as soon as the broker allows.
        """
        url = self._server.impatient_url if impatient else self._server.url
        if self._service.broker == "mqtt":
            url += f"?client_id={self.name}-{name}"
        if self._service.broker == "kafka" and not impatient:  # the tests' URL is always impatient
            url = url.replace(f"&{IMPATIENT}", "")
        return ServiceProcess([*SERVICE, "run"], self._environment_of(url, **settings))

    @property
    def impatient_options(self) -> str:
        """The options of the URL that redeliver the messages of a dead consumer soon."""
        if self._service.broker == "kafka":
            return IMPATIENT
        return self._server.impatient_url.removeprefix(self._server.url).lstrip("?&")

    def _environment(self, messages: int, **settings: object) -> dict[str, str]:
        return self._environment_of(self._url, BENCH_MESSAGES=messages, **settings)

    def _environment_of(self, url: str, **settings: object) -> dict[str, str]:
        ledger = self._service.ledger
        environment = service_environment(url, self.name, ledger, **settings)
        return {**environment, "PYTHONPATH": self._service.python_path}

    @contextmanager
    def _running(
        self, command: list[str], environment: dict[str, str], stdin: Any = subprocess.DEVNULL
    ) -> Iterator[None]:
        """Run a program during the block and to its end. Raises RuntimeError if it fails."""
        with self._output.open("ab") as output:
            program = subprocess.Popen(
                command,
                env=environment,
                cwd=self._service.scratch,
                stdin=stdin,
                stdout=output,
                stderr=output,
            )
        try:
            yield
            exit_code = program.wait(PROGRAM_SECONDS)
        finally:
            program.kill()
            program.wait()
        if exit_code != 0:
            last_words = self._output.read_text(encoding="utf-8", errors="replace")[-2000:]
            msg = f"{' '.join(command)} ended with {exit_code}: {last_words}"
            raise RuntimeError(msg)
