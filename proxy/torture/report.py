"""The report of a torture run: its figures, which of them are promises, and how both are printed.

A `Comparison` has two reports on another proxy: of it alone, and of it behind this one.

Pure: takes values, returns text.
"""

import json
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the report. `is_kept` says whether the promise was kept; None if the figure is no promise."""

    name: str
    value: int | float | None
    note: str = ""
    is_kept: bool | None = None

    def as_line(self, width: int) -> str:
        """Return the row of the table; `width` is that of the column of names, in characters."""
        mark = {True: "kept", False: "BROKEN", None: ""}[self.is_kept]
        return f"  {self.name:<{width}}  {_number(self.value):>12}  {mark:<6}  {self.note}".rstrip()


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of a run."""

    figures: tuple[Figure, ...]

    def __getitem__(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)

    @property
    def broken(self) -> list[str]:
        """The names of the promises that were broken."""
        return [figure.name for figure in self.figures if figure.is_kept is False]

    @property
    def is_kept(self) -> bool:
        """Whether every promise was kept."""
        return not self.broken

    @property
    def verdict(self) -> str:
        """One sentence that names the broken promises."""
        return f"Broken: {', '.join(self.broken)}." if self.broken else "Every promise was kept."

    def as_text(self) -> str:
        """Return the table and a line with the verdict."""
        width = max(len(figure.name) for figure in self.figures)
        lines = [figure.as_line(width) for figure in self.figures]
        return "\n".join([*lines, "", self.verdict])

    def as_json(self) -> str:
        """Return the same as JSON: `kept`, `broken`, and `figures` by name."""
        return json.dumps(self.as_document(), indent=2)

    def as_document(self) -> dict[str, Any]:
        """Return what `as_json` prints."""
        figures = {
            figure.name: {"value": figure.value, "kept": figure.is_kept, "note": figure.note}
            for figure in self.figures
        }
        return {"kept": self.is_kept, "broken": self.broken, "figures": figures}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs with the same calls and limits: another proxy alone, and the same one behind this proxy.

    Both reports have the same figures in the same order.
    """

    alone: Report
    behind: Report

    @property
    def is_kept(self) -> bool:
        """Whether every promise was kept behind this proxy. What the other one does alone is not judged."""
        return self.behind.is_kept

    def as_text(self) -> str:
        """Return the table with a column for each run and the notes of the second one, and both verdicts."""
        width = max(len(figure.name) for figure in self.alone.figures)
        lines = [f"  {'':<{width}}  {'alone':>12}            {'behind':>12}"]
        for alone, behind in zip(self.alone.figures, self.behind.figures, strict=True):
            first = replace(alone, note="").as_line(width)
            second = replace(behind, name="").as_line(0)
            lines.append(f"{first:<{width + 24}}{second}")
        return "\n".join([*lines, "", f"Alone: {self.alone.verdict}", f"Behind this proxy: {self.behind.verdict}"])

    def as_json(self) -> str:
        """Return the same as JSON: `kept`, and the reports `alone` and `behind`."""
        reports = {"alone": self.alone.as_document(), "behind": self.behind.as_document()}
        return json.dumps({"kept": self.is_kept, **reports}, indent=2)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
