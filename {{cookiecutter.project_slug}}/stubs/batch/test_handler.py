"""Tests of the ``order_created`` handler: yours to extend."""

import pytest
from structlog.testing import capture_logs

from order_events.handlers.order_created import (
    EXAMPLE,
    handle,
)
from order_events.runtime.testing import (
    Delivered,
    deliver,
    deliver_batch,
)

OTHER = EXAMPLE.replace(b"A-1001", b"A-1002")


async def handled(*bodies: bytes) -> list[list[str]]:
    """The references that handling these messages logs, for each call."""
    with capture_logs() as logs:
        delivered = await deliver_batch(handle, bodies)
    assert delivered == [Delivered("handled")] * len(bodies)
    return [entry["references"] for entry in logs]


async def test_a_batch_is_handled_at_once() -> None:
    assert await handled(EXAMPLE, OTHER) == [["A-1001", "A-1002"]]


async def test_an_event_that_comes_twice_is_handled_once() -> None:
    assert await handled(EXAMPLE, EXAMPLE) == [["A-1001"]]


@pytest.mark.parametrize(
    "body",
    [b"A-1001", b"{}", EXAMPLE.replace(b"A-1001", b""), EXAMPLE.replace(b"2026", b"soon")],
    ids=["not JSON", "no reference", "an empty reference", "not a time"],
)
async def test_another_payload_becomes_a_dead_letter(body: bytes) -> None:
    delivered = await deliver(handle, body)
    assert delivered.outcome == "rejected"
    assert "invalid payload" in delivered.reason
