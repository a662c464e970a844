"""The fixtures of the harness, and those that services do not need."""

import asyncio
import inspect
import logging
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import ExitStack, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NoReturn

import hypothesis
import pytest
import structlog

pytest.register_assert_rewrite("harness")  # before it is imported, hence E402 below

from consumer_harness import ConsumerHarness  # noqa: E402
from harness import fixtures  # noqa: E402
from harness.fixtures import *  # noqa: E402, F403
from harness.scene import Scene  # noqa: E402
from harness.servers import Server, ServerMissing, skip_without_server  # noqa: E402
from harness.servers.proxy import Proxy, proxy_type  # noqa: E402
from processes import MISBEHAVING  # noqa: E402
from runtime import brokers, redaction  # noqa: E402
from runtime.settings import ConsumerSettings  # noqa: E402
from secured import (  # noqa: E402
    Start,
    login,
    make_certificates,
    once_for_all_workers,
    tls_proxy_of,
)
from sharing import one_for_all_workers, server_module  # noqa: E402
from steps import Event  # noqa: E402

fixtures.server_module = server_module

# A slow machine is no counterexample.
slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=slow)
hypothesis.settings.load_profile("untimed")
# Options of Python in the services that tests start: see there.
without_rich = str(Path(__file__).with_name("without_rich"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [without_rich, *filter(None, [os.environ.get("PYTHONPATH")])]
)
# -X dev keeps ten frames of the stack for each callback, which is a sixth of the CPU time of these tests.
setattr(asyncio.constants, "DEBUG_STACK_DEPTH", 1)  # noqa: B010
# With rich, which cookiecutter installs, each traceback would block the event loop for a second, or for twenty.
structlog.get_config()["processors"][-1].exception_formatter = structlog.dev.plain_traceback


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that kill their own server are the longest: they start first, in parallel with the others."""

    def server_is_shared(item: pytest.Item) -> bool:
        fixtures = getattr(item, "fixturenames", ())
        return "node" not in fixtures and ("broker" in fixtures or "start_server" not in fixtures)

    items.sort(key=server_is_shared)


@pytest.fixture(autouse=True)
def no_logger_is_kept() -> Iterator[None]:
    """`configure_logs` lets each logger keep its configuration: a later `capture_logs` would not see its events.

    And it sets the level of all loggers, which later tests of `caplog` do not expect.
    """
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for name, module in list(sys.modules.items()):
        if name.startswith("runtime.") and (log := getattr(module, "log", None)) is not None:
            vars(log).pop("bind", None)


@pytest.fixture(autouse=True)
def no_secret_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret of an earlier test is known."""
    monkeypatch.setattr(redaction, "_known", set())
    monkeypatch.setattr(redaction, "_any_known", None)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> None:
    """Fail a test that leaves an asyncio task behind."""
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("no_task_is_left_behind")


@pytest.fixture
async def no_task_is_left_behind() -> AsyncIterator[None]:
    yield
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    assert not tasks or not (await asyncio.wait(tasks, timeout=30))[1]  # a task may be about to end


@pytest.fixture
def scene(broker: Server, queue: str, tmp_path: Path) -> Iterator[Scene]:
    """The real program on its own queue; here it can misbehave."""
    with Scene(broker, queue, tmp_path, MISBEHAVING) as scene:
        yield scene


@pytest.fixture
def harness(
    broker: Server, queue: str, settings_for: Callable[..., ConsumerSettings]
) -> ConsumerHarness:
    return ConsumerHarness(broker, queue, settings_for)


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
    """Sets a constant in each of the runtime's broker modules that has this name."""

    def shorten(seconds: float, *names: str) -> None:
        for name in names:
            for module in broker_modules(name):
                monkeypatch.setattr(module, name, seconds)

    return shorten


def broker_modules(name: str) -> list[Any]:
    """The modules of runtime.brokers that have an attribute with this name."""
    modules = []
    for found in iter_modules(brokers.__path__, f"{brokers.__name__}."):
        with suppress(ImportError):  # a missing client library
            modules.append(import_module(found.name))
    return [module for module in modules if hasattr(module, name)]


@pytest.fixture
def proxy(broker: Server) -> Iterator[Proxy]:
    with proxy_type(broker.url)(broker.url) as proxy:
        yield proxy


@pytest.fixture
def broker_name(request: pytest.FixtureRequest) -> str:
    """The parameter of `broker`."""
    return str(request.node.callspec.params["broker"])


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make certificates with")
    return once_for_all_workers(tmp_path_factory, "certificates", make_certificates)


@pytest.fixture(scope="session")
def start_secured(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers with users or TLS: one of each kind for all processes of a test run."""
    with ExitStack() as running:

        @cache
        def start(kind: Callable[..., object]) -> str:
            directory = tmp_path_factory.mktemp(kind.__name__)
            make = partial(kind, certificates=certificates)
            try:
                return running.enter_context(one_for_all_workers(kind.__name__, directory, make))
            except ServerMissing as missing:
                skip_without_server(missing)

        yield start


@pytest.fixture
def login_url(broker_name: str, broker: Server, start_secured: Start) -> Iterator[str]:
    """The URL of a user whose name and password have the characters that a URL must encode."""
    with login(broker_name, broker, start_secured) as url:
        yield url


@pytest.fixture
def tls_proxy(
    broker_name: str, broker: Server, start_secured: Start, certificates: Path
) -> Iterator[Proxy]:
    """The broker behind TLS, which requires a client's certificate if the URL can name one."""
    with tls_proxy_of(broker_name, broker, start_secured, certificates) as proxy:
        yield proxy
