"""Reports over the records of calls: what was used, by day, user, group, model, key or tag.

The sums of days are written every few seconds, so a report adds the calls that are not in them yet. Both are read by
one statement, which sees one moment: each call is in exactly one of them, also while a roll-up runs. Keys and tags
are not in the sums of days: reports about them read the records of calls, which are kept for a shorter time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.ledger.entry import call_id_prefix
from proxy.ledger.schema import calls, usage_by_day

Dimension = Literal["day", "user", "group", "model", "key", "tag"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
# The dimensions that the sums of days do not have.
_OF_CALLS = ("key", "tag")
DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Used:
    """What calls have used together. `estimated` is how many of them did not state their usage."""

    calls: int = 0
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: int = 0

    def __add__(self, other: "Used") -> "Used":
        return Used(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Used)))


async def usage(
    connection: AsyncConnection, since: int, by: Dimension, where: Mapping[Dimension, str]
) -> dict[str | int, Used]:
    """What was used since the beginning of the UTC day of the instant `since` (ms), by the values of a dimension.

    `where` has the values that dimensions must have. The values of `day` are the first milliseconds of UTC days, all
    others are texts; a call without a key or tag has an empty one. Calls in flight are not in the result.
    """
    first = since // DAY_MS * DAY_MS
    if by in _OF_CALLS or any(name in _OF_CALLS for name in where):
        return await _sums(connection, _of_calls(first, by, where, is_uncounted=False))
    uncounted = _of_calls(first, by, where, is_uncounted=True)
    return await _sums(connection, sa.union_all(_of_days(first, by, where), uncounted))


async def oldest_call(connection: AsyncConnection) -> int | None:
    """When the oldest call that is still recorded was reserved (ms); None if none is recorded."""
    first = sa.select(calls.c.reserved_at).order_by(calls.c.id).limit(1)
    found: int | None = await connection.scalar(first)
    return found


async def _sums(
    connection: AsyncConnection, statement: sa.Select[Any] | sa.CompoundSelect[Any]
) -> dict[str | int, Used]:
    sums: dict[str | int, Used] = {}
    for value, *numbers in await connection.execute(statement):
        # The databases give sums other types (decimal), which are made whole numbers again.
        sums[value] = sums.get(value, Used()) + Used(*map(int, numbers))
    return sums


def _of_days(first: int, by: Dimension, where: Mapping[Dimension, str]) -> sa.Select[Any]:
    table = usage_by_day.c
    columns = {"day": table.day, "user": table.user_name, "group": table.through, "model": table.model}
    sums = [sa.func.sum(table[each.name]) for each in fields(Used)]
    is_asked = [columns[name] == value for name, value in where.items()]
    return sa.select(columns[by], *sums).where(table.day >= first, *is_asked).group_by(columns[by])


def _of_calls(first: int, by: Dimension, where: Mapping[Dimension, str], *, is_uncounted: bool) -> sa.Select[Any]:
    """Sums of calls that have ended: of all, or of what the sums of days do not have of them yet.

    A call that had expired and was counted with its hold is subtracted, and added as it was settled, as the roll-up
    will do (see `schema.DAY_SUMS`).
    """
    table = calls.c
    columns: dict[Dimension, sa.ColumnElement[Any]] = {
        "day": table.reserved_at // DAY_MS * DAY_MS,
        "user": table.user_name,
        "group": table.through,
        "model": table.model,
        "key": sa.func.coalesce(table.key_id, ""),
        "tag": sa.func.coalesce(table.tag, ""),
    }
    was_counted = table.counted_as.is_not(None) if is_uncounted else sa.false()
    again = sa.case((was_counted, 1), else_=0)
    sums = [
        1 - again,
        sa.func.coalesce(table.requests, 0) - again,
        sa.func.coalesce(table.input_tokens, 0) - table.hold_input * again,
        sa.func.coalesce(table.output_tokens, 0) - table.hold_output * again,
        sa.func.coalesce(table.cached_tokens, 0),
        sa.func.coalesce(table.reasoning_tokens, 0),
        sa.case((table.provenance == "at_least", 1), else_=0) - again,
    ]
    # Ids begin with the time, so this reads the primary key from there on and not the whole table.
    chosen = [table.id >= call_id_prefix(max(0, first)), table.reserved_at >= first, table.state != "open"]
    if is_uncounted:
        chosen.append(sa.or_(table.counted_as.is_(None), table.counted_as != table.state))
    chosen += [columns[name] == value for name, value in where.items()]
    value = columns[by].label("value")
    return sa.select(value, *(sa.func.sum(each) for each in sums)).where(*chosen).group_by(value)
