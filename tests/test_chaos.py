"""Short chaos experiments; their reconciliation fails after a loss, a repetition or a traceback.

The long form is ``python3 tasks.py chaos``; docs/chaos.md describes it.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.servers import ServerMissing, skip_without_server
from runtime.brokers import make_source
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings
from support.rendered import Prove, Result, run_task
from tools.chaos import Stuck
from tools.chaos.clusters import CLUSTERS, Cluster, patiently
from tools.chaos.plan import draw
from tools.chaos.reconciliation import Ending, Reconciliation
from tools.chaos.running import Running
from tools.chaos.testbed import wait

FINE = Ending(
    process="process 0",
    exit_code=0,
    allowed=frozenset({0}),
    seconds=1,
    bound_seconds=20,
    noise=("Traceback", "never retrieved", "was destroyed"),
    events=(
        {"event": "message_retried", "exception": "Traceback (most recent call last): ..."},
        {"event": "stopped", "exit_code": 0},
    ),
)


def balanced() -> Reconciliation:
    """Three published messages: one done during the round, one afterwards, one that no handler can do."""
    return Reconciliation(
        published={"a": True, "b": True, "c": False},
        ended=["a", "b"],
        dead=["c"],
        dead_count=1,
        at_rest=2,
        done_at_rest=1,
        endings=[FINE],
    )


def test_counts_that_agree_are_green() -> None:
    assert balanced().violations() == []
    assert (balanced().twice, balanced().lost) == (0, set())


def set_to(**fields: Any) -> Callable[[Reconciliation], None]:
    return lambda found: found.__dict__.update(fields)


def ending(**fields: Any) -> Callable[[Reconciliation], None]:
    return lambda found: found.endings.append(replace(FINE, **fields))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (set_to(ended=["a"]), "lost: 1 (b)"),
        (set_to(dead=[]), "lost: 1 (c)"),
        (set_to(dead=None, dead_count=0), "0 dead letters, expected at least 1"),
        (set_to(dead=None, ended=["a"]), "lost: 1 (b)"),
        (set_to(ended=["a", "b", "b"]), "done twice: 1 (b); allowed: 0"),
        (
            set_to(ended=["a", "b", "b", "b"], graceful=False, most_repeated=1),
            "done twice: 1 (b); allowed: 1",
        ),
        (set_to(dead=["b", "c"]), "dead letters whose handler would have succeeded: 1 (b)"),
        (set_to(dead=["c", "c"]), "dead-lettered twice: 1 (c)"),
        (set_to(ended=["a", "b", "x"]), "done, and never published: 1 (x)"),
        (set_to(left=2), "the broker still has 2 messages that it delivers to no consumer"),
        (set_to(at_rest=1), "1 done and 1 in the broker are not 3 published"),
        (set_to(at_rest=3), "1 done and 3 in the broker are not 3 published"),
        (ending(exit_code=1), "process 0 ended with 1, not 0"),
        (ending(seconds=21.5), "process 0 took 21.5 s to end, not 20.0"),
        (
            ending(stderr="Traceback (most recent call last):\n"),
            "process 0 wrote to standard error: Traceback",
        ),
        (
            ending(events=({"event": "Task exception was never retrieved"},)),
            "process 0 logged never retrieved",
        ),
        (
            ending(events=({"event": "Task was destroyed but it is pending!"},)),
            "process 0 logged was destroyed",
        ),
        (ending(events=({"event": "x", "e": "Traceback ..."},)), "process 0 logged Traceback"),
        (ending(events=({"event": "not_json", "line": "?"},)), "process 0 logged no JSON"),
    ],
)
def test_counts_that_disagree_are_red(
    change: Callable[[Reconciliation], None], sentence: str
) -> None:
    found = balanced()
    change(found)
    [violation] = found.violations()
    assert violation.startswith(sentence)


def test_a_second_sigint_leaves_little_time() -> None:
    process = SimpleNamespace(find=lambda _: ["starting"], send=lambda _: None)
    running = Running(process, 0, drain_seconds=600)

    def seconds_left() -> float:
        assert running.must_end_by is not None
        return running.must_end_by - time.monotonic()

    running.signal(signal.SIGTERM)
    assert seconds_left() > 600
    running.signal(signal.SIGTERM)  # only a second SIGINT forces
    assert seconds_left() > 600
    running.signal(signal.SIGINT)
    assert seconds_left() < 60
    assert 128 + signal.SIGINT in running.allowed


def test_what_a_kill_explains_is_allowed() -> None:
    found = balanced()
    set_to(ended=["a", "b", "b"], at_rest=3, graceful=False, most_repeated=1)(found)
    assert found.violations() == []


def test_what_the_broker_never_confirmed_may_be_there_or_not() -> None:
    found = balanced()
    found.unconfirmed = {"d", "e"}
    found.ended.append("d")
    assert found.violations() == []


def test_a_seed_gives_the_same_plan_again() -> None:
    abilities = {"proxy", "broker_kill"}
    seeds = range(20)
    plans = [draw(seed, abilities, 20).text() for seed in seeds]
    assert plans == [draw(seed, abilities, 20).text() for seed in seeds]
    assert len(set(plans)) == len(plans)
    everything = "".join(plans)
    for what in ("stop", "kill", "pause", "add", "force", "clock", *("cut", "black_hole"), "hang"):
        assert f'"{what}"' in everything
    assert '"disk_full"' not in everything


def chaos(output: Path, *arguments: str) -> Result:
    return run_task("chaos", "--output", str(output), *arguments, check=False)


def check(result: Result, prove: Prove, what: str) -> None:
    if "| not run: " in result.stdout and os.environ.get("REQUIRE_BROKERS") != "1":
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stdout
    assert "| ok |" in result.stdout, result.stdout
    prove("chaos", what)


@pytest.mark.parametrize("broker", ["sqlite", "rabbitmq"])
def test_chaos_loses_nothing(broker: str, tmp_path: Path, prove: Prove) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    arguments = ["--broker", broker, "--only", "random", "--seconds", "20", "--seed", str(seed)]
    result = chaos(tmp_path, *arguments)
    check(result, prove, f"broker={broker}, 20 seconds")
    log = (tmp_path / f"{broker}-random-{seed}/log.jsonl").read_text("utf-8").splitlines()
    assert json.loads(log[0])["seed"] == seed


@pytest.mark.parametrize("broker", ["sqlite", "rabbitmq"])
@pytest.mark.parametrize("only", ["rolling", "kills"])
def test_twenty_rolling_restarts_and_fifty_kills_lose_nothing(
    broker: str, only: str, tmp_path: Path, prove: Prove
) -> None:
    result = chaos(tmp_path, "--broker", broker, "--only", only)
    check(result, prove, f"broker={broker}, {only}")


@pytest.mark.parametrize(
    "broker", ["kafka", "nats", "postgres", "rabbitmq", "redis-cluster", "redis-sentinel"]
)
def test_a_cluster_whose_leader_is_killed_loses_nothing(
    broker: str, tmp_path: Path, prove: Prove
) -> None:
    fewer = ["--ids", "1000"] if broker.startswith("redis") else []  # Redis has two
    result = chaos(tmp_path, "--broker", broker, "--only", "failover", *fewer)
    check(result, prove, f"broker={broker}, failover")


@pytest.fixture
def cluster(broker: str, tmp_path: Path) -> Iterator[Cluster]:
    try:
        with CLUSTERS[broker](tmp_path) as server:
            yield server
    except ServerMissing as missing:
        skip_without_server(missing)


@pytest.mark.parametrize("broker", CLUSTERS)
def test_a_cluster_tells_its_counts_also_while_it_elects_a_leader(
    broker: str, cluster: Cluster
) -> None:
    values = {"broker_url": cluster.url, "source": "ccc-test-counts", "group": "ccc-test-counts"}
    settings = ConsumerSettings.model_validate(values)

    async def publish() -> None:
        async with make_source(settings) as source:
            await source.declare()
            await source.publish([OutgoingMessage(b"{}", "task") for _ in range(3)])

    asyncio.run(publish())
    cluster.kill()
    assert wait(lambda: cluster.counts(settings.source).ready == 3), broker


def test_a_question_that_no_server_answers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.chaos.clusters.READY_SECONDS", 0.3)
    answers = iter([None, None, 7])

    def ask() -> int:
        if (answer := next(answers, None)) is None:
            msg = "no leader"
            raise ConnectionError(msg)
        return answer

    assert patiently("counts of x", ask, (ConnectionError,)) == 7
    sentence = r"the cluster has not told the counts of x within 0.3 seconds: .*no leader"
    with pytest.raises(Stuck, match=sentence):
        patiently("counts of x", ask, (ConnectionError,))


@pytest.mark.parametrize("broker", ["sqlite", "rabbitmq"])
def test_sigterm_at_any_moment_of_the_start_leaves_no_message_unacked(
    broker: str, tmp_path: Path, prove: Prove
) -> None:
    result = chaos(tmp_path, "--broker", broker, "--sweep", "--every-ms", "25")
    check(result, prove, f"broker={broker}, SIGTERM every 25 ms of the start")
