"""Files as people write them by mistake: each gets its line and a remedy, and nothing else that would distract."""

import pytest

from proxy.config.loader import BadConfig, load_text

GOOD = """\
upstreams:
  openai:
    base_url: https://api.openai.com/v1
    api_key: ${OPENAI_API_KEY}
models:
  gpt-4o: {max_output_tokens: 16384, context: 128k}
groups:
  staff:
    quotas:
      daily: {tokens: 200k, per: day}
users:
  alice: {groups: [staff], keys: ["${ALICE_KEY}"]}
"""
ENVIRON = {"OPENAI_API_KEY": "sk-upstream", "ALICE_KEY": "a" * 24}


def changed(*pairs: tuple[str, str]) -> str:
    """The good file with these texts replaced."""
    text = GOOD
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def found_in(text: str) -> list[tuple[int, str]]:
    """The mistakes of a file with their lines."""
    with pytest.raises(BadConfig) as raised:
        load_text(text, environ=ENVIRON)
    return [(mistake.line, mistake.text) for mistake in raised.value.mistakes]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(GOOD, id="the file itself"),
        pytest.param(GOOD.replace("\n", "\r\n"), id="lines of Windows"),
        pytest.param(f"\ufeff{GOOD}", id="byte order mark"),
        pytest.param(changed(("200k", "1.5k")), id="a fraction of a thousand"),
        pytest.param(
            '{"upstreams": {"o": {"base_url": "http://o/v1"}}, "groups": {"staff": {"quotas": {"d": {"tokens": 5, '
            '"per": "day"}}}}}',
            id="JSON, which is YAML",
        ),
        pytest.param(
            changed(("daily: {tokens: 200k, per: day}", "daily: &d {tokens: 200k, per: day}\n      more: *d")),
            id="an anchor and its alias",
        ),
    ],
)
def test_these_are_no_mistakes(text: str) -> None:
    """They look unusual, and mean what they say."""
    load_text(text, environ=ENVIRON)


@pytest.mark.parametrize(
    ("text", "line", "remedy"),
    [
        # The file as a whole.
        ("", 1, "the file is empty; write at least upstreams, groups and users"),
        ("- upstreams\n- groups\n", 1, 'start lines such as "groups:" at the left margin'),
        ("quotas.yaml\n", 1, 'start lines such as "groups:" at the left margin'),
        ('[server]\napi = "127.0.0.1:8080"\n', 2, "write name: value, and indent what is in a section"),
        ("OPENAI_API_KEY=sk-1\nALICE_KEY=abc\n", 1, "write name: value, and indent what is in a section"),
        ('{\n\t"upstreams": {}\n}\n', 2, "this line is indented with a tab; use spaces"),
        (f"{GOOD}---\n{GOOD}", 13, "a second YAML document begins here; keep one document and remove the ---"),
        (
            "services:\n  proxy:\n    image: llm-quota-proxy\n",
            1,
            'this is a file for Docker Compose, because it has "services"; give the path of the file with the policy',
        ),
        (
            "apiVersion: v1\nkind: ConfigMap\ndata: {}\n",
            1,
            'this is a file for Kubernetes, because it has "apiVersion"; write the policy alone into a file',
        ),
        (
            "model_list:\n  - model_name: gpt-4o\n    litellm_params: {model: openai/gpt-4o}\n",
            1,
            'this is a file for LiteLLM, because it has "model_list"; docs/litellm.md',
        ),
        ("general_settings: {master_key: sk-1234}\n", 1, "docs/litellm.md of this project says what its settings"),
        (f"{GOOD}litellm_settings: {{}}\n", 13, "it is a section of LiteLLM: docs/litellm.md"),
        # Indentation and nesting.
        (changed(("    quotas:\n", "\tquotas:\n")), 9, "this line is indented with a tab; use spaces"),
        (changed(("    quotas:\n", "   quotas:\n     x: 1\n")), 11, "check the indentation"),
        (changed(("    base_url", "   base_url")), 4, "check the indentation"),
        (
            changed(("    quotas:\n      daily: {tokens: 200k, per: day}", "    tokens: 200k\n    per: day")),
            9,
            'groups.staff: "tokens" is not a key of a group, but of a quota; each quota has a name: write quotas: {d',
        ),
        (
            changed(("      daily: {tokens: 200k, per: day}", "      tokens: 200k\n      per: day")),
            10,
            "groups.staff.quotas.tokens: each quota has a name: write quotas: {daily",
        ),
        (
            changed(("users:\n  alice: {groups: [staff], ", "  users:\n    alice: {groups: [staff], ")),
            12,
            'if "users" is meant to be the section of the file, begin its line at the left margin',
        ),
        (
            changed(("  openai:\n    base_url: ", "  base_url: "), ("    api_key", "  api_key")),
            2,
            'upstreams.base_url: this must be a mapping; write "key: value" lines below it',
        ),
        (
            changed(("upstreams:\n  openai:\n    base_url", "base_url"), ("    api_key", "api_key")),
            1,
            '"base_url" is not a key of the file; it is a key of an upstream: check the indentation of this line',
        ),
        # Lists in place of mappings, and the other way round.
        (
            changed(("  alice: {groups: [staff], keys", "  - {name: alice, groups: [staff], keys")),
            11,
            'users: this must be a mapping and not a list; write "name:" in place of each "- "',
        ),
        (
            changed(("  openai:\n    base_url", "  - base_url")),
            1,
            'upstreams: this must be a mapping and not a list; write "name:" in place of each "- "',
        ),
        (
            changed(("      daily: {tokens", "      - {name: daily, tokens")),
            9,
            "groups.staff.quotas: this must be a mapping and not a list",
        ),
        (changed(("groups: [staff]", "groups: staff")), 12, "users.alice.groups: this must be a list; write [ … ]"),
        (changed(('["${ALICE_KEY}"]', "${ALICE_KEY}")), 12, "inside [ ] and { }, put ${…} in quotes"),
        (changed(("groups: [staff]", "groups: {staff: true}")), 12, "users.alice.groups: this must be a list"),
        (
            changed(("  gpt-4o: {max_output_tokens: 16384, context: 128k}", "  - gpt-4o\n  - gpt-4o-mini")),
            5,
            'models: this must be a mapping and not a list; write "name:" in place of each "- "',
        ),
        # Numbers and windows.
        (changed(("200k", "200,000 tokens")), 10, "write a number without commas, as in 200_000"),
        (
            changed(("{tokens: 200k, per: day}", "\n        tokens: 200k tokens\n        per: day")),
            11,
            "did you mean 200k?",
        ),
        (changed(("200k", "200K")), 10, "did you mean 200k?"),
        (changed(("200k", "1.2345k")), 10, '"1.2345k" is not a whole number; write 1234 or 1235'),
        (changed(("200k", "-1")), 10, "for no limit, remove the key"),
        (changed(("200k", "unlimited")), 10, "for no limit, remove the key"),
        (changed(("per: day", "per: dya")), 10, '"dya" is no window: did you mean "day"?'),
        (changed(("per: day", "per: 6hours")), 10, '"6hours" is no window: did you mean "6h"?'),
        (changed(("per: day", "per: 1mo")), 10, '"1mo" is no window: did you mean "month"?'),
        (changed(("per: day", "per: 24:00")), 10, "as a base-60 number; put it in quotes"),
        (changed(("per: day", "period: day")), 10, 'did you mean "per"?'),
        # Names.
        (changed(("tokens: 200k", "token: 200k")), 10, 'did you mean "tokens"?'),
        (changed(("groups: [staff]", "groups: [stuff]")), 12, 'there is no group "stuff"; did you mean "staff"?'),
        (changed(("groups: [staff]", "group: [staff]")), 12, 'did you mean "groups"?'),
        (changed(("    api_key", "    kind: opneai\n    api_key")), 4, 'did you mean "openai"?'),
        (changed(("per: day", "per: day, enforce: strict")), 10, "write exact, after or shadow"),
        (changed(("per: day", "per: day, models: [*]")), 10, "put a pattern that begins with * in quotes"),
        (changed(("per: day", "per: day, models: [*-mini]")), 10, 'put "*-mini" in quotes if it is a pattern'),
        (changed(("  staff:\n", "  staff:\n    unlimited: no\n")), 9, "write true or false"),
        # Values from elsewhere.
        (
            changed(("${OPENAI_API_KEY}", "${OPENAI_KEY}")),
            4,
            "OPENAI_KEY is not set in the environment; set it, or write",
        ),
        (changed(("${OPENAI_API_KEY}", "$OPENAI_API_KEY")), 4, "write ${NAME}, with braces"),
        (changed(("${OPENAI_API_KEY}", "os.environ/OPENAI_API_KEY")), 4, "write ${NAME}, with braces"),
        (changed(("${OPENAI_API_KEY}", "${OPENAI_API_KEY")), 4, "a ${ is not closed by its own }"),
        (changed(("${OPENAI_API_KEY}", "${file:secrets/key}")), 4, "write one that begins with /"),
        (
            changed(('"${ALICE_KEY}"', "sk-alice")),
            12,
            "this key is too short; use one of 24 random characters or more",
        ),
        # What YAML has, and this file has not.
        (f"{GOOD}groups: {{}}\n", 13, '"groups" is already on line 7; merge the two'),
        (changed(("      daily: {", "      more: *base\n      daily: {")), 10, "define &base first"),
        (
            changed(("      daily: {", "      base: &base {tokens: 5, per: day}\n      daily: {<<: *base, ")),
            11,
            "merge keys (<<) are not supported; write the keys out",
        ),
        (changed(("api_key: $", "api_key: !env $")), 4, "YAML tags (!…) are not supported; remove the tag"),
        (changed(("https://api.openai.com/v1", "https://api.openai.com/v1: main")), 3, "quote text that contains"),
    ],
)
def test_a_typical_mistake_has_its_line_and_a_remedy(text: str, line: int, remedy: str) -> None:
    """The first mistake is the one to mend."""
    found = found_in(text)
    assert (line, remedy) == (found[0][0], remedy if remedy in found[0][1] else found[0][1])
