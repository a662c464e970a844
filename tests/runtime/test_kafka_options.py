"""Options of Kafka's URL: assignors, static membership, isolation, where a new group begins, and tokens as a login."""

import asyncio
import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewPartitions, NewTopic

from harness.contract import Connect, eventually, opened, take
from harness.servers import Counts, Server
from harness.servers import kafka as kafka_server
from harness.servers.local import ServerProcess, free_ports
from runtime.brokers.delivery import KEY
from runtime.brokers.kafka import KafkaBroker
from runtime.errors import BrokerDenied, BrokerUnavailable, SourceFailed
from steps import Event, ack_all, eventually_counts, find, ids, publish, with_options
from tools import kafka

pytestmark = pytest.mark.parametrize("broker", ["kafka"], indirect=True, scope="session")

SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": 0.8}


def assigned(source: KafkaBroker) -> set[Any]:
    assert source._consumer is not None
    return set(source._consumer.assignment())


def generation(source: KafkaBroker) -> int:
    """The generation of the group, which counts rebalances."""
    assert source._consumer is not None
    number: int = source._consumer._coordinator.generation
    return number


async def shares(*sources: KafkaBroker) -> list[set[Any]]:
    """The partitions of each consumer, once all have joined."""

    async def all_joined() -> bool:
        generations = {generation(source) for source in sources}
        return len(generations) == 1 and all(map(assigned, sources))

    await eventually(True, all_joined)
    return [assigned(source) for source in sources]


class TestAssignors:
    async def test_sticky_moves_no_partition_that_may_stay(
        self, connect: Connect, broker: Server
    ) -> None:
        url = with_options(broker.url, partition_assignment_strategy="sticky")
        async with AsyncExitStack() as stack:
            members = [await stack.enter_async_context(connect(broker_url=url)) for _ in range(2)]
            before = await shares(*members)
            members.append(await stack.enter_async_context(connect(broker_url=url)))
            after = await shares(*members)
        assert all(now < had for now, had in zip(after, before, strict=False))

    async def test_a_consumer_of_librdkafka_with_its_defaults_can_be_in_the_group(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        """So a service can replace a service with another client while both run."""
        confluent_kafka = pytest.importorskip("confluent_kafka")
        seen: list[str] = []
        ended = threading.Event()

        def consume() -> None:
            config = {"bootstrap.servers": urlsplit(broker.url).netloc, "group.id": queue}
            other = confluent_kafka.Consumer({**config, "auto.offset.reset": "earliest"})
            other.subscribe([queue])
            while not ended.is_set():
                if (record := other.poll(0.1)) is not None and not record.error():
                    seen.append(dict(record.headers())["x-consumer-id"].decode())
            other.close()

        async def work(source: KafkaBroker) -> None:
            async for message in source:
                seen.append(message.id)
                await source.ack(message)

        async with connect() as source:
            running = asyncio.create_task(asyncio.to_thread(consume))
            working = asyncio.create_task(work(source))
            try:

                async def two_members() -> bool:
                    return generation(source) > 1 and 0 < len(assigned(source)) < 8

                await eventually(True, two_members)
                published = await publish(source, 40)

                async def all_seen() -> Counter[str]:
                    return Counter(seen)

                await eventually(Counter(published), all_seen)
            finally:
                ended.set()
                await running
                await source.stop()
                await working


class TestStaticMembership:
    async def test_a_restart_within_the_session_timeout_causes_no_rebalance(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        first, second = (
            with_options(broker.url, group_instance_id=f"{number}-{{hostname}}")
            for number in range(2)
        )
        async with connect(broker_url=first) as stays:
            async with connect(broker_url=second) as leaves:
                before = await shares(stays, leaves)
                generation_before = generation(stays)
                published = await publish(stays, 20)
                kept = await take(leaves, 1)
                await leaves.ack(kept[0])
                await leaves.stop()
            async with connect(broker_url=second) as back:
                assert await shares(stays, back) == before
                assert generation(stays) == generation_before
                handled = ids(kept)

                async def work(source: KafkaBroker) -> None:
                    async for message in source:
                        handled.append(message.id)
                        await source.ack(message)

                working = [asyncio.create_task(work(source)) for source in (stays, back)]

                async def all_handled() -> Counter[str]:
                    return Counter(handled)

                await eventually(Counter(published), all_handled)
                await asyncio.gather(stays.stop(), back.stop(), *working)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_without_an_instance_id_each_restart_is_a_rebalance(
        self, connect: Connect
    ) -> None:
        async with connect() as stays:
            async with connect() as leaves:
                await shares(stays, leaves)
                before = generation(stays)
            async with connect() as back:
                await shares(stays, back)
                assert generation(stays) > before

    async def test_of_two_processes_with_one_instance_id_one_ends_with_a_sentence(
        self, connect: Connect, broker: Server
    ) -> None:
        url = with_options(broker.url, group_instance_id="same")
        async with connect(broker_url=url) as one, connect(broker_url=url) as other:
            waiting = {asyncio.create_task(take(source, 1)): source for source in (one, other)}
            [ended], _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            with pytest.raises(SourceFailed, match="has the group_instance_id 'same'"):
                ended.result()
            del waiting[ended]
            [(taking, source)] = waiting.items()
            [id] = await publish(source, 1)
            await asyncio.wait([taking])
            if (failure := taking.exception()) is None:
                assert ids(taking.result()) == [id]
            else:  # the broker has fenced each of them
                assert "has the group_instance_id 'same'" in str(failure)


class TestIsolation:
    @pytest.mark.parametrize("level", ["", "read_committed", "read_uncommitted"])
    async def test_the_records_of_an_aborted_transaction_are_not_seen_unless_it_is_asked_for(
        self, connect: Connect, broker: Server, queue: str, level: str
    ) -> None:
        options = {"isolation_level": level} if level else {}
        host = urlsplit(broker.url).netloc
        async with connect(broker_url=with_options(broker.url, **options)) as source:
            async with AIOKafkaProducer(bootstrap_servers=host, transactional_id=queue) as producer:
                await producer.begin_transaction()
                await producer.send_and_wait(queue, b"aborted", partition=0)
                await producer.abort_transaction()
                async with producer.transaction():
                    await producer.send_and_wait(queue, b"committed", partition=0)
            wanted = [b"aborted", b"committed"] if level == "read_uncommitted" else [b"committed"]
            messages = await take(source, len(wanted))
            assert [message.body for message in messages] == wanted
            for message in messages:
                await source.ack(message)

            async def waiting() -> object:
                return (await source.describe())[queue]

            await eventually(0, waiting)
            assert len(source.buffer) == 0

    async def test_records_are_seen_when_their_transaction_is_committed(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        host = urlsplit(broker.url).netloc
        producer = AIOKafkaProducer(bootstrap_servers=host, transactional_id=queue)
        async with connect() as source, producer:
            async with producer.transaction():
                await producer.send_and_wait(queue, b"in a transaction", partition=0)
                await publish(source, 1, headers={KEY: "c"})  # a key of partition 2
                await ack_all(source, 1)
                assert len(source.unacked) == 0
            [message] = await take(source, 1)
            assert message.body == b"in a transaction"


class TestBeginning:
    async def test_a_new_group_begins_at_the_end_and_later_continues(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        url = with_options(broker.url, auto_offset_reset="latest")
        async with connect(prefetch=0) as publisher:
            await publish(publisher, 20)
        async with connect(prefetch=0, broker_url=url) as looking:
            assert (await looking.describe())[queue] == 0
        async with connect(broker_url=url) as source:

            async def known() -> bool:
                return len(source._partitions) == len(assigned(source))

            await eventually(True, known)
            published = await publish(source, 5)
            first, *others = await take(source, 5)
            assert {first.id, *ids(others)} == set(published)
            await source.retry(first, 0.1, "not now")
            for message in others:
                await source.ack(message)
            assert await ack_all(source, 1) == [first.id]
        async with connect(prefetch=0) as publisher:
            published = await publish(publisher, 20)
        async with connect(broker_url=url) as source:
            assert Counter(await ack_all(source, 20)) == Counter(published)
        assert not find(events, "messages_trimmed")

    async def test_what_is_added_while_the_service_runs_begins_at_its_start(
        self,
        connect: Connect,
        broker: Server,
        queue: str,
        source_for: Callable[..., Any],
        shorten: Callable[..., None],
    ) -> None:
        """A topic that a pattern matches, and a partition: otherwise records from before their discovery would be lost.

        Another program creates both, and writes to them.
        """
        shorten(1, "DISCOVER_SECONDS")
        old, new, group = f"{queue}.old", f"{queue}.new", f"{queue}-group"
        url = with_options(broker.url, auto_offset_reset="latest")
        try:
            async with opened(source_for(source=old)) as publisher:
                await publish(publisher, 5)
                pattern = {"source": rf"^{queue}\..*", "group": group}
                async with connect(**pattern, broker_url=url) as source:

                    async def known() -> bool:
                        return len(source._partitions) == len(assigned(source)) >= 4

                    await eventually(True, known)
                    async with publisher._admin() as admin:
                        await admin.create_topics([NewTopic(new, 2, 1)])
                        await admin.create_partitions({old: NewPartitions(5)})
                    async with AIOKafkaProducer(
                        bootstrap_servers=urlsplit(broker.url).netloc
                    ) as producer:
                        records = [(new, 0), (new, 1), (new, 1), (old, 4)]
                        for topic, partition in records:
                            body = f"{topic} {partition}".encode()
                            await producer.send_and_wait(topic, body, partition=partition)
                    messages = await take(source, len(records))
                    assert Counter(message.body.decode() for message in messages) == Counter(
                        f"{topic} {partition}" for topic, partition in records
                    )
                    for message in messages:
                        await source.ack(message)
        finally:
            for name in (old, new, group):
                broker.delete(name)


# -- tokens

OAUTHBEARER = """
listeners=PLAINTEXT://127.0.0.1:{port},SASL_PLAINTEXT://127.0.0.1:{sasl_port},CONTROLLER://127.0.0.1:{controller_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
controller.quorum.voters=1@127.0.0.1:{controller_port}
sasl.enabled.mechanisms=OAUTHBEARER
listener.name.sasl_plaintext.oauthbearer.sasl.jaas.config=\\
org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";
listener.name.sasl_plaintext.oauthbearer.connections.max.reauth.ms=60000
"""
"""Kafka's unsecured tokens for tests: the broker checks their times, but no signature."""


@pytest.fixture(scope="module")
def token_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker that accepts tokens only; without the options of the login."""
    try:
        kafka.install()
    except kafka.KafkaMissing as missing:
        pytest.skip(str(missing))
    directory = tmp_path_factory.mktemp("oauthbearer")
    port, sasl_port, controller_port = free_ports(3)
    (command,) = kafka.node_commands([port], directory)
    with (directory / f"{port}.properties").open("a") as properties:
        ports = {"port": port, "sasl_port": sasl_port, "controller_port": controller_port}
        properties.write(OAUTHBEARER.format(**ports))
    server = ServerProcess(command, directory, lambda: kafka_server._answers(port))
    yield f"kafka://127.0.0.1:{sasl_port}{kafka_server.OPTIONS}"
    server.close()


def unsecured_token(seconds: float) -> str:
    """A JWT without a signature, which is valid for this many seconds."""
    now = time.time()
    claims = {"sub": "order-events", "iat": now - 1, "exp": now + seconds}
    parts = (json.dumps(part).encode() for part in ({"alg": "none"}, claims))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + "."


@pytest.fixture
def with_token(
    token_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """The URL with this function of a module of the team."""
    module = f"team_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(
        "asked = 0\n"
        "def sync() -> str:\n    global asked\n    asked += 1\n    return make(seconds)\n"
        "async def asynchronous() -> str:\n    return make(seconds)\n"
        "def failing() -> str:\n    raise RuntimeError('no identity')\n"
        "def nothing() -> None:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def url(name: str, seconds: float = 60) -> str:
        team: Any = __import__(module)
        team.make, team.seconds = unsecured_token, seconds
        return with_options(
            token_url, sasl_mechanism="OAUTHBEARER", token_provider=f"{module}:{name}"
        )

    return url


class TestTokens:
    @pytest.mark.parametrize("name", ["sync", "asynchronous"])
    async def test_the_function_that_the_url_names_gives_the_token(
        self, connect: Connect, with_token: Callable[..., str], name: str
    ) -> None:
        async with connect(broker_url=with_token(name)) as source:
            published = await publish(source, 5)
            messages = await take(source, 5)
            assert Counter(ids(messages)) == Counter(published)
            await source.reject(messages[0], "bad")
            assert await source.count_dead_letters() == 1

    async def test_a_token_that_has_expired_is_refused_in_one_sentence(
        self, source_for: Callable[..., KafkaBroker], with_token: Callable[..., str]
    ) -> None:
        with pytest.raises(BrokerDenied, match="the token or the password was refused"):
            await source_for(broker_url=with_token("sync", seconds=-60)).__aenter__()

    @pytest.mark.parametrize(
        ("name", "reason"),
        [("failing", "RuntimeError: no identity"), ("nothing", "it returned NoneType, not str")],
    )
    async def test_a_function_that_fails_is_an_outage_with_its_reason(
        self,
        source_for: Callable[..., KafkaBroker],
        with_token: Callable[..., str],
        name: str,
        reason: str,
    ) -> None:
        with pytest.raises(BrokerUnavailable, match=f"the token_provider failed: .*{reason}"):
            await source_for(broker_url=with_token(name)).__aenter__()

    async def test_each_time_a_token_expires_the_next_one_is_asked_for_and_no_message_is_lost(
        self, connect: Connect, with_token: Callable[..., str]
    ) -> None:
        url = with_token("sync", seconds=2)
        team: Any = __import__(url.partition("token_provider=")[2].partition(":")[0])
        async with connect(broker_url=url) as source:
            published: list[str] = []
            handled: list[str] = []
            first = team.asked
            while team.asked < first + 9:  # at most three connections at a time
                [id] = await publish(source, 1)
                published.append(id)
                handled += await ack_all(source, 1)
                await asyncio.sleep(0.05)
        assert set(handled) == set(published)
