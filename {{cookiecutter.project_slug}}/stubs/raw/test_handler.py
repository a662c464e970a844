"""Tests of the ``order_created`` handler: yours to extend."""

from structlog.testing import capture_logs

from order_events.handlers.order_created import (
    EXAMPLE,
    handle,
)
from order_events.runtime.testing import Delivered, deliver


async def test_the_example_is_handled() -> None:
    with capture_logs() as logs:
        assert await deliver(handle, EXAMPLE) == Delivered("handled")
    assert [entry["text"] for entry in logs] == [EXAMPLE.decode()]


async def test_what_is_not_utf_8_becomes_a_dead_letter() -> None:
    assert await deliver(handle, b"\xff\xfe") == Delivered("rejected", "the body is not UTF-8")
