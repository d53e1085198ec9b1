"""The error that a call gets if the quotas do not admit it.

It is a 429 with the instant at which this very call would be admitted, or a 400 if the call can never fit. Each
situation has its own sentence:

    used up      Quota "staff/daily" is used up: 200000 of 200000 tokens. Resets at … (in 5h 12m).
    too little   Quota "staff/daily" has 300 tokens left and this call may need 416. Resets at … (in 5h 12m).
    busy         Quota "staff/daily" is busy: calls in flight hold 416 tokens, … Try again in 2 s.
    disabled     Quota "staff/daily" is switched off: it allows 0 tokens.
    never fits   This call can never fit: it needs at least 1300 tokens, and quota "staff/daily" allows 1000 per day.
                 Shorten the input.

Clients act on the status, `type`, `code` and the headers; people read the sentence. Pure.
"""

import re
from collections.abc import Iterable, Mapping
from zoneinfo import ZoneInfo

from proxy.errors import ExceedsQuota, NeverFits, ProxyError, Refusal
from proxy.formats.endpoints import IMAGE_ENDPOINTS
from proxy.formats.estimate import REASONING_BUDGETS, reasoning_budget
from proxy.formats.kinds import CHOICE_COUNT_FIELDS, kind_of
from proxy.formats.request import Request
from proxy.policy.admission import Block, NotAdmitted, Verdict
from proxy.policy.catalog import Model
from proxy.policy.policy import Policy
from proxy.policy.status import QuotaStatus, duration_text, seconds_up
from proxy.policy.windows import rfc3339

# Up to this wait the answer is a rate limit, after which SDKs sleep and retry. A longer wait is a used-up quota with
# `x-should-retry: false`. That header is the only one that every SDK release obeys for long waits: with a Retry-After
# of five hours alone, some retry after half a second and others sleep for five hours (docs/wire.md, section 3.2).
_RATE_LIMIT_WAIT_MAX_S = 60
# A link in the help text: up to a space, without the signs that end a sentence or close a bracket.
_LINK = re.compile(r"https?://[^\s<>\"]*[^\s<>\".,;:!?)\]}'·]", re.IGNORECASE)


def refusal(
    refused: NotAdmitted, statuses: Mapping[str, QuotaStatus], *, policy: Policy, endpoint: str, now: int, busy_s: int
) -> Refusal:
    """The error for a call that is not admitted now; for one that can never fit it is that of `never_fits`.

    `endpoint` is the name of the endpoint. On /v1/responses a long wait has the type `usage_limit_reached`, because
    that is the only one that Codex shows to its user. `now` is in milliseconds since 1970. `busy_s` is how long calls
    in flight are expected to hold what this call needs, in seconds.
    """
    zone, help = policy.zone, policy.help
    block = named_block(refused.blocks)
    no_retry = {"x-should-retry": "false", **(_codex_header(block, help) if endpoint == "responses" else {})}
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
            members=_members(block, statuses, policy, reset_at=None, wait_s=None),
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
        members=_members(block, statuses, policy, reset_at=reset_at, wait_s=wait_s),
    )


def _cause(block: Block, help: str) -> dict[str, object]:
    """The quota that refused the call, the help text, and the link in it."""
    link = _LINK.search(help)
    return {"quota": block.quota.id, "help": help or None, "help_url": None if link is None else link[0]}


def _members(
    block: Block, statuses: Mapping[str, QuotaStatus], policy: Policy, *, reset_at: int | None, wait_s: int | None
) -> dict[str, object]:
    """The members of a refusal for programs, in addition to OpenAI's four. `block` is the one that is named."""
    return {
        **_cause(block, policy.help),
        "reset_at": None if reset_at is None else rfc3339(reset_at, policy.zone),
        "resets_at": None if reset_at is None else seconds_up(reset_at),
        "retry_after": wait_s,
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


def never_fits(refused: NotAdmitted, request: Request, model: Model, *, help: str) -> ProxyError:
    """The error for a call that no reset would admit: `NeverFits` if its input is too large, else `ExceedsQuota`.

    Agents shorten their input at the code of the first, which would be in vain if the answer is too long. `model` is
    the target whose fields are named.
    """
    # If the answer alone is too long, the input was not counted, and seems larger than it is.
    block = named_block([block for block in refused.blocks if not block.is_input_too_large] or refused.blocks)
    allowed = f'quota "{block.quota.id}" allows {block.limit.maximum} per {block.quota.per.text}'
    needed, unit = f"it needs at least {block.needed}", block.limit.measure.unit
    if block.is_input_too_large:
        text = f"This call can never fit: {needed} {unit}, and {allowed}. Shorten the input."
        return NeverFits(_with_help(text, help), members=_cause(block, help))
    answer = block.needed - block.input
    is_image = request.endpoint in IMAGE_ENDPOINTS
    if not request.endpoint.shows_output:
        each = "an image" if is_image else "its answer"
        needed = f"{f'{request.choices} images' if request.choices > 1 else each} may take {answer}"
    param, remedy = _remedy(request, model, answer, room=block.limit.maximum - block.input)
    text = f"This call can never fit: {needed} {unit}, and {allowed}. {remedy}"
    return ExceedsQuota(_with_help(text, help), param=param, members=_cause(block, help))


def _remedy(request: Request, model: Model, answer: int, *, room: int) -> tuple[str, str]:
    """The field that makes an answer of `answer` tokens too long for `room`, and the sentence with what to do."""
    document, endpoint = request.body.document, request.endpoint
    if request.choices > 1 and answer // request.choices <= room:
        counts = {name: document.get(name) for name in (*CHOICE_COUNT_FIELDS, "best_of")}
        stated = {name: count for name, count in counts.items() if isinstance(count, int) and count > 1}
        field = max(stated, key=stated.__getitem__, default="prompt")
        return field, f"Ask for fewer {'images' if endpoint in IMAGE_ENDPOINTS else 'answers'} with {field}."
    if not endpoint.shows_output:
        return "model", "No field of the request makes it smaller. Use another model."
    for name, member in REASONING_BUDGETS:
        if reasoning_budget({name: document.get(name)}):
            return f"{name}.{member}", f"Lower {name}.{member}."
    fields = kind_of(model.upstream.kind).maximum_fields(endpoint)
    field = next((name for name in fields if document.get(name) is not None), fields[0])
    return field, f"Set {field} to a smaller number."


def _with_help(message: str, help: str) -> str:
    return f"{message} {help}" if help else message
