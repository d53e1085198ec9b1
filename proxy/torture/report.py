"""The report of a torture run: its figures, which of them are promises, and how both are printed.

Pure: takes values, returns text.
"""

import json
from dataclasses import dataclass


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

    def as_text(self) -> str:
        """Return the table and a line with the verdict."""
        width = max(len(figure.name) for figure in self.figures)
        lines = [figure.as_line(width) for figure in self.figures]
        verdict = f"Broken: {', '.join(self.broken)}." if self.broken else "Every promise was kept."
        return "\n".join([*lines, "", verdict])

    def as_json(self) -> str:
        """Return the same as JSON: `kept`, `broken`, and `figures` by name."""
        figures = {
            figure.name: {"value": figure.value, "kept": figure.is_kept, "note": figure.note}
            for figure in self.figures
        }
        return json.dumps({"kept": self.is_kept, "broken": self.broken, "figures": figures}, indent=2)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
