"""Errors that an upstream reports inside a successful answer are found in every form, and others are not searched."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.endpoints import CHAT, MESSAGES, RESPONSES, Endpoint
from proxy.formats.reported_error import PieceMask, reports_error
from proxy.formats.sse import EVENT_BYTES_MAX
from proxy.formats.stream import Stream
from proxy.formats.surfaces import meter_of
from proxy.formats.texts import read_object
from tests.formats.streams import request

KEY = b"sk-secret-0123456789"
ALL = 10**12

ERRORS: list[dict[str, Any]] = [
    {"error": {"message": "m"}},
    {"error": "text"},
    {"error": {"message": "m"}, "choices": [{"delta": {}, "finish_reason": "error"}]},
    {"errors": [{"message": "m"}]},
    {"type": "error", "code": None, "message": "m"},
    {"type": "response.failed", "response": {"error": {"code": "x"}}},
    {"type": "transcript.text.error", "text": "m"},
    {"type": "response.completed", "response": {"error": None, "output": [{"error": "m"}]}},
    {"choices": [{"error": {"message": "m"}}]},
    {"choices": [{"delta": {"content": "m"}, "finish_reason": "stop"}, {"finish_reason": "error"}]},
    {"object": "error", "message": "m"},
    {"detail": [{"msg": "m"}]},
    {"message": "m"},
]
NO_ERRORS: list[dict[str, Any]] = [
    {"choices": [{"delta": {"content": 'the "error": 5'}}]},
    {"choices": [{"delta": {"content": "error"}}], "error": None},
    {"type": "response.created", "response": {"error": None, "errors": []}},
    {"type": "message_start", "message": {"content": []}},
    {"error": None, "output": [{"error": None}]},
    {"type": "response.output_text.delta", "delta": "error"},
    {"choices": ["odd"]},
    {"choices": []},
]


def mask(data: bytes, *, is_cut: bool = False) -> bytes:
    """A mask of one key."""
    return data.replace(KEY, b"***")


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,", " : ")], ids=["compact", "spaces", "more"])
def test_an_error_is_found_in_every_form(separators: tuple[str, str]) -> None:
    """As the data of an event and as a whole body."""
    for error in ERRORS:
        assert reports_error(json.dumps(error, separators=separators).encode(), error), error
    for answer in NO_ERRORS:
        assert not reports_error(json.dumps(answer, separators=separators).encode(), answer), answer


def test_what_is_no_object_may_be_an_error() -> None:
    """Plain text and lists. `[DONE]` is none, and neither is an event of another name."""
    assert reports_error(b"Incorrect API key", None)
    assert reports_error(b'[{"error": {}}]', None)
    assert reports_error(b'{"code": 1}', {"code": 1}, name="error")
    assert not reports_error(b'{"code": 1}', {"code": 1}, name="ping")
    assert not reports_error(b"[DONE]", None)
    assert reports_error(b"[DONE] " + KEY, None)
    assert reports_error(b'{"\\u0065rror": "m"}', read_object(b'{"\\u0065rror": "m"}'))


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES], ids=lambda endpoint: endpoint.name)
def test_only_events_that_report_an_error_are_masked(endpoint: Endpoint) -> None:
    """The others pass as they came, whatever they contain."""
    stream = Stream(meter_of(request(endpoint), count=len), mask=mask)
    for error in ERRORS:
        event = b"data: %b\n\n" % json.dumps({**error, "k": KEY.decode()}).encode()
        # An error may be the end of a stream, which is kept.
        assert KEY not in stream.feed(event, covered=ALL)
    assert KEY not in stream.feed(b"event: error\ndata: %b\n\n" % KEY, covered=ALL)
    assert KEY not in stream.end()
    stream = Stream(meter_of(request(endpoint), count=len), mask=mask)
    for answer in NO_ERRORS[:2]:
        event = b"data: %b\n\n" % json.dumps({**answer, "k": KEY.decode()}).encode()
        assert stream.feed(event, covered=ALL) == event


def test_an_error_that_breaks_off_is_masked_too() -> None:
    """The mask is told that the data may end within the key."""
    cuts: list[bool] = []

    def recording(data: bytes, *, is_cut: bool = False) -> bytes:
        cuts.append(is_cut)
        return b"masked"

    stream = Stream(meter_of(request(), count=len), mask=recording)
    stream.feed(b'data: {"error": {"message": "sk-secr', covered=ALL)
    stream.close(covered=ALL)
    assert (stream.end(), cuts) == (b"masked", [True])


@pytest.mark.parametrize("step", [1 << 20, EVENT_BYTES_MAX + 5000])
def test_an_error_that_is_too_large_to_parse_is_masked(step: int) -> None:
    """Also if a piece of it ends within the key. Large events without an error pass at once."""
    head = b'data: {"error": {"message": "'
    for at in (100, EVENT_BYTES_MAX - 20, EVENT_BYTES_MAX - 5, EVENT_BYTES_MAX + 4000):
        body = bytearray(head + b"x" * (EVENT_BYTES_MAX + 5000) + b'"}}\n\n')
        body[at : at + len(KEY)] = KEY
        stream = Stream(meter_of(request(), count=len), mask=mask)
        chunks = [bytes(body[start : start + step]) for start in range(0, len(body), step)]
        passed = b"".join(stream.feed(chunk, covered=ALL) for chunk in chunks)
        assert passed == bytes(body).replace(KEY, b"***")
        assert stream.feed(b"data: 1\n\n", covered=ALL) == b"data: 1\n\n"


def test_a_large_error_that_breaks_off_is_complete_up_to_there() -> None:
    """What was kept back of it is sent with the end."""
    body = b'data: {"error": "' + b"x" * EVENT_BYTES_MAX + KEY + b"yz"
    stream = Stream(meter_of(request(), count=len), mask=mask)
    passed = stream.feed(body, covered=ALL)
    assert len(passed) < len(body) - 4000
    assert passed + stream.end() == body.replace(KEY, b"***")


@given(
    st.integers(1, 200),
    st.sampled_from((b'{"error": ', b"\n\nevent: error\ndata: ", b'{"type": "response.failed", ')),
)
def test_a_body_in_pieces_is_masked_from_the_error_on(step: int, sign: bytes) -> None:
    """Wherever the pieces are cut. What precedes the error passes at once and unchanged."""
    body = b"x" * 300 + KEY + b"y" * 6000 + sign + b"z" * 90 + KEY + b"z" * 5000 + KEY
    pieces = PieceMask(mask)
    passed = b"".join(pieces.feed(body[at : at + step]) for at in range(0, len(body), step)) + pieces.end()
    begin = body.index(sign)
    assert passed == body[:begin] + body[begin:].replace(KEY, b"***")
    clean = PieceMask(mask)
    assert clean.feed(body[:begin]) == body[:begin]
    assert clean.end() == b""
