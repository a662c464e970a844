# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A real Kafka: a running one, an installed one, or one in Docker.

CONSUMER_TEST_BROKER_URL names a running one. CONSUMER_TEST_BROKER_COMMAND starts an installed one, with ``{port}``
in place of the port on which it listens and which it advertises, and ``{directory}``
in place of its folder: ``my-kafka --listen 127.0.0.1:{port} --data {directory}``.
"""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from . import Counts, PrivateServer, Server, ServerMissing
from .local import ServerContainer, ServerProcess, free_ports, has_docker

T = TypeVar("T")

IMAGE = "apache/kafka:4.1.0"
PARTITIONS = 4
SESSION_SECONDS = 6
"""The shortest that brokers allow by default."""
IMPATIENT = f"rebalance_timeout_seconds=4&session_timeout_seconds={SESSION_SECONDS}"
OPTIONS = f"?partitions={PARTITIONS}&{IMPATIENT}"

logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


class KafkaServer(Server):
    """Reads the broker's own counts by its protocol."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._address = urlsplit(url).netloc.rpartition("@")[2]

    def counts(self, queue: str) -> Counts:
        async def count(admin: AIOKafkaAdminClient) -> Counts:
            own = f"{queue}.{queue}"  # the tests' group has the name of its queue
            ready = len(await self._left(admin, queue, queue))
            due_at = [_due_at(r) for r in await self._left(admin, f"{own}.retry", queue)]
            dead = len(await self._left(admin, f"{own}.dead", f"{queue}.dead"))
            delayed = sum(seconds > time.time() for seconds in due_at)
            return Counts(ready + len(due_at) - delayed, delayed, dead)

        return self._ask(count)

    async def _left(self, admin: AIOKafkaAdminClient, topic: str, group: str) -> list[Any]:
        """The records that the group has not committed yet."""
        if topic not in await admin.list_topics():  # to request its metadata would create it
            return []
        [described] = await admin.describe_topics([topic])
        partitions = [TopicPartition(topic, p["partition"]) for p in described["partitions"]]
        reader = AIOKafkaConsumer(
            bootstrap_servers=self._address,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,
        )
        await reader.start()
        try:
            reader.assign(partitions)
            records: list[Any] = []
            ends: dict[TopicPartition, int | None] = dict.fromkeys(partitions)
            while any([end is None or await reader.position(tp) < end for tp, end in ends.items()]):
                for found in (await reader.getmany(timeout_ms=5)).values():
                    records += found
                ends = {tp: reader.highwater(tp) for tp in partitions}
            return records
        finally:
            await reader.stop()

    def consumers(self, queue: str) -> int:
        async def count(admin: AIOKafkaAdminClient) -> int:
            [response] = await admin.describe_consumer_groups([queue])
            return len(response.groups[0][5])

        return self._ask(count)

    def delete(self, queue: str) -> None:
        async def delete(admin: AIOKafkaAdminClient) -> None:
            topics = [
                t for t in await admin.list_topics() if t == queue or t.startswith(f"{queue}.")
            ]
            with suppress(KafkaError):
                await admin.delete_topics(topics)

        self._ask(delete)

    def _ask(self, question: Callable[[AIOKafkaAdminClient], Coroutine[Any, Any, T]]) -> T:
        with ThreadPoolExecutor(1) as thread:  # the test may have an event loop of its own
            return thread.submit(asyncio.run, _ask(self._address, question)).result()


async def _ask(
    address: str, question: Callable[[AIOKafkaAdminClient], Coroutine[Any, Any, T]]
) -> T:
    admin = AIOKafkaAdminClient(bootstrap_servers=address, request_timeout_ms=10_000)
    try:
        await admin.start()
        return await question(admin)
    finally:
        await admin.close()


def _due_at(record: Any) -> float:
    return float(dict(record.headers).get("x-consumer-due-at", 0))  # 0 if it is replayed


class PrivateKafka(KafkaServer, PrivateServer):
    """A private server, on this port."""

    def __init__(self, port: int, instance: ServerProcess) -> None:
        super().__init__(f"kafka://127.0.0.1:{port}{OPTIONS}")
        self.instance = instance


def most_repeated(prefetch: int) -> float:
    """The in-flight messages, and the messages acked since the last commit."""
    return prefetch + 50


@contextmanager
def private(directory: Path) -> Iterator[PrivateServer]:
    command = os.environ.get("CONSUMER_TEST_BROKER_COMMAND")
    (port,) = free_ports(1)
    if command is not None:
        arguments = [
            argument.format(port=port, directory=directory) for argument in shlex.split(command)
        ]
        instance: ServerProcess = ServerProcess(arguments, directory, lambda: _answers(port))
    elif has_docker():
        instance = ServerContainer(
            IMAGE, 9092, port, directory, lambda: _answers(port), *_environment(port)
        )
    else:
        raise ServerMissing(
            "there is no Kafka for the tests: CONSUMER_TEST_BROKER_URL names none, CONSUMER_TEST_BROKER_COMMAND "
            "says how to start none, and there is no docker"
        )
    try:
        yield PrivateKafka(port, instance)
    finally:
        instance.close()


def shared(directory: Path) -> AbstractContextManager[Server]:
    url = os.environ.get("CONSUMER_TEST_BROKER_URL", "")
    is_ours = url.startswith("kafka")
    return (
        nullcontext(KafkaServer(url if "?" in url else f"{url}{OPTIONS}"))
        if is_ours
        else private(directory)
    )


def _environment(port: int) -> list[str]:
    variables = {
        "NODE_ID": "1",
        "PROCESS_ROLES": "broker,controller",
        "LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
        "LISTENER_SECURITY_PROTOCOL_MAP": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
    }
    return [
        option for name, value in variables.items() for option in ("-e", f"KAFKA_{name}={value}")
    ]


def _answers(port: int) -> bool:
    """Whether there is a broker: the port alone may be open earlier."""

    async def has_brokers(admin: AIOKafkaAdminClient) -> bool:
        return bool((await admin.describe_cluster())["brokers"])

    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(asyncio.run, _ask(f"127.0.0.1:{port}", has_brokers)).result()
        except (KafkaError, OSError):
            return False
