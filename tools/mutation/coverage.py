"""Coverage of the runtime: ``python3 tasks.py coverage [BROKER...] [--tests ARGUMENTS] [--html FOLDER]``.

The tests of the runtime run in place, including the very slow ones, but without those of other brokers. Branches in
the programs that the tests start count too, unless these end by SIGKILL. Less than 95 % of the branches is an error.
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

from tools import ROOT, TREE
from tools.kafka import variables_for

BROKERS = json.loads((ROOT / "cookiecutter.json").read_text("utf-8"))["broker"]
EMBEDDED = "sqlite"
AT_LEAST_PERCENT = 95
TESTS = ("tests/runtime", f"{TREE.name}/tests/runtime")
WHOLE = "-m '' -n 2"

SETTINGS = """
[run]
branch = true
source_pkgs = runtime
omit = {omit}
data_file = {folder}/.coverage
parallel = true
patch = subprocess, _exit
disable_warnings = no-data-collected, module-not-imported, module-not-measured, already-imported

[report]
exclude_also =
    if TYPE_CHECKING:
    assert_never
"""


@dataclass(frozen=True)
class Count:
    """The branches of one module, or of all: their number, and how many were reached."""

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
        "--html", type=Path, help="write annotated sources here, in a folder for each broker"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.broker) - set(BROKERS):
        parser.error(f"unknown broker {', '.join(sorted(unknown))}; known: {', '.join(BROKERS)}")
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
    others = [other for other in BROKERS if other not in (broker, EMBEDDED)]
    with tempfile.TemporaryDirectory(prefix="coverage-") as scratch:
        settings = Path(scratch, "coveragerc")
        omit = ", ".join(f"*/runtime/brokers/{other}.py" for other in others)
        settings.write_text(SETTINGS.format(folder=scratch, omit=omit), "utf-8")

        def coverage(command: str, *arguments: str) -> int:
            program = [sys.executable, "-m", "coverage", command, f"--rcfile={settings}"]
            environment = {**os.environ, **variables_for(broker)}
            return subprocess.run([*program, *arguments], cwd=ROOT, env=environment).returncode

        # A broker's name is in the name of the file, or in the parameters of the test.
        selected = ["-k", " and ".join(f"not {other}" for other in others)]
        pytest = ["-m", "pytest", "-p", "no:cacheprovider", *selected, *tests, *TESTS]
        passed = coverage("run", *pytest) == 0
        coverage("combine", "--quiet")
        if html is not None:
            coverage("html", "--quiet", "-d", str(html.resolve() / broker))
        report = Path(scratch, "coverage.json")
        coverage("json", "--quiet", "-o", str(report))
        found = json.loads(report.read_text("utf-8"))
    modules = {
        name.rpartition("runtime/")[2]: count_of(file["summary"], places(file))
        for name, file in sorted(found["files"].items())
    }
    return {**modules, "**all**": count_of(found["totals"])}, passed


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
