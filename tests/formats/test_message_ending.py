"""A message that we stop ends as if its own `max_tokens` had ended it there.

Shown by what the simulated upstream writes at its maximum, and event by event. How the SDK sees it stands in
`test_messages`.
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


def closing(*events: dict[str, Any], usage: Tokens = USED) -> list[dict[str, Any]]:
    """What is written after these events."""
    ending = MessageEnding()
    for event in events:
        ending.see(event)
    return ending.closing(usage)


def test_it_ends_as_the_upstream_s_own_maximum_does() -> None:
    """After the same text, the same events, byte for byte."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True}
    answer = Generator(0).answer(Endpoint.MESSAGES, asked)
    stream = write_message_stream(answer, id="msg_1")
    splitter = Splitter()
    passed = [json.loads(event.data or b"") for event in splitter.feed(b"".join([*stream.opening, *stream.text]))]
    theirs = [json.loads(event.data or b"") for event in splitter.feed(b"".join(stream.closing))]
    assert closing(*passed, usage=Tokens(answer.input_tokens, answer.output_tokens)) == theirs
    assert theirs[1]["delta"] == STOPPED


def test_a_block_that_is_open_is_closed() -> None:
    """The usage is that of the beginning, with the output that is charged."""
    usage = {"input_tokens": 7, "cache_read_input_tokens": 4, "output_tokens": 5}
    delta = {"type": "message_delta", "delta": STOPPED, "usage": usage}
    end = [delta, {"type": "message_stop"}]
    assert closing(START, BLOCK) == [CLOSED, *end]
    assert closing(START, BLOCK, CLOSED) == end
    assert closing(START, BLOCK, CLOSED, {**BLOCK, "index": 1}) == [{**CLOSED, "index": 1}, *end]
    assert closing(START) == end


def test_before_anything_passed_there_is_a_beginning() -> None:
    """An SDK takes no message without one; what was charged is said in its parts."""
    begun, delta, stop = closing()
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
def test_what_has_ended_is_not_ended_again(event: dict[str, Any], is_over: bool) -> None:
    """A `message_delta` without a reason is a count on the way."""
    ending = MessageEnding()
    ending.see(START)
    ending.see(event)
    assert ending.is_over == is_over
    assert (ending.closing(USED) == []) == is_over


@pytest.mark.parametrize(
    "event", [{"type": "message_start"}, {"type": "message_start", "message": {"usage": 7}}, {**BLOCK, "index": "x"}]
)
def test_what_has_an_odd_shape_is_passed_over(event: dict[str, Any]) -> None:
    """Nothing of it is repeated."""
    *_, delta, stop = closing(event)
    assert (delta["usage"]["input_tokens"], stop) == (8, {"type": "message_stop"})
    assert [said["type"] for said in closing(event)].count("content_block_stop") == 0
