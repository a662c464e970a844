"""CONSUMER_ORDER_BY: messages with equal keys one after the other, in the order of delivery, others meanwhile."""

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from pydantic import BaseModel

from consumer_harness import ConsumerHarness
from harness.servers import Server
from runtime.brokers import make_source
from runtime.brokers.buffer import Buffer
from runtime.brokers.delivery import value_reader
from runtime.consumer import Consumer
from runtime.message import HandlerContext, Message
from runtime.ordering import Gate, OrderedBuffer
from runtime.settings import ConsumerSettings
from steps import start_once

on_one_broker = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)


class Step(BaseModel):
    """The n-th step of one key."""

    key: str
    number: int


Steps = list[tuple[str, int]]


def bodies(steps: Iterable[tuple[str, int]]) -> list[bytes]:
    return [json.dumps({"key": key, "number": number}).encode() for key, number in steps]


def by_key(steps: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    numbers = defaultdict(list)
    for key, number in steps:
        numbers[key].append(number)
    return dict(numbers)


class Log:
    """The steps that a source delivered, the steps that began and ended, and those that overlapped."""

    def __init__(self) -> None:
        self.delivered: Steps = []
        self.ended: Steps = []
        self.running: list[str] = []
        self.most_running = 0
        self.overlaps: list[str] = []

    def watch(self, consumer: Consumer) -> None:
        buffer = consumer.source.buffer
        put = buffer.put

        def put_and_note(message: Message) -> None:
            step = Step.model_validate_json(message.body)
            self.delivered.append((step.key, step.number))
            put(message)

        buffer.put = put_and_note  # type: ignore[method-assign]

    async def handle(self, step: Step) -> None:
        await self.work(step, 0)

    async def work(self, step: Step, yields: int) -> None:
        if step.key in self.running:
            self.overlaps.append(step.key)
        self.running.append(step.key)
        self.most_running = max(self.most_running, len(self.running))
        for _ in range(yields):
            await asyncio.sleep(0)
        self.running.remove(step.key)
        self.ended.append((step.key, step.number))


@pytest.fixture
async def harness(
    broker: Server, queue: str, settings_for: Callable[..., ConsumerSettings]
) -> ConsumerHarness:
    await start_once(settings_for())
    return ConsumerHarness(broker, queue, settings_for)


# -- the key


@pytest.mark.parametrize(
    ("order_by", "message", "key"),
    [
        ("key", Message(b"", key="7"), "7"),
        ("key", Message(b""), None),
        ("header:customer-id", Message(b"", headers={"customer-id": "7"}), "7"),
        ("header:customer-id", Message(b"", headers={"customer-id": 7}), "7"),
        ("header:customer-id", Message(b"", headers={"customer-id": b"7"}), "b'7'"),
        ("header:customer-id", Message(b"", headers={"customer-id": [7]}), "[7]"),
        ("header:customer-id", Message(b"", headers={"customer-id": None}), None),
        ("header:customer-id", Message(b""), None),
        ("header:a:b", Message(b"", headers={"a:b": "7"}), "7"),
        ("body:customer.id", Message(b'{"customer": {"id": 7}}'), "7"),
        ("body:customer.id", Message(b'{"customer": {"id": "7"}}'), "7"),
        ("body:customer.id", Message(b'{"customer": {"id": 1, "id": 7}}'), "7"),
        ("body:customer.id", Message(b'{"customer": 7}'), None),
        ("body:customer.id", Message(b'{"customer": {"id": null}}'), None),
        ("body:customer.id", Message(b"[7]"), None),
        ("body:customer.id", Message(b"not JSON"), None),
        ("body:customer.id", Message(b"\xff\xfe"), None),
        ("body:id", Message(b'{"id": NaN}'), "nan"),
        ("body:id", Message(b'{"id": ' + b"[" * 100_000), None),
        ("body:id", Message(b'{"id": ' + b"[" * 150 + b"]" * 150 + b"}"), "[" * 150 + "]" * 150),
        ("body:id", Message(b'{"id": "\\ud800"}'), None),
    ],
)
def test_the_key_of_a_message(order_by: str, message: Message, key: str | None) -> None:
    assert Gate(value_reader(order_by)).key_of(message) == key


@pytest.mark.parametrize("digits", [4_000, 5_000, 100_000])
def test_a_number_that_is_too_long_for_a_text_is_no_error(digits: int) -> None:
    key = Gate(value_reader("body:id")).key_of(Message(b'{"id": ' + b"7" * digits + b"}"))
    assert key in (None, "7" * digits)


# -- the buffer


def message(key: str, number: int = 0) -> Message:
    return Message(b"", id=f"{key}{number}", headers={"key": key} if key != "-" else {})


def ordered_buffer() -> OrderedBuffer:
    return OrderedBuffer(Gate(value_reader("header:key")))


async def test_one_message_of_a_key_is_in_flight_at_a_time_and_others_pass() -> None:
    buffer = ordered_buffer()
    for key, number in [("a", 0), ("a", 1), ("a", 2), ("-", 3), ("b", 4), ("-", 5)]:
        buffer.put(message(key, number))
    taken = [await buffer.get() for _ in range(4)]
    assert [m.id for m in taken] == ["a0", "-3", "b4", "-5"]
    assert (len(buffer), len(buffer.takeable)) == (2, 0)
    for each in taken:
        buffer.settled(each)
    assert (await buffer.get()).id == "a1"


async def test_the_end_of_one_wakes_a_worker_for_the_next() -> None:
    buffer = ordered_buffer()
    buffer.put(message("a", 0))
    first = await buffer.get()
    waiting = asyncio.create_task(buffer.get())
    buffer.put(message("a", 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    buffer.settled(first)
    assert (await waiting).id == "a1"


async def test_keys_take_turns() -> None:
    buffer = ordered_buffer()
    for key, number in [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("c", 0)]:
        buffer.put(message(key, number))
    order = []
    for _ in range(6):
        taken = await buffer.get()
        order.append(taken.id)
        buffer.settled(taken)
    assert order == ["a0", "b0", "c0", "a1", "b1", "a2"]


async def test_take_all_keeps_the_order_of_delivery_and_in_flight_keys_stay_in_flight() -> None:
    buffer = ordered_buffer()
    for key, number in [("a", 0), ("b", 0), ("a", 1), ("-", 0), ("b", 1), ("a", 2)]:
        buffer.put(message(key, number))
    in_flight = await buffer.get()
    assert [m.id for m in buffer.take_all()] == ["b0", "a1", "-0", "b1", "a2"]
    assert (len(buffer), len(buffer.takeable)) == (0, 0)
    for again in (message("a", 1), message("b", 0)):  # like after an outage
        buffer.put(again)
    assert (await buffer.get()).id == "b0"
    assert not buffer.takeable
    buffer.settled(in_flight)
    assert (await buffer.get()).id == "a1"


async def test_no_state_is_kept_of_settled_keys() -> None:
    buffer = ordered_buffer()
    for number in range(100):
        buffer.put(message(f"key-{number % 10}", number))
    while len(buffer):
        taken = await buffer.get()
        buffer.settled(taken)
        buffer.settled(taken)
    [gate] = buffer.gates
    assert [*gate._queues, *gate._passed, *gate._counts, *buffer._here] == []


async def test_at_random_the_order_of_each_key_is_kept() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(50):
        buffer, put = ordered_buffer(), 0
        taken: Steps = []
        out: list[Message] = []
        while put < 60 or len(buffer) or out:
            action = chance.choice(["put", "get", "done", "take all"])
            if action == "put" and put < 60:
                buffer.put(message(chance.choice("abc-"), put))
                put += 1
            elif action == "get" and buffer.takeable:
                out.append(await buffer.get())
                taken.append((out[-1].id[0], int(out[-1].id[1:])))
                keys = [m.id[0] for m in out if m.id[0] != "-"]
                assert len(keys) == len(set(keys))
            elif action == "done" and out:
                buffer.settled(out.pop(chance.randrange(len(out))))
            elif action == "take all" and chance.random() < 0.1:
                for back in buffer.take_all():
                    buffer.put(back)
        assert sorted(number for _, number in taken) == list(range(60))
        assert all(numbers == sorted(numbers) for numbers in by_key(taken).values())


# -- the service


async def test_equal_keys_are_handled_in_the_order_of_delivery_and_different_ones_overlap(
    harness: ConsumerHarness,
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    published = [(chance.choice("aaabcd"), number) for number in range(60)]
    log = Log()

    async def handle(step: Step) -> None:
        await log.work(step, chance.randrange(1, 10))

    _, consumer = await harness.run(
        bodies(published),
        lambda c: c.handled_count == 60,
        handlers={"step": handle},
        before=log.watch,
        order_by="body:key",
        concurrency=4,
        prefetch=40,
    )
    assert consumer.handled_count == 60
    assert by_key(log.ended) == by_key(log.delivered)
    assert log.overlaps == []
    assert log.most_running > 1
    if consumer.source.capabilities.order:
        assert by_key(log.ended) == by_key(published)


@on_one_broker
async def test_a_suspect_that_waits_for_another_occupies_no_worker_and_keeps_its_place(
    harness: ConsumerHarness,
) -> None:
    log, other_done = Log(), asyncio.Event()

    def watch(consumer: Consumer) -> None:
        put = consumer.source.buffer.put

        def suspect_and_put(message: Message) -> None:
            step = Step.model_validate_json(message.body)
            message.deliveries = 2 if step.key != "b" and step.number == 0 else 1
            put(message)

        consumer.source.buffer.put = suspect_and_put  # type: ignore[method-assign]

    async def handle(step: Step) -> None:
        if step.key == "hangs":
            await other_done.wait()
        await log.handle(step)
        if step.key == "b":
            other_done.set()

    await harness.run(
        bodies([("hangs", 0), ("a", 0), ("a", 1), ("b", 0)]),
        lambda c: c.handled_count == 4,
        handlers={"step": handle},
        before=watch,
        order_by="body:key",
        concurrency=2,
        prefetch=10,
        max_deliveries=3,
    )
    assert log.ended == [("b", 0), ("hangs", 0), ("a", 0), ("a", 1)]


async def test_messages_that_wait_for_their_key_occupy_no_worker(harness: ConsumerHarness) -> None:
    steps = [*(("a", number) for number in range(20)), *(("b", number) for number in range(5))]
    log, others_done = Log(), asyncio.Event()

    async def handle(step: Step) -> None:
        if step.key == "a":
            await others_done.wait()
        await log.handle(step)
        if len(log.ended) == 5:
            others_done.set()

    await harness.run(
        bodies(steps),
        lambda c: c.handled_count == 25,
        handlers={"step": handle},
        order_by="body:key",
        concurrency=2,
        prefetch=40,
    )
    assert sorted(log.ended) == sorted(steps)
    assert {key for key, _ in log.ended[:5]} == {"b"}


@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "at the deadline"])
async def test_a_shutdown_requeues_messages_that_wait_for_their_key_and_the_next_process_continues_in_order(
    harness: ConsumerHarness, in_time: bool
) -> None:
    steps = [(key, number) for number in range(6) for key in "ab"]
    stopped, continued = Log(), Log()

    async def handle_until_stopped(step: Step, message: Message) -> None:
        await message.stopping.wait()
        if not in_time:
            await asyncio.Event().wait()
        await stopped.handle(step)

    settings: dict[str, Any] = {"order_by": "body:key", "concurrency": 4, "prefetch": 12}
    exit_code, consumer = await harness.run(
        bodies(steps),
        lambda c: len(c.in_flight) == 2 and len(c.source.buffer) == 10,
        handlers={"step": handle_until_stopped},
        drain_seconds=20 if in_time else 0,
        **settings,
    )
    done = 2 if in_time else 0
    assert exit_code == (0 if in_time else 75)
    assert (consumer.handled_count, consumer.source.requeued_count) == (done, 12 - done)
    assert harness.events("draining")[0]["in_flight"] == 2
    assert len(harness.events("message_abandoned")) == 2 - done
    await harness.run(
        [],
        lambda _: {*stopped.ended, *continued.ended} == {*steps},  # none is lost
        handlers={"step": continued.handle},
        before=continued.watch,
        **settings,
    )
    delivered = by_key(continued.delivered)
    for key, numbers in by_key(continued.ended).items():
        assert numbers == delivered[key][: len(numbers)]
    ended = [*stopped.ended, *continued.ended]
    capabilities = consumer.source.capabilities
    if capabilities.requeue:
        assert len(ended) == len(steps)  # none is handled twice
    if capabilities.order and in_time:
        assert by_key(ended) == by_key(steps)


@pytest.mark.parametrize(
    "broker",
    ["nats", "redis", "kafka", "postgres", "mqtt", "sqlite"],
    indirect=True,
    scope="session",
)
async def test_a_shutdown_in_a_long_queue_keeps_its_order(harness: ConsumerHarness) -> None:
    """Also for messages on their way to the process. RabbitMQ and SQS decide their order themselves."""
    steps = [("abc"[number % 3], number) for number in range(300)]
    stopped, continued = Log(), Log()
    settings: dict[str, Any] = {"order_by": "body:key", "concurrency": 4, "prefetch": 100}

    async def handle(step: Step) -> None:
        await stopped.work(step, 5)

    _, consumer = await harness.run(
        bodies(steps),
        lambda c: len(stopped.ended) >= 20 and len(c.source.buffer) >= 20,
        key="one partition",
        handlers={"step": handle},
        **settings,
    )
    assert consumer.source.requeued_count >= 20
    await harness.run(
        [],
        lambda _: {*stopped.ended, *continued.ended} == {*steps},
        handlers={"step": continued.handle},
        **settings,
    )
    ended = [*stopped.ended, *continued.ended]
    assert by_key(dict.fromkeys(ended)) == by_key(steps)
    assert len(ended) == len(steps)  # none is handled twice


@on_one_broker
async def test_at_the_deadline_the_embedded_broker_keeps_the_place_of_in_flight_messages(
    harness: ConsumerHarness,
) -> None:
    log = Log()

    async def never(step: Step) -> None:
        await asyncio.Event().wait()

    steps = [("a", number) for number in range(4)]
    await harness.run(
        bodies(steps),
        lambda c: len(c.in_flight) == 1 and len(c.source.buffer) == 3,
        handlers={"step": never},
        drain_seconds=0,
        order_by="body:key",
    )
    await harness.run(
        [], lambda c: c.handled_count == 4, handlers={"step": log.handle}, order_by="body:key"
    )
    assert log.ended == steps


@on_one_broker
async def test_a_reject_frees_its_key_and_a_retry_lets_later_messages_pass(
    harness: ConsumerHarness,
) -> None:
    log = Log()

    async def handle(step: Step, message: Message) -> None:
        if step.number == 0 and message.attempt == 1:
            raise RuntimeError
        await log.handle(step)

    invalid = json.dumps({"key": "a", "number": "first"}).encode()
    await harness.run(
        [invalid, *bodies([("a", 0), ("a", 1), ("a", 2)]), invalid],
        lambda c: c.handled_count == 3 and c.rejected_count == 2,
        handlers={"step": handle},
        order_by="body:key",
        retry_seconds=0.05,
    )
    assert log.ended == [("a", 1), ("a", 2), ("a", 0)]
    assert harness.left == (0, 2)


@on_one_broker
async def test_a_batch_has_one_message_of_each_key_at_most(harness: ConsumerHarness) -> None:
    batches: list[Steps] = []

    async def handle(steps: list[Step]) -> None:
        await asyncio.sleep(0)
        batches.append([(step.key, step.number) for step in steps])

    steps = [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("a", 2), ("b", 1)]
    await harness.run(
        bodies(steps),
        lambda c: c.handled_count == 6,
        handlers={"step": handle},
        order_by="body:key",
        batch_size=3,
        batch_seconds=0.02,
    )
    assert all(len({key for key, _ in batch}) == len(batch) for batch in batches)
    assert by_key(step for batch in batches for step in batch) == by_key(steps)


@on_one_broker
async def test_without_the_setting_no_key_is_read(harness: ConsumerHarness) -> None:
    assert type(make_source(harness.make_settings()).buffer) is Buffer


async def test_after_a_shutdown_has_begun_no_worker_takes_the_next_message_of_a_settled_key() -> (
    None
):
    buffer = OrderedBuffer(Gate(lambda _: "key"))
    first, second = Message(b"1"), Message(b"2")
    buffer.put(first)
    buffer.put(second)
    first.context = HandlerContext(asyncio.Event())
    assert await buffer.get() is first
    first.context.event.set()
    buffer.settled(first)
    assert not buffer.takeable
    assert buffer.take_all() == [second]
