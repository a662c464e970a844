"""Kafka alone: groups and offsets, outages, retries. Tests of every broker are in test_every_source.py."""

import asyncio
import base64
import gc
import json
import math
import random
import ssl
import subprocess
import sys
import time
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from copy import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.conn import AIOKafkaConnection
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    InvalidPartitionsError,
    InvalidReplicationFactorError,
    KafkaError,
    TopicAuthorizationFailedError,
)
from aiokafka.record.util import calc_crc32c
from aiokafka.structs import OffsetAndMetadata
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from consumer_harness import ConsumerHarness
from harness.contract import eventually, opened, take
from harness.servers import Counts, Server
from harness.servers.kafka import PARTITIONS, SESSION_SECONDS
from harness.servers.proxy import KafkaProxy
from runtime.brokers import (
    kafka,
    make_source,
)
from runtime.brokers.delivery import ATTEMPTS, KEY, SHORTENED
from runtime.brokers.kafka import (
    KafkaBroker,
    delays_seconds,
)
from runtime.brokers.source import MISSING
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.errors import BrokerDenied, BrokerError, BrokerRefused, SourceFailed
from runtime.handlers import Router
from runtime.message import (
    Message,
    OutgoingMessage,
    Reject,
    Retry,
)
from runtime.settings import ConsumerSettings
from steps import (
    Event,
    ack_all,
    consume,
    eventually_counts,
    eventually_logged,
    find,
    ids,
    last,
    length_of,
    publish,
)

AT_ONCE_SECONDS = 1.0

pytestmark = pytest.mark.parametrize("broker", ["kafka"], indirect=True, scope="session")

SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": 0.8}

WAIT_SECONDS = 30

Connect = Callable[..., AbstractAsyncContextManager[KafkaBroker]]


def answer_to_create(
    monkeypatch: pytest.MonkeyPatch, error: type[KafkaError], *, unless: Callable[[NewTopic], bool]
) -> list[list[NewTopic]]:
    """Kafka's refusal to create topics, except for the first if that is true; returns the requested topics."""
    create = AIOKafkaAdminClient.create_topics
    asked: list[list[NewTopic]] = []

    async def answer(admin: AIOKafkaAdminClient, topics: list[NewTopic]) -> Any:
        asked.append([copy(topic) for topic in topics])
        if unless(topics[0]):
            return await create(admin, topics)
        return SimpleNamespace(topic_errors=[(t.name, error.errno, "it says why") for t in topics])

    monkeypatch.setattr(AIOKafkaAdminClient, "create_topics", answer)
    return asked


async def commits() -> bool:
    """Whether a commit is in progress."""
    return any("_do_commit_offsets" in repr(task) for task in asyncio.all_tasks())


async def all_of(published: list[str], handled: list[str]) -> bool:
    return {*handled} >= {*published}


def with_key(key: str, count: int) -> list[OutgoingMessage]:
    """Messages for one partition."""
    return [OutgoingMessage(b"%d" % number, headers={KEY: key}) for number in range(count)]


async def produce(
    broker: Server, queue: str, compression_type: str | None = None, **record: Any
) -> None:
    """Produce a record of another producer."""
    producer = AIOKafkaProducer(
        bootstrap_servers=urlsplit(broker.url).netloc,
        compression_type=compression_type,
        max_request_size=2**30,  # before compression
        max_batch_size=2**30,
    )
    await producer.start()
    try:
        await producer.send_and_wait(queue, **record)
    finally:
        await producer.stop()


async def produce_names(broker: Server, queue: str, names: list[bytes]) -> None:
    """One batch of records to partition 0, each with a header of such a name; aiokafka itself encodes only text."""
    async with AIOKafkaProducer(bootstrap_servers=urlsplit(broker.url).netloc) as producer:
        batch = producer.create_batch()
        for name in names:
            placeholder = [("-" * len(name), b"value")]
            batch.append(key=None, value=b"body", timestamp=None, headers=placeholder)
        batch.close()
        data = batch._build()
        for name in names:
            data[:] = data.replace(b"-" * len(name), name, 1)
        data[17:21] = calc_crc32c(data[21:]).to_bytes(4, "big")
        await (await producer.send_batch(batch, queue, partition=0))


def own(queue: str, kind: str = "") -> str:
    """The topic of the tests' group; without a kind, the topic of all groups."""
    return f"{queue}.{queue}{kind}" if kind else queue


RETRY, DEAD = ".retry", ".dead"


async def admin_of(broker: Server, ask: Callable[[AIOKafkaAdminClient], Any]) -> Any:
    admin = AIOKafkaAdminClient(bootstrap_servers=urlsplit(broker.url).netloc)
    await admin.start()
    try:
        return await ask(admin)
    finally:
        await admin.close()


async def make_topic(broker: Server, name: str, most_bytes: int) -> None:
    """Create a topic like an operator."""
    topic = NewTopic(name, 1, 1, topic_configs={"max.message.bytes": str(most_bytes)})
    await admin_of(broker, lambda admin: admin.create_topics([topic]))


async def produce_many(broker: Server, queue: str, count: int) -> None:
    """Produce one batch to partition 0."""
    async with AIOKafkaProducer(bootstrap_servers=urlsplit(broker.url).netloc) as producer:
        sent = [await producer.send(queue, b"%d" % n, partition=0) for n in range(count)]
        await asyncio.gather(*sent)


async def delete_below(broker: Server, queue: str, offset: int) -> None:
    """Delete records like the broker's retention."""
    below = {TopicPartition(queue, 0): RecordsToDelete(offset)}
    await admin_of(broker, lambda admin: admin.delete_records(below))


async def commit_of(source: KafkaBroker, topic: str, partition: int) -> OffsetAndMetadata:
    """The commit of the tests' group."""
    tp = TopicPartition(topic, partition)
    async with source._reader(topic, topic) as reader:
        commits = await reader._coordinator.fetch_committed_offsets([tp])
        return commits.get(tp, OffsetAndMetadata(-1, ""))


async def commit_as_other(
    broker: Server, queue: str, partition: int, offset: int, metadata: str
) -> None:
    """Commit like `kafka-consumer-groups --reset-offsets`, while the group has no member."""
    other = AIOKafkaConsumer(
        bootstrap_servers=urlsplit(broker.url).netloc, group_id=queue, enable_auto_commit=False
    )
    await other.start()
    try:
        tp = TopicPartition(queue, partition)
        other.assign([tp])
        await other.commit({tp: OffsetAndMetadata(offset, metadata)})
    finally:
        await other.stop()


MARKS = base64.b64encode(zlib.compress(b"\xff")).decode()
"""Marks like those of our metadata, without our name."""

ODD_RECORDS: dict[str, tuple[str, list[tuple[str, bytes | None]]]] = {
    "a header that is listed as JSON is gone": ("", [(kafka.JSON_HEADERS, b'["gone"]')]),
    "the list of JSON headers is null": ("", [(kafka.JSON_HEADERS, None)]),
    "the list of JSON headers is a number": ("", [(kafka.JSON_HEADERS, b"7")]),
    "ce_id is not UTF-8": ("", [("ce_id", b"\xff")]),
    "the id is not UTF-8": ("", [(kafka.ID, b"\xff")]),
    "the id is null": ("", [(kafka.ID, None)]),
    "ce_type is null": ("", [("ce_type", None)]),
    "ce_type is not UTF-8": ("", [("ce_type", b"\xff")]),
    "the type is not UTF-8": ("", [(kafka.TYPE, b"\xff")]),
    "the attempts are no number": ("", [("ce_type", b"order"), (ATTEMPTS, b"\xff")]),
    "the time of a retry is null": (RETRY, [("ce_type", b"order"), (kafka.DUE_AT, None)]),
    "the time of a retry is no number": (RETRY, [("ce_type", b"order"), (kafka.DUE_AT, b"x")]),
}
"""Records of another program, in the topic or in that of its retries."""

OUR_HEADERS = [kafka.JSON_HEADERS, kafka.ID, kafka.TYPE, KEY, kafka.ORIGIN, *kafka.HISTORY]
HEADER_NAMES = st.sampled_from([*OUR_HEADERS, "ce_id", "ce_type", "a"]) | st.text()
HEADER_VALUES = st.sampled_from(
    [b"1e999", b"nan", b"-1", b"9" * 5000, b"[" * 10_000, b'["a", "x-consumer-attempts"]', b"{}"]
)


RECORDS = st.lists(
    st.tuples(
        st.none() | st.binary(),
        st.none() | st.binary() | HEADER_VALUES,
        st.lists(st.tuples(HEADER_NAMES, st.none() | st.binary() | HEADER_VALUES), max_size=4),
    ),
    max_size=30,
)
"""Keys, values and headers."""


async def produce_any(broker: Server, topic: str, records: list[Any]) -> None:
    """One batch to partition 0, including records that aiokafka's own `send` refuses."""
    host = urlsplit(broker.url).netloc
    async with AIOKafkaProducer(bootstrap_servers=host, max_batch_size=2**20) as producer:
        batch = producer.create_batch()
        for key, value, headers in records:
            assert batch.append(key=key, value=value, timestamp=None, headers=headers)
        await (await producer.send_batch(batch, topic, partition=0))


async def dead_letter_all(settings: ConsumerSettings, count: int) -> None:
    """Run a consumer with a handler that fails, until there are this many dead letters."""

    async def fail(body: bytes, message: Message) -> None:
        raise Retry if message.attempt == 1 else Reject("bad")

    event = CancellationEvent(asyncio.get_running_loop())
    consumer = Consumer(make_source(settings, 50), Router({"any": fail}), event, settings)
    consuming = asyncio.create_task(consumer.run())

    async def counted() -> object:
        async with make_source(settings) as reader:
            assert not consuming.done()
            return await reader.count_dead_letters()

    await eventually(count, counted)
    event.set("test")
    assert await consuming == 0


async def consume_until_rejected(settings: ConsumerSettings) -> int:
    """Run a consumer with handlers that fail, until it has rejected one message; returns its exit code."""

    async def fail(body: bytes) -> None:
        raise ValueError

    event = CancellationEvent(asyncio.get_running_loop())
    router = Router({"order": fail, "other": fail})
    consumer = Consumer(make_source(settings), router, event, settings)
    consuming = asyncio.create_task(consumer.run())

    async def rejected() -> bool:
        return consumer.rejected_count == 1 or consuming.done()

    await eventually(True, rejected)
    event.set("test")
    return await consuming


@contextmanager
def little_memory(more_bytes: int) -> Iterator[None]:
    """This process may allocate at most this many more bytes."""
    if sys.platform != "linux":
        pytest.skip("only Linux holds a process to RLIMIT_AS")
    import resource  # not on every system

    gc.collect()  # later frees would add room
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + more_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class TestOffsets:
    @pytest.mark.parametrize("retried", [False, True], ids=["a message", "a retry"])
    async def test_messages_acked_after_an_unacked_one_of_their_partition_are_not_redelivered(
        self, connect: Connect, broker: Server, queue: str, retried: bool
    ) -> None:
        async with connect() as source:
            await source.publish(with_key("one", 5))
            if retried:
                for message in await take(source, 5):
                    await source.retry(message, 0.1, "not now")
            first, second, *others = await take(source, 5)
            await source.ack(first)
            for message in others:
                await source.ack(message)
            await source.stop()
            await source.requeue(second)
        async with connect() as source:
            (again,) = await take(source, 1)
            assert (again.id, again.attempt) == (second.id, 1 + retried)
            await source.publish(with_key("one", 1))
            (new,) = await take(source, 1)
            assert new.id not in ids([first, second, *others])
            await source.ack(again)
            await source.ack(new)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_what_the_next_process_did_not_get_as_far_as_stays_marked(
        self, connect: Connect
    ) -> None:
        settled: list[bytes] = []
        async with connect() as source:
            await source.publish(with_key("one", 20))
        for prefetch in (10, 2, 2, 20):
            async with connect(prefetch=prefetch) as source:
                messages = await take(source, min(prefetch, 20 - len(settled)))
                await source.stop()
                left = 0 if prefetch == 20 else prefetch // 2
                for message in messages[left:]:
                    await source.ack(message)
                    settled.append(message.body)
                for message in messages[:left]:
                    await source.requeue(message)
        assert sorted(settled, key=int) == [b"%d" % number for number in range(20)]

    async def test_what_is_acked_behind_an_in_flight_message_is_committed_before_a_crash(
        self, connect: Connect, queue: str
    ) -> None:
        async with connect() as source:
            await source.publish(with_key("one", 4))
            first, _, *others = await take(source, 4)
            partition = first.origin["partition"]

            async def committed() -> object:
                commit = await commit_of(source, queue, partition)
                return commit.offset, kafka._offsets_of(commit)

            await source.ack(first)
            await eventually((1, set()), committed)
            for message in others:
                await source.ack(message)
            await eventually((1, {2, 3}), committed)

    async def test_shutdowns_of_an_ordered_consumption_repeat_nothing(
        self, harness: ConsumerHarness
    ) -> None:
        steps = [(number % 5, number) for number in range(600)]
        handled: list[tuple[int, int]] = []

        async def handle(body: bytes) -> None:
            key, number = json.loads(body)["step"]
            await asyncio.sleep(0.001 * key)
            handled.append((key, number))

        published = [json.dumps({"key": key, "step": [key, n]}).encode() for key, n in steps]
        for count in (200, 400, 600):
            _, consumer = await harness.run(
                published,
                lambda _, count=count: len({*handled}) >= count,  # type: ignore[misc]
                key="one partition",
                handlers={"any": handle},
                order_by="body:key",
                concurrency=4,
                prefetch=100,
            )
            published = []
            if count < 600:
                assert consumer.source.requeued_count > 0
        assert len(handled) == 600
        for key in range(5):
            assert [step for step in handled if step[0] == key] == [s for s in steps if s[0] == key]
        assert harness.left == (0, 0)

    async def test_at_the_deadline_only_the_abandoned_message_is_repeated(
        self, harness: ConsumerHarness
    ) -> None:
        handled: list[bytes] = []

        async def handle(body: bytes) -> None:
            if body == b"1" and len(handled) < 9:
                await asyncio.Event().wait()
            handled.append(body)

        bodies = [b"%d" % number for number in range(10)]
        run = partial(harness.run, key="one partition", handlers={"any": handle})
        await run(bodies, lambda _: len(handled) == 9, drain_seconds=0)
        await run([b"new"], lambda _: b"new" in handled and b"1" in handled)
        assert Counter(handled) == Counter([*bodies, b"new"])

    @pytest.mark.parametrize(
        "metadata",
        ["", MARKS, f"x-other-settled:{MARKS}"],
        ids=["none", "without our name", "with another name"],
    )
    async def test_after_another_program_has_reset_the_offsets_all_messages_are_delivered(
        self, connect: Connect, broker: Server, queue: str, metadata: str
    ) -> None:
        async with connect() as source:
            await source.publish(with_key("one", 5))
            first, *others = taken = await take(source, 5)
            for message in others:
                await source.ack(message)
            await source.stop()
            await source.requeue(first)
            partition = first.origin["partition"]
        async with connect() as source:
            assert ids(await take(source, 1)) == [first.id]
            assert kafka._offsets_of(await commit_of(source, queue, partition)) == {1, 2, 3, 4}
        await commit_as_other(broker, queue, partition, 0, metadata)
        async with connect() as source:
            assert ids(await take(source, 5)) == ids(taken)

    async def test_messages_of_a_key_are_in_one_partition_with_those_of_other_producers(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        keys = [f"customer-{number}" for number in range(8)]
        async with connect(prefetch=20) as source:
            for key in keys:
                await source.publish(with_key(key, 1))
                await produce(broker, queue, key=key.encode(), value=b"of another")
            taken = await take(source, 16)
        places = {(message.key, message.origin["partition"]) for message in taken}
        assert len(places) == len(keys)

    async def test_what_is_published_after_a_process_without_work_has_ended_goes_to_the_next(
        self, connect: Connect, broker: Server, queue: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kafka, "POLL_SECONDS", 0.1)
        at = TopicPartition(queue, 0)
        async with connect() as source:
            await produce_many(broker, queue, 3)
            await ack_all(source, 3)
            await source.stop()

        async def looked() -> bool:
            return at in source._partitions

        async with connect() as source:
            await eventually(True, looked)  # it found nothing
            await source.stop()
        async with connect(prefetch=0) as source:
            assert await commit_of(source, *at) == (3, "")
        await produce_many(broker, queue, 2)
        async with connect() as source:
            assert [message.receipt[1].offset for message in await take(source, 2)] == [3, 4]

    async def test_marks_of_a_topic_that_was_created_again_skip_no_message(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=0):
            pass  # connecting creates the topics
        await produce_many(broker, queue, 5)
        await commit_as_other(broker, queue, 0, 10, kafka._metadata_of(10, {11, 12, 13}))
        async with connect(prefetch=20) as source:
            taken = await take(source, 5)
            await eventually_logged(events, "partition_restarted")
            await produce_many(broker, queue, 15)
            taken += await take(source, 15)
        assert [message.receipt[1].offset for message in taken] == [*range(20)]

    async def test_marked_messages_that_no_longer_exist_block_no_commit(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """An example is the first message, which retention has deleted when the others are settled."""
        async with connect(prefetch=0):
            pass
        await produce_many(broker, queue, 6)
        await commit_as_other(broker, queue, 0, 1, kafka._metadata_of(1, {2, 3, 4, 5}))
        await delete_below(broker, queue, 2)
        async with connect(), connect(prefetch=0) as reader:
            await eventually((6, ""), partial(commit_of, reader, queue, 0))

    async def test_without_room_for_marks_the_offset_is_still_committed(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch, queue: str
    ) -> None:
        """The broker's limit may be lower than ours."""
        monkeypatch.setattr(kafka, "_packed", lambda bits: "x" * 5000 if bits else "")
        async with connect() as source:
            source._most_metadata_bytes = 5000
            await source.publish(with_key("one", 3))
            first, _, last = await take(source, 3)
            await source.ack(first)
            await source.ack(last)
            partition = first.origin["partition"]
            await eventually((1, ""), partial(commit_of, source, queue, partition))

    async def test_acks_are_committed_together(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commits = []
        async with connect(prefetch=1000) as source:
            commit = source._consumer.commit  # type: ignore[union-attr]

            async def count(offsets: dict[Any, OffsetAndMetadata]) -> None:
                commits.append(offsets)
                await commit(offsets)

            monkeypatch.setattr(source._consumer, "commit", count)
            await publish(source, 500)
            for message in await take(source, 500):
                await source.ack(message)
                await asyncio.sleep(0)  # let other tasks run
        assert sum(commit.offset for commit in commits[-1].values()) >= 500 / PARTITIONS
        assert len(commits) <= 3

    async def test_prefetch_is_never_exceeded(self, connect: Connect) -> None:
        async with connect(prefetch=3) as source:
            unacked: set[str] = set()
            most = 0
            put = source.buffer.put

            def count(message: Message) -> None:
                nonlocal most
                unacked.add(message.id)
                most = max(most, len(unacked))
                put(message)

            source.buffer.put = count  # type: ignore[method-assign]
            await publish(source, 60)
            for _ in range(20):
                for message in await take(source, 3):
                    unacked.discard(message.id)
                    await source.ack(message)
            assert most == 3

    async def test_messages_of_one_key_stay_in_order(self, connect: Connect) -> None:
        async with connect(prefetch=3) as source:
            batches = [with_key(key, 30) for key in ("red", "green", "blue")]
            await source.publish(
                [message for batch in zip(*batches, strict=True) for message in batch]
            )
            bodies: dict[str, list[int]] = {"red": [], "green": [], "blue": []}
            for _ in range(90):
                (message,) = await take(source, 1)
                bodies[message.headers[KEY]].append(int(message.body))
                await source.ack(message)
            assert list(bodies.values()) == [list(range(30))] * 3

    @pytest.mark.very_slow
    async def test_a_handler_may_take_longer_than_any_timeout(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            await asyncio.sleep(2 * SESSION_SECONDS)
            await source.ack(message)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))
        assert len(find(events, "partitions_assigned")) == 1


class TestGroups:
    async def test_members_that_join_and_leave_in_mid_work_lose_nothing_and_repeat_nothing(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        handled: list[str] = []

        async def work(source: KafkaBroker) -> None:
            async for message in source:
                await asyncio.sleep(random.uniform(0, 0.03))
                handled.append(message.id)
                await source.ack(message)

        @asynccontextmanager
        async def member() -> AsyncIterator[None]:
            async with connect(prefetch=8) as source:
                workers = [asyncio.create_task(work(source)) for _ in range(8)]
                yield
                await source.stop()
                await asyncio.gather(*workers)

        async with connect(prefetch=0) as publisher:
            published = await publish(publisher, 3000)
        async with AsyncExitStack() as first, AsyncExitStack() as others:
            await first.enter_async_context(member())
            await others.enter_async_context(member())
            await first.aclose()
            await others.enter_async_context(member())
            await eventually(len(published), length_of(handled))
        assert Counter(handled) == Counter(published)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_a_member_that_polls_while_a_rebalance_waits_for_another_commits_as_before(
        self,
        connect: Connect,
        broker: Server,
        queue: str,
        shorten: Callable[..., None],
        monkeypatch: pytest.MonkeyPatch,
        events: list[Event],
    ) -> None:
        """The poll still sees the earlier partitions, with their records, which are dropped."""
        shorten(0.2, "POLL_SECONDS")
        patient = f"{broker.url}&rebalance_timeout_seconds=20"

        async def dropped() -> bool:
            return any(event["dropped"] for event in find(events, "partitions_revoked"))

        async with (
            connect(prefetch=50, broker_url=patient) as one,
            connect(prefetch=1, broker_url=patient) as slow,
            AsyncExitStack() as third,
        ):
            published = await publish(one, 40)
            (held,) = await take(slow, 1)
            polled_after: list[bool] = []
            getmany = one._consumer.getmany  # type: ignore[union-attr]

            async def note(**arguments: Any) -> Any:
                polled_after.append(await dropped())
                return await getmany(**arguments)

            async def polled() -> bool:
                return any(polled_after)

            monkeypatch.setattr(one._consumer, "getmany", note)
            joining = asyncio.create_task(
                third.enter_async_context(connect(50, broker_url=patient))
            )
            await eventually(True, polled)
            await one.flush()
            await slow.ack(held)
            sources, handled = [one, slow, await joining], [held.id]
            workers = [asyncio.create_task(consume(source, handled)) for source in sources]
            await eventually(True, lambda: all_of(published, handled))
            for source in sources:
                await source.stop()
            await asyncio.gather(*workers)
            assert Counter(handled) == Counter(published)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_a_message_that_outlasts_a_rebalance_is_redelivered_and_its_ack_is_lost(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect() as one:
            await publish(one, 20)
            held = await take(one, 1)
            async with connect() as other:
                await one.ack(held[0])
                assert [event["message_id"] for event in find(events, "settlement_lost")] == ids(
                    held
                )
                handled: list[str] = []

                async def work(source: KafkaBroker) -> None:
                    async for message in source:
                        handled.append(message.id)
                        await source.ack(message)

                workers = [asyncio.create_task(work(source)) for source in (one, other)]
                await eventually(20, length_of(handled))
                await asyncio.gather(one.stop(), other.stop())
                await asyncio.gather(*workers)
        assert held[0].id in handled
        assert {event["in_flight"] for event in find(events, "partitions_revoked")} == {0, 1}

    async def test_the_partitions_of_a_dead_consumer_are_reassigned(
        self, connect: Connect, proxy: KafkaProxy, broker: Server
    ) -> None:
        async with connect(prefetch=0) as publisher, connect(broker_url=proxy.url) as dead:
            published = await publish(publisher, 12)
            await take(dead, 2)
            proxy.refuse()
            began_at = time.monotonic()
            async with connect(prefetch=12) as other:
                assert Counter(ids(await take(other, 12))) == Counter(published)
                assert time.monotonic() - began_at < 3 * SESSION_SECONDS

    async def test_another_client_with_another_assignor_is_one_sentence(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=0):
            pass  # connecting creates the topics
        other = AIOKafkaConsumer(
            queue,
            bootstrap_servers=urlsplit(broker.url).netloc,
            group_id=queue,
            partition_assignment_strategy=(StickyPartitionAssignor,),
        )
        await other.start()
        try:
            with pytest.raises(BrokerRefused, match="another client in the consumer group"):
                async with connect():
                    pass
        finally:
            await other.stop()

    async def test_a_message_that_is_in_flight_in_this_process_is_not_started_twice(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=20) as one:
            await publish(one, 8)
            held = await take(one, 8)
            one.in_flight = held
            async with connect(prefetch=1):  # the rebalance does not wait long enough for them
                pass
            await eventually_logged(events, "partitions_assigned", count=3)

            async def regained() -> bool:
                return one.unacked == set(held)

            await eventually(True, regained)
            assert len(one.buffer) == 0
            for message in held:
                await one.ack(message)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))
        assert not find(events, "settlement_lost")

    async def test_a_consumer_that_gets_no_more_answers_is_replaced(
        self, connect: Connect, events: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kafka, "STUCK_SECONDS", 1.5)
        async with connect() as source:
            stuck: Any = source._consumer
            stuck._fetcher._fetch_task.cancel()
            await eventually_logged(events, "connected", count=2)
            published = await publish(source, 5)
            assert Counter(await ack_all(source, 5)) == Counter(published)
            assert source._consumer is not stuck
        lost, *_ = find(events, "reconnecting")
        assert "no answer to a fetch" in lost["reason"]


class TestOutages:
    async def test_a_retry_that_cannot_be_stored_is_handled_again(
        self,
        connect: Connect,
        proxy: KafkaProxy,
        events: list[Event],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async with connect(broker_url=proxy.url) as source:
            (id,) = await publish(source, 1)
            (message,) = await take(source, 1)
            proxy.refuse()
            with monkeypatch.context() as patch:
                patch.setattr(source._requests, "seconds", 0.3)
                await source.retry(message, 0.1, "not now")
            (again,) = await take(source, 1)
            assert (again.id, again.attempt) == (id, 2)
            assert [event["message_id"] for event in find(events, "settlement_lost")] == [id]
            proxy.resume()
            await source.ack(again)

    async def test_the_error_of_a_commit_that_timed_out_is_retrieved(
        self, connect: Connect, proxy: KafkaProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        never_retrieved: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: never_retrieved.append(context))
        async with connect(broker_url=proxy.url) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            monkeypatch.setattr(kafka, "COMMIT_SECONDS", 3600)
            proxy.black_hole()
            await source.ack(message)
            await source._commit(seconds=0.2)
            assert source._commit_wanted.is_set()
            proxy.cut()
            await eventually(False, commits)
            gc.collect()
            proxy.resume()
        assert never_retrieved == []

    async def test_a_stop_while_the_first_question_is_on_the_way_leaves_no_connection(
        self, source_for: Callable[..., KafkaBroker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = asyncio.Event()
        send = AIOKafkaConnection.send

        def tell(connection: AIOKafkaConnection, request: Any, **options: Any) -> Any:
            if type(request).__name__ == "MetadataRequest":
                asked.set()
            return send(connection, request, **options)

        monkeypatch.setattr(AIOKafkaConnection, "send", tell)
        entering = asyncio.ensure_future(source_for().__aenter__())
        await asked.wait()
        entering.cancel()
        await asyncio.wait({entering})
        assert entering.cancelled()
        gc.collect()  # an open connection warns, which is an error here

    async def test_a_start_that_is_cancelled_leaves_nothing(
        self, source_for: Callable[..., KafkaBroker], proxy: KafkaProxy
    ) -> None:
        async with source_for(broker_url=proxy.url) as source:
            proxy.black_hole()
            began_at = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await source.start()
            assert time.monotonic() - began_at < 2
            proxy.resume()


class TestRetries:
    async def test_a_retry_waits_only_for_others_of_the_same_delay(self, connect: Connect) -> None:
        async with connect() as source:
            late, early = await publish(source, 2)
            messages = {message.id: message for message in await take(source, 2)}
            retried_at = time.monotonic()
            await source.retry(messages[late], 0.8, "not now")
            await source.retry(messages[early], 0.1, "not now")
            (first,) = await take(source, 1)
            assert first.id == early
            assert 0.1 <= time.monotonic() - retried_at < 0.8
            (second,) = await take(source, 1)
            assert second.id == late
            assert 0.8 <= time.monotonic() - retried_at < 0.8 + AT_ONCE_SECONDS
            assert (first.attempt, second.attempt) == (2, 2)

    async def test_a_delay_beyond_the_back_off_is_kept_and_delays_no_other(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect() as source:
            late, early = await publish(source, 2)
            messages = {message.id: message for message in await take(source, 2)}
            retried_at = time.monotonic()
            await source.retry(messages[late], 2.5, "not now")
            await source.retry(messages[early], 0.8, "not now")
            (first,) = await take(source, 1)
            assert (first.id, first.attempt) == (early, 2)
            assert 0.8 <= time.monotonic() - retried_at < 0.8 + AT_ONCE_SECONDS
            await source.ack(first)
            await eventually_counts(broker, queue, Counts(ready=0, delayed=1, dead=0))
            (second,) = await take(source, 1)
            assert (second.id, second.attempt) == (late, 2)
            assert 2.5 <= time.monotonic() - retried_at < 2.5 + AT_ONCE_SECONDS
            await source.ack(second)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_a_retry_of_the_longest_back_off_is_stored_once(self, connect: Connect) -> None:
        async with connect() as source:
            await publish(source, 5)
            for message in await take(source, 5):
                await source.retry(message, SETTINGS["retry_max_seconds"], "not now")
            await ack_all(source, 5)
            async with source._reader("none", *source._retry_topics) as reader:
                assert sum((await source._ends(reader)).values()) == 5

    async def test_a_failure_in_a_rebalance_ends_the_consumption(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """aiokafka only logs exceptions of its listener."""
        async with connect() as source:
            with monkeypatch.context() as patch:
                patch.delattr(KafkaBroker, "_give_up_partitions")
                async with connect():
                    with pytest.raises(SourceFailed, match="_give_up_partitions"):
                        await anext(source)

    async def test_a_retry_and_a_replay_keep_the_key(self, connect: Connect) -> None:
        async with connect() as source:
            await source.publish(with_key("größe", 1))
            (message,) = await take(source, 1)
            await source.retry(message, 0.1, "not now")
            (again,) = await take(source, 1)
            assert again.headers[KEY] == "größe"
            await source.reject(again, "bad")
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            (replayed,) = await take(source, 1)
            assert replayed.headers == {KEY: "größe"}
            await source.ack(replayed)

    @pytest.mark.parametrize(
        ("first", "longest", "expected"),
        [(1, 1, [1]), (0.1, 0.4, [0.1, 0.2, 0.4]), (1, 5, [1, 1.71, 2.92, 5])],
    )
    async def test_the_steps_of_the_back_off(
        self, broker: Server, first: float, longest: float, expected: list[float]
    ) -> None:
        assert delays_seconds(first, longest) == pytest.approx(expected, rel=0.01)
        assert len(delays_seconds(0.001, 86_400)) == kafka.MOST_DELAYS


class TestOtherProducers:
    async def test_a_record_without_any_header_is_a_message(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect() as source:
            await produce(broker, queue, value=b"x", key=b"\xff", partition=1)
            (message,) = await take(source, 1)
            id = f"{queue}-1-0-{message.receipt[1].timestamp}"
            assert (message.id, message.type, message.body) == (id, "", b"x")
            assert message.headers == {KEY: "\N{REPLACEMENT CHARACTER}"}
            await source.reject(message, "bad")
            [letter] = [letter async for letter in source.dead_letters(1)]
            assert (letter.id, letter.reason) == (id, "bad")

    async def test_a_record_without_a_value_is_an_empty_message(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect() as source:
            await produce(broker, queue, value=None, key=b"key")
            (message,) = await take(source, 1)
            assert message.body == b""
            await source.retry(message, 0.1, "not now")
            assert (await take(source, 1))[0].attempt == 2

    async def test_a_cloud_event_has_its_id_and_its_type_and_bytes_stay_bytes(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        headers = [("ce_id", b"7"), ("ce_type", b"order_created"), ("raw", b"\xff\x00")]
        async with connect() as source:
            await produce(broker, queue, value=b"{}", headers=headers)
            (message,) = await take(source, 1)
            assert (message.id, message.type) == ("7", "order_created")
            assert message.headers["raw"] == b"\xff\x00"

    @pytest.mark.parametrize("case", ODD_RECORDS)
    async def test_an_odd_record_becomes_a_dead_letter_with_a_reason_and_ends_no_consumer(
        self, settings_for: Callable[..., ConsumerSettings], broker: Server, queue: str, case: str
    ) -> None:
        topic, headers = ODD_RECORDS[case]
        settings = settings_for(max_attempts=2, **SETTINGS)
        async with opened(make_source(settings)):
            pass
        await produce(broker, own(queue, topic), value=b"{}", headers=headers)
        assert await consume_until_rejected(settings) == 0
        async with opened(make_source(settings)) as source:
            [letter] = [letter async for letter in source.dead_letters(2)]
            assert letter.reason.startswith(("failed 2 times", "unknown type"))
            assert letter.id.encode().decode() == letter.id != ""
            assert [moved async for moved in source.replay_dead_letters()] == [1]

    async def test_a_header_name_that_is_not_utf_8_is_read_with_replacements_and_ends_no_consumer(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect() as source:
            names = [b"plain", b"gr\xf6\xdfe", b"plain"]
            await produce_names(broker, queue, names)
            await produce_names(broker, queue, names)
            messages = await take(source, 6)
            assert [message.receipt[1].offset for message in messages] == list(range(6))
            assert [list(message.headers) for message in messages[:3]] == [
                ["plain"],
                ["gr\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}e"],
                ["plain"],
            ]
            assert {message.body for message in messages} == {b"body"}
            await source.reject(messages[1], "bad")
            [letter] = [letter async for letter in source.dead_letters(2)]
            assert letter.id == messages[1].id

    async def test_a_retry_that_is_due_in_a_hundred_years_waits_for_the_longest_delay(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect() as source:
            due_at = f"{time.time() + 100 * 365 * 86_400}".encode()
            began_at = time.monotonic()
            await produce(
                broker, own(queue, RETRY), value=b"late", headers=[(kafka.DUE_AT, due_at)]
            )
            (message,) = await take(source, 1)
            assert message.body == b"late"
            assert time.monotonic() - began_at < 0.8 + 2 * AT_ONCE_SECONDS
            await source.ack(message)

    @given(
        headers=st.lists(st.tuples(HEADER_NAMES, st.none() | st.binary() | HEADER_VALUES)),
        key=st.none() | st.binary(),
        value=st.none() | st.binary(),
    )
    def test_any_record_is_a_message_and_a_dead_letter(
        self,
        broker: Server,
        headers: list[tuple[str, bytes | None]],
        key: bytes | None,
        value: bytes | None,
    ) -> None:
        record = SimpleNamespace(
            **{"offset": 2, "timestamp": 3, "key": key, "value": value, "headers": headers}
        )
        partition = kafka._Partition(TopicPartition("orders", 1))
        message = kafka._message(record, partition)
        assert message.id
        assert (message.id + message.type).encode().decode()
        assert message.body == (value or b"")
        assert message.attempt >= 1
        letter = kafka._dead_letter(record, partition)
        assert letter.reason.encode().decode() == letter.reason
        assert 0 <= letter.dead_lettered_at < math.inf
        for _, copied in kafka._copy(message, {})[2]:
            assert copied is None or isinstance(copied, bytes)

    @pytest.mark.filterwarnings("ignore:Generating overly large repr")
    @settings(
        max_examples=5,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(in_source=RECORDS, in_retry=RECORDS, in_dead=RECORDS)
    def test_any_records_become_dead_letters_that_are_listed_replayed_and_purged(
        self,
        broker: Server,
        settings_for: Callable[..., ConsumerSettings],
        in_source: list[Any],
        in_retry: list[Any],
        in_dead: list[Any],
    ) -> None:
        queue = f"ccc-test-{uuid.uuid4().hex[:12]}"
        settings = settings_for(source=queue, max_attempts=2, breaker_failures=0, **SETTINGS)
        places = {own(queue): in_source, own(queue, RETRY): in_retry, own(queue, DEAD): in_dead}
        count = sum(map(len, places.values()))

        async def survive() -> None:
            async with opened(make_source(settings)):
                pass
            for topic, records in places.items():
                if records:
                    await produce_any(broker, topic, records)
            await dead_letter_all(settings, count)
            async with opened(make_source(settings)) as source:
                letters = [letter async for letter in source.dead_letters(count + 1)]
                assert len(letters) == count
                json.dumps([[le.id, le.type, le.reason, le.dead_lettered_at] for le in letters])
                assert await last(source.replay_dead_letters()) == count
            await dead_letter_all(settings, count)
            async with opened(make_source(settings)) as source:
                assert Counter(ids([le async for le in source.dead_letters(count + 1)])) == (
                    Counter(ids(letters))
                )
                assert await last(source.purge_dead_letters()) == count
                assert await source.count_dead_letters() == 0

        try:
            asyncio.run(survive())
        finally:
            broker.delete(queue)

    async def test_a_batch_that_does_not_fit_into_memory_unpacked_ends_the_consumption(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """The client library has no limit for it; the broker may have one: see brokers/kafka.md of the template."""
        async with connect(prefetch=0):
            pass  # connecting creates the topic
        await produce(broker, queue, compression_type="gzip", value=bytes(300_000_000))
        with little_memory(50_000_000):
            async with connect() as source:
                with pytest.raises(SourceFailed):
                    await anext(source)
                assert isinstance(source.buffer.failure, MemoryError)

    @pytest.mark.parametrize("value", [{1, 2}, object()], ids=["set", "object"])
    async def test_a_header_that_cannot_be_sent_is_refused_in_one_sentence(
        self, connect: Connect, value: object
    ) -> None:
        async with connect(prefetch=0) as source:
            with pytest.raises(BrokerRefused, match="this message cannot be sent"):
                await source.publish([OutgoingMessage(b"", headers={"odd": value})])


class TestTopics:
    async def test_topics_are_created_with_their_partitions_and_described(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=0) as source:
            await source.publish(with_key("one", 3))
            described = await source.describe()
        assert described[queue] == 3
        assert described[f"{queue} partitions"] == PARTITIONS
        assert (described[own(queue, RETRY)], described[own(queue, DEAD)]) == (0, 0)

    async def test_an_existing_topic_is_used_unmodified(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(
            prefetch=0, broker_url=broker.url.replace("partitions=4", "partitions=2")
        ):
            pass
        async with connect(prefetch=0) as source:
            assert (await source.describe())[f"{queue} partitions"] == 2

    async def test_a_group_of_another_name_has_its_own_offsets_and_dead_letters(
        self, connect: Connect
    ) -> None:
        async with connect() as source:
            (id,) = await publish(source, 1)
            await ack_all(source, 1)
            async with connect(group="another") as other:
                assert await ack_all(other, 1) == [id]

    async def test_a_broker_without_a_default_replication_factor_gets_one_replica_per_broker(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = answer_to_create(
            monkeypatch,
            InvalidReplicationFactorError,
            unless=lambda topic: topic.replication_factor > 0,
        )
        async with connect() as source:
            published = await publish(source, 1)
            assert await ack_all(source, 1) == published
        assert [[topic.replication_factor for topic in topics] for topics in asked] == [
            [-1, -1, -1],
            [1, 1, 1],
        ]

    async def test_a_topic_that_cannot_be_created_is_one_sentence(
        self,
        source_for: Callable[..., KafkaBroker],
        queue: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        answer_to_create(monkeypatch, InvalidPartitionsError, unless=lambda _: False)
        with pytest.raises(BrokerRefused, match=f"the topic '{queue}' cannot be created: .*why"):
            async with opened(source_for()):
                pass

    async def test_a_missing_topic_that_may_not_be_created_is_one_sentence(
        self,
        source_for: Callable[..., KafkaBroker],
        queue: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        answer_to_create(monkeypatch, TopicAuthorizationFailedError, unless=lambda _: False)
        with pytest.raises(BrokerDenied, match=f"'{queue}' does not exist, and this user may not"):
            async with opened(source_for()):
                pass

    async def test_looking_creates_no_topic(
        self, source_for: Callable[..., KafkaBroker], queue: str
    ) -> None:
        """By default, brokers create each topic whose metadata a client requests."""
        async with source_for() as source:
            for _ in range(2):
                described = await source.describe()
                topics = [queue, own(queue, RETRY), own(queue, DEAD)]
                assert [described[topic] for topic in topics] == [MISSING] * 3
                assert await source.count_dead_letters() == 0
                assert [letter async for letter in source.dead_letters(1)] == []
                assert await last(source.purge_dead_letters()) == 0
                assert await last(source.replay_dead_letters()) == 0
            await source.declare()
            assert (await source.describe())[queue] == 0

    async def test_a_topic_that_is_deleted_while_it_is_consumed_is_not_created_again(
        self, connect: Connect, broker: Server, queue: str, shorten: Callable[..., None]
    ) -> None:
        shorten(1, "DISCOVER_SECONDS")
        async with connect() as source, connect(prefetch=0) as other:
            ids_before = await publish(source, 1)
            (before,) = await take(source, 1)
            await source.ack(before)
            await asyncio.to_thread(broker.delete, queue)
            await source._producer.client.force_metadata_update()
            await asyncio.sleep(1.5)
            assert await source._existing(queue) == {}
            await other.declare()
            await produce(broker, queue, value=b"new", partition=0)
            (after,) = await take(source, 1)
            assert after.body == b"new"
            assert ids_before
            await source.ack(after)

    async def test_a_topic_that_is_created_again_long_after_its_deletion_is_read(
        self, connect: Connect, broker: Server, queue: str, shorten: Callable[..., None]
    ) -> None:
        shorten(1, "DISCOVER_SECONDS")
        async with connect() as source, connect(prefetch=0) as other:
            await publish(source, 1)
            assert await ack_all(source, 1)
            await asyncio.to_thread(broker.delete, queue)

            async def partitions() -> int:
                return len([tp for tp in source._partitions if tp.topic == queue])

            await eventually(0, partitions)
            await other.declare()
            await produce(broker, queue, value=b"new", partition=0)
            (after,) = await take(source, 1)
            await source.ack(after)
        assert after.body == b"new"

    async def test_ids_do_not_repeat_in_a_topic_that_is_created_again(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        seen = []
        for _ in range(2):
            async with connect() as source:
                await produce(broker, queue, value=b"body", partition=0)
                (message,) = await take(source, 1)
                assert message.receipt[1].offset == 0
                seen.append(message.id)
            await asyncio.to_thread(broker.delete, queue)
        assert len(set(seen)) == 2

    @pytest.mark.parametrize(
        ("group", "name"),
        [
            ("billing", "billing"),
            ("b.c", "b..c"),
            ("a_b-1_00", "a_b-1_00"),
            ("größe/1 x", "gr_c3_b6_c3_9fe_2f1_20x"),
        ],
    )
    async def test_any_group_has_topics_of_its_own(
        self, broker: Server, group: str, name: str
    ) -> None:
        assert kafka.name_in_topics(group) == name

    async def test_a_group_of_any_name_works(self, connect: Connect) -> None:
        async with connect(group="größe/1 x") as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            await source.retry(message, 0.1, "not now")
            (message,) = await take(source, 1)
            await source.reject(message, "bad")
            assert await source.count_dead_letters() == 1


class TestPublishing:
    async def test_a_topic_that_does_not_exist_is_one_sentence_and_is_not_created(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """The broker of these tests creates topics automatically."""
        missing = f"{queue}.missing"
        async with connect(prefetch=10) as source:
            messages = [
                OutgoingMessage(b"%d" % n, to=f"topic:{queue}" if n % 2 else f"topic:{missing}")
                for n in range(6)
            ]
            began_at = time.monotonic()
            with pytest.raises(BrokerRefused, match=rf"the topic '{missing}' does not exist"):
                await source.publish(messages)
            assert time.monotonic() - began_at < kafka.ANSWER_SECONDS / 2  # it does not wait
            taken = await take(source, 3)
            assert sorted(message.body for message in taken) == [b"1", b"3", b"5"]
            for message in taken:
                await source.ack(message)
            await publish(source, 1)
            await ack_all(source, 1)
        assert missing not in await admin_of(broker, lambda admin: admin.list_topics())

    async def test_a_message_that_its_topic_does_not_take_harms_no_other(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        small = f"{queue}.small"
        await make_topic(broker, small, 20_000)
        sizes = (1000, 30_000, 1000, 40_000, 1000)
        bodies = [random.randbytes(size) for size in sizes]
        async with connect(source=small, group="g", prefetch=10) as reader, connect() as source:
            with pytest.raises(BrokerRefused, match=rf"larger than its topic .*'{small}'"):
                await source.publish(
                    [OutgoingMessage(body, to=f"topic:{small}") for body in bodies]
                )
            taken = {message.body for message in await take(reader, 3)}
            assert taken == {body for body in bodies if len(body) == 1000}

    async def test_the_key_of_a_message_is_the_record_s(self, connect: Connect) -> None:
        async with connect(prefetch=10) as source:
            await source.publish([OutgoingMessage(b"x", key="größe") for _ in range(3)])
            await source.publish([OutgoingMessage(b"x", id="id-1", correlation_id="c")])
            messages = await take(source, 4)
            keyed = [one for one in messages if one.receipt[1].key == "größe".encode()]
            assert len({message.origin["partition"] for message in keyed}) == 1
            assert sorted(message.key for message in messages) == ["größe"] * 3 + ["id-1"]
            [other] = [message for message in messages if message.key == "id-1"]
            assert (other.correlation_id, KEY in other.headers) == ("c", False)

    async def test_a_message_that_cannot_be_written_as_a_record_is_refused(
        self, connect: Connect
    ) -> None:
        async with connect() as source:
            for message in (
                OutgoingMessage(b"x", key="\ud800"),
                OutgoingMessage(b"x", "\ud800"),
                OutgoingMessage(b"x", headers={"odd": object()}),
            ):
                with pytest.raises(BrokerRefused, match="this message cannot be sent"):
                    await source.publish([message])


class TestLimits:
    """Records that are too large for the retry topic or the dead-letter topic."""

    async def test_the_group_s_topics_take_what_their_source_takes(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        await make_topic(broker, queue, 8 * 2**20)
        body = random.randbytes(5 * 2**20)
        async with connect() as source:
            await source.publish([OutgoingMessage(body, "kind", "id-7")])
            (message,) = await take(source, 1)
            await source.retry(message, 0.1, "not now")
            (message,) = await take(source, 1)
            assert (message.body, message.attempt) == (body, 2)
            await source.reject(message, "bad")
            [letter] = [letter async for letter in source.dead_letters(2)]
            assert (letter.body, letter.id, letter.reason) == (body, "id-7", "bad")
        assert not find(events, "settlement_lost")

    async def test_a_record_that_fits_only_when_compressed_stays_whole(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect() as source:
            await produce(broker, queue, compression_type="gzip", value=bytes(5 * 2**20))
            (message,) = await take(source, 1)
            await source.retry(message, 0.1, "not now")
            (message,) = await take(source, 1)
            await source.reject(message, "bad")
            [letter] = [letter async for letter in source.dead_letters(2)]
            assert letter.body == bytes(5 * 2**20)
        assert not find(events, "settlement_lost")

    async def test_a_dead_letter_that_is_too_large_is_shortened_and_its_neighbors_are_whole(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        await make_topic(broker, own(queue, DEAD), 100_000)
        body, small = random.randbytes(300_000), random.randbytes(20_000)
        async with connect(prefetch=20) as source:
            headers = {"foreign": random.randbytes(100_000).hex()}
            await source.publish(
                [
                    OutgoingMessage(body, "kind", "large"),
                    OutgoingMessage(small, "kind", "headers", headers),
                    *(OutgoingMessage(small, "kind", f"small-{n}") for n in range(8)),
                ]
            )
            messages = await take(source, 10)
            await asyncio.gather(*(source.reject(message, "bad") for message in messages))
            letters = {letter.id: letter async for letter in source.dead_letters(20)}
            assert len(letters) == 10
            assert {letter.reason for letter in letters.values()} == {"bad"}
            large = letters.pop("large")
            assert body.startswith(large.body)
            assert len(large.body) >= 37_500
            assert {letter.body for letter in letters.values()} == {small}
            async with source._reading() as reading:
                ends = await source._ends(reading.reader)
                async for _, records in source._read(reading.reader, ends, 20):
                    for record in records:
                        kept = dict(record.headers)
                        if kept[kafka.ID] in (b"large", b"headers"):
                            whole = len(body if kept[kafka.ID] == b"large" else small)
                            assert kept[SHORTENED] == b"%d" % whole
                            assert "foreign" not in kept

    async def test_a_retry_that_is_too_large_is_put_off_and_its_neighbors_are_retried(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        await make_topic(broker, own(queue, RETRY), 100_000)
        body, small = random.randbytes(300_000), random.randbytes(20_000)
        async with connect(prefetch=20) as source:
            await source.publish(
                [
                    OutgoingMessage(body, "kind", "large"),
                    *(OutgoingMessage(small, "kind", f"small-{n}") for n in range(8)),
                ]
            )
            messages = await take(source, 9)
            await asyncio.gather(*(source.retry(message, 0.1, "no") for message in messages))
            [lost] = find(events, "settlement_lost")
            assert lost["message_id"] == "large"
            assert "larger than its topic allows" in lost["reason"]
            assert "larger than its topic allows" in source.put_offs.reason
            again = await take(source, 9)
            assert {message.attempt for message in again} == {2}
            assert ids(again)[-1] == "large"  # a second later, in this process
            for message in again:
                await source.ack(message)
            assert not source.put_offs.reason
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_a_rebalance_does_not_wait_for_a_message_that_is_put_off(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        await make_topic(broker, own(queue, RETRY), 100_000)
        async with connect() as source:
            await source.publish([OutgoingMessage(random.randbytes(300_000), "kind", "large")])
            (message,) = await take(source, 1)
            await source.retry(message, 3600, "no")
            began_at = time.monotonic()
            async with connect():
                assert time.monotonic() - began_at < 3
            assert find(events, "partitions_revoked")[-1]["dropped"] == 1
            assert not source.put_offs.reason

    async def test_a_batch_that_is_too_large_is_published_in_smaller_ones(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        await make_topic(broker, queue, 20_000)
        async with connect(prefetch=0) as source:
            messages = [OutgoingMessage(random.randbytes(1000)) for _ in range(200)]
            await source.publish(messages)
            assert (await source.describe())[queue] == 200
            with pytest.raises(BrokerRefused, match="larger than its topic allows"):
                await source.publish([OutgoingMessage(random.randbytes(30_000))])


class TestRetention:
    async def test_records_deleted_before_they_were_read_are_logged_once(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=2) as source:
            await produce_many(broker, queue, 8)
            for message in await take(source, 2):
                await source.ack(message)
            await source.stop()
        await delete_below(broker, queue, 6)
        deleted = {"topic": queue, "partition": 0, "first": 2, "last": 5, "count": 4}
        for _ in range(2):
            async with connect(prefetch=1) as source:
                (message,) = await take(source, 1)
                assert message.receipt[1].offset == 6
                await source.stop()
            [found] = find(events, "messages_trimmed")
            assert found == {"event": "messages_trimmed", "level": "warning", **deleted}

    async def test_records_that_are_all_deleted_while_the_consumer_runs_are_logged(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        """As in the test above, with no record left."""
        async with connect(prefetch=2) as source:
            await produce_many(broker, queue, 8)
            for message in await take(source, 2):
                await source.ack(message)
            await source.stop()
        await delete_below(broker, queue, 8)
        for _ in range(2):
            async with connect() as source:
                await eventually_logged(events, "messages_trimmed")
                await produce_many(broker, queue, 1)
                await ack_all(source, 1)
        assert [event["count"] for event in find(events, "messages_trimmed")] == [6]

    async def test_records_deleted_while_the_consumer_runs_are_logged(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=1) as source:
            await produce_many(broker, queue, 8)
            (message,) = await take(source, 1)
            await asyncio.sleep(0.3)  # the client has fetched these eight
            await produce_many(broker, queue, 8)
            await delete_below(broker, queue, 12)
            await source.ack(message)
            offsets = []
            for _ in range(11):
                (message,) = await take(source, 1)
                offsets.append(message.receipt[1].offset)
                await source.ack(message)
        assert offsets == [*range(1, 8), *range(12, 16)]
        [deleted] = find(events, "messages_trimmed")
        assert (deleted["first"], deleted["last"], deleted["count"]) == (8, 11, 4)

    async def test_markers_of_transactions_are_not_waiting_messages(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect() as source, connect(prefetch=0) as other:
            host = urlsplit(broker.url).netloc
            async with AIOKafkaProducer(bootstrap_servers=host, transactional_id=queue) as producer:
                for _ in range(3):
                    async with producer.transaction():
                        await producer.send(queue, b"body", partition=0)
            await ack_all(source, 3)

            async def waiting() -> object:
                return (await other.describe())[queue]

            await eventually(0, waiting)

    async def test_an_aborted_record_behind_one_that_is_read_leniently_is_not_seen(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """The second reading of the batches begins with the same aborted transactions."""
        async with connect(prefetch=0):
            pass
        host = urlsplit(broker.url).netloc
        async with AIOKafkaProducer(bootstrap_servers=host, transactional_id=queue) as producer:
            for between in (False, True):
                await producer.begin_transaction()
                await producer.send_and_wait(queue, b"aborted", partition=0)
                if between:
                    await produce_names(broker, queue, [b"gr\xf6\xdfe"])
                    await producer.send_and_wait(queue, b"aborted", partition=0)
                await producer.abort_transaction()
        await produce(broker, queue, value=b"last", partition=0)
        async with connect() as source:
            assert [message.body for message in await take(source, 2)] == [b"body", b"last"]


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "hosts", "security"),
        [
            ("kafka://one", ["one:9092"], {"security_protocol": "PLAINTEXT"}),
            (
                "kafka://one:1,two,[::1]:3/",
                ["one:1", "two:9092", "[::1]:3"],
                {"security_protocol": "PLAINTEXT"},
            ),
            (
                "kafkas://me:p%40ss%3A%2F%25@one?sasl_mechanism=SCRAM-SHA-512",
                ["one:9092"],
                {
                    "security_protocol": "SASL_SSL",
                    "sasl_mechanism": "SCRAM-SHA-512",
                    "sasl_plain_username": "me",
                    "sasl_plain_password": "p@ss:/%",
                },
            ),
        ],
    )
    async def test_a_url_names_hosts_and_credentials(
        self,
        settings_for: Callable[..., ConsumerSettings],
        url: str,
        hosts: list[str],
        security: dict[str, str],
    ) -> None:
        source = KafkaBroker(settings_for(broker_url=url))
        assert (source._url.hosts, source._security) == (hosts, security)

    @pytest.mark.parametrize(
        "rest",
        [
            *("", "one:port", "one/path", "me:hush/hush@one", "me:hush#hush@one"),
            *("me:hush?hush@one", "me:hush[@one", "one?partition=3", "one?partitions=0"),
            *("one?partitions=many", "one?session_timeout_seconds=nan", "one?cafile=ca.pem"),
            *(
                "me:hush@one?sasl_mechanism=X",
                "one?partition_assignment_strategy=cooperative-sticky",
            ),
            *("one?isolation_level=serializable", "one?auto_offset_reset=newest"),
            *("one?sasl_mechanism=OAUTHBEARER", "one?token_provider=json:dumps"),
            "one?sasl_mechanism=OAUTHBEARER&token_provider=json:nothing",
            "me:hush@one?sasl_mechanism=OAUTHBEARER&token_provider=json:dumps",
        ],
    )
    async def test_an_invalid_url_is_one_sentence_without_the_password(
        self, settings_for: Callable[..., ConsumerSettings], rest: str
    ) -> None:
        with pytest.raises(BrokerRefused, match=r"^CONSUMER_BROKER_URL: ") as refusal:
            make_source(settings_for(broker_url=f"kafka://{rest}"))
        assert "hush" not in str(refusal.value)

    async def test_a_key_with_a_passphrase_is_one_sentence_and_no_question(
        self,
        source_for: Callable[..., KafkaBroker],
        certificates: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """For every broker: runtime.brokers.url. Without a password, OpenSSL would ask on the terminal."""
        given: list[object] = []
        load = ssl.SSLContext.load_cert_chain

        def keep(context: Any, cert: Any, key: Any = None, password: Any = None) -> None:
            given.append(password)
            load(context, cert, key, password or "")

        monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", keep)
        key = tmp_path / "encrypted.key"
        encrypt = ["openssl", "pkey", "-aes256", "-passout", "pass:hush", "-out", str(key)]
        encrypting = partial(subprocess.run, [*encrypt, "-in", str(certificates / "client.key")])
        await asyncio.to_thread(encrypting, check=True)
        url = f"kafkas://one?certfile={certificates / 'client.pem'}&keyfile={key}"
        with pytest.raises(BrokerRefused, match=r"keyfile \(without a passphrase\): "):
            async with source_for(broker_url=url):
                pass
        assert given == [""]

    @pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
    async def test_credentials_are_in_no_log_and_in_no_error(
        self,
        connect: Connect,
        proxy: KafkaProxy,
        events: list[Event],
        caplog: pytest.LogCaptureFixture,
        mechanism: str,
    ) -> None:
        url = proxy.url.replace("kafka://", "kafka://me:hush-hush@")
        said = ""
        try:
            async with connect(broker_url=f"{url}&sasl_mechanism={mechanism}") as source:
                proxy.refuse()
                await eventually_logged(events, "reconnecting")
                proxy.resume()
                said = f"{await source.describe()}"
        except BrokerError as refusal:  # this server has no passwords, or another one
            said = str(refusal)
        assert said
        assert "hush" not in f"{said} {events} {caplog.text}"
