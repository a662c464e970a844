"""Redis alone: outages, leases, its keys, its limits. Tests of every broker are in test_every_source.py."""

import asyncio
import json
import shlex
import shutil
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit

import pytest
import redis.exceptions
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from harness.contract import eventually, opened, take
from harness.servers import (
    Counts,
    PrivateServer,
    Server,
    ServerMissing,
    skip_without_server,
)
from harness.servers.local import ServerProcess, free_ports
from harness.servers.proxy import Proxy
from harness.servers.redis import RedisServer, private
from runtime.brokers import redis as module
from runtime.brokers.redis import ONE_CRASH, MasterOfSentinels, RedisBroker, RedisUrl
from runtime.brokers.requests import Requests
from runtime.brokers.source import MISSING
from runtime.errors import (
    BrokerDenied,
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    SourceFailed,
)
from runtime.message import Message, OutgoingMessage
from runtime.settings import ConsumerSettings
from secured import with_user
from steps import (
    Event,
    ack_all,
    buffer_holds,
    eventually_counts,
    eventually_logged,
    find,
    ids,
    last,
    publish,
    with_options,
)
from tools.chaos.clusters import (
    MASTER,
    RedisSet,
    SentinelSet,
    ask_redis,
    redis_cluster,
    redis_sentinel,
    wait_for,
)

pytestmark = pytest.mark.parametrize("broker", ["redis"], indirect=True, scope="session")

Connect = Callable[..., AbstractAsyncContextManager[RedisBroker]]
ODD_USER = ("order:events", "p@ss:w/o?r#d %2F+é")


@pytest.fixture(scope="session")
def node_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="session")
def node(broker: Server, node_directory: Path) -> Iterator[PrivateServer]:
    """A Redis whose settings and users a test may change."""
    only_of_a_server_alone(broker)
    try:
        with private(node_directory) as server:
            yield server
    except ServerMissing as missing:
        skip_without_server(missing)


@pytest.fixture
def client(broker: Server) -> Iterator[Any]:
    """A separate client, without the runtime."""
    with client_of(broker) as client:
        yield client


@pytest.fixture
def queue(broker: Server) -> Iterator[str]:
    name = new_name(broker)
    yield name
    broker.delete(name)


def new_name(server: Server) -> str:
    """On a cluster with braces, so that the other keys begin with the stream's name too: these tests read them."""
    name = f"ccc-test-{uuid.uuid4().hex[:12]}"
    return f"{{{name}}}" if "+cluster:" in server.url else name


def only_of_a_server_alone(server: Server) -> None:
    if "+" in urlsplit(server.url).scheme:
        pytest.skip(
            "this test is about a single server: it has one of its own, or changes its settings"
        )


def client_of(server: Server) -> "closing[Any]":
    assert isinstance(server, RedisServer)
    return server.client()


def with_lease(url: str, seconds: float) -> str:
    return with_options(url, lease_seconds=seconds)


class TestOutages:
    async def test_settlements_of_an_outage_are_written_after_it(
        self, connect: Connect, proxy: Proxy, events: list[Event], broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=4, broker_url=proxy.url) as source:
            await publish(source, 4)
            done, later, bad, back = await take(source, 4)
            proxy.refuse()
            await eventually_logged(events, "reconnecting")
            await source.ack(done)
            await source.retry(later, 300, "not now")
            await source.reject(bad, "bad")
            await source.requeue(back)
            proxy.resume()
            (again,) = await take(source, 1)
            assert (again.id, again.attempt) == (back.id, 1)
            await source.ack(again)
            await eventually_counts(broker, queue, Counts(ready=0, delayed=1, dead=1))
        assert not find(events, "settlement_lost")

    @pytest.mark.parametrize("busy", [False, True])
    async def test_a_deleted_stream_is_created_again_and_consumed(
        self, connect: Connect, client: Any, queue: str, events: list[Event], busy: bool
    ) -> None:
        async with connect(prefetch=1) as source:
            published = await publish(source, 2)
            assert await ack_all(source, 1) == published[:1]
            in_flight = await take(source, 1)
            if not busy:
                await source.ack(in_flight.pop())
            client.delete(queue)
            for message in in_flight:
                await source.ack(message)
            await eventually_logged(events, "connected", count=2)
            published = await publish(source, 5)
            assert await ack_all(source, 5) == published
        assert "was deleted" in find(events, "reconnecting")[0]["reason"]

    async def test_in_flight_entries_are_not_redelivered_after_their_group_was_deleted(
        self, connect: Connect, client: Any, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=3, broker_url=with_lease(broker.url, 0.6)) as source:
            published = await publish(source, 5)
            in_flight = await take(source, 2)
            client.xgroup_destroy(queue, queue)
            await eventually_logged(events, "connected", count=2)
            assert Counter(await ack_all(source, 3)) == Counter(published[2:])
            for message in in_flight:
                await source.ack(message)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    @pytest.mark.parametrize("unacked", [0, 1])
    async def test_a_deleted_group_does_not_begin_again_with_what_others_had_acknowledged(
        self, connect: Connect, client: Any, queue: str, events: list[Event], unacked: int
    ) -> None:
        client.xgroup_create(queue, queue, "0", mkstream=True)
        old = [client.xadd(queue, {"body": "old"}) for _ in range(9)]
        client.xreadgroup(queue, "another", {queue: ">"})
        client.xack(queue, queue, *old[: 9 - unacked])
        async with connect(prefetch=9) as source:
            published = await publish(source, 2)
            assert await ack_all(source, 1) == published[:1]
            client.xgroup_destroy(queue, queue)
            await eventually_logged(events, "connected", count=2)
            published += await publish(source, 2)
            waiting = [*[id.decode() for id in old[9 - unacked :]], *published[1:]]
            assert await ack_all(source, len(waiting)) == waiting

    async def test_a_deleted_stream_with_lower_ids_is_read_from_its_first_entry(
        self, connect: Connect, client: Any, queue: str, events: list[Event]
    ) -> None:
        client.xadd(queue, {"id": "high", "body": ""}, id="9000-0")
        async with connect(prefetch=2) as source:
            assert await ack_all(source, 1) == ["high"]
        async with connect(prefetch=2) as source:
            assert source._began_after == "9000-0"
            with client.pipeline() as pipeline:
                pipeline.delete(queue)
                pipeline.xadd(queue, {"id": "low", "body": ""}, id="7-0")
                pipeline.execute()
            assert await ack_all(source, 1) == ["low"]

    async def test_a_server_that_becomes_a_replica_says_so_and_loses_nothing(
        self, connect: Connect, node: PrivateServer, broker: Server, queue: str, events: list[Event]
    ) -> None:
        primary = urlsplit(broker.url)
        with client_of(node) as client:
            async with connect(prefetch=1, broker_url=node.url) as source:
                await publish(source, 1)
                assert len(await ack_all(source, 1)) == 1
                client.replicaof(primary.hostname, primary.port)
                await eventually_logged(events, "reconnecting")
                with pytest.raises(BrokerUnavailable, match="a read-only replica, no primary"):
                    await source.publish([OutgoingMessage(b"")])
                client.replicaof("NO", "ONE")
                await eventually_logged(events, "connected", count=2)
                assert await publish(source, 1) == await ack_all(source, 1)
        assert "a read-only replica, no primary" in find(events, "reconnecting")[0]["reason"]

    async def test_a_replica_that_was_promoted_behind_the_same_address_continues(
        self,
        connect: Connect,
        broker: Server,
        tmp_path_factory: pytest.TempPathFactory,
        queue: str,
    ) -> None:
        only_of_a_server_alone(broker)
        directories = [tmp_path_factory.mktemp(name) for name in ("primary", "replica")]
        with (
            private(directories[0]) as primary,
            private(directories[1]) as replica,
            client_of(primary) as client,
            client_of(replica) as follower,
            Proxy(primary.url) as proxy,
        ):
            address = urlsplit(primary.url)
            follower.replicaof(address.hostname, address.port)
            async with connect(prefetch=10, broker_url=with_lease(proxy.url, 1)) as source:
                published = await publish(source, 200)
                handled = await ack_all(source, 50)
                in_flight = await take(source, 5)
                while not await asyncio.to_thread(client.wait, 1, 1000):
                    pass  # otherwise the last ones may be lost; the first copy takes as long as a client waits
                primary.kill()
                follower.replicaof("NO", "ONE")
                proxy._target_port = urlsplit(replica.url).port or 0
                proxy.cut()
                for message in in_flight:
                    await source.ack(message)
                    handled.append(message.id)
                published += await publish_insistently(source, 20)
                while {*handled} != {*published}:
                    handled += await ack_all(source, 1)
                await eventually(0, lambda: asyncio.sleep(0, follower.xlen(queue)))
            assert len(handled) - len(published) <= 10  # acks that were not replicated

    async def test_an_error_that_does_not_pass_ends_the_consumption(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        async with connect() as source:
            client.delete(queue)
            client.set(queue, "text")
            with pytest.raises(SourceFailed, match="WRONGTYPE"):
                await take(source, 1)


class TestLeases:
    async def test_the_entries_of_a_dead_consumer_are_redelivered_when_its_lease_has_expired(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        async with connect(prefetch=0) as publisher:
            published = await publish(publisher, 3)
        client.xreadgroup(queue, "dead", {queue: ">"}, count=2)
        dead_lettered_at = time.monotonic()
        async with connect(prefetch=3, broker_url=with_lease(broker.url, 1)) as source:
            messages = await take(source, 3)
            assert time.monotonic() - dead_lettered_at >= 1
            assert ids(messages) == [published[2], *published[:2]]
            assert {message.attempt for message in messages} == {1}
            for message in messages:
                await source.ack(message)
        names = [info["name"] for info in client.xinfo_consumers(queue, queue)]
        assert names == [b"requeued"]

    async def test_a_consumer_that_counted_as_dead_starts_no_entry_that_another_one_has(
        self, connect: Connect, broker: Server, client: Any, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=3, broker_url=with_lease(broker.url, 0.6)) as one:
            published = await publish(one, 3)
            (in_flight,) = await take(one, 1)
            await buffer_holds(one, 2)
            pending = client.xpending_range(queue, queue, "-", "+", 3)
            client.xclaim(queue, queue, "another", 0, [row["message_id"] for row in pending])
            client.zadd(f"{queue}.consumers", {"another": 1e15})
            await buffer_holds(one, 0)
            await one.retry(in_flight, 0.1, "not mine any more")
            await eventually_logged(events, "settlement_lost")
            assert len(client.xpending_range(queue, queue, "-", "+", 9, "another")) == 3
        assert published[0] == find(events, "settlement_lost")[0]["message_id"]

    async def test_an_entry_delivered_in_a_lost_answer_is_requeued(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        async with connect(prefetch=1, broker_url=with_lease(broker.url, 0.6)) as source:
            published = await publish(source, 2)
            (first,) = await take(source, 1)
            client.xreadgroup(
                queue, source._consumer, {queue: ">"}
            )  # the source never learns of the second
            await source.ack(first)
            assert await ack_all(source, 1) == published[1:]

    async def test_a_message_that_kills_its_consumer_each_time_ends_as_a_dead_letter(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        async with connect(prefetch=0) as publisher:
            await publish(publisher, 1, headers={"trace": "t"})
        [[_, [(entry, _)]]] = client.xreadgroup(queue, "dead", {queue: ">"})
        client.xclaim(queue, queue, "dead", 0, [entry], retrycount=1 + 999 * ONE_CRASH)
        async with connect(broker_url=with_lease(broker.url, 0.3)) as source:
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [letter] = [letter async for letter in source.dead_letters(10)]
            assert letter.reason == "1000 consumers died with it in flight"
            assert letter.attempts == 0  # no handler failed on it
            assert abs(letter.dead_lettered_at - time.time()) < 60

    @pytest.mark.parametrize("trimmed", [False, True])
    async def test_thousands_of_entries_of_a_dead_consumer_are_requeued_without_a_pause(
        self,
        connect: Connect,
        broker: Server,
        client: Any,
        queue: str,
        events: list[Event],
        trimmed: bool,
    ) -> None:
        async with connect(prefetch=0):
            pass  # connecting creates the group
        with client.pipeline() as pipeline:
            for number in range(4_000):
                pipeline.xadd(queue, {"id": number})
            pipeline.execute()
        client.xreadgroup(queue, "dead", {queue: ">"}, count=4_000)
        client.zadd(f"{queue}.consumers", {"dead": 1})
        if trimmed:
            client.xtrim(queue, maxlen=500, approximate=False)
        lease = 3  # a sweep each second, from the third second on
        async with connect(prefetch=1, broker_url=with_lease(broker.url, lease)) as source:
            began_at = time.monotonic()
            await eventually(0, lambda: pending(client, queue, "dead"))
            assert time.monotonic() - began_at < lease + 3
            await source.stop()
        left = 500 if trimmed else 4_000
        assert broker.counts(queue) == Counts(ready=left, delayed=0, dead=0)
        lost = sum(event["count"] for event in find(events, "messages_trimmed"))
        assert lost == 4_000 - left

    async def test_no_consumer_counts_as_dead_before_it_had_the_time_to_reconnect(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        async with connect(prefetch=0) as publisher:
            await publish(publisher, 1)
        client.xreadgroup(queue, "away", {queue: ">"})
        # Like after an outage that was longer than the lease.
        client.zadd(f"{queue}.consumers", {"away": client.time()[0] * 1000 - 2000})
        connected_at = time.monotonic()
        async with connect(prefetch=1, broker_url=with_lease(broker.url, 1)) as source:
            await ack_all(source, 1)
            assert time.monotonic() - connected_at >= 1


class TestStopping:
    async def test_requeued_entries_keep_their_place_and_their_attempt(
        self, connect: Connect
    ) -> None:
        async with connect(prefetch=0) as source:
            published = await publish(source, 30)
        for _ in range(10):
            async with connect(prefetch=10) as source:
                await take(source, 5)
                await source.stop()
        async with connect(prefetch=1) as source:
            for expected in published:
                (message,) = await take(source, 1)
                assert (message.id, message.attempt) == (expected, 1)
                await source.ack(message)

    @pytest.mark.parametrize("published", [0, 3])
    async def test_a_waiting_read_is_ended_and_its_entries_are_not_lost(
        self,
        connect: Connect,
        broker: Server,
        client: Any,
        queue: str,
        monkeypatch: pytest.MonkeyPatch,
        published: int,
    ) -> None:
        monkeypatch.setattr(module, "POLL_SECONDS", 4)
        for _ in range(5):
            async with connect(prefetch=100) as source:
                await eventually(True, lambda: asyncio.sleep(0, not source._not_reading.is_set()))
                await eventually(True, lambda: asyncio.sleep(0, source._reader_id != 0))
                publishing = asyncio.create_task(publish(source, published))
                began_at = time.monotonic()
                await source.stop()
                assert time.monotonic() - began_at < 1
                await publishing
        assert broker.counts(queue) == Counts(ready=5 * published, delayed=0, dead=0)
        names = [info["name"] for info in client.xinfo_consumers(queue, queue)]
        assert names in ([], [b"requeued"])


class TestSettlements:
    async def test_acks_are_sent_together(self, connect: Connect, proxy: Proxy) -> None:
        async with connect(prefetch=100, broker_url=proxy.url) as source:
            await publish(source, 1000)
            sent_before = proxy.bytes_to_broker

            async def work() -> None:
                async for message in source:
                    await source.ack(message)

            workers = [asyncio.create_task(work()) for _ in range(10)]

            async def left() -> int:
                described = await source.describe()
                return int(described[source.settings.source]) + len(source.unacked)

            await eventually(0, left)
            await source.stop()
            await asyncio.gather(*workers)
        script_bytes = 1_000  # the script's part of each request
        assert proxy.bytes_to_broker - sent_before < 1000 * script_bytes / 10

    async def test_a_retry_that_is_due_does_not_wait_behind_a_backlog(
        self, connect: Connect
    ) -> None:
        async with connect(prefetch=1) as source:
            published = await publish(source, 200)
            (first,) = await take(source, 1)
            await source.retry(first, 0.1, "not now")
            seen: list[str] = []
            while published[0] not in seen:
                (message,) = await take(source, 1)
                seen.append(message.id)
                await asyncio.sleep(0.02)
                await source.ack(message)
            assert len(seen) < 100

    async def test_a_retry_without_a_delay_is_redelivered_at_once(self, connect: Connect) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            for attempt in range(1, 6):
                (message,) = await take(source, 1)
                assert message.attempt == attempt
                await source.retry(message, 0, "now")
            (message,) = await take(source, 1)
            await source.ack(message)

    @pytest.mark.parametrize("where", ["delayed", "requeued"])
    async def test_an_entry_that_was_trimmed_while_no_process_had_it_blocks_no_other_and_is_logged(
        self, connect: Connect, client: Any, queue: str, where: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            if where == "delayed":
                await source.retry(message, 0.3, "not now")
            else:
                await source.stop()
                await source.requeue(message)
            await eventually(1, lambda: pending(client, queue, where))
            client.xtrim(queue, maxlen=0)
        async with connect(prefetch=1) as source:
            published = await publish(source, 1)
            assert await ack_all(source, 1) == published
            await eventually(0, lambda: pending(client, queue))
            assert client.zcard(f"{queue}.delayed") == 0
        (trimmed,) = find(events, "messages_trimmed")
        assert (trimmed["level"], trimmed["count"]) == ("warning", 1)
        assert trimmed["ids"] == [message.receipt[0].decode()]

    async def test_an_entry_trimmed_in_flight_is_retried_with_its_attempts_and_its_delay(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        fields = {b"body": b"b", b"shop": b"S", b"headers": b'{"a": 1}'}
        async with connect(prefetch=1) as source:
            entry = client.xadd(queue, fields).decode()
            for attempt in (1, 2, 3):
                (message,) = await take(source, 1)
                assert (message.id, message.attempt) == (entry, attempt)
                assert message.headers == {"a": 1, "shop": "S"}
                client.xtrim(queue, maxlen=0)
                retried_at = time.monotonic()
                await source.retry(message, 0.4, "not now")
            (message,) = await take(source, 1)
            assert time.monotonic() - retried_at >= 0.39
            assert message.attempt == 4
            await source.retry(message, 0, "not trimmed this time")
            (message,) = await take(source, 1)
            assert message.attempt == 5
            client.xtrim(queue, maxlen=0)
            await source.reject(message, "bad")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [letter] = [letter async for letter in source.dead_letters(10)]
            assert (letter.id, letter.attempts, letter.reason) == (entry, 5, "bad")
            [(_, stored)] = client.xrange(f"{queue}.dead")
            assert {**stored, **fields} == stored
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            [(_, replayed)] = client.xrange(queue)
            assert replayed == {**fields, b"x-consumer-id": entry.encode()}
            assert await ack_all(source, 1) == [entry]

    @pytest.mark.parametrize("how", ["requeued at the deadline", "in the buffer", "at the close"])
    async def test_an_entry_trimmed_in_flight_is_requeued_by_a_shutdown(
        self, connect: Connect, client: Any, queue: str, how: str
    ) -> None:
        async with connect(prefetch=2) as source:
            published = await publish(source, 1)
            (message,) = await take(source, 1)
            await source.retry(message, 0, "not now")
            await buffer_holds(source, 1)
            if how != "in the buffer":
                (message,) = await take(source, 1)
            client.xtrim(queue, maxlen=0)
            await source.stop()
            if how == "requeued at the deadline":
                await source.requeue(message)
        async with connect(prefetch=1) as source:
            (message,) = await take(source, 1)
            assert ([message.id], message.attempt) == (published, 2)
            await source.ack(message)
            await eventually(0, lambda: pending(client, queue))
        assert client.xlen(queue) == 0

    async def test_an_entry_with_many_fields_that_was_trimmed_in_flight_is_not_lost(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        fields = {f"field-{number}": "" for number in range(4_500)} | {"body": "b", "type": "t"}
        async with connect(prefetch=1) as source:
            entry = client.xadd(queue, fields).decode()
            for attempt in (1, 2):
                (message,) = await take(source, 1)
                assert (message.id, message.body, message.attempt) == (entry, b"b", attempt)
                client.xtrim(queue, maxlen=0)
                await source.retry(message, 0.1, "not now")
            (message,) = await take(source, 1)
            assert message.attempt == 3
            client.xtrim(queue, maxlen=0)
            await source.reject(message, "bad")
            await eventually(1, source.count_dead_letters)

    async def test_another_producers_due_time_and_attempts_delay_nothing_for_ever_and_break_nothing(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        odd = ["nan", "inf", "-1", "", "1e300", "9" * 400, b"\xff", "soon"]
        async with connect(prefetch=20) as source:
            for value in odd:
                client.xadd(queue, {"body": "b", "x-consumer-due": value})
                client.xadd(queue, {"x-consumer-due": "1", "x-consumer-attempts": value})
            for message in await take(source, 2 * len(odd)):
                await source.ack(message)
            client.xadd(queue, {"x-consumer-due": "9" * 300, "x-consumer-attempts": "9" * 9})
            await eventually(1, lambda: pending(client, queue, "delayed"))
            client.zadd(
                f"{queue}.delayed", dict.fromkeys(client.zrange(f"{queue}.delayed", 0, -1), 0)
            )
            (message,) = await take(source, 1)
            assert message.attempt == ONE_CRASH - 1
            await source.reject(message, "too many")


async def publish_insistently(source: RedisBroker, count: int) -> list[str]:
    messages = [OutgoingMessage(b"x") for _ in range(count)]
    async with asyncio.timeout(20):
        while True:
            try:
                await source.publish(messages)
            except BrokerUnavailable:
                await asyncio.sleep(0.1)
            else:
                return ids(messages)


async def pending(client: Any, queue: str, owner: str = "") -> int:
    """How many entries this owner in the group has, or all owners."""
    rows = client.xinfo_consumers(queue, queue)
    return sum(row["pending"] for row in rows if not owner or row["name"] == owner.encode())


class TestEntries:
    async def test_an_entry_of_another_producer_keeps_its_fields_and_its_id(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        fields = {b"body": b"\xff\x00", b"shop": b"Z\xc3\xbcrich", b"headers": b"no JSON"}
        async with connect(prefetch=1) as source:
            entry = client.xadd(queue, fields)
            (message,) = await take(source, 1)
            assert (message.id, message.type) == (entry.decode(), "")
            assert (message.headers, message.body) == ({"shop": "Zürich"}, b"\xff\x00")
            await source.retry(message, 0, "now")
            (message,) = await take(source, 1)
            await source.reject(message, "bad")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [letter] = [letter async for letter in source.dead_letters(10)]
            assert (letter.id, letter.attempts) == (entry.decode(), 2)
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            (message,) = await take(source, 1)
            assert (message.id, message.attempt) == (entry.decode(), 1)
            [(_, replayed)] = client.xrange(queue)
            assert replayed == {**fields, b"x-consumer-id": entry}
            await source.ack(message)

    async def test_the_fields_of_an_entry_without_a_body_are_a_json_object(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        """And its id is not the ``id`` of a customer: another entry may have the same."""
        fields = {b"id": b"77", b"type": b"login", b"name": b"Z\xc3\xbcrich", b"raw": b"\xff"}
        body = '{"id":"77","type":"login","name":"Zürich","raw":"\ufffd"}'
        async with connect(prefetch=1) as source:
            entry = client.xadd(queue, fields)
            for attempt in (1, 2):
                (message,) = await take(source, 1)
                assert (message.id, message.type) == (entry.decode(), "login")
                assert (message.body.decode(), message.attempt) == (body, attempt)
                assert message.headers["name"] == "Zürich"
                assert message.origin == {"stream": queue, "source": queue}
                if attempt == 1:
                    client.xtrim(queue, maxlen=0)
                    await source.retry(message, 0, "again")
            await source.reject(message, "bad")
            await eventually(1, source.count_dead_letters)
            [letter] = [letter async for letter in source.dead_letters(9)]
            assert (letter.id, letter.type, letter.body.decode()) == (entry.decode(), "login", body)
            assert await last(source.replay_dead_letters()) == 1
            [(_, replayed)] = client.xrange(queue)
            assert replayed == {**fields, b"x-consumer-id": entry}
            (message,) = await take(source, 1)
            assert (message.id, message.body.decode()) == (entry.decode(), body)
            await source.ack(message)

    async def test_the_many_fields_of_an_entry_without_a_body_survive_as_one(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        fields = {f"field-{number}": str(number) for number in range(4_500)}
        async with connect(prefetch=1) as source:
            entry = client.xadd(queue, {**fields, "type": "t"}).decode()
            (message,) = await take(source, 1)
            await source.reject(message, "bad")
            await eventually(1, source.count_dead_letters)
            [letter] = [letter async for letter in source.dead_letters(9)]
            assert (letter.id, letter.type) == (entry, "t")
            assert json.loads(letter.body) == {**fields, "type": "t"}

    @pytest.mark.parametrize(
        "fields",
        [
            {"id": b"\xff", "type": b"\xff", "x-consumer-reason": b"\xff"},
            {"id": "", "headers": "[1]"},
            {"headers": "[" * 100_000},
            {"x-consumer-attempts": "", "x-consumer-dead-lettered-at": "yesterday"},
            {"x-consumer-attempts": b"\xff", "x-consumer-dead-lettered-at": "inf"},
        ],
        ids=["no text", "no object", "nested", "no numbers", "no finite number"],
    )
    async def test_any_entry_of_another_producer_is_delivered_listed_and_replayed(
        self, connect: Connect, client: Any, queue: str, fields: dict[str, Any]
    ) -> None:
        async with connect(prefetch=1) as source:
            client.xadd(queue, fields)
            (message,) = await take(source, 1)
            await source.reject(message, "bad: \ud800")
            await eventually(1, source.count_dead_letters)
            client.xadd(f"{queue}.dead", {"x-consumer-attempts": "3", **fields})
            client.xadd(f"{queue}.dead", {"id": "behind", "body": ""})
            ours, foreign, behind = [letter async for letter in source.dead_letters(9)]
            assert (ours.id, ours.type, ours.attempts) == (message.id, message.type, 1)
            assert (ours.reason, behind.id) == ("bad: ?", "behind")
            assert (foreign.type, foreign.dead_lettered_at) == (message.type, 0)
            assert [moved async for moved in source.replay_dead_letters()] == [3]
            assert await ack_all(source, 3) == [ours.id, foreign.id, behind.id]

    async def test_an_entry_with_more_fields_than_a_script_can_copy_becomes_a_dead_letter(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        fields = {f"field-{number}": "" for number in range(4_500)} | {"body": "b", "type": "t"}
        async with connect(prefetch=1) as source:
            entry = client.xadd(queue, fields).decode()
            (message,) = await take(source, 1)
            await source.reject(message, "bad")
            await eventually(1, source.count_dead_letters)
            client.xadd(f"{queue}.dead", fields)
            ours, foreign = [letter async for letter in source.dead_letters(9)]
            assert (ours.id, ours.type, ours.body, ours.attempts) == (entry, "t", b"b", 1)
            assert ours.reason.startswith("bad (of its 4502 fields, only body, id, type")
            assert (foreign.type, foreign.body) == ("t", b"b")
            assert [moved async for moved in source.replay_dead_letters()] == [2]
            assert await ack_all(source, 2) == [ours.id, foreign.id]

    async def test_headers_that_are_not_json_are_refused_on_publish(self, connect: Connect) -> None:
        async with connect(prefetch=0) as source:
            with pytest.raises(BrokerRefused, match="this message cannot be sent"):
                await publish(source, 1, headers={"bytes": b"\xff"})

    async def test_many_dead_letters_are_listed_replayed_and_purged_in_steps(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        async with connect(prefetch=0) as source:
            with client.pipeline() as pipeline:
                for number in range(1_200):
                    pipeline.xadd(f"{queue}.dead", {"id": number, "body": b"x"})
                pipeline.execute()
            letters = [letter async for letter in source.dead_letters(1_100)]
            assert ids(letters) == [str(number) for number in range(1_100)]
            assert [moved async for moved in source.replay_dead_letters()] == [500, 1_000, 1_200]
            assert (await source.describe())[queue] == 1_200
            assert await source.count_dead_letters() == 0


NAMES = st.sampled_from(
    shlex.split("""
        body id type headers x-consumer-reason x-consumer-attempts x-consumer-dead-lettered-at x-consumer-due
        x-consumer-id content-type content-encoding message-key ce-type ce_id ce-id
    """)
)
VALUES = (
    st.binary(max_size=50)
    | st.text().map(str.encode)
    | st.sampled_from([b"", b"nan", b"-inf", b"1e300", b"-1", b"0", b"1.5", b"3", b"\xff"])
    | st.sampled_from([b"[1]", b"{}", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 1_500, b"null"])
)
ENTRIES = st.lists(
    st.dictionaries(NAMES.map(str.encode) | st.binary(max_size=20), VALUES, min_size=1).filter(
        lambda fields: fields.get(b"x-consumer-due", b"")[:3] != b"1e3"
    ),
    max_size=30,
)


class TestForeignEntries:
    @pytest.mark.filterwarnings("ignore:Generating overly large repr")
    @settings(
        max_examples=20,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(in_source=ENTRIES, in_dead=ENTRIES, in_delayed=st.lists(VALUES), owners=st.lists(VALUES))
    def test_any_entries_become_dead_letters_that_are_listed_replayed_and_purged(
        self,
        broker: Server,
        settings_for: Callable[..., ConsumerSettings],
        in_source: list[dict[bytes, bytes]],
        in_dead: list[dict[bytes, bytes]],
        in_delayed: list[bytes],
        owners: list[bytes],
    ) -> None:
        queue = new_name(broker)
        config = settings_for(source=queue, broker_url=with_lease(broker.url, 0.3))
        count = len(in_source) + len(in_dead)

        async def survive() -> None:
            with client_of(broker) as client:
                for fields in in_source:
                    client.xadd(queue, fields)
                for fields in in_dead:
                    client.xadd(f"{queue}.dead", fields)
                for member in [*in_delayed, b"9" * 30 + b"-1", b"1-" + b"9" * 30]:
                    client.zadd(f"{queue}.delayed", {member: 1})
                for owner in owners:
                    client.zadd(f"{queue}.consumers", {owner: 1})
            async with opened(RedisBroker(config, 40)) as source:
                await source.start()
                for message in await take(source, len(in_source)):
                    assert (message.id + message.type).encode().decode()
                    await source.reject(message, "bad")
                await eventually(count, source.count_dead_letters)
                letters = [letter async for letter in source.dead_letters(count + 1)]
                assert len(letters) == count
                json.dumps([[le.id, le.type, le.reason, le.dead_lettered_at] for le in letters])
                assert await last(source.replay_dead_letters()) == count
                messages = await take(source, min(count, 20))
                assert Counter(ids(messages)) == Counter(ids(letters[:20]))
                for message in messages:
                    await source.reject(message, "bad again")
                await eventually(len(messages), source.count_dead_letters)
                assert await last(source.purge_dead_letters()) == len(messages)

        try:
            asyncio.run(survive())
        finally:
            broker.delete(queue)


class TestPublishing:
    """Publishing the results of entries, in the script that acknowledges them."""

    async def test_a_stream_that_does_not_exist_or_is_none_harms_no_other_message(
        self, connect: Connect, broker: Server, client: Any, queue: str, events: list[Event]
    ) -> None:
        good, missing, other = (f"{queue}-{name}" for name in ("next", "missing", "other"))
        client.xadd(good, {"body": "first"})
        client.set(other, "text")
        async with connect(prefetch=5) as source:
            published = await publish(source, 5)
            messages = await take(source, 5)
            to = [[good], [good, missing], [other, good], [good, good], [good]]
            outcomes = await asyncio.gather(
                *(
                    source.publish_and_ack(message, onward(message, *streams))
                    for message, streams in zip(messages, to, strict=True)
                ),
                return_exceptions=True,
            )
            assert [outcomes[place] for place in (0, 3, 4)] == [None] * 3
            refused = [str(outcome).partition(": ")[2] for outcome in outcomes[1:3]]
            assert refused == [
                f"the stream {missing!r} does not exist",
                f"the stream {other!r} is a string, and no stream",
            ]
            assert all(isinstance(outcome, BrokerRefused) for outcome in outcomes[1:3])
            assert client.xlen(good) == 1 + 4
            for stream, sentence in [(missing, "does not exist"), (other, "WRONGTYPE")]:
                with pytest.raises(BrokerRefused, match=sentence) as failure:
                    await source.publish(onward(messages[1], good, stream, good))
                assert repr(stream) in str(failure.value)
            assert client.xlen(good) == 1 + 8
            assert not client.exists(missing)
            for message in messages[1:3]:
                await source.retry(message, 0, "again")
            assert Counter(await ack_all(source, 2)) == Counter(published[1:3])
            assert source.connectivity.outage_count == 0
            await eventually(0, lambda: pending(client, queue))
        assert not find(events, "settlement_lost")
        assert client.xlen(queue) == 0
        client.delete(good, other)

    async def test_many_handlers_share_a_script(
        self, connect: Connect, proxy: Proxy, client: Any, queue: str
    ) -> None:
        client.xadd(f"{queue}-next", {"body": "first"})
        async with connect(prefetch=0) as publisher:
            await publish(publisher, 500)
        async with connect(prefetch=100, broker_url=proxy.url) as source:
            sent_before = proxy.bytes_to_broker
            for _ in range(5):
                publishing = [
                    source.publish_and_ack(message, onward(message, f"{queue}-next"))
                    for message in await take(source, 100)
                ]
                await asyncio.gather(*publishing)
            sent = proxy.bytes_to_broker - sent_before
        assert sent < 500 * 500  # the script alone has six thousand
        assert client.xlen(f"{queue}-next") == 501
        assert client.xlen(queue) == 0
        client.delete(f"{queue}-next")

    async def test_what_follows_from_an_entry_that_another_consumer_has_is_not_published(
        self, connect: Connect, client: Any, queue: str, events: list[Event]
    ) -> None:
        client.xadd(f"{queue}-next", {"body": "first"})
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            client.xclaim(queue, queue, "another", 0, [message.receipt[0]])  # its lease had expired
            await source.publish_and_ack(message, onward(message, f"{queue}-next"))
            [lost] = find(events, "settlement_lost")
            assert (lost["settlement"], lost["reason"]) == ("ack", "its lease had expired")
        assert client.xlen(f"{queue}-next") == 1
        assert await pending(client, queue, "another") == 1
        client.delete(f"{queue}-next")

    async def test_it_is_published_once_also_if_the_answer_is_lost(
        self, connect: Connect, client: Any, queue: str, events: list[Event]
    ) -> None:
        client.xadd(f"{queue}-next", {"body": "first"})
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            ask = source._commands.try_all

            async def lose_the_answer(*commands: Any) -> Any:
                await ask(*commands)
                source._commands.try_all = ask  # type: ignore[method-assign]
                raise BrokerUnavailable("lost")

            source._commands.try_all = lose_the_answer  # type: ignore[method-assign]
            await source.publish_and_ack(message, onward(message, f"{queue}-next"))
            assert not source._maybe_published
        assert not find(events, "settlement_lost")
        assert (client.xlen(queue), client.xlen(f"{queue}-next")) == (0, 2)
        client.delete(f"{queue}-next")

    async def test_an_entry_that_was_trimmed_in_flight_is_acknowledged_with_what_follows(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        client.xadd(f"{queue}-next", {"body": "first"})
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            client.xtrim(queue, maxlen=0)
            await source.publish_and_ack(message, onward(message, f"{queue}-next"))
            assert await pending(client, queue) == 0
        assert client.xlen(f"{queue}-next") == 2
        client.delete(f"{queue}-next")

    async def test_a_handler_that_is_cancelled_in_it_requeues_its_message_or_has_published(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        client.xadd(f"{queue}-next", {"body": "first"})
        async with connect(prefetch=50) as source:
            await publish(source, 50)
            messages = await take(source, 50)
            await source.stop()
            outgoing = [onward(message, f"{queue}-next") for message in messages]
            publishing = [
                asyncio.create_task(source.publish_and_ack(*both))
                for both in zip(messages, outgoing, strict=True)
            ]
            for number, (task, message) in enumerate(zip(publishing, messages, strict=True)):
                if number % 5 == 0:
                    await asyncio.sleep(0)
                if number % 2:
                    task.cancel()
                    await source.requeue(message)
            await asyncio.gather(*publishing, return_exceptions=True)
        assert broker.counts(queue).ready + client.xlen(f"{queue}-next") == 51
        assert client.xlen(f"{queue}-next") >= 26
        client.delete(f"{queue}-next")

    async def test_a_server_without_memory_fails_the_handler_and_not_the_consumer(
        self, connect: Connect, node: PrivateServer, queue: str
    ) -> None:
        with client_of(node) as client:
            async with connect(prefetch=2, broker_url=node.url) as source:
                client.xadd(f"{queue}-next", {"body": "first"})
                await publish(source, 2)
                one, other = await take(source, 2)
                client.config_set("maxmemory", 1)
                try:
                    with pytest.raises(BrokerUnavailable, match="OOM"):
                        await source.publish_and_ack(one, onward(one, f"{queue}-next"))
                    await source.ack(other)
                    await eventually(1, lambda: pending(client, queue))
                finally:
                    client.config_set("maxmemory", 0)
                await source.publish_and_ack(one, onward(one, f"{queue}-next"))
            assert client.xlen(f"{queue}-next") == 2
            assert client.xlen(queue) == 0

    @pytest.mark.parametrize(
        "fields", [{"id": "\ud800"}, {"type": "\ud800"}, {"to": "stream:\ud800"}]
    )
    async def test_what_is_no_text_is_refused_with_one_sentence(
        self, connect: Connect, queue: str, fields: dict[str, Any]
    ) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            outgoing = [OutgoingMessage(b"x", **{"to": f"stream:{queue}", **fields})]
            for publishing in (source.publish(outgoing), source.publish_and_ack(message, outgoing)):
                with pytest.raises(BrokerRefused, match="this message cannot be sent"):
                    await publishing
            await source.ack(message)
            assert source.connectivity.outage_count == 0

    async def test_in_a_cluster_each_stream_is_published_to_where_it_is(
        self, connect: Connect, cluster_of_six: RedisSet, queue: str
    ) -> None:
        url = cluster_of_six.url
        streams = [f"{{{queue}}}-next", *(f"{queue}-{number}" for number in range(8))]
        source_name = f"{{{queue}}}"
        with client_of(cluster_of_six) as client:
            for stream in streams:
                client.xadd(stream, {"body": "first"})
            assert len({node_of(cluster_of_six, stream) for stream in streams}) > 1
            async with connect(prefetch=3, broker_url=url, source=source_name) as source:
                await publish(source, 3)
                one, two, three = await take(source, 3)
                await source.publish_and_ack(one, onward(one, streams[0]))
                await source.publish_and_ack(two, onward(two, *streams))
                with pytest.raises(BrokerRefused, match="missing' does not exist"):
                    await source.publish_and_ack(three, onward(three, *streams, f"{queue}-missing"))
                await source.ack(three)
            assert [client.xlen(stream) for stream in streams] == [4, *[3] * 8]
            assert client.xlen(source_name) == 0
            for stream in streams:
                client.delete(stream)
        cluster_of_six.delete(source_name)


def onward(message: Message, *streams: str) -> list[OutgoingMessage]:
    return [OutgoingMessage(message.body, to=f"stream:{stream}") for stream in streams]


class TestTopology:
    async def test_describing_and_listing_create_nothing(
        self, source_for: Callable[..., RedisBroker], client: Any, queue: str
    ) -> None:
        async with source_for() as source:
            described = await source.describe()
            assert (described[queue], described[f"{queue}.dead"]) == (MISSING, 0)
            assert await source.count_dead_letters() == 0
            assert [letter async for letter in source.dead_letters(9)] == []
            assert await last(source.purge_dead_letters()) == 0
            assert not client.keys(f"{queue}*")
            client.xadd(queue, {"body": "b"})
            assert (await source.describe())[f"{queue} group {queue}"] == MISSING
            assert not client.xinfo_groups(queue)
            await source.declare()
            await source.declare()
            assert (await source.describe())[queue] == 1

    async def test_entries_that_another_program_acknowledged_and_kept_are_not_left_to_do(
        self, connect: Connect, source_for: Callable[..., RedisBroker], client: Any, queue: str
    ) -> None:
        client.xgroup_create(queue, queue, "0", mkstream=True)
        for _ in range(100):
            client.xack(queue, queue, client.xadd(queue, {"body": "old"}))
        client.xreadgroup(queue, "another", {queue: ">"}, count=100)
        client.xack(queue, queue, *[entry for entry, _ in client.xrange(queue)])
        async with connect(prefetch=5) as source:
            assert (await source.describe())[queue] == 0
            await publish(source, 8)
            messages = await take(source, 5)
            described = await source.describe()
            assert (described[queue], described[f"{queue} in flight"]) == (3, 5)

            async def left() -> int:
                described = await source.describe()
                return int(described[queue]) + int(described[f"{queue} in flight"])

            await source.ack(messages[-1])  # afterwards Redis does not always know the lag
            await eventually(7, left)
            await source.stop()
            await eventually(7, left)
        async with source_for() as source:
            await eventually(7, left)
            assert (await source.describe())[queue] == 7

    async def test_entries_trimmed_before_they_were_read_are_logged_once_with_their_number(
        self, connect: Connect, broker: Server, client: Any, queue: str, events: list[Event]
    ) -> None:
        about = client.info("server")
        if about.get("server_name") == "valkey" or int(about["redis_version"].split(".")[0]) >= 8:
            pytest.skip("this server counts trimmed entries as read, at the next read")
        url = with_lease(broker.url, 0.3)
        async with connect(prefetch=1, broker_url=url) as source:
            await publish(source, 3)
            await ack_all(source, 1)
        async with connect(prefetch=0) as publisher:
            await publish(publisher, 20)
        client.xtrim(queue, maxlen=14, approximate=False)
        async with connect(prefetch=2, broker_url=url) as source, connect(2, broker_url=url):
            await eventually(4, lambda: pending(client, queue))
            await eventually_logged(events, "messages_trimmed")
            await asyncio.sleep(0.5)  # several looks
            client.xtrim(queue, maxlen=4, approximate=False)  # in-flight ones, too
            await eventually_logged(events, "messages_trimmed", 2)
            await asyncio.sleep(0.5)
            assert client.xinfo_groups(queue)[0]["lag"] == client.xlen(queue)
        first, second = find(events, "messages_trimmed")
        assert (first["level"], first["count"]) == ("warning", 2 + 20 - 14)
        assert (second["level"], second["count"]) == ("warning", 14 - 4 - 4)

    @pytest.mark.parametrize("suffix", ["", ".dead", ".delayed", ".consumers"])
    async def test_a_key_of_another_type_is_one_sentence(
        self, source_for: Callable[..., RedisBroker], client: Any, queue: str, suffix: str
    ) -> None:
        client.set(f"{queue}{suffix}", "text")
        with pytest.raises(
            BrokerRefused, match=f"{queue}{suffix}' already exists, and is a string and no"
        ):
            await source_for().__aenter__()

    async def test_an_entry_is_deleted_when_the_last_group_has_acknowledged_it(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        """The other group is another program's, and reads slowly."""
        client.xgroup_create(queue, "theirs", "0", mkstream=True)
        async with connect() as source:
            await publish(source, 3)
            first, second, third = await take(source, 3)
            await source.ack(first)
            await source.publish_and_ack(second, [])
            await source.flush()
            assert client.xlen(queue) == 3
            [[_, entries]] = client.xreadgroup("theirs", "me", {queue: ">"}, count=2)
            assert [fields[b"id"].decode() for _, fields in entries] == [first.id, second.id]
            await source.reject(third, "bad")
            await source.flush()
            assert client.xlen(queue) == 3  # the third is unread, and two are unacknowledged
            assert (await source.describe())[queue] == 0
            [[_, entries]] = client.xreadgroup("theirs", "me", {queue: ">"})
            assert len(entries) == 1
            client.xgroup_destroy(queue, "theirs")
            await publish(source, 1)
            await ack_all(source, 1)
            await source.flush()
            assert client.xlen(queue) == 3  # entries that no group acknowledges any more stay

    async def test_a_replay_and_an_entry_that_was_trimmed_in_flight_are_of_one_group(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        async with connect() as one, connect(group="other") as other:
            await publish(one, 2)
            assert len(await ack_all(other, 2)) == 2
            rejected, trimmed = await take(one, 2)
            await one.reject(rejected, "bad")
            await one.flush()
            client.xtrim(queue, maxlen=0)
            await one.retry(trimmed, 0.05, "not now")
            [again] = await take(one, 1)
            assert (again.id, again.attempt) == (trimmed.id, 2)
            assert [moved async for moved in one.replay_dead_letters()] == [1]
            [replayed] = await take(one, 1)
            assert (replayed.id, replayed.headers) == (rejected.id, {})
            for message in (again, replayed):
                await one.ack(message)

            async def length() -> object:
                return client.xlen(queue)

            await eventually(0, length)  # the other group has acknowledged them too
            assert len(other.unacked) == 0
            assert await other.count_dead_letters() == 0

    async def test_a_server_without_a_durable_log_is_described_as_such(
        self, connect: Connect, node: PrivateServer, queue: str
    ) -> None:
        with client_of(node) as client:
            async with connect(prefetch=0, broker_url=node.url) as source:
                described = await source.describe()
                assert str(described["server"]).startswith(("Redis ", "Valkey "))
                assert described["appendonly"] == "yes"
                assert "eviction" not in described
                client.config_set("appendonly", "no")
                client.config_set("maxmemory-policy", "allkeys-lru")
                client.config_set("maxmemory", "1gb")
                described = await source.describe()
                assert str(described["appendonly"]).startswith("no: ")
                assert str(described["eviction"]).startswith("allkeys-lru: ")
            client.config_set("maxmemory", "0")
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("appendonly", "yes")

    async def test_a_server_without_memory_refuses_new_messages_and_is_emptied(
        self, connect: Connect, node: PrivateServer, queue: str, events: list[Event]
    ) -> None:
        url = with_lease(node.url, 0.3)
        with client_of(node) as client:
            async with connect(prefetch=2, broker_url=url) as source:
                await publish(source, 20)
                (first,) = await take(source, 1)
                client.config_set("maxmemory", "1")
                with pytest.raises(BrokerUnavailable, match="maxmemory"):
                    await publish(source, 1)
                await source.reject(first, "waits for memory")
                await asyncio.sleep(0.4)  # several beats
                assert len(await ack_all(source, 19)) == 19
                client.config_set("maxmemory", "0")
                await eventually(1, source.count_dead_letters)
            assert client.xlen(queue) == 0
        assert not find(events, "settlement_lost") + find(events, "reconnecting")
        node.delete(queue)

    async def test_on_a_cluster_the_sources_name_has_braces(
        self, source_for: Callable[..., RedisBroker], connect: Connect, tmp_path: Path, queue: str
    ) -> None:
        name = queue.strip("{}")
        with cluster(tmp_path) as url:
            with pytest.raises(
                BrokerRefused, match=r"redis\+cluster://.* CONSUMER_SOURCE with braces"
            ):
                async with connect(broker_url=url, source=name):
                    pass
            async with connect(broker_url=url, source="{" + name + "}") as source:
                await publish(source, 2)
                bad, good = await take(source, 2)
                await source.reject(bad, "bad")
                await source.retry(good, 0, "now")
                await ack_all(source, 1)
                await eventually(1, source.count_dead_letters)

    def test_a_cluster_node_without_the_stream_names_the_node_that_has_it_and_the_scheme(
        self, broker: Server
    ) -> None:
        moved = redis.exceptions.MovedError("3999 10.0.0.2:6381")
        requests = Requests("redis://10.0.0.1", (), module.RULES)
        error = requests.translated(moved)
        assert isinstance(error, BrokerRefused)
        assert (
            "is on another node of this cluster (3999 10.0.0.2:6381): write redis+cluster://"
            in (str(error))
        )


def cluster(directory: Path) -> "closing[Any]":
    """The URL of a cluster of one node, which has all the slots."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("no redis-server is installed")
    port, bus = free_ports(2)

    class Cluster(str):
        def close(self) -> None: ...

    def answers() -> bool:
        with closing(cast(Any, redis.Redis)(port=port, socket_timeout=2, retry=None)) as client:
            try:
                if client.execute_command("CLUSTER INFO").get("cluster_state") == "ok":
                    return True
                client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            except redis.exceptions.RedisError:
                pass
            return False

    server = ServerProcess(
        [
            program,
            "--port",
            str(port),
            "--save",
            "",
            "--cluster-enabled",
            "yes",
            "--cluster-port",
            str(bus),
        ],
        directory,
        answers,
    )
    url = Cluster(f"redis://127.0.0.1:{port}")
    url.close = server.close  # type: ignore[method-assign]
    return closing(url)


@pytest.fixture(scope="session")
def redis_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], RedisSet]]:
    """Gives the set of this name, whose nodes a test may kill if it starts them again."""
    with ExitStack() as running:

        @cache
        def start(name: str) -> RedisSet:
            make: Any = {"redis-sentinel": redis_sentinel, "redis-cluster": redis_cluster}[name]
            try:
                server: RedisSet = running.enter_context(make(tmp_path_factory.mktemp(name)))
            except ServerMissing as missing:
                skip_without_server(missing)
            return server

        yield start


@pytest.fixture(params=["redis-sentinel", "redis-cluster"])
def redis_set(
    request: pytest.FixtureRequest, redis_sets: Callable[[str], RedisSet]
) -> Iterator[RedisSet]:
    server = redis_sets(request.param)
    yield server
    if server.down:
        server.restart()


@pytest.fixture
def cluster_of_six(redis_sets: Callable[[str], RedisSet]) -> RedisSet:
    return redis_sets("redis-cluster")


def node_of(server: RedisSet, stream: str) -> str:
    """The name of the node that has the stream."""
    [name] = [n for n in server.masters() if ask_redis(server.ports[n], "KEYS", stream)]
    return name


class TestSets:
    """Several servers: after a failover, and for a slot that moves."""

    @pytest.fixture(autouse=True)
    def reconnects_soon(self, shorten: Callable[..., None]) -> None:
        shorten(0.2, "FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS")

    @pytest.mark.parametrize("how", ["killed", "asked to hand over"])
    async def test_a_failover_is_an_outage_that_heals_and_nothing_confirmed_is_lost(
        self, connect: Connect, redis_set: RedisSet, queue: str, events: list[Event], how: str
    ) -> None:
        url = with_options(redis_set.url, wait_replicas=1, lease_seconds=1)
        async with connect(prefetch=10, broker_url=url) as source:
            published = await publish(source, 40)
            handled = await ack_all(source, 20)
            done, later, bad, back = await take(source, 4)
            old = await asyncio.to_thread(node_of, redis_set, queue)
            if how == "killed":
                redis_set.down = old
                redis_set.nodes[old].kill()
            else:
                await asyncio.to_thread(hand_over, redis_set, old)
            await source.ack(done)
            await source.retry(later, 0, "not now")
            await source.reject(bad, "bad")
            await source.requeue(back)
            handled.append(done.id)
            await eventually_logged(events, "connected", 2)
            if redis_set.down:  # a cluster's new master has no other replica
                await asyncio.to_thread(redis_set.restart)
            published += await publish_insistently(source, 20)
            while {*handled, bad.id} < {*published}:
                handled += await ack_all(source, 1)
            await eventually(1, source.count_dead_letters)
            new = await asyncio.to_thread(node_of, redis_set, queue)
            assert new != old
            await source.purge_dead_letters().__anext__()
        assert redis_set.url.startswith(find(events, "reconnecting")[0]["broker"])
        redis_set.delete(queue)

    async def test_a_slot_that_moves_is_an_outage_until_it_has_moved_and_loses_nothing(
        self, connect: Connect, cluster_of_six: RedisSet, queue: str, events: list[Event]
    ) -> None:
        server = cluster_of_six
        beside = server.beside(queue)
        async with connect(prefetch=5, broker_url=server.url) as source:
            published = await publish(source, 30)
            handled = await ack_all(source, 10)
            in_flight = await take(source, 2)
            await source.retry(in_flight[0], 3600, "has a key of its own")
            await eventually(1, lambda: asyncio.to_thread(delayed_of, server, queue))
            old = await asyncio.to_thread(node_of, server, queue)
            new = next(name for name in server.masters() if name != old)
            slot = key_slot(queue.encode())
            names = {n: ask_redis(server.ports[n], "CLUSTER", "MYID").decode() for n in (old, new)}

            def tell(node: str, *words: object) -> None:
                assert ask_redis(server.ports[node], *words) is not None, words

            tell(new, "CLUSTER", "SETSLOT", slot, "IMPORTING", names[old])
            tell(old, "CLUSTER", "SETSLOT", slot, "MIGRATING", names[new])
            migrate = ("MIGRATE", "127.0.0.1", server.ports[new])
            tell(old, *migrate, f"{beside}.delayed", 0, 5000)
            await eventually_logged(events, "reconnecting")  # the keys are in two places
            tell(old, *migrate, queue, 0, 5000)
            await source.ack(in_flight[1])
            handled.append(in_flight[1].id)
            ask_redis(server.ports[old], *migrate, f"{beside}.consumers", 0, 5000)
            for node in (new, old, *server.masters()):
                tell(node, "CLUSTER", "SETSLOT", slot, "NODE", names[new])
            await eventually_logged(events, "connected", 2)
            published += await publish_insistently(source, 5)
            while {*handled, in_flight[0].id} < {*published}:
                handled += await ack_all(source, 1)
            assert node_of(server, queue) == new
        assert Counter(handled) == Counter(set(handled))
        assert server.counts(queue) == Counts(ready=0, delayed=1, dead=0)
        server.delete(queue)

    async def test_what_no_replica_has_confirmed_counts_as_not_published(
        self, connect: Connect, redis_set: RedisSet, queue: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "REPLICAS_SECONDS", 0.3)
        url = with_options(redis_set.url, wait_replicas=1)
        async with connect(prefetch=0, broker_url=url) as source:
            await publish(source, 1)
            masters = await asyncio.to_thread(redis_set.masters)
            replicas = [node for name, node in redis_set.nodes.items() if name not in masters]
            for node in replicas:
                node.send(signal.SIGSTOP)
            try:
                with pytest.raises(BrokerUnavailable, match="0 of 1 replicas have confirmed"):
                    await publish(source, 1)
            finally:
                for node in replicas:
                    node.send(signal.SIGCONT)
            assert len(await publish_insistently(source, 1)) == 1
        redis_set.delete(queue)

    async def test_a_cluster_keeps_the_keys_of_any_source_together(
        self, cluster_of_six: RedisSet, connect: Connect, queue: str
    ) -> None:
        stream = queue.strip("{}")
        for name in (stream, f"{stream}{{}}", f"{{{stream}}}", f"a{{{stream}}}b{{c}}"):
            if name == f"{stream}{{}}":
                with pytest.raises(
                    BrokerRefused, match=r"CONSUMER_SOURCE: on a cluster, .* braces"
                ):
                    async with connect(broker_url=cluster_of_six.url, source=name):
                        pass
                continue
            group = {"group": "g"} if name == stream else {}
            async with connect(2, broker_url=cluster_of_six.url, source=name, **group) as source:
                await publish(source, 2)
                bad, good = await take(source, 2)
                await source.reject(bad, "bad")
                await source.retry(good, 0, "now")
                await ack_all(source, 1)
                await eventually(1, source.count_dead_letters)
                beside = name if "{" in name else f"{{{name}}}"
                dead = f"{beside}.dead.g" if group else f"{beside}.dead"
                assert dead in await source.describe()
                assert [moved async for moved in source.replay_dead_letters()] == [1]
                await ack_all(source, 1)


def hand_over(server: RedisSet, master: str) -> None:
    """A failover without a failure: the master becomes a replica, and stays up."""
    if isinstance(server, SentinelSet):
        port = int(server.url.partition(",")[0].rpartition(":")[2])
        wait_for("a Sentinel that may", lambda: ask_redis(port, "SENTINEL", "FAILOVER", MASTER))
    else:
        its_id = ask_redis(server.ports[master], "CLUSTER", "MYID").decode()
        [replica] = [
            name
            for name, port in server.ports.items()
            if f"myself,slave {its_id}"
            in " ".join(
                line.split(" ", 2)[2]
                for line in ask_redis(port, "CLUSTER", "NODES").decode().splitlines()
            )
        ]
        ask_redis(server.ports[replica], "CLUSTER", "FAILOVER")
    wait_for("another master", lambda: server.about(master).get("role") == "slave")


def delayed_of(server: Server, queue: str) -> int:
    return server.counts(queue).delayed


class TestAddresses:
    """Addresses by Sentinel, and of clusters: in the URL, and in the servers' answers."""

    @pytest.mark.parametrize(
        ("url", "sentence"),
        [
            ("redis+sentinel://host", "the master's name is missing: redis\\+sentinel://"),
            ("redis+sentinel://host:26379/?db=1", "the master's name is missing"),
            ("redis+sentinel:///master", "not like .*redis\\+sentinel://"),
            ("redis+sentinel://host/master/s3cret", "not like "),
            ("redis+sentinel://host/master/0/s3cret", "not like "),
            (
                "sentinel://host:26379;sentinel://host:26380",
                "unknown scheme 'sentinel'; .*redis\\+sent",
            ),
            (
                "redis+sentinel://host:26379;sentinel://host:26380/m",
                "not like .*redis\\+sentinel://",
            ),
            ("redis://one,two", "not like .*redis\\+cluster://"),
            ("redis://host?sentinel_password=s3cret", "unknown option 'sentinel_password'"),
            ("redis+cluster://host?sentinel_password=s3cret", "unknown option 'sentinel_password'"),
            ("redis+cluster://host/1", "a cluster has only database 0"),
            ("redis+cluster://host?db=2", "a cluster has only database 0"),
            ("redis+cluster://host/s3cret", "not like "),
            ("redis+cluster://", "not like "),
            ("redis+other://host", "unknown scheme"),
            ("redis+cluster://host?wait_replicas=some", "wait_replicas must be a number"),
        ],
    )
    def test_a_wrong_url_is_one_sentence(
        self, source_for: Callable[..., RedisBroker], url: str, sentence: str
    ) -> None:
        with pytest.raises(BrokerRefused, match=sentence) as refused:
            source_for(broker_url=url)
        assert "s3cret" not in str(refused.value)

    def test_a_url_names_hosts_credentials_master_and_database(self, broker: Server) -> None:
        url = RedisUrl("redis+sentinel://us%40er:p%2Fw@one,two:26380/master/3?sentinel_password=s")
        assert url.addresses == [("one", 26379), ("two", 26380)]
        assert (url.master, url.kind) == ("master", "sentinel")
        assert url.redacted == "redis+sentinel://one:26379,two:26380"
        kwargs = url.pool.connection_kwargs
        assert (kwargs["username"], kwargs["password"], kwargs["db"]) == ("us@er", "p/w", 3)
        url = RedisUrl("rediss+cluster://:p@one,two:6380/0?ssl_ca_certs=ca.pem")
        assert url.addresses == [("one", 6379), ("two", 6380)]
        assert url.pool.connection_kwargs["ssl_ca_certs"] == "ca.pem"

    async def refusal(self, connect: Connect, url: str, **settings: Any) -> str:
        with pytest.raises(BrokerError) as failed:
            async with connect(broker_url=url, **settings):
                pass
        return f"{type(failed.value).__name__} {failed.value}"

    async def test_what_the_servers_are_not_is_one_sentence(
        self, connect: Connect, redis_sets: Callable[[str], RedisSet], node: PrivateServer
    ) -> None:
        sentinel = redis_sets("redis-sentinel").url
        text = await self.refusal(connect, sentinel.replace(f"/{MASTER}", "/orders"))
        assert text.startswith("BrokerRefused")
        assert text.endswith(f": the Sentinels know no master 'orders', but: {MASTER}")
        locate = MasterOfSentinels(lambda: RedisUrl(sentinel.replace(f"/{MASTER}", "/orders")))
        locate._was_found = True  # as in an outage: the Sentinels may have lost their settings
        with pytest.raises(redis.exceptions.RedisError, match="see no live master 'orders'"):
            await locate()
        host = urlsplit(node.url).netloc
        text = await self.refusal(connect, f"redis+sentinel://{host}/orders")
        assert "BrokerRefused" in text
        assert "the server is no Sentinel" in text
        text = await self.refusal(connect, f"redis+cluster://{host}")
        assert "BrokerRefused" in text
        assert "the server is no node of a cluster" in text
        nobody = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
        for url, who in (
            (f"redis+sentinel://{nobody}/orders", "no Sentinel answers: Error 111 connecting"),
            (f"redis+cluster://{nobody}", "no node of the cluster answers: Error 111 connecting"),
        ):
            text = await self.refusal(connect, url)
            assert text.startswith("BrokerUnavailable")
            assert who in text

    async def test_one_that_answers_is_enough(
        self, connect: Connect, redis_set: RedisSet, queue: str
    ) -> None:
        nobody = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
        url = redis_set.url.replace("://", f"://{nobody},")
        async with connect(broker_url=url) as source:
            assert await publish(source, 1) == await ack_all(source, 1)
        redis_set.delete(queue)

    async def test_a_node_alone_by_redis_urls_says_which_scheme_a_cluster_needs(
        self, connect: Connect, cluster_of_six: RedisSet, queue: str
    ) -> None:
        port = cluster_of_six.ports["node0"]
        text = await self.refusal(connect, f"redis://127.0.0.1:{port}", source=queue.strip("{}"))
        assert text.startswith("BrokerRefused")
        assert "write redis+cluster:// in place of redis://" in text

    @pytest.mark.parametrize("kind", ["sentinel", "cluster"])
    async def test_passwords_and_tls_of_the_servers_and_of_sentinel(
        self, connect: Connect, kind: str, certificates: Path, tmp_path: Path, queue: str
    ) -> None:
        files = {
            "ssl_ca_certs": "ca.pem",
            "ssl_certfile": "client.pem",
            "ssl_keyfile": "client.key",
        }
        options: dict[str, object] = {name: certificates / file for name, file in files.items()}
        with secured_set(kind, tmp_path, certificates) as (host, user):
            url = f"rediss+{kind}://{user}@{host}"
            if kind == "sentinel":
                url += "/secured"
                options["sentinel_password"] = quote(SENTINEL_PASSWORD, safe="")
            async with connect(broker_url=with_options(url, **options)) as source:
                assert await publish(source, 1) == await ack_all(source, 1)
            text = await self.refusal(connect, with_options(url.replace(user, ":no"), **options))
            assert "BrokerDenied" in text
            assert "refused the user name or the password" in text
            other = {**options, "ssl_ca_certs": certificates / "other.pem"}
            text = await self.refusal(connect, with_options(url, **other))
            assert "MendableRefusal" in text
            assert "no TLS connection: " in text
            if kind == "sentinel":
                for wrong in ({"sentinel_password": "no"}, {}):
                    kept = {n: v for n, v in options.items() if n != "sentinel_password"}
                    text = await self.refusal(connect, with_options(url, **kept, **wrong))
                    assert "BrokerDenied" in text
                    assert "the Sentinels refused sentinel_username or sentinel_password" in text

    async def test_a_cluster_needs_one_more_right(
        self, connect: Connect, cluster_of_six: RedisSet, queue: str
    ) -> None:
        server, (name, password) = cluster_of_six, ODD_USER
        keys = [f"~{queue}", f"~{{{queue.strip('{}')}}}.*"]  # as documented
        rights = ["reset", "on", f">{password}", *keys, *RIGHTS, "+wait"]
        for port in server.ports.values():
            ask_redis(port, "ACL", "SETUSER", name, *rights, "+cluster|slots")
        url = with_options(with_user(server.url, *ODD_USER), wait_replicas=1)
        async with connect(prefetch=2, broker_url=url) as source:
            assert await publish(source, 2) == await ack_all(source, 2)
        for port in server.ports.values():
            ask_redis(port, "ACL", "SETUSER", name, "-cluster|slots")
        text = await self.refusal(connect, url)
        for port in server.ports.values():
            ask_redis(port, "ACL", "DELUSER", name)
        assert text.startswith("BrokerDenied")
        assert "cluster|slots" in text


SENTINEL_PASSWORD = "of the/Sentinels"


@contextmanager
def secured_set(kind: str, folder: Path, certificates: Path) -> Iterator[tuple[str, str]]:
    """One server, and one Sentinel or a cluster of one, with TLS and passwords; its host, and the credentials."""
    port, bus, sentinel = free_ports(3)
    tls = ["--tls-cert-file", "server.pem", "--tls-key-file", "server.key"]
    tls += ["--tls-ca-cert-file", "ca.pem", "--tls-replication", "yes", "--tls-cluster", "yes"]
    tls = [str(certificates / word) if "." in word else word for word in tls]
    own = {"ssl": True, "ssl_ca_certs": str(certificates / "ca.pem")}
    own |= {"ssl_certfile": str(certificates / "client.pem")}
    own |= {"ssl_keyfile": str(certificates / "client.key")}

    def ask(port: int, password: str, *words: object) -> Any:
        with closing(cast(Any, redis.Redis)(port=port, password=password, **own)) as client:
            try:
                return client.execute_command(*words)
            except redis.exceptions.RedisError:
                return None

    with ExitStack() as running:

        def start(name: str, port: int, password: str, *options: str) -> None:
            (folder / name).mkdir()
            command = ["redis-server", *options, "--tls-port", str(port), "--port", "0", *tls]
            command += ["--bind", "127.0.0.1", "--dir", str(folder / name)]
            server = ServerProcess(
                command, folder / name, lambda: bool(ask(port, password, "PING"))
            )
            running.callback(server.close)

        if shutil.which("redis-server") is None:
            pytest.skip("no redis-server is installed")
        in_cluster = ["--cluster-enabled", "yes", "--cluster-port", str(bus)]
        start(
            "server",
            port,
            ODD_USER[1],
            "--save",
            "",
            "--requirepass",
            ODD_USER[1],
            *(in_cluster if kind == "cluster" else []),
        )
        if kind == "cluster":
            ask(port, ODD_USER[1], "CLUSTER", "ADDSLOTS", *range(16384))
            wait_for(
                "its slots",
                lambda: b"cluster_state:ok" in (ask(port, ODD_USER[1], "CLUSTER", "INFO") or b""),
            )
            yield f"127.0.0.1:{port}", f":{quote(ODD_USER[1], safe='')}"
            return
        conf = folder / "sentinel.conf"
        conf.write_text(
            f'sentinel monitor secured 127.0.0.1 {port} 1\nrequirepass "{SENTINEL_PASSWORD}"\n'
            f'sentinel auth-pass secured "{ODD_USER[1]}"\n'
        )
        start("sentinel", sentinel, SENTINEL_PASSWORD, str(conf), "--sentinel")
        wait_for("its master", lambda: ask(sentinel, SENTINEL_PASSWORD, "SENTINEL", "MASTERS"))
        yield f"127.0.0.1:{sentinel}", f":{quote(ODD_USER[1], safe='')}"


def url_for(server: Server, user: tuple[str, str]) -> str:
    return with_user(server.url, *user)


RIGHTS = shlex.split("""
    +ping +type +info +client|id +client|unblock +eval +time
    +xgroup +xinfo +xadd +xreadgroup +xack +xdel +xclaim +xpending +xrange +xrevrange +xlen
    +zadd +zrem +zcard +zcount +zscore +zrange +zrangebyscore +zremrangebyscore +unlink
""")
"""The rights in the documentation."""
UNNOTICED = ["+info", "+ping", "+client|id", "+client|unblock", "+xrevrange", "+unlink"]
"""Rights whose lack is harmless, or does not affect a busy consumer."""


class TestCredentials:
    @pytest.fixture
    def user(self, node: PrivateServer, queue: str) -> Iterator[Callable[..., str]]:
        """Creates the user with these rights; returns a URL with the user's name and password."""
        with client_of(node) as client:

            def make(*rights: str) -> str:
                name, password = ODD_USER
                client.execute_command(
                    "ACL", "SETUSER", name, "reset", "on", f">{password}", *rights
                )
                return url_for(node, ODD_USER)

            yield make
            client.execute_command("ACL", "DELUSER", ODD_USER[0])
            node.delete(queue)

    async def test_the_documented_rights_and_any_password_are_enough(
        self, connect: Connect, user: Callable[..., str], queue: str, events: list[Event]
    ) -> None:
        url = user(f"~{queue}*", *RIGHTS)
        async with connect(prefetch=3, broker_url=with_lease(url, 0.3)) as source:
            await publish(source, 3)
            done, later, bad = await take(source, 3)
            await source.ack(done)
            await source.retry(later, 0, "now")
            await source.reject(bad, "bad")
            await ack_all(source, 1)
            await eventually(1, source.count_dead_letters)
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            await ack_all(source, 1)
            await asyncio.sleep(0.5)  # a look for dead consumers
            await source.describe()
            await last(source.purge_dead_letters())
            await source.stop()
        assert {event["event"] for event in events} == {"connected"}

    async def test_keys_that_the_user_has_no_right_to_are_one_sentence(
        self, connect: Connect, user: Callable[..., str]
    ) -> None:
        with pytest.raises(BrokerDenied, match=r"(?i)no permissions"):
            async with connect(broker_url=user("~others", *RIGHTS)):
                pass

    async def test_a_wrong_password_is_one_sentence(
        self, connect: Connect, user: Callable[..., str], node: PrivateServer
    ) -> None:
        user()
        with pytest.raises(BrokerDenied, match="refused the user name or the password"):
            async with connect(broker_url=url_for(node, (ODD_USER[0], "another"))):
                pass

    @pytest.mark.parametrize("trimmed", [False, True], ids=["in place", "trimmed meanwhile"])
    async def test_what_is_put_off_is_tried_after_growing_pauses_and_stored_in_the_end(
        self,
        connect: Connect,
        user: Callable[..., str],
        node: PrivateServer,
        queue: str,
        shorten: Callable[..., None],
        trimmed: bool,
    ) -> None:
        shorten(0.01, "FIRST_SECONDS")
        shorten(0.1, "LONGEST_SECONDS")
        url = user(f"~{queue}*", *RIGHTS)
        with client_of(node) as client:
            async with connect(prefetch=3, broker_url=url) as source:
                await publish(source, 2)
                later, bad = await take(source, 2)
                user(f"~{queue}*", *(one for one in RIGHTS if one != "+xadd"))
                await source.reject(bad, "bad")
                await eventually(True, lambda: asyncio.sleep(0, bad in source.put_offs.counts))
                if trimmed:
                    client.xtrim(queue, maxlen=0)
                await source.retry(later, 60, "later")
                waiting = {bad, later} if trimmed else {bad}

                async def tries() -> bool:
                    return min(source.put_offs.counts.get(one, 0) for one in waiting) >= 4

                await eventually(True, tries)
                assert source.unacked == waiting
                user(f"~{queue}*", *RIGHTS)
                await eventually(set(), lambda: asyncio.sleep(0, source.unacked))
                await eventually(1, source.count_dead_letters)
                [letter] = [letter async for letter in source.dead_letters(9)]
                assert (letter.id, letter.reason, letter.attempts) == (bad.id, "bad", 1)
                await eventually(1, lambda: asyncio.sleep(0, client.zcard(f"{queue}.delayed")))

    @pytest.mark.parametrize("right", [right for right in RIGHTS if right not in UNNOTICED])
    async def test_a_missing_right_is_named_and_no_message_is_lost(
        self,
        connect: Connect,
        user: Callable[..., str],
        node: PrivateServer,
        queue: str,
        right: str,
        events: list[Event],
    ) -> None:
        async with connect(prefetch=0, broker_url=node.url) as publisher:
            await publish(publisher, 3)
        url = with_lease(user(f"~{queue}*", *[one for one in RIGHTS if one != right]), 0.3)
        name = right[1:].partition("|")[0]
        reasons: list[str] = []
        try:
            async with connect(prefetch=3, broker_url=url) as source:
                await source.describe()
                await publish(source, 0 if right == "+xadd" else 1)
                done, later, bad = await take(source, 3)
                if right in ("+xack", "+xdel"):
                    await source.ack(done)
                await source.retry(later, 0, "now")
                await source.reject(bad, "bad")
                async with asyncio.timeout(1):
                    await take(source, 9)
        except TimeoutError:
            pass
        except BrokerDenied as denied:
            reasons = [str(denied)]
        for event in ("settlement_lost", "reconnecting", "close_failed"):
            reasons += [one["reason"] for one in find(events, event) if one["level"] == "warning"]
        assert any(name in reason.lower() for reason in reasons), (reasons, events)
        assert sum(node.counts(queue).__dict__.values()) >= 3

    @pytest.mark.parametrize(
        "url",
        [
            "redis://user:s3cret/s3cret@localhost/",
            "redis://user:12/s3cret@localhost/",
            "redis://user:s3cret[@localhost/",
            "redis://localhost/s3cret",
            "redis://localhost:s3cret/0",
        ],
    )
    def test_an_invalid_url_is_one_sentence_without_it(
        self, source_for: Callable[..., RedisBroker], url: str
    ) -> None:
        with pytest.raises(BrokerRefused, match="CONSUMER_BROKER_URL") as refused:
            source_for(broker_url=url)
        assert "s3cret" not in str(refused.value)
        assert refused.value.__cause__ is None

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ("lease_seconds=0", "lease_seconds must be a number of at least 0.1"),
            ("lease_seconds=inf", "lease_seconds must be a number of at least 0.1"),
            ("lease_seconds=soon", "lease_seconds must be a number of at least 0.1"),
            ("protocol=3", "unknown option 'protocol'"),
            ("ssl_cert_reqs=maybe", "a value that redis-py does not accept"),
        ],
    )
    def test_a_wrong_option_is_one_sentence(
        self, source_for: Callable[..., RedisBroker], options: str, sentence: str
    ) -> None:
        with pytest.raises(BrokerRefused, match=sentence):
            source_for(broker_url=f"rediss://localhost/0?{options}")

    async def test_a_unix_socket_and_a_database_by_its_number(
        self, connect: Connect, node: PrivateServer, node_directory: Path, queue: str
    ) -> None:
        path = node_directory / "redis.sock"
        if not path.exists():
            pytest.skip("the server is in a container")
        async with connect(prefetch=1, broker_url=f"unix://{path}?db=3") as source:
            published = await publish(source, 1)
            assert await ack_all(source, 1) == published
        assert node.counts(queue) == Counts(0, 0, 0)
        with closing(cast(Any, redis.Redis)(unix_socket_path=str(path), db=3)) as client:
            assert client.exists(queue)
