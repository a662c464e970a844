"""What to do with a message of the type ``order_created``: yours to edit."""

import structlog
from pydantic import AwareDatetime, BaseModel, Field

from ..runtime.message import Message

log = structlog.get_logger()

EXAMPLE = b'{"reference": "A-1001", "occurred_at": "2026-11-22T09:30:00Z"}'


class OrderCreated(BaseModel):
    """The message's JSON. One that does not fit becomes a dead letter, with the reason."""

    reference: str = Field(min_length=1)
    occurred_at: AwareDatetime


async def handle(event: OrderCreated, message: Message) -> None:
    """Return, and the message is done. Raise `Reject`, and it becomes a dead letter. Raise anything
    else, and it comes back later; `Retry` says when.
    """
    # Your work goes here. A message can come twice, when the process or the connection dies between
    # the work and its acknowledgement: let the work be the same then, say by a unique message.id.
    log.info("order_created", reference=event.reference)
