"""The pictures in the documents are drawn from a real graceful shutdown, and show its events."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from support.rendered import TEMPLATE, run_tool

NAMES = ("graceful", "deadline", "forced")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    run_tool("pictures", folder)
    return folder


def texts(picture: Path) -> list[str]:
    root = ElementTree.parse(picture).getroot()  # the file is our own
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    ("name", "outcomes", "last"),
    [
        ("graceful", ["acknowledged"] * 4, "exit code 0; 4 left in the queue"),
        (
            "deadline",
            ["acknowledged"] * 2 + ["requeued"] * 2,
            "exit code 75; 6 left in the queue",
        ),
        (
            "forced",
            ["acknowledged"] + ["requeued"] * 3,
            "exit code 130; 7 left in the queue",
        ),
    ],
)
def test_a_shutdown_is_drawn_as_it_was(
    drawn: Path, name: str, outcomes: list[str], last: str
) -> None:
    told = texts(drawn / f"stop-{name}.svg")
    assert sorted(line for line in told if not line[0].isdigit())[1:] == sorted(outcomes)
    moments = [line for line in told if re.match(r"-?\d+\.\d\d s  ", line)]
    assert moments[0].startswith("0.00 s  SIG")
    assert any("broker delivers no more; 3 not started are requeued" in line for line in moments)
    assert moments[-1].endswith(last)


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_in_the_documents_is_of_the_present_code(drawn: Path, name: str) -> None:
    """It has the same events; the times of two runs differ."""
    kept = TEMPLATE / f"docs/pictures/stop-{name}.svg"
    moment = re.compile(r"^-?\d+\.\d\d s  ")
    now, then = (
        sorted(moment.sub("", line) for line in texts(picture))
        for picture in (drawn / kept.name, kept)
    )
    assert now == then
