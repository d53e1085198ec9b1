"""What one call used, and how sure we are of it.

A count is never a bare number: `Exactly` says that the upstream counted, `AtLeast` that its count never came and
this much passed before our eyes, `Unspent` that nothing was generated. So "the stream broke" can't be mistaken
for "it was free".
"""

from dataclasses import dataclass
from typing import Literal

# Integers are stored in 64 bits. No honest call comes near this, and sums of a window stay far inside.
TOKENS_MAX = 10**12
# The most that is believed of one answer: twice the largest context of any model, so that one absurd report
# can't lock a user out for the rest of a month.
REPORTED_MAX = 20_000_000

Measure = Literal["tokens", "input_tokens", "output_tokens", "requests"]
MEASURES: tuple[Measure, ...] = ("tokens", "input_tokens", "output_tokens", "requests")


@dataclass(frozen=True, slots=True)
class Amount:
    """So much of everything that a quota can limit. `tokens` is always the sum of input and output."""

    input: int = 0
    output: int = 0
    requests: int = 0

    @property
    def tokens(self) -> int:
        """Input and output together."""
        return self.input + self.output

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.input + other.input, self.output + other.output, self.requests + other.requests)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.input - other.input, self.output - other.output, self.requests - other.requests)

    def __bool__(self) -> bool:
        return bool(self.input or self.output or self.requests)

    def at_most(self, other: "Amount") -> "Amount":
        """The smaller of the two in each of its parts."""
        return Amount(
            min(self.input, other.input), min(self.output, other.output), min(self.requests, other.requests)
        )

    def of(self, measure: Measure) -> int:
        """The number that a limit on `measure` is compared with."""
        match measure:
            case "tokens":
                return self.input + self.output
            case "input_tokens":
                return self.input
            case "output_tokens":
                return self.output
            case _:
                return self.requests


NOTHING = Amount()


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one call. `cached` is a part of `input`, `reasoning` a part of `output`: never added again."""

    input: int
    output: int
    cached: int = 0
    reasoning: int = 0

    def at_most(self, other: "Tokens") -> "Tokens":
        """No more input or output than the other has."""
        input_tokens, output_tokens = min(self.input, other.input), min(self.output, other.output)
        return Tokens(input_tokens, output_tokens, min(self.cached, input_tokens), min(self.reasoning, output_tokens))


@dataclass(frozen=True, slots=True)
class Exactly:
    """The upstream said so. An explicit zero is a zero."""

    tokens: Tokens
    provenance: Literal["exactly"] = "exactly"


@dataclass(frozen=True, slots=True)
class AtLeast:
    """The upstream's count never arrived: this much passed before our eyes, so this much is charged."""

    tokens: Tokens
    provenance: Literal["at_least"] = "at_least"


@dataclass(frozen=True, slots=True)
class Unspent:
    """No tokens: nothing was generated, or what was is billed otherwise.

    `requests` is 1 where the call itself counts: the upstream called it a bad request, or bills it by the piece.
    """

    requests: int = 0
    provenance: Literal["unspent"] = "unspent"

    @property
    def tokens(self) -> Tokens:
        """None of any kind."""
        return Tokens(0, 0)


Usage = Exactly | AtLeast | Unspent


def charge_of(usage: Usage) -> Amount:
    """What a counter is charged for a call with this usage."""
    requests = usage.requests if isinstance(usage, Unspent) else 1
    return Amount(usage.tokens.input, usage.tokens.output, requests)


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
