"""Handles messages of the type ``order_created``: yours to edit."""

import structlog
from pydantic import AwareDatetime, BaseModel, Field

from ..runtime.message import Message

log = structlog.get_logger()

EXAMPLE = b'{"reference": "A-1001", "occurred_at": "2026-11-22T09:30:00Z"}'


class OrderCreated(BaseModel):
    """The message's JSON. An invalid message becomes a dead letter, with the reason."""

    reference: str = Field(min_length=1)
    occurred_at: AwareDatetime


async def handle(event: OrderCreated, message: Message) -> None:
    """Return to acknowledge the message. Raise `Reject` to make it a dead letter. Any other exception
    retries it later; `Retry` sets the delay.
    """
    # Your work goes here. Make it idempotent, for example with a unique constraint on message.id: if
    # the process or the connection dies before the acknowledgement, the message is redelivered.
    log.info("order_created", reference=event.reference)
