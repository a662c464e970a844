# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The fixtures of the runtime's tests: a real broker, a queue of its own, a proxy before it; and a clean end."""

import asyncio
import inspect
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NoReturn

import pytest
import structlog

from runtime import brokers
from runtime.brokers import make_source
from runtime.brokers.source import Source
from runtime.settings import ConsumerSettings

from .contract import Connect, Counted, Event, eventually_counts, opened
from .scene import Scene
from .servers import (
    BROKERS,
    SERVED_BROKERS,
    Counts,
    Server,
    ServerMissing,
    server_module,
    skip_without_server,
)
from .servers.proxy import Proxy

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs with it ignored, and every process of these tests would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

over_the_network = pytest.mark.parametrize("broker", SERVED_BROKERS, indirect=True, scope="session")
"""For tests of a server, a connection or a subscription, which a broker in a file does not have."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that kill a server of their own are the longest: they start first, beside the others."""
    items.sort(key=lambda item: "private_server" not in getattr(item, "fixturenames", ()))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests with a server are slow, so that ``-m "not slow"`` is quick and needs none."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("broker", "sqlite") != "sqlite":
        item.add_marker(pytest.mark.slow)


Start = Callable[[str], Any]
"""Gives the server of a broker, the same one at each call."""


@contextmanager
def servers(kind: str, directories: pytest.TempPathFactory) -> Iterator[Start]:
    with ExitStack() as running:

        @cache
        def start(broker: str) -> Any:
            directory = directories.mktemp(f"{kind}-{broker}")
            try:
                return running.enter_context(getattr(server_module(broker), kind)(directory))
            except ServerMissing as missing:
                skip_without_server(missing)

        yield start


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Not part of `broker`, which pytest tears down and sets up again whenever its parameter changes."""
    with servers("shared", tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def private_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """For tests that kill it and start it again; its queues are not cleaned up."""
    with servers("private", tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session", params=BROKERS)
def broker(request: pytest.FixtureRequest, shared_server: Start) -> Server:
    """A server of each broker whose module is in harness/servers."""
    server: Server = shared_server(request.param)
    return server


@pytest.fixture
def queue(broker: Server) -> Iterator[str]:
    """The name of a queue of this test's own; it is gone after the test."""
    name = f"ccc-test-{uuid.uuid4().hex[:12]}"
    yield name
    broker.delete(name)


@pytest.fixture
def settings_for(
    broker: Server, queue: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., ConsumerSettings]:
    """Makes settings for this queue; variables of the shell and ``.env`` do not count."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("CONSUMER_")]:
        monkeypatch.delenv(variable)

    def make(**overrides: Any) -> ConsumerSettings:
        return ConsumerSettings.model_validate(
            {"broker_url": broker.url, "source": queue, **overrides}
        )

    return make


@pytest.fixture
def source_for(
    settings_for: Callable[..., ConsumerSettings], request: pytest.FixtureRequest
) -> Callable[..., Any]:
    """Makes a source that is not connected yet, with the SETTINGS of the test's module if it has some."""
    defaults = getattr(request.module, "SETTINGS", {})

    def make(prefetch: int = 10, **overrides: Any) -> Source:
        return make_source(settings_for(**{**defaults, **overrides}), prefetch)

    return make


@pytest.fixture
def connect(source_for: Callable[..., Source]) -> Connect:
    """Connects a source that consumes; ``prefetch=0`` for one that only publishes."""

    @asynccontextmanager
    async def connect(prefetch: int = 10, **overrides: Any) -> AsyncIterator[Source]:
        async with opened(source_for(prefetch or 1, **overrides)) as source:
            if prefetch:
                await source.start()
            yield source

    return connect


@pytest.fixture
def counted(broker: Server, queue: str) -> Counted:
    """Waits until the broker itself counts this many messages of the test's queue; by default none."""

    async def counted(ready: int = 0, delayed: int = 0, dead: int = 0) -> None:
        await eventually_counts(broker, queue, Counts(ready, delayed, dead))

    return counted


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """The log events of the runtime's broker modules."""
    events: list[Event] = []

    def keep(_logger: object, level: str, event: MutableMapping[str, Any]) -> NoReturn:
        events.append({"level": level, **event})
        raise structlog.DropEvent

    for module in broker_modules("log"):
        monkeypatch.setattr(module, "log", structlog.wrap_logger(None, processors=[keep]))
    return events


@pytest.fixture
def shorten(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets a constant of the runtime's broker modules, in each that has one of the name."""

    def shorten(seconds: float, *names: str) -> None:
        for name in names:
            for module in broker_modules(name):
                monkeypatch.setattr(module, name, seconds)

    return shorten


def broker_modules(name: str) -> list[Any]:
    """The modules of runtime.brokers that have an attribute of this name."""
    modules = []
    for found in iter_modules(brokers.__path__, f"{brokers.__name__}."):
        with suppress(ImportError):  # of a client library
            modules.append(import_module(found.name))
    return [module for module in modules if hasattr(module, name)]


@pytest.fixture
def scene(broker: Server, queue: str, tmp_path: Path) -> Iterator[Scene]:
    """The real program on a queue of its own."""
    with Scene(broker, queue, tmp_path) as scene:
        yield scene


@pytest.fixture
def proxy(broker: Server) -> Iterator[Proxy]:
    with broker.proxy_type(broker.url) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> None:
    """Fail a test that leaves an asyncio task behind."""
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("no_task_is_left_behind")


@pytest.fixture
async def no_task_is_left_behind() -> AsyncIterator[None]:
    yield
    left_behind = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left_behind
