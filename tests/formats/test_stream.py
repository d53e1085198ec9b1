"""What of a stream may pass on, what waits until more is held, and what is its end."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import UpstreamError
from proxy.formats.endpoints import CHAT, RESPONSES, Endpoint
from proxy.formats.meter import Meter
from proxy.formats.request import parse_request
from proxy.formats.sse import EVENT_BYTES_MAX, Splitter
from proxy.formats.stream import Stream
from proxy.policy.amounts import Tokens

WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
ASKED = b'{"model":"m","messages":[],"stream":true,"stream_options":{"include_usage":true}}'
UNASKED = b'{"model":"m","messages":[],"stream":true}'
ALL = 10**12


def _stream(body: bytes = ASKED, endpoint: Endpoint = CHAT) -> Stream:
    """A stream that has not begun; each character of its text is a token."""
    return Stream(Meter(parse_request(endpoint, body), count=len))


def _says(text: str) -> bytes:
    """A chunk with this text."""
    return WORD.replace(b'"x"', json.dumps(text).encode())


def _data(stream: bytes) -> list[Any]:
    """What the events of a stream say that are objects."""
    splitter = Splitter()
    events = splitter.feed(stream)
    assert not splitter.end()
    return [json.loads(event.data) for event in events if event.data and event.data[:1] == b"{"]


def _length(stream: bytes) -> int:
    """The tokens of the text in a stream of chunks."""
    choices = [choice for chunk in _data(stream) for choice in chunk.get("choices", [])]
    return sum(len(choice["delta"].get("content", "")) for choice in choices)


# ------------------------------------------------------------------------------------------------------------ its end


def test_events_pass_at_once_and_the_end_is_kept() -> None:
    """From the usage chunk on; what only we asked for is in neither."""
    asked, unasked = _stream(), _stream(UNASKED)
    assert asked.feed(WORD + WORD[:10], covered=ALL) == WORD
    assert asked.feed(WORD[10:] + USAGE, covered=ALL) == WORD
    assert (asked.feed(DONE, covered=ALL), asked.is_over, asked.end()) == (b"", True, USAGE + DONE)
    assert unasked.feed(WORD + USAGE + DONE, covered=ALL) == WORD
    assert unasked.end() == DONE


def test_what_looked_like_the_end_passes_on_when_more_comes() -> None:
    """A usage chunk in the middle holds nothing back for long."""
    stream = _stream()
    assert stream.feed(WORD + USAGE, covered=ALL) == WORD
    assert stream.feed(WORD, covered=ALL) == USAGE + WORD
    assert not stream.is_over


def test_an_event_that_was_never_finished_is_the_last_of_the_end() -> None:
    """An upstream that ends without a blank line: the bytes pass as they came."""
    stream = _stream()
    stream.feed(WORD + b"data: half", covered=ALL)
    assert stream.end() == b"data: half"


@pytest.mark.parametrize("rest", [b"\n\n", b"\n", b"", b"\r\n", b"\r"])
@pytest.mark.parametrize(("last", "seen"), [(WORD, 2), (b"data: half", 1), (b": ping", 1), (FINISH, 1)])
def test_an_event_left_without_its_blank_line_is_read_like_the_others(last: bytes, seen: int, rest: bytes) -> None:
    """It passes on with the end, and there are clients that read by lines: what it says is charged.

    What can't be read is counted by its bytes only where it is a whole event.
    """
    seen += last == b"data: half" and rest == b"\n\n"
    meter = Meter(parse_request(CHAT, ASKED), count=len)
    stream = Stream(meter)
    passed = stream.feed(WORD + last.rstrip() + rest, covered=ALL)
    stream.close(covered=ALL)
    assert passed + stream.end() == WORD + last.rstrip() + rest
    assert (meter.output_seen, meter.ending.has_finished) == (seen, last == FINISH)


@pytest.mark.parametrize(("before", "last"), [(b"", USAGE), (USAGE, DONE), (USAGE, WORD), (USAGE, b": ping")])
def test_it_may_be_a_part_of_the_end(before: bytes, last: bytes) -> None:
    """Or show that what came before it was none; either way each byte passes once, in its order."""
    meter = Meter(parse_request(CHAT, ASKED), count=len)
    stream = Stream(meter)
    assert stream.feed(WORD + before + last.rstrip(), covered=ALL) == WORD
    stream.close(covered=ALL)
    assert stream.end() == before + last.rstrip()
    assert (meter.is_over, meter.output_seen) == (last == DONE, 3 if last == WORD else 2)
    unasked = _stream(UNASKED)
    unasked.feed(WORD + before + last.rstrip(), covered=ALL)
    unasked.close(covered=ALL)
    assert unasked.end() == (before + last.rstrip()).replace(USAGE, b"").replace(USAGE.rstrip(), b"")


def test_the_rest_of_an_event_in_pieces_is_no_event() -> None:
    """Of one too large to hold only the end is left, whatever it looks like."""
    meter = Meter(parse_request(CHAT, ASKED), count=len)
    stream = Stream(meter)
    large = b"data: " + b"x" * (EVENT_BYTES_MAX + 10)
    passed = stream.feed(large, covered=ALL)
    seen = meter.output_seen
    stream.close(covered=ALL)
    assert passed + stream.end() == large
    assert meter.output_seen == seen == -(-len(passed) // 4)


def test_an_event_left_without_its_blank_line_passes_only_as_far_as_it_is_held() -> None:
    """Else it stays out of the end, and so does nothing else."""
    for covered, passed in ((1, b""), (2, WORD.rstrip())):
        stream = _stream()
        assert stream.feed(WORD + USAGE.replace(b":2}", b":1}") + WORD.rstrip(), covered=covered) == WORD
        stream.close(covered=covered)
        assert stream.end() == USAGE.replace(b":2}", b":1}") + passed
    stream = _stream()
    stream.feed(WORD + USAGE.rstrip(), covered=1)
    stream.close(covered=1)
    assert stream.end() == USAGE.rstrip()


def test_an_event_too_large_to_read_is_held_by_its_bytes() -> None:
    """So it is no way around a limit."""
    stream = _stream()
    piece = b"data: " + b"x" * (EVENT_BYTES_MAX + 10)
    assert stream.feed(piece, covered=1000) == b""
    assert stream.is_held_up
    assert stream.feed(b"", covered=EVENT_BYTES_MAX) == piece[:-2]


def test_a_stream_that_ended_as_it_should_has_nothing_left_to_read() -> None:
    """Closing it changes nothing."""
    stream = _stream()
    stream.feed(WORD + USAGE + DONE, covered=ALL)
    stream.close(covered=ALL)
    assert stream.end() == USAGE + DONE


def test_an_end_that_never_ends_is_no_end() -> None:
    """Megabytes of comments after the usage are not ours to keep."""
    stream = _stream()
    stream.feed(USAGE, covered=ALL)
    with pytest.raises(UpstreamError, match="never ends"):
        for _ in range(300):
            stream.feed(b": " + b"x" * 65_000 + b"\n\n", covered=ALL)


def test_nothing_of_ours_may_come_between_the_pieces_of_an_event() -> None:
    """An event too large to hold goes out in pieces; an error in the middle of it would be a part of it."""
    stream = _stream()
    assert stream.is_between_events
    assert stream.feed(b"data: " + b"x" * (EVENT_BYTES_MAX + 10), covered=ALL)
    assert not stream.is_between_events
    stream.feed(b"\n\n", covered=ALL)
    assert stream.is_between_events


# ------------------------------------------------------------------------------------------------------- what is held


def test_an_event_that_goes_beyond_what_is_held_waits() -> None:
    """And all behind it; it passes as soon as more is held, to the token and in its order."""
    stream = _stream()
    assert stream.feed(_says("abc") + _says("def") + FINISH, covered=5) == _says("abc")
    assert stream.is_held_up
    assert stream.feed(WORD, covered=5) == b""
    assert stream.feed(b"", covered=6) == _says("def") + FINISH
    assert stream.is_held_up
    assert stream.feed(b"", covered=7) == WORD
    assert not stream.is_held_up


def test_what_brings_no_more_of_an_answer_needs_no_hold() -> None:
    """The head, comments, the finish and the end pass when what came before them did."""
    head = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    stream = _stream()
    assert stream.feed(head + b": ping\n\n" + FINISH + USAGE + DONE, covered=0) == head + b": ping\n\n" + FINISH
    assert (stream.is_held_up, stream.is_over, stream.end()) == (False, True, USAGE + DONE)


def test_the_usage_at_the_end_is_no_more_text() -> None:
    """Whatever it says: the answer is whole, and what it cost is charged."""
    stream = _stream()
    assert stream.feed(WORD + USAGE.replace(b":2}", b":2000}") + DONE, covered=1) == WORD
    assert (stream.is_held_up, stream.is_over) == (False, True)


def test_the_usage_so_far_holds_a_stream_up_as_its_text_would() -> None:
    """Where the upstream says on a chunk that it generated more than we see in it, that much must be held."""
    stream = _stream(UNASKED)
    word = WORD.replace(b"]}\n", b'],"usage":{"prompt_tokens":5,"completion_tokens":40}}\n')
    assert stream.feed(word, covered=39) == b""
    assert stream.feed(b"", covered=40) == word


def test_a_stream_is_not_over_while_it_is_held_up() -> None:
    """Although its end has come."""
    stream = _stream()
    assert stream.feed(WORD + USAGE + DONE, covered=0) == b""
    assert (stream.is_held_up, stream.is_over) == (True, False)
    assert stream.feed(b"", covered=1) == WORD
    assert (stream.is_held_up, stream.is_over, stream.end()) == (False, True, USAGE + DONE)


def test_usage_in_the_middle_is_kept_until_the_text_behind_it_may_pass() -> None:
    """It passes before that text, or, where the stream is ended there, not at all."""
    stream = _stream()
    assert stream.feed(WORD + USAGE + WORD, covered=2) == WORD
    assert stream.is_held_up
    assert stream.feed(b"", covered=3) == USAGE + WORD


def test_what_is_taken_out_holds_nothing_up() -> None:
    """The chunk with the usage that only we asked for."""
    stream = _stream(UNASKED)
    assert stream.feed(WORD + USAGE + DONE, covered=1) == WORD
    assert (stream.is_over, stream.end()) == (True, DONE)


# ----------------------------------------------------------------------------------------------- ended at the limit


def test_a_stream_is_ended_after_what_has_passed() -> None:
    """As its own maximum would have ended it; what waits is not in it."""
    stream = _stream()
    first = b'data: {"id":"c-1","model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":"abc"}}]}\n\n'
    assert stream.feed(first + _says("def"), covered=3) == first
    cut, usage = _data(end := stream.end_at_limit(Tokens(5, 3)))
    [choice] = cut["choices"]
    assert (choice["delta"], choice["finish_reason"]) == ({}, "length")
    assert (cut["id"], usage["usage"]["completion_tokens"]) == ("c-1", 3)
    assert end.endswith(DONE)
    assert b"def" not in end


def test_who_did_not_ask_for_usage_gets_none() -> None:
    """Also at the limit."""
    stream = _stream(UNASKED)
    stream.feed(WORD, covered=0)
    assert b"usage" not in stream.end_at_limit(Tokens(5, 0))


def test_a_choice_whose_first_word_waits_has_not_begun() -> None:
    """Its end has to say whose message it is, since no chunk that passed did."""
    stream = _stream()
    stream.feed(WORD, covered=0)
    assert _data(stream.end_at_limit(Tokens(5, 0)))[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_usage_that_was_kept_is_not_said_twice() -> None:
    """What looked like the end and was none is left out, as the true end says it."""
    stream = _stream()
    assert stream.feed(WORD + USAGE + WORD, covered=1) == WORD
    assert stream.end_at_limit(Tokens(5, 2)).count(b'"usage"') == 1


@pytest.mark.parametrize(("newline", "expected"), [(b"\n", b"\n"), (b"\r\n", b"\r\n"), (b"\r", b"\n")])
def test_lines_end_as_those_of_the_stream(newline: bytes, expected: bytes) -> None:
    """A reader that splits at CRLF alone would take two events for one; after bare CRs a LF is as good."""
    stream = _stream()
    stream.feed((WORD + WORD).replace(b"\n", newline) + b"data", covered=1)
    end = stream.end_at_limit(Tokens(5, 1))
    assert end.endswith(b"data: [DONE]" + expected + expected)
    assert end.count(b"\n") == end.count(expected) == 6


def test_a_response_is_ended_with_the_text_that_passed() -> None:
    """Its last event holds all of the answer: no word more than its client has seen."""

    def event(kind: str, **more: object) -> bytes:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n".encode()

    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    part = {"type": "output_text", "text": "", "annotations": []}
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    opening = (
        event("response.created", response={"id": "resp_1", "output": []})
        + event("response.output_item.added", output_index=0, item=item)
        + event("response.content_part.added", **place, part=part)
    )
    abc, deff = (event("response.output_text.delta", **place, delta=text) for text in ("abc", "def"))
    stream = _stream(b'{"model":"m","input":"x","stream":true}', RESPONSES)
    assert stream.feed(opening + abc + deff, covered=3) == opening + abc
    assert stream.is_held_up
    last = _data(stream.end_at_limit(Tokens(5, 3)))[-1]
    assert (last["type"], last["response"]["id"]) == ("response.incomplete", "resp_1")
    assert last["response"]["output"][0]["content"][0]["text"] == "abc"
    assert last["response"]["usage"]["output_tokens"] == 3


# ------------------------------------------------------------------------------------------------------- any stream

EVENTS = st.one_of(
    st.text("xyé", min_size=1, max_size=6).map(_says),
    st.sampled_from([WORD, FINISH, b": ping\n\n", b"data: \n\n", _says("")]),
)


@given(
    events=st.lists(EVENTS, max_size=12),
    end=st.sampled_from(
        [b"", DONE, USAGE + DONE, USAGE, USAGE + DONE[:-2], USAGE + WORD[:-2], WORD[:-2], b"data: ["]
    ),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    feeds=st.lists(st.tuples(st.integers(0, 800), st.integers(0, 40)), max_size=10),
    body=st.sampled_from([ASKED, UNASKED]),
)
def test_no_more_passes_than_is_held(
    events: list[bytes], end: bytes, newline: bytes, feeds: list[tuple[int, int]], body: bytes
) -> None:
    """However a stream is cut and its hold grows: what passes is a beginning of what would pass if all were held.

    Of text never more than is held; and when all is held, it is the stream itself, byte for byte.
    """
    whole = (b"".join(events) + end).replace(b"\n", newline)
    free, held = _stream(body), _stream(body)
    expected = free.feed(whole, covered=ALL)
    places = sorted(min(place, len(whole)) for place, _ in feeds)
    passed, covered = b"", 0
    for (start, stop), (_, more) in zip(pairwise([0, *places]), feeds, strict=True):
        covered = max(covered, more)  # a smaller number takes back nothing that has passed
        passed += held.feed(whole[start:stop], covered=more)
        assert expected.startswith(passed)
        assert _length(passed) <= covered
    passed += held.feed(whole[places[-1] if places else 0 :], covered=ALL)
    assert passed == expected
    assert not held.is_held_up
    shown = whole if body == ASKED else whole.replace(USAGE.replace(b"\n", newline), b"")
    for stream in (held, free):
        stream.close(covered=ALL)
    assert held.is_over == free.is_over
    assert (passed + held.end(), expected + free.end()) == (shown, shown)


@given(texts=st.lists(st.text("xy", min_size=1, max_size=6), max_size=8), covered=st.integers(0, 40))
def test_a_stream_ended_anywhere_is_a_whole_one(texts: list[str], covered: int) -> None:
    """With the text that is held, to the last event of it, and an end."""
    stream = _stream()
    seen = stream.feed(b"".join(map(_says, texts)), covered=covered) + stream.end_at_limit(Tokens(5, covered))
    fitting = [number for number in range(len(texts) + 1) if len("".join(texts[:number])) <= covered]
    assert _length(seen) == len("".join(texts[: fitting[-1]]))
    again = _stream()
    again.feed(seen, covered=ALL)
    assert again.is_over
