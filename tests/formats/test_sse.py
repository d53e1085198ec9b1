"""The splitter returns the events that the WHATWG grammar defines, with their bytes unchanged."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.sse import EVENT_BYTES_MAX, Event, Piece, Splitter, begins_with_event, is_cut_off_event

NameAndData = tuple[str | None, bytes | None]


def split(stream: bytes, cuts: list[int] | None = None, event_bytes_max: int = EVENT_BYTES_MAX) -> list[Event]:
    """Feed the stream cut at these offsets, and check that no byte is lost or changed."""
    splitter = Splitter(event_bytes_max)
    offsets = [0, *sorted(min(cut, len(stream)) for cut in cuts or []), len(stream)]
    events = [event for start, end in pairwise(offsets) for event in splitter.feed(stream[start:end])]
    assert b"".join(event.raw for event in events) + splitter.end() == stream
    assert splitter.end() == b""
    return events


def dispatched(events: list[Event]) -> list[NameAndData]:
    """The events that a client dispatches: those with data."""
    return [(event.name, event.data) for event in events if event.data is not None]


def reference_parse(stream: bytes) -> list[NameAndData]:
    """A simple parser of the WHATWG grammar: the whole stream at once, line by line."""
    events: list[NameAndData] = []
    name, data = None, []
    *lines, _ = re.split(rb"\r\n|\n|\r", stream.removeprefix(b"\xef\xbb\xbf"))
    for line in lines:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            name = value.decode("utf-8", "replace") or None
        if field == b"data":
            data.append(value)
        if line == b"":
            events += [(name, b"\n".join(data))] if data else []
            name, data = None, []
    return events


LINE_ENDS = [b"\n", b"\n\n", b"\n\n", b"\r", b"\r\r", b"\r\n", b"\r\n\r\n"]
TEXTS = b"data: {}|data:x|data|data:  y|event: a|event:|: note|id: 1|retry: 9|[DONE]| |:|\xef\xbb\xbf|\xff|\xc3\xa9"
WORDS = LINE_ENDS + TEXTS.split(b"|")
streams = st.lists(st.sampled_from(WORDS), max_size=24).map(b"".join)
cuts = st.lists(st.integers(0, 120), max_size=20)


@given(stream=streams, cuts=cuts)
def test_events_do_not_depend_on_where_the_stream_was_cut(stream: bytes, cuts: list[int]) -> None:
    """However the network cuts a stream, even into single bytes, it returns the same events with the same bytes."""
    assert split(stream, cuts) == split(stream) == split(stream, list(range(len(stream))))


@given(stream=streams, cuts=cuts)
def test_events_match_the_reference_parser(stream: bytes, cuts: list[int]) -> None:
    """Any mixture of line ends, comments and fields is parsed as the grammar says."""
    decided = stream + b":"  # a CR at the end could still become a CRLF; the byte after it removes the doubt
    assert dispatched(split(decided, cuts)) == reference_parse(decided)


@given(stream=streams, cuts=cuts, event_bytes_max=st.integers(0, 30))
def test_large_events_are_returned_in_pieces_and_the_others_are_parsed(
    stream: bytes, cuts: list[int], event_bytes_max: int
) -> None:
    """An event over the maximum is returned without data but with all its bytes; other events are not affected."""
    small_enough = [event for event in split(stream) if len(event.raw) <= max(event_bytes_max, 2)]
    events = split(stream, cuts, event_bytes_max)
    assert dispatched(events) == dispatched(small_enough)
    assert all(event.raw for event in events)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b'data: {"a":1}\n\n', [(None, b'{"a":1}')]),
        (b'data:{"a":1}\n\n', [(None, b'{"a":1}')]),
        (b"data:  x\n\n", [(None, b" x")]),
        (b"data: a\n\ndata: b\n\n", [(None, b"a"), (None, b"b")]),
        (b"event: ping\ndata: {}\n\n", [("ping", b"{}")]),
        (b"event: a\nevent:b\ndata: 1\n\n", [("b", b"1")]),
        (b"event: a\nevent:\ndata: 1\n\n", [(None, b"1")]),
        (b"event: \xff\ndata: 1\n\n", [("�", b"1")]),
        (b"data: {\ndata: }\n\n", [(None, b"{\n}")]),
        (b"data\n\n", [(None, b"")]),
        (b"data:\ndata\n\n", [(None, b"\n")]),
        (b"id: 1\nretry: 5\nother: x\ndata: 1\n\n", [(None, b"1")]),
        (b": OPENROUTER PROCESSING\n\n", [(None, None)]),
        (b": note\ndata: 1\n: more\n\n", [(None, b"1")]),
        (b":\n\n", [(None, None)]),
        (b"event: ping\n\n", [("ping", None)]),
        (b"\ndata: 1\n\n\n", [(None, None), (None, b"1"), (None, None)]),
        (b"data: 1\r\n\r\n", [(None, b"1")]),
        (b"data: 1\r\rdata: 2\r\r", [(None, b"1"), (None, b"2")]),
        (b"data: 1\r\r\r", [(None, b"1"), (None, None)]),
        (b"data: 1\r\n\ndata: 2\n\r\n", [(None, b"1"), (None, b"2")]),
        (b"data: 1\n\rdata: 2\r\r\ndata: 3\n\n", [(None, b"1"), (None, b"2"), (None, b"3")]),
        (b"\xef\xbb\xbfdata: 1\n\ndata: 2\n\n", [(None, b"1"), (None, b"2")]),
        (b"\xef\xbb\xbf\n", [(None, None)]),
        (b"data: 1\n\n\xef\xbb\xbfdata: 2\n\n", [(None, b"1"), (None, None)]),
        (b"data: \xc3\xa9\n\n", [(None, "é".encode())]),
        (b"data: 1\n", []),
        (b"data: 1", []),
        (b"", []),
    ],
)
def test_the_name_and_data_of_events(stream: bytes, expected: list[NameAndData]) -> None:
    """Each rule of the grammar that real upstreams use, and each that they break."""
    assert [(event.name, event.data) for event in split(stream)] == expected
    assert [(event.name, event.data) for event in split(stream, list(range(len(stream))))] == expected


def test_the_raw_bytes_of_an_event_include_comments_and_the_terminator() -> None:
    """`raw` contains every byte since the previous event."""
    assert split(b": hi\r\ndata: 1\r\n\r\n\ndata: 2\n\n") == [
        Event(b": hi\r\ndata: 1\r\n\r\n", None, b"1"),
        Event(b"\n", None, None),
        Event(b"data: 2\n\n", None, b"2"),
    ]


def test_a_complete_event_is_returned_at_once() -> None:
    """No event waits for a byte that may never come: not after LF, not after CRLF, not in a stream of bare CRs."""
    for stream in (b"data: 1\n\n", b"data: 1\r\n\r\n", b"data: 1\r\r"):
        splitter = Splitter()
        for _ in range(3):
            assert splitter.feed(stream) == [Event(stream, None, b"1")]


def test_a_bare_cr_after_lf_waits_for_the_byte_after_it() -> None:
    """It may be the first half of a CRLF, which would belong to the same event."""
    splitter = Splitter()
    assert splitter.feed(b"data: 1\n\r") == []
    assert splitter.feed(b"\n") == [Event(b"data: 1\n\r\n", None, b"1")]


def test_several_events_in_one_chunk_of_a_running_stream() -> None:
    """After the first event, chunks of whole LF events take the fast path, with the same result."""
    splitter = Splitter()
    assert dispatched(splitter.feed(b"data: 0\n\n")) == [(None, b"0")]
    assert splitter.feed(b"data: 1\n\nevent: e\ndata:2\n\n") == [
        Event(b"data: 1\n\n", None, b"1"),
        Event(b"event: e\ndata:2\n\n", "e", b"2"),
    ]
    assert dispatched(splitter.feed(b"data: 3\n\n\ndata: 4\n\n")) == [(None, b"3"), (None, b"4")]
    assert dispatched(splitter.feed(b"\n\n")) == []
    assert dispatched(splitter.feed(b"data: 5\n\ndata: ")) == [(None, b"5")]
    assert dispatched(splitter.feed(b"6\n\n")) == [(None, b"6")]
    assert splitter.end() == b""


def test_a_large_event_is_returned_in_pieces_before_its_end() -> None:
    """All but the last two bytes are returned, because those may begin the blank line; the next event is parsed."""
    splitter = Splitter(event_bytes_max=16)
    assert splitter.feed(b"data: 1\n\n") == [Event(b"data: 1\n\n", None, b"1")]
    assert splitter.feed(b"data: " + b"x" * 10) == []
    assert not splitter.is_inside_large_event
    assert splitter.feed(b"y") == [Piece(b"data: " + b"x" * 9, None, None)]
    assert splitter.is_inside_large_event
    assert splitter.feed(b"z") == [Piece(b"x", None, None)]
    assert splitter.feed(b"\n") == [Piece(b"y", None, None)]
    assert splitter.feed(b"\ndata: 2\n\n") == [Event(b"z\n\n", None, None), Event(b"data: 2\n\n", None, b"2")]
    assert not splitter.is_inside_large_event


def test_a_large_event_in_one_chunk_is_not_parsed_either() -> None:
    """The size of an event decides, not how it arrived."""
    splitter = Splitter(event_bytes_max=16)
    splitter.feed(b"data: 1\n\n")
    stream = b"data: " + b"x" * 9 + b"\n\n"
    assert splitter.feed(stream) == [Event(stream, None, None)]
    assert splitter.feed(b"data: 2\n\n") == [Event(b"data: 2\n\n", None, b"2")]


def test_an_event_of_several_megabytes_is_parsed() -> None:
    """The last event of a response contains its images: a line may be as long as an event may be."""
    stream = b"event: response.completed\ndata: " + b"x" * (3 << 20) + b"\n\n"
    assert split(stream, list(range(0, len(stream), 4096))) == [
        Event(stream, "response.completed", b"x" * (3 << 20)),
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"data: 1",
        b"data:1",
        b"data\n",
        b"event: x",
        b"id:1",
        b"retry: 3",
        b": waiting",
        b":\n",
        b"\xef\xbb\xbfdata: 1",
        b"\r\n\n\rdata: 1",
        b" \ndata: 1",
        b" \t\r\n\r\n  \ndata: 1",
        b"x: 1\ndata: 1",
        b"x-request-id:1\r\nx:\rdata: 1",
        b"database: 1\n: waiting",
        b" data: 1\ndata: 1",
    ],
)
def test_a_stream_is_recognized_by_its_first_line(body: bytes) -> None:
    """As soon as the line's field is complete, and not before. Blanks and other fields before it are ignored."""
    decided = [begins_with_event(body[:end]) for end in range(len(body) + 1)]
    first = decided.index(True)
    assert decided == [None] * first + [True] * (len(body) + 1 - first)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[",
        b"  {",
        b"dates and more",
        b"x y: 1\ndata: 1",
        b"x: 1\n{",
        b"<html>",
        b"ID3\x04",
        b"\xff\xfb",
        b"\n\n{",
        b"\xef\xbbd",
    ],
)
def test_anything_else_is_a_whole_answer(body: bytes) -> None:
    """JSON, also with whitespace in front of it; HTML; audio."""
    assert begins_with_event(body) is False
    assert begins_with_event(body[:0]) is None


@pytest.mark.parametrize(
    ("body", "is_cut_off"),
    [
        (b"", True),
        (b" \n", True),
        (b"d", True),
        (b"\nda", True),
        (b"\xef\xbb\xbfev", True),
        (b"hello", False),
        (b"{", False),
    ],
)
def test_a_body_that_broke_off_in_its_first_line(body: bytes, is_cut_off: bool) -> None:
    """The header of the answer decides whether it was to be a stream. Other text is no event."""
    assert is_cut_off_event(body) is is_cut_off
