"""Tests of the ``order_created`` handler: yours to extend."""

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from order_events.handlers.order_created import (
    EXAMPLE,
    OrderCreated,
    handle,
)
from order_events.runtime.message import Message


async def test_the_example_is_handled() -> None:
    event = OrderCreated.model_validate_json(EXAMPLE)
    with capture_logs() as logs:
        await handle(event, Message(EXAMPLE, id="m-1"))
    assert [entry["reference"] for entry in logs] == ["A-1001"]


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
