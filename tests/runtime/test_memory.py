"""Memory: the kernel keeps the documented worst case within the limit of the manifest."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from harness.process import ServiceProcess, service_command, service_environment
from harness.scene import Scene, assert_clean_shutdown, wait_until
from harness.servers import Server
from harness.servers.sqlite import SqliteFile
from processes import MISBEHAVING
from runtime.settings import ConsumerSettings

MANIFEST = (
    Path(__file__)
    .parents[2]
    .joinpath("{{cookiecutter.project_slug}}", "deploy", "kubernetes", "base", "consumer.yaml")
)
CGROUPS = {
    "memory.limit_in_bytes": Path("/sys/fs/cgroup/memory"),
    "memory.max": Path("/sys/fs/cgroup"),
}
"""The folders of version 1 and 2, by the file with the limit."""
MOST_BODY_BYTES: int = ConsumerSettings.model_fields["max_body_bytes"].default
LARGEST = {"kafka": 900_000, "nats": 900_000, "sqs": 700_000}
"""Bodies for brokers whose own limit is lower, by default."""


@contextmanager
def limited_memory(limit_bytes: int) -> Iterator[Path]:
    """A cgroup with this limit: yields the file for the id of a process."""
    for name, parent in CGROUPS.items():
        group = parent / f"ccc-test-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            try:
                (group / name).write_text(str(limit_bytes))
                yield group / "cgroup.procs"
                return
            finally:
                group.rmdir()
    pytest.skip("no cgroup can be made here, as on a machine without root")


@pytest.fixture
def memory() -> Iterator[Path]:
    [mebibytes] = re.findall(r"limits: {memory: (\d+)Mi", MANIFEST.read_text(encoding="utf-8"))
    with limited_memory(int(mebibytes) * 2**20) as processes:
        yield processes


@pytest.fixture
def scene(broker: Server, queue: str, tmp_path: Path) -> Iterator[Scene]:
    """The file of the embedded broker is on a disk: in memory it would count as the process's memory."""
    with TemporaryDirectory(prefix="memory-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        if isinstance(broker, SqliteFile):
            broker = SqliteFile(Path(folder, "queues.db"))
        with Scene(broker, queue, tmp_path) as scene:
            yield scene


def start(scene: Scene, memory: Path, **variables: object) -> ServiceProcess:
    command = service_command("run", service=MISBEHAVING)
    process = ServiceProcess(
        ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(memory), *command],
        service_environment(scene.broker.url, scene.queue, scene.ledger, **variables),
    )
    scene.processes.append(process)
    return process


def most_memory(memory: Path) -> int:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        with suppress(OSError):
            return int(memory.with_name(name).read_text())
    return 0


def publish(scene: Scene, count: int, size: int) -> None:
    bodies = []
    for number in range(count):
        task = {"id": f"task-{number}", "padding": ""}
        task["padding"] = "x" * (size - len(json.dumps(task)))
        bodies.append(json.dumps(task).encode())
    scene.publish_bodies(bodies, kind="large")


@pytest.mark.slow
def test_as_many_of_the_largest_messages_as_it_can_hold_fit_into_the_memory_of_the_manifest(
    memory: Path, scene: Scene, broker_name: str
) -> None:
    publish(scene, 24, LARGEST.get(broker_name, MOST_BODY_BYTES))
    process = start(scene, memory, HANDLERS="large", HOLD=10)  # the concurrency
    wait_until(lambda: len(set(scene.ledger.ended)) == 24 or process.child.poll() is not None)
    assert process.child.poll() is None, "it was killed"
    assert_clean_shutdown(process)
    assert len(scene.ledger.ended) == 24


@pytest.mark.slow
def test_batches_of_the_largest_messages_fit_into_that_memory(
    memory: Path, scene: Scene, broker_name: str
) -> None:
    """With the default prefetch of batches, 1000 messages; on MQTT with the prefetch of the documented sum.

    Mosquitto before 2.0.13 exceeds this prefetch after the first ack, so there it gets only that many messages.
    """
    count, prefetch = (10, {"prefetch": 10}) if broker_name == "mqtt" else (40, {})
    publish(scene, count, LARGEST.get(broker_name, MOST_BODY_BYTES))
    process = start(scene, memory, HANDLERS="large_batch", **prefetch)
    wait_until(
        lambda: len(set(scene.ledger.ended)) == count or process.child.poll() is not None, 60
    )
    assert process.child.poll() is None, "it was killed"
    print(f"at most {most_memory(memory)} bytes")
    assert_clean_shutdown(process)


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True, scope="session")
def test_messages_that_are_too_large_are_dead_letters_within_that_memory(
    memory: Path, scene: Scene
) -> None:
    publish(scene, 12, 12_000_000)
    process = start(scene, memory, HANDLERS="large", HOLD=10)
    wait_until(
        lambda: len(process.find("message_rejected")) == 12 or process.child.poll() is not None
    )
    assert process.child.poll() is None, "it was killed"
    assert_clean_shutdown(process)
    scene.assert_left(dead=12)
    [reason] = {event["reason"] for event in process.find("message_rejected")}
    assert reason == "its body has 12000000 bytes, above CONSUMER_MAX_BODY_BYTES"
    assert scene.ledger.started == []
