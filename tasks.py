"""python3 tasks.py demo | test | bench | chaos | mutate | coverage | lint | docs | example | fleet | pictures | release

demo      a service from this template: scaffolded, run, stopped and started again, with nothing lost
test      the template's own tests; arguments go to pytest
bench     the benchmarks, printed as a table
chaos     a service, its processes, its broker and the network are killed, stopped and cut: is anything lost?
mutate    the runtime is broken in one small way after the other: do its tests notice?
coverage  of the runtime by its own tests, branch by branch
lint      ruff and mypy
docs      the documentation site, into .cache/site; a broken link is an error
example   examples/order-events, rendered anew
fleet     a table of services: version, drift, broker, drain seconds
pictures  the drawings in docs/pictures, from the log of a service that is stopped
release   X.Y.Z: the version in all its places, if CHANGELOG.md has upgrade notes for it

Needs Python 3.11 and pip, or uv; makes .venv here by itself. Standard library only, on any system.
"""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")

TREE = "{{cookiecutter.project_slug}}"
PYTHON_FILES = [
    *(
        "demo.py",
        "fleet.py",
        "local_extensions.py",
        "release.py",
        "scaffold.py",
        "tasks.py",
        "hooks",
        "tests",
        "benchmarks",
        "chaos",
        "proof",
        "docs",
        *("examples/before", "examples/render.py"),  # the service beside them has rules of its own
    ),
    # The rest of the tree is Python only once it is rendered; the tests check it then.
    *(f"{TREE}/src", f"{TREE}/stubs", f"{TREE}/tools"),
]

COMMANDS = {
    "demo": [["demo.py"]],
    "test": [["-m", "pytest"]],
    "bench": [["benchmarks/run.py"]],
    "docs": [["docs/write_reference.py"], ["docs/build.py"]],
    "example": [["-m", "examples.render"]],
    "chaos": [["chaos/run.py"]],
    "mutate": [["proof/mutate.py"]],
    "coverage": [["proof/cover.py"]],
    "fleet": [["fleet.py"]],
    "pictures": [["docs/pictures/draw.py"]],
    "release": [["release.py"]],
    "lint": [
        ["-m", "ruff", "check", *PYTHON_FILES],
        ["-m", "ruff", "format", "--check", *PYTHON_FILES],
        ["-m", "mypy"],
        ["-m", "mypy", "chaos"],  # programs of their own, some with modules of one name
        ["-m", "mypy", "benchmarks"],
    ],
}


def requirements(group: str) -> list[str]:
    """The requirements of a dependency group in pyproject.toml, with those of the groups it includes."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "dependency-groups"
    ]
    found: list[str] = []
    for entry in groups[group]:
        found += [entry] if isinstance(entry, str) else requirements(entry["include-group"])
    return found


def bootstrap(group: str) -> None:
    """Make .venv, and install what the group needs unless just that is installed already."""
    wanted = "\n".join(requirements(group))
    stamp = ENVIRONMENT / f".installed-{group}"
    if PYTHON.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    if wanted:
        print(f"Installing what `{group}` needs into .venv ...", flush=True)
    if not PYTHON.exists():
        # Without pip of its own: that costs more than all the rest, and Debian's Python may lack it.
        venv.create(ENVIRONMENT, clear=True, with_pip=False)
    if uv := shutil.which("uv"):
        installer = [uv, "pip", "install", "--quiet", "--python", str(PYTHON)]
    else:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        installer = [*pip, "--python", str(PYTHON), "install", "--quiet"]
    if wanted:
        subprocess.run([*installer, *wanted.splitlines()], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def run(command: list[str], environment: dict[str, str]) -> int:
    """Run the command here; returns its exit code, 128 + n if signal n ended it."""
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        while process.poll() is None:
            with suppress(KeyboardInterrupt):  # the command got it too, and ends in its own way
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
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment["PYTHONPATH"] = str(ROOT)  # for scaffold.py
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # these tasks start Python hundreds of times
    exit_codes = (run([str(PYTHON), *command, *rest], environment) for command in COMMANDS[task])
    return next(filter(None, exit_codes), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
