# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""One log line for each event: JSON for machines, or aligned text for people."""

import logging
import re
import sys
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
_SHORTEST_SECRET = 4


def configure_logs(
    log_format: Literal["json", "console"], log_level: str, secrets: tuple[str, ...] = ()
) -> None:
    """Send all logs, the libraries' too, to standard output. ``secrets`` are masked wherever they appear."""
    # Through the standard library's handler: a closed or full standard output must not raise in a worker.
    logging.raiseExceptions = False
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[Processor]
    if log_format == "json":
        renderers = [
            structlog.processors.format_exc_info,
            _mask(secrets),
            structlog.processors.JSONRenderer(default=repr),
        ]
    else:
        renderers = [_mask(secrets), structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())]
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
    password = urlsplit(url).password or ""
    return tuple(p for p in {password, unquote(password)} if len(p) >= _SHORTEST_SECRET)


def without_credentials(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text with ``user:password@`` of URLs, and the given secrets, masked."""
    text = _CREDENTIALS.sub("***@", text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _mask(secrets: tuple[str, ...]) -> Callable[[WrappedLogger, str, EventDict], EventDict]:
    def masked(value: Any) -> Any:
        if isinstance(value, str):
            return without_credentials(value, secrets)
        if isinstance(value, list | tuple):
            return [masked(item) for item in value]
        return value

    def mask(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
        return {key: masked(value) for key, value in event_dict.items()}

    return mask
