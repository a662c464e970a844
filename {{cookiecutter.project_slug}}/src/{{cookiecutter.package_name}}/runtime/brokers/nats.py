# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""NATS JetStream 2.9 or later, by nats-py: a stream, and a durable pull consumer named by the group.

``nats://user:password@one:4222,two:4222`` or ``nats://token@host``; ``tls://`` requires TLS. Options: ``replicas=`` of
created streams, ``subject=`` to publish to, ``filter_subjects=`` of the consumer, ``deliver_policy=`` (where a created
consumer begins), ``?ack_wait_seconds=30`` (then a dead consumer's messages are redelivered), ``domain=``, ``inbox=``
(prefix of reply subjects), the files ``creds=`` and ``nkey=``, and ``cafile=``, ``certfile=`` and ``keyfile=``.

`NatsBroker.declare` creates a stream that does not exist as a work queue, which serves one group. An existing stream is
used as it is: with limits or interest retention it serves many groups, each at its own pace. A deleted stream or
consumer is created again if its description says that it is ours; otherwise the service waits. With ``orders`` come
``orders_dead``, whose subject ``orders_dead.billing`` has the dead letters of the group ``billing``, and
``orders_attempts``, with one record for each unacked message that a handler failed on.

A retry leaves the message in its place. First the failure is recorded, then the broker is asked to redeliver the
message after the delay: a crash in between changes the delay, never the attempt. A delivery is
owned until the ack wait has passed without a progress ack (+WPI), even if the connection is lost; these acks are sent
for all unacked messages, also while handlers run for hours. A process that blocks for longer counts as dead.
"""

import asyncio
import base64
import json
import logging
import math
import random
import re
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Container,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import structlog
from nats.aio.client import Client, RawCredentials
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error, NoRespondersError, SecureConnWantedError

from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable, MendableRefusal
from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .connectivity import Connectivity
from .delivery import (
    ATTEMPTS,
    DEAD_LETTERED_AT,
    PREFIX,
    REASON,
    SHORTENED,
    count_of,
    fit_dead_letter,
    headers_of,
    json_object,
    make_dead_letter,
    make_message,
    seconds_of,
    text_of,
)
from .requests import Requests, Rule, abort, together
from .source import MISSING, Broker, Capabilities, log_settlement_lost
from .url import TLS_OPTIONS, BrokerUrl, CurrentUrl

T = TypeVar("T")

CONNECT_SECONDS = 5.0
"""The time limit for each of the hosts."""
ANSWER_SECONDS = 5.0
"""How long the broker may take to answer; after that the connection counts as lost."""
STOP_SECONDS = 1.5
CLOSE_SECONDS = 1.0
ACK_WAIT_SECONDS = 30.0
HELD_SHARE = 0.9
"""The share of the ack wait that is relied on: the broker's clock starts a little earlier."""
TICK_SECONDS = 1.0
"""How often the broker is pinged, and gets the progress acks (+WPI) that are due."""
PULL_SECONDS = 30.0
HEARTBEAT_SECONDS = 2.0
"""How often the broker confirms that a pull still waits."""
SILENCE_SECONDS = 6.0
"""A pull is lost when the broker has not mentioned it for this long."""
FLOOR_SECONDS = 10.0
"""How often a consumer of ours is asked up to which message all are acked, in case it is deleted."""
ACKS_SECONDS = 5.0
"""Acks are remembered for at least this long: a server writes them to its disk later, a loaded one much later."""
MOST_RECENT_ACKS = 10_000
PUBLISH_AT_ONCE = 100

RECORD_SECONDS = 30 * 86_400.0
"""How long the record of a message's failures is stored."""
MOST_HEADER_BYTES = 65_535
"""The limit for a message in a stream."""
LONGEST_NAME = 500
"""How many characters of an id or a type stay when a copy is too large for the server."""

FEW_PENDING = "messages that wait for a retry count too: with so many, the consumer gets no others"
OURS = "Created by a service of cookiecutter-consumer, which creates it again when it is deleted."
"""The description of a stream or consumer that a service created."""

ID = "Nats-Msg-Id"
"""Header: of messages with the same value, the broker stores only the first within two minutes."""
FIRST_ID = f"{PREFIX}id"
"""Header: the message's id, if ID must have another value."""
TYPE = f"{PREFIX}type"
EXTRAS = f"{PREFIX}json"
"""Header: JSON of the values that other headers cannot hold: an ``id``, a ``type``, and some ``headers``."""
GROUP = f"{PREFIX}group"
"""Header of a message for one group, such as a replayed dead letter: other groups have handled it."""
SUBJECT = f"{PREFIX}subject"
"""Header of a dead letter: the subject to which it was published first."""
DUE = f"{PREFIX}due"
"""Header of a message that was deleted from the stream in flight, and published again: when its retry is due, in Unix
seconds. Such a message has ATTEMPTS and GROUP too."""

ACK, TERM, NAK, IN_PROGRESS = b"+ACK", b"+TERM", b"-NAK", b"+WPI"
# Error codes of JetStream's API.
NO_CONSUMER, NO_MESSAGE, NO_SEQUENCE, NOT_DELETED, NAME_IN_USE, NO_STREAM, SUBJECTS_OVERLAP = (
    10014,
    10037,
    10043,
    10057,
    10058,
    10059,
    10065,
)

OPTIONS = (
    *("ack_wait_seconds", "filter_subjects", "replicas", "subject", "domain", "inbox"),
    *("creds", "nkey", "deliver_policy", *TLS_OPTIONS),
)
FILTERS = ("filter_subject", "filter_subjects")
DELIVER_POLICIES = ("all", "new", "last", "last_per_subject")
NOT_IN_A_NAME = re.compile(r"[\s.*>/\\]")
CONCRETE_SUBJECT = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")
RESERVED_SUBJECTS = ("$JS.", "$SYS.")
"""The server's own subjects: a message to one of them may be a command."""
LONGEST_SUBJECT = 1000
"""The server closes the connection for a longer line of its protocol (by default 4096 bytes)."""
HEADER_NAME = re.compile(rf"(?!nats-|{PREFIX})[!#$%&'*+\-.^_`|~0-9A-Za-z]+", re.I)

log = structlog.get_logger()

if logging.getLogger("nats").level == logging.NOTSET:
    # It logs tracebacks of outages; the runtime logs each outage once.
    logging.getLogger("nats").setLevel(logging.CRITICAL)


class JetStreamRefused(MendableRefusal):
    """JetStream answered with an error of this code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


RULES = (
    Rule(Error, BrokerDenied, "{error}", "(?i)permissions violation"),
    Rule(
        Error,
        BrokerDenied,
        "the server refused the user, the password, the token or the key",
        "(?i)(authorization|authentication) (violation|expired|revoked)",
    ),
    Rule(SecureConnWantedError, MendableRefusal, "the server offers no TLS"),
    Rule(
        NoRespondersError,
        BrokerUnavailable,
        "JetStream does not answer: it is disabled, or has no leader, or the stream was deleted",
    ),
)


class NatsUrl(BrokerUrl):
    """Raises BrokerRefused if the URL cannot be read."""

    def __init__(self, text: str) -> None:
        like = "nats://user:password@host:4222,host:4222?option=value"
        super().__init__(text, like=like, options=OPTIONS)
        if not self.hosts or self.path:
            raise self.unreadable()
        self.requires_tls = self.scheme == "tls" or bool({*TLS_OPTIONS} & self.options.keys())
        for option in ("subject", "domain", "inbox"):
            if fault := _fault_of_subject(name := self.options.get(option, option)):
                raise BrokerRefused(f"CONSUMER_BROKER_URL: {option}: {name[:200]!r} {fault}")
        self.subject = self.options.get("subject")
        self.api = f"$JS.{domain}.API" if (domain := self.options.get("domain")) else "$JS.API"
        self.ack_wait_seconds = self.number("ack_wait_seconds", 0, at_least=0.1)
        """0 if the URL does not set it."""
        filters = self.options.get("filter_subjects", "").split(",")
        self.filter: dict[str, Any] = {"filter_subjects": filters}
        """Settings of the consumer; a server before 2.10 takes one subject only. Empty if the URL names none."""
        if len(filters) == 1:
            self.filter = {"filter_subject": filters[0]} if filters[0] else {}
        if not all(filters) and "filter_subjects" in self.options:
            msg = "CONSUMER_BROKER_URL: filter_subjects has an empty name: write orders.created,orders.paid"
            raise BrokerRefused(msg)
        self.replicas = self.whole_number("replicas", 1, at_most=5)
        self.deliver_policy = self.options.get("deliver_policy", DELIVER_POLICIES[0])
        if self.deliver_policy not in DELIVER_POLICIES:
            known = ", ".join(DELIVER_POLICIES)
            raise BrokerRefused(f"CONSUMER_BROKER_URL: deliver_policy must be one of {known}")

    def connect_options(self) -> dict[str, Any]:
        """Options for nats-py. Files are read for each connection, since they may be renewed on disk."""
        options: dict[str, Any] = {"inbox_prefix": self.options.get("inbox", "_INBOX")}
        if self.password is not None:
            options |= {"user": self.user, "password": self.password}
        elif self.user:
            options["token"] = self.user
        if self.requires_tls:
            options["tls"] = self.tls_context()
        if "creds" in self.options:
            options["user_credentials"] = RawCredentials(self._read("creds", _check_creds))
        if "nkey" in self.options:
            options["nkeys_seed_str"] = self._read("nkey", _check_seed)
        return options

    def _read(self, option: str, check: Callable[[str], None]) -> str:
        try:
            text = Path(self.options[option]).read_text()
            check(text)
        except (OSError, ValueError) as error:
            raise BrokerRefused(f"CONSUMER_BROKER_URL: {option}: {error}") from error
        return text


def _check_creds(text: str) -> None:
    """Raises ValueError for an incomplete file, which nats-py would search forever."""
    seed = re.search(r"BEGIN USER NKEY SEED-+\s+(\S+)", text)
    if seed is None or not re.search(r"BEGIN NATS USER JWT-+\r?\n\S", text):
        raise ValueError("the file does not contain a JWT and a seed")
    _check_seed(seed[1])


def _check_seed(text: str) -> None:
    import nkeys  # type: ignore[import-untyped, unused-ignore]  # slow, and seldom needed

    try:
        nkeys.from_seed(bytearray(text.strip().encode())).wipe()
    except Exception:
        msg = "the file does not contain the seed of an nkey"
        raise ValueError(msg) from None  # the cause's text may contain a part of the seed


@dataclass(slots=True)
class Outgoing:
    subject: str
    body: bytes
    headers: dict[str, str]

    def why_too_large(self, max_payload: int) -> str:
        lines = (len(name) + len(value.encode()) + 4 for name, value in self.headers.items())
        header_size = sum(lines) + len(b"NATS/1.0\r\n\r\n")
        if len(self.body) + header_size > max_payload:  # the server closes the connection
            return f"this message is larger than the server's max_payload, {max_payload} bytes"
        if header_size > MOST_HEADER_BYTES:
            return f"the headers of this message are larger than {MOST_HEADER_BYTES} bytes"
        return ""


class Connection(Client):
    """One connection to one server. It is replaced, not repaired: nats-py never reconnects after refused
    credentials, and restores subscriptions whose pulls may still be served."""

    def __init__(self, url: NatsUrl, on_lost: Callable[[], None]) -> None:
        super().__init__()
        self.lost: BrokerError | None = None
        """Why the connection cannot be used any more."""
        self._url = url
        self._on_lost = on_lost
        self._requests = Requests(url.redacted, (Error,), RULES)
        self._replies = ""
        self._numbers = count()
        # The pending requests by the last part of their reply subjects: the subject, and the future answer.
        self._asked: dict[str, tuple[str, asyncio.Future[Msg]]] = {}

    async def open(self, host: str, name: str) -> None:
        """Raises BrokerUnavailable or BrokerRefused."""
        async with self.bounded(CONNECT_SECONDS):
            await self.connect(
                servers=[f"nats://{host}"],
                name=name,
                connect_timeout=math.ceil(CONNECT_SECONDS),
                allow_reconnect=False,
                pending_size=0,  # never wait for the socket in the middle of a publish
                skip_subject_validation=True,  # those of handlers are checked by _fault_of_subject
                error_cb=_ignore,
                **self._url.connect_options(),
            )
            self._replies = self.new_inbox()
            await self.subscribe(f"{self._replies}.*", cb=self._on_answer)

    async def close_within(self, seconds: float) -> None:
        """Flush and close, by force after this long. Leaves no task behind."""
        tasks = [self._reading_task, self._flusher_task, self._ping_interval_task]
        tasks += [subscription._wait_for_msgs_task for subscription in self._subs.values()]
        await _within(seconds, self.close())
        self._cut()
        if running := {task for task in tasks if task is not None}:
            await asyncio.wait(running, timeout=0.5)

    def lose(self, reason: Exception) -> None:
        """The connection cannot be used any more: pending requests fail at once."""
        if self.lost is not None:
            return
        lost = reason if isinstance(reason, BrokerError) else self._requests.translated(reason)
        self.lost = lost
        self._cut()
        for future in (*(answer for _, answer in self._asked.values()), *self._pongs):
            _fail(future, lost)
        self._on_lost()

    def _cut(self) -> None:
        self._pending.clear()
        self._pending_data_size = 0
        if (writer := getattr(self._transport, "_io_writer", None)) is not None:
            abort(writer.transport)

    # -- requests

    def bounded(self, seconds: float | None = None) -> AbstractAsyncContextManager[None]:
        """The context of a request: see `Requests.bounded`."""
        if self.lost is not None:
            raise self.lost
        return self._requests.bounded(ANSWER_SECONDS if seconds is None else seconds)

    async def ask(self, request: Outgoing) -> dict[str, Any]:
        """JetStream's answer. Raises BrokerUnavailable or JetStreamRefused."""
        async with self.bounded():
            [answer] = await self.answers([lambda: request])
            return self._read(answer)

    async def answers(self, makers: Iterable[Callable[[], Outgoing]]) -> list[Msg | Exception]:
        """For each request, its answer or the exception in place of it; returns when all have ended.

        The caller sets one time limit for many: a task or a timer for each request costs more than the rest.
        """
        if self.lost is not None:
            raise self.lost
        loop, begun, outcomes = asyncio.get_running_loop(), dict[str, Any](), list[Any]()
        try:
            for make in makers:
                number = str(next(self._numbers))
                answer = begun[number] = loop.create_future()
                try:
                    request = make()
                    subject, body = request.subject, request.body
                    if reason := request.why_too_large(self.max_payload):
                        raise BrokerRefused(f"to the subject {subject!r}: {reason}")
                    self._asked[number] = subject, answer
                    reply = f"{self._replies}.{number}"
                    await self.publish(subject, body, reply, request.headers or None)
                except Exception as error:
                    _fail(answer, error)
            for answer in begun.values():
                try:
                    outcomes.append(await answer)
                except Exception as error:
                    outcomes.append(error)
        finally:
            for number in begun:
                self._asked.pop(number, None)
        return outcomes

    async def _on_answer(self, message: Msg) -> None:
        _, answer = self._asked.get(message.subject.rpartition(".")[2], ("", None))
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _read(self, outcome: Msg | Exception) -> dict[str, Any]:
        if isinstance(outcome, Exception):
            raise outcome
        if _has_no_responders(outcome):
            self.lose(NoRespondersError())  # the next connection declares what is missing
            raise NoRespondersError
        answer: dict[str, Any] = json.loads(outcome.data)
        if refusal := answer.get("error"):
            msg = f"{self._url.redacted}: {refusal.get('description', refusal)}"
            code = refusal.get("err_code", 0)
            if refusal.get("code", 500) >= 500 and code != NOT_DELETED:
                raise BrokerUnavailable(msg)
            raise JetStreamRefused(msg, code)
        return answer

    async def api(self, call: str, **request: Any) -> dict[str, Any]:
        payload = json.dumps(request).encode() if request else b""
        return await self.ask(Outgoing(f"{self._url.api}.{call}", payload, {}))

    async def api_unless(
        self, codes: Container[int], call: str, **request: Any
    ) -> dict[str, Any] | None:
        """As `api`; None if the answer is one of these errors."""
        try:
            return await self.api(call, **request)
        except JetStreamRefused as refusal:
            if refusal.code not in codes:
                raise
            return None

    async def ping(self) -> None:
        """Returns when the broker has read everything that was sent before."""
        async with self.bounded():
            await self._flush_pending(force_flush=True)  # or the PING overtakes buffered data
            # nats-py gets a longer timeout: the PONG of a flush that timed out would end its reading.
            await self.flush(math.ceil(2 * ANSWER_SECONDS))

    def check_stored(self, to: str, outcome: Msg | Exception) -> None:
        """Check the answer to a publish. If no stream has the subject ``to``, the connection stays."""
        if not to or isinstance(outcome, Exception):
            self._read(outcome)
            return
        subject = to.partition(":")[2]
        if _has_no_responders(outcome):
            raise BrokerRefused(f"{self._url.redacted}: no stream has the subject {subject!r}")
        stored = json_object(outcome.data)
        if "error" in stored or "stream" not in stored:
            refusal = stored.get("error") or "another program answered, and no stream"
            why = refusal.get("description") if isinstance(refusal, dict) else refusal
            raise BrokerRefused(
                f"{self._url.redacted}: no stream stored the message to {subject!r}: {why}"
            )

    # -- parts of nats-py, replaced: on an error, nats-py closes from tasks that are being cancelled here

    async def _select_next_server(self) -> None:
        await self._connect_to_server(self._server_pool[0])  # once: the caller repeats it
        self._current_server = self._server_pool[0]

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self._url.requires_tls and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise SecureConnWantedError  # nats-py would go on, and send the password
            info["tls_required"] = True

    async def _process_op_err(self, e: Exception) -> None:
        self.lose(e)

    async def _process_err(self, err_msg: str) -> None:
        error = err_msg.strip("'")
        denied = re.search('permissions violation for publish to "(.*)"', error)
        for subject, answer in self._asked.values():
            if denied and subject.lower() == denied[1] and not answer.done():
                # The error is about this request only.
                _fail(answer, Error(f'permissions violation for publish to "{subject}"'))
                return
        self.lose(Error(error))

    # -- parts of nats-py, replaced: an odd message of another producer would silently end nats-py's reading

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        return _parse_headers(headers) if headers else None

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        return Msg(self, text_of(subject), reply.decode(), data, headers, _sid=sid)

    async def _read_loop(self) -> None:
        await super()._read_loop()
        if not self.is_closed:
            self.lose(Error("the connection cannot be read any more"))


@dataclass(slots=True)
class Delivery:
    """The receipt of a message."""

    key: str
    """The sequence and the time of the message in the stream: unique, even if the stream is created again."""
    subject: str
    deliveries: int = 1
    settled: int = 0
    """How many of the deliveries ended with a retry or a requeue, not with a crash."""
    reply: str = ""
    """The subject that settlements are sent to; empty once the consumer was deleted."""
    held_until: float = 0
    """Event loop time, after which the broker may have redelivered the message."""


class StoredDeadLetter:
    """A message in the stream of dead letters, from the broker's answer."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.sequence: int = answer["seq"]
        headers = _parse_headers(base64.b64decode(answer.get("hdrs", "")))
        self.reason, self.attempts, self.dead_lettered_at, self.subject = (
            headers.pop(name, "") for name in (REASON, ATTEMPTS, DEAD_LETTERED_AT, SUBJECT)
        )
        body = base64.b64decode(answer.get("data", ""))
        self.message = _make_message(body, headers, Delivery(str(self.sequence), self.subject))
        self.replay_id = f"replay-{self.sequence}-{answer['time']}"
        """The id of the replayed message: it is stored once, even if a crash makes us replay it again."""


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # retrieved: some are no longer awaited


def _has_no_responders(answer: Msg) -> bool:
    return (answer.headers or {}).get("Status") == "503"


def _parse_headers(block: bytes) -> dict[str, str]:
    """The headers of a header block with any bytes. Its first line may have a status of the server."""
    first, *lines = text_of(block).split("\r\n")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    if status := first.partition(" ")[2]:
        headers["Status"], _, headers["Description"] = status.partition(" ")
    return headers


def _make_message(body: bytes, headers: Mapping[str, str], delivery: Delivery) -> Message:
    values: dict[str, Any] = dict(headers)
    broker_id = values.pop(ID, "")
    id = values.pop(FIRST_ID, "") or broker_id
    type = values.pop(TYPE, "")
    values.pop(GROUP, None)
    failures = values.pop(ATTEMPTS, 0) if DUE in values else 0
    values.pop(DUE, None)
    if EXTRAS in values:
        extras = json_object(values.pop(EXTRAS))
        id, type = extras.get("id") or id, extras.get("type") or type
        odd = extras.get("headers")
        values |= odd if isinstance(odd, dict) else {}
    return make_message(
        body,
        id=id,
        fallback_id=delivery.key,
        type=type,
        headers=values,
        failures=failures,
        published_at=int(delivery.key.partition("-")[2] or 0) / 1e9,
        receipt=delivery,
        origin={"subject": delivery.subject},
    )


def _headers_of(message: OutgoingMessage) -> dict[str, str]:
    """NATS has headers of one line of text, with names in ASCII: EXTRAS has the others. Raises BrokerRefused."""
    headers: dict[str, str] = {TYPE: _plain(message.type)}
    extras: dict[str, Any] = {}
    if message.id:
        headers[ID] = _plain(message.id) or json.dumps(message.id)
    for name, text in (("id", message.id), ("type", message.type)):
        if text != _plain(text):
            extras[name] = text
    for name, value in headers_of(message).items():
        if _is_plain(value) and HEADER_NAME.fullmatch(name):
            headers[name] = value
        else:
            extras.setdefault("headers", {})[name] = value
    if extras:
        try:
            headers[EXTRAS] = json.dumps(extras)
        except (TypeError, ValueError, RecursionError) as error:
            raise BrokerRefused(f"this message cannot be sent: {error}") from error
    return headers


def _nak_later(delay_seconds: float) -> bytes:
    return b'-NAK {"delay": %d}' % max(1, delay_seconds * 1e9)


def _is_plain(value: object) -> bool:
    """Whether a NATS header can hold the value unchanged."""
    return isinstance(value, str) and value.isprintable() and value == value.strip() != ""


def _plain(text: str) -> str:
    """The text; empty if EXTRAS must hold it."""
    return text if _is_plain(text) else ""


def _checked_name(name: str, variable: str) -> str:
    if not name or NOT_IN_A_NAME.search(name):
        msg = f"{variable}: {name!r} cannot be a name in NATS: it must not contain spaces or . * > / \\"
        raise BrokerRefused(msg)
    return name


def _check_consumer(name: str, config: dict[str, Any]) -> None:
    faults = {
        "it is a push consumer": config.get("deliver_subject"),
        "its acks are not explicit": config.get("ack_policy") != "explicit",
        "it has max_deliver, after which messages are lost": config.get("max_deliver", -1) > 0,
        "it delivers headers only": config.get("headers_only"),
    }
    for fault in filter(faults.get, faults):
        raise BrokerRefused(f"{name} cannot be used: {fault}")


def _matches(subject: str, pattern: str) -> bool:
    """Whether a stream with the subject ``pattern``, which may have wildcards, stores a message to ``subject``."""
    tokens, patterns = subject.split("."), pattern.split(".")
    if patterns[-1] == ">":
        tokens, patterns = tokens[: len(patterns)], [*patterns[:-1], "*"]
    pairs = zip(tokens, patterns, strict=False)
    return len(tokens) == len(patterns) and all(p in ("*", t) for t, p in pairs)


def _is_another(known: Mapping[str, Any], info: Mapping[str, Any]) -> bool:
    """Whether the consumer was deleted and created again since it was known.

    A restart of nats-server 2.10 moves the time of its creation by less than a second, to before it was known.
    """
    was, now, known_at = (
        datetime.fromisoformat(time)
        for time in (known["created"], info["created"], known.get("ts") or known["created"])
    )
    return now > known_at or not timedelta(0) <= now - was < timedelta(seconds=1)


def _fault_of_subject(subject: str) -> str:
    """Why no message can be published to this subject; otherwise empty."""
    if not (CONCRETE_SUBJECT.fullmatch(subject) and subject.isprintable()):
        return "has spaces, wildcards or an empty part"
    if len(subject.encode()) > LONGEST_SUBJECT:
        return f"is longer than {LONGEST_SUBJECT} bytes"
    return "is the server's own" if subject.startswith(RESERVED_SUBJECTS) else ""


def _only_subject(stream: str, subjects: list[str]) -> str | None:
    """The subject to publish to; None if the stream leaves a choice."""
    concrete = [subject for subject in subjects if CONCRETE_SUBJECT.fullmatch(subject)]
    if stream in concrete:
        return stream
    return concrete[0] if len(concrete) == 1 else None


class NatsBroker(Broker):
    """One stream and one consumer of it. Raises BrokerRefused if the URL or a name cannot be used."""

    capabilities = Capabilities()
    acks_late = True  # also after the ack wait: the message was handled
    destinations: ClassVar = {"subject": "subject:NAME"}
    origins = ("subject",)

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        self._stream = _checked_name(settings.source, "CONSUMER_SOURCE")
        self._group = _checked_name(settings.group or settings.source, "CONSUMER_GROUP")
        self._dead = f"{self._stream}_dead"
        self._dead_subject = f"{self._dead}.{self._group}"
        self._attempts = f"{self._stream}_attempts"
        self._current_url = CurrentUrl(settings, NatsUrl)
        self._url = self._current_url()
        self.connectivity = Connectivity(self._url.redacted)
        self._connection: Connection | None = None
        self._subject: str | None = self._url.subject or self._stream  # to publish to
        self._declared = False
        # The last known state of the streams and the consumer.
        self._known: dict[str, dict[str, Any]] = {}
        self._waiting_for = ""  # a deleted stream or consumer that is not ours
        self._next_tick = self._next_floor = self._forget_at = 0.0  # event loop time
        self._ack_wait = ACK_WAIT_SECONDS
        # The most deliveries that count against a suspect whose handler never began.
        self._most = max(settings.max_deliveries or 2**31, 2)
        self._fetcher: asyncio.Task[None] | None = None
        self._fetching = False
        self._closing = asyncio.Event()
        self._wake = asyncio.Event()
        self._subscription: Subscription | None = None
        self._pulled_count = 0  # messages that were requested and have not arrived yet
        self._pull_heard_at = 0.0  # event loop time
        self._by_key: dict[str, Message] = {}  # the unacked messages
        # Unacked messages that enter the buffer once their attempts are known.
        self._redelivered: list[Message] = []
        # Settled during an outage: the message, the settlement, and what to send.
        self._unsent: list[tuple[Message, str, bytes]] = []
        # The last acks, key to reply: a server that crashes may not have written them to its disk.
        self._recent_acks: dict[str, str] = {}
        self._older_acks: dict[str, str] = {}
        self._done_keys: list[str] = []  # messages whose records of failures can be deleted

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._closing.clear()
        self._connection = await self._connect()
        self.connectivity.established()
        self._fetcher = asyncio.create_task(self._fetch(), name=f"fetcher of {self._stream}")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()  # a waiting pull would get the messages that are requeued here
        self._closing.set()
        self._wake.set()
        if self._fetcher is not None:
            await asyncio.wait({self._fetcher}, timeout=0.5)
            self._fetcher.cancel()  # it may wait for a connection, or for an answer
            await asyncio.wait({self._fetcher}, timeout=0.5)
            self._fetcher = None
        if (connection := self._connection) is not None:
            if not await _within(CLOSE_SECONDS, self._settle_the_rest(connection)):
                connection.lose(TimeoutError())
            await connection.close_within(CLOSE_SECONDS)
            self._connection = None
        self.connectivity.up = False
        for message, settlement, _ in self._unsent:
            log_settlement_lost(message, settlement, "the connection was lost")
        for collection in (self._unsent, self._redelivered, self._by_key, self.unacked):
            collection.clear()

    async def _settle_the_rest(self, connection: Connection) -> None:
        """Requeue all unacked messages, and wait until all settlements have arrived."""
        for message in list(self.unacked):
            if message.receipt.reply:  # otherwise its consumer was deleted
                await connection.publish(message.receipt.reply, NAK)
        await connection.ping()
        await self._delete_records(connection)

    @property
    def connected(self) -> bool:
        return (
            self.connectivity.up and self._connection is not None and self._connection.lost is None
        )

    def _reachable(self) -> Connection:
        if self._connection is None or not self.connected:
            raise BrokerUnavailable(f"{self._url.redacted}: the connection was lost")
        return self._connection

    async def _connect(self) -> Connection:
        """Connect to the first host that answers; there the declared topology is declared again."""
        outage: BrokerUnavailable | None = None
        self._url = self._current_url()
        for host in random.sample(self._url.hosts, len(self._url.hosts)):
            connection = Connection(self._url, self._wake.set)
            try:
                await connection.open(host, self._stream)
                if self._declared:
                    await self._declare(connection)
            except BaseException as error:
                await connection.close_within(0.1)
                if not isinstance(error, BrokerUnavailable):
                    raise
                outage = error
            else:
                return connection
        assert outage is not None  # a URL without hosts was refused
        raise outage

    # -- topology

    async def declare(self) -> None:
        await self._declare(self._reachable())
        self._declared = True
        self._next_tick = 0.0  # it depends on the ack wait that is known now
        self._wake.set()

    async def delete(self) -> None:
        for stream in (self._stream, self._dead, self._attempts):
            await self._reachable().api_unless([NO_STREAM], f"STREAM.DELETE.{stream}")

    async def _declare(self, connection: Connection) -> None:
        config = await self._declare_stream(
            connection, self._stream, subjects=[self._stream], retention="workqueue"
        )
        self._subject = self._url.subject or _only_subject(self._stream, config.get("subjects", []))
        await self._declare_stream(connection, self._dead, subjects=[f"{self._dead}.*"])
        await self._declare_stream(
            connection,
            self._attempts,
            subjects=[f"{self._attempts}.*.*"],
            max_msgs_per_subject=1,
            max_age=round(RECORD_SECONDS * 1e9),
        )
        await self._declare_consumer(connection)
        self._waiting_for = ""

    def _config_again(self, what: str, config: dict[str, Any]) -> dict[str, Any]:
        """How to create a stream or consumer: as last known. Raises BrokerUnavailable if it is not ours."""
        known: dict[str, Any] = self._known.get(what, {}).get("config", config)
        if known.get("description") == OURS:
            return known
        msg = f"{what} was deleted: this service did not create it, and waits until it exists again"
        if self._waiting_for != what:
            self._waiting_for = what
            log.warning("reconnecting", broker=self._url.redacted, reason=msg)
        raise BrokerUnavailable(msg)

    async def _declare_stream(
        self, connection: Connection, name: str, **config: Any
    ) -> dict[str, Any]:
        """Create the stream unless it exists; returns its configuration."""
        config |= {"name": name, "storage": "file", "num_replicas": self._url.replicas}
        look, what = f"STREAM.INFO.{name}", f"the stream {name!r}"
        info = await connection.api_unless([NO_STREAM], look)
        if info is None:
            config = self._config_again(what, {**config, "description": OURS})
            try:
                info = await connection.api_unless(
                    [NAME_IN_USE], f"STREAM.CREATE.{name}", **config
                ) or await connection.api(look)  # another process created it meanwhile
            except JetStreamRefused as refusal:
                if refusal.code == SUBJECTS_OVERLAP:
                    raise await self._overlap(connection, name, config["subjects"]) from refusal
                raise
        self._known[what] = info
        configured: dict[str, Any] = info["config"]
        return configured

    async def _overlap(
        self, connection: Connection, name: str, subjects: list[str]
    ) -> BrokerRefused:
        theirs = "another stream"
        with suppress(BrokerError):  # only this sentence needs the right to ask
            answer = await connection.api("STREAM.NAMES", subject=subjects[0])
            names = " and ".join(repr(found) for found in answer.get("streams") or ())
            theirs = f"the stream {names}" if names else theirs
        return BrokerRefused(
            f"{self._url.redacted}: the stream {name!r} cannot be created, because {theirs} already has "
            f"messages of its subject {subjects[0]!r}: take that subject out, or rename CONSUMER_SOURCE"
        )

    async def _declare_consumer(self, connection: Connection) -> None:
        what = f"the consumer {self._group!r} of the stream {self._stream!r}"
        known = self._known.get(what)
        info = await connection.api_unless([NO_CONSUMER], self._info_of_consumer)
        if info is None:
            info = await self._create_consumer(connection, what)
        config = info["config"]
        _check_consumer(what, config)
        wanted = {
            **config,
            "ack_wait": round(self._url.ack_wait_seconds * 1e9) or config["ack_wait"],
        }
        if self._url.filter:
            wanted = {name: wanted[name] for name in wanted.keys() - {*FILTERS}} | self._url.filter
        if wanted != config:
            config = wanted
            info = await self._configure_consumer(connection, config)
        self._ack_wait = config["ack_wait"] / 1e9
        self._know(what, info)
        if known is None:
            if 0 < (limit := config.get("max_ack_pending", -1)) < 10 * self.prefetch:
                log.warning(
                    "max_ack_pending", limit=limit, consumer=self._group, reason=FEW_PENDING
                )
        elif _is_another(known, info):
            self._forget_replies()

    def _know(self, what: str, info: dict[str, Any]) -> None:
        """Keep the consumer's state, with the ``floor`` where a new one begins; NATS 2.10 has none before an ack."""
        known, delivered, floor = self._known.get(what), info["delivered"], info["ack_floor"]
        floor = (floor if delivered["consumer_seq"] else delivered)["stream_seq"]
        if known and not _is_another(known, info):
            floor = max(floor, known["floor"])
        stream = self._known[f"the stream {self._stream!r}"]
        self._known[what] = {**info, "floor": floor, "stream_created": stream["created"]}

    async def _create_consumer(self, connection: Connection, what: str) -> dict[str, Any]:
        config = {
            "description": OURS,
            "durable_name": self._group,
            "ack_policy": "explicit",
            "ack_wait": round(ACK_WAIT_SECONDS * 1e9),
            "max_deliver": -1,  # beyond a limit the broker silently drops a message
            "max_ack_pending": -1,  # delayed messages count too; the pulls are our limit
            **self._url.filter,
        }
        config = self._config_again(what, config)
        floor = self._known.get(what, {}).get("floor", 0)
        config = {k: v for k, v in config.items() if k not in ("deliver_policy", "opt_start_seq")}
        if what not in self._known:
            config["deliver_policy"] = self._url.deliver_policy
        stream = self._known[f"the stream {self._stream!r}"]
        same_stream = self._known.get(what, {}).get("stream_created") == stream["created"]
        if floor and same_stream and stream["config"]["retention"] != "workqueue":
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": floor + 1}
        try:
            return await self._configure_consumer(connection, config)
        except BrokerRefused:
            # Perhaps another process created it meanwhile, to start at another message.
            if info := await connection.api_unless([NO_CONSUMER], self._info_of_consumer):
                return info
            raise

    @property
    def _info_of_consumer(self) -> str:
        return f"CONSUMER.INFO.{self._stream}.{self._group}"

    async def _configure_consumer(
        self, connection: Connection, config: dict[str, Any]
    ) -> dict[str, Any]:
        call = f"CONSUMER.DURABLE.CREATE.{self._stream}.{self._group}"
        try:
            return await connection.api(call, stream_name=self._stream, config=config)
        except JetStreamRefused as refusal:
            msg = f"the group {self._group!r} cannot consume the stream {self._stream!r}: {refusal}"
            raise BrokerRefused(msg) from refusal

    def _forget_replies(self) -> None:
        """The consumer is a new one: it would take settlements of earlier deliveries for those of other messages."""
        for message in self.unacked:
            message.receipt.reply, message.receipt.held_until = "", 0.0
        self._recent_acks = dict.fromkeys(self._recent_acks, "")
        self._older_acks = dict.fromkeys(self._older_acks, "")

    async def describe(self) -> dict[str, int | str]:
        connection = self._reachable()
        described: dict[str, int | str] = {
            "server": f"nats-server {connection._server_info['version']}"
        }
        stream = await connection.api_unless([NO_STREAM], f"STREAM.INFO.{self._stream}")
        described[self._stream] = MISSING if stream is None else stream["state"]["messages"]
        info = stream and await connection.api_unless([NO_CONSUMER], self._info_of_consumer)
        if info is None:
            described[f"{self._stream} group {self._group}"] = MISSING
        else:
            described |= {
                self._stream: info["num_pending"],
                f"{self._stream} in flight, requeued or delayed": info["num_ack_pending"],
                f"{self._stream} pulls waiting": info["num_waiting"],  # from consumers with room
            }
        if await connection.api_unless([NO_STREAM], f"STREAM.INFO.{self._attempts}") is None:
            described[self._attempts] = MISSING
        dead = await self._dead_state()
        described[self._dead] = MISSING if dead is None else self._count_of(dead)
        return described

    # -- fetching

    async def start(self) -> None:
        self._fetching = True
        self._wake.set()
        await self._pull_once(self._reachable())

    async def _stop_fetching(self) -> None:
        self._fetching = False
        connection, subscription = self._connection, self._subscription
        self._subscription = None
        if subscription is not None and connection is not None and connection.lost is None:
            ended = await _within(STOP_SECONDS, self._unsubscribe(connection, subscription))
            if not ended:
                connection.lose(TimeoutError("no answer to the end of the subscription"))
        for message in self._redelivered:
            self._deliver(message)  # `stop` requeues them, whatever their attempts
        self._redelivered.clear()

    async def _unsubscribe(self, connection: Connection, subscription: Subscription) -> None:
        # UNSUB, then PING and PONG: after that no delivery can arrive.
        await subscription.drain()  # type: ignore[no-untyped-call, unused-ignore]  # nats-py's is untyped
        # To answer this, the server drops our last pull. A pull that it still has when a message is requeued may
        # make it lose track of the message until the ack wait is over (2.9.10 does).
        await connection.api_unless([NO_CONSUMER, NO_STREAM], self._info_of_consumer)

    def __anext__(self) -> Coroutine[Any, Any, Message]:
        return self._next_held()

    def _is_taken(self, message: Message) -> bool:
        if not self._has_takeable() and self._has_room():
            self._wake.set()
        return super()._is_taken(message)

    def _lost_because(self, message: Message) -> str:
        if message.receipt.held_until > asyncio.get_running_loop().time():
            return ""
        return "the ack wait had passed" if message.receipt.reply else "its consumer was deleted"

    def _release(self, message: Message) -> None:
        super()._release(message)
        key = message.receipt.key
        if self._by_key.get(key) is message:
            del self._by_key[key]
        if self._has_room():
            self._wake.set()

    async def _fetch(self) -> None:
        """Keep a connection, pull messages, and renew their ack waits, until the source is closed."""
        try:
            await self.connectivity.keep(self._use_connection, until=self._closing)
        except Exception as failure:
            self.connectivity.up = False
            self.buffer.fail(failure)

    async def _use_connection(self) -> None:
        try:
            if self._connection is None:
                self._connection = await self._connect()
            await self._resend(self._connection)
            await self._pull_once(self._connection)
            self.connectivity.established()
            await self._serve(self._connection)
        except BrokerError as error:
            raise self._lost(error) from error.__cause__
        finally:
            if self._connection is not None and self._connection.lost is not None:
                lost, self._connection, self._subscription = self._connection, None, None
                self._pulled_count = 0
                await lost.close_within(0.1)

    def _lost(self, reason: BrokerError) -> BrokerError:
        if self._connection is not None:
            self._connection.lose(reason)
        return reason

    async def _serve(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing.is_set():
            self._wake.clear()
            async with connection.bounded():
                await self._pull(connection)
            if self._redelivered:
                await self._look_up_attempts(connection)
            if loop.time() >= self._next_tick:
                self._next_tick = loop.time() + min(TICK_SECONDS, self._ack_wait / 4)
                await self._tick(connection)
            timer = loop.call_at(self._next_tick, self._wake.set)
            await self._wake.wait()
            timer.cancel()

    async def _pull_once(self, connection: Connection) -> None:
        """Raises BrokerDenied for a missing right, which ends the connection."""
        await self._pull(connection)
        await connection.ping()

    async def _pull(self, connection: Connection) -> None:
        if self._fetching and self._subscription is None:
            self._inbox = connection.new_inbox()
            self._subscription = await connection.subscribe(
                f"{self._inbox}.*",
                cb=self._on_message,
                pending_msgs_limit=-1,
                pending_bytes_limit=-1,
            )
        if self._has_room():
            if not self._pulled_count:
                self._pull_heard_at = asyncio.get_running_loop().time()
            room = self._room() - self._pulled_count
            self._pulled_count += room
            await connection.publish(
                f"{self._url.api}.CONSUMER.MSG.NEXT.{self._stream}.{self._group}",
                b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}'
                % (room, PULL_SECONDS * 1e9, HEARTBEAT_SECONDS * 1e9),
                f"{self._inbox}.{room}",
            )

    def _has_room(self) -> bool:
        """Whether to pull now: half of the prefetch is free, or no message is buffered or requested."""
        room = self._room() - self._pulled_count
        few = 0 < room < self.prefetch // 2 and (self._pulled_count > 0 or self._has_takeable())
        return self._fetching and room > 0 and not few

    async def _on_message(self, msg: Msg) -> None:
        try:
            if msg.reply:
                await self._receive(msg)
            else:
                self._on_status(msg.headers or {}, msg.subject)
        except (BrokerUnavailable, Error):
            pass  # the connection ended meanwhile: the message is delivered again
        except Exception as failure:
            self.buffer.fail(failure)

    def _on_status(self, headers: Mapping[str, str], inbox: str) -> None:
        self._pull_heard_at = asyncio.get_running_loop().time()
        status, description = headers.get("Status"), headers.get("Description", "")
        if status == "100":
            return  # a heartbeat
        ended = int(headers.get("Nats-Pending-Messages", inbox.rpartition(".")[2]))
        self._pulled_count = max(0, self._pulled_count - ended)
        if status in ("404", "408"):
            self._wake.set()
        elif "Exceeded" in description:  # a limit of the consumer or of the server
            log.warning("pull_refused", reason=description)  # the next tick tries again
        elif self._connection is not None:
            # The consumer was deleted, or lost its leader: the next connection declares what is missing.
            self._connection.lose(Error(f"{status} {description}".strip()))

    async def _receive(self, msg: Msg) -> None:
        self._pulled_count = max(0, self._pulled_count - 1)
        self._pull_heard_at = now = asyncio.get_running_loop().time()
        # $JS.ACK.(domain.account.)stream.consumer.deliveries.sequence.consumer's.timestamp.pending(.random)
        tokens = msg.reply.split(".")
        at = 4 if len(tokens) == 9 else 6
        key = f"{tokens[at + 1]}-{tokens[at + 3]}"
        held_until = now + HELD_SHARE * self._ack_wait
        headers = msg.headers or {}
        if key in self._recent_acks or key in self._older_acks:
            await msg.ack()  # acked here before the server crashed
        elif headers.get(GROUP, self._group) != self._group:
            await msg.ack()
        elif (held := self._by_key.get(key)) is not None:
            # After an outage longer than the ack wait, the message was redelivered to this consumer.
            held.receipt.reply, held.receipt.held_until = msg.reply, held_until
            held.deliveries += int(tokens[at]) - held.receipt.deliveries
            held.receipt.deliveries = int(tokens[at])
        else:
            delivery = Delivery(key, msg.subject, int(tokens[at]), 0, msg.reply, held_until)
            message = self._by_key[key] = _make_message(msg.data, headers, delivery)
            due_in = seconds_of(headers[DUE]) - time.time() if DUE in headers else 0
            if (delay := min(due_in, RECORD_SECONDS)) > 0 and delivery.deliveries == 1:
                del self._by_key[key]
                await self._reachable().publish(msg.reply, _nak_later(delay))
            elif delivery.deliveries > 1 or self._redelivered:
                self.unacked.add(message)
                self._redelivered.append(message)
                self._wake.set()
            elif not self._deliver(message):
                await self.requeue(message)

    async def _look_up_attempts(self, connection: Connection) -> None:
        """Deliver the messages with their attempts. Messages that arrive meanwhile wait behind them, in order."""
        records = await together(self._record(connection, each) for each in self._redelivered)
        if self.stopped:
            return  # `stop` requeues them
        messages, self._redelivered = self._redelivered, self._redelivered[len(records) :]
        for message, record in zip(messages, records, strict=False):
            failures = count_of(record.get("attempts"))
            message.attempt = max(failures + 1, message.attempt)
            message.receipt.settled = count_of(record.get("deliveries")) or failures
            message.deliveries = max(1, message.receipt.deliveries - message.receipt.settled)
            if not record.get("begun") and message.deliveries <= 2 * self._most:
                message.deliveries = min(message.deliveries, self._most)  # it only waited
            self._deliver(message)

    async def _record(self, connection: Connection, message: Message) -> dict[str, Any]:
        """The record of a retry, or of a suspect that was requeued or began; empty without one."""
        if message.receipt.deliveries == 1:
            return {}
        subject = self._record_of(message.receipt.key)
        get = f"STREAM.MSG.GET.{self._attempts}"
        answer = await connection.api_unless([NO_MESSAGE], get, last_by_subj=subject)
        return json_object(base64.b64decode(answer["message"].get("data", ""))) if answer else {}

    def _record_of(self, key: str) -> str:
        """The subject of the record of a message's failures."""
        return f"{self._attempts}.{self._group}.{key}"

    async def _delete_records(self, connection: Connection) -> None:
        """Delete the records of messages that are acked or dead-lettered."""
        keys, self._done_keys = self._done_keys, []
        purge = f"STREAM.PURGE.{self._attempts}"
        await together(connection.api(purge, filter=self._record_of(key)) for key in keys)

    async def _tick(self, connection: Connection) -> None:
        """Send progress acks (+WPI), and check that the broker still serves the pull."""
        now = asyncio.get_running_loop().time()
        held_seconds = HELD_SHARE * self._ack_wait
        renewed: list[Delivery] = [
            message.receipt
            for message in self.unacked
            if now < message.receipt.held_until < now + held_seconds * 2 / 3
        ]
        for delivery in renewed:
            await connection.publish(delivery.reply, IN_PROGRESS)
        await connection.ping()
        if now > self._forget_at:
            self._forget_at = now + ACKS_SECONDS
            self._older_acks, self._recent_acks = self._recent_acks, {}
        for delivery in renewed:
            delivery.held_until = now + held_seconds
        await self._delete_records(connection)
        if now > self._next_floor:
            self._next_floor = now + FLOOR_SECONDS
            await self._look_at_floor(connection)
        silence = asyncio.get_running_loop().time() - self._pull_heard_at
        if self._pulled_count and silence > SILENCE_SECONDS:
            msg = f"{self._url.redacted}: no answer to a pull for {silence:.0f} seconds"
            raise BrokerUnavailable(msg)

    async def _look_at_floor(self, connection: Connection) -> None:
        """Look up the floor: if our consumer is deleted from a stream that keeps messages, the next one begins here."""
        what = f"the consumer {self._group!r} of the stream {self._stream!r}"
        stream, known = self._known.get(f"the stream {self._stream!r}"), self._known.get(what)
        if not (stream and known) or known["config"].get("description") != OURS:
            return
        if stream["config"]["retention"] != "workqueue":
            info = await connection.api_unless([NO_CONSUMER, NO_STREAM], self._info_of_consumer)
            if info and not _is_another(known, info):
                self._know(what, info)

    # -- settling

    def _ack(self, message: Message) -> Coroutine[Any, Any, None]:
        return self._send(message, "ack", ACK)

    async def _requeue(self, message: Message) -> None:
        if self.suspects.may_kill(message):  # JetStream counts requeues too
            with suppress(BrokerError, TimeoutError):
                async with asyncio.timeout(STOP_SECONDS / 2):
                    await self._store(self._record_for(message, attempts=message.attempt - 1))
        await self._send(message, "requeue", NAK)

    async def begin_alone(self, message: Message) -> None:
        """Ack waits end in any order: the first suspect that is redelivered may not have killed the process."""
        if message.receipt.deliveries > 1 and self._is_held(message):
            with suppress(BrokerError):
                await self._store(
                    self._record_for(message, attempts=message.attempt - 1, begun=True)
                )

    async def flush(self) -> None:
        if self._connection is not None and self.connected:
            await _within(STOP_SECONDS, self._connection.ping())

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        due_at = time.time() + delay_seconds
        delivery: Delivery = message.receipt
        connection = self._reachable()
        get, sequence = f"STREAM.MSG.GET.{self._stream}", int(delivery.key.partition("-")[0])
        if await connection.api_unless([NO_MESSAGE, NO_STREAM], get, seq=sequence) is None:
            # Limits, or an operator, deleted it meanwhile: this process has the last copy.
            headers = {ATTEMPTS: str(message.attempt), DUE: f"{due_at:.3f}"}
            headers[GROUP] = self._group
            broker_id = f"{self._stream}-{self._group}-{delivery.key}-{message.attempt}"
            storing = self._store(self._copy_of(message, delivery.subject, broker_id, headers))
            await self._move(message, "retry", storing, lambda it: self._send(it, "retry", TERM))
            return
        record = self._record_for(message, attempts=message.attempt, due_at=due_at, reason=reason)
        storing = self._store(record)
        later = _nak_later(delay_seconds)
        await self._move(message, "retry", storing, lambda it: self._send(it, "retry", later))

    def _record_for(self, message: Message, *, begun: bool = False, **about: Any) -> Outgoing:
        delivery: Delivery = message.receipt
        about |= {"id": message.id[:LONGEST_NAME], "begun": begun}
        about["deliveries"] = delivery.settled if begun else delivery.deliveries
        return Outgoing(self._record_of(delivery.key), json.dumps(about).encode(), {})

    async def _reject(self, message: Message, reason: str) -> None:
        delivery: Delivery = message.receipt
        headers = {
            REASON: text_of(reason),
            ATTEMPTS: str(message.attempt),
            DEAD_LETTERED_AT: f"{time.time():.3f}",
            SUBJECT: delivery.subject,
        }
        # After a crash, a second dead letter would have the same id: the broker does not store it.
        broker_id = f"{self._stream}-{self._group}-{delivery.key}"
        storing = self._store(self._copy_of(message, self._dead_subject, broker_id, headers))
        await self._move(message, "reject", storing, lambda it: self._send(it, "reject", TERM))

    def _copy_of(
        self, message: Message, subject: str, broker_id: str, headers: dict[str, str]
    ) -> Outgoing:
        """A copy of the message for this subject, without the parts that are too large for the server."""
        limit = self._reachable().max_payload

        def copy(body: bytes, kept: dict[str, Any]) -> Outgoing:
            id, type, ours = message.id, message.type, dict(headers)
            if SHORTENED in kept:
                id, type = id[:LONGEST_NAME], type[:LONGEST_NAME]
                ours[SHORTENED] = str(kept[SHORTENED])
            names = _headers_of(OutgoingMessage(body, type, id, kept.get("headers", {})))
            names |= {ID: broker_id, FIRST_ID: _plain(id)}
            return Outgoing(subject, body, names | ours)

        def fits(body: bytes, kept: dict[str, Any]) -> bool:
            return not copy(body, kept).why_too_large(limit)

        return copy(*fit_dead_letter(message.body, {"headers": message.headers}, fits))

    async def _store(self, message: Outgoing) -> None:
        await self._reachable().ask(message)

    async def _send(self, message: Message, settlement: str, payload: bytes) -> None:
        """Send the settlement, now or after the outage."""
        delivery: Delivery = message.receipt
        if payload is ACK or payload is TERM:
            if len(self._recent_acks) >= MOST_RECENT_ACKS:
                self._older_acks, self._recent_acks = self._recent_acks, {}
            self._recent_acks[delivery.key] = delivery.reply
            if delivery.deliveries > 1:  # there may be a record
                self._done_keys.append(delivery.key)
        if not delivery.reply:
            return  # to be acked when the next consumer delivers it
        if self._connection is not None and self.connected:
            await self._connection.publish(delivery.reply, payload)
        else:
            self._unsent.append((message, settlement, payload))

    async def _resend(self, connection: Connection) -> None:
        """Send what was settled in the outage, and acks that the connection or the server may have lost."""
        self._forget_at = asyncio.get_running_loop().time() + ACKS_SECONDS
        for reply in filter(None, (*self._older_acks.values(), *self._recent_acks.values())):
            await connection.publish(reply, ACK)
        while self._unsent:
            message, _, payload = self._unsent.pop(0)
            if payload is not ACK and not self._lost_because(message):
                await connection.publish(message.receipt.reply, payload)

    # -- publishing

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        connection = self._reachable()
        for start in range(0, len(messages), PUBLISH_AT_ONCE):
            batch = messages[start : start + PUBLISH_AT_ONCE]
            async with connection.bounded():
                answers = await connection.answers(partial(self._request, one) for one in batch)
                for message, answer in zip(batch, answers, strict=True):
                    connection.check_stored(message.to, answer)

    def _request(self, message: OutgoingMessage) -> Outgoing:
        headers = _headers_of(message)
        if not message.to:
            return Outgoing(self._subject_to_publish_to(), message.body, headers)
        _, subject = self.destination_of(message)
        if fault := _fault_of_subject(subject):
            raise BrokerRefused(f"the subject {subject[:200]!r} {fault}")
        if not message.has_random_id:
            # One stream may have both this subject and that of another message with this id.
            headers |= {ID: f"{subject}-{headers[ID]}", FIRST_ID: _plain(message.id)}
        return Outgoing(subject, message.body, headers)

    def _subject_to_publish_to(self) -> str:
        if self._subject is None:
            msg = f"the stream {self._stream!r} has several subjects, or wildcards: name one by ?subject= in the URL"
            raise BrokerRefused(msg)
        return self._subject

    # -- dead letters

    async def count_dead_letters(self) -> int:
        return self._count_of(await self._dead_state() or {})

    def _count_of(self, state: dict[str, Any]) -> int:
        return int(state.get("subjects", {}).get(self._dead_subject, 0))

    async def _dead_state(self) -> dict[str, Any] | None:
        look = f"STREAM.INFO.{self._dead}"
        info = await self._reachable().api_unless(
            [NO_STREAM], look, subjects_filter=self._dead_subject
        )
        state: dict[str, Any] | None = info and info["state"]
        return state

    async def _stored_dead_letters(self, last: float = math.inf) -> AsyncIterator[StoredDeadLetter]:
        """The dead letters in the stream, up to this sequence."""
        sequence, get = 1, f"STREAM.MSG.GET.{self._dead}"
        while sequence <= last:
            request = {"seq": sequence, "next_by_subj": self._dead_subject}
            answer = await self._reachable().api_unless([NO_MESSAGE, NO_STREAM], get, **request)
            if answer is None or answer["message"]["seq"] > last:
                return
            stored = StoredDeadLetter(answer["message"])
            yield stored
            sequence = stored.sequence + 1

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[set[int]]:
        """The sequences that were read and not taken."""
        yield set()

    async def _present_letters(self, reading: set[int]) -> AsyncGenerator[DeadLetter, None]:
        last = (await self._dead_state() or {}).get("last_seq", 0)
        async for stored in self._stored_dead_letters(last):
            reading.add(stored.sequence)
            yield make_dead_letter(
                stored.message,
                stored,
                reason=stored.reason,
                attempts=stored.attempts,
                dead_lettered_at=stored.dead_lettered_at,
            )

    async def _take_letters(
        self, reading: set[int], letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        if replay:
            connection = self._reachable()
            await together(connection.ask(self._replayed(letter.receipt)) for letter in letters)
        sequences = [letter.receipt.sequence for letter in letters]
        reading.difference_update(sequences)
        if not any(sequence < sequences[-1] for sequence in reading):
            yield await self._purge_dead(seq=sequences[-1] + 1)  # all before it were taken
            return
        yield sum(await together(map(self._delete_dead_letter, sequences)))

    async def _delete_dead_letter(self, sequence: int) -> bool:
        """Returns whether it existed. Below its first sequence, a stream answers as one that denies deletion."""
        api, (delete, get) = self._reachable().api_unless, ("STREAM.MSG.DELETE", "STREAM.MSG.GET")
        try:
            answer = await api([NO_SEQUENCE], f"{delete}.{self._dead}", seq=sequence, no_erase=True)
        except JetStreamRefused as refusal:
            if refusal.code != NOT_DELETED or await api(
                [NO_MESSAGE], f"{get}.{self._dead}", seq=sequence
            ):
                raise
            return False
        return answer is not None

    def _replayed(self, stored: StoredDeadLetter) -> Outgoing:
        subject = stored.subject
        known = self._known.get(f"the stream {self._stream!r}", {"config": {}})
        subjects = known["config"].get("subjects") or ()
        if not CONCRETE_SUBJECT.fullmatch(subject) or not any(
            _matches(subject, pattern) for pattern in subjects
        ):  # another program's dead letter
            subject = self._subject_to_publish_to()
        return self._copy_of(stored.message, subject, stored.replay_id, {GROUP: self._group})

    async def _purge_all(self) -> AsyncIterator[int]:
        yield await self._purge_dead()

    async def _purge_dead(self, **limit: int) -> int:
        purge = f"STREAM.PURGE.{self._dead}"
        request = {"filter": self._dead_subject, **limit}
        answer = await self._reachable().api_unless([NO_STREAM], purge, **request)
        return int(answer["purged"]) if answer else 0


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> NatsBroker:
    return NatsBroker(settings, prefetch)


async def _within(seconds: float, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work for at most this long; returns whether it ended, even by an error. Leaves no task behind."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        return task.done()
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=0.5)
        if task.done() and not task.cancelled():
            task.exception()  # retrieved, and ignored


async def _ignore(_error: Exception) -> None:
    """nats-py also raises these errors from the request itself, so the callback ignores them."""
