"""Writes docs/benchmarks.md, its chart and the README's table: ``python3 tasks.py bench --publish`` runs it at its end.

beside.jsonl compares the service with other consumers, against.jsonl with an earlier commit; publishing.jsonl is about
publishing, results.jsonl has everything else.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from tools import ROOT
from tools.benchmarks.behaviour import SITUATIONS
from tools.benchmarks.contest import AIO_PIKA, FASTSTREAM, OURS, TASKIQ, Contender
from tools.benchmarks.figures import Figure, Outcome, from_json, rows
from tools.benchmarks.latency import MEDIAN, SLOWEST

Results = list[Figure | Outcome]

BESIDE = Path(__file__).with_name("beside.jsonl")
RESULTS = Path(__file__).with_name("results.jsonl")
AGAINST = Path(__file__).with_name("against.jsonl")
PUBLISHING = Path(__file__).with_name("publishing.jsonl")
PUBLISHING_BESIDE = Path(__file__).with_name("publishing_beside.jsonl")
DOCS = ROOT / "docs"
PAGE = DOCS / "benchmarks.md"
CHARTS = DOCS / "pictures"
README = ROOT / "README.md"

CHART = "CPU time per message of the generated service, relative to other consumers"

WIDTH, LEFT, RIGHT, TOP, ROW = 760, 330, 60, 44, 22
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600; font-size: 15px }
.ours { fill: #1a7f37 } .line { stroke: #8c959f; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .ours { fill: #2ea043 } }
"""

INTRODUCTION = """# Benchmarks

`python3 tasks.py bench --publish` writes this page, each part from one run. The consumers take turns, and the median of the rounds is compared with
the target, if there is one. A missed target is shown as NO. The files of `tools/benchmarks/` define the measurements.

**Every consumer is written and started as its own documentation shows, with its own defaults.** Unless a row says otherwise, all share the server, the queue of a
CPU measurement, the prefetch, one process, and acknowledgement after the handler; only these settings are
changed. A row with another setting names it. `tools/benchmarks/defaults.py` compares the arguments with the signatures of the
installed libraries before each run, and has the reasons. (On Kafka, FastStream's default acknowledges before the handler.)
"""

BESIDE_OTHERS = """## Comparison with other consumers of RabbitMQ

Each row is a process on a private RabbitMQ. The handlers' records and the broker's queues are counted.

**On SIGTERM, others are as good**: FastStream, by default since 0.7.8, and taskiq finish their in-flight handlers, start no new ones and leave
the rest in the queue. After a missed deadline their messages are requeued too, and FastStream's log also names each one. After a SIGKILL, all
consumers repeat the in-flight messages, and lose none.

**The service differs** in three points. After a missed deadline, it has another exit code, which an orchestrator can detect, and its log reports it. If a
handler fails, its message is retried and then dead-lettered, whereas the others' defaults drop it after one call. All of them
can be configured to retry or to dead-letter.

**FastStream and aio-pika are faster** from publish to handler, because of the queue. The service and taskiq declare a quorum queue, which stores
a message on disk before it is delivered; aio-pika's worker is about as slow on a quorum queue. FastStream's default is a classic queue that is not durable:
a restart of the broker deletes it. So compare the service with the last row. Latency depends most on the load of the machine.
"""

BESIDE_LIBRARIES = ("RabbitMQ", "Python", "aio-pika", "faststream", "taskiq", "taskiq-aio-pika")

CPU = """## The service itself, and CPU per message

The handlers of all consumers call the same stopwatch. CPU time is that of the consumer's process alone, from the first message
until the last acknowledgement is written. **Quote the ratios**, because the microseconds depend on the machine and its load.
"""

PUBLISHED = """## Publishing

The messages are persistent, and a RabbitMQ with one scheduler thread confirms each one. Ten batches in flight are those of ten handlers that publish.
**Neither side's CPU is the limit**: the rate times the microseconds of a side is its busy part of a second. The rest of the time, it
waited for the disk of the queue, for confirms, or for a core that another process used. 1,000,000 divided by the microseconds of
the client is the rate that it could publish with its own core. On a machine that is busy with other work, the target of 10,000 a second is missed.
A classic queue is slower than a quorum queue because of the broker's own CPU: 40 µs per message instead of 26. The client's CPU is the same.
"""

PUBLISHED_BESIDE = """## Publishing to Kafka, NATS and Redis

The same batches, beside the batches of each bare client. Both give each message a type and an id, and on Kafka the id is also its key. The broker shares
the machine: other machines have other rates, and about the same ratios.
"""

EARLIER = """## Comparison with an earlier commit

`python3 tasks.py bench --against COMMIT --publish` writes this part. It compares the service of that commit with this one, each rendered from its own template and
run with the same libraries, in turns. The ratio is that of each round. The first part is the consumer alone, with a source in
memory. A ratio above the target is the cost, for each message, of guarantees that the earlier commit lacks: any id, type, time or header of another
program is accepted; the unacked bodies have a limit in bytes; handlers have time limits; each message is checked for a pause, and for having killed
its process.
"""


def read(results: Path) -> tuple[dict[str, Any], list[Figure]]:
    about, everything = read_all(results)
    return about, [one for one in everything if isinstance(one, Figure)]


def read_all(results: Path) -> tuple[dict[str, Any], Results]:
    about, *lines = results.read_text(encoding="utf-8").splitlines()
    return json.loads(about), list(map(from_json, lines))


def with_what_stays(
    results: Path, about: dict[str, Any], measured: Sequence[Figure | Outcome]
) -> tuple[dict[str, Any], Results]:
    """The new results and, for the other kind, times or behaviour, the published ones: with date and load."""
    if not results.exists():
        return about, [*measured]
    published, before = read_all(results)
    kinds = {type(one) for one in measured}
    stays = [one for one in before if type(one) not in kinds]
    if stays:
        what = "milliseconds" if isinstance(stays[0], Figure) else "behavior"
        earlier = published.get("stays", {})
        their_run = earlier if earlier.get("what") == what else published
        same = {name: their_run[name] for name in ("date", "load_before")}
        about = {**about, "stays": {"what": what, **same}}
    return about, sorted([*measured, *stays], key=lambda one: isinstance(one, Figure))


def write() -> None:
    drawn, text = chart_of_cpu(), page()
    (CHARTS / "benchmarks-cpu.svg").write_text(drawn, encoding="utf-8", newline="\n")
    PAGE.write_text(text, encoding="utf-8", newline="\n")
    readme = with_section(README.read_text(encoding="utf-8"), "measured", front_page())
    README.write_text(readme, encoding="utf-8", newline="\n")


def with_section(text: str, name: str, lines: list[str]) -> str:
    """The text of a page with one of its sections replaced."""
    begin, end = f"<!-- {name}: written by tasks.py bench -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    assert found, name
    _, _, after = rest.partition(end)
    return "\n\n".join([before + begin, "\n".join(lines), end + after])


COLUMNS = (OURS, FASTSTREAM, TASKIQ, AIO_PIKA)
"""The columns of the README."""


def outcomes(results: Results) -> list[dict[str, dict[str, str]]]:
    """The cells of each contender, by its title, in each of the SITUATIONS."""
    return [
        {one.name: one.cells for one in results if isinstance(one, Outcome) and one.part == part}
        for part in SITUATIONS
    ]


def front_page() -> list[str]:
    """A row for each situation, a column for each contender."""
    about, results = read_all(BESIDE)
    run = about_run(about, *BESIDE_LIBRARIES)
    figures = {(one.part, one.name): one for one in results if isinstance(one, Figure)}
    shutdown, timeout, failure, kill = outcomes(results)

    def by_column(cells_of: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        """The cells by the contender's title without its settings."""
        return {
            contender.title: cells
            for contender in COLUMNS
            for name, cells in cells_of.items()
            if name.startswith(contender.title)
        }

    timeout, failure = by_column(timeout), by_column(failure)

    def failed(contender: Contender) -> str:
        cells = failure[contender.title]
        calls = cells["calls of the handler"]
        return f"{calls} call{'s' * (calls != '1')}, then {'gone' if cells['gone'] != '0' else 'a dead letter'}"

    def missed(column: str, contender: Contender) -> str:
        cells = timeout.get(contender.title)
        last = cells[column].splitlines()[-1] if cells else "no deadline"
        # Its receipt is in docs/benchmarks.md.
        return re.sub(r" \w+=.*(?= exit_code=)", " ...", last)

    def taken(part: str, contender: Contender) -> str:
        names = [f"{contender.title}: {which}" for which in (MEDIAN, SLOWEST)]
        return " / ".join(figures[part, name].row()[1] for name in names)

    def row(label: str, cell: Callable[[Contender], str]) -> str:
        return f"| {' | '.join([label, *map(cell, COLUMNS)])} |"

    return [
        f"{run} Milliseconds are the median, and the 99th percentile.\n",
        f"| | {' | '.join(contender.title for contender in COLUMNS)} |",
        "| --- | --- | --- | --- | --- |",
        row("SIGTERM: handlers finished", lambda one: shutdown[one.title]["finished"]),
        row("exit code", lambda one: shutdown[one.title]["exit code"]),
        row("Deadline missed: exit code", partial(missed, "exit code")),
        row("last line of the log", partial(missed, "what the log says")),
        row(
            "A message always fails (the service retries each 0.1 s here, not for an hour)", failed
        ),
        row("SIGKILL: repeated, lost", lambda one: ", ".join(kill[one.title].values())),
        *(
            row(f"{part[0].upper()}{part[1:]}", partial(taken, part))
            for part in dict.fromkeys(part for part, _ in figures)
        ),
    ]


def about_run(about: dict[str, Any], *libraries: str) -> str:
    """The run, with the versions of these libraries, or of all."""
    versions = ", ".join(
        f"{name} {version}"
        for name, version in about["versions"].items()
        if not libraries or name in libraries
    )
    load = about["load_before"]
    busy = f", load average {load:.1f}" if load is not None else ""
    other = ""
    if stays := about.get("stays"):
        other = f" From a run of {stays['date']}, load average {stays['load_before']:.1f}: the {stays['what']}."
    return f"This run: {about['date']}, {about['machine']}{busy}, {versions}.{other}"


def page() -> str:
    parts = [INTRODUCTION]
    if BESIDE.exists():
        about, results = read_all(BESIDE)
        parts += [
            BESIDE_OTHERS,
            about_run(about, *BESIDE_LIBRARIES) + "\n",
            *sections(results),
        ]
    about, figures = read(RESULTS)
    sizes = about["sizes"]
    rounds = f"{sizes['rounds']} rounds of {sizes['messages']:,} messages for each consumer (the SQS emulator gets a tenth)."
    parts += [
        CPU,
        f"{about_run(about)} {rounds}\n",
        f"![{CHART}](pictures/benchmarks-cpu.svg)\n",
        *sections(figures),
    ]
    if PUBLISHING.exists():
        about, figures = read(PUBLISHING)
        sizes = about["sizes"]
        rounds = f"{sizes['rounds']} rounds of {sizes['messages']:,} messages."
        libraries = ("RabbitMQ", "Python", "aio-pika", "aiormq")
        parts += [PUBLISHED, f"{about_run(about, *libraries)} {rounds}\n", *sections(figures)]
    if PUBLISHING_BESIDE.exists():
        about, figures = read(PUBLISHING_BESIDE)
        sizes = about["sizes"]
        rounds = f"{sizes['rounds']} rounds of {sizes['messages']:,} messages."
        run = about_run(about, "Python", "aiokafka", "nats-py", "redis")
        parts += [PUBLISHED_BESIDE, f"{run} {rounds}\n", *sections(figures)]
    if AGAINST.exists():
        about, figures = read(AGAINST)
        sizes = about["sizes"]
        rounds = f"{sizes['rounds']} rounds of {sizes['messages']:,} messages."
        parts += [EARLIER, f"{about_run(about)} {rounds}\n", *sections(figures)]
    return "\n".join(parts)


def sections(results: Sequence[Figure | Outcome]) -> Iterator[str]:
    for part, group in groupby(results, key=lambda result: result.part):
        yield f"### {part[0].upper()}{part[1:]}\n"
        measured = list(group)
        figures = [one for one in measured if isinstance(one, Figure)]
        outcomes = [one for one in measured if isinstance(one, Outcome)]
        if notes := [figure.note for figure in figures if not figure.values]:
            yield "\n".join(notes) + "\n"
        elif outcomes:
            lines = [["", *outcomes[0].cells]] + [
                [one.name, *map(in_a_cell, one.cells.values())] for one in outcomes
            ]
            yield markdown(lines, [" --- "] * len(lines[0]))
        else:
            lines = [["", "median", "spread", "target", "met"], *map(list, rows(figures))]
            yield markdown(lines, [" --- ", " ---: ", " --- ", " --- ", " --- "])


def in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def markdown(lines: list[list[str]], rule: list[str]) -> str:
    head, *body = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([head, f"|{'|'.join(rule)}|", *body]) + "\n"


def chart_of_cpu() -> str:
    _, figures = read(RESULTS)
    ratios = [
        (f"{figure.part.partition(':')[0]}: {figure.name.removeprefix('ours / ')}", figure.median)
        for figure in figures
        if figure.name.startswith("ours / ") and figure.values
    ]
    return chart(CHART, ratios, line_at=1)


def chart(title: str, bars: list[tuple[str, float]], line_at: float) -> str:
    """Horizontal bars, each with its number. ``line_at`` is where both costs are equal."""
    longest = max([line_at, *(value for _, value in bars)])
    height = TOP + ROW * len(bars) + 12

    def x(value: float) -> float:
        return LEFT + value / longest * (WIDTH - LEFT - RIGHT)

    def drawn() -> Iterator[str]:
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
            f' aria-label="{escape(title)}">'
        )
        yield f"<style>{STYLE}</style>"
        yield f'<text class="title" x="12" y="24">{escape(title)}</text>'
        for number, (label, value) in enumerate(bars):
            y = TOP + ROW * number
            width = max(1, x(value) - LEFT)
            yield f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
            yield f'<rect class="ours" x="{LEFT}" y="{y}" width="{width:.1f}" height="16" rx="2"/>'
            yield f'<text x="{x(value) + 6:.1f}" y="{y + 13}">{value:.2f}</text>'
        at = x(line_at)
        yield f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 6}" y2="{height - 8}"/>'
        yield "</svg>\n"

    return "\n".join(drawn())
