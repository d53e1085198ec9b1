"""A message that the proxy stops ends as if its own `max_tokens` had ended it there.

The end is compared with what the simulated upstream writes at its maximum, and checked event by event. How the SDK
reads it is tested in `tests/journeys/test_messages.py`.
"""

import json
from typing import Any

import pytest

from proxy.formats.message_ending import MessageEnding
from proxy.formats.sse import Splitter
from proxy.policy.amounts import Tokens
from proxy.simulator.messages import write_message_stream
from proxy.simulator.text import Endpoint, Generator

USED = Tokens(11, 5, cached=3)
START = {"type": "message_start", "message": {"usage": {"input_tokens": 7, "cache_read_input_tokens": 4}}}
BLOCK = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
CLOSED = {"type": "content_block_stop", "index": 0}
STOPPED = {"stop_reason": "max_tokens", "stop_sequence": None}


def end_after(*events: dict[str, Any], usage: Tokens = USED) -> list[dict[str, Any]]:
    """The events that are written after these."""
    ending = MessageEnding()
    for event in events:
        ending.see(event)
    return ending.missing_events(usage)


def test_the_end_equals_that_at_the_upstreams_own_maximum() -> None:
    """After the same text, the proxy writes the same events."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True}
    answer = Generator(0).answer(Endpoint.MESSAGES, asked)
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
    assert end_after(START, BLOCK) == [CLOSED, *end]
    assert end_after(START, BLOCK, CLOSED) == end
    assert end_after(START, BLOCK, CLOSED, {**BLOCK, "index": 1}) == [{**CLOSED, "index": 1}, *end]
    assert end_after(START) == end


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
    ending = MessageEnding()
    ending.see(START)
    ending.see(event)
    assert ending.is_over == is_over
    assert (ending.missing_events(USED) == []) == is_over


@pytest.mark.parametrize(
    "event", [{"type": "message_start"}, {"type": "message_start", "message": {"usage": 7}}, {**BLOCK, "index": "x"}]
)
def test_events_of_an_unexpected_shape_are_ignored(event: dict[str, Any]) -> None:
    """Their usage and their index are not repeated in the end."""
    *_, delta, stop = end_after(event)
    assert (delta["usage"]["input_tokens"], stop) == (8, {"type": "message_stop"})
    assert [each["type"] for each in end_after(event)].count("content_block_stop") == 0
