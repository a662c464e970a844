"""More tests of the start and the shutdown, with real processes on every broker, which services do not repeat."""

import random
import signal
import socket
import time
from collections import Counter

import pytest

from harness.scene import AT_ONCE_SECONDS, Scene, assert_clean_shutdown, assert_quiet, wait_until
from harness.servers.local import free_port
from steps import handle_the_rest, over_the_network, scene_needs

pytestmark = pytest.mark.slow


# -- the start


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
        # Before the handlers are installed the signal itself ends the process, and it has taken no message.
        assert exit_code in (0, -signal.SIGTERM), process.stderr
        assert_quiet(process)
    scene.assert_left(ready=3 - len(scene.ledger.ended))
    assert sorted(scene.ledger.ended) == sorted(set(scene.ledger.ended))


# -- the shutdown


def test_a_message_that_waits_for_its_retry_is_kept_with_its_attempts(scene: Scene) -> None:
    scene_needs(scene, "attempts", "dead_letters")
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


def test_all_in_flight_messages_at_the_deadline_are_redelivered_at_once(scene: Scene) -> None:
    """Fewer than the prefetch: the consumer has requested more, and could get its own requeued messages."""
    tasks = scene.publish(4, seconds=60)
    for _ in range(2):
        started_at = time.monotonic()
        process = scene.start(concurrency=4, prefetch=10, drain_seconds=0)
        process.wait_for("handling", count=len(tasks), attempt=1)
        assert time.monotonic() - started_at < 25  # shorter than every lease
        assert process.stop()[0] == 75


def test_the_broker_delivers_nothing_more_while_the_handler_still_runs(scene: Scene) -> None:
    scene_needs(scene, "queue_metrics")
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
    handle_the_rest(scene)
    assert Counter(scene.ledger.ended) == Counter(tasks)
