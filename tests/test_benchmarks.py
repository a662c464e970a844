"""The benchmarks run, and hold a figure against each target. How fast anything is, no test says."""

import json
import os
from pathlib import Path

from support.rendered import QUESTIONS, Prove, run_task
from tools.benchmarks import report

ALWAYS = {
    "ready source, added",
    "ready source, 2019 form / ours",
    "suspending source, ours / bare",
}


def test_the_benchmarks_hold_a_figure_against_each_target(tmp_path: Path, prove: Prove) -> None:
    output = tmp_path / "benchmarks.jsonl"
    result = run_task("bench", "--quick", "--output", str(output), caches=tmp_path)
    about, *figures = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert about["versions"]["faststream"]
    assert all(figure["part"] in result.stdout for figure in figures if figure["values"])
    missing = {figure["part"] for figure in figures if not figure["values"]}
    if os.environ.get("REQUIRE_BROKERS") == "1":
        assert missing == set(), result.stdout
    [worker_loop] = [figure for figure in figures if figure["part"].startswith("The worker loop")]
    assert worker_loop["median"] > 0
    measured = set(QUESTIONS["broker"]) - missing
    against_a_target = {figure["name"] for figure in figures if figure["met"] is not None}
    assert against_a_target >= ALWAYS
    assert {
        figure["part"].partition(":")[0]
        for figure in figures
        if figure["met"] is not None and figure["name"] not in ALWAYS
    } >= measured - {"mqtt"}
    exits = {figure["part"] for figure in figures if figure["name"].endswith(": idle")}
    assert exits == {f"{broker}: from SIGTERM to exit" for broker in measured}
    for broker in sorted(measured):
        prove("benchmarks that run", f"broker={broker}")


def test_the_page_and_the_charts_are_what_the_last_published_run_measured() -> None:
    about, figures = report.read()
    assert report.PAGE.read_text("utf-8") == report.page(about, figures)
    readme = report.README.read_text("utf-8")
    assert readme == report.with_section(readme, "measured", report.front_page(about, figures))
    for name, drawn in report.charts(figures).items():
        assert (report.CHARTS / f"benchmarks-{name}.svg").read_text("utf-8") == drawn
