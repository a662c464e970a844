"""Drift of vendored files: an edit, an addition and a deletion are named."""

import hashlib
import shutil
from pathlib import Path

import pytest

from runtime.errors import UsageError
from runtime.operate import vendored

RUNTIME, TESTS = "src/orders/runtime", "tests/runtime"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A service with three vendored files."""
    files = [f"{RUNTIME}/logs.py", f"{RUNTIME}/message.py", f"{TESTS}/test_drift.py"]
    hashes = []
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {name}\n", encoding="utf-8")
        hashes.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {name}\n")
    (tmp_path / RUNTIME / vendored.MANIFEST).write_text("".join(hashes), encoding="utf-8")
    return tmp_path


def test_unmodified_files_are_no_drift(checkout: Path) -> None:
    drift, file_count = vendored.find_drift(checkout, "orders")
    assert not drift
    assert file_count == 3


def test_an_edit_an_addition_and_a_deletion_are_named(checkout: Path) -> None:
    (checkout / RUNTIME / "logs.py").write_text("# ours\n", encoding="utf-8")
    (checkout / RUNTIME / "ours.py").touch()
    (checkout / TESTS / "test_drift.py").unlink()
    drift, _ = vendored.find_drift(checkout, "orders")
    assert drift == [
        f"added: {RUNTIME}/ours.py",
        f"deleted: {TESTS}/test_drift.py",
        f"edited: {RUNTIME}/logs.py",
        vendored.ADVICE,
    ]


def test_without_the_manifest_or_outside_of_a_checkout_it_is_one_sentence(checkout: Path) -> None:
    (checkout / RUNTIME / vendored.MANIFEST).unlink()
    with pytest.raises(UsageError, match=r"MANIFEST\.sha256 is missing"):
        vendored.find_drift(checkout, "orders")
    shutil.rmtree(checkout / TESTS)
    with pytest.raises(UsageError, match="in a checkout of the service"):
        vendored.find_drift(checkout, "orders")
