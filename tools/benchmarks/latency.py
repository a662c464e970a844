"""The time from just before a publish until its handler begins, at a rate that leaves every consumer idle time."""

import random
import statistics
from collections.abc import Iterator

from tools.benchmarks.contest import (
    AIO_PIKA,
    AIO_PIKA_QUORUM,
    FASTSTREAM,
    OURS,
    TASKIQ,
    Arena,
    Contender,
)
from tools.benchmarks.figures import Figure

CONTENDERS = (OURS, FASTSTREAM, TASKIQ, AIO_PIKA, AIO_PIKA_QUORUM)
MEDIAN, SLOWEST = "median", "99th percentile"


def measure(arena: Arena, rates: dict[int, int], rounds: int) -> Iterator[Figure]:
    """The rates in messages per second, each with the number of messages; contenders take turns in random order."""
    for rate, messages in rates.items():
        taken: dict[Contender, list[tuple[float, float]]] = {one: [] for one in CONTENDERS}
        for _ in range(rounds):
            for contender in random.sample(CONTENDERS, len(CONTENDERS)):
                taken[contender].append(milliseconds(arena, contender, messages, rate))
        part = f"publish to handler, {rate} messages a second"
        for contender, values in taken.items():
            medians, slowest = map(list, zip(*values, strict=True))
            yield Figure(part, f"{contender.title}: {MEDIAN}", medians, "ms")
            yield Figure(part, f"{contender.title}: {SLOWEST}", slowest, "ms")


def milliseconds(
    arena: Arena, contender: Contender, messages: int, rate: float
) -> tuple[float, float]:
    """Median and 99th percentile; the first tenth warms up, and is left out."""
    with arena.contest(contender) as contest, contest.consuming() as process:
        contest.publish(messages, rate)
        contest.wait_for("end", messages)  # written when the handler begins: it does nothing else
        contest.stop(process)
    sent = {number: at for _, number, at in contest.lines("sent")}
    taken = [
        (at - sent[number]) * 1e3
        for _, number, at in contest.lines("end")
        if number >= messages // 10
    ]
    return statistics.median(taken), statistics.quantiles(taken, n=100)[98]
