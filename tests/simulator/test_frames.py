"""The bytes of simulated answers have OpenAI's shapes, and agree with what was scripted."""

import base64
import struct
from functools import cache
from typing import Any

import orjson
import pytest

from proxy.formats.sse import Event, Splitter
from proxy.simulator.directives import Directions
from proxy.simulator.frames import Stream, write_stream, write_whole
from proxy.simulator.text import Author, Endpoint, Script

author = cache(Author)


def script(endpoint: Endpoint, directions: Directions | None = None, **asked: Any) -> Script:
    """Read a call with this input and these fields."""
    content = [{"role": "user", "content": "hello there"}] if endpoint is Endpoint.CHAT else "hello there"
    call = {"model": "m", endpoint.input_field: content, **asked}
    return author(0).script(endpoint, call, directions or Directions())


def whole(script: Script) -> dict[str, Any]:
    """Write the whole answer and read it again."""
    answer: dict[str, Any] = orjson.loads(write_whole(script, id="x1", created=7))
    return answer


def pieces(stream: Stream) -> list[bytes]:
    """All that a stream sends."""
    return [*stream.opening, *stream.text, *stream.closing]


def events(script: Script) -> list[Event]:
    """Write the stream and read it again; each piece must be one event."""
    splitter = Splitter()
    read = []
    for piece in pieces(write_stream(script, id="x1", created=7)):
        (event,) = splitter.feed(piece)
        read.append(event)
    assert splitter.end() == b""
    return read


def chunks(script: Script) -> list[dict[str, Any]]:
    """The chunks of a stream, without the [DONE] at its end."""
    *read, done = events(script)
    assert done.data == b"[DONE]"
    return [orjson.loads(event.data or b"") for event in read]


ASKED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (Endpoint.CHAT, {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}),
        (Endpoint.COMPLETIONS, {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}),
    ],
)
def test_usage_of_a_whole_answer(endpoint: Endpoint, expected: dict[str, int]) -> None:
    """It says what was scripted, with the details that say nothing of it was cached or reasoned."""
    answer = whole(script(endpoint, max_tokens=4))
    assert {key: answer["usage"][key] for key in expected} == expected
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    assert answer["choices"][0]["finish_reason"] == "length"
    assert (answer["id"], answer["created"], answer["model"]) == ("x1", 7, "m")


def test_no_usage_and_zero_usage() -> None:
    """Servers exist that say nothing, and servers that say nothing was used; the two are not the same."""
    for endpoint in set(Endpoint) - {Endpoint.MESSAGES}:
        assert not whole(script(endpoint, Directions(no_usage=True))).get("usage")
        assert whole(script(endpoint, Directions(usage_zero=True)))["usage"]["total_tokens"] == 0


TOOL = {"name": "look_up", "parameters": {"type": "object", "properties": {"term": {}, "language": {}}}}
CALLING = Directions(tool=True, tokens=3)


@pytest.mark.parametrize(("maximum", "reason"), [(9, "tool_calls"), (2, "length")])
def test_a_chat_calls_the_first_tool(maximum: int, reason: str) -> None:
    """Each choice calls it with its words, the same streamed and whole, and its words are what is charged."""
    tools = [{"type": "function", "function": TOOL}, {"type": "function", "function": {"name": "other"}}]
    asked = {"tools": tools, "n": 2, "max_tokens": maximum}
    script_whole = script(Endpoint.CHAT, CALLING, **asked)
    answer = whole(script_whole)
    assert answer["usage"]["completion_tokens"] == 2 * min(3, maximum)
    streamed = chunks(script(Endpoint.CHAT, CALLING, **asked, **ASKED))
    assert streamed[-1]["usage"] == answer["usage"]
    for choice, words in zip(answer["choices"], script_whole.choices, strict=True):
        mine = [each for chunk in streamed for each in chunk["choices"] if each["index"] == choice["index"]]
        deltas = [call for each in mine for call in each["delta"].get("tool_calls", [])]
        [call] = choice["message"]["tool_calls"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, reason)
        assert mine[-1]["finish_reason"] == reason
        assert orjson.loads(call["function"]["arguments"]) == {"term": words.text}
        assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
        assert (deltas[0]["id"], deltas[0]["function"]["name"]) == (call["id"], "look_up")


def test_a_response_calls_the_first_tool() -> None:
    """An item of its own, the same streamed and whole; its events are numbered without a gap."""
    tools = [{"type": "function", **TOOL}]
    answer = whole(script(Endpoint.RESPONSES, CALLING, tools=tools))
    [item] = answer["output"]
    assert (item["type"], item["name"], list(orjson.loads(item["arguments"]))) == (
        "function_call",
        "look_up",
        ["term"],
    )
    read = [orjson.loads(event.data or b"") for event in events(script(Endpoint.RESPONSES, CALLING, tools=tools))]
    assert [event["sequence_number"] for event in read] == list(range(len(read)))
    assert "".join(event["delta"] for event in read if event["type"].endswith(".delta")) == item["arguments"]
    assert [event["item"] for event in read if event["type"] == "response.output_item.done"] == [item]
    assert read[-1]["response"] == answer


def test_without_a_tool_none_is_called() -> None:
    """Who offers none gets words."""
    for endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES):
        assert whole(script(endpoint, CALLING)) == whole(script(endpoint, Directions(tokens=3)))


def test_both_encodings_of_a_vector_agree() -> None:
    """The SDK asks for base64 and gives floats to its user."""
    as_floats = whole(script(Endpoint.EMBEDDINGS, dimensions=16))["data"][0]["embedding"]
    as_base64 = whole(script(Endpoint.EMBEDDINGS, dimensions=16, encoding_format="base64"))["data"][0]["embedding"]
    assert list(struct.unpack("<16f", base64.b64decode(as_base64))) == as_floats


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_stream_says_the_same_as_the_whole_answer(endpoint: Endpoint, choices: int) -> None:
    """Word by word, one chunk each, for every choice, with its reason to end."""
    call = script(endpoint, n=choices, stream=True)
    read = chunks(call)
    texts = [""] * choices
    finishes: dict[int, str] = {}
    for chunk in read:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice.get("text", "") or choice.get("delta", {}).get("content", "")
        if choice["finish_reason"]:
            finishes[choice["index"]] = choice["finish_reason"]
    assert texts == [choice.text for choice in call.choices]
    assert finishes == {index: choice.finish_reason for index, choice in enumerate(call.choices)}
    roles = choices if endpoint is Endpoint.CHAT else 0
    assert len(read) == roles + call.output_tokens + choices


def test_a_chat_stream_opens_with_the_role() -> None:
    """The first chunk of each choice says whose message it is, and has no text."""
    first, second, *_ = chunks(script(Endpoint.CHAT, n=2, stream=True))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [first["choices"][0]["index"], second["choices"][0]["index"]] == [0, 1]


def test_a_name_of_a_model_cannot_break_a_chunk() -> None:
    """The word is put where the word goes, whatever the request's own strings look like."""
    model = 'a"\0b\\u0000'
    read = chunks(script(Endpoint.CHAT, model=model, stream=True, max_tokens=3))
    assert {chunk["model"] for chunk in read} == {model}


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
def test_usage_comes_last_and_only_when_asked_for(endpoint: Endpoint) -> None:
    """One chunk more, without choices, before [DONE]; every other one says null. Unasked there is no word of it."""
    stream = write_stream(script(endpoint, **ASKED, max_tokens=4), id="x1", created=7)
    *others, last = chunks(script(endpoint, **ASKED, max_tokens=4))
    assert [chunk["usage"] for chunk in others] == [None] * len(others)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    assert stream.usage_at is not None
    assert b'"completion_tokens":4' in stream.closing[stream.usage_at]
    assert all("usage" not in chunk for chunk in chunks(script(endpoint, stream=True)))
    assert write_stream(script(endpoint, stream=True), id="x1", created=7).usage_at is None


def test_usage_that_comes_early() -> None:
    """On the last chunk that still has a choice, whether or not it was asked for, and none after it."""
    for asked in ({"stream": True}, ASKED):
        call = script(Endpoint.CHAT, Directions(usage_early=True), **asked, n=2, max_tokens=4)
        *others, last = chunks(call)
        assert last["usage"]["completion_tokens"] == 8
        assert last["choices"][0]["finish_reason"] == "length"
        assert not any(chunk.get("usage") for chunk in others)
        stream = write_stream(call, id="x1", created=7)
        assert stream.usage_at is not None
        assert b'"completion_tokens":8' in stream.closing[stream.usage_at]


def test_usage_that_never_comes_and_usage_of_zero() -> None:
    """A server that doesn't know `include_usage` doesn't say null either."""
    call = script(Endpoint.CHAT, Directions(no_usage=True), **ASKED)
    assert all("usage" not in chunk for chunk in chunks(call))
    assert write_stream(call, id="x1", created=7).usage_at is None
    assert chunks(script(Endpoint.CHAT, Directions(usage_zero=True), **ASKED))[-1]["usage"]["total_tokens"] == 0


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES])
def test_lines_may_end_in_crlf(endpoint: Endpoint) -> None:
    """The same events, with the other ends of lines, everywhere."""
    plain = script(endpoint, stream=True)
    odd = script(endpoint, Directions(crlf=True), stream=True)
    raw = b"".join(event.raw for event in events(odd))
    assert raw.replace(b"\r\n", b"\n") == b"".join(event.raw for event in events(plain))
    assert raw.count(b"\r\n") == raw.count(b"\n")


def test_a_stream_without_done() -> None:
    """Some servers just stop."""
    call = script(Endpoint.CHAT, Directions(no_done=True), stream=True)
    assert not any(event.data == b"[DONE]" for event in events(call))
    assert len(write_stream(call, id="x1", created=7).error) == 1


def test_an_error_inside_a_stream() -> None:
    """In a chunk's place an error object, and for responses the flat event that they have."""
    for endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS):
        error, done = write_stream(script(endpoint, stream=True), id="x1", created=7).error
        assert orjson.loads(error[6:])["error"]["type"] == "server_error"
        assert done == b"data: [DONE]\n\n"
    (error,) = write_stream(
        script(Endpoint.RESPONSES, Directions(fault="error", fault_after=2), stream=True), id="x1", created=7
    ).error
    (event,) = Splitter().feed(error)
    said = orjson.loads(event.data or b"")
    assert (event.name, said["type"], said["code"], said["sequence_number"]) == ("error", "error", "server_error", 6)


@pytest.mark.parametrize(("maximum", "status"), [(None, "completed"), (3, "incomplete")])
def test_a_response_and_its_stream(maximum: int | None, status: str) -> None:
    """All events of the lifecycle in order, numbered without a gap, each named as its type; the last is the whole."""
    call = script(Endpoint.RESPONSES, stream=True, max_output_tokens=maximum, metadata={"trace": "1"})
    read = events(call)
    said = [orjson.loads(event.data or b"") for event in read]
    assert [event.name for event in read] == [each["type"] for each in said]
    assert [each["sequence_number"] for each in said] == list(range(len(said)))
    kinds = [each["type"].removeprefix("response.") for each in said]
    deltas = ["output_text.delta"] * call.output_tokens
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", *deltas),
        *("output_text.done", "content_part.done", "output_item.done", status),
    ]
    text = "".join(each["delta"] for each in said if "delta" in each)
    assert text == call.choices[0].text == said[-4]["text"]
    assert said[-1]["response"] == whole(call)
    assert whole(call)["status"] == status
    assert whole(call)["incomplete_details"] == ({"reason": "max_output_tokens"} if maximum else None)
    assert whole(call)["usage"]["total_tokens"] == 2 + call.output_tokens


def test_where_the_usage_of_a_response_is() -> None:
    """In its last event, unless there is none."""
    stream = write_stream(script(Endpoint.RESPONSES, stream=True), id="x1", created=7)
    assert stream.usage_at == len(stream.closing) - 1
    assert write_stream(script(Endpoint.RESPONSES, Directions(no_usage=True)), id="x1", created=7).usage_at is None
