"""What a usage object says is booked to the token; what makes no sense is left to our own count (docs/threats.md)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.amounts import MEASURES, NOTHING, TOKENS_MAX, Amount, AtLeast, Exactly, Tokens, Unspent, charge_of

counts = st.integers(0, TOKENS_MAX)
amounts = st.builds(Amount, counts, counts, counts)

# ------------------------------------------------------------------------------------------------------------ amounts


def test_each_measure_is_compared_with_its_own_number():
    """A limit on tokens sees input and output together, the others see their own."""
    amount = Amount(input=11, output=5, requests=1)
    assert {measure: amount.of(measure) for measure in MEASURES} == {
        "tokens": 16,
        "input_tokens": 11,
        "output_tokens": 5,
        "requests": 1,
    }
    assert amount.tokens == 16


@given(one=amounts, other=amounts)
def test_what_is_added_can_be_taken_away_again(one, other):
    """Holding and giving back leaves every measure as it was, to the token."""
    assert one + other - other == one
    assert one + NOTHING == one - NOTHING == one
    for measure in MEASURES:
        assert (one + other).of(measure) == one.of(measure) + other.of(measure)
        assert (one - other).of(measure) == one.of(measure) - other.of(measure)


@given(one=amounts, other=amounts)
def test_of_two_amounts_the_smaller_of_each_part_is_a_part_of_both(one, other):
    """What is charged to one of several windows is never more than was held in it, and the rest is what remains."""
    part = one.at_most(other)
    assert part == Amount(
        min(one.input, other.input), min(one.output, other.output), min(one.requests, other.requests)
    )
    assert part + (one - part) == one


@pytest.mark.parametrize(
    ("amount", "is_something"),
    [(NOTHING, False), (Amount(input=1), True), (Amount(output=1), True), (Amount(requests=1), True)],
)
def test_only_nothing_at_all_is_nothing(amount, is_something):
    """A request without tokens keeps its window open, as do tokens without a request."""
    assert bool(amount) is is_something


# ------------------------------------------------------------------------------------------------------------ charges


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        (Tokens(11, 5, 3, 2), Tokens(20, 20), Tokens(11, 5, 3, 2)),
        (Tokens(11, 5, 3, 2), Tokens(11, 5), Tokens(11, 5, 3, 2)),
        (Tokens(11, 5, 3, 2), Tokens(2, 9), Tokens(2, 5, 2, 2)),
        (Tokens(11, 5, 3, 2), Tokens(20, 1), Tokens(11, 1, 3, 1)),
        (Tokens(11, 5, 3, 2), Tokens(0, 0), Tokens(0, 0, 0, 0)),
    ],
)
def test_tokens_that_are_bounded_keep_their_parts_inside(tokens, most, expected):
    """What was cached stays a part of the input, what was thought a part of the output."""
    assert tokens.at_most(most) == expected


@pytest.mark.parametrize(
    ("usage", "provenance", "charge"),
    [
        (Exactly(Tokens(11, 5)), "exactly", Amount(11, 5, 1)),
        (Exactly(Tokens(0, 0)), "exactly", Amount(0, 0, 1)),
        (Exactly(Tokens(11, 4005, cached=11, reasoning=4000)), "exactly", Amount(11, 4005, 1)),
        (AtLeast(Tokens(11, 3)), "at_least", Amount(11, 3, 1)),
        (Unspent(), "unspent", NOTHING),
        (Unspent(requests=1), "unspent", Amount(requests=1)),
    ],
)
def test_a_call_is_charged_what_its_usage_says(usage, provenance, charge):
    """One request and its tokens; parts are never added again; what generated nothing costs no tokens."""
    assert charge_of(usage) == charge
    assert usage.provenance == provenance


@pytest.mark.parametrize(
    ("tokens", "hold", "beyond"),
    [
        (Tokens(130, 205), Amount(100, 200, 1), 35),
        (Tokens(130, 100), Amount(100, 200, 1), 30),
        (Tokens(90, 60), Amount(100, 200, 1), 0),
    ],
)
def test_only_tokens_above_the_hold_are_beyond_it(tokens: Tokens, hold: Amount, beyond: int) -> None:
    """Input and output by themselves: room that one leaves does not cover the other."""
    assert tokens.beyond(hold) == beyond


def test_an_unspent_call_has_no_tokens_of_any_kind():
    """Also where the call itself counts."""
    assert Unspent(requests=1).tokens == Tokens(0, 0)
