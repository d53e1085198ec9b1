"""Which bytes of a stream are sent at once, which wait until more is held, and which are the end."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import UpstreamError
from proxy.formats.endpoints import CHAT, RESPONSES, Endpoint
from proxy.formats.mask import Mask
from proxy.formats.request import parse_request
from proxy.formats.sse import EVENT_BYTES_MAX, Splitter
from proxy.formats.stream import Stream
from proxy.formats.surfaces import meter_of
from proxy.policy.amounts import Tokens

WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
ASKED = b'{"model":"m","messages":[],"stream":true,"stream_options":{"include_usage":true}}'
UNASKED = b'{"model":"m","messages":[],"stream":true}'
ALL = 10**12


def _stream(body: bytes = ASKED, endpoint: Endpoint = CHAT) -> Stream:
    """A new stream; each character of its text is a token."""
    return Stream(meter_of(parse_request(endpoint, body), count=len), mask=Mask(None))


def _word(text: str) -> bytes:
    """A chunk with this text."""
    return WORD.replace(b'"x"', json.dumps(text).encode())


def _data(stream: bytes) -> list[Any]:
    """The JSON objects in the events of a stream."""
    splitter = Splitter()
    events = splitter.feed(stream)
    assert not splitter.end()
    return [json.loads(event.data) for event in events if event.data and event.data[:1] == b"{"]


def _length(stream: bytes) -> int:
    """The tokens of the text in a stream of chunks."""
    choices = [choice for chunk in _data(stream) for choice in chunk.get("choices", [])]
    return sum(len(choice["delta"].get("content", "")) for choice in choices)


# ------------------------------------------------------------------------------------------------------------ the end


def test_events_are_sent_at_once_and_the_end_is_kept() -> None:
    """The end begins with the usage chunk. A usage chunk that only the proxy asked for is in neither."""
    asked, unasked = _stream(), _stream(UNASKED)
    assert asked.feed(WORD + WORD[:10], covered=ALL) == WORD
    assert asked.feed(WORD[10:] + USAGE, covered=ALL) == WORD
    assert (asked.feed(DONE, covered=ALL), asked.is_over, asked.end()) == (b"", True, USAGE + DONE)
    assert unasked.feed(WORD + USAGE + DONE, covered=ALL) == WORD
    assert unasked.end() == DONE


def test_a_usage_chunk_in_the_middle_is_sent_when_text_follows() -> None:
    """The text shows that it was not the end."""
    stream = _stream()
    assert stream.feed(WORD + USAGE, covered=ALL) == WORD
    assert stream.feed(WORD, covered=ALL) == USAGE + WORD
    assert not stream.is_over


def test_an_unfinished_event_is_sent_last() -> None:
    """If the upstream ends without a blank line, the bytes are sent as they came."""
    stream = _stream()
    stream.feed(WORD + b"data: half", covered=ALL)
    assert stream.end() == b"data: half"


@pytest.mark.parametrize("line_end", [b"\n\n", b"\n", b"", b"\r\n", b"\r"])
@pytest.mark.parametrize(("last", "seen"), [(WORD, 2), (b"data: half", 1), (b": ping", 1), (FINISH, 1)])
def test_an_event_without_its_blank_line_is_counted(last: bytes, seen: int, line_end: bytes) -> None:
    """It is sent with the end, and clients that read line by line understand it, so its text is charged.

    Data that can't be parsed is counted only if the event is complete.
    """
    seen += 4 * (last == b"data: half" and line_end == b"\n\n")
    meter = meter_of(parse_request(CHAT, ASKED), count=len)
    stream = Stream(meter, mask=Mask(None))
    passed = stream.feed(WORD + last.rstrip() + line_end, covered=ALL)
    stream.close(covered=ALL)
    assert passed + stream.end() == WORD + last.rstrip() + line_end
    assert (meter.output_seen, meter.ending.has_finished) == (seen, last == FINISH)


@pytest.mark.parametrize(("before", "last"), [(b"", USAGE), (USAGE, DONE), (USAGE, WORD), (USAGE, b": ping")])
def test_an_event_without_its_blank_line_may_belong_to_the_end(before: bytes, last: bytes) -> None:
    """Or it shows that a usage chunk before it was not the end. Either way each byte is sent once, in order."""
    meter = meter_of(parse_request(CHAT, ASKED), count=len)
    stream = Stream(meter, mask=Mask(None))
    assert stream.feed(WORD + before + last.rstrip(), covered=ALL) == WORD
    stream.close(covered=ALL)
    assert stream.end() == before + last.rstrip()
    assert (meter.is_over, meter.output_seen) == (last == DONE, 3 if last == WORD else 2)
    unasked = _stream(UNASKED)
    unasked.feed(WORD + before + last.rstrip(), covered=ALL)
    unasked.close(covered=ALL)
    assert unasked.end() == (before + last.rstrip()).replace(USAGE, b"").replace(USAGE.rstrip(), b"")


def test_the_last_bytes_of_a_large_event_are_not_counted_as_an_event() -> None:
    """The event was sent and counted in pieces; only its last bytes are left when the upstream closes."""
    meter = meter_of(parse_request(CHAT, ASKED), count=len)
    stream = Stream(meter, mask=Mask(None))
    large = b"data: " + b"x" * (EVENT_BYTES_MAX + 10)
    passed = stream.feed(large, covered=ALL)
    seen = meter.output_seen
    stream.close(covered=ALL)
    assert passed + stream.end() == large
    assert meter.output_seen == seen == -(-len(passed) // 4)


def test_an_event_without_its_blank_line_is_left_out_if_it_is_not_covered() -> None:
    """Only this event is left out of the end. A usage chunk is always sent, because it contains no output."""
    for covered, passed in ((1, b""), (2, WORD.rstrip())):
        stream = _stream()
        assert stream.feed(WORD + USAGE.replace(b":2}", b":1}") + WORD.rstrip(), covered=covered) == WORD
        stream.close(covered=covered)
        assert stream.end() == USAGE.replace(b":2}", b":1}") + passed
    stream = _stream()
    stream.feed(WORD + USAGE.rstrip(), covered=1)
    stream.close(covered=1)
    assert stream.end() == USAGE.rstrip()


def test_an_event_too_large_to_parse_is_counted_by_its_bytes() -> None:
    """T42: so it can't be used to get around a limit."""
    stream = _stream()
    piece = b"data: " + b"x" * (EVENT_BYTES_MAX + 10)
    assert stream.feed(piece, covered=1000) == b""
    assert stream.is_waiting_for_hold
    assert stream.feed(b"", covered=EVENT_BYTES_MAX) == piece[:-2]


def test_closing_a_complete_stream_changes_nothing() -> None:
    """No bytes are left in the splitter."""
    stream = _stream()
    stream.feed(WORD + USAGE + DONE, covered=ALL)
    stream.close(covered=ALL)
    assert stream.end() == USAGE + DONE


def test_an_end_that_is_too_long_is_an_error() -> None:
    """The proxy does not keep unlimited comments after the usage chunk."""
    stream = _stream()
    stream.feed(USAGE, covered=ALL)
    with pytest.raises(UpstreamError, match="never ends"):
        for _ in range(300):
            stream.feed(b": " + b"x" * 65_000 + b"\n\n", covered=ALL)


def test_the_proxy_writes_nothing_between_the_pieces_of_an_event() -> None:
    """A large event is sent in pieces; an error event between them would become a part of it."""
    stream = _stream()
    assert stream.is_between_events
    assert stream.feed(b"data: " + b"x" * (EVENT_BYTES_MAX + 10), covered=ALL)
    assert not stream.is_between_events
    stream.feed(b"\n\n", covered=ALL)
    assert stream.is_between_events


# ----------------------------------------------------------------------------------------------------------- the hold


def test_an_event_that_exceeds_the_hold_waits() -> None:
    """So do all events after it. They are sent in order as soon as enough is held, exact to the token."""
    stream = _stream()
    assert stream.feed(_word("abc") + _word("def") + FINISH, covered=5) == _word("abc")
    assert stream.is_waiting_for_hold
    assert stream.feed(WORD, covered=5) == b""
    assert stream.feed(b"", covered=6) == _word("def") + FINISH
    assert stream.is_waiting_for_hold
    assert stream.feed(b"", covered=7) == WORD
    assert not stream.is_waiting_for_hold


def test_events_without_output_need_no_hold() -> None:
    """The role, comments, the finish reason and the end are sent as soon as the events before them are."""
    head = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    stream = _stream()
    assert stream.feed(head + b": ping\n\n" + FINISH + USAGE + DONE, covered=0) == head + b": ping\n\n" + FINISH
    assert (stream.is_waiting_for_hold, stream.is_over, stream.end()) == (False, True, USAGE + DONE)


def test_the_usage_at_the_end_needs_no_hold() -> None:
    """Whatever its numbers are, the answer is complete, and the settlement charges its cost."""
    stream = _stream()
    assert stream.feed(WORD + USAGE.replace(b":2}", b":2000}") + DONE, covered=1) == WORD
    assert (stream.is_waiting_for_hold, stream.is_over) == (False, True)


def test_running_usage_needs_a_hold_like_text() -> None:
    """If a chunk reports more tokens than its text has, that many must be held."""
    stream = _stream(UNASKED)
    word = WORD.replace(b"]}\n", b'],"usage":{"prompt_tokens":5,"completion_tokens":40}}\n')
    assert stream.feed(word, covered=39) == b""
    assert stream.feed(b"", covered=40) == word


def test_a_stream_is_not_over_while_it_is_waiting_for_a_hold() -> None:
    """Even though its end has arrived."""
    stream = _stream()
    assert stream.feed(WORD + USAGE + DONE, covered=0) == b""
    assert (stream.is_waiting_for_hold, stream.is_over) == (True, False)
    assert stream.feed(b"", covered=1) == WORD
    assert (stream.is_waiting_for_hold, stream.is_over, stream.end()) == (False, True, USAGE + DONE)


def test_usage_in_the_middle_is_kept_until_the_text_after_it_is_covered() -> None:
    """It is sent before that text, or not at all if the stream is ended there."""
    stream = _stream()
    assert stream.feed(WORD + USAGE + WORD, covered=2) == WORD
    assert stream.is_waiting_for_hold
    assert stream.feed(b"", covered=3) == USAGE + WORD


def test_a_removed_usage_chunk_needs_no_hold() -> None:
    """The stream ends with [DONE], without waiting."""
    stream = _stream(UNASKED)
    assert stream.feed(WORD + USAGE + DONE, covered=1) == WORD
    assert (stream.is_over, stream.end()) == (True, DONE)


# ------------------------------------------------------------------------------------------------- ended at the limit


def test_a_stream_is_ended_after_the_text_that_was_sent() -> None:
    """As its own maximum would have ended it, without the events that wait."""
    stream = _stream()
    first = b'data: {"id":"c-1","model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":"abc"}}]}\n\n'
    assert stream.feed(first + _word("def"), covered=3) == first
    cut, usage = _data(end := stream.end_at_limit(Tokens(5, 3)))
    [choice] = cut["choices"]
    assert (choice["delta"], choice["finish_reason"]) == ({}, "length")
    assert (cut["id"], usage["usage"]["completion_tokens"]) == ("c-1", 3)
    assert end.endswith(DONE)
    assert b"def" not in end


def test_the_end_at_the_limit_has_usage_only_if_requested() -> None:
    """The client did not ask for it here."""
    stream = _stream(UNASKED)
    stream.feed(WORD, covered=0)
    assert b"usage" not in stream.end_at_limit(Tokens(5, 0))


def test_a_choice_whose_first_word_waits_has_not_begun() -> None:
    """Its end states the role, because no chunk that was sent did."""
    stream = _stream()
    stream.feed(WORD, covered=0)
    assert _data(stream.end_at_limit(Tokens(5, 0)))[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_usage_that_was_kept_is_not_sent_twice() -> None:
    """A usage chunk in the middle that was kept is left out, because the end states the usage."""
    stream = _stream()
    assert stream.feed(WORD + USAGE + WORD, covered=1) == WORD
    assert stream.end_at_limit(Tokens(5, 2)).count(b'"usage"') == 1


@pytest.mark.parametrize(("newline", "expected"), [(b"\n", b"\n"), (b"\r\n", b"\r\n"), (b"\r", b"\n")])
def test_the_end_uses_the_line_ends_of_the_stream(newline: bytes, expected: bytes) -> None:
    """A client that splits only at CRLF would take two events for one. After bare CRs LF is used."""
    stream = _stream()
    stream.feed((WORD + WORD).replace(b"\n", newline) + b"data", covered=1)
    end = stream.end_at_limit(Tokens(5, 1))
    assert end.endswith(b"data: [DONE]" + expected + expected)
    assert end.count(b"\n") == end.count(expected) == 6


def test_a_response_is_ended_with_the_text_that_passed() -> None:
    """Its last event repeats the whole answer, but no text that the client has not received."""

    def event(kind: str, **more: object) -> bytes:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n".encode()

    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    part = {"type": "output_text", "text": "", "annotations": []}
    location = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    opening = (
        event("response.created", response={"id": "resp_1", "output": []})
        + event("response.output_item.added", output_index=0, item=item)
        + event("response.content_part.added", **location, part=part)
    )
    abc, deff = (event("response.output_text.delta", **location, delta=text) for text in ("abc", "def"))
    stream = _stream(b'{"model":"m","input":"x","stream":true}', RESPONSES)
    assert stream.feed(opening + abc + deff, covered=3) == opening + abc
    assert stream.is_waiting_for_hold
    last = _data(stream.end_at_limit(Tokens(5, 3)))[-1]
    assert (last["type"], last["response"]["id"]) == ("response.incomplete", "resp_1")
    assert last["response"]["output"][0]["content"][0]["text"] == "abc"
    assert last["response"]["usage"]["output_tokens"] == 3


# ------------------------------------------------------------------------------------------------------- any stream

EVENTS = st.one_of(
    st.text("xyé", min_size=1, max_size=6).map(_word),
    st.sampled_from([WORD, FINISH, b": ping\n\n", b"data: \n\n", _word("")]),
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
def test_no_more_text_is_sent_than_is_held(
    events: list[bytes], end: bytes, newline: bytes, feeds: list[tuple[int, int]], body: bytes
) -> None:
    """However a stream is cut and its hold grows, the client gets a prefix of what it would get without a limit.

    The prefix has no more text than is held. When everything is held, the client gets the whole stream unchanged.
    """
    whole = (b"".join(events) + end).replace(b"\n", newline)
    unlimited, held = _stream(body), _stream(body)
    expected = unlimited.feed(whole, covered=ALL)
    offsets = sorted(min(offset, len(whole)) for offset, _ in feeds)
    passed, covered = b"", 0
    for (start, stop), (_, more) in zip(pairwise([0, *offsets]), feeds, strict=True):
        covered = max(covered, more)  # a smaller number does not take back what was sent
        passed += held.feed(whole[start:stop], covered=more)
        assert expected.startswith(passed)
        assert _length(passed) <= covered
    passed += held.feed(whole[offsets[-1] if offsets else 0 :], covered=ALL)
    assert passed == expected
    assert not held.is_waiting_for_hold
    shown = whole if body == ASKED else whole.replace(USAGE.replace(b"\n", newline), b"")
    for stream in (held, unlimited):
        stream.close(covered=ALL)
    assert held.is_over == unlimited.is_over
    assert (passed + held.end(), expected + unlimited.end()) == (shown, shown)


@given(texts=st.lists(st.text("xy", min_size=1, max_size=6), max_size=8), covered=st.integers(0, 40))
def test_a_stream_ended_anywhere_is_complete(texts: list[str], covered: int) -> None:
    """It has every event that is covered, and an end that a client accepts."""
    stream = _stream()
    seen = stream.feed(b"".join(map(_word, texts)), covered=covered) + stream.end_at_limit(Tokens(5, covered))
    fitting = [number for number in range(len(texts) + 1) if len("".join(texts[:number])) <= covered]
    assert _length(seen) == len("".join(texts[: fitting[-1]]))
    again = _stream()
    again.feed(seen, covered=ALL)
    assert again.is_over
