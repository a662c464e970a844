"""Handles batches of messages of the type ``order_created``: yours to edit."""

import structlog
from pydantic import AwareDatetime, BaseModel, Field

log = structlog.get_logger()

EXAMPLE = b'{"reference": "A-1001", "occurred_at": "2026-11-22T09:30:00Z"}'


class OrderCreated(BaseModel):
    """The message's JSON. An invalid message becomes a dead letter, with the reason."""

    reference: str = Field(min_length=1)
    occurred_at: AwareDatetime


async def handle(events: list[OrderCreated]) -> None:
    """Return to acknowledge all these messages. An exception retries all of them later."""
    # Your work goes here. Make it idempotent, for example with a unique constraint on the reference: a
    # message can be redelivered, even within one batch. Add `messages: list[Message]` for ids and headers.
    references = sorted({event.reference for event in events})
    log.info("order_created", references=references)
