"""The steps of a page of docs/, to follow them: its commands, and the files that it writes."""

import re
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(console|python|proto)\n(.*?)^```", re.M | re.S)
SOMEWHERE = "gh:OWNER/cookiecutter-consumer"
"""Where the pages say that the template is."""


def steps(page: Path) -> Iterator[tuple[str, str]]:
    """In the order of the page, each file with its text; and each command, with an empty name of a file."""
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "console":
            for line in block.splitlines():
                assert line.startswith("$ "), line
                yield "", line.removeprefix("$ ")
        else:
            first_line, _, text = block.partition("\n")
            yield re.sub("^(#|//) ", "", first_line), text
