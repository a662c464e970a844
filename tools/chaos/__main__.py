"""Chaos experiments: ``python3 tasks.py chaos [--broker B] [--minutes M] [--seed S] [--only PART] [--sweep]``.

A service runs as several real processes on a private broker, and faults of a plan, generated from a seed, hit
processes, broker and network. After each experiment the counts must agree: published = done + queued + dead letters.
"""

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

from tools import ROOT
from tools.chaos import Stuck
from tools.chaos.clusters import CLUSTERS
from tools.chaos.plan import draw
from tools.chaos.rounds import Round
from tools.chaos.scenarios import Failover, Kills, Rolling, Sweep
from tools.chaos.testbed import Experiment, Queue, Testbed, Unavailable, testbed
from tools.kafka import variables_for

BROKERS = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))["broker"]
PARTS = ("random", "rolling", "kills", "sweep", "failover")
ROUND_SECONDS = 25
RESTARTS, RESTARTED_IDS = 20, 10_000
KILLS, KILLED_IDS = 50, 5_000
FAILOVERS, FAILOVER_IDS = 3, 3_000
SWEEP_EVERY_MS = 5
SHOWN = 8
"""The most violations of one experiment that are printed; its folder has all."""


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    broker: str
    run: str
    published: int = 0
    done: int = 0
    twice: int = 0
    dead: int = 0
    lost: int = 0
    stops: int = 0
    kills: int = 0
    seed: int = 0
    violations: tuple[str, ...] = ()
    note: str = ""


def main() -> int:
    arguments = parse_arguments()
    results: list[Result] = []
    with redirect_stdout(sys.stderr):  # for the lines of progress
        for broker in arguments.broker:
            results += run_broker(broker, arguments)
    print(table(results))
    failed = [one for one in results if one.violations]
    for one in failed:
        print(f"\n{one.broker}, {one.run}, seed {one.seed}:")
        print("\n".join(f"  - {violation[:600]}" for violation in one.violations[:SHOWN]))
        print(f"  again: {replay(one)}\n  what happened: {arguments.output / name_of(one)}")
    return 1 if failed or not results else 0


def replay(one: Result) -> str:
    return f"python3 tasks.py chaos --broker {one.broker} --only {one.run.split()[0]} --seed {one.seed}"


def name_of(one: Result) -> str:
    return f"{one.broker}-{one.run.split()[0]}-{one.seed}"


def run_broker(broker: str, arguments: argparse.Namespace) -> Iterator[Result]:
    os.environ.pop("CONSUMER_TEST_BROKER_URL", None)  # only a private broker is killed and cut
    try:
        on_one = [part for part in arguments.only if part != "failover" and broker in BROKERS]
        if on_one:
            with (
                patch.dict(os.environ, variables_for(broker)),
                testbed(broker, cluster=False) as built,
            ):
                for part in on_one:
                    yield from PART_RUNNERS[part](built, arguments)
        if "failover" in arguments.only and broker in CLUSTERS:
            with testbed(broker, cluster=True) as built:
                yield from failovers(built, arguments)
    except Unavailable as reason:
        yield Result(broker, "-", note=f"not run: {reason}")


def random_rounds(testbed: Testbed, arguments: argparse.Namespace) -> Iterator[Result]:
    """Rounds with the seeds S, S + 1, ... until the minutes are over; at least one."""
    ends_at = time.monotonic() + 60 * arguments.minutes
    for seed in itertools.count(arguments.seed):
        plan = draw(seed, testbed.abilities, arguments.seconds)
        name = f"random ({'gentle' if plan.gentle else 'rough'})"
        yield carry_out(testbed, name, seed, arguments, partial(Round, plan=plan))
        if time.monotonic() > ends_at:
            return


def rolling_restarts(testbed: Testbed, arguments: argparse.Namespace) -> Iterator[Result]:
    ids = arguments.ids or RESTARTED_IDS
    yield carry_out(
        testbed, "rolling", arguments.seed, arguments, lambda q: Rolling(q, RESTARTS, ids)
    )


def sigkills(testbed: Testbed, arguments: argparse.Namespace) -> Iterator[Result]:
    ids, seed = arguments.ids or KILLED_IDS, arguments.seed
    yield carry_out(testbed, "kills", seed, arguments, lambda q: Kills(q, KILLS, ids, seed))


def failovers(testbed: Testbed, arguments: argparse.Namespace) -> Iterator[Result]:
    ids = arguments.ids or FAILOVER_IDS
    yield carry_out(
        testbed, "failover", arguments.seed, arguments, lambda q: Failover(q, FAILOVERS, ids)
    )


def start_up(testbed: Testbed, arguments: argparse.Namespace) -> Iterator[Result]:
    every_ms = arguments.every_ms
    yield carry_out(testbed, "sweep", arguments.seed, arguments, lambda q: Sweep(q, every_ms))


def carry_out(
    testbed: Testbed,
    name: str,
    seed: int,
    arguments: argparse.Namespace,
    make: Callable[[Queue], Experiment],
) -> Result:
    """Run it on its own queue; returns its row of the table, and writes its folder even if it fails."""
    queue = testbed.queue()
    run = make(queue)
    violations: list[str] = []
    try:
        run.run()
    except (Stuck, AssertionError) as stuck:  # AssertionError comes from a wait of harness/
        violations.append(f"stuck: {str(stuck)[-1000:]}")
        queue.fill_in(run.reconciliation)
    finally:
        queue.close()
    reconciliation = run.reconciliation
    violations += [*run.violations, *reconciliation.violations()]
    one = Result(
        testbed.broker,
        name,
        len(reconciliation.published),
        len(reconciliation.done & reconciliation.published.keys()),
        reconciliation.twice,
        reconciliation.dead_count,
        len(reconciliation.lost),
        run.stops,
        run.kills,
        seed,
        tuple(violations),
    )
    report(one, queue, arguments, run.text())
    return one


def report(one: Result, queue: Queue, arguments: argparse.Namespace, log: str) -> None:
    """A line of progress, and the files of the run: its plan and its steps; after a failure also the logs."""
    folder = arguments.output / name_of(one)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text(log, encoding="utf-8")
    (folder / "violations").write_text("\n".join(one.violations), encoding="utf-8")
    if one.violations:
        queue.keep(folder)
    verdict = "RED" if one.violations else "ok"
    print(f"{one.broker} {one.run} seed {one.seed}: {one.done} of {one.published} done, {verdict}")
    for violation in one.violations[:SHOWN]:
        print(f"  - {violation[:600]}")
    sys.stdout.flush()


PART_RUNNERS: dict[str, Callable[[Testbed, argparse.Namespace], Iterator[Result]]] = {
    "random": random_rounds,
    "rolling": rolling_restarts,
    "kills": sigkills,
    "sweep": start_up,
}


def table(results: list[Result]) -> str:
    columns = (
        "broker",
        "run",
        "published",
        "done",
        "twice",
        "dead",
        "lost",
        "stops",
        "kills",
        "seed",
    )
    rows = [[str(getattr(one, column)) for column in columns] for one in results]
    rows = [
        [*row, one.note or ("RED" if one.violations else "ok")]
        for row, one in zip(rows, results, strict=True)
    ]
    head = [*columns, ""]
    align = ["---", "---", *["---:"] * (len(columns) - 2), "---"]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, align, *rows])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tasks.py chaos", description=__doc__)
    parser.add_argument(
        "--broker",
        action="append",
        choices=[*dict.fromkeys([*BROKERS, *CLUSTERS]), "all"],
        help="may be repeated; by default sqlite and rabbitmq",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=PARTS,
        help="this part; may be repeated; by default the first three. failover: the leader of a cluster is killed",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="only the sweep: SIGTERM at every moment of the start"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=0,
        help="random rounds go on for so long (default: one round)",
    )
    parser.add_argument(
        "--seconds", type=float, default=ROUND_SECONDS, help="duration of a random round"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=None,
        help="of the first round; a round with this seed has the same plan",
    )
    parser.add_argument(
        "--ids",
        type=int,
        help=f"messages of each named run (default {RESTARTED_IDS} and {KILLED_IDS})",
    )
    parser.add_argument(
        "--every-ms", type=int, default=SWEEP_EVERY_MS, help="interval of the sweep"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / ".cache/chaos", help="folder for plans and logs"
    )
    arguments = parser.parse_args()
    chosen = arguments.broker or ["sqlite", "rabbitmq"]
    arguments.broker = BROKERS if "all" in chosen else chosen
    arguments.only = (
        ["sweep"] if arguments.sweep else arguments.only or ["random", "rolling", "kills"]
    )
    if arguments.seed is None:
        arguments.seed = random.randrange(2**32)
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
