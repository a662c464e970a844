# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Redis Streams, on Redis 6.2 or later or Valkey, by redis-py: one stream with one consumer group.

``redis://user:password@host:6379/0``, ``rediss://`` with ``?ssl_ca_certs=ca.pem&ssl_certfile=me.pem&ssl_keyfile=me.key``,
or ``unix:///path/redis.sock?db=0``.

For ``CONSUMER_SOURCE=orders`` the keys are the stream ``orders``, the stream ``orders.dead``, the sorted set
``orders.delayed`` (entries that wait for a retry, by the time when they are due) and the sorted set
``orders.consumers`` (live consumers, by the time when their leases expire). On a cluster the source is called
``{orders}``, so that all four are in one slot.

An entry stays in its place in the stream until it is acknowledged, and is deleted then; so a stream has one group. Only
its owner in the group changes: a consumer, or one of two names that no consumer has. ``delayed`` entries wait for their
retry; ``requeued`` ones are for any consumer with room. A consumer looks there four times a second, before it reads
new entries.

A consumer renews its lease while it lives, also while a handler runs for hours. When the lease has expired, another
consumer requeues its entries. ``?lease_seconds=30`` in the URL is its length; an event loop that is blocked for longer
counts as dead. All times are those of the server's clock.
"""

import asyncio
import json
import math
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self
from urllib.parse import urlencode, urlsplit

import structlog
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterCrossSlotError,
    ClusterDownError,
    DataError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable
from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .delivery import (
    ATTEMPTS,
    DEAD_LETTERED_AT,
    REASON,
    count_of,
    json_object,
    make_dead_letter,
    make_message,
    seconds_of,
    text_of,
)
from .put_off import backoff_seconds
from .requests import Requests, Rule
from .source import MISSING, Broker, Capabilities, Connectivity, log_settlement_lost
from .url import BrokerUrl

log = structlog.get_logger()

LEASE_SECONDS = 30.0
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 5.0
"""How long the server may leave a request unanswered before that is an outage."""
CHECK_SECONDS = 1.0
"""How often a connection that reads nothing, for want of room, is checked."""
POLL_SECONDS = 0.25
"""How long a read waits for new entries before the next look for requeued ones."""
STOP_SECONDS = 1.5
CLOSE_SECONDS = 2.5
QUIET_TURNS = 3
"""This many turns of the event loop without another settlement end a batch of them."""
AT_ONCE = 500
"""Entries per command: other clients of the server get their turn, and Lua's stack is limited."""
MOST_VALUES = 7000
"""Names and values of an entry that a script can copy: Lua's stack holds 8000."""
CRASH_LIMIT = 100
"""When this many consumers died with an entry in flight, the entry counts as the cause."""
FAR_OFF_MS = 10**15
"""In the year 33658, and exact in a sorted set."""

TYPES = (b"stream", b"zset", b"zset", b"stream")
REQUEUED, DELAYED = "requeued", "delayed"
"""Reserved owner names in the group; see the module."""
BODY, ID, TYPE, HEADERS = b"body", b"id", b"type", b"headers"
"""Fields of an entry; others are kept. The headers are a JSON object. A dead letter has REASON, ATTEMPTS and DEAD_LETTERED_AT too."""
DUE = "x-consumer-due"
"""Field of an entry that was trimmed in flight and added again: Unix milliseconds. It has ATTEMPTS too."""

OPTIONS = (
    *("db", "lease_seconds", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_check_hostname"),
    *("ssl_cert_reqs", "ssl_ciphers", "ssl_keyfile", "ssl_min_version", "ssl_password"),
)

# The group counts the deliveries of each pending entry. The scripts keep that count as one of their own: the attempt,
# and in its upper bits how many consumers died with the entry in flight.
ONE_CRASH = 2**20  # more than CONSUMER_MAX_ATTEMPTS can be
CALL = """
local function call(...)
    local answer = redis.pcall(...)
    if type(answer) == 'table' and answer.err then error(answer.err .. ' (' .. (...) .. ')', 0) end
    return answer
end
"""
"""As ``redis.call``; its error names the command, for a user who has not the right to run it."""
COMMON = f"""{CALL}
local stream, delayed, consumers, dead = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local group, me = ARGV[1], ARGV[2]
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function deliveries(owner, id)
    local pending = call('XPENDING', stream, group, id, id, 1, owner)[1]
    return pending and pending[4]
end
local gone = {{}} -- entries that were deleted from the stream while no process had them in flight
local function move(id, owner, count)
    local moved = call('XCLAIM', stream, group, owner, 0, id, 'RETRYCOUNT', count, 'JUSTID')
    if #moved == 0 then gone[#gone + 1] = id end -- Redis 6 moves it, and TAKE finds out
end
local function rest(first)
    local values = {{}}
    for at = first, #ARGV do values[#values + 1] = ARGV[at] end
    return values
end
local function exists(id)
    return #call('XRANGE', stream, id, id) > 0
end
local function named(pairs)
    local map = {{}}
    for at = 1, #pairs, 2 do map[pairs[at]] = pairs[at + 1] end
    return map
end
local function own_group()
    for _, info in ipairs(call('XINFO', 'GROUPS', stream)) do
        if info[2] == group then return named(info) end
    end
end
local function drop(id)
    call('XACK', stream, group, id)
    call('XDEL', stream, id)
end
-- With an id at least; of an entry with too many fields, the last of those that a consumer reads.
local function add(key, fields, id)
    local last, entry = named(fields), fields
    if #fields > {MOST_VALUES} then
        entry = {{}}
        for _, name in ipairs({{'body', 'id', 'type', 'headers', '{REASON}', '{ATTEMPTS}', '{DEAD_LETTERED_AT}', '{DUE}'}}) do
            if last[name] then entry[#entry + 1] = name entry[#entry + 1] = last[name] end
        end
    end
    if (last['id'] or '') == '' then entry[#entry + 1] = 'id' entry[#entry + 1] = id end
    call('XADD', key, '*', unpack(entry))
end
local function reject(id, reason, attempts, fields)
    local entry = call('XRANGE', stream, id, id)[1]
    if entry then fields = entry[2] end
    if fields then
        if #fields > {MOST_VALUES} then
            reason = reason .. ' (of its ' .. #fields / 2 .. ' fields, only body, id, type and headers are stored)'
        end
        for _, more in ipairs({{'{REASON}', reason, '{ATTEMPTS}', attempts, '{DEAD_LETTERED_AT}', now / 1000}}) do
            fields[#fields + 1] = tostring(more)
        end
        add(dead, fields, id)
    end
    drop(id)
end
"""
# Entries, as many as there is room for: {id, fields, attempt}; the milliseconds until another one is due; and those
# that are gone.
TAKE = f"""{COMMON}
local room, taken = tonumber(ARGV[3]), {{}}
local function take(id, count)
    local entry = call('XCLAIM', stream, group, me, 0, id, 'RETRYCOUNT', count)[1]
    if entry then
        taken[#taken + 1] = {{entry[1], entry[2], count % {ONE_CRASH}}}
    else
        drop(id)
        gone[#gone + 1] = id
    end
end
for _, id in ipairs(call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, room)) do
    call('ZREM', delayed, id)
    local ms, number = id:match('^(%d+)-(%d+)$') -- else another program added it
    if ms and #ms < 20 and #number < 20 then
        local count = deliveries('{DELAYED}', id)
        if count then take(id, count) end
    end
end
if room > #taken then
    local pending = call('XPENDING', stream, group, '-', '+', room - #taken, '{REQUEUED}')
    for _, row in ipairs(pending) do take(row[1], row[4]) end
end
local due = call('ZRANGE', delayed, 0, 0, 'WITHSCORES')[2]
return {{taken, due and math.max(0, due - now) or -1, gone}}
"""
# Renews the lease, and returns the ids of our entries. With sweep, also requeues the entries of dead consumers; and
# returns whether they have more, the entries that are gone, and what was trimmed unread: {count, before}.
RENEW = f"""{COMMON}
local lease, sweep, most = ARGV[3], ARGV[4], ARGV[5]
-- A server without free memory refuses this. Then no consumer counts as dead.
local renewed = redis.pcall('ZADD', consumers, now + lease, me)
if type(renewed) == 'table' then
    if not renewed.err:find('OOM', 1, true) then error(renewed.err .. ' (ZADD)', 0) end
    sweep = '0'
end
local mine = {{}}
for _, row in ipairs(call('XPENDING', stream, group, '-', '+', most, me)) do
    mine[#mine + 1] = row[1]
end
if sweep == '0' then return {{mine}} end
local more = 0
call('ZREMRANGEBYSCORE', consumers, '-inf', now - 10 * lease)
for _, info in ipairs(call('XINFO', 'CONSUMERS', stream, group)) do
    local name, lives_until = info[2], nil
    if name ~= '{REQUEUED}' and name ~= '{DELAYED}' then
        lives_until = call('ZSCORE', consumers, name)
        if not lives_until then lives_until = now + lease - info[6] end
    end
    if lives_until and tonumber(lives_until) <= now then
        local pending = call('XPENDING', stream, group, '-', '+', {AT_ONCE}, name)
        for _, row in ipairs(pending) do
            local count = row[4] + {ONE_CRASH}
            if count >= {CRASH_LIMIT} * {ONE_CRASH} then
                reject(row[1], '{CRASH_LIMIT} consumers died with it in flight', count % {ONE_CRASH} - 1)
            else
                move(row[1], '{REQUEUED}', count)
            end
        end
        if #pending < {AT_ONCE} then
            call('XGROUP', 'DELCONSUMER', stream, group, name)
            call('ZREM', consumers, name)
        else
            more = 1
        end
    end
end
-- Redis counts an entry as read when it is delivered, so those that were trimmed before are missing from its counts.
-- That is corrected, for the lag and the next look. Of what was read, the stream has only what is not acknowledged,
-- or also what another program left there: then the oldest entries are still there, and none was trimmed.
local trimmed, info = false, own_group()
if info['entries-read'] then
    local about, last = named(call('XINFO', 'STREAM', stream)), info['last-delivered-id']
    local unread = about['entries-added'] - info['entries-read']
    if unread > about['length'] - info['pending'] then
        local read = #call('XRANGE', stream, '-', last, 'COUNT', info['pending'] + 1)
        local count = unread - (about['length'] - read)
        if read <= info['pending'] and count > 0 then
            trimmed = {{count, about['recorded-first-entry-id']}}
            call('XGROUP', 'SETID', stream, group, last, 'ENTRIESREAD', info['entries-read'] + count)
        end
    end
end
return {{mine, more, gone, trimmed}}
"""
# Also entries that are no longer ours: the ack of a consumer wrongly counted as dead saves a redelivery.
ACK = f"""{CALL}
call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 3))
return call('XDEL', KEYS[1], unpack(ARGV, 3))
"""
# Returns the ids of entries that were trimmed, or deleted, while they were in flight; RETRY and REJECT return 2 then.
REQUEUE = f"""{COMMON}
local trimmed = {{}}
for at = 3, #ARGV do
    local count = deliveries(me, ARGV[at])
    if count and exists(ARGV[at]) then
        move(ARGV[at], '{REQUEUED}', count)
    elseif count then
        trimmed[#trimmed + 1] = ARGV[at]
    end
end
return trimmed
"""
RETRY = f"""{COMMON}
local id, delay = ARGV[3], ARGV[4]
local count = deliveries(me, id)
if not count then return 0 end
if not exists(id) then return 2 end
move(id, '{DELAYED}', count + 1)
call('ZADD', delayed, now + delay, id)
return 1
"""
# With the fields that the process holds, if the entry was trimmed.
REJECT = f"""{COMMON}
local id, reason, fields = ARGV[3], ARGV[4], nil
local count = deliveries(me, id)
if not count then return 0 end
if #ARGV > 4 then
    fields = rest(5)
elseif not exists(id) then
    return 2
end
reject(id, reason, count % {ONE_CRASH}, fields)
return 1
"""
# Adds a trimmed entry again, with the fields that the process holds: to be retried after the delay, or requeued.
RESTORE = f"""{COMMON}
local id, failed, delay = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local count = deliveries(me, id)
if not count then return 0 end
local fields = rest(6)
for _, more in ipairs({{'{ATTEMPTS}', count % {ONE_CRASH} - 1 + failed, '{DUE}', string.format('%.0f', now + delay)}}) do
    fields[#fields + 1] = tostring(more)
end
add(stream, fields, id)
drop(id)
return 1
"""
# Delays an entry that was added again, and has just been read as a new one.
DELAY = f"""{COMMON}
local id, count, due = ARGV[3], ARGV[4], ARGV[5]
if deliveries(me, id) then
    move(id, '{DELAYED}', count)
    call('ZADD', delayed, due, id)
end
return 1
"""
LEAVE = f"""{COMMON}
local left = 0
repeat
    local pending = call('XPENDING', stream, group, '-', '+', {AT_ONCE}, me)
    for _, row in ipairs(pending) do move(row[1], '{REQUEUED}', row[4]) end
    left = #pending
until left == 0
call('XGROUP', 'DELCONSUMER', stream, group, me)
call('ZREM', consumers, me)
return 1
"""
COUNT = f"""{COMMON}
local pending, requeued, waiting = 0, 0, call('ZCARD', delayed)
local late = call('ZCOUNT', delayed, '-inf', now)
for _, info in ipairs(call('XINFO', 'CONSUMERS', stream, group)) do
    pending = pending + info[4]
    if info[2] == '{REQUEUED}' then requeued = info[4] end
end
-- What the group has not read yet: entries that another program acknowledged may be left in the stream. Redis knows
-- the lag if no later entry was deleted; Redis 6 never does.
local length, info = call('XLEN', stream), own_group()
local unread = info['lag']
if not unread and info['entries-read'] then
    unread = named(call('XINFO', 'STREAM', stream))['entries-added'] - info['entries-read']
end
unread = math.max(0, math.min(unread or length - pending, length))
return {{
    unread + requeued + late, waiting - late,
    pending - requeued - waiting, call('XLEN', dead),
    call('ZCOUNT', consumers, '(' .. now, '+inf')
}}
"""
# Moves the oldest dead letters up to this id; returns how many.
REPLAY = f"""{COMMON}
local letters = call('XRANGE', dead, '-', ARGV[3], 'COUNT', {AT_ONCE})
for _, letter in ipairs(letters) do
    local fields = {{}}
    for at = 1, #letter[2], 2 do
        local name = letter[2][at]
        if name ~= '{REASON}' and name ~= '{ATTEMPTS}' and name ~= '{DEAD_LETTERED_AT}' and name ~= '{DUE}' then
            fields[#fields + 1] = name
            fields[#fields + 1] = letter[2][at + 1]
        end
    end
    add(stream, fields, letter[1])
    call('XDEL', dead, letter[1])
end
return #letters
"""
PURGE = f"""{COMMON}
local count = call('XLEN', dead)
call('UNLINK', dead)
return count
"""

SCRIPT_OF = {"ack": ACK, "requeue": REQUEUE, "retry": RETRY, "reject": REJECT}

RULES = (
    Rule(
        AuthenticationError,
        BrokerDenied,
        "the server refused the user name or the password, or requires one",
    ),
    Rule(NoPermissionError, BrokerDenied, "{error}"),
    Rule(ResponseError, BrokerDenied, "{error}", "user executing the script"),
    Rule(ResponseError, BrokerDenied, "{error}", "ACL failure in script"),  # Redis 8
    Rule(
        MovedError,
        BrokerRefused,
        "the stream is on another node of this cluster ({error}): name that node in the URL, and write "
        "CONSUMER_SOURCE with braces, {{orders}}, so that its keys stay together",
    ),
    Rule(
        ClusterCrossSlotError,
        BrokerRefused,
        "the server is a cluster: write CONSUMER_SOURCE with braces, {{orders}}, so that its keys stay together",
    ),
    Rule(
        ResponseError,
        BrokerUnavailable,
        "the stream or its group was deleted",
        "NOGROUP|the stream key no longer exists",
    ),
    Rule(
        (ReadOnlyError, ResponseError),
        BrokerUnavailable,
        "the server is a read-only replica, no primary: {error}",
        "READONLY|read only replica|instance state changed",
    ),
    # These pass by themselves, or with the next connection. In a script's error the type is a word of the text.
    Rule(
        (ClusterDownError, OutOfMemoryError, TryAgainError),
        BrokerUnavailable,
        "{error}",
    ),
    Rule(
        ResponseError,
        BrokerUnavailable,
        "{error}",
        "MASTERDOWN|CLUSTERDOWN|TRYAGAIN|OOM|MISCONF|NOREPLICAS|BUSY ",
    ),
    Rule(ResponseError, BrokerRefused, "the server refused: {error}"),
    Rule(DataError, BrokerRefused, "this cannot be sent: {error}"),
)

Command = tuple[Any, ...]


class RedisUrl(BrokerUrl):
    """Raises BrokerRefused if the URL cannot be read."""

    def __init__(self, text: str) -> None:
        like = "redis://user:password@host:6379/0 or unix:///path?db=0"
        super().__init__(text, like=like, options=OPTIONS, default_port=6379)
        database = self.path.strip("/")
        if self.scheme == "unix":
            self.redacted = f"unix:///{self.path}"
        elif len(self.hosts) != 1 or (database and not database.isdecimal()):
            raise self.unreadable()
        self.lease_seconds = self.number("lease_seconds", LEASE_SECONDS, at_least=0.1)
        options = {name: value for name, value in self.options.items() if name != "lease_seconds"}
        try:
            pool: Any = ConnectionPool.from_url(  # redis-py's types leave some methods out
                urlsplit(text)._replace(query=urlencode(options)).geturl(),
                protocol=2,  # of which this file reads the answers; in 3 they have other shapes
                socket_timeout=ANSWER_SECONDS,
                socket_connect_timeout=CONNECT_SECONDS,
                retry=Retry(NoBackoff(), 0),
                driver_info=None,
            )
            pool.make_connection()
        except (ValueError, TypeError, RedisError):
            msg = "CONSUMER_BROKER_URL: an option has a value that redis-py does not accept"
            raise BrokerRefused(msg) from None
        self.pool = pool
        """Makes connections; it keeps none."""


class Wire:
    """One connection, opened when it is needed. One caller at a time; the commands of a call travel together.

    ``reopens``: also when it was lost while unused; for callers that need no state of the connection.

    Below redis-py's client: its pool hands out any connection, and this must be the one that can be unblocked
    and cut. A cancelled caller loses the connection, since its answers would be the next one's.
    """

    def __init__(self, pool: Any, requests: Requests, *, reopens: bool) -> None:
        self._requests = requests
        self._reopens = reopens
        self._connection: Any = pool.make_connection()
        self._transport: asyncio.WriteTransport | None = None
        self._turn = asyncio.Lock()

    async def ask(self, *commands: Command) -> list[Any]:
        """The answers. Raises BrokerUnavailable, or BrokerRefused for the first that is an error."""
        answers = await self.try_all(*commands)
        for answer in answers:
            if isinstance(answer, RedisError):
                raise self._requests.translated(answer) from answer
        return answers

    async def try_all(self, *commands: Command) -> list[Any]:
        """The answers, errors among them. Raises BrokerUnavailable, or BrokerRefused while connecting."""
        connection = self._connection
        answers: list[Any] = []
        async with self._turn, self._requests.bounded(math.inf):  # redis-py bounds each answer
            try:
                if self._is_lost():
                    await self.cut()
                    if not self._reopens:
                        raise self._requests.lost()
                if not connection.is_connected:
                    await self._connect()
                await connection.send_packed_command(connection.pack_commands(commands))
                for _ in commands:
                    try:
                        answers.append(await connection.read_response())
                    except ResponseError as error:
                        answers.append(error)
            except BaseException:
                await self.cut()
                raise
        return answers

    async def _connect(self) -> None:
        async with self._requests.bounded(CONNECT_SECONDS):
            try:
                await self._connection.connect()
            except RedisError as error:
                if self._requests.address.startswith("rediss:"):
                    error.__cause__ = (
                        error.__context__
                    )  # of ssl, which redis-py does not name as the cause
                raise
        self._transport = self._connection._writer.transport

    def _is_lost(self) -> bool:
        reader = self._connection._reader
        return reader is not None and (reader.at_eof() or reader.exception() is not None)

    async def cut(self) -> None:
        """Close at once: a graceful close, as redis-py's, waits long for an unresponsive peer."""
        await self._connection.disconnect(nowait=True)
        if self._transport is not None:
            self._transport.abort()


class EntryId(bytes):
    """The receipt of a message, with what the entry holds: it may be trimmed from the stream meanwhile."""

    fields: list[bytes]


class Settlement(NamedTuple):
    verb: str
    message: Message
    arguments: tuple[Any, ...]

    @property
    def id(self) -> bytes:
        return self.message.receipt  # type: ignore[no-any-return]

    @property
    def fields(self) -> list[bytes]:
        """Of the entry, but for what is ours."""
        fields: list[bytes] = []
        for name, value in _pairs(self.message.receipt.fields):
            if name not in (ATTEMPTS.encode(), DUE.encode()):
                fields += [name, value]
        return fields


class RedisBroker(Broker):
    """One stream and its group. Raises BrokerRefused if the URL cannot be used. Headers must be JSON values."""

    capabilities = Capabilities(
        delayed_retry=True, attempts=True, requeue=True, dead_letters=True, order=True
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        self._stream = settings.source
        self._group = settings.group or settings.source
        self._dead = f"{self._stream}.dead"
        self._keys = (
            self._stream,
            f"{self._stream}.{DELAYED}",
            f"{self._stream}.consumers",
            self._dead,
        )
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._url = RedisUrl(settings.broker_url.get_secret_value())
        self.connectivity = Connectivity(self._url.redacted)
        self._requests = Requests(self._url.redacted, (RedisError,), RULES)
        self._commands = Wire(self._url.pool, self._requests, reopens=True)  # for all but reading
        self._entered = False
        self._declared = False
        self._began_after = ""  # an entry's id
        self._closing = asyncio.Event()
        self._fetching = False
        self._stop_by = 0.0  # event loop time
        self._reader_id = 0
        self._not_reading = asyncio.Event()
        self._not_reading.set()
        self._wake = asyncio.Event()  # of the fetcher: the buffer may have room
        self._work = asyncio.Event()  # of the writer
        self._written = asyncio.Event()
        self._written.set()
        self._by_id: dict[bytes, Message] = {}  # the unacked messages
        self._unwritten: dict[
            bytes, Settlement
        ] = {}  # by the entry's id, until the server confirms
        self._fetcher: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        try:
            await self._check_types()
        except BaseException:
            await self._commands.cut()
            raise
        self._entered = True
        self.connectivity.established()
        return self

    async def declare(self) -> None:
        await self._declare(self._commands)
        self._declared = True

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()
        for message in self.unacked:
            await self._requeue(message)
        self._closing.set()
        self._wake.set()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._fetcher is not None:
                    await asyncio.wait({self._fetcher})
                if self._fetcher is not None and self.connectivity.up:
                    await self._written.wait()
                    await self._commands.ask(self._eval(LEAVE))
        except BrokerRefused as error:
            log.warning("close_failed", broker=self._url.redacted, reason=str(error))
        except (TimeoutError, BrokerError) as error:
            log.debug("close_failed", broker=self._url.redacted, reason=str(error))
        finally:
            self._entered = self.connectivity.up = False
            tasks = {task for task in (self._fetcher, self._writer) if task is not None}
            while tasks:
                for task in tasks:
                    task.cancel()  # again, if a request that had just ended lost the first
                _, tasks = await asyncio.wait(tasks, timeout=0.2)
            await self._commands.cut()
            for settlement in self._unwritten.values():
                log_settlement_lost(settlement.message, settlement.verb, "the connection was lost")
            for collection in (self._unwritten, self._by_id, self.unacked):
                collection.clear()
            await asyncio.sleep(0)  # the transports that were cut close their sockets now

    @property
    def connected(self) -> bool:
        return self._entered and self.connectivity.up

    def _eval(self, script: str, *arguments: Any) -> Command:
        keys = self._keys
        return ("EVAL", script, len(keys), *keys, self._group, self._consumer, *arguments)

    async def _check_types(self) -> None:
        """Raises BrokerRefused if one of the keys has another type."""
        answers = await self._commands.ask(*(("TYPE", key) for key in self._keys))
        for key, found, type in zip(self._keys, answers, TYPES, strict=True):
            if found not in (type, b"none"):
                msg = f"the key {key!r} already exists, and is a {found.decode()} and no {type.decode()}"
                raise BrokerRefused(msg)

    async def _declare(self, wire: Wire) -> None:
        """The group, from the stream's first entry on. Raises BrokerRefused if it would not be the only one.

        A group that was deleted begins again where it was when this process saw it first: entries that were
        acknowledged before that, and left in the stream, are done.
        """
        groups = await self._groups(wire)
        self._expect_no_other_group(groups)
        if groups and self._group in groups:
            if not self._began_after:
                (pending,) = await wire.ask(("XPENDING", self._stream, self._group))
                first = _before(text_of(pending[1])) if pending[0] else groups[self._group]
                self._began_after = first
            return
        begin = "0"
        if groups is not None and self._began_after:
            (about,) = await wire.ask(("XINFO", "STREAM", self._stream))
            newest = text_of(dict(_pairs(about))[b"last-generated-id"])
            begin = self._began_after if _order(newest) >= _order(self._began_after) else "0"
        (created,) = await wire.try_all(
            ("XGROUP", "CREATE", self._stream, self._group, begin, "MKSTREAM")
        )
        if isinstance(created, RedisError) and not str(created).startswith("BUSYGROUP"):
            raise self._requests.translated(created) from created
        self._began_after = begin

    async def _groups(self, wire: Wire) -> dict[str, str] | None:
        """The stream's groups, and the last entry that each has read; None if there is no stream."""
        (groups,) = await wire.try_all(("XINFO", "GROUPS", self._stream))
        if not isinstance(groups, RedisError):
            return {text_of(group[1]): text_of(group[7]) for group in groups}
        if "no such key" not in str(groups):
            raise self._requests.translated(groups) from groups
        return None

    def _expect_no_other_group(self, groups: Collection[str] | None) -> None:
        if others := {*(groups or ())} - {self._group}:
            msg = (
                f"the stream {self._stream!r} has another group, {min(others)!r}, which would miss the entries that "
                "this one acknowledges, since they are deleted: set CONSUMER_GROUP to it, or XGROUP DESTROY it, or "
                "publish to one stream for each"
            )
            raise BrokerRefused(msg)

    async def describe(self) -> dict[str, int | str]:
        groups = await self._groups(self._commands)
        self._expect_no_other_group(groups)
        (info,) = await self._commands.try_all(("INFO",))
        described: dict[str, int | str] = {} if isinstance(info, RedisError) else _describe(info)
        if not groups:
            missing = self._stream if groups is None else f"{self._stream} group {self._group}"
            return described | {missing: MISSING, self._dead: await self.count_dead_letters()}
        ((ready, delayed, in_flight, dead, consumers),) = await self._commands.ask(
            self._eval(COUNT)
        )
        return described | {
            self._stream: ready,
            f"{self._stream} delayed": delayed,
            f"{self._stream} in flight": in_flight,
            self._dead: dead,
            f"{self._stream} consumers": consumers,
        }

    # -- fetching: one task reads, renews the lease, and looks for the entries of dead consumers

    async def start(self) -> None:
        # A lease before it is ready, so that no consumer counts it as dead.
        await self._commands.ask(self._renew_command(sweep=False))
        self._fetching = True
        self._fetcher = asyncio.create_task(self._fetch(), name="redis-fetcher")
        self._writer = asyncio.create_task(self._write(), name="redis-settlements")

    async def _stop_fetching(self) -> None:
        self._fetching = False
        self._stop_by = asyncio.get_running_loop().time() + STOP_SECONDS
        if self._not_reading.is_set() or not self.connectivity.up:
            return
        with suppress(TimeoutError, BrokerError):
            async with asyncio.timeout_at(self._stop_by):
                # Never cancelled: the entries of its last answer would be lost until the next sweep.
                await self._commands.try_all(("CLIENT", "UNBLOCK", self._reader_id))
                await self._not_reading.wait()

    async def _flush(self) -> None:
        if self._fetcher is not None and self.connectivity.up:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._stop_by):
                    await self._written.wait()

    async def _fetch(self) -> None:
        try:
            await self.connectivity.keep(self._consume, self._closing)
        except Exception as failure:
            self.connectivity.up = False
            self.buffer.fail(failure)
        finally:
            self._not_reading.set()

    async def _consume(self) -> None:
        """The life of one connection. It goes on after `stop`: in-flight entries need the lease."""
        loop = asyncio.get_running_loop()
        lease = self._url.lease_seconds
        reader = Wire(self._url.pool, self._requests, reopens=False)
        try:
            if self._declared:
                await self._declare(reader)
            await self._renew(reader, sweep=False)
            (reader_id,) = await reader.try_all(("CLIENT", "ID"))
            self._reader_id = reader_id if isinstance(reader_id, int) else 0
            self.connectivity.established()
            # After an outage that affected all consumers, the others get the time to renew their leases.
            sweep_from = loop.time() + lease
            renew_at = loop.time() + lease / 3
            look_at = 0.0
            while not self._closing.is_set():
                if loop.time() >= renew_at:
                    more = await self._renew(reader, sweep=loop.time() >= sweep_from)
                    renew_at = loop.time() + (0 if more else lease / 3)
                room = self._room()
                if room <= 0:
                    if not await self._wait_for_room(min(renew_at, loop.time() + CHECK_SECONDS)):
                        await reader.ask(("PING",))
                    await _while_it_grows(self._room, self.prefetch // 2)
                elif loop.time() >= look_at:
                    seconds, full = await self._take(reader, room)
                    look_at = loop.time() + (0 if full else min(seconds, POLL_SECONDS))
                else:
                    await self._read(reader, room, look_at - loop.time())
        finally:
            self._not_reading.set()
            await reader.cut()

    def _room(self) -> int:
        """Evaluate just before reading, with no await in between."""
        return self.prefetch - len(self.unacked) if self._fetching else 0

    async def _wait_for_room(self, until: float) -> bool:
        """Until a message was settled, or this time has come. Returns whether it was the first."""
        self._wake.clear()
        self._not_reading.set()
        loop = asyncio.get_running_loop()
        timer = loop.call_at(until, self._wake.set)
        if not self._closing.is_set():
            await self._wake.wait()
        timer.cancel()
        return loop.time() < until

    async def _read(self, reader: Wire, room: int, seconds: float) -> None:
        self._not_reading.clear()
        (streams,) = await reader.ask(
            (
                *("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", room),
                *("BLOCK", max(1, math.ceil(seconds * 1000)), "STREAMS", self._stream, ">"),
            )
        )
        for _, entries in streams or ():
            for id, fields in entries:
                await self._receive(reader, id, fields, 1)

    async def _take(self, reader: Wire, room: int) -> tuple[float, bool]:
        """Requeued and due entries; the seconds until another is due, and whether there may be more now."""
        self._not_reading.clear()
        ((taken, due_ms, gone),) = await reader.ask(self._eval(TAKE, min(room, AT_ONCE)))
        self._warn_of_gone(gone)
        for entry in taken:
            await self._receive(reader, *entry)
        return (due_ms / 1000 if due_ms >= 0 else math.inf), len(taken) == min(room, AT_ONCE)

    async def _receive(self, reader: Wire, id: bytes, fields: list[bytes], attempt: int) -> None:
        if id in self._by_id or id in self._unwritten:
            return  # redelivered to this consumer, after it counted as dead
        if DUE.encode() in fields and attempt == 1:
            named = dict(_pairs(fields))
            failures = min(count_of(named.get(ATTEMPTS.encode())), ONE_CRASH - 2)
            due_ms = min(math.ceil(seconds_of(named.get(DUE.encode()))), FAR_OFF_MS)
            if failures:
                await reader.ask(self._eval(DELAY, id, failures + 1, due_ms))
                return
        message = self._by_id[id] = _make_message(id, fields, attempt)
        message.receipt = EntryId(id)
        message.receipt.fields = fields
        if not self._deliver(message):
            await self.requeue(message)

    def _release(self, message: Message) -> None:
        super()._release(message)
        if self._by_id.get(message.receipt) is message:
            del self._by_id[message.receipt]
        self._wake.set()

    def _renew_command(self, *, sweep: bool) -> Command:
        lease_ms = math.ceil(self._url.lease_seconds * 1000)
        return self._eval(RENEW, lease_ms, int(sweep), self.prefetch + AT_ONCE)

    async def _renew(self, reader: Wire, *, sweep: bool) -> bool:
        """Renew the lease, and compare this consumer's entries with the messages in this process.

        Returns whether dead consumers have more entries than one sweep requeues.
        """
        known = {*self._by_id, *self._unwritten}
        ((mine, *swept),) = await reader.ask(self._renew_command(sweep=sweep))
        ours = set(mine)
        for message in self.buffer.take_all():
            if message.receipt in ours:
                self.buffer.put(message)
            else:
                self._release(message)
        if strays := ours - known:  # of an answer that never came, or their settlement was lost
            (gone,) = await reader.ask(self._eval(REQUEUE, *list(strays)[:AT_ONCE]))
            self._warn_of_gone(gone)
        if not swept:
            return False
        more, gone, trimmed = swept
        self._warn_of_gone(gone)
        if trimmed:
            count, before = trimmed
            log.warning(
                "messages_trimmed",
                source=self._stream,
                count=count,
                before=text_of(before),
                reason="the entries were trimmed from the stream before they were read",
            )
        return bool(more)

    def _warn_of_gone(self, ids: list[bytes]) -> None:
        if ids:
            log.warning(
                "messages_trimmed",
                source=self._stream,
                count=len(ids),
                ids=[text_of(id) for id in ids[:10]],
                reason="the entries were trimmed from the stream while no process had them in flight",
            )

    # -- settling: one task writes

    def _ack(self, message: Message) -> Coroutine[Any, Any, None]:
        return self._settle(message, "ack")

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        await self._settle(message, "retry", math.ceil(delay_seconds * 1000))

    async def _reject(self, message: Message, reason: str) -> None:
        await self._settle(message, "reject", text_of(reason))

    def _requeue(self, message: Message) -> Coroutine[Any, Any, None]:
        return self._settle(message, "requeue")

    async def _settle(self, message: Message, verb: str, *arguments: Any) -> None:
        self._unwritten[message.receipt] = Settlement(verb, message, arguments)
        self._written.clear()
        self._work.set()

    async def _write(self) -> None:
        failures = 0
        try:
            while await self._work.wait():
                await _while_it_grows(self._unwritten.__len__, self.prefetch // 2)
                self._work.clear()
                try:
                    await self._write_batch()
                    failures = 0
                except BrokerError as error:  # they stay, and so does the lease
                    failures += 1
                    log.debug("write_failed", broker=self._url.redacted, reason=str(error))
                    await asyncio.sleep(backoff_seconds(failures, 0.1, 1))
                if self._unwritten:
                    self._work.set()
                else:
                    self._written.set()
        except Exception as failure:
            self.buffer.fail(failure)

    async def _write_batch(self) -> None:
        batch = list(self._unwritten.values())[:AT_ONCE]
        steps: list[tuple[list[Settlement], Command]] = []
        for verb in ("ack", "requeue"):
            if together := [one for one in batch if one.verb == verb]:
                command = self._eval(SCRIPT_OF[verb], *(one.id for one in together))
                steps.append((together, command))
        steps += [
            ([one], self._eval(SCRIPT_OF[one.verb], one.id, *one.arguments))
            for one in batch
            if one.verb in ("retry", "reject")
        ]
        trimmed: list[tuple[list[Settlement], Command]] = []
        written, kept, outage = await self._write_steps(steps)
        for settlements, answer in written:
            gone = answer
            if settlements[0].verb in ("ack", "retry", "reject"):
                gone = [settlements[0].id] if settlements[0].verb != "ack" and answer == 2 else []
            trimmed += [([one], self._restoring(one)) for one in settlements if one.id in gone]
        _, kept_too, outage_too = await self._write_steps(trimmed)
        for settlement in batch:
            if self._unwritten.get(settlement.id) is settlement:  # else settled again meanwhile
                del self._unwritten[settlement.id]
                if settlement.id in kept | kept_too:  # behind the others
                    self._unwritten[settlement.id] = settlement
        if error := outage or outage_too:
            await self._commands.cut()  # another connection may lead to another server
            raise error

    async def _write_steps(
        self, steps: list[tuple[list[Settlement], Command]]
    ) -> tuple[list[tuple[list[Settlement], Any]], set[bytes], BrokerUnavailable | None]:
        """The answers of those that were written; and the ids of those to write again, with the reason."""
        written: list[tuple[list[Settlement], Any]] = []
        kept: set[bytes] = set()
        outage: BrokerUnavailable | None = None
        answers = await self._commands.try_all(*(command for _, command in steps)) if steps else []
        for (settlements, _), answer in zip(steps, answers, strict=True):
            if isinstance(answer, RedisError):
                error = self._requests.translated(answer)
                if isinstance(error, BrokerUnavailable):
                    outage = outage or error
                    kept |= {one.id for one in settlements}
                    continue
                for one in settlements:
                    await self._on_refused(one, error)
            elif answer == 0 and settlements[0].verb in ("retry", "reject"):
                log_settlement_lost(
                    settlements[0].message, settlements[0].verb, "its lease had expired"
                )
            else:
                written.append((settlements, answer))
        return written, kept, outage

    async def _on_refused(self, settlement: Settlement, error: BrokerError) -> None:
        verb, message, arguments = settlement
        if verb in ("ack", "requeue"):
            log_settlement_lost(message, verb, error)
            return
        self.unacked.add(message)
        self._by_id[message.receipt] = message
        if verb == "retry":
            await self._put_off(message, verb, error, "", arguments[0] / 1000)
        else:
            await self._put_off(message, verb, error, arguments[0])

    def _restoring(self, settlement: Settlement) -> Command:
        """Write the message from what this process holds: its entry was trimmed while it was in flight."""
        id, arguments, fields = settlement.id, settlement.arguments, settlement.fields
        if settlement.verb == "reject":
            return self._eval(REJECT, id, *arguments, *fields)
        failed, delay = (1, arguments[0]) if settlement.verb == "retry" else (0, 0)
        return self._eval(RESTORE, id, failed, delay, *fields)

    # -- publishing

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        for start in range(0, len(messages), AT_ONCE):
            await self._commands.ask(
                *(
                    ("XADD", self._stream, "*", *_fields(message))
                    for message in messages[start : start + AT_ONCE]
                )
            )

    # -- dead letters

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        after = "-"
        while limit > 0:
            (letters,) = await self._commands.ask(
                ("XRANGE", self._dead, after, "+", "COUNT", min(limit, AT_ONCE))
            )
            if not letters:
                return
            for id, fields in letters:
                yield _make_dead_letter(id, fields)
            limit -= len(letters)
            after = f"({letters[-1][0].decode()}"

    async def count_dead_letters(self) -> int:
        (count,) = await self._commands.ask(("XLEN", self._dead))
        return int(count)

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        moved = 0
        (newest,) = await self._commands.ask(("XREVRANGE", self._dead, "+", "-", "COUNT", 1))
        while newest:
            (count,) = await self._commands.ask(self._eval(REPLAY, newest[0][0]))
            if not count:
                return
            moved += count
            yield moved

    async def purge_dead_letters(self) -> AsyncIterator[int]:
        (count,) = await self._commands.ask(self._eval(PURGE))
        yield int(count)


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> RedisBroker:
    return RedisBroker(settings, prefetch)


async def _while_it_grows(size: Callable[[], int], enough: int) -> None:
    """Wait while settlements come every few turns of the event loop, so that they are sent together."""
    seen = 0
    while seen < size() < enough:
        seen = size()
        for _ in range(QUIET_TURNS):
            await asyncio.sleep(0)


def _fields(message: OutgoingMessage) -> list[str | bytes]:
    fields: list[str | bytes] = [BODY, message.body, ID, message.id]
    if message.type:
        fields += [TYPE, message.type]
    if message.headers:
        try:
            fields += [HEADERS, json.dumps(dict(message.headers))]
        except (TypeError, ValueError) as error:
            msg = f"this message cannot be sent: {error}"
            raise BrokerRefused(msg) from error
    return fields


def _order(id: str) -> tuple[int, int]:
    """Of an entry's id, as the server compares them."""
    milliseconds, _, number = id.partition("-")
    return int(milliseconds), int(number or 0)


def _before(id: str) -> str:
    """The id before this one: a group reads what comes after an id."""
    milliseconds, number = _order(id)
    return f"{milliseconds}-{number - 1}" if number else f"{milliseconds - 1}-{2**64 - 1}"


def _pairs(fields: list[Any]) -> Iterator[tuple[bytes, Any]]:
    values = iter(fields)
    return zip(values, values, strict=True)


def _make_message(id: bytes, fields: list[bytes], attempt: int) -> Message:
    named = dict(_pairs(fields))
    headers = named.get(HEADERS)
    return make_message(
        named.get(BODY, b""),
        id=named.get(ID) or id,
        type=named.get(TYPE),
        headers=json_object(text_of(headers)) if headers else {},  # json is slower with bytes
        failures=attempt - 1,
        receipt=id,
    )


def _make_dead_letter(id: bytes, fields: list[bytes]) -> DeadLetter:
    message = _make_message(id, fields, 1)
    named = {text_of(name): value for name, value in _pairs(fields)}
    return make_dead_letter(
        message.body,
        id=message.id,
        type=message.type,
        reason=named.get(REASON),
        attempts=named.get(ATTEMPTS),
        dead_lettered_at=named.get(DEAD_LETTERED_AT),
    )


def _describe(info: bytes) -> dict[str, int | str]:
    """The server's version, and the settings of it that endanger messages."""
    named = dict(line.split(":", 1) for line in text_of(info).splitlines() if ":" in line)
    name, version = "Redis", named.get("redis_version", "")
    if "valkey_version" in named:
        name, version = "Valkey", named["valkey_version"]
    described: dict[str, int | str] = {"server": f"{name} {version}", "appendonly": "yes"}
    if named.get("aof_enabled") == "0":
        described["appendonly"] = "no: a crash of the server loses all since its last snapshot"
    policy = named.get("maxmemory_policy", "noeviction")
    if named.get("maxmemory", "0") != "0" and policy != "noeviction":
        described["eviction"] = f"{policy}: a server that is full deletes messages"
    return described
