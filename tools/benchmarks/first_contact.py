"""The time until a service is rendered and its dependencies are installed, from a filled cache, for a newcomer."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from tools import ROOT
from tools.benchmarks.figures import Figure
from tools.scaffold import install, scaffold

HANDLER = "async def handle(body: bytes) -> None: ...\n"
STEPS = (
    "tasks.py makes its own environment",
    "cookiecutter writes a service",
    "the service and its libraries are installed",
)


def measure(rounds: int) -> Iterator[Figure]:
    print("first contact", file=sys.stderr)
    waits = [seconds_of_each_step() for _ in range(rounds + 1)][1:]  # the first fills the cache
    for name, seconds in zip(STEPS, zip(*waits, strict=True), strict=True):
        yield Figure("first contact", name, list(seconds), "s")


def seconds_of_each_step() -> list[float]:
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        tasks = Path(scratch, "tasks")
        tasks.mkdir()
        for name in ("tasks.py", "pyproject.toml"):
            shutil.copy(ROOT / name, tasks)
        bootstrap = [sys.executable, "-c", "import tasks; tasks.bootstrap('demo')"]
        moments = [time.perf_counter()]
        subprocess.run(bootstrap, cwd=tasks, check=True, stdout=subprocess.DEVNULL)
        moments.append(time.perf_counter())
        project = scaffold(Path(scratch, "service"), handler=HANDLER)
        moments.append(time.perf_counter())
        install(project)
        moments.append(time.perf_counter())
    return [after - before for before, after in pairwise(moments)]
