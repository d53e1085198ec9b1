"""The status of a user's quotas: one view that `/v1/quota`, refusals and rate-limit headers share.

Instants are shown in two forms: `reset_at` is RFC 3339 in the policy's time zone, for people; `opened_at` and
`resets_at` are whole seconds since 1970, for programs. Resets are rounded up: a window that ends at 12:00:00.400 is
shown as 12:00:01, because a client that came back at 12:00:00 would still be refused.

Pure. How refusals and headers say it stands in `formats.refusal` and `formats.limit_headers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from zoneinfo import ZoneInfo

from proxy.policy.amounts import MEASURES, Amount, Measure
from proxy.policy.quota import Binding, Counter, CounterKey, Limit, Quota, counter_at
from proxy.policy.windows import rfc3339


@dataclass(frozen=True, slots=True)
class QuotaStatus:
    """One quota and how its counter stands for one user at one instant."""

    quota: Quota
    counter: Counter

    def remaining(self, limit: Limit) -> int:
        """What is neither used nor held of a limit; never below 0. `after` lets in whatever is held."""
        held = 0 if self.quota.enforce == "after" else self.counter.held.of(limit.measure)
        return max(0, limit.maximum - self.counter.used.of(limit.measure) - held)

    def remaining_share(self, limit: Limit) -> tuple[int, int]:
        """Smaller is tighter: parts per million that remain, then how many."""
        remaining = self.remaining(limit)
        return remaining * 1_000_000 // max(1, limit.maximum), remaining

    def tightest(self) -> Limit:
        """The limit of this quota of which the smallest part remains."""
        limits = self.quota.limits
        return limits[0] if len(limits) == 1 else min(limits, key=self.remaining_share)

    def as_json(self, zone: ZoneInfo) -> dict[str, object]:
        """The item of `/v1/quota`."""
        limits = {limit.measure: limit for limit in self.quota.limits}
        return {
            "id": self.quota.id,
            "group": self.quota.group,
            "models": list(self.quota.models.texts),
            "shared": self.quota.shared,
            "enforce": self.quota.enforce,
            "window": self._window(zone),
            **{measure: self._level(limits.get(measure)) for measure in MEASURES},
        }

    def _window(self, zone: ZoneInfo) -> dict[str, object]:
        per, window = self.quota.per, self.counter.window
        shown = per.kind == "calendar" or self.counter.is_open
        return {
            "kind": per.kind,
            "per": per.text,
            "opened_at": window.opened_at // 1000 if shown else None,
            "resets_at": seconds_up(window.resets_at) if shown else None,
            "reset_at": rfc3339(window.resets_at, zone) if shown else None,
        }

    def _level(self, limit: Limit | None) -> dict[str, object] | None:
        if limit is None:
            return None
        used = self.counter.used.of(limit.measure)
        return {
            "limit": limit.maximum,
            "used": used,
            "held": self.counter.held.of(limit.measure),
            "remaining": self.remaining(limit),
            "percent": round(100 * used / limit.maximum, 1) if limit.maximum else 100.0,
        }


def quota_statuses(
    binding: Binding,
    counters: Mapping[CounterKey, Counter],
    now: int,
    *,
    without: Mapping[tuple[CounterKey, int], Amount] | None = None,
) -> dict[str, QuotaStatus]:
    """The status of each quota of a binding, by the quota's id.

    `without` is left out of what is held: what one open call holds itself, by counter and the instant at which its
    window opened.
    """
    own = without or {}
    statuses: dict[str, QuotaStatus] = {}
    for quota in binding.quotas:
        key = quota.key_for(binding.user)
        counter = counter_at(now, quota, counters.get(key))
        if mine := own.get((key, counter.window.opened_at)):
            counter = replace(counter, held=counter.held - mine)
        statuses[quota.id] = QuotaStatus(quota, counter)
    return statuses


def seconds_up(instant: int) -> int:
    """Milliseconds to whole seconds, rounded up."""
    return -(-instant // 1000)


def duration_text(length_ms: int) -> str:
    """A length of time for people, to two places: `5h 12m`, `45s`, `3d 4h`."""
    total = max(0, seconds_up(length_ms))
    parts = ((total // 86400, "d"), (total // 3600 % 24, "h"), (total // 60 % 60, "m"), (total % 60, "s"))
    first = next((place for place, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2] if count) or "0s"


def first_to_refuse(
    binding: Binding, statuses: Mapping[str, QuotaStatus], measures: tuple[Measure, ...]
) -> tuple[QuotaStatus, Limit] | None:
    """The limit at which this user is refused first: the tightest of the most generous way in."""
    tightest: list[tuple[int, QuotaStatus, Limit]] = []
    for way in binding.alternatives():
        limits = [
            (statuses[quota.id].remaining(limit), statuses[quota.id], limit)
            for quota in way.quotas
            for limit in quota.limits
            if limit.measure in measures
        ]
        if not limits:
            return None  # this way has no such limit, so none of the others' ever refuses
        tightest.append(min(limits, key=lambda item: item[0]))
    _, standing, limit = max(tightest, key=lambda item: item[0])
    return standing, limit
