"""What the meters and endings of all surfaces have in common.

A meter measures an answer exactly, and returns the bytes that the client would have got without the proxy. A stream
that the proxy stops ends as if the upstream's own maximum had ended it there. Sources: docs/wire.md, sections 2.2 and
2.3 (usage in streams); docs/threats.md, T36 and T39 to T45.
"""

from time import perf_counter
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import LengthFinishReasonError

from proxy.formats.endpoints import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    INPUT_TOKENS,
    MESSAGES,
    MODERATIONS,
    RESPONSES,
    Endpoint,
    EndpointName,
    SurfaceName,
)
from proxy.formats.meter import JSON
from proxy.formats.request import Request
from proxy.formats.sse import Event, Splitter
from proxy.formats.surfaces import SURFACES, meter_of
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Unspent, Usage
from proxy.simulator.text import Endpoint as Simulated
from tests.formats.streams import (
    ASKED,
    COUNTED,
    DONE,
    GREETING,
    HONEST,
    MAXIMUM,
    NAMES,
    REPORTED,
    RESPONSE_USAGE,
    TEXT,
    UNASKED,
    UNCOUNTED,
    USED,
    WITH_USAGE,
    ZEROS,
    beginning,
    chunk,
    content_of,
    end_of,
    ending_of,
    event,
    generator,
    message,
    new,
    parsed,
    request,
    sdk_reading,
    simulated,
    stopped,
    usage_chunk,
    usage_of,
    watch,
    whole,
)


def test_each_surface_has_a_meter_of_its_own() -> None:
    """And no surface is missing in the table."""
    assert {*SURFACES} == {*get_args(SurfaceName)}
    assert len({surface.meter for surface in SURFACES.values()}) == len(SURFACES)


def test_the_meter_exposes_the_object_of_the_last_event() -> None:
    """The ending is built from these objects. It is None if the event has no JSON object."""
    meter = new()
    for raw, chunk_of_event in (
        (event(chunk("Hello")), chunk("Hello")),
        (b": ping\n\n", None),
        (event(usage_chunk()), usage_chunk()),
        (b"data: [1]\n\n", None),
        (event({"x": 1}), {"x": 1}),
        (DONE, None),
    ):
        meter.see_event(Splitter().feed(raw)[0])
        assert meter.chunk == chunk_of_event


@pytest.mark.parametrize(
    ("of", "begins"),
    [(UNASKED, b"data: {"), (request(COMPLETIONS), b"data: {"), (request(RESPONSES), b"event: response.")],
)
def test_the_ending_fits_the_request(of: Request, begins: bytes) -> None:
    """It has the format of the endpoint, and as many choices as were requested."""
    meter = new(of)
    assert meter.ending.at_limit(Tokens(11, 5), shows_usage=meter.shows_usage).startswith(begins)
    both = new(request(n=2)).ending.at_limit(Tokens(11, 5), shows_usage=False)
    assert both.count(b'"finish_reason":"length"') == 2
    assert [new(each).shows_usage for each in (UNASKED, ASKED)] == [False, True]


@given(pieces=st.lists(st.sampled_from([TEXT, b"\n", b"\r", b"data: ", b"{", b'"usage":', b"}", b"null", b"\xff"])))
def test_data_that_cannot_be_parsed_is_forwarded(pieces: list[bytes]) -> None:
    """Whatever comes, nothing is raised, and no stream without usage is changed (T41)."""
    stream = b"".join(pieces)
    assert watch(stream, ASKED)[1] == stream
    shown = watch(stream)[1]
    if b"usage" not in stream:
        assert shown == stream


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        (b'data: {"choices":[{"delta":{"content":"\n\n', 0),
        (b'data: {"choices":[{"delta":{"content":"abc\n\n', 3),
        (b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', 3),
        (b"data: null\n\n", 4),
        (b"data: " + b"9" * 200_000 + b"\n\n", 0),
        (b"data: -1.5\n\n", 0),
        (b'data: "Hello"\n\n', 5),
        (b'data: ["Hello"]\n\n', 5),
        (b"data: [1, 2, 3, 4, 5]\n\n", 0),
        (b"data: <html>\n\n", 6),
        (b'data: {"a":' + b"[" * 2000 + b"]" * 2000 + b"}\n\n", 0),
        (b'data: {"choices":[{"delta":{"content":"abc"},"logprobs":' + b"[" * 2000 + b"]" * 2000 + b"}]}\n\n", 3),
        (b"data: \n\n", 0),
        (b"data\n\n", 0),
        (b": OPENROUTER PROCESSING\n\n", 0),
        (b"event: ping\n\n", 0),
        (b"\n", 0),
        (b"id: 1\n\n", 0),
        (b": " + b"x" * 65_532 + b"\n\n", 0),
    ],
)
def test_events_that_are_no_chunk_are_forwarded(raw: bytes, tokens: int) -> None:
    """In the middle of a stream (T41). A client may understand data that can't be parsed here, so its text counts.

    Of data that is JSON or was to be only the texts count, of comments and events without data nothing.
    """
    meter, shown = watch(TEXT + raw + event(usage_chunk()) + DONE)
    assert shown == TEXT + raw + DONE
    assert meter.usage() == REPORTED
    meter, _ = watch(TEXT + raw)
    assert (meter.usage(), meter.output_seen) == (AtLeast(Tokens(0, 12 + tokens)), 12 + tokens)
    running = {**HONEST, "completion_tokens": 1, "total_tokens": 12}
    assert usage_of(event(chunk("a", usage=running)) + raw) == (
        AtLeast(Tokens(11, 1 + tokens)) if tokens else Exactly(Tokens(11, 1))
    )


def test_an_event_too_large_to_parse_is_forwarded() -> None:
    """It comes in large pieces without data, whose bytes count. A last piece that is small counts as nothing."""
    meter = new()
    for raw, seen in ((b"x" * 65_537, 16_385), (b"x\n", 16_385), (b"y" * 80_000, 36_385)):
        assert meter.see_event(Event(raw, None, None)) == raw
        assert meter.output_seen == seen
    assert meter.usage() == AtLeast(Tokens(0, 36_385))
    assert meter.chunk is None


def test_an_event_that_broke_off_is_not_counted() -> None:
    """A complete event that can't be parsed is counted by its bytes, but no client understands half an event."""
    meter = new()
    half = Event(raw=b'data: {"choices": [{"del', name=None, data=b'{"choices": [{"del')
    assert meter.see_event(half, is_cut=True) == half.raw
    assert meter.output_seen == 0


# ----------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "x" * 400},
        {"refusal": "x" * 400},
        {"reasoning_content": "x" * 400},
        {"reasoning": "x" * 400},
        {"thinking_blocks": [{"type": "thinking", "thinking": "x" * 400}]},
        {
            "tool_calls": [
                {"index": 0, "id": "c", "type": "function", "function": {"name": "f" * 5, "arguments": "x" * 395}}
            ]
        },
        {"function_call": {"name": "f", "arguments": "x" * 399}},
        {"audio": {"id": "a", "data": "AAAA" * 999, "transcript": "x" * 400}},
        {"content": "é" * 200},
        {"content": "😀" * 100},
    ],
)
def test_all_text_of_the_model_is_counted(delta: dict) -> None:
    """Tool calls, refusals and visible reasoning are output like any text."""
    choice = {"index": 0, "delta": {"role": "assistant", **delta}, "finish_reason": None}
    assert usage_of(event({"choices": [choice]})) == AtLeast(Tokens(0, 400))


@pytest.mark.parametrize(
    "choice",
    [
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {}, "finish_reason": "stop", "stop_reason": "</s>", "native_finish_reason": "end_turn"},
        {"delta": {}, "content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}},
        {"delta": {}, "logprobs": {"content": [{"token": "Hello", "top_logprobs": [{"token": "Hi"}]}]}},
        {"text": "", "logprobs": {"tokens": ["Hello"], "top_logprobs": [{"Hi": -1}]}},
        {"delta": {"content": None, "tool_calls": None}, "index": 17},
    ],
)
def test_other_members_of_a_choice_are_not_counted(choice: dict) -> None:
    """Filter results, reasons and logprobs would make a broken stream several times too expensive."""
    assert usage_of(event({"choices": [choice]})) == AtLeast(Tokens(0, 0))


def test_a_chunk_with_text_is_at_least_one_token() -> None:
    """Servers send a chunk for each token, even if the tokenizer counts 0 for a piece of a character."""
    meter = meter_of(UNASKED, count=lambda text: 0)
    for _ in range(50):
        meter.see_event(Splitter().feed(event(chunk("a")))[0])
    assert (meter.usage(), meter.output_seen) == (AtLeast(Tokens(0, 50)), 50)
    assert usage_of(event(chunk("a" * 400)) * 2) == AtLeast(Tokens(0, 800))
    assert usage_of(event(chunk(""))) == AtLeast(Tokens(0, 0))


def test_before_the_first_event_the_usage_is_zero() -> None:
    """The caller adds the input of a call that was sent and never answered."""
    assert usage_of(b"") == AtLeast(Tokens(0, 0))
    assert new().usage() == AtLeast(Tokens(0, 0))
    assert (new().output_seen, new().input_stated, new().uncounted_texts) == (0, None, [])


@pytest.mark.parametrize(
    "error", [{"error": {"message": "It broke. " * 40}}, {"error": "It broke. " * 40}, {"type": "error", "error": {}}]
)
@pytest.mark.parametrize("of", [UNASKED, ASKED, request(RESPONSES)])
def test_an_error_event_is_noted_and_not_counted_as_output(error: dict, of: Request) -> None:
    """It may come in an answer with status 200; its message is no text of the model (T44)."""
    meter, shown = watch(event(error) + DONE, of)
    assert meter.has_error
    assert shown == event(error) + DONE
    assert meter.usage() == AtLeast(Tokens(0, 0))


def test_text_before_an_error_is_counted() -> None:
    """So is text in the same chunk; and a usage in the same chunk is charged."""
    with_error = event(chunk("Hello!", finish="error", error={"message": "It broke."}))
    assert usage_of(with_error + with_error + DONE) == COUNTED
    assert usage_of(TEXT + event({"error": {"message": "It broke."}, "choices": [], "usage": HONEST})) == REPORTED
    assert not watch(event(chunk("Hello", error=None)))[0].has_error


def test_an_error_stays_noted() -> None:
    """vLLM sends [DONE] after it, others send more chunks."""
    assert watch(event({"error": {}}) + TEXT + event(usage_chunk()) + DONE)[0].has_error


# ------------------------------------------------------------------------------------------------------ whole answers


ITEM = {"type": "message", "status": "completed", "role": "assistant", "content": [{"text": "Hello world"}]}
TOKENS = {"content": [{"token": "Hello", "top_logprobs": [{"token": "Hi"}]}]}


@pytest.mark.parametrize(
    ("endpoint", "answer", "texts"),
    [
        (CHAT, {"choices": [message("Hello world")]}, ["Hello world"]),
        (CHAT, {"choices": [message("Hello world")], "error": None}, ["Hello world"]),
        (CHAT, {"choices": [message("x" * 40)] * 3}, ["x" * 40] * 3),
        (CHAT, {"choices": [message("a", members={"refusal": "b" * 8}, logprobs=TOKENS)]}, ["a", "b" * 8]),
        (COMPLETIONS, {"choices": [{"text": "Hello world"}]}, ["Hello world"]),
        (RESPONSES, {"output": [ITEM]}, ["Hello world"]),
        (RESPONSES, {"output": [ITEM], "usage": None}, ["Hello world"]),
        (EMBEDDINGS, {"data": [{"embedding": "AAAA" * 99}]}, []),
        (EMBEDDINGS, {"choices": [{"text": "Hello world"}]}, []),
        (CHAT, {}, []),
    ],
)
def test_a_whole_answer_without_usage_keeps_its_texts(endpoint: Endpoint, answer: dict, texts: list[str]) -> None:
    """The caller counts them, because that may take long. They are not included in the usage."""
    meter = whole(answer, endpoint)
    assert (meter.usage(), meter.uncounted_texts) == (UNCOUNTED, texts)
    assert meter.is_at_end
    assert not meter.has_error


@pytest.mark.parametrize(
    ("endpoint", "answer", "expected"),
    [
        (CHAT, {"choices": [message("Hello world")], "usage": HONEST}, REPORTED),
        (RESPONSES, {"output": [ITEM], "usage": RESPONSE_USAGE}, REPORTED),
        (RESPONSES, {"status": "incomplete", "output": [], "usage": RESPONSE_USAGE}, REPORTED),
        (EMBEDDINGS, {"data": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, Exactly(Tokens(9, 0))),
        (EMBEDDINGS, {"data": [], "usage": {"total_tokens": 9}}, Exactly(Tokens(9, 0))),
    ],
)
def test_a_whole_answer_is_charged_its_usage(endpoint: Endpoint, answer: dict, expected: Usage) -> None:
    """The usage is exact, and there is no text left to count."""
    meter = whole(answer, endpoint)
    assert (meter.usage(), meter.uncounted_texts) == (expected, [])
    assert isinstance(meter.usage(), Exactly)
    assert meter.is_at_end
    assert not meter.has_error


def test_a_usage_of_zeros_without_text_is_an_empty_answer_to_a_prompt() -> None:
    """The output of 0 counts. The caller counts the input, which no call lacks."""
    meter = whole({"choices": [{"text": ""}], "usage": ZEROS}, COMPLETIONS)
    assert (meter.usage(), meter.input_stated, meter.uncounted_texts) == (UNCOUNTED, None, [])


def test_an_error_in_a_whole_answer_is_noted() -> None:
    """The status is 200. The message of the error costs nothing, text that was generated before it does (T44)."""
    error = {"error": {"message": "It broke. " * 40, "code": 500}}
    assert whole(error).has_error
    assert (whole(error).usage(), whole(error).uncounted_texts) == (UNCOUNTED, [])
    assert whole({**error, "choices": [{"message": {"content": "Hello world"}}]}).uncounted_texts == ["Hello world"]
    assert whole({**error, "usage": HONEST}).usage() == REPORTED
    failed = {"status": "failed", "output": [], "usage": RESPONSE_USAGE, **error}
    assert whole(failed, RESPONSES).usage() == REPORTED


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        (b"x" * 400, ["x" * 400]),
        (b"\xff" * 400, ["\ufffd" * 400]),
        (b"<p>Hello", ["<p>Hello"]),
        (b"- Hello", ["- Hello"]),
        (b'"' + b"x" * 398 + b'"', ["x" * 398]),
        (b'"Hello', ['"Hello']),
        (b"[" * 400, []),
        (b"7" * 200_000, []),
        (b"-1.5", []),
        (b"[1, 2]", []),
        (b'[{"content": "Hello", "id": "c"}]', ["Hello"]),
        (b'["Hello", "you"', ["Hello", "you"]),
        (b"", [""]),
    ],
)
def test_of_a_body_that_is_no_object_the_text_is_counted(body: bytes, texts: list[str]) -> None:
    """It was generated, although it is no valid answer. JSON is no text. Embeddings generate nothing."""
    meter = whole(body)
    assert (meter.usage(), meter.uncounted_texts) == (UNCOUNTED, texts)
    assert (whole(body, EMBEDDINGS).usage(), whole(body, EMBEDDINGS).uncounted_texts) == (UNCOUNTED, [])
    assert meter.has_error


BROKEN = '{"id":"c-1","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"content":"Hello %s"'


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        (BROKEN % "you", ["Hello you"]),
        (BROKEN % "you" + ',"tool_calls":[{"id":"t","function":{"name":"f","arguments":"{}"}', ["Hello you", "{}"]),
        (BROKEN % r"\u00e9\n\"text\": \"x" + ",,}", ['Hello é\n"text": "x']),
        (BROKEN[:-1] + "you", ["Hello %syou"]),
        (BROKEN[:-1] + "you\\", ["Hello %syou"]),
        (BROKEN % "you" + '}}],"usage":{"prompt_tokens":11', ["Hello you"]),
        ("\n" * 400 + BROKEN % "you", ["Hello you"]),
        ("\ufeff \n" + BROKEN % "you", ["Hello you"]),
        ('{"choices":[{"message":{"content":[{"type":"text","text":"a"},{"type":"text","text" : "b"}', ["a", "b"]),
        ('{"choices":[{"message":{"content":["a","b"]},{"role":"assistant"', ["a", "b"]),
        ('{"choices":[{"message":{"content":null,"reasoning_content":"a"', ["a"]),
        ('{"output":[{"type":"message","content":[{"type":"output_text","text":"a","annotations":[', ["a"]),
        ('{"response":"a","done":false}\n{"response":"b","done":true}\n', ["a", "b"]),
        ('[{"generated_text":"a"', ["a"]),
        ('{"type":"completion","completion":"a"', ["a"]),
        ('{"error":{"message":"It broke."', []),
        ('{"data":[{"b64_json":"' + "A" * 400, []),
        ("{" * 400, []),
    ],
)
def test_of_broken_json_only_the_texts_are_counted(body: str, texts: list[str]) -> None:
    """Of a whole answer, and of an event of a stream: never names, numbers and braces."""
    meter = whole(body.encode())
    assert (meter.usage(), meter.uncounted_texts, meter.has_error) == (UNCOUNTED, texts, True)
    if "\n" not in body:
        counted = max(1, len("".join(texts).encode())) if texts else 0
        assert usage_of(b"data: " + body.encode() + b"\n\n") == AtLeast(Tokens(0, counted))


def test_a_number_of_many_digits_does_not_make_an_answer_unreadable() -> None:
    """Python's parser refuses it. The rest of the answer is read as ever, and the number is no count."""
    long = b"9" * 200_000
    answer = b'{"choices":[{"message":{"content":"Hello"}}],"created":%b,"usage":{"prompt_tokens":%b,"n":1}}'
    meter = whole(answer % (long, long))
    assert (meter.usage(), meter.uncounted_texts, meter.has_error) == (UNCOUNTED, ["Hello"], False)
    assert whole(answer.replace(b',"n":1', b',"completion_tokens":5') % (long, b"11")).usage() == REPORTED
    text = b'data: {"choices":[{"delta":{"content":"Hello"}}],"created":' + long + b"}\n\n"
    assert usage_of(text) == AtLeast(Tokens(0, 5))


@pytest.mark.parametrize("usage", ["16", 16, [11, 5], True, None])
@pytest.mark.parametrize(
    ("endpoint", "answer"),
    [
        (CHAT, {"choices": [message("Hello")]}),
        (RESPONSES, {"output": [{"type": "message", "content": [{"text": "Hello"}]}]}),
        (MESSAGES, {"content": [{"type": "text", "text": "Hello"}]}),
    ],
)
def test_an_answer_whose_usage_is_no_object_is_counted(endpoint: Endpoint, answer: dict, usage: object) -> None:
    """On every surface, and only its texts."""
    meter = whole({"id": "x" * 99, **answer, "usage": usage}, endpoint)
    assert (meter.usage(), meter.uncounted_texts) == (UNCOUNTED, ["Hello"])


@pytest.mark.parametrize(
    "body",
    [
        b'{"text":"' + b'\\"' * 4_000_000,
        b'{"text":"' + b"\\" * 8_000_001,
        b'{"text":' + b'"a",' * 2_000_000,
        b'{"text":"a"' + b" " * 8_000_000,
        b'{"text" ' * 1_000_000,
        b'{"n":' + b"9" * 8_000_000,
        b"{" * 8_000_000,
        b"[1," * 2_500_000,
    ],
    ids=["escaped quotes", "backslashes", "strings", "blanks", "names", "digits", "braces", "numbers"],
)
def test_broken_json_takes_linear_time(body: bytes) -> None:
    """Eight megabytes take less than three seconds; what is quadratic would take hours."""
    start = perf_counter()
    whole(body)
    assert perf_counter() - start < 3


def test_a_stream_in_answer_to_a_request_without_stream_is_measured() -> None:
    """The format of the answer decides. The proxy did not ask for usage, so nothing is removed."""
    null = event(chunk("Hello", usage=None))
    meter, shown = watch(null + event(usage_chunk()) + DONE, request(stream=False))
    assert (meter.usage(), shown) == (REPORTED, null + event(usage_chunk()) + DONE)


def test_a_moderation_costs_a_request_and_a_token_count_costs_nothing() -> None:
    """Whatever the answer is, and even if it does not arrive."""
    for body in ({"results": []}, {"usage": RESPONSE_USAGE}, b"no JSON"):
        assert whole(body, MODERATIONS).usage() == Unspent(requests=1)
        assert whole(body, INPUT_TOKENS).usage() == Unspent()
    assert new(request(MODERATIONS)).usage() == Unspent(requests=1)
    assert whole(b"no JSON", MODERATIONS).has_error


def test_a_token_count_stores_no_response() -> None:
    """Whatever id the answer or an event states, the client does not own a response of that name."""
    answer = {"id": "resp_1", "object": "response.input_tokens", "input_tokens": 11}
    stream = event({"type": "response.completed", "response": answer})
    assert whole(answer, RESPONSES).response_id == "resp_1"
    assert whole(answer, INPUT_TOKENS).response_id is None
    assert watch(stream, request(INPUT_TOKENS))[0].response_id is None


def test_an_error_event_in_the_answer_to_a_moderation_is_an_error() -> None:
    assert watch(event({"type": "error", "message": "The server had an error."}), request(MODERATIONS))[0].has_error


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, RESPONSES], ids=lambda endpoint: endpoint.name)
def test_the_text_of_an_answer_in_the_shape_of_the_other_api_is_counted(endpoint: Endpoint) -> None:
    """The client got the text, so it costs; a gateway may answer /responses in chat's shape, or the reverse."""
    for answer in (
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": "One two"}}]},
        {"output": [{"type": "message", "content": [{"type": "output_text", "text": "One two"}]}]},
    ):
        assert "One two" in whole(answer, endpoint).uncounted_texts


# -------------------------------------------------------------------------- answers in the shape of another surface

DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}}
OTHER_EVENTS: dict[str, dict[str, Any]] = {
    "chat": {**chunk("Hello"), "system_fingerprint": "fp_1"},
    "responses": {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "Hello", "obfuscation": "xyz"},
    "responses, an object": {"type": "response.output_text.delta", "delta": {"text": "Hello"}},
    "responses, an item": {"type": "response.output_item.added", "item": {"id": "m", "content": [{"text": "Hello"}]}},
    "responses, a part": {"type": "response.content_part.added", "part": {"type": "output_text", "text": "Hello"}},
    "messages": DELTA,
    "ollama": {"model": "llama3", "created_at": "2025-01-01T00:00:00Z", "response": "Hello", "done": False},
    "ollama chat": {"model": "llama3", "message": {"role": "assistant", "content": "Hello"}, "done": False},
    "gemini": {
        "candidates": [{"content": {"parts": [{"text": "Hello"}], "role": "model"}, "finishReason": "STOP"}],
        "usageMetadata": {"promptTokensDetails": [{"modality": "TEXT", "tokenCount": 9}]},
        "modelVersion": "gemini-2.5-pro",
        "responseId": "r1",
    },
    "cohere": {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": "Hello"}}}},
    "tgi": {"index": 1, "token": {"id": 1, "text": "Hello", "special": False}, "generated_text": None},
    "anthropic, old": {"type": "completion", "completion": "Hello", "stop_reason": None, "model": "claude-2"},
    "no type": {"delta": "Hello", "item_id": "msg_1", "output_index": 0},
}


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES], ids=lambda endpoint: endpoint.name)
@pytest.mark.parametrize("shape", OTHER_EVENTS)
def test_the_text_of_a_stream_in_any_shape_is_counted(shape: str, endpoint: Endpoint) -> None:
    """A gateway passes on what its upstream writes. The text is counted as it passes, and so ends at the limit."""
    meter, shown = watch(event(OTHER_EVENTS[shape]) * 3, request(endpoint))
    assert (meter.output_seen, shown) == (15, event(OTHER_EVENTS[shape]) * 3)


def test_an_event_without_a_type_is_what_its_name_says() -> None:
    """SDKs go by the name. A text that is repeated as a whole is not counted again."""
    named = b"event: response.output_text.%b\ndata: {%b}\n\n"
    stream = named % (b"delta", b'"delta":"Hello"') + named % (b"done", b'"text":"Hello"')
    assert usage_of(stream, request(RESPONSES)) == AtLeast(Tokens(0, 5))
    stream = b'event: content_block_delta\ndata: {"index":0,"delta":{"text":"Hello"}}\n\n'
    assert usage_of(stream, request(MESSAGES)) == AtLeast(Tokens(0, 5))


REQUESTED = {
    "id": "resp_1",
    "object": "response",
    "instructions": "Be brief.",
    "tools": [{"type": "function", "name": "f", "description": "Finds it."}],
    "metadata": {"team": "blue"},
    "output": [],
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
}


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES], ids=lambda endpoint: endpoint.name)
@pytest.mark.parametrize(
    "other",
    [
        {"type": "ping"},
        {"type": "keepalive", "sequence_number": 7},
        {"type": "response.created", "response": REQUESTED},
        {"type": "response.in_progress", "response": REQUESTED},
        {"response": REQUESTED},
        {
            "type": "response.output_text.annotation.added",
            "annotation": {"title": "A title", "url": "https://x.test"},
        },
        {"type": "response.output_item.added", "item": {"type": "function_call", "name": "f", "arguments": ""}},
        {"type": "response.output_item.added", "item": {"type": "reasoning", "encrypted_content": "A" * 400}},
        {"type": "response.image_generation_call.partial_image", "partial_image_b64": "A" * 400},
        {"type": "message_start", "message": {"id": "m", "model": "x", "role": "assistant", "content": []}},
        {"type": "message_delta", "delta": {"stop_reason": "stop_sequence", "stop_sequence": "END"}},
        {"id": "", "object": "", "model": "", "choices": [], "prompt_filter_results": [{"severity": "safe"}]},
        {"id": "gen-1", "provider": "DeepInfra", "model": "m", "object": "chat.completion.chunk", "choices": []},
        {"id": "c", "choices": [], "usage": HONEST, "note": "free text"},
        {"id": "c", "choices": [], "citations": ["https://x.test"], "obfuscation": "xyz", "timings": {"n": 1}},
        {
            "done": True,
            "done_reason": "stop",
            "response": "",
            "context": [1, 2],
            "created_at": "2025-01-01T00:00:00Z",
        },
        {"object": "error", "message": "It broke."},
        {"message": "It broke.", "code": 500},
        {"type": "overloaded_error", "text": "Try again."},
    ],
    ids=repr,
)
def test_an_event_without_text_of_the_model_is_not_counted(other: dict, endpoint: Endpoint) -> None:
    """What it says of the request, the server or the usage is no output."""
    assert watch(event(other), request(endpoint))[0].output_seen == (5 if "usage" in other else 0)


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES], ids=lambda endpoint: endpoint.name)
@pytest.mark.parametrize(
    "answer",
    [
        {"id": "c", "object": "chat.completion", "model": "m", "choices": [message("Hello")]},
        {"id": "msg_1", "type": "message", "model": "m", "content": [{"type": "text", "text": "Hello"}]},
        {**REQUESTED, "output": [{"type": "message", "content": [{"type": "output_text", "text": "Hello"}]}]},
        {**REQUESTED, "output_text": "Hello"},
        OTHER_EVENTS["ollama"],
        OTHER_EVENTS["ollama chat"],
        OTHER_EVENTS["gemini"],
        {"id": "1", "finish_reason": "COMPLETE", "message": {"role": "assistant", "content": [{"text": "Hello"}]}},
    ],
)
def test_the_text_of_a_whole_answer_in_any_shape_is_kept(answer: dict, endpoint: Endpoint) -> None:
    """If it states no usage, the caller counts it."""
    assert whole(answer, endpoint).uncounted_texts == ["Hello"]
    assert whole(REQUESTED, endpoint).uncounted_texts == []


def test_a_response_that_repeats_its_text_on_another_surface_is_counted_once() -> None:
    """Its last events have the text again, as a whole."""
    end = {"type": "response.completed", "response": {**REQUESTED, "output": [{"content": [{"text": "Hello"}]}]}}
    done = {"type": "response.output_text.done", "text": "Hello"}
    stream = event(OTHER_EVENTS["responses"]) + event(done) + event(end)
    assert usage_of(stream) == usage_of(stream, request(MESSAGES)) == AtLeast(Tokens(0, 5))


# ------------------------------------------------------------------------------------------- streams that are stopped


def comparable(chunk: JSON) -> JSON:
    """The chunk without the two differences to the upstream's end: details of usage, and the requested maximum."""
    chunk.get("response", {}).pop("max_output_tokens", None)
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        (chunk.get("usage") or {}).pop(name, None)
    return chunk


@pytest.mark.parametrize("words", [1, 5])
@pytest.mark.parametrize("usage", [{}, WITH_USAGE], ids=["no usage", "usage"])
@pytest.mark.parametrize(
    ("endpoint", "choices"),
    [(endpoint, n) for endpoint in NAMES for n in (1, 3) if (endpoint, n) != (Simulated.RESPONSES, 3)],
)
def test_the_end_equals_that_of_the_upstream_at_its_maximum(
    endpoint: Simulated, choices: int, usage: JSON, words: int
) -> None:
    """Chunk by chunk, for each endpoint and number of choices, with and without usage."""
    fields = {**usage, **({"n": choices} if choices > 1 else {})}
    maximum: Any = {MAXIMUM[endpoint]: words}
    theirs = simulated(endpoint, **fields, **maximum)
    passed = parsed(beginning(simulated(endpoint, **fields), words * choices))
    answer = generator(0).answer(endpoint, {"model": "m", endpoint.input_field: content_of(endpoint), **fields})
    used = Tokens(answer.input_tokens, words * choices)
    ours = end_of(NAMES[endpoint], passed, choices=choices, shows_usage=bool(usage), used=used)
    assert [comparable(chunk) for chunk in ours] == [comparable(chunk) for chunk in parsed(b"".join(theirs.closing))]


@pytest.mark.parametrize("endpoint", list(NAMES.values()))
def test_the_end_uses_the_line_ends_of_the_stream(endpoint: EndpointName) -> None:
    """With CRLF all lines differ only in their ends. `[DONE]` has its exact form; /responses has none."""
    ending = ending_of(endpoint, [chunk()])
    lf_end = ending.at_limit(USED, shows_usage=True)
    crlf_end = ending.at_limit(USED, shows_usage=True, newline=b"\r\n")
    assert crlf_end.replace(b"\r\n", b"\n") == lf_end
    assert crlf_end.count(b"\r\n") == crlf_end.count(b"\n") > 4
    assert lf_end.endswith(b"\n\ndata: [DONE]\n\n") == (endpoint != "responses")
    assert lf_end.count(b"[DONE]") == (endpoint != "responses")


async def test_the_helpers_of_the_sdk_raise_as_at_the_upstreams_own_maximum() -> None:
    """They return no final object of an answer that was cut; the error is the same, word for word."""
    errors = []
    for endpoint in (Simulated.CHAT, Simulated.RESPONSES):
        maximum: Any = {MAXIMUM[endpoint]: 5}
        theirs = beginning(simulated(endpoint, **maximum), 5, closing=9)
        ours = stopped(endpoint, beginning(simulated(endpoint), 5))
        for body in (theirs, ours):
            with pytest.raises((LengthFinishReasonError, RuntimeError)) as raised:
                await _final(endpoint, body)
            errors.append((type(raised.value), str(raised.value)))
    assert errors[0] == errors[1]
    assert errors[2] == errors[3] == (RuntimeError, "Didn't receive a `response.completed` event.")


async def _final(endpoint: Simulated, body: bytes) -> None:
    async with sdk_reading(body) as sdk:
        if endpoint is Simulated.CHAT:
            async with sdk.chat.completions.stream(model="m", messages=GREETING) as chat:
                await chat.get_final_completion()
        else:
            async with sdk.responses.stream(model="m", input="x") as response:
                await response.get_final_response()


@pytest.mark.parametrize(
    ("stream", "both"),
    [
        (TEXT + event(usage_chunk()), (12, 5)),
        (TEXT, None),
        (event(usage_chunk()), None),
        (TEXT + event(usage_chunk({**HONEST, "completion_tokens_details": {"reasoning_tokens": 2}})), None),
    ],
    ids=["both", "only counted", "only stated", "reasoning"],
)
def test_the_two_counts_of_an_output_can_be_compared(stream: bytes, both: tuple[int, int] | None) -> None:
    """If both are known, and of the same text: reasoning may be stated that was not shown."""
    assert watch(stream, ASKED)[0].counted_and_stated == both


# ------------------------------------------------------------------------------------------------------ late counting


def test_the_texts_of_an_answer_that_states_its_usage_are_not_counted() -> None:
    """Their length is a bound until the usage comes, and then nobody needs their number."""
    counted: list[str] = []
    meter = meter_of(UNASKED, count=lambda text: counted.append(text) or 1, kind="openai")
    for each in Splitter().feed(TEXT):
        meter.see_event(each)
    assert meter.output_at_most == 12
    for each in Splitter().feed(event(chunk(finish="stop")) + event(usage_chunk()) + DONE):
        meter.see_event(each)
    assert (meter.usage(), meter.output_at_most) == (REPORTED, 5 + 12)
    assert counted == []
    assert meter.counted_and_stated == (2, 5)  # which counts them after all
    assert counted == ["Hello", " world!"]


def test_long_texts_are_not_kept() -> None:
    """Whatever the usage at the end: a stream may be longer than the memory."""
    counted: list[str] = []
    meter = meter_of(UNASKED, count=lambda text: counted.append(text) or 1, kind="openai")
    for each in Splitter().feed(event(chunk("x" * 1000)) * 20):
        meter.see_event(each)
    assert len(counted) == 17
    assert (meter.output_at_most, meter.output_seen) == (17 + 3000, 20)


def test_many_texts_are_not_kept() -> None:
    """However short they are: they are counted without a pause, and other streams wait meanwhile."""
    counted: list[str] = []
    meter = meter_of(UNASKED, count=lambda text: counted.append(text) or 1, kind="openai")
    for each in Splitter().feed(event(chunk("x")) * 1030):
        meter.see_event(each)
    assert len(counted) == 1025
    assert (meter.output_at_most, meter.output_seen) == (1030, 1030)


@given(
    steps=st.lists(
        st.tuples(
            st.text("xé", max_size=9)
            | st.tuples(st.integers(0, 9), st.integers(0, 30)).filter(any)
            | st.just((0, 0)),
            st.booleans(),
        ),
        max_size=12,
    ),
    adds=st.booleans(),
)
def test_when_texts_are_counted_makes_no_difference(steps: list[tuple[Any, bool]], adds: bool) -> None:
    """Neither to the usage nor to what was seen, also if a usage comes between texts, falls or is zero."""
    late, early, sometimes = (meter_of(UNASKED, count=lambda text: len(text) // 3, kind="openai") for _ in range(3))
    for step, is_read in steps:
        if isinstance(step, str):
            data = chunk(step)
        else:
            usage = {"prompt_tokens": step[0], "completion_tokens": step[1], "total_tokens": sum(step)}
            data = {**chunk(""), "usage": usage} if adds else {"id": "c-1", "choices": [], "usage": usage}
        for meter in (late, early, sometimes):
            meter.see_event(Splitter().feed(event(data))[0])
        assert late.output_at_most >= early.output_seen
        assert not is_read or sometimes.output_seen == early.output_seen
    assert late.output_at_most >= early.output_seen
    assert late.usage() == early.usage() == sometimes.usage()
    assert late.output_seen == early.output_seen == sometimes.output_seen
