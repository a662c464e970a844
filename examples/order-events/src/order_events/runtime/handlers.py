# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Reads the handlers' signatures when the service starts; then decodes messages and calls the handlers.

A handler is a function; its signature says what it takes::

    async def handle(event: OrderCreated, message: Message) -> None   # JSON, validated by pydantic
    async def handle(event: OrderCreated | None) -> None              # None for an empty body, a tombstone
    async def handle(body: bytes, message: Message) -> None           # the undecoded bytes
    async def handle(events: list[OrderCreated]) -> None              # a batch
    def handle(event: OrderCreated, message: Message) -> None         # blocking: runs in a thread
    async def handle(event: OrderCreated, pool: Pool) -> None         # what `lifespan` yields, by its type

``message`` is optional; a batch handler may ask for ``messages: list[Message]``. A handler returns nothing, or the
`OutgoingMessage`s to publish; for a batch also a `Failed` for each message that failed.
"""

import contextvars
import inspect
import math
import re
from asyncio import Semaphore, get_running_loop
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from .errors import HandlerError
from .formats import DECODERS, Decoder, unpack
from .message import REASON_CHARACTERS, Message, Reject, Retry
from .redaction import redacted
from .settings import ConsumerSettings


@dataclass(frozen=True)
class Handles:
    """A function in HANDLERS with its own limits; the settings apply to the limits that are not given."""

    function: Callable[..., Any]
    seconds: Annotated[float, Field(ge=0, le=86_400)] | None = None
    """The time limit, in place of CONSUMER_HANDLER_SECONDS."""
    max_attempts: Annotated[int, Field(ge=1)] | None = None
    """The delivery attempts, in place of CONSUMER_MAX_ATTEMPTS."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """The maximum of concurrent calls. Further messages wait in the buffer, where they occupy no worker."""
    reject_on: tuple[type[BaseException], ...] = ()
    """Exceptions that make a message a dead letter at once."""


HandlerFunction = Callable[..., Any] | Handles
"""A value of HANDLERS."""
Around = Callable[[Callable[[], Awaitable[Any]], Any], Awaitable[Any]]
"""``async def around(call, message)`` awaits ``call()`` and returns its result. A batch has a list of messages."""

_MOST_ERRORS = 1000
NOT_RAISED = "_not_raised_by_the_handler"


class Handler:
    """One handler function, and how to call it."""

    def __init__(
        self,
        name: str,
        function: HandlerFunction,
        decoders: Mapping[str, Decoder] = DECODERS,
        around: Around | None = None,
    ) -> None:
        self.name = name
        self.own = _checked(name, function) if isinstance(function, Handles) else Handles(function)
        self.function = function = self.own.function
        self.blocking = self.in_thread = not inspect.iscoroutinefunction(function)
        self._decoders, self._decodes_all = decoders, "" in decoders
        self._around = around
        flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
        self._is_plain = bool(flags & inspect.CO_COROUTINE)  # no partial, none that is only marked
        self._message_at, self._wanted = 0, dict[str, Any]()
        parameter = ""
        try:
            if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
                raise TypeError("it is a generator")  # calling it would not run its body
            annotations = get_type_hints(function)
            parameters = inspect.signature(function).parameters
            self.has_result = annotations.get("return") is not type(None)
            for place, (parameter, declared) in enumerate(parameters.items()):
                kind = annotations[parameter]
                if declared.kind not in (declared.POSITIONAL_ONLY, declared.POSITIONAL_OR_KEYWORD):
                    raise TypeError
                if place == 0:
                    self._read_payload_type(kind)
                    continue
                self._wanted[parameter] = kind
                if not self._message_at and kind == (list[Message] if self.batched else Message):
                    self._message_at = place
                elif not isinstance(kind, type) or kind is Message:
                    raise TypeError
                else:
                    isinstance(None, kind)  # raises TypeError for a Protocol, or Any
            if not parameters:
                raise TypeError("it has no parameter")
        except Exception as error:  # the annotations or pydantic may raise anything
            what = f"parameter {parameter!r}" if parameter else error
            raise HandlerError(
                f"handler {name!r}: cannot use the signature of {_where(function)} ({what}); it takes an annotated"
                " payload (a pydantic model, bytes, or a list of one of them), and optionally a Message"
                " (list[Message] for a batch) and classes of what lifespan yields"
            ) from error
        self._arguments = [None] * len(self._wanted)
        self._is_simple = self._is_plain and not (self.batched or self._wanted or around)

    def _read_payload_type(self, kind: Any) -> None:
        self.batched = get_origin(kind) is list
        item_type = get_args(kind)[0] if self.batched else kind
        optional = get_origin(item_type) in (Union, UnionType)
        self._takes_tombstones = optional and type(None) in get_args(item_type)
        self._adapter = None if item_type in (bytes, bytes | None) else TypeAdapter(item_type)

    def limit(self, settings: ConsumerSettings) -> None:
        """Apply the settings to the limits that are not given."""
        own, seconds = self.own, settings.handler_seconds
        self.seconds = (seconds if own.seconds is None else own.seconds) or math.inf
        self.max_attempts = own.max_attempts or settings.max_attempts
        self.slots = [Semaphore(own.concurrency)] if own.concurrency and self.batched else []

    def rejects(self, failure: BaseException) -> bool:
        is_its_own = not (isinstance(failure, Retry) or vars(failure).get(NOT_RAISED))
        return is_its_own and isinstance(failure, self.own.reject_on)

    def give(self, opened: Any) -> None:
        """Find the handler's resources in what ``lifespan`` yielded: by class, or in a field of a dataclass."""
        found = [opened]
        if is_dataclass(opened):
            found += [getattr(opened, field.name) for field in fields(opened)]
        for place, (name, kind) in enumerate(self._wanted.items()):
            if place + 1 == self._message_at:
                continue
            fitting = [one for one in found if isinstance(one, kind)]
            if len(fitting) != 1:
                raise HandlerError(
                    f"handler {self.name!r}: lifespan yields {len(fitting) or 'no'} {kind.__name__}"
                    f" for the parameter {name!r} of {_where(self.function)}"
                )
            self._arguments[place] = fitting[0]

    def decode(self, message: Message) -> Any:
        """The payload of the message. Raises Reject with the reason if it does not validate; Retry if a decoder does."""
        body: Any = message.body
        if body and (message.content_encoding or message.content_type or self._decodes_all):
            body = unpack(message, {} if self._adapter is None else self._decoders)
        if self._takes_tombstones and not body:
            return None
        if self._adapter is None:
            return body
        try:
            if isinstance(body, bytes):
                return self._adapter.validate_json(body)
            return self._adapter.validate_python(body)
        except ValidationError as error:
            if (count := error.error_count()) > _MOST_ERRORS:
                # Listing a million errors takes seconds and a gigabyte.
                raise Reject(f"invalid payload: {count} errors") from None
            # Without the input: the reason goes into logs and dead letters.
            details = error.errors(include_input=False, include_url=False, include_context=False)
            reasons = (f"{'.'.join(map(str, d['loc']))}: {d['msg']}".lstrip(": ") for d in details)
            text = f"invalid payload: {'; '.join(reasons)}"
            text = redacted(text[: 20 * REASON_CHARACTERS])  # a field's name may have megabytes
            raise Reject(text[:REASON_CHARACTERS]) from None
        except BaseException as error:  # a validator of the service's own model failed, or panicked
            raise Reject(f"invalid payload: {type(error).__name__} in the model") from error

    def call(self, payloads: list[Any], messages: list[Message], threads: Executor) -> Any:
        """The awaitable call of the handler, with one message, or with all of them for a batch handler."""
        if self._is_simple:  # no coroutine of its own, since this runs for each message
            return self.function(payloads[0])
        message: Any = messages if self.batched else messages[0]
        arguments = [payloads if self.batched else payloads[0], *self._arguments]
        if self._message_at:
            arguments[self._message_at] = message
        if self._around is not None:
            return self._around(lambda: self._run(arguments, threads, message), message)
        if self._is_plain:
            return self.function(*arguments)
        return self._run(arguments, threads, message)

    async def _run(self, arguments: list[Any], threads: Executor, message: Any) -> Any:
        if not self.blocking:
            return await self.function(*arguments)
        call = (contextvars.copy_context().run, call_in_thread, message, self.function, *arguments)
        result = await get_running_loop().run_in_executor(threads, *call)
        if inspect.isawaitable(result):  # a plain decorator hid that the function is async
            self.in_thread = False
            return await result
        return result


class Router:
    """The message's type selects its handler; a single handler gets every message. ``*`` in a key stands for any text."""

    def __init__(
        self,
        functions: Mapping[str, HandlerFunction],
        decoders: Mapping[str, Decoder] | None = None,
        around: Around | None = None,
    ) -> None:
        if not functions:
            raise HandlerError("HANDLERS in handlers/__init__.py is empty: add a handler")
        if around is not None and not inspect.iscoroutinefunction(around):
            msg = "around in handlers/__init__.py must be `async def around(call, message)`"
            raise HandlerError(msg)
        known = {**DECODERS, **(decoders or {})}
        for content_type, decoder in known.items():
            if not callable(decoder):
                msg = f"DECODERS[{content_type!r}] in handlers/__init__.py is not a function"
                raise HandlerError(msg)
        self.handlers = {
            name: Handler(name, function, known, around) for name, function in functions.items()
        }
        by_length = sorted(self.handlers, key=len, reverse=True)  # the most specific one first
        self._patterns = [(_pattern(key), self.handlers[key]) for key in by_length if "*" in key]
        self._only = self.handlers[by_length[0]] if len(by_length) == 1 else None
        self.types = list(self.handlers)
        self.batched = any(handler.batched for handler in self.handlers.values())
        items = self.handlers.items()
        most = {name: one.own.concurrency for name, one in items if not one.batched}
        self.most_calls = {name: count for name, count in most.items() if count}

    def give(self, opened: Any) -> None:
        """Give the handlers what ``lifespan`` yielded. Raises HandlerError."""
        for handler in self.handlers.values():
            handler.give(opened)

    def find(self, message_type: str) -> Handler | None:
        if handler := self.handlers.get(message_type) or self._only:
            return handler
        fitting = (one for pattern, one in self._patterns if pattern.fullmatch(message_type))
        return next(fitting, None)

    def route(self, message: Message) -> Handler:
        """The handler of this message. Raises Reject if no handler has its type."""
        handler = self._only or self.handlers.get(message.type) or self.find(message.type)
        if handler is None:
            where = "" if message.type else ": CONSUMER_TYPE_FROM says where it is"
            raise Reject(f"unknown type {redacted(message.type)[:100]!r}{where}")
        return handler


def not_raised(failure: BaseException) -> BaseException:
    """Marks a failure that the handler did not raise, to which `Handles.reject_on` does not apply."""
    vars(failure)[NOT_RAISED] = True
    return failure


def _pattern(key: str) -> re.Pattern[str]:
    """The texts between the stars match from left to right, without backtracking: the time is linear."""
    first, *middle, last = map(re.escape, key.split("*"))
    found = "".join(f"(?>.*?{text})" for text in middle)
    return re.compile(f"{first}{found}.*{last}", re.DOTALL)


def _checked(name: str, handles: Handles) -> Handles:
    try:
        return TypeAdapter(Handles).validate_python(vars(handles))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        msg = f"handler {name!r}: Handles({first['loc'][0]}): {first['msg']}"
        raise HandlerError(msg) from None


def call_in_thread(message: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a thread; ``message`` is for `limits.stacks_of_threads`."""
    try:
        return function(*arguments)
    except StopIteration as error:
        # A future rejects StopIteration; before Python 3.11.8 and 3.12.2 it would stay pending.
        raise RuntimeError("the handler raised StopIteration") from error


def _where(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
