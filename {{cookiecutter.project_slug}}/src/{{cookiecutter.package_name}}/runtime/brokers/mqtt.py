# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""MQTT 5, by paho-mqtt: QoS 1, a shared subscription, and a session that outlives the connection.

MQTT's guarantees are weaker than every other broker's here; choose it where the messages already are on it.

- A message is assigned to one consumer of the group when it is published, also to an offline one, and is never
  assigned again. It waits in the session of that consumer's client id. A message that a consumer did not settle before
  a shutdown or a crash is redelivered only when the same client id returns, and is lost when its session expires.
- A message that is published before the first consumer of the group has subscribed is dropped.
- A delayed retry waits in a consumer, and takes one place of that consumer's prefetch.
- Dead letters are published to a topic. A program that keeps them subscribes to it.
- The broker counts neither waiting messages nor deliveries. A message that kills its process is redelivered until
  an operator removes it.

``mqtt://user:password@host:1883``, or ``mqtts://`` with ``?cafile=ca.pem&certfile=me.pem&keyfile=me.key``.
More options: ``client_id``, ``session_expiry_seconds`` (a day), ``keepalive_seconds`` (20), ``leaving=true``,
which takes no new messages and handles those that the session still has, before a client id is retired.

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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, Self, TypeVar

import paho.mqtt.properties
import structlog
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable, MendableRefusal
from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .connectivity import Connectivity
from .delivery import (
    ATTEMPTS,
    DEAD_LETTERED_AT,
    KEY,
    PREFIX,
    PROPERTIES,
    PUBLISHED_AT,
    REASON,
    SHORTENED,
    fit_dead_letter,
    make_message,
    seconds_of,
    text_of,
)
from .flags import flag
from .json_values import decode_json_values
from .requests import Requests, Rule
from .source import Broker, Capabilities
from .url import TLS_OPTIONS, BrokerUrl, CurrentUrl

log = structlog.get_logger()

T = TypeVar("T")

_Properties: Any = Properties  # paho has no types for these
_VariableByteIntegers: Any = VariableByteIntegers
_SubscribeOptions: Any = SubscribeOptions

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer a request or to confirm a message."""
DENIED_SECONDS = 60.0
"""How long a publish to a topic is refused here, after the broker denied it."""
MARK_SECONDS = 1.0
"""How soon a working broker answers, or delivers a message that a consumer publishes to itself."""
CLOSE_SECONDS = 2.0
KEEPALIVE_SECONDS = 20
SESSION_EXPIRY_SECONDS = 86_400
LONGEST_EXPIRY_SECONDS = 0xFFFF_FFFF  # the session never expires
PUBLISH_AT_ONCE = 100
SHORT_SECONDS = 5.0
MOST_SHORT_CONNECTIONS = 5
"""Two consumers with one client id end each other's connections. A consumer exits after so many short connections."""
UNWITNESSED = 2
"""After so many short connections, a second one shows whether the network ends them."""
MOST_UNCONFIRMED = 1000
"""The prefetch does not bound messages of QoS 0: when this many wait in the buffer, more are dropped."""
MOST_CONSUMERS = 1000
"""On one machine, in one group."""

ID = f"{PREFIX}id"
TYPE = f"{PREFIX}type"
NOT_BEFORE = f"{PREFIX}not-before"
"""When a retry is due, in Unix seconds."""
TOPIC = f"{PREFIX}topic"
"""The topic to which a retry or a dead letter was first published."""
IN_JSON = f"{PREFIX}json"
"""The names of the user properties whose value is JSON, because it is not plain text; itself a JSON list."""
MARK = f"{PREFIX}mark"
"""Marks an empty message that a consumer publishes to the topic of retries when it starts: others ignore it."""
HISTORY = (ATTEMPTS, REASON, NOT_BEFORE, DEAD_LETTERED_AT)
"""User properties that get new values in a retry or a dead letter."""
TOPIC_HEADER = "mqtt-topic"
"""Header, only for a source with wildcards: the topic of the message."""

MOST_BYTES_OF_TEXT = 65_535
LARGEST_PACKET = 268_435_460
"""The limit of the protocol."""
NATIVE = {
    "ContentType": "content_type",
    "CorrelationData": "correlation_id",
    "ResponseTopic": "reply_to",
}
"""The protocol's properties that carry fields of a message."""
COPIED = (*NATIVE, "PayloadFormatIndicator", "MessageExpiryInterval")

NO_SUBSCRIBER = 0x10
PROTOCOL_ERROR = 0x82
NOT_AUTHORIZED = 0x87
DENIALS = {0x86, NOT_AUTHORIZED, 0x8A, 0x8C}
"""Refusals of a login: a wrong password, a missing right, a ban, another method."""
SESSION_TAKEN_OVER = 0x8E
PACKET_TOO_LARGE = 0x95
TRY_AGAIN = {0x80, 0x83, 0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F}
"""Refusals of a connection that may pass: unspecified, busy, quota exceeded, use another server, and the like."""
RULES = (Rule((ssl.SSLEOFError, ssl.SSLZeroReturnError), BrokerUnavailable, "{error}"),)


def _read_text(buffer: bytes, most: int) -> tuple[str, int]:
    """The text at the start of the buffer, and how many bytes it takes."""
    end = 2 + int.from_bytes(buffer[:2], "big")
    if end > most:
        raise ValueError("a text is longer than the properties")
    return buffer[2:end].decode(), end


# paho's own function refuses U+FEFF, which MQTT allows, and checks each character in Python: a third of the time that
# paho needs to read one of the runtime's messages.
paho.mqtt.properties.readUTF = _read_text

_TABLES = vars(_Properties(PacketTypes.PUBLISH))
_NUMBERS = {name.replace(" ", ""): number for name, number in _TABLES["names"].items()}
_set_any = _Properties.__setattr__


def _init(self: Any, packet_type: int) -> None:
    vars(self).update(_TABLES, packetType=packet_type)


def _clear(self: Any) -> None:
    for name in _NUMBERS.keys() & vars(self):
        delattr(self, name)


def _set(self: Any, name: str, value: Any) -> None:
    if name == "User Property" and isinstance(value, tuple):  # as in a packet that is read
        vars(self).setdefault("UserProperty", []).append(value)
    else:
        _set_any(self, name, value)


# paho makes these tables for each packet, and searches them again and again: two thirds of the time that paho needs to
# read the properties of one of the runtime's messages.
_Properties.__init__, _Properties.clear, _Properties.__setattr__ = _init, _clear, _set
_Properties.getIdentFromName = lambda _, name: _NUMBERS.get(name, -1)


# -- messages


def _read(properties: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The runtime's user properties, and the message's headers."""
    values: dict[str, Any] = dict(getattr(properties, "UserProperty", ()))
    if IN_JSON in values:
        decode_json_values(values, values.pop(IN_JSON))
    ours = {name: value for name, value in values.items() if name.startswith(PREFIX)}
    for name in ours:
        del values[name]
    return ours, values


def _properties(values: Mapping[str, Any]) -> Any:
    """The properties of a new message: ``values`` as user properties, in JSON if they are not plain text.

    Raises BrokerRefused for a value that cannot be sent.
    """
    pairs: list[tuple[str, str]] = []
    in_json: list[str] = []
    try:
        for name, value in values.items():
            # Brokers close the connection on control characters.
            if not name.isprintable():
                raise ValueError(f"the header {name!r} is not plain text")
            if not (isinstance(value, str) and value.isprintable()):
                value = json.dumps(value)
                in_json.append(name)
            if max(len(name.encode()), len(value.encode())) > MOST_BYTES_OF_TEXT:
                raise ValueError(f"the header {name!r} is longer than {MOST_BYTES_OF_TEXT} bytes")
            pairs.append((name, value))
    except (TypeError, ValueError) as error:
        raise BrokerRefused(f"this message cannot be sent: {error}") from error
    if in_json:
        pairs.append((IN_JSON, json.dumps(in_json)))
    properties = _Properties(PacketTypes.PUBLISH)
    properties.UserProperty = pairs
    return properties


def _outgoing_properties(message: OutgoingMessage) -> Any:
    """Raises BrokerRefused."""
    values = {**message.headers, ID: message.id, TYPE: message.type}
    values[PUBLISHED_AT] = f"{time.time():.3f}"
    if message.key:
        values[KEY] = message.key
    properties = _properties(values)
    try:
        correlation = message.correlation_id.encode()
        if max(len(correlation), len(message.content_type.encode())) > MOST_BYTES_OF_TEXT:
            msg = f"its content type or correlation id is longer than {MOST_BYTES_OF_TEXT} bytes"
            raise ValueError(msg)
        if not message.content_type.isprintable():
            raise ValueError("its content type is not plain text")
    except ValueError as error:
        raise BrokerRefused(f"this message cannot be sent: {error}") from error
    if message.content_type:
        properties.ContentType = message.content_type
    if correlation:
        properties.CorrelationData = correlation
    return properties


def _fields(properties: Any, headers: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of PROPERTIES, from the protocol's properties, otherwise from headers with their names."""
    fields = {PROPERTIES[name]: headers[name] for name in PROPERTIES.keys() & headers}
    for name, field in NATIVE.items():
        if value := getattr(properties, name, None):
            fields[field] = value
    return fields


def _fault_of_topic(topic: str) -> str:
    """Why no message can be published to the topic; otherwise empty. Brokers end the connection for some faults."""
    if "+" in topic or "#" in topic or not topic.isprintable():
        return "has wildcards or is not plain text"
    if len(topic.encode()) > MOST_BYTES_OF_TEXT:
        return f"is longer than {MOST_BYTES_OF_TEXT} bytes"
    return ""


def _copied_properties(
    message: Message, history: Mapping[str, str], shortened: Mapping[str, Any] | None = None
) -> Any:
    """The properties of a retry or a dead letter; of a shortened dead letter, only those of the runtime.

    The user properties are copied unmodified: one program cannot encode every value that another one writes.
    """
    incoming: MQTTMessage = message.receipt.incoming
    before = getattr(incoming.properties, "UserProperty", ())
    if shortened:
        before = [pair for pair in before if pair[0].startswith(PREFIX)]
        history = {**history, SHORTENED: str(shortened[SHORTENED])}
    added = {ATTEMPTS: str(message.attempt), **history}
    ours, _ = _read(incoming.properties)
    if not ours.get(ID):
        added[ID] = message.id
    if not ours.get(TOPIC):
        added[TOPIC] = incoming.topic
    properties = _Properties(PacketTypes.PUBLISH)
    properties.UserProperty = [
        *(pair for pair in before if pair[0] not in HISTORY),
        *added.items(),
    ]
    for name in () if shortened else COPIED:
        if hasattr(incoming.properties, name):
            setattr(properties, name, getattr(incoming.properties, name))
    return properties


def _plain(text: str) -> str:
    """The text without control characters, on which brokers close the connection."""
    return "".join(character if character.isprintable() else " " for character in text)


def _bytes_of_packet(topic: str, body: bytes, properties: Any) -> int:
    """The bytes of the PUBLISH, with QoS 1."""
    length = 2 + len(topic.encode()) + 2 + len(properties.pack()) + len(body)
    return 5 + length  # or up to three less: the length itself has one to four bytes


def _name_of(packet_type: int, code: int) -> str:
    with suppress(KeyError, ValueError):
        return str(ReasonCode(packet_type, identifier=code))
    return f"reason code {code}"


def _check_names(group: str, topic: str, own_topics: list[str]) -> None:
    """Raises BrokerRefused."""
    if not topic or "\0" in topic or len(topic.encode()) > 60_000:
        raise BrokerRefused(f"CONSUMER_SOURCE is not an MQTT topic: {topic!r}")
    levels = topic.split("/")
    if any(level not in ("+", "#") and ("+" in level or "#" in level) for level in levels) or (
        "#" in levels[:-1]
    ):
        raise BrokerRefused(f"CONSUMER_SOURCE: in {topic!r} a wildcard must be a whole level")
    if set(group) & set("/+#\0"):
        msg = f"CONSUMER_GROUP: the name of an MQTT group must not contain / + #, as in {group!r}"
        raise BrokerRefused(msg)
    pattern = "/".join("[^/]*" if level == "+" else re.escape(level) for level in levels)
    pattern = pattern.removesuffix(re.escape("#")) + (".*" if levels[-1] == "#" else "")
    if any(re.fullmatch(pattern, name) for name in own_topics):
        raise BrokerRefused(
            f"CONSUMER_SOURCE: {topic!r} matches {' and '.join(own_topics)}, the topics of its own "
            "retries and dead letters"
        )


# -- one connection


class _Url(BrokerUrl):
    """The URL with MQTT's options. Raises BrokerRefused."""

    def __init__(self, text: str) -> None:
        super().__init__(
            text,
            like="mqtt://user:password@host:1883",
            options=(
                *("client_id", "session_expiry_seconds", "keepalive_seconds", "leaving"),
                *TLS_OPTIONS,
            ),
            default_port=8883 if text.lower().startswith("mqtts:") else 1883,
        )
        if len(self.hosts) != 1 or self.path:
            raise self.unreadable()
        if {*TLS_OPTIONS} & self.options.keys() and self.scheme != "mqtts":
            raise BrokerRefused(f"CONSUMER_BROKER_URL: {', '.join(TLS_OPTIONS)} need mqtts://")
        host, _, port = self.hosts[0].rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
        self.client_id = self.options.get("client_id", "")
        self.leaving = flag(self, "leaving")
        self.session_expiry_seconds = self.whole_number(
            "session_expiry_seconds", SESSION_EXPIRY_SECONDS, at_most=LONGEST_EXPIRY_SECONDS
        )
        self.keepalive_seconds = self.whole_number(
            "keepalive_seconds", KEEPALIVE_SECONDS, at_most=65_535
        )


class _Connection:
    """One MQTT connection, from CONNECT to its end: paho's client, driven by the event loop.

    With ``receive_maximum`` it is a consumer's, with a session; otherwise it has no session.
    """

    def __init__(
        self,
        url: _Url,
        requests: Requests,
        client_id: str,
        receive_maximum: int | None,
        largest_packet: int,
        on_message: "Callable[[_Connection, MQTTMessage], None]",
        on_end: Callable[[], None],
    ) -> None:
        self._url = url
        self._requests = requests
        self._receive_maximum = receive_maximum
        self.consuming = receive_maximum is not None
        self.largest_packet = largest_packet
        """In bytes: the broker names its limit, or shows it by ending the connection."""
        self._bytes_sent: dict[int, int] = {}
        """The bytes of each message that is not confirmed yet, by packet id."""
        self.was_told_why = False
        """Whether the broker gave a reason for ending the connection."""
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._file = -1
        self._timer: asyncio.TimerHandle | None = None
        self._packets = 0
        self._session_present: asyncio.Future[bool] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[int]] = {}
        self._room = asyncio.Semaphore(PUBLISH_AT_ONCE)
        self.ended: asyncio.Future[BrokerError | None] = self._loop.create_future()
        """The reason, or None if it was ended on purpose."""

        def deliver(_client: Client, _userdata: Any, message: MQTTMessage) -> None:
            self._packets += 1
            on_message(self, message)

        client: Any = Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            protocol=MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self._client = client
        client.connect_timeout = CONNECT_SECONDS
        client.max_inflight_messages_set(0)  # `_room` limits them, as the broker allows
        client.username_pw_set(url.user or None, url.password)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = deliver
        client.on_publish = self._on_puback
        client.on_subscribe = client.on_unsubscribe = self._on_suback
        self._handle_publish: Callable[[], MQTTErrorCode] = client._handle_publish
        client._handle_publish = self._on_publish

    # -- the socket

    async def open(self) -> bool:
        """Returns whether the broker has this client's session. Raises BrokerUnavailable or BrokerRefused."""
        try:
            async with self._requests.bounded(CONNECT_SECONDS):
                await _in_thread(self._connect)
                self._attach()
                return await self._session_present
        except BaseException:
            self.end()
            raise

    def _connect(self) -> None:
        """Blocks: it resolves the host name, and performs the TLS handshake."""
        properties = _Properties(PacketTypes.CONNECT)
        if self._receive_maximum is not None:
            properties.ReceiveMaximum = self._receive_maximum
            properties.SessionExpiryInterval = self._url.session_expiry_seconds
        wrapped: list[ssl.SSLSocket] = []
        if self._url.scheme == "mqtts":
            self._client.tls_set_context(_remembering(self._url.tls_context(), wrapped))
        try:
            self._client.connect(
                self._url.host,
                self._url.port,
                self._url.keepalive_seconds,
                clean_start=not self.consuming,
                properties=properties,
            )
        except BaseException:
            for open_socket in wrapped:  # paho leaves it open when the handshake fails
                open_socket.close()
            raise
        if self.ended.done() and (abandoned := self._client.socket()) is not None:
            abandoned.close()

    def _attach(self) -> None:
        opened = self._client.socket()
        if opened is None:  # paho has seen an error already
            self.end(self._requests.lost())
            return
        if isinstance(opened, socket.socket):  # acks are small, and have no answer
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
            # Read until no packet is left: a turn of the event loop for each would cost more.
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
            seconds = min(1.0, self._url.keepalive_seconds / 4)
            self._timer = self._loop.call_later(seconds, self._keep_alive)

    def _step(self, step: Callable[[], object]) -> None:
        """Run a callback of the event loop; its exception ends the connection, and is not only logged."""
        try:
            step()
        except OSError as error:
            self.end(self._requests.lost(error))
        except Exception as error:  # the same bytes would raise it again
            reason = f"{type(error).__name__}: {error}"
            failure = BrokerRefused(
                f"{self._url.redacted} sent a packet that cannot be read: {reason}"
            )
            failure.__cause__ = error
            self.end(failure)

    def end(self, error: BrokerError | None = None) -> None:
        """Close the socket at once; has no effect on a connection that has ended."""
        if self.ended.done():
            return
        self._detach()
        self._client.on_socket_register_write = self._client.on_socket_close = None
        if (opened := self._client.socket()) is not None:
            opened.close()
        reason = error or self._requests.lost()
        waiting: list[asyncio.Future[Any]] = [self._session_present, *self._answers.values()]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(type(reason)(str(reason)))
                answer.exception()  # retrieved: the task that awaited it may be gone
        self.ended.set_result(error)
        self._on_end()

    async def close(self) -> None:
        """Returns when the broker has received everything that was sent, or after CLOSE_SECONDS."""
        with suppress(BrokerError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                # The broker answers in order: after this it has seen every acknowledgement.
                await self.unsubscribe([f"{PREFIX}nothing"])
                self._client.disconnect()
                await asyncio.shield(self.ended)
        self.end()

    # -- packets of the broker

    def _on_connect(
        self, _client: Client, _userdata: Any, flags: Any, code: ReasonCode, properties: Any
    ) -> None:
        broker = self._url.redacted
        refusal: BrokerError | None = None
        if code.is_failure:
            refused = BrokerDenied if code.value in DENIALS else BrokerRefused
            kind = BrokerUnavailable if code.value in TRY_AGAIN else refused
            refusal = kind(f"{broker} refused the connection: {code}")
        elif getattr(properties, "MaximumQoS", 1) < 1:
            refusal = BrokerRefused(f"{broker} confirms no messages: it offers only QoS 0")
        elif not getattr(properties, "SharedSubscriptionAvailable", 1):
            refusal = BrokerRefused(f"{broker} has no shared subscriptions")
        largest_packet = getattr(properties, "MaximumPacketSize", self.largest_packet)
        self.largest_packet = min(self.largest_packet, largest_packet)
        self._room = asyncio.Semaphore(
            min(PUBLISH_AT_ONCE, getattr(properties, "ReceiveMaximum", PUBLISH_AT_ONCE))
        )
        if refusal is not None:
            self.end(refusal)
        elif not self._session_present.done():
            self._session_present.set_result(bool(flags.session_present))

    def _on_disconnect(
        self, _client: Client, _userdata: Any, flags: Any, code: ReasonCode, _properties: Any
    ) -> None:
        broker = self._url.redacted
        self.was_told_why = flags.is_disconnect_packet_from_server
        if self.was_told_why and code.value == SESSION_TAKEN_OVER:
            self.end(
                BrokerRefused(
                    f"{broker} gave this consumer's session to another one with the same client id: "
                    "each needs its own (?client_id= in CONSUMER_BROKER_URL)"
                )
            )
        elif self.was_told_why:
            if code.value == PACKET_TOO_LARGE and self._bytes_sent:
                self.largest_packet = min(self.largest_packet, *self._bytes_sent.values()) - 1
            kind = BrokerDenied if code.value == NOT_AUTHORIZED else BrokerUnavailable
            self.end(kind(f"{broker} closed the connection: {code}"))
        elif code.value == PROTOCOL_ERROR:
            self.end(BrokerRefused(f"{broker} sent a packet that paho-mqtt cannot read"))
        elif code.is_failure:
            self.end(self._requests.lost(code))
        else:
            self.end()

    def _on_publish(self) -> MQTTErrorCode:
        """paho raises for some properties that brokers pass on: such a message is delivered without its properties."""
        packets = self._packets
        try:
            return self._handle_publish()
        except Exception as error:
            if packets < self._packets:  # it was delivered
                raise
            incoming = self._client._in_packet
            packet = bytes(incoming["packet"])
            start = 2 + int.from_bytes(packet[:2], "big") + (2 if incoming["command"] & 0x06 else 0)
            length, length_bytes = _VariableByteIntegers.decode(packet[start:])
            incoming["packet"] = packet[:start] + b"\0" + packet[start + length_bytes + length :]
            log.warning("properties_dropped", broker=self._url.redacted, reason=str(error))
            return self._handle_publish()

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

    # -- packets to the broker

    async def subscribe(self, filters: Iterable[str], retain_handling: int) -> int:
        """Returns the lowest QoS that was granted, or a reason code from 128 up."""
        options = _SubscribeOptions(qos=1, retainHandling=retain_handling)
        return await self._answer(*self._client.subscribe([(name, options) for name in filters]))

    async def unsubscribe(self, filters: list[str]) -> int:
        return await self._answer(*self._client.unsubscribe(filters))

    async def publish(self, topic: str, body: bytes, properties: Any) -> int:
        """Returns the broker's reason code for the message; from 128 up, the broker has refused it.

        Raises BrokerRefused for a message that is too large, without sending it: the broker would end the connection.
        """
        async with self._room:
            if (size := _bytes_of_packet(topic, body, properties)) > self.largest_packet:
                raise BrokerRefused(
                    f"{self._url.redacted} takes no message to {topic} of {size} bytes, with its properties: "
                    f"at most {self.largest_packet}"
                )
            sent = self._client.publish(topic, body, qos=1, properties=properties)
            self._bytes_sent[sent.mid] = size
            try:
                return await self._answer(sent.rc, sent.mid)
            finally:
                del self._bytes_sent[sent.mid]

    def publish_unconfirmed(self, topic: str, properties: Any) -> None:
        self._client.publish(topic, b"", qos=0, properties=properties)

    def ack(self, mid: int) -> None:
        self._client.ack(mid, 1)

    async def _answer(self, sent: MQTTErrorCode, mid: int | None) -> int:
        if self.ended.done() or sent != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise self._requests.lost()
        answer: asyncio.Future[int] = self._loop.create_future()
        self._answers[mid] = answer
        try:
            async with self._requests.bounded(ANSWER_SECONDS):
                return await answer
        except BrokerUnavailable as error:
            self.end(error)
            raise
        finally:
            del self._answers[mid]


def _remembering(context: ssl.SSLContext, wrapped: list[ssl.SSLSocket]) -> ssl.SSLContext:
    wrap = context.wrap_socket

    def wrap_socket(*arguments: Any, **options: Any) -> ssl.SSLSocket:
        wrapped.append(wrap(*arguments, **options))
        return wrapped[-1]

    context.wrap_socket = wrap_socket  # type: ignore[method-assign]
    return context


async def _in_thread(job: Callable[[], T]) -> T:
    """Run the job on a daemon thread: neither a cancelled caller nor the end of the process waits for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():
            set_outcome(outcome)

    def run() -> None:
        with suppress(RuntimeError):  # the loop is closed
            try:
                result = job()
            except Exception as error:
                loop.call_soon_threadsafe(settle, done.set_exception, error)
            else:
                loop.call_soon_threadsafe(settle, done.set_result, result)

    threading.Thread(target=run, name="mqtt-connect", daemon=True).start()
    return await done


class _Receipt(NamedTuple):
    connection: _Connection
    incoming: MQTTMessage


class MqttBroker(Broker):
    """One topic, or a filter with wildcards, read by a shared subscription."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=False,
        requeue=False,
        dead_letters=False,
        retains_before_first_consumer=False,
        competing_consumers=False,
        counts_crashes=False,
        queue_metrics=False,
    )
    bounds_bytes = False
    destinations: ClassVar = {"topic": "topic:NAME"}
    origins = ("topic",)

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL, the topic or the group cannot be used."""
        super().__init__(settings, prefetch)
        self._current_url = CurrentUrl(settings, _Url)
        self._url = self._current_url()
        self._group = settings.group or settings.source
        self._topic = settings.source
        self._has_wildcards = "+" in self._topic or "#" in self._topic
        parent = "consumer" if self._has_wildcards else self._topic
        self._retry_topic = f"{parent}/retry/{self._group}"
        self._dead_topic = f"{parent}/dead/{self._group}"
        _check_names(self._group, self._topic, [self._retry_topic, self._dead_topic])
        self._filters = [f"$share/{self._group}/{t}" for t in (self._topic, self._retry_topic)]
        self.connectivity = Connectivity(self._url.redacted)
        self._requests = Requests(self._url.redacted, (), RULES, ANSWER_SECONDS)
        self._client_id = ""
        self._lock: IO[str] | None = None
        self._connection: _Connection | None = None
        self._publisher: _Connection | None = None
        """A consumer's connection for what its handlers publish: a broker may end it because it refuses a message."""
        self._opening, self._publishing_alone = asyncio.Lock(), asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._consuming = False
        self._started: asyncio.Future[None] | None = None
        self._had_session = False
        self._short_connections = 0
        self._witness: _Connection | None = None
        self._denied_until = dict[str, float]()  # time.monotonic(), by topic
        self._largest_packet = LARGEST_PACKET
        self._mark, self._marked = "", asyncio.Event()
        self._delayed: dict[Message, asyncio.TimerHandle] = {}
        """Retries that are not due yet."""

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._closing.clear()
        self._connection = await self._connect()
        self.connectivity.established()
        self._keeper = asyncio.create_task(self._keep_connected(), name="mqtt-keeper")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing.set()
        connections = [one for one in (self._connection, self._publisher) if one is not None]
        try:
            await asyncio.gather(*(connection.close() for connection in connections))
        finally:
            for connection in connections:
                connection.end()
            if self._keeper is not None:
                self._keeper.cancel()
                await asyncio.wait({self._keeper})
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    @property
    def connected(self) -> bool:
        return self.connectivity.up and not self._closing.is_set()

    async def _keep_connected(self) -> None:
        try:
            await self.connectivity.keep(self._stay_connected, self._closing)
        except Exception as failure:
            self.connectivity.up = False
            log.error("source_failed", client_id=self._client_id, reason=str(failure))
            if not self.stopped:
                self.buffer.fail(failure)
            if self._started is not None and not self._started.done():
                self._started.set_exception(failure)

    async def _stay_connected(self) -> None:
        """Use one connection, until it ends."""
        if self._connection is None:
            try:
                self._connection = await self._connect()
            except MendableRefusal as refusal:
                if self._started is None or self._started.done():
                    raise
                self._started.set_exception(refusal)  # not an outage: the start was refused
                await self._closing.wait()
                return
        connection = self._connection
        self.connectivity.established()
        if connection.consuming and self._started is not None and not self._started.done():
            self._started.set_result(None)
        opened_at = time.monotonic()
        self._witness = await self._open_witness()
        try:
            reason = await asyncio.shield(connection.ended)
            self._connection = None
            self._largest_packet = connection.largest_packet
            if reason is None:
                return
            if isinstance(reason, BrokerRefused) or connection.was_told_why:
                raise reason
            if time.monotonic() - opened_at > SHORT_SECONDS or not await self._is_alone():
                self._short_connections = 0
        finally:
            if self._witness is not None:
                self._witness.end()
        self._short_connections += connection.consuming
        if self._short_connections == MOST_SHORT_CONNECTIONS:  # not every broker gives the reason
            raise BrokerRefused(
                f"{self._url.redacted} ended {MOST_SHORT_CONNECTIONS} connections in a row as soon as they "
                f"were established: does another consumer have the client id {self._client_id!r}?"
            )
        raise reason

    async def _open_witness(self) -> _Connection | None:
        """A second connection, with a client id of its own, once too many of the consumer's were short."""
        if self._short_connections < UNWITNESSED:
            return None
        witness = self._new_connection(self._publisher_id(), None)
        with suppress(BrokerError):
            await witness.open()
        return witness

    async def _is_alone(self) -> bool:
        """Whether only the consumer's connection has ended, and not that of the witness."""
        if (witness := self._witness) is None:
            return True
        with suppress(BrokerError, TimeoutError):
            async with asyncio.timeout(MARK_SECONDS):
                await witness.unsubscribe([f"{PREFIX}nothing"])
                return True
        return False

    def _publisher_id(self) -> str:
        return f"{self._group}-publisher-{uuid.uuid4().hex[:12]}"

    def _new_connection(self, client_id: str, receive_maximum: int | None) -> _Connection:
        self._url = self._current_url()
        return _Connection(
            self._url,
            self._requests,
            client_id,
            receive_maximum,
            self._largest_packet,
            self._receive,
            self._drop_unacked if receive_maximum is not None else lambda: None,
        )

    async def _connect(self) -> _Connection:
        """Before `start`, a publisher's connection: a consumer's client id would disconnect that consumer."""
        if self._consuming and not self._marked.is_set():
            await self._prove_rights()
        client_id = self._client_id if self._consuming else self._publisher_id()
        connection = self._new_connection(client_id, self.prefetch if self._consuming else None)
        try:
            resumed = await connection.open()
            if self._consuming:
                await self._subscribe(connection)
        except BaseException:
            connection.end()
            raise
        if self._consuming:
            if self._had_session and not resumed:
                reason = "the broker did not keep this client id's session: its messages are lost"
                log.error("session_lost", client_id=client_id, reason=reason)
            log.info("session_opened", client_id=client_id, resumed=resumed)
            self._had_session = True
        return connection

    async def _subscribe(self, connection: _Connection) -> None:
        if self._url.leaving:
            await connection.unsubscribe(self._filters)
            return
        # Retained messages are delivered once, with a new session, and not with each connection: some brokers send them
        # also to shared subscriptions.
        self._check_granted(await connection.subscribe(self._filters, 1), self._filters[0])

    def _check_granted(self, granted: int, name: str) -> None:
        if granted != 1:
            reason = "only QoS 0" if granted == 0 else _name_of(PacketTypes.SUBACK, granted)
            kind = BrokerDenied if granted == NOT_AUTHORIZED else BrokerRefused
            raise kind(f"{self._url.redacted} refused the subscription {name}: {reason}")

    async def _prove_rights(self) -> None:
        """Publish to the topic of retries, and read it: some brokers confirm subscriptions and messages without the
        right to read, and deliver nothing, so that each retry would be lost."""
        self._mark = uuid.uuid4().hex
        properties = _properties({MARK: self._mark})
        properties.MessageExpiryInterval = max(1, int(ANSWER_SECONDS))
        topic = self._retry_topic
        # First with QoS 0, so that the sessions of absent consumers do not store it; then with QoS 1, so that the
        # broker reports a missing right to publish.
        for qos, seconds in ((0, MARK_SECONDS), (1, ANSWER_SECONDS)):
            connection = self._new_connection(self._publisher_id(), None)
            try:
                await connection.open()
                self._check_granted(await connection.subscribe([topic], 2), topic)
                if qos:
                    await self._publish(connection, topic, b"", properties)
                else:
                    connection.publish_unconfirmed(topic, properties)
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._marked.wait()
                        return
            finally:
                await connection.close()
        msg = f"{self._url.redacted}: this user has no right to read {topic}, so that retries would be lost"
        raise BrokerDenied(msg)

    def _drop_unacked(self) -> None:
        """The connection ended: the broker redelivers its unacked messages."""
        for message in [*self._take_back(), *self.unacked]:
            self._release(message)
        for timer in self._delayed.values():
            timer.cancel()
        self._delayed.clear()

    def _lost_because(self, message: Message) -> str:
        return "the connection was lost" if message.receipt.connection.ended.done() else ""

    def _choose_client_id(self) -> tuple[str, IO[str] | None]:
        """The URL's client id, or a free one of this machine, locked by a file until this consumer ends."""
        if client_id := self._url.client_id:
            several = self.share_count > 1  # each connection needs a client id of its own
            return f"{client_id}-{self._topic}" if several else client_id, None
        from fcntl import LOCK_EX, LOCK_NB, flock  # not on Windows; nor is the loop's add_reader

        parts = dict.fromkeys([self._group, self._topic, socket.gethostname()])
        name = "-".join(re.sub(r"[^\w.-]", "_", part) for part in parts)
        # Without a directory for temporary files, a machine can have one consumer.
        with suppress(OSError):
            directory = Path(tempfile.gettempdir())
            for number in range(MOST_CONSUMERS):
                client_id = f"{name}-{number}"
                lock = sha256(f"{self._url.redacted} {client_id}".encode()).hexdigest()[:24]
                with suppress(PermissionError):  # another user's file
                    file = (directory / f"mqtt-{lock}.lock").open("a")
                    try:
                        flock(file, LOCK_EX | LOCK_NB)
                    except BlockingIOError:
                        file.close()
                    else:
                        return client_id, file
        return f"{name}-0", None

    # -- fetching

    async def start(self) -> None:
        if self._lock is None:  # otherwise an earlier attempt has chosen
            self._client_id, self._lock = self._choose_client_id()
        self._consuming = True
        self._started = asyncio.get_running_loop().create_future()
        if self._connection is not None:
            await self._connection.close()  # the keeper opens the consumer's connection
        if self._keeper is None or self._keeper.done():
            raise self._requests.lost()
        await self._started

    def _receive(self, connection: _Connection, incoming: MQTTMessage) -> None:
        if incoming.qos == 0 and len(self.buffer) >= MOST_UNCONFIRMED:
            return
        ours, headers = _read(incoming.properties)
        if MARK in ours and incoming.topic == self._retry_topic and not incoming.payload:
            if ours[MARK] == self._mark:
                self._marked.set()
            if incoming.qos:
                connection.ack(incoming.mid)
            return
        if not connection.consuming:
            return
        topic = text_of(ours.get(TOPIC)) or incoming.topic
        if self._has_wildcards:
            headers[TOPIC_HEADER] = topic
        event = headers if "specversion" in headers else {}  # a CloudEvent in binary mode
        message = make_message(
            incoming.payload,
            id=ours.get(ID) or event.get("id"),
            type=ours.get(TYPE) or event.get("type"),
            headers=headers,
            failures=ours.get(ATTEMPTS),
            published_at=ours.get(PUBLISHED_AT),
            receipt=_Receipt(connection, incoming),
            origin={"topic": topic},
            properties=_fields(incoming.properties, headers),
        )
        if self.stopped:  # it stays in the session, unacknowledged
            self._still_in_flight(message)
            return
        # At most the longest delay: the time may be from another machine's clock.
        pause = min(seconds_of(ours.get(NOT_BEFORE)) - time.time(), self.settings.retry_max_seconds)
        if pause > 0:
            self.unacked.add(message)
            timer = asyncio.get_running_loop().call_later(pause, self._deliver_delayed, message)
            self._delayed[message] = timer
        elif not (incoming.dup and self._still_in_flight(message)):
            self._deliver(message)

    def _deliver_delayed(self, message: Message) -> None:
        del self._delayed[message]
        self._deliver(message)

    async def _stop_fetching(self) -> None:
        """MQTT has no requeue: messages that no worker took wait in the session for this client id."""
        if not self._consuming:
            return
        log.info(
            "session_left",
            client_id=self._client_id,
            unstarted=len(self.buffer) + len(self._delayed),
            expires_after_seconds=self._url.session_expiry_seconds,
        )
        for message, timer in self._delayed.items():
            timer.cancel()
            await self.requeue(message)
        self._delayed.clear()

    # -- settling

    async def _ack(self, message: Message) -> None:
        receipt: _Receipt = message.receipt
        if receipt.incoming.qos:
            receipt.connection.ack(receipt.incoming.mid)

    async def _requeue(self, message: Message) -> None:
        """The message stays unacknowledged in the session, and is redelivered when this client id has returned."""

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        """The retry waits in the consumer that gets it, for at most the longest delay of the backoff."""
        history = {REASON: _plain(reason), NOT_BEFORE: f"{time.time() + delay_seconds:.3f}"}
        properties = _copied_properties(message, history)
        publishing = self._publish_copy(message, self._retry_topic, message.body, properties)
        await self._move(message, "retry", publishing)

    async def _reject(self, message: Message, reason: str) -> None:
        """Publish it to the topic of dead letters; without a subscriber it is dropped and logged."""
        history = {REASON: _plain(reason), DEAD_LETTERED_AT: str(int(time.time()))}

        connection: _Connection = message.receipt.connection

        def fits(body: bytes, shortened: dict[str, Any]) -> bool:
            properties = _copied_properties(message, history, shortened)
            size = _bytes_of_packet(self._dead_topic, body, properties)
            return size <= connection.largest_packet

        body, shortened = fit_dead_letter(message.body, {}, fits)
        properties = _copied_properties(message, history, shortened)
        publishing = self._publish_copy(message, self._dead_topic, body, properties)
        await self._move(message, "reject", publishing)

    async def _publish_copy(
        self, message: Message, topic: str, body: bytes, properties: Any
    ) -> None:
        # Not self._connection: a session may deliver before the SUBACK.
        connection: _Connection = message.receipt.connection
        try:
            code = await self._publish(connection, topic, body, properties)
            if code == NO_SUBSCRIBER and topic == self._retry_topic:
                msg = f"{self._url.redacted} has lost the subscription to {topic}"
                raise BrokerUnavailable(msg)
        except BrokerUnavailable as error:
            connection.end(error)  # so that the message is redelivered
            raise
        if code == NO_SUBSCRIBER:
            reason = dict(properties.UserProperty)[REASON]
            log.error("dead_letter_dropped", message_id=message.id, topic=topic, reason=reason)

    # -- publishing

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        """As in `Publisher`. Raises BrokerRefused if there is no subscriber: the broker has dropped the message."""
        for start in range(0, len(messages), PUBLISH_AT_ONCE):
            batch, connection = messages[start : start + PUBLISH_AT_ONCE], await self._to_publish()
            publishing = [self._publish_one(connection, message) for message in batch]
            outcomes = await asyncio.gather(*publishing, return_exceptions=True)
            failures = [outcome for outcome in outcomes if outcome is not None]
            if failures and self._consuming and connection.ended.done():
                failed = (m for m, outcome in zip(batch, outcomes, strict=True) if outcome)
                failures = await self._publish_alone(failed)
            for failure in failures:
                raise failure

    async def _publish_alone(self, messages: Iterable[OutgoingMessage]) -> list[BaseException]:
        """One after the other: one of them may be why the broker ended the connection. Returns the failures."""
        failures: list[BaseException] = []
        async with self._publishing_alone, self._requests.bounded():
            for message in messages:
                connection = await self._to_publish()
                try:
                    await self._publish_one(connection, message)
                except BrokerError as error:
                    failures.append(error)
        return failures

    async def _publish_one(self, connection: _Connection, message: OutgoingMessage) -> None:
        _, topic = self.destination_of(message)
        if fault := _fault_of_topic(topic):
            raise BrokerRefused(f"messages cannot be published to {topic[:200]!r}: it {fault}")
        properties = _outgoing_properties(message)
        code = await self._publish(connection, topic, message.body, properties)
        if code == NO_SUBSCRIBER:
            msg = f"{self._url.redacted} dropped the message: {topic!r} has no subscriber yet"
            raise BrokerRefused(msg)

    async def _to_publish(self) -> _Connection:
        if not self._consuming:
            return self._connected()
        async with self._opening:
            if self._publisher is not None and self._publisher.ended.done():
                self._largest_packet = min(self._largest_packet, self._publisher.largest_packet)
                self._publisher = None
            if self._publisher is None:
                publisher = self._new_connection(self._publisher_id(), None)
                await publisher.open()
                self._publisher = publisher
            return self._publisher

    async def _publish(
        self, connection: _Connection, topic: str, body: bytes, properties: Any
    ) -> int:
        now = time.monotonic()
        if now < self._denied_until.get(topic, 0):
            code = NOT_AUTHORIZED
        else:
            code = await connection.publish(topic, body, properties)
            if code == NOT_AUTHORIZED:
                # Some Mosquittos end the connection after such an answer: without this, each message would cause it.
                denied = self._denied_until.items()
                self._denied_until = {name: until for name, until in denied if until > now}
                self._denied_until[topic] = now + DENIED_SECONDS
        if code >= 128:
            reason = _name_of(PacketTypes.PUBACK, code)
            kind = BrokerDenied if code == NOT_AUTHORIZED else BrokerRefused
            raise kind(f"{self._url.redacted} refused a message to {topic}: {reason}")
        return code

    def _connected(self) -> _Connection:
        if self._connection is None:
            raise self._requests.lost()
        return self._connection

    # -- capabilities that MQTT lacks

    async def declare(self) -> None:
        """A topic is not created, and the session begins with `start`."""

    async def delete(self) -> None:
        client_id, lock = self._choose_client_id()
        try:
            connection = self._new_connection(client_id, None)  # its clean start ends the session
            await connection.open()
            await connection.close()
        finally:
            if lock is not None:
                await _in_thread(Path(lock.name).unlink)
                lock.close()

    async def describe(self) -> dict[str, int | str]:
        self._connected()
        return {
            self._topic: "MQTT has no counts of waiting messages and of consumers",
            "subscription": self._filters[0],
            "retries": self._retry_topic,
            "dead letters": f"{self._dead_topic}, for its subscribers",
            "session expires after": f"{self._url.session_expiry_seconds} seconds",
        }

    async def count_dead_letters(self) -> int:
        raise self._no_dead_letters()

    def _present_letters(self, reading: Any) -> AsyncGenerator[DeadLetter, None]:
        raise self._no_dead_letters()

    def _take_letters(
        self, reading: Any, letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        raise self._no_dead_letters()

    def _no_dead_letters(self) -> BrokerRefused:
        return BrokerRefused(f"MQTT stores no dead letters: subscribe to {self._dead_topic}")


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> MqttBroker:
    """Raises BrokerRefused if the URL, the topic or the group cannot be used."""
    return MqttBroker(settings, prefetch)
