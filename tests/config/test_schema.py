"""The sections of the file, their defaults and rules, the types of values, and the JSON Schema."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from proxy.config import values
from proxy.config.catalog import Allow, FetchedKey, Model, OAuth, Target, Upstream
from proxy.config.json_schema import json_schema
from proxy.config.schema import (
    AdminKey,
    File,
    Group,
    HeaderSource,
    Identity,
    IdentitySources,
    Keep,
    Log,
    MappedGroup,
    Quota,
    Server,
    SignedHeader,
    User,
    UserKey,
    section_at,
)
from proxy.config.section import Count, Flag, Name, Positive, Section, Text, Wait
from proxy.policy.amounts import Measure
from proxy.policy.catalog import Secret
from proxy.policy.quota import Limit

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = {"upstreams": {"box": {"base_url": "http://box/v1"}}}
SECTIONS = (
    *(File, Server, Log, Keep, Allow, FetchedKey, OAuth, Upstream, Target, Model, Group, Quota),
    *(AdminKey, User, UserKey, Identity, IdentitySources, HeaderSource, MappedGroup, SignedHeader),
)


def test_the_smallest_file_has_all_defaults():
    """The defaults are documented, so a change of one is a change for users."""
    file = File.model_validate(SMALLEST)
    assert file.server == Server(api="127.0.0.1:8080", admin="127.0.0.1:8081")
    assert (file.database, file.timezone, file.week_starts) == ("sqlite:///quotas.db", "UTC", "monday")
    assert (file.combine, file.unmatched, file.help) == ("any_group", "refuse", "")
    assert (file.log.format, file.log.calls) == ("json", "all")
    assert (file.models, file.default_upstream, file.groups, file.users, file.admin_keys) == (None, None, {}, {}, {})


def test_only_the_admin_listener_and_retention_may_be_null():
    """Null turns it off, or keeps records forever. Anywhere else, an empty key would silently drop a rule."""
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
def test_the_default_of_on_disconnect_depends_on_the_kind(kind, stated, outcome):
    """A value in the file takes precedence."""
    section = {"base_url": "http://box/v1", "kind": kind} | ({"on_disconnect": stated} if stated else {})
    assert Upstream.model_validate(section).effective_on_disconnect() == outcome


@pytest.mark.parametrize("days", ["89d", "1d"])
def test_daily_sums_are_kept_at_least_as_long_as_their_calls(days):
    """If a day were deleted before its calls, a late correction of a call would bring the day's sum back."""
    with pytest.raises(ValidationError, match="days is shorter than calls"):
        File.model_validate(SMALLEST | {"keep": {"days": days}})
    with pytest.raises(ValidationError, match="days is shorter than calls"):
        File.model_validate(SMALLEST | {"keep": {"calls": None, "days": "3660d"}})
    assert File.model_validate(SMALLEST | {"keep": {"calls": days, "days": days}}).keep.calls is not None


def test_numbers_and_flags_may_be_text():
    """An interpolated ${LIMIT} is always text."""
    quota = Quota.model_validate({"tokens": "200k", "requests": 5, "per": "day", "shared": "true"})
    assert quota.limits() == (Limit("tokens", 200_000), Limit("requests", 5))
    assert quota.shared is True


def test_max_output_tokens_may_equal_context():
    """Some models can fill their whole context with an answer."""
    model = Model.model_validate({"context": "128k", "max_output_tokens": 128_000})
    assert (model.context, model.max_output_tokens) == (128_000, 128_000)


def test_an_integer_is_a_valid_name():
    """A group called 1001 may be listed without quotes."""
    assert User.model_validate({"groups": [1001]}).groups == ["1001"]


@pytest.mark.parametrize(
    ("section", "data"),
    [
        (Upstream, {"base_url": "http://box/v1", "api_version": "2024-10-21"}),
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
def test_an_inconsistent_section_is_rejected(section, data):
    """Although each value by itself is valid."""
    with pytest.raises(ValidationError):
        section.model_validate(data)


def test_an_overdraft_needs_an_exact_limit_on_output():
    """A limit of tokens or output_tokens. The default is 0, which is allowed in any quota."""
    for limit in ("tokens", "output_tokens"):
        quota = Quota.model_validate({limit: "20k", "requests": 5, "overdraft": "4k", "per": "day"})
        assert quota.overdraft == 4000
    assert Quota.model_validate({"requests": 5, "per": "day"}).overdraft == 0
    assert Quota.model_validate({"requests": 5, "overdraft": 0, "per": "day", "enforce": "shadow"}).overdraft == 0
    for odd in (-1, "much", 1.5):
        with pytest.raises(ValidationError):
            Quota.model_validate({"tokens": 5, "overdraft": odd, "per": "day"})


def test_a_model_has_reasoning_and_smallest_answer():
    """Both are optional: without them the model's name and a general default decide."""
    assert Model.model_validate({}).reasoning is None
    assert Model.model_validate({}).smallest_answer is None
    for written, taken in ((True, True), ("true", True), (False, False), ("false", False)):
        assert Model.model_validate({"reasoning": written}).reasoning is taken
    assert Model.model_validate({"smallest_answer": "4k"}).smallest_answer == 4000
    for odd in ({"reasoning": "maybe"}, {"reasoning": None}, {"smallest_answer": 0}, {"smallest_answer": None}):
        with pytest.raises(ValidationError):
            Model.model_validate(odd)


def test_a_group_has_quotas_or_is_unlimited_or_only_lists_models():
    """All three are valid on their own."""
    assert Group.model_validate({"unlimited": True}).quotas == {}
    assert list(Group.model_validate({"quotas": {"a": {"requests": 5, "per": "day"}}}).quotas) == ["a"]
    assert Group.model_validate({"models": ["gpt-*"]}).models == ["gpt-*"]


@pytest.mark.parametrize("flag", ["yes", 1, 0, "True"])
def test_a_flag_is_true_or_false(flag):
    """Nothing else is converted to a boolean."""
    with pytest.raises(ValidationError):
        Group.model_validate({"unlimited": flag})


def test_secrets_are_not_in_the_repr():
    """An upstream's key is a Secret, and of a user's or admin's key the file has only the digest."""
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
        (("log", "a"), Log),
        (("upstreams", "box", "a"), Upstream),
        (("models", "m", "upstreams", 0, "a"), Target),
        (("upstreams", "box", "allow", "a"), Allow),
        (("upstreams", "box", "api_key", "a"), FetchedKey),
        (("upstreams", "box", "api_key", "oauth", "a"), OAuth),
        (("models", "m", "allow", "a"), Allow),
        (("models", "m", "a"), Model),
        (("groups", "g", "a"), Group),
        (("groups", "g", "quotas", "q", "a"), Quota),
        (("users", "u", "a"), User),
        (("admin_keys", "ops", "a"), AdminKey),
    ],
)
def test_each_key_belongs_to_a_section(path, section):
    """A mistake about an unknown key names the keys of that section."""
    assert section_at(path) is section


def test_the_list_of_sections_is_complete():
    """The tests of this file cover every section."""
    assert {*Section.__subclasses__()} == {*SECTIONS}


def test_every_key_has_a_description():
    """Editors show it as the documentation of the key."""
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
def test_a_value_may_be_written_in_several_ways(field, written, taken):
    """An integer may be a name and a text a number or flag. Validation is strict, as in a section."""
    found = TypeAdapter(field).validate_python(written, strict=True)
    assert (found, type(found)) == (taken, type(taken))


@pytest.mark.parametrize(
    ("field", "written"), [(Name, "a b"), (Positive, 0), (Flag, "yes"), (Wait, "soon"), (Name, 1.5)]
)
def test_a_value_of_the_wrong_kind_is_rejected(field, written):
    """Validation is strict, as in a section."""
    with pytest.raises(ValidationError):
        TypeAdapter(field).validate_python(written, strict=True)


def test_the_json_schema_of_a_number_allows_integers_and_text():
    """Text has a suffix such as k, or is interpolated."""
    options = TypeAdapter(Count).json_schema()["anyOf"]
    assert [option["type"] for option in options] == ["integer", "string"]


def test_the_committed_json_schema_is_up_to_date():
    """If it fails, run: python -m proxy schema > config/quotas.schema.json."""
    assert (ROOT / "config" / "quotas.schema.json").read_text(encoding="utf-8") == json_schema()


def test_the_json_schema_marks_each_limit_with_its_measure():
    """So that a form for quotas needs no list of them."""
    fields = json.loads(json_schema())["$defs"]["Quota"]["properties"]
    marked = {name: field["x-measure"] for name, field in fields.items() if "x-measure" in field}
    assert marked == {measure.value: measure.value for measure in Measure}


def test_the_json_schema_rejects_what_the_file_rejects():
    """Unknown keys, invalid names, and null except for the admin listener and retention."""
    whole = json.loads(json_schema())
    assert whole["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert whole["required"] == ["upstreams"]
    assert whole["$defs"]["Quota"]["required"] == ["per"]
    assert all(part["additionalProperties"] is False for part in (whole, *whole["$defs"].values()))
    assert whole["properties"]["groups"]["additionalProperties"] is False
    assert list(whole["properties"]["groups"]["patternProperties"]) == [values.NAME.pattern]
    assert json_schema().count('"null"') == 4
    assert [whole["$defs"]["Keep"]["properties"][name]["type"] for name in ("calls", "days")] == [
        ["string", "null"]
    ] * 2
    assert whole["$defs"]["Server"]["properties"]["admin"]["type"] == ["string", "null"]
    assert "title" not in json_schema()
