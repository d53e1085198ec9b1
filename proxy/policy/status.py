"""The status of a user's quotas: one view for `/v1/quota`, refusals and rate-limit headers.

Instants are shown in two forms: `reset_at` is RFC 3339 in the policy's time zone, for people; `opened_at` and
`resets_at` are whole seconds since 1970, for programs. Resets are rounded up: a window that ends at 12:00:00.400 is
shown as 12:00:01, because a client that came back at 12:00:00 would still be refused. Openings, and the ends of
grants, are rounded down.

Pure. The texts of refusals are in `formats.refusal`, the headers in `formats.limit_headers`.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypedDict
from zoneinfo import ZoneInfo

from proxy.policy.amounts import FAMILIES, MEASURES, NO_AMOUNT, Amount, Family, totals_of
from proxy.policy.binding import Binding
from proxy.policy.quota import Counter, CounterKey, Grant, Limit, Quota, counter_at
from proxy.policy.windows import Window, rfc3339

# From this part of a limit on a user is near it, in percent.
NEAR_PERCENT = 80


class LimitUse(TypedDict):
    """What is used, held and left of one limit, for output. `percent` is its used part, to one decimal."""

    limit: int
    used: int
    held: int
    remaining: int
    percent: float


class Use(NamedTuple):
    """What is used of a limit, and what is neither used nor held, which is never below 0.

    `share` is what remains in parts per million. It is an integer, because floats are never compared: 667 of 1,000
    tokens is 667_000.
    """

    limit: Limit
    used: int
    remaining: int
    share: int


class QuotaStatus:
    """One quota, and its counter for one user at one instant.

    `grants` are those that run at this instant. The limits of `quota` are raised by them already. `uses` has what is
    used and what remains of each limit that depends on the window. `tightest` is the one of these of which the
    smallest part remains; None if no limit depends on the window.
    """

    __slots__ = ("counter", "grants", "quota", "tightest", "uses")

    def __init__(self, quota: Quota, counter: Counter, grants: tuple[Grant, ...] = ()) -> None:
        self.quota = quota
        self.counter = counter
        self.grants = grants
        # With `enforce: after` holds do not count, because such a quota admits calls whatever others hold.
        used, held = totals_of(counter.used), totals_of(NO_AMOUNT if quota.enforce == "after" else counter.held)
        tightest: Use | None = None
        self.uses: list[Use] = []
        for limit in quota.window_limits:
            position, maximum = limit.measure.position, limit.maximum
            left = max(0, maximum - used[position] - held[position])
            use = Use(limit, used[position], left, left * 1_000_000 // (maximum or 1))
            self.uses.append(use)
            if tightest is None or (use.share, left) < (tightest.share, tightest.remaining):
                tightest = use
        self.tightest = tightest

    def use_of(self, limit: Limit) -> LimitUse:
        """What is used, held and left of a limit. A limit of 0 is used up."""
        maximum, of = limit.maximum, limit.measure.total
        used, held = of(self.counter.used), of(self.counter.held)
        left = maximum - used - (0 if self.quota.enforce == "after" else held)  # see `uses` about holds
        return {
            "limit": maximum,
            "used": used,
            "held": held,
            "remaining": max(0, left),
            "percent": round(100 * used / maximum, 1) if maximum else 100.0,
        }

    @property
    def window(self) -> Window | None:
        """The window; None for one of the first-call kind before a call opens it.

        Its end would be later at each request.
        """
        return self.counter.window if self.quota.per.kind == "calendar" or self.counter.is_open else None

    def as_json(self, zone: ZoneInfo) -> dict[str, object]:
        """This quota as an item of `/v1/quota`; times in RFC 3339 are those of `zone`."""
        uses: dict[str, LimitUse | None] = dict.fromkeys(MEASURES)
        is_near = False
        for limit in self.quota.limits:
            use = uses[limit.measure] = self.use_of(limit)
            # A limit of 0 is a switch that is off, and nobody is near it.
            is_near = is_near or 100 * use["used"] >= NEAR_PERCENT * use["limit"] > 0
        return {
            "id": self.quota.id,
            "group": self.quota.group,
            "models": list(self.quota.models.texts),
            "shared": self.quota.shared,
            "enforce": self.quota.enforce,
            "window": self._window_json(zone),
            **uses,
            "near": is_near,
            "grants": [_grant(grant, zone) for grant in self.grants],
        }

    def _window_json(self, zone: ZoneInfo) -> dict[str, object]:
        per, window = self.quota.per, self.window
        return {
            "kind": per.kind,
            "per": per.text,
            "opened_at": None if window is None else window.opened_at // 1000,
            "resets_at": None if window is None else seconds_up(window.resets_at),
            "reset_at": None if window is None else rfc3339(window.resets_at, zone),
        }


def quota_statuses(
    binding: Binding,
    counters: Mapping[CounterKey, Counter],
    now: int,
    *,
    without: Mapping[tuple[CounterKey, int], Amount] | None = None,
) -> dict[str, QuotaStatus]:
    """The status of each quota of a binding, by quota id, with the limits and grants at `now` (ms).

    `without` is subtracted from what is held, by counter and by the instant at which its window opened. It is what
    one call in flight holds itself, so that its own headers say what remains for other calls. The instant is compared
    because a call that outlives its window holds nothing of the next: reserved at 11:59 with `per: hour`, its hold
    must not be subtracted from what others hold at 12:01.
    """
    statuses: dict[str, QuotaStatus] = {}
    for quota, key in zip(binding.at(now).quotas, binding.keys(), strict=True):
        counter = counter_at(now, quota, counters.get(key))
        if without and (mine := without.get((key, counter.window.opened_at))):
            counter = Counter(counter.window, counter.used, counter.held - mine, counter.reset_at)
        grants = quota.running(binding.grants.get(quota.id, ()), now) if binding.grants else ()
        statuses[quota.id] = QuotaStatus(quota, counter, grants)
    return statuses


def _grant(grant: Grant, zone: ZoneInfo) -> dict[str, object]:
    until = grant.until // 1000
    return {
        "id": grant.id,
        "measure": grant.measure.value,
        "amount": grant.amount,
        "until": until,
        "until_at": rfc3339(until * 1000, zone),
    }


def seconds_up(instant: int) -> int:
    """Milliseconds to whole seconds, rounded up: 12,400 gives 13."""
    # Integer division rounds down, so the number is negated before and after: -(-12400 // 1000) is -(-13).
    return -(-instant // 1000)


def duration_text(length_ms: int) -> str:
    """A duration for people, in its largest unit and the next one if that is not 0: `5h 12m`, `45s`, `3d 4h`."""
    total = max(0, seconds_up(length_ms))
    parts = ((total // 86400, "d"), (total // 3600 % 24, "h"), (total // 60 % 60, "m"), (total % 60, "s"))
    first = next((position for position, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2] if count) or "0s"


def first_to_refuse(binding: Binding, statuses: Mapping[str, QuotaStatus]) -> dict[Family, tuple[QuotaStatus, Use]]:
    """The limit of each family that will refuse this user first, with its quota; none of a family that never will.

    Limits on concurrent measures are left out, because no reset changes what remains of them. All limits are those of
    `statuses`, which grants have raised.

    Within an alternative the limit with the least remaining refuses first. A call is refused only when every
    alternative refuses it, so among them the one with the most remaining counts. With `combine: any_group`, 100
    tokens left in `staff` and 400 in `lab`, the user is refused when the 400 are used.
    """
    first: dict[Family, tuple[QuotaStatus, Use]] | None = None
    for alternative in binding.alternatives():
        least: dict[Family, tuple[QuotaStatus, Use]] = {}
        for quota in alternative.quotas:
            status = statuses[quota.id]
            for use in status.uses:
                family = use.limit.measure.family
                known = least.get(family)
                if known is None or use.remaining < known[1].remaining:
                    least[family] = status, use
        if first is None:
            first = least
        else:
            # If an alternative has no limit of a family, those of the others never refuse the user.
            first = {
                family: max(found, least[family], key=lambda each: each[1].remaining)
                for family, found in first.items()
                if family in least
            }
    return {family: first[family] for family in FAMILIES if family in first} if first else {}
