"""The rate-limit headers of every metered answer, in the words of OpenAI, of the IETF draft and of Anthropic.

They describe the quota that would refuse this user on this model first. Pure.
"""

from collections.abc import Mapping
from zoneinfo import ZoneInfo

from proxy.policy.amounts import MEASURES
from proxy.policy.quota import Binding, Limit
from proxy.policy.status import QuotaStatus, first_to_refuse, seconds_up
from proxy.policy.windows import rfc3339

_UTC = ZoneInfo("UTC")


def rate_limit_headers(binding: Binding, statuses: Mapping[str, QuotaStatus], now: int) -> dict[str, str]:
    """The headers of every metered answer.

    `x-ratelimit-*` are OpenAI's names, with Go durations (`6m0s`); `RateLimit-Policy` and `RateLimit` are those of
    the IETF draft "RateLimit header fields for HTTP" (draft-ietf-httpapi-ratelimit-headers), one item for each of
    the three tightest quotas. "tokens" is not a unit that the draft registers; it says so with `qu`.
    """
    headers: dict[str, str] = {}
    for kind, measures in (("tokens", MEASURES[:3]), ("requests", MEASURES[3:])):
        if first := first_to_refuse(binding, statuses, measures):
            standing, limit = first
            headers[f"x-ratelimit-limit-{kind}"] = str(limit.maximum)
            headers[f"x-ratelimit-remaining-{kind}"] = str(standing.remaining(limit))
            headers[f"x-ratelimit-reset-{kind}"] = go_duration(standing.counter.window.resets_at - now)
    bound = [(standing, standing.tightest()) for standing in statuses.values() if standing.quota.enforce != "shadow"]
    tightest = sorted(bound, key=lambda item: item[0].remaining_share(item[1]))[:3]
    if tightest:
        headers["ratelimit-policy"] = ", ".join(_policy_item(standing, limit) for standing, limit in tightest)
        headers["ratelimit"] = ", ".join(_level_item(standing, limit, now) for standing, limit in tightest)
    return headers


def go_duration(length_ms: int) -> str:
    """A length of time as Go's time.ParseDuration reads it: `6m0s`, `1h0m30s`, `0s`."""
    total = max(0, seconds_up(length_ms))
    hours, minutes, seconds = total // 3600, total // 60 % 60, total % 60
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def _policy_item(standing: QuotaStatus, limit: Limit) -> str:
    window = standing.counter.window
    unit = "" if limit.measure == "requests" else ';qu="tokens"'
    return f'"{standing.quota.id}";q={limit.maximum};w={seconds_up(window.resets_at - window.opened_at)}{unit}'


def _level_item(standing: QuotaStatus, limit: Limit, now: int) -> str:
    resets_in = max(0, seconds_up(standing.counter.window.resets_at - now))
    return f'"{standing.quota.id}";r={standing.remaining(limit)};t={resets_in}'


def anthropic_limit_headers(binding: Binding, statuses: Mapping[str, QuotaStatus]) -> dict[str, str]:
    """What `x-ratelimit-*` say, under Anthropic's names; the reset is an instant in UTC, rounded up."""
    headers: dict[str, str] = {}
    for kind, measures in (("tokens", MEASURES[:3]), ("requests", MEASURES[3:])):
        if first := first_to_refuse(binding, statuses, measures):
            standing, limit = first
            resets_at = rfc3339(standing.counter.window.resets_at, _UTC)
            headers[f"anthropic-ratelimit-{kind}-limit"] = str(limit.maximum)
            headers[f"anthropic-ratelimit-{kind}-remaining"] = str(standing.remaining(limit))
            headers[f"anthropic-ratelimit-{kind}-reset"] = resets_at.replace("+00:00", "Z")
    return headers
