"""The MQTT consumers that the generated service is compared with: ``python -m tools.benchmarks.clients.mqtt NAME``.

They return to the same session, that of ``?client_id=`` in CONSUMER_BROKER_URL, which must have the messages, call
the same stopwatch, and acknowledge each message after its handler. MQTT has one acknowledgement for each message,
so nothing can be batched: the bare clients differ in how they drive paho.
"""

import asyncio
import os
import signal
import sys
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiomqtt
from faststream import FastStream
from faststream.mqtt import MQTTBroker
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tools.benchmarks.stopwatch import Stopwatch

URL = urlsplit(os.environ["CONSUMER_BROKER_URL"])
HOST, PORT = URL.hostname or "127.0.0.1", URL.port or 1883
CLIENT_ID = dict(parse_qsl(URL.query))["client_id"]
TOPIC = os.environ["CONSUMER_SOURCE"]
GROUP = os.environ["CONSUMER_GROUP"]
PREFETCH = int(os.environ["CONSUMER_PREFETCH"])
SESSION_EXPIRY_SECONDS = 86_400

stopwatch = Stopwatch()


async def bare() -> None:
    """paho in its own thread, which calls the handler and acknowledges: the lowest cost of paho."""
    loop, stop = asyncio.get_running_loop(), _stop_event()
    client = Client(CallbackAPIVersion.VERSION2, CLIENT_ID, protocol=MQTTv5, manual_ack=True)

    def on_message(_client: Client, _userdata: Any, message: Any) -> None:
        loop.call_soon_threadsafe(stopwatch.tick)
        client.ack(message.mid, message.qos)

    client.on_message = on_message
    client.connect(HOST, PORT, clean_start=False, properties=_session())
    client.subscribe(f"$share/{GROUP}/{TOPIC}", 1)
    client.loop_start()
    await stop.wait()
    client.disconnect()
    client.loop_stop()


async def bare_single() -> None:
    """aiomqtt's ``async for message in client.messages``; manual acks need its private paho client."""
    stop = _stop_event()
    client = aiomqtt.Client(
        HOST,
        PORT,
        identifier=CLIENT_ID,
        protocol=aiomqtt.ProtocolVersion.V5,
        clean_start=False,
        properties=_session(),
    )
    client._client.manual_ack_set(True)

    async def consume() -> None:
        async for message in client.messages:
            stopwatch.tick()
            client._client.ack(message.mid, message.qos)

    async with client:
        await client.subscribe(f"$share/{GROUP}/{TOPIC}", 1)
        consuming = asyncio.create_task(consume())
        await stop.wait()
        consuming.cancel()


async def faststream() -> None:
    """FastStream acknowledges after the handler, so at least once.

    Without a receive maximum: its client ends the connection when Mosquitto before 2.0.13 exceeds that.
    """
    await _run(
        MQTTBroker(
            f"mqtt://{HOST}:{PORT}",
            client_id=CLIENT_ID,
            clean_session=False,
            session_expiry_interval=SESSION_EXPIRY_SECONDS,
        )
    )


async def faststream_quiet() -> None:
    """FastStream without the two lines that it logs for each message."""
    await _run(
        MQTTBroker(
            f"mqtt://{HOST}:{PORT}",
            client_id=CLIENT_ID,
            clean_session=False,
            session_expiry_interval=SESSION_EXPIRY_SECONDS,
            logger=None,
        )
    )


async def _run(broker: MQTTBroker) -> None:
    @broker.subscriber(TOPIC, qos=1, shared=GROUP)
    async def handle(body: bytes) -> None:
        stopwatch.tick()

    await FastStream(broker).run()


def _session() -> Any:
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = SESSION_EXPIRY_SECONDS
    properties.ReceiveMaximum = PREFETCH
    return properties


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


CONSUMERS = {
    consumer.__name__: consumer for consumer in (bare, bare_single, faststream, faststream_quiet)
}

if __name__ == "__main__":
    asyncio.run(CONSUMERS[sys.argv[1]]())
