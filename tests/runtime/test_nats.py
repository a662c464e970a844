"""NATS alone: outages, the ack wait, groups, its limits. Tests of every broker are in test_every_source.py."""

import asyncio
import json
import re
import shlex
import time
import urllib.request
import uuid
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nats
import nkeys  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy
from nats.js.errors import NotFoundError, ServiceUnavailableError

from harness.contract import eventually, opened, take
from harness.servers import (
    Counts,
    PrivateServer,
    Server,
    ServerMissing,
    server_module,
    skip_without_server,
)
from harness.servers.local import ServerProcess, free_ports
from harness.servers.nats import NatsServer, PrivateNats, _answers, find_program, installed
from harness.servers.proxy import Proxy
from runtime.brokers import nats as broker_module
from runtime.brokers.nats import NatsBroker, _is_another
from runtime.brokers.source import MISSING
from runtime.errors import BrokerDenied, BrokerRefused, BrokerUnavailable, SourceFailed
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings
from steps import (
    Event,
    ack_all,
    eventually_counts,
    eventually_logged,
    eventually_reconnected,
    find,
    ids,
    last,
    length_of,
    publish,
    with_options,
)

pytestmark = pytest.mark.parametrize("broker", ["nats"], indirect=True, scope="session")

WAIT_SECONDS = 30

Connect = Callable[..., AbstractAsyncContextManager[NatsBroker]]


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    """A NATS that may be killed."""
    try:
        with server_module("nats").private(tmp_path_factory.mktemp("node")) as server:
            yield server
    except ServerMissing as missing:
        skip_without_server(missing)


@asynccontextmanager
async def client(server: Server) -> AsyncIterator[Client]:
    """A separate connection, without the runtime."""
    async with await nats.connect(server.url) as client:
        yield client


@asynccontextmanager
async def manager(server: Server) -> AsyncIterator[JetStreamContext]:
    async with client(server) as connected:
        yield connected.jetstream()


async def all_settled(server: Server, queue: str) -> None:
    """Wait until the work queue is empty: `eventually_counts` does not see a message that waits for its ack wait."""

    async def messages() -> int:
        async with manager(server) as js:
            return (await js.stream_info(queue)).state.messages

    await eventually(0, messages)


def impatient(url: str) -> str:
    """The URL with the shortest ack wait."""
    return f"{url}?ack_wait_seconds=1"


class TestOutages:
    async def test_one_of_several_hosts_is_enough(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        (closed,) = free_ports(1)
        port = broker.url.rpartition(":")[2]
        url = f"nats://127.0.0.1:{closed},127.0.0.1:{port}"
        for _ in range(5):  # in random order
            async with connect(prefetch=1, broker_url=url) as source:
                assert await publish(source, 1) == await ack_all(source, 1)
        with pytest.raises(BrokerUnavailable, match=f"{closed}"):
            async with connect(broker_url=f"nats://127.0.0.1:{closed}"):
                pass

    @pytest.mark.parametrize("deleted", ["consumer", "stream", "attempts"])
    async def test_a_consumer_or_stream_that_was_deleted_is_created_again_and_used(
        self, connect: Connect, broker: Server, queue: str, events: list[Event], deleted: str
    ) -> None:
        async with connect() as source, manager(broker) as js:
            if deleted == "consumer":
                await js.delete_consumer(queue, queue)
            elif deleted == "stream":
                await js.delete_stream(queue)
            else:
                await publish(source, 1)
                (message,) = await take(source, 1)
                await js.delete_stream(f"{queue}_attempts")
                await source.requeue(message)
                (message,) = await take(source, 1)  # its attempts were looked up
                assert message.attempt == 1
                await source.ack(message)
            await eventually_logged(events, "connected", count=2)
            published = await publish(source, 5)
            messages = await take(source, 5)
            assert ids(messages) == published
            await source.retry(messages[0], 0.1, "not now")
            (again,) = await take(source, 1)
            assert again.attempt == 2

    async def test_a_consumer_that_was_created_again_and_would_lose_messages_ends_the_consumption(
        self, connect: Connect, proxy: Proxy, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(broker_url=proxy.url) as source, manager(broker) as js:
            workers = [asyncio.ensure_future(anext(source)) for _ in range(2)]
            proxy.refuse()
            await eventually_logged(events, "reconnecting")
            await js.delete_consumer(queue, queue)
            await js.add_consumer(queue, durable_name=queue, ack_policy="explicit", max_deliver=5)
            proxy.resume()
            for worker in workers:
                async with asyncio.timeout(WAIT_SECONDS):
                    with pytest.raises(SourceFailed, match="it has max_deliver, after which"):
                        await worker
            assert isinstance(source.buffer.failure, BrokerRefused)  # so /livez is 503
            assert not source.connected

    async def test_a_deleted_stream_that_must_not_be_created_again_is_awaited(
        self, connect: Connect, guarded: PrivateNats, queue: str, events: list[Event]
    ) -> None:
        user, password = ODD_USER
        administrator = url_for(guarded, user, password)
        async with connect(prefetch=0, broker_url=administrator):
            pass  # connecting creates the streams
        async with connect(broker_url=url_for(guarded, "consumer", "makes-no-streams")) as source:
            async with await nats.connect(guarded.url, user=user, password=password) as client:
                await client.jetstream().delete_stream(queue)
            await eventually(
                True,
                lambda: asyncio.sleep(
                    0, "permissions violation for publish" in source.connectivity.reason
                ),
            )
            assert not source.connected
            async with connect(prefetch=0, broker_url=administrator) as publisher:
                published = await publish(publisher, 1)
            assert await ack_all(source, 1) == published

    async def test_an_error_that_ends_the_reading_of_a_connection_is_an_outage(
        self, connect: Connect, events: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with connect(prefetch=1) as source:

            async def fail(*_: object) -> None:
                raise RuntimeError

            with monkeypatch.context() as patch:
                patch.setattr(broker_module.Connection, "_process_msg", fail)
                with pytest.raises(BrokerUnavailable, match="cannot be read any more"):
                    await source.describe()
                await eventually_logged(events, "reconnecting")
            await eventually_logged(events, "connected", count=2)
            assert await publish(source, 1) == await ack_all(source, 1)

    async def test_a_publisher_creates_a_deleted_stream_again(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=0) as source, manager(broker) as js:
            await js.delete_stream(queue)
            with pytest.raises(BrokerUnavailable, match="JetStream does not answer"):
                await publish(source, 1)
            await eventually_logged(events, "connected", count=2)
            await publish(source, 1)

    async def test_messages_acked_just_before_a_crash_of_the_server_are_not_handled_again(
        self, connect: Connect, node: PrivateServer, queue: str, events: list[Event]
    ) -> None:
        # Messages that the server had sent, and that the crash took from the connection, arrive after the ack wait.
        url = with_options(node.url, ack_wait_seconds=10)
        async with connect(prefetch=200, broker_url=url) as source:
            await publish(source, 500)
            handled = await ack_all(source, 300)
            node.kill()  # the consumer's state is written to the disk only now and then
            await eventually_logged(events, "reconnecting")
            await asyncio.to_thread(node.restart)
            handled += await ack_all(source, 200)
            assert len(set(handled)) == len(handled)
            # Messages whose acks the crash took are delivered once more, and acked.
            await all_settled(node, queue)
            await source.stop()
        await asyncio.to_thread(node.delete, queue)

    async def test_acks_are_remembered_for_some_seconds_and_not_for_ever(
        self, connect: Connect, shorten: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shorten(0.01, "TICK_SECONDS")
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            await ack_all(source, 1)
            ticks = 0

            async def counted(connection: Any, tick: Any = source._tick) -> None:
                nonlocal ticks
                await tick(connection)
                ticks += 1

            monkeypatch.setattr(source, "_tick", counted)
            await eventually(True, lambda: asyncio.sleep(0, ticks >= 10))
            assert len(source._recent_acks | source._older_acks) == 1
            shorten(0.01, "ACKS_SECONDS")
            source._forget_at = 0.0
            await eventually({}, lambda: asyncio.sleep(0, source._recent_acks | source._older_acks))

    async def test_a_restart_of_the_server_is_no_other_consumer(
        self, connect: Connect, node: PrivateServer, queue: str, events: list[Event]
    ) -> None:
        """nats-server 2.10 then reports another creation time: acks from before the restart would not be sent again."""
        async with connect(prefetch=2, broker_url=node.url) as source:
            await publish(source, 2)
            (message,) = await take(source, 1)
            reply = message.receipt.reply
            node.kill()
            await eventually_logged(events, "reconnecting")
            await asyncio.to_thread(node.restart)
            await eventually_logged(events, "connected", 2)
            assert message.receipt.reply == reply
            await source.ack(message)
            await ack_all(source, 1)
            # The server may also have forgotten the deliveries: then it redelivers them, and they are acked at once.
            await all_settled(node, queue)
        await asyncio.to_thread(node.delete, queue)

    @pytest.mark.usefixtures("broker")
    @pytest.mark.parametrize(
        ("created", "another"),
        [
            ("00:00:01.123Z", False),
            ("00:00:01.1239Z", False),  # nats-server 2.10, after a restart
            ("00:00:05.000000001Z", True),
            ("00:00:01Z", True),
            ("00:00:03Z", True),  # from a server of the cluster whose clock is behind
        ],
    )
    def test_a_consumer_is_another_if_it_was_created_since_it_was_known(
        self, created: str, another: bool
    ) -> None:
        known = {"created": "2026-01-01T00:00:01.123Z", "ts": "2026-01-01T00:00:04.9Z"}
        assert _is_another(known, {"created": f"2026-01-01T{created}"}) == another


class TestDeletedTopology:
    async def test_a_filtered_consumer_of_operations_is_waited_for(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[f"{queue}.>"])

            async def add_consumer() -> None:
                await js.add_consumer(
                    queue,
                    durable_name=queue,
                    ack_policy="explicit",
                    filter_subject=f"{queue}.eu",
                    deliver_policy="new",
                )

            await add_consumer()
            await js.publish(f"{queue}.us", b"us")
            async with connect(prefetch=2) as source:
                await js.publish(f"{queue}.eu", b"1")
                (message,) = await take(source, 1)
                assert message.body == b"1"
                await source.ack(message)
                await js.delete_consumer(queue, queue)
                await eventually_logged(events, "reconnecting", 2)
                await asyncio.sleep(1)  # several attempts
                assert not source.connected
                assert "this service did not create it" in source.connectivity.reason
                with pytest.raises(NotFoundError):
                    await js.consumer_info(queue, queue)
                await add_consumer()
                await js.publish(f"{queue}.eu", b"2")
                await js.publish(f"{queue}.us", b"us")
                (message,) = await take(source, 1)
                assert message.body == b"2"
                await source.ack(message)
        reasons = [event["reason"] for event in find(events, "reconnecting")]
        assert len(reasons) == 2
        assert reasons[1] == (
            f"the consumer {queue!r} of the stream {queue!r} was deleted: this service did not create it, and waits "
            "until it exists again"
        )

    @pytest.mark.parametrize("which", ["", "_dead", "_attempts"])
    async def test_a_stream_of_operations_is_waited_for(
        self, connect: Connect, broker: Server, queue: str, events: list[Event], which: str
    ) -> None:
        name = f"{queue}{which}"
        async with manager(broker) as js:

            async def add_stream() -> None:
                await js.add_stream(name=name, subjects=[f"{name}.>"], max_msgs=1_000)

            await add_stream()
            url = broker.url if which else f"{broker.url}?subject={queue}.created"
            async with connect(prefetch=2, broker_url=url) as source:
                assert await publish(source, 1) == await ack_all(source, 1)
                (bad,) = await publish(source, 1)
                (message,) = await take(source, 1)
                await js.delete_stream(name)
                if which == "_dead":
                    await source.reject(message, "bad")
                elif which:
                    await source.retry(message, 0.1, "not now")
                await eventually_logged(events, "reconnecting", 2)
                await asyncio.sleep(1)  # several attempts
                assert not source.connected
                with pytest.raises(NotFoundError):
                    await js.stream_info(name)
                await add_stream()
                await eventually(True, lambda: asyncio.sleep(0, source.connected))
                if which == "_dead":
                    await eventually(1, source.count_dead_letters)
                elif which:
                    while (message := (await take(source, 1))[0]).id != bad:
                        await source.ack(message)
                    await source.ack(message)
                assert await publish(source, 1) == await ack_all(source, 1)
            assert (await js.stream_info(name)).config.max_msgs == 1_000
        assert f"the stream {name!r} was deleted: this" in find(events, "reconnecting")[1]["reason"]

    async def test_a_consumer_of_ours_continues_where_it_was(
        self,
        connect: Connect,
        broker: Server,
        queue: str,
        events: list[Event],
        shorten: Callable[..., None],
    ) -> None:
        shorten(0.1, "FLOOR_SECONDS", "TICK_SECONDS")
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[f"{queue}.>"])
            url = f"{broker.url}?subject={queue}.a"
            async with connect(prefetch=3, broker_url=url) as source:
                await publish(source, 20)
                handled = await ack_all(source, 20)
                (new,) = await publish(source, 1)
                (in_flight,) = await take(source, 1)
                floor = f"the consumer {queue!r} of the stream {queue!r}"

                async def known() -> int:
                    return int(source._known[floor]["ack_floor"]["stream_seq"])

                await eventually(20, known)
                await js.delete_consumer(queue, queue)
                await eventually_logged(events, "connected", 2)
                published = await publish(source, 3)
                await source.ack(in_flight)
                assert await ack_all(source, 3) == published
                await source.stop()
                info = await js.consumer_info(queue, queue)
                assert info.config.opt_start_seq == 21
                await eventually(0, lambda: unsettled(js, queue))
            assert in_flight.id == new
            assert len(handled) == 20

    async def test_the_ack_of_a_deleted_stream_settles_no_message_of_the_next_one(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=2) as source, manager(broker) as js:
            await publish(source, 2)
            await ack_all(source, 1)
            (old,) = await take(source, 1)
            await js.delete_stream(queue)
            await eventually_logged(events, "connected", 2)
            assert (await js.stream_info(queue)).config.retention == "workqueue"
            published = await publish(source, 2)  # with the same sequences
            await source.ack(old)
            first, second = await take(source, 2)
            await source.requeue(first)
            await source.ack(second)
            assert await ack_all(source, 1) == published[:1]
        await all_settled(broker, queue)

    async def test_what_operations_have_edited_is_created_again_with_the_edit(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=0), manager(broker) as js:
            config = (await js.stream_info(queue)).config
            await js.update_stream(config.evolve(max_msgs=77, subjects=[queue, f"{queue}.more"]))
        async with connect(prefetch=1) as source, manager(broker) as js:
            await js.delete_stream(queue)
            await eventually_logged(events, "connected", 3)
            config = (await js.stream_info(queue)).config
            assert (config.max_msgs, config.subjects) == (77, [queue, f"{queue}.more"])
            assert await publish(source, 1) == await ack_all(source, 1)

    async def test_describing_and_listing_create_nothing(
        self, source_for: Callable[..., NatsBroker], broker: Server, queue: str
    ) -> None:
        async with source_for() as source, manager(broker) as js:
            described = await source.describe()
            for name in (queue, f"{queue} group {queue}", f"{queue}_dead", f"{queue}_attempts"):
                assert described[name] == MISSING
            assert await source.count_dead_letters() == 0
            assert [letter async for letter in source.dead_letters(9)] == []
            assert await last(source.purge_dead_letters()) == 0
            assert [moved async for moved in source.replay_dead_letters()] == []
            for name in (queue, f"{queue}_dead", f"{queue}_attempts"):
                with pytest.raises(NotFoundError):
                    await js.stream_info(name)
            await source.declare()
            await source.declare()
            assert MISSING not in (await source.describe()).values()

    async def test_a_subject_of_another_stream_is_one_sentence_that_names_both(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=f"{queue}-theirs", subjects=[f"{queue}_dead.>"])
            try:
                sentence = (
                    f"'{queue}_dead' cannot be created, because the stream '{queue}-theirs' already"
                )
                with pytest.raises(BrokerRefused, match=sentence):
                    async with connect():
                        pass
            finally:
                await js.delete_stream(f"{queue}-theirs")

    async def test_a_small_max_ack_pending_is_warned_of(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[queue])
            await js.add_consumer(
                queue, durable_name=queue, ack_policy="explicit", max_ack_pending=20
            )
            async with connect(prefetch=10):
                pass
        (warning,) = find(events, "max_ack_pending")
        assert (warning["level"], warning["limit"]) == ("warning", 20)


async def unsettled(js: JetStreamContext, queue: str) -> int:
    info = await js.consumer_info(queue, queue)
    return (info.num_pending or 0) + (info.num_ack_pending or 0)


@pytest.fixture
def cluster(program: str, tmp_path: Path) -> Iterator[dict[str, PrivateNats]]:
    """Three servers, by their names."""
    ports = free_ports(6)
    routes = json.dumps([f"nats://127.0.0.1:{port}" for port in ports[3:]])
    with ExitStack() as running:
        nodes = {}
        for number in range(3):
            directory = tmp_path / f"n{number}"
            directory.mkdir()
            file = directory / "nats.conf"
            file.write_text(
                f'server_name: "n{number}"\n'
                f'cluster {{ name: "c", listen: "127.0.0.1:{ports[3 + number]}", routes: {routes} }}\n'
            )
            arguments = ["-a", "127.0.0.1", "-p", str(ports[number]), "-js"]
            arguments += ["-sd", str(directory), "-c", str(file)]
            server = ServerProcess(
                [program, *arguments], directory, partial(_answers, ports[number])
            )
            running.callback(server.close)
            nodes[f"n{number}"] = PrivateNats(f"nats://127.0.0.1:{ports[number]}", server)
        yield nodes


class TestCluster:
    async def test_killed_leaders_lose_nothing_that_was_confirmed(
        self, connect: Connect, cluster: dict[str, PrivateNats], queue: str
    ) -> None:
        hosts = ",".join(node.url.rpartition("/")[2] for node in cluster.values())
        handled: list[str] = []
        published: list[str] = []

        async def work(source: NatsBroker) -> None:
            async for message in source:
                await asyncio.sleep(0.002)
                handled.append(message.id)
                await source.ack(message)

        url = f"nats://{hosts}?replicas=3&ack_wait_seconds=3"
        async with asyncio.timeout(120):
            while True:
                with suppress(BrokerUnavailable):
                    async with connect(prefetch=0, broker_url=url):
                        break
            async with connect(prefetch=20, broker_url=url) as source:
                workers = [asyncio.create_task(work(source)) for _ in range(3)]
                for _ in range(2):
                    leader = await leader_of(cluster, queue)
                    for number in range(40):
                        if number == 20:
                            cluster[leader].kill()
                        published += await publish_insistently(source, 10)
                    await asyncio.to_thread(cluster[leader].restart)
                await eventually(set(), lambda: asyncio.sleep(0, {*published} - {*handled}))
                await source.stop()
                await asyncio.gather(*workers)
        repeated = len(handled) - len({*handled})
        assert repeated <= 2 * 20  # in flight at a killed leader, or acked in its last moments


async def leader_of(cluster: dict[str, PrivateNats], stream: str) -> str:
    while True:
        for node in cluster.values():
            with suppress(Exception):
                async with manager(node) as js:
                    info = await js.stream_info(stream)
                    if info.cluster and info.cluster.leader:
                        return info.cluster.leader


async def publish_insistently(source: NatsBroker, count: int) -> list[str]:
    """Publish until it succeeds: repeats have the same ids, and the stream stores each once."""
    messages = [OutgoingMessage(b"x") for _ in range(count)]
    while True:
        try:
            await source.publish(messages)
        except BrokerUnavailable:
            await asyncio.sleep(0.1)
        else:
            return ids(messages)


class TestAckWait:
    async def test_the_messages_of_a_dead_consumer_are_redelivered_and_its_late_settlements_change_nothing(
        self, connect: Connect, proxy: Proxy, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with (
            connect(prefetch=3, broker_url=impatient(proxy.url)) as dead,
            connect(prefetch=0, broker_url=impatient(broker.url)) as other,
        ):
            published = await publish(other, 3)
            requeued, retried = await take(dead, 2)
            await eventually(1, length_of(dead.buffer))
            proxy.black_hole()
            other.prefetch = 3
            await other.start()
            messages = await take(other, 3)
            assert sorted(ids(messages)) == sorted(published)
            assert {message.attempt for message in messages} == {1}
            await dead.requeue(requeued)
            await dead.retry(retried, 0.1, "too late")
            proxy.cut()
            proxy.resume()
            await eventually_logged(events, "connected", count=3)
            (new,) = await publish(other, 1)
            assert await ack_all(dead, 1) == [new]  # and not the message that was in its buffer
            for message in messages:
                await other.ack(message)
        await all_settled(broker, queue)
        lost = find(events, "settlement_lost")
        assert [event["message_id"] for event in lost] == [requeued.id, retried.id]

    async def test_an_in_flight_message_that_is_redelivered_after_a_long_outage_is_handled_once(
        self, connect: Connect, proxy: Proxy, broker: Server, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=3, broker_url=impatient(proxy.url)) as source:
            await publish(source, 1)
            (in_flight,) = await take(source, 1)
            reply = in_flight.receipt.reply
            proxy.refuse()

            async def is_held() -> bool:
                return bool(in_flight.receipt.held_until > asyncio.get_running_loop().time())

            await eventually(False, is_held)
            proxy.resume()

            async def came_again() -> bool:
                return bool(in_flight.receipt.reply != reply)

            await eventually(True, came_again)
            await eventually_reconnected(source, events)
            await source.ack(in_flight)
            assert await publish(source, 1) == await ack_all(source, 1)
        await all_settled(broker, queue)

    async def test_the_ack_wait_of_the_url_is_set_or_the_consumers_is_kept(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with manager(broker) as js:
            for url, seconds in [
                (broker.url, 30),
                (f"{broker.url}?ack_wait_seconds=2.5", 2.5),
                (broker.url, 2.5),
            ]:
                async with connect(broker_url=url) as source:
                    assert (await js.consumer_info(queue, queue)).config.ack_wait == seconds
                    assert source._ack_wait == seconds

    async def test_the_filter_subjects_of_the_url_are_set_and_else_those_of_the_consumer_are_kept(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        subjects = [f"{queue}.{name}" for name in ("created", "paid", "lost")]
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[f"{queue}.*"])
            for options, wanted in [
                (f"?filter_subjects={subjects[0]}", subjects[:1]),
                (f"?filter_subjects={subjects[0]},{subjects[1]}", subjects[:2]),
                ("", subjects[:2]),
                ("?filter_subjects=%3E", [">"]),
            ]:
                async with connect(broker_url=broker.url + options) as source:
                    for subject in subjects:
                        await source.publish([OutgoingMessage(b"{}", to=f"subject:{subject}")])
                    expected = subjects if wanted == [">"] else wanted
                    messages = await take(source, len(expected))
                    assert [message.origin["subject"] for message in messages] == expected
                    for message in messages:
                        await source.ack(message)
                    await source.stop()
                await js.purge_stream(queue)


class TestStopping:
    async def test_deliveries_are_counted_from_the_last_retry_on(self, connect: Connect) -> None:
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            await source.retry(message, 0.01, "not counted against it")
            for deliveries in (1, 2, 3):
                (message,) = await take(source, 1)
                assert message.deliveries == deliveries
                await source.requeue(message)  # JetStream counts it like a crash


class TestSettlements:
    async def test_a_backlog_is_delivered_in_its_order(self, connect: Connect) -> None:
        async with connect(prefetch=0) as source:
            published = await publish(source, 200)
        async with connect(prefetch=40) as source:
            assert await ack_all(source, 200) == published

    async def test_one_pull_brings_many_messages(self, connect: Connect) -> None:
        async with connect(prefetch=100) as source:
            await publish(source, 1000)
            connection = source._connection
            assert connection is not None
            sent_before = connection.stats["out_msgs"]
            for _ in range(900):
                await ack_all(source, 1)
                await asyncio.sleep(0)  # now a pull could be sent
            pulls_and_signs_of_life = connection.stats["out_msgs"] - sent_before - 900
            assert pulls_and_signs_of_life < 60

    async def test_a_retry_leaves_the_message_in_its_place_and_its_record_is_deleted_after_the_ack(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=1) as source, manager(broker) as js:

            async def records() -> int:
                return (await js.stream_info(f"{queue}_attempts")).state.messages

            for attempt in (1, 2):
                if attempt == 1:
                    await publish(source, 1)
                (message,) = await take(source, 1)
                await source.retry(message, 0.1, "the database is down")
                assert (await js.stream_info(queue)).state.last_seq == 1
                assert await records() == 1
            record = await js.get_last_msg(
                f"{queue}_attempts", f"{queue}_attempts.{queue}.{message.receipt.key}"
            )
            assert json.loads(record.data or b"")["reason"] == "the database is down"
            (message,) = await take(source, 1)
            assert message.attempt == 3
            await source.ack(message)
            await eventually(0, records)

    async def test_a_crash_between_the_record_and_the_retry_counts_the_attempt(
        self, connect: Connect, broker: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = impatient(broker.url)
        async with connect(prefetch=1, broker_url=url) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)

            async def crash(*_: object) -> None: ...

            with monkeypatch.context() as patch:
                patch.setattr(source, "_send", crash)
                await source.retry(message, 0.01, "not now")
            (message,) = await take(source, 1)
            assert message.attempt == 2
            await source.ack(message)

    async def test_a_dead_letter_that_is_stored_twice_is_one(
        self, connect: Connect, broker: Server, queue: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with connect(prefetch=1, broker_url=impatient(broker.url)) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)

            async def crash(*_: object) -> None: ...

            with monkeypatch.context() as patch:
                patch.setattr(source, "_send", crash)
                await source.reject(message, "bad")
            (message,) = await take(source, 1)
            await source.reject(message, "bad")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))


class TestPublishing:
    async def test_a_subject_of_no_stream_is_one_sentence_and_harms_no_other(
        self, connect: Connect, queue: str, events: list[Event]
    ) -> None:
        missing = f"{queue}.missing"
        async with connect(prefetch=10) as source:
            messages = [
                OutgoingMessage(b"%d" % n, to=f"subject:{queue}" if n % 2 else f"subject:{missing}")
                for n in range(6)
            ]
            with pytest.raises(BrokerRefused, match=rf"no stream has the subject '{missing}'"):
                await source.publish(messages)
            taken = await take(source, 3)
            assert sorted(message.body for message in taken) == [b"1", b"3", b"5"]
            for message in taken:
                await source.ack(message)
            assert not find(events, "reconnecting")

    async def test_what_is_published_together_makes_no_task_for_each(
        self, connect: Connect, queue: str
    ) -> None:
        """A task and a timer for each message cost half of the CPU."""
        made: list[Any] = []

        def make(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
            made.append(work)
            return asyncio.Task(work, loop=loop, **options)

        loop = asyncio.get_running_loop()
        async with connect(prefetch=0) as source:
            loop.set_task_factory(make)
            try:
                outgoing = [OutgoingMessage(b"x", to=f"subject:{queue}") for _ in range(300)]
                await source.publish(outgoing)
            finally:
                loop.set_task_factory(None)
            assert (await source.describe())[queue] == 300
        assert len(made) < 30  # perhaps from a tick

    @pytest.mark.parametrize("end", ["timed out", "cancelled"])
    async def test_a_publish_without_an_answer_leaves_nothing_behind(
        self,
        connect: Connect,
        broker: Server,
        queue: str,
        events: list[Event],
        shorten: Callable[..., None],
        end: str,
    ) -> None:
        heard, mute = asyncio.Event(), f"{queue}.mute"

        async def hear(_msg: Msg) -> None:
            heard.set()

        async with client(broker) as other, connect() as source:
            await other.subscribe(mute, cb=hear)
            await other.flush()
            if end == "timed out":
                shorten(0.3, "ANSWER_SECONDS")
            outgoing = [OutgoingMessage(b"x", to=f"subject:{to}") for to in (mute, queue, mute)]
            publishing = asyncio.create_task(source.publish(outgoing))
            await heard.wait()
            if end == "cancelled":
                publishing.cancel()
            with pytest.raises((asyncio.CancelledError, BrokerUnavailable), match=f"^$|{end}"):
                await publishing
            assert source._connection is not None
            assert source._connection._asked == {}
            [message] = await take(source, 1)
            await source.ack(message)
        assert not find(events, "reconnecting")

    async def test_a_stream_that_refuses_is_named_by_its_subject(
        self, connect: Connect, broker: Server, queue: str, events: list[Event]
    ) -> None:
        full, talker = f"{queue}-full", f"{queue}.talker"
        async with manager(broker) as js, client(broker) as other:
            await js.add_stream(name=full, subjects=[full], max_msgs=1, discard=DiscardPolicy.NEW)

            async def talk(msg: Msg) -> None:
                await msg.respond(b'["not", "an", "answer"]')

            await other.subscribe(talker, cb=talk)
            await other.flush()
            async with connect() as source:
                await source.publish([OutgoingMessage(b"x", to=f"subject:{full}")])
                for subject, body, why in (
                    (full, b"x", f"'{full}': maximum messages exceeded"),
                    (talker, b"x", f"'{talker}': another program answered"),
                    (full, bytes(2**21), f"the subject '{full}': this message is larger"),
                    (f"{queue} x", b"x", "has spaces, wildcards or an empty part"),
                    (f"{queue}.*", b"x", "has spaces, wildcards or an empty part"),
                    (f"{queue}.\ud800", b"x", "has spaces, wildcards or an empty part"),
                    (queue * 50, b"x", "is longer than 1000 bytes"),
                    (f"$JS.API.STREAM.DELETE.{queue}", b"", "is the server's own"),
                ):
                    with pytest.raises(BrokerRefused, match=re.escape(why)):
                        await source.publish([OutgoingMessage(body, to=f"subject:{subject}")])
                await publish(source, 1)
                await ack_all(source, 1)
                assert not find(events, "reconnecting")
            await js.delete_stream(full)

    async def test_an_id_that_is_passed_on_to_another_subject_of_the_stream_is_stored_there_once(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[f"{queue}.>"])
            await js.publish(f"{queue}.created", b"1", headers={"Nats-Msg-Id": "id-1"})
            async with connect(prefetch=2) as source:
                (message,) = await take(source, 1)
                for _ in range(2):
                    copy = OutgoingMessage(b"2", id=message.id, to=f"subject:{queue}.checked")
                    await source.publish([copy])
                await source.ack(message)
                (copied,) = await take(source, 1)
                assert (copied.id, copied.body) == ("id-1", b"2")
                await source.ack(copied)
            assert (await js.stream_info(queue)).state.messages == 2


class TestMessages:
    @pytest.mark.parametrize(
        ("id", "type"),
        [("two\r\nlines", " spaces "), ("größe", "ü"), ("\u2028", "\t"), ("", "a: b")],
    )
    async def test_odd_ids_types_and_headers_survive(
        self, connect: Connect, broker: Server, queue: str, id: str, type: str
    ) -> None:
        headers = {
            "Nats-Rollup": "all",  # the broker takes it as an order to delete everything before it
            "x-consumer-attempts": "7",
            "two\nlines": "a\r\nb",
            "empty": "",
            "none": None,
            "colon": "a: b",
        }
        async with connect(prefetch=1) as source:
            sent = OutgoingMessage(b"body", type, id, headers)
            await source.publish([sent])
            (message,) = await take(source, 1)
            assert (message.type, message.headers, message.attempt) == (type, headers, 1)
            assert message.id == sent.id
            await source.reject(message, "odd")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [letter] = [letter async for letter in source.dead_letters(1)]
            assert (letter.id, letter.type) == (message.id, type)
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            (again,) = await take(source, 1)
            assert (again.id, again.type, again.headers) == (message.id, type, headers)
            await source.ack(again)

    async def test_a_message_of_another_producer_has_its_id_and_by_a_setting_its_subject_as_type(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[f"{queue}.*"])
            orders = {"Nats-Msg-Id": "id-1", "Nats-Expected-Stream": queue}  # for the broker
            await js.publish(f"{queue}.order_created", b"1", headers=orders)
            await js.publish(f"{queue}.order_created", b"2", headers={"x-consumer-json": "[1]"})
        async with connect(prefetch=2, type_from="subject") as source:
            one, other = await take(source, 2)
            assert (one.id, one.type) == ("id-1", f"{queue}.order_created")
            assert (other.id, other.body) == (other.receipt.key, b"2")
            await source.requeue(other)
            (again,) = await take(source, 1)
            assert again.id == other.id  # the same each time
            await source.ack(again)
            await source.reject(one, "bad")  # its headers would forbid the stream
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))

    @pytest.mark.parametrize(
        ("subject", "block"),
        [
            (b".\xff", b"NATS/1.0\r\na: b\r\n\r\n"),
            (b"", b"N"),
            (b"", b"NATS/1.0"),
            (b"", b"NATS/1.0 \xff\xff\xff \xff\r\n\r\n"),
            (b"", b"NATS/1.0\r\na/b: 1\r\n(a): 2\r\n\xff: 3\r\n: 4\r\n\r\n"),
            (b"", b"NATS/1.0\r\na: \xff\x01\rb\nc\r\nNats-Msg-Id: \xff\x02\r\n\r\n"),
            (b"", b"NATS/1.0\r\nx-consumer-json: [1]\r\nx-consumer-attempts: \xff\r\n\r\n"),
            (b"", b'NATS/1.0\r\nx-consumer-json: {"id": [1], "type": {}, "headers": 1}\r\n\r\n'),
            (b"", b'NATS/1.0\r\nx-consumer-json: {"id": "\\ud800", "type": "\\ud800"}\r\n\r\n'),
        ],
        ids=[
            *("subject", "short", "no end", "status", "names", "values"),
            *("no object", "types", "surrogates"),
        ],
    )
    async def test_any_message_of_another_producer_is_delivered_and_can_become_a_dead_letter(
        self, connect: Connect, broker: Server, queue: str, subject: bytes, block: bytes
    ) -> None:
        async with manager(broker) as js, client(broker) as other:
            await js.add_stream(name=queue, subjects=[queue, f"{queue}.>"])
            sizes = b"%d %d" % (len(block), len(block) + 1)
            await other._send_command(
                b"HPUB %s%s %s\r\n%sx\r\n" % (queue.encode(), subject, sizes, block)
            )
            await other.flush()
        async with connect(prefetch=1) as source:
            (message,) = await take(source, 1)
            await source.reject(message, "bad: \ud800")
            await eventually(1, source.count_dead_letters)
            [letter] = [letter async for letter in source.dead_letters(2)]
            assert (letter.id, letter.type, letter.body) == (message.id, message.type, b"x")
            assert (letter.attempts, letter.reason) == (1, "bad: ?")
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            (again,) = await take(source, 1)
            assert (again.id, again.type) == (message.id, message.type)
            assert again.headers == message.headers
            await source.ack(again)

    async def test_dead_letters_of_other_programs_are_listed_and_replayed_to_the_stream(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        nonsense = {
            "x-consumer-attempts": "many",
            "x-consumer-dead-lettered-at": "yesterday",
            "x-consumer-subject": "a b",
            "Nats-Msg-Id": "id-1",
        }
        async with connect(prefetch=2) as source, manager(broker) as js:
            await js.publish(f"{queue}_dead.{queue}", b"1", headers=nonsense)
            await js.publish(f"{queue}_dead.{queue}", b"2")
            one, other = [letter async for letter in source.dead_letters(9)]
            assert (one.id, one.body, one.attempts, one.dead_lettered_at) == ("id-1", b"1", 0, 0)
            assert (other.id, other.body, other.reason) == ("2", b"2", "")
            assert [moved async for moved in source.replay_dead_letters()] == [2]
            assert await ack_all(source, 2) == ["id-1", "2"]
            assert await source.count_dead_letters() == 0

    @pytest.mark.parametrize(
        ("subject", "pattern", "matches"),
        [
            ("a.b", "a.b", True),
            ("a.b", "a.*", True),
            ("a.b.c", "a.>", True),
            ("a", ">", True),
            ("a", "a.>", False),
            ("a.b", "a", False),
            ("a", "a.b", False),
            ("a.b", "*.c", False),
        ],
    )
    def test_a_subject_is_compared_with_those_of_a_stream(
        self, broker: Server, subject: str, pattern: str, matches: bool
    ) -> None:
        assert broker_module._matches(subject, pattern) == matches

    async def test_a_dead_letter_is_replayed_to_no_subject_of_another_stream(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=1) as source, manager(broker) as js:
            headers = {"x-consumer-subject": f"{queue}_attempts.a.b"}
            await js.publish(f"{queue}_dead.{queue}", b"1", headers=headers)
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            (message,) = await take(source, 1)
            assert message.body == b"1"
            await source.ack(message)

    async def test_the_same_id_within_two_minutes_is_stored_once(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=0) as source:
            for _ in range(2):  # like after an answer that was lost
                await source.publish([OutgoingMessage(b"body", id="id-1")])
            await eventually_counts(broker, queue, Counts(ready=1, delayed=0, dead=0))

    async def test_what_is_put_off_is_stored_also_if_the_stream_has_lost_the_message_meanwhile(
        self, connect: Connect, broker: Server, queue: str, shorten: Callable[..., None]
    ) -> None:
        shorten(0.05, "FIRST_SECONDS", "LONGEST_SECONDS")
        async with connect(prefetch=2) as source, manager(broker) as js:
            await publish(source, 2)
            later, bad = await take(source, 2)

            async def limit(max_msg_size: int) -> None:
                for stream in (f"{queue}_attempts", f"{queue}_dead"):
                    config = (await js.stream_info(stream)).config
                    await js.update_stream(config.evolve(max_msg_size=max_msg_size))

            await limit(1)
            await source.retry(later, 3600, "later")
            await source.reject(bad, "bad")
            assert later in source.put_offs.counts
            assert bad in source.put_offs.counts
            for message in (later, bad):
                await js.delete_msg(queue, int(message.receipt.key.partition("-")[0]))
            await limit(-1)
            await eventually(set(), lambda: asyncio.sleep(0, source.unacked))
            [letter] = [letter async for letter in source.dead_letters(9)]
            assert (letter.id, letter.reason, letter.attempts) == (bad.id, "bad", 1)
            copy = await js.get_last_msg(queue, queue)
            assert (copy.headers or {})["x-consumer-attempts"] == "1"
            await source.stop()

    async def test_a_message_that_is_too_large_is_refused_and_the_connection_stays(
        self, connect: Connect, events: list[Event]
    ) -> None:
        async with connect(prefetch=1) as source:
            for body, headers in [(b"x" * 1_048_576, {}), (b"x" * 900_000, {"h": "y" * 150_000})]:
                with pytest.raises(BrokerRefused, match="larger than the server's max_payload"):
                    await source.publish([OutgoingMessage(body, headers=headers)])
            with pytest.raises(BrokerRefused, match="cannot be sent"):
                await source.publish([OutgoingMessage(b"", headers={"h": object()})])
            assert await publish(source, 1) == await ack_all(source, 1)
        assert [event["event"] for event in events] == ["connected"]

    @pytest.mark.parametrize(
        ("sizes", "odd"),
        [((1_048_500, 0), ""), ((1_000_000, 48_000), ""), ((500_000, 20_000), "\x01")],
    )
    async def test_a_message_that_is_too_large_for_a_dead_letter_is_shortened_and_harms_no_other(
        self,
        connect: Connect,
        broker: Server,
        queue: str,
        events: list[Event],
        sizes: tuple[int, int],
        odd: str,
    ) -> None:
        async with connect(prefetch=2) as source, client(broker) as other:
            length, header_length = sizes
            header = (odd or "h") * header_length
            block = b"NATS/1.0\r\nbig:%s\r\nNats-Msg-Id:i\r\n\r\n" % header.encode()
            body = b"x" * length
            await other._send_command(
                b"HPUB %s %d %d\r\n" % (queue.encode(), len(block), len(block + body))
                + block
                + body
                + b"\r\n"
            )
            await other.flush()
            for attempt in (1, 2):
                (message,) = await take(source, 1)
                assert (message.id, len(message.body), message.attempt) == ("i", length, attempt)
                if attempt == 1:
                    await source.retry(message, 0, "r" * 500)
            published = await publish(source, 1)
            await source.reject(message, "r" * 500)
            assert await ack_all(source, 1) == published
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [letter] = [letter async for letter in source.dead_letters(1)]
            assert (letter.id, letter.attempts, letter.reason) == ("i", 2, "r" * 500)
            assert body.startswith(letter.body)
            assert len(letter.body) >= length / 2 - 1
            assert await last(source.replay_dead_letters()) == 1
            (message,) = await take(source, 1)
            assert message.headers["x-consumer-shortened"] == str(length)
            await source.ack(message)
        assert [event["event"] for event in events] == ["connected"]

    @pytest.mark.parametrize("id", ["i" * 65_000, "\x01" * 60_000])
    async def test_a_message_with_an_endless_id_becomes_a_dead_letter(
        self, connect: Connect, broker: Server, queue: str, id: str
    ) -> None:
        async with connect(prefetch=2) as source, client(broker) as other:
            block = b"NATS/1.0\r\nNats-Msg-Id:%s\r\n\r\n" % id.encode()
            sizes = b"%s %d %d" % (queue.encode(), len(block), len(block))
            await other._send_command(b"HPUB %s\r\n%s\r\n" % (sizes, block))
            await other.flush()
            (message,) = await take(source, 1)
            await source.retry(message, 0, "not now")
            (message,) = await take(source, 1)
            await source.reject(message, "bad")
            await eventually(1, source.count_dead_letters)
            [letter] = [letter async for letter in source.dead_letters(1)]
            assert id.startswith(letter.id)

    async def test_any_retry_and_dead_letter_of_a_message_that_limits_deleted_is_stored(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[f"{queue}.>"], max_msgs=100)
            await js.publish(f"{queue}.order_created", b"b", headers={"a": "1", "Nats-Msg-Id": "i"})
            async with (
                connect(prefetch=1, type_from="subject") as source,
                connect(prefetch=1, group="others") as others,
            ):
                assert await ack_all(others, 1) == ["i"]
                for attempt in (1, 2):
                    (message,) = await take(source, 1)
                    assert (message.id, message.attempt) == ("i", attempt)
                    assert message.type == message.origin["subject"] == f"{queue}.order_created"
                    assert (message.body, message.headers) == (b"b", {"a": "1"})
                    await js.purge_stream(queue)
                    retried_at = time.monotonic()
                    await source.retry(message, 0.5, "not now")
                (message,) = await take(source, 1)
                assert time.monotonic() - retried_at >= 0.45
                assert (message.id, message.attempt) == ("i", 3)
                await source.retry(message, 0, "not deleted this time")
                (message,) = await take(source, 1)
                assert message.attempt == 4
                await js.purge_stream(queue)
                await source.reject(message, "bad")
                [letter] = [letter async for letter in source.dead_letters(9)]
                assert (letter.id, letter.attempts, letter.reason) == ("i", 4, "bad")
                await js.publish(f"{queue}.next", b"", headers={"Nats-Msg-Id": "next"})
                assert await ack_all(others, 1) == ["next"]  # the copies are not for this group
                assert await ack_all(source, 1) == ["next"]


NAMES = st.sampled_from(
    shlex.split("""
        Nats-Msg-Id Nats-Expected-Stream Nats-Rollup Status x-consumer-id x-consumer-type x-consumer-json
        x-consumer-reason x-consumer-attempts x-consumer-dead-lettered-at x-consumer-subject x-consumer-due
        x-consumer-shortened
    """)
)
VALUES = (
    st.binary(max_size=50)
    | st.text().map(str.encode)
    | st.sampled_from([b"", b"nan", b"-inf", b"-1", b"0", b"1.5", b"3", b"\xff", b"a b", b"a.>"])
    | st.sampled_from([b"[1]", b"{}", b'{"id": [1]}', b'{"headers": {"a": NaN}, "id": "\\ud800"}'])
    | st.sampled_from([b"[" * 1_500, b'{"headers": {"": "\\u0000"}, "type": {}}', b"null"])
).map(lambda value: value.replace(b"\r\n", b""))
FOREIGN = st.lists(
    st.tuples(
        st.lists(st.tuples(NAMES.map(str.encode) | VALUES, VALUES), max_size=8),
        st.binary(max_size=9),
    ),
    max_size=20,
)


class TestForeignMessages:
    @pytest.mark.filterwarnings("ignore:Generating overly large repr")
    @settings(
        max_examples=20,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(in_source=FOREIGN, in_dead=FOREIGN, in_attempts=st.lists(VALUES, max_size=3))
    def test_any_messages_become_dead_letters_that_are_listed_replayed_and_purged(
        self,
        broker: Server,
        settings_for: Callable[..., ConsumerSettings],
        in_source: list[Any],
        in_dead: list[Any],
        in_attempts: list[bytes],
    ) -> None:
        queue = f"ccc-test-{uuid.uuid4().hex[:12]}"

        async def send(client: Client, subject: str, messages: list[Any]) -> int:
            for headers, body in messages:
                lines = [name + b":" + value + b"\r\n" for name, value in headers]
                block = b"NATS/1.0\r\n" + b"".join(lines) + b"\r\n"
                sizes = b"%s %d %d" % (subject.encode(), len(block), len(block + body))
                await client._send_command(b"HPUB %s\r\n%s%s\r\n" % (sizes, block, body))
            await client.jetstream().publish(subject, b"last")  # confirmed after the others
            info = await client.jetstream().stream_info(subject.partition(".")[0])
            return info.state.messages  # JetStream refuses some of them

        async def survive() -> None:
            async with (
                opened(NatsBroker(settings_for(source=queue), 30)) as source,
                client(broker) as other,
            ):
                sent = await send(other, queue, in_source)
                count = sent + await send(other, f"{queue}_dead.{queue}", in_dead)
                await source.start()
                for number, message in enumerate(await take(source, sent)):
                    assert (message.id + message.type).encode().decode()
                    if number < len(in_attempts):
                        subject = source._record_of(message.receipt.key)
                        await other.publish(subject, in_attempts[number])
                        await source.requeue(message)
                        (message,) = await take(source, 1)
                    await source.reject(message, "bad")
                await eventually(count, source.count_dead_letters)
                letters = [letter async for letter in source.dead_letters(count + 1)]
                assert len(letters) == count
                json.dumps([[le.id, le.type, le.reason, le.dead_lettered_at] for le in letters])
                assert await last(source.replay_dead_letters()) == count
                messages = await take(source, min(count, 30))
                assert {*ids(messages)} <= {*ids(letters)}
                for message in messages:
                    await source.reject(message, "bad again")
                await last(source.purge_dead_letters())
                assert await source.count_dead_letters() == 0

        try:
            asyncio.run(survive())
        finally:
            broker.delete(queue)


class TestGroups:
    async def test_groups_on_a_stream_with_limits_each_get_every_message_and_count_their_own_failures(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[f"{queue}.>"])
        url = f"{broker.url}?subject={queue}.eu"
        async with (
            connect(prefetch=1, broker_url=url, group="billing") as billing,
            connect(prefetch=1, broker_url=url, group="shipping") as shipping,
        ):
            (id,) = await publish(billing, 1)
            for attempt in (1, 2):
                (message,) = await take(billing, 1)
                assert (message.id, message.attempt) == (id, attempt)
                await billing.retry(message, 0.05, "not now")
            (message,) = await take(billing, 1)
            await billing.reject(message, "bad")
            (message,) = await take(shipping, 1)
            assert (message.id, message.attempt) == (id, 1)
            await shipping.ack(message)
            assert await shipping.count_dead_letters() == 0
            assert await last(shipping.purge_dead_letters()) == 0
            assert [letter.id async for letter in billing.dead_letters(5)] == [id]
            assert [moved async for moved in billing.replay_dead_letters()] == [1]
            assert await ack_all(billing, 1) == [id]
            (new,) = await publish(shipping, 1)
            assert await ack_all(shipping, 1) == [new]  # the replayed one is not for this group

    @pytest.mark.parametrize(
        ("policy", "first"), [("new", []), ("last", [b"1"]), ("all", [b"0", b"1"])]
    )
    async def test_a_new_consumer_begins_where_the_url_says_also_if_it_is_deleted_before_its_first_message(
        self,
        connect: Connect,
        broker: Server,
        queue: str,
        events: list[Event],
        policy: str,
        first: list[bytes],
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[f"{queue}.>"])
            url = f"{broker.url}?subject={queue}.a"
            async with connect(prefetch=0, broker_url=url, group="earlier") as earlier:
                await publish(earlier, 2)
            async with connect(broker_url=f"{url}&deliver_policy={policy}") as source:
                if policy == "new":
                    await js.delete_consumer(queue, queue)
                    await eventually_logged(events, "connected", 3)
                await source.publish([OutgoingMessage(b"later")])
                messages = await take(source, len(first) + 1)
                assert [message.body for message in messages] == [*first, b"later"]

    async def test_a_second_group_of_a_work_queue_is_refused_in_one_sentence(
        self, connect: Connect, queue: str
    ) -> None:
        async with connect(group="billing"):
            with pytest.raises(BrokerRefused, match="'shipping' cannot consume") as refused:
                async with connect(group="shipping"):
                    pass
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        ("config", "fault"),
        [
            ({"deliver_subject": "somewhere"}, "it is a push consumer"),
            ({"ack_policy": "none"}, "acks are not explicit"),
            ({"max_deliver": 5}, "max_deliver"),
            ({"headers_only": True}, "headers only"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_a_consumer_that_would_lose_messages_is_refused_in_one_sentence(
        self, connect: Connect, broker: Server, queue: str, config: dict[str, Any], fault: str
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[queue])
            await js.add_consumer(queue, durable_name=queue, **{"ack_policy": "explicit", **config})
        with pytest.raises(BrokerRefused, match=f"the consumer '{queue}' .* {fault}"):
            async with connect():
                pass

    async def test_a_stream_without_one_subject_needs_it_in_the_url_to_publish(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with manager(broker) as js:
            await js.add_stream(name=queue, subjects=[f"{queue}.*.created"])
        async with connect(prefetch=0) as source:
            with pytest.raises(BrokerRefused, match=r"name one by \?subject= in the URL"):
                await publish(source, 1)

    @pytest.mark.parametrize("name", ["a.b", "a b", "a*", ">", "a/b", "a\\b", "a\nb"])
    @pytest.mark.parametrize("variable", ["source", "group"])
    def test_a_name_that_nats_does_not_allow_is_one_sentence(
        self, source_for: Callable[..., NatsBroker], name: str, variable: str
    ) -> None:
        with pytest.raises(BrokerRefused, match=f"^CONSUMER_{variable.upper()}: ") as refused:
            source_for(**{variable: name})
        assert "\n" not in str(refused.value)

    async def test_created_streams_are_durable_and_described(
        self, connect: Connect, broker: Server, queue: str
    ) -> None:
        async with connect(prefetch=0) as source, manager(broker) as js:
            for name in (queue, f"{queue}_dead", f"{queue}_attempts"):
                assert (await js.stream_info(name)).config.storage == "file"
            assert (await js.stream_info(queue)).config.retention == "workqueue"
            config = (await js.consumer_info(queue, queue)).config
            assert (config.max_deliver, config.max_ack_pending) == (-1, -1)
            assert str((await source.describe())["server"]).startswith("nats-server 2.")


USERS = """
authorization {
  users: [
    { user: "order:events", password: "p@ss:w/o?r#d %2F+é" },
    { user: "own", password: "own-inbox", permissions: { publish: ">", subscribe: "mine.>" } },
    { user: "reader", password: "reads-only",
      permissions: { publish: "$JS.API.STREAM.INFO.*", subscribe: "_INBOX.>" } },
    { user: "consumer", password: "makes-no-streams",
      permissions: { publish: { deny: "$JS.API.STREAM.CREATE.>" }, subscribe: ">" } },
    { nkey: NKEY }
  ]
}
"""
ODD_USER = ("order:events", "p@ss:w/o?r#d %2F+é")
SEED = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)


def url_for(server: NatsServer, user: str, password: str | None = None) -> str:
    credentials = quote(user, safe="")
    if password is not None:
        credentials += f":{quote(password, safe='')}"
    return server.url.replace("//", f"//{credentials}@")


@pytest.fixture(scope="session")
def program() -> str:
    program = find_program()
    if program is None:
        pytest.skip("there is no nats-server that could be started with another configuration")
    return program


@pytest.fixture(scope="session")
def guarded(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateNats]:
    """A NATS with these users."""
    nkey = nkeys.from_seed(bytearray(SEED)).public_key.decode()
    users = USERS.replace("NKEY", nkey)
    with installed(program, tmp_path_factory.mktemp("guarded"), users) as server:
        yield server


def key_of(prefix: int, number: int) -> Any:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(bytes([number] * 32), prefix)))


def jwt(issuer: Any, subject: Any, kind: str, **claims: Any) -> str:
    """A token like nsc's: NATS signs with its own keys, and has its claims in one object."""

    def encoded(data: bytes) -> str:
        return urlsafe_b64encode(data).rstrip(b"=").decode()

    payload = {
        "jti": kind,
        "iat": 1,
        "iss": issuer.public_key.decode(),
        "sub": subject.public_key.decode(),
        "nats": {"type": kind, "version": 2, **claims},
    }
    parts = ({"typ": "JWT", "alg": "ed25519-nkey"}, payload)
    text = ".".join(encoded(json.dumps(part).encode()) for part in parts)
    return f"{text}.{encoded(issuer.sign(text.encode()))}"


CREDS = """\
-----BEGIN NATS USER JWT-----
{jwt}
------END NATS USER JWT------

-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------
"""
NO_LIMITS = dict.fromkeys(
    ("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1
) | dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)


class TestCredentials:
    async def test_a_jwt_and_a_seed_in_a_file_are_enough(
        self, connect: Connect, program: str, tmp_path: Path
    ) -> None:
        """With a server in operator mode, like Synadia's NATS: it has an operator, and no users."""
        operator = key_of(nkeys.PREFIX_BYTE_OPERATOR, 1)
        accounts = [key_of(nkeys.PREFIX_BYTE_ACCOUNT, number) for number in (2, 3)]
        user = nkeys.from_seed(bytearray(SEED))
        limits = {**NO_LIMITS, "wildcards": True}
        system = {name: limits[name] for name in limits if "st" not in name and "cons" not in name}
        preload = [
            f"{account.public_key.decode()}: {jwt(operator, account, 'account', limits=own)}"
            for account, own in zip(accounts, (limits, system), strict=True)
        ]
        lines = [
            f"operator: {jwt(operator, operator, 'operator')}",
            f"system_account: {accounts[1].public_key.decode()}",
            "resolver: MEMORY",
            "resolver_preload: {",
            *preload,
            "}",
        ]
        token = jwt(accounts[0], user, "user", subs=-1, data=-1, payload=-1)
        (tmp_path / "user.creds").write_text(CREDS.format(jwt=token, seed=SEED.decode()))
        with installed(program, tmp_path, "\n".join(lines)) as server:
            async with connect(prefetch=1, broker_url=f"{server.url}?creds=user.creds") as source:
                assert await publish(source, 1) == await ack_all(source, 1)
            with pytest.raises(BrokerDenied, match="refused the user, the password"):
                async with connect(broker_url=server.url):
                    pass

    async def test_a_stream_in_another_domain_is_consumed_from_a_leaf_node(
        self, connect: Connect, program: str, tmp_path: Path, queue: str
    ) -> None:
        (port,) = free_ports(1)
        for name in ("hub", "leaf"):
            (tmp_path / name).mkdir()
        listens = f'leafnodes {{ listen: "127.0.0.1:{port}" }}'
        joins = f'leafnodes {{ remotes: [{{ url: "nats://127.0.0.1:{port}" }}] }}'

        async def is_linked(client: Client) -> bool:
            with suppress(ServiceUnavailableError, nats.errors.NoRespondersError):
                await client.jetstream(domain="hub").account_info()
                return True
            return False

        async def streams(client: Client) -> list[str]:
            return [info.config.name or "" for info in await client.jetstream().streams_info()]

        with (
            installed(program, tmp_path / "hub", f"jetstream {{ domain: hub }}\n{listens}") as hub,
            installed(program, tmp_path / "leaf", f"jetstream {{ domain: leaf }}\n{joins}") as leaf,
        ):
            await eventually(True, lambda: asyncio.to_thread(leaf.ask, is_linked))
            async with connect(prefetch=1, broker_url=f"{leaf.url}?domain=hub") as source:
                assert await publish(source, 1) == await ack_all(source, 1)
            assert queue in await asyncio.to_thread(hub.ask, streams)
            assert queue not in await asyncio.to_thread(leaf.ask, streams)

    async def test_a_token_stands_alone(
        self, connect: Connect, program: str, tmp_path: Path
    ) -> None:
        with installed(program, tmp_path, 'authorization { token: "t@ken/1" }') as server:
            async with connect(prefetch=1, broker_url=url_for(server, "t@ken/1")) as source:
                assert await publish(source, 1) == await ack_all(source, 1)

    async def test_a_seed_in_a_file_is_enough(
        self, connect: Connect, guarded: PrivateNats, tmp_path: Path
    ) -> None:
        (tmp_path / "user.nk").write_bytes(SEED + b"\n")
        async with connect(prefetch=1, broker_url=f"{guarded.url}?nkey=user.nk") as source:
            assert await publish(source, 1) == await ack_all(source, 1)

    async def test_the_inbox_may_have_another_prefix(
        self, connect: Connect, guarded: PrivateNats
    ) -> None:
        url = f"{url_for(guarded, 'own', 'own-inbox')}?inbox=mine"
        async with connect(prefetch=1, broker_url=url) as source:
            assert await publish(source, 1) == await ack_all(source, 1)

    @pytest.mark.parametrize(
        ("user", "password", "sentence"),
        [
            ("s3cret-s3cret", None, "refused the user, the password"),
            ("reader", "reads-only", "permissions violation for publish"),
            ("own", "own-inbox", "permissions violation for subscription"),
        ],
    )
    async def test_a_missing_right_is_one_sentence_without_the_password(
        self,
        connect: Connect,
        guarded: PrivateNats,
        user: str,
        password: str | None,
        sentence: str,
    ) -> None:
        with pytest.raises(BrokerDenied, match=sentence) as refused:
            async with connect(broker_url=url_for(guarded, user, password)):
                pass
        assert "\n" not in str(refused.value)
        assert "s3cret" not in str(refused.value)

    @pytest.mark.parametrize(
        "url",
        [
            "nats://user:s3cret@localhost:port",
            "nats:///",
            "nats://localhost/?s3cret=1@",
        ],
    )
    def test_an_invalid_url_is_refused_and_not_repeated(
        self, source_for: Callable[..., NatsBroker], url: str
    ) -> None:
        with pytest.raises(BrokerRefused, match="percent-encoded") as refused:
            source_for(broker_url=url)
        assert "s3cret" not in str(refused.value)
        assert refused.value.__context__ is None

    @pytest.mark.parametrize(
        ("option", "sentence"),
        [
            ("wait=3", "unknown option 'wait'; known options: ack_wait_seconds"),
            ("filter_subjects=a,,b", "filter_subjects has an empty name"),
            ("ack_wait_seconds=soon", "ack_wait_seconds must be a number of at least 0.1"),
            ("replicas=0", "replicas must be a number of at least 1, at most 5"),
            ("subject=$JS.API.INFO", "subject: '.JS.API.INFO' is the server's own"),
            ("subject=orders.*", "subject: 'orders..' has spaces, wildcards or an empty part"),
            ("subject=a%20b", "subject: 'a b' has spaces, wildcards or an empty part"),
            ("domain=hub.%3E", "domain: 'hub.>' has spaces, wildcards or an empty part"),
            ("inbox=a%0D%0APING", "inbox: .* has spaces, wildcards or an empty part"),
            (
                "deliver_policy=latest",
                "deliver_policy must be one of all, new, last, last_per_subject",
            ),
            ("creds=missing.creds", "creds: .*No such file"),
            ("creds=empty", "creds: the file does not contain a JWT and a seed"),
            ("nkey=empty", "nkey: the file does not contain the seed of an nkey"),
        ],
    )
    async def test_a_wrong_option_is_one_sentence(
        self,
        source_for: Callable[..., NatsBroker],
        broker: Server,
        tmp_path: Path,
        option: str,
        sentence: str,
    ) -> None:
        (tmp_path / "empty").touch()
        with pytest.raises(BrokerRefused, match=f"^CONSUMER_BROKER_URL: .*{sentence}"):
            await source_for(broker_url=f"{broker.url}?{option}").__aenter__()


RIGHTS = {
    "run": shlex.split("""
        $JS.API.STREAM.INFO.orders $JS.API.STREAM.INFO.orders_dead $JS.API.STREAM.INFO.orders_attempts
        $JS.API.CONSUMER.INFO.orders.billing $JS.API.CONSUMER.MSG.NEXT.orders.billing $JS.ACK.orders.billing.>
        $JS.API.STREAM.MSG.GET.orders $JS.API.STREAM.MSG.GET.orders_attempts $JS.API.STREAM.PURGE.orders_attempts
        orders orders_dead.billing orders_attempts.billing.*
    """),
    "dead-letters": shlex.split("""
        $JS.API.STREAM.INFO.orders $JS.API.STREAM.INFO.orders_dead $JS.API.STREAM.INFO.orders_attempts
        $JS.API.CONSUMER.INFO.orders.billing orders
        $JS.API.STREAM.MSG.GET.orders_dead $JS.API.STREAM.PURGE.orders_dead
    """),
    "check": shlex.split("""
        $JS.API.STREAM.INFO.orders $JS.API.STREAM.INFO.orders_dead $JS.API.STREAM.INFO.orders_attempts
        $JS.API.CONSUMER.INFO.orders.billing
    """),
}
RIGHTS["publish"] = [*RIGHTS["check"], "orders"]
RIGHTS["declare"] = [
    *RIGHTS["check"],
    *(f"$JS.API.STREAM.CREATE.orders{suffix}" for suffix in ("", "_dead", "_attempts")),
    "$JS.API.CONSUMER.DURABLE.CREATE.orders.billing",
]
"""The rights in the documentation, for each command: the subjects to publish to. All may subscribe to ``_INBOX.>``."""


@pytest.fixture(scope="session")
def limited(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateNats]:
    """A NATS with a user for each command, and for each right of a consumer one user with all other rights."""
    users = {"root": [">"], **RIGHTS} | {
        f"run-without-{number}": [one for one in RIGHTS["run"] if one != right]
        for number, right in enumerate(RIGHTS["run"])
    }
    lines = [
        f'{{ user: "{name}", password: "p", permissions: {{ '
        f'publish: {{ allow: {json.dumps(rights)} }}, subscribe: "_INBOX.>" }} }}'
        for name, rights in users.items()
    ]
    configuration = "authorization { users: [ " + "\n".join(lines) + " ] }"
    with installed(program, tmp_path_factory.mktemp("limited"), configuration) as server:
        yield server


class TestRights:
    @pytest.fixture
    def as_user(self, connect: Connect, limited: PrivateNats) -> Connect:
        def as_user(user: str, prefetch: int = 0) -> AbstractAsyncContextManager[NatsBroker]:
            url = url_for(limited, user, "p")
            return connect(prefetch, broker_url=url, source="orders", group="billing")

        return as_user

    async def test_the_documented_rights_of_each_command_are_enough(
        self, as_user: Connect, events: list[Event], limited: PrivateNats
    ) -> None:
        async with as_user("declare"):
            pass
        async with as_user("publish") as source:
            await publish(source, 3)
        async with as_user("check") as source:
            assert (await source.describe())["orders"] == 3
        async with as_user("run", 3) as source:
            done, later, bad = await take(source, 3)
            await source.ack(done)
            await source.retry(later, 0, "now")
            await source.reject(bad, "bad")
            await ack_all(source, 1)
            async with as_user("dead-letters") as operator:
                assert len([letter async for letter in operator.dead_letters(9)]) == 1
                assert [moved async for moved in operator.replay_dead_letters()] == [1]
                assert await last(operator.purge_dead_letters()) == 0
            await ack_all(source, 1)
            await asyncio.sleep(1.1)  # a tick
            await source.stop()
        assert {event["event"] for event in events} == {"connected"}

    @pytest.mark.parametrize("number", range(len(RIGHTS["run"])), ids=RIGHTS["run"])
    async def test_a_missing_right_is_named_and_no_message_is_lost(
        self, as_user: Connect, events: list[Event], limited: PrivateNats, number: int, shorten: Any
    ) -> None:
        shorten(0.1, "FIRST_PUT_OFF_SECONDS", "TICK_SECONDS")
        async with as_user("declare"), as_user("publish") as publisher:
            await publish(publisher, 1)
        reason = ""
        try:
            async with as_user(f"run-without-{number}", 1) as source:
                if RIGHTS["run"][number] == "orders":
                    await publish(source, 1)
                (message,) = await take(source, 1)
                await source.retry(message, 0, "now")
                (message,) = await take(source, 1)
                assert message.attempt >= 2
                await source.reject(message, "bad")
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await anext(source)
        except BrokerDenied as denied:
            reason = str(denied)
        except TimeoutError:
            pass
        for event in ("settlement_lost", "reconnecting"):
            reason += "".join(one["reason"] for one in find(events, event))
        right = RIGHTS["run"][number].rstrip("*>").lower()
        assert f'permissions violation for publish to "{right}' in reason.lower()
        if right.startswith("$js.api"):
            assert right in reason.lower()
        root = NatsServer(url_for(limited, "root", "p"))
        counts = await asyncio.to_thread(root.counts, "orders")
        assert counts.ready + counts.dead >= 1
        await asyncio.to_thread(root.delete, "orders")

    async def test_a_subject_that_this_user_may_not_publish_to_is_named_and_harms_no_other(
        self, as_user: Connect, events: list[Event], limited: PrivateNats
    ) -> None:
        async with as_user("declare"), as_user("run", 2) as source:
            messages = [
                OutgoingMessage(b"%d" % n, to=f"subject:{'orders' if n % 2 else 'Invoices.a'}")
                for n in range(4)
            ]
            with pytest.raises(BrokerDenied, match=r'violation for publish to "Invoices\.a"'):
                await source.publish(messages)
            await ack_all(source, 2)
        assert not find(events, "reconnecting")
        root = NatsServer(url_for(limited, "root", "p"))
        await asyncio.to_thread(root.delete, "orders")


class TestMonitoring:
    async def test_kedas_question_needs_no_login_and_finds_the_consumer(
        self, source_for: Callable[..., NatsBroker], program: str, tmp_path: Path
    ) -> None:
        """The request of KEDA's scaler, whose parameters are in scaled-object.yaml; the account of the user is $G."""
        (port,) = free_ports(1)
        users = 'authorization: { users: [{ user: "me", password: "s3cret" }] }'
        with installed(program, tmp_path, f"http: 127.0.0.1:{port}\n{users}") as server:
            url = url_for(server, "me", "s3cret")
            with pytest.raises(BrokerDenied):
                await source_for(broker_url=server.url).__aenter__()
            async with source_for(broker_url=url, prefetch=1) as source:
                await source.declare()
                await source.start()
                await publish(source, 3)
                (message,) = await take(source, 1)
                question = f"http://127.0.0.1:{port}/jsz?acc=$G&consumers=true&config=true"
                answer = json.loads(await asyncio.to_thread(read_url, question))
                await source.ack(message)
            [account] = answer["account_details"]
            name = source.settings.source
            [stream] = [one for one in account["stream_detail"] if one["name"] == name]
            [found] = [one for one in stream["consumer_detail"] if one["name"] == name]
            assert found["num_pending"] + found["num_ack_pending"] == 3


def read_url(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


class TestTls:
    async def test_a_server_that_asks_for_tls_gets_it_by_any_scheme(
        self, connect: Connect, tls_proxy: Proxy, certificates: Path
    ) -> None:
        url = with_certificate(tls_proxy.url, certificates).replace("tls:", "nats:")
        async with connect(broker_url=url) as source:
            assert await publish(source, 1) == await ack_all(source, 1)

    async def test_a_client_that_requires_tls_sends_no_password_without_it(
        self, source_for: Callable[..., NatsBroker], guarded: PrivateNats
    ) -> None:
        with Proxy(url_for(guarded, *ODD_USER)) as proxy:
            with pytest.raises(BrokerRefused, match="offers no TLS"):
                await source_for(broker_url=proxy.url.replace("nats:", "tls:")).__aenter__()
            assert proxy.bytes_to_broker == 0


def with_certificate(url: str, certificates: Path) -> str:
    return (
        f"{url}?cafile={certificates / 'ca.pem'}"
        f"&certfile={certificates / 'client.pem'}&keyfile={certificates / 'client.key'}"
    )
