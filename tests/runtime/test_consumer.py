"""The consumer in this process, on the embedded broker: the outcome of a message for anything that its handler does."""

import asyncio
import inspect
import math
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from signal import Signals
from typing import Any
from unittest.mock import ANY

import anyio
import pytest
import structlog

from consumer_harness import AT_ONCE, ConsumerHarness, Number, numbers
from harness.contract import opened
from harness.servers import Server
from runtime import consumer as consumer_module
from runtime import telemetry, watchdog
from runtime.brokers import make_source
from runtime.cancellation import (
    CancellationEvent,
    CancellationRequested,
)
from runtime.consumer import Consumer, unless_set
from runtime.errors import BrokerUnavailable, ExitCode, HandlerError
from runtime.handlers import Router
from runtime.message import (
    Failed,
    Message,
    OutgoingMessage,
    Reject,
    Retry,
)
from runtime.settings import ConsumerSettings
from runtime.signals import PAIR_SECONDS, forces
from runtime.telemetry import (
    NO_HANDLER,
    Outcome,
    Telemetry,
)

pytestmark = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)


BOUNDS = (
    *("IDLE_SECONDS", "STOP_SOURCE_SECONDS", "CANCEL_SECONDS", "REQUEUE_SECONDS"),
    *("CLOSE_SOURCE_SECONDS", "CLOSE_LIFESPAN_SECONDS"),
)


async def nothing(event: Number) -> None: ...


async def fail(
    harness: ConsumerHarness, error: BaseException, **settings: Any
) -> tuple[int, Consumer]:
    """Handle one message with a handler that raises this error, until it is a dead letter."""

    async def handle(event: Number, message: Message) -> None:
        raise error

    settings = AT_ONCE | settings
    return await harness.run(
        numbers(1), lambda c: c.rejected_count == 1, handlers={"n": handle}, **settings
    )


class Falsy(Exception):
    """An error that may be falsy, such as an error of many parts that has none."""

    def __len__(self) -> int:
        return 0


async def test_an_exception_that_is_false_is_a_failure_too(harness: ConsumerHarness) -> None:
    exit_code, consumer = await fail(harness, Falsy(), max_attempts=1)
    assert (exit_code, consumer.handled_count, consumer.rejected_count) == (0, 0, 1)


class NoText(Exception):
    def __str__(self) -> str:
        msg = "a bug in the exception itself"
        raise KeyError(msg)


async def test_every_message_is_handled_once(harness: ConsumerHarness) -> None:
    seen: list[int] = []

    async def handle(event: Number) -> None:
        await asyncio.sleep(0)
        seen.append(event.number)

    exit_code, _ = await harness.run(
        numbers(100), lambda c: c.handled_count == 100, handlers={"n": handle}
    )
    assert (exit_code, sorted(seen), harness.left) == (0, list(range(100)), (0, 0))


async def test_no_more_handlers_run_than_concurrency_allows(harness: ConsumerHarness) -> None:
    running = 0
    most = 0

    async def handle(event: Number) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1

    await harness.run(
        numbers(40), lambda c: c.handled_count == 40, handlers={"n": handle}, concurrency=3
    )
    assert most == 3


async def test_as_many_blocking_handlers_run_at_once_as_concurrency_allows(
    harness: ConsumerHarness,
) -> None:
    count = 40  # more than the default number of a thread pool
    all_are_there = threading.Barrier(count)

    def handle(event: Number) -> None:
        all_are_there.wait(15)

    _, consumer = await harness.run(
        numbers(count),
        lambda c: c.handled_count == count,
        handlers={"n": handle},
        concurrency=count,
        prefetch=count,
    )
    assert (consumer.handled_count, consumer.errors) == (count, [])


async def test_before_a_shutdown_a_handler_has_all_of_the_drain_time_left(
    harness: ConsumerHarness,
) -> None:
    seen: list[Any] = []

    async def handle(event: Number, message: Message) -> None:
        seen.append(message.seconds_left())

    def before(consumer: Consumer) -> None:
        seen.append(consumer.state)

    await harness.run(
        numbers(1),
        lambda c: c.handled_count == 1,
        handlers={"n": handle},
        before=before,
        drain_seconds=17,
    )
    assert seen == ["starting", 17]


async def test_reject_is_a_dead_letter_with_its_reason(harness: ConsumerHarness) -> None:
    await fail(harness, Reject("no such customer"))
    assert harness.left == (0, 1)
    [rejected] = harness.events("message_rejected")
    assert rejected["reason"] == "no such customer"


@pytest.mark.parametrize("error", [Reject("caf\udce9"), OSError("caf\udce9")])
async def test_a_reason_that_cannot_be_encoded_prevents_no_settlement(
    harness: ConsumerHarness, error: Exception
) -> None:
    exit_code, _ = await fail(harness, error, max_attempts=2)
    assert (exit_code, harness.left) == (0, (0, 1))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the database is away"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        NoText(),
        asyncio.CancelledError("by the handler itself"),
        Retry("not yet"),
        ExceptionGroup("several", [ValueError("one")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_other_failure_is_retried_and_then_dead_lettered(
    harness: ConsumerHarness, error: BaseException
) -> None:
    _, consumer = await fail(harness, error, max_attempts=3)
    assert [entry["attempt"] for entry in harness.events("message_retried")] == [1, 2]
    assert [entry["attempt"] for entry in harness.events("message_rejected")] == [3]
    assert (consumer.handled_count, harness.left) == (0, (0, 1))


@pytest.mark.slow
async def test_the_delay_grows_fourfold_up_to_the_longest_with_jitter(
    harness: ConsumerHarness,
) -> None:
    await fail(harness, RuntimeError(), retry_seconds=0.02, retry_max_seconds=0.1, max_attempts=5)
    delays = [entry["seconds"] for entry in harness.events("message_retried")]
    for delay, longest in zip(delays, [0.02, 0.08, 0.1, 0.1], strict=True):
        assert longest * 0.92 - 0.001 <= delay <= longest
        assert delay == round(delay, 3)


async def test_an_error_whose_text_fails_is_named_by_its_type(
    harness: ConsumerHarness,
) -> None:
    await fail(harness, NoText(), max_attempts=1)
    [rejected] = harness.events("message_rejected")
    assert rejected["reason"] == "failed 1 times, last with NoText: <KeyError in __str__>"


async def test_retry_may_set_its_delay(harness: ConsumerHarness) -> None:
    async def handle(event: Number) -> None:
        raise Retry("at noon", delay_seconds=3600)

    await harness.run(
        numbers(1), lambda _: bool(harness.events("message_retried")), handlers={"n": handle}
    )
    assert [entry["seconds"] for entry in harness.events("message_retried")] == [3600]
    assert harness.left == (1, 0)


@pytest.mark.parametrize("delay_seconds", [0, -5, math.nan])
async def test_a_retry_that_is_already_due_is_redelivered_at_once(
    harness: ConsumerHarness, delay_seconds: float
) -> None:
    retry = Retry(delay_seconds=delay_seconds)
    await fail(harness, retry, max_attempts=2, retry_seconds=0.02, retry_max_seconds=0.02)
    assert [entry["seconds"] for entry in harness.events("message_retried")] == [0]


async def test_a_handler_that_cancels_itself_and_returns_at_once_has_done_its_work(
    harness: ConsumerHarness,
) -> None:
    async def handle(event: Number) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    _, consumer = await harness.run(
        numbers(3), lambda c: c.handled_count == 3, handlers={"n": handle}, concurrency=1
    )
    assert (consumer.handled_count, consumer.errors, harness.left) == (3, [], (0, 0))


async def test_a_handler_that_cancels_itself_has_failed_and_its_worker_goes_on(
    harness: ConsumerHarness,
) -> None:
    async def handle(event: Number, message: Message) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0  # of the previous message
        if message.attempt == 1:  # and never uncancels, like async_timeout before 4.0.3
            task.cancel()
            await asyncio.sleep(0)

    _, consumer = await harness.run(
        numbers(3),
        lambda c: c.handled_count == 3,
        handlers={"n": handle},
        concurrency=1,
        **AT_ONCE,
    )
    assert (consumer.handled_count, consumer.source.requeued_count) == (3, 0)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("may_return", [True, False])
async def test_context_variables_of_a_handler_do_not_reach_the_next_message(
    harness: ConsumerHarness, may_return: bool, waits: bool
) -> None:
    tenant: ContextVar[int | None] = ContextVar("tenant", default=None)
    seen: list[Any] = []

    async def handle(event: Number) -> None:
        seen.append((tenant.get(), structlog.contextvars.get_contextvars().get("tenant")))
        if waits:
            await asyncio.sleep(0)
        tenant.set(event.number)
        structlog.contextvars.bind_contextvars(tenant=event.number)

    if may_return:
        del handle.__annotations__["return"]
    await harness.run(
        numbers(3), lambda c: c.handled_count == 3, handlers={"n": handle}, concurrency=1
    )
    assert seen == [(None, None)] * 3


@pytest.mark.skipif(sys.version_info < (3, 12), reason="functions can be marked since Python 3.12")
async def test_variables_that_a_marked_function_sets_before_its_coroutine_exists_end_too(
    harness: ConsumerHarness,
) -> None:
    tenant: ContextVar[int | None] = ContextVar("tenant", default=None)
    seen: list[int | None] = []

    def handle(event: Number) -> Any:
        seen.append(tenant.get())
        tenant.set(event.number)
        return asyncio.sleep(0)

    handler = inspect.markcoroutinefunction(handle)  # type: ignore[attr-defined, unused-ignore]
    await harness.run(
        numbers(3), lambda c: c.handled_count == 3, handlers={"n": handler}, concurrency=1
    )
    assert seen == [None] * 3


async def test_a_handler_that_takes_its_own_cancellation_back_has_done_its_work(
    harness: ConsumerHarness,
) -> None:
    caught: list[int] = []

    async def handle(event: Number) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            task.uncancel()
            caught.append(event.number)

    _, consumer = await harness.run(
        numbers(3), lambda c: c.handled_count == 3, handlers={"n": handle}
    )
    assert (sorted(caught), consumer.errors, harness.left) == ([0, 1, 2], [], (0, 0))


async def test_a_message_of_an_unknown_type_is_a_dead_letter(harness: ConsumerHarness) -> None:
    async def handle(event: Number) -> None: ...

    await harness.run(
        numbers(1),
        lambda c: c.rejected_count == 1,
        message_type="refund",
        handlers={"order": handle, "payment": handle},
    )
    assert harness.events("message_rejected")[0]["reason"] == "unknown type 'refund'"
    assert harness.left == (0, 1)


async def test_a_batch_is_full_or_waits_for_batch_seconds(harness: ConsumerHarness) -> None:
    sizes: list[int] = []

    async def handle(events: list[Number]) -> None:
        sizes.append(len(events))

    await harness.run(
        numbers(10),
        lambda c: c.handled_count == 10,
        handlers={"n": handle},
        batch_size=4,
        batch_seconds=0.1,
    )
    assert sorted(sizes) == [2, 4, 4]


async def test_batches_run_one_after_another_when_concurrency_is_one(
    harness: ConsumerHarness,
) -> None:
    running: list[int] = []

    async def handle(events: list[Number]) -> None:
        running.append(1)
        assert len(running) == 1
        await asyncio.sleep(0)
        running.pop()

    _, consumer = await harness.run(
        numbers(6),
        lambda c: c.handled_count == 6,
        handlers={"n": handle},
        batch_size=2,
        concurrency=1,
    )
    assert (consumer.handled_count, harness.left) == (6, (0, 0))


async def test_at_the_deadline_batches_in_flight_and_waiting_ones_are_requeued(
    harness: ConsumerHarness,
) -> None:
    async def handle(events: list[Number]) -> None:
        await asyncio.Event().wait()

    exit_code, consumer = await harness.run(
        numbers(6),
        lambda c: len(c.in_flight) == 6,
        handlers={"n": handle},
        batch_size=2,
        concurrency=1,
        drain_seconds=0,
    )
    assert (exit_code, len(consumer.abandoned), consumer.source.requeued_count) == (75, 6, 6)
    assert len(harness.events("message_abandoned")) == 6
    assert consumer.errors == []
    [drained] = harness.events("drained")
    assert (drained["handled"], drained["requeued"], drained["abandoned"]) == (0, 6, 6)
    assert harness.left == (6, 0)


@pytest.mark.parametrize("message_type", ["n", "unknown"])
async def test_a_message_that_is_being_rejected_at_the_deadline_is_named_and_requeued(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch, message_type: str
) -> None:
    async def reject(message: Message, reason: str) -> None:
        await asyncio.Event().wait()

    exit_code, consumer = await harness.run(
        [b"not JSON"],
        lambda c: len(c.in_flight) == 1,
        message_type=message_type,
        handlers={"n": nothing, "other": nothing},
        before=lambda c: monkeypatch.setattr(c.source, "reject", reject),
        drain_seconds=0,
    )
    assert (exit_code, len(consumer.abandoned), harness.left) == (75, 1, (1, 0))
    name = message_type if message_type == "n" else NO_HANDLER
    assert [entry["handler"] for entry in harness.events("message_abandoned")] == [name]
    assert +Counter(consumer.telemetry.outcomes) == {(name, "abandoned"): 1}


async def test_an_invalid_message_does_not_spoil_its_batch(harness: ConsumerHarness) -> None:
    async def handle(events: list[Number]) -> None: ...

    await harness.run(
        [*numbers(2), b"not JSON", *numbers(1)],
        lambda c: c.handled_count == 3 and c.rejected_count == 1,
        handlers={"n": handle},
        batch_size=3,
    )
    assert harness.left == (0, 1)


async def test_a_failing_batch_is_retried_message_by_message(harness: ConsumerHarness) -> None:
    async def handle(events: list[Number], messages: list[Message]) -> None:
        if messages[0].attempt == 1:
            raise RuntimeError

    await harness.run(
        numbers(3),
        lambda c: c.handled_count == 3,
        handlers={"n": handle},
        batch_size=3,
        **AT_ONCE,
    )
    assert len(harness.events("message_retried")) == 3
    assert harness.left == (0, 0)


async def test_what_a_batch_handled_is_acked_although_the_broker_does_not_store_the_retry_of_another(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handle(events: list[Number], messages: list[Message]) -> list[Failed]:
        return [Failed(messages[0], RuntimeError())]

    async def retry(message: Message, delay_seconds: float, reason: str) -> None:
        await asyncio.Event().wait()

    exit_code, consumer = await harness.run(
        numbers(3),
        lambda c: bool(harness.events("message_retried")),
        handlers={"n": handle},
        before=lambda c: monkeypatch.setattr(c.source, "retry", retry),
        batch_size=3,
        drain_seconds=0,
    )
    assert (exit_code, consumer.handled_count, len(consumer.abandoned)) == (75, 2, 1)
    assert harness.left == (1, 0)


async def test_a_failed_fetcher_shuts_the_service_down_with_exit_code_1(
    harness: ConsumerHarness,
) -> None:
    async def handle(event: Number) -> None: ...

    def kill_the_fetcher(consumer: Consumer) -> bool:
        if consumer.handled_count == 1 and consumer.state == "consuming":
            consumer.source.buffer.fail(RuntimeError("the client library died"))
        return False

    exit_code, consumer = await harness.run(
        numbers(1), kill_the_fetcher, handlers={"n": handle}, concurrency=10
    )
    assert exit_code == 1
    [crashed] = harness.events("crashed")  # only one, and not one for each worker
    assert "the client library died" in crashed["error"]
    assert consumer.event.reason == "failure"


async def test_log_lines_of_a_handler_carry_the_message_id(harness: ConsumerHarness) -> None:
    seen: list[Any] = []

    async def handle(event: Number, message: Message) -> None:
        bound = structlog.contextvars.get_contextvars()
        seen.append(bound["message_id"] == message.id)

    await harness.run(numbers(5), lambda c: c.handled_count == 5, handlers={"n": handle})
    assert seen == [True] * 5


async def test_log_lines_of_a_batch_handler_carry_no_single_id(harness: ConsumerHarness) -> None:
    seen: list[Any] = []

    async def handle(events: list[Number]) -> None:
        seen.append(structlog.contextvars.get_contextvars())

    await harness.run(
        numbers(2), lambda c: c.handled_count == 2, handlers={"n": handle}, batch_size=2
    )
    assert seen == [{}]


# -- starting and closing when another part fails


async def test_a_shutdown_does_not_wait_for_a_lifespan_that_does_not_open(
    harness: ConsumerHarness,
) -> None:
    opening = asyncio.Event()

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        opening.set()
        await asyncio.Event().wait()
        yield

    exit_code, consumer = await harness.run(
        [], lambda _: opening.is_set(), handlers={"n": nothing}, lifespan=lifespan
    )
    assert (exit_code, consumer.state) == (0, "stopped")
    assert [entry["reason"] for entry in harness.events("stop_requested")] == ["test"]


@pytest.mark.parametrize("step", ["lifespan", "source"])
async def test_a_close_that_hangs_is_abandoned_in_time_and_is_exit_code_1(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(consumer_module, f"CLOSE_{step.upper()}_SECONDS", 0.05)

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        if step == "lifespan":
            await never()

    def before(consumer: Consumer) -> None:
        if step == "source":
            close = consumer.source.__aexit__

            async def close_and_hang(kind: None, error: None, traceback: None) -> None:
                await close(kind, error, traceback)
                await never()

            monkeypatch.setattr(consumer.source, "__aexit__", close_and_hang)

    exit_code, consumer = await harness.run(
        [],
        lambda c: c.state == "consuming",
        handlers={"n": nothing},
        lifespan=lifespan,
        before=before,
    )
    assert exit_code == 1
    [error] = consumer.errors
    assert isinstance(error, TimeoutError)
    assert harness.events("crashed") == [
        {"event": "crashed", "log_level": "error", "error": "", "exc_info": error}
    ]
    [failed] = harness.events("close_failed")
    assert (failed["step"], failed["error"]) == (step, "TimeoutError")


async def test_resources_are_closed_in_reverse_order(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def told(consumer: Consumer) -> None:
        enter, leave = consumer.source.__aenter__, consumer.source.__aexit__

        async def open_source() -> None:
            await enter()
            steps.append("source opened")

        async def close_source(*error: None) -> None:
            await leave(*error)
            steps.append("source closed")

        monkeypatch.setattr(consumer.source, "__aenter__", open_source)
        monkeypatch.setattr(consumer.source, "__aexit__", close_source)

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        steps.append("lifespan opened")
        yield
        steps.append("lifespan closed")

    await harness.run(
        numbers(1),
        lambda c: c.handled_count == 1,
        handlers={"n": nothing},
        lifespan=lifespan,
        before=told,
    )
    assert steps == ["lifespan opened", "source opened", "source closed", "lifespan closed"]


async def test_a_handler_gets_what_the_lifespan_yields(harness: ConsumerHarness) -> None:
    seen: list[ConsumerHarness] = []

    async def handle(event: Number, shared: ConsumerHarness) -> None:
        seen.append(shared)

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[ConsumerHarness]:
        yield harness

    handled = await harness.run(
        numbers(1), lambda c: c.handled_count == 1, handlers={"n": handle}, lifespan=lifespan
    )
    assert handled[0] == 0
    assert seen == [harness]


async def test_a_lifespan_that_lacks_what_a_handler_wants_is_closed_and_ends_the_start(
    harness: ConsumerHarness,
) -> None:
    closed: list[bool] = []

    async def handle(event: Number, shared: ConsumerHarness) -> None: ...

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        closed.append(True)

    sentence = "handler 'n': lifespan yields no ConsumerHarness for the parameter 'shared' of "
    with pytest.raises(HandlerError, match=sentence):
        await harness.run(numbers(1), lambda c: False, handlers={"n": handle}, lifespan=lifespan)
    assert closed == [True]


async def test_a_lifespan_that_is_no_context_manager_is_one_sentence(
    harness: ConsumerHarness,
) -> None:
    async def lifespan() -> AsyncIterator[None]:
        yield

    wrong: Any = lifespan
    with pytest.raises(HandlerError, match=r"^lifespan in .* is not an async context manager: "):
        await harness.run(numbers(1), lambda c: False, handlers={"n": nothing}, lifespan=wrong)


async def test_a_source_that_does_not_stop_is_abandoned_in_time_and_is_exit_code_1(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "STOP_SOURCE_SECONDS", 0.05)

    async def stop() -> None:
        await asyncio.Event().wait()

    exit_code, _ = await harness.run(
        [],
        lambda c: c.state == "consuming",
        handlers={"n": nothing},
        before=lambda c: monkeypatch.setattr(c.source, "stop", stop),
    )
    assert exit_code == 1
    assert [entry["step"] for entry in harness.events("close_failed")] == ["deliveries"]


async def test_a_source_that_ends_by_itself_is_a_failure_with_a_sentence(
    harness: ConsumerHarness,
) -> None:
    def end(consumer: Consumer) -> bool:
        if consumer.state == "consuming":
            consumer.source.buffer.close()
        return bool(consumer.errors)

    exit_code, consumer = await harness.run([], end, handlers={"n": nothing}, concurrency=1)
    assert (exit_code, consumer.event.reason) == (1, "failure")
    [error] = consumer.errors
    assert str(error) == "the source ended without a shutdown"


async def test_a_client_that_cancels_itself_does_not_prevent_the_next_steps(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = asyncio.Event()

    async def stop() -> None:
        raise asyncio.CancelledError

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        closed.set()

    exit_code, _ = await harness.run(
        numbers(1),
        lambda c: c.handled_count == 1,
        handlers={"n": nothing},
        lifespan=lifespan,
        before=lambda c: monkeypatch.setattr(c.source, "stop", stop),
    )
    assert (exit_code, closed.is_set()) == (1, True)
    assert harness.events("drained")


@pytest.mark.slow
async def test_a_broker_that_does_not_requeue_cannot_delay_the_exit(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "CANCEL_SECONDS", 0.05)
    monkeypatch.setattr(consumer_module, "REQUEUE_SECONDS", 0.05)
    test_ends = asyncio.Event()

    async def requeue(message: Message) -> None:
        await asyncio.Event().wait()

    async def handle(event: Number) -> None:
        while not test_ends.is_set():
            try:
                await test_ends.wait()
            except asyncio.CancelledError:
                continue

    exit_code, consumer = await harness.run(
        numbers(1),
        lambda c: len(c.in_flight) == 1,
        handlers={"n": handle},
        before=lambda c: monkeypatch.setattr(c.source, "requeue", requeue),
        drain_seconds=0,
    )
    assert exit_code == 75
    assert [entry["step"] for entry in harness.events("close_failed")] == ["requeue"]
    test_ends.set()
    async with asyncio.timeout(5):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
    assert [type(error) for error in consumer.errors] == [TimeoutError]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["__aenter__", "start"])
async def test_connecting_is_repeated_until_connect_seconds_have_passed(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    async def refuse() -> None:
        raise BrokerUnavailable("nobody listens")

    with pytest.raises(BrokerUnavailable):
        await harness.run(
            [],
            lambda _: False,
            handlers={"n": nothing},
            before=lambda c: monkeypatch.setattr(c.source, method, refuse),
            connect_seconds=0.7,  # between the longest first pause and the shortest two
        )
    assert [entry["attempt"] for entry in harness.events("reconnecting")] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["__aenter__", "start"])
async def test_a_start_survives_two_outages_of_the_broker(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asked: list[tuple[float, ...]] = []

    def back_off(attempt: int, first: float, longest: float) -> float:
        asked.append((attempt, first, longest))
        return 0.06

    monkeypatch.setattr(consumer_module, "backoff_seconds", back_off)

    def break_twice(consumer: Consumer) -> None:
        step = getattr(consumer.source, method)
        outages = [BrokerUnavailable("nobody listens"), BrokerUnavailable("nobody listens")]

        async def refuse_twice() -> None:
            if outages:
                raise outages.pop()
            await step()

        monkeypatch.setattr(consumer.source, method, refuse_twice)

    exit_code, _ = await harness.run(
        numbers(3), lambda c: c.handled_count == 3, handlers={"n": nothing}, before=break_twice
    )
    assert (exit_code, harness.left) == (0, (0, 0))
    assert asked == [(1, 0.5, 10), (2, 0.5, 10)]
    assert harness.events("reconnecting") + harness.events("reconnect_failed") == [
        {
            **{"event": event, "log_level": level, "reason": "nobody listens"},
            **{"attempt": attempt, "seconds": 0.1},
            **({"outage_seconds": 0} if event == "reconnecting" else {}),
        }
        for attempt, event, level in (
            (1, "reconnecting", "warning"),  # then once a minute
            (2, "reconnect_failed", "debug"),
        )
    ]


async def test_a_shutdown_ends_the_back_off_before_the_first_connection(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise BrokerUnavailable("nobody listens")

    monkeypatch.setattr(consumer_module, "backoff_seconds", lambda *_, **__: 60)
    exit_code, _ = await harness.run(
        [],
        lambda _: bool(harness.events("reconnecting")),
        handlers={"n": nothing},
        before=lambda c: monkeypatch.setattr(c.source, "__aenter__", refuse),
    )
    assert exit_code == 0


@pytest.mark.parametrize("method", ["__aenter__", "start"])
async def test_a_shutdown_does_not_wait_for_an_unresponsive_broker(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    called = asyncio.Event()

    async def silent() -> None:
        called.set()
        await asyncio.Event().wait()

    exit_code, _ = await harness.run(
        [],
        lambda _: called.is_set(),
        handlers={"n": nothing},
        before=lambda c: monkeypatch.setattr(c.source, method, silent),
    )
    assert exit_code == 0


async def test_a_retry_with_a_delay_counts_as_an_attempt_during_shutdown_too(
    harness: ConsumerHarness,
) -> None:
    async def handle(event: Number, message: Message) -> None:
        await message.stopping.wait()
        raise Retry(delay_seconds=None if event.number else 3600)

    _, consumer = await harness.run(
        numbers(2), lambda c: len(c.in_flight) == 2, handlers={"n": handle}
    )
    assert [entry["seconds"] for entry in harness.events("message_retried")] == [3600]
    assert (consumer.source.requeued_count, len(consumer.abandoned)) == (1, 0)
    assert (consumer.telemetry.outcomes["n", "retried"], consumer.errors) == (2, [])
    assert harness.left == (2, 0)


async def test_a_start_step_that_completes_despite_the_shutdown_counts(broker: Server) -> None:
    async def connect() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    event = CancellationEvent(asyncio.get_running_loop())
    asyncio.get_running_loop().call_soon(event.set)
    async with asyncio.timeout(5):
        await unless_set(connect(), event)
    assert event.is_set()


async def test_a_start_step_that_swallows_its_first_cancellation_is_cancelled_again(
    broker: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "CANCEL_AGAIN_SECONDS", 0.01)
    cancellations = 0

    async def connect() -> None:
        nonlocal cancellations
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancellations += 1
                if cancellations == 2:
                    raise

    event = CancellationEvent(asyncio.get_running_loop())
    asyncio.get_running_loop().call_soon(event.set)
    with pytest.raises(CancellationRequested):
        async with asyncio.timeout(5):
            await unless_set(connect(), event)
    assert cancellations == 2


# A background task of the lifespan fails.


@asynccontextmanager
async def asyncio_group(failing: asyncio.Event) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        group.create_task(fail_when(failing))
        yield


@asynccontextmanager
async def anyio_group(failing: asyncio.Event) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        group.start_soon(fail_when, failing)
        yield


async def fail_when(event: asyncio.Event) -> None:
    await event.wait()
    msg = "the cache cannot be refreshed"
    raise RuntimeError(msg)


@pytest.mark.parametrize("group", [asyncio_group, anyio_group])
async def test_a_background_task_of_the_lifespan_that_fails_drains_first(
    harness: ConsumerHarness, group: Callable[[asyncio.Event], Any]
) -> None:
    failing, finished = asyncio.Event(), 0

    async def handle(number: Number) -> None:
        nonlocal finished
        failing.set()
        await asyncio.sleep(0.2)  # the task fails meanwhile
        finished += 1

    exit_code, consumer = await harness.run(
        numbers(1),
        lambda c: False,
        handlers={"n": handle},
        lifespan=lambda: group(failing),
    )
    assert (exit_code, finished, consumer.handled_count) == (ExitCode.CRASHED, 1, 1)
    assert harness.left == (0, 0)
    [crashed] = harness.events("crashed")
    assert "cache cannot be refreshed" in repr(crashed["exc_info"])


# Time limits.


@pytest.mark.parametrize("drain_seconds", [0, 0.1, 0.5])
async def test_closing_takes_at_most_the_sum_of_its_bounds(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch, drain_seconds: float
) -> None:
    """Each limit is a tenth, and a handler, a source and a lifespan take longer than any limit."""
    for name in BOUNDS:
        monkeypatch.setattr(consumer_module, name, getattr(consumer_module, name) / 10)
    closed = asyncio.Event()
    close: Any = None
    stopped_at = 0.0

    async def hang(*_: object) -> None:
        await closed.wait()

    async def swallow(number: Number) -> None:
        while not closed.is_set():
            with suppress(asyncio.CancelledError):
                await hang()

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        await hang()

    def break_source(consumer: Consumer) -> None:
        nonlocal close
        close = consumer.source.__aexit__
        monkeypatch.setattr(consumer.source, "stop", hang)
        monkeypatch.setattr(consumer.source, "__aexit__", hang)

    def until(consumer: Consumer) -> bool:
        nonlocal stopped_at
        stopped_at = asyncio.get_running_loop().time()
        return bool(consumer.in_flight)

    exit_code, _ = await harness.run(
        numbers(1),
        until,
        handlers={"n": swallow},
        lifespan=lifespan,
        before=break_source,
        drain_seconds=drain_seconds,
    )
    seconds = asyncio.get_running_loop().time() - stopped_at
    closed.set()
    await close(None, None, None)
    assert exit_code == ExitCode.DEADLINE
    failed = [entry["step"] for entry in harness.events("close_failed")]
    assert failed == ["deliveries", "source", "lifespan"]
    assert seconds < drain_seconds + watchdog.CLOSE_SECONDS / 10


# The log and the telemetry.


async def test_the_log_of_a_run_that_goes_well(harness: ConsumerHarness) -> None:
    _, consumer = await harness.run(
        numbers(1), lambda c: c.handled_count == 1, handlers={"n": nothing}, concurrency=2
    )
    info = {"log_level": "info"}
    counts = {"handled": 1, "requeued": 0, "abandoned": 0, "seconds": ANY}
    of_the_consumer = [entry for entry in harness.logs if entry["event"] != "connected"]
    assert of_the_consumer == [
        {"event": "consuming", "source": harness.queue, "concurrency": 2, **info},
        {"event": "stop_requested", "reason": "test", **info},
        {"event": "draining", "in_flight": 0, "seconds": 25.0, **info},
        {"event": "step_done", "step": "deliveries", "log_level": "debug"},
        {"event": "drained", **counts, **info},
        {"event": "step_done", "step": "source", "log_level": "debug"},
    ]
    [drained] = harness.events("drained")
    assert 0 <= drained["seconds"] < 10
    assert drained["seconds"] == round(drained["seconds"], 3)
    assert (consumer.state, consumer.in_flight) == ("stopped", {})


async def test_the_log_of_a_retry_and_of_a_dead_letter(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def before(consumer: Consumer) -> None:
        retry = consumer.source.retry

        async def listen(message: Message, delay_seconds: float, reason: str) -> None:
            told.append(reason)
            await retry(message, delay_seconds, reason)

        monkeypatch.setattr(consumer.source, "retry", listen)

    error = RuntimeError("no such order")

    async def handle(event: Number) -> None:
        raise error

    await harness.run(
        numbers(1),
        lambda c: c.rejected_count == 1,
        message_type="order",
        handlers={"n": handle},
        before=before,
        max_attempts=2,
        **AT_ONCE,
    )
    [retried], [rejected] = harness.events("message_retried"), harness.events("message_rejected")
    reason = "RuntimeError: no such order"
    assert told == [reason]
    what = {"message_id": ANY, "type": "order", "handler": "n"}
    times = {"attempt": 1, "seconds": ANY}
    assert retried == {
        **{"event": "message_retried", "log_level": "warning", "reason": reason},
        **{**what, **times, "exc_info": error},
    }
    assert retried["seconds"] == round(retried["seconds"], 3)
    assert rejected == {
        **{"event": "message_rejected", "log_level": "error", "attempt": 2, **what},
        **{"reason": f"failed 2 times, last with {reason}", "same_as_before": 1},
    }
    assert retried["message_id"] == rejected["message_id"] != ""


async def test_a_hundred_messages_that_fail_alike_are_a_hundred_lines_and_one_traceback(
    harness: ConsumerHarness,
) -> None:
    async def handle(event: Number) -> None:
        msg = f"no such order: {event.number}"
        raise RuntimeError(msg)

    await harness.run(
        numbers(100), lambda c: c.rejected_count == 100, handlers={"n": handle},
        max_attempts=1, breaker_failures=0,
    )  # fmt: skip
    rejected = harness.events("message_rejected")
    assert len({one["message_id"] for one in rejected}) == len({one["reason"] for one in rejected})
    assert len(rejected) == 100
    assert len([one for one in rejected if one.get("exc_info")]) == 1
    assert [one["same_as_before"] for one in rejected[1:]] == list(range(1, 100))


@pytest.mark.parametrize("error", [Reject("no such order"), Retry("not yet")])
async def test_a_handlers_own_decision_is_logged_without_a_traceback(
    harness: ConsumerHarness, error: Exception
) -> None:
    async def handle(event: Number) -> None:
        raise error

    event = "message_rejected" if isinstance(error, Reject) else "message_retried"
    await harness.run(numbers(1), lambda _: bool(harness.events(event)), handlers={"n": handle})
    assert harness.events(event)[0]["exc_info"] is None


async def test_the_log_of_abandoned_messages_says_where_each_handler_is(
    harness: ConsumerHarness,
) -> None:
    over = threading.Event()

    async def deep_down() -> None:
        await asyncio.Event().wait()

    async def suspended(event: Number) -> None:
        await deep_down()

    async def batch(events: list[Number]) -> None:
        await asyncio.Event().wait()

    def in_a_thread(event: Number) -> None:
        over.wait(20)

    async with opened(make_source(harness.make_settings())) as publisher:
        for kind in ("suspended", "batch", "in_a_thread"):
            await publisher.publish([OutgoingMessage(b'{"number": 1}', kind, f"id of {kind}")])
    try:
        exit_code, _ = await harness.run(
            [],
            lambda c: len(c.in_flight) == 3,
            handlers={"suspended": suspended, "batch": batch, "in_a_thread": in_a_thread},
            drain_seconds=0,
            batch_size=1,
            concurrency=3,
        )
    finally:
        over.set()
    assert exit_code == 75
    abandoned = {"event": "message_abandoned", "log_level": "error", "attempt": 1}
    assert sorted(harness.events("message_abandoned"), key=lambda entry: str(entry["handler"])) == [
        {**abandoned, "message_id": f"id of {kind}", "handler": kind}
        for kind in ("batch", "in_a_thread", "suspended")
    ]
    [stacks] = [entry["stacks"] for entry in harness.events("handlers_abandoned")]
    by_name = {stack.partition("\n")[0]: stack.splitlines()[1:] for stack in stacks}
    thread = {name for name in by_name if name.startswith("handler")}
    workers = by_name.keys() - {"batch-batch", *thread}
    assert len(workers) == 2  # the third gave its message to the batch, and has ended
    assert workers < {f"worker-{number}" for number in range(3)}
    [of_suspended] = [lines for lines in by_name.values() if "deep_down" in str(lines)]
    assert any("consumer.py:" in line for line in of_suspended)
    names = [line.rpartition(".")[2] for line in of_suspended]
    assert names[-4:] == ["_process", "suspended", "deep_down", "wait"]
    assert all(line.startswith("  ") for line in of_suspended)
    [of_the_thread] = [by_name[name] for name in thread]
    assert of_the_thread[0].startswith("  File ")
    assert all(line.startswith("  ") for line in of_the_thread)
    assert any("over.wait(20)" in line for line in of_the_thread)
    assert [entry["step"] for entry in harness.events("step_done")] == [
        *("deliveries", "requeue", "source"),
    ]


@pytest.mark.slow
async def test_during_shutdown_a_handler_sees_how_much_of_the_drain_time_is_left(
    harness: ConsumerHarness,
) -> None:
    consumers: list[Consumer] = []
    seen: list[Any] = []
    told: list[tuple[str, ...]] = []

    def before(consumer: Consumer) -> None:
        consumers.append(consumer)
        consumer.notify = lambda *lines: told.append(lines)

    async def handle(event: Number, message: Message) -> None:
        [consumer] = consumers
        consumer.event.set("test")
        assert consumer.event.set_at is not None
        consumer.event.set_at -= 10  # a blocked event loop causes such a delay
        while consumer.state == "consuming":  # noqa: ASYNC110  # nothing tells when it changes
            await asyncio.sleep(0)
        seen.extend([consumer.state, message.seconds_left()])
        await asyncio.sleep(3 * consumer_module.IDLE_SECONDS)

    exit_code, _ = await harness.run(
        numbers(1),
        lambda c: c.event.is_set(),
        handlers={"n": handle},
        before=before,
        drain_seconds=25,
    )
    [drained] = harness.events("drained")
    assert isinstance(drained["seconds"], float)
    assert 10 < drained["seconds"] < 20
    [state, seconds_left] = seen
    assert state == "draining"
    assert 5 < seconds_left <= 15
    assert (exit_code, harness.left) == (0, (0, 0))
    assert told == [
        ("READY=1", "STATUS=consuming"),
        ("STOPPING=1", "STATUS=draining, 1 in flight"),
    ]


class Recorder(Telemetry):
    """Records its calls, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Any, ...]] = []

    def handling(self, handler: str, messages: Sequence[Message]) -> str:
        self.told.append(("handling", handler, *(message.body for message in messages)))
        return f"token of {handler}"

    def handled(self, handling: str, failure: BaseException | None) -> None:
        self.told.append(("handled", handling, failure))

    def refused(self, handler: str, message: Message, rejection: BaseException) -> None:
        self.told.append(("refused", handler, message.body, str(rejection)))

    def settled(self, handler: str, outcome: Outcome) -> None:
        self.told.append(("settled", handler, outcome))


async def test_the_telemetry_gets_each_step_of_each_message(harness: ConsumerHarness) -> None:
    recorder = Recorder()
    failure, rejection = RuntimeError(), Reject("never")

    async def good(body: bytes) -> None: ...

    async def bad(body: bytes, message: Message) -> None:
        raise rejection if message.attempt == 2 else failure

    async def strict(event: Number) -> None: ...

    def before(consumer: Consumer) -> None:
        consumer.telemetry = recorder

    async with opened(make_source(harness.make_settings())) as publisher:
        for kind in ("good", "strict", "other", "bad"):
            await publisher.publish([OutgoingMessage(kind.encode(), kind)])
    await harness.run(
        [],
        lambda c: c.rejected_count == 3,
        handlers={"good": good, "bad": bad, "strict": strict},
        before=before,
        concurrency=1,
        **AT_ONCE,
    )
    assert recorder.told == [
        ("handling", "good", b"good"),
        ("handled", "token of good", None),
        ("settled", "good", "handled"),
        ("refused", "strict", b"strict", ANY),
        ("settled", "strict", "rejected"),
        ("refused", NO_HANDLER, b"other", "unknown type 'other'"),
        ("settled", NO_HANDLER, "rejected"),
        ("handling", "bad", b"bad"),
        ("handled", "token of bad", failure),
        ("settled", "bad", "retried"),
        ("handling", "bad", b"bad"),
        ("handled", "token of bad", rejection),
        ("settled", "bad", "rejected"),
    ]


async def test_the_telemetry_that_was_given_watches_the_consumer(harness: ConsumerHarness) -> None:
    settings, recorder = harness.make_settings(), Recorder()
    event = CancellationEvent(asyncio.get_running_loop())
    router = Router({"n": nothing})
    consumer = Consumer(make_source(settings), router, event, settings, telemetry=recorder)
    assert consumer.telemetry is recorder
    assert recorder.outcomes["n", "handled"] == 0


async def test_a_consumer_without_telemetry_still_counts(harness: ConsumerHarness) -> None:
    _, consumer = await harness.run(
        numbers(2), lambda c: c.handled_count == 2, handlers={"n": nothing}
    )
    assert consumer.telemetry.outcomes["n", "handled"] == 2


def test_a_service_without_telemetry_has_one_that_exports_nothing(
    broker: Server, monkeypatch: pytest.MonkeyPatch, settings_for: Callable[..., ConsumerSettings]
) -> None:
    monkeypatch.setattr(telemetry, "KINDS", ("no_such_kind",))
    assert type(telemetry.make_telemetry("orders", settings_for())) is Telemetry


# A second signal.


async def holding(event: Number) -> None:
    await asyncio.Event().wait()


def test_only_a_later_sigint_forces(broker: Server) -> None:
    at_last = PAIR_SECONDS
    assert forces(Signals.SIGINT, at_last)
    assert not forces(Signals.SIGINT, at_last - 0.001)
    assert not forces(Signals.SIGTERM, at_last)


async def test_a_second_sigint_ends_the_wait_and_the_others_are_ignored(
    harness: ConsumerHarness,
) -> None:
    signals = [
        (Signals.SIGTERM, 100.0),
        (Signals.SIGTERM, 100.08),
        (Signals.SIGINT, 100.1),  # as one of a pair
        (Signals.SIGINT, 100.35),
        (Signals.SIGINT, 105.0),
    ]

    def before(consumer: Consumer) -> None:
        async def repeat() -> None:
            await consumer.event.wait()
            for received in signals:
                consumer.event.signals.append(received)
                if len(consumer.event.signals) > 1:
                    assert consumer.event.on_repeat is not None
                    consumer.event.on_repeat(received[0])
                    forced.append(consumer._forced.done())

        repeating.append(asyncio.create_task(repeat()))

    forced: list[bool] = []
    repeating: list[asyncio.Task[None]] = []
    exit_code, consumer = await harness.run(
        numbers(1), lambda c: len(c.in_flight) == 1, handlers={"n": holding}, before=before
    )
    await asyncio.gather(*repeating)
    assert forced == [False, False, True, True]
    assert (exit_code, len(consumer.abandoned), harness.left) == (130, 1, (1, 0))
    assert harness.events("forced") == [
        {"event": "forced", "reason": "SIGINT", "log_level": "warning"}
    ]
    ignored = {"event": "signal_ignored", "reason": "already shutting down", "log_level": "info"}
    assert harness.events("signal_ignored") == [
        {**ignored, "signal": name} for name in ("SIGTERM", "SIGINT", "SIGINT")
    ]


async def test_a_pair_of_signals_stays_one_whatever_came_before_it_was_looked_at(
    harness: ConsumerHarness,
) -> None:
    def before(consumer: Consumer) -> None:
        consumer.event.signals += [
            (Signals.SIGTERM, 100.0),
            (Signals.SIGINT, 100.1),
            (Signals.SIGTERM, 100.6),
        ]

    def repeat(consumer: Consumer) -> bool:
        if consumer.state != "consuming":
            return False
        assert consumer.event.on_repeat is not None
        for signum, _ in consumer.event.signals[1:]:
            consumer.event.on_repeat(signum)
        return True

    exit_code, _ = await harness.run([], repeat, handlers={"n": nothing}, before=before)
    assert (exit_code, harness.events("forced")) == (0, [])


async def test_a_batch_that_waits_to_be_full_is_handled_on_shutdown(
    harness: ConsumerHarness,
) -> None:
    sizes: list[int] = []

    async def handle(events: list[Number]) -> None:
        sizes.append(len(events))

    exit_code, consumer = await harness.run(
        numbers(2),
        lambda c: len(c.in_flight) == 2,
        handlers={"n": handle},
        batch_size=10,
        batch_seconds=3600,
    )
    assert (exit_code, sizes, consumer.errors) == (0, [2], [])
    assert (consumer.handled_count, harness.left) == (2, (0, 0))
