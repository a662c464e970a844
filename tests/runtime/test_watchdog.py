"""How the watchdog notices signals. Its further work is tested in test_process.py, with real blocked services."""

import sys

import pytest

from processes import Child
from runtime import watchdog

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="there asyncio itself listens"),
]

WATCHED = """
import os, warnings
from {module} import Watchdog

class Dog(Watchdog):
    woken = asyncio.Event()

    def _believe_the_event(self):
        noticed = [signum.name for signum, _ in self._noticed]
        super()._believe_the_event()
        print(noticed, self._noticed)
        self.woken.set()

async def watched():
    with make_cancellation_event() as event:
        dog = Dog(event, [signal.SIGTERM, signal.SIGINT], 60, {{}})
        {steps}

asyncio.run(watched())
"""


def watched(*steps: str) -> Child:
    return Child(WATCHED.format(module=watchdog.__name__, steps="; ".join(steps)))


def test_a_signal_that_no_python_handler_has_seen_wakes_the_event_loop() -> None:
    """It came in the instant in which the loop began to wait, so no handler of Python has run."""
    with watched(
        "dog.start()", "dog._wakeup_writer.send(bytes([signal.SIGTERM]))", "await dog.woken.wait()"
    ) as child:
        assert child.end() == ("['SIGTERM'] []", 0)


def test_an_earlier_wakeup_fd_is_kept() -> None:
    with watched(
        *("end, _ = os.pipe()", "os.set_blocking(end, False)", "signal.set_wakeup_fd(end)"),
        *("dog.start()", "print(signal.set_wakeup_fd(-1) == end)"),
    ) as child:
        assert child.end() == ("True", 0)


def test_the_signals_of_a_forked_child_are_not_taken_for_ones_own() -> None:
    with watched(
        *("warnings.simplefilter('ignore')", "dog.start()"),
        "pid = os.fork() or os._exit(signal.set_wakeup_fd(-1) != -1)",
        "print(os.waitpid(pid, 0)[1])",
    ) as child:
        assert child.end() == ("0", 0)
