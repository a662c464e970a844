# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Runs a service as a child process, and reads its log events as they arrive."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import harness
import runtime

Event = dict[str, Any]

WAIT_SECONDS = 30
"""The time limit for an expected event; far more than an idle machine needs."""

SERVICE = Path(__file__).with_name("service.py")
IMPORTED_FROM = [str(Path(package.__path__[0]).parent) for package in (runtime, harness)]
"""The folders that have the packages of the runtime and of these tests."""

NOISE = ("Traceback", "never retrieved", "never awaited", "was destroyed", "Unclosed", "Warning")


class ServiceProcess:
    """A child process whose standard output is one JSON event a line."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()
        directory = Path(environment["LEDGER"]).parent
        self._errors = directory / f"errors-{uuid.uuid4().hex}"
        with self._errors.open("ab") as errors:
            self.child = subprocess.Popen(
                command,
                env=environment,
                cwd=directory,  # a folder without a developer's .env
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.pid = self.child.pid
        self._reader = threading.Thread(target=self._read_events, daemon=True)
        self._reader.start()

    def _read_events(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "not_json", "line": line}
            with self._changed:
                self.events.append(event)
                self._changed.notify_all()

    def find(self, event: str, **fields: object) -> list[Event]:
        wanted = {"event": event, **fields}
        return [e for e in self.events if wanted.items() <= e.items()]

    def wait_for(self, event: str, count: int = 1, **fields: object) -> Event:
        """Wait until ``count`` such events have arrived; returns the last one."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self._changed:
            while len(found := self.find(event, **fields)) < count:
                seconds = deadline - time.monotonic()
                may_come = seconds > 0 and self._reader.is_alive()
                assert may_come, f"no {event} {fields} in {self.events}\n{self.stderr}"
                self._changed.wait(min(seconds, 1))
        return found[count - 1]

    def send(self, signum: signal.Signals) -> float:
        """Send a signal; returns its time.monotonic()."""
        self.child.send_signal(signum)
        return time.monotonic()

    def wait(self) -> int:
        """The exit code; negative for a signal that killed it."""
        exit_code = self.child.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        return exit_code

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Send the signal and wait; returns the exit code and the seconds it took."""
        sent_at = self.send(signum)
        exit_code = self.wait()
        return exit_code, time.monotonic() - sent_at

    @property
    def stderr(self) -> str:
        return self._errors.read_text()

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        self._reader.join(WAIT_SECONDS)
        assert self.child.stdout is not None
        self.child.stdout.close()


def ask(port: int, path: str, seconds: float = 10, accept: str = "") -> tuple[int, str]:
    """The answer of the probe port: the HTTP status, and the text. Raises OSError if there is none."""
    connection = HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("GET", path, headers={"Accept": accept} if accept else {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


class Ledger:
    """The calls of the handlers of all processes, from the file that the handlers append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def ids(self, what: str) -> list[str]:
        lines = (line.split() for line in self.path.read_text().splitlines())
        return [line[1] for line in lines if line[0] == what]

    @property
    def started(self) -> list[str]:
        return self.ids("start")

    @property
    def ended(self) -> list[str]:
        return self.ids("end")


def service_command(*arguments: str, service: Path = SERVICE) -> list[str]:
    """The command of the test service, with the strictest settings of the interpreter."""
    return [sys.executable, "-P", "-X", "dev", "-W", "error", str(service), *arguments]


def service_environment(
    url: str, queue: str, ledger: Ledger, **variables: object
) -> dict[str, str]:
    """The variables of one service process; ``drain_seconds=1`` becomes CONSUMER_DRAIN_SECONDS."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CONSUMER_", "OTEL_"))}
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)  # each start would compile again
    inherited["PYTHONMALLOC"] = "default"  # -X dev checks each allocation in C: slow
    path = [*IMPORTED_FROM, *filter(None, [inherited.get("PYTHONPATH")])]
    consumer = {f"CONSUMER_{k.upper()}": str(v) for k, v in variables.items() if k.islower()}
    others = {k: str(v) for k, v in variables.items() if k.isupper()}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(path),
        "CONSUMER_BROKER_URL": url,
        "CONSUMER_SOURCE": queue,
        "CONSUMER_GROUP": queue,  # like the command line's default
        "CONSUMER_CONNECT_SECONDS": "30",
        "LEDGER": str(ledger.path),
        **consumer,
        **others,
    }
