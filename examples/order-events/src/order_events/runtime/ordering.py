# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""The key of a message, by ``CONSUMER_ORDER_BY``: those with equal keys are handled one after the other."""

import re
from collections.abc import Callable

from pydantic_core import from_json

from .message import Message

ORDER_BY = re.compile(r"(header|body):.+")


def key_reader(order_by: str) -> Callable[[Message], str | None]:
    """Reads the key from a message; None for one that has none, which waits for nobody. Never raises.

    ``header:customer-id`` is a header, ``body:customer.id`` a field of a JSON body. 7 and "7" are equal.
    """
    place, _, name = order_by.partition(":")

    def in_header(message: Message) -> str | None:
        return _text(message.headers.get(name))

    def in_body(message: Message) -> str | None:
        try:
            value = from_json(message.body)
        except ValueError:  # also what is nested too deeply; the handler's decoding says so
            return None
        for field in name.split("."):
            value = value.get(field) if isinstance(value, dict) else None
        return _text(value)

    return in_header if place == "header" else in_body


def _text(value: object) -> str | None:
    return None if value is None else str(value)
