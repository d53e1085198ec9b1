"""What needs an administrator's attention: who was refused, who is near a limit, and which pots will run out.

It is read from what calls have written when they were refused, and when a counter reached 80 % of a limit. The table
of counters is not scanned.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.counters import CounterRecord, most_urgent, quotas_of, status_of
from proxy.administration.refusals import RefusalFilter, RefusalRecord, last_refusals
from proxy.ledger.queries import HOUR_MS, read_counters
from proxy.policy.policy import Policy
from proxy.policy.quota import Counter, CounterKey, Quota

# How many users of each kind are shown.
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class PotForecast:
    """A pot that will run out before its reset if its group goes on at this pace.

    `runs_out_at` is when the limit is reached (ms), or was, if it is used up.
    """

    quota: str
    group: str
    measure: str
    limit: int
    used: int
    opened_at: int
    resets_at: int
    runs_out_at: int


@dataclass(frozen=True, slots=True)
class Attention:
    """What needs attention.

    - `refused`: the last refusal of each user by each quota in the last hour, the latest first. `count` is how many
      there were.
    - `near`: counters that have used 80 % of a limit or more, the largest part first, up to 100.
    - `pots`: those that will run out before their reset, the first one first.
    """

    refused: tuple[RefusalRecord, ...]
    near: tuple[CounterRecord, ...]
    pots: tuple[PotForecast, ...]


async def attention(
    connection: AsyncConnection, policy: Policy, *, groups: Collection[str] | None = None, now: int
) -> Attention:
    """What needs attention at `now` (ms, by the ledger's clock), in quotas of these groups (None: of all)."""
    refused = await last_refusals(connection, RefusalFilter(since=now - HOUR_MS, groups=groups), limit=_SHOWN)
    near = await most_urgent(connection, policy, groups, limit=_SHOWN, now=now)
    pots = [quota for quota in quotas_of(policy, groups).values() if quota.shared and quota.enforce != "shadow"]
    found = await read_counters(connection, [quota.key_for("") for quota in pots])
    forecasts = [each for quota in pots for each in _forecasts(policy, quota, found, now)]
    return Attention(tuple(refused), near, tuple(sorted(forecasts, key=lambda each: (each.runs_out_at, each.quota))))


def _forecasts(policy: Policy, quota: Quota, found: Mapping[CounterKey, Counter], now: int) -> Iterator[PotForecast]:
    """When each limit of a pot is reached, if as much is used in each hour as on average since the window opened.

    Example: 600 of 1,000 tokens were used from 12:00 to 15:00. At 200 an hour, the limit is reached at 17:00.
    """
    status = status_of(policy, quota, "", found, now)
    counter, window = status.counter, status.counter.window
    # After a reset the pace is that of what was used since then.
    began = max(window.opened_at, counter.reset_at)
    for limit in status.quota.window_limits:
        used = counter.used.of(limit.measure)
        if used <= 0 or now <= began:
            continue
        at = min(now, window.resets_at) if used >= limit.maximum else began + limit.maximum * (now - began) // used
        if at < window.resets_at:
            yield PotForecast(
                quota=quota.id,
                group=quota.group,
                measure=limit.measure.value,
                limit=limit.maximum,
                used=used,
                opened_at=window.opened_at,
                resets_at=window.resets_at,
                runs_out_at=at,
            )
