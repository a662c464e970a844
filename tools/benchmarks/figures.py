"""The result of a benchmark: one row of the table, one line of JSON."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from itertools import groupby


@dataclass(frozen=True)
class Figure:
    """One quantity, measured once in each round; its median is held against the target.

    A figure without values was not measured: ``note`` has the reason.
    """

    part: str
    name: str
    values: list[float] = field(default_factory=list)
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target or without values."""
        if not self.values or self.at_least is self.at_most is None:
            return None
        if self.at_least is not None and self.median < self.at_least:
            return False
        return self.at_most is None or self.median <= self.at_most

    def json(self) -> str:
        median = self.median if self.values else None
        return json.dumps({**asdict(self), "median": median, "met": self.met})

    @classmethod
    def from_json(cls, line: str) -> "Figure":
        """What `json` wrote."""
        values = json.loads(line)
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    def row(self) -> tuple[str, ...]:
        """Name, median, smallest and largest, target, whether it is met."""
        median, low, high = map(_short, (self.median, min(self.values), max(self.values)))
        spread = "" if low == high else f"{low} .. {high}"
        target = ""
        if self.at_least is not None:
            target = f">= {_short(self.at_least)}"
        if self.at_most is not None:
            target = f"<= {_short(self.at_most)}"
        met = {True: "yes", False: "NO", None: ""}[self.met]
        return (self.name, f"{median} {self.unit}".rstrip(), spread, target, met)


def rows(figures: list[Figure]) -> list[tuple[str, ...]]:
    return [figure.row() for figure in figures if figure.values]


def table(figures: list[Figure]) -> str:
    """All figures, under the name of their part."""
    head = ("", "median", "spread", "target", "met")
    widths = [max(map(len, column)) for column in zip(head, *rows(figures), strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        return f"  {'  '.join(map(str.ljust, cells, widths))}".rstrip()

    lines = [line(head)]
    for part, group in groupby(figures, key=lambda figure: figure.part):
        lines += ["", part]
        lines += [line(figure.row()) if figure.values else f"  {figure.note}" for figure in group]
    return "\n".join(lines)


def _short(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
