# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A server with the API of SQS: the one that CONSUMER_TEST_BROKER_URL names, or moto as a private process.

moto keeps everything in memory, so killing it would prove nothing about the durability of SQS. A private server
is therefore behind a proxy, and an outage cuts every connection to it.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.session import get_session

from runtime.brokers.sqs import parse_url

from . import Counts, PrivateServer, Server, ServerMissing
from .local import ServerProcess, free_ports
from .proxy import Proxy

KEY, SECRET = "test", "p/ss+w@rd"

# moto has no locks around its queues: two requests at once would get the same message, or lose one that is
# sent while another is deleted. Uninterrupted threads need no locks. A poll that waits checks only once
# a second whether a message has become visible again, unlike SQS. Counting the whole queue for each
# delivered message, by a slow clock, takes ten times as long as everything else. A second Server header,
# next to the HTTP server's own, is an error to a strict client (python -X dev).
MOTO = """
import sys
import time
from moto.server import main
from moto.sqs import models
from werkzeug.serving import WSGIRequestHandler

sys.setswitchinterval(60)
wait_for_messages = models.Queue.wait_for_messages
models.Queue.wait_for_messages = lambda queue, timeout: wait_for_messages(queue, 0.02)
models.SQSBackend.is_message_valid_based_on_retention_period = lambda *_: True
models.unix_time_millis = lambda: time.time() * 1000
send_header = WSGIRequestHandler.send_header
WSGIRequestHandler.send_header = lambda handler, name, value: (
    name == "server" or send_header(handler, name, value)
)
main(["--port", sys.argv[1]])
"""


class SqsServer(Server):
    """Reads the server's own counts by its API."""

    lease_option = "visibility_seconds=3"

    def __init__(self, url: str) -> None:
        self.url = url
        config = Config(connect_timeout=10, read_timeout=10, max_pool_connections=1)
        self._arguments = parse_url(url).client_arguments | {"config": config}
        self._client: Any = None

    @property
    def client(self) -> Any:
        """A client for the server, without the runtime."""
        if self._client is None:
            self._client = get_session().create_client("sqs", **self._arguments)
        return self._client

    def counts(self, queue: str) -> Counts:
        of_queue, of_dead = self.attributes(queue), self.attributes(f"{queue}-dead")
        name = "ApproximateNumberOfMessages"
        return Counts(
            ready=int(of_queue.get(name, 0)),
            delayed=int(of_queue.get(f"{name}Delayed", 0)),
            dead=int(of_dead.get(name, 0)) + int(of_dead.get(f"{name}NotVisible", 0)),
            held=int(of_queue.get(f"{name}NotVisible", 0)),
        )

    def consumers(self, queue: str) -> int:
        return -1

    def delete(self, queue: str) -> None:
        for name in (queue, f"{queue}-dead"):
            if url := self.queue_url(name):
                self.client.delete_queue(QueueUrl=url)

    def queue_url(self, name: str) -> str:
        """The URL of the queue; empty if it does not exist."""
        try:
            return str(self.client.get_queue_url(QueueName=name)["QueueUrl"])
        except ClientError as error:
            if not error.response["Error"]["Code"].endswith("NonExistentQueue"):
                raise
            return ""

    def attributes(self, name: str) -> dict[str, str]:
        """The attributes of the queue; empty if it does not exist."""
        url = self.queue_url(name)
        if not url:
            return {}
        answer = self.client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
        attributes: dict[str, str] = answer["Attributes"]
        return attributes

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


class PrivateSqs(SqsServer, PrivateServer):
    """A private moto, behind a proxy. Messages that are invisible when a connection ends are visible after five seconds."""

    lease_option = ""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__(f"{proxy.url}&visibility_seconds=5")
        self._proxy = proxy

    def kill(self) -> None:
        """End every connection and accept no new one, like an outage for a consumer."""
        self._proxy.refuse()

    def restart(self) -> None:
        self._proxy.resume()


@contextmanager
def moto(directory: Path) -> Iterator[str]:
    """The URL of a moto that ends with the block."""
    if find_spec("moto") is None:
        msg = "there is no SQS for the tests: CONSUMER_TEST_BROKER_URL names none, and moto is not installed"
        raise ServerMissing(msg)
    (port,) = free_ports(1)
    command = [sys.executable, "-c", MOTO, str(port)]
    process = ServerProcess(command, directory, lambda: _answers(port))
    try:
        yield f"sqs://{KEY}:{quote(SECRET, safe='')}@127.0.0.1:{port}/eu-central-1?wait_seconds=1"
    finally:
        process.close()


def most_repeated(prefetch: int) -> float:
    """The in-flight messages, and those acked in the last instant, if the outage outlasts the visibility timeout."""
    return prefetch


@contextmanager
def private(directory: Path) -> Iterator[PrivateServer]:
    with moto(directory) as url, Proxy(url) as proxy, closing(PrivateSqs(proxy)) as server:
        yield server


@contextmanager
def shared(directory: Path) -> Iterator[Server]:
    url = os.environ.get("CONSUMER_TEST_BROKER_URL", "")
    if url.startswith("sqs"):
        with closing(SqsServer(url)) as server:
            yield server
    else:
        with moto(directory) as url, closing(SqsServer(url)) as server:
            yield server


def _answers(port: int) -> bool:
    """Whether the server listens."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False
