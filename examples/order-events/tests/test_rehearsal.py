"""Your handlers under SIGTERM, SIGKILL and double delivery, by the command `rehearse`: yours to edit.

They have real effects on the systems that the environment and .env name: name a test database in `env` below.
With `effects` in handlers/__init__.py, it also counts these effects: see docs/testing.md of the template.
"""

import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path

import pytest

servers = import_module("harness.servers")  # of tests/runtime


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_handler_loses_or_doubles_its_work(tmp_path: Path) -> None:
    """Also on the broker of the other tests, if there is one."""
    command = [sys.executable, "-m", "order_events", "rehearse"]
    env = {**os.environ}
    with ExitStack() as running:
        with suppress(servers.ServerMissing):
            [broker] = map(servers.server_module, servers.BROKERS)
            server = running.enter_context(broker.shared(tmp_path))
            env["CONSUMER_BROKER_URL"] = server.impatient_url
            command.append("--broker")
        assert "--broker" in command or env.get("REQUIRE_BROKERS") != "1"
        result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
