"""The lines of the log that a supervisor reads."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import logs
from runtime.logs import Tracebacks, leave_message

LINES = """
import logging
import structlog
from runtime.logs import configure_logs

configure_logs({log_format!r}, "debug")
log = structlog.get_logger()
log.debug("one")
log.info("two")
log.warning("three")
try:
    raise OSError("down")
except OSError:
    log.exception("four")
logging.getLogger("a library").error("five")
logging.getLogger("a library").critical("six")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no journal there")
@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("of", ["the journal", "another process", "none"])
def test_a_line_has_its_priority_where_the_journal_reads_it_and_nowhere_else(
    log_format: str, of: str
) -> None:
    read, write = os.pipe()
    about = os.fstat(write)
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    if of != "none":  # a process inherits the variable even if its output goes elsewhere
        inode = about.st_ino + (of == "another process")
        environment["JOURNAL_STREAM"] = f"{about.st_dev}:{inode}"
    program = LINES.format(log_format=log_format)
    with os.fdopen(read, encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=write, env=environment)
        os.close(write)
        lines = output.read().splitlines()
    assert process.wait() == 0
    found = [line[:3] for line in lines if not line.startswith(" ")]
    if of == "the journal":
        assert found == ["<7>", "<6>", "<4>", "<3>", "<3>", "<2>"]
    else:
        assert not [line for line in lines if line.startswith("<")]
        assert len(found) == 6


def failure(
    kind: type[Exception], text: str, depth: int = 0, cause: Exception | None = None
) -> Any:
    """A failure that was raised, after this many calls."""

    def sink(left: int) -> None:
        if left:
            sink(left - 1)
        else:
            raise kind(text) from cause

    try:
        sink(depth)
    except Exception as error:
        return error


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_a_traceback_is_shown_once_and_then_counted_and_shown_again_after_a_minute(
    clock: SimpleNamespace,
) -> None:
    tracebacks = Tracebacks()
    first = failure(OSError, "of one message")
    assert tracebacks.of(first) == {"exc_info": first}
    for count in range(1, 100):
        again = failure(OSError, f"of message {count}")
        assert tracebacks.of(again) == {"same_as_before": count}
    clock.now += logs.SELDOM_SECONDS
    last = failure(OSError, "a minute later")
    assert tracebacks.of(last) == {"exc_info": last, "left_out": 99}
    assert tracebacks.of(failure(OSError, "")) == {"same_as_before": 1}


@pytest.mark.parametrize(
    "other",
    [
        lambda: failure(ValueError, "another type"),
        lambda: failure(OSError, "another cause", cause=failure(KeyError, "")),
        lambda: failure(OSError, "another place of its cause", cause=elsewhere()),
        lambda: ExceptionGroup("several", [failure(OSError, "")]),
    ],
)
def test_a_new_failure_is_never_hidden(other: Callable[[], Exception]) -> None:
    tracebacks = Tracebacks()
    tracebacks.of(failure(OSError, ""))
    new = other()
    assert tracebacks.of(new) == {"exc_info": new}


def elsewhere() -> Exception:
    try:
        raise OSError
    except OSError as error:
        return error


def test_a_recursion_of_another_depth_is_the_same_failure() -> None:
    tracebacks = Tracebacks()
    tracebacks.of(failure(OSError, "", depth=10))
    assert tracebacks.of(failure(OSError, "", depth=11)) == {"same_as_before": 1}


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_FAILURES", 2)
    tracebacks = Tracebacks()
    kinds = [type(f"Kind{number}", (Exception,), {}) for number in range(10)]
    for kind in kinds:
        assert "exc_info" in tracebacks.of(failure(kind, ""))
    assert "exc_info" in tracebacks.of(failure(kinds[0], "forgotten"))
    assert tracebacks.of(failure(kinds[9], "")) == {"same_as_before": 1}


class Odd(Exception):
    exceptions = None

    def __eq__(self, other: object) -> bool:
        raise NotImplementedError

    __hash__ = Exception.__hash__


def test_what_an_exception_defines_for_itself_is_not_relied_on() -> None:
    odd = failure(Odd, "", cause=failure(Odd, ""))
    assert Tracebacks().of(odd) == {"exc_info": odd}


def test_a_cycle_of_causes_ends() -> None:
    error, other = failure(OSError, ""), failure(KeyError, "")
    error.__context__, other.__context__ = other, error
    assert "exc_info" in Tracebacks().of(error)


def test_a_termination_message_is_no_longer_than_kubernetes_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = tmp_path / "termination-log"
    message.write_text("of an earlier container")
    monkeypatch.setenv("TERMINATION_MESSAGE_PATH", str(message))
    leave_message("why\n" + "é" * 5_000)
    assert len(message.read_bytes()) == 4096
    assert message.read_bytes().startswith(b"why\n")
