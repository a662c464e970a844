"""The fixtures of the harness, and those that services do not need."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import pytest

pytest.register_assert_rewrite("harness")  # before it is imported, hence E402 below

from consumer_harness import ConsumerHarness  # noqa: E402
from harness.fixtures import *  # noqa: E402, F403
from harness.scene import Scene  # noqa: E402
from harness.servers import Server, ServerMissing, skip_without_server  # noqa: E402
from harness.servers.local import one_for_all_workers  # noqa: E402
from harness.servers.proxy import Proxy  # noqa: E402
from processes import MISBEHAVING  # noqa: E402
from runtime.settings import ConsumerSettings  # noqa: E402
from secured import (  # noqa: E402
    Start,
    login,
    make_certificates,
    once_for_all_workers,
    tls_proxy_of,
)


@pytest.fixture(autouse=True)
def no_logger_is_kept() -> Iterator[None]:
    """`configure_logs` lets each logger keep its configuration: a later `capture_logs` would not see what it logs."""
    yield
    for name, module in list(sys.modules.items()):
        if name.startswith("runtime.") and (log := getattr(module, "log", None)) is not None:
            vars(log).pop("bind", None)


@pytest.fixture
def scene(broker: Server, queue: str, tmp_path: Path) -> Iterator[Scene]:
    """The real program on a queue of its own; here it can misbehave."""
    with Scene(broker, queue, tmp_path, MISBEHAVING) as scene:
        yield scene


@pytest.fixture
def harness(
    broker: Server, queue: str, settings_for: Callable[..., ConsumerSettings]
) -> ConsumerHarness:
    return ConsumerHarness(broker, queue, settings_for)


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
    """Of a user whose name and password have the characters that a URL must encode."""
    with login(broker_name, broker, start_secured) as url:
        yield url


@pytest.fixture
def tls_proxy(
    broker_name: str, broker: Server, start_secured: Start, certificates: Path
) -> Iterator[Proxy]:
    """The broker behind TLS, which asks for a client's certificate if the URL can name one."""
    with tls_proxy_of(broker_name, broker, start_secured, certificates) as proxy:
        yield proxy
