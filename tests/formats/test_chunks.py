"""Chunks are parsed as clients parse them, and only the members that the proxy asked for are removed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.chunks import (
    extra_members,
    is_finish_chunk,
    read_object,
    with_timings,
    without_timings,
    without_usage,
)
from proxy.formats.sse import Splitter

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
TIMINGS = {"prompt_n": 7, "predicted_n": 5}


def event(text):
    """One event of a stream."""
    [event] = Splitter().feed(f"data: {text}\n\n".encode())
    return event


def stripped(text):
    """The event of this chunk without its usage."""
    return without_usage(event(text), json.loads(text)).decode()


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b'{"a": NaN}', None),
        (b'{"a": "\\ud800"}', {"a": "\ud800"}),
        (b"[1]", None),
        (b"{", None),
        (b"[" * 100_000, None),
    ],
)
def test_an_object_that_a_client_can_parse_is_parsed(data, value):
    """Including what strict JSON forbids and Python's parser accepts."""
    found = read_object(data)
    if data == b'{"a": NaN}':
        assert found is not None
        assert found["a"] != found["a"]  # NaN is not equal to itself
    else:
        assert found == value


@pytest.mark.parametrize(
    ("before", "member", "after"),
    [
        ('{"id":"1"', ',"usage":null', "}"),
        ('{"id": "1"', ', "usage": null', "}"),
        ("{", '"usage":null,', '"id":"1"}'),
        ("{", '"usage": null, ', '"id": "1"}'),
        ('{"id":"1"', f',"usage":{json.dumps(USAGE, separators=(",", ":"))}', ',"x":2}'),
        ('{"choices":[{"text":"\\"usage\\":null"}]', ',"usage":null', "}"),
        ('{"note":"usage"', ',"usage":null', "}"),
        ('{"in":{"x":1', "", ',"usage":null},"y":1}'),
    ],
)
def test_only_the_usage_member_is_cut_out(before, member, after):
    """Every other byte stays, even if the word "usage" occurs elsewhere in the chunk."""
    if member:
        assert stripped(before + member + after) == f"data: {before}{after}\n\n"
    else:
        whole = json.loads(before + after)
        assert json.loads(stripped(json.dumps({**whole, "usage": None})).removeprefix("data: ")) == whole


def test_a_member_that_cannot_be_cut_out_leads_to_a_new_serialization():
    """With spaces in unusual places the client gets the same chunk in other bytes."""
    assert stripped('{"id" : "1" , "usage" : null}') == 'data: {"id":"1"}\n\n'


@given(st.dictionaries(st.sampled_from(["id", "usage_of", "x"]), st.text() | st.none() | st.just({"usage": None})))
def test_all_other_members_stay(others):
    """Whatever their names and values are."""
    shown = stripped(json.dumps({**others, "usage": USAGE}))
    assert json.loads(shown.removeprefix("data: ")) == others


def test_extra_members_are_those_beyond_the_common_ones():
    """A member that is null does not count."""
    assert extra_members({"id": "1", "usage": USAGE, "timings": TIMINGS, "x": None}) == {"timings"}


@pytest.mark.parametrize(
    ("choices", "is_finish"),
    [([{"finish_reason": "stop"}], True), ([{"finish_reason": None}], False), ([], False), (None, False)],
)
def test_a_finish_chunk_has_one_choice_with_a_reason(choices, is_finish):
    """With several choices no chunk is the last of all of them."""
    assert is_finish_chunk({"choices": choices}) is is_finish


@pytest.mark.parametrize("gap", ["", " "])
def test_timings_are_moved_to_the_finish_chunk(gap):
    """They become its last member; if their bytes can't be copied, the chunk is serialized anew."""
    last = b'data: {"choices":[{"finish_reason":"stop"}]}\n\n'
    of = f'{{"choices":[],"timings"{gap}:{json.dumps(TIMINGS)}}}'
    moved = with_timings(last, json.loads(last[6:]), event(of), json.loads(of))
    assert json.loads(moved[6:]) == {"choices": [{"finish_reason": "stop"}], "timings": TIMINGS}
    assert moved.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"a":1.50,"timings":{"n":1,"ms":1e-05}}', '{"a":1.50}'),
        ('{"a":"\\u00e9,\\"timings\\":{}","timings":{"n":1},"b":2}', '{"a":"\\u00e9,\\"timings\\":{}","b":2}'),
        ('{"a":1.50, "timings": {"n":1}}', '{"a":1.5}'),
        ('{"a":{"x":1,"timings":{"n":1}},"timings":3}', '{"a":{"x":1,"timings":{"n":1}}}'),
        ('{"timings":3,"a":{"x":1,"timings":{"n":1}}}', '{"a":{"x":1,"timings":{"n":1}}}'),
    ],
)
def test_only_the_timings_are_cut_out(text, shown):
    """If that is not safe, the chunk is serialized anew: 1.50 then becomes 1.5."""
    assert without_timings(event(text), json.loads(text)) == b"data: " + shown.encode() + b"\n\n"
