# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Options of a broker's URL that are true or false."""

from ..errors import BrokerRefused
from .url import BrokerUrl


def flag(url: BrokerUrl, option: str, default: bool = False) -> bool:
    """The option as true or false. Raises BrokerRefused."""
    text = url.options.get(option, str(default).lower())
    if text not in ("true", "false"):
        raise BrokerRefused(f"CONSUMER_BROKER_URL: {option} must be true or false")
    return text == "true"
