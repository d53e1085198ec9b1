"""Refusals by quotas that were stored: by user, quota and minute, and one by its request.

At most one of a user and a quota is stored for each second, with the number of all of that second. So the numbers are
right, and the log has the requests that are not stored.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.change import NotFound
from proxy.administration.pages import Page, Paging
from proxy.administration.search import is_of_groups
from proxy.ledger.schema import refusals as table
from proxy.policy.quota import group_of

MINUTE_MS = 60_000
# A user is refused by a quota at most in 60 rows of a minute.
_ROWS_OF_A_MINUTE = 60


@dataclass(frozen=True, slots=True)
class RefusalRecord:
    """A refused request: what it needed of which limit, and what was used and held of that at this instant.

    `admissible_at` is when the same request would be admitted; None: no reset helps. `count` is how many requests of
    this user the quota refused in the same second. `details` is what `explain` says of it; None: it was not stored.
    """

    request_id: str
    at: int
    user: str
    quota: str
    model: str
    endpoint: str
    verdict: str
    measure: str
    limit: int
    used: int
    held: int
    needed: int
    resets_at: int | None
    admissible_at: int | None
    key_id: str | None
    count: int
    details: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RefusalCount:
    """How often a quota refused a user in the minute that began at `minute_at`, and the last stored request of it."""

    minute_at: int
    user: str
    quota: str
    count: int
    last_at: int
    last_request_id: str


@dataclass(frozen=True, slots=True)
class RefusalFilter:
    """Which refusals are asked for, from `since` to `until` (ms); None: any. `groups`: only by quotas of these."""

    user: str | None = None
    quota: str | None = None
    since: int | None = None
    until: int | None = None
    groups: Collection[str] | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The conditions for rows of `refusals`."""
        chosen = []
        if self.user is not None:
            chosen.append(table.c.user_name == self.user)
        if self.quota is not None:
            chosen.append(table.c.quota_id == self.quota)
        if self.since is not None:
            chosen.append(table.c.at >= self.since)
        if self.until is not None:
            chosen.append(table.c.at < self.until)
        if self.groups is not None:
            chosen.append(is_of_groups(table.c.quota_id, self.groups))
        return chosen


async def refusals(connection: AsyncConnection, asked: RefusalFilter, paging: Paging) -> Page[RefusalCount]:
    """Refusals by user, quota and minute, the newest minute first. Raises ChangeRefused for a wrong cursor."""
    after = paging.key(int, str, str)
    chosen = replace(asked, groups=None).conditions()
    if asked.groups is not None:
        chosen.append(table.c.quota_id.in_(await _quotas_of(connection, asked.groups)))
    # Only as many of the newest rows are summed up as a page can need. Few are enough, unless users were refused many
    # times in a minute.
    for rows in (2 * (paging.size + 1), _ROWS_OF_A_MINUTE * (paging.size + 1)):
        first = await _minute_of_row(connection, chosen, after, rows)
        found = (await connection.execute(_counted(chosen, after, first).limit(paging.size + 1))).all()
        if len(found) > paging.size or first is None:
            break
    return paging.page(found, lambda row: (row.minute, row.user_name, row.quota_id), lambda row: RefusalCount(*row))


async def _quotas_of(connection: AsyncConnection, groups: Collection[str]) -> list[str]:
    """The ids of these groups' quotas by which refusals are stored, also of those that are gone.

    Each is found by the one before it in the index, so this does not read all rows.
    """
    found = sa.select(sa.func.min(table.c.quota_id).label("id")).cte("found", recursive=True)
    following = sa.select(sa.func.min(table.c.quota_id)).where(table.c.quota_id > found.c.id).scalar_subquery()
    found = found.union_all(sa.select(following).where(found.c.id.is_not(None)))
    ids = (await connection.execute(sa.select(found.c.id).where(found.c.id.is_not(None)))).scalars()
    return [id for id in ids if group_of(id) in groups]


async def _minute_of_row(
    connection: AsyncConnection,
    asked: Sequence[sa.ColumnElement[bool]],
    after: tuple[int, str, str] | None,
    number: int,
) -> int | None:
    """The minute of this row of those that come after a key, the newest first; None if there are not so many."""
    chosen = [*asked]
    if after is not None:
        # Of the minute in the key all rows are read: up to 60 for each user and quota before it.
        chosen.append(table.c.at < after[0] + MINUTE_MS)
    found: int | None = await connection.scalar(
        sa.select(table.c.at).where(*chosen).order_by(table.c.at.desc()).offset(number - 1).limit(1)
    )
    return None if found is None else found // MINUTE_MS * MINUTE_MS


def _counted(
    asked: Sequence[sa.ColumnElement[bool]], after: tuple[int, str, str] | None, first: int | None
) -> sa.Select[Any]:
    minute = (table.c.at // MINUTE_MS * MINUTE_MS).label("minute")
    chosen = [*asked]
    if first is not None:
        chosen.append(table.c.at >= first)
    if after is not None:
        is_later = sa.tuple_(table.c.user_name, table.c.quota_id) > after[1:]
        chosen += [
            table.c.at < after[0] + MINUTE_MS,
            sa.or_(table.c.at < after[0], sa.and_(table.c.at >= after[0], is_later)),
        ]
    sums = (sa.func.sum(table.c["count"]), sa.func.max(table.c.at), sa.func.max(table.c.request_id))
    key = (minute, table.c.user_name, table.c.quota_id)
    grouped = sa.select(*key, *(sa.cast(sums[0], sa.BigInteger), *sums[1:])).where(*chosen).group_by(*key)
    return grouped.order_by(minute.desc(), table.c.user_name, table.c.quota_id)


async def refusal(
    connection: AsyncConnection, request_id: str, *, groups: Collection[str] | None = None
) -> RefusalRecord:
    """The refusal of one request. Raises NotFound if it is not stored, or is by a quota of another group."""
    asked = RefusalFilter(groups=groups).conditions()
    found = (await connection.execute(sa.select(table).where(table.c.request_id == request_id, *asked))).first()
    if found is None:
        raise NotFound(
            "request_id",
            "no refusal of this request is stored: they are kept for 7 days, one of a user and quota each second; "
            "the log has them all",
        )
    return _record(found) if groups is None else _shown_to(_record(found), groups)


def _shown_to(record: RefusalRecord, groups: Collection[str]) -> RefusalRecord:
    """What a manager of these groups sees of a refusal: nothing of the quotas of other groups."""
    if record.details is None:
        return record

    def is_shown(id: str) -> bool:
        return id.partition("/")[0] in groups

    details = {
        "refused_by": [id for id in record.details["refused_by"] if is_shown(id)],
        "blocks": [each for each in record.details["blocks"] if is_shown(each["quota"])],
        "alternatives": [
            ids for each in record.details["alternatives"] if (ids := [id for id in each if is_shown(id)])
        ],
        "quotas": [each for each in record.details["quotas"] if is_shown(each["quota"])],
    }
    return replace(record, details=details)


async def last_refusals(connection: AsyncConnection, asked: RefusalFilter, *, limit: int) -> Sequence[RefusalRecord]:
    """The last refusal of each user by each quota, the latest first. Its `count` is how many there were in all."""
    sums = (
        sa.select(sa.func.max(table.c.request_id).label("id"), sa.func.sum(table.c["count"]).label("total"))
        .where(*asked.conditions())
        # Not the bare columns: SQLite would read the whole table in the order of an index on them.
        .group_by(table.c.user_name + "", table.c.quota_id + "")
        .order_by(sa.func.max(table.c.at).desc(), sa.func.max(table.c.request_id).desc())
        .limit(limit)
        .subquery()
    )
    columns = [column for column in table.c if column.name not in ("count", "details")]
    last: sa.Select[Any] = sa.select(
        *columns, sa.cast(sums.c.total, sa.BigInteger).label("count"), sa.null().label("details")
    )
    found = last.select_from(sums.join(table, table.c.request_id == sums.c.id))
    ordered = found.order_by(table.c.at.desc(), table.c.request_id.desc())
    return [_record(row) for row in (await connection.execute(ordered)).all()]


def _record(row: sa.Row[Any]) -> RefusalRecord:
    return RefusalRecord(
        request_id=row.request_id,
        at=row.at,
        user=row.user_name,
        quota=row.quota_id,
        model=row.model,
        endpoint=row.endpoint,
        verdict=row.verdict,
        measure=row.measure,
        limit=row.maximum,
        used=row.used,
        held=row.held,
        needed=row.needed,
        resets_at=row.resets_at,
        admissible_at=row.admissible_at,
        key_id=row.key_id,
        count=row._mapping["count"],
        details=None if row.details is None else orjson.loads(row.details),
    )
