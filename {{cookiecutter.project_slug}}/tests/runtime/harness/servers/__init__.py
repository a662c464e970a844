# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Real brokers for the tests: one module for each. The tests run on every broker whose module lies here.

Each module has ``shared(directory)``, a context manager that gives a `Server` which all tests may use at once, each
with a queue of its own. A broker that is a program on the network also has ``private(directory)``, which gives a
`PrivateServer` that a test may kill and restart. Both raise `ServerMissing` where no server is available.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NoReturn, Protocol

import pytest

from .proxy import Proxy


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
    """Leased by a consumer, which may be dead; 0 where the end of its connection requeues them at once."""


class Server(ABC):
    """One server, and the facts of its broker that tests need: options of the URL, and missing features."""

    url: str
    """For CONSUMER_BROKER_URL."""
    lease_option = ""
    """The option of the URL with the shortest time after which the messages of a dead consumer are redelivered."""
    lease_seconds: float = 0
    """That time. 0: the end of a connection requeues its messages at once."""
    proxy_type: Callable[..., Proxy] = Proxy
    lacks: Collection[str] = ()
    """The features that the broker, or this server, lacks: words for the reason of a skipped test."""
    requeues_on_disconnect = False
    """Whether messages that are in flight on a connection are redelivered when it ends."""
    silence_option = ""
    """The option of the URL with which an unresponsive broker is noticed within a second, if there is one."""

    @property
    def impatient_url(self) -> str:
        return with_options(self.url, self.lease_option)

    @abstractmethod
    def counts(self, queue: str) -> Counts:
        """Counts of messages; one that is in flight at a live consumer may be missing from all of them."""

    @abstractmethod
    def consumers(self, queue: str) -> int:
        """How many consumers the broker sees on the queue; -1 where a broker cannot tell."""

    @abstractmethod
    def delete(self, queue: str) -> None:
        """Remove the queue and all that belongs to it; no error if it does not exist."""

    def need(self, ability: str) -> None:
        """Skip the test if the feature is one of those that are lacking."""
        if ability in self.lacks:
            pytest.skip(f"the server of these tests lacks: {ability}")


class PrivateServer(Server):
    @abstractmethod
    def kill(self) -> None:
        """SIGKILL: the broker ends at once."""

    @abstractmethod
    def restart(self) -> None:
        """Restart it on the same address with its stored data; returns when it answers."""


class ServerModule(Protocol):
    def shared(self, directory: Path) -> AbstractContextManager[Server]: ...

    def private(self, directory: Path) -> AbstractContextManager[PrivateServer]: ...

    def most_repeated(self, prefetch: int) -> float:
        """How many messages that were handled may be redelivered after the server was killed and restarted."""


def server_module(broker: str) -> ServerModule:
    module: ServerModule = import_module(f".{broker}", __name__)
    return module


def skip_without_server(missing: ServerMissing) -> NoReturn:
    """Skip the test with the reason; with REQUIRE_BROKERS=1 (CI) fail instead."""
    if os.environ.get("REQUIRE_BROKERS") == "1":
        pytest.fail(f"REQUIRE_BROKERS=1, but {missing}")
    pytest.skip(str(missing))


def with_options(url: str, *given: str, **options: object) -> str:
    """The URL with these options; ``given`` are like ``name=value``, or empty."""
    query = "&".join(
        [*filter(None, given), *(f"{name}={value}" for name, value in options.items())]
    )
    return f"{url}{'&' if '?' in url else '?'}{query}" if query else url


BROKERS = [name for _, name, _ in iter_modules(__path__) if name not in ("local", "proxy")]
"""In a service its own broker; in the template all of them."""
SERVED_BROKERS = [
    name  # read, not imported: a missing client library is reported by the tests that need it
    for name in BROKERS
    if "\ndef private(" in Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
]
"""The brokers that are a program on the network, which can be killed, and be unresponsive."""
