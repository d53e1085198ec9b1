"""The words of a refusal: the error that a call gets which the quotas do not admit.

A 429 with the instant at which this very call would be admitted, or a 400 if it can never fit. Three situations have
three sentences: the quota is used up; so much is left and this call may need more; calls in flight hold the rest.
Clients act on the status, `type`, `code` and the headers, people on the sentence. Pure.
"""

from collections.abc import Iterable, Mapping
from zoneinfo import ZoneInfo

from proxy.errors import NeverFits, ProxyError, Refusal
from proxy.policy.admission import Block, NotAdmitted, Verdict
from proxy.policy.policy import Policy
from proxy.policy.status import QuotaStatus, duration_text, seconds_up
from proxy.policy.windows import rfc3339

# A wait that SDKs sleep through on their own is answered as a rate limit; a longer one as a quota that is used
# up, with `x-should-retry: false`, the only header that every SDK release obeys for long waits.
_SOON_S = 60

_UNIT = {"tokens": "tokens", "input_tokens": "input tokens", "output_tokens": "output tokens", "requests": "requests"}


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


def _telling(blocks: Iterable[Block]) -> Block:
    """The block to speak of: the one that lasts longest."""
    return max(blocks, key=lambda block: (block.limit.maximum == 0, block.counter.window.resets_at))


def _exhausted(block: Block, admissible_at: int, *, now: int, zone: ZoneInfo) -> str:
    return f"{_short(block)}. Resets at {rfc3339(admissible_at, zone)} (in {duration_text(admissible_at - now)})."


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
