"""Brokers that publish a message's results and acknowledge it in one step: never one without the other."""

import asyncio
import random
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness.contract import opened, take
from harness.scene import Scene, assert_clean_shutdown, has_ended, is_empty, wait_until
from harness.servers import Counts, Server
from processes import MISBEHAVING
from runtime.brokers import make_source
from runtime.settings import ConsumerSettings
from steps import ack

pytestmark = pytest.mark.parametrize(
    "broker", ["postgres", "redis", "sqlite"], indirect=True, scope="session"
)

TASKS = 150


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_a_message_or_what_follows_from_it_and_never_both(
    broker: Server, queue: str, tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    following = ConsumerSettings.model_validate(
        {"broker_url": broker.url, "source": f"{queue}-next"}
    )
    kind = next(iter(make_source(following).destinations))
    variables: dict[str, Any] = {"HANDLERS": "forward", "FORWARD_TO": f"{kind}:{following.source}"}

    async def declare() -> None:
        async with opened(make_source(following)):
            pass

    async def take_all() -> Counter[str]:
        async with opened(make_source(following, 2 * TASKS)) as source:
            await source.start()
            messages = await take(source, TASKS)
            await ack(source, messages)
        return Counter(message.body.decode() for message in messages)

    asyncio.run(declare())
    with Scene(broker, queue, tmp_path, MISBEHAVING) as scene:
        tasks = scene.publish(TASKS, kind="forward")
        for number in range(4):
            process = scene.start(url=broker.impatient_url, concurrency=4, **variables)
            wait_until(partial(has_ended, scene, 30 * number + chance.randrange(1, 30)))
            process.stop(signal.SIGKILL)
        process = scene.start(url=broker.impatient_url, **variables)
        wait_until(lambda: set(scene.ledger.ended) == set(tasks))
        wait_until(lambda: is_empty(scene))
        assert_clean_shutdown(process)
    assert asyncio.run(take_all()) == Counter(tasks)
    assert broker.counts(following.source) == Counts(ready=0, delayed=0, dead=0)
    broker.delete(following.source)
