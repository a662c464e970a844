# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""Ends the process when its event loop cannot: a handler that blocks it, or a thread that never returns.

Everything else about stopping happens in the event loop (consumer.py), each step bounded. This thread is
the last resort behind it, so that "gone by the deadline" holds whatever a handler does.

A signal handler written in Python waits for the main thread, which may be in native code that returns to nobody,
or about to wait. So the operating system's own handler tells this thread, too (`signal.set_wakeup_fd`).
"""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Collection
from contextlib import suppress

import structlog

from .cancellation import CancellationEvent
from .consumer import EXIT_DEADLINE, Consumer, forces

log = structlog.get_logger()

CLOSE_SECONDS = 10.0
"""How long closing may take after the drain time; the consumer's own bounds add up to less."""
FORCED_SECONDS = 2.0
"""How long a forced stop may take."""
_POLL_SECONDS = 0.25
_LAST_WORDS_SECONDS = 1


class Watchdog(threading.Thread):
    """Watches a consumer's stop from outside its event loop. Made and started in the main thread, in that loop."""

    def __init__(
        self,
        event: CancellationEvent,
        stop_signals: Collection[signal.Signals],
        drain_seconds: float,
        consumer: Consumer,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._event = event
        self._stop_signals = stop_signals
        self._drain_seconds = drain_seconds
        self._consumer = consumer
        self._final: tuple[float, int] | None = None
        self._loop = asyncio.get_running_loop()
        self._noticed: list[tuple[signal.Signals, float]] = []

    def start(self) -> None:
        self._numbers, self._told = socket.socketpair()
        self._numbers.settimeout(_POLL_SECONDS)
        self._told.setblocking(False)
        if sys.platform != "win32":  # where asyncio itself listens
            earlier = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
            if earlier != -1:
                signal.set_wakeup_fd(earlier)  # so does somebody else, uvloop perhaps: leave it
            else:  # what a forked child gets is not for us
                os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        super().start()

    def finish(self, exit_code: int, flush_seconds: float = 0) -> float:
        """The service is done: the process is to end with this code, threads or no threads.

        It has a second for that, and before it ``flush_seconds`` as far as the time for stopping allows: returns
        how many those are.
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
        """Wait for a signal, or for the time of a poll."""
        try:
            numbers = self._numbers.recv(100)
        except TimeoutError:
            return
        now = time.monotonic()
        self._noticed += [(s, now) for s in self._stop_signals if s in numbers]
        with suppress(RuntimeError):  # the loop is closed
            # Wakes it, so that Python's own handlers run, should it wait; and then they know best.
            self._loop.call_soon_threadsafe(self._believe_the_event)

    def _believe_the_event(self) -> None:
        self._noticed = self._event.signals.copy()

    def _limit(self) -> tuple[float, int] | None:
        """When the process has to be gone (``time.monotonic()``), and with which exit code."""
        signals = max(self._event.signals, self._noticed, key=len)
        if self._final is not None or not signals:
            return self._final
        (_, first), *later = signals
        for signum, received in later:
            if forces(signum, received - first):
                return received + FORCED_SECONDS, 128 + signum
        return first + self._drain_seconds + CLOSE_SECONDS, EXIT_DEADLINE

    def _end_process(self, exit_code: int) -> None:
        if self._final is None:
            # In a thread of their own: the main thread may hold the lock of the log it is blocked on.
            last_words = threading.Thread(
                target=self._say_last_words, args=(exit_code,), daemon=True
            )
            last_words.start()
            last_words.join(_LAST_WORDS_SECONDS)
        os._exit(exit_code)

    def _say_last_words(self, exit_code: int) -> None:
        main_thread = threading.main_thread().ident
        frame = sys._current_frames().get(main_thread) if main_thread is not None else None
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        for message, name in list(self._consumer.in_flight.items()):
            log.error("message_abandoned", id=message.id, handler=name, attempt=message.attempt)
        log.error("event_loop_blocked", stack=stack)
        log.error("stopped", exit_code=exit_code)
