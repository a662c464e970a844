"""CPU time per message of this service beside that of another commit: ``python3 tasks.py bench --against COMMIT``.

Each is rendered from its own template, and run by this interpreter with the same libraries. Each has its own queue,
and its own server unless one is given. They take turns; the ratio is that of the two in each round.
"""

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tools import ROOT
from tools.benchmarks.figures import Figure
from tools.benchmarks.per_message import PREFETCH, SLOW_SERVERS
from tools.benchmarks.service import Service, Unavailable

AT_MOST = 1.05
SOURCES = "{{cookiecutter.project_slug}}/src/{{cookiecutter.package_name}}"


def measure(commit: str, brokers: Sequence[str], messages: int, rounds: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        folder = Path(scratch)
        other = folder / "template"
        other.mkdir()
        archive = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x"], input=archive.stdout, cwd=other, check=True)
        templates = {commit: other, "now": ROOT}
        yield from _figures("the worker loop", _worker_loops(templates, messages, rounds))
        for broker in brokers:
            try:
                count = messages // SLOW_SERVERS.get(broker, 1)
                values = _services(folder / broker, broker, templates, count, rounds)
                yield from _figures(broker, values)
            except Unavailable as reason:
                yield Figure(broker, "not measured", note=f"not measured: {reason}")


def _figures(what: str, values: dict[str, list[float]]) -> Iterator[Figure]:
    (commit, before), (_, now) = values.items()
    part = f"{what}: CPU per message against {commit}"
    yield Figure(part, f"{commit}", before, "µs")
    yield Figure(part, "now", now, "µs")
    ratios = [new / old for new, old in zip(now, before, strict=True)]
    yield Figure(part, f"now / {commit}", ratios, at_most=AT_MOST)


def _worker_loops(templates: dict[str, Path], messages: int, rounds: int) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in templates}
    for number in range(rounds):
        print(f"the worker loop, round {number + 1} of {rounds}", file=sys.stderr)
        for name in random.sample(list(templates), len(templates)):
            path = os.pathsep.join(map(str, (templates[name] / SOURCES, ROOT)))
            done = subprocess.run(
                [sys.executable, "-m", "tools.benchmarks.worker_loop", str(messages)],
                env={**os.environ, "PYTHONPATH": path},
                cwd=templates[name],
                capture_output=True,
                text=True,
                check=True,
            )
            values[name].append(float(done.stderr.splitlines()[-1]))
    return values


def _services(
    folder: Path, broker: str, templates: dict[str, Path], messages: int, rounds: int
) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in templates}
    with ExitStack() as stack:
        queues = {}
        for name, template in templates.items():
            (scratch := folder / name).mkdir(parents=True)
            service = Service(scratch, broker, template=template)
            queues[name] = stack.enter_context(service.queue())
        for number in range(rounds):
            for name in random.sample(list(queues), len(queues)):
                print(f"{broker}, round {number + 1} of {rounds}: {name}", file=sys.stderr)
                queues[name].begin()
                with queues[name].publishing(messages):
                    pass
                report = queues[name].consume(messages, prefetch=PREFETCH, concurrency=PREFETCH)
                values[name].append(report["cpu_seconds"] * 1e6 / messages)
    return values
