"""Facts about each broker, by its name, which only the template's tests need."""

LEASE_SECONDS = {"nats": 1, "postgres": 1, "redis": 1, "sqlite": 1, "sqs": 3}
"""The time that `Server.lease_option` sets. Without it, the end of a connection requeues its messages at once."""
REQUEUES_ON_DISCONNECT = ("mqtt", "rabbitmq")
"""Brokers that redeliver a connection's in-flight messages when it ends."""
SILENCE_OPTION = {
    "mqtt": "keepalive_seconds=1",
    "rabbitmq": "heartbeat=1",
    "sqs": "visibility_seconds=3",  # a poll that was cut off may have taken a message
}
"""The option of the URL with which an unresponsive broker is detected within a second, if there is one."""
RECREATES_NO_QUEUE = ("kafka", "mqtt", "postgres")
