"""Child processes: the service that can misbehave, and short programs that use the cancellation."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import IO, Any

from runtime import cancellation

MISBEHAVING = Path(__file__).with_name("misbehaving.py")
"""The program of a `Scene` whose handlers can misbehave."""

WAIT_SECONDS = 30
"""The time limit before a test fails; far more than an idle machine needs."""

CHILD = """
import asyncio, logging, signal, sys
from {module} import cancellable_aiter, make_cancellation_event

logging.getLogger("asyncio").setLevel("ERROR")  # no warnings about a slow machine

async def forever():
    while True:
        await asyncio.sleep(3600)
        yield

async def main():
    event = make_cancellation_event()
    print("ready", flush=True)
    async for _ in cancellable_aiter(forever(), event):
        pass
    print("stopped by", event.reason.name, flush=True)

"""


class Child:
    """A Python process that runs this code; its output includes its errors, and warnings are errors."""

    def __init__(self, code: str, **options: Any) -> None:
        program = CHILD.format(module=cancellation.__name__) + textwrap.dedent(code)
        self._process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        assert self._process.stdout is not None
        self._output: IO[str] = self._process.stdout

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()

    def line(self) -> str:
        return self._output.readline().strip()

    def kill(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    def end(self) -> tuple[str, int]:
        """The rest of the output, and the exit code."""
        output, _ = self._process.communicate(timeout=WAIT_SECONDS)
        return output.strip(), self._process.returncode
