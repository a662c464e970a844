# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""How every broker's delivery becomes a `Message`, and every dead letter a `DeadLetter`.

Other programs publish too, so a header, an id or a time may have any type or value, or be missing. The functions here
accept any value and never raise: a field that cannot be read gets the value of an absent one.
"""

import hashlib
import json
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import datetime
from types import MappingProxyType
from typing import Any

from pydantic_core import from_json

from ..message import DeadLetter, Message, OutgoingMessage

PREFIX = "x-consumer-"
"""The prefix of the runtime's own headers; all other headers belong to the message."""
ATTEMPTS = f"{PREFIX}attempts"
"""Header: how often a handler failed on the message. A broker's own counter counts deliveries."""
REASON = f"{PREFIX}reason"
"""Header: why the last attempt failed, or why the message became a dead letter."""
DEAD_LETTERED_AT = f"{PREFIX}dead-lettered-at"
"""Header: when the message became a dead letter, in Unix seconds."""
PUBLISHED_AT = f"{PREFIX}published-at"
"""Header: when the message was published, in Unix seconds, if the protocol has no such time or a copy loses it."""
SHORTENED = f"{PREFIX}shortened"
"""Header of a dead letter that was too large for the broker: the length of the whole body, in bytes."""

KEY = "message-key"
PROPERTIES = {
    "content-type": "content_type",
    "content-encoding": "content_encoding",
    "correlation-id": "correlation_id",
    "reply-to": "reply_to",
    KEY: "key",
}
"""The headers that carry these fields of a message, on brokers without a property for them."""
PUBLISHED = [one for one in PROPERTIES.items() if one[1] in OutgoingMessage.__dataclass_fields__]
PROPERTIES |= {name.title(): field for name, field in PROPERTIES.items()}
MOST_ID_BYTES = 255
"""The limit for the id of a CloudEvent, which may have any length: AMQP's message_id takes no more."""
CLOUD_EVENTS = ("ce_", "ce-", "cloudEvents:", "cloudEvents_")
"""How the headers of a CloudEvent begin: on Kafka; on NATS, SQS and HTTP; on AMQP."""
MOST_EVENT_BYTES = 5_000_000
"""The limit for a structured event: its id and type are read before CONSUMER_MAX_BODY_BYTES is checked."""


class MadeUpId(str):
    """The id of a message that was published without one: each delivery gets another."""


def make_message(
    body: Any,
    *,
    id: Any,
    type: Any,
    headers: Any,
    failures: Any = 0,
    published_at: Any = None,
    receipt: Any = None,
    origin: Mapping[str, Any] = MappingProxyType({}),
    properties: Mapping[str, Any] | None = None,
    fallback_id: Any = "",
) -> Message:
    """The delivery as handlers see it; ``failures`` is the value of ATTEMPTS, ``fallback_id`` a broker's own id.

    ``properties`` are the fields of PROPERTIES, if the broker has them; otherwise they are read from the headers.
    """
    body = body if isinstance(body, bytes) else bytes_of(body)
    headers = headers if isinstance(headers, dict) else {}
    texts: dict[str, str] | None = None
    if headers or properties:
        if properties is None:
            found = PROPERTIES.keys() & headers
            texts = {PROPERTIES[name]: text_of(headers[name]) for name in found}
        else:
            texts = {name: text_of(value) for name, value in properties.items() if value}
        if not (id and type):
            event = _cloud_event(body, headers, texts.get("content_type", ""))
            id, type = id or _short(event.get("id")), type or event.get("type")
    message = Message(  # without keywords, which would cost as much as all values
        body,
        text_of(id or fallback_id) or MadeUpId(uuid.uuid4().hex),
        text_of(type) if type else "",
        headers,
        count_of(failures) + 1 if failures else 1,
        time_of(published_at) if published_at else 0.0,
        origin,
        receipt,
    )
    for name, text in texts.items() if texts else ():
        setattr(message, name, text)
    return message


def _cloud_event(body: bytes, headers: Mapping[str, Any], content_type: str) -> Mapping[str, Any]:
    """The attributes of a CloudEvent, binary or structured; empty for another message."""
    if content_type.startswith("application/cloudevents+json"):
        return json_object(body) if len(body) <= MOST_EVENT_BYTES else {}
    for prefix in CLOUD_EVENTS:
        if f"{prefix}type" in headers:
            return {name.removeprefix(prefix): value for name, value in headers.items()}
    return {}


def _short(id: Any) -> str:
    """An id that every broker can store: a longer id is replaced by its hash."""
    text = text_of(id)
    encoded = text.encode()
    return text if len(encoded) <= MOST_ID_BYTES else hashlib.sha256(encoded).hexdigest()


def headers_of(message: OutgoingMessage) -> dict[str, Any]:
    """The headers of the message, with its properties among them, for brokers without such properties."""
    texts = {name: text for name, field in PUBLISHED if (text := getattr(message, field))}
    return {**message.headers, **texts}


def value_reader(place: str, most_bytes: float = math.inf) -> Callable[[Message], object]:
    """A function that reads one value of a message, or None if the message has none. It never raises.

    ``key`` is the key, ``header:customer-id`` a header, ``body:customer.id`` a field of a JSON body; any other place
    is a field of `Message.origin`. A body of more than ``most_bytes``, which becomes a dead letter, is not decoded.
    """
    place, _, name = place.partition(":")

    def in_body(message: Message) -> object:
        if len(message.body) > most_bytes:
            return None
        try:
            value = from_json(message.body)
        except ValueError:  # also for JSON nested too deeply; the handler's decoding rejects it
            return None
        for field in name.split("."):
            value = value.get(field) if isinstance(value, dict) else None
        return value

    if place == "key":
        return lambda message: message.key or None
    if place == "body":
        return in_body
    if place == "header":
        return lambda message: message.headers.get(name)
    return lambda message: message.origin.get(place.replace("-", "_"))


def make_dead_letter(
    message: Message, receipt: Any, *, reason: Any, attempts: Any, dead_lettered_at: Any
) -> DeadLetter:
    """The dead letter for ``dead-letters list``, from the message that a replay would make of it."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    values |= {"receipt": receipt, "attempt": 1}
    if isinstance(message.id, MadeUpId):  # an id that stays the same each time it is read
        values["id"] = hashlib.sha256(message.body).hexdigest()[:32]
    return DeadLetter(
        **values,
        reason=text_of(reason),
        attempts=count_of(attempts),
        dead_lettered_at=seconds_of(dead_lettered_at),
    )


def fit_dead_letter(
    body: bytes, headers: dict[str, Any], fits: Callable[[bytes, dict[str, Any]], bool]
) -> tuple[bytes, dict[str, Any]]:
    """Body and headers that the broker can store: first foreign headers are dropped, then the body is shortened.

    ``fits`` says whether they are within the broker's limit. The smallest form is returned even if it does not fit.
    """
    if fits(body, headers):
        return body, headers
    length = len(body)
    ours = {name: value for name, value in headers.items() if name.startswith(PREFIX)}
    ours[SHORTENED] = len(body)
    while length and not fits(body[:length], ours):
        length //= 2
    return body[:length], ours


def bytes_of(value: object) -> bytes:
    """Bytes unchanged, text in UTF-8; empty for None, which some brokers deliver for an empty body."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return b"" if value is None else str(value).encode(errors="replace")


def text_of(value: object) -> str:
    """Text that every broker can store: valid UTF-8, with U+FFFD in place of other bytes; empty for None."""
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode(errors="replace").decode()  # JSON may contain lone surrogates
    if isinstance(value, (bytes, bytearray, memoryview)):
        return str(value, "utf-8", "replace")
    return "" if value is None else str(value)


def count_of(value: object) -> int:
    """The value as a whole number above 0, if it is a number or text of one; otherwise 0."""
    if isinstance(value, bytes | str):
        text = text_of(value)
        value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    return value if isinstance(value, int) and 0 < value < 1_000_000_000 else 0


def seconds_of(value: Any) -> float:
    """The value as a finite number of at least 0, if it is a number, text of one, or a datetime; otherwise 0."""
    try:  # None, the usual value, must not raise: an exception costs more than the rest
        seconds = float(value.timestamp() if isinstance(value, datetime) else value or 0)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def time_of(value: Any) -> float:
    """As `seconds_of`, but 0 for a Unix time before 2001, such as a producer's own number."""
    seconds = value if isinstance(value, float) else seconds_of(value)
    return seconds if 1e9 < seconds < 1e11 else 0.0


def json_object(text: Any) -> dict[str, Any]:
    """The JSON object in the text or bytes; empty for anything else."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
