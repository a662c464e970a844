"""One service on two queues (streams, topics) of one broker, on each broker: ``CONSUMER_SOURCE=orders,payments``."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from consumer_harness import consume
from harness.contract import Connect, eventually, opened, take
from harness.scene import Scene, assert_clean_shutdown, wait_until
from harness.servers import Server
from processes import MISBEHAVING
from runtime import limits
from runtime.brokers import make_source
from runtime.brokers.several import Several
from runtime.brokers.source import Broker
from runtime.brokers.sqlite import SqliteBroker
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.errors import BrokerRefused, BrokerUnavailable
from runtime.handlers import Router
from runtime.message import Message, OutgoingMessage
from runtime.probes import why_not_live, why_not_ready
from runtime.settings import ConsumerSettings
from runtime.telemetry import Telemetry
from steps import ack, ids, last, publish, start_once

MakeSource = Callable[..., Broker]
SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": 0.2, "group": "several"}

HANDLER_SECONDS = 0.005


@pytest.fixture
def queues(broker: Server, queue: str) -> Iterator[tuple[str, str]]:
    other = f"{queue}-b"
    yield queue, other
    broker.delete(other)


@pytest.fixture
async def both(queues: tuple[str, str], source_for: MakeSource) -> str:
    """The queues for CONSUMER_SOURCE; each broker retains the messages that are published to them."""
    await start_once(source_for(source=",".join(queues)).settings)
    return ",".join(queues)


@pytest.fixture
async def published(
    both: str, queues: tuple[str, str], source_for: MakeSource
) -> Callable[..., Any]:
    async def publish_to(place: int, count: int) -> list[str]:
        async with opened(source_for(source=queues[place])) as one:
            return await publish(one, count)

    return publish_to


async def nothing(body: bytes) -> None:
    """A handler."""


def by_source(messages: list[Message]) -> Counter[Any]:
    return Counter(message.origin["source"] for message in messages)


async def test_both_are_consumed_and_a_message_says_from_which_it_came(
    connect: Connect, both: str, queues: tuple[str, str], published: Any, source_for: MakeSource
) -> None:
    sent = await published(0, 3) + await published(1, 2)
    async with connect(source=both) as source:
        messages = await take(source, 5)
        assert sorted(ids(messages)) == sorted(sent)
        assert by_source(messages) == {queues[0]: 3, queues[1]: 2}
        await ack(source, messages)
        await source.stop()
    if source.capabilities.queue_metrics:
        async with source_for(source=both) as source:
            described = await source.describe()
            assert [described[queue] for queue in queues] == [0, 0]


async def test_a_long_backlog_of_one_does_not_delay_the_other(
    connect: Connect, both: str, queues: tuple[str, str], published: Any
) -> None:
    """The handlers take their time: otherwise 900 messages may be taken before the other queue has its turn."""
    await published(0, 1000)
    await published(1, 5)
    async with connect(source=both, prefetch=4) as source:
        before = 0
        for _ in range(5):
            while True:
                [message] = await take(source, 1)
                await asyncio.sleep(HANDLER_SECONDS)
                await source.ack(message)
                if message.origin["source"] == queues[1]:
                    break
                before += 1
        await source.stop()
    assert before < 750


@pytest.mark.parametrize("broker", ["nats"], indirect=True, scope="session")
async def test_a_backlog_of_one_does_not_delay_the_other_when_half_of_its_prefetch_does_not_fit(
    connect: Connect, both: str, queues: tuple[str, str], published: Any
) -> None:
    """In memory: a source requests few messages until it knows how large they are."""
    await published(0, 500)
    await published(1, 20)
    async with connect(source=both, prefetch=100) as source:
        taken = await take(source, 20)
        while by_source(taken)[queues[1]] < 20:
            await ack(source, taken[-1:])
            taken += await take(source, 1)
        await ack(source, taken[:19])
        await source.stop()
    assert len(taken) < 250


async def test_all_together_have_the_prefetch_that_is_set(
    settings_for: Callable[..., ConsumerSettings], both: str, published: Any
) -> None:
    await published(0, 9)
    await published(1, 9)
    settings = settings_for(source=both, prefetch=5, group=SETTINGS["group"])
    async with opened(make_source(settings, 5)) as source:
        await source.start()
        messages = await take(source, 5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await anext(source)
        await ack(source, messages)
        await source.stop()


async def test_shutdown_requeues_from_both(
    connect: Connect, both: str, queues: tuple[str, str], published: Any
) -> None:
    sent = await published(0, 4) + await published(1, 4)
    async with connect(source=both) as source:
        first = await take(source, 1)

        async def buffered() -> set[Any]:
            return {message.origin["source"] for message in source.buffer.takeable}

        await eventually({*queues}, buffered)
        await source.stop()
        await ack(source, first)
        with pytest.raises(StopAsyncIteration):
            await anext(source)
        assert sum(one.requeued_count for one in source.parts) >= 2
    async with connect(source=both) as source:
        rest = await take(source, 7)
        assert sorted(ids([*first, *rest])) == sorted(sent)
        await ack(source, rest)
        await source.stop()


async def test_a_retry_and_a_dead_letter_return_to_their_own(
    connect: Connect, both: str, queues: tuple[str, str], published: Any, source_for: MakeSource
) -> None:
    await published(0, 1)
    await published(1, 1)
    async with connect(source=both) as source:
        for message in await take(source, 2):
            await source.retry(message, 0.1, "again")
        again = await take(source, 2)
        assert by_source(again) == {queues[0]: 1, queues[1]: 1}
        assert {message.attempt for message in again} == {2}
        for message in again:
            await source.reject(message, f"of {message.origin['source']}")
        await source.stop()
    if not source.capabilities.dead_letters:
        return
    for queue in queues:
        async with source_for(source=queue) as one:
            [letter] = [letter async for letter in one.dead_letters(10)]
            assert letter.reason == f"of {queue}"
    async with source_for(source=both) as source:
        assert await source.count_dead_letters() == 2
        assert len([letter async for letter in source.dead_letters(1)]) == 1
        assert await last(source.replay_dead_letters()) == 2
        await source.start()
        replayed = await take(source, 2)
        assert by_source(replayed) == {queues[0]: 1, queues[1]: 1}
        await ack(source, replayed)
        await source.stop()


async def test_an_equal_message_of_the_other_is_another_message(
    connect: Connect, both: str, queues: tuple[str, str], source_for: MakeSource
) -> None:
    async with connect(source=both) as source:
        in_flight: list[Message] = []
        source.in_flight = in_flight
        for queue in queues:
            async with opened(source_for(source=queue)) as one:
                await publish(one, 1, id="equal", type="equal")
            in_flight += await take(source, 1)
        assert by_source(in_flight) == dict.fromkeys(queues, 1)
        await ack(source, in_flight)
        await source.stop()


def test_one_signal_drains_both(broker: Server, queues: tuple[str, str], tmp_path: Path) -> None:
    with Scene(broker, ",".join(queues), tmp_path, MISBEHAVING) as scene:
        process = scene.start(concurrency=2)
        for place, queue in enumerate(queues):
            tasks = [f"{place}-{number}" for number in range(10)]
            bodies = [json.dumps({"id": task, "seconds": 0.3}).encode() for task in tasks]
            settings = scene.settings.model_copy(update={"source": queue, "group": scene.queue})
            asyncio.run(_publish(settings, bodies))
            scene.published += tasks
        wait_until(lambda: {i[0] for i in scene.ledger.started} == {"0", "1"})
        assert_clean_shutdown(process)
        rest = scene.start(concurrency=10)
        wait_until(lambda: set(scene.ledger.ended) >= set(scene.published))
        assert_clean_shutdown(rest)
        assert Counter(scene.ledger.ended) == Counter(scene.published)


async def _publish(settings: ConsumerSettings, bodies: list[bytes]) -> None:
    async with opened(make_source(settings)) as source:
        await source.publish([OutgoingMessage(body, "work") for body in bodies])


# -- each source, where the embedded broker is enough

embedded = pytest.mark.parametrize("broker", ["sqlite"], indirect=True, scope="session")


@embedded
async def test_an_outage_of_one_is_one_of_the_service_and_names_it(
    settings_for: Callable[..., ConsumerSettings], both: str, queues: tuple[str, str]
) -> None:
    settings = settings_for(source=both)
    async with opened(make_source(settings)) as source:
        assert isinstance(source, Several)
        await source.start()
        consumer = Consumer(
            source,
            Router({"any": nothing}),
            CancellationEvent(asyncio.get_running_loop()),
            settings,
        )
        consumer.state = "consuming"
        assert source.connected
        assert why_not_ready(consumer) == ""
        source.sources[1].connectivity.lost(BrokerUnavailable("no answer"))
        assert not source.connected
        assert why_not_ready(consumer) == f"{queues[1]}: the broker cannot be reached: no answer"
        assert (
            sum(
                reading.value
                for reading in Telemetry().readings(consumer)
                if reading.name == "reconnects"
            )
            == 1
        )
        source.sources[1].connectivity.established()
        assert why_not_ready(consumer) == ""
        await source.stop()


@embedded
async def test_a_start_that_fails_for_one_leaves_none_open_and_is_repeated(
    settings_for: Callable[..., ConsumerSettings], both: str, queues: tuple[str, str]
) -> None:
    failures, made = [BrokerUnavailable("not yet")], []

    class Late(SqliteBroker):
        async def __aenter__(self) -> Self:
            if self.settings.source == queues[1] and failures:
                raise failures.pop()
            return await super().__aenter__()

    def make(settings: ConsumerSettings, prefetch: int) -> Broker:
        made.append(Late(settings, prefetch))
        return made[-1]

    source = Several(settings_for(source=both), make, 2)
    with pytest.raises(BrokerUnavailable, match="not yet"):
        await source.__aenter__()
    assert not any(one.connected for one in made)
    async with opened(source):
        await source.start()
        await source.publish([OutgoingMessage(b"1")])
        [message] = await take(source, 1)
        assert message.origin == {"source": queues[0]}  # `publish` publishes to the first
        await source.ack(message)
        await source.stop()


@embedded
async def test_order_by_key_holds_across_both(
    connect: Connect, both: str, queues: tuple[str, str], source_for: MakeSource
) -> None:
    for queue in queues:
        async with opened(source_for(source=queue)) as one:
            await publish(one, 1, key="7")
    async with connect(source=both, order_by="key") as source:
        [first] = await take(source, 1)

        async def buffered() -> int:
            return len(source.buffer)

        await eventually(1, buffered)
        assert not source.buffer.takeable
        await source.ack(first)
        [second] = await take(source, 1)
        assert {first.origin["source"], second.origin["source"]} == {*queues}
        await source.ack(second)
        await source.stop()


async def test_a_pattern_is_one_sentence_where_the_broker_has_none(
    broker_name: str, settings_for: Callable[..., ConsumerSettings]
) -> None:
    wrong = "^orders[" if broker_name == "kafka" else "^orders"
    why = "is not a regular expression" if broker_name == "kafka" else "CONSUMER_SOURCE: '.orders"
    with pytest.raises(BrokerRefused, match=why):
        make_source(settings_for(source=f"payments,{wrong}"))


@pytest.mark.parametrize("separator", [",", ", ", " "])
async def test_two_kinds_of_brokers_are_one_sentence(
    settings_for: Callable[..., ConsumerSettings], separator: str
) -> None:
    url = settings_for().broker_url.get_secret_value()
    for other in ("amqp://me:hush@host", "kafka://host:9092"):
        with pytest.raises(BrokerRefused, match="names one broker: for two kinds") as refusal:
            make_source(settings_for(broker_url=f"{url}{separator}{other}"))
        assert "hush" not in str(refusal.value)


# -- Kafka's patterns


@pytest.mark.parametrize("broker", ["kafka"], indirect=True, scope="session")
async def test_a_pattern_reads_topics_also_those_of_later_but_no_retries_of_anybody(
    connect: Connect,
    broker: Server,
    queue: str,
    source_for: MakeSource,
    shorten: Callable[..., None],
) -> None:
    shorten(1, "DISCOVER_SECONDS")
    names = [f"{queue}.eu", f"{queue}.us", f"{queue}.eu.other.retry", f"{queue}x"]
    try:
        for name in names[:1] + names[2:]:
            async with opened(source_for(source=name)) as one:
                await publish(one, 1)
        pattern = rf"^{queue}\..*"
        async with connect(source=pattern) as source:
            [message] = await take(source, 1)
            assert message.origin["topic"] == message.origin["source"] == names[0]
            await source.retry(message, 0.1, "again")
            [again] = await take(source, 1)
            assert (again.attempt, again.origin["topic"]) == (2, names[0])
            await source.reject(again, "unwanted")
            async with opened(source_for(source=names[1])) as one:
                await publish(one, 1)
            [later] = await take(source, 1)
            assert later.origin["topic"] == names[1]
            await source.ack(later)
            await source.stop()
        async with source_for(source=pattern) as source:
            described = await source.describe()
            assert described["several.dead"] == 1
            assert [described[name] for name in names[:2]] == [0, 0]
            assert {*described} & {*names[2:]} == set()
            assert await last(source.purge_dead_letters()) == 1
    finally:
        for name in (*names, "several"):
            broker.delete(name)


@embedded
async def test_it_is_not_live_when_lost_calls_hold_the_whole_prefetch_of_one(
    settings_for: Callable[..., ConsumerSettings],
    both: str,
    published: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "SWALLOWED_SECONDS", 0.1)
    ending = asyncio.Event()

    async def swallow(body: bytes) -> None:
        while not ending.is_set():
            with suppress(asyncio.CancelledError):
                await ending.wait()

    def until(consumer: Consumer) -> bool:
        if why_not_live(consumer):
            ending.set()
        return consumer.handled_count == 3

    await published(0, 3)
    settings = settings_for(source=both, concurrency=20, prefetch=4, handler_seconds=0.1)
    consumer = await consume(make_source(settings, 4), settings, until, {"any": swallow})
    assert consumer.source.parts[0].prefetch == 2
