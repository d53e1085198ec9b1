"""What `check` says of a policy that was taken: warnings that are never wrong, and a sentence for each group."""

import pytest

from proxy.config.lint import sentences, warnings
from proxy.config.loader import load, load_text
from tests.config.test_loader import EXAMPLE, example_environ

UPSTREAM = "upstreams: {box: {base_url: http://box/v1}}\n"
DIGEST = f"sha256:{'ab' * 32}"
KNOWN = "max_output_tokens: 16k"


def warned(below: str, **environ: str) -> list[str]:
    return [f"{warning.line}: {warning.text}" for warning in warnings(load_text(UPSTREAM + below, environ=environ))]


def said(below: str) -> tuple[str, ...]:
    return sentences(load_text(UPSTREAM + below).policy)


def group(quotas: str, *, name: str = "staff", more: str = "", users: str = "alice: {groups: [staff]}") -> str:
    return f"groups:\n  {name}:\n    quotas:\n{quotas}{more}users: {{{users}}}\n"


DAILY = "      daily: {tokens: 200k, per: day}\n"


def test_a_policy_that_can_work_gets_no_warning():
    """Silence means that it does what it says."""
    assert warned(group(DAILY)) == []


def test_the_example_gets_no_warning():
    """What people copy is a good start."""
    assert warnings(load(str(EXAMPLE), example_environ())) == ()


# ------------------------------------------------------------------------------------------------ groups and users


def test_a_group_that_nobody_is_in():
    """The reserved ones hold for users without naming them."""
    more = "  empty: {unlimited: true}\n  everyone: {quotas: {a: {tokens: 5k, per: day}}}\n"
    assert warned(group(DAILY, more=more)) == ['6: nobody in this file is in group "empty"']


def test_a_group_that_states_nothing():
    """A group with a list of models states something."""
    more = "  a: {}\n  b: {models: [x]}\n"
    users = "alice: {groups: [staff, a, b]}"
    assert warned(group(DAILY, more=more, users=users)) == [
        '6: group "a" states nothing: no quotas, no models, not unlimited'
    ]


def test_a_groups_models_that_are_not_listed():
    """Only where the list is closed: another one may have them all."""
    more = "  a: {models: [gpt-5, 'o*']}\n"
    users = "alice: {groups: [staff, a]}"
    models = "models: {gpt-4o: {max_output_tokens: 16k}}\n"
    assert warned(group(DAILY, more=more, users=users) + models) == [
        '6: the models of group "a" match none of those listed under models'
    ]
    assert warned(group(DAILY, more=more, users=users)) == []
    assert warned(group(DAILY, more=more, users=users) + models.replace("}}", "}, '*': {}}")) == []


DEFAULT = "  default: {quotas: {d: {tokens: 5k, per: day}}}\n"
UNREACHABLE = "6: default binds nobody: each user has a group with a quota for every model"


@pytest.mark.parametrize(
    ("quotas", "users", "expected"),
    [
        (DAILY, "alice: {groups: [staff]}", [UNREACHABLE]),
        (DAILY, "alice: {groups: [staff]}, bob: {}", []),
        ("      o: {models: ['o*'], tokens: 200k, per: day}\n", "alice: {groups: [staff]}", []),
    ],
)
def test_a_default_that_binds_nobody(quotas, users, expected):
    """Since each user has a quota for whatever is called."""
    assert warned(group(quotas, more=DEFAULT, users=users)) == expected


def test_a_default_beside_an_unlimited_group_binds_nobody():
    """Unlimited is a say about every model too; with a list of models it is not."""
    below = f"groups:\n  all: {{unlimited: true}}\n{DEFAULT}users: {{a: {{groups: [all]}}}}\n"
    assert warned(below) == ["4: default binds nobody: each user has a group with a quota for every model"]
    assert warned(below.replace("unlimited: true", "unlimited: true, models: [x]")) == []


def test_users_whom_nothing_covers():
    """Every call of theirs would be refused; no longer with `default`, `everyone` or unmatched: allow."""
    text = "no quota covers them, so every call is refused: put them in a group, or add a group called default"
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
        ("{tokens: 0, per: day}", ["staff/q: 0 tokens refuse every call that it binds"]),
        ("{requests: 0, per: day}", ["staff/q: 0 requests refuse every call that it binds"]),
        (
            "{output_tokens: 1023, per: day}",
            ["staff/q: calls that ask for a longer answer than 1,023 tokens are never let in"],
        ),
        ("{tokens: 500, per: day}", ["staff/q: calls that ask for a longer answer than 500 tokens are never let in"]),
        ("{output_tokens: 1024, per: day}", []),
        ("{output_tokens: 500, per: day, enforce: after}", []),
        ("{input_tokens: 500, requests: 5, per: day}", []),
    ],
)
def test_limits_that_refuse_more_than_they_seem_to(quota, expected):
    """0 is a switch that is off; the smallest answer that is started has 1024 tokens, or what was asked."""
    assert warned(group(f"      q: {quota}\n")) == [f"5: {text}" for text in expected]


@pytest.mark.parametrize(
    ("models", "quota_models", "is_warned"),
    [
        ("{a: {smallest_answer: 500}}", "['*']", False),
        ("{a: {smallest_answer: 501}}", "['*']", True),
        ("{a: {smallest_answer: 4k}, b: {smallest_answer: 500}}", "['*']", False),
        ("{a: {smallest_answer: 4k}, b: {smallest_answer: 500}}", "[a]", True),
        ("{a: {}, b: {smallest_answer: 500}}", "[a]", True),
        ("{a: {smallest_answer: 500}, '*': {}}", "['*']", False),
        ("{a: {smallest_answer: 500}, '*': {}}", "['b*']", True),
    ],
)
def test_models_may_say_what_is_worth_starting_for(models, quota_models, is_warned):
    """So a small limit is none for a model with smaller answers; nothing is said unless it holds for all."""
    below = group(f"      q: {{models: {quota_models}, output_tokens: 500, per: day}}\n") + f"models: {models}\n"
    text = "5: staff/q: calls that ask for a longer answer than 500 tokens are never let in"
    assert (text in warned(below)) == is_warned


def test_a_limit_may_be_small_because_a_model_s_answers_are_large():
    """More than the thousand tokens that are usual."""
    below = group("      q: {output_tokens: 3k, per: day}\n") + f"models: {{a: {{smallest_answer: 4k, {KNOWN}}}}}\n"
    assert warned(below) == ["5: staff/q: calls that ask for a longer answer than 3,000 tokens are never let in"]


# ---------------------------------------------------------------------------------------------------- idle quotas

NO_MODEL = "can never refuse anybody: it matches no model that its group can use"


@pytest.mark.parametrize(
    ("quota_models", "group_models", "listed", "is_idle"),
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
def test_a_quota_that_matches_no_model(quota_models, group_models, listed, is_idle):
    """Decided by the closed list, or by names; two patterns might meet in a name that stands nowhere."""
    below = f"groups:\n  staff:\n    quotas:\n      q: {{models: {quota_models}, requests: 5, per: day}}\n"
    below += f"    models: {group_models}\n" if group_models else ""
    below += "users: {alice: {groups: [staff]}}\n"
    below += f"models: {listed}\n" if listed else ""
    assert warned(below) == ([f"5: staff/q {NO_MODEL}"] if is_idle else [])


def test_a_quota_that_only_watches_is_meant_to_refuse_nobody():
    """Shadow is no mistake."""
    assert (
        warned(group("      q: {models: [x], requests: 5, per: day, enforce: shadow}\n") + "models: {y: {}}\n") == []
    )


ADMINS = "  admins: {unlimited: true}\n"
IN_BOTH = "alice: {groups: [staff, admins]}"


@pytest.mark.parametrize(
    ("more", "users", "below", "is_idle"),
    [
        (ADMINS, IN_BOTH, "", True),
        (ADMINS, f"{IN_BOTH}, bob: {{groups: [staff]}}", "", False),
        (ADMINS, IN_BOTH, "combine: every_group\n", False),
        ("  admins: {unlimited: true, models: ['*']}\n", IN_BOTH, "", True),
        ("  admins: {unlimited: true, models: ['o*']}\n", IN_BOTH, "", False),
    ],
)
def test_a_quota_beside_an_unlimited_group(more, users, below, is_idle):
    """With any_group whoever is in both is let in through the other one."""
    text = "5: staff/daily can never refuse anybody: all its members are also in admins, which is unlimited"
    assert warned(group(DAILY, more=more, users=users) + below) == ([text] if is_idle else [])


def test_everyone_binds_also_those_who_are_unlimited():
    """So its quotas are never idle for that."""
    assert warned(group(DAILY, name="everyone", more=ADMINS, users="alice: {groups: [admins]}")) == []


@pytest.mark.parametrize(
    ("tight", "loose", "is_idle"),
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
def test_a_quota_beside_a_tighter_one(tight, loose, is_idle):
    """Only where the window of the one always lies inside the other's, and both count the same calls."""
    text = "6: staff/loose can never refuse anybody: staff/tight is used up first"
    found = warned(group(f"      tight: {{{tight}}}\n      loose: {{{loose}}}\n"))
    assert found == ([text] if is_idle else [])


def test_of_two_equal_quotas_the_second_is_idle():
    """Not each because of the other."""
    assert warned(group("      a: {requests: 5, per: day}\n      b: {requests: 5, per: day}\n")) == [
        "6: staff/b can never refuse anybody: staff/a is used up first"
    ]


def test_a_looser_quota_counts_where_members_have_other_groups():
    """Calls that come in through another group are charged to each quota by itself, if it has room for them."""
    quotas = "      tight: {requests: 5, per: day}\n      loose: {requests: 5, per: hour}\n"
    other = "  other: {quotas: {big: {requests: 50, per: day}}}\n"
    below = group(quotas, more=other, users="alice: {groups: [staff, other]}")
    assert warned(below) == []
    assert len(warned(f"{below}combine: every_group\n")) == 1
    assert len(warned(group(quotas, name="everyone", users="alice: {}"))) == 1


# ---------------------------------------------------------------------------------------------- models, upstreams

MODELS = f"models: {{gpt-4o: {{{KNOWN}}}, smart: {{model: gpt-4o, {KNOWN}}}, gpt-4o-mini: {{{KNOWN}}}}}\n"
ESCAPE = 'it matches "gpt-4o" but not "smart", which is the same model; add "smart" to its models'
FRONTIER = "      frontier: {models: [gpt-4o], requests: 5, per: day}\n"


@pytest.mark.parametrize(
    ("quotas", "group_models", "below", "escapes"),
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
def test_a_model_that_escapes_by_its_other_name(quotas, group_models, below, escapes):
    """Where a member may use that name, another quota lets it in, and nobody gave it a quota of its own."""
    text = group(quotas).replace("users:", f"    models: {group_models}\nusers:" if group_models else "users:")
    assert warned(text + MODELS + below) == ([f"5: staff/frontier: {ESCAPE}"] if escapes else [])


def test_a_model_escapes_also_where_its_own_name_is_not_listed():
    """An open list has it."""
    models = f"models: {{smart: {{model: gpt-4o, {KNOWN}}}, '*': {{}}}}\n"
    assert warned(group(FRONTIER + DAILY) + models) == [f"5: staff/frontier: {ESCAPE}"]
    assert warned(group(FRONTIER + DAILY) + f"models: {{gpt-4o: {{{KNOWN}}}, smart: {{{KNOWN}}}}}\n") == []


def test_a_model_escapes_also_by_its_second_upstream():
    """Whichever upstream is asked, the quota was meant for that model; it is said once."""
    several = "upstreams: [{upstream: box, model: gpt-5}, {upstream: spare, model: gpt-4o, weight: 0}]"
    models = f"models: {{gpt-4o: {{{KNOWN}, upstreams: [{{upstream: box}}, {{upstream: spare}}]}}, "
    models += f"smart: {{{several}, {KNOWN}}}}}\n"
    below = f"{group(FRONTIER + DAILY)}{models}".replace("users:", "default_upstream: box\nusers:", 1)
    text = f"upstreams: {{box: {{base_url: http://box/v1}}, spare: {{base_url: http://spare/v1}}}}\n{below}"
    found = [warning.text for warning in warnings(load_text(text))]
    assert found == [f"staff/frontier: {ESCAPE}"]


def test_who_is_not_bound_lets_nothing_escape():
    """A quota of default is no rule for those who have one of their own."""
    more = f"  default:\n    quotas:\n{FRONTIER}{DAILY}"
    assert warned(group(DAILY, more=more, users="alice: {groups: [staff]}, bob: {}") + MODELS) == [
        f"8: default/frontier: {ESCAPE}"
    ]
    assert ESCAPE not in str(warned(group(DAILY, more=more) + MODELS))


ENDLESS = "a whole answer may take staff/daily over its limit if its call states no maximum; write max_output_tokens"


@pytest.mark.parametrize(
    ("model", "quota", "is_endless"),
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
def test_a_model_whose_answers_have_no_known_end(model, quota, is_endless):
    """Where an exact quota promises never to be over; not for what makes no answers, and not in the demo."""
    upstreams = (
        "upstreams:\n  box: {base_url: http://box/v1}\n  stage: {base_url: http://box, kind: simulator}\n"
        "  claude: {base_url: http://box, kind: anthropic}\n"
    )
    below = f"{upstreams}default_upstream: box\nmodels:\n  gpt-x: {{{model}}}\n  other: {{{KNOWN}}}\n"
    below += group(f"      daily: {{{quota}, per: day}}\n")
    found = [f"{warning.line}: {warning.text}" for warning in warnings(load_text(below))]
    assert found == ([f"7: {ENDLESS}"] if is_endless else [])


def test_one_simulated_upstream_of_several_gives_no_end_to_the_others():
    """The simulator's answers have one by themselves."""
    upstreams = "upstreams:\n  box: {base_url: http://box/v1}\n  stage: {base_url: http://box, kind: simulator}\n"
    models = "models: {gpt-x: {upstreams: [{upstream: stage}, {upstream: box}]}}\n"
    assert ENDLESS in str(warnings(load_text(upstreams + models + group(DAILY))))


def test_it_is_said_once_for_each_model():
    """With the first quota that it may take over; an open list names none, and a quota without users binds none."""
    models = "models: {a: {}, b: {}, '*': {}}\n"
    weekly = "      weekly: {tokens: 2M, per: week}\n"
    assert warned(group(DAILY + weekly) + models) == [f"8: {ENDLESS}"] * 2
    assert warned(group(DAILY + weekly) + "models: {'*': {}}\n") == []
    assert ENDLESS not in str(warned(group(DAILY, users="") + models))
    everyone = group(DAILY, name="everyone", users="alice: {}") + "models: {a: {}}\n"
    assert warned(everyone) == [f"7: {ENDLESS.replace('staff', 'everyone')}"]


@pytest.mark.parametrize(
    ("host", "is_link_local"),
    [("169.254.169.254", True), ("[fe80::1]", True), ("127.0.0.1", False), ("metadata.example", False)],
)
def test_an_upstream_that_is_link_local(host, is_link_local):
    """There cloud machines keep what nobody else should get."""
    found = warnings(load_text(f"upstreams:\n  box:\n    base_url: http://{host}/v1\n"))
    text = f"{host.strip('[]')} is link-local: cloud machines give out their credentials there"
    assert [(warning.line, warning.text) for warning in found] == ([(3, text)] if is_link_local else [])


def test_secrets_in_plain():
    """A digest, a reference and a file of books are none."""
    plain = "a secret stands here in plain; write ${NAME} or ${file:/path} for it"
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
    assert [warning.text for warning in warnings(load_text(upstream))] == [f"upstreams.box.api_key: {plain}"]


# --------------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("below", "sentence"),
    [
        (
            group(
                DAILY + "      frontier: {models: [gpt-4o, 'o*'], tokens: 50k, requests: 100, per: 6h}\n",
                users="a: {groups: [staff]}, b: {groups: [staff]}, c: {groups: [staff]}",
            ),
            "staff: each of 3 members may use 200,000 tokens a day of any model, and on gpt-4o, o*: "
            "50,000 tokens and 100 requests in 6 hours from the first call.",
        ),
        (
            group("      pot: {shared: true, tokens: 5M, per: month}\n" + DAILY, users=IN_BOTH, more=ADMINS),
            "staff: its one member may use 200,000 tokens a day of any model; "
            "its one member may use 5,000,000 tokens a month of any model.",
        ),
        (
            group("      pot: {shared: true, output_tokens: 1, input_tokens: 2, requests: 1, per: 1w}\n").replace(
                "{groups: [staff]}", "{groups: [staff]}, bob: {groups: [staff]}"
            ),
            "staff: all 2 members together may use 2 input tokens, 1 output token and 1 request "
            "in 1 week from the first call of any model.",
        ),
        (
            group("      a: {requests: 5, per: hour, enforce: shadow}\n", users=""),
            "staff: its members (nobody in this file) may use 5 requests an hour (only watched) of any model.",
        ),
        (
            group("      a: {requests: 5, per: day, enforce: after}\n", name="everyone"),
            "everyone: every user, whatever the group, may use "
            "5 requests a day (counted when calls have ended) of any model.",
        ),
        (
            group("      a: {requests: 5, per: day, shared: true}\n", name="default"),
            "default: all users whose own groups have no quota for the model together may use "
            "5 requests a day of any model.",
        ),
        ("groups: {a: {unlimited: true}}", "a: its members (nobody in this file) may use any model without limit."),
        (
            "groups: {a: {unlimited: true, models: [x, y]}}",
            "a: its members (nobody in this file) may use any model without limit; of models only x, y.",
        ),
        ("groups: {a: {models: [x]}}", "a: no quotas; of models only x."),
    ],
)
def test_each_group_in_a_plain_sentence(below, sentence):
    """What a reader of the file should be able to agree with."""
    if "{groups: [staff]}" in below and ("everyone" in below or "default" in below):
        below = below.replace("{groups: [staff]}", "{}")
    assert said(below)[0] == sentence


def test_the_sentences_are_in_the_policys_order():
    """Since that order decides."""
    assert [sentence.partition(":")[0] for sentence in said("groups: {z: {}, a: {}}")] == ["z", "a"]
