"""What other programs see of a published message, with clients that the runtime does not use, or below it."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from harness.servers import Server
from harness.servers.postgres import PostgresServer
from harness.servers.redis import RedisServer
from harness.servers.sqs import SqsServer


class Seen(NamedTuple):
    """In the fields, columns and attributes that the broker's page documents."""

    body: bytes
    type: str
    id: str
    headers: dict[str, Any]


def by_librdkafka(server: Server, topic: str) -> Seen:
    confluent_kafka = pytest.importorskip("confluent_kafka")
    config = {"bootstrap.servers": urlsplit(server.url).netloc, "group.id": "another"}
    consumer = confluent_kafka.Consumer({**config, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    try:
        record = next(one for one in iter(lambda: consumer.poll(20), None) if not one.error())
    finally:
        consumer.close()
    headers = {name: value.decode() for name, value in record.headers()}
    headers["message-key"] = record.key().decode()
    type, id = headers.pop("x-consumer-type"), headers.pop("x-consumer-id")
    return Seen(record.value(), type, id, headers)


def by_xrange(server: Server, stream: str) -> Seen:
    assert isinstance(server, RedisServer)
    with server.client() as client:
        [(_, fields)] = client.xrange(stream)
    type, id = fields[b"type"].decode(), fields[b"id"].decode()
    return Seen(fields[b"body"], type, id, json.loads(fields[b"headers"]))


def by_boto3(server: Server, queue: str) -> Seen:
    boto3 = pytest.importorskip("boto3")
    assert isinstance(server, SqsServer)
    arguments = {name: server._arguments[name] for name in BOTO3_ARGUMENTS}
    client = boto3.client("sqs", **arguments)
    url = client.get_queue_url(QueueName=queue)["QueueUrl"]
    answer = client.receive_message(QueueUrl=url, MessageAttributeNames=["All"], WaitTimeSeconds=20)
    client.close()
    [message] = answer["Messages"]
    type, ours = (message["MessageAttributes"][n]["StringValue"] for n in ("type", "x-consumer"))
    return Seen(message["Body"].encode(), type, **json.loads(ours))


BOTO3_ARGUMENTS = ("endpoint_url", "region_name", "aws_access_key_id", "aws_secret_access_key")


def by_sql(server: Server, source: str) -> Seen:
    assert isinstance(server, PostgresServer)
    [row] = server.query("SELECT * FROM consumer.messages WHERE source = $1", source)
    return Seen(row["body"], row["type"], row["id"], json.loads(row["headers"]))


READERS: dict[str, Callable[[Server, str], Seen]] = {
    "kafka": by_librdkafka,
    "redis": by_xrange,
    "sqs": by_boto3,
    "postgres": by_sql,
}


async def read(broker: str, server: Server, name: str) -> Seen:
    """The only message of the topic, stream, queue or source."""
    return await asyncio.to_thread(READERS[broker], server, name)
