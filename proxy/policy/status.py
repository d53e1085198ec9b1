"""How a user's quotas stand: one view that `/v1/quota`, refusals and rate-limit headers share.

Instants go out in two forms, as in the refusal: `reset_at` is RFC 3339 in the policy's time zone, for people;
`opened_at` and `resets_at` are whole seconds since 1970, for programs. Resets are rounded up: whoever comes back
at the instant that was named is let in.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from zoneinfo import ZoneInfo

from proxy.errors import NeverFits, ProxyError, Refusal
from proxy.ledger.book import Entry
from proxy.policy.admission import Block, NotAdmitted, Verdict
from proxy.policy.amounts import MEASURES, Measure
from proxy.policy.policy import Policy
from proxy.policy.quota import Binding, Counter, CounterKey, Limit, Quota, counter_at
from proxy.policy.windows import rfc3339

# A wait that SDKs sleep through on their own is answered as a rate limit; a longer one as a quota that is used
# up, with `x-should-retry: false`, the only header that every SDK release obeys for long waits.
_SOON_S = 60

_UNIT = {"tokens": "tokens", "input_tokens": "input tokens", "output_tokens": "output tokens", "requests": "requests"}


@dataclass(frozen=True, slots=True)
class QuotaStatus:
    """One quota and how its counter stands for one user at one instant."""

    quota: Quota
    counter: Counter

    def remaining(self, limit: Limit) -> int:
        """What is neither used nor held of a limit; never below 0. `after` lets in whatever is held."""
        held = 0 if self.quota.enforce == "after" else self.counter.held.of(limit.measure)
        return max(0, limit.maximum - self.counter.used.of(limit.measure) - held)

    def fullness(self, limit: Limit) -> tuple[int, int]:
        """Smaller is tighter: parts per million that remain, then how many."""
        remaining = self.remaining(limit)
        return remaining * 1_000_000 // max(1, limit.maximum), remaining

    def tightest(self) -> Limit:
        """The limit of this quota of which the smallest part remains."""
        limits = self.quota.limits
        return limits[0] if len(limits) == 1 else min(limits, key=self.fullness)

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
    binding: Binding, counters: Mapping[CounterKey, Counter], now: int, *, without: Entry | None = None
) -> dict[str, QuotaStatus]:
    """How each quota of a binding stands, by its id; `without` leaves out what this open call itself holds."""
    is_held = without is not None and without.state == "open"
    own = (
        {(held_amount.key, held_amount.opened_at): held_amount.amount for held_amount in without.held_amounts}
        if without and is_held
        else {}
    )
    statuses: dict[str, QuotaStatus] = {}
    for quota in binding.quotas:
        key = quota.key_for(binding.user)
        counter = counter_at(now, quota, counters.get(key))
        if mine := own.get((key, counter.window.opened_at)):
            counter = replace(counter, held=counter.held - mine)
        statuses[quota.id] = QuotaStatus(quota, counter)
    return statuses


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
    tightest = sorted(bound, key=lambda item: item[0].fullness(item[1]))[:3]
    if tightest:
        headers["ratelimit-policy"] = ", ".join(_policy_item(standing, limit) for standing, limit in tightest)
        headers["ratelimit"] = ", ".join(_level_item(standing, limit, now) for standing, limit in tightest)
    return headers


def refusal(
    refused: NotAdmitted, statuses: Mapping[str, QuotaStatus], *, policy: Policy, endpoint: str, now: int, busy_s: int
) -> ProxyError:
    """The answer to a call that is not let in: a 429 with the true reset, or a 400 when it can never fit.

    `endpoint` matters because Codex shows its user only a `usage_limit_reached`, on /v1/responses. `busy_s` is how
    long calls in flight will hold others up.
    """
    zone, help = policy.zone, policy.help
    block = _telling(refused.blocks)
    final = {"x-should-retry": "false", **(_for_codex(block, help) if endpoint == "responses" else {})}
    if refused.verdict is Verdict.NEVER:
        return NeverFits(_with_help(_never(block), help))
    admissible_at = refused.admissible_at
    long_type = "usage_limit_reached" if endpoint == "responses" else "insufficient_quota"
    if refused.verdict is Verdict.EXHAUSTED and admissible_at is None:
        # A limit of 0 has no reset that would let anybody in, so none is promised.
        return Refusal(
            _with_help(f"{_short(block)}.", help),
            type=long_type,
            code="insufficient_quota",
            headers=final,
            members=_members(statuses, policy, reset_at=None, wait_s=None),
        )
    wait_s = busy_s if admissible_at is None else max(1, seconds_up(admissible_at - now))
    soon = wait_s <= _SOON_S
    message = _busy(block, wait_s) if admissible_at is None else _exhausted(block, admissible_at, now=now, zone=zone)
    reset_at = now + busy_s * 1000 if admissible_at is None else admissible_at
    return Refusal(
        _with_help(message, help),
        type=("requests" if block.limit.measure == "requests" else "tokens") if soon else long_type,
        code="rate_limit_exceeded" if soon else "insufficient_quota",
        headers={"retry-after": str(wait_s), **({} if soon else final)},
        members=_members(statuses, policy, reset_at=reset_at, wait_s=wait_s),
    )


def _members(
    statuses: Mapping[str, QuotaStatus], policy: Policy, *, reset_at: int | None, wait_s: int | None
) -> dict[str, object]:
    """What a refusal says to programs, beside OpenAI's four members."""
    return {
        "reset_at": None if reset_at is None else rfc3339(reset_at, policy.zone),
        "resets_at": None if reset_at is None else seconds_up(reset_at),
        "retry_after": wait_s,
        "help_url": policy.help or None,
        "quotas": [each.as_json(policy.zone) for each in statuses.values() if each.quota.enforce != "shadow"],
    }


def seconds_up(instant: int) -> int:
    """Milliseconds to whole seconds, rounded up."""
    return -(-instant // 1000)


def go_duration(length_ms: int) -> str:
    """A length of time as Go's time.ParseDuration reads it: `6m0s`, `1h0m30s`, `0s`."""
    total = max(0, seconds_up(length_ms))
    hours, minutes, seconds = total // 3600, total // 60 % 60, total % 60
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def spoken(length_ms: int) -> str:
    """A length of time for people, to two places: `5h 12m`, `45s`, `3d 4h`."""
    total = max(0, seconds_up(length_ms))
    parts = ((total // 86400, "d"), (total // 3600 % 24, "h"), (total // 60 % 60, "m"), (total % 60, "s"))
    first = next((place for place, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2] if count) or "0s"


def _telling(blocks: Iterable[Block]) -> Block:
    """The block to speak of: the one that lasts longest."""
    return max(blocks, key=lambda block: (block.limit.maximum == 0, block.counter.window.resets_at))


def _exhausted(block: Block, admissible_at: int, *, now: int, zone: ZoneInfo) -> str:
    return f"{_short(block)}. Resets at {rfc3339(admissible_at, zone)} (in {spoken(admissible_at - now)})."


def _short(block: Block) -> str:
    """What a limit that is used up, or is 0, says without its reset."""
    used, unit = block.counter.used.of(block.limit.measure), _UNIT[block.limit.measure]
    if not block.limit.maximum:
        return f'Quota "{block.quota.id}" is switched off: it allows 0 {unit}'
    if used >= block.limit.maximum:
        return f'Quota "{block.quota.id}" is used up: {used} of {block.limit.maximum} {unit}'
    left = block.limit.maximum - used
    return f'Quota "{block.quota.id}" has {left} {unit} left and this call may need {block.needed}'


def _for_codex(block: Block, help: str) -> dict[str, str]:
    """The one place from which Codex takes words of ours: between "You've hit your usage limit." and the reset."""
    can_be_sent = help.isascii() and help.isprintable()
    return {"x-codex-promo-message": _short(block) + (f" ({help})" if help and can_be_sent else "")}


def _busy(block: Block, wait_s: int) -> str:
    held, unit = block.counter.held.of(block.limit.measure), _UNIT[block.limit.measure]
    return (
        f'Quota "{block.quota.id}" is busy: calls in flight hold {held} {unit}, and what is left is too little '
        f"for this call until they end. Try again in {wait_s} s."
    )


def _never(block: Block) -> str:
    unit = _UNIT[block.limit.measure]
    return (
        f'This call can never fit: it needs at least {block.needed} {unit}, and quota "{block.quota.id}" allows '
        f"{block.limit.maximum} per {block.quota.per.text}. Shorten the input or ask for a shorter answer."
    )


def _with_help(message: str, help: str) -> str:
    return f"{message} {help}" if help else message


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


def _policy_item(standing: QuotaStatus, limit: Limit) -> str:
    window = standing.counter.window
    unit = "" if limit.measure == "requests" else ';qu="tokens"'
    return f'"{standing.quota.id}";q={limit.maximum};w={seconds_up(window.resets_at - window.opened_at)}{unit}'


def _level_item(standing: QuotaStatus, limit: Limit, now: int) -> str:
    resets_in = max(0, seconds_up(standing.counter.window.resets_at - now))
    return f'"{standing.quota.id}";r={standing.remaining(limit)};t={resets_in}'
