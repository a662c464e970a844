# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""Amazon SQS, or a server that speaks its API, by aiobotocore: a standard queue and its dead letters.

``sqs://eu-central-1`` is a region of AWS; the credentials come from where all of AWS's tools look for them
(``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, the role of the pod, the task or the machine).
``sqs://key:secret@host:port/region`` is another server, over TLS with ``?tls=true`` or ``?cafile=ca.pem``. What a
secret may not hold in a URL is percent-encoded. ``?visibility_seconds=30`` says after how long the messages of
a dead consumer go to others, ``?wait_seconds=2`` how long one poll waits for a message, and so an idle stop.

For ``CONSUMER_SOURCE=orders`` the queues are ``orders`` and ``orders-dead``, made when they are not there. A queue
that is there stays as its owner made it, and its redrive policy says where its dead letters go.

A retry or a dead letter is sent, and confirmed, before the message is deleted: a crash in between makes a
duplicate, never a loss. Delays are whole seconds, rounded up. Messages come in no certain order.
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
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

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

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .source import (
    FIRST_PAUSE_SECONDS,
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    Capabilities,
    Connectivity,
    Source,
)

log = structlog.get_logger()

T = TypeVar("T")

VISIBILITY_SECONDS = 30
WAIT_SECONDS = 2
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
"""How long SQS may take to answer a request, beyond the wait of a poll."""
STOP_SECONDS = 2.5
FLUSH_SECONDS = 2.0
CLOSE_SECONDS = 0.5
GATHER_SECONDS = 0.005
"""How long settlements wait for others: ten cost one request."""
LOOK_SECONDS = 60
"""How long dead letters are hidden from others that are being listed, replayed or purged."""
TEN = 10
"""So many messages fit in any request."""
BATCH_BYTES = 262_144
"""So many bytes fit on every server; AWS itself takes four times as many. A larger message goes alone."""
MOST_BYTES = 1_048_576
MOST_REQUESTS = 10
"""At a time, of each kind: one connection each."""
MOST_ATTRIBUTES = 10
LONGEST_DELAY_SECONDS = 900
LONGEST_HIDE_SECONDS = 43_000
"""SQS hides a message for 12 hours, counted from its delivery."""
RETENTION_SECONDS = 1_209_600
"""The longest there is, 14 days. Afterwards SQS deletes, whatever it is."""
# Give-backs and crashes count as deliveries. A message that kills its process each time must end somewhere;
# hundreds of rolling restarts must not end it. SQS takes no higher number.
DELIVERY_LIMIT = 1000

ENVELOPE = "x-consumer"
"""Message attribute, JSON: what SQS has no place for, or too few (10 attributes, no empty text, no control
characters): id, headers, attempts, encoding of the body, due_at; reason and dead_lettered_at of a dead letter."""
TYPE = "type"
"""Message attribute: the message's type, which any producer may set. All others are headers."""
ENVELOPE_TYPES: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "headers": dict,
    "attempts": int,
    "encoding": str,
    "due_at": (int, float),
    "reason": str,
    "dead_lettered_at": (int, float),
    "attributes": dict,
}

CLEAN_TEXT = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")
"""What the body of a message may be."""
QUEUE_NAME = re.compile("[A-Za-z0-9_-]{1,75}")
REGION = re.compile(r"[a-z]{2,}(-[a-z]+)+-\d+")

SEND, DELETE, HIDE = (
    "send_message_batch",
    "delete_message_batch",
    "change_message_visibility_batch",
)

OUTAGES = (HTTPClientError, BotoConnectionError, MetadataRetrievalError, CredentialRetrievalError)
TRY_AGAIN = (
    "Throttling",
    "ThrottlingException",
    "RequestThrottled",
    "KmsThrottled",
    "OverLimit",
    "QueueDeletedRecently",
)

for _name in ("aiobotocore", "botocore"):
    # What matters of it is logged here, once.
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.CRITICAL)


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> "SqsSource":
    """Raises BrokerRefused if the URL or the queue's name makes no sense."""
    return SqsSource(settings, prefetch)


class QueueGone(BrokerUnavailable):
    """The queue is not there (any more): it is made again when the source connects again."""


class Address(NamedTuple):
    """What ``CONSUMER_BROKER_URL`` says."""

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
        """For people; without credentials."""
        return f"SQS in {self.region}" if self.endpoint is None else f"SQS at {self.endpoint}"


@dataclass(slots=True, eq=False)
class Receipt:
    """What is needed to settle a delivery, and to send the same message again."""

    handle: str
    hidden_until: float
    """time.monotonic(), in seconds; afterwards SQS gives the message to others. The keeper moves it on."""
    headers: dict[str, Any]
    """Those of our own producers; other producers' are attributes."""
    attributes: dict[str, Any]
    group: str | None
    """The MessageGroupId, by which SQS shares out a queue fairly between tenants."""

    @property
    def lapsed(self) -> bool:
        return time.monotonic() >= self.hidden_until


class Settlement(NamedTuple):
    """One entry of a batch request that tells SQS the fate of a message."""

    operation: str
    queue_url: str
    entry: dict[str, Any]
    message: Message


class SqsSource(Source):
    """See the module. In the sentences of its errors and logs the URL has no credentials."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=True, attempts=True, requeue=True, dead_letters=True, order=False
    )
    largest_body_bytes: ClassVar[int | None] = 750_000  # of 1 MiB: base64 makes it a third longer

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        self._address = parse_url(settings.broker_url.get_secret_value())
        if settings.source.endswith(".fifo"):
            msg = "CONSUMER_SOURCE: FIFO queues are not supported: a retry would break the order they are for"
            raise BrokerRefused(msg)
        if not QUEUE_NAME.fullmatch(settings.source):
            msg = (
                f"CONSUMER_SOURCE: {settings.source!r} cannot be a queue of SQS, whose names have letters, "
                "digits, - and _, and here at most 75 of them"
            )
            raise BrokerRefused(msg)
        self._client: Any = None
        self._queue_url = ""
        self._dead_name = ""
        self._dead_url = ""
        self.connectivity = Connectivity(str(self._address))
        self._tasks: list[asyncio.Task[None]] = []
        # Taking
        self._stopping = asyncio.Event()  # also when the source failed
        self._stop_began = False
        self._wake = asyncio.Event()
        self._polls: set[asyncio.Task[Any]] = set()
        self._most_polls = 1
        self._asked = 0  # messages that the polls may bring
        self._epoch = 0  # of the connection: what a request of an earlier one says is old news
        self._trouble: BrokerError | None = None
        self._held: set[Message] = set()  # in the buffer and in hand
        # Settling
        self._pending: list[Settlement] = []
        self._work = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        config = AioConfig(
            connect_timeout=CONNECT_SECONDS,
            # Once more at once: a connection that idled for long may be closed just as a request is sent.
            retries={"mode": "standard", "total_max_attempts": 2},
            max_pool_connections=4 * MOST_REQUESTS,
            warm_up_loader_caches=True,  # in a thread: reading all that botocore knows of AWS blocks for long
        )
        client = get_session().create_client("sqs", config=config, **self._address.client_arguments)
        self._client = await self._bounded(client.__aenter__(), CONNECT_SECONDS)
        try:
            async with asyncio.timeout(2 * CONNECT_SECONDS):
                await self._declare()
        except BaseException as error:
            await self._close_client()
            if isinstance(error, TimeoutError):
                msg = f"{self._address} takes too long to answer"
                raise BrokerUnavailable(msg) from None
            raise
        self.connectivity.established()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()
        for message in self._held:  # nobody will settle these any more
            self._hide(message, 0)
        self._held.clear()
        await _wait(self._written.wait(), FLUSH_SECONDS if self.connectivity.up else CLOSE_SECONDS)
        self.connectivity.up = False
        tasks = {*self._tasks, *self._polls}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        for settlement in self._pending:
            _log_lost(settlement, "it could not be written before the end")
        self._pending.clear()
        await self._close_client()

    async def _close_client(self) -> None:
        client, self._client = self._client, None
        await _wait(client.__aexit__(None, None, None), CLOSE_SECONDS)

    @property
    def connected(self) -> bool:
        return self.connectivity.up

    async def _declare(self) -> None:
        """Find the two queues, or make them."""
        name = self.settings.source
        self._dead_name, owner = f"{name}-dead", None
        url = await self._find(name)
        if url is not None:
            attributes = await self._attributes(url, "RedrivePolicy")
            if policy := json.loads(attributes.get("RedrivePolicy") or "{}"):
                *_, owner, self._dead_name = policy["deadLetterTargetArn"].split(":")
        dead_url = await self._find(self._dead_name, owner)
        self._dead_url = dead_url or await self._create(self._dead_name)
        if url is None:
            arn = (await self._attributes(self._dead_url, "QueueArn"))["QueueArn"]
            policy = {"deadLetterTargetArn": arn, "maxReceiveCount": DELIVERY_LIMIT}
            url = await self._create(name, RedrivePolicy=json.dumps(policy))
        self._queue_url = url

    async def _find(self, name: str, owner: str | None = None) -> str | None:
        account: dict[str, Any] = {} if owner is None else {"QueueOwnerAWSAccountId": owner}
        try:
            found = await self._call("get_queue_url", QueueName=name, **account)
        except QueueGone:
            return None
        return str(found["QueueUrl"])

    async def _create(self, name: str, **attributes: str) -> str:
        attributes["MessageRetentionPeriod"] = str(RETENTION_SECONDS)
        try:
            created = await self._call("create_queue", QueueName=name, Attributes=attributes)
        except BrokerRefused as refusal:
            if "Dead letter target does not exist" in str(refusal):
                raise QueueGone(
                    *refusal.args
                ) from refusal  # SQS takes a second to know a new queue
            msg = f"the queue {name!r} is not there, and cannot be made: {refusal}"
            raise BrokerRefused(msg) from refusal
        return str(created["QueueUrl"])

    async def _attributes(self, url: str, name: str = "All") -> dict[str, str]:
        answer = await self._call("get_queue_attributes", QueueUrl=url, AttributeNames=[name])
        attributes: dict[str, str] = answer.get("Attributes", {})
        return attributes

    async def describe(self) -> dict[str, int | str]:
        """As in `Source`; SQS calls its counts approximate, and does not know its consumers."""
        name = self.settings.source
        queue = await self._attributes(self._queue_url)
        dead = await self._attributes(self._dead_url)
        policy = json.loads(queue.get("RedrivePolicy") or "{}")
        return {
            "broker": str(self._address),
            name: int(queue["ApproximateNumberOfMessages"]),
            f"{name} delayed": int(queue["ApproximateNumberOfMessagesDelayed"]),
            f"{name} in hand": int(queue["ApproximateNumberOfMessagesNotVisible"]),
            f"{name} deliveries at most": policy.get("maxReceiveCount", "no limit"),
            self._dead_name: int(dead["ApproximateNumberOfMessages"]),
        }

    # -- requests

    async def _call(
        self, operation: str, /, within_seconds: float | None = None, **parameters: Any
    ) -> Any:
        """One request, and its repetitions. Raises BrokerUnavailable or BrokerRefused."""
        if self._client is None:
            msg = f"{self._address}: the connection is closed"
            raise BrokerUnavailable(msg)
        request = getattr(self._client, operation)(**parameters)
        seconds = ANSWER_SECONDS if within_seconds is None else within_seconds
        return await self._bounded(request, seconds)

    async def _bounded(self, request: Awaitable[T], seconds: float) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await request
        except TimeoutError:
            msg = f"{self._address} gave no answer within {seconds:g} seconds"
            raise BrokerUnavailable(msg) from None
        except (BotoCoreError, ClientError, ValueError) as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> BrokerError:
        sentence = f"{self._address}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, ClientError):
            code = str(error.response["Error"]["Code"])
            status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
            if code.endswith(("NonExistentQueue", "QueueDoesNotExist")):
                return QueueGone(sentence)
            if status >= 500 or status == 429 or code.endswith(TRY_AGAIN):
                return BrokerUnavailable(sentence)
            return BrokerRefused(sentence)
        if isinstance(error, NoCredentialsError):
            msg = (
                f"{self._address}: no credentials were found in the URL, nor where AWS's tools look"
            )
            return BrokerRefused(msg)
        if isinstance(error, OUTAGES) and "CERTIFICATE_VERIFY_FAILED" not in sentence:
            return BrokerUnavailable(sentence)
        return BrokerRefused(sentence)

    async def _write_batch(
        self,
        operation: str,
        queue_url: str,
        entries: Sequence[dict[str, Any]],
        within_seconds: float | None = None,
    ) -> dict[int, dict[str, Any]]:
        """Returns SQS's words on those that failed, by their place among the entries."""
        numbered = [{"Id": str(number), **entry} for number, entry in enumerate(entries)]
        answer = await self._call(operation, within_seconds, QueueUrl=queue_url, Entries=numbered)
        return {int(failure["Id"]): failure for failure in answer.get("Failed", ())}

    # -- taking

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._unless_it_fails(work), name=f"sqs{work.__name__}")
            for work in (self._keep_filling, self._keep_hidden, self._write)
        ]

    async def _unless_it_fails(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as failure:
            self._fail(failure)

    def _fail(self, failure: Exception) -> None:
        self.connectivity.up = False
        self._stopping.set()
        self._wake.set()
        self.buffer.fail(failure)

    async def _keep_filling(self) -> None:
        await self.connectivity.keep(self._fill, until=self._stopping)

    async def _fill(self) -> None:
        """Keep as many polls under way as pay, until stopped. Raises BrokerUnavailable or BrokerRefused."""
        if not self.connectivity.up:
            await self._declare()
            self.connectivity.established()
        while not self._stopping.is_set():
            self._wake.clear()
            if self._trouble is not None:
                trouble, self._trouble = self._trouble, None
                self._epoch += 1
                raise trouble
            self._start_polls()
            await self._wake.wait()

    def _start_polls(self) -> None:
        # Each poll costs the same, whatever it brings: less than ten are asked for only if workers may be idle.
        while len(self._polls) < self._most_polls:
            room = self.prefetch - len(self._held) - self._asked
            idle = not self._polls and not self.buffer.takeable
            if room < (1 if idle else min(TEN, self.prefetch)):
                return
            count = min(TEN, room)
            self._asked += count
            self._polls.add(asyncio.create_task(self._poll(count), name="sqs-poll"))

    async def _poll(self, count: int) -> None:
        """Never cancelled while SQS may answer: the messages of its answer would be hidden from everybody."""
        poll = asyncio.current_task()
        assert poll is not None
        epoch = self._epoch
        try:
            messages = await self._receive(
                self._queue_url, count, self._address.visibility_seconds, self._address.wait_seconds
            )
            # More may be there when many were; on an empty queue a single poll waits.
            if not messages:
                self._most_polls = 1
            elif len(messages) >= count / 2:
                self._most_polls = min(self._most_polls + 1, MOST_REQUESTS)
            self._deliver(messages)
        except BrokerError as error:
            self._report(error, epoch)
        except Exception as failure:
            self._fail(failure)
        finally:
            self._asked -= count
            self._polls.discard(poll)  # not by a callback: the fetcher looks before that
            self._wake.set()

    def _report(self, error: BrokerError, epoch: int) -> None:
        """For the fetcher: it mends an outage, and ends with a refusal."""
        if epoch == self._epoch:
            self._trouble = error
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

    def _deliver(self, messages: list[dict[str, Any]]) -> None:
        hidden_until = time.monotonic() + self._address.visibility_seconds
        for raw in messages:
            message, envelope = _unpack(raw, hidden_until)
            seconds_left = envelope.get("due_at", 0) - time.time()
            if seconds_left > 0:  # the longest delay that SQS knows has passed, but not all of it
                self._hide(message, min(math.ceil(seconds_left), LONGEST_HIDE_SECONDS))
            elif self._stopping.is_set():
                self._hide(message, 0)
                self.requeued_count += 1
            else:
                self._held.add(message)
                self.buffer.put(message)

    async def __anext__(self) -> Message:
        while True:
            message = await self.buffer.get()
            if message.receipt.lapsed:  # an outage lasted so long that others have it now
                self._held.discard(message)
            if not self.buffer.takeable:
                self._wake.set()  # the next worker may find nothing
            if message in self._held:
                return message
            self.buffer.done(message)

    async def _keep_hidden(self) -> None:
        """Hide what is held from others for longer, in good time: long handlers, and long buffers."""
        seconds = self._address.visibility_seconds
        while True:
            await asyncio.sleep(seconds / 6)
            soon = time.monotonic() + seconds * 2 / 3
            due = [m for m in self._held if time.monotonic() < m.receipt.hidden_until < soon]
            for batches in _slices(_slices(due, TEN), MOST_REQUESTS):
                await asyncio.gather(*map(self._extend, batches))

    async def _extend(self, messages: list[Message]) -> None:
        epoch = self._epoch
        seconds = self._address.visibility_seconds
        hidden_until = time.monotonic() + seconds
        entries = [_hiding(message, seconds) for message in messages]
        # Not repeated when others may have a message: some servers would take it away from them.
        seconds_left = min(m.receipt.hidden_until for m in messages) - time.monotonic()
        within_seconds = min(seconds_left, ANSWER_SECONDS)
        try:
            failures = await self._write_batch(HIDE, self._queue_url, entries, within_seconds)
        except BrokerError as error:
            self._report(error, epoch)
            return
        for number, message in enumerate(messages):
            if number not in failures:
                message.receipt.hidden_until = hidden_until
            elif failures[number].get("SenderFault"):  # others have it, or its 12 hours are over
                message.receipt.hidden_until = 0.0
                log.warning("lease_lost", id=message.id, reason=failures[number].get("Message"))

    async def stop(self) -> None:
        if self._stop_began:
            return
        self._stop_began = True
        self._stopping.set()
        self._wake.set()
        for message in self.buffer.take_all():
            await self.requeue(message)
        self.buffer.close()
        if self.connectivity.up:
            await _wait(self._come_to_rest(), STOP_SECONDS)

    async def _come_to_rest(self) -> None:
        while self._polls:
            await asyncio.wait(self._polls)  # which does not cancel them
        await self._written.wait()

    # -- settling

    async def ack(self, message: Message) -> None:
        if self._take_out(message, DELETE):
            self._settle(self._deletion(message))

    async def requeue(self, message: Message) -> None:
        if self._take_out(message, HIDE):
            self._hide(message, 0)
            self.requeued_count += 1

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        if self._take_out(message, SEND):
            seconds = math.ceil(delay_seconds)
            due_at = {"due_at": time.time() + seconds} if seconds > LONGEST_DELAY_SECONDS else {}
            entry = _pack_again(message, attempts=message.attempt, **due_at)
            entry["DelaySeconds"] = min(seconds, LONGEST_DELAY_SECONDS)
            self._settle(Settlement(SEND, self._queue_url, entry, message))

    async def reject(self, message: Message, reason: str) -> None:
        if self._take_out(message, SEND):
            entry = _pack_again(
                message, attempts=message.attempt, reason=reason, dead_lettered_at=time.time()
            )
            self._settle(Settlement(SEND, self._dead_url, entry, message))

    def _take_out(self, message: Message, operation: str) -> bool:
        """Whether the message is ours to settle. A deletion may still help when SQS has given it to others."""
        ours = message in self._held and (operation == DELETE or not message.receipt.lapsed)
        self._held.discard(message)
        self._wake.set()
        if not ours:
            log.warning("settlement_lost", id=message.id, settlement=operation)
        return ours

    def _deletion(self, message: Message) -> Settlement:
        entry = {"ReceiptHandle": message.receipt.handle}
        return Settlement(DELETE, self._queue_url, entry, message)

    def _hide(self, message: Message, seconds: int) -> None:
        self._settle(Settlement(HIDE, self._queue_url, _hiding(message, seconds), message))

    def _settle(self, settlement: Settlement) -> None:
        self._pending.append(settlement)
        self._written.clear()
        self._work.set()

    async def _write(self) -> None:
        """Tell SQS the fate of messages, ten in a request."""
        while await self._work.wait():
            if len(self._pending) < TEN:
                await asyncio.sleep(GATHER_SECONDS)
            count = len(self._pending) // TEN * TEN or len(self._pending)
            count = min(count, TEN * MOST_REQUESTS)
            batches = list(_batches(self._pending[:count]))
            outcomes = await asyncio.gather(*map(self._write_settlements, batches))
            del self._pending[:count]
            again = [settlement for failed, _ in outcomes for settlement in failed]
            self._pending += [settlement for _, next_ones in outcomes for settlement in next_ones]
            for settlement in again:
                if settlement.message.receipt.lapsed:
                    _log_lost(settlement, "too late: SQS gives the message to others")
                else:
                    self._pending.append(settlement)
            if again:
                await asyncio.sleep(FIRST_PAUSE_SECONDS)
            if not self._pending:
                self._work.clear()
                self._written.set()

    async def _write_settlements(
        self, settlements: list[Settlement]
    ) -> tuple[list[Settlement], list[Settlement]]:
        """One request. Returns those to be tried again, and those to be written after these."""
        epoch = self._epoch
        operation, queue_url, *_ = settlements[0]
        try:
            failures = await self._write_batch(
                operation, queue_url, [settlement.entry for settlement in settlements]
            )
        except BrokerUnavailable as outage:
            self._report(outage, epoch)
            return settlements, []
        except BrokerRefused as refusal:
            if operation != SEND:
                self._report(refusal, epoch)
            refused = {"SenderFault": True, "Message": str(refusal)}
            failures = dict.fromkeys(range(len(settlements)), refused)
        again, deletions = [], []
        for number, settlement in enumerate(settlements):
            if number not in failures:
                if operation == SEND:
                    deletions.append(self._deletion(settlement.message))
            elif failures[number].get("SenderFault"):
                _log_lost(settlement, failures[number].get("Message"))  # and it comes again
            else:
                again.append(settlement)
        return again, deletions

    # -- publishing

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        packed = []
        for message in messages:
            attributes = {TYPE: _string(message.type)} if message.type else {}
            entry = _pack(message.body, message.id, attributes, dict(message.headers))
            if (size := _size(entry)) > MOST_BYTES:
                msg = f"this message cannot be sent: with its headers it has {size} bytes, and SQS takes {MOST_BYTES}"
                raise BrokerRefused(msg)
            packed.append(entry)
        await self._send(self._queue_url, packed)

    async def _send(self, queue_url: str, entries: Iterable[dict[str, Any]]) -> None:
        """Returns when SQS has confirmed every one. Raises BrokerUnavailable or BrokerRefused."""
        batches = list(_batches(Settlement(SEND, queue_url, e, Message(b"")) for e in entries))
        for at_once in _slices(batches, MOST_REQUESTS):
            sending = [
                self._write_batch(SEND, queue_url, [settlement.entry for settlement in batch])
                for batch in at_once
            ]
            for outcome in await asyncio.gather(*sending, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
                for failure in outcome.values():
                    msg = f"{self._address} did not take a message: {failure.get('Message')}"
                    raise (
                        BrokerRefused(msg) if failure.get("SenderFault") else BrokerUnavailable(msg)
                    )

    # -- dead letters

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        """As in `Source`, but not certainly the oldest, as SQS has no order. They are hidden meanwhile."""
        hidden: dict[str, Message] = {}
        try:
            while len(hidden) < limit and (
                batch := await self._receive(
                    self._dead_url, min(TEN, limit - len(hidden)), LOOK_SECONDS, 1
                )
            ):
                letters = []
                for raw in batch:
                    message, envelope = _unpack(raw)
                    if raw["MessageId"] not in hidden:
                        letters.append(_dead_letter(message, envelope, raw))
                    hidden[raw["MessageId"]] = message  # the receipt of the last delivery counts
                if not letters:
                    return  # this takes so long that the first ones are visible again
                for letter in letters:
                    yield letter
        finally:
            for back in _slices(list(hidden.values()), TEN):
                entries = [_hiding(message, 0) for message in back]
                await self._write_batch(HIDE, self._dead_url, entries)

    async def count_dead_letters(self) -> int:
        attributes = await self._attributes(self._dead_url)
        return sum(
            int(attributes[f"ApproximateNumberOfMessages{which}"]) for which in ("", "NotVisible")
        )

    async def _dead_batches(self) -> AsyncIterator[list[Message]]:
        """The dead letters that are there now, in tens; they are deleted after each step."""
        left = await self.count_dead_letters()
        while left > 0 and (
            raw := await self._receive(self._dead_url, min(TEN, left), LOOK_SECONDS, 1)
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
        # Not PurgeQueue, which SQS takes once a minute and does not count.
        deleted = 0
        async for batch in self._dead_batches():
            deleted += len(batch)
            yield deleted


def parse_url(text: str) -> Address:
    """Raises BrokerRefused without the URL, and without its parser's error: each may hold a part of the secret."""
    msg = (
        "CONSUMER_BROKER_URL: not like sqs://eu-central-1 or sqs://key:secret@host:port/region; "
        "in a secret, characters like / + @ : ? # % are percent-encoded"
    )
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise BrokerRefused(msg) from None
    misplaced = "@" in parts.path + parts.query + parts.fragment
    if not host or misplaced or parts.fragment or "/" in parts.path.strip("/"):
        raise BrokerRefused(msg)
    if (parts.username is None) != (parts.password is None):
        raise BrokerRefused(msg)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    cafile = options.pop("cafile", None)
    tls = options.pop("tls", "false" if cafile is None else "true")
    try:
        visibility = int(options.pop("visibility_seconds", VISIBILITY_SECONDS))
        wait = int(options.pop("wait_seconds", WAIT_SECONDS))
    except ValueError:
        visibility = wait = 0
    if (
        options
        or tls not in ("true", "false")
        or not (1 <= visibility <= 43_200 and 1 <= wait <= 20)
    ):
        msg = (
            "CONSUMER_BROKER_URL: the options of sqs are ?visibility_seconds= (1 to 43200), "
            "wait_seconds= (1 to 20), tls= (true or false) and cafile="
        )
        raise BrokerRefused(msg)
    if cafile is not None and not Path(cafile).is_file():
        msg = f"CONSUMER_BROKER_URL: there is no file {cafile} with certificates"
        raise BrokerRefused(msg)
    endpoint = None
    region = host
    if port is not None or not REGION.fullmatch(host):
        region = parts.path.strip("/") or "us-east-1"
        netloc = parts.netloc.rpartition("@")[2]
        endpoint = f"{'https' if tls == 'true' else 'http'}://{netloc}"
    key, secret = (
        None if part is None else unquote(part) for part in (parts.username, parts.password)
    )
    return Address(region, endpoint, key, secret, cafile, visibility, wait)


def _slices(items: list[T], length: int) -> list[list[T]]:
    return [items[start : start + length] for start in range(0, len(items), length)]


def _batches(settlements: Iterable[Settlement]) -> Iterator[list[Settlement]]:
    """What fits in one request each: of one operation on one queue."""
    kinds: dict[tuple[str, str], list[Settlement]] = {}
    for settlement in settlements:
        kinds.setdefault((settlement.operation, settlement.queue_url), []).append(settlement)
    for of_one_kind in kinds.values():
        batch: list[Settlement] = []
        size = 0
        for settlement in of_one_kind:
            entry_bytes = _size(settlement.entry)
            if batch and (len(batch) == TEN or size + entry_bytes > BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(settlement)
            size += entry_bytes
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


def _hiding(message: Message, seconds: int) -> dict[str, Any]:
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
    if len(attributes) >= MOST_ATTRIBUTES:  # no place for ours: all of them go into it
        envelope["attributes"] = _folded(attributes, lambda value: base64.b64encode(value).decode())
        attributes = {}
    try:
        packed = json.dumps(envelope)
    except (TypeError, ValueError) as error:
        msg = f"this message cannot be sent: its headers are not JSON: {error}"
        raise BrokerRefused(msg) from error
    return {"MessageBody": text, "MessageAttributes": {**attributes, ENVELOPE: _string(packed)}}


def _pack_again(message: Message, **history: Any) -> dict[str, Any]:
    """The same message, with what happened to it."""
    receipt = message.receipt
    entry = _pack(message.body, message.id, receipt.attributes, receipt.headers, history)
    if receipt.group is not None:
        entry["MessageGroupId"] = receipt.group
    return entry


def _unpack(raw: dict[str, Any], hidden_until: float = math.inf) -> tuple[Message, dict[str, Any]]:
    """The message and its envelope. Never raises: any producer may send anything."""
    attributes = dict(raw.get("MessageAttributes", {}))
    envelope = _read_envelope(attributes.pop(ENVELOPE, {}).get("StringValue", ""))
    attributes |= envelope.get("attributes", {})
    headers = envelope.get("headers", {})
    body: bytes = raw["Body"].encode()
    if envelope.get("encoding") == "empty":
        body = b""
    elif envelope.get("encoding") == "base64":
        with suppress(ValueError):
            body = base64.b64decode(body, validate=True)
    message = Message(
        body,
        envelope.get("id") or raw["MessageId"],
        attributes.get(TYPE, {}).get("StringValue", ""),
        {**{name: _value(attributes[name]) for name in attributes if name != TYPE}, **headers},
        max(0, envelope.get("attempts", 0)) + 1,
        Receipt(
            raw["ReceiptHandle"],
            hidden_until,
            headers,
            attributes,
            raw.get("Attributes", {}).get("MessageGroupId"),
        ),
    )
    return message, envelope


def _read_envelope(text: str) -> dict[str, Any]:
    """What in it is of the right type."""
    try:
        envelope = json.loads(text)
        envelope = {
            name: value
            for name, value in envelope.items()
            if isinstance(value, ENVELOPE_TYPES.get(name, ()))
        }
        if "attributes" in envelope:
            envelope["attributes"] = _folded(envelope["attributes"], base64.b64decode)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return {}
    return envelope


def _folded(attributes: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
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
    """None if SQS would not take it as it is."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return text if CLEAN_TEXT.fullmatch(text) else None


def _dead_letter(message: Message, envelope: dict[str, Any], raw: dict[str, Any]) -> DeadLetter:
    # Of one that SQS gave up, nobody knows when: it has kept the time when the message was sent.
    sent_at = int(raw["Attributes"]["SentTimestamp"]) / 1000
    return DeadLetter(
        body=message.body,
        id=message.id,
        type=message.type,
        reason=envelope.get("reason", "given up by SQS: delivered too often"),
        attempts=message.attempt - 1,
        dead_lettered_at=envelope.get("dead_lettered_at", sent_at),
    )


async def _wait(work: Awaitable[object], seconds: float) -> None:
    """No longer than that."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work


def _log_lost(settlement: Settlement, reason: object) -> None:
    log.warning(
        "settlement_lost",
        id=settlement.message.id,
        settlement=settlement.operation,
        reason=reason,
    )
