"""The counters of users and pots: what is used and left of the limits in force, and their reset.

A counter is shown as `policy.status` computes it, with the limits that grants have raised.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.change import Change, ChangeRefused, Changes, NotFound, check_reason
from proxy.administration.pages import Page, Paging, cursor_of
from proxy.administration.records import audit_name
from proxy.identity.directory import UserId
from proxy.ledger.queries import POSTGRES_NOW, ledger_now, read_counters
from proxy.ledger.rows import counters_of
from proxy.ledger.schema import counters as table
from proxy.ledger.schema import crossings
from proxy.policy.amounts import QUANTITIES
from proxy.policy.catalog import MatchedName
from proxy.policy.policy import Policy
from proxy.policy.quota import Counter, CounterKey, Quota, user_of, user_subject
from proxy.policy.status import NEAR_PERCENT, QuotaStatus, quota_statuses

# The newest states of how many counters the streams of events get at most after a reset.
RESETS_SHOWN_MAX = 5_000


@dataclass(frozen=True, slots=True)
class Level:
    """One limit of a quota, and what is used and held of it. `percent` is the used part of the limit."""

    measure: str
    limit: int
    used: int
    held: int
    remaining: int
    percent: float


@dataclass(frozen=True, slots=True)
class CounterRecord:
    """What a user has used of a quota, or all members of its group together (`user` is None, a *pot*).

    `limits` has what the running `grants` (their ids) have added. The window has no instants before a call has opened
    it, unless it is one of the calendar.
    """

    user: str | None
    group: str
    quota: str
    models: tuple[str, ...]
    shared: bool
    enforce: str
    per: str
    opened_at: int | None
    resets_at: int | None
    limits: tuple[Level, ...]
    grants: tuple[str, ...] = ()

    @property
    def percent(self) -> float:
        """The used part of the limit of which the largest part is used."""
        return max((level.percent for level in self.limits), default=0.0)


@dataclass(frozen=True, slots=True)
class CounterFilter:
    """Which counters are asked for; None: any.

    - `quota` is the id of a quota, `group` a group whose quotas are meant, `model` a model that they count.
    - `near`: at least so many percent of a limit are used, from 80 on.
    - `groups`: only quotas of these groups, which the admin who asks may see.
    - `user` is the name of a user in counters. `user_groups` are the user's groups: their quotas are shown also if no
      call has opened their windows, and their pots.
    """

    quota: str | None = None
    group: str | None = None
    model: MatchedName | None = None
    near: int | None = None
    groups: Collection[str] | None = None
    user: str | None = None
    user_groups: Collection[str] = ()

    def quotas(self, policy: Policy) -> dict[str, Quota]:
        """The quotas of the policy that are asked for, by their ids. Raises NotFound for one that is not there."""
        visible = quotas_of(policy, self.groups)
        if self.quota is not None and self.quota not in visible:
            raise NotFound("quota", f'there is no quota "{self.quota}"')
        if self.group is not None and not _is_visible(self.group, policy, self.groups):
            raise NotFound("group", f'there is no group "{self.group}"')
        return {
            id: quota
            for id, quota in visible.items()
            if (self.quota is None or id == self.quota)
            and (self.group is None or quota.group == self.group)
            and (self.model is None or quota.models.match(self.model))
        }


def quotas_of(policy: Policy, groups: Collection[str] | None = None) -> dict[str, Quota]:
    """The quotas of these groups of the policy, by their ids; None: of all groups."""
    return {id: quota for id, quota in policy.quotas.items() if groups is None or quota.group in groups}


def _is_visible(group: str, policy: Policy, groups: Collection[str] | None) -> bool:
    return group in policy.groups and (groups is None or group in groups)


# -------------------------------------------------------------------------------------------------------------- lists


async def counters(
    connection: AsyncConnection, policy: Policy, asked: CounterFilter, paging: Paging, now: int
) -> Page[CounterRecord]:
    """The counters whose windows are open at `now` (ms, by the ledger's clock), by quota and subject.

    Those of one user come at once, and quotas that the user has not used are among them. Raises NotFound, and
    ChangeRefused for a cursor or a number that is not possible.
    """
    if asked.near is not None and asked.near < NEAR_PERCENT:
        raise ChangeRefused("near", f"counters are noted from {NEAR_PERCENT} % on: ask for {NEAR_PERCENT} or more")
    quotas = asked.quotas(policy)
    if asked.user is not None:
        return Page(tuple(await _of_user(connection, policy, asked, quotas, now)))
    return await _of_quotas(connection, policy, asked, quotas, paging, now)


async def _of_user(
    connection: AsyncConnection, policy: Policy, asked: CounterFilter, quotas: Mapping[str, Quota], now: int
) -> list[CounterRecord]:
    user = asked.user or ""
    own = sa.select(table).where(table.c.subject == user_subject(user))
    found = counters_of((await connection.execute(own)).all())
    # Those that the user was counted in, and those that bind the user now: groups may have changed.
    bound = policy.all_quotas(tuple(name for name in policy.groups if name in asked.user_groups)).quotas
    ids = {id for _, id in found if id in quotas and not quotas[id].shared} | {quota.id for quota in bound}
    chosen = [quotas[id] for id in sorted(ids) if id in quotas]
    found |= await read_counters(connection, [quota.key_for(user) for quota in chosen if quota.shared])
    records = (record_of(status_of(policy, quota, user, found, now), user) for quota in chosen)
    return [record for record in records if record.percent >= (asked.near or 0)]


async def most_urgent(
    connection: AsyncConnection, policy: Policy, groups: Collection[str] | None, *, limit: int, now: int
) -> tuple[CounterRecord, ...]:
    """The counters that are nearest to a limit, or over it, in quotas of these groups (None: of all)."""
    quotas = quotas_of(policy, groups)
    # Twice as many, because some may not be near any more, such as after a grant. They are read by the index in this
    # order: `+ 0` keeps SQLite from the one on `resets_at`, after which it would sort all that are near.
    key = (crossings.c.subject, crossings.c.quota_id, crossings.c.opened_at)
    is_open = (crossings.c.quota_id.in_(list(quotas)), crossings.c.resets_at + 0 > now)
    by_urgency = (crossings.c.level.desc(), crossings.c.crossed_at.desc())
    latest = sa.select(*key).where(*is_open).order_by(*by_urgency).limit(2 * limit).subquery()
    same = (table.c[name] == latest.c[name] for name in ("subject", "quota_id", "opened_at"))
    chosen = sa.select(table).join(latest, sa.and_(*same)).where(table.c.resets_at > now)
    found = [
        record_of(status_of(policy, quotas[row.quota_id], user, counters_of([row]), now), user)
        for row in (await connection.execute(chosen)).all()
        if quotas[row.quota_id].key_for(user := user_of(row.subject))[0] == row.subject
    ]
    near = sorted((each for each in found if each.percent >= NEAR_PERCENT), key=lambda each: -each.percent)
    return tuple(near[:limit])


async def _of_quotas(
    connection: AsyncConnection,
    policy: Policy,
    asked: CounterFilter,
    quotas: Mapping[str, Quota],
    paging: Paging,
    now: int,
) -> Page[CounterRecord]:
    size, after = paging.size, paging.key(str, str)
    found: list[CounterRecord] = []
    statement = _open_counters(list(quotas), now, is_near=asked.near is not None)
    while True:
        # More than once only if many that were near a limit are not any more, such as after a grant.
        rows = await _read_after(connection, statement, after, size + 1)
        for position, row in enumerate(rows):
            if position == size or len(found) == size:
                break
            after = (row.quota_id, row.subject)
            quota, user = quotas[row.quota_id], user_of(row.subject)
            if quota.key_for(user)[0] != row.subject:
                continue  # of each member from before the quota was shared, or the reverse
            record = record_of(status_of(policy, quota, user, counters_of([row]), now), user)
            if record.percent >= (asked.near or 0):
                found.append(record)
        is_last = len(rows) <= size and (not rows or after == (rows[-1].quota_id, rows[-1].subject))
        if is_last or len(found) == size:
            return Page(tuple(found), None if is_last else cursor_of(after))


def _open_counters(quota_ids: Sequence[str], now: int, *, is_near: bool) -> sa.Select[Any]:
    """The counters of these quotas whose windows are open: all, or those that were noted to be near a limit."""
    chosen = sa.select(table).where(table.c.quota_id.in_(quota_ids), table.c.resets_at > now)
    if is_near:
        same = (crossings.c.subject == table.c.subject, crossings.c.quota_id == table.c.quota_id)
        chosen = chosen.join(crossings, sa.and_(*same, crossings.c.opened_at == table.c.opened_at))
        return chosen.where(crossings.c.quota_id.in_(quota_ids), crossings.c.resets_at > now)
    return chosen


async def _read_after(
    connection: AsyncConnection, chosen: sa.Select[Any], after: tuple[str, str] | None, number: int
) -> list[sa.Row[Any]]:
    """So many rows behind a key, in the order of the index `counters_by_quota`.

    First those of the quota in the key, then those of other quotas: of a condition on both columns SQLite uses only
    the first one.
    """
    ordered = chosen.order_by(table.c.quota_id, table.c.subject)
    parts = [ordered]
    if after is not None:
        quota_id, subject = after
        parts = [
            ordered.where(table.c.quota_id == quota_id, table.c.subject > subject),
            ordered.where(table.c.quota_id > quota_id),
        ]
    rows: list[sa.Row[Any]] = []
    for part in parts:
        if len(rows) < number:
            rows += (await connection.execute(part.limit(number - len(rows)))).all()
    return rows


def status_of(policy: Policy, quota: Quota, user: str, found: Mapping[CounterKey, Counter], now: int) -> QuotaStatus:
    """The status of a quota of the policy for a user, in the limits in force."""
    return quota_statuses(policy.bound(quota).for_user(user), found, now)[quota.id]


def record_of(status: QuotaStatus, user: str) -> CounterRecord:
    """What this user has used of a quota, and has left."""
    quota, window = status.quota, status.window
    return CounterRecord(
        user=None if quota.shared else user,
        group=quota.group,
        quota=quota.id,
        models=quota.models.texts,
        shared=quota.shared,
        enforce=quota.enforce,
        per=quota.per.text,
        opened_at=None if window is None else window.opened_at,
        resets_at=None if window is None else window.resets_at,
        limits=tuple(Level(limit.measure.value, **status.use_of(limit)) for limit in quota.limits),
        grants=tuple(grant.id for grant in status.grants),
    )


# -------------------------------------------------------------------------------------------------------------- reset


@dataclass(frozen=True, slots=True)
class ResetTarget:
    """Whose counters are reset: those of a user, of a group's quotas (its members' and its pots), or of one quota.

    With a user or a group, `quota` means only the one of this id.
    """

    user: str | None = None
    group: str | None = None
    quota: str | None = None


@dataclass(frozen=True, slots=True)
class ResetQuota:
    """How many counters of one quota were reset, and what they had used together, by quantity (see `Amount`)."""

    quota: str
    counters: int
    used: dict[str, int]


@dataclass(frozen=True, slots=True)
class Reset:
    """What a reset did, or would do. Counters that had used nothing are not in it."""

    quotas: tuple[ResetQuota, ...] = ()

    @property
    def counters(self) -> int:
        """How many counters were reset."""
        return sum(each.counters for each in self.quotas)


async def make_reset(
    changes: Changes, policy: Policy, target: ResetTarget, *, groups: Collection[str] | None = None, reason: str = ""
) -> Reset:
    """`reset` as a change of its own, with its row in the audit log. Also raises StoreUnavailable."""
    check_reason(reason)
    user = None if target.user is None else audit_name(UserId.of_subject(target.user))
    async with changes.begin("counters.reset", user or target.group or target.quota or "") as change:
        return await reset(change, policy, target, groups=groups, reason=reason, now=changes.now)


async def reset(
    change: Change,
    policy: Policy,
    target: ResetTarget,
    *,
    groups: Collection[str] | None = None,
    reason: str = "",
    now: Callable[[], int],
) -> Reset:
    """Set what counters with an open window have used to 0, and note it in the audit log.

    What is held, and the window's start and end, stay: calls in flight settle into it. `groups` are the groups whose
    quotas the admin who asks may reset (None: all). `now` gives ms since 1970. Raises NotFound, and ChangeRefused
    for a target that has no counters of its own.
    """
    at = await ledger_now(change.connection, now)
    used = [table.c[f"used_{quantity}"] for quantity in QUANTITIES]
    chosen = (*_conditions(policy, target, groups), table.c.resets_at > at, sa.or_(*(each > 0 for each in used)))
    emptied = {each.name: 0 for each in used}
    if change.connection.dialect.name == "sqlite":
        sums = await _reset_on_sqlite(change.connection, chosen, {**emptied, "reset_at": at})
    else:
        # After the lock was taken, for which this may have to wait: calls can expire until then.
        sums = await _reset_on_postgres(change.connection, chosen, {**emptied, "reset_at": POSTGRES_NOW})
    done = Reset(
        tuple(
            ResetQuota(quota, number, dict(zip(QUANTITIES, map(int, numbers), strict=True)))
            for quota, number, *numbers in map(tuple, sums)
        )
    )
    emptied_quotas = {each.quota: dict.fromkeys(each.used, 0) for each in done.quotas}
    change.note(
        {"used": {each.quota: each.used for each in done.quotas}},
        {"used": emptied_quotas, "counters": done.counters, **({"reason": reason} if reason else {})},
    )
    return done


async def reset_since(
    connection: AsyncConnection, policy: Policy, target: ResetTarget, *, groups: Collection[str] | None, since: int
) -> dict[CounterKey, Counter]:
    """The counters of a target that were reset since an instant (ms, by the ledger's clock), as they are now.

    If there are more than RESETS_SHOWN_MAX, only so many of them.
    """
    chosen = sa.select(table).where(*_conditions(policy, target, groups), table.c.reset_at >= since)
    return counters_of((await connection.execute(chosen.limit(RESETS_SHOWN_MAX))).all())


def _conditions(
    policy: Policy, target: ResetTarget, groups: Collection[str] | None
) -> tuple[sa.ColumnElement[bool], ...]:
    asked = CounterFilter(quota=target.quota, group=target.group, groups=groups)
    quotas = asked.quotas(policy)
    if target.user is None:
        if target.group is None and target.quota is None:
            raise ChangeRefused("user", "say whose counters are to be reset: a user, a group or a quota")
        return (table.c.quota_id.in_(list(quotas)),)
    if target.quota is not None and quotas[target.quota].shared:
        raise ChangeRefused(
            "quota", f"all members of {quotas[target.quota].group} share {target.quota}: leave out the user"
        )
    return (table.c.subject == user_subject(target.user), table.c.quota_id.in_(list(quotas)))


def _sums(of: Any) -> list[Any]:
    return [of.quota_id, sa.func.count(), *(sa.func.sum(of[f"used_{quantity}"]) for quantity in QUANTITIES)]


async def _reset_on_sqlite(
    connection: AsyncConnection, chosen: Sequence[sa.ColumnElement[bool]], emptied: Mapping[str, object]
) -> Sequence[sa.Row[Any]]:
    """Both statements see the same rows, because the transaction has the database's one lock."""
    sums = sa.select(*_sums(table.c)).where(*chosen).group_by(table.c.quota_id).order_by(table.c.quota_id)
    rows = (await connection.execute(sums)).all()
    await connection.execute(sa.update(table).where(*chosen).values(**emptied))
    return rows


async def _reset_on_postgres(
    connection: AsyncConnection, chosen: Sequence[sa.ColumnElement[bool]], emptied: Mapping[str, object]
) -> Sequence[sa.Row[Any]]:
    """Rows are locked in the order in which batches of calls lock them (see `ledger.postgres`), so none deadlocks.

    It is one statement, so exactly the rows that were locked are emptied, and their sums are those of the moment at
    which each was locked.
    """
    key = [sa.collate(table.c[name], "C") for name in ("subject", "quota_id")]
    locked = sa.select(table).where(*chosen).order_by(*key).with_for_update().cte("locked")
    same = (table.c.subject == locked.c.subject, table.c.quota_id == locked.c.quota_id)
    empty = sa.update(table).where(*same).values(**emptied).cte("emptied")
    sums = sa.select(*_sums(locked.c)).group_by(locked.c.quota_id).order_by(locked.c.quota_id)
    return (await connection.execute(sums.add_cte(empty))).all()
