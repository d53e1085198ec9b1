"""Amounts add up to the token, and a call is charged exactly what its usage says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.amounts import (
    NO_AMOUNT,
    QUANTITIES,
    TOKENS_MAX,
    Amount,
    AtLeast,
    Exactly,
    Measure,
    Tokens,
    Unspent,
    Uses,
    call_amount,
    charge_of,
    totals_of,
)
from tests.builders import make_requests_concurrent

counts = st.integers(0, TOKENS_MAX)
amounts = st.builds(Amount, counts, counts, counts)

# ----------------------------------------------------------------------------------------------- measures and amounts


def test_the_table_says_of_each_measure_what_the_rules_ask():
    """The order is that of `/v1/quota`, the names are the keys of quotas.yaml."""
    assert [(str(each), each.unit, each.family) for each in Measure] == [
        ("tokens", "tokens", "tokens"),
        ("input_tokens", "input tokens", "tokens"),
        ("output_tokens", "output tokens", "tokens"),
        ("requests", "requests", "requests"),
    ]
    assert [each for each in Measure if each.counts_input] == ["tokens", "input_tokens"]
    assert [each for each in Measure if each.counts_output] == ["tokens", "output_tokens"]
    assert [each for each in Measure if each.is_concurrent] == []


@pytest.mark.parametrize(
    ("uses", "measures", "families"),
    [
        (Uses.NOTHING, [], []),
        (Uses.REQUEST, ["requests"], ["requests"]),
        (Uses.INPUT, ["tokens", "input_tokens", "requests"], ["tokens", "requests"]),
        (Uses.OUTPUT, ["tokens", "output_tokens", "requests"], ["tokens", "requests"]),
        (Uses.INPUT_AND_OUTPUT, [*Measure], ["tokens", "requests"]),
    ],
)
def test_what_a_call_can_use_says_which_measures_count_it(uses, measures, families):
    """And to which of the rate-limit headers these belong."""
    assert (uses.measures, uses.families) == (set(measures), set(families))


@given(one=st.sampled_from(Uses), other=st.sampled_from(Uses))
def test_a_call_that_can_use_either_can_use_all_of_both(one, other):
    """A call may go to a model that is billed in tokens, or to one that is billed by the piece."""
    assert set((one | other).value) == {*one.value, *other.value}


@given(amount=amounts)
def test_the_totals_of_an_amount_are_those_of_each_measure(amount):
    """In the order of the measures, which is that of their positions."""
    assert list(totals_of(amount)) == [amount.of(each) for each in Measure]
    assert [each.position for each in Measure] == [*range(len(Measure))]


def test_a_call_holds_its_tokens_and_one_request():
    """The position of each quantity is that of its columns in the database."""
    assert tuple(call_amount(11, 5)) == (11, 5, 1)
    assert QUANTITIES == ("input", "output", "requests")


def test_the_concurrent_part_of_an_amount_has_only_concurrent_quantities(monkeypatch):
    """All quantities of this release are consumed, so there it is nothing."""
    assert Amount(11, 5, 1).concurrent_part() == NO_AMOUNT
    make_requests_concurrent(monkeypatch)
    assert Amount(11, 5, 1).concurrent_part() == Amount(requests=1)


def test_each_measure_is_compared_with_its_own_number():
    """A limit on tokens is compared with input plus output, the others with their own number."""
    amount = Amount(input=11, output=5, requests=1)
    assert {measure: amount.of(measure) for measure in Measure} == {
        "tokens": 16,
        "input_tokens": 11,
        "output_tokens": 5,
        "requests": 1,
    }
    assert amount.tokens == 16


@given(one=amounts, other=amounts)
def test_adding_and_subtracting_an_amount_changes_nothing(one, other):
    """Holding and freeing leaves every measure as it was, to the token."""
    assert one + other - other == one
    assert one + NO_AMOUNT == one - NO_AMOUNT == one
    for measure in Measure:
        assert (one + other).of(measure) == one.of(measure) + other.of(measure)
        assert (one - other).of(measure) == one.of(measure) - other.of(measure)


@given(one=amounts, other=amounts)
def test_at_most_takes_the_smaller_number_of_each_measure(one, other):
    """A window is charged at most what was held in it, and the rest is what remains for the next one."""
    part = one.at_most(other)
    assert part == Amount(
        min(one.input, other.input), min(one.output, other.output), min(one.requests, other.requests)
    )
    assert part + (one - part) == one


@pytest.mark.parametrize(
    ("amount", "is_something"),
    [(NO_AMOUNT, False), (Amount(input=1), True), (Amount(output=1), True), (Amount(requests=1), True)],
)
def test_an_amount_is_false_only_if_all_its_numbers_are_0(amount, is_something):
    """A request without tokens keeps its window open, and so do tokens without a request."""
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
def test_bounded_tokens_have_bounded_parts(tokens, most, expected):
    """Cached tokens stay a part of the input, and reasoning tokens a part of the output."""
    assert tokens.at_most(most) == expected


@pytest.mark.parametrize(
    ("usage", "provenance", "charge"),
    [
        (Exactly(Tokens(11, 5)), "exactly", Amount(11, 5, 1)),
        (Exactly(Tokens(0, 0)), "exactly", Amount(0, 0, 1)),
        (Exactly(Tokens(11, 4005, cached=11, reasoning=4000)), "exactly", Amount(11, 4005, 1)),
        (AtLeast(Tokens(11, 3)), "at_least", Amount(11, 3, 1)),
        (Unspent(), "unspent", NO_AMOUNT),
        (Unspent(requests=1), "unspent", Amount(requests=1)),
    ],
)
def test_a_call_is_charged_what_its_usage_says(usage, provenance, charge):
    """One request and its tokens; cached and reasoning tokens are not added; an unspent call costs no tokens."""
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
def test_input_and_output_beyond_the_hold_are_counted_separately(tokens: Tokens, hold: Amount, beyond: int) -> None:
    """Held input that was not used does not cover output, and the reverse."""
    assert tokens.beyond(hold) == beyond


def test_an_unspent_call_has_no_tokens_of_any_kind():
    """Also if the call itself counts as a request."""
    assert Unspent(requests=1).tokens == Tokens(0, 0)
