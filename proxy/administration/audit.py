"""The audit log: who changed what, when, from where. Rows are only added, and deleted when they are old."""

from collections.abc import Collection
from dataclasses import astuple, dataclass, fields
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.pages import Page, Paging
from proxy.administration.search import is_of_groups
from proxy.ledger.schema import audit as table
from proxy.ledger.store import Store

# The changes whose target is a group or a quota. Other targets can look the same: a model can be called `staff/fast`.
ACTIONS_ON_GROUPS = frozenset(
    "group.create group.set group.delete quota.set quota.delete quotas.set counters.reset".split()
)
# How many rows one transaction deletes. It has SQLite's one write lock, for which calls wait.
_DELETED_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One change. `before` and `after` have the members that differ; None: there was nothing, or is nothing now."""

    id: str
    at: int
    actor: str
    action: str
    target: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    address: str | None
    request_id: str | None


# The heads of a table of the audit log.
COLUMNS = tuple(field.name for field in fields(AuditRecord))


def cells(record: AuditRecord) -> list[object]:
    """A change as a row below COLUMNS. What was before and after is JSON text."""
    return [orjson.dumps(cell).decode() if isinstance(cell, dict) else cell for cell in astuple(record)]


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which changes are asked for, from `since` to `until` (ms); None: any.

    `groups`: only changes of these groups, and of their quotas.
    """

    since: int | None = None
    until: int | None = None
    actor: str | None = None
    target: str | None = None
    action: str | None = None
    groups: Collection[str] | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The conditions for rows of `audit`."""
        columns = {"actor": self.actor, "target": self.target, "action": self.action}
        chosen = [table.c[name] == value for name, value in columns.items() if value is not None]
        if self.since is not None:
            chosen.append(table.c.at >= self.since)
        if self.until is not None:
            chosen.append(table.c.at < self.until)
        if self.groups is not None:
            chosen.append(table.c.action.in_(ACTIONS_ON_GROUPS))
            chosen.append(sa.or_(table.c.target.in_(self.groups), is_of_groups(table.c.target, self.groups)))
        return chosen


async def audit(connection: AsyncConnection, asked: AuditFilter, paging: Paging) -> Page[AuditRecord]:
    """The audit log, the newest change first. Raises ChangeRefused for a wrong cursor."""
    after = paging.key(int, str)
    key = (table.c.at, table.c.id)
    newest = [column.desc() for column in key]
    # By an index alone, because rows are large.
    chosen = sa.select(table.c.id).where(*asked.conditions()).order_by(*newest).limit(paging.size + 1)
    if after is not None:
        chosen = chosen.where(sa.tuple_(*key) < after)
    rows = (await connection.execute(sa.select(table).where(table.c.id.in_(chosen)).order_by(*newest))).all()
    return paging.page(rows, lambda row: (row.at, row.id), _record)


async def delete_old_audit(store: Store, *, before: int) -> None:
    """Delete the rows of changes before this instant (ms), in small transactions. Raises StoreUnavailable."""
    old = sa.select(table.c.id).where(table.c.at < before).order_by(table.c.at).limit(_DELETED_AT_ONCE)
    while True:
        async with store.transaction(writes=True) as connection:
            # Those that another process deletes at this moment are left to it.
            ids = list((await connection.execute(old.with_for_update(skip_locked=True))).scalars())
            await connection.execute(sa.delete(table).where(table.c.id.in_(ids)))
        if len(ids) < _DELETED_AT_ONCE:
            return


def _record(row: sa.Row[Any]) -> AuditRecord:
    before, after = (None if text is None else orjson.loads(text) for text in (row.before, row.after))
    return AuditRecord(
        id=row.id,
        at=row.at,
        actor=row.actor,
        action=row.action,
        target=row.target,
        before=before,
        after=after,
        address=row.address,
        request_id=row.request_id,
    )
