"""What one call used, and how sure we are of it.

A count is never a bare number: `Exactly` says that the upstream counted, `AtLeast` that its count never came and
this much passed before our eyes, `Unspent` that nothing was generated. So "the stream broke" can't be mistaken
for "it was free".
"""

from dataclasses import dataclass
from typing import Literal

# Integers are stored in 64 bits. No honest call comes near this, and sums of a window stay far inside.
TOKENS_MAX = 10**12

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

    def beyond(self, hold: Amount) -> int:
        """How many tokens of input and of output exceed what was held for each."""
        return max(0, self.input - hold.input) + max(0, self.output - hold.output)


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
