"""Events come out of a stream as the WHATWG grammar says, and the bytes as they came in."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.sse import EVENT_BYTES_MAX, Event, Splitter

Said = tuple[str | None, bytes | None]


def split(stream: bytes, cuts: list[int] | None = None, event_bytes_max: int = EVENT_BYTES_MAX) -> list[Event]:
    """Feed the stream cut at these places, and hold the splitter to its first promise on the way."""
    splitter = Splitter(event_bytes_max)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts or []), len(stream)]
    events = [event for start, end in pairwise(places) for event in splitter.feed(stream[start:end])]
    assert b"".join(event.raw for event in events) + splitter.end() == stream
    assert splitter.end() == b""
    return events


def said(events: list[Event]) -> list[Said]:
    """What a reader of the stream is told: an event without data is none."""
    return [(event.name, event.data) for event in events if event.data is not None]


def told_by_the_grammar(stream: bytes) -> list[Said]:
    """The grammar of WHATWG, read in the plainest way: the whole stream at once, line by line."""
    told: list[Said] = []
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
            told += [(name, b"\n".join(data))] if data else []
            name, data = None, []
    return told


LINE_ENDS = [b"\n", b"\n\n", b"\n\n", b"\r", b"\r\r", b"\r\n", b"\r\n\r\n"]
TEXTS = b"data: {}|data:x|data|data:  y|event: a|event:|: note|id: 1|retry: 9|[DONE]| |:|\xef\xbb\xbf|\xff|\xc3\xa9"
WORDS = LINE_ENDS + TEXTS.split(b"|")
streams = st.lists(st.sampled_from(WORDS), max_size=24).map(b"".join)
cuts = st.lists(st.integers(0, 120), max_size=20)


@given(stream=streams, cuts=cuts)
def test_events_do_not_depend_on_where_the_stream_was_cut(stream: bytes, cuts: list[int]) -> None:
    """However the network cuts a stream, also byte by byte, the same events come out with the same bytes."""
    assert split(stream, cuts) == split(stream) == split(stream, list(range(len(stream))))


@given(stream=streams, cuts=cuts)
def test_events_are_those_of_the_grammar(stream: bytes, cuts: list[int]) -> None:
    """Any mixture of line ends, comments and fields reads as the plain grammar reads it."""
    decided = stream + b":"  # a last CR may still become a CRLF; with a byte after it there is no doubt
    assert said(split(decided, cuts)) == told_by_the_grammar(decided)


@given(stream=streams, cuts=cuts, event_bytes_max=st.integers(0, 30))
def test_large_events_pass_in_pieces_and_the_others_are_read(
    stream: bytes, cuts: list[int], event_bytes_max: int
) -> None:
    """An event too large to hold loses its data, no byte, and takes no other event with it."""
    small_enough = [event for event in split(stream) if len(event.raw) <= max(event_bytes_max, 2)]
    events = split(stream, cuts, event_bytes_max)
    assert said(events) == said(small_enough)
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
def test_what_an_event_says(stream: bytes, expected: list[Said]) -> None:
    """Each rule of the grammar that real upstreams make use of, and each that they break."""
    assert [(event.name, event.data) for event in split(stream)] == expected
    assert [(event.name, event.data) for event in split(stream, list(range(len(stream))))] == expected


def test_the_raw_bytes_of_an_event_include_comments_and_the_terminator() -> None:
    """What is passed on for one event is everything since the one before it."""
    assert split(b": hi\r\ndata: 1\r\n\r\n\ndata: 2\n\n") == [
        Event(b": hi\r\ndata: 1\r\n\r\n", None, b"1"),
        Event(b"\n", None, None),
        Event(b"data: 2\n\n", None, b"2"),
    ]


def test_a_whole_event_goes_out_at_once() -> None:
    """Nothing waits for a byte that needn't come: not after LF, not after CRLF, not in a stream of bare CRs."""
    for stream in (b"data: 1\n\n", b"data: 1\r\n\r\n", b"data: 1\r\r"):
        splitter = Splitter()
        for _ in range(3):
            assert splitter.feed(stream) == [Event(stream, None, b"1")]


def test_a_bare_cr_after_lf_waits_for_the_byte_after_it() -> None:
    """It may be half of a CRLF, which would belong to the same event."""
    splitter = Splitter()
    assert splitter.feed(b"data: 1\n\r") == []
    assert splitter.feed(b"\n") == [Event(b"data: 1\n\r\n", None, b"1")]


def test_several_events_in_one_chunk_of_a_running_stream() -> None:
    """After the first event the usual chunks take the short way, with the same outcome."""
    splitter = Splitter()
    assert said(splitter.feed(b"data: 0\n\n")) == [(None, b"0")]
    assert splitter.feed(b"data: 1\n\nevent: e\ndata:2\n\n") == [
        Event(b"data: 1\n\n", None, b"1"),
        Event(b"event: e\ndata:2\n\n", "e", b"2"),
    ]
    assert said(splitter.feed(b"data: 3\n\n\ndata: 4\n\n")) == [(None, b"3"), (None, b"4")]
    assert said(splitter.feed(b"\n\n")) == []
    assert said(splitter.feed(b"data: 5\n\ndata: ")) == [(None, b"5")]
    assert said(splitter.feed(b"6\n\n")) == [(None, b"6")]
    assert splitter.end() == b""


def test_a_large_event_passes_on_before_its_end_and_says_so() -> None:
    """Its bytes are not kept back, but for the two that may begin its end; then events are read again."""
    splitter = Splitter(event_bytes_max=16)
    assert splitter.feed(b"data: 1\n\n") == [Event(b"data: 1\n\n", None, b"1")]
    assert splitter.feed(b"data: " + b"x" * 10) == []
    assert not splitter.is_passing_on
    assert splitter.feed(b"y") == [Event(b"data: " + b"x" * 9, None, None)]
    assert splitter.is_passing_on
    assert splitter.feed(b"z") == [Event(b"x", None, None)]
    assert splitter.feed(b"\n") == [Event(b"y", None, None)]
    assert splitter.feed(b"\ndata: 2\n\n") == [Event(b"z\n\n", None, None), Event(b"data: 2\n\n", None, b"2")]
    assert not splitter.is_passing_on


def test_a_large_event_in_one_chunk_is_not_read_either() -> None:
    """Whether an event is too large is a matter of its size, not of how it arrived."""
    splitter = Splitter(event_bytes_max=16)
    splitter.feed(b"data: 1\n\n")
    stream = b"data: " + b"x" * 9 + b"\n\n"
    assert splitter.feed(stream) == [Event(stream, None, None)]
    assert splitter.feed(b"data: 2\n\n") == [Event(b"data: 2\n\n", None, b"2")]


def test_an_event_of_megabytes_is_read() -> None:
    """The last event of a response holds all of it, images too: there is no limit on a line but the event's."""
    stream = b"event: response.completed\ndata: " + b"x" * (3 << 20) + b"\n\n"
    assert split(stream, list(range(0, len(stream), 4096))) == [
        Event(stream, "response.completed", b"x" * (3 << 20)),
    ]
