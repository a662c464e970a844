# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""AMQP's properties and headers as bytes: any that another program sends can be read, and be sent again unchanged.

Importing it replaces parts of pamqp, for the whole process.
"""

import re
import struct
from contextlib import suppress
from typing import Any

from pamqp import commands, constants, decode, encode
from pamqp.commands import Basic

PERSISTENT = 2
COUNTS = ("x-delivery-count", "x-acquired-count")
"""Headers that count earlier deliveries; RabbitMQ 4.3 counts requeues in the second one only."""
OF_THE_DELIVERY = {"CC", *COUNTS}
"""Headers that no copy has: CC would deliver to more queues again; the counts are the old delivery's."""

SIZES = dict.fromkeys(b"tbB", 1) | dict.fromkeys(b"su", 2) | dict.fromkeys(b"Iif", 4)
SIZES |= dict.fromkeys(b"lLdT", 8) | dict.fromkeys(b"D", 5) | dict.fromkeys(b"V\0", 0)
"""The length of a header's value by its type; the values of other types begin with their length."""


def _short_text(value: bytes) -> tuple[int, str]:
    """Invalid UTF-8 becomes \N{REPLACEMENT CHARACTER}, and the text stays short enough to be sent again."""
    end = 1 + value[0]
    text = value[1:end].decode(errors="replace")
    return end, text if text.isascii() else text.encode()[:255].decode(errors="ignore")


def _fields(table: bytes) -> dict[str, bytes]:
    """The bytes of each field of a table; they begin with its name."""
    fields, start = {}, 4
    while start < len(table):
        size, name = _short_text(table[start : start + 256])
        kind, length = table[start + size], table[start + size + 1 :][:4]
        size += 1 + SIZES.get(kind, 4 + int.from_bytes(length))
        fields[name] = table[start : start + size]
        start += size
    return fields


def _table(value: bytes) -> tuple[int, Any]:
    """None for a field that Python cannot represent or that is nested too deeply; names in any encoding."""
    try:  # in place of `suppress`, which costs as much as an empty table
        return decode.field_table(value)
    except (ValueError, ArithmeticError, RecursionError):
        end = 4 + int.from_bytes(value[:4])
    table: dict[str, Any] = {}
    for name, field in _fields(value[:end]).items():
        table[name] = None
        with suppress(ValueError, ArithmeticError, RecursionError):
            _, table[name] = decode.embedded_value(field[1 + field[0] :])
    return end, table


def _timestamp(value: bytes) -> tuple[int, Any]:
    """None after the year 9999."""
    try:
        return decode.timestamp(value)
    except (ValueError, ArithmeticError, OSError):
        return 8, None


def _read_properties(self: Any, flags: int, data: bytes) -> None:
    self.wire = {}
    for name, flag, read in FIELDS:
        if flags & flag:
            size, value = read(data)
            setattr(self, name, value)
            self.wire[name], data = data[:size], data[size:]


def _read_deliver(self: Any, data: bytes) -> None:
    start, self.consumer_tag = _short_text(data)
    self.delivery_tag, self.redelivered = struct.unpack_from(">Q?", data, start)
    size, self.exchange = _short_text(data[start + 9 :])
    _, self.routing_key = _short_text(data[start + 9 + size :])


def _table_value(value: Any) -> bytes:
    """Encodes a float as a double; pamqp would use 32 bits."""
    return b"d" + encode.double(value) if isinstance(value, float) else _encode_value(value)


# Otherwise one such message ends every connection that it is delivered on, and no other message is handled.
decode.METHODS.update(shortstr=_short_text, table=_table, timestamp=_timestamp)
# pamqp looks up the type of each field of each frame, at the cost of reading it.
_Header: Any = Basic.Properties
FIELDS = [(n, flag, decode.METHODS[_Header.amqp_type(n)]) for n, flag in _Header.flags.items()]
_Header.unmarshal, Basic.Deliver.unmarshal = _read_properties, _read_deliver  # type: ignore[method-assign]  # on purpose
_encode_value, encode.encode_table_value = encode.encode_table_value, _table_value
constants.DOMAIN_REGEX["queue-name"] = re.compile("(?s).*")  # RabbitMQ takes any text
# So that the answer has the reason of a refusal.
commands.Connection.Open.valid_responses = ["Connection.OpenOk", "Connection.Close"]


class Copy(Basic.Properties):
    """The properties of a message, to publish it again with these headers: what came is sent byte for byte."""

    def __init__(self, original: Any, headers: dict[str, Any], id: str | None = None) -> None:
        super().__init__()
        for name, field in original.wire.items():
            setattr(self, name, field)
        came, table = original.headers or {}, b""
        fields = _fields(self.headers) if came else {}
        for name, value in headers.items():
            if name not in OF_THE_DELIVERY:
                unchanged = name in fields and came[name] is value
                table += fields[name] if unchanged else encode.field_table({name: value})[4:]
        self.headers: Any = len(table).to_bytes(4) + table
        self.message_id = id or original.message_id
        self.delivery_mode = PERSISTENT
        self.expiration = self.user_id = None  # the broker refuses any user but our own

    def encode_property(self, name: str, value: Any) -> bytes:
        return value if isinstance(value, bytes) else super().encode_property(name, value)
