"""How the watchdog detects signals. test_process.py tests its other work, with real blocked services."""

import sys

import pytest

from processes import Child
from runtime import consumer, watchdog

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
        dog = Dog(event, [signal.SIGTERM, signal.SIGINT], 60, {{}}, print)
        {steps}

asyncio.run(watched())
"""


def watched(*steps: str) -> Child:
    return Child(WATCHED.format(module=watchdog.__name__, steps="; ".join(steps)))


def test_a_signal_that_no_python_handler_has_seen_wakes_the_event_loop() -> None:
    """The signal arrived in the instant in which the loop began to wait, so no handler in Python has run."""
    with watched(
        "dog.start()", "dog._wakeup_writer.send(bytes([signal.SIGTERM]))", "await dog.woken.wait()"
    ) as child:
        assert child.end() == ("['SIGTERM'] []", 0)


def test_an_earlier_wakeup_fd_is_woken_too() -> None:
    with watched(
        *("end, start = os.pipe()", "os.set_blocking(start, False)", "signal.set_wakeup_fd(start)"),
        *("dog.start()", "os.close(start)", "os.kill(os.getpid(), signal.SIGTERM)"),
        *("await dog.woken.wait()", "print(os.read(end, 9) == bytes([signal.SIGTERM]))"),
    ) as child:
        output, exit_code = child.end()
    assert (output.splitlines()[-1], exit_code) == ("True", 0)


def test_the_signals_of_a_forked_child_are_not_taken_for_ones_own() -> None:
    with watched(
        *("warnings.simplefilter('ignore')", "dog.start()"),
        "pid = os.fork() or os._exit(signal.set_wakeup_fd(-1) != -1)",
        "print(os.waitpid(pid, 0)[1])",
    ) as child:
        assert child.end() == ("0", 0)


@pytest.mark.parametrize("drain_seconds", [0, 1, 25])
def test_the_bounds_of_closing_end_before_the_watchdog_does(drain_seconds: float) -> None:
    """Each step takes its whole time limit; the source stops during the drain and the cancellation."""
    c = consumer
    cancelling = max(drain_seconds, c.IDLE_SECONDS) + c.CANCEL_SECONDS + c.REQUEUE_SECONDS
    total = max(c.STOP_SOURCE_SECONDS, cancelling) + c.CLOSE_SOURCE_SECONDS
    total += c.CLOSE_LIFESPAN_SECONDS
    assert total + watchdog._POLL_SECONDS <= drain_seconds + watchdog.CLOSE_SECONDS
