# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A real RabbitMQ: the one that CONSUMER_TEST_BROKER_URL names, or a private one that is deleted afterwards."""

import asyncio
import os
import shutil
import socket
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import aio_pika
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import ChannelNotFoundEntity

from runtime.brokers.rabbitmq import delays_ms

from . import Counts, PrivateServer, Server, ServerMissing
from .local import ServerContainer, ServerProcess, free_ports, has_docker, kill_group, spawn

T = TypeVar("T")

IMAGE = "rabbitmq:4.1.4"
DISK_FREE_BYTES = 10**7
"""Less free disk than this is an alarm."""

BACK_OFFS_SECONDS = [(1, 300), (0.1, 0.4)]
"""The values of CONSUMER_RETRY_SECONDS and CONSUMER_RETRY_MAX_SECONDS in tests; their retry queues are counted."""

# The packages' own rabbitmq-server requires root and changes its user; the script that it calls does not.
SCRIPTS = (
    "/usr/lib/rabbitmq/bin/rabbitmq-server",
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server",
    "/opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server",
    "/usr/local/opt/rabbitmq/sbin/rabbitmq-server",
)


class RabbitServer(Server):
    """Reads the broker's own counts by its protocol."""

    def __init__(self, url: str) -> None:
        self.url = url

    def counts(self, queue: str) -> Counts:
        ready, dead, *delayed = [count for count, _ in self._ask(_declared, *_queues(queue))]
        return Counts(ready, sum(delayed), dead)

    def consumers(self, queue: str) -> int:
        [(_, count)] = self._ask(_declared, queue)
        return count

    def delete(self, queue: str) -> None:
        self._ask(_delete, *_queues(queue))

    def _ask(
        self, question: Callable[[AbstractConnection, str], Coroutine[Any, Any, T]], *names: str
    ) -> list[T]:
        async def ask() -> list[T]:
            async with await aio_pika.connect(self.url, timeout=10) as connection:
                return [await question(connection, name) for name in names]

        with ThreadPoolExecutor(1) as thread:  # the test may have an event loop of its own
            return thread.submit(asyncio.run, ask()).result()


def _queues(queue: str) -> list[str]:
    """All queues that the runtime may have created for it."""
    retries = [f"{queue}.retry.{ms}" for one in BACK_OFFS_SECONDS for ms in delays_ms(*one)]
    return [queue, f"{queue}.dead", *retries]


async def _declared(connection: AbstractConnection, name: str) -> tuple[int, int]:
    """The number of ready messages, and of consumers; 0 if the queue does not exist."""
    try:
        async with connection.channel() as channel:
            queue = await channel.declare_queue(name, passive=True)
    except ChannelNotFoundEntity:
        return 0, 0
    return queue.declaration_result.message_count or 0, queue.declaration_result.consumer_count or 0


async def _delete(connection: AbstractConnection, name: str) -> None:
    async with connection.channel() as channel:
        await channel.queue_delete(name)


class PrivateRabbit(RabbitServer, PrivateServer):
    """A private RabbitMQ, on this port."""

    def __init__(self, port: int, instance: ServerProcess) -> None:
        super().__init__(f"amqp://guest:guest@127.0.0.1:{port}/")
        self.instance = instance


def find_script() -> str | None:
    """The script that starts an installed server."""
    found = [path for pattern in SCRIPTS for path in Path("/").glob(pattern.lstrip("/"))]
    script = str(found[0]) if found else shutil.which("rabbitmq-server")
    return script if shutil.which("epmd") else None


@contextmanager
def _installed(script: str, directory: Path) -> Iterator[PrivateRabbit]:
    """Its own port, data and Erlang port mapper; it uses a rabbitmq.conf in the directory."""
    port, distribution_port, epmd_port = free_ports(3)
    with (directory / "rabbitmq.conf").open("a") as configuration:
        configuration.write(f"disk_free_limit.absolute = {DISK_FREE_BYTES}\n")
    (directory / "enabled_plugins").write_text("[].")
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(directory),  # the directory of the Erlang cookie
        "LANG": "C.UTF-8",
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"test{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_MNESIA_BASE": str(directory / "data"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
            "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none"
        ),
    }
    # Started here, because a mapper that the node starts would survive it.
    epmd = spawn(["epmd", "-port", str(epmd_port), "-address", "127.0.0.1"], directory, environment)
    try:
        node = ServerProcess([script], directory, lambda: _answers(port), environment)
        with closing(node):
            yield PrivateRabbit(port, node)
    finally:
        kill_group(epmd)


@contextmanager
def _in_docker(directory: Path) -> Iterator[PrivateRabbit]:
    (port,) = free_ports(1)
    # The data belongs to the host's name, so that must stay the same.
    container = ServerContainer(
        IMAGE, 5672, port, directory, lambda: _answers(port), "--hostname", "rabbitmq"
    )
    with closing(container):
        yield PrivateRabbit(port, container)


def most_repeated(prefetch: int) -> float:
    """The in-flight messages, and those acked in the last instant: the broker saw all of them unacked."""
    return prefetch


def private(directory: Path) -> AbstractContextManager[PrivateServer]:
    # Not the shared server: RabbitMQ 3.10 that deletes a quorum queue just after its start loses the
    # supervisor of its dead-letter workers (rabbit_fifo_dlx_sup), and every later queue of this kind fails.
    if (script := find_script()) is not None:
        return _installed(script, directory)
    if has_docker():
        return _in_docker(directory)
    raise ServerMissing(
        "there is no RabbitMQ for the tests: CONSUMER_TEST_BROKER_URL names none, no rabbitmq-server "
        "is installed, and there is no docker"
    )


def shared(directory: Path) -> AbstractContextManager[Server]:
    url = os.environ.get("CONSUMER_TEST_BROKER_URL", "")
    is_ours = url.startswith("amqp")
    return nullcontext(RabbitServer(url)) if is_ours else private(directory)


def _answers(port: int) -> bool:
    """Whether a broker answers: the port alone may be open long before."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"AMQP\0\0\x09\x01")
            return connection.recv(1) == b"\x01"
    except OSError:
        return False
