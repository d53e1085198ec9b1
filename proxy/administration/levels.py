"""How much of the quotas is used, for the metrics: what pots use and hold, and how many members are near a limit.

There may be 100,000 counters, and a gauge is no reason to read them into memory: the database counts them. One
statement counts those of all quotas with the same limits. Example, for `tokens: 200k`:

    counters with an open window                       80 % (160k)      100 % (200k)
    staff/daily    ann 170k, bob 200k, eve 12k                   2                 1
    lab/daily      dan 199k                                      1                 0
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.counters import status_of
from proxy.ledger.queries import IS_OF_MEMBER, read_counters, used_of
from proxy.ledger.schema import counters
from proxy.policy.policy import Policy
from proxy.policy.quota import Limit, Quota
from proxy.policy.status import NEAR_PERCENT

PERCENTAGES = (NEAR_PERCENT, 100)
# How many quotas are counted, and how many members with a grant of their own are looked at, by one statement.
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Levels:
    """What metrics state of quotas.

    - `pots`: the limit in force, what is used and what is held, by the quota's id and the measure.
    - `members`: how many have used that many percent of a limit or more, by the quota's id and the percentage. If
      nobody has, it is 0.
    """

    pots: Mapping[tuple[str, str], tuple[int, int, int]]
    members: Mapping[tuple[str, int], int]


async def levels(connection: AsyncConnection, policy: Policy, now: int) -> Levels:
    """The levels of all quotas of a policy at `now` (ms, by the ledger's clock), in windows that are open then."""
    shared = [quota for quota in policy.quotas.values() if quota.shared]
    own = [quota for quota in policy.quotas.values() if not quota.shared]
    return Levels(await _pots(connection, policy, shared, now), await _members(connection, policy, own, now))


async def _pots(
    connection: AsyncConnection, policy: Policy, quotas: Sequence[Quota], now: int
) -> dict[tuple[str, str], tuple[int, int, int]]:
    found = await read_counters(connection, [quota.key_for("") for quota in quotas]) if quotas else {}
    statuses = [status_of(policy, quota, "", found, now) for quota in quotas]
    return {
        (status.quota.id, limit.measure.value): (
            limit.maximum,
            status.counter.used.of(limit.measure),
            status.counter.held.of(limit.measure),
        )
        for status in statuses
        for limit in status.quota.limits
    }


async def _members(
    connection: AsyncConnection, policy: Policy, quotas: Sequence[Quota], now: int
) -> dict[tuple[str, int], int]:
    numbers = {(quota.id, percent): 0 for quota in quotas for percent in PERCENTAGES}
    with_limits: dict[tuple[Limit, ...], list[Quota]] = defaultdict(list)
    for quota in quotas:
        raised = quota.raised(policy.grants.get(quota.id, {}).get(None, ()), now)
        # A limit of 0 is a switch that is off, and nobody is near it.
        if limits := tuple(limit for limit in raised.limits if limit.maximum):
            with_limits[limits].append(quota)
    for limits, alike in with_limits.items():
        for some in range(0, len(alike), _AT_ONCE):
            counted = _count(limits, [quota.id for quota in alike[some : some + _AT_ONCE]], now)
            for quota_id, near, full in (await connection.execute(counted)).all():
                for percent, number in zip(PERCENTAGES, (near, full), strict=True):
                    numbers[quota_id, percent] = int(number)  # PostgreSQL's sums are decimals
        for quota in alike:
            await _correct_for_own_grants(connection, policy, quota, limits, numbers, now)
    return numbers


def _count(limits: Sequence[Limit], quota_ids: Sequence[str], now: int) -> sa.Select[str, int, int]:
    """How many counters have reached each percentage of one of these limits, by quota. Without quotas of 0."""
    near, full = (_has_reached(limits, percent) for percent in PERCENTAGES)
    return (
        sa.select(counters.c.quota_id, sa.func.count(), sa.func.sum(sa.case((full, 1), else_=0)))
        .where(counters.c.quota_id.in_(quota_ids), counters.c.resets_at > now, IS_OF_MEMBER, near)
        .group_by(counters.c.quota_id)
    )


def _has_reached(limits: Sequence[Limit], percent: int) -> sa.ColumnElement[bool]:
    """Whether a counter has used this percentage of one of the limits."""
    return sa.or_(
        *(
            # Rounded up, in integers: 80 % of 3 requests are reached with the third.
            used_of(limit.measure) >= -(-limit.maximum * percent // 100)
            for limit in limits
        )
    )


async def _correct_for_own_grants(
    connection: AsyncConnection,
    policy: Policy,
    quota: Quota,
    limits: Sequence[Limit],
    numbers: dict[tuple[str, int], int],
    now: int,
) -> None:
    """Count the members for whom a grant of their own raises the limits by these, and not by those of all.

    Example: 200k are the limit of all, and ann's is 300k. She has used 170k: near the limit of all, but not her own.
    """
    grants = policy.grants.get(quota.id, {})
    users = [user for user, own in grants.items() if user is not None and quota.running(own, now)]
    for some in range(0, len(users), _AT_ONCE):
        chosen = users[some : some + _AT_ONCE]
        found = await read_counters(connection, [quota.key_for(user) for user in chosen])
        for user in chosen:
            status = status_of(policy, quota, user, found, now)
            used = status.counter.used
            for percent in PERCENTAGES:
                by_own, by_all = (
                    any(100 * used.of(limit.measure) >= percent * limit.maximum for limit in each if limit.maximum)
                    for each in (status.quota.limits, limits)
                )
                numbers[quota.id, percent] += by_own - by_all
