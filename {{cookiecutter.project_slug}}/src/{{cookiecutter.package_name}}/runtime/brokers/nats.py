# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""NATS JetStream 2.9 or later, by nats-py: a stream, and a durable pull consumer named by the group.

``nats://user:password@one:4222,two:4222`` or ``nats://token@host``; ``tls://`` insists on TLS. Options:
``?ack_wait_seconds=30`` (after how long the messages of a dead consumer go to others), ``replicas=3`` (of what is
created), ``subject=`` (to publish to), ``domain=``, ``inbox=`` (prefix of reply subjects), ``creds=`` and ``nkey=``
(files), ``cafile=``, ``certfile=`` and ``keyfile=``.

A stream that is not there is created as a work queue, which serves one group. One that is there is taken as it is:
with limits or interest retention it serves many groups, each at its own pace. Everything else is a group's own: for
stream ``orders`` and group ``billing`` (``orders`` alone if they are the same), dead letters are in the stream
``orders_billing_dead``, and ``orders_billing_attempts`` has one record for each message that a handler failed on.

A retry leaves the message where it is. First the failure is recorded, then the broker is told to deliver it
again after the delay: a crash in between makes it come earlier or later, never with a wrong attempt. A delivery is
ours until ``ack_wait`` has passed without a sign of life, whatever happens to the connection; signs are sent for all
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import structlog
from nats.aio.client import Client, RawCredentials
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error, NoRespondersError, SecureConnWantedError

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .source import BrokerError, BrokerRefused, BrokerUnavailable, Capabilities, Link, Source

CONNECT_SECONDS = 5.0
"""For each of the hosts."""
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer; then the connection counts as lost."""
STOP_SECONDS = 1.5
CLOSE_SECONDS = 1.0
ACK_WAIT_SECONDS = 30.0
TICK_SECONDS = 1.0
"""How often the broker is asked for a sign of life, and given ours where it is due."""
PULL_SECONDS = 30.0
HEARTBEAT_SECONDS = 5.0
"""How often the broker says that a pull is still waiting; after two that did not come it is lost."""
MOST_TOLD = 10_000
PUBLISH_AT_ONCE = 100

DELIVERY_LIMIT = 1000
"""When a message was delivered so many times more than handlers failed on it, it kills its consumers."""
FORGET_SECONDS = 30 * 86_400.0
"""A failure is remembered for so long."""

ID = "Nats-Msg-Id"
"""Header: the broker stores a message with the same one within two minutes only once."""
TYPE = "x-consumer-type"
EXTRAS = "x-consumer-json"
"""Header: what others cannot hold, as a JSON object; ``id`` and ``type`` if they are odd, and ``headers``."""
FIRST_ID = "x-consumer-id"
"""Header: the id, where the broker's own header must have another one."""
GROUP = "x-consumer-group"
"""Header: the only group that is meant, by a dead letter that was replayed."""
REASON = "x-consumer-reason"
ATTEMPTS = "x-consumer-attempts"
DIED_AT = "x-consumer-died-at"
"""Header: when it became a dead letter, in Unix seconds."""
SUBJECT = "x-consumer-subject"
"""Header: where a dead letter was published first."""
OURS = re.compile("nats-|x-consumer-", re.IGNORECASE)
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

ACK, TERM, NAK, IN_PROGRESS = b"+ACK", b"+TERM", b"-NAK", b"+WPI"

# Error codes of JetStream's API.
NO_CONSUMER, NO_MESSAGE, NAME_IN_USE, NO_STREAM = 10014, 10037, 10058, 10059
NOT_IN_A_NAME = re.compile(r"[\s.*>/\\]")
NOT_AUTHORIZED = re.compile("(authorization|authentication) (violation|expired|revoked)", re.I)
TLS_FILES = {"cafile", "certfile", "keyfile"}
OPTIONS = {"ack_wait_seconds", "replicas", "subject", "domain", "inbox", "creds", "nkey", *TLS_FILES}

_Outgoing = tuple[str, bytes, dict[str, str]]  # subject, body, headers

log = structlog.get_logger()

if logging.getLogger("nats").level == logging.NOTSET:
    # It logs tracebacks of what is logged here, once, in a sentence.
    logging.getLogger("nats").setLevel(logging.CRITICAL)


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> Source:
    return NatsSource(settings, prefetch)


class _Refused(BrokerRefused):
    """JetStream's answer was an error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Connection(Client):
    """One connection to one server, which is not mended but replaced: nats-py gives up for good when its
    credentials are refused during a reconnect, and would bring back subscriptions with pulls of unknown state."""

    def __init__(self, on_lost: Callable[[], None], insist_on_tls: bool) -> None:
        super().__init__()
        self.lost: Exception | None = None
        self.denied = ""
        """The last thing that this user may not do, in the server's words."""
        self._on_lost = on_lost
        self._insist_on_tls = insist_on_tls

    async def open(self, **options: Any) -> None:
        await self.connect(
            allow_reconnect=False,
            pending_size=0,  # never wait for the socket in the middle of a publish
            skip_subject_validation=True,  # they are all ours
            error_cb=self._on_error,
            **options,
        )

    async def close_within(self, seconds: float) -> None:
        """Politely, else by force. Leaves no task behind."""
        tasks = [self._reading_task, self._flusher_task, self._ping_interval_task]
        tasks += [subscription._wait_for_msgs_task for subscription in self._subs.values()]
        closing = asyncio.create_task(self.close(), name="nats-close")
        try:
            await asyncio.wait({closing}, timeout=seconds)
        finally:
            self.cut()
        await asyncio.wait({closing, *filter(None, tasks)}, timeout=0.5)
        if closing.done() and not closing.cancelled():
            closing.exception()  # of no interest any more

    def lose(self, reason: Exception) -> None:
        if self.lost is None:
            self.lost = reason
            self.cut()
            for future in [*self._resp_map.values(), *self._pongs]:
                if not future.done():
                    future.set_exception(Error("the connection was lost"))
                    future.exception()  # some of them nobody awaits
            self._on_lost()

    def cut(self) -> None:
        self._pending.clear()
        self._pending_data_size = 0
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _on_error(self, error: Exception) -> None:
        if "permissions violation" in str(error):
            self.denied = str(error).removeprefix("nats: ")

    # What follows replaces parts of nats-py. Its own way from an error to the end runs in the tasks that it
    # ends, and writes to the broken connection.

    async def _select_next_server(self) -> None:
        server = self._server_pool[0]
        await self._connect_to_server(server)
        self._current_server = server

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self._insist_on_tls and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise SecureConnWantedError  # it would go on, and send the password
            info["tls_required"] = True

    async def _process_op_err(self, e: Exception) -> None:
        self.lose(e)

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg:
            await super()._process_err(err_msg)
        else:
            self.lose(Error(err_msg.strip("'")))


@dataclass(slots=True)
class _Delivery:
    """The receipt of a message."""

    key: str
    """Sequence and time in the stream: no other message has the same, also after the stream was made anew."""
    subject: str
    reply: str
    held_until: float
    """Event loop time; from then on the broker may have given the message to another consumer."""
    deliveries: int
    headers: Mapping[str, str]


class NatsSource(Source):
    """See the module. In the sentences of its errors and logs the URL has no credentials."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=True, attempts=True, give_back=True, dead_letters=True, order=True
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL or a name makes no sense."""
        super().__init__(settings, prefetch)
        self._stream = _checked_name(settings.source, "CONSUMER_SOURCE")
        self._group = _checked_name(settings.group or settings.source, "CONSUMER_GROUP")
        own = self._stream if self._group == self._stream else f"{self._stream}_{self._group}"
        self._dead = f"{own}_dead"
        self._attempts = f"{own}_attempts"
        self._url = _Url(settings.broker_url.get_secret_value())
        self._link = Link(self._url.for_people)
        self._connection: _Connection | None = None
        self._subject: str | None = None  # to publish to
        self._ack_wait = ACK_WAIT_SECONDS
        self._filler: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._leaving = asyncio.Event()
        self._taking = False
        self._subscription: Subscription | None = None
        self._asked = 0  # for so many messages, which have not come yet
        self._heard_at = 0.0  # event loop time
        self._unsettled: dict[str, Message] = {}  # by the key of the delivery
        self._redelivered: list[Message] = []  # not in the buffer yet, as their attempts are not known
        self._untold: list[tuple[Message, bytes]] = []  # settled while there was no connection
        # Acks of the last two ticks, key to reply subject: a server that crashes may not have them on its disk.
        self._told: dict[str, str] = {}
        self._told_before: dict[str, str] = {}
        self._forgettable: list[str] = []  # keys of messages that failed, and are done now

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._leaving.clear()
        self._connection = await self._connect()
        self._link.came_up()
        self._filler = asyncio.create_task(self._fill(), name=f"filler of {self._stream}")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._taking = False
        self._leaving.set()
        self._wake.set()
        if self._filler is not None:
            await asyncio.wait({self._filler}, timeout=0.5)
            if not self._filler.done():  # it waits for a connection, or for an answer
                self._filler.cancel()
                await asyncio.wait({self._filler}, timeout=0.5)
            self._filler = None
        if self._connection is not None:
            await self._say_goodbye(self._connection)
            await self._connection.close_within(CLOSE_SECONDS)
            self._connection = None
        self._link.up = False
        for message, _ in self._untold:
            _log_lost(message, "the connection was lost")
        self._untold.clear()
        self._unsettled.clear()
        self._redelivered.clear()

    async def _say_goodbye(self, connection: _Connection) -> None:
        """Return what is in hand, and see that all settlements have arrived."""
        saying = asyncio.create_task(self._say_all(connection), name="nats-goodbye")
        await asyncio.wait({saying}, timeout=CLOSE_SECONDS)
        if not saying.done():
            connection.lose(TimeoutError("no answer"))
        await asyncio.wait({saying}, timeout=0.5)

    async def _say_all(self, connection: _Connection) -> None:
        with suppress(BrokerError):
            for message in self._unsettled.values():
                await connection.publish(message.receipt.reply, NAK)
            await self._ping(connection)
            await self._forget(connection)

    @property
    def connected(self) -> bool:
        return self._link.up and self._connection is not None and self._connection.lost is None

    def _reachable(self) -> _Connection:
        if self._connection is None or not self.connected:
            msg = f"{self._url.for_people}: the connection was lost"
            raise BrokerUnavailable(msg)
        return self._connection

    async def _connect(self) -> _Connection:
        """To the first of the hosts that answers; the topology is declared there."""
        failure: BrokerUnavailable | None = None
        for host in random.sample(self._url.hosts, len(self._url.hosts)):
            connection = _Connection(self._wake.set, self._url.insists_on_tls)
            try:
                async with self._asking(connection, CONNECT_SECONDS):
                    await connection.open(
                        servers=[f"nats://{host}"],
                        name=self._stream,
                        connect_timeout=CONNECT_SECONDS,
                        **self._url.options(),
                    )
                await self._declare(connection)
            except BaseException as error:
                await connection.close_within(0.1)
                if not isinstance(error, BrokerUnavailable):
                    raise
                failure = error
            else:
                return connection
        assert failure is not None  # a URL without hosts was refused
        raise failure

    @asynccontextmanager
    async def _asking(
        self, connection: _Connection, seconds: float = ANSWER_SECONDS
    ) -> AsyncIterator[None]:
        """Bounds a request to the broker, and makes whatever goes wrong a BrokerError."""
        try:
            async with asyncio.timeout(seconds):
                if connection.lost is not None:
                    raise connection.lost
                yield
        except (OSError, Error) as error:
            raise self._explain(error, connection, seconds) from error

    def _explain(self, error: Exception, connection: _Connection, seconds: float) -> BrokerError:
        broker = self._url.for_people
        if isinstance(error, TimeoutError) and connection.lost is None:
            if connection.denied:
                return BrokerRefused(f"{broker}: {connection.denied}")
            return BrokerUnavailable(f"{broker} gave no answer within {seconds:g} seconds")
        if isinstance(error, NoRespondersError):
            why = "it is switched off, or has no leader, or the stream is gone"
            return BrokerUnavailable(f"{broker}: JetStream does not answer: {why}")
        if isinstance(error, SecureConnWantedError):
            return BrokerRefused(f"{broker} offers no TLS")
        if isinstance(error, ssl.SSLError):
            return BrokerRefused(f"{broker}: no TLS connection: {error}")
        text = str(connection.lost or error).removeprefix("nats: ").strip("'")
        if NOT_AUTHORIZED.search(text) and self._filler is None:  # later on it was good before
            return BrokerRefused(f"{broker} refused the user, the password, the token or the key")
        return BrokerUnavailable(f"{broker}: {text or type(error).__name__}")

    async def _request(
        self,
        connection: _Connection,
        subject: str,
        payload: bytes = b"",
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """JetStream's answer. Raises BrokerUnavailable or _Refused."""
        async with self._asking(connection):
            answer = await connection.request(subject, payload, ANSWER_SECONDS, headers=headers)
        answered: dict[str, Any] = json.loads(answer.data)
        if error := answered.get("error"):
            msg = f"{self._url.for_people}: {error.get('description', error)}"
            if error.get("code", 500) >= 500:
                raise BrokerUnavailable(msg)
            raise _Refused(msg, error.get("err_code", 0))
        return answered

    async def _api(self, connection: _Connection, call: str, **request: Any) -> dict[str, Any]:
        payload = json.dumps(request).encode() if request else b""
        return await self._request(connection, f"{self._url.api}.{call}", payload)

    async def _ping(self, connection: _Connection) -> None:
        """Returns when the broker has read everything that was sent before."""
        async with self._asking(connection):
            # Longer than it is let: a PONG for one that gave up ends nats-py's reading.
            await connection.flush(math.ceil(2 * ANSWER_SECONDS))

    # -- topology

    async def _declare(self, connection: _Connection) -> None:
        created = {"storage": "file", "num_replicas": self._url.replicas}
        config = await self._declare_stream(
            connection, self._stream, subjects=[self._stream], retention="workqueue", **created
        )
        self._subject = self._url.subject or _subject_of(self._stream, config.get("subjects", []))
        await self._declare_stream(connection, self._dead, subjects=[self._dead], **created)
        await self._declare_stream(
            connection,
            self._attempts,
            subjects=[f"{self._attempts}.*"],
            max_msgs_per_subject=1,
            max_age=round(FORGET_SECONDS * 1e9),
            **created,
        )
        await self._declare_consumer(connection)

    async def _declare_stream(
        self, connection: _Connection, name: str, **config: Any
    ) -> dict[str, Any]:
        """Create the stream unless it is there; returns how it is configured."""
        info = await self._unless(NO_STREAM, self._api(connection, f"STREAM.INFO.{name}"))
        if info is None:
            creating = self._api(connection, f"STREAM.CREATE.{name}", name=name, **config)
            info = await self._unless(NAME_IN_USE, creating)
        if info is None:  # another process was quicker
            info = await self._api(connection, f"STREAM.INFO.{name}")
        configured: dict[str, Any] = info["config"]
        return configured

    async def _declare_consumer(self, connection: _Connection) -> None:
        name = f"{self._stream}.{self._group}"
        wanted = self._url.ack_wait_seconds
        info = await self._unless(NO_CONSUMER, self._api(connection, f"CONSUMER.INFO.{name}"))
        there = info and info["config"]
        config: dict[str, Any] = there or {
            "durable_name": self._group,
            "ack_policy": "explicit",
            "ack_wait": round(ACK_WAIT_SECONDS * 1e9),
            "max_deliver": -1,  # beyond a limit the broker forgets a message without a word
            "max_ack_pending": -1,  # what waits for a retry is counted too; the pulls are our limit
        }
        _check_consumer(f"the consumer {self._group!r} of the stream {self._stream!r}", config)
        if wanted is not None:
            config = {**config, "ack_wait": round(wanted * 1e9)}
        if config != there:
            call = f"CONSUMER.DURABLE.CREATE.{name}"
            try:
                await self._api(connection, call, stream_name=self._stream, config=config)
            except _Refused as refusal:
                msg = f"the group {self._group!r} cannot consume the stream {self._stream!r}: {refusal}"
                raise BrokerRefused(msg) from refusal
        self._ack_wait = config["ack_wait"] / 1e9

    async def _unless(
        self, code: int, asking: Awaitable[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The answer, or None if that is this error."""
        try:
            return await asking
        except _Refused as refusal:
            if refusal.code != code:
                raise
            return None

    async def describe(self) -> dict[str, int | str]:
        connection = self._reachable()
        info = await self._api(connection, f"CONSUMER.INFO.{self._stream}.{self._group}")
        return {
            "server": f"nats-server {connection._server_info['version']}",
            self._stream: info["num_pending"],
            f"{self._stream} in hand, given back or delayed": info["num_ack_pending"],
            f"{self._stream} consumers": info["num_waiting"],  # of which each waits for messages
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
            # UNSUB, then PING and PONG: after that nothing more can arrive.
            draining = asyncio.create_task(_drain(subscription), name="nats-drain")
            await asyncio.wait({draining}, timeout=STOP_SECONDS)
            if not draining.done():
                connection.lose(TimeoutError("no answer to the end of the subscription"))
                await asyncio.wait({draining}, timeout=0.5)
            draining.cancelled() or draining.exception()  # nothing that matters any more
        returned = [*self.buffer.take_all(), *self._redelivered]
        self._redelivered.clear()
        for message in returned:
            await self.give_back(message)
        self.buffer.close()

    async def __anext__(self) -> Message:
        while True:
            message = await self.buffer.get()
            if _is_held(message):
                return message
            self._let_go(message)  # after a long outage: others may have it

    async def _fill(self) -> None:
        """Keep a connection; pull messages, and hold them; until left."""
        try:
            await self._link.keep(self._use_connection, until=self._leaving)
        except Exception as failure:
            self._link.up = False
            self.buffer.fail(failure)

    async def _use_connection(self) -> None:
        if self._connection is None:
            self._connection = await self._connect()
        connection = self._connection
        try:
            await self._tell_again(connection)
            self._link.came_up()
            await self._serve(connection)
        except BrokerError as error:
            connection.lose(error)
            raise
        finally:
            if connection.lost is not None:
                self._connection = self._subscription = None
                self._asked = 0
                await connection.close_within(0.1)

    async def _serve(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        next_tick = loop.time()
        while not self._leaving.is_set():
            self._wake.clear()
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
        async with self._asking(connection):
            if self._taking and self._subscription is None:
                self._inbox = connection.new_inbox()
                self._subscription = await connection.subscribe(
                    f"{self._inbox}.*",
                    cb=self._on_message,
                    pending_msgs_limit=-1,
                    pending_bytes_limit=-1,
                )
            if not self._has_room():
                return
            room = self.prefetch - len(self._unsettled) - self._asked
            if not self._asked:
                self._heard_at = asyncio.get_running_loop().time()
            self._asked += room
            await connection.publish(
                f"{self._url.api}.CONSUMER.MSG.NEXT.{self._stream}.{self._group}",
                b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}'
                % (room, PULL_SECONDS * 1e9, HEARTBEAT_SECONDS * 1e9),
                f"{self._inbox}.{room}",
            )

    def _has_room(self) -> bool:
        """Whether it is time for a pull: not for each message, and before the one under way is empty."""
        room = self.prefetch - len(self._unsettled) - self._asked
        return (
            self._taking and room > 0 and (self._asked == 0 or room >= self.prefetch // 2)
        )

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
        elif "Exceeded" not in description and self._connection is not None:
            # The consumer was deleted, or lost its leader: begin anew with what is there.
            self._connection.lose(Error(f"{status} {description}".strip()))

    def _receive(self, msg: Msg) -> bool:
        """Put a delivery in the buffer; returns whether that was right, else it is to be acknowledged."""
        self._asked = max(0, self._asked - 1)
        self._heard_at = now = asyncio.get_running_loop().time()
        # $JS.ACK.(domain.account.)stream.consumer.deliveries.sequence.consumer's.timestamp.pending(.random)
        tokens = msg.reply.split(".")
        at = 4 if len(tokens) == 9 else 6
        key = f"{tokens[at + 1]}-{tokens[at + 3]}"
        headers = msg.headers or {}
        if key in self._told or key in self._told_before or headers.get(GROUP, self._group) != self._group:
            return False
        held_until = now + self._ack_wait
        if (held := self._unsettled.get(key)) is not None:
            # An outage was longer than the ack wait, and then it came back to us.
            held.receipt.reply, held.receipt.held_until = msg.reply, held_until
            return True
        delivery = _Delivery(key, msg.subject, msg.reply, held_until, int(tokens[at]), headers)
        message = self._unsettled[key] = _message(msg.data, delivery)
        if delivery.deliveries > 1 or not self._taking:
            self._redelivered.append(message)
            self._wake.set()
        else:
            self.buffer.put(message)
        return True

    async def _look_up_attempts(self, connection: _Connection) -> None:
        messages, self._redelivered = self._redelivered, []
        try:
            failures = await asyncio.gather(*(self._failures(connection, m) for m in messages))
        except BaseException:
            self._redelivered[:0] = messages
            raise
        for message, count in zip(messages, failures, strict=True):
            message.attempt = count + 1
            deliveries = message.receipt.deliveries
            if not self._taking:
                await self.give_back(message)
            elif deliveries - count > DELIVERY_LIMIT:
                log.error("message_rejected", id=message.id, attempt=message.attempt)
                await self.reject(message, f"delivered {deliveries} times, and never settled")
            else:
                self.buffer.put(message)

    async def _failures(self, connection: _Connection, message: Message) -> int:
        subject = f"{self._attempts}.{message.receipt.key}"
        asking = self._api(connection, f"STREAM.MSG.GET.{self._attempts}", last_by_subj=subject)
        answer = await self._unless(NO_MESSAGE, asking)
        if answer is None:
            return 0
        return int(json.loads(base64.b64decode(answer["message"]["data"]))["attempts"])

    async def _tick(self, connection: _Connection) -> None:
        """Show that we live to the broker, and let it show the same."""
        now = asyncio.get_running_loop().time()
        renewed = [
            message.receipt
            for message in self._unsettled.values()
            if now < message.receipt.held_until < now + self._ack_wait * 2 / 3
        ]
        for delivery in renewed:
            await connection.publish(delivery.reply, IN_PROGRESS)
        told, self._told = self._told, {}
        self._told_before |= told
        await self._ping(connection)
        self._told_before = told
        for delivery in renewed:
            delivery.held_until = now + self._ack_wait
        await self._forget(connection)
        silence = asyncio.get_running_loop().time() - self._heard_at
        if self._asked and silence > 2 * HEARTBEAT_SECONDS + ANSWER_SECONDS:
            msg = f"{self._url.for_people}: no heartbeats of the pull for {silence:.0f} seconds"
            raise BrokerUnavailable(msg)

    # -- settling

    async def ack(self, message: Message) -> None:
        if self._is_unsettled(message, "ack"):
            self._let_go(message)
            await self._tell(message, ACK)

    async def give_back(self, message: Message) -> None:
        if self._is_unsettled(message, "give_back") and self._is_ours(message, "give_back"):
            self.returned_count += 1
            self._let_go(message)
            await self._tell(message, NAK)

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        record = {
            "attempts": message.attempt,
            "due_at": time.time() + delay_seconds,
            "id": message.id,
            "reason": reason,
        }
        payload = b"%s {\"delay\": %d}" % (NAK, max(1, delay_seconds * 1e9))
        key: str = message.receipt.key
        subject = f"{self._attempts}.{key}"
        storing: _Outgoing = (subject, json.dumps(record).encode(), {})
        await self._store_and_tell(message, "retry", storing, payload)

    async def reject(self, message: Message, reason: str) -> None:
        delivery: _Delivery = message.receipt
        headers = {n: v for n, v in delivery.headers.items() if not n.lower().startswith("nats-")}
        headers |= {
            ID: f"{self._stream}-{delivery.key}",  # twice after a crash, stored once
            FIRST_ID: message.id if _is_plain(message.id) else "",
            TYPE: message.type if _is_plain(message.type) else "",
            REASON: reason,
            ATTEMPTS: str(message.attempt),
            DIED_AT: f"{time.time():.3f}",
            SUBJECT: delivery.subject,
        }
        await self._store_and_tell(message, "reject", (self._dead, message.body, headers), TERM)

    async def _store_and_tell(
        self,
        message: Message,
        settlement: str,
        storing: _Outgoing,
        payload: bytes,
    ) -> None:
        """Tell the broker the message's fate once it has confirmed what is to be stored."""
        if not self._is_unsettled(message, settlement) or not self._is_ours(message, settlement):
            return
        try:
            await self._store(self._reachable(), *storing)
        except BrokerError as error:
            _log_lost(message, str(error))
            await asyncio.sleep(1)  # it is delivered again at once: not at full speed
            await self.give_back(message)
        else:
            self._let_go(message)
            await self._tell(message, payload)

    def _is_unsettled(self, message: Message, settlement: str) -> bool:
        if self._unsettled.get(message.receipt.key) is message:
            return True
        log.warning("settlement_lost", id=message.id, settlement=settlement)
        return False

    def _is_ours(self, message: Message, settlement: str) -> bool:
        if _is_held(message):
            return True
        self._let_go(message)
        log.warning("settlement_lost", id=message.id, settlement=settlement)
        return False

    def _let_go(self, message: Message) -> None:
        self._unsettled.pop(message.receipt.key, None)
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
        for reply in [*self._told_before.values(), *self._told.values()]:
            await connection.publish(reply, ACK)
        while self._untold:
            message, payload = self._untold.pop(0)
            if payload is not ACK and _is_held(message):
                await connection.publish(message.receipt.reply, payload)

    async def _forget(self, connection: _Connection) -> None:
        """Delete the records of messages that are done."""
        keys, self._forgettable = self._forgettable, []
        purge = f"STREAM.PURGE.{self._attempts}"
        await asyncio.gather(
            *(self._api(connection, purge, filter=f"{self._attempts}.{key}") for key in keys)
        )

    # -- publishing

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        connection = self._reachable()
        if self._subject is None:
            msg = f"the stream {self._stream!r} has no one subject to publish to: name it by ?subject= in the URL"
            raise BrokerRefused(msg)
        for start in range(0, len(messages), PUBLISH_AT_ONCE):
            batch = messages[start : start + PUBLISH_AT_ONCE]
            await self._store_all(
                connection, [(self._subject, m.body, _headers_of(m)) for m in batch]
            )

    async def _store_all(
        self, connection: _Connection, batch: Iterable[_Outgoing]
    ) -> None:
        storing = [self._store(connection, *message) for message in batch]
        for outcome in await asyncio.gather(*storing, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _store(
        self, connection: _Connection, subject: str, body: bytes, headers: dict[str, str]
    ) -> None:
        """Returns when the broker has stored it."""
        size = len(body) + sum(len(name) + len(value.encode()) + 4 for name, value in headers.items())
        if size + 12 > connection.max_payload:
            # The server would close the connection.
            msg = f"this message is larger than the server's max_payload of {connection.max_payload} bytes"
            raise BrokerRefused(msg)
        await self._request(connection, subject, body, headers or None)

    # -- dead letters

    async def count_dead_letters(self) -> int:
        return int((await self._dead_state())["messages"])

    async def _dead_state(self) -> dict[str, Any]:
        info = await self._api(self._reachable(), f"STREAM.INFO.{self._dead}")
        state: dict[str, Any] = info["state"]
        return state

    async def _stored_dead(self, last: float = math.inf) -> AsyncIterator["_Stored"]:
        """The dead letters in the stream up to this sequence."""
        sequence = 1
        while sequence <= last:
            asking = self._api(
                self._reachable(),
                f"STREAM.MSG.GET.{self._dead}",
                seq=sequence,
                next_by_subj=self._dead,
            )
            if (answer := await self._unless(NO_MESSAGE, asking)) is None:
                return
            stored = _Stored(answer["message"])
            if stored.sequence <= last:
                yield stored
            sequence = stored.sequence + 1

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        if limit > 0:
            async for stored in self._stored_dead():
                yield stored.dead_letter()
                limit -= 1
                if not limit:
                    return

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        moved = 0
        batch: list[_Stored] = []
        last = (await self._dead_state())["last_seq"]
        async for stored in self._stored_dead(last):
            batch.append(stored)
            if len(batch) == PUBLISH_AT_ONCE:
                moved += await self._replay(batch)
                yield moved
                batch = []
        if batch:
            yield moved + await self._replay(batch)

    async def _replay(self, batch: "list[_Stored]") -> int:
        connection = self._reachable()
        await self._store_all(connection, [stored.replayed(self._group) for stored in batch])
        # All before it are in this batch, or were in an earlier one.
        await self._api(connection, f"STREAM.PURGE.{self._dead}", seq=batch[-1].sequence + 1)
        return len(batch)

    async def purge_dead_letters(self) -> int:
        return int((await self._api(self._reachable(), f"STREAM.PURGE.{self._dead}"))["purged"])


class _Stored:
    """A message in the stream of dead letters."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.sequence: int = answer["seq"]
        self.body = base64.b64decode(answer.get("data", ""))
        _, _, lines = base64.b64decode(answer.get("hdrs", "")).partition(b"\r\n")
        self.headers = Client._parse_header_lines(lines)
        self._stored_at: str = answer["time"]
        self._subject = self.headers.get(SUBJECT, answer["subject"])

    def dead_letter(self) -> DeadLetter:
        message = _message(self.body, _Delivery("", self._subject, "", 0, 0, self.headers))
        return DeadLetter(
            body=self.body,
            id=message.id,
            type=message.type,
            reason=self.headers.get(REASON, ""),
            attempts=int(self.headers.get(ATTEMPTS, 0)),
            died_at=float(self.headers.get(DIED_AT, 0)),
        )

    def replayed(self, group: str) -> _Outgoing:
        """As a new message."""
        history = (REASON, ATTEMPTS, DIED_AT, SUBJECT)
        headers = {name: value for name, value in self.headers.items() if name not in history}
        # A replay that is repeated after a crash stores the message once.
        headers |= {ID: f"replay-{self.sequence}-{self._stored_at}", GROUP: group}
        return self._subject, self.body, headers


class _Url:
    """What CONSUMER_BROKER_URL says."""

    def __init__(self, text: str) -> None:
        """Raises BrokerRefused, without the URL: it may hold a password."""
        try:
            parts = urlsplit(text)
            credentials, at, hosts = parts.netloc.rpartition("@")
            rest = parts.path.strip("/") or parts.fragment or (not at and "@" in parts.query)
            ports = [urlsplit(f"nats://{host}").port for host in hosts.split(",")]
        except ValueError:
            rest, ports = "not a URL", []
        if rest or not ports or not all(host.strip() for host in hosts.split(",")):
            msg = (
                "CONSUMER_BROKER_URL: not like nats://user:password@host:4222,host:4222?option=value; in a user "
                "name, a password or an option, characters like @ : / ? # % are percent-encoded"
            )
            raise BrokerRefused(msg) from None
        user, colon, password = credentials.partition(":")
        self.hosts = hosts.split(",")
        self.for_people = f"{parts.scheme}://{hosts}"
        self._user, self._password = unquote(user), unquote(password) if colon else None
        self._options = dict(parse_qsl(parts.query, keep_blank_values=True))
        for option in self._options.keys() - OPTIONS:
            msg = f"CONSUMER_BROKER_URL: unknown option {option!r}; NATS has {', '.join(sorted(OPTIONS))}"
            raise BrokerRefused(msg)
        self.insists_on_tls = parts.scheme == "tls" or not self._options.keys().isdisjoint(TLS_FILES)
        self.subject = self._options.get("subject")
        domain = self._options.get("domain")
        self.api = f"$JS.{domain}.API" if domain else "$JS.API"
        self.ack_wait_seconds = self._number("ack_wait_seconds", None)
        self.replicas = int(self._number("replicas", 1) or 1)

    def _number(self, option: str, default: float | None) -> float | None:
        if option not in self._options:
            return default
        with suppress(ValueError):
            if 0 < (value := float(self._options[option])) < math.inf:
                return value
        msg = f"CONSUMER_BROKER_URL: {option} is not a number above 0"
        raise BrokerRefused(msg)

    def options(self) -> dict[str, Any]:
        """Of nats-py's connect(). Files are read for each connection, as others may renew them."""
        options: dict[str, Any] = {"inbox_prefix": self._options.get("inbox", "_INBOX")}
        if self._password is not None:
            options |= {"user": self._user, "password": self._password}
        elif self._user:
            options["token"] = self._user
        name = ""
        try:
            if self.insists_on_tls:
                name = "cafile, certfile or keyfile"
                context = ssl.create_default_context(cafile=self._options.get("cafile"))
                if certificate := self._options.get("certfile"):
                    context.load_cert_chain(certificate, self._options.get("keyfile"))
                options["tls"] = context
            if creds := self._options.get("creds"):
                name = "creds"
                options["user_credentials"] = RawCredentials(_checked_creds(Path(creds).read_text()))
            if nkey := self._options.get("nkey"):
                name = "nkey"
                options["nkeys_seed_str"] = _checked_seed(Path(nkey).read_text())
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            msg = f"CONSUMER_BROKER_URL: {name}: {error}"
            raise BrokerRefused(msg) from error
        return options


def _checked_creds(text: str) -> str:
    """Raises ValueError; nats-py would look for the missing parts for ever."""
    seed = re.search(r"BEGIN USER NKEY SEED-+\s+(\S+)", text)
    if seed is None or not re.search(r"BEGIN NATS USER JWT-+\r?\n\S", text):
        msg = "the file does not hold a JWT and a seed"
        raise ValueError(msg)
    _checked_seed(seed[1])
    return text


def _checked_seed(text: str) -> str:
    try:
        import nkeys  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        msg = "this needs the package nkeys, which nats-py[nkeys] brings"
        raise ValueError(msg) from None
    try:
        nkeys.from_seed(bytearray(text.strip().encode())).wipe()
    except Exception:
        msg = "the file does not hold the seed of an nkey"
        raise ValueError(msg) from None
    return text.strip()


def _checked_name(name: str, variable: str) -> str:
    if not name or NOT_IN_A_NAME.search(name):
        msg = f"{variable}: a name in NATS has none of these: spaces . * > / \\; {name!r} has"
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
    """NATS has only text in headers, of one line, with names in ASCII."""
    headers = {ID: message.id if _is_plain(message.id) else json.dumps(message.id)}
    extras: dict[str, Any] = {} if _is_plain(message.id) else {"id": message.id}
    if _is_plain(message.type):
        headers[TYPE] = message.type
    elif message.type:
        extras["type"] = message.type
    for name, value in message.headers.items():
        if _is_plain(value) and TOKEN.fullmatch(name) and not OURS.match(name):
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
    return isinstance(value, str) and value.isprintable() and value.strip() == value != ""


def _message(body: bytes, delivery: _Delivery) -> Message:
    headers: dict[str, Any] = dict(delivery.headers)
    native_id = headers.pop(ID, "")
    id = headers.pop(FIRST_ID, native_id) or delivery.key
    type = headers.pop(TYPE, None)
    if type is None:  # of another producer, who may have told it by the subject: orders.order_created
        _, dot, last = delivery.subject.rpartition(".")
        type = last if dot else ""
    headers.pop(GROUP, None)
    if EXTRAS in headers:
        with suppress(ValueError, TypeError):
            extras = json.loads(headers[EXTRAS])
            id, type = extras.get("id", id), extras.get("type", type)
            headers |= extras.get("headers", {})
            del headers[EXTRAS]
    return Message(body, id, type, headers, 1, delivery)


async def _drain(subscription: Subscription) -> None:
    draining: Awaitable[None] = subscription.drain()  # type: ignore[no-untyped-call, unused-ignore]
    await draining


def _is_held(message: Message) -> bool:
    """Whether the broker has surely given it to nobody else."""
    held_until: float = message.receipt.held_until
    return held_until > asyncio.get_running_loop().time()


def _log_lost(message: Message, reason: str) -> None:
    log.warning("settlement_lost", id=message.id, reason=reason)
