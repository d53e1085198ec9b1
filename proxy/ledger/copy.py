"""Copies a whole database into an empty one, on either engine, and compares the two.

The copy is one transaction of the target. It is committed only after every column of every table has the same count
and the same sum on both sides. So an interrupted copy leaves nothing that could be taken for a complete one. The
source is locked against writes meanwhile, and not changed.

Rows are read and written in parts, so the memory does not depend on their number. No table has a sequence or an
identity column: each key is made by the program.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Column, Table, Text, func

from proxy.ledger.schema import directory, metadata
from proxy.ledger.store import Connection, Store

# Rows in one part. A call has some 500 bytes.
_ROWS = 1000
# Values are added up in two halves. The sum of 4 million instants (2^41 ms) does not fit into SQLite's 64 bits.
_HALF = 2**31


class TargetNotEmpty(Exception):
    """The target has rows already."""


class CopyDiffers(Exception):
    """The target does not have what the source has. Nothing was committed. `comparison` is what was found."""

    def __init__(self, comparison: "Comparison") -> None:
        super().__init__("the copy differs from the source")
        self.comparison = comparison


@dataclass(frozen=True, slots=True)
class Sums:
    """A table added up: its rows, and of each column how many values are not NULL, and their sum.

    `sums` has those of numbers, where true is 1, and `lengths` those of the characters of texts.
    """

    rows: int
    values: Mapping[str, int]
    sums: Mapping[str, int]
    lengths: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The sums of each table in the source and in the target, by its name."""

    source: Mapping[str, Sums]
    target: Mapping[str, Sums]

    @property
    def is_equal(self) -> bool:
        """Whether all are the same."""
        return self.source == self.target


async def copy_database(source: Store, target: Store, *, progress: Callable[[str, int], None]) -> Comparison:
    """Copy all rows. `progress` is told, after each part, the table and how many of its rows are copied.

    Raises TargetNotEmpty, CopyDiffers, and what `Store.frozen` and `Store.filling` raise.
    """
    async with source.frozen() as reader, target.filling() as writer:
        await _refuse_rows(writer)
        await writer.execute(sa.delete(directory))  # the migration has made its one row
        for table in metadata.sorted_tables:
            await _copy_table(table, reader, writer, progress)
        comparison = Comparison(await _sums(reader), await _sums(writer))
        if not comparison.is_equal:
            raise CopyDiffers(comparison)
        return comparison


async def _refuse_rows(connection: Connection) -> None:
    """Raise TargetNotEmpty if there are more rows than the migrations make: one in `directory`, with version 1."""
    for table in metadata.sorted_tables:
        found = sa.select(sa.literal(1)).select_from(table).limit(1)
        if table is directory:
            found = found.where(sa.or_(directory.c.version != 1, directory.c.policy_version != 0))
        if (await connection.execute(found)).first() is not None:
            raise TargetNotEmpty(f"the target has rows in the table {table.name}")


async def _copy_table(
    table: Table, reader: Connection, writer: Connection, progress: Callable[[str, int], None]
) -> None:
    rows = sa.select(table).order_by(*table.primary_key).execution_options(yield_per=_ROWS)
    copied = 0
    async with reader.stream(rows) as found:
        async for part in found.mappings().partitions():
            await writer.execute(sa.insert(table), [dict(row) for row in part])
            copied += len(part)
            progress(table.name, copied)


async def _sums(connection: Connection) -> dict[str, Sums]:
    found = {}
    for table in metadata.sorted_tables:
        sums: list[sa.ColumnElement[int]] = []
        for column in table.c:
            number = _number(column)
            halves = (func.sum(number // _HALF), func.sum(number % _HALF))
            sums += [func.count(column), *(func.coalesce(half, 0) for half in halves)]
        row = (await connection.execute(sa.select(func.count(), *sums).select_from(table))).one()
        rows, *numbers = map(int, row)  # PostgreSQL adds bigints up as numeric
        values = dict(zip(table.c.keys(), numbers[::3], strict=True))
        totals = [high * _HALF + low for high, low in zip(numbers[1::3], numbers[2::3], strict=True)]
        texts = [isinstance(column.type, Text) for column in table.c]
        named = list(zip(table.c.keys(), totals, texts, strict=True))
        found[table.name] = Sums(
            rows,
            values,
            sums={name: total for name, total, is_text in named if not is_text},
            lengths={name: total for name, total, is_text in named if is_text},
        )
    return found


def _number(column: Column[object]) -> sa.ColumnElement[int]:
    """The number that stands for a value in the sum of its column."""
    if isinstance(column.type, Boolean):
        return sa.case((column, sa.literal(1, BigInteger)), else_=sa.literal(0, BigInteger))
    if isinstance(column.type, Text):
        return func.length(column, type_=BigInteger)
    return sa.type_coerce(column, BigInteger)
