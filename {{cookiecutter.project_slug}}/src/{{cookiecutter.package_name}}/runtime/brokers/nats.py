# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""NATS JetStream 2.9 or later, by nats-py: a stream, and a durable pull consumer named by the group.

``nats://user:password@one:4222,two:4222`` or ``nats://token@host``; ``tls://`` insists on TLS. Options:
``?ack_wait_seconds=30`` (after how long the messages of a dead consumer go to others), ``replicas=3`` (of what is
created), ``subject=`` (to publish to), ``domain=``, ``inbox=`` (prefix of reply subjects), ``creds=`` and ``nkey=``
(files), ``cafile=``, ``certfile=`` and ``keyfile=``.

A stream that is not there is created as a work queue, which serves one group. One that is there is taken as it is:
with limits or interest retention it serves many groups, each at its own pace. Beside the stream ``orders`` there are
``orders_dead``, whose subject ``orders_dead.billing`` has the dead letters of the group ``billing``, and
``orders_attempts``, with one record for each message that a handler failed on and that is not done.

A retry leaves the message where it is. First the failure is recorded, then the broker is told to deliver it
again after the delay: a crash in between makes it come earlier or later, never with a wrong attempt. A delivery is
ours until the ack wait has passed without a sign of life, whatever happens to the connection; signs are sent for all
that is held, also while handlers run for hours. An event loop that is blocked for longer counts as dead.
"""

import asyncio
import base64
import json
import logging
import math
import random
import re
import ssl
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import structlog
from nats.aio.client import Client, RawCredentials
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error, NoRespondersError, SecureConnWantedError

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .source import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    Capabilities,
    Connectivity,
    Source,
    log_settlement_lost,
)

T = TypeVar("T")

CONNECT_SECONDS = 5.0
"""For each of the hosts."""
ANSWER_SECONDS = 5.0
"""How long the broker may take to answer; then the connection counts as lost."""
STOP_SECONDS = 1.5
CLOSE_SECONDS = 1.0
ACK_WAIT_SECONDS = 30.0
HELD = 0.9
"""The part of it that we rely on: the broker's clock began a little before ours."""
TICK_SECONDS = 1.0
"""How often the broker is asked for a sign of life, and given ours where it is due."""
PULL_SECONDS = 30.0
HEARTBEAT_SECONDS = 2.0
"""How often the broker says that a pull still waits."""
SILENCE_SECONDS = 6.0
"""Without a word of the broker about a pull for so long, the pull is lost."""
MOST_TOLD = 10_000
PUBLISH_AT_ONCE = 100

DELIVERY_LIMIT = 1000
"""A message that was delivered so many times more than handlers failed on it kills its consumers."""
FORGET_SECONDS = 30 * 86_400.0
"""A failure is remembered for so long."""

ID = "Nats-Msg-Id"
"""Header: of messages with the same one, the broker stores the first within two minutes."""
FIRST_ID = "x-consumer-id"
"""Header: the message's id, where ID must be another one."""
TYPE = "x-consumer-type"
EXTRAS = "x-consumer-json"
"""Header: what other headers cannot hold, as JSON: an odd ``id`` or ``type``, and the odd ones of ``headers``."""
GROUP = "x-consumer-group"
"""Header of a dead letter that was replayed: other groups have handled it."""
REASON = "x-consumer-reason"
ATTEMPTS = "x-consumer-attempts"
DEAD_LETTERED_AT = "x-consumer-dead-lettered-at"
"""Header: when it became a dead letter, in Unix seconds."""
SUBJECT = "x-consumer-subject"
"""Header of a dead letter: where it was published first."""

ACK, TERM, NAK, IN_PROGRESS = b"+ACK", b"+TERM", b"-NAK", b"+WPI"
# Error codes of JetStream's API.
NO_CONSUMER, NO_MESSAGE, NAME_IN_USE, NO_STREAM = 10014, 10037, 10058, 10059

TLS_FILES = {"cafile", "certfile", "keyfile"}
OPTIONS = {
    "ack_wait_seconds",
    "replicas",
    "subject",
    "domain",
    "inbox",
    "creds",
    "nkey",
} | TLS_FILES
NOT_AUTHORIZED = re.compile("(authorization|authentication) (violation|expired|revoked)", re.I)
NOT_PERMITTED = re.compile("permissions violation", re.I)
NOT_IN_A_NAME = re.compile(r"[\s.*>/\\]")
HEADER_NAME = re.compile(r"(?!nats-|x-consumer-)[!#$%&'*+\-.^_`|~0-9A-Za-z]+", re.I)

log = structlog.get_logger()

if logging.getLogger("nats").level == logging.NOTSET:
    # It logs tracebacks of what is logged here, once, in a sentence.
    logging.getLogger("nats").setLevel(logging.CRITICAL)


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> Source:
    return NatsSource(settings, prefetch)


class _Refused(BrokerRefused):
    """JetStream's answer was an error of this code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _NotAuthorized(BrokerRefused):
    """The user, the password, the token or the key."""


@dataclass(slots=True)
class _Outgoing:
    subject: str
    body: bytes
    headers: dict[str, str]

    @property
    def size(self) -> int:
        lines = (len(name) + len(value.encode()) + 4 for name, value in self.headers.items())
        return len(self.body) + sum(lines) + len(b"NATS/1.0\r\n\r\n")


class _Connection(Client):
    """One connection to one server. It is not mended but replaced: nats-py gives up for good when its
    credentials are refused in a reconnect, and would bring back subscriptions whose pulls are in doubt."""

    def __init__(self, url: "_Url", on_lost: Callable[[], None]) -> None:
        super().__init__()
        self.lost: Exception | None = None
        self._url = url
        self._on_lost = on_lost

    async def open(self, host: str, name: str) -> None:
        """Raises BrokerUnavailable or BrokerRefused."""
        async with self.asking(CONNECT_SECONDS):
            await self.connect(
                servers=[f"nats://{host}"],
                name=name,
                connect_timeout=math.ceil(CONNECT_SECONDS),
                allow_reconnect=False,
                pending_size=0,  # never wait for the socket in the middle of a publish
                skip_subject_validation=True,  # they are all ours
                error_cb=_ignore,
                **self._url.connect_options(),
            )

    async def close_within(self, seconds: float) -> None:
        """Politely, else by force. Leaves no task behind."""
        tasks = [self._reading_task, self._flusher_task, self._ping_interval_task]
        tasks += [subscription._wait_for_msgs_task for subscription in self._subs.values()]
        await _within(seconds, self.close())
        self.cut()
        if running := {task for task in tasks if task is not None}:
            await asyncio.wait(running, timeout=0.5)

    def lose(self, reason: Exception) -> None:
        """The connection is of no use any more. Whoever waits for an answer learns it at once."""
        if self.lost is not None:
            return
        self.lost = reason
        self.cut()
        for future in (*self._resp_map.values(), *self._pongs):
            if not future.done():
                future.set_exception(Error("the connection was lost"))
                future.exception()  # not everyone waits
        self._on_lost()

    def cut(self) -> None:
        self._pending.clear()
        self._pending_data_size = 0
        if (writer := getattr(self._transport, "_io_writer", None)) is not None:
            writer.transport.abort()

    # -- asking

    @asynccontextmanager
    async def asking(self, seconds: float | None = None) -> AsyncIterator[None]:
        """Bounds a request to the broker, and makes whatever goes wrong a BrokerError."""
        seconds = ANSWER_SECONDS if seconds is None else seconds
        try:
            async with asyncio.timeout(seconds):
                if self.lost is not None:
                    raise self.lost
                yield
        except (OSError, Error) as error:
            raise self._explain(error, seconds) from error

    def _explain(self, error: Exception, seconds: float) -> BrokerError:
        broker = self._url.for_people
        text = str(self.lost or error).removeprefix("nats: ").strip("'")
        if NOT_PERMITTED.search(text):
            return BrokerRefused(f"{broker}: {text}")
        if NOT_AUTHORIZED.search(text):
            return _NotAuthorized(f"{broker} refused the user, the password, the token or the key")
        if isinstance(error, SecureConnWantedError):
            return BrokerRefused(f"{broker} offers no TLS")
        if isinstance(error, ssl.SSLError):
            return BrokerRefused(f"{broker}: no TLS connection: {error}")
        if isinstance(error, NoRespondersError):
            self.lose(error)  # whatever is missing, the next connection looks for it
            why = "it is off, or has no leader, or the stream is gone"
            return BrokerUnavailable(f"{broker}: JetStream does not answer: {why}")
        if isinstance(error, TimeoutError) and self.lost is None:
            return BrokerUnavailable(f"{broker} gave no answer within {seconds:g} seconds")
        return BrokerUnavailable(f"{broker}: {text or type(error).__name__}")

    async def ask(
        self, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """JetStream's answer. Raises BrokerUnavailable or _Refused."""
        async with self.asking():
            message = await self.request(subject, payload, ANSWER_SECONDS, headers=headers)
        answer: dict[str, Any] = json.loads(message.data)
        if error := answer.get("error"):
            msg = f"{self._url.for_people}: {error.get('description', error)}"
            if error.get("code", 500) >= 500:
                raise BrokerUnavailable(msg)
            raise _Refused(msg, error.get("err_code", 0))
        return answer

    async def api(self, call: str, **request: Any) -> dict[str, Any]:
        payload = json.dumps(request).encode() if request else b""
        return await self.ask(f"{self._url.api}.{call}", payload)

    async def api_unless(self, code: int, call: str, **request: Any) -> dict[str, Any] | None:
        """As `api`; None if the answer is this error."""
        try:
            return await self.api(call, **request)
        except _Refused as refusal:
            if refusal.code != code:
                raise
            return None

    async def ping(self) -> None:
        """Returns when the broker has read everything that was sent before."""
        async with self.asking():
            # Not to be cut short by it: the PONG for one that gave up would end nats-py's reading.
            await self.flush(math.ceil(2 * ANSWER_SECONDS))

    async def store(self, message: _Outgoing) -> None:
        """Returns when the broker has stored it."""
        if message.size > self.max_payload:  # for that the server closes the connection
            msg = f"this message is larger than the server's max_payload, {self.max_payload} bytes"
            raise BrokerRefused(msg)
        await self.ask(message.subject, message.body, message.headers or None)

    # -- parts of nats-py, replaced: on an error it would close in the very tasks that this ends

    async def _select_next_server(self) -> None:
        await self._connect_to_server(self._server_pool[0])  # once: we do the rest
        self._current_server = self._server_pool[0]

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self._url.insists_on_tls and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise SecureConnWantedError  # it would go on, and send the password
            info["tls_required"] = True

    async def _process_op_err(self, e: Exception) -> None:
        self.lose(e)

    async def _process_err(self, err_msg: str) -> None:
        self.lose(Error(err_msg))


@dataclass(slots=True)
class _Delivery:
    """The receipt of a message."""

    key: str
    """Its sequence and its time in the stream: unique, also when the stream is made anew."""
    subject: str
    headers: Mapping[str, str]
    deliveries: int = 1
    reply: str = ""
    """The subject that settlements are sent to."""
    held_until: float = 0
    """Event loop time. From then on the broker may have given the message to another consumer."""


class NatsSource(Source):
    """See the module. In the sentences of its errors and logs the URL has no credentials."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=True, attempts=True, requeue=True, dead_letters=True, order=True
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL or a name makes no sense."""
        super().__init__(settings, prefetch)
        self._stream = _checked_name(settings.source, "CONSUMER_SOURCE")
        self._group = _checked_name(settings.group or settings.source, "CONSUMER_GROUP")
        self._dead = f"{self._stream}_dead"
        self._dead_subject = f"{self._dead}.{self._group}"
        self._attempts = f"{self._stream}_attempts"
        self._url = _Url(settings.broker_url.get_secret_value())
        self.connectivity = Connectivity(self._url.for_people)
        self._connection: _Connection | None = None
        self._subject: str | None = None  # to publish to
        self._ack_wait = ACK_WAIT_SECONDS
        self._fetcher: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._leaving = asyncio.Event()
        self._taking = False
        self._subscription: Subscription | None = None
        self._asked = 0  # for so many messages, which have not come yet
        self._heard_at = 0.0  # event loop time
        self._unacked: dict[str, Message] = {}  # by the key of the delivery
        self._redelivered: list[
            Message
        ] = []  # to be put in the buffer when their attempts are known
        self._untold: list[tuple[Message, bytes]] = []  # settled while there was no connection
        # Acks of the last two ticks, key to reply: a server that crashes may not have them on its disk.
        self._told: dict[str, str] = {}
        self._told_before: dict[str, str] = {}
        self._forgettable: list[str] = []  # keys of messages that failed, and are done now

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._leaving.clear()
        self._connection = await self._connect()
        self.connectivity.established()
        self._fetcher = asyncio.create_task(self._fill(), name=f"fetcher of {self._stream}")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()  # a pull that waits would get again what is returned here
        self._leaving.set()
        self._wake.set()
        if self._fetcher is not None:
            await asyncio.wait({self._fetcher}, timeout=0.5)
            self._fetcher.cancel()  # it may wait for a connection, or for an answer
            await asyncio.wait({self._fetcher}, timeout=0.5)
            self._fetcher = None
        if (connection := self._connection) is not None:
            if not await _within(CLOSE_SECONDS, self._say_goodbye(connection)):
                connection.lose(TimeoutError())
            await connection.close_within(CLOSE_SECONDS)
            self._connection = None
        self.connectivity.up = False
        for message, _ in self._untold:
            log_settlement_lost(message, "the connection was lost")
        self._untold.clear()
        self._unacked.clear()
        self._redelivered.clear()

    async def _say_goodbye(self, connection: _Connection) -> None:
        """Return what is in hand, and see that all settlements have arrived."""
        for message in self._unacked.values():
            await connection.publish(message.receipt.reply, NAK)
        await connection.ping()
        await self._forget(connection)

    @property
    def connected(self) -> bool:
        return (
            self.connectivity.up and self._connection is not None and self._connection.lost is None
        )

    def _reachable(self) -> _Connection:
        if self._connection is None or not self.connected:
            msg = f"{self._url.for_people}: the connection was lost"
            raise BrokerUnavailable(msg)
        return self._connection

    async def _connect(self) -> _Connection:
        """To the first of the hosts that answers; the topology is declared there."""
        outage: BrokerUnavailable | None = None
        for host in random.sample(self._url.hosts, len(self._url.hosts)):
            connection = _Connection(self._url, self._wake.set)
            try:
                await connection.open(host, self._stream)
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

    async def _declare(self, connection: _Connection) -> None:
        config = await self._declare_stream(
            connection, self._stream, subjects=[self._stream], retention="workqueue"
        )
        self._subject = self._url.subject or _subject_of(self._stream, config.get("subjects", []))
        await self._declare_stream(connection, self._dead, subjects=[f"{self._dead}.*"])
        await self._declare_stream(
            connection,
            self._attempts,
            subjects=[f"{self._attempts}.*.*"],
            max_msgs_per_subject=1,
            max_age=round(FORGET_SECONDS * 1e9),
        )
        await self._declare_consumer(connection)

    async def _declare_stream(
        self, connection: _Connection, name: str, **config: Any
    ) -> dict[str, Any]:
        """Create the stream unless it is there; returns how it is configured."""
        config |= {"name": name, "storage": "file", "num_replicas": self._url.replicas}
        look = f"STREAM.INFO.{name}"
        info = (
            await connection.api_unless(NO_STREAM, look)
            or await connection.api_unless(NAME_IN_USE, f"STREAM.CREATE.{name}", **config)
            or await connection.api(look)  # another process was quicker
        )
        configured: dict[str, Any] = info["config"]
        return configured

    async def _declare_consumer(self, connection: _Connection) -> None:
        name = f"{self._stream}.{self._group}"
        info = await connection.api_unless(NO_CONSUMER, f"CONSUMER.INFO.{name}")
        there: dict[str, Any] | None = info and info["config"]
        config = there or {
            "durable_name": self._group,
            "ack_policy": "explicit",
            "ack_wait": round(ACK_WAIT_SECONDS * 1e9),
            "max_deliver": -1,  # beyond a limit the broker forgets a message without a word
            "max_ack_pending": -1,  # what waits for a retry is counted too; the pulls are our limit
        }
        _check_consumer(f"the consumer {self._group!r} of the stream {self._stream!r}", config)
        if (seconds := self._url.ack_wait_seconds) is not None:
            config = {**config, "ack_wait": round(seconds * 1e9)}
        if config != there:
            request = {"stream_name": self._stream, "config": config}
            try:
                await connection.api(f"CONSUMER.DURABLE.CREATE.{name}", **request)
            except _Refused as refusal:
                msg = f"the group {self._group!r} cannot consume the stream {self._stream!r}: {refusal}"
                raise BrokerRefused(msg) from refusal
        self._ack_wait = config["ack_wait"] / 1e9

    async def describe(self) -> dict[str, int | str]:
        connection = self._reachable()
        info = await connection.api(f"CONSUMER.INFO.{self._stream}.{self._group}")
        return {
            "server": f"nats-server {connection._server_info['version']}",
            self._stream: info["num_pending"],
            f"{self._stream} in hand, given back or delayed": info["num_ack_pending"],
            f"{self._stream} pulls waiting": info["num_waiting"],  # of consumers that have room
            self._dead: await self.count_dead_letters(),
        }

    # -- consuming

    async def start(self) -> None:
        self._taking = True
        self._wake.set()

    async def stop(self) -> None:
        self._taking = False
        connection, subscription = self._connection, self._subscription
        self._subscription = None
        if subscription is not None and connection is not None and connection.lost is None:
            ended = await _within(STOP_SECONDS, self._unsubscribe(connection, subscription))
            if not ended:
                connection.lose(TimeoutError("no answer to the end of the subscription"))
        returned = [*self.buffer.take_all(), *self._redelivered]
        self._redelivered.clear()
        for message in returned:
            await self.requeue(message)
        self.buffer.close()

    async def _unsubscribe(self, connection: _Connection, subscription: Subscription) -> None:
        # UNSUB, then PING and PONG: after that nothing more can arrive.
        await subscription.drain()  # type: ignore[no-untyped-call, unused-ignore]  # nats-py's is untyped
        # To answer this, the server drops our last pull. One that finds it still there, when a message is given
        # back, may lose sight of the message until the ack wait is over (2.9.10 does).
        await connection.api(f"CONSUMER.INFO.{self._stream}.{self._group}")

    async def __anext__(self) -> Message:
        while True:
            message = await self.buffer.get()
            if _is_held(message):
                if not self.buffer.takeable and self._has_room():
                    self._wake.set()
                return message
            self._let_go(message)  # after a long outage: others may have it
            self.buffer.done(message)

    async def _fill(self) -> None:
        """Keep a connection; pull messages, and hold them; until left."""
        try:
            await self.connectivity.keep(self._use_connection, until=self._leaving)
        except Exception as failure:
            self.connectivity.up = False
            self.buffer.fail(failure)

    async def _use_connection(self) -> None:
        try:
            if self._connection is None:
                self._connection = await self._connect()
            await self._tell_again(self._connection)
            self.connectivity.established()
            await self._serve(self._connection)
        except (_NotAuthorized, _Refused) as refusal:
            # It was good before; and of what was deleted, the next connection makes what it can.
            raise self._lost(BrokerUnavailable(str(refusal))) from refusal
        except BrokerError as error:
            raise self._lost(error) from error.__cause__
        finally:
            if self._connection is not None and self._connection.lost is not None:
                lost, self._connection, self._subscription = self._connection, None, None
                self._asked = 0
                await lost.close_within(0.1)

    def _lost(self, reason: BrokerError) -> BrokerError:
        if self._connection is not None:
            self._connection.lose(reason)
        return reason

    async def _serve(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        next_tick = loop.time()
        while not self._leaving.is_set():
            self._wake.clear()
            async with connection.asking():
                await self._pull(connection)
            if self._redelivered:
                await self._look_up_attempts(connection)
            if loop.time() >= next_tick:
                await self._tick(connection)
                next_tick = loop.time() + min(TICK_SECONDS, self._ack_wait / 4)
            timer = loop.call_at(next_tick, self._wake.set)
            await self._wake.wait()
            timer.cancel()

    async def _pull(self, connection: _Connection) -> None:
        if self._taking and self._subscription is None:
            self._inbox = connection.new_inbox()
            self._subscription = await connection.subscribe(
                f"{self._inbox}.*",
                cb=self._on_message,
                pending_msgs_limit=-1,
                pending_bytes_limit=-1,
            )
        if self._has_room():
            if not self._asked:
                self._heard_at = asyncio.get_running_loop().time()
            room = self.prefetch - len(self._unacked) - self._asked
            self._asked += room
            await connection.publish(
                f"{self._url.api}.CONSUMER.MSG.NEXT.{self._stream}.{self._group}",
                b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}'
                % (room, PULL_SECONDS * 1e9, HEARTBEAT_SECONDS * 1e9),
                f"{self._inbox}.{room}",
            )

    def _has_room(self) -> bool:
        """Whether it is time for a pull: when half of the prefetch is free, or nothing is left to take."""
        room = self.prefetch - len(self._unacked) - self._asked
        none_left = self._asked == 0 and not self.buffer.takeable
        return self._taking and room > 0 and (none_left or room >= self.prefetch // 2)

    async def _on_message(self, msg: Msg) -> None:
        try:
            if not msg.reply:
                self._on_status(msg.headers or {}, msg.subject)
            elif not self._receive(msg):
                await msg.ack()
        except Exception as failure:
            self.buffer.fail(failure)

    def _on_status(self, headers: Mapping[str, str], inbox: str) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        status, description = headers.get("Status"), headers.get("Description", "")
        if status == "100":
            return  # a heartbeat
        ended = int(headers.get("Nats-Pending-Messages", inbox.rpartition(".")[2]))
        self._asked = max(0, self._asked - ended)
        if status in ("404", "408"):
            self._wake.set()
        elif "Exceeded" in description:  # a limit of the consumer or of the server
            log.warning(
                "pull_refused", reason=description
            )  # and it is tried again with the next tick
        elif self._connection is not None:
            # The consumer was deleted, or lost its leader: begin anew with what is there.
            self._connection.lose(Error(f"{status} {description}".strip()))

    def _receive(self, msg: Msg) -> bool:
        """Take a delivery; False if it is nothing for us, and is to be acknowledged."""
        self._asked = max(0, self._asked - 1)
        self._heard_at = now = asyncio.get_running_loop().time()
        # $JS.ACK.(domain.account.)stream.consumer.deliveries.sequence.consumer's.timestamp.pending(.random)
        tokens = msg.reply.split(".")
        at = 4 if len(tokens) == 9 else 6
        key = f"{tokens[at + 1]}-{tokens[at + 3]}"
        headers = msg.headers or {}
        if key in self._told or key in self._told_before:
            return False  # it was done here a moment ago, and the server crashed
        if headers.get(GROUP, self._group) != self._group:
            return False
        if (message := self._unacked.get(key)) is not None:
            # An outage was longer than the ack wait, and it came back to us.
            message.receipt.reply, message.receipt.held_until = (
                msg.reply,
                now + HELD * self._ack_wait,
            )
            return True
        delivery = _Delivery(
            key, msg.subject, headers, int(tokens[at]), msg.reply, now + HELD * self._ack_wait
        )
        message = self._unacked[key] = _message(msg.data, delivery)
        if delivery.deliveries > 1 or not self._taking:
            self._redelivered.append(message)
            self._wake.set()
        else:
            self.buffer.put(message)
        return True

    async def _look_up_attempts(self, connection: _Connection) -> None:
        messages, self._redelivered = self._redelivered, []
        try:
            failures: list[int] = await _all(
                self._failures(connection, message) for message in messages
            )
        except BaseException:
            self._redelivered[:0] = messages
            raise
        for message, count in zip(messages, failures, strict=True):
            message.attempt = count + 1
            deliveries = message.receipt.deliveries
            if not self._taking:
                await self.requeue(message)
            elif deliveries - count > DELIVERY_LIMIT:
                reason = f"delivered {deliveries} times, and never settled"
                log.error("message_rejected", id=message.id, reason=reason)
                await self.reject(message, reason)
            else:
                self.buffer.put(message)

    async def _failures(self, connection: _Connection, message: Message) -> int:
        subject = self._record_of(message.receipt.key)
        get = f"STREAM.MSG.GET.{self._attempts}"
        answer = await connection.api_unless(NO_MESSAGE, get, last_by_subj=subject)
        if answer is None:
            return 0
        return int(json.loads(base64.b64decode(answer["message"]["data"]))["attempts"])

    def _record_of(self, key: str) -> str:
        """The subject of the record of a message's failures."""
        return f"{self._attempts}.{self._group}.{key}"

    async def _forget(self, connection: _Connection) -> None:
        """Delete the records of messages that are done."""
        keys, self._forgettable = self._forgettable, []
        purge = f"STREAM.PURGE.{self._attempts}"
        await _all(connection.api(purge, filter=self._record_of(key)) for key in keys)

    async def _tick(self, connection: _Connection) -> None:
        """Show the broker that we live, and see that it does."""
        now = asyncio.get_running_loop().time()
        renewed = [
            message.receipt
            for message in self._unacked.values()
            if now < message.receipt.held_until < now + HELD * self._ack_wait * 2 / 3
        ]
        for delivery in renewed:
            await connection.publish(delivery.reply, IN_PROGRESS)
        told, self._told = self._told, {}
        self._told_before |= told
        await connection.ping()
        self._told_before = told
        for delivery in renewed:
            delivery.held_until = now + HELD * self._ack_wait
        await self._forget(connection)
        silence = asyncio.get_running_loop().time() - self._heard_at
        if self._asked and silence > SILENCE_SECONDS:
            msg = f"{self._url.for_people}: no word about a pull for {silence:.0f} seconds"
            raise BrokerUnavailable(msg)

    # -- settling

    async def ack(self, message: Message) -> None:
        # Also when it is not held any more: it is done.
        if self._unacked.get(message.receipt.key) is message:
            self._let_go(message)
            await self._tell(message, ACK)
        else:
            log_settlement_lost(message, "it was settled before")

    async def requeue(self, message: Message) -> None:
        if self._in_flight(message):
            self.requeued_count += 1
            self._let_go(message)
            await self._tell(message, NAK)

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        record = {
            "attempts": message.attempt,
            "due_at": time.time() + delay_seconds,
            "id": message.id,
            "reason": reason,
        }
        subject = self._record_of(message.receipt.key)
        later = b'-NAK {"delay": %d}' % max(1, delay_seconds * 1e9)
        await self._settle(message, _Outgoing(subject, json.dumps(record).encode(), {}), later)

    async def reject(self, message: Message, reason: str) -> None:
        delivery: _Delivery = message.receipt
        headers = {n: v for n, v in delivery.headers.items() if not n.lower().startswith("nats-")}
        headers |= {
            ID: f"{self._stream}-{delivery.key}",  # a second one, after a crash, is not stored
            FIRST_ID: _plain(message.id),
            TYPE: _plain(message.type),
            REASON: reason,
            ATTEMPTS: str(message.attempt),
            DEAD_LETTERED_AT: f"{time.time():.3f}",
            SUBJECT: delivery.subject,
        }
        await self._settle(message, _Outgoing(self._dead_subject, message.body, headers), TERM)

    async def _settle(self, message: Message, stored: _Outgoing, told: bytes) -> None:
        """Store something, and when that is confirmed tell the message's fate."""
        if not self._in_flight(message):
            return
        try:
            await self._reachable().store(stored)
        except BrokerError as error:
            log_settlement_lost(message, str(error))
            await asyncio.sleep(1)  # it is delivered again at once: not at full speed
            await self.requeue(message)
        else:
            self._let_go(message)
            await self._tell(message, told)

    def _in_flight(self, message: Message) -> bool:
        if self._unacked.get(message.receipt.key) is not message:
            log_settlement_lost(message, "it was settled before")
            return False
        if not _is_held(message):
            self._let_go(message)
            log_settlement_lost(message, "the ack wait had passed")
            return False
        return True

    def _let_go(self, message: Message) -> None:
        self._unacked.pop(message.receipt.key, None)
        if self._has_room():
            self._wake.set()

    async def _tell(self, message: Message, payload: bytes) -> None:
        """Settle at the broker, now or when it is there again."""
        delivery: _Delivery = message.receipt
        if payload is ACK or payload is TERM:
            if len(self._told) >= MOST_TOLD:
                self._told_before, self._told = self._told, {}
            self._told[delivery.key] = delivery.reply
            if message.attempt > 1:
                self._forgettable.append(delivery.key)
        if self._connection is not None and self.connected:
            await self._connection.publish(delivery.reply, payload)
        else:
            self._untold.append((message, payload))

    async def _tell_again(self, connection: _Connection) -> None:
        """What was settled in the outage, and what may have been lost with the connection or the server."""
        for reply in (*self._told_before.values(), *self._told.values()):
            await connection.publish(reply, ACK)
        while self._untold:
            message, payload = self._untold.pop(0)
            if payload is not ACK and _is_held(message):
                await connection.publish(message.receipt.reply, payload)

    # -- publishing

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        connection, subject = self._reachable(), self._subject
        if subject is None:
            msg = f"the stream {self._stream!r} has no one subject: name it by ?subject= in the URL"
            raise BrokerRefused(msg)
        for start in range(0, len(messages), PUBLISH_AT_ONCE):
            batch = messages[start : start + PUBLISH_AT_ONCE]
            outgoing = [_Outgoing(subject, message.body, _headers_of(message)) for message in batch]
            await _all(connection.store(message) for message in outgoing)

    # -- dead letters

    async def count_dead_letters(self) -> int:
        return int((await self._dead_state()).get("subjects", {}).get(self._dead_subject, 0))

    async def _dead_state(self) -> dict[str, Any]:
        look = f"STREAM.INFO.{self._dead}"
        info = await self._reachable().api(look, subjects_filter=self._dead_subject)
        state: dict[str, Any] = info["state"]
        return state

    async def _stored_dead(self, last: float = math.inf) -> AsyncIterator["_Stored"]:
        """The dead letters in the stream, up to this sequence."""
        sequence, get = 1, f"STREAM.MSG.GET.{self._dead}"
        while sequence <= last:
            request = {"seq": sequence, "next_by_subj": self._dead_subject}
            answer = await self._reachable().api_unless(NO_MESSAGE, get, **request)
            if answer is None or answer["message"]["seq"] > last:
                return
            stored = _Stored(answer["message"])
            yield stored
            sequence = stored.sequence + 1

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        async for stored in self._stored_dead():
            if limit <= 0:
                return
            limit -= 1
            yield stored.dead_letter()

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        moved, batch = 0, []
        async for stored in self._stored_dead((await self._dead_state())["last_seq"]):
            batch.append(stored)
            if len(batch) == PUBLISH_AT_ONCE:
                moved += await self._replay(batch)
                yield moved
                batch = []
        if batch:
            yield moved + await self._replay(batch)

    async def _replay(self, batch: "list[_Stored]") -> int:
        connection = self._reachable()
        await _all(connection.store(stored.replayed(self._group)) for stored in batch)
        return await self._purge_dead(seq=batch[-1].sequence + 1)  # all before it were in a batch

    async def purge_dead_letters(self) -> AsyncIterator[int]:
        yield await self._purge_dead()

    async def _purge_dead(self, **limit: int) -> int:
        purge = f"STREAM.PURGE.{self._dead}"
        answer = await self._reachable().api(purge, filter=self._dead_subject, **limit)
        return int(answer["purged"])


class _Stored:
    """A message in the stream of dead letters."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.sequence: int = answer["seq"]
        self.body = base64.b64decode(answer.get("data", ""))
        _, _, lines = base64.b64decode(answer.get("hdrs", "")).partition(b"\r\n")
        self.headers = Client._parse_header_lines(lines)
        self._subject = self.headers.get(SUBJECT, answer["subject"])
        self._stored_at: str = answer["time"]

    def dead_letter(self) -> DeadLetter:
        message = _message(self.body, _Delivery("", self._subject, self.headers))
        return DeadLetter(
            body=self.body,
            id=message.id,
            type=message.type,
            reason=self.headers.get(REASON, ""),
            attempts=int(self.headers.get(ATTEMPTS, 0)),
            dead_lettered_at=float(self.headers.get(DEAD_LETTERED_AT, 0)),
        )

    def replayed(self, group: str) -> _Outgoing:
        """As a new message, which is stored once, also if a crash makes us replay it again."""
        history = (REASON, ATTEMPTS, DEAD_LETTERED_AT, SUBJECT)
        headers = {name: value for name, value in self.headers.items() if name not in history}
        headers |= {ID: f"replay-{self.sequence}-{self._stored_at}", GROUP: group}
        return _Outgoing(self._subject, self.body, headers)


class _Url:
    """What CONSUMER_BROKER_URL says."""

    def __init__(self, text: str) -> None:
        """Raises BrokerRefused, without the URL: it may hold a password."""
        try:
            parts = urlsplit(text)
            credentials, at, hosts = parts.netloc.rpartition("@")
            each = [urlsplit(f"//{host}") for host in hosts.split(",")]
            good = all(host.hostname and host.port != 0 for host in each)
            rest = f"{parts.path.strip('/')}{parts.fragment}{'' if at else parts.query}"
        except ValueError:
            good, rest = False, ""
        if not good or parts.fragment or parts.path.strip("/") or "@" in rest:
            msg = (
                "CONSUMER_BROKER_URL: not like nats://user:password@host:4222,host:4222?option=value; in a user name, "
                "a password or an option, characters like @ : / ? # % are percent-encoded"
            )
            raise BrokerRefused(msg)
        user, colon, password = credentials.partition(":")
        self.hosts = hosts.split(",")
        self.for_people = f"{parts.scheme}://{hosts}"
        self._user, self._password = unquote(user), unquote(password) if colon else None
        self._options = dict(parse_qsl(parts.query, keep_blank_values=True))
        for option in self._options.keys() - OPTIONS:
            msg = f"CONSUMER_BROKER_URL: NATS has no option {option!r}, but {', '.join(sorted(OPTIONS))}"
            raise BrokerRefused(msg)
        self.insists_on_tls = parts.scheme == "tls" or bool(self._options.keys() & TLS_FILES)
        self.subject = self._options.get("subject")
        self.api = f"$JS.{domain}.API" if (domain := self._options.get("domain")) else "$JS.API"
        self.ack_wait_seconds = self._number("ack_wait_seconds")
        self.replicas = round(self._number("replicas") or 1)

    def _number(self, option: str) -> float | None:
        if (text := self._options.get(option)) is None:
            return None
        with suppress(ValueError):
            if 0 < (number := float(text)) < math.inf:
                return number
        msg = f"CONSUMER_BROKER_URL: {option} must be a number above 0"
        raise BrokerRefused(msg)

    def connect_options(self) -> dict[str, Any]:
        """Of nats-py. Files are read for each connection, as others may renew them."""
        options: dict[str, Any] = {"inbox_prefix": self._options.get("inbox", "_INBOX")}
        if self._password is not None:
            options |= {"user": self._user, "password": self._password}
        elif self._user:
            options["token"] = self._user
        which = "cafile, certfile or keyfile"
        try:
            if self.insists_on_tls:
                options["tls"] = ssl.create_default_context(cafile=self._options.get("cafile"))
                if certificate := self._options.get("certfile"):
                    options["tls"].load_cert_chain(certificate, self._options.get("keyfile"))
            if path := self._options.get(which := "creds"):
                options["user_credentials"] = RawCredentials(_checked_creds(Path(path).read_text()))
            if path := self._options.get(which := "nkey"):
                options["nkeys_seed_str"] = _checked_seed(Path(path).read_text())
        except (OSError, ValueError) as error:
            msg = f"CONSUMER_BROKER_URL: {which}: {error}"
            raise BrokerRefused(msg) from error
        return options


def _checked_creds(text: str) -> str:
    """Raises ValueError; nats-py would look for ever for what is missing."""
    seed = re.search(r"BEGIN USER NKEY SEED-+\s+(\S+)", text)
    if seed is None or not re.search(r"BEGIN NATS USER JWT-+\r?\n\S", text):
        msg = "the file does not hold a JWT and a seed"
        raise ValueError(msg)
    _checked_seed(seed[1])
    return text


def _checked_seed(text: str) -> str:
    import nkeys  # type: ignore[import-untyped, unused-ignore]  # slow, and seldom needed

    try:
        nkeys.from_seed(bytearray(text.strip().encode())).wipe()
    except Exception:
        msg = "the file does not hold the seed of an nkey"
        raise ValueError(msg) from None  # not with its words: they may hold a part of the seed
    return text


def _checked_name(name: str, variable: str) -> str:
    if not name or NOT_IN_A_NAME.search(name):
        msg = f"{variable}: {name!r} is no name in NATS, where it may not hold spaces or . * > / \\"
        raise BrokerRefused(msg)
    return name


def _check_consumer(name: str, config: dict[str, Any]) -> None:
    faults = {
        "it pushes": config.get("deliver_subject"),
        "its acks are not explicit": config.get("ack_policy") != "explicit",
        "it has max_deliver, after which messages are lost": config.get("max_deliver", -1) > 0,
        "it delivers headers only": config.get("headers_only"),
    }
    for fault in filter(faults.get, faults):
        msg = f"{name} cannot be used: {fault}"
        raise BrokerRefused(msg)


def _subject_of(stream: str, subjects: list[str]) -> str | None:
    """The one to publish to, if there is no choice."""
    concrete = [subject for subject in subjects if not re.search("[*>]", subject)]
    if stream in concrete:
        return stream
    return concrete[0] if len(concrete) == 1 else None


def _headers_of(message: OutgoingMessage) -> dict[str, str]:
    """NATS has only text in headers, of one line, and names in ASCII. Raises BrokerRefused."""
    headers: dict[str, str] = {TYPE: _plain(message.type)}
    extras: dict[str, Any] = {}
    if message.id:
        headers[ID] = _plain(message.id) or json.dumps(message.id)
    for name, text in (("id", message.id), ("type", message.type)):
        if text != _plain(text):
            extras[name] = text
    for name, value in message.headers.items():
        if _is_plain(value) and HEADER_NAME.fullmatch(name):
            headers[name] = value
        else:
            extras.setdefault("headers", {})[name] = value
    if extras:
        try:
            headers[EXTRAS] = json.dumps(extras)
        except (TypeError, ValueError) as error:
            msg = f"this message cannot be sent: {error}"
            raise BrokerRefused(msg) from error
    return headers


def _is_plain(value: object) -> bool:
    """Whether a NATS header holds it as it is."""
    return isinstance(value, str) and value.isprintable() and value == value.strip() != ""


def _plain(text: str) -> str:
    """The text, or nothing where EXTRAS must hold it."""
    return text if _is_plain(text) else ""


def _message(body: bytes, delivery: _Delivery) -> Message:
    headers: dict[str, Any] = dict(delivery.headers)
    broker_id = headers.pop(ID, "")
    id = headers.pop(FIRST_ID, "") or broker_id or delivery.key
    type = headers.pop(TYPE, None)
    if type is None:  # from another producer, who may say it in the subject: orders.order_created
        type = delivery.subject.rpartition(".")[2] if "." in delivery.subject else ""
    headers.pop(GROUP, None)
    if (extras := headers.pop(EXTRAS, None)) is not None:
        with suppress(ValueError, TypeError, AttributeError, RecursionError):  # not from us
            extras = json.loads(extras)
            headers |= extras.get("headers", {})
            id, type = str(extras.get("id", id)), str(extras.get("type", type))
    return Message(body, id, type, headers, 1, delivery)


def _is_held(message: Message) -> bool:
    """Whether the broker has surely given it to nobody else."""
    held_until: float = message.receipt.held_until
    return held_until > asyncio.get_running_loop().time()


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all of them, or the first error when all have ended."""
    results = []
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


async def _within(seconds: float, work: Coroutine[Any, Any, None]) -> bool:
    """Let it work for so long; returns whether it came to its end, a good one or not. Leaves no task behind."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        return task.done()
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=0.5)
        if task.done() and not task.cancelled():
            task.exception()  # of no interest any more


async def _ignore(_error: Exception) -> None:
    """What matters of nats-py's errors arrives by other ways."""
