# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Order by key, by ``CONSUMER_ORDER_BY``: messages with equal keys are handled one after the other."""

from collections import deque
from collections.abc import Callable

from pydantic_core import from_json

from .brokers.buffer import Buffer
from .message import Message


def key_reader(order_by: str) -> Callable[[Message], str | None]:
    """Reads the key from a message; None for a message without one, which waits for no other. Never raises.

    ``header:customer-id`` is a header, ``body:customer.id`` a field of a JSON body. 7 and "7" are equal.
    """
    place, _, name = order_by.partition(":")

    def in_header(message: Message) -> str | None:
        return _text(message.headers.get(name))

    def in_body(message: Message) -> str | None:
        try:
            value = from_json(message.body)
        except ValueError:  # also for JSON nested too deeply; the handler's decoding rejects it
            return None
        for field in name.split("."):
            value = value.get(field) if isinstance(value, dict) else None
        return _text(value)

    return in_header if place == "header" else in_body


def _text(value: object) -> str | None:
    return None if value is None else str(value)


class OrderedBuffer(Buffer):
    """At most one message of each key is in flight; the next one can be taken when that one is settled.

    Keys take turns: the next message of a key queues behind those that can be taken already, so no key starves
    another.
    """

    def __init__(self, key_of: Callable[[Message], str | None]) -> None:
        super().__init__()
        self._key_of = key_of
        self._keys: dict[Message, str | None] = {}  # of all that are here, in the order of delivery
        self._keys_in_flight: dict[Message, str] = {}
        self._queues: dict[str, deque[Message]] = {}  # behind the one in flight, or takeable

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, message: Message) -> None:
        key = self._keys[message] = self._key_of(message)
        if key is not None and key in self._queues:
            self._queues[key].append(message)
            return
        if key is not None:
            self._queues[key] = deque()
        super().put(message)

    async def get(self) -> Message:
        message = await super().get()
        if (key := self._keys.pop(message)) is not None:
            self._keys_in_flight[message] = key
        return message

    def settled(self, message: Message) -> None:
        if (key := self._keys_in_flight.pop(message, None)) is None:
            return
        if message.shutdown is not None and message.shutdown.event.is_set():
            return  # a shutdown requeues the messages that wait for their key: no worker may take one
        if self._queues[key]:
            super().put(self._queues[key].popleft())
        else:
            del self._queues[key]

    def take_all(self) -> list[Message]:
        messages = list(self._keys)
        self._keys.clear()
        self._messages.clear()
        self._queues = {key: deque() for key in self._keys_in_flight.values()}
        return messages
