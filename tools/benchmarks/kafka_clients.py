"""The abilities of two clients of Kafka: aiokafka, and librdkafka by confluent-kafka's asyncio consumer.

Each figure is counted on a real broker; their CPU per message is in per_message.py. The decision on these figures
is in docs/decisions.md.
"""

import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import KafkaError
from confluent_kafka import KafkaException
from confluent_kafka import TopicPartition as Place
from confluent_kafka.aio import AIOConsumer, AIOProducer

from harness.servers import ServerMissing, server_module
from tools.benchmarks.figures import Figure
from tools.benchmarks.service import Unavailable
from tools.kafka import variables_for

PARTITIONS = 12
MESSAGES = 2_000
CANCELLATIONS = 200
PATIENCE_SECONDS = 60


class Aiokafka(ConsumerRebalanceListener):  # type: ignore[misc]
    name = "aiokafka"

    def __init__(self, address: str, topic: str, instance: str = "", **options: Any) -> None:
        self.topic, self.group = topic, topic
        self.rebalances = self.taken = 0
        self.share: set[int] = set()
        self.seen: list[bytes] = []
        self.consumer = AIOKafkaConsumer(
            bootstrap_servers=address,
            group_id=self.group,
            group_instance_id=instance or None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            heartbeat_interval_ms=500,
            partition_assignment_strategy=(StickyPartitionAssignor,),
        )
        self.consumer.subscribe([topic], listener=self)

    def on_partitions_revoked(self, revoked: Any) -> None:
        self.taken += len(revoked)
        self.share.clear()

    def on_partitions_assigned(self, assigned: Any) -> None:
        self.rebalances += 1
        self.share = {place.partition for place in assigned}

    async def start(self) -> None:
        await self.consumer.start()

    async def fetch(self) -> None:
        batches = await self.consumer.getmany(timeout_ms=100, max_records=100)
        self.seen += [record.value for records in batches.values() for record in records]

    async def commit(self) -> None:
        await self.consumer.commit()

    async def close(self) -> None:
        await self.consumer.stop()

    async def commit_as_a_zombie(self, address: str, rebalance: Any) -> None:
        """Commit in a transaction, for a member from before the rebalance."""
        producer = AIOKafkaProducer(bootstrap_servers=address, transactional_id=self.group)
        async with producer:
            await rebalance()
            async with producer.transaction():
                offsets = {TopicPartition(self.topic, 0): 1}
                await producer.send_offsets_to_transaction(offsets, self.group)


class Librdkafka:
    name = "confluent-kafka (librdkafka)"

    def __init__(
        self, address: str, topic: str, instance: str = "", protocol: str = "classic"
    ) -> None:
        self.topic, self.group = topic, topic
        self.rebalances = self.taken = 0
        self.share: set[int] = set()
        self.seen: list[bytes] = []
        config: dict[str, Any] = {"bootstrap.servers": address, "group.id": topic}
        config |= {"group.protocol": protocol}
        config |= {"enable.auto.commit": False, "auto.offset.reset": "earliest"}
        if protocol == "classic":
            config |= {"partition.assignment.strategy": "cooperative-sticky"}
            config |= {"heartbeat.interval.ms": 500}
        if instance:
            config["group.instance.id"] = instance
        self.consumer = AIOConsumer(config)

    async def start(self) -> None:
        async def assigned(consumer: Any, places: Any) -> None:
            self.rebalances += 1
            self.share |= {place.partition for place in places}

        async def revoked(consumer: Any, places: Any) -> None:
            self.taken += len(places)
            self.share -= {place.partition for place in places}

        await self.consumer.subscribe([self.topic], on_assign=assigned, on_revoke=revoked)

    async def fetch(self) -> None:
        records = await self.consumer.consume(100, 0.1)
        self.seen += [record.value() for record in records if not record.error()]

    async def commit(self) -> None:
        with suppress(KafkaException):  # if there is nothing new to commit
            await self.consumer.commit(asynchronous=False)

    async def close(self) -> None:
        await self.consumer.close()

    async def commit_as_a_zombie(self, address: str, rebalance: Any) -> None:
        """Commit in a transaction, for a member from before the rebalance."""
        producer = AIOProducer({"bootstrap.servers": address, "transactional.id": self.group})
        await producer.init_transactions()
        member = await self.consumer.consumer_group_metadata()
        await rebalance()
        await producer.begin_transaction()
        try:
            await producer.send_offsets_to_transaction([Place(self.topic, 0, 1)], member)
            await producer.commit_transaction()
        finally:
            with suppress(KafkaException):
                await producer.abort_transaction()
            await producer.close()


Client = Aiokafka | Librdkafka


def measure(rounds: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, variables_for("kafka")):
        try:
            with server_module("kafka").private(Path(folder)) as server:
                address = urlsplit(server.url).netloc
                rows = [asyncio.run(_measure(address)) for _ in range(rounds)]
        except ServerMissing as missing:
            raise Unavailable(str(missing)) from None
    part = f"Kafka's clients: {PARTITIONS} partitions, {MESSAGES:,} messages"
    for client in (Aiokafka, Librdkafka):
        for name, unit in dict.fromkeys((key[1], key[2]) for row in rows for key in row):
            values = [row[client.name, name, unit] for row in rows]
            yield Figure(part, f"{client.name}: {name}", values, unit)


Row = dict[tuple[str, str, str], float]


async def _measure(address: str) -> Row:
    row: Row = {}
    for client in (Aiokafka, Librdkafka):
        for name, unit, scene in (
            ("partitions revoked from a member when a second one joins", "", _cooperative),
            ("rebalances by a restart of a static member", "", _static),
            ("offsets stored by a member of before a rebalance, in a transaction", "", _zombie),
            ("close while fetching", "s", _close),
            ("messages repeated after commit and close", "", _repeated),
            (f"messages lost by {CANCELLATIONS} cancelled fetches", "", _cancelled),
        ):
            row[client.name, name, unit] = await scene(client, address)
    joined = "members that join by KIP-848"
    row[Aiokafka.name, joined, ""] = 0.0  # it has no such option
    row[Librdkafka.name, joined, ""] = await _new_protocol(address)
    return row


@asynccontextmanager
async def _topic(address: str, messages: int = 0) -> AsyncIterator[str]:
    name = f"clients-{uuid.uuid4().hex[:8]}"
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    await admin.create_topics([NewTopic(name, PARTITIONS, 1)])
    async with AIOKafkaProducer(bootstrap_servers=address) as producer:
        sent = [await producer.send(name, b"%d" % number) for number in range(messages)]
        await asyncio.gather(*sent)
    yield name
    await admin.delete_topics([name])
    await admin.close()


async def _until(done: Any, *members: Client) -> None:
    """Fetch with all members meanwhile, since librdkafka rebalances only then."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not done():
            await asyncio.gather(*(member.fetch() for member in members))


async def _start(*members: Client) -> None:
    for number, member in enumerate(members, 1):
        await member.start()
        joined = members[:number]
        await _until(lambda: sum(len(m.share) for m in joined) == PARTITIONS, *joined)  # noqa: B023
        await _until(lambda: all(m.share for m in joined), *joined)  # noqa: B023


async def _cooperative(client: Any, address: str) -> float:
    async with _topic(address) as topic:
        one, two = client(address, topic), client(address, topic)
        await _start(one, two)
        taken = one.taken
        for member in (one, two):
            await member.close()
        return float(taken)


async def _static(client: Any, address: str) -> float:
    async with _topic(address) as topic:
        one, two, again = (client(address, topic, instance) for instance in ("1", "2", "2"))
        await _start(one, two)
        before = one.rebalances
        await two.close()
        await again.start()
        await _until(lambda: again.share, one, again)
        for member in (one, again):
            await member.close()
        return float(one.rebalances - before)


async def _zombie(client: Any, address: str) -> float:
    async with _topic(address) as topic:
        one, two = client(address, topic), client(address, topic)
        await _start(one)

        async def rebalance() -> None:
            await two.start()
            await _until(lambda: one.share and two.share, one, two)

        try:
            await one.commit_as_a_zombie(address, rebalance)
            return 1.0
        except (KafkaError, KafkaException):
            return 0.0
        finally:
            for member in (one, two):
                await member.close()


async def _close(client: Any, address: str) -> float:
    async with _topic(address, MESSAGES) as topic:
        member = client(address, topic)
        await _start(member)
        await member.fetch()
        began_at = time.perf_counter()
        await member.close()
        return time.perf_counter() - began_at


async def _repeated(client: Any, address: str) -> float:
    """The repeated messages among all that two members fetch one after the other."""
    async with _topic(address, MESSAGES) as topic:
        seen: list[bytes] = []
        for wanted in (MESSAGES // 2, MESSAGES):
            member = client(address, topic)
            member.seen = seen
            await member.start()
            await _until(lambda: len({*seen}) >= wanted, member)  # noqa: B023
            await member.commit()
            await member.close()
        return float(len(seen) - MESSAGES)


async def _cancelled(client: Any, address: str) -> float:
    async with _topic(address, MESSAGES) as topic:
        member = client(address, topic)
        await _start(member)
        for number in range(CANCELLATIONS):
            fetching = asyncio.create_task(member.fetch())
            await asyncio.wait({fetching}, timeout=number % 10 / 2_000)
            fetching.cancel()
            with suppress(asyncio.CancelledError):
                await fetching
        quiet = 0
        while quiet < 10:
            before = len(member.seen)
            await member.fetch()
            quiet = 0 if len(member.seen) > before else quiet + 1
        await member.close()
        return float(MESSAGES - len({*member.seen}))


async def _new_protocol(address: str) -> float:
    async with _topic(address) as topic:
        member = Librdkafka(address, topic, protocol="consumer")
        await _start(member)
        await member.close()
        return 1.0
