"""Any message of a producer is handled or dead-lettered with a reason; it ends no consumer, and no log has its body."""

import json
import logging
import math
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import structlog
from pydantic import BaseModel

from consumer_harness import consume
from harness.contract import opened
from harness.servers.sqlite import SqliteFile
from runtime.brokers import make_source
from runtime.brokers.delivery import json_object
from runtime.handlers import (
    Handler,
    HandlerFunction,
)
from runtime.logs import configure_logs
from runtime.message import (
    Message,
    OutgoingMessage,
    Reject,
)
from runtime.operate import letters
from runtime.settings import ConsumerSettings
from steps import start_once


class Order(BaseModel):
    number: int
    items: list[int] = []
    nested: Any = None


class Strict(Order, extra="forbid"):
    """The reasons of its errors name fields of the payload."""


SECRET = "hidden-value"
GOOD = b'{"number": 1}'

REFUSED = {
    "empty": (b"", "Invalid JSON: EOF"),
    "no JSON": (b"hidden-value", "Invalid JSON: expected value at line 1 column 1"),
    "cut off": (GOOD[:-1], "Invalid JSON: EOF"),
    "two documents": (GOOD * 2, "Invalid JSON: trailing characters"),
    "Latin-1": ('{"number": "größe"}'.encode("latin-1"), "Invalid JSON: invalid unicode"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "Invalid JSON: expected value"),
    "UTF-32": (GOOD.decode().encode("utf-32"), "Invalid JSON: expected value"),
    "a BOM": (b"\xef\xbb\xbf" + GOOD, "Invalid JSON: expected value"),
    "a lone surrogate": (b'{"number": "\\ud800"}', "Invalid JSON: "),
    "an encoded surrogate": (b'{"number": "\xed\xa0\x80"}', "Invalid JSON: invalid unicode"),
    "a NUL": (b'{"number": "\x00"}', "Invalid JSON: control character"),
    "binary": (bytes(range(256)), "Invalid JSON: expected"),
    "no object": (b"[1]", "Input should be an object"),
    "null": (b"null", "Input should be an object"),
    "a text": (b'{"number": "hidden-value"}', "number: Input should be a valid integer"),
    "NaN": (b'{"number": NaN}', "number: Input should be a finite number"),
    "an endless number": (b'{"number": 1e999}', "number: Input should be a finite number"),
    "too many digits": (b'{"number": ' + b"9" * 5_000 + b"}", "Invalid JSON: number out of range"),
    "deeply nested": (b'{"nested": ' + b"[" * 100_000, "Invalid JSON: recursion limit"),
    "deeply nested objects": (b'{"nested": ' + b'{"a":' * 100_000, "Invalid JSON: recursion limit"),
    "a million mistakes": (
        b'{"number": 1, "items": [' + b'"x",' * 999_999 + b'"x"]}',
        "1000000 errors",
    ),
    "an unknown field": (b'{"number": 1, "\\u001b[2J\\nforged": 1}', "Extra inputs are not"),
    "an endless name": (
        json.dumps({"number": 1, "x" * 1_000_000: SECRET}).encode(),
        "x" * (500 - len("invalid payload: ")),
    ),
}

TAKEN = {
    "a million elements": b'{"number": 1, "items": [' + b"1," * 999_999 + b"1]}",
    "a number of 4000 digits": b'{"number": ' + b"9" * 4_000 + b"}",
    "a name that comes twice": b'{"number": "hidden-value", "number": 1}',
    "white space": b" \n\t" * 1_000 + GOOD,
    "not a number, where anything may be": b'{"number": 1, "nested": [NaN, Infinity]}',
}


async def strict(event: Strict) -> None: ...


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_rejected_quickly_with_a_short_reason_that_does_not_quote_it(
    case: str,
) -> None:
    body, reason = REFUSED[case]
    began_at = time.process_time()
    with pytest.raises(Reject) as rejection:
        Handler("strict", strict).decode(Message(body))
    assert time.process_time() - began_at < 3
    assert reason in str(rejection.value)
    assert len(str(rejection.value)) <= 500
    assert SECRET not in str(rejection.value)


@pytest.mark.parametrize("case", TAKEN)
def test_unusual_input_is_accepted(case: str) -> None:
    assert isinstance(Handler("strict", strict).decode(Message(TAKEN[case])), Strict)


async def fails_with_it(event: Order) -> None:
    """A handler that raises pydantic's error, which quotes the payload."""
    if event.nested is not None:
        Strict.model_validate({"number": event.nested})


HANDLERS: dict[str, HandlerFunction] = {"order": fails_with_it, "strict": strict}

HOSTILE = [
    OutgoingMessage(b"\xff\xfe" + SECRET.encode(), "strict"),
    OutgoingMessage(REFUSED["a text"][0], "strict"),
    OutgoingMessage(REFUSED["deeply nested"][0], "strict"),
    OutgoingMessage(REFUSED["an unknown field"][0], "strict"),
    OutgoingMessage(b'{"number": 1, "nested": "hidden-value"}', "order"),
    OutgoingMessage(GOOD, "no such type " + "x" * 150),
    OutgoingMessage(GOOD, "line\nforged \x1b[2J", "id\nforged \x1b[2J"),
]


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_on_every_broker_bad_input_is_dead_lettered_and_not_logged(
    settings_for: Callable[..., ConsumerSettings],
    capsys: pytest.CaptureFixture[str],
    log_format: str,
) -> None:
    headers = {"forged": "\x1b[2J\nforged", "größe": "ü" * 1000, "n": 7, "none": None}
    settings = settings_for(
        order_by="body:nested", max_attempts=2, retry_seconds=0.1, retry_max_seconds=0.4
    )
    await start_once(settings)
    source = make_source(settings, 20)
    hostile = HOSTILE
    if settings.broker_url.get_secret_value().startswith(
        "sqs"
    ):  # its publisher refuses such a type
        hostile = [replace(message, type=message.type.replace("\x1b", "")) for message in HOSTILE]
    async with opened(make_source(settings)) as publisher:
        await publisher.publish([OutgoingMessage(GOOD, "order", headers=headers), *hostile])
    configure_logs("json" if log_format == "json" else "console", "info")
    structlog.configure(cache_logger_on_first_use=False)  # or the runtime's loggers stay like that
    try:
        consumer = await consume(
            source,
            settings,
            lambda c: c.handled_count + c.rejected_count > len(HOSTILE),
            HANDLERS,
        )
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    output = capsys.readouterr().out
    assert (consumer.handled_count, consumer.rejected_count) == (1, len(HOSTILE))
    assert SECRET not in output
    assert "\x1b" not in output
    assert not [line for line in output.split("\n") if line.startswith("forged")]
    if source.capabilities.dead_letters:
        async with opened(make_source(settings)) as reader:
            reasons = [letter.reason async for letter in reader.dead_letters(20)]
        assert len(reasons) == len(HOSTILE)
        assert all(0 < len(reason) < 600 and SECRET not in reason for reason in reasons)


# -- values of other programs in the runtime's own fields


@pytest.mark.parametrize(
    ("text", "headers"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b"", {}),
        (b"hidden-value", {}),
        (b"[1]", {}),
        (b"\xff\xfe", {}),
        (b"[" * 100_000, {}),
        (b'{"a": ' * 100_000, {}),
        (b'{"a": ' + b"9" * 5_000 + b"}", {}),
    ],
)
def test_headers_that_are_not_a_json_object_are_ignored(
    text: bytes, headers: dict[str, Any]
) -> None:
    assert json_object(text) == headers


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
async def test_rows_of_another_program_are_messages_too(
    broker: SqliteFile, queue: str, settings_for: Callable[..., ConsumerSettings]
) -> None:
    settings, seen = settings_for(), list[bytes]()

    async def raw(body: bytes) -> None:
        seen.append(body)

    async with opened(make_source(settings)):
        pass  # connecting creates the tables
    insert = "INSERT INTO messages (source, id, type, headers, body) VALUES (?, ?, ?, ?, ?)"
    with closing(sqlite3.connect(broker.file)) as connection, connection:
        for headers in ("not JSON", "[1]", "[" * 100_000):
            connection.execute(insert, (queue, "x" * 1_000_000, "order", headers, GOOD.decode()))
    source = make_source(settings, 5)
    await consume(source, settings, lambda c: c.handled_count == 3, {"raw": raw})
    assert seen == [GOOD] * 3


@pytest.mark.parametrize("unix_seconds", [math.nan, math.inf, -1e300, 1e300])
def test_a_dead_letter_without_a_valid_time_is_listed(unix_seconds: float) -> None:
    assert letters._text_of_time(unix_seconds) == str(unix_seconds)
