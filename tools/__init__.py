"""The programs behind tasks.py: each runs as ``python -m tools.NAME``, with the paths that tasks.py sets."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The template's repository."""
TREE = ROOT / "{{cookiecutter.project_slug}}"
"""What becomes a service."""
PACKAGE = TREE / "src/{{cookiecutter.package_name}}"
"""Where the runtime lies: `runtime` is imported from here, without rendering."""
