# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A real PostgreSQL: the one that CONSUMER_TEST_BROKER_URL names, or a private one that is deleted afterwards."""

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import asyncpg

from . import Counts, PrivateServer, Server, ServerMissing
from .local import ServerContainer, ServerProcess, free_ports, has_docker

IMAGE = "postgres:17.6"
PASSWORD = "of-the-tests"

# Debian and Red Hat install the server's programs outside the path, and so does Homebrew for older versions.
FOLDERS = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql*/bin",
    "usr/local/opt/postgresql*/bin",
)

# Without its postmaster a backend ends by itself; until the last one has ended, the next postmaster refuses to start.
START = """
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do "$@"; sleep 0.25; done
"""

# The tests' own user needs no password; the users that tests create do.
ACCESS = """
host all postgres 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""

COUNTS = """
SELECT
    count(*) FILTER (WHERE due_at <= now() AND (consumer IS NULL OR consumer NOT IN
        (SELECT id FROM consumer.consumers WHERE expires_at > now()))),
    count(*) FILTER (WHERE due_at > now() AND consumer IS NULL),
    (SELECT count(*) FROM consumer.dead_letters WHERE source = $1),
    count(*) FILTER (WHERE consumer IN
        (SELECT id FROM consumer.consumers WHERE expires_at > now()))
FROM consumer.messages WHERE source = $1
"""
LIVE = "SELECT count(*) FROM consumer.consumers WHERE source = $1 AND expires_at > now()"


class PostgresServer(Server):
    """Reads the tables like any other client of the server."""

    lease_option = "lease_seconds=1"

    def __init__(self, url: str) -> None:
        self.url = url

    def counts(self, queue: str) -> Counts:
        try:
            return Counts(*self.query(COUNTS, queue)[0])
        except asyncpg.UndefinedTableError:
            return Counts(0, 0, 0)

    def consumers(self, queue: str) -> int:
        try:
            return int(self.query(LIVE, queue)[0][0])
        except asyncpg.UndefinedTableError:
            return 0

    def delete(self, queue: str) -> None:
        for table in ("messages", "dead_letters", "consumers"):
            try:
                self.query(f"DELETE FROM consumer.{table} WHERE source = $1", queue)
            except asyncpg.UndefinedTableError:
                return

    def query(self, statement: str, *arguments: object) -> list[Any]:
        """The rows of one statement, on its own connection."""

        async def ask() -> list[Any]:
            connection = await asyncpg.connect(self.url, timeout=10)
            try:
                rows: list[Any] = await connection.fetch(statement, *arguments)
                return rows
            finally:
                await connection.close()

        with ThreadPoolExecutor(1) as thread:  # the test may have an event loop of its own
            return thread.submit(asyncio.run, ask()).result()


class PrivatePostgres(PostgresServer, PrivateServer):
    """A private PostgreSQL on this port; ``data`` is its directory if that can be reached."""

    def __init__(self, port: int, instance: ServerProcess, data: Path | None = None) -> None:
        super().__init__(url_of(port))
        self.data = data
        self.instance = instance


def url_of(port: int) -> str:
    return f"postgres://postgres:{PASSWORD}@127.0.0.1:{port}/postgres"


@contextmanager
def _installed(programs: Path, directory: Path) -> Iterator[PrivatePostgres]:
    with as_no_root(directory) as (home, as_user):
        data = home / "data"
        initdb = [str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust"]
        made = subprocess.run(
            [*as_user, *initdb, "-E", "UTF8", "--no-locale", "--no-sync"],
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            raise ServerMissing(f"initdb failed: {made.stderr[-2000:]}")
        (data / "pg_hba.conf").write_text(ACCESS)
        (port,) = free_ports(1)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}
        # Files in its folder: a killed server would leave memory in /dev/shm.
        settings["dynamic_shared_memory_type"] = "mmap"
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        postgres = [str(programs / "postgres"), "-D", str(data), *options]
        command = [*as_user, "sh", "-c", START, "sh", *postgres]
        process = ServerProcess(command, home, lambda: _answers(port))
        try:
            yield PrivatePostgres(port, process, data)
        finally:
            process.close()


@contextmanager
def as_no_root(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    """A directory for the server, and the words before a command: PostgreSQL refuses to run as root."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield directory, []
        return
    import pwd  # not on Windows

    user = pwd.getpwnam("nobody")
    become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    if shutil.which("setpriv") is None:
        become = ["su", "-s", "/bin/sh", user.pw_name, "-c", 'exec "$@"', "--", "sh"]
    # Not in the directory of the tests, which only root may enter.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as home:
        os.chown(home, user.pw_uid, user.pw_gid)
        yield Path(home), become


@contextmanager
def _in_docker(directory: Path) -> Iterator[PrivatePostgres]:
    (port,) = free_ports(1)
    password = ("-e", f"POSTGRES_PASSWORD={PASSWORD}")
    container = ServerContainer(IMAGE, 5432, port, directory, lambda: _answers(port), *password)
    try:
        yield PrivatePostgres(port, container)
    finally:
        container.close()


def most_repeated(prefetch: int) -> float:
    """Leases are rows, and survive the server; only an outage longer than a lease could repeat messages."""
    return 0


def private(directory: Path) -> AbstractContextManager[PrivateServer]:
    programs = _programs()
    if programs is not None:
        return _installed(programs, directory)
    if has_docker():
        return _in_docker(directory)
    raise ServerMissing(
        "there is no PostgreSQL for the tests: CONSUMER_TEST_BROKER_URL names none, no initdb and "
        "postgres are installed, and there is no docker"
    )


def shared(directory: Path) -> AbstractContextManager[Server]:
    url = os.environ.get("CONSUMER_TEST_BROKER_URL", "")
    is_ours = url.startswith("postgres")
    return nullcontext(PostgresServer(url)) if is_ours else private(directory)


def _programs() -> Path | None:
    """The folder of the newest installed server; one on the path comes first."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).parent] if on_path is not None else []
    found = [folder for pattern in FOLDERS for folder in Path("/").glob(pattern)]
    folders += sorted(found, key=lambda folder: _numbers(str(folder)), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _answers(port: int) -> bool:
    try:
        PostgresServer(url_of(port)).query("SELECT 1")
    except (OSError, asyncpg.PostgresError):
        return False
    return True
