"""The shape of the file: its sections, their defaults, and the JSON Schema made of them."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from proxy.config import values
from proxy.config.schema import (
    Allow,
    Count,
    File,
    Flag,
    Group,
    Keep,
    Model,
    Name,
    Positive,
    Quota,
    Section,
    Server,
    Target,
    Text,
    Upstream,
    User,
    Wait,
    json_schema,
    section_at,
)
from proxy.policy.policy import Secret
from proxy.policy.quota import Limit

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = {"upstreams": {"box": {"base_url": "http://box/v1"}}}
SECTIONS = (File, Server, Keep, Allow, Upstream, Target, Model, Group, Quota, User)


def test_the_smallest_file_has_all_defaults():
    """What is left out is what the contract says."""
    file = File.model_validate(SMALLEST)
    assert file.server == Server(api="127.0.0.1:8080", admin="127.0.0.1:8081")
    assert (file.database, file.timezone, file.week_starts) == ("sqlite:///quotas.db", "UTC", "monday")
    assert (file.combine, file.unmatched, file.help) == ("any_group", "refuse", "")
    assert (file.models, file.default_upstream, file.groups, file.users, file.admin_keys) == (None, None, {}, {}, {})


def test_only_the_admin_listener_and_times_to_keep_may_be_null():
    """Null turns it off, or keeps for ever; anywhere else an empty key would be a rule that silently isn't there."""
    assert File.model_validate(SMALLEST | {"server": {"admin": None}}).server.admin is None
    assert File.model_validate(SMALLEST | {"keep": {"days": None}}).keep == Keep(days=None)
    for data in ({"server": None}, {"server": {"api": None}}, {"help": None}, {"models": None}):
        with pytest.raises(ValidationError):
            File.model_validate(SMALLEST | data)
    with pytest.raises(ValidationError):
        Quota.model_validate({"tokens": None, "requests": 5, "per": "day"})


@pytest.mark.parametrize(
    ("kind", "stated", "outcome"),
    [
        ("openai", None, "drain"),
        ("azure", None, "drain"),
        ("anthropic", None, "drain"),
        ("simulator", None, "drain"),
        ("vllm", None, "stop"),
        ("ollama", None, "stop"),
        ("llamacpp", None, "stop"),
        ("vllm", "drain", "drain"),
        ("openai", "stop", "stop"),
    ],
)
def test_what_happens_when_a_client_leaves_depends_on_the_kind(kind, stated, outcome):
    """Unless it is stated."""
    section = {"base_url": "http://box/v1", "kind": kind} | ({"on_disconnect": stated} if stated else {})
    assert Upstream.model_validate(section).when_client_leaves() == outcome


@pytest.mark.parametrize("days", ["89d", "1d"])
def test_sums_are_kept_at_least_as_long_as_their_calls(days):
    """A day that is deleted before its calls could come back, of a call that is put right late."""
    with pytest.raises(ValidationError, match="days is shorter than calls"):
        File.model_validate(SMALLEST | {"keep": {"days": days}})
    with pytest.raises(ValidationError, match="days is shorter than calls"):
        File.model_validate(SMALLEST | {"keep": {"calls": None, "days": "3660d"}})
    assert File.model_validate(SMALLEST | {"keep": {"calls": days, "days": days}}).keep.calls is not None


def test_numbers_that_were_put_in_are_text_and_still_numbers():
    """${LIMIT} gives text."""
    quota = Quota.model_validate({"tokens": "200k", "requests": 5, "per": "day", "shared": "true"})
    assert quota.limits() == (Limit("tokens", 200_000), Limit("requests", 5))
    assert quota.shared is True


def test_a_models_numbers_may_be_equal():
    """An answer may fill the whole context."""
    model = Model.model_validate({"context": "128k", "max_output_tokens": 128_000})
    assert (model.context, model.max_output_tokens) == (128_000, 128_000)


def test_names_of_digits_are_names():
    """A user called 1001 may be listed without quotes."""
    assert User.model_validate({"groups": [1001]}).groups == ["1001"]


@pytest.mark.parametrize(
    ("section", "data"),
    [
        (Model, {"context": 5, "max_output_tokens": 6}),
        (Model, {"upstream": "a", "upstreams": [{"upstream": "b"}]}),
        (Model, {"model": "a", "upstreams": [{"upstream": "b"}]}),
        (Model, {"upstreams": [{"upstream": "a", "weight": 2}, {"upstream": "a"}]}),
        (Model, {"upstreams": []}),
        (Quota, {"per": "day"}),
        (Quota, {"tokens": 5, "overdraft": 1, "per": "day", "enforce": "after"}),
        (Quota, {"tokens": 5, "overdraft": 1, "per": "day", "enforce": "shadow"}),
        (Quota, {"requests": 5, "overdraft": 1, "per": "day"}),
        (Quota, {"input_tokens": 5, "requests": 5, "overdraft": 1, "per": "day"}),
        (Group, {"unlimited": True, "quotas": {"a": {"requests": 5, "per": "day"}}}),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(section, data):
    """Each of its values may be right by itself."""
    with pytest.raises(ValidationError):
        section.model_validate(data)


def test_an_overdraft_is_for_answers_at_an_exact_limit():
    """Of tokens, or of output alone; none is the default, and may be said anywhere."""
    for limit in ("tokens", "output_tokens"):
        quota = Quota.model_validate({limit: "20k", "requests": 5, "overdraft": "4k", "per": "day"})
        assert quota.overdraft == 4000
    assert Quota.model_validate({"requests": 5, "per": "day"}).overdraft == 0
    assert Quota.model_validate({"requests": 5, "overdraft": 0, "per": "day", "enforce": "shadow"}).overdraft == 0
    for odd in (-1, "much", 1.5):
        with pytest.raises(ValidationError):
            Quota.model_validate({"tokens": 5, "overdraft": odd, "per": "day"})


def test_a_model_says_how_it_answers():
    """Whether it thinks unseen: yes, no, or as its name lets one expect; and what is worth starting for."""
    assert Model.model_validate({}).reasoning is None
    assert Model.model_validate({}).smallest_answer is None
    for written, said in ((True, True), ("true", True), (False, False), ("false", False)):
        assert Model.model_validate({"reasoning": written}).reasoning is said
    assert Model.model_validate({"smallest_answer": "4k"}).smallest_answer == 4000
    for odd in ({"reasoning": "maybe"}, {"reasoning": None}, {"smallest_answer": 0}, {"smallest_answer": None}):
        with pytest.raises(ValidationError):
            Model.model_validate(odd)


def test_a_group_is_limited_or_not():
    """A group may also state only which models there are for its members."""
    assert Group.model_validate({"unlimited": True}).quotas == {}
    assert list(Group.model_validate({"quotas": {"a": {"requests": 5, "per": "day"}}}).quotas) == ["a"]
    assert Group.model_validate({"models": ["gpt-*"]}).models == ["gpt-*"]


@pytest.mark.parametrize("flag", ["yes", 1, 0, "True"])
def test_a_flag_is_true_or_false(flag):
    """Nothing that only resembles it."""
    with pytest.raises(ValidationError):
        Group.model_validate({"unlimited": flag})


def test_secrets_do_not_show():
    """An upstream's key is wrapped, a user's is a digest at once, and neither is in what is printed."""
    file = File.model_validate(
        {
            "upstreams": {"box": {"base_url": "http://box/v1", "api_key": "sk-something-secret"}},
            "users": {"alice": {"keys": ["a-secret-of-24-characters"]}},
            "admin_keys": {"ops": "another-of-24-characters-"},
        }
    )
    assert file.upstreams["box"].api_key == Secret("sk-something-secret")
    for hidden in ("secret", "another"):
        assert hidden not in repr(file)


@pytest.mark.parametrize(
    ("path", "section"),
    [
        (("a",), File),
        (("server", "a"), Server),
        (("keep", "a"), Keep),
        (("upstreams", "box", "a"), Upstream),
        (("models", "m", "upstreams", 0, "a"), Target),
        (("upstreams", "box", "allow", "a"), Allow),
        (("models", "m", "allow", "a"), Allow),
        (("models", "m", "a"), Model),
        (("groups", "g", "a"), Group),
        (("groups", "g", "quotas", "q", "a"), Quota),
        (("users", "u", "a"), User),
    ],
)
def test_each_key_belongs_to_a_section(path, section):
    """So that a fault can name the keys that there are."""
    assert section_at(path) is section


def test_no_section_is_forgotten():
    """The list of this file is whole."""
    assert {*Section.__subclasses__()} == {*SECTIONS}


def test_every_key_is_described_in_a_sentence():
    """The descriptions are the documentation that editors show."""
    for section in SECTIONS:
        for name, field in section.model_fields.items():
            assert field.description and field.description.endswith("."), f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("field", "written", "taken"),
    [
        (Name, "staff", "staff"),
        (Name, 1001, "1001"),
        (Text, 7, "7"),
        (Count, "200k", 200_000),
        (Count, 0, 0),
        (Positive, "5M", 5_000_000),
        (Wait, "30s", 30_000),
        (Flag, "true", True),
        (Flag, False, False),
    ],
)
def test_a_value_is_taken_as_it_was_meant(field, written, taken):
    """A number may be a name, and a word a number; as strictly as in a section."""
    found = TypeAdapter(field).validate_python(written, strict=True)
    assert (found, type(found)) == (taken, type(taken))


@pytest.mark.parametrize(
    ("field", "written"), [(Name, "a b"), (Positive, 0), (Flag, "yes"), (Wait, "soon"), (Name, 1.5)]
)
def test_a_value_that_means_something_else_is_refused(field, written):
    """Each by its own rule, as strictly as in a section."""
    with pytest.raises(ValidationError):
        TypeAdapter(field).validate_python(written, strict=True)


def test_an_editor_is_told_both_ways_of_writing_a_number():
    """As a number, or as text with its unit or a reference."""
    ways = TypeAdapter(Count).json_schema()["anyOf"]
    assert [way["type"] for way in ways] == ["integer", "string"]


def test_the_json_schema_in_config_is_the_one_that_is_printed():
    """Mend it with: python -m proxy schema > config/quotas.schema.json."""
    assert (ROOT / "config" / "quotas.schema.json").read_text(encoding="utf-8") == json_schema()


def test_the_json_schema_refuses_what_the_file_refuses():
    """Unknown keys, names that are none, and null but for the admin listener and what is kept for ever."""
    whole = json.loads(json_schema())
    assert whole["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert whole["required"] == ["upstreams"]
    assert whole["$defs"]["Quota"]["required"] == ["per"]
    assert all(part["additionalProperties"] is False for part in (whole, *whole["$defs"].values()))
    assert whole["properties"]["groups"]["additionalProperties"] is False
    assert list(whole["properties"]["groups"]["patternProperties"]) == [values.NAME.pattern]
    assert json_schema().count('"null"') == 3
    assert [whole["$defs"]["Keep"]["properties"][name]["type"] for name in ("calls", "days")] == [
        ["string", "null"]
    ] * 2
    assert whole["$defs"]["Server"]["properties"]["admin"]["type"] == ["string", "null"]
    assert "title" not in json_schema()
