from pathlib import Path

import pytest

from invoices.billing import invoice, keep


def test_an_invoice_says_what_is_to_be_paid() -> None:
    assert invoice("A-1", 1234) == "Order A-1: 12.34 EUR"


def test_nothing_is_not_billed() -> None:
    with pytest.raises(ValueError, match="costs nothing"):
        invoice("A-1", 0)


def test_an_invoice_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVOICES_FOLDER", str(tmp_path / "kept"))
    keep("A-1", "text")
    assert (tmp_path / "kept/A-1.txt").read_text() == "text"
