"""Measures what this template promises about speed: ``python3 tasks.py bench [OPTIONS]``.

Times are of this machine at this hour: compare only within one run. What is compared takes turns, and the
median of the rounds is held against the target.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import exit_times
import iterator
import memory
import per_message
from figures import Figure, table
from service import Service, Unavailable

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    *("aio-pika", "aiormq", "nats-py", "redis", "aiokafka", "aiobotocore", "asyncpg", "aiomqtt"),
    *("faststream", "pydantic", "structlog"),
)
BROKERS = (*per_message.AT_MOST, "sqlite")
PARTS = ("iterator", "cpu", "memory", "exit")


@dataclass(frozen=True)
class Sizes:
    """How much of everything; items and messages are for each variant in each round."""

    rounds: int
    items: int
    messages: int
    messages_through: dict[str, int]
    """For the memory; of the brokers that are not named it is not measured."""
    stops: int


FULL = Sizes(5, 20_000, 20_000, {"sqlite": 1_000_000, "rabbitmq": 200_000}, 10)
QUICK = Sizes(1, 1_000, 500, {"sqlite": 2_000, "rabbitmq": 500}, 1)


def main() -> int:
    arguments = parse_arguments()
    sizes = QUICK if arguments.quick else FULL
    given = {name: getattr(arguments, name) for name in ("rounds", "messages")}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    if arguments.alone:
        with redirect_stdout(sys.stderr):  # for what the runtime logs in this process
            measured = list(measure_broker(arguments.alone, arguments.only or PARTS, sizes))
        print("\n".join(figure.json() for figure in measured))
        return 0
    figures: list[Figure] = []
    if "iterator" in (arguments.only or PARTS):
        figures += iterator.measure(sizes.items, 5 * sizes.rounds)
    for broker in arguments.broker or BROKERS:
        figures += measure_in_a_process_of_its_own(broker)
    print(table(figures))
    versions = dict(found_versions())
    print(f"\nPython {platform.python_version()}, {', '.join(map(' '.join, versions.items()))}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"python": platform.python_version(), **versions, "sizes": asdict(sizes)}
    lines = [json.dumps(about), *(figure.json() for figure in figures)]
    arguments.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"also in {arguments.output}")
    return 0


def measure_in_a_process_of_its_own(broker: str) -> list[Figure]:
    """A process can import the tests of one service only; the last of two --alone counts."""
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", broker]
    measured = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Figure.from_json(line) for line in measured.stdout.splitlines()]


def measure_broker(broker: str, parts: Iterable[str], sizes: Sizes) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        service = Service(Path(scratch), broker)
        try:
            if "cpu" in parts and broker in per_message.AT_MOST:
                yield from per_message.measure(service, sizes.messages, sizes.rounds)
            if "memory" in parts and broker in sizes.messages_through:
                yield from memory.measure(service, sizes.messages_through[broker])
            if "exit" in parts:
                yield from exit_times.measure(service, sizes.stops)
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
        prog="tasks.py bench", description="How fast is it, beside others?"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument(
        "--broker", action="append", choices=BROKERS, help="this broker; may be repeated"
    )
    parser.add_argument("--alone", choices=BROKERS, help=argparse.SUPPRESS)
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
