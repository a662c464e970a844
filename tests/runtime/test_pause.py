"""While a dependency is down, the service pauses: no attempt is counted, and one message at a time is tried."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from structlog.testing import capture_logs

from consumer_harness import AT_ONCE, ConsumerHarness, Number, numbers
from facts import LEASE_SECONDS
from harness.contract import WAIT_SECONDS, opened
from harness.servers import Server
from runtime import pause as pause_module
from runtime.brokers import make_source
from runtime.brokers.buffer import Buffer
from runtime.brokers.delivery import MadeUpId, value_reader
from runtime.cancellation import CancellationEvent
from runtime.consumer import FACTOR, LEAST, Consumer
from runtime.handlers import HandlerFunction, Handles, Router
from runtime.message import Failed, Message, OutgoingMessage, Pause, Reject, Retry
from runtime.ordering import Gate, OrderedBuffer
from runtime.probes import why_not_ready
from runtime.settings import ConsumerSettings
from runtime.suspects import Suspects
from runtime.telemetry import queue_seconds
from steps import over_the_network, start_once, with_options

embedded = pytest.mark.parametrize("broker", ["sqlite"], indirect=True, scope="session")
"""For tests in which the broker makes no difference."""
RETRIES_FIRST = ("sqlite", "postgres", "redis")
"""They deliver due retries before other messages."""
MESSAGES = 12
AT_ONCE_SECONDS = 5.0
"""The time limit of a shutdown whose service would pause for a minute."""


class Dependency:
    """An HTTP server that can go away; and the calls of the handlers that need it."""

    def __init__(self) -> None:
        self.server: asyncio.Server | None = None
        self.port = 0
        self.calls: list[tuple[float, str, int]] = []
        """For each call its begin, the message's id and its attempt."""
        self.most_at_once = self.at_once = 0
        self.answered_at: list[float] = []

    async def up(self) -> None:
        self.server = await asyncio.start_server(self._answer, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        if self.server is not None:
            self.server.close()
            await self.server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def handle(self, body: bytes, message: Message) -> None:
        self.calls.append((time.monotonic(), message.id, message.attempt))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert b"200" in await reader.readline()
            writer.close()
            self.answered_at.append(time.monotonic())
        finally:
            self.at_once -= 1


@pytest.fixture
async def dependency() -> AsyncIterator[Dependency]:
    dependency = Dependency()
    await dependency.up()
    yield dependency
    await dependency.down()


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause of a minute takes 0.2 seconds."""
    monkeypatch.setattr(pause_module, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(pause_module, "LONGEST_SECONDS", 0.2)


@asynccontextmanager
async def running(
    settings: ConsumerSettings, handler: HandlerFunction, **handlers: HandlerFunction
) -> AsyncIterator[Consumer]:
    """A consumer; leaving the context shuts it down gracefully, at once."""
    event = CancellationEvent(asyncio.get_running_loop())
    source = make_source(settings, settings.prefetch or MESSAGES)
    consumer = Consumer(source, Router({"a": handler, **handlers}), event, settings)
    consuming = asyncio.create_task(consumer.run())
    try:
        yield consumer
    finally:
        asked_at = time.monotonic()
        event.set("test")
        assert await consuming == 0
        assert time.monotonic() - asked_at < AT_ONCE_SECONDS


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110  # nothing tells when it changes
            await asyncio.sleep(0.005)


async def publish(settings: ConsumerSettings, count: int = MESSAGES) -> None:
    await start_once(settings)
    async with opened(make_source(settings)) as source:
        await source.publish([OutgoingMessage(b"{}", "a") for _ in range(count)])


def events(logs: list[Any], name: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == name]


# -- on every broker


async def test_an_outage_of_a_dependency_makes_no_dead_letter_and_counts_no_attempt_in_the_pause(
    settings_for: Callable[..., ConsumerSettings], dependency: Dependency, compressed: None
) -> None:
    """Each message has two attempts: hundreds of probes would dead-letter all of them."""
    settings = settings_for(
        concurrency=3, breaker_failures=4, max_attempts=2, retry_seconds=0.1, retry_max_seconds=0.4
    )
    await dependency.down()
    await publish(settings)
    with capture_logs() as logs:
        async with running(settings, dependency.handle) as consumer:
            await until(lambda: consumer.breaker.reason)
            assert why_not_ready(consumer) == ""
            await until(lambda: dependency.at_once == 0)  # the in-flight messages
            dependency.most_at_once, calls = 0, len(dependency.calls)
            await until(lambda: len(events(logs, "paused")) >= 15)
            assert dependency.most_at_once == 1
            tried = Counter(message_id for _, message_id, _ in dependency.calls[calls:])
            assert len(tried) > 1, "a message that fails must not be the only one that is tried"
            await dependency.up()
            await until(lambda: consumer.handled_count == MESSAGES)
            resumed_after = dependency.calls[-1][0] - dependency.answered_at[0]
            assert resumed_after < 1 + MESSAGES * 0.05
            assert consumer.breaker.reason == ""
    assert consumer.rejected_count == 0
    counted = [entry for entry in events(logs, "message_retried") if "paused" not in entry]
    assert len(counted) == 2 * settings.concurrency - 1  # the last of six began the pause
    [resumed] = events(logs, "resumed")
    assert resumed["seconds"] > 1
    seconds = [entry["seconds"] for entry in events(logs, "paused")]
    assert seconds[:4] == pytest.approx([0.02, 0.04, 0.08, 0.16], abs=0.005)
    assert max(seconds) <= 0.2


async def test_a_shutdown_in_a_pause_ends_at_once_and_the_next_process_has_the_first_attempt(
    settings_for: Callable[..., ConsumerSettings],
) -> None:
    async def handle(body: bytes) -> None:
        raise Pause(60, "maintenance until noon")

    settings = settings_for(concurrency=3)
    await publish(settings)
    with capture_logs() as logs:
        async with running(settings, handle) as consumer:
            await until(lambda: consumer.breaker.reason and not consumer.in_flight)
    [paused] = events(logs, "paused")
    assert (paused["reason"], round(paused["seconds"])) == ("maintenance until noon", 60)
    assert 1 <= consumer.telemetry.outcomes["a", "retried"] <= consumer.settings.concurrency
    attempts = []

    async def succeed(body: bytes, message: Message) -> None:
        attempts.append(message.attempt)

    async with running(settings, succeed) as consumer:
        await until(lambda: consumer.handled_count == MESSAGES)
    assert attempts == [1] * MESSAGES


async def test_no_lease_expires_in_a_pause(
    settings_for: Callable[..., ConsumerSettings], broker: Server, broker_name: str
) -> None:
    """Another consumer of the same queue gets none of the messages in the first consumer's buffer."""
    if (lease_seconds := LEASE_SECONDS.get(broker_name)) is None:
        pytest.skip("this broker has no lease: it requeues when a connection ends")

    async def handle(body: bytes, message: Message) -> None:
        raise Pause(60)

    url = with_options(broker.url, broker.lease_option)
    settings = settings_for(broker_url=url, concurrency=1)
    await publish(settings)
    async with running(settings, handle) as consumer:
        await until(lambda: consumer.breaker.reason and not consumer.in_flight)
        async with opened(make_source(settings, MESSAGES)) as other:
            await other.start()  # it may get messages that the first consumer has not requested
            await asyncio.sleep(2.5 * lease_seconds)
            held = {message.id for message in consumer.source.unacked}
            assert held
            assert held.isdisjoint(message.id for message in other.unacked)
            await other.stop()


@over_the_network
async def test_an_outage_of_the_broker_in_a_pause_ends_with_it(
    settings_for: Callable[..., ConsumerSettings], proxy: Any, broker: Server
) -> None:
    """Its deliveries are lost meanwhile: the probe is the first delivery that is still valid."""
    url = with_options(proxy.url, broker.lease_option)  # the answer with a delivery may be lost
    settings = settings_for(broker_url=url, concurrency=2)
    await publish(settings)
    failures = [Pause(1, "down"), Pause(1, "down")]

    async def handle(body: bytes) -> None:
        if failures:
            raise failures.pop()

    async with running(settings, handle) as consumer:
        await until(lambda: consumer.breaker.reason and not consumer.in_flight)
        proxy.cut()
        await until(lambda: not consumer.breaker.reason)
        await until(
            lambda: len(consumer.source.unacked) == 0 and consumer.handled_count >= MESSAGES
        )


async def test_more_poison_messages_than_the_prefetch_do_not_keep_it_paused(
    settings_for: Callable[..., ConsumerSettings], compressed: None
) -> None:
    """They leave the buffer to other messages; each becomes a dead letter by its attempts."""
    settings = settings_for(
        concurrency=2, breaker_failures=10, max_attempts=2, retry_seconds=0.05, retry_max_seconds=2
    )
    if not make_source(settings).capabilities.delayed_retry:
        pytest.skip("this broker delays no retry: failed messages stay in the buffer")
    poison, good = MESSAGES + 3, OutgoingMessage(b"good", "a")

    async def handle(body: bytes) -> None:
        if body == b"poison":
            raise RuntimeError

    await start_once(settings)
    with capture_logs() as logs:
        async with opened(make_source(settings)) as publisher:
            await publisher.publish([OutgoingMessage(b"poison", "a") for _ in range(poison)])
            async with running(settings, handle) as consumer:
                await until(lambda: consumer.breaker.reason)
                async with asyncio.timeout(3 * WAIT_SECONDS):
                    while consumer.rejected_count < poison or consumer.breaker.reason:
                        await publisher.publish([OutgoingMessage(good.body, "a")])
                        await asyncio.sleep(0.05)
    assert consumer.handled_count > 0
    rejected = [entry["attempt"] for entry in events(logs, "message_rejected")]
    assert rejected == [2] * poison


@embedded
async def test_a_pause_that_has_passed_before_its_timer_is_set_ends(
    settings_for: Callable[..., ConsumerSettings],
    compressed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the process is stopped for a moment, or whoever reads its log is slow."""
    settings = settings_for(concurrency=2, retry_seconds=0.05)
    warning = pause_module.log.warning

    def slow(*arguments: Any, **fields: Any) -> None:
        warning(*arguments, **fields)
        time.sleep(2 * pause_module.LONGEST_SECONDS)

    monkeypatch.setattr(pause_module.log, "warning", slow, raising=False)
    await publish(settings)
    failing = iter([True] * 12)

    async def handle(body: bytes) -> None:
        if next(failing, False):
            raise RuntimeError

    async with running(settings, handle) as consumer:
        await until(lambda: consumer.handled_count == MESSAGES)


@pytest.mark.parametrize("broker", RETRIES_FIRST, indirect=True, scope="session")
@pytest.mark.parametrize("prefetch", [MESSAGES, 1])
async def test_poison_messages_that_come_back_before_others_do_not_keep_it_paused(
    settings_for: Callable[..., ConsumerSettings], prefetch: int, compressed: None
) -> None:
    """More than fit in the buffer and in the ten pauses of the longest delay; also with a buffer of just one."""
    settings = settings_for(
        concurrency=min(2, prefetch),
        prefetch=prefetch,
        max_attempts=100,
        retry_seconds=0.05,
        retry_max_seconds=2,
    )
    poison = [OutgoingMessage(b"poison", "a") for _ in range(12 + min(14, prefetch**2))]

    async def handle(body: bytes) -> None:
        if body == b"poison":
            raise RuntimeError

    await start_once(settings)
    async with opened(make_source(settings)) as source:
        await source.publish([*poison, *[OutgoingMessage(b"good", "a") for _ in range(3)]])
    async with running(settings, handle) as consumer:
        await until(lambda: consumer.breaker.reason)
        async with asyncio.timeout(3 * WAIT_SECONDS):
            while consumer.handled_count < 3:  # noqa: ASYNC110  # nothing tells when it changes
                await asyncio.sleep(0.01)
    assert consumer.rejected_count == 0


# -- what trips it


async def fail_with(error: BaseException) -> None:
    raise error


@embedded
async def test_poison_messages_among_healthy_ones_never_trip_it(harness: ConsumerHarness) -> None:
    """They fail much more often than the breaker allows failures in a row."""

    async def handle(event: Number) -> None:
        if event.number in (7, 8):
            raise ValueError
        await asyncio.sleep(0.02)

    await harness.run(
        numbers(60), lambda c: c.handled_count == 58, handlers={"n": handle}, prefetch=1,
        concurrency=1, breaker_failures=6, max_attempts=100, retry_seconds=0.05, retry_max_seconds=0.05,
    )  # fmt: skip
    assert len(harness.events("message_retried")) > 6
    assert harness.events("paused") == []


@embedded
async def test_one_message_that_fails_alone_is_no_outage(harness: ConsumerHarness) -> None:
    """It becomes a dead letter after its attempts: a pause would try it without end."""
    await harness.run(
        numbers(1), lambda c: c.rejected_count == 1,
        handlers={"n": broken},
        concurrency=1, breaker_failures=1, max_attempts=12, **AT_ONCE,
    )  # fmt: skip
    assert harness.events("paused") == []


async def broken(event: Number) -> None:
    raise RuntimeError


@embedded
async def test_zero_disables_it_but_not_pause(harness: ConsumerHarness) -> None:
    _, consumer = await harness.run(
        numbers(5), lambda c: c.rejected_count == 5, handlers={"n": broken},
        concurrency=1, breaker_failures=0, max_attempts=5, **AT_ONCE,
    )  # fmt: skip
    assert harness.events("paused") == []
    assert not consumer.breaker._failures, "of what is never asked, nothing is remembered"


@embedded
async def test_a_message_without_an_id_that_fails_alone_is_no_outage(
    settings_for: Callable[..., ConsumerSettings],
) -> None:
    settings = settings_for(concurrency=1)
    event = CancellationEvent(asyncio.get_running_loop())
    consumer = Consumer(make_source(settings, 1), Router({"a": broken}), event, settings)
    for number in range(20):
        message = Message(b"the same", MadeUpId(str(number)))
        consumer.breaker.judge([message], {message: RuntimeError()})
    assert consumer.breaker.reason == ""


@embedded
@pytest.mark.parametrize(("failures", "concurrency", "most"), [(10, 2, 10), (10, 8, 16), (1, 1, 2)])
async def test_a_pause_takes_as_many_failures_as_set_and_at_least_twice_the_concurrency(
    harness: ConsumerHarness, failures: int, concurrency: int, most: int
) -> None:
    await harness.run(
        numbers(20), lambda c: bool(c.breaker.reason), handlers={"n": broken},
        concurrency=concurrency, breaker_failures=failures, prefetch=20,
    )  # fmt: skip
    counted = [entry for entry in harness.events("message_retried") if "paused" not in entry]
    assert len(counted) == most - 1
    assert (
        harness.events("paused")[0]["reason"] == f"{most} failures in a row, last with RuntimeError"
    )


@embedded
@pytest.mark.parametrize("decision", [Reject("no"), Retry("later", delay_seconds=60)])
async def test_what_a_handler_decides_about_one_message_is_no_failure(
    harness: ConsumerHarness, decision: Exception
) -> None:
    async def handle(event: Number) -> None:
        await fail_with(decision)

    await harness.run(
        numbers(30), lambda c: sum(c.telemetry.outcomes.values()) == 30, handlers={"n": handle},
        concurrency=1, breaker_failures=2,
    )  # fmt: skip
    assert harness.events("paused") == []


# -- the probe


@embedded
async def test_a_refused_probe_is_followed_by_the_next_message_at_once(
    harness: ConsumerHarness, compressed: None
) -> None:
    async def handle(event: Number) -> None:
        if event.number == 0 and not harness.events("paused"):
            raise Pause(0.1)

    bodies = [*numbers(1), b"not json", b"nor this", *numbers(2)]
    _, consumer = await harness.run(
        bodies, lambda c: c.handled_count == 3, handlers={"n": handle}, concurrency=1
    )
    assert (consumer.rejected_count, consumer.breaker.reason) == (2, "")


@embedded
@pytest.mark.parametrize("probe", ["handled", "rejected"])
async def test_a_pause_that_a_later_message_asks_for_outlasts_the_probe(
    harness: ConsumerHarness, compressed: None, probe: str
) -> None:
    """A message that was in flight before asks for it: the probe's result does not end the requested pause."""
    calls: list[float] = []
    slow, waits = asyncio.Event(), asyncio.Event()
    began: list[float] = []

    async def handle(event: Number) -> None:
        if event.number == 0 and not began:
            began.append(time.monotonic())
            await waits.wait()
            raise Pause(0.05)
        if event.number == 1 and not slow.is_set():
            waits.set()
            await slow.wait()
            raise Pause(0.5)
        slow.set()
        calls.append(time.monotonic())
        await asyncio.sleep(0.1)
        if probe == "rejected" and len(calls) == 1:
            raise Reject

    await harness.run(
        numbers(3),
        lambda c: c.handled_count + c.rejected_count == 3,
        handlers={"n": handle},
        concurrency=2,
    )
    assert calls[1] - calls[0] > 0.45
    [resumed] = harness.events("resumed")
    assert resumed["seconds"] >= 0.5


@embedded
async def test_a_batch_pauses_as_a_whole_and_is_probed_by_one_message(
    harness: ConsumerHarness, compressed: None
) -> None:
    sizes: list[int] = []

    async def handle(events: list[Number]) -> None:
        sizes.append(len(events))
        if len(sizes) < 4:
            raise Pause(0.05, "down")

    await harness.run(
        numbers(10), lambda c: c.handled_count == 10, handlers={"n": handle},
        concurrency=2, batch_size=5, batch_seconds=0.1, max_attempts=1,
    )  # fmt: skip
    assert 1 in sizes
    assert (harness.left, sum(sizes[3:])) == ((0, 0), 10)


@embedded
async def test_one_message_of_a_batch_can_ask_for_a_pause(
    harness: ConsumerHarness, compressed: None
) -> None:
    async def handle(events: list[Number], messages: list[Message]) -> list[Failed]:
        if harness.events("paused"):
            return []
        return [Failed(messages[-1], Pause(0.05, "the last one"))]

    await harness.run(
        numbers(5), lambda c: c.handled_count == 5, handlers={"n": handle},
        batch_size=5, max_attempts=1,
    )  # fmt: skip
    assert (len(harness.events("resumed")), harness.left) == (1, (0, 0))


@embedded
async def test_with_order_by_key_a_pause_changes_no_order(
    harness: ConsumerHarness, compressed: None
) -> None:
    order: list[int] = []
    failures = iter([True, True, False, True, *[False] * 100])

    async def handle(event: Number, message: Message) -> None:
        if next(failures):
            raise Pause(0.03)
        order.append(event.number)

    bodies = [b'{"number": %d, "key": %d}' % (number, number % 2) for number in range(10)]
    await harness.run(
        bodies, lambda c: c.handled_count == 10, handlers={"n": handle}, order_by="body:key",
        concurrency=3,
    )  # fmt: skip
    for key in (0, 1):
        assert [one for one in order if one % 2 == key] == list(range(key, 10, 2))


@embedded
async def test_suspects_wait_for_the_end_of_a_pause_too(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch, compressed: None
) -> None:
    calls: list[float] = []

    async def handle(event: Number) -> None:
        calls.append(time.monotonic())
        if len(calls) < 4:
            raise Pause(0.1)

    def all_are_suspects(consumer: Consumer) -> None:
        consumer.source.suspects.many = 0

    await harness.run(
        numbers(5), lambda c: c.handled_count == 5, handlers={"n": handle}, before=all_are_suspects
    )
    assert all(later - earlier > 0.09 for earlier, later in pairwise(calls[:4]))
    assert harness.left == (0, 0)


@pytest.mark.parametrize("seconds", [-1, float("nan"), 0])
def test_a_pause_has_seconds(seconds: float) -> None:
    assert Pause(seconds).seconds == 0
    with pytest.raises(ValueError, match="Pause: a delay of 1e"):
        Pause(1e7)


# -- its parts


@embedded
async def test_between_two_probes_each_message_is_passed_over_once_at_most(
    settings_for: Callable[..., ConsumerSettings], compressed: None
) -> None:
    """Even if they come back fast, one of them is tried."""
    source = make_source(settings := settings_for())
    breaker = pause_module.Breaker(source, settings, lambda *_: None)
    failed = [Message(b"", f"id-{number}") for number in range(3)]
    breaker.judge(failed[:1], {failed[0]: Pause(1)})
    for message in failed:
        breaker.keep(message, stays=False)
    source.buffer.put(Message(b""))
    for _ in failed:
        with pytest.raises(pause_module.Passed):
            breaker.pass_over(failed[0])
    breaker.pass_over(failed[0])
    breaker.pass_over(Message(b"", "another"))


@embedded
async def test_where_all_that_wait_were_tried_none_is_passed_over(
    settings_for: Callable[..., ConsumerSettings], compressed: None
) -> None:
    """Otherwise each probe would cost all of them another delay, up to CONSUMER_RETRY_MAX_SECONDS."""
    source = make_source(settings := settings_for(), 3)
    breaker = pause_module.Breaker(source, settings, lambda *_: None)
    first, second, another = (Message(b"", name, source=source) for name in ("a", "b", "c"))
    breaker.judge([first], {first: Pause(1)})
    for message in (first, second):
        breaker.keep(message, stays=False)
    source.buffer.put(second)
    breaker.pass_over(first)
    source.buffer.put(another)
    with pytest.raises(pause_module.Passed):
        breaker.pass_over(first)


@embedded
async def test_a_message_that_only_waited_for_its_pause_is_not_passed_over(
    settings_for: Callable[..., ConsumerSettings], compressed: None
) -> None:
    """It is in the buffer, in the order of its key."""
    source = make_source(settings := settings_for())
    breaker = pause_module.Breaker(source, settings, lambda *_: None)
    message = Message(b"", "id")
    breaker.judge([message], {message: Pause(1)})
    breaker.keep(message, stays=True)
    source.buffer.put(Message(b""))
    breaker.pass_over(message)


def test_a_message_that_is_put_back_stays_before_the_others_of_its_key() -> None:
    buffer = OrderedBuffer(Gate(value_reader("header:key", 1000)))
    first, second, other = (Message(b"", id, headers={"key": id[0]}) for id in ("a1", "a2", "b1"))
    for message in (first, second, other):
        buffer.put(message)

    def take() -> Message:
        with pytest.raises(StopIteration) as stop:
            buffer.get().send(None)
        taken = stop.value.value
        assert isinstance(taken, Message)
        return taken

    assert take() is first
    buffer.put_back(first)
    assert [take(), take()] == [other, first]
    assert buffer.take_all() == [second]


def test_with_both_gates_another_message_of_the_handler_follows_one_that_is_put_back() -> None:
    keys = Gate(value_reader("header:key", 1000))
    buffer = OrderedBuffer(keys, Gate(lambda message: "n", {"n": 1}))
    first, same_key, other = (Message(b"", id, headers={"key": id[0]}) for id in ("a1", "a2", "b1"))
    for message in (first, same_key, other):
        buffer.put(message)
    assert list(buffer.takeable) == [first]
    buffer._here.pop(buffer.takeable.popleft())
    buffer.put_back(first)
    assert list(buffer.takeable) == [other]


async def test_a_buffer_that_is_held_gives_nothing_and_wakes_all_when_it_is_released() -> None:
    buffer = Buffer()
    taking = [asyncio.create_task(buffer.get()) for _ in range(3)]
    await asyncio.sleep(0)
    buffer.hold()
    messages = [Message(b"") for _ in range(3)]
    for message in messages:
        buffer.put(message)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(task.done() for task in taking)
    buffer.release()
    assert set(await asyncio.gather(*taking)) == set(messages)


def test_the_default_schedule_spans_more_than_an_hour() -> None:
    settings = ConsumerSettings.model_construct()
    delays = [
        min(settings.retry_seconds * FACTOR**step, settings.retry_max_seconds)
        for step in range(settings.max_attempts - 1)
    ]
    assert LEAST * sum(delays) > 3600
    assert (settings.max_attempts, settings.retry_max_seconds) == (12, 600)


@embedded
@pytest.mark.parametrize("suspect", [False, True])
async def test_what_a_broker_does_not_let_one_hold_is_requeued_in_a_long_pause(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch, suspect: bool
) -> None:
    """Also suspects that wait for another suspect."""

    def hold_briefly(consumer: Consumer) -> None:
        monkeypatch.setattr(type(consumer.source), "longest_hold_seconds", 0.1)
        consumer.source.suspects.many = 0 if suspect else 10
        suspects.append(consumer.source.suspects)

    suspects: list[Suspects] = []

    async def handle(event: Number) -> None:
        while suspect and len(suspects[0].waiting) < 4:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.005)
        raise Pause(60)

    await harness.run(
        numbers(5), lambda c: c.source.requeued_count >= 10 and not c.source.suspects.waiting,
        handlers={"n": handle}, before=hold_briefly, concurrency=2 if suspect else 1,
    )  # fmt: skip
    assert harness.left == (5, 0)
    assert len(harness.events("message_retried")) == 1


@embedded
@pytest.mark.parametrize("is_released", [True, False])
async def test_a_suspect_that_the_broker_takes_back_while_it_waits_is_not_handled_and_keeps_no_room(
    harness: ConsumerHarness, is_released: bool
) -> None:
    """Some sources release it when the broker reports that; if leases end by time, the worker that takes it does."""
    called, sources, taken_back = [], [], set[Message]()

    def all_are_suspects(consumer: Consumer) -> None:
        consumer.source.suspects.many = 0
        consumer.source._lost_because = lambda message: "late" * (message in taken_back)  # type: ignore[method-assign]
        sources.append(consumer.source)

    async def handle(event: Number) -> None:
        called.append(event.number)
        while len(sources[0].suspects.waiting) < 2:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.005)
        for waiting in sources[0].suspects.waiting:
            taken_back.add(waiting)
            if is_released:
                sources[0]._release(waiting)

    _, consumer = await harness.run(
        numbers(3), lambda c: c.handled_count > 0 and not (c.source.suspects.waiting or c.source.unacked),
        handlers={"n": handle}, before=all_are_suspects, concurrency=2,
    )  # fmt: skip
    assert called == [0]
    assert consumer.source.requeued_count == 0


@embedded
async def test_a_suspect_whose_beginning_the_broker_stores_at_the_signal_is_requeued(
    harness: ConsumerHarness,
) -> None:
    called, storing = [], asyncio.Event()

    def one_is_a_suspect(consumer: Consumer) -> None:
        async def store(message: Message) -> None:
            storing.set()
            await consumer.event.wait()

        consumer.source.suspects.many = 0
        consumer.source.begin_alone = store  # type: ignore[method-assign]

    async def handle(event: Number) -> None:
        called.append(event.number)

    exit_code, consumer = await harness.run(
        numbers(1), lambda _: storing.is_set(), handlers={"n": handle}, before=one_is_a_suspect
    )
    assert (exit_code, called, harness.left) == (0, [], (1, 0))
    assert consumer.source.requeued_count == 1


@embedded
async def test_the_time_until_the_first_attempt_is_observed_once(
    harness: ConsumerHarness, compressed: None
) -> None:
    observed: list[float] = []
    failures = [Pause(0.02), RuntimeError(), Pause(0.02)]

    def observe(consumer: Consumer) -> None:
        consumer.telemetry.handling = lambda _, messages: observed.extend(  # type: ignore[method-assign, assignment]
            seconds for one in messages if (seconds := queue_seconds(one)) is not None
        )

    async def handle(event: Number) -> None:
        if failures:
            await fail_with(failures.pop())

    await harness.run(
        numbers(1),
        lambda c: c.handled_count == 1,
        handlers={"n": handle},
        before=observe,
        **AT_ONCE,
    )
    assert len(observed) == 1


@embedded
@pytest.mark.parametrize("failure", [Pause(5), Retry()], ids=["Pause", "Retry"])
async def test_what_a_handler_gives_up_on_shutdown_is_requeued_and_not_finished(
    harness: ConsumerHarness, failure: Exception
) -> None:
    async def handle(event: Number, message: Message) -> None:
        await message.stopping.wait()
        await fail_with(failure)

    _, consumer = await harness.run(
        numbers(3), lambda c: len(c.in_flight) == 3, handlers={"n": handle}, concurrency=3
    )
    assert consumer.at_signal == (3, 0, 0)
    assert consumer.counts() == (0, 0, 3)


@pytest.mark.parametrize("broker", ["kafka"], indirect=True, scope="session")
@pytest.mark.parametrize("suspect", [False, True])
async def test_a_rebalance_waits_for_no_message_that_only_waits(
    settings_for: Callable[..., ConsumerSettings], suspect: bool
) -> None:
    settings, going = settings_for(concurrency=2), asyncio.Event()

    async def handle(body: bytes) -> None:
        await going.wait()
        raise Pause(60)

    await publish(settings)
    async with running(settings, handle) as consumer:
        consumer.source.suspects.many = 0 if suspect else 100
        await until(lambda: len(consumer.source.unacked) == MESSAGES and consumer.in_flight)
        with capture_logs() as logs:
            giving_up = asyncio.create_task(consumer.source._give_up_partitions())  # type: ignore[attr-defined]
            await asyncio.sleep(0)
            going.set()
            await giving_up
        [revoked] = events(logs, "partitions_revoked")
        assert revoked["in_flight"] == 0


@embedded
async def test_a_handler_with_a_concurrency_of_its_own_tries_another_message_each_time(
    harness: ConsumerHarness, compressed: None
) -> None:
    tried: list[int] = []

    async def handle(event: Number) -> None:
        tried.append(event.number)
        if len(tried) < 4:
            raise Pause(0.02)

    handlers: dict[str, Any] = {"n": Handles(handle, concurrency=1)}
    await harness.run(numbers(4), lambda c: c.handled_count == 4, handlers=handlers)
    assert tried[:4] == [0, 1, 2, 3]


@embedded
async def test_what_a_handler_rejects_on_is_no_failure(harness: ConsumerHarness) -> None:
    handlers: dict[str, Any] = {"n": Handles(broken, reject_on=(RuntimeError,))}
    await harness.run(
        numbers(10), lambda c: c.rejected_count == 10, handlers=handlers,
        concurrency=1, breaker_failures=2,
    )  # fmt: skip
    assert harness.events("paused") == []
