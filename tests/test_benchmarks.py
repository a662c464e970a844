"""The benchmarks run, and hold a figure against each target. How fast anything is, no test says."""

import json
import os
import sys
from pathlib import Path

from conftest import Prove
from rendered import QUESTIONS, TEMPLATE, run
from tasks import requirements

ALWAYS = {
    "ready source, added",
    "ready source, 2019 form / ours",
    "suspending source, ours / bare",
}


def test_the_benchmarks_hold_a_figure_against_each_target(tmp_path: Path, prove: Prove) -> None:
    output = tmp_path / "benchmarks.jsonl"
    environment = [word for needed in requirements("bench") for word in ("--with", needed)]
    result = run(
        *("uv", "run", "--quiet", "--no-project", "--isolated", "--python", sys.executable),
        *environment,
        *("python", "benchmarks/run.py", "--quick", "--output", str(output)),
        cwd=TEMPLATE,
        env={"PYTHONPYCACHEPREFIX": str(tmp_path)},
    )
    about, *figures = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert about["faststream"]
    assert all(figure["part"] in result.stdout for figure in figures if figure["values"])
    missing = {figure["part"] for figure in figures if not figure["values"]}
    if os.environ.get("REQUIRE_BROKERS") == "1":
        assert missing == set(), result.stdout
    measured = set(QUESTIONS["broker"]) - missing
    against_a_target = {figure["name"] for figure in figures if figure["met"] is not None}
    assert against_a_target >= ALWAYS
    assert {
        figure["part"].partition(":")[0]
        for figure in figures
        if figure["met"] is not None and figure["name"] not in ALWAYS
    } >= measured - {"mqtt"}
    exits = {figure["part"] for figure in figures if figure["name"] == "idle"}
    assert exits == {f"{broker}: from SIGTERM to exit" for broker in measured}
    for broker in sorted(measured):
        prove("benchmarks that run", f"broker={broker}")
