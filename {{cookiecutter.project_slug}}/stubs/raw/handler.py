"""Handles messages of the type ``order_created``: yours to edit."""

import structlog

from ..runtime.message import Message, Reject

log = structlog.get_logger()

EXAMPLE = b"A-1001 created"


async def handle(body: bytes, message: Message) -> None:
    """Return to acknowledge the message. Raise `Reject` to make it a dead letter. Any other exception
    retries it later; `Retry` sets the delay.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Reject("the body is not UTF-8") from error
    # Your work goes here. Make it idempotent, for example with a unique constraint on message.id: if
    # the process or the connection dies before the acknowledgement, the message is redelivered.
    log.info("order_created", text=text)
