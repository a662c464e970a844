# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""The broker goes away: the real program, and a real server that is killed and started again.

The invariant is that of test_shutdown.py: published = handled + still in the broker + dead letters. What may be
handled twice is what the broker's own nature says (``most_repeated`` in harness/servers).
"""

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.process import ask
from harness.scene import AT_ONCE_SECONDS, Scene, assert_quiet, has_ended, is_empty, wait_until
from harness.servers import SERVED_BROKERS, PrivateServer, server_module
from harness.servers.local import free_port

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
    server.let_store()
    port = free_port()
    process = scene.start(concurrency=CONCURRENCY, probe_port=port)
    wait_until(lambda: has_ended(scene, 30))
    assert ask(port, "/readyz")[0] == 200
    server.kill()
    process.wait_for("reconnecting")
    assert ask(port, "/readyz") == (503, "the broker cannot be reached\n")
    assert ask(port, "/livez")[0] == 200
    server.restart()
    process.wait_for("connected", count=2)
    wait_until(lambda: ask(port, "/readyz")[0] == 200)
    tasks += scene.publish(20)
    wait_until(lambda: set(scene.ledger.ended) == set(tasks))
    wait_until(lambda: is_empty(scene))
    status, metrics = ask(port, "/metrics")
    assert status == 404 or "consumer_reconnects_total 1.0" in metrics  # 404: made without them
    exit_code, _ = process.stop()
    assert exit_code == 0
    assert_quiet(process)
    repeated = Counter(scene.ledger.ended) - Counter(tasks)
    assert repeated.total() <= server_module(broker_name).most_repeated(CONCURRENCY)
    assert len(process.find("reconnecting")) == 1
    scene.assert_left()


@pytest.mark.very_slow
def test_a_rolling_restart_while_the_server_is_away_loses_nothing(
    scene: Scene, server: PrivateServer
) -> None:
    tasks = scene.publish(3, seconds=1)
    server.let_store()
    old = scene.start(concurrency=1)
    old.wait_for("handling")
    server.kill()
    old.wait_for("reconnecting")
    exit_code, seconds = old.stop()
    assert exit_code == 0
    assert seconds < 1 + AT_ONCE_SECONDS
    assert_quiet(old)
    assert len(scene.ledger.ended) >= 1, "the in-flight message is finished"
    new = scene.start(consuming=False)
    new.wait_for("reconnecting")  # and it goes on waiting
    server.restart()
    new.wait_for("consuming")
    published_since = scene.publish(5)
    wait_until(lambda: set(scene.ledger.ended) == {*tasks, *published_since})
    exit_code, _ = new.stop()
    assert exit_code == 0
    assert_quiet(new)
    new_ones = [id for id in scene.ledger.ended if id in published_since]
    assert Counter(new_ones) == Counter(published_since)
