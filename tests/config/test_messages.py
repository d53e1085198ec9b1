"""What is wrong with the shape of a file, in our own words, at its place."""

import pytest

from proxy.config.messages import Finding, did_you_mean, placed, read_file

RIGHT = {"upstreams": {"box": {"base_url": "http://box/v1"}}}


def texts(**sections: object) -> list[str]:
    return [fault.text for fault in read_file(RIGHT | sections)[1]]


def quota(**keys: object) -> list[str]:
    return texts(groups={"staff": {"quotas": {"daily": keys}}})


def test_a_right_file_has_no_faults():
    """Only its sections."""
    file, faults = read_file(RIGHT)
    assert faults == ()
    assert file is not None and list(file.upstreams) == ["box"]


EMPTY = "this is empty; give it a value or leave it out"
QUOTA = "groups.staff.quotas.daily"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: texts(grups={}), ['"grups" is no key of the file; did you mean "groups"?']),
        (
            lambda: texts(server={"port": 1}),
            ['server: "port" is no key of server; write one of api, admin, cors, connections'],
        ),
        (lambda: quota(tokns=1, per="day"), [f'{QUOTA}: "tokns" is no key of a quota; did you mean "tokens"?']),
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
            [f'{QUOTA}.tokens: "1g" is no whole number from 0 up; write 200000, 200_000, 200k or 5M'],
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
            [f'{QUOTA}.models: this has to be a list; write [ … ], or lines that begin with "- "'],
        ),
        (lambda: quota(per="day", tokens=1, models=[]), [f"{QUOTA}.models: this names nothing; name at least one"]),
        (lambda: quota(per="day", tokens=1, shared="maybe"), [f"{QUOTA}.shared: this has to be true or false"]),
        (
            lambda: quota(per="day", tokens=1, enforce="soft"),
            [f"{QUOTA}.enforce: this has to be one of exact, after or shadow"],
        ),
        (
            lambda: texts(groups={"staff": {"unlimited": True, "quotas": {"q": {"tokens": 1, "per": "day"}}}}),
            ["groups.staff: unlimited and quotas contradict each other; write one of them, or two groups"],
        ),
        (
            lambda: texts(groups={"a b": {}}),
            ["groups.a b: this is no name; write letters, digits, dots, dashes and underscores, at most 100"],
        ),
        (lambda: texts(groups={"staff": None}), [f"groups.staff: {EMPTY}"]),
        (
            lambda: texts(groups={"staff": []}),
            ['groups.staff: this has to be a mapping; write "key: value" lines below it'],
        ),
        (lambda: texts(groups=["staff"]), ['groups: this has to be a mapping; write "name: …" lines below it']),
        (lambda: texts(upstreams={}), ["upstreams: this names nothing; name at least one"]),
        (
            lambda: texts(upstreams={"a": {}}),
            ['upstreams.a: "base_url" is missing; write base_url: https://api.openai.com/v1'],
        ),
        (lambda: texts(help="x" * 1001), ["help: this is too long; write at most 1000 characters"]),
        (lambda: texts(help=["x"]), ["help: this has to be one piece of text; write it in quotes"]),
        (
            lambda: texts(users={"alice": {"keys": ["short"]}}),
            ["users.alice.keys[0]: this key is too short; write one of 24 random characters or more"],
        ),
        (
            lambda: texts(admin_keys={"a-secret-in-place-of-a-name": "ops"}),
            ["admin_keys: this key is too short; write one of 24 random characters or more"],
        ),
        (
            lambda: texts(models={"m": {"context": 10, "max_output_tokens": 11}}),
            ["models.m: max_output_tokens is larger than context; write the smaller number there"],
        ),
    ],
)
def test_a_fault_says_where_what_and_what_to_write(found, expected):
    """At the place in the file's own words, whatever pydantic calls it."""
    assert found() == expected


def test_what_is_missing_at_the_top_is_shown_whole():
    """An example that can be pasted."""
    [fault] = read_file({})[1]
    assert fault == Finding(
        ("upstreams",),
        '"upstreams" is missing; '
        'write upstreams: {"openai": {"base_url": "https://api.openai.com/v1", "api_key": "${OPENAI_API_KEY}"}}',
    )


def test_all_faults_are_found_at_once():
    """One report."""
    assert len(texts(grups={}, timezone="Mars", users={"a": {"groups": "x"}})) == 3


def test_a_flood_of_faults_has_an_end():
    """A file with a hundred thousand mistakes needs no report of all."""
    assert len(texts(groups={f"g{number}": None for number in range(2000)})) == 1000


def test_places_are_written_as_in_the_file():
    """Dots between names, numbers in brackets, nothing for the file itself."""
    assert placed(("users", "alice", "keys", 1), "no") == "users.alice.keys[1]: no"
    assert placed((), "no") == "no"


def test_the_nearest_word_is_asked_for():
    """Only where one is near; also for words of a megabyte, at once."""
    assert did_you_mean("staf", ["staff", "admins"]) == 'did you mean "staff"?'
    assert did_you_mean("x" * 1_000_000, ["staff"]) == ""
