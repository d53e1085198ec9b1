"""What the simulated upstream says on Anthropic's surface, read as its API describes it."""

import json
from itertools import islice
from typing import Any

import pytest

from proxy.formats.sse import Splitter
from proxy.simulator.directives import Complaint, Directions
from proxy.simulator.messages import write_complaint, write_message, write_message_stream
from proxy.simulator.text import Author, Endpoint, Script

HELLO = [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}]
TAKEN = 5


def script(directions: Directions | None = None, **asked: Any) -> Script:
    """Read a call with these fields."""
    call = {"model": "m", "messages": HELLO, "max_tokens": 500, **asked}
    return Author(0).script(Endpoint.MESSAGES, call, directions or Directions(tokens=3))


def whole(of: Script) -> Any:
    """The whole answer."""
    return json.loads(write_message(of, id="msg_1"))


def events(of: Script) -> list[tuple[str | None, Any]]:
    """The names and the data of a stream's events."""
    stream = write_message_stream(of, id="msg_1")
    read = Splitter().feed(b"".join([*stream.opening, *stream.text, *stream.closing]))
    return [(event.name, json.loads(event.data or b"")) for event in read]


def test_a_stream_says_the_same_as_the_whole_answer() -> None:
    """The same words, one event each, the same reason to end, the same usage; each event under its name."""
    said = events(script(stream=True))
    assert [name for name, _ in said] == [data["type"] for _, data in said]
    text = "".join(data["delta"]["text"] for name, data in said if name == "content_block_delta")
    message = whole(script())
    assert message["content"] == [{"type": "text", "text": text}]
    delta = next(data for name, data in said if name == "message_delta")
    assert (delta["delta"]["stop_reason"], delta["usage"]) == (message["stop_reason"], message["usage"])
    assert message["usage"] | {"output_tokens": 1} == said[0][1]["message"]["usage"]


@pytest.mark.parametrize(("maximum", "reason"), [(9, "tool_use"), (2, "max_tokens")])
def test_it_calls_the_first_tool(maximum: int, reason: str) -> None:
    """With its words, the same streamed and whole."""
    offered = {"name": "look_up", "input_schema": {"type": "object", "properties": {"term": {}}}}
    calling = Directions(tool=True, tokens=3)
    message = whole(script(calling, tools=[offered], max_tokens=maximum))
    [block] = message["content"]
    assert (block["type"], block["name"], message["stop_reason"]) == ("tool_use", "look_up", reason)
    said = events(script(calling, tools=[offered], max_tokens=maximum, stream=True))
    parts = [data["delta"]["partial_json"] for name, data in said if name == "content_block_delta"]
    assert json.loads("".join(parts)) == block["input"] == {"term": block["input"]["term"]}
    assert len(block["input"]["term"].split()) == message["usage"]["output_tokens"] == min(3, maximum)
    begun = next(data["content_block"] for name, data in said if name == "content_block_start")
    assert begun == {**block, "input": {}}
    delta = next(data for name, data in said if name == "message_delta")
    assert (delta["delta"]["stop_reason"], delta["usage"]) == (reason, message["usage"])


@pytest.mark.parametrize(("maximum", "reason"), [(2, "max_tokens"), (3, "end_turn")])
def test_the_maximum_ends_it(maximum: int, reason: str) -> None:
    """With the reason that says so."""
    assert whole(script(max_tokens=maximum))["stop_reason"] == reason


def test_the_system_s_words_are_input() -> None:
    """Three more than without."""
    assert whole(script(system="be very brief"))["usage"]["input_tokens"] == TAKEN + 3


@pytest.mark.parametrize(("cached", "parts"), [(0, (5, 0, 0)), (3, (2, 2, 1)), (99, (0, 3, 2))])
def test_what_is_cached_is_said_apart(cached: int, parts: tuple[int, int, int]) -> None:
    """The parts add up to the input, however much is asked for."""
    usage = whole(script(Directions(tokens=3, cached=cached)))["usage"]
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert tuple(usage[name] for name in names) == parts
    assert sum(parts) == TAKEN


def test_without_usage_nothing_says_any() -> None:
    """As from a server that is like Anthropic's in all else; and without an end there is no last event."""
    silent = Directions(tokens=3, no_usage=True, no_done=True, crlf=True)
    assert "usage" not in whole(script(silent))
    assert "usage" not in json.dumps(events(script(silent)))
    assert events(script(silent))[-1][0] == "message_delta"
    assert next(islice(write_message_stream(script(silent), id="m").text, 1)).endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("status", "type"), [(401, "authentication_error"), (400, "invalid_request_error"), (500, "api_error")]
)
def test_an_error_has_its_type(status: int, type: str) -> None:
    """In the shape that Anthropic's SDK reads; an overload has a status of its own."""
    said = json.loads(write_complaint(Complaint(status, "No."), id="req_1"))
    assert said == {"type": "error", "error": {"type": type, "message": "No."}, "request_id": "req_1"}
    assert b"overloaded_error" in write_complaint(Complaint(529, "No."), id="req_1")
