"""What to do with messages of the type ``order_created``, many at a time: yours to edit."""

import structlog
from pydantic import AwareDatetime, BaseModel, Field

log = structlog.get_logger()

EXAMPLE = b'{"reference": "A-1001", "occurred_at": "2026-11-22T09:30:00Z"}'


class OrderCreated(BaseModel):
    """The message's JSON. One that does not fit becomes a dead letter, with the reason."""

    reference: str = Field(min_length=1)
    occurred_at: AwareDatetime


async def handle(events: list[OrderCreated]) -> None:
    """Return, and all these messages are done. Raise, and they come back later, all of them."""
    # Your work goes here. A message can come twice, in another batch or even in the same: let the work
    # be the same then, say by a unique reference. Who needs more asks for `messages: list[Message]`.
    references = sorted({event.reference for event in events})
    log.info("order_created", references=references)
