# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""A real Redis: the one that CONSUMER_TEST_BROKER_URL names, or a private one that is gone afterwards."""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import redis

from . import Counts, PrivateServer, Server, ServerMissing
from .local import (
    Instance,
    ServerContainer,
    ServerProcess,
    free_ports,
    has_docker,
    one_for_all_workers,
)

IMAGE = "redis:7"
SCHEMES = ("redis", "rediss", "unix")
DURABLE = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
"""No confirmed message is lost when the server is killed."""


class RedisServer(Server):
    """Reads the broker's own counts with redis-py's blocking client."""

    lease_option = "lease_seconds=1"
    lease_seconds = 1

    def __init__(self, url: str) -> None:
        self.url = url

    def client(self) -> "closing[Any]":
        return closing(cast(Any, redis.Redis).from_url(self.url, protocol=2))

    def counts(self, queue: str) -> Counts:
        with self.client() as client:
            dead, there = client.xlen(f"{queue}.dead"), client.exists(queue)
            if not there:
                return Counts(0, 0, dead)
            pending = {
                consumer["name"].decode(): consumer["pending"]
                for group in client.xinfo_groups(queue)
                for consumer in client.xinfo_consumers(queue, group["name"])
            }
            seconds, microseconds = client.time()
            now = seconds * 1000 + microseconds // 1000
            due = client.zcount(f"{queue}.delayed", "-inf", now)
            delayed = client.zcount(f"{queue}.delayed", f"({now}", "+inf")
            dead_consumers = client.zrangebyscore(f"{queue}.consumers", "-inf", now)
            free = {"requeued", *(name.decode() for name in dead_consumers)}
            held = sum(count for name, count in pending.items() if name not in free)
            return Counts(client.xlen(queue) - held + due, delayed, dead, held)

    def consumers(self, queue: str) -> int:
        with self.client() as client:
            now = client.time()[0] * 1000
            return int(client.zcount(f"{queue}.consumers", now, "+inf"))

    def delete(self, queue: str) -> None:
        with self.client() as client:
            client.delete(queue, f"{queue}.dead", f"{queue}.delayed", f"{queue}.consumers")


class PrivateRedis(RedisServer, PrivateServer):
    """A private Redis, on this port."""

    def __init__(self, port: int, instance: Instance) -> None:
        super().__init__(f"redis://127.0.0.1:{port}/0")
        self._instance = instance

    def kill(self) -> None:
        self._instance.kill()

    def restart(self) -> None:
        self._instance.restart()


def most_repeated(prefetch: int) -> float:
    """In-flight messages stay in flight during an outage, and every ack is repeated until it is written."""
    return 0


@contextmanager
def private(directory: Path) -> Iterator[PrivateServer]:
    (port,) = free_ports(1)
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    instance: Instance
    if program is not None:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
        command += ["--unixsocket", "redis.sock"]  # relative: a path of a socket cannot be long
        instance = ServerProcess([*command, *DURABLE], directory, lambda: _answers(port))
    elif has_docker():
        instance = ServerContainer(
            IMAGE, 6379, port, lambda: _answers(port), command=["redis-server", *DURABLE]
        )
    else:
        msg = (
            "there is no Redis for the tests: CONSUMER_TEST_BROKER_URL names none, no redis-server is "
            "installed, and there is no docker"
        )
        raise ServerMissing(msg)
    try:
        yield PrivateRedis(port, instance)
    finally:
        instance.close()


@contextmanager
def shared(directory: Path) -> Iterator[Server]:
    url = os.environ.get("CONSUMER_TEST_BROKER_URL", "")
    if url.partition(":")[0] in SCHEMES:
        yield RedisServer(url)
    else:
        with one_for_all_workers("redis", directory, private) as url:
            yield RedisServer(url)


def _answers(port: int) -> bool:
    """Whether it has loaded its stored data."""
    with closing(cast(Any, redis.Redis)(port=port, socket_timeout=2, retry=None)) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
