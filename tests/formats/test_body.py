"""One walk over a conversation tells plain turns from all others, and finds every part of these.

Threat T34 (20,000 of everything).
"""

from collections.abc import Callable

import pytest

from proxy.formats.body import RequestBody, content_objects
from proxy.formats.content import read_prompt


def test_turns_are_walked_over_once():
    """What is plain is told from what is not, and the order of the texts is kept."""
    odd = {"role": "user", "content": [{"type": "text", "text": "c"}]}
    body = RequestBody({"messages": [{"role": "user", "content": "a"}, odd, "b", "", {"role": "", "content": "x"}]})
    turns = body.turns["messages"]
    assert body.unusual == turns.unusual
    assert turns.reading == ["user", "a", odd, "b", {"role": "", "content": "x"}]
    assert (turns.unusual, turns.plain) == ([odd, {"role": "", "content": "x"}], 1)
    assert "input" not in body.turns
    assert read_prompt(body, is_chat=True).texts == ("user", "a", "user", "c", "b", "x")


def test_objects_and_arrays_are_levels():
    """The body is level 1, a list of turns level 2 and its turns level 3. Texts and numbers are none."""

    def nested(levels: int) -> object:
        value: object = 1.5
        for level in range(levels):
            value = [value, "text"] if level % 2 else {"a": value}
        return value

    for levels in range(60, 67):
        assert RequestBody({"metadata": nested(levels)}).is_too_deep == (levels > 63)
        assert RequestBody({"messages": nested(levels)}).is_too_deep == (levels > 63)
        assert RequestBody({"messages": [nested(levels)]}).is_too_deep == (levels > 62)
        turn = {"role": "user", "content": nested(levels)}
        assert RequestBody({"input": ["text", turn]}).is_too_deep == (levels > 61)


@pytest.mark.parametrize("number", [float(2**64), -float(2**63), 1e300])
@pytest.mark.parametrize("shape", [lambda n: n, lambda n: [n], lambda n: {"a": [[1.5, {"b": n}]]}])
def test_floats_that_may_be_rounded_integers_are_found(shape: Callable[[float], object], number: float):
    """orjson reads an integer beyond 64 bits as a float."""
    for field in ("seed", "messages", "input"):
        assert RequestBody({field: shape(number)}).has_large_floats
        assert not RequestBody({field: shape(9e18)}).has_large_floats
    assert RequestBody({"messages": [{"role": "user", "content": "a"}, shape(number)]}).has_large_floats


def objects(**fields: object) -> list[object]:
    """The objects in which content is looked for."""
    return list(content_objects(RequestBody(fields)))


PART = {"type": "file", "file": {"file_id": "f"}}
SHAPES = [PART, [PART], [[PART]], {"a": PART}, {"a": [{"b": [PART]}]}]


@pytest.mark.parametrize("part", SHAPES)
@pytest.mark.parametrize("member", ["content", "output", "source", "CONTENT", "anything"])
@pytest.mark.parametrize("field", ["messages", "input"])
def test_content_is_found_in_any_shape(field: str, member: str, part: object):
    """In a list, in a list within a list, alone, below a member of any name."""
    turn = {"role": "user", member: part}
    for turns in ([turn], turn, [[turn]], [{"role": "user", "content": "plain"}, turn]):
        assert PART in objects(**{field: turns})
        assert PART["file"] in objects(**{field: turns})
    assert {"role": "user", "content": "plain"} not in objects(messages=[{"role": "user", "content": "plain"}])


@pytest.mark.parametrize("field", ["system", "instructions", "prompt", "image", "images", "mask"])
def test_content_is_found_in_other_fields(field: str):
    """Blocks of a system prompt, parts of a prompt, and images."""
    for shape in SHAPES:
        assert PART in objects(**{field: shape})


@pytest.mark.parametrize(
    "member", "arguments input parameters input_schema tools annotations citations results outputs action".split()
)
def test_names_of_the_user_s_own_are_no_content(member: str):
    """A function may have an argument `file_id`, and a citation repeats the id of a file that the upstream named."""
    assert PART not in objects(messages=[{"role": "assistant", "content": [{"type": "x", member: [PART]}]}])


def test_no_depth_overflows_the_stack():
    """The walk is not recursive."""
    deep: object = PART
    for _ in range(100_000):
        deep = [deep]
    assert PART in objects(messages=[{"content": deep}])
    while isinstance(deep, list):  # freed level by level; else the interpreter would do it recursively
        (deep,) = deep


@pytest.mark.parametrize(
    ("tools", "found"),
    [
        (None, []),
        (False, []),
        ([], []),
        ([PART], [PART]),
        (PART, [PART]),
        ({"name": "f"}, [{"name": "f"}]),
        ({"a": PART}, [{"a": PART}, PART]),
        ("web_search", ["web_search"]),
        ([[PART]], [[PART]]),
    ],
)
def test_tools_are_found_in_any_shape(tools: object, found: list):
    """What is no list is checked as one tool; so is each value of a mapping of tools."""
    assert RequestBody({"tools": tools}).tools == found
    assert RequestBody({"input": [{"type": "additional_tools", "tools": tools}]}).tools == found
    assert RequestBody({"input": {"type": "additional_tools", "tools": tools}}).tools == found
    assert RequestBody({"messages": [{"role": "system", "tools": tools}]}).tools == found
    group = {"type": "namespace", "tools": tools}
    assert RequestBody({"tools": [group]}).tools == [group, *found]
