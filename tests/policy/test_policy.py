"""Which quotas bind the members of which groups on which model, and which models they may use."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.admission import Admitted, decide
from proxy.policy.amounts import Uses
from proxy.policy.binding import BoundQuotas, GroupQuotas
from proxy.policy.catalog import Catalog, Model, Naming, Upstream
from proxy.policy.policy import _BINDINGS_MAX, Group, Policy
from proxy.policy.quota import Globs, Quota
from tests.builders import NOON, call, group, policy, quota
from tests.random_rules import quota_lists

DAILY = quota("staff/daily", tokens=1000)
FRONTIER = quota("staff/frontier", tokens=100, models=["gpt-4o", "o*"])
WEEKLY = quota("team/weekly", tokens=5000, per="week")
CALLS = quota("everyone/calls", requests=10)
FALLBACK = quota("default/daily", tokens=50)
ONLY_MINI = quota("everyone/mini", tokens=9, models=["gpt-4o-mini"])
IN_SHADOW = quota("staff/shadow", tokens=9, enforce="shadow")

STAFF = group("staff", DAILY, FRONTIER)
TEAM = group("team", WEEKLY)
MINI_TEAM = group("team", WEEKLY, models=["gpt-4o-mini", "fast"])
EVERYONE = group("everyone", CALLS)
DEFAULT = group("default", FALLBACK)
ADMINS = group("admins", unlimited=True)
MINI_ADMINS = group("admins", unlimited=True, models=["gpt-4o-mini"])
FRONTIER_ONLY = group("staff", FRONTIER)
SHADOW_ONLY = group("staff", IN_SHADOW)
ONLY_CALLS = quota("default/calls", requests=3)
FALLBACK_CALLS = group("default", ONLY_CALLS)
TEN_CALLS = quota("team/calls", requests=10)
TEAM_CALLS = group("team", TEN_CALLS)
TEN_OF_STAFF = quota("staff/calls", requests=10)


def summary(binding: BoundQuotas | None) -> tuple[list[str], dict[str, list[str]], list[str]] | None:
    """A binding as quota ids: those of everyone, those of each group, and those in shadow."""
    if binding is None:
        return None
    return (
        [each.id for each in binding.always],
        {one.group: [each.id for each in one.quotas] for one in binding.groups},
        [each.id for each in binding.shadows],
    )


# --------------------------------------------------------------------------------------- which quotas bind which user


@pytest.mark.parametrize(
    ("groups", "member_of", "model", "expected"),
    [
        pytest.param(
            [STAFF], ["staff"], "gpt-4o", ([], {"staff": [DAILY.id, FRONTIER.id]}, []), id="all quotas that match"
        ),
        pytest.param([STAFF], ["staff"], "fast", ([], {"staff": [DAILY.id]}, []), id="not those for other models"),
        pytest.param(
            [STAFF, TEAM], ["staff"], "fast", ([], {"staff": [DAILY.id]}, []), id="not those of other groups"
        ),
        pytest.param(
            [STAFF, TEAM],
            ["staff", "team"],
            "fast",
            ([], {"staff": [DAILY.id], "team": [WEEKLY.id]}, []),
            id="two groups",
        ),
        # a quota matches only models that its group's list contains
        pytest.param(
            [MINI_TEAM],
            ["team"],
            "fast",
            ([], {"team": [WEEKLY.id]}, []),
            id="a quota for all models matches its group's list",
        ),
        pytest.param(
            [MINI_TEAM], ["team"], "gpt-4o", None, id="a quota for all models matches nothing beyond its group's list"
        ),
        pytest.param(
            [group("staff", FRONTIER, models=["gpt-4o*"])],
            ["staff"],
            "o3",
            None,
            id="both lists must contain the model",
        ),
        pytest.param(
            [group("staff", FRONTIER, models=["gpt-4o*"])],
            ["staff"],
            "gpt-4o-mini",
            None,
            id="both lists must contain the model, the other way round",
        ),
        # a group without a quota for the model is ignored
        pytest.param(
            [FRONTIER_ONLY, TEAM],
            ["staff", "team"],
            "fast",
            ([], {"team": [WEEKLY.id]}, []),
            id="a group without a quota for the model",
        ),
        pytest.param(
            [group("empty"), TEAM],
            ["empty", "team"],
            "fast",
            ([], {"team": [WEEKLY.id]}, []),
            id="a group without quotas",
        ),
        # everyone
        pytest.param(
            [EVERYONE, STAFF], ["staff"], "fast", ([CALLS.id], {"staff": [DAILY.id]}, []), id="everyone: in addition"
        ),
        pytest.param([EVERYONE, STAFF], [], "fast", ([CALLS.id], {}, []), id="everyone: alone"),
        pytest.param(
            [group("everyone", ONLY_MINI), STAFF],
            ["staff"],
            "fast",
            ([], {"staff": [DAILY.id]}, []),
            id="everyone: not for this model",
        ),
        pytest.param(
            [group("everyone", CALLS, models=["gpt-4o"]), STAFF],
            ["staff"],
            "fast",
            ([], {"staff": [DAILY.id]}, []),
            id="everyone: only models of everyone's list",
        ),
        # default
        pytest.param(
            [DEFAULT, STAFF], [], "fast", ([], {"default": [FALLBACK.id]}, []), id="default: a user of no group"
        ),
        pytest.param(
            [DEFAULT, STAFF],
            ["staff"],
            "fast",
            ([], {"staff": [DAILY.id]}, []),
            id="default: not for a user with a quota",
        ),
        pytest.param(
            [DEFAULT, FRONTIER_ONLY],
            ["staff"],
            "fast",
            ([], {"default": [FALLBACK.id]}, []),
            id="default: for a user without a quota for this model",
        ),
        pytest.param(
            [DEFAULT, EVERYONE],
            [],
            "fast",
            ([CALLS.id], {"default": [FALLBACK.id]}, []),
            id="default: a quota of everyone is not the user's own",
        ),
        pytest.param(
            [DEFAULT, ADMINS], ["admins"], "fast", ([], {"admins": []}, []), id="default: not for an unlimited user"
        ),
        pytest.param(
            [DEFAULT, MINI_ADMINS],
            ["admins"],
            "fast",
            ([], {"default": [FALLBACK.id]}, []),
            id="default: for a user who is unlimited for other models",
        ),
        pytest.param(
            [group("default", FALLBACK, models=["gpt-4o"])],
            [],
            "fast",
            None,
            id="default: only models of its own list",
        ),
        pytest.param(
            [group("default", unlimited=True)], [], "fast", ([], {"default": []}, []), id="default: can be unlimited"
        ),
        # unlimited
        pytest.param(
            [STAFF, ADMINS],
            ["staff", "admins"],
            "fast",
            ([], {"staff": [DAILY.id], "admins": []}, []),
            id="unlimited: a group like others",
        ),
        pytest.param(
            [MINI_ADMINS], ["admins"], "gpt-4o-mini", ([], {"admins": []}, []), id="unlimited: for its models"
        ),
        pytest.param([MINI_ADMINS], ["admins"], "gpt-4o", None, id="unlimited: for no other models"),
        # nothing covers the model
        pytest.param([STAFF], [], "fast", None, id="nothing covers the model: a user of no group"),
        pytest.param(
            [FRONTIER_ONLY], ["staff"], "fast", None, id="nothing covers the model: quotas for other models"
        ),
        pytest.param([], [], "fast", None, id="a policy without groups"),
        # shadow
        pytest.param(
            [group("staff", DAILY, IN_SHADOW)],
            ["staff"],
            "fast",
            ([], {"staff": [DAILY.id]}, [IN_SHADOW.id]),
            id="shadow: in a group with an enforced quota",
        ),
        pytest.param(
            [SHADOW_ONLY, TEAM],
            ["staff", "team"],
            "fast",
            ([], {"team": [WEEKLY.id]}, [IN_SHADOW.id]),
            id="shadow: does not replace another group's quotas",
        ),
        pytest.param(
            [SHADOW_ONLY, EVERYONE],
            ["staff"],
            "fast",
            ([CALLS.id], {}, [IN_SHADOW.id]),
            id="shadow: does not replace those of everyone",
        ),
        pytest.param(
            [SHADOW_ONLY, DEFAULT],
            ["staff"],
            "fast",
            ([], {"default": [FALLBACK.id]}, [IN_SHADOW.id]),
            id="shadow: does not replace those of default",
        ),
        pytest.param(
            [group("everyone", replace(CALLS, enforce="shadow")), STAFF],
            ["staff"],
            "fast",
            ([], {"staff": [DAILY.id]}, [CALLS.id]),
            id="shadow: of everyone",
        ),
        pytest.param(
            [group("default", replace(FALLBACK, enforce="shadow"))],
            [],
            "fast",
            ([], {}, [FALLBACK.id]),
            id="shadow: of default, which then binds nobody",
        ),
        pytest.param(
            [group("admins", replace(IN_SHADOW, group="admins"), unlimited=True)],
            ["admins"],
            "fast",
            ([], {"admins": []}, ["admins/shadow"]),
            id="shadow: of an unlimited group",
        ),
    ],
)
def test_which_quotas_bind(groups, member_of, model, expected):
    """A binding has the user's groups that apply to the model; None means that `unmatched: refuse` decides."""
    assert summary(policy(*groups).binding(tuple(member_of), model)) == expected


def test_a_model_that_no_quota_covers_may_be_allowed():
    """`unmatched: allow`: no quota binds, and the call is admitted."""
    binding = policy(STAFF, unmatched="allow").binding((), "fast")
    assert summary(binding) == ([], {}, [])
    assert isinstance(decide(call(10**6, 10**6), binding.for_user("ann"), {}, NOON), Admitted)


def test_unmatched_allow_does_not_lift_quotas_that_match():
    """It only concerns models without a quota."""
    allowing = policy(EVERYONE, DEFAULT, STAFF, unmatched="allow")
    assert summary(allowing.binding(("staff",), "fast")) == ([CALLS.id], {"staff": [DAILY.id]}, [])
    assert summary(allowing.binding((), "fast")) == ([CALLS.id], {"default": [FALLBACK.id]}, [])


@pytest.mark.parametrize("combine", ["any_group", "every_group"])
def test_a_binding_has_the_user_and_how_groups_combine(combine):
    """A decision needs no policy."""
    binding = policy(STAFF, combine=combine).binding(("staff",), "fast").for_user("ann")
    assert (binding.user, binding.combine) == ("ann", combine)


def test_a_binding_keeps_the_users_order_of_groups():
    """It is the policy's order: a call is admitted through the first group that can carry it."""
    for order in (("staff", "team"), ("team", "staff")):
        binding = policy(STAFF, TEAM).binding(order, "fast")
        assert binding.groups == tuple(
            GroupQuotas(name, {"staff": (DAILY,), "team": (WEEKLY,)}[name]) for name in order
        )


def test_a_new_quota_in_shadow_admits_no_more_than_before():
    """While a team tries a quota, its members may use as much as before, to the token."""
    before, trying = policy(DEFAULT, group("staff")), policy(DEFAULT, SHADOW_ONLY)
    small, large = call(10, 10), call(10**6, 10)
    for demand in (small, large):
        decisions = [
            decide(demand, each.binding(("staff",), "fast").for_user("ann"), {}, NOON) for each in (before, trying)
        ]
        assert [isinstance(decision, Admitted) for decision in decisions] == [demand is small] * 2


@pytest.mark.parametrize(
    ("groups", "member_of", "shown"),
    [
        pytest.param([], [], [], id="no groups"),
        pytest.param([EVERYONE, STAFF, TEAM], ["staff"], [CALLS, DAILY, FRONTIER], id="everyone's and the group's"),
        pytest.param([STAFF, TEAM], ["team", "staff"], [WEEKLY, DAILY, FRONTIER], id="of all the user's groups"),
        pytest.param([EVERYONE, DEFAULT], [], [CALLS, FALLBACK], id="default: a user of no group"),
        pytest.param(
            [DEFAULT, STAFF], ["staff"], [DAILY, FRONTIER], id="default: the user has a quota for every model"
        ),
        pytest.param([DEFAULT, ADMINS], ["admins"], [], id="default: the user is unlimited for every model"),
        pytest.param(
            [DEFAULT, FRONTIER_ONLY],
            ["staff"],
            [FRONTIER, FALLBACK],
            id="default: the user has quotas for some models",
        ),
        pytest.param(
            [DEFAULT, MINI_TEAM], ["team"], [WEEKLY], id="default: the user has a quota for all models of the list"
        ),
        pytest.param(
            [DEFAULT, MINI_TEAM, group("lab", models=["o*"])],
            ["team", "lab"],
            [WEEKLY, FALLBACK],
            id="default: another group allows a model without a quota",
        ),
        pytest.param(
            [DEFAULT, MINI_ADMINS, group("lab", models=["o*"])],
            ["admins", "lab"],
            [FALLBACK],
            id="default: another group allows a model that is not unlimited",
        ),
        pytest.param([group("staff", DAILY, IN_SHADOW)], ["staff"], [DAILY, IN_SHADOW], id="quotas in shadow too"),
        pytest.param(
            [DEFAULT, SHADOW_ONLY], ["staff"], [IN_SHADOW, FALLBACK], id="default: a quota in shadow is none"
        ),
        pytest.param(
            [FALLBACK_CALLS, STAFF],
            ["staff"],
            [DAILY, FRONTIER, ONLY_CALLS],
            id="default: the user's quotas count only tokens",
        ),
        pytest.param(
            [FALLBACK_CALLS, TEAM_CALLS], ["team"], [TEN_CALLS], id="default: the user's quotas count requests too"
        ),
    ],
)
def test_a_user_is_shown_every_quota_that_can_bind_on_some_model(groups, member_of, shown):
    """`/v1/quota` is asked without a model, so no quota that could refuse a call may be missing."""
    own, each_policy = tuple(member_of), policy(*groups)
    assert sorted(each.id for each in each_policy.all_quotas(own).quotas) == sorted(each.id for each in shown)
    for model in ("gpt-4o", "gpt-4o-mini", "o3", "fast"):
        if each_policy.may_use(own, model) and (binding := each_policy.binding(own, model)):
            assert {each.id for each in binding.quotas} <= {each.id for each in shown}
        for counted in (Uses.REQUEST, Uses.OUTPUT):
            if each_policy.may_use(own, model) and (binding := each_policy.binding(own, model, counted)):
                assert {each.id for each in binding.quotas} <= {each.id for each in shown}


# ---------------------------------------------------------------------------- calls that only some quotas can count


@pytest.mark.parametrize(
    ("groups", "member_of", "counted", "expected"),
    [
        pytest.param([STAFF], ["staff"], Uses.REQUEST, None, id="a quota of tokens"),
        pytest.param([STAFF], ["staff"], Uses.OUTPUT, ([], {"staff": [DAILY.id]}, []), id="a price: tokens count it"),
        pytest.param(
            [group("staff", quota("staff/in", input_tokens=9))], ["staff"], Uses.OUTPUT, None, id="a price: input"
        ),
        pytest.param(
            [EVERYONE, STAFF],
            ["staff"],
            Uses.REQUEST,
            ([CALLS.id], {"staff": [DAILY.id]}, []),
            id="everyone's quota counts requests, whichever group admits the call",
        ),
        pytest.param(
            [EVERYONE, STAFF, TEAM_CALLS],
            ["staff", "team"],
            Uses.REQUEST,
            ([CALLS.id], {"team": [TEN_CALLS.id]}, []),
            id="a group that counts requests comes before everyone's",
        ),
        pytest.param(
            [group("staff", DAILY, TEN_OF_STAFF)],
            ["staff"],
            Uses.REQUEST,
            ([], {"staff": [DAILY.id, TEN_OF_STAFF.id]}, []),
            id="all quotas of a group that counts requests: the answer may state tokens",
        ),
        pytest.param(
            [STAFF, TEAM_CALLS],
            ["staff", "team"],
            Uses.REQUEST,
            ([], {"team": [TEN_CALLS.id]}, []),
            id="only the group that counts requests admits",
        ),
        pytest.param(
            [group("staff", quota("staff/both", tokens=9, requests=9))],
            ["staff"],
            Uses.REQUEST,
            ([], {"staff": ["staff/both"]}, []),
            id="tokens and requests in one quota",
        ),
        pytest.param(
            [group("staff", DAILY, quota("staff/after", requests=9, enforce="after"))],
            ["staff"],
            Uses.REQUEST,
            ([], {"staff": [DAILY.id, "staff/after"]}, []),
            id="enforce: after counts",
        ),
        pytest.param(
            [group("staff", DAILY, quota("staff/shadow", requests=9, enforce="shadow"))],
            ["staff"],
            Uses.REQUEST,
            None,
            id="a quota in shadow does not cover it",
        ),
        pytest.param(
            [TEAM_CALLS, group("lab", quota("lab/shadow", requests=9, enforce="shadow"))],
            ["team", "lab"],
            Uses.REQUEST,
            ([], {"team": [TEN_CALLS.id]}, ["lab/shadow"]),
            id="a quota in shadow counts it beside another",
        ),
        pytest.param(
            [STAFF, FALLBACK_CALLS],
            ["staff"],
            Uses.REQUEST,
            ([], {"default": [ONLY_CALLS.id]}, []),
            id="default counts requests",
        ),
        pytest.param([STAFF, DEFAULT], ["staff"], Uses.REQUEST, None, id="default counts only tokens"),
        pytest.param(
            [STAFF, ADMINS], ["staff", "admins"], Uses.REQUEST, ([], {"admins": []}, []), id="an unlimited group"
        ),
    ],
)
def test_which_quotas_bind_a_call_that_only_some_can_count(groups, member_of, counted, expected):
    """A quota that counts nothing of it is treated like one for other models."""
    assert summary(policy(*groups).binding(tuple(member_of), "fast", counted)) == expected


def test_a_call_that_no_quota_can_count_may_be_allowed():
    """As a model that no quota covers. If its answer states tokens, the quota counts them."""
    allowing = policy(STAFF, unmatched="allow")
    assert summary(allowing.binding(("staff",), "fast", Uses.REQUEST)) == ([], {"staff": [DAILY.id]}, [])


def test_of_every_group_one_must_count_the_call():
    """The others bind too, because the answer may state tokens."""
    for groups, expected in (
        ([STAFF, TEAM_CALLS], ([], {"staff": [DAILY.id], "team": [TEN_CALLS.id]}, [])),
        ([STAFF, TEAM], None),
    ):
        together = policy(*groups, combine="every_group")
        assert summary(together.binding(("staff", "team"), "fast", Uses.REQUEST)) == expected


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Up to five groups, of which some are unlimited."""
    found = []
    for name in draw(st.lists(st.sampled_from(["everyone", "default", "a", "b", "c"]), unique=True)):
        unlimited = name != "everyone" and draw(st.sampled_from([False] * 5 + [True]))
        quotas = () if unlimited else draw(quota_lists(name, enforce=("exact", "after", "shadow")))
        found.append(group(name, *quotas, unlimited=unlimited))
    return policy(*found, combine=draw(st.sampled_from(["any_group", "every_group"])))


@given(policies(), st.sampled_from([Uses.REQUEST, Uses.OUTPUT]), st.booleans())
def test_a_call_that_is_admitted_is_counted_by_an_enforced_quota_or_is_unlimited(each_policy, counted, allows):
    """Whichever group admits it. Without such a quota it is refused, unless the policy allows it."""
    own = tuple(name for name in each_policy.groups if name not in ("everyone", "default"))
    each_policy = replace(each_policy, unmatched="allow" if allows else "refuse")
    bound = each_policy.binding(own, "fast", counted)
    if bound is None:
        assert not allows
        return
    decision = decide(call(0, 1 if counted is Uses.OUTPUT else 0, uses=counted), bound.for_user("ann"), {}, NOON)
    if not isinstance(decision, Admitted):
        return
    counting = [
        hold.quota.id
        for hold in decision.holds
        if hold.quota.enforce != "shadow" and any(limit.measure in counted.measures for limit in hold.quota.limits)
    ]
    names = {*own, "default"} & each_policy.groups.keys()
    assert counting or allows or any(each_policy.groups[name].unlimited for name in names)


def test_the_cache_of_bindings_is_bounded_and_right():
    """T71: model names come from clients, and an open list of models accepts any name."""
    cached = policy(STAFF)
    staff = ("staff",)
    first = cached.binding(staff, "gpt-4o")
    assert cached.binding(staff, "gpt-4o") is first
    assert cached.binding((), "gpt-4o") is None
    for number in range(_BINDINGS_MAX + 10):
        cached.binding(staff, f"model-{number}")
        assert len(cached._bound) <= _BINDINGS_MAX
    assert cached.binding(staff, "gpt-4o") == first
    assert "model-1" not in repr(cached)
    assert cached == policy(STAFF)


def test_a_binding_depends_on_groups_and_not_on_the_name_of_a_user():
    """A user whose groups change gets other quotas at once, as when the groups come from a token."""
    shared = policy(STAFF, TEAM, unmatched="allow")
    for groups, bound in ((("staff",), [DAILY.id]), (("team",), [WEEKLY.id]), (("staff",), [DAILY.id]), ((), [])):
        assert [each.id for each in shared.binding(groups, "fast").for_user("ann").quotas] == bound


def test_users_of_the_same_groups_share_their_quotas_but_not_their_counters():
    """Only the name differs."""
    bound = policy(EVERYONE, STAFF, group("pot", quota("pot/all", tokens=9, shared=True))).binding(
        ("staff", "pot"), "fast"
    )
    ann, bob = bound.for_user("ann"), bound.for_user("bob")
    assert (ann.user, bob.user) == ("ann", "bob")
    assert ann.always is bob.always is bound.always
    assert ann.groups is bob.groups is bound.groups
    assert ann.quotas == bob.quotas == bound.quotas
    assert ann.alternatives() == bob.alternatives() == bound.alternatives()
    assert list(ann.keys()) == [("user:ann", CALLS.id), ("user:ann", DAILY.id), ("~pot", "pot/all")]
    assert list(bob.keys()) == [("user:bob", CALLS.id), ("user:bob", DAILY.id), ("~pot", "pot/all")]
    assert ann != bob


# -------------------------------------------------------------------------------------------------------- model lists

LISTED = group("lab", models=["gpt-4o", "o*"])


@pytest.mark.parametrize(
    ("groups", "member_of", "model", "may"),
    [
        pytest.param([STAFF], ["staff"], "anything", True, id="no list anywhere: all"),
        pytest.param([], [], "anything", True, id="no group at all: all"),
        pytest.param([LISTED], ["lab"], "o3", True, id="on the list"),
        pytest.param([LISTED], ["lab"], "fast", False, id="not on the list"),
        pytest.param([MINI_TEAM, LISTED], ["team", "lab"], "fast", True, id="the union: on the first"),
        pytest.param([MINI_TEAM, LISTED], ["team", "lab"], "o3", True, id="the union: on the second"),
        pytest.param([MINI_TEAM, LISTED], ["team", "lab"], "gpt-5", False, id="the union: on neither"),
        pytest.param([STAFF, LISTED], ["staff", "lab"], "fast", False, id="a group without a list adds no models"),
        pytest.param([STAFF, LISTED], ["staff"], "fast", True, id="lists of other groups do not count"),
        pytest.param([group("lab", models=[])], ["lab"], "o3", False, id="an empty list: none"),
        pytest.param(
            [group("default", models=["o3"])], [], "fast", False, id="default's list, for a user of no group"
        ),
        pytest.param(
            [group("default", models=["o3"]), STAFF],
            ["staff"],
            "fast",
            True,
            id="default's list, not for other users",
        ),
        pytest.param([group("everyone", models=["o3"]), STAFF], ["staff"], "o3", True, id="everyone's list counts"),
        pytest.param(
            [group("everyone", models=["o3"]), STAFF],
            ["staff"],
            "fast",
            False,
            id="everyone's list counts for members of groups",
        ),
        pytest.param(
            [group("everyone", models=["o3"]), MINI_TEAM],
            ["team"],
            "fast",
            True,
            id="the union of everyone's list and the group's",
        ),
    ],
)
def test_which_models_a_user_may_use(groups, member_of, model, may):
    """The union of the lists of those of the user's groups that have one."""
    assert policy(*groups).may_use(tuple(member_of), model) is may


def test_quotas_match_the_name_that_the_client_asked_for():
    """A quota on gpt-4o-mini does not reach the alias `fast`; `check` warns of that."""
    of_mini = group("staff", quota("staff/mini", tokens=9, models=["gpt-4o-mini"]))
    up = Upstream("up", "http://up/v1", None)
    catalog = Catalog({"up": up}, {name: Model(name, up, "gpt-4o-mini") for name in ("fast", "gpt-4o-mini")})
    assert policy(of_mini).binding(("staff",), "fast") is None
    assert policy(of_mini).binding(("staff",), "gpt-4o-mini") is not None
    assert not policy(of_mini).serves(("staff",), "fast", catalog)
    assert policy(of_mini).serves(("staff",), "gpt-4o-mini", catalog)


@pytest.mark.parametrize(
    ("member_of", "names"),
    [
        (["staff"], ("all", "gpt-4o", "fallback")),
        (["team"], ("all", "mini", "fast", "fallback")),
        (["team", "staff"], ("all", "mini", "fast", "gpt-4o", "fallback")),
        ([], ("all", "fallback")),
    ],
)
def test_the_names_of_models_in_quotas_and_lists_can_be_listed(member_of, names):
    """Those of the user's groups, `everyone` and `default`; lists before quotas, each name once, without patterns."""
    groups = [
        group("everyone", quota("everyone/calls", requests=10, models=["all"])),
        group("default", quota("default/daily", tokens=50, models=["fallback"])),
        group("staff", FRONTIER, DAILY, quota("staff/again", tokens=1, models=["gpt-4o"])),
        group("team", quota("team/daily", tokens=5, models=["fast"]), models=["mini", "x*"]),
        group("other", quota("other/daily", tokens=5, models=["secret"])),
    ]
    found = policy(*groups).model_names(tuple(member_of))
    assert sorted(found) == sorted(names)
    assert len(found) == len(names)
    assert policy(STAFF).model_names(("staff",)) == ("gpt-4o",)
    patterns = policy(*groups).model_patterns(tuple(member_of))
    assert patterns == ("*", *(["x*"] if "team" in member_of else []), *(["o*"] if "staff" in member_of else []))


def test_groups_and_globs_are_values():
    """Reading the same file again gives an equal policy."""
    assert group("staff", DAILY, models=["a"]) == Group("staff", (DAILY,), Globs(["a"]))
    assert isinstance(policy(STAFF), Policy)
    assert policy(STAFF) != policy(TEAM)


@pytest.mark.parametrize(
    ("model", "served"), [("fast", True), ("unknown", False), ("slow", False), ("uncovered", False)]
)
def test_a_model_is_served_if_it_exists_is_allowed_and_is_covered(model, served):
    """One rule for calls, for the list of models and for the command check."""
    up = Upstream("up", "http://up/v1", None)
    staff = Group("staff", (quota("staff/daily", tokens=10, models=["fast", "slow"]),), Globs(["fast", "uncovered"]))
    models = {name: Model(name, up, name) for name in ("fast", "slow", "uncovered")}
    assert policy(staff).serves(("staff",), model, Catalog({"up": up}, models)) is served


def test_quotas_and_lists_match_all_spellings_of_a_name() -> None:
    """At a server that ignores case, `GPT-4O` is `gpt-4o`. The catalog says which names are one model."""
    azure = Upstream("azure", "http://azure/v1", None, naming=Naming(any_case=True))
    staff = Group("staff", (DAILY, FRONTIER), Globs(["gpt-4o"]))
    rules, catalog = policy(staff), Catalog({}, None, azure)
    for name, quotas in (("GPT-4O", [DAILY.id, FRONTIER.id]), ("gpt-4o", [DAILY.id, FRONTIER.id])):
        model = catalog.model(name)
        assert model is not None
        assert summary(rules.binding(("staff",), model.matched_name)) == ([], {"staff": quotas}, [])
        assert rules.serves(("staff",), name, catalog)
    assert not rules.serves(("staff",), "O3", catalog)
    assert not rules.serves(("staff",), "GPT-4O", Catalog({}, None, Upstream("openai", "http://openai/v1", None)))


# ------------------------------------------------------------------------------------------------------ limits of 0

UP = Upstream("up", "http://upstream.example/v1", None)
CLOSED_LIST = Catalog({"up": UP}, {name: Model(name, UP, name) for name in ("gpt-4o", "fast", "o3")})
ONE_MODEL = Catalog({"up": UP}, {"gpt-4o": Model("gpt-4o", UP, "gpt-4o")})
OPEN_LIST = Catalog({"up": UP}, {"*": Model("*", UP, "*")})
NO_LIST = Catalog({"up": UP}, None, UP)
ZERO = quota("staff/zero", requests=0)
ZERO_4O = quota("staff/zero4o", tokens=0, models=["gpt-4o"])
ZERO_REST = quota("staff/rest", input_tokens=0, models=["fast", "o3"])
ZERO_OUTPUT = quota("staff/output", output_tokens=0)
ZERO_SHADOW = quota("staff/zero", tokens=0, enforce="shadow")
ZERO_TEAM = quota("team/zero", tokens=0, enforce="after")
NEVER = quota("everyone/zero", requests=0)
NO_FALLBACK = quota("default/zero", requests=0)


def closing_of(
    rules: Policy, member_of: tuple[str, ...], catalog: Catalog, uses: Uses, *, by_piece: bool = False
) -> tuple[Quota, ...]:
    """The quotas that refuse every such call of ann at noon."""
    return rules.closing(member_of, catalog, uses, user="ann", now=NOON, by_piece=by_piece)


@pytest.mark.parametrize("combine", ["any_group", "every_group"])
@pytest.mark.parametrize("unmatched", ["refuse", "allow"])
@pytest.mark.parametrize(
    ("groups", "member_of", "closed", "opened"),
    [
        pytest.param([group("staff", ZERO, DAILY)], ["staff"], [ZERO], [ZERO], id="one quota for all models"),
        pytest.param([group("staff", DAILY)], ["staff"], [], [], id="no limit of 0"),
        pytest.param([group("staff", ZERO_OUTPUT)], ["staff"], [], [], id="output does not bind embeddings"),
        pytest.param([group("staff", ZERO_SHADOW, DAILY)], ["staff"], [], [], id="a shadow refuses nothing"),
        pytest.param([group("staff", ZERO_4O, ZERO_REST)], ["staff"], [ZERO_4O, ZERO_REST], [], id="by model"),
        pytest.param([EVERYONE, group("staff", ZERO)], ["staff"], [ZERO], [ZERO], id="everyone adds nothing"),
        pytest.param([group("everyone", NEVER), STAFF], ["staff"], [NEVER], [NEVER], id="a limit of everyone"),
        pytest.param([group("staff", ZERO), DEFAULT], ["staff"], [ZERO], [ZERO], id="default does not apply"),
        pytest.param([group("default", NO_FALLBACK)], [], [NO_FALLBACK], [NO_FALLBACK], id="default applies"),
        pytest.param([DEFAULT], [], [], [], id="default admits"),
        pytest.param(
            [group("staff", ZERO), group("team", ZERO_TEAM)],
            ["staff", "team"],
            [ZERO, ZERO_TEAM],
            [ZERO, ZERO_TEAM],
            id="every group",
        ),
        pytest.param(
            [SHADOW_ONLY, group("default", NO_FALLBACK)], ["staff"], [NO_FALLBACK], [NO_FALLBACK], id="no say"
        ),
    ],
)
def test_limits_of_0_close_all_models(
    groups: list[Group], member_of: list[str], closed: list, opened: list, combine: str, unmatched: str
) -> None:
    """With a closed list each of its models is looked at, with an open one only quotas for all models."""
    rules = replace(policy(*groups), combine=combine, unmatched=unmatched)
    assert closing_of(rules, tuple(member_of), CLOSED_LIST, Uses.INPUT) == tuple(closed)
    for catalog in (OPEN_LIST, NO_LIST):
        assert closing_of(rules, tuple(member_of), catalog, Uses.INPUT) == tuple(opened)


def test_a_group_that_may_admit_a_call_keeps_all_models_open() -> None:
    """With `any_group` one of the groups is enough, with `every_group` one that is closed closes all."""
    for other in (TEAM, ADMINS):
        rules = policy(group("staff", ZERO), other)
        member_of = ("staff", other.name)
        for catalog in (CLOSED_LIST, OPEN_LIST, NO_LIST):
            assert closing_of(rules, member_of, catalog, Uses.INPUT) == ()
            assert closing_of(replace(rules, combine="every_group"), member_of, catalog, Uses.INPUT) == (ZERO,)


def test_a_closed_group_for_some_models_leaves_the_others_open() -> None:
    """A name that the group does not list may be admitted through `everyone`, or because `unmatched` allows it."""
    some = group("staff", ZERO, models=["gpt-4o"])
    assert closing_of(policy(some), ("staff",), OPEN_LIST, Uses.INPUT) == ()
    assert closing_of(policy(some), ("staff",), ONE_MODEL, Uses.INPUT) == (ZERO,)
    # The members of a group with a list of models may use no others.
    assert closing_of(policy(some), ("staff",), CLOSED_LIST, Uses.INPUT) == (ZERO,)
    everyone = group("everyone", NEVER, models=["gpt-4o"])
    assert closing_of(policy(everyone, STAFF), ("staff",), OPEN_LIST, Uses.INPUT) == ()


def test_a_limit_of_0_closes_only_for_what_it_counts() -> None:
    """A limit on output does not bind embeddings, one on tokens no moderations, and nothing binds a token count."""
    rules = policy(group("staff", ZERO_OUTPUT, quota("staff/tokens", tokens=0)))
    [everything, *_] = [
        closing_of(rules, ("staff",), catalog, Uses.INPUT_AND_OUTPUT) for catalog in (CLOSED_LIST, NO_LIST)
    ]
    assert [each.id for each in everything] == ["staff/output", "staff/tokens"]
    assert [each.id for each in closing_of(rules, ("staff",), NO_LIST, Uses.INPUT)] == ["staff/tokens"]
    assert closing_of(rules, ("staff",), CLOSED_LIST, Uses.REQUEST) == ()
    assert closing_of(policy(group("staff", ZERO)), ("staff",), NO_LIST, Uses.NOTHING) == ()


@pytest.mark.parametrize("catalog", [CLOSED_LIST, NO_LIST])
def test_limits_of_0_tokens_close_images_only_if_nothing_covers_them(catalog: Catalog) -> None:
    """An image may use no tokens. A limit on requests, an unlimited group or `unmatched: allow` may admit it."""
    tokens = group("staff", quota("staff/tokens", tokens=0))

    def closing(rules: Policy, *groups: str) -> list[str]:
        return [each.id for each in closing_of(rules, groups, catalog, Uses.INPUT_AND_OUTPUT, by_piece=True)]

    assert closing(policy(tokens), "staff") == ["staff/tokens"]
    assert closing(replace(policy(tokens), unmatched="allow"), "staff") == []
    assert closing(policy(group("staff", quota("staff/tokens", tokens=0, requests=9))), "staff") == []
    assert closing(policy(group("staff", quota("staff/tokens", tokens=0, requests=0))), "staff") == ["staff/tokens"]
    assert closing(policy(tokens, group("everyone", quota("everyone/calls", requests=9))), "staff") == []
    rules = replace(policy(tokens, group("admins", unlimited=True)), combine="every_group")
    assert closing(rules, "staff", "admins") == []


def test_a_user_without_a_model_is_not_refused_because_of_a_limit() -> None:
    """Such a user gets a 404 that says what would help."""
    assert closing_of(policy(), (), CLOSED_LIST, Uses.INPUT) == ()
    assert closing_of(policy(), (), OPEN_LIST, Uses.INPUT) == ()
    assert closing_of(policy(MINI_TEAM), ("team",), ONE_MODEL, Uses.INPUT) == ()


LIMITS = st.sampled_from([ZERO, ZERO_4O, ZERO_OUTPUT, ZERO_SHADOW, DAILY, FRONTIER])


@given(
    staff=st.lists(LIMITS, max_size=3, unique=True),
    team=st.lists(st.sampled_from([ZERO_TEAM, WEEKLY]), max_size=2, unique=True),
    default=st.lists(st.sampled_from([NO_FALLBACK, FALLBACK]), max_size=2, unique=True),
    everyone=st.lists(st.sampled_from([NEVER, CALLS]), max_size=2, unique=True),
    lists=st.tuples(*[st.sampled_from([None, ["gpt-4o"], ["o*"]])] * 3),
    unlimited=st.booleans(),
    member_of=st.sampled_from([(), ("staff",), ("team",), ("staff", "team")]),
    combine=st.sampled_from(["any_group", "every_group"]),
    unmatched=st.sampled_from(["refuse", "allow"]),
    catalog=st.sampled_from([CLOSED_LIST, ONE_MODEL, OPEN_LIST, NO_LIST]),
    uses=st.sampled_from(Uses),
)
def test_a_user_who_is_closed_is_admitted_to_no_model(
    staff, team, default, everyone, lists, unlimited, member_of, combine, unmatched, catalog, uses
) -> None:
    """The body is not read, so no call that would be admitted may be refused, whatever its model is."""
    groups = (
        group("staff", *staff, models=lists[0]),
        group("team", *team, models=lists[1], unlimited=unlimited),
        group("default", *default, models=lists[2]),
        group("everyone", *everyone),
    )
    rules = replace(policy(*groups), combine=combine, unmatched=unmatched)
    if not closing_of(rules, member_of, catalog, uses):
        return
    for name in ("gpt-4o", "fast", "o3", "new"):
        if rules.serves(member_of, name, catalog):
            bound = rules.binding(member_of, name)
            for demand in (call(1, 1, uses=uses), call(0, 0, uses=uses)):
                assert not isinstance(decide(demand, bound.for_user("ann"), {}, NOON), Admitted)
