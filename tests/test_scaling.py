"""The scaling benchmark runs, its page has its measurements, and the model of docs/scaling.md agrees with them.

No test asserts a speed: the measured points are those of tools/benchmarks/scaling.jsonl.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from support.rendered import QUESTIONS, Prove, Render, run_task
from tools.benchmarks import capacity, report
from tools.benchmarks import scaling_page as page
from tools.benchmarks.capacity import Moment, Service
from tools.benchmarks.scaling import TRIVIAL, WAITING

MOST_OFF = 0.35
"""The largest relative error of the model at a measured point."""
MOST_OFF_IN_THE_MEDIAN = 0.05
SCALED = ("rabbitmq", "nats", "redis", "kafka", "sqs", "postgres")


def test_two_processes_share_a_queue_and_messages_of_a_killed_one_are_redelivered(
    tmp_path: Path, prove: Prove
) -> None:
    output = tmp_path / "scaling.jsonl"
    arguments = ("--only", "scaling", "--broker", "sqlite", "--quick", "--output", str(output))
    run_task("bench", *arguments)
    _, *figures = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    found = {(figure["part"].split(": ")[1], figure["name"]): figure for figure in figures}
    kinds = {kind for kind, _ in found}
    assert len(kinds) == 3
    for (_, name), figure in found.items():
        if name.endswith(("handled twice", "lost")):
            assert (figure["median"], figure["met"]) == (0, True)
    for kind in kinds:
        if not kind.startswith("redelivery"):
            assert found[kind, "2 processes: messages per second"]["median"] > 0
    [seconds] = [
        figure["median"] for (_, name), figure in found.items() if name.startswith("until")
    ]
    assert 0 < seconds < 30, "a lease of one second"
    prove("benchmarks that run", "scaling")


# -- the page and the data


def test_the_page_is_what_the_last_published_run_measured() -> None:
    text = page.PAGE.read_text("utf-8")
    assert page.page(text) == text


def test_every_broker_was_measured_and_nothing_was_lost_or_handled_twice() -> None:
    _, figures = report.read(page.RESULTS)
    points = page.points(figures)
    assert points.keys() == set(QUESTIONS["broker"])
    for measured in points.values():
        for kind in (WAITING, TRIVIAL):
            assert list(measured[kind]) == [1, 2, 4, 8]
    assert [figure for figure in figures if figure.met is False] == []


# -- the model and the data


def off() -> dict[tuple[str, int], float]:
    about, figures = report.read(page.RESULTS)
    found: dict[tuple[str, int], float] = page.errors(about, figures)
    return found


def within_the_tolerance(errors: dict[tuple[str, int], float]) -> bool:
    sizes = [abs(error) for error in errors.values()]
    return max(sizes) <= MOST_OFF and median(sizes) <= MOST_OFF_IN_THE_MEDIAN


def test_the_model_predicts_from_one_process_the_throughput_of_2_4_and_8() -> None:
    errors = off()
    assert len(errors) == 3 * (len(page.NAMES) - 1)
    assert within_the_tolerance(errors), errors


@pytest.mark.parametrize("wrong", ["processes add nothing", "partitions do not matter"])
def test_a_wrong_model_is_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    model = page.model

    def changed(*arguments: Any) -> Service:
        partitions = 1 if wrong == "processes add nothing" else None
        return replace(model(*arguments), partitions=partitions)

    monkeypatch.setattr(page, "model", changed)
    assert not within_the_tolerance(off())


# -- the model alone


def test_the_throughput_of_replicas_that_share_nothing_is_proportional() -> None:
    service = Service(handler_seconds=0.02)
    assert service.pod_rate == pytest.approx(500)
    assert service.throughput(8) == pytest.approx(8 * 500)


def test_no_replica_does_more_than_its_event_loop() -> None:
    service = Service(handler_seconds=0.001, concurrency=100, cpu_seconds=0.001)
    assert 900 < service.pod_rate <= 1000


def test_all_together_do_no_more_than_what_they_share() -> None:
    service = Service(handler_seconds=0.02, shared_seconds=1 / 1000)
    rates = [service.throughput(replicas) for replicas in range(1, 20)]
    assert all(after > before - 1e-6 for before, after in pairwise(rates))
    assert 950 < rates[-1] < 1000.001
    assert service.throughput(1) < 500


def test_a_replica_without_a_partition_adds_nothing() -> None:
    service = Service(handler_seconds=0.02, partitions=4)
    assert service.throughput(8) == service.throughput(4) == 4 * service.pod_rate


@pytest.mark.parametrize("rate", [1, 49, 300, 1234])
def test_the_replicas_are_the_fewest_that_do_the_rate(rate: float) -> None:
    service = Service(handler_seconds=0.2)
    replicas = service.replicas(rate, away_seconds=0)
    assert replicas is not None
    assert service.throughput(replicas) >= 1.2 * rate
    assert replicas == 1 or service.throughput(replicas - 1) < 1.2 * rate


def test_more_replicas_make_up_sooner_for_one_that_was_away() -> None:
    service = Service(handler_seconds=0.2)
    soon = service.replicas(290, headroom=0, catch_up_seconds=5)
    late = service.replicas(290, headroom=0, catch_up_seconds=3600)
    assert (late, soon) == (6, 7), (
        "of 6, one that is away is missed by 40 a second, and 10 are to spare"
    )


@pytest.mark.parametrize(
    "service",
    [
        Service(handler_seconds=0.2, shared_seconds=1 / 1000),
        Service(handler_seconds=0.2, partitions=20),
    ],
    ids=["shared resource", "partitions"],
)
def test_a_rate_above_the_limit_has_no_number_of_replicas(service: Service) -> None:
    assert service.replicas(500)
    assert service.replicas(950) is None


# -- the autoscaler


def hour(service: Service, threshold: float) -> list[Moment]:
    """An hour under the load of the page, which needs four replicas."""

    def load(seconds: float) -> float:
        return float(page.load(seconds) * service.pod_rate / page.EXAMPLE.pod_rate)

    return list(capacity.simulate(service, capacity.Autoscaler(threshold), load, page.HOUR))


def most(moments: list[Moment]) -> int:
    return max(int(moment.replicas) for moment in moments)


@pytest.mark.parametrize("handler_seconds", [0.02, 0.2, 2])
def test_a_small_threshold_makes_many_more_pods_and_waits_hardly_shorter(
    handler_seconds: float,
) -> None:
    service = Service(handler_seconds)
    advised = hour(service, capacity.threshold(service, 20))
    small = hour(service, capacity.threshold(service, 2))
    assert most(advised) <= 5
    assert most(small) > 3 * most(advised)
    assert capacity.longest_wait(advised) < capacity.longest_wait(small) + 12


def test_a_large_threshold_lets_messages_wait_that_long() -> None:
    service = Service(0.2)
    moments = hour(service, capacity.threshold(service, 120))
    assert 110 < capacity.longest_wait(moments) < 140


def test_pods_that_are_merely_busy_ask_for_more_where_the_threshold_is_below_the_prefetch() -> None:
    slow = Service(handler_seconds=60)
    assert capacity.threshold(slow, 20) < slow.concurrency
    assert most(hour(slow, capacity.threshold(slow, 20))) > 8
    assert most(hour(slow, 2 * slow.concurrency)) <= 5


def test_pods_that_keep_up_are_taken_away_after_the_cooldown_and_missed() -> None:
    service = Service(0.2)
    moments = hour(service, 1000)
    numbers = [moment.replicas for moment in moments]
    enough = next(m.at_seconds for m in moments if m.replicas >= 4)
    gone = next(m.at_seconds for m in moments if m.at_seconds > enough and m.replicas < 4)
    assert 300 <= gone - enough <= 400
    assert page.taken_away(moments) > 1
    assert numbers[-1] == 1


@pytest.mark.parametrize("stub", ["json", "batch"])
@pytest.mark.parametrize("broker", SCALED)
def test_the_generated_threshold_is_what_the_page_says(
    render: Render, broker: str, stub: str
) -> None:
    service = render(broker=broker, handler_stub=stub, deploy="kubernetes")
    text = service.read("deploy/kubernetes/base/scaled-object.yaml")
    [threshold] = [
        int(line.split('"')[1]) for line in text.splitlines() if "# messages per pod" in line
    ]
    batch_size, handler_seconds = (100, 4) if stub == "batch" else (1, 0.4)
    pod = Service(handler_seconds / batch_size)
    assert threshold == round(capacity.threshold(pod, 20))
    by_default = 10 * batch_size
    assert threshold >= 2 * by_default
    assert threshold >= 2 * 10 * by_default or stub == "batch", "with CONSUMER_ORDER_BY"
