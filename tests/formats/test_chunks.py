"""Chunks are read as clients read them, and what was put in for us is taken out to the byte."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.chunks import (
    is_finished,
    more_than_usage,
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
    """What is left of a chunk without its usage."""
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
def test_what_a_client_can_read_is_read(data, value):
    """Also what strict JSON forbids and Python's reader takes."""
    found = read_object(data)
    if data == b'{"a": NaN}':
        assert found is not None
        assert found["a"] != found["a"]
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
def test_only_the_member_is_cut_out(before, member, after):
    """Every other byte stays, also where the word stands elsewhere."""
    if member:
        assert stripped(before + member + after) == f"data: {before}{after}\n\n"
    else:
        whole = json.loads(before + after)
        assert json.loads(stripped(json.dumps({**whole, "usage": None})).removeprefix("data: ")) == whole


def test_what_cannot_be_cut_out_is_written_anew():
    """Spaces in odd places: the same chunk, in other bytes."""
    assert stripped('{"id" : "1" , "usage" : null}') == 'data: {"id":"1"}\n\n'


@given(st.dictionaries(st.sampled_from(["id", "usage_of", "x"]), st.text() | st.none() | st.just({"usage": None})))
def test_whatever_else_it_says_is_said_still(rest):
    """Under any name and in any place."""
    left = stripped(json.dumps({**rest, "usage": USAGE}))
    assert json.loads(left.removeprefix("data: ")) == rest


def test_what_a_chunk_says_beside_the_usual():
    """A member without a value says nothing."""
    assert more_than_usage({"id": "1", "usage": USAGE, "timings": TIMINGS, "x": None}) == {"timings"}


@pytest.mark.parametrize(
    ("choices", "is_last"),
    [([{"finish_reason": "stop"}], True), ([{"finish_reason": None}], False), ([], False), (None, False)],
)
def test_the_last_of_a_choice_says_why_it_ended(choices, is_last):
    """Of one choice: of several none is the last of all."""
    assert is_finished({"choices": choices}) is is_last


@pytest.mark.parametrize("gap", ["", " "])
def test_timings_are_moved_as_they_stand(gap):
    """To the end of the chunk before; where they can't be cut out they are written anew."""
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
def test_timings_are_cut_out_and_no_other_byte(text, shown):
    """Where that is not to be done safely the chunk is written anew."""
    assert without_timings(event(text), json.loads(text)) == b"data: " + shown.encode() + b"\n\n"
