"""`deliver`: the outcome of a message in the consumer's own code."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pydantic import BaseModel

from runtime.errors import HandlerError
from runtime.handlers import Handles
from runtime.message import Failed, Message, OutgoingMessage, Pause, Reject, Retry
from runtime.testing import Delivered, deliver, deliver_batch


class Order(BaseModel):
    reference: str


class Client(list[str]):
    """A resource that lifespan yields."""


@asynccontextmanager
async def lifespan() -> AsyncIterator[Client]:
    client = Client(["opened"])
    yield client
    client.append("closed")


async def handle(order: Order, message: Message, client: Client) -> OutgoingMessage | None:
    client.append(message.id)
    match order.reference:
        case "later":
            raise Retry("not in stock", delay_seconds=60)
        case "never":
            raise Reject("a negative total")
        case "down":
            raise ConnectionError("refused")
        case "long" if message.stopping.is_set():
            raise Retry
    return OutgoingMessage(order, "shipped", to="queue:shipments")


async def test_a_handled_message_says_what_its_handler_published() -> None:
    delivered = await deliver(handle, {"reference": "A-1"}, given=Client())
    assert delivered.outcome == "handled"
    [published] = delivered.published
    assert (published.to, published.body) == ("queue:shipments", b'{"reference":"A-1"}')
    message = Message(b'{"reference": "A-1"}', id="m-1")
    for _ in range(2):
        again = await deliver(handle, message, given=Client())
        assert [one.id for one in again.published] == [published.id]


async def test_a_retry_says_in_how_many_seconds_and_why() -> None:
    delivered = await deliver(handle, Order(reference="later"), given=Client())
    assert delivered == Delivered("retried", "Retry: not in stock", 60)


async def test_any_other_failure_is_retried_with_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUMER_RETRY_SECONDS", "7")
    delivered = await deliver(handle, Order(reference="down"), given=Client())
    assert (delivered.outcome, delivered.reason) == ("retried", "ConnectionError: refused")
    assert delivered.retry_seconds == pytest.approx(7, rel=0.5)


async def test_the_last_attempt_is_a_dead_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUMER_MAX_ATTEMPTS", "3")
    message = Message(b'{"reference": "down"}', attempt=3)
    delivered = await deliver(handle, message, given=Client())
    assert delivered.outcome == "rejected"
    assert "failed 3 times" in delivered.reason


async def test_a_rejection_and_an_invalid_payload_say_why() -> None:
    rejected = await deliver(handle, Order(reference="never"), given=Client())
    assert rejected == Delivered("rejected", "a negative total")
    client = Client()
    invalid = await deliver(handle, b"{}", given=client)
    assert invalid == Delivered("rejected", "invalid payload: reference: Field required")
    assert client == []


async def test_during_a_shutdown_a_long_handler_is_requeued() -> None:
    delivered = await deliver(handle, Order(reference="long"), given=Client(), stopping=True)
    assert delivered == Delivered("retried", "requeued", 0)


async def test_the_lifespan_is_opened_and_closed() -> None:
    seen: list[Client] = []

    async def look(order: Order, client: Client) -> None:
        assert client == ["opened"]
        seen.append(client)

    assert (await deliver(look, Order(reference="A-1"), lifespan=lifespan)).outcome == "handled"
    assert seen == [["opened", "closed"]]


async def test_what_the_handler_wants_and_does_not_get_is_one_sentence() -> None:
    with pytest.raises(HandlerError, match="no Client for the parameter 'client'"):
        await deliver(handle, Order(reference="A-1"))


async def test_a_blocking_handler_runs_in_a_thread() -> None:
    def block(body: bytes) -> None:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()

    assert await deliver(block, b"x") == Delivered("handled")


async def test_a_batch_handler_gets_all_and_each_message_has_its_outcome() -> None:
    sizes = []

    async def batch(orders: list[Order], messages: list[Message]) -> list[Failed]:
        sizes.append(len(orders))
        return [Failed(messages[1], Reject("bad"))]

    bodies = [Order(reference="A-1"), Order(reference="A-2"), b"{}", Order(reference="A-3")]
    outcomes = [one.outcome for one in await deliver_batch(batch, bodies)]
    assert outcomes == ["handled", "rejected", "rejected", "handled"]
    assert sizes == [3]
    assert (await deliver(batch, bodies[0])).outcome == "retried"  # IndexError


async def test_a_pause_says_for_how_long_and_why() -> None:
    async def pause(order: Order) -> None:
        raise Pause(30, "no database")

    delivered = await deliver(pause, Order(reference="A-1"))
    assert delivered == Delivered("retried", "Pause: no database", 30)


async def test_what_handles_says_of_a_handler_holds_too() -> None:
    own = Handles(handle, max_attempts=1, concurrency=2, reject_on=(ValueError,))
    delivered = await deliver(own, Order(reference="down"), given=Client())
    assert delivered.outcome == "rejected"


async def test_a_pause_and_many_failures_and_limits_of_a_handler_have_their_outcomes() -> None:
    async def pause(body: bytes) -> None:
        raise Pause(5, "down")

    async def fail(body: bytes) -> None:
        raise ConnectionError

    assert (await deliver(pause, b"")).outcome == "retried"
    assert {one.outcome for one in await deliver_batch(fail, [b""] * 30)} == {"retried"}
    rejected = await deliver(Handles(fail, concurrency=1, reject_on=(OSError,)), b"")
    assert rejected.outcome == "rejected"
