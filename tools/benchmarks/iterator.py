"""The cost of an item: a bare ``async for``, the runtime's `cancellable_aiter`, and both forms of 2019."""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from runtime.cancellation import cancellable_aiter
from tools.benchmarks import article_2019
from tools.benchmarks.figures import Figure

LEAST_RATIO = 25
MOST_ADDED_SECONDS = 1e-6
MOST_ADDED_PART = 0.1

Source = Callable[[], AsyncIterator[int]]
Wrap = Callable[[AsyncIterator[int], asyncio.Event], AsyncIterator[int]]


async def ready() -> AsyncIterator[int]:
    """Has an item at any time, and never suspends."""
    number = 0
    while True:
        yield number
        number += 1


async def suspending() -> AsyncIterator[int]:
    """Waits for each item, which another task puts into a queue."""
    queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

    async def fill() -> None:
        number = 0
        while True:
            await queue.put(number)
            number += 1

    fetcher = asyncio.create_task(fill())
    try:
        while True:
            yield await queue.get()
    finally:
        fetcher.cancel()


def bare(source: AsyncIterator[int], _: asyncio.Event) -> AsyncIterator[int]:
    return source


SOURCES: dict[str, Source] = {"ready": ready, "suspending": suspending}
FORMS: dict[str, Wrap] = {
    "bare": bare,
    "cancellable_aiter": cancellable_aiter,
    "2019": article_2019.cancellable_aiter,
}
LOOP_2019 = "2019, by hand"


async def seconds_per_item(source: Source, wrap: Wrap, items: int) -> float:
    """CPU time per item: the loop never idles, and other load on this machine has less influence."""
    iterator = source()
    count = 0
    started = time.process_time()
    async for _ in wrap(iterator, asyncio.Event()):
        count += 1
        if count == items:
            break
    return (time.process_time() - started) / items


async def seconds_per_item_of_the_loop(source: Source, items: int) -> float:
    """As `seconds_per_item`, for the loop that was written by hand before the iterator existed."""
    event = asyncio.Event()
    count = 0

    def handle(_: int) -> None:
        nonlocal count
        count += 1
        if count == items:
            event.set()

    iterator = source()
    started = time.process_time()
    await article_2019.handwritten_loop(iterator, event, handle)
    return (time.process_time() - started) / items


def rounds_of(items: int, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds per item of each source and form, one value for each round; in a round all forms take turns.

    Each form has its own event loop, since the 2019 forms leave tasks behind.
    """
    seconds: dict[tuple[str, str], list[float]] = {
        (source, form): [] for source in SOURCES for form in [*FORMS, LOOP_2019]
    }
    for _ in range(rounds):
        for (source, form), values in seconds.items():
            few = max(1, items // 10) if "2019" in form else items  # they are slow
            if form == LOOP_2019:
                measuring = seconds_per_item_of_the_loop(SOURCES[source], few)
            else:
                measuring = seconds_per_item(SOURCES[source], FORMS[form], few)
            values.append(asyncio.run(measuring))
    return seconds


def measure(items: int, rounds: int) -> Iterator[Figure]:
    part = "Each item, beside a bare async for and beside the forms of 2019"
    print(f"iterator: {rounds} rounds of {items:,} items", file=sys.stderr)
    seconds = rounds_of(items, rounds)
    for (source, form), values in seconds.items():
        yield Figure(part, f"{source} source, {form}", [value * 1e6 for value in values], "µs")

    def compare(source: str, form: str, how: Callable[[float, float], float]) -> list[float]:
        ours = seconds[source, "cancellable_aiter"]
        return [how(own, other) for own, other in zip(ours, seconds[source, form], strict=True)]

    added = compare("ready", "bare", lambda own, bare: (own - bare) * 1e6)
    yield Figure(part, "ready source, added", added, "µs", at_most=MOST_ADDED_SECONDS * 1e6)
    cheaper = compare("ready", "2019", lambda own, old: old / own)
    yield Figure(part, "ready source, 2019 form / ours", cheaper, at_least=LEAST_RATIO)
    by_hand = compare("ready", LOOP_2019, lambda own, old: old / own)
    yield Figure(part, "ready source, 2019 by hand / ours", by_hand, at_least=LEAST_RATIO)
    slower = compare("suspending", "bare", lambda own, bare: own / bare)
    yield Figure(part, "suspending source, ours / bare", slower, at_most=1 + MOST_ADDED_PART)


def main() -> None:
    for (source, form), values in rounds_of(items=100_000, rounds=7).items():
        line: dict[str, Any] = {"name": f"{form}, {source} source"}
        print(json.dumps({**line, "seconds_per_item": statistics.median(values)}))


if __name__ == "__main__":
    main()
