# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""The embedded broker: durable queues in one SQLite file, shared by the processes of one machine.

``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``sqlite:///C:/windows.db``. The file may hold many
queues and is made when it is not there; its directory must exist, on a local disk (not a network share).

A consumer is a row with an expiry time that it renews while it lives, also while a handler runs for
hours; a message in hand carries its consumer's number. When a consumer dies, whoever sees its row expired
takes the row away and its messages are ready again, with the same ``attempt``. ``?lease_seconds=30`` says
after how long. A loop that is blocked for longer than that counts as dead.

Every transaction reaches the disk before it counts: a confirmed publish survives a loss of power.
Settlements are written in the next transaction, within milliseconds, many at a time; a process killed
in between sees those messages again.

The clock is the machine's: set back, it makes delayed retries and the messages of dead consumers
late by as much; set forward by more than the lease, it may deliver messages in hand twice.
Messages that are simply waiting do not depend on it.
"""

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import structlog

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .source import BrokerError, BrokerRefused, BrokerUnavailable, Capabilities, Source

T = TypeVar("T")

LEASE_SECONDS = 30.0
POLL_SECONDS = 0.05
"""How often to look for what other processes wrote; costs about 0.3 % of a core while idle."""
LOCK_SECONDS = 0.25
"""How long SQLite itself waits for a lock: the database's thread is never busy for longer."""
PATIENCE_SECONDS = 5.0
"""How long a file may stay locked by others before that is an outage."""
LONGEST_PAUSE_SECONDS = 5.0
STOP_SECONDS = 2.0
CLOSE_SECONDS = 5.0
CRASH_LIMIT = 100
"""So many consumers may die with a message in hand; then the message is taken for the cause."""
STEP = 500
"""Rows per transaction in long work, so that other processes get their turn."""

APPLICATION_ID = 0x63637131  # "ccq1", in the file's header: the file is one of ours
SCHEMA_VERSION = 1
SCHEMA = f"""
CREATE TABLE consumers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- never used twice, so an old lease fits no new consumer
    source TEXT NOT NULL,
    expires_at REAL NOT NULL
);
CREATE TABLE messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, -- the order of publishing
    source TEXT NOT NULL,
    consumer INTEGER, -- who has it in hand; NULL while it waits
    due_at REAL NOT NULL DEFAULT 0, -- 0: at once, whatever the clock says
    failures INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    headers TEXT NOT NULL, -- JSON, or empty
    body BLOB NOT NULL -- last, so that the other columns are read without it
);
-- Each index holds only what it is for: taking messages costs the same however many are in hand or wait.
CREATE INDEX messages_waiting ON messages (source, due_at) WHERE consumer IS NULL;
CREATE INDEX messages_in_hand ON messages (consumer) WHERE consumer IS NOT NULL;
CREATE TABLE dead_letters (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    source TEXT NOT NULL,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    headers TEXT NOT NULL,
    reason TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    died_at REAL NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX dead_letters_by_source ON dead_letters (source);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""

PUBLISH = "INSERT INTO messages (source, id, type, headers, body) VALUES (?, ?, ?, ?, ?)"
ANYTHING_TO_DO = """
    SELECT EXISTS (SELECT 1 FROM messages WHERE source = :source AND consumer IS NULL AND due_at <= :now)
        OR EXISTS (SELECT 1 FROM consumers WHERE expires_at <= :now AND id != :consumer)
"""
# What had to wait for its time goes first: it is older than anything that is ready and never waited.
FIND_DUE = """
    SELECT seq, id, type, headers, body, failures FROM messages
    WHERE source = :source AND consumer IS NULL AND due_at > 0 AND due_at <= :now
    ORDER BY due_at LIMIT :limit
"""
FIND_READY = """
    SELECT seq, id, type, headers, body, failures FROM messages
    WHERE source = :source AND consumer IS NULL AND due_at = 0
    ORDER BY seq LIMIT :limit
"""
TAKE = "UPDATE messages SET consumer = ? WHERE seq = ?"

# A settlement counts only while its consumer's lease does; the last statement tells by its row count.
ACK = ("DELETE FROM messages WHERE seq = :seq AND consumer = :consumer",)
RETRY = (
    """
    UPDATE messages SET consumer = NULL, due_at = :due_at, failures = failures + 1
    WHERE seq = :seq AND consumer = :consumer
    """,
)
GIVE_BACK = (
    "UPDATE messages SET consumer = NULL, due_at = 0 WHERE seq = :seq AND consumer = :consumer",
)
REJECT = (
    """
    INSERT INTO dead_letters (source, id, type, headers, reason, attempts, died_at, body)
    SELECT source, id, type, headers, :reason, failures + 1, :died_at, body
    FROM messages WHERE seq = :seq AND consumer = :consumer
    """,
    *ACK,
)

RENEW = "UPDATE consumers SET expires_at = ? WHERE id = ?"
REGISTER = "INSERT INTO consumers (expires_at, source) VALUES (?, ?)"
EXPIRED = "SELECT id FROM consumers WHERE expires_at <= ? AND id != ?"
BURY_CRASHED = (
    """
    INSERT INTO dead_letters (source, id, type, headers, reason, attempts, died_at, body)
    SELECT source, id, type, headers, :reason, failures, :died_at, body
    FROM messages WHERE consumer = :consumer AND crashes + 1 >= :crash_limit
    """,
    "DELETE FROM messages WHERE consumer = :consumer AND crashes + 1 >= :crash_limit",
)
BRING_BACK = (
    "UPDATE messages SET consumer = NULL, crashes = crashes + 1 WHERE consumer = :consumer",
    "DELETE FROM consumers WHERE id = :consumer",
)
LEAVE = (
    "UPDATE messages SET consumer = NULL WHERE consumer = :consumer",
    "DELETE FROM consumers WHERE id = :consumer",
)

COUNTS = """
    SELECT
        (SELECT count(*) FROM messages
            WHERE source = :source AND consumer IS NULL AND due_at <= :now),
        (SELECT count(*) FROM messages
            WHERE source = :source AND consumer IS NULL AND due_at > :now),
        (SELECT count(*) FROM messages
            WHERE consumer IN (SELECT id FROM consumers WHERE source = :source)),
        (SELECT count(*) FROM consumers WHERE source = :source AND expires_at > :now),
        (SELECT count(*) FROM dead_letters WHERE source = :source)
"""
COUNT_DEAD = "SELECT count(*) FROM dead_letters WHERE source = ?"
LAST_DEAD = "SELECT max(seq) FROM dead_letters WHERE source = ?"
READ_DEAD = """
    SELECT seq, body, id, type, reason, attempts, died_at FROM dead_letters
    WHERE source = ? AND seq > ? ORDER BY seq LIMIT ?
"""
OLDEST_DEAD = """
    SELECT seq FROM dead_letters WHERE source = :source AND seq <= :last ORDER BY seq LIMIT :limit
"""
REPLAY = (
    f"""
    INSERT INTO messages (source, id, type, headers, body)
    SELECT source, id, type, headers, body FROM dead_letters WHERE seq IN ({OLDEST_DEAD}) ORDER BY seq
    """,
    f"DELETE FROM dead_letters WHERE seq IN ({OLDEST_DEAD})",
)
PURGE = REPLAY[1:]


class Lease(NamedTuple):
    """The receipt of a delivery: the message's row, and the consumer it was given to."""

    seq: int
    consumer: int


class Settlement(NamedTuple):
    message: Message
    statements: tuple[str, ...]
    parameters: dict[str, Any]


class Exchange(NamedTuple):
    """What one transaction of the filler brought."""

    consumer: int
    renewed: bool
    lost: list[Message]
    """Their settlement came too late: the lease had expired, and somebody else has them."""
    rows: list[tuple[int, str, str, str, bytes, int]]


class SqliteSource(Source):
    """One queue in the file that ``CONSUMER_BROKER_URL`` names."""

    capabilities = Capabilities(
        delayed_retry=True, attempts=True, give_back=True, dead_letters=True
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        self._path, self._lease_seconds = _parse(settings.broker_url.get_secret_value())
        self._name = settings.source
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None
        self._file_identity: tuple[int, int] | None = None
        self._consumer = 0
        self._renew_at = 0.0  # time.monotonic(), in seconds
        self._filler: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._flushed = asyncio.Event()
        self._online = False
        self._taking = False
        self._closing = False
        self._unsettled: set[Message] = set()
        self._settlements: list[Settlement] = []

    # Connecting and closing

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        try:
            await self._call(self._open)
        except BaseException:
            self._end_thread()
            raise
        self._online = True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._taking = False
        self._closing = True
        self._wake.set()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._filler is not None:
                    await asyncio.wait({self._filler})
                await self._call(self._leave, self._settlements)
                self._settlements.clear()
                await self._call(self._close)
        except (TimeoutError, BrokerError) as error:
            for settlement in self._settlements:
                _log_lost(settlement.message, str(error) or "the file did not answer in time")
        finally:
            self._online = False
            self._unsettled.clear()
            if self._filler is not None:
                self._filler.cancel()
            self._end_thread()

    @property
    def connected(self) -> bool:
        return self._online

    def _open(self) -> None:
        if not self._path.parent.is_dir():
            msg = f"the directory of {self._path} does not exist"
            raise BrokerRefused(msg)
        connection = sqlite3.connect(self._path, timeout=LOCK_SECONDS, isolation_level=None)
        self._connection = connection
        if not self._is_ours():
            # Written only after the check: a file of another program stays as it is.
            (journal_mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if journal_mode != "wal":
                msg = f"{self._path} is on a file system that SQLite cannot share between processes"
                raise BrokerRefused(msg)
            with self._transaction():
                if not self._is_ours():
                    for statement in SCHEMA.split(";"):
                        connection.execute(statement)
        connection.execute("PRAGMA synchronous = FULL")
        with self._transaction():
            pass  # raises if the file is read-only or locked: now, and not with the first message
        self._file_identity = _identity(self._path)

    def _is_ours(self) -> bool:
        """Whether the file holds our tables; False if it is empty. Raises BrokerRefused for any other."""
        assert self._connection is not None
        (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (table_count,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application_id == APPLICATION_ID and version == SCHEMA_VERSION:
            return True
        if application_id == APPLICATION_ID:
            msg = f"{self._path} was made by another version of this service (schema {version}, not {SCHEMA_VERSION})"
            raise BrokerRefused(msg)
        if application_id or version or table_count:
            msg = f"{self._path} is the database of another program"
            raise BrokerRefused(msg)
        return False

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _end_thread(self) -> None:
        """Close after whatever the thread still does, without waiting for it."""
        if self._thread is not None:
            self._thread.submit(self._close)
            self._thread.shutdown(wait=False)
            self._thread = None

    async def _call(self, job: Callable[..., T], *arguments: Any) -> T:
        """Run the job on the database's thread; raises BrokerUnavailable or BrokerRefused.

        While the file is locked it is tried again, for `PATIENCE_SECONDS`.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + PATIENCE_SECONDS
        while True:
            try:
                return await loop.run_in_executor(self._thread, job, *arguments)
            except sqlite3.Error as error:
                failure = _explain(error, self._path)
                if not _is_locked(error) or loop.time() > give_up_at:
                    raise failure from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        assert self._connection is not None
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    # Consuming

    async def start(self) -> None:
        self._taking = True
        self._filler = asyncio.create_task(self._fill(), name=f"fill-{self._name}")
        log.info("connected", broker="sqlite", file=str(self._path))

    async def stop(self) -> None:
        self._taking = False
        for message in self.buffer.take_all():
            await self.give_back(message)
        self.buffer.close()
        if self._filler is None or self._filler.done():
            return
        self._flushed.clear()
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._flushed.wait()

    async def _fill(self) -> None:
        """Write settlements and take messages, in one transaction each time; until closed."""
        pause = POLL_SECONDS
        try:
            while not self._closing:
                self._wake.clear()
                try:
                    await self._exchange_once()
                except BrokerUnavailable as error:
                    if self._online:
                        log.warning("reconnecting", reason=str(error))
                    self._online = False
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                else:
                    if not self._online:
                        log.info("connected", broker="sqlite", file=str(self._path))
                    self._online = True
                    pause = POLL_SECONDS
                    if not self._settlements:
                        self._flushed.set()
                timer = asyncio.get_running_loop().call_later(pause, self._wake.set)
                await self._wake.wait()
                timer.cancel()
        except Exception as error:
            self._online = False
            self.buffer.fail(error)
        finally:
            self._flushed.set()

    async def _exchange_once(self) -> None:
        settlements = self._settlements.copy()
        room = self.prefetch - len(self._unsettled) if self._taking else 0
        exchange = await self._call(self._exchange, settlements, room)
        if exchange is None:
            return
        del self._settlements[: len(settlements)]
        for message in exchange.lost:
            _log_lost(message, LEASE_LOST)
        if exchange.consumer != self._consumer:
            # Late: we were taken for dead, and what we had is in other hands.
            self._consumer = exchange.consumer
            self._unsettled.clear()
            self.buffer.take_all()
        for seq, id, type, headers, body, failures in exchange.rows:
            message = Message(
                body,
                id,
                type,
                json.loads(headers) if headers else {},
                failures + 1,
                Lease(seq, exchange.consumer),
            )
            self._unsettled.add(message)
            if self._taking:
                self.buffer.put(message)
            else:  # stopped while the transaction ran
                await self.give_back(message)

    def _exchange(self, settlements: list[Settlement], room: int) -> Exchange | None:
        assert self._connection is not None
        now = time.time()
        what = {"source": self._name, "consumer": self._consumer, "now": now}
        renewing = time.monotonic() >= self._renew_at
        if not settlements and not renewing:
            if room <= 0 or not self._connection.execute(ANYTHING_TO_DO, what).fetchone()[0]:
                return None
        if renewing and _identity(self._path) != self._file_identity:
            msg = f"{self._path} was deleted or replaced"
            raise BrokerRefused(msg)
        with self._transaction() as connection:
            lost = _settle(connection, settlements)
            consumer = self._consumer
            if renewing:
                consumer = self._renew(connection, now)
            for (dead,) in connection.execute(EXPIRED, (now, consumer)).fetchall():
                for statement in (*BURY_CRASHED, *BRING_BACK):
                    connection.execute(...)
            rows = []
            if room > 0:
                rows = ...
        if renewing:
            self._renew_at = time.monotonic() + self._lease_seconds / 3
        return Exchange(consumer, lost, rows)
