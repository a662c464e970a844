"""Writes docs/benchmarks.md, its charts and the README's table from results.jsonl: ``python3 tasks.py bench --publish`` runs it at its end.

No other file has figures: a run has measured every figure of the page.
"""

import json
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from tools import ROOT
from tools.benchmarks.figures import Figure, rows

RESULTS = Path(__file__).with_name("results.jsonl")
DOCS = ROOT / "docs"
PAGE = DOCS / "benchmarks.md"
CHARTS = DOCS / "pictures"
README = ROOT / "README.md"

ABOUT = {
    "cpu": "CPU time per message of the generated service, relative to other consumers",
    "stops": "RabbitMQ: seconds from SIGTERM to exit",
}

FRONT_PAGE = {
    "`cancellable_aiter` on a source that is always ready: added per item": (
        "Each item",
        "ready source, added",
    ),
    "the 2019 form, ported to today's Python: a multiple of that": (
        "Each item",
        "ready source, 2019 form / ours",
    ),
    "on a source that suspends: ours / bare `async for`": (
        "Each item",
        "suspending source, ours / bare",
    ),
    "RabbitMQ, CPU per message: the service / aio-pika's `consume(callback)`, one ack each": (
        "rabbitmq: CPU",
        "ours / the bare client, one ack for each message",
    ),
    "the service / FastStream's default subscriber": ("rabbitmq: CPU", "ours / FastStream"),
    "memory growth over 1 000 000 messages through sqlite, after the first tenth": (
        "sqlite: memory",
        "growth",
    ),
    "memory growth over 200 000 messages through RabbitMQ, after the first tenth": (
        "rabbitmq: memory",
        "growth",
    ),
    "RabbitMQ, from SIGTERM to exit: idle": (
        "rabbitmq: from SIGTERM",
        "the generated service: idle",
    ),
    "with 10 handlers of 0.2 s just started": (
        "rabbitmq: from SIGTERM",
        "the generated service: 10 handlers of 0.2 s just begun",
    ),
    "cookiecutter renders a service": ("first contact", "cookiecutter writes a service"),
    "the service and its libraries are installed, from a filled cache": (
        "first contact",
        "the service and its libraries are installed",
    ),
}
"""The rows of the README: the beginning of the part's name, and of the figure's."""

WIDTH, LEFT, RIGHT, TOP, ROW = 760, 330, 60, 44, 22
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600; font-size: 15px }
.ours { fill: #1a7f37 } .others { fill: #8c959f } .line { stroke: #8c959f; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .ours { fill: #2ea043 } .others { fill: #6e7681 } }
"""

INTRODUCTION = """# Benchmarks

Written by `python3 tasks.py bench --publish` from one run. All variants take turns in that run, in random order, and
the median of the rounds is compared with the target. **Quote the ratios**: the microseconds belong to one machine at one time.
A missed target says NO, and stays.

The files of `tools/benchmarks/` define the measurements. Each consumer is written as in its library's own documentation, and its handler
calls the same stopwatch. CPU time is that of the consumer's process alone, from the first message
until the last acknowledgement is written.
"""


def read(results: Path = RESULTS) -> tuple[dict[str, Any], list[Figure]]:
    about, *figures = results.read_text(encoding="utf-8").splitlines()
    return json.loads(about), [Figure.from_json(line) for line in figures]


def write() -> None:
    about, figures = read()
    for name, drawn in charts(figures).items():
        (CHARTS / f"benchmarks-{name}.svg").write_text(drawn, encoding="utf-8", newline="\n")
    PAGE.write_text(page(about, figures), encoding="utf-8", newline="\n")
    readme = README.read_text(encoding="utf-8")
    readme = with_section(readme, "measured", front_page(about, figures))
    README.write_text(readme, encoding="utf-8", newline="\n")


def with_section(text: str, name: str, lines: list[str]) -> str:
    """The text of a page with one of its sections replaced."""
    begin, end = f"<!-- {name}: written by tasks.py bench -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    assert found, name
    _, _, after = rest.partition(end)
    return "\n\n".join([before + begin, "\n".join(lines), end + after])


def front_page(about: dict[str, Any], figures: list[Figure]) -> list[str]:
    lines = [about_run(about) + "\n", "| | median | spread |", "| --- | ---: | --- |"]
    for label, (part, name) in FRONT_PAGE.items():
        for figure in figures:
            if figure.part.startswith(part) and figure.name == name:
                _, median, spread, *_ = figure.row()
                lines.append(f"| {label} | {median} | {spread} |")
    return lines


def about_run(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    sizes = about["sizes"]
    return (
        f"This run: {about['date']}, {about['machine']}, {versions}. {sizes['rounds']} rounds of"
        f" {sizes['messages']:,} messages for each consumer (the SQS emulator gets a tenth)."
    )


def page(about: dict[str, Any], figures: list[Figure]) -> str:
    parts = [
        INTRODUCTION,
        about_run(about) + "\n",
        *(f"![{title}](pictures/benchmarks-{name}.svg)\n" for name, title in ABOUT.items()),
    ]
    for part, group in groupby(figures, key=lambda figure: figure.part):
        measured = list(group)
        parts.append(f"## {part[0].upper()}{part[1:]}\n")
        if notes := [figure.note for figure in measured if not figure.values]:
            parts.append("\n".join(notes) + "\n")
            continue
        table = ["| | median | spread | target | met |", "| --- | ---: | --- | --- | --- |"]
        table += [f"| {' | '.join(cells)} |" for cells in rows(measured)]
        parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def charts(figures: list[Figure]) -> dict[str, str]:
    ratios = [
        (f"{figure.part.partition(':')[0]}: {figure.name.removeprefix('ours / ')}", figure.median)
        for figure in figures
        if figure.name.startswith("ours / ") and figure.values
    ]
    stops = [
        (figure.name, figure.median)
        for figure in figures
        if figure.part.startswith("rabbitmq: from SIGTERM") and figure.unit == "s"
    ]
    return {
        "cpu": chart(ABOUT["cpu"], [(*bar, True) for bar in ratios], line_at=1),
        "stops": chart(
            ABOUT["stops"], [(*bar, bar[0].startswith("the generated")) for bar in stops]
        ),
    }


def chart(title: str, bars: list[tuple[str, float, bool]], line_at: float | None = None) -> str:
    """Horizontal bars, each with its number; ours in another colour. ``line_at`` is where both cost the same."""
    longest = max([line_at or 0, *(value for _, value, _ in bars)], default=1) or 1
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
        for number, (label, value, ours) in enumerate(bars):
            y = TOP + ROW * number
            style = "ours" if ours else "others"
            width = max(1, x(value) - LEFT)
            yield f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
            yield f'<rect class="{style}" x="{LEFT}" y="{y}" width="{width:.1f}" height="16" rx="2"/>'
            yield f'<text x="{x(value) + 6:.1f}" y="{y + 13}">{value:.2f}</text>'
        if line_at is not None:
            at = x(line_at)
            yield f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 6}" y2="{height - 8}"/>'
        yield "</svg>\n"

    return "\n".join(drawn())
