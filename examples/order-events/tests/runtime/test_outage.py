# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The broker is lost or unresponsive: a real server is killed, and a proxy cuts or blocks connections.

The invariant is that of test_shutdown.py: published = handled + still in the broker + dead letters. Which messages may be
handled twice depends on the broker (harness/servers).
"""

import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.fixtures import over_the_network
from harness.process import ask
from harness.scene import (
    AT_ONCE_SECONDS,
    Scene,
    assert_clean_shutdown,
    assert_quiet,
    has_ended,
    is_empty,
    wait_until,
)
from harness.servers import (
    SERVED_BROKERS,
    PrivateServer,
    server_module,
    with_options,
)
from harness.servers.local import free_port
from harness.servers.proxy import Proxy

pytestmark = pytest.mark.slow

CONCURRENCY = 4
SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": 0.4}

Shorten = Callable[..., None]


@pytest.fixture(autouse=True)
def reconnects_soon(shorten: Shorten) -> None:
    shorten(0.2, "FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS")


# -- the process


@pytest.mark.parametrize("name", SERVED_BROKERS)
def test_a_server_killed_and_restarted_in_mid_work_loses_nothing(
    name: str, private_server: Callable[[str], PrivateServer], tmp_path: Path
) -> None:
    server = private_server(name)
    scene = Scene(server, f"ccc-test-{uuid.uuid4().hex[:12]}", tmp_path)
    tasks = scene.publish(150, seconds=0.02)
    port = free_port()
    with scene:
        process = scene.start(concurrency=CONCURRENCY, probe_port=port)
        wait_until(lambda: has_ended(scene, 30))
        assert ask(port, "/readyz")[0] == 200
        server.kill()
        process.wait_for("reconnecting")
        assert ask(port, "/readyz")[0] == 503
        assert ask(port, "/livez")[0] == 200
        server.restart()
        process.wait_for("connected", count=2)
        wait_until(lambda: ask(port, "/readyz")[0] == 200)
        tasks += scene.publish(20)
        wait_until(lambda: set(scene.ledger.ended) == set(tasks))
        wait_until(lambda: is_empty(scene))
        status, metrics = ask(port, "/metrics")
        assert status == 404 or "consumer_reconnects_total 1.0" in metrics  # 404: without telemetry
        assert_clean_shutdown(process)
    repeated = Counter(scene.ledger.ended) - Counter(tasks)
    assert repeated.total() <= server_module(name).most_repeated(CONCURRENCY)
    assert len(process.find("reconnecting")) == 1
    scene.assert_left()


@over_the_network
def test_a_rolling_restart_during_an_outage_loses_nothing(scene: Scene, proxy: Proxy) -> None:
    tasks = scene.publish(3, seconds=1)
    url = with_options(proxy.url, scene.broker.lease_option)
    old = scene.start(url=url, concurrency=1)
    old.wait_for("handling")
    proxy.refuse()
    old.wait_for("reconnecting")
    exit_code, seconds = old.stop()
    assert exit_code == 0
    assert seconds < 1 + AT_ONCE_SECONDS
    assert_quiet(old)
    assert len(scene.ledger.ended) >= 1, "the in-flight message is finished"
    new = scene.start(url=url, consuming=False)
    new.wait_for("reconnecting")  # and it goes on waiting
    proxy.resume()
    new.wait_for("consuming")
    published_since = scene.publish(5)
    wait_until(lambda: set(scene.ledger.ended) == {*tasks, *published_since})
    assert_clean_shutdown(new)
    new_ones = [id for id in scene.ledger.ended if id in published_since]
    assert Counter(new_ones) == Counter(published_since)


# -- an outage
