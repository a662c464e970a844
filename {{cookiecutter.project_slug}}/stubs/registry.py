"""The handlers of this service, and what they share: yours to edit.

To add a handler, copy a file and its test, and add its name here. A message's type picks its handler; a
service with one handler sends it everything.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from ..runtime.handlers import HandlerFunction
from . import (
    order_created,
)

HANDLERS: Mapping[str, HandlerFunction] = {
    "order_created": order_created.handle,
}

EXAMPLES: Mapping[str, bytes] = {
    "order_created": order_created.EXAMPLE,
}
"""A message of each type, as a publisher would send it: `demo` publishes them, tests start from them."""


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    """What all handlers share, such as a database pool: open before the first message, closed after the last."""
    yield
