"""The steps of a page of docs/, to follow them: its commands, and the files that it shows."""

import re
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(console|python|proto)\n(.*?)^```", re.M | re.S)
SOMEWHERE = "gh:OWNER/cookiecutter-consumer"
"""The template's place in the pages."""


def section_of(page: Path, heading: str) -> str:
    """The text below this heading; the whole text without a heading."""
    text = page.read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0] if heading else text


def steps(page: Path, heading: str = "") -> Iterator[tuple[str, str]]:
    """The steps in the order of the page: each file with its text; and each command, with an empty file name."""
    for language, block in BLOCK.findall(section_of(page, heading)):
        if language == "console":
            for line in block.splitlines():
                assert line.startswith("$ "), line
                yield "", line.removeprefix("$ ")
        else:
            first_line, _, text = block.partition("\n")
            yield re.sub("^(#|//) ", "", first_line), text
