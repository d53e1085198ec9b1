"""What quotas count: the table of measures, amounts, and what one call used.

Two tables stand at the top, and every other module goes by them:

- the *quantities* are the fields of `Amount`: the numbers that a counter stores. A call holds and uses some of each.
- the *measures* (`Measure`) are what a limit in quotas.yaml can name. Each is a quantity or the sum of two.

What a call can use at all is one of the rows of `Uses`. Only limits that count some of it bind the call.

To add a measure, add its row here, its number to `totals_of`, and its key in quotas.yaml to `config.schema.Quota`. If
no quantity has it yet, add that too, a migration with the columns `used_<quantity>` and `held_<quantity>`, which
calls use it (`Uses`), and how much one call holds and is charged of it (`call_amount` and `charge_of`).

The usage of a call is never a bare number, but says how it is known: `Exactly` (the upstream reported it), `AtLeast`
(the upstream's report never came, so the proxy counted what passed) or `Unspent` (nothing was generated). So a stream
that broke cannot be mistaken for a call that was free.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from operator import add, itemgetter, sub
from typing import Literal, NamedTuple

# No honest call comes near this number. The ledger stores 64-bit integers, of which the sum of a window then stays
# far below the largest (9.2 × 10^18, nine million such calls).
TOKENS_MAX = 10**12


class Amount(NamedTuple):
    """A number for each quantity, at the position that it also has in the columns of the database.

    New quantities are appended, because the ledger stores amounts as arrays. An array of an older release is then
    shorter, and the quantities that it does not have are 0.
    """

    input: int = 0
    output: int = 0
    requests: int = 0

    @property
    def tokens(self) -> int:
        """Input plus output."""
        return self.input + self.output

    def __add__(self, other: "Amount") -> "Amount":  # type: ignore[override]  # a tuple would be made longer
        # Not `_make` and not one expression for each field: a decision adds and subtracts dozens of amounts.
        return tuple.__new__(Amount, map(add, self, other))

    def __sub__(self, other: "Amount") -> "Amount":
        return tuple.__new__(Amount, map(sub, self, other))

    def __bool__(self) -> bool:
        return any(self)

    def at_most(self, other: "Amount") -> "Amount":
        """The smaller number of each quantity."""
        return tuple.__new__(Amount, map(min, self, other))

    def at_least_0(self) -> "Amount":
        """The same amount with 0 for each quantity that is negative."""
        return tuple.__new__(Amount, (max(0, number) for number in self))

    def of(self, measure: "Measure") -> int:
        """The number of this measure, which a limit on it is compared with."""
        return measure.total(self)

    def concurrent_part(self) -> "Amount":
        """The same amount with only the quantities of CONCURRENT."""
        return Amount(**{quantity: getattr(self, quantity) for quantity in CONCURRENT}) if CONCURRENT else NO_AMOUNT


QUANTITIES = Amount._fields
NO_AMOUNT = Amount()

# The quantities that a call only holds while it is in flight: they are never charged, and belong to no window. All
# others are consumed: what a call used stays in the counter until its window resets. No quantity of this release is
# concurrent. Calls at once would be: `call_amount` would say 1 of it, and `charge_of` none.
CONCURRENT: frozenset[str] = frozenset()

Family = Literal["tokens", "requests"]
FAMILIES: tuple[Family, ...] = ("tokens", "requests")


def _total(positions: Sequence[int]) -> Callable[[Amount], int]:
    # A decision asks for dozens of totals, so there is no loop over the positions.
    if len(positions) == 1:
        return itemgetter(positions[0])
    first, second = positions
    return lambda amount: amount[first] + amount[second]


class Measure(StrEnum):
    """What a limit can be on, in the order in which limits are shown. The value is the key in quotas.yaml.

    - `unit` and `singular`: the words for it in sentences.
    - `family`: which of the rate-limit headers it belongs to: they only know tokens and requests.
    - `counts_input`, `counts_output`: whether the input and the answer of a call add to it, token by token.
    - `quantities`: the fields of `Amount` that add to it.
    - `is_concurrent`: whether calls only hold it while they are in flight (see CONCURRENT).
    - `total`: its number in an amount.
    - `position`: where `totals_of` has its number.
    """

    TOKENS = "tokens", "tokens", "token", "tokens", ("input", "output")
    INPUT_TOKENS = "input_tokens", "input tokens", "input token", "tokens", ("input",)
    OUTPUT_TOKENS = "output_tokens", "output tokens", "output token", "tokens", ("output",)
    REQUESTS = "requests", "requests", "request", "requests", ("requests",)

    unit: str
    singular: str
    family: Family
    counts_input: bool
    counts_output: bool
    quantities: tuple[str, ...]
    is_concurrent: bool
    total: Callable[[Amount], int]
    position: int

    def __new__(cls, key: str, unit: str, singular: str, family: Family, quantities: tuple[str, ...]) -> "Measure":
        """One row of the table: the key, the unit, its singular, the family, and the quantities that are added up."""
        self = str.__new__(cls, key)
        self._value_ = key
        self.unit, self.singular, self.family = unit, singular, family
        self.counts_input, self.counts_output = "input" in quantities, "output" in quantities
        self.quantities = quantities
        self.is_concurrent = not CONCURRENT.isdisjoint(quantities)
        self.total = _total([QUANTITIES.index(quantity) for quantity in quantities])
        self.position = len(cls.__members__)
        return self


# The measures by their names.
MEASURES: Mapping[str, Measure] = {measure.value: measure for measure in Measure}


class Uses(Enum):
    """What a call can use. The value is the quantities of it.

    - NOTHING: it counts tokens, and runs no model.
    - REQUEST: it has no price in tokens, such as a moderation, or an image of a model that is billed by the image.
    - INPUT: it generates nothing, such as an embedding.
    - OUTPUT: it has a price in tokens that the configuration states. It is charged as output.
    - INPUT_AND_OUTPUT: it generates tokens.

    `measures` are the measures that count some of it, and `families` those of these measures.
    """

    NOTHING = ()
    REQUEST = ("requests",)
    INPUT = ("input", "requests")
    OUTPUT = ("output", "requests")
    INPUT_AND_OUTPUT = ("input", "output", "requests")

    # Each decision looks up its rules by what the call uses. That of Enum takes ten times as long.
    __hash__ = object.__hash__

    measures: frozenset[Measure]
    families: frozenset[Family]

    def __init__(self, *quantities: str) -> None:
        self.measures = frozenset(each for each in Measure if not set(quantities).isdisjoint(each.quantities))
        self.families = frozenset(each.family for each in self.measures)

    def __or__(self, other: "Uses") -> "Uses":
        """What a call can use that can use either."""
        both = {*self.value, *other.value}
        return next(each for each in Uses if both == set(each.value))


def totals_of(amount: Amount) -> tuple[int, ...]:
    """The numbers of all measures in an amount, by their positions: decisions compare dozens of them with limits."""
    return (amount[0] + amount[1], *amount)


def call_amount(input_tokens: int, output_tokens: int) -> Amount:
    """What one call with so many tokens holds."""
    return Amount(input_tokens, output_tokens, requests=1)


@dataclass(slots=True)
class Tokens:
    """The tokens of one call. `cached` is a part of `input` and `reasoning` a part of `output`; neither is added.

    It is a value, as the usages below are, and never changed. They are not declared frozen, because making one would
    take four times as long.
    """

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


@dataclass(slots=True)
class Exactly:
    """The upstream reported these tokens. An explicit zero is a zero."""

    tokens: Tokens
    provenance: Literal["exactly"] = "exactly"


@dataclass(slots=True)
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
    tokens = usage.tokens
    return Amount(tokens.input, tokens.output, usage.requests if isinstance(usage, Unspent) else 1)
