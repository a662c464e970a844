# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The embedded broker in the tests: a file that any SQLite client can read."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from . import Counts, Server

COUNTS = """
SELECT
    count(*) FILTER (WHERE due_at <= :now AND (consumer IS NULL OR consumer NOT IN
        (SELECT id FROM consumers WHERE expires_at > :now))),
    count(*) FILTER (WHERE due_at > :now AND consumer IS NULL),
    (SELECT count(*) FROM dead_letters WHERE source = :queue),
    count(*) FILTER (WHERE consumer IN
        (SELECT id FROM consumers WHERE expires_at > :now))
FROM messages WHERE source = :queue
"""


class SqliteFile(Server):
    """A file has no server process to kill or to start."""

    lease_option = "lease_seconds=1"

    def __init__(self, file: Path) -> None:
        self.file = file
        self.url = f"sqlite:///{file.as_posix()}"

    def counts(self, queue: str) -> Counts:
        if not self.file.exists():
            return Counts(0, 0, 0)
        with closing(sqlite3.connect(self.file)) as connection:
            try:
                row = connection.execute(COUNTS, {"queue": queue, "now": time.time()}).fetchone()
            except sqlite3.OperationalError:  # the service is creating its tables
                return Counts(0, 0, 0)
        return Counts(*row)

    def consumers(self, queue: str) -> int:
        if not self.file.exists():
            return 0
        live = "SELECT count(*) FROM consumers WHERE source = ? AND expires_at > ?"
        with closing(sqlite3.connect(self.file)) as connection:
            return int(connection.execute(live, (queue, time.time())).fetchone()[0])

    def delete(self, queue: str) -> None:
        if self.file.exists():
            with closing(sqlite3.connect(self.file)) as connection, connection:
                for table in ("messages", "dead_letters", "consumers"):
                    connection.execute(f"DELETE FROM {table} WHERE source = ?", (queue,))


@contextmanager
def shared(directory: Path) -> Iterator[Server]:
    yield SqliteFile(directory / "queues.db")
