"""Tests of the ``order_created`` handler: yours to extend."""

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from order_events.handlers.order_created import (
    EXAMPLE,
    OrderCreated,
    handle,
)

EVENT = OrderCreated.model_validate_json(EXAMPLE)
OTHER_EVENT = EVENT.model_copy(update={"reference": "A-1002"})


async def handled(events: list[OrderCreated]) -> list[list[str]]:
    """The references that handling these events logs, for each call."""
    with capture_logs() as logs:
        await handle(events)
    return [entry["references"] for entry in logs]


async def test_a_batch_is_handled_at_once() -> None:
    assert await handled([EVENT, OTHER_EVENT]) == [["A-1001", "A-1002"]]


async def test_an_event_that_comes_twice_is_handled_once() -> None:
    assert await handled([EVENT, EVENT]) == [["A-1001"]]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"A-1001", id="not JSON"),
        pytest.param(b"{}", id="no reference"),
        pytest.param(EXAMPLE.replace(b"A-1001", b""), id="an empty reference"),
        pytest.param(EXAMPLE.replace(b"2026", b"soon"), id="not a time"),
    ],
)
def test_another_payload_is_refused(body: bytes) -> None:
    with pytest.raises(ValidationError):
        OrderCreated.model_validate_json(body)
