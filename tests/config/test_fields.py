"""A field takes what people write in YAML, and its JSON Schema says no less and no more."""

import pytest
from pydantic import TypeAdapter, ValidationError

from proxy.config.fields import Count, Flag, Name, Positive, Text, Wait


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
