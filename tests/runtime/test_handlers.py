"""Handlers: which signatures are accepted, how payloads are decoded, and which handler gets a message."""

import asyncio
import functools
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from pydantic import BaseModel, Field, field_validator

from runtime.errors import HandlerError
from runtime.handlers import Handler, Router
from runtime.message import Message, Reject, Retry


class Panic(BaseException):
    """Raised like a panic of an extension in Rust."""


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


async def swapped(message: Message, event: Order) -> None: ...
async def single_in_a_batch(events: list[Order], message: Message) -> None: ...
async def twice(event: Order, message: Message, again: Message) -> None: ...
async def no_class(event: Order, message: Message, more: "Callable[[], int]") -> None: ...
async def keyword_only(event: Order, *, message: Message) -> None: ...
async def no_model(event: ThreadPoolExecutor) -> None: ...
async def unannotated(event: Order, message) -> None: ...  # type: ignore[no-untyped-def]
async def unknown(event: "Missing") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        (swapped, "parameter 'message'"),
        (single_in_a_batch, "parameter 'message'"),
        (twice, "parameter 'again'"),
        (no_class, "parameter 'more'"),
        (keyword_only, "parameter 'message'"),
        (no_model, "parameter 'event'"),
        (unannotated, "parameter 'message'"),
        (unknown, "name 'Missing' is not defined"),
        (lambda: None, "it has no parameter"),
    ],
)
def test_a_wrong_signature_is_one_sentence_with_the_handler_and_the_parameter(
    function: Callable[..., Any], wrong: str
) -> None:
    with pytest.raises(HandlerError) as error:
        Router({"order_created": function})
    where = f"{function.__module__}.{function.__qualname__}"
    beginning = f"handler 'order_created': cannot use the signature of {where} ({wrong}); it takes"
    assert str(error.value).startswith(beginning)
    assert "\n" not in str(error.value)


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
    with pytest.raises(Reject, match=r"^unknown type '': CONSUMER_TYPE_FROM says where it is$"):
        router.route(Message(b""))
    with pytest.raises(Reject, match=r"^unknown type 'x{100}'$"):
        router.route(Message(b"", type="x" * 1000))


def test_the_star_gets_the_rest() -> None:
    async def handle(body: bytes) -> None: ...

    router = Router({"order.created": handle, "*": handle})
    assert router.route(Message(b"", type="order.created")).name == "order.created"
    for unknown in ("", "order_deleted", "*"):
        assert router.route(Message(b"", type=unknown)).name == "*"
    assert Router({"*": handle}).route(Message(b"", type="anything")).name == "*"


@pytest.mark.parametrize(
    ("message_type", "name"),
    [
        ("order.created", "order.created"),
        ("order.paid", "order.*"),
        ("order.a.b", "order.*"),
        ("order", "*"),
        ("xorder.paid", "*"),
        ("com.acme.order.created.v1", "com.acme.*.v1"),
        ("com.acme.order.created.v2", "com.acme.*"),
        ("", "*"),
    ],
)
def test_the_longest_pattern_that_fits_a_type_picks_its_handler(
    message_type: str, name: str
) -> None:
    async def handle(body: bytes) -> None: ...

    types = ["*", "com.acme.*", "com.acme.*.v1", "order.*", "order.created"]
    router = Router(dict.fromkeys(types, handle))
    assert router.route(Message(b"", type=message_type)).name == name


def test_a_type_that_no_pattern_takes_is_one_sentence() -> None:
    async def handle(body: bytes) -> None: ...

    router = Router({"order.*": handle, "*.paid": handle})
    for unknown in ("invoice.created", "order"):
        with pytest.raises(Reject, match=f"^unknown type '{unknown}'$"):
            router.route(Message(b"", type=unknown))


def test_a_pattern_is_no_regular_expression() -> None:
    async def handle(body: bytes) -> None: ...

    router = Router({"a.b*": handle, "(": handle})
    assert router.find("a.bc") is router.handlers["a.b*"]
    assert router.find("axbc") is None


def test_a_pattern_looks_at_a_hostile_type_in_linear_time() -> None:
    async def handle(body: bytes) -> None: ...

    router = Router({"*.order.*.created": handle, "*a*a*a*a*b": handle})
    assert router.find(".order." * 200_000) is None
    assert router.find("a" * 1_000_000) is None
    assert router.find("a" * 1_000_000 + "b") is router.handlers["*a*a*a*a*b"]


class Named(Protocol):
    name: str


async def any_class(event: Order, more: Any) -> None: ...
async def protocol(event: Order, more: Named) -> None: ...
async def two_messages(events: list[Order], a: list[Message], b: list[Message]) -> None: ...


@pytest.mark.parametrize("function", [any_class, protocol, two_messages, asyncio, None])
def test_a_signature_that_cannot_be_given_is_one_sentence_at_the_start(function: Any) -> None:
    with pytest.raises(HandlerError, match="handler 'order': cannot use the signature of "):
        Router({"order": function}).give(None)


# The values that `lifespan` yields, and `around`.


class Pool:
    """A resource."""


class Client:
    """Another resource."""


@dataclass
class Shared:
    pool: Pool
    client: Client


@pytest.mark.parametrize("opened", [Shared(Pool(), Client()), Pool()], ids=["dataclass", "object"])
async def test_a_handler_gets_what_lifespan_yielded_by_its_type(opened: object) -> None:
    seen: list[Any] = []

    async def handle(event: Order, pool: Pool, message: Message) -> None:
        seen.extend((event.id, pool, message.id))

    router = Router({"order": handle})
    router.give(opened)
    message = Message(b'{"id": 7}', id="m")
    handler = router.route(message)
    with ThreadPoolExecutor(1) as threads:
        await handler.call([handler.decode(message)], [message], threads)
    assert seen == [7, opened.pool if isinstance(opened, Shared) else opened, "m"]


@pytest.mark.parametrize(
    ("opened", "found"),
    [(None, "no"), (Client(), "no"), (Shared(Pool(), Pool()), "2")],  # type: ignore[arg-type]
)
def test_what_lifespan_does_not_yield_is_one_sentence_with_handler_and_parameter(
    opened: object, found: str
) -> None:
    async def handle(event: Order, pool: Pool) -> None: ...

    router = Router({"order": handle})
    sentence = f"handler 'order': lifespan yields {found} Pool for the parameter 'pool' of "
    with pytest.raises(HandlerError, match=sentence):
        router.give(opened)


async def test_around_wraps_every_call_of_a_handler_and_returns_its_result() -> None:
    steps: list[str] = []

    async def around(call: Callable[[], Awaitable[Any]], message: Any) -> Any:
        steps.append(f"before {message.id}")
        try:
            return await call()
        finally:
            steps.append("after")

    def blocking(body: bytes) -> None:
        steps.append(body.decode())

    async def failing(body: bytes) -> None:
        raise KeyError

    router = Router({"blocking": blocking, "failing": failing}, around=around)
    message = Message(b"body", id="m", type="blocking")
    with ThreadPoolExecutor(1) as threads:
        await router.handlers["blocking"].call([b"body"], [message], threads)
        with pytest.raises(KeyError):
            await router.handlers["failing"].call([b"body"], [message], threads)
    assert steps == ["before m", "body", "after", "before m", "after"]


async def test_around_has_all_messages_of_a_batch() -> None:
    wrapped: list[Any] = []

    async def around(call: Callable[[], Awaitable[Any]], message: Any) -> Any:
        wrapped.append(message)
        return await call()

    async def handle(bodies: list[bytes], messages: list[Message]) -> list[bytes]:
        return [*bodies, *(message.body for message in messages)]

    messages = [Message(b"1"), Message(b"2")]
    with ThreadPoolExecutor(1) as threads:
        handler = Router({"n": handle}, around=around).handlers["n"]
        result = await handler.call([b"a", b"b"], messages, threads)
    assert (wrapped, result) == ([messages], [b"a", b"b", b"1", b"2"])


def test_an_around_and_a_decoder_that_cannot_be_called_are_one_sentence_at_the_start() -> None:
    async def handle(event: Order) -> None: ...

    def around(call: Callable[[], Awaitable[Any]], message: Any) -> Any: ...

    with pytest.raises(HandlerError, match=r"^around in .* must be `async def around"):
        Router({"order": handle}, around=around)
    decoders: Any = {"text/csv": "csv"}
    with pytest.raises(HandlerError, match=r"^DECODERS\['text/csv'\] in .* is not a function$"):
        Router({"order": handle}, decoders=decoders)


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
        with pytest.raises(ValueError, match=r"exceeds the maximum, 1\.2096e"):
            Retry(delay_seconds=seconds)
    assert [Retry(delay_seconds=s).delay_seconds for s in (-1, math.nan)] == [0, 0]
