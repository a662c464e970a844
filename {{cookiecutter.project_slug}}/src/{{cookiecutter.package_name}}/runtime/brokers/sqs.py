# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Amazon SQS, or a server with its API, by aiobotocore: a standard queue and its dead-letter queue.

``sqs://eu-central-1`` is a region of AWS; the credentials come from where AWS's own tools look for them
(``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, the role of the pod, the task or the machine).
``sqs://key:secret@host:port/region`` is another server, over TLS unless it is on this machine or the URL has
``?tls=false``; ``?cafile=ca.pem`` names the CA. ``sqs://vpce-1.sqs.eu-central-1.vpce.amazonaws.com`` is an endpoint of AWS.
Characters that a URL reserves are percent-encoded in a secret. ``?visibility_seconds=30`` is the visibility timeout,
after which the messages of a dead consumer are redelivered; ``?wait_seconds=2`` is how long a poll waits for a
message, and so the longest that stopping an idle consumer takes.

For ``CONSUMER_SOURCE=orders`` the queues are ``orders`` and ``orders-dead``, declared if they do not exist. An existing
queue keeps its attributes, and its redrive policy names the dead-letter queue.

A retry or a dead letter is sent, and confirmed, before the message is deleted: a crash in between makes a
duplicate, never a loss. Delays are whole seconds, rounded up. A standard queue has no order.
"""

import asyncio
import base64
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
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

from ..errors import BrokerDenied, BrokerError, BrokerRefused, BrokerUnavailable
from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .delivery import (
    bytes_of,
    count_of,
    fit_dead_letter,
    json_object,
    make_dead_letter,
    make_message,
    seconds_of,
)
from .requests import Requests, Rule
from .source import (
    FIRST_PAUSE_SECONDS,
    MISSING,
    Broker,
    Capabilities,
    Connectivity,
    log_settlement_lost,
)
from .url import BrokerUrl

log = structlog.get_logger()

T = TypeVar("T")

VISIBILITY_SECONDS = 30
WAIT_SECONDS = 2
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
"""For the answer to a request, beyond the wait of a poll."""
STOP_SECONDS = 2.5
FLUSH_SECONDS = 2.0
CLOSE_SECONDS = 0.5
GATHER_SECONDS = 0.005
"""How long settlements wait for others: ten cost one request."""
LISTING_SECONDS = 60
"""The visibility timeout of dead letters that are being listed, replayed or purged."""
BATCH_SIZE = 10
"""The messages that fit in any request."""
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
"""Message attribute, a JSON object, for all that SQS's own attributes cannot hold (they are at most 10, without
empty text or control characters): id, headers, attempts, encoding of the body, due_at; reason and dead_lettered_at
of a dead letter; ``attributes`` if a producer's own leave no place for this one."""
TYPE = "type"
"""Message attribute: the message's type, which any producer may set. All others are headers."""

CLEAN_TEXT = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")
"""The bodies that SQS accepts."""
QUEUE_NAME = re.compile("[A-Za-z0-9_-]{1,75}")
REGION = re.compile(r"[a-z]{2,}(-[a-z]+)+-\d+")
AWS = re.compile(r"(.*\.)?(amazonaws\.com(\.cn)?|api\.aws|api\.amazonwebservices\.com\.cn)")
"""Its host names."""
LOOPBACK = re.compile(r"localhost|127\.[\d.]+|::1")

SEND, DELETE, CHANGE_VISIBILITY = (
    "send_message_batch",
    "delete_message_batch",
    "change_message_visibility_batch",
)

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


class SqsRequests(Requests):
    """Distinguishes SQS's refusals, which are all one exception, by their codes."""

    def translated(self, error: BaseException) -> BrokerError:
        sentence = f"{self.address}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, ClientError):
            code = str(error.response["Error"]["Code"])
            status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
            if code.endswith(("NonExistentQueue", "QueueDoesNotExist")):
                return QueueMissing(sentence)
            if status >= 500 or status in (408, 429) or code.endswith(CODES_OF_OUTAGES):
                return BrokerUnavailable(sentence)
            denied = status in (401, 403) or code.startswith(CODES_OF_DENIALS)
            return BrokerDenied(sentence) if denied else BrokerRefused(sentence)
        if "CERTIFICATE_VERIFY_FAILED" in str(error):  # botocore has no exception class for it
            return BrokerRefused(sentence)
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
    if url.names_tls_files:
        url.tls_context()  # so that a mistake is reported at start
    (host,) = url.hosts
    region, endpoint = host, None
    if not REGION.fullmatch(host):
        parts = urlsplit(f"//{host}")
        name = parts.hostname or ""
        is_aws, is_here = AWS.fullmatch(name), LOOPBACK.fullmatch(name)
        if not (is_here or parts.port or "." in name or ":" in name):
            msg = (
                f"CONSUMER_BROKER_URL: {host!r} is neither a region of AWS, like eu-central-1, "
                "nor a host with its port, like localhost:4566"
            )
            raise BrokerRefused(msg)
        of_host = [label for label in name.split(".") if is_aws and REGION.fullmatch(label)]
        region = url.path.strip("/") or (of_host or ["us-east-1"])[0]
        tls = url.flag("tls", default=not is_here or "cafile" in url.options)
        if is_aws and not tls:
            msg = "CONSUMER_BROKER_URL: AWS always uses TLS: leave out tls=false"
            raise BrokerRefused(msg)
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


@dataclass(slots=True, eq=False)
class Receipt:
    """For settling a delivery, and for sending the same message again."""

    handle: str
    invisible_until: float
    """time.monotonic(), in seconds; then SQS redelivers the message. It is extended while the message is unacked."""
    headers: dict[str, Any]
    """Those of our own producers; other producers' are attributes."""
    attributes: dict[str, Any]
    group: str | None
    """The MessageGroupId, by which SQS shares a queue fairly between tenants."""

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
    """Those that fit in one request each."""
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
    """In bytes, as SQS counts them: the body, and name, type and value of each attribute."""
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
    """The entry of a batch that sends this. Raises BrokerRefused if the headers are not JSON."""
    envelope: dict[str, Any] = {"id": id, **(history or {})}
    if headers:
        envelope["headers"] = headers
    text = _as_text(body)
    if text is None:
        envelope["encoding"] = "base64" if body else "empty"
        text = base64.b64encode(body).decode() or "-"
    if len(attributes) >= MAX_ATTRIBUTES:  # no place for the envelope: all of them go into it
        envelope["attributes"] = _map_binary(attributes, lambda v: base64.b64encode(v).decode())
        attributes = {}
    try:
        packed = json.dumps(envelope)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"this message cannot be sent: its headers are not JSON: {error}"
        raise BrokerRefused(msg) from error
    return {"MessageBody": text, "MessageAttributes": {**attributes, ENVELOPE: _string(packed)}}


def _pack_again(message: Message, **history: Any) -> dict[str, Any]:
    """The same message, with its history."""
    receipt = message.receipt
    entry = _pack(message.body, message.id, receipt.attributes, receipt.headers, history)
    if receipt.group is not None:
        entry["MessageGroupId"] = receipt.group
    return entry


def _unpack(
    raw: dict[str, Any], invisible_until: float = math.inf
) -> tuple[Message, dict[str, Any]]:
    """The message and its envelope. Never raises: any producer may send anything."""
    attributes = dict(raw.get("MessageAttributes", {}))
    envelope = json_object(attributes.pop(ENVELOPE, {}).get("StringValue"))
    attributes |= _unfolded(envelope.get("attributes"))
    own_headers = envelope.get("headers")
    headers: dict[str, Any] = own_headers if isinstance(own_headers, dict) else {}
    body = bytes_of(raw.get("Body"))
    if envelope.get("encoding") == "empty":
        body = b""
    elif envelope.get("encoding") == "base64":
        with suppress(ValueError):
            body = base64.b64decode(body, validate=True)
    message = make_message(
        body,
        id=envelope.get("id") or raw.get("MessageId"),
        type=attributes.get(TYPE, {}).get("StringValue"),
        headers={
            **{name: _value(attributes[name]) for name in attributes if name != TYPE},
            **headers,
        },
        # SQS's own redrive moves a dead letter as it is: then it is a new message, as after `dead-letters replay`.
        failures=None if "dead_lettered_at" in envelope else envelope.get("attempts"),
        receipt=Receipt(
            raw["ReceiptHandle"],
            invisible_until,
            headers,
            attributes,
            raw.get("Attributes", {}).get("MessageGroupId"),
        ),
    )
    return message, envelope


def _unfolded(folded: Any) -> dict[str, Any]:
    """The attributes in an envelope; none for anything that `_pack` does not write."""
    try:
        # Fewer ones would be sent again as SQS's own, which may have neither any name nor any value.
        return _map_binary(folded, base64.b64decode) if len(folded) >= MAX_ATTRIBUTES else {}
    except (AttributeError, TypeError, ValueError):
        return {}


def _map_binary(attributes: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The attributes with their binary values changed: to text, or back."""
    return {
        name: {
            field: change(value) if field == "BinaryValue" else value
            for field, value in attribute.items()
        }
        for name, attribute in attributes.items()
    }


def _value(attribute: dict[str, Any]) -> str | bytes | None:
    """Numbers too are text, with all their digits."""
    value: str | bytes | None = attribute.get("StringValue", attribute.get("BinaryValue"))
    return value


def _string(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}


def _as_text(body: bytes) -> str | None:
    """None if SQS would not accept it as it is."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return text if CLEAN_TEXT.fullmatch(text) else None


def _dead_letter(message: Message, envelope: dict[str, Any], raw: dict[str, Any]) -> DeadLetter:
    # The redrive policy leaves no time: the best is the time when the message was sent.
    sent_at = seconds_of(raw.get("Attributes", {}).get("SentTimestamp")) / 1000
    return make_dead_letter(
        message.body,
        id=message.id,
        type=message.type,
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

    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=True, attempts=True, requeue=True, dead_letters=True, order=False
    )
    largest_body_bytes: ClassVar[int | None] = 750_000  # of 1 MiB: base64 makes it a third longer

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL or the queue's name cannot be used."""
        super().__init__(settings, prefetch)
        self._address = parse_url(settings.broker_url.get_secret_value())
        if settings.source.endswith(".fifo"):
            msg = "CONSUMER_SOURCE: FIFO queues are not supported: a retry would break their order"
            raise BrokerRefused(msg)
        if not QUEUE_NAME.fullmatch(settings.source):
            msg = (
                f"CONSUMER_SOURCE: {settings.source!r} cannot be a queue of SQS, whose names have letters, "
                "digits, - and _, and here at most 75 of them"
            )
            raise BrokerRefused(msg)
        self._client: Any = None
        self._dead_name = ""
        self._queue_url = self._dead_url = ""  # empty: the queue does not exist
        self._most_bytes = dict[str, int]()
        """Of a message, by the URL of the queue that existed before."""
        self._most_deliveries = (
            0  # by the redrive policy of a queue that existed before; 0: no limit
        )
        self._requests = SqsRequests(str(self._address), CLIENT_ERRORS, RULES, ANSWER_SECONDS)
        self.connectivity = Connectivity(str(self._address))
        self._tasks: list[asyncio.Task[None]] = []
        # Fetching
        self._fetching_ended = asyncio.Event()  # by `stop`, or because the source failed
        self._wake = asyncio.Event()
        self._polls: set[asyncio.Task[Any]] = set()
        self._poll_limit = 1
        self._requested_count = 0  # messages that the polls may bring
        self._outages_seen = 0  # errors of requests from before the last outage are ignored
        self._request_error: BrokerError | None = None
        # Settling
        self._settlements: list[Settlement] = []
        self._has_settlements = asyncio.Event()
        self._flushed = asyncio.Event()
        self._flushed.set()

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        config = AioConfig(
            connect_timeout=CONNECT_SECONDS,
            # Once more at once: a connection that idled for long may be closed just as a request is sent.
            retries={"mode": "standard", "total_max_attempts": 2},
            max_pool_connections=4 * MAX_REQUESTS,
            warm_up_loader_caches=True,  # in a thread: reading all that botocore knows of AWS blocks for long
        )
        client = get_session().create_client("sqs", config=config, **self._address.client_arguments)
        async with self._requests.bounded(CONNECT_SECONDS):
            self._client = await client.__aenter__()
        try:
            async with self._requests.bounded(2 * CONNECT_SECONDS):
                await self._find_queues()
        except BaseException:
            await self._close_client()
            raise
        self.connectivity.established()
        return self

    async def declare(self) -> None:
        """Create the queues that do not exist."""
        if not self._dead_url:
            self._dead_url = await self._create(self._dead_name)
        if not self._queue_url:
            arn = (await self._attributes(self._dead_url))["QueueArn"]
            policy = {"deadLetterTargetArn": arn, "maxReceiveCount": DELIVERY_LIMIT}
            self._queue_url = await self._create(
                self.settings.source, RedrivePolicy=json.dumps(policy)
            )

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()
        for message in self.unacked:  # no worker will settle these any more
            if not message.receipt.expired:
                self._change_visibility(message, 0)
        self.unacked.clear()
        seconds = FLUSH_SECONDS if self.connectivity.up else CLOSE_SECONDS
        await _within(seconds, self._flushed.wait())
        self.connectivity.up = False
        tasks = {*self._tasks, *self._polls}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        for settlement in self._settlements:
            log_settlement_lost(settlement.message, settlement.verb, "it was not written in time")
        self._settlements.clear()
        await self._close_client()

    async def _close_client(self) -> None:
        client, self._client = self._client, None
        await _within(CLOSE_SECONDS, client.__aexit__(None, None, None))

    @property
    def connected(self) -> bool:
        return self.connectivity.up

    async def _call(
        self, operation: str, /, within_seconds: float | None = None, **parameters: Any
    ) -> Any:
        """One request, and its repetitions. Raises BrokerUnavailable or BrokerRefused."""
        if self._client is None:
            msg = f"{self._address}: the connection is closed"
            raise BrokerUnavailable(msg)
        async with self._requests.bounded(within_seconds):
            return await getattr(self._client, operation)(**parameters)

    async def _write_batch(
        self,
        operation: str,
        queue_url: str,
        entries: Sequence[dict[str, Any]],
        within_seconds: float | None = None,
    ) -> dict[int, dict[str, Any]]:
        """Returns SQS's answers about those that failed, by their place among the entries."""
        numbered = [{"Id": str(number), **entry} for number, entry in enumerate(entries)]
        answer = await self._call(operation, within_seconds, QueueUrl=queue_url, Entries=numbered)
        return {int(failure["Id"]): failure for failure in answer.get("Failed", ())}

    # -- topology

    async def _find_queues(self) -> None:
        """Find the two queues, and the most bytes of a message that each takes."""
        name = self.settings.source
        self._dead_name, owner = f"{name}-dead", None
        self._queue_url, attributes = await self._find(name)
        policy = json_object(attributes.get("RedrivePolicy"))
        self._most_deliveries = count_of(policy.get("maxReceiveCount"))
        if arn := policy.get("deadLetterTargetArn"):
            *_, owner, self._dead_name = arn.split(":")
        self._dead_url, dead_attributes = await self._find(self._dead_name, owner)
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
        self._tasks = [
            asyncio.create_task(self._run(work), name=f"sqs{work.__name__}")
            for work in (self._fetch, self._extend_visibility, self._write)
        ]

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

    async def _flush(self) -> None:
        if self.connectivity.up:
            await _within(STOP_SECONDS, self._polls_and_settlements())

    async def _polls_and_settlements(self) -> None:
        while self._polls:
            await asyncio.wait(self._polls)  # which does not cancel them
        await self._flushed.wait()

    async def _fetch(self) -> None:
        await self.connectivity.keep(self._keep_polling, until=self._fetching_ended)

    async def _keep_polling(self) -> None:
        """Until stopped. Raises BrokerUnavailable or BrokerRefused."""
        if not self.connectivity.up:
            await self._find_queues()
            await self.declare()
            self.connectivity.established()
        while not self._fetching_ended.is_set():
            self._wake.clear()
            if self._request_error is not None:
                error, self._request_error = self._request_error, None
                self._outages_seen += 1
                raise error
            self._start_polls()
            await self._wake.wait()

    def _start_polls(self) -> None:
        # Each poll costs the same, whatever it returns: fewer than ten are requested only if workers may be idle.
        while len(self._polls) < self._poll_limit:
            room = self.prefetch - len(self.unacked) - self._requested_count
            idle = not self._polls and not self.buffer.takeable
            if room < (1 if idle else min(BATCH_SIZE, self.prefetch)):
                return
            count = min(BATCH_SIZE, room)
            self._requested_count += count
            self._polls.add(asyncio.create_task(self._poll(count), name="sqs-poll"))

    async def _poll(self, count: int) -> None:
        """Never cancelled while SQS may answer: the messages of its answer would be invisible to all consumers."""
        poll = asyncio.current_task()
        assert poll is not None
        outages_seen = self._outages_seen
        try:
            messages = await self._receive(
                self._queue_url, count, self._address.visibility_seconds, self._address.wait_seconds
            )
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
            self._polls.discard(poll)  # not by a callback: the fetcher looks before that
            self._wake.set()

    def _report(self, error: BrokerError, outages_seen: int) -> None:
        """For the fetcher: it waits for the end of an outage, and fails after a refusal."""
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
            MessageSystemAttributeNames=["MessageGroupId", "SentTimestamp"],
        )
        messages: list[dict[str, Any]] = answer.get("Messages", [])
        return messages

    async def _deliver_all(self, messages: list[dict[str, Any]]) -> None:
        invisible_until = time.monotonic() + self._address.visibility_seconds
        some_lost = self._some_in_flight_is_lost()
        for raw in messages:
            message, envelope = _unpack(raw, invisible_until)
            seconds_left = seconds_of(envelope.get("due_at")) - time.time()
            if seconds_left > 0:  # the longest delay of SQS has passed, but not all of this one
                seconds = min(math.ceil(seconds_left), MAX_VISIBILITY_SECONDS)
                self._change_visibility(message, seconds)
            elif not ((some_lost and self._still_in_flight(message)) or self._deliver(message)):
                await self.requeue(message)

    async def __anext__(self) -> Message:
        while True:
            message = await self.buffer.get()
            if not self.buffer.takeable:
                self._wake.set()  # the next worker may find the buffer empty
            if not self._lost_because(message):
                return message
            self._release(message)
            self.buffer.settled(message)

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
        # Not repeated once a message may be redelivered: some servers would take it from its new consumer.
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
                log.warning("lease_lost", id=message.id, reason=failures[number].get("Message"))

    # -- settling

    def _holds(self, message: Message, settlement: str) -> bool:
        self._wake.set()  # there is room
        # A deletion may still succeed after SQS has redelivered the message, and spares that consumer the work.
        deletable = settlement == "ack" and message in self.unacked
        return deletable or super()._holds(message, settlement)

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

        entry = entry_of(*fit_dead_letter(message.body, {}, fits))
        self._check_size(entry, self._dead_url)
        await self._send_again(Settlement(SEND, self._dead_url, entry, message, "reject", reason))

    def _check_size(self, entry: dict[str, Any], queue_url: str) -> None:
        """Raises BrokerRefused for a message that the queue does not take."""
        size, most = _size(entry), self._most_bytes.get(queue_url, MAX_BYTES)
        if size > most:
            msg = f"this message cannot be sent: with its headers it has {size} bytes, and SQS takes {most}"
            raise BrokerRefused(msg)

    async def _send_again(self, settlement: Settlement) -> None:
        """With others in a request, later; one that was put off is sent alone, and its answer awaited."""
        if settlement.message not in self.put_offs:
            self._settle(settlement)
            return
        await self._send(settlement.queue_url, [settlement.entry])
        self._delete(settlement.message, settlement.verb)

    async def _requeue(self, message: Message) -> None:
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
        """One request; messages that it has sent again are deleted next. Returns those to be tried again."""
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
            elif len(settlements) > 1 and not isinstance(refusal, BrokerDenied):
                # One of them is the cause.
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

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        if not self._queue_url:
            msg = f"{self._address}: the queue {self.settings.source!r} {MISSING}"
            raise BrokerRefused(msg)
        packed = []
        for message in messages:
            attributes = {TYPE: _string(message.type)} if message.type else {}
            entry = _pack(message.body, message.id, attributes, dict(message.headers))
            self._check_size(entry, self._queue_url)
            packed.append(entry)
        await self._send(self._queue_url, packed)

    async def _send(self, queue_url: str, entries: list[dict[str, Any]]) -> None:
        """Returns when SQS has confirmed every one. Raises BrokerUnavailable or BrokerRefused."""
        for batches in _slices(list(_batches(entries, lambda entry: entry)), MAX_REQUESTS):
            sending = [self._write_batch(SEND, queue_url, batch) for batch in batches]
            for outcome in await asyncio.gather(*sending, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
                for failure in outcome.values():
                    msg = f"{self._address} did not accept a message: {failure.get('Message')}"
                    raise (
                        BrokerRefused(msg) if failure.get("SenderFault") else BrokerUnavailable(msg)
                    )

    # -- dead letters

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        """As in `DeadLetters`, but not certainly the oldest, as SQS has no order. Others do not see them meanwhile."""
        seen: dict[str, Message] = {}
        try:
            while (
                self._dead_url
                and len(seen) < limit
                and (
                    batch := await self._receive(
                        self._dead_url, min(BATCH_SIZE, limit - len(seen)), LISTING_SECONDS, 1
                    )
                )
            ):
                letters = []
                for raw in batch:
                    message, envelope = _unpack(raw)
                    if raw["MessageId"] not in seen:
                        letters.append(_dead_letter(message, envelope, raw))
                    seen[raw["MessageId"]] = message  # the receipt of the last delivery counts
                if not letters:
                    return  # this takes so long that the first ones are visible again
                for letter in letters:
                    yield letter
        finally:
            for messages in _slices(list(seen.values()), BATCH_SIZE):
                entries = [_visibility(message, 0) for message in messages]
                await self._write_batch(CHANGE_VISIBILITY, self._dead_url, entries)

    async def count_dead_letters(self) -> int:
        if not self._dead_url:
            return 0
        attributes = await self._attributes(self._dead_url)
        return sum(
            int(attributes[f"ApproximateNumberOfMessages{which}"]) for which in ("", "NotVisible")
        )

    async def _dead_batches(self) -> AsyncIterator[list[Message]]:
        """The present dead letters, in tens; they are deleted after each step."""
        left = await self.count_dead_letters()
        while left > 0 and (
            raw := await self._receive(self._dead_url, min(BATCH_SIZE, left), LISTING_SECONDS, 1)
        ):
            batch = [_unpack(message)[0] for message in raw]
            yield batch
            entries = [{"ReceiptHandle": message.receipt.handle} for message in batch]
            await self._write_batch(DELETE, self._dead_url, entries)
            left -= len(batch)

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        moved = 0
        async for batch in self._dead_batches():
            await self._send(self._queue_url, [_pack_again(message) for message in batch])
            moved += len(batch)
            yield moved

    async def purge_dead_letters(self) -> AsyncIterator[int]:
        # Not PurgeQueue: SQS accepts it once a minute, and returns no count.
        deleted = 0
        async for batch in self._dead_batches():
            deleted += len(batch)
            yield deleted


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> SqsBroker:
    """Raises BrokerRefused if the URL or the queue's name cannot be used."""
    return SqsBroker(settings, prefetch)
