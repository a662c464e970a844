# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Liveness, readiness and metrics over HTTP: ``/livez``, ``/readyz`` and ``/metrics``.

The server runs in the service's own event loop, on ``CONSUMER_PROBE_PORT`` of every interface. So ``/livez`` does
not answer while a handler blocks the loop, and the supervisor restarts the service.
"""

import asyncio
import errno
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from .consumer import Consumer
from .errors import SettingsError
from .telemetry import Telemetry

if TYPE_CHECKING:
    from aiohttp import web

log = structlog.get_logger()

SAMPLE_SECONDS = 0.25
SAMPLES = 240
"""`/livez` reports how late the event loop was in the last minute."""
LATE_SECONDS = 1.0
"""An event loop this late is logged."""
CLOSE_SECONDS = 0.5


@asynccontextmanager
async def probes(port: int, consumer: Consumer, telemetry: Telemetry) -> AsyncIterator[None]:
    """Answer on this port, if it is not 0, while the context is open. Raises SettingsError if it is in use."""
    if not port:
        yield
        return
    from aiohttp import web  # imported here: the import is slower than the rest of the runtime

    lag = EventLoopLag()
    listener = _listen(port)

    async def livez(_: "web.Request") -> "web.Response":
        reason = why_not_live(consumer)
        late = f"event loop at most {lag.seconds():.3f} s late in the last minute"
        return web.Response(status=503 if reason else 200, text=f"{reason or 'live'}\n{late}\n")

    async def readyz(_: "web.Request") -> "web.Response":
        reason = why_not_ready(consumer)
        return web.Response(status=503 if reason else 200, text=f"{reason or 'ready'}\n")

    async def metrics(request: "web.Request") -> "web.Response":
        page = telemetry.scrape(request.headers.get("Accept", ""))
        if page is None:
            raise web.HTTPNotFound(text="this service has no Prometheus metrics\n")
        return web.Response(body=page[0], headers={"Content-Type": page[1]})

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_SECONDS / 2)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    lag.start()
    try:
        yield
    finally:
        lag.stop()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await runner.cleanup()
        except TimeoutError:
            log.warning("close_failed", step="probes", error="a client keeps its connection open")


def why_not_live(consumer: Consumer) -> str:
    """Empty if the service is live: this code runs, so the loop turns; and neither fetcher nor worker failed."""
    failure = consumer.source.buffer.failure or next(iter(consumer.errors), None)
    return "" if failure is None else f"failed: {_in_one_line(failure)}"


def why_not_ready(consumer: Consumer) -> str:
    """Empty while the service takes messages; from the first instant of a shutdown it does not."""
    if consumer.event.is_set():
        return "shutting down"
    if consumer.state != "consuming":
        return consumer.state
    if not consumer.source.connected:
        return f"the broker cannot be reached: {consumer.source.connectivity.reason}"
    return consumer.source.put_offs.reason


class EventLoopLag:
    """Samples how late the event loop runs its timers."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lags: deque[float] = deque([0.0], SAMPLES)
        self._timer: asyncio.TimerHandle | None = None
        self._due_at = 0.0

    def start(self) -> None:
        self._due_at = self._loop.time() + SAMPLE_SECONDS
        self._timer = self._loop.call_at(self._due_at, self._sample)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def seconds(self) -> float:
        """The longest delay of the last minute, with the sample that is due now."""
        return max(*self._lags, self._loop.time() - self._due_at, 0.0)

    def _sample(self) -> None:
        lag = self._loop.time() - self._due_at
        self._lags.append(lag)
        if lag >= LATE_SECONDS:
            log.warning("event_loop_late", seconds=round(lag, 3))
        self.start()


def _listen(port: int) -> socket.socket:
    """Both IPv4 and IPv6, where there is IPv6."""
    try:
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            raise _refused(port, error) from error
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise _refused(port, error) from error


def _refused(port: int, error: Exception) -> SettingsError:
    reason = {errno.EADDRINUSE: "is in use", errno.EACCES: "needs root"}
    why = reason.get(getattr(error, "errno", 0) or 0, f"cannot be listened on: {error}")
    return SettingsError(f"CONSUMER_PROBE_PORT: port {port} {why}")


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
