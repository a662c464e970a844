# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Redis Streams, on Redis 6.2 or later or Valkey, by redis-py: one stream with one consumer group.

``redis://user:password@host:6379/0``, ``rediss://`` with ``?ssl_ca_certs=ca.pem&ssl_certfile=me.pem&ssl_keyfile=me.key``
or ``unix:///path/redis.sock?db=0``; by Sentinel ``redis+sentinel://user:password@sentinel,sentinel:26379/master/0``; a
cluster ``redis+cluster://user:password@node,node:6379``. The server's address is looked up before each connection:
after a failover, or when a slot has moved, the next connection leads to another server.

For ``CONSUMER_SOURCE=orders`` the keys are the stream ``orders``, the stream ``orders.dead``, the sorted set
``orders.delayed`` (entries that wait for a retry, by the time when they are due) and the sorted set
``orders.consumers`` (live consumers, by the time when their leases expire). On a cluster the last three begin with
``{orders}``, so that all four are in one slot. With ``CONSUMER_GROUP=billing`` they end in ``.billing``.

An entry stays in the stream until every group has acknowledged it, and is deleted then. An entry that is added again
for one group, such as a replayed dead letter, names it: others acknowledge it unhandled. Only an entry's owner in the
group changes: a consumer, or one of two reserved names. ``delayed`` entries wait for a retry; any consumer with room
takes ``requeued`` entries. A consumer looks for both four times a second, before it reads new entries.

The script that acknowledges a message publishes what its handler returned; on a cluster only to streams
in the same slot. Publishing creates no stream.

A consumer renews its lease while it lives, also while a handler runs for hours. When the lease has expired, another
consumer requeues its entries. ``?lease_seconds=30`` in the URL sets its length; a process whose event loop is blocked
for longer counts as dead. All times are those of the server's clock.
"""

import asyncio
import json
import math
import os
import socket
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import suppress
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, cast
from urllib.parse import urlencode, urlsplit

import structlog
from pydantic_core import to_json
from redis.asyncio.cluster import ClusterNode, NodesManager
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterCrossSlotError,
    ClusterDownError,
    DataError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable, MendableRefusal
from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .connectivity import Connectivity
from .dead_letters import Page
from .delivery import (
    ATTEMPTS,
    DEAD_LETTERED_AT,
    PREFIX,
    REASON,
    count_of,
    headers_of,
    json_object,
    make_dead_letter,
    make_message,
    seconds_of,
    text_of,
)
from .put_off import backoff_seconds
from .requests import Requests, Rule, abort
from .source import MISSING, Broker, Capabilities, log_settlement_lost
from .url import BrokerUrl, CurrentUrl

log = structlog.get_logger()

LEASE_SECONDS = 30.0
CONNECT_SECONDS = 10.0
ASK_SECONDS = 2.0
"""How long one Sentinel, or one node of a cluster, may take to tell the address; then the next one is asked."""
REPLICAS_SECONDS = 3.0
"""How long replicas may take to confirm a publish, if the URL has ``wait_replicas``."""
ANSWER_SECONDS = 5.0
"""How long the server may leave a request unanswered before this counts as an outage."""
CHECK_SECONDS = 1.0
"""How often a connection is checked while it reads nothing, because there is no room."""
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
CRASH_LIMIT = 1000
"""An entry that was in flight when so many consumers died becomes a dead letter; CONSUMER_MAX_DELIVERIES is lower."""
FAR_OFF_MS = 10**15
"""A time in the year 33658, which a sorted set stores exactly."""

TYPES = (b"stream", b"zset", b"zset", b"stream")
REQUEUED, DELAYED = "requeued", "delayed"
"""Reserved owner names in the group; see the module."""
BODY, ID, TYPE, HEADERS = b"body", b"id", b"type", b"headers"
"""Fields of an entry. The headers are a JSON object; other fields are headers too. A dead letter also has REASON,
ATTEMPTS and DEAD_LETTERED_AT."""
ENTRY_ID = f"{PREFIX}id"
"""Field of an entry that was added again, and has no id of its producer: its first id from the server."""
MOST_WIRES = 20
"""The most connections to other nodes of a cluster, for publishing."""
DUE = f"{PREFIX}due"
"""Field of an entry that was trimmed in flight and added again: its due time in Unix ms. It has ATTEMPTS too."""
GROUP = f"{PREFIX}group"
"""Field of an entry that was added again for one of several groups."""
DUE_FIELD, GROUP_FIELD, ENTRY_FIELD = DUE.encode(), GROUP.encode(), ENTRY_ID.encode()

SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
OWN_OPTIONS = ("lease_seconds", "wait_replicas", *SENTINEL_OPTIONS)
OPTIONS = (
    *(
        "db",
        "lease_seconds",
        "wait_replicas",
        "ssl_ca_certs",
        "ssl_ca_path",
        "ssl_certfile",
        "ssl_check_hostname",
    ),
    *("ssl_cert_reqs", "ssl_ciphers", "ssl_keyfile", "ssl_min_version", "ssl_password"),
)

OUTAGES = (BrokerUnavailable, MendableRefusal)
"""Errors that can end without a restart: acks and requeues wait for that."""

# The group counts the deliveries of each pending entry. The scripts replace this count by their own: the attempt,
# and in its upper bits how many consumers died with the entry in flight.
ONE_CRASH = 2**20  # more than CONSUMER_MAX_ATTEMPTS can be
CALL = """
local function call(...)
    local answer = redis.pcall(...)
    if type(answer) == 'table' and answer.err then error(answer.err .. ' (' .. (...) .. ')', 0) end
    return answer
end
"""
"""As ``redis.call``; its error names the command, for a user without the right to run it."""
# Deletes acknowledged entries that every other group has acknowledged too.
DELETE = """
local others
local function above(one, other)
    return #one > #other or #one == #other and one > other
end
local function delete(stream, group, ids)
    if not others then
        others = {}
        for _, info in ipairs(call('XINFO', 'GROUPS', stream)) do
            if info[2] ~= group then others[#others + 1] = info end
        end
    end
    local done = {}
    for _, id in ipairs(ids) do
        local ms, number = id:match('(.*)-(.*)')
        local wanted = false
        for _, other in ipairs(others) do
            local read_ms, read = other[8]:match('(.*)-(.*)')
            local unread = above(ms, read_ms) or ms == read_ms and above(number, read)
            wanted = wanted or unread or call('XPENDING', stream, other[2], id, id, 1)[1]
        end
        if not wanted then done[#done + 1] = id end
    end
    if #done > 0 then call('XDEL', stream, unpack(done)) end
end
""".replace("    ", "")  # it is sent with each batch of acks
COMMON = f"""{CALL}{DELETE}
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
    if #moved == 0 then gone[#gone + 1] = id end -- Redis 6 moves it, and TAKE detects that
end
-- Redis undoes nothing: if ZADD came second, and were denied, a moved entry would wait forever. But without memory it
-- refuses only the first write of a script.
local function wait_until(due, id, count)
    local added = redis.pcall('ZADD', delayed, due, id)
    local full = type(added) == 'table' and added.err:find('OOM', 1, true)
    if type(added) == 'table' and not full then error(added.err .. ' (ZADD)', 0) end
    move(id, '{DELAYED}', count)
    if full then call('ZADD', delayed, due, id) end
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
    delete(stream, group, {{id}})
end
-- Adds the fields and an id. Of an entry with too many fields, it adds the last of those that a consumer reads. Without
-- a body, the other fields are its body, as for a consumer.
local function add(key, fields, id)
    local last, entry = named(fields), fields
    local is_foreign = not last['body']
    if #fields > {MOST_VALUES} then
        entry = {{}}
        if is_foreign then
            local theirs = {{}}
            for name, value in pairs(last) do
                if name:sub(1, {len(PREFIX)}) ~= '{PREFIX}' then theirs[name] = value end
            end
            last['body'] = cjson.encode(theirs)
        end
        for _, name in ipairs({{
            'body', 'id', 'type', 'headers', '{REASON}', '{ATTEMPTS}', '{DEAD_LETTERED_AT}', '{DUE}', '{ENTRY_ID}'
        }}) do
            if last[name] and not (is_foreign and name == 'id') then
                entry[#entry + 1] = name entry[#entry + 1] = last[name]
            end
        end
    end
    if (is_foreign or (last['id'] or '') == '') and (last['{ENTRY_ID}'] or '') == '' then
        entry[#entry + 1] = '{ENTRY_ID}' entry[#entry + 1] = id
    end
    if key == stream and #call('XINFO', 'GROUPS', stream) > 1 then
        entry[#entry + 1] = '{GROUP}' entry[#entry + 1] = group
    end
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
# Returns entries, as many as there is room for: {id, fields, attempt, crashes}; the milliseconds until another is due;
# and the entries that are gone.
TAKE = f"""{COMMON}
local room, taken = tonumber(ARGV[3]), {{}}
local function take(id, count)
    local entry = call('XCLAIM', stream, group, me, 0, id, 'RETRYCOUNT', count)[1]
    if entry then
        taken[#taken + 1] = {{entry[1], entry[2], count % {ONE_CRASH}, math.floor(count / {ONE_CRASH})}}
    else
        drop(id)
        gone[#gone + 1] = id
    end
end
for _, id in ipairs(call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, room)) do
    call('ZREM', delayed, id)
    local ms, number = id:match('^(%d+)-(%d+)$') -- otherwise another program added it
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
# returns whether they have more, the entries that are gone, and the entries trimmed unread: {count, before}.
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
-- This is corrected, for the lag and the next look. Of the entries read, the stream has only those not acknowledged, or
-- also some that another program left there: then the oldest entries are still there, and none was trimmed.
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
# Takes also entries that are no longer ours: the ack of a consumer wrongly counted as dead saves a redelivery.
ACK = f"""{CALL}{DELETE}
call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 3))
delete(KEYS[1], ARGV[1], {{unpack(ARGV, 3)}})
"""
# Returns the ids of entries that were trimmed, or deleted, while they were in flight; RETRY and REJECT return 2 then.
REQUEUE = f"""{COMMON}
local trimmed = {{}}
for at = 3, #ARGV do
    local count = deliveries(me, ARGV[at])
    if count and exists(ARGV[at]) then
        move(ARGV[at], '{REQUEUED}', count % {ONE_CRASH})
    elseif count then
        trimmed[#trimmed + 1] = ARGV[at]
    end
end
return trimmed
"""
RETRY = f"""{COMMON}
local id, delay, attempt = ARGV[3], ARGV[4], ARGV[5]
if not deliveries(me, id) then return 0 end
if not exists(id) then return 2 end
wait_until(now + delay, id, attempt + 1)
return 1
"""
# The caller passes the fields that the process holds, if the entry was trimmed.
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
local id, failures, delay = ARGV[3], ARGV[4], tonumber(ARGV[5])
if not deliveries(me, id) then return 0 end
local fields = rest(6)
for _, more in ipairs({{'{ATTEMPTS}', failures, '{DUE}', string.format('%.0f', now + delay)}}) do
    fields[#fields + 1] = tostring(more)
end
add(stream, fields, id)
drop(id)
return 1
"""
# Publishes the messages of entries, and acknowledges these: for each its id and, for each message, the place of its
# stream among the keys, the number of its names and values, and these. Returns for each entry 1, 0 if not ours, or
# the name and type of a key that is no stream: then the entry is unchanged. Types come first, as Redis undoes nothing.
PUBLISH = f"""{COMMON}
local outcomes, types, at = {{}}, {{}}, 3
for place = 5, #KEYS do types[place] = call('TYPE', KEYS[place]).ok end
while at <= #ARGV do
    local id, count, messages, outcome = ARGV[at], tonumber(ARGV[at + 1]), {{}}, 1
    at = at + 2
    for _ = 1, count do
        local place, length, values = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), {{}}
        for offset = 1, length do values[offset] = ARGV[at + 1 + offset] end
        messages[#messages + 1] = {{KEYS[place], values}}
        at = at + 2 + length
        if types[place] ~= 'stream' and outcome == 1 then outcome = {{KEYS[place], types[place]}} end
    end
    if not deliveries(me, id) then outcome = 0 end
    if outcome == 1 then
        for _, message in ipairs(messages) do
            call('XADD', message[1], 'NOMKSTREAM', '*', unpack(message[2]))
        end
        drop(id)
    end
    outcomes[#outcomes + 1] = outcome
end
return outcomes
"""
# Delays an entry that was added again, and has just been read as a new one.
DELAY = f"""{COMMON}
local id, count, due = ARGV[3], ARGV[4], ARGV[5]
if deliveries(me, id) then wait_until(due, id, count) end
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
# Moves the dead letters with these ids to the stream; returns how many.
REPLAY = f"""{COMMON}
local count = 0
for _, id in ipairs(rest(3)) do
    local letter = call('XRANGE', dead, id, id)[1] or {{id, {{}}}}
    local fields = {{}}
    for at = 1, #letter[2], 2 do
        local name = letter[2][at]
        local ours = name == '{REASON}' or name == '{ATTEMPTS}' or name == '{DEAD_LETTERED_AT}'
        if not ours and name ~= '{DUE}' and name ~= '{GROUP}' then
            fields[#fields + 1] = name
            fields[#fields + 1] = letter[2][at + 1]
        end
    end
    if #letter[2] > 0 then add(stream, fields, id) end
    count = count + call('XDEL', dead, id)
end
return count
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
        "the stream is on another node of this cluster ({error}): write redis+cluster:// in place of redis:// "
        "in CONSUMER_BROKER_URL",
    ),
    Rule(
        ClusterCrossSlotError,
        BrokerRefused,
        "the server is a node of a cluster: write redis+cluster:// in place of redis:// in CONSUMER_BROKER_URL, or "
        "write CONSUMER_SOURCE with braces, {{orders}}, so that its keys stay together",
    ),
    Rule(
        ResponseError,
        BrokerRefused,
        "the server is no node of a cluster: write redis:// in place of redis+cluster:// in CONSUMER_BROKER_URL",
        "cluster support disabled",
    ),
    Rule(
        ResponseError,
        BrokerRefused,
        "the server is no Sentinel, whose port is 26379 as a rule: write redis:// in place of redis+sentinel:// in "
        "CONSUMER_BROKER_URL for a server alone",
        "unknown command .SENTINEL",
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

RULES_OF_CLUSTER = (
    Rule(
        AskError,
        BrokerUnavailable,
        "the slot of the stream has moved, or is being moved, to another node: {error}",
    ),
    *RULES,
)

Command = tuple[Any, ...]
Address = tuple[str, int]
Locate = Callable[[], Awaitable[Address]]
"""Returns the server's present address. Raises as redis-py does, or BrokerRefused."""


class RedisUrl(BrokerUrl):
    """Raises BrokerRefused if the URL cannot be read."""

    def __init__(self, text: str) -> None:
        scheme, _, self.kind = text.partition(":")[0].lower().partition("+")
        """``sentinel``, ``cluster`` or empty."""
        by_sentinel, is_cluster = self.kind == "sentinel", self.kind == "cluster"
        super().__init__(
            text,
            like="redis://user:password@host:6379/0, redis+sentinel://user:password@host:26379,host:26379/master/0, "
            "redis+cluster://user:password@host:6379,host:6379 or unix:///path?db=0",
            options=OPTIONS + (SENTINEL_OPTIONS if by_sentinel else ()),
            default_port=26379 if by_sentinel else 6379,
        )
        database = self.path.strip("/")
        if by_sentinel:
            self.master, _, database = database.partition("/")
            if self.hosts and not self.master:
                msg = "CONSUMER_BROKER_URL: the master's name is missing: redis+sentinel://host:26379/master"
                raise BrokerRefused(msg)
        if scheme == "unix":
            self.redacted = f"unix:///{self.path}"
        elif (
            not self.hosts
            or (len(self.hosts) > 1 and not self.kind)
            or (database and not database.isdecimal())
        ):
            raise self.unreadable()
        if is_cluster and {database, self.options.get("db", "")} - {"", "0"}:
            raise BrokerRefused("CONSUMER_BROKER_URL: a cluster has only database 0")
        self.lease_seconds = self.number("lease_seconds", LEASE_SECONDS, at_least=0.1)
        self.wait_replicas = self.whole_number("wait_replicas", 0, at_least=0)
        parts = urlsplit(text)
        if self.kind:  # redis-py knows no such URL
            credentials, at, _ = parts.netloc.rpartition("@")
            netloc = f"{credentials}{at}{self.hosts[0]}"
            parts = parts._replace(scheme=scheme, netloc=netloc, path=f"/{database}")
        options = {name: value for name, value in self.options.items() if name not in OWN_OPTIONS}
        try:
            pool: Any = ConnectionPool.from_url(  # redis-py's types leave some methods out
                parts._replace(query=urlencode(options)).geturl(),
                protocol=2,  # this file reads answers of version 2; those of 3 have other shapes
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

    @property
    def addresses(self) -> list[Address]:
        parts = [urlsplit(f"//{host}") for host in self.hosts]
        return [(one.hostname or "", one.port or 0) for one in parts]


class MasterOfSentinels:
    """Asks Sentinels where the master is. redis-py's own search does not say why it finds none."""

    def __init__(self, current_url: Callable[[], RedisUrl]) -> None:
        self._current_url = current_url
        self._was_found = False

    def _options(self, url: RedisUrl) -> dict[str, Any]:
        kept = {name: v for name, v in url.pool.connection_kwargs.items() if name[:4] == "ssl_"}
        return kept | {
            "ssl": url.scheme.startswith("rediss"),
            "username": url.options.get("sentinel_username"),
            "password": url.options.get("sentinel_password"),
            "socket_timeout": ASK_SECONDS,
            "socket_connect_timeout": ASK_SECONDS,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "driver_info": None,
        }

    async def __call__(self) -> Address:
        url = self._current_url()
        name = url.master
        known: set[str] = set()
        failures: list[RedisError] = []
        sentinel: Any = cast(Any, Sentinel)(url.addresses, sentinel_kwargs=self._options(url))
        try:
            for one in sentinel.sentinels:
                try:
                    masters = await one.sentinel_masters()
                except ResponseError:
                    raise
                except RedisError as error:
                    failures.append(error)
                    continue
                known |= masters.keys()
                if name in masters and sentinel.check_master_state(masters[name], name):
                    self._was_found = True
                    return masters[name]["ip"], masters[name]["port"]
        finally:
            for one in sentinel.sentinels:
                await one.aclose()
        if len(failures) == len(sentinel.sentinels):
            if denied := [one for one in failures if isinstance(one, AuthenticationError)]:
                msg = "the Sentinels refused sentinel_username or sentinel_password, or require the latter"
                raise BrokerDenied(f"{url.redacted}: {msg}") from denied[0]
            raise RedisError(f"no Sentinel answers: {failures[0]}") from failures[0].__context__
        # A Sentinel that lost its settings knows no master for a while.
        if name not in known and not self._was_found:
            msg = (
                f"the Sentinels know no master {name!r}, but: {', '.join(sorted(known)) or 'none'}"
            )
            raise BrokerRefused(f"{url.redacted}: {msg}")
        msg = f"the Sentinels see no live master {name!r}: a failover is in progress, or impossible"
        raise RedisError(msg)


class NodeOfSlot:
    """Asks the nodes of a cluster, those of the URL and those found last, which of them has the slot of a key."""

    def __init__(self, current_url: Callable[[], RedisUrl], key: str) -> None:
        self._current_url = current_url
        self._key = key
        self._found: list[Address] = []

    async def __call__(self) -> Address:
        url = self._current_url()
        options = url.pool.connection_kwargs | {
            "connection_class": url.pool.connection_class,
            "socket_timeout": ASK_SECONDS,
            "socket_connect_timeout": ASK_SECONDS,
        }
        for name in ("host", "port", "db"):
            options.pop(name, None)
        start = [ClusterNode(*address, **options) for address in (*url.addresses, *self._found)]
        nodes = NodesManager(start, False, options, dynamic_startup_nodes=False)
        try:
            await nodes.initialize()
        except RedisClusterException as error:
            failure = error.__cause__
            if isinstance(failure, RedisClusterException) and failure.__context__:
                failure = failure.__context__  # redis-py takes a refusal for a missing cluster mode
            if isinstance(failure, (ResponseError, AuthenticationError)):
                raise failure from None
            msg = f"no node of the cluster answers: {failure or error}"
            raise RedisError(msg) from (failure and failure.__context__)
        finally:
            await nodes.aclose("startup_nodes")
        self._found = [(node.host, int(node.port)) for node in nodes.nodes_cache.values()]
        if owners := nodes.slots_cache.get(key_slot(self._key.encode())):
            return owners[0].host, int(owners[0].port)
        raise ClusterDownError(f"no node has the slot of {self._key!r}")


def _keys(stream: str, suffix: str, *, on_cluster: bool) -> tuple[str, ...]:
    """The stream, and the keys beside it. Raises BrokerRefused if they cannot be in one slot."""
    for prefix in (stream, f"{{{stream}}}"):
        beside = (f"{prefix}.{name}{suffix}" for name in (DELAYED, "consumers", "dead"))
        keys = (stream, *beside)
        if not on_cluster or len({key_slot(key.encode()) for key in keys}) == 1:
            return keys
    raise BrokerRefused(
        f"CONSUMER_SOURCE: on a cluster, {stream!r} needs a part in braces, such as {{orders}}, so that the keys of its "
        "dead letters and its retries are in the same slot"
    )


class Wire:
    """One connection, opened when it is needed. It has one caller at a time, and sends all commands of a call together.

    ``reopens``: it is opened again even if it was lost while unused, for callers that need no state of it.

    It replaces redis-py's client, whose pool hands out any connection: this one must be unblocked and aborted. A
    cancelled caller closes the connection, since the next caller would get its answers.
    """

    def __init__(
        self,
        current_url: Callable[[], RedisUrl],
        locate: Locate | None,
        requests: Requests,
        *,
        reopens: bool,
    ) -> None:
        self._current_url = current_url
        self._locate = locate
        self._requests = requests
        self._reopens = reopens
        self.is_suspect = False
        """Set after an outage: the server of this connection may not be the one to talk to any more."""
        self._pool = current_url().pool
        self._connection: Any = self._pool.make_connection()
        self._transport: asyncio.WriteTransport | None = None
        self._turn = asyncio.Lock()

    async def ask(self, *commands: Command) -> list[Any]:
        """Send the commands; returns the answers. Raises BrokerUnavailable, or BrokerRefused for the first error."""
        answers = await self.try_all(*commands)
        for answer in answers:
            if isinstance(answer, RedisError):
                raise self._requests.translated(answer) from answer
        return answers

    async def try_all(self, *commands: Command) -> list[Any]:
        """As `ask`, with errors among the answers. Raises BrokerUnavailable, or BrokerRefused while connecting."""
        answers: list[Any] = []
        async with self._turn, self._requests.bounded(math.inf):  # redis-py bounds each answer
            try:
                if self._is_lost():
                    await self.cut()
                    if not self._reopens:
                        raise self._requests.lost()
                if not self._connection.is_connected:
                    await self._connect()
                connection = self._connection
                await connection.send_packed_command(connection.pack_commands(commands))
                for _ in commands:
                    try:
                        answers.append(await connection.read_response())
                    except ResponseError as error:
                        answers.append(error)
                if any(map(self._is_outage, answers)):
                    await self.cut()  # another connection may lead to another server
            except BaseException:
                await self.cut()
                raise
        return answers

    async def _connect(self) -> None:
        if (pool := self._current_url().pool) is not self._pool:
            self._pool, self._connection = pool, pool.make_connection()
        async with self._requests.bounded(CONNECT_SECONDS):
            try:
                if self._locate is not None:
                    self._connection.host, self._connection.port = await self._locate()
                await self._connection.connect()
            except RedisError as error:
                if self._requests.address.startswith("rediss") and error.__cause__ is None:
                    # An error of ssl: redis-py does not set it as the cause.
                    error.__cause__ = error.__context__
                raise
        self._transport = self._connection._writer.transport

    def _is_lost(self) -> bool:
        reader = self._connection._reader
        return reader is not None and (
            self.is_suspect or reader.at_eof() or reader.exception() is not None
        )

    def _is_outage(self, answer: Any) -> bool:
        return isinstance(answer, RedisError) and isinstance(
            self._requests.translated(answer), BrokerUnavailable
        )

    async def cut(self) -> None:
        """Close at once: a graceful close, such as redis-py's, waits long for an unresponsive peer."""
        self.is_suspect = False
        await self._connection.disconnect(nowait=True)
        if self._transport is not None:
            abort(self._transport)


class Published(NamedTuple):
    """The messages that are published with an ack: the stream and the fields of each."""

    messages: list[tuple[str, list[bytes]]]
    written: "asyncio.Future[None]"


class Settlement(NamedTuple):
    verb: str
    message: Message
    arguments: tuple[Any, ...]
    id: bytes

    @property
    def fields(self) -> list[bytes]:
        """The entry's fields without those of the runtime; the stream may have trimmed the entry meanwhile."""
        fields: list[bytes] = []
        for name, value in _pairs(self.message.receipt[1]):
            if name not in (ATTEMPTS.encode(), DUE_FIELD, GROUP_FIELD):
                fields += [name, value]
        return fields


class RedisBroker(Broker):
    """One stream and its group. Raises BrokerRefused if the URL cannot be used. Headers must be JSON values."""

    capabilities = Capabilities()
    acks_late = True
    dead_letters_at_once = AT_ONCE
    destinations: ClassVar = {"stream": "stream:NAME"}

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        self._stream = settings.source
        self._group = settings.group or settings.source
        self._current_url = CurrentUrl(settings, RedisUrl)
        self._url = url = self._current_url()
        suffix = f".{self._group}" if self._group != self._stream else ""
        self._keys = _keys(self._stream, suffix, on_cluster=url.kind == "cluster")
        self._dead = self._keys[3]
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        # No entry has so late an id: the read only checks whether this user may read. (The very last id would mean >.)
        reading = ("XREADGROUP", "GROUP", self._group, self._consumer, "STREAMS", self._stream)
        self._read_nothing = (*reading, f"{2**64 - 1}-0")
        self.connectivity = Connectivity(url.redacted)
        rules = RULES_OF_CLUSTER if url.kind == "cluster" else RULES
        self._requests = Requests(url.redacted, (RedisError,), rules)
        self._locate: Locate | None = None
        if url.kind == "sentinel":
            self._locate = MasterOfSentinels(self._current_url)
        elif url.kind == "cluster":
            self._locate = NodeOfSlot(self._current_url, self._stream)
        self._commands = self._wire(reopens=True)  # for everything but reading
        self._others: dict[int, Wire] = {}  # for publishing to other slots of a cluster
        self._origin = {"source": settings.source, "stream": self._stream}
        self._entered = False
        self._declared = False
        self._began_after = ""  # an entry's id
        self._closing = asyncio.Event()
        self._fetching = False
        self._stop_by = 0.0  # event loop time
        self._reader_id = 0
        self._not_reading = asyncio.Event()
        self._not_reading.set()
        self._wake = asyncio.Event()  # wakes the fetcher: the buffer may have room
        self._work = asyncio.Event()  # wakes the writer
        self._written = asyncio.Event()
        self._written.set()
        self._by_id: dict[bytes, Message] = {}  # the unacked messages
        # By the entry's id, until the server confirms them.
        self._unwritten: dict[bytes, Settlement] = {}
        self._maybe_published: set[bytes] = set()  # their answers were lost
        self._fetcher: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._is_refused = False  # the server refuses the writer, which then reports the outage: a reader may go on

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

    async def delete(self) -> None:
        await self._commands.ask(*(("DEL", key) for key in self._keys))

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
            for wire in (self._commands, *self._others.values()):
                await wire.cut()
            for settlement in self._unwritten.values():
                self._on_lost(settlement, "the connection was lost")
            for collection in (self._unwritten, self._by_id, self.unacked):
                collection.clear()
            await asyncio.sleep(0)  # the transports that were cut close their sockets now

    @property
    def connected(self) -> bool:
        return self._entered and self.connectivity.up

    def _wire(self, *, reopens: bool) -> Wire:
        return Wire(self._current_url, self._locate, self._requests, reopens=reopens)

    async def _wire_to(self, stream: str) -> Wire:
        """The connection to this stream: on a cluster, another slot may be on another node."""
        if self._is_beside(stream):
            return self._commands
        slot = key_slot(stream.encode())
        if (wire := self._others.get(slot)) is None:
            locate = NodeOfSlot(self._current_url, stream)
            wire = Wire(self._current_url, locate, self._requests, reopens=True)
            self._others[slot] = wire
            if len(self._others) > MOST_WIRES:
                await self._others.pop(next(iter(self._others))).cut()
        return wire

    def _is_beside(self, stream: str) -> bool:
        """Whether a script can use this stream and the source."""
        return self._url.kind != "cluster" or (
            key_slot(stream.encode()) == key_slot(self._stream.encode())
        )

    def _eval(self, script: str, *arguments: Any, more_keys: Sequence[str] = ()) -> Command:
        keys = (*self._keys, *more_keys)
        return ("EVAL", script, len(keys), *keys, self._group, self._consumer, *arguments)

    async def _check_types(self) -> None:
        """Raises BrokerRefused if one of the keys has another type."""
        answers = await self._commands.ask(*(("TYPE", key) for key in self._keys))
        for key, found, type in zip(self._keys, answers, TYPES, strict=True):
            if found not in (type, b"none"):
                msg = f"the key {key!r} already exists, and is a {found.decode()} and no {type.decode()}"
                raise BrokerRefused(msg)

    async def _declare(self, wire: Wire) -> None:
        """Create the group, from the stream's first entry on.

        A group that was deleted begins again where this process saw it first: entries that were acknowledged before
        that, and left in the stream, are not handled again.
        """
        groups = await self._groups(wire)
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

    async def describe(self) -> dict[str, int | str]:
        groups = await self._groups(self._commands)
        (info,) = await self._commands.try_all(("INFO",))
        described: dict[str, int | str] = {} if isinstance(info, RedisError) else _describe(info)
        if self._group not in (groups or ()):
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
        # The lease comes first, so that no other consumer counts this one as dead.
        await self._commands.ask(self._renew_command(sweep=False), self._read_nothing)
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
                # The read is never cancelled: the entries of its last answer would be lost until the next sweep.
                await self._commands.try_all(("CLIENT", "UNBLOCK", self._reader_id))
                await self._not_reading.wait()

    async def flush(self) -> None:
        if self._fetcher is not None and self.connectivity.up:
            with suppress(TimeoutError):
                async with (
                    asyncio.timeout_at(self._stop_by)
                    if self.stopped
                    else asyncio.timeout(STOP_SECONDS)
                ):
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
        reader = self._wire(reopens=False)
        self._commands.is_suspect |= not self.connectivity.up
        try:
            if self._declared:
                await self._declare(reader)
            await self._renew(reader, sweep=False)
            await reader.ask(self._read_nothing)
            (reader_id,) = await reader.try_all(("CLIENT", "ID"))
            self._reader_id = reader_id if isinstance(reader_id, int) else 0
            # After an outage that affected all consumers, the others get the time to renew their leases.
            sweep_from = loop.time() + lease
            renew_at = loop.time() + lease / 3
            look_at = 0.0
            while not self._closing.is_set():
                if not self._is_refused:
                    self.connectivity.established()
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
        """Call it just before a read, with no await in between. A storm of rejects is read faster than written."""
        behind = max(0, len(self._unwritten) - self.prefetch)
        return super()._room() - behind if self._fetching else 0

    async def _wait_for_room(self, until: float) -> bool:
        """Wait until a message was settled, or until this time. Returns False if the time has come."""
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
                if (more := self._receive(reader, id, fields, 1)) is not None:
                    await more

    async def _take(self, reader: Wire, room: int) -> tuple[float, bool]:
        """Receive requeued and due entries. Returns the seconds until another is due, and whether more may be ready."""
        self._not_reading.clear()
        ((taken, due_ms, gone),) = await reader.ask(self._eval(TAKE, min(room, AT_ONCE)))
        self._warn_of_gone(gone)
        for entry in taken:
            if (more := self._receive(reader, *entry)) is not None:
                await more
        return (due_ms / 1000 if due_ms >= 0 else math.inf), len(taken) == min(room, AT_ONCE)

    def _receive(
        self, reader: Wire, id: bytes, fields: list[bytes], attempt: int, crashes: int = 0
    ) -> Coroutine[Any, Any, object] | None:
        """Returns what the caller must await, if anything. No coroutine of its own: this runs for each message."""
        if id in self._by_id or id in self._unwritten:
            return None  # redelivered to this consumer, after it counted as dead
        if attempt == 1 and DUE_FIELD in fields:
            named = dict(_pairs(fields))
            failures = min(count_of(named.get(ATTEMPTS.encode())), ONE_CRASH - 2)
            due_ms = min(math.ceil(seconds_of(named.get(DUE_FIELD))), FAR_OFF_MS)
            if failures:
                return reader.ask(self._eval(DELAY, id, failures + 1, due_ms))
        if GROUP_FIELD in fields and dict(_pairs(fields))[GROUP_FIELD] != self._group.encode():
            return reader.ask(self._eval(ACK, id))
        message = self._by_id[id] = _make_message(id, fields, attempt, self._origin)
        message.deliveries += crashes
        message.receipt = (id, fields)
        return None if self._deliver(message) else self.requeue(message)

    def _release(self, message: Message) -> None:
        super()._release(message)
        if self._by_id.get(id := message.receipt[0]) is message:
            del self._by_id[id]
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
        for message in self._take_back():
            if message.receipt[0] in ours:
                self.buffer.put(message)
            else:
                self._release(message)
        if strays := ours - known:  # the answer to a read, or their settlement, was lost
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
        await self._store(message, "retry", math.ceil(delay_seconds * 1000), message.attempt)

    async def _reject(self, message: Message, reason: str) -> None:
        await self._store(message, "reject", text_of(reason))

    def _requeue(self, message: Message) -> Coroutine[Any, Any, None]:
        return self._settle(message, "requeue")

    async def _store(self, message: Message, verb: str, *arguments: Any) -> None:
        """Write it later, with others. A message that was put off is written alone, and its answer awaited."""
        if message not in self.put_offs.counts:
            await self._settle(message, verb, *arguments)
            return
        settlement = Settlement(verb, message, arguments, message.receipt[0])
        (answer,) = await self._commands.ask(self._eval(SCRIPT_OF[verb], settlement.id, *arguments))
        if answer == 2:
            (answer,) = await self._commands.ask(self._restoring(settlement))
        if answer == 0:
            log_settlement_lost(message, verb, "its lease had expired")

    async def _settle(self, message: Message, verb: str, *arguments: Any) -> None:
        if not self._unwritten:
            self._written.clear()
            self._work.set()
        id = message.receipt[0]
        self._unwritten[id] = Settlement(verb, message, arguments, id)

    async def _write(self) -> None:
        failures = 0
        try:
            while await self._work.wait():
                await _while_it_grows(self._unwritten.__len__, self.prefetch // 2)
                self._work.clear()
                try:
                    await self._write_batch()
                    failures, self._is_refused = 0, False
                except BrokerError as error:  # the settlements stay, and so does the lease
                    failures += 1
                    log.debug("write_failed", broker=self._url.redacted, reason=str(error))
                    if isinstance(error, MendableRefusal):
                        self._is_refused = True
                        self.connectivity.lost(error)
                    await asyncio.sleep(backoff_seconds(failures, 0.1, 1))
                self._wake.set()  # there may be room
                if self._unwritten:
                    self._work.set()
                else:
                    self._written.set()
        except Exception as failure:
            self.buffer.fail(failure)
            for settlement in self._unwritten.values():  # so that no handler waits forever
                if settlement.verb == "publish" and not settlement.arguments[0].written.done():
                    settlement.arguments[0].written.set_exception(failure)

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
        steps += [(step, self._publishing(step)) for step in _publish_steps(batch)]
        trimmed: list[tuple[list[Settlement], Command]] = []
        try:
            written, kept, outage = await self._write_steps(steps)
        except BrokerError:
            self._maybe_published |= {one.id for one in batch if one.verb == "publish"}
            raise
        for settlements, answer in written:
            gone = answer
            if settlements[0].verb != "requeue":
                gone = [settlements[0].id] if settlements[0].verb != "ack" and answer == 2 else []
            trimmed += [([one], self._restoring(one)) for one in settlements if one.id in gone]
        _, kept_too, outage_too = await self._write_steps(trimmed)
        kept |= kept_too
        for settlement in batch:
            id = settlement.id
            if self._unwritten.get(id) is settlement:  # otherwise settled again meanwhile
                del self._unwritten[id]
                if id in kept:  # behind the others
                    self._unwritten[id] = settlement
        if error := outage or outage_too:
            raise error

    async def _write_steps(
        self, steps: list[tuple[list[Settlement], Command]]
    ) -> tuple[list[tuple[list[Settlement], Any]], set[bytes], BrokerError | None]:
        """The answers to the settlements that were written; and the ids of those to write again, with the reason."""
        written: list[tuple[list[Settlement], Any]] = []
        kept: set[bytes] = set()
        outage: BrokerError | None = None
        answers = await self._commands.try_all(*(command for _, command in steps)) if steps else []
        for (settlements, _), answer in zip(steps, answers, strict=True):
            if isinstance(answer, RedisError):
                error = self._requests.translated(answer)
                if settlements[0].verb == "publish":  # also in an outage: the handler fails
                    await self._on_not_published(settlements, error)
                    continue
                is_put_off = settlements[0].verb in ("retry", "reject")
                if isinstance(error, BrokerUnavailable if is_put_off else OUTAGES):
                    outage = outage or error
                    kept |= {one.id for one in settlements}
                    continue
                for one in settlements:
                    await self._on_refused(one, error)
            elif settlements[0].verb == "publish":
                for one, outcome in zip(settlements, answer, strict=True):
                    self._on_published(one, outcome)
                    self._maybe_published.discard(one.id)
            elif answer == 0 and settlements[0].verb in ("retry", "reject"):
                log_settlement_lost(
                    settlements[0].message, settlements[0].verb, "its lease had expired"
                )
            else:
                written.append((settlements, answer))
        return written, kept, outage

    async def _on_refused(self, settlement: Settlement, error: BrokerError) -> None:
        verb, message, arguments, id = settlement
        if verb in ("ack", "requeue"):
            log_settlement_lost(message, verb, error)
            return
        self.unacked.add(message)
        self._by_id[id] = message
        if verb == "retry":
            await self._put_off(message, verb, error, "", arguments[0] / 1000)
        else:
            await self._put_off(message, verb, error, arguments[0])

    def _restoring(self, settlement: Settlement) -> Command:
        """Write the message from the fields in this process: its entry was trimmed while it was in flight."""
        id, arguments, fields = settlement.id, settlement.arguments, settlement.fields
        if settlement.verb == "reject":
            return self._eval(REJECT, id, *arguments, *fields)
        delay, failures = arguments or (0, settlement.message.attempt - 1)
        return self._eval(RESTORE, id, failures, delay, *fields)

    # -- publishing

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        publishing: dict[Wire, list[tuple[str, list[bytes]]]] = {}
        for stream, fields in self._outgoing(messages):
            publishing.setdefault(await self._wire_to(stream), []).append((stream, fields))
        for wire, outgoing in publishing.items():
            for start in range(0, len(outgoing), AT_ONCE):
                await self._publish(wire, outgoing[start : start + AT_ONCE])

    async def _publish(self, wire: Wire, outgoing: list[tuple[str, list[bytes]]]) -> None:
        wanted = self._url.wait_replicas
        wait = [("WAIT", wanted, math.ceil(REPLICAS_SECONDS * 1000))] if wanted else []
        adding = (("XADD", stream, "NOMKSTREAM", "*", *fields) for stream, fields in outgoing)
        answers = await wire.try_all(*adding, *wait)
        for (stream, _), answer in zip(outgoing, answers, strict=False):
            if isinstance(answer, RedisError):
                error = self._requests.translated(answer)
                raise type(error)(
                    f"{error} (while publishing to the stream {stream!r})"
                ) from answer
            if answer is None:
                raise self._no_stream(stream, "none")
        if wanted and isinstance(answers[-1], RedisError):
            raise self._requests.translated(answers[-1]) from answers[-1]
        if wanted and answers[-1] < wanted:
            msg = f"{answers[-1]} of {wanted} replicas have confirmed within {REPLICAS_SECONDS:g} seconds"
            raise BrokerUnavailable(
                f"{self._url.redacted}: {msg}: a failover may lose these messages"
            )

    def _outgoing(self, messages: Sequence[OutgoingMessage]) -> list[tuple[str, list[bytes]]]:
        return [(self._stream_of(message), _fields(message)) for message in messages]

    def _stream_of(self, message: OutgoingMessage) -> str:
        _, stream = self.destination_of(message)
        _encoded(stream)
        return stream

    def _no_stream(self, stream: str, type: str) -> BrokerRefused:
        what = f"is a {type}, and no stream" if type != "none" else MISSING
        return BrokerRefused(f"{self._url.redacted}: the stream {stream!r} {what}")

    async def publish_and_ack(self, message: Message, outgoing: Sequence[OutgoingMessage]) -> None:
        """In one step, if all streams are in one slot, and no replica has to confirm it first."""
        messages = self._outgoing(outgoing)
        together = all(self._is_beside(stream) for stream, _ in messages)
        if (
            not together
            or len(messages) > AT_ONCE
            or self._url.wait_replicas
            or self.buffer.failure is not None
        ):
            await super().publish_and_ack(message, outgoing)
            return
        if self._holds(message, "ack"):
            written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            await self._settle(message, "publish", Published(messages, written))
            await written
            self._release(message)
        self.buffer.settled(message)

    def _publishing(self, settlements: list[Settlement]) -> Command:
        streams: dict[str, int] = {}
        arguments: list[Any] = []
        for one in settlements:
            messages = one.arguments[0].messages
            arguments += [one.id, len(messages)]
            for stream, fields in messages:
                place = streams.setdefault(stream, len(self._keys) + 1 + len(streams))
                arguments += [place, len(fields), *fields]
        return self._eval(PUBLISH, *arguments, more_keys=list(streams))

    async def _on_not_published(self, settlements: list[Settlement], error: BrokerError) -> None:
        if len(settlements) > 1 and isinstance(error, BrokerRefused):  # one of them is the cause
            await self._write_steps([([one], self._publishing([one])) for one in settlements])
            return
        for one in settlements:
            if not (written := one.arguments[0].written).done():
                written.set_exception(error)

    def _on_published(self, settlement: Settlement, outcome: Any) -> None:
        written = settlement.arguments[0].written
        if outcome == 0 and settlement.id not in self._maybe_published:
            self._on_lost(settlement, "its lease had expired")
        elif not written.done():
            if isinstance(outcome, int):
                written.set_result(None)
            else:
                stream, type = map(text_of, outcome)
                written.set_exception(self._no_stream(stream, type))

    def _on_lost(self, settlement: Settlement, reason: str) -> None:
        if settlement.verb != "publish":
            log_settlement_lost(settlement.message, settlement.verb, reason)
        elif not (written := settlement.arguments[0].written).done():
            written.set_result(None)
            log_settlement_lost(settlement.message, "ack", reason)

    # -- dead letters

    async def _present_letters(self, reading: Any) -> AsyncGenerator[DeadLetter, None]:
        after, page = "-", Page()
        (newest,) = await self._commands.ask(("XREVRANGE", self._dead, "+", "-", "COUNT", 1))
        while newest and (
            letters := (
                await self._commands.ask(
                    ("XRANGE", self._dead, after, newest[0][0], "COUNT", page.count)
                )
            )[0]
        ):
            for id, fields in letters:
                page.saw(sum(map(len, fields)))
                yield _make_dead_letter(id, fields)
            page.turn()
            after = f"({letters[-1][0].decode()}"

    async def _take_letters(
        self, reading: Any, letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        ids = [letter.receipt for letter in letters]
        take = self._eval(REPLAY, *ids) if replay else ("XDEL", self._dead, *ids)
        (count,) = await self._commands.ask(take)
        yield count

    async def count_dead_letters(self) -> int:
        (count,) = await self._commands.ask(("XLEN", self._dead))
        return int(count)

    async def _purge_all(self) -> AsyncIterator[int]:
        (count,) = await self._commands.ask(self._eval(PURGE))
        yield int(count)


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> RedisBroker:
    return RedisBroker(settings, prefetch)


async def _while_it_grows(size: Callable[[], int], enough: int) -> None:
    """Wait while this grows every few turns of the event loop, so that settlements are sent together."""
    seen = 0
    while seen < size() < enough:
        seen = size()
        for _ in range(QUIET_TURNS):
            await asyncio.sleep(0)


def _publish_steps(batch: list[Settlement]) -> Iterator[list[Settlement]]:
    """The settlements that publish, as many as one script may. A cancelled one is skipped: it is requeued."""
    step: list[Settlement] = []
    count = 0
    for one in batch:
        if one.verb != "publish" or one.arguments[0].written.done():
            continue
        more = len(one.arguments[0].messages)
        if step and count + more > AT_ONCE:
            yield step
            step, count = [], 0
        step.append(one)
        count += more
    if step:
        yield step


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BrokerRefused(f"this message cannot be sent: {error}") from error


def _fields(message: OutgoingMessage) -> list[bytes]:
    fields = [BODY, message.body, ID, _encoded(message.id)]
    if message.type:
        fields += [TYPE, _encoded(message.type)]
    if headers := headers_of(message):
        try:
            fields += [HEADERS, json.dumps(headers).encode()]
        except (TypeError, ValueError, RecursionError) as error:
            raise BrokerRefused(f"this message cannot be sent: {error}") from error
    return fields


def _order(id: str) -> tuple[int, int]:
    """The order of an entry's id, as the server compares ids."""
    milliseconds, _, number = id.partition("-")
    return int(milliseconds), int(number or 0)


def _before(id: str) -> str:
    """The id before this one: a group reads what comes after an id."""
    milliseconds, number = _order(id)
    return f"{milliseconds}-{number - 1}" if number else f"{milliseconds - 1}-{2**64 - 1}"


def _pairs(fields: list[Any]) -> Iterator[tuple[bytes, Any]]:
    values = iter(fields)
    return zip(values, values, strict=True)


def _make_message(
    id: bytes, fields: list[bytes], attempt: int, origin: Mapping[str, Any] = MappingProxyType({})
) -> Message:
    """Fields other than ours are headers. If there is no body, they are a JSON object, which is the body."""
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    body, producers_id = named.pop(BODY, None), named.pop(ID, None)
    type, packed = named.pop(TYPE, None), named.pop(HEADERS, None)
    headers = json_object(text_of(packed)) if packed else {}  # json is slower with bytes
    if body is None:
        theirs, producers_id = _texts(_pairs(fields)), None
        body, headers = to_json(theirs), theirs | headers
    elif named:
        headers = _texts(named.items()) | headers
    return make_message(
        body,
        id=producers_id,
        fallback_id=named.get(ENTRY_FIELD) or id,
        type=type,
        headers=headers,
        failures=attempt - 1,
        published_at=int(id.partition(b"-")[0]) / 1000,
        receipt=id,
        origin=origin,
    )


def _texts(fields: Iterable[tuple[bytes, Any]]) -> dict[str, Any]:
    named = {text_of(name): text_of(value) for name, value in fields}
    return {name: value for name, value in named.items() if not name.startswith(PREFIX)}


def _make_dead_letter(id: bytes, fields: list[bytes]) -> DeadLetter:
    message = _make_message(id, fields, 1)
    named = {text_of(name): value for name, value in _pairs(fields)}
    return make_dead_letter(
        message,
        id,
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
