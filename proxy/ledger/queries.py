"""Reports over the records of calls: what was used, by day, hour, user, group, model, key or tag.

The sums of days are written every few seconds, so a report adds the calls that are not in them yet. Both are read by
one statement, which sees one moment: each call is in exactly one of them, also while a roll-up runs. Hours, keys and
tags are not in the sums of days: reports about them read the records of calls, which are kept for a shorter time.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import add
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.ledger.entry import call_id_prefix
from proxy.ledger.rows import counters_of
from proxy.ledger.schema import calls, counters, usage_by_day
from proxy.policy.amounts import Measure
from proxy.policy.quota import Counter, CounterKey, user_subject

Dimension = Literal["day", "hour", "user", "group", "model", "key", "tag"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
# The dimensions that the sums of days do not have.
_OF_CALLS = ("hour", "key", "tag")
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
# How many rows are looked at before calls get their turn.
_ROWS_AT_ONCE = 1000
# The time by the clock of a PostgreSQL database (ms), whenever it is computed.
POSTGRES_NOW = sa.cast(sa.extract("epoch", sa.func.clock_timestamp()) * 1000, sa.BigInteger)
# Whether a counter is that of a member and not of a group. A quota whose `shared` was switched has left both.
IS_OF_MEMBER = sa.func.substr(counters.c.subject, 1, len(user_subject(""))) == user_subject("")


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

    @property
    def tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: "Used") -> "Used":
        return Used(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Used)))


@dataclass(frozen=True, slots=True)
class Asked:
    """Of which calls a report is: those reserved from the instant `since` to `until` (ms; None: to now).

    `where` has the values that dimensions must have, and `groups` the groups of which one must have admitted the call
    (None: any).
    """

    since: int
    until: int | None = None
    where: Mapping[Dimension, str] = field(default_factory=dict)
    groups: Collection[str] | None = None

    def widened(self, step_ms: int) -> "Asked":
        """The same, from the beginning of the first to the end of the last step, such as a UTC day."""
        until = None if self.until is None else -(-self.until // step_ms) * step_ms
        return replace(self, since=self.since // step_ms * step_ms, until=until)


async def usage(connection: AsyncConnection, by: Dimension, asked: Asked) -> dict[str | int, Used]:
    """What was used, by the values of a dimension.

    The report is of whole UTC days, from the one of `since` to the one before `until`, and by hour of whole hours.
    The values of `day` and `hour` are their first milliseconds, all others are texts; a call without a key or tag has
    an empty one. Calls in flight are not in the result.
    """
    asked = asked.widened(HOUR_MS if by == "hour" else DAY_MS)
    if by in _OF_CALLS or any(name in _OF_CALLS for name in asked.where):
        return await _sums(connection, _of_calls(by, asked, is_uncounted=False))
    return await _sums(connection, sa.union_all(_of_days(by, asked), _of_calls(by, asked, is_uncounted=True)))


def by_time_or_tokens(row: tuple[str | int, Used]) -> tuple[int, str]:
    """A key for sorting a report: times in their order, and of all others those with the most tokens first."""
    value, used = row
    return (value, "") if isinstance(value, int) else (-used.tokens, value)


async def oldest_call(connection: AsyncConnection) -> int | None:
    """When the oldest call that is still recorded was reserved (ms); None if none is recorded."""
    first = sa.select(calls.c.reserved_at).order_by(calls.c.id).limit(1)
    found: int | None = await connection.scalar(first)
    return found


async def ledger_now(connection: AsyncConnection, now: Callable[[], int]) -> int:
    """The time by the clock that decides windows (ms): that of the database if processes share it, else `now`."""
    if connection.dialect.name == "sqlite":
        return now()
    found: int = (await connection.execute(sa.select(POSTGRES_NOW))).scalar_one()
    return found


async def read_counters(connection: AsyncConnection, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
    """The committed counters with these keys."""
    is_given = sa.tuple_(counters.c.subject, counters.c.quota_id).in_(keys)
    return counters_of((await connection.execute(sa.select(counters).where(is_given))).all())


def used_of(measure: Measure) -> sa.ColumnElement[Any]:
    """What a counter has used of this measure."""
    return reduce(add, (counters.c[f"used_{quantity}"] for quantity in measure.quantities))


def admitted_by(column: sa.ColumnElement[Any], groups: Collection[str]) -> sa.ColumnElement[bool]:
    """The condition that one of these groups admitted a call; with `every_group` several admit it together."""
    together = [(sa.literal("+") + column + "+").contains(f"+{group}+", autoescape=True) for group in groups]
    return sa.or_(column.in_(groups), sa.and_(column.contains("+"), sa.or_(sa.false(), *together)))


async def _sums(
    connection: AsyncConnection, statement: sa.Select[Any] | sa.CompoundSelect[Any]
) -> dict[str | int, Used]:
    sums: dict[str | int, Used] = {}
    for rows in (await connection.execute(statement)).partitions(_ROWS_AT_ONCE):
        for value, *numbers in rows:
            # The databases give sums other types (decimal), which are made whole numbers again.
            sums[value] = sums.get(value, Used()) + Used(*map(int, numbers))
        await asyncio.sleep(0)  # there may be 100,000 users, and calls go on meanwhile
    return sums


def _of_days(by: Dimension, asked: Asked) -> sa.Select[Any]:
    table = usage_by_day.c
    columns: dict[Dimension, sa.ColumnElement[Any]] = {
        "day": table.day,
        "user": table.user_name,
        "group": table.through,
        "model": table.model,
    }
    sums = [sa.func.sum(table[each.name]) for each in fields(Used)]
    chosen = [table.day >= asked.since, *_conditions(asked, columns, table.through, table.day)]
    # Not the bare column: SQLite would read all days in the order of its index, and look each row up.
    value = (columns[by] + ("" if by != "day" else 0)).label("value")
    return sa.select(value, *sums).where(*chosen).group_by(value)


def _conditions(
    asked: Asked,
    columns: Mapping[Dimension, sa.ColumnElement[Any]],
    through: sa.ColumnElement[str],
    at: sa.ColumnElement[int],
) -> list[sa.ColumnElement[bool]]:
    chosen = [columns[name] == value for name, value in asked.where.items()]
    if asked.until is not None:
        chosen.append(at < asked.until)
    if asked.groups is not None:
        chosen.append(admitted_by(through, asked.groups))
    return chosen


def _of_calls(by: Dimension, asked: Asked, *, is_uncounted: bool) -> sa.Select[Any]:
    """Sums of calls that have ended: of all, or of what the sums of days do not have of them yet.

    A call that had expired and was counted with its hold is subtracted, and added as it was settled, as the roll-up
    will do (see `schema.DAY_SUMS`).
    """
    table = calls.c
    columns: dict[Dimension, sa.ColumnElement[Any]] = {
        "day": table.reserved_at // DAY_MS * DAY_MS,
        "hour": table.reserved_at // HOUR_MS * HOUR_MS,
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
    first = asked.since
    chosen = [table.id >= call_id_prefix(max(0, first)), table.reserved_at >= first, table.state != "open"]
    if is_uncounted:
        chosen.append(sa.or_(table.counted_as.is_(None), table.counted_as != table.state))
    chosen += _conditions(asked, columns, table.through, table.reserved_at)
    value = columns[by].label("value")
    return sa.select(value, *(sa.func.sum(each) for each in sums)).where(*chosen).group_by(value)
