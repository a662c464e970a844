"""The process of a service: signals, exit codes, and the effects of a handler or a lifespan.

The broker does not matter here, so it is the embedded one; test_shutdown.py of every service is about its broker.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.process import service_command, service_environment
from harness.scene import (
    AT_ONCE_SECONDS,
    Scene,
    assert_clean_shutdown,
    wait_until,
)
from runtime.errors import ExitCode
from steps import scene_needs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("broker", ["sqlite"], indirect=True, scope="session"),
]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_signal_that_shuts_down_is_named(scene: Scene, signum: signal.Signals) -> None:
    process = scene.start()
    assert_clean_shutdown(process, signum)
    assert process.find("stop_requested", reason=signum.name)


def test_a_sighup_that_nohup_has_ignored_shuts_nothing_down(scene: Scene) -> None:
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = scene.start()
    finally:
        signal.signal(signal.SIGHUP, earlier)
    process.send(signal.SIGHUP)
    assert_clean_shutdown(process)
    [requested] = process.find("stop_requested")
    assert requested["reason"] == "SIGTERM"


def test_five_sigterms_in_a_row_are_still_a_graceful_shutdown(scene: Scene) -> None:
    scene.publish(1, seconds=0.5)
    process = scene.start()
    process.wait_for("handling")
    for _ in range(4):
        process.send(signal.SIGTERM)
    assert_clean_shutdown(process)
    assert scene.ledger.ended == ["task-0"]


def test_a_supervisors_pair_of_sigint_and_sigterm_does_not_force(scene: Scene) -> None:
    scene.publish(1, seconds=0.5)
    process = scene.start()
    process.wait_for("handling")
    process.send(signal.SIGTERM)
    assert_clean_shutdown(process, signal.SIGINT)
    assert scene.ledger.ended == ["task-0"]
    assert not process.find("forced")


@pytest.mark.parametrize("kind", ["work", "thread"])
def test_a_handler_learns_of_the_shutdown_and_of_the_time_left(scene: Scene, kind: str) -> None:
    scene.publish(1, kind=kind, end="checkpoint")
    process = scene.start(HANDLERS=kind, drain_seconds=20)
    process.wait_for("handling")
    assert_clean_shutdown(process)
    [checkpoint] = process.find("checkpoint")
    assert 15 < checkpoint["seconds_left"] <= 20


def test_a_lifespan_that_cannot_close_is_exit_code_1_and_logged_once(scene: Scene) -> None:
    process = scene.start(LIFESPAN_FAILS="exit")
    exit_code, _ = process.stop()
    assert exit_code == 1
    assert [e["step"] for e in process.find("close_failed")] == ["lifespan"]
    assert scene.broker.consumers(scene.queue) in (0, -1)


def test_a_lifespan_that_cannot_open_is_exit_code_1(scene: Scene) -> None:
    process = scene.start(consuming=False, LIFESPAN_FAILS="enter")
    assert process.wait() == 1
    assert process.find("crashed", error="the database is down")


@pytest.mark.parametrize(
    ("url", "exit_code", "reason"),
    [
        ("redis://:PLANTED@127.0.0.1:1/0", 69, "redis://127.0.0.1:1: "),
        ("redis://:PLANTED@127.0.0.1:PLANTED/0", 2, "CONSUMER_BROKER_URL: not like redis://"),
        ("nonsense://:PLANTED@localhost", 2, "CONSUMER_BROKER_URL: unknown scheme"),
    ],
)
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_the_reason_of_a_failed_start_is_one_error_in_the_log_and_the_termination_message(
    scene: Scene, tmp_path: Path, url: str, exit_code: int, reason: str, log_format: str
) -> None:
    message = tmp_path / "termination-log"
    message.write_text("of an earlier end")
    process = scene.start(
        consuming=False, url=url, log_format=log_format, connect_seconds=0,
        TERMINATION_MESSAGE_PATH=message,
    )  # fmt: skip
    assert process.wait() == exit_code
    output = json.dumps(process.events) + process.stderr
    assert "PLANTED" not in output + message.read_text()
    assert message.read_text().startswith(reason)
    if log_format == "json":
        [failed], [stopped] = process.find("start_failed"), process.find("stopped")
        assert failed["reason"].startswith(reason)
        assert (failed["level"], stopped["level"]) == ("error", "error")
        assert process.stderr == f"service-of-the-tests: {failed['reason']}\n"
    else:
        assert output.count("start_failed") == 1
        assert process.stderr == ""


WRONG = [
    ({"CONSUMER_CONCURRENCY": "PLANTED"}, "CONSUMER_CONCURRENCY: Input should be a valid integer"),
    ({"CONSUMER_BROKER_URL": ""}, "CONSUMER_BROKER_URL: is not set"),
    ({"CONSUMER_BROKER_URL_FILE": "/no/such"}, "CONSUMER_BROKER_URL_FILE: CONSUMER_BROKER_URL"),
    (
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "TELEMETRY": "opentelemetry"},
        "OTEL_EXPORTER_OTLP_PROTOCOL",
    ),
    ({"HANDLERS": "wrong"}, "handler 'wrong': cannot use the signature"),
    ({"HANDLERS": "wrong_limit"}, "handler 'wrong_limit': Handles(concurrency): Input should be"),
]
"""Faults that are found before the settings of the log, or before a source exist."""


@pytest.mark.parametrize(("variables", "reason"), WRONG)
@pytest.mark.parametrize("format_in", ["default", "environment", ".env"])
def test_wrong_settings_and_handlers_are_one_error_too(
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    reason: str,
    format_in: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    message = tmp_path / "termination-log"
    message.touch()
    if format_in == ".env":
        Path(".env").write_text("CONSUMER_LOG_FORMAT=Console\n")
    elif format_in == "environment":
        variables = {**variables, "CONSUMER_LOG_FORMAT": "CONSOLE"}
    process = scene.start(
        consuming=False, TERMINATION_MESSAGE_PATH=message, connect_seconds=0,
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1/?token=PLANTED", **variables,
    )  # fmt: skip
    assert process.wait() == ExitCode.USAGE
    output = json.dumps(process.events) + process.stderr
    assert "PLANTED" not in output + message.read_text()
    assert message.read_text().startswith(reason)
    assert output.count("start_failed") == 1
    if format_in == "default":
        [failed] = process.find("start_failed")
        assert (failed["level"], failed["reason"]) == (
            "error",
            message.read_text().partition("\n")[0],
        )
        assert process.stderr == f"service-of-the-tests: {failed['reason']}\n"
    else:
        assert process.stderr == ""


def test_nothing_is_written_where_no_termination_message_is_asked_for(
    scene: Scene, tmp_path: Path
) -> None:
    path = tmp_path / "no-such-file"
    process = scene.start(consuming=False, LIFESPAN_FAILS="enter", TERMINATION_MESSAGE_PATH=path)
    assert process.wait() == 1
    assert not path.exists()
    path.touch()
    process = scene.start(consuming=False, LIFESPAN_FAILS="enter", TERMINATION_MESSAGE_PATH=path)
    assert process.wait() == 1
    assert path.read_text().startswith("RuntimeError: the database is down\n{")


def test_without_any_drain_time_an_idle_service_still_exits_0(scene: Scene) -> None:
    process = scene.start(drain_seconds=0)
    assert_clean_shutdown(process)
    assert not process.find("handlers_abandoned")


@pytest.mark.parametrize("kind", ["work", "thread"])
def test_a_handler_that_cannot_be_cancelled_is_named_and_abandoned(scene: Scene, kind: str) -> None:
    scene.publish(1, kind=kind, seconds=3600, end="swallow")
    process = scene.start(HANDLERS=kind, drain_seconds=0.5)
    process.wait_for("handling")
    exit_code, seconds = process.stop()
    assert exit_code == 75
    assert seconds < 0.5 + 2 + AT_ONCE_SECONDS
    assert process.find("message_abandoned")
    [stacks] = process.find("handlers_abandoned")
    assert "misbehaving.py" in json.dumps(stacks)
    scene.assert_left(ready=1)


blocked = pytest.mark.parametrize(
    ("end", "call"), [("block", "time.sleep"), ("block in C", "pbkdf2_hmac")], ids=["Python", "C"]
)


@blocked
def test_a_blocked_event_loop_can_be_forced(scene: Scene, end: str, call: str) -> None:
    scene.publish(1, seconds=3600, end=end)
    process = scene.start(FORCED_SECONDS=0.5)
    process.wait_for("handling")
    sent_at = process.send(signal.SIGTERM)
    wait_until(lambda: time.monotonic() > sent_at + 0.4)
    exit_code, seconds = process.stop(signal.SIGINT)
    assert exit_code == 128 + signal.SIGINT
    assert seconds < 0.5 + AT_ONCE_SECONDS
    assert call in process.find("event_loop_blocked")[0]["stack"]


@pytest.mark.skipif(sys.platform == "win32", reason="there asyncio itself listens")
def test_the_watchdog_works_beside_a_signal_handler_of_the_lifespan(scene: Scene) -> None:
    """asyncio's handlers replace the descriptor that wakes the watchdog; both are woken."""
    scene.publish(1, seconds=3600, end="block in C")
    process = scene.start(drain_seconds=0.5, CLOSE_SECONDS=0.5, LIFESPAN_LISTENS=1)
    process.wait_for("handling")
    exit_code, seconds = process.stop()
    assert exit_code == ExitCode.DEADLINE
    assert seconds < 1 + AT_ONCE_SECONDS
    assert "pbkdf2_hmac" in process.find("event_loop_blocked")[0]["stack"]


def test_a_signal_handler_of_the_lifespan_still_runs(scene: Scene) -> None:
    process = scene.start(LIFESPAN_LISTENS=1)
    process.wait_for("consuming")
    process.send(signal.SIGUSR1)
    process.wait_for("reloading")
    assert process.stop()[0] == ExitCode.DRAINED


@blocked
def test_a_blocked_event_loop_ends_by_itself_after_the_deadline(
    scene: Scene, end: str, call: str
) -> None:
    scene.publish(1, seconds=3600, end=end)
    url = scene.broker.impatient_url
    process = scene.start(url=url, drain_seconds=0.5, CLOSE_SECONDS=0.5)
    process.wait_for("handling")
    exit_code, seconds = process.stop()
    assert exit_code == 75
    assert seconds < 1 + AT_ONCE_SECONDS
    assert process.find("message_abandoned")
    assert call in process.find("event_loop_blocked")[0]["stack"]
    again = scene.start(url=url, drain_seconds=0, CLOSE_SECONDS=0)
    assert again.wait_for("handling")["attempt"] == 1
    again.stop()


def test_a_blocked_event_loop_that_recovers_in_time_settles_its_message(scene: Scene) -> None:
    scene.publish(1, seconds=1, end="block")
    process = scene.start()
    process.wait_for("handling")
    assert_clean_shutdown(process)
    assert scene.ledger.ended == ["task-0"]
    scene.assert_left()


def test_a_closed_standard_output_does_not_disturb_the_shutdown(scene: Scene) -> None:
    scene.publish(1, seconds=0.5)
    environment = service_environment(scene.broker.url, scene.queue, scene.ledger)
    reader, writer = os.pipe()
    with subprocess.Popen(
        service_command("run"), env=environment, stdout=writer, stderr=subprocess.PIPE
    ) as process:
        os.close(writer)
        wait_until(lambda: scene.ledger.started == ["task-0"])
        os.close(reader)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        stderr = process.stderr.read()
        assert process.wait(30) == 0
    assert stderr == b""
    assert scene.ledger.ended == ["task-0"]


def test_a_partial_batch_is_handled_at_once_on_sigterm(scene: Scene) -> None:
    scene.publish(3, kind="batch")
    process = scene.start(HANDLERS="batch", batch_size=10, batch_seconds=60)
    wait_until(lambda: len(set(scene.ledger.ids("take"))) == 3)
    assert assert_clean_shutdown(process) < AT_ONCE_SECONDS
    assert len(process.find("handling")) == 1
    scene.assert_left(ready=3 - len(scene.ledger.ended))


def test_a_long_handler_saves_its_place_on_sigterm_and_resumes_there(scene: Scene) -> None:
    scene.publish(1, kind="long", steps=40, seconds=0.02)
    first = scene.start(HANDLERS="long", drain_seconds=20, max_attempts=1)
    first.wait_for("step", count=3)
    assert assert_clean_shutdown(first) < AT_ONCE_SECONDS
    [drained] = first.find("drained")
    assert (drained["handled"], drained["requeued"], drained["abandoned"]) == (0, 1, 0)
    done = len(scene.ledger.ids("step"))
    assert 3 <= done < 40
    second = scene.start(HANDLERS="long", max_attempts=1)
    resumed = second.wait_for("handling")
    assert (resumed["place"], resumed["attempt"]) == (done, 1)
    wait_until(lambda: scene.ledger.ended == ["task-0"])
    assert_clean_shutdown(second)
    assert len(scene.ledger.ids("step")) == 40
    scene.assert_left()


def test_a_poison_message_becomes_a_dead_letter_and_not_a_crash(scene: Scene) -> None:
    scene.publish_bodies([b"\xff\x00 not JSON", b'{"id": 1}'], kind="work")
    scene.publish(1, seconds=0.2)
    process = scene.start()
    process.wait_for("message_rejected", count=2)
    assert_clean_shutdown(process)
    scene.assert_left(dead=2)


# -- on each broker


def test_a_failure_during_the_drain_is_retried_later_and_others_finish(scene: Scene) -> None:
    scene_needs(scene, "delayed_retry")
    scene.publish(1, seconds=0.3, end="retry", retry_after_seconds=200)
    scene.publish(1, seconds=0.6)
    process = scene.start()
    process.wait_for("handling", count=2)
    exit_code, _ = process.stop()
    assert exit_code == 0
    assert process.find("message_retried", attempt=1)
    scene.assert_left(delayed=1)


def test_a_second_sigint_forces(scene: Scene) -> None:
    scene.publish(1, seconds=60)
    process = scene.start()
    process.wait_for("handling")
    sent_at = process.send(signal.SIGTERM)
    process.wait_for("draining")
    wait_until(lambda: time.monotonic() > sent_at + 0.35)
    exit_code, seconds = process.stop(signal.SIGINT)
    assert exit_code == 128 + signal.SIGINT
    assert seconds < AT_ONCE_SECONDS
    scene.assert_left(ready=1)
