"""This service's own settings, in addition to the runtime's: yours to edit.

They are read from environment variables with the prefix ORDER_EVENTS_, and from ``.env`` in
the working directory. An invalid value ends the service before it consumes a message.
"""

from functools import cache

from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="ORDER_EVENTS_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
    )

    # Each field is a variable: `database_url: SecretStr` is read from ..._DATABASE_URL.


@cache
def get_settings() -> Settings:
    """The settings, for handlers and `lifespan`; read once."""
    return Settings()
