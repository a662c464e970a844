"""The probes: live while the loop turns and the fetcher lives; ready while messages are being taken."""

import asyncio
import errno
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harness.process import IMPORTED_FROM, ask
from harness.scene import Scene, assert_quiet, wait_until
from harness.servers.local import free_port
from harness.servers.sqlite import SqliteFile
from processes import MISBEHAVING
from runtime import probes as probes_module
from runtime.brokers import make_source
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.errors import SettingsError
from runtime.handlers import Router
from runtime.probes import (
    EventLoopLag,
    probes,
    why_not_live,
    why_not_ready,
)
from runtime.settings import ConsumerSettings
from runtime.telemetry import Telemetry

# -- the answers


async def handle(body: bytes) -> None: ...


@pytest.fixture
async def consumer(tmp_path: Path) -> Consumer:
    """One that does not run: its state is what a test makes it."""
    url = f"sqlite:///{tmp_path}/messages.db"
    settings = ConsumerSettings.model_validate({"broker_url": url, "source": "probed"})
    event = CancellationEvent(asyncio.get_running_loop())
    return Consumer(make_source(settings), Router({"n": handle}), event, settings)


async def test_it_is_ready_only_while_it_consumes_and_the_broker_is_reachable(
    consumer: Consumer,
) -> None:
    assert why_not_ready(consumer) == "starting"
    consumer.state = "consuming"
    consumer.source.connectivity.lost("it is down")
    assert why_not_ready(consumer) == "the broker cannot be reached: it is down"
    async with consumer.source:
        assert why_not_ready(consumer) == ""
        consumer.source.put_offs.reason = "a message could not be stored"
        assert why_not_ready(consumer) == "a message could not be stored"


async def test_from_the_first_instant_of_a_shutdown_it_is_live_and_not_ready(
    consumer: Consumer,
) -> None:
    consumer.state = "consuming"
    async with consumer.source:
        consumer.event.set(signal.SIGTERM)
        assert consumer.state == "consuming"  # the consumer has not reacted yet
        assert why_not_ready(consumer) == "shutting down"
        assert why_not_live(consumer) == ""


async def test_a_failed_fetcher_is_not_live_and_its_reason_is_named(consumer: Consumer) -> None:
    assert why_not_live(consumer) == ""
    consumer.source.buffer.fail(RuntimeError("the client\nlibrary died"))
    assert why_not_live(consumer) == "failed: the client library died"


async def test_a_dead_worker_is_not_live(consumer: Consumer) -> None:
    consumer.errors.append(KeyError())
    assert why_not_live(consumer) == "failed: KeyError"


@pytest.mark.slow
async def test_the_lag_of_a_blocked_loop_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes_module, "SAMPLE_SECONDS", 0.01)
    lag = EventLoopLag()
    lag.start()
    assert lag.seconds() < 0.2
    time.sleep(0.3)  # noqa: ASYNC251  # it is to block the event loop
    assert lag.seconds() >= 0.28  # asked before the late sample
    await asyncio.sleep(0.02)
    assert lag.seconds() >= 0.28  # and after it
    lag.stop()


# -- the server


async def test_both_ipv4_and_ipv6_are_answered(consumer: Consumer) -> None:
    port = free_port()
    async with probes(port, consumer, Telemetry()):
        for host in ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]:
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()
            await writer.wait_closed()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_without_ipv6_ipv4_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    create_server = socket.create_server

    def only_ipv4(*arguments: Any, **options: Any) -> socket.socket:
        if options.get("family") == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "not here")
        return create_server(*arguments, **options)

    monkeypatch.setattr(socket, "create_server", only_ipv4)
    with closing(probes_module._listen(0)) as listener:
        assert listener.family == socket.AF_INET


async def test_there_are_no_metrics_without_telemetry(consumer: Consumer) -> None:
    port = free_port()
    async with probes(port, consumer, Telemetry()):
        assert (await asyncio.to_thread(ask, port, "/metrics"))[0] == 404


async def test_an_open_client_connection_does_not_delay_the_close_of_the_server(
    consumer: Consumer,
) -> None:
    port = free_port()
    async with probes(port, consumer, Telemetry()):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /livez HTTP/1.1\r\n")
        await writer.drain()
        left_at = time.monotonic()
    assert time.monotonic() - left_at < probes_module.CLOSE_SECONDS + 1
    writer.close()


async def test_a_port_in_use_is_one_sentence_that_names_the_variable(consumer: Consumer) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"^CONSUMER_PROBE_PORT: port {port} is in use$"):
            async with probes(port, consumer, Telemetry()):
                pass


@pytest.mark.slow
def test_without_a_port_the_server_is_not_even_imported() -> None:
    program = "import runtime.operate.cli, sys; print('aiohttp' in sys.modules)"
    path = {"PYTHONPATH": os.pathsep.join(IMPORTED_FROM)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, **path}, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "False\n"


# -- the real program


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """On a file of its own, as some of these tests lock it or take it away."""
    with Scene(SqliteFile(tmp_path / "messages.db"), "probed", tmp_path, MISBEHAVING) as scene:
        yield scene


def database(scene: Scene) -> Path:
    assert isinstance(scene.broker, SqliteFile)
    return scene.broker.file


def answers(port: int, path: str) -> Callable[[], bool]:
    """Whether it does so with 200."""

    def answer() -> bool:
        try:
            return ask(port, path)[0] == 200
        except ConnectionRefusedError:  # it is still starting
            return False

    return answer


@pytest.mark.slow
def test_while_it_drains_it_is_live_and_not_ready(scene: Scene) -> None:
    scene.publish(1, seconds=2)
    port = free_port()
    process = scene.start(probe_port=port)
    process.wait_for("handling")
    assert ask(port, "/readyz") == (200, "ready\n")
    process.send(signal.SIGTERM)
    process.wait_for("draining")
    assert ask(port, "/readyz") == (503, "shutting down\n")
    assert ask(port, "/livez")[0] == 200
    assert scene.ledger.ended == []  # the handler was still running
    assert process.wait() == 0
    assert_quiet(process)


@pytest.mark.slow
def test_before_it_has_connected_it_is_live_and_not_ready(scene: Scene) -> None:
    with closing(sqlite3.connect(database(scene))) as other:
        other.execute("BEGIN EXCLUSIVE")
        port = free_port()
        process = scene.start(consuming=False, probe_port=port)
        wait_until(answers(port, "/livez"))
        assert ask(port, "/readyz") == (503, "starting\n")
        assert not process.find("consuming")
    wait_until(answers(port, "/readyz"))
    assert process.stop()[0] == 0


@pytest.mark.slow
def test_in_an_outage_it_is_live_and_not_ready(scene: Scene) -> None:
    port = free_port()
    process = scene.start(url=scene.broker.impatient_url, probe_port=port, PATIENCE_SECONDS=1)
    wait_until(answers(port, "/readyz"))
    with closing(sqlite3.connect(database(scene))) as other:
        other.execute("BEGIN IMMEDIATE")
        process.wait_for("reconnecting")
        code, text = ask(port, "/readyz")
        assert (code, text[:30]) == (503, "the broker cannot be reached: ")
        assert ask(port, "/livez")[0] == 200
    wait_until(answers(port, "/readyz"))
    assert process.stop()[0] == 0


@pytest.mark.slow
def test_a_blocked_loop_does_not_answer_and_is_logged_afterwards(scene: Scene) -> None:
    port = free_port()
    process = scene.start(probe_port=port)
    wait_until(answers(port, "/livez"))
    scene.publish(1, seconds=3, end="block")
    process.wait_for("handling")
    with pytest.raises(TimeoutError):
        ask(port, "/livez", seconds=1)
    status, text = ask(port, "/livez")
    assert status == 200
    late = float(text.split("at most ")[1].split()[0])
    assert 2 < late < 10
    assert process.wait_for("event_loop_late")["seconds"] > 2
    assert process.stop()[0] == 0


@pytest.mark.slow
def test_when_the_fetcher_has_failed_it_is_not_live(scene: Scene) -> None:
    scene.publish(1, seconds=3)
    port = free_port()
    process = scene.start(url=scene.broker.impatient_url, probe_port=port)
    process.wait_for("handling")
    database(scene).unlink()
    wait_until(lambda: ask(port, "/livez")[0] == 503)
    assert "was deleted or replaced" in ask(port, "/livez")[1]
    assert process.wait() == 1  # after the handler, as ever
    assert len(scene.ledger.ended) == 1


@pytest.mark.slow
def test_a_port_in_use_is_exit_code_2_and_one_sentence(scene: Scene) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        process = scene.start(consuming=False, probe_port=port)
        assert process.wait() == 2
    assert process.stderr == f"service-of-the-tests: CONSUMER_PROBE_PORT: port {port} is in use\n"
    assert [event["exit_code"] for event in process.find("stopped")] == [2]
