"""A service of this template, and a server for it, for the programs here that run one.

``tasks.py`` sees to it that they find this module, and that cookiecutter and uv are installed.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent
BIN = "Scripts" if os.name == "nt" else "bin"


def scaffold(folder: Path, *answers: str, handler: str | None = None) -> Path:
    """Render a service into the empty folder, with answers like ``broker=nats``; returns where it is.

    Without an answer it is the default one; ``handler`` is the text for its one handler.
    """
    command = ["cookiecutter", str(ROOT), "--no-input", "--default-config", "-o", str(folder)]
    # Its output is what a user would do next.
    _python(*command, *answers, stdout=subprocess.DEVNULL)
    [project] = folder.iterdir()
    if handler is not None:
        [file] = (project / "src").glob("*/handlers/order_created.py")
        file.write_text(handler, encoding="utf-8")
    return project


def install(project: Path) -> Path:
    """Make an environment with the service in it; returns its program."""
    environment = project / ".venv"
    _python("uv", "venv", "--quiet", str(environment))
    python = environment / BIN / ("python.exe" if os.name == "nt" else "python")
    _python("uv", "pip", "install", "--quiet", "--python", str(python), str(project))
    return environment / BIN / ("order-events.exe" if os.name == "nt" else "order-events")


class Server(NamedTuple):
    """One that a service's own suite runs on."""

    what: str
    variables: dict[str, str]
    """The environment variables that name it; none where the suite finds one by itself."""
    arguments: list[str]
    """For pytest: the tests that it is for, and how many run at once."""


def servers_of(broker: str) -> list[Server]:
    """Those that it takes to run the whole suite of a service."""
    if broker == "sqs":
        # Its stand-in is too slow for two tests at once: leases of a second run out meanwhile.
        return [Server("", {}, ["-n", "0"])]
    given = os.environ.get("CONSUMER_TEST_BROKER_URL", "").startswith("kafka")
    if broker != "kafka" or given or "CONSUMER_TEST_BROKER_COMMAND" in os.environ:
        return [Server("", {}, [])]
    # Neither of the two that stand in for Kafka can do all of it.
    of_groups = _kafka_servers().REBALANCE_TESTS
    return [
        Server("on noida-db", kafka_server("noida-db"), []),
        Server("those of groups, on Tansu", kafka_server("tansu"), of_groups),
    ]


def kafka_server(name: str) -> dict[str, str]:
    """The variables for one of the servers that speak Kafka's protocol."""
    variables: dict[str, str] = _kafka_servers().variables()[name]
    return variables


def _kafka_servers() -> Any:
    """The module that has them, of the template's own tests."""
    sys.path.append(str(ROOT / "tests"))
    return import_module("kafka_servers")


def _python(module: str, *arguments: str, stdout: int | None = None) -> None:
    """Run the module; where it fails it has said why, and this program ends with its exit code."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=stdout)
    if done.returncode != 0:
        print(f"{module} {arguments[0]} failed; see above.", file=sys.stderr)
        sys.exit(done.returncode)
