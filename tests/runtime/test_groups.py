"""Several groups on one source: each has its own attempts, retries and dead letters, and does not touch another's."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import nats
import pytest

from harness.contract import Connect, eventually
from harness.servers import Server
from runtime.settings import ConsumerSettings
from steps import last, publish, start_once, with_options

pytestmark = pytest.mark.parametrize(
    "broker", ["kafka", "mqtt", "nats", "redis"], indirect=True, scope="session"
)
"""The brokers on which each group gets every message."""

MAX_ATTEMPTS = 3
EACH_ATTEMPT = list(range(1, MAX_ATTEMPTS + 1))
SETTINGS = {"retry_seconds": 0.05, "retry_max_seconds": 0.2}
QUIET_SECONDS = 1.0
"""Longer than the delay of any retry."""


class Group:
    """One live consumer group, and the messages of its handler."""

    def __init__(self, source: Any, *, fails: bool) -> None:
        self.source = source
        self.fails = fails
        self.attempts: list[int] = []
        self.working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        async for message in self.source:
            self.attempts.append(message.attempt)
            if not self.fails:
                await self.source.ack(message)
            elif message.attempt < MAX_ATTEMPTS:
                await self.source.retry(message, 0.05, "not now")
            else:
                await self.source.reject(message, "bad")

    async def seen(self) -> tuple[list[int], int]:
        """The attempts, and the number of dead letters."""
        if not self.source.capabilities.dead_letters:
            return self.attempts, 0
        return self.attempts, len([letter async for letter in self.source.dead_letters(100)])

    async def close(self) -> None:
        await self.source.stop()
        await self.working


@pytest.fixture
async def url(broker: Server, broker_name: str, queue: str) -> str:
    """The URL of a source that allows several groups."""
    if broker_name != "nats":
        return broker.url
    server = await nats.connect(broker.url)  # the service itself would create a work queue
    await server.jetstream().add_stream(name=queue, subjects=[f"{queue}.>"])
    await server.close()
    return with_options(broker.url, subject=f"{queue}.eu")


@pytest.mark.parametrize("failing", [(True, False), (True, True), (True, False, True)])
async def test_a_failure_a_replay_and_a_purge_in_one_group_are_seen_by_no_other(
    connect: Connect,
    settings_for: Callable[..., ConsumerSettings],
    url: str,
    failing: tuple[bool, ...],
) -> None:
    names = [f"group-{number}" for number in range(len(failing))]
    async with AsyncExitStack() as stack:
        groups = []
        for name, fails in zip(names, failing, strict=True):
            await start_once(settings_for(group=name, broker_url=url, **SETTINGS))
            source = await stack.enter_async_context(connect(group=name, broker_url=url))
            groups.append(Group(source, fails=fails))
            stack.push_async_callback(groups[-1].close)
        first = groups[0]
        stores_letters = first.source.capabilities.dead_letters

        async def seen() -> list[tuple[list[int], int]]:
            return [await group.seen() for group in groups]

        expected = [
            (EACH_ATTEMPT, int(stores_letters)) if group.fails else ([1], 0) for group in groups
        ]
        await publish(first.source, 1)
        await eventually(expected, seen)
        if stores_letters:
            assert await last(first.source.replay_dead_letters()) == 1
            expected[0] = (EACH_ATTEMPT * 2, 1)
            await eventually(expected, seen)
            first.fails = False
            assert await last(first.source.replay_dead_letters()) == 1
            expected[0] = ([*EACH_ATTEMPT * 2, 1], 0)
            await eventually(expected, seen)
            assert await last(first.source.purge_dead_letters()) == 0
        await asyncio.sleep(QUIET_SECONDS)
        assert await seen() == expected
