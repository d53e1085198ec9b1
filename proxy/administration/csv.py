"""CSV that a spreadsheet may open."""

import csv
from collections.abc import Iterable, Sequence
from typing import Protocol

# A cell that begins with one of these is a formula for a spreadsheet.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Writable(Protocol):
    """A file, standard output, or a buffer of text."""

    def write(self, text: str, /) -> object:
        """Write the text."""


def write_csv(file: Writable, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV, below their heads. Without heads they go on from rows that were written before.

    A text that a spreadsheet would take for a formula gets a quote in front.
    """
    writer = csv.writer(file, lineterminator="\n")
    if heads:
        writer.writerow(heads)
    for row in rows:
        writer.writerow([f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in row])
