# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Notifies systemd of the service's state, if its unit has `Type=notify`; without NOTIFY_SOCKET it does nothing.

READY is sent when the service takes messages, and STOPPING at the signal. A timer in the event loop sends WATCHDOG:
if the loop is blocked or all handlers hang, it sends none, and systemd restarts the service.
The protocol is one datagram of lines, see sd_notify(3).
"""

import asyncio
import os
import socket
import sys
from collections.abc import Callable

import structlog

log = structlog.get_logger()

SEND_SECONDS = 0.5
"""systemd would kill the service if READY were lost, so sending may wait, but briefly: it blocks the event loop."""


def notify(*lines: str) -> None:
    """Send these ``KEY=VALUE`` lines as one message."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path or sys.platform == "win32":  # Windows has no Unix sockets
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path  # @: an abstract socket
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(SEND_SECONDS)
            manager.sendto("\n".join(lines).encode(), address)
    except OSError as error:
        log.warning("notify_failed", lines=lines, error=str(error))


def ping_watchdog(why_stuck: Callable[[], str]) -> None:
    """Ping from the running event loop while it runs and is not stuck, twice per ``WatchdogSec=``."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", "") not in (
        "",
        str(os.getpid()),  # otherwise the parent process's variables were inherited
    ):
        return
    loop = asyncio.get_running_loop()
    interval_seconds = int(microseconds) / 1e6 / 2

    def ping() -> None:
        if not why_stuck():
            notify("WATCHDOG=1")
        loop.call_later(interval_seconds, ping)

    ping()
