"""A service of this template, and a server for it, for the programs here that run one.

``tasks.py`` sees to it that they find this module, and that cookiecutter and uv are installed.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

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


def kafka_server(name: str) -> dict[str, str]:
    """The variables for one of the servers that speak Kafka's protocol."""
    variables: dict[str, str] = import_kafka_servers().variables()[name]
    return variables


def import_kafka_servers() -> Any:
    """The module that has them, of the template's own tests."""
    sys.path.append(str(ROOT / "tests"))
    return import_module("kafka_servers")


def _python(module: str, *arguments: str, stdout: int | None = None) -> None:
    """Run the module; where it fails it has said why, and this program ends with its exit code."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=stdout)
    if done.returncode != 0:
        print(f"{module} {arguments[0]} failed; see above.", file=sys.stderr)
        sys.exit(done.returncode)
