# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""One log line for each event: JSON for machines, or aligned text for people."""

import logging
import re
import sys
from io import TextIOWrapper
from typing import Any, Literal
from urllib.parse import unquote

import structlog
from structlog.typing import EventDict, Processor

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
_SHORTEST_SECRET = 4


def configure_logs(
    log_format: Literal["json", "console"], log_level: str, secrets: tuple[str, ...] = ()
) -> None:
    """Send all logs, the libraries' too, to standard output. ``secrets`` are masked wherever they appear."""
    # Through the standard library's handler: a closed or full standard output must not raise in a worker.
    logging.raiseExceptions = False
    if isinstance(sys.stdout, TextIOWrapper):
        # A line must not be lost for one character.
        sys.stdout.reconfigure(errors="backslashreplace")
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[Processor]
    if log_format == "json":
        renderers = [
            structlog.processors.format_exc_info,
            lambda _logger, _method, event: _masked(_in_reading_order(event), secrets),
            structlog.processors.JSONRenderer(
                default=lambda value: without_credentials(repr(value), secrets)
            ),
        ]
    else:
        renderers = [
            lambda _logger, _method, event: _without_control_characters(event),
            # Plain tracebacks: the pretty ones show the values of local variables.
            structlog.dev.ConsoleRenderer(
                colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
            lambda _logger, _method, line: _masked(line, secrets),
        ]
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


def secrets_of(url: str) -> tuple[str, ...]:
    """The password of a URL, as it is written there and as it is meant."""
    rest = url.partition("://")[2]
    # By hand: a password with an unescaped / or # is none to urlsplit, and still must not be shown.
    written = {
        part.rpartition("@")[0].partition(":")[2] for part in (re.split("[/?#]", rest)[0], rest)
    }
    return tuple(p for p in written | set(map(unquote, written)) if len(p) >= _SHORTEST_SECRET)


def without_credentials(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text with ``user:password@`` of URLs, and the given secrets, masked."""
    for secret in secrets:  # before the pattern, which would leave the half of p@ss
        text = text.replace(secret, "***")
    return _CREDENTIALS.sub("***@", text)


def _in_reading_order(event: EventDict) -> EventDict:
    return {**{key: event[key] for key in ("timestamp", "level", "event") if key in event}, **event}


def _without_control_characters(event: EventDict) -> EventDict:
    """So that no message's id or type moves a terminal's cursor; JSON escapes them anyway."""
    return {
        key: repr(value)[1:-1]
        if key != "event" and isinstance(value, str) and not value.isprintable()
        else value
        for key, value in event.items()
    }


def _masked(value: Any, secrets: tuple[str, ...]) -> Any:
    match value:
        case str():
            return without_credentials(value, secrets)
        case dict():
            return {key: _masked(item, secrets) for key, item in value.items()}
        case list() | tuple():
            return [_masked(item, secrets) for item in value]
    return value
