# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Amazon SQS, or a server with its API, by aiobotocore: a standard queue and its dead-letter queue.

``sqs://eu-central-1`` is a region of AWS; the credentials come from where AWS's own tools look for them
(``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, the role of the pod, the task or the machine).
``sqs://key:secret@host:port/region`` is another server, over TLS unless it is on this machine or the URL has
``?tls=false``; ``?cafile=ca.pem`` is the CA. ``sqs://vpce-1.sqs.eu-central-1.vpce.amazonaws.com`` is an endpoint of AWS.
Characters that a URL reserves are percent-encoded in a secret. ``?visibility_seconds=30`` is the visibility timeout,
after which the messages of a dead consumer are redelivered; ``?wait_seconds=2`` is how long a poll waits for a message,
and the longest time that an idle consumer needs to stop.

For ``CONSUMER_SOURCE=orders`` the queues are ``orders`` and ``orders-dead``, declared if they do not exist. An existing
queue keeps its attributes, and its redrive policy names the dead-letter queue.

A retry, a dead letter or what a handler publishes is sent, and confirmed, before the message is deleted: a crash in
between makes a duplicate, never a loss. Delays are whole seconds, rounded up. A standard queue has no order.

A message from SNS has the body that was published to the topic, and one from EventBridge the event's detail; a retry
and a dead letter store the body that SQS delivered.
"""

import asyncio
import base64
import hashlib
import json
import logging
import math
import re
import time
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
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

import structlog
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    MetadataRetrievalError,
    NoCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError

from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable, MendableRefusal
from ..message import DeadLetter, Message, OutgoingMessage
from ..redaction import redacted
from ..settings import ConsumerSettings
from .connectivity import FIRST_PAUSE_SECONDS, Connectivity
from .delivery import (
    bytes_of,
    count_of,
    fit_dead_letter,
    headers_of,
    json_object,
    make_dead_letter,
    make_message,
    seconds_of,
    text_of,
)
from .flags import flag
from .requests import Requests, Rule, to_the_end, together
from .source import MISSING, Broker, Capabilities, log_settlement_lost
from .url import BrokerUrl, CurrentUrl

log = structlog.get_logger()

T = TypeVar("T")

VISIBILITY_SECONDS = 30
WAIT_SECONDS = 2
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
"""The time limit for the answer to a request, without the wait of a poll."""
STOP_SECONDS = 2.5
FLUSH_SECONDS = 2.0
CLOSE_SECONDS = 0.5
OUTAGE_SECONDS = 0.5
"""The time limit for the last settlements, in place of FLUSH_SECONDS, while SQS cannot be reached."""
GATHER_SECONDS = 0.005
"""How long settlements wait for others: ten share one request."""
LISTING_SECONDS = 60
"""The visibility timeout of dead letters that are being listed, replayed or purged."""
IDLE_BATCHES = 20
"""Reading dead letters ends after so many requests in a row without a letter that was not read before."""
BATCH_SIZE = 10
"""The most messages in any request."""
BATCH_BYTES = 262_144
"""The bytes that every server accepts; AWS itself accepts four times as many. A larger message is sent alone."""
MAX_BYTES = 1_048_576
MAX_REQUESTS = 10
"""Concurrent requests per kind, one connection each."""
MAX_ATTRIBUTES = 10
MAX_DELAY_SECONDS = 900
MAX_VISIBILITY_SECONDS = 43_000
"""A message is invisible for at most 12 hours, counted from its delivery."""
RETENTION_SECONDS = 1_209_600
"""The maximum, 14 days; then SQS deletes a message, whatever its state."""
# Requeues and crashes count as deliveries. A message that kills its process each time must be dead-lettered in the
# end, but not after hundreds of rolling restarts. SQS accepts no higher number.
DELIVERY_LIMIT = 1000
FEW_DELIVERIES = 20
"""An existing redrive policy with a lower limit is reported."""
TOO_FEW = "which is few: restarts and outages count too, so messages become dead letters without an attempt"

ENVELOPE = "x-consumer"
"""Message attribute, a JSON object, for values that SQS's own attributes cannot hold (they are at most 10, without
empty text or control characters): id, headers, attempts, encoding of the body, due_at; reason and dead_lettered_at
of a dead letter; ``attributes`` if a producer's own leave no place for this one."""
TYPE = "type"
"""Message attribute: the message's type, which any producer may set. All others are headers."""

CLEAN_TEXT = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")
"""The bodies that SQS accepts."""
QUEUE_NAME = re.compile("[A-Za-z0-9_-]{1,75}")
DESTINATION = {
    "queue": re.compile(r"(arn:[^:]+:sqs:[^:]+:\d+:)?[A-Za-z0-9_-]{1,80}(\.fifo)?"),
    "topic": re.compile(r"(arn:[^:]+:sns:[^:]+:\d+:)?[A-Za-z0-9_-]{1,256}(\.fifo)?"),
}
FIFO = ".fifo"
FIFO_TOKEN = re.compile("[!-~]{1,128}")
"""A group or an id that a FIFO queue accepts."""
CONTENT_ENCODING = {"content-encoding", "Content-Encoding"}
COMPRESSED = (b"\x1f\x8b", b"\x78")
"""The first bytes of gzip and of zlib."""
REGION = re.compile(r"[a-z]{2,}(-[a-z]+)+-\d+")
AWS = re.compile(r"(.*\.)?(amazonaws\.com(\.cn)?|api\.aws|api\.amazonwebservices\.com\.cn)")
"""The host names of AWS."""
LOOPBACK = re.compile(r"localhost|127\.[\d.]+|::1")

SEND, DELETE, CHANGE_VISIBILITY = (
    "send_message_batch",
    "delete_message_batch",
    "change_message_visibility_batch",
)

PUBLISH = "publish_batch"
"""The one request to SNS."""

CLIENT_ERRORS = (BotoCoreError, ClientError, ValueError)
RULES = (
    Rule(
        NoCredentialsError,
        BrokerDenied,
        "no credentials were found in the URL, nor where AWS's tools look",
    ),
    Rule(
        (HTTPClientError, BotoConnectionError, MetadataRetrievalError, CredentialRetrievalError),
        BrokerUnavailable,
        "{error}",
    ),
    Rule((BotoCoreError, ValueError), BrokerRefused, "{error}"),
)
CODES_OF_OUTAGES = (
    "RequestTimeout",
    "IDPCommunicationError",  # of the token service, for a role by web identity
    "Throttling",
    "ThrottlingException",
    "RequestThrottled",
    "KmsThrottled",
    "OverLimit",
    "QueueDeletedRecently",
)

CODES_OF_DENIALS = (
    "AccessDenied",
    "ExpiredToken",
    "IncompleteSignature",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "KmsAccessDenied",
    "MissingAuthenticationToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClient",
)

for _name in ("aiobotocore", "botocore"):
    # This module logs their failures once, in its own words.
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.CRITICAL)


class QueueMissing(BrokerUnavailable):
    """The queue does not exist (any more): it is created when the source connects again."""


def _code_of(error: BaseException | None) -> str:
    """The code by which SQS and SNS distinguish their refusals."""
    return str(error.response["Error"]["Code"]) if isinstance(error, ClientError) else ""


class SqsRequests(Requests):
    """Distinguishes SQS's refusals by their codes, since they all have one exception class."""

    def translated(self, error: BaseException) -> BrokerError:
        sentence = f"{self.address}: {' '.join(redacted(str(error)).split())[:300]}"
        if isinstance(error, ClientError):
            code = _code_of(error)
            status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
            if code.endswith(("NonExistentQueue", "QueueDoesNotExist")):
                return QueueMissing(sentence)
            if status >= 500 or status in (408, 429) or code.endswith(CODES_OF_OUTAGES):
                return BrokerUnavailable(sentence)
            denied = status in (401, 403) or code.startswith(CODES_OF_DENIALS)
            return BrokerDenied(sentence) if denied else BrokerRefused(sentence)
        if "CERTIFICATE_VERIFY_FAILED" in str(error):  # botocore has no exception class for it
            return MendableRefusal(sentence)
        return super().translated(error)


class Address(NamedTuple):
    """The content of ``CONSUMER_BROKER_URL``."""

    region: str
    endpoint: str | None
    """The URL of a server that is not AWS's own."""
    key: str | None
    secret: str | None
    cafile: str | None
    visibility_seconds: int
    wait_seconds: int

    @property
    def client_arguments(self) -> dict[str, Any]:
        return {
            "region_name": self.region,
            "endpoint_url": self.endpoint,
            "aws_access_key_id": self.key,
            "aws_secret_access_key": self.secret,
            "verify": self.cafile,
        }

    def __str__(self) -> str:
        """Redacted."""
        return f"SQS in {self.region}" if self.endpoint is None else f"SQS at {self.endpoint}"


def parse_url(text: str) -> Address:
    """Raises BrokerRefused."""
    url = BrokerUrl(
        text,
        like="sqs://eu-central-1 or sqs://key:secret@host:port/region",
        options=("cafile", "tls", "visibility_seconds", "wait_seconds"),
    )
    if len(url.hosts) != 1 or "/" in url.path.strip("/") or bool(url.user) != bool(url.password):
        raise url.unreadable()
    if "cafile" in url.options:
        url.tls_context()  # so that a mistake is reported at start
    (host,) = url.hosts
    region, endpoint = host, None
    if not REGION.fullmatch(host):
        parts = urlsplit(f"//{host}")
        name = parts.hostname or ""
        is_aws, is_here = AWS.fullmatch(name), LOOPBACK.fullmatch(name)
        if not (is_here or parts.port or "." in name or ":" in name):
            raise BrokerRefused(
                f"CONSUMER_BROKER_URL: {host!r} is neither a region of AWS, like eu-central-1, "
                "nor a host with its port, like localhost:4566"
            )
        of_host = [label for label in name.split(".") if is_aws and REGION.fullmatch(label)]
        region = url.path.strip("/") or (of_host or ["us-east-1"])[0]
        tls = flag(url, "tls", default=not is_here or "cafile" in url.options)
        if is_aws and not tls:
            raise BrokerRefused("CONSUMER_BROKER_URL: AWS always uses TLS: leave out tls=false")
        endpoint = f"{'https' if tls else 'http'}://{host}"
    return Address(
        region,
        endpoint,
        url.user or None,
        url.password or None,
        url.options.get("cafile"),
        url.whole_number("visibility_seconds", VISIBILITY_SECONDS, at_most=43_200),
        url.whole_number("wait_seconds", WAIT_SECONDS, at_most=20),
    )


class Target(NamedTuple):
    """The destination of a message."""

    kind: str
    name: str
    address: str
    """The URL of a queue, the ARN of a topic."""

    def __str__(self) -> str:
        return f"the {self.kind} {self.name!r}"


@dataclass(slots=True, eq=False)
class Receipt:
    """The data to settle a delivery, and to send the same message again."""

    body: bytes
    """The body as SQS delivered it, such as an envelope of SNS."""
    handle: str
    invisible_until: float
    """time.monotonic(), in seconds; then SQS redelivers the message. It is extended while the message is unacked."""
    headers: dict[str, Any]
    """The headers of our own producers; those of other producers are attributes."""
    attributes: dict[str, Any]
    group: str | None
    """The MessageGroupId, by which SQS shares a queue fairly between tenants."""
    message_id: str
    """The id that SQS gave to this sending of the message."""

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.invisible_until


class Settlement(NamedTuple):
    """One entry of a batch request that settles a message."""

    operation: str
    queue_url: str
    entry: dict[str, Any]
    message: Message
    verb: str
    reason: str = ""


def _slices(items: list[T], length: int) -> list[list[T]]:
    return [items[start : start + length] for start in range(0, len(items), length)]


def _batches(items: Iterable[T], entry_of: Callable[[T], dict[str, Any]]) -> Iterator[list[T]]:
    """Batches of items that fit in one request each."""
    batch: list[T] = []
    size = 0
    for item in items:
        entry_bytes = _size(entry_of(item))
        if batch and (len(batch) == BATCH_SIZE or size + entry_bytes > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += entry_bytes
    if batch:
        yield batch


def _size(entry: dict[str, Any]) -> int:
    """The size in bytes, as SQS counts it: the body, and name, type and value of each attribute."""
    if "MessageBody" not in entry:
        return 0
    size = len(entry["MessageBody"].encode())
    for name, attribute in entry["MessageAttributes"].items():
        size += len(name)
        for value in attribute.values():
            size += len(value.encode(errors="replace") if isinstance(value, str) else value)
    return size


def _visibility(message: Message, seconds: int) -> dict[str, Any]:
    return {"ReceiptHandle": message.receipt.handle, "VisibilityTimeout": seconds}


def _pack(
    body: bytes,
    id: str,
    attributes: dict[str, Any],
    headers: dict[str, Any],
    history: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The entry of a batch request that sends these values. Raises BrokerRefused if the headers are not JSON."""
    envelope: dict[str, Any] = {"id": id, **(history or {})}
    if headers:
        envelope["headers"] = headers
    text = _as_text(body)
    if text is None:
        envelope["encoding"] = "base64" if body else "empty"
        text = base64.b64encode(body).decode() or "-"
    if len(attributes) >= MAX_ATTRIBUTES:  # no room for the envelope: all attributes go into it
        envelope["attributes"] = _map_binary(attributes, lambda v: base64.b64encode(v).decode())
        attributes = {}
    try:
        packed = json.dumps(envelope)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"this message cannot be sent: its headers are not JSON: {error}"
        raise BrokerRefused(msg) from error
    return {"MessageBody": text, "MessageAttributes": {**attributes, ENVELOPE: _string(packed)}}


def _pack_again(message: Message, **history: Any) -> dict[str, Any]:
    """The entry that sends the same message again, with its history."""
    receipt = message.receipt
    if history and message.published_at_seconds:
        history["published_at"] = message.published_at_seconds
    entry = _pack(receipt.body, message.id, receipt.attributes, receipt.headers, history)
    if receipt.group is not None:
        entry["MessageGroupId"] = receipt.group
    return entry


def _unpack(
    raw: dict[str, Any],
    invisible_until: float = math.inf,
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Message, dict[str, Any]]:
    """The message and its envelope. Never raises: any producer may send anything."""
    sent = _Sent(dict(raw.get("MessageAttributes", {})), bytes_of(raw.get("Body")))
    envelope, body = sent.envelope, sent.body
    about: dict[str, Any] = raw.get("Attributes", {})
    # SQS's own redrive moves a dead letter unchanged: then it is a new message, as after `dead-letters replay`.
    history = {} if "dead_lettered_at" in envelope else envelope
    default_id, id, type = raw.get("MessageId"), envelope.get("id"), sent.type
    published_at: Any = seconds_of(about.get("SentTimestamp")) / 1000
    headers: dict[str, Any] = {}
    if b'"TopicArn"' in body and (notification := _notification(body)):
        inner = _Sent(_sns_attributes(notification), bytes_of(notification["Message"]))
        topic = text_of(notification["TopicArn"])
        origin = {**origin, "topic": topic.rpartition(":")[2], "topic_arn": topic}
        body, headers = inner.body, inner.headers
        if subject := notification.get("Subject"):
            headers = {"Subject": text_of(subject), **headers}
        id, default_id = id or inner.envelope.get("id"), notification.get("MessageId") or default_id
        type = type or inner.type
        published_at = _time_of(notification.get("Timestamp")) or published_at
    if b'"detail-type"' in body and (event := _event(body)):
        body = _dumped(event.pop("detail"))
        detail_type, event_id = event.pop("detail-type"), event.pop("id", None)
        type, id = type or detail_type, id or event_id
        published_at = _time_of(event.get("time")) or published_at
        headers = event | headers
    elif not type and (b'"s3:TestEvent"' in body or b'"aws:s3"' in body):
        type = _s3_event(body)
    headers |= sent.headers
    if headers.keys() & CONTENT_ENCODING and not body.startswith(COMPRESSED):
        with suppress(ValueError):  # SQS takes text only
            if (decoded := base64.b64decode(body, validate=True)).startswith(COMPRESSED):
                body = decoded
    message = make_message(
        body,
        id=id,
        fallback_id=default_id,
        type=type,
        headers=headers,
        failures=history.get("attempts"),
        published_at=history.get("published_at") or published_at,
        receipt=Receipt(
            sent.body,
            raw["ReceiptHandle"],
            invisible_until,
            sent.own_headers,
            sent.attributes,
            about.get("MessageGroupId"),
            text_of(raw.get("MessageId")),
        ),
        origin=origin,
    )
    message.key = message.key or text_of(about.get("MessageGroupId"))
    received = count_of(about.get("ApproximateReceiveCount")) - _postponed(envelope, about)
    message.deliveries = max(1, received)
    return message, envelope


class _Sent:
    """The values that a program has sent to a queue or a topic: `_pack` reversed."""

    def __init__(self, attributes: dict[str, Any], body: bytes) -> None:
        self.envelope = envelope = json_object(attributes.pop(ENVELOPE, {}).get("StringValue"))
        self.attributes = attributes
        attributes |= _unfolded(envelope.get("attributes"))
        own_headers = envelope.get("headers")
        self.own_headers: dict[str, Any] = own_headers if isinstance(own_headers, dict) else {}
        if envelope.get("encoding") == "empty":
            body = b""
        elif envelope.get("encoding") == "base64":
            with suppress(ValueError):
                body = base64.b64decode(body, validate=True)
        self.body = body
        self.type = attributes.get(TYPE, {}).get("StringValue")

    @property
    def headers(self) -> dict[str, Any]:
        named = {name: _value(self.attributes[name]) for name in self.attributes if name != TYPE}
        return named | self.own_headers


def _notification(body: bytes) -> dict[str, Any]:
    """The envelope of SNS for a queue without raw delivery; otherwise empty."""
    found = json_object(body)
    is_one = found.get("Type") == "Notification" and isinstance(found.get("Message"), str)
    return found if is_one and isinstance(found.get("TopicArn"), str) else {}


def _sns_attributes(notification: dict[str, Any]) -> dict[str, Any]:
    """The attributes of the notification, in the form of SQS."""
    attributes: dict[str, Any] = {}
    found = notification.get("MessageAttributes")
    for name, attribute in found.items() if isinstance(found, dict) else ():
        if isinstance(attribute, dict) and isinstance(value := attribute.get("Value"), str):
            attributes[name] = _string(value)
            if attribute.get("Type") == "Binary":
                with suppress(ValueError):
                    attributes[name] = {"BinaryValue": base64.b64decode(value, validate=True)}
    return attributes


def _event(body: bytes) -> dict[str, Any]:
    """The event of EventBridge in the body; otherwise empty."""
    found = json_object(body)
    is_one = "detail" in found and isinstance(found.get("detail-type"), str) and "source" in found
    return found if is_one and _dumped(found["detail"]) else {}


def _s3_event(body: bytes) -> str:
    """The kind of event in a notification of S3, such as ``ObjectCreated:Put``; empty for several or none."""
    found = json_object(body)
    if found.get("Service") == "Amazon S3":
        return text_of(found.get("Event"))
    records = found.get("Records")
    kinds = {
        text_of(record.get("eventName"))
        for record in (records if isinstance(records, list) else ())
        if isinstance(record, dict) and record.get("eventSource") == "aws:s3"
    }
    return kinds.pop() if len(kinds) == 1 else ""


def _dumped(value: Any) -> bytes:
    """The value as JSON; empty if it is nested too deeply."""
    with suppress(RecursionError):
        try:
            return json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            return json.dumps(value).encode()
    return b""


def _time_of(text: Any) -> datetime | None:
    with suppress(TypeError, ValueError):
        return datetime.fromisoformat(text)
    return None


def _postponed(envelope: dict[str, Any], about: dict[str, Any]) -> int:
    """How many deliveries found only that the message was not due yet: see `SqsBroker._deliver_all`."""
    waited = seconds_of(about.get("SentTimestamp")) / 1000 + MAX_DELAY_SECONDS
    seconds = seconds_of(envelope.get("due_at")) - waited
    return math.ceil(max(0.0, seconds) / MAX_VISIBILITY_SECONDS)


def _unfolded(folded: Any) -> dict[str, Any]:
    """The attributes in an envelope; none for anything that `_pack` does not write."""
    try:
        # Fewer attributes would be sent again as SQS's own, which may have neither any name nor any value.
        return _map_binary(folded, base64.b64decode) if len(folded) >= MAX_ATTRIBUTES else {}
    except (AttributeError, TypeError, ValueError):
        return {}


def _map_binary(attributes: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The attributes, with ``change`` applied to their binary values."""
    return {
        name: {
            field: change(value) if field == "BinaryValue" else value
            for field, value in attribute.items()
        }
        for name, attribute in attributes.items()
    }


def _value(attribute: dict[str, Any]) -> str | bytes | None:
    """Numbers are text too, with all their digits."""
    value: str | bytes | None = attribute.get("StringValue", attribute.get("BinaryValue"))
    return value


def _token(text: str) -> str:
    """The text, or a hash of it if a FIFO queue does not accept the text."""
    if FIFO_TOKEN.fullmatch(text):
        return text
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _string(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}


def _as_text(body: bytes) -> str | None:
    """The body as text; None if SQS would not accept it."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return text if CLEAN_TEXT.fullmatch(text) else None


def _dead_letter(message: Message, envelope: dict[str, Any], raw: dict[str, Any]) -> DeadLetter:
    # The redrive policy stores no time: the best is the time when the message was sent.
    sent_at = seconds_of(raw.get("Attributes", {}).get("SentTimestamp")) / 1000
    return make_dead_letter(
        message,
        message.receipt,
        reason=envelope.get("reason") or "moved by the redrive policy of SQS: delivered too often",
        attempts=envelope.get("attempts"),
        dead_lettered_at=envelope.get("dead_lettered_at") or sent_at,
    )


def _is_few(max_receive_count: Any) -> bool:
    return 0 < count_of(max_receive_count) < FEW_DELIVERIES


async def _within(seconds: float, work: Awaitable[object]) -> None:
    """Wait for the work, which is cancelled when the time is up."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work


class SqsBroker(Broker):
    """One queue and its dead-letter queue. Headers must be JSON values."""

    dead_letters_at_once = BATCH_SIZE
    capabilities: ClassVar[Capabilities] = Capabilities(
        order=False,
        delayed_publish=True,
    )
    destinations: ClassVar = {"queue": "queue:NAME", "topic": "topic:NAME"}
    origins = ("topic",)
    largest_body_bytes: ClassVar[int | None] = 750_000  # of 1 MiB: base64 makes it a third longer
    acks_late = True  # the deletion may succeed, and spares another consumer the work

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL or the queue's name cannot be used."""
        super().__init__(settings, prefetch)
        self._current_address = CurrentUrl(settings, parse_url)
        self._address = self._current_address()
        if settings.source.endswith(".fifo"):
            msg = "CONSUMER_SOURCE: FIFO queues are not supported: a retry would break their order"
            raise BrokerRefused(msg)
        if not QUEUE_NAME.fullmatch(settings.source):
            raise BrokerRefused(
                f"CONSUMER_SOURCE: {settings.source!r} cannot be a queue of SQS, whose names have letters, "
                "digits, - and _, and here at most 75 of them"
            )
        self._client: Any = None
        self._sns: Any = None  # from the first message to a topic on
        self._origin = {"source": settings.source, "queue": settings.source}
        self._dead_name = ""
        self._queue_url = self._dead_url = ""  # empty: the queue does not exist
        self._foreign = set[str]()  # the names of queues that are not as `declare` makes them
        self._most_bytes = dict[str, int]()
        """The most bytes of a message, by the URL of a queue that existed before."""
        # The limit of an existing queue's redrive policy; 0: no limit.
        self._most_deliveries = 0
        self._requests = SqsRequests(str(self._address), CLIENT_ERRORS, RULES, ANSWER_SECONDS)
        self.connectivity = Connectivity(str(self._address))
        self._tasks: list[asyncio.Task[None]] = []
        # Fetching
        self._fetching_ended = asyncio.Event()  # set by `stop`, or because the source failed
        self._wake = asyncio.Event()
        self._polls: set[asyncio.Task[Any]] = set()
        self._poll_limit = 1
        self._receives = False  # whether a poll was answered since the last outage
        self._requested_count = 0  # messages that the polls may bring
        self._outages_seen = 0  # errors of requests from before the last outage are ignored
        self._request_error: BrokerError | None = None
        # Publishing
        self._targets = dict[tuple[str, str], Target]()
        self._finding_target = asyncio.Lock()
        self._outbox: dict[Target, list[tuple[dict[str, Any], asyncio.Future[None]]]] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._send_slots = asyncio.Semaphore(MAX_REQUESTS)
        self._sending_in_order = asyncio.Lock()
        # Settling
        self._settlements: list[Settlement] = []
        self._has_settlements = asyncio.Event()
        self._flushed = asyncio.Event()
        self._flushed.set()

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._client = await self._open_client()
        try:
            async with self._requests.bounded(2 * CONNECT_SECONDS):
                await self._find_queues()
        except BaseException:
            await self._close_client()
            raise
        self.connectivity.established()
        return self

    async def _open_client(self) -> Any:
        self._address = self._current_address()
        return await self._open("sqs", self._address.client_arguments)

    async def _open(self, service: str, arguments: dict[str, Any]) -> Any:
        config = AioConfig(
            connect_timeout=CONNECT_SECONDS,
            # Try once more at once: a connection that idled for long may be closed just as a request is sent.
            retries={"mode": "standard", "total_max_attempts": 2},
            max_pool_connections=4 * MAX_REQUESTS,
            warm_up_loader_caches=True,  # in a thread: reading botocore's data about AWS blocks for long
        )
        client = get_session().create_client(service, config=config, **arguments)
        async with self._requests.bounded(CONNECT_SECONDS):
            return await client.__aenter__()

    async def declare(self) -> None:
        """Create the queues that do not exist."""
        for name, url in (
            (self.settings.source, self._queue_url),
            (self._dead_name, self._dead_url),
        ):
            if not url and name in self._foreign:
                raise MendableRefusal(f"the queue {name!r} {MISSING}: create it again, as it was")
        if not self._dead_url:
            self._dead_url = await self._create(self._dead_name)
        if not self._queue_url:
            arn = (await self._attributes(self._dead_url))["QueueArn"]
            policy = {"deadLetterTargetArn": arn, "maxReceiveCount": DELIVERY_LIMIT}
            self._queue_url = await self._create(
                self.settings.source, RedrivePolicy=json.dumps(policy)
            )

    async def delete(self) -> None:
        for url in filter(None, (self._queue_url, self._dead_url)):
            await self._call("delete_queue", QueueUrl=url)

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()
        for message in self.unacked:  # no worker will settle these any more
            if not message.receipt.expired:
                self._change_visibility(message, 0)
        self.unacked.clear()
        seconds = FLUSH_SECONDS if self.connectivity.up else OUTAGE_SECONDS
        await _within(seconds, self._flushed.wait())
        self.connectivity.up = False
        tasks = {*self._tasks, *self._polls, *self._sending}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        for settlement in self._settlements:
            log_settlement_lost(settlement.message, settlement.verb, "it was not written in time")
        self._settlements.clear()
        await self._close_client()

    async def _close_client(self) -> None:
        clients = self._client, self._sns
        self._client = self._sns = None
        closing = [client.__aexit__(None, None, None) for client in clients if client is not None]
        await _within(CLOSE_SECONDS, asyncio.gather(*closing))

    async def _call(
        self, operation: str, /, within_seconds: float | None = None, **parameters: Any
    ) -> Any:
        """One request, with its repetitions. Raises BrokerUnavailable or BrokerRefused."""
        if self._client is None:
            raise BrokerUnavailable(f"{self._address}: the connection is closed")
        client = self._sns if operation == PUBLISH else self._client
        async with self._requests.bounded(within_seconds):
            return await getattr(client, operation)(**parameters)

    async def _write_batch(
        self,
        operation: str,
        queue_url: str,
        entries: Sequence[dict[str, Any]],
        within_seconds: float | None = None,
    ) -> dict[int, dict[str, Any]]:
        """Returns SQS's answers about the entries that failed, by their place among the entries."""
        numbered = [{"Id": str(number), **entry} for number, entry in enumerate(entries)]
        answer = await self._call(operation, within_seconds, QueueUrl=queue_url, Entries=numbered)
        return {int(failure["Id"]): failure for failure in answer.get("Failed", ())}

    # -- topology

    async def _find_queues(self) -> None:
        """Find the two queues, and the most bytes of a message for each."""
        name = self.settings.source
        self._dead_name, owner = f"{name}-dead", None
        self._queue_url, attributes = await self._find(name)
        policy = json_object(attributes.get("RedrivePolicy"))
        self._most_deliveries = count_of(policy.get("maxReceiveCount"))
        if arn := policy.get("deadLetterTargetArn"):
            *_, owner, self._dead_name = arn.split(":")
        self._dead_url, dead_attributes = await self._find(self._dead_name, owner)
        if self._queue_url and self._most_deliveries != DELIVERY_LIMIT:
            self._foreign |= {name, self._dead_name} if arn and self._dead_url else {name}
        most = "MaximumMessageSize"
        self._most_bytes = {
            self._queue_url: min(MAX_BYTES, int(attributes.get(most, MAX_BYTES))),
            self._dead_url: min(MAX_BYTES, int(dead_attributes.get(most, MAX_BYTES))),
        }

    async def _find(self, name: str, owner: str | None = None) -> tuple[str, dict[str, str]]:
        """The queue's URL and attributes; empty if it does not exist."""
        account: dict[str, Any] = {} if owner is None else {"QueueOwnerAWSAccountId": owner}
        try:
            url = str((await self._call("get_queue_url", QueueName=name, **account))["QueueUrl"])
            return url, await self._attributes(url)
        except QueueMissing:
            return "", {}

    async def _create(self, name: str, **attributes: str) -> str:
        attributes["MessageRetentionPeriod"] = str(RETENTION_SECONDS)
        try:
            created = await self._call("create_queue", QueueName=name, Attributes=attributes)
        except BrokerRefused as refusal:
            if "Dead letter target does not exist" in str(refusal):
                # A new queue is visible after a second.
                raise QueueMissing(*refusal.args) from refusal
            msg = f"the queue {name!r} does not exist, and cannot be created: {refusal}"
            raise type(refusal)(msg) from refusal
        return str(created["QueueUrl"])

    async def _attributes(self, url: str) -> dict[str, str]:
        answer = await self._call("get_queue_attributes", QueueUrl=url, AttributeNames=["All"])
        attributes: dict[str, str] = answer.get("Attributes", {})
        return attributes

    async def describe(self) -> dict[str, int | str]:
        """As in `Connected`; SQS calls its counts approximate, and does not know its consumers."""
        name, count = self.settings.source, "ApproximateNumberOfMessages"
        described: dict[str, int | str] = {"broker": str(self._address)}
        if self._queue_url:
            queue = await self._attributes(self._queue_url)
            most = json_object(queue.get("RedrivePolicy")).get("maxReceiveCount", "no limit")
            if _is_few(most):
                most = f"{most}, {TOO_FEW}"
            described |= {
                name: int(queue[count]),
                f"{name} delayed": int(queue[f"{count}Delayed"]),
                f"{name} in flight": int(queue[f"{count}NotVisible"]),
                f"{name} deliveries at most": most,
            }
        else:
            described[name] = MISSING
        dead = await self._attributes(self._dead_url) if self._dead_url else {count: MISSING}
        return {**described, self._dead_name: int(dead[count]) if self._dead_url else MISSING}

    # -- fetching

    async def start(self) -> None:
        if _is_few(most := self._most_deliveries):
            log.warning("few_deliveries", queue=self.settings.source, most=most, reason=TOO_FEW)
        if not self._tasks:  # before the first poll: a shutdown meanwhile requeues its message
            self._start_task(self._write)
        self._start_poll(1)
        await asyncio.wait(self._polls)
        if self._request_error is not None:
            error, self._request_error = self._request_error, None
            raise error
        self._start_task(self._fetch)
        self._start_task(self._extend_visibility)

    def _start_task(self, work: Callable[[], Awaitable[None]]) -> None:
        self._tasks.append(asyncio.create_task(self._run(work), name=f"sqs{work.__name__}"))

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as failure:
            self._fail(failure)

    def _fail(self, failure: Exception) -> None:
        self.connectivity.up = False
        self._fetching_ended.set()
        self._wake.set()
        self.buffer.fail(failure)

    async def _stop_fetching(self) -> None:
        self._fetching_ended.set()
        self._wake.set()

    async def flush(self) -> None:
        if self.connectivity.up:
            await _within(STOP_SECONDS, self._polls_and_settlements())

    async def _polls_and_settlements(self) -> None:
        while self._polls and self.stopped:
            await asyncio.wait(self._polls)  # this wait does not cancel them
        await self._flushed.wait()

    async def _fetch(self) -> None:
        await self.connectivity.keep(self._keep_polling, until=self._fetching_ended)

    async def _keep_polling(self) -> None:
        """Poll until `stop`. Raises BrokerUnavailable or BrokerRefused."""
        if not self.connectivity.up:
            if self._current_address() is not self._address:
                client, self._client = self._client, await self._open_client()
                await _within(CLOSE_SECONDS, client.__aexit__(None, None, None))
            await self._find_queues()
            await self.prepare()
            polls = len(self._polls)
            self._start_polls()
            if len(self._polls) == polls:  # or after a poll, which needs a right of its own
                self.connectivity.established()
        while not self._fetching_ended.is_set():
            self._wake.clear()
            if self._request_error is not None:
                error, self._request_error = self._request_error, None
                self._outages_seen += 1
                self._receives = False
                raise error
            self._start_polls()
            await self._wake.wait()

    def _start_polls(self) -> None:
        # Each poll costs the same, whatever its count: fewer than ten are requested only if workers may be idle.
        behind = max(0, len(self._settlements) - self.prefetch)  # a retry takes two requests
        while len(self._polls) < self._poll_limit:
            room = self._room() - self._requested_count - behind
            idle = not self._polls and not self._has_takeable()
            if room < (1 if idle else min(BATCH_SIZE, self.prefetch)):
                return
            self._start_poll(min(BATCH_SIZE, room))

    def _start_poll(self, count: int) -> None:
        self._requested_count += count
        self._polls.add(asyncio.create_task(self._poll(count), name="sqs-poll"))

    async def _poll(self, count: int) -> None:
        """Never cancelled while SQS may answer: the messages of its answer would be invisible to all consumers."""
        poll = asyncio.current_task()
        assert poll is not None
        outages_seen = self._outages_seen
        wait_seconds = self._address.wait_seconds if self._receives else 0
        try:
            messages = await self._receive(
                self._queue_url, count, self._address.visibility_seconds, wait_seconds
            )
            if outages_seen == self._outages_seen and not self._fetching_ended.is_set():
                self._receives = True
                self.connectivity.established()
            # A full answer suggests more messages; on an empty queue a single poll waits.
            if not messages:
                self._poll_limit = 1
            elif len(messages) >= count / 2:
                self._poll_limit = min(self._poll_limit + 1, MAX_REQUESTS)
            await self._deliver_all(messages)
        except BrokerError as error:
            self._report(error, outages_seen)
        except Exception as failure:
            self._fail(failure)
        finally:
            self._requested_count -= count
            self._polls.discard(poll)  # not by a callback: the fetcher runs before that
            self._wake.set()

    def _report(self, error: BrokerError, outages_seen: int) -> None:
        """Report an error to the fetcher, which waits for the end of an outage, and fails after a refusal."""
        if outages_seen == self._outages_seen:
            self._request_error = error
            self._wake.set()

    async def _receive(
        self, queue_url: str, count: int, visibility_seconds: int, wait_seconds: int
    ) -> list[dict[str, Any]]:
        answer = await self._call(
            "receive_message",
            within_seconds=wait_seconds + ANSWER_SECONDS,
            QueueUrl=queue_url,
            MaxNumberOfMessages=count,
            VisibilityTimeout=visibility_seconds,
            WaitTimeSeconds=wait_seconds,
            MessageAttributeNames=["All"],
            MessageSystemAttributeNames=[
                *("MessageGroupId", "SentTimestamp", "ApproximateReceiveCount"),
            ],
        )
        messages: list[dict[str, Any]] = answer.get("Messages", [])
        return messages

    async def _deliver_all(self, messages: list[dict[str, Any]]) -> None:
        invisible_until = time.monotonic() + self._address.visibility_seconds
        due = []
        for raw in messages:
            message, envelope = _unpack(raw, invisible_until, self._origin)
            seconds_left = seconds_of(envelope.get("due_at")) - time.time()
            if seconds_left > 0:  # SQS's longest delay has passed, but the message is due later
                seconds = min(math.ceil(seconds_left), MAX_VISIBILITY_SECONDS)
                self._change_visibility(message, seconds)
            else:
                due.append(message)
        await self._deliver_fetched(due)

    def __anext__(self) -> Coroutine[Any, Any, Message]:
        return self._next_held()

    def _is_taken(self, message: Message) -> bool:
        if not self._has_takeable():
            self._wake.set()  # the next worker may find the buffer empty
        return super()._is_taken(message)

    def _lost_because(self, message: Message) -> str:
        return "its visibility timeout has passed" if message.receipt.expired else ""

    async def _extend_visibility(self) -> None:
        """Extends the visibility of all unacked messages before it expires."""
        seconds = self._address.visibility_seconds
        while True:
            await asyncio.sleep(seconds / 6)
            soon = time.monotonic() + seconds * 2 / 3
            due = [m for m in self.unacked if time.monotonic() < m.receipt.invisible_until < soon]
            for batches in _slices(_slices(due, BATCH_SIZE), MAX_REQUESTS):
                await asyncio.gather(*map(self._extend_batch, batches))

    async def _extend_batch(self, messages: list[Message]) -> None:
        outages_seen = self._outages_seen
        seconds = self._address.visibility_seconds
        invisible_until = time.monotonic() + seconds
        entries = [_visibility(message, seconds) for message in messages]
        # Not repeated once a message may be redelivered: some servers would take the message from its new consumer.
        seconds_left = min(m.receipt.invisible_until for m in messages) - time.monotonic()
        within_seconds = min(seconds_left, ANSWER_SECONDS)
        try:
            failures = await self._write_batch(
                CHANGE_VISIBILITY, self._queue_url, entries, within_seconds
            )
        except BrokerError as error:
            self._report(error, outages_seen)
            return
        for number, message in enumerate(messages):
            if number not in failures:
                message.receipt.invisible_until = invisible_until
            elif failures[number].get("SenderFault"):  # redelivered, or its 12 hours are over
                message.receipt.invisible_until = 0.0
                log.warning(
                    "lease_lost", message_id=message.id, reason=failures[number].get("Message")
                )

    # -- settling

    def _release(self, message: Message) -> None:
        super()._release(message)
        self._wake.set()  # there is room

    async def _ack(self, message: Message) -> None:
        self._delete(message, "ack")

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        seconds = math.ceil(delay_seconds)
        due_at = {"due_at": time.time() + seconds} if seconds > MAX_DELAY_SECONDS else {}
        entry = _pack_again(message, attempts=message.attempt, **due_at)
        entry["DelaySeconds"] = min(seconds, MAX_DELAY_SECONDS)
        self._check_size(entry, self._queue_url)
        await self._send_again(Settlement(SEND, self._queue_url, entry, message, "retry", reason))

    async def _reject(self, message: Message, reason: str) -> None:
        history = {"reason": reason, "dead_lettered_at": time.time(), "attempts": message.attempt}

        def entry_of(body: bytes, shortened: dict[str, Any]) -> dict[str, Any]:
            whole = _pack_again(message, **history)
            if not shortened:
                return whole
            type_only = {TYPE: _string(message.type)} if message.type else {}
            return {**whole, **_pack(body, message.id, type_only, shortened, history)}

        def fits(body: bytes, shortened: dict[str, Any]) -> bool:
            return _size(entry_of(body, shortened)) <= self._most_bytes.get(
                self._dead_url, MAX_BYTES
            )

        entry = entry_of(*fit_dead_letter(message.receipt.body, {}, fits))
        self._check_size(entry, self._dead_url)
        await self._send_again(Settlement(SEND, self._dead_url, entry, message, "reject", reason))

    def _check_size(self, entry: dict[str, Any], queue_url: str) -> None:
        """Raises BrokerRefused for a message that the queue does not take."""
        size, most = _size(entry), self._most_bytes.get(queue_url, MAX_BYTES)
        if size > most:
            msg = f"this message cannot be sent: with its headers it has {size} bytes, and SQS accepts {most}"
            raise BrokerRefused(msg)

    async def _send_again(self, settlement: Settlement) -> None:
        """Send it later, with others in a request. A message that was put off is sent alone, and its answer awaited."""
        if settlement.message not in self.put_offs.counts:
            self._settle(settlement)
            return
        await self._send(settlement.queue_url, [settlement.entry])
        self._delete(settlement.message, settlement.verb)

    async def _requeue(self, message: Message) -> None:
        # SQS counts requeues too: a copy starts a new count.
        if self.suspects.may_kill(message):
            message.deliveries = 1
            with suppress(BrokerRefused):
                entry = _pack_again(message, attempts=message.attempt - 1)
                self._check_size(entry, self._queue_url)
                self._settle(Settlement(SEND, self._queue_url, entry, message, "requeue"))
                return
        self._change_visibility(message, 0)

    def _delete(self, message: Message, verb: str) -> None:
        entry = {"ReceiptHandle": message.receipt.handle}
        self._settle(Settlement(DELETE, self._queue_url, entry, message, verb))

    def _change_visibility(self, message: Message, seconds: int) -> None:
        entry = _visibility(message, seconds)
        self._settle(Settlement(CHANGE_VISIBILITY, self._queue_url, entry, message, "requeue"))

    def _settle(self, settlement: Settlement) -> None:
        self._settlements.append(settlement)
        self._flushed.clear()
        self._has_settlements.set()

    async def _write(self) -> None:
        """Write settlements, ten in a request."""
        while await self._has_settlements.wait():
            if len(self._settlements) < BATCH_SIZE:
                await asyncio.sleep(GATHER_SECONDS)
            full = len(self._settlements) // BATCH_SIZE * BATCH_SIZE
            count = min(full or len(self._settlements), BATCH_SIZE * MAX_REQUESTS)
            kinds: dict[tuple[str, str], list[Settlement]] = {}
            for settlement in self._settlements[:count]:
                kind = (settlement.operation, settlement.queue_url)
                kinds.setdefault(kind, []).append(settlement)
            outcomes = await asyncio.gather(
                *(
                    self._write_settlements(batch)
                    for of_one_kind in kinds.values()
                    for batch in _batches(of_one_kind, attrgetter("entry"))
                )
            )
            del self._settlements[:count]
            self._wake.set()  # there may be room
            failed = [settlement for batch in outcomes for settlement in batch]
            for settlement in failed:
                if settlement.message.receipt.expired:
                    reason = "too late: its visibility timeout has passed"
                    log_settlement_lost(settlement.message, settlement.verb, reason)
                else:
                    self._settlements.append(settlement)
            if failed:
                await asyncio.sleep(FIRST_PAUSE_SECONDS)
            if not self._settlements:
                self._has_settlements.clear()
                self._flushed.set()

    async def _write_settlements(self, settlements: list[Settlement]) -> list[Settlement]:
        """Write one request; delete the messages that it has sent again. Returns the settlements to try again."""
        outages_seen = self._outages_seen
        operation, queue_url, *_ = settlements[0]
        entries = [settlement.entry for settlement in settlements]
        try:
            failures = await self._write_batch(operation, queue_url, entries)
        except BrokerUnavailable as outage:
            self._report(outage, outages_seen)
            return settlements
        except BrokerRefused as refusal:
            if operation != SEND:
                self._report(refusal, outages_seen)
                if isinstance(refusal, MendableRefusal):  # an outage, which will end
                    return settlements
            elif len(settlements) > 1 and not isinstance(refusal, BrokerDenied):
                # One of the messages is the cause.
                outcomes = await asyncio.gather(
                    *(self._write_settlements([s]) for s in settlements)
                )
                return [settlement for alone in outcomes for settlement in alone]
            error: BrokerRefused | None = refusal
            failures = {number: {"SenderFault": True} for number in range(len(settlements))}
        else:
            error = None
        failed = []
        for number, settlement in enumerate(settlements):
            if number not in failures:
                if operation == SEND:
                    self._delete(settlement.message, settlement.verb)
            elif failures[number].get("SenderFault"):
                message, verb = settlement.message, settlement.verb
                refused = error or BrokerRefused(
                    f"{self._address} did not accept a message: {failures[number].get('Message')}"
                )
                if operation == SEND and not message.receipt.expired:
                    self.unacked.add(message)  # its visibility is extended again
                    seconds = settlement.entry.get("DelaySeconds", 0)
                    await self._put_off(message, verb, refused, settlement.reason, seconds)
                else:  # the message is redelivered
                    log_settlement_lost(message, verb, refused)
            else:
                failed.append(settlement)
        return failed

    # -- publishing

    def destination_of(self, message: OutgoingMessage) -> tuple[str, str]:
        kind, name = super().destination_of(message)
        problem = ""
        if not DESTINATION[kind].fullmatch(name):
            problem = f"{name[:200]!r} cannot be the name or the ARN of a {kind}"
        elif message.delay_seconds > MAX_DELAY_SECONDS:
            problem = (
                f"a message can be delayed by at most {MAX_DELAY_SECONDS} seconds, and not by "
                f"{message.delay_seconds:g}"
            )
        elif message.delay_seconds > 0 and (kind == "topic" or name.endswith(FIFO)):
            problem = (
                f"the {kind} {name!r} cannot delay a message: publish it without delay_seconds"
            )
        if problem:
            raise BrokerRefused(f"{self._address}: {problem}")
        return kind, name

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        """Messages of several handlers share requests."""
        targets = [await self._target_of(message) for message in messages]
        entries = [
            self._entry(message, target) for message, target in zip(messages, targets, strict=True)
        ]
        loop = asyncio.get_running_loop()
        sent: list[asyncio.Future[None]] = []
        for target, entry in zip(targets, entries, strict=True):
            sent.append(future := loop.create_future())
            if (waiting := self._outbox.get(target)) is None:
                waiting = self._outbox[target] = []
                sending = asyncio.create_task(self._empty_outbox(target), name="sqs-send")
                self._sending.add(sending)
                sending.add_done_callback(self._sending.discard)
            waiting.append((entry, future))
        await together(sent)

    def _entry(self, message: OutgoingMessage, target: Target) -> dict[str, Any]:
        """Raises BrokerRefused for a message that cannot be sent."""
        # Such a type would fail the whole request, with other messages.
        if message.type and not CLEAN_TEXT.fullmatch(message.type):
            msg = f"this message cannot be sent: SQS refuses the type {message.type[:100]!r}"
            raise BrokerRefused(msg)
        attributes = {TYPE: _string(message.type)} if message.type else {}
        entry = _pack(message.body, message.id, attributes, headers_of(message))
        self._check_size(entry, target.address)
        if target.name.endswith(FIFO):
            entry["MessageGroupId"] = _token(message.key or message.id)
            entry["MessageDeduplicationId"] = _token(message.id)
        elif message.delay_seconds > 0:
            entry["DelaySeconds"] = math.ceil(message.delay_seconds)
        return entry

    async def _target_of(self, message: OutgoingMessage) -> Target:
        """Raises BrokerRefused for a missing queue; SNS reports a missing topic only when it gets a message."""
        kind, name = self.destination_of(message)
        if (kind, name) == ("queue", self.settings.source) and self._queue_url:
            return Target(kind, name, self._queue_url)
        if (target := self._targets.get((kind, name))) is not None:
            return target
        async with self._finding_target:
            if (target := self._targets.get((kind, name))) is None:
                address = await (self._topic(name) if kind == "topic" else self._queue(name))
                target = self._targets[kind, name] = Target(kind, name, address)
        return target

    async def _queue(self, name: str) -> str:
        """The URL of a queue to publish to."""
        account: dict[str, Any] = {}
        if ":" in name:
            *_, account["QueueOwnerAWSAccountId"], name = name.split(":")
        try:
            found = await self._call("get_queue_url", QueueName=name, **account)
        except QueueMissing as missing:
            raise BrokerRefused(f"{self._address}: the queue {name!r} {MISSING}") from missing
        return str(found["QueueUrl"])

    async def _topic(self, name: str) -> str:
        """The ARN of a topic; a topic without an ARN is in the account and the region of the source."""
        if self._sns is None:
            arguments = self._address.client_arguments
            if AWS.fullmatch(urlsplit(self._address.endpoint or "").hostname or ""):
                arguments["endpoint_url"] = None  # an endpoint of SQS, not of SNS
            self._sns = await self._open("sns", arguments)
        if ":" in name:
            return name
        if not self._queue_url:
            msg = f"{self._address}: the topic {name!r} is in the account of the queue {self.settings.source!r}, which {MISSING}"
            raise BrokerRefused(msg)
        arn = (await self._attributes(self._queue_url))["QueueArn"]
        _, partition, _, region, owner, _ = arn.split(":")
        return f"arn:{partition}:sns:{region}:{owner}:{name}"

    async def _empty_outbox(self, target: Target) -> None:
        if len(self._outbox[target]) < BATCH_SIZE:
            await asyncio.sleep(GATHER_SECONDS)
        waiting = self._outbox.pop(target)
        batches = _batches(waiting, lambda one: one[0])
        try:
            if target.name.endswith(FIFO):
                async with self._sending_in_order:
                    for batch in batches:
                        await self._send_batch(target, batch)
            else:
                await asyncio.gather(*(self._send_batch(target, batch) for batch in batches))
        finally:  # so that no handler waits forever
            for _, sent in waiting:
                if not sent.done():
                    sent.set_exception(BrokerUnavailable(f"{self._address}: it was not sent"))

    async def _send_batch(
        self, target: Target, batch: list[tuple[dict[str, Any], "asyncio.Future[None]"]]
    ) -> None:
        """One request; sets the outcome of each message."""
        failures: dict[int, dict[str, Any]] = {}
        error: BrokerError | None = None
        try:
            async with self._send_slots:
                failures = await self._write_target(target, [entry for entry, _ in batch])
        except QueueMissing:
            self._targets.pop((target.kind, target.name), None)
            error = BrokerRefused(f"{self._address}: {target} {MISSING}")
        except BrokerError as failure:
            if _code_of(failure.__cause__) == "NotFound":
                error = BrokerRefused(f"{self._address}: {target} {MISSING}")
            elif len(batch) > 1 and type(failure) is BrokerRefused:  # one message is the cause
                for one in batch:
                    await self._send_batch(target, [one])
                return
            else:
                error = type(failure)(f"{failure} (while publishing to {target})")
        for number, (_, sent) in enumerate(batch):
            outcome = error
            if failed := failures.get(number):
                msg = f"{self._address}: {target} did not accept a message: {failed.get('Message')}"
                outcome = (
                    BrokerRefused(msg) if failed.get("SenderFault") else BrokerUnavailable(msg)
                )
            if sent.done():
                continue  # its handler was cancelled
            if outcome is None:
                sent.set_result(None)
            else:
                sent.set_exception(outcome)

    async def _write_target(
        self, target: Target, entries: list[dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        """As `_write_batch`, for a queue or a topic."""
        if target.kind == "queue":
            return await self._write_batch(SEND, target.address, entries)
        numbered = [
            {"Id": str(number), "Message": entry.pop("MessageBody"), **entry}
            for number, entry in enumerate(dict(entry) for entry in entries)
        ]
        topic = {"TopicArn": target.address, "PublishBatchRequestEntries": numbered}
        answer = await self._call(PUBLISH, None, **topic)
        return {int(failure["Id"]): failure for failure in answer.get("Failed", ())}

    async def _send(self, queue_url: str, entries: list[dict[str, Any]]) -> None:
        """Returns when SQS has confirmed every one. Raises BrokerUnavailable or BrokerRefused."""
        for batches in _slices(list(_batches(entries, lambda entry: entry)), MAX_REQUESTS):
            sending = (self._write_batch(SEND, queue_url, batch) for batch in batches)
            for outcome in await together(sending):
                for failure in outcome.values():
                    msg = f"{self._address} did not accept a message: {failure.get('Message')}"
                    raise (
                        BrokerRefused(msg) if failure.get("SenderFault") else BrokerUnavailable(msg)
                    )

    # -- dead letters

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[dict[str, str]]:
        """The receipt handles of letters that were read and not taken, by SQS's ids: others do not see them."""
        hidden: dict[str, str] = {}
        hiding = asyncio.create_task(self._keep_hidden(hidden))
        try:
            yield hidden
        finally:
            hiding.cancel()
            with suppress(BrokerError, TimeoutError):  # then LISTING_SECONDS must pass
                await to_the_end(self._hide(hidden, 0), ANSWER_SECONDS)

    async def _keep_hidden(self, hidden: dict[str, str]) -> None:
        while True:
            await asyncio.sleep(LISTING_SECONDS / 3)
            await self._hide(hidden, LISTING_SECONDS)

    async def _hide(self, hidden: dict[str, str], seconds: int) -> None:
        entries = [
            {"ReceiptHandle": handle, "VisibilityTimeout": seconds}
            for handle in hidden.values()
            if handle
        ]
        for batches in _slices(_slices(entries, BATCH_SIZE), MAX_REQUESTS):
            changing = (
                self._write_batch(CHANGE_VISIBILITY, self._dead_url, batch) for batch in batches
            )
            await asyncio.gather(*changing, return_exceptions=True)

    async def _present_letters(self, reading: dict[str, str]) -> AsyncGenerator[DeadLetter, None]:
        """Not always the oldest first, as SQS has no order."""
        count, idle = await self.count_dead_letters(), 0.0
        while len(reading) < count and idle < IDLE_BATCHES + len(reading) / BATCH_SIZE:
            batch = await self._receive(self._dead_url, BATCH_SIZE, LISTING_SECONDS, 1)
            idle = idle + 1 if batch else math.inf
            new = [raw for raw in batch if raw["MessageId"] not in reading]
            # If a letter is received again, its last receipt is the valid one.
            reading |= {raw["MessageId"]: raw["ReceiptHandle"] for raw in batch}
            for raw in new:
                idle = 0.0
                yield _dead_letter(*_unpack(raw), raw)

    async def _take_letters(
        self, reading: dict[str, str], letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        if replay:
            await self._send(self._queue_url, [_pack_again(letter) for letter in letters])
        refused: list[dict[str, Any]] = []
        for batch in _slices([letter.receipt.message_id for letter in letters], BATCH_SIZE):
            entries = [{"ReceiptHandle": reading[id]} for id in batch]
            failures = await self._write_batch(DELETE, self._dead_url, entries)
            refused += failures.values()
            reading.update({id: "" for place, id in enumerate(batch) if place not in failures})
        yield len(letters) - len(refused)
        if refused:
            msg = f"{self._address} did not delete {len(refused)} of {len(letters)} dead letters"
            raise BrokerUnavailable(f"{msg}: {refused[0].get('Message')}")

    async def count_dead_letters(self) -> int:
        if not self._dead_url:
            return 0
        attributes = await self._attributes(self._dead_url)
        return sum(
            int(attributes[f"ApproximateNumberOfMessages{which}"]) for which in ("", "NotVisible")
        )


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> SqsBroker:
    """Raises BrokerRefused if the URL or the queue's name cannot be used."""
    return SqsBroker(settings, prefetch)
