# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The real program on its own queue, and the checks that every shutdown must pass."""

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from runtime.brokers import make_source
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings

from .contract import opened
from .process import NOISE, SERVICE, Ledger, ServiceProcess, service_command, service_environment
from .servers import Counts, Server

AT_ONCE_SECONDS = 5.0
"""The time limit for "at once" on a loaded machine."""


class Scene:
    """One queue of one broker, the services that consume it, and the ledger of their handlers."""

    def __init__(
        self, broker: Server, queue: str, directory: Path, service: Path = SERVICE
    ) -> None:
        self.broker = broker
        self.queue = queue
        self.service = service
        self.ledger = Ledger(directory / "ledger")
        self.published: list[str] = []
        self.processes: list[ServiceProcess] = []
        asyncio.run(broker.introduce_consumer(self.settings))

    @property
    def settings(self) -> ConsumerSettings:
        return ConsumerSettings.model_validate(
            {"broker_url": self.broker.url, "source": self.queue}
        )

    def publish(self, count: int = 1, kind: str = "work", **task: Any) -> list[str]:
        """Publish this many tasks for the test service; returns their ids."""
        first = len(self.published)
        ids = [f"task-{number}" for number in range(first, first + count)]
        self.publish_bodies([json.dumps({"id": i, **task}).encode() for i in ids], kind)
        self.published += ids
        return ids

    def publish_bodies(self, bodies: list[bytes], kind: str = "work") -> None:
        async def publish() -> None:
            async with opened(make_source(self.settings)) as source:
                await source.publish([OutgoingMessage(body, kind) for body in bodies])

        asyncio.run(publish())

    def start(
        self, *, consuming: bool = True, url: str = "", **variables: object
    ) -> ServiceProcess:
        """Start a service on this queue, and wait until it consumes."""
        url = url or self.broker.url
        environment = service_environment(url, self.queue, self.ledger, **variables)
        process = ServiceProcess(service_command("run", service=self.service), environment)
        self.processes.append(process)
        if consuming:
            process.wait_for("consuming")
        return process

    def assert_left(self, ready: int = 0, delayed: int = 0, dead: int = 0) -> None:
        """Wait until this many messages are in the broker.

        A quorum queue of RabbitMQ counts the messages that are on the disk, which may be slow.
        """
        expected, give_up_at = Counts(ready, delayed, dead), time.monotonic() + AT_ONCE_SECONDS
        while (counts := self.broker.counts(self.queue)) != expected:
            assert time.monotonic() < give_up_at, f"{counts} did not become {expected}"
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.close()


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited state did not come"
        time.sleep(0.05)


def has_ended(scene: Scene, count: int) -> bool:
    """Whether this many different messages have been handled."""
    return len(set(scene.ledger.ended)) >= count


def is_empty(scene: Scene) -> bool:
    """Whether no delivery will follow: a dead consumer's unacked messages are redelivered later."""
    counts = scene.broker.counts(scene.queue)
    return counts == Counts(0, 0, 0) and counts.held == 0


def assert_clean_shutdown(
    process: ServiceProcess, signum: signal.Signals = signal.SIGTERM
) -> float:
    """Shut the service down; returns the seconds it took. Exit code 0, and no output on standard error."""
    exit_code, seconds = process.stop(signum)
    assert exit_code == 0, process.events
    assert_quiet(process)
    assert "stopped" in [e["event"] for e in process.events[-2:]]  # or before a warning
    return seconds


def assert_quiet(process: ServiceProcess) -> None:
    assert process.stderr == ""
    assert not [e for e in process.events if any(n in json.dumps(e) for n in NOISE)]
