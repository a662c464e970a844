"""The benchmarks run, and hold a figure against each target. How fast anything is, no test says."""

import json
import sys
from pathlib import Path

from conftest import Prove
from rendered import TEMPLATE, run
from tasks import requirements

TARGETS = {
    "ready source, added",
    "ready source, 2019 form / ours",
    "suspending source, ours / bare",
    "growth",
}
RABBITMQ_TARGETS = {
    "ours / aio-pika consume(callback), await ack()",
    "ours / FastStream's default subscriber",
}


def test_the_benchmarks_hold_a_figure_against_each_target(
    tmp_path: Path, rabbitmq_url: str, prove: Prove
) -> None:
    output = tmp_path / "benchmarks.jsonl"
    environment = [word for needed in requirements("bench") for word in ("--with", needed)]
    result = run(
        *("uv", "run", "--quiet", "--no-project", "--isolated", "--python", sys.executable),
        *environment,
        *("python", "benchmarks/run.py", "--quick", "--output", str(output)),
        cwd=TEMPLATE,
        env={"CONSUMER_TEST_BROKER_URL": rabbitmq_url, "PYTHONPYCACHEPREFIX": str(tmp_path)},
    )
    about, *figures = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert about["faststream"]
    assert all(figure["name"] in result.stdout for figure in figures)
    expected = TARGETS | RABBITMQ_TARGETS if rabbitmq_url else TARGETS
    assert {figure["name"] for figure in figures if figure["met"] is not None} == expected
    exits = [figure for figure in figures if figure["part"].startswith("From SIGTERM to exit")]
    assert len(exits) == (4 if rabbitmq_url else 2)
    prove("benchmarks that run", "with RabbitMQ" if rabbitmq_url else "without RabbitMQ")
