"""Replaying dead letters, on every broker that stores them: no interruption of the command loses a letter."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from harness.contract import WAIT_SECONDS, Connect, Counted, eventually, need, take
from harness.process import Ledger, ServiceProcess, service_command, service_environment
from harness.servers import Server
from runtime.brokers.dead_letters import Selection
from runtime.brokers.source import Source
from steps import publish

REPLAYING = Path(__file__).with_name("replaying.py")
AT_ONCE = 100
LETTERS = int(os.environ.get("DEAD_LETTERS", "1000"))
INTERRUPTIONS = [signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGINT]


async def make_dead(connect: Connect, count: int, part: int = 1) -> None:
    """Dead letters with the numbers up to this one as bodies; the reason has the remainder by ``part``."""
    async with connect(prefetch=AT_ONCE) as source:
        need(source, "dead_letters")
        await publish(source, count)
        for start in range(0, count, AT_ONCE):
            messages = await take(source, min(AT_ONCE, count - start))
            await asyncio.gather(*(source.reject(m, f"bad {int(m.body) % part}") for m in messages))

        async def dead() -> int:
            return int(await source.count_dead_letters())

        await eventually(count, dead)
        await source.stop()


@pytest.mark.parametrize("count", [0, 1, 33, 100, LETTERS])
async def test_a_replay_moves_each_dead_letter_once(
    connect: Connect, counted: Counted, count: int
) -> None:
    await make_dead(connect, count)
    async with connect(prefetch=0) as source:
        moved = [moved async for moved in source.replay_dead_letters()]
        assert moved == sorted(set(moved))
        assert (moved or [0])[-1] == count
    await counted(ready=count)
    assert await handle_all(connect, count) == Counter(range(count))


async def handle_all(connect: Connect, least: int) -> Counter[int]:
    """Acknowledge all messages, at least this many; returns how often each number was delivered."""
    handled: Counter[int] = Counter()
    async with connect(prefetch=AT_ONCE) as source:
        while handled.total() < least or len(source.buffer) or await is_waiting(source):
            for message in await take(source, max(1, len(source.buffer))):
                assert message.attempt == 1
                handled[int(message.body)] += 1
                await source.ack(message)
        await source.stop()
    return handled


async def is_waiting(source: Source) -> bool:
    """Whether another message comes within a moment."""
    for _ in range(50):
        await asyncio.sleep(0.01)
        if len(source.buffer):
            return True
    return False


@pytest.mark.very_slow
@pytest.mark.parametrize(
    ("verb", "part"),
    [("replay", 1), ("replay", 2), ("purge", 2)],
    ids=["all", "every second", "purge every second"],
)
async def test_an_interrupted_replay_loses_none_and_doubles_at_most_the_step_in_progress(
    connect: Connect, broker: Server, queue: str, tmp_path: Path, verb: str, part: int
) -> None:
    """The command is interrupted at random moments, again and again, and prints how many it has moved.

    First right behind its first step, so that each broker's is interrupted. With a filter, the letters that it does not select stay, and none of them is moved, or deleted by a purge.
    """
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    moments = random.Random(seed)
    await make_dead(connect, LETTERS, part)
    chosen = {number for number in range(LETTERS) if number % part == 0}
    selection = Selection(reason="bad 0")
    filters = ("--reason", "bad 0") if part > 1 else ()

    def replay(signum: signal.Signals | None, moment: tuple[int, float]) -> tuple[list[int], bool]:
        """The sizes of the steps, and whether it was interrupted: after this many steps and seconds."""
        ledger = Ledger(tmp_path / "ledger")
        signal_at = f"{signum or 0} {moment[0]} {moment[1]}"
        environment = service_environment(
            broker.url, queue, ledger, LISTING_SECONDS=2, SIGNAL_AT=signal_at
        )
        command = service_command("dead-letters", verb, "--yes", *filters, service=REPLAYING)
        with closing(ServiceProcess(command, environment)) as process:
            process.wait_for("begun")
            process.child.wait(LETTERS / 10)
            exit_code = process.wait()
            moved = [step["moved"] for step in process.find("step")]
            if signum is not signal.SIGKILL:
                plural = "" if sum(moved) == 1 else "s"
                done = {
                    "replay": "replayed {} to {}",
                    "purge": "deleted {} from the dead letters of {}",
                }[verb]
                assert done.format(f"{sum(moved):,} message{plural}", queue) in process.stderr
            codes = (0, 130, -signal.SIGINT, -signal.SIGKILL)  # -SIGINT: at its end
            assert exit_code in codes, process.stderr
            return moved, exit_code != 0

    at = [(1, 0.0), *((moments.randrange(4), moments.uniform(0, 0.01)) for _ in INTERRUPTIONS[1:])]
    results = [await asyncio.to_thread(replay, *one) for one in zip(INTERRUPTIONS, at, strict=True)]
    assert results[0][1]
    give_up_at = time.monotonic() + 8 * WAIT_SECONDS
    async with connect(prefetch=0) as source:
        while await source.count_dead_letters() > LETTERS - len(chosen):
            assert time.monotonic() < give_up_at  # SQS hides a killed command's letters
            results.append(await asyncio.to_thread(replay, None, (0, 0.0)))
        await eventually(LETTERS - len(chosen), source.count_dead_letters)
        left = [int(letter.body) async for letter in source.dead_letters()]
        assert sorted(left) == sorted(set(range(LETTERS)) - chosen)
        assert not [letter async for letter in source.dead_letters(selection=selection)]
    moved = chosen if verb == "replay" else set()
    handled = await handle_all(connect, len(moved))
    assert handled.keys() == moved
    largest = max((size for sizes, _ in results for size in sizes), default=0)
    interrupted = sum(interrupted for _, interrupted in results)
    print(f"{interrupted} interrupted, {handled.total() - len(moved)} doubled")
    assert handled.total() - len(moved) <= interrupted * largest
