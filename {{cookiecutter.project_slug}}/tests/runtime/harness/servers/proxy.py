# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A TCP proxy in a thread, to break a broker's connections in each way in which networks break them."""

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

BROKEN = (OSError, asyncio.IncompleteReadError)
SCHEME_WITH_TLS = {"amqp": "amqps", "kafka": "kafkas", "mqtt": "mqtts", "redis": "rediss"}
"""The default ports, by the scheme of the URL."""


class Proxy:
    """Forwards bytes to the host and port of a URL, until a method changes that.

    ``tls`` makes the proxy speak TLS to its clients. ``url`` is the broker's URL through the proxy.
    """

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._target_port = parts.hostname or "127.0.0.1", parts.port or 5672
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # broken connections are the purpose
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self.port = 0
        self.bytes_to_broker = 0
        self._thread.start()
        self._run(self._listen)
        user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        scheme = SCHEME_WITH_TLS.get(parts.scheme, parts.scheme) if tls else parts.scheme
        self.url = parts._replace(scheme=scheme, netloc=f"{user}localhost:{self.port}").geturl()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Reset all connections; new ones are accepted at once."""
        self._run(self._cut)

    def refuse(self) -> None:
        """Reset all connections, and refuse new ones."""
        self._run(self._refuse)

    def black_hole(self) -> None:
        """Accept and keep connections, and forward neither bytes nor an end."""
        self._run(self._block)

    def resume(self) -> None:
        """Forward again, also the bytes that were kept."""
        self._run(self._listen)

    def translate(self, data: bytes) -> bytes:
        """The broker's bytes for the client: an address of the broker is replaced by the proxy's."""
        return data

    def _run(self, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asyncio.run_coroutine_threadsafe(step(), self._loop).result(10)

    async def _listen(self) -> None:
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(
                self._accept, "127.0.0.1", self.port, ssl=self._tls
            )
            self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self._server is None:  # the connection arrived during the refusal
            self._reset(writer)
        else:
            self._start(self._connect(reader, writer))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._flowing.wait()
            target_reader, target_writer = await asyncio.open_connection(
                self._host, self._target_port
            )
        except OSError:
            self._reset(writer)
            self._writers.discard(writer)
            return
        self._writers.add(target_writer)
        self._start(self._pump(reader, target_writer, to_broker=True))
        self._start(self._pump(target_reader, writer, to_broker=False))

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_broker: bool
    ) -> None:
        with contextlib.suppress(*BROKEN):
            while data := await reader.read(65536):
                await self._flowing.wait()
                if to_broker:
                    self.bytes_to_broker += len(data)
                await self._pass_on(data if to_broker else self.translate(data), writer)
        await self._flowing.wait()
        writer.close()
        with contextlib.suppress(*BROKEN):
            await writer.wait_closed()
        self._writers.discard(writer)

    async def _pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        try:
            sock = writer.get_extra_info("socket")
        except AttributeError:  # a TLS connection that is already closed
            sock = None
        if sock is not None and sock.fileno() >= 0:  # otherwise it is already closed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def _cut(self) -> None:
        for writer in self._writers:
            self._reset(writer)

    async def _refuse(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            # If the server closes first, connections that asyncio has accepted and not begun stay open.
            for listener in server.sockets:
                self._loop.remove_reader(listener.fileno())
            await asyncio.sleep(0)
            server.close()
        await self._cut()

    async def _block(self) -> None:
        self._flowing.clear()

    async def _close(self) -> None:
        await self._refuse()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        closings = [writer.wait_closed() for writer in self._writers]
        await asyncio.gather(*tasks, *closings, return_exceptions=True)


class KafkaProxy(Proxy):
    """Kafka tells its clients the addresses of its brokers: this proxy replaces them by its own."""

    def translate(self, data: bytes) -> bytes:
        theirs, ours = (b"127.0.0.1" + struct.pack(">i", p) for p in (self._target_port, self.port))
        return data.replace(theirs, ours)


def proxy_type(url: str) -> type[Proxy]:
    """The proxy for a broker with this URL; skips the test if it names a set of servers."""
    scheme = urlsplit(url).scheme
    if "+" in scheme:
        pytest.skip("a proxy stands before one server, and these tell their own addresses")
    return KafkaProxy if scheme.startswith("kafka") else Proxy
