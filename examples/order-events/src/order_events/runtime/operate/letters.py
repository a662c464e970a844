# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Single dead letters: the filters of commands, the display of a letter, and `try`, which calls handlers on copies."""

import argparse
import base64
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, nullcontext, suppress
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from pydantic_core import to_json

from ..brokers.dead_letters import Selection
from ..brokers.source import Broker
from ..consumer import Lifespan
from ..errors import BrokerRefused
from ..handlers import Router
from ..message import DeadLetter, OutgoingMessage
from ..redaction import redacted_value
from ..telemetry import NO_HANDLER
from ..testing import Settlements

T = TypeVar("T")
Closing = aclosing[AsyncGenerator[T, None]]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MOST_DIGITS = 12


def closing(steps: AsyncIterator[T]) -> Closing[T]:
    """A context that ends the reading of dead letters: until then, brokers may hide these from other readers."""
    return aclosing(cast("AsyncGenerator[T, None]", steps))


def add_filters(parser: argparse.ArgumentParser, limit: int | None = None) -> None:
    """``limit`` is the default of --limit; None means all."""
    about_ids = "only letters with this message id; repeatable"
    parser.add_argument("--id", dest="ids", metavar="ID", action="append", help=about_ids)
    parser.add_argument("--type", help="only letters of this type; * stands for any text")
    parser.add_argument("--reason", default="", help="only letters with this text in the reason")
    before = "only letters from before TIME: 2026-11-30T08:15 (UTC), or 15m, 3h or 2d ago"
    parser.add_argument("--before", metavar="TIME", type=time_of, help=before)
    after = "only letters from TIME or later"
    parser.add_argument("--after", metavar="TIME", type=time_of, help=after)
    about_limit = f"maximum number (default {'all' if limit is None else limit})"
    parser.add_argument("--limit", type=whole_number, default=limit, help=about_limit)


def selection_of(arguments: argparse.Namespace) -> Selection:
    """The letters that a command selects; the command may have only some of the filters."""
    given = {name: getattr(arguments, name, None) for name in Selection.__dataclass_fields__}
    if given["ids"] is not None:
        given["ids"] = frozenset(given["ids"])  # there may be thousands
    return Selection(**{name: value for name, value in given.items() if value is not None})


def time_of(text: str) -> float:
    """Unix seconds. Raises ArgumentTypeError."""
    with suppress(ValueError, OverflowError):
        if text[-1:] in _UNITS and text[:-1].isdecimal():
            return time.time() - int(text[:-1]) * _UNITS[text[-1]]
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    msg = f"{text[:50]!r} is not a time: write 2026-11-30T08:15, or 15m, 3h or 2d"
    raise argparse.ArgumentTypeError(msg)


def whole_number(text: str) -> int:
    if not text.isdecimal() or len(text) > MOST_DIGITS or not int(text):
        msg = f"{text[:50]!r} is not a whole number above 0 of at most {MOST_DIGITS} digits"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def shown(letter: DeadLetter, *, body: bool = False, headers: bool = False) -> dict[str, Any]:
    """A letter for JSON: redacted, except the body, which is unchanged, and in base64 unless it is UTF-8."""
    about = {
        "id": letter.id,
        "type": letter.type,
        "dead_lettered_at": _text_of_time(letter.dead_lettered_at),
        "attempts": letter.attempts,
        "reason": letter.reason,
    }
    if headers:
        about |= {"headers": dict(letter.headers), "key": letter.key, "origin": dict(letter.origin)}
    result: dict[str, Any] = redacted_value(about)
    if body:
        try:
            result["body"] = letter.body.decode()
        except UnicodeDecodeError:
            result["body_base64"] = base64.b64encode(letter.body).decode()
    return result


def _text_of_time(unix_seconds: float) -> str:
    with suppress(ValueError, OverflowError, OSError):  # beyond the years of datetime
        return datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="seconds")
    return str(unix_seconds)


async def changing(source: Broker, selection: Selection, *, replay: bool) -> Closing[int]:
    """A replay or a purge, as a context manager; it yields the number so far, after each step."""
    if replay:
        await source.prepare()
        return closing(source.replay_dead_letters(selection))
    return closing(source.purge_dead_letters(selection))


class _Recorder(Settlements):
    """Checks the messages that handlers publish, and does not send them."""

    def __init__(self, source: Broker) -> None:
        super().__init__(source.settings)
        self._source = source

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        for message in messages:
            self._source.destination_of(message)
            # No broker takes a message that this refuses.
            to_json(dict(message.headers), bytes_mode="base64")
            if len(message.body) > (self._source.largest_body_bytes or math.inf):
                msg = f"a body of {len(message.body)} bytes is larger than the broker accepts"
                raise BrokerRefused(msg)
        await super().publish(messages)


async def try_handlers(
    source: Broker, router: Router, lifespan: Lifespan | None, reading: AsyncIterator[DeadLetter]
) -> AsyncIterator[dict[str, Any]]:
    """Call the handler of each letter in turn; yields the outcomes. Effects outside the broker are real."""
    # All are read before the first is tried: letters that a broker hides during reading are visible again.
    async with closing(reading) as found:
        letters = [one async for one in found]
    async with lifespan() if lifespan is not None else nullcontext() as opened:
        router.give(opened)
        for letter in letters:
            recorder, began = _Recorder(source), time.monotonic()
            await recorder.handle(router, [letter], alone=True)
            outcome = recorder.settled[letter]
            published = [{"to": o.to, "type": o.type, "id": o.id} for o in recorder.published]
            yield redacted_value(
                {"id": letter.id, "type": letter.type, "handler": letter.handler or NO_HANDLER}
                | {"outcome": outcome.outcome, "reason": outcome.reason, "published": published}
                | {"seconds": round(time.monotonic() - began, 3)}
            )
