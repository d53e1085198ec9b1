"""The texts of mistakes in the shape of a file, each at its key path."""

import pytest

from proxy.config.document import Finding
from proxy.config.messages import read_file, with_path

VALID = {"upstreams": {"box": {"base_url": "http://box/v1"}}}


def texts(**sections: object) -> list[str]:
    return [finding.text for finding in read_file(VALID | sections)[1]]


def quota(**keys: object) -> list[str]:
    return texts(groups={"staff": {"quotas": {"daily": keys}}})


def test_a_valid_file_has_no_findings():
    """It gives its sections."""
    file, findings = read_file(VALID)
    assert findings == ()
    assert file is not None and list(file.upstreams) == ["box"]


EMPTY = "this has no value; write one, or remove the key"
NO_NAME = "this is not a valid name; use 1 to 100 letters, digits, dots, hyphens and underscores"
KEY_TOO_SHORT = "this key is too short; use one of 24 random characters or more"
QUOTA = "groups.staff.quotas.daily"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: texts(grups={}), ['"grups" is not a key of the file; did you mean "groups"?']),
        (
            lambda: texts(server={"port": 1}),
            [
                'server: "port" is not a key of server; write one of api, admin, prefix, api_url, admin_url, '
                "admin_hosts, cors, connections, connections_per_address, trusted_proxies, body_memory, "
                "shutdown_delay"
            ],
        ),
        (lambda: quota(tokns=1, per="day"), [f'{QUOTA}: "tokns" is not a key of a quota; did you mean "tokens"?']),
        (lambda: quota(tokens=1), [f'{QUOTA}: "per" is missing; write per: day']),
        (lambda: quota(per="day", tokens=None), [f"{QUOTA}.tokens: {EMPTY}"]),
        (
            lambda: quota(per="day"),
            [
                f"{QUOTA}: this quota limits nothing; "
                "write at least one of tokens, input_tokens, output_tokens, requests"
            ],
        ),
        (
            lambda: quota(per="day", tokens="1g"),
            [f'{QUOTA}.tokens: "1g" is not a whole number from 0 up; write one such as 200000, 200_000, 200k or 5M'],
        ),
        (
            lambda: quota(per=6, tokens=1),
            [
                f'{QUOTA}.per: "6" is no window: write a duration (90s, 15m, 6h, 7d) or one of '
                "minute, hour, day, week, month, quarter, year"
            ],
        ),
        (
            lambda: quota(per="day", tokens=1, models="*"),
            [f'{QUOTA}.models: this must be a list; write [ … ], or lines that begin with "- "'],
        ),
        (lambda: quota(per="day", tokens=1, models=[]), [f"{QUOTA}.models: this has no entries; add at least one"]),
        (
            lambda: quota(per="day", tokens=1, shared="maybe"),
            [f"{QUOTA}.shared: this is neither true nor false; write one of the two"],
        ),
        (
            lambda: quota(per="day", tokens=1, enforce="soft"),
            [f"{QUOTA}.enforce: this is not an allowed value; write exact, after or shadow"],
        ),
        (
            lambda: texts(groups={"staff": {"unlimited": True, "quotas": {"q": {"tokens": 1, "per": "day"}}}}),
            ["groups.staff: unlimited and quotas contradict each other; remove one of them, or write two groups"],
        ),
        (
            lambda: texts(groups={"a b": {}}),
            [f"groups.a b: {NO_NAME}"],
        ),
        (lambda: texts(groups={"staff": None}), [f"groups.staff: {EMPTY}"]),
        (
            lambda: texts(groups={"staff": "x"}),
            ['groups.staff: this must be a mapping; write "key: value" lines below it'],
        ),
        (lambda: texts(groups="staff"), ['groups: this must be a mapping; write "name: …" lines below it']),
        (lambda: texts(upstreams={}), ["upstreams: this has no entries; add at least one"]),
        (
            lambda: texts(upstreams={"a": {}}),
            ['upstreams.a: "base_url" is missing; write base_url: https://api.openai.com/v1'],
        ),
        (lambda: texts(help="x" * 1001), ["help: this is too long; write at most 1000 characters"]),
        (lambda: texts(help=["x"]), ["help: this must be text; put it in quotes"]),
        (
            lambda: texts(users={"alice": {"keys": ["short"]}}),
            [f"users.alice.keys[0]: {KEY_TOO_SHORT}"],
        ),
        (
            lambda: texts(admin_keys={"a-secret-in-place-of-a-name": "ops"}),
            [f"admin_keys: {KEY_TOO_SHORT}"],
        ),
        (
            lambda: texts(models={"m": {"context": 10, "max_output_tokens": 11}}),
            ["models.m: max_output_tokens is larger than context; write a smaller max_output_tokens"],
        ),
    ],
)
def test_a_finding_says_where_what_is_wrong_and_what_to_write(found, expected):
    """With the file's own keys and words, whatever pydantic's error type is."""
    assert found() == expected


def test_a_missing_key_comes_with_an_example():
    """The operator can paste it."""
    [finding] = read_file({})[1]
    assert finding == Finding(
        ("upstreams",),
        '"upstreams" is missing; '
        'write upstreams: {"openai": {"base_url": "https://api.openai.com/v1", "api_key": "${OPENAI_API_KEY}"}}',
    )


def test_all_mistakes_are_found_at_once():
    """One validation reports a bad key, a bad value and a bad type together."""
    assert len(texts(grups={}, timezone="Mars", users={"a": {"groups": "x"}})) == 3


def test_the_number_of_findings_is_limited():
    """A file with a hundred thousand mistakes gives a thousand findings."""
    assert len(texts(groups={f"g{number}": None for number in range(2000)})) == 1000


def test_a_key_path_has_dots_between_names_and_brackets_around_indexes():
    """The file itself has no path."""
    assert with_path(("users", "alice", "keys", 1), "no") == "users.alice.keys[1]: no"
    assert with_path((), "no") == "no"


LIST = 'this must be a mapping and not a list; write "name:" in place of each "- ", and the rest indented below it'
KIND_WORDS = "openai, azure, anthropic, vllm, ollama, llamacpp or simulator"


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        (lambda: texts(upstreams={"a": {"base_url": "http://a", "kind": "opneai"}}), 'did you mean "openai"?'),
        (lambda: texts(upstreams={"a": {"base_url": "http://a", "kind": "OpenAI"}}), 'did you mean "openai"?'),
        (
            lambda: texts(upstreams={"a": {"base_url": "http://a", "kind": "together"}}),
            f"write {KIND_WORDS}; openai is right for OpenRouter, LiteLLM and most others",
        ),
        (
            lambda: texts(upstreams={"a": {"base_url": "http://a", "on_disconnect": "drian"}}),
            'did you mean "drain"?',
        ),
        (lambda: texts(combine="any"), 'did you mean "any_group"?'),
        (lambda: texts(combine=["any_group"]), "write any_group or every_group"),
        (lambda: texts(unmatched="alow"), 'did you mean "allow"?'),
        (lambda: texts(week_starts="Mon"), 'did you mean "monday"?'),
        (lambda: texts(log={"format": "JSON"}), 'did you mean "json"?'),
        (lambda: texts(log={"calls": "refused"}), 'did you mean "refusals"?'),
        (lambda: texts(models={"m": {"encoding": "bert"}}), "write o200k_base, "),
        (lambda: texts(models={"m": {"encoding": "cl100k"}}), 'did you mean "cl100k_base"?'),
        (lambda: texts(admin_keys={"ops": {"key": "k" * 24, "role": "admin"}}), 'did you mean "administrator"?'),
        (lambda: quota(per="day", tokens=1, enforce="Exact"), 'did you mean "exact"?'),
    ],
)
def test_a_word_of_a_closed_list_is_suggested(found, hint):
    """For every setting that takes one of a few words."""
    [text] = found()
    assert f"this is not an allowed value; {hint}" in text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            lambda: texts(groups={"staff": {"tokens": 5, "quotas": {}}}),
            'groups.staff: "tokens" is not a key of a group, but of a quota; each quota has a name: write quotas: '
            "{daily: {tokens: 200k, per: day}}",
        ),
        (
            lambda: texts(groups={"staff": {"quotas": {"tokens": 5}}}),
            "groups.staff.quotas.tokens: each quota has a name: write quotas: {daily: {tokens: 200k, per: day}}",
        ),
        (
            lambda: texts(groups=[{"name": "staff"}]),
            f"groups: {LIST}",
        ),
        (
            lambda: texts(base_url="https://x/v1"),
            '"base_url" is not a key of the file; it is a key of an upstream: check the indentation of this line',
        ),
        (
            lambda: texts(groups={"users": {"alice": {}}}),
            'groups.users: "alice" is not a key of a group; if "users" is meant to be the section of the file, begin '
            "its line at the left margin",
        ),
        (
            lambda: texts(litellm_settings={}),
            '"litellm_settings" is not a key of the file; it is a section of LiteLLM: docs/litellm.md of this '
            "project says what its settings are called here",
        ),
        (
            lambda: quota(tokens=1, period="day"),
            f'{QUOTA}: "period" is not a key of a quota; did you mean "per"?',
        ),
        (
            lambda: texts(groups={"staff": {"quotas": {"daily": {"tokens": 200, "000": 0, "per": "day"}}}}),
            f'{QUOTA}: "000" is not a key of a quota; write a number without commas, as in 200_000',
        ),
        (
            lambda: texts(users={"alice": {"key": "x"}}),
            'users.alice: "key" is not a key of a user; did you mean "keys"?',
        ),
        (
            lambda: texts(users={"alice": {"keys": ["$ALICE_KEY"]}}),
            "users.alice.keys[0]: this is the name of a variable and not its value; write ${NAME}, with braces",
        ),
        (
            lambda: texts(upstreams={"a": {"base_url": "http://a", "api_key": "os.environ/OPENAI_API_KEY"}}),
            "upstreams.a.api_key: this is the name of a variable and not its value; write ${NAME}, with braces",
        ),
    ],
)
def test_a_key_in_the_wrong_place_says_where_it_belongs(found, text):
    """And a name of a variable without its braces is not taken for a key."""
    assert found() == [text]
