# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The fixtures of the runtime's tests: a real broker, and a queue of its own."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from runtime.brokers import make_source
from runtime.brokers.source import Source
from runtime.settings import ConsumerSettings

from .contract import Connect, Counted, eventually, opened
from .scene import Scene
from .servers import BROKERS, Counts, Server, ServerMissing, server_module, skip_without_server

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs with SIGINT ignored, and every process of these tests would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests with a server are slow, so that ``-m "not slow"`` is quick and needs no server."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("broker", "sqlite") != "sqlite":
        item.add_marker(pytest.mark.slow)


StartServer = Callable[[str, str], Any]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Gives the ``shared`` or the ``private`` server of a broker, the same one at each call.

    Not part of `broker`, which pytest tears down and sets up again whenever its parameter changes.
    """
    with ExitStack() as running:

        @cache
        def start(kind: str, broker: str) -> Any:
            directory = tmp_path_factory.mktemp(f"{kind}-{broker}")
            try:
                return running.enter_context(getattr(server_module(broker), kind)(directory))
            except ServerMissing as missing:
                skip_without_server(missing)

        yield start


@pytest.fixture(scope="session", params=BROKERS)
def broker(request: pytest.FixtureRequest, start_server: StartServer) -> Server:
    """A server of each broker whose module is in harness/servers."""
    server: Server = start_server("shared", request.param)
    return server


@pytest.fixture
def queue(broker: Server) -> Iterator[str]:
    """The name of this test's own queue; it is deleted after the test."""
    name = f"ccc-test-{uuid.uuid4().hex[:12]}"
    yield name
    broker.delete(name)


@pytest.fixture
def settings_for(
    broker: Server, queue: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., ConsumerSettings]:
    """Makes settings for this queue, without variables of the shell and ``.env``."""
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
    """Connects a source that consumes; with ``prefetch=0`` it only publishes."""

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
        counts = Counts(ready, delayed, dead)
        await eventually(counts, lambda: asyncio.to_thread(broker.counts, queue))

    return counted


@pytest.fixture
def scene(broker: Server, queue: str, tmp_path: Path) -> Iterator[Scene]:
    """The real program on its own queue."""
    with Scene(broker, queue, tmp_path) as scene:
        yield scene
