# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Liveness, readiness and metrics over HTTP: ``/livez``, ``/readyz`` and ``/metrics``.

The server runs in the service's own event loop, on ``CONSUMER_PROBE_PORT``. So ``/livez`` does not answer while a
handler blocks the loop, and the supervisor restarts the service. Anybody who reaches the port can connect to it: so
connections are bounded in number and in time, and each has one request.
"""

import asyncio
import errno
import math
import re
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

import structlog

from .consumer import Consumer
from .errors import SettingsError
from .logs import Seldom
from .redaction import redacted
from .settings import ConsumerSettings
from .telemetry import Telemetry

log = structlog.get_logger()

SAMPLE_SECONDS = 0.25
SAMPLES = 240
"""`/livez` reports how late the event loop was in the last minute."""
LATE_SECONDS = 1.0
"""An event loop this late is logged."""
CONNECTION_SECONDS = 5.0
"""How long a connection may take for its request and its answer."""
MOST_CONNECTIONS = 512
"""One more connection closes the oldest."""

_ACCEPT = re.compile(r"\naccept:(.*)", re.IGNORECASE)


@asynccontextmanager
async def probes(
    settings: ConsumerSettings, consumer: Consumer, telemetry: Telemetry
) -> AsyncIterator[None]:
    """Answer on the probe port, unless it is 0, while the context is open. Raises SettingsError if it is in use."""
    if not settings.probe_port:
        yield
        return
    loop, warning = asyncio.get_running_loop(), Seldom()

    def page(path: str, accept: str) -> tuple[int, str, bytes]:
        """The status, the content type and the body."""
        if path == "/livez":
            reason = why_not_live(consumer)
            seconds = telemetry.event_loop_lag()
            late = f"event loop at most {seconds:.3f} s late in the last minute\n"
            return _text(reason, f"{reason or 'live'}\n{late}")
        if path == "/readyz":
            reason = why_not_ready(consumer)
            paused = f", paused: {why}" if (why := consumer.breaker.reason) else ""
            return _text(reason, f"{reason or 'ready' + paused}\n")
        metrics = telemetry.scrape(accept) if path == "/metrics" else None
        return (200, metrics[1], metrics[0]) if metrics else (404, "text/plain", b"no such page\n")

    def on_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not context["message"].startswith("socket.accept()"):
            loop.default_exception_handler(context)
        elif warning.is_due():  # the loop tries again each second
            log.error("accept_failed", error=str(context["exception"]))

    connections = dict[asyncio.Task[None], asyncio.StreamWriter]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections[task] = writer
        if len(connections) > MOST_CONNECTIONS:
            connections.pop(next(iter(connections))).transport.abort()
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(CONNECTION_SECONDS):
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                    method, target, *_ = f"{head}   ".split(" ")
                    accept = _ACCEPT.search(head)
                    path = target.partition("?")[0] if method in ("GET", "HEAD") else ""
                    status, content_type, body = page(path, accept[1].strip() if accept else "")
                    writer.write(
                        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n"
                        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    )
                    writer.write(body if method != "HEAD" else b"")
                    writer.close()
                    await writer.wait_closed()
        finally:  # also if a metric of the service raises
            writer.transport.abort()
            connections.pop(task, None)

    listener = _listen(settings.probe_host, settings.probe_port)
    # The loop accepts as many connections at a turn, and squares them when that fails (CPython issue 151615).
    server = await asyncio.start_server(serve, sock=listener, backlog=8)
    listener.listen(1024)  # connections that wait
    loop.set_exception_handler(on_error)
    try:
        yield
    finally:
        server.close()
        for writer in connections.values():
            writer.transport.abort()
        if connections:
            await asyncio.wait([*connections], timeout=CONNECTION_SECONDS)


def _text(reason: str, text: str) -> tuple[int, str, bytes]:
    content = redacted(text).encode(errors="replace")
    return 503 if reason else 200, "text/plain; charset=utf-8", content


def why_not_live(consumer: Consumer) -> str:
    """Why the service is not live; empty if the loop runs this, no task has failed, and a handler can run."""
    failure = consumer.source.buffer.failure or next(iter(consumer.errors), None)
    if failure is None:
        return consumer.limits.why_stuck()
    in_one_line = " ".join(redacted(str(failure)).split())
    return f"failed: {in_one_line or type(failure).__name__}"


def why_not_ready(consumer: Consumer) -> str:
    """Why the service is not ready; empty while it takes messages, so not from the first instant of a shutdown."""
    if consumer.event.is_set():
        return "shutting down"
    if consumer.state != "consuming":
        return consumer.state
    for source in (parts := consumer.source.parts):
        reason = source.put_offs.reason
        if not source.connected:
            reason = f"the broker cannot be reached: {source.connectivity.reason}"
        if reason:
            return f"{source.settings.source}: {reason}" if len(parts) > 1 else reason
    return ""


class EventLoopLag:
    """Samples how late the event loop runs its timers."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lags: deque[float] = deque([0.0], SAMPLES)
        self._due_at = math.inf

    def seconds(self) -> float:
        """The longest delay of the last minute, with the sample that is due now."""
        return max(*self._lags, self._loop.time() - self._due_at, 0.0)

    async def sample(self) -> None:
        """Sample until the task is cancelled."""
        while True:
            self._due_at = self._loop.time() + SAMPLE_SECONDS
            await asyncio.sleep(SAMPLE_SECONDS)
            self._lags.append(lag := self._loop.time() - self._due_at)
            if lag >= LATE_SECONDS:
                log.warning("event_loop_late", seconds=round(lag, 3))


def _listen(host: str, port: int) -> socket.socket:
    """Without a host, listen on IPv4 and, if the machine has it, on IPv6."""
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except (OSError, ValueError) as error:
        reasons = {errno.EADDRINUSE: "is in use", errno.EACCES: "needs root"}
        if why := reasons.get(getattr(error, "errno", 0) or 0):
            msg = f"CONSUMER_PROBE_PORT: port {port} {why}"
        else:
            msg = f"CONSUMER_PROBE_HOST: cannot listen on {host!r}: {error}"
        raise SettingsError(msg) from error
