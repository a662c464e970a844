"""Renders a service and installs it, for the programs here that run a generated one.

Needs cookiecutter and uv, which ``tasks.py`` has installed.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools import ROOT

BIN = "Scripts" if os.name == "nt" else "bin"


def scaffold(
    folder: Path, *answers: str, handler: str | None = None, template: Path = ROOT
) -> Path:
    """Render a service into the empty folder, with answers like ``broker=nats``; returns its path.

    A question without an answer gets its default; ``handler`` replaces the text of its one handler.
    """
    command = [
        "cookiecutter",
        str(template),
        "--no-input",
        "--default-config",
        "-o",
        str(folder.resolve()),
    ]
    # Its output is the next steps of a user.
    # It runs in the folder with the local_extensions.py that it needs.
    _python(*command, *answers, stdout=subprocess.DEVNULL, cwd=template)
    [project] = folder.iterdir()
    if handler is not None:
        [file] = (project / "src").glob("*/handlers/order_created.py")
        file.write_text(handler, encoding="utf-8")
    return project


def install(project: Path) -> Path:
    """Make a virtual environment with the service in it; returns the path of its program."""
    environment = project / ".venv"
    _python("uv", "venv", "--quiet", str(environment))
    python = environment / BIN / ("python.exe" if os.name == "nt" else "python")
    _python("uv", "pip", "install", "--quiet", "--python", str(python), str(project))
    return environment / BIN / ("order-events.exe" if os.name == "nt" else "order-events")


def user_environment() -> dict[str, str]:
    """This process's environment without PYTHONPATH, which would show an installed service the template's modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _python(module: str, *arguments: str, **options: Any) -> None:
    """Run the module; if it fails, it has printed the reason, and this program ends with its exit code."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], **options)
    if done.returncode != 0:
        print(f"{module} {arguments[0]} failed; see above.", file=sys.stderr)
        sys.exit(done.returncode)
