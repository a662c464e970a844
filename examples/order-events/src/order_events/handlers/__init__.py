"""The handlers of this service and their shared resources: yours to edit.

`python3 tools/new_handler.py TYPE` adds a handler: its file, its test, and its lines here. A single
handler gets every message. With several, the message's type is the key; "*" gets the rest, and
without that key, the rest becomes dead letters.
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
"""A message of each type, as a producer would send it: for `demo` and for the tests."""


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    """Resources that handlers share, such as a database pool: opened before the first message, closed
    after the last.
    """
    yield
