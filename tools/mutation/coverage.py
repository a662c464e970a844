"""Coverage of the runtime: ``python3 tasks.py coverage [BROKER...] [--tests ARGUMENTS] [--html FOLDER]``.

A service is rendered for each broker, and its own tests run, the very slow ones too, with every branch of
``runtime/`` counted; also in the programs that they start, however those end but by SIGKILL. Less than 95 % of
the branches is an error.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.scaffold import ROOT, scaffold, servers_of

BROKERS = json.loads((ROOT / "cookiecutter.json").read_text("utf-8"))["broker"]
AT_LEAST_PERCENT = 95
WHOLE = "-m '' -n 2"

SETTINGS = """
[tool.coverage.run]
branch = true
source_pkgs = ["order_events.runtime"]
data_file = "{folder}/.coverage"
parallel = true
patch = ["subprocess", "_exit"]
disable_warnings = ["no-data-collected", "module-not-imported", "module-not-measured", "already-imported"]

[tool.coverage.report]
exclude_also = ["if TYPE_CHECKING:", "assert_never"]
"""


@dataclass(frozen=True)
class Count:
    """Of one module, or of all: how many there are, and how many were reached."""

    lines: int
    lines_reached: int
    branches: int
    branches_reached: int
    missing: str = ""

    @property
    def percent(self) -> float:
        return 100 * self.branches_reached / self.branches if self.branches else 100.0

    def row(self, name: str) -> str:
        lines = 100 * self.lines_reached / self.lines if self.lines else 100.0
        return f"| {name} | {lines:.1f} | {self.percent:.1f} | {self.missing} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tasks.py coverage", description=__doc__)
    parser.add_argument(
        "broker", nargs="*", default=["rabbitmq"], help="one of " + ", ".join(BROKERS)
    )
    parser.add_argument(
        "--tests", default=WHOLE, help="pytest's arguments, in place of: %(default)s"
    )
    parser.add_argument(
        "--html", type=Path, help="write the lines here, in a folder for each broker"
    )
    arguments = parser.parse_args()
    enough = True
    for broker in arguments.broker:
        modules, passed = measure(broker, shlex.split(arguments.tests), arguments.html)
        total = modules["**all**"]
        print(f"\n{broker}:\n\n| module | lines, % | branches, % | not reached |")
        print("| --- | --: | --: | --- |")
        print("\n".join(count.row(name) for name, count in modules.items()), flush=True)
        enough = enough and passed and total.percent >= AT_LEAST_PERCENT
    return 0 if enough else 1


def measure(broker: str, tests: list[str], html: Path | None) -> tuple[dict[str, Count], bool]:
    """The counts of each module, and whether the tests passed."""
    with tempfile.TemporaryDirectory(prefix="coverage-") as scratch:
        service = scaffold(Path(scratch), f"broker={broker}")
        project = service / "pyproject.toml"
        settings = SETTINGS.format(folder=scratch)
        project.write_text(project.read_text("utf-8") + settings, "utf-8")
        passed = True
        for server in servers_of(broker):
            pytest = ["-m", "pytest", "-p", "no:cacheprovider", *tests, *server.arguments]
            passed = coverage(service, "run", *pytest, **server.variables) == 0 and passed
        coverage(service, "combine", "--quiet")
        if html is not None:
            coverage(service, "html", "--quiet", "-d", str(html.resolve() / broker))
        coverage(service, "json", "--quiet", "-o", "coverage.json")
        found = json.loads((service / "coverage.json").read_text("utf-8"))
    modules = {
        name.partition("runtime/")[2]: count_of(file["summary"], places(file))
        for name, file in sorted(found["files"].items())
    }
    return {**modules, "**all**": count_of(found["totals"])}, passed


def coverage(service: Path, *arguments: str, **variables: str) -> int:
    environment = {**os.environ, "PYTHONPATH": "src", **variables}
    command = [sys.executable, "-m", "coverage", *arguments]
    return subprocess.run(command, cwd=service, env=environment).returncode


def count_of(summary: dict[str, int], missing: str = "") -> Count:
    return Count(
        summary["num_statements"],
        summary["covered_lines"],
        summary["num_branches"],
        summary["covered_branches"],
        missing,
    )


def places(file: dict[str, list[list[int]]]) -> str:
    """The branches that were not taken, from line to line; -1 is the end of the function."""
    return ", ".join(
        f"{start}→{end if end > 0 else 'end'}" for start, end in file["missing_branches"]
    )


if __name__ == "__main__":
    sys.exit(main())
