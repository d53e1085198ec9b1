"""Which calls the quotas let in, what those hold of which counter, how far that grows, and when others may come back.

Scenarios are played on Tuesday the 24th of November 2026 at noon, UTC, by ann. In a table, a bare number of tokens
used or held means that many input tokens, and one request.
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
from proxy.policy.amounts import NOTHING, Amount
from proxy.policy.quota import Binding, Counter, Demand, GroupQuotas, Limit, Quota, counter_at
from proxy.policy.windows import Window
from tests.builders import DAY, NOON, amount, binding, call, counters, estimated, group_quotas, instant, quota
from tests.random_rules import bindings, counters_of, demands

ONE_OCLOCK = instant("2026-11-24 13:00")
SIX_OCLOCK = instant("2026-11-24 18:00")
MIDNIGHT = instant("2026-11-25 00:00")

DAILY = quota("staff/daily", tokens=1000)


# -------------------------------------------------------------------------------------------- the words of the tables


def room(admitted_via: str, output: int, *charged: str) -> tuple[object, ...]:
    """Let in through a group, for an answer of at most `output`, held of and charged to these quotas."""
    return ("room", admitted_via, output, set(charged))


def busy(*quotas: str) -> tuple[object, ...]:
    """Calls in flight hold what is free of these quotas."""
    return ("busy", set(quotas), None)


def exhausted(*quotas: str, until: int | None) -> tuple[object, ...]:
    """These are used up, and the call would be let in at `until`."""
    return ("exhausted", set(quotas), until)


def never(*quotas: str) -> tuple[object, ...]:
    """The call is larger than these ever allow."""
    return ("never", set(quotas), None)


def told(decision: Admitted | NotAdmitted | NeedsCount) -> tuple[object, ...]:
    """A decision in the words above."""
    if isinstance(decision, Admitted):
        return room(decision.admitted_via, decision.hold.output, *(hold.quota.id for hold in decision.holds))
    if isinstance(decision, NeedsCount):
        return ("uncounted",)
    return (decision.verdict.name.lower(), {block.quota.id for block in decision.blocks}, decision.admissible_at)


def played(who: Binding, demand: Demand, used: dict, held: dict) -> Admitted | NotAdmitted | NeedsCount:
    return decide(demand, who, counters(who, used=used, held=held), NOON)


# ---------------------------------------------------------------------------------------------- the limits of a quota

ONE_CALL = Amount(requests=1)


@pytest.mark.parametrize(
    ("limits", "used", "held", "demand", "expected"),
    [
        # tokens: limit 1000
        pytest.param({"tokens": 1000}, 300, 0, call(100, 400), 400, id="room to spare"),
        pytest.param({"tokens": 500}, 0, 0, call(100, 400), 400, id="fits to the last token"),
        pytest.param({"tokens": 499}, 0, 0, call(100, 400, 1), 399, id="one short: the answer is one shorter"),
        pytest.param({"tokens": 1000}, 600, 0, call(100, 400, 1), 300, id="the answer is what is free"),
        pytest.param({"tokens": 1000}, 500, 0, call(100, 4000, 400), 400, id="the smallest answer just fits"),
        pytest.param({"tokens": 1000}, 501, 0, call(100, 4000, 400), "exhausted", id="the smallest is one too large"),
        pytest.param({"tokens": 1000}, 300, 200, call(100, 400), 400, id="held, but not in the way"),
        pytest.param({"tokens": 1000}, 300, 201, call(100, 400), "busy", id="held, and one too many"),
        pytest.param({"tokens": 1000}, 0, 600, call(100, 4000, 1), "busy", id="no shorter answer for what is held"),
        pytest.param({"tokens": 1000}, 0, 1000, call(1, 1), "busy", id="all of it is held"),
        pytest.param({"tokens": 1000}, 950, 50, call(51, 1), "exhausted", id="what is held will not help"),
        pytest.param({"tokens": 1000}, 999, 0, call(0, 1), 1, id="the last token"),
        pytest.param({"tokens": 1000}, 999, 0, call(1), 0, id="the last token, as input"),
        pytest.param({"tokens": 1000}, 1000, 0, call(0, 1), "exhausted", id="at the limit means out"),
        pytest.param({"tokens": 1000}, 1000, 0, call(), "exhausted", id="at the limit means out, for nothing too"),
        pytest.param({"tokens": 1000}, 5000, 0, call(1, 1), "exhausted", id="the limit was lowered below the use"),
        pytest.param({"tokens": 6000}, 5000, 0, call(1, 1), 1, id="and raised again"),
        pytest.param({"tokens": 1000}, 0, 0, call(600, 400, 400), 400, id="exactly as large as the limit"),
        pytest.param({"tokens": 1000}, 0, 0, call(600, 401, 401), "never", id="one larger than the limit"),
        pytest.param({"tokens": 1000}, 1000, 0, call(600, 401, 401), "never", id="never comes before exhausted"),
        pytest.param({"tokens": 1000}, 0, 1000, call(1001), "never", id="never comes before busy"),
        pytest.param({"tokens": 1000}, 0, 0, call(100, 10**12, 1), 900, id="asks for everything there is"),
        # input and output apart
        pytest.param({"input_tokens": 100}, 0, 0, call(100, 10**6), 10**6, id="input alone: any answer"),
        pytest.param({"input_tokens": 100}, 0, 0, call(101, 1), "never", id="input alone: too large"),
        pytest.param({"input_tokens": 100}, 50, 0, call(50, 9), 9, id="input alone: the last of it"),
        pytest.param({"input_tokens": 100}, 50, 0, call(51, 9), "exhausted", id="input alone: used up"),
        pytest.param({"input_tokens": 100}, 50, 1, call(50, 9), "busy", id="input alone: held"),
        pytest.param({"output_tokens": 400}, 10**6, 10**6, call(10**6, 400), 400, id="output alone: any input"),
        pytest.param({"output_tokens": 400}, Amount(0, 100, 1), 0, call(9, 400, 1), 300, id="output alone: shorter"),
        pytest.param({"output_tokens": 400}, Amount(0, 400, 1), 0, call(9, 1), "exhausted", id="output alone: out"),
        pytest.param({"output_tokens": 400}, 0, Amount(0, 1, 1), call(9, 400), "busy", id="output alone: held"),
        pytest.param({"output_tokens": 400}, 0, 0, call(9, 401, 401), "never", id="output alone: too long"),
        pytest.param(
            {"input_tokens": 100, "output_tokens": 40}, 0, 0, call(100, 90, 1), 40, id="both: each by itself"
        ),
        pytest.param(
            {"input_tokens": 100, "output_tokens": 40}, 100, 0, call(1, 1), "exhausted", id="both: input out"
        ),
        pytest.param(
            {"input_tokens": 100, "output_tokens": 40},
            Amount(1, 40, 1),
            0,
            call(1, 1),
            "exhausted",
            id="both: output",
        ),
        pytest.param({"tokens": 100, "output_tokens": 90}, 0, 0, call(30, 90, 1), 70, id="the tighter one: tokens"),
        pytest.param({"tokens": 100, "output_tokens": 40}, 0, 0, call(30, 90, 1), 40, id="the tighter one: output"),
        # requests
        pytest.param({"requests": 2}, 10**6, 0, call(10**6, 10**6), 10**6, id="requests only: any size"),
        pytest.param({"requests": 2}, ONE_CALL + ONE_CALL, 0, call(), "exhausted", id="requests only: used up"),
        pytest.param({"requests": 2}, ONE_CALL, ONE_CALL, call(), "busy", id="requests only: the last is in flight"),
        pytest.param(
            {"requests": 2, "tokens": 9}, ONE_CALL, ONE_CALL, call(10), "never", id="the worst limit counts"
        ),
        pytest.param({"requests": 1, "tokens": 9}, ONE_CALL, 0, call(1), "exhausted", id="tokens left, no request"),
        # nothing at all
        pytest.param({"tokens": 0}, 0, 0, call(), "exhausted", id="tokens 0"),
        pytest.param({"tokens": 0}, 0, 0, call(100, 400), "exhausted", id="tokens 0: off, not too large a call"),
        pytest.param({"requests": 0}, 0, 0, call(1, 1), "exhausted", id="requests 0"),
        pytest.param({"input_tokens": 0}, 0, 0, call(0, 1), "exhausted", id="input 0, for an empty input too"),
        pytest.param({"output_tokens": 0}, 0, 0, call(1, 1), "exhausted", id="output 0"),
        # calls that generate nothing
        pytest.param({"output_tokens": 40}, Amount(0, 99, 1), 0, call(10), 0, id="embeddings: output doesn't bind"),
        pytest.param({"output_tokens": 0}, 0, 0, call(10), 0, id="embeddings: nor when it is 0"),
        pytest.param({"tokens": 10}, 0, 0, call(10), 0, id="embeddings: tokens do"),
        pytest.param({"tokens": 10}, 1, 0, call(10), "exhausted", id="embeddings: tokens used up"),
        pytest.param({"tokens": 10}, 0, 1, call(10), "busy", id="embeddings: tokens held"),
        pytest.param({"tokens": 10}, 0, 0, call(11), "never", id="embeddings: too large"),
        pytest.param(
            {"input_tokens": 10, "output_tokens": 5}, Amount(3, 5, 1), 0, call(7), 0, id="embeddings: output used up"
        ),
        pytest.param(
            {"input_tokens": 10, "output_tokens": 5}, Amount(4, 0, 1), 0, call(7), "exhausted", id="embeddings: input"
        ),
    ],
)
def test_an_exact_quota_weighs_each_limit_by_itself(limits, used, held, demand, expected):
    """`free = limit − used`, `available = free − held`; a number is the answer's length that is let in."""
    who = binding([quota("staff/daily", **limits)])
    decision = played(who, demand, {"staff/daily": used}, {"staff/daily": held})
    if isinstance(expected, int):
        assert isinstance(decision, Admitted)
        assert decision.hold == Amount(demand.input, expected, 1)
        assert (decision.capped_by is None) is (expected == demand.output_maximum)
    else:
        assert told(decision)[0] == expected


@pytest.mark.parametrize(
    ("limits", "used", "held", "is_let_in"),
    [
        pytest.param({"tokens": 1000}, 0, 0, True, id="fresh"),
        pytest.param({"tokens": 1000}, 999, 0, True, id="one token left is enough for any call"),
        pytest.param({"tokens": 1000}, 1000, 0, False, id="at the limit means out"),
        pytest.param({"tokens": 1000}, 9000, 0, False, id="over it"),
        pytest.param({"tokens": 1000}, 0, Amount(0, 0, 99), True, id="what others hold is nothing here"),
        pytest.param({"requests": 2}, Amount(0, 0, 1), Amount(0, 0, 9), True, id="a request left"),
        pytest.param({"requests": 2}, Amount(0, 0, 2), 0, False, id="no request left"),
        pytest.param({"requests": 2, "tokens": 9}, Amount(9, 0, 1), 0, False, id="each limit counts"),
        pytest.param({"tokens": 0}, 0, 0, False, id="a limit of 0"),
    ],
)
def test_enforce_after_checks_what_was_used_and_nothing_else(limits, used, held, is_let_in):
    """The classic way: no call is too large, none waits, no answer is shortened; it holds but its request's mark."""
    classic = quota("staff/daily", enforce="after", **limits)
    decision = played(binding([classic]), call(5000, 4000), {classic.id: used}, {classic.id: held})
    if is_let_in:
        assert told(decision) == room("staff", 4000, classic.id)
        assert [hold.amount for hold in decision.holds] == [Amount(requests=1)]
    else:
        assert told(decision)[:2] == ("exhausted", {classic.id})


def test_enforce_after_on_output_alone_lets_embeddings_by():
    """They generate nothing, so they neither meet that quota nor open its window."""
    classic = quota("staff/daily", enforce="after", output_tokens=10)
    who = binding([classic])
    assert told(played(who, call(5), {classic.id: Amount(0, 10, 1)}, {})) == room("staff", 0)
    assert told(played(who, call(5, 1), {classic.id: Amount(0, 10, 1)}, {})) == exhausted(classic.id, until=MIDNIGHT)


def test_a_block_says_what_was_needed_and_how_the_counter_stood():
    """Enough to tell "used up" from "300 left and this call may need 416"."""
    who = binding([DAILY])
    refused = played(who, call(100, 400, 316), {DAILY.id: 700}, {DAILY.id: 50})
    [block] = refused.blocks
    assert (block.verdict, block.needed, block.limit.maximum) == (Verdict.EXHAUSTED, 416, 1000)
    assert (block.counter.used, block.counter.held) == (Amount(700, 0, 1), Amount(50, 0, 1))


# ------------------------------------------------------------------------------ the length of an answer, and its hold


@pytest.mark.parametrize(
    ("limits", "used", "held", "demand", "expected"),
    [
        pytest.param({"tokens": 1000}, 0, 0, call(100, 400, 100, initial_hold=100), (100, 400), id="a part is held"),
        pytest.param(
            {"tokens": 1000}, 0, 0, call(100, 400, initial_hold=10**6), (400, 400), id="no more than it wants"
        ),
        pytest.param({"tokens": 1000}, 0, 0, call(100, 400, initial_hold=0), (0, 400), id="nothing to begin with"),
        pytest.param({"tokens": 1000}, 0, 800, call(100, 400, 100, initial_hold=100), (100, 400), id="the part fits"),
        pytest.param(
            {"tokens": 1000}, 0, 801, call(100, 400, 100, initial_hold=100), "busy", id="not even the part fits"
        ),
        pytest.param(
            {"tokens": 1000}, 700, 0, call(100, 400, 1, initial_hold=50), (50, 200), id="shorter than it wants"
        ),
        pytest.param(
            {"tokens": 1000}, 850, 0, call(100, 400, 1, initial_hold=100), (50, 50), id="shorter than its part"
        ),
        pytest.param(
            {"tokens": 1000}, 850, 1, call(100, 400, 1, initial_hold=50), "busy", id="the last part is held"
        ),
        pytest.param(
            {"tokens": 1000}, 0, 800, call(100, 4000, 100, initial_hold=100), (100, 900), id="others don't shorten"
        ),
        pytest.param(
            {"tokens": 1000}, 801, 0, call(100, 400, 100, initial_hold=1), "exhausted", id="the least must fit"
        ),
        pytest.param(
            {"tokens": 1000}, 0, 0, call(600, 401, 401, initial_hold=1), "never", id="the least is too large"
        ),
        pytest.param(
            {"output_tokens": 400}, 0, Amount(0, 350, 1), call(9, 400, 50, initial_hold=50), (50, 400), id="output"
        ),
        pytest.param(
            {"output_tokens": 400}, 0, Amount(0, 351, 1), call(9, 400, 50, initial_hold=50), "busy", id="held"
        ),
        # nobody says how long it may become
        pytest.param({"tokens": 1000}, 0, 0, call(100, 400, is_unbounded=True), (400, None), id="open: no maximum"),
        pytest.param(
            {"tokens": 1000},
            0,
            0,
            call(100, 400, 100, initial_hold=100, is_unbounded=True),
            (100, None),
            id="open: in parts",
        ),
        pytest.param({"tokens": 500}, 0, 0, call(100, 400, is_unbounded=True), (400, None), id="open: just fits"),
        pytest.param({"tokens": 499}, 0, 0, call(100, 400, 1, is_unbounded=True), (399, 399), id="open: but capped"),
        pytest.param({"requests": 1}, 0, 0, call(100, 400, is_unbounded=True), (400, None), id="open: requests only"),
    ],
)
def test_a_stream_holds_a_part_of_what_its_answer_may_become(limits, used, held, demand, expected):
    """(held, maximum): room is asked for the part alone; how long it may become is what is free, not available."""
    who = binding([quota("staff/daily", **limits)])
    decision = played(who, demand, {"staff/daily": used}, {"staff/daily": held})
    if isinstance(expected, str):
        assert told(decision)[0] == expected
        return
    output, maximum = expected
    assert (decision.hold, decision.maximum) == (Amount(demand.input, output, 1), maximum)
    assert (decision.capped_by is None) is (maximum in (None, demand.output_maximum))


def test_a_way_in_is_chosen_by_the_whole_answer_not_by_its_first_part():
    """Else a stream would come in where it soon meets the limit, with room elsewhere."""
    lab = quota("lab/6h", tokens=1000, per="6h")
    decision = played(binding([DAILY], [lab]), call(100, 400, 100, initial_hold=100), {DAILY.id: 601}, {})
    assert (decision.admitted_via, decision.maximum) == ("lab", 400)
    assert {hold.quota.id: hold.amount for hold in decision.holds} == dict.fromkeys(
        (lab.id, DAILY.id), Amount(100, 100, 1)
    )


@pytest.mark.parametrize(
    ("limits", "used", "held", "demand", "expected"),
    [
        pytest.param({"tokens": 1000}, 0, 0, call(100, 4000, 1), 1100, id="an answer may end in it"),
        pytest.param({"tokens": 1000}, 0, 0, call(100, 1100, 1), 1100, id="to the last token"),
        pytest.param({"tokens": 1000}, 999, 0, call(0, 4000, 1), 201, id="with one token left"),
        pytest.param({"tokens": 1000}, 1000, 0, call(0, 1), "exhausted", id="at the limit means out"),
        pytest.param({"tokens": 1000}, 1100, 0, call(0, 1), "exhausted", id="within it means out"),
        pytest.param({"tokens": 1000}, 900, 0, call(0, 4000, 100), 300, id="the least fits below the limit"),
        pytest.param({"tokens": 1000}, 900, 0, call(0, 4000, 101), "exhausted", id="the least must not need it"),
        pytest.param({"tokens": 1000}, 900, 0, call(101), "exhausted", id="an input must not need it"),
        pytest.param({"tokens": 1000}, 0, 0, call(1001), "never", id="nor make a call fit that never does"),
        pytest.param({"tokens": 1000}, 0, 200, call(100, 900), 900, id="held, but not in the way"),
        pytest.param({"tokens": 1000}, 0, 201, call(100, 900), "busy", id="held, and one too many"),
        pytest.param({"output_tokens": 400}, 0, 0, call(9, 4000, 1), 600, id="of output"),
        pytest.param({"output_tokens": 400}, Amount(0, 400, 1), 0, call(9, 1), "exhausted", id="of output: out"),
        pytest.param({"tokens": 1000, "output_tokens": 400}, 0, 0, call(500, 4000, 1), 600, id="of both"),
        pytest.param({"tokens": 1000, "input_tokens": 100}, 50, 0, call(51, 9), "exhausted", id="not of input"),
        pytest.param({"tokens": 1000, "input_tokens": 100}, 0, 0, call(101, 9), "never", id="not of input: never"),
        pytest.param({"tokens": 1000, "input_tokens": 100}, 50, 1, call(50, 9), "busy", id="not of input: held"),
        pytest.param({"tokens": 9, "requests": 1}, 0, Amount(0, 0, 1), call(1, 1), "busy", id="not of requests"),
        pytest.param({"tokens": 0}, 0, 0, call(0, 1), "exhausted", id="a limit of 0 is off all the same"),
    ],
)
def test_an_overdraft_of_200_lets_answers_end_and_nobody_in(limits, used, held, demand, expected):
    """Admission stops at the limit; what is held, and so charged, may reach limit + overdraft."""
    who = binding([quota("staff/daily", overdraft=200, **limits)])
    decision = played(who, demand, {"staff/daily": used}, {"staff/daily": held})
    if isinstance(expected, str):
        assert told(decision)[0] == expected
    else:
        assert (decision.hold, decision.maximum) == (Amount(demand.input, expected, 1), expected)
        assert (decision.capped_by is None) is (expected == demand.output_maximum)


@pytest.mark.parametrize(
    ("each", "used", "held", "demand", "hold"),
    [
        pytest.param(
            {"tokens": 1000}, 0, 0, call(100, 400, hidden_input=50), Amount(150, 400, 1), id="there is room"
        ),
        pytest.param(
            {"tokens": 1000}, 0, 0, call(100, 400, hidden_input=9999), Amount(600, 400, 1), id="all that is free"
        ),
        pytest.param(
            {"tokens": 1000}, 500, 0, call(100, 400, hidden_input=50), Amount(100, 400, 1), id="none is free"
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
            id="beside the whole answer, also where that is held in parts",
        ),
        pytest.param({"tokens": 1000}, 0, 1, call(100, 400, hidden_input=9999), None, id="free, but held: it waits"),
        pytest.param(
            {"tokens": 1000}, 0, 450, call(100, 400, hidden_input=50), Amount(150, 400, 1), id="not in the way"
        ),
        pytest.param(
            {"input_tokens": 300}, 0, 0, call(100, 400, hidden_input=9999), Amount(300, 400, 1), id="input alone"
        ),
        pytest.param(
            {"output_tokens": 400}, 0, 0, call(100, 400, hidden_input=50), Amount(150, 400, 1), id="output alone"
        ),
        pytest.param(
            {"requests": 1}, 0, 0, call(100, 400, hidden_input=50), Amount(150, 400, 1), id="requests alone"
        ),
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
def test_of_what_a_call_does_not_show_as_much_is_held_as_is_free(each, used, held, demand, hold):
    """Stored files, earlier answers: nobody knows how much that is, so it refuses nobody and shortens no answer."""
    who = binding([quota("staff/daily", **each)])
    decision = played(who, demand, {"staff/daily": used}, {"staff/daily": held})
    assert decision.hold == hold if hold else told(decision) == busy("staff/daily")


def test_what_is_not_shown_is_held_wherever_the_call_is_charged():
    """A quota beside that can't carry it is left alone; without quotas it is held as a whole."""
    big, demand = quota("lab/big", tokens=9000), call(100, 400, hidden_input=5000)
    decision = played(binding([big], [DAILY]), demand, {}, {})
    assert [(hold.quota.id, hold.amount) for hold in decision.holds] == [(big.id, Amount(5100, 400, 1))]
    assert played(binding(), demand, {}, {}).hold == Amount(5100, 400, 1)


# --------------------------------------------------------------------------------------------- what has to be counted

SMALL = quota("s/q", tokens=1600)
SHADOWED = quota("s/q", tokens=1600, enforce="shadow")
CLASSICALLY = quota("s/q", tokens=1600, enforce="after")
FAR = quota("s/far", tokens=10**6)


@pytest.mark.parametrize(
    ("who", "used", "held", "demand", "is_counted"),
    [
        # 16 × 100 = 1600
        pytest.param(binding([SMALL]), 0, 0, call(100, 9), False, id="a sixteenth"),
        pytest.param(binding([SMALL]), 0, 0, call(101, 9), True, id="more than a sixteenth"),
        pytest.param(binding([SMALL]), 1, 0, call(100, 9), True, id="of what is free"),
        pytest.param(binding([SMALL]), 0, 1, call(100, 9), True, id="of what is available"),
        pytest.param(binding([SMALL]), 0, 0, call(0, 1600), False, id="no input"),
        pytest.param(binding([quota("s/q", tokens=1600, overdraft=900)]), 0, 0, call(101, 9), True, id="overdraft"),
        pytest.param(binding([quota("s/q", input_tokens=1600)]), 0, 0, call(100, 9), False, id="input: a sixteenth"),
        pytest.param(binding([quota("s/q", input_tokens=1600)]), 0, 0, call(101, 9), True, id="input: more"),
        pytest.param(binding([quota("s/q", output_tokens=9)]), 0, 0, call(9999, 9), False, id="output"),
        pytest.param(binding([quota("s/q", requests=2)]), 0, 0, call(9999, 9), False, id="requests"),
        pytest.param(binding([CLASSICALLY]), 0, 0, call(9999, 9), False, id="after looks at no call's size"),
        pytest.param(binding(shadows=[SHADOWED]), 0, 0, call(9999, 9), False, id="shadow"),
        pytest.param(binding([FAR], [SMALL]), 0, 0, call(101, 9), True, id="beside the way in"),
        pytest.param(binding([FAR], [SMALL]), 1600, 0, call(101, 9), False, id="used up beside the way in"),
        pytest.param(binding([FAR], always=[SMALL]), 0, 0, call(101, 9), True, id="everyone's"),
        pytest.param(binding(group_quotas("admins")), 0, 0, call(9999, 9), False, id="unlimited"),
        # where the call is not let in with all that it wants
        pytest.param(binding([SMALL]), 0, 0, call(9999, 9), True, id="too large for ever"),
        pytest.param(binding([SMALL]), 1500, 0, call(100, 9), True, id="too large now"),
        pytest.param(binding([SMALL]), 1500, 0, call(1, 200, 1), True, id="it would be shortened"),
        pytest.param(binding([SMALL]), 0, 1500, call(100, 9), True, id="it would be delayed"),
        pytest.param(binding([SMALL]), 1000, 600, call(1, 9), False, id="it would be delayed in any case"),
        pytest.param(binding([SMALL]), 1600, 0, call(100, 9), False, id="used up in any case"),
        pytest.param(binding([SMALL]), 1600, 0, call(1700, 9), True, id="used up, but not too large for ever"),
        pytest.param(binding([SMALL]), 0, 0, call(1, 9999, 1601), True, id="so that the refusal says what it needs"),
        pytest.param(
            binding([quota("s/q", output_tokens=50)], [quota("s/p", tokens=100)]),
            0,
            Amount(0, 1, 1),
            call(60, 90, 1),
            True,
            id="it would be shortened, and could wait for a longer answer elsewhere",
        ),
    ],
)
def test_near_a_limit_an_input_is_counted_before_it_is_decided_on(who, used, held, demand, is_counted):
    """Where its bytes would refuse, delay or shorten the call, or are more than a sixteenth of what is left.

    Never twice, and never where a count can't help.
    """
    [by_bytes, counted] = [played(who, each, {"s/q": used}, {"s/q": held}) for each in (estimated(demand), demand)]
    assert not isinstance(counted, NeedsCount)
    assert by_bytes == (NeedsCount() if is_counted else counted)


# ------------------------------------------------------------------------------------- several quotas, several groups

HOURLY = quota("staff/hourly", tokens=300, per="hour")
WEEKLY = quota("team/weekly", tokens=5000, per="week")
POT = quota("team/pot", tokens=5000, per="month", shared=True)
LAB = quota("lab/6h", tokens=1000, per="6h")
CALLS = quota("everyone/calls", requests=10)
CLASSIC = quota("lab/classic", tokens=1000, per="6h", enforce="after")
OFF = quota("off/zero", tokens=0, per="minute")
ADMINS = group_quotas("admins")
TEN = Amount(requests=10)


@pytest.mark.parametrize(
    ("who", "used", "held", "demand", "expected"),
    [
        # inside one group
        pytest.param(
            binding([DAILY, HOURLY]), {}, {}, call(100, 200), room("staff", 200, DAILY.id, HOURLY.id), id="both"
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {HOURLY.id: 300},
            {},
            call(1, 1),
            exhausted(HOURLY.id, until=ONE_OCLOCK),
            id="inside one group all must have room",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {HOURLY.id: 300, DAILY.id: 1000},
            {},
            call(1, 1),
            exhausted(HOURLY.id, DAILY.id, until=MIDNIGHT),
            id="inside one group the latest reset counts",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {HOURLY.id: 300},
            {DAILY.id: 1000},
            call(1, 1),
            exhausted(HOURLY.id, until=ONE_OCLOCK),
            id="inside one group exhausted is worse than busy",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {DAILY.id: 1000},
            {},
            call(301),
            never(HOURLY.id),
            id="inside one group never is worse than exhausted",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {DAILY.id: 800},
            {},
            call(50, 4000, 1),
            room("staff", 150, DAILY.id, HOURLY.id),
            id="inside one group the shortest answer counts",
        ),
        pytest.param(
            binding([DAILY, HOURLY]),
            {DAILY.id: 800},
            {HOURLY.id: 101},
            call(50, 4000, 1),
            busy(HOURLY.id),
            id="what the tightest leaves must be available in the others",
        ),
        # everyone
        pytest.param(
            binding([DAILY], always=[CALLS]),
            {},
            {},
            call(1, 1),
            room("staff", 1, CALLS.id, DAILY.id),
            id="in addition",
        ),
        pytest.param(
            binding([DAILY], always=[CALLS]),
            {CALLS.id: TEN},
            {},
            call(1, 1),
            exhausted(CALLS.id, until=MIDNIGHT),
            id="everyone's quota binds although the group has room",
        ),
        pytest.param(
            binding([DAILY], [LAB], ADMINS, always=[CALLS]),
            {CALLS.id: TEN},
            {},
            call(1, 1),
            exhausted(CALLS.id, until=MIDNIGHT),
            id="everyone's quota binds through any group, unlimited ones too",
        ),
        pytest.param(
            binding(always=[CALLS]), {}, {}, call(1, 9), room("everyone", 9, CALLS.id), id="everyone's alone"
        ),
        pytest.param(binding(), {}, {}, call(1, 9), room("everyone", 9), id="no quota at all, where that is allowed"),
        # any_group: through which
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {},
            {},
            call(1, 9),
            room("staff", 9, DAILY.id, WEEKLY.id),
            id="the first in order",
        ),
        pytest.param(
            binding([WEEKLY], [DAILY]),
            {},
            {},
            call(1, 9),
            room("team", 9, WEEKLY.id, DAILY.id),
            id="the order is the policy's",
        ),
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {DAILY.id: 700},
            {},
            call(100, 400, 1),
            room("team", 400, WEEKLY.id),
            id="the first that can carry the whole hold; who can't is left alone",
        ),
        pytest.param(
            binding([DAILY], [LAB], [WEEKLY]),
            {DAILY.id: 700, LAB.id: 600, WEEKLY.id: 4900},
            {},
            call(50, 4000, 1),
            room("lab", 350, LAB.id),
            id="if none can, the one that can carry the most",
        ),
        pytest.param(
            binding([DAILY], [LAB]),
            {DAILY.id: 600, LAB.id: 600},
            {},
            call(50, 4000, 1),
            room("staff", 350, DAILY.id, LAB.id),
            id="if they carry the same, the first of them",
        ),
        pytest.param(
            binding([DAILY], [LAB]),
            {DAILY.id: 600, LAB.id: 600},
            {DAILY.id: 1},
            call(50, 4000, 1),
            room("lab", 350, LAB.id),
            id="if they carry the same, one that need not wait",
        ),
        pytest.param(
            binding([DAILY], [LAB]),
            {DAILY.id: 700, LAB.id: 600},
            {LAB.id: 300},
            call(50, 4000, 1),
            busy(LAB.id),
            id="the most by what is free: it waits rather than be shortened by calls in flight",
        ),
        pytest.param(
            binding([DAILY], [LAB]),
            {},
            {DAILY.id: 900},
            call(100, 400),
            room("lab", 400, LAB.id),
            id="nobody waits while another group can carry it all",
        ),
        pytest.param(
            binding([HOURLY, DAILY], [LAB]),
            {HOURLY.id: 290},
            {},
            call(100, 400),
            room("lab", 400, LAB.id, DAILY.id),
            id="other groups' quotas are weighed one by one",
        ),
        # any_group: across groups the best verdict
        pytest.param(
            binding([HOURLY], [DAILY]),
            {HOURLY.id: 300},
            {DAILY.id: 1000},
            call(10, 10),
            busy(DAILY.id),
            id="across groups busy is better than exhausted",
        ),
        pytest.param(
            binding([HOURLY], [DAILY]),
            {DAILY.id: 1000},
            {},
            call(301),
            exhausted(DAILY.id, until=MIDNIGHT),
            id="across groups exhausted is better than never",
        ),
        pytest.param(
            binding([HOURLY], [quota("lab/tiny", tokens=5)]),
            {},
            {},
            call(301),
            never("staff/hourly"),
            id="never anywhere",
        ),
        pytest.param(
            binding([DAILY], [LAB], [WEEKLY]),
            {DAILY.id: 1000, LAB.id: 1000, WEEKLY.id: 5000},
            {},
            call(1, 1),
            exhausted(LAB.id, until=SIX_OCLOCK),
            id="across groups the earliest reset counts",
        ),
        pytest.param(
            binding([HOURLY, DAILY], [LAB]),
            {HOURLY.id: 300, DAILY.id: 1000, LAB.id: 1000},
            {},
            call(1, 1),
            exhausted(LAB.id, until=SIX_OCLOCK),
            id="the earliest of the groups' latest",
        ),
        pytest.param(
            binding([HOURLY, DAILY], [LAB]),
            {HOURLY.id: 300, LAB.id: 1000},
            {DAILY.id: 1000},
            call(1, 1),
            exhausted(HOURLY.id, until=ONE_OCLOCK),
            id="a reset counts for what is exhausted, not for what is only busy",
        ),
        pytest.param(
            binding([DAILY], [LAB], always=[CALLS]),
            {DAILY.id: 1000, LAB.id: 1000, CALLS.id: TEN},
            {},
            call(1, 1),
            exhausted(DAILY.id, CALLS.id, until=MIDNIGHT),
            id="everyone's reset counts in each way",
        ),
        # unlimited
        pytest.param(
            binding([DAILY], ADMINS),
            {},
            {},
            call(1, 9),
            room("staff", 9, DAILY.id),
            id="unlimited, but another is first",
        ),
        pytest.param(
            binding([DAILY], ADMINS),
            {DAILY.id: 995},
            {},
            call(1, 9),
            room("admins", 9),
            id="unlimited carries what the others can't",
        ),
        pytest.param(
            binding(ADMINS, [DAILY], [POT]),
            {},
            {},
            call(1, 9),
            room("admins", 9, DAILY.id),
            id="through unlimited, others are charged beside, pots are not",
        ),
        pytest.param(
            binding([DAILY], ADMINS),
            {},
            {DAILY.id: 1000},
            call(1, 10**9),
            room("admins", 10**9),
            id="unlimited never waits",
        ),
        # pots
        pytest.param(
            binding([DAILY], [POT]), {}, {}, call(1, 9), room("staff", 9, DAILY.id), id="a pot only through its group"
        ),
        pytest.param(
            binding([POT], [DAILY]),
            {},
            {},
            call(1, 9),
            room("team", 9, POT.id, DAILY.id),
            id="through the pot's group",
        ),
        pytest.param(
            binding([DAILY], [POT, WEEKLY]),
            {},
            {},
            call(1, 9),
            room("staff", 9, DAILY.id, WEEKLY.id),
            id="of another group the members' quotas, not the pot",
        ),
        pytest.param(
            binding([DAILY], [POT]),
            {DAILY.id: 999, POT.id: 5000},
            {},
            call(2),
            exhausted(DAILY.id, until=MIDNIGHT),
            id="an empty pot is no help",
        ),
        pytest.param(
            binding([DAILY], always=[quota("everyone/pot", tokens=50, shared=True)]),
            {},
            {},
            call(1, 9),
            room("staff", 9, "everyone/pot", DAILY.id),
            id="everyone's pot is everyone's",
        ),
        # what is charged beside
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {WEEKLY.id: 4900},
            {},
            call(50, 51),
            room("staff", 51, DAILY.id),
            id="beside: too little is free",
        ),
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {WEEKLY.id: 4900},
            {},
            call(50, 50),
            room("staff", 50, DAILY.id, WEEKLY.id),
            id="beside: just enough is free",
        ),
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {WEEKLY.id: 4000},
            {WEEKLY.id: 950},
            call(50, 50),
            room("staff", 50, DAILY.id),
            id="beside: free, but held by others",
        ),
        pytest.param(
            binding([DAILY], [WEEKLY]),
            {DAILY.id: 900, WEEKLY.id: 4950},
            {},
            call(10, 4000, 1),
            room("staff", 90, DAILY.id),
            id="beside: the hold that is let in counts, not the one asked",
        ),
        pytest.param(
            binding([DAILY], [OFF]),
            {},
            {},
            call(1, 9),
            room("staff", 9, DAILY.id),
            id="beside: a limit of 0 carries nothing",
        ),
        pytest.param(
            binding([DAILY], [CLASSIC]),
            {CLASSIC.id: 999},
            {},
            call(50, 50),
            room("staff", 50, DAILY.id, CLASSIC.id),
            id="beside: after carries anything while it is not used up",
        ),
        pytest.param(
            binding([DAILY], [CLASSIC]),
            {CLASSIC.id: 1000},
            {},
            call(50, 50),
            room("staff", 50, DAILY.id),
            id="beside: after carries nothing once it is",
        ),
        pytest.param(
            binding([DAILY], [quota("lab/out", output_tokens=5)]),
            {},
            {},
            call(50),
            room("staff", 0, DAILY.id),
            id="beside: output alone has nothing to do with embeddings",
        ),
        # a limit of 0
        pytest.param(
            binding([OFF], [DAILY]), {}, {}, call(1, 9), room("staff", 9, DAILY.id), id="0 here, room there"
        ),
        pytest.param(
            binding([OFF], [DAILY]),
            {DAILY.id: 1000},
            {},
            call(1, 9),
            exhausted(DAILY.id, until=MIDNIGHT),
            id="a limit of 0 never resets, so it is not the earliest way in",
        ),
        pytest.param(
            binding([OFF]), {}, {}, call(1, 9), exhausted(OFF.id, until=None), id="a limit of 0 names no reset"
        ),
        # every_group
        pytest.param(
            binding([DAILY], [POT], combine="every_group", always=[CALLS]),
            {},
            {},
            call(1, 9),
            room("staff+team", 9, CALLS.id, DAILY.id, POT.id),
            id="every_group: through all, pots too",
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
            room("staff+lab", 200, DAILY.id, LAB.id),
            id="every_group: the shortest answer counts",
        ),
        pytest.param(
            binding([DAILY], ADMINS, combine="every_group"),
            {},
            {},
            call(1, 9),
            room("staff+admins", 9, DAILY.id),
            id="every_group: unlimited has room",
        ),
        pytest.param(
            binding(ADMINS, [DAILY], combine="every_group"),
            {DAILY.id: 1000},
            {},
            call(1, 9),
            exhausted(DAILY.id, until=MIDNIGHT),
            id="every_group: unlimited frees nobody of the others",
        ),
        pytest.param(
            binding(combine="every_group", always=[CALLS]),
            {},
            {},
            call(1, 9),
            room("everyone", 9, CALLS.id),
            id="every_group: of no group",
        ),
    ],
)
def test_who_is_let_in_and_what_is_charged(who, used, held, demand, expected):
    """Inside a group all quotas must have room; across groups `combine` decides; everyone's bind in addition."""
    assert told(played(who, demand, used, held)) == expected


def test_the_answer_says_which_quota_shortened_it():
    """For the head of the answer: `x-quota-capped`."""
    who = binding([DAILY, HOURLY], always=[quota("everyone/tokens", tokens=900)])
    decision = played(who, call(50, 4000, 1), {DAILY.id: 800}, {})
    assert decision.capped_by == DAILY
    assert decision.hold.output == 150


def test_exact_beside_after_beside_shadow():
    """Each holds in its own way of the same call: exact and shadow the whole, after only that there is a call."""
    classic, watching = (
        quota("staff/classic", tokens=10, enforce="after"),
        quota("staff/new", tokens=900, enforce="shadow"),
    )
    who = binding([DAILY, classic], shadows=[watching])
    decision = played(who, call(100, 400), {}, {})
    whole = Amount(100, 400, 1)
    assert {hold.quota.id: hold.amount for hold in decision.holds} == {
        DAILY.id: whole,
        classic.id: Amount(requests=1),
        watching.id: whole,
    }
    assert [hold_of(each, whole) for each in (DAILY, classic)] == [whole, Amount(requests=1)]


# ------------------------------------------------------------------------------------------------------------- shadow

WATCH = quota("staff/watch", tokens=500, enforce="shadow")


@pytest.mark.parametrize(
    ("used", "held", "demand", "output", "is_charged"),
    [
        pytest.param(0, 0, call(100, 400), 400, True, id="room"),
        pytest.param(500, 0, call(100, 400), 400, False, id="exhausted: reported, not charged"),
        pytest.param(0, 0, call(501, 9), 9, False, id="never: reported, not charged"),
        pytest.param(0, 500, call(100, 400), 400, True, id="busy: it would only have waited"),
        pytest.param(
            300, 0, call(100, 400, 1), 400, True, id="it would have been shortened: let in, and not shortened"
        ),
    ],
)
def test_a_quota_in_shadow_never_refuses_and_says_what_it_would_have_done(used, held, demand, output, is_charged):
    """So that an operator can see what a new quota would do before it does it."""
    who = binding([quota("staff/big", tokens=10**6)], shadows=[WATCH])
    decision = played(who, demand, {WATCH.id: used}, {WATCH.id: held})
    assert told(decision) == room("staff", output, "staff/big", *([WATCH.id] if is_charged else []))
    assert decision.would_refuse == (() if is_charged else (WATCH,))
    assert decision.capped_by is None


def test_quotas_in_shadow_alone_let_everything_in():
    """They bind nobody."""
    who = binding(shadows=[WATCH])
    assert told(played(who, call(10**6, 10**6), {}, {})) == room("everyone", 10**6)
    assert told(played(who, call(1, 1), {}, {})) == room("everyone", 1, WATCH.id)


def test_a_quota_in_shadow_is_not_named_in_a_refusal():
    """What it would have done is of no help to who was refused by another."""
    who = binding([DAILY], shadows=[WATCH])
    decision = played(who, call(1, 1), {DAILY.id: 1000, WATCH.id: 500}, {})
    assert told(decision) == exhausted(DAILY.id, until=MIDNIGHT)


def test_a_shadow_on_output_alone_does_not_watch_embeddings():
    """As it would not bind them either."""
    who = binding([DAILY], shadows=[quota("staff/out", output_tokens=0, enforce="shadow")])
    decision = played(who, call(10), {}, {})
    assert told(decision) == room("staff", 0, DAILY.id)
    assert decision.would_refuse == ()


# ------------------------------------------------------------------------------------------------- holds that increase_hold

OWN = Amount(100, 100, 1)


def grown(
    who: Binding,
    increase: tuple[int, int],
    *,
    admitted_via: str,
    used: Mapping,
    others: Mapping,
    not_held: tuple = (),
) -> HoldIncrease:
    """How a call that holds OWN of all quotas of a binding grows; `others` is what is held beside that."""
    held = {each.id: amount(others.get(each.id, 0)) + hold_of(each, OWN) for each in who.quotas}
    found = counters(who, used=used, held=held)
    at = {each.id: found[each.key_for("ann")] for each in who.quotas if each.id not in not_held}
    return increase_hold(
        *increase,
        who,
        admitted_via=admitted_via,
        own={each.id: hold_of(each, OWN) for each in who.quotas},
        current=at,
    )


@pytest.mark.parametrize(
    ("each", "used", "others", "increase", "output", "verdict"),
    [
        # tokens: limit 1000, of which the call itself holds 200
        pytest.param({"tokens": 1000}, 0, 0, (300, 1), 300, "ALLOW", id="room to spare"),
        pytest.param({"tokens": 1000}, 500, 0, (300, 1), 300, "ALLOW", id="to the last token"),
        pytest.param({"tokens": 1000}, 501, 0, (300, 299), 299, "ALLOW", id="in part, but enough to go on"),
        pytest.param({"tokens": 1000}, 501, 0, (300, 300), 299, "EXHAUSTED", id="in part, and not enough"),
        pytest.param({"tokens": 1000}, 800, 0, (300, 1), 0, "EXHAUSTED", id="nothing is left"),
        pytest.param({"tokens": 1000}, 800, 0, (300, 0), 0, "ALLOW", id="nothing is left, nothing is needed"),
        pytest.param({"tokens": 1000}, 5000, 0, (300, 1), 0, "EXHAUSTED", id="the limit was lowered"),
        pytest.param({"tokens": 1000}, 0, 501, (300, 299), 299, "ALLOW", id="others hold some"),
        pytest.param({"tokens": 1000}, 0, 501, (300, 300), 299, "BUSY", id="others hold what is needed"),
        pytest.param({"tokens": 1000}, 0, 800, (300, 1), 0, "BUSY", id="others hold all"),
        pytest.param({"tokens": 1000}, 500, 300, (400, 301), 0, "EXHAUSTED", id="and could not give enough back"),
        pytest.param({"tokens": 1000}, 500, 300, (400, 300), 0, "BUSY", id="and could give back just enough"),
        pytest.param({"tokens": 1000}, 0, 0, (0, 0), 0, "ALLOW", id="nothing is wanted"),
        # the other limits
        pytest.param({"tokens": 1000, "overdraft": 50}, 800, 0, (300, 50), 50, "ALLOW", id="overdraft"),
        pytest.param({"tokens": 1000, "overdraft": 50}, 800, 0, (300, 51), 50, "EXHAUSTED", id="and no further"),
        pytest.param({"output_tokens": 400}, Amount(999, 100, 1), 0, (300, 1), 200, "ALLOW", id="output"),
        pytest.param({"output_tokens": 400}, 0, Amount(0, 300, 1), (300, 1), 0, "BUSY", id="output: held"),
        pytest.param({"output_tokens": 400, "overdraft": 50}, 0, 0, (999, 1), 350, "ALLOW", id="output: overdraft"),
        pytest.param({"tokens": 1000, "output_tokens": 150}, 0, 0, (300, 1), 50, "ALLOW", id="the tightest"),
        pytest.param({"input_tokens": 100}, 999, 999, (300, 300), 300, "ALLOW", id="input doesn't bind answers"),
        pytest.param({"requests": 1}, 9, 9, (300, 300), 300, "ALLOW", id="nor do requests"),
        pytest.param({"tokens": 10, "enforce": "after"}, 99, 99, (300, 300), 300, "ALLOW", id="after stops nobody"),
    ],
)
def test_a_hold_grows_as_far_as_there_is_room(each, used, others, increase, output, verdict):
    """It takes what it can get; where that is too little to go on, waiting may help (BUSY) or not (EXHAUSTED)."""
    daily = quota("staff/daily", **each)
    growth = grown(binding([daily]), increase, admitted_via="staff", used={daily.id: used}, others={daily.id: others})
    assert (growth.output, growth.verdict, growth.left_alone) == (output, Verdict[verdict], ())
    assert [(hold.quota, hold.amount) for hold in growth.holds] == [(daily, hold_of(daily, Amount(output=output)))]


LAB_OUT = quota("lab/output", output_tokens=500)
TEAM_POT = quota("team/pot", tokens=1000, shared=True)
EVERYONES = quota("everyone/tokens", tokens=2000)
WATCHING = quota("staff/watch", tokens=100, enforce="shadow")
CLASSICAL = quota("lab/after", tokens=100, enforce="after")


@pytest.mark.parametrize(
    ("who", "admitted_via", "used", "others", "output", "verdict", "grows", "left_alone"),
    [
        pytest.param(binding([DAILY], always=[EVERYONES]), "staff", {EVERYONES.id: 1600}, {}, 200, "ALLOW",
                     {EVERYONES.id, DAILY.id}, set(), id="the tightest of the way in"),
        pytest.param(binding([DAILY], always=[EVERYONES]), "staff", {EVERYONES.id: 1800}, {DAILY.id: 800}, 0,
                     "EXHAUSTED", {EVERYONES.id, DAILY.id}, set(), id="used up is worse than held"),
        pytest.param(binding([DAILY], always=[EVERYONES]), "staff", {}, {EVERYONES.id: 1800}, 0, "BUSY",
                     {EVERYONES.id, DAILY.id}, set(), id="everyone's is held"),
        # beside
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {}, {}, 300, "ALLOW",
                     {DAILY.id, LAB_OUT.id}, set(), id="beside: it grows along"),
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {LAB_OUT.id: Amount(0, 100, 1)}, {}, 300, "ALLOW",
                     {DAILY.id, LAB_OUT.id}, set(), id="beside: to the last token"),
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {LAB_OUT.id: Amount(0, 101, 1)}, {}, 300, "ALLOW",
                     {DAILY.id}, {LAB_OUT.id}, id="beside: what can't carry it is left alone"),
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {}, {LAB_OUT.id: Amount(0, 101, 1)}, 300, "ALLOW",
                     {DAILY.id}, {LAB_OUT.id}, id="beside: nobody waits for it"),
        pytest.param(binding([DAILY], [LAB_OUT]), "staff", {DAILY.id: 750, LAB_OUT.id: Amount(0, 350, 1)}, {}, 50,
                     "ALLOW", {DAILY.id, LAB_OUT.id}, set(), id="beside: what there is room for counts"),
        pytest.param(binding([LAB_OUT], [DAILY]), "staff", {LAB_OUT.id: Amount(0, 400, 1)}, {}, 300, "ALLOW",
                     {DAILY.id}, {LAB_OUT.id}, id="the way in is the one that it took, not the first"),
        pytest.param(binding([DAILY], [CLASSICAL]), "staff", {CLASSICAL.id: 100}, {}, 300, "ALLOW",
                     {DAILY.id, CLASSICAL.id}, set(), id="beside: after needs no room"),
        pytest.param(binding([DAILY], shadows=[WATCHING]), "staff", {WATCHING.id: 900}, {}, 300, "ALLOW",
                     {DAILY.id, WATCHING.id}, set(), id="a shadow goes on watching above its limit"),
        # the ways in
        pytest.param(binding([TEAM_POT], [DAILY]), "team", {}, {TEAM_POT.id: 800}, 0, "BUSY",
                     {TEAM_POT.id, DAILY.id}, set(), id="through a pot's group"),
        pytest.param(binding([DAILY], [LAB_OUT], combine="every_group"), "staff+lab", {LAB_OUT.id: Amount(0, 380, 1)},
                     {}, 20, "ALLOW", {DAILY.id, LAB_OUT.id}, set(), id="every_group: all stop it"),
        pytest.param(binding([DAILY], group_quotas("admins")), "admins", {}, {DAILY.id: 800}, 300, "ALLOW",
                     set(), {DAILY.id}, id="through unlimited nothing stops it"),
        pytest.param(binding([DAILY], group_quotas("admins"), always=[EVERYONES]), "admins", {EVERYONES.id: 1700},
                     {}, 100, "ALLOW", {EVERYONES.id, DAILY.id}, set(), id="through unlimited everyone's does"),
        pytest.param(binding(always=[EVERYONES]), "everyone", {EVERYONES.id: 1700}, {}, 100, "ALLOW",
                     {EVERYONES.id}, set(), id="everyone's alone"),
        pytest.param(binding(), "everyone", {}, {}, 300, "ALLOW", set(), set(), id="no quota at all"),
    ],
)  # fmt: skip
def test_only_the_way_in_stops_an_answer(who, admitted_via, used, others, output, verdict, grows, left_alone):
    """A call would like 300 tokens more and needs one; quotas beside its way in are let go rather than stop it."""
    growth = grown(who, (300, 1), admitted_via=admitted_via, used=used, others=others)
    assert (growth.output, growth.verdict) == (output, Verdict[verdict])
    assert {hold.quota.id for hold in growth.holds} == grows
    assert {each.id for each in growth.left_alone} == left_alone


def test_a_quota_that_the_call_does_not_hold_neither_stops_it_nor_grows():
    """It was left alone before, and is not taken up again in the middle of an answer."""
    who = binding([DAILY], [LAB_OUT])
    growth = grown(who, (300, 300), admitted_via="staff", used={}, others={}, not_held=(LAB_OUT.id,))
    assert [hold.quota.id for hold in growth.holds] == [DAILY.id]
    growth = grown(who, (300, 300), admitted_via="lab", used={}, others={LAB_OUT.id: 999}, not_held=(LAB_OUT.id,))
    assert (growth.output, growth.verdict, [hold.quota.id for hold in growth.holds]) == (
        300,
        Verdict.ALLOW,
        [DAILY.id],
    )


# ----------------------------------------------------------------------------------------------- which counters count


def test_a_counter_of_another_user_or_of_a_closed_window_stands_in_nobodys_way():
    """Ann's limit is ann's, today's is today's."""
    bobs = counters(binding([DAILY], user="bob"), used={DAILY.id: 1000})
    yesterdays = counters(binding([DAILY]), used={DAILY.id: 1000}, held={DAILY.id: 500}, opened=NOON - DAY)
    for others in (bobs, yesterdays):
        [hold] = decide(call(1, 9), binding([DAILY]), others, NOON).holds
        assert (hold.counter.used, hold.counter.held) == (Amount(), Amount())
        assert hold.counter.window == Window(MIDNIGHT - DAY, MIDNIGHT)


# ----------------------------------------------------------------------------------------------- all rules, at random


def standing(who: Binding, found: Counters, now: int) -> dict[str, Counter]:
    return {each.id: counter_at(now, each, found.get(each.key_for(who.user))) for each in who.quotas}


def binds(limit: Limit, demand: Demand) -> bool:
    return limit.measure != "output_tokens" or demand.output_maximum > 0


def above(each: Quota, limit: Limit) -> int:
    """How far what is held may go above a limit."""
    return each.overdraft if limit.measure in ("tokens", "output_tokens") else 0


def is_free(each: Quota, counter: Counter, demand: Demand, output: int) -> bool:
    """Whether the smallest answer fits below the limit and one of `output` below the overdraft, of what is unused."""
    least, whole = Amount(demand.input, demand.smallest, 1), Amount(demand.input, output, 1)
    for limit in each.limits:
        left = limit.maximum - counter.used.of(limit.measure)
        is_too_large = least.of(limit.measure) > left or whole.of(limit.measure) > left + above(each, limit)
        if binds(limit, demand) and (left <= 0 or (is_too_large and each.enforce != "after")):
            return False
    return True


def is_available(each: Quota, counter: Counter, demand: Demand, hold: Amount) -> bool:
    """Whether a hold fits beside what others hold."""
    taken = counter.used + counter.held + hold
    return each.enforce == "after" or all(
        taken.of(limit.measure) <= limit.maximum + above(each, limit) for limit in each.limits if binds(limit, demand)
    )


def held_for(quotas: tuple[Quota, ...], at: Mapping[str, Counter], demand: Demand, output: int) -> Amount:
    """Of an answer its first part, and of what is not shown all that is free below each limit."""
    seen = demand.input
    for more in range(demand.hidden_input + 1):
        whole = Amount(demand.input + more, output, 1)
        if more == 0 or all(
            at[each.id].used.of(limit.measure) + whole.of(limit.measure) <= limit.maximum
            for each in quotas
            for limit in each.limits
            if each.enforce != "after" and limit.measure in ("tokens", "input_tokens")
        ):
            seen = whole.input
    return Amount(seen, min(output, demand.initial_hold), 1)


def plainly(demand: Demand, who: Binding, at: Mapping[str, Counter]) -> tuple[str, str, int]:
    """The rules once more, told as plainly as possible, by trying every length of answer."""
    alternatives = [(one.group, one.quotas) for one in who.groups] or [("everyone", ())]
    if who.combine == "every_group" and who.groups:
        alternatives = [
            ("+".join(name for name, _ in alternatives), tuple(each for _, quotas in alternatives for each in quotas))
        ]
    alternatives = [(name, (*who.always, *quotas)) for name, quotas in alternatives]

    def has_free(quotas: tuple[Quota, ...], output: int) -> bool:
        return all(is_free(each, at[each.id], demand, output) for each in quotas)

    def has_room(quotas: tuple[Quota, ...], output: int) -> bool:
        hold = held_for(quotas, at, demand, output)
        return has_free(quotas, output) and all(is_available(each, at[each.id], demand, hold) for each in quotas)

    for output in range(demand.output_maximum, demand.smallest - 1, -1):
        for name, quotas in alternatives:
            if has_room(quotas, output):
                return ("room", name, output)
        if any(has_free(quotas, output) for _, quotas in alternatives):
            return ("busy", "", 0)
    possible = any(all(could_ever_fit(each, demand) for each in quotas) for _, quotas in alternatives)
    return ("exhausted" if possible else "never", "", 0)


def could_ever_fit(each: Quota, demand: Demand) -> bool:
    """Whether the smallest answer is within its limits; one of 0 is off rather than too small."""
    least = Amount(demand.input, demand.smallest, 1)
    return each.enforce == "after" or all(
        least.of(limit.measure) <= limit.maximum or limit.maximum == 0
        for limit in each.limits
        if binds(limit, demand)
    )


def longest(decision: Admitted, demand: Demand) -> int:
    """The answer that there is room for; where nobody says how long it may become, what is usual."""
    return demand.output_maximum if decision.maximum is None else decision.maximum


@st.composite
def situations(
    draw: st.DrawFn, *, held: bool = True, hidden_input: bool = True
) -> tuple[Demand, Binding, dict[tuple[str, str], Counter]]:
    """A call, the quotas that bind it, and how they stand."""
    who = draw(bindings())
    return draw(demands(hidden_input=hidden_input)), who, draw(counters_of(who, held=held))


@given(situations())
def test_decisions_are_those_of_the_rules_told_plainly(situation):
    """The same verdict, group, length of answer and hold as by trying every group with every length."""
    demand, who, found = situation
    decision, at = decide(demand, who, found, NOON), standing(who, found, NOON)
    verdict, admitted_via, output = plainly(demand, who, at)
    assert told(decision)[0] == verdict
    if isinstance(decision, Admitted):
        way = next(way for way in who.alternatives() if way.group == admitted_via)
        assert (decision.admitted_via, longest(decision, demand)) == (admitted_via, output)
        assert decision.hold == held_for(way.quotas, at, demand, output)
        assert (decision.maximum is None) is (demand.is_unbounded and output == demand.output_maximum)


@given(situations())
def test_what_is_held_is_available_in_every_quota_that_is_charged(situation):
    """Promise 1, at the moment of admission: in an exact quota `used + held` stays within limit and overdraft."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, NotAdmitted):
        return
    assert demand.smallest <= longest(decision, demand) <= demand.output_maximum
    assert decision.hold.output == min(demand.initial_hold, longest(decision, demand))
    assert (decision.capped_by is None) is (longest(decision, demand) == demand.output_maximum)
    for hold in decision.holds:
        counter = hold.counter
        assert counter == counter_at(NOON, hold.quota, found.get(hold.quota.key_for(who.user)))
        for limit in hold.quota.limits:
            taken = counter.used + counter.held + hold.amount
            if hold.quota.enforce == "exact" and demand.bounds(limit):
                assert taken.of(limit.measure) <= limit.maximum + above(hold.quota, limit)
            if hold.quota.enforce != "shadow" and demand.bounds(limit):
                assert counter.used.of(limit.measure) < limit.maximum


@given(situations())
def test_what_is_charged_is_everyones_the_groups_and_what_else_can_carry_it(situation):
    """Each quota once; a pot only of a group through which the call came; nothing that can't carry the whole hold."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, NotAdmitted):
        return
    at, hold = standing(who, found, NOON), decision.hold
    admitted_via = {
        each.id for one in who.groups if one.group in decision.admitted_via.split("+") for each in one.quotas
    } | {each.id for each in who.always}

    def can_carry_it(each: Quota) -> bool:
        whole = replace(demand, smallest=hold.output)
        return is_free(each, at[each.id], whole, hold.output) and is_available(each, at[each.id], demand, hold)

    expected = {
        each.id
        for each in (*who.always, *(each for one in who.groups for each in one.quotas))
        if any(demand.bounds(limit) for limit in each.limits)
        and (each.id in admitted_via or (not each.shared and can_carry_it(each)))
    }
    charged = [hold.quota.id for hold in decision.holds if hold.quota.enforce != "shadow"]
    assert sorted(charged) == sorted(expected)


@given(situations())
def test_a_reset_that_is_named_is_true_and_the_earliest(situation):
    """Promise 5: at that instant no quota is used up any more, and a millisecond before it still is one."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, Admitted) or decision.verdict is not Verdict.EXHAUSTED:
        assert isinstance(decision, Admitted) or decision.admissible_at is None
        return
    if decision.admissible_at is None:  # switched off by a limit of 0, so it is never let in
        assert told(decide(demand, who, found, NOON + 400 * DAY))[0] == "exhausted"
        return
    assert decision.admissible_at > NOON
    assert told(decide(demand, who, found, decision.admissible_at))[0] in ("room", "busy")
    assert told(decide(demand, who, found, decision.admissible_at - 1))[0] == "exhausted"


@given(situations(held=False))
def test_with_nothing_in_flight_nobody_waits_and_the_reset_lets_in(situation):
    """No call is refused because of others when there are none."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    assert told(decision)[0] != "busy"
    if isinstance(decision, NotAdmitted) and decision.admissible_at is not None:
        assert isinstance(decide(demand, who, found, decision.admissible_at), Admitted)


@given(situations(hidden_input=False), st.data())
def test_more_that_is_free_never_turns_a_yes_into_a_no(situation, data):
    """Used less, held less or a larger limit: what was let in may now have to wait for a longer answer, at worst."""
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
        assert longest(after, demand) >= longest(before, demand)
    else:
        assert isinstance(after, Admitted) or after.verdict is Verdict.BUSY


def less(of: Amount) -> st.SearchStrategy[Amount]:
    """Any amount that is nowhere more, and not nothing where this is not (an empty window would be another one)."""
    return st.builds(
        Amount, st.integers(0, of.input), st.integers(0, of.output), st.integers(min(1, of.requests), of.requests)
    )


@st.composite
def larger(draw: st.DrawFn, each: Quota) -> Quota:
    """The same quota with limits and overdraft nowhere smaller; what is switched off stays so."""
    raised = [(limit, draw(st.sampled_from([0, 0, 1, 20])) if limit.maximum else 0) for limit in each.limits]
    overdraft = each.overdraft + draw(st.sampled_from([0, 0, 5]))
    limits = tuple(replace(limit, maximum=limit.maximum + more) for limit, more in raised)
    return replace(each, limits=limits, overdraft=overdraft)


@given(situations())
def test_quotas_in_shadow_change_nothing_but_their_own_counters(situation):
    """With them or without: the same decision, and the same charges to all others."""
    demand, who, found = situation
    watched, alone = decide(demand, who, found, NOON), decide(demand, replace(who, shadows=()), found, NOON)
    if isinstance(watched, Admitted):
        others = tuple(hold for hold in watched.holds if hold.quota.enforce != "shadow")
        watched = replace(watched, holds=others, would_refuse=())
    assert watched == alone


@given(situations(hidden_input=False), st.integers(0, 60))
def test_no_call_is_worse_off_by_its_bytes(situation, count):
    """Where no count was asked for, none would have let it in sooner or with a longer answer; and none asks again."""
    demand, who, found = situation
    by_bytes = decide(estimated(demand), who, found, NOON)
    if isinstance(by_bytes, NeedsCount):
        return
    counted = decide(replace(demand, input=min(demand.input, count)), who, found, NOON)
    assert by_bytes == decide(demand, who, found, NOON)
    assert told(by_bytes)[0] == told(counted)[0]
    if isinstance(by_bytes, Admitted):
        assert longest(by_bytes, demand) == longest(counted, demand)


@given(situations(), st.integers(0, 60), st.integers(0, 60))
def test_growth_is_that_of_the_rules_told_plainly(situation, wanted, least):
    """By trying every number of tokens; and nothing that grows goes above its limit and overdraft."""
    demand, who, found = situation
    admitted = decide(demand, who, found, NOON)
    if isinstance(admitted, NotAdmitted):
        return
    at = {one.quota.id: replace(one.counter, held=one.counter.held + one.amount) for one in admitted.holds}
    own = {one.quota.id: one.amount for one in admitted.holds}
    increase = (wanted, min(wanted, least))
    growth = increase_hold(*increase, who, admitted_via=admitted.admitted_via, own=own, current=at)

    way = next(way for way in who.alternatives() if way.group == admitted.admitted_via)
    stopping = [each for each in way.quotas if each.id in at]

    def has_room(quotas: list[Quota], output: int, held: Mapping[str, Amount]) -> bool:
        return output == 0 or all(
            (at[each.id].used + held[each.id] + Amount(output=output)).of(limit.measure)
            <= limit.maximum + above(each, limit)
            for each in quotas
            for limit in each.limits
            if each.enforce == "exact" and limit.measure in ("tokens", "output_tokens")
        )

    held = {quota_id: counter.held for quota_id, counter in at.items()}
    assert growth.output == max(n for n in range(wanted + 1) if has_room(stopping, n, held))
    if growth.output >= increase[1]:
        assert growth.verdict is Verdict.ALLOW
    else:
        waiting_helps = has_room(stopping, increase[1], own)
        assert growth.verdict is (Verdict.BUSY if waiting_helps else Verdict.EXHAUSTED)
    beside = [each for each in who.quotas if each.id in at and each not in stopping]
    kept = [each for each in beside if has_room([each], growth.output, held)]
    assert {hold.quota.id for hold in growth.holds} == {each.id for each in (*stopping, *kept)}
    assert {each.id for each in growth.left_alone} == {each.id for each in beside} - {each.id for each in kept}
    for hold in growth.holds:
        assert hold.counter == at[hold.quota.id]
        assert hold.amount == (NOTHING if hold.quota.enforce == "after" else Amount(output=growth.output))
