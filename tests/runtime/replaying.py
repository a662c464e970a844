"""The service of the harness, whose `dead-letters replay` prints an event for its start and for each step.

It interrupts itself, as SIGNAL_AT says: by which signal, after which step (0 is the start), and how many seconds later.
From outside, a command of a tenth of a second would end before the signal arrived.
"""

import json
import os
import sys
import time
from contextlib import suppress
from importlib import import_module
from threading import Thread
from typing import Any

from harness.service import work
from runtime.operate import cli
from runtime.operate.console import Progress


class ToldProgress(Progress):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._steps = -1
        self._step({"event": "begun"})

    def advance(self, number: int) -> None:
        super().advance(number)
        self._step({"event": "step", "moved": number})

    def _step(self, event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)
        self._steps += 1
        signum, steps, seconds = map(float, os.environ["SIGNAL_AT"].split())
        if signum and steps == self._steps:
            if seconds:
                Thread(target=interrupt, args=(signum, seconds), daemon=True).start()
            else:
                os.kill(os.getpid(), int(signum))


def interrupt(signum: float, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), int(signum))


if __name__ == "__main__":
    with suppress(ImportError):  # a missing client library
        sqs = import_module("runtime.brokers.sqs")
        setattr(sqs, "LISTING_SECONDS", int(os.environ["LISTING_SECONDS"]))  # noqa: B010
    setattr(cli, "Progress", ToldProgress)  # noqa: B010
    sys.exit(cli.main(cli.Service(name="service-of-the-tests", handlers={"work": work})))
