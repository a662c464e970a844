# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""What the tests of the runtime share: a real broker, a queue of one's own, and a clean end."""

import asyncio
import inspect
import os
import shutil
import signal
import ssl
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import structlog

from runtime import brokers
from runtime.brokers import make_source
from runtime.brokers.source import Source
from runtime.settings import ConsumerSettings

from .servers import (
    BROKERS,
    Server,
    ServerMissing,
    server_module,
    skip_without_server,
)
from .servers.proxy import Proxy

if TYPE_CHECKING:
    from .test_shutdown import Scene

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background so, and every process of these tests would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    """What needs a server is slow, so that ``-m "not slow"`` is quick and needs none."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("broker", "sqlite") != "sqlite":
        item.add_marker(pytest.mark.slow)


StartServer = Callable[[str], Any]
"""Gives the server of a broker, the same one at each call."""


@contextmanager
def servers(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    with ExitStack() as running:

        @cache
        def start(broker: str) -> Any:
            directory = tmp_path_factory.mktemp(f"{kind}-{broker}")
            try:
                return running.enter_context(getattr(server_module(broker), kind)(directory))
            except ServerMissing as missing:
                skip_without_server(missing)

        yield start


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Not part of `broker`, which pytest ends and makes again as often as its parameter changes."""
    with servers("shared", tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def private_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Gives the broker's server that tests may kill, and start again; its queues are nobody's care."""
    with servers("private", tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session", params=BROKERS)
def broker(request: pytest.FixtureRequest, shared_server: StartServer) -> Server:
    """A server of each broker that this service can use."""
    server: Server = shared_server(request.param)
    return server


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


# For the tests of one broker alone.


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the broker's module and `source` log."""
    events: list[dict[str, Any]] = []

    def keep(_logger: object, level: str, event: MutableMapping[str, Any]) -> NoReturn:
        events.append({"level": level, **event})
        raise structlog.DropEvent

    for name, module in list(sys.modules.items()):
        if name.startswith(f"{brokers.__name__}.") and hasattr(module, "log"):
            monkeypatch.setattr(module, "log", structlog.wrap_logger(None, processors=[keep]))
    return events


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
def connect(source_for: Callable[..., Source]) -> Callable[..., Any]:
    """Connects a source that consumes; ``prefetch=0`` for one that does not."""

    @asynccontextmanager
    async def connect(prefetch: int = 10, **overrides: Any) -> AsyncIterator[Source]:
        async with source_for(prefetch or 1, **overrides) as source:
            if prefetch:
                await source.start()
            yield source

    return connect


@pytest.fixture
def scene(broker: Server, queue: str, tmp_path: Path) -> Iterator["Scene"]:
    """The real program on a queue of its own."""
    from .test_shutdown import Scene  # by now pytest has seen to its assertions

    scene = Scene(broker, queue, tmp_path)
    yield scene
    scene.close()


@pytest.fixture
def proxy(broker: Server) -> Iterator[Proxy]:
    with Proxy(broker.url) as proxy:
        yield proxy


@pytest.fixture
def tls_proxy(broker: Server, certificates: Path) -> Iterator[Proxy]:
    """The broker behind TLS that asks for a client's certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates / "ca.pem")
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    with Proxy(broker.url, tls=context) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, and what it has signed: a server's and a client's certificate; and another CA."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make certificates with")
    directory = tmp_path_factory.mktemp("certificates")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    for ca in ("ca", "other"):
        openssl(
            *("req", "-x509", *new_key, "-subj", f"/CN={ca}", "-days", "2"),
            *("-addext", "keyUsage=critical,keyCertSign"),
            *("-keyout", f"{ca}.key", "-out", f"{ca}.pem"),
        )
    (directory / "extensions").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n"
    )
    for name in ("server", "client"):
        openssl(
            *("req", *new_key, "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-days", "2", "-extfile", "extensions"),
            *("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", f"{name}.pem"),
        )
    return directory


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
