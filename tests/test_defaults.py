"""A service with every default, like a new user's: published to, run and shut down, on a real RabbitMQ."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from support.rendered import BIN, Render, Service

DELETE = """
import sys
from harness.servers.rabbitmq import RabbitServer
RabbitServer(sys.argv[1]).delete(sys.argv[2])
"""


@contextmanager
def running(service: Service, where: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    python = service.environment() / BIN / "python"
    env = {**os.environ, **where, "PYTHONPATH": "src"}
    with subprocess.Popen(
        [str(python), "-m", "order_events", "run"],
        cwd=service.path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_is_published_is_handled_and_sigterm_ends_it_with_nothing_left(
    render: Render, rabbitmq_url: str
) -> None:
    service = render()
    queue = f"ccc-test-defaults-{uuid4().hex[:12]}"
    where = {"CONSUMER_BROKER_URL": rabbitmq_url, "CONSUMER_SOURCE": queue}

    def order_events(*arguments: str) -> str:
        command = ("python", "-m", "order_events", *arguments)
        result = service.run(*command, environment=service.environment(), **where)
        assert result.returncode == 0, result.stdout
        return result.stdout

    try:
        order_events("publish", service.example("order_created"))
        events: list[dict[str, Any]] = []
        with running(service, where) as process:
            assert process.stdout
            for line in process.stdout:
                events.append(json.loads(line))
                if events[-1]["event"] == "order_created":  # its handler's own line
                    process.send_signal(signal.SIGTERM)
        assert process.returncode == 0, events
        assert [event["event"] for event in events].count("order_created") == 1
        [drained] = [event for event in events if event["event"] == "drained"]
        assert (drained["handled"], drained["requeued"], drained["abandoned"]) == (1, 0, 0)
        assert events[-1] == {**events[-1], "event": "stopped", "exit_code": 0}
        assert f"{queue}: 0\n" in order_events("check")
    finally:
        arguments = ("python", "-c", DELETE, rabbitmq_url, queue)
        service.run(
            *arguments,
            environment=service.environment(),
            PYTHONPATH="src/order_events:tests/runtime",
        )
