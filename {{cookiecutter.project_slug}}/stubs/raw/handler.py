"""What to do with a message of the type ``order_created``: yours to edit."""

import structlog

from ..runtime.message import Message, Reject

log = structlog.get_logger()

EXAMPLE = b"A-1001 created"


async def handle(body: bytes, message: Message) -> None:
    """Return, and the message is done. Raise `Reject`, and it becomes a dead letter. Raise anything
    else, and it comes back later; `Retry` says when.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Reject("the body is not UTF-8") from error
    # Your work goes here. A message can come twice, when the process or the connection dies between
    # the work and its acknowledgement: let the work be the same then, say by a unique message.id.
    log.info("order_created", text=text)
