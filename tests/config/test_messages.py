"""The texts of mistakes in the shape of a file, each at its key path."""

import pytest

from proxy.config.document import Finding
from proxy.config.messages import did_you_mean, read_file, with_path

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
                'server: "port" is not a key of server; write one of api, admin, admin_url, admin_hosts, cors, '
                "connections, connections_per_address, trusted_proxies, body_memory"
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
            lambda: texts(groups={"staff": []}),
            ['groups.staff: this must be a mapping; write "key: value" lines below it'],
        ),
        (lambda: texts(groups=["staff"]), ['groups: this must be a mapping; write "name: …" lines below it']),
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


def test_a_similar_word_is_suggested():
    """Only if one is similar. A word of a megabyte is compared at once."""
    assert did_you_mean("staf", ["staff", "admins"]) == 'did you mean "staff"?'
    assert did_you_mean("x" * 1_000_000, ["staff"]) == ""
