"""Whether the consumers beside the service run with the defaults of their libraries, as installed here.

An argument of a call to a library must be required, or equal its default, or stand below with the reason.
Every benchmark begins with `check`.
"""

import ast
import inspect
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

from aio_pika.abc import (
    AbstractChannel,
    AbstractConnection,
    AbstractIncomingMessage,
    AbstractQueue,
)

from tools.benchmarks.contest import COMMANDS

HERE = Path(__file__).parent
FILES = (HERE / "frameworks.py", *sorted((HERE / "clients").glob("[a-z]*.py")))
LIBRARIES = (
    *("aio_pika", "aiobotocore", "aiokafka", "aiomqtt", "asyncpg"),
    *("faststream", "nats", "paho", "redis", "taskiq", "taskiq_aio_pika"),
)
METHODS: dict[str, Callable[..., Any]] = {
    "connection.channel": AbstractConnection.channel,
    "channel.set_qos": AbstractChannel.set_qos,
    "channel.declare_queue": AbstractChannel.declare_queue,
    "queue.consume": AbstractQueue.consume,
    "message.process": AbstractIncomingMessage.process,
}
"""Methods of variables; in addition, `broker` is always FastStream's."""
ENVIRONMENT = {
    "CONSUMER_BROKER_URL": "scheme://127.0.0.1/?client_id=name",
    "BENCH_MESSAGES": "1",
    **dict.fromkeys(("CONSUMER_SOURCE", "CONSUMER_GROUP"), "queue"),
    **dict.fromkeys(("CONSUMER_CONCURRENCY", "CONSUMER_PREFETCH"), "10"),
}
"""Variables with which the files can be imported."""

SAME = {
    "server": (
        *("aio_pika.connect(url)", "aio_pika.connect_robust(url)", "AioPikaBroker(url)"),
        *("AIOKafkaConsumer(bootstrap_servers)", "KafkaBroker(bootstrap_servers)"),
        *("MQTTBroker(url)", "NatsBroker(servers)", "RabbitBroker(url)", "RedisBroker(url)"),
        *("asyncpg.connect(dsn)", "nats.connect(servers)"),
    ),
    "queue, group and session": (
        *("RabbitQueue(declare)", "channel.declare_queue(name)", "JStream(declare)"),
        *("AIOKafkaConsumer(group_id)", "StreamSub(consumer)", "StreamSub(group)"),
        *(f"broker.subscriber({name})" for name in ("durable", "group_id", "qos", "shared")),
        *(f"broker.subscriber({name})" for name in ("stream", "subject")),
        *(f"MQTTBroker({name})" for name in ("clean_session", "client_id")),
        *("MQTTBroker(session_expiry_interval)", "asyncpg.connect(server_settings)"),
        *(f"Client({name})" for name in ("callback_api_version", "client_id", "protocol")),
        *(f"aiomqtt.Client({name})" for name in ("clean_start", "identifier", "properties")),
        "aiomqtt.Client(protocol)",
    ),
    "prefetch": (
        *("Channel(prefetch_count)", "RabbitBroker(default_channel)", "PullSub(batch_size)"),
        *(
            "StreamSub(max_records)",
            "broker.subscriber(pull_sub)",
            "channel.set_qos(prefetch_count)",
        ),
    ),
    "messages, published before it starts": (
        *("AIOKafkaConsumer(auto_offset_reset)", "broker.subscriber(auto_offset_reset)"),
        "aio_pika.Message(delivery_mode)",
    ),
    "delivery, at least once: a bare client acknowledges after its handler": (
        *("AIOKafkaConsumer(enable_auto_commit)", "Client(manual_ack)"),
    ),
    "number of processes, one": ("--workers",),
}
"""Arguments that all contenders must share."""
OTHERS = {
    "--factory": "as FastStream documents it for an app that a function makes",
    "_work: channel.declare_queue(durable)": "as aio-pika's tutorial has it",
    "_work: channel.declare_queue(arguments)": "empty, but for aio_pika_quorum",
}
OWN_ROWS = {
    "faststream_none: RabbitBroker(graceful_timeout)": "graceful_timeout=None",
    "faststream_one: RabbitBroker(graceful_timeout)": "graceful_timeout=1",
    "taskiq_one: --wait-tasks-timeout": "--wait-tasks-timeout 1",
    "faststream_ack: KafkaBroker(ack_policy)": "ack_policy=ACK",
    **{
        f"faststream_quiet: {broker}Broker(logger)": "logger=None"
        for broker in ("MQTT", "Nats", "Rabbit", "Redis")
    },
}
"""Arguments whose row has these words in its title."""
ALLOWED = {*chain.from_iterable(SAME.values()), *OTHERS, *OWN_ROWS}
"""The function stands before a colon if no other function may have the argument."""


class Departure(Exception):
    """An argument of a consumer is neither its library's default nor has a reason."""


def check() -> None:
    """Raises Departure for the first such argument."""
    found = [
        f"{name}: {word}"
        for name, words in COMMANDS.items()
        for word in words
        if word.startswith("--")
    ]
    for file in FILES:
        found += departures(file.read_text(encoding="utf-8"), file)
    unexplained = [name for name in found if ALLOWED.isdisjoint({name, name.partition(": ")[2]})]
    if unexplained:
        msg = f"not a default, and without a reason in {__name__}: {', '.join(unexplained)}"
        raise Departure(msg)


def departures(text: str, file: Path) -> Iterator[str]:
    """The arguments of a file's calls that are not defaults: ``FUNCTION: RabbitBroker(graceful_timeout)``."""
    name = ".".join(file.relative_to(HERE.parent.parent).with_suffix("").parts)
    with patch.dict(os.environ, ENVIRONMENT):
        module = vars(import_module(name))
    for part in ast.parse(text).body:
        for call in ast.walk(part):
            if isinstance(call, ast.Call) and (callee := _callee(call.func, module)):
                for argument in _departures(call, inspect.signature(callee), module):
                    function = getattr(part, "name", "")
                    yield f"{function}: {ast.unparse(call.func)}({argument})"


def _callee(name: ast.expr, module: dict[str, Any]) -> Callable[..., Any] | None:
    """The function of a library that has this name in the module, or is a known method of a variable."""
    if not all(isinstance(part, ast.Name | ast.Attribute | ast.Load) for part in ast.walk(name)):
        return None
    text = ast.unparse(name)
    if text == "broker.subscriber":
        brokers = (value for value in module.values() if _library(value) == "faststream")
        [text] = [
            broker.__name__ + ".subscriber" for broker in brokers if hasattr(broker, "subscriber")
        ]
    if method := METHODS.get(text):
        return partial(method, None)
    try:
        callee = eval(text, module)
    except (NameError, AttributeError):
        return None  # a variable's method
    if _library(callee) not in LIBRARIES:
        return None
    return partial(callee, None) if text.endswith(".subscriber") else callee


def _library(value: object) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _departures(
    call: ast.Call, signature: inspect.Signature, module: dict[str, Any]
) -> Iterator[str]:
    positional = [p for p in signature.parameters.values() if p.kind < p.KEYWORD_ONLY]
    given = [(p.name, value) for p, value in zip(positional, call.args, strict=False)]
    for name, value in [*given, *((word.arg or "**", word.value) for word in call.keywords)]:
        parameter = signature.parameters.get(name)
        if parameter and parameter.default is parameter.empty:
            continue
        try:
            default = eval(ast.unparse(value), module) == parameter.default if parameter else False
        except NameError:
            default = False  # a variable's argument
        if not default:
            yield name
