"""The report of a torture run: figures, the promises that hang on them, and how both are shown.

Pure: takes values, gives text.
"""

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report. `is_kept` is None where no promise hangs on it."""

    name: str
    value: int | float | None
    note: str = ""
    is_kept: bool | None = None

    def as_line(self, width: int) -> str:
        """A row of the table, whose names take so many characters."""
        mark = {True: "kept", False: "BROKEN", None: ""}[self.is_kept]
        return f"  {self.name:<{width}}  {_number(self.value):>12}  {mark:<6}  {self.note}".rstrip()


@dataclass(frozen=True, slots=True)
class Report:
    """What came out."""

    figures: tuple[Figure, ...]

    def __getitem__(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept."""
        return [figure.name for figure in self.figures if figure.is_kept is False]

    @property
    def is_kept(self) -> bool:
        """Whether every promise was."""
        return not self.broken

    def as_text(self) -> str:
        """A table, and the verdict in one line."""
        width = max(len(figure.name) for figure in self.figures)
        lines = [figure.as_line(width) for figure in self.figures]
        verdict = f"Broken: {', '.join(self.broken)}." if self.broken else "Every promise was kept."
        return "\n".join([*lines, "", verdict])

    def as_json(self) -> str:
        """The same for programs."""
        figures = {
            figure.name: {"value": figure.value, "kept": figure.is_kept, "note": figure.note}
            for figure in self.figures
        }
        return json.dumps({"kept": self.is_kept, "broken": self.broken, "figures": figures}, indent=2)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
