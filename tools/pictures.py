"""Draws graceful shutdowns from their logs: ``python3 tasks.py pictures [FOLDER]``.

A service is rendered with a handler that logs when it begins and ends, and gets real signals while handlers work. Its
log events become one SVG for each kind of shutdown; only logged events are drawn.
"""

import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from tools import ROOT
from tools.demo import Run
from tools.scaffold import install, scaffold, user_environment

FOLDER = ROOT / "docs/pictures"

HANDLER = '''"""The pictures' handler: works as many seconds as its message says, and logs both ends of it."""

import asyncio

import structlog

EXAMPLE = b"0.1"

log = structlog.get_logger("handler")


async def handle(body: bytes) -> None:
    log.info("begun")
    await asyncio.sleep(float(body))
    log.info("finished")
'''
CONCURRENCY = 4
PREFETCH = 7


@dataclass(frozen=True)
class Story:
    """One kind of shutdown: the seconds of work of each message in the queue, and the signals."""

    name: str
    title: str
    work_seconds: tuple[float, ...]
    drain_seconds: float
    signals: tuple[tuple[float, signal.Signals], ...]
    """Each signal with its time in seconds after the first handler began."""


STORIES = (
    Story(
        "graceful",
        "Graceful: in-flight messages are finished, the rest is requeued",
        (0.6, 1.0, 1.6, 2.2, 1, 1, 1, 1),
        25,
        ((0.5, signal.SIGTERM),),
    ),
    Story(
        "deadline",
        "Deadline: messages that are not finished in time are requeued",
        (0.8, 1.2, 60, 60, 1, 1, 1, 1),
        1.5,
        ((0.5, signal.SIGTERM),),
    ),
    Story(
        "forced",
        "Forced: a second SIGINT ends the drain",
        (0.8, 60, 60, 60, 1, 1, 1, 1),
        25,
        ((0.5, signal.SIGINT), (1.7, signal.SIGINT)),
    ),
)


@dataclass
class Work:
    """A message in a handler, in seconds after the first signal."""

    began: float
    ended: float
    outcome: str


@dataclass
class Shutdown:
    """The events of a shutdown, in seconds after the first signal."""

    story: Story
    work: list[Work] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    exit_code: int = 0


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pictures-") as scratch:
        program = install(
            scaffold(Path(scratch), "broker=sqlite", "handler_stub=raw", handler=HANDLER)
        )
        for story in STORIES:
            shutdown = play(story, program, Path(scratch) / f"{story.name}.db")
            picture = folder / f"stop-{story.name}.svg"
            picture.write_text(drawn(shutdown), encoding="utf-8", newline="\n")
            print(f"{picture.name}: exit code {shutdown.exit_code}")
    return 0


def play(story: Story, program: Path, queue: Path) -> Shutdown:
    environment = {
        **user_environment(),
        "CONSUMER_BROKER_URL": f"sqlite:///{queue.as_posix()}",
        "CONSUMER_CONCURRENCY": str(CONCURRENCY),
        "CONSUMER_PREFETCH": str(PREFETCH),
        "CONSUMER_DRAIN_SECONDS": str(story.drain_seconds),
        "CONSUMER_LOG_LEVEL": "debug",
    }
    lines = "".join(f"{seconds}\n" for seconds in story.work_seconds)
    subprocess.run(
        [program, "publish", "-"],
        env=environment,
        input=lines,
        text=True,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    run = Run(program, environment)
    run.wait_until(lambda: len(run.events("begun")) == CONCURRENCY)
    began = at(run.events("begun")[0])
    sent = []
    for seconds, signum in story.signals:
        time.sleep(max(0, began + seconds - time.time()))
        sent.append((time.time(), signum))
        run.process.send_signal(signum)
    run.wait()
    ended = time.time()
    with closing(sqlite3.connect(queue)) as database:
        [[left]] = database.execute("SELECT count(*) FROM messages")
    return shutdown_of(story, run, sent, ended, left)


def shutdown_of(
    story: Story, run: Run, sent: list[tuple[float, signal.Signals]], ended: float, left: int
) -> Shutdown:
    """The shutdown from its log; the signals and the exit are those that this process saw."""
    zero = sent[0][0]
    shutdown = Shutdown(story, exit_code=run.exit_code or 0)
    finished = {event["message_id"]: at(event) - zero for event in run.events("finished")}
    abandoned = {event["message_id"]: at(event) - zero for event in run.events("message_abandoned")}
    for event in run.events("begun"):
        number = event["message_id"]
        outcome = "acknowledged" if number in finished else "requeued"
        until = finished.get(number, abandoned.get(number, ended - zero))
        shutdown.work.append(Work(at(event) - zero, until, outcome))
    shutdown.marks += [(moment - zero, signum.name) for moment, signum in sent]
    [draining], [drained] = run.events("draining"), run.events("drained")
    shutdown.marks.append((at(draining) - zero, "no longer ready"))
    unstarted = drained["requeued"] - len(abandoned)
    for event in run.events("step_done"):
        labels = {
            "deliveries": f"broker delivers no more; {unstarted} not started are requeued",
            "source": "connection closed",
            "requeue": "in-flight messages requeued",
            "lifespan": "lifespan closed",
        }
        shutdown.marks.append((at(event) - zero, labels[event["step"]]))
    if abandoned and not run.events("forced"):
        shutdown.marks.append((min(abandoned.values()), f"deadline: {story.drain_seconds} s"))
    shutdown.marks.append((ended - zero, f"exit code {run.exit_code}; {left} left in the queue"))
    shutdown.marks.sort()
    return shutdown


def at(event: dict[str, Any]) -> float:
    """The time of an event, in seconds since the epoch."""
    return datetime.fromisoformat(event["timestamp"]).replace(tzinfo=UTC).timestamp()


WIDTH, LEFT, RIGHT, TOP, ROW = 760, 20, 20, 62, 30
LABEL_ROW = 17
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600; font-size: 15px }
.small { font-size: 12px } .axis, .mark { stroke: #8c959f } .mark { stroke-dasharray: 3 3 }
.acknowledged { fill: #1a7f37 } .requeued { fill: #bf8700 } .on-bar { fill: #ffffff }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .acknowledged { fill: #2ea043 } .requeued { fill: #9e6a03 } .on-bar { fill: #ffffff } }
"""


def drawn(shutdown: Shutdown) -> str:
    """The SVG: a bar for each message in a handler, a line for each mark, time from left to right."""
    first = min(work.began for work in shutdown.work)
    last = shutdown.marks[-1][0]

    def x(seconds: float) -> float:
        return LEFT + (seconds - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    bars_end = TOP + ROW * len(shutdown.work)
    height = bars_end + 14 + LABEL_ROW * len(shutdown.marks) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="{escape(shutdown.story.title)}">',
        f"<style>{STYLE}</style>",
        text(LEFT, 24, shutdown.story.title, "title"),
        text(
            LEFT,
            44,
            f"{CONCURRENCY} handlers are working when the signal arrives; seconds after it",
            "small",
        ),
    ]
    for row, (moment, label) in enumerate(shutdown.marks):
        label_y = bars_end + 14 + LABEL_ROW * (row + 1)
        parts.append(
            f'<line class="mark" x1="{x(moment):.1f}" x2="{x(moment):.1f}"'
            f' y1="{TOP - 8}" y2="{label_y - 4}"/>'
        )
        on_the_left = x(moment) > WIDTH / 2
        offset, anchor = (-5, "end") if on_the_left else (5, "start")
        described = f"{moment:.2f} s  {label}"
        parts.append(text(x(moment) + offset, label_y, described, "small", anchor))
    for row, work in enumerate(shutdown.work):
        y = TOP + ROW * row
        width = max(x(work.ended) - x(work.began), 1)
        parts.append(
            f'<rect class="{work.outcome.split()[0]}" x="{x(work.began):.1f}" y="{y}"'
            f' width="{width:.1f}" height="{ROW - 8}" rx="3"/>'
        )
        parts.append(text(x(work.began) + 8, y + 16, work.outcome, "on-bar small"))
    return "\n".join([*parts, "</svg>", ""])


def text(x: float, y: float, words: str, style: str, anchor: str = "start") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
