# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The spool in the tests: the files in its folders. It has no server that could be killed."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import Counts, Server


class Folder(Server):
    lease_option = "lease_seconds=1"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = f"spool:///{folder}"

    def _names(self, queue: str, folder: str) -> list[str]:
        path = self._folder / queue / folder
        return [file.name for file in path.iterdir()] if path.exists() else []

    def counts(self, queue: str) -> Counts:
        ready = self._names(queue, "ready")
        due = sum(float(name.partition("-")[0]) <= time.time() for name in ready)
        return Counts(due, len(ready) - due, len(self._names(queue, "dead")))

    def consumers(self, queue: str) -> int:
        return len(self._names(queue, "held"))

    def delete(self, queue: str) -> None:
        shutil.rmtree(self._folder / queue, ignore_errors=True)


@contextmanager
def shared(directory: Path) -> Iterator[Server]:
    yield Folder(directory)
