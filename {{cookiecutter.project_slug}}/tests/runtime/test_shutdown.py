# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""The stop, proved: the real program as a child process, real signals, and the broker's own counts.

The invariant everywhere: published = done + still in the broker + dead letters; and a stop that was
graceful makes nothing be done twice.
"""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.brokers import make_source
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings

from .process import NOISE, Ledger, ServiceProcess, service_command, service_environment
from .servers import SERVED_BROKERS, Counts, Server, need_of_server
from .servers.local import free_ports
from .test_contract import need, start_once

pytestmark = pytest.mark.slow

on_one_broker = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
"""For what no broker takes part in."""

over_the_network = pytest.mark.parametrize("broker", SERVED_BROKERS, indirect=True)
"""For what the embedded broker, a file, does not have: a server, a connection, a subscription."""

AT_ONCE_SECONDS = 5.0
"""What "at once" may take on a loaded machine; benchmarks/ of the template measures what it does take."""


class Scene:
    """One queue of one broker, the services that consume it, and the ledger of what they did."""

    def __init__(self, broker: Server, queue: str, directory: Path) -> None:
        self.broker = broker
        self.queue = queue
        self.ledger = Ledger(directory / "ledger")
        self.published: list[str] = []
        self.processes: list[ServiceProcess] = []
        asyncio.run(start_once(self.settings))

    def need(self, *capabilities: str) -> None:
        """Skip the test if the broker declares that it lacks one of these."""
        source = make_source(self.settings)
        for capability in capabilities:
            need(source, capability)

    @property
    def settings(self) -> ConsumerSettings:
        return ConsumerSettings.model_validate(
            {"broker_url": self.broker.url, "source": self.queue}
        )

    def publish(self, count: int = 1, kind: str = "work", **task: Any) -> list[str]:
        """Publish so many tasks for the test service; returns their ids."""
        first = len(self.published)
        ids = [f"task-{number}" for number in range(first, first + count)]
        self.publish_bodies([json.dumps({"id": i, **task}).encode() for i in ids], kind)
        self.published += ids
        return ids

    def publish_bodies(self, bodies: list[bytes], kind: str = "work") -> None:
        async def publish() -> None:
            async with make_source(self.settings) as source:
                await source.publish([OutgoingMessage(body, kind) for body in bodies])

        asyncio.run(publish())

    def start(
        self, *, consuming: bool = True, url: str = "", **variables: object
    ) -> ServiceProcess:
        """Start a service on this queue, and wait until it consumes."""
        environment = service_environment(
            url or self.broker.url, self.queue, self.ledger, **variables
        )
        process = ServiceProcess(service_command("run"), environment)
        self.processes.append(process)
        if consuming:
            process.wait_for("consuming")
        return process

    def assert_left(self, ready: int = 0, delayed: int = 0, dead: int = 0) -> None:
        """So many messages are in the broker: at once, that is, as soon as it has done what it was told.

        A quorum queue of RabbitMQ counts what is on the disk, which may be slow.
        """
        expected, give_up_at = Counts(ready, delayed, dead), time.monotonic() + AT_ONCE_SECONDS
        while (counts := self.broker.counts(self.queue)) != expected:
            assert time.monotonic() < give_up_at, f"{counts} did not become {expected}"
            time.sleep(0.05)

    def close(self) -> None:
        for process in self.processes:
            process.close()

    def drain_the_rest(self) -> None:
        """Let one more service handle what is left, so that every task is accounted for."""
        process = self.start(concurrency=10)
        wait_until(lambda: set(self.ledger.ended) >= set(self.published))
        assert_clean_stop(process)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited state did not come"
        time.sleep(0.05)


def has_ended(scene: Scene, count: int) -> bool:
    """Whether so many different messages have been handled."""
    return len(set(scene.ledger.ended)) >= count


def is_empty(scene: Scene) -> bool:
    """Whether nothing is to come any more: what a dead consumer held, and had handled, comes again later."""
    counts = scene.broker.counts(scene.queue)
    return counts == Counts(0, 0, 0) and counts.held == 0


def assert_clean_stop(process: ServiceProcess, signum: signal.Signals = signal.SIGTERM) -> float:
    """Stop it; returns the seconds it took. Exit code 0, and not a word on standard error."""
    exit_code, seconds = process.stop(signum)
    assert exit_code == 0, process.events
    assert_quiet(process)
    assert process.events[-1]["event"] == "stopped"
    return seconds


def assert_quiet(process: ServiceProcess) -> None:
    assert process.stderr == ""
    assert not [e for e in process.events if any(n in json.dumps(e) for n in NOISE)]


# -- the graceful stop


def test_an_idle_service_exits_0_at_once(scene: Scene) -> None:
    process = scene.start()
    assert assert_clean_stop(process) < AT_ONCE_SECONDS
    assert scene.broker.consumers(scene.queue) in (0, -1)


@on_one_broker
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_signal_of_a_stop_is_named(scene: Scene, signum: signal.Signals) -> None:
    process = scene.start()
    assert_clean_stop(process, signum)
    assert process.find("stop_requested", reason=signum.name)


@on_one_broker
def test_a_hangup_that_nohup_has_ignored_stops_nothing(scene: Scene) -> None:
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = scene.start()
    finally:
        signal.signal(signal.SIGHUP, earlier)
    process.send(signal.SIGHUP)
    assert_clean_stop(process)
    [stop] = process.find("stop_requested")
    assert stop["reason"] == "SIGTERM"


def test_the_message_in_hand_is_finished_and_the_rest_stays(scene: Scene) -> None:
    tasks = scene.publish(30, seconds=0.3)
    process = scene.start(concurrency=2, prefetch=10)
    process.wait_for("handling", count=2)
    assert_clean_stop(process)
    ended = scene.ledger.ended
    assert sorted(ended) == sorted(scene.ledger.started)
    assert len(ended) == 2
    scene.assert_left(ready=len(tasks) - 2)
    [drained] = process.find("drained")
    assert (drained["handled"], drained["abandoned"]) == (2, 0)
    scene.drain_the_rest()
    assert Counter(scene.ledger.ended) == Counter(tasks)


def test_the_broker_delivers_nothing_more_while_the_handler_still_runs(scene: Scene) -> None:
    scene.need("queue_metrics")
    scene.publish(1, seconds=3)
    process = scene.start(concurrency=4)
    process.wait_for("handling")
    process.send(signal.SIGTERM)
    process.wait_for("draining")
    scene.publish(1)
    wait_until(lambda: scene.broker.counts(scene.queue).ready >= 1)
    assert scene.ledger.ended == []  # so the source stopped first, and the handler is in hand
    assert process.wait() == 0
    assert scene.ledger.started == ["task-0"]
    scene.assert_left(ready=1)


@on_one_broker
def test_five_sigterms_in_a_row_are_still_a_graceful_stop(scene: Scene) -> None:
    scene.publish(1, seconds=0.5)
    process = scene.start()
    process.wait_for("handling")
    for _ in range(4):
        process.send(signal.SIGTERM)
    assert_clean_stop(process)
    assert scene.ledger.ended == ["task-0"]


@on_one_broker
def test_a_supervisors_pair_of_sigint_and_sigterm_does_not_force(scene: Scene) -> None:
    scene.publish(1, seconds=0.5)
    process = scene.start()
    process.wait_for("handling")
    process.send(signal.SIGTERM)
    assert_clean_stop(process, signal.SIGINT)
    assert scene.ledger.ended == ["task-0"]
    assert not process.find("forced")


def test_a_partial_batch_is_handled_at_once(scene: Scene) -> None:
    scene.publish(3, kind="batch")
    process = scene.start(HANDLERS="batch", batch_size=10, batch_seconds=60)
    wait_until(lambda: len(set(scene.ledger.ids("take"))) == 3)
    assert assert_clean_stop(process) < AT_ONCE_SECONDS
    assert len(process.find("handling")) == 1
    scene.assert_left(ready=3 - len(scene.ledger.ended))


def test_every_finished_message_of_many_is_acknowledged_before_the_close(scene: Scene) -> None:
    tasks = scene.publish(200)
    process = scene.start(concurrency=10, prefetch=50)
    wait_until(lambda: len(scene.ledger.ended) > 20)
    assert_clean_stop(process)
    scene.assert_left(ready=len(tasks) - len(scene.ledger.ended))
    scene.drain_the_rest()
    assert Counter(scene.ledger.ended) == Counter(tasks)


@on_one_broker
@pytest.mark.parametrize("kind", ["work", "thread"])
def test_a_handler_learns_of_the_stop_and_of_the_time_left(scene: Scene, kind: str) -> None:
    scene.publish(1, kind=kind, end="checkpoint")
    process = scene.start(HANDLERS=kind, drain_seconds=20)
    process.wait_for("handling")
    assert_clean_stop(process)
    [checkpoint] = process.find("checkpoint")
    assert 15 < checkpoint["seconds_left"] <= 20


def test_a_long_handler_saves_its_place_when_told_and_goes_on_from_there(scene: Scene) -> None:
    scene.need("attempts")
    scene.publish(1, kind="long", steps=40, seconds=0.02)
    first = scene.start(HANDLERS="long", drain_seconds=20, max_attempts=1)
    first.wait_for("step", count=3)
    assert assert_clean_stop(first) < AT_ONCE_SECONDS
    [drained] = first.find("drained")
    assert (drained["handled"], drained["requeued"], drained["abandoned"]) == (0, 1, 0)
    done = len(scene.ledger.ids("step"))
    assert 3 <= done < 40
    second = scene.start(HANDLERS="long", max_attempts=1)
    resumed = second.wait_for("handling")
    assert (resumed["place"], resumed["attempt"]) == (done, 1)
    wait_until(lambda: scene.ledger.ended == ["task-0"])
    assert_clean_stop(second)
    assert len(scene.ledger.ids("step")) == 40
    scene.assert_left()


# -- failures while stopping


def test_a_failure_during_the_drain_is_retried_later_and_others_finish(scene: Scene) -> None:
    scene.need("delayed_retry")
    scene.publish(1, seconds=0.3, end="retry", retry_after_seconds=200)
    scene.publish(1, seconds=0.6)
    process = scene.start()
    process.wait_for("handling", count=2)
    exit_code, _ = process.stop()
    assert exit_code == 0
    assert process.find("message_retried", attempt=1)
    scene.assert_left(delayed=1)


def test_a_message_that_waits_for_its_retry_is_kept_with_its_attempts(scene: Scene) -> None:
    scene.need("attempts", "dead_letters")
    scene.publish(1, end="raise")
    first = scene.start(retry_seconds=1, retry_max_seconds=1, max_attempts=2)
    first.wait_for("message_retried", attempt=1)
    exit_code, seconds = first.stop()
    assert exit_code == 0
    assert seconds < AT_ONCE_SECONDS
    second = scene.start(max_attempts=2)
    second.wait_for("message_rejected", attempt=2)
    second.stop()
    scene.assert_left(dead=1)


def test_a_poison_message_becomes_a_dead_letter_and_not_a_crash(scene: Scene) -> None:
    scene.need("dead_letters")
    scene.publish_bodies([b"\xff\x00 not JSON", b'{"id": 1}'], kind="work")
    scene.publish(1, seconds=0.2)
    process = scene.start()
    process.wait_for("message_rejected", count=2)
    assert_clean_stop(process)
    scene.assert_left(dead=2)


@on_one_broker
def test_a_lifespan_that_cannot_close_is_exit_code_1_said_once(scene: Scene) -> None:
    process = scene.start(LIFESPAN_FAILS="exit")
    exit_code, _ = process.stop()
    assert exit_code == 1
    assert [e["step"] for e in process.find("close_failed")] == ["lifespan"]
    assert scene.broker.consumers(scene.queue) in (0, -1)


@on_one_broker
def test_a_lifespan_that_cannot_open_is_exit_code_1(scene: Scene) -> None:
    process = scene.start(consuming=False, LIFESPAN_FAILS="enter")
    assert process.wait() == 1
    assert process.find("crashed", error="the database is down")


# -- the deadline, and force


def test_at_the_deadline_the_message_goes_back_unharmed(scene: Scene) -> None:
    scene.publish(1, seconds=60)
    process = scene.start(drain_seconds=0.5)
    message = process.wait_for("handling")
    exit_code, seconds = process.stop()
    assert exit_code == 75
    assert 0.5 <= seconds < 0.5 + AT_ONCE_SECONDS
    [abandoned] = process.find("message_abandoned")
    assert abandoned["id"] == message["message_id"]
    scene.assert_left(ready=1)
    again = scene.start(drain_seconds=0)
    assert again.wait_for("handling")["attempt"] == 1
    again.stop()


def test_all_that_was_in_hand_at_the_deadline_comes_again_at_once(scene: Scene) -> None:
    """Fewer than the prefetch: the consumer has asked for more, which could catch what it gives back."""
    tasks = scene.publish(4, seconds=60)
    for _ in range(2):
        started_at = time.monotonic()
        process = scene.start(concurrency=4, prefetch=10, drain_seconds=0)
        process.wait_for("handling", count=len(tasks), attempt=1)
        assert time.monotonic() - started_at < 10
        assert process.stop()[0] == 75


@on_one_broker
def test_without_any_drain_time_an_idle_service_still_exits_0(scene: Scene) -> None:
    process = scene.start(drain_seconds=0)
    assert_clean_stop(process)
    assert not process.find("handlers_abandoned")


def test_a_second_sigint_forces(scene: Scene) -> None:
    scene.publish(1, seconds=60)
    process = scene.start()
    process.wait_for("handling")
    sent_at = process.send(signal.SIGTERM)
    process.wait_for("draining")
    wait_until(lambda: time.monotonic() > sent_at + 0.35)
    exit_code, seconds = process.stop(signal.SIGINT)
    assert exit_code == 128 + signal.SIGINT
    assert seconds < AT_ONCE_SECONDS
    scene.assert_left(ready=1)


@on_one_broker
@pytest.mark.parametrize("kind", ["work", "thread"])
def test_a_handler_that_cannot_be_cancelled_is_named_and_left(scene: Scene, kind: str) -> None:
    scene.publish(1, kind=kind, seconds=3600, end="swallow")
    process = scene.start(HANDLERS=kind, drain_seconds=0.5)
    process.wait_for("handling")
    exit_code, seconds = process.stop()
    assert exit_code == 75
    assert seconds < 0.5 + 2 + AT_ONCE_SECONDS
    assert process.find("message_abandoned")
    [stacks] = process.find("handlers_abandoned")
    assert "service.py" in json.dumps(stacks)
    scene.assert_left(ready=1)


blocked = pytest.mark.parametrize(
    ("end", "call"), [("block", "time.sleep"), ("block in C", "pbkdf2_hmac")], ids=["Python", "C"]
)


@on_one_broker
@blocked
def test_a_blocked_event_loop_can_be_forced(scene: Scene, end: str, call: str) -> None:
    scene.publish(1, seconds=3600, end=end)
    process = scene.start(FORCED_SECONDS=0.5)
    process.wait_for("handling")
    sent_at = process.send(signal.SIGTERM)
    wait_until(lambda: time.monotonic() > sent_at + 0.4)
    exit_code, seconds = process.stop(signal.SIGINT)
    assert exit_code == 128 + signal.SIGINT
    assert seconds < 0.5 + AT_ONCE_SECONDS
    assert call in process.find("event_loop_blocked")[0]["stack"]


@on_one_broker
@blocked
def test_a_blocked_event_loop_ends_by_itself_after_the_deadline(
    scene: Scene, end: str, call: str
) -> None:
    scene.publish(1, seconds=3600, end=end)
    url = scene.broker.impatient_url
    process = scene.start(url=url, drain_seconds=0.5, CLOSE_SECONDS=0.5)
    process.wait_for("handling")
    exit_code, seconds = process.stop()
    assert exit_code == 75
    assert seconds < 1 + AT_ONCE_SECONDS
    assert process.find("message_abandoned")
    assert call in process.find("event_loop_blocked")[0]["stack"]
    again = scene.start(url=url, drain_seconds=0, CLOSE_SECONDS=0)
    assert again.wait_for("handling")["attempt"] == 1
    again.stop()


@on_one_broker
def test_a_block_that_ends_in_time_is_a_message_handled(scene: Scene) -> None:
    scene.publish(1, seconds=1, end="block")
    process = scene.start()
    process.wait_for("handling")
    assert_clean_stop(process)
    assert scene.ledger.ended == ["task-0"]
    scene.assert_left()


# -- starting


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def at(url: str, port: int) -> str:
    """The broker's URL with another port of this machine."""
    scheme, _, rest = url.partition("://")
    credentials, at_sign, _ = rest.rpartition("@")
    return f"{scheme}://{credentials}{at_sign}127.0.0.1:{port}/"


@over_the_network
def test_a_signal_in_the_back_off_before_the_first_connection_ends_it(scene: Scene) -> None:
    url = at(scene.broker.url, free_port())
    process = scene.start(consuming=False, url=url)
    process.wait_for("reconnecting")
    assert assert_clean_stop(process) < AT_ONCE_SECONDS


@over_the_network
def test_a_signal_while_a_silent_broker_is_awaited_ends_it(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = at(scene.broker.url, silent.getsockname()[1])
        process = scene.start(consuming=False, url=url)
        connection, _ = silent.accept()
        with connection:
            assert assert_clean_stop(process) < AT_ONCE_SECONDS


@over_the_network
def test_no_broker_within_connect_seconds_is_exit_code_69_and_one_sentence(scene: Scene) -> None:
    url = at(scene.broker.url, free_port())
    process = scene.start(consuming=False, url=url, connect_seconds=1)
    assert process.wait() == 69
    assert len(process.stderr.splitlines()) == 1
    assert "Traceback" not in process.stderr


def test_a_signal_at_any_moment_of_the_start_leaves_no_message_unsettled(scene: Scene) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    scene.publish(3)
    for _ in range(5):
        process = scene.start(consuming=False)
        time.sleep(chance.uniform(0, 0.8))
        exit_code, _ = process.stop()
        # Before the handlers are installed the signal itself ends the process, and nothing was taken.
        assert exit_code in (0, -signal.SIGTERM), process.stderr
        assert_quiet(process)
    scene.assert_left(ready=3 - len(scene.ledger.ended))
    assert sorted(scene.ledger.ended) == sorted(set(scene.ledger.ended))


# -- the world around


@on_one_broker
def test_a_closed_standard_output_does_not_disturb_the_stop(scene: Scene) -> None:
    scene.publish(1, seconds=0.5)
    environment = service_environment(scene.broker.url, scene.queue, scene.ledger)
    reader, writer = os.pipe()
    with subprocess.Popen(
        service_command("run"), env=environment, stdout=writer, stderr=subprocess.PIPE
    ) as process:
        os.close(writer)
        wait_until(lambda: scene.ledger.started == ["task-0"])
        os.close(reader)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        stderr = process.stderr.read()
        assert process.wait(30) == 0
    assert stderr == b""
    assert scene.ledger.ended == ["task-0"]


def test_rolling_restarts_under_load_lose_nothing_and_repeat_nothing(scene: Scene) -> None:
    need_of_server(scene.broker, "rebalance")
    restarts, tasks = int(os.environ.get("ROLLING_RESTARTS", "2")), []
    running = [scene.start(concurrency=4), scene.start(concurrency=4)]
    stopping = threading.Event()

    def publish() -> None:
        while not stopping.wait(0.05):  # what keeps most of the eight workers busy, and no more
            tasks.extend(scene.publish(10, seconds=0.03))

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        for _ in range(restarts):
            assert_clean_stop(running.pop(0))
            running.append(scene.start(concurrency=4))
    finally:
        stopping.set()
        publisher.join()
    wait_until(lambda: set(scene.ledger.ended) >= set(tasks))
    for process in running:
        assert_clean_stop(process)
    assert Counter(scene.ledger.ended) == Counter(tasks)
    scene.assert_left()


def test_sigkill_at_random_moments_loses_nothing(scene: Scene) -> None:
    need_of_server(scene.broker, "rebalance")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    kills = int(os.environ.get("SIGKILLS", "3"))
    tasks = scene.publish(kills * 40, seconds=0.01)
    for number in range(kills):
        process = scene.start(concurrency=4, url=scene.broker.impatient_url)
        wait_until(partial(has_ended, scene, 40 * number + chance.randrange(1, 30)))
        process.stop(signal.SIGKILL)
    process = scene.start(url=scene.broker.impatient_url)
    wait_until(lambda: set(scene.ledger.ended) == set(tasks))
    wait_until(lambda: is_empty(scene))
    assert_clean_stop(process)
    scene.assert_left()
