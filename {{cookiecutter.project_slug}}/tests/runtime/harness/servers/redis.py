# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A real Redis: the one that CONSUMER_TEST_BROKER_URL names, or a private one that is deleted afterwards."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import redis

from . import Counts, PrivateServer, Server, ServerMissing
from .local import ServerContainer, ServerProcess, free_ports, has_docker

IMAGE = "redis:8.2.1"
SCHEMES = ("redis", "rediss", "unix")
DURABLE = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
"""With these, a kill of the server loses no confirmed message."""


class RedisServer(Server):
    """Reads the broker's own counts with redis-py's blocking client."""

    lease_option = "lease_seconds=1"

    def __init__(self, url: str) -> None:
        self.url = url

    def client(self) -> "closing[Any]":
        return closing(cast(Any, redis.Redis).from_url(self.url, protocol=2))

    def beside(self, queue: str) -> str:
        """The prefix of a queue's other keys."""
        return queue

    def counts(self, queue: str) -> Counts:
        beside = self.beside(queue)
        with self.client() as client:
            dead, there = client.xlen(f"{beside}.dead"), client.exists(queue)
            if not there:
                return Counts(0, 0, dead)
            pending = {
                consumer["name"].decode(): consumer["pending"]
                for group in client.xinfo_groups(queue)
                for consumer in client.xinfo_consumers(queue, group["name"])
            }
            seconds, microseconds = client.time()
            now = seconds * 1000 + microseconds // 1000
            due = client.zcount(f"{beside}.delayed", "-inf", now)
            delayed = client.zcount(f"{beside}.delayed", f"({now}", "+inf")
            dead_consumers = client.zrangebyscore(f"{beside}.consumers", "-inf", now)
            free = {"requeued", *(name.decode() for name in dead_consumers)}
            held = sum(count for name, count in pending.items() if name not in free)
            return Counts(client.xlen(queue) - held + due, delayed, dead, held)

    def consumers(self, queue: str) -> int:
        with self.client() as client:
            now = client.time()[0] * 1000
            return int(client.zcount(f"{self.beside(queue)}.consumers", now, "+inf"))

    def delete(self, queue: str) -> None:
        beside = self.beside(queue)
        with self.client() as client:
            client.delete(queue, f"{beside}.dead", f"{beside}.delayed", f"{beside}.consumers")


class PrivateRedis(RedisServer, PrivateServer):
    """A private Redis, on this port."""

    def __init__(self, port: int, instance: ServerProcess) -> None:
        super().__init__(f"redis://127.0.0.1:{port}/0")
        self.instance = instance


def most_repeated(prefetch: int) -> float:
    """In-flight messages stay in flight during an outage, and every ack is repeated until it is written."""
    return 0


@contextmanager
def private(directory: Path) -> Iterator[PrivateServer]:
    (port,) = free_ports(1)
    program = find_program()
    instance: ServerProcess
    if program is not None:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
        command += ["--unixsocket", "redis.sock"]  # relative, since a socket's path must be short
        instance = ServerProcess([*command, *DURABLE], directory, lambda: _answers(port))
    elif has_docker():
        instance = ServerContainer(
            IMAGE, 6379, port, directory, lambda: _answers(port), command=["redis-server", *DURABLE]
        )
    else:
        raise ServerMissing(
            "there is no Redis for the tests: CONSUMER_TEST_BROKER_URL names none, no redis-server is "
            "installed, and there is no docker"
        )
    try:
        yield PrivateRedis(port, instance)
    finally:
        instance.close()


def shared(directory: Path) -> AbstractContextManager[Server]:
    url = os.environ.get("CONSUMER_TEST_BROKER_URL", "")
    is_ours = url.partition(":")[0] in SCHEMES
    return nullcontext(RedisServer(url)) if is_ours else private(directory)


def find_program() -> str | None:
    return shutil.which("redis-server") or shutil.which("valkey-server")


def _answers(port: int) -> bool:
    """Whether the server has loaded its stored data."""
    with closing(cast(Any, redis.Redis)(port=port, socket_timeout=2, retry=None)) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
