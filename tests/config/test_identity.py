"""Keys with limits, header sources and links to their users, as they are written in quotas.yaml."""

import re
from pathlib import Path
from textwrap import dedent

import pytest

from proxy.config.lint import warnings
from proxy.config.loader import BadConfig, Config, FileUser, HeaderSource, SignedHeader, load_text
from proxy.config.sentences import sentences
from proxy.config.values import digest
from proxy.policy.catalog import Secret
from proxy.policy.key import Key
from proxy.policy.quota import Globs
from tests.builders import NOON, instant

PAGE = Path(__file__).resolve().parents[2] / "docs" / "identity.md"
KEY = "a-key-of-24-characters-x"
ID = digest(KEY)[:8]
SECRET = "a-secret-of-32-characters-to-sign"
START = """\
upstreams: {box: {base_url: http://box/v1, kind: simulator}}
groups:
  staff: {quotas: {daily: {tokens: 200k, per: day}}}
  batch: {quotas: {daily: {tokens: 100k, per: day}}}
  admins: {unlimited: true}
users:
  alice: {groups: [staff, batch], keys: [KEYS], identities: [LINKS]}
  bob: {groups: [admins]}
identity: {headers: [SOURCES]}
"""
SSO = f'name: sso, key: "{KEY}", user: X-Forwarded-User'


def config(*, keys: str = "", links: str = "", sources: str = "", more: str = "") -> Config:
    text = START.replace("KEYS", keys).replace("LINKS", links).replace("SOURCES", sources) + more
    return load_text(text, environ={"KEY": KEY, "SECRET": SECRET})


def mistakes(**written: str) -> list[str]:
    with pytest.raises(BadConfig) as bad:
        config(**written)
    return [text.split(": ", 1)[1] for text in str(bad.value).splitlines()]


def warned(**written: str) -> list[str]:
    found = [warning.text for warning in warnings(config(**written), NOON)]
    return [text for text in found if "plain text" not in text]


# --------------------------------------------------------------------------------------------------------------- keys


def test_a_key_may_be_limited():
    """To groups, networks, models and a time; its label and tag are for the log and for reports."""
    written = (
        'key: "${KEY}", label: ci, expires: 2027-01-01, groups: [batch], from: [10.0.0.0/8, 192.0.2.7], '
        'models: ["gpt-4o*"], tag: nightly, tag_header: true'
    )
    [alice, _] = config(keys=f"{{{written}}}").users
    [key] = alice.keys.values()
    assert alice.keys.keys() == {digest(KEY)}
    assert [str(network) for network in key.networks] == ["10.0.0.0/8", "192.0.2.7/32"]
    assert key == Key(
        ID,
        "ci",
        groups=("batch",),
        models=Globs(["gpt-4o*"]),
        networks=key.networks,
        expires_at=instant("2027-01-01 00:00"),
        tag="nightly",
        takes_tag_header=True,
    )


def test_a_key_alone_has_no_limits():
    """As text, or as a mapping with nothing else."""
    for written in (f'"{KEY}"', f'{{key: "{KEY}"}}', f'{{key: "sha256:{digest(KEY)}"}}'):
        assert config(keys=written).users[0] == FileUser("alice", ("staff", "batch"), {digest(KEY): Key(ID)})


@pytest.mark.parametrize(
    ("expires", "at"),
    [
        ("2027-01-01", "2026-12-31 23:00"),  # the beginning of the day in Berlin
        ("2027-07-01", "2027-06-30 22:00"),
        ('"2027-01-01"', "2026-12-31 23:00"),
        ("2027-01-01T12:30Z", "2027-01-01 12:30"),
        ("2027-01-01 12:30:15z", "2027-01-01 12:30:15"),
        ("2027-01-01T12:30+05:30", "2027-01-01 07:00"),
        ("2027-01-01T00:00:00-08:00", "2027-01-01 08:00"),
    ],
)
def test_a_key_expires_at_the_beginning_of_a_day_or_at_an_instant(expires, at):
    """With a day, the key is valid until that day begins in the time zone of the policy."""
    found = config(keys=f'{{key: "{KEY}", expires: {expires}}}', more="timezone: Europe/Berlin\n")
    assert found.users[0].keys[digest(KEY)].expires_at == instant(at)


@pytest.mark.parametrize(
    "expires", ["2027", "2027-02-30", "2027-1-1", "tomorrow", "90d", "2027-01-01T12:30", "2027-01-01T25:00Z", "[]"]
)
def test_another_expiry_is_a_mistake(expires):
    """An instant without an offset too, because it could be meant in any time zone."""
    [text] = mistakes(keys=f'{{key: "{KEY}", expires: {expires}}}')
    assert text.startswith(
        "users.alice.keys[0].expires: this is not a day or an instant; write one such as 2027-01-01"
    )


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{}", '"key" is missing; write key: ${ALICE_KEY}'),
        (f'{{key: "{KEY}", form: []}}', '"form" is not a key of a key; did you mean "from"?'),
        ("{key: short}", "this key is too short; use one of 24 random characters or more"),
        (f'{{key: "{KEY}", from: [10.0.0.1/8]}}', "this is an address inside of a network; write 10.0.0.0/8 for"),
        (f'{{key: "{KEY}", from: [2001:db8::1/32]}}', "inside of a network; write 2001:db8::/32 for the whole"),
        (f'{{key: "{KEY}", from: [box]}}', "this is not a network; write one such as 10.0.0.0/8"),
        (f'{{key: "{KEY}", from: ["fe80::1%eth0"]}}', "this is not a network"),
        (f'{{key: "{KEY}", from: [10]}}', "this is not a network"),
        (f'{{key: "{KEY}", from: ["::ffff:10.0.0.0/104"]}}', "this is IPv4 in the form of IPv6; write the IPv4"),
        (f'{{key: "{KEY}", from: []}}', "this has no entries; add at least one"),
        (f'{{key: "{KEY}", from: 10.0.0.0/8}}', "this must be a list"),
        (f'{{key: "{KEY}", groups: []}}', "this has no entries; add at least one"),
        (f'{{key: "{KEY}", models: []}}', "this has no entries; add at least one"),
        (f'{{key: "{KEY}", label: ""}}', "this is not a valid label; write 1 to 100 characters, or remove it"),
        (f'{{key: "{KEY}", tag: {"x" * 65}}}', "this is not a valid tag; write 1 to 64 characters, or remove it"),
        (f'{{key: "{KEY}", tag_header: maybe}}', "this is neither true nor false; write one of the two"),
        (f'{{key: "{KEY}", groups: [stuff]}}', 'there is no group "stuff"; did you mean "staff"?'),
        (f'{{key: "{KEY}", groups: [default]}}', '"default" applies to users without being listed; remove it'),
        (
            f'{{key: "{KEY}", groups: [admins]}}',
            'alice is not in "admins", and a key is only for groups of its owner; write one of staff, batch',
        ),
        (f'"{KEY}", {{key: "{KEY}"}}', "user alice already has this key; write another one"),
        ("[]", "this must be text; put it in quotes"),
    ],
)
def test_a_mistake_in_a_key_says_what_to_write(written, expected):
    """T130: with the path and the line; a group of somebody else would widen what the owner may do."""
    [text] = mistakes(keys=written)
    assert text.startswith("users.alice.keys[")
    assert expected in text
    assert KEY not in text


def test_an_expired_key_is_a_warning():
    """It does nothing any more. That is no mistake, or a file would become invalid as time passes."""
    for expires, texts in (
        ("2026-11-24", ["users.alice.keys[0].expires: this key has expired; remove it, or write a later day"]),
        ("2026-11-25", []),
    ):
        assert warned(keys=f'{{key: "{KEY}", expires: {expires}}}') == texts


def test_keys_and_secrets_in_plain_text_are_warned_of():
    """Wherever they are; not a digest, and not what comes from the environment."""
    sources = (
        f'{{{SSO}, from: [10.0.0.1], unmapped: staff, signed: {{header: X-Jwt, secret: "{SECRET}", issuer: i}}}}'
    )
    of_alice = '{key: "another-key-of-24-characters"}'
    found = [warning.text for warning in warnings(config(keys=of_alice, sources=sources), NOON)]
    assert [text.split(": ")[0] for text in found if "plain text" in text] == [
        "users.alice.keys[0].key",
        "identity.headers[0].key",
        "identity.headers[0].signed.secret",
    ]
    hidden = sources.replace(f'"{KEY}"', '"${KEY}"').replace(f'"{SECRET}"', '"${SECRET}"')
    digested = f'{{key: "sha256:{"ab" * 32}"}}'
    assert not [text for text in warnings(config(keys=digested, sources=hidden), NOON) if "plain" in text.text]


# ------------------------------------------------------------------------------------------------------------ sources


def test_a_header_source():
    """Names of headers are compared in lower case. An entry of map is a name, or a mapping for an unlimited group."""
    written = (
        f"{SSO}, email: X-Forwarded-Email, groups: X-Forwarded-Groups, from: [10.0.3.0/24], users_max: 5k, "
        'map: {/staff: staff, "7": {group: batch}, ops: {group: admins, allow_unlimited: true}}, unmapped: batch, '
        "tag: sso, tag_header: true, emails_verified: true"
    )
    [source] = config(sources=f"{{{written}}}").header_sources
    assert source == HeaderSource(
        Key("sso", "sso", tag="sso", takes_tag_header=True),
        digest(KEY),
        networks=source.networks,
        user="x-forwarded-user",
        email="x-forwarded-email",
        groups="x-forwarded-groups",
        map={"/staff": "staff", "7": "batch", "ops": "admins"},
        unmapped="batch",
        users_max=5000,
        emails_verified=True,
    )
    assert source.mapped_groups == ("staff", "batch", "admins")
    assert source.header_names == ("x-forwarded-user", "x-forwarded-email", "x-forwarded-groups")
    assert digest(KEY) not in repr(source)


def test_a_signed_source_needs_no_other_header():
    """The claims are those of Open WebUI, unless others are written."""
    signed = 'header: X-OpenWebUI-User-Jwt, secret: "${SECRET}", issuer: open-webui'
    start = f'name: webui, key: "{KEY}"'
    [source] = config(sources=f"{{{start}, signed: {{{signed}}}}}").header_sources
    assert source.signed == SignedHeader("x-openwebui-user-jwt", Secret(SECRET), "open-webui", "sub", "email", None)
    assert (source.user, source.unmapped, source.users_max) == (None, None, 1000)
    [source] = config(sources=f"{{{start}, signed: {{{signed}, user: id, email: mail, groups: g}}}}").header_sources
    assert (source.signed.user, source.signed.email, source.signed.groups) == ("id", "mail", "g")
    assert SECRET not in repr(source)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (
            f'{{name: file, key: "{KEY}", user: X-User}}',
            '"file" is the name of another source of users; write another',
        ),
        (f'{{name: DataBase, key: "{KEY}", user: X-User}}', '"DataBase" is the name of another source of users'),
        (f'{{name: "a:b", key: "{KEY}", user: X-User}}', "this is not a valid name"),
        (f'{{name: sso, key: "{KEY}"}}', "no header says who the user is; write user, as in user: X-Forwarded-User"),
        (f'{{name: sso, key: "{KEY}", user: Authorization}}', "the header Authorization has another meaning"),
        (f'{{name: sso, key: "{KEY}", user: X-Forwarded-For}}', "the header X-Forwarded-For has another meaning"),
        (f'{{name: sso, key: "{KEY}", user: "X User"}}', "this is not the name of a header; write one such as"),
        ("{name: sso, user: X-User}", '"key" is missing; write key: ${WEBUI_KEY}'),
        (f"{{{SSO}, users_max: 0}}", "0 is not allowed here; write 1 or more, or remove the key"),
        (f"{{{SSO}, map: {{' a': staff}}}}", "this is not an id that a source can send"),
        (f"{{{SSO}, map: {{{'a' * 257}: staff}}}}", "this is not an id that a source can send"),
        (f"{{{SSO}, map: {{a: []}}}}", "this must be text; put it in quotes"),
        (f"{{{SSO}, map: {{a: {{allow_unlimited: true}}}}}}", '"group" is missing; write group: staff'),
        (f"{{{SSO}, map: {{a: stuff}}}}", 'there is no group "stuff"; did you mean "staff"?'),
        (f"{{{SSO}, map: {{a: {{group: stuff}}}}}}", 'there is no group "stuff"; did you mean "staff"?'),
        (f"{{{SSO}, map: {{a: everyone}}}}", '"everyone" applies to users without being listed; write another group'),
        (f"{{{SSO}, map: {{a: admins}}}}", '"admins" is unlimited; write {group: admins, allow_unlimited: true} if'),
        (f"{{{SSO}, map: {{a: {{group: admins}}}}}}", '"admins" is unlimited'),
        (f"{{{SSO}, map: {{a: {{group: admins, allow_unlimited: false}}}}}}", '"admins" is unlimited'),
        (f"{{{SSO}, map: {{'a,b': staff}}}}", "the header separates groups by commas, so none can have one"),
        (f"{{{SSO}, map: {{a@b.example: staff}}}}", "this is an e-mail address, and whoever can enter another one"),
        (f"{{{SSO}, unmapped: stuff}}", 'there is no group "stuff"'),
        (f"{{{SSO}, unmapped: default}}", '"default" applies to users without being listed; write another group'),
        (
            f"{{{SSO}, unmapped: admins}}",
            '"admins" is unlimited, and all users who are in no other group would be in',
        ),
        (
            f'{{{SSO}}}, {{name: sso, key: "{KEY}2", user: X-User}}',
            'there is already a source "sso"; write another name',
        ),
        (
            f'{{{SSO}}}, {{name: b, key: "{KEY}", user: X-User}}',
            "a header source already has this key; write another",
        ),
        (f"{{{SSO}, signed: {{header: X-Jwt, secret: {'x' * 31}, issuer: i}}}}", "this secret is too short to sign"),
        (
            f'{{{SSO}, signed: {{header: X-Jwt, secret: "{SECRET}"}}}}',
            '"issuer" is missing; write issuer: open-webui',
        ),
        (
            f'{{{SSO}, signed: {{header: X-Jwt, secret: "{SECRET}", issuer: ""}}}}',
            "this is empty; write at least one",
        ),
        (f'{{{SSO}, signed: {{header: Cookie, secret: "{SECRET}", issuer: i}}}}', "Cookie has another meaning"),
    ],
)
def test_a_mistake_in_a_source_says_what_to_write(sources, expected):
    """T131: what would let in more than was meant is a mistake, and so is every name that does not exist."""
    [text] = mistakes(sources=sources)
    assert text.startswith("identity.headers[")
    assert expected in text
    assert KEY not in text


def test_a_source_and_a_user_do_not_have_the_same_key():
    """T131: a request with it could be of either. The source is told, wherever it is in the file."""
    for key in (f'"{KEY}"', f'{{key: "sha256:{digest(KEY)}"}}'):
        found = mistakes(keys=key, sources=f"{{{SSO}}}")
        assert found == ["identity.headers[0].key: user alice already has this key; write another one"]
    assert mistakes(sources=f"{{{SSO}}}", more=f'admin_keys: {{ops: "{KEY}"}}\n') == [
        "identity.headers[0].key: an admin already has this key; write another one"
    ]


def test_users_of_sources_are_linked_to_a_user_of_the_file():
    """By their ids, in any alphabet."""
    sources = f"{{{SSO}, emails_verified: true}}"
    links = "{source: sso, id: Ærøskøbing/7}, {source: sso, id: ann@corp.example}, {source: sso, id: 7}"
    assert config(links=links, sources=sources).users[0].identities == (
        ("sso", "Ærøskøbing/7"),
        ("sso", "ann@corp.example"),
        ("sso", "7"),
    )


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ("{source: soo, id: a}", 'there is no source "soo"; did you mean "sso"?'),
        ("{source: file, id: bob}", 'there is no source "file"; add it to identity.headers'),
        (
            "{source: sso, id: ann@corp.example}",
            "this is an e-mail address, and whoever can enter another one at the",
        ),
        ("{source: sso, id: a}, {source: sso, id: a}", "user alice already has this identity; remove one of the two"),
        ("{source: sso, id: ''}", "this is not an id that a source can send"),
        ("{source: sso, id: 'a '}", "this is not an id that a source can send"),
        ('{source: sso, id: "a\\tb"}', "this is not an id that a source can send"),
        ("{source: sso}", '"id" is missing; write id: '),
        ("{id: a}", '"source" is missing; write source: open-webui'),
    ],
)
def test_a_mistake_in_a_link_says_what_to_write(links, expected):
    """T131: a link makes one user another, so it needs a source that exists and an id that nobody can choose."""
    [text] = mistakes(links=links, sources=f"{{{SSO}}}")
    assert text.startswith("users.alice.identities[")
    assert expected in text


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (
            f"{{{SSO}, unmapped: staff}}",
            ["identity.headers[0]: whoever has this key can be any of its users, from any"],
        ),
        (f"{{{SSO}, from: [10.0.0.1]}}", ["identity.headers[0]: it puts nobody in a group, so only those may call"]),
        (
            f"{{{SSO}, from: [10.0.0.1], map: {{a: staff}}}}",
            ["identity.headers[0].map: nothing that it sends is looked up here; write groups with the name of a"],
        ),
        (
            f'{{{SSO}, from: [10.0.0.1], unmapped: staff, signed: {{header: X, secret: "{SECRET}", issuer: i}}}}',
            ["identity.headers[0]: beside signed, the headers user, email and groups count for nothing; remove them"],
        ),
        (f"{{{SSO}, from: [10.0.0.1], groups: X-Groups, map: {{a: staff}}}}", []),
        (f"{{{SSO}, from: [10.0.0.1], email: X-Email, map: {{a@b: staff}}, emails_verified: true}}", []),
    ],
)
def test_a_source_that_does_not_do_what_it_seems_to_is_a_warning(sources, expected):
    """It is valid, and may be meant."""
    found = warned(sources=sources)
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_users_of_sources_count_as_members():
    """A group that only a source gives has members, and what its members have in common is not known by the file."""
    text = """
upstreams: {box: {base_url: http://box/v1, kind: simulator}}
groups:
  staff: {quotas: {daily: {tokens: 200k, per: day}}}
  admins: {unlimited: true}
users: {alice: {groups: [staff, admins]}}
"""
    source = f"{{{SSO}, from: [10.0.0.1], unmapped: staff}}"
    alone = [warning.text for warning in warnings(load_text(text), NOON)]
    assert alone == ["staff/daily can never refuse a call: all its members are also in admins, which is unlimited"]
    with_source = load_text(f"{text}identity: {{headers: [{source}]}}\n")
    assert [warning.text for warning in warnings(with_source, NOON) if "plain" not in warning.text] == []
    only_by_source = load_text(f"{text.replace('[staff, admins]', '[admins]')}identity: {{headers: [{source}]}}\n")
    assert not [warning for warning in warnings(only_by_source, NOON) if "no members" in warning.text]


@pytest.mark.parametrize(
    ("sources", "links", "sentence"),
    [
        (
            f"{{{SSO}, from: [10.0.3.0/24, 10.0.4.1], groups: X-Groups, map: {{a: staff, b: batch, c: staff}}}}",
            "{source: sso, id: a}, {source: sso, id: b}",
            "sso: with its key, from 10.0.3.0/24, 10.0.4.1, x-forwarded-user names the user: "
            "in staff by a, c; in batch by b; all others may not call; alice of this file by identities; "
            "at most 1,000 users.",
        ),
        (
            f'{{{SSO}, unmapped: staff, users_max: 5k, signed: {{header: X-Jwt, secret: "{SECRET}", issuer: i}}}}',
            "",
            "sso: with its key, from anywhere, the signed x-jwt names the user: all in staff; at most 5,000 users.",
        ),
        (
            f"{{{SSO}, groups: X-G, map: {{a: staff, b: staff, c: staff, d: staff, e: staff, f: staff, g: staff}}}}",
            "",
            "sso: with its key, from anywhere, x-forwarded-user names the user: "
            "in staff by a, b, c, d, e and 2 more; all others may not call; at most 1,000 users.",
        ),
    ],
)
def test_check_says_who_gets_in_by_which_source(sources, links, sentence):
    """With which header, from where, and in which groups."""
    assert sentences(config(sources=sources, links=links))[-1] == sentence


def blocks_of_the_page() -> list[str]:
    """The YAML in docs/identity.md: the indented blocks that begin with a section of the file."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = [dedent(block).strip("\n") for block in blocks]
    return [text for text in texts if text.startswith(("users:", "server:", "identity:"))]


def test_the_examples_of_the_page_are_valid():
    """Operators copy them. Those of sources have no warnings."""
    texts = blocks_of_the_page()
    assert [text.partition(":")[0] for text in texts] == [
        "users",
        "users",
        "server",
        "identity",
        "identity",
        "identity",
    ]
    environ = {name: f"{name}-with-some-more-characters-to-sign" for name in re.findall(r"\{([A-Z_]+)\}", str(texts))}
    groups = (
        "groups: {staff: {quotas: {a: {tokens: 5k, per: day}}}, batch: {}, guests: {}, admins: {unlimited: true}}\n"
    )
    for text in texts:
        sources = "" if text.startswith("identity") else f"{texts[3]}\n"
        found = load_text(
            f"upstreams: {{box: {{base_url: http://box/v1}}}}\n{groups}{sources}{text}\n", environ=environ
        )
        assert not [warning for warning in warnings(found, NOON) if "identity.headers" in warning.text]


def test_trusted_proxies_are_networks():
    """They need a restart, as the rest of `server` does."""
    found = load_text(
        "upstreams: {box: {base_url: http://box/v1}}\nserver: {trusted_proxies: [10.0.0.0/8, fd00::/8]}\n"
    )
    assert [str(network) for network in found.settings.trusted_proxies] == ["10.0.0.0/8", "fd00::/8"]
    without = load_text("upstreams: {box: {base_url: http://box/v1}}\n")
    assert without.settings.trusted_proxies == ()
    assert found.restart_only["server"] != without.restart_only["server"]
    with pytest.raises(BadConfig) as bad:
        load_text("upstreams: {box: {base_url: http://box/v1}}\nserver: {trusted_proxies: [10.0.0.1/8]}\n")
    assert "server.trusted_proxies[0]: this is an address inside of a network; write 10.0.0.0/8" in str(bad.value)
