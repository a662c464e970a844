# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""RabbitMQ 3.10 or later, by aio-pika: a quorum queue, its dead letters, and queues that delay retries.

``amqp://user:password@host:5672/vhost``, or ``amqps://`` with ``?cafile=ca.pem&certfile=me.pem&keyfile=me.key``.
What a password or a virtual host may not hold in a URL is percent-encoded.

For ``CONSUMER_SOURCE=orders`` the queues are ``orders``, ``orders.dead``, and one ``orders.retry.<milliseconds>``
for each step of the back-off. A retry or a dead letter is published, and confirmed, before the delivery is
acknowledged: a crash in between makes a duplicate, never a loss. After an outage exactly the messages
that were in hand come again; so they do when one is held, by its handler or behind others of its key, for
longer than the broker's own ``consumer_timeout``, 30 minutes if nobody changed it.
"""

import asyncio
import copy
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from itertools import count, takewhile
from ssl import SSLError
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import structlog
from aio_pika import Channel, Connection, RobustConnection
from aio_pika.abc import (
    AbstractIncomingMessage,
    AbstractQueue,
    AbstractRobustChannel,
    AbstractRobustQueue,
)
from aio_pika.connection import make_url
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AMQPChannelError,
    AuthenticationError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    InvalidFrameError,
    ProbableAuthenticationError,
    PublishError,
)
from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import ChannelAccessRefused
from pamqp import decode
from pamqp.commands import Basic

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
)

CONNECT_SECONDS = 10.0
CLOSE_CHANNEL_SECONDS = 0.5
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer a request or to confirm a message."""
CANCEL_SECONDS = 1.5
CLOSE_SECONDS = 2.0
HEARTBEAT_SECONDS = 20
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 5.0
"""Between two attempts to reconnect; the first one is made at once."""
CHECK_SECONDS = 1.0
RESTORE_SECONDS = 15.0
"""How long aio-pika may take to bring back channels and consumers on a connection that is up."""
QUIET_TURNS = 3
"""So many turns of the event loop without another ack end a batch of them. One turn is too few: aiormq
hands over a delivery every few turns (measured: batches of 7 instead of 50, and 1.25 times the CPU)."""
UNSTORED_SETTLEMENTS = 32
"""What is over so many that a quorum queue has not stored yet, its channel keeps back, and forgets when it is closed."""
PUBLISH_AT_ONCE = 100
PERSISTENT = 2

ATTEMPTS = "x-consumer-attempts"
"""Header: how often a handler failed on the message. The broker's own counters count deliveries."""
REASON = "x-consumer-reason"
DEAD_LETTERED_AT = "x-consumer-dead-lettered-at"
"""Header: when it became a dead letter, in Unix seconds."""
HISTORY = (ATTEMPTS, REASON, DEAD_LETTERED_AT, "x-death", "x-first-death-", "x-last-death-")
"""Headers that begin so tell what happened to a message; one that is replayed begins anew."""

# Each give-back and each crash costs one delivery on brokers before 4.3, and 4.x would stop at 20. A message
# that kills its process each time must end somewhere; hundreds of rolling restarts must not end it.
DELIVERY_LIMIT = 1000
# Listing dead letters delivers them, and beyond the limit they would be dropped.
DEAD_LETTER_DELIVERY_LIMIT = 1_000_000
MOST_DELAYS = 12

C = TypeVar("C", bound=Connection)

log = structlog.get_logger()

for _name in ("aio_pika", "aiormq"):
    # They log a traceback for each attempt to reconnect. What matters of it is logged here, once.
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.CRITICAL)


def _short_text(value: bytes) -> tuple[int, str]:
    """What is not UTF-8 in it becomes \N{REPLACEMENT CHARACTER}, and it stays short enough to be sent again."""
    end = 1 + value[0]
    text = value[1:end].decode(errors="replace")
    return end, text.encode()[:255].decode(errors="ignore")


def _table(value: bytes) -> tuple[int, Any]:
    """All names, in whatever encoding, and values up to one that Python cannot hold, or that is nested too deep."""
    try:
        return decode.field_table(value)
    except (ValueError, ArithmeticError, RecursionError):
        pass
    end, offset = 4 + int.from_bytes(value[:4]), 4
    table: dict[str, Any] = {}
    with suppress(ValueError, ArithmeticError, RecursionError):
        while offset < end:
            size, name = _short_text(value[offset:])
            offset += size
            size, table[name] = decode.embedded_value(value[offset:])
            offset += size
    return end, table


def _timestamp(value: bytes) -> tuple[int, Any]:
    """None beyond the year 9999."""
    try:
        return decode.timestamp(value)
    except (ValueError, ArithmeticError, OSError):
        return 8, None


# Else one such message ends the connection that brings it, again and again, and no other message is handled meanwhile.
decode.METHODS.update(shortstr=_short_text, table=_table, timestamp=_timestamp)


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> Source:
    return RabbitSource(settings, prefetch)


class _Socket(TransportFactory):
    """Opens the sockets of a connection, and can cut them: a polite close waits long for a silent peer."""

    def __init__(self) -> None:
        self._writer: asyncio.StreamWriter | None = None

    async def create(
        self, url: Any, **kwargs: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        factory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, self._writer = await factory.create(url, **kwargs)
        return reader, self._writer

    def cut(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


def _connection(kind: type[C], url: Any, name: str, socket: _Socket) -> C:
    """As aio_pika.connect() makes it, but with a hand on its socket, and on the connection when it fails."""
    connection = kind(url, client_properties={"connection_name": name})
    connection.kwargs = {**connection.kwargs, "transport_factory": socket}
    return connection


class _Publisher:
    """Publishes on a connection of its own, which is made when it is needed, and again when it was lost.

    In an alarm, when memory or disk are short, the broker reads nothing from a connection that has published:
    acks on it would not arrive, and soon no more messages come.
    """

    def __init__(self, url: Any, name: str) -> None:
        self._url = url
        self._name = name
        self._socket = _Socket()
        self._connection: Connection | None = None
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._unconfirmed: dict[str, _Unconfirmed] = {}  # by message id, the oldest first

    @property
    def late(self) -> bool:
        """Whether a message waits for its confirmation longer than it should."""
        oldest = next(iter(self._unconfirmed.values()), None)
        now = asyncio.get_running_loop().time()
        return oldest is not None and now - oldest.since > ANSWER_SECONDS

    async def open(self) -> None:
        async with self._opening:
            if self._connection is None or not self._connection.connected.is_set():
                await self.close()
                self._connection = _connection(Connection, self._url, self._name, self._socket)
                await self._connection.connect()
                self._channel = None
            if self._channel is None or self._channel.is_closed:
                self._channel = Channel(self._connection, on_return_raises=True)
                await self._channel.initialize()

    async def publish(self, queue: str, body: bytes, properties: Basic.Properties) -> None:
        """Returns when the broker has confirmed it; it must be open. Raises PublishError if there is no such queue."""
        assert self._channel is not None
        properties.message_id = message_id = properties.message_id or uuid.uuid4().hex
        # One at a time, as aiormq tells those that come back, for want of a queue, by nothing but their ids.
        while (earlier := self._unconfirmed.get(message_id)) is not None:
            await asyncio.wait({earlier.over})
        loop = asyncio.get_running_loop()
        self._unconfirmed[message_id] = _Unconfirmed(loop.time(), loop.create_future())
        try:
            channel = await self._channel.get_underlay_channel()
            await channel.basic_publish(
                body, routing_key=queue, properties=properties, mandatory=True
            )
        finally:
            self._unconfirmed.pop(message_id).over.set_result(None)

    async def close(self) -> None:
        if self._connection is not None:
            closing = asyncio.create_task(self._connection.close(), name="rabbitmq-close-publisher")
            await asyncio.wait({closing}, timeout=CLOSE_CHANNEL_SECONDS)
            self.cut()  # in an alarm there is no answer
            await asyncio.wait({closing}, timeout=CLOSE_CHANNEL_SECONDS)

    def cut(self) -> None:
        self._socket.cut()


class _Unconfirmed(NamedTuple):
    since: float
    """In the event loop's time, in seconds."""
    over: asyncio.Future[None]


class _Deliveries:
    """The unacked deliveries of one channel, and the one task that tells the broker their fate.

    What is settled in quick succession travels together, acks of a run without gaps as one frame. There
    is one writer, so that an ack of a run never overtakes a message of it that was given back.
    """

    def __init__(self, channel: AbstractChannel, prefetch: int) -> None:
        self.channel = channel
        self._most_acks = max(1, prefetch // 2)
        self._unacked: dict[int, Message | None] = {}  # by delivery tag, in that order
        self._last_tag = 0
        self._acked: set[int] = set()
        self._returned: list[int] = []
        self._work = asyncio.Event()
        self.written = asyncio.Event()
        self.written.set()
        self.writer = asyncio.create_task(self._write(), name="rabbitmq-settlements")
        channel.closing.add_done_callback(lambda _: self.close())

    def add(self, tag: int, message: Message) -> None:
        for missed in range(self._last_tag + 1, tag):
            self._unacked[missed] = None  # aio-pika dropped it: no ack of a run may cover it
        self._last_tag = max(self._last_tag, tag)
        self._unacked[tag] = message

    def __contains__(self, tag: int) -> bool:
        return tag in self._unacked and tag not in self._acked

    def ack(self, tag: int) -> None:
        if tag in self:
            self._acked.add(tag)
            self._wake()

    def requeue(self, tag: int) -> None:
        if tag in self:
            del self._unacked[tag]
            self._returned.append(tag)
            self._wake()

    def close(self) -> None:
        """Forget what is not written yet: the channel is gone, and with it the deliveries."""
        self.writer.cancel()
        self.written.set()
        for tag in self._acked:
            if (message := self._unacked[tag]) is not None:
                log.warning("settlement_lost", id=message.id, settlement="ack")
        self._acked.clear()

    def _wake(self) -> None:
        self.written.clear()
        self._work.set()

    async def _write(self) -> None:
        with suppress(ChannelInvalidStateError):  # closed meanwhile: close() says what is lost
            while await self._work.wait():
                await self._write_batch()

    async def _write_batch(self) -> None:
        seen = 0
        while seen < len(self._acked) < self._most_acks:
            seen = len(self._acked)
            for _ in range(QUIET_TURNS):
                await asyncio.sleep(0)
        self._work.clear()
        returned, self._returned = self._returned, []
        acked, self._acked = self._acked, set()
        through = 0
        for tag in takewhile(acked.__contains__, self._unacked):
            through = tag
        for tag in acked:
            del self._unacked[tag]
        for tag in returned:
            await self.channel.basic_nack(tag, requeue=True, wait=False)
        if through:
            await self.channel.basic_ack(through, multiple=True, wait=False)
        for tag in acked:
            if tag > through:
                await self.channel.basic_ack(tag, wait=False)
        if not self._work.is_set():
            self.written.set()


class _Receipt(NamedTuple):
    deliveries: _Deliveries
    tag: int
    properties: Basic.Properties

    @property
    def settled(self) -> bool:
        """Also when the channel is gone: then the broker has taken the message back."""
        return self.deliveries.channel.is_closed or self.tag not in self.deliveries


class RabbitSource(Source):
    """See the module. In the sentences of its errors and logs the URL has no credentials."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=True, attempts=True, requeue=True, dead_letters=True, order=True
    )

    _connection: RobustConnection
    _consuming: AbstractRobustChannel

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL makes no sense."""
        super().__init__(settings, prefetch)
        self._url = _parse_url(settings.broker_url.get_secret_value())
        self._broker = str(self._url.with_user(None).with_query(None))
        self.connectivity = Connectivity(self._broker)
        self._dead = f"{settings.source}.dead"
        delays = delays_ms(settings.retry_seconds, settings.retry_max_seconds)
        self._retries = {ms: f"{settings.source}.retry.{ms}" for ms in delays}
        self._queues = self._topology()
        self._may_declare = True
        self._socket = _Socket()
        self._publisher = _Publisher(self._url, f"{settings.source}, publishing")
        self._entered = False
        self._consumer_tag = uuid.uuid4().hex
        self._queue: AbstractRobustQueue | None = None
        self._deliveries: _Deliveries | None = None
        self._cancelling: asyncio.Task[Any] | None = None
        self._returning = False  # what comes late, after the stop, goes back at once
        self._failed_attempts = 0
        self._broken_since: float | None = None
        self._next_check: asyncio.TimerHandle | None = None

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._connection = _connection(
            RobustConnection, self._url, self.settings.source, self._socket
        )
        self._connection.reconnect_interval = FIRST_PAUSE_SECONDS
        try:
            async with self._asking(CONNECT_SECONDS):
                await self._connection.connect()
            await self._declare_topology()
        except BaseException:
            await self._close(0.5)
            raise
        self._connection.close_callbacks.add(self._on_connection_lost)
        self._connection.reconnect_callbacks.add(self._on_reconnected)
        self._entered = True
        self._check()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._entered = self.connectivity.up = False
        await self._close(CLOSE_SECONDS)

    async def _close(self, seconds: float) -> None:
        if self._next_check is not None:
            self._next_check.cancel()
        closing = asyncio.create_task(self._close_politely(), name="rabbitmq-close")
        try:
            await asyncio.wait({closing}, timeout=seconds)
        finally:
            if not closing.done():
                self._socket.cut()
                self._publisher.cut()
        tasks: set[asyncio.Task[Any]] = {closing}
        if self._cancelling is not None:
            self._cancelling.cancel()
            tasks.add(self._cancelling)
        if self._deliveries is not None:
            self._deliveries.close()
            tasks.add(self._deliveries.writer)
        await asyncio.wait(tasks, timeout=0.5)

    async def _close_politely(self) -> None:
        try:
            if self._deliveries is not None and not self._deliveries.channel.is_closed:
                await self._deliveries.written.wait()
                if self.prefetch > UNSTORED_SETTLEMENTS:
                    await self._wait_until_stored()
                await self._consuming.close()  # the answer proves that every settlement has arrived
        except CONNECTION_EXCEPTIONS as error:
            log.debug("close_failed", broker=self._broker, reason=str(error))
        finally:
            await asyncio.gather(
                self._connection.close(), self._publisher.close(), return_exceptions=True
            )

    async def _wait_until_stored(self) -> None:
        """Ask the queue for a message, twice: one answer says that it has stored what was sent before.

        With that the channel sends what it had kept back, and the other answer says that this is stored too. A
        message that comes with an answer goes back with the channel.
        """
        assert self._queue is not None
        for _ in range(2):
            await self._queue.get(fail=False)

    @asynccontextmanager
    async def _asking(self, seconds: float | None = ANSWER_SECONDS) -> AsyncIterator[None]:
        """Bounds a request to the broker, unless by None, and makes whatever goes wrong a BrokerError."""
        task = asyncio.current_task()
        assert task is not None
        cancelling_before = task.cancelling()
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            within = "" if seconds is None else f" within {seconds:g} seconds"
            msg = f"{self._broker} gave no answer{within}"
            raise BrokerUnavailable(msg) from None
        except asyncio.CancelledError as error:
            # aiormq ends what waits on a stuck connection with a CancelledError of its own.
            if task.cancelling() > cancelling_before:
                raise
            msg = f"{self._broker}: the connection was lost"
            raise BrokerUnavailable(msg) from error
        except CONNECTION_EXCEPTIONS as error:
            raise self._explain(error) from error

    def _explain(self, error: BaseException) -> BrokerError:
        if isinstance(error, AuthenticationError | ProbableAuthenticationError):
            return BrokerRefused(f"{self._broker} refused the user name or the password")
        if isinstance(error, InvalidFrameError) and not self._entered:
            # aiormq loses the reason that the broker gives.
            return BrokerRefused(
                f"{self._broker} refused the virtual host: it is not there, or not for this user"
            )
        if isinstance(error.__cause__, SSLError):
            return BrokerRefused(f"{self._broker}: no TLS connection: {error.__cause__}")
        if isinstance(error, SSLError | FileNotFoundError | PermissionError):
            return BrokerRefused(f"{self._broker}: cafile, certfile or keyfile in the URL: {error}")
        if isinstance(error, ChannelAccessRefused | ChannelPreconditionFailed):
            return BrokerRefused(f"{self._broker} refused: {error}")
        if isinstance(error, PublishError):
            return BrokerRefused(f"{self._broker} has no queue for the message: {error}")
        if isinstance(error, RuntimeError):  # aiormq's words for it are not for people
            return BrokerUnavailable(f"{self._broker}: the connection was lost")
        return BrokerUnavailable(f"{self._broker}: {error or type(error).__name__}")

    # -- noticing outages; aio-pika mends them

    @property
    def connected(self) -> bool:
        return self._consumes and not self._publisher.late

    @property
    def _consumes(self) -> bool:
        if not self._entered or not self._connection.connected.is_set():
            return False
        if self._deliveries is None or self._cancelling is not None:
            return True
        channel: Any = self._deliveries.channel
        return not channel.is_closed and self._consumer_tag in channel.consumers

    def _check(self) -> None:
        """Look every second; and cut a connection on which aio-pika does not get everything back.

        A whole connection it restores for as long as it takes, and tells why it could not.
        """
        if not self._entered:
            return
        loop = asyncio.get_running_loop()
        consumes = self._consumes
        if consumes and not self._publisher.late:
            self._failed_attempts = 0
            self.connectivity.established()
        elif self.connectivity.up:
            late = "it confirms no message; it may be short of memory or disk"
            self.connectivity.lost(late if consumes else "deliveries stopped")
        if consumes or not self._connection.connected.is_set():
            self._broken_since = None
        elif self._broken_since is None:
            self._broken_since = loop.time()
        elif loop.time() - self._broken_since > RESTORE_SECONDS:
            self._socket.cut()
        if self._next_check is not None:
            self._next_check.cancel()
        self._next_check = loop.call_later(CHECK_SECONDS, self._check)

    def _on_connection_lost(self, _: object, error: BaseException | None = None) -> None:
        """Called once when the connection is lost, and once for each attempt that failed."""
        if not self._entered:
            return  # closed by us
        self._failed_attempts += 1
        self._connection.reconnect_interval = backoff_seconds(
            self._failed_attempts, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS
        )
        if isinstance(error, ChannelAccessRefused | ChannelPreconditionFailed):
            self.buffer.fail(self._explain(error))  # the topology is not ours any more
        if isinstance(error, asyncio.CancelledError):
            self.connectivity.lost("no answer to heartbeats")
        else:
            self.connectivity.lost(error or "closed by the broker")

    def _on_channel_closed(self, closing: "asyncio.Future[None]") -> None:
        error = None if closing.cancelled() else closing.exception()
        if self._entered and isinstance(error, AMQPChannelError):
            self.connectivity.lost(
                error
            )  # the connection is up, and aio-pika opens another channel

    async def _on_reconnected(self, _: object) -> None:
        try:
            await self._declare_topology()
        except BrokerRefused as refusal:
            self.buffer.fail(refusal)
        except BrokerUnavailable:
            return  # lost again
        self._check()

    # -- topology

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[Channel]:
        """A channel for one purpose, not restored after an outage."""
        channel = Channel(self._connection, publisher_confirms=False)
        async with self._asking():
            await channel.initialize()
        try:
            yield channel
        finally:
            with suppress(BrokerError):  # closed by what went wrong, or with the connection
                async with self._asking():
                    await channel.close()

    def _topology(self) -> dict[str, dict[str, Any]]:
        """The arguments of each queue; what dead-letters comes after what it dead-letters to."""

        def dead_lettering_to(queue: str) -> dict[str, Any]:
            return {
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": queue,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",  # at-least-once is ignored without it
            }

        quorum = {"x-queue-type": "quorum"}
        source = self.settings.source
        delaying = quorum | dead_lettering_to(source)
        return {
            self._dead: quorum | {"x-delivery-limit": DEAD_LETTER_DELIVERY_LIMIT},
            source: quorum | {"x-delivery-limit": DELIVERY_LIMIT} | dead_lettering_to(self._dead),
            **{name: delaying | {"x-message-ttl": ms} for ms, name in self._retries.items()},
        }

    async def _declare_topology(self) -> None:
        for name, arguments in self._queues.items():
            try:
                async with self._channel() as channel, self._asking():
                    await channel.declare_queue(name, durable=True, arguments=arguments)
            except BrokerRefused as refusal:
                if isinstance(refusal.__cause__, ChannelPreconditionFailed):
                    msg = f"the queue {name!r} is there with other arguments: {refusal.__cause__}"
                    raise BrokerRefused(msg) from refusal.__cause__
                if not isinstance(refusal.__cause__, ChannelAccessRefused):
                    raise
                self._may_declare = False
                await self._count(name)  # somebody else's to declare, but it must be there

    async def _count(self, name: str) -> tuple[int, int]:
        """The number of ready messages, and of consumers."""
        try:
            async with self._channel() as channel, self._asking():
                declared = (await channel.declare_queue(name, passive=True)).declaration_result
        except BrokerError as error:
            if isinstance(error.__cause__, ChannelNotFoundEntity):
                msg = f"the queue {name!r} is not there"
                raise BrokerRefused(msg) from error
            raise
        return declared.message_count or 0, declared.consumer_count or 0

    async def describe(self) -> dict[str, int | str]:
        transport: Any = self._connection.transport
        if transport is None:
            msg = f"{self._broker}: the connection was lost"
            raise BrokerUnavailable(msg)
        server = transport.connection.server_properties
        described: dict[str, int | str] = {"server": f"{server['product']} {server['version']}"}
        for name in self._queues:
            messages, consumers = await self._count(name)
            described[name] = messages
            if name == self.settings.source:
                described[f"{name} consumers"] = consumers
        return described

    # -- consuming

    async def start(self) -> None:
        async with self._asking():
            channel = self._consuming = self._connection.channel(publisher_confirms=False)
            try:
                await self._subscribe(channel)
            except BaseException:
                # Else the next connection would restore it, beside the channel of the next attempt.
                with suppress(TimeoutError, *CONNECTION_EXCEPTIONS):
                    async with asyncio.timeout(CLOSE_CHANNEL_SECONDS):
                        await channel.close()
                raise

    async def _subscribe(self, channel: AbstractRobustChannel) -> None:
        name = self.settings.source
        await channel.initialize()
        await channel.set_qos(prefetch_count=self.prefetch)
        self._queue = await channel.declare_queue(
            name, durable=True, arguments=self._queues[name], passive=not self._may_declare
        )
        await self._queue.consume(self._on_delivery, consumer_tag=self._consumer_tag)
        channel.reopen_callbacks.add(self._on_reopened)
        await self._on_reopened()

    async def _on_reopened(self, _: object = None) -> None:
        self._track(await self._consuming.get_underlay_channel())

    def _track(self, channel: AbstractChannel) -> _Deliveries:
        if self._deliveries is None or self._deliveries.channel is not channel:
            self._deliveries = _Deliveries(channel, self.prefetch)
            channel.closing.add_done_callback(self._on_channel_closed)
            channel.on_consumer_cancel_callbacks.add(lambda _: self._check())
        return self._deliveries

    async def _on_delivery(self, incoming: AbstractIncomingMessage) -> None:
        # aio-pika gets here by a second task and an object of 28 attributes for each delivery, a third of
        # the CPU of all (measured). So the first of a subscription shows the others a shorter way.
        with suppress(ChannelInvalidStateError):  # gone already
            channel: Any = incoming.channel
            if self._consumer_tag in channel.consumers:  # not cancelled by the broker meanwhile
                channel.consumers[self._consumer_tag] = self._on_next_delivery
            self._receive(channel, incoming.delivery_tag, incoming.body, incoming.properties)

    async def _on_next_delivery(self, delivered: DeliveredMessage) -> None:
        if not delivered.channel.is_closed:
            self._receive(
                delivered.channel,
                delivered.delivery_tag,
                delivered.body,
                delivered.header.properties,
            )

    def _receive(
        self, channel: AbstractChannel, tag: int | None, body: bytes, properties: Basic.Properties
    ) -> None:
        assert tag is not None  # only the answers to a basic.get may lack it
        deliveries = self._track(channel)
        headers: dict[str, Any] = properties.headers or {}
        message = Message(
            body,
            properties.message_id or uuid.uuid4().hex,
            properties.message_type or "",
            headers,
            _failures(headers) + 1,
            _Receipt(deliveries, tag, properties),
        )
        deliveries.add(tag, message)
        if self._returning:
            deliveries.requeue(tag)
            self.requeued_count += 1
        else:
            self.buffer.put(message)

    async def __anext__(self) -> Message:
        while True:
            message = await self.buffer.get()
            if not message.receipt.settled:
                return message
            self.buffer.done(message)

    async def stop(self) -> None:
        if self._queue is None or self._cancelling is not None:
            return
        connected = self._consumes
        self._cancelling = asyncio.create_task(self._queue.cancel(self._consumer_tag))
        self._cancelling.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.wait({self._cancelling}, timeout=CANCEL_SECONDS if connected else 0)
        self._returning = True
        for message in self.buffer.take_all():
            if not message.receipt.settled:
                await self.requeue(message)
        self.buffer.close()
        if self._deliveries is not None and connected:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._deliveries.written.wait()

    # -- settling

    async def ack(self, message: Message) -> None:
        if self._in_flight(message, "ack"):
            message.receipt.deliveries.ack(message.receipt.tag)

    async def requeue(self, message: Message) -> None:
        if self._in_flight(message, "requeue"):
            message.receipt.deliveries.requeue(message.receipt.tag)
            self.requeued_count += 1

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        """As in `Source`. A delay beyond the longest of the back-off is cut to that.

        Behind others with the same back-off a message may wait for up to that back-off.
        """
        ms = max(1, math.ceil(delay_seconds * 1000))
        step = next((step for step in self._retries if step >= ms), max(self._retries))
        await self._move(message, self._retries[step], {REASON: reason}, min(ms, step))

    async def reject(self, message: Message, reason: str) -> None:
        # Whole seconds: a float in a header has 32 bits, so it would be a minute off.
        death = {REASON: reason, DEAD_LETTERED_AT: int(time.time())}
        await self._move(message, self._dead, death)

    async def _move(
        self,
        message: Message,
        queue: str,
        headers: dict[str, Any],
        expiration_ms: int | None = None,
    ) -> None:
        if not self._in_flight(message, queue):
            return
        deliveries, tag, properties = message.receipt
        properties = _copy(properties, {**message.headers, **headers, ATTEMPTS: message.attempt})
        properties.message_id = message.id
        properties.expiration = None if expiration_ms is None else str(expiration_ms)
        try:
            # However long it takes: a message that is given back meanwhile would be there twice in the end.
            try:
                await self._publish(queue, message.body, properties, within_seconds=None)
            except BrokerRefused:
                await self._declare_topology()
                await self._publish(queue, message.body, properties, within_seconds=None)
        except BrokerError as error:
            log.warning("settlement_lost", id=message.id, settlement=queue, reason=str(error))
            await asyncio.sleep(1)  # it is delivered again at once: not at full speed
            await self.requeue(message)
        else:
            deliveries.ack(tag)

    def _in_flight(self, message: Message, settlement: str) -> bool:
        if message.receipt.settled:
            log.warning("settlement_lost", id=message.id, settlement=settlement)
            return False
        return True

    # -- publishing

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        for start in range(0, len(messages), PUBLISH_AT_ONCE):
            await self._publish_all(
                (
                    message.body,
                    Basic.Properties(
                        headers=dict(message.headers),
                        message_id=message.id,
                        message_type=message.type or None,
                        delivery_mode=PERSISTENT,
                    ),
                )
                for message in messages[start : start + PUBLISH_AT_ONCE]
            )

    async def _publish_all(self, messages: Iterable[tuple[bytes, Basic.Properties]]) -> None:
        publishing = [self._publish(self.settings.source, *message) for message in messages]
        for outcome in await asyncio.gather(*publishing, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _publish(
        self,
        queue: str,
        body: bytes,
        properties: Basic.Properties,
        within_seconds: float | None = ANSWER_SECONDS,
    ) -> None:
        """Returns when the broker has confirmed it. Raises BrokerRefused if it has no such queue."""
        async with self._asking(CONNECT_SECONDS):
            await self._publisher.open()
        async with self._asking(within_seconds):
            try:
                await self._publisher.publish(queue, body, properties)
            except (TypeError, ValueError, OverflowError) as error:
                msg = f"this message cannot be sent: {error}"
                raise BrokerRefused(msg) from error

    # -- dead letters

    @asynccontextmanager
    async def _dead_letter_queue(self) -> AsyncIterator[AbstractQueue]:
        async with self._channel() as channel:
            yield await channel.get_queue(self._dead, ensure=False)

    async def _take(
        self, queue: AbstractQueue, limit: int
    ) -> AsyncIterator[AbstractIncomingMessage]:
        """What is not acknowledged goes back when the queue's channel is closed."""
        for _ in range(limit):
            async with self._asking():
                incoming = await queue.get(fail=False)
            if incoming is None:
                return
            yield incoming

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        async with self._dead_letter_queue() as queue:
            async for incoming in self._take(queue, limit):
                yield _dead_letter(incoming)

    async def count_dead_letters(self) -> int:
        messages, _ = await self._count(self._dead)
        return messages

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        left = await self.count_dead_letters()
        moved = 0
        async with self._dead_letter_queue() as queue:
            while batch := [m async for m in self._take(queue, min(left, PUBLISH_AT_ONCE))]:
                await self._publish_all(
                    (dead.body, _copy(dead.properties, _without_history(dead.headers)))
                    for dead in batch
                )
                async with self._asking():
                    await batch[-1].ack(multiple=True)
                left -= len(batch)
                moved += len(batch)
                yield moved

    async def purge_dead_letters(self) -> AsyncIterator[int]:
        async with self._dead_letter_queue() as queue, self._asking():
            count = (await queue.purge()).message_count or 0
        yield count


def _parse_url(text: str) -> Any:
    url = None
    with suppress(ValueError):
        url = make_url(text)
    if url is None or not url.host or (url.user is None and "@" in url.raw_path_qs + url.fragment):
        # Without the URL, and without its parser's error: each may hold a part of the password.
        msg = (
            "CONSUMER_BROKER_URL: not like amqp://user:password@host:5672/vhost; in a user name, a password "
            "or a virtual host, characters like @ : / ? # % are percent-encoded"
        )
        raise BrokerRefused(msg)
    return url if "heartbeat" in url.query else make_url(url, heartbeat=HEARTBEAT_SECONDS)


def delays_ms(first_seconds: float, longest_seconds: float) -> list[int]:
    """The delays of the back-off, doubling; with larger steps where that would be too many queues."""
    factor = max(2.0, (longest_seconds / first_seconds) ** (1 / (MOST_DELAYS - 1)))
    delays = takewhile(
        lambda seconds: seconds < longest_seconds * 0.999,
        (first_seconds * factor**k for k in count()),
    )
    return sorted({max(1, math.ceil(seconds * 1000)) for seconds in [*delays, longest_seconds]})


def _failures(headers: Any) -> int:
    value = headers.get(ATTEMPTS, 0)
    return value if isinstance(value, int) and value > 0 else 0


def _without_history(headers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in headers.items() if not name.startswith(HISTORY)}


def _copy(properties: Basic.Properties, headers: dict[str, Any]) -> Basic.Properties:
    """What is needed to publish the same message again with these headers."""
    copied = copy.copy(properties)
    copied.headers = _encodable(headers)
    copied.headers.pop("CC", None)  # the broker would deliver to those queues once more
    copied.headers.pop("x-delivery-count", None)  # the broker's count of the old delivery
    copied.user_id = None  # the broker refuses any but our own
    copied.expiration = None
    copied.delivery_mode = PERSISTENT
    return copied


def _encodable(value: Any) -> Any:
    """Text in headers that is not UTF-8 arrives as bytes, which aio-pika sends only as a bytearray."""
    if isinstance(value, bytes):
        return bytearray(value)
    if isinstance(value, dict):
        return {name: _encodable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return value


def _dead_letter(incoming: AbstractIncomingMessage) -> DeadLetter:
    headers: dict[str, Any] = dict(incoming.headers)
    reason, dead_lettered_at = headers.get(REASON), headers.get(DEAD_LETTERED_AT)
    if dead_lettered_at is None and headers.get("x-death"):  # the broker gave it up, not a handler
        death = headers["x-death"][0]
        reason = f"given up by the broker: {death.get('reason')}"
        if isinstance(death.get("time"), datetime):
            dead_lettered_at = death["time"].timestamp()
    return DeadLetter(
        body=incoming.body,
        id=incoming.message_id or "",
        type=incoming.type or "",
        reason=str(reason or ""),
        attempts=_failures(headers),
        dead_lettered_at=float(dead_lettered_at or 0),
    )
