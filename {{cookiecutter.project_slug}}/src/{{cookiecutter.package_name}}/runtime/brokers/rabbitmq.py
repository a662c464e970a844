# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""RabbitMQ 3.10 or later, by aio-pika: a quorum queue, its dead letters, and retry queues.

``amqp://user:password@host:5672/vhost``, or ``amqps://`` with ``?cafile=ca.pem&certfile=me.pem&keyfile=me.key``.
Special characters in a user name, a password or a virtual host are percent-encoded. ``?heartbeat=20`` is in seconds.

For ``CONSUMER_SOURCE=orders`` the queues are ``orders``, ``orders.dead``, and one ``orders.retry.<milliseconds>``
for each step of the backoff. A retry or a dead letter is published, and confirmed, before the delivery is
acknowledged: a crash in between makes a duplicate, never a loss. After an outage the unacked messages of this process
are redelivered. They also are when one message stays unacked, by its handler or behind others of its key, for longer
than the broker's ``consumer_timeout``, 30 minutes by default.
"""

import asyncio
import logging
import math
import re
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import structlog
from aio_pika import Connection
from aiormq import exceptions as amqp
from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.exceptions import PAMQPException
from pamqp.frame import marshal
from pamqp.header import ContentHeader
from yarl import URL

from ..cancellation import cancellable_sleep
from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable, MendableRefusal
from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from . import delivery
from .amqp import COUNTS, PERSISTENT, Copy
from .connectivity import Connectivity
from .dead_letters import Page
from .delivery import ATTEMPTS, DEAD_LETTERED_AT, KEY, REASON
from .requests import Requests, Rule, abort, to_the_end
from .source import MISSING, Broker, Capabilities, log_settlement_lost
from .url import TLS_OPTIONS, BrokerUrl, CurrentUrl

T = TypeVar("T")

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer a request or to confirm a message."""
CANCEL_SECONDS = 1.5
FLUSH_SECONDS = 0.5
CLOSE_SECONDS = 2.0
CLOSE_CONNECTION_SECONDS = 0.5
HEARTBEAT_SECONDS = 20
CHECK_SECONDS = 1.0
"""How often to check that the broker still confirms messages."""
QUIET_TURNS = 3
"""This many turns of the event loop without another ack end a batch of acks. One turn is too few: aiormq
hands over a delivery every few turns (measured: batches of 7 instead of 50, and 1.25 times the CPU)."""
UNSTORED_SETTLEMENTS = 32
"""A channel passes on at most this many settlements that a quorum queue has not stored; it drops the rest on close."""
PUBLISH_AT_ONCE = 100
MOST_ALONE = 4
"""How many messages may each be published on a channel of their own at a time. A server closes a connection with too
many channels. aiormq, with a full queue of 10 frames, does not answer a channel's close: its number stays in use."""
REQUEUE_SECONDS = 5.0
"""How long the requeue of dead letters that were read may take."""
QUIET_SECONDS = 0.5
FEW_LETTERS, MOST_LETTERS = 100, 2_000
"""The prefetch of the second consumer that reads dead letters, and the largest: less if the letters are large."""
LARGE_BODY_BYTES = 2**20
"""The broker may refuse a larger body; only the refusal names its limit."""
CONTENT_HEADER_BYTES = 12  # the fixed fields of a content header, before the properties
NOT_CONFIRMING = "it confirms no message; it may be short of memory or disk"

# On brokers before 4.3 each requeue and each crash counts as a delivery, and 4.x has a default limit of 20. A message
# that kills its process each time must be dead-lettered in the end, but not after hundreds of rolling restarts.
DELIVERY_LIMIT = 1000
# Listing dead letters delivers them, and beyond the limit they would be dropped.
DEAD_LETTER_DELIVERY_LIMIT = 1_000_000
MOST_DELAYS = 12

HISTORY = (ATTEMPTS, REASON, DEAD_LETTERED_AT, "x-death", "x-first-death-", "x-last-death-")
"""Prefixes of the headers of a message's history. RabbitMQ 3.10 mistakes a retry with an old ``x-death`` for a cycle of
dead letters, and keeps it forever."""
ORIGIN = f"{delivery.PREFIX}origin"
"""Header: the exchange and the routing key of a message that was published again to its queue."""
KOMBU_COMPRESSION = "compression"

FAILURES = (amqp.AMQPError, PAMQPException, RuntimeError, StopAsyncIteration)
"""The exceptions of a request that failed, besides OSError."""
LOGIN_ERRORS = (amqp.AuthenticationError, amqp.ProbableAuthenticationError)
RULES = (
    Rule(amqp.ChannelAccessRefused, BrokerDenied, "{error}"),
    Rule(amqp.ChannelPreconditionFailed, BrokerRefused, "refused: {error}"),
    Rule(amqp.ChannelNotFoundEntity, BrokerRefused, "{error}"),
    Rule(amqp.PublishError, BrokerRefused, "no queue for the message: {error}"),
    Rule(amqp.DeliveryError, BrokerRefused, "the queue refused the message: it is full"),
    Rule((RuntimeError, asyncio.CancelledError), BrokerUnavailable, "the connection was lost"),
)
CONNECT_RULES = (
    Rule(LOGIN_ERRORS, BrokerDenied, "the user name or the password was refused: {error}"),
    Rule(amqp.ConnectionClosed, BrokerUnavailable, "refused for now: {error}", r"limit \(|is down"),
    Rule(amqp.ConnectionClosed, MendableRefusal, "no such virtual host: {error}", "not found"),
    Rule(amqp.ConnectionClosed, BrokerDenied, "refused: {error}", "NOT_ALLOWED"),
    *RULES,
)

log = structlog.get_logger()

for _name in ("aio_pika", "aiormq"):
    # They log a traceback for each lost connection; the runtime logs each outage once.
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.CRITICAL)


def _task(work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
    """A task whose failure asyncio does not log."""
    task = asyncio.create_task(work, name=f"rabbitmq: {name}")
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return task


class _Url(BrokerUrl):
    def __init__(self, text: str) -> None:
        options = ["auth", "heartbeat", *TLS_OPTIONS]
        super().__init__(text, like="amqp://user:password@host:5672/vhost", options=options)
        if len(self.hosts) != 1:
            raise self.unreadable()
        heartbeat = self.whole_number("heartbeat", HEARTBEAT_SECONDS, at_least=0, at_most=65534)
        address, _, query = text.partition("?")
        self.text = f"{address}?heartbeat={heartbeat}&{query}"
        """The URL for aio-pika, which uses its first ``heartbeat``."""


class _Client(TransportFactory):
    """One connection, opened when it is needed, and opened again after it was lost.

    The client opens the sockets itself, to abort them: a graceful close waits long for an unresponsive peer.
    """

    def __init__(self, current_url: CurrentUrl[_Url], name: str) -> None:
        self._current_url = current_url
        self._name = name
        self.writer: Any = None
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()

    async def create(self, url: Any, **kwargs: Any) -> tuple[asyncio.StreamReader, Any]:
        factory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, self.writer = await factory.create(url, **kwargs)
        return reader, self.writer

    def cut(self) -> None:
        if self.writer is not None:
            abort(self.writer.transport)

    @property
    def opened(self) -> bool:
        transport: Any = self._connection and self._connection.transport
        return transport is not None and not transport.connection.is_closed

    async def open(self) -> Connection:
        async with self._opening:
            if self._connection is None or not self.opened:
                await self.close()
                self._connection = await self._connect()
            return self._connection

    async def channel(self, *, publisher_confirms: bool) -> AbstractChannel:
        """A new channel, one layer below aio-pika's, which makes a task and an object of 28 attributes per delivery."""
        transport: Any = (await self.open()).transport
        opening = transport.connection.channel(publisher_confirms=publisher_confirms)
        return await opening  # type: ignore[no-any-return]  # aio-pika has no type for it

    async def _connect(self) -> Connection:
        url, connection = self._current_url(), None
        with suppress(ValueError):
            connection = Connection(
                URL(url.text),
                ssl_context=url.tls_context() if url.scheme == "amqps" else None,
                client_properties={"connection_name": self._name},
            )
            connection.kwargs["transport_factory"] = self
        if connection is None:  # raised here, so that the parser's error is not its context
            raise url.unreadable()
        connecting = _task(connection.connect(), "connect")
        try:
            await asyncio.wait({connecting})
            connecting.result()
        except BaseException as error:
            self.cut()
            connecting.cancel()
            await asyncio.wait({connecting}, timeout=CLOSE_CONNECTION_SECONDS)
            await connection.close()  # otherwise its __del__ would close it, in a task
            if isinstance(error, amqp.ConnectionClosed) and error.strerror:
                raise amqp.ConnectionClosed(error.strerror) from None  # without the number
            raise
        return connection

    async def close(self) -> None:
        if self._connection is not None and not self._connection.is_closed:
            closing = _task(self._connection.close(), "close")
            await asyncio.wait({closing}, timeout=CLOSE_CONNECTION_SECONDS)
            self.cut()  # in an alarm the broker does not answer
            await asyncio.wait({closing}, timeout=CLOSE_CONNECTION_SECONDS)


_Outgoing = tuple[str, str, bytes, Basic.Properties]  # exchange, routing key, body, properties


class _Publisher:
    """Publishes on a connection of its own.

    In an alarm, when memory or disk is short, the broker reads nothing from a connection that has published: acks
    on the same connection would not arrive, and soon the broker would send no more messages.
    """

    def __init__(self, client: _Client) -> None:
        self.client = client
        self._channel: AbstractChannel | None = None
        self._opening = asyncio.Lock()
        self._unconfirmed: dict[str, tuple[float, asyncio.Future[None]]] = {}
        """By message id, the oldest first: when it was sent (event loop time), and a future that is set at the end."""
        self._sent: list[bytes] = []
        """The frames of this turn of the event loop."""
        self._exchanges = {""}
        """The known exchanges. A message to any other is published on a channel of its own, which a refusal closes."""
        self._alone = asyncio.Semaphore(MOST_ALONE)
        self.most_body_bytes = math.inf  # the broker names its limit only when it refuses a body

    @property
    def late(self) -> bool:
        """Whether a message has waited too long for its confirmation."""
        now = asyncio.get_running_loop().time()
        sent_at, _ = next(iter(self._unconfirmed.values()), (now, None))
        return now - sent_at > ANSWER_SECONDS

    @property
    def opened(self) -> bool:
        channel = self._channel
        return channel is not None and not channel.is_closed and self.client.opened

    async def open(self) -> None:
        async with self._opening:
            if not self.opened:
                self._channel = await self.client.channel(publisher_confirms=True)

    def too_large(self, body: bytes, properties: Basic.Properties) -> str:
        """Why the broker would close the channel or connection for it; otherwise empty. Needs an open channel."""
        channel: Any = self._channel
        most = channel.max_content_size - CONTENT_HEADER_BYTES
        # Only headers can make the properties too long.
        if properties.headers and 0 < most < (size := len(properties.marshal())):
            return f"its headers have {size} bytes, the broker takes {most}"
        if len(body) > self.most_body_bytes:
            return f"its body has {len(body)} bytes, the broker takes {self.most_body_bytes}"
        return ""

    async def publish(self, message: _Outgoing) -> None:
        """Returns when the broker has confirmed it. Needs an open channel. Raises PublishError if no queue gets it."""
        exchange, _, body, properties = message
        if reason := self.too_large(body, properties):
            raise ValueError(reason)
        properties.message_id = message_id = properties.message_id or uuid.uuid4().hex
        # One at a time for each id: aiormq finds the publish of a message that the broker returns by the id alone.
        while (earlier := self._unconfirmed.get(message_id)) is not None:
            await asyncio.wait({earlier[1]})
        channel: Any = self._channel
        self._unconfirmed[message_id] = channel.loop.time(), channel.loop.create_future()
        large = len(body) > LARGE_BODY_BYTES
        risky = large or exchange not in self._exchanges
        try:
            if risky:
                async with self._alone:
                    # Another message may have found the exchange meanwhile.
                    if risky := large or exchange not in self._exchanges:
                        await self._publish_alone(message)
                        self._exchanges.add(exchange)
            if not risky:
                await self._send(message)
        except amqp.ChannelPreconditionFailed as error:
            if found := re.search(r"larger than configured max size (\d+)", str(error)):
                self.most_body_bytes = int(found[1])
            raise
        except (amqp.DeliveryError, amqp.ChannelNotFoundEntity) as error:
            if isinstance(error, amqp.ChannelNotFoundEntity):
                self._exchanges.discard(exchange)
            if risky or isinstance(error, amqp.PublishError):
                raise
            # A channel may keep refusing when the queue has room again; the missing exchange may be another message's.
            async with self._alone:
                await self._publish_alone(message)
        finally:
            self._unconfirmed.pop(message_id)[1].set_result(None)
            channel.message_id_delivery_tag.pop(message_id, None)

    def _send(self, message: _Outgoing) -> "asyncio.Future[Any]":
        """Returns the confirmation. One write sends all messages of an event loop's turn: aiormq's `basic_publish`,
        with locks and a write for each message, costs three times as much."""
        exchange, routing_key, body, properties = message
        channel: Any = self._channel
        if channel.is_closed:
            raise amqp.ChannelInvalidStateError
        publish = Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=True)
        header, most = ContentHeader(0, len(body), properties), channel.max_content_size
        bodies = (ContentBody(body[at : at + most]) for at in range(0, len(body), most))
        frames: Any = (publish, header, *bodies)
        sent = b"".join(marshal(frame, channel.number) for frame in frames)
        if not self._sent:
            channel.loop.call_soon(self._write)
        self._sent.append(sent)
        channel.delivery_tag += 1
        channel.message_id_delivery_tag[properties.message_id] = channel.delivery_tag
        confirmation: asyncio.Future[Any] = channel.create_future()
        channel.confirmations[channel.delivery_tag] = confirmation
        return confirmation

    def _write(self) -> None:
        if self.opened:
            self.client.writer.write(b"".join(self._sent))
        self._sent.clear()

    async def _publish_alone(self, message: _Outgoing) -> None:
        """Publish on a channel of its own, which a refusal closes: other messages are not affected."""
        names = dict(zip(("exchange", "routing_key", "body", "properties"), message, strict=True))
        channel: Any = await self.client.channel(publisher_confirms=True)
        try:
            await channel.basic_publish(**names, mandatory=True, wait=False)
        finally:
            # aiormq sends a cancelled close again, and the broker answers the second close by closing the connection.
            await asyncio.shield(_task(channel.close(), "close"))


class _Deliveries:
    """The unacked deliveries of one channel, and the one task that writes their settlements.

    Settlements in quick succession are sent together, and acks of consecutive tags as one frame. Only one task writes
    them, so that such an ack never overtakes the requeue of a message among the tags.
    """

    def __init__(self, channel: AbstractChannel, prefetch: int) -> None:
        self.channel = channel
        self.ended = asyncio.Event()
        """Set when no more deliveries come: the channel was closed, or the broker has cancelled the consumer."""
        self.end_reason = "the broker has cancelled the consumer"
        self.consumers: dict[str, int] = {}  # the prefetch of each consumer, by its tag
        self.asking = asyncio.Lock()
        self._most_acks = max(1, prefetch // 2)
        self._unacked: dict[int, Message | None] = {}  # in the order of the delivery tags
        self._last_tag = 0
        self._acked: set[int] = set()
        self._requeued: list[int] = []
        self._beat_at = asyncio.get_running_loop().time()
        self._blocked_seconds = 0.0
        self._work = asyncio.Event()
        self.written = asyncio.Event()
        self.written.set()
        self.tasks: set[asyncio.Task[Any]] = {_task(self._write(), "write settlements")}
        channel.closing.add_done_callback(self._on_closed)
        channel.on_consumer_cancel_callbacks.add(lambda _: self.ended.set())

    def add(self, tag: int, message: Message) -> None:
        for missed in range(self._last_tag + 1, tag):
            self._unacked[missed] = None  # aiormq dropped it: a multiple ack must not cover it
        self._last_tag = max(self._last_tag, tag)
        self._unacked[tag] = message

    def ack(self, tag: int) -> None:
        self.beat()
        self._acked.add(tag)
        self._wake()

    def beat(self) -> None:
        """Detect a blocked event loop: the broker may have closed the connection, and then drops the acks."""
        now = self.channel.loop.time()
        if (seconds := now - self._beat_at) > 2 * CHECK_SECONDS:
            self._blocked_seconds = seconds
        self._beat_at = now

    def requeue(self, tag: int) -> None:
        del self._unacked[tag]
        self._requeued.append(tag)
        self._wake()

    def close(self) -> None:
        """Drop the settlements that are not written yet: the broker requeues the deliveries of a closed channel."""
        self.ended.set()
        for task in self.tasks:
            task.cancel()
        self.written.set()
        reason = "the channel was closed before the ack was sent"
        if self._blocked_seconds:
            reason += f", after the event loop was blocked for {self._blocked_seconds:.0f} seconds"
        for tag in self._acked:
            if (message := self._unacked[tag]) is not None:
                log_settlement_lost(message, "ack", reason)
        self._acked.clear()

    def _on_closed(self, closing: "asyncio.Future[None]") -> None:
        error = None if closing.cancelled() else closing.exception()
        is_cut = error is None or isinstance(error, asyncio.CancelledError)
        self.end_reason = (
            "no answer to heartbeats" if is_cut else str(error) or type(error).__name__
        )
        self.close()

    def _wake(self) -> None:
        self.written.clear()
        self._work.set()

    async def _write(self) -> None:
        with suppress(amqp.ChannelInvalidStateError):  # closed meanwhile
            while await self._work.wait():
                await self._write_batch()

    async def _write_batch(self) -> None:
        seen = 0
        while seen < len(self._acked) < self._most_acks:
            seen = len(self._acked)
            for _ in range(QUIET_TURNS):
                await asyncio.sleep(0)
        self._work.clear()
        if self._blocked_seconds:
            await self.channel.flow(True)  # fails without a connection
            self._blocked_seconds = 0.0
        requeued, self._requeued = self._requeued, []  # no await until all acks are known
        acked = self._acked.copy()
        through = 0
        for tag in takewhile(acked.__contains__, self._unacked):
            through = tag
        for tag in requeued:
            await self.channel.basic_nack(tag, requeue=True, wait=False)
        if through:
            await self.channel.basic_ack(through, multiple=True, wait=False)
        for tag in acked:
            if tag > through:
                await self.channel.basic_ack(tag, wait=False)
        self._acked -= acked
        for tag in acked:
            del self._unacked[tag]
        if not self._work.is_set():
            self.written.set()


class _Receipt(NamedTuple):
    deliveries: _Deliveries
    tag: int
    properties: Basic.Properties


class RabbitBroker(Broker):
    """See the module."""

    capabilities = Capabilities()
    destinations: ClassVar = {"queue": "queue:NAME", "exchange": "exchange:NAME/ROUTING.KEY"}
    origins = ("routing-key",)
    longest_hold_seconds = 300.0  # the broker's limit for an unacked message is 30 minutes

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL cannot be used."""
        super().__init__(settings, prefetch)
        self._name = settings.source
        url = (current_url := CurrentUrl(settings, _Url))()
        self._requests = Requests(url.redacted, FAILURES, RULES, ANSWER_SECONDS)
        self._connecting = Requests(url.redacted, FAILURES, CONNECT_RULES, CONNECT_SECONDS)
        self.connectivity = Connectivity(url.redacted)
        self._client = _Client(current_url, self._name)
        self._publisher = _Publisher(_Client(current_url, f"{self._name}, publishing"))
        self._dead = f"{self._name}.dead"
        delays = delays_ms(settings.retry_seconds, settings.retry_max_seconds)
        self._retries = {ms: f"{self._name}.retry.{ms}" for ms in delays}
        self._queues = self._topology(self._retries)
        self._needed = [self._dead, self._name] if settings.declare else [*self._queues]
        """The queues that the service needs now: a retry adds its queue when it first needs it."""
        self._bindings = _parse_bindings(settings.bindings)
        self._is_foreign = False
        longest = max(self._queues, key=lambda name: len(name.encode()))
        if len(longest.encode()) > 255:
            msg = f"CONSUMER_SOURCE: a queue's name has at most 255 bytes, but {longest!r} has more"
            raise BrokerRefused(msg)
        self._deliveries: _Deliveries | None = None
        self._fetcher: asyncio.Task[None] | None = None
        self._exited = asyncio.Event()

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        try:
            await self._connect()
        except BaseException:
            await self._close()
            raise
        self.connectivity.established()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._exited.set()
        self.connectivity.up = False
        await self._close()

    @property
    def connected(self) -> bool:
        return self.connectivity.up and self._client.opened

    async def _connect(self) -> Connection:
        return await self._connecting.answer(self._client.open())

    async def _close(self) -> None:
        closing: asyncio.Task[Any] = _task(self._close_gracefully(), "close gracefully")
        tasks = {closing}
        if self._fetcher is not None:
            self._fetcher.cancel()
            tasks.add(self._fetcher)
        try:
            await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
        finally:
            if not closing.done():
                self._client.cut()
                self._publisher.client.cut()
        if self._deliveries is not None:
            self._deliveries.close()
            tasks |= self._deliveries.tasks
        await asyncio.wait(tasks, timeout=CLOSE_CONNECTION_SECONDS)

    async def _close_gracefully(self) -> None:
        try:
            if self._deliveries is not None and not self._deliveries.channel.is_closed:
                await self._deliveries.written.wait()
                # The queue answers after it has stored what came before; the channel then passes on the rest.
                for _ in range(2 if self.prefetch > UNSTORED_SETTLEMENTS else 0):
                    await self._deliveries.channel.basic_get(self._name)  # requeued at the close
                # The broker's answer proves that every settlement has arrived.
                await self._deliveries.channel.close()
        except (OSError, *FAILURES) as error:
            log.debug("close_failed", broker=self.connectivity.address, reason=str(error))
        finally:
            closing = (self._client.close(), self._publisher.client.close())
            await asyncio.gather(*closing, return_exceptions=True)

    # -- topology

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[AbstractChannel]:
        """A channel for one purpose: an error closes it."""
        await self._connect()
        channel = await self._requests.answer(self._client.channel(publisher_confirms=False))
        try:
            yield channel
        finally:
            with suppress(BrokerError):  # closed by an error, or with the connection
                await self._requests.answer(asyncio.shield(_task(channel.close(), "close")))

    def _topology(self, retries: dict[int, str]) -> dict[str, dict[str, Any]]:
        """The arguments of each queue; each queue comes after the queue to which it dead-letters."""
        quorum = {"x-queue-type": "quorum"}
        moving = quorum | {
            "x-dead-letter-exchange": "",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",  # at-least-once is ignored without it
        }
        to = "x-dead-letter-routing-key"
        return {
            self._dead: quorum | {"x-delivery-limit": DEAD_LETTER_DELIVERY_LIMIT},
            self._name: moving | {"x-delivery-limit": DELIVERY_LIMIT, to: self._dead},
            **{
                name: moving | {"x-message-ttl": ms, to: self._name} for ms, name in retries.items()
            },
        }

    async def declare(self) -> None:
        await self._declare(self._queues)

    async def delete(self) -> None:
        for name in self._queues:
            async with self._channel() as channel, self._requests.bounded():
                await channel.queue_delete(name)

    async def prepare(self) -> None:
        if self.settings.declare:
            await self._declare(self._needed)
        else:
            await super().prepare()

    async def _declare(self, names: Iterable[str]) -> None:
        await self._connect()  # so that a refused login is not reported as a refused queue
        for name in names:
            await self._declare_queue(name)
        for exchange, routing_key in self._bindings:
            async with self._channel() as channel, self._requests.bounded():
                await channel.queue_bind(self._name, exchange, routing_key)

    async def _declare_queue(self, name: str) -> None:
        arguments = self._queues[name]
        is_source = name == self._name
        if is_source and self._is_foreign and await self._count(name) is None:
            raise BrokerRefused(f"the queue {name!r} {MISSING}: create it again, as it was")
        try:
            async with self._channel() as channel, self._requests.bounded():
                await channel.queue_declare(name, durable=True, arguments=arguments)
        except BrokerRefused as refusal:
            cause, problem = refusal.__cause__, "cannot be created"
            if "inequivalent" in str(cause):
                if is_source and "'stream'" not in str(cause):  # a stream keeps acked messages
                    self._is_foreign = True
                    return
                problem = "already exists with other arguments"
            elif isinstance(cause, amqp.ChannelAccessRefused):
                exists = True  # since RabbitMQ 4.2.6 the passive look may be refused, too
                with suppress(BrokerDenied):
                    exists = await self._count(name) is not None
                if exists:
                    return  # created by another user
                problem = "does not exist, and cannot be created"
            msg = f"the queue {name!r} {problem}: {cause}"
            raise type(refusal)(msg) from cause

    async def _count(self, name: str) -> tuple[int, int] | None:
        """The number of ready messages, and of consumers; None if the queue does not exist."""
        try:
            async with self._channel() as channel, self._requests.bounded():
                declared = await channel.queue_declare(name, passive=True)
        except BrokerError as error:
            if isinstance(error.__cause__, amqp.ChannelNotFoundEntity):
                return None
            raise
        return declared.message_count or 0, declared.consumer_count or 0

    async def describe(self) -> dict[str, int | str]:
        transport: Any = (await self._connect()).transport
        server = transport.connection.server_properties
        described: dict[str, int | str] = {"server": f"{server['product']} {server['version']}"}
        for name in self._needed:
            try:
                described[name], consumers = await self._count(name) or (MISSING, 0)
                if name == self._name:
                    described[f"{name} consumers"] = consumers
            except BrokerDenied as denial:  # since RabbitMQ 4.2.6
                described[name] = f"cannot be looked at: {denial.__cause__}"
        return described

    # -- consuming

    def __anext__(self) -> Coroutine[Any, Any, Message]:
        return self._next_held()

    async def start(self) -> None:
        await self._subscribe()
        self._fetcher = asyncio.create_task(self._fetch(), name=f"fetcher of {self._name}")

    async def _fetch(self) -> None:
        """Consume through outages, until the source is closed."""
        try:
            await self.connectivity.keep(self._consume, self._exited)
        except Exception as failure:
            self.connectivity.up = False
            self.buffer.fail(failure)

    async def _consume(self) -> None:
        """Subscribe again if that is needed; then watch the deliveries until they end."""
        deliveries = self._deliveries
        if deliveries is None or deliveries.ended.is_set():
            deliveries = await self._resubscribe()
        while await cancellable_sleep(CHECK_SECONDS, deliveries.ended):
            deliveries.beat()
            if not self._publisher.late:
                self.connectivity.established()
            elif self.connectivity.up:
                self.connectivity.lost(NOT_CONFIRMING)
        msg = f"{self.connectivity.address}: deliveries ended: {deliveries.end_reason}"
        raise BrokerUnavailable(msg)

    async def _resubscribe(self) -> _Deliveries:
        try:
            await self.prepare()
            deliveries = await self._subscribe()
        except (BrokerUnavailable, MendableRefusal):
            self._client.cut()  # the next attempt opens a new connection
            raise
        self.connectivity.established()
        return deliveries

    async def _subscribe(self) -> _Deliveries:
        await self._connect()
        async with self._requests.bounded():
            deliveries = self._deliveries
            if deliveries is None or deliveries.channel.is_closed:
                channel = await self._client.channel(publisher_confirms=False)
                deliveries = self._deliveries = _Deliveries(channel, self.prefetch)
            deliveries.ended.clear()
            deliveries.consumers.clear()
            await self._ask(deliveries)
        return deliveries

    async def _ask(self, deliveries: _Deliveries) -> None:
        """Ask for as many messages as there is room for, by one more consumer."""
        async with deliveries.asking:  # a consumer gets the prefetch that was set last before it
            more = self._room() + len(self.unacked) - sum(deliveries.consumers.values())
            if more > 0 and not self.stopped:
                channel, tag = deliveries.channel, uuid.uuid4().hex
                deliveries.consumers[tag] = more
                await channel.basic_qos(prefetch_count=more)
                await channel.basic_consume(self._name, self._on_delivery, consumer_tag=tag)
                if self.stopped:  # meanwhile
                    await channel.basic_cancel(tag)

    async def _on_delivery(self, delivered: DeliveredMessage) -> None:
        about: Any = delivered.delivery  # `delivered` checks its type for each attribute
        deliveries, tag = self._deliveries, about.delivery_tag
        if delivered.channel.is_closed or deliveries is None or tag is None:
            return
        properties = delivered.header.properties
        headers: dict[str, Any] = properties.headers or {}
        message = delivery.make_message(
            delivered.body,
            id=properties.message_id,
            type=properties.message_type,
            headers=headers,
            failures=headers.get(ATTEMPTS),
            published_at=properties.timestamp,
            receipt=_Receipt(deliveries, tag, properties),
            origin=_origin(about, headers, self._name),
            properties=_properties(properties, headers),
        )
        known = None
        if about.redelivered:
            # Removed from the headers, as they differ between deliveries of one message.
            message.deliveries += max(delivery.count_of(headers.pop(name, 0)) for name in COUNTS)
            known = self._still_in_flight(message)
        deliveries.add(tag, known or message)
        if known is None and not self._deliver(message):
            await self.requeue(message)
        elif (asked := sum(deliveries.consumers.values())) < self.prefetch:
            # Quick handlers never leave all of a small prefetch unacked: so ask also if twice as many fit, or all.
            fit = self._room() + len(self.unacked)
            if asked <= len(self.unacked) or min(2 * asked, self.prefetch) <= fit:
                await self._ask(deliveries)

    async def _stop_fetching(self) -> None:
        deliveries = self._deliveries
        if deliveries is not None and deliveries.consumers and not deliveries.ended.is_set():
            cancel = deliveries.channel.basic_cancel
            cancels = {_task(cancel(tag), "cancel") for tag in deliveries.consumers}
            deliveries.tasks |= cancels
            await asyncio.wait(cancels, timeout=CANCEL_SECONDS)

    async def flush(self) -> None:
        if self._deliveries is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._deliveries.written.wait()

    # -- settling

    def _lost_because(self, message: Message) -> str:
        return "its channel was closed" if message.receipt.deliveries.channel.is_closed else ""

    async def _ack(self, message: Message) -> None:
        message.receipt.deliveries.ack(message.receipt.tag)

    async def _requeue(self, message: Message) -> None:
        deliveries, tag, properties = message.receipt
        # The queue counts requeues like crashes: a copy starts a new count.
        if self.suspects.may_kill(message):
            copy = Copy(properties, {**message.headers, **_origin_of(message)}, message.id)
            with suppress(BrokerError, TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._publish_copy(self._name, message.body, copy)
                deliveries.ack(tag)
                return
        deliveries.requeue(tag)

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        """A message may wait behind others of its retry queue, for as long as this queue delays them."""
        ms, longest = max(1, math.ceil(delay_seconds * 1000)), max(self._retries)
        while longest < ms:  # beyond the backoff: one more queue for each doubling
            longest *= 2
            self._retries[longest] = f"{self._name}.retry.{longest}"
        step = next(step for step in self._retries if step >= ms)
        self._queues = self._queues | self._topology({step: self._retries[step]})
        if self._retries[step] not in self._needed:
            await self._declare_queue(self._retries[step])
            self._needed.append(self._retries[step])
        headers = _without_history(message.headers) | _origin_of(message)
        headers |= {ATTEMPTS: message.attempt, REASON: reason}
        copy = Copy(message.receipt.properties, headers, message.id)
        copy.expiration = str(min(ms, step))
        publishing = self._publish_copy(self._retries[step], message.body, copy)
        await self._move(message, "retry", publishing)

    async def _reject(self, message: Message, reason: str) -> None:
        original: Basic.Properties = message.receipt.properties

        def fits(body: bytes, headers: dict[str, Any]) -> bool:
            return not self._publisher.too_large(body, Copy(original, headers, message.id))

        await self._connecting.answer(self._publisher.open())
        history = {ATTEMPTS: message.attempt, REASON: reason, DEAD_LETTERED_AT: time.time()}
        headers = _without_history(message.headers) | _origin_of(message) | history
        body, headers = delivery.fit_dead_letter(message.body, headers, fits)
        copy = Copy(original, headers, message.id)
        await self._move(message, "reject", self._publish_copy(self._dead, body, copy))

    async def _publish_copy(self, queue: str, body: bytes, copy: Copy) -> None:
        """Publish the copy without a time limit: a requeue during the publish would duplicate the message."""
        message = ("", queue, body, copy)
        [failure] = await self._publish_batch([message], math.inf)
        if failure is not None and isinstance(failure.__cause__, amqp.PublishError):
            await self.prepare()
            [failure] = await self._publish_batch([message], math.inf)
        if failure is not None:
            raise failure

    # -- publishing

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        for start in range(0, len(messages), PUBLISH_AT_ONCE):
            batch = messages[start : start + PUBLISH_AT_ONCE]
            outcomes = await self._publish_batch(map(self._outgoing, batch))
            for failure in filter(None, outcomes):
                raise failure

    def _outgoing(self, message: OutgoingMessage) -> _Outgoing:
        kind, name = self.destination_of(message)
        exchange, _, routing_key = name.partition("/") if kind == "exchange" else ("", "", name)
        headers = {**message.headers, **({KEY: message.key} if message.key else {})}
        properties = Basic.Properties(
            content_type=message.content_type or None,
            headers=headers,
            delivery_mode=PERSISTENT,
            correlation_id=message.correlation_id or None,
            message_id=message.id,
            timestamp=datetime.now(UTC),
            message_type=message.type or None,
        )
        return exchange, routing_key, message.body, properties

    async def _publish_batch(
        self, messages: Iterable[_Outgoing], seconds: float | None = None
    ) -> list[Exception | None]:
        """For each message, why it was not published, or None. Raises BrokerUnavailable."""
        if not self._publisher.opened:
            await self._connecting.answer(self._publisher.open())
        async with self._requests.bounded(seconds):
            publishing = [self._publisher.publish(message) for message in messages]
            outcomes: list[BaseException | None] = [None]
            try:
                if len(publishing) == 1:  # without a task
                    await publishing[0]
                else:
                    outcomes = await asyncio.gather(*publishing, return_exceptions=True)
            except Exception as error:
                outcomes = [error]
        return [self._failure(outcome) for outcome in outcomes]

    def _failure(self, outcome: BaseException | None) -> Exception | None:
        """The failure of one message, with the client's exception as its cause."""
        if outcome is None:
            return None
        if isinstance(outcome, (OSError, asyncio.CancelledError, *FAILURES)):
            failure: Exception = self._requests.translated(outcome)
        elif isinstance(outcome, (TypeError, ValueError, OverflowError)):
            failure = BrokerRefused(f"this message cannot be sent: {outcome}")
        else:
            raise outcome
        failure.__cause__ = outcome
        return failure

    # -- dead letters

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator["_Reading"]:
        """Keeps every letter unacked, so that it is read once; the close of the channel requeues the rest."""
        async with self._channel() as channel:
            reading = _Reading(channel, self._dead, self._requests)
            try:
                yield reading
            finally:
                with suppress(OSError, BrokerError, *FAILURES):  # every step was confirmed before
                    await to_the_end(self._requeue_read(reading), REQUEUE_SECONDS)

    async def _requeue_read(self, reading: "_Reading") -> None:
        """Returns when the letters are in the queue again, so that the next command sees them."""
        left = await reading.end()
        await reading.channel.close()
        while await self.count_dead_letters() < left:
            pass

    async def _present_letters(self, reading: "_Reading") -> AsyncGenerator[DeadLetter, None]:
        for _ in range(await self.count_dead_letters()):
            give_up_at = time.monotonic() + ANSWER_SECONDS
            while not reading.ahead:
                await reading.wait()
                if reading.channel.is_closed:
                    raise self._requests.lost()
                if not reading.ahead and (
                    time.monotonic() > give_up_at or not await self.count_dead_letters()
                ):
                    return  # other readers have taken them
            yield _dead_letter(reading.ahead.popleft(), self._name)

    async def count_dead_letters(self) -> int:
        return (await self._count(self._dead) or (0, 0))[0]

    async def _take_letters(
        self, reading: "_Reading", letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        outcomes: list[Exception | None] = [None] * len(letters)
        if replay:
            outcomes = await self._publish_batch(
                ("", self._name, one.body, Copy(one.receipt[1], {**one.headers, **_origin_of(one)}))
                for one in letters
            )
        done = zip(letters, outcomes, strict=True)
        await reading.ack(letter.receipt[0] for letter, outcome in done if outcome is None)
        yield outcomes.count(None)
        for failure in filter(None, outcomes):
            raise failure

    async def _purge_all(self) -> AsyncIterator[int]:
        if await self._count(self._dead) is not None:
            async with self._channel() as channel, self._requests.bounded():
                purged = await channel.queue_purge(self._dead)
            yield purged.message_count or 0


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> RabbitBroker:
    """Raises BrokerRefused if the URL cannot be used."""
    return RabbitBroker(settings, prefetch)


def _parse_bindings(text: str) -> list[tuple[str, str]]:
    """The exchange and the routing key of each. Raises BrokerRefused."""
    bindings = [*filter(None, map(str.strip, text.split(",")))]
    for binding in bindings:
        if not re.match("[^/]+/", binding):
            raise BrokerRefused(f"CONSUMER_BINDINGS: {binding!r} is not exchange/routing.key")
    return [(exchange, key) for exchange, _, key in (one.partition("/") for one in bindings)]


def delays_ms(first_seconds: float, longest_seconds: float) -> list[int]:
    """The delays of the backoff, doubling; with larger steps where that would be too many queues."""
    factor = max(2.0, (longest_seconds / first_seconds) ** (1 / (MOST_DELAYS - 1)))
    delays = (first_seconds * factor**step for step in range(MOST_DELAYS))
    shorter = takewhile(lambda seconds: seconds < longest_seconds * 0.999, delays)
    return sorted({max(1, math.ceil(seconds * 1000)) for seconds in [*shorter, longest_seconds]})


class _Reading:
    """A channel on which dead letters are read, by consumers.

    A queue requeues the unacked messages of one consumer in order, also when the connection is lost; those of single
    requests in any order. So a consumer is cancelled when it has its full prefetch, and the next one reads on.
    Letters on their way at a cancel would be requeued in any order, so `_cancel` waits for them.
    """

    def __init__(self, channel: AbstractChannel, queue: str, requests: Requests) -> None:
        self.channel, self._queue, self._answer = channel, queue, requests.answer
        self.ahead: deque[DeliveredMessage] = deque()
        self._page = Page(FEW_LETTERS, MOST_LETTERS)
        self._unacked: dict[int, None] = {}
        self._consumers: list[str] = []
        self._window = self._held = self._awaited = 0
        """For the present consumer: its prefetch (0: there is none), its deliveries, and those still expected."""
        self._arrived = asyncio.Event()
        self._asking: asyncio.Future[None] | None = None

    async def _on_delivery(self, letter: DeliveredMessage) -> None:
        self._unacked[letter.delivery_tag or 0] = None
        self._held += 1
        self._awaited -= 1
        self._page.saw(len(letter.body))
        self.ahead.append(letter)
        self._arrived.set()

    async def wait(self) -> None:
        """Wait until a letter has arrived, or QUIET_SECONDS have passed."""
        if self._held >= self._window:
            await self._ask_shielded()
        await self._arrives()
        if len(self._consumers) == 1 and self.ahead:  # the first one shows how large they are
            await self._ask_shielded()

    async def _arrives(self) -> bool:
        """Whether a letter has arrived within QUIET_SECONDS."""
        self._arrived.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(QUIET_SECONDS):
                return await self._arrived.wait()
        return False

    async def _ask_shielded(self) -> None:
        """Shielded, because aiormq closes the channel of a request that is cancelled."""
        if self._consumers:
            self._page.turn()
        self._asking = asyncio.ensure_future(self._ask())
        await asyncio.shield(self._asking)

    async def _ask(self, most: int = MOST_LETTERS) -> None:
        await self._cancel()
        self._held = 0
        self._consumers.append(tag := f"{len(self._consumers):05d}-{uuid.uuid4().hex}")
        self._window = min(self._page.count, most)
        self._awaited = min(self._window, await self._count())
        await self._answer(self.channel.basic_qos(prefetch_count=self._window))
        consume = self.channel.basic_consume(self._queue, self._on_delivery, consumer_tag=tag)
        await self._answer(consume)

    async def _cancel(self) -> None:
        if self._window:
            while self._awaited > 0 and await self._arrives():
                pass
            self._window = 0
            await self._answer(self.channel.basic_cancel(self._consumers[-1]))

    async def _count(self) -> int:
        """How many are ready."""
        declared = await self._answer(self.channel.queue_declare(self._queue, passive=True))
        return declared.message_count or 0

    async def ack(self, tags: Iterable[int]) -> None:
        """Returns when the queue has the acks. The consumer ends first: each ack would bring it one more letter."""
        await self.end()
        for tag in tags:
            await self._answer(self.channel.basic_ack(tag, wait=False))
            del self._unacked[tag]
        await self._ask(1)
        await self.end()

    async def end(self) -> int:
        """End the consumer; returns how many letters the queue has once the closed channel has requeued the rest."""
        if self._asking is not None:
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._cancel()  # the answer comes after the last delivery
        return await self._count() + len(self._unacked)  # and so does this count


def _without_history(headers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in headers.items() if not name.startswith(HISTORY)}


def _properties(properties: Basic.Properties, headers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": headers.get(KEY),
        "content_type": properties.content_type,
        "content_encoding": headers.get(KOMBU_COMPRESSION) or properties.content_encoding,
        "correlation_id": properties.correlation_id,
        "reply_to": properties.reply_to,
    }


def _origin(delivered: Any, headers: dict[str, Any], queue: str) -> dict[str, Any]:
    """The first origin, also of a message that comes back from a retry queue or by dead-lettering."""
    origin = {"exchange": delivered.exchange, "routing_key": delivered.routing_key}
    first, deaths = headers.get(ORIGIN), headers.get("x-death")
    for death in deaths if isinstance(deaths, list) and first is None else ():
        match death:  # the oldest one is the last
            case {"queue": q, "exchange": way, "routing-keys": [key, *_]} if way and q == queue:
                first = {"exchange": way, "routing_key": key}
    if isinstance(first, dict) and not delivered.exchange:
        return {name: delivery.text_of(first.get(name)) for name in origin}
    return origin


def _origin_of(message: Message) -> dict[str, Any]:
    """The header for a copy of a message that came through an exchange."""
    return {ORIGIN: dict(message.origin)} if message.origin.get("exchange") else {}


def _dead_letter(letter: DeliveredMessage, queue: str) -> DeadLetter:
    properties = letter.header.properties
    headers: dict[str, Any] = properties.headers or {}
    reason, dead_lettered_at = headers.get(REASON), headers.get(DEAD_LETTERED_AT)
    match headers.get("x-death"):
        case [{"reason": cause} as death, *_] if dead_lettered_at is None:  # by the broker
            reason, dead_lettered_at = f"dead-lettered by the broker: {cause}", death.get("time")
    message = delivery.make_message(
        letter.body,
        id=properties.message_id,
        type=properties.message_type,
        headers=_without_history(headers),
        published_at=properties.timestamp,
        origin=_origin(letter, headers, queue),
        properties=_properties(properties, headers),
    )
    return delivery.make_dead_letter(
        message,
        (letter.delivery_tag or 0, properties),
        reason=reason,
        attempts=headers.get(ATTEMPTS),
        dead_lettered_at=dead_lettered_at,
    )
