"""Anthropic's API: errors, usage, what an answer is charged, and how a stream is stopped.

The end of a stopped stream is compared with what the simulated upstream writes at its maximum, and checked event by
event. How the SDK reads it is tested in `tests/journeys/test_messages.py`. Sources: docs/wire.md, sections 1.2 and
1.3 (usage) and 3.6 (the client).
"""

import json
from typing import Any

import pytest

from proxy.errors import InvalidRequest, LedgerUnavailable, Refusal, UpstreamError
from proxy.formats.endpoints import (
    MESSAGES,
)
from proxy.formats.messages import MessagesEnding, error_body, type_of
from proxy.formats.sse import Splitter
from proxy.formats.surfaces import error_event
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Usage
from proxy.simulator.messages import write_message_stream
from proxy.simulator.text import Endpoint as Simulated
from proxy.simulator.text import Generator
from tests.formats.streams import (
    new,
    parsed,
    request,
    usage_of,
    watch,
    whole,
)


def test_an_error_keeps_the_members_for_programs() -> None:
    """`reset_at` and the like are inside `error`, where the SDK exposes them; the type is Anthropic's."""
    members = {"reset_at": "2026-11-25T00:00:00+01:00", "retry_after": 7}
    error = Refusal("Used up.", type="insufficient_quota", code="insufficient_quota", headers={}, members=members)
    assert error_body(error, "req_1") == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "Used up.", "code": "insufficient_quota", **members},
        "request_id": "req_1",
    }


def test_an_error_has_no_empty_members() -> None:
    """OpenAI's shape has nulls, Anthropic's does not. An error inside a stream has no id."""
    body = error_body(InvalidRequest("No.", param="tools"))
    assert body == {"type": "error", "error": {"type": "invalid_request_error", "message": "No.", "param": "tools"}}
    assert error_body(UpstreamError("No."))["error"]["type"] == "api_error"  # type: ignore[index]
    assert error_body(LedgerUnavailable())["error"]["type"] == "overloaded_error"  # type: ignore[index]


@pytest.mark.parametrize(
    ("status", "type"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (408, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
        (529, "overloaded_error"),
    ],
)
def test_the_status_determines_the_error_type(status: int, type: str) -> None:
    """The API description lists these; any other 4xx is a bad request, any other 5xx an API error."""
    assert type_of(status) == type


def test_an_error_in_a_stream_of_messages_is_anthropic_s_error_event() -> None:
    """Anthropic's SDK raises if the event is named `error`, and reads its member `error`."""
    event = error_event(MESSAGES, UpstreamError("It broke."))
    head, data = event.split(b"\n", 1)
    assert head == b"event: error"
    error = {"type": "api_error", "message": "It broke.", "code": "upstream_error"}
    assert json.loads(data.removeprefix(b"data: ")) == {"type": "error", "error": error}


# ------------------------------------------------------------------------------------------ what an answer is charged


MESSAGE = request(MESSAGES, max_tokens=50)


def message_event(kind: str, **more: object) -> bytes:
    """An event of a message."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n".encode()


def delta(kind: str, **more: object) -> bytes:
    """A piece of the first content block."""
    return message_event("content_block_delta", index=0, delta={"type": kind, **more})


START = message_event(
    "message_start",
    message={
        "id": "msg_1",
        "content": [],
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 2,
            "cache_read_input_tokens": 5,
            "output_tokens": 1,
        },
    },
)
BLOCK = message_event("content_block_start", index=0, content_block={"type": "text", "text": ""})
BLOCK_STOP = message_event("content_block_stop", index=0)
STOP = message_event("message_stop")


def message_delta(**usage: object) -> bytes:
    """The event that states the stop reason and the usage."""
    return message_event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)


def test_a_message_is_charged_the_usage_at_its_end() -> None:
    """Input that the end does not repeat is taken from the beginning. The stream is forwarded unchanged."""
    stream = (
        START
        + BLOCK
        + message_event("ping")
        + delta("text_delta", text="hi")
        + BLOCK_STOP
        + message_delta(output_tokens=9)
        + STOP
    )
    meter, shown = watch(stream, MESSAGE)
    assert meter.usage() == Exactly(Tokens(11, 9, cached=5))
    assert shown == stream
    assert meter.is_over


def test_an_input_of_0_at_the_beginning_is_ignored() -> None:
    """Some servers count only at the end. The hold for the input must not shrink to 0."""
    start = message_event("message_start", message={"usage": {"input_tokens": 0, "output_tokens": 0}})
    meter, _ = watch(start + BLOCK + delta("text_delta", text="hello"), MESSAGE)
    assert (meter.input_stated, meter.usage()) == (None, AtLeast(Tokens(0, 5)))
    assert usage_of(start + BLOCK + message_delta(input_tokens=7, output_tokens=2) + STOP, MESSAGE) == Exactly(
        Tokens(7, 2)
    )


def test_of_the_usages_of_a_message_the_largest_numbers_count() -> None:
    """Each states the total so far, so they are not added. A later one may raise the input."""
    stream = START + BLOCK + delta("text_delta", text="hi") + message_delta(output_tokens=3)
    meter, _ = watch(
        stream + message_delta(output_tokens=9, input_tokens=6, cache_read_input_tokens=0) + STOP, MESSAGE
    )
    assert meter.usage() == Exactly(Tokens(13, 9, cached=5))


CACHED_START = message_event(
    "message_start",
    message={"usage": {"input_tokens": 31, "cache_read_input_tokens": 20, "output_tokens": 1}},
)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 12}, Exactly(Tokens(51, 12, cached=20))),
        ({"input_tokens": 0, "cache_read_input_tokens": 20, "output_tokens": 12}, Exactly(Tokens(51, 12, cached=20))),
        ({"input_tokens": 51, "output_tokens": 12}, Exactly(Tokens(51, 12, cached=20))),
        ({"input_tokens": 52, "output_tokens": 12}, Exactly(Tokens(72, 12, cached=20))),
        (
            {"input_tokens": 11, "cache_read_input_tokens": 40, "output_tokens": 12},
            Exactly(Tokens(51, 12, cached=40)),
        ),
        ({"input_tokens": -1, "output_tokens": 12}, AtLeast(Tokens(51, 5, cached=20))),
        ({"input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0}, AtLeast(Tokens(51, 5, cached=20))),
        ("many", AtLeast(Tokens(51, 5, cached=20))),
    ],
)
def test_zeros_at_the_end_of_a_message_take_nothing_away(usage: Any, expected: Usage) -> None:
    """A member that is 0 keeps its earlier value; one that is larger or smaller replaces it.

    An input that is divided differently between the cache and the rest is not charged twice.
    """
    end = message_event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage) + STOP
    assert usage_of(CACHED_START + BLOCK + delta("text_delta", text="hello") + end, MESSAGE) == expected


def test_an_output_without_an_input_is_charged() -> None:
    """The caller adds its count of the input. The output is at least what has passed."""
    start = message_event("message_start", message={"usage": {"input_tokens": 0, "output_tokens": 0}})
    text = start + BLOCK + delta("text_delta", text="hello")
    for output, charged in ((12, 12), (3, 5)):
        meter, _ = watch(text + message_delta(output_tokens=output) + STOP, MESSAGE)
        assert (meter.usage(), meter.input_stated) == (AtLeast(Tokens(0, charged)), None)


def test_a_cut_message_is_charged_its_input_and_the_text_that_passed() -> None:
    """The input is known from the first event. The output stated there is ignored: it is counted when it comes."""
    assert usage_of(START, MESSAGE) == AtLeast(Tokens(11, 0, cached=5))
    meter, _ = watch(START + BLOCK + delta("text_delta", text="hello"), MESSAGE)
    assert meter.usage() == AtLeast(Tokens(11, 5, cached=5))
    assert (meter.input_stated, meter.output_seen, meter.is_at_end) == (11, 5, False)


@pytest.mark.parametrize(
    ("event", "tokens"),
    [
        (delta("text_delta", text="hello"), 5),
        (delta("thinking_delta", thinking="hello"), 5),
        (delta("input_json_delta", partial_json='{"a":'), 5),
        (delta("input_json_delta", partial_json=""), 0),
        (delta("signature_delta", signature="c2lnbmF0dXJl"), 0),
        (delta("what_comes_next", words="hello"), 5),
        (
            message_event("content_block_start", index=1, content_block={"type": "tool_use", "id": "t", "name": "f"}),
            1,
        ),
        (message_event("content_block_start", index=1, content_block={"type": "text", "text": "hello"}), 5),
        (message_event("content_block_delta"), 0),
        (message_event("message_start", message="?"), 0),
        (message_event("message_delta", usage="?"), 0),
        (message_event("ping"), 0),
    ],
)
def test_all_text_of_a_message_is_counted(event: bytes, tokens: int) -> None:
    """Text, thinking, and the names and inputs of tool calls; but not signatures and ids."""
    assert usage_of(START + event, MESSAGE) == AtLeast(Tokens(11, tokens, cached=5))


def test_a_message_without_usage_is_counted() -> None:
    """Compatible servers may send none. An invalid usage is treated as none."""
    stream = BLOCK + delta("text_delta", text="hello") + BLOCK_STOP + message_delta(output_tokens="many") + STOP
    assert usage_of(stream, MESSAGE) == AtLeast(Tokens(0, 5))


def test_the_end_of_a_message_begins_with_its_usage() -> None:
    """It is kept from there on until the call is settled. If a block follows, that was not the end."""
    meter, splitter = new(MESSAGE), Splitter()
    stops = []
    for event in splitter.feed(
        START + BLOCK + BLOCK_STOP + message_delta(output_tokens=1) + BLOCK + delta("text_delta") + STOP
    ):
        meter.see_event(event)
        stops.append((meter.is_at_end, meter.is_over))
    assert stops == [(False, False)] * 3 + [(True, False)] + [(False, False)] * 2 + [(True, True)]


def test_an_error_ends_a_message() -> None:
    """The text before it is charged."""
    meter, _ = watch(
        START + delta("text_delta", text="hi") + message_event("error", error={"type": "api_error"}), MESSAGE
    )
    assert (meter.has_error, meter.is_over, meter.usage()) == (True, True, AtLeast(Tokens(11, 2, cached=5)))


def test_a_whole_message_is_charged_its_usage_or_counted() -> None:
    """Without usage the texts of all its blocks are kept."""
    body = {
        "content": [{"type": "text", "text": "hi"}, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": "b"}}]
    }
    meter = new(MESSAGE)
    meter.see_whole(json.dumps({**body, "usage": {"input_tokens": 3, "output_tokens": 2}}).encode())
    assert (meter.usage(), meter.uncounted_texts) == (Exactly(Tokens(3, 2)), [])
    meter = new(MESSAGE)
    meter.see_whole(json.dumps(body).encode())
    assert (meter.usage(), meter.uncounted_texts) == (AtLeast(Tokens(0, 0)), ["hi", "f", "b"])


# ------------------------------------------------------------------------------------------- streams that are stopped


USED = Tokens(11, 5, cached=3)
BEGUN = {"type": "message_start", "message": {"usage": {"input_tokens": 7, "cache_read_input_tokens": 4}}}
OPENED = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
CLOSED = {"type": "content_block_stop", "index": 0}
STOPPED = {"stop_reason": "max_tokens", "stop_sequence": None}


def end_after(*events: dict[str, Any], usage: Tokens = USED) -> list[dict[str, Any]]:
    """The events that are written after these."""
    ending = MessagesEnding()
    for event in events:
        ending.see(event, b"")
    return parsed(ending.at_limit(usage, shows_usage=False))


def test_the_end_equals_that_at_the_upstreams_own_maximum() -> None:
    """After the same text, the proxy writes the same events."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True}
    answer = Generator(0).answer(Simulated.MESSAGES, asked)
    stream = write_message_stream(answer, id="msg_1")
    splitter = Splitter()
    passed = [json.loads(event.data or b"") for event in splitter.feed(b"".join([*stream.opening, *stream.text]))]
    theirs = [json.loads(event.data or b"") for event in splitter.feed(b"".join(stream.closing))]
    assert end_after(*passed, usage=Tokens(answer.input_tokens, answer.output_tokens)) == theirs
    assert theirs[1]["delta"] == STOPPED


def test_an_open_block_is_closed() -> None:
    """The usage is that of `message_start`, with the output that is charged."""
    usage = {"input_tokens": 7, "cache_read_input_tokens": 4, "output_tokens": 5}
    delta = {"type": "message_delta", "delta": STOPPED, "usage": usage}
    end = [delta, {"type": "message_stop"}]
    assert end_after(BEGUN, OPENED) == [CLOSED, *end]
    assert end_after(BEGUN, OPENED, CLOSED) == end
    assert end_after(BEGUN, OPENED, CLOSED, {**OPENED, "index": 1}) == [{**CLOSED, "index": 1}, *end]
    assert end_after(BEGUN) == end


def test_a_message_of_which_nothing_passed_gets_a_start() -> None:
    """SDKs accept no message without it. The charged usage is stated in its parts."""
    begun, delta, stop = end_after()
    usage = {"input_tokens": 8, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 5}
    assert begun["message"]["id"] == "msg_unknown"
    assert begun["message"]["usage"] == {**usage, "output_tokens": 0}
    assert (delta["usage"], stop) == (usage, {"type": "message_stop"})


@pytest.mark.parametrize(
    ("event", "is_over"),
    [
        ({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, True),
        ({"type": "message_delta", "delta": {"stop_reason": None}}, False),
        ({"type": "message_delta", "usage": {}}, False),
        ({"type": "message_stop"}, True),
        ({"type": "error", "error": {}}, True),
        ({"type": "ping"}, False),
        ({}, False),
    ],
)
def test_a_message_that_has_ended_gets_no_second_end(event: dict[str, Any], is_over: bool) -> None:
    """A `message_delta` without a stop reason is not an end: it states the usage so far."""
    ending = MessagesEnding()
    ending.see(BEGUN, b"")
    ending.see(event, b"")
    assert ending.has_finished == is_over
    assert (ending.at_limit(USED, shows_usage=False) == b"") == is_over


@pytest.mark.parametrize(
    "event", [{"type": "message_start"}, {"type": "message_start", "message": {"usage": 7}}, {**OPENED, "index": "x"}]
)
def test_events_of_an_unexpected_shape_are_ignored(event: dict[str, Any]) -> None:
    """Their usage and their index are not repeated in the end."""
    *_, delta, stop = end_after(event)
    assert (delta["usage"]["input_tokens"], stop) == (8, {"type": "message_stop"})
    assert [each["type"] for each in end_after(event)].count("content_block_stop") == 0


@pytest.mark.parametrize(
    "end",
    [
        {
            "amazon-bedrock-invocationMetrics": {
                "inputTokenCount": 31,
                "outputTokenCount": 12,
                "invocationLatency": 900,
            }
        },
        {"usage": {"input_tokens": 31, "output_tokens": 12}},
        {"delta": {"usage": {"output_tokens": 12}}},
    ],
)
@pytest.mark.parametrize("kind", ["message_stop", "message_delta"])
def test_a_usage_in_the_last_events_is_read_wherever_it_is(kind: str, end: dict) -> None:
    """Amazon Bedrock adds its metrics to `message_stop`; others write the usage in the delta."""
    start = message_event("message_start", message={"usage": {"input_tokens": 31, "output_tokens": 1}})
    stream = start + BLOCK + delta("text_delta", text="hello") + message_event(kind, **end)
    assert usage_of(stream, MESSAGE) == Exactly(Tokens(31, 12))


def test_the_usage_of_an_answer_in_another_shape_is_read() -> None:
    """Chat's and that of /responses."""
    usage = {"prompt_tokens": 11, "completion_tokens": 5}
    text = b'data: {"choices":[{"delta":{"content":"hello"}}]}\n\n'
    assert usage_of(text + b'data: {"choices":[],"usage":%b}\n\n' % json.dumps(usage).encode(), MESSAGE) == Exactly(
        Tokens(11, 5)
    )
    end = {"type": "response.completed", "response": {"usage": {"input_tokens": 11, "output_tokens": 5}}}
    assert usage_of(text + b"data: %b\n\n" % json.dumps(end).encode(), MESSAGE) == Exactly(Tokens(11, 5))


ELSEWHERE = {
    "x_vendor": {"x_vendor": {"id": "1", "usage": {"input_tokens": 31, "output_tokens": 12}}},
    "choice": {"choices": [{"index": None, "usage": {"prompt_tokens": 31, "completion_tokens": 12}}]},
    "bedrock": {"amazon-bedrock-invocationMetrics": {"inputTokenCount": 31, "outputTokenCount": 12}},
}


@pytest.mark.parametrize("place", ELSEWHERE)
def test_a_usage_in_a_place_of_a_vendor_is_read(place: str) -> None:
    """In a whole message, in its last event, and in an event of another shape."""
    assert whole({"content": [{"type": "text", "text": "hello"}], **ELSEWHERE[place]}, MESSAGES).usage() == Exactly(
        Tokens(31, 12)
    )
    text = BLOCK + delta("text_delta", text="hello")
    assert usage_of(text + message_event("message_delta", **ELSEWHERE[place]), MESSAGE) == Exactly(Tokens(31, 12))
    other = b"data: %b\n\n" % json.dumps(ELSEWHERE[place]).encode()
    assert usage_of(text + other, MESSAGE) == Exactly(Tokens(31, 12))


@pytest.mark.parametrize("last", [{}, {"usage": {"output_tokens": 0}}, {"usage": {"output_tokens": 3}}])
def test_the_output_that_the_beginning_states_is_not_taken_away(last: dict) -> None:
    """By zeros at the end, or by no usage there. A guess at the first tokens never counts against the text."""
    end = message_event("message_delta", **last) + message_event("message_stop")
    for early, expected in ((30, Exactly(Tokens(20, 30))), (1, None), (10_000, None)):
        usage = {"input_tokens": 20, "output_tokens": early}
        start = message_event("message_start", message={"usage": usage})
        honest = Exactly(Tokens(20, 3)) if last.get("usage", {}).get("output_tokens") else AtLeast(Tokens(20, 5))
        assert usage_of(start + BLOCK + delta("text_delta", text="hello") + end, MESSAGE) == (expected or honest)
