# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""The consumer in this process, on the embedded broker: what becomes of a message, whatever its handler does."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import structlog
from pydantic import BaseModel
from structlog.testing import capture_logs

from {{ cookiecutter.package_name }}.runtime.brokers import make_source
from {{ cookiecutter.package_name }}.runtime.cancellation import CancellationEvent
from {{ cookiecutter.package_name }}.runtime.consumer import Consumer
from {{ cookiecutter.package_name }}.runtime.handlers import HandlerFunction, Router
from {{ cookiecutter.package_name }}.runtime.message import (
    Message,
    OutgoingMessage,
    Reject,
    Retry,
)
from {{ cookiecutter.package_name }}.runtime.settings import ConsumerSettings

from .servers import Server

pytestmark = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)


class Number(BaseModel):
    number: int


class Bench:
    """A consumer, and a second source that publishes to its queue and looks at it."""

    def __init__(
        self, broker: Server, queue: str, make_settings: Callable[..., ConsumerSettings]
    ) -> None:
        self.broker = broker
        self.queue = queue
        self.make_settings = make_settings
        self.logs: list[Any] = []

    async def run(
        self,
        bodies: list[bytes],
        until: Callable[[Consumer], bool],
        *,
        message_type: str = "",
        handlers: dict[str, HandlerFunction],
        **settings: Any,
    ) -> tuple[int, Consumer]:
        """Publish, consume until the condition holds, stop; returns the exit code and the consumer."""
        made = self.make_settings(**settings)
        event = CancellationEvent(asyncio.get_running_loop())
        consumer = Consumer(make_source(made, made.prefetch or 10), Router(handlers), event, made)
        async with make_source(made) as publisher:
            await publisher.publish([OutgoingMessage(body, message_type) for body in bodies])
            with capture_logs() as self.logs:
                consuming = asyncio.create_task(consumer.run())
                async with asyncio.timeout(20):
                    while not until(consumer) and not consuming.done():  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                event.set("test")
                exit_code = await consuming
        return exit_code, consumer

    @property
    def left(self) -> tuple[int, int]:
        """How many messages wait, now or for a retry, and how many are dead."""
        counts = self.broker.counts(self.queue)
        return counts.ready + counts.delayed, counts.dead

    def events(self, name: str) -> list[Any]:
        return [entry for entry in self.logs if entry["event"] == name]


@pytest.fixture
def bench(broker: Server, queue: str, settings_for: Callable[..., ConsumerSettings]) -> Bench:
    return Bench(broker, queue, settings_for)


def numbers(count: int) -> list[bytes]:
    return [json.dumps({"number": number}).encode() for number in range(count)]


Handle = Callable[[Number, Message], Awaitable[None]]


def failing_with(error: BaseException) -> Handle:
    async def handle(event: Number, message: Message) -> None:
        raise error

    return handle


async def test_every_message_is_handled_once(bench: Bench) -> None:
    seen: list[int] = []

    async def handle(event: Number) -> None:
        await asyncio.sleep(0)
        seen.append(event.number)

    exit_code, _ = await bench.run(
        numbers(100), lambda c: c.handled_count == 100, handlers={"n": handle}
    )
    assert (exit_code, sorted(seen), bench.left) == (0, list(range(100)), (0, 0))


async def test_no_more_handlers_run_than_concurrency_says(bench: Bench) -> None:
    running = 0
    most = 0

    async def handle(event: Number) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1

    await bench.run(
        numbers(40), lambda c: c.handled_count == 40, handlers={"n": handle}, concurrency=3
    )
    assert most == 3


async def test_reject_is_a_dead_letter_with_its_reason(bench: Bench) -> None:
    handle = failing_with(Reject("no such customer"))
    await bench.run(numbers(1), lambda c: c.rejected_count == 1, handlers={"n": handle})
    assert bench.left == (0, 1)
    [rejected] = bench.events("message_rejected")
    assert rejected["reason"] == "no such customer"


@pytest.mark.parametrize("error", [Reject("caf\udce9"), OSError("caf\udce9")])
async def test_a_reason_that_no_encoding_can_hold_harms_nobody(
    bench: Bench, error: Exception
) -> None:
    exit_code, _ = await bench.run(
        numbers(1),
        lambda c: c.rejected_count == 1,
        handlers={"n": failing_with(error)},
        max_attempts=2,
        retry_seconds=0.01,
    )
    assert (exit_code, bench.left) == (0, (0, 1))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the database is away"),
        SystemExit(3),
        asyncio.CancelledError("by the handler itself"),
        Retry("not yet"),
        ExceptionGroup("several", [ValueError("one")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_other_failure_is_retried_and_then_given_up(
    bench: Bench, error: BaseException
) -> None:
    _, consumer = await bench.run(
        numbers(1),
        lambda c: c.rejected_count == 1,
        handlers={"n": failing_with(error)},
        max_attempts=3,
        retry_seconds=0.01,
        retry_max_seconds=0.02,
    )
    assert [entry["attempt"] for entry in bench.events("message_retried")] == [1, 2]
    assert [entry["attempt"] for entry in bench.events("message_rejected")] == [3]
    assert (consumer.handled_count, bench.left) == (0, (0, 1))


async def test_the_delay_doubles_up_to_the_longest_with_jitter(bench: Bench) -> None:
    await bench.run(
        numbers(1),
        lambda c: c.rejected_count == 1,
        handlers={"n": failing_with(RuntimeError())},
        max_attempts=5,
        retry_seconds=0.02,
        retry_max_seconds=0.1,
    )
    delays = [entry["seconds"] for entry in bench.events("message_retried")]
    for delay, longest in zip(delays, [0.02, 0.04, 0.08, 0.1], strict=True):
        assert longest / 2 - 0.001 <= delay <= longest


async def test_retry_may_say_when(bench: Bench) -> None:
    handle = failing_with(Retry("at noon", delay_seconds=3600))
    await bench.run(
        numbers(1), lambda _: bool(bench.events("message_retried")), handlers={"n": handle}
    )
    assert [entry["seconds"] for entry in bench.events("message_retried")] == [3600]
    assert bench.left == (1, 0)


async def test_a_message_of_an_unknown_type_is_a_dead_letter(bench: Bench) -> None:
    async def handle(event: Number) -> None: ...

    await bench.run(
        numbers(1),
        lambda c: c.rejected_count == 1,
        message_type="refund",
        handlers={"order": handle, "payment": handle},
    )
    assert bench.events("message_rejected")[0]["reason"] == "unknown type 'refund'"
    assert bench.left == (0, 1)


async def test_a_batch_is_full_or_waits_for_batch_seconds(bench: Bench) -> None:
    sizes: list[int] = []

    async def handle(events: list[Number]) -> None:
        sizes.append(len(events))

    await bench.run(
        numbers(10),
        lambda c: c.handled_count == 10,
        handlers={"n": handle},
        batch_size=4,
        batch_seconds=0.1,
    )
    assert sorted(sizes) == [2, 4, 4]


async def test_an_invalid_message_does_not_spoil_its_batch(bench: Bench) -> None:
    async def handle(events: list[Number]) -> None: ...

    await bench.run(
        [*numbers(2), b"not JSON", *numbers(1)],
        lambda c: c.handled_count == 3 and c.rejected_count == 1,
        handlers={"n": handle},
        batch_size=3,
    )
    assert bench.left == (0, 1)


async def test_a_failing_batch_is_retried_message_by_message(bench: Bench) -> None:
    async def handle(events: list[Number], messages: list[Message]) -> None:
        if messages[0].attempt == 1:
            raise RuntimeError

    await bench.run(
        numbers(3),
        lambda c: c.handled_count == 3,
        handlers={"n": handle},
        batch_size=3,
        retry_seconds=0.01,
    )
    assert len(bench.events("message_retried")) == 3
    assert bench.left == (0, 0)


async def test_a_dead_filler_stops_the_service_with_exit_code_1(bench: Bench) -> None:
    async def handle(event: Number) -> None: ...

    def kill_the_filler(consumer: Consumer) -> bool:
        if consumer.handled_count == 1 and consumer.state == "consuming":
            consumer.source.buffer.fail(RuntimeError("the client library died"))
        return False

    exit_code, consumer = await bench.run(
        numbers(1), kill_the_filler, handlers={"n": handle}, concurrency=2
    )
    assert exit_code == 1
    assert "the client library died" in bench.events("crashed")[0]["error"]
    assert consumer.event.reason == "failure"


async def test_log_lines_of_a_handler_carry_the_message_id(bench: Bench) -> None:
    seen: list[Any] = []

    async def handle(event: Number, message: Message) -> None:
        bound = structlog.contextvars.get_contextvars()
        seen.append(bound["message_id"] == message.id)

    await bench.run(numbers(5), lambda c: c.handled_count == 5, handlers={"n": handle})
    assert seen == [True] * 5
