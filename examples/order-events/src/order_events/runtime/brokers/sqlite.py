# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The embedded broker: durable queues in one SQLite file, shared by the processes of one machine.

``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``sqlite:///C:/windows.db``. One file may have many queues,
and `declare` creates it. It must be on a local disk, not on a network share.

A consumer is a row with an expiry time, its lease. The consumer renews it while it lives, also while a handler runs
for hours. An unacked message has its consumer's number. When a consumer dies, another one finds its row expired
and removes it; its messages are then ready again with the same ``attempt``. ``?lease_seconds=30`` in the URL is the
length of the lease; a consumer whose event loop is blocked for longer counts as dead.

A confirmed publish survives a power failure. Settlements are batched and written with the next transaction, within
milliseconds; after a kill in between, their messages are redelivered.

Times are the machine's wall clock. If it is set back, delayed retries and the messages of dead consumers are late by
as much; if it is set forward by more than the lease, unacked messages may be redelivered.
"""

import asyncio
import json
import math
import os
import sqlite3
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable
from ..message import LONGEST_DELAY_SECONDS, DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .connectivity import Connectivity
from .dead_letters import Page
from .delivery import count_of, headers_of, json_object, make_dead_letter, make_message, text_of
from .source import MISSING, Broker, Capabilities, log_settlement_lost
from .url import BrokerUrl

T = TypeVar("T")

LEASE_SECONDS = 30.0
POLL_SECONDS = 0.05
"""How often to look for changes by other processes."""
LOCK_SECONDS = 0.25
"""How long SQLite waits for a lock, which blocks every other request of this process to the file."""
PATIENCE_SECONDS = LONGEST_PAUSE_SECONDS = 5.0
"""How long other programs may lock the file before this counts as an outage."""
STOP_SECONDS = 2.0
CLOSE_SECONDS = 3.0

APPLICATION_ID = 0x63637131  # in the file's header: it belongs to this broker
SCHEMA_VERSION = 1
# Each index is partial, so taking a message costs the same with any number of delayed or in-flight ones.
# IF NOT EXISTS: two processes may create the same file at once.
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS consumers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- never reused: an old lease fits no new consumer
    source TEXT NOT NULL,
    expires_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, -- the order of publishing
    source TEXT NOT NULL,
    consumer INTEGER, -- the consumer that has it unacked; NULL while it waits
    due_at REAL NOT NULL DEFAULT 0, -- 0: at once, independent of the clock
    failures INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    id TEXT NOT NULL DEFAULT (lower(hex(randomblob(16)))),
    type TEXT NOT NULL DEFAULT '',
    headers TEXT NOT NULL DEFAULT '', -- JSON, or empty
    published_at REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400), -- Unix time
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS messages_waiting ON messages (source, due_at) WHERE consumer IS NULL;
CREATE INDEX IF NOT EXISTS messages_in_flight ON messages (consumer) WHERE consumer IS NOT NULL;
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

PUBLISH = """
INSERT INTO messages (source, id, type, headers, body, due_at)
VALUES (:source, :id, :type, :headers, :body, :due_at)
"""
# Publishes with the ack of the incoming message, if this consumer still has it.
PUBLISH_TOO = """
INSERT INTO messages (source, id, type, headers, body, due_at)
SELECT :source{0}, :id{0}, :type{0}, :headers{0}, :body{0}, :due_at{0}
FROM messages WHERE seq = :seq AND consumer = :consumer
"""

ANYTHING_TO_DO = """
SELECT EXISTS (SELECT 1 FROM messages WHERE source = :source AND consumer IS NULL AND due_at <= :now)
    OR EXISTS (SELECT 1 FROM consumers WHERE expires_at <= :now AND id != :consumer)
"""
FIND = """
SELECT CAST(body AS BLOB), id, type, headers, failures, published_at, crashes, seq FROM messages
WHERE source = :source AND consumer IS NULL AND {} LIMIT :limit
"""
FIND_DUE = FIND.format("due_at > 0 AND due_at <= :now ORDER BY due_at")
FIND_READY = FIND.format("due_at = 0 ORDER BY seq")
FIND_ODD = FIND.format("due_at < 0 ORDER BY due_at")  # only another program writes it
TAKE = "UPDATE messages SET consumer = ? WHERE seq = ?"

# A settlement counts only during the lease: otherwise the last statement changes no row.
ACK = ("DELETE FROM messages WHERE seq = :seq AND consumer = :consumer",)
RETRY = (
    """UPDATE messages SET consumer = NULL, due_at = :due_at, failures = :failures, crashes = 0
    WHERE seq = :seq AND consumer = :consumer""",
)
REQUEUE = (
    "UPDATE messages SET consumer = NULL, crashes = 0 WHERE seq = :seq AND consumer = :consumer",
)
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
# An operator may delete the row of a dead consumer, and so strand its messages.
FIND_STRANDED = """
SELECT DISTINCT consumer FROM messages
WHERE consumer IS NOT NULL AND consumer NOT IN (SELECT id FROM consumers)
"""
RECLAIM = ("UPDATE messages SET crashes = crashes + 1 WHERE consumer = :consumer", *LEAVE)

COUNTS = """
SELECT
    (SELECT count(*) FROM messages WHERE source = :source AND consumer IS NULL AND due_at <= :now),
    (SELECT count(*) FROM messages WHERE source = :source AND consumer IS NULL AND due_at > :now),
    (SELECT count(*) FROM messages WHERE source = :source AND consumer IS NOT NULL),
    (SELECT count(*) FROM dead_letters WHERE source = :source),
    (SELECT count(*) FROM consumers WHERE source = :source AND expires_at > :now)
"""
COUNTED = ("", " delayed", " in flight", " dead letters", " consumers")
COUNT_DEAD = "SELECT count(*), max(seq) FROM dead_letters WHERE source = :source"
ABOUT_DEAD = ("reason", "attempts", "dead_lettered_at")
NEXT_DEAD = f"""
SELECT seq, body, id, type, headers, {", ".join(ABOUT_DEAD)} FROM dead_letters
WHERE source = :source AND seq > :after AND seq <= :last ORDER BY seq LIMIT :count
"""  # nosec B608 # constants
PURGE = ("DELETE FROM dead_letters WHERE source = :source AND seq = :seq",)
REPLAY = (
    """INSERT INTO messages (source, id, type, headers, body)
    SELECT source, id, type, headers, body FROM dead_letters WHERE source = :source AND seq = :seq""",
    *PURGE,
)


class Settlement(NamedTuple):
    message: Message
    verb: str
    statements: tuple[str, ...]
    parameters: dict[str, Any]


class SqliteBroker(Broker):
    """One queue in the file that ``CONSUMER_BROKER_URL`` names. Headers must be JSON values."""

    capabilities = Capabilities(delayed_publish=True)
    acks_late = True
    dead_letters_at_once = 500
    destinations: ClassVar = {"source": "source:NAME"}

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        self._name = settings.source
        self._origin = {"source": settings.source}
        self._file, self._lease_seconds = _parse(settings.broker_url.get_secret_value())
        self._file_identity: tuple[int, int] | None = None
        self._thread: ThreadPoolExecutor | None = None  # the only user of the connection
        self._connection: sqlite3.Connection | None = None
        # Reads in the event loop: a request to the thread would double the CPU time of an idle consumer.
        self._watch: sqlite3.Connection | None = None
        self.connectivity = Connectivity(str(self._file))
        self._consumer = 0  # our row in the table of consumers; 0 before there is one
        self._renew_at = -math.inf  # time.monotonic(), in seconds
        self._fetcher: asyncio.Task[None] | None = None
        self._fetching = False
        self._closing = False
        self._wake = asyncio.Event()
        self._flushed = asyncio.Event()
        self._settlements: list[Settlement] = []

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        try:
            await self._call(self._open, False)
        except BaseException:
            self._end_thread()
            raise
        self.connectivity.established()
        return self

    async def declare(self) -> None:
        await self._call(self._open, True)

    async def __aexit__(self, *exc_info: object) -> None:
        self._fetching = False
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
                reason = str(error) or f"{self._file} does not answer"
                log_settlement_lost(settlement.message, settlement.verb, reason)
        finally:
            self.connectivity.up = False
            self._settlements.clear()
            self.unacked.clear()
            if self._fetcher is not None:
                self._fetcher.cancel()
            self._end_thread()

    def _open(self, declaring: bool) -> None:
        """Without ``declaring``, a file that does not exist or is empty stays so, and is not opened."""
        _check_rights(self._file)
        if not (declaring or os.access(self._file, os.F_OK)):
            return
        if not self._file.parent.is_dir():
            raise BrokerRefused(f"the directory of {self._file} {MISSING}")
        try:
            if (connection := self._connection) is None:
                connection = sqlite3.connect(self._file, timeout=LOCK_SECONDS, isolation_level=None)
                self._connection = connection
                connection.text_factory = bytes  # other programs' text may be invalid UTF-8
                connection.execute("PRAGMA synchronous = FULL")  # for each connection
                self._watch = sqlite3.connect(self._file, timeout=0, check_same_thread=False)
                self._file_identity = _identity(self._file)
            exists = self._find_tables(connection)
            if declaring:
                self._create_tables(connection)
            elif not exists:
                self._close()
        except BaseException:
            self._close()
            raise

    def _find_tables(self, connection: sqlite3.Connection) -> bool:
        connection.execute("BEGIN")  # one snapshot: another process may be creating the tables
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (table_count,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        connection.execute("COMMIT")
        if application_id != APPLICATION_ID and (application_id or version or table_count):
            raise BrokerRefused(f"{self._file} is the database of another program")
        if version not in (0, SCHEMA_VERSION):
            msg = f"{self._file} has schema {version}; this version of the service knows {SCHEMA_VERSION}"
            raise BrokerRefused(msg)
        return bool(version)

    def _create_tables(self, connection: sqlite3.Connection) -> None:
        (journal_mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if journal_mode != b"wal":
            msg = f"{self._file} is on a file system that cannot share it between processes"
            raise BrokerRefused(msg)
        # Also when the tables exist: a read-only or locked file is reported now, not at the first message.
        connection.executescript(SCHEMA)

    def _close(self) -> None:
        for connection in (self._watch, self._connection):
            if connection is not None:
                connection.close()
        self._watch = self._connection = None

    def _end_thread(self) -> None:
        """Close after the thread's last job, without waiting for it."""
        if self._thread is not None:
            self._thread.submit(self._close)
            self._thread.shutdown(wait=False)
            self._thread = None

    # -- consuming

    async def start(self) -> None:
        self._fetching = True
        self._fetcher = asyncio.create_task(self._fetch(), name=f"fetcher of {self._name}")

    async def _stop_fetching(self) -> None:
        self._fetching = False

    async def flush(self) -> None:
        if self._fetcher is None or self._fetcher.done():
            return
        self._flushed.clear()  # until the transaction in progress has been answered, too
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._flushed.wait()

    async def _fetch(self) -> None:
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

    def _room(self) -> int:
        return super()._room() if self._fetching else 0

    def _has_work(self) -> bool:
        """Whether a transaction is needed. This check takes no lock, and runs 20 times a second."""
        if self._settlements or time.monotonic() >= self._renew_at:
            return True
        if self._room() <= 0:
            return False
        assert self._watch is not None
        what = {"source": self._name, "consumer": self._consumer, "now": time.time()}
        try:
            return bool(self._watch.execute(ANYTHING_TO_DO, what).fetchone()[0])
        except sqlite3.Error:
            return True  # the transaction raises the error again

    async def _exchange_once(self) -> None:
        settlements = self._settlements.copy()
        consumer, lost, rows = await self._call(self._exchange, settlements, self._room())
        # After the call: during an outage they are kept, and written again.
        del self._settlements[: len(settlements)]
        if consumer != self._consumer:
            # The lease expired, and the messages are redelivered: drop those that no worker took.
            self._consumer = consumer
            for message in [*self._take_back(), *self.unacked]:
                self._release(message)
        for settlement in lost:
            log_settlement_lost(settlement.message, settlement.verb, "its lease had expired")
        messages = []
        for body, id, type, text, failures, at, crashes, seq in rows:
            message = make_message(
                body,
                id=id,
                type=type,
                headers=json_object(text) if text else {},
                failures=failures,
                published_at=at,
                receipt={"seq": seq, "consumer": consumer},  # the row and the consumer that got it
                origin=self._origin,
            )
            message.deliveries += count_of(crashes) if crashes else 0
            messages.append(message)
        await self._deliver_fetched(messages)

    def _exchange(
        self, settlements: list[Settlement], room: int
    ) -> tuple[int, list[Settlement], list[Any]]:
        now = time.time()
        consumer = self._consumer
        renewing = time.monotonic() >= self._renew_at
        if renewing and _identity(self._file) != self._file_identity:
            raise BrokerRefused(f"{self._file} was deleted or replaced")
        with self._transaction() as connection:
            lost = _settle(connection, settlements)
            if not renewing:
                # Another consumer with a fast clock may have removed this consumer's row; messages that were taken with
                # the number of no row would stay unacked forever.
                (alive,) = connection.execute(IS_ALIVE, (consumer,)).fetchone()
                renewing = not alive
            if renewing:
                consumer = self._renew(connection, now + self._lease_seconds)
            dead_consumers = connection.execute(FIND_EXPIRED, (now, consumer)).fetchall()
            if renewing:
                dead_consumers += connection.execute(FIND_STRANDED).fetchall()
            for (dead,) in dead_consumers:
                _execute(connection, RECLAIM, {"consumer": dead})
            rows: list[Any] = []
            # A delayed message is older than a ready one.
            for find in (FIND_DUE, FIND_READY, FIND_ODD):
                what = {"source": self._name, "now": now, "limit": max(0, room - len(rows))}
                rows += connection.execute(find, what).fetchall()
            connection.executemany(TAKE, [(consumer, row[-1]) for row in rows])
        if renewing:
            self._renew_at = time.monotonic() + self._lease_seconds / 3
        return consumer, lost, rows

    def _renew(self, connection: sqlite3.Connection, expires_at: float) -> int:
        """Returns this consumer's number: a new one at the start, and after its lease expired."""
        if connection.execute(RENEW, (expires_at, self._consumer)).rowcount:
            return self._consumer
        return connection.execute(REGISTER, (expires_at, self._name)).lastrowid or 0

    def _leave(self, settlements: list[Settlement]) -> None:
        with self._transaction() as connection:
            _settle(connection, settlements)
            _execute(connection, LEAVE, {"consumer": self._consumer})

    # -- settling

    async def _ack(self, message: Message) -> None:
        self._settle(message, "ack", ACK)

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        due_at = time.time() + delay_seconds
        self._settle(message, "retry", RETRY, due_at=due_at, failures=message.attempt)

    async def _reject(self, message: Message, reason: str) -> None:
        self._settle(message, "reject", REJECT, reason=text_of(reason), now=time.time())

    async def _requeue(self, message: Message) -> None:
        self._settle(message, "requeue", REQUEUE)

    def _settle(
        self, message: Message, verb: str, statements: tuple[str, ...], **parameters: Any
    ) -> None:
        parameters |= message.receipt
        self._settlements.append(Settlement(message, verb, statements, parameters))
        self._flushed.clear()
        self._wake.set()

    # -- publishing, queue metrics, dead letters

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        await self._call(self._write, (PUBLISH,), *[self._row(message) for message in messages])
        self._wake.set()

    async def publish_and_ack(self, message: Message, outgoing: Sequence[OutgoingMessage]) -> None:
        rows = {
            f"{name}{place}": value
            for place, one in enumerate(outgoing)
            for name, value in self._row(one).items()
        }
        statements = [PUBLISH_TOO.format(place) for place in range(len(outgoing))]
        self.buffer.settled(message)
        if self._holds(message, "ack"):
            self._release(message)
            self._settle(message, "ack", (*statements, *ACK), **rows)

    def _row(self, message: OutgoingMessage) -> dict[str, Any]:
        """Raises BrokerRefused for headers that are not JSON."""
        headers = headers_of(message)
        _, source = self.destination_of(message)
        try:  # here: a value that SQLite cannot store would end the transaction with all settlements
            for text in (source, message.id, message.type):
                text.encode()
            packed = json.dumps(headers) if headers else ""
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise BrokerRefused(f"this message cannot be sent: {error}") from error
        delay = min(max(0.0, message.delay_seconds), LONGEST_DELAY_SECONDS)
        return {
            "source": source,
            "id": message.id,
            "type": message.type,
            "headers": packed,
            "body": message.body,
            "due_at": time.time() + delay if delay else 0,
        }

    async def describe(self) -> dict[str, int | str]:
        counts = await self._read(COUNTS, now=time.time())
        if counts is None:
            return {"file": str(self._file), self._name: MISSING}
        names = [f"{self._name}{kind}" for kind in COUNTED]
        return {"file": str(self._file), **dict(zip(names, counts, strict=True))}

    async def _present_letters(self, reading: Any) -> AsyncGenerator[DeadLetter, None]:
        found = await self._read(COUNT_DEAD)
        after, last, page = 0, found and found[1], Page()
        while last and (
            rows := await self._read_all(NEXT_DEAD, after=after, last=last, count=page.count)
        ):
            for after, body, id, type, text, *about in rows:
                page.saw(len(body) if isinstance(body, bytes | str) else 0)
                headers = json_object(text) if text else {}
                message = make_message(body, id=id, type=type, headers=headers)
                yield make_dead_letter(message, after, **dict(zip(ABOUT_DEAD, about, strict=True)))
            page.turn()

    async def _take_letters(
        self, reading: Any, letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        rows = [{"source": self._name, "seq": letter.receipt} for letter in letters]
        yield await self._call(self._write, REPLAY if replay else PURGE, *rows)

    async def count_dead_letters(self) -> int:
        found = await self._read(COUNT_DEAD)
        return int(found[0]) if found else 0

    async def _read(self, query: str, **parameters: Any) -> Any:
        """The first row; None if there is no row or no file."""
        return next(iter(await self._read_all(query, **parameters)), None)

    async def _read_all(self, query: str, **parameters: Any) -> list[Any]:
        return await self._call(self._query, query, {"source": self._name, **parameters})

    def _query(self, query: str, parameters: dict[str, Any]) -> list[Any]:
        return self._connection.execute(query, parameters).fetchall() if self._connection else []

    def _write(self, statements: tuple[str, ...], *rows: dict[str, Any]) -> int:
        with self._transaction() as connection:
            return sum([_execute(connection, statements, parameters) for parameters in rows])

    # -- the database's thread

    async def _call(self, job: Callable[..., T], *arguments: Any) -> T:
        """Run the job on the database's thread. Raises BrokerUnavailable or BrokerRefused."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + PATIENCE_SECONDS
        while True:
            if self._thread is None:
                raise BrokerUnavailable(f"{self._file} is not open")
            try:
                return await loop.run_in_executor(self._thread, job, *arguments)
            except sqlite3.Error as error:
                if _code(error) not in _LOCKED or loop.time() >= give_up_at:
                    raise _explain(error, self._file) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if (connection := self._connection) is None:
            raise BrokerRefused(f"{self._file} {MISSING}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> SqliteBroker:
    """Raises BrokerRefused if the URL names no file."""
    return SqliteBroker(settings, prefetch)


def _parse(text: str) -> tuple[Path, float]:
    """The file, and the lease in seconds. Raises BrokerRefused."""
    url = BrokerUrl(text, like="sqlite:///relative.db", options=["lease_seconds"])
    if url.path in ("", ":memory:") or url.hosts:  # sqlite://orders.db
        msg = "CONSUMER_BROKER_URL names no file: write sqlite:///relative.db or sqlite:////absolute.db"
        raise BrokerRefused(msg)
    return Path(url.path).absolute(), url.number("lease_seconds", LEASE_SECONDS, at_least=0.01)


def _check_rights(file: Path) -> None:
    """Check before SQLite opens the file: a reader without write access leaves files that keep the owner out."""
    for path in (file, Path(f"{file}-wal"), Path(f"{file}-shm")):
        effective = os.access in os.supports_effective_ids
        with suppress(FileNotFoundError):
            owner = path.stat().st_uid
            if not os.access(path, os.W_OK, effective_ids=effective) and path.exists():
                raise BrokerDenied(f"{path} is read-only for this user: user {owner} owns it")


def _identity(file: Path) -> tuple[int, int] | None:
    """Device and inode of the file; None if it does not exist."""
    with suppress(FileNotFoundError):
        status = file.stat()
        return status.st_dev, status.st_ino
    return None


def _settle(connection: sqlite3.Connection, settlements: list[Settlement]) -> list[Settlement]:
    """Returns the settlements that came too late."""
    return [s for s in settlements if not _execute(connection, s.statements, s.parameters)]


def _execute(
    connection: sqlite3.Connection, statements: tuple[str, ...], parameters: dict[str, Any]
) -> int:
    """Returns how many rows the last statement changed."""
    changed = 0
    for statement in statements:
        changed = connection.execute(statement, parameters).rowcount
    return changed


# SQLITE_PROTOCOL: many processes began a transaction at the same instant.
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
    sqlite3.SQLITE_CANTOPEN: "cannot be opened or created: this user needs read and write access to it and its directory",
}


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _explain(error: sqlite3.Error, file: Path) -> BrokerError:
    code = _code(error)
    if code in _TRY_AGAIN:
        return BrokerUnavailable(f"{file} {_TRY_AGAIN[code]}")
    return BrokerRefused(f"{file} {_GIVE_UP.get(code, f'cannot be used: {error}')}")
