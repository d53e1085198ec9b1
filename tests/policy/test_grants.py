"""Grants raise the limits of quotas until an instant, for one user or for all, and end by the clock.

The user is ann and the time is noon UTC on Tuesday, 24 November 2026, unless a test says otherwise.
"""

from dataclasses import replace
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refusal
from proxy.formats.limit_headers import anthropic_limit_headers, rate_limit_headers
from proxy.formats.refusal import refusal
from proxy.policy.admission import Admitted, NotAdmitted, Verdict, decide
from proxy.policy.amounts import Uses
from proxy.policy.binding import Binding
from proxy.policy.catalog import Catalog, Model, Upstream
from proxy.policy.policy import Policy
from proxy.policy.quota import Grant, Limit, Quota, grants_by_quota
from proxy.policy.status import first_to_refuse, quota_statuses
from tests.builders import DAY, HOUR, NOON, binding, call, counters, grant, group, instant, policy, quota
from tests.random_rules import bindings, counters_of, demands

MIDNIGHT = instant("2026-11-25 00:00")
DAILY = quota("staff/daily", tokens=1000)
MORE = grant(DAILY.id, tokens=500, until=NOON + HOUR)
UTC = ZoneInfo("UTC")


def _maximum(who: Binding, now: int = NOON) -> int:
    """The limit of the only quota."""
    [each] = who.at(now).quotas
    [limit] = each.limits
    return limit.maximum


# ----------------------------------------------------------------------------------------------- the limits at a time


def test_a_grant_raises_the_limit_until_its_end():
    """At the end itself it has ended already."""
    who = binding([DAILY], grants=[MORE])
    assert [_maximum(who, now) for now in (NOON, MORE.until - 1, MORE.until)] == [1500, 1500, 1000]


def test_quotas_of_a_policy_are_bound_with_their_grants():
    """And without those on other quotas."""
    hourly = quota("staff/hourly", per="1h", tokens=100)
    grants = grants_by_quota([MORE, grant(hourly.id, tokens=50, until=NOON + HOUR)])
    of = policy(group("staff", DAILY, hourly), grants=grants)
    assert of.quotas == {DAILY.id: DAILY, hourly.id: hourly}
    assert _maximum(of.bound(DAILY).for_user("ann")) == 1500
    assert [each.limits[0].maximum for each in of.bound(DAILY, hourly).for_user("ann").at(NOON).quotas] == [1500, 150]


def test_grants_are_summed():
    """Those for all and those for the user, until each of them ends."""
    who = binding([DAILY], grants=[MORE, grant(DAILY.id, tokens=20, until=NOON + 2 * HOUR, user="ann")])
    assert [_maximum(who, NOON + hours * HOUR) for hours in (0, 1, 2)] == [1520, 1020, 1000]


def test_a_grant_on_a_measure_without_a_limit_has_no_effect():
    """A grant of requests does not raise a limit of tokens, and adds no limit."""
    who = binding([DAILY], grants=[grant(DAILY.id, requests=5, until=NOON + HOUR)])
    assert who.at(NOON).quotas == (DAILY,)


def test_a_grant_raises_one_of_several_limits():
    """The others stay."""
    both = quota("staff/daily", tokens=1000, requests=10)
    raised = binding([both], grants=[MORE]).at(NOON).quotas
    assert raised == (quota("staff/daily", tokens=1500, requests=10),)


def test_a_binding_without_grants_is_its_own_at_any_time():
    """It costs no new values on the path of a call."""
    who = binding([DAILY])
    assert who.at(NOON) is who


def test_a_grant_counts_only_once():
    """A binding that has the limits of an instant has no grants to add again."""
    raised = binding([DAILY], grants=[MORE]).at(NOON)
    assert raised.at(NOON) is raised


def test_all_parts_of_a_binding_are_raised():
    """The quotas of everyone, of groups and in shadow, each by its own grants."""
    everyone, shadow = quota("everyone/day", tokens=1), quota("staff/watch", tokens=3, enforce="shadow")
    granted = [grant(each.id, tokens=10, until=NOON + 1) for each in (everyone, DAILY, shadow)]
    who = binding([DAILY], always=[everyone], shadows=[shadow], combine="every_group", grants=granted)
    assert [each.limits[0].maximum for each in who.at(NOON).quotas] == [11, 1010, 13]
    assert who.at(NOON).combine == "every_group"


# --------------------------------------------------------------------------------------------------- whose grants run


def _policy(*grants: Grant, **settings: object) -> Policy:
    pot = quota("team/pot", tokens=100, shared=True)
    return policy(group("staff", DAILY), group("team", pot), grants=grants_by_quota(grants), **settings)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        pytest.param("ann", [1300, 100], id="her own and those for all"),
        pytest.param("bob", [1200, 100], id="those for all"),
    ],
)
def test_a_grant_is_for_one_user_or_for_all(user: str, expected: list[int]):
    """One row is enough for each member of a group."""
    granted = _policy(
        grant(DAILY.id, tokens=200, until=NOON + HOUR),
        grant(DAILY.id, tokens=100, until=NOON + HOUR, user="ann"),
        grant("team/pot", tokens=9, until=NOON + HOUR, user="carl"),
    )
    bound = granted.binding(("staff", "team"), "fast")
    assert bound is not None
    assert [each.limits[0].maximum for each in bound.for_user(user).at(NOON).quotas] == expected
    shown = granted.all_quotas(("staff", "team")).for_user(user)
    assert [each.limits[0].maximum for each in shown.at(NOON).quotas] == expected


def test_a_binding_has_only_the_grants_on_its_own_quotas():
    """So grants on other quotas cost a call nothing."""
    granted = _policy(grant("team/pot", tokens=9, until=NOON + HOUR))
    bound = granted.binding(("staff",), "fast")
    assert bound is not None
    assert not bound.grants
    assert bound.for_user("ann").grants == {}


def test_a_grant_for_another_user_costs_a_binding_nothing():
    """It has no grants."""
    bound = _policy(grant(DAILY.id, tokens=9, until=NOON + HOUR, user="bob")).binding(("staff",), "fast")
    assert bound is not None
    assert bound.for_user("ann").at(NOON) == bound.for_user("ann")
    assert bound.for_user("ann").grants == {}


def test_a_key_that_is_limited_to_groups_keeps_the_grants():
    """They are on the quotas of the groups that are left."""
    bound = _policy(MORE).binding(("staff", "team"), "fast")
    assert bound is not None
    narrowed = bound.narrowed({"staff"})
    assert narrowed is not None
    assert _maximum(narrowed.for_user("ann")) == 1500


def test_policies_that_differ_in_grants_are_not_equal():
    """Nor are their bindings, so nothing that compares them takes one for the other."""
    assert _policy(MORE) != _policy()
    assert _policy(MORE).binding(("staff",), "fast") != _policy().binding(("staff",), "fast")
    assert binding([DAILY], grants=[MORE]) != binding([DAILY])


# ---------------------------------------------------------------------------------------------------------- decisions


def test_a_grant_binds_like_the_limit():
    """Of 1,500 tokens 900 are used: 600 are left, and 601 are not."""
    who = binding([DAILY], grants=[MORE])
    found = counters(who, used={DAILY.id: 900})
    assert isinstance(decide(call(600), who, found, NOON), Admitted)
    refused = decide(call(601), who, found, NOON)
    assert isinstance(refused, NotAdmitted)
    assert [block.limit for block in refused.blocks] == [Limit(DAILY.limits[0].measure, 1500)]
    assert refused.blocks[0].quota.limits == (refused.blocks[0].limit,)


def test_after_the_end_of_a_grant_nothing_remains_until_the_reset():
    """1,200 tokens were used, which are more than the limit."""
    who = binding([DAILY], grants=[MORE])
    found = counters(who, used={DAILY.id: 1200})
    assert isinstance(decide(call(1), who, found, NOON), Admitted)
    later = decide(call(1), who, found, MORE.until)
    assert isinstance(later, NotAdmitted)
    assert (later.verdict, later.admissible_at) == (Verdict.EXHAUSTED, MIDNIGHT)
    status = quota_statuses(who, found, MORE.until)[DAILY.id]
    assert status.use_of(status.quota.limits[0])["remaining"] == 0


def test_a_grant_counts_in_every_window_until_its_end():
    """One of two days lets 1,500 tokens pass tomorrow too."""
    who = binding([DAILY], grants=[replace(MORE, until=NOON + 2 * DAY)])
    found = counters(who, used={DAILY.id: 1500})
    assert isinstance(decide(call(1), who, found, NOON), NotAdmitted)
    assert isinstance(decide(call(1500), who, found, NOON + DAY), Admitted)


def test_a_call_that_fits_only_by_a_grant_is_told_no_reset_after_its_end():
    """1,200 tokens fit into 1,500 and not into 1,000. At midnight the grant has ended, so no time helps."""
    who = binding([DAILY], grants=[MORE])
    refused = decide(call(1200), who, counters(who, used={DAILY.id: 900}), NOON)
    assert isinstance(refused, NotAdmitted)
    assert (refused.verdict, refused.admissible_at) == (Verdict.EXHAUSTED, None)
    lasting = binding([DAILY], grants=[replace(MORE, until=MIDNIGHT + 1)])
    refused = decide(call(1200), lasting, counters(who, used={DAILY.id: 900}), NOON)
    assert isinstance(refused, NotAdmitted)
    assert refused.admissible_at == MIDNIGHT


def test_the_reset_is_that_of_a_quota_that_is_over_its_limit_when_the_grant_has_ended():
    """The hourly quota is used up until 13:00. The daily one has room until 12:30 only, and then from midnight on."""
    hourly = quota("staff/hourly", tokens=100, per="hour")
    who = binding([hourly, DAILY], grants=[replace(MORE, until=NOON + HOUR // 2)])
    refused = decide(call(1), who, counters(who, used={hourly.id: 100, DAILY.id: 1200}), NOON)
    assert isinstance(refused, NotAdmitted)
    assert [block.quota.id for block in refused.blocks] == [hourly.id]
    assert refused.admissible_at == MIDNIGHT


def test_a_call_that_would_only_wait_at_the_reset_is_told_that_reset():
    """A grant on the daily quota ends at 12:30; then calls in flight hold what is left of it."""
    hourly = quota("staff/hourly", tokens=100, per="hour")
    who = binding([hourly, DAILY], grants=[replace(MORE, until=NOON + HOUR // 2)])
    found = counters(who, used={hourly.id: 100, DAILY.id: 800}, held={DAILY.id: 200})
    refused = decide(call(1), who, found, NOON)
    assert isinstance(refused, NotAdmitted)
    assert refused.admissible_at == NOON + HOUR


@given(st.data(), demands())
def test_decisions_are_by_the_limits_of_their_instant(data, demand):
    """With grants they are those of quotas that have these limits by themselves."""
    who = data.draw(bindings(grants=True))
    found = data.draw(counters_of(who))
    now = NOON + data.draw(st.sampled_from([0, 1, 10_000, HOUR]))
    by_hand = {each.id: _by_hand(each, who, now) for each in who.quotas}
    raised = Binding(
        tuple(by_hand[each.id] for each in who.always),
        tuple(replace(one, quotas=tuple(by_hand[each.id] for each in one.quotas)) for one in who.groups),
        tuple(by_hand[each.id] for each in who.shadows),
        who.combine,
        user=who.user,
    )
    decision, expected = decide(demand, who, found, now), decide(demand, raised, found, now)
    assert (replace(decision, then=None) if isinstance(decision, NotAdmitted) else decision) == expected


def _by_hand(each: Quota, who: Binding, now: int) -> Quota:
    """The quota with its limits at an instant. How long the smallest answer is goes by the limits without grants."""
    limits = []
    for limit in each.limits:
        granted = [one.amount for one in who.grants.get(each.id, ()) if one.measure == limit.measure]
        ends = [one.until for one in who.grants.get(each.id, ()) if one.measure == limit.measure]
        more = sum(amount for amount, until in zip(granted, ends, strict=True) if until > now)
        limits.append(Limit(limit.measure, limit.maximum + more))
    quota = replace(each, limits=tuple(limits))
    object.__setattr__(quota, "answer_limit", each.answer_limit)
    return quota


@given(st.data(), demands())
def test_the_reset_of_a_refusal_is_true_with_grants_that_end(data, demand):
    """At that instant no quota refuses the call any more; one millisecond earlier one still does."""
    who = data.draw(bindings(grants=True))
    found = data.draw(counters_of(who))
    refused = decide(demand, who, found, NOON)
    if not isinstance(refused, NotAdmitted) or refused.verdict is not Verdict.EXHAUSTED:
        return
    if refused.admissible_at is None:
        never = decide(demand, who, found, NOON + 400 * DAY)
        assert isinstance(never, NotAdmitted)
        assert never.verdict > Verdict.BUSY
        return
    at, before = (decide(demand, who, found, refused.admissible_at - early) for early in (0, 1))
    assert isinstance(at, Admitted) or (isinstance(at, NotAdmitted) and at.verdict is Verdict.BUSY)
    assert isinstance(before, NotAdmitted)
    assert before.verdict > Verdict.BUSY


# ------------------------------------------------------------------------------------------------------- what is told


def test_a_status_has_the_raised_limit_and_the_running_grants():
    """Those that have ended, and those that have no effect, are not shown. The end is rounded down."""
    granted = [
        replace(MORE, until=NOON + HOUR + 999),
        grant(DAILY.id, id="g2", tokens=9, until=NOON),
        grant(DAILY.id, id="g3", requests=9, until=NOON + HOUR),
    ]
    who = binding([DAILY], grants=granted)
    shown = quota_statuses(who, counters(who, used={DAILY.id: 300}), NOON)[DAILY.id].as_json(
        ZoneInfo("Europe/Berlin")
    )
    assert shown["tokens"] == {"limit": 1500, "used": 300, "held": 0, "remaining": 1200, "percent": 20.0}
    assert shown["grants"] == [
        {
            "id": "g1",
            "measure": "tokens",
            "amount": 500,
            "until": (NOON + HOUR) // 1000,
            "until_at": "2026-11-24T14:00:00+01:00",
        }
    ]
    after = quota_statuses(who, {}, NOON + 2 * HOUR)[DAILY.id].as_json(UTC)
    assert (after["tokens"]["limit"], after["grants"]) == (1000, [])


def test_headers_go_by_the_raised_limits():
    """`lab` has 1,100 of 1,200 left and `staff` all of 1,000. By the limits without grants it would be the other."""
    lab = quota("lab/daily", tokens=200)
    who = binding([DAILY], [lab], grants=[grant(lab.id, tokens=1000, until=NOON + HOUR)])
    statuses = quota_statuses(who, counters(who, used={lab.id: 100}), NOON)
    status, use = first_to_refuse(who, statuses)["tokens"]
    assert (status.quota.id, use.limit.maximum) == (lab.id, 1200)
    headers = rate_limit_headers(who, statuses, NOON)
    assert headers["x-ratelimit-limit-tokens"] == "1200"
    assert headers["x-ratelimit-remaining-tokens"] == "1100"
    assert '"lab/daily";q=1200;' in headers["ratelimit-policy"]
    assert '"lab/daily";r=1100;' in headers["ratelimit"]
    assert anthropic_limit_headers(who, statuses)["anthropic-ratelimit-tokens-limit"] == "1200"


@given(st.data())
def test_the_headers_are_those_of_quotas_with_these_limits(data):
    """No raised limit is compared with one that is not raised."""
    who = data.draw(bindings(grants=True))
    found = data.draw(counters_of(who))
    raised = who.at(NOON)
    assert rate_limit_headers(who, quota_statuses(who, found, NOON), NOON) == rate_limit_headers(
        raised, quota_statuses(raised, found, NOON), NOON
    )


def test_a_refusal_names_the_raised_limit():
    """And lists the quota with its grant."""
    who = binding([DAILY], grants=[MORE])
    found = counters(who, used={DAILY.id: 1500})
    decision = decide(call(1), who, found, NOON)
    assert isinstance(decision, NotAdmitted)
    statuses = quota_statuses(who, found, NOON)
    error = refusal(decision, statuses, policy=policy(), endpoint="chat", now=NOON, busy_s=2)
    assert isinstance(error, Refusal)
    body = error.body()["error"]
    assert "1500 of 1500 tokens. Resets at 2026-11-25T00:00:00+00:00" in body["message"]
    assert [each["id"] for each in body["quotas"][0]["grants"]] == ["g1"]


def test_a_refusal_without_a_true_reset_tells_none():
    """The limit is 0 without the grant, so a call at midnight would be refused too."""
    off = quota("staff/off", tokens=0)
    who = binding([off], grants=[grant(off.id, tokens=100, until=NOON + HOUR)])
    found = counters(who, used={off.id: 100})
    decision = decide(call(1), who, found, NOON)
    assert isinstance(decision, NotAdmitted)
    error = refusal(decision, quota_statuses(who, found, NOON), policy=policy(), endpoint="chat", now=NOON, busy_s=2)
    assert error.headers == {"x-should-retry": "false"}
    assert error.body()["error"]["message"] == 'Quota "staff/off" is used up: 100 of 100 tokens.'
    assert error.body()["error"]["reset_at"] is None


# --------------------------------------------------------------------------------------------- limits of 0 and grants

OFF = quota("staff/off", tokens=0)
UP = Upstream("up", "http://upstream.example/v1", None)
NO_LIST = Catalog({"up": UP}, None, UP)
ONE_MODEL = Catalog({"up": UP}, {"fast": Model("fast", UP, "fast")})


@pytest.mark.parametrize("catalog", [NO_LIST, ONE_MODEL])
def test_a_running_grant_opens_a_quota_with_a_limit_of_0(catalog: Catalog):
    """For the user whom it is for, until it ends."""
    rules = policy(
        group("staff", OFF), grants=grants_by_quota([grant(OFF.id, tokens=9, until=NOON + HOUR, user="ann")])
    )

    def closing(user: str, now: int) -> tuple[Quota, ...]:
        return rules.closing(("staff",), catalog, Uses.INPUT, user=user, now=now)

    assert closing("ann", NOON) == ()
    assert closing("bob", NOON) == (OFF,)
    assert closing("ann", NOON + HOUR) == (OFF,)


@pytest.mark.parametrize("catalog", [NO_LIST, ONE_MODEL])
def test_a_grant_does_not_open_what_another_limit_of_0_closes(catalog: Catalog):
    """A grant of tokens leaves a limit of 0 requests; one on the quota of everyone leaves that of the group."""
    both = quota("staff/off", tokens=0, requests=0)
    granted = grants_by_quota([grant(both.id, tokens=9, until=NOON + HOUR)])
    rules = policy(group("staff", both), grants=granted)
    assert rules.closing(("staff",), catalog, Uses.INPUT, user="ann", now=NOON) == (both,)
    never = quota("everyone/never", tokens=0)
    granted = grants_by_quota([grant(never.id, tokens=9, until=NOON + HOUR)])
    rules = policy(group("everyone", never), group("staff", OFF), grants=granted)
    assert rules.closing(("staff",), catalog, Uses.INPUT, user="ann", now=NOON) == (OFF,)
