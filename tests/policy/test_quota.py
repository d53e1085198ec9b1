"""Quotas and the names they match, their counters at an instant, what a call demands, and bindings.

In all scenarios the user is ann and the time is noon UTC on Tuesday, 24 November 2026.
"""

from dataclasses import replace
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.admission import Admitted, decide
from proxy.policy.amounts import Amount, Measure, Uses, call_amount, totals_of
from proxy.policy.binding import BoundQuotas
from proxy.policy.quota import (
    Counter,
    Globs,
    Limit,
    counter_at,
    group_of,
    sample_name,
    shared_subject,
    user_of,
    user_subject,
)
from proxy.policy.windows import WEEKDAYS, Calendar, Window
from tests.builders import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    binding,
    call,
    group_quotas,
    instant,
    make_requests_concurrent,
    quota,
)
from tests.random_rules import bindings, counters_of, demands

SIX_OCLOCK = instant("2026-11-24 18:00")
MIDNIGHT = instant("2026-11-25 00:00")


# ------------------------------------------------------------------------------------------------------ quotas, globs


@pytest.mark.parametrize(
    ("texts", "model", "is_match"),
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
def test_globs_match_whole_names(texts, model, is_match):
    """In a pattern only `*`, `?` and `[…]` are special; an empty list matches nothing."""
    assert Globs(texts).match(model) is is_match


@pytest.mark.parametrize(
    ("texts", "spellings", "is_match"),
    [
        (["gpt-4o"], ("gpt-4o",), True),
        (["GPT-4*"], ("gpt-4o",), True),
        (["[A-H]pt*"], ("gpt-4o",), True),
        (["Llama3:Latest"], ("llama3", "llama3:latest"), True),
        (["llama3"], ("llama3", "llama3:latest"), True),
        (["llama2"], ("llama3", "llama3:latest"), False),
        ([], ("llama3",), False),
    ],
)
def test_a_name_with_several_spellings_is_matched_in_any_case(texts, spellings, is_match):
    """Its server ignores case, so one spelling that matches is enough."""
    assert Globs(texts).match(spellings) is is_match


def test_globs_match_in_linear_time():
    """T95: a pattern with many stars costs no more than the length of the name, which clients choose."""
    assert not Globs(["*a" * 40 + "b"]).match("a" * 512)
    assert Globs(["*a" * 40 + "b"]).match("a" * 511 + "b")


def test_globs_name_the_models_that_they_state_in_full():
    """A pattern with `*`, `?` or `[` is no name."""
    assert Globs(["gpt-4o", "o*", "gpt-?", "gpt-[45]", "a/b:c", "*"]).names == ("gpt-4o", "a/b:c")
    assert Globs().names == ()


def test_globs_are_values():
    """Two policies from the same text are equal, so a reload can tell that nothing has changed."""
    assert Globs(["a", "b*"]) == Globs(["a", "b*"]) != Globs(["a"])
    assert Globs(["a"]) != "a"
    assert len({Globs(["a"]), Globs(["a"]), Globs(["b"])}) == 2
    assert repr(Globs(["a", "b*"])) == "Globs(('a', 'b*'))"


def test_a_quota_counts_each_member_separately_or_the_group_as_one():
    """The key of a counter is its subject and the quota's id."""
    own, shared = quota("team/daily", tokens=1), quota("team/pot", tokens=1, shared=True)
    assert own.id == "team/daily"
    assert own.key_for("ann") != own.key_for("bob")
    assert shared.key_for("ann") == shared.key_for("bob")
    assert own.key_for("ann")[1] == shared.key_for("ann")[1].replace("pot", "daily") == "team/daily"


def test_no_user_name_gives_the_key_of_a_group_or_of_another_user():
    """The subjects of users and of groups are never equal, whatever they are called."""
    own, shared = quota("team/daily", tokens=1), quota("team/daily", tokens=1, shared=True)
    names = ["team", "~team", "user:team", "", "~", "user:"]
    keys = [own.key_for(name) for name in names] + [shared.key_for("team")]
    assert len(set(keys)) == len(keys)


def test_sorted_keys_have_shared_counters_last():
    """Rows are locked in this order, and the shared one, which all members need, for the shortest time."""
    own, shared = quota("zoo/daily", tokens=1), quota("art/pot", tokens=1, shared=True)
    keys = sorted(each.key_for(user) for each in (shared, own) for user in ("zoe", "ann", "élan", "~x"))
    assert [subject for subject, _ in keys][-4:] == ["~art"] * 4


# ------------------------------------------------------------------------------------------------------------ windows

DAILY = quota("staff/daily", tokens=1000)
SIX_HOURS = quota("staff/6h", tokens=1000, per="6h")
SUNDAY_WEEKLY = replace(DAILY, per=Calendar("week", ZoneInfo("UTC"), WEEKDAYS.index("sunday")))
SOME = Amount(1, 0, 1)


@pytest.mark.parametrize(
    ("each", "counter", "now", "expected"),
    [
        pytest.param(DAILY, None, NOON, Counter(Window(MIDNIGHT - DAY, MIDNIGHT)), id="calendar: never used"),
        pytest.param(SIX_HOURS, None, NOON, Counter(Window(NOON, NOON + 6 * HOUR)), id="duration: never used"),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK), used=SOME),
            SIX_OCLOCK - 1,
            Counter(Window(NOON, SIX_OCLOCK), used=SOME),
            id="one millisecond before its end it is open",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK), used=SOME),
            SIX_OCLOCK,
            Counter(Window(SIX_OCLOCK, SIX_OCLOCK + 6 * HOUR)),
            id="at its end a new one opens",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK), held=SOME),
            SIX_OCLOCK,
            Counter(Window(SIX_OCLOCK, SIX_OCLOCK + 6 * HOUR)),
            id="a hold does not keep it open beyond its end",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON, SIX_OCLOCK)),
            NOON + HOUR,
            Counter(Window(NOON + HOUR, NOON + 7 * HOUR)),
            id="nothing used and nothing held: it opens now",
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
            Counter(Window(MIDNIGHT - DAY, NOON + MINUTE), used=SOME),
            id="day became minute: the open window ends with this minute",
        ),
        pytest.param(
            quota("staff/daily", tokens=1000, per="6h"),
            Counter(Window(NOON - DAY, NOON + DAY), held=SOME),
            NOON,
            Counter(Window(NOON - DAY, SIX_OCLOCK), held=SOME),
            id="48h became 6h: the open window ends in six hours",
        ),
        pytest.param(
            quota("staff/daily", tokens=1000, per="6h"),
            Counter(Window(NOON - DAY, SIX_OCLOCK), used=SOME),
            NOON + HOUR,
            Counter(Window(NOON - DAY, SIX_OCLOCK), used=SOME),
            id="48h became 6h: the end that was stored stays",
        ),
        pytest.param(
            quota("staff/daily", tokens=1000, zone="Europe/Berlin"),
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            NOON,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT - HOUR), used=SOME),
            id="UTC became Berlin: the day ends an hour earlier",
        ),
        pytest.param(
            quota("staff/daily", tokens=1000, zone="America/New_York"),
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            NOON,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            id="UTC became New York: the day keeps its end",
        ),
        pytest.param(
            SUNDAY_WEEKLY,
            Counter(Window(MIDNIGHT - 2 * DAY, MIDNIGHT + 5 * DAY), used=SOME),
            NOON,
            Counter(Window(MIDNIGHT - 2 * DAY, MIDNIGHT + 4 * DAY), used=SOME),
            id="weeks start on Sunday now: the week ends on Sunday",
        ),
        pytest.param(
            quota("staff/daily", tokens=1000, per="minute"),
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT)),
            NOON,
            Counter(Window(NOON, NOON + MINUTE)),
            id="day became minute: a window in which nothing was used is replaced",
        ),
        pytest.param(
            quota("staff/daily", tokens=1000, per="minute"),
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            MIDNIGHT,
            Counter(Window(MIDNIGHT, MIDNIGHT + MINUTE)),
            id="day became minute: the next window lasts a minute",
        ),
        pytest.param(
            DAILY,
            Counter(Window(NOON, NOON + MINUTE), used=SOME),
            NOON + 1,
            Counter(Window(NOON, NOON + MINUTE), used=SOME),
            id="minute became day: the open window keeps its end",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            MIDNIGHT - DAY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            id="the clock jumped back inside the window: it stays open",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT), used=SOME),
            NOON - 30 * DAY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT - 30 * DAY), used=SOME),
            id="the clock jumped back to before the window: it ends no later than one that opens now",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(SIX_OCLOCK, SIX_OCLOCK + HOUR), held=SOME),
            NOON + 4 * HOUR,
            Counter(Window(SIX_OCLOCK, SIX_OCLOCK + HOUR), held=SOME),
            id="the clock jumped back to before the window: its end is never later than it was",
        ),
        pytest.param(
            SIX_HOURS,
            Counter(Window(NOON + DAY, NOON + DAY + 6 * HOUR)),
            NOON,
            Counter(Window(NOON + DAY, NOON + 6 * HOUR)),
            id="the clock jumped back to before the window: also if nothing was used in it",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT + HOUR, MIDNIGHT), used=SOME),
            MIDNIGHT,
            Counter(Window(MIDNIGHT + HOUR + 1, MIDNIGHT + DAY)),
            id="the clock jumped back to before the window: the next one has another opening",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT - DAY + 5, MIDNIGHT)),
            NOON,
            Counter(Window(MIDNIGHT - DAY + 5, MIDNIGHT)),
            id="a window that was not used opens no earlier than before",
        ),
        pytest.param(
            DAILY,
            Counter(Window(MIDNIGHT - DAY, MIDNIGHT - 23 * HOUR), used=SOME),
            NOON,
            Counter(Window(MIDNIGHT - 23 * HOUR, MIDNIGHT)),
            id="hour became day: the day does not open at midnight, as the hour did",
        ),
    ],
)
def test_the_window_of_a_counter_is_computed_from_the_clock(each, counter, now, expected):
    """On every access, so no reset job is needed."""
    assert counter_at(now, each, counter) == expected


@pytest.mark.parametrize(
    ("per", "now", "window"),
    [
        pytest.param("day", NOON, None, id="the same window"),
        pytest.param("day", MIDNIGHT, Window(MIDNIGHT, MIDNIGHT + DAY), id="the next day"),
        pytest.param("6h", SIX_OCLOCK, Window(SIX_OCLOCK, SIX_OCLOCK + 6 * HOUR), id="the next duration"),
    ],
)
def test_a_new_window_begins_with_what_calls_in_flight_hold_of_concurrent_quantities(per, now, window, monkeypatch):
    """All else begins at 0. A window that has only such a hold has not been opened by a call."""
    make_requests_concurrent(monkeypatch)
    each = quota("staff/calls", requests=2, per=per)
    counter = Counter(each.per.opening(NOON), Amount(50, 50), Amount(100, 400, 1))
    later = counter_at(now, each, counter)
    assert later == (counter if window is None else Counter(window, held=Amount(requests=1)))
    assert later.is_open is (window is None)


# ----------------------------------------------------------------------------------------------- overdraft and demand


@pytest.mark.parametrize(
    ("measure", "ceiling"), [("tokens", 1400), ("input_tokens", 1000), ("output_tokens", 1400), ("requests", 1000)]
)
def test_an_overdraft_raises_only_limits_on_what_is_generated(measure, ceiling):
    """It lets an answer end, so it adds nothing to a limit on input or on requests."""
    each = quota("staff/daily", overdraft=400, **{measure: 1000})
    assert each.ceiling(Limit(Measure(measure), 1000)) == ceiling
    assert replace(each, overdraft=0).ceiling(Limit(Measure(measure), 1000)) == 1000


@pytest.mark.parametrize(
    ("demand", "least", "is_bound"),
    [
        pytest.param(call(100, 400, 50), [150, 100, 50, 1], [True] * 4, id="it generates"),
        pytest.param(
            call(100, 400, 50, initial_hold=10, hidden_input=99),
            [150, 100, 50, 1],
            [True] * 4,
            id="it generates, and holds a part at first",
        ),
        pytest.param(call(100), [100, 100, 0, 1], [True] * 4, id="it asks for no output"),
        pytest.param(
            call(100, uses=Uses.INPUT), [100, 100, 0, 1], [True, True, False, True], id="it generates nothing"
        ),
        pytest.param(call(uses=Uses.REQUEST), [0, 0, 0, 1], [False, False, False, True], id="it costs a request"),
        pytest.param(call(0, 9, uses=Uses.OUTPUT), [9, 0, 9, 1], [True, False, True, True], id="it has a price"),
        pytest.param(call(uses=Uses.NOTHING), [0, 0, 0, 1], [False] * 4, id="it uses nothing"),
        pytest.param(call(0, 1), [1, 0, 1, 1], [True] * 4, id="it has no input"),
    ],
)
def test_a_demand_says_the_least_that_it_takes_and_which_limits_bind_it(demand, least, is_bound):
    """Its input and smallest answer; a limit binds the call if it counts something that the call can use."""
    assert [totals_of(call_amount(demand.input, demand.smallest))[each.position] for each in Measure] == least
    who = binding([quota("staff/all", **dict.fromkeys(Measure, 9))])
    [alternative] = who.common.rules(demand.uses).alternatives
    [rule] = alternative.rules
    bound = [limit.limit.measure for limit in rule.limits]
    assert [measure in bound for measure in Measure] == is_bound
    assert [limit.limit.measure for limit in rule.input_limits] == [Measure.TOKENS, Measure.INPUT_TOKENS]


def test_rules_are_made_once_for_all_users_of_the_same_groups():
    """And for each use of a call. A key that is limited to groups has rules of its own, which are made once too."""
    bound = BoundQuotas((CALLS,), (group_quotas("staff", DAILY), group_quotas("team", SHARED)))
    ann, bob = bound.for_user("ann"), bound.for_user("bob")
    assert ann.common.rules(Uses.INPUT) is bob.common.rules(Uses.INPUT) is bound.common.rules(Uses.INPUT)
    assert ann.common.rules(Uses.INPUT) is not ann.common.rules(Uses.OUTPUT)
    narrowed = bound.narrowed({"team"})
    assert narrowed is bound.narrowed({"team", "elsewhere"})
    assert narrowed.for_user("ann").common.rules(Uses.INPUT) is narrowed.common.rules(Uses.INPUT)
    assert [each.group for each in narrowed.common.rules(Uses.INPUT).alternatives] == ["team"]
    assert ann.keys() is ann.keys()


def test_the_number_of_narrowed_quotas_is_bounded(monkeypatch):
    """Whatever groups keys are limited to."""
    monkeypatch.setattr("proxy.policy.binding._NARROWED_MAX", 2)
    bound = binding([DAILY], [SHARED], ADMINS)
    sets = [{"staff"}, {"team"}, {"admins"}, {"staff", "team"}]
    narrowed = [bound.narrowed(names) for names in sets]
    assert [[each.group for each in one.groups] for one in narrowed] == [
        ["staff"],
        ["team"],
        ["admins"],
        ["staff", "team"],
    ]
    assert len(bound.common.narrowed) <= 2


# ----------------------------------------------------------------------------------------------------------- bindings

HOURLY = quota("staff/hourly", tokens=300, per="hour")
SHARED = quota("team/pot", tokens=5000, per="month", shared=True)
CALLS = quota("everyone/calls", requests=10)
SHADOW = quota("staff/shadow", tokens=500, enforce="shadow")
ADMINS = group_quotas("admins")


def test_a_binding_names_the_counters_that_a_decision_reads():
    """Those of all groups and of quotas in shadow, whichever group admits the call."""
    who = binding([DAILY, HOURLY], [SHARED], ADMINS, always=[CALLS], shadows=[SHADOW])
    assert [each.id for each in who.quotas] == [CALLS.id, DAILY.id, HOURLY.id, SHARED.id, SHADOW.id]
    assert list(who.keys()) == [
        ("user:ann", CALLS.id),
        ("user:ann", DAILY.id),
        ("user:ann", HOURLY.id),
        ("~team", SHARED.id),
        ("user:ann", SHADOW.id),
    ]


@pytest.mark.parametrize(
    ("who", "alternatives"),
    [
        pytest.param(binding(), [group_quotas("everyone")], id="no quota binds"),
        pytest.param(binding(always=[CALLS]), [group_quotas("everyone", CALLS)], id="only quotas of everyone"),
        pytest.param(
            binding([DAILY], ADMINS, always=[CALLS]),
            [group_quotas("staff", CALLS, DAILY), group_quotas("admins", CALLS)],
            id="any_group: one for each group, in order",
        ),
        pytest.param(
            binding([DAILY], [SHARED], ADMINS, always=[CALLS], combine="every_group"),
            [group_quotas("staff+team+admins", CALLS, DAILY, SHARED)],
            id="every_group: one for all groups",
        ),
        pytest.param(
            binding(always=[CALLS], combine="every_group"),
            [group_quotas("everyone", CALLS)],
            id="every_group: no group",
        ),
    ],
)
def test_alternatives_are_sets_of_quotas_that_must_have_room_together(who, alternatives):
    """Each contains the quotas of everyone, and none those in shadow."""
    assert list(replace(who, shadows=(SHADOW,)).alternatives()) == alternatives


# --------------------------------------------------------------------------------------------------- narrowed by keys


def test_a_key_that_is_limited_to_groups_leaves_out_the_others():
    """In any_group they are other ways to be admitted. In every_group they are limits, which must not be lost."""
    any_group = binding([DAILY], [SHARED], ADMINS, always=[CALLS], shadows=[SHADOW])
    team = replace(any_group, groups=(group_quotas("team", SHARED),))
    assert any_group.narrowed({"team", "elsewhere"}) == team
    assert any_group.narrowed({"staff", "team", "admins"}) == any_group
    assert any_group.narrowed({"elsewhere"}) is None
    assert any_group.narrowed(()) is None
    every_group = replace(any_group, combine="every_group")
    assert every_group.narrowed({"team"}) is every_group
    assert every_group.narrowed({"elsewhere"}) is None
    assert binding(always=[CALLS]).narrowed({"staff"}) is None  # no group of the key has a say


@given(data=st.data(), who=bindings(), demand=demands())
def test_a_narrowed_key_admits_only_what_its_owner_may(data, who, demand):
    """T138: whatever is used and held, and whichever groups the key is limited to."""
    narrowed = who.narrowed(data.draw(st.sets(st.sampled_from(["a", "b", "c"]))))
    if narrowed is None:
        return
    used = data.draw(counters_of(who))
    if isinstance(decide(demand, narrowed, used, NOON), Admitted):
        assert isinstance(decide(demand, who, used, NOON), Admitted)


def test_subjects_and_ids_say_whose_counter_it_is():
    """A subject gives the user's name back, whatever that is, and the id of a quota gives its group."""
    own, shared = quota("team/daily", tokens=1), quota("team/pot", tokens=1, shared=True)
    assert own.key_for("user:ann") == (user_subject("user:ann"), "team/daily")
    assert user_of(user_subject("user:ann")) == "user:ann"
    assert shared.key_for("ann") == (shared_subject("team"), "team/pot")
    assert group_of(shared.id) == "team"


@pytest.mark.parametrize(
    ("pattern", "others"),
    [("gpt-4o", []), ("gpt-*", ["gpt-4*", "o*"]), ("o?", ["o[0-9]"]), ("[op]1", ["1*"]), ("[!a]1", ["a1", "1"])],
)
def test_a_sample_of_a_pattern_is_of_no_other_one(pattern, others):
    """It stands for the names that only this pattern matches."""
    name = sample_name(pattern)
    assert Globs((pattern,)).match(name)
    assert not Globs(others).match(name)
