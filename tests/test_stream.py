"""What of a stream may pass on, and what is its end."""

import pytest

from proxy.errors import UpstreamError
from proxy.meter import Meter
from proxy.sse import EVENT_BYTES_MAX
from proxy.stream import Stream
from proxy.wire import CHAT, parse_call

WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
ASKED = b'{"model":"m","messages":[],"stream":true,"stream_options":{"include_usage":true}}'
UNASKED = b'{"model":"m","messages":[],"stream":true}'


def _stream(body: bytes = ASKED) -> Stream:
    return Stream(Meter(parse_call(CHAT, body), input_estimate=10))


def test_events_pass_at_once_and_the_end_is_kept() -> None:
    """From the usage chunk on; what only we asked for is in neither."""
    asked, unasked = _stream(), _stream(UNASKED)
    assert asked.feed(WORD + WORD[:10]) == WORD
    assert asked.feed(WORD[10:] + USAGE) == WORD
    assert (asked.feed(DONE), asked.is_over, asked.end()) == (b"", True, USAGE + DONE)
    assert unasked.feed(WORD + USAGE + DONE) == WORD
    assert unasked.end() == DONE


def test_what_looked_like_the_end_passes_on_when_more_comes() -> None:
    """A usage chunk in the middle holds nothing back for long."""
    stream = _stream()
    assert stream.feed(WORD + USAGE) == WORD
    assert stream.feed(WORD) == USAGE + WORD
    assert not stream.is_over


def test_an_event_that_was_never_finished_is_the_last_of_the_end() -> None:
    """An upstream that ends without a blank line: the bytes pass as they came."""
    stream = _stream()
    stream.feed(WORD + b"data: half")
    assert stream.end() == b"data: half"


def test_an_end_that_never_ends_is_no_end() -> None:
    """Megabytes of comments after the usage are not ours to keep."""
    stream = _stream()
    stream.feed(USAGE)
    with pytest.raises(UpstreamError, match="never ends"):
        for _ in range(300):
            stream.feed(b": " + b"x" * 65_000 + b"\n\n")


def test_nothing_of_ours_may_come_between_the_pieces_of_an_event() -> None:
    """An event too large to hold goes out in pieces; an error in the middle of it would be a part of it."""
    stream = _stream()
    assert stream.is_between_events
    assert stream.feed(b"data: " + b"x" * (EVENT_BYTES_MAX + 10))
    assert not stream.is_between_events
    stream.feed(b"\n\n")
    assert stream.is_between_events
