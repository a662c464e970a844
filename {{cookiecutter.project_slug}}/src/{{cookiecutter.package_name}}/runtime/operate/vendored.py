# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Whether the vendored files are unmodified: for ``check --vendored`` and tests/runtime/test_drift.py."""

import hashlib
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Drift:
    """The paths that differ from the manifest, sorted; and the number of files in it."""

    edited: list[str]
    added: list[str]
    deleted: list[str]
    file_count: int

    def __bool__(self) -> bool:
        return bool(self.edited or self.added or self.deleted)

    def __str__(self) -> str:
        lines = [
            f"{what}: {path}"
            for what in ("edited", "added", "deleted")
            for path in getattr(self, what)
        ]
        return "\n".join([*lines, ADVICE])


def find_drift(checkout: Path = CHECKOUT, package: str = PACKAGE.name) -> Drift:
    """Compare the runtime and its tests with their hashes in the manifest. Raises UsageError."""
    runtime, tests = checkout / "src" / package / "runtime", checkout / "tests/runtime"
    manifest = runtime / MANIFEST
    if not tests.is_dir():
        msg = f"the vendored files can be compared in a checkout of the service; {checkout} is not one"
        raise UsageError(msg)
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        msg = (
            f"{MANIFEST} is missing: it was deleted, or the template's hooks did not run"
            " (cookiecutter --accept-hooks no); render the project again with its hooks"
        )
        raise UsageError(msg) from None
    expected = {path: sha256 for sha256, path in (line.split("  ", 1) for line in lines)}
    found = {
        file.relative_to(checkout).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in (runtime, tests)
        for file in folder.rglob("*")
        if file.is_file() and file != manifest and "__pycache__" not in file.parts
    }
    return Drift(
        edited=sorted(
            path for path in expected.keys() & found.keys() if expected[path] != found[path]
        ),
        added=sorted(found.keys() - expected.keys()),
        deleted=sorted(expected.keys() - found.keys()),
        file_count=len(expected),
    )
