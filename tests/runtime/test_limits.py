"""The limits of handlers: the time limit, the report of a stuck service, and `Handles` for one handler."""

import asyncio
import json
import math
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from consumer_harness import AT_ONCE, ConsumerHarness, Number, consume, numbers
from harness.contract import opened
from harness.process import ask
from harness.scene import AT_ONCE_SECONDS, Scene, wait_until
from harness.servers import Server
from harness.servers.local import free_port
from processes import MISBEHAVING
from runtime import limits, pause
from runtime.brokers import make_source
from runtime.brokers import source as source_module
from runtime.consumer import Consumer
from runtime.errors import ExitCode, HandlerError
from runtime.handlers import HandlerFunction, Handles, Router
from runtime.message import Message, OutgoingMessage, Pause, Reject, Retry
from runtime.probes import why_not_live
from runtime.service import prefetch_of
from runtime.settings import ConsumerSettings
from steps import scene_needs, start_once

on_one_broker = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
LIMIT = 0.1
RELEASE = threading.Event()
PAST_IT = "TimeoutError: the handler took longer than its time limit of 0.1 s"


@pytest.fixture(autouse=True)
def _swallowed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SWALLOWED_SECONDS", 0.1)


async def hang(event: Number) -> None:
    await asyncio.Event().wait()


# -- the time limit of coroutines


async def test_on_every_broker_a_handler_past_its_limit_is_retried_and_then_a_dead_letter(
    settings_for: Callable[..., ConsumerSettings],
) -> None:
    settings = settings_for(handler_seconds=LIMIT, max_attempts=2, **AT_ONCE)
    await start_once(settings)
    attempts: list[int] = []

    async def handle(event: Number, message: Message) -> None:
        if event.number == 0:
            attempts.append(message.attempt)
            await hang(event)

    source = make_source(settings, 10)
    async with opened(make_source(settings)) as publisher:
        await publisher.publish([OutgoingMessage(body, "n") for body in numbers(5)])
    consumer = await consume(
        source, settings, lambda c: c.handled_count + c.rejected_count == 5, {"n": handle}
    )
    assert (consumer.handled_count, consumer.rejected_count) == (4, 1)
    assert attempts == [1, 2]
    if source.capabilities.dead_letters:
        async with opened(make_source(settings)) as reader:
            [letter] = [letter async for letter in reader.dead_letters(20)]
        assert letter.reason == f"failed 2 times, last with {PAST_IT}"


async def hang_once(event: Number, message: Message) -> None:
    if message.attempt == 1:
        await asyncio.Event().wait()


async def swallow_and_return(event: Number, message: Message) -> None:
    with suppress(asyncio.CancelledError):
        await hang_once(event, message)


async def return_a_result(event: Number, message: Message) -> OutgoingMessage:
    await swallow_and_return(event, message)
    return OutgoingMessage(b"", to="queue:elsewhere") if message.attempt == 1 else None  # type: ignore[return-value]


async def take_it_back(event: Number, message: Message) -> None:
    try:
        await hang_once(event, message)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()


async def in_a_task_group(event: Number, message: Message) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(hang_once(event, message))


async def in_a_timeout(event: Number, message: Message) -> None:
    async with asyncio.timeout(60):
        await hang_once(event, message)


async def batch(events: list[Number], messages: list[Message]) -> None:
    await hang_once(events[0], messages[0])


@on_one_broker
@pytest.mark.parametrize(
    "handle",
    [hang_once, swallow_and_return, return_a_result, take_it_back, in_a_task_group, in_a_timeout, batch],
    ids=lambda handle: handle.__name__,
)  # fmt: skip
async def test_the_message_is_retried_with_the_reason_however_the_handler_takes_its_cancellation(
    harness: ConsumerHarness, handle: HandlerFunction
) -> None:
    failures: list[object] = []

    def before(consumer: Consumer) -> None:
        consumer.telemetry.handled = lambda handling, failure: failures.append(type(failure))  # type: ignore[method-assign]

    exit_code, consumer = await harness.run(
        numbers(3),
        lambda c: c.handled_count == 3,
        handlers={"n": handle},
        before=before,
        handler_seconds=LIMIT,
        batch_seconds=0.01,
        concurrency=1,
        **AT_ONCE,
    )
    assert (exit_code, consumer.handled_count, harness.left) == (0, 3, (0, 0))
    retried = harness.events("message_retried")
    assert {(e["attempt"], e["reason"]) for e in retried} == {(1, PAST_IT)}
    assert len(retried) == 3
    assert {*failures} == {TimeoutError, type(None)}  # the labels of the metrics
    assert not harness.events("handler_overrun")


@on_one_broker
async def test_the_log_shows_where_the_handler_was(harness: ConsumerHarness) -> None:
    await harness.run(
        numbers(1), lambda c: c.rejected_count == 1, handlers={"n": hang},
        handler_seconds=LIMIT, max_attempts=1,
    )  # fmt: skip
    [rejected] = harness.events("message_rejected")
    cause = rejected["exc_info"].__cause__
    assert "in hang\n" in "".join(traceback.format_exception(cause))


@on_one_broker
async def test_what_the_handler_raises_when_it_is_cancelled_is_the_reason(
    harness: ConsumerHarness,
) -> None:
    async def handle(event: Number) -> None:
        try:
            await hang(event)
        except asyncio.CancelledError:
            raise Reject("half of it is done") from None

    await harness.run(
        numbers(2), lambda c: c.rejected_count == 2, handlers={"n": handle},
        handler_seconds=LIMIT, concurrency=1,
    )  # fmt: skip
    assert [e["reason"] for e in harness.events("message_rejected")] == ["half of it is done"] * 2


@on_one_broker
async def test_0_disables_the_limit_and_each_handler_may_have_its_own(
    harness: ConsumerHarness,
) -> None:
    ended: list[str] = []

    async def handle(event: Number, message: Message) -> None:
        await asyncio.sleep(3 * LIMIT)
        ended.append(message.type)

    def ends(consumer: Consumer) -> bool:
        return consumer.handled_count + len(harness.events("message_retried")) == 1

    own = Handles(handle, seconds=LIMIT)
    retried: list[bool] = []
    for handler, seconds in ((handle, 0), (own, 0), (Handles(handle, seconds=0), LIMIT)):
        retry: dict[str, Any] = {"retry_seconds": 60, "retry_max_seconds": 60}
        await harness.run(
            numbers(1), ends, handlers={"n": handler}, handler_seconds=seconds, **retry
        )
        retried.append(bool(harness.events("message_retried")))
    assert retried == [False, True, False]


@on_one_broker
async def test_a_shorter_limit_is_kept_while_a_longer_one_runs(harness: ConsumerHarness) -> None:
    """All limits share one timer."""
    order: list[str] = []

    async def handle(event: Number, message: Message) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            order.append(message.type)

    handlers = {
        "long": Handles(handle, seconds=3 * LIMIT, max_attempts=1),
        "short": Handles(handle, seconds=LIMIT, max_attempts=1),
    }
    source_settings = harness.make_settings()
    async with opened(make_source(source_settings)) as publisher:
        await publisher.publish([OutgoingMessage(numbers(1)[0], "long")])
    await harness.run(
        numbers(1), lambda c: c.rejected_count == 2, message_type="short", handlers=handlers
    )
    assert order == ["short", "long"]


@on_one_broker
async def test_seconds_left_is_that_of_the_time_limit_or_of_the_shutdown(
    harness: ConsumerHarness,
) -> None:
    seen: list[float] = []

    async def handle(event: Number, message: Message) -> None:
        seen.append(message.seconds_left())

    for handler_seconds in (7, 0):
        await harness.run(
            numbers(1), lambda c: c.handled_count == 1, handlers={"n": handle},
            handler_seconds=handler_seconds, drain_seconds=17,
        )  # fmt: skip
    assert 6 < seen[0] <= 7
    assert seen[1] == 17


@on_one_broker
async def test_a_limit_in_the_drain_is_a_retry_and_not_an_abandoned_message(
    harness: ConsumerHarness,
) -> None:
    exit_code, consumer = await harness.run(
        numbers(1), lambda c: bool(c.in_flight), handlers={"n": hang},
        handler_seconds=0.5, drain_seconds=20,
    )  # fmt: skip
    assert (exit_code, len(consumer.abandoned)) == (ExitCode.DRAINED, 0)
    assert [e["attempt"] for e in harness.events("message_retried")] == [1]


@on_one_broker
async def test_a_message_that_may_kill_its_process_has_the_limit_too(
    harness: ConsumerHarness,
) -> None:
    """Suspects are handled one after the other: a suspect that hangs would stop all of them."""

    def before(consumer: Consumer) -> None:
        consumer.source.suspects.many = 0

    exit_code, _ = await harness.run(
        numbers(3), lambda c: c.handled_count == 3, handlers={"n": hang_once},
        before=before, handler_seconds=LIMIT, **AT_ONCE,
    )  # fmt: skip
    assert (exit_code, harness.left) == (0, (0, 0))
    assert [e["reason"] for e in harness.events("message_retried")] == [PAST_IT] * 3


# -- calls that cannot be ended


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event that ends calls which cannot be cancelled."""
    RELEASE.clear()
    yield RELEASE
    RELEASE.set()


@on_one_broker
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
async def test_a_thread_past_its_limit_is_named_and_its_result_counts(
    harness: ConsumerHarness, release: threading.Event, batched: bool
) -> None:
    def handle(event: Number) -> None:
        release.wait(20)

    def handle_batch(events: list[Number]) -> None:
        release.wait(20)

    def until(consumer: Consumer) -> bool:
        if harness.events("handler_overrun") and not release.is_set():
            assert why_not_live(consumer) == ""  # there are other slots
            release.set()
        return consumer.handled_count == 1

    handler = handle_batch if batched else handle
    exit_code, _ = await harness.run(
        numbers(1), until, handlers={"n": handler}, handler_seconds=LIMIT, batch_seconds=0.01
    )
    assert (exit_code, harness.left, harness.events("message_retried")) == (0, (0, 0), [])
    [overrun] = harness.events("handler_overrun")
    assert (overrun["handler"], overrun["seconds"]) == ("n", LIMIT)
    assert overrun["reason"] == "a thread cannot be cancelled"
    assert len(overrun["message_ids"]) == 1
    [stack] = overrun["stacks"]
    assert "release.wait(20)" in stack


@on_one_broker
async def test_of_several_threads_only_the_one_past_its_limit_is_shown(
    harness: ConsumerHarness, release: threading.Event
) -> None:
    def slow(event: Number) -> None:
        release.wait(20)

    def slower(event: Number) -> None:
        release.wait(20.0)

    handlers: dict[str, HandlerFunction] = {
        "slow": Handles(slow, seconds=LIMIT),
        "slower": slower,
    }
    async with opened(make_source(harness.make_settings())) as publisher:
        await publisher.publish([OutgoingMessage(numbers(1)[0], "slower")])

    def until(consumer: Consumer) -> bool:
        if harness.events("handler_overrun"):
            release.set()
        return consumer.handled_count == 2

    await harness.run(numbers(1), until, message_type="slow", handlers=handlers)
    [overrun] = harness.events("handler_overrun")
    assert ["in slow\n" in stack for stack in overrun["stacks"]] == [True]


async def swallow(event: Number) -> None:
    while not RELEASE.is_set():  # any test sets it
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)


@on_one_broker
@pytest.mark.parametrize("kind", ["coroutines", "threads", "batches", "own", "prefetch", "key"])
async def test_when_no_slot_is_left_it_is_not_live_and_says_why(
    harness: ConsumerHarness, release: threading.Event, kind: str
) -> None:
    def thread(event: Number) -> None:
        release.wait(20)

    async def batch(events: list[Number]) -> None:
        await swallow(events[0])

    async def other(event: Number) -> None:
        await asyncio.sleep(0)

    handlers: dict[str, HandlerFunction] = {
        "threads": thread,
        "batches": batch,
        "own": Handles(swallow, concurrency=2),
    }
    handler = handlers.get(kind, swallow)
    settings: dict[str, Any] = {"concurrency": 20 if kind in ("own", "prefetch", "key") else 2}
    settings |= {"prefetch": 2} if kind in ("prefetch", "key") else {"prefetch": 20}
    settings |= {"order_by": "header:no"} if kind == "key" else {}
    live: list[str] = []

    def until(consumer: Consumer) -> bool:
        live.append(why_not_live(consumer))
        return bool(live[-1])

    exit_code, consumer = await harness.run(
        numbers(2), until, handlers={"n": handler, "other": other}, message_type="n",
        handler_seconds=LIMIT, batch_size=1, drain_seconds=0, max_attempts=5, **settings,
    )  # fmt: skip
    assert exit_code == ExitCode.DEADLINE
    assert live[0] == ""
    ids = [message for e in harness.events("handler_overrun") for message in e["message_ids"]]
    names = ", ".join(f"n (message {one})" for one in ids)
    assert live[-1] == f"every slot is held by a handler past its time limit: {names}"
    assert len(ids) == 2
    assert why_not_live(consumer) == ""  # the supervisor waits for the shutdown
    assert [e["attempt"] for e in harness.events("message_retried")] == [1, 1]
    release.set()


@on_one_broker
@pytest.mark.parametrize("kind", ["bytes", "suspects"])
async def test_when_lost_calls_keep_all_others_waiting_it_is_not_live(
    harness: ConsumerHarness, release: threading.Event, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(consumer: Consumer) -> None:
        if kind == "suspects":
            consumer.source.suspects.many = 0
        else:
            monkeypatch.setattr(source_module, "MOST_BYTES", 10_000)

    exit_code, _ = await harness.run(
        [body.ljust(10_000) for body in numbers(3)], lambda c: bool(why_not_live(c)),
        handlers={"n": swallow}, handler_seconds=LIMIT, concurrency=20, prefetch=20,
        max_body_bytes=10_000, drain_seconds=0, before=before,
    )  # fmt: skip
    assert exit_code == ExitCode.DEADLINE
    assert len(harness.events("handler_overrun")) == 1


@on_one_broker
async def test_a_probe_that_is_lost_is_followed_by_the_next_one(
    harness: ConsumerHarness, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pause, "FIRST_SECONDS", 0.02)

    async def handle(event: Number) -> None:
        if event.number == 0 and not harness.events("paused"):
            raise Pause(0.02)
        if event.number == 1:
            await swallow(event)

    def until(consumer: Consumer) -> bool:
        if consumer.handled_count == 3:
            release.set()
        return consumer.handled_count == 4

    await harness.run(
        numbers(4), until, handlers={"n": handle}, handler_seconds=LIMIT, concurrency=3
    )
    assert len(harness.events("resumed")) == 1


@on_one_broker
async def test_at_the_deadline_a_lost_call_counts_its_attempt_also_in_a_pause(
    harness: ConsumerHarness, release: threading.Event
) -> None:
    async def handle(event: Number) -> None:
        if event.number == 0:
            await swallow(event)
        raise Pause(60)

    await harness.run(
        numbers(2),
        lambda c: bool(c.breaker.reason and harness.events("handler_overrun")),
        handlers={"n": handle}, handler_seconds=LIMIT, drain_seconds=0, concurrency=2,
    )  # fmt: skip
    retried = [entry for entry in harness.events("message_retried") if "paused" not in entry]
    assert [entry["reason"] for entry in retried] == [PAST_IT]


@on_one_broker
async def test_a_suspect_is_within_the_concurrency_of_its_batch_handler(
    harness: ConsumerHarness,
) -> None:
    at_once: list[int] = [0]
    most: list[int] = []

    async def handle(events: list[Number]) -> None:
        at_once[0] += 1
        most.append(at_once[0])
        await asyncio.sleep(0.1)
        at_once[0] -= 1

    def before(consumer: Consumer) -> None:
        deliver = consumer.source._deliver

        def as_suspect(*messages: Message) -> bool:
            for message in messages:
                message.deliveries = 15 if b"2" in message.body else 1
            return deliver(*messages)

        consumer.source._deliver = as_suspect  # type: ignore[method-assign]

    await harness.run(
        numbers(6), lambda c: c.handled_count == 6, before=before, batch_size=2, concurrency=4,
        handlers={"n": Handles(handle, concurrency=1)}, batch_seconds=0.01,
    )  # fmt: skip
    assert set(most) == {1}


@on_one_broker
@pytest.mark.parametrize("kind", ["time limit", "publishing", "publishing of a batch"])
async def test_what_the_handler_has_not_raised_is_retried_whatever_it_rejects_on(
    harness: ConsumerHarness, kind: str
) -> None:
    async def one(event: Number) -> OutgoingMessage:
        return OutgoingMessage(b"", to="nowhere:at-all")

    async def batch(events: list[Number], messages: list[Message]) -> list[OutgoingMessage]:
        return [OutgoingMessage(b"", to="nowhere:at-all", caused_by=messages[0])]

    functions: dict[str, Any] = {"time limit": hang, "publishing": one}
    handles = Handles(functions.get(kind, batch), reject_on=(Exception,), max_attempts=2)
    await harness.run(
        numbers(1), lambda c: c.rejected_count == 1, handlers={"n": handles},
        handler_seconds=LIMIT, batch_seconds=0.01, **AT_ONCE,
    )  # fmt: skip
    assert len(harness.events("message_retried")) == 1


@on_one_broker
async def test_a_slot_whose_handler_ends_after_all_is_free_again(
    harness: ConsumerHarness, release: threading.Event
) -> None:
    live: list[bool] = []

    def handle(event: Number) -> None:
        if event.number == 0:
            release.wait(20)

    def until(consumer: Consumer) -> bool:
        live.append(not why_not_live(consumer))
        if not live[-1]:
            release.set()
        return consumer.handled_count == 3

    exit_code, _ = await harness.run(
        numbers(3), until, handlers={"n": handle}, handler_seconds=LIMIT, concurrency=1
    )
    assert (exit_code, harness.left) == (0, (0, 0))
    assert (live[0], False in live, live[-1]) == (True, True, True)


@pytest.mark.parametrize("broker", ["mqtt"], indirect=True, scope="session")
async def test_where_the_broker_delivers_large_messages_too_few_lost_ones_are_no_standstill(
    harness: ConsumerHarness, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MQTT has no credit in bytes: the broker delivers until the prefetch is unacked."""
    monkeypatch.setattr("runtime.brokers.source.MOST_BYTES", 1)
    why: set[str] = set()

    def handle(event: Number) -> None:
        if event.number == 0:
            release.wait(20)

    def until(consumer: Consumer) -> bool:
        if harness.events("handler_overrun") and consumer.handled_count == 2:
            why.add(why_not_live(consumer))
            release.set()
        return consumer.handled_count == 3

    await start_once(harness.make_settings())
    exit_code, _ = await harness.run(
        numbers(3), until, handlers={"n": handle}, handler_seconds=LIMIT, concurrency=3
    )
    assert (exit_code, why) == (0, {""})


@on_one_broker
async def test_at_the_deadline_a_handler_past_its_limit_has_failed_and_the_others_are_requeued(
    harness: ConsumerHarness, release: threading.Event
) -> None:
    """Otherwise it would block each process that gets its message, forever."""
    handlers: dict[str, HandlerFunction] = {"lost": Handles(swallow, seconds=LIMIT), "n": hang}
    async with opened(make_source(harness.make_settings())) as publisher:
        await publisher.publish([OutgoingMessage(body, "lost") for body in numbers(2)])
    exit_code, consumer = await harness.run(
        numbers(1),
        lambda c: len(harness.events("handler_overrun")) == 2 and len(c.in_flight) == 3,
        message_type="n", handlers=handlers, drain_seconds=0, max_attempts=1,
    )  # fmt: skip
    assert (exit_code, len(consumer.abandoned)) == (ExitCode.DEADLINE, 3)
    assert (consumer.source.requeued_count, consumer.rejected_count) == (1, 2)
    assert harness.left == (1, 2)
    release.set()


def test_on_every_broker_a_stuck_process_is_not_live_and_its_message_comes_back_as_an_attempt(
    broker: Server, queue: str, tmp_path: Path
) -> None:
    with Scene(broker, queue, tmp_path, MISBEHAVING) as scene:
        scene_needs(scene, "attempts")
        scene.publish(1, kind="thread", seconds=3600)
        port = free_port()
        process = scene.start(
            HANDLERS="thread", concurrency=1, handler_seconds=0.3, drain_seconds=0.5,
            retry_seconds=0.01, retry_max_seconds=0.01, probe_port=port,
        )  # fmt: skip
        overrun = process.wait_for("handler_overrun")
        assert "misbehaving.py" in json.dumps(overrun["stacks"])
        wait_until(lambda: ask(port, "/livez")[0] == 503)
        assert "held by a handler past its time limit: thread (" in ask(port, "/livez")[1]
        assert ask(port, "/readyz")[0] == 200
        exit_code, seconds = process.stop()
        assert exit_code == ExitCode.DEADLINE
        assert seconds < 0.5 + 2 + AT_ONCE_SECONDS
        again = scene.start(HANDLERS="thread", drain_seconds=0)
        assert again.wait_for("handling")["attempt"] == 2
        again.send(signal.SIGINT)
        again.stop()


# -- Handles


async def test_on_every_broker_messages_of_a_handler_at_its_limit_delay_no_other(
    settings_for: Callable[..., ConsumerSettings],
) -> None:
    settings = settings_for(concurrency=3)
    await start_once(settings)
    started: list[int] = []
    handled: list[int] = []
    running, most = 0, 0

    async def slow(event: Number, message: Message) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        started.append(event.number)
        if len(started) == 1:
            await message.stopping.wait()
        await asyncio.sleep(0)
        running -= 1
        handled.append(event.number)

    async def fast(event: Number) -> None:
        handled.append(event.number)

    handlers: dict[str, HandlerFunction] = {"slow": Handles(slow, concurrency=1), "fast": fast}
    assert prefetch_of(settings, Router(handlers)) == 30
    async with opened(make_source(settings)) as publisher:
        bodies = numbers(12)
        await publisher.publish([OutgoingMessage(body, "slow") for body in bodies[:6]])
        await publisher.publish([OutgoingMessage(body, "fast") for body in bodies[6:]])
    source = make_source(settings, 30)
    await consume(source, settings, lambda c: len(handled) >= 6, handlers)
    assert sorted(handled) == [*started, *range(6, 12)]
    assert len(started) == 1
    assert source.requeued_count >= 5  # SQS redelivers them once more meanwhile
    await consume(make_source(settings, 30), settings, lambda c: len(set(handled)) == 12, handlers)
    assert ({*handled}, most) == (
        {*range(12)},
        1,
    )  # Kafka redelivers the messages behind them in their partition


@on_one_broker
async def test_a_handler_runs_as_often_at_a_time_as_it_may(harness: ConsumerHarness) -> None:
    running, most = 0, 0

    async def handle(event: Number) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1

    for order_by in ("", "body:number"):
        await harness.run(
            numbers(40), lambda c: c.handled_count == 40,
            handlers={"n": Handles(handle, concurrency=3)}, prefetch=40, order_by=order_by,
        )  # fmt: skip
    assert most == 3


@on_one_broker
async def test_batches_of_a_handler_run_as_often_at_a_time_as_it_may_and_keep_no_slot_from_others(
    harness: ConsumerHarness,
) -> None:
    running, most = 0, 0
    others_are_done = asyncio.Event()

    async def handle(events: list[Number]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await others_are_done.wait()
        await asyncio.sleep(0)
        running -= 1

    async def other(events: list[Number]) -> None:
        others_are_done.set()

    async with opened(make_source(harness.make_settings())) as publisher:
        await publisher.publish([OutgoingMessage(body, "n") for body in numbers(10)])
    await harness.run(
        numbers(1), lambda c: c.handled_count == 11, message_type="other",
        handlers={"n": Handles(handle, concurrency=1), "other": other},
        batch_size=2, batch_seconds=0.01, concurrency=2, prefetch=20,
    )  # fmt: skip
    assert most == 1


@on_one_broker
async def test_its_own_attempts_and_the_exceptions_that_are_rejected_at_once(
    harness: ConsumerHarness,
) -> None:
    async def handle(event: Number, message: Message) -> None:
        if event.number == 0:
            msg = "no such customer"
            raise KeyError(msg)
        if event.number == 1 and message.attempt == 1:
            raise Retry("not yet")  # the handler's own decision
        msg = "down"
        raise OSError(msg)

    handler = Handles(handle, max_attempts=3, reject_on=(LookupError, Exception))
    await harness.run(
        numbers(2), lambda c: c.rejected_count == 2, handlers={"n": handler}, **AT_ONCE
    )
    rejected = [(e["attempt"], e["reason"]) for e in harness.events("message_rejected")]
    assert sorted(rejected) == [(1, "KeyError: 'no such customer'"), (2, "OSError: down")]
    assert {e["exc_info"] for e in harness.events("message_rejected")} == {None}
    handler = Handles(handle, max_attempts=3, reject_on=(LookupError,))
    await harness.run(
        numbers(2)[1:], lambda c: c.rejected_count == 1, handlers={"n": handler},
        max_attempts=1, **AT_ONCE,
    )  # fmt: skip
    [rejected_later] = harness.events("message_rejected")
    assert rejected_later["reason"] == "failed 3 times, last with OSError: down"


WRONG: list[tuple[Any, str]] = [
    (Handles(7), "Handles(function): Input should be callable"),  # type: ignore[arg-type]
    (Handles(hang, seconds=-1), "Handles(seconds): Input should be greater than or equal to 0"),
    (Handles(hang, seconds=math.nan), "Handles(seconds): Input should be less than or equal to 86"),
    (Handles(hang, seconds="soon"), "Handles(seconds): Input should be a valid number"),  # type: ignore[arg-type]
    (Handles(hang, max_attempts=0), "Handles(max_attempts): Input should be greater than or equal"),
    (Handles(hang, concurrency=0), "Handles(concurrency): Input should be greater than or equal"),
    (Handles(hang, concurrency=1.5), "Handles(concurrency): Input should be a valid integer"),  # type: ignore[arg-type]
    (Handles(hang, reject_on=ValueError), "Handles(reject_on): Input should be a valid tuple"),  # type: ignore[arg-type]
    (Handles(hang, reject_on=(int,)), "Handles(reject_on): Input should be a subclass of BaseExc"),  # type: ignore[arg-type]
    (Handles(hang, reject_on=("KeyError",)), "Handles(reject_on): Input should be a"),  # type: ignore[arg-type]
    (Handles(Handles(hang)), "Handles(function): Input should be callable"),  # type: ignore[arg-type]
    (7, "cannot use the signature"),
]


@pytest.mark.parametrize(("handler", "reason"), WRONG)
def test_a_wrong_limit_is_one_sentence_at_the_start_that_names_the_handler(
    handler: HandlerFunction, reason: str
) -> None:
    with pytest.raises(HandlerError) as error:
        Router({"order_created": handler})
    assert str(error.value).startswith(f"handler 'order_created': {reason}")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
