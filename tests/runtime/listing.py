"""The queues, topics and streams of a broker, as its own clients list them."""

from collections.abc import Iterable
from typing import Any

from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import ChannelNotFoundEntity
from aiokafka.admin import AIOKafkaAdminClient
from nats.aio.client import Client

RETRIES_MS = (10, 20, 40, 50, 80, 160)


def names_on(broker: Any, sources: Iterable[str]) -> set[str]:
    """Queues, streams, topics, keys and sessions. RabbitMQ lists none: for it, those that these sources may have.

    Without Kafka's consumer groups: it removes a group that has no topic and no member by itself.
    """
    match broker.url.partition(":")[0]:
        case "amqp":
            retries = [f".retry.{ms}" for ms in RETRIES_MS]
            names = [f"{one}{end}" for one in sources for end in ("", ".dead", *retries)]
            return set(broker._ask(existing_queue, *names)) - {""}
        case "redis":
            with broker.client() as client:
                return {key.decode() for key in client.scan_iter("*", count=1000)}
        case "nats":
            return set(broker.ask(streams))
        case "kafka":
            topics = broker._ask(AIOKafkaAdminClient.list_topics)
            return {topic for topic in topics if not topic.startswith("__")}  # the broker's own
        case "sqs":
            urls = broker.client.list_queues().get("QueueUrls", [])
            return {url.rpartition("/")[2] for url in urls}
        case "postgres":
            names = [f"consumer.{name}" for name in ("messages", "dead_letters", "consumers")]
            tables = [one for one in names if broker.query(f"SELECT to_regclass('{one}')")[0][0]]
            rows = [broker.query(f"SELECT source FROM {table}") for table in tables]
            return {source for found in rows for (source,) in found}
        case "mqtt":
            return set(broker._read()[0])
        case scheme:
            raise NotImplementedError(scheme)


async def existing_queue(connection: AbstractConnection, name: str) -> str:
    try:
        async with connection.channel() as channel:
            await channel.declare_queue(name, passive=True)
    except ChannelNotFoundEntity:
        return ""
    return name


async def streams(client: Client) -> list[str]:
    found = await client.jetstream().streams_info()
    return [str(one.config.name) for one in found]
