"""Measures the template's promises about speed: ``python3 tasks.py bench [OPTIONS]``.

Times are valid for this machine at this hour: compare only within one run. The variants take turns, and the
median of the rounds is compared with the target.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tools import ROOT
from tools.benchmarks import (
    against,
    behaviour,
    contest,
    defaults,
    exit_times,
    first_contact,
    iterator,
    kafka_clients,
    latency,
    memory,
    per_message,
    publishing,
    publishing_beside,
    report,
    scaling,
    scaling_page,
    worker_loop,
)
from tools.benchmarks.figures import Figure, Outcome, table
from tools.benchmarks.service import Service, Unavailable

LIBRARIES = (
    *("aio-pika", "aiormq", "nats-py", "redis", "aiokafka", "confluent-kafka", "aiobotocore"),
    *("asyncpg", "aiomqtt"),
    *("faststream", "taskiq", "taskiq-aio-pika", "pydantic", "structlog"),
)
BROKERS = (*per_message.AT_MOST, "sqlite")
BESIDE = ("behaviour", "latency")
"""Parts that compare the service with other consumers of RabbitMQ; their figures have a file of their own."""
PARTS = (*BESIDE, "first", "iterator", "worker", "cpu", "publish", "memory", "exit", "clients")
ON_ITS_OWN = "scaling"
"""A part that runs only when it is asked for, and has a page of its own."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of a run; items and messages are for each variant in each round."""

    rounds: int
    items: int
    messages: int
    messages_through: dict[str, int]
    """For the memory; brokers without an entry are not measured."""
    stops: int
    behaviour: behaviour.Sizes
    latency: dict[int, int]
    """Messages per second, and the number of messages for each contender in each round."""
    scaling: scaling.Sizes


FULL = Sizes(
    *(5, 20_000, 20_000, {"sqlite": 1_000_000, "rabbitmq": 200_000}, 5),
    behaviour.Sizes(repetitions=2, handler_seconds=1, long_seconds=15, silence_seconds=10),
    {20: 200, 500: 5_000},
    scaling.Sizes(processes=(1, 2, 4, 8), messages=200, trivial=5_000, kills=3),
)
QUICK = Sizes(
    *(1, 1_000, 500, {"sqlite": 2_000, "rabbitmq": 500}, 1),
    behaviour.Sizes(1, handler_seconds=2, long_seconds=5, silence_seconds=1, contenders=2),
    {50: 50},
    scaling.Sizes(processes=(2,), messages=20, trivial=500, kills=1),
)


def main() -> int:
    arguments = parse_arguments()
    sizes = QUICK if arguments.quick else FULL
    given = {name: getattr(arguments, name) for name in ("rounds", "messages")}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    with redirect_stdout(sys.stderr):  # for the runtime's logs in this process
        defaults.check()
        parts, brokers = arguments.only or PARTS, arguments.broker or BROKERS
        with_others = "rabbitmq" in brokers and not arguments.against
        server, beside = measure_beside(parts, sizes) if with_others else ("", [])
        if arguments.against:
            figures = [*against.measure(arguments.against, brokers, sizes.messages, sizes.rounds)]
        else:
            figures = [*measure(parts, brokers, sizes)]
    print(table([*beside, *figures]))
    versions = {"Python": platform.python_version(), **dict(found_versions())}
    versions |= {"RabbitMQ": server} if server else {}
    print(f"\n{', '.join(map(' '.join, versions.items()))}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    page = scaling_page if ON_ITS_OWN in (arguments.only or ()) else report
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores",
        "cores": os.cpu_count(),
        "load_before": load,
        "versions": versions,
        "sizes": asdict(sizes),
    }
    if arguments.publish:
        own = report.AGAINST if arguments.against else page.RESULTS
        published = [figure for figure in figures if publishing.PART in figure.part]
        others = [one for one in figures if publishing.WORD in one.part and one not in published]
        rest = [figure for figure in figures if figure not in (*published, *others)]
        for results, measured in (
            (report.BESIDE, beside),
            (report.PUBLISHING, published),
            (report.PUBLISHING_BESIDE, others),
            (own, rest),
        ):
            if measured:
                write(results, *report.with_what_stays(results, about, measured))
        page.write()
    else:
        write(arguments.output, about, [*beside, *figures])
    return 0


def write(output: Path, about: dict[str, Any], figures: Iterable[Figure | Outcome]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(about), *(figure.json() for figure in figures)]
    output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"also in {output}")


def measure_beside(parts: Sequence[str], sizes: Sizes) -> tuple[str, list[Figure | Outcome]]:
    """The version of RabbitMQ, and the figures."""
    figures: list[Figure | Outcome] = []
    if not set(BESIDE).intersection(parts):
        return "", figures
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        try:
            with contest.arena(Path(scratch)) as arena:
                if "behaviour" in parts:
                    figures += behaviour.measure(arena, sizes.behaviour)
                if "latency" in parts:
                    figures += latency.measure(arena, sizes.latency, sizes.rounds)
                return arena.version(), figures
        except Unavailable as reason:
            return "", [Figure("beside others", "not measured", note=f"not measured: {reason}")]


def measure(parts: Sequence[str], brokers: Iterable[str], sizes: Sizes) -> Iterator[Figure]:
    if "first" in parts:
        yield from first_contact.measure(sizes.rounds)
    if "iterator" in parts:
        yield from iterator.measure(sizes.items, 5 * sizes.rounds)
    if "worker" in parts:
        yield from worker_loop.measure(sizes.messages, 5 * sizes.rounds)
    for broker in brokers:
        yield from measure_broker(broker, parts, sizes)


def measure_broker(broker: str, parts: Sequence[str], sizes: Sizes) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        try:
            if ON_ITS_OWN in parts:
                yield from scaling.measure(Path(scratch), broker, sizes.scaling)
                return
            service = Service(Path(scratch), broker)
            if "cpu" in parts and broker in per_message.AT_MOST:
                yield from per_message.measure(service, sizes.messages, sizes.rounds)
            if "publish" in parts and broker == "rabbitmq":
                yield from publishing.measure(Path(scratch), sizes.messages, sizes.rounds)
            if "publish" in parts and broker in publishing_beside.CLIENTS:
                yield from publishing_beside.measure(
                    broker, Path(scratch), sizes.messages, sizes.rounds
                )
            if "memory" in parts and broker in sizes.messages_through:
                yield from memory.measure(service, sizes.messages_through[broker])
            if "exit" in parts:
                yield from exit_times.measure(service, sizes.stops)
            if "clients" in parts and broker == "kafka":
                yield from kafka_clients.measure(sizes.rounds)
        except Unavailable as reason:
            yield Figure(broker, "not measured", note=f"not measured: {reason}")


def found_versions() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, version(library)
        except PackageNotFoundError:
            continue


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tasks.py bench", description="Measures the service, and other consumers."
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=(*PARTS, ON_ITS_OWN),
        help=f"this part; may be repeated; {ON_ITS_OWN} only alone",
    )
    parser.add_argument(
        "--broker", action="append", choices=BROKERS, help="this broker; may be repeated"
    )
    parser.add_argument(
        "--against",
        metavar="COMMIT",
        help="only the CPU per message, compared with that commit's service",
    )
    parser.add_argument(
        "--rounds", type=int, help=f"rounds of each comparison (default {FULL.rounds})"
    )
    parser.add_argument(
        "--messages",
        type=int,
        help=f"messages for each consumer in each round (default {FULL.messages})",
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write docs/benchmarks.md and its charts from this run, or docs/scaling.md",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few messages and rounds, only to check that it runs"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / ".cache/benchmarks.jsonl",
        help="for the figures, as JSON lines",
    )
    arguments = parser.parse_args()
    if ON_ITS_OWN in (arguments.only or ()) and len(arguments.only) > 1:
        parser.error(f"{ON_ITS_OWN} has a page of its own, so it is measured on its own")
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
