"""The programs behind tasks.py: each runs as ``python -m tools.NAME``, with the paths that tasks.py sets."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The template's repository."""
TREE = ROOT / "{{cookiecutter.project_slug}}"
"""The template of a service."""
PACKAGE = TREE / "src/{{cookiecutter.package_name}}"
"""The folder of the runtime: `runtime` is imported from here, without rendering."""
