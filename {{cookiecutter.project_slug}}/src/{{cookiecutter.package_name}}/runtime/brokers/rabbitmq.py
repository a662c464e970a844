# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""RabbitMQ 3.10 or later, by aio-pika: a quorum queue, its dead letters, and queues that delay retries.

``amqp://user:password@host:5672/vhost``, or ``amqps://`` with ``?cafile=ca.pem&certfile=me.pem&keyfile=me.key``.
What a password or a virtual host may not hold in a URL is percent-encoded.

For ``CONSUMER_SOURCE=orders`` the queues are ``orders``, ``orders.dead``, and one ``orders.retry.<milliseconds>``
for each step of the back-off. A retry or a dead letter is published, and confirmed, before the delivery is
acknowledged: a crash in between makes a duplicate, never a loss. After an outage exactly the messages
that were in hand come again.
"""

import asyncio
import copy
import logging
import math
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from itertools import count, takewhile
from ssl import SSLError
from typing import Any, ClassVar, NamedTuple, Self

import structlog
from aio_pika import Channel, DeliveryMode, RobustConnection
from aio_pika import Message as AmqpMessage
from aio_pika.abc import AbstractIncomingMessage, AbstractRobustChannel, AbstractRobustQueue
from aio_pika.connection import make_url
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    InvalidFrameError,
    ProbableAuthenticationError,
    PublishError,
)
from aiormq.abc import AbstractChannel
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import ChannelAccessRefused

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .source import BrokerError, BrokerRefused, BrokerUnavailable, Capabilities, Source

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer a request or to confirm a message."""
CANCEL_SECONDS = 1.5
CLOSE_SECONDS = 2.0
HEARTBEAT_SECONDS = 20
LONGEST_PAUSE_SECONDS = 5.0
"""Between two attempts to reconnect."""
CHECK_SECONDS = 2.0
PUBLISH_AT_ONCE = 100

ATTEMPTS = "x-consumer-attempts"
"""Header: how often a handler failed on the message. The broker's own counters count deliveries."""
REASON = "x-consumer-reason"
DIED_AT = "x-consumer-died-at"
NOT_OF_A_NEW_MESSAGE = (ATTEMPTS, REASON, DIED_AT, "x-death", "x-delivery-count")

# Each give-back and each crash costs one delivery on brokers before 4.3, and 4.x would stop at 20. A message
# that kills its process each time must end somewhere; hundreds of rolling restarts must not end it.
DELIVERY_LIMIT = 1000
# Listing dead letters delivers them, and beyond the limit they would be dropped.
DEAD_LETTER_DELIVERY_LIMIT = 1_000_000
MOST_DELAYS = 12

log = structlog.get_logger()

for _name in ("aio_pika", "aiormq"):
    # They log a traceback for each attempt to reconnect. What matters of it is logged here, once.
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.CRITICAL)


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


class _Deliveries:
    """The unsettled deliveries of one channel, and the one task that tells the broker their fate.

    What is settled in quick succession travels together, acks of a run without gaps as one frame. There
    is one writer, so that an ack of a run never overtakes a message of it that was given back.
    """

    def __init__(self, channel: AbstractChannel, prefetch: int) -> None:
        self.channel = channel
        self._most_acks = max(1, prefetch // 2)
        self._unsettled: dict[int, Message] = {}  # by delivery tag, in the order of delivery
        self._acked: set[int] = set()
        self._returned: list[int] = []
        self._work = asyncio.Event()
        self.written = asyncio.Event()
        self.written.set()
        self._writer = asyncio.create_task(self._write(), name="rabbitmq-settlements")
        channel.closing.add_done_callback(lambda _: self.close())

    def add(self, tag: int, message: Message) -> None:
        self._unsettled[tag] = message

    def __contains__(self, tag: int) -> bool:
        return tag in self._unsettled and tag not in self._acked

    def ack(self, tag: int) -> None:
        if tag in self:
            self._acked.add(tag)
            self._wake()

    def give_back(self, tag: int) -> None:
        if tag in self:
            del self._unsettled[tag]
            self._returned.append(tag)
            self._wake()

    def close(self) -> None:
        self._writer.cancel()
        for tag in self._acked:
            log.warning("settlement_lost", id=self._unsettled[tag].id, settlement="ack")
        self._acked.clear()

    def _wake(self) -> None:
        self.written.clear()
        self._work.set()

    async def _write(self) -> None:
        while await self._work.wait():
            seen = 0
            while seen < len(self._acked) < self._most_acks:
                seen = len(self._acked)
                await asyncio.sleep(0)
            self._work.clear()
            returned, self._returned = self._returned, []
            acked, self._acked = self._acked, set()
            through = 0
            for tag in takewhile(acked.__contains__, self._unsettled):
                through = tag
            for tag in acked:
                del self._unsettled[tag]
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
    incoming: AbstractIncomingMessage
    tag: int

    @property
    def stale(self) -> bool:
        """Whether the channel is gone: then the broker has requeued the message."""
        return self.deliveries.channel.is_closed


class RabbitSource(Source):
    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=True, attempts=True, give_back=True, dead_letters=True
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL makes no sense."""
        super().__init__(settings, prefetch)
        self._url = _parse_url(settings.broker_url.get_secret_value())
        self._broker = str(self._url.with_user(None).with_query(None))
        self._queues = _topology(settings)
        self._retry_queues = {
            arguments["x-message-ttl"]: name
            for name, arguments in self._queues.items()
            if "x-message-ttl" in arguments
        }
        self._may_declare = True
        self._socket = _Socket()
        self._connection: RobustConnection | None = None
        self._publishing: AbstractRobustChannel | None = None
        self._consuming: AbstractRobustChannel | None = None
        self._queue: AbstractRobustQueue | None = None
        self._consumer_tag = ""
        self._deliveries: _Deliveries | None = None
        self._cancelling: asyncio.Task[Any] | None = None
        self._returning = False  # what comes late, after the stop, goes back at once
        self._online = False
        self._checks: asyncio.TimerHandle | None = None

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        # As connect_robust() does, but with a hand on the connection when it fails, and on its socket.
        self._connection = RobustConnection(
            self._url, client_properties={"connection_name": self.settings.source}
        )
        self._connection.kwargs = {**self._connection.kwargs, "transport_factory": self._socket}
        try:
            async with self._asking(CONNECT_SECONDS):
                await self._connection.connect()
            await self._declare_topology()
            async with self._asking():
                publishing = self._connection.channel(on_return_raises=True)
                await publishing.initialize()
                self._publishing = publishing
        except BaseException:
            await self._close()
            raise
        self._connection.close_callbacks.add(self._on_connection_lost)
        self._connection.reconnect_callbacks.add(self._on_reconnected)
        self._check()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._close()

    async def _close(self) -> None:
        if self._checks is not None:
            self._checks.cancel()
        self._online = False
        closing = asyncio.create_task(self._close_politely(), name="rabbitmq-close")
        try:
            await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
        finally:
            if not closing.done():
                self._socket.cut()
        await asyncio.wait({closing}, timeout=0.5)
        closing.cancel()
        if self._cancelling is not None:
            self._cancelling.cancel()
        if self._deliveries is not None:
            self._deliveries.close()

    async def _close_politely(self) -> None:
        assert self._connection is not None
        with suppress(Exception):
            if self._deliveries is not None and not self._deliveries.channel.is_closed:
                await self._deliveries.written.wait()
                assert self._consuming is not None
                # The broker's answer proves that it has taken every settlement.
                await self._consuming.close()
        with suppress(Exception):
            await self._connection.close()

    @asynccontextmanager
    async def _asking(self, seconds: float = ANSWER_SECONDS) -> AsyncIterator[None]:
        """Bounds a request to the broker, and makes whatever goes wrong a BrokerError."""
        task = asyncio.current_task()
        assert task is not None
        cancelling_before = task.cancelling()
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            msg = f"{self._broker} gave no answer within {seconds:g} seconds"
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
        if isinstance(error, InvalidFrameError):  # aiormq loses the reason of Connection.Close here
            return BrokerRefused(
                f"{self._broker} refused the virtual host: it is not there, or not for this user"
            )
        if isinstance(error, PublishError):
            return BrokerRefused(f"{self._broker} has no queue for a message: {error}")
        if isinstance(error.__cause__, SSLError):
            return BrokerRefused(f"{self._broker}: no TLS connection: {error.__cause__}")
        if isinstance(error, SSLError | FileNotFoundError | PermissionError):
            return BrokerRefused(f"{self._broker}: the URL's cafile, certfile or keyfile: {error}")
        if isinstance(error, ChannelAccessRefused | ChannelPreconditionFailed):
            return BrokerRefused(f"{self._broker} refused: {error}")
        return BrokerUnavailable(
            f"{self._broker} is not reachable: {error or type(error).__name__}"
        )

    @property
    def connected(self) -> bool:
        connection, deliveries = self._connection, self._deliveries
        if connection is None or not connection.connected.is_set():
            return False
        if self._publishing is None or self._publishing.is_closed:
            return False
        if deliveries is None or self._cancelling is not None:
            return True
        return (
            not deliveries.channel.is_closed and self._consumer_tag in deliveries.channel.consumers  # type: ignore[attr-defined]
        )

    def _check(self) -> None:
        """Log a change of `connected`, and cut a connection on which aio-pika could not restore everything.

        Then all is made new; and that, aio-pika tries for as long as it takes.
        """
        assert self._connection is not None
        was_online, self._online = self._online, self.connected
        if self._online and not was_online:
            log.info("connected", broker=self._broker)
        elif not self._online:
            if was_online:
                log.warning("reconnecting", broker=self._broker, reason="deliveries stopped")
            elif self._connection.connected.is_set():
                self._socket.cut()
        if self._checks is not None:
            self._checks.cancel()
        self._checks = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._check)

    def _on_connection_lost(self, _: object, error: BaseException | None = None) -> None:
        assert self._connection is not None
        self._connection.reconnect_interval = random.uniform(0.5, LONGEST_PAUSE_SECONDS)
        if isinstance(error, ChannelAccessRefused | ChannelPreconditionFailed):
            self.buffer.fail(self._explain(error))  # it is not the same topology any more
        if self._online:
            self._online = False
            reason = str(error or "") or type(error).__name__
            log.warning("reconnecting", broker=self._broker, reason=reason)

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
        assert self._connection is not None
        channel = Channel(self._connection, publisher_confirms=False)
        async with self._asking():
            await channel.initialize()
        try:
            yield channel
        finally:
            async with self._asking():
                await channel.close()

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
                await self._count(name)  # it may be there, made by those who may
                self._may_declare = False

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
        assert self._connection is not None
        assert self._connection.transport is not None
        server: Any = self._connection.transport.connection.server_properties
        described: dict[str, int | str] = {"server": f"{server['product']} {server['version']}"}
        for name in self._queues:
            messages, consumers = await self._count(name)
            described[name] = messages
            if name == self.settings.source:
                described[f"{name} consumers"] = consumers
        return described

    # -- consuming

    async def start(self) -> None:
        assert self._connection is not None
        name = self.settings.source
        async with self._asking():
            self._consuming = self._connection.channel(publisher_confirms=False)
            await self._consuming.initialize()
            await self._consuming.set_qos(prefetch_count=self.prefetch)
            self._queue = await self._consuming.declare_queue(
                name,
                durable=True,
                arguments=self._queues[name],
                passive=not self._may_declare,
            )
            self._consumer_tag = await self._queue.consume(self._on_delivery)
            self._consuming.reopen_callbacks.add(self._on_reopened)
            await self._on_reopened()

    async def _on_reopened(self, _: object = None) -> None:
        assert self._consuming is not None
        self._track(await self._consuming.get_underlay_channel())

    def _track(self, channel: AbstractChannel) -> _Deliveries:
        if self._deliveries is None or self._deliveries.channel is not channel:
            self._deliveries = _Deliveries(channel, self.prefetch)
        return self._deliveries

    async def _on_delivery(self, incoming: AbstractIncomingMessage) -> None:
        tag = incoming.delivery_tag
        assert tag is not None
        try:
            deliveries = self._track(incoming.channel)
        except RuntimeError:  # the channel is gone already
            return
        headers = incoming.headers
        message = Message(
            incoming.body,
            incoming.message_id or uuid.uuid4().hex,
            incoming.type or "",
            headers,
            _failures(headers) + 1,
            _Receipt(deliveries, incoming, tag),
        )
        deliveries.add(tag, message)
        if self._returning:
            deliveries.give_back(tag)
            self.returned_count += 1
        else:
            self.buffer.put(message)

    async def __anext__(self) -> Message:
        while True:
            message = await self.buffer.get()
            if not message.receipt.stale:
                return message

    async def stop(self) -> None:
        if self._queue is None or self._cancelling is not None:
            return
        connected = self.connected
        self._cancelling = asyncio.create_task(self._queue.cancel(self._consumer_tag))
        self._cancelling.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.wait({self._cancelling}, timeout=CANCEL_SECONDS if connected else 0)
        self._returning = True
        for message in self.buffer.take_all():
            await self.give_back(message)
        self.buffer.close()
        if self._deliveries is not None and connected:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._deliveries.written.wait()

    # -- settling

    async def ack(self, message: Message) -> None:
        deliveries, _, tag = message.receipt
        if not self._lost(message, "ack"):
            deliveries.ack(tag)

    async def give_back(self, message: Message) -> None:
        deliveries, _, tag = message.receipt
        if not self._lost(message, "give_back"):
            deliveries.give_back(tag)
            self.returned_count += 1

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        """As in `Source`. A delay beyond the longest of the back-off is cut to that.

        Behind others with the same back-off a message may wait for up to that back-off.
        """
        ms = max(1, math.ceil(delay_seconds * 1000))
        ttl_ms = next((ttl for ttl in self._retry_queues if ttl >= ms), max(self._retry_queues))
        await self._move(message, self._retry_queues[ttl_ms], {REASON: reason}, min(ms, ttl_ms))

    async def reject(self, message: Message, reason: str) -> None:
        await self._move(
            # Whole seconds: a float header has 32 bits, so it would be a minute off.
            message,
            _dead(self.settings.source),
            {REASON: reason, DIED_AT: int(time.time())},
        )

    async def _move(
        self,
        message: Message,
        queue: str,
        headers: dict[str, Any],
        expiration_ms: int | None = None,
    ) -> None:
        if self._lost(message, "move"):
            return
        deliveries, incoming, tag = message.receipt
        moved = _copy(incoming, {**headers, ATTEMPTS: message.attempt})
        moved.message_id = message.id
        moved.expiration = None if expiration_ms is None else expiration_ms / 1000
        try:
            try:
                await self._publish(moved, queue)
            except BrokerRefused:
                await self._declare_topology()
                await self._publish(moved, queue)
        except BrokerError as error:
            log.warning("settlement_lost", id=message.id, settlement=queue, reason=str(error))
            await asyncio.sleep(1)  # it comes again at once: not at full speed
            await self.give_back(message)
        else:
            deliveries.ack(tag)

    def _lost(self, message: Message, settlement: str) -> bool:
        deliveries, _, tag = message.receipt
        if message.receipt.stale or tag not in deliveries:
            log.warning("settlement_lost", id=message.id, settlement=settlement)
            return True
        return False

    # -- publishing

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        for start in range(0, len(messages), PUBLISH_AT_ONCE):
            await self._publish_all(
                AmqpMessage(
                    message.body,
                    headers=dict(message.headers),
                    message_id=message.id,
                    type=message.type,
                    delivery_mode=DeliveryMode.PERSISTENT,
                )
                for message in messages[start : start + PUBLISH_AT_ONCE]
            )

    async def _publish_all(self, messages: Any) -> None:
        publishing = [self._publish(message, self.settings.source) for message in messages]
        for outcome in await asyncio.gather(*publishing, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _publish(self, message: AmqpMessage, queue: str) -> None:
        assert self._publishing is not None
        async with self._asking():
            await self._publishing.default_exchange.publish(message, routing_key=queue)

    # -- dead letters

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        async with self._channel() as channel:
            queue = await channel.get_queue(_dead(self.settings.source), ensure=False)
            for _ in range(limit):
                async with self._asking():
                    incoming = await queue.get(fail=False)
                if incoming is None:
                    return
                yield _dead_letter(incoming)

    async def count_dead_letters(self) -> int:
        messages, _ = await self._count(_dead(self.settings.source))
        return messages

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        left = await self.count_dead_letters()
        moved = 0
        async with self._channel() as channel:
            queue = await channel.get_queue(_dead(self.settings.source), ensure=False)
            while left > moved:
                batch: list[AbstractIncomingMessage] = []
                async with self._asking():
                    while len(batch) < min(left - moved, PUBLISH_AT_ONCE):
                        if (incoming := await queue.get(fail=False)) is None:
                            left = 0
                            break
                        batch.append(incoming)
                if not batch:
                    return
                await self._publish_all(_copy(incoming) for incoming in batch)
                async with self._asking():
                    await batch[-1].ack(multiple=True)
                moved += len(batch)
                yield moved

    async def purge_dead_letters(self) -> int:
        async with self._channel() as channel, self._asking():
            queue = await channel.get_queue(_dead(self.settings.source), ensure=False)
            return (await queue.purge()).message_count or 0


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


def _dead(source: str) -> str:
    return f"{source}.dead"


def _topology(settings: ConsumerSettings) -> dict[str, dict[str, Any]]:
    """The arguments of each queue; what dead-letters comes after what it dead-letters to."""

    def dead_lettering_to(queue: str) -> dict[str, Any]:
        return {
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",  # at-least-once is ignored without it
        }

    quorum = {"x-queue-type": "quorum"}
    source = settings.source
    dead = _dead(source)
    topology: dict[str, dict[str, Any]] = {
        dead: quorum | {"x-delivery-limit": DEAD_LETTER_DELIVERY_LIMIT},
        source: quorum | {"x-delivery-limit": DELIVERY_LIMIT} | dead_lettering_to(dead),
    }
    for ms in delays_ms(settings.retry_seconds, settings.retry_max_seconds):
        topology[f"{source}.retry.{ms}"] = (
            quorum | {"x-message-ttl": ms} | dead_lettering_to(source)
        )
    return topology


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


def _copy(incoming: AbstractIncomingMessage, headers: dict[str, Any] | None = None) -> AmqpMessage:
    """The same message to publish again: with more headers, or as a new one."""
    message: AmqpMessage = copy.copy(incoming)  # type: ignore[assignment]
    kept = dict(incoming.headers)
    if headers is None:
        kept = {name: kept[name] for name in kept if name not in NOT_OF_A_NEW_MESSAGE}
        message.expiration = None
    # The broker would deliver to every queue in CC once more, and refuses the user id of another user.
    kept.pop("CC", None)
    message.user_id = None
    message.headers = kept | (headers or {})
    message.delivery_mode = DeliveryMode.PERSISTENT
    return message


def _dead_letter(incoming: AbstractIncomingMessage) -> DeadLetter:
    headers: dict[str, Any] = dict(incoming.headers)
    reason, died_at = headers.get(REASON), headers.get(DIED_AT)
    if died_at is None and headers.get("x-death"):  # the broker gave it up, not a handler
        death = headers["x-death"][0]
        reason = f"given up by the broker: {death.get('reason')}"
        if isinstance(death.get("time"), datetime):
            died_at = death["time"].timestamp()
    return DeadLetter(
        body=incoming.body,
        id=incoming.message_id or "",
        type=incoming.type or "",
        reason=str(reason or ""),
        attempts=_failures(headers),
        died_at=float(died_at or 0),
    )
