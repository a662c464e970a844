# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""The template's files are as they came: an edit, an addition and a deletion are all seen.

Change the template and update, not these files; or take them over by deleting this test and the manifest.
`{{ cookiecutter.project_slug }} check --vendored` says the same.
"""

import shutil
from pathlib import Path

import pytest

from runtime import vendored

CHECKOUT = Path(__file__).resolve().parents[2]
RUNTIME, TESTS = "src/{{ cookiecutter.package_name }}/runtime", "tests/runtime"


def test_the_files_of_the_template_are_as_they_came() -> None:
    drift = vendored.find_drift(CHECKOUT)
    assert not drift, f"\n{drift}"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the template's files in this project, to spoil."""
    for folder in (RUNTIME, TESTS):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / folder, tmp_path / folder, ignore=ignored)
    return tmp_path


def test_an_edit_an_addition_and_a_deletion_are_named(copy: Path) -> None:
    before = vendored.find_drift(copy)
    (copy / RUNTIME / "logs.py").write_text("# ours\n", encoding="utf-8")
    (copy / RUNTIME / "ours.py").touch()
    (copy / TESTS / "test_drift.py").unlink()
    after = vendored.find_drift(copy)
    assert set(after.edited) - set(before.edited) <= {f"{RUNTIME}/logs.py"}
    assert set(after.added) - set(before.added) == {f"{RUNTIME}/ours.py"}
    assert set(after.deleted) - set(before.deleted) == {f"{TESTS}/test_drift.py"}
    assert f"edited: {RUNTIME}/logs.py" in str(after)
    assert vendored.ADVICE in str(after)


def test_without_the_list_or_outside_of_a_checkout_it_is_one_sentence(copy: Path) -> None:
    (copy / RUNTIME / vendored.MANIFEST).unlink()
    with pytest.raises(vendored.NotComparable, match=r"MANIFEST\.sha256 is missing"):
        vendored.find_drift(copy)
    shutil.rmtree(copy / TESTS)
    with pytest.raises(vendored.NotComparable, match="in a checkout of the service"):
        vendored.find_drift(copy)
