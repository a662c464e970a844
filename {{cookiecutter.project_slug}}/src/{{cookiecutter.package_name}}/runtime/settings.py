# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The runtime's settings: the same environment variables in every service, ``CONSUMER_...``."""

import os
import re
import sys
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic_settings
from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .errors import SettingsError
from .redaction import keep_secret, redacted

S = TypeVar("S", bound=BaseSettings)

TEMPLATE_VERSION = "0.1.0"
MILLISECONDS = (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000)
BUCKETS_SECONDS = (*(one / 1000 for one in MILLISECONDS), 300.0, 600.0)
Seconds = Annotated[float, Field(gt=0, le=86_400)]
PLACE = re.compile(r"(header|body):.+")
ORIGINS = ("routing-key", "subject", "topic")


class ConsumerSettings(BaseSettings):
    """Read from the environment, and from ``.env`` in the working directory (for development)."""

    model_config = SettingsConfigDict(
        env_prefix="CONSUMER_", env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    broker_url: SecretStr
    """The broker: ``amqp://user:password@host:5672/vhost``, ``sqlite:///file.db``."""
    broker_url_file: str = ""
    """A file with the broker's URL, such as a mounted secret, in place of CONSUMER_BROKER_URL. Read at each connection attempt."""
    source: str = Field(default="", max_length=5_000)
    """The queue (stream, topic) to consume, or several: ``orders,payments``. Default: the service's name."""
    group: str = Field(default="", max_length=200)
    """The consumer group, if the broker has groups. Default: the service's name."""
    concurrency: int = Field(default=10, ge=1, le=10_000)
    """How many handlers run concurrently."""
    prefetch: int | None = Field(default=None, ge=1, le=65_535)
    """Maximum of unacked messages in this process. Default: as many per source as can be in flight; with CONSUMER_ORDER_BY, or a handler with its own concurrency, ten times that."""
    declare: bool = True
    """Whether to create missing queues (streams, topics) at start; with no, they must exist: see the command `declare`."""
    bindings: str = Field(default="", max_length=5_000)
    """RabbitMQ: the bindings of the queue, ``exchange/routing.key,...``."""
    type_from: str = Field(default="", max_length=200)
    """The type of a message without a type property and without a CloudEvent's type: ``routing-key``, ``subject`` or ``topic``, if the broker has it; ``header:NAME``, ``body:FIELD``."""
    order_by: str = Field(default="", max_length=200)
    """The key for order by key: messages with equal keys are handled one at a time. ``key``, ``header:customer-id``, ``body:customer.id``."""
    drain_seconds: float = Field(default=25, ge=0, le=86_400)
    """Graceful shutdown: the time for in-flight messages to finish after SIGTERM."""
    handler_seconds: float = Field(default=300, ge=0, le=86_400)
    """The time limit of a handler: it is cancelled, and its message retried; a thread is only logged. 0 disables it."""
    connect_seconds: float = Field(default=180, ge=0, le=86_400)
    """The time to retry the connection to the broker at start."""
    max_attempts: int = Field(default=12, ge=1, le=1_000_000)
    """After this many failed attempts, a message becomes a dead letter."""
    max_deliveries: int = Field(default=20, ge=0, le=500)
    """After this many deliveries that ended with neither a settlement nor a shutdown, a message becomes a dead letter; 0 disables it."""
    max_body_bytes: int = Field(default=5_000_000, ge=0)
    """A message with a larger body becomes a dead letter, without decoding; 0 disables it."""
    retry_seconds: float = Field(default=1, gt=0, le=86_400)
    """The delay after the first failure; each further failure makes it four times as long (backoff)."""
    retry_max_seconds: float = Field(default=600, gt=0, le=86_400)
    """The longest delay between two attempts."""
    breaker_failures: int = Field(default=10, ge=0, le=1_000_000)
    """After this many failures in a row, but at least twice CONSUMER_CONCURRENCY, the service pauses until a message succeeds; 0 disables it."""
    batch_size: int = Field(default=100, ge=1, le=65_535)
    """A batch handler gets at most this many messages at once."""
    batch_seconds: float = Field(default=1, gt=0, le=3_600)
    """A batch that is not full is handled at the latest this long after its first message."""
    duration_buckets: Annotated[tuple[Seconds, ...], NoDecode] = BUCKETS_SECONDS
    """The bucket bounds of the duration histograms, in seconds: ``0.01,0.1,1``."""
    probe_host: str = Field(default="", max_length=255)
    """The address of the probe port, such as 127.0.0.1. Default: all addresses of the machine."""
    probe_port: int = Field(default=0, ge=0, le=65_535)
    """The port of /livez, /readyz and, with Prometheus, /metrics; 0 disables it."""
    log_format: Literal["json", "console"] = "json"
    """JSON, or human-readable text."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The minimum level of log events."""

    @property
    def broker_scheme(self) -> str:
        scheme, separator, _ = self.broker_url.get_secret_value().partition("://")
        return scheme.lower() if separator else ""

    @model_validator(mode="before")
    @classmethod
    def _read_broker_url(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read the URL from its file, if one is named, without surrounding whitespace."""
        if not (file := values.get("broker_url_file")):
            return values
        url, fault = "", "CONSUMER_BROKER_URL is set too: set one of the two"
        if not values.get("broker_url"):
            try:
                url, fault = Path(file).read_text("utf-8").strip(), f"{file} is empty"
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8"
                fault = f"{file} cannot be read: {reason}"
        if not url:
            raise ValueError(f"CONSUMER_BROKER_URL_FILE: {fault}")
        return {**values, "broker_url": url}

    @field_validator("duration_buckets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("log_format", "log_level", mode="before")
    @classmethod
    def _in_any_case(cls, value: object) -> object:
        """Accept upper case, such as INFO."""
        return value.lower() if isinstance(value, str) else value

    @property
    def sources(self) -> list[str]:
        return self.source.split(",")

    @field_validator("source")
    @classmethod
    def _check_source(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        faults = {
            "has an empty name: write orders,payments": value and "" in names,
            "is a URL: name queues of the broker of CONSUMER_BROKER_URL": "://" in value,
            "has a duplicate name": len(names) > len({*names}),
            "a name has at most 200 characters": max(map(len, names)) > 200,
        }
        for msg in filter(faults.get, faults):
            raise ValueError(msg)
        return ",".join(names)

    @field_validator("order_by", "type_from")
    @classmethod
    def _check_place(cls, value: str, info: ValidationInfo) -> str:
        others = ORIGINS if info.field_name == "type_from" else ("key",)
        if value and value not in others and PLACE.fullmatch(value) is None:
            known = ", ".join((*others, "header:NAME or body:FIELD"))
            raise ValueError(f"must be {known}, as in header:customer-id or body:customer.id")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.retry_max_seconds < self.retry_seconds:
            raise ValueError("CONSUMER_RETRY_MAX_SECONDS must be at least CONSUMER_RETRY_SECONDS")
        if self.bindings and "," in self.source:
            raise ValueError("CONSUMER_BINDINGS: CONSUMER_SOURCE must name the one queue to bind")
        return self


def load_settings(settings_class: type[S], **overrides: Any) -> S:
    """Read settings, and mask their secrets from now on. Raises SettingsError: one line that names the variable."""
    try:
        _warn_of_unknown(frozenset((*os.environ, *dotenv_values(".env"))))
        settings = settings_class(**overrides)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f".env cannot be read: {error}") from None
    except pydantic_settings.SettingsError as error:  # a list or a model that is not JSON
        raise SettingsError(str(error)) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if settings_class is not ConsumerSettings:  # a validator of the service may quote the value
            keep_secret({"secret": first["input"]})
        is_missing = first["type"] == "missing"
        reason = "is not set" if is_missing else first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise SettingsError(redacted(reason)) from None
        # A name that is no field is an alias, which is the variable's full name.
        is_field = first["loc"][0] in settings_class.model_fields
        prefix = settings_class.model_config.get("env_prefix", "") if is_field else ""
        variable = f"{prefix}{'_'.join(map(str, first['loc']))}".upper()
        raise SettingsError(f"{variable}: {redacted(reason)}") from None
    keep_secret(settings)
    return settings


def wanted_log_format() -> Literal["json", "console"]:
    """The log format, even if another setting is wrong; JSON if the format is wrong."""
    with suppress(OSError, UnicodeError):
        for name, value in (*os.environ.items(), *dotenv_values(".env").items()):
            if name.upper() == "CONSUMER_LOG_FORMAT" and value:
                return "console" if value.lower() == "console" else "json"
    return "json"


@cache  # warns once: commands load the settings more than once
def _warn_of_unknown(names: frozenset[str]) -> None:
    """One line on standard error for each CONSUMER_ variable that is no setting, without its value."""
    known = set[str]()
    for one in BaseSettings.__subclasses__():  # a service may use the same prefix
        known |= {
            f"{one.model_config.get('env_prefix')}{field}".upper() for field in one.model_fields
        }
    for name in sorted({name.upper() for name in names} - known):
        if name.startswith("CONSUMER_") and not name.startswith("CONSUMER_TEST_"):
            meant = "".join(f"; {close} is" for close in get_close_matches(name, known, 1, 0.85))
            print(f"warning: {name} is not a setting{meant}", file=sys.stderr)
