"""The error that a call gets if the quotas do not admit it.

It is a 429 with the instant at which this very call would be admitted, or a 400 if the call can never fit. Each
situation has its own sentence:

    used up      Quota "staff/daily" is used up: 200000 of 200000 tokens. Resets at … (in 5h 12m).
    too little   Quota "staff/daily" has 300 tokens left and this call may need 416. Resets at … (in 5h 12m).
    busy         Quota "staff/daily" is busy: calls in flight hold 416 tokens, … Try again in 2 s.
    disabled     Quota "staff/daily" is switched off: it allows 0 tokens.
    never fits   This call can never fit: it needs at least 1300 tokens, and quota "staff/daily" allows 1000 per day.
    …

Clients act on the status, `type`, `code` and the headers; people read the sentence. Pure.
"""

from collections.abc import Iterable, Mapping
from zoneinfo import ZoneInfo

from proxy.errors import NeverFits, ProxyError, Refusal
from proxy.policy.admission import Block, NotAdmitted, Verdict
from proxy.policy.policy import Policy
from proxy.policy.status import QuotaStatus, duration_text, seconds_up
from proxy.policy.windows import rfc3339

# Up to this wait the answer is a rate limit, after which SDKs sleep and retry. A longer wait is a used-up quota with
# `x-should-retry: false`. That header is the only one that every SDK release obeys for long waits: with a Retry-After
# of five hours alone, some retry after half a second and others sleep for five hours (docs/wire.md, section 3.2).
_RATE_LIMIT_WAIT_MAX_S = 60


def refusal(
    refused: NotAdmitted, statuses: Mapping[str, QuotaStatus], *, policy: Policy, endpoint: str, now: int, busy_s: int
) -> ProxyError:
    """The error for a call that is not admitted: `Refusal` (429), or `NeverFits` (400) if no reset would help.

    `endpoint` is the name of the endpoint. On /v1/responses a long wait has the type `usage_limit_reached`, because
    that is the only one that Codex shows to its user. `now` is in milliseconds since 1970. `busy_s` is how long calls
    in flight are expected to hold what this call needs, in seconds.
    """
    zone, help = policy.zone, policy.help
    block = named_block(refused.blocks)
    no_retry = {"x-should-retry": "false", **(_codex_header(block, help) if endpoint == "responses" else {})}
    if refused.verdict is Verdict.NEVER:
        return NeverFits(_with_help(_never_sentence(block), help))
    admissible_at = refused.admissible_at
    long_wait_type = "usage_limit_reached" if endpoint == "responses" else "insufficient_quota"
    if refused.verdict is Verdict.EXHAUSTED and admissible_at is None:
        # The limit is 0, and it is 0 after the reset too; or a grant has raised it, and ends before the reset. So no
        # reset and no retry time is stated.
        return Refusal(
            _with_help(f"{_reason(block)}.", help),
            type=long_wait_type,
            code="insufficient_quota",
            headers=no_retry,
            members=_members(statuses, policy, reset_at=None, wait_s=None),
        )
    # Rounded up, and at least 1: if the reset is 18.642 s away, a client that came back after 18 s would be refused
    # again. And at `Retry-After: 0` SDKs retry at once, or after half a second.
    wait_s = busy_s if admissible_at is None else max(1, seconds_up(admissible_at - now))
    is_rate_limit = wait_s <= _RATE_LIMIT_WAIT_MAX_S
    if admissible_at is None:
        message, reset_at = _busy_sentence(block, wait_s), now + busy_s * 1000
    else:
        message, reset_at = _reset_sentence(block, admissible_at, now=now, zone=zone), admissible_at
    return Refusal(
        _with_help(message, help),
        type=block.limit.measure.family if is_rate_limit else long_wait_type,
        code="rate_limit_exceeded" if is_rate_limit else "insufficient_quota",
        headers={"retry-after": str(wait_s), **({} if is_rate_limit else no_retry)},
        members=_members(statuses, policy, reset_at=reset_at, wait_s=wait_s),
    )


def _members(
    statuses: Mapping[str, QuotaStatus], policy: Policy, *, reset_at: int | None, wait_s: int | None
) -> dict[str, object]:
    """The members of a refusal for programs, in addition to OpenAI's four."""
    return {
        "reset_at": None if reset_at is None else rfc3339(reset_at, policy.zone),
        "resets_at": None if reset_at is None else seconds_up(reset_at),
        "retry_after": wait_s,
        "help_url": policy.help or None,
        "quotas": [each.as_json(policy.zone) for each in statuses.values() if each.quota.enforce != "shadow"],
    }


def named_block(blocks: Iterable[Block]) -> Block:
    """The block that the message names: the one that lasts longest. A limit of 0 lasts forever."""
    return max(blocks, key=lambda block: (block.limit.maximum == 0, block.counter.window.resets_at))


def _reset_sentence(block: Block, admissible_at: int, *, now: int, zone: ZoneInfo) -> str:
    return f"{_reason(block)}. Resets at {rfc3339(admissible_at, zone)} (in {duration_text(admissible_at - now)})."


def _reason(block: Block) -> str:
    """The first half of the sentence, without a full stop: why the limit does not admit the call."""
    used, unit = block.counter.used.of(block.limit.measure), block.limit.measure.unit
    if not block.limit.maximum:
        return f'Quota "{block.quota.id}" is switched off: it allows 0 {unit}'
    if used >= block.limit.maximum:
        return f'Quota "{block.quota.id}" is used up: {used} of {block.limit.maximum} {unit}'
    left = block.limit.maximum - used
    return f'Quota "{block.quota.id}" has {left} {unit} left and this call may need {block.needed}'


def _codex_header(block: Block, help: str) -> dict[str, str]:
    """The text that Codex shows between "You've hit your usage limit." and the reset: the only one that it shows.

    The help text is appended only if it can be sent in a header (printable ASCII).
    """
    can_be_sent = help.isascii() and help.isprintable()
    return {"x-codex-promo-message": _reason(block) + (f" ({help})" if help and can_be_sent else "")}


def _busy_sentence(block: Block, wait_s: int) -> str:
    held, unit = block.counter.held.of(block.limit.measure), block.limit.measure.unit
    return (
        f'Quota "{block.quota.id}" is busy: calls in flight hold {held} {unit}, and what is left is too little '
        f"for this call until they end. Try again in {wait_s} s."
    )


def _never_sentence(block: Block) -> str:
    unit = block.limit.measure.unit
    return (
        f'This call can never fit: it needs at least {block.needed} {unit}, and quota "{block.quota.id}" allows '
        f"{block.limit.maximum} per {block.quota.per.text}. Shorten the input or ask for a shorter answer."
    )


def _with_help(message: str, help: str) -> str:
    return f"{message} {help}" if help else message
