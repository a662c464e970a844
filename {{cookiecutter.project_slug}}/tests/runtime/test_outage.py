# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The broker is lost: a real server is killed and started again.

The invariant is that of test_shutdown.py: published = handled + still in the broker + dead letters. How many messages
may be handled twice depends on the broker (harness/servers).
"""

import uuid
from collections import Counter
from pathlib import Path

import pytest

from harness.fixtures import StartServer
from harness.process import ask
from harness.scene import Scene, assert_clean_shutdown, has_ended, is_empty, wait_until
from harness.servers import SERVED_BROKERS, PrivateServer, server_module
from harness.servers.local import free_port

pytestmark = pytest.mark.slow

CONCURRENCY = 4


@pytest.mark.parametrize("name", SERVED_BROKERS)
def test_a_server_killed_and_restarted_in_mid_work_loses_nothing(
    name: str, start_server: StartServer, tmp_path: Path
) -> None:
    server: PrivateServer = start_server("private", name)
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
        wait_until(lambda: set(scene.ledger.ended) == set(tasks) and is_empty(scene))
        status, metrics = ask(port, "/metrics")
        assert status == 404 or "consumer_reconnects_total 1.0" in metrics  # 404: without telemetry
        assert_clean_shutdown(process)
    repeated = Counter(scene.ledger.ended) - Counter(tasks)
    assert repeated.total() <= server_module(name).most_repeated(CONCURRENCY)
    assert len(process.find("reconnecting")) == 1
    scene.assert_left()
