"""Read the usage that a vendor states in its answer.

Servers differ in names and in types, so the readers are lenient about how a number is written and strict about what it
says: a usage that makes no sense gives None, and the caller counts the tokens itself. Pure.
"""

from proxy.policy.amounts import Tokens

# The most that is believed of one answer: twice the largest context of any model, so that one absurd report can't
# lock a user out for the rest of a month.
REPORTED_MAX = 20_000_000


def read_tokens(usage: object) -> Tokens | None:
    """The tokens in an OpenAI usage object of either naming; None where it makes no sense.

    A total that contradicts its parts is ignored; where parts are missing the total stands for them, as output, so
    that it is charged in full. Numbers as text or as whole floats are taken, since some servers write them so;
    negative, absurd (over 20 million), fractional, boolean or missing ones make the object unreadable, and the caller
    counts by itself.
    """
    if not isinstance(usage, dict):
        return None
    input_tokens = _first(usage, "prompt_tokens", "input_tokens")
    output_tokens = _first(usage, "completion_tokens", "output_tokens")
    total = _count(usage.get("total_tokens"))
    if input_tokens is None and output_tokens is None:
        return None if total is None or _is_stated(usage) else Tokens(0, total)
    if input_tokens is None or (output_tokens is None and _is_wrong(usage, "completion_tokens", "output_tokens")):
        return None
    if output_tokens is None:
        output_tokens = max(0, (total or 0) - input_tokens)
    input_details = _first_dict(usage, "prompt_tokens_details", "input_tokens_details")
    output_details = _first_dict(usage, "completion_tokens_details", "output_tokens_details")
    return Tokens(
        input_tokens,
        output_tokens,
        cached=min(_count(input_details.get("cached_tokens")) or 0, input_tokens),
        reasoning=min(_count(output_details.get("reasoning_tokens")) or 0, output_tokens),
    )


def read_timings(timings: object) -> Tokens | None:
    """The tokens in the timings that llama.cpp adds to the last chunk; None where they don't say the whole input."""
    if not isinstance(timings, dict):
        return None
    said = [_count(timings.get(name)) for name in ("prompt_n", "cache_n", "predicted_n")]
    match said:
        case [int(read), int(cached), int(output)]:
            return Tokens(read + cached, output, cached=cached)
    return None


def _first(usage: dict[str, object], *names: str) -> int | None:
    return next((count for name in names if (count := _count(usage.get(name))) is not None), None)


def _first_dict(usage: dict[str, object], *names: str) -> dict[str, object]:
    return next((part for name in names if isinstance(part := usage.get(name), dict)), {})


def _is_stated(usage: dict[str, object]) -> bool:
    return _is_wrong(usage, "prompt_tokens", "input_tokens") or _is_wrong(usage, "completion_tokens", "output_tokens")


def _is_wrong(usage: dict[str, object], *names: str) -> bool:
    """Whether one of these stands there with a value that is no count (null counts as not there)."""
    return any(usage.get(name) is not None and _count(usage[name]) is None for name in names)


def _count(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 12:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and 0 <= value <= REPORTED_MAX else None
