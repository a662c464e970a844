# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Checks that the vendored files are unmodified, for ``check --vendored`` and tests/runtime/test_drift.py."""

import hashlib
from pathlib import Path

from ..errors import UsageError

PACKAGE = Path(__file__).resolve().parents[2]
CHECKOUT = PACKAGE.parents[1]
"""The service's folder, unless the package was installed elsewhere."""

MANIFEST = "MANIFEST.sha256"
"""One line for each file, as sha256sum writes it, with its path from the service's folder."""

ADVICE = (
    "move your own code out of the vendored folders, or propose it to the template;"
    " tools/update.py merges the template's changes"
)


def find_drift(checkout: Path = CHECKOUT, package: str = PACKAGE.name) -> tuple[list[str], int]:
    """Compare the runtime and its tests with their hashes in the manifest. Raises UsageError.

    Returns what differs, each like ``edited: path``, then the advice; and the number of files in the manifest.
    """
    runtime, tests = checkout / "src" / package / "runtime", checkout / "tests/runtime"
    manifest = runtime / MANIFEST
    if not tests.is_dir():
        msg = f"the vendored files can be compared in a checkout of the service; {checkout} is not one"
        raise UsageError(msg)
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UsageError(
            f"{MANIFEST} is missing: it was deleted, or the template's hooks did not run"
            " (cookiecutter --accept-hooks no); render the project again with its hooks"
        ) from None
    expected = {path: sha256 for sha256, path in (line.split("  ", 1) for line in lines)}
    found = {
        file.relative_to(checkout).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in (runtime, tests)
        for file in folder.rglob("*")
        if file.is_file() and file != manifest and "__pycache__" not in file.parts
    }
    differences = [
        *(f"edited: {path}" for path in expected.keys() & found if expected[path] != found[path]),
        *(f"added: {path}" for path in found.keys() - expected),
        *(f"deleted: {path}" for path in expected.keys() - found),
    ]
    return [*sorted(differences), ADVICE] if differences else [], len(expected)
