"""What an invoice says, and where it is kept."""

import os
from pathlib import Path

from jinja2 import Template

TEXT = Template("Order {{ reference }}: {{ '%.2f' % (cents / 100) }} EUR")


def invoice(reference: str, cents: int) -> str:
    if cents <= 0:
        raise ValueError(f"order {reference} costs nothing")
    return str(TEXT.render(reference=reference, cents=cents))


def keep(reference: str, text: str) -> None:
    folder = Path(os.environ["INVOICES_FOLDER"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{reference}.txt").write_text(text, encoding="utf-8")
