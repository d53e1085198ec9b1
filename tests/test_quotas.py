"""Which calls the quotas let in, what those hold of which counter, and when the others may come back.

Scenarios are played on Tuesday the 24th of November 2026 at noon, UTC, by ann. In a table, a bare number of tokens
used or held means that many input tokens, and one request.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.quotas import (
    Admitted,
    Binding,
    Counter,
    Counters,
    Demand,
    Globs,
    Quota,
    Refused,
    Route,
    Verdict,
    decide,
    hold_of,
    standing_at,
)
from proxy.usage import Amount
from proxy.windows import Window
from tests.builders import DAY, HOUR, MINUTE, NOON, binding, call, counters, instant, quota, route
from tests.random_rules import bindings, counters_of, demands

ONE_OCLOCK = instant("2026-11-24 13:00")
SIX_OCLOCK = instant("2026-11-24 18:00")
MIDNIGHT = instant("2026-11-25 00:00")
NEXT_WEEK = instant("2026-11-30 00:00")
NEXT_MONTH = instant("2026-12-01 00:00")


# -------------------------------------------------------------------------------------------- the words of the tables


def room(through: str, output: int, *charged: str) -> tuple[object, ...]:
    """Let in through a group, for an answer of at most `output`, held of and charged to these quotas."""
    return ("room", through, output, set(charged))


def busy(*quotas: str) -> tuple[object, ...]:
    """Calls in flight hold what is free of these quotas."""
    return ("busy", set(quotas), None)


def exhausted(*quotas: str, until: int | None) -> tuple[object, ...]:
    """These are used up, and the call would be let in at `until`."""
    return ("exhausted", set(quotas), until)


def never(*quotas: str) -> tuple[object, ...]:
    """The call is larger than these ever allow."""
    return ("never", set(quotas), None)


def told(decision: Admitted | Refused) -> tuple[object, ...]:
    """A decision in the words above."""
    if isinstance(decision, Admitted):
        return room(decision.through, decision.hold.output, *(hold.quota.id for hold in decision.holds))
    return (decision.verdict.name.lower(), {block.quota.id for block in decision.blocks}, decision.let_in_at)


def played(who: Binding, demand: Demand, used: dict, held: dict) -> Admitted | Refused:
    return decide(demand, who, counters(who, used=used, held=held), NOON)


# ------------------------------------------------------------------------------------------------------ quotas, globs


@pytest.mark.parametrize(
    ("texts", "model", "is_covered"),
    [
        (["*"], "gpt-4o", True),
        (["*"], "", True),
        (["gpt-4o"], "gpt-4o", True),
        (["gpt-4o"], "gpt-4o-mini", False),
        (["4o"], "gpt-4o", False),
        (["gpt-4o*"], "gpt-4o-mini", True),
        (["GPT-4o"], "gpt-4o", False),
        (["o?"], "o3", True),
        (["o?"], "o3-mini", False),
        (["o[13]"], "o3", True),
        (["o[!13]"], "o3", False),
        (["a.c"], "abc", False),
        (["org/*"], "org/deep/model", True),
        (["gpt-4o", "o*"], "o3-mini", True),
        (["gpt-4o", "o*"], "fast", False),
        (["a|b"], "a", False),
        (["gpt*"], "gpt-4o\n", True),
        (["gpt-4o"], "gpt-4o\n", False),
        ([], "gpt-4o", False),
        ([], "", False),
    ],
)
def test_globs_cover_whole_names_and_nothing_by_accident(texts, model, is_covered):
    """What stands in a pattern but `*`, `?` and `[…]` means itself; an empty list covers nothing."""
    assert Globs(texts).match(model) is is_covered


def test_globs_are_values():
    """Two policies from the same text are equal, so a reload that changes nothing is seen as such."""
    assert Globs(["a", "b*"]) == Globs(["a", "b*"]) != Globs(["a"])
    assert Globs(["a"]) != "a"
    assert len({Globs(["a"]), Globs(["a"]), Globs(["b"])}) == 2
    assert repr(Globs(["a", "b*"])) == "Globs(('a', 'b*'))"


def test_a_quota_counts_each_member_separately_or_the_group_as_one():
    """The key of a counter is the quota's id and whose it is."""
    own, pot = quota("team/daily", tokens=1), quota("team/pot", tokens=1, shared=True)
    assert own.id == "team/daily"
    assert own.key_for("ann") != own.key_for("bob")
    assert pot.key_for("ann") == pot.key_for("bob")
    assert own.key_for("ann")[1] == pot.key_for("ann")[1].replace("pot", "daily") == "team/daily"


def test_no_user_can_be_named_so_as_to_share_a_pot_or_another_users_counter():
    """Subjects of users and of groups can't meet, whatever they are called."""
    own, pot = quota("team/daily", tokens=1), quota("team/daily", tokens=1, shared=True)
    names = ["team", "~team", "user:team", "", "~", "user:"]
    keys = [own.key_for(name) for name in names] + [pot.key_for("team")]
    assert len(set(keys)) == len(keys)


def test_members_rows_are_locked_before_pots():
    """A pot is everybody's row: sorted keys put it last, so that it is locked for the shortest time."""
    own, pot = quota("zoo/daily", tokens=1), quota("art/pot", tokens=1, shared=True)
    keys = sorted(each.key_for(user) for each in (pot, own) for user in ("zoe", "ann", "élan", "~x"))
    assert [subject for subject, _ in keys][-4:] == ["~art"] * 4


# ------------------------------------------------------------------------------------------------------------ windows

DAILY = quota("staff/daily", tokens=1000)
SIX_HOURS = quota("staff/6h", tokens=1000, per="6h")
SOME = Amount(1, 0, 1)


@pytest.mark.parametrize(
    ("each", "counter", "now", "stands"),
    [
        pytest.param(DAILY, None, NOON, Counter(Window(MIDNIGHT - DAY, MIDNIGHT)), id="calendar, never used"),
        pytest.param(SIX_HOURS, None, NOON, Counter(Window(NOON, NOON + 6 * HOUR)), id="duration, never used"),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK), used=SOME),
            SIX_OCLOCK - 1,
            Counter(Window(NOON, SIX_OCLOCK), used=SOME),
            id="a millisecond before its end it counts",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK), used=SOME),
            SIX_OCLOCK,
            Counter(Window(SIX_OCLOCK, SIX_OCLOCK + 6 * HOUR)),
            id="at its end it is over",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK), held=SOME),
            SIX_OCLOCK,
            Counter(Window(SIX_OCLOCK, SIX_OCLOCK + 6 * HOUR)),
            id="what is held ends with the window too",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK)),
            NOON + HOUR,
            Counter(Window(NOON + HOUR, NOON + 7 * HOUR)),
            id="nothing used and nothing held: it is not open",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK), held=SOME),
            NOON + HOUR,
            Counter(Window(NOON, SIX_OCLOCK), held=SOME),
            id="a call in flight keeps it open",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK), used=Amount(requests=1)),
            NOON + HOUR,
            Counter(Window(NOON, SIX_OCLOCK), used=Amount(requests=1)),
            id="one request without a token keeps it open",
        ),
        pytest.param(
            quota("staff/daily", tokens=1000, per="minute"),
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            NOON,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            id="day became minute: the running window keeps its end",
        ),
        pytest.param(
            quota("staff/daily", tokens=1000, per="minute"),
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            MIDNIGHT,
            Counter(Window(MIDNIGHT, MIDNIGHT + MINUTE)),
            id="day became minute: it applies from the next",
        ),
        pytest.param(
            DAILY,
            Counter(Window(NOON, NOON + MINUTE), used=SOME),
            NOON + 1,
            Counter(Window(NOON, NOON + MINUTE), used=SOME),
            id="minute became day: the running window keeps its end",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            NOON - 30 * DAY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            id="a clock that jumps back resets nothing",
        ),
    ],
)
def test_a_window_is_computed_from_the_clock_when_it_is_looked_at(each, counter, now, stands):
    """There is no reset job."""
    assert standing_at(now, each, counter) == stands


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
        assert (decision.capped_by is None) is (expected == demand.want)
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


# ------------------------------------------------------------------------------------- several quotas, several groups

HOURLY = quota("staff/hourly", tokens=300, per="hour")
WEEKLY = quota("team/weekly", tokens=5000, per="week")
POT = quota("team/pot", tokens=5000, per="month", shared=True)
LAB = quota("lab/6h", tokens=1000, per="6h")
CALLS = quota("everyone/calls", requests=10)
CLASSIC = quota("lab/classic", tokens=1000, per="6h", enforce="after")
OFF = quota("off/zero", tokens=0, per="minute")
ADMINS = route("admins")
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


# ----------------------------------------------------------------------------------------------- which counters count


def test_a_binding_names_the_counters_that_a_decision_looks_at():
    """All of them, also of groups that the call does not come in through and of quotas in shadow."""
    who = binding([DAILY, HOURLY], [POT], ADMINS, always=[CALLS], shadows=[WATCH])
    assert [each.id for each in who.quotas] == [CALLS.id, DAILY.id, HOURLY.id, POT.id, WATCH.id]
    assert who.keys() == [
        ("user:ann", CALLS.id),
        ("user:ann", DAILY.id),
        ("user:ann", HOURLY.id),
        ("~team", POT.id),
        ("user:ann", WATCH.id),
    ]


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
    return {each.id: standing_at(now, each, found.get(each.key_for(who.user))) for each in who.quotas}


def fits(each: Quota, counter: Counter, demand: Demand, output: int, *, of: str) -> bool:
    """Whether a quota has room for the input and an answer of `output`, of what is free, available or allowed."""
    for limit in each.limits:
        used, held = counter.used.of(limit.measure), counter.held.of(limit.measure)
        left = {"limit": limit.maximum, "free": limit.maximum - used, "available": limit.maximum - used - held}[of]
        if limit.measure == "output_tokens" and demand.want == 0:
            continue
        if of != "limit" and used >= limit.maximum:
            return False
        if each.enforce != "after" and Amount(demand.input, output, 1).of(limit.measure) > left:
            return False
    return True


def plainly(demand: Demand, who: Binding, at: dict[str, Counter]) -> tuple[str, str, int]:
    """The rules once more, told as plainly as possible, by trying every length of answer."""
    ways = [(one.group, one.quotas) for one in who.routes] or [("everyone", ())]
    if who.combine == "every_group" and who.routes:
        ways = [("+".join(name for name, _ in ways), tuple(each for _, quotas in ways for each in quotas))]
    ways = [(name, (*who.always, *quotas)) for name, quotas in ways]

    def has_room(quotas: tuple[Quota, ...], output: int, of: str) -> bool:
        return all(fits(each, at[each.id], demand, output, of=of) for each in quotas)

    for name, quotas in ways:
        if has_room(quotas, demand.want, "available"):
            return ("room", name, demand.want)
    for output in range(demand.want, demand.smallest - 1, -1):
        carrying = [(name, quotas) for name, quotas in ways if has_room(quotas, output, "free")]
        for name, quotas in carrying:
            if has_room(quotas, output, "available"):
                return ("room", name, output)
        if carrying:
            return ("busy", "", 0)
    possible = any(has_room(_but_those_switched_off(quotas), demand.smallest, "limit") for _, quotas in ways)
    return ("exhausted" if possible else "never", "", 0)


def _but_those_switched_off(quotas: tuple[Quota, ...]) -> tuple[Quota, ...]:
    return tuple(replace(each, limits=tuple(limit for limit in each.limits if limit.maximum)) for each in quotas)


@st.composite
def situations(draw: st.DrawFn, *, held: bool = True) -> tuple[Demand, Binding, Counters]:
    """A call, the quotas that bind it, and how they stand."""
    who = draw(bindings())
    return draw(demands()), who, draw(counters_of(who, held=held))


@given(situations())
def test_decisions_are_those_of_the_rules_told_plainly(situation):
    """The same verdict, group and length of answer as by trying every group with every length."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    verdict, through, output = plainly(demand, who, standing(who, found, NOON))
    assert told(decision)[0] == verdict
    if isinstance(decision, Admitted):
        assert (decision.through, decision.hold) == (through, Amount(demand.input, output, 1))


@given(situations())
def test_what_is_held_is_available_in_every_quota_that_is_charged(situation):
    """Promise 1, at the moment of admission: in an exact quota `used + held` stays within the limit."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, Refused):
        return
    assert demand.smallest <= decision.hold.output <= demand.want
    assert (decision.capped_by is None) is (decision.hold.output == demand.want)
    for hold in decision.holds:
        counter = hold.counter
        assert counter == standing_at(NOON, hold.quota, found.get(hold.quota.key_for(who.user)))
        for limit in hold.quota.limits:
            taken = counter.used.of(limit.measure) + counter.held.of(limit.measure) + hold.amount.of(limit.measure)
            if hold.quota.enforce == "exact" and demand.bounds(limit):
                assert taken <= limit.maximum
            if hold.quota.enforce == "after" and demand.bounds(limit):
                assert counter.used.of(limit.measure) < limit.maximum


@given(situations())
def test_what_is_charged_is_everyones_the_groups_and_what_else_can_carry_it(situation):
    """Each quota once; a pot only of a group through which the call came; nothing that can't carry the whole hold."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, Refused):
        return
    at, output = standing(who, found, NOON), decision.hold.output
    through = {each.id for one in who.routes if one.group in decision.through.split("+") for each in one.quotas} | {
        each.id for each in who.always
    }
    expected = {
        each.id
        for each in (*who.always, *(each for one in who.routes for each in one.quotas))
        if any(demand.bounds(limit) for limit in each.limits)
        and (each.id in through or (not each.shared and fits(each, at[each.id], demand, output, of="available")))
    }
    charged = [hold.quota.id for hold in decision.holds if hold.quota.enforce != "shadow"]
    assert sorted(charged) == sorted(expected)


@given(situations())
def test_a_reset_that_is_named_is_true_and_the_earliest(situation):
    """Promise 5: at that instant no quota is used up any more, and a millisecond before it still is one."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    if isinstance(decision, Admitted) or decision.verdict is not Verdict.EXHAUSTED:
        assert isinstance(decision, Admitted) or decision.let_in_at is None
        return
    if decision.let_in_at is None:  # switched off by a limit of 0, so it is never let in
        assert told(decide(demand, who, found, NOON + 400 * DAY))[0] == "exhausted"
        return
    assert decision.let_in_at > NOON
    assert told(decide(demand, who, found, decision.let_in_at))[0] in ("room", "busy")
    assert told(decide(demand, who, found, decision.let_in_at - 1))[0] == "exhausted"


@given(situations(held=False))
def test_with_nothing_in_flight_nobody_waits_and_the_reset_lets_in(situation):
    """No call is refused because of others when there are none."""
    demand, who, found = situation
    decision = decide(demand, who, found, NOON)
    assert told(decision)[0] != "busy"
    if isinstance(decision, Refused) and decision.let_in_at is not None:
        assert isinstance(decide(demand, who, found, decision.let_in_at), Admitted)


@given(situations(), st.data())
def test_more_that_is_free_never_turns_a_yes_into_a_no(situation, data):
    """Used less, held less or a larger limit: what was let in may now have to wait for a longer answer, at worst."""
    demand, who, found = situation
    before = decide(demand, who, found, NOON)
    freer = {key: replace(counter, used=data.draw(less(counter.used))) for key, counter in found.items()}
    freer = {key: replace(counter, held=data.draw(less(counter.held))) for key, counter in freer.items()}
    who = replace(
        who,
        always=tuple(data.draw(larger(each)) for each in who.always),
        routes=tuple(Route(one.group, tuple(data.draw(larger(each)) for each in one.quotas)) for one in who.routes),
    )
    after = decide(demand, who, freer, NOON)
    if isinstance(before, Refused):
        assert isinstance(after, Admitted) or after.verdict <= before.verdict
    elif before.hold.output == demand.want or not any(counter.held for counter in freer.values()):
        assert isinstance(after, Admitted)
        assert after.hold.output >= before.hold.output
    else:
        assert isinstance(after, Admitted) or after.verdict is Verdict.BUSY


def less(of: Amount) -> st.SearchStrategy[Amount]:
    """Any amount that is nowhere more, and not nothing where this is not (an empty window would be another one)."""
    return st.builds(
        Amount, st.integers(0, of.input), st.integers(0, of.output), st.integers(min(1, of.requests), of.requests)
    )


@st.composite
def larger(draw: st.DrawFn, each: Quota) -> Quota:
    """The same quota with limits that are nowhere smaller; what is switched off stays so."""
    raised = [(limit, draw(st.sampled_from([0, 0, 1, 20])) if limit.maximum else 0) for limit in each.limits]
    return replace(each, limits=tuple(replace(limit, maximum=limit.maximum + more) for limit, more in raised))


@given(situations())
def test_quotas_in_shadow_change_nothing_but_their_own_counters(situation):
    """With them or without: the same decision, and the same charges to all others."""
    demand, who, found = situation
    watched, alone = decide(demand, who, found, NOON), decide(demand, replace(who, shadows=()), found, NOON)
    if isinstance(watched, Admitted):
        others = tuple(hold for hold in watched.holds if hold.quota.enforce != "shadow")
        watched = replace(watched, holds=others, would_refuse=())
    assert watched == alone
