# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Steps on a source that are common to the tests of every broker."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import pytest

from runtime.brokers.source import Connected, Source
from runtime.message import Message

WAIT_SECONDS = 20
"""The time limit for an expected result on a loaded machine."""

AnySource = TypeVar("AnySource", bound=Connected)

Connect = Callable[..., AbstractAsyncContextManager[Any]]
"""Connects a source: the fixture `connect`."""
Counted = Callable[..., Awaitable[None]]
"""The fixture `counted`."""


@asynccontextmanager
async def opened(source: AnySource) -> AsyncIterator[AnySource]:
    """A connected source, with its topology."""
    async with source:
        await source.declare()
        yield source


def need(source: Source, capability: str) -> None:
    """Skip the test if the broker declares that it lacks this capability."""
    if not getattr(source.capabilities, capability):
        pytest.skip(f"{type(source).__name__} declares that it lacks: {capability}")


async def take(source: Source, count: int) -> list[Message]:
    async with asyncio.timeout(WAIT_SECONDS):
        return [await anext(source) for _ in range(count)]


async def eventually(expected: object, look: Callable[[], Awaitable[object]]) -> None:
    """Repeat the call until its result is the expected one; fails with the last result."""
    give_up_at = time.monotonic() + WAIT_SECONDS
    while (seen := await look()) != expected:
        assert time.monotonic() < give_up_at, f"{seen} did not become {expected}"
        await asyncio.sleep(0.01)
