"""What a quota says, how its counter stands at an instant, and which quotas bind a call.

Scenarios are played on Tuesday the 24th of November 2026 at noon, UTC, by ann.
"""

from dataclasses import replace

import pytest

from proxy.policy.amounts import MEASURES, Amount
from proxy.policy.quota import Counter, Globs, Limit, counter_at
from proxy.policy.windows import Window
from tests.builders import DAY, HOUR, MINUTE, NOON, binding, call, group_quotas, instant, quota

SIX_OCLOCK = instant("2026-11-24 18:00")
MIDNIGHT = instant("2026-11-25 00:00")


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
            MIDNIGHT - DAY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            id="a clock that jumps back inside a window resets nothing",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            NOON - 30 * DAY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT - 30 * DAY), used=SOME),
            id="a clock that was ahead: it counts on, for no longer than a window that opens now",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(SIX_OCLOCK, SIX_OCLOCK + HOUR), held=SOME),
            NOON + 4 * HOUR,
            Counter(Window(SIX_OCLOCK, SIX_OCLOCK + HOUR), held=SOME),
            id="a clock that was ahead: its end is never put off",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON + DAY, NOON + DAY + 6 * HOUR)),
            NOON,
            Counter(Window(NOON + DAY, NOON + 6 * HOUR)),
            id="a clock that was ahead: no window opens before the last one, also where that was not used",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT + HOUR, MIDNIGHT), used=SOME),
            MIDNIGHT,
            Counter(Window(MIDNIGHT + HOUR + 1, MIDNIGHT + DAY)),
            id="a clock that was ahead: the next window is known by an opening of its own",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT - DAY + 5, MIDNIGHT)),
            NOON,
            Counter(Window(MIDNIGHT - DAY + 5, MIDNIGHT)),
            id="of the same window it opens no earlier than the last one did",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT - 23 * HOUR), used=SOME),
            NOON,
            Counter(Window(MIDNIGHT - 23 * HOUR, MIDNIGHT)),
            id="hour became day: not the window that began at midnight too",
        ),
    ],
)
def test_a_window_is_computed_from_the_clock_when_it_is_looked_at(each, counter, now, stands):
    """There is no reset job."""
    assert counter_at(now, each, counter) == stands


# ------------------------------------------------------------------------------------------------- how far, how much


@pytest.mark.parametrize(
    ("measure", "ceiling"), [("tokens", 1400), ("input_tokens", 1000), ("output_tokens", 1400), ("requests", 1000)]
)
def test_an_overdraft_is_for_what_is_generated(measure, ceiling):
    """It lets an answer end, so it adds nothing to a limit on input or on requests."""
    each = quota("staff/daily", overdraft=400, **{measure: 1000})
    assert each.ceiling(Limit(measure, 1000)) == ceiling
    assert replace(each, overdraft=0).ceiling(Limit(measure, 1000)) == 1000


@pytest.mark.parametrize(
    ("demand", "least", "bound_by"),
    [
        pytest.param(call(100, 400, 50), [150, 100, 50, 1], [True] * 4, id="generates"),
        pytest.param(
            call(100, 400, 50, initial_hold=10, hidden_input=99), [150, 100, 50, 1], [True] * 4, id="in parts"
        ),
        pytest.param(call(100), [100, 100, 0, 1], [True, True, False, True], id="generates nothing"),
        pytest.param(call(0, 1), [1, 0, 1, 1], [True] * 4, id="without input"),
    ],
)
def test_a_demand_says_the_least_that_it_takes_and_which_limits_bind_it(demand, least, bound_by):
    """Input and smallest answer; limits on output alone don't bind what generates nothing."""
    assert [demand.least(measure) for measure in MEASURES] == least
    assert [demand.bounds(Limit(measure, 9)) for measure in MEASURES] == bound_by


# ----------------------------------------------------------------------------------------------------------- bindings

HOURLY = quota("staff/hourly", tokens=300, per="hour")
POT = quota("team/pot", tokens=5000, per="month", shared=True)
CALLS = quota("everyone/calls", requests=10)
WATCH = quota("staff/watch", tokens=500, enforce="shadow")
ADMINS = group_quotas("admins")


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


@pytest.mark.parametrize(
    ("who", "alternatives"),
    [
        pytest.param(binding(), [group_quotas("everyone")], id="nothing binds"),
        pytest.param(binding(always=[CALLS]), [group_quotas("everyone", CALLS)], id="everyone's alone"),
        pytest.param(
            binding([DAILY], ADMINS, always=[CALLS]),
            [group_quotas("staff", CALLS, DAILY), group_quotas("admins", CALLS)],
            id="any_group: one way for each, in order",
        ),
        pytest.param(
            binding([DAILY], [POT], ADMINS, always=[CALLS], combine="every_group"),
            [group_quotas("staff+team+admins", CALLS, DAILY, POT)],
            id="every_group: one way through all",
        ),
        pytest.param(
            binding(always=[CALLS], combine="every_group"),
            [group_quotas("everyone", CALLS)],
            id="every_group: of none",
        ),
    ],
)
def test_the_ways_in_are_sets_of_quotas_that_must_have_room_together(who, alternatives):
    """Those of everyone stand in each; those in shadow in none."""
    assert replace(who, shadows=(WATCH,)).alternatives() == alternatives
