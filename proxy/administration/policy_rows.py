"""The rows of what was made at run time: groups, quotas, grants, and groups of users of the file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.change import as_json
from proxy.administration.grants import runs
from proxy.config.overlay import MadeGroup, MadePolicy, MadeQuota
from proxy.identity.database import insert_user, is_row_of
from proxy.identity.directory import FILE, User, UserId
from proxy.ledger.rows import names_of
from proxy.ledger.schema import directory, grants, groups, quotas, users
from proxy.policy.amounts import MEASURES
from proxy.policy.quota import Grant


async def read_version(connection: AsyncConnection) -> int:
    """The version of the directory at which what was made at run time changed last."""
    version: int = (await connection.execute(sa.select(directory.c.policy_version))).scalar_one()
    return version


async def read_made(connection: AsyncConnection, now: int) -> MadePolicy:
    """What was made at run time. Grants that have ended at `now` (ms) are left out."""
    of_groups = await connection.execute(sa.select(groups).order_by(groups.c.position, groups.c.name))
    of_quotas = await connection.execute(sa.select(quotas).order_by(quotas.c.position, quotas.c.group_name))
    running = sa.select(grants).where(*runs(now)).order_by(grants.c.id)
    of_grants = await connection.execute(running)
    is_member = (users.c.source == FILE, users.c.groups != "[]", users.c.forgotten_at.is_(None))
    members = await connection.execute(sa.select(users.c.id, users.c.groups).where(*is_member))
    return MadePolicy(
        groups=tuple(
            MadeGroup(row.name, names_of(row.models), row.unlimited, row.created_at, row.created_by)
            for row in of_groups
        ),
        quotas=tuple(
            MadeQuota(row.group_name, row.name, orjson.loads(row.document), row.created_at, row.created_by)
            for row in of_quotas
        ),
        grants=tuple(
            Grant(row.id, row.quota_id, row.user_name, MEASURES[row.measure], row.amount, row.until)
            for row in of_grants
            if row.measure in MEASURES  # a later release may know others
        ),
        groups_of={row.id: names_of(row.groups) or () for row in members},
    )


async def write_made(connection: AsyncConnection, before: MadePolicy, after: MadePolicy) -> None:
    """Write the groups and quotas that differ. Grants and the groups of users are not written here."""
    await _write_rows(connection, groups, ("name",), _group_rows(before), _group_rows(after))
    await _write_rows(connection, quotas, ("group_name", "name"), _quota_rows(before), _quota_rows(after))


def _group_rows(made: MadePolicy) -> list[dict[str, Any]]:
    return [
        {
            "name": group.name,
            "position": position,
            "models": None if group.models is None else as_json(group.models),
            "unlimited": group.unlimited,
            "created_at": group.created_at,
            "created_by": group.created_by,
        }
        for position, group in enumerate(made.groups)
    ]


def _quota_rows(made: MadePolicy) -> list[dict[str, Any]]:
    return [
        {
            "group_name": quota.group,
            "name": quota.name,
            "position": position,
            "document": as_json(dict(quota.document)),
            "created_at": quota.created_at,
            "created_by": quota.created_by,
        }
        for position, quota in enumerate(made.quotas)
    ]


async def _write_rows(
    connection: AsyncConnection,
    table: sa.Table,
    key: Sequence[str],
    before: Iterable[Mapping[str, Any]],
    after: Iterable[Mapping[str, Any]],
) -> None:
    was, now = ({tuple(row[name] for name in key): row for row in rows} for rows in (before, after))
    for id in was.keys() - now.keys():
        await connection.execute(sa.delete(table).where(*_is(table, key, id)))
    for id, row in now.items():
        if id not in was:
            await connection.execute(sa.insert(table).values(**row))
        elif row != was[id]:
            await connection.execute(sa.update(table).where(*_is(table, key, id)).values(**row))


def _is(table: sa.Table, key: Sequence[str], id: Sequence[str]) -> list[sa.ColumnElement[bool]]:
    return [table.c[name] == value for name, value in zip(key, id, strict=True)]


async def remove_members(connection: AsyncConnection, group: str) -> None:
    """Take all users out of a group, with one statement: there may be 100,000, and calls wait for the lock.

    The lists are texts such as `["staff","lab"]`, as orjson writes them, and names have no quotes.
    """
    name = as_json(group)
    left: sa.ColumnElement[str] = users.c.groups
    for gone in (f"{name},", f",{name}", name):
        left = sa.func.replace(left, gone, "")
    in_it = users.c.groups.contains(name, autoescape=True)
    await connection.execute(sa.update(users).where(in_it).values(groups=left))


async def set_groups_of_file_user(
    connection: AsyncConnection, name: str, names: Sequence[str], *, at: int, by: str
) -> None:
    """Set the groups that a user of the file is in besides those of the file."""
    identity = UserId(FILE, name)
    changed = sa.update(users).where(*is_row_of(users, identity)).values(groups=as_json(list(names)))
    if not (await connection.execute(changed)).rowcount:
        await insert_user(connection, User(identity, tuple(names)), at, by=by)
