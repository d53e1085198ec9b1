"""Which calls are admitted, what they hold of which counter, how far a hold increases, and the resets of refusals.

In all scenarios the user is ann and the time is noon UTC on Tuesday, 24 November 2026. In a table, a bare number used
or held means that many input tokens and one request.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.admission import (
    Admitted,
    Counters,
    HoldIncrease,
    NeedsCount,
    NotAdmitted,
    Verdict,
    decide,
    hold_of,
    increase_hold,
)
from proxy.policy.amounts import NO_AMOUNT, TOKENS_MAX, Amount, Measure, Uses
from proxy.policy.binding import Binding, GroupQuotas
from proxy.policy.quota import Counter, Demand, Grant, Limit, Quota, counter_at
from proxy.policy.windows import Window
from tests.builders import DAY, HOUR, NOON, amount, binding, call, counters, estimated, group_quotas, instant, quota
from tests.random_rules import bindings, counters_of, demands

ONE_OCLOCK = instant("2026-11-24 13:00")
SIX_OCLOCK = instant("2026-11-24 18:00")
MIDNIGHT = instant("2026-11-25 00:00")

DAILY = quota("staff/daily", tokens=1000)


def embedding(input_tokens: int) -> Demand:
    """A call that generates nothing."""
    return call(input_tokens, uses=Uses.INPUT)


# --------------------------------------------------------------------------------------------- the expected decisions


def admitted(admitted_via: str, output: int, *charged: str) -> tuple[object, ...]:
    """Admitted through a group with `output` tokens of answer held, and charged to these quotas."""
    return ("admitted", admitted_via, output, set(charged))


def busy(*quotas: str) -> tuple[object, ...]:
    """Calls in flight hold what is free of these quotas."""
    return ("busy", set(quotas), None)


def exhausted(*quotas: str, until: int | None) -> tuple[object, ...]:
    """These are used up, and the call would be admitted at `until`."""
    return ("exhausted", set(quotas), until)


def never(*quotas: str) -> tuple[object, ...]:
    """The call is larger than the limits of these."""
    return ("never", set(quotas), None)


def summary(decision: Admitted | NotAdmitted | NeedsCount) -> tuple[object, ...]:
    """A decision in the form of the functions above."""
    if isinstance(decision, Admitted):
        return admitted(decision.admitted_via, decision.hold.output, *(hold.quota.id for hold in decision.holds))
    if isinstance(decision, NeedsCount):
        return ("needs count",)
    return (decision.verdict.name.lower(), {block.quota.id for block in decision.blocks}, decision.admissible_at)


def decide_at_noon(who: Binding, demand: Demand, used: dict, held: dict) -> Admitted | NotAdmitted | NeedsCount:
    return decide(demand, who, counters(who, used=used, held=held), NOON)


# ---------------------------------------------------------------------------------------------- the limits of a quota

ONE_CALL = Amount(requests=1)


@pytest.mark.parametrize(
    ("limits", "used", "held", "demand", "expected"),
    [
        # tokens: limit 1000
        pytest.param({"tokens": 1000}, 300, 0, call(100, 400), 400, id="more than enough is free"),
        pytest.param({"tokens": 500}, 0, 0, call(100, 400), 400, id="exactly enough is free"),
        pytest.param({"tokens": 499}, 0, 0, call(100, 400, 1), 399, id="one token short: the answer is cut"),
        pytest.param({"tokens": 1000}, 600, 0, call(100, 400, 1), 300, id="the answer is cut to what is free"),
        pytest.param({"tokens": 1000}, 500, 0, call(100, 4000, 400), 400, id="the smallest answer fits exactly"),
        pytest.param({"tokens": 1000}, 501, 0, call(100, 4000, 400), "exhausted", id="one token too few"),
        pytest.param({"tokens": 1000}, 300, 200, call(100, 400), 400, id="others hold some, enough is left"),
        pytest.param({"tokens": 1000}, 300, 201, call(100, 400), "busy", id="others hold one too many"),
        pytest.param({"tokens": 1000}, 0, 600, call(100, 4000, 1), "busy", id="others hold some: no cut answer"),
        pytest.param({"tokens": 1000}, 0, 1000, call(1, 1), "busy", id="others hold everything"),
        pytest.param({"tokens": 1000}, 950, 50, call(51, 1), "exhausted", id="freed holds would not help"),
        pytest.param({"tokens": 1000}, 999, 0, call(0, 1), 1, id="the last token"),
        pytest.param({"tokens": 1000}, 999, 0, call(1), 0, id="the last token, as input"),
        pytest.param({"tokens": 1000}, 1000, 0, call(0, 1), "exhausted", id="at the limit: refused"),
        pytest.param({"tokens": 1000}, 1000, 0, call(), "exhausted", id="at the limit: an empty call too"),
        pytest.param({"tokens": 1000}, 5000, 0, call(1, 1), "exhausted", id="the limit was lowered below the usage"),
        pytest.param({"tokens": 6000}, 5000, 0, call(1, 1), 1, id="the limit was raised again"),
        pytest.param({"tokens": 1000}, 0, 0, call(600, 400, 400), 400, id="exactly as large as the limit"),
        pytest.param({"tokens": 1000}, 0, 0, call(600, 401, 401), "never", id="one larger than the limit"),
        pytest.param({"tokens": 1000}, 1000, 0, call(600, 401, 401), "never", id="never wins over exhausted"),
        pytest.param({"tokens": 1000}, 0, 1000, call(1001), "never", id="never wins over busy"),
        pytest.param({"tokens": 1000}, 0, 0, call(100, 10**12, 1), 900, id="a huge maximum is cut to what is free"),
        # input and output apart
        pytest.param({"input_tokens": 100}, 0, 0, call(100, 10**6), 10**6, id="input only: any answer fits"),
        pytest.param({"input_tokens": 100}, 0, 0, call(101, 1), "never", id="input only: too large for the limit"),
        pytest.param({"input_tokens": 100}, 50, 0, call(50, 9), 9, id="input only: exactly what is left"),
        pytest.param({"input_tokens": 100}, 50, 0, call(51, 9), "exhausted", id="input only: more than what is left"),
        pytest.param({"input_tokens": 100}, 50, 1, call(50, 9), "busy", id="input only: held by other calls"),
        pytest.param({"output_tokens": 400}, 10**6, 10**6, call(10**6, 400), 400, id="output only: any input fits"),
        pytest.param({"output_tokens": 400}, Amount(0, 100, 1), 0, call(9, 400, 1), 300, id="output only: a cut"),
        pytest.param({"output_tokens": 400}, Amount(0, 400, 1), 0, call(9, 1), "exhausted", id="output only: used"),
        pytest.param({"output_tokens": 400}, 0, Amount(0, 1, 1), call(9, 400), "busy", id="output only: busy"),
        pytest.param({"output_tokens": 400}, 0, 0, call(9, 401, 401), "never", id="output only: too large"),
        pytest.param(
            {"input_tokens": 100, "output_tokens": 40}, 0, 0, call(100, 90, 1), 40, id="input and output: separate"
        ),
        pytest.param(
            {"input_tokens": 100, "output_tokens": 40},
            100,
            0,
            call(1, 1),
            "exhausted",
            id="input and output: no input",
        ),
        pytest.param(
            {"input_tokens": 100, "output_tokens": 40},
            Amount(1, 40, 1),
            0,
            call(1, 1),
            "exhausted",
            id="input and output: no output",
        ),
        pytest.param({"tokens": 100, "output_tokens": 90}, 0, 0, call(30, 90, 1), 70, id="tokens are tighter"),
        pytest.param({"tokens": 100, "output_tokens": 40}, 0, 0, call(30, 90, 1), 40, id="output is tighter"),
        # requests
        pytest.param({"requests": 2}, 10**6, 0, call(10**6, 10**6), 10**6, id="requests only: any size"),
        pytest.param({"requests": 2}, ONE_CALL + ONE_CALL, 0, call(), "exhausted", id="requests only: used up"),
        pytest.param({"requests": 2}, ONE_CALL, ONE_CALL, call(), "busy", id="requests only: the last is in flight"),
        pytest.param(
            {"requests": 2, "tokens": 9}, ONE_CALL, ONE_CALL, call(10), "never", id="the worst verdict counts"
        ),
        pytest.param({"requests": 1, "tokens": 9}, ONE_CALL, 0, call(1), "exhausted", id="only tokens are left"),
        # nothing at all
        pytest.param({"tokens": 0}, 0, 0, call(), "exhausted", id="tokens 0"),
        pytest.param({"tokens": 0}, 0, 0, call(100, 400), "exhausted", id="tokens 0: exhausted, not never"),
        pytest.param({"requests": 0}, 0, 0, call(1, 1), "exhausted", id="requests 0"),
        pytest.param({"input_tokens": 0}, 0, 0, call(0, 1), "exhausted", id="input 0: an empty input too"),
        pytest.param({"output_tokens": 0}, 0, 0, call(1, 1), "exhausted", id="output 0"),
        # calls that generate nothing
        pytest.param({"output_tokens": 40}, Amount(0, 99, 1), 0, embedding(10), 0, id="embeddings: output is free"),
        pytest.param({"output_tokens": 0}, 0, 0, embedding(10), 0, id="embeddings: an output limit of 0"),
        pytest.param({"tokens": 10}, 0, 0, embedding(10), 0, id="embeddings: a limit on tokens binds"),
        pytest.param({"tokens": 10}, 1, 0, embedding(10), "exhausted", id="embeddings: tokens are used up"),
        pytest.param({"tokens": 10}, 0, 1, embedding(10), "busy", id="embeddings: tokens are held"),
        pytest.param({"tokens": 10}, 0, 0, embedding(11), "never", id="embeddings: too large"),
        pytest.param(
            {"input_tokens": 10, "output_tokens": 5},
            Amount(3, 5, 1),
            0,
            embedding(7),
            0,
            id="embeddings: output is used",
        ),
        pytest.param(
            {"input_tokens": 10, "output_tokens": 5},
            Amount(4, 0, 1),
            0,
            embedding(7),
            "exhausted",
            id="embeddings: input is used",
        ),
        # a call is bound by what it can use, whatever it asks for
        pytest.param({"output_tokens": 40}, Amount(0, 40, 1), 0, call(10), "exhausted", id="max_tokens: 0"),
        pytest.param({"output_tokens": 40}, Amount(0, 39, 1), 0, call(10), 0, id="max_tokens: 0, one token is left"),
        pytest.param({"tokens": 9}, Amount(9, 0, 1), 0, call(uses=Uses.REQUEST), 0, id="a request: tokens"),
        pytest.param({"requests": 1}, Amount(9, 0, 1), 0, call(uses=Uses.REQUEST), "exhausted", id="a request"),
        pytest.param({"requests": 1}, 0, ONE_CALL, call(uses=Uses.REQUEST), "busy", id="a request: in flight"),
        pytest.param({"input_tokens": 9}, 9, 0, call(0, 9, 9, uses=Uses.OUTPUT), 9, id="a price: input is used up"),
        pytest.param({"tokens": 9}, 1, 0, call(0, 9, 9, uses=Uses.OUTPUT), "exhausted", id="a price: too little"),
        pytest.param({"tokens": 9}, 0, 0, call(0, 10, 10, uses=Uses.OUTPUT), "never", id="a price: too large"),
    ],
)
def test_an_exact_quota_checks_each_limit_separately(limits, used, held, demand, expected):
    """`free = limit − used`, `available = free − held`; an expected number is the output of the admitted call."""
    who = binding([quota("staff/daily", **limits)])
    decision = decide_at_noon(who, demand, {"staff/daily": used}, {"staff/daily": held})
    if isinstance(expected, int):
        assert isinstance(decision, Admitted)
        assert decision.hold == Amount(demand.input, expected, 1)
        assert (decision.capped_by is None) is (expected == demand.output_maximum)
    else:
        assert summary(decision)[0] == expected


@pytest.mark.parametrize(
    ("limits", "used", "held", "is_admitted"),
    [
        pytest.param({"tokens": 1000}, 0, 0, True, id="nothing is used"),
        pytest.param({"tokens": 1000}, 999, 0, True, id="one token is left, which is enough for any call"),
        pytest.param({"tokens": 1000}, 1000, 0, False, id="at the limit: refused"),
        pytest.param({"tokens": 1000}, 9000, 0, False, id="above the limit"),
        pytest.param({"tokens": 1000}, 0, Amount(0, 0, 99), True, id="holds of other calls do not count"),
        pytest.param({"requests": 2}, Amount(0, 0, 1), Amount(0, 0, 9), True, id="one request is left"),
        pytest.param({"requests": 2}, Amount(0, 0, 2), 0, False, id="no request is left"),
        pytest.param({"requests": 2, "tokens": 9}, Amount(9, 0, 1), 0, False, id="one of two limits is used up"),
        pytest.param({"tokens": 0}, 0, 0, False, id="a limit of 0"),
    ],
)
def test_enforce_after_checks_only_what_was_used(limits, used, held, is_admitted):
    """No call is too large, none waits and no answer is cut; an admitted call holds one request and no tokens."""
    after = quota("staff/daily", enforce="after", **limits)
    decision = decide_at_noon(binding([after]), call(5000, 4000), {after.id: used}, {after.id: held})
    if is_admitted:
        assert summary(decision) == admitted("staff", 4000, after.id)
        assert [hold.amount for hold in decision.holds] == [Amount(requests=1)]
    else:
        assert summary(decision)[:2] == ("exhausted", {after.id})


def test_enforce_after_on_output_does_not_bind_embeddings():
    """They generate nothing, so they are not charged to the quota and do not open its window."""
    after = quota("staff/daily", enforce="after", output_tokens=10)
    who = binding([after])
    assert summary(decide_at_noon(who, embedding(5), {after.id: Amount(0, 10, 1)}, {})) == admitted("staff", 0)
    assert summary(decide_at_noon(who, call(5, 1), {after.id: Amount(0, 10, 1)}, {})) == exhausted(
        after.id, until=MIDNIGHT
    )


@pytest.mark.parametrize("enforce", ["exact", "after", "shadow"])
def test_a_call_that_uses_nothing_is_admitted_by_every_quota_and_holds_nothing(enforce):
    """Whatever is used up or switched off. It opens no window and is not charged a request."""
    each = quota("staff/daily", tokens=9, input_tokens=0, output_tokens=9, requests=1, enforce=enforce)
    who = binding([DAILY], shadows=[each]) if enforce == "shadow" else binding([each], always=[DAILY])
    full = Amount(999, 999, 9)
    decision = decide_at_noon(who, call(uses=Uses.NOTHING), {each.id: full, DAILY.id: full}, {DAILY.id: full})
    assert isinstance(decision, Admitted)
    assert (decision.holds, decision.would_refuse, decision.capped_by) == ((), (), None)


def test_a_call_that_costs_a_request_is_not_charged_to_quotas_of_tokens():
    """It does not open their windows."""
    calls = quota("everyone/calls", requests=9)
    decision = decide_at_noon(binding([DAILY], always=[calls]), call(uses=Uses.REQUEST), {}, {})
    assert [(hold.quota.id, hold.amount) for hold in decision.holds] == [(calls.id, ONE_CALL)]


def test_a_block_has_what_was_needed_and_the_counter():
    """A refusal can then tell "used up" from "300 left and this call may need 416"."""
    who = binding([DAILY])
    refused = decide_at_noon(who, call(100, 400, 316), {DAILY.id: 700}, {DAILY.id: 50})
    [block] = refused.blocks
    assert (block.verdict, block.needed, block.limit.maximum) == (Verdict.EXHAUSTED, 416, 1000)
    assert (block.counter.used, block.counter.held) == (Amount(700, 0, 1), Amount(50, 0, 1))


# ------------------------------------------------------------------------------- the length of an answer and its hold


@pytest.mark.parametrize(
    ("limits", "used", "held", "demand", "expected"),
    [
        pytest.param({"tokens": 1000}, 0, 0, call(100, 400, 100, initial_hold=100), (100, 400), id="a part is held"),
        pytest.param(
            {"tokens": 1000}, 0, 0, call(100, 400, initial_hold=10**6), (400, 400), id="not more than its maximum"
        ),
        pytest.param({"tokens": 1000}, 0, 0, call(100, 400, initial_hold=0), (0, 400), id="nothing is held at first"),
        pytest.param({"tokens": 1000}, 0, 800, call(100, 400, 100, initial_hold=100), (100, 400), id="the part fits"),
        pytest.param(
            {"tokens": 1000}, 0, 801, call(100, 400, 100, initial_hold=100), "busy", id="the part does not fit"
        ),
        pytest.param(
            {"tokens": 1000}, 700, 0, call(100, 400, 1, initial_hold=50), (50, 200), id="a cut answer, a whole part"
        ),
        pytest.param(
            {"tokens": 1000}, 850, 0, call(100, 400, 1, initial_hold=100), (50, 50), id="the part is cut too"
        ),
        pytest.param(
            {"tokens": 1000}, 850, 1, call(100, 400, 1, initial_hold=50), "busy", id="others hold the last part"
        ),
        pytest.param(
            {"tokens": 1000}, 0, 800, call(100, 4000, 100, initial_hold=100), (100, 900), id="others do not cut it"
        ),
        pytest.param(
            {"tokens": 1000}, 801, 0, call(100, 400, 100, initial_hold=1), "exhausted", id="the smallest must fit"
        ),
        pytest.param(
            {"tokens": 1000}, 0, 0, call(600, 401, 401, initial_hold=1), "never", id="the smallest is too large"
        ),
        pytest.param(
            {"output_tokens": 400}, 0, Amount(0, 350, 1), call(9, 400, 50, initial_hold=50), (50, 400), id="output"
        ),
        pytest.param(
            {"output_tokens": 400}, 0, Amount(0, 351, 1), call(9, 400, 50, initial_hold=50), "busy", id="held"
        ),
        # unbounded: nothing says how long the answer may become
        pytest.param(
            {"tokens": 1000}, 0, 0, call(100, 400, is_unbounded=True), (400, None), id="unbounded: no maximum"
        ),
        pytest.param(
            {"tokens": 1000},
            0,
            0,
            call(100, 400, 100, initial_hold=100, is_unbounded=True),
            (100, None),
            id="unbounded: a part is held",
        ),
        pytest.param(
            {"tokens": 500}, 0, 0, call(100, 400, is_unbounded=True), (400, None), id="unbounded: just fits"
        ),
        pytest.param(
            {"tokens": 499}, 0, 0, call(100, 400, 1, is_unbounded=True), (399, 399), id="unbounded, but capped"
        ),
        pytest.param({"requests": 1}, 0, 0, call(100, 400, is_unbounded=True), (400, None), id="unbounded: requests"),
    ],
)
def test_a_stream_holds_a_part_of_its_answer_at_first(limits, used, held, demand, expected):
    """Expected (output held, maximum): the part must be available; the maximum is what is free, whatever is held."""
    who = binding([quota("staff/daily", **limits)])
    decision = decide_at_noon(who, demand, {"staff/daily": used}, {"staff/daily": held})
    if isinstance(expected, str):
        assert summary(decision)[0] == expected
        return
    output, maximum = expected
    assert (decision.hold, decision.maximum) == (Amount(demand.input, output, 1), maximum)
    assert (decision.capped_by is None) is (maximum in (None, demand.output_maximum))


def test_a_group_is_chosen_by_the_whole_answer_not_by_the_part_held_first():
    """Otherwise a stream would be admitted through a group whose limit it soon reaches, though another has room."""
    lab = quota("lab/6h", tokens=1000, per="6h")
    decision = decide_at_noon(binding([DAILY], [lab]), call(100, 400, 100, initial_hold=100), {DAILY.id: 601}, {})
    assert (decision.admitted_via, decision.maximum) == ("lab", 400)
    assert {hold.quota.id: hold.amount for hold in decision.holds} == dict.fromkeys(
        (lab.id, DAILY.id), Amount(100, 100, 1)
    )


@pytest.mark.parametrize(
    ("limits", "used", "held", "demand", "expected"),
    [
        pytest.param({"tokens": 1000}, 0, 0, call(100, 4000, 1), 1100, id="an answer may use all of it"),
        pytest.param({"tokens": 1000}, 0, 0, call(100, 1100, 1), 1100, id="to the last token"),
        pytest.param({"tokens": 1000}, 999, 0, call(0, 4000, 1), 201, id="one token is left"),
        pytest.param({"tokens": 1000}, 1000, 0, call(0, 1), "exhausted", id="at the limit: refused"),
        pytest.param({"tokens": 1000}, 1100, 0, call(0, 1), "exhausted", id="within it: refused"),
        pytest.param({"tokens": 1000}, 900, 0, call(0, 4000, 100), 300, id="the smallest answer fits"),
        pytest.param({"tokens": 1000}, 900, 0, call(0, 4000, 101), "exhausted", id="the smallest answer needs it"),
        pytest.param({"tokens": 1000}, 900, 0, call(101), "exhausted", id="the input needs it"),
        pytest.param({"tokens": 1000}, 0, 0, call(1001), "never", id="it makes no large call fit"),
        pytest.param({"tokens": 1000}, 0, 200, call(100, 900), 900, id="others hold some, enough is left"),
        pytest.param({"tokens": 1000}, 0, 201, call(100, 900), "busy", id="others hold one too many"),
        pytest.param({"output_tokens": 400}, 0, 0, call(9, 4000, 1), 600, id="output may use it"),
        pytest.param(
            {"output_tokens": 400}, Amount(0, 400, 1), 0, call(9, 1), "exhausted", id="output: at the limit"
        ),
        pytest.param({"tokens": 1000, "output_tokens": 400}, 0, 0, call(500, 4000, 1), 600, id="the tighter one"),
        pytest.param({"tokens": 1000, "input_tokens": 100}, 50, 0, call(51, 9), "exhausted", id="input: not used"),
        pytest.param({"tokens": 1000, "input_tokens": 100}, 0, 0, call(101, 9), "never", id="input: too large"),
        pytest.param({"tokens": 1000, "input_tokens": 100}, 50, 1, call(50, 9), "busy", id="input: busy"),
        pytest.param({"tokens": 9, "requests": 1}, 0, Amount(0, 0, 1), call(1, 1), "busy", id="requests: not used"),
        pytest.param({"tokens": 0}, 0, 0, call(0, 1), "exhausted", id="a limit of 0 still refuses"),
    ],
)
def test_an_overdraft_of_200_lets_answers_end_and_admits_no_call(limits, used, held, demand, expected):
    """Admission stops at the limit; what is held, and so charged, may reach limit + overdraft."""
    who = binding([quota("staff/daily", overdraft=200, **limits)])
    decision = decide_at_noon(who, demand, {"staff/daily": used}, {"staff/daily": held})
    if isinstance(expected, str):
        assert summary(decision)[0] == expected
    else:
        assert (decision.hold, decision.maximum) == (Amount(demand.input, expected, 1), expected)
        assert (decision.capped_by is None) is (expected == demand.output_maximum)


@pytest.mark.parametrize(
    ("each", "used", "held", "demand", "hold"),
    [
        pytest.param(
            {"tokens": 1000}, 0, 0, call(100, 400, hidden_input=50), Amount(150, 400, 1), id="all of it is free"
        ),
        pytest.param(
            {"tokens": 1000}, 0, 0, call(100, 400, hidden_input=9999), Amount(600, 400, 1), id="only what is free"
        ),
        pytest.param(
            {"tokens": 1000}, 500, 0, call(100, 400, hidden_input=50), Amount(100, 400, 1), id="none of it is free"
        ),
        pytest.param(
            {"tokens": 1000}, 0, 0, call(100, 4000, 1, hidden_input=50), Amount(100, 900, 1), id="answer first"
        ),
        pytest.param(
            {"tokens": 1000},
            0,
            0,
            call(100, 400, 100, initial_hold=100, hidden_input=9999),
            Amount(600, 100, 1),
            id="the whole answer comes first, also if only a part of it is held",
        ),
        pytest.param({"tokens": 1000}, 0, 1, call(100, 400, hidden_input=9999), None, id="free, but held: it waits"),
        pytest.param(
            {"tokens": 1000}, 0, 450, call(100, 400, hidden_input=50), Amount(150, 400, 1), id="free and available"
        ),
        pytest.param(
            {"input_tokens": 300}, 0, 0, call(100, 400, hidden_input=9999), Amount(300, 400, 1), id="input only"
        ),
        pytest.param(
            {"output_tokens": 400}, 0, 0, call(100, 400, hidden_input=50), Amount(150, 400, 1), id="output only"
        ),
        pytest.param({"requests": 1}, 0, 0, call(100, 400, hidden_input=50), Amount(150, 400, 1), id="requests only"),
        pytest.param(
            {"tokens": 1000, "input_tokens": 120},
            0,
            0,
            call(100, 9, hidden_input=50),
            Amount(120, 9, 1),
            id="the tightest",
        ),
        pytest.param({"tokens": 1000}, 0, 0, call(100, hidden_input=9999), Amount(1000, 0, 1), id="embeddings"),
        pytest.param(
            {"tokens": 1000, "overdraft": 200},
            0,
            0,
            call(100, 400, hidden_input=9999),
            Amount(600, 400, 1),
            id="overdraft",
        ),
        pytest.param(
            {"tokens": 1000, "enforce": "after"}, 999, 0, call(100, 9, hidden_input=50), Amount(150, 9, 1), id="after"
        ),
    ],
)
def test_as_much_hidden_input_is_held_as_is_free(each, used, held, demand, hold):
    """Stored files, earlier answers: their size is not known, so they refuse no call and cut no answer."""
    who = binding([quota("staff/daily", **each)])
    decision = decide_at_noon(who, demand, {"staff/daily": used}, {"staff/daily": held})
    assert decision.hold == hold if hold else summary(decision) == busy("staff/daily")


def test_hidden_input_is_held_in_every_quota_that_the_call_is_charged_to():
    """A quota of another group that cannot carry it is not charged; without any quota all of it is held."""
    big, demand = quota("lab/big", tokens=9000), call(100, 400, hidden_input=5000)
    decision = decide_at_noon(binding([big], [DAILY]), demand, {}, {})
    assert [(hold.quota.id, hold.amount) for hold in decision.holds] == [(big.id, Amount(5100, 400, 1))]
    assert decide_at_noon(binding(), demand, {}, {}).hold == Amount(5100, 400, 1)


# ------------------------------------------------------------------------------------------- when an input is counted

SMALL = quota("s/q", tokens=1600)
SHADOWED = quota("s/q", tokens=1600, enforce="shadow")
AFTER = quota("s/q", tokens=1600, enforce="after")
FAR = quota("s/far", tokens=10**6)


@pytest.mark.parametrize(
    ("who", "used", "held", "demand", "is_counted"),
    [
        # 16 × 100 = 1600
        pytest.param(binding([SMALL]), 0, 0, call(100, 9), False, id="exactly a sixteenth"),
        pytest.param(binding([SMALL]), 0, 0, call(101, 9), True, id="more than a sixteenth"),
        pytest.param(binding([SMALL]), 1, 0, call(100, 9), True, id="more than a sixteenth of what is free"),
        pytest.param(binding([SMALL]), 0, 1, call(100, 9), True, id="more than a sixteenth of what is available"),
        pytest.param(binding([SMALL]), 0, 0, call(0, 1600), False, id="no input"),
        pytest.param(binding([quota("s/q", tokens=1600, overdraft=900)]), 0, 0, call(101, 9), True, id="overdraft"),
        pytest.param(binding([quota("s/q", input_tokens=1600)]), 0, 0, call(100, 9), False, id="input: a sixteenth"),
        pytest.param(binding([quota("s/q", input_tokens=1600)]), 0, 0, call(101, 9), True, id="input: more"),
        pytest.param(binding([quota("s/q", output_tokens=9)]), 0, 0, call(9999, 9), False, id="output"),
        pytest.param(binding([quota("s/q", requests=2)]), 0, 0, call(9999, 9), False, id="requests"),
        pytest.param(binding([AFTER]), 0, 0, call(9999, 9), False, id="after: the size of a call does not matter"),
        pytest.param(binding(shadows=[SHADOWED]), 0, 0, call(9999, 9), False, id="shadow"),
        pytest.param(binding([FAR], [SMALL]), 0, 0, call(101, 9), True, id="an additional quota"),
        pytest.param(binding([FAR], [SMALL]), 1600, 0, call(101, 9), False, id="an additional quota that is used up"),
        pytest.param(binding([FAR], always=[SMALL]), 0, 0, call(101, 9), True, id="a quota of everyone"),
        pytest.param(binding(group_quotas("admins")), 0, 0, call(9999, 9), False, id="unlimited"),
        # the call does not get all that it asks for
        pytest.param(binding([SMALL]), 0, 0, call(9999, 9), True, id="larger than the limit"),
        pytest.param(binding([SMALL]), 1500, 0, call(100, 9), True, id="larger than what is free"),
        pytest.param(binding([SMALL]), 1500, 0, call(1, 200, 1), True, id="it would be cut"),
        pytest.param(binding([SMALL]), 0, 1500, call(100, 9), True, id="it would wait"),
        pytest.param(binding([SMALL]), 1000, 600, call(1, 9), False, id="it would wait without input too"),
        pytest.param(binding([SMALL]), 1600, 0, call(100, 9), False, id="refused without input too"),
        pytest.param(binding([SMALL]), 1600, 0, call(1700, 9), True, id="never by its bytes, exhausted by a count"),
        pytest.param(binding([SMALL]), 0, 0, call(1, 9999, 1601), True, id="for the exact number in the refusal"),
        pytest.param(
            binding([quota("s/q", output_tokens=50)], [quota("s/p", tokens=100)]),
            0,
            Amount(0, 1, 1),
            call(60, 90, 1),
            True,
            id="it would be cut, and could wait for a longer answer in another group",
        ),
    ],
)
def test_near_a_limit_the_tokens_of_the_input_are_counted_first(who, used, held, demand, is_counted):
    """If the bytes would refuse, delay or cut the call, or are more than a sixteenth of what is available.

    Never twice, and never if a count cannot help.
    """
    [by_bytes, counted] = [
        decide_at_noon(who, each, {"s/q": used}, {"s/q": held}) for each in (estimated(demand), demand)
    ]
    assert not isinstance(counted, NeedsCount)
    assert by_bytes == (NeedsCount() if is_counted else counted)


# ------------------------------------------------------------------------------------- several quotas, several groups

HOURLY = quota("staff/hourly", tokens=300, per="hour")
WEEKLY = quota("team/weekly", tokens=5000, per="week")
SHARED = quota("team/pot", tokens=5000, per="month", shared=True)
LAB = quota("lab/6h", tokens=1000, per="6h")
CALLS = quota("everyone/calls", requests=10)
LAB_AFTER = quota("lab/after", tokens=1000, per="6h", enforce="after")
ZERO = quota("off/zero", tokens=0, per="minute")
ADMINS = group_quotas("admins")
TEN = Amount(requests=10)


@pytest.mark.parametrize(
    ("who", "used", "held", "demand", "expected"),
    [
        # inside one group
        pytest.param(
            binding([DAILY, HOURLY]), {}, {}, call(100, 200), admitted("staff", 200, DAILY.id, HOURLY.id), id="both"
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {HOURLY.id: 300},
            {},
            call(1, 1),
            exhausted(HOURLY.id, until=ONE_OCLOCK),
            id="one group: all its quotas must have room",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {HOURLY.id: 300, DAILY.id: 1000},
            {},
            call(1, 1),
            exhausted(HOURLY.id, DAILY.id, until=MIDNIGHT),
            id="one group: the latest reset counts",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {HOURLY.id: 300},
            {DAILY.id: 1000},
            call(1, 1),
            exhausted(HOURLY.id, until=ONE_OCLOCK),
            id="one group: exhausted is worse than busy",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {DAILY.id: 1000},
            {},
            call(301),
            never(HOURLY.id),
            id="one group: never is worse than exhausted",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {DAILY.id: 800},
            {},
            call(50, 4000, 1),
            admitted("staff", 150, DAILY.id, HOURLY.id),
            id="one group: the shortest answer counts",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {DAILY.id: 800},
            {HOURLY.id: 101},
            call(50, 4000, 1),
            busy(HOURLY.id),
            id="one group: the answer that the tightest leaves must be available in the others",
        ),
        # everyone
        pytest.param(
            binding([DAILY], always=[CALLS]),
            {},
            {},
            call(1, 1),
            admitted("staff", 1, CALLS.id, DAILY.id),
            id="everyone: in addition to the group",
        ),
        pytest.param(
            binding([DAILY], always=[CALLS]),
            {CALLS.id: TEN},
            {},
            call(1, 1),
            exhausted(CALLS.id, until=MIDNIGHT),
            id="everyone: binds although the group has room",
        ),
        pytest.param(
            binding([DAILY], [LAB], ADMINS, always=[CALLS]),
            {CALLS.id: TEN},
            {},
            call(1, 1),
            exhausted(CALLS.id, until=MIDNIGHT),
            id="everyone: binds through any group, unlimited ones too",
        ),
        pytest.param(
            binding(always=[CALLS]), {}, {}, call(1, 9), admitted("everyone", 9, CALLS.id), id="only everyone"
        ),
        pytest.param(binding(), {}, {}, call(1, 9), admitted("everyone", 9), id="no quota at all"),
        # any_group: through which group
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {},
            {},
            call(1, 9),
            admitted("staff", 9, DAILY.id, WEEKLY.id),
            id="any_group: the first group that can carry the call",
        ),
        pytest.param(
            binding([WEEKLY], [DAILY]),
            {},
            {},
            call(1, 9),
            admitted("team", 9, WEEKLY.id, DAILY.id),
            id="any_group: in the order of the policy",
        ),
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {DAILY.id: 700},
            {},
            call(100, 400, 1),
            admitted("team", 400, WEEKLY.id),
            id="any_group: a group that cannot carry the whole hold is passed over and not charged",
        ),
        pytest.param(
            binding([DAILY], [LAB], [WEEKLY]),
            {DAILY.id: 700, LAB.id: 600, WEEKLY.id: 4900},
            {},
            call(50, 4000, 1),
            admitted("lab", 350, LAB.id),
            id="any_group: if none can carry all, the one that can carry most",
        ),
        pytest.param(
            binding([DAILY], [LAB]),
            {DAILY.id: 600, LAB.id: 600},
            {},
            call(50, 4000, 1),
            admitted("staff", 350, DAILY.id, LAB.id),
            id="any_group: of two that carry the same, the first",
        ),
        pytest.param(
            binding([DAILY], [LAB]),
            {DAILY.id: 600, LAB.id: 600},
            {DAILY.id: 1},
            call(50, 4000, 1),
            admitted("lab", 350, LAB.id),
            id="any_group: of two that carry the same, the one without waiting",
        ),
        pytest.param(
            binding([DAILY], [LAB]),
            {DAILY.id: 700, LAB.id: 600},
            {LAB.id: 300},
            call(50, 4000, 1),
            busy(LAB.id),
            id="any_group: most by what is free, so it waits for calls in flight",
        ),
        pytest.param(
            binding([DAILY], [LAB]),
            {},
            {DAILY.id: 900},
            call(100, 400),
            admitted("lab", 400, LAB.id),
            id="any_group: no waiting if another group can carry all",
        ),
        pytest.param(
            binding([HOURLY, DAILY], [LAB]),
            {HOURLY.id: 290},
            {},
            call(100, 400),
            admitted("lab", 400, LAB.id, DAILY.id),
            id="any_group: the quotas of another group are additional one by one",
        ),
        # any_group: the best verdict of the groups
        pytest.param(
            binding([HOURLY], [DAILY]),
            {HOURLY.id: 300},
            {DAILY.id: 1000},
            call(10, 10),
            busy(DAILY.id),
            id="any_group: busy is better than exhausted",
        ),
        pytest.param(
            binding([HOURLY], [DAILY]),
            {DAILY.id: 1000},
            {},
            call(301),
            exhausted(DAILY.id, until=MIDNIGHT),
            id="any_group: exhausted is better than never",
        ),
        pytest.param(
            binding([HOURLY], [quota("lab/tiny", tokens=5)]),
            {},
            {},
            call(301),
            never("staff/hourly"),
            id="any_group: never in all groups",
        ),
        pytest.param(
            binding([DAILY], [LAB], [WEEKLY]),
            {DAILY.id: 1000, LAB.id: 1000, WEEKLY.id: 5000},
            {},
            call(1, 1),
            exhausted(LAB.id, until=SIX_OCLOCK),
            id="any_group: the earliest reset of the groups counts",
        ),
        pytest.param(
            binding([HOURLY, DAILY], [LAB]),
            {HOURLY.id: 300, DAILY.id: 1000, LAB.id: 1000},
            {},
            call(1, 1),
            exhausted(LAB.id, until=SIX_OCLOCK),
            id="any_group: the earliest of each group's latest reset",
        ),
        pytest.param(
            binding([HOURLY, DAILY], [LAB]),
            {HOURLY.id: 300, LAB.id: 1000},
            {DAILY.id: 1000},
            call(1, 1),
            exhausted(HOURLY.id, until=ONE_OCLOCK),
            id="any_group: the reset of a busy quota does not count",
        ),
        pytest.param(
            binding([DAILY], [LAB], always=[CALLS]),
            {DAILY.id: 1000, LAB.id: 1000, CALLS.id: TEN},
            {},
            call(1, 1),
            exhausted(DAILY.id, CALLS.id, until=MIDNIGHT),
            id="any_group: the reset of everyone's quota counts for each group",
        ),
        # unlimited
        pytest.param(
            binding([DAILY], ADMINS),
            {},
            {},
            call(1, 9),
            admitted("staff", 9, DAILY.id),
            id="unlimited: another group is first",
        ),
        pytest.param(
            binding([DAILY], ADMINS),
            {DAILY.id: 995},
            {},
            call(1, 9),
            admitted("admins", 9),
            id="unlimited: carries what the other group cannot",
        ),
        pytest.param(
            binding(ADMINS, [DAILY], [SHARED]),
            {},
            {},
            call(1, 9),
            admitted("admins", 9, DAILY.id),
            id="unlimited: per-member quotas of other groups are charged, shared ones are not",
        ),
        pytest.param(
            binding([DAILY], ADMINS),
            {},
            {DAILY.id: 1000},
            call(1, 10**9),
            admitted("admins", 10**9),
            id="unlimited: never waits",
        ),
        # shared quotas
        pytest.param(
            binding([DAILY], [SHARED]),
            {},
            {},
            call(1, 9),
            admitted("staff", 9, DAILY.id),
            id="shared: only through its group",
        ),
        pytest.param(
            binding([SHARED], [DAILY]),
            {},
            {},
            call(1, 9),
            admitted("team", 9, SHARED.id, DAILY.id),
            id="shared: charged through its group",
        ),
        pytest.param(
            binding([DAILY], [SHARED, WEEKLY]),
            {},
            {},
            call(1, 9),
            admitted("staff", 9, DAILY.id, WEEKLY.id),
            id="shared: of another group only the per-member quotas are charged",
        ),
        pytest.param(
            binding([DAILY], [SHARED]),
            {DAILY.id: 999, SHARED.id: 5000},
            {},
            call(2),
            exhausted(DAILY.id, until=MIDNIGHT),
            id="shared: one that is used up admits nobody",
        ),
        pytest.param(
            binding([DAILY], always=[quota("everyone/pot", tokens=50, shared=True)]),
            {},
            {},
            call(1, 9),
            admitted("staff", 9, "everyone/pot", DAILY.id),
            id="shared: one of everyone is always charged",
        ),
        # additional quotas: those of other groups that are charged too
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {WEEKLY.id: 4900},
            {},
            call(50, 51),
            admitted("staff", 51, DAILY.id),
            id="additional: too little is free",
        ),
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {WEEKLY.id: 4900},
            {},
            call(50, 50),
            admitted("staff", 50, DAILY.id, WEEKLY.id),
            id="additional: exactly enough is free",
        ),
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {WEEKLY.id: 4000},
            {WEEKLY.id: 950},
            call(50, 50),
            admitted("staff", 50, DAILY.id),
            id="additional: free, but held by other calls",
        ),
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {DAILY.id: 900, WEEKLY.id: 4950},
            {},
            call(10, 4000, 1),
            admitted("staff", 90, DAILY.id),
            id="additional: the hold of the admitted call counts, not what it asked for",
        ),
        pytest.param(
            binding([DAILY], [ZERO]),
            {},
            {},
            call(1, 9),
            admitted("staff", 9, DAILY.id),
            id="additional: a limit of 0 carries nothing",
        ),
        pytest.param(
            binding([DAILY], [LAB_AFTER]),
            {LAB_AFTER.id: 999},
            {},
            call(50, 50),
            admitted("staff", 50, DAILY.id, LAB_AFTER.id),
            id="additional: after carries any call before its limit",
        ),
        pytest.param(
            binding([DAILY], [LAB_AFTER]),
            {LAB_AFTER.id: 1000},
            {},
            call(50, 50),
            admitted("staff", 50, DAILY.id),
            id="additional: after carries no call at its limit",
        ),
        pytest.param(
            binding([DAILY], [quota("lab/out", output_tokens=5)]),
            {},
            {},
            embedding(50),
            admitted("staff", 0, DAILY.id),
            id="additional: a limit on output does not count embeddings",
        ),
        # a limit of 0
        pytest.param(
            binding([ZERO], [DAILY]), {}, {}, call(1, 9), admitted("staff", 9, DAILY.id), id="limit 0: another admits"
        ),
        pytest.param(
            binding([ZERO], [DAILY]),
            {DAILY.id: 1000},
            {},
            call(1, 9),
            exhausted(DAILY.id, until=MIDNIGHT),
            id="limit 0: never resets, so the reset of the other group counts",
        ),
        pytest.param(binding([ZERO]), {}, {}, call(1, 9), exhausted(ZERO.id, until=None), id="limit 0: no reset"),
        # every_group
        pytest.param(
            binding([DAILY], [SHARED], combine="every_group", always=[CALLS]),
            {},
            {},
            call(1, 9),
            admitted("staff+team", 9, CALLS.id, DAILY.id, SHARED.id),
            id="every_group: through all groups, shared quotas too",
        ),
        pytest.param(
            binding([DAILY], [LAB], combine="every_group"),
            {LAB.id: 1000},
            {},
            call(1, 9),
            exhausted(LAB.id, until=SIX_OCLOCK),
            id="every_group: all must have room",
        ),
        pytest.param(
            binding([DAILY], [LAB], combine="every_group"),
            {LAB.id: 1000, DAILY.id: 1000},
            {},
            call(1, 9),
            exhausted(LAB.id, DAILY.id, until=MIDNIGHT),
            id="every_group: the latest reset counts",
        ),
        pytest.param(
            binding([DAILY], [LAB], combine="every_group"),
            {LAB.id: 700},
            {},
            call(100, 400, 1),
            admitted("staff+lab", 200, DAILY.id, LAB.id),
            id="every_group: the shortest answer counts",
        ),
        pytest.param(
            binding([DAILY], ADMINS, combine="every_group"),
            {},
            {},
            call(1, 9),
            admitted("staff+admins", 9, DAILY.id),
            id="every_group: an unlimited group has room",
        ),
        pytest.param(
            binding(ADMINS, [DAILY], combine="every_group"),
            {DAILY.id: 1000},
            {},
            call(1, 9),
            exhausted(DAILY.id, until=MIDNIGHT),
            id="every_group: an unlimited group does not lift the quotas of others",
        ),
        pytest.param(
            binding(combine="every_group", always=[CALLS]),
            {},
            {},
            call(1, 9),
            admitted("everyone", 9, CALLS.id),
            id="every_group: no group",
        ),
    ],
)
def test_which_calls_are_admitted_and_what_they_are_charged(who, used, held, demand, expected):
    """All quotas of a group must have room; `combine` decides across groups; the quotas of everyone always bind."""
    assert summary(decide_at_noon(who, demand, used, held)) == expected


def test_an_admission_names_the_quota_that_cut_the_answer():
    """For the response header `x-quota-capped`."""
    who = binding([DAILY, HOURLY], always=[quota("everyone/tokens", tokens=900)])
    decision = decide_at_noon(who, call(50, 4000, 1), {DAILY.id: 800}, {})
    assert decision.capped_by == DAILY
    assert decision.hold.output == 150


def test_a_call_holds_all_of_its_tokens_in_exact_and_shadow_and_one_request_in_after():
    """The three kinds of enforcement can bind the same call."""
    after, shadow = (
        quota("staff/after", tokens=10, enforce="after"),
        quota("staff/shadow", tokens=900, enforce="shadow"),
    )
    who = binding([DAILY, after], shadows=[shadow])
    decision = decide_at_noon(who, call(100, 400), {}, {})
    whole = Amount(100, 400, 1)
    assert {hold.quota.id: hold.amount for hold in decision.holds} == {
        DAILY.id: whole,
        after.id: Amount(requests=1),
        shadow.id: whole,
    }
    assert [hold_of(each, whole) for each in (DAILY, after)] == [whole, Amount(requests=1)]


# ------------------------------------------------------------------------------------------------------------- shadow

SHADOW = quota("staff/shadow", tokens=500, enforce="shadow")


@pytest.mark.parametrize(
    ("used", "held", "demand", "output", "is_charged"),
    [
        pytest.param(0, 0, call(100, 400), 400, True, id="it would admit"),
        pytest.param(500, 0, call(100, 400), 400, False, id="exhausted: reported, not charged"),
        pytest.param(0, 0, call(501, 9), 9, False, id="never: reported, not charged"),
        pytest.param(0, 500, call(100, 400), 400, True, id="busy: charged, because the call would only have waited"),
        pytest.param(300, 0, call(100, 400, 1), 400, True, id="it would have been cut: admitted and not cut"),
    ],
)
def test_a_quota_in_shadow_never_refuses_and_reports_what_it_would_have_refused(
    used, held, demand, output, is_charged
):
    """An operator can see what a new quota would do before it is enforced."""
    who = binding([quota("staff/big", tokens=10**6)], shadows=[SHADOW])
    decision = decide_at_noon(who, demand, {SHADOW.id: used}, {SHADOW.id: held})
    assert summary(decision) == admitted("staff", output, "staff/big", *([SHADOW.id] if is_charged else []))
    assert decision.would_refuse == (() if is_charged else (SHADOW,))
    assert decision.capped_by is None


def test_quotas_in_shadow_alone_admit_every_call():
    """They bind no user."""
    who = binding(shadows=[SHADOW])
    assert summary(decide_at_noon(who, call(10**6, 10**6), {}, {})) == admitted("everyone", 10**6)
    assert summary(decide_at_noon(who, call(1, 1), {}, {})) == admitted("everyone", 1, SHADOW.id)


def test_a_quota_in_shadow_is_not_named_in_a_refusal():
    """A user who was refused by another quota does not need to know what this one would have done."""
    who = binding([DAILY], shadows=[SHADOW])
    decision = decide_at_noon(who, call(1, 1), {DAILY.id: 1000, SHADOW.id: 500}, {})
    assert summary(decision) == exhausted(DAILY.id, until=MIDNIGHT)


def test_a_quota_on_output_in_shadow_does_not_count_embeddings():
    """It would not bind them if it were enforced."""
    who = binding([DAILY], shadows=[quota("staff/out", output_tokens=0, enforce="shadow")])
    decision = decide_at_noon(who, embedding(10), {}, {})
    assert summary(decision) == admitted("staff", 0, DAILY.id)
    assert decision.would_refuse == ()


# ------------------------------------------------------------------------------------------------ increases of a hold

OWN = Amount(100, 100, 1)


def increased(
    who: Binding,
    increase: tuple[int, int],
    *,
    admitted_via: str,
    used: Mapping,
    others: Mapping,
    not_held: tuple = (),
) -> HoldIncrease:
    """How a call that holds OWN of all quotas of a binding increases its hold; `others` is what other calls hold."""
    held = {each.id: amount(others.get(each.id, 0)) + hold_of(each, OWN) for each in who.quotas}
    found = counters(who, used=used, held=held)
    current = {each.id: found[each.key_for("ann")] for each in who.quotas if each.id not in not_held}
    return increase_hold(
        *increase,
        who,
        admitted_via=admitted_via,
        own={each.id: hold_of(each, OWN) for each in who.quotas},
        current=current,
    )


@pytest.mark.parametrize(
    ("each", "used", "others", "increase", "output", "verdict"),
    [
        # tokens: limit 1000, of which the call itself holds 200
        pytest.param({"tokens": 1000}, 0, 0, (300, 1), 300, "ALLOW", id="more than enough is free"),
        pytest.param({"tokens": 1000}, 500, 0, (300, 1), 300, "ALLOW", id="to the last token"),
        pytest.param({"tokens": 1000}, 501, 0, (300, 299), 299, "ALLOW", id="a part, and enough to go on"),
        pytest.param({"tokens": 1000}, 501, 0, (300, 300), 299, "EXHAUSTED", id="a part, and not enough to go on"),
        pytest.param({"tokens": 1000}, 800, 0, (300, 1), 0, "EXHAUSTED", id="nothing is left"),
        pytest.param({"tokens": 1000}, 800, 0, (300, 0), 0, "ALLOW", id="nothing is left and nothing is needed"),
        pytest.param({"tokens": 1000}, 5000, 0, (300, 1), 0, "EXHAUSTED", id="the limit was lowered below the usage"),
        pytest.param({"tokens": 1000}, 0, 501, (300, 299), 299, "ALLOW", id="others hold some, enough is left"),
        pytest.param({"tokens": 1000}, 0, 501, (300, 300), 299, "BUSY", id="others hold what is needed"),
        pytest.param({"tokens": 1000}, 0, 800, (300, 1), 0, "BUSY", id="others hold everything"),
        pytest.param({"tokens": 1000}, 500, 300, (400, 301), 0, "EXHAUSTED", id="others could not free enough"),
        pytest.param({"tokens": 1000}, 500, 300, (400, 300), 0, "BUSY", id="others could just free enough"),
        pytest.param({"tokens": 1000}, 0, 0, (0, 0), 0, "ALLOW", id="nothing is wanted"),
        # the other limits
        pytest.param({"tokens": 1000, "overdraft": 50}, 800, 0, (300, 50), 50, "ALLOW", id="overdraft"),
        pytest.param({"tokens": 1000, "overdraft": 50}, 800, 0, (300, 51), 50, "EXHAUSTED", id="overdraft: no more"),
        pytest.param({"output_tokens": 400}, Amount(999, 100, 1), 0, (300, 1), 200, "ALLOW", id="output"),
        pytest.param({"output_tokens": 400}, 0, Amount(0, 300, 1), (300, 1), 0, "BUSY", id="output: busy"),
        pytest.param({"output_tokens": 400, "overdraft": 50}, 0, 0, (999, 1), 350, "ALLOW", id="output: overdraft"),
        pytest.param({"tokens": 1000, "output_tokens": 150}, 0, 0, (300, 1), 50, "ALLOW", id="the tightest"),
        pytest.param({"input_tokens": 100}, 999, 999, (300, 300), 300, "ALLOW", id="input does not limit answers"),
        pytest.param({"requests": 1}, 9, 9, (300, 300), 300, "ALLOW", id="requests do not limit answers"),
        pytest.param({"tokens": 10, "enforce": "after"}, 99, 99, (300, 300), 300, "ALLOW", id="after limits nothing"),
    ],
)
def test_a_hold_increases_by_what_is_available(each, used, others, increase, output, verdict):
    """If that is too little to go on, waiting helps (BUSY) or does not (EXHAUSTED)."""
    daily = quota("staff/daily", **each)
    result = increased(
        binding([daily]), increase, admitted_via="staff", used={daily.id: used}, others={daily.id: others}
    )
    assert (result.output, result.verdict, result.not_increased) == (output, Verdict[verdict], ())
    assert [(hold.quota, hold.amount) for hold in result.holds] == [(daily, hold_of(daily, Amount(output=output)))]


LAB_OUT = quota("lab/output", output_tokens=500)
TEAM_SHARED = quota("team/pot", tokens=1000, shared=True)
EVERYONES = quota("everyone/tokens", tokens=2000)
SMALL_SHADOW = quota("staff/shadow", tokens=100, enforce="shadow")
SMALL_AFTER = quota("lab/after", tokens=100, enforce="after")


@pytest.mark.parametrize(
    ("who", "admitted_via", "used", "others", "output", "verdict", "increases", "not_increased"),
    [
        pytest.param(binding([DAILY], always=[EVERYONES]), "staff", {EVERYONES.id: 1600}, {}, 200, "ALLOW",
                     {EVERYONES.id, DAILY.id}, set(), id="the tightest quota limits"),
        pytest.param(binding([DAILY], always=[EVERYONES]), "staff", {EVERYONES.id: 1800}, {DAILY.id: 800}, 0,
                     "EXHAUSTED", {EVERYONES.id, DAILY.id}, set(), id="exhausted is worse than busy"),
        pytest.param(binding([DAILY], always=[EVERYONES]), "staff", {}, {EVERYONES.id: 1800}, 0, "BUSY",
                     {EVERYONES.id, DAILY.id}, set(), id="the quota of everyone is held"),
        # additional quotas
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {}, {}, 300, "ALLOW",
                     {DAILY.id, LAB_OUT.id}, set(), id="additional: increased too"),
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {LAB_OUT.id: Amount(0, 100, 1)}, {}, 300, "ALLOW",
                     {DAILY.id, LAB_OUT.id}, set(), id="additional: to the last token"),
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {LAB_OUT.id: Amount(0, 101, 1)}, {}, 300, "ALLOW",
                     {DAILY.id}, {LAB_OUT.id}, id="additional: left alone if it cannot carry the increase"),
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {}, {LAB_OUT.id: Amount(0, 101, 1)}, 300, "ALLOW",
                     {DAILY.id}, {LAB_OUT.id}, id="additional: the call does not wait for it"),
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {DAILY.id: 750, LAB_OUT.id: Amount(0, 350, 1)}, {}, 50,
                     "ALLOW", {DAILY.id, LAB_OUT.id}, set(), id="additional: carries the increase granted"),
        pytest.param(binding([LAB_OUT], [DAILY]), "staff", {LAB_OUT.id: Amount(0, 400, 1)}, {}, 300, "ALLOW",
                     {DAILY.id}, {LAB_OUT.id}, id="the group that admitted the call limits, not the first group"),
        pytest.param(binding([DAILY], [SMALL_AFTER]), "staff", {SMALL_AFTER.id: 100}, {}, 300, "ALLOW",
                     {DAILY.id, SMALL_AFTER.id}, set(), id="additional: after carries any increase"),
        pytest.param(binding([DAILY], shadows=[SMALL_SHADOW]), "staff", {SMALL_SHADOW.id: 900}, {}, 300, "ALLOW",
                     {DAILY.id, SMALL_SHADOW.id}, set(), id="a quota in shadow counts on above its limit"),
        # by the groups that admitted the call
        pytest.param(binding([TEAM_SHARED], [DAILY]), "team", {}, {TEAM_SHARED.id: 800}, 0, "BUSY",
                     {TEAM_SHARED.id, DAILY.id}, set(), id="the group of a shared quota limits"),
        pytest.param(binding([DAILY], [LAB_OUT], combine="every_group"), "staff+lab", {LAB_OUT.id: Amount(0, 380, 1)},
                     {}, 20, "ALLOW", {DAILY.id, LAB_OUT.id}, set(), id="every_group: each group limits"),
        pytest.param(binding([DAILY], group_quotas("admins")), "admins", {}, {DAILY.id: 800}, 300, "ALLOW",
                     set(), {DAILY.id}, id="unlimited: nothing limits"),
        pytest.param(binding([DAILY], group_quotas("admins"), always=[EVERYONES]), "admins", {EVERYONES.id: 1700},
                     {}, 100, "ALLOW", {EVERYONES.id, DAILY.id}, set(), id="unlimited: the quota of everyone limits"),
        pytest.param(binding(always=[EVERYONES]), "everyone", {EVERYONES.id: 1700}, {}, 100, "ALLOW",
                     {EVERYONES.id}, set(), id="only everyone"),
        pytest.param(binding(), "everyone", {}, {}, 300, "ALLOW", set(), set(), id="no quota at all"),
    ],
)  # fmt: skip
def test_only_the_quotas_that_admitted_a_call_limit_its_answer(
    who, admitted_via, used, others, output, verdict, increases, not_increased
):
    """A call asks for 300 more tokens and needs one. Additional quotas without room for them are left alone."""
    result = increased(who, (300, 1), admitted_via=admitted_via, used=used, others=others)
    assert (result.output, result.verdict) == (output, Verdict[verdict])
    assert {hold.quota.id for hold in result.holds} == increases
    assert {each.id for each in result.not_increased} == not_increased


def test_a_quota_that_the_call_does_not_hold_neither_limits_nor_increases():
    """It was left alone before, and is not charged again in the middle of an answer."""
    who = binding([DAILY], [LAB_OUT])
    result = increased(who, (300, 300), admitted_via="staff", used={}, others={}, not_held=(LAB_OUT.id,))
    assert [hold.quota.id for hold in result.holds] == [DAILY.id]
    result = increased(who, (300, 300), admitted_via="lab", used={}, others={LAB_OUT.id: 999}, not_held=(LAB_OUT.id,))
    assert (result.output, result.verdict, [hold.quota.id for hold in result.holds]) == (
        300,
        Verdict.ALLOW,
        [DAILY.id],
    )


def test_an_increase_of_nothing_leaves_a_quota_that_is_over_its_limit():
    """Nothing is added to it, so there is no reason to free what the call holds of it."""
    who = binding([DAILY], [LAB_OUT])
    result = increased(who, (0, 0), admitted_via="staff", used={LAB_OUT.id: 999}, others={})
    assert (result.verdict, result.not_increased) == (Verdict.ALLOW, ())
    assert {hold.quota.id for hold in result.holds} == {DAILY.id, LAB_OUT.id}


# ----------------------------------------------------------------------------------------------- which counters count


def test_counters_of_another_user_and_of_a_closed_window_do_not_count():
    """Neither bob's usage nor yesterday's refuses ann today."""
    bobs = counters(binding([DAILY], user="bob"), used={DAILY.id: 1000})
    yesterdays = counters(binding([DAILY]), used={DAILY.id: 1000}, held={DAILY.id: 500}, opened=NOON - DAY)
    for others in (bobs, yesterdays):
        [hold] = decide(call(1, 9), binding([DAILY]), others, NOON).holds
        assert (hold.counter.used, hold.counter.held) == (Amount(), Amount())
        assert hold.counter.window == Window(MIDNIGHT - DAY, MIDNIGHT)


# ----------------------------------------------------------------------------------------------- all rules, at random


def current_counters(who: Binding, found: Counters, now: int) -> dict[str, Counter]:
    return {each.id: counter_at(now, each, found.get(each.key_for(who.user))) for each in who.quotas}


MEASURES_OF = {
    Uses.NOTHING: [],
    Uses.REQUEST: ["requests"],
    Uses.INPUT: ["requests", "input_tokens", "tokens"],
    Uses.OUTPUT: ["requests", "output_tokens", "tokens"],
    Uses.INPUT_AND_OUTPUT: ["requests", "input_tokens", "output_tokens", "tokens"],
}


def applies(limit: Limit, demand: Demand) -> bool:
    return limit.measure in MEASURES_OF[demand.uses]


def overdraft_of(each: Quota, limit: Limit) -> int:
    """How far a hold may exceed a limit."""
    return each.overdraft if limit.measure in ("tokens", "output_tokens") else 0


def is_free(each: Quota, counter: Counter, demand: Demand, output: int) -> bool:
    """Whether the unused part has room for the smallest answer, and with the overdraft for one of `output` tokens."""
    least, whole = Amount(demand.input, demand.smallest, 1), Amount(demand.input, output, 1)
    for limit in each.limits:
        left = limit.maximum - counter.used.of(limit.measure)
        is_too_large = least.of(limit.measure) > left or whole.of(limit.measure) > left + overdraft_of(each, limit)
        if applies(limit, demand) and (left <= 0 or (is_too_large and each.enforce != "after")):
            return False
    return True


def is_available(each: Quota, counter: Counter, demand: Demand, hold: Amount) -> bool:
    """Whether a hold fits beside what other calls hold."""
    taken = counter.used + counter.held + hold
    return each.enforce == "after" or all(
        taken.of(limit.measure) <= limit.maximum + overdraft_of(each, limit)
        for limit in each.limits
        if applies(limit, demand)
    )


def held_for(quotas: tuple[Quota, ...], current: Mapping[str, Counter], demand: Demand, output: int) -> Amount:
    """What a call holds: the first part of its answer, and as much hidden input as is free below each limit."""
    input_tokens = demand.input
    for more in range(demand.hidden_input + 1):
        whole = Amount(demand.input + more, output, 1)
        if more == 0 or all(
            current[each.id].used.of(limit.measure) + whole.of(limit.measure) <= limit.maximum
            for each in quotas
            for limit in each.limits
            if each.enforce != "after" and limit.measure in ("tokens", "input_tokens")
        ):
            input_tokens = whole.input
    return Amount(input_tokens, min(output, demand.initial_hold), 1)


def lowered(demand: Demand, quotas: tuple[Quota, ...]) -> Demand:
    """The call as these quotas together take it: its smallest answer is at most a tenth of their smallest limit."""
    limits = [
        limit.maximum
        for each in quotas
        for limit in each.limits
        if each.enforce != "after" and limit.measure in ("tokens", "output_tokens")
    ]
    if not limits:
        return demand
    smallest = min(demand.smallest, demand.fixed + max(demand.floor, min(limits) // 10))
    begins_small = demand.grows and smallest < demand.smallest < demand.output_maximum
    hold = min(demand.initial_hold, smallest) if begins_small else demand.initial_hold
    return replace(demand, smallest=smallest, initial_hold=hold)


def by_brute_force(demand: Demand, who: Binding, current: Mapping[str, Counter]) -> tuple[str, str, int]:
    """The rules in their simplest form: every length of answer is tried with every group."""
    alternatives = [(one.group, one.quotas) for one in who.groups] or [("everyone", ())]
    if who.combine == "every_group" and who.groups:
        alternatives = [
            ("+".join(name for name, _ in alternatives), tuple(each for _, quotas in alternatives for each in quotas))
        ]
    alternatives = [(name, (*who.always, *quotas)) for name, quotas in alternatives]

    def has_free(quotas: tuple[Quota, ...], output: int) -> bool:
        return all(is_free(each, current[each.id], lowered(demand, quotas), output) for each in quotas)

    def has_room(quotas: tuple[Quota, ...], output: int) -> bool:
        hold = held_for(quotas, current, lowered(demand, quotas), output)
        return has_free(quotas, output) and all(is_available(each, current[each.id], demand, hold) for each in quotas)

    for output in range(demand.output_maximum, -1, -1):
        for name, quotas in alternatives:
            if has_room(quotas, output):
                return ("admitted", name, output)
        if any(has_free(quotas, output) for _, quotas in alternatives):
            return ("busy", "", 0)
    possible = any(
        all(could_ever_fit(each, lowered(demand, quotas)) for each in quotas) for _, quotas in alternatives
    )
    return ("exhausted" if possible else "never", "", 0)


def could_ever_fit(each: Quota, demand: Demand) -> bool:
    """Whether the smallest answer is within its limits; a limit of 0 is a switch that is off, not too small."""
    least = Amount(demand.input, demand.smallest, 1)
    return each.enforce == "after" or all(
        least.of(limit.measure) <= limit.maximum or limit.maximum == 0
        for limit in each.limits
        if applies(limit, demand)
    )


def longest_output(decision: Admitted, demand: Demand) -> int:
    """The longest answer that the quotas have room for; if nothing bounds it, the usual one."""
    return demand.output_maximum if decision.maximum is None else decision.maximum


@st.composite
def situations(
    draw: st.DrawFn, *, held: bool = True, hidden_input: bool = True, is_lowered: bool = True
) -> tuple[Demand, Binding, dict[tuple[str, str], Counter]]:
    """A call, the quotas that bind it, and their counters."""
    who = draw(bindings())
    demand = draw(demands(hidden_input=hidden_input, lowered=is_lowered))
    return demand, who, draw(counters_of(who, held=held))


@given(situations())
def test_decisions_are_those_that_brute_force_finds(situation):
    """The same verdict, group, length of answer and hold as by trying every length with every group."""
    demand, who, found = situation
    decision, current = decide(demand, who, found, NOON), current_counters(who, found, NOON)
    verdict, admitted_via, output = by_brute_force(demand, who, current)
    assert summary(decision)[0] == verdict
    if isinstance(decision, Admitted):
        alternative = next(each for each in who.alternatives() if each.group == admitted_via)
        assert (decision.admitted_via, longest_output(decision, demand)) == (admitted_via, output)
        asked = lowered(demand, alternative.quotas)
        assert decision.hold == held_for(alternative.quotas, current, asked, output)
        assert (decision.maximum is None) is (demand.is_unbounded and output == demand.output_maximum)


@given(situations())
def test_an_admitted_call_never_exceeds_a_quota_that_it_is_charged_to(situation):
    """In an exact quota `used + held` stays within the limit plus the overdraft."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, NotAdmitted):
        return
    [alternative] = [each for each in who.alternatives() if each.group == decision.admitted_via]
    asked = lowered(demand, alternative.quotas)
    assert asked.smallest <= longest_output(decision, demand) <= demand.output_maximum
    assert decision.hold.output == min(asked.initial_hold, longest_output(decision, demand))
    assert (decision.capped_by is None) is (longest_output(decision, demand) == demand.output_maximum)
    for hold in decision.holds:
        counter = hold.counter
        assert counter == counter_at(NOON, hold.quota, found.get(hold.quota.key_for(who.user)))
        for limit in hold.quota.limits:
            taken = counter.used + counter.held + hold.amount
            if hold.quota.enforce == "exact" and applies(limit, demand):
                assert taken.of(limit.measure) <= limit.maximum + overdraft_of(hold.quota, limit)
            if hold.quota.enforce != "shadow" and applies(limit, demand):
                assert counter.used.of(limit.measure) < limit.maximum


@given(situations())
def test_a_call_is_charged_to_everyone_its_group_and_additional_quotas_that_can_carry_it(situation):
    """Each quota once; a shared one only through its group; none that cannot carry the whole hold."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, NotAdmitted):
        return
    current, hold = current_counters(who, found, NOON), decision.hold
    admitted_via = {
        each.id for one in who.groups if one.group in decision.admitted_via.split("+") for each in one.quotas
    } | {each.id for each in who.always}

    def can_carry_it(each: Quota) -> bool:
        whole = replace(demand, smallest=hold.output)
        return is_free(each, current[each.id], whole, hold.output) and is_available(
            each, current[each.id], demand, hold
        )

    expected = {
        each.id
        for each in (*who.always, *(each for one in who.groups for each in one.quotas))
        if any(applies(limit, demand) for limit in each.limits)
        and (each.id in admitted_via or (not each.shared and can_carry_it(each)))
    }
    charged = [hold.quota.id for hold in decision.holds if hold.quota.enforce != "shadow"]
    assert sorted(charged) == sorted(expected)


@given(situations())
def test_the_reset_of_a_refusal_is_true_and_the_earliest(situation):
    """At that instant no quota is used up any more; one millisecond earlier one still is."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, Admitted) or decision.verdict is not Verdict.EXHAUSTED:
        assert isinstance(decision, Admitted) or decision.admissible_at is None
        return
    if decision.admissible_at is None:  # a limit of 0, so the call is never admitted
        assert summary(decide(demand, who, found, NOON + 400 * DAY))[0] == "exhausted"
        return
    assert decision.admissible_at > NOON
    assert summary(decide(demand, who, found, decision.admissible_at))[0] in ("admitted", "busy")
    assert summary(decide(demand, who, found, decision.admissible_at - 1))[0] == "exhausted"


@given(situations(held=False))
def test_with_no_call_in_flight_none_waits_and_the_reset_admits(situation):
    """No call is refused because of other calls if there are none."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    assert summary(decision)[0] != "busy"
    if isinstance(decision, NotAdmitted) and decision.admissible_at is not None:
        assert isinstance(decide(demand, who, found, decision.admissible_at), Admitted)


@given(situations(hidden_input=False, is_lowered=False), st.data())
def test_with_more_free_no_call_is_refused_that_was_admitted(situation, data):
    """With less used, less held or larger limits, the worst for an admitted call is to wait for a longer answer.

    This does not apply to a smallest answer that is lowered: if the smallest limit becomes larger, a call needs more
    of the other quotas too.
    """
    demand, who, found = situation
    before = decide(demand, who, found, NOON)
    freer = {key: replace(counter, used=data.draw(less(counter.used))) for key, counter in found.items()}
    freer = {key: replace(counter, held=data.draw(less(counter.held))) for key, counter in freer.items()}
    who = replace(
        who,
        always=tuple(data.draw(larger(each)) for each in who.always),
        groups=tuple(
            GroupQuotas(one.group, tuple(data.draw(larger(each)) for each in one.quotas)) for one in who.groups
        ),
    )
    after = decide(demand, who, freer, NOON)
    if isinstance(before, NotAdmitted):
        assert isinstance(after, Admitted) or after.verdict <= before.verdict
    elif before.capped_by is None or not any(counter.held for counter in freer.values()):
        assert isinstance(after, Admitted)
        assert longest_output(after, demand) >= longest_output(before, demand)
    else:
        assert isinstance(after, Admitted) or after.verdict is Verdict.BUSY


def less(of: Amount) -> st.SearchStrategy[Amount]:
    """Any smaller or equal amount. It is not empty unless `of` is, because an empty window would not be open."""
    return st.builds(
        Amount, st.integers(0, of.input), st.integers(0, of.output), st.integers(min(1, of.requests), of.requests)
    )


@st.composite
def larger(draw: st.DrawFn, each: Quota) -> Quota:
    """The same quota with larger or equal limits and overdraft; a limit of 0 stays 0."""
    raised = [(limit, draw(st.sampled_from([0, 0, 1, 20])) if limit.maximum else 0) for limit in each.limits]
    overdraft = each.overdraft + draw(st.sampled_from([0, 0, 5]))
    limits = tuple(replace(limit, maximum=limit.maximum + more) for limit, more in raised)
    return replace(each, limits=limits, overdraft=overdraft)


@given(situations())
def test_quotas_in_shadow_change_nothing_but_their_own_counters(situation):
    """With and without them the decision is the same, and so are the charges to all other quotas."""
    demand, who, found = situation
    with_shadows, without = decide(demand, who, found, NOON), decide(demand, replace(who, shadows=()), found, NOON)
    if isinstance(with_shadows, Admitted):
        others = tuple(hold for hold in with_shadows.holds if hold.quota.enforce != "shadow")
        with_shadows = replace(with_shadows, holds=others, would_refuse=())
    assert with_shadows == without


@given(situations(hidden_input=False), st.integers(0, 60))
def test_a_call_decided_by_its_bytes_would_not_gain_from_a_count(situation, count):
    """If no count was needed, a count would not have admitted the call sooner or with a longer answer."""
    demand, who, found = situation
    by_bytes = decide(estimated(demand), who, found, NOON)
    if isinstance(by_bytes, NeedsCount):
        return
    counted = decide(replace(demand, input=min(demand.input, count)), who, found, NOON)
    assert by_bytes == decide(demand, who, found, NOON)
    assert summary(by_bytes)[0] == summary(counted)[0]
    if isinstance(by_bytes, Admitted):
        assert longest_output(by_bytes, demand) == longest_output(counted, demand)


@given(situations(), st.integers(0, 60), st.integers(0, 60))
def test_increases_are_those_that_brute_force_finds(situation, wanted, least):
    """By trying every number of tokens; and no quota that is increased exceeds its limit plus overdraft."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, NotAdmitted):
        return
    current = {one.quota.id: replace(one.counter, held=one.counter.held + one.amount) for one in decision.holds}
    own = {one.quota.id: one.amount for one in decision.holds}
    increase = (wanted, min(wanted, least))
    result = increase_hold(*increase, who, admitted_via=decision.admitted_via, own=own, current=current)

    alternative = next(each for each in who.alternatives() if each.group == decision.admitted_via)
    limiting = [each for each in alternative.quotas if each.id in current]

    def has_room(quotas: list[Quota], output: int, held: Mapping[str, Amount]) -> bool:
        return output == 0 or all(
            (current[each.id].used + held[each.id] + Amount(output=output)).of(limit.measure)
            <= limit.maximum + overdraft_of(each, limit)
            for each in quotas
            for limit in each.limits
            if each.enforce == "exact" and limit.measure in ("tokens", "output_tokens")
        )

    held = {quota_id: counter.held for quota_id, counter in current.items()}
    assert result.output == max(n for n in range(wanted + 1) if has_room(limiting, n, held))
    if result.output >= increase[1]:
        assert result.verdict is Verdict.ALLOW
    else:
        waiting_helps = has_room(limiting, increase[1], own)
        assert result.verdict is (Verdict.BUSY if waiting_helps else Verdict.EXHAUSTED)
    not_limiting = [each for each in who.quotas if each.id in current and each not in limiting]
    carrying = [each for each in not_limiting if has_room([each], result.output, held)]
    assert {hold.quota.id for hold in result.holds} == {each.id for each in (*limiting, *carrying)}
    assert {each.id for each in result.not_increased} == {each.id for each in not_limiting} - {
        each.id for each in carrying
    }
    for hold in result.holds:
        assert hold.counter == current[hold.quota.id]
        assert hold.amount == (NO_AMOUNT if hold.quota.enforce == "after" else Amount(output=result.output))


def test_a_refusal_names_each_quota_once():
    """Also if two of its limits refuse the call."""
    who = binding([quota("staff/daily", tokens=5, requests=1)])
    refused = decide(call(1, 1), who, counters(who, used={"staff/daily": Amount(5, 0, 1)}), NOON)
    assert isinstance(refused, NotAdmitted)
    assert len(refused.blocks) == 2
    assert (refused.verdict.word, refused.refused_by) == ("exhausted", ("staff/daily",))


# ----------------------------------------------------------------------------------- smallest answers in small quotas

# Calls that state no maximum.
USUAL = call(10, 4096, 1024)
USUAL = replace(USUAL, fixed=0, floor=1)
STREAM = replace(USUAL, initial_hold=1024, grows=True)


@pytest.mark.parametrize(
    ("limits", "demand", "used", "expected"),
    [
        ({"tokens": 1000}, USUAL, 0, ("admitted", 990)),
        ({"tokens": 1000}, USUAL, 890, ("admitted", 100)),
        ({"tokens": 1000}, USUAL, 891, ("exhausted", 110)),
        ({"tokens": 10_240}, USUAL, 9207, ("exhausted", 1034)),
        ({"tokens": 10_230}, USUAL, 9197, ("admitted", 1023)),
        ({"tokens": 12}, USUAL, 0, ("admitted", 2)),
        ({"tokens": 11}, USUAL, 0, ("admitted", 1)),
        ({"tokens": 10}, USUAL, 0, ("never", 11)),
        ({"output_tokens": 9}, USUAL, 0, ("admitted", 9)),
        ({"tokens": 100_000, "output_tokens": 500}, USUAL, 99_940, ("admitted", 50)),
        ({"tokens": 100_000, "output_tokens": 500}, USUAL, 99_941, ("exhausted", 60)),
        ({"input_tokens": 500, "tokens": 100_000}, USUAL, 0, ("admitted", 4096)),
        ({"tokens": 100}, replace(USUAL, smallest=1024 * 20, floor=20), 0, ("admitted", 90)),
        ({"tokens": 100}, replace(USUAL, smallest=1024 * 91, floor=91), 0, ("never", 101)),
        ({"tokens": 3000}, replace(USUAL, smallest=3024, fixed=2000), 0, ("admitted", 2990)),
        ({"tokens": 3000}, replace(USUAL, smallest=3024, fixed=2000), 691, ("exhausted", 2310)),
        ({"tokens": 1000}, replace(USUAL, fixed=TOKENS_MAX), 0, ("never", 1034)),
        ({"tokens": 1000}, call(10, 40, 40), 951, ("exhausted", 50)),
    ],
)
def test_the_smallest_answer_is_at_most_a_tenth_of_the_smallest_limit(limits, demand, used, expected):
    """But one token of each choice or more, besides a reasoning budget. A configured smallest answer is the same."""
    who = binding([quota("staff/daily", **limits)])
    decision = decide(demand, who, counters(who, used={"staff/daily": used}), NOON)
    if isinstance(decision, Admitted):
        assert ("admitted", decision.maximum) == expected
    else:
        assert (decision.verdict.word, decision.blocks[0].needed) == expected


def test_all_quotas_of_the_alternative_lower_it_and_no_other():
    """Those of everyone count too; one with `enforce: after`, one in shadow and one of another group do not."""
    small = {"tokens": 200}
    large, always = quota("staff/daily", tokens=100_000), quota("everyone/day", **small)
    found = {large.id: 99_950}
    lowering = [binding([large], always=[always]), binding([large, quota("staff/hourly", **small)])]
    not_lowering = [
        binding([large]),
        binding([large, quota("staff/after", enforce="after", **small)]),
        binding([large], shadows=[quota("staff/new", enforce="shadow", **small)]),
        binding([large], [quota("lab/used", tokens=200)]),
    ]
    for who in lowering:
        assert isinstance(decide(USUAL, who, counters(who, used=found), NOON), Admitted)
    for who in not_lowering:
        decision = decide(USUAL, who, counters(who, used={**found, "lab/used": 200}), NOON)
        assert isinstance(decision, NotAdmitted)
        assert decision.refused_by in (("staff/daily",), ("lab/used",))


def test_a_stream_begins_with_the_lowered_answer_and_a_whole_answer_holds_all():
    """So ten streams can begin in a small quota. A whole answer cannot grow, so it holds its maximum."""
    who = binding([quota("staff/daily", tokens=1000)])
    assert decide(STREAM, who, {}, NOON).hold == Amount(10, 100, 1)
    assert decide(USUAL, who, {}, NOON).hold == Amount(10, 990, 1)
    short = replace(USUAL, output_maximum=300, smallest=300, initial_hold=300)
    assert decide(short, who, {}, NOON).hold == Amount(10, 300, 1)
    assert decide(replace(short, grows=True), who, {}, NOON).hold == Amount(10, 300, 1)


def test_a_grant_does_not_raise_the_smallest_answer():
    """Otherwise the end of a grant could admit a call that was refused while it ran."""
    who = replace(
        binding([quota("staff/daily", tokens=100_000), quota("staff/hourly", tokens=200)]),
        grants={"staff/hourly": (Grant("g", "staff/hourly", None, Measure.TOKENS, 5000, NOON + HOUR),)},
    )
    decision = decide(USUAL, who, counters(who, used={"staff/daily": 99_970}), NOON)
    assert isinstance(decision, Admitted)
    assert decision.maximum == 20


@pytest.mark.parametrize(
    ("limits", "demand", "is_input"),
    [
        ({"tokens": 1000}, call(901, 400), True),
        ({"tokens": 1000}, call(900, 400), False),
        ({"tokens": 1000}, call(901, 100), True),
        ({"tokens": 1000}, call(950, 60), True),
        ({"tokens": 1000}, call(600, 401), False),
        ({"tokens": 1000}, call(900, 101), False),
        ({"tokens": 1000}, call(999, 1001), False),  # a shorter input would not be enough
        ({"tokens": 5}, call(5, 1), True),
        ({"input_tokens": 1000}, call(1001, 1), True),
        ({"output_tokens": 1000}, call(999, 1001), False),
        ({"tokens": 1000}, call(1001, uses=Uses.INPUT), True),
    ],
)
def test_a_call_that_can_never_fit_is_too_large_in_its_input_or_in_its_answer(limits, demand, is_input):
    """An input is too large if it takes more than nine tenths of the limit and the answer alone would fit."""
    who = binding([quota("staff/daily", **limits)])
    decision = decide(demand, who, {}, NOON)
    assert isinstance(decision, NotAdmitted)
    assert decision.verdict is Verdict.NEVER
    [block] = decision.blocks
    assert block.is_input_too_large is is_input
