"""The outcome of messages, beside other consumers: in a shutdown, past its deadline, on a failure, after a kill.

Every row is a real process on a private RabbitMQ. The handlers' ledger and the broker's queues give the counts.
"""

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tools.benchmarks.contest import (
    AIO_PIKA,
    FASTSTREAM,
    FASTSTREAM_NONE,
    OURS,
    PREFETCH,
    TASKIQ,
    Arena,
    Contender,
    Contest,
)
from tools.benchmarks.figures import Outcome

MESSAGES = 4 * PREFETCH


@dataclass(frozen=True)
class Sizes:
    repetitions: int
    handler_seconds: float
    long_seconds: float
    """The time of a handler that exceeds the timeout of a second; taskiq waits five seconds before it counts."""
    silence_seconds: float
    """After this silence a failing handler is called no more; the service's longest first retry delay is 8 s."""
    contenders: int = 10
    """The most contenders in each situation."""


Row = dict[str, object]


def shutdown(contest: Contest, sizes: Sizes) -> Row:
    with contest.consuming(BENCH_HANDLER_SECONDS=sizes.handler_seconds) as process:
        contest.publish(MESSAGES)
        contest.wait_for("begin", PREFETCH)
        sent_at, seconds = contest.stop(process)
    begun = contest.lines("begin")
    ended = {number for _, number, _ in contest.lines("end")}
    before = {number for _, number, at in begun if at <= sent_at}
    left = contest.left()
    return {
        "finished": f"{len(before & ended)} of {len(before)}",
        "newly begun": len(begun) - len(before),
        "left in the queue": left,
        "lost": MESSAGES - len(ended) - left,
        "exit code": exit_code(process.returncode),
        "seconds": seconds,
    }


def timeout(contest: Contest, sizes: Sizes) -> Row:
    with contest.consuming(BENCH_HANDLER_SECONDS=sizes.long_seconds) as process:
        contest.publish(PREFETCH)
        contest.wait_for("begin", PREFETCH)
        _, seconds = contest.stop(process)
    left, ended = contest.left(), len(contest.lines("end"))
    return {
        "finished": ended,
        "back in the queue": left,
        "lost": PREFETCH - ended - left,
        "exit code": exit_code(process.returncode),
        "seconds": seconds,
        "what the log says": words(contest.said()),
    }


def failure(contest: Contest, sizes: Sizes) -> Row:
    with contest.consuming(BENCH_HANDLER_SECONDS=0.01, BENCH_HANDLER_FAILS=1) as process:
        contest.publish(1)
        contest.wait_for("begin", 1)
        contest.wait_for_silence(sizes.silence_seconds)
        contest.stop(process)
    left, dead = contest.left(), contest.dead_lettered()
    return {
        "calls of the handler": len(contest.lines("begin")),
        "in the queue": left,
        "dead letters": dead,
        "gone": 1 - left - dead,
    }


def kill(contest: Contest, sizes: Sizes) -> Row:
    with contest.consuming(BENCH_HANDLER_SECONDS=sizes.handler_seconds) as process:
        contest.publish(MESSAGES)
        contest.wait_for("begin", PREFETCH)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with contest.consuming(BENCH_HANDLER_SECONDS=sizes.handler_seconds):
        contest.wait_for_silence(2 + sizes.handler_seconds)
    begun = [number for _, number, _ in contest.lines("begin")]
    ended = {number for _, number, _ in contest.lines("end")}
    return {"begun twice": len(begun) - len(set(begun)), "lost": MESSAGES - len(ended)}


def exit_code(returncode: int) -> str:
    return str(returncode) if returncode >= 0 else f"by {signal.Signals(-returncode).name}"


LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
NAMES = {
    r"contest-\d+": "QUEUE",
    r"\b[0-9a-f]{10,32}\b": "ID",
    r"pid \d+": "pid N",
    r"\d+\.\d+": "N",
}
NOISE = re.compile(r"\x1b\[\d*m|\[MainProcess\] |\[worker-0\] ")


def words(lines: list[str]) -> str:
    """The log without times, traces and ids; equal lines become one, with their number."""
    said: Counter[str] = Counter()
    for line in lines:
        if line.startswith("{"):
            event = json.loads(line)
            event.pop("timestamp")
            fields = [
                f"{key}=({len(value)})" if isinstance(value, list) else f"{key}={value}"
                for key, value in event.items()
                if key not in ("level", "event")
            ]
            text = " ".join([event["level"].upper(), event["event"], *fields])
        elif found := LEVEL.search(line := NOISE.sub("", line)):
            text = f"{found[0]} {line[found.end() :].lstrip(' -|]')}"
        else:
            continue  # a line of a traceback
        for pattern, name in NAMES.items():
            text = re.sub(pattern, name, text)
        said[text] += 1
    return "\n".join(f"{count} x {text}" if count > 1 else text for text, count in said.items())


Situation = Callable[[Contest, Sizes], Row]

ONE_SECOND = (
    replace(OURS, title=f"{OURS.title}, CONSUMER_DRAIN_SECONDS=1", settings={"drain_seconds": 1}),
    Contender("FastStream, graceful_timeout=1", "faststream_one"),
    Contender("taskiq, one worker, --wait-tasks-timeout 1", "taskiq_one"),
)
DEFAULTS = (OURS, FASTSTREAM, TASKIQ, AIO_PIKA)
QUICK_RETRIES: dict[str, object] = {"retry_seconds": 0.1, "retry_max_seconds": 0.1}
"""By default twelve calls take an hour: see docs/retries.md."""
FAILING = (
    replace(OURS, title=f"{OURS.title}, a retry each 0.1 s", settings=QUICK_RETRIES),
    *DEFAULTS[1:],
)
SITUATIONS: dict[str, tuple[Situation, tuple[Contender, ...]]] = {
    f"SIGTERM with {PREFETCH} of {MESSAGES} messages in flight": (
        shutdown,
        (OURS, FASTSTREAM, FASTSTREAM_NONE, TASKIQ, AIO_PIKA),
    ),
    "SIGTERM, and handlers that take longer than a timeout of 1 s": (timeout, ONE_SECOND),
    "a message that always fails": (failure, FAILING),
    f"SIGKILL with {PREFETCH} of {MESSAGES} messages in flight, then a new process": (
        kill,
        DEFAULTS,
    ),
}


def measure(arena: Arena, sizes: Sizes) -> Iterator[Outcome]:
    for part, (situation, contenders) in SITUATIONS.items():
        for contender in contenders[: sizes.contenders]:
            rows = []
            for _ in range(sizes.repetitions):
                with arena.contest(contender) as contest:
                    rows.append(situation(contest, sizes))
            yield Outcome.of(part, contender.title, rows)
