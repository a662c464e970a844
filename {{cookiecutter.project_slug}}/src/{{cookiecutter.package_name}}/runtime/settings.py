# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The runtime's settings: the same environment variables in every service, ``CONSUMER_...``."""

import os
import re
import sys
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Self, TypeVar

import pydantic_settings
from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from .errors import SettingsError

S = TypeVar("S", bound=BaseSettings)

ORDER_BY = re.compile(r"(header|body):.+")


class ConsumerSettings(BaseSettings):
    """Read from the environment, and from ``.env`` in the working directory (for development)."""

    model_config = SettingsConfigDict(
        env_prefix="CONSUMER_", env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    broker_url: SecretStr
    """The broker: ``amqp://user:password@host:5672/vhost``, ``sqlite:///file.db``."""
    source: str = Field(default="", max_length=200)
    """The queue (stream, topic) to consume. By default the service's name."""
    group: str = Field(default="", max_length=200)
    """The consumer group, where the broker has groups. By default the service's name."""
    concurrency: int = Field(default=10, ge=1, le=10_000)
    """How many handlers run concurrently."""
    prefetch: int | None = Field(default=None, ge=1, le=65_535)
    """Maximum unacked messages in this process. By default as many as can be in flight; with CONSUMER_ORDER_BY ten times that."""
    order_by: str = Field(default="", max_length=200)
    """Messages with equal keys are handled one after the other: ``header:customer-id``, ``body:customer.id``."""
    drain_seconds: float = Field(default=25, ge=0, le=86_400)
    """How long in-flight messages may take to finish after SIGTERM."""
    connect_seconds: float = Field(default=180, ge=0, le=86_400)
    """How long to keep trying to reach the broker at start."""
    max_attempts: int = Field(default=5, ge=1, le=1_000_000)
    """After this many failures a message becomes a dead letter."""
    retry_seconds: float = Field(default=1, gt=0, le=86_400)
    """The delay after the first failure; it doubles with each further one."""
    retry_max_seconds: float = Field(default=300, gt=0, le=86_400)
    """The longest delay between two attempts."""
    batch_size: int = Field(default=100, ge=1, le=65_535)
    """A batch handler gets at most this many messages at once."""
    batch_seconds: float = Field(default=1, gt=0, le=3_600)
    """A batch that is not full is handled this long after its first message."""
    probe_port: int = Field(default=0, ge=0, le=65_535)
    """Port of /livez, /readyz and, with Prometheus, /metrics; 0 disables it."""
    log_format: Literal["json", "console"] = "json"
    """JSON, or human-readable text."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum level to log."""

    @property
    def broker_scheme(self) -> str:
        scheme, separator, _ = self.broker_url.get_secret_value().partition("://")
        return scheme.lower() if separator else ""

    @field_validator("log_format", "log_level", mode="before")
    @classmethod
    def _in_any_case(cls, value: object) -> object:
        """Accept upper case, such as INFO."""
        return value.lower() if isinstance(value, str) else value

    @field_validator("order_by")
    @classmethod
    def _check_order_by(cls, value: str) -> str:
        if value and ORDER_BY.fullmatch(value) is None:
            msg = "must be header:NAME or body:FIELD, as in header:customer-id or body:customer.id"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.retry_max_seconds < self.retry_seconds:
            msg = "CONSUMER_RETRY_MAX_SECONDS must not be less than CONSUMER_RETRY_SECONDS"
            raise ValueError(msg)
        return self


def load_settings(settings_class: type[S], **overrides: Any) -> S:
    """Read settings; raises SettingsError with one line that names the variable, never its value."""
    try:
        _warn_of_unknown(frozenset((*os.environ, *dotenv_values(".env"))))
        return settings_class(**overrides)
    except (OSError, UnicodeError) as error:
        msg = f".env cannot be read: {error}"
        raise SettingsError(msg) from None
    except pydantic_settings.SettingsError as error:  # a list or a model that is not JSON
        raise SettingsError(str(error)) from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        reason = (
            "is not set"
            if first["type"] == "missing"
            else first["msg"].removeprefix("Value error, ")
        )
        if not first["loc"]:
            raise SettingsError(reason) from None
        # A name that is no field is an alias: the variable's full name.
        is_field = first["loc"][0] in settings_class.model_fields
        prefix = settings_class.model_config.get("env_prefix", "") if is_field else ""
        variable = f"{prefix}{'_'.join(map(str, first['loc']))}".upper()
        msg = f"{variable}: {reason}"
        raise SettingsError(msg) from None


@cache  # once: commands load the settings more than once
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
