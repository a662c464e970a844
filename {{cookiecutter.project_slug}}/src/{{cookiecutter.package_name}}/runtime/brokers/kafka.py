# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""Kafka, by aiokafka: a topic read by a consumer group, a topic for retries, and one for dead letters.

``kafka://user:password@one:9092,two:9092``, or ``kafkas://`` for TLS. Options, as in ``?partitions=24&cafile=ca.pem``:
``sasl_mechanism`` (PLAIN, SCRAM-SHA-256, SCRAM-SHA-512), ``cafile``, ``certfile``, ``keyfile``; ``partitions`` and
``replication_factor`` of topics that are made because they are not there; ``session_timeout_seconds``, after
which the partitions of a dead consumer go to others; ``rebalance_timeout_seconds``, which a rebalance may wait for
messages in hand. What a password may not hold in a URL is percent-encoded.

Kafka knows no single messages: a consumer owns whole partitions, and commits for each one offset below which
all is done. That is what is done without a gap, so a message that was not finished, and those of its partition
that were finished after it, come again. A rebalance of the group waits for what is in hand as long as a stop
does, ``CONSUMER_DRAIN_SECONDS``; a message that takes longer comes again, at the partition's next owner.

For ``CONSUMER_SOURCE=orders`` the topics are ``orders``, ``orders.retry`` and ``orders.dead``. A retry or a dead
letter is produced, and confirmed, before its offset counts as done: a crash in between makes a duplicate,
never a loss. ``orders.retry`` has a partition for each step of the back-off, and waits for the first in it.
"""

import asyncio
import json
import logging
import math
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaError

from ..cancellation import cancellable_sleep
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

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
"""How long the broker may take to answer a request or to confirm a message."""
COMMIT_SECONDS = 0.25
"""How often to commit what was done meanwhile; a consumer that dies repeats at most this much of its work."""
CHECK_SECONDS = 1.0
"""How often to ask whether the broker is still there. aiokafka itself keeps quiet about that."""
POLL_SECONDS = 1.0
HEARTBEAT_SECONDS = 1.0
"""So late the others may hear that a consumer joined or left."""
SESSION_SECONDS = 30.0
REJOIN_SECONDS = 3.0
"""What a rebalance may take after the messages in hand are done or given up."""
STUCK_SECONDS = 30.0
"""Without an answer to any fetch for so long, or so much longer than a rebalance may take without an
assignment, a consumer is replaced: aiokafka may not come back by itself (aiokafka#847, #1037)."""
STOP_SECONDS = 1.0
CLOSE_SECONDS = 1.5
PUBLISH_AT_ONCE = 500

PARTITIONS = 12
MOST_DELAYS = 12
FOREVER_MS = 2**31 - 1
BIGGEST_REQUEST_BYTES = 2**24
"""A limit of the client only: how large a message may be is for the broker to say."""
OWN_TOPICS = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    # A message that is as large as the broker allows still becomes a dead letter, with its reason.
    "max.message.bytes": str(2**20 + 2**17),
}

ID = "x-consumer-id"
TYPE = "x-consumer-type"
CLOUD_EVENTS = {ID: "ce_id", TYPE: "ce_type"}
"""Where other producers write them: the headers of CloudEvents on Kafka."""
KEY = "x-consumer-key"
"""Header, in messages only: the record's key, where it is not the id. Messages of one key stay in order."""
JSON_HEADERS = "x-consumer-json-headers"
"""Header: the names of those whose values were not text, and are JSON."""
ATTEMPTS = "x-consumer-attempts"
"""Header: how often a handler failed on the message."""
DUE_AT = "x-consumer-due-at"
"""Header: when a retry is due, in Unix seconds."""
REASON = "x-consumer-reason"
DEAD_LETTERED_AT = "x-consumer-dead-lettered-at"
"""Header: when it became a dead letter, in Unix seconds."""
HISTORY = (ATTEMPTS, DUE_AT, REASON, DEAD_LETTERED_AT)
"""Headers that tell what happened to a message; one that is replayed begins anew."""

log = structlog.get_logger()

if logging.getLogger("aiokafka").level == logging.NOTSET:
    # It logs every rebalance as an error or a warning. What matters of it is logged here, once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> Source:
    return KafkaSource(settings, prefetch)


class Address(NamedTuple):
    """What the URL says."""

    hosts: list[str]
    security: dict[str, Any]
    """Arguments that all of aiokafka's clients share."""
    files: dict[str, str]
    """Of TLS: cafile, certfile, keyfile."""
    partitions: int
    replication_factor: int
    session_seconds: float
    rebalance_seconds: float | None


@dataclass(eq=False, slots=True)
class _Partition:
    """What is known of one partition while it is ours."""

    topic_partition: TopicPartition
    open: dict[int, Message] = field(default_factory=dict)
    """Delivered and not done, by offset, in that order."""
    position: int = 0
    """Below it everything was delivered."""
    committed: int = -1

    def done_below(self) -> int:
        return min(self.position, next(iter(self.open), self.position))

    def requeue(self, offset: int) -> None:
        """Nothing from here on will count as done."""
        del self.open[offset]
        self.position = min(self.position, offset)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    def __init__(self, source: "KafkaSource") -> None:
        self._source = source

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._source.let_go()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._source.take_over(assigned)


class KafkaSource(Source):
    """See the module. In the sentences of its errors and logs the URL has no credentials."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=True,
        attempts=True,
        requeue=False,  # it goes to others when this consumer has left the group
        dead_letters=True,
        order=False,  # only within a partition
        competing_consumers=False,
    )

    _producer: AIOKafkaProducer

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        """Raises BrokerRefused if the URL makes no sense."""
        super().__init__(settings, prefetch)
        self._address = parse_url(settings.broker_url.get_secret_value())
        self._security: dict[str, Any] = {}
        self.connectivity = Connectivity(",".join(self._address.hosts))
        self._group = settings.group or settings.source
        self._retry = f"{settings.source}.retry"
        self._dead = f"{settings.source}.dead"
        self._rebalance_seconds = (
            self._address.rebalance_seconds or settings.drain_seconds + REJOIN_SECONDS
        )
        self._delays = delays_seconds(settings.retry_seconds, settings.retry_max_seconds)
        self._consumer: AIOKafkaConsumer | None = None
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._unfinished = 0
        self._dirty: set[_Partition] = set()
        self._finished = asyncio.Event()  # something was, so there is room
        self._to_commit = asyncio.Event()
        self._stopping = asyncio.Event()
        self._closing = asyncio.Event()
        self._started = False
        self._entered = False
        self._fetcher: asyncio.Task[None] | None = None
        self._helpers: list[asyncio.Task[None]] = []
        self._last_answer_at = 0.0

    # -- connecting and closing

    async def __aenter__(self) -> Self:
        self._security = self._address.security | _tls(self._address)
        await self._greet()
        self._producer = AIOKafkaProducer(
            acks="all",
            max_batch_size=2**17,
            max_request_size=BIGGEST_REQUEST_BYTES,
            **self._client_arguments(),
        )
        try:
            async with self._asking(CONNECT_SECONDS):
                await _start(self._producer)
            await self._make_topics()
        except BaseException:
            await self._close_producer(0.5)
            raise
        self._closing.clear()
        self._entered = True
        self.connectivity.established()
        self._help(self.connectivity.keep(self._watch, self._closing), "watch")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._entered = False
        self._stopping.set()
        self._closing.set()
        self._finished.set()
        await self.stop()
        for task in self._helpers:
            task.cancel()
        if self._helpers:
            await asyncio.wait(self._helpers, timeout=0.5)
        self._helpers.clear()
        await asyncio.gather(self._leave(CLOSE_SECONDS), self._close_producer(CLOSE_SECONDS))
        self.connectivity.up = False

    def _help(self, work: Any, name: str) -> None:
        self._helpers.append(asyncio.create_task(work, name=f"kafka-{name}"))

    def _client_arguments(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        return {
            "bootstrap_servers": self._address.hosts,
            "client_id": self.settings.source,
            "request_timeout_ms": round(seconds * 1000),
            **self._security,
        }

    async def _greet(self) -> None:
        """Reach one of the hosts. aiokafka's own start tells only that it could not, and not why."""
        errors: list[BrokerError] = []
        for host in self._address.hosts:
            name, _, port = host.rpartition(":")
            try:
                async with self._asking(CONNECT_SECONDS / len(self._address.hosts)):
                    connection = await create_conn(
                        name.strip("[]"),
                        int(port),
                        request_timeout_ms=round(CONNECT_SECONDS * 1000),
                        **self._security,
                    )
                    connection.close()
                return
            except BrokerError as error:
                errors.append(error)
        raise next((e for e in errors if isinstance(e, BrokerRefused)), errors[0])

    @asynccontextmanager
    async def _asking(self, seconds: float | None = None) -> AsyncIterator[None]:
        """Bounds a request to the broker, and makes whatever goes wrong a BrokerError."""
        seconds = ANSWER_SECONDS if seconds is None else seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            msg = f"{self.connectivity.broker} gave no answer within {seconds:g} seconds"
            raise BrokerUnavailable(msg) from None
        except (KafkaError, OSError, EOFError) as error:
            raise self._explain(error) from error

    def _explain(self, error: BaseException) -> BrokerError:
        broker = self.connectivity.broker
        if isinstance(error, ssl.SSLError):
            return BrokerRefused(f"{broker}: no TLS connection: {error}")
        if isinstance(error, AUTHENTICATION):
            return BrokerRefused(f"{broker} refused the user name or the password")
        if isinstance(error, REFUSALS):
            return BrokerRefused(f"{broker} refused: {_sentence(error)}")
        return BrokerUnavailable(f"{broker}: {_sentence(error)}")

    # -- topology

    async def _make_topics(self) -> None:
        address = self._address
        topics = [
            NewTopic(self.settings.source, address.partitions, 1),
            NewTopic(self._retry, len(self._delays), 1, topic_configs=OWN_TOPICS),
            NewTopic(self._dead, 1, 1, topic_configs=OWN_TOPICS),
        ]
        refused = await self._create(topics, address.replication_factor)
        if address.replication_factor == -1 and any(
            isinstance(error, kafka_errors.InvalidReplicationFactorError)
            for error in refused.values()
        ):  # a broker before 2.4, which has no default
            brokers = len(self._producer.client.cluster.brokers())
            refused = await self._create(topics, min(3, brokers))
        for topic in topics:
            error = refused.get(topic.name)
            if error is not None and not isinstance(error, NOT_OURS_TO_MAKE):
                msg = f"the topic {topic.name!r} cannot be made: {_sentence(error)}"
                raise BrokerRefused(msg) from error
            try:
                async with self._asking():
                    await self._producer.partitions_for(topic.name)
            except BrokerUnavailable:
                if error is None:
                    raise
                msg = f"the topic {topic.name!r} is not there, and this user may not make it"
                raise BrokerRefused(msg) from None

    async def _create(self, topics: list[NewTopic], replication: int) -> dict[str, KafkaError]:
        """Make those that are not there; returns why not, by name."""
        for topic in topics:
            topic.replication_factor = replication  # its constructor refuses -1, the default
        async with self._admin() as admin, self._asking():
            response = await admin.create_topics(topics)
        errors = {
            name: kafka_errors.for_code(code)(text) for name, code, text in response.topic_errors
        }
        fine = (kafka_errors.NoError, kafka_errors.TopicAlreadyExistsError)
        return {name: error for name, error in errors.items() if not isinstance(error, fine)}

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(**self._client_arguments())
        try:
            async with self._asking(CONNECT_SECONDS):
                await _start(admin)
            yield admin
        finally:
            await _close(admin.close, admin._client, CLOSE_SECONDS)

    async def describe(self) -> dict[str, int | str]:
        source = self.settings.source
        async with self._admin() as admin, self._asking():
            [response] = await admin.describe_consumer_groups([self._group])
            [(_, _, _, _, _, members, *_)] = response.groups
        async with self._reader(self._group, source, self._retry) as reader:
            waiting = await self._count(reader)
        return {
            "brokers": len(self._producer.client.cluster.brokers()),
            source: sum(n for tp, n in waiting.items() if tp.topic == source),
            f"{source} partitions": sum(tp.topic == source for tp in waiting),
            f"{source} consumers": len(members),
            self._retry: sum(n for tp, n in waiting.items() if tp.topic == self._retry),
            self._dead: await self.count_dead_letters(),
        }

    @asynccontextmanager
    async def _reader(self, group: str, *topics: str) -> AsyncIterator[AIOKafkaConsumer]:
        """Reads all partitions of the topics, from what the group has committed, without joining it."""
        reader = AIOKafkaConsumer(
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,
            **self._client_arguments(),
        )
        try:
            async with self._asking(CONNECT_SECONDS):
                await _start(reader)
                partitions = [
                    TopicPartition(topic, number)
                    for topic in topics
                    for number in await self._producer.partitions_for(topic)
                ]
                reader.assign(partitions)
            yield reader
        finally:
            await _close(reader.stop, reader._client, CLOSE_SECONDS, *_tasks_of(reader))

    async def _ends(self, reader: AIOKafkaConsumer) -> dict[TopicPartition, int]:
        """The offset after the last message: by the answer to a fetch, as not every server's list of offsets is right."""
        async with self._asking():
            while missing := [tp for tp in reader.assignment() if reader.highwater(tp) is None]:
                await reader.position(missing[0])
                await asyncio.sleep(0.005)
            return {tp: reader.highwater(tp) for tp in reader.assignment()}

    async def _count(self, reader: AIOKafkaConsumer) -> dict[TopicPartition, int]:
        """How many messages of each partition the reader's group has not committed."""
        ends = await self._ends(reader)
        async with self._asking():
            beginnings = await reader.beginning_offsets(list(ends))
            committed = {tp: await reader.committed(tp) or 0 for tp in ends}
        return {tp: max(0, end - max(committed[tp], beginnings[tp])) for tp, end in ends.items()}

    # -- noticing outages; aiokafka mends them

    @property
    def connected(self) -> bool:
        return self._entered and self.connectivity.up

    async def _watch(self) -> None:
        while not self._closing.is_set():
            async with self._asking():
                if not await self._producer.client.force_metadata_update():
                    msg = f"{self.connectivity.broker}: no broker can be reached"
                    raise BrokerUnavailable(msg)
            if self._consumer is not None or not self._started:
                self.connectivity.established()
            await cancellable_sleep(CHECK_SECONDS, self._closing)

    # -- consuming

    async def start(self) -> None:
        self._stopping.clear()
        await self._join()
        self._started = True
        self._help(self._commit_regularly(), "commits")
        self._fetcher = asyncio.create_task(self._fill(), name="kafka-fetcher")

    async def _join(self) -> None:
        """Join the group, and wait for what it assigns."""
        consumer = AIOKafkaConsumer(
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=round(self._address.session_seconds * 1000),
            heartbeat_interval_ms=round(
                min(HEARTBEAT_SECONDS, self._address.session_seconds / 3) * 1000
            ),
            rebalance_timeout_ms=round(self._rebalance_seconds * 1000),
            max_poll_interval_ms=FOREVER_MS,  # a handler may take as long as it likes
            # The answer to a join may wait for all the others, or for one of them to count as dead.
            **self._client_arguments(
                max(self._rebalance_seconds, self._address.session_seconds) + ANSWER_SECONDS
            ),
        )
        consumer.subscribe([self.settings.source, self._retry], listener=_Listener(self))
        self._consumer = consumer
        try:
            async with self._asking(self._rebalance_seconds + STUCK_SECONDS):
                await _start(consumer)
        except BaseException:
            await self._leave(0.5)
            raise
        self._last_answer_at = time.monotonic()

    async def _leave(self, seconds: float) -> None:
        """Commit, and leave the group; what is in hand then comes again."""
        if (consumer := self._consumer) is None:
            return
        await self._commit(STOP_SECONDS)
        self._forget()
        self._consumer = None
        await _close(consumer.stop, consumer._client, seconds, *_tasks_of(consumer))

    async def _fill(self) -> None:
        try:
            await self.connectivity.keep(self._consume, self._stopping)
        except Exception as failure:
            self.buffer.fail(failure)

    async def _consume(self) -> None:
        if self._consumer is None:
            await self._join()
        assert self._consumer is not None
        try:
            while True:
                while (room := self.prefetch - self._unfinished) <= 0:
                    self._finished.clear()
                    await self._finished.wait()
                await self._fetch(self._consumer, room)
        except BrokerError:
            await self._leave(CLOSE_SECONDS)
            raise

    async def _fetch(self, consumer: AIOKafkaConsumer, room: int) -> None:
        """Wait for messages, and put them in the buffer. There is no await after they have come."""
        async with self._asking(self._rebalance_seconds + STUCK_SECONDS):
            batch = await consumer.getmany(timeout_ms=round(POLL_SECONDS * 1000), max_records=room)
        now = time.time()
        for topic_partition, records in batch.items():
            partition = self._partitions.get(topic_partition)
            if partition is None:
                partition = self._partitions[topic_partition] = _Partition(topic_partition)
            retrying = topic_partition.topic == self._retry
            for record in records:
                if retrying and (seconds := _due_at(record) - now) > 0:
                    self._wait(consumer, topic_partition, record.offset, seconds)
                    break
                message = _message(record, partition)
                partition.open[record.offset] = message
                partition.position = record.offset + 1
                self._unfinished += 1
                self.buffer.put(message)
        if batch:
            self._last_answer_at = time.monotonic()
        else:
            self._check(consumer)

    def _wait(
        self, consumer: AIOKafkaConsumer, waiting: TopicPartition, offset: int, seconds: float
    ) -> None:
        """Read on from this offset when its time has come."""
        consumer.seek(waiting, offset)
        consumer.pause(waiting)

        def resume() -> None:
            if waiting in consumer.paused():
                consumer.resume(waiting)

        asyncio.get_running_loop().call_later(seconds, resume)

    def _check(self, consumer: AIOKafkaConsumer) -> None:
        """Raises BrokerUnavailable for a consumer whose fetches get no answer although the broker is there."""
        reading = consumer.assignment() - consumer.paused()
        answered_ms = max((consumer.last_poll_timestamp(tp) or 0 for tp in reading), default=None)
        silent_seconds = 0 if answered_ms is None else time.time() - answered_ms / 1000
        if not self.connectivity.up or silent_seconds < STUCK_SECONDS:
            self._last_answer_at = time.monotonic()
        elif time.monotonic() - self._last_answer_at > STUCK_SECONDS:
            msg = f"{self.connectivity.broker}: no answer to a fetch for {STUCK_SECONDS:g} seconds"
            raise BrokerUnavailable(msg)

    async def let_go(self) -> None:
        """The group is rebalanced: drop what nobody started, wait for what is in hand, and commit."""
        dropped = self._drop_buffered()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0, self._rebalance_seconds - REJOIN_SECONDS)):
                while self._unfinished and not self._closing.is_set():
                    self._finished.clear()
                    await self._finished.wait()
        await self._commit()
        log.info("partitions_revoked", dropped=dropped, unfinished=self._unfinished)
        self._forget()

    def take_over(self, assigned: Iterable[TopicPartition]) -> None:
        self._last_answer_at = time.monotonic()
        log.info("partitions_assigned", partitions=sorted(f"{t}-{p}" for t, p in assigned))

    def _drop_buffered(self) -> int:
        """What no worker took is not done: whoever owns its partition next gets it."""
        messages = self.buffer.take_all()
        for message in messages:
            self._requeue(message)
        return len(messages)

    def _requeue(self, message: Message) -> None:
        partition, record = message.receipt
        partition.requeue(record.offset)
        self._unfinished -= 1
        self._finished.set()

    def _forget(self) -> None:
        """The partitions are not ours any more; what is still in hand will be settled in vain."""
        for partition in self._partitions.values():
            partition.open.clear()
        self._partitions.clear()
        self._dirty.clear()
        self._unfinished = 0
        self._finished.set()

    async def stop(self) -> None:
        self._stopping.set()
        if self._fetcher is None:
            return
        fetcher, self._fetcher = self._fetcher, None
        fetcher.cancel()  # getmany loses nothing by that
        self._helpers.append(fetcher)  # to be waited for once more
        await asyncio.wait({fetcher}, timeout=STOP_SECONDS)
        self.requeued_count += self._drop_buffered()
        self.buffer.close()
        await self._commit(STOP_SECONDS)

    # -- committing

    async def _commit_regularly(self) -> None:
        while await self._to_commit.wait():
            self._to_commit.clear()
            await asyncio.sleep(COMMIT_SECONDS)
            if not await self._commit():
                self._to_commit.set()

    async def _commit(self, seconds: float = ANSWER_SECONDS) -> bool:
        """Commit what is done without a gap. If that fails it stays to be done."""
        offsets = {partition: partition.done_below() for partition in self._dirty}
        offsets = {partition: n for partition, n in offsets.items() if n > partition.committed}
        self._dirty.clear()
        if not offsets or self._consumer is None:
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._consumer.commit(
                    {partition.topic_partition: n for partition, n in offsets.items()}
                )
        except asyncio.CancelledError:  # while closing
            _retrieve_the_errors_of_commits()
            raise
        except (KafkaError, TimeoutError) as error:
            _retrieve_the_errors_of_commits()
            log.debug("commit_failed", broker=self.connectivity.broker, reason=type(error).__name__)
            self._dirty.update(p for p in offsets if self._partitions.get(p.topic_partition) is p)
            return False
        for partition, offset in offsets.items():
            partition.committed = offset
        return True

    # -- settling

    async def ack(self, message: Message) -> None:
        if self._in_flight(message, "ack"):
            self._done(message)

    def _done(self, message: Message) -> None:
        partition, record = message.receipt
        if partition.open.pop(record.offset, None) is None:
            return  # revoked while a retry or a dead letter was confirmed: it comes again
        self._unfinished -= 1
        self._dirty.add(partition)
        self._finished.set()
        self._to_commit.set()

    async def requeue(self, message: Message) -> None:
        """Not committed: it comes again, and with it what was done after it in its partition."""
        if self._in_flight(message, "requeue"):
            if self._stopping.is_set():
                self.requeued_count += 1
                self._requeue(message)
            else:
                self.buffer.put(message)

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        """As in `Source`. A delay beyond the longest of the back-off is cut to that.

        Behind others with the same back-off a message may wait for up to that back-off.
        """
        step = next((n for n, s in enumerate(self._delays) if s >= delay_seconds), -1)
        delay_seconds = min(delay_seconds, self._delays[-1])
        headers = {DUE_AT: repr(time.time() + delay_seconds), REASON: reason}
        await self._move(message, self._retry, headers, step % len(self._delays))

    async def reject(self, message: Message, reason: str) -> None:
        await self._move(message, self._dead, {DEAD_LETTERED_AT: repr(time.time()), REASON: reason})

    async def _move(
        self, message: Message, topic: str, headers: dict[str, str], step: int | None = None
    ) -> None:
        if not self._in_flight(message, topic):
            return
        _, record = message.receipt
        history = {ID: message.id, TYPE: message.type, ATTEMPTS: str(message.attempt), **headers}
        kept = [(name, value) for name, value in record.headers if name not in (*HISTORY, ID, TYPE)]
        kept += [(name, value.encode(errors="replace")) for name, value in history.items()]
        try:
            await self._produce(topic, [(record.key, record.value, kept)], step)
        except BrokerError as error:
            log.warning("settlement_lost", id=message.id, settlement=topic, reason=str(error))
            await asyncio.sleep(1)  # it is delivered again at once: not at full speed
            await self.requeue(message)
        else:
            self._done(message)

    def _in_flight(self, message: Message, settlement: str) -> bool:
        partition, record = message.receipt
        if partition.open.get(record.offset) is message:
            return True
        log.warning("settlement_lost", id=message.id, settlement=settlement)
        return False

    # -- publishing

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        for start in range(0, len(messages), PUBLISH_AT_ONCE):
            records = [_record(message) for message in messages[start : start + PUBLISH_AT_ONCE]]
            await self._produce(self.settings.source, records)

    async def _produce(
        self,
        topic: str,
        records: Sequence[tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]],
        partition: int | None = None,
    ) -> None:
        """Returns when the broker has confirmed every record."""
        async with self._asking():
            if partition is not None:
                partition = min(partition, len(await self._producer.partitions_for(topic)) - 1)
            confirmations = [
                await self._producer.send(
                    topic, key=key, value=value, headers=headers, partition=partition
                )
                for key, value, headers in records
            ]
            await asyncio.gather(*confirmations)

    async def _close_producer(self, seconds: float) -> None:
        producer = self._producer
        # What is not confirmed now has been reported as not sent: nothing to wait for.
        producer._message_accumulator.fail_all(kafka_errors.KafkaConnectionError())
        await _close(producer.stop, producer.client, seconds, producer._sender.sender_task)

    # -- dead letters

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        async with self._dead_letter_reader() as reader:
            ends = await self._ends(reader)
            async for records in self._read(reader, ends, limit):
                for record in records:
                    yield _dead_letter(record)

    def _dead_letter_reader(self) -> Any:
        return self._reader(f"{self._group}.dead", self._dead)

    async def _read(
        self, reader: AIOKafkaConsumer, ends: Mapping[TopicPartition, int], limit: float
    ) -> AsyncIterator[list[Any]]:
        """What the reader's group has not committed, up to these ends."""
        while limit > 0:
            async with self._asking():
                positions = {tp: await reader.position(tp) for tp in ends}
                unread = [tp for tp, end in ends.items() if positions[tp] < end]
                if not unread:
                    return
                most = int(min(limit, PUBLISH_AT_ONCE))
                batch = await reader.getmany(*unread, timeout_ms=1000, max_records=most)
            for tp, records in batch.items():
                if wanted := [record for record in records if record.offset < ends[tp]]:
                    limit -= len(wanted)
                    yield wanted

    async def count_dead_letters(self) -> int:
        async with self._dead_letter_reader() as reader:
            return sum((await self._count(reader)).values())

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        moved = 0
        async with self._dead_letter_reader() as reader:
            ends = await self._ends(reader)
            async for records in self._read(reader, ends, math.inf):
                await self._produce(
                    self.settings.source,
                    [
                        (r.key, r.value, [(n, v) for n, v in r.headers if n not in HISTORY])
                        for r in records
                    ],
                )
                last = records[-1]
                await self._drop_dead_letters(
                    reader, {TopicPartition(last.topic, last.partition): last.offset + 1}
                )
                moved += len(records)
                yield moved

    async def purge_dead_letters(self) -> AsyncIterator[int]:
        async with self._dead_letter_reader() as reader:
            count = sum((await self._count(reader)).values())
            await self._drop_dead_letters(reader, await self._ends(reader))
        yield count

    async def _drop_dead_letters(
        self, reader: AIOKafkaConsumer, below: Mapping[TopicPartition, int]
    ) -> None:
        """They are gone when the offset is committed; the broker deletes them where it lets us ask."""
        async with self._asking():
            await reader.commit(dict(below))
        with suppress(BrokerError):
            async with self._admin() as admin, self._asking():
                await admin.delete_records({tp: RecordsToDelete(n) for tp, n in below.items()})


AUTHENTICATION = (
    kafka_errors.SaslAuthenticationFailed,
    kafka_errors.AuthenticationFailedError,
)
NOT_OURS_TO_MAKE = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.ClusterAuthorizationFailedError,
    kafka_errors.PolicyViolationError,
)
REFUSALS = (
    *NOT_OURS_TO_MAKE,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.InconsistentGroupProtocolError,
    kafka_errors.InvalidGroupIdError,
    kafka_errors.InvalidSessionTimeoutError,
    kafka_errors.InvalidTopicError,
    kafka_errors.MessageSizeTooLargeError,
    kafka_errors.RecordTooLargeError,
    kafka_errors.UnsupportedSaslMechanismError,
)


async def _start(client: AIOKafkaProducer | AIOKafkaAdminClient | AIOKafkaConsumer) -> None:
    """As its own `start`; which leaves a connection open if it is cancelled while its first question is on the way."""
    starting = asyncio.ensure_future(client.start())
    try:
        await asyncio.shield(starting)
    finally:
        await _end([starting])


async def _close(
    stop: Callable[[], Awaitable[None]],
    client: AIOKafkaClient,
    seconds: float,
    *tasks: asyncio.Task[Any] | None,
) -> None:
    """Stop one of aiokafka's clients; what waits for a silent broker, or stumbles in an outage, is cut off."""
    closing = asyncio.ensure_future(stop())
    try:
        await asyncio.wait({closing}, timeout=seconds)
    finally:
        if not closing.done() or closing.cancelled() or closing.exception() is not None:
            _cut(client)
            await _end([closing, client._sync_task, *tasks])


def _cut(client: AIOKafkaClient) -> None:
    for connection in list(client._conns.values()):
        if connection._writer is not None:
            connection._writer.transport.abort()
        connection.close()


def _retrieve_the_errors_of_commits() -> None:
    """A commit that took too long goes on: aiokafka shields it, and nobody else asks what came of it."""
    for task in asyncio.all_tasks():
        if getattr(task.get_coro(), "__name__", "") == "_do_commit_offsets":
            task.add_done_callback(lambda task: task.cancelled() or task.exception())


async def _end(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """First those that others wait for would end by themselves; then all are cancelled."""
    left = {task for task in tasks if task is not None and not task.done()}
    if left:
        await asyncio.wait(left, timeout=0.2)
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=0.3)
        for task in left:
            if task.done() and not task.cancelled():
                task.exception()  # retrieved: it is the outage's, and that was logged


def _tasks_of(consumer: AIOKafkaConsumer) -> list[asyncio.Task[Any] | None]:
    coordinator, fetcher = consumer._coordinator, consumer._fetcher
    tasks = [
        getattr(coordinator, name, None)
        for name in ("_coordination_task", "_heartbeat_task", "_commit_refresh_task")
    ]
    return [*tasks, getattr(fetcher, "_fetch_task", None), *getattr(fetcher, "_pending_tasks", ())]


def parse_url(text: str) -> Address:
    try:
        parts = urlsplit(text)
        credentials, at_sign, hosts = parts.netloc.rpartition("@")
        if parts.path.strip("/") or parts.fragment or "@" in parts.query:
            raise ValueError
        addresses = [_host(host) for host in hosts.split(",")]
    except ValueError:
        # Without the URL, and without its parser's error: each may hold a part of the password.
        msg = (
            "CONSUMER_BROKER_URL: not like kafka://user:password@one:9092,two:9092; in a user name or a "
            "password, characters like @ : / ? # % are percent-encoded"
        )
        raise BrokerRefused(msg) from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    tls = "SSL" if parts.scheme == "kafkas" else "PLAINTEXT"
    security: dict[str, Any] = {"security_protocol": f"SASL_{tls}" if at_sign else tls}
    mechanism = options.pop("sasl_mechanism", "PLAIN")
    if at_sign:
        user, _, password = credentials.partition(":")
        security |= {
            "sasl_mechanism": mechanism,
            "sasl_plain_username": unquote(user),
            "sasl_plain_password": unquote(password),
        }
    files = {name: options.pop(name, "") for name in ("cafile", "certfile", "keyfile")}
    with suppress(ValueError):
        address = Address(
            addresses,
            security,
            files,
            partitions=int(options.pop("partitions", PARTITIONS)),
            replication_factor=int(options.pop("replication_factor", -1)),
            session_seconds=float(options.pop("session_timeout_seconds", SESSION_SECONDS)),
            rebalance_seconds=float(options.pop("rebalance_timeout_seconds", 0)) or None,
        )
        mechanisms = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
        numbers = (address.session_seconds, address.rebalance_seconds or 1)
        good = address.partitions > 0 and all(0 < number < 86_400 for number in numbers)
        if good and not options and mechanism in mechanisms:
            return address
    msg = (
        "CONSUMER_BROKER_URL: the options of kafka are sasl_mechanism (PLAIN, SCRAM-SHA-256, SCRAM-SHA-512), cafile, "
        "certfile, keyfile, partitions, replication_factor, session_timeout_seconds and rebalance_timeout_seconds"
    )
    raise BrokerRefused(msg)


def _host(text: str) -> str:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.username is not None:
        raise ValueError
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{name}:{parts.port or 9092}"


def _tls(address: Address) -> dict[str, Any]:
    if not address.security["security_protocol"].endswith("SSL"):
        return {}
    try:
        context = ssl.create_default_context(cafile=address.files["cafile"] or None)
        if address.files["certfile"]:
            context.load_cert_chain(address.files["certfile"], address.files["keyfile"] or None)
    except OSError as error:
        msg = f"CONSUMER_BROKER_URL: cafile, certfile or keyfile: {error}"
        raise BrokerRefused(msg) from error
    return {"ssl_context": context}


def delays_seconds(first: float, longest: float) -> list[float]:
    """The steps of the back-off: doubling, or more where that would be too many partitions."""
    steps = min(MOST_DELAYS, 1 + math.ceil(math.log2(longest / first)))
    factor = (longest / first) ** (1 / max(1, steps - 1))
    return [first * factor**step for step in range(steps - 1)] + [longest]


def _record(message: OutgoingMessage) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
    headers = dict(message.headers)
    key = str(headers.pop(KEY, message.id))
    encoded = [(ID, message.id.encode())]
    if message.type:
        encoded.append((TYPE, message.type.encode()))
    json_names = []
    try:
        for name, value in headers.items():
            if isinstance(value, str):
                encoded.append((name, value.encode()))
            elif isinstance(value, bytes):
                encoded.append((name, value))
            else:
                encoded.append((name, json.dumps(value).encode()))
                json_names.append(name)
    except (TypeError, ValueError) as error:
        msg = f"this message cannot be sent: {error}"
        raise BrokerRefused(msg) from error
    if json_names:
        encoded.append((JSON_HEADERS, json.dumps(json_names).encode()))
    return key.encode(), message.body, encoded


def _message(record: Any, partition: _Partition) -> Message:
    headers: dict[str, Any] = {}
    for name, value in record.headers:
        try:
            headers[name] = value.decode()
        except (UnicodeDecodeError, AttributeError):  # another producer's bytes, or None
            headers[name] = value
    id = headers.pop(ID, None)
    if id is None:
        id = headers.get(CLOUD_EVENTS[ID]) or f"{record.topic}-{record.partition}-{record.offset}"
    type = headers.pop(TYPE, None)
    if type is None:
        type = headers.get(CLOUD_EVENTS[TYPE], "")
    if JSON_HEADERS in headers:
        with suppress(ValueError, TypeError, RecursionError):
            for name in json.loads(headers.pop(JSON_HEADERS)):
                headers[name] = json.loads(headers[name])
    if record.key is not None and (key := record.key.decode(errors="replace")) != id:
        headers[KEY] = key
    return Message(
        record.value or b"", id, type, headers, _failures(headers) + 1, (partition, record)
    )


def _failures(headers: Mapping[str, Any]) -> int:
    value = headers.get(ATTEMPTS)
    return int(value) if isinstance(value, str) and value.isdecimal() else 0


def _due_at(record: Any) -> float:
    for name, value in record.headers:
        if name == DUE_AT:
            with suppress(ValueError):
                return float(value)
    return 0.0


def _dead_letter(record: Any) -> DeadLetter:
    message = _message(record, _Partition(TopicPartition(record.topic, record.partition)))
    dead_lettered_at = 0.0
    with suppress(ValueError):
        dead_lettered_at = float(message.headers.get(DEAD_LETTERED_AT, 0))
    return DeadLetter(
        body=message.body,
        id=message.id,
        type=message.type,
        reason=str(message.headers.get(REASON, "")),
        attempts=_failures(message.headers),
        dead_lettered_at=dead_lettered_at,
    )


def _sentence(error: BaseException) -> str:
    """What aiokafka's errors say, without the name of their class at the front of it."""
    text = str(error).removeprefix(f"{type(error).__name__}: ")
    return " ".join(text.split()) or type(error).__name__
