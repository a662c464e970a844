"""The receipt of each shutdown: in the log event `stopped`, and in Kubernetes' termination message."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from harness.process import ServiceProcess
from harness.scene import Scene, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("broker", ["sqlite"], indirect=True, scope="session"),
]


def receipt_of(process: ServiceProcess, message: Path) -> dict[str, Any]:
    """The receipt in the log; the termination message has the same."""
    [stopped] = process.find("stopped")
    left = json.loads(message.read_text().splitlines()[-1])
    assert {name: stopped[name] for name in left} == left
    return left  # type: ignore[no-any-return]


@pytest.fixture
def message(tmp_path: Path) -> Path:
    file = tmp_path / "termination-log"
    file.touch()
    return file


def test_a_graceful_shutdown_says_what_finished_and_what_was_requeued(
    scene: Scene, message: Path
) -> None:
    scene.publish(10, seconds=1)
    process = scene.start(concurrency=2, prefetch=6, TERMINATION_MESSAGE_PATH=message)
    process.wait_for("handling", count=2)
    process.stop()
    receipt = receipt_of(process, message)
    assert 0 < receipt.pop("seconds") < 5
    assert receipt.pop("version")
    assert receipt == {
        **{"service": "service-of-the-tests", "signal": "SIGTERM", "exit_code": 0},
        **{"in_flight": 2, "finished": 2, "requeued": 4, "abandoned": [], "abandoned_count": 0},
    }


def test_at_the_deadline_the_abandoned_messages_are_named_with_their_handlers(
    scene: Scene, message: Path
) -> None:
    scene.publish(2, seconds=60)
    process = scene.start(
        concurrency=2, prefetch=2, drain_seconds=0.3, TERMINATION_MESSAGE_PATH=message
    )
    process.wait_for("handling", count=2)
    process.stop()
    receipt = receipt_of(process, message)
    named = [
        {"id": one["message_id"], "handler": "work"} for one in process.find("message_abandoned")
    ]
    assert receipt["abandoned"] == named != []
    assert (receipt["in_flight"], receipt["finished"], receipt["requeued"]) == (2, 0, 2)
    assert (receipt["exit_code"], receipt["abandoned_count"]) == (75, 2)


def test_a_forced_shutdown_has_a_receipt(scene: Scene, message: Path) -> None:
    scene.publish(1, seconds=60)
    process = scene.start(TERMINATION_MESSAGE_PATH=message)
    process.wait_for("handling")
    sent_at = process.send(signal.SIGTERM)
    process.wait_for("draining")
    wait_until(lambda: time.monotonic() > sent_at + 0.35)
    assert process.stop(signal.SIGINT)[0] == 130
    receipt = receipt_of(process, message)
    assert (receipt["signal"], receipt["exit_code"]) == ("SIGTERM", 130)
    assert receipt["abandoned_count"] == 1


@pytest.mark.parametrize("end", ["block", "block in C"])
def test_a_shutdown_that_the_watchdog_ends_has_a_receipt(
    scene: Scene, message: Path, end: str
) -> None:
    scene.publish(1, seconds=60, end=end)
    process = scene.start(drain_seconds=0.2, CLOSE_SECONDS=0.3, TERMINATION_MESSAGE_PATH=message)
    process.wait_for("handling")
    process.stop()
    receipt = receipt_of(process, message)
    assert (receipt["signal"], receipt["exit_code"]) == ("SIGTERM", 75)
    assert [one["handler"] for one in receipt["abandoned"]] == ["work"]
    assert (receipt["in_flight"], receipt["finished"]) == (1, 0)
    assert receipt["seconds"] >= 0.5


def test_a_crash_says_why_before_its_receipt(scene: Scene, message: Path) -> None:
    process = scene.start(consuming=False, LIFESPAN_FAILS="enter", TERMINATION_MESSAGE_PATH=message)
    assert process.wait() == 1
    receipt = receipt_of(process, message)
    assert message.read_text().startswith("RuntimeError: the database is down\n")
    assert (receipt["signal"], receipt["in_flight"], receipt["exit_code"]) == (None, 0, 1)
