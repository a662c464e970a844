# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""PostgreSQL 13 or later, by asyncpg: durable queues in three tables of an existing database.

``postgres://user:password@host:5432/database``, several hosts as ``host-a:5432,host-b:5432``, and the options of
libpq: ``?sslmode=verify-full&sslrootcert=ca.pem&sslcert=me.pem&sslkey=me.key``, ``application_name``,
``target_session_attrs`` (default ``read-write``), ``service``. PGPASSWORD and ``~/.pgpass`` are read.
Characters that a URL reserves are percent-encoded in a password. This broker's own options:

- ``schema=consumer``: the schema of the tables. They are created if they do not exist and the user may create them.
- ``lease_seconds=30``: a consumer is a row with an expiry time, its lease, which it renews while it lives, also
  while a handler runs for hours. When it dies, another consumer finds the row expired and reclaims its messages,
  with the same ``attempt``. A consumer whose event loop is blocked for longer counts as dead.
- ``poll_seconds=5``: how late a message may be if no NOTIFY came for it.
- ``pgbouncer=true``: for a pooler in transaction mode, where LISTEN, SET and prepared statements do not work.

Any program that can insert a row can publish, also in a transaction with its own work:
``INSERT INTO consumer.messages (source, type, body) VALUES ('orders', 'order_created', '{"id": "1"}')``;
``NOTIFY consumer, 'orders'`` saves the message the wait for the poll.

Settlements are batched and written with the next statement, within milliseconds; after a kill in between, their
messages are redelivered. The statement that acknowledges a message also publishes what its handler returned: both
are done, or neither. All times are the database's.
"""

import asyncio
import json
import math
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import quote, urlencode

import asyncpg

from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable, MendableRefusal
from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .connectivity import Connectivity
from .dead_letters import Page
from .delivery import count_of, headers_of, json_object, make_dead_letter, make_message, text_of
from .flags import flag
from .requests import Requests, Rule
from .source import MISSING, Broker, Capabilities, log_settlement_lost
from .url import BrokerUrl, CurrentUrl

LEASE_SECONDS = 30.0
POLL_SECONDS = 5.0
CONNECT_SECONDS = 10.0
"""Connect timeout for all hosts together."""
ANSWER_SECONDS = 10.0
POOLER_SECONDS = 2.0
"""The time limit for a second connection through a pooler, which may allow no other."""
STOP_SECONDS = 1.5
CLOSE_SECONDS = 2.0
LONGEST_DELAY_SECONDS = 3e9
"""A century; a much longer delay does not fit into a timestamp."""
CRASH_LIMIT = 1000
"""A message becomes a dead letter when so many consumers died with it in flight; CONSUMER_MAX_DELIVERIES is lower."""
STEP = 500
"""Rows per statement in long work, so that other processes get a turn."""
STEP_BYTES = 4_000_000
MOST_CHARACTERS = 200
"""The longest name of a source: it is also the text of a NOTIFY."""

LABEL = "cookiecutter-consumer queue, schema "
SCHEMA_VERSION = 1
# Each index is partial, so taking a message costs the same with any number of delayed or in-flight ones. The
# price: taking is no HOT update. Vacuum comes early, as each message leaves two dead rows; a transaction of
# another program that stays open for hours keeps them all.
SCHEMA = """
CREATE TABLE {schema}.consumers (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- never reused: an old lease fits no new consumer
    source text NOT NULL,
    expires_at timestamptz NOT NULL -- in no index: renewing is a HOT update
) WITH (fillfactor = 50);
CREATE TABLE {schema}.messages (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- the order of publishing
    source text NOT NULL,
    consumer bigint, -- the consumer that has it unacked; NULL while it waits
    due_at timestamptz NOT NULL DEFAULT '-infinity', -- -infinity: at once, independent of the clock
    failures integer NOT NULL DEFAULT 0,
    crashes integer NOT NULL DEFAULT 0,
    id text NOT NULL DEFAULT gen_random_uuid(),
    type text NOT NULL DEFAULT '',
    headers json NOT NULL DEFAULT '{}' CHECK (json_typeof(headers) = 'object'), -- jsonb cannot store \\u0000
    published_at timestamptz NOT NULL DEFAULT now(),
    body bytea NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
CREATE INDEX messages_waiting ON {schema}.messages (source, due_at, seq) WHERE consumer IS NULL;
CREATE INDEX messages_in_flight ON {schema}.messages (consumer) WHERE consumer IS NOT NULL;
CREATE TABLE {schema}.dead_letters (
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
"""
LABEL_TABLE = f"COMMENT ON TABLE {{schema}}.messages IS '{LABEL}{SCHEMA_VERSION}'"
CREATE_SCHEMA = "CREATE SCHEMA IF NOT EXISTS {schema}"
BACKEND = "SELECT pg_backend_pid()"
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('cookiecutter-consumer', 0))"
# From the catalog's tables, since to_regclass() may remember, under the lock, that there was no table.
FIND_TABLES = """
SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1),
    (SELECT coalesce(obj_description(c.oid, 'pg_class'), '')
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
    WHERE nspname = $1 AND relname = 'messages')
"""

INSERT = """INSERT INTO {schema}.messages (source, id, type, headers, body, due_at)
    SELECT source, id, type, headers, body,
        CASE WHEN delay > 0 THEN now() + make_interval(secs => delay) ELSE '-infinity' END"""
PUBLISH = f"""
WITH published AS (
    {INSERT}
    FROM unnest($1::text[], $2::text[], $3::text[], $4::json[], $5::bytea[], $6::float8[])
        WITH ORDINALITY AS outgoing (source, id, type, headers, body, delay, place)
    ORDER BY place
)
SELECT pg_notify({{channel}}, source) FROM (SELECT DISTINCT unnest($1::text[]) AS source) AS sources
"""  # nosec B608 # constants
# Publishes with the acks of the incoming messages, if these are still this consumer's.
PUBLISH_AND_ACK = f"""
WITH acked AS (
    DELETE FROM {{schema}}.messages WHERE seq = ANY ($2::bigint[]) AND consumer = $1 RETURNING seq AS because
), published AS (
    {INSERT}
    FROM acked JOIN unnest($2::bigint[], $3::text[], $4::text[], $5::text[], $6::json[], $7::bytea[], $8::float8[])
        WITH ORDINALITY AS outgoing (because, source, id, type, headers, body, delay, place) USING (because)
    ORDER BY place RETURNING source
), notified AS (
    SELECT pg_notify({{channel}}, source) FROM (SELECT DISTINCT source FROM published) AS sources
)
SELECT ARRAY(SELECT because FROM acked), (SELECT count(*) FROM notified)
"""  # nosec B608 # constants

# The one statement of a busy consumer: it deletes the acked messages and takes ready ones. It also locks this
# consumer's row, so that no other consumer can find the lease expired, and reclaim the messages meanwhile.
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
    RETURNING due_at, seq, body, id, type, headers, failures, published_at, crashes
)
SELECT about.*, seq, body, id, type, headers, failures,
    extract(epoch FROM published_at)::float8, crashes -- any time, also one that Python has not
FROM (SELECT
    EXISTS (SELECT FROM me) AS alive,
    NULLIF(ARRAY(SELECT unnest($3::bigint[]) EXCEPT SELECT seq FROM acked), '{}') AS lost,
    (SELECT extract(epoch FROM due_at - now())::float8 FROM {schema}.messages
        WHERE source = $1 AND consumer IS NULL
            AND due_at > '-infinity' AND due_at > now() AND due_at < 'infinity'
        ORDER BY due_at LIMIT 1) AS next_due_seconds
) AS about LEFT JOIN taken ON true
ORDER BY due_at = '-infinity', due_at, seq -- a delayed message is older than a ready one
"""

# The other settlements return the rows that they changed: rows whose lease had not expired. A column may contain
# any number, so no statement adds to a number of another program. A retry that is written twice,
# because its answer was lost and the message was taken again meanwhile, finds its attempt in the row.
RETRY = """
WITH retried AS (
    UPDATE {schema}.messages AS m
    SET consumer = NULL, failures = attempt, crashes = 0,
        due_at = now() + make_interval(secs => delay)
    FROM unnest($2::bigint[], $3::integer[], $4::float8[], $5::boolean[])
        AS settled (seq, attempt, delay, uncounted)
    WHERE m.seq = settled.seq AND consumer = $1 AND (uncounted OR failures <> attempt)
    RETURNING m.seq, source
)
SELECT seq, pg_notify({channel}, source) FROM retried
"""
REJECT = """
WITH rejected AS (
    DELETE FROM {schema}.messages AS m
    USING unnest($2::bigint[], $3::integer[], $4::text[])
        WITH ORDINALITY AS settled (seq, attempt, reason, place)
    WHERE m.seq = settled.seq AND consumer = $1 RETURNING m.*, attempt, reason, place
), dead AS (
    INSERT INTO {schema}.dead_letters (source, reason, attempts, id, type, headers, body)
    SELECT source, reason, attempt, id, type, headers, body FROM rejected ORDER BY place
)
SELECT seq FROM rejected
"""
REQUEUE = """
WITH requeued AS (
    UPDATE {schema}.messages SET consumer = NULL, crashes = 0
    WHERE seq = ANY ($2::bigint[]) AND consumer = $1 RETURNING seq, source
)
SELECT seq, pg_notify({channel}, source) FROM requeued
"""

# The rights to consume that are missing.
MISSING_RIGHTS = """
SELECT string_agg(verb || ' on ' || name, ', ') FROM (VALUES
    ('messages', 'SELECT'), ('messages', 'UPDATE'), ('messages', 'DELETE'),
    ('consumers', 'SELECT'), ('consumers', 'INSERT'), ('consumers', 'UPDATE'), ('consumers', 'DELETE'),
    ('dead_letters', 'INSERT')
) AS needed (name, verb) WHERE NOT has_table_privilege(quote_ident($1) || '.' || name, verb)
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
    ARRAY(SELECT id FROM {schema}.consumers WHERE source = $3 AND expires_at <= now() AND id <> $1),
    -- of consumers whose row an operator has deleted
    ARRAY(SELECT DISTINCT consumer FROM {schema}.messages AS m WHERE source = $3
        AND consumer IS NOT NULL AND NOT EXISTS (SELECT FROM {schema}.consumers WHERE id = m.consumer))
"""
# For messages taken by a statement whose answer was lost with the connection.
REQUEUE_OTHERS = """
UPDATE {schema}.messages SET consumer = NULL WHERE consumer = $1 AND seq <> ALL ($2::bigint[])
"""
LEAVE = """
WITH requeued AS (
    UPDATE {schema}.messages SET consumer = NULL WHERE consumer = $1
), gone AS (
    DELETE FROM {schema}.consumers WHERE id = $1 RETURNING source
)
SELECT pg_notify({channel}, source) FROM gone
"""
# Two statements: the second sees all messages that dead consumers had taken before the first locked their rows.
LOCK_EXPIRED = """
SELECT id FROM {schema}.consumers WHERE id = ANY ($1::bigint[]) AND expires_at <= now()
FOR UPDATE SKIP LOCKED
"""
RECLAIM = f"""
WITH fatal AS (
    DELETE FROM {{schema}}.messages WHERE consumer = ANY ($1::bigint[]) AND crashes >= {CRASH_LIMIT - 1}
    RETURNING *
), dead AS (
    INSERT INTO {{schema}}.dead_letters (source, reason, attempts, id, type, headers, body)
    SELECT source, '{CRASH_LIMIT} consumers died with it in flight', failures, id, type, headers, body
    FROM fatal
), requeued AS (
    UPDATE {{schema}}.messages SET consumer = NULL, crashes = crashes + 1
    WHERE consumer = ANY ($1::bigint[]) AND crashes < {CRASH_LIMIT - 1}
), gone AS (
    DELETE FROM {{schema}}.consumers WHERE id = ANY ($1::bigint[]) RETURNING source
)
SELECT pg_notify({{channel}}, source) FROM gone
"""  # nosec B608 # constants

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
SELECT seq, body, id, type, headers::text, reason, attempts, extract(epoch FROM dead_lettered_at)::float8
FROM {schema}.dead_letters WHERE source = $1 AND seq > $2 AND seq <= $3 ORDER BY seq LIMIT $4
"""
TAKE_DEAD = """
DELETE FROM {schema}.dead_letters WHERE source = $1 AND seq = ANY ($2::bigint[]) RETURNING *
"""
PURGE = f"WITH dead AS ({TAKE_DEAD}) SELECT count(*) FROM dead"  # nosec B608 # constants
REPLAY = f"""
WITH dead AS ({TAKE_DEAD}), replayed AS (
    INSERT INTO {{schema}}.messages (source, id, type, headers, body)
    SELECT source, id, type, CASE json_typeof(headers) WHEN 'object' THEN headers ELSE '{{}}' END, body
    FROM dead ORDER BY seq
)
SELECT count(*), pg_notify({{channel}}, $1) FROM dead
"""  # nosec B608 # constants

# Plans live as long as the connection: a plan for an empty table must not read a million rows. Not sent with
# the start of the session: PgBouncer would refuse that.
SESSION = """
SET enable_seqscan = off;
SET jit = off;
SET default_transaction_isolation = 'read committed'
"""
FILE_OPTIONS = {"sslrootcert", "sslcert", "sslkey", "sslcrl"}
OWN_OPTIONS = ("schema", "lease_seconds", "poll_seconds", "pgbouncer")
CLIENT_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
RULES = (
    Rule((ssl.SSLEOFError, ssl.SSLZeroReturnError), BrokerUnavailable, "the connection was lost"),
    Rule(
        asyncpg.InvalidPasswordError,
        BrokerDenied,
        "the server refused the user name or the password",
    ),
    Rule(  # PgBouncer's refusal of a login
        asyncpg.ProtocolViolationError,
        BrokerDenied,
        "the pooler refused the user name or the password: {error}",
        "auth|no such user",
    ),
    Rule(
        asyncpg.ProtocolViolationError,
        BrokerRefused,
        "the pooler does not pass on a setting of the URL, but the user or the database can have it "
        "(ALTER USER ... SET): {error}",
        "unsupported startup parameter",
    ),
    Rule(
        (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError),
        BrokerRefused,
        "behind a pooler in transaction mode, add ?pgbouncer=true to the URL: {error}",
    ),
    Rule(
        (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidAuthorizationSpecificationError),
        BrokerDenied,
        "{error}",
    ),
    Rule(
        (  # a lost, full or busy server, a failover, a lock
            asyncpg.PostgresConnectionError,
            asyncpg.ReadOnlySQLTransactionError,
            asyncpg.TransactionRollbackError,
            asyncpg.InsufficientResourcesError,
            asyncpg.LockNotAvailableError,
            asyncpg.OperatorInterventionError,
            asyncpg.PostgresSystemError,
        ),
        BrokerUnavailable,
        "{error}",
    ),
    Rule(
        (asyncpg.PostgresError, asyncpg.ClientConfigurationError, asyncpg.DataError),
        BrokerRefused,
        "{error}",
    ),
    # Their texts are about asyncpg's internals, such as when a connection ends during a request.
    Rule(
        (asyncpg.InterfaceError, asyncpg.InternalClientError),
        BrokerUnavailable,
        "the connection was lost",
    ),
)

Connection = Any  # asyncpg.Connection: the package has no types
Settlement = tuple[Message, str, Any]  # with the verb, and the delay, the reason or `Published`
Row = tuple[str, str, str, str, bytes, float]
"""The source, id, type, headers, body and delay of a message to publish."""


class Published(NamedTuple):
    """The messages that are published with the ack of a message."""

    rows: list[Row]
    written: "asyncio.Future[None]"


class Exchange(NamedTuple):
    """The settlements and messages of one request, to use after its commit."""

    settled_count: int
    settlements: list[Settlement]  # empty if all are acks, in time
    lost: set[int]
    """The rows whose settlement came too late."""
    rows: list[Any]
    refused: dict[int, BrokerRefused]
    """Why messages were not published, by the row that they follow from: it is still this consumer's."""


@cache
def _sql(statement: str, schema: str) -> str:
    channel = "'" + schema.replace("'", "''") + "'"
    return statement.replace("{schema}", _identifier(schema)).replace("{channel}", channel)


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _row(source: str, message: OutgoingMessage) -> Row:
    """The message as it is stored. Raises BrokerRefused."""
    try:
        for text in (message.id, message.type, source):
            text.encode()
            if "\0" in text:
                msg = "its id, its type or its destination has a character that PostgreSQL cannot store, U+0000"
                raise ValueError(msg)
        if len(source) > MOST_CHARACTERS:
            msg = f"a source has at most {MOST_CHARACTERS} characters, and not {source[:20]!r}..."
            raise ValueError(msg)
        headers = headers_of(message)
        packed = json.dumps(headers, allow_nan=False) if headers else "{}"
    except (TypeError, ValueError, RecursionError) as error:
        raise BrokerRefused(f"this message cannot be sent: {error}") from error
    delay = min(max(0.0, message.delay_seconds), LONGEST_DELAY_SECONDS)
    return source, message.id, message.type, packed, message.body, delay


def _columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _steps(items: Iterable[Any], rows_of: Callable[[Any], Sequence[Row]]) -> Iterator[list[Any]]:
    """Items in steps of one statement each."""
    step: list[Any] = []
    count = size = 0
    for item in items:
        step.append(item)
        count += len(rows := rows_of(item))
        size += sum(len(row[4]) for row in rows)
        if count >= STEP or size >= STEP_BYTES:
            yield step
            step, count, size = [], 0, 0
    if step:
        yield step


@asynccontextmanager
async def _transaction(connection: Connection) -> AsyncIterator[None]:
    """Needs no rollback: a request that fails ends the connection."""
    transaction = connection.transaction(isolation="read_committed")
    await transaction.start()
    yield
    await transaction.commit()


class PostgresBroker(Broker):
    """One queue in the tables that ``CONSUMER_BROKER_URL`` names. Headers must be JSON values."""

    capabilities = Capabilities(delayed_publish=True)
    acks_late = True
    dead_letters_at_once = STEP
    destinations: ClassVar = {"source": "source:NAME"}

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL cannot be used."""
        super().__init__(settings, prefetch)
        self._name = settings.source
        self._origin = {"source": settings.source}
        like = "postgres://user:password@host:5432/database"
        parse = partial(BrokerUrl, like=like, options=None)
        self._current_url = CurrentUrl(settings, parse)
        self._url = url = self._current_url()
        for option in FILE_OPTIONS & url.options.keys():
            if not Path(file := url.options[option]).is_file():
                msg = f"CONSUMER_BROKER_URL: {option}: the file {file} does not exist"
                raise BrokerRefused(msg)
        self._schema = url.options.get("schema") or "consumer"
        self._lease_seconds = url.number("lease_seconds", LEASE_SECONDS, at_least=0.01)
        self._poll_seconds = url.number("poll_seconds", POLL_SECONDS, at_least=0.01)
        self._pgbouncer = flag(url, "pgbouncer")
        self._address = f"{url.redacted}/{url.path}"
        self._requests = Requests(self._address, CLIENT_ERRORS, RULES, ANSWER_SECONDS)
        self.connectivity = Connectivity(self._address)
        self._connection: Connection = None
        self._lock = asyncio.Lock()  # a connection has one request at a time
        self._entered = False
        self._has_tables = False
        self._listening_on: Connection = None
        self._consumer = 0  # our row in the table of consumers; 0 before there is one
        self._renew_at = -math.inf  # event loop time, like the next
        self._reclaim_at = -math.inf
        self._answer_lost = False  # the connection ended: its last statement may have been executed
        self._fetcher: asyncio.Task[None] | None = None
        self._fetching = False
        self._limit = 0  # rows that the last exchange requested
        self._closing = asyncio.Event()
        self._wake = asyncio.Event()
        self._flushed = asyncio.Event()
        self._settlements: list[Settlement] = []

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        async with self._request():
            self._entered = True
        return self

    async def declare(self) -> None:
        if not self._has_tables:
            async with self._request() as connection:
                await self._create_tables(connection)

    async def delete(self) -> None:
        for table in ("messages", "dead_letters", "consumers"):
            statement = f"DELETE FROM {{schema}}.{table} WHERE source = $1"  # nosec B608 # constants
            await self._first_row(statement)

    async def __aexit__(self, *exc_info: object) -> None:
        self._fetching = self._entered = False
        self._closing.set()
        self._wake.set()
        reason: object = "the connection was lost"
        try:
            async with self._requests.bounded(CLOSE_SECONDS):
                if self._fetcher is not None:
                    await asyncio.wait({self._fetcher})
                if self._consumer:  # also in an outage, which may be over by now
                    async with self._request() as connection:
                        exchange = await self._exchange(connection)
                        await self._rows(connection, LEAVE, self._consumer)
                    self._written(exchange)
                if self._connection is not None:
                    await self._connection.close()
        except BrokerError as error:
            reason = error
        finally:
            await self._end(reason)

    async def _end(self, reason: object) -> None:
        """Leave nothing open, and log the settlements that were not written."""
        self.connectivity.up = False
        if self._connection is not None:
            self._connection.terminate()
        if self._fetcher is not None and not self._fetcher.done():
            self._fetcher.cancel()
            await asyncio.wait({self._fetcher}, timeout=0.5)
        self._drop_unacked(reason)

    @property
    def connected(self) -> bool:
        return self._entered and self.connectivity.up

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[Connection]:
        """The connection, for one request; reconnects if it was lost. Raises BrokerUnavailable or BrokerRefused."""
        async with self._lock:
            if self._connection is None or self._connection.is_closed():
                await self._connect()
            connection = self._connection
            async with self._bounded(connection):
                yield connection

    @asynccontextmanager
    async def _bounded(self, connection: Connection) -> AsyncIterator[None]:
        """The context of a request; for a pooler in transaction mode it is a transaction."""
        async with self._requests.bounded():
            try:
                async with _transaction(connection) if self._pgbouncer else nullcontext():
                    yield
            except BaseException as error:
                was_closed = connection.is_closed()
                # asyncpg ends a cancelled query by a task that asks the server, which may be unresponsive.
                connection.terminate()
                await asyncio.sleep(0)  # until that task has ended
                if was_closed and isinstance(error, AttributeError):  # asyncpg's, in mid-request
                    raise self._requests.lost() from error
                raise

    async def _connect(self) -> None:
        connection = await self._open()
        async with self._bounded(connection):
            await self._look(connection)
            if self._fetcher is not None:
                await self._check_rights(connection)
        now = asyncio.get_running_loop().time()
        if self._connection is not None:  # other consumers also need time to reconnect
            self._reclaim_at = now + self._lease_seconds
        self._renew_at = now
        self._connection = connection
        connection.add_termination_listener(self._on_lost)
        self.connectivity.established()

    async def _open(self) -> Connection:
        """Try each host, and stop at the first refusal. Raises the error of the last host."""
        self._url = self._current_url()
        hosts = self._url.hosts or [""]  # otherwise asyncpg reads PGHOST, or looks for a socket
        seconds = CONNECT_SECONDS / len(hosts)
        outage = BrokerUnavailable(self._address)
        for host in hosts:  # otherwise asyncpg would spend the whole time on an unresponsive host
            try:
                async with self._requests.bounded(seconds):
                    return await self._open_host(host)
            except BrokerUnavailable as error:
                outage = error
        raise outage

    async def _open_host(self, host: str) -> Connection:
        url = self._url
        options = {
            "target_session_attrs": os.environ.get("PGTARGETSESSIONATTRS", "read-write"),
            "application_name": self._name,
            **{name: value for name, value in url.options.items() if name not in OWN_OPTIONS},
        }
        path = f"/{quote(url.path, safe='')}" if url.path else ""
        opening = asyncio.ensure_future(
            asyncpg.connect(
                f"postgres://{host}{path}?{urlencode(options)}",
                user=url.user or None,
                password=url.password or None,
                timeout=None,
                statement_cache_size=0 if self._pgbouncer else 100,
            )
        )
        try:
            return await asyncio.shield(opening)
        except ConnectionError as error:
            if "rejected SSL upgrade" in str(error):
                raise MendableRefusal(f"{self._address}: no TLS connection: {error}") from error
            raise
        except asyncio.CancelledError:
            # If it is cancelled in its first instants, asyncpg leaves an error that is never retrieved.
            await asyncio.wait({opening}, timeout=0.02)
            opening.cancel()
            await asyncio.wait({opening}, timeout=0.5)
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                opening.result().terminate()
            raise

    async def _rows(self, connection: Connection, statement: str, *arguments: object) -> list[Any]:
        rows: list[Any] = await connection.fetch(_sql(statement, self._schema), *arguments)
        return rows

    async def _first_row(self, statement: str, *arguments: object) -> Any:
        """The first row of a request about this queue; None if there is none."""
        rows = await self._all_rows(statement, *arguments)
        return rows[0] if rows else None

    async def _all_rows(self, statement: str, *arguments: object) -> Any:
        async with self._request() as connection:
            return await self._rows(connection, statement, self._name, *arguments)

    async def _look(self, connection: Connection) -> None:
        """Check whether this server, its pooler and its tables can be used."""
        version = connection.get_server_version()
        if version < (13,):
            raise BrokerRefused(
                f"{self._address} is PostgreSQL {version.major}; the oldest supported version is 13"
            )
        if connection.get_settings().server_encoding != "UTF8":
            raise BrokerRefused(f"{self._address}: the encoding of this database is not UTF8")
        if not self._pgbouncer:
            await self._check_pooler(connection)
            await connection.execute(SESSION)
        self._has_tables = await self._find_tables(connection)

    async def _check_pooler(self, connection: Connection) -> None:
        """A pooler in transaction mode would hand this session's settings to other clients."""
        pid = await connection.fetchval(BACKEND)
        if pid == connection.get_server_pid():
            return  # a pooler reports a number of its own
        shared = False
        with suppress(TimeoutError, BrokerUnavailable):
            async with asyncio.timeout(POOLER_SECONDS):
                other = await self._open()
                try:
                    shared = await other.fetchval(BACKEND) == pid
                finally:
                    other.terminate()
        if shared:
            msg = f"{self._address}: the pooler is in transaction mode: add ?pgbouncer=true to the URL"
            raise BrokerRefused(msg)

    def _on_lost(self, connection: Connection) -> None:
        if connection is not self._connection:
            return
        self._answer_lost = True
        if self._entered:
            self.connectivity.lost("the connection was lost")
            self._wake.set()

    # -- topology

    async def _find_tables(self, connection: Connection) -> bool:
        schema = _identifier(self._schema)
        _, comment = await connection.fetchrow(FIND_TABLES, self._schema)
        if comment is None:
            return False
        if not comment.startswith(LABEL):
            msg = f"the table {schema}.messages belongs to another program: choose another schema with ?schema="
            raise BrokerRefused(msg)
        if comment != f"{LABEL}{SCHEMA_VERSION}":
            raise BrokerRefused(
                f"the tables in {schema} have version {comment.removeprefix(LABEL)}; "
                f"this version of the service knows {SCHEMA_VERSION}"
            )
        return True

    async def _create_tables(self, connection: Connection) -> None:
        try:
            async with _transaction(connection):
                await connection.execute(LOCK)  # two processes may start at once
                if not await self._find_tables(connection):
                    schema_exists, _ = await connection.fetchrow(FIND_TABLES, self._schema)
                    if not schema_exists:
                        await connection.execute(_sql(CREATE_SCHEMA, self._schema))
                    await connection.execute(_sql(SCHEMA + LABEL_TABLE, self._schema))
        except asyncpg.InsufficientPrivilegeError as error:
            msg = f"the tables do not exist in {_identifier(self._schema)}, and cannot be created: {error}"
            raise BrokerDenied(msg) from error
        except asyncpg.DuplicateTableError as error:
            msg = f"{error}, and belongs to another program: choose another schema with ?schema="
            raise BrokerRefused(msg) from error
        self._has_tables = True

    # -- fetching

    async def start(self) -> None:
        async with self._request() as connection:
            await self._check_rights(connection)
        self._fetching = True
        self._fetcher = asyncio.create_task(self._fetch(), name=f"fetcher of {self._name}")

    async def _check_rights(self, connection: Connection) -> None:
        [(missing,)] = await connection.fetch(MISSING_RIGHTS, self._schema)
        if missing:
            raise BrokerDenied(f"{self._address}: this user lacks the right to {missing}")

    async def _stop_fetching(self) -> None:
        self._fetching = False

    async def flush(self) -> None:
        if self._fetcher is None or self._fetcher.done() or not self.connectivity.up:
            return
        self._flushed.clear()  # until the statement in progress has been answered too
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._flushed.wait()

    async def _fetch(self) -> None:
        """Write settlements and take messages until closed, also after outages."""
        try:
            await self.connectivity.keep(self._exchange_until_closed, until=self._closing)
        except Exception as failure:
            self.connectivity.up = False
            self.buffer.fail(failure)
            for _, verb, about in self._settlements:  # so that no handler waits forever
                if verb == "publish" and not about.written.done():
                    about.written.set_exception(failure)
        finally:
            self._flushed.set()

    async def _exchange_until_closed(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing.is_set():
            self._wake.clear()
            async with self._request() as connection:
                if loop.time() >= self._renew_at:
                    await self._renew(connection)
                exchange = await self._exchange(connection)
            # After the request: with pgbouncer=true it is a transaction.
            self._written(exchange)
            next_due_seconds = await self._deliver_taken(exchange.rows)
            if not self._settlements:
                self._flushed.set()
            pause = min(next_due_seconds, self._poll_seconds, self._renew_at - loop.time())
            timer = loop.call_later(max(0, pause), self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()

    async def _renew(self, connection: Connection) -> None:
        """Renew the lease, or register as a consumer, and reclaim the messages of dead consumers."""
        if connection is not self._listening_on and not self._pgbouncer:
            await connection.add_listener(self._schema, self._on_notification)
            self._listening_on = connection
        now = asyncio.get_running_loop().time()
        [(alive, expired, stranded)] = await self._rows(
            connection, RENEW, self._consumer, self._lease_seconds, self._name
        )
        if not alive:
            self._drop_unacked("its lease had expired")
            [(self._consumer,)] = await self._rows(
                connection, REGISTER, self._name, self._lease_seconds
            )
        if (expired or stranded) and now >= self._reclaim_at:
            async with _transaction(connection):
                dead = [id for (id,) in await self._rows(connection, LOCK_EXPIRED, expired)]
                await self._rows(connection, RECLAIM, dead + stranded)
        self._renew_at = now + self._lease_seconds / 3

    def _drop_unacked(self, reason: object) -> None:
        """The messages are redelivered to other consumers: drop them here, and log lost settlements."""
        self._take_back()
        self.unacked.clear()
        for message, verb, about in self._settlements:
            if verb != "publish":
                log_settlement_lost(message, verb, reason)
            elif not about.written.done():
                about.written.set_result(None)
                log_settlement_lost(message, "ack", reason)
        self._settlements.clear()

    def _on_notification(self, connection: Connection, pid: int, _channel: str, name: str) -> None:
        # The notification may have been read before the connection ended: a closed one has no pid.
        ours = name == self._name and not connection.is_closed()
        if ours and pid != connection.get_server_pid():
            self._on_ready()

    def _on_ready(self) -> None:
        if self._room() > 0:
            self._wake.set()

    def _room(self) -> int:
        return super()._room() if self._fetching else 0

    async def _exchange(self, connection: Connection) -> Exchange:
        """Write settlements and take messages."""
        settlements = self._settlements.copy()
        self._limit = limit = max(0, min(self._room(), STEP))
        acked = [message.receipt for message, verb, _ in settlements if verb == "ack"]
        lost: set[int] = set()
        refused: dict[int, BrokerRefused] = {}
        if len(acked) < len(settlements):
            lost, refused = await self._write_published(connection, settlements)
            lost |= await self._write_others(connection, settlements)
        rows = await self._rows(connection, EXCHANGE, self._name, self._consumer, acked, limit)
        lost.update(rows[0]["lost"] or ())
        if self._answer_lost:
            ours = [message.receipt for message in self.unacked]
            ours += [message.receipt for message, _, _ in self._settlements[len(settlements) :]]
            ours += [row["seq"] for row in rows if row["seq"]]
            await self._rows(connection, REQUEUE_OTHERS, self._consumer, ours)
        told = settlements if lost or len(acked) < len(settlements) else []
        return Exchange(len(settlements), told, lost, rows, refused)

    def _written(self, exchange: Exchange) -> None:
        """Forget settlements that are committed, and report those that were lost."""
        _, settlements, lost, _, refused = exchange
        del self._settlements[: exchange.settled_count]
        for message, verb, about in settlements:
            if message.receipt in lost and not self._answer_lost:  # otherwise it was written before
                told = "ack" if verb == "publish" else verb
                log_settlement_lost(message, told, "its lease had expired")
            if verb == "publish" and not about.written.done():
                if refusal := refused.get(message.receipt):
                    about.written.set_exception(refusal)
                else:
                    about.written.set_result(None)

    async def _deliver_taken(self, rows: list[Any]) -> float:
        """Deliver the messages; returns the seconds until a delayed one is due."""
        alive, _, next_due_seconds, *_ = rows[0]
        if not alive:
            self._renew_at = -math.inf
        messages = []
        for _, _, _, seq, body, id, type, headers, failures, at, crashes in (
            rows if rows[0]["seq"] else ()
        ):
            message = make_message(
                body,
                id=id,
                type=type,
                headers={} if headers == "{}" else json_object(headers),
                failures=failures,
                published_at=at,
                receipt=seq,
                origin=self._origin,
            )
            if crashes:
                message.deliveries += count_of(crashes)
            messages.append(message)
        await self._deliver_fetched(messages)
        requeued, self._answer_lost = self._answer_lost, False
        is_full = rows[0]["seq"] is not None and len(rows) == self._limit
        if not alive or requeued or (is_full and self._room() > 0):
            return 0
        return math.inf if next_due_seconds is None else next_due_seconds

    async def _write_published(
        self, connection: Connection, settlements: list[Settlement]
    ) -> tuple[set[int], dict[int, BrokerRefused]]:
        """Acknowledge messages and publish what follows from them. Returns `Exchange.lost` and `Exchange.refused`."""
        lost: set[int] = set()
        refused: dict[int, BrokerRefused] = {}
        # A message whose handler was cancelled is requeued.
        settled = [
            (message.receipt, about.rows)
            for message, verb, about in settlements
            if verb == "publish" and not about.written.cancelled()
        ]
        steps = list(_steps(settled, lambda one: one[1]))
        while steps:
            step = steps.pop(0)
            seqs = [seq for seq, _ in step]
            columns = _columns((seq, *row) for seq, rows in step for row in rows)
            answer = await self._try(connection, PUBLISH_AND_ACK, self._consumer, *columns)
            if not isinstance(answer, BrokerRefused):
                [(acked, _)] = answer
                lost.update(set(seqs) - set(acked))
            elif len(step) > 1:  # one message is the cause
                steps += [[one] for one in step]
            else:
                refused[seqs[0]] = answer
        return lost, refused

    async def _try(
        self, connection: Connection, statement: str, *arguments: object
    ) -> list[Any] | BrokerRefused:
        """The rows, or the server's refusal of the statement, after which the connection and its transaction go on."""
        try:
            async with connection.transaction() if self._pgbouncer else nullcontext():
                return await self._rows(connection, statement, *arguments)
        except asyncpg.PostgresError as error:
            refusal = self._requests.translated(error)
            if not isinstance(refusal, BrokerRefused):
                raise
            return refusal

    async def _write_others(
        self, connection: Connection, settlements: list[Settlement]
    ) -> set[int]:
        """Write all but the acks; returns the rows that are no longer this consumer's."""
        lost: set[int] = set()
        for verb, statement in ("retry", RETRY), ("reject", REJECT), ("requeue", REQUEUE):
            settled = [(message, about) for message, v, about in settlements if v == verb]
            if not settled:
                continue
            seqs = [message.receipt for message, _ in settled]
            columns: list[list[Any]] = [
                [message.attempt for message, _ in settled],
                [about for _, about in settled],
            ]
            if verb == "retry":
                columns.append([message.was_tried for message, _ in settled])
            rows = await self._rows(
                connection, statement, self._consumer, seqs, *(columns if verb != "requeue" else ())
            )
            lost.update(set(seqs) - {row[0] for row in rows})
        return lost

    # -- settling

    async def _ack(self, message: Message) -> None:
        self._settlements.append((message, "ack", None))
        self._wake.set()

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        self._settle(message, "retry", min(max(0.0, delay_seconds), LONGEST_DELAY_SECONDS))

    async def _reject(self, message: Message, reason: str) -> None:
        self._settle(message, "reject", text_of(reason).replace("\0", "\ufffd"))

    async def _requeue(self, message: Message) -> None:
        self._settle(message, "requeue")

    def _settle(self, message: Message, verb: str, about: Any = None) -> None:
        self._settlements.append((message, verb, about))
        self._wake.set()

    # -- publishing, queue metrics, dead letters

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        for step in _steps(self._rows_of(messages), lambda row: [row]):
            publishing = asyncio.ensure_future(self._publish(step))
            # A handler that is cancelled meanwhile must not end the connection, which all handlers share.
            publishing.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(publishing)

    async def _publish(self, rows: list[Row]) -> None:
        async with self._request() as connection:
            answer = await self._try(connection, PUBLISH, *_columns(rows))
        if isinstance(answer, BrokerRefused):
            raise answer
        self._on_ready()

    def _rows_of(self, messages: Sequence[OutgoingMessage]) -> list[Row]:
        return [_row(self.destination_of(message)[1], message) for message in messages]

    async def publish_and_ack(self, message: Message, outgoing: Sequence[OutgoingMessage]) -> None:
        """In one statement, for up to STEP messages and STEP_BYTES."""
        rows = self._rows_of(outgoing)
        is_large = len(rows) > STEP or sum(len(row[4]) for row in rows) > STEP_BYTES
        if is_large or self.buffer.failure is not None:
            await super().publish_and_ack(message, outgoing)
            return
        if self._holds(message, "ack"):
            written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._settle(message, "publish", Published(rows, written))
            await written
            self._release(message)
        self.buffer.settled(message)

    async def describe(self) -> dict[str, int | str]:
        version = self._connection.get_server_version()
        server = {
            "server": f"PostgreSQL {version.major}.{version.minor}",
            "schema": self._schema,
        }
        if not self._has_tables:
            return {**server, self._name: MISSING}
        ready, delayed, in_flight, dead, consumers = await self._first_row(COUNTS)
        return {
            **server,
            self._name: ready,
            f"{self._name} delayed": delayed,
            f"{self._name} in flight": in_flight,
            f"{self._name} dead letters": dead,
            f"{self._name} consumers": consumers,
        }

    async def _present_letters(self, reading: Any) -> AsyncGenerator[DeadLetter, None]:
        after, last = 0, (await self._first_row(COUNT_DEAD))[1] if self._has_tables else 0
        page = Page()
        while last and (rows := await self._all_rows(NEXT_DEAD, after, last, page.count)):
            for after, body, id, type, text, reason, attempts, at in rows:
                page.saw(len(body))
                message = make_message(body, id=id, type=type, headers=json_object(text))
                yield make_dead_letter(
                    message, after, reason=reason, attempts=attempts, dead_lettered_at=at
                )
            page.turn()

    async def _take_letters(
        self, reading: Any, letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        seqs = [letter.receipt for letter in letters]
        yield (await self._first_row(REPLAY if replay else PURGE, seqs))[0]
        if replay:
            self._on_ready()

    async def count_dead_letters(self) -> int:
        return int((await self._first_row(COUNT_DEAD))[0]) if self._has_tables else 0


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> PostgresBroker:
    """Raises BrokerRefused if the URL cannot be used."""
    return PostgresBroker(settings, prefetch)
