# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Requests to a broker: bounded in time, with the client library's exceptions translated by one table."""

import asyncio
import math
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from ..errors import BrokerError, BrokerUnavailable, MendableRefusal
from ..redaction import redacted

T = TypeVar("T")


class Rule(NamedTuple):
    """These exceptions of a client become this error, with this sentence after the broker's address."""

    exceptions: type[BaseException] | tuple[type[BaseException], ...]
    error: type[BrokerError]
    sentence: str
    """``{error}`` stands for the first line of the exception's text."""
    pattern: str = ""
    """A regular expression that the text must contain, for clients with one exception for many errors."""


COMMON_RULES = (
    Rule(  # the peer closed the connection in a handshake, such as at its restart
        (ssl.SSLEOFError, ssl.SSLZeroReturnError), BrokerUnavailable, "no TLS connection: {error}"
    ),
    Rule(ssl.SSLError, MendableRefusal, "no TLS connection: {error}"),
    Rule((FileNotFoundError, PermissionError), MendableRefusal, "a file of the URL: {error}"),
    Rule(Exception, BrokerUnavailable, "{error}"),
)
"""The last rules of every broker."""


class Requests:
    """Bounds requests to one broker.

    ``address`` is the broker's, without credentials. ``rules`` are tried in order, before `COMMON_RULES`;
    ``exceptions`` are all that the client raises for a request that failed: others are bugs, and pass through.
    """

    def __init__(
        self,
        address: str,
        exceptions: tuple[type[BaseException], ...],
        rules: Sequence[Rule] = (),
        seconds: float = 10.0,
    ) -> None:
        self.address = address
        self.seconds = seconds
        """The time limit of a request that has no other."""
        self._exceptions: tuple[type[BaseException], ...] = (*exceptions, OSError)
        self._rules = (*rules, *COMMON_RULES)

    @asynccontextmanager
    async def bounded(self, seconds: float | None = None) -> AsyncIterator[None]:
        """The context of a request; ``seconds`` is its time limit in place of the usual one, `math.inf` for none.

        Raises BrokerUnavailable or BrokerRefused, with one sentence and the client's exception as its cause.
        """
        seconds = self.seconds if seconds is None else seconds
        task = asyncio.current_task()
        assert task is not None
        cancelling_before = task.cancelling()
        timeout = asyncio.timeout(None if seconds == math.inf else seconds)
        try:
            async with timeout:
                yield
        except asyncio.CancelledError as error:
            if task.cancelling() > cancelling_before:
                raise
            # Some clients cancel the waiters of a lost connection.
            raise self.lost() from error
        except self._exceptions as error:
            if timeout.expired():
                msg = f"{self.address}: timed out after {seconds:g} seconds"
                raise BrokerUnavailable(msg) from None
            raise self.translated(error) from error

    async def answer(self, request: Awaitable[T]) -> T:
        """The answer to one request: several may exceed the time limit when the machine is busy."""
        async with self.bounded():
            return await request

    def translated(self, error: BaseException) -> BrokerError:
        """The BrokerError of the first rule for this exception, or for its cause."""
        rule, found = next(
            (rule, candidate)
            for rule in self._rules
            for candidate in (error, error.__cause__)  # clients wrap the errors of ssl
            if isinstance(candidate, rule.exceptions)
            and re.search(rule.pattern, _first_line(str(candidate)))
        )
        text = _first_line(redacted(str(found))) or type(found).__name__  # masked before it is cut
        return rule.error(f"{self.address}: {rule.sentence.format(error=text)}")

    def lost(self, reason: Any = "") -> BrokerUnavailable:
        """The error of a lost connection."""
        return BrokerUnavailable(
            f"{self.address}: the connection was lost{f': {reason}' if reason else ''}"
        )


async def to_the_end(work: Coroutine[Any, Any, object], seconds: float) -> None:
    """Finish the work, even if this task is cancelled repeatedly. Raises TimeoutError after so many seconds."""
    task = asyncio.create_task(asyncio.wait_for(work, seconds))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()
        raise cancelled
    task.result()


async def together(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all; or raises the first error, once all have ended."""
    outcomes: list[Any] = await asyncio.gather(*work, return_exceptions=True)
    for failure in (outcome for outcome in outcomes if isinstance(outcome, BaseException)):
        raise failure
    return outcomes


def abort(transport: Any) -> None:
    """Close at once. A closed transport with TLS raises in the first versions of Python 3.11."""
    with suppress(AttributeError):
        transport.abort()


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
