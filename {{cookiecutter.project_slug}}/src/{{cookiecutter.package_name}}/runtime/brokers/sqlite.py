# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""The embedded broker: durable queues in one SQLite file, shared by the processes of one machine.

``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``sqlite:///C:/windows.db``. One file may hold many
queues; it is made when it is not there. It must be on a local disk, not on a network share.

A consumer is a row with an expiry time, which it renews while it lives, also while a handler runs for
hours. A message in hand carries its consumer's number. When a consumer dies, whoever sees its row
expired removes it, and its messages are ready again with the same ``attempt``. ``?lease_seconds=30`` in
the URL says after how long; an event loop that is blocked for longer counts as dead.

A confirmed publish survives a loss of power. Settlements are gathered and written with the next
transaction, within milliseconds; a process killed in between sees those messages again.

Times are the machine's wall clock. Set back, it makes delayed retries and the messages of dead consumers
late by as much; set forward by more than the lease, it may deliver messages in hand a second time.
Messages that simply wait do not depend on it.
"""

import asyncio
import json
import math
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .source import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    Capabilities,
    Connectivity,
    Source,
    headers_from,
    log_settlement_lost,
)

T = TypeVar("T")

LEASE_SECONDS = 30.0
POLL_SECONDS = 0.05
"""How often to look for what other processes have written."""
LOCK_SECONDS = 0.25
"""How long SQLite waits for a lock, and so the longest time that nothing else can be asked of it."""
PATIENCE_SECONDS = 5.0
"""How long others may keep the file locked before that is an outage."""
LONGEST_PAUSE_SECONDS = 5.0
STOP_SECONDS = 2.0
CLOSE_SECONDS = 3.0
CRASH_LIMIT = 100
"""When so many consumers died with a message in hand, the message is taken for the cause."""
STEP = 500
"""Rows per transaction in long work, so that other processes get their turn."""

APPLICATION_ID = 0x63637131  # in the file's header: it is one of ours
SCHEMA_VERSION = 1
# Each index holds only what it is for, so taking a message costs the same however many others wait for
# their time or are in hand. IF NOT EXISTS: two processes may make the same file at once.
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS consumers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- never used again: an old lease fits no new consumer
    source TEXT NOT NULL,
    expires_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, -- the order of publishing
    source TEXT NOT NULL,
    consumer INTEGER, -- in whose hand it is; NULL while it waits
    due_at REAL NOT NULL DEFAULT 0, -- 0: at once, whatever the clock says
    failures INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    headers TEXT NOT NULL, -- JSON, or empty
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS messages_waiting ON messages (source, due_at) WHERE consumer IS NULL;
CREATE INDEX IF NOT EXISTS messages_in_hand ON messages (consumer) WHERE consumer IS NOT NULL;
CREATE TABLE IF NOT EXISTS dead_letters (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    source TEXT NOT NULL,
    reason TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    dead_lettered_at REAL NOT NULL,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    headers TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS dead_letters_of_source ON dead_letters (source);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

PUBLISH = "INSERT INTO messages (source, id, type, headers, body) VALUES (?, ?, ?, ?, ?)"

ANYTHING_TO_DO = """
SELECT EXISTS (SELECT 1 FROM messages WHERE source = :source AND consumer IS NULL AND due_at <= :now)
    OR EXISTS (SELECT 1 FROM consumers WHERE expires_at <= :now AND id != :consumer)
"""
FIND_DUE = """
SELECT CAST(body AS BLOB), id, type, headers, failures + 1, seq FROM messages
WHERE source = :source AND consumer IS NULL AND due_at > 0 AND due_at <= :now
ORDER BY due_at LIMIT :limit
"""
FIND_READY = """
SELECT CAST(body AS BLOB), id, type, headers, failures + 1, seq FROM messages
WHERE source = :source AND consumer IS NULL AND due_at = 0
ORDER BY seq LIMIT :limit
"""
TAKE = "UPDATE messages SET consumer = ? WHERE seq = ?"

# Settling counts only while the lease does: the last statement changes one row, or none.
ACK = ("DELETE FROM messages WHERE seq = :seq AND consumer = :consumer",)
RETRY = (
    """UPDATE messages SET consumer = NULL, due_at = :due_at, failures = failures + 1
    WHERE seq = :seq AND consumer = :consumer""",
)
REQUEUE = ("UPDATE messages SET consumer = NULL WHERE seq = :seq AND consumer = :consumer",)
REJECT = (
    """INSERT INTO dead_letters (source, reason, attempts, dead_lettered_at, id, type, headers, body)
    SELECT source, :reason, failures + 1, :now, id, type, headers, body
    FROM messages WHERE seq = :seq AND consumer = :consumer""",
    *ACK,
)

IS_ALIVE = "SELECT EXISTS (SELECT 1 FROM consumers WHERE id = ?)"
RENEW = "UPDATE consumers SET expires_at = ? WHERE id = ?"
REGISTER = "INSERT INTO consumers (expires_at, source) VALUES (?, ?)"
LEAVE = (
    "UPDATE messages SET consumer = NULL WHERE consumer = :consumer",
    "DELETE FROM consumers WHERE id = :consumer",
)
FIND_EXPIRED = "SELECT id FROM consumers WHERE expires_at <= ? AND id != ?"
BRING_BACK = (
    "UPDATE messages SET crashes = crashes + 1 WHERE consumer = :consumer",
    f"""INSERT INTO dead_letters (source, reason, attempts, dead_lettered_at, id, type, headers, body)
    SELECT source, '{CRASH_LIMIT} consumers died with it in hand', failures, :now,
        id, type, headers, body
    FROM messages WHERE consumer = :consumer AND crashes >= {CRASH_LIMIT}""",
    f"DELETE FROM messages WHERE consumer = :consumer AND crashes >= {CRASH_LIMIT}",
    *LEAVE,
)

COUNTS = """
SELECT
    (SELECT count(*) FROM messages
        WHERE source = :source AND consumer IS NULL AND due_at <= :now) AS ready,
    (SELECT count(*) FROM messages
        WHERE source = :source AND consumer IS NULL AND due_at > :now) AS delayed,
    (SELECT count(*) FROM messages
        WHERE consumer IN (SELECT id FROM consumers WHERE source = :source)) AS in_flight,
    (SELECT count(*) FROM dead_letters WHERE source = :source) AS dead,
    (SELECT count(*) FROM consumers WHERE source = :source AND expires_at > :now) AS consumers
"""
COUNT_DEAD = "SELECT count(*), max(seq) FROM dead_letters WHERE source = :source"
NEXT_DEAD = """
SELECT seq, body, id, type, reason, attempts, dead_lettered_at FROM dead_letters
WHERE source = :source AND seq > :after ORDER BY seq LIMIT 1
"""
OLDEST_DEAD = f"""
SELECT seq FROM dead_letters WHERE source = :source AND seq <= :last ORDER BY seq LIMIT {STEP}
"""
PURGE = (f"DELETE FROM dead_letters WHERE seq IN ({OLDEST_DEAD})",)
REPLAY = (
    f"""INSERT INTO messages (source, id, type, headers, body)
    SELECT source, id, type, headers, body FROM dead_letters
    WHERE seq IN ({OLDEST_DEAD}) ORDER BY seq""",
    *PURGE,
)


class Lease(NamedTuple):
    """The receipt of a delivery: the message's row, and the consumer it was given to."""

    seq: int
    consumer: int


class Settlement(NamedTuple):
    message: Message
    statements: tuple[str, ...]
    parameters: dict[str, Any]


Row = tuple[bytes, str, str, str, int, int]  # body, id, type, headers, attempt, seq


class Exchange(NamedTuple):
    """What one transaction of the fetcher brought."""

    consumer: int
    lost: list[Message]
    rows: list[Row]


class SqliteSource(Source):
    """One queue in the file that ``CONSUMER_BROKER_URL`` names. Headers must be JSON values."""

    capabilities = Capabilities(
        delayed_retry=True, attempts=True, requeue=True, dead_letters=True, order=True
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        self._name = settings.source
        self._file, self._lease_seconds = _parse(settings.broker_url.get_secret_value())
        self._file_identity: tuple[int, int] | None = None
        self._thread: ThreadPoolExecutor | None = None  # the only one that uses the connection
        self._connection: sqlite3.Connection | None = None
        # For a look from the event loop: asking the thread would double the CPU time of an idle consumer.
        self._watch: sqlite3.Connection | None = None
        self.connectivity = Connectivity(str(self._file))
        self._consumer = 0  # our row in the table of consumers; no row has the number 0
        self._renew_at = -math.inf  # time.monotonic(), in seconds
        self._fetcher: asyncio.Task[None] | None = None
        self._taking = False
        self._closing = False
        self._wake = asyncio.Event()
        self._flushed = asyncio.Event()
        self._unacked: set[Message] = set()
        self._settlements: list[Settlement] = []

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        try:
            await self._call(self._open)
        except BaseException:
            self._end_thread()
            raise
        self.connectivity.established()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._taking = False
        self._closing = True
        self._wake.set()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._fetcher is not None:
                    await asyncio.wait({self._fetcher})
                    await self._call(self._leave, self._settlements)
                    self._settlements.clear()
                await self._call(self._close)
        except (TimeoutError, BrokerError) as error:
            for settlement in self._settlements:
                log_settlement_lost(settlement.message, str(error) or f"{self._file} does not answer")
        finally:
            self.connectivity.up = False
            self._settlements.clear()
            self._unacked.clear()
            if self._fetcher is not None:
                self._fetcher.cancel()
            self._end_thread()

    @property
    def connected(self) -> bool:
        return self.connectivity.up

    def _open(self) -> None:
        if not self._file.parent.is_dir():
            msg = f"the directory of {self._file} does not exist"
            raise BrokerRefused(msg)
        self._connection = sqlite3.connect(self._file, timeout=LOCK_SECONDS, isolation_level=None)
        try:
            self._prepare(self._connection)
        except BaseException:
            self._close()
            raise
        self._watch = sqlite3.connect(self._file, timeout=0, check_same_thread=False)
        self._file_identity = _identity(self._file)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")  # one look: another process may be making the tables just now
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (table_count,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        connection.execute("COMMIT")
        if application_id != APPLICATION_ID and (application_id or version or table_count):
            msg = f"{self._file} is the database of another program"
            raise BrokerRefused(msg)
        if version not in (0, SCHEMA_VERSION):
            msg = f"{self._file} has schema {version}; this version of the service knows {SCHEMA_VERSION}"
            raise BrokerRefused(msg)
        # Nothing is written before this line: the file of another program stays as it is.
        (journal_mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if journal_mode != "wal":
            msg = f"{self._file} is on a file system that cannot share it between processes"
            raise BrokerRefused(msg)
        connection.execute("PRAGMA synchronous = FULL")
        # Also when the tables are there: a read-only or locked file shows now, not with a message.
        connection.executescript(SCHEMA)

    def _close(self) -> None:
        for connection in (self._watch, self._connection):
            if connection is not None:
                connection.close()
        self._watch = self._connection = None

    def _end_thread(self) -> None:
        """Close, after what the thread still does and without waiting for it."""
        if self._thread is not None:
            self._thread.submit(self._close)
            self._thread.shutdown(wait=False)
            self._thread = None

    # -- consuming

    async def start(self) -> None:
        self._taking = True
        self._fetcher = asyncio.create_task(self._fill(), name=f"fetcher of {self._name}")

    async def stop(self) -> None:
        self._taking = False
        for message in self.buffer.take_all():
            await self.requeue(message)
        self.buffer.close()
        if self._fetcher is None or self._fetcher.done():
            return
        self._flushed.clear()  # until the transaction that may be under way has been answered too
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._flushed.wait()

    async def _fill(self) -> None:
        """Write settlements and take messages, both in one transaction, until closed."""
        loop = asyncio.get_running_loop()
        pause = POLL_SECONDS
        try:
            while not self._closing:
                self._wake.clear()
                try:
                    if not self.connectivity.up or self._has_work():
                        await self._exchange_once()
                except BrokerUnavailable as outage:
                    self.connectivity.lost(outage)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                else:
                    self.connectivity.established()
                    pause = POLL_SECONDS
                    if not self._settlements:
                        self._flushed.set()
                timer = loop.call_later(pause, self._wake.set)
                await self._wake.wait()
                timer.cancel()
        except Exception as failure:
            self.connectivity.up = False
            self.buffer.fail(failure)
        finally:
            self._flushed.set()

    @property
    def _room(self) -> int:
        return self.prefetch - len(self._unacked) if self._taking else 0

    def _has_work(self) -> bool:
        """Whether a transaction is needed. Looking locks nobody out, and is done 20 times a second."""
        if self._settlements or time.monotonic() >= self._renew_at:
            return True
        if not self._room:
            return False
        assert self._watch is not None
        what = {"source": self._name, "consumer": self._consumer, "now": time.time()}
        try:
            return bool(self._watch.execute(ANYTHING_TO_DO, what).fetchone()[0])
        except sqlite3.Error:
            return True  # the transaction will say what is wrong

    async def _exchange_once(self) -> None:
        settlements = self._settlements.copy()
        exchange = await self._call(self._exchange, settlements, self._room)
        # Not earlier: after an outage they are written again.
        del self._settlements[: len(settlements)]
        if exchange.consumer != self._consumer:
            # We were taken for dead, and what we had is in other hands: drop what nobody started.
            self._consumer = exchange.consumer
            self._unacked.clear()
            self.buffer.take_all()
        for message in exchange.lost:
            log_settlement_lost(message, "its lease had expired")
        for body, id, type, headers, attempt, seq in exchange.rows:
            message = Message(
                body,
                id,
                type,
                headers_from(headers) if headers else {},
                attempt,
                Lease(seq, exchange.consumer),
            )
            self._unacked.add(message)
            if self._taking:
                self.buffer.put(message)
            else:
                await self.requeue(message)

    def _exchange(self, settlements: list[Settlement], room: int) -> Exchange:
        now = time.time()
        consumer = self._consumer
        renewing = time.monotonic() >= self._renew_at
        if renewing and _identity(self._file) != self._file_identity:
            msg = f"{self._file} was deleted or replaced"
            raise BrokerRefused(msg)
        with self._transaction() as connection:
            lost = _settle(connection, settlements)
            if not renewing:
                # Whoever's clock is ahead may have removed our row, and nobody would ever bring back what is
                # taken with a number that no row has.
                (alive,) = connection.execute(IS_ALIVE, (consumer,)).fetchone()
                renewing = not alive
            if renewing:
                consumer = self._renew(connection, now + self._lease_seconds)
            for (dead,) in connection.execute(FIND_EXPIRED, (now, consumer)).fetchall():
                _execute(connection, BRING_BACK, {"consumer": dead, "now": now})
            rows: list[Row] = []
            for find in (FIND_DUE, FIND_READY):  # what had to wait for its time is the older
                what = {"source": self._name, "now": now, "limit": max(0, room - len(rows))}
                rows += connection.execute(find, what).fetchall()
            connection.executemany(TAKE, [(consumer, row[-1]) for row in rows])
        if renewing:
            self._renew_at = time.monotonic() + self._lease_seconds / 3
        return Exchange(consumer, lost, rows)

    def _renew(self, connection: sqlite3.Connection, expires_at: float) -> int:
        """Returns our number, which is a new one at the start, and after we were taken for dead."""
        if connection.execute(RENEW, (expires_at, self._consumer)).rowcount:
            return self._consumer
        return connection.execute(REGISTER, (expires_at, self._name)).lastrowid or 0

    def _leave(self, settlements: list[Settlement]) -> None:
        with self._transaction() as connection:
            _settle(connection, settlements)
            _execute(connection, LEAVE, {"consumer": self._consumer})

    # -- settling

    async def ack(self, message: Message) -> None:
        self._settle(message, ACK)

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        self._settle(message, RETRY, due_at=time.time() + delay_seconds)

    async def reject(self, message: Message, reason: str) -> None:
        self._settle(message, REJECT, reason=reason, now=time.time())

    async def requeue(self, message: Message) -> None:
        self.requeued_count += message in self._unacked
        self._settle(message, REQUEUE)

    def _settle(self, message: Message, statements: tuple[str, ...], **parameters: Any) -> None:
        if message not in self._unacked:
            log_settlement_lost(message, "it was settled before, or its lease had expired")
            return
        self._unacked.remove(message)
        parameters |= message.receipt._asdict()
        self._settlements.append(Settlement(message, statements, parameters))
        self._flushed.clear()
        self._wake.set()

    # -- publishing, counting, dead letters

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        rows = [
            (
                self._name,
                message.id,
                message.type,
                json.dumps(dict(message.headers)) if message.headers else "",
                message.body,
            )
            for message in messages
        ]
        await self._call(self._publish, rows)
        self._wake.set()

    def _publish(self, rows: list[tuple[str, str, str, str, bytes]]) -> None:
        with self._transaction() as connection:
            connection.executemany(PUBLISH, rows)

    async def describe(self) -> dict[str, int | str]:
        ready, delayed, in_flight, dead, consumers = await self._read(COUNTS, now=time.time())
        return {
            "file": str(self._file),
            self._name: ready,
            f"{self._name} delayed": delayed,
            f"{self._name} in hand": in_flight,
            f"{self._name} dead letters": dead,
            f"{self._name} consumers": consumers,
        }

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        after = 0
        for _ in range(limit):
            row = await self._read(NEXT_DEAD, after=after)
            if row is None:
                return
            after, *letter = row
            yield DeadLetter(*letter)

    async def count_dead_letters(self) -> int:
        count, _ = await self._read(COUNT_DEAD)
        return int(count)

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        async for moved in self._in_steps(REPLAY):
            yield moved

    def purge_dead_letters(self) -> AsyncIterator[int]:
        return self._in_steps(PURGE)

    async def _in_steps(self, statements: tuple[str, ...]) -> AsyncIterator[int]:
        """Work through the dead letters that are there now; yields how many are done."""
        done = 0
        _, last = await self._read(COUNT_DEAD)
        while changed := await self._call(
            self._write, statements, {"source": self._name, "last": last}
        ):
            done += changed
            yield done

    async def _read(self, query: str, **parameters: Any) -> Any:
        """The first row, or None."""
        return await self._call(self._fetch, query, {"source": self._name, **parameters})

    def _fetch(self, query: str, parameters: dict[str, Any]) -> Any:
        assert self._connection is not None
        return self._connection.execute(query, parameters).fetchone()

    def _write(self, statements: tuple[str, ...], parameters: dict[str, Any]) -> int:
        with self._transaction() as connection:
            return _execute(connection, statements, parameters)

    # -- the database's thread

    async def _call(self, job: Callable[..., T], *arguments: Any) -> T:
        """Run the job on the database's thread. Raises BrokerUnavailable or BrokerRefused."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + PATIENCE_SECONDS
        while True:
            if self._thread is None:
                msg = f"{self._file} is not open"
                raise BrokerUnavailable(msg)
            try:
                return await loop.run_in_executor(self._thread, job, *arguments)
            except sqlite3.Error as error:
                if _code(error) not in _LOCKED or loop.time() >= give_up_at:
                    raise _explain(error, self._file) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection
        assert connection is not None
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> SqliteSource:
    """Raises BrokerRefused if the URL names no file."""
    return SqliteSource(settings, prefetch)


def _parse(url: str) -> tuple[Path, float]:
    """The file, and the lease in seconds."""
    parts = urlsplit(url, allow_fragments=False)
    name = unquote(parts.path.removeprefix("/"))
    if parts.netloc or not name or name == ":memory:":
        msg = "CONSUMER_BROKER_URL names no file: write sqlite:///relative.db or sqlite:////absolute.db"
        raise BrokerRefused(msg)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    lease = options.pop("lease_seconds", str(LEASE_SECONDS))
    with suppress(ValueError):
        if not options and 0 < float(lease) < math.inf:
            return Path(name).absolute(), float(lease)
    msg = "CONSUMER_BROKER_URL: the only option of sqlite is ?lease_seconds=, a number above 0"
    raise BrokerRefused(msg)


def _identity(file: Path) -> tuple[int, int] | None:
    """Which file this is, whatever it is called; None if it is gone."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _settle(connection: sqlite3.Connection, settlements: list[Settlement]) -> list[Message]:
    """Returns the messages that were settled too late."""
    return [
        settlement.message
        for settlement in settlements
        if not _execute(connection, settlement.statements, settlement.parameters)
    ]


def _execute(
    connection: sqlite3.Connection, statements: tuple[str, ...], parameters: dict[str, Any]
) -> int:
    """Returns how many rows the last statement changed."""
    changed = 0
    for statement in statements:
        changed = connection.execute(statement, parameters).rowcount
    return changed


# The last: many processes began a transaction at the same instant.
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_TRY_AGAIN = {
    **dict.fromkeys(_LOCKED, "is locked by another program"),
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full",
    sqlite3.SQLITE_IOERR: "cannot be read or written: the disk fails, or a limit is reached",
}
_GIVE_UP = {
    sqlite3.SQLITE_READONLY: "is read-only",
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
    sqlite3.SQLITE_CORRUPT: "is damaged",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened or made: this user may not read and write it and its directory",
}


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _explain(error: sqlite3.Error, file: Path) -> BrokerError:
    code = _code(error)
    if code in _TRY_AGAIN:
        return BrokerUnavailable(f"{file} {_TRY_AGAIN[code]}")
    return BrokerRefused(f"{file} {_GIVE_UP.get(code, f'cannot be used: {error}')}")
