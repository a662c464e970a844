# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""Steps that the tests of one broker alone take, whichever it is. Their fixtures are in conftest.py."""

from typing import Any

from runtime.brokers.source import Source

from .test_contract import become, length_of, take

Event = dict[str, Any]
"""What was logged, with its level."""


def find(events: list[Event], event: str) -> list[Event]:
    return [found for found in events if found["event"] == event]


async def come(events: list[Event], event: str, count: int = 1) -> None:
    """Wait until so many of these events have come."""

    async def found() -> bool:
        return len(find(events, event)) >= count

    await become(True, found)


async def drain(source: Source, count: int) -> list[str]:
    """Take and acknowledge so many, one after the other; returns their ids."""
    taken = []
    for _ in range(count):
        (message,) = await take(source, 1)
        taken.append(message.id)
        await source.ack(message)
    return taken


async def filled(source: Source, count: int) -> None:
    """Wait until so many are in its buffer."""
    await become(count, length_of(source.buffer))
