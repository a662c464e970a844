"""Existing destinations on real servers that refuse every message: they are full, or the right is missing."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from nats.aio.client import Client
from nats.js.api import DiscardPolicy

from denying import user_with
from harness.servers import Server
from harness.servers.kafka import KafkaServer
from harness.servers.mqtt import PrivateMosquitto
from harness.servers.nats import NatsServer
from harness.servers.postgres import PostgresServer
from harness.servers.redis import RedisServer
from harness.servers.sqs import SqsServer
from secured import with_user


class Refusing(NamedTuple):
    to: str
    reason: str
    """In the broker's own words."""
    body: bytes = b"x"
    settings: Mapping[str, Any] = MappingProxyType({})
    """Settings of a service whose user is refused, if other users are not."""


@contextmanager
def of_rabbitmq(server: Server, name: str) -> Iterator[Refusing]:
    """Only other exchanges may publish to an internal exchange: the refusal is that of a missing right."""
    pika = pytest.importorskip("pika")
    with pika.BlockingConnection(pika.URLParameters(server.url)) as connection:
        channel = connection.channel()
        channel.exchange_declare(name, "fanout", internal=True)
        yield Refusing(
            f"exchange:{name}/key", f"ACCESS_REFUSED - cannot publish to internal exchange '{name}'"
        )
        channel.exchange_delete(name)


@contextmanager
def of_nats(server: Server, name: str) -> Iterator[Refusing]:
    """A stream that is full, and keeps its messages."""
    assert isinstance(server, NatsServer)

    async def fill(client: Client) -> None:
        manager = client.jetstream()
        await manager.add_stream(name=name, subjects=[name], max_msgs=1, discard=DiscardPolicy.NEW)
        await manager.publish(name, b"x")

    server.ask(fill)
    yield Refusing(f"subject:{name}", f"'{name}': maximum messages exceeded")
    server.delete(name)


@contextmanager
def of_redis(server: Server, name: str) -> Iterator[Refusing]:
    """A key that is no stream."""
    assert isinstance(server, RedisServer)
    with server.client() as client:
        client.set(name, "x")
        yield Refusing(f"stream:{name}", f"the stream '{name}'")
        client.delete(name)


@contextmanager
def of_kafka(server: Server, name: str) -> Iterator[Refusing]:
    """A topic with small records only, even when they are compressed."""
    assert isinstance(server, KafkaServer)

    async def create(admin: AIOKafkaAdminClient) -> None:
        configs = {"max.message.bytes": "500"}
        await admin.create_topics([NewTopic(name, 1, 1, topic_configs=configs)])

    server._ask(create)
    yield Refusing(f"topic:{name}", f"(to the topic '{name}')", random.randbytes(1_000))
    server.delete(name)


@contextmanager
def of_sqs(server: Server, name: str) -> Iterator[Refusing]:
    """A queue with small messages only."""
    assert isinstance(server, SqsServer)
    server.client.create_queue(QueueName=name, Attributes={"MaximumMessageSize": "1024"})
    yield Refusing(f"queue:{name}", "shorter than 1024 bytes", b"x" * 2_000)
    server.delete(name)


@contextmanager
def of_postgres(server: Server, name: str) -> Iterator[Refusing]:
    """A trigger of the database's owner, in the service's own transaction."""
    assert isinstance(server, PostgresServer)
    refuse = '"refuse ' + name + '"'
    server.query(
        f"CREATE FUNCTION {refuse}() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN RAISE ''it is full''; END'"
    )
    server.query(
        f"CREATE TRIGGER {refuse} BEFORE INSERT ON consumer.messages FOR EACH ROW"
        f" WHEN (NEW.source = '{name}') EXECUTE FUNCTION {refuse}()"
    )
    yield Refusing(f"source:{name}", "it is full")
    server.query(f"DROP FUNCTION {refuse} CASCADE")


@contextmanager
def of_sqlite(server: Server, name: str) -> Iterator[Refusing]:
    """A file refuses no destination, except a name that is no text. A full file is an outage."""
    yield Refusing(f"source:{name}\ud800", "this message cannot be sent")


@contextmanager
def of_mqtt(server: Server, name: str) -> Iterator[Refusing]:
    """A topic to which the service's user may not publish."""
    assert isinstance(server, PrivateMosquitto)
    user = user_with(server, ["readwrite #", f"deny {name}"])
    settings = {"broker_url": with_user(server.url, *user)}
    yield Refusing(f"topic:{name}", f"{name}: Not authorized", settings=settings)


REFUSING: dict[str, Callable[[Server, str], Any]] = {
    "rabbitmq": of_rabbitmq,
    "nats": of_nats,
    "redis": of_redis,
    "kafka": of_kafka,
    "sqs": of_sqs,
    "postgres": of_postgres,
    "sqlite": of_sqlite,
    "mqtt": of_mqtt,
}
