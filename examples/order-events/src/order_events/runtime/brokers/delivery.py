# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""How every broker's delivery becomes a `Message`, and every dead letter a `DeadLetter`.

Other programs publish too, so a header, an id or a time may be of any type, missing, or nonsense. The functions here
accept any value and never raise: a field that cannot be read gets the value of an absent one.
"""

import json
import math
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..message import DeadLetter, Message

ATTEMPTS = "x-consumer-attempts"
"""Header: how often a handler failed on the message. A broker's own counter counts deliveries."""
REASON = "x-consumer-reason"
"""Header: why the last attempt failed, or why the message became a dead letter."""
DEAD_LETTERED_AT = "x-consumer-dead-lettered-at"
"""Header: when the message became a dead letter, in Unix seconds."""

SHORTENED = "x-consumer-shortened"
"""Header of a dead letter that was too large for the broker: the length of the whole body, in bytes."""
OURS = "x-consumer-"


def make_message(
    body: Any, *, id: Any, type: Any, headers: Any, failures: Any = 0, receipt: Any = None
) -> Message:
    """The delivery as handlers see it. Without an id it gets a random one; ``failures`` is what ATTEMPTS says."""
    return Message(
        body if isinstance(body, bytes) else bytes_of(body),
        text_of(id) or uuid.uuid4().hex,
        text_of(type),
        headers if isinstance(headers, dict) else {},
        count_of(failures) + 1 if failures else 1,
        receipt,
    )


def make_dead_letter(
    body: Any, *, id: Any, type: Any, reason: Any, attempts: Any, dead_lettered_at: Any
) -> DeadLetter:
    """The dead letter as ``dead-letters list`` shows it."""
    return DeadLetter(
        bytes_of(body),
        text_of(id),
        text_of(type),
        text_of(reason),
        count_of(attempts),
        seconds_of(dead_lettered_at),
    )


def fit_dead_letter(
    body: bytes, headers: dict[str, Any], fits: Callable[[bytes, dict[str, Any]], bool]
) -> tuple[bytes, dict[str, Any]]:
    """The body and the headers that the broker can store: first without foreign headers, then the start of the body.

    ``fits`` says whether they are within the broker's limit. The smallest form is returned even if it is not.
    """
    if fits(body, headers):
        return body, headers
    length = len(body)
    ours = {name: value for name, value in headers.items() if name.startswith(OURS)}
    ours[SHORTENED] = len(body)
    while length and not fits(body[:length], ours):
        length //= 2
    return body[:length], ours


def bytes_of(value: object) -> bytes:
    """Bytes as they are, text in UTF-8; nothing for None, which some brokers have for an empty body."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return b"" if value is None else str(value).encode(errors="replace")


def text_of(value: object) -> str:
    """Text that every broker can store: valid UTF-8, with U+FFFD for the rest; empty for None."""
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode(errors="replace").decode()  # JSON may hold lone surrogates
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if value is None:
        return ""
    if isinstance(value, bytearray | memoryview):
        return bytes(value).decode(errors="replace")
    return str(value)


def count_of(value: object) -> int:
    """The whole number above 0 that it is, as a number or as text; else 0."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else 0
    return value if isinstance(value, int) and 0 < value < 1_000_000_000 else 0


def seconds_of(value: Any) -> float:
    """The finite number of at least 0 that it is, as a number or as text; else 0."""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def json_object(text: Any) -> dict[str, Any]:
    """The JSON object that the text or bytes hold; an empty one for anything else."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def decode_json_values(values: dict[str, Any], names: Any) -> None:
    """Decode, in place, the values that are JSON; ``names`` is the JSON list of their names.

    A value that is missing or is not JSON stays unchanged.
    """
    try:
        listed = json.loads(names)
    except (TypeError, ValueError, RecursionError):
        return
    for name in listed if isinstance(listed, list) else ():
        with suppress(KeyError, TypeError, ValueError, RecursionError):
            values[name] = json.loads(values[name])
