# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Ends the process when its event loop cannot: a handler blocks the loop, or a thread never returns.

Normally a shutdown happens in the event loop (consumer.py), each step bounded. If that fails, this thread ends the
process at the deadline, even if a handler never returns.

A signal handler written in Python waits for the main thread, which may be in native code that never returns, or is
about to wait. So the operating system's own handler wakes this thread as well (`signal.set_wakeup_fd`).
"""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from .cancellation import CancellationEvent
from .errors import ExitCode, forced_exit_code
from .message import Message
from .signals import forces

log = structlog.get_logger()

CLOSE_SECONDS = 10.0
"""The time for closing after the drain time; the sum of the consumer's own limits is less."""
FORCED_SECONDS = 2.0
"""How long a forced shutdown may take."""
_POLL_SECONDS = 0.25
_LISTEN_AGAIN_SECONDS = 0.25
_LAST_WORDS_SECONDS = 1


@dataclass(eq=False, repr=False)
class Watchdog(threading.Thread):
    """Watches a shutdown from outside the event loop. Made and started in the main thread, in that loop."""

    _event: CancellationEvent
    _shutdown_signals: Collection[signal.Signals]
    _drain_seconds: float
    _in_flight: Mapping[Message, str]
    _write_receipt: Callable[[int, Sequence[tuple[signal.Signals, float]]], None]

    def __post_init__(self) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._final: tuple[float, int] | None = None
        self._loop = asyncio.get_running_loop()
        self._noticed: list[tuple[signal.Signals, float]] = []
        self._wake_too: int | None = None

    def start(self) -> None:
        self._wakeup_reader, self._wakeup_writer = socket.socketpair()
        self._wakeup_reader.settimeout(_POLL_SECONDS)
        self._wakeup_writer.setblocking(False)
        if sys.platform != "win32":  # where asyncio itself uses the wakeup descriptor
            self._listen()
            # Signals of a forked child are not this process's.
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        super().start()

    def _listen(self) -> None:
        """Set our descriptor as the one that signals wake, repeatedly: `loop.add_signal_handler` and uvloop set theirs.

        This thread wakes theirs. It is duplicated, so that its number never means another file.
        """
        ours = self._wakeup_writer.fileno()
        earlier = signal.set_wakeup_fd(ours, warn_on_full_buffer=False)
        others = self._wake_too
        with suppress(OSError):  # it is closed, or there is no free number
            if earlier not in (-1, ours) and not (others and os.path.sameopenfile(earlier, others)):
                self._wake_too = os.dup(earlier)
        self._loop.call_later(_LISTEN_AGAIN_SECONDS, self._listen)

    def finish(self, exit_code: int, flush_seconds: float = 0) -> float:
        """The service has ended: the process must exit with this code, even while threads run.

        The process has ``flush_seconds``, as far as the time for closing allows, and then one second; returns
        the seconds for the flush.
        """
        now = time.monotonic()
        limit = self._limit()
        spare = flush_seconds if limit is None else min(flush_seconds, limit[0] - now - 1)
        spare = max(0, spare)
        self._final = (now + 1 + spare, exit_code)
        return spare

    def run(self) -> None:
        while True:
            self._notice()
            limit = self._limit()
            if limit is not None and time.monotonic() > limit[0]:
                self._end_process(limit[1])

    def _notice(self) -> None:
        """Wait for a signal, for at most _POLL_SECONDS."""
        try:
            numbers = self._wakeup_reader.recv(100)
        except TimeoutError:
            return
        if self._wake_too is not None:
            with suppress(OSError):  # it is full or closed
                os.write(self._wake_too, numbers)
        now = time.monotonic()
        self._noticed += [(s, now) for s in self._shutdown_signals if s in numbers]
        with suppress(RuntimeError):  # the loop is closed
            # Wakes the loop, so that Python's own signal handlers run; their record then replaces this one.
            self._loop.call_soon_threadsafe(self._believe_the_event)

    def _believe_the_event(self) -> None:
        self._noticed = self._event.signals.copy()

    def _limit(self) -> tuple[float, int] | None:
        """When the process must have ended (``time.monotonic()``), and with which exit code."""
        signals = max(self._event.signals, self._noticed, key=len)
        if self._final is not None or not signals:
            return self._final
        (_, first), *later = signals
        for signum, received in later:
            if forces(signum, received - first):
                return received + FORCED_SECONDS, forced_exit_code(signum)
        return first + self._drain_seconds + CLOSE_SECONDS, ExitCode.DEADLINE

    def _end_process(self, exit_code: int) -> None:
        if self._final is None:
            # In another thread: the blocked main thread may hold the lock of the log.
            last_words = threading.Thread(
                target=self._log_last_words, args=(exit_code,), daemon=True
            )
            last_words.start()
            last_words.join(_LAST_WORDS_SECONDS)
        os._exit(exit_code)

    def _log_last_words(self, exit_code: int) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        for message, name in list(self._in_flight.items()):
            log.error(
                "message_abandoned", message_id=message.id, handler=name, attempt=message.attempt
            )
        turned = threading.Event()
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(turned.set)
        if turned.wait(_POLL_SECONDS):
            log.error("close_timed_out", stack=stack)
        else:
            log.error("event_loop_blocked", stack=stack)
        self._write_receipt(exit_code, max(self._event.signals, self._noticed, key=len))
