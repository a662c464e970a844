"""Run in a service: a message is handled, SIGKILL comes before its ack, and it is redelivered.

``python crash.py DATABASE SCHEMA PACKAGE``, in the folder of the service, where `harness` and `runtime` can be imported;
prints the result as JSON.
"""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

SERVICE_THAT_GETS_A_SIGNAL = """
import os, signal, sys
from importlib import import_module

package, signum = sys.argv.pop(), int(sys.argv.pop())
Handler = import_module(f"{package}.runtime.handlers").Handler
call = Handler.call


async def call_then_signal(*arguments):
    await call(*arguments)
    os.kill(os.getpid(), signum)


Handler.call = call_then_signal
sys.exit(import_module(f"{package}.__main__").run())
"""

Query = Callable[[str], list[Any]]


@contextmanager
def sqlite_database(folder: Path) -> Iterator[tuple[dict[str, str], Query]]:
    file = folder / "work.db"

    def query(statements: str) -> list[Any]:
        with closing(sqlite3.connect(file)) as connection, connection:
            if statements.startswith("CREATE"):
                return list(connection.executescript(statements))
            return list(connection.execute(statements))

    yield {"DATABASE": str(file)}, query


@contextmanager
def postgres_database(folder: Path) -> Iterator[tuple[dict[str, str], Query]]:
    """A separate schema, which is deleted afterwards."""
    from harness.servers import postgres

    with postgres.shared(folder) as server:
        assert isinstance(server, postgres.PostgresServer)
        schema = f"crash_{os.getpid()}"
        server.query(f"CREATE SCHEMA {schema}")
        url = f"{server.url}{'&' if '?' in server.url else '?'}options=-csearch_path%3D{schema}"

        def query(statements: str) -> list[Any]:
            rows = [
                postgres.PostgresServer(url).query(s) for s in statements.split(";") if s.strip()
            ]
            return list(rows[-1])

        try:
            yield {"DATABASE_URL": url}, query
        finally:
            server.query(f"DROP SCHEMA {schema} CASCADE")


def main(database: str, schema: str, package: str) -> dict[str, Any]:
    databases = {"sqlite": sqlite_database, "postgres": postgres_database}
    with (
        tempfile.TemporaryDirectory() as folder,
        databases[database](Path(folder)) as (variables, query),
    ):
        query(schema)
        queue = f"sqlite:///{folder}/queue.db?lease_seconds=0.5"
        environment = {**os.environ, **variables, "CONSUMER_BROKER_URL": queue}

        def run(*command: str) -> int:
            return subprocess.run(
                [sys.executable, *command], env=environment, stdout=sys.stderr, timeout=60
            ).returncode

        run("-m", package, "publish", '{"reference": "A-1001"}')
        exit_codes = [
            run("-c", SERVICE_THAT_GETS_A_SIGNAL, "run", signum, package) for signum in ("9", "15")
        ]
        with closing(sqlite3.connect(f"{folder}/queue.db")) as connection:
            ((left,),) = connection.execute("SELECT count(*) FROM messages")
        return {
            "exit codes": exit_codes,
            "left in the queue": left,
            "shipments": query("SELECT count(*) FROM shipments")[0][0],
            "handled": query("SELECT count(*) FROM handled")[0][0],
        }


if __name__ == "__main__":
    try:
        print(json.dumps(main(*sys.argv[1:])))
    except Exception as error:
        if type(error).__name__ != "ServerMissing":
            raise
        print(json.dumps({"missing": str(error)}))
