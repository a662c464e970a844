"""python3 tasks.py demo | test | servers | bench | chaos | mutate | coverage | lint | docs | example | fleet | pictures | release

demo      render a service, run it, shut it down and start it again; counts lost messages
test      run the tests that take a few minutes; --all for every test; other arguments go to pytest
servers   run the brokers' tests on newer servers, from other Debian releases, PyPI and Maven Central
bench     run the benchmarks, and print them as a table
chaos     kill and stop processes and brokers, cut the network, and check that no message is lost
mutate    make small changes to the runtime, and check that its tests fail
coverage  measure the branches of the runtime that its tests cover
lint      run ruff and mypy
docs      write docs/reference.md, then the documentation site in .cache/site; a broken link is an error
example   render examples/order-events again
fleet     print a table of services: version, drift, broker, drain seconds
pictures  draw docs/pictures from the log of a graceful shutdown and the metrics of a service
release   X.Y.Z: set the version everywhere, if CHANGELOG.md has upgrade notes for it

The modules of each task are in tools/: see COMMANDS. Needs Python 3.11 and pip, or uv; installs the rest into .venv.
"""

import os
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")

TREE = "{{cookiecutter.project_slug}}"
PYTHON_PATH = [
    ROOT,  # the package tools
    ROOT / TREE / "src/{{cookiecutter.package_name}}",  # the package runtime, where it lies
    ROOT / TREE / "tests/runtime",  # the package harness
]
"""Where every command finds its modules."""
LINTED = [
    *("local_extensions.py", "tasks.py", "hooks", "tools", "tests"),
    *("examples/before", "examples/lost_item.py"),  # the service beside them has its own rules
    # The rest of the tree is Python only once it is rendered; the tests check it then.
    *(f"{TREE}/src", f"{TREE}/stubs", f"{TREE}/tests/runtime", f"{TREE}/tools"),
]

COMMANDS = {
    "demo": [["-m", "tools.demo"]],
    "test": [["-m", "tools.test"]],
    "servers": [["-m", "tools.servers"]],
    "bench": [["-m", "tools.benchmarks"]],
    "chaos": [["-m", "tools.chaos"]],
    "mutate": [["-m", "tools.mutation.mutate"]],
    "coverage": [["-m", "tools.mutation.coverage"]],
    "lint": [
        ["-m", "ruff", "check", *LINTED],
        ["-m", "ruff", "format", "--check", *LINTED],
        ["-m", "mypy"],
    ],
    "docs": [["-m", "tools.reference"], ["-m", "tools.site"]],
    "example": [["-m", "tools.example"]],
    "fleet": [["-m", "tools.fleet"]],
    "pictures": [["-m", "tools.pictures"], ["-m", "tools.dashboard"]],
    "release": [["-m", "tools.release"]],
}
"""The arguments of Python for each command; its requirements are the group of its name in pyproject.toml."""


def dependency_groups() -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = tomllib.loads(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )["dependency-groups"]
    return groups


def requirements(group: str) -> list[str]:
    """The requirements of a dependency group in pyproject.toml, with those of the groups it includes."""
    found: list[str] = []
    for entry in dependency_groups()[group]:
        found += [entry] if isinstance(entry, str) else requirements(entry["include-group"])
    return found


def bootstrap(group: str) -> None:
    """Make .venv, and install the group's requirements unless exactly these are installed."""
    wanted = "\n".join(requirements(group))
    stamp = ENVIRONMENT / f".installed-{group}"
    if PYTHON.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    if wanted:
        print(f"Installing what `{group}` needs into .venv ...", flush=True)
    if not PYTHON.exists():
        # Without its own pip: that costs more than everything else, and Debian's Python may lack it.
        venv.create(ENVIRONMENT, clear=True, with_pip=False)
    if wanted:
        install(wanted.splitlines())
    stamp.write_text(wanted, encoding="utf-8")


def install(packages: list[str]) -> None:
    """Install into .venv by uv, which is several times as fast; by pip if uv cannot, since only pip may know the index."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(PYTHON)]
    pip += ["install", "--quiet"]
    uv = shutil.which("uv") or shutil.which("uv", path=str(BIN))
    bounds = [one for group in dependency_groups().values() for one in group if "uv>" in one]
    if uv is None and bounds:
        subprocess.run([*pip, bounds[0]], check=True)
        uv = str(BIN / "uv")
    by_uv = [uv, "pip", "install", "--quiet", "--python", str(PYTHON), *packages] if uv else []
    if not by_uv or subprocess.run(by_uv, env=environment(), check=False).returncode != 0:
        subprocess.run([*pip, *packages], check=True)


def environment() -> dict[str, str]:
    """The environment variables of a command: the programs of .venv first, and the module paths."""
    variables = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, PYTHON_PATH))
    # Trust a company's certificates too, like pip.
    variables.setdefault("UV_SYSTEM_CERTS", "1")
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # these commands start Python hundreds of times
    return variables


def run(command: list[str]) -> int:
    """Run the command here; returns its exit code, 128 + n if signal n ended it."""
    with subprocess.Popen(command, cwd=ROOT, env=environment()) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while process.poll() is None:
            with suppress(KeyboardInterrupt):  # the command got it too, and ends by itself
                process.wait()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        given = repr(arguments[0]) if arguments else "nothing"
        print(f"tasks.py knows {', '.join(COMMANDS)}; it was given {given}.", file=sys.stderr)
        return 2
    task, *rest = arguments
    try:
        bootstrap(task)
    except subprocess.CalledProcessError as error:
        print(f"tasks.py could not install what {task!r} needs; see above.", file=sys.stderr)
        return error.returncode
    except KeyboardInterrupt:
        return 130
    exit_codes = (run([str(PYTHON), *command, *rest]) for command in COMMANDS[task])
    return next(filter(None, exit_codes), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
