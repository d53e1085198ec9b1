"""The whole file: the policy that it gives, or a report of every mistake with its line."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import schema
from proxy.config.document import BYTES_MAX
from proxy.config.loader import (
    Address,
    BadConfig,
    Config,
    ConnectionLimits,
    FileUser,
    Settings,
    load,
    load_text,
    read_capped,
)
from proxy.config.values import digest
from proxy.policy.admin import Admin
from proxy.policy.catalog import Allow, Model, Secret, Upstream
from proxy.policy.key import Key
from proxy.policy.policy import Group, Keep
from proxy.policy.quota import Globs, Limit
from proxy.policy.windows import Calendar, Duration

EXAMPLE = Path(__file__).resolve().parents[2] / "quotas.example.yaml"
KEY = "a-key-of-24-characters-x"
OF_ALICE = {digest(KEY): Key(digest(KEY)[:8])}

SMALL = """\
upstreams:
  box: {base_url: http://box/v1}
"""

WHOLE = """\
server: {api: "[::1]:9000", admin: null}
admin_keys: {ops: "${ADMIN}"}
database: sqlite:////srv/quotas.db
timezone: Europe/Berlin
week_starts: sunday
ledger_wait: 5s
keep: {calls: 30d, days: null}
combine: every_group
unmatched: allow
help: Ask ops.
upstreams:
  box: {base_url: http://box/v1/, kind: vllm}
  openai: {base_url: https://api.openai.com/v1, api_key: "${OPENAI}", allow: {tools: [mcp, web_search], store: true}}
default_upstream: openai
models:
  gpt-4o: {context: 128k, max_output_tokens: 16_384, encoding: o200k_base}
  big: {upstream: box, model: meta/llama, reasoning: true, smallest_answer: 2k}
  quick: {reasoning: false, allow: {service_tiers: [flex]}}
  "*": {upstream: box}
groups:
  everyone: {quotas: {calls: {requests: 5, per: week}}}
  first: {models: ["gpt-*"], quotas: {a: {tokens: 5, output_tokens: 4, per: 6h, shared: true, enforce: after}}}
  second: {unlimited: true}
  third: {quotas: {b: {output_tokens: 100k, overdraft: 4k, per: day}}}
users:
  alice: {groups: [second, first], keys: ["${ALICE}"]}
  1001: {}
"""
ENVIRON = {"ADMIN": "an-admins-key-of-some-length", "OPENAI": "sk-upstream", "ALICE": KEY}


def whole() -> Config:
    return load_text(WHOLE, environ=ENVIRON)


def mistakes(text: str, **environ: str) -> list[str]:
    with pytest.raises(BadConfig) as bad:
        load_text(text, "f.yaml", environ=environ)
    return str(bad.value).splitlines()


# --------------------------------------------------------------------------------- the policy and the settings


def test_the_settings_have_what_needs_a_restart():
    """The listeners and the database. The database's password is not in the config's repr."""
    config = whole()
    assert config.settings == Settings(Address("::1", 9000), None, "sqlite:////srv/quotas.db")
    assert load_text(SMALL).settings.admin == Address("127.0.0.1", 8081)
    assert "password" not in repr(config)
    pages = load_text(f'{SMALL}server: {{cors: ["https://App.example/", "*"], connections: 2k}}\n').settings
    assert (pages.cors, pages.connection_limits) == (("https://app.example", "*"), ConnectionLimits(connections=2000))
    limited = load_text(f"{SMALL}server: {{connections_per_address: 50}}\n").settings.connection_limits
    assert limited == ConnectionLimits(connections=4000, connections_per_address=50)
    unlimited = load_text(f"{SMALL}server: {{connections_per_address: null}}\n").settings.connection_limits
    assert unlimited == ConnectionLimits()


def test_a_change_that_needs_a_restart_is_found_by_its_section():
    """A reload can name the sections that it ignores."""
    now, then = load_text(SMALL).restart_only, load_text(f"{SMALL}database: sqlite:///other.db\n").restart_only
    assert now.keys() == then.keys() == {"server", "database"}
    assert [section for section in now if now[section] != then[section]] == ["database"]
    then = load_text(f"{SMALL}server: {{cors: ['https://app.example']}}\n").restart_only
    assert [section for section in now if now[section] != then[section]] == ["server"]


def test_the_config_has_every_section():
    """All values are interpolated."""
    config = whole()
    policy, catalog = config.policy, config.catalog
    box = Upstream("box", "http://box/v1", None, "vllm", "stop")
    allowed = Allow(tools=frozenset(["mcp", "web_search"]), store=True)
    openai = Upstream("openai", "https://api.openai.com/v1", Secret("sk-upstream"), "openai", "drain", allow=allowed)
    assert catalog.upstreams == {"box": box, "openai": openai}
    assert catalog.default_upstream == openai
    assert catalog.models == {
        "gpt-4o": Model("gpt-4o", openai, "gpt-4o", 16_384, 128_000, "o200k_base"),
        "big": Model("big", box, "meta/llama", reasoning=True, smallest_answer=2000),
        "quick": Model("quick", openai, "quick", reasoning=False, allow=Allow(service_tiers=frozenset(["flex"]))),
        "*": Model("*", box, "*"),
    }
    assert {key: user.name for user in config.users for key in user.keys} == {digest(KEY): "alice"}
    assert config.admin_keys == {digest("an-admins-key-of-some-length"): Admin("ops")}
    assert (policy.wait_s, policy.ledger_wait_s) == (30, 5)
    assert policy.keep == Keep(calls_ms=30 * 86_400_000, days_ms=None)
    assert load_text(SMALL).policy.keep == Keep()
    assert (policy.combine, policy.unmatched, policy.help) == ("every_group", "allow", "Ask ops.")
    assert policy.zone.key == "Europe/Berlin"


def test_an_upstream_may_have_additional_members_in_its_usage():
    """Each is charged once, however often it is listed. By default there are none."""
    box = "  up: {base_url: http://up/v1, extra_usage: [reasoning_tokens, x, reasoning_tokens]}\n"
    text = f"upstreams:\n{box}"
    assert load_text(text).catalog.upstreams["up"].extra_usage == ("reasoning_tokens", "x")
    [default] = load_text(SMALL).catalog.upstreams.values()
    assert default.extra_usage == ()


def test_an_upstream_may_have_a_number_of_slots_and_heartbeats():
    """By default it has any number of calls at a time, and no heartbeat before its answer."""
    box = "  up: {base_url: http://up/v1, max_in_flight: 16, heartbeat: 90s}\n"
    upstream = load_text(f"upstreams:\n{box}").catalog.upstreams["up"]
    assert (upstream.max_in_flight, upstream.heartbeat_s) == (16, 90)
    [default] = load_text(SMALL).catalog.upstreams.values()
    assert (default.max_in_flight, default.heartbeat_s) == (None, None)
    assert mistakes(f"upstreams:\n{box.replace('16', '0')}") == [
        "f.yaml:2: upstreams.up.max_in_flight: 0 is not allowed here; write 1 or more, or remove the key"
    ]


def test_groups_and_quotas_are_in_the_order_of_the_file():
    """Calendar windows have the file's time zone and first day of the week."""
    groups = whole().policy.groups
    assert list(groups) == ["everyone", "first", "second", "third"]
    [calls] = groups["everyone"].quotas
    assert isinstance(calls.per, Calendar)
    assert (calls.per.text, calls.per.zone.key, calls.per.week_starts) == ("week", "Europe/Berlin", 6)
    [a] = groups["first"].quotas
    assert (a.id, a.limits) == ("first/a", (Limit("tokens", 5), Limit("output_tokens", 4)))
    assert (a.per, a.shared, a.enforce, a.models) == (Duration("6h", 21_600_000), True, "after", Globs())
    assert groups["first"].models == Globs(["gpt-*"])
    assert groups["second"] == Group("second", unlimited=True)
    [b] = groups["third"].quotas
    assert (a.overdraft, b.overdraft) == (0, 4000)


def test_a_users_groups_are_in_the_order_of_the_groups_section():
    """The order in which the user lists them does not matter."""
    assert whole().users == (FileUser("alice", ("first", "second"), OF_ALICE), FileUser("1001"))


def test_the_text_of_a_config_has_no_digests_of_keys():
    """A config that is dumped into a log does not help to search for a key."""
    config = whole()
    shown = f"{config.users} {config.policy} {config!r}"
    assert "alice" in shown
    for key in (KEY, "an-admins-key-of-some-length"):
        assert key not in shown
        assert digest(key) not in shown


def test_the_only_upstream_is_the_default():
    """default_upstream need not be written."""
    catalog = load_text(SMALL).catalog
    assert catalog.models is None
    assert catalog.default_upstream == catalog.upstreams["box"]


def test_no_default_upstream_is_needed_if_every_model_names_one():
    """Then the catalog has none."""
    catalog = load_text(
        "upstreams: {a: {base_url: http://a}, b: {base_url: http://b}}\nmodels: {m: {upstream: b}}\n"
    ).catalog
    assert catalog.default_upstream is None
    assert catalog.models is not None and catalog.models["m"].upstream.name == "b"


TWO = "upstreams: {a: {base_url: http://a}, b: {base_url: http://b, kind: vllm}}\n"
ONLY_A_ROUTE = '"*" only says which upstream other names go to; remove this, or list the model by its name'


def test_a_model_may_have_several_upstreams():
    """Each target has its own upstream, name and weight; the model's other properties hold for all of them."""
    config = load_text(
        f"{TWO}retry_for: 5s\nmodels:\n"
        "  m: {max_output_tokens: 100, upstreams: [{upstream: a, weight: 3}, {upstream: b, model: m-1}]}\n"
        '  "*": {upstreams: [{upstream: b, weight: 0}, {upstream: a}]}\n'
    )
    catalog = config.catalog
    a, b = catalog.upstreams["a"], catalog.upstreams["b"]
    model, other = catalog.model("m"), catalog.model("x")
    assert model is not None and other is not None
    served = [(target.upstream, target.upstream_model, target.weight) for target in model.targets]
    assert served == [(a, "m", 3), (b, "m-1", 1)]
    assert {(target.name, target.max_output_tokens) for target in model.targets} == {("m", 100)}
    assert [(target.upstream, target.upstream_model, target.weight) for target in other.targets] == [
        (b, "x", 0),
        (a, "x", 1),
    ]
    assert (config.policy.retry_for_ms, load_text(SMALL).policy.retry_for_ms) == (5000, 30_000)


def test_a_mistake_in_a_models_upstreams_has_its_path():
    """An unknown upstream, a value that is not a list, and a name where "*" allows none."""
    assert mistakes(f"{TWO}models:\n  m: {{upstreams: [{{upstream: a}},\n    {{upstream: c}}]}}\n") == [
        'f.yaml:4: models.m.upstreams[1].upstream: there is no upstream "c"; '
        "add it below upstreams, or write one of a, b"
    ]
    assert mistakes(f'{TWO}models:\n  "*": {{upstreams: [{{upstream: a, model: x}}]}}\n') == [
        f"f.yaml:3: models.*.upstreams[0].model: {ONLY_A_ROUTE}"
    ]
    assert mistakes(f"{TWO}models: {{m: {{upstreams: a}}}}\n") == [
        'f.yaml:2: models.m.upstreams: this must be a list; write [ … ], or lines that begin with "- "'
    ]


def test_equal_policies_have_equal_hashes():
    """Layout and listeners do not change the hash; a new key does, also if it comes from the environment."""
    first = whole().policy.hash
    assert re.fullmatch("[0-9a-f]{12}", first)
    again = WHOLE.replace('server: {api: "[::1]:9000", admin: null}', "# elsewhere\nserver: {api: 0.0.0.0:80}")
    assert load_text(again, environ=ENVIRON).policy.hash == first
    assert load_text(WHOLE, environ=ENVIRON | {"ALICE": f"{KEY}y"}).policy.hash != first
    assert load_text(WHOLE.replace("tokens: 5,", "tokens: 6,"), environ=ENVIRON).policy.hash != first


# -------------------------------------------------------------------------------------------------------- mistakes

NO_SUCH = "users.alice.groups[0]: there is no group"


@pytest.mark.parametrize(
    ("below", "expected"),
    [
        ("users: {alice: {groups: [staf]}}\ngroups: {staff: {}}", [f'3: {NO_SUCH} "staf"; did you mean "staff"?']),
        (
            "users: {alice: {groups: [x]}}\ngroups: {default: {}, a: {}, b: {}}",
            [f'3: {NO_SUCH} "x"; add it below groups, or write one of a, b'],
        ),
        ("users: {alice: {groups: [x]}}", [f'3: {NO_SUCH} "x"; add it below groups']),
        (
            "users:\n  alice:\n    groups:\n      - everyone\n      - default\ngroups: {default: {}}",
            [
                '6: users.alice.groups[0]: "everyone" applies to users without being listed; remove it',
                '7: users.alice.groups[1]: "default" applies to users without being listed; remove it',
            ],
        ),
        (
            "users: {alice: {groups: [a b, [c], true]}}",
            [
                "3: users.alice.groups[0]: this is not a valid name; "
                "use 1 to 100 letters, digits, dots, hyphens and underscores",
                "3: users.alice.groups[1]: this must be text; put it in quotes",
                "3: users.alice.groups[2]: this must be text; put it in quotes",
            ],
        ),
        (
            "groups: {a: {quotas: {b: {requests: 5, overdraft: 4k, per: day}}}}",
            [
                "3: groups.a.quotas.b: overdraft needs enforce: exact and a limit of tokens or output_tokens; "
                "remove it from this quota"
            ],
        ),
        (
            "models: {m: {reasoning: maybe}}",
            ["3: models.m.reasoning: this is neither true nor false; write one of the two"],
        ),
        (
            "models: {m: {smallest_answer: 0}}",
            ["3: models.m.smallest_answer: 0 is not allowed here; write 1 or more, or remove the key"],
        ),
        ("default_upstream: bo", ['3: default_upstream: there is no upstream "bo"; did you mean "box"?']),
        ("models:\n  m:\n    upstream: bo", ['5: models.m.upstream: there is no upstream "bo"; did you mean "box"?']),
        (
            'models:\n  "*":\n    model: m\n    context: 5',
            [
                f"5: models.*.model: {ONLY_A_ROUTE}",
                f"6: models.*.context: {ONLY_A_ROUTE}",
            ],
        ),
        (
            "groups: {everyone: {unlimited: true}}",
            [
                "3: groups.everyone.unlimited: everyone only adds limits; "
                "write unlimited in default, or unmatched: allow"
            ],
        ),
        (
            f"users:\n  a: {{keys: [{KEY}]}}\n  b: {{keys: ['sha256:{digest(KEY)}']}}",
            ["5: users.b.keys[0]: user a already has this key; write another one"],
        ),
        (
            f"users:\n  a: {{keys: [{KEY}, {KEY}]}}",
            ["4: users.a.keys[1]: user a already has this key; write another one"],
        ),
        (
            f"users:\n  a: {{keys: [{KEY}]}}\nadmin_keys: {{ops: {KEY}}}",
            ["4: users.a.keys[0]: an admin already has this key; write another one"],
        ),
        ("users: alice", ['3: users: this must be a mapping; write "name: …" lines below it']),
        (
            "server: {api: 010}",
            [
                '3: some YAML parsers do not read "010" as a decimal number; '
                "write it in decimal without a 0 in front, or put it in quotes"
            ],
        ),
        ("help: ${NOPE}", ["3: NOPE is not set in the environment; set it, or write ${NOPE:-default}"]),
        (
            "groups: {a: 1}\ngroups: {b: 2}",
            [
                '3: groups.a: this must be a mapping; write "key: value" lines below it',
                '4: "groups" is already on line 3; merge the two',
            ],
        ),
    ],
)
def test_each_mistake_has_its_line_and_what_to_write(below, expected):
    """`file:line: path: what is wrong; what to write instead`."""
    assert mistakes(SMALL + below) == [f"f.yaml:{line}" for line in expected]


SEVERAL = "upstreams:\n  a: {base_url: http://a}\n  b: {base_url: http://b}\n"


def test_several_upstreams_need_a_default():
    """Unless there are models and every one of them names an upstream."""
    assert mistakes(SEVERAL) == [
        "f.yaml:1: upstreams: there are several and no models; write default_upstream: one of a, b"
    ]
    assert mistakes(f"{SEVERAL}models:\n  m: {{upstream: a}}\n  k: {{}}\n") == [
        "f.yaml:6: models.k: there are several upstreams; write upstream or upstreams here, or default_upstream"
    ]


def test_one_report_has_every_mistake():
    """Those of the YAML, of the sections and across sections, sorted by line."""
    text = "upstreams: {box: {base_url: box}}\nusers: {a: {groups: [x]}}\nwek: 1\ncombine: no\n"
    assert [line.split(":")[1] for line in mistakes(text)] == ["1", "2", "3", "4"]


def test_a_report_shows_the_first_hundred_mistakes():
    """The exception has all of them."""
    text = SMALL + "".join(f"k{number}: 1\n" for number in range(150))
    lines = mistakes(text)
    assert len(lines) == 101
    assert lines[-1] == "and 50 more"
    with pytest.raises(BadConfig) as bad:
        load_text(text)
    assert len(bad.value.mistakes) == 150


@pytest.mark.parametrize(
    "section",
    [
        "help: [{}]",
        "combine: {}",
        "timezone: {}",
        "database: {}",
        "server: {{api: {}}}",
        "default_upstream: {}",
        "admin_keys: {{{}: ops}}",
        "admin_keys: {{{}: {{role: {}, groups: {}}}}}",
        "users: {{a: {{groups: [{}]}}}}",
        "users: {{a: {{keys: [{}, {}]}}}}",
        "users: {{a: {{keys: {}}}}}",
        "groups: {{g: {{quotas: {{q: {{tokens: {}, per: {}}}}}}}}}",
        "models: {{m: {{upstream: {}, context: {}}}}}",
    ],
)
def test_an_interpolated_secret_in_the_wrong_place_is_not_printed(section):
    """A report shows no value from the environment, whichever key it was written at."""
    secret = "Pa55word-that-nobody-may-see"
    assert secret not in str(
        mistakes(SMALL + section.replace("{}", '"${SECRET}"').replace("{{", "{").replace("}}", "}"), SECRET=secret)
    )


@pytest.mark.parametrize("text", ["users: {a: {keys: [%s]}}", "users: {a: {keys: [%s, %s]}}", "admin_keys: {o: %s}"])
def test_a_key_in_plain_is_not_printed(text):
    """A key that is too short, that two users have, or that contains spaces."""
    for key in ("short-secret", "secret with blanks and some length", KEY):
        report = "" if key == KEY and text.count("%") == 1 else str(mistakes(SMALL + text.replace("%s", key)))
        assert "secret" not in report and KEY not in report


# ------------------------------------------------------------------------------------------------------ from a file


def test_a_file_is_loaded_from_disk(tmp_path):
    """With a key that comes from a second file."""
    (tmp_path / "key").write_text(f"{KEY}\n", encoding="utf-8")
    path = tmp_path / "quotas.yaml"
    path.write_text(f'{SMALL}users: {{alice: {{keys: ["${{file:{tmp_path}/key}}"]}}}}\n', encoding="utf-8")
    assert load(str(path), {}).users == (FileUser("alice", (), OF_ALICE),)


def test_a_missing_file_is_a_mistake(tmp_path):
    """It has the file's name and line 1, in the same format as all others."""
    path = f"{tmp_path}/none.yaml"
    with pytest.raises(BadConfig, match=r"none.yaml:1: the file can't be read \(No such file or directory\)"):
        load(path, {})
    with pytest.raises(BadConfig, match=r"\(not a valid path\)"):
        load("a\0b", {})


def test_a_file_without_an_end_is_read_up_to_the_limit():
    """T78: a device gives one byte more than the limit, so it is rejected as too large."""
    assert len(read_capped("/dev/zero")) == BYTES_MAX + 1


# ---------------------------------------------------------------------------------------------------- the example


def example_environ() -> dict[str, str]:
    """A value for each environment variable that the example uses outside of its comments."""
    lines = [line.partition(" #")[0] for line in EXAMPLE.read_text(encoding="utf-8").splitlines()]
    names = re.findall(r"\$\{([A-Z_]+)\}", "\n".join(line for line in lines if not line.startswith("#")))
    return {name: f"{name}-with-some-more-characters" for name in names}


def test_the_example_is_valid():
    """Operators copy it. It needs only the environment variables that it names."""
    config = load(str(EXAMPLE), example_environ())
    assert [user.name for user in config.users] == ["alice", "bob", "build", "carol", "dave"]


def test_the_example_shows_every_key():
    """Operators look for a setting in the example first."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for section in (
        schema.File,
        schema.Server,
        schema.Upstream,
        schema.FetchedKey,
        schema.OAuth,
        schema.Model,
        schema.Target,
        schema.Group,
        schema.Quota,
        schema.Keep,
        schema.AdminKey,
        schema.User,
        schema.UserKey,
        schema.Identity,
        schema.IdentitySources,
        schema.HeaderSource,
        schema.MappedGroup,
        schema.SignedHeader,
    ):
        for key in section.named_fields():
            # The file that `ca` names has to exist, so the example shows it in a comment.
            before = "[^\n]*" if key == "ca" else "[^#\n]*"
            assert re.search(rf"^{before}\b{key}:", text, flags=re.MULTILINE), f"{section.__name__}.{key}"


# ---------------------------------------------------------------------------------------------------------- any text

KEYS = st.sampled_from(
    [
        *schema.File.model_fields,
        *schema.Quota.model_fields,
        *schema.User.model_fields,
        *schema.Upstream.model_fields,
        "default",
        "everyone",
        "*",
        "a",
        "no",
        "1",
        "x y",
    ]
)
LEAVES = st.sampled_from(
    ["1", "no", "a", "'*'", "200k", "6h", "", "true", "${A}", "http://a", "[a, b]", "010", "{}", KEY]
)
NODES = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(KEYS.map(repr), inner, max_size=4).map(
            lambda parts: "{" + ", ".join(f"{key}: {value}" for key, value in parts.items()) + "}"
        )
        | st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
    ),
)


@given(st.dictionaries(KEYS, NODES, max_size=6), st.sampled_from(["", SMALL]))
def test_any_mapping_is_valid_or_raises_bad_config(sections, above):
    """No other exception is raised, and every mistake has a line of the file."""
    text = above + "".join(f"{key!r}: {value}\n" for key, value in sections.items())
    try:
        config = load_text(text, environ={"A": "b"})
    except BadConfig as bad:
        assert bad.mistakes
        assert all(1 <= mistake.line <= text.count("\n") + 1 for mistake in bad.mistakes)
    else:
        assert config.catalog.upstreams


@given(st.text())
def test_any_text_raises_bad_config(text):
    """Including text that is not YAML, or that UTF-8 can't encode."""
    with pytest.raises(BadConfig):
        load_text(f"{text}\ud800")
    with pytest.raises(BadConfig):
        load_text(text)


def test_smallest_answer_at_the_top_is_for_models_that_state_none() -> None:
    """Also for unlisted names. Without it a model has none, and quotas of any size decide."""
    text = "models: {a: {smallest_answer: 7}, b: {}, '*': {}}\n"
    catalog = load_text(f"{SMALL}{text}smallest_answer: 500\n").catalog
    found = [catalog.model(name) for name in ("a", "b", "unlisted")]
    assert [model and model.smallest_answer for model in found] == [7, 500, 500]
    opened = load_text(f"{SMALL}smallest_answer: 2k\n").catalog.model("any")
    assert opened is not None
    assert opened.smallest_answer == 2000
    without = load_text(SMALL).catalog.model("any")
    assert without is not None
    assert without.smallest_answer is None


def test_refuse_and_naming_of_an_upstream() -> None:
    """The fields as they are written; which names are one model is known of its kind."""
    text = (
        "upstreams: {a: {base_url: http://a/v1, kind: azure, refuse: [provider, X-Y]}, b: {base_url: http://b/v1}}\n"
    )
    found = load_text(text + "default_upstream: a\n").catalog.upstreams
    assert (found["a"].refuse, found["b"].refuse) == (frozenset(["provider", "X-Y"]), frozenset())
    assert (found["a"].naming.any_case, found["b"].naming.any_case) == (True, False)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("model", "every request has model, so no call could be made; remove it"),
        ("Messages", "every request has Messages, so no call could be made; remove it"),
        ("input", "every request has input, so no call could be made; remove it"),
        ("provider.order", "this is not the name of a field; "),
        ("provider[order]", "this is not the name of a field; "),
        ("", "this is not the name of a field; "),
        ("a b", "this is not the name of a field; "),
    ],
)
def test_a_field_that_cannot_be_refused(field: str, text: str) -> None:
    """It would refuse every call, or none: only fields at the top level have an effect."""
    with pytest.raises(BadConfig) as caught:
        load_text(f"upstreams: {{a: {{base_url: http://a/v1, refuse: ['{field}']}}}}\n")
    assert f"upstreams.a.refuse[0]: {text}" in str(caught.value)
