"""The probes: live while the loop runs and the fetcher lives; ready while messages are taken."""

import asyncio
import errno
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.process import (
    WAIT_SECONDS,
    ServiceProcess,
    ask,
    service_command,
    service_environment,
)
from harness.scene import Scene, assert_quiet, wait_until
from harness.servers import Server
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


def on(port: int, host: str = "") -> ConsumerSettings:
    return ConsumerSettings.model_validate(
        {"broker_url": "sqlite:///x", "probe_port": port, "probe_host": host}
    )


async def handle(body: bytes) -> None: ...


@pytest.fixture
async def consumer(tmp_path: Path) -> Consumer:
    """A consumer that does not run: a test sets its state."""
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
    sampling = asyncio.create_task(lag.sample())
    await asyncio.sleep(0)
    assert lag.seconds() < 0.2
    time.sleep(0.3)  # noqa: ASYNC251  # it is to block the event loop
    assert lag.seconds() >= 0.28  # before the late sample
    await asyncio.sleep(0.02)
    assert lag.seconds() >= 0.28  # and after it
    sampling.cancel()


# -- the server


async def test_both_ipv4_and_ipv6_are_answered(consumer: Consumer) -> None:
    port = free_port()
    async with probes(on(port), consumer, Telemetry()):
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
    class OnlyIPv4(socket.socket):
        def __init__(self, family: int = -1, *arguments: Any, **options: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "not here")
            super().__init__(family, *arguments, **options)

    monkeypatch.setattr(socket, "socket", OnlyIPv4)
    with closing(probes_module._listen("", 0)) as listener:
        assert listener.family == socket.AF_INET


async def test_there_are_no_metrics_without_telemetry(consumer: Consumer) -> None:
    port = free_port()
    async with probes(on(port), consumer, Telemetry()):
        assert (await asyncio.to_thread(ask, port, "/metrics"))[0] == 404


async def test_an_open_client_connection_is_closed_with_the_server(consumer: Consumer) -> None:
    port = free_port()
    async with probes(on(port), consumer, Telemetry()):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /livez HTTP/1.1\r\n")
        await writer.drain()
    assert await end_of(reader) == b""
    writer.close()


async def end_of(reader: asyncio.StreamReader) -> bytes:
    """The rest of the stream, until the server closes the connection."""
    async with asyncio.timeout(WAIT_SECONDS):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize(
    "sent", [b"", b"GET /livez HTTP/1.1\r\n", b"GET /livez HTTP/1.1\r\n" * 10_000]
)
async def test_a_connection_without_a_whole_request_is_closed(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(probes_module, "CONNECTION_SECONDS", 0.1)
    port = free_port()
    async with probes(on(port), consumer, Telemetry()):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        assert await end_of(reader) == b""
        writer.close()


async def test_a_byte_now_and_then_keeps_no_connection(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes_module, "CONNECTION_SECONDS", 0.2)
    port = free_port()
    async with probes(on(port), consumer, Telemetry()):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        closed = asyncio.create_task(end_of(reader))
        while not closed.done():
            writer.write(b"G")
            await asyncio.sleep(0.01)
        writer.close()


async def test_of_too_many_connections_the_oldest_is_closed(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes_module, "MOST_CONNECTIONS", 3)
    port = free_port()
    async with probes(on(port), consumer, Telemetry()):
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        assert await end_of(opened[0][0]) == b""
        for reader, writer in opened[1:]:
            writer.write(b"GET /livez HTTP/1.1\r\n\r\n")
            assert b" 200 OK" in await end_of(reader)
        for _, writer in opened:
            writer.close()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /livez?verbose=1 HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET /livez HTTP/1.1\r\nno header\r\n: \xff\r\n\r\n", b"200 OK"),
        (b"HEAD /livez HTTP/1.1\r\n\r\n", b"200 OK"),
        (b"POST /livez HTTP/1.1\r\nContent-Length: 9\r\n\r\n", b"404 Not Found"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"\r\n\r\n", b"404 Not Found"),
        (b"\x16\x03\x01 \xff\x00\r\n\r\n\r\n", b"404 Not Found"),
    ],
)
async def test_any_request_has_an_answer_and_none_is_logged(
    consumer: Consumer, caplog: pytest.LogCaptureFixture, request_bytes: bytes, status: bytes
) -> None:
    port = free_port()
    async with probes(on(port), consumer, Telemetry()):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes)
        head, _, body = (await end_of(reader)).partition(b"\r\n\r\n")
        writer.close()
    assert head.startswith(b"HTTP/1.1 " + status)
    assert (body == b"") == request_bytes.startswith(b"HEAD")
    assert not caplog.records


async def test_it_listens_on_one_address_only_where_one_is_set(consumer: Consumer) -> None:
    port = free_port()
    async with probes(on(port, "127.0.0.1"), consumer, Telemetry()):
        assert (await asyncio.to_thread(ask, port, "/livez"))[0] == 200
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.2", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "a..b"])
async def test_a_host_that_is_not_this_machine_is_one_sentence(
    consumer: Consumer, host: str
) -> None:
    with pytest.raises(SettingsError, match=rf"^CONSUMER_PROBE_HOST: cannot listen on '{host}': "):
        async with probes(on(free_port(), host), consumer, Telemetry()):
            pass


async def test_a_page_has_no_credentials(consumer: Consumer) -> None:
    consumer.errors.append(RuntimeError("connect amqp://app:PLANTED@host failed, password=PLANTED"))
    port = free_port()
    async with probes(on(port), consumer, Telemetry()):
        status, text = await asyncio.to_thread(ask, port, "/livez")
    assert status == 503
    assert text.startswith("failed: connect amqp://***@host failed, password=***\n")
    consumer.state = "consuming"
    consumer.source.connectivity.reason = "connect amqp://app:PLANTED@host failed"
    async with probes(on(port), consumer, Telemetry()):
        status, text = await asyncio.to_thread(ask, port, "/readyz")
    assert (status, text) == (503, "the broker cannot be reached: connect amqp://***@host failed\n")


async def test_a_port_in_use_is_one_sentence_that_names_the_variable(consumer: Consumer) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"^CONSUMER_PROBE_PORT: port {port} is in use$"):
            async with probes(on(port), consumer, Telemetry()):
                pass


# -- the real program


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """In a separate file, since some of these tests lock it or remove it."""
    with Scene(SqliteFile(tmp_path / "messages.db"), "probed", tmp_path, MISBEHAVING) as scene:
        yield scene


def database(scene: Scene) -> Path:
    assert isinstance(scene.broker, SqliteFile)
    return scene.broker.file


def answers(port: int, path: str) -> Callable[[], bool]:
    """Whether the answer is 200."""

    def answer() -> bool:
        try:
            return ask(port, path)[0] == 200
        except OSError:  # it is still starting, or has no free descriptor
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
    assert process.wait() == 1  # after the handler, as always
    assert len(scene.ledger.ended) == 1


@pytest.mark.slow
def test_a_port_in_use_is_exit_code_2_and_one_sentence(scene: Scene) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        process = scene.start(consuming=False, probe_port=port)
        assert process.wait() == 2
    assert process.stderr == f"service-of-the-tests: CONSUMER_PROBE_PORT: port {port} is in use\n"
    assert [event["exit_code"] for event in process.find("stopped")] == [2]


# -- neighbours of the port

IDLE_COUNT, SLOW_COUNT, ASKED_COUNT = 5_000, 500, 20
PROBE_SECONDS = 3
"""The ``timeoutSeconds`` of the manifest's probes; each answer takes a few milliseconds."""


def start_with_limits(scene: Scene, limits: str, **settings: object) -> ServiceProcess:
    """The service with limits of open files, as arguments of ``ulimit``."""
    # Without the debug mode of asyncio, which takes milliseconds for each connection.
    command = [
        word for word in service_command("run", service=MISBEHAVING) if word not in ("-X", "dev")
    ]
    environment = service_environment(scene.broker.url, scene.queue, scene.ledger, **settings)
    process = ServiceProcess(
        ["sh", "-c", f'ulimit {limits}; exec "$@"', "sh", *command], environment
    )
    scene.processes.append(process)
    process.wait_for("consuming")
    return process


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["redis"], indirect=True)
def test_thousands_of_idle_and_slow_connections_harm_neither_liveness_nor_the_broker(
    broker: Server, queue: str, tmp_path: Path
) -> None:
    port = free_port()
    with Scene(broker, queue, tmp_path, MISBEHAVING) as scene:
        process = start_with_limits(scene, "-Sn 1024", probe_port=port)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] == min(hard, 65_536)
        with flood(port):
            for _ in range(ASKED_COUNT):
                began_at = time.monotonic() - seconds_without_a_core(process.pid)
                assert ask(port, "/livez", seconds=20 * PROBE_SECONDS)[0] == 200
                answered_at = time.monotonic() - seconds_without_a_core(process.pid)
                assert answered_at - began_at < PROBE_SECONDS
            scene.publish(1)
            wait_until(lambda: scene.ledger.ended == ["task-0"])
            assert not process.find("reconnecting")
            assert process.stop()[0] == 0
        assert_quiet(process)
        assert not process.find("accept_failed")


def seconds_without_a_core(pid: int) -> float:
    """How long the main thread was ready and did not run: the machine's load is no harm by the flood."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


FLOOD = """
import asyncio, socket, sys

port, idle_count, slow_count = map(int, sys.argv[1:])

async def drip():
    while True:
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, "127.0.0.1", port)
        while not transport.is_closing():
            transport.write(b"G")
            await asyncio.sleep(0.2)

async def main():
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(idle_count)]
    slow = [asyncio.create_task(drip()) for _ in range(slow_count)]
    await asyncio.sleep(1)
    print("flooding", flush=True)
    await asyncio.gather(*slow)

asyncio.run(main())
"""
"""Refused connections come again at once."""


@contextmanager
def flood(port: int) -> Iterator[None]:
    command = [sys.executable, "-c", FLOOD, *map(str, [port, IDLE_COUNT, SLOW_COUNT])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"flooding\n"
            yield
        finally:
            process.kill()


@pytest.mark.slow
def test_without_a_free_descriptor_one_line_says_so_and_it_recovers(scene: Scene) -> None:
    """The loop tries to accept once a second, until the first connections are closed."""
    port = free_port()
    process = start_with_limits(scene, "-n 60", probe_port=port)
    with ExitStack() as clients:
        for _ in range(100):
            clients.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert "Too many open files" in process.wait_for("accept_failed")["error"]
        wait_until(answers(port, "/livez"))
        assert process.stop()[0] == 0
    assert len(process.find("accept_failed")) == 1
    assert len(process.events) < 20
    assert_quiet(process)
