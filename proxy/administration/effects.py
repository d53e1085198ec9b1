"""What a change of the policy does: how many users it touches, how many are over a limit then, and warnings."""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.config.lint import policy_warnings
from proxy.config.loader import Config, FileUser
from proxy.identity.directory import FILE
from proxy.ledger.queries import IS_OF_MEMBER, used_of
from proxy.ledger.schema import counters, users
from proxy.policy.policy import DEFAULT, EVERYONE
from proxy.policy.quota import Quota, shared_subject

# Combinations of groups of users of the database that warnings look at.
_COMBINATIONS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Effects:
    """What a change does, as it is now.

    - `members`: users of the groups that the change touches. Users of header sources are counted by the groups that
      an administrator gave them, because those that the source sends come with each request.
    - `members_over`: users, or pots, that are at or above a limit of a changed quota in their open window.
    - `warnings`: what the policy then probably does not do as intended, in sentences; those that were true before the
      change are left out.
    """

    members: int = 0
    members_over: int = 0
    warnings: tuple[str, ...] = ()


class Reach(NamedTuple):
    """How many members a quota has, and how many of them (its pot: 0 or 1) are at or above one of its limits now.

    `members` None: they are not known.
    """

    members: int | None
    over: int


async def effects_of(
    connection: AsyncConnection, before: Config, after: Config, *, now: int, reach_of: Collection[Quota] = ()
) -> tuple[Effects, dict[str, Reach]]:
    """The effects of a change from one policy in force to another, and the reach of quotas of it. `now` is in ms."""
    was, will = before.policy.quotas, after.policy.quotas
    changed = [quota for id, quota in will.items() if was.get(id) != quota]
    gone = [quota for id, quota in was.items() if id not in will]
    names = {quota.group for quota in (*changed, *gone)}
    names |= {
        name
        for name in before.policy.groups.keys() | after.policy.groups.keys()
        if _shape(before, name) != _shape(after, name)
    }
    combinations = await _combinations(connection)
    warnings = await asyncio.to_thread(_new_warnings, before, after, combinations)
    counted = list(_counted(before, after, combinations))
    touched = sum(count for groups, count in counted if _is_touched(groups, names))
    over = {quota.id: await _over(connection, quota, now) for quota in dict.fromkeys((*changed, *reach_of))}
    members = _members_by_group(counted)
    reach = {quota.id: Reach(members[quota.group], over[quota.id]) for quota in reach_of}
    return Effects(touched, sum(over[quota.id] for quota in changed), warnings), reach


def _shape(config: Config, name: str) -> object:
    group = config.policy.groups.get(name)
    return None if group is None else (group.models, group.unlimited)


@dataclass(frozen=True, slots=True)
class _Combination:
    """How many users of the database are in the same groups."""

    groups: tuple[str, ...]
    count: int


async def _combinations(connection: AsyncConnection) -> list[_Combination]:
    is_active = (users.c.source != FILE, users.c.forgotten_at.is_(None))
    found = sa.select(users.c.groups, sa.func.count()).where(*is_active).group_by(users.c.groups)
    rows = await connection.execute(found.limit(_COMBINATIONS_MAX))
    return [_Combination(tuple(orjson.loads(text)), count) for text, count in rows]


def _counted(
    before: Config, after: Config, of_database: Iterable[_Combination]
) -> Iterable[tuple[tuple[str, ...], int]]:
    """Groups, and how many users are in them. Users of the file count in those of before and of after."""
    of_file: dict[str, tuple[str, ...]] = {}
    for user in (*before.users, *after.users):
        of_file[user.name] = (*of_file.get(user.name, ()), *user.groups)
    yield from ((groups, 1) for groups in of_file.values())
    yield from ((each.groups, each.count) for each in of_database)


def _is_touched(groups: tuple[str, ...], names: set[str]) -> bool:
    return EVERYONE in names or not names.isdisjoint(groups) or (DEFAULT in names and not groups)


def _members_by_group(counted: Iterable[tuple[tuple[str, ...], int]]) -> Counter[str]:
    members: Counter[str] = Counter()
    for groups, count in counted:
        for name in {EVERYONE, *(groups or (DEFAULT,))}:
            members[name] += count
    return members


def _new_warnings(before: Config, after: Config, combinations: Iterable[_Combination]) -> tuple[str, ...]:
    """The warnings about the policy that the change brings. Users of the database count as those of the file."""
    pseudo = tuple(combinations)
    was, will = (policy_warnings(_with_users(config, pseudo)) for config in (before, after))
    return tuple(text for text in will if text not in was)


def _with_users(config: Config, combinations: Iterable[_Combination]) -> Config:
    groups = config.policy.groups
    # Named as a user of the file can't be.
    made = (
        FileUser(f"database:{index}", tuple(name for name in groups if name in each.groups))
        for index, each in enumerate(combinations)
    )
    return replace(config, users=(*config.users, *made))


async def _over(connection: AsyncConnection, quota: Quota, now: int) -> int:
    """How many counters of a quota are at or above one of its limits in their open window."""
    limits = [used_of(limit.measure) >= limit.maximum for limit in quota.window_limits]
    if not limits:
        return 0
    is_counted = counters.c.subject == shared_subject(quota.group) if quota.shared else IS_OF_MEMBER
    open_ones = (counters.c.quota_id == quota.id, is_counted, counters.c.resets_at > now)
    found = sa.select(sa.func.count()).select_from(counters).where(*open_ones, sa.or_(*limits))
    count: int = (await connection.execute(found)).scalar_one()
    return count
