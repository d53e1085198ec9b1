"""Grants: so much more of a quota for a user, for each member of its group, or for its pot, until an instant.

A grant is one row, also for a group of thousands. It is part of the policy in force, so it costs a call no query. It
ends by the clock, and an administrator can end it before.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.change import ChangeRefused, Changes, NotFound, check_reason
from proxy.administration.pages import Page, Paging
from proxy.administration.search import is_of_groups
from proxy.config.loader import Config
from proxy.config.suggestions import did_you_mean
from proxy.identity.keys import random_id
from proxy.ledger.schema import grants
from proxy.policy.amounts import MEASURES, TOKENS_MAX, Measure
from proxy.policy.quota import Quota, group_of
from proxy.policy.status import duration_text

_LONGEST_MS = 366 * 86_400_000


@dataclass(frozen=True, slots=True)
class GrantRecord:
    """A grant as administrators see it. `user` None: for each member of the quota's group, or for its pot.

    `measure` is tokens, input_tokens, output_tokens or requests. Instants are in ms. `ended_at` is set if it was
    ended before `until`.
    """

    id: str
    quota: str
    user: str | None
    measure: str
    amount: int
    until: int
    reason: str
    created_at: int
    created_by: str
    ended_at: int | None = None


@dataclass(frozen=True, slots=True)
class NewGrant:
    """A grant to be made; the members are those of `GrantRecord`."""

    quota: str
    user: str | None
    measure: str
    amount: int
    until: int
    reason: str


@dataclass(frozen=True)
class GrantAdministration:
    """The changes and lists of grants. `config` is what is in force, with what was made at run time.

    `up_to_percent` bounds what one subject can be granted of a quota by all running grants together, in percent of
    its limit; None: no bound. `groups` are those on whose quotas the admin sees and makes grants; None: on all.
    Methods raise ChangeRefused and StoreUnavailable.
    """

    changes: Changes
    config: Config
    up_to_percent: int | None = None
    groups: Collection[str] | None = None

    async def grants(
        self,
        *,
        quota: str | None = None,
        user: str | None = None,
        ended: bool = False,
        paging: Paging,
    ) -> Page[GrantRecord]:
        """The running grants by id, or all with `ended`: of one quota, or of one user."""
        found = sa.select(grants).order_by(grants.c.id)
        if (key := paging.key(str)) is not None:
            found = found.where(grants.c.id > key[0])
        if quota is not None:
            found = found.where(grants.c.quota_id == quota)
        if user is not None:
            found = found.where(grants.c.user_name == user)
        if self.groups is not None:
            found = found.where(is_of_groups(grants.c.quota_id, self.groups))
        if not ended:
            found = found.where(*runs(self.changes.now()))
        async with self.changes.database.read() as connection:
            rows = (await connection.execute(found.limit(paging.size + 1))).all()
        return paging.page(rows, lambda row: (row.id,), _record)

    async def grant(self, id: str) -> GrantRecord:
        """One grant."""
        async with self.changes.database.read() as connection:
            return await self._grant(connection, id)

    async def create(self, new: NewGrant) -> GrantRecord:
        """Make a grant. It is in force in every process within 2 s."""
        quota, measure = self._quota(new.quota), self._measure(new)
        id = f"grt_{random_id()}"
        async with self.changes.begin("grant.create", id, is_of_policy=True) as change:
            if change.repeated is not None:
                return await self._grant(change.connection, change.repeated)
            now = self.changes.now()
            _check_values(new, now)
            if quota.shared and new.user is not None:
                raise ChangeRefused("user", f"{quota.id} is shared by its group: leave the user out to grant the pot")
            if not any(limit.measure is measure for limit in quota.limits):
                limited = ", ".join(limit.measure.value for limit in quota.limits)
                raise ChangeRefused("measure", f"{quota.id} does not limit {measure.value}, but {limited}")
            await self._check_bound(change.connection, new, quota, measure)
            row = {
                "id": id,
                "quota_id": quota.id,
                "user_name": new.user,
                "measure": measure.value,
                "amount": new.amount,
                "until": new.until,
                "reason": new.reason,
                "created_at": now,
                "created_by": self.changes.author.actor,
            }
            await change.connection.execute(sa.insert(grants).values(**row))
            kept = ("quota_id", "user_name", "measure", "amount", "until", "reason")
            change.note(None, {name: row[name] for name in kept})
            return await self._grant(change.connection, id)

    async def end(self, id: str) -> GrantRecord:
        """End a grant now. What was used of it stays used."""
        async with self.changes.begin("grant.end", id, is_of_policy=True) as change:
            before, now = await self._grant(change.connection, id), self.changes.now()
            if before.ended_at is None and before.until > now:
                await change.connection.execute(sa.update(grants).where(grants.c.id == id).values(ended_at=now))
            change.note({"ended_at": before.ended_at}, {"ended_at": before.ended_at or now, "quota_id": before.quota})
            return await self._grant(change.connection, id)

    def _quota(self, id: str) -> Quota:
        known = {id: quota for id, quota in self.config.policy.quotas.items() if self._sees(id)}
        if id not in known:
            hint = did_you_mean(id, known) or "list them to see their ids"
            raise NotFound("quota", f"there is no quota {id}; {hint}")
        return known[id]

    def _measure(self, new: NewGrant) -> Measure:
        try:
            return MEASURES[new.measure]
        except KeyError:
            raise ChangeRefused("measure", f"write one of {', '.join(MEASURES)}") from None

    async def _check_bound(self, connection: AsyncConnection, new: NewGrant, quota: Quota, measure: Measure) -> None:
        if self.up_to_percent is None:
            return
        running = runs(self.changes.now())
        same: tuple[Any, ...] = (grants.c.quota_id == quota.id, grants.c.measure == measure.value)
        # Those of the whole group count for each of its users too. For one to the group, the user with most decides.
        per_user = sa.select(grants.c.user_name, sa.func.sum(grants.c.amount)).where(*same, *running)
        sums: dict[str | None, int] = {
            user: int(total) for user, total in await connection.execute(per_user.group_by(grants.c.user_name))
        }
        own = max((total for user, total in sums.items() if user is not None), default=0)
        own = own if new.user is None else sums.get(new.user, 0)
        [maximum] = [limit.maximum for limit in quota.limits if limit.measure is measure]
        left = maximum * self.up_to_percent // 100 - own - sums.get(None, 0)
        if new.amount > left:
            text = f"you may grant {self.up_to_percent} % of {maximum}, of which {max(0, left)} are left"
            raise ChangeRefused("amount", f"{text}: ask an administrator for more")

    async def _grant(self, connection: AsyncConnection, id: str) -> GrantRecord:
        row = (await connection.execute(sa.select(grants).where(grants.c.id == id))).first()
        if row is None or not self._sees(row.quota_id):
            raise NotFound("grant", "there is no grant with this id; list them to see their ids")
        return _record(row)

    def _sees(self, quota_id: str) -> bool:
        return self.groups is None or group_of(quota_id) in self.groups


def runs(now: int) -> tuple[sa.ColumnElement[bool], ...]:
    """The conditions that a grant runs at this instant (ms)."""
    return (grants.c.ended_at.is_(None), grants.c.until > now)


def _check_values(new: NewGrant, now: int) -> None:
    if not 1 <= new.amount <= TOKENS_MAX:
        raise ChangeRefused("amount", f"write a whole number from 1 to {TOKENS_MAX}")
    if new.until <= now:
        raise ChangeRefused("until", "this is in the past; write a later instant")
    if new.until - now > _LONGEST_MS:
        raise ChangeRefused("until", f"this is in {duration_text(new.until - now)}; write at most a year")
    check_reason(new.reason, is_required=True)


def _record(row: sa.Row[Any]) -> GrantRecord:
    return GrantRecord(
        row.id,
        row.quota_id,
        row.user_name,
        row.measure,
        row.amount,
        until=row.until,
        reason=row.reason,
        created_at=row.created_at,
        created_by=row.created_by,
        ended_at=row.ended_at,
    )
