"""Your handlers under SIGTERM, SIGKILL and double delivery, by the command `rehearse`: yours to edit.

They do their work for real, by the settings of the environment and of .env: name a database of tests in `env` below.
An `effects` in handlers/__init__.py shows it what they did; docs/testing.md of the template has some.
"""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_handler_loses_or_doubles_its_work() -> None:
    """Also on the broker of these tests, if there is one."""
    command = [sys.executable, "-m", "order_events", "rehearse"]
    env = {**os.environ}
    if url := env.get("CONSUMER_TEST_BROKER_URL"):
        env["CONSUMER_BROKER_URL"] = url
        command.append("--broker")
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
