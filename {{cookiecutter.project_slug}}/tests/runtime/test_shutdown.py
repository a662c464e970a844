# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Graceful shutdown, proved: the real program as a child process, real signals, and the broker's own counts.

The invariant everywhere: published = handled + still in the broker + dead letters; and after a graceful shutdown
no message is handled twice.
"""

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from functools import partial

import pytest

from harness.fixtures import over_the_network
from harness.scene import (
    AT_ONCE_SECONDS,
    Scene,
    assert_clean_shutdown,
    assert_quiet,
    has_ended,
    is_empty,
    wait_until,
)
from harness.servers.local import free_port

pytestmark = pytest.mark.slow


def test_an_idle_service_exits_0_at_once(scene: Scene) -> None:
    process = scene.start()
    assert assert_clean_shutdown(process) < AT_ONCE_SECONDS
    wait_until(lambda: scene.broker.consumers(scene.queue) in (0, -1))


def test_the_in_flight_message_is_finished_and_the_rest_stays_in_the_queue(scene: Scene) -> None:
    tasks = scene.publish(30, seconds=0.3)
    process = scene.start(concurrency=2, prefetch=10)
    process.wait_for("handling", count=2)
    assert_clean_shutdown(process)
    ended = scene.ledger.ended
    assert sorted(ended) == sorted(scene.ledger.started)
    assert len(ended) == 2
    scene.assert_left(ready=len(tasks) - 2)
    [drained] = process.find("drained")
    assert (drained["handled"], drained["abandoned"]) == (2, 0)
    scene.handle_the_rest()
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
    assert scene.ledger.ended == []  # so the source stopped first, while the handler runs
    assert process.wait() == 0
    assert scene.ledger.started == ["task-0"]
    scene.assert_left(ready=1)


def test_every_handled_message_is_acked_before_the_connection_closes(scene: Scene) -> None:
    tasks = scene.publish(200)
    process = scene.start(concurrency=10, prefetch=50)
    wait_until(lambda: len(scene.ledger.ended) > 20)
    assert_clean_shutdown(process)
    scene.assert_left(ready=len(tasks) - len(scene.ledger.ended))
    scene.handle_the_rest()
    assert Counter(scene.ledger.ended) == Counter(tasks)


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


def test_at_the_deadline_the_message_is_requeued_and_no_attempt_is_counted(scene: Scene) -> None:
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


def test_all_in_flight_messages_at_the_deadline_are_redelivered_at_once(scene: Scene) -> None:
    """Fewer than the prefetch: the consumer has asked for more, and could get the messages that it requeues."""
    tasks = scene.publish(4, seconds=60)
    for _ in range(2):
        started_at = time.monotonic()
        process = scene.start(concurrency=4, prefetch=10, drain_seconds=0)
        process.wait_for("handling", count=len(tasks), attempt=1)
        assert time.monotonic() - started_at < 10
        assert process.stop()[0] == 75


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


def at(url: str, port: int) -> str:
    """The broker's URL with another port of this machine."""
    scheme, _, rest = url.partition("://")
    credentials, at_sign, _ = rest.rpartition("@")
    return f"{scheme}://{credentials}{at_sign}127.0.0.1:{port}/"


@over_the_network
def test_a_signal_ends_the_back_off_before_the_first_connection(scene: Scene) -> None:
    url = at(scene.broker.url, free_port())
    process = scene.start(consuming=False, url=url)
    process.wait_for("reconnecting")
    assert assert_clean_shutdown(process) < AT_ONCE_SECONDS


@over_the_network
def test_a_signal_ends_the_wait_for_an_unresponsive_broker(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unresponsive:
        url = at(scene.broker.url, unresponsive.getsockname()[1])
        process = scene.start(consuming=False, url=url)
        connection, _ = unresponsive.accept()
        with connection:
            assert assert_clean_shutdown(process) < AT_ONCE_SECONDS


@over_the_network
def test_no_broker_within_connect_seconds_is_exit_code_69_and_one_sentence(scene: Scene) -> None:
    url = at(scene.broker.url, free_port())
    process = scene.start(consuming=False, url=url, connect_seconds=1)
    assert process.wait() == 69
    assert len(process.stderr.splitlines()) == 1
    assert "Traceback" not in process.stderr


def test_a_signal_at_any_moment_of_the_start_leaves_no_message_unacked(scene: Scene) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    scene.publish(3)
    for _ in range(5):
        process = scene.start(consuming=False)
        time.sleep(chance.uniform(0, 0.8))
        exit_code, _ = process.stop()
        # Before the handlers are installed the signal itself ends the process, and no message was taken.
        assert exit_code in (0, -signal.SIGTERM), process.stderr
        assert_quiet(process)
    scene.assert_left(ready=3 - len(scene.ledger.ended))
    assert sorted(scene.ledger.ended) == sorted(set(scene.ledger.ended))


def test_rolling_restarts_under_load_lose_nothing_and_repeat_nothing(scene: Scene) -> None:
    restarts, tasks = int(os.environ.get("ROLLING_RESTARTS", "2")), []
    running = [scene.start(concurrency=4), scene.start(concurrency=4)]
    stopping = threading.Event()

    def publish() -> None:
        while not stopping.wait(0.05):  # enough to keep most of the eight workers busy
            tasks.extend(scene.publish(10, seconds=0.03))

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        for _ in range(restarts):
            assert_clean_shutdown(running.pop(0))
            running.append(scene.start(concurrency=4))
    finally:
        stopping.set()
        publisher.join()
    wait_until(lambda: set(scene.ledger.ended) >= set(tasks))
    for process in running:
        assert_clean_shutdown(process)
    assert Counter(scene.ledger.ended) == Counter(tasks)
    scene.assert_left()


def test_sigkill_at_random_moments_loses_nothing(scene: Scene) -> None:
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
    assert_clean_shutdown(process)
    scene.assert_left()
