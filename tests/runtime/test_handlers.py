"""Handlers: which signatures are understood, how payloads are decoded, and which handler gets a message."""

import asyncio
import functools
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
from pydantic import BaseModel, Field, field_validator

from runtime.errors import HandlerError
from runtime.handlers import Handler, Router
from runtime.message import Message, Reject, Retry


class Panic(BaseException):
    """As extensions in Rust raise it."""


class Order(BaseModel):
    id: int = Field(gt=0)
    secret: str = "-"

    @field_validator("secret")
    @classmethod
    def _breaks(cls, value: str) -> str:
        if value == "panic":
            raise Panic
        if value == "break":
            msg = "a bug in the model"
            raise KeyError(msg)
        return value


async def call(function: Callable[..., Any], *bodies: bytes) -> None:
    handler = Handler("handler", function)
    messages = [Message(body, id=str(number)) for number, body in enumerate(bodies)]
    with ThreadPoolExecutor(1, thread_name_prefix="of-the-consumer") as threads:
        await handler.call([handler.decode(m) for m in messages], messages, threads)


async def test_a_model_is_validated_from_json() -> None:
    seen: list[tuple[Order, str]] = []

    async def handle(event: Order, message: Message) -> None:
        seen.append((event, message.id))

    await call(handle, b'{"id": 7}')
    assert seen == [(Order(id=7), "0")]


async def test_the_message_is_optional_and_the_payload_may_be_positional_only() -> None:
    seen: list[Order] = []

    async def handle(event: Order, /) -> None:
        seen.append(event)

    await call(handle, b'{"id": 7}')
    assert seen == [Order(id=7)]


async def test_bytes_are_passed_unmodified() -> None:
    seen: list[bytes] = []

    async def handle(body: bytes, message: Message) -> None:
        seen.append(body)

    await call(handle, b"\xff not JSON")
    assert seen == [b"\xff not JSON"]


async def test_a_list_is_a_batch() -> None:
    seen: list[tuple[list[Order], list[str]]] = []

    async def handle(events: list[Order], messages: list[Message]) -> None:
        seen.append((events, [message.id for message in messages]))

    await call(handle, b'{"id": 1}', b'{"id": 2}')
    assert seen == [([Order(id=1), Order(id=2)], ["0", "1"])]


async def test_a_plain_function_runs_in_a_thread_with_the_callers_context() -> None:
    context: ContextVar[str] = ContextVar("context")
    seen: list[tuple[str, str]] = []

    def handle(event: Order) -> None:
        seen.append((threading.current_thread().name, context.get()))

    context.set("of the worker")
    await call(handle, b'{"id": 7}')
    assert seen == [("of-the-consumer_0", "of the worker")]


async def test_a_stop_iteration_in_a_thread_is_a_failure_and_not_an_endless_wait() -> None:
    def handle(event: Order) -> None:
        next(iter([]))

    with pytest.raises(RuntimeError, match="StopIteration"):
        async with asyncio.timeout(5):
            await call(handle, b'{"id": 7}')


async def test_an_async_function_behind_a_plain_decorator_is_awaited() -> None:
    seen: list[int] = []

    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any) -> Any:
            return function(*arguments)

        return wrapper

    @logged
    async def handle(event: Order) -> None:
        await asyncio.sleep(0)
        seen.append(event.id)

    await call(handle, b'{"id": 7}')
    assert seen == [7]


def test_a_generator_is_refused_as_calling_it_would_not_run_it() -> None:
    def generator(event: Order) -> Iterator[None]:
        yield

    async def async_generator(event: Order) -> AsyncIterator[None]:
        yield

    for function in (generator, async_generator):
        with pytest.raises(HandlerError):
            Handler("handler", function)


async def test_annotations_may_be_strings() -> None:
    async def handle(event: "Order", message: "Message") -> None: ...

    await call(handle, b'{"id": 7}')


@pytest.mark.parametrize(
    "function",
    [
        lambda: None,
        lambda event: None,
        pytest.param(lambda *events: None, id="star"),
    ],
)
def test_an_unusable_signature_is_refused_by_name(function: Callable[..., Any]) -> None:
    with pytest.raises(HandlerError, match="handler 'order_created': cannot use the signature"):
        Handler("order_created", function)


def test_a_wrong_message_parameter_is_refused() -> None:
    async def swapped(message: Message, event: Order) -> None: ...

    async def single_in_a_batch(events: list[Order], message: Message) -> None: ...

    async def three(event: Order, message: Message, more: int) -> None: ...

    # Both checks would see the mistake that this one is.
    async def unknown(event: "Missing") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    async def keyword_only(*, event: Order) -> None: ...

    async def no_model(event: ThreadPoolExecutor) -> None: ...

    for function in (swapped, single_in_a_batch, three, unknown, keyword_only, no_model):
        with pytest.raises(HandlerError):
            Handler("handler", function)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b'{"id": "hidden-value"}', "id: Input should be a valid integer"),
        (b"{}", "id: Field required"),
        (b'{"id": 0}', "id: Input should be greater than 0"),
        (b'{"id": 1, "secret": "break"}', "KeyError in the model"),
        (b'{"id": 1, "secret": "panic"}', "Panic in the model"),
    ],
)
def test_an_invalid_payload_is_rejected_with_a_reason_without_the_value(
    body: bytes, reason: str
) -> None:
    async def handle(event: Order) -> None: ...

    with pytest.raises(Reject) as rejection:
        Handler("handler", handle).decode(Message(body))
    assert reason in str(rejection.value)
    assert str(rejection.value).startswith(f"invalid payload: {reason.partition(' ')[0]}")
    assert "hidden-value" not in str(rejection.value)
    assert len(str(rejection.value)) <= 500


def test_a_reason_is_short_however_much_is_wrong() -> None:
    async def handle(event: dict[str, int]) -> None: ...

    body = json.dumps({f"key {number}": "x" for number in range(1000)}).encode()
    with pytest.raises(Reject) as rejection:
        Handler("handler", handle).decode(Message(body))
    assert len(str(rejection.value)) == 500


def test_a_router_with_one_batch_handler_of_many_takes_batches() -> None:
    async def single(body: bytes) -> None: ...

    async def batch(bodies: list[bytes]) -> None: ...

    assert Router({"single": single, "batch": batch}).batched
    assert not Router({"single": single}).batched


def test_one_handler_gets_every_type() -> None:
    async def handle(body: bytes) -> None: ...

    router = Router({"order_created": handle})
    assert router.route(Message(b"", type="anything")).name == "order_created"


def test_of_many_handlers_the_type_picks_one() -> None:
    async def handle(body: bytes) -> None: ...

    router = Router({"order_created": handle, "payment_received": handle})
    assert router.route(Message(b"", type="payment_received")).name == "payment_received"
    with pytest.raises(Reject, match="unknown type 'order_deleted'"):
        router.route(Message(b"", type="order_deleted"))
    with pytest.raises(Reject, match=r"^unknown type 'x{100}'$"):
        router.route(Message(b"", type="x" * 1000))


def test_the_star_gets_the_rest() -> None:
    async def handle(body: bytes) -> None: ...

    router = Router({"order.created": handle, "*": handle})
    assert router.route(Message(b"", type="order.created")).name == "order.created"
    for unknown in ("", "order_deleted", "*"):
        assert router.route(Message(b"", type=unknown)).name == "*"
    assert Router({"*": handle}).route(Message(b"", type="anything")).name == "*"


def test_a_service_without_handlers_is_refused() -> None:
    with pytest.raises(HandlerError, match="HANDLERS"):
        Router({})


async def test_the_stop_is_far_away_for_a_message_made_by_hand() -> None:
    message = Message(b"")
    assert not message.stopping.is_set()
    assert message.seconds_left() == float("inf")
    message.stopping.set()
    await asyncio.wait_for(message.stopping.wait(), 1)


def test_a_retry_later_than_two_weeks_from_now_is_refused_where_it_is_written() -> None:
    assert Retry(delay_seconds=14 * 86_400).delay_seconds == 1_209_600
    for seconds in (14 * 86_400 + 1, math.inf):
        with pytest.raises(ValueError, match=r"at most 1\.2096e"):
            Retry(delay_seconds=seconds)
    assert [Retry(delay_seconds=s).delay_seconds for s in (-1, math.nan)] == [0, 0]
