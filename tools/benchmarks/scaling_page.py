"""Writes the tables of docs/scaling.md: ``python3 tasks.py bench --only scaling --publish`` runs it at its end.

The text between the marks of a section comes only from scaling.jsonl and capacity.py.
"""

import math
import re
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.benchmarks import report
from tools.benchmarks.capacity import Autoscaler, Moment, Service, longest_wait, simulate, threshold
from tools.benchmarks.figures import Figure
from tools.benchmarks.scaling import (
    CONCURRENCY,
    CPU,
    HANDLER_SECONDS,
    LEAST,
    LOST,
    MOST,
    PARTITIONS,
    RATE,
    REDELIVERY,
    TRIVIAL,
    TWICE,
    UNTIL,
    WAITING,
)

RESULTS = Path(__file__).with_name("scaling.jsonl")
PAGE = report.DOCS / "scaling.md"
BROKERS_PAGE = report.DOCS / "brokers.md"
NAMES = {
    "rabbitmq": "RabbitMQ",
    "nats": "NATS",
    "redis": "Redis",
    "kafka": "Kafka",
    "sqs": "SQS",
    "postgres": "PostgreSQL",
    "mqtt": "MQTT",
    "sqlite": "SQLite",
}
STAND_IN = "sqs"
"""moto answers one request at a time, and small batches cost it as much as full ones: SQS behaves differently."""

Measured = dict[str, dict[int, dict[str, float]]]
"""The results of one broker: by kind of handler, number of processes and quantity."""

HANDLERS_SECONDS = (0.02, 0.2, 2.0)
RATES = (100, 1_000, 5_000)
WAITS_SECONDS = (2, 5, 10, 20, 60)
EXAMPLE = Service(handler_seconds=0.2, concurrency=10)
EXAMPLE_RATE = 80
AWAY_SECONDS = 60
QUIET, BUSY, BUSY_FROM, BUSY_TO, HOUR = 0.5, 3.2, 600, 2400, 3600
"""The load of the simulation, as parts of one replica's rate, and the seconds between which it is high."""


def write() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


def page(text: str) -> str:
    """The page with its sections replaced."""
    about, figures = report.read(RESULTS)
    sections = {
        "measured": measured_section(about, figures),
        "redelivery": redelivery_section(figures),
        "model": model_section(about, figures),
        "replicas": replicas_section(),
        "autoscaler": autoscaler_section(),
    }
    for name, lines in sections.items():
        text = report.with_section(text, name, lines)
    return text


# -- the measurements


def points(figures: list[Figure]) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for figure in figures:
        broker, _, kind = figure.part.partition(": ")
        if kind in (WAITING, TRIVIAL) and figure.values:
            [(processes, quantity)] = re.findall(r"^(\d+) process\w*: (.+)$", figure.name)
            of_kind = found.setdefault(broker, {}).setdefault(kind, {})
            of_kind.setdefault(int(processes), {})[quantity] = figure.median
    return found


def model(about: dict[str, Any], broker: str, measured: Measured) -> Service:
    """The model uses no measurement with more than one waiting process. If broker and processes share the cores of one
    machine, the cores are the shared resource: they do the most messages when no handler waits."""
    cores = int(about["cores"])
    one, idle = measured[WAITING][1], measured[TRIVIAL]
    most = max(idle, key=lambda processes: idle[processes][RATE])
    broker_cpu_seconds = max(0.0, cores / idle[most][RATE] - idle[most][CPU] / 1e6)
    cpu_seconds = one[CPU] / 1e6
    return Service(
        handler_seconds=HANDLER_SECONDS,
        concurrency=CONCURRENCY,
        cpu_seconds=cpu_seconds,
        shared_seconds=(cpu_seconds + broker_cpu_seconds) / cores,
        partitions=PARTITIONS.get(broker),
    ).calibrated(one[RATE])


def errors(about: dict[str, Any], figures: list[Figure]) -> dict[tuple[str, int], float]:
    """For each broker and more than one process: the model's error, as a part of the measured rate."""
    return {
        (broker, processes): model(about, broker, measured).throughput(processes) / point[RATE] - 1
        for broker, measured in points(figures).items()
        if broker != STAND_IN
        for processes, point in measured[WAITING].items()
        if processes > 1
    }


def measured_section(about: dict[str, Any], figures: list[Figure]) -> list[str]:
    found = points(figures)
    processes = sorted(next(iter(found.values()))[WAITING])
    counted = [figure for figure in figures if figure.name.endswith((TWICE, LOST))]
    bad = [
        f"{figure.part}, {figure.name}: {figure.median:.0f}"
        for figure in counted
        if figure.met is False
    ]
    lines = [
        f"This run: {about['date']}, {about['machine']}, with a load of {about['load_before']:.1f} by other processes at the start."
        f" Handled twice or lost in all runs:"
        f" {'; '.join(bad) if bad else 'none'}.",
        "",
        f"Messages per second of {', '.join(map(str, processes))} processes:",
        "",
        table_head(
            [
                "",
                *(f"{number}" for number in processes),
                "relative to one",
                "busiest to idlest process (1 is an equal share)",
            ]
        ),
    ]
    for broker, measured in found.items():
        of = measured[WAITING]
        least, most = of[processes[-1]][LEAST], of[processes[-1]][MOST]
        gain = of[processes[-1]][RATE] / of[1][RATE]
        cells = [f"{of[number][RATE]:,.0f}" for number in processes]
        lines.append(row([NAMES[broker], *cells, f"{gain:.1f}", f"{most:.2f} to {least:.2f}"]))
    lines += [
        "",
        "The same with trivial handlers and a concurrency of 100: the maximum of broker and cores.",
        "",
        table_head(["", *(f"{number}" for number in processes), "CPU per message"]),
    ]
    for broker, measured in found.items():
        of = measured[TRIVIAL]
        cells = [f"{of[number][RATE]:,.0f}" for number in processes]
        lines.append(row([NAMES[broker], *cells, f"{of[1][CPU]:.0f} µs"]))
    return lines


def redelivery_section(figures: list[Figure]) -> list[str]:
    lines = [table_head(["", "with", "seconds", "by default"])]
    default = by_default()
    for figure in figures:
        broker, _, kind = figure.part.partition(": ")
        if kind == REDELIVERY and figure.name == UNTIL:
            spread = f"{min(figure.values):.2f} to {max(figure.values):.2f}"
            options = f"`?{figure.note}`" if figure.note else ""
            lines.append(row([NAMES[broker], options, spread, default[NAMES[broker]]]))
    return lines


def by_default() -> dict[str, str]:
    """The row of docs/brokers.md, by the head of its table, which is the page's first."""
    lines = BROKERS_PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    [times] = [row for row in rows if row[0].startswith("redelivery of a dead consumer")]
    return dict(zip(rows[0][1:], times[1:], strict=True))


# -- the conclusions


def model_section(about: dict[str, Any], figures: list[Figure]) -> list[str]:
    found = points(figures)
    off = errors(about, figures)
    processes = sorted({number for _, number in off})
    lines = [
        f"Compared with the measurement, the model is off by {statistics.median(map(abs, off.values())):.0%} in the median"
        f" and by {max(map(abs, off.values())):.0%} at most:",
        "",
        table_head(["", *(f"{number} processes: model, measured" for number in processes)]),
    ]
    for broker, measured in found.items():
        if broker != STAND_IN:
            service = model(about, broker, measured)
            cells = [
                f"{service.throughput(number):,.0f}, {measured[WAITING][number][RATE]:,.0f}"
                for number in processes
            ]
            lines.append(row([NAMES[broker], *cells]))
    return lines


def replicas_section() -> list[str]:
    lines = [
        table_head(
            [
                "handler",
                "one replica",
                *(f"for {rate:,}/s" for rate in RATES),
                "a pod's work of 20 s",
            ]
        )
    ]
    for seconds in HANDLERS_SECONDS:
        service = replace(EXAMPLE, handler_seconds=seconds)
        needed = [f"{service.replicas(rate)}" for rate in RATES]
        of_20_s = f"{threshold(service, 20):,.0f} messages"
        lines.append(row([f"{seconds:g} s", f"{service.pod_rate:,.0f}/s", *needed, of_20_s]))
    replicas = EXAMPLE.replicas(EXAMPLE_RATE) or 0
    gathered = max(0, EXAMPLE_RATE - EXAMPLE.throughput(replicas - 1)) * AWAY_SECONDS
    to_spare = EXAMPLE.throughput(replicas) - EXAMPLE_RATE
    lines += [
        "",
        f"Example: {EXAMPLE_RATE} messages a second, handlers of {EXAMPLE.handler_seconds:g} s,"
        f" `CONSUMER_CONCURRENCY={EXAMPLE.concurrency}`. One replica handles {EXAMPLE.concurrency} /"
        f" {EXAMPLE.handler_seconds:g} = {EXAMPLE.pod_rate:.0f} a second. With a fifth more,"
        f" {EXAMPLE_RATE * 1.2:.0f} / {EXAMPLE.pod_rate:.0f} gives **{replicas} replicas**. If one of them is absent for"
        f" {AWAY_SECONDS} seconds, {gathered:,.0f} messages accumulate. All replicas together have {to_spare:.0f} a second to spare,"
        f" so the backlog is gone after {gathered / to_spare:.0f} seconds. For a faster recovery, add a replica.",
    ]
    return lines


def load(seconds: float) -> float:
    part = BUSY if BUSY_FROM <= seconds < BUSY_TO else QUIET
    return part * EXAMPLE.pod_rate


def autoscaler_section() -> list[str]:
    needed = math.ceil(BUSY)
    lines = [
        f"Simulated: one hour with {BUSY * EXAMPLE.pod_rate:.0f} messages a second for half an hour, and"
        f" {QUIET * EXAMPLE.pod_rate:.0f} before and after it. A pod handles {EXAMPLE.pod_rate:.0f}, so {needed} are needed; a new one"
        " is ready after 20 s; the maximum is 20.",
        "",
        table_head(
            [
                "threshold",
                "seconds of a pod's work",
                "`minReplicaCount`",
                "maximum of pods",
                "longest wait",
                "pod hours",
                "removed although needed",
            ]
        ),
    ]
    for seconds, least in [*((seconds, 1) for seconds in WAITS_SECONDS), (20, needed)]:
        messages = threshold(EXAMPLE, seconds)
        moments = list(simulate(EXAMPLE, Autoscaler(messages, least), load, HOUR))
        cells = [f"{messages:,.0f}", f"{seconds}", f"{least}"]
        cells += [f"{max(moment.replicas for moment in moments)}", f"{longest_wait(moments):.0f} s"]
        cells += [
            f"{sum(moment.replicas for moment in moments) / 3600:.1f}",
            times(taken_away(moments)),
        ]
        lines.append(row(cells))
    return lines


def taken_away(moments: list[Moment]) -> int:
    """How often, during the high load, there were fewer replicas than it needs after there had been enough."""
    numbers = [moment.replicas for moment in moments if BUSY_FROM <= moment.at_seconds < BUSY_TO]
    return sum(before >= BUSY > after for before, after in pairwise(numbers))


def times(number: int) -> str:
    return {0: "never", 1: "once"}.get(number, f"{number} times")


def table_head(cells: list[str]) -> str:
    return f"{row(cells)}\n{row(['---', *['---:'] * (len(cells) - 1)])}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
