# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A private Mosquitto, deleted afterwards. Messages that wait in its sessions are read from its database file.

The protocol has no counts, so a broker with only a URL, CONSUMER_TEST_BROKER_URL, cannot serve the tests.
"""

import base64
import hashlib
import os
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from runtime.brokers import make_source
from runtime.settings import ConsumerSettings

from ..contract import opened
from . import Counts, PrivateServer, Server, ServerMissing
from .local import ServerContainer, ServerProcess, free_ports, has_docker

IMAGE = "eclipse-mosquitto:2.0.22"  # later versions may write another format
DATABASE_VERSION = 6
PORT_IN_CONTAINER = 1883

ODD_USER = ("order events", "p@ss:w/o?r#d %2F+é")  # Mosquitto allows no colon in a name
KEEPER = "keeper-of-dead-letters"
"""The client id of a session that stores every dead letter, since the broker itself stores none."""
NEVER = 0xFFFF_FFFF
WRITE_SECONDS = 60
"""The time limit to write the database, which waits for the disk."""

CONFIGURATION = """
user root
persistence true
persistence_location {data}/
autosave_on_changes {autosave}
autosave_interval {interval}
max_inflight_messages 1000
max_queued_messages 0
listener {port} {host}
allow_anonymous true
password_file {data}/passwords
acl_file {data}/rights
"""
# Without a user, everything is allowed.
RIGHTS = """
topic readwrite #
user {odd}
topic readwrite #
"""


class _Waiting(NamedTuple):
    """One message in the session of one client."""

    client_id: str
    topic: str
    queued: bool
    """Not sent to the client yet."""


class PrivateMosquitto(PrivateServer):
    """A Mosquitto with its configuration and its database in ``directory``."""

    def __init__(self, directory: Path, port: int, instance: ServerProcess) -> None:
        self.url = f"mqtt://127.0.0.1:{port}"
        self._port = port
        self._database = directory / "mosquitto.db"
        self.instance = instance
        self._command(KEEPER, clean=False, use=lambda client: client.subscribe("+/dead/+", 1))

    async def introduce_consumer(self, settings: ConsumerSettings) -> None:
        async with opened(make_source(settings)) as source:
            await source.start()
            await source.stop()

    def counts(self, queue: str) -> Counts:
        online, waiting = self._read()
        ours = [m for m in waiting if m.topic.split("/")[0] == queue and m.client_id != KEEPER]
        ready = [m for m in ours if m.queued or not online[m.client_id]]
        dead = [
            m for m in waiting if m.client_id == KEEPER and m.topic.startswith(f"{queue}/dead/")
        ]
        return Counts(len(ready), 0, len(dead))

    def consumers(self, queue: str) -> int:
        online, _ = self._read()
        return sum(connected for client_id, connected in online.items() if queue in client_id)

    def delete(self, queue: str) -> None:
        online, _ = self._read()
        for client_id in online:
            if queue in client_id:
                self._command(client_id, clean=True)

    def _command(
        self, client_id: str, *, clean: bool, use: Callable[[Client], object] = lambda _: None
    ) -> None:
        """Connect as this client, send a request that is answered, and disconnect."""
        done = threading.Event()
        client = Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=MQTTv5, reconnect_on_failure=False
        )
        properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho
        properties.SessionExpiryInterval = 0 if clean else NEVER
        client.on_connect = lambda *_: None if use(client) else done.set()
        client.on_subscribe = lambda *_: done.set()
        client.connect("127.0.0.1", self._port, clean_start=clean, properties=properties)
        client.loop_start()
        done.wait(10)
        client.disconnect()
        client.loop_stop()

    def _read(self) -> tuple[dict[str, bool], list[_Waiting]]:
        """The clients with a session, whether each is connected, and the messages that wait in all sessions."""
        give_up_at = time.monotonic() + WRITE_SECONDS
        ask_at, answers = 0.0, True
        with ExitStack() as stack:
            before = None
            with suppress(FileNotFoundError):
                # Open until there is another: otherwise the second one from now could get its inode number, and
                # two are written at once when an autosave coincides with the signal.
                before = os.fstat(stack.enter_context(self._database.open("rb")).fileno()).st_ino
            while self._database_file() == before:
                now = time.monotonic()
                why = "is slow" if answers else "answers nobody"
                assert now < give_up_at, f"mosquitto did not write its database: it {why}"
                if (
                    now >= ask_at
                ):  # again, since it forgets a signal that comes while it ends the last writing
                    time.sleep(0.002)
                    self.instance.send(signal.SIGUSR1)
                    # Later versions sleep until a packet arrives.
                    answers = _answers(self._port)
                    ask_at = now + 1
                time.sleep(0.005)
        return _parse(self._database.read_bytes(), self._database.stat().st_mtime)

    def _database_file(self) -> int | None:
        """The inode number, which changes with each writing."""
        return self._database.stat().st_ino if self._database.exists() else None


def _parse(database: bytes, written_at: float) -> tuple[dict[str, bool], list[_Waiting]]:
    """The format is in mosquitto's persist.h. Lengths are in network order, times and numbers in the machine's."""
    version = int.from_bytes(database[19:23], "big")
    assert version == DATABASE_VERSION, f"mosquitto's database has version {version}"
    topics: dict[int, str] = {}
    online: dict[str, bool] = {}
    waiting: list[tuple[str, int, bool]] = []
    position = 23
    while position < len(database):
        kind, length = struct.unpack_from("!LL", database, position)
        chunk = database[position + 8 : position + 8 + length]
        position += 8 + length
        if kind == 2:  # a message
            (number,) = struct.unpack_from("=Q", chunk)
            _, _, client, user, topic = struct.unpack_from("!LHHHH", chunk, 16)
            start = 32 + client + user
            topics[number] = chunk[start : start + topic].decode()
        elif kind == 3:  # a waiting message of a client
            (number,) = struct.unpack_from("=Q", chunk)
            _, name, _, state, _, _ = struct.unpack_from("!HHBBBB", chunk, 8)
            waiting.append((chunk[16 : 16 + name].decode(), number, state == 11))
        elif kind == 6:  # a client with a session
            (expires_at,) = struct.unpack_from("=q", chunk)
            lasts_seconds, _, name = struct.unpack_from("!LHH", chunk, 8)
            # 0 for a connected client or, in later versions, as if it had left just now.
            left_at = expires_at - lasts_seconds if expires_at else written_at
            online[chunk[24 : 24 + name].decode()] = left_at >= int(written_at)
    return online, [_Waiting(client, topics[number], queued) for client, number, queued in waiting]


def most_repeated(prefetch: int) -> float:
    """Mosquitto restarts from its last snapshot, and redelivers messages acked since then."""
    return float("inf")


def private(directory: Path) -> AbstractContextManager[PrivateServer]:
    return _started(directory, autosave=True)


def shared(directory: Path) -> AbstractContextManager[Server]:
    """Each process of a test run has its own server: it starts in an instant."""
    return _started(directory, autosave=False)


@contextmanager
def _started(directory: Path, *, autosave: bool) -> Iterator[PrivateMosquitto]:
    """With ``autosave`` it writes its database whenever a message was queued, so that a kill loses none."""
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None and not has_docker():
        raise ServerMissing(
            "there is no Mosquitto for the tests: none is installed, and there is no docker; one that only "
            "has a URL cannot be asked what waits in it"
        )
    (port,) = free_ports(1)
    configuration = directory / "mosquitto.conf"
    (directory / "rights").write_text(RIGHTS.format(odd=ODD_USER[0]))
    (directory / "passwords").write_text(f"{ODD_USER[0]}:{_password_hash(ODD_USER[1])}\n")
    for name in ("rights", "passwords"):
        (directory / name).chmod(0o600)
    instance: ServerProcess
    if program is not None:
        settings = {"data": directory, "host": "127.0.0.1", "port": port}
        configuration.write_text(_configuration(autosave=autosave, **settings))
        instance = ServerProcess(
            [program, "-c", str(configuration)], directory, lambda: _answers(port)
        )
    else:
        settings = {"data": "/mosquitto/data", "host": "0.0.0.0", "port": PORT_IN_CONTAINER}
        configuration.write_text(_configuration(autosave=autosave, **settings))
        instance = ServerContainer(
            IMAGE,
            PORT_IN_CONTAINER,
            port,
            directory,
            lambda: _answers(port),
            f"--user={os.getuid()}:{os.getgid()}",
            f"--volume={directory}:/mosquitto/data",
            command=["mosquitto", "-c", "/mosquitto/data/mosquitto.conf"],
        )
    try:
        yield PrivateMosquitto(directory, port, instance)
    finally:
        instance.close()


def _configuration(*, autosave: bool, **settings: object) -> str:
    return CONFIGURATION.format(
        autosave=str(autosave).lower(), interval=1 if autosave else 0, **settings
    )


def _answers(port: int) -> bool:
    """Whether a broker accepts a CONNECT: behind Docker's proxy the port alone is open earlier."""
    connect = b"\x10\x10\x00\x04MQTT\x05\x02\x00\x0a\x00\x00\x03ask"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(connect)
            return connection.recv(1) == b"\x20"
    except OSError:
        return False


def _password_hash(password: str) -> str:
    """A hash in the format of mosquitto_passwd: PBKDF2 with SHA-512."""
    salt, rounds = os.urandom(12), 101
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, rounds, 64)
    return f"$7${rounds}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"
