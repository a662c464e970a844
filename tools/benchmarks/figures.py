"""The result of a benchmark: one row of the table, one line of JSON."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One quantity, measured once in each round; its median is compared with the target.

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


@dataclass(frozen=True)
class Outcome:
    """The outcome of one contender in one situation: a text for each column, from all repetitions."""

    part: str
    name: str
    cells: dict[str, str]

    def json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, part: str, name: str, repetitions: list[dict[str, object]]) -> "Outcome":
        """Of several repetitions: the value that was always the same, or the least and the most, or each text."""
        columns = {column: [row[column] for row in repetitions] for column in repetitions[0]}
        return cls(part, name, {column: _all_of(values) for column, values in columns.items()})


def from_json(line: str) -> "Figure | Outcome":
    """The result that `json` has written."""
    values = json.loads(line)
    if "cells" in values:
        return Outcome(**values)
    return Figure(**{name: values[name] for name in Figure.__dataclass_fields__})


def _all_of(values: list[Any]) -> str:
    texts = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in values]
    if len(set(texts)) > 1 and not isinstance(values[0], str):
        return f"{min(texts, key=float)} .. {max(texts, key=float)}"
    return " / ".join(dict.fromkeys(texts))


def rows(figures: list[Figure]) -> list[tuple[str, ...]]:
    return [figure.row() for figure in figures if figure.values]


def table(results: "list[Figure | Outcome]") -> str:
    """All results, under the name of their part."""
    figures = [result for result in results if isinstance(result, Figure)]
    head = ("", "median", "spread", "target", "met")
    widths = [max(map(len, column)) for column in zip(head, *rows(figures), strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        return f"  {'  '.join(map(str.ljust, cells, widths))}".rstrip()

    lines = [line(head)]
    for part, group in groupby(results, key=lambda result: result.part):
        lines += ["", part]
        for result in group:
            if isinstance(result, Outcome):
                lines.append(f"  {result.name}")
                lines += [f"    {name}: {cell}" for name, cell in result.cells.items()]
            else:
                lines.append(line(result.row()) if result.values else f"  {result.note}")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
