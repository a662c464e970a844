"""Several groups on one source: each has its own attempts, retries and dead letters, and touches those of no other."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from harness.contract import Connect, eventually, last, publish, start_once
from runtime.settings import ConsumerSettings

pytestmark = pytest.mark.parametrize(
    "broker", ["kafka", "mqtt", "nats"], indirect=True, scope="session"
)
"""Those on which each group gets every message."""

SETTINGS = {"retry_seconds": 0.05, "retry_max_seconds": 0.2}
MAX_ATTEMPTS = 3
QUIET_SECONDS = 1.0
"""Longer than any retry waits."""


class Group:
    """One live consumer group, whose handler fails each time if ``fails``."""

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

    async def letters(self) -> list[str]:
        return [letter.id async for letter in self.source.dead_letters(100)]

    async def seen(self) -> tuple[list[int], int]:
        return self.attempts, len(await self.letters())


EACH_ATTEMPT = list(range(1, MAX_ATTEMPTS + 1))


@pytest.mark.parametrize("failing", [(True, False), (True, True), (True, False, True)])
async def test_a_failure_replay_or_purge_in_one_group_is_seen_by_no_other(
    connect: Connect, settings_for: Callable[..., ConsumerSettings], failing: tuple[bool, ...]
) -> None:
    names = [f"group-{number}" for number in range(len(failing))]
    for name in names:
        await start_once(settings_for(group=name, **SETTINGS))
    async with AsyncExitStack() as stack:
        groups = [
            Group(await stack.enter_async_context(connect(group=name)), fails=fails)
            for name, fails in zip(names, failing, strict=True)
        ]
        first = groups[0]

        async def seen() -> list[tuple[list[int], int]]:
            return [await group.seen() for group in groups]

        expected = [(EACH_ATTEMPT, 1) if fails else ([1], 0) for fails in failing]
        await publish(first.source, 1)
        await eventually(expected, seen)

        assert await last(first.source.replay_dead_letters()) == 1
        expected[0] = (EACH_ATTEMPT * 2, 1)
        await eventually(expected, seen)

        first.fails = False
        assert await last(first.source.replay_dead_letters()) == 1
        expected[0] = ([*EACH_ATTEMPT * 2, 1], 0)
        await eventually(expected, seen)

        first.fails = True
        await publish(first.source, 1)
        expected = [
            (
                [*attempts, *(EACH_ATTEMPT if group.fails else [1])],
                letters + group.fails,
            )
            for group, (attempts, letters) in zip(groups, expected, strict=True)
        ]
        await eventually(expected, seen)
        assert await last(first.source.purge_dead_letters()) == 1
        expected[0] = (expected[0][0], 0)
        await asyncio.sleep(QUIET_SECONDS)
        assert await seen() == expected
        for group in groups:
            await group.source.stop()
            await group.working
