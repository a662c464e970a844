# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""PostgreSQL 13 or later, by asyncpg: durable queues in three tables of a database you have already.

``postgres://user:password@host:5432/database``, several hosts as ``host-a:5432,host-b:5432``, and the
options of libpq: ``?sslmode=verify-full&sslrootcert=ca.pem&sslcert=me.pem&sslkey=me.key``,
``application_name``, ``target_session_attrs`` (``read-write`` unless it is given), ``service``. PGPASSWORD
and ``~/.pgpass`` are read. What a password may not hold in a URL is percent-encoded. Options of our own:

- ``schema=consumer``: where the tables are. They are made when they are not there, if the user may.
- ``lease_seconds=30``: a consumer is a row with an expiry time, which it renews while it lives, also while
  a handler runs for hours. When it dies, whoever sees the row expired brings its messages back with the same
  ``attempt``. An event loop that is blocked for longer counts as dead.
- ``poll_seconds=5``: how late a message may be when no NOTIFY came for it.
- ``pgbouncer=true``: behind a pooler in transaction mode, where LISTEN and prepared statements do not work.

Anything that can write a row can publish, also in a transaction of its own:
``INSERT INTO consumer.messages (source, type, body) VALUES ('orders', 'order_created', '{"id": "1"}')``,
and ``NOTIFY consumer, 'orders'`` spares it the wait for the poll.

Settlements are gathered and written with the next statement, within milliseconds; a process killed in
between sees those messages again. All times are the database's.
"""

import asyncio
import json
import math
import os
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

import asyncpg

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

LEASE_SECONDS = 30.0
POLL_SECONDS = 5.0
CONNECT_SECONDS = 10.0
"""For all hosts together."""
ANSWER_SECONDS = 10.0
STOP_SECONDS = 1.5
CLOSE_SECONDS = 2.0
LONGEST_DELAY_SECONDS = 3e9
"""A century; what is much longer would not fit into a timestamp."""
CRASH_LIMIT = 100
"""When so many consumers died with a message in hand, the message is taken for the cause."""
STEP = 500
"""Rows per statement in long work, so that other processes get their turn."""
STEP_BYTES = 4_000_000

LABEL = "cookiecutter-consumer queue, schema "
SCHEMA_VERSION = 1
# The partial indexes hold only what they are for, so taking a message costs the same however many others
# wait for their time or are in hand. The price: taking is no HOT update. Vacuum comes early, as each message
# leaves two dead rows; a transaction that stays open for hours elsewhere keeps them all, here as anywhere.
SCHEMA = f"""
CREATE TABLE {{schema}}.consumers (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- never used again: an old lease fits no new consumer
    source text NOT NULL,
    expires_at timestamptz NOT NULL -- in no index: renewing is a HOT update
) WITH (fillfactor = 50);
CREATE TABLE {{schema}}.messages (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- the order of publishing
    source text NOT NULL,
    consumer bigint, -- in whose hand it is; NULL while it waits
    due_at timestamptz NOT NULL DEFAULT '-infinity', -- that is: at once, whatever the clock says
    failures integer NOT NULL DEFAULT 0,
    crashes integer NOT NULL DEFAULT 0,
    id text NOT NULL DEFAULT gen_random_uuid(),
    type text NOT NULL DEFAULT '',
    headers json NOT NULL DEFAULT '{{}}' CHECK (json_typeof(headers) = 'object'), -- jsonb holds no \\u0000
    body bytea NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
CREATE INDEX messages_waiting ON {{schema}}.messages (source, due_at, seq) WHERE consumer IS NULL;
CREATE INDEX messages_in_hand ON {{schema}}.messages (consumer) WHERE consumer IS NOT NULL;
CREATE TABLE {{schema}}.dead_letters (
    seq bigint GENERATED ALWAYS AS IDENTITY,
    source text NOT NULL,
    reason text NOT NULL,
    attempts integer NOT NULL,
    dead_lettered_at timestamptz NOT NULL DEFAULT now(),
    id text NOT NULL,
    type text NOT NULL,
    headers json NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (source, seq)
);
COMMENT ON TABLE {{schema}}.messages IS '{LABEL}{SCHEMA_VERSION}';
"""
MAKE_SCHEMA = "CREATE SCHEMA IF NOT EXISTS {schema}"
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('cookiecutter-consumer', 0))"
# From the catalog's tables: to_regclass() may remember, under the lock, that there was nothing.
LOOK = """
SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1),
    (SELECT coalesce(obj_description(c.oid, 'pg_class'), '')
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
    WHERE nspname = $1 AND relname = 'messages')
"""

PUBLISH = """
WITH published AS (
    INSERT INTO {schema}.messages (source, id, type, headers, body)
    SELECT $1, * FROM unnest($3::text[], $4::text[], $5::json[], $6::bytea[])
)
SELECT pg_notify($2, $1)
"""

# The one statement of a busy consumer: what is acknowledged goes, and what is ready comes. Our own row is
# locked meanwhile, so that nobody can take us for dead, and bring our messages back, before it is done.
EXCHANGE = """
WITH me AS MATERIALIZED (
    SELECT id FROM {schema}.consumers WHERE id = $2 FOR KEY SHARE
), acked AS (
    DELETE FROM {schema}.messages AS m USING unnest($3::bigint[]) AS settled (seq)
    WHERE m.seq = settled.seq AND consumer = $2 RETURNING m.seq
), due AS MATERIALIZED (
    SELECT seq FROM {schema}.messages
    WHERE source = $1 AND consumer IS NULL AND due_at > '-infinity' AND due_at <= now()
        AND EXISTS (SELECT FROM me)
    ORDER BY due_at, seq LIMIT $4 FOR UPDATE SKIP LOCKED
), ready AS MATERIALIZED (
    SELECT seq FROM {schema}.messages
    WHERE source = $1 AND consumer IS NULL AND due_at <= '-infinity' AND EXISTS (SELECT FROM me)
    ORDER BY due_at, seq LIMIT $4 - (SELECT count(*) FROM due) FOR UPDATE SKIP LOCKED
), taken AS (
    UPDATE {schema}.messages SET consumer = $2
    WHERE seq = ANY (ARRAY(SELECT seq FROM due UNION ALL SELECT seq FROM ready))
    RETURNING due_at, seq, body, id, type, headers, failures + 1 AS attempt
)
SELECT about.*, seq, body, id, type, headers, attempt
FROM (SELECT
    EXISTS (SELECT FROM me) AS alive,
    ARRAY(SELECT unnest($3::bigint[]) EXCEPT SELECT seq FROM acked) AS lost,
    (SELECT extract(epoch FROM due_at - now())::float8 FROM {schema}.messages
        WHERE source = $1 AND consumer IS NULL
            AND due_at > '-infinity' AND due_at > now() AND due_at < 'infinity'
        ORDER BY due_at LIMIT 1) AS next_due_seconds
) AS about LEFT JOIN taken ON true
ORDER BY due_at = '-infinity', due_at, seq -- what had to wait for its time is the older
"""

# The other settlements give the rows that they changed: those whose lease had not expired.
RETRY = """
WITH retried AS (
    UPDATE {schema}.messages AS m
    SET consumer = NULL, failures = failures + 1, due_at = now() + make_interval(secs => delay)
    FROM unnest($2::bigint[], $3::float8[], $4::integer[]) AS settled (seq, delay, attempt)
    WHERE m.seq = settled.seq AND consumer = $1 AND failures + 1 = attempt RETURNING m.seq
)
SELECT seq, pg_notify($5, $6) FROM retried
"""
REJECT = """
WITH dead AS (
    DELETE FROM {schema}.messages AS m
    USING unnest($2::bigint[], $3::text[]) WITH ORDINALITY AS settled (seq, reason, place)
    WHERE m.seq = settled.seq AND consumer = $1 RETURNING m.*, reason, place
), buried AS (
    INSERT INTO {schema}.dead_letters (source, reason, attempts, id, type, headers, body)
    SELECT source, reason, failures + 1, id, type, headers, body FROM dead ORDER BY place
)
SELECT seq FROM dead
"""
REQUEUE = """
WITH returned AS (
    UPDATE {schema}.messages SET consumer = NULL
    WHERE seq = ANY ($2::bigint[]) AND consumer = $1 RETURNING seq
)
SELECT seq, pg_notify($3, $4) FROM returned
"""

REGISTER = """
INSERT INTO {schema}.consumers (source, expires_at) VALUES ($1, now() + make_interval(secs => $2))
RETURNING id
"""
RENEW = """
WITH renewed AS (
    UPDATE {schema}.consumers SET expires_at = now() + make_interval(secs => $2) WHERE id = $1 RETURNING id
)
SELECT EXISTS (SELECT FROM renewed),
    ARRAY(SELECT id FROM {schema}.consumers WHERE source = $3 AND expires_at <= now() AND id <> $1)
"""
# What was taken by a statement whose answer never came, because the connection was lost.
GIVE_BACK_UNKNOWN = """
UPDATE {schema}.messages SET consumer = NULL WHERE consumer = $1 AND seq <> ALL ($2::bigint[])
"""
LEAVE = """
WITH returned AS (
    UPDATE {schema}.messages SET consumer = NULL WHERE consumer = $1
), gone AS (
    DELETE FROM {schema}.consumers WHERE id = $1 RETURNING source
)
SELECT pg_notify($2, source) FROM gone
"""
# Two statements: the second sees all that the dead had taken before the first had locked them.
LOCK_DEAD = """
SELECT id FROM {schema}.consumers WHERE id = ANY ($1::bigint[]) AND expires_at <= now()
FOR UPDATE SKIP LOCKED
"""
BRING_BACK = f"""
WITH doomed AS (
    DELETE FROM {{schema}}.messages WHERE consumer = ANY ($1::bigint[]) AND crashes + 1 >= {CRASH_LIMIT}
    RETURNING *
), buried AS (
    INSERT INTO {{schema}}.dead_letters (source, reason, attempts, id, type, headers, body)
    SELECT source, '{CRASH_LIMIT} consumers died with it in hand', failures, id, type, headers, body
    FROM doomed
), returned AS (
    UPDATE {{schema}}.messages SET consumer = NULL, crashes = crashes + 1
    WHERE consumer = ANY ($1::bigint[]) AND crashes + 1 < {CRASH_LIMIT}
), gone AS (
    DELETE FROM {{schema}}.consumers WHERE id = ANY ($1::bigint[]) RETURNING source
)
SELECT pg_notify($2, source) FROM gone
"""

COUNTS = """
SELECT
    (SELECT count(*) FROM {schema}.messages WHERE source = $1 AND consumer IS NULL AND due_at <= now()),
    (SELECT count(*) FROM {schema}.messages WHERE source = $1 AND consumer IS NULL AND due_at > now()),
    (SELECT count(*) FROM {schema}.messages WHERE source = $1 AND consumer IS NOT NULL),
    (SELECT count(*) FROM {schema}.dead_letters WHERE source = $1),
    (SELECT count(*) FROM {schema}.consumers WHERE source = $1 AND expires_at > now())
"""
COUNT_DEAD = "SELECT count(*), coalesce(max(seq), 0) FROM {schema}.dead_letters WHERE source = $1"
NEXT_DEAD = """
SELECT seq, body, id, type, reason, attempts, extract(epoch FROM dead_lettered_at)::float8
FROM {schema}.dead_letters WHERE source = $1 AND seq > $2 ORDER BY seq LIMIT 1
"""
TAKE_DEAD = f"""
DELETE FROM {{schema}}.dead_letters WHERE source = $1 AND seq = ANY (ARRAY(
    SELECT seq FROM {{schema}}.dead_letters WHERE source = $1 AND seq <= $2 ORDER BY seq LIMIT {STEP}
    FOR UPDATE SKIP LOCKED
)) RETURNING *
"""
PURGE = f"WITH dead AS ({TAKE_DEAD}) SELECT count(*) FROM dead"
REPLAY = f"""
WITH dead AS ({TAKE_DEAD}), replayed AS (
    INSERT INTO {{schema}}.messages (source, id, type, headers, body)
    SELECT source, id, type, headers, body FROM dead ORDER BY seq
)
SELECT count(*), pg_notify($3, $1) FROM dead
"""

SESSION = {
    # Plans live as long as the connection: one made while a table was empty must not read a million rows.
    "enable_seqscan": "off",
    "jit": "off",
    "default_transaction_isolation": "read committed",
}
CLIENT_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)
OUTAGES = ("08", "25006", "40", "53", "55P03", "57", "58")
"""What SQLSTATEs begin with when it is worth trying again: a lost or full server, a failover, a lock."""

Connection = Any  # asyncpg.Connection: the package says nothing of its types


class Options(NamedTuple):
    """What the URL says: where to connect, and how this queue is kept."""

    broker: str
    """The address for people, without credentials."""
    urls: list[str]
    """One for each host, with what asyncpg understands."""
    schema: str
    """As an SQL identifier, in quotes."""
    channel: str
    lease_seconds: float
    poll_seconds: float
    pgbouncer: bool


class Settlements:
    """What is settled and not written yet."""

    def __init__(self) -> None:
        self.acked: list[Message] = []
        self.returned: list[Message] = []
        self.retried: list[tuple[Message, float]] = []
        self.rejected: list[tuple[Message, str]] = []

    def __iter__(self) -> Iterator[Message]:
        yield from self.acked
        yield from self.returned
        yield from (message for message, _ in self.retried)
        yield from (message for message, _ in self.rejected)

    def __bool__(self) -> bool:
        return bool(self.acked or self.returned or self.retried or self.rejected)

    def come_first(self, later: "Settlements") -> None:
        """These could not be written: they are the first of the next."""
        later.acked[:0] = self.acked
        later.returned[:0] = self.returned
        later.retried[:0] = self.retried
        later.rejected[:0] = self.rejected


class PostgresSource(Source):
    """One queue in the tables that ``CONSUMER_BROKER_URL`` leads to. Headers must be JSON values."""

    capabilities = Capabilities(
        delayed_retry=True, attempts=True, requeue=True, dead_letters=True, order=True
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL makes no sense."""
        super().__init__(settings, prefetch)
        self._name = settings.source
        self._options = _parse(settings.broker_url.get_secret_value(), self._name)
        self.connectivity = Connectivity(self._options.broker)
        self._connection: Connection = None
        self._lock = asyncio.Lock()  # a connection does one thing at a time
        self._entered = False
        self._listening_on: Connection = None
        self._consumer = 0  # our row in the table of consumers; no row has the number 0
        self._renew_at = -math.inf  # event loop time, as the next
        self._take_over_at = -math.inf
        self._in_doubt = False  # whether what was sent last has been done
        self._fetcher: asyncio.Task[None] | None = None
        self._taking = False
        self._closing = asyncio.Event()
        self._wake = asyncio.Event()
        self._flushed = asyncio.Event()
        self._unacked: set[Message] = set()
        self._settlements = Settlements()

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        async with self._request():
            self._entered = True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._taking = self._entered = False
        self._closing.set()
        self._wake.set()
        reason: object = "the connection was lost"
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._fetcher is not None:
                    await asyncio.wait({self._fetcher})
                if self._consumer:  # also in an outage, which may be over by now
                    async with self._request() as connection:
                        await self._exchange(connection)
                        await self._fetch(connection, LEAVE, self._consumer, self._options.channel)
                if self._connection is not None:
                    await self._connection.close()
        except TimeoutError:
            reason = f"{self._options.broker} gave no answer within {CLOSE_SECONDS:g} seconds"
        except (BrokerError, *CLIENT_ERRORS) as error:
            reason = error
        finally:
            await self._end(reason)

    async def _end(self, reason: object) -> None:
        """Leave nothing open, and say what was lost."""
        self.connectivity.up = False
        if self._connection is not None:
            self._connection.terminate()
        if self._fetcher is not None and not self._fetcher.done():
            self._fetcher.cancel()
            await asyncio.wait({self._fetcher}, timeout=0.5)
        self._forget(reason)

    @property
    def connected(self) -> bool:
        return self._entered and self.connectivity.up

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[Connection]:
        """The connection for one request, made anew if it was lost. Bounded; raises only BrokerErrors."""
        async with self._lock:
            if self._connection is None or self._connection.is_closed():
                await self._connect()
            async with self._asking(self._connection):
                if self._options.pgbouncer:
                    async with self._connection.transaction():
                        yield self._connection
                else:
                    yield self._connection

    @asynccontextmanager
    async def _asking(self, connection: Connection) -> AsyncIterator[None]:
        """Bounds a request, and makes whatever goes wrong a BrokerError.

        A silent server is cut off: cancelled, asyncpg would start a task that tells the server so.
        """
        loop = asyncio.get_running_loop()
        cutting_off = loop.call_later(ANSWER_SECONDS, connection.terminate)
        try:
            yield
        except asyncio.CancelledError:
            connection.terminate()
            await asyncio.sleep(0)  # for that task to end
            raise
        except CLIENT_ERRORS as error:
            if loop.time() >= cutting_off.when():
                msg = f"{self._options.broker} gave no answer within {ANSWER_SECONDS:g} seconds"
                raise BrokerUnavailable(msg) from error
            connection.terminate()
            raise _explain(error, self._options.broker) from error
        finally:
            cutting_off.cancel()

    async def _connect(self) -> None:
        connection = await self._open()
        try:
            async with self._asking(connection):
                await self._prepare(connection)
        except BaseException:
            connection.terminate()
            raise
        now = asyncio.get_running_loop().time()
        if self._connection is not None:  # after an outage the others too need time to come back
            self._take_over_at = now + self._options.lease_seconds
        self._renew_at = now
        self._connection = connection
        connection.add_termination_listener(self._on_lost)
        self.connectivity.established()

    async def _open(self) -> Connection:
        """Try each host; raises what is wrong with the last."""
        options = self._options
        seconds = CONNECT_SECONDS / len(options.urls)
        outage = BrokerUnavailable(options.broker)
        for url in options.urls:
            try:
                return await self._open_one(url, seconds)
            except TimeoutError:
                outage = BrokerUnavailable(
                    f"{options.broker} gave no answer within {seconds:g} seconds"
                )
            except CLIENT_ERRORS as error:
                explained = _explain(error, options.broker)
                if not isinstance(explained, BrokerUnavailable):
                    raise explained from error
                outage = explained
                outage.__cause__ = error
        raise outage

    async def _open_one(self, url: str, seconds: float) -> Connection:
        cache_size = 0 if self._options.pgbouncer else 100
        opening = asyncio.ensure_future(
            asyncpg.connect(url, timeout=seconds, statement_cache_size=cache_size)
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # Cancelled in its first instants, asyncpg leaves an error that is never retrieved.
            await asyncio.wait({opening}, timeout=0.02)
            opening.cancel()
            await asyncio.wait({opening}, timeout=0.5)
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                opening.result().terminate()
            raise

    async def _prepare(self, connection: Connection) -> None:
        """Find the tables, or make them."""
        broker, version = self._options.broker, connection.get_server_version()
        if version < (13,):
            msg = f"{broker} is PostgreSQL {version.major}; the oldest that will do is 13"
            raise BrokerRefused(msg)
        if connection.get_settings().server_encoding != "UTF8":
            msg = f"{broker}: the encoding of this database is not UTF8"
            raise BrokerRefused(msg)
        if not await self._has_tables(connection):
            async with connection.transaction():
                await connection.execute(LOCK)  # two processes may start at once
                if not await self._has_tables(connection):
                    await self._make_tables(connection)

    async def _has_tables(self, connection: Connection) -> bool:
        schema = self._options.schema
        _, comment = await connection.fetchrow(LOOK, self._options.channel)
        if comment is None:
            return False
        if not comment.startswith(LABEL):
            msg = f"the table {schema}.messages is another program's: choose a place with ?schema="
            raise BrokerRefused(msg)
        if comment != f"{LABEL}{SCHEMA_VERSION}":
            msg = (
                f"the tables in {schema} have version {comment.removeprefix(LABEL)}; "
                f"this version of the service knows {SCHEMA_VERSION}"
            )
            raise BrokerRefused(msg)
        return True

    async def _make_tables(self, connection: Connection) -> None:
        schema = self._options.schema
        schema_is_there, _ = await connection.fetchrow(LOOK, self._options.channel)
        try:
            if not schema_is_there:
                await connection.execute(_sql(MAKE_SCHEMA, schema))
            await connection.execute(_sql(SCHEMA, schema))
        except asyncpg.InsufficientPrivilegeError as error:
            msg = f"the tables are not in {schema}, and this user may not make them: {error}"
            raise BrokerRefused(msg) from error
        except asyncpg.DuplicateTableError as error:
            msg = f"{error}, and it is another program's: choose a place with ?schema="
            raise BrokerRefused(msg) from error

    async def _fetch(self, connection: Connection, statement: str, *arguments: object) -> list[Any]:
        rows: list[Any] = await connection.fetch(_sql(statement, self._options.schema), *arguments)
        return rows

    async def _ask(self, statement: str, *arguments: object) -> Any:
        """The first row, or None."""
        async with self._request() as connection:
            rows = await self._fetch(connection, statement, self._name, *arguments)
        return rows[0] if rows else None

    def _on_lost(self, connection: Connection) -> None:
        if connection is not self._connection:
            return
        self._in_doubt = True
        if self._entered:
            self.connectivity.lost("the connection was lost")
            self._wake.set()

    # -- consuming

    async def start(self) -> None:
        self._taking = True
        self._fetcher = asyncio.create_task(self._fill(), name=f"fetcher of {self._name}")

    async def stop(self) -> None:
        self._taking = False
        for message in self.buffer.take_all():
            await self.requeue(message)
        self.buffer.close()
        if self._fetcher is None or self._fetcher.done() or not self.connectivity.up:
            return
        self._flushed.clear()  # until the statement that may be under way has been answered too
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._flushed.wait()

    async def _fill(self) -> None:
        """Write settlements and take messages until closed, also after outages."""
        try:
            await self.connectivity.keep(self._exchange_until_closed, until=self._closing)
        except Exception as failure:
            self.connectivity.up = False
            self.buffer.fail(failure)
        finally:
            self._flushed.set()

    async def _exchange_until_closed(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing.is_set():
            self._wake.clear()
            async with self._request() as connection:
                if loop.time() >= self._renew_at:
                    await self._renew(connection)
                next_due_seconds = await self._exchange(connection)
            if not self._settlements:
                self._flushed.set()
            renew_seconds = self._renew_at - loop.time()
            pause = min(next_due_seconds, self._options.poll_seconds, renew_seconds)
            timer = loop.call_later(max(0, pause), self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()

    async def _renew(self, connection: Connection) -> None:
        """Say that we are alive, which at first makes us a consumer, and bring back what the dead had."""
        lease_seconds = self._options.lease_seconds
        if connection is not self._listening_on and not self._options.pgbouncer:
            await connection.add_listener(self._options.channel, self._on_notification)
            self._listening_on = connection
        now = asyncio.get_running_loop().time()
        [(alive, expired)] = await self._fetch(
            connection, RENEW, self._consumer, lease_seconds, self._name
        )
        if not alive:
            self._forget("its lease had expired")
            [(self._consumer,)] = await self._fetch(connection, REGISTER, self._name, lease_seconds)
        if expired and now >= self._take_over_at:
            async with connection.transaction():
                dead = [id for (id,) in await self._fetch(connection, LOCK_DEAD, expired)]
                await self._fetch(connection, BRING_BACK, dead, self._options.channel)
        self._renew_at = now + lease_seconds / 3

    def _forget(self, reason: object) -> None:
        """What we had is, or will be, in other hands: drop what nobody started."""
        self.buffer.take_all()
        self._unacked.clear()
        for message in self._settlements:
            log_settlement_lost(message, reason)
        self._settlements = Settlements()

    def _on_notification(self, connection: Connection, pid: int, _channel: str, name: str) -> None:
        # It was read before the connection ended, perhaps: one that is closed has no pid.
        ours = name == self._name and not connection.is_closed()
        if ours and pid != connection.get_server_pid():
            self._on_ready()

    def _on_ready(self) -> None:
        if self._room:
            self._wake.set()

    @property
    def _room(self) -> int:
        return self.prefetch - len(self._unacked) if self._taking else 0

    async def _exchange(self, connection: Connection) -> float:
        """Write settlements and take messages; returns in how many seconds a delayed retry is due."""
        settlements, self._settlements = self._settlements, Settlements()
        limit = min(self._room, STEP)
        acked = [message.receipt for message in settlements.acked]
        try:
            lost = await self._settle_others(connection, settlements)
            rows = await self._fetch(connection, EXCHANGE, self._name, self._consumer, acked, limit)
        except BaseException:
            settlements.come_first(self._settlements)
            raise
        alive, unknown, next_due_seconds, *_ = rows[0]
        if not alive:
            self._renew_at = -math.inf
            next_due_seconds = 0
        lost.update(unknown)
        for message in settlements if lost else ():
            if message.receipt in lost and not self._in_doubt:  # else it was written the first time
                log_settlement_lost(message, "its lease had expired")
        for _, _, _, seq, body, id, type, headers, attempt in rows if rows[0]["seq"] else ():
            message = Message(
                body, id, type, {} if headers == "{}" else headers_from(headers), attempt, seq
            )
            self._unacked.add(message)
            if self._taking:
                self.buffer.put(message)
            else:
                await self.requeue(message)
        if self._in_doubt:
            ours = [message.receipt for message in (*self._unacked, *self._settlements)]
            await self._fetch(connection, GIVE_BACK_UNKNOWN, self._consumer, ours)
            self._in_doubt = False
            next_due_seconds = 0
        if len(rows) == STEP and self._room:
            return 0
        return math.inf if next_due_seconds is None else next_due_seconds

    async def _settle_others(self, connection: Connection, settlements: Settlements) -> set[int]:
        """Write all but the acks; returns which rows were not ours any more."""
        lost: set[int] = set()

        async def write(statement: str, settled: list[Message], *arguments: object) -> None:
            if settled:
                seqs = [message.receipt for message in settled]
                rows = await self._fetch(connection, statement, self._consumer, seqs, *arguments)
                lost.update(set(seqs) - {row[0] for row in rows})

        queue = (self._options.channel, self._name)
        retried = [message for message, _ in settlements.retried]
        delays = [delay for _, delay in settlements.retried]
        await write(RETRY, retried, delays, [message.attempt for message in retried], *queue)
        rejected = [message for message, _ in settlements.rejected]
        await write(REJECT, rejected, [reason for _, reason in settlements.rejected])
        await write(REQUEUE, settlements.returned, *queue)
        return lost

    # -- settling

    async def ack(self, message: Message) -> None:
        if self._is_in_flight(message):
            self._settlements.acked.append(message)

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        if self._is_in_flight(message):
            delay_seconds = min(max(0.0, delay_seconds), LONGEST_DELAY_SECONDS)
            self._settlements.retried.append((message, delay_seconds))

    async def reject(self, message: Message, reason: str) -> None:
        if self._is_in_flight(message):
            reason = reason.replace("\0", "\ufffd").encode(errors="replace").decode()
            self._settlements.rejected.append((message, reason))

    async def requeue(self, message: Message) -> None:
        if self._is_in_flight(message):
            self._settlements.returned.append(message)
            self.requeued_count += 1

    def _is_in_flight(self, message: Message) -> bool:
        """Whether it can be settled, which is then under way."""
        try:
            self._unacked.remove(message)
        except KeyError:
            log_settlement_lost(message, "it was settled before, or its lease had expired")
            return False
        self._wake.set()
        return True

    # -- publishing, counting, dead letters

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        step: list[tuple[str, str, str, bytes]] = []
        size = 0
        for message in messages:
            step.append(_row(message))
            size += len(message.body)
            if len(step) == STEP or size >= STEP_BYTES:
                await self._publish(step)
                step, size = [], 0
        if step:
            await self._publish(step)

    async def _publish(self, rows: list[tuple[str, str, str, bytes]]) -> None:
        await self._ask(PUBLISH, self._options.channel, *map(list, zip(*rows, strict=True)))
        self._on_ready()

    async def describe(self) -> dict[str, int | str]:
        ready, delayed, in_flight, dead, consumers = await self._ask(COUNTS)
        version = self._connection.get_server_version()
        return {
            "server": f"PostgreSQL {version.major}.{version.minor}",
            "schema": self._options.channel,
            self._name: ready,
            f"{self._name} delayed": delayed,
            f"{self._name} in hand": in_flight,
            f"{self._name} dead letters": dead,
            f"{self._name} consumers": consumers,
        }

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        after = 0
        for _ in range(limit):
            row = await self._ask(NEXT_DEAD, after)
            if row is None:
                return
            after, *letter = row
            yield DeadLetter(*letter)

    async def count_dead_letters(self) -> int:
        count, _ = await self._ask(COUNT_DEAD)
        return int(count)

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        async for moved in self._in_steps(REPLAY, self._options.channel):
            self._on_ready()
            yield moved

    def purge_dead_letters(self) -> AsyncIterator[int]:
        return self._in_steps(PURGE)

    async def _in_steps(self, statement: str, *arguments: object) -> AsyncIterator[int]:
        """Work through the dead letters that are there now; yields how many are done."""
        done = 0
        _, last = await self._ask(COUNT_DEAD)
        while changed := (await self._ask(statement, last, *arguments))[0]:
            done += changed
            yield done


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> PostgresSource:
    """Raises BrokerRefused if the URL makes no sense."""
    return PostgresSource(settings, prefetch)


@cache
def _sql(statement: str, schema: str) -> str:
    return statement.replace("{schema}", schema)


def _quote(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _parse(url: str, source: str) -> Options:
    parts = _split(url)
    try:
        strict = bool(parts.query)
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=strict))
        schema = query.pop("schema", "consumer")
        lease_seconds = float(query.pop("lease_seconds", LEASE_SECONDS))
        poll_seconds = float(query.pop("poll_seconds", POLL_SECONDS))
        pgbouncer = {"true": True, "false": False}[query.pop("pgbouncer", "false")]
    except (ValueError, KeyError):
        schema, lease_seconds, poll_seconds, pgbouncer = "", 0, 0, False
    if not (schema and 0 < lease_seconds < math.inf and 0 < poll_seconds < math.inf):
        msg = (
            "CONSUMER_BROKER_URL: the options are those of libpq, ?schema=, ?pgbouncer=true, and "
            "?lease_seconds= and ?poll_seconds=, each a number above 0"
        )
        raise BrokerRefused(msg)
    for option in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        if option in query and not Path(query[option]).is_file():
            msg = f"CONSUMER_BROKER_URL: there is no file for {option}: {query[option]}"
            raise BrokerRefused(msg)
    query.setdefault("target_session_attrs", os.environ.get("PGTARGETSESSIONATTRS", "read-write"))
    query.setdefault("application_name", source)
    if not pgbouncer:
        query |= SESSION
    auth, at, hosts = parts.netloc.rpartition("@")
    # One URL for each host: asyncpg would wait all of its time for the first that says nothing.
    urls = [
        parts._replace(netloc=f"{auth}{at}{host}", query=urlencode(query)).geturl()
        for host in hosts.split(",")
    ]
    broker = f"postgres://{hosts}{parts.path}"
    return Options(broker, urls, _quote(schema), schema, lease_seconds, poll_seconds, pgbouncer)


def _split(url: str) -> SplitResult:
    """Refuses without the parser's error and without the URL: each may hold a part of a password."""
    with suppress(ValueError):
        parts = urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2].split(",")
        ports = [urlsplit(f"//{host}").port for host in hosts]  # ValueError if it is no number
        at_in_its_place = parts.netloc.count("@") <= 1 and "@" not in parts.path + parts.query
        if ports and at_in_its_place and "#" not in url:
            return parts
    msg = (
        "CONSUMER_BROKER_URL: not like postgres://user:password@host:5432/database; in a user name or a "
        "password, characters like @ : / ? # % are percent-encoded"
    )
    raise BrokerRefused(msg)


def _row(message: OutgoingMessage) -> tuple[str, str, str, bytes]:
    """What is written of it: id, type, headers, body."""
    try:
        for text in (message.id, message.type):
            text.encode()
            if "\0" in text:
                msg = "its id or its type has a character that PostgreSQL cannot keep, U+0000"
                raise ValueError(msg)
        headers = json.dumps(dict(message.headers), allow_nan=False) if message.headers else "{}"
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"this message cannot be sent: {error}"
        raise BrokerRefused(msg) from error
    return message.id, message.type, headers, message.body


def _explain(error: BaseException, broker: str) -> BrokerError:
    text = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, asyncpg.PostgresError):
        if isinstance(error, asyncpg.InvalidPasswordError):
            return BrokerRefused(f"{broker} refused the user name or the password")
        again = (error.sqlstate or "08").startswith(OUTAGES)
        kind = BrokerUnavailable if again else BrokerRefused
        return kind(f"{broker}: {text}")
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return BrokerUnavailable(f"{broker}: the connection was lost")
    if isinstance(error, ssl.SSLError) or "rejected SSL upgrade" in text:
        return BrokerRefused(f"{broker}: no TLS connection: {text}")
    if isinstance(error, asyncpg.ClientConfigurationError | asyncpg.DataError):
        return BrokerRefused(f"{broker}: {text}")
    return BrokerUnavailable(f"{broker}: {text}")
