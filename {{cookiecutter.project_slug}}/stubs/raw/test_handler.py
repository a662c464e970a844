"""Tests of the ``order_created`` handler: yours to extend."""

import pytest
from structlog.testing import capture_logs

from order_events.handlers.order_created import (
    EXAMPLE,
    handle,
)
from order_events.runtime.message import Message, Reject


async def test_the_example_is_handled() -> None:
    with capture_logs() as logs:
        await handle(EXAMPLE, Message(EXAMPLE, id="m-1"))
    assert [entry["text"] for entry in logs] == [EXAMPLE.decode()]


async def test_what_is_not_utf_8_is_rejected() -> None:
    body = b"\xff\xfe"
    with pytest.raises(Reject, match="not UTF-8"):
        await handle(body, Message(body, id="m-1"))
