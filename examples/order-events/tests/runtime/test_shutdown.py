# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Graceful shutdown, proved: the real program as a child process, real signals, and the broker's own counts.

The invariant everywhere: published = handled + still in the broker + dead letters; and after a graceful shutdown
no message is handled twice.
"""

import os
import random
import signal
import threading
from collections import Counter
from functools import partial

import pytest

from harness.scene import (
    AT_ONCE_SECONDS,
    Scene,
    assert_clean_shutdown,
    has_ended,
    is_empty,
    wait_until,
)
from runtime.brokers import make_source

pytestmark = pytest.mark.slow


def test_an_idle_service_exits_0_at_once(scene: Scene) -> None:
    assert assert_clean_shutdown(scene.start()) < AT_ONCE_SECONDS
    wait_until(lambda: scene.broker.consumers(scene.queue) in (0, -1))


def test_the_in_flight_message_is_finished_and_the_rest_stays_in_the_queue(scene: Scene) -> None:
    tasks = scene.publish(30, seconds=3)
    process = scene.start(concurrency=2, prefetch=10)
    process.wait_for("handling", count=2)
    process.send(signal.SIGTERM)
    if make_source(scene.settings).capabilities.requeue:
        scene.assert_left(ready=len(tasks) - 2)
        assert scene.ledger.ended == []  # so the end of the connection did not requeue them
    assert_clean_shutdown(process)
    assert sorted(scene.ledger.ended) == sorted(scene.ledger.started)
    assert len(scene.ledger.ended) == 2
    scene.assert_left(ready=len(tasks) - 2)
    [drained] = process.find("drained")
    assert (drained["handled"], drained["abandoned"]) == (2, 0)
    process = scene.start(concurrency=28)
    wait_until(lambda: set(scene.ledger.ended) == set(tasks))
    assert_clean_shutdown(process)
    assert Counter(scene.ledger.ended) == Counter(tasks)


def test_at_the_deadline_the_message_is_requeued_and_no_attempt_is_counted(scene: Scene) -> None:
    scene.publish(1, seconds=60)
    process = scene.start(drain_seconds=0.5)
    message = process.wait_for("handling")
    exit_code, seconds = process.stop()
    assert exit_code == 75
    assert 0.5 <= seconds < 0.5 + AT_ONCE_SECONDS
    assert [e["message_id"] for e in process.find("message_abandoned")] == [message["message_id"]]
    scene.assert_left(ready=1)
    again = scene.start(drain_seconds=0)
    assert again.wait_for("handling")["attempt"] == 1
    again.stop()


def test_rolling_restarts_under_load_lose_nothing_and_repeat_nothing(scene: Scene) -> None:
    restarts, tasks = int(os.environ.get("ROLLING_RESTARTS", "2")), []
    running = [scene.start(concurrency=4), scene.start(concurrency=4)]
    stopping = threading.Event()

    def publish() -> None:
        while not stopping.wait(0.05):  # enough messages for most of the eight workers
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
    wait_until(lambda: set(scene.ledger.ended) == set(tasks) and is_empty(scene))
    assert_clean_shutdown(process)
    scene.assert_left()
