# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""Are the template's files as they came? For ``check --vendored`` and for tests/runtime/test_drift.py."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parents[1]
"""The service's folder, unless it was installed somewhere else."""

MANIFEST = "MANIFEST.sha256"
"""One line for each file, as sha256sum writes it, with its path from the service's folder."""

ADVICE = (
    "move what is yours out of the template's folders, or send it to the template;"
    " tools/update.py brings what changed there"
)


class NotComparable(Exception):
    """Why nothing can be compared, in one sentence."""


@dataclass(frozen=True)
class Drift:
    """The paths that differ from what came, sorted; and how many came."""

    edited: list[str]
    added: list[str]
    deleted: list[str]
    came: int

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
    """Compare the runtime and its tests with the hashes that they came with. Raises NotComparable."""
    runtime, tests = checkout / "src" / package / "runtime", checkout / "tests/runtime"
    manifest = runtime / MANIFEST
    if not tests.is_dir():
        msg = f"this compares the files in a checkout of the service, and {checkout} is none"
        raise NotComparable(msg)
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        msg = (
            f"{MANIFEST} is missing: it was deleted, or the template's hooks did not run"
            " (cookiecutter --accept-hooks no); render the project again, with its hooks"
        )
        raise NotComparable(msg) from None
    came = {path: sha256 for sha256, path in (line.split("  ", 1) for line in lines)}
    found = {
        file.relative_to(checkout).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in (runtime, tests)
        for file in folder.rglob("*")
        if file.is_file() and file != manifest and "__pycache__" not in file.parts
    }
    return Drift(
        edited=sorted(path for path in came.keys() & found.keys() if came[path] != found[path]),
        added=sorted(found.keys() - came.keys()),
        deleted=sorted(came.keys() - found.keys()),
        came=len(came),
    )
