"""Redis alone: outages, leases, its keys, its limits. What every broker must do is in test_contract.py."""

import asyncio
import json
import shlex
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit

import pytest
import redis.exceptions
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from harness.contract import (
    Event,
    ack_all,
    buffer_holds,
    eventually,
    eventually_counts,
    eventually_logged,
    find,
    ids,
    last,
    opened,
    publish,
    take,
)
from harness.servers import Counts, PrivateServer, Server, ServerMissing, skip_without_server
from harness.servers.local import ServerProcess, free_ports
from harness.servers.proxy import Proxy
from harness.servers.redis import private
from runtime.brokers import redis as module
from runtime.brokers.redis import ONE_CRASH, RedisBroker
from runtime.brokers.requests import Requests
from runtime.brokers.source import MISSING
from runtime.errors import BrokerDenied, BrokerRefused, BrokerUnavailable, SourceFailed
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings

pytestmark = pytest.mark.parametrize("broker", ["redis"], indirect=True, scope="session")

Connect = Callable[..., AbstractAsyncContextManager[RedisBroker]]
ODD_USER = ("order:events", "p@ss:w/o?r#d %2F+é")


@pytest.fixture(scope="session")
def node_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="session")
def node(node_directory: Path) -> Iterator[PrivateServer]:
    """A Redis whose settings and users a test may change."""
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


def client_of(server: Server) -> "closing[Any]":
    return closing(cast(Any, redis.Redis).from_url(server.url, protocol=2))


def with_lease(url: str, seconds: float) -> str:
    return f"{url}?lease_seconds={seconds}"


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
        client.xadd(queue, {"id": "high"}, id="9000-0")
        async with connect(prefetch=2) as source:
            assert await ack_all(source, 1) == ["high"]
        async with connect(prefetch=2) as source:
            assert source._began_after == "9000-0"
            with client.pipeline() as pipeline:
                pipeline.delete(queue)
                pipeline.xadd(queue, {"id": "low"}, id="7-0")
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
        self, connect: Connect, tmp_path_factory: pytest.TempPathFactory, queue: str
    ) -> None:
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
                    pass  # else the last ones may be lost; the first copy takes as long as a client waits
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
        assert published[0] == find(events, "settlement_lost")[0]["id"]

    async def test_an_entry_delivered_in_a_lost_answer_is_requeued(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        async with connect(prefetch=1, broker_url=with_lease(broker.url, 0.6)) as source:
            published = await publish(source, 2)
            (first,) = await take(source, 1)
            client.xreadgroup(
                queue, source._consumer, {queue: ">"}
            )  # the source never hears of the second
            await source.ack(first)
            assert await ack_all(source, 1) == published[1:]

    async def test_a_message_that_kills_its_consumer_each_time_ends_as_a_dead_letter(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        async with connect(prefetch=0) as publisher:
            await publish(publisher, 1, headers={"trace": "t"})
        [[_, [(entry, _)]]] = client.xreadgroup(queue, "dead", {queue: ">"})
        client.xclaim(queue, queue, "dead", 0, [entry], retrycount=1 + 99 * ONE_CRASH)
        async with connect(broker_url=with_lease(broker.url, 0.3)) as source:
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [letter] = [letter async for letter in source.dead_letters(10)]
            assert letter.reason == "100 consumers died with it in flight"
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
            pass  # which makes the group
        with client.pipeline() as pipeline:
            for number in range(4_000):
                pipeline.xadd(queue, {"id": number})
            pipeline.execute()
        client.xreadgroup(queue, "dead", {queue: ">"}, count=4_000)
        client.zadd(f"{queue}.consumers", {"dead": 1})
        if trimmed:
            client.xtrim(queue, maxlen=500, approximate=False)
        lease = 3  # a sweep each second, from the third on
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
        # As after an outage that was longer than the lease.
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
        single_ack_bytes = 150
        assert proxy.bytes_to_broker - sent_before < 1000 * single_ack_bytes / 2

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
        assert trimmed["ids"] == [message.receipt.decode()]

    async def test_an_entry_trimmed_in_flight_is_retried_with_its_attempts_and_its_delay(
        self, connect: Connect, broker: Server, client: Any, queue: str
    ) -> None:
        fields = {b"body": b"b", b"shop": b"S", b"headers": b'{"a": 1}'}
        async with connect(prefetch=1) as source:
            entry = client.xadd(queue, fields).decode()
            for attempt in (1, 2, 3):
                (message,) = await take(source, 1)
                assert (message.id, message.attempt, message.headers) == (entry, attempt, {"a": 1})
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
            assert replayed == {**fields, b"id": entry.encode()}
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
    """How many entries this owner in the group has, or all of them."""
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
            assert (message.id, message.type, message.headers) == (entry.decode(), "", {})
            assert message.body == b"\xff\x00"
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
            assert replayed == {**fields, b"id": entry}
            await source.ack(message)

    async def test_an_entry_without_a_body_is_an_empty_message(
        self, connect: Connect, client: Any, queue: str
    ) -> None:
        async with connect(prefetch=1) as source:
            client.xadd(queue, {"other": "field"})
            (message,) = await take(source, 1)
            assert message.body == b""
            await source.ack(message)

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
            client.xadd(f"{queue}.dead", {"id": "behind"})
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
        deadline=None,
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
        queue = f"ccc-test-{uuid.uuid4().hex[:12]}"
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

            await source.ack(messages[-1])  # after which Redis does not always know the lag
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

    async def test_a_stream_with_another_group_is_refused_in_one_sentence(
        self, connect: Connect, source_for: Callable[..., RedisBroker], client: Any, queue: str
    ) -> None:
        client.xgroup_create(queue, "others", "0", mkstream=True)
        with pytest.raises(BrokerRefused, match="has another group, 'others', which would miss"):
            async with connect():
                pass
        client.xadd(queue, {"body": "b"})
        async with source_for() as source:
            with pytest.raises(BrokerRefused, match="has another group"):
                await source.describe()
        async with connect(prefetch=1, group="others") as source:
            await ack_all(source, 1)

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
        with cluster(tmp_path) as url:
            with pytest.raises(BrokerRefused, match="write CONSUMER_SOURCE with braces"):
                async with connect(broker_url=url):
                    pass
            async with connect(broker_url=url, source="{" + queue + "}") as source:
                await publish(source, 2)
                bad, good = await take(source, 2)
                await source.reject(bad, "bad")
                await source.retry(good, 0, "now")
                await ack_all(source, 1)
                await eventually(1, source.count_dead_letters)

    def test_a_cluster_node_without_the_stream_names_the_node_that_has_it(
        self, broker: Server
    ) -> None:
        moved = redis.exceptions.MovedError("3999 10.0.0.2:6381")
        requests = Requests("redis://10.0.0.1", (), module.RULES)
        assert "is on another node of this cluster (3999 10.0.0.2:6381)" in str(
            requests.translated(moved)
        )


def cluster(directory: Path) -> "closing[Any]":
    """The URL of a cluster of one node, which has all the slots."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("no redis-server is installed")
    (port,) = free_ports(1)

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
        [program, "--port", str(port), "--cluster-enabled", "yes", "--save", ""], directory, answers
    )
    url = Cluster(f"redis://127.0.0.1:{port}")
    url.close = server.close  # type: ignore[method-assign]
    return closing(url)


def url_for(server: Server, user: tuple[str, str]) -> str:
    parts = urlsplit(server.url)
    name, password = (quote(part, safe="") for part in user)
    return parts._replace(netloc=f"{name}:{password}@{parts.hostname}:{parts.port}").geturl()


RIGHTS = shlex.split("""
    +ping +type +info +client|id +client|unblock +eval +time
    +xgroup +xinfo +xadd +xreadgroup +xack +xdel +xclaim +xpending +xrange +xrevrange +xlen
    +zadd +zrem +zcard +zcount +zscore +zrange +zrangebyscore +zremrangebyscore +unlink
""")
"""As in the documentation."""
UNNOTICED = ["+info", "+ping", "+client|id", "+client|unblock", "+xrevrange", "+unlink"]
"""Harmless, or of no use to a consumer that is busy."""


class TestCredentials:
    @pytest.fixture
    def user(self, node: PrivateServer, queue: str) -> Iterator[Callable[..., str]]:
        """Makes the user with these rights; returns a URL with his name and password."""
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
            lost = [*find(events, "settlement_lost"), *find(events, "close_failed")]
            reasons = [event["reason"] for event in lost if event["level"] == "warning"]
        except (BrokerDenied, SourceFailed) as denied:
            reasons = [str(denied)]
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
