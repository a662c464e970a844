"""The handlers of this service, and what they share: yours to edit.

`python3 tools/new_handler.py NAME` adds a handler: its file, its test, and its lines here. A message's
type picks its handler; a service with one handler sends it everything.
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
"""A message of each type, as a publisher would send it: for `demo`, and for the tests."""


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    """What the handlers share, say a database pool: opened before the first message, closed after
    the last.
    """
    yield
