"""Dead letters when a broker, a client or another command fails, or when they are large: each broker's weak points."""

import asyncio
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from harness.contract import Connect, eventually, opened, take
from harness.servers import Server
from harness.servers.proxy import Proxy
from runtime import consumer
from runtime.brokers import make_source
from runtime.brokers.dead_letters import STEP_BYTES, Selection
from runtime.brokers.requests import to_the_end
from runtime.cancellation import CancellationRequested
from runtime.errors import BrokerRefused, BrokerUnavailable
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings
from steps import publish
from test_letters import last, make_dead, numbers_of

MakeSource = Callable[..., Any]


def on(*brokers: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("broker", brokers, indirect=True, scope="session")


async def collect(steps: AsyncIterator[int], into: list[int]) -> None:
    async for step in steps:
        into.append(step)  # the steps before a failure


# -- Kafka


async def make_dead_in_one_partition(connect: Connect, count: int) -> None:
    """Dead letters whose bodies and ids are their numbers, in this order."""
    async with connect(prefetch=count) as source:
        numbers = range(count)
        await source.publish([OutgoingMessage(b"%d" % n, "", f"id-{n}", key="k") for n in numbers])
        for message in await take(source, count):
            await source.reject(message, "bad")
        await eventually(count, source.count_dead_letters)
        await source.stop()


@on("kafka")
async def test_the_mark_of_a_letter_is_kept_when_a_selection_ends_right_before_it(
    connect: Connect,
) -> None:
    await make_dead_in_one_partition(connect, 6)
    async with connect(prefetch=0) as source:
        assert await last(source.purge_dead_letters(Selection(ids={"id-2"}))) == 1
        assert await last(source.replay_dead_letters(Selection(limit=2))) == 2
        assert await numbers_of(source) == [3, 4, 5]
        assert await source.count_dead_letters() == 3


@on("kafka")
async def test_a_topic_that_a_refresh_of_the_metadata_leaves_out_is_still_written_to(
    connect: Connect, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka requests all topics first, and later only the topics that were unknown when it wrote to them."""
    await make_dead_in_one_partition(connect, 1)
    async with connect(prefetch=0) as source:
        client, accumulator = source._producer.client, source._producer._message_accumulator
        client._topics.clear()
        await client.force_metadata_update()
        client._topics.add(queue)
        add_message = accumulator.add_message

        async def add_after_a_refresh(*arguments: Any, **fields: Any) -> Any:
            monkeypatch.undo()
            await client.force_metadata_update()
            return await add_message(*arguments, **fields)

        monkeypatch.setattr(accumulator, "add_message", add_after_a_refresh)
        assert await last(source.replay_dead_letters(Selection(reason="bad"))) == 1


@on("kafka")
async def test_a_command_unites_its_marks_with_those_of_a_command_that_ends_meanwhile(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_dead_in_one_partition(connect, 9)
    async with connect(prefetch=0) as one, connect(prefetch=0) as other:
        produce = one._produce

        async def produce_later(*arguments: Any) -> None:
            assert await last(other.purge_dead_letters(Selection(ids={"id-5"}))) == 1
            await produce(*arguments)

        monkeypatch.setattr(one, "_produce", produce_later)
        assert await last(one.replay_dead_letters(Selection(ids={"id-7"}))) == 1
        assert await numbers_of(one) == [0, 1, 2, 3, 4, 6, 8]


@on("kafka")
async def test_of_two_commands_that_commit_at_once_one_sees_it_and_unites_the_marks(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiokafka import AIOKafkaConsumer

    await make_dead_in_one_partition(connect, 9)
    before, after, commits = asyncio.Barrier(2), asyncio.Barrier(2), 0
    commit = AIOKafkaConsumer.commit

    async def commit_together(*arguments: Any) -> None:
        nonlocal commits
        commits += 1
        if commits > 2:
            await commit(*arguments)
            return
        await before.wait()
        await commit(*arguments)
        await after.wait()

    async with connect(prefetch=0) as one, connect(prefetch=0) as other:
        monkeypatch.setattr(AIOKafkaConsumer, "commit", commit_together)
        purging = (
            source.purge_dead_letters(Selection(ids={id}))
            for source, id in ((one, "id-5"), (other, "id-7"))
        )
        async with asyncio.timeout(30):
            assert await asyncio.gather(*map(last, purging)) == [1, 1]
        assert await numbers_of(one) == [0, 1, 2, 3, 4, 6, 8]


@on("kafka")
async def test_a_mark_of_a_record_that_the_broker_has_deleted_does_not_count(
    connect: Connect,
) -> None:
    from aiokafka.admin import RecordsToDelete

    await make_dead_in_one_partition(connect, 8)
    async with connect(prefetch=0) as source:
        [letter] = [letter async for letter in source.dead_letters(1)]
        marked = Selection(ids={"id-2", "id-3", "id-4", "id-7"})
        assert await last(source.purge_dead_letters(marked)) == 4
        partition, record = letter.receipt
        async with source._admin() as admin:
            below = RecordsToDelete(record.offset + 6)
            await admin.delete_records({partition.topic_partition: below})
        await eventually(1, source.count_dead_letters)
        assert await numbers_of(source) == [6]


@on("kafka")
@pytest.mark.parametrize(
    ("source", "why"),
    [
        (r"^orders\.[a-z]{1,3}$", r"'3}\$' cannot be the name of a topic"),
        ("orders/eu", "'orders/eu' cannot be the name of a topic"),
        ("^(?P<x>a),^(?P<x>b)", "is not a regular expression: redefinition of group name 'x'"),
        (r"^(a)\1,^(b)\1", r"refers back to a group"),
        ("^(?P<x>a)(?P=x)", "refers back to a group"),
    ],
)
def test_a_pattern_that_would_match_something_else_is_one_sentence(
    settings_for: Callable[..., ConsumerSettings], source: str, why: str
) -> None:
    with pytest.raises(BrokerRefused, match=why) as refused:
        make_source(settings_for(source=source))
    assert str(refused.value).startswith("CONSUMER_SOURCE: ")


# -- NATS


@on("nats")
async def test_a_letter_that_another_command_has_deleted_is_not_counted(connect: Connect) -> None:
    """Behind others and below the first of the stream: the server has another answer for each."""
    await make_dead(connect, 5, lambda n: "bad")
    async with connect(prefetch=0) as one, connect(prefetch=0) as other, one._reading() as reading:
        letters = [letter async for letter in one._present_letters(reading)]
        for number, selection in ((2, Selection(ids={"id-2"})), (3, Selection())):
            assert await last(other.purge_dead_letters(selection)) in (1, 4)
            taking = one._take_letters(reading, letters[number : number + 1], replay=False)
            assert await last(taking) == 0


@on("nats")
async def test_a_letter_that_the_stream_does_not_let_one_delete_is_no_deleted_one(
    connect: Connect,
) -> None:
    await make_dead(connect, 3, lambda n: "bad")
    async with connect(prefetch=0) as source:
        connection = source._reachable()
        config = (await connection.api(f"STREAM.INFO.{source._dead}"))["config"]
        await connection.api(f"STREAM.UPDATE.{source._dead}", **{**config, "deny_delete": True})
        with pytest.raises(BrokerRefused, match="message delete not permitted"):
            await last(source.purge_dead_letters(Selection(ids={"id-1"})))
        assert await source.count_dead_letters() == 3


# -- SQS


@on("sqs")
async def test_a_letter_that_sqs_did_not_delete_is_not_counted_and_stays(connect: Connect) -> None:
    await make_dead(connect, 3, lambda n: "bad")
    async with connect(prefetch=0) as source:

        def spoil(params: dict[str, Any], **_: object) -> None:
            params["Entries"][0]["ReceiptHandle"] = "expired"

        event = "before-parameter-build.sqs.DeleteMessageBatch"
        source._client.meta.events.register(event, spoil)
        steps: list[int] = []
        with pytest.raises(BrokerUnavailable, match="did not delete 1 of 3 dead letters"):
            await collect(source.purge_dead_letters(Selection(reason="bad")), steps)
        assert steps == [2]
        await eventually(1, source.count_dead_letters)
        assert len(await numbers_of(source)) == 1  # visible again at once


@on("sqs")
async def test_after_an_interruption_every_letter_is_visible_again(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "CANCEL_AGAIN_SECONDS", 0.001)
    await make_dead(connect, 200, lambda n: "bad")
    interrupted = asyncio.Event()

    async def read_all(source: Any) -> None:
        async with aclosing(source.dead_letters()) as letters:
            for _ in range(200):
                await anext(letters)
            interrupted.set()
            await asyncio.Event().wait()

    async with connect(prefetch=0) as source:
        with pytest.raises(CancellationRequested):
            await consumer.unless_set(read_all(source), interrupted)
        attributes = await source._attributes(source._dead_url)
        assert attributes["ApproximateNumberOfMessagesNotVisible"] == "0"


@on("sqs")
async def test_a_letter_is_hidden_from_others_until_the_command_ends(
    connect: Connect, shorten: Callable[..., None]
) -> None:
    shorten(1, "LISTING_SECONDS")
    await make_dead(connect, 40, lambda n: "bad")
    async with connect(prefetch=0) as source, connect(prefetch=0) as other:
        async with aclosing(source.dead_letters()) as letters:
            for _ in range(40):
                await anext(letters)
            give_up_at = time.monotonic() + 3
            while time.monotonic() < give_up_at:
                assert not await other._receive(other._dead_url, 10, 1, 1)
        assert len(await other._receive(other._dead_url, 10, 1, 1)) == 10


@on("sqs")
async def test_letters_that_come_again_while_they_are_read_hide_none_of_the_others(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a server that is too slow to hide all of them until they are read."""
    from runtime.brokers import sqs

    hidden: dict[str, str] = {}

    async def hide_no_longer(_: object, those: dict[str, str]) -> None:
        nonlocal hidden
        hidden = those

    await make_dead(connect, 300, lambda n: "bad")
    monkeypatch.setattr(sqs.SqsBroker, "_keep_hidden", hide_no_longer)
    async with connect(prefetch=0) as source, aclosing(source.dead_letters()) as letters:
        numbers = [int((await anext(letters)).body) for _ in range(280)]
        await source._hide(hidden, 0)
        numbers += [int(letter.body) async for letter in letters]
        assert sorted(numbers) == [*range(300)]


# -- RabbitMQ


@on("rabbitmq")
@pytest.mark.parametrize("command", ["purge", "replay"])
async def test_acks_that_the_queue_does_not_get_are_not_counted(
    connect: Connect, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The connection breaks after the command has written the acks."""
    from aiormq.channel import Channel

    await make_dead(connect, 30, lambda n: "bad")
    ack, acked = Channel.basic_ack, 0

    async def ack_into_nothing(channel: Channel, tag: int, **how: Any) -> None:
        nonlocal acked
        if not acked:
            await asyncio.to_thread(proxy.black_hole)
        await ack(channel, tag, **how)
        acked += 1
        if acked == 30:
            await asyncio.to_thread(proxy.cut)

    monkeypatch.setattr(Channel, "basic_ack", ack_into_nothing)
    async with connect(prefetch=0, broker_url=proxy.url) as source:
        steps: list[int] = []
        method = getattr(source, f"{command}_dead_letters")
        with pytest.raises(BrokerUnavailable):
            await collect(method(Selection(reason="bad")), steps)
        assert (steps, acked) == ([], 30)
        await asyncio.to_thread(proxy.resume)
    async with connect(prefetch=0) as source:
        await eventually(30, source.count_dead_letters)


@on("rabbitmq")
async def test_letters_on_their_way_to_a_reading_keep_their_order(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue gets a consumer's end together with its beginning, unless the reading waits for the requested letters.

    Of more than 32 letters that a queue has sent to a consumer before it learns of its end, it keeps no order.
    """
    from aiormq.abc import ChannelFrame
    from aiormq.channel import Channel
    from pamqp.commands import Basic

    from runtime.brokers import rabbitmq

    await make_dead(connect, 60, lambda n: "bad")
    consume, cancel = Channel.basic_consume, Channel.basic_cancel
    arrives = rabbitmq._Reading._arrives
    unsent: list[Basic.Consume] = []

    async def send(channel: Any, *behind: Basic.Cancel) -> None:
        frames = [*unsent, *behind]
        unsent.clear()
        frame = ChannelFrame.marshall(channel_number=channel.number, frames=frames)
        await channel.write_queue.put(frame)

    async def consume_later(channel: Any, queue: str, callback: Any, *, consumer_tag: str) -> None:
        if not consumer_tag.startswith("00001-"):  # the first consumer shows how large letters are
            await consume(channel, queue, callback, consumer_tag=consumer_tag)
            return
        channel.consumers[consumer_tag] = callback
        unsent.append(Basic.Consume(queue=queue, consumer_tag=consumer_tag, nowait=True))

    async def cancel_at_once(channel: Any, consumer_tag: str) -> None:
        if unsent:
            await send(channel, Basic.Cancel(consumer_tag=consumer_tag, nowait=True))
        else:
            await cancel(channel, consumer_tag)

    async def send_and_wait(reading: Any) -> bool:
        if unsent:
            await send(reading.channel)
        return await arrives(reading)

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "basic_consume", consume_later)
        patch.setattr(Channel, "basic_cancel", cancel_at_once)
        patch.setattr(rabbitmq._Reading, "_arrives", send_and_wait)
        async with connect(prefetch=0) as source:
            assert [int(letter.body) async for letter in source.dead_letters(1)] == [0]
    async with connect(prefetch=0) as source:
        await eventually(60, source.count_dead_letters)
        assert await numbers_of(source) == list(range(60))


@on("rabbitmq")
@pytest.mark.parametrize("command", ["purge", "replay"])
async def test_letters_are_acked_while_there_is_no_consumer(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """For each ack the queue would deliver another letter, which loses its place if the consumer ends before it arrives."""
    from aiormq.channel import Channel

    await make_dead(connect, 150, lambda n: "bad")
    ack, consumers = Channel.basic_ack, list[int]()

    async def count_consumers(channel: Channel, tag: int, **how: Any) -> None:
        consumers.append(len(channel.consumers))
        await ack(channel, tag, **how)

    monkeypatch.setattr(Channel, "basic_ack", count_consumers)
    async with connect(prefetch=0) as source:
        await collect(getattr(source, f"{command}_dead_letters")(Selection(reason="bad")), [])
    assert consumers == [0] * 150


class SlowProxy(Proxy):
    """The broker's bytes arrive this many seconds later."""

    seconds = 0.0

    async def _pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.seconds)
        await super()._pass_on(data, writer)


@on("rabbitmq")
async def test_each_request_of_a_step_has_its_own_time_however_long_all_of_them_take(
    connect: Connect,
    broker: Server,
    monkeypatch: pytest.MonkeyPatch,
    shorten: Callable[..., None],
) -> None:
    """A busy machine, where the letters on their way alone take seconds."""
    from runtime.brokers import rabbitmq

    await make_dead(connect, 3, lambda n: "bad")
    shorten(1, "ANSWER_SECONDS")
    monkeypatch.setattr(rabbitmq.RabbitBroker, "dead_letters_at_once", 1)
    with SlowProxy(broker.url) as proxy:
        async with connect(prefetch=0, broker_url=proxy.url) as source:
            steps = source.purge_dead_letters(Selection(reason="bad", limit=2))
            async with aclosing(steps):
                assert await anext(steps) == 1
                proxy.seconds = 0.25
                assert await anext(steps) == 2
                proxy.seconds = 0.0


async def test_what_must_reach_its_end_does_though_it_is_cancelled_again_and_again() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        for _ in range(100):
            await asyncio.sleep(0.001)
        ended = True

    task = asyncio.create_task(to_the_end(work(), 10))
    while not task.done():
        await asyncio.sleep(0.001)
        task.cancel()
    assert ended
    assert task.cancelled()


async def test_what_must_reach_its_end_has_a_bound() -> None:
    with pytest.raises(TimeoutError):
        await to_the_end(asyncio.Event().wait(), 0.01)


@on("rabbitmq")
async def test_what_a_command_has_read_is_back_when_it_ends(connect: Connect) -> None:
    """Otherwise the next command, one click later on a page, would find none of them."""
    await make_dead(connect, 250, lambda n: "bad")
    async with connect(prefetch=0) as source:
        for _ in range(3):
            assert [int(letter.body) async for letter in source.dead_letters(150)] == [*range(150)]
            assert await source.count_dead_letters() == 250


# -- Large letters, many letters


@on("rabbitmq", "redis", "postgres", "sqlite")
async def test_large_letters_are_read_a_few_at_a_time(connect: Connect) -> None:
    count, body = 48, b"x" * 10**6
    async with connect(prefetch=10) as source:
        for _ in range(count):
            await source.publish([OutgoingMessage(body, "large")])
            (message,) = await take(source, 1)
            await source.reject(message, "bad")
        del message
        await source.stop()
    async with connect(prefetch=0) as source:
        await eventually(count, source.count_dead_letters)
        for limit, most in ((1, 2 * STEP_BYTES), (count, 4 * STEP_BYTES)):
            tracemalloc.start()
            try:
                number = 0
                async for _ in source.dead_letters(limit):
                    number += 1
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert number == limit
            assert peak < most
        await source.delete()


@on("postgres", "sqlite")
async def test_small_letters_are_read_many_at_a_time(
    connect: Connect, broker_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_dead(connect, 300, lambda n: "bad")
    async with connect(prefetch=0) as source:
        method = "_rows" if broker_name == "postgres" else "_call"
        request, requests = getattr(source, method), 0

        async def count(*arguments: Any) -> Any:
            nonlocal requests
            requests += 1
            return await request(*arguments)

        monkeypatch.setattr(source, method, count)
        assert await numbers_of(source) == list(range(300))
        assert requests <= 20


# -- Several sources


@on("sqlite", "rabbitmq")
async def test_a_limit_takes_the_oldest_of_all_sources(
    connect: Connect, source_for: MakeSource, queue: str
) -> None:
    names = [f"{queue}.{name}" for name in "ab"]
    try:
        for place in (1, 0, 1):
            async with opened(source_for(source=names[place])) as one:
                await one.start()
                await publish(one, 1, type=f"of {place}")
                (message,) = await take(one, 1)
                await one.reject(message, "bad")
                rejected_at = time.time()
                await one.stop()
            await asyncio.sleep(max(0, rejected_at + 0.002 - time.time()))  # it has milliseconds
        async with connect(prefetch=0, source=",".join(names)) as source:
            await eventually(3, source.count_dead_letters)
            types = [letter.type async for letter in source.dead_letters()]
            assert types == ["of 1", "of 0", "of 1"]
            assert await last(source.purge_dead_letters(Selection(limit=1))) == 1
            await eventually(2, source.count_dead_letters)
            assert [letter.type async for letter in source.dead_letters()] == types[1:]
    finally:
        for name in names:
            async with source_for(source=name) as one:
                await one.delete()
