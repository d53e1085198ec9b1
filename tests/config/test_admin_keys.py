"""Admin keys, the names of the admin listener, and how long the audit log is kept."""

from dataclasses import replace

import pytest

from proxy.config.lint import warnings
from proxy.config.loader import BadConfig, Config, load_text
from proxy.config.values import digest
from proxy.policy.admin import Admin
from tests.builders import NOON

KEY, OTHER = "a-key-of-24-characters-01", "a-key-of-24-characters-02"
BASE = "upstreams: {box: {base_url: http://box/v1}}\nunmatched: allow\n"


def load(text: str) -> Config:
    return load_text(BASE + text, "f.yaml", environ={"K": KEY, "K2": OTHER})


def mistake(text: str) -> str:
    """The one mistake in this text, behind its file and line."""
    with pytest.raises(BadConfig) as bad:
        load(text)
    assert len(bad.value.mistakes) == 1
    return str(bad.value).split(": ", 1)[1]


def test_a_plain_key_is_an_administrator_and_a_mapping_says_more():
    """A manager may grant up to the limit again, unless its key says otherwise."""
    found = load(
        f'admin_keys:\n  ops: "${{K}}"\n  eve: {{key: "${{K2}}", role: viewer}}\n'
        f"  max: {{key: {KEY}3, role: manager, groups: [staff, 7], grant_up_to: 50%}}\n"
        f"  mia: {{key: {KEY}4, role: manager, groups: [staff]}}\n  lea: {{key: 'sha256:{digest('x')}'}}\n"
    )
    assert found.admin_keys == {
        digest(KEY): Admin("ops"),
        digest(OTHER): Admin("eve", "viewer"),
        digest(f"{KEY}3"): Admin("max", "manager", ("staff", "7"), 50),
        digest(f"{KEY}4"): Admin("mia", "manager", ("staff",), 100),
        digest("x"): Admin("lea"),
    }


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{}", 'admin_keys: "key" is missing; write key: ${ADMIN_KEY}'),
        ("{key: short}", "admin_keys.key: this key is too short; use one of 24 random characters or more"),
        (f"{{key: {KEY}, role: root}}", "admin_keys.role: this is not an allowed value; write administrator, viewer"),
        (f"{{key: {KEY}, rule: viewer}}", 'admin_keys: "rule" is not a key of an admin key; did you mean "role"?'),
        (f"{{key: {KEY}, role: manager}}", "admin_keys: a manager needs groups; write the groups that it is for"),
        (f"{{key: {KEY}, role: manager, groups: []}}", "admin_keys.groups: this has no entries; add at least one"),
        (f"{{key: {KEY}, groups: [staff]}}", "admin_keys: groups is only for role: manager; remove it"),
        (f"{{key: {KEY}, grant_up_to: 50%}}", "admin_keys: grant_up_to is only for role: manager; remove it"),
        (
            f"{{key: {KEY}, role: manager, groups: [a], grant_up_to: 50}}",
            "admin_keys.grant_up_to: this is not a percentage; write a whole one from 0% to 1000%, as in 50%",
        ),
        (
            f"{{key: {KEY}, role: manager, groups: [a], grant_up_to: 1001%}}",
            "admin_keys.grant_up_to: this is not a percentage; write a whole one from 0% to 1000%, as in 50%",
        ),
    ],
)
def test_each_mistake_says_what_to_write(section, expected):
    """The name is left out, because an operator may have written the key in its place."""
    assert mistake(f"admin_keys: {{max: {section}}}\n").startswith(expected)


@pytest.mark.parametrize("other", [f"{{key: {KEY}, role: viewer}}", KEY])
def test_a_key_has_one_owner(other):
    """Not two admins, and not an admin and a user."""
    expected = "an admin already has this key; write another one"
    assert mistake(f"admin_keys: {{a: {{key: {KEY}}}, b: {other}}}\n").endswith(expected)
    assert mistake(f"admin_keys: {{a: {other}}}\nusers: {{u: {{keys: [{KEY}]}}}}\n") == f"users.u.keys[0]: {expected}"


def test_a_manager_of_a_group_that_the_file_lacks_is_a_warning():
    """The group may have been made at run time."""
    text = 'admin_keys: {m: {key: "${K}", role: manager, groups: [staff, stuff, lab]}}\n'
    config = load(f"{text}groups: {{staff: {{unlimited: true}}}}\nusers: {{u: {{groups: [staff]}}}}\n")
    assert [warning.text for warning in warnings(config, NOON)] == [
        'admin_keys.groups[1]: the file has no group "stuff"; did you mean "staff"?',
        'admin_keys.groups[2]: the file has no group "lab"; it must have been made at run time',
    ]


def test_a_key_in_plain_text_is_a_warning_in_both_forms():
    plain = "this secret is in plain text; write ${NAME} or ${file:/path} for it"
    config = load(f"admin_keys:\n  a: {{key: {KEY}}}\n  b: {OTHER}\n  c: {{key: 'sha256:{digest('x')}'}}\n")
    assert [warning.text for warning in warnings(config, NOON)] == [
        f"admin_keys.key: {plain}",
        f"admin_keys: {plain}",
    ]


def test_the_names_of_the_admin_listener():
    """They are compared with what browsers send: lower case, and no port that the scheme implies."""
    found = load("server: {admin_url: 'https://Quotas.example:443/', admin_hosts: [Quota-Proxy, a.b]}\n").settings
    assert (found.admin_url, found.admin_hosts) == ("https://quotas.example", ("quota-proxy", "a.b"))
    assert load("server: {admin_url: 'http://[::1]:8081'}\n").settings.admin_url == "http://[::1]:8081"
    assert (load("").settings.admin_url, load("").settings.admin_hosts) == (None, ())
    assert load("server: {api_url: 'https://LLM.example/'}\n").settings.api_url == "https://llm.example"


@pytest.mark.parametrize("prefix", ["/llm", "/team-a/llm_2", "/V1"])
def test_a_prefix_of_the_api(prefix):
    """It is taken as it is written. By default there is none."""
    assert load(f"server: {{prefix: {prefix}}}\n").settings.prefix == prefix
    assert load("").settings.prefix == ""


@pytest.mark.parametrize(
    "prefix",
    ["llm", "/llm/", "/", "''", "//llm", "/a//b", "/../llm", "/a.b", "/a b", "/%6c", "/v1", "/v1/llm", "/usage"],
)
def test_what_is_no_prefix(prefix):
    """The message says what to write."""
    assert mistake(f"server: {{prefix: {prefix}}}\n").startswith("server.prefix: ")
    assert "as in /llm" in mistake(f"server: {{prefix: {prefix}}}\n")


@pytest.mark.parametrize(
    "text",
    [
        *("admin_url: quotas.example", "admin_url: 'ftp://quotas.example'", "admin_url: '*'"),
        *("admin_url: 'https://quotas.example/admin'", "admin_url: 'https://u:p@quotas.example'"),
        *("admin_hosts: ['https://a']", "admin_hosts: ['a:80']", "admin_hosts: ['*']", "admin_hosts: ['']"),
    ],
)
def test_what_is_no_name_of_the_admin_listener(text):
    assert mistake(f"server: {{{text}}}\n").startswith("server.admin_")


def test_another_name_of_the_admin_listener_needs_a_restart():
    """A reload can say so."""
    for text in ("admin_url: 'https://a'", "admin_hosts: [a]", "api_url: 'https://a'", "prefix: /llm"):
        assert load(f"server: {{{text}}}\n").restart_only["server"] != load("").restart_only["server"]
    other = load("")
    other = replace(other, settings=replace(other.settings, lease_ms=5, may_be_new_database=True, database="x"))
    assert other.restart_only["server"] == load("").restart_only["server"]


def test_the_audit_log_is_kept_for_three_years():
    """As long as the daily sums, unless the file says otherwise."""
    assert load("").policy.keep.audit_ms == 1100 * 86_400_000
    assert load("keep: {audit: 730d}\n").policy.keep.audit_ms == 730 * 86_400_000
    assert load("keep: {audit: null}\n").policy.keep.audit_ms is None
