# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Kafka, by aiokafka: a topic read by a consumer group, a topic for retries, and one for dead letters.

``kafka://user:password@one:9092,two:9092``, or ``kafkas://`` for TLS. Options, as in ``?partitions=24&cafile=ca.pem``:
``sasl_mechanism`` (PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, OAUTHBEARER with ``token_provider=package.module:function``),
``cafile``, ``certfile``, ``keyfile``; ``partitions`` and ``replication_factor`` of topics that are created because they
do not exist; ``session_timeout_seconds``, after which a dead consumer's partitions are reassigned;
``rebalance_timeout_seconds``, which bounds how long a rebalance waits for in-flight messages; Kafka's own
``partition_assignment_strategy``, ``group_instance_id``, ``isolation_level`` and ``auto_offset_reset``.

Kafka does not settle single messages: a consumer owns whole partitions, and commits for each one offset below which
all messages are settled. The metadata of the commit marks those that are settled above it, and the partition's next
owner skips them; if the marks do not fit, the last of these are redelivered. A rebalance of the group waits for
in-flight messages as long as a shutdown does, ``CONSUMER_DRAIN_SECONDS``; a message that takes longer is redelivered
to the partition's next owner.

For ``CONSUMER_SOURCE=orders`` and ``CONSUMER_GROUP=billing`` the topics are ``orders``, ``orders.billing.retry`` and
``orders.billing.dead``: retries and dead letters belong to one group. A retry or a dead letter is produced, and
confirmed, before its offset counts as settled: a crash in between makes a duplicate, never a loss. The retry topic
has a partition for each step of the backoff, and its consumer waits for the first record in each.

``CONSUMER_SOURCE=orders,payments`` is one consumer of both topics, each with its own retries and dead letters. A
pattern, such as ``^orders\\..*``, is a regular expression that matches whole names of topics, but none that ends with
``.retry`` or ``.dead``; the topics that it matches share ``billing.retry`` and ``billing.dead``.
"""

import asyncio
import base64
import json
import logging
import math
import random
import re
import struct
import time
import zlib
from collections import Counter, defaultdict
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
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from inspect import isawaitable
from platform import node
from typing import Any, ClassVar, NamedTuple, Self

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka import conn as aiokafka_conn
from aiokafka import errors as kafka_errors
from aiokafka.abc import AbstractTokenProvider, ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.consumer import fetcher as aiokafka_fetcher
from aiokafka.consumer import subscription_state as aiokafka_state
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import KafkaError
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.record.default_records import (
    DefaultRecordBatch,
    DefaultRecordBatchBuilder,
    _DefaultRecordBatchPy,
    _DefaultRecordPy,
)
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy
from aiokafka.record.util import decode_varint
from aiokafka.structs import OffsetAndMetadata

from ..cancellation import cancellable_sleep
from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable
from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .connectivity import Connectivity
from .delivery import (
    ATTEMPTS,
    DEAD_LETTERED_AT,
    KEY,
    PREFIX,
    PUBLISHED_AT,
    REASON,
    SHORTENED,
    fit_dead_letter,
    headers_of,
    json_object,
    make_dead_letter,
    make_message,
    seconds_of,
    text_of,
)
from .json_values import decode_json_values
from .requests import Requests, Rule, abort, together
from .source import MISSING, Broker, Capabilities, log_settlement_lost
from .url import TLS_OPTIONS, BrokerUrl, CurrentUrl

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer a request or to confirm a message."""
COMMIT_SECONDS = 0.25
"""How often to commit; a consumer that dies repeats at most this much of its work."""
CHECK_SECONDS = 1.0
"""How often to check that the broker can be reached, since aiokafka does not report outages."""
POLL_SECONDS = 1.0
DISCOVER_SECONDS = 30.0
"""The delay until a new partition is read, or a topic that a pattern matches or that was created again."""
HEARTBEAT_SECONDS = 1.0
"""The delay until other consumers hear that one joined or left."""
SESSION_SECONDS = 30.0
REJOIN_SECONDS = 3.0
"""How long a rebalance may take after the in-flight messages are settled or abandoned."""
STUCK_SECONDS = 30.0
"""A consumer without an answer to any fetch for this long, or with a rebalance that is this late, is replaced:
aiokafka may not recover by itself (aiokafka#847, #1037)."""
STOP_SECONDS = 1.0
CLOSE_SECONDS = 1.25
OUTAGE_SECONDS = 0.25
"""The time limit for the last commit, in place of STOP_SECONDS, while the broker cannot be reached."""
RECORDS_AT_ONCE = 500
"""The most records in one publish, or in one read of dead letters."""
MOST_COMMITS = 10
"""How often a replay or a purge commits one step again, while other commands overwrite the commit."""
MOST_METADATA_BYTES = 4096
"""The limit for the metadata of a committed offset: the broker's ``offset.metadata.max.bytes``, by default."""
MOST_MARKS = 2**23
"""How many offsets a commit marks at most: a bit each, before compression."""
METADATA = f"{PREFIX}settled"
"""The beginning of our metadata, before a colon."""
NO_COMMIT = OffsetAndMetadata(-1, "")

PARTITIONS = 12
MOST_DELAYS = 12
FOREVER_MS = 2**31 - 1
MOST_RECORD_BYTES = 95 * 2**20
"""A limit of the client only, below the requests that brokers accept; the topic decides what it stores."""
USUAL_RECORD_BYTES = 1_048_588
"""A topic's default limit, for users without the right to read the limit."""
MORE_BYTES = 2**17
"""Room for our headers: a record that is as large as the source allows can still be retried and dead-lettered."""
OWN_TOPICS = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "message.timestamp.type": "CreateTime",
}
LIMIT = "max.message.bytes"
LOG_APPEND_TIME = 1
GZIP = 1
MOST_DELAY_SECONDS = 366 * 86_400
"""A due time that is further away is not one of ours."""
EARLY_SECONDS = 0.05
"""A retry may be this early: the times of records are whole milliseconds."""
TOKEN = "OAUTHBEARER"
SASL_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", TOKEN)
ASSIGNORS = (RoundRobinPartitionAssignor, RangePartitionAssignor, StickyPartitionAssignor)
USUAL_ASSIGNORS = "roundrobin,range"
"""All members of a group need one in common: ``range`` is a default of most other clients."""
OPTIONS = (
    *("sasl_mechanism", "token_provider", *TLS_OPTIONS, "partitions", "replication_factor"),
    *("session_timeout_seconds", "rebalance_timeout_seconds", "partition_assignment_strategy"),
    *("group_instance_id", "isolation_level", "auto_offset_reset"),
)

MATCHED = ""
"""Stands for all topics that a pattern matches."""

ID = f"{PREFIX}id"
TYPE = f"{PREFIX}type"
ORIGIN = f"{PREFIX}origin"
"""Header of a copy: the topic, the partition and the offset of the first record, as JSON."""
JSON_HEADERS = f"{PREFIX}json-headers"
"""Header: the names of the headers whose values were not text, and are stored as JSON."""
DUE_AT = f"{PREFIX}due-at"
"""Header: when a retry is due, in Unix seconds."""
HISTORY = (ATTEMPTS, DUE_AT, REASON, DEAD_LETTERED_AT, PUBLISHED_AT)
"""Headers that a replayed message loses."""

MAY_NOT_CREATE = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.ClusterAuthorizationFailedError,
    kafka_errors.PolicyViolationError,
)
TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
OF_ONE_RECORD = (*TOO_LARGE, kafka_errors.InvalidTimestampError, kafka_errors.UnknownError)
"""The broker refuses a whole batch for one record. aiokafka does not know InvalidRecord, of compacted topics."""


class _TooLarge(BrokerRefused):
    """The topic does not store a record of this size."""


RULES = (
    Rule(
        (kafka_errors.SaslAuthenticationFailed, kafka_errors.AuthenticationFailedError),
        BrokerDenied,
        "the user name, the token or the password was refused",
    ),
    Rule(
        (*MAY_NOT_CREATE, kafka_errors.GroupAuthorizationFailedError),
        BrokerDenied,
        "this user lacks a right: {error}",
    ),
    Rule(
        (
            kafka_errors.InvalidGroupIdError,
            kafka_errors.InvalidSessionTimeoutError,
            kafka_errors.InvalidTopicError,
            kafka_errors.RecordTooLargeError,
            kafka_errors.UnsupportedSaslMechanismError,
        ),
        BrokerRefused,
        "refused: {error}",
    ),
    Rule(TOO_LARGE, _TooLarge, "a message is larger than its topic allows (max.message.bytes)"),
    Rule(
        kafka_errors.InconsistentGroupProtocolError,
        BrokerRefused,
        "another client in the consumer group assigns partitions by a strategy that this service does not offer: name it in "
        "partition_assignment_strategy, end that client first, or give one of the two another CONSUMER_GROUP",
    ),
)

Record = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]
"""The key, value and headers of a record to produce."""

log = structlog.get_logger()

if logging.getLogger("aiokafka").level == logging.NOTSET:
    # It logs every rebalance as an error or a warning; the runtime logs each outage once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


@dataclass(eq=False, slots=True)
class _Partition:
    """A partition, from its assignment to this consumer until it is revoked."""

    topic_partition: TopicPartition
    marked: range = range(0)
    """The offsets that the group's commit marked at the assignment, as settled or not."""
    left: set[int] = field(default_factory=set)
    """The marked offsets that are not settled."""
    unacked: set[int] = field(default_factory=set)
    """The offsets of unacked and of requeued messages."""
    position: int = 0
    """The offset after the last delivery."""
    committed: OffsetAndMetadata = NO_COMMIT
    waited_for: int = -1
    """The offset of the last retry that was not due yet."""
    revoked: bool = False
    origin: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        topic, number = self.topic_partition
        self.origin = {"source": topic, "topic": topic, "partition": number}

    def is_settled(self, offset: int) -> bool:
        """Whether the group's commit at the assignment marked the offset as settled."""
        return offset in self.marked and offset not in self.left

    def commit(self, most_bytes: int) -> OffsetAndMetadata:
        """The offset below which all messages are settled; its metadata marks the settled offsets above it.

        Offsets without a record count as settled. Marks that do not fit are left out, the last ones first.
        """
        # An offset in ``left`` below the position was delivered, or has no record any more.
        unsettled = self.unacked | {n for n in self.left if n >= self.position}
        end = max(self.position, self.marked.stop)
        first = min(unsettled, default=end)
        count = max(0, min(end - first - 1, MOST_MARKS))
        bits = bytearray(((1 << count) - 1).to_bytes((count + 7) // 8, "little"))
        _flip(bits, first, [n for n in unsettled if first < n <= first + count])
        while len(metadata := _packed(bits)) > most_bytes:
            del bits[len(bits) // 2 :]
        return OffsetAndMetadata(first, metadata)


class _Own(NamedTuple):
    """The topics of a group for the retries and the dead letters of one topic, or of all that patterns match."""

    retry: str
    dead: str


# -- records


def name_in_topics(group: str) -> str:
    """The group's name as a part of a topic's name, which may have fewer characters.

    Its dots are doubled, so that the group ``b.c`` of the source ``a`` shares no topic with ``c`` of ``a.b``.
    """

    def escaped(char: re.Match[str]) -> str:
        return ".." if char[0] == "." else "".join(f"_{byte:02x}" for byte in char[0].encode())

    return re.sub(r"[^\w-]", escaped, group, flags=re.ASCII)


BACK_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*(?:\\[1-9]|\(\?P=|\(\?\()")


def _any_of(patterns: Sequence[str], names: Iterable[str]) -> re.Pattern[str]:
    """Matches the names, and what a pattern matches except retry and dead-letter topics. Raises BrokerRefused."""
    others = "|".join(rf"(?!.*\.(?:retry|dead)$)(?:{pattern})" for pattern in patterns)
    whole = rf"(?:{'|'.join(map(re.escape, names))}|{others})$"
    for pattern in (*patterns, whole):
        named = ",".join(patterns) if pattern is whole else pattern
        msg = f"CONSUMER_SOURCE: {named!r}"
        try:
            re.compile(pattern)
        except re.error as error:
            raise BrokerRefused(f"{msg} is not a regular expression: {error}") from None
        if BACK_REFERENCE.search(pattern):  # which would refer to another pattern's group
            raise BrokerRefused(f"{msg} refers back to a group, which a pattern must not")
    return re.compile(whole)


def delays_seconds(first: float, longest: float) -> list[float]:
    """The steps of the backoff: doubling, or more where that would be too many partitions."""
    steps = min(MOST_DELAYS, 1 + math.ceil(math.log2(longest / first)))
    factor = (longest / first) ** (1 / max(1, steps - 1))
    return [first * factor**step for step in range(steps - 1)] + [longest]


def partition_for(key: bytes | None, partitions: list[int], available: list[int]) -> int:
    """The partition of the key: the one that Kafka's own clients choose, by murmur2; without a key any.

    aiokafka's hash, which reads each byte alone, would take half of the CPU time of a publish.
    """
    if key is None:
        return random.choice(available or partitions)
    words, factor, mask = len(key) // 4, 0x5BD1E995, 0xFFFFFFFF
    hashed = 0x9747B28C ^ len(key)
    for word in struct.unpack_from(f"<{words}I", key):
        mixed = word * factor & mask
        hashed = (hashed * factor ^ (mixed ^ mixed >> 24) * factor) & mask
    if rest := key[4 * words :]:
        hashed = (hashed ^ int.from_bytes(rest, "little")) * factor & mask
    hashed = (hashed ^ hashed >> 13) * factor & mask
    return partitions[((hashed ^ hashed >> 15) & 0x7FFFFFFF) % len(partitions)]


def _record(message: OutgoingMessage) -> Record:
    headers = headers_of(message)
    key = str(headers.pop(KEY, "") or message.id)
    json_names = []
    try:
        encoded: list[tuple[str, bytes | None]] = [(ID, message.id.encode())]
        if message.type:
            encoded.append((TYPE, message.type.encode()))
        for name, value in headers.items():
            if isinstance(value, str):
                encoded.append((name, value.encode()))
            elif isinstance(value, bytes):
                encoded.append((name, value))
            else:
                encoded.append((name, json.dumps(value).encode()))
                json_names.append(name)
        if json_names:
            encoded.append((JSON_HEADERS, json.dumps(json_names).encode()))
        return key.encode(), message.body, encoded
    except (TypeError, ValueError) as error:
        raise BrokerRefused(f"this message cannot be sent: {error}") from error


def _copy(message: Message, history: Mapping[str, str]) -> Record:
    """The message's record, to produce it as a retry or a dead letter."""
    _, record = message.receipt
    added = {ID: message.id, TYPE: message.type, ATTEMPTS: str(message.attempt), **history}
    added[ORIGIN] = json.dumps(dict(message.origin))
    if message.published_at_seconds:
        added[PUBLISHED_AT] = f"{message.published_at_seconds:.3f}"
    replaced = (*HISTORY, ID, TYPE, ORIGIN)
    headers = [(name, value) for name, value in record.headers if name not in replaced]
    headers += [(name, value.encode(errors="replace")) for name, value in added.items()]
    return record.key, record.value, headers


def _replayed(letter: DeadLetter) -> Record:
    _, record = letter.receipt
    headers = [(name, value) for name, value in record.headers if name not in (*HISTORY, ID)]
    return record.key, record.value, [*headers, (ID, letter.id.encode())]


def _shortened(letter: Record, most_bytes: int) -> Record:
    key, value, headers = letter

    def encoded(headers: dict[str, Any]) -> list[tuple[str, bytes | None]]:
        return [(n, b"%d" % v if n == SHORTENED else v) for n, v in headers.items()]

    def fits(body: bytes, headers: dict[str, Any]) -> bool:
        size = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, body, encoded(headers))
        return bool(size <= most_bytes)

    body, kept = fit_dead_letter(value or b"", dict(headers), fits)
    return key, body, encoded(kept)


def _message(record: Any, partition: _Partition) -> Message:
    headers: dict[str, Any] = {}
    for name, value in record.headers:
        try:
            headers[name] = value.decode()
        except (UnicodeDecodeError, AttributeError):  # other bytes, or None
            headers[name] = value
    id, type, published_at, first = headers.pop(ID, None), headers.pop(TYPE, None), None, None
    if headers:
        if JSON_HEADERS in headers:
            decode_json_values(headers, headers.pop(JSON_HEADERS))
        published_at, first = headers.pop(PUBLISHED_AT, None), headers.pop(ORIGIN, None)
    key, offset, timestamp = record.key, record.offset, record.timestamp
    if key is not None and (key := key.decode("utf-8", "replace")) != id:
        headers[KEY] = key
    origin = first and _origin_of_first(first)
    if not origin:
        origin = partition.origin.copy()
        origin["offset"] = offset
    message = make_message(
        record.value,
        id=id,
        # Offsets start again in a topic that is created again.
        fallback_id=id or "-".join(map(str, (*partition.topic_partition, offset, timestamp))),
        type=type,
        headers=headers,
        failures=headers.get(ATTEMPTS),
        published_at=published_at or (timestamp or 0) / 1000,
        receipt=(partition, record),
        origin=origin,
    )
    if key:
        message.key = key
    return message


def _origin_of_first(text: Any) -> dict[str, Any]:
    """The origin of the first record, which its copies name; empty if that cannot be read."""
    origin = json_object(text)
    if [*map(type, map(origin.get, ("topic", "partition", "offset")))] == [str, int, int]:
        return {**origin, "source": origin["topic"]}
    return {}


def _place_of(message: Message) -> tuple[TopicPartition, int]:
    """The message's partition and offset."""
    partition, record = message.receipt
    return partition.topic_partition, record.offset


def _dead_letter(record: Any, partition: _Partition) -> DeadLetter:
    message = _message(record, partition)
    headers: Any = message.headers
    reason, attempts, at = (
        headers.pop(name, None) for name in (REASON, ATTEMPTS, DEAD_LETTERED_AT)
    )
    return make_dead_letter(
        message, message.receipt, reason=reason, attempts=attempts, dead_lettered_at=at
    )


# -- records with a header name that is not UTF-8: the broker stores them, and aiokafka's reader raises


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # aiokafka has no types
    """Reads such names with U+FFFD; it is slow, since it is in Python."""

    _pos: int

    def _read_msg(self) -> _DefaultRecordPy:
        position = self._pos

        def number() -> int:
            nonlocal position
            value, position = decode_varint(self._buffer, position)
            return int(value)

        def field() -> bytes | None:
            nonlocal position
            length = number()
            start, position = position, position + max(0, length)
            return bytes(self._buffer[start:position]) if length >= 0 else None

        number(), number()  # the record's length and attributes
        timestamp, offset = self.first_timestamp + number(), self.base_offset + number()
        key, value = field(), field()
        headers = [(text_of(field()), field()) for _ in range(number())]
        self._pos = position
        return _DefaultRecordPy(offset, timestamp, self.timestamp_type, key, value, headers)


class _LenientRecords(_MemoryRecordsPy):  # type: ignore[misc]
    def next_batch(self) -> Any:
        data = self._next_slice
        batch = super().next_batch()
        return _LenientBatch(data) if isinstance(batch, DefaultRecordBatch) else batch


class _Records(MemoryRecords):  # type: ignore[misc]
    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.data = data


class _PartitionRecords(aiokafka_fetcher.PartitionRecords):  # type: ignore[misc]
    _records: Any
    _records_iterator: Iterator[Any]
    _aborted_transactions: list[Any]
    _aborted_producers: set[int]

    def __iter__(self) -> Iterator[Any]:
        return self._records_iterator  # without a call for each record

    def _consumer_record(self, _: TopicPartition, record: Any) -> Any:
        return record  # a copy of it, as aiokafka makes, costs more than reading it

    def _unpack_records(self) -> Iterator[Any]:
        aborted = [*self._aborted_transactions]
        try:
            yield from super()._unpack_records()
        except UnicodeDecodeError:
            unread_from = self.next_fetch_offset
            self._records = _LenientRecords(self._records.data)
            self._aborted_transactions, self._aborted_producers = aborted, set()
            yield from (r for r in super()._unpack_records() if r.offset >= unread_from)


aiokafka_fetcher.MemoryRecords = _Records
aiokafka_fetcher.PartitionRecords = _PartitionRecords


class _PartitionState(aiokafka_state.TopicPartitionState):  # type: ignore[misc]
    """Keeps the group's commit, from the answer with the position to read from; aiokafka drops its metadata."""

    commit = NO_COMMIT

    def update_committed(self, offset_meta: OffsetAndMetadata) -> None:
        self.commit = offset_meta
        super().update_committed(offset_meta)


aiokafka_state.TopicPartitionState = _PartitionState


# -- aiokafka's clients


class _Connection(AIOKafkaConnection):  # type: ignore[misc]
    """Creates no topic: by default a broker creates every topic whose metadata a client requests."""

    def send(self, request: Any, expect_response: bool = True) -> Any:
        if isinstance(request, MetadataRequest):
            request._allow_auto_topic_creation = False
        answer: Any = super().send(request, expect_response)
        return answer


class _Client(AIOKafkaClient):  # type: ignore[misc]
    async def _get_conn(self, *args: Any, **options: Any) -> Any:
        connection = await super()._get_conn(*args, **options)
        if connection is not None:
            connection.__class__ = _Connection
        return connection


class _Tokens(AbstractTokenProvider):  # type: ignore[misc]
    """Asks the team's function, named like ``package.module:function``, for a token for each connection."""

    def __init__(self, place: str) -> None:
        module, _, name = place.partition(":")
        try:
            self._ask = getattr(import_module(module), name)
        except Exception as error:  # the module may raise anything
            msg = f"CONSUMER_BROKER_URL: token_provider, as package.module:function: {error}"
            raise BrokerRefused(msg) from error

    async def token(self) -> str:
        try:
            token = await asyncio.to_thread(self._ask)
            token = await token if isawaitable(token) else token
            if isinstance(token, str):
                return token
            raise TypeError(f"it returned {type(token).__name__}, not str")
        except Exception as error:
            msg = f"the token_provider failed: {type(error).__name__}: {error}"
            raise KafkaError(msg) from error


class _TokenAuthenticator(aiokafka_conn.OAuthAuthenticator):  # type: ignore[misc]
    async def step(self, payload: bytes | None) -> Any:
        """Answers a refusal by RFC 7628 (3.2.3): aiokafka would take it for a login, and every request would hang."""
        return (b"\x01", True) if payload else await super().step(payload)


aiokafka_conn.OAuthAuthenticator = _TokenAuthenticator


def _choice(url: BrokerUrl, option: str, choices: Sequence[str]) -> str:
    """The option's value, one of ``choices``; the first is the default. Raises BrokerRefused."""
    if (text := url.options.get(option, choices[0])) not in choices:
        raise BrokerRefused(f"CONSUMER_BROKER_URL: {option} must be one of {', '.join(choices)}")
    return text


def _security(url: BrokerUrl) -> dict[str, Any]:
    """Arguments that all of aiokafka's clients share. Raises BrokerRefused."""
    mechanism = _choice(url, "sasl_mechanism", SASL_MECHANISMS)
    provider = url.options.get("token_provider", "")
    if (mechanism == TOKEN) != bool(provider) or (provider and url.user):
        msg = f"CONSUMER_BROKER_URL: sasl_mechanism={TOKEN} and token_provider must be set together, without a user"
        raise BrokerRefused(msg)
    protocol = "SSL" if url.scheme == "kafkas" else "PLAINTEXT"
    if {*TLS_OPTIONS} & url.options.keys() and protocol != "SSL":
        raise BrokerRefused(f"CONSUMER_BROKER_URL: {', '.join(TLS_OPTIONS)} need kafkas://")
    if provider:
        login: dict[str, Any] = {"sasl_oauth_token_provider": _Tokens(provider)}
    elif url.user:
        login = {"sasl_plain_username": url.user, "sasl_plain_password": url.password or ""}
    else:
        return {"security_protocol": protocol}
    return {"security_protocol": f"SASL_{protocol}", "sasl_mechanism": mechanism, **login}


async def _start(client: AIOKafkaProducer | AIOKafkaAdminClient | AIOKafkaConsumer) -> None:
    """Like aiokafka's `start`, which leaves a connection open if it is cancelled during its first request."""
    (client.client if isinstance(client, AIOKafkaProducer) else client._client).__class__ = _Client
    starting = asyncio.ensure_future(client.start())
    try:
        await asyncio.shield(starting)
    finally:
        await _end([starting])


async def _close(
    stop: Callable[[], Awaitable[None]],
    client: AIOKafkaClient,
    seconds: float,
    tasks: Callable[[], list[asyncio.Task[Any] | None]] = list,
) -> None:
    """Stop one of aiokafka's clients; abort it if the broker is unresponsive or the stop fails in an outage."""
    closing = asyncio.ensure_future(stop())
    try:
        await asyncio.wait({closing}, timeout=seconds)
    finally:
        if not closing.done() or closing.cancelled() or closing.exception() is not None:
            for connection in list(client._conns.values()):
                if connection._writer is not None:
                    abort(connection._writer.transport)
                connection.close()
            await _end([closing, client._sync_task, *tasks()])
            await _end(tasks(), 0)  # aiokafka's fetcher starts other tasks until it is cancelled


async def _end(tasks: Iterable[asyncio.Task[Any] | None], grace_seconds: float = 0.2) -> None:
    """Wait for tasks that end with the tasks they wait for, then cancel the rest."""
    ended = {task for task in tasks if task is not None and not task.done()}
    if ended:
        await asyncio.wait(ended, timeout=grace_seconds)
    for _ in range(3):  # aiokafka's fetcher swallows a cancellation while it cancels its own tasks
        if left := {task for task in ended if not task.done()}:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.1)
    for task in ended:
        if task.done() and not task.cancelled():
            task.exception()  # retrieved: the outage was logged


def _tasks_of(consumer: AIOKafkaConsumer) -> list[asyncio.Task[Any] | None]:
    coordinator, fetcher = consumer._coordinator, consumer._fetcher
    tasks = [
        getattr(coordinator, name, None)
        for name in ("_coordination_task", "_heartbeat_task", "_commit_refresh_task")
    ]
    return [*tasks, getattr(fetcher, "_fetch_task", None), *getattr(fetcher, "_pending_tasks", ())]


def _retrieve_commit_errors() -> None:
    """A commit that timed out goes on, since aiokafka shields it; its error would be reported as never retrieved."""
    for task in asyncio.all_tasks():
        if getattr(task.get_coro(), "__name__", "") == "_do_commit_offsets":
            task.add_done_callback(lambda task: task.cancelled() or task.exception())


class KafkaBroker(Broker, ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """The topics that one consumer group reads."""

    dead_letters_at_once = RECORDS_AT_ONCE
    capabilities: ClassVar[Capabilities] = Capabilities(
        requeue=False,  # redelivered when this consumer has left the group
        order=False,  # only within a partition
        competing_consumers=False,
        counts_crashes=False,
    )
    destinations: ClassVar = {"topic": "topic:NAME"}
    origins = ("topic",)
    has_patterns = True

    _producer: AIOKafkaProducer

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL cannot be used."""
        super().__init__(settings, prefetch)
        like = "kafka://user:password@one:9092,two:9092"
        parse = partial(BrokerUrl, like=like, options=OPTIONS, default_port=9092)
        self._current_url = CurrentUrl(settings, parse)
        url = self._url = self._current_url()
        if not url.hosts or url.path:
            raise url.unreadable()
        self._security = _security(url)
        self._partition_count = url.whole_number("partitions", PARTITIONS)
        self._replication = url.whole_number("replication_factor", -1, at_most=2**15 - 1)
        self._session_seconds, self._rebalance_seconds = (
            url.number(option, default, at_least=1, at_most=86_400)
            for option, default in (
                ("session_timeout_seconds", SESSION_SECONDS),
                ("rebalance_timeout_seconds", settings.drain_seconds + REJOIN_SECONDS),
            )
        )
        names = url.options.get("partition_assignment_strategy", USUAL_ASSIGNORS).split(",")
        known = {assignor.name: assignor for assignor in ASSIGNORS}
        if not {*names} <= known.keys():
            msg = f"CONSUMER_BROKER_URL: partition_assignment_strategy must be some of {', '.join(known)}"
            raise BrokerRefused(msg)
        # Subclasses, since aiokafka's assignors store an assignment in the class, for all consumers.
        self._assignors = [type(name, (known[name],), {}) for name in names]
        self._instance = url.options.get("group_instance_id", "").replace("{hostname}", node())
        self._isolation_level = _choice(
            url, "isolation_level", ("read_committed", "read_uncommitted")
        )
        self._latest = _choice(url, "auto_offset_reset", ("earliest", "latest")) == "latest"
        self._first: set[TopicPartition] | None = None
        """The partitions that existed when this member started, if a new group begins at their end."""
        self._assigned_at = -math.inf
        self.connectivity = Connectivity(url.redacted)
        self._requests = Requests(url.redacted, (KafkaError, EOFError), RULES, ANSWER_SECONDS)
        self._group = settings.group or settings.source
        group = name_in_topics(self._group)
        patterns = [name for name in settings.sources if name.startswith("^")]
        self._topics = [name for name in settings.sources if name not in patterns]
        for topic in self._topics:
            if re.fullmatch(r"[\w.-]+", topic, re.ASCII) is None:
                msg = f"CONSUMER_SOURCE: {topic!r} cannot be the name of a topic (a comma ends a name or pattern)"
                raise BrokerRefused(msg)
        places = {topic: f"{topic}.{group}" for topic in self._topics}
        places |= {MATCHED: group} if patterns else {}
        self._own = {topic: _Own(f"{own}.retry", f"{own}.dead") for topic, own in places.items()}
        self._retry_topics = [own.retry for own in self._own.values()]
        self._dead_topics = [own.dead for own in self._own.values()]
        self._named = [*self._topics, *self._retry_topics, *self._dead_topics]
        self._pattern = _any_of(patterns, self._topics + self._retry_topics) if patterns else None
        self._delays = delays_seconds(settings.retry_seconds, settings.retry_max_seconds)
        self._consumer: AIOKafkaConsumer | None = None
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._to_commit: set[_Partition] = set()
        self._most_metadata_bytes = MOST_METADATA_BYTES
        self._acked: list[str] = []
        """The ids of messages acked since the last commit; the messages would burden the garbage collector."""
        self._commit_wanted = asyncio.Event()
        self._settled = asyncio.Event()
        """Set when a message was settled or dropped, so there may be room for another."""
        self._closing = asyncio.Event()
        self._fetcher: asyncio.Task[None] | None = None
        self._revoked_in_flight: set[tuple[TopicPartition, int]] = set()
        """Partition and offset of the messages that were in flight when their partition was revoked."""
        self._postponing: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._last_answer_at = 0.0

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        if self._url.scheme == "kafkas":
            self._security["ssl_context"] = self._url.tls_context()
        await self._reach_one_host()
        self._producer = AIOKafkaProducer(
            acks="all",
            max_batch_size=2**17,
            max_request_size=MOST_RECORD_BYTES,
            partitioner=partition_for,
            **self._client_arguments(),
        )
        try:
            async with self._requests.bounded(CONNECT_SECONDS):
                await _start(self._producer)
        except BaseException:
            await self._close_producer(0.5)
            raise
        self._closing.clear()
        self.connectivity.established()
        self._run(self.connectivity.keep(self._watch, self._closing), "watch")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._settled.set()
        await self.stop()
        tasks = [*self._tasks, *self._postponing]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=0.5)
        self._tasks.clear()
        await asyncio.gather(self._leave(CLOSE_SECONDS), self._close_producer(CLOSE_SECONDS))
        self.connectivity.up = False

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"kafka-{name}")
        self._tasks.append(task)
        return task

    def _login(self) -> dict[str, Any]:
        self._security |= _security(self._current_url())
        return self._security

    def _client_arguments(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        return {
            "bootstrap_servers": self._url.hosts,
            "client_id": self.settings.source,
            "request_timeout_ms": round(seconds * 1000),
            **self._login(),
        }

    async def _reach_one_host(self) -> None:
        """Raises the reason if no host can be reached: aiokafka's own start reports none."""
        errors: list[BrokerError] = []
        for host in self._url.hosts:
            name, _, port = host.rpartition(":")
            try:
                async with self._requests.bounded(CONNECT_SECONDS / len(self._url.hosts)):
                    connection = await create_conn(
                        name.strip("[]"),
                        int(port),
                        request_timeout_ms=round(CONNECT_SECONDS * 1000),
                        **self._login(),
                    )
                    connection.close()
                return
            except BrokerError as error:
                errors.append(error)
        raise next((e for e in errors if isinstance(e, BrokerRefused)), errors[0])

    @property
    def connected(self) -> bool:
        return self.connectivity.up and not self._closing.is_set()

    async def _watch(self) -> None:
        """Detect outages; aiokafka reconnects by itself."""
        login = {f"_{name}": value for name, value in self._login().items()}
        for client in (self._producer.client, self._consumer and self._consumer._client):
            if client is not None:
                vars(client).update(login)
        while not self._closing.is_set():
            async with self._requests.bounded():
                if not await self._producer.client.force_metadata_update():
                    await self._reach_one_host()  # which raises the reason
                    raise BrokerUnavailable(f"{self._url.redacted}: no broker can be reached")
            if self._consumer is not None or self._fetcher is None:
                self.connectivity.established()
            await cancellable_sleep(CHECK_SECONDS, self._closing)

    # -- topology

    async def declare(self) -> None:
        """Create the topics that do not exist; others are used unchanged. Raises BrokerRefused."""
        existing, topics = await self._existing(*self._named), []
        for source, own in self._own.items():
            limit = USUAL_RECORD_BYTES
            if source in existing and not existing.keys() >= {*own}:
                limit = await self._limit(source)
            configs = {**OWN_TOPICS, LIMIT: str(limit + MORE_BYTES)}
            if source != MATCHED:
                topics.append(NewTopic(source, self._partition_count, 1))
            topics.append(NewTopic(own.retry, len(self._delays), 1, topic_configs=configs))
            topics.append(NewTopic(own.dead, 1, 1, topic_configs=configs))
        missing = [topic for topic in topics if topic.name not in existing]
        refused = await self._create(missing, self._replication) if missing else {}
        if self._replication == -1 and any(
            isinstance(error, kafka_errors.InvalidReplicationFactorError)
            for error in refused.values()
        ):  # a broker before 2.4, which has no default
            brokers = len(self._producer.client.cluster.brokers())
            refused = await self._create(missing, min(3, brokers))
        for name, error in refused.items():
            if isinstance(error, MAY_NOT_CREATE):
                msg = f"the topic {name!r} does not exist, and this user may not create it: {error}"
                raise BrokerDenied(msg) from error
            raise BrokerRefused(f"the topic {name!r} cannot be created: {error}") from error
        for topic in topics:  # all brokers know a new topic only a little later
            async with self._requests.bounded():
                await self._producer.partitions_for(topic.name)

    async def delete(self) -> None:
        async with self._admin() as admin, self._requests.bounded():
            await admin.delete_topics(self._named)

    async def _existing(self, *topics: str) -> dict[str, list[int]]:
        """The partitions of those topics that exist."""
        client = self._producer.client
        async with self._requests.bounded():
            answer = await client.send(client.get_random_node(), MetadataRequest(list(topics)))
            found = {}
            for code, name, *_, partitions in answer.topics:
                error = kafka_errors.for_code(code)
                if error is kafka_errors.TopicAuthorizationFailedError:
                    raise error(name)
                if partitions:
                    found[name] = [number for _, number, *_ in partitions]
        return found

    async def _limit(self, topic: str) -> int:
        """How many bytes a batch of the topic may have."""
        wanted = ConfigResource(ConfigResourceType.TOPIC, topic, {LIMIT: None})
        with suppress(BrokerRefused):
            async with self._admin() as admin, self._requests.bounded():
                [answer] = await admin.describe_configs([wanted])
            for *_, entries in answer.resources:
                for name, value, *_ in entries:  # none, if this user may not read them
                    if name == LIMIT:
                        return int(value)
        return USUAL_RECORD_BYTES

    async def _create(self, topics: list[NewTopic], replication: int) -> dict[str, KafkaError]:
        """Create these topics; returns the errors by name, except for topics that already exist."""
        for topic in topics:
            topic.replication_factor = replication  # the constructor refuses -1, the default
        async with self._admin() as admin, self._requests.bounded():
            response = await admin.create_topics(topics)
        errors = {
            name: kafka_errors.for_code(code)(text) for name, code, text in response.topic_errors
        }
        fine = (kafka_errors.NoError, kafka_errors.TopicAlreadyExistsError)
        return {name: error for name, error in errors.items() if not isinstance(error, fine)}

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(**self._client_arguments())
        try:
            async with self._requests.bounded(CONNECT_SECONDS):
                await _start(admin)
            yield admin
        finally:
            await _close(admin.close, admin._client, CLOSE_SECONDS)

    async def describe(self) -> dict[str, int | str]:
        async with self._admin() as admin, self._requests.bounded():
            members = await self._members(admin)
            matched = await self._matched(admin) if self._pattern else []
        sources = [*self._topics, *matched]
        existing = await self._existing(*self._named, *matched)
        async with self._reader(self._group, *sources, *self._retry_topics) as reader:
            waiting = await self._count(reader)
        described: dict[str, int | str] = {"brokers": len(self._producer.client.cluster.brokers())}
        for topic in (*sources, *self._retry_topics):
            count = sum(n for tp, n in waiting.items() if tp.topic == topic)
            described[topic] = count if topic in existing else MISSING
            if topic in sources:
                described[f"{topic} partitions"] = len(existing.get(topic, ()))
                described[f"{topic} consumers"] = len(members)
        dead = await self._dead_letter_counts()
        for topic in self._dead_topics:
            described[topic] = dead[topic] if topic in existing else MISSING
        return described

    async def _matched(self, admin: AIOKafkaAdminClient) -> list[str]:
        """The topics that a pattern matches."""
        assert self._pattern is not None
        return sorted({*filter(self._pattern.match, await admin.list_topics())} - {*self._named})

    async def _members(self, admin: AIOKafkaAdminClient) -> list[Any]:
        while True:
            with suppress(kafka_errors.GroupCoordinatorNotAvailableError):  # before the first
                [response] = await admin.describe_consumer_groups([self._group])
                [(_, _, _, _, _, members, *_)] = response.groups
                return list(members)
            await asyncio.sleep(0.1)

    @asynccontextmanager
    async def _reader(self, group: str, *topics: str) -> AsyncIterator[AIOKafkaConsumer]:
        """Reads all partitions of the topics that exist, from the group's commits, without joining the group."""
        existing = await self._existing(*topics)
        reader = AIOKafkaConsumer(
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,
            **self._client_arguments(),
        )
        try:
            async with self._requests.bounded(CONNECT_SECONDS):
                await _start(reader)
                partitions = [
                    TopicPartition(topic, number)
                    for topic, numbers in existing.items()
                    for number in numbers
                ]
                reader.assign(partitions)
            yield reader
        finally:
            await _close(reader.stop, reader._client, CLOSE_SECONDS, partial(_tasks_of, reader))

    async def _ends(self, reader: AIOKafkaConsumer) -> dict[TopicPartition, int]:
        """The offset after the last message, from the answer to a fetch, because some servers list wrong offsets."""
        async with self._requests.bounded():
            while missing := [tp for tp in reader.assignment() if reader.highwater(tp) is None]:
                await reader.position(missing[0])
                await asyncio.sleep(0.005)
            return {tp: reader.highwater(tp) for tp in reader.assignment()}

    async def _count(
        self, reader: AIOKafkaConsumer, taken: Mapping[TopicPartition, set[int]] | None = None
    ) -> dict[TopicPartition, int]:
        """How many messages of each partition the reader's group has not committed, without those in ``taken``."""
        ends = await self._ends(reader)
        async with self._requests.bounded():
            beginnings = await reader.beginning_offsets(list(ends))
            committed = {tp: await reader.committed(tp) for tp in ends}
        for tp in (tp for tp, offset in committed.items() if offset is None):
            committed[tp] = ends[tp] if self._begins_at_the_end_of(tp) else 0
        first = {tp: max(committed[tp], beginnings[tp]) for tp in ends}
        return {
            tp: max(0, end - first[tp])
            - sum(first[tp] <= offset < end for offset in (taken or {}).get(tp, ()))
            for tp, end in ends.items()
        }

    # -- fetching

    async def start(self) -> None:
        if self._latest:
            self._first = await self._present_partitions()
        await self._join()
        self._run(self._commit_regularly(), "commits")
        self._fetcher = self._run(self._fetch(), "fetcher")

    async def _present_partitions(self) -> set[TopicPartition]:
        matched = []
        if self._pattern:
            async with self._admin() as admin, self._requests.bounded():
                matched = await self._matched(admin)
        existing = await self._existing(*self._topics, *matched)
        return {TopicPartition(topic, one) for topic, ones in existing.items() for one in ones}

    async def _join(self) -> None:
        """Join the group, if this user may read its topics."""
        client, read = self._producer.client, [(0, 2**63 - 1, 1)]  # an offset without a record
        topics = [*self._topics, *self._retry_topics]
        asked = FetchRequest(0, 0, 1, 0, [(topic, read) for topic in topics])
        async with self._requests.bounded():
            answer = await client.send(client.get_random_node(), asked)
            for topic, [(_, code, *_)] in answer.topics:
                if code == kafka_errors.TopicAuthorizationFailedError.errno:
                    raise kafka_errors.TopicAuthorizationFailedError(topic)
        consumer = AIOKafkaConsumer(
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="none",  # see _restart
            session_timeout_ms=round(self._session_seconds * 1000),
            heartbeat_interval_ms=round(min(HEARTBEAT_SECONDS, self._session_seconds / 3) * 1000),
            rebalance_timeout_ms=round(self._rebalance_seconds * 1000),
            max_poll_interval_ms=FOREVER_MS,  # no limit on a handler's time
            partition_assignment_strategy=self._assignors,
            group_instance_id=self._instance or None,
            isolation_level=self._isolation_level,
            metadata_max_age_ms=round(1000 * DISCOVER_SECONDS),
            # The answer to a join may wait for all other members, or until one of them counts as dead.
            **self._client_arguments(
                max(self._rebalance_seconds, self._session_seconds) + ANSWER_SECONDS
            ),
        )
        consumer.subscribe(
            () if self._pattern else topics,
            pattern=self._pattern and self._pattern.pattern,
            listener=self,
        )
        self._consumer = consumer
        try:
            async with self._requests.bounded(self._rebalance_seconds + STUCK_SECONDS):
                await _start(consumer)
        except BaseException:
            await self._leave(0.5)
            raise
        self._last_answer_at = time.monotonic()

    async def _leave(self, seconds: float) -> None:
        """Commit, and leave the group; unacked messages are redelivered."""
        if (consumer := self._consumer) is None:
            return
        await self.flush()
        self._drop_partitions()
        self._consumer = None
        await _close(consumer.stop, consumer._client, seconds, partial(_tasks_of, consumer))

    async def _fetch(self) -> None:
        try:
            await self.connectivity.keep(self._consume, self._closing)
        except Exception as failure:
            self.buffer.fail(failure)

    async def _consume(self) -> None:
        if self._consumer is None:
            await self._join()
        assert self._consumer is not None
        try:
            while not self.stopped:
                while (room := self._room()) <= 0:
                    self._settled.clear()
                    await self._settled.wait()
                await self._poll(self._consumer, room)
        except BrokerError:
            await self._leave(CLOSE_SECONDS)
            raise

    async def _poll(self, consumer: AIOKafkaConsumer, room: int) -> None:
        """Wait for records, and deliver them."""
        async with self._requests.bounded(self._rebalance_seconds + STUCK_SECONDS):
            try:
                batch = await consumer.getmany(
                    timeout_ms=round(POLL_SECONDS * 1000), max_records=room
                )
            except kafka_errors.NoOffsetForPartitionError as error:
                return await self._restart(consumer, error.args[0], None)
            except kafka_errors.OffsetOutOfRangeError as error:
                [(topic_partition, offset)] = error.args[0].items()
                return await self._restart(consumer, topic_partition, offset)
        for topic_partition in batch.keys() & consumer._fetcher._records.keys():
            consumer._fetcher._records.move_to_end(topic_partition)  # the other partitions' turn
        # No await below: the fetcher could be cancelled there, or the partitions revoked.
        for topic_partition, records in batch.items():
            partition = self._partition(consumer, topic_partition)
            marked, retrying = partition.marked, topic_partition.topic in self._retry_topics
            messages = []
            for record in records:
                offset = record.offset
                if marked and partition.is_settled(offset):
                    self._skip_to(partition, offset + 1)
                    continue
                due_at = self._due_at(record) if retrying else 0
                if retrying and (seconds := self._seconds_to_wait(record, partition, due_at)) > 0:
                    self._pause(consumer, partition, offset, seconds)
                    break
                message = _message(record, partition)
                partition.unacked.add(offset)
                partition.position = offset + 1
                if due_at and due_at > time.time() + EARLY_SECONDS and not self.stopped:
                    self._postpone(message)
                elif self._revoked_in_flight and self._is_repeated(message):
                    pass  # its handler settles this delivery
                else:
                    messages.append(message)
            if not self._deliver(*messages):
                for message in messages:
                    await self.requeue(message)
        if batch:
            self._last_answer_at = time.monotonic()
        else:
            self._skip_what_is_no_message(consumer)
            self._check_answers(consumer)

    def _is_repeated(self, message: Message) -> bool:
        """Whether a handler still works on this message, since before the partition was revoked."""
        if (at := _place_of(message)) not in self._revoked_in_flight:
            return False
        self._revoked_in_flight.discard(at)
        return self._still_in_flight(message) is not None

    def _partition(self, consumer: AIOKafkaConsumer, topic_partition: TopicPartition) -> _Partition:
        partition = self._partitions.get(topic_partition)
        if partition is None:
            state = consumer._subscription.subscription.assignment.state_value(topic_partition)
            partition = _Partition(topic_partition, *_marks_of(state.commit))
            self._partitions[topic_partition] = partition
        return partition

    def _skip_to(self, partition: _Partition, position: int) -> None:
        partition.position = position
        self._to_commit.add(partition)
        self._commit_wanted.set()

    async def _restart(
        self, consumer: AIOKafkaConsumer, topic_partition: TopicPartition, offset: int | None
    ) -> None:
        """Read from the oldest record, or from the end: the group has no offset, or no record is at its offset."""
        latest = offset is None and self._begins_at_the_end_of(topic_partition)
        ask = consumer.end_offsets if latest else consumer.beginning_offsets
        oldest = (await ask([topic_partition]))[topic_partition]
        rejoining = consumer._subscription.reassignment_in_progress
        if rejoining or topic_partition not in consumer.assignment():
            return
        where: dict[str, Any] = {
            "topic": topic_partition.topic,
            "partition": topic_partition.partition,
        }
        if offset is not None and offset < oldest:
            lost = {"first": offset, "last": oldest - 1, "count": oldest - offset}
            log.warning("messages_trimmed", **where, **lost)
        elif offset is not None:
            reason = "the topic was created again, or has lost its last records"
            log.warning("partition_restarted", **where, offset=offset, reason=reason)
            if (old := self._partitions.pop(topic_partition, None)) is not None:
                old.revoked = True
                self._to_commit.discard(old)
            # The group's commit is not about these messages either.
            self._partitions[topic_partition] = _Partition(topic_partition)
        consumer.seek(topic_partition, oldest)
        partition = self._partition(consumer, topic_partition)
        self._skip_to(partition, max(partition.position, oldest))

    def _begins_at_the_end_of(self, topic_partition: TopicPartition) -> bool:
        """Whether a partition without a commit is read from its end; own topics and later partitions are not."""
        own = (*self._retry_topics, *self._dead_topics)
        old = self._first is None or topic_partition in self._first
        return self._latest and old and topic_partition.topic not in own

    def _skip_what_is_no_message(self, consumer: AIOKafkaConsumer) -> None:
        """Also commit offsets after the last message, such as a transaction's marker: they would count as waiting."""
        if consumer._subscription.reassignment_in_progress:
            return  # it still lists partitions that were dropped, with messages that were read
        for topic_partition in consumer.assignment() - consumer.paused():
            state = consumer._subscription.subscription.assignment.state_value(topic_partition)
            if state.has_valid_position:  # and so the group's commit is known
                partition = self._partition(consumer, topic_partition)
                if partition.position < state.position:
                    self._skip_to(partition, state.position)

    def _due_at(self, record: Any) -> float:
        due_at = seconds_of(next((v for name, v in record.headers if name == DUE_AT), None))
        if due_at - record.timestamp / 1000 > MOST_DELAY_SECONDS:  # another program's
            return float(record.timestamp / 1000 + self._delays[-1])
        return due_at

    def _seconds_to_wait(self, record: Any, partition: _Partition, due_at: float) -> float:
        """Seconds until the record is due, or has been in its partition for the longest delay: others may be due then.

        At most the longest delay, once for each record: its times may be from another machine's clock.
        """
        if record.offset == partition.waited_for:
            return 0
        now, longest = time.time(), self._delays[-1]
        written_at = now if record.timestamp_type == LOG_APPEND_TIME else record.timestamp / 1000
        return min(due_at - now, written_at + longest - now, longest)

    def _postpone(self, message: Message) -> None:
        """Move a retry that is due later than the longest delay to the end of its partition."""
        self.unacked.add(message)
        task = asyncio.create_task(self._move_to_end(message), name="kafka-postpone")
        self._postponing.add(task)
        task.add_done_callback(self._postponing.discard)

    async def _move_to_end(self, message: Message) -> None:
        partition, record = message.receipt
        same = (record.key, record.value, list(record.headers))
        topic = partition.topic_partition.topic
        while message in self.unacked:
            try:
                await self._produce(topic, [same], len(self._delays) - 1)
            except BrokerError as error:
                log.debug("postpone_failed", message_id=message.id, reason=str(error))
                await cancellable_sleep(CHECK_SECONDS, self._closing)
                if self._closing.is_set():
                    return
            else:
                if message in self.unacked:
                    self._release(message)
                    await self._ack(message)
                return

    def _pause(
        self, consumer: AIOKafkaConsumer, partition: _Partition, offset: int, seconds: float
    ) -> None:
        """Read the partition again from this offset, after these seconds."""
        partition.waited_for = offset
        paused = partition.topic_partition
        consumer.seek(paused, offset)
        consumer.pause(paused)

        def resume() -> None:
            if not partition.revoked and paused in consumer.paused():
                consumer.resume(paused)

        asyncio.get_running_loop().call_later(seconds, resume)

    def _check_answers(self, consumer: AIOKafkaConsumer) -> None:
        """Raises BrokerUnavailable for a consumer whose fetches get no answer although the broker can be reached."""
        reading = consumer.assignment() - consumer.paused()
        answered_ms = max((consumer.last_poll_timestamp(tp) or 0 for tp in reading), default=None)
        silent_seconds = 0 if answered_ms is None else time.time() - answered_ms / 1000
        if not self.connectivity.up or silent_seconds < STUCK_SECONDS:
            self._last_answer_at = time.monotonic()
        elif time.monotonic() - self._last_answer_at > STUCK_SECONDS:
            msg = f"{self._url.redacted}: no answer to a fetch for {STUCK_SECONDS:g} seconds"
            raise BrokerUnavailable(msg)

    async def _stop_fetching(self) -> None:
        if self._fetcher is not None:
            self._fetcher.cancel()  # cancelling getmany loses no message
            await asyncio.wait({self._fetcher}, timeout=STOP_SECONDS)

    async def flush(self) -> None:
        await self._commit(STOP_SECONDS if self.connectivity.up else OUTAGE_SECONDS)

    # -- rebalances; aiokafka calls these

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        try:
            self._check_instance(revoked)
            await self._give_up_partitions()
        except Exception as failure:  # aiokafka would only log it
            self.buffer.fail(failure)

    def _check_instance(self, revoked: Iterable[TopicPartition]) -> None:
        """Raises BrokerRefused if a static member was lost within a session timeout: another process took its place."""
        lost = revoked and self._consumer and not self._consumer._coordinator.member_id
        if lost and self._instance and time.monotonic() - self._assigned_at < self._session_seconds:
            msg = f"another process of the group has the group_instance_id {self._instance!r}: each needs its own"
            raise BrokerRefused(f"{self._url.redacted}: {msg}, such as {{hostname}}")

    async def _give_up_partitions(self) -> None:
        """Drop messages that no worker took, wait for those in flight, and commit."""
        dropped = self._drop_waiting()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0, self._rebalance_seconds - REJOIN_SECONDS)):
                while self.unacked and not self._closing.is_set():
                    self._settled.clear()
                    await self._settled.wait()
                    dropped += self._drop_waiting()  # such as the probe of a pause
        await self._commit()
        log.info("partitions_revoked", dropped=dropped, in_flight=len(self.unacked))
        self._drop_partitions()

    def _drop_waiting(self) -> int:
        """Drop the messages that no handler works on; returns how many."""
        messages = [*self._take_back(), *self.put_offs.timers]
        for message in messages:
            self._release(message)
        return len(messages)

    def put_back(self, message: Message) -> None:
        super().put_back(message)
        self._settled.set()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._last_answer_at = self._assigned_at = time.monotonic()
        log.info("partitions_assigned", partitions=sorted(f"{t}-{p}" for t, p in assigned))

    def _drop_partitions(self) -> None:
        """The partitions are no longer assigned to this consumer: settling their messages has no effect from now on."""
        for id in self._acked:
            log_settlement_lost(Message(b"", id), "ack", "its offset could not be committed")
        self._acked.clear()
        for partition in self._partitions.values():
            partition.revoked = True
        self._partitions.clear()
        self._to_commit.clear()
        for message in [*self._take_back(), *self.put_offs.timers]:
            self._release(message)
        self._revoked_in_flight = set(map(_place_of, self.in_flight))
        self.unacked.clear()
        self._settled.set()

    def _lost_because(self, message: Message) -> str:
        partition, _ = message.receipt
        return "its partition was revoked" if partition.revoked else ""

    # -- settling

    async def _ack(self, message: Message) -> None:
        partition, record = message.receipt
        partition.unacked.remove(record.offset)
        if partition not in self._to_commit:  # otherwise its commit is wanted already
            self._to_commit.add(partition)
            self._commit_wanted.set()
        self._acked.append(message.id)
        self._settled.set()

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        """A message may wait behind others with the same backoff, for up to that backoff."""
        last = len(self._delays) - 1
        step = next((n for n, s in enumerate(self._delays) if s >= delay_seconds), last)
        retry = _copy(message, {DUE_AT: repr(time.time() + delay_seconds), REASON: reason})
        topic = self._own_of(message).retry
        await self._move(message, "retry", self._produce(topic, [retry], step))

    async def _reject(self, message: Message, reason: str) -> None:
        letter = _copy(message, {DEAD_LETTERED_AT: repr(time.time()), REASON: reason})
        await self._move(message, "reject", self._bury(letter, self._own_of(message).dead))

    async def _bury(self, letter: Record, topic: str) -> None:
        try:
            await self._produce(topic, [letter])
        except _TooLarge:
            await self._produce(topic, [_shortened(letter, await self._limit(topic))])

    def _own_of(self, message: Message) -> _Own:
        """The retry and dead-letter topics for a message of a source, or of one of these topics."""
        (its_topic, _), _ = _place_of(message)
        for topic, own in self._own.items():
            if its_topic in (topic, *own):
                return own
        return self._own[MATCHED]

    async def _requeue(self, message: Message) -> None:
        """Kafka redelivers it when another consumer has its partition; until then it can only be buffered again."""
        if self.stopped:
            self._settled.set()
        else:
            self._deliver(message)

    async def _commit_regularly(self) -> None:
        while await self._commit_wanted.wait():
            self._commit_wanted.clear()
            await asyncio.sleep(COMMIT_SECONDS)
            await self._commit()

    async def _commit(self, seconds: float = ANSWER_SECONDS) -> None:
        """Commit the settled offsets of each partition; if that fails, a commit is wanted again."""
        partitions, self._to_commit = self._to_commit, set()
        acked, self._acked = self._acked, []
        commits = {
            partition: commit
            for partition in partitions
            if (commit := partition.commit(self._most_metadata_bytes)) != partition.committed
            and commit.offset >= partition.committed.offset
        }
        if not commits or self._consumer is None:
            return
        committed = False
        try:
            async with self._requests.bounded(seconds):
                await self._consumer.commit(
                    {partition.topic_partition: commit for partition, commit in commits.items()}
                )
            committed = True
        except BrokerError as error:
            if isinstance(error.__cause__, kafka_errors.OffsetMetadataTooLargeError):
                self._most_metadata_bytes = 0  # this broker's limit is lower: do without
            log.debug("commit_failed", broker=self._url.redacted, reason=str(error))
        finally:  # also when it is cancelled, while closing
            if not committed:
                _retrieve_commit_errors()
                self._to_commit.update(p for p in partitions if not p.revoked)
                self._commit_wanted.set()
                self._acked = acked + self._acked
        if committed:
            for partition, commit in commits.items():
                partition.committed = commit

    # -- publishing

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        topics: dict[str, list[Record]] = {}
        for message in messages:
            _, topic = self.destination_of(message)
            topics.setdefault(topic, []).append(_record(message))
        await together(self._publish_to(topic, records) for topic, records in topics.items())

    async def _publish_to(self, topic: str, records: Sequence[Record]) -> None:
        # aiokafka would wait for a topic that does not exist.
        known = self._producer.client.cluster.partitions_for_topic(topic)
        if not (known or await self._existing(topic)):
            raise BrokerRefused(f"{self._url.redacted}: the topic {topic!r} {MISSING}")
        try:
            for start in range(0, len(records), RECORDS_AT_ONCE):
                await self._produce(topic, records[start : start + RECORDS_AT_ONCE])
        except BrokerRefused as refusal:
            raise type(refusal)(f"{refusal} (to the topic {topic!r})") from refusal

    async def _produce(
        self, topic: str, records: Sequence[Record], partition: int | None = None
    ) -> None:
        """Returns when the broker has confirmed every record."""
        async with self._requests.bounded():
            # Otherwise a refresh of the metadata may omit the topic, and the send hangs.
            self._producer.client.add_topic(topic)
            if partition is not None:
                partition = min(partition, len(await self._producer.partitions_for(topic)) - 1)
            confirmations = []
            for key, value, headers in records:
                if key is None and value is None:  # aiokafka does not send such a record
                    value = b""
                try:
                    confirmation = await self._producer.send(
                        topic, key=key, value=value, headers=headers, partition=partition
                    )
                except TOO_LARGE as error:
                    confirmation = asyncio.get_running_loop().create_future()
                    confirmation.set_exception(error)
                confirmations.append(confirmation)
            results = await asyncio.gather(*confirmations, return_exceptions=True)
            failure: BaseException | None = None
            for record, result in zip(records, results, strict=True):
                try:
                    if isinstance(result, OF_ONE_RECORD):
                        await self._produce_alone(topic, record, partition)
                    elif isinstance(result, BaseException):
                        raise result
                except OF_ONE_RECORD as refusal:  # the others are still sent
                    failure = refusal
            if failure is not None:
                raise failure

    async def _produce_alone(self, topic: str, record: Record, partition: int | None) -> None:
        """Send a refused record alone: another one may be the cause, or its size may fit after compression."""
        key, value, headers = record
        batch = BatchBuilder(MOST_RECORD_BYTES, GZIP)
        batch.append(timestamp=None, key=key, value=value, headers=headers)
        await asyncio.to_thread(batch._build)
        partition = self._producer._partition(topic, partition, key, value, key, value)
        await (await self._producer.send_batch(batch, topic, partition=partition))

    async def _close_producer(self, seconds: float) -> None:
        producer = self._producer
        # Unconfirmed records have been reported as not sent: do not wait for them.
        producer._message_accumulator.fail_all(kafka_errors.KafkaConnectionError())
        sender = producer._sender
        await _close(producer.stop, producer.client, seconds, lambda: [sender.sender_task])

    # -- dead letters

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator["_Reading"]:
        async with self._reader(f"{self._group}.dead", *self._dead_topics) as reader:
            reading = _Reading(reader)
            await self._look_what_is_taken(reading)
            yield reading

    async def _look_what_is_taken(self, reading: "_Reading") -> None:
        partitions = [*reading.reader.assignment()]
        async with self._requests.bounded():
            commits = await reading.reader._coordinator.fetch_committed_offsets(partitions)
        for tp in partitions:
            commit = commits.get(tp, OffsetAndMetadata(0, ""))
            commit = reading.commits[tp] = commit._replace(metadata=commit.metadata or "")
            reading.committed[tp] = max(0, commit.offset)
            reading.taken.setdefault(tp, set()).update(_offsets_of(commit))

    async def _present_letters(self, reading: "_Reading") -> AsyncGenerator[DeadLetter, None]:
        ends = await self._ends(reading.reader)
        async for partition, records in self._read(reading.reader, ends, math.inf):
            tp = partition.topic_partition
            for record in records:
                reading.next[tp] = record.offset + 1
                if record.offset not in reading.taken[tp]:
                    reading.left.setdefault(tp, {})[record.offset] = None
                    yield _dead_letter(record, partition)

    async def _read(
        self, reader: AIOKafkaConsumer, ends: Mapping[TopicPartition, int], limit: float
    ) -> AsyncIterator[tuple[_Partition, list[Any]]]:
        """The records that the reader's group has not committed, up to these ends."""
        while limit > 0:
            async with self._requests.bounded():
                positions = {tp: await reader.position(tp) for tp in ends}
                unread = [tp for tp, end in ends.items() if positions[tp] < end]
                if not unread:
                    return
                most = int(min(limit, RECORDS_AT_ONCE))
                batch = await reader.getmany(*unread, timeout_ms=1000, max_records=most)
            for tp, records in batch.items():
                if wanted := [record for record in records if record.offset < ends[tp]]:
                    limit -= len(wanted)
                    yield _Partition(tp), wanted

    async def count_dead_letters(self) -> int:
        return sum((await self._dead_letter_counts()).values())

    async def _dead_letter_counts(self) -> Counter[str]:
        """The number of dead letters of each topic."""
        counts = Counter[str]()
        async with self._reading() as reading:
            for tp, count in (await self._count(reading.reader, reading.taken)).items():
                counts[tp.topic] += count
        return counts

    async def _take_letters(
        self, reading: "_Reading", letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        """Kafka deletes only the oldest records: the offsets of others are committed, as metadata."""
        await self._look_what_is_taken(reading)  # other commands take letters, too
        moved = defaultdict[str, list[DeadLetter]](list)
        for letter in letters:
            tp, offset = _place_of(letter)
            del reading.left[tp][offset]
            if offset >= reading.committed[tp] and offset not in reading.taken[tp]:
                reading.taken[tp].add(offset)
                moved[self._own_of(letter).retry].append(letter)
        reading.commits_to_make()  # raises before any letter is moved
        for topic, some in moved.items() if replay else ():
            # Not to the source, where other groups would handle them too; its first partition has the shortest waits.
            await self._produce(topic, [_replayed(letter) for letter in some], 0)
        await self._look_what_is_taken(reading)
        for _ in range(MOST_COMMITS):  # until no other command has overwritten them
            if not (commits := reading.commits_to_make()):
                break
            await self._delete_dead_letters(reading, commits)
            await self._look_what_is_taken(reading)
        else:
            msg = f"{self._url.redacted}: the group's offsets are overwritten again and again"
            raise BrokerUnavailable(msg)
        yield sum(map(len, moved.values()))

    async def _purge_all(self) -> AsyncIterator[int]:
        count = await self.count_dead_letters()
        async with self._reading() as reading:
            if ends := await self._ends(reading.reader):
                ends = {tp: OffsetAndMetadata(end, "") for tp, end in ends.items()}
                await self._delete_dead_letters(reading, ends)
        yield count

    async def _delete_dead_letters(
        self, reading: "_Reading", commits: Mapping[TopicPartition, OffsetAndMetadata]
    ) -> None:
        """Commit these offsets; the broker also deletes the records below, if this user has the right."""
        async with self._requests.bounded():
            await reading.reader.commit(dict(commits))
        below = {
            tp: RecordsToDelete(commit.offset)
            for tp, commit in commits.items()
            if commit.offset > reading.committed[tp]
        }
        with suppress(BrokerError):
            if below:
                async with self._admin() as admin, self._requests.bounded():
                    await admin.delete_records(below)


class _Reading:
    """A reader of the topic of dead letters."""

    def __init__(self, reader: AIOKafkaConsumer) -> None:
        self.reader = reader
        self.commits: dict[TopicPartition, OffsetAndMetadata] = {}
        self.committed: dict[TopicPartition, int] = {}
        """The offset below which all letters were moved or deleted."""
        self.taken: dict[TopicPartition, set[int]] = {}
        """The offsets above it that were moved or deleted, by this command or by others."""
        self.left: dict[TopicPartition, dict[int, None]] = {}
        """The offsets that were read and not taken, the oldest first."""
        self.next: dict[TopicPartition, int] = {}
        """The offset after the last letter that was read."""

    def commits_to_make(self) -> dict[TopicPartition, OffsetAndMetadata]:
        """The commits that differ from the present ones. Raises BrokerRefused if a commit cannot hold the marks."""
        commits = {}
        for tp, left in self.left.items():
            first = max(self.committed[tp], next(iter(left), self.next[tp]))
            while first in self.taken[tp]:
                first += 1
            self.taken[tp] = {offset for offset in self.taken[tp] if offset > first}
            commit = OffsetAndMetadata(first, _metadata_of(first, self.taken[tp]))
            if commit != self.commits[tp]:
                commits[tp] = commit
        return commits


def _metadata_of(first: int, offsets: set[int]) -> str:
    """Marks for these offsets, which are above ``first``. Raises BrokerRefused if a commit cannot hold them."""
    bits = bytearray((max(offsets, default=first) - first + 7) // 8)
    _flip(bits, first, offsets)
    if len(metadata := _packed(bits)) > MOST_METADATA_BYTES:
        raise BrokerRefused(
            f"{len(offsets)} dead letters behind others were moved or deleted, and Kafka can mark no more: "
            "first replay or purge the oldest ones"
        )
    return metadata


def _offsets_of(commit: OffsetAndMetadata) -> set[int]:
    """The offsets that `_metadata_of` marked; none for another program's metadata."""
    return {commit.offset + 1 + place for place in _places_of(_unpacked(commit.metadata), 1)}


def _marks_of(commit: OffsetAndMetadata) -> tuple[range, set[int]]:
    """The offsets that the commit marks as settled or not, and those of them that are not."""
    if not (bits := _unpacked(commit.metadata)):
        return range(0), set()
    start = commit.offset + 1
    # The committed offset itself is the first that is not settled.
    left = {commit.offset, *(start + place for place in _places_of(bits, 0))}
    return range(start, start + 8 * len(bits)), left


def _flip(bits: bytearray, first: int, offsets: Iterable[int]) -> None:
    """Flip the bits of these offsets, which are above ``first``."""
    for offset in offsets:
        place, bit = divmod(offset - first - 1, 8)
        bits[place] ^= 1 << bit


def _places_of(bits: bytes, value: int) -> Iterator[int]:
    """The places of the bits with this value."""
    none = 0 if value else 0xFF
    for place, byte in enumerate(bits):
        if byte != none:
            yield from (8 * place + bit for bit in range(8) if byte >> bit & 1 == value)


def _packed(bits: bytearray) -> str:
    if not (marked := bits.rstrip(b"\0")):
        return ""
    return f"{METADATA}:{base64.b64encode(zlib.compress(marked)).decode()}"


def _unpacked(metadata: str | None) -> bytes:
    """The bits of the marks; none for another program's metadata."""
    owner, _, text = (metadata or "").rpartition(":")
    with suppress(ValueError, zlib.error):
        return zlib.decompress(base64.b64decode(text)) if owner == METADATA else b""
    return b""


TAKES_SEVERAL = True


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> KafkaBroker:
    """Raises BrokerRefused if the URL cannot be used."""
    return KafkaBroker(settings, prefetch)
