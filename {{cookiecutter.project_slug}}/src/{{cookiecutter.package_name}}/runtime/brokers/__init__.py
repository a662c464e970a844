# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The brokers that this service can use, by the scheme of ``CONSUMER_BROKER_URL``."""

import re
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import BrokerRefused

if TYPE_CHECKING:
    from ..settings import ConsumerSettings
    from .source import Broker

MODULE_OF_SCHEME = {
    "sqlite": "sqlite",
    **dict.fromkeys(("amqp", "amqps"), "rabbitmq"),
    **dict.fromkeys(("nats", "tls"), "nats"),
    **dict.fromkeys(("redis", "rediss", "unix"), "redis"),
    **dict.fromkeys(("redis+sentinel", "rediss+sentinel"), "redis"),
    **dict.fromkeys(("redis+cluster", "rediss+cluster"), "redis"),
    **dict.fromkeys(("kafka", "kafkas"), "kafka"),
    "sqs": "sqs",
    **dict.fromkeys(("postgres", "postgresql"), "postgres"),
    **dict.fromkeys(("mqtt", "mqtts"), "mqtt"),
}


def known_schemes() -> list[str]:
    """The URL schemes whose broker module is in this service: the embedded one and the chosen one."""
    return [
        scheme for scheme, module in MODULE_OF_SCHEME.items() if find_spec(f".{module}", __name__)
    ]


def make_source(settings: "ConsumerSettings", prefetch: int = 1) -> "Broker":
    """The broker that ``settings.broker_url`` names. Raises BrokerRefused for a scheme that this service lacks."""
    scheme = settings.broker_scheme
    if scheme not in known_schemes():
        msg = f"CONSUMER_BROKER_URL: unknown scheme {scheme!r}; known schemes: {', '.join(known_schemes())}"
        raise BrokerRefused(msg)
    if re.search(r"[,\s][\w+]+://", settings.broker_url.get_secret_value()):
        raise BrokerRefused("CONSUMER_BROKER_URL names one broker: for two kinds, run two services")
    # Imported only when it is used: the demo, on sqlite, needs no broker's client library.
    module = import_module(f".{MODULE_OF_SCHEME[scheme]}", __name__)
    source: Broker
    if len(settings.sources) > 1 and not hasattr(module, "TAKES_SEVERAL"):
        source = import_module(".several", __name__).Several(settings, module.make_source, prefetch)
    else:
        source = module.make_source(settings, prefetch)
    return source
