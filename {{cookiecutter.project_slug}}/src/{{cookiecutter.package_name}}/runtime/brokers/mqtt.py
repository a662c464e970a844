# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""MQTT 5, by paho-mqtt: QoS 1, a shared subscription, and a session that outlives the connection.

MQTT promises less than every other broker here; choose it where the messages already are on it.

- A message is dealt to one consumer of the group when it is published, also to one that is away, and is never
  dealt again. It waits in the session of that consumer's client id. What a consumer did not finish, at a stop
  or a crash, comes again only when the same client id returns, and is lost when its session expires.
- What is published before the first consumer of the group has subscribed is dropped.
- A message that waits for its retry waits in a consumer, and takes one place of its prefetch.
- Dead letters are published to a topic. Who wants to keep them subscribes to it.
- The broker counts nothing: neither what waits, nor deliveries. A message that kills its process each
  time circles until somebody removes it.

``mqtt://user:password@host:1883``, or ``mqtts://`` with ``?cafile=ca.pem&certfile=me.pem&keyfile=me.key``.
More options: ``client_id``, ``session_expiry_seconds`` (a day), ``keepalive_seconds`` (20), ``leaving=true``,
which takes no new messages and handles what the session still has, before a client id is given up for good.

For ``CONSUMER_SOURCE=orders`` and ``CONSUMER_GROUP=billing`` the subscription is ``$share/billing/orders``;
retries go to ``orders/retry/billing``, which is subscribed too, and dead letters to ``orders/dead/billing``.
"""

import asyncio
import json
import re
import socket
import ssl
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import structlog
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .source import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    Capabilities,
    Connectivity,
    Source,
)

log = structlog.get_logger()

T = TypeVar("T")

_Properties: Any = Properties  # paho has no types for it

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer a request or to confirm a message."""
CLOSE_SECONDS = 2.0
KEEPALIVE_SECONDS = 20
SESSION_EXPIRY_SECONDS = 86_400
LONGEST_EXPIRY_SECONDS = 0xFFFF_FFFF  # which means: never
PUBLISH_AT_ONCE = 100
SHORT_SECONDS = 5.0
MOST_SHORT_CONNECTIONS = 5
"""Two consumers with one client id end each other's connections. After so many short ones that is over."""
MOST_UNCONFIRMED = 1000
"""Messages of QoS 0 know no prefetch: beyond so many of them waiting here, more are dropped."""

MOST_CONSUMERS = 1000
"""On one machine, of one group."""

PREFIX = "x-consumer-"
"""User properties that begin so are ours; all others are the message's headers."""
ID = f"{PREFIX}id"
TYPE = f"{PREFIX}type"
ATTEMPTS = f"{PREFIX}attempts"
"""How often a handler failed on the message."""
REASON = f"{PREFIX}reason"
DEAD_LETTERED_AT = f"{PREFIX}died-at"
NOT_BEFORE = f"{PREFIX}not-before"
"""When a retry may be handled; like `DEAD_LETTERED_AT` in Unix seconds."""
TOPIC = f"{PREFIX}topic"
"""Where a message that is retried or dead was first published."""
IN_JSON = f"{PREFIX}json"
"""The names of the user properties whose value is JSON, as they are no plain text; a list in JSON itself."""
TOPIC_HEADER = "mqtt-topic"
"""Only for a source with wildcards: the topic of the message."""

MOST_BYTES_OF_TEXT = 65_535
COPIED = (
    "PayloadFormatIndicator",
    "MessageExpiryInterval",
    "ContentType",
    "ResponseTopic",
    "CorrelationData",
)

NO_SUBSCRIBER = 0x10
PROTOCOL_ERROR = 0x82
SESSION_TAKEN_OVER = 0x8E
TRY_AGAIN = {0x80, 0x83, 0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F}
"""Refusals of a connection that may pass: unspecified, busy, quota exceeded, another server, and the like."""


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> Source:
    """Raises BrokerRefused if the URL or the topic make no sense."""
    return MqttSource(settings, prefetch)


class _Address(NamedTuple):
    """What the URL says."""

    host: str
    port: int
    user: str | None
    password: str | None
    tls: Mapping[str, str] | None
    client_id: str
    session_expiry_seconds: int
    keepalive_seconds: int
    leaving: bool

    @property
    def broker(self) -> str:
        """For people, so without credentials."""
        return f"mqtt{'s' if self.tls is not None else ''}://{self.host}:{self.port}"


class _Connection:
    """One MQTT connection, from CONNECT to its end: paho's client, driven by the event loop.

    ``receive_maximum`` makes it a consumer's, with a session; without, it leaves nothing at the broker.
    """

    def __init__(
        self,
        address: _Address,
        client_id: str,
        receive_maximum: int | None,
        on_message: "Callable[[_Connection, MQTTMessage], None]",
        on_end: Callable[[], None],
    ) -> None:
        self._address = address
        self._receive_maximum = receive_maximum
        self.consuming = receive_maximum is not None
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._file = -1
        self._timer: asyncio.TimerHandle | None = None
        self._packets = 0
        self._greeting: asyncio.Future[bool | BrokerError] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[int | BrokerError]] = {}
        self._room = asyncio.Semaphore(PUBLISH_AT_ONCE)
        self.ended: asyncio.Future[BrokerError | None] = self._loop.create_future()
        """Why, unless it was ended on purpose."""

        def deliver(_client: Client, _userdata: Any, message: MQTTMessage) -> None:
            self._packets += 1
            on_message(self, message)

        client = self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            protocol=MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.connect_timeout = CONNECT_SECONDS
        client.max_inflight_messages_set(0)  # there is `_room`, which knows what the broker allows
        client.username_pw_set(address.user, address.password)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = deliver
        client.on_publish = self._on_puback
        client.on_subscribe = client.on_unsubscribe = self._on_suback

    # -- the socket

    async def open(self) -> bool:
        """Returns whether the broker has a session of this client. Raises BrokerUnavailable or BrokerRefused."""
        broker = self._address.broker
        greeting: bool | BrokerError
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await _in_thread(self._connect)
                self._attach()
                greeting = await self._greeting
        except TimeoutError:
            greeting = self._silent(CONNECT_SECONDS)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            greeting = BrokerUnavailable(f"{broker}: {error}")
        except ssl.SSLError as error:
            greeting = BrokerRefused(f"{broker}: no TLS connection: {error}")
        except OSError as error:
            greeting = BrokerUnavailable(f"{broker}: {error}")
        except asyncio.CancelledError:
            self.end()
            raise
        if isinstance(greeting, BrokerError):
            self.end()
            raise greeting
        return greeting

    def _connect(self) -> None:
        """Blocks: it resolves the name, and shakes hands for TLS."""
        properties = _Properties(PacketTypes.CONNECT)
        if self._receive_maximum is not None:
            properties.ReceiveMaximum = self._receive_maximum
            properties.SessionExpiryInterval = self._address.session_expiry_seconds
        tls = None if self._address.tls is None else _tls_context(self._address.tls)
        if tls is not None:
            self._client.tls_set_context(tls)
        try:
            self._client.connect(
                self._address.host,
                self._address.port,
                self._address.keepalive_seconds,
                clean_start=not self.consuming,
                properties=properties,
            )
        except BaseException:
            if tls is not None and tls.wrapped is not None:
                tls.wrapped.close()
            raise
        if self.ended.done() and (abandoned := self._client.socket()) is not None:
            abandoned.close()

    def _attach(self) -> None:
        opened = self._client.socket()
        if opened is None:  # paho has seen an error already
            self.end(self._lost())
            return
        if isinstance(opened, socket.socket):  # acks are small, and nobody answers them
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = opened.fileno()
        self._loop.add_reader(self._file, self._read)
        self._client.on_socket_register_write = self._write_soon
        self._client.on_socket_close = lambda *_: self._detach()
        self._keep_alive()

    def _detach(self) -> None:
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            self._loop.remove_writer(self._file)
            self._file = -1
        if self._timer is not None:
            self._timer.cancel()

    def _read(self) -> None:
        packets = -1
        while packets < self._packets and not self.ended.done():
            # Until nothing more comes: a turn of the event loop for each packet would cost more.
            packets = self._packets
            self._step(self._client.loop_read)
            decrypted = self._client.socket()
            if isinstance(decrypted, ssl.SSLSocket) and decrypted.pending():
                packets = -1

    def _write_soon(self, *_: object) -> None:
        self._loop.call_soon(self._write)

    def _write(self) -> None:
        if self._file >= 0:
            self._step(self._client.loop_write)
        if self._file >= 0:
            if self._client.want_write():
                self._loop.add_writer(self._file, self._write)
            else:
                self._loop.remove_writer(self._file)

    def _keep_alive(self) -> None:
        self._step(self._client.loop_misc)
        if not self.ended.done():
            seconds = min(1.0, self._address.keepalive_seconds / 4)
            self._timer = self._loop.call_later(seconds, self._keep_alive)

    def _step(self, step: Callable[[], object]) -> None:
        """What goes wrong in a callback of the event loop ends the connection: nobody else would learn of it."""
        try:
            step()
        except OSError as error:
            self.end(self._lost(error))
        except Exception as error:  # the same bytes would bring it again
            reason = f"{type(error).__name__}: {error}"
            failure = BrokerRefused(f"{self._address.broker} sent what cannot be read: {reason}")
            failure.__cause__ = error
            self.end(failure)

    def _lost(self, reason: object = "") -> BrokerUnavailable:
        reason = f": {reason}" if str(reason) else ""
        return BrokerUnavailable(f"{self._address.broker}: the connection was lost{reason}")

    def end(self, error: BrokerError | None = None) -> None:
        """Close the socket, whatever the broker does; a second end is none."""
        if self.ended.done():
            return
        self._detach()
        self._client.on_socket_register_write = self._client.on_socket_close = None
        if (opened := self._client.socket()) is not None:
            opened.close()
        waiting: list[asyncio.Future[Any]] = [self._greeting, *self._answers.values()]
        for answer in waiting:
            if not answer.done():
                answer.set_result(error or self._lost())
        self.ended.set_result(error)
        self._on_end()

    async def close(self) -> None:
        """Returns when the broker has all that was sent, or when the time is up."""
        with suppress(BrokerError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                # The broker answers in order: after this it has seen every acknowledgement.
                await self.unsubscribe([f"{PREFIX}nothing"])
                self._client.disconnect()
                await asyncio.shield(self.ended)
        self.end()

    # -- what the broker says

    def _on_connect(
        self, _client: Client, _userdata: Any, flags: Any, code: ReasonCode, properties: Any
    ) -> None:
        broker = self._address.broker
        greeting: bool | BrokerError = bool(flags.session_present)
        if code.is_failure:
            kind = BrokerUnavailable if code.value in TRY_AGAIN else BrokerRefused
            greeting = kind(f"{broker} refused the connection: {code}")
        elif getattr(properties, "MaximumQoS", 1) < 1:
            greeting = BrokerRefused(f"{broker} confirms no messages: it offers only QoS 0")
        elif not getattr(properties, "SharedSubscriptionAvailable", 1):
            greeting = BrokerRefused(f"{broker} has no shared subscriptions")
        self._room = asyncio.Semaphore(
            min(PUBLISH_AT_ONCE, getattr(properties, "ReceiveMaximum", PUBLISH_AT_ONCE))
        )
        if not self._greeting.done():
            self._greeting.set_result(greeting)

    def _on_disconnect(
        self, _client: Client, _userdata: Any, flags: Any, code: ReasonCode, _properties: Any
    ) -> None:
        broker = self._address.broker
        if flags.is_disconnect_packet_from_server and code.value == SESSION_TAKEN_OVER:
            self.end(
                BrokerRefused(
                    f"{broker} gave this consumer's session to another one with the same client id: "
                    "each needs its own (?client_id= in CONSUMER_BROKER_URL)"
                )
            )
        elif flags.is_disconnect_packet_from_server:
            self.end(BrokerUnavailable(f"{broker} closed the connection: {code}"))
        elif code.value == PROTOCOL_ERROR:
            self.end(BrokerRefused(f"{broker} sent what paho-mqtt cannot read"))
        elif code.is_failure:
            self.end(self._lost(code))
        else:
            self.end()

    def _on_puback(
        self, _client: Client, _userdata: Any, mid: int, code: ReasonCode, _properties: Any
    ) -> None:
        self._packets += 1
        if (answer := self._answers.get(mid)) is not None and not answer.done():
            answer.set_result(code.value)

    def _on_suback(
        self, _client: Client, _userdata: Any, mid: int, codes: list[ReasonCode], _properties: Any
    ) -> None:
        worst = max((code.value for code in codes if code.is_failure), default=None)
        if (answer := self._answers.get(mid)) is not None and not answer.done():
            answer.set_result(min(code.value for code in codes) if worst is None else worst)

    # -- what we say

    async def subscribe(self, filters: Iterable[str]) -> int:
        """The lowest QoS that was granted, or a reason code from 128 up."""
        done, mid = self._client.subscribe([(name, 1) for name in filters])
        return await self._answer(done, mid)

    async def unsubscribe(self, filters: list[str]) -> int:
        done, mid = self._client.unsubscribe(filters)
        return await self._answer(done, mid)

    async def publish(self, topic: str, body: bytes, properties: Any) -> int:
        """The broker's reason code, when it has confirmed the message; below 128 it has it."""
        async with self._room:
            sent = self._client.publish(topic, body, qos=1, properties=properties)
            return await self._answer(sent.rc, sent.mid)

    def ack(self, mid: int) -> None:
        self._client.ack(mid, 1)

    async def _answer(self, done: MQTTErrorCode, mid: int | None) -> int:
        if self.ended.done() or done != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise self._lost()
        answer: asyncio.Future[int | BrokerError] = self._loop.create_future()
        self._answers[mid] = answer
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answered = await answer
        except TimeoutError:
            answered = self._silent(ANSWER_SECONDS)
            self.end(answered)
        finally:
            del self._answers[mid]
        if isinstance(answered, BrokerError):  # which others may get, too
            raise type(answered)(str(answered))
        return answered

    def _silent(self, seconds: float) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"{self._address.broker} gave no answer within {seconds:g} seconds"
        )


class _Receipt(NamedTuple):
    connection: _Connection
    incoming: MQTTMessage


class MqttSource(Source):
    """See the module."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=False,
        attempts=True,
        requeue=False,
        dead_letters=False,
        order=True,
        retains_before_first_consumer=False,
        competing_consumers=False,
        queue_metrics=False,
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        self._address = _parse(settings.broker_url.get_secret_value())
        self._group = settings.group or settings.source
        self._topic = settings.source
        self._has_wildcards = "+" in self._topic or "#" in self._topic
        beside = "consumer" if self._has_wildcards else self._topic
        self._retry_topic = f"{beside}/retry/{self._group}"
        self._dead_topic = f"{beside}/dead/{self._group}"
        _check_names(self._group, self._topic, [self._retry_topic, self._dead_topic])
        self._filters = [f"$share/{self._group}/{t}" for t in (self._topic, self._retry_topic)]
        self.connectivity = Connectivity(self._address.broker)
        self._client_id = ""
        self._lock: IO[str] | None = None
        self._connection: _Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._leaving = asyncio.Event()
        self._consuming = False
        self._started: asyncio.Future[None] | None = None
        self._had_session = False
        self._short_connections = 0
        self._stopped = False
        self._unacked: set[Message] = set()
        self._held: dict[Message, asyncio.TimerHandle] = {}  # retries whose time has not come

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._leaving.clear()
        self._connection = await self._connect()
        self.connectivity.established()
        self._keeper = asyncio.create_task(self._keep(), name="mqtt-keeper")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._leaving.set()
        try:
            if self._connection is not None:
                await self._connection.close()
        finally:
            if self._connection is not None:
                self._connection.end()
            if self._keeper is not None:
                self._keeper.cancel()
                await asyncio.wait({self._keeper})
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    @property
    def connected(self) -> bool:
        return self.connectivity.up and not self._leaving.is_set()

    async def _keep(self) -> None:
        try:
            await self.connectivity.keep(self._live, self._leaving)
        except Exception as failure:
            self.connectivity.up = False
            log.error("source_failed", client_id=self._client_id, reason=str(failure))
            if not self._stopped:
                self.buffer.fail(failure)
            if self._started is not None and not self._started.done():
                self._started.set_exception(failure)

    async def _live(self) -> None:
        """One connection, until it ends."""
        if self._connection is None:
            self._connection = await self._connect()
        connection = self._connection
        self.connectivity.established()
        if connection.consuming and self._started is not None and not self._started.done():
            self._started.set_result(None)
        opened_at = time.monotonic()
        reason = await asyncio.shield(connection.ended)
        self._connection = None
        if reason is None:
            return
        if time.monotonic() - opened_at > SHORT_SECONDS:
            self._short_connections = 0
        self._short_connections += connection.consuming
        if self._short_connections == MOST_SHORT_CONNECTIONS:  # not every broker says why
            msg = (
                f"{self._address.broker} ended {MOST_SHORT_CONNECTIONS} connections in a row as soon as they "
                f"were up: has another consumer the client id {self._client_id!r}?"
            )
            raise BrokerRefused(msg)
        raise reason

    async def _connect(self) -> _Connection:
        """A publisher until `start`; it must not take a consumer's client id, as that would end the consumer."""
        if not self._consuming:
            name = f"{self._group}-publisher-{uuid.uuid4().hex[:12]}"
            connection = _Connection(self._address, name, None, self._receive, self._forget)
            await connection.open()
            return connection
        connection = _Connection(
            self._address, self._client_id, self.prefetch, self._receive, self._forget
        )
        try:
            resumed = await connection.open()
            await self._subscribe(connection)
        except BaseException:
            connection.end()
            raise
        if self._had_session and not resumed:
            log.error("session_lost", client_id=self._client_id, reason="what waited in it is gone")
        log.info("session_opened", client_id=self._client_id, resumed=resumed)
        self._had_session = True
        return connection

    async def _subscribe(self, connection: _Connection) -> None:
        if self._address.leaving:
            await connection.unsubscribe(self._filters)
            return
        granted = await connection.subscribe(self._filters)
        if granted != 1:
            reason = "only QoS 0" if granted == 0 else _name_of(PacketTypes.SUBACK, granted)
            msg = f"{self._address.broker} refused the subscription {self._filters[0]}: {reason}"
            raise BrokerRefused(msg)

    def _forget(self) -> None:
        """The connection is gone: what it delivered, and nobody has settled, comes again."""
        self.buffer.take_all()
        for timer in self._held.values():
            timer.cancel()
        self._held.clear()
        self._unacked.clear()

    # -- consuming

    async def start(self) -> None:
        if self._lock is None:  # else an earlier attempt has chosen
            self._client_id, self._lock = self._choose_client_id()
        self._consuming = True
        self._started = asyncio.get_running_loop().create_future()
        if self._connection is not None:
            await self._connection.close()  # the keeper opens the consumer's
        if self._keeper is None or self._keeper.done():
            msg = f"{self._address.broker}: the connection was lost"
            raise BrokerUnavailable(msg)
        await self._started

    def _choose_client_id(self) -> tuple[str, IO[str] | None]:
        """The URL's, or one that is this machine's, and free: a lock on a file says so until we end."""
        if self._address.client_id:
            return self._address.client_id, None
        from fcntl import LOCK_EX, LOCK_NB, flock  # not on Windows; nor is the loop's add_reader

        parts = dict.fromkeys([self._group, self._topic, socket.gethostname()])
        name = "-".join(re.sub(r"[^\w.-]", "_", part) for part in parts)
        with suppress(
            OSError
        ):  # a machine without a directory for temporary files has one consumer
            directory = Path(tempfile.gettempdir())
            for number in range(MOST_CONSUMERS):
                client_id = f"{name}-{number}"
                lock = sha256(f"{self._address.broker} {client_id}".encode()).hexdigest()[:24]
                with suppress(PermissionError):  # another user's
                    file = (directory / f"mqtt-{lock}.lock").open("a")
                    try:
                        flock(file, LOCK_EX | LOCK_NB)
                    except BlockingIOError:
                        file.close()
                    else:
                        return client_id, file
        return f"{name}-0", None

    def _receive(self, connection: _Connection, incoming: MQTTMessage) -> None:
        if self._stopped:
            return  # unacknowledged, it stays in the session
        if incoming.qos == 0 and len(self.buffer) >= MOST_UNCONFIRMED:
            return
        ours, headers = _read(incoming.properties)
        if self._has_wildcards:
            headers[TOPIC_HEADER] = ours.get(TOPIC) or incoming.topic
        message = Message(
            bytes(incoming.payload),
            str(ours.get(ID) or uuid.uuid4().hex),
            str(ours.get(TYPE, "")),
            headers,
            int(_number(ours.get(ATTEMPTS))) + 1,
            _Receipt(connection, incoming),
        )
        self._unacked.add(message)
        # No longer than a retry is ever put off: the clock that said so was another machine's.
        pause = min(_number(ours.get(NOT_BEFORE)) - time.time(), self.settings.retry_max_seconds)
        if pause > 0:
            timer = asyncio.get_running_loop().call_later(pause, self._release, message)
            self._held[message] = timer
        else:
            self.buffer.put(message)

    def _release(self, message: Message) -> None:
        del self._held[message]
        self.buffer.put(message)

    async def stop(self) -> None:
        """As in `Source`; but MQTT takes nothing back: what was not started waits for this client id."""
        if self._stopped or not self._consuming:
            self._stopped = True
            self.buffer.close()
            return
        self._stopped = True
        unstarted = [*self.buffer.take_all(), *self._held]
        for timer in self._held.values():
            timer.cancel()
        self._held.clear()
        self._unacked.difference_update(unstarted)
        self.requeued_count += len(unstarted)
        self.buffer.close()
        log.info(
            "session_left",
            client_id=self._client_id,
            unstarted=len(unstarted),
            expires_after_seconds=self._address.session_expiry_seconds,
        )

    # -- settling

    async def ack(self, message: Message) -> None:
        if self._in_flight(message, "ack"):
            self._acknowledge(message)

    async def requeue(self, message: Message) -> None:
        """It stays in the session, unacknowledged, and comes again when this client id has returned."""
        if self._in_flight(message, "requeue"):
            self._unacked.remove(message)
            self.requeued_count += 1

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        """As in `Source`, but the message waits in the consumer that gets it.

        A delay beyond the longest of the back-off is cut to that.
        """
        failure = {REASON: reason, NOT_BEFORE: f"{time.time() + delay_seconds:.3f}"}
        await self._move(message, self._retry_topic, failure)

    async def reject(self, message: Message, reason: str) -> None:
        """Publish it to the topic of dead letters. When nobody subscribes to that, it is gone, and logged."""
        death = {REASON: reason, DEAD_LETTERED_AT: str(int(time.time()))}
        if not await self._move(message, self._dead_topic, death):
            log.error("dead_letter_dropped", id=message.id, topic=self._dead_topic, reason=reason)

    async def _move(self, message: Message, topic: str, ours: dict[str, str]) -> bool:
        """Publish it there, and acknowledge it when that is confirmed; returns whether anybody gets it."""
        if not self._in_flight(message, topic):
            return True
        try:
            properties = _again(message, {**ours, ATTEMPTS: str(message.attempt)})
            # A session's messages may be here before its connection is ours: before the SUBACK.
            code = await self._publish(message.receipt.connection, topic, message.body, properties)
            if code == NO_SUBSCRIBER and topic == self._retry_topic:
                msg = f"{self._address.broker} has lost the subscription to {topic}"
                raise BrokerUnavailable(msg)
        except BrokerError as error:
            log.warning("settlement_lost", id=message.id, settlement=topic, reason=str(error))
            if isinstance(error, BrokerRefused):
                self.buffer.fail(error)  # or all of the prefetch would end up here
            else:
                message.receipt.connection.end(error)  # so that it is delivered again
            return True
        if self._in_flight(message, topic):
            self._acknowledge(message)
        return code != NO_SUBSCRIBER

    def _acknowledge(self, message: Message) -> None:
        self._unacked.remove(message)
        receipt: _Receipt = message.receipt
        if receipt.incoming.qos:
            receipt.connection.ack(receipt.incoming.mid)

    def _in_flight(self, message: Message, settlement: str) -> bool:
        if message not in self._unacked:
            log.warning("settlement_lost", id=message.id, settlement=settlement)
            return False
        return True

    # -- publishing

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        """As in `Source`. Raises BrokerRefused when nobody subscribes: the broker has dropped the message."""
        if self._has_wildcards:
            msg = f"nothing can be published to {self._topic!r}: it has wildcards"
            raise BrokerRefused(msg)
        connection = self._up()
        for start in range(0, len(messages), PUBLISH_AT_ONCE):
            publishing = [
                self._publish(
                    connection,
                    self._topic,
                    message.body,
                    _properties({**message.headers, ID: message.id, TYPE: message.type}),
                )
                for message in messages[start : start + PUBLISH_AT_ONCE]
            ]
            for outcome in await asyncio.gather(*publishing, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome == NO_SUBSCRIBER:
                    msg = f"{self._address.broker} dropped it: nobody has subscribed to {self._topic!r} yet"
                    raise BrokerRefused(msg)

    async def _publish(
        self, connection: _Connection, topic: str, body: bytes, properties: Any
    ) -> int:
        code = await connection.publish(topic, body, properties)
        if code >= 128:
            reason = _name_of(PacketTypes.PUBACK, code)
            msg = f"{self._address.broker} refused a message to {topic}: {reason}"
            raise BrokerRefused(msg)
        return code

    def _up(self) -> _Connection:
        if self._connection is None:
            msg = f"{self._address.broker}: the connection was lost"
            raise BrokerUnavailable(msg)
        return self._connection

    # -- what MQTT does not know

    async def describe(self) -> dict[str, int | str]:
        self._up()
        return {
            self._topic: "MQTT does not tell how many messages wait, nor who consumes them",
            "subscription": self._filters[0],
            "retries": self._retry_topic,
            "dead letters": f"{self._dead_topic}, for those who subscribe to it",
            "session expires after": f"{self._address.session_expiry_seconds} seconds",
        }

    def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        raise self._no_dead_letters()

    async def count_dead_letters(self) -> int:
        raise self._no_dead_letters()

    def replay_dead_letters(self) -> AsyncIterator[int]:
        raise self._no_dead_letters()

    def purge_dead_letters(self) -> AsyncIterator[int]:
        raise self._no_dead_letters()

    def _no_dead_letters(self) -> BrokerRefused:
        return BrokerRefused(f"MQTT keeps no dead letters: subscribe to {self._dead_topic}")


def _parse(url: str) -> _Address:
    parts = port = None
    with suppress(ValueError):
        parts = urlsplit(url, allow_fragments=False)
        port = parts.port
    if parts is None or not parts.hostname or parts.path not in ("", "/") or "@" in parts.query:
        # Without the URL, and without its parser's error: each may hold a part of the password.
        msg = (
            "CONSUMER_BROKER_URL: not like mqtt://user:password@host:1883; in a user name or a password, "
            "characters like @ : / ? # % are percent-encoded"
        )
        raise BrokerRefused(msg)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    secure = parts.scheme == "mqtts"
    files: dict[str, str] = {
        name: options.pop(name) for name in ("cafile", "certfile", "keyfile") if name in options
    }
    if files and not secure:
        msg = "CONSUMER_BROKER_URL: cafile, certfile and keyfile are for mqtts://"
        raise BrokerRefused(msg)
    address = _Address(
        parts.hostname,
        port or (8883 if secure else 1883),
        None if parts.username is None else unquote(parts.username),
        None if parts.password is None else unquote(parts.password),
        files if secure else None,
        options.pop("client_id", ""),
        _seconds(options, "session_expiry_seconds", SESSION_EXPIRY_SECONDS, LONGEST_EXPIRY_SECONDS),
        _seconds(options, "keepalive_seconds", KEEPALIVE_SECONDS, 65_535),
        options.pop("leaving", "false") == "true",
    )
    if options:
        msg = f"CONSUMER_BROKER_URL: unknown option {min(options)!r}"
        raise BrokerRefused(msg)
    if secure:
        try:
            _tls_context(files)
        except (OSError, ValueError) as error:
            msg = f"{address.broker}: cafile, certfile or keyfile in the URL: {error}"
            raise BrokerRefused(msg) from error
    return address


def _seconds(options: dict[str, str], name: str, default: int, longest: int) -> int:
    text = options.pop(name, str(default))
    if text.isascii() and text.isdigit() and 1 <= int(text) <= longest:
        return int(text)
    msg = f"CONSUMER_BROKER_URL: {name} is a whole number from 1 to {longest}"
    raise BrokerRefused(msg)


class _TlsContext(ssl.SSLContext):
    """Remembers the socket, which paho leaves open when there is no TLS connection."""

    wrapped: ssl.SSLSocket | None = None

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        self.wrapped = super().wrap_socket(*args, **kwargs)
        return self.wrapped


def _tls_context(files: Mapping[str, str]) -> _TlsContext:
    context = _TlsContext(ssl.PROTOCOL_TLS_CLIENT)
    if "cafile" in files:
        context.load_verify_locations(files["cafile"])
    else:
        context.load_default_certs()
    if "certfile" in files:
        context.load_cert_chain(files["certfile"], files.get("keyfile"))
    return context


def _check_names(group: str, topic: str, beside: list[str]) -> None:
    if not topic or "\0" in topic or len(topic.encode()) > 60_000:
        msg = f"CONSUMER_SOURCE is not an MQTT topic: {topic!r}"
        raise BrokerRefused(msg)
    levels = topic.split("/")
    if any(level not in ("+", "#") and ("+" in level or "#" in level) for level in levels) or (
        "#" in levels[:-1]
    ):
        msg = f"CONSUMER_SOURCE: in {topic!r} a wildcard is not a level of its own"
        raise BrokerRefused(msg)
    if set(group) & set("/+#\0"):
        msg = f"CONSUMER_GROUP: MQTT allows no / + # in the name of a group, as in {group!r}"
        raise BrokerRefused(msg)
    pattern = "/".join("[^/]*" if level == "+" else re.escape(level) for level in levels)
    pattern = pattern.removesuffix(re.escape("#")) + (".*" if levels[-1] == "#" else "")
    if any(re.fullmatch(pattern, name) for name in beside):
        msg = f"CONSUMER_SOURCE: {topic!r} matches {' and '.join(beside)}, where its own retries and dead letters go"
        raise BrokerRefused(msg)


def _name_of(packet_type: int, code: int) -> str:
    with suppress(KeyError, ValueError):
        return str(ReasonCode(packet_type, identifier=code))
    return f"reason code {code}"


def _read(properties: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our user properties, and the message's own, its headers."""
    ours: dict[str, Any] = {}
    headers: dict[str, Any] = {}
    for name, value in getattr(properties, "UserProperty", ()):
        (ours if name.startswith(PREFIX) else headers)[name] = value
    if IN_JSON in ours:
        with suppress(
            ValueError, TypeError, KeyError, RecursionError
        ):  # as some other program has it
            for name in json.loads(ours[IN_JSON]):
                values = ours if name in ours else headers
                values[name] = json.loads(values[name])
    return ours, headers


def _properties(values: Mapping[str, Any], others: Any = None) -> Any:
    """The properties of a message: these as user properties, what is not plain text in JSON.

    Raises BrokerRefused if that cannot be.
    """
    pairs: list[tuple[str, str]] = []
    in_json: list[str] = []
    try:
        for name, value in values.items():
            # Brokers close the connection on control characters, and paho on U+FEFF.
            if not name.isprintable():
                msg = f"the header {name!r} is not plain text"
                raise ValueError(msg)
            if not (isinstance(value, str) and value.isprintable()):
                value = json.dumps(value)
                in_json.append(name)
            if max(len(name.encode()), len(value.encode())) > MOST_BYTES_OF_TEXT:
                msg = f"the header {name!r} is longer than {MOST_BYTES_OF_TEXT} bytes"
                raise ValueError(msg)
            pairs.append((name, value))
    except (TypeError, ValueError) as error:
        msg = f"this message cannot be sent: {error}"
        raise BrokerRefused(msg) from error
    if in_json:
        pairs.append((IN_JSON, json.dumps(in_json)))
    properties = _Properties(PacketTypes.PUBLISH)
    properties.UserProperty = pairs
    for name in COPIED:
        if hasattr(others, name):
            setattr(properties, name, getattr(others, name))
    return properties


def _again(message: Message, ours: dict[str, str]) -> Any:
    """The properties to publish the same message with once more."""
    incoming: MQTTMessage = message.receipt.incoming
    before, _ = _read(incoming.properties)
    headers = {name: value for name, value in message.headers.items() if name != TOPIC_HEADER}
    topic = before.get(TOPIC) or incoming.topic
    ours = {ID: message.id, TYPE: message.type, TOPIC: str(topic), **ours}
    return _properties({**headers, **ours}, incoming.properties)


def _number(text: Any) -> float:
    """What a property says; 0 if that is not a number above it."""
    with suppress(TypeError, ValueError, OverflowError):
        number = float(text)
        return number if 0 < number < 1e15 else 0
    return 0


async def _in_thread(job: Callable[[], T]) -> T:
    """On a thread that nobody has to wait for: neither the caller when cancelled, nor the process at its end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():
            set_outcome(outcome)

    def run() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
            try:
                result = job()
            except Exception as error:
                loop.call_soon_threadsafe(settle, done.set_exception, error)
            else:
                loop.call_soon_threadsafe(settle, done.set_result, result)

    threading.Thread(target=run, name="mqtt-connect", daemon=True).start()
    return await done
