"""The benchmarks run, and compare a figure with each target. No test asserts a speed."""

import json
import os
from pathlib import Path

import pytest

from support.rendered import QUESTIONS, Prove, run_task
from tools.benchmarks import report
from tools.benchmarks.__main__ import write
from tools.benchmarks.figures import Outcome

ALWAYS = {
    "ready source, added",
    "ready source, 2019 form / ours",
    "suspending source, ours / bare",
}
FINISHING = ("the generated service", "FastStream", "taskiq, one worker")
"""Contenders that finish their handlers on SIGTERM."""


def test_the_benchmarks_hold_a_figure_against_each_target(tmp_path: Path, prove: Prove) -> None:
    output = tmp_path / "benchmarks.jsonl"
    parts = ("first", "iterator", "worker", "cpu", "publish", "memory", "exit", "clients")
    only = [word for part in parts for word in ("--only", part)]
    result = run_task("bench", "--quick", *only, "--output", str(output))
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
    exits = {figure["part"] for figure in figures if figure["name"] == "idle"}
    assert exits == {f"{broker}: from SIGTERM to exit" for broker in measured}
    for broker in sorted(measured):
        prove("benchmarks that run", f"broker={broker}")


def test_a_service_is_measured_beside_that_of_another_commit(tmp_path: Path) -> None:
    output = tmp_path / "benchmarks.jsonl"
    arguments = ("--quick", "--against", "HEAD", "--broker", "sqlite", "--output", str(output))
    run_task("bench", *arguments)
    _, *figures = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    ratios = {figure["part"]: figure["values"] for figure in figures if "/" in figure["name"]}
    parts = [f"{what}: CPU per message against HEAD" for what in ("the worker loop", "sqlite")]
    assert list(ratios) == parts
    assert all(value > 0 for values in ratios.values() for value in values)


def test_the_benchmarks_hold_what_the_pages_say_of_others(tmp_path: Path) -> None:
    """The run is as short as possible."""
    output = tmp_path / "beside.jsonl"
    only = ("--only", "behaviour", "--only", "latency")
    run_task("bench", "--quick", *only, "--output", str(output))
    results = report.read_all(output)[1]
    if not any(isinstance(result, Outcome) for result in results):
        assert os.environ.get("REQUIRE_BROKERS") != "1", results
        pytest.skip(results[0].json())
    hold_the_claims(results)
    assert {result.part for result in results if not isinstance(result, Outcome)} == {
        "publish to handler, 50 messages a second"
    }


def test_the_pages_say_of_others_what_the_published_run_found() -> None:
    hold_the_claims(report.read_all(report.BESIDE)[1])


def test_a_run_of_one_kind_leaves_the_other_and_its_date(tmp_path: Path) -> None:
    published = tmp_path / "beside.jsonl"
    published.write_text(report.BESIDE.read_text("utf-8"), "utf-8")
    about, results = report.read_all(published)
    behaviour = [one for one in results if isinstance(one, Outcome)]
    new = {**about, "date": "2031-01-01", "load_before": 0.5}
    merged, kept = report.with_what_stays(published, new, behaviour)
    assert kept == results
    times = merged["stays"]
    assert times["date"] in report.about_run(merged)
    assert "This run: 2031-01-01" in report.about_run(merged)
    assert report.with_what_stays(published, new, results) == (new, results)
    write(published, merged, kept)
    later = {**new, "date": "2031-01-02"}
    again, _ = report.with_what_stays(published, later, behaviour)
    assert again["stays"] == times, "the times are still of that run"


def hold_the_claims(results: report.Results) -> None:
    """Check the claims of `report.BESIDE_OTHERS`."""
    shutdown, timeout, failure, kill = report.outcomes(results)
    for name, cells in shutdown.items():
        finished, _, begun = cells["finished"].partition(" of ")
        assert finished == (begun if name in FINISHING else "0"), name
        assert cells["lost"] == "0", name
        if name == "the generated service":  # a busy taskiq also begins its prefetched messages
            assert cells["newly begun"] == "0"
    for name, cells in timeout.items():
        ours = name.startswith("the generated service")
        assert (cells["back in the queue"], cells["lost"]) == ("10", "0"), name
        assert cells["exit code"] == ("75" if ours else "0"), name
        if ours or name.startswith("FastStream"):
            assert "10 x ERROR" in cells["what the log says"], name
    for name, cells in failure.items():
        assert cells["gone"] == ("0" if name.startswith("the generated service") else "1"), name
    assert {cells["lost"] for cells in kill.values()} == {"0"}
    assert "0" not in {cells["begun twice"] for cells in kill.values()}


def test_every_consumer_has_the_defaults_of_its_library() -> None:
    pytest.importorskip("faststream", reason="the benchmarks have it, and check this as they begin")
    from tools.benchmarks import behaviour, defaults, per_message

    defaults.check()
    compared = [one.title for _, contenders in behaviour.SITUATIONS.values() for one in contenders]
    titles = " ".join([*compared, *per_message.TITLES.values()])
    assert all(setting in titles for setting in defaults.OWN_ROWS.values())
    file = defaults.HERE / "frameworks.py"
    text = file.read_text("utf-8")
    started = "Channel(prefetch_count=PREFETCH)))"
    assert text.count(started) == 1
    planted = text.replace(started, "Channel(prefetch_count=PREFETCH), graceful_timeout=None))")
    assert set(defaults.departures(planted, file)) - set(defaults.departures(text, file)) == {
        "faststream: RabbitBroker(graceful_timeout)"
    }


def test_the_page_and_the_chart_are_what_the_last_published_runs_measured() -> None:
    assert report.PAGE.read_text("utf-8") == report.page()
    readme = report.README.read_text("utf-8")
    assert readme == report.with_section(readme, "measured", report.front_page())
    assert (report.CHARTS / "benchmarks-cpu.svg").read_text("utf-8") == report.chart_of_cpu()
