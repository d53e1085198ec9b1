"""What `check` warns of in a valid policy. A warning is never wrong."""

from textwrap import dedent

import pytest

from proxy.config.lint import warnings
from proxy.config.loader import load, load_text
from proxy.policy.policy import Policy
from tests.builders import NOON
from tests.config.test_loader import EXAMPLE, example_environ

UPSTREAM = "upstreams: {box: {base_url: http://box/v1}}\n"
DIGEST = f"sha256:{'ab' * 32}"
KNOWN = "max_output_tokens: 16k"


# Of an open list of models, which most of these files have. `test_an_open_list…` is about it.
UNLISTED = (
    "any model name is accepted, and the file states neither max_output_tokens nor context of models that are not "
    "listed: a whole answer whose call states no maximum, or input that a request does not show, may take {} over "
    "its limit; list the models under models, with both"
)


def warned(below: str, **environ: str) -> list[str]:
    """The warnings of a file with this below its upstream, with their lines, except the one about an open list."""
    found = warnings(load_text(UPSTREAM + below, environ=environ), NOON)
    return [f"{each.line}: {each.text}" for each in found if not each.text.startswith(UNLISTED[:60])]


def group(quotas: str, *, name: str = "staff", more: str = "", users: str = "alice: {groups: [staff]}") -> str:
    return f"groups:\n  {name}:\n    quotas:\n{quotas}{more}users: {{{users}}}\n"


DAILY = "      daily: {tokens: 200k, per: day}\n"


def test_a_policy_without_problems_has_no_warnings():
    """One group with one quota and one user."""
    assert warned(group(DAILY)) == []


def test_the_example_has_no_warnings():
    """Operators copy it."""
    assert warnings(load(str(EXAMPLE), example_environ()), NOON) == ()


# ------------------------------------------------------------------------------------------------ groups and users


def test_a_group_without_members():
    """The reserved groups apply to users without being listed, so they get no warning."""
    more = "  empty: {unlimited: true}\n  everyone: {quotas: {a: {tokens: 5k, per: day}}}\n"
    assert warned(group(DAILY, more=more)) == ['6: group "empty" has no members in this file']


def test_a_group_without_effect():
    """A group with only a list of models does have an effect."""
    more = "  a: {}\n  b: {models: [x]}\n"
    users = "alice: {groups: [staff, a, b]}"
    assert warned(group(DAILY, more=more, users=users)) == [
        '6: group "a" has no effect: it has no quotas and no models, and is not unlimited'
    ]


def test_a_groups_models_that_are_not_listed():
    """Only if the list of models is closed. An open one may have models by any name."""
    more = "  a: {models: [gpt-5, 'o*']}\n"
    users = "alice: {groups: [staff, a]}"
    models = "models: {gpt-4o: {max_output_tokens: 16k}}\n"
    assert warned(group(DAILY, more=more, users=users) + models) == [
        '6: the models of group "a" match none of those listed under models'
    ]
    assert warned(group(DAILY, more=more, users=users)) == []
    assert warned(group(DAILY, more=more, users=users) + models.replace("}}", "}, '*': {}}")) == []


DEFAULT = "  default: {quotas: {d: {tokens: 5k, per: day}}}\n"
UNREACHABLE = "6: default applies to no user: each user has a group with a quota for every model"


@pytest.mark.parametrize(
    ("quotas", "users", "expected"),
    [
        (DAILY, "alice: {groups: [staff]}", [UNREACHABLE]),
        (DAILY, "alice: {groups: [staff]}, bob: {}", []),
        ("      o: {models: ['o*'], tokens: 200k, per: day}\n", "alice: {groups: [staff]}", []),
    ],
)
def test_a_default_group_that_applies_to_no_user(quotas, users, expected):
    """Each user has a quota for every model in another group."""
    assert warned(group(quotas, more=DEFAULT, users=users)) == expected


@pytest.mark.parametrize(
    ("quotas", "default", "applies"),
    [
        (DAILY, "{quotas: {d: {requests: 5, per: day}}}", True),
        (DAILY, "{quotas: {d: {requests: 5, per: day, enforce: shadow}}}", False),
        (DAILY, "{unlimited: true}", True),
        ("      d: {tokens: 5, requests: 5, per: day}\n", "{quotas: {d: {requests: 5, per: day}}}", False),
        ("      d: {input_tokens: 5, per: day}\n", "{quotas: {d: {tokens: 5, per: day}}}", True),
    ],
)
def test_a_default_group_that_counts_what_the_quotas_of_the_users_do_not(quotas, default, applies):
    """It applies to images of models that report no tokens, or that have a price in tokens."""
    found = warned(group(quotas, more=f"  default: {default}\n"))
    assert (UNREACHABLE in found) is not applies


def test_a_default_group_beside_an_unlimited_one_applies_to_no_user():
    """An unlimited group covers every model, unless it has a list of models."""
    below = f"groups:\n  all: {{unlimited: true}}\n{DEFAULT}users: {{a: {{groups: [all]}}}}\n"
    assert warned(below) == ["4: default applies to no user: each user has a group with a quota for every model"]
    assert warned(below.replace("unlimited: true", "unlimited: true, models: [x]")) == []


def test_users_without_a_quota():
    """Their every call is refused, unless there is a quota in `default` or `everyone`, or unmatched: allow."""
    text = "no quota covers them, so every call is refused; put them in a group, or add a group called default"
    alone = "users:\n  alice: {}\n  bob: {}\n"
    assert warned(alone) == [f"3: alice, bob: {text}"]
    assert warned(f"{alone}unmatched: allow\n") == []
    assert warned(f"{alone}groups: {{default: {{unlimited: true}}}}\n") == []
    assert warned(f"{alone}groups: {{everyone: {{quotas: {{a: {{tokens: 5k, per: day}}}}}}}}\n") == []
    many = "users:\n" + "".join(f"  u{number}: {{}}\n" for number in range(7))
    assert warned(many) == [f"3: u0, u1, u2, u3, u4 and 2 more: {text}"]
    listed = "groups: {a: {models: [x]}}\nusers:\n  alice: {groups: [a]}\n"
    assert warned(listed) == [f"4: alice: {text}"]


# ----------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("{tokens: 0, per: day}", ["staff/q: a limit of 0 tokens refuses every call that it applies to"]),
        ("{requests: 0, per: day}", ["staff/q: a limit of 0 requests refuses every call that it applies to"]),
        ("{output_tokens: 1, per: day}", []),
        ("{tokens: 10, per: day}", []),
        ("{output_tokens: 500, per: day, enforce: after}", []),
        ("{input_tokens: 500, requests: 5, per: day}", []),
    ],
)
def test_limits_that_are_too_small(quota, expected):
    """0 refuses every call. The smallest answer is at most a tenth of a limit, so no other limit is too small."""
    assert warned(group(f"      q: {quota}\n")) == [f"5: {text}" for text in expected]


@pytest.mark.parametrize(
    ("models", "quota_models", "is_warned"),
    [
        ("{a: {smallest_answer: 500}}", "['*']", False),
        ("{a: {smallest_answer: 501}}", "['*']", True),
        ("{a: {smallest_answer: 4k}, b: {smallest_answer: 500}}", "['*']", False),
        ("{a: {smallest_answer: 4k}, b: {smallest_answer: 500}}", "[a]", True),
        ("{a: {}, b: {smallest_answer: 501}}", "[a]", False),
        ("{a: {smallest_answer: 501}, '*': {}}", "['*']", False),
        ("{a: {smallest_answer: 501}, '*': {}}", "['b*']", False),
        ("{a: {}}\nsmallest_answer: 501", "[a]", True),
        ("{a: {}}\nsmallest_answer: 500", "[a]", False),
        ("{a: {smallest_answer: 500}}\nsmallest_answer: 501", "[a]", False),
        ("{a: {}, '*': {}}\nsmallest_answer: 501", "['b*']", True),
    ],
)
def test_a_small_limit_is_compared_with_smallest_answer(models, quota_models, is_warned):
    """There is a warning only if the limit is too small for every model that the quota applies to."""
    below = group(f"      q: {{models: {quota_models}, output_tokens: 500, per: day}}\n") + f"models: {models}\n"
    text = (
        "5: staff/q: calls that ask for a longer answer than 500 tokens are never admitted, because smallest_answer "
        "is larger"
    )
    assert (text in warned(below)) == is_warned


def test_a_limit_can_be_too_small_for_a_larger_smallest_answer():
    """A limit of 3k is enough by default, but not for a model with smallest_answer: 4k."""
    below = group("      q: {output_tokens: 3k, per: day}\n") + f"models: {{a: {{smallest_answer: 4k, {KNOWN}}}}}\n"
    assert warned(below) == [
        "5: staff/q: calls that ask for a longer answer than 3,000 tokens are never admitted, because "
        "smallest_answer is larger"
    ]


# ------------------------------------------------------------------------------------------ quotas without effect

NO_MODEL = "can never refuse a call: it matches no model that its group may use"


@pytest.mark.parametrize(
    ("quota_models", "group_models", "listed", "has_no_effect"),
    [
        ("[gpt-5]", None, "{gpt-4o: {}}", True),
        ("['gpt-*']", None, "{gpt-4o: {}}", False),
        ("[gpt-5]", None, "{gpt-4o: {}, '*': {}}", False),
        ("[gpt-5]", None, None, False),
        ("[gpt-4o]", "[o3]", "{gpt-4o: {}, o3: {}}", True),
        ("[gpt-4o, o3]", "[o3]", "{gpt-4o: {}, o3: {}}", False),
        ("[gpt-4o]", "['o*']", None, True),
        ("[o3]", "['o*']", None, False),
        ("['gpt-*']", "[o3]", None, True),
        ("['o*']", "[o3]", None, False),
        ("['gpt-*']", "['o*']", None, False),
    ],
)
def test_a_quota_that_matches_no_model(quota_models, group_models, listed, has_no_effect):
    """A closed list or whole names decide it. Two patterns may both match a name that the file does not have."""
    below = f"groups:\n  staff:\n    quotas:\n      q: {{models: {quota_models}, requests: 5, per: day}}\n"
    below += f"    models: {group_models}\n" if group_models else ""
    below += "users: {alice: {groups: [staff]}}\n"
    below += f"models: {listed}\n" if listed else ""
    assert warned(below) == ([f"5: staff/q {NO_MODEL}"] if has_no_effect else [])


def test_a_shadow_quota_has_no_warning():
    """It is meant to refuse no call."""
    assert (
        warned(group("      q: {models: [x], requests: 5, per: day, enforce: shadow}\n") + "models: {y: {}}\n") == []
    )


ADMINS = "  admins: {unlimited: true}\n"
IN_BOTH = "alice: {groups: [staff, admins]}"


@pytest.mark.parametrize(
    ("more", "users", "below", "has_no_effect"),
    [
        (ADMINS, IN_BOTH, "", True),
        (ADMINS, f"{IN_BOTH}, bob: {{groups: [staff]}}", "", False),
        (ADMINS, IN_BOTH, "combine: every_group\n", False),
        ("  admins: {unlimited: true, models: ['*']}\n", IN_BOTH, "", True),
        ("  admins: {unlimited: true, models: ['o*']}\n", IN_BOTH, "", False),
    ],
)
def test_a_quota_beside_an_unlimited_group(more, users, below, has_no_effect):
    """With any_group, a member of both is admitted through the unlimited one."""
    text = "5: staff/daily can never refuse a call: all its members are also in admins, which is unlimited"
    assert warned(group(DAILY, more=more, users=users) + below) == ([text] if has_no_effect else [])


def test_quotas_of_everyone_apply_to_members_of_unlimited_groups():
    """So they have an effect."""
    assert warned(group(DAILY, name="everyone", more=ADMINS, users="alice: {groups: [admins]}")) == []


@pytest.mark.parametrize(
    ("tight", "loose", "has_no_effect"),
    [
        ("requests: 5, per: day", "requests: 5, per: hour", True),
        ("requests: 5, per: day", "requests: 9, per: day", True),
        ("requests: 5, per: 6h", "requests: 5, per: 6h", True),
        ("requests: 5, tokens: 9k, per: year", "requests: 5, per: week", False),
        ("requests: 5, tokens: 9k, per: year", "requests: 5, per: quarter", True),
        ("requests: 5, per: day", "requests: 4, per: hour", False),
        ("requests: 5, per: week", "requests: 5, per: month", False),
        ("requests: 5, per: month", "requests: 5, per: week", False),
        ("requests: 5, per: 7d", "requests: 6, per: 6h", False),
        ("requests: 5, per: day", "tokens: 5k, per: hour", False),
        ("requests: 5, per: day", "requests: 5, tokens: 5k, per: hour", False),
        ("requests: 5, tokens: 2k, per: 6h", "requests: 5, per: 6h", False),
        ("requests: 5, per: day, models: [x]", "requests: 5, per: hour", False),
        ("requests: 5, per: day", "requests: 5, per: hour, models: [x]", True),
        ("requests: 5, per: 6h", "requests: 5, per: 6h, models: [x]", False),
        ("requests: 5, per: day, enforce: after", "requests: 5, per: hour", False),
        ("requests: 5, per: day, shared: true", "requests: 5, per: hour", False),
        ("requests: 5, per: day, shared: true", "requests: 5, per: hour, shared: true", True),
    ],
)
def test_a_quota_beside_a_tighter_one(tight, loose, has_no_effect):
    """Only if each window of the one lies in a window of the other, and both count the same calls."""
    text = "6: staff/loose can never refuse a call: staff/tight is used up first"
    found = warned(
        group(f"      tight: {{{tight}}}\n      loose: {{{loose}}}\n")
        + f"models: {{x: {{{KNOWN}}}, y: {{{KNOWN}}}}}\n"
    )
    assert found == ([text] if has_no_effect else [])


def test_of_two_equal_quotas_only_the_second_has_a_warning():
    """Without it, the first would have an effect."""
    assert warned(group("      a: {requests: 5, per: day}\n      b: {requests: 5, per: day}\n")) == [
        "6: staff/b can never refuse a call: staff/a is used up first"
    ]


def test_a_looser_quota_has_an_effect_if_members_have_other_groups():
    """A call through another group is charged to each quota by itself, if that has capacity for it."""
    quotas = "      tight: {requests: 5, per: day}\n      loose: {requests: 5, per: hour}\n"
    other = "  other: {quotas: {big: {requests: 50, per: day}}}\n"
    below = group(quotas, more=other, users="alice: {groups: [staff, other]}")
    assert warned(below) == []
    assert len(warned(f"{below}combine: every_group\n")) == 1
    assert len(warned(group(quotas, name="everyone", users="alice: {}"))) == 1


# ---------------------------------------------------------------------------------------------- models, upstreams

MODELS = f"models: {{gpt-4o: {{{KNOWN}}}, smart: {{model: gpt-4o, {KNOWN}}}, gpt-4o-mini: {{{KNOWN}}}}}\n"
ALIAS = 'it matches "gpt-4o" but not "smart", which is the same model; add "smart" to its models'
FRONTIER = "      frontier: {models: [gpt-4o], requests: 5, per: day}\n"


@pytest.mark.parametrize(
    ("quotas", "group_models", "below", "has_warning"),
    [
        (FRONTIER + DAILY, None, "", True),
        (FRONTIER, None, "", False),
        (FRONTIER, None, "unmatched: allow\n", True),
        (FRONTIER + DAILY, "[gpt-4o, gpt-4o-mini]", "", False),
        (FRONTIER + DAILY + "      own: {models: [smart], requests: 5, per: day}\n", None, "", False),
        (FRONTIER.replace("[gpt-4o]", "[gpt-4o, smart]") + DAILY, None, "", False),
        (FRONTIER.replace("[gpt-4o]", "[smart]") + DAILY, None, "", False),
    ],
)
def test_an_alias_that_a_quota_does_not_match(quotas, group_models, below, has_warning):
    """Only if a member may use the alias, another quota admits it, and it has no quota of its own."""
    text = group(quotas).replace("users:", f"    models: {group_models}\nusers:" if group_models else "users:")
    assert warned(text + MODELS + below) == ([f"5: staff/frontier: {ALIAS}"] if has_warning else [])


def test_an_alias_of_a_model_that_is_not_listed():
    """With an open list, clients can also use the upstream's own name."""
    models = f"models: {{smart: {{model: gpt-4o, {KNOWN}}}, '*': {{}}}}\n"
    assert f"5: staff/frontier: {ALIAS}" in warned(group(FRONTIER + DAILY) + models)
    assert warned(group(FRONTIER + DAILY) + f"models: {{gpt-4o: {{{KNOWN}}}, smart: {{{KNOWN}}}}}\n") == []


OPEN = (
    "any model name is accepted, and a call by another name of these models is bound by less; list the models under "
    'models (without "*"), or write the limit for all names'
)


@pytest.mark.parametrize(
    ("named", "others", "below", "is_warned"),
    [
        # The same number for all names is as tight, whatever the window; a larger one in the same time is not.
        ("tokens: 50k, per: 6h", "daily: {tokens: 200k, per: day}", "", True),
        ("tokens: 50k, per: 6h", "daily: {tokens: 50k, per: day}", "", False),
        ("tokens: 50k, per: 6h", "hourly: {tokens: 50k, per: hour}", "", True),
        ("tokens: 1M, per: month", "daily: {tokens: 20k, per: day}", "", False),
        ("tokens: 599k, per: month", "daily: {tokens: 20k, per: day}", "", True),
        ("output_tokens: 50k, per: day", "daily: {tokens: 50k, per: day}", "", False),
        ("tokens: 50k, per: day", "daily: {output_tokens: 50k, per: day}", "", True),
        ("requests: 5, per: day", "daily: {tokens: 5, per: day}", "", True),
        ("requests: 5, tokens: 50k, per: day", "a: {tokens: 5k, per: day}", "", True),
        ("requests: 5, tokens: 50k, per: day", "a: {tokens: 5k, per: day}, b: {requests: 5, per: day}", "", False),
        ("tokens: 50k, per: day, shared: true", "daily: {tokens: 50k, per: day}", "", True),
        ("tokens: 50k, per: day", "daily: {tokens: 50k, per: day, shared: true}", "", False),
        ("tokens: 50k, per: day", "daily: {tokens: 50k, per: day, enforce: after}", "", True),
        ("tokens: 50k, per: day, enforce: after", "daily: {tokens: 50k, per: day, enforce: after}", "", False),
        ("tokens: 50k, per: day", "daily: {tokens: 5k, per: day, enforce: shadow}", "", True),
        ("tokens: 50k, per: day, enforce: shadow", "daily: {tokens: 500k, per: day}", "", False),
        ("tokens: 0, per: day", "daily: {tokens: 5, per: day}", "", True),
        # A name that no quota covers is refused, unless the file says otherwise.
        ("tokens: 50k, per: 6h", "", "", False),
        ("tokens: 50k, per: 6h", "", "unmatched: allow\n", True),
        # An open list of models, and a closed one.
        ("tokens: 50k, per: 6h", "daily: {tokens: 200k, per: day}", "models: {gpt-4o: {}, '*': {}}\n", True),
        ("tokens: 50k, per: 6h", "daily: {tokens: 200k, per: day}", "models: {gpt-4o: {}, o3: {}}\n", False),
    ],
)
@pytest.mark.parametrize("names", ["[gpt-4o]", "[gpt-4o, 'o*']", "['gpt-4o*']", "['gpt-[45]*', 'o?']"])
@pytest.mark.parametrize("name", ["staff", "everyone", "default"])
def test_a_quota_on_names_of_an_open_list(name, names, named, others, below, is_warned):
    """The same model has other names (gpt-4o-2024-08-06, GPT-4O), which are bound only by what binds all names."""
    users = "users: {alice: {groups: [staff]}}\n" if name == "staff" else "users: {alice: {}}\n"
    rest = f", {others}" if others else ""
    text = f"groups:\n  {name}:\n    quotas: {{frontier: {{models: {names}, {named}}}{rest}}}\n{users}{below}"
    found = [warning for warning in warned(text) if "any model name" in warning]
    assert found == ([f"4: {name}/frontier: {OPEN}"] if is_warned else [])


@pytest.mark.parametrize(
    ("more", "users", "below", "is_warned"),
    [
        ("", "alice: {groups: [staff]}", "", True),
        ("", "", "", True),
        # What another group admits in any case is not reached by a name.
        ("  admins: {unlimited: true}\n", "alice: {groups: [staff, admins]}", "", False),
        ("  admins: {unlimited: true}\n", "alice: {groups: [staff, admins]}, bob: {groups: [staff]}", "", True),
        # Quotas of everyone bind all names.
        ("  everyone: {quotas: {a: {tokens: 5k, per: day}}}\n", "alice: {groups: [staff]}", "", False),
        ("  everyone: {quotas: {a: {tokens: 500k, per: day}}}\n", "alice: {groups: [staff]}", "", True),
        # A list of the models that members may use.
        ("  team: {models: [gpt-4o, o3]}\n", "alice: {groups: [staff, team]}", "", False),
        ("  team: {models: ['gpt-4*']}\n", "alice: {groups: [staff, team]}", "", True),
        ("  team: {models: ['gpt-4*']}\n", "alice: {groups: [staff, team]}, bob: {}", "", True),
    ],
)
def test_a_quota_on_names_is_avoidable_only_by_names_that_its_members_may_use(more, users, below, is_warned):
    """And only if they are bound by less then."""
    quotas = "      frontier: {models: [gpt-4o], tokens: 50k, per: day}\n      daily: {tokens: 200k, per: day}\n"
    found = [warning for warning in warned(group(quotas, more=more, users=users) + below) if "any model" in warning]
    assert found == ([f"5: staff/frontier: {OPEN}"] if is_warned else [])


FEW = (
    "groups:\n  staff: {models: ['o*'], quotas: {daily: {tokens: 5k, per: day}}}\nusers: {alice: {groups: [staff]}}\n"
)


@pytest.mark.parametrize(
    ("below", "line"),
    [
        (group(DAILY), 1),
        (FEW, 1),
        (group(DAILY) + f"models:\n  gpt-4o: {{{KNOWN}}}\n  '*': {{}}\n", 9),
        (group("      daily: {output_tokens: 200k, per: day}\n"), 1),
        (group("      daily: {models: [gpt-4o], tokens: 200k, per: day}\n"), 1),
        (group(DAILY) + f"models: {{gpt-4o: {{{KNOWN}}}}}\n", None),
        (
            group("      daily: {models: [gpt-4o], tokens: 200k, per: day}\n")
            + f"models: {{gpt-4o: {{{KNOWN}}}, '*': {{}}}}\n",
            None,
        ),
        (group("      daily: {requests: 5, per: day}\n"), None),
        (group("      daily: {input_tokens: 5k, per: day}\n"), None),
        (group("      daily: {tokens: 5k, per: day, enforce: after}\n"), None),
        (group(DAILY, users="alice: {}"), None),
    ],
)
@pytest.mark.parametrize("kind", ["openai", "vllm", "anthropic"])
def test_an_open_list_of_models_states_no_maximum_and_no_context(below, line, kind):
    """Of the models that are not listed, if a quota could end over its limit. Anthropic's API requires a maximum."""
    upstream = UPSTREAM.replace("}}", f", kind: {kind}}}}}")
    found = [each for each in warnings(load_text(upstream + below), NOON) if "not listed" in each.text]
    expected = [(line, UNLISTED.format("staff/daily"))] if line and kind != "anthropic" else []
    assert [(each.line, each.text) for each in found] == expected


def test_a_quota_is_not_avoidable_where_default_is_tighter():
    """A name that the user's groups do not cover is bound by default."""
    quotas = "      frontier: {models: [gpt-4o], tokens: 50k, per: day}\n"
    for tokens, is_warned in (("20k", False), ("60k", True)):
        more = f"  default: {{quotas: {{daily: {{tokens: {tokens}, per: day}}}}}}\n"
        assert any("any model" in warning for warning in warned(group(quotas, more=more))) == is_warned


def test_the_readme_has_no_warnings():
    """Operators copy its example too."""
    readme = (EXAMPLE.parent / "README.md").read_text(encoding="utf-8")
    text = readme.split("    # quotas.yaml\n")[1].split("\n\n")[0]
    environ = {"OPENAI_API_KEY": "sk-upstream", "ALICE_KEY": "a" * 24}
    assert warnings(load_text(dedent(text), environ=environ), NOON) == ()


def test_an_alias_at_a_second_upstream():
    """Any shared upstream makes it the same model. There is one warning, not one for each upstream."""
    several = "upstreams: [{upstream: box, model: gpt-5}, {upstream: spare, model: gpt-4o, weight: 0}]"
    models = f"models: {{gpt-4o: {{{KNOWN}, upstreams: [{{upstream: box}}, {{upstream: spare}}]}}, "
    models += f"smart: {{{several}, {KNOWN}}}}}\n"
    below = f"{group(FRONTIER + DAILY)}{models}".replace("users:", "default_upstream: box\nusers:", 1)
    text = f"upstreams: {{box: {{base_url: http://box/v1}}, spare: {{base_url: http://spare/v1}}}}\n{below}"
    found = [warning.text for warning in warnings(load_text(text), NOON)]
    assert found == [f"staff/frontier: {ALIAS}"]


def test_an_alias_is_a_problem_only_for_users_to_whom_the_quota_applies():
    """A quota of default does not apply to users with a quota of their own."""
    more = f"  default:\n    quotas:\n{FRONTIER}{DAILY}"
    assert warned(group(DAILY, more=more, users="alice: {groups: [staff]}, bob: {}") + MODELS) == [
        f"8: default/frontier: {ALIAS}"
    ]
    assert ALIAS not in str(warned(group(DAILY, more=more) + MODELS))


BY_PIECE = "models:\n  draw: {model: dall-e-3}\n"
IMAGES_REPORT_NO_TOKENS = "its answers on /v1/images/generations report no tokens, which no quota of alice counts"


@pytest.mark.parametrize(
    ("models", "quota", "expected"),
    [
        (
            BY_PIECE,
            "tokens: 5k",
            "so they are refused; write tokens_per_image here, or requests in one of the quotas",
        ),
        (BY_PIECE, "tokens: 5k, models: [draw]", "so they are refused; write tokens_per_image here, or requests"),
        (BY_PIECE, "tokens: 5k; requests: 5, enforce: shadow", "so they are refused; write tokens_per_image here"),
        (BY_PIECE, "tokens: 5k; requests: 5", ""),
        (BY_PIECE, "tokens: 5k, models: [gpt-4o]", ""),
        (BY_PIECE.replace("}", ", tokens_per_image: 1k}"), "tokens: 5k", ""),
        (
            BY_PIECE.replace("}", ", tokens_per_image: 1k}"),
            "input_tokens: 5k",
            "so they are refused; write tokens or requests in",
        ),
        (BY_PIECE + "unmatched: allow\n", "tokens: 5k", "so they are free; write tokens_per_image here, or requests"),
        (BY_PIECE.replace("dall-e-3", "gpt-image-1, max_output_tokens: 9k"), "tokens: 5k", ""),
    ],
)
def test_a_model_whose_answers_report_no_tokens(models, quota, expected):
    """If a user may call it whose quotas count only tokens. It needs no maximum."""
    quotas = "".join(f"      q{index}: {{{each}, per: day}}\n" for index, each in enumerate(quota.split("; ")))
    found = [each for each in warned(group(quotas) + models) if "can never refuse" not in each]
    assert len(found) == bool(expected)
    if expected:
        assert f": {IMAGES_REPORT_NO_TOKENS}, {expected}" in found[0]


def test_models_of_other_endpoints_whose_answers_report_no_tokens():
    """Also if only one of the upstreams has such a model."""
    models = (
        "models:\n  a: {model: tts-1-hd}\n  b: {model: openai/whisper-1}\n"
        f"  c: {{upstreams: [{{upstream: box, model: gpt-image-1}}, {{upstream: box, model: dall-e-2}}], {KNOWN}}}\n"
    )
    paths = [text.split()[4] for text in warned(group(DAILY) + models)]
    assert paths == ["/v1/audio/speech", "/v1/audio/transcriptions", "/v1/images/generations"]


def test_a_price_of_images_is_none_of_speech():
    """It is written where only `tokens_per_request` counts. Either is a price of images."""
    models = "models:\n  a: {model: tts-1, tokens_per_image: 100}\n"
    [text] = warned(group(DAILY) + models)
    assert "/v1/audio/speech report no tokens" in text
    assert "write tokens_per_request here" in text
    assert warned(group(DAILY) + models.replace("per_image", "per_request")) == []
    assert warned(group(DAILY) + BY_PIECE.replace("}", ", tokens_per_request: 1k}")) == []


def test_models_without_tokens_are_found_quickly_among_many_users(monkeypatch):
    """Each set of groups is looked at once for each such model, and no other model is looked at."""
    looked_at: list[tuple[tuple[str, ...], str]] = []
    serves = Policy.serves

    def counting(self, groups, model, catalog):
        looked_at.append((groups, model))
        return serves(self, groups, model, catalog)

    monkeypatch.setattr(Policy, "serves", counting)
    users = ", ".join(f"u{number}: {{groups: [staff]}}" for number in range(50))
    models = "models:\n  draw: {model: dall-e-3}\n" + "".join(f"  m{each}: {{{KNOWN}}}\n" for each in range(50))
    [text] = warned(group(DAILY, users=users) + models)
    assert "u0, u1, u2, u3, u4 and 45 more" in text
    assert looked_at == [(("staff",), "draw")]


def test_an_open_list_with_models_whose_answers_report_no_tokens_that_are_allowed():
    """They are free. Without `unmatched: allow` they are refused, which needs no warning."""
    assert warned(group(DAILY) + "unmatched: allow\n") == [
        "7: images, speech and transcripts of models that report no tokens (dall-e-3, tts-1, whisper-1 and others) "
        "are free for alice, whose quotas count only tokens; write requests in one of the quotas"
    ]
    assert warned(group(DAILY)) == []
    assert warned(group(DAILY + "      calls: {requests: 5, per: day}\n") + "unmatched: allow\n") == []
    assert warned(group(DAILY) + f"unmatched: allow\nmodels: {{gpt-4o: {{{KNOWN}}}}}\n") == []


NO_MAXIMUM = (
    "a whole answer may take staff/daily over its limit if its call states no maximum; write max_output_tokens"
)


@pytest.mark.parametrize(
    ("model", "quota", "has_warning"),
    [
        ("", "tokens: 200k", True),
        ("context: 128k, reasoning: true", "tokens: 200k", True),
        ("", "output_tokens: 200k", True),
        ("", "output_tokens: 200k, overdraft: 4k, shared: true", True),
        ("", "models: ['*-turbo', 'gpt-*'], tokens: 200k", True),
        ("max_output_tokens: 16k", "tokens: 200k", False),
        ("", "input_tokens: 200k, requests: 5", False),
        ("", "tokens: 200k, enforce: after", False),
        ("", "tokens: 200k, enforce: shadow", False),
        ("", "models: [other], tokens: 200k", False),
        ("model: text-embedding-3-small", "tokens: 200k", False),
        ("upstream: stage", "tokens: 200k", False),
        ("upstream: claude", "tokens: 200k", False),
    ],
)
def test_a_model_without_a_known_maximum(model, quota, has_warning):
    """Only if an exact quota limits its output. Not for embeddings, nor for simulated or Anthropic's models."""
    upstreams = (
        "upstreams:\n  box: {base_url: http://box/v1}\n  stage: {base_url: http://box, kind: simulator}\n"
        "  claude: {base_url: http://box, kind: anthropic}\n"
    )
    below = f"{upstreams}default_upstream: box\nmodels:\n  gpt-x: {{{model}}}\n  other: {{{KNOWN}}}\n"
    below += group(f"      daily: {{{quota}, per: day}}\n")
    found = [f"{warning.line}: {warning.text}" for warning in warnings(load_text(below), NOON)]
    assert found == ([f"7: {NO_MAXIMUM}"] if has_warning else [])


def test_a_simulated_upstream_does_not_bound_a_models_other_upstreams():
    """Only the simulator's own answers have a known maximum."""
    upstreams = "upstreams:\n  box: {base_url: http://box/v1}\n  stage: {base_url: http://box, kind: simulator}\n"
    models = "models: {gpt-x: {upstreams: [{upstream: stage}, {upstream: box}]}}\n"
    assert NO_MAXIMUM in str(warnings(load_text(upstreams + models + group(DAILY)), NOON))


def test_a_missing_maximum_gives_one_warning_per_model():
    """It names the first quota. "*" has no warning, and neither has a model whose quotas apply to no user."""
    models = "models: {a: {}, b: {}, '*': {}}\n"
    weekly = "      weekly: {tokens: 2M, per: week}\n"
    assert warned(group(DAILY + weekly) + models) == [f"8: {NO_MAXIMUM}"] * 2
    assert warned(group(DAILY + weekly) + "models: {'*': {}}\n") == []
    assert NO_MAXIMUM not in str(warned(group(DAILY, users="") + models))
    everyone = group(DAILY, name="everyone", users="alice: {}") + "models: {a: {}}\n"
    assert warned(everyone) == [f"7: {NO_MAXIMUM.replace('staff', 'everyone')}"]


@pytest.mark.parametrize(
    ("host", "is_link_local"),
    [("169.254.169.254", True), ("[fe80::1]", True), ("127.0.0.1", False), ("metadata.example", False)],
)
def test_a_link_local_upstream(host, is_link_local):
    """T50: cloud machines serve their own credentials at such an address."""
    found = warnings(load_text(f"upstreams:\n  box:\n    base_url: http://{host}/v1\n"), NOON)
    text = (
        f"{host.strip('[]')} is a link-local address, where cloud machines serve their credentials; write another one"
    )
    assert [(warning.line, warning.text) for warning in found] == ([(3, text)] if is_link_local else [])


def test_secrets_in_plain_text():
    """Digests, interpolated values and the path of an SQLite file are none."""
    plain = "this secret is in plain text; write ${NAME} or ${file:/path} for it"
    key = "a-key-of-24-characters-"
    below = (
        f"admin_keys:\n  a: {key}1\n  b: ${{ADMIN}}\n  c: {DIGEST}\n"
        f"unmatched: allow\nusers:\n  u: {{keys: [{key}2, '${{USER}}', '{DIGEST[:-1]}0']}}\n"
    )
    expected = [
        f"3: admin_keys: {plain}",
        f"8: users.u.keys[0]: {plain}",
    ]
    assert warned(below, ADMIN=f"{key}3", USER=f"{key}4") == expected
    upstream = "upstreams: {box: {base_url: http://box/v1, api_key: sk-1}}\n"
    assert [warning.text for warning in warnings(load_text(upstream), NOON)] == [f"upstreams.box.api_key: {plain}"]


def test_a_password_in_plain_text_in_the_databases_url():
    """Before the host or among the settings. An interpolated one is none."""
    plain = "this secret is in plain text; write ${NAME} or ${file:/path} for it"
    for url in ("postgresql://u:sesame@h/d", "postgresql://h/d?user=u&password=sesame"):
        assert warned(f"unmatched: allow\ndatabase: {url}\n") == [f"3: database: {plain}"]
    for url in ("postgresql://u:${PW}@h/d", "postgresql://h/d?user=u&password=${PW}"):
        assert warned(f"unmatched: allow\ndatabase: {url}\n", PW="sesame") == []


def test_percent_encoding_in_a_password_is_named_with_its_line():
    """T81: earlier releases decoded it. The password is not shown."""
    [found] = warned("unmatched: allow\ndatabase: postgresql://u:${PW}@h/d\n", PW="p%40ss-word")
    assert found.startswith("3: the value of ${PW} has a %XX, which is taken literally and not decoded")
    assert warned("unmatched: allow\ndatabase: ${URL}\n", URL="postgresql://u:p%40ss-word@h/d") == []
