# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Real brokers for the tests, with one module for each. The tests run on every broker with a module in this folder.

Each module has ``shared(directory)``, a context manager with a `Server` that all tests may use at once, each with its
own queue. A broker that is a program on the network also has ``private(directory)``, a context manager with a
`PrivateServer` that a test may kill and restart, and ``most_repeated(prefetch)``: how many messages that were handled
may be redelivered after that. Both raise `ServerMissing` where no server is available.
"""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from runtime.settings import ConsumerSettings

    from .local import ServerProcess


class ServerMissing(Exception):
    """No server of this broker is available here; the text names the servers that were tried."""


@dataclass(frozen=True)
class Counts:
    """The broker's own counts of one queue, read without the runtime."""

    ready: int
    """Ready to be delivered, or unacked by no live consumer."""
    delayed: int
    """Waiting for a retry delay to pass."""
    dead: int
    held: int = field(default=0, compare=False)
    """Leased by a consumer, which may be dead; 0 if the end of a connection requeues its messages at once."""


class Server(ABC):
    """One server, and the broker's own counts of a queue."""

    url: str
    """The URL for CONSUMER_BROKER_URL."""
    lease_option = ""
    """The option of the URL with the shortest time after which the messages of a dead consumer are redelivered."""

    @property
    def impatient_url(self) -> str:
        separator = "&" if "?" in self.url else "?"
        return f"{self.url}{separator}{self.lease_option}" if self.lease_option else self.url

    async def introduce_consumer(self, settings: "ConsumerSettings") -> None:
        """Start this consumer once, if the broker retains messages only for a consumer that it has seen."""
        return

    @abstractmethod
    def counts(self, queue: str) -> Counts:
        """Counts of messages; a message in flight at a live consumer may be missing from all of them."""

    @abstractmethod
    def consumers(self, queue: str) -> int:
        """How many consumers the broker sees on the queue; -1 if the broker does not count them."""

    @abstractmethod
    def delete(self, queue: str) -> None:
        """Delete the queue and everything that belongs to it; no error if it does not exist."""


class PrivateServer(Server):
    instance: "ServerProcess"

    def kill(self) -> None:
        """SIGKILL: the broker ends at once."""
        self.instance.kill()

    def restart(self) -> None:
        """Restart it on the same address with its stored data; returns when it answers."""
        self.instance.restart()


def server_module(broker: str) -> ModuleType:
    return import_module(f".{broker}", __name__)


def skip_without_server(missing: ServerMissing) -> NoReturn:
    """Skip the test with the reason; with REQUIRE_BROKERS=1 (CI) fail instead."""
    if os.environ.get("REQUIRE_BROKERS") == "1":
        pytest.fail(f"REQUIRE_BROKERS=1, but {missing}")
    pytest.skip(str(missing))


BROKERS = [name for _, name, _ in iter_modules(__path__) if name not in ("local", "proxy")]
"""A service has only its own broker; the template has all of them."""
SERVED_BROKERS = [
    name  # read, not imported: a missing client library is reported by the tests that need it
    for name in BROKERS
    if "\ndef private(" in Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
]
"""The brokers that are a program on the network, which can be killed, or be unresponsive."""
