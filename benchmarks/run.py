"""Measures what this template promises about speed: ``python3 tasks.py bench [OPTIONS]``.

Times are of this machine at this hour: compare only within one run. What is compared takes turns, and the
median of the rounds is held against the target.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import exit_times
import iterator
import memory
import rabbitmq
from figures import Figure, table
from service import Service, Unavailable

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("aio-pika", "aiormq", "faststream", "pydantic", "structlog")


@dataclass(frozen=True)
class Sizes:
    """How much of everything; items and messages are for each variant in each round."""

    rounds: int
    items: int
    messages: int
    messages_through_sqlite: int
    messages_through_rabbitmq: int
    stops: int


FULL = Sizes(5, 20_000, 20_000, 1_000_000, 200_000, 10)
QUICK = Sizes(1, 1_000, 500, 2_000, 500, 1)

MEASUREMENTS: list[tuple[str, Callable[[Service, Sizes], Iterable[Figure]]]] = [
    ("iterator", lambda _, sizes: iterator.measure(sizes.items, 5 * sizes.rounds)),
    ("cpu", lambda service, sizes: rabbitmq.measure(service, sizes.messages, sizes.rounds)),
    (
        "memory",
        lambda service, sizes: memory.measure(service, "sqlite", sizes.messages_through_sqlite),
    ),
    (
        "memory",
        lambda service, sizes: memory.measure(service, "rabbitmq", sizes.messages_through_rabbitmq),
    ),
    ("exit", lambda service, sizes: exit_times.measure(service, "sqlite", sizes.stops)),
    ("exit", lambda service, sizes: exit_times.measure(service, "rabbitmq", sizes.stops)),
]


def main() -> int:
    arguments = parse_arguments()
    sizes = QUICK if arguments.quick else FULL
    given = {name: getattr(arguments, name) for name in ("rounds", "messages")}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        service = Service(Path(scratch))
        for name, measure in MEASUREMENTS:
            if arguments.only and name not in arguments.only:
                continue
            try:
                figures += measure(service, sizes)
            except Unavailable as reason:
                figures.append(Figure(name, "not measured", note=f"not measured: {reason}"))
    print(table(figures))
    versions = {library: version(library) for library in LIBRARIES}
    print(f"\nPython {platform.python_version()}, {', '.join(map(' '.join, versions.items()))}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"python": platform.python_version(), **versions, "sizes": asdict(sizes)}
    lines = [json.dumps(about), *(figure.json() for figure in figures)]
    arguments.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"also in {arguments.output}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tasks.py bench", description="How fast is it, beside others?"
    )
    names = list(dict.fromkeys(name for name, _ in MEASUREMENTS))
    parser.add_argument("--only", action="append", choices=names, help="this part; may be repeated")
    parser.add_argument(
        "--rounds", type=int, help=f"turns of what is compared (default {FULL.rounds})"
    )
    parser.add_argument(
        "--messages", type=int, help=f"for each consumer in each round (default {FULL.messages})"
    )
    parser.add_argument("--quick", action="store_true", help="does it run? Little of everything")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / ".cache/benchmarks.jsonl",
        help="for the figures, as JSON lines",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
