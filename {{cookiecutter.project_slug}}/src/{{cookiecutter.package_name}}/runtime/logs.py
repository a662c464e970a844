# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""One log line for each event: JSON, or human-readable text, redacted. Also Kubernetes' termination message."""

import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor

from .redaction import redacted, redacted_value

SELDOM_SECONDS = 60.0
"""A continuing failure is logged once in this time."""
MOST_FAILURES, MOST_CAUSES = 500, 20
"""How many failures are remembered, and how many causes of one are compared."""
PRIORITIES = {"debug": 7, "warning": 4, "error": 3, "exception": 3, "critical": 2}
"""Priorities of syslog; information has 6."""


def configure_logs(log_format: Literal["json", "console"], log_level: str) -> None:
    """Send all logs, the libraries' too, to standard output."""
    # Through the standard library's handler: a closed or full standard output must not raise in a worker.
    logging.raiseExceptions = False
    if isinstance(sys.stdout, TextIOWrapper):
        # A character that the encoding lacks must not lose the line.
        sys.stdout.reconfigure(errors="backslashreplace")
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[Processor] = [
        structlog.processors.format_exc_info,  # the pretty tracebacks show the values of variables
        lambda _logger, _method, event: _redacted(event),
    ]
    if log_format == "json":
        renderers.append(structlog.processors.JSONRenderer())
    else:
        plain = structlog.dev.plain_traceback
        renderers += [
            lambda _logger, _method, event: _without_control_characters(event),
            structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), exception_formatter=plain),
        ]
    with suppress(OSError):  # standard output is closed
        output = os.fstat(1)
        if os.environ.get("JOURNAL_STREAM") == f"{output.st_dev}:{output.st_ino}":
            # The journal takes the priority from the start of a line: see sd-daemon(3).
            renderers.append(lambda _logger, level, line: f"<{PRIORITIES.get(level, 6)}>{line}")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=processors,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    logging.basicConfig(handlers=[handler], level=log_level.upper(), force=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *processors,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


class Seldom:
    """A failure that goes on: whether it is due to be logged, at first and then once in `SELDOM_SECONDS`."""

    def __init__(self) -> None:
        self._began_at, self._due_at = time.monotonic(), 0.0
        self.left_out = 0  # since the last log line, if the user counts

    @property
    def seconds(self) -> int:
        """How long the failure has lasted."""
        return round(time.monotonic() - self._began_at)

    def is_due(self) -> bool:
        now = time.monotonic()
        if due := now >= self._due_at:
            self._due_at = now + SELDOM_SECONDS
        return due


class Tracebacks:
    """The traceback of a failure at first, and then once in `SELDOM_SECONDS`, with how often it was left out since.

    Failures are the same if their types and lines of code are, with those of their causes; texts and depths may differ.
    """

    def __init__(self) -> None:
        self._known: dict[frozenset[Any], Seldom] = {}

    def of(self, failure: BaseException | None) -> dict[str, Any]:
        """The fields of a log event about the failure."""
        if failure is None:
            return {"exc_info": None}
        key = _places(failure)
        if key not in self._known and len(self._known) >= MOST_FAILURES:
            del self._known[next(iter(self._known))]
        known = self._known.setdefault(key, Seldom())
        if known.is_due():
            count, known.left_out = known.left_out, 0
            return {"exc_info": failure, **({"left_out": count} if count else {})}
        known.left_out += 1
        return {"same_as_before": known.left_out}


def _places(failure: BaseException) -> frozenset[Any]:
    """Each type and line of code that its traceback shows."""
    places, seen = set[Any](), set[int]()
    pending: list[BaseException | None] = [failure]
    while pending and len(seen) < MOST_CAUSES:
        error = pending.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        frames = traceback.walk_tb(error.__traceback__)
        places |= {type(error), *((frame.f_code.co_filename, line) for frame, line in frames)}
        context = None if error.__suppress_context__ else error.__context__
        pending.append(error.__cause__ or context)
        if isinstance(error, BaseExceptionGroup):
            pending += error.exceptions
    return frozenset(places)


def leave_message(text: str) -> None:
    """Write why the container ends, redacted, into Kubernetes' termination message, if there is such a file."""
    path = os.environ.get("TERMINATION_MESSAGE_PATH", "/dev/termination-log")
    with suppress(OSError):
        file = os.open(path, os.O_WRONLY | os.O_TRUNC)  # not created: without it, nothing reads it
        with os.fdopen(file, "wb") as message:
            message.write(redacted(text).encode(errors="replace")[:4096])


def _redacted(event: EventDict) -> EventDict:
    """The redacted event, in reading order."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return {key: redacted_value(item, key) for key, item in {**first, **event}.items()}


def _without_control_characters(event: EventDict) -> EventDict:
    """Escaped, so that no id or type of a message can move a terminal's cursor; JSON escapes them anyway.

    A traceback is indented, so that no text of an exception looks like a line of the log.
    """
    lines = str(event.pop("exception", "")).split("\n")
    shown = {key: _printable(one) if isinstance(one, str) else one for key, one in event.items()}
    indented = "\n".join(f"    {_printable(line)}" for line in lines)
    return {**shown, **({"exception": indented} if indented.strip() else {})}


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]
