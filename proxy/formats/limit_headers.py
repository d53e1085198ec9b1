"""The rate-limit headers of every metered answer, under the names of OpenAI, of the IETF draft and of Anthropic.

Example, with 50,000 of 200,000 tokens used and 5 h 12 min until midnight:

    x-ratelimit-limit-tokens: 200000
    x-ratelimit-remaining-tokens: 150000
    x-ratelimit-reset-tokens: 5h12m0s
    RateLimit-Policy: "staff/daily";q=200000;w=86400;qu="tokens"
    RateLimit: "staff/daily";r=150000;t=18720

The headers with fixed names describe the quota that would refuse this user first on this model. All times are rounded
up to whole seconds, so that a client that waits for them is not too early. Pure.
"""

from collections.abc import Mapping, Sequence
from zoneinfo import ZoneInfo

from proxy.policy.amounts import FAMILIES, Family
from proxy.policy.binding import Binding
from proxy.policy.status import NEAR_PERCENT, QuotaStatus, Use, first_to_refuse, seconds_up
from proxy.policy.windows import rfc3339

_UTC = ZoneInfo("UTC")
# How many quotas the draft's headers list, so that they stay short for a user with many groups.
_QUOTAS_MAX = 3
# OpenAI's names, which are for tokens and for requests.
_OPENAI_NAMES: Mapping[Family, Sequence[str]] = {
    family: [f"x-ratelimit-{part}-{family}" for part in ("limit", "remaining", "reset")] for family in FAMILIES
}


def rate_limit_headers(binding: Binding, statuses: Mapping[str, QuotaStatus], now: int) -> dict[str, str]:
    """OpenAI's headers and those of the IETF draft; none if no quota binds the user.

    `x-ratelimit-*` are OpenAI's names, with Go durations (`6m0s`). `RateLimit-Policy` and `RateLimit` are the fields
    of "RateLimit header fields for HTTP" (draft-ietf-httpapi-ratelimit-headers), with one item for each of the three
    tightest quotas. The draft does not register "tokens" as a unit; it is stated in `qu` all the same, because
    without `qu` the numbers would mean requests. `now` is in milliseconds since 1970.
    """
    headers: dict[str, str] = {}
    for family, (status, use) in first_to_refuse(binding, statuses).items():
        limit, remaining, reset = _OPENAI_NAMES[family]
        headers[limit] = str(use.limit.maximum)
        headers[remaining] = str(use.remaining)
        headers[reset] = go_duration(status.counter.window.resets_at - now)
    # Tightest first, by the part that remains and then by the number: of 1000 with 100 left (10 %), 100 with 50 left
    # (50 %) and 50 with none left (0 %), the order is 50, 1000, 100. Shadow quotas refuse nothing, so they are left
    # out.
    found: list[tuple[int, int, int, QuotaStatus, Use]] = []
    for status in statuses.values():
        if status.quota.enforce != "shadow" and (tightest := status.tightest) is not None:
            found.append((tightest.share, tightest.remaining, len(found), status, tightest))
    if not found:
        return headers
    found.sort()
    policy, left = "", ""
    for _, _, _, status, use in found[:_QUOTAS_MAX]:
        window, comma = status.counter.window, ", " if policy else ""
        unit = "" if use.limit.measure.family == "requests" else ';qu="tokens"'
        length, rest = seconds_up(window.resets_at - window.opened_at), seconds_up(window.resets_at - now)
        policy += f'{comma}"{status.quota.id}";q={use.limit.maximum};w={length}{unit}'
        left += f'{comma}"{status.quota.id}";r={use.remaining};t={rest if rest > 0 else 0}'
    headers["ratelimit-policy"], headers["ratelimit"] = policy, left
    return headers


def anthropic_limit_headers(binding: Binding, statuses: Mapping[str, QuotaStatus]) -> dict[str, str]:
    """The same limits as `x-ratelimit-*` under Anthropic's names. The reset is an instant in UTC, rounded up."""
    headers: dict[str, str] = {}
    for family, (status, use) in first_to_refuse(binding, statuses).items():
        resets_at = rfc3339(status.counter.window.resets_at, _UTC)
        headers[f"anthropic-ratelimit-{family}-limit"] = str(use.limit.maximum)
        headers[f"anthropic-ratelimit-{family}-remaining"] = str(use.remaining)
        headers[f"anthropic-ratelimit-{family}-reset"] = resets_at.replace("+00:00", "Z")
    return headers


def warning_headers(statuses: Mapping[str, QuotaStatus], now: int) -> dict[str, str]:
    """`x-quota-warning` from 80 % of a limit on: a list with an item for each such limit (RFC 9651).

    Example: `"staff/daily";u="tokens";p=83;r=34000;t=18720`: 83 % of the tokens are used, 34,000 are left, and more
    in 18,720 s. Shadow quotas refuse nothing, so they are left out. `now` is in milliseconds since 1970.
    """
    items = []
    for status in statuses.values():
        # What is used of a limit does not remain of it.
        is_far = status.tightest is None or status.tightest.share > (100 - NEAR_PERCENT) * 10_000
        if is_far or status.quota.enforce == "shadow":
            continue
        for limit, used, remaining, _ in status.uses:
            # A limit of 0 is a switch that is off, and nobody is near it.
            if 100 * used >= NEAR_PERCENT * limit.maximum > 0:
                t = max(0, seconds_up(status.counter.window.resets_at - now))
                p = 100 * used // limit.maximum
                items.append(f'"{status.quota.id}";u="{limit.measure.value}";p={p};r={remaining};t={t}')
    return {"x-quota-warning": ", ".join(items)} if items else {}


def go_duration(length_ms: int) -> str:
    """A duration as Go's `time.ParseDuration` reads it: `6m0s`, `1h0m30s`, `0s`. Rounded up to whole seconds.

    Go has no unit for days: 31 days are `744h0m0s`.
    """
    total = max(0, seconds_up(length_ms))
    minutes, seconds = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
