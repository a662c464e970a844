# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Reads the handlers' signatures when the service starts; then decodes messages and calls the handlers.

A handler is a function; its signature says which payload it takes::

    async def handle(event: OrderCreated, message: Message) -> None   # JSON, validated by pydantic
    async def handle(body: bytes, message: Message) -> None           # the undecoded bytes
    async def handle(events: list[OrderCreated]) -> None              # a batch
    def handle(event: OrderCreated, message: Message) -> None         # blocking: runs in a thread

``message`` is optional; a batch handler may ask for ``messages: list[Message]``.
"""

import contextvars
import inspect
from asyncio import get_running_loop
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from .errors import HandlerError
from .message import REASON_CHARACTERS, Message, Reject

HandlerFunction = Callable[..., Any]

_MOST_ERRORS = 1000


class Handler:
    """One handler function, and how to call it."""

    def __init__(self, name: str, function: HandlerFunction) -> None:
        self.name = name
        self.function = function
        self.blocking = not inspect.iscoroutinefunction(function)
        try:
            if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
                raise TypeError  # calling it would not run its body
            payload_type, *rest = self._parameter_types(function)
            self.batched = get_origin(payload_type) is list
            item_type = get_args(payload_type)[0] if self.batched else payload_type
            message_type = list[Message] if self.batched else Message
            if rest not in ([], [message_type]):
                raise TypeError
            self.wants_message = bool(rest)
            self._adapter = None if item_type is bytes else TypeAdapter(item_type)
        except (TypeError, ValueError, NameError, IndexError, PydanticUserError) as error:
            msg = (
                f"handler {name!r}: cannot use the signature of {_where(function)}; it takes an annotated"
                " payload (a pydantic model, bytes, or a list of one of them) and optionally a Message"
                " (list[Message] for a batch)"
            )
            raise HandlerError(msg) from error

    @staticmethod
    def _parameter_types(function: HandlerFunction) -> list[Any]:
        annotations = get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
        if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
            raise TypeError
        return [annotations[p.name] if p.name in annotations else _refuse() for p in parameters]

    def decode(self, message: Message) -> Any:
        """The payload of the message. Raises Reject with the reason if it does not validate."""
        if self._adapter is None:
            return message.body
        try:
            return self._adapter.validate_json(message.body)
        except ValidationError as error:
            if (count := error.error_count()) > _MOST_ERRORS:
                # Listing a million errors takes seconds, and a gigabyte.
                raise Reject(f"invalid payload: {count} errors") from None
            # Without the input: a reason goes into logs and dead letters.
            details = error.errors(include_input=False, include_url=False, include_context=False)
            reasons = (f"{'.'.join(map(str, d['loc']))}: {d['msg']}".lstrip(": ") for d in details)
            raise Reject(f"invalid payload: {'; '.join(reasons)}"[:REASON_CHARACTERS]) from None
        except BaseException as error:  # a validator of the service's own model failed, or panicked
            raise Reject(f"invalid payload: {type(error).__name__} in the model") from error

    async def call(self, payloads: list[Any], messages: list[Message], threads: Executor) -> None:
        """Run the handler on one message, or on all of them if it takes a batch."""
        arguments: tuple[Any, ...] = (payloads if self.batched else payloads[0],)
        if self.wants_message:
            arguments += (messages if self.batched else messages[0],)
        if self.blocking:
            context = contextvars.copy_context()
            call = (context.run, _call_in_thread, self.function, *arguments)
            result = await get_running_loop().run_in_executor(threads, *call)
            if inspect.isawaitable(result):  # a plain decorator hid that the function is async
                await result
        else:
            await self.function(*arguments)


class Router:
    """The message's type selects its handler; a single one gets every message, the key ``*`` the rest."""

    def __init__(self, functions: Mapping[str, HandlerFunction]) -> None:
        if not functions:
            msg = "HANDLERS in handlers/__init__.py is empty: add a handler"
            raise HandlerError(msg)
        self.handlers = {name: Handler(name, function) for name, function in functions.items()}
        only = next(iter(self.handlers)) if len(self.handlers) == 1 else "*"
        self._rest = self.handlers.get(only)

    @property
    def types(self) -> Sequence[str]:
        return list(self.handlers)

    @property
    def batched(self) -> bool:
        return any(handler.batched for handler in self.handlers.values())

    def route(self, message: Message) -> Handler:
        """The handler of this message. Raises Reject for a type that the service does not know."""
        handler = self.handlers.get(message.type, self._rest)
        if handler is None:
            raise Reject(f"unknown type {message.type[:100]!r}")
        return handler


def _call_in_thread(function: HandlerFunction, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except StopIteration as error:
        # A future rejects StopIteration; before Python 3.11.8 and 3.12.2 it would stay pending.
        msg = "the handler raised StopIteration"
        raise RuntimeError(msg) from error


def _refuse() -> Any:
    raise TypeError


def _where(function: HandlerFunction) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"
