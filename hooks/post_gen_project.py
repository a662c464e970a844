"""Makes one service of the rendered tree: its handlers, its broker, and the list of the template's files.

Standard library only, offline, and the same after a second time: what exists already is the user's.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ANSWERS = json.loads(r"""{{ cookiecutter | public_answers | jsonify }}""")
HANDLERS = json.loads(r"""{{ cookiecutter.handlers | handler_classes | jsonify }}""")
BROKERS = json.loads(r"""{{ cookiecutter._brokers | jsonify }}""")

PACKAGE = Path("src") / ANSWERS["package_name"]
RUNTIME = PACKAGE / "runtime"
RUNTIME_TESTS = Path("tests/runtime")
STUBS = Path("stubs")
MANIFEST = RUNTIME / "MANIFEST.sha256"


def main() -> None:
    Path(__file__).unlink()  # this rendered copy, which cookiecutter would leave in the temporary folder
    if STUBS.exists():
        write_handlers()
        prune_other_brokers()
    drop_bytecode()
    write_manifest()
    print_next_steps()


def write_handlers() -> None:
    """One handler and one test for each name, and the registry, from the stubs; then no stubs."""
    stub = STUBS / ANSWERS["handler_stub"]
    write(PACKAGE / "handlers/__init__.py", registry((STUBS / "registry.py").read_text(encoding="utf-8")))
    for name, class_name in HANDLERS.items():
        for source, target in (
            ("handler.py", PACKAGE / f"handlers/{name}.py"),
            ("test_handler.py", Path(f"tests/handlers/test_{name}.py")),
        ):
            write(target, named((stub / source).read_text(encoding="utf-8"), name, class_name))
    shutil.rmtree(STUBS)


def registry(stub: str) -> str:
    """The stub with each line about its one handler repeated for every handler."""
    lines = stub.splitlines(keepends=True)
    return "".join(
        named(line, name, HANDLERS[name])
        for line in lines
        for name in (sorted(HANDLERS, key=natural_order) if "order_created" in line else [...])
    )
