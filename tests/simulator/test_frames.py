"""Answers are written in OpenAI's formats, and streams and whole answers agree."""

import base64
import struct
from functools import cache
from typing import Any

import orjson
import pytest

from proxy.formats.sse import Event, Splitter
from proxy.simulator.directives import Directives
from proxy.simulator.frames import EventStream, write_stream, write_whole
from proxy.simulator.text import Answer, Endpoint, Generator

generator = cache(Generator)


def generated(endpoint: Endpoint, directives: Directives | None = None, **params: Any) -> Answer:
    """The answer to a call with this input and these parameters."""
    content = [{"role": "user", "content": "hello there"}] if endpoint is Endpoint.CHAT else "hello there"
    call = {"model": "m", endpoint.input_field: content, **params}
    return generator(0).answer(endpoint, call, directives or Directives())


def whole(answer: Answer) -> dict[str, Any]:
    """Write the whole answer and parse it."""
    body: dict[str, Any] = orjson.loads(write_whole(answer, id="x1", created=7))
    return body


def pieces(stream: EventStream) -> list[bytes]:
    """All events of a stream."""
    return [*stream.opening, *stream.text, *stream.closing]


def events(answer: Answer) -> list[Event]:
    """Write the stream and parse it; each piece must be one event."""
    splitter = Splitter()
    read = []
    for piece in pieces(write_stream(answer, id="x1", created=7)):
        (event,) = splitter.feed(piece)
        read.append(event)
    assert splitter.end() == b""
    return read


def chunks(answer: Answer) -> list[dict[str, Any]]:
    """The chunks of a stream, without [DONE]."""
    *read, done = events(answer)
    assert done.data == b"[DONE]"
    return [orjson.loads(event.data or b"") for event in read]


WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (Endpoint.CHAT, {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}),
        (Endpoint.COMPLETIONS, {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}),
    ],
)
def test_usage_of_a_whole_answer(endpoint: Endpoint, expected: dict[str, int]) -> None:
    """It reports the answer's tokens, with details that say that none are cached or reasoning tokens."""
    body = whole(generated(endpoint, max_tokens=4))
    assert {key: body["usage"][key] for key in expected} == expected
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    assert body["choices"][0]["finish_reason"] == "length"
    assert (body["id"], body["created"], body["model"]) == ("x1", 7, "m")


def test_no_usage_and_zero_usage() -> None:
    """Some servers report no usage and some report zeros; the two differ."""
    for endpoint in set(Endpoint) - {Endpoint.MESSAGES}:
        assert not whole(generated(endpoint, Directives(no_usage=True))).get("usage")
        assert whole(generated(endpoint, Directives(usage_zero=True)))["usage"]["total_tokens"] == 0


TOOL = {"name": "look_up", "parameters": {"type": "object", "properties": {"term": {}, "language": {}}}}
CALLING = Directives(tool=True, tokens=3)


@pytest.mark.parametrize(("maximum", "reason"), [(9, "tool_calls"), (2, "length")])
def test_a_chat_calls_the_first_tool(maximum: int, reason: str) -> None:
    """Each choice calls it with its words, streamed or whole, and its words are its output tokens."""
    tools = [{"type": "function", "function": TOOL}, {"type": "function", "function": {"name": "other"}}]
    params = {"tools": tools, "n": 2, "max_tokens": maximum}
    called = generated(Endpoint.CHAT, CALLING, **params)
    body = whole(called)
    assert body["usage"]["completion_tokens"] == 2 * min(3, maximum)
    streamed = chunks(generated(Endpoint.CHAT, CALLING, **params, **WITH_USAGE))
    assert streamed[-1]["usage"] == body["usage"]
    for choice, words in zip(body["choices"], called.choices, strict=True):
        mine = [each for chunk in streamed for each in chunk["choices"] if each["index"] == choice["index"]]
        deltas = [call for each in mine for call in each["delta"].get("tool_calls", [])]
        [call] = choice["message"]["tool_calls"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, reason)
        assert mine[-1]["finish_reason"] == reason
        assert orjson.loads(call["function"]["arguments"]) == {"term": words.text}
        assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
        assert (deltas[0]["id"], deltas[0]["function"]["name"]) == (call["id"], "look_up")


def test_a_response_calls_the_first_tool() -> None:
    """The call is an output item, the same streamed and whole; the events are numbered without a gap."""
    tools = [{"type": "function", **TOOL}]
    body = whole(generated(Endpoint.RESPONSES, CALLING, tools=tools))
    [item] = body["output"]
    assert (item["type"], item["name"], list(orjson.loads(item["arguments"]))) == (
        "function_call",
        "look_up",
        ["term"],
    )
    read = [orjson.loads(event.data or b"") for event in events(generated(Endpoint.RESPONSES, CALLING, tools=tools))]
    assert [event["sequence_number"] for event in read] == list(range(len(read)))
    assert "".join(event["delta"] for event in read if event["type"].endswith(".delta")) == item["arguments"]
    assert [event["item"] for event in read if event["type"] == "response.output_item.done"] == [item]
    assert read[-1]["response"] == body


def test_a_request_without_tools_gets_text() -> None:
    """The directive `tool` changes nothing then."""
    for endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES):
        assert whole(generated(endpoint, CALLING)) == whole(generated(endpoint, Directives(tokens=3)))


def test_both_encodings_of_a_vector_agree() -> None:
    """The SDK requests base64 and returns floats."""
    as_floats = whole(generated(Endpoint.EMBEDDINGS, dimensions=16))["data"][0]["embedding"]
    as_base64 = whole(generated(Endpoint.EMBEDDINGS, dimensions=16, encoding_format="base64"))["data"][0]["embedding"]
    assert list(struct.unpack("<16f", base64.b64decode(as_base64))) == as_floats


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_stream_has_the_content_of_the_whole_answer(endpoint: Endpoint, choices: int) -> None:
    """One chunk for each word, for every choice, and its finish reason."""
    call = generated(endpoint, n=choices, stream=True)
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


def test_a_chat_stream_begins_with_the_role() -> None:
    """The first chunk of each choice has the role and no text."""
    first, second, *_ = chunks(generated(Endpoint.CHAT, n=2, stream=True))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [first["choices"][0]["index"], second["choices"][0]["index"]] == [0, 1]


def test_a_model_name_with_the_placeholder_does_not_break_a_chunk() -> None:
    """The word replaces the placeholder of the text, whatever the request's own strings contain."""
    model = 'a"\0b\\u0000'
    read = chunks(generated(Endpoint.CHAT, model=model, stream=True, max_tokens=3))
    assert {chunk["model"] for chunk in read} == {model}


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
def test_a_stream_reports_usage_last_and_only_if_requested(endpoint: Endpoint) -> None:
    """In one more chunk, without choices, before [DONE]; the others say null.

    If usage is not requested, no chunk has the field.
    """
    stream = write_stream(generated(endpoint, **WITH_USAGE, max_tokens=4), id="x1", created=7)
    *others, last = chunks(generated(endpoint, **WITH_USAGE, max_tokens=4))
    assert [chunk["usage"] for chunk in others] == [None] * len(others)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    assert stream.usage_at is not None
    assert b'"completion_tokens":4' in stream.closing[stream.usage_at]
    assert all("usage" not in chunk for chunk in chunks(generated(endpoint, stream=True)))
    assert write_stream(generated(endpoint, stream=True), id="x1", created=7).usage_at is None


def test_early_usage() -> None:
    """On the last chunk that has a choice, whether or not it was requested, and none after it."""
    for params in ({"stream": True}, WITH_USAGE):
        call = generated(Endpoint.CHAT, Directives(usage_early=True), **params, n=2, max_tokens=4)
        *others, last = chunks(call)
        assert last["usage"]["completion_tokens"] == 8
        assert last["choices"][0]["finish_reason"] == "length"
        assert not any(chunk.get("usage") for chunk in others)
        stream = write_stream(call, id="x1", created=7)
        assert stream.usage_at is not None
        assert b'"completion_tokens":8' in stream.closing[stream.usage_at]


def test_a_stream_without_usage_and_one_with_usage_of_zero() -> None:
    """A server that doesn't know `include_usage` doesn't send null either."""
    call = generated(Endpoint.CHAT, Directives(no_usage=True), **WITH_USAGE)
    assert all("usage" not in chunk for chunk in chunks(call))
    assert write_stream(call, id="x1", created=7).usage_at is None
    assert (
        chunks(generated(Endpoint.CHAT, Directives(usage_zero=True), **WITH_USAGE))[-1]["usage"]["total_tokens"] == 0
    )


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES])
def test_lines_may_end_in_crlf(endpoint: Endpoint) -> None:
    """The same events, with CRLF at the end of every line."""
    plain = generated(endpoint, stream=True)
    odd = generated(endpoint, Directives(crlf=True), stream=True)
    raw = b"".join(event.raw for event in events(odd))
    assert raw.replace(b"\r\n", b"\n") == b"".join(event.raw for event in events(plain))
    assert raw.count(b"\r\n") == raw.count(b"\n")


def test_a_stream_without_done() -> None:
    """Some servers end a stream without it."""
    call = generated(Endpoint.CHAT, Directives(no_done=True), stream=True)
    assert not any(event.data == b"[DONE]" for event in events(call))
    assert len(write_stream(call, id="x1", created=7).error) == 1


def test_an_error_inside_a_stream() -> None:
    """An error object in place of a chunk; for responses an `error` event with flat fields."""
    for endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS):
        error, done = write_stream(generated(endpoint, stream=True), id="x1", created=7).error
        assert orjson.loads(error[6:])["error"]["type"] == "server_error"
        assert done == b"data: [DONE]\n\n"
    (error,) = write_stream(
        generated(Endpoint.RESPONSES, Directives(fault="error", fault_after=2), stream=True), id="x1", created=7
    ).error
    (event,) = Splitter().feed(error)
    data = orjson.loads(event.data or b"")
    assert (event.name, data["type"], data["code"], data["sequence_number"]) == ("error", "error", "server_error", 6)


@pytest.mark.parametrize(("maximum", "status"), [(None, "completed"), (3, "incomplete")])
def test_a_response_and_its_stream(maximum: int | None, status: str) -> None:
    """All lifecycle events in order, numbered without a gap, each named as its type; the last has the response."""
    call = generated(Endpoint.RESPONSES, stream=True, max_output_tokens=maximum, metadata={"trace": "1"})
    read = events(call)
    data = [orjson.loads(event.data or b"") for event in read]
    assert [event.name for event in read] == [each["type"] for each in data]
    assert [each["sequence_number"] for each in data] == list(range(len(data)))
    kinds = [each["type"].removeprefix("response.") for each in data]
    deltas = ["output_text.delta"] * call.output_tokens
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", *deltas),
        *("output_text.done", "content_part.done", "output_item.done", status),
    ]
    text = "".join(each["delta"] for each in data if "delta" in each)
    assert text == call.choices[0].text == data[-4]["text"]
    assert data[-1]["response"] == whole(call)
    assert whole(call)["status"] == status
    assert whole(call)["incomplete_details"] == ({"reason": "max_output_tokens"} if maximum else None)
    assert whole(call)["usage"]["total_tokens"] == 2 + call.output_tokens


def test_the_last_event_of_a_response_reports_the_usage() -> None:
    """Unless usage is turned off."""
    stream = write_stream(generated(Endpoint.RESPONSES, stream=True), id="x1", created=7)
    assert stream.usage_at == len(stream.closing) - 1
    assert write_stream(generated(Endpoint.RESPONSES, Directives(no_usage=True)), id="x1", created=7).usage_at is None
