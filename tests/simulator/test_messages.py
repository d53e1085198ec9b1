"""Answers in Anthropic's format, as its API documentation describes it."""

import json
from itertools import islice
from typing import Any

import pytest

from proxy.formats.sse import Splitter
from proxy.simulator.directives import ApiError, Directives
from proxy.simulator.messages import write_error, write_message, write_message_stream
from proxy.simulator.text import Answer, Endpoint, Generator

HELLO = [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}]
INPUT_TOKENS = 5


def generated(directives: Directives | None = None, **params: Any) -> Answer:
    """The answer to a call with these parameters."""
    call = {"model": "m", "messages": HELLO, "max_tokens": 500, **params}
    return Generator(0).answer(Endpoint.MESSAGES, call, directives or Directives(tokens=3))


def whole(answer: Answer) -> Any:
    """The whole answer, parsed."""
    return json.loads(write_message(answer, id="msg_1"))


def events(answer: Answer) -> list[tuple[str | None, Any]]:
    """The names and the data of a stream's events."""
    stream = write_message_stream(answer, id="msg_1")
    read = Splitter().feed(b"".join([*stream.opening, *stream.text, *stream.closing]))
    return [(event.name, json.loads(event.data or b"")) for event in read]


def test_a_stream_has_the_content_of_the_whole_answer() -> None:
    """The same words, one event each, the same stop reason and usage; each event is named as its type."""
    named = events(generated(stream=True))
    assert [name for name, _ in named] == [data["type"] for _, data in named]
    text = "".join(data["delta"]["text"] for name, data in named if name == "content_block_delta")
    message = whole(generated())
    assert message["content"] == [{"type": "text", "text": text}]
    delta = next(data for name, data in named if name == "message_delta")
    assert (delta["delta"]["stop_reason"], delta["usage"]) == (message["stop_reason"], message["usage"])
    assert message["usage"] | {"output_tokens": 1} == named[0][1]["message"]["usage"]


@pytest.mark.parametrize(("maximum", "reason"), [(9, "tool_use"), (2, "max_tokens")])
def test_it_calls_the_first_tool(maximum: int, reason: str) -> None:
    """Its words are the argument, the same streamed and whole."""
    offered = {"name": "look_up", "input_schema": {"type": "object", "properties": {"term": {}}}}
    calling = Directives(tool=True, tokens=3)
    message = whole(generated(calling, tools=[offered], max_tokens=maximum))
    [block] = message["content"]
    assert (block["type"], block["name"], message["stop_reason"]) == ("tool_use", "look_up", reason)
    named = events(generated(calling, tools=[offered], max_tokens=maximum, stream=True))
    parts = [data["delta"]["partial_json"] for name, data in named if name == "content_block_delta"]
    assert json.loads("".join(parts)) == block["input"] == {"term": block["input"]["term"]}
    assert len(block["input"]["term"].split()) == message["usage"]["output_tokens"] == min(3, maximum)
    begun = next(data["content_block"] for name, data in named if name == "content_block_start")
    assert begun == {**block, "input": {}}
    delta = next(data for name, data in named if name == "message_delta")
    assert (delta["delta"]["stop_reason"], delta["usage"]) == (reason, message["usage"])


@pytest.mark.parametrize(("maximum", "reason"), [(2, "max_tokens"), (3, "end_turn")])
def test_the_maximum_cuts_the_answer_short(maximum: int, reason: str) -> None:
    """The stop reason says so."""
    assert whole(generated(max_tokens=maximum))["stop_reason"] == reason


def test_the_system_prompt_is_input() -> None:
    """Three words are three more input tokens."""
    assert whole(generated(system="be very brief"))["usage"]["input_tokens"] == INPUT_TOKENS + 3


@pytest.mark.parametrize(("cached", "parts"), [(0, (5, 0, 0)), (3, (2, 2, 1)), (99, (0, 3, 2))])
def test_cached_input_is_reported_separately(cached: int, parts: tuple[int, int, int]) -> None:
    """The parts add up to the input, even if the directive names more."""
    usage = whole(generated(Directives(tokens=3, cached=cached)))["usage"]
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert tuple(usage[name] for name in names) == parts
    assert sum(parts) == INPUT_TOKENS


def test_without_usage_no_event_reports_any() -> None:
    """As from a server that differs from Anthropic's in this only. With `no_done` the last event is missing too."""
    silent = Directives(tokens=3, no_usage=True, no_done=True, crlf=True)
    assert "usage" not in whole(generated(silent))
    assert "usage" not in json.dumps(events(generated(silent)))
    assert events(generated(silent))[-1][0] == "message_delta"
    assert next(islice(write_message_stream(generated(silent), id="m").text, 1)).endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("status", "type"), [(401, "authentication_error"), (400, "invalid_request_error"), (500, "api_error")]
)
def test_each_error_status_has_its_type(status: int, type: str) -> None:
    """In the format that Anthropic's SDK reads; 529 is an overload."""
    body = json.loads(write_error(ApiError(status, "No."), id="req_1"))
    assert body == {"type": "error", "error": {"type": type, "message": "No."}, "request_id": "req_1"}
    assert b"overloaded_error" in write_error(ApiError(529, "No."), id="req_1")
