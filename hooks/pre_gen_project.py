"""Validates the answers once more: one sentence for each answer that local_extensions.py refuses.

Answers from prompts or the command line were validated before cookiecutter created the project's directory. This hook
catches the answers of `--replay`, which skips that step. In an existing project, it also saves the files that the
template does not own under these answers, or no longer owns: the other hook restores them.
"""

import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

[REFUSAL] = json.loads(r"""{{ [cookiecutter | refusal] | jsonify }}""")
TABLES = json.loads(
    r"""{{ [cookiecutter._brokers, cookiecutter._telemetries, cookiecutter._deploys, cookiecutter._cis] | jsonify }}"""
)
SLUG, PACKAGE = json.loads(
    r"""{{ [cookiecutter.project_slug, cookiecutter.package_name] | jsonify }}"""
)
SKIPPED = {".git", ".venv", "node_modules"}


def names(table: object) -> Iterator[str]:
    """Every text in the tables; some are names of files."""
    if isinstance(table, str):
        yield table.replace("{slug}", SLUG).replace("{package}", PACKAGE)
    elif isinstance(table, dict | list):
        for entry in table.values() if isinstance(table, dict) else table:
            yield from names(entry)


def main() -> None:
    Path(__file__).unlink()  # the rendered copy; cookiecutter does not delete it
    if REFUSAL:
        sys.exit(REFUSAL)
    endings = (
        *(f"/{name}" for name in names(TABLES) if name),
        "/settings.py",
        "/test_rehearsal.py",
    )
    saved = {}
    for folder, folders, files in os.walk("."):
        folders[:] = [name for name in folders if name not in SKIPPED]
        for path in (Path(folder, name) for name in files):
            wanted = f"/{path.as_posix()}".endswith((*endings, "/handlers.py"))
            if (wanted or path.parts[0] == "stubs") and path.is_file() and not path.is_symlink():
                saved[path.as_posix()] = base64.b64encode(path.read_bytes()).decode()
    if saved:
        Path(".saved-before-the-render").write_text(json.dumps(saved), encoding="utf-8")


main()
