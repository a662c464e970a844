# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Steps on a source that the tests of every broker take."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sized
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import pytest

from runtime.brokers import make_source
from runtime.brokers.source import Connected, Publisher, Source
from runtime.message import Message, OutgoingMessage
from runtime.settings import ConsumerSettings

from .servers import Counts, Server

WAIT_SECONDS = 20
"""How long something expected may take on a loaded machine."""

AnySource = TypeVar("AnySource", bound=Connected)

Connect = Callable[..., AbstractAsyncContextManager[Any]]
"""Connects a source: the fixture `connect`."""
Counted = Callable[..., Awaitable[None]]
"""The fixture `counted`."""
Event = dict[str, Any]
"""Log events, with their levels."""

_started_once: set[tuple[str, str]] = set()


async def start_once(settings: ConsumerSettings) -> None:
    """Start and stop a consumer, where a broker retains no messages for a consumer that it has never seen."""
    source = make_source(settings)
    consumer = (settings.source, settings.group)
    if source.capabilities.retains_before_first_consumer or consumer in _started_once:
        return
    _started_once.add(consumer)
    async with opened(source):
        await source.start()
        await source.stop()


@asynccontextmanager
async def opened(source: AnySource) -> AsyncIterator[AnySource]:
    """Connected, with its topology."""
    async with source:
        await source.declare()
        yield source


def need(source: Source, capability: str) -> None:
    """Skip the test if the broker declares that it lacks this."""
    if not getattr(source.capabilities, capability):
        pytest.skip(f"{type(source).__name__} declares that it lacks: {capability}")


async def publish(source: Publisher, count: int, **fields: Any) -> list[str]:
    """Publish this many messages; returns their ids."""
    messages = [OutgoingMessage(b"%d" % number, **fields) for number in range(count)]
    await source.publish(messages)
    return [message.id for message in messages]


async def take(source: Source, count: int) -> list[Message]:
    async with asyncio.timeout(WAIT_SECONDS):
        return [await anext(source) for _ in range(count)]


async def ack(source: Source, messages: Iterable[Message]) -> None:
    for message in messages:
        await source.ack(message)


async def ack_all(source: Source, count: int) -> list[str]:
    """Take and acknowledge this many, one after the other; returns their ids."""
    taken = []
    for _ in range(count):
        (message,) = await take(source, 1)
        taken.append(message.id)
        await source.ack(message)
    return taken


async def consume(source: Source, handled: list[str]) -> None:
    """A worker that acknowledges everything, until the source stops."""
    async for message in source:
        await asyncio.sleep(0)
        handled.append(message.id)
        await source.ack(message)


async def eventually(expected: object, look: Callable[[], Awaitable[object]]) -> None:
    """Repeat the call until its result is the expected one; fails with the last result."""
    give_up_at = time.monotonic() + WAIT_SECONDS
    while (seen := await look()) != expected:
        assert time.monotonic() < give_up_at, f"{seen} did not become {expected}"
        await asyncio.sleep(0.01)


async def eventually_counts(broker: Server, queue: str, counts: Counts) -> None:
    """Wait until the broker's own counts are these."""
    await eventually(counts, lambda: asyncio.to_thread(broker.counts, queue))


async def eventually_logged(events: list[Event], event: str, count: int = 1) -> None:
    """Wait until this many of these events were logged."""

    async def logged() -> bool:
        return len(find(events, event)) >= count

    await eventually(True, logged)


async def eventually_reconnected(source: Source, events: list[Event]) -> None:
    """Wait until the source has been connected for the second time."""

    async def connected() -> bool:
        return source.connected

    await eventually_logged(events, "connected", count=2)
    await eventually(True, connected)


async def buffer_holds(source: Source, count: int) -> None:
    """Wait until the source's buffer holds this many."""
    await eventually(count, length_of(source.buffer))


def length_of(sized: Sized) -> Callable[[], Awaitable[int]]:
    async def look() -> int:
        return len(sized)

    return look


def find(events: list[Event], event: str) -> list[Event]:
    return [found for found in events if found["event"] == event]


async def last(progress: AsyncIterator[int]) -> int:
    """The number once it no longer changes."""
    numbers = [number async for number in progress]
    return numbers[-1] if numbers else 0


def ids(messages: Iterable[Any]) -> list[str]:
    return [message.id for message in messages]


def as_promised(source: Source, ids: list[str]) -> list[str]:
    """In this order, if the broker keeps it; else sorted, so that only the set is compared."""
    return ids if source.capabilities.order else sorted(ids)
