"""Steps of the template's tests that services do not need: on a source, and on its log events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sized
from typing import Any

import pytest

from harness.contract import eventually, need, opened, take
from harness.scene import Scene, assert_clean_shutdown, wait_until
from harness.servers import SERVED_BROKERS, Counts, Server
from runtime.brokers import make_source
from runtime.brokers.source import Publisher, Source
from runtime.message import Message, OutgoingMessage
from runtime.settings import ConsumerSettings

Event = dict[str, Any]
"""Log events, with their levels."""
over_the_network = pytest.mark.parametrize("broker", SERVED_BROKERS, indirect=True, scope="session")
"""For tests of a server, a connection or a subscription, which an embedded broker does not have."""

_started_once: set[tuple[str, str]] = set()


async def publish(source: Publisher, count: int, **fields: Any) -> list[str]:
    """Publish this many messages; returns their ids."""
    messages = [OutgoingMessage(b"%d" % number, **fields) for number in range(count)]
    await source.publish(messages)
    return [message.id for message in messages]


async def ack(source: Source, messages: Iterable[Message]) -> None:
    for message in messages:
        await source.ack(message)


def length_of(sized: Sized) -> Callable[[], Awaitable[int]]:
    async def look() -> int:
        return len(sized)

    return look


def ids(messages: Iterable[Any]) -> list[str]:
    return [message.id for message in messages]


def as_promised(source: Source, ids: list[str]) -> list[str]:
    """In this order, if the broker keeps it; otherwise sorted, so that only the sets are compared."""
    return ids if source.capabilities.order else sorted(ids)


async def start_once(settings: ConsumerSettings) -> None:
    """Start and stop a consumer, if the broker retains messages only for a consumer that it has seen."""
    source = make_source(settings)
    consumer = (settings.source, settings.group)
    if source.capabilities.retains_before_first_consumer or consumer in _started_once:
        return
    _started_once.add(consumer)
    async with opened(source):
        await source.start()
        await source.stop()


def scene_needs(scene: Scene, *capabilities: str) -> None:
    """Skip the test if the scene's broker declares that it lacks one of these."""
    for capability in capabilities:
        need(make_source(scene.settings), capability)


async def buffer_holds(source: Source, count: int) -> None:
    """Wait until the source's buffer has this many messages."""
    await eventually(count, length_of(source.buffer))


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


def find(events: list[Event], event: str) -> list[Event]:
    return [found for found in events if found["event"] == event]


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


async def last(progress: AsyncIterator[int]) -> int:
    """The last number."""
    numbers = [number async for number in progress]
    return numbers[-1] if numbers else 0


def with_options(url: str, *given: str, **options: object) -> str:
    """The URL with these options; ``given`` are like ``name=value``, or empty."""
    query = "&".join(
        [*filter(None, given), *(f"{name}={value}" for name, value in options.items())]
    )
    return f"{url}{'&' if '?' in url else '?'}{query}" if query else url


async def eventually_counts(broker: Server, queue: str, counts: Counts) -> None:
    """Wait until the broker's own counts are equal to these."""
    await eventually(counts, lambda: asyncio.to_thread(broker.counts, queue))


def handle_the_rest(scene: Scene) -> None:
    """Let one more service handle the remaining tasks, so that every task is counted."""
    process = scene.start(concurrency=10)
    wait_until(lambda: set(scene.ledger.ended) >= set(scene.published))
    assert_clean_shutdown(process)
