"""Tests of the ``order_created`` handler: yours to extend."""

import pytest
from structlog.testing import capture_logs

from order_events.handlers.order_created import (
    EXAMPLE,
    handle,
)
from order_events.runtime.testing import Delivered, deliver


async def test_the_example_is_handled() -> None:
    with capture_logs() as logs:
        assert await deliver(handle, EXAMPLE) == Delivered("handled")
    assert [entry["reference"] for entry in logs] == ["A-1001"]


@pytest.mark.parametrize(
    "body",
    [b"A-1001", b"{}", EXAMPLE.replace(b"A-1001", b""), EXAMPLE.replace(b"2026", b"soon")],
    ids=["not JSON", "no reference", "an empty reference", "not a time"],
)
async def test_another_payload_becomes_a_dead_letter(body: bytes) -> None:
    delivered = await deliver(handle, body)
    assert delivered.outcome == "rejected"
    assert "invalid payload" in delivered.reason
