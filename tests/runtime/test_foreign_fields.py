"""The origin of each field of a message: the table of docs/brokers.md, with the brokers' plain clients.

Each producer writes one message with all fields that the table names first, and one with only a body. CloudEvents,
and the places in CONSUMER_TYPE_FROM, are in the other files of foreign messages.
"""

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from typing import Any

import pytest

from harness.contract import eventually, opened, take
from harness.servers import Server
from harness.servers.nats import NatsServer
from harness.servers.postgres import PostgresServer
from harness.servers.redis import RedisServer
from harness.servers.sqlite import SqliteFile
from harness.servers.sqs import SqsServer
from runtime.brokers import make_source
from runtime.message import Message
from runtime.settings import ConsumerSettings
from steps import start_once

SENT_AT = 1_700_000_000
"""The time that a producer sets, in Unix seconds."""
KEY = {"message-key": "k-1"}
PROPERTIES = {
    "content-type": "application/json",
    "correlation-id": "c-1",
    "reply-to": "answers",
}
OURS = {"x-consumer-type": "order.created", "x-consumer-id": "m-1"}
BODY = b'{"number": 7}'


def by_pika(server: Server, queue: str) -> None:
    pika = pytest.importorskip("pika")
    with pika.BlockingConnection(pika.URLParameters(server.url)) as connection:
        properties = pika.BasicProperties(
            type="order.created",
            message_id="m-1",
            headers=KEY,
            content_type="application/json",
            correlation_id="c-1",
            reply_to="answers",
            timestamp=SENT_AT,
        )
        for one in (properties, None):
            connection.channel().basic_publish("", queue, BODY, one)


def by_nats_py(server: Server, queue: str) -> None:
    assert isinstance(server, NatsServer)

    async def publish(client: Any) -> None:
        headers = {"Nats-Msg-Id": "another", **OURS, **KEY, **PROPERTIES}
        await client.jetstream().publish(queue, BODY, headers=headers)
        await client.publish(queue, BODY)

    server.ask(publish)


def by_redis_py(server: Server, queue: str) -> None:
    assert isinstance(server, RedisServer)
    with server.client() as client:
        fields = {"type": "order.created", "id": "m-1", "body": BODY, **KEY, **PROPERTIES}
        client.xadd(queue, fields, f"{SENT_AT}000-1")
        client.xadd(queue, {"body": BODY})


def by_librdkafka(server: Server, queue: str) -> None:
    confluent_kafka = pytest.importorskip("confluent_kafka")
    address = server.url.partition("://")[2].partition("?")[0]
    producer = confluent_kafka.Producer({"bootstrap.servers": address, "log_level": 0})
    headers = [(name, value.encode()) for name, value in {**OURS, **PROPERTIES}.items()]
    about = {"partition": 2, "timestamp": SENT_AT * 1000}
    producer.produce(queue, BODY, b"k-1", headers=headers, **about)
    assert producer.flush(10) == 0
    producer.produce(queue, BODY, partition=2)
    assert producer.flush(10) == 0


def by_boto3(server: Server, queue: str) -> None:
    assert isinstance(server, SqsServer)
    arguments = import_module("runtime.brokers.sqs").parse_url(server.url).client_arguments
    with closing(pytest.importorskip("boto3").client("sqs", **arguments)) as client:
        attributes = {"type": "order.created", "x-consumer": '{"id": "m-1"}', **KEY, **PROPERTIES}
        named = {
            name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()
        }
        url = client.get_queue_url(QueueName=queue)["QueueUrl"]
        client.send_message(QueueUrl=url, MessageBody=BODY.decode(), MessageAttributes=named)
        client.send_message(QueueUrl=url, MessageBody=BODY.decode())


COLUMNS = "INSERT INTO {}messages (source, id, type, headers, body, published_at) VALUES "


def by_asyncpg(server: Server, queue: str) -> None:
    assert isinstance(server, PostgresServer)
    values = "($1, 'm-1', 'order.created', $2, $3, to_timestamp($4))"
    statement = COLUMNS.format("consumer.") + values
    server.query(statement, queue, json.dumps({**KEY, **PROPERTIES}), BODY, SENT_AT)
    server.query("INSERT INTO consumer.messages (source, body) VALUES ($1, $2)", queue, BODY)


def by_sqlite3(server: Server, queue: str) -> None:
    assert isinstance(server, SqliteFile)
    headers = json.dumps({**KEY, **PROPERTIES})
    with closing(sqlite3.connect(server.file)) as connection, connection:
        connection.execute(
            f"{COLUMNS.format('')} (?, 'm-1', 'order.created', ?, ?, ?)",
            (queue, headers, BODY, SENT_AT),
        )
        connection.execute("INSERT INTO messages (source, body) VALUES (?, ?)", (queue, BODY))


def by_paho(server: Server, queue: str) -> None:
    mqtt = pytest.importorskip("paho.mqtt.client")
    properties = import_module("paho.mqtt.properties").Properties(3)  # 3 is PUBLISH
    ours = {**OURS, "x-consumer-published-at": str(SENT_AT), **KEY}
    properties.UserProperty = [*ours.items()]
    properties.ContentType = "application/json"
    properties.CorrelationData, properties.ResponseTopic = b"c-1", "answers"
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.connect("127.0.0.1", int(server.url.rpartition(":")[2]))
    client.loop_start()
    for one in (properties, None):
        client.publish(queue, BODY, 1, properties=one).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


PRODUCERS: dict[str, Callable[[Server, str], None]] = {
    "rabbitmq": by_pika,
    "nats": by_nats_py,
    "redis": by_redis_py,
    "kafka": by_librdkafka,
    "sqs": by_boto3,
    "postgres": by_asyncpg,
    "sqlite": by_sqlite3,
    "mqtt": by_paho,
}
BY_THE_SERVER = {"nats", "sqs"}
"""Brokers that set the time of a message themselves."""
WITHOUT_TIME = {"rabbitmq", "mqtt"}
"""Brokers that have no time unless the producer sets it."""
ORIGINS: dict[str, dict[str, Any]] = {
    "rabbitmq": {"exchange": "", "routing_key": "NAME"},
    "nats": {"subject": "NAME"},
    "redis": {"stream": "NAME"},
    "kafka": {"topic": "NAME", "partition": 2, "offset": 0},
    "sqs": {"queue": "NAME"},
    "postgres": {},
    "sqlite": {},
    "mqtt": {"topic": "NAME"},
}
IDS = {
    "rabbitmq": "[0-9a-f]{32}",
    "nats": r"2-\d{19}",
    "redis": r"\d{13}-\d+",
    "kafka": r"NAME-2-1-\d{13}",
    "sqs": "[0-9a-f-]{36}",
    "postgres": "[0-9a-f-]{32,36}",
    "sqlite": "[0-9a-f]{32}",
    "mqtt": "[0-9a-f]{32}",
}
"""The ids of messages without one: random, or the broker's own."""


@pytest.fixture
async def messages(
    broker: Server,
    broker_name: str,
    queue: str,
    settings_for: Callable[..., ConsumerSettings],
) -> list[Message]:
    """The message with all fields, and the message with none."""
    await start_once(settings := settings_for())
    async with opened(make_source(settings)):
        await asyncio.to_thread(PRODUCERS[broker_name], broker, queue)
    async with opened(make_source(settings, 2)) as source:
        await source.start()
        taken = await take(source, 2)
        for message in taken:
            await source.ack(message)
    return sorted(taken, key=lambda message: not message.type)


async def test_each_part_of_a_message_comes_from_where_the_table_says(
    messages: list[Message], broker_name: str, queue: str
) -> None:
    said = messages[0]
    assert (said.type, said.id, said.key, said.body) == ("order.created", "m-1", "k-1", BODY)
    assert (said.content_type, said.correlation_id, said.reply_to) == (*PROPERTIES.values(),)
    sent_at = time.time() if broker_name in BY_THE_SERVER else SENT_AT
    assert said.published_at_seconds == pytest.approx(sent_at, abs=60)
    named = ORIGINS[broker_name].items()
    origin = {name: queue if value == "NAME" else value for name, value in named}
    assert said.origin == {**origin, "source": queue}


async def test_a_message_that_says_nothing_has_an_id_and_empty_fields(
    messages: list[Message], broker_name: str, queue: str
) -> None:
    bare = messages[1]
    assert (bare.type, bare.key, bare.body) == ("", "", BODY)
    assert (bare.content_type, bare.correlation_id, bare.reply_to) == ("", "", "")
    assert re.fullmatch(IDS[broker_name].replace("NAME", queue), bare.id)
    known = 0 if broker_name in WITHOUT_TIME else time.time()
    assert bare.published_at_seconds == pytest.approx(known, abs=60)


@pytest.mark.parametrize("broker", ["sqs"], indirect=True, scope="session")
async def test_the_message_group_is_the_key_of_a_message_without_one(
    broker: Server, queue: str, settings_for: Callable[..., ConsumerSettings]
) -> None:
    """A fair queue, with a tenant as the group; also after a replay, which is a copy."""
    assert isinstance(broker, SqsServer)
    keyed = {"message-key": {"DataType": "String", "StringValue": "k-1"}}
    async with opened(make_source(settings_for(), 2)) as source:
        about = {"QueueUrl": broker.queue_url(queue), "MessageGroupId": "g-1"}
        for body, attributes in (("1", {}), ("2", keyed)):
            broker.client.send_message(MessageBody=body, MessageAttributes=attributes, **about)
        await source.start()
        for _ in range(2):
            taken = {message.body: message for message in await take(source, 2)}
            assert (taken[b"1"].key, taken[b"2"].key) == ("g-1", "k-1")
            for message in taken.values():
                await source.reject(message, "bad")
            await eventually(2, source.count_dead_letters)
            assert [moved async for moved in source.replay_dead_letters()] == [2]
        await source.stop()
