# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""Redis Streams, on Redis 6.2 or later or Valkey, by redis-py: one stream with one consumer group.

``redis://user:password@host:6379/0``, ``rediss://`` with ``?ssl_ca_certs=ca.pem&ssl_certfile=me.pem&ssl_keyfile=me.key``,
or ``unix:///path/redis.sock?db=0``. What a password may not hold in a URL is percent-encoded.

For ``CONSUMER_SOURCE=orders`` the keys are the stream ``orders``, the stream ``orders.dead``, the sorted set
``orders.delayed`` (entries that wait for a retry, by the time when they are due) and the sorted set
``orders.consumers`` (who lives, by the time when its lease ends). On a cluster the source is called
``{orders}``, so that all four are in one slot.

An entry stays where it is in the stream until it is acknowledged, and is deleted then; so it keeps its place,
and a stream has one group. What changes is whose it is in the group: a consumer's, or that of one of two
names which nobody has. ``delayed`` waits for its retry; ``returned`` is for whoever has room. A consumer looks
there four times a second, before it reads what is new.

A consumer renews its lease while it lives, also while a handler runs for hours. When the lease has ended,
another one returns what was in its hand. ``?lease_seconds=30`` in the URL says after how long; an event
loop that is blocked for longer counts as dead. All times are those of the server's clock.
"""

import asyncio
import json
import math
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from ssl import SSLEOFError, SSLError, SSLZeroReturnError
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import structlog
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    DataError,
    MovedError,
    RedisError,
    ResponseError,
)

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .source import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    Capabilities,
    Connectivity,
    Source,
    backoff_seconds,
    headers_from,
    log_settlement_lost,
)

log = structlog.get_logger()

LEASE_SECONDS = 30.0
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 5.0
"""How long the server may say nothing before that is an outage."""
CHECK_SECONDS = 1.0
"""How often a connection on which nothing is to be read is looked after."""
POLL_SECONDS = 0.25
"""How long a read waits for new entries before what was returned is looked for."""
STOP_SECONDS = 1.5
CLOSE_SECONDS = 2.5
QUIET_TURNS = 3
"""So many turns of the event loop without another settlement end a batch of them."""
AT_ONCE = 500
"""Entries per command: other clients of the server get their turn, and Lua's stack has an end."""
CRASH_LIMIT = 100
"""When so many consumers died with a message in hand, the message is taken for the cause."""

TYPES = (b"stream", b"zset", b"zset", b"stream")
RETURNED, DELAYED = "returned", "delayed"
"""Nobody's names in the group; see the module."""
BODY, ID, TYPE, HEADERS = b"body", b"id", b"type", b"headers"
"""Fields of an entry. Others are kept, and not looked at. The headers are a JSON object."""
REASON, ATTEMPTS, DEAD_LETTERED_AT = (
    b"x-consumer-reason",
    b"x-consumer-attempts",
    b"x-consumer-dead-lettered-at",
)
"""Fields that a dead letter has besides: its death in Unix seconds."""

OPTIONS = {
    "db", "lease_seconds", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_check_hostname",
    "ssl_cert_reqs", "ssl_ciphers", "ssl_keyfile", "ssl_min_version", "ssl_password",
}  # fmt: skip

# The group counts the deliveries of each entry that is pending. The scripts keep that count as one of their
# own: the attempt, and in its upper bits how many consumers died with the entry in hand.
ONE_CRASH = 2**20  # more than CONSUMER_MAX_ATTEMPTS can be
COMMON = f"""
local stream, delayed, consumers, dead = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local group, me = ARGV[1], ARGV[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function deliveries(owner, id)
    local pending = redis.call('XPENDING', stream, group, id, id, 1, owner)[1]
    return pending and pending[4]
end
local function move(id, owner, count)
    redis.call('XCLAIM', stream, group, owner, 0, id, 'RETRYCOUNT', count, 'JUSTID')
end
local function drop(id)
    redis.call('XACK', stream, group, id)
    redis.call('XDEL', stream, id)
end
local function bury(id, reason, attempts)
    local entry = redis.call('XRANGE', stream, id, id)[1]
    if entry then
        local fields, named = entry[2], false
        for at = 1, #fields, 2 do named = named or fields[at] == '{ID.decode()}' end
        if not named then fields[#fields + 1] = '{ID.decode()}' fields[#fields + 1] = id end
        for _, more in ipairs({{
            '{REASON.decode()}', reason, '{ATTEMPTS.decode()}', attempts, '{DEAD_LETTERED_AT.decode()}', now / 1000
        }}) do fields[#fields + 1] = tostring(more) end
        redis.call('XADD', dead, '*', unpack(fields))
    end
    drop(id)
end
"""
# With as many entries as there is room for: {id, fields, attempt}; and the milliseconds until another is due.
TAKE = f"""{COMMON}
local room, taken = tonumber(ARGV[3]), {{}}
local function take(id, count)
    local entry = redis.call('XCLAIM', stream, group, me, 0, id, 'RETRYCOUNT', count)[1]
    if entry then
        taken[#taken + 1] = {{entry[1], entry[2], count % {ONE_CRASH}}}
    else
        drop(id) -- somebody deleted it from the stream
    end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, room)) do
    redis.call('ZREM', delayed, id)
    local count = deliveries('{DELAYED}', id)
    if count then take(id, count) end
end
if room > #taken then
    local pending = redis.call('XPENDING', stream, group, '-', '+', room - #taken, '{RETURNED}')
    for _, row in ipairs(pending) do take(row[1], row[4]) end
end
local due = redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')[2]
return {{taken, due and math.max(0, due - now) or -1}}
"""
# Returns the ids of what is ours. With sweep, also returns to the group what is in dead consumers' hands.
BEAT = f"""{COMMON}
local lease, sweep, most = ARGV[3], ARGV[4], ARGV[5]
-- A server that has no memory left refuses this. Then nobody may be taken for dead.
local renewed = redis.pcall('ZADD', consumers, now + lease, me)
if type(renewed) == 'table' then sweep = '0' end
local mine = {{}}
for _, row in ipairs(redis.call('XPENDING', stream, group, '-', '+', most, me)) do
    mine[#mine + 1] = row[1]
end
if sweep == '0' then return mine end
redis.call('ZREMRANGEBYSCORE', consumers, '-inf', now - 10 * lease)
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local name, lives_until = info[2], nil
    if name ~= '{RETURNED}' and name ~= '{DELAYED}' then
        lives_until = redis.call('ZSCORE', consumers, name)
        if not lives_until then lives_until = now + lease - info[6] end
    end
    if lives_until and tonumber(lives_until) <= now then
        local pending = redis.call('XPENDING', stream, group, '-', '+', {AT_ONCE}, name)
        for _, row in ipairs(pending) do
            local count = row[4] + {ONE_CRASH}
            if count >= {CRASH_LIMIT} * {ONE_CRASH} then
                bury(row[1], '{CRASH_LIMIT} consumers died with it in hand', count % {ONE_CRASH} - 1)
            else
                move(row[1], '{RETURNED}', count)
            end
        end
        if #pending < {AT_ONCE} then
            redis.call('XGROUP', 'DELCONSUMER', stream, group, name)
            redis.call('ZREM', consumers, name)
        end
    end
end
return mine
"""
# Not only ours: who was taken for dead and finished all the same spares the others the work.
ACK = """
redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 3))
return redis.call('XDEL', KEYS[1], unpack(ARGV, 3))
"""
REQUEUE = f"""{COMMON}
for at = 3, #ARGV do
    local count = deliveries(me, ARGV[at])
    if count then move(ARGV[at], '{RETURNED}', count) end
end
return 1
"""
RETRY = f"""{COMMON}
local id, delay = ARGV[3], ARGV[4]
local count = deliveries(me, id)
if not count then return 0 end
move(id, '{DELAYED}', count + 1)
redis.call('ZADD', delayed, now + delay, id)
return 1
"""
REJECT = f"""{COMMON}
local id, reason = ARGV[3], ARGV[4]
local count = deliveries(me, id)
if not count then return 0 end
bury(id, reason, count % {ONE_CRASH})
return 1
"""
LEAVE = f"""{COMMON}
local left = 0
repeat
    local pending = redis.call('XPENDING', stream, group, '-', '+', {AT_ONCE}, me)
    for _, row in ipairs(pending) do move(row[1], '{RETURNED}', row[4]) end
    left = #pending
until left == 0
redis.call('XGROUP', 'DELCONSUMER', stream, group, me)
redis.call('ZREM', consumers, me)
return 1
"""
COUNT = f"""{COMMON}
local pending, returned, waiting = 0, 0, redis.call('ZCARD', delayed)
local late = redis.call('ZCOUNT', delayed, '-inf', now)
-- Without a group, which comes with its first consumer, this is an error, and has no length.
for _, info in ipairs(redis.pcall('XINFO', 'CONSUMERS', stream, group)) do
    pending = pending + info[4]
    if info[2] == '{RETURNED}' then returned = info[4] end
end
return {{
    redis.call('XLEN', stream) - pending + returned + late, waiting - late,
    pending - returned - waiting, redis.call('XLEN', dead),
    redis.call('ZCOUNT', consumers, '(' .. now, '+inf')
}}
"""
# The dead letters up to the id, so many at a time; returns how many were moved.
REPLAY = f"""{COMMON}
local letters = redis.call('XRANGE', dead, '-', ARGV[3], 'COUNT', {AT_ONCE})
for _, letter in ipairs(letters) do
    local fields = {{}}
    for at = 1, #letter[2], 2 do
        local name = letter[2][at]
        if name ~= '{REASON.decode()}' and name ~= '{ATTEMPTS.decode()}' and name ~= '{DEAD_LETTERED_AT.decode()}' then
            fields[#fields + 1] = name
            fields[#fields + 1] = letter[2][at + 1]
        end
    end
    redis.call('XADD', stream, '*', unpack(fields))
    redis.call('XDEL', dead, letter[1])
end
return #letters
"""
PURGE = f"""{COMMON}
local count = redis.call('XLEN', dead)
redis.call('UNLINK', dead)
return count
"""

Command = tuple[Any, ...]


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> Source:
    return RedisSource(settings, prefetch)


class _Server(NamedTuple):
    """What the URL says."""

    pool: ConnectionPool
    """Makes connections; it keeps none."""
    address: str
    """For people; without credentials."""
    lease_seconds: float


class _Wire:
    """One connection, opened when it is needed. One caller at a time; what he asks travels together.

    ``reopens``: also when it was lost while nobody used it; for whom that makes no difference.

    Below redis-py's client: its pool hands out any connection, and this must be the one that can be unblocked
    and cut. A caller who is cancelled loses the connection, as its answers would be the next one's.
    """

    def __init__(self, server: _Server, *, reopens: bool) -> None:
        self._server = server
        self._reopens = reopens
        pool: Any = server.pool  # redis-py's types leave some methods out
        self._connection: Any = pool.make_connection()
        self._transport: asyncio.WriteTransport | None = None
        self._turn = asyncio.Lock()

    async def ask(self, *commands: Command) -> list[Any]:
        """The answers. Raises BrokerUnavailable, or BrokerRefused for the first that is an error."""
        answers = await self.try_all(*commands)
        for answer in answers:
            if isinstance(answer, RedisError):
                raise _explain(answer, self._server.address) from answer
        return answers

    async def try_all(self, *commands: Command) -> list[Any]:
        """The answers, errors among them. Raises BrokerUnavailable, or BrokerRefused while connecting."""
        connection = self._connection
        answers: list[Any] = []
        async with self._turn:
            try:
                if self._is_lost():
                    await self.cut()
                    if not self._reopens:
                        msg = f"{self._server.address}: the connection was lost"
                        raise BrokerUnavailable(msg)
                if not connection.is_connected:
                    async with asyncio.timeout(CONNECT_SECONDS):
                        await connection.connect()
                    self._transport = connection._writer.transport
                await connection.send_packed_command(connection.pack_commands(commands))
                for _ in commands:
                    try:
                        answers.append(await connection.read_response())
                    except ResponseError as error:
                        answers.append(error)
            except BaseException as error:
                await self.cut()
                if isinstance(error, TimeoutError):
                    msg = f"{self._server.address} gave no answer in {CONNECT_SECONDS:g} seconds"
                    raise BrokerUnavailable(msg) from None
                if isinstance(error, RedisError):
                    raise _explain(error, self._server.address) from error
                raise
        return answers

    def _is_lost(self) -> bool:
        reader = self._connection._reader
        return reader is not None and (reader.at_eof() or reader.exception() is not None)

    async def cut(self) -> None:
        """Close without a word: a polite close, as redis-py's, waits long for a silent peer."""
        await self._connection.disconnect(nowait=True)
        if self._transport is not None:
            self._transport.abort()


class _Settlement(NamedTuple):
    script: str
    message: Message
    arguments: tuple[Any, ...]


class RedisSource(Source):
    """See the module. In the sentences of its errors and logs the URL has no credentials."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=True, attempts=True, requeue=True, dead_letters=True, order=True
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL makes no sense."""
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
        self._server = _parse(settings.broker_url.get_secret_value())
        self.connectivity = Connectivity(self._server.address)
        self._commands = _Wire(self._server, reopens=True)  # for everything but reading
        self._entered = False
        self._closing = asyncio.Event()
        self._taking = False
        self._reader_id = 0
        self._resting = asyncio.Event()  # set while nothing is being read
        self._resting.set()
        self._wake = asyncio.Event()  # of the fetcher: there may be room
        self._work = asyncio.Event()  # of the writer
        self._written = asyncio.Event()
        self._written.set()
        self._unacked: dict[bytes, Message] = {}  # by the entry's id, as the next
        self._settling: dict[bytes, _Settlement] = {}  # until the server has confirmed it
        self._fetcher: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        try:
            await self._look()
        except BaseException:
            await self._commands.cut()
            raise
        self._entered = True
        self.connectivity.established()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._taking:
            await self.stop()
        self._closing.set()
        self._wake.set()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._fetcher is not None:
                    await asyncio.wait({self._fetcher})
                if self._fetcher is not None and self.connectivity.up:
                    await self._written.wait()
                    await self._commands.ask(self._eval(LEAVE))
        except (TimeoutError, BrokerError) as error:
            log.debug("close_failed", broker=self._server.address, reason=str(error))
        finally:
            self._entered = self.connectivity.up = False
            tasks = {task for task in (self._fetcher, self._writer) if task is not None}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=0.5)
            await self._commands.cut()
            for settlement in self._settling.values():
                log_settlement_lost(settlement.message, "the server could not be told")
            self._settling.clear()
            self._unacked.clear()
            await asyncio.sleep(0)  # the transports that were cut close their sockets now

    @property
    def connected(self) -> bool:
        return self._entered and self.connectivity.up

    def _eval(self, script: str, *arguments: Any) -> Command:
        keys = self._keys
        return ("EVAL", script, len(keys), *keys, self._group, self._consumer, *arguments)

    async def _look(self) -> None:
        """Raises BrokerRefused if a key of ours is of another type."""
        answers = await self._commands.ask(*(("TYPE", key) for key in self._keys))
        for key, found, type in zip(self._keys, answers, TYPES, strict=True):
            if found not in (type, b"none"):
                msg = f"the key {key!r} is there already, and is a {found.decode()} and no {type.decode()}"
                raise BrokerRefused(msg)

    async def _declare(self, wire: _Wire) -> None:
        """The group, from the stream's first entry on. Raises BrokerRefused if it would not be the only one."""
        await self._expect_no_other_group(wire)
        (created,) = await wire.try_all(
            ("XGROUP", "CREATE", self._stream, self._group, "0", "MKSTREAM")
        )
        if isinstance(created, RedisError) and not str(created).startswith("BUSYGROUP"):
            raise _explain(created, self._server.address) from created

    async def _expect_no_other_group(self, wire: _Wire) -> None:
        (groups,) = await wire.try_all(("XINFO", "GROUPS", self._stream))
        if isinstance(groups, RedisError):
            return  # there is no stream yet
        others = {group[1].decode(errors="replace") for group in groups} - {self._group}
        if others:
            msg = (
                f"the stream {self._stream!r} has another group, {min(others)!r}, which would miss what this "
                f"one acknowledges, as that is deleted: set CONSUMER_GROUP to it, or XGROUP DESTROY it, or "
                f"publish to one stream for each"
            )
            raise BrokerRefused(msg)

    async def describe(self) -> dict[str, int | str]:
        await self._expect_no_other_group(self._commands)
        counts, info = await self._commands.try_all(self._eval(COUNT), ("INFO",))
        if isinstance(counts, RedisError):
            raise _explain(counts, self._server.address) from counts
        ready, delayed, in_flight, dead, consumers = counts
        described: dict[str, int | str] = {} if isinstance(info, RedisError) else _describe(info)
        return described | {
            self._stream: ready,
            f"{self._stream} delayed": delayed,
            f"{self._stream} in hand": in_flight,
            self._dead: dead,
            f"{self._stream} consumers": consumers,
        }

    # -- consuming: one task reads, keeps the lease, and looks for what others left

    async def start(self) -> None:
        await self._declare(self._commands)
        # Known to all before it is ready, so that nobody takes it for dead.
        await self._commands.ask(self._beat_command(sweep=False))
        self._taking = True
        self._fetcher = asyncio.create_task(self._fill(), name="redis-fetcher")
        self._writer = asyncio.create_task(self._write(), name="redis-settlements")

    async def stop(self) -> None:
        self._taking = False
        for message in self.buffer.take_all():
            await self.requeue(message)
        self.buffer.close()
        if self._fetcher is None or not self.connectivity.up:
            return
        with suppress(TimeoutError, BrokerError):
            async with asyncio.timeout(STOP_SECONDS):
                if not self._resting.is_set():
                    # Never cancelled: that would leave what it was just given in nobody's hand.
                    await self._commands.try_all(("CLIENT", "UNBLOCK", self._reader_id))
                await self._resting.wait()
                await self._written.wait()

    async def _fill(self) -> None:
        try:
            await self.connectivity.keep(self._consume, self._closing)
        except Exception as failure:
            self.connectivity.up = False
            self.buffer.fail(failure)
        finally:
            self._resting.set()

    async def _consume(self) -> None:
        """The life of one connection. It goes on after `stop`: what is in hand needs its lease."""
        loop = asyncio.get_running_loop()
        lease = self._server.lease_seconds
        reader = _Wire(self._server, reopens=False)
        try:
            await self._declare(reader)
            await self._beat(reader, sweep=False)
            (reader_id,) = await reader.try_all(("CLIENT", "ID"))
            self._reader_id = reader_id if isinstance(reader_id, int) else 0
            self.connectivity.established()
            # After an outage of all, the others get the time to say that they live.
            sweep_from = loop.time() + lease
            beat_at = loop.time() + lease / 3
            look_at = 0.0
            while not self._closing.is_set():
                if loop.time() >= beat_at:
                    await self._beat(reader, sweep=loop.time() >= sweep_from)
                    beat_at = loop.time() + lease / 3
                room = self._room()
                if not room:
                    if not await self._rest(min(beat_at, loop.time() + CHECK_SECONDS)):
                        await reader.ask(("PING",))
                    await _while_it_grows(self._room, self.prefetch // 2)
                elif loop.time() >= look_at:
                    seconds, full = await self._take(reader, room)
                    look_at = loop.time() + (0 if full else min(seconds, POLL_SECONDS))
                else:
                    await self._read(reader, room, look_at - loop.time())
        finally:
            self._resting.set()
            await reader.cut()

    def _room(self) -> int:
        """To be asked just before reading, with no await in between."""
        return self.prefetch - len(self._unacked) if self._taking else 0

    async def _rest(self, until: float) -> bool:
        """Until something was settled, or this time has come. Returns whether it was the first."""
        self._wake.clear()
        self._resting.set()
        loop = asyncio.get_running_loop()
        timer = loop.call_at(until, self._wake.set)
        if not self._closing.is_set():
            await self._wake.wait()
        timer.cancel()
        return loop.time() < until

    async def _read(self, reader: _Wire, room: int, seconds: float) -> None:
        self._resting.clear()
        (streams,) = await reader.ask(
            (
                "XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", room,
                "BLOCK", max(1, math.ceil(seconds * 1000)), "STREAMS", self._stream, ">",
            )
        )  # fmt: skip
        for _, entries in streams or ():
            for id, fields in entries:
                self._receive(id, fields, 1)

    async def _take(self, reader: _Wire, room: int) -> tuple[float, bool]:
        """What is returned or due; then the seconds until more is due, and whether there may be more now."""
        self._resting.clear()
        ((taken, due_ms),) = await reader.ask(self._eval(TAKE, min(room, AT_ONCE)))
        for entry in taken:
            self._receive(*entry)
        return (due_ms / 1000 if due_ms >= 0 else math.inf), len(taken) == min(room, AT_ONCE)

    def _receive(self, id: bytes, fields: list[bytes], attempt: int) -> None:
        settling = self._settling.get(id)
        if id in self._unacked or (settling is not None and settling.script is ACK):
            return  # ours again, after we had been taken for dead
        message = _message(id, fields, attempt)
        self._unacked[id] = message
        if self._taking:
            self.buffer.put(message)
        else:
            self.requeued_count += 1
            self._settle(message, REQUEUE)

    def _beat_command(self, *, sweep: bool) -> Command:
        lease_ms = math.ceil(self._server.lease_seconds * 1000)
        return self._eval(BEAT, lease_ms, int(sweep), self.prefetch + AT_ONCE)

    async def _beat(self, reader: _Wire, *, sweep: bool) -> None:
        """Renew the lease, and compare what is ours with what we have."""
        known = {*self._unacked, *self._settling}
        (answer,) = await reader.ask(self._beat_command(sweep=sweep))
        ours = set(answer)
        for message in self.buffer.take_all():
            if message.receipt in ours:
                self.buffer.put(message)
            else:
                del self._unacked[message.receipt]
        if strays := ours - known:  # given to us in an answer that never came, or settled in vain
            await reader.ask(self._eval(REQUEUE, *list(strays)[:AT_ONCE]))

    # -- settling: one task writes

    async def ack(self, message: Message) -> None:
        self._settle(message, ACK)

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        self._settle(message, RETRY, math.ceil(delay_seconds * 1000))

    async def reject(self, message: Message, reason: str) -> None:
        self._settle(message, REJECT, reason.encode(errors="replace"))

    async def requeue(self, message: Message) -> None:
        self.requeued_count += self._settle(message, REQUEUE)

    def _settle(self, message: Message, script: str, *arguments: Any) -> bool:
        id = message.receipt
        if self._unacked.get(id) is not message:
            log_settlement_lost(message, "it was settled before, or its lease had ended")
            return False
        del self._unacked[id]
        self._settling[id] = _Settlement(script, message, arguments)
        self._written.clear()
        self._work.set()
        self._wake.set()
        return True

    async def _write(self) -> None:
        failures = 0
        try:
            while await self._work.wait():
                await _while_it_grows(self._settling.__len__, self.prefetch // 2)
                self._work.clear()
                try:
                    await self._write_batch()
                    failures = 0
                except BrokerError as error:  # they stay, and so does the lease
                    failures += 1
                    log.debug("write_failed", broker=self._server.address, reason=str(error))
                    await asyncio.sleep(backoff_seconds(failures, 0.1, 1))
                if self._settling:
                    self._work.set()
                else:
                    self._written.set()
        except Exception as failure:
            self.buffer.fail(failure)

    async def _write_batch(self) -> None:
        batch = list(self._settling.values())[:AT_ONCE]
        commands: list[Command] = []
        single = [settlement for settlement in batch if settlement.script in (RETRY, REJECT)]
        for script in (ACK, REQUEUE):
            if ids := [s.message.receipt for s in batch if s.script is script]:
                commands.append(self._eval(script, *ids))
        together = len(commands)
        commands += [self._eval(s.script, s.message.receipt, *s.arguments) for s in single]
        answers = await self._commands.try_all(*commands)
        for number, answer in enumerate(answers):
            reason = "" if answer else "its lease had ended"
            if isinstance(answer, RedisError):
                error = _explain(answer, self._server.address)
                if isinstance(error, BrokerUnavailable):
                    await self._commands.cut()  # another connection may lead to another server
                    raise error
                reason = str(error)
            if reason and number >= together:
                log_settlement_lost(single[number - together].message, reason)
        for settlement in batch:
            id = settlement.message.receipt
            if self._settling.get(id) is settlement:  # else it is here and settled once more
                del self._settling[id]

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
                yield _dead_letter(id, fields)
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


async def _while_it_grows(size: Callable[[], int], enough: int) -> None:
    """Wait while more comes every few turns of the event loop, so that more travels together."""
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


def _message(id: bytes, fields: list[bytes], attempt: int) -> Message:
    pairs = iter(fields)
    named = dict(zip(pairs, pairs, strict=True))
    headers = named.get(HEADERS)
    return Message(
        named.get(BODY, b""),
        named.get(ID, id).decode(errors="replace"),
        named.get(TYPE, b"").decode(errors="replace"),
        {} if headers is None else headers_from(headers),
        attempt,
        id,
    )


def _dead_letter(id: bytes, fields: list[bytes]) -> DeadLetter:
    message = _message(id, fields, 0)
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    attempts, dead_lettered_at = named.get(ATTEMPTS, b"0"), named.get(DEAD_LETTERED_AT, b"0")
    return DeadLetter(
        body=message.body,
        id=message.id,
        type=message.type,
        reason=named.get(REASON, b"").decode(errors="replace"),
        attempts=int(attempts),
        dead_lettered_at=float(dead_lettered_at),
    )


def _describe(info: bytes) -> dict[str, int | str]:
    """What the server says of itself, and what of it endangers messages."""
    named = dict(
        line.split(":", 1) for line in info.decode(errors="replace").splitlines() if ":" in line
    )
    name, version = "Redis", named.get("redis_version", "")
    if "valkey_version" in named:
        name, version = "Valkey", named["valkey_version"]
    described: dict[str, int | str] = {"server": f"{name} {version}", "appendonly": "yes"}
    if named.get("aof_enabled") == "0":
        described["appendonly"] = "no: a server that dies loses what came since its last snapshot"
    policy = named.get("maxmemory_policy", "noeviction")
    if named.get("maxmemory", "0") != "0" and policy != "noeviction":
        described["eviction"] = f"{policy}: a server that is full deletes messages"
    return described


def _parse(url: str) -> _Server:
    """Raises BrokerRefused, without the URL and without its parser's error: each may hold a password."""
    msg = (
        "CONSUMER_BROKER_URL: not like redis://user:password@host:6379/0 or unix:///path?db=0; in a user name "
        "or a password, characters like @ : / ? # % are percent-encoded"
    )
    try:
        parts = urlsplit(url)
        database = parts.path.strip("/")
        odd = parts.fragment or (parts.scheme != "unix" and database and not database.isdecimal())
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        host, port = parts.hostname or "localhost", parts.port or 6379
    except ValueError:
        raise BrokerRefused(msg) from None
    if odd:
        raise BrokerRefused(msg)
    if unknown := options.keys() - OPTIONS:
        msg = f"CONSUMER_BROKER_URL: unknown option {min(unknown)!r}; known are {', '.join(sorted(OPTIONS))}"
        raise BrokerRefused(msg)
    lease = _number(options.pop("lease_seconds", str(LEASE_SECONDS)))
    if not 0.1 <= lease < math.inf:
        msg = "CONSUMER_BROKER_URL: lease_seconds is a number of at least 0.1"
        raise BrokerRefused(msg)
    try:
        pool: Any = ConnectionPool.from_url(
            parts._replace(query=urlencode(options)).geturl(),
            protocol=2,  # what this file reads; in 3 the answers have other shapes
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=CONNECT_SECONDS,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
        )
        pool.make_connection()
    except (ValueError, TypeError, RedisError):
        msg = "CONSUMER_BROKER_URL: an option has a value that redis-py does not take"
        raise BrokerRefused(msg) from None
    if parts.scheme == "unix":
        address = f"unix://{unquote(parts.path)}"
    else:
        address = f"{parts.scheme}://{host}:{port}"
    return _Server(pool, address, lease)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# Of errors that the server answers: these pass by themselves, or when connecting or declaring anew.
MENDABLE = (
    "NOGROUP", "UNBLOCKED", "READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "OOM",
    "MISCONF", "NOREPLICAS", "BUSY ",
)  # fmt: skip


def _explain(error: RedisError, address: str) -> BrokerError:
    text = f"{getattr(error, 'status_code', None) or ''} {error}".strip()
    cause = error.__context__
    if isinstance(error, AuthenticationError):
        return BrokerRefused(f"{address} refused the user name or the password, or wants one")
    if isinstance(cause, SSLError) and not isinstance(cause, SSLEOFError | SSLZeroReturnError):
        return BrokerRefused(f"{address}: no TLS connection: {cause}")
    if isinstance(cause, FileNotFoundError | PermissionError) and address.startswith("rediss"):
        return BrokerRefused(f"{address}: a file of the ssl_ options in the URL: {cause}")
    if isinstance(error, DataError):
        return BrokerRefused(f"this cannot be sent: {error}")
    if not isinstance(error, ResponseError) or any(code in text for code in MENDABLE):
        if "NOGROUP" in text or "UNBLOCKED" in text:
            text = "the stream or its group was deleted"
        return BrokerUnavailable(f"{address}: {text}")
    if isinstance(error, MovedError):
        return BrokerRefused(
            f"{address} is a node of a cluster, and the stream is on {error.host}:{error.port}: name that one, "
            f"and write CONSUMER_SOURCE with braces, {{orders}}, so that its keys stay together"
        )
    if "CROSSSLOT" in text:
        return BrokerRefused(
            f"{address} is a cluster: write CONSUMER_SOURCE with braces, {{orders}}, so that its keys stay "
            f"together"
        )
    return BrokerRefused(f"{address} refused: {text}")
