"""The embedded broker alone: leases, killed processes, and files that cannot be used."""

import asyncio
import multiprocessing
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.brokers import sqlite
from runtime.brokers.sqlite import SqliteBroker
from runtime.errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable, SourceFailed
from runtime.message import Message, OutgoingMessage
from runtime.settings import ConsumerSettings
from steps import last

WAIT_SECONDS = 20
SHORT_LEASE_SECONDS = 0.4
KILLS = 50
PREFETCH = 10

if sys.platform == "win32":
    PROCESSES = multiprocessing.get_context("spawn")
else:
    # Forked from a process that has imported everything: fifty of them start within seconds.
    PROCESSES = multiprocessing.get_context("forkserver")
    PROCESSES.set_forkserver_preload([__name__])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def source_of(
    file: Path, prefetch: int = 1, lease_seconds: float = 30, queue: str = "q"
) -> SqliteBroker:
    url = f"sqlite:///{file.as_posix()}?lease_seconds={lease_seconds}"
    settings = ConsumerSettings.model_validate({"broker_url": url, "source": queue})
    return SqliteBroker(settings, prefetch)


@asynccontextmanager
async def opened(file: Path, *arguments: Any, **options: Any) -> AsyncIterator[SqliteBroker]:
    """A source that is declared, and does not consume."""
    async with source_of(file, *arguments, **options) as source:
        await source.declare()
        yield source


@asynccontextmanager
async def consuming(file: Path, prefetch: int = 1, **options: Any) -> AsyncIterator[SqliteBroker]:
    async with opened(file, prefetch, **options) as source:
        await source.start()
        yield source


async def publish(source: SqliteBroker, count: int) -> list[str]:
    messages = [OutgoingMessage(b"%d" % number) for number in range(count)]
    await source.publish(messages)
    return [message.id for message in messages]


async def take(source: SqliteBroker, count: int = 1) -> list[Message]:
    async with asyncio.timeout(WAIT_SECONDS):
        return [await anext(source) for _ in range(count)]


async def become_true(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < give_up_at, "the awaited state did not come"
        await asyncio.sleep(0.01)


def query(file: Path, statement: str, *parameters: object) -> list[Any]:
    """The rows for any other SQLite client; changes are committed."""
    with closing(sqlite3.connect(file)) as connection, connection:
        return connection.execute(statement, parameters).fetchall()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """A context in which another program has a write transaction open."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


# -- one file


async def test_a_requeued_message_returns_to_the_front_of_the_queue(file: Path) -> None:
    async with opened(file) as publisher:
        published = await publish(publisher, 5)
        async with consuming(file, prefetch=3) as source:
            first, second, third = await take(source, 3)
            await source.stop()
            await source.ack(second)
            await source.requeue(third)
            await source.requeue(first)
        async with consuming(file, prefetch=4) as source:
            order = [message.id for message in await take(source, 4)]
    assert order == [published[0], published[2], published[3], published[4]]


async def test_a_retry_waits_for_its_delay(file: Path) -> None:
    async with consuming(file) as source:
        await publish(source, 1)
        (message,) = await take(source)
        retried_at = time.time()
        await source.retry(message, 60, "not now")
    [(due_at,)] = query(file, "SELECT due_at FROM messages")
    assert 60 <= due_at - retried_at < 70


async def test_a_due_retry_is_delivered_before_ready_messages(file: Path) -> None:
    async with consuming(file) as source:
        published = await publish(source, 3)
        (message,) = await take(source)
        await source.retry(message, 0, "again")
        (message,) = await take(source)
    assert (message.id, message.attempt) == (published[0], 2)


async def test_queues_in_one_file_do_not_see_each_other(file: Path) -> None:
    async with consuming(file, queue="a") as a, consuming(file, queue="b") as b:
        await a.publish([OutgoingMessage(b"for a")])
        await b.publish([OutgoingMessage(b"for b")])
        assert [message.body for message in await take(b)] == [b"for b"]
        assert [message.body for message in await take(a)] == [b"for a"]
        assert (await a.describe())["a consumers"] == 1


async def test_many_processes_may_create_the_same_file_at_once(file: Path) -> None:
    sources = [source_of(file) for _ in range(8)]
    await asyncio.gather(*(source.__aenter__() for source in sources))
    await asyncio.gather(*(source.declare() for source in sources))
    await asyncio.gather(*(publish(source, 1) for source in sources))
    assert (await sources[0].describe())["q"] == 8
    await asyncio.gather(*(source.__aexit__() for source in sources))


FREQUENT = [
    sqlite.ANYTHING_TO_DO,
    sqlite.FIND_DUE,
    sqlite.FIND_READY,
    *sqlite.ACK,
    *sqlite.RETRY,
    *sqlite.REQUEUE,
    *sqlite.LEAVE,
    *sqlite.RECLAIM,
]
PARAMETERS = {
    **{"source": "q", "consumer": 1, "seq": 1, "now": 2, "limit": 10, "due_at": 1},
    "failures": 1,
}


async def test_no_frequent_statement_reads_all_messages_or_sorts(file: Path) -> None:
    async with opened(file):
        pass
    with closing(sqlite3.connect(file)) as connection:
        for statement in FREQUENT:
            plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", PARAMETERS).fetchall()
            text = " ".join(detail for *_, detail in plan)
            assert "SCAN messages" not in text, statement
            assert "TEMP B-TREE" not in text, statement


async def test_fetching_costs_the_same_with_any_number_of_stored_messages(file: Path) -> None:
    async with opened(file):
        pass
    add = """
        INSERT INTO messages (source, id, type, headers, body, consumer, due_at)
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
        SELECT ?, '', '', '', '', ?, ? FROM n
    """
    with closing(sqlite3.connect(file)) as connection:

        def steps_of(statement: str) -> int:
            steps = 0

            def count() -> None:
                nonlocal steps
                steps += 1

            connection.set_progress_handler(count, 1)
            assert len(connection.execute(statement, PARAMETERS).fetchall()) == 10
            connection.set_progress_handler(None, 1)
            return steps

        in_flight, other_queue, later = (7, 0), (None, 0), (None, 1e12)
        connection.execute(add, (5000, "q", *in_flight))
        connection.execute(add, (10, "q", None, 0))
        connection.execute(add, (10, "q", None, 1))
        before = [steps_of(find) for find in (sqlite.FIND_READY, sqlite.FIND_DUE)]
        for queue, state in (("q", in_flight), ("other", other_queue), ("q", later)):
            connection.execute(add, (5000, queue, *state))
        connection.execute(add, (5000, "q", None, 0))
        after = [steps_of(find) for find in (sqlite.FIND_READY, sqlite.FIND_DUE)]
        # Not equal: newer versions of SQLite need fewer steps among more rows.
        assert all(more <= less + 20 for more, less in zip(after, before, strict=True))
        assert max(before) < 500


async def test_what_this_process_publishes_or_settles_needs_no_waiting(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "POLL_SECONDS", 3600)
    async with consuming(file) as source:
        for _ in range(3):
            await publish(source, 1)
            (message,) = await take(source)
            await source.ack(message)
            await become_true(lambda: query(file, "SELECT count(*) FROM messages") == [(0,)])


@pytest.mark.parametrize("declare", ["yes", "no"])
async def test_every_transaction_is_written_through_to_the_disk(
    file: Path, declare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(file):
        pass

    class BuiltWithout(sqlite3.Connection):
        """SQLite on some systems."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.execute("PRAGMA synchronous = NORMAL")

    connect = partial(sqlite3.connect, factory=BuiltWithout)
    monkeypatch.setattr(sqlite3, "connect", connect)
    source = source_of(file)
    source.settings = source.settings.model_copy(update={"declare": declare == "yes"})
    async with source:
        await source.prepare()
        assert await source._read("PRAGMA synchronous") == (2,)  # FULL
        assert await source._read("PRAGMA journal_mode") == (b"wal",)


async def test_many_dead_letters_are_moved_in_steps(file: Path) -> None:
    count = 2 * sqlite.SqliteBroker.dead_letters_at_once + 3
    async with opened(file) as source:
        await publish(source, count)
        died = """
            INSERT INTO dead_letters (source, reason, attempts, dead_lettered_at, id, type, headers, body)
            SELECT source, '', 1, 1, id, type, headers, body FROM messages
        """
        query(file, died)
        query(file, "DELETE FROM messages")
        progress = []
        async for moved in source.replay_dead_letters():
            progress.append(moved)
            query(file, died + "LIMIT 1")  # a message that arrives meanwhile stays
        assert progress == [
            sqlite.SqliteBroker.dead_letters_at_once,
            2 * sqlite.SqliteBroker.dead_letters_at_once,
            count,
        ]
        assert await last(source.purge_dead_letters()) == len(progress)
        query(file, died)
        assert await last(source.purge_dead_letters()) == count
        async with consuming(file, prefetch=count) as consumer:
            bodies = [int(message.body) for message in await take(consumer, count)]
    assert bodies == list(range(count))


async def test_the_file_stays_small_while_consumers_keep_up(file: Path) -> None:
    body = bytes(1000)
    async with consuming(file, prefetch=100) as source:
        for _ in range(50):
            await source.publish([OutgoingMessage(body) for _ in range(100)])
            for message in await take(source, 100):
                await source.ack(message)
        sizes = [len(data) for data in contents(file.parent).values()]
    assert sum(sizes) < 8_000_000


async def test_what_is_described_is_in_this_file(file: Path) -> None:
    async with opened(file) as source:
        assert (await source.describe())["file"] == str(file)
        assert sqlite.make_source(source.settings).prefetch == 1
        assert SqliteBroker(source.settings).prefetch == 1
        assert source.connectivity.address == str(file)


async def test_a_second_settlement_is_logged_with_its_reason(
    file: Path, events: list[dict[str, Any]]
) -> None:
    async with consuming(file) as source:
        await publish(source, 1)
        (message,) = await take(source)
        await source.ack(message)
        await source.ack(message)
    [lost] = [event for event in events if event["event"] == "settlement_lost"]
    assert lost["reason"] == "it was settled before, or the broker has taken it back"


async def test_an_idle_consumer_only_polls(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with consuming(file) as source:
        await become_true(lambda: source._consumer != 0)
        looks: list[bool] = []
        has_work = source._has_work

        def look() -> bool:
            looks.append(has_work())
            return looks[-1]

        async def exchange() -> None:
            raise AssertionError

        monkeypatch.setattr(source, "_has_work", look)
        monkeypatch.setattr(source, "_exchange_once", exchange)
        await become_true(lambda: len(looks) > 2)
        assert (looks, source.buffer.failure) == ([False] * len(looks), None)
        monkeypatch.undo()


async def test_a_consumer_with_a_full_prefetch_does_not_poll(file: Path) -> None:
    async with consuming(file) as source:
        await publish(source, 2)
        await take(source)
        assert not source._has_work()


async def test_a_failed_poll_is_left_to_the_transaction(file: Path) -> None:
    async with consuming(file) as source:
        await become_true(lambda: source._consumer != 0)
        assert not source._has_work()
        assert source._watch is not None
        source._watch.close()
        assert source._has_work()


async def test_a_file_that_is_locked_from_the_start_on_is_an_outage_that_ends(
    file: Path, monkeypatch: pytest.MonkeyPatch, events: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(sqlite, "LOCK_SECONDS", 0.01)
    monkeypatch.setattr(sqlite, "PATIENCE_SECONDS", 0)
    async with opened(file) as source:
        with locked(file):
            await source.start()
            await become_true(lambda: not source.connected)
        await become_true(lambda: source.connected)
        published = await publish(source, 1)
        assert [message.id for message in await take(source)] == published
    [reason] = [event["reason"] for event in events if event["event"] == "reconnecting"]
    assert reason == f"{file} is locked by another program"


async def test_stop_waits_for_a_locked_file_for_a_bounded_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "STOP_SECONDS", 0.05)
    async with consuming(file) as source:
        await publish(source, 1)
        (message,) = await take(source)
        with locked(file):
            await source.ack(message)
            async with asyncio.timeout(3):
                await source.stop()
    assert query(file, "SELECT count(*) FROM messages") == [(0,)]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("CLOSE_SECONDS", "{} does not answer"),
        pytest.param("PATIENCE_SECONDS", "{} is locked by another program", marks=pytest.mark.slow),
    ],
)
async def test_settlements_not_written_before_the_close_are_logged_with_their_reason(
    file: Path,
    events: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    reason: str,
) -> None:
    monkeypatch.setattr(sqlite, setting, 0.01)
    async with consuming(file) as source:
        await publish(source, 1)
        (message,) = await take(source)
        with locked(file):
            await source.ack(message)
            async with asyncio.timeout(2):
                await source.__aexit__()
            assert source._fetcher is not None
            await become_true(source._fetcher.done)
    lost = [event for event in events if event["event"] == "settlement_lost"]
    assert [(one["message_id"], one["reason"]) for one in lost] == [
        (message.id, reason.format(file))
    ]


@pytest.mark.parametrize("pragma", ["application_id", "user_version"])
async def test_an_empty_file_that_another_program_has_marked_is_not_ours(
    file: Path, pragma: str
) -> None:
    query(file, f"PRAGMA {pragma} = 7")
    with pytest.raises(BrokerRefused, match="is the database of another program"):
        await source_of(file).__aenter__()


def test_a_file_that_processes_cannot_share_is_refused(file: Path) -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.text_factory = bytes
        with pytest.raises(BrokerRefused) as refused:
            source_of(file)._create_tables(connection)
    assert str(refused.value) == (
        f"{file} is on a file system that cannot share it between processes"
    )


async def test_a_short_lock_is_no_outage(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "LOCK_SECONDS", 0.01)
    async with opened(file) as source:
        tries: list[object] = []
        write = source._write

        def count_and_write(*arguments: Any) -> None:
            tries.append(arguments)
            write(*arguments)

        monkeypatch.setattr(source, "_write", count_and_write)
        with locked(file):
            publishing = asyncio.create_task(publish(source, 1))
            await become_true(lambda: len(tries) > 1)
        await publishing


async def test_the_connection_has_one_thread_which_ends_with_it(file: Path) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "sqlite" in thread.name]

    await become_true(lambda: threads() == [])  # of the previous test
    with pytest.raises(BrokerUnavailable, match=f"^{file} is not open$"):
        await publish(source_of(file), 1)
    async with consuming(file) as source:
        await publish(source, 1)
        assert threads() == ["sqlite_0"]
        connection = source._connection
    await become_true(lambda: threads() == [])
    assert (source._connection, source._watch, source._thread) == (None, None, None)
    assert connection is not None
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.total_changes  # noqa: B018
    with pytest.raises(BrokerUnavailable, match=f"^{file} is not open$"):
        await publish(source, 1)


async def test_no_more_messages_are_taken_than_the_prefetch_allows(file: Path) -> None:
    async with opened(file) as source:
        await publish(source, 6)
        query(file, "UPDATE messages SET due_at = 1 WHERE seq > 4")
        async with consuming(file, prefetch=3) as other:
            await become_true(lambda: len(other.buffer) >= 3)
            in_flight = query(
                file, "SELECT seq FROM messages WHERE consumer IS NOT NULL ORDER BY 1"
            )
    assert in_flight == [(1,), (5,), (6,)]


async def test_a_lease_is_renewed_three_times_before_it_ends(file: Path) -> None:
    async with consuming(file, lease_seconds=30) as source:
        await become_true(lambda: source._consumer != 0)
        assert 8 < source._renew_at - time.monotonic() <= 10


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("lease_seconds=inf", "lease_seconds must be a number of at least 0.01"),
        ("lease_seconds=0", "lease_seconds must be a number of at least 0.01"),
        ("other=", "unknown option 'other'; known options: lease_seconds"),
    ],
)
def test_a_wrong_option_is_one_sentence(option: str, sentence: str) -> None:
    with pytest.raises(BrokerRefused) as refused:
        sqlite._parse(f"sqlite:///queue.db?{option}")
    assert str(refused.value) == f"CONSUMER_BROKER_URL: {sentence}"


def test_the_error_for_a_url_without_a_file_shows_how_to_name_one() -> None:
    with pytest.raises(BrokerRefused) as refused:
        sqlite._parse("sqlite://")
    assert str(refused.value) == (
        "CONSUMER_BROKER_URL names no file: write sqlite:///relative.db or sqlite:////absolute.db"
    )


async def test_a_source_that_never_started_stops_at_once(file: Path) -> None:
    async with opened(file) as source:
        await source.stop()


def test_an_error_without_a_code_of_sqlite_is_passed_on(file: Path) -> None:
    refusal = sqlite._explain(sqlite3.InterfaceError("odd"), file)
    assert isinstance(refusal, BrokerRefused)
    assert str(refusal) == f"{file} cannot be used: odd"


# -- leases


async def test_a_consumer_that_counted_as_dead_loses_its_messages_and_goes_on(
    file: Path, events: list[dict[str, Any]]
) -> None:
    async with consuming(file, prefetch=2, lease_seconds=SHORT_LEASE_SECONDS) as one:
        published = await publish(one, 2)
        (in_flight,) = await take(one)
        await become_true(lambda: len(one.buffer) == 1)
        query(file, "UPDATE consumers SET expires_at = 1")  # like after a long suspension
        async with consuming(file, prefetch=2) as other:
            again = await take(other, 2)
            assert [message.id for message in again] == published
            assert [message.attempt for message in again] == [1, 1]
            await become_true(lambda: not one.buffer)  # dropped without a log
            await one.ack(in_flight)
            assert names(events).count("settlement_lost") == 1
            for message in again:
                await other.ack(message)
        published = await publish(one, 1)
        assert [message.id for message in await take(one)] == published
    assert names(events).count("settlement_lost") == 1


async def test_a_redelivery_of_an_in_flight_message_is_not_started_again(file: Path) -> None:
    async with consuming(file, 2, lease_seconds=SHORT_LEASE_SECONDS) as source:
        await publish(source, 2)
        working, idle = await take(source, 2)
        source.in_flight = [working]
        query(file, "DELETE FROM consumers")
        (again,) = await take(source)
        assert again.id == idle.id
        await source.ack(again)
        await source.ack(working)
    assert query(file, "SELECT count(*) FROM messages") == [(0,)]


async def test_the_messages_of_a_consumer_whose_row_was_deleted_are_counted_and_redelivered(
    file: Path,
) -> None:
    """An operator deletes it, for a pod that is gone."""
    async with opened(file) as publisher:
        published = await publish(publisher, 5)
        query(file, "UPDATE messages SET consumer = 7 WHERE seq < 4")
        assert (await publisher.describe())["q in flight"] == 3
        async with consuming(file, 5, lease_seconds=SHORT_LEASE_SECONDS) as source:
            taken = await take(source, 5)
            assert sorted(message.id for message in taken) == sorted(published)
            assert {message.attempt for message in taken} == {1}
            query(file, "DELETE FROM consumers")  # and the messages of a live consumer
            again = await take(source, 5)
            assert sorted(message.id for message in again) == sorted(published)
            for message in again:
                await source.ack(message)
        assert (await publisher.describe())["q in flight"] == 0


async def test_messages_taken_after_a_false_death_are_redelivered_when_their_consumer_dies(
    file: Path,
) -> None:
    async with consuming(file) as one:
        await publish(one, 1)
        (handled,) = await take(one)
        await one.ack(handled)
        await become_true(lambda: not one._settlements)
        query(file, "DELETE FROM consumers")  # like by a process whose clock is ahead
        published = await publish(one, 1)
        await take(one)
        query(file, "UPDATE consumers SET expires_at = 1")  # and then it dies
        async with consuming(file) as other:
            assert [message.id for message in await take(other)] == published


async def test_a_settlement_that_comes_too_late_is_logged_and_changes_nothing(
    file: Path, events: list[dict[str, Any]]
) -> None:
    async with consuming(file) as one:
        await publish(one, 1)
        (in_flight,) = await take(one)
        query(file, "UPDATE messages SET consumer = NULL")  # this consumer does not know it yet
        await one.ack(in_flight)
        (again,) = await take(one)
        assert again.id == in_flight.id
    [lost] = [event for event in events if event["event"] == "settlement_lost"]
    assert lost["reason"] == "its lease had expired"


async def test_publishing_and_the_ack_are_one_step_that_comes_too_late_as_a_whole(
    file: Path, events: list[dict[str, Any]]
) -> None:
    async with consuming(file, prefetch=2) as one:
        await publish(one, 2)
        first, second = await take(one, 2)
        follow = [OutgoingMessage(b"x", id="next", to="source:next")] * 2
        await one.publish_and_ack(first, follow)
        await become_true(lambda: not one._settlements)
        counted = "SELECT count(*) FROM messages WHERE source = 'next'"
        assert query(file, counted) == [(2,)]
        query(file, "UPDATE messages SET consumer = NULL WHERE source != 'next'")
        await one.publish_and_ack(second, follow)
        await take(one)
        assert query(file, counted) == [(2,)]
    [lost] = [event for event in events if event["event"] == "settlement_lost"]
    assert (lost["message_id"], lost["reason"]) == (second.id, "its lease had expired")


async def test_a_message_can_be_published_with_a_delay(file: Path) -> None:
    async with consuming(file, prefetch=2) as one:
        delayed = OutgoingMessage(b"later", delay_seconds=0.2)
        began_at = time.time()
        await one.publish([delayed, OutgoingMessage(b"now")])
        assert [message.body for message in await take(one)] == [b"now"]
        assert [message.body for message in await take(one)] == [b"later"]
        assert time.time() - began_at >= 0.19


async def test_deliveries_count_the_consumers_that_died_with_the_message(file: Path) -> None:
    async with opened(file) as publisher:
        await publish(publisher, 2)
        query(file, "INSERT INTO consumers (id, source, expires_at) VALUES (7, 'q', 1)")
        query(
            file,
            "UPDATE messages SET consumer = 7, crashes = CASE seq WHEN 1 THEN 3 ELSE -9 END",
        )
        async with consuming(file) as source:
            for deliveries in (5, 1):
                (message,) = await take(source)
                assert message.deliveries == deliveries
                await source.ack(message)


# -- rows of other programs

VALUES = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
# SQLite stores any bytes as text, and other kinds of values than the column's.
ROWS = st.lists(st.tuples(*[st.tuples(VALUES, st.sampled_from(["?", "CAST(? AS TEXT)"]))] * 5))


@settings(max_examples=30)
@given(ROWS, ROWS, st.sampled_from([0, 0.0, -1, 1, "0", "-1e300"]))
def test_whatever_other_programs_write_ends_no_consumer_and_can_be_listed_and_replayed(
    messages: list[Any], dead: list[Any], due_at: Any
) -> None:
    def insert(file: Path, table: str, columns: str, row: Any, *more: Any) -> None:
        values = ", ".join([*(how for _, how in row), *("?" for _ in more)])
        statement = f"INSERT INTO {table} ({columns}) VALUES ({values})"
        query(file, statement, *(str_or(value) for value, _ in row), *more)

    async def handle(file: Path) -> None:
        async with opened(file) as source:
            for row in messages:
                columns = "id, type, headers, body, failures, due_at, source"
                insert(file, "messages", columns, row, due_at, "q")
            for row in dead:
                columns = "id, type, headers, body, attempts, reason, dead_lettered_at, source"
                insert(file, "dead_letters", columns, row, row[0][0], row[1][0], "q")
            assert await source.count_dead_letters() == len(dead)
            assert len([letter async for letter in source.dead_letters(99)]) == len(dead)
            assert await last(source.replay_dead_letters()) == len(dead)
            source.prefetch = len(messages + dead) or 1
            await source.start()
            taken = await take(source, len(messages + dead))
            assert all(isinstance(message.body, bytes) for message in taken)
            for message in taken:
                await source.reject(message, message.id)
            await source.stop()
            assert len([letter async for letter in source.dead_letters(99)]) == len(taken)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(handle(Path(directory) / "queue.db"))


def str_or(value: Any) -> Any:
    """SQLite cannot bind half of a surrogate pair."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


# -- several processes


def note(ledger: Path, what: str, ids: list[str]) -> None:
    """One write, so that the line is complete or missing, whenever the process dies."""
    with ledger.open("ab", buffering=0) as opened:
        opened.write("".join(f"{what} {id}\n" for id in ids).encode())


def noted(ledger: Path, what: str) -> list[str]:
    lines = [line.split() for line in ledger.read_text().splitlines()] if ledger.exists() else []
    return [id for word, id in lines if word == what]


def publish_until_killed(file: Path, ledger: Path, seed: int) -> None:
    async def run() -> None:
        chance = random.Random(seed)
        async with opened(file) as source:
            while True:
                count, size = chance.randrange(1, 20), chance.randrange(3000)
                messages = [OutgoingMessage(chance.randbytes(size)) for _ in range(count)]
                await source.publish(messages)
                note(ledger, "published", [message.id for message in messages])
                await asyncio.sleep(chance.random() * 0.02)

    asyncio.run(run())


def consume_until_killed(file: Path, ledger: Path, seed: int) -> None:
    async def run() -> None:
        chance = random.Random(seed)
        async with consuming(file, PREFETCH, lease_seconds=SHORT_LEASE_SECONDS) as source:
            async for message in source:
                fate = chance.choice(["ack", "ack", "ack", "ack", "retry", "reject", "requeue"])
                if fate == "ack":
                    note(ledger, "acked", [message.id])
                    await source.ack(message)
                elif fate == "retry":
                    await source.retry(message, chance.random() * 0.1, "again")
                elif fate == "reject":
                    await source.reject(message, "bad")
                else:
                    await source.requeue(message)
                await asyncio.sleep(0)

    asyncio.run(run())


def publish_and_end(file: Path, ledger: Path, count: int) -> None:
    async def run() -> None:
        async with opened(file) as source:
            for _ in range(0, count, 50):
                note(ledger, "published", await publish(source, 50))

    asyncio.run(run())


def consume_until_empty(file: Path, ledger: Path, count: int) -> None:
    """Consume until all consumers together have handled this many messages."""

    async def work(source: SqliteBroker) -> None:
        async for message in source:
            note(ledger, "handled", [message.id])
            await source.ack(message)
            await asyncio.sleep(0)

    async def run() -> None:
        async with consuming(file, PREFETCH) as source:
            workers = [asyncio.create_task(work(source)) for _ in range(5)]
            await become_true(lambda: len(noted(ledger, "handled")) >= count)
            await source.stop()
            await asyncio.gather(*workers)

    asyncio.run(run())


def hold_one_message(file: Path, ledger: Path) -> None:
    async def run() -> None:
        async with consuming(file, lease_seconds=SHORT_LEASE_SECONDS) as source:
            note(ledger, "held", [(await anext(source)).id])
            await asyncio.sleep(3600)

    asyncio.run(run())


def publish_the_time(file: Path, count: int) -> None:
    async def run() -> None:
        async with opened(file) as source:
            for number in range(count):
                # At varying moments between two looks of the consumer.
                await asyncio.sleep(0.05 + 0.007 * number)
                await source.publish([OutgoingMessage(repr(time.time()).encode())])

    asyncio.run(run())


Start = Callable[..., BaseProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that calls a function; it is killed at the end."""
    processes: list[BaseProcess] = []

    def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
        process: BaseProcess = PROCESSES.Process(target=function, args=arguments)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()
        process.close()


@pytest.mark.slow
async def test_no_sigkill_loses_or_damages_anything(
    file: Path, tmp_path: Path, start: Start
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    ledger = tmp_path / "ledger"
    functions = [publish_until_killed, consume_until_killed, consume_until_killed]

    processes = [start(function, file, ledger, chance.random()) for function in functions]
    await become_true(lambda: len(noted(ledger, "acked")) > 10)
    for _ in range(KILLS):
        victim = chance.randrange(len(functions))
        await asyncio.sleep(chance.random() * 0.15)
        processes[victim].kill()
        processes[victim].join()
        processes[victim] = start(functions[victim], file, ledger, chance.random())
    for process in processes:
        process.kill()
        process.join()

    assert query(file, "PRAGMA integrity_check") == [("ok",)]
    left = [id for (id,) in query(file, "SELECT id FROM messages")]
    dead = [id for (id,) in query(file, "SELECT id FROM dead_letters")]
    published = set(noted(ledger, "published"))  # and confirmed
    acked = set(noted(ledger, "acked"))
    assert len(published) > KILLS
    assert len(set(left + dead)) == len(left) + len(dead)  # each is in one place
    assert published <= acked.union(left, dead)
    # Between a handler's end and its settlement a SIGKILL redelivers at most the in-flight messages.
    assert len(acked.intersection(left + dead)) <= PREFETCH * (KILLS + len(functions))

    async with consuming(file, prefetch=100) as source:
        for _ in left:
            (message,) = await take(source)
            await source.ack(message)
    assert query(file, "SELECT count(*) FROM messages") == [(0,)]


@pytest.mark.slow
async def test_two_consumer_processes_and_a_publisher_handle_everything_once(
    file: Path, tmp_path: Path, start: Start
) -> None:
    ledger = tmp_path / "ledger"
    consumers = [start(consume_until_empty, file, ledger, 1000) for _ in range(2)]
    start(publish_and_end, file, ledger, 1000)
    for consumer in consumers:
        await asyncio.to_thread(consumer.join, WAIT_SECONDS)
        assert consumer.exitcode == 0
    assert Counter(noted(ledger, "handled")) == Counter(noted(ledger, "published"))
    assert query(file, "SELECT count(*) FROM messages") == [(0,)]


@pytest.mark.slow
async def test_the_messages_of_a_killed_consumer_are_redelivered_when_its_lease_has_expired(
    file: Path, tmp_path: Path, start: Start
) -> None:
    ledger = tmp_path / "ledger"
    async with consuming(file) as source:
        published = await publish(source, 1)
        (message,) = await take(source)
        await source.stop()
        process = start(hold_one_message, file, ledger)
        await source.requeue(message)
        await become_true(lambda: noted(ledger, "held") == published)
        process.kill()
        killed_at = time.monotonic()
        async with consuming(file) as other:
            (message,) = await take(other)
        assert (message.id, message.attempt) == (published[0], 1)
        assert time.monotonic() - killed_at < SHORT_LEASE_SECONDS + 1


@pytest.mark.slow
async def test_a_message_of_another_process_arrives_within_100_ms(file: Path, start: Start) -> None:
    latencies = []
    async with consuming(file) as source:
        start(publish_the_time, file, 15)
        for _ in range(15):
            (message,) = await take(source)
            latencies.append(time.time() - float(message.body))
            await source.ack(message)
    print(f"{sorted(latencies)}")
    assert statistics.median(latencies) < 0.1


@pytest.mark.slow
async def test_an_idle_consumer_uses_next_to_no_cpu(file: Path) -> None:
    async with consuming(file, prefetch=10):
        idle_seconds = 2.0
        before = time.process_time()
        await asyncio.sleep(idle_seconds)
        share = (time.process_time() - before) / idle_seconds
    print(f"{share:.2%} of a core")
    assert share < 0.1  # also in debug mode on a slow machine; a loop that is busy has 1


# -- files that cannot be used


def assert_one_sentence(error: BrokerError, file: Path) -> None:
    assert "\n" not in str(error)
    assert str(file) in str(error)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def overwrite(file: Path, data: bytes, at: int = 0) -> None:
    file.touch()
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(data)


async def refusal(file: Path) -> str:
    """The error of connecting and declaring: BrokerRefused, with no open connection left."""
    source = source_of(file)
    with pytest.raises(BrokerRefused) as caught:
        async with source:
            await source.declare()
    assert not source.connected
    assert source._connection is None
    assert_one_sentence(caught.value, file)
    return str(caught.value)


async def test_the_file_of_another_program_is_refused_and_stays_unmodified(file: Path) -> None:
    query(file, "CREATE TABLE songs (title TEXT)")
    before = contents(file.parent)
    assert "another program" in await refusal(file)
    assert contents(file.parent) == before


async def test_a_file_of_a_later_version_is_refused(file: Path) -> None:
    async with opened(file):
        pass
    query(file, f"PRAGMA user_version = {sqlite.SCHEMA_VERSION + 1}")
    assert f"schema {sqlite.SCHEMA_VERSION + 1}" in await refusal(file)


async def test_a_file_that_is_no_database_is_refused_and_stays_unmodified(file: Path) -> None:
    overwrite(file, b"Dear diary, " * 1000)
    before = contents(file.parent)
    assert "not an SQLite database" in await refusal(file)
    assert contents(file.parent) == before


async def test_a_damaged_file_is_refused(file: Path) -> None:
    async with opened(file) as source:
        await publish(source, 100)
    overwrite(file, b"\xff" * 2000, at=100)
    assert "damaged" in await refusal(file)


async def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in await refusal(tmp_path / "missing" / "queue.db")


async def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be opened" in await refusal(tmp_path)


@pytest.fixture
def not_root() -> Iterator[Path]:
    """A directory, for a user to whom file permissions apply: they do not apply to root."""
    with tempfile.TemporaryDirectory() as directory:
        is_root = hasattr(os, "geteuid") and os.geteuid() == 0
        if is_root:
            os.chown(directory, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(directory)
        finally:
            if is_root:
                os.seteuid(0)
            Path(directory).chmod(0o700)


def forbid_writing(path: Path) -> None:
    path.chmod(path.stat().st_mode & ~0o222)


@pytest.mark.parametrize("kind", ["missing", "in a missing directory", "empty"])
async def test_looking_creates_nothing(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "missing" / "q.db" if kind == "in a missing directory" else tmp_path / "q.db"
    if kind == "empty":
        file.touch()
    before = contents(tmp_path)
    async with source_of(file) as source:
        assert await source.describe() == {"file": str(file), "q": "does not exist"}
        assert await source.count_dead_letters() == 0
        assert [letter async for letter in source.dead_letters(9)] == []
        assert await last(source.purge_dead_letters()) == 0
        with pytest.raises(BrokerRefused, match=f"^{file} does not exist$"):
            await publish(source, 1)
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such users")
@pytest.mark.skipif(getattr(os, "geteuid", int)() != 0, reason="only root can be several users")
async def test_a_look_by_another_user_does_not_stop_the_owner(not_root: Path) -> None:
    file = not_root / "queue.db"
    os.chmod(not_root, 0o777)  # noqa: PTH101
    async with opened(file) as source:
        await publish(source, 1)
    os.seteuid(0)
    os.seteuid(4321)
    with pytest.raises(BrokerDenied, match=f"{file} is read-only for this user: user 65534 owns"):
        await source_of(file).__aenter__()
    os.seteuid(0)
    os.seteuid(65534)
    assert os.listdir(not_root) == ["queue.db"]  # noqa: PTH208
    async with opened(file) as source:  # and the leftover of another program is named
        os.seteuid(0)
        os.chown(f"{file}-shm", 4321, -1)
        os.seteuid(65534)
        with pytest.raises(BrokerDenied, match=f"{file}-shm is read-only .*: user 4321 owns it"):
            await source_of(file).__aenter__()


async def test_a_read_only_file_is_refused(not_root: Path) -> None:
    file = not_root / "queue.db"
    async with opened(file):
        pass
    forbid_writing(file)
    assert "read-only" in await refusal(file)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no read-only directories")
async def test_a_file_that_may_not_be_created_is_refused(not_root: Path) -> None:
    forbid_writing(not_root)
    assert "cannot be opened or created" in await refusal(not_root / "queue.db")


@pytest.mark.slow
async def test_a_locked_file_is_unavailable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "PATIENCE_SECONDS", 0.1)
    async with opened(file) as source:
        with locked(file):
            with pytest.raises(BrokerUnavailable, match="is locked") as caught:
                async with opened(file):
                    pass
            assert_one_sentence(caught.value, file)
            with pytest.raises(BrokerUnavailable, match="is locked"):
                await publish(source, 1)


@pytest.mark.slow
async def test_a_short_lock_is_waited_for(file: Path) -> None:
    async with opened(file) as source:
        with locked(file):
            publishing = asyncio.create_task(publish(source, 1))
            await asyncio.sleep(2 * sqlite.LOCK_SECONDS)
            assert not publishing.done()
        await publishing


async def test_a_full_disk_is_unavailable_and_publishes_nothing(file: Path) -> None:
    async with opened(file) as source:
        await publish(source, 1)
        await fill_the_disk(source)
        with pytest.raises(BrokerUnavailable, match="disk is full") as caught:
            await source.publish([OutgoingMessage(b"small"), OutgoingMessage(bytes(1_000_000))])
        assert_one_sentence(caught.value, file)
        assert (await source.describe())["q"] == 1


async def fill_the_disk(source: SqliteBroker, pages: int = 1) -> None:
    """SQLite's own limit, which acts like a full disk; a limit below the size allows no more pages."""

    def limit() -> None:
        assert source._connection is not None
        source._connection.execute(f"PRAGMA max_page_count = {pages}")

    await source._call(limit)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite://file.db",
        "sqlite:///:memory:",
        "sqlite:///f.db?lease_seconds=0",
        "sqlite:///f.db?lease_seconds=soon",
        "sqlite:///f.db?mode=ro",
    ],
)
def test_a_url_that_names_no_file_or_an_unknown_option_is_refused(url: str) -> None:
    with pytest.raises(BrokerRefused, match=r"^CONSUMER_BROKER_URL"):
        sqlite.make_source(ConsumerSettings.model_validate({"broker_url": url, "source": "q"}), 1)


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///queue.db", Path.cwd() / "queue.db"),
        ("sqlite:///data/my%20queue%3F.db", Path.cwd() / "data" / "my queue?.db"),
        ("sqlite:////var/queue.db", Path("/var/queue.db")),
        ("sqlite:///a#b.db", Path.cwd() / "a#b.db"),
    ],
)
def test_a_url_names_a_relative_or_an_absolute_file(url: str, file: Path) -> None:
    settings = ConsumerSettings.model_validate({"broker_url": url, "source": "q"})
    assert sqlite.make_source(settings, 1)._file == file.absolute()


# -- outages while consuming


@pytest.mark.slow
async def test_a_long_lock_is_an_outage_that_is_survived(
    file: Path, events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PATIENCE_SECONDS", 0.1)
    async with consuming(file, prefetch=2) as source:
        published = await publish(source, 3)
        first, second = await take(source, 2)
        with locked(file):
            await source.ack(first)
            await become_true(lambda: not source.connected)
            await source.ack(second)
        (third,) = await take(source)
        assert source.connected
        assert source.connectivity.outage_count == 1
        assert third.id == published[2]
        await source.ack(third)
    assert names(events) == ["connected", "reconnecting", "connected"]
    assert query(file, "SELECT count(*) FROM messages") == [(0,)]


async def test_a_full_disk_is_an_outage_that_is_survived(
    file: Path, events: list[dict[str, Any]]
) -> None:
    async with consuming(file) as source:
        await source.publish([OutgoingMessage(bytes(1_000_000))])
        (message,) = await take(source)
        await fill_the_disk(source)
        await source.reject(message, "bad")  # the copy does not fit
        await become_true(lambda: not source.connected)
        await fill_the_disk(source, pages=1_000_000)
        await become_true(lambda: source.connected)
        assert await source.count_dead_letters() == 1
    assert names(events) == ["connected", "reconnecting", "connected"]


async def test_stop_requeues_messages_that_are_taken_meanwhile(file: Path) -> None:
    async with opened(file) as publisher, source_of(file, prefetch=2) as source:
        await publish(publisher, 2)
        with locked(file):
            await source.start()
            await asyncio.sleep(0.01)  # its first transaction waits for the lock
            stopping = asyncio.create_task(source.stop())
            await asyncio.sleep(0.01)
        await stopping
        assert query(file, "SELECT count(*) FROM messages WHERE consumer IS NULL") == [(2,)]
        assert source.requeued_count == 2
        with pytest.raises(StopAsyncIteration):
            await anext(source)


@pytest.mark.slow
async def test_a_lock_cannot_delay_the_shutdown(
    file: Path, events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(sqlite, "CLOSE_SECONDS", 0.2)
    async with opened(file) as publisher:
        await publish(publisher, 2)
        async with consuming(file, prefetch=2, lease_seconds=SHORT_LEASE_SECONDS) as source:
            (message,) = await take(source)
            with locked(file):
                await source.ack(message)
                stopping_at = time.monotonic()
                await source.stop()
                await source.__aexit__()
                assert time.monotonic() - stopping_at < 1
                await become_true(lambda: source._connection is None)
        assert names(events).count("settlement_lost") == 2  # the ack, and the requeue
        async with consuming(file, prefetch=2) as other:
            assert {message.attempt for message in await take(other, 2)} == {1}


def delete(file: Path) -> None:
    file.unlink()


def replace(file: Path) -> None:
    file.rename(file.with_suffix(".old"))
    file.touch()


@pytest.mark.parametrize("remove", [delete, replace])
@pytest.mark.skipif(os.name == "nt", reason="Windows keeps an open file where it is")
async def test_a_deleted_file_ends_the_source(file: Path, remove: Callable[[Path], None]) -> None:
    async with consuming(file, lease_seconds=0.2) as source:
        remove(file)
        with pytest.raises(SourceFailed, match="deleted or replaced"):
            await take(source)
        assert not source.connected


async def test_a_failed_fetcher_makes_the_workers_raise(file: Path) -> None:
    async with consuming(file) as source:
        workers = [asyncio.create_task(take(source)) for _ in range(3)]
        await asyncio.sleep(0)
        query(file, "DROP TABLE messages")
        for worker in workers:
            with pytest.raises(SourceFailed, match="no such table"):
                await worker
        assert not source.connected
