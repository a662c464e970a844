# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""The template's files are as they came: an edit, an addition and a deletion are all seen.

Change the template and update, not these files; or take them over by deleting this test and the manifest.
"""

import hashlib
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
RUNTIME = PROJECT / "src/{{ cookiecutter.package_name }}/runtime"
MANIFEST = RUNTIME / "MANIFEST.sha256"


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """Path to SHA-256, of every file as it came."""
    assert MANIFEST.exists(), (
        "the template's hooks did not run (cookiecutter --accept-hooks no, or the file was deleted):"
        " render the project again, with its hooks"
    )
    lines = MANIFEST.read_text(encoding="utf-8").splitlines()
    return {path: sha256 for sha256, path in (line.split("  ", 1) for line in lines)}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """Path to SHA-256, of every file as it is."""
    files = [*RUNTIME.rglob("*"), *(PROJECT / "tests/runtime").rglob("*")]
    return {
        file.relative_to(PROJECT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and file != MANIFEST and "__pycache__" not in file.parts
    }


def test_no_file_of_the_template_was_edited(
    expected: dict[str, str], found: dict[str, str]
) -> None:
    assert [path for path in expected if found.get(path, expected[path]) != expected[path]] == []


def test_no_file_of_the_template_was_deleted(
    expected: dict[str, str], found: dict[str, str]
) -> None:
    assert sorted(expected.keys() - found.keys()) == []


def test_no_file_was_added_among_those_of_the_template(
    expected: dict[str, str], found: dict[str, str]
) -> None:
    assert sorted(found.keys() - expected.keys()) == []
