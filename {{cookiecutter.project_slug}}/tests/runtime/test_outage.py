# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""The broker goes away: the real program, and a real server that is killed and started again.

The invariant is that of test_shutdown.py: published = done + still in the broker + dead letters. What may
be done twice is what the broker's own nature says (``most_repeated`` in servers/).
"""

import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .servers import SERVED_BROKERS, Counts, PrivateServer, local, server_module
from .test_shutdown import AT_ONCE_SECONDS, Scene, assert_quiet, has_ended, wait_until

pytestmark = pytest.mark.slow

CONCURRENCY = 4


@pytest.fixture(scope="module", params=SERVED_BROKERS)
def broker_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def server(broker_name: str, private_server: Callable[[str], PrivateServer]) -> PrivateServer:
    return private_server(broker_name)


@pytest.fixture
def scene(server: PrivateServer, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(server, f"ccc-test-{uuid.uuid4().hex[:12]}", tmp_path)
    yield scene
    scene.close()


def test_a_server_killed_and_started_again_in_mid_work_loses_nothing(
    scene: Scene, server: PrivateServer, broker_name: str
) -> None:
    tasks = scene.publish(150, seconds=0.02)
    process = scene.start(concurrency=CONCURRENCY)
    wait_until(lambda: has_ended(scene, 30))
    server.kill()
    process.wait_for("reconnecting")
    server.restart()
    process.wait_for("connected", count=2)
    tasks += scene.publish(20)
    wait_until(lambda: set(scene.ledger.ended) == set(tasks))
    wait_until(lambda: scene.broker.counts(scene.queue) == Counts(0, 0, 0))  # what came twice, too
    exit_code, _ = process.stop()
    assert exit_code == 0
    assert_quiet(process)
    repeated = Counter(scene.ledger.ended) - Counter(tasks)
    assert repeated.total() <= server_module(broker_name).most_repeated(CONCURRENCY)
    assert len(process.find("reconnecting")) == 1
    counts = scene.broker.counts(scene.queue)
    assert (counts.ready, counts.delayed, counts.dead) == (0, 0, 0)


def test_a_stop_while_the_server_is_away_finishes_what_is_in_hand(
    scene: Scene, server: PrivateServer
) -> None:
    tasks = scene.publish(3, seconds=1)
    process = scene.start(concurrency=1)
    process.wait_for("handling")
    server.kill()
    process.wait_for("reconnecting")
    exit_code, seconds = process.stop()
    assert exit_code == 0
    assert seconds < 1 + AT_ONCE_SECONDS
    assert_quiet(process)
    assert len(scene.ledger.ended) >= 1
    server.restart()
    scene.drain_the_rest()
    assert set(scene.ledger.ended) == set(tasks)


def test_a_service_that_starts_before_its_server_waits_for_it(
    scene: Scene, server: PrivateServer
) -> None:
    server.kill()
    process = scene.start(consuming=False)
    process.wait_for("reconnecting")
    server.restart()
    process.wait_for("consuming")
    tasks = scene.publish(5)
    wait_until(lambda: has_ended(scene, 5))
    exit_code, _ = process.stop()
    assert exit_code == 0
    assert_quiet(process)
    assert Counter(scene.ledger.ended) == Counter(tasks)


@pytest.mark.parametrize(
    ("client", "found"),
    [("exit 0", True), ("exit 1", False), ("exec sleep 600", False), (None, False)],
    ids=["answered", "no daemon", "silent daemon", "no client"],
)
def test_docker_counts_only_with_a_daemon_that_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, client: str | None, found: bool
) -> None:
    if client is not None:
        program = tmp_path / "docker"
        program.write_text(f"#!/bin/sh\n{client}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(local, "DOCKER_SECONDS", 0.5)
    assert local.has_docker.__wrapped__() is found
