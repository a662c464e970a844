# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""One log line for each event: JSON, or human-readable text. Secrets are masked in both."""

import logging
import re
import sys
import traceback
from io import TextIOWrapper
from typing import Any, Literal, TextIO
from urllib.parse import unquote

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY_SECRETS = re.compile(r"([?&]\w*(?:password|secret|token)=)([^&#\s]*)", re.I)
_INPUT = re.compile(r"input_value=.*, input_type=")
_LONGEST = 10_000
_SHORTEST_SECRET = 4


def configure_logs(
    log_format: Literal["json", "console"], log_level: str, secrets: tuple[str, ...] = ()
) -> None:
    """Send all logs, the libraries' too, to standard output. ``secrets`` are masked wherever they appear."""
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
    renderers: list[Processor]
    if log_format == "json":
        renderers = [
            structlog.processors.format_exc_info,
            lambda _logger, _method, event: _masked(_in_reading_order(event), secrets),
            structlog.processors.JSONRenderer(default=lambda value: _masked(repr(value), secrets)),
        ]
    else:
        renderers = [
            lambda _logger, _method, event: _without_control_characters(event),
            # Plain tracebacks: the pretty ones show the values of local variables.
            structlog.dev.ConsoleRenderer(
                colors=sys.stdout.isatty(), exception_formatter=_write_traceback
            ),
            lambda _logger, _method, line: without_input(without_credentials(str(line), secrets)),
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
    """The passwords and tokens of a URL, percent-encoded and decoded."""
    scheme, _, rest = url.partition("://")
    written = {secret for _, secret in _QUERY_SECRETS.findall(rest)}
    # Not by urlsplit, which does not recognize a password with an unescaped / or #: it must be masked too.
    for part in (re.split("[/?#]", rest)[0], rest):
        user, colon, password = part.rpartition("@")[0].partition(":")
        is_token = not colon and scheme.lower() in ("nats", "tls")
        written.add(user if is_token else password)
    return tuple(p for p in written | set(map(unquote, written)) if len(p) >= _SHORTEST_SECRET)


def without_credentials(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text with the credentials of URLs and the given secrets masked."""
    for secret in secrets:  # before the pattern, which would leave half of p@ss
        text = text.replace(secret, "***")
    return _QUERY_SECRETS.sub(r"\1***", _CREDENTIALS.sub("***@", text))


def without_input(text: str) -> str:
    """The text without the values that pydantic's errors quote, which come from messages."""
    return _INPUT.sub("input_value=***, input_type=", text)


def _in_reading_order(event: EventDict) -> EventDict:
    return {**{key: event[key] for key in ("timestamp", "level", "event") if key in event}, **event}


def _without_control_characters(event: EventDict) -> EventDict:
    """Escaped, so that no id or type of a message can move a terminal's cursor; JSON escapes them anyway."""
    return {
        key: _printable(_shortened(value)) if isinstance(value, str) else value
        for key, value in event.items()
    }


def _write_traceback(stream: TextIO, exc_info: ExcInfo) -> None:
    """Indented, so that no text of an exception looks like a line of the log."""
    for line in _shortened("".join(traceback.format_exception(*exc_info))).rstrip().split("\n"):
        stream.write(f"\n    {_printable(line)}")


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


def _shortened(text: str) -> str:
    """The two ends of a long text: brokers allow ids of a megabyte."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} [{len(text)} characters] {text[-_LONGEST // 2 :]}"


def _masked(value: Any, secrets: tuple[str, ...]) -> Any:
    match value:
        case str():
            return _shortened(without_input(without_credentials(value, secrets)))
        case dict():
            return {key: _masked(item, secrets) for key, item in value.items()}
        case list() | tuple():
            return [_masked(item, secrets) for item in value]
    return value
