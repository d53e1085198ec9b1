"""Which quotas bind the members of which groups on which model, and which models they may use."""

from dataclasses import replace

import pytest

from proxy.policy.admission import Admitted, decide
from proxy.policy.catalog import Catalog, Model, Upstream
from proxy.policy.policy import _BINDINGS_MAX, Group, Policy
from proxy.policy.quota import BoundQuotas, Globs, GroupQuotas
from tests.builders import NOON, call, group, policy, quota

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
    ],
)
def test_a_user_is_shown_every_quota_that_can_bind_on_some_model(groups, member_of, shown):
    """`/v1/quota` is asked without a model, so no quota that could refuse a call may be missing."""
    own, each_policy = tuple(member_of), policy(*groups)
    assert sorted(each.id for each in each_policy.all_quotas(own).quotas) == sorted(each.id for each in shown)
    for model in ("gpt-4o", "gpt-4o-mini", "o3", "fast"):
        if each_policy.may_use(own, model) and (binding := each_policy.binding(own, model)):
            assert {each.id for each in binding.quotas} <= {each.id for each in shown}


def test_the_cache_of_bindings_is_bounded_and_right():
    """Model names come from clients, and an open list of models accepts any name."""
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
    assert ann.keys() == [("user:ann", CALLS.id), ("user:ann", DAILY.id), ("~pot", "pot/all")]
    assert bob.keys() == [("user:bob", CALLS.id), ("user:bob", DAILY.id), ("~pot", "pot/all")]
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
