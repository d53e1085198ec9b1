"""Amounts of tokens and requests, and what one call used.

The usage of a call is never a bare number, but says how it is known: `Exactly` (the upstream reported it), `AtLeast`
(the upstream's report never came, so the proxy counted what passed) or `Unspent` (nothing was generated). So a stream
that broke cannot be mistaken for a call that was free.
"""

from dataclasses import dataclass
from typing import Literal

# No honest call comes near this number. The ledger stores 64-bit integers, of which the sum of a window then stays
# far below the largest (9.2 × 10^18, nine million such calls).
TOKENS_MAX = 10**12

Measure = Literal["tokens", "input_tokens", "output_tokens", "requests"]
MEASURES: tuple[Measure, ...] = ("tokens", "input_tokens", "output_tokens", "requests")


@dataclass(frozen=True, slots=True)
class Amount:
    """A number for each measure that a quota can limit. `tokens` is always the sum of input and output."""

    input: int = 0
    output: int = 0
    requests: int = 0

    @property
    def tokens(self) -> int:
        """Input plus output."""
        return self.input + self.output

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.input + other.input, self.output + other.output, self.requests + other.requests)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.input - other.input, self.output - other.output, self.requests - other.requests)

    def __bool__(self) -> bool:
        return bool(self.input or self.output or self.requests)

    def at_most(self, other: "Amount") -> "Amount":
        """The smaller one of input, of output and of requests."""
        return Amount(
            min(self.input, other.input), min(self.output, other.output), min(self.requests, other.requests)
        )

    def of(self, measure: Measure) -> int:
        """The number of this measure, which a limit on it is compared with."""
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
    """The tokens of one call. `cached` is a part of `input` and `reasoning` a part of `output`; neither is added."""

    input: int
    output: int
    cached: int = 0
    reasoning: int = 0

    def at_most(self, other: "Tokens") -> "Tokens":
        """The same tokens, with at most as much input and output as `other`."""
        input_tokens, output_tokens = min(self.input, other.input), min(self.output, other.output)
        return Tokens(input_tokens, output_tokens, min(self.cached, input_tokens), min(self.reasoning, output_tokens))

    def beyond(self, hold: Amount) -> int:
        """How many tokens exceed the hold. Held input that was not used does not cover output, or the reverse."""
        return max(0, self.input - hold.input) + max(0, self.output - hold.output)


@dataclass(frozen=True, slots=True)
class Exactly:
    """The upstream reported these tokens. An explicit zero is a zero."""

    tokens: Tokens
    provenance: Literal["exactly"] = "exactly"


@dataclass(frozen=True, slots=True)
class AtLeast:
    """The upstream's report never came. The proxy counted these tokens as they passed, and they are charged."""

    tokens: Tokens
    provenance: Literal["at_least"] = "at_least"


@dataclass(frozen=True, slots=True)
class Unspent:
    """No tokens: nothing was generated, or it is not billed in tokens.

    `requests` is 1 if the call itself counts: the upstream answered that the request is wrong, or bills per call.
    """

    requests: int = 0
    provenance: Literal["unspent"] = "unspent"

    @property
    def tokens(self) -> Tokens:
        """No tokens of any kind."""
        return Tokens(0, 0)


Usage = Exactly | AtLeast | Unspent


def charge_of(usage: Usage) -> Amount:
    """What a call with this usage is charged: its tokens and one request, or for `Unspent` the requests it states."""
    requests = usage.requests if isinstance(usage, Unspent) else 1
    return Amount(usage.tokens.input, usage.tokens.output, requests)
