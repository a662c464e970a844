"""PostgreSQL alone: leases, outages, its tables, its limits. Tests of every broker are in test_every_source.py."""

import asyncio
import json
import math
import os
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.contract import eventually, opened, take
from harness.servers import Counts, ServerMissing, server_module, skip_without_server
from harness.servers.local import ServerProcess, free_ports
from harness.servers.postgres import PostgresServer, PrivatePostgres, as_no_root
from harness.servers.proxy import Proxy
from runtime.brokers import connectivity, make_source, postgres
from runtime.brokers.postgres import PostgresBroker
from runtime.errors import BrokerDenied, BrokerRefused, BrokerUnavailable, SourceFailed
from runtime.message import Message, OutgoingMessage
from runtime.settings import ConsumerSettings
from steps import (
    Event,
    ack_all,
    buffer_holds,
    consume,
    eventually_counts,
    eventually_logged,
    find,
    last,
    length_of,
    publish,
)

pytestmark = pytest.mark.parametrize("broker", ["postgres"], indirect=True, scope="session")

SHORT_LEASE_SECONDS = 0.4
ODD_PASSWORD = "p@ss:w/o?r#d %2F+é"

Connect = Callable[..., AbstractAsyncContextManager[PostgresBroker]]

NO_SECRETS = (
    """CREATE OR REPLACE FUNCTION no_secrets() RETURNS trigger LANGUAGE plpgsql AS
    $$BEGIN IF NEW.type = 'secret' THEN RAISE EXCEPTION 'it is a secret'; END IF; RETURN NEW; END$$""",
    """CREATE OR REPLACE TRIGGER no_secrets BEFORE INSERT ON consumer.messages
    FOR EACH ROW EXECUTE FUNCTION no_secrets()""",
)
"""Statements that make a table refuse messages of one type."""


def onward(message: Message, queue: str, type: str = "") -> OutgoingMessage:
    return OutgoingMessage(message.body, type, to=f"source:{queue}-next")


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivatePostgres]:
    """A PostgreSQL whose users and settings a test may change."""
    try:
        with server_module("postgres").private(tmp_path_factory.mktemp("node")) as server:
            yield cast(PrivatePostgres, server)
    except ServerMissing as missing:
        skip_without_server(missing)


@pytest.fixture
def user(node: PrivatePostgres) -> str:
    """The URL of a user who has a password, owns no schema, and may create none."""
    if node.query("SELECT FROM pg_roles WHERE rolname = 'me'"):
        node.query("DROP OWNED BY me")
        node.query("DROP USER me")
    node.query(f"CREATE USER me PASSWORD '{ODD_PASSWORD}'")
    return with_user(node.url, "me", ODD_PASSWORD)


@pytest.fixture
def source_for(
    settings_for: Callable[..., ConsumerSettings], broker: PostgresServer
) -> Callable[..., PostgresBroker]:
    """Makes a source that is not connected yet; ``options`` are appended to the URL."""

    def make(prefetch: int = 10, url: str = "", options: str = "", **more: Any) -> PostgresBroker:
        settings = settings_for(broker_url=(url or broker.url) + options, **more)
        return cast(PostgresBroker, make_source(settings, prefetch))

    return make


def with_user(url: str, name: str, password: str) -> str:
    parts = urlsplit(url)
    credentials = f"{quote(name, safe='')}:{quote(password, safe='')}"
    address = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{credentials}@{address}").geturl()


async def query(server: PostgresServer, statement: str, *arguments: object) -> list[Any]:
    return await asyncio.to_thread(server.query, statement, *arguments)


async def in_use(source: PostgresBroker) -> None:
    """Wait until the source has its row in the table of consumers."""

    async def registered() -> bool:
        return source._consumer > 0

    await eventually(True, registered)


class TestOutages:
    async def test_in_flight_messages_are_settled_once_after_an_outage(
        self,
        connect: Connect,
        proxy: Proxy,
        events: list[Event],
        broker: PostgresServer,
        queue: str,
    ) -> None:
        async with connect(prefetch=10, url=proxy.url) as source:
            published = await publish(source, 40)
            in_flight = await take(source, 3)
            proxy.refuse()
            await eventually_logged(events, "reconnecting")
            assert not source.connected
            await source.ack(in_flight[0])
            await source.retry(in_flight[1], 0, "again")
            await source.reject(in_flight[2], "bad")
            proxy.resume()
            handled = [in_flight[0].id, in_flight[2].id, *await ack_all(source, 38)]
            assert Counter(handled) == Counter(published)
            assert source.connected
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
        said = [event["event"] for event in events if event["level"] != "debug"]
        assert said == ["connected", "reconnecting", "connected"]

    async def test_a_message_taken_by_a_statement_whose_answer_was_lost_is_delivered(
        self, connect: Connect, proxy: Proxy, broker: PostgresServer, queue: str
    ) -> None:
        async with connect(prefetch=10, url=proxy.url) as source, connect(prefetch=0) as publisher:
            await in_use(source)
            in_flight = await publish(source, 1)
            (message,) = await take(source, 1)
            taken = (
                "UPDATE consumer.messages SET consumer = $1 WHERE source = $2 AND consumer IS NULL"
            )
            insert = "INSERT INTO consumer.messages (source, id, body) VALUES ($1, 'lost', '')"
            async with publisher._request() as connection, connection.transaction():
                await connection.execute(insert, queue)
                await connection.execute(taken, source._consumer, queue)
            proxy.cut()
            assert await ack_all(source, 1) == ["lost"]
            await source.ack(message)
            assert in_flight == [message.id]
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    @pytest.mark.parametrize("what", ["settlement", "exchange"])
    async def test_a_settlement_written_without_an_answer_is_not_logged_as_lost(
        self, connect: Connect, events: list[Event], broker: PostgresServer, queue: str, what: str
    ) -> None:
        async with connect(prefetch=10) as source:
            published = await publish(source, 3)
            done, later, last = await take(source, 3)
            fetch = source._rows

            async def break_after(connection: Any, statement: str, *arguments: object) -> Any:
                rows = await fetch(connection, statement, *arguments)
                if statement is (postgres.RETRY if what == "settlement" else postgres.EXCHANGE):
                    source._rows = fetch  # type: ignore[method-assign]
                    connection.terminate()
                    raise ConnectionResetError
                return rows

            source._rows = break_after  # type: ignore[method-assign]
            await source.ack(done)
            await source.retry(later, 0, "again")
            (again,) = await take(source, 1)
            assert (again.id, again.attempt) == (published[1], 2)
            await source.ack(again)
            await source.ack(last)
        assert not find(events, "settlement_lost")
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    @pytest.mark.parametrize(
        "error",
        [
            asyncpg.InterfaceError(
                "cannot call Transaction.__aexit__(): the underlying connection is closed"
            ),
            asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is ..."),
        ],
        ids=["closed", "state"],
    )
    def test_a_text_about_the_inside_of_asyncpg_is_not_passed_on(
        self, source_for: Callable[..., PostgresBroker], broker: PostgresServer, error: Exception
    ) -> None:
        translated = source_for()._requests.translated(error)
        assert isinstance(translated, BrokerUnavailable)
        assert str(translated).endswith(": the connection was lost")

    async def test_a_session_that_an_administrator_ends_is_opened_again(
        self, connect: Connect, broker: PostgresServer, events: list[Event]
    ) -> None:
        async with connect() as source:
            pid = source._connection.get_server_pid()
            await query(broker, "SELECT pg_terminate_backend($1)", pid)
            await eventually_logged(events, "connected", count=2)
            published = await publish(source, 5)
            assert await ack_all(source, 5) == published

    async def test_a_read_only_server_is_an_outage(
        self, connect: Connect, node: PrivatePostgres, events: list[Event]
    ) -> None:
        async def set_read_only(value: str) -> None:
            await query(node, f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            await query(node, "SELECT pg_reload_conf()")

        async with connect(url=node.url, options="?poll_seconds=0.05") as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            try:
                await set_read_only("on")
                await eventually_logged(events, "reconnecting")
                await source.ack(message)
                await eventually_logged(events, "reconnect_failed", count=2)
            finally:
                # The session that turns it off is read-only itself; ALTER SYSTEM writes no row.
                await set_read_only("off")
            await eventually_logged(events, "connected", count=2)
            published = await publish(source, 1)
            assert await ack_all(source, 1) == published

    async def test_too_many_connections_are_an_outage(
        self, source_for: Callable[..., PostgresBroker], node: PrivatePostgres, user: str
    ) -> None:
        await query(node, "ALTER USER me CONNECTION LIMIT 0")
        with pytest.raises(BrokerUnavailable, match="too many connections"):
            await source_for(url=user).__aenter__()

    async def test_refusing_and_unresponsive_hosts_are_skipped(
        self, connect: Connect, broker: PostgresServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(postgres, "CONNECT_SECONDS", 1.5)
        parts = urlsplit(broker.url)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            hosts = f"127.0.0.1:1,127.0.0.1:{silent.getsockname()[1]},{parts.hostname}:{parts.port}"
            url = parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@{hosts}").geturl()
            async with connect(url=url) as source:
                published = await publish(source, 1)
                assert await ack_all(source, 1) == published

    async def test_dropped_tables_fail_the_source_with_one_sentence(
        self, connect: Connect, broker: PostgresServer
    ) -> None:
        async with connect(options="?schema=dropped&poll_seconds=0.05") as source:
            await in_use(source)
            await query(broker, "DROP SCHEMA dropped CASCADE")
            with pytest.raises(SourceFailed, match="does not exist"):
                await anext(source)
            assert not source.connected


class TestStopping:
    async def test_a_requeued_message_keeps_its_place(self, connect: Connect) -> None:
        async with connect(prefetch=0) as publisher:
            published = await publish(publisher, 5)
        async with connect(prefetch=3) as source:
            first, second, third = await take(source, 3)
            await source.stop()
            await source.ack(second)
            await source.requeue(third)
            await source.requeue(first)
        async with connect(prefetch=4) as source:
            assert await ack_all(source, 4) == [published[0], *published[2:]]


class TestLeases:
    async def test_a_consumer_whose_lease_expired_loses_its_messages_and_goes_on(
        self, connect: Connect, broker: PostgresServer, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=2, options="?poll_seconds=0.1") as one:
            published = await publish(one, 2)
            (in_flight,) = await take(one, 1)
            await buffer_holds(one, 1)
            async with AsyncExitStack() as stack:
                async with one._lock:  # suspended: a renewal now would keep the lease
                    await query(
                        broker,
                        "UPDATE consumer.consumers SET expires_at = '-infinity' WHERE source = $1",
                        queue,
                    )
                    other = await stack.enter_async_context(connect(prefetch=2))
                    again = await take(other, 2)
                assert [(m.id, m.attempt) for m in again] == [(id, 1) for id in published]
                await buffer_holds(one, 0)  # dropped without a log
                await one.ack(in_flight)
                for message in again:
                    await other.ack(message)
            published = await publish(one, 1)
            assert await ack_all(one, 1) == published
        assert [event["message_id"] for event in find(events, "settlement_lost")] == [in_flight.id]

    async def test_a_late_settlement_is_logged_and_changes_nothing(
        self, connect: Connect, broker: PostgresServer, queue: str, events: list[Event]
    ) -> None:
        settle: list[Callable[[PostgresBroker, Any], Any]] = [
            lambda source, message: source.ack(message),
            lambda source, message: source.retry(message, 0, "again"),
            lambda source, message: source.reject(message, "bad"),
            lambda source, message: source.requeue(message),
        ]
        async with connect(prefetch=4) as source:
            published = await publish(source, 4)
            in_flight = await take(source, 4)
            # This consumer does not know it yet.
            await query(
                broker, "UPDATE consumer.messages SET consumer = 0 WHERE source = $1", queue
            )
            for message, late in zip(in_flight, settle, strict=True):
                await late(source, message)
            await eventually_logged(events, "settlement_lost", 4)
            rows = await query(
                broker,
                "SELECT id, consumer, failures FROM consumer.messages WHERE source = $1",
                queue,
            )
        assert sorted(map(tuple, rows)) == sorted((id, 0, 0) for id in published)
        assert Counter(e["message_id"] for e in find(events, "settlement_lost")) == Counter(
            published
        )

    async def test_a_consumer_without_its_row_registers_before_it_takes_messages(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        async with connect(prefetch=1, options="?poll_seconds=3600") as source:
            await in_use(source)
            first = source._consumer
            await query(broker, "DELETE FROM consumer.consumers WHERE source = $1", queue)
            insert = "INSERT INTO consumer.messages (source, id, due_at, body) VALUES ($1, 'due', $2, '')"
            await query(broker, insert, queue, datetime(2000, 1, 1, tzinfo=UTC))
            published = await publish(source, 1)
            assert await ack_all(source, 2) == ["due", *published]
            assert source._consumer > first
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    @pytest.mark.parametrize("type_from", ["", "header:kind"])
    async def test_a_redelivery_of_an_in_flight_message_is_not_started_again(
        self, connect: Connect, broker: PostgresServer, queue: str, type_from: str
    ) -> None:
        options = "?lease_seconds=1"
        async with connect(prefetch=2, options=options, type_from=type_from) as source:
            published = await publish(source, 2, headers={"kind": "k"})
            working, idle = await take(source, 2)
            assert working.type == ("k" if type_from else "")
            source.in_flight = [working]
            consumer = source._consumer
            await query(broker, "DELETE FROM consumer.consumers WHERE source = $1", queue)
            (again,) = await take(source, 1)
            assert source._consumer > consumer
            assert [again.id] == published[1:] == [idle.id]
            await source.ack(again)
            await source.ack(working)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_the_messages_of_a_consumer_whose_row_was_deleted_are_redelivered(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        """An operator deletes it, for a pod that is gone."""
        delete = "DELETE FROM consumer.consumers WHERE source = $1"
        async with connect(prefetch=0) as publisher:
            published = await publish(publisher, 5)
            take_two = """UPDATE consumer.messages SET consumer = 0
                WHERE source = $1 AND convert_from(body, 'UTF8') < '2'"""
            await query(broker, take_two, queue)
            async with connect(prefetch=5, options="?lease_seconds=1") as source:
                taken = await take(source, 5)
                assert Counter((m.id, m.attempt) for m in taken) == Counter(
                    (id, 1) for id in published
                )
                await query(broker, delete, queue)  # and the messages of a live consumer
                again = await take(source, 5)
                assert Counter(m.id for m in again) == Counter(published)
                for message in again:
                    await source.ack(message)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_a_consumer_in_the_middle_of_an_exchange_does_not_count_as_dead(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        register = """INSERT INTO consumer.consumers (source, expires_at) VALUES ($1, '-infinity')
            RETURNING id"""
        async with connect(prefetch=0) as busy, connect(prefetch=0) as publisher:
            await publish(publisher, 1)
            async with busy._request() as connection, connection.transaction():
                [(id,)] = await query(broker, register, queue)
                rows = await busy._rows(connection, postgres.EXCHANGE, queue, id, [], 1)
                assert rows[0]["alive"]
                async with connect(prefetch=1, options="?lease_seconds=0.2") as other:
                    await in_use(other)
                    await asyncio.sleep(0.3)  # it has looked, and skipped the row
                    still = "SELECT count(*) FROM consumer.consumers WHERE id = $1"
                    assert (await query(broker, still, id))[0][0] == 1
                    assert len(other.buffer) == 0
        async with connect(prefetch=1, options="?lease_seconds=0.2") as other:
            await ack_all(other, 1)

    async def test_a_locked_row_blocks_no_other(self, connect: Connect, queue: str) -> None:
        lock = "SELECT FROM consumer.messages WHERE source = $1 AND id = $2 FOR UPDATE"
        async with connect(prefetch=0) as busy:
            published = await publish(busy, 2)
            async with busy._request() as connection, connection.transaction():
                await connection.execute(lock, queue, published[0])
                async with connect(prefetch=1, options="?poll_seconds=0.1") as other:
                    assert await ack_all(other, 1) == published[1:]

    async def test_consumers_that_reconnect_keep_their_messages_after_an_outage_longer_than_the_lease(
        self,
        connect: Connect,
        proxy: Proxy,
        events: list[Event],
        broker: PostgresServer,
        queue: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(connectivity, "LONGEST_PAUSE_SECONDS", 0.1)  # both reconnect in time
        options = "?lease_seconds=2&poll_seconds=0.1"
        async with (
            connect(1, url=proxy.url, options=options) as one,
            connect(1, url=proxy.url, options=options) as other,
        ):
            await publish(one, 2)
            (held_by_one,), (held_by_other,) = await take(one, 1), await take(other, 1)
            proxy.refuse()
            await eventually_logged(events, "reconnecting", 2)
            expired = (
                "SELECT bool_and(expires_at < now()) FROM consumer.consumers WHERE source = $1"
            )

            async def all_expired() -> bool:
                return bool((await query(broker, expired, queue))[0][0])

            await eventually(True, all_expired)
            proxy.resume()
            await eventually_logged(events, "connected", 4)
            await one.ack(held_by_one)
            await other.ack(held_by_other)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))
        assert not find(events, "settlement_lost")

    async def test_a_message_that_kills_its_consumers_ends_as_a_dead_letter(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        async with connect(prefetch=0) as publisher:
            published = await publish(publisher, 2)
            register = """INSERT INTO consumer.consumers (source, expires_at)
                VALUES ($1, '-infinity') RETURNING id"""
            [(dead,)] = await query(broker, register, queue)
            await query(
                broker,
                "UPDATE consumer.messages SET consumer = $1, "
                "crashes = CASE id WHEN $2 THEN $3::int ELSE 0 END WHERE source = $4",
                *(dead, published[0], postgres.CRASH_LIMIT - 1, queue),
            )
            async with connect(prefetch=1) as source:
                (message,) = await take(source, 1)
                assert (message.id, message.attempt) == (published[1], 1)
                await source.ack(message)
            [letter] = [letter async for letter in publisher.dead_letters(10)]
        assert (letter.id, letter.attempts) == (published[0], 0)
        assert letter.reason == f"{postgres.CRASH_LIMIT} consumers died with it in flight"


SELDOM = "?poll_seconds=3600&lease_seconds=10800"  # the renewal too is once an hour


class TestWaking:
    async def test_a_publisher_elsewhere_wakes_a_waiting_consumer(self, connect: Connect) -> None:
        async with connect(prefetch=1, options=SELDOM) as source, connect(prefetch=0) as publisher:
            await in_use(source)
            for _ in range(3):
                published = await publish(publisher, 1)
                assert await ack_all(source, 1) == published

    async def test_a_retry_is_taken_when_it_is_due_also_by_another_consumer(
        self, connect: Connect
    ) -> None:
        async with connect(prefetch=1, options=SELDOM) as other:
            await in_use(other)
            async with connect(prefetch=1, options=SELDOM) as one:
                await publish(one, 2)
                messages = [*await take(other, 1), *await take(one, 1)]
                await one.stop()
                await one.retry(messages[1], 0.5, "not now")
                retried_at = time.monotonic()
                await other.ack(messages[0])
                (message,) = await take(other, 1)
                assert 0.48 <= time.monotonic() - retried_at < 1.5
                assert message.attempt == 2
                await other.ack(message)

    async def test_a_consumer_that_leaves_wakes_waiting_ones(self, connect: Connect) -> None:
        async with connect(prefetch=0) as publisher:
            published = await publish(publisher, 1)
        async with AsyncExitStack() as stack, connect(prefetch=1, options=SELDOM) as one:
            await take(one, 1)
            waiting = await stack.enter_async_context(connect(prefetch=1, options=SELDOM))
            await in_use(waiting)
            await one.__aexit__()
            assert await ack_all(waiting, 1) == published

    async def test_a_row_that_another_program_inserts_is_a_message(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        insert = "INSERT INTO consumer.messages (source, type, body) VALUES ($1, 'kind', '{}')"
        async with connect(prefetch=1, options=SELDOM) as source:
            await in_use(source)
            connection = await asyncpg.connect(broker.url)
            async with connection.transaction():  # together with other statements
                await connection.execute(insert, queue)
                await connection.execute(f"NOTIFY consumer, '{queue}'")
            await connection.close()
            (message,) = await take(source, 1)
            assert (message.body, message.type, message.attempt) == (b"{}", "kind", 1)
            assert (message.headers, len(message.id)) == ({}, 36)
            await source.ack(message)

    async def test_a_notification_that_was_read_before_its_connection_ended_is_no_error(
        self, connect: Connect, queue: str
    ) -> None:
        async with connect(prefetch=1) as source, connect(prefetch=0) as publisher:
            await in_use(source)
            connection = source._listening_on
            connection.terminate()
            source._on_notification(connection, 1, "consumer", queue)
            published = await publish(publisher, 1)
            assert await ack_all(source, 1) == published

    async def test_a_connection_that_is_terminated_within_a_request_is_an_outage(
        self, connect: Connect, events: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """asyncpg has no protocol then, and raises AttributeError."""
        async with connect(prefetch=1) as source, connect(prefetch=0) as publisher:
            await in_use(source)
            get_statement = asyncpg.Connection._get_statement

            async def terminating(connection: Any, *arguments: Any, **options: Any) -> Any:
                statement = await get_statement(connection, *arguments, **options)
                if connection is ended:
                    connection.terminate()
                return statement

            ended = source._connection
            monkeypatch.setattr(asyncpg.Connection, "_get_statement", terminating)
            published = await publish(publisher, 1)
            assert await ack_all(source, 1) == published
        assert find(events, "reconnecting")

    async def test_an_idle_consumer_sends_no_request(self, connect: Connect, proxy: Proxy) -> None:
        async with connect(url=proxy.url) as source, connect(prefetch=0) as elsewhere:
            await publish(source, 1)
            await ack_all(source, 1)
            await asyncio.sleep(0.3)
            sent_before = proxy.bytes_to_broker
            async with elsewhere._request() as connection:
                await connection.execute("NOTIFY consumer, 'another queue'")
            await asyncio.sleep(1)
            assert proxy.bytes_to_broker == sent_before

    @pytest.mark.parametrize("answered", [True, False])
    async def test_behind_pgbouncer_messages_are_delivered_after_the_commit_that_takes_them(
        self,
        connect: Connect,
        monkeypatch: pytest.MonkeyPatch,
        broker: PostgresServer,
        queue: str,
        answered: bool,
    ) -> None:
        transaction = postgres._transaction
        left = 3

        @asynccontextmanager
        async def broken(connection: Any) -> AsyncIterator[None]:
            nonlocal left
            async with transaction(connection):
                yield
                seen = await connection.fetchval(
                    "SELECT count(*) FROM consumer.messages WHERE consumer IS NOT NULL AND source = $1",
                    queue,
                )
                if seen and left and not answered:  # before the commit
                    left -= 1
                    connection.terminate()
                    raise ConnectionResetError
            if seen and left:  # after it
                left -= 1
                connection.terminate()
                raise ConnectionResetError

        options = "?pgbouncer=true&poll_seconds=0.05"
        async with connect(prefetch=0) as publisher:
            published = await publish(publisher, 60)
        monkeypatch.setattr(postgres, "_transaction", broken)
        async with connect(prefetch=20, options=options) as source:
            handled = await ack_all(source, 60)
            assert left == 0
            assert Counter(handled) == Counter(published)
            await source.stop()
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_behind_pgbouncer_transactions_are_read_committed_whatever_the_default(
        self, connect: Connect
    ) -> None:
        options = "?pgbouncer=true&default_transaction_isolation=serializable"
        async with connect(prefetch=0, options=options) as source, source._request() as connection:
            shown = await connection.fetchval("SHOW transaction_isolation")
            assert shown == "read committed"

    async def test_behind_pgbouncer_it_polls_and_leaves_nothing_in_the_session(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        options = "?pgbouncer=true&poll_seconds=0.05"
        async with connect(prefetch=2, options=options) as source, connect(prefetch=0) as publisher:
            for _ in range(3):
                published = await publish(publisher, 5)
                assert await ack_all(source, 5) == published
            await publish(source, 1)
            (message,) = await take(source, 1)
            await source.retry(message, 0.1, "not now")
            await ack_all(source, 1)
            left = """SELECT (SELECT count(*) FROM pg_listening_channels()),
                (SELECT count(*) FROM pg_prepared_statements), current_setting('enable_seqscan')"""
            async with source._request() as connection:
                assert tuple(await connection.fetchrow(left)) in {(0, 0, "on"), (0, 1, "on")}
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))


@pytest.fixture(params=["session", "transaction"])
def pgbouncer(
    request: pytest.FixtureRequest, node: PrivatePostgres, tmp_path: Path
) -> Iterator[str]:
    """The URL of a PgBouncer with two connections in this mode; one user has a password."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None:
        skip_without_server(
            ServerMissing("there is no PgBouncer for the tests: it is not installed")
        )
    (port,) = free_ports(1)
    with as_no_root(tmp_path) as (home, as_user):
        file, users = home / "pgbouncer.ini", home / "users"
        users.write_text('"postgres" "of-the-tests"\n')
        file.write_text(
            PGBOUNCER.format(
                node=urlsplit(node.url).port, port=port, mode=request.param, users=users
            )
        )
        process = ServerProcess([*as_user, program, str(file)], home, lambda: is_open(port))
        try:
            netloc = f"postgres:of-the-tests@127.0.0.1:{port}"
            yield urlsplit(node.url)._replace(netloc=netloc).geturl()
        finally:
            process.close()


PGBOUNCER = """
[databases]
* = host=127.0.0.1 port={node} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {users}
pool_mode = {mode}
default_pool_size = 4
"""


def is_open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False


class TestPgBouncer:
    """The real one."""

    async def test_it_is_used_as_its_mode_needs(
        self,
        connect: Connect,
        pgbouncer: str,
        node: PrivatePostgres,
        queue: str,
        request: pytest.FixtureRequest,
    ) -> None:
        options = "?poll_seconds=0.05"
        if request.node.callspec.params["pgbouncer"] == "transaction":
            with pytest.raises(
                BrokerRefused, match=r"transaction mode.* \?pgbouncer=true"
            ) as refused:
                async with connect(url=pgbouncer):
                    pass
            assert "\n" not in str(refused.value)
            options += "&pgbouncer=true"
        async with (
            connect(prefetch=0, url=node.url) as publisher,
            connect(prefetch=20, url=pgbouncer, options=options) as one,
            connect(prefetch=20, url=pgbouncer, options=options) as other,
        ):
            published = await publish(publisher, 200)
            handled: list[str] = []
            workers = [asyncio.create_task(consume(source, handled)) for source in (one, other)]
            await eventually(200, length_of(handled))
            assert Counter(handled) == Counter(published)
            await asyncio.gather(one.stop(), other.stop())
            await asyncio.gather(*workers)
        left = "SELECT count(*) FROM consumer.messages WHERE source = $1"
        assert (await query(node, left, queue))[0][0] == 0
        await query(node, "DROP SCHEMA consumer CASCADE")

    @pytest.mark.parametrize("pgbouncer", ["session"], indirect=True)
    async def test_in_session_mode_the_session_has_its_settings_and_listens(
        self, connect: Connect, pgbouncer: str, node: PrivatePostgres
    ) -> None:
        async with (
            connect(prefetch=0, url=node.url) as publisher,
            connect(prefetch=1, url=pgbouncer, options=SELDOM) as source,
        ):
            await in_use(source)
            async with source._request() as connection:
                for setting in ("enable_seqscan", "jit"):
                    assert await connection.fetchval(f"SHOW {setting}") == "off"
            for _ in range(3):
                published = await publish(publisher, 1)
                assert await ack_all(source, 1) == published
        await query(node, "DROP SCHEMA consumer CASCADE")

    @pytest.mark.parametrize("pgbouncer", ["session"], indirect=True)
    async def test_what_it_refuses_is_one_sentence_with_advice(
        self, source_for: Callable[..., PostgresBroker], pgbouncer: str
    ) -> None:
        with pytest.raises(BrokerRefused, match="the pooler does not pass on a setting of the URL"):
            await source_for(url=pgbouncer, options="?statement_timeout=3000").__aenter__()
        for name in ("postgres", "somebody"):
            url = with_user(pgbouncer, name, "s3cret-s3cret")
            with pytest.raises(
                BrokerDenied, match="refused the user name or the password"
            ) as denied:
                await source_for(url=url).__aenter__()
            assert "s3cret" not in str(denied.value)


class TestSettlements:
    async def test_consecutive_acks_share_a_statement(self, connect: Connect, proxy: Proxy) -> None:
        async with connect(prefetch=0) as publisher:
            await publish(publisher, 1000)
        async with connect(prefetch=100, url=proxy.url) as source:
            sent_before = proxy.bytes_to_broker
            await ack_all(source, 1000)
            await source.stop()
            assert proxy.bytes_to_broker - sent_before < 1000 * 40  # alone, each takes 200 bytes

    @pytest.mark.parametrize("seconds", [1e300, math.inf])
    async def test_a_delay_beyond_all_bounds_is_a_century(
        self, connect: Connect, broker: PostgresServer, queue: str, seconds: float
    ) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            await source.retry(message, seconds, "much later")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=1, dead=0))

    async def test_many_dead_letters_are_moved_in_steps_and_in_their_order(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        count = 2 * postgres.STEP + 3
        die = """INSERT INTO consumer.dead_letters (source, reason, attempts, id, type, headers, body)
            SELECT $1, '', 1, n, '', '{}', '' FROM generate_series(1, $2::int) AS n"""
        async with connect(prefetch=0) as source:
            await query(broker, die, queue, count)
            progress = []
            async for moved in source.replay_dead_letters():
                progress.append(moved)
                await query(broker, die, queue, 1)  # a message that arrives meanwhile stays
            assert progress == [postgres.STEP, 2 * postgres.STEP, count]
            assert await last(source.purge_dead_letters()) == len(progress)
        async with connect(prefetch=count) as consumer:
            assert await ack_all(consumer, count) == [str(n) for n in range(1, count + 1)]


class TestPublishing:
    """Publishing a message's results, in the statement that acknowledges it."""

    async def test_many_handlers_share_a_statement(
        self, connect: Connect, proxy: Proxy, broker: PostgresServer, queue: str
    ) -> None:
        async with connect(prefetch=0) as publisher:
            await publish(publisher, 500)
        async with connect(prefetch=100, url=proxy.url) as source:
            sent_before = proxy.bytes_to_broker
            for _ in range(5):
                publishing = [
                    source.publish_and_ack(message, [onward(message, queue)])
                    for message in await take(source, 100)
                ]
                await asyncio.gather(*publishing)
            sent = proxy.bytes_to_broker - sent_before
        assert sent < 500 * 150  # the statement alone has a thousand
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))
        await eventually_counts(broker, f"{queue}-next", Counts(ready=500, delayed=0, dead=0))

    @pytest.mark.parametrize("options", ["", "?pgbouncer=true"])
    async def test_a_row_that_the_server_refuses_harms_no_other_message(
        self,
        connect: Connect,
        node: PrivatePostgres,
        queue: str,
        events: list[Event],
        options: str,
    ) -> None:
        async with connect(prefetch=3, url=node.url, options=options) as source:
            for statement in NO_SECRETS:
                await query(node, statement)
            published = await publish(source, 3)
            messages = await take(source, 3)
            outcomes = await asyncio.gather(
                *(
                    source.publish_and_ack(message, [onward(message, queue, type)])
                    for message, type in zip(messages, ["a", "secret", "b"], strict=True)
                ),
                return_exceptions=True,
            )
            assert outcomes[::2] == [None, None]
            assert isinstance(outcomes[1], BrokerRefused)
            assert str(outcomes[1]).endswith("it is a secret")
            with pytest.raises(BrokerRefused, match="it is a secret"):
                await source.publish([onward(messages[1], queue, "secret")])
            await source.retry(messages[1], 0, "again")
            assert await ack_all(source, 1) == [published[1]]
            await eventually_counts(node, queue, Counts(ready=0, delayed=0, dead=0))
            next_counts = Counts(ready=2, delayed=0, dead=0)
            await eventually_counts(node, f"{queue}-next", next_counts)
            assert source.connectivity.outage_count == 0
        assert not find(events, "settlement_lost")

    async def test_without_the_right_to_insert_a_message_is_retried_and_others_are_handled(
        self, connect: Connect, node: PrivatePostgres, user: str, queue: str
    ) -> None:
        async with connect(prefetch=0, url=node.url) as publisher:
            await publish(publisher, 2)
            await query(node, "GRANT USAGE ON SCHEMA consumer TO me")
            rights = "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA consumer TO me"
            await query(node, rights)
            await query(node, "REVOKE INSERT ON consumer.messages FROM me")
        async with connect(prefetch=2, url=user) as source:
            one, other = await take(source, 2)
            with pytest.raises(BrokerDenied, match="permission denied for table messages"):
                await source.publish_and_ack(one, [onward(one, queue)])
            await source.ack(other)
            await source.retry(one, 0, "again")
            assert await ack_all(source, 1) == [one.id]
            assert source.connectivity.outage_count == 0

    async def test_what_follows_from_a_message_whose_lease_has_expired_is_not_published(
        self, connect: Connect, broker: PostgresServer, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            update = "UPDATE consumer.messages SET consumer = 0 WHERE source = $1"
            await query(broker, update, queue)  # this consumer does not know it yet
            await source.publish_and_ack(message, [onward(message, queue)])
            [lost] = find(events, "settlement_lost")
            assert (lost["settlement"], lost["reason"]) == ("ack", "its lease had expired")
        await eventually_counts(broker, f"{queue}-next", Counts(ready=0, delayed=0, dead=0))

    async def test_it_is_published_once_also_if_the_answer_is_lost(
        self, connect: Connect, broker: PostgresServer, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            fetch = source._rows

            async def break_after(connection: Any, statement: str, *arguments: object) -> Any:
                rows = await fetch(connection, statement, *arguments)
                if statement is postgres.PUBLISH_AND_ACK:
                    source._rows = fetch  # type: ignore[method-assign]
                    connection.terminate()
                    raise ConnectionResetError
                return rows

            source._rows = break_after  # type: ignore[method-assign]
            await source.publish_and_ack(message, [onward(message, queue)])
            assert source.connectivity.outage_count == 1
        assert not find(events, "settlement_lost")
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))
        await eventually_counts(broker, f"{queue}-next", Counts(ready=1, delayed=0, dead=0))

    async def test_a_handler_that_is_cancelled_in_it_requeues_its_message_or_has_published(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        async with connect(prefetch=50) as source:
            await publish(source, 50)
            messages = await take(source, 50)
            await source.stop()
            publishing = [
                asyncio.create_task(source.publish_and_ack(message, [onward(message, queue)]))
                for message in messages
            ]
            for number, (task, message) in enumerate(zip(publishing, messages, strict=True)):
                if number % 5 == 0:
                    await asyncio.sleep(0)
                if number % 2:
                    task.cancel()
                    await source.requeue(message)
            await asyncio.gather(*publishing, return_exceptions=True)
            assert source.connectivity.outage_count == 0
        counts = [await asyncio.to_thread(broker.counts, name) for name in (queue, f"{queue}-next")]
        assert sum(count.ready for count in counts) == 50
        assert counts[1].ready >= 25

    async def test_a_cancelled_publish_does_not_end_the_connection(
        self, connect: Connect, queue: str
    ) -> None:
        async with connect(prefetch=1) as source:
            publishing = asyncio.create_task(
                source.publish([OutgoingMessage(bytes(2_000_000), to=f"source:{queue}-next")])
            )
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            publishing.cancel()
            published = await publish(source, 1)
            assert await ack_all(source, 1) == published
            assert source.connectivity.outage_count == 0

    async def test_more_than_one_statement_takes_is_published_before_the_ack(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            many = [onward(message, queue) for _ in range(postgres.STEP + 1)]
            await source.publish_and_ack(message, many)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))
        counts = Counts(ready=postgres.STEP + 1, delayed=0, dead=0)
        await eventually_counts(broker, f"{queue}-next", counts)

    async def test_a_delayed_message_comes_when_it_is_due_also_to_a_waiting_consumer(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        async with connect(prefetch=1, options=SELDOM) as source, connect(prefetch=0) as other:
            await in_use(source)
            await other.publish([OutgoingMessage(b"later", delay_seconds=0.3)])
            (message,) = await take(source, 1)
            assert message.published_at is not None
            late = (datetime.now(UTC) - message.published_at).total_seconds()
            assert 0.3 <= late < 20  # and not an hour
            await source.ack(message)
            await other.publish([OutgoingMessage(b"never", delay_seconds=math.inf)])
            await eventually_counts(broker, queue, Counts(ready=0, delayed=1, dead=0))

    @pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 201])
    async def test_a_source_that_cannot_be_is_one_sentence(
        self, connect: Connect, name: str
    ) -> None:
        async with connect(prefetch=0) as source:
            with pytest.raises(BrokerRefused, match="this message cannot be sent") as refused:
                await source.publish([OutgoingMessage(b"", to=f"source:{name}")])
            assert "\n" not in str(refused.value)
            await publish(source, 1)


class TestText:
    async def test_headers_may_contain_characters_that_postgresql_text_cannot(
        self, connect: Connect
    ) -> None:
        headers = {"nul \0": ["\0", "\ud800"], "huge": 10**400, "float": 1e-300}
        async with connect(prefetch=1) as source:
            await source.publish([OutgoingMessage(b"", headers=headers)])
            (message,) = await take(source, 1)
            assert message.headers == headers
            await source.reject(message, "bad")
            await eventually(1, source.count_dead_letters)
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            (message,) = await take(source, 1)
            assert message.headers == headers
            await source.ack(message)

    @pytest.mark.parametrize(
        "fields",
        [
            {"id": "a\0b"},
            {"type": "\0"},
            {"id": "\ud800"},
            {"headers": {"n": float("nan")}},
            {"headers": {"x": b""}},
        ],
        ids=["NUL in the id", "NUL in the type", "half a character", "NaN", "bytes"],
    )
    async def test_a_message_that_cannot_be_stored_is_refused_with_one_sentence(
        self, connect: Connect, broker: PostgresServer, queue: str, fields: dict[str, Any]
    ) -> None:
        async with connect(prefetch=0) as source:
            with pytest.raises(BrokerRefused, match="this message cannot be sent"):
                await source.publish([OutgoingMessage(b"", **fields)])
            await publish(source, 1)
        assert broker.counts(queue).ready == 1

    async def test_unstorable_characters_of_a_reason_are_replaced(self, connect: Connect) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            await source.reject(message, "nul \0, half \ud800, größe")
            await source.stop()
            [letter] = [letter async for letter in source.dead_letters(1)]
            assert letter.reason == "nul \ufffd, half ?, größe"

    async def test_headers_of_another_program_must_be_an_object(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        insert = "INSERT INTO consumer.messages (source, headers, body) VALUES ($1, '[]', '')"
        async with connect(prefetch=0):
            with pytest.raises(asyncpg.CheckViolationError):
                await query(broker, insert, queue)


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
).map(json.dumps)
JSON = JSON.filter(lambda text: "Infinity" not in text) | st.sampled_from(
    ["1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '"\\u0000"', '{"a": 1, "a": "\\ud800"}']
)
OBJECTS = JSON.map(lambda value: f'{{"x-consumer-attempts": {value}, "a": {value}}}')
INT32 = st.integers(-(2**31), 2**31 - 1)
TIMES = st.sampled_from(["-infinity", "2000-01-01", "4713-01-01 BC"])


class TestRows:
    """Any program with the right to insert may write a number that this runtime never would."""

    @pytest.mark.parametrize("failures", [2**31 - 1, -5])
    async def test_impossible_failures_count_as_none_and_end_no_consumer(
        self, connect: Connect, broker: PostgresServer, queue: str, failures: int
    ) -> None:
        insert = "INSERT INTO consumer.messages (source, failures, body) VALUES ($1, $2, '')"
        async with connect(prefetch=1) as source:
            await query(broker, insert, queue, failures)
            for attempt in (1, 2):
                (message,) = await take(source, 1)
                assert message.attempt == attempt
                await source.retry(message, 0, "again")
            (message,) = await take(source, 1)
            await source.reject(message, "bad")
            await eventually(1, source.count_dead_letters)
            [letter] = [letter async for letter in source.dead_letters(1)]
            assert letter.attempts == 3

    @pytest.mark.parametrize("crashes", [2**31 - 1, -(2**31)])
    async def test_impossible_crashes_end_no_consumer(
        self, connect: Connect, broker: PostgresServer, queue: str, crashes: int
    ) -> None:
        insert = """WITH dead AS (INSERT INTO consumer.consumers (source, expires_at)
                VALUES ($1, '-infinity') RETURNING id)
            INSERT INTO consumer.messages (source, consumer, crashes, body)
            SELECT $1, id, $2, '' FROM dead"""
        async with connect(prefetch=0) as publisher:
            await query(broker, insert, queue, crashes)
            async with connect(prefetch=1) as source:
                published = await publish(publisher, 1)
                taken = await ack_all(source, 1 if crashes > 0 else 2)
                assert taken[-1:] == published
            assert await publisher.count_dead_letters() == (crashes > 0)

    @settings(max_examples=15)
    @given(
        st.lists(st.tuples(TEXT, TEXT, OBJECTS, st.binary(), INT32, TIMES)),
        st.lists(st.tuples(TEXT, TEXT, JSON, st.binary(), INT32, TIMES, TEXT)),
    )
    def test_whatever_other_programs_write_ends_no_consumer_and_can_be_listed_and_replayed(
        self, broker: PostgresServer, messages: list[Any], dead: list[Any]
    ) -> None:
        queue = f"fuzz-{uuid.uuid4()}"
        add_message = """INSERT INTO consumer.messages (id, type, headers, body, failures, due_at, source)
            VALUES ($1, $2, $3, $4, $5, $6::text::timestamptz, $7)"""
        add_dead = """INSERT INTO consumer.dead_letters
            (id, type, headers, body, attempts, dead_lettered_at, reason, source)
            VALUES ($1, $2, $3, $4, $5, $6::text::timestamptz, $7, $8)"""
        made = ConsumerSettings.model_validate({"broker_url": broker.url, "source": queue})

        async def handle() -> None:
            async with opened(PostgresBroker(made, len(messages + dead) or 1)) as source:
                async with source._request() as connection:
                    for row in messages:
                        await connection.execute(add_message, *row, queue)
                    for row in dead:
                        await connection.execute(add_dead, *row, queue)
                assert len([letter async for letter in source.dead_letters(99)]) == len(dead)
                assert await last(source.replay_dead_letters()) == len(dead)
                await source.start()
                for message in await take(source, len(messages + dead)):
                    await source.reject(message, message.id)
                await source.stop()
                assert await source.count_dead_letters() == len(messages + dead)

        asyncio.run(handle())
        broker.delete(queue)

    async def test_impossible_times_and_counts_of_a_dead_letter_are_listed_as_absent(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        insert = """INSERT INTO consumer.dead_letters
            (source, reason, attempts, dead_lettered_at, id, type, headers, body)
            VALUES ($1, '', -1, $2::text::timestamptz, '', '', '[]', '')"""
        async with connect(prefetch=0) as source:
            for time in ("infinity", "-infinity", "4713-01-01 BC"):
                await query(broker, insert, queue, time)
            letters = [letter async for letter in source.dead_letters(10)]
        assert [(one.attempts, one.dead_lettered_at) for one in letters] == [(0, 0.0)] * 3


class TestTables:
    async def test_many_processes_may_create_the_tables_at_once(
        self, source_for: Callable[..., PostgresBroker], broker: PostgresServer, queue: str
    ) -> None:
        schema = f'Odd "{queue}'
        sources = [source_for(options=f"?schema={quote(schema)}") for _ in range(8)]
        try:
            await asyncio.gather(*(source.__aenter__() for source in sources))
            await asyncio.gather(*(source.declare() for source in sources))
            await asyncio.gather(*(publish(source, 1) for source in sources))
            assert (await sources[0].describe())[queue] == 8
        finally:
            await asyncio.gather(*(source.__aexit__() for source in sources))
            await query(broker, f"DROP SCHEMA {postgres._identifier(schema)} CASCADE")

    @pytest.mark.parametrize(
        ("statements", "sentence"),
        [
            (
                ["COMMENT ON TABLE {}.messages IS 'cookiecutter-consumer queue, schema 2'"],
                "have version 2; this version of the service knows 1",
            ),
            (
                ["COMMENT ON TABLE {}.messages IS NULL"],
                "belongs to another program: choose another",
            ),
            (["DROP TABLE {}.messages"], "belongs to another program: choose another"),
        ],
        ids=["a newer version", "messages of others", "other tables of others"],
    )
    async def test_tables_of_another_program_stay_unmodified(
        self,
        source_for: Callable[..., PostgresBroker],
        broker: PostgresServer,
        statements: list[str],
        sentence: str,
    ) -> None:
        await query(broker, "DROP SCHEMA IF EXISTS theirs CASCADE")
        async with opened(source_for(options="?schema=theirs")):
            pass
        for statement in statements:
            await query(broker, statement.format("theirs"))
        columns = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'theirs'"
        before = await query(broker, columns)
        with pytest.raises(BrokerRefused, match=sentence) as refused:
            async with opened(source_for(options="?schema=theirs")):
                pass
        assert "\n" not in str(refused.value)
        assert await query(broker, columns) == before
        await query(broker, "DROP SCHEMA theirs CASCADE")

    async def test_looking_creates_nothing(
        self, source_for: Callable[..., PostgresBroker], broker: PostgresServer, queue: str
    ) -> None:
        for options in ("?schema=nothing", "?schema=nothing&pgbouncer=true"):
            async with source_for(options=options) as source:
                described = await source.describe()
                assert (described["schema"], described[queue]) == ("nothing", "does not exist")
                assert await source.count_dead_letters() == 0
                assert [letter async for letter in source.dead_letters(9)] == []
                assert await last(source.purge_dead_letters()) == 0
                assert await last(source.replay_dead_letters()) == 0
                with pytest.raises(BrokerRefused, match=r'"nothing.messages" does not exist'):
                    await publish(source, 1)
        assert not await query(broker, "SELECT FROM pg_namespace WHERE nspname = 'nothing'")

    async def test_a_user_without_the_right_to_create_tables_uses_existing_ones(
        self, connect: Connect, node: PrivatePostgres, user: str
    ) -> None:
        await query(node, "DROP SCHEMA IF EXISTS consumer CASCADE")
        with pytest.raises(BrokerDenied, match="and cannot be created") as refused:
            async with connect(url=user):
                pass
        assert "\n" not in str(refused.value)
        async with connect(prefetch=0, url=node.url):
            pass
        with pytest.raises(BrokerDenied, match="permission denied for schema consumer"):
            async with connect(url=user):
                pass
        await query(node, "GRANT USAGE ON SCHEMA consumer TO me")
        for right, missing in [
            ("SELECT, DELETE", "UPDATE on messages, INSERT on consumers, UPDATE on consumers,"),
            ("SELECT, DELETE, UPDATE", "INSERT on consumers, INSERT on dead_letters$"),
        ]:
            await query(node, f"GRANT {right} ON ALL TABLES IN SCHEMA consumer TO me")
            with pytest.raises(BrokerDenied, match=f"lacks the right to {missing}"):
                async with connect(url=user):
                    pass
        await query(
            node, "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA consumer TO me"
        )
        async with connect(prefetch=3, url=user) as source:
            await publish(source, 3)
            done, later, bad = await take(source, 3)
            await source.ack(done)
            await source.retry(later, 0, "again")
            await source.reject(bad, "bad")
            await ack_all(source, 1)
            await source.describe()
            assert len([letter async for letter in source.dead_letters(9)]) == 1
            assert await last(source.replay_dead_letters()) == 1
            (again,) = await take(source, 1)
            await source.reject(again, "bad")
            await eventually(1, source.count_dead_letters)
            assert await last(source.purge_dead_letters()) == 1

    async def test_a_database_in_another_encoding_is_refused(
        self, source_for: Callable[..., PostgresBroker], node: PrivatePostgres
    ) -> None:
        await query(node, "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
        url = urlsplit(node.url)._replace(path="/latin").geturl()
        with pytest.raises(BrokerRefused, match="encoding of this database is not UTF8"):
            await source_for(url=url).__aenter__()
        await query(node, "DROP DATABASE latin")

    async def test_confirmed_messages_are_on_the_disk(self, connect: Connect) -> None:
        async with connect(prefetch=0) as source, source._request() as connection:
            for setting in ("fsync", "synchronous_commit"):
                assert await connection.fetchval(f"SHOW {setting}") == "on"
            unlogged = """SELECT count(*) FROM pg_class
                WHERE relnamespace = 'consumer'::regnamespace AND relpersistence <> 'p'"""
            assert await connection.fetchval(unlogged) == 0

    async def test_taking_costs_the_same_with_any_number_of_waiting_messages(
        self, connect: Connect, broker: PostgresServer, queue: str
    ) -> None:
        add = """INSERT INTO consumer.messages (source, due_at, consumer, body)
            SELECT $1, $2::text::timestamptz, $3::bigint, '' FROM generate_series(1, $4::int)"""
        async with connect(prefetch=0) as source:

            async def rows_read() -> int:
                """The rows read by the exchange, in all steps of its plan together."""
                async with source._request() as connection, connection.transaction():
                    register, exchange = (
                        postgres._sql(statement, "consumer")
                        for statement in (postgres.REGISTER, postgres.EXCHANGE)
                    )
                    me = await connection.fetchval(register, queue, 60.0)
                    # The worst case: a plan for an empty table, which then has any rows.
                    await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
                    explain = f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE worst('{queue}', {me}, ARRAY[]::bigint[], 10)"
                    if not await connection.fetchval(
                        "SELECT count(*) FROM pg_prepared_statements WHERE name = 'worst'"
                    ):
                        await connection.execute(
                            f"PREPARE worst (text, bigint, bigint[], int) AS {exchange}"
                        )
                    [plan] = json.loads(await connection.fetchval(explain))
                return sum(_rows_read(plan["Plan"]))

            await query(broker, add, queue, "-infinity", None, 20)
            before = await rows_read()
            for place in (
                (queue, "-infinity", 7),
                (queue, "2100-01-01", None),
                ("other", "-infinity", None),
            ):
                await query(broker, add, *place, 5000)
            await query(broker, add, queue, "-infinity", None, 5000)
            # The plan differs by some rows with the table's statistics; a plan that reads the other rows, by thousands.
            assert await rows_read() <= before + 100
            await query(broker, "DELETE FROM consumer.messages WHERE source = 'other'")

    async def test_the_server_is_described_with_its_version(self, connect: Connect) -> None:
        async with connect(prefetch=0) as source:
            described = await source.describe()
        assert str(described["server"]).startswith("PostgreSQL ")
        assert described["schema"] == "consumer"


def _rows_read(plan: dict[str, Any]) -> Iterator[int]:
    removed = [n for name, n in plan.items() if name.startswith("Rows Removed")]
    yield int((plan["Actual Rows"] + sum(removed)) * plan["Actual Loops"])
    for step in plan.get("Plans", ()):
        yield from _rows_read(step)


class TestCredentials:
    @pytest.mark.parametrize(
        ("name", "database", "sentence"),
        [
            ("nobody-of-that-name", "/postgres", "refused the user name or the password"),
            ("", "/nowhere", 'database "nowhere" does not exist'),
        ],
    )
    async def test_a_wrong_password_user_or_database_is_one_sentence_without_them(
        self,
        source_for: Callable[..., PostgresBroker],
        node: PrivatePostgres,
        user: str,
        name: str,
        database: str,
        sentence: str,
    ) -> None:
        own = urlsplit(node.url)._replace(path=database).geturl()
        url = with_user(own, name, "s3cret-s3cret") if name else own
        with pytest.raises(BrokerRefused, match=sentence) as refused:
            await source_for(url=url).__aenter__()
        assert "s3cret" not in str(refused.value)
        assert "\n" not in str(refused.value)

    def test_no_part_of_a_password_counts_as_a_host(
        self, broker: PostgresServer, source_for: Callable[..., PostgresBroker]
    ) -> None:
        with pytest.raises(BrokerRefused, match="percent-encoded"):
            source_for(url="postgres://me:s3@cret/s3cret@host/database")

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ("lease_seconds=0", "lease_seconds must be a number of at least 0.01"),
            ("lease_seconds=x", "lease_seconds must be a number"),
            ("poll_seconds=inf", "poll_seconds must be a number"),
            ("pgbouncer=maybe", "pgbouncer must be true or false"),
            ("sslrootcert=/missing.pem", "sslrootcert: the file /missing.pem does not exist"),
        ],
    )
    def test_an_option_that_cannot_be_used_is_one_sentence(
        self,
        broker: PostgresServer,
        source_for: Callable[..., PostgresBroker],
        options: str,
        sentence: str,
    ) -> None:
        with pytest.raises(BrokerRefused, match=f"^CONSUMER_BROKER_URL: {sentence}"):
            source_for(options=f"?{options}")

    async def test_an_option_that_the_server_does_not_know_is_one_sentence(
        self, source_for: Callable[..., PostgresBroker]
    ) -> None:
        with pytest.raises(BrokerRefused, match='unrecognized configuration parameter "lease"'):
            await source_for(options="?lease=3").__aenter__()

    async def test_the_session_has_the_name_of_the_queue(
        self, connect: Connect, queue: str
    ) -> None:
        shown = "SHOW application_name"
        async with connect(prefetch=0) as source, source._request() as connection:
            assert await connection.fetchval(shown) == queue
        named = "?application_name=shop"
        async with connect(prefetch=0, options=named) as source, source._request() as connection:
            assert await connection.fetchval(shown) == "shop"


class TestTls:
    async def test_an_sslmode_that_does_not_exist_is_one_sentence(
        self, source_for: Callable[..., PostgresBroker]
    ) -> None:
        with pytest.raises(BrokerRefused, match="sslmode") as refused:
            await source_for(options="?sslmode=sometimes").__aenter__()
        assert "\n" not in str(refused.value)

    async def test_a_server_without_tls_is_refused_if_the_url_asks_for_tls(
        self, source_for: Callable[..., PostgresBroker], broker: PostgresServer
    ) -> None:
        with pytest.raises(BrokerRefused, match="no TLS connection"):
            await source_for(options="?sslmode=require").__aenter__()
