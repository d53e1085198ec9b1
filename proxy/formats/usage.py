"""Read the usage that an upstream states in its answer, as a number of tokens.

Servers differ in the names of the members and in how they write a number, so the readers accept several spellings.
They do not accept a usage that makes no sense: the result is then None, and the caller counts the tokens itself.
docs/threats.md ("What is charged for strange usage") lists the cases. Pure.
"""

from proxy.policy.amounts import Tokens

# The largest number that is accepted for one answer, in tokens: twice the largest context of any model. A report
# above it is a mistake of the upstream, and must not use up a user's quota for the rest of a month.
REPORTED_MAX = 20_000_000

_PARTS = ("prompt_tokens", "input_tokens", "completion_tokens", "output_tokens")


def read_tokens(usage: object) -> Tokens | None:
    """The tokens in an OpenAI usage object; None if it makes no sense.

    Both namings are read: `prompt_tokens`/`completion_tokens` (chat, completions, embeddings) and
    `input_tokens`/`output_tokens` (/responses, images, audio).

    - A total that contradicts its parts is ignored: parts 11 and 5 with a total of 9999 are 16 tokens.
    - If both parts are missing, the total is charged as output: `{"total_tokens": 16}` is 16 tokens of output. If
      only the output is missing, it is the total minus the input: input 11 with a total of 16 is 11 and 5.
    - Text and floats with a whole value are accepted (`"11"`, `11.0`), because some servers write them.
    - Negative numbers, fractions, booleans, numbers over 20 million and a missing input make the object unreadable.
    """
    if not isinstance(usage, dict):
        return None
    input_tokens = _first_count(usage, "prompt_tokens", "input_tokens")
    output_tokens = _first_count(usage, "completion_tokens", "output_tokens")
    total = _count(usage.get("total_tokens"))
    if input_tokens is None and output_tokens is None:
        return None if total is None or _is_invalid(usage, *_PARTS) else Tokens(0, total)
    if input_tokens is None or (output_tokens is None and _is_invalid(usage, "completion_tokens", "output_tokens")):
        return None
    if output_tokens is None:
        output_tokens = max(0, (total or 0) - input_tokens)
    input_details = _first_dict(usage, "prompt_tokens_details", "input_tokens_details")
    output_details = _first_dict(usage, "completion_tokens_details", "output_tokens_details")
    # Cached and reasoning tokens are parts of input and output. A part is never more than the whole: a report of 4000
    # reasoning tokens in 5 tokens of output becomes 5.
    return Tokens(
        input_tokens,
        output_tokens,
        cached=min(_count(input_details.get("cached_tokens")) or 0, input_tokens),
        reasoning=min(_count(output_details.get("reasoning_tokens")) or 0, output_tokens),
    )


def read_timings(timings: object) -> Tokens | None:
    """The tokens in the `timings` that llama.cpp adds to the last chunk; None if they don't state the whole input.

    The input is the tokens that were evaluated now (`prompt_n`) and those that were in its cache (`cache_n`):
    `{"cache_n": 4, "prompt_n": 7, "predicted_n": 5}` is an input of 11 and an output of 5. Older versions do not
    send `cache_n`, and their input is unknown.
    """
    if not isinstance(timings, dict):
        return None
    match [_count(timings.get(name)) for name in ("prompt_n", "cache_n", "predicted_n")]:
        case [int(evaluated), int(cached), int(output)]:
            return Tokens(evaluated + cached, output, cached=cached)
    return None


def _first_count(usage: dict[str, object], *names: str) -> int | None:
    return next((count for name in names if (count := _count(usage.get(name))) is not None), None)


def _first_dict(usage: dict[str, object], *names: str) -> dict[str, object]:
    return next((part for name in names if isinstance(part := usage.get(name), dict)), {})


def _is_invalid(usage: dict[str, object], *names: str) -> bool:
    """Whether one of these members has a value that is no count. Null is treated as a missing member."""
    return any(usage.get(name) is not None and _count(usage[name]) is None for name in names)


def _count(value: object) -> int | None:
    if isinstance(value, bool):  # a bool is an int in Python
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 12:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and 0 <= value <= REPORTED_MAX else None
