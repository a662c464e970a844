# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""Real brokers for the tests: one module for each, with the same functions.

``shared(directory)`` gives a server that all tests may use at once, each with a queue of its own.
``private(directory)`` gives one that a test may kill and start again; a broker that has no server, as the
embedded one, has no such function. Both are context managers, and both raise `ServerMissing`, with the reason,
where no server is to be had.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol

import pytest


class ServerMissing(Exception):
    """No server of this broker can be had here; the text says what was looked for."""


@dataclass(frozen=True)
class Counts:
    """What the broker itself says of one queue, read without the runtime."""

    ready: int
    """Waiting to be delivered now, or in hand of nobody."""
    delayed: int
    """Waiting for a retry delay to pass."""
    dead: int
    held: int = field(default=0, compare=False)
    """Leased by a consumer, which may be dead; 0 where the end of its connection gives them back at once."""


class Server(Protocol):
    url: str
    """For CONSUMER_BROKER_URL."""
    impatient_url: str
    """The same, with the shortest time after which the messages of a dead consumer go to others."""

    def counts(self, queue: str) -> Counts:
        """Counts of messages; a message in hand of a live consumer may be missing from all of them."""

    def consumers(self, queue: str) -> int:
        """How many consumers the broker sees on the queue; -1 where a broker cannot tell."""

    def delete(self, queue: str) -> None:
        """Remove the queue and all that belongs to it; no error if it is not there."""


class PrivateServer(Server, Protocol):
    def kill(self) -> None:
        """SIGKILL: the broker is gone from one moment to the next."""

    def restart(self) -> None:
        """Start it again on the same address with what it had stored; returns when it answers."""


class ServerModule(Protocol):
    def shared(self, directory: Path) -> AbstractContextManager[Server]: ...

    def private(self, directory: Path) -> AbstractContextManager[PrivateServer]: ...

    def most_repeated(self, prefetch: int) -> float:
        """How many messages that were handled may come again after the server was killed and restarted."""


def server_module(broker: str) -> ServerModule:
    module: ServerModule = import_module(f".{broker}", __name__)
    return module


def need_of_server(server: Server, ability: str) -> None:
    """Skip the test where the server at hand, which may be a stand-in, lacks what its broker can do."""
    if ability in getattr(server, "lacks", ()):
        pytest.skip(f"the server of these tests lacks: {ability}")


def let_store(server: Server) -> None:
    """Wait until what the server has confirmed survives a kill: its broker promises that at once, a stand-in may not."""
    getattr(server, "let_store", lambda: None)()


def skip_without_server(missing: ServerMissing) -> None:
    """Skip the test with the reason; with REQUIRE_BROKERS=1 (CI) fail instead."""
    if os.environ.get("REQUIRE_BROKERS") == "1":
        pytest.fail(f"REQUIRE_BROKERS=1, but {missing}")
    pytest.skip(str(missing))


EMBEDDED = "sqlite"
BROKERS = [
    EMBEDDED,
    *(name for _, name, _ in iter_modules(__path__) if name not in (EMBEDDED, "local", "proxy")),
]
"""The embedded broker and the one this service was scaffolded with."""
SERVED_BROKERS = [
    name  # read, not imported: what a broker needs is missed where it is needed
    for name in BROKERS
    if "\ndef private(" in Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
]
"""Those that are a program on the network, which can be killed and be silent."""
