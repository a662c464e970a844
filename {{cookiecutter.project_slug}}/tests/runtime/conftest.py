# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""What the tests of the runtime share: a real broker, a queue of one's own, and a clean end."""

import asyncio
import inspect
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from {{ cookiecutter.package_name }}.runtime.settings import ConsumerSettings

from .servers import (
    BROKERS,
    PrivateServer,
    Server,
    ServerMissing,
    server_module,
    skip_without_server,
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background so, and every process of these tests would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    """What needs a server is slow, so that ``-m "not slow"`` is quick and needs none."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("broker", "sqlite") != "sqlite":
        item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", params=BROKERS)
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of each broker that this service can use."""
    try:
        server = server_module(request.param).shared(tmp_path_factory.mktemp(request.param))
        with server as running:
            yield running
    except ServerMissing as missing:
        skip_without_server(missing)


@pytest.fixture(scope="session")
def private_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], PrivateServer]]:
    """Gives the broker's server that tests may kill, and start again; its queues are nobody's care."""
    with ExitStack() as running:

        @cache
        def start(broker: str) -> PrivateServer:
            directory = tmp_path_factory.mktemp(f"private-{broker}")
            try:
                return running.enter_context(server_module(broker).private(directory))
            except ServerMissing as missing:
                skip_without_server(missing)
                raise

        yield start


@pytest.fixture
def queue(broker: Server) -> Iterator[str]:
    """The name of a queue that nobody else uses; it is gone after the test."""
    name = f"ccc-test-{uuid.uuid4().hex[:12]}"
    yield name
    broker.delete(name)


@pytest.fixture
def settings_for(
    broker: Server, queue: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., ConsumerSettings]:
    """Makes settings for this queue; what the shell and ``.env`` say of the service does not count."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("CONSUMER_")]:
        monkeypatch.delenv(variable)

    def make(**overrides: Any) -> ConsumerSettings:
        return ConsumerSettings.model_validate(
            {"broker_url": broker.url, "source": queue, **overrides}
        )

    return make


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
