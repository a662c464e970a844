"""The service of the harness, whose `dead-letters replay` prints an event for its start and for each step."""

import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

from harness.service import work
from runtime.operate import cli
from runtime.operate.console import Progress


class ToldProgress(Progress):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        print(json.dumps({"event": "begun"}), flush=True)

    def advance(self, number: int) -> None:
        super().advance(number)
        print(json.dumps({"event": "step", "moved": number}), flush=True)


if __name__ == "__main__":
    with suppress(ImportError):  # of a client library
        sqs = import_module("runtime.brokers.sqs")
        setattr(sqs, "LISTING_SECONDS", int(os.environ["LISTING_SECONDS"]))  # noqa: B010
    setattr(cli, "Progress", ToldProgress)  # noqa: B010
    sys.exit(cli.main(cli.Service(name="service-of-the-tests", handlers={"work": work})))
