"""A stream that the proxy stops ends as if the upstream's own maximum had ended it there.

The end is tested in three ways: it is compared with what the simulated upstream writes at its maximum, it is checked
after each event of a response, and the official SDK reads the beginning of an answer followed by the proxy's end from
a real socket. Sources: docs/wire.md, sections 2.2 (usage in streams) and 2.4 (events of /responses).
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI, LengthFinishReasonError
from openai.lib.streaming.chat import AsyncChatCompletionStream
from openai.types.chat import ChatCompletion

from proxy.formats.ending import RESPONSE_ENDS, Ending
from proxy.formats.endpoints import EndpointName
from proxy.formats.sse import Splitter
from proxy.policy.amounts import Tokens
from proxy.simulator.directives import Directives
from proxy.simulator.frames import EventStream, write_stream
from proxy.simulator.text import Endpoint, Generator

JSON = dict[str, Any]

USED = Tokens(11, 5, cached=3, reasoning=2)
USAGE = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
RESPONSE_USAGE = {
    "input_tokens": 11,
    "input_tokens_details": {"cached_tokens": 3},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 16,
}
ASKED = {"stream": True, "stream_options": {"include_usage": True}}
NAMES: dict[Endpoint, EndpointName] = {
    Endpoint.CHAT: "chat",
    Endpoint.COMPLETIONS: "completions",
    Endpoint.RESPONSES: "responses",
}
MAXIMUM = {
    Endpoint.CHAT: "max_completion_tokens",
    Endpoint.COMPLETIONS: "max_tokens",
    Endpoint.RESPONSES: "max_output_tokens",
}
HELLO: Any = [{"role": "user", "content": "hello there"}]

generator = cache(Generator)


def _content(endpoint: Endpoint) -> Any:
    return HELLO if endpoint is Endpoint.CHAT else "hello there"


def simulated(endpoint: Endpoint, *, crlf: bool = False, **fields: Any) -> EventStream:
    """An answer of the simulated upstream to a request with these fields."""
    request = {"model": "m", endpoint.input_field: _content(endpoint), "stream": True, **fields}
    return write_stream(generator(0).answer(endpoint, request, Directives(crlf=crlf)), id="x1", created=7)


def beginning(stream: EventStream, words: int, closing: int = 0) -> bytes:
    """The first bytes of an answer: its opening, `words` of its text events and `closing` of its closing events."""
    return b"".join([*stream.opening, *(event for event, _ in zip(stream.text, range(words), strict=False))]) + (
        b"".join(stream.closing[:closing])
    )


def chunks(raw: bytes) -> list[JSON]:
    """The JSON of each event except `[DONE]`. Every event must be complete, and its name, if any, its type."""
    splitter = Splitter()
    parsed = []
    for event in splitter.feed(raw):
        if event.data != b"[DONE]":
            chunk = json.loads(event.data or b"")
            assert event.name in (None, chunk.get("type"))
            parsed.append(chunk)
    assert splitter.end() == b""
    return parsed


def ending_of(endpoint: EndpointName, passed: Sequence[JSON], *, choices: int = 1) -> Ending:
    """An ending that has recorded these chunks."""
    ending = Ending(endpoint, choices=choices)
    for chunk in passed:
        ending.see(chunk)
    return ending


def end_of(
    endpoint: EndpointName,
    passed: Sequence[JSON],
    *,
    choices: int = 1,
    shows_usage: bool = False,
    used: Tokens = USED,
) -> list[JSON]:
    """The chunks that are written after these."""
    return chunks(ending_of(endpoint, passed, choices=choices).at_limit(used, shows_usage=shows_usage))


def stopped(
    endpoint: Endpoint, passed: bytes, *, choices: int = 1, shows_usage: bool = False, newline: bytes = b"\n"
) -> bytes:
    """The bytes that a client gets: those that passed, and then the proxy's end."""
    ending = ending_of(NAMES[endpoint], chunks(passed), choices=choices)
    return passed + ending.at_limit(USED, shows_usage=shows_usage, newline=newline)


@asynccontextmanager
async def sdk_reading(body: bytes) -> AsyncIterator[AsyncOpenAI]:
    """The official SDK, connected to a server that answers every request with this stream."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="text/event-stream")

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        async with AsyncOpenAI(base_url=url, api_key="key", max_retries=0) as sdk:
            yield sdk
    finally:
        await runner.cleanup()


# ------------------------------------------------------------------------------- compared with the simulated upstream


def comparable(chunk: JSON) -> JSON:
    """The chunk without the two differences to the upstream's end: details of usage, and the requested maximum."""
    chunk.get("response", {}).pop("max_output_tokens", None)
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        (chunk.get("usage") or {}).pop(name, None)
    return chunk


@pytest.mark.parametrize("words", [1, 5])
@pytest.mark.parametrize("usage", [{}, ASKED], ids=["no usage", "usage"])
@pytest.mark.parametrize(
    ("endpoint", "choices"),
    [(endpoint, n) for endpoint in NAMES for n in (1, 3) if (endpoint, n) != (Endpoint.RESPONSES, 3)],
)
def test_the_end_equals_that_of_the_upstream_at_its_maximum(
    endpoint: Endpoint, choices: int, usage: JSON, words: int
) -> None:
    """Chunk by chunk, for each endpoint and number of choices, with and without usage."""
    fields = {**usage, **({"n": choices} if choices > 1 else {})}
    maximum: Any = {MAXIMUM[endpoint]: words}
    theirs = simulated(endpoint, **fields, **maximum)
    passed = chunks(beginning(simulated(endpoint, **fields), words * choices))
    answer = generator(0).answer(endpoint, {"model": "m", endpoint.input_field: _content(endpoint), **fields})
    used = Tokens(answer.input_tokens, words * choices)
    ours = end_of(NAMES[endpoint], passed, choices=choices, shows_usage=bool(usage), used=used)
    assert [comparable(chunk) for chunk in ours] == [comparable(chunk) for chunk in chunks(b"".join(theirs.closing))]


# ----------------------------------------------------------------------------------------------- chat and completions


def chunk(index: int = 0, finish: str | None = None, **more: Any) -> JSON:
    """A chunk of a chat stream with a word, or with a finish reason."""
    choice = {"index": index, "delta": {} if finish else {"content": "x"}, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


def finished_choices(end: list[JSON]) -> list[int]:
    """The indices of the choices that an end finishes. Each must have its own chunk with the reason `length`."""
    finished = [each["choices"][0] for each in end if each["choices"]]
    assert all(each["finish_reason"] == "length" and each["logprobs"] is None for each in finished)
    assert all(len(each["choices"]) < 2 for each in end)
    return [each["index"] for each in finished]


@pytest.mark.parametrize(
    ("passed", "finished", "missing"),
    [
        ([], False, [0, 1, 2]),
        ([chunk(0), chunk(1), chunk(2)], False, [0, 1, 2]),
        ([chunk(0), chunk(1, "stop"), chunk(2)], False, [0, 2]),
        ([chunk(2, "stop"), chunk(0, "tool_calls")], False, [1]),
        ([chunk(0, "stop"), chunk(1, "stop"), chunk(2, "stop")], True, []),
        ([chunk(0, "stop"), chunk(0, "stop"), chunk(0, "stop")], False, [1, 2]),
        ([{"choices": [chunk(index, "stop")["choices"][0] for index in range(3)]}], True, []),
        ([chunk(0, ""), chunk(1, ""), chunk(2, "")], False, [0, 1, 2]),
        ([chunk(3, "stop"), chunk(-1, "stop"), chunk(2**70, "stop")], False, [0, 1, 2]),
        ([chunk(0, "stop"), chunk(1, "stop"), chunk(-1, "stop")], False, [2]),
        ([{"choices": [{"finish_reason": "stop"}]}], False, [1, 2]),
    ],
    ids=[
        *("nothing passed", "none finished", "one finished", "two finished", "all finished", "the same choice again"),
        *("all in one chunk", "an empty reason is none", "not requested", "negative", "no index means 0"),
    ],
)
def test_every_choice_finishes_once(passed: list[JSON], finished: bool, missing: list[int]) -> None:
    """Choices without a finish reason get one; the others are left alone."""
    ending = ending_of("chat", passed, choices=3)
    assert ending.has_finished == finished
    assert finished_choices(chunks(ending.at_limit(USED, shows_usage=False))) == missing
    assert end_of("chat", passed, choices=3, shows_usage=True)[-1]["usage"] == USAGE


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([None, "stop", "length"]))), st.integers(1, 6))
def test_every_choice_has_exactly_one_finish_reason(history: list[tuple[int, str | None]], choices: int) -> None:
    """In any order of words and finish reasons, the proxy adds a reason only to a choice that has none."""
    ending = ending_of("chat", [chunk(index, finish) for index, finish in history], choices=choices)
    theirs = {index for index, finish in history if finish and index < choices}
    ours = finished_choices(chunks(ending.at_limit(USED, shows_usage=False)))
    assert sorted([*theirs, *ours]) == list(range(choices))
    assert ending.has_finished == (not ours)


HEADS: list[tuple[list[JSON], JSON]] = [
    ([chunk()], {}),
    (
        [chunk(system_fingerprint="fp", service_tier="flex", obfuscation="xy", timings={})],
        {"system_fingerprint": "fp"},
    ),
    ([chunk(service_tier="flex"), chunk()], {"service_tier": "flex"}),
    ([chunk(system_fingerprint="a"), chunk(system_fingerprint="b")], {"system_fingerprint": "b"}),
    # Azure's first chunk, and one of its annotations in the middle.
    ([{"id": "", "model": "", "created": 0, "choices": [], "prompt_filter_results": []}, chunk()], {}),
    ([chunk(), {"id": "", "model": "", "created": 0, "choices": []}], {}),
]


@pytest.mark.parametrize(("passed", "more"), HEADS)
def test_the_end_repeats_the_members_that_all_chunks_share(passed: list[JSON], more: JSON) -> None:
    """Id, time, model and the like are repeated; members of a single chunk are not."""
    for each in end_of("chat", passed, shows_usage=True):
        head = {name: value for name, value in each.items() if name not in ("choices", "usage")}
        expected = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", **more}
        assert {name: head.get(name) for name in expected} == expected
        assert head.keys() <= {*expected, "service_tier"}


@pytest.mark.parametrize(
    ("endpoint", "prefix", "object"),
    [("chat", "chatcmpl-", "chat.completion.chunk"), ("completions", "cmpl-", "text_completion")],
)
def test_an_answer_of_which_nothing_passed(endpoint: EndpointName, prefix: str, object: str) -> None:
    """The end is a complete stream, with an id that is clearly not one of the upstream's."""
    cut, usage = end_of(endpoint, [], shows_usage=True)
    for each in (cut, usage):
        assert (each["id"], each["object"], each["created"], each["model"]) == (f"{prefix}unknown", object, 0, "")
    assert "usage" not in cut


def test_the_first_chunk_of_a_choice_states_the_role() -> None:
    """If a chunk of the choice has passed, the delta is empty."""
    begun, new = end_of("chat", [chunk(0)], choices=2)
    assert begun["choices"][0]["delta"] == {}
    assert new["choices"][0]["delta"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("passed", "shows_usage", "expected"),
    [
        ([chunk(usage=None)], True, [None, USAGE]),
        ([chunk()], True, ["none", USAGE]),
        ([chunk(usage={"prompt_tokens": 0})], True, ["none", USAGE]),
        ([chunk(usage=None)], False, ["none"]),
        ([chunk()], False, ["none"]),
    ],
    ids=["null before", "left out before", "counts before", "null, but removed for the client", "not requested"],
)
def test_usage_is_written_only_if_requested(passed: list[JSON], shows_usage: bool, expected: list[object]) -> None:
    """It is one chunk without choices. The other chunks of the end have null only if those before them had it."""
    assert [each.get("usage", "none") for each in end_of("chat", passed, shows_usage=shows_usage)] == expected


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


# --------------------------------------------------------------------------------------------------------- /responses

REASONING = {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "abc"}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
FUNCTION = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "look", "arguments": ""}
CUSTOM = {"id": "ct_1", "type": "custom_tool_call", "call_id": "call_2", "name": "run", "input": ""}
TEXT: JSON = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
REFUSAL: JSON = {"type": "refusal", "refusal": ""}
SUMMARY: JSON = {"type": "summary_text", "text": ""}

HEAD: JSON = {
    "id": "resp_1",
    "object": "response",
    "created_at": 7,
    "model": "m",
    "status": "in_progress",
    "error": None,
}
HEAD |= {"output": [], "usage": None, "incomplete_details": None, "tools": [], "metadata": {"trace": "1"}}

_OF_SUMMARY = {"item_id": "rs_1", "output_index": 0, "summary_index": 0}
_OF_TEXT = {"item_id": "msg_1", "output_index": 1, "content_index": 0}
_OF_REFUSAL = {"item_id": "msg_1", "output_index": 1, "content_index": 1}
_OF_FUNCTION = {"item_id": "fc_1", "output_index": 2}
_OF_CUSTOM = {"item_id": "ct_1", "output_index": 3}
_SUMMARY_END = "reasoning_summary_text.done reasoning_summary_part.done output_item.done"
_PART_END = "content_part.done output_item.done"

# One event a line: its type, its members, and the events that the proxy must write if the stream is stopped after it.
EVENTS: list[tuple[str, JSON, str]] = [
    ("created", {"response": HEAD}, ""),
    ("in_progress", {"response": HEAD}, ""),
    ("output_item.added", {"output_index": 0, "item": REASONING}, "output_item.done"),
    ("reasoning_summary_part.added", {**_OF_SUMMARY, "part": SUMMARY}, _SUMMARY_END),
    ("reasoning_summary_text.delta", {**_OF_SUMMARY, "delta": "I "}, _SUMMARY_END),
    ("reasoning_summary_text.delta", {**_OF_SUMMARY, "delta": "think"}, _SUMMARY_END),
    (
        "reasoning_summary_text.done",
        {**_OF_SUMMARY, "text": "I think"},
        "reasoning_summary_part.done output_item.done",
    ),
    ("reasoning_summary_part.done", {**_OF_SUMMARY, "part": {**SUMMARY, "text": "I think"}}, "output_item.done"),
    (
        "output_item.done",
        {
            "output_index": 0,
            "item": {**REASONING, "summary": [{**SUMMARY, "text": "I think"}], "encrypted_content": "de"},
        },
        "",
    ),
    ("output_item.added", {"output_index": 1, "item": MESSAGE}, "output_item.done"),
    ("content_part.added", {**_OF_TEXT, "part": TEXT}, f"output_text.done {_PART_END}"),
    ("output_text.delta", {**_OF_TEXT, "delta": "Hello", "logprobs": []}, f"output_text.done {_PART_END}"),
    ("output_text.delta", {**_OF_TEXT, "delta": " wörld", "logprobs": []}, f"output_text.done {_PART_END}"),
    ("output_text.done", {**_OF_TEXT, "text": "Hello wörld", "logprobs": []}, _PART_END),
    ("content_part.done", {**_OF_TEXT, "part": {**TEXT, "text": "Hello wörld"}}, "output_item.done"),
    ("content_part.added", {**_OF_REFUSAL, "part": REFUSAL}, f"refusal.done {_PART_END}"),
    ("refusal.delta", {**_OF_REFUSAL, "delta": "No."}, f"refusal.done {_PART_END}"),
    ("refusal.done", {**_OF_REFUSAL, "refusal": "No."}, _PART_END),
    ("content_part.done", {**_OF_REFUSAL, "part": {**REFUSAL, "refusal": "No."}}, "output_item.done"),
    (
        "output_item.done",
        {
            "output_index": 1,
            "item": {
                **MESSAGE,
                "status": "completed",
                "content": [{**TEXT, "text": "Hello wörld"}, {**REFUSAL, "refusal": "No."}],
            },
        },
        "",
    ),
    ("output_item.added", {"output_index": 2, "item": FUNCTION}, "output_item.done"),
    ("function_call_arguments.delta", {**_OF_FUNCTION, "delta": '{"a"'}, "output_item.done"),
    ("function_call_arguments.delta", {**_OF_FUNCTION, "delta": ":1}"}, "output_item.done"),
    ("function_call_arguments.done", {**_OF_FUNCTION, "arguments": '{"a":1}'}, "output_item.done"),
    (
        "output_item.done",
        {"output_index": 2, "item": {**FUNCTION, "status": "completed", "arguments": '{"a":1}'}},
        "",
    ),
    ("output_item.added", {"output_index": 3, "item": CUSTOM}, "output_item.done"),
    ("custom_tool_call_input.delta", {**_OF_CUSTOM, "delta": "rm -r"}, "output_item.done"),
    ("custom_tool_call_input.done", {**_OF_CUSTOM, "input": "rm -r"}, "output_item.done"),
    ("output_item.done", {"output_index": 3, "item": {**CUSTOM, "status": "completed", "input": "rm -r"}}, ""),
]
RESPONSE: list[JSON] = [
    {"type": f"response.{kind}", "sequence_number": number, **members}
    for number, (kind, members, _) in enumerate(EVENTS)
]
CUTS = range(1, len(EVENTS) + 1)


def response_of(end: list[JSON]) -> JSON:
    """The response in the last event."""
    assert end[-1]["type"] == "response.incomplete"
    response: JSON = end[-1]["response"]
    return response


def text_of(events: list[JSON], kind: str) -> str:
    """The text of the deltas of this kind."""
    return "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut}-{EVENTS[cut - 1][0]}")
def test_the_end_has_the_missing_events_in_order(cut: int) -> None:
    """After each event: those that the upstream would still send, numbered on, and then `response.incomplete`."""
    end = end_of("responses", RESPONSE[:cut])
    missing = EVENTS[cut - 1][2].split()
    assert [event["type"] for event in end] == [f"response.{kind}" for kind in (*missing, "incomplete")]
    assert [event["sequence_number"] for event in end] == list(range(cut, cut + len(end)))


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut}-{EVENTS[cut - 1][0]}")
def test_the_response_contains_exactly_what_passed(cut: int) -> None:
    """After each event: finished items are unchanged, the others are incomplete, and no text is lost."""
    passed = RESPONSE[:cut]
    response = response_of(end_of("responses", passed))
    done = {event["output_index"]: event["item"] for event in passed if event["type"] == "response.output_item.done"}
    added = [event["item"]["id"] for event in passed if event["type"] == "response.output_item.added"]
    output = response["output"]
    assert [item["id"] for item in output] == added
    assert {index: item for index, item in enumerate(output) if item.get("status") != "incomplete"} == done
    parts = [part for item in output for part in item.get("summary") or item.get("content") or []]
    for kind, part_type in (("reasoning_summary_text", "summary_text"), ("output_text", "output_text")):
        assert "".join(part["text"] for part in parts if part["type"] == part_type) == text_of(passed, kind)
    assert "".join(part.get("refusal", "") for part in parts) == text_of(passed, "refusal")
    assert "".join(item.get("arguments", "") for item in output) == text_of(passed, "function_call_arguments")
    assert "".join(item.get("input", "") for item in output) == text_of(passed, "custom_tool_call_input")


def test_a_response_states_its_reason_and_its_usage() -> None:
    """Even if the client did not ask for usage. All other members are those of the last lifecycle event."""
    later = {**HEAD, "model": "m-2026", "service_tier": "flex"}
    passed = [RESPONSE[0], {"type": "response.in_progress", "sequence_number": 1, "response": later}]
    for shows_usage in (False, True):
        assert response_of(end_of("responses", passed, shows_usage=shows_usage)) == {
            **later,
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "usage": RESPONSE_USAGE,
        }


def test_the_missing_events_contain_the_text_that_passed() -> None:
    """They have the members of real ones, and each refers to its own part of its own item."""
    end = end_of("responses", RESPONSE[:12])
    part = {**TEXT, "text": "Hello"}
    item = {**MESSAGE, "status": "incomplete", "content": [part]}
    assert [{name: value for name, value in event.items() if name != "sequence_number"} for event in end[:-1]] == [
        {"type": "response.output_text.done", **_OF_TEXT, "text": "Hello", "logprobs": []},
        {"type": "response.content_part.done", **_OF_TEXT, "part": part},
        {"type": "response.output_item.done", "output_index": 1, "item": item},
    ]
    assert response_of(end)["output"][1] == item


def test_an_interrupted_summary_is_incomplete() -> None:
    """As at OpenAI. A summary whose text was done is not incomplete."""
    _, part, *_ = end_of("responses", RESPONSE[:6])
    assert (part["part"]["text"], part["status"]) == ("I think", "incomplete")
    part, *_ = end_of("responses", RESPONSE[:7])
    assert "status" not in part


def test_the_input_of_a_cut_tool_call_is_never_declared_final() -> None:
    """Its item ends as incomplete, without a `.done` event, after which a client might run `rm -r`."""
    item, last = end_of("responses", RESPONSE[:27])
    assert item["item"] == {**CUSTOM, "input": "rm -r", "status": "incomplete"}
    assert last["type"] == "response.incomplete"


def _item(item: JSON, *events: JSON) -> list[JSON]:
    """A response with one item and these events of it."""
    added = {"type": "response.output_item.added", "output_index": 0, "item": item}
    return [RESPONSE[0], added, *({"output_index": 0, "content_index": 0, **event} for event in events)]


OLD = {**TEXT, "text": "old"}


@pytest.mark.parametrize(
    ("passed", "kinds", "members"),
    [
        (
            _item(REASONING, {"type": "response.reasoning_text.delta", "delta": "hm"}),
            "reasoning_text.done output_item.done",
            {"content": [{"type": "reasoning_text", "text": "hm"}]},
        ),
        (
            _item(MESSAGE, {"type": "response.output_text.delta", "delta": "hi"}),
            "output_text.done output_item.done",
            {"content": [{**TEXT, "text": "hi"}]},
        ),
        (
            _item(MESSAGE, {"type": "response.content_part.done", "part": OLD}),
            "output_item.done",
            {"content": [OLD]},
        ),
        (
            _item(
                {**MESSAGE, "content": [OLD]},
                {"type": "response.output_text.delta", "content_index": 1, "delta": "new"},
            ),
            "output_text.done output_item.done",
            {"content": [OLD, {**TEXT, "text": "new"}]},
        ),
        (
            _item({**MESSAGE, "content": "odd"}, {"type": "response.content_part.added", "part": OLD}),
            "output_text.done content_part.done output_item.done",
            {"content": [OLD]},
        ),
        (
            _item({**FUNCTION, "arguments": "{"}, {"type": "response.function_call_arguments.delta", "delta": "}"}),
            "output_item.done",
            {"arguments": "{}"},
        ),
        (
            _item(MESSAGE, {"type": "response.content_part.added", "part": {"type": "output_audio"}}),
            "output_item.done",
            {"content": []},
        ),
        (
            _item(
                MESSAGE, {"type": "response.output_text.done"}, {"type": "response.output_text.delta", "delta": None}
            ),
            "output_item.done",
            {"content": [TEXT]},
        ),
        (
            _item(MESSAGE, {"type": "response.output_text.delta", "output_index": 4, "delta": "lost"}),
            "output_item.done",
            {"content": []},
        ),
    ],
    ids=[
        *(
            "reasoning without a part",
            "text without a part",
            "a part that is only ended",
            "a part in the item",
            "parts of an unexpected shape",
        ),
        *("arguments begun in the item", "a part of an unknown type", "no text in its events", "text of no item"),
    ],
)
def test_servers_that_leave_events_out(passed: list[JSON], kinds: str, members: JSON) -> None:
    """A part that was never added is not ended. Text is kept, whichever event contained it."""
    end = end_of("responses", passed)
    assert [event["type"] for event in end[:-1]] == [f"response.{kind}" for kind in kinds.split()]
    (item,) = response_of(end)["output"]
    assert {name: item[name] for name in members} == members
    assert item["status"] == "incomplete"


@pytest.mark.parametrize(
    "unexpected",
    [
        {"type": "response.something_new", "output_index": 1, "delta": "x"},
        {"type": "response.output_text.done", "output_index": 4, "content_index": 0, "text": "x"},
        {"type": "response.output_text.delta", "output_index": 1, "content_index": None, "delta": "x"},
        {"type": "response.content_part.added", "output_index": 1, "content_index": 0, "part": None},
        {"type": "response.output_item.added", "output_index": 1, "item": None},
        {"type": "response.in_progress", "response": None},
        {"type": ["response.completed"]},
        {"delta": "x"},
    ],
)
def test_an_unexpected_event_changes_nothing(unexpected: JSON) -> None:
    """An unknown type, an index of no item, or missing members: the end is the same as without the event."""
    passed = RESPONSE[:12]
    assert end_of("responses", [*passed, unexpected]) == end_of("responses", passed)


def test_items_and_parts_are_ordered_by_index() -> None:
    """In whatever order they arrived, because clients find them by index."""
    late = {"type": "response.output_item.added", "output_index": 0, "item": MESSAGE}
    words = [
        {"type": "response.output_text.delta", "output_index": 0, "content_index": index, "delta": f"{index}"}
        for index in (2, 0, 1)
    ]
    response = response_of(end_of("responses", [RESPONSE[0], RESPONSE[20], late, *words]))
    message, function = response["output"]
    assert [part["text"] for part in message["content"]] == ["0", "1", "2"]
    assert function["id"] == FUNCTION["id"]


def test_text_after_the_end_of_its_item_is_ignored() -> None:
    """The item in `output_item.done` is final."""
    late = {"type": "response.output_text.delta", **_OF_TEXT, "delta": "late"}
    response = response_of(end_of("responses", [*RESPONSE[:20], late]))
    assert response["output"][1] == RESPONSE[19]["item"]


def test_a_response_of_which_nothing_passed() -> None:
    """It begins with `response.created`, because SDKs accept no other event first. Its id is a placeholder."""
    created, last = end_of("responses", [])
    assert (created["type"], created["sequence_number"], last["sequence_number"]) == ("response.created", 0, 1)
    assert created["response"]["status"] == "in_progress"
    assert created["response"]["id"] == last["response"]["id"] == "resp_unknown"


@pytest.mark.parametrize("kind", sorted(RESPONSE_ENDS))
def test_a_response_that_has_ended_gets_no_second_end(kind: str) -> None:
    """The upstream's own last event was the end."""
    ending = ending_of("responses", RESPONSE)
    assert not ending.has_finished
    ending.see({"type": kind, "sequence_number": len(RESPONSE), "response": HEAD})
    assert ending.has_finished
    assert ending.at_limit(USED, shows_usage=True) == b""


# --------------------------------------------------------------------------------------- unexpected chunks and events

KINDS = [f"response.{kind}" for kind, _, _ in EVENTS] + [
    "response.reasoning_text.delta",
    "response.queued",
    "error",
    "x",
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ITEM = st.sampled_from([REASONING, MESSAGE, FUNCTION, CUSTOM]) | ANYTHING
PART = st.sampled_from([TEXT, REFUSAL, SUMMARY]) | st.fixed_dictionaries({"type": ANYTHING}) | ANYTHING
CHOICE = st.fixed_dictionaries({}, optional={"index": ANYTHING, "finish_reason": ANYTHING}) | ANYTHING
ANY_CHUNK = st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3) | st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS) | ANYTHING},
    optional={
        "sequence_number": ANYTHING,
        "output_index": st.integers(0, 1) | ANYTHING,
        "content_index": st.integers(0, 1) | ANYTHING,
        "summary_index": st.integers(0, 1) | ANYTHING,
        "item": ITEM,
        "part": PART,
        "delta": ANYTHING,
        "text": ANYTHING,
        "response": st.just(HEAD) | ANYTHING,
        "choices": st.lists(CHOICE, max_size=3) | ANYTHING,
        "usage": ANYTHING,
        "id": ANYTHING,
    },
)


@given(st.lists(ANY_CHUNK, max_size=8), st.sampled_from(["chat", "completions"]), st.integers(1, 3))
def test_any_chunk_leaves_a_readable_end(passed: list[JSON], endpoint: EndpointName, choices: int) -> None:
    """Whatever JSON an upstream sends, nothing is raised and the end states the usage."""
    end = end_of(endpoint, passed, choices=choices, shows_usage=True)
    assert end[-1]["usage"] == USAGE


@given(st.integers(0, len(EVENTS)), st.lists(ANY_CHUNK, max_size=8))
def test_any_event_leaves_a_readable_end(cut: int, events: list[JSON]) -> None:
    """Wherever in a response it comes, the end states the usage, unless the event was an end itself."""
    ending = ending_of("responses", [*RESPONSE[:cut], *events])
    end = chunks(ending.at_limit(USED, shows_usage=False))
    assert ending.has_finished == any(event.get("type") in sorted(RESPONSE_ENDS) for event in events)
    assert [event["response"]["usage"] for event in end[-1:]] == [RESPONSE_USAGE] * (not ending.has_finished)


# ------------------------------------------------------------------------------------------- read by the official SDK


async def cut_completion(stream: AsyncChatCompletionStream[Any]) -> ChatCompletion:
    """The completion that the SDK assembled. The SDK raises it inside an error if the answer was cut by length."""
    with pytest.raises(LengthFinishReasonError) as cut:
        await stream.get_final_completion()
    return cut.value.completion


@pytest.mark.parametrize("usage", [{}, ASKED], ids=["no usage", "usage"])
@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
@pytest.mark.parametrize("words", [0, 1, 7])
async def test_the_sdk_reads_a_chat_that_was_stopped(words: int, crlf: bool, usage: JSON) -> None:
    """With both of the SDK's APIs: all words, cut by length, and usage if and only if it was requested."""
    newline = b"\r\n" if crlf else b"\n"
    passed = beginning(simulated(Endpoint.CHAT, crlf=crlf, **usage), words)
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in chunks(passed))
    async with sdk_reading(stopped(Endpoint.CHAT, passed, shows_usage=bool(usage), newline=newline)) as sdk:
        read = [each async for each in await sdk.chat.completions.create(model="m", messages=HELLO, stream=True)]
        async with sdk.chat.completions.stream(model="m", messages=HELLO) as stream:
            events = [event async for event in stream]
            final = await cut_completion(stream)
    choices = [choice for each in read for choice in each.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == text
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert {(each.id, each.created, each.model) for each in read} == {("x1", 7, "m")}
    shown = [each.usage.to_dict() for each in read if each.usage]
    assert shown == [USAGE] * bool(usage)
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == (text, "length")
    assert final.choices[0].message.role == "assistant"
    assert bool(final.usage) == bool(usage)
    assert [event.type for event in events if event.type.endswith(".done")] == ["content.done"] * bool(words)


async def test_the_sdk_reads_three_choices_of_which_one_had_finished() -> None:
    """The finished choice keeps its reason, the others are cut by length, and each has its own words."""
    stream = simulated(Endpoint.CHAT, n=3)
    passed = beginning(stream, 200, closing=1)  # all words of all of them
    texts = ["", "", ""]
    for each in chunks(passed):
        for choice in each["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    async with (
        sdk_reading(stopped(Endpoint.CHAT, passed, choices=3)) as sdk,
        sdk.chat.completions.stream(model="m", messages=HELLO, n=3) as reading,
    ):
        final = await cut_completion(reading)
    assert [choice.finish_reason for choice in final.choices] == ["stop", "length", "length"]
    assert [choice.message.content for choice in final.choices] == texts


async def test_the_sdk_reads_choices_that_had_not_begun() -> None:
    """Each is an empty message of the assistant, with a role and content."""
    passed = beginning(simulated(Endpoint.CHAT), 3)
    async with (
        sdk_reading(stopped(Endpoint.CHAT, passed, choices=2)) as sdk,
        sdk.chat.completions.stream(model="m", messages=HELLO, n=2) as reading,
    ):
        final = await cut_completion(reading)
    assert [choice.finish_reason for choice in final.choices] == ["length", "length"]
    assert (final.choices[1].message.role, final.choices[1].message.content) == ("assistant", "")


async def test_the_sdk_reads_a_chat_that_was_stopped_in_a_tool_call() -> None:
    """The finish reason says that the arguments are incomplete; the SDK has those that passed."""
    opening = simulated(Endpoint.CHAT).opening
    request = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
    calls = [{"tool_calls": [request]}, {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": [1'}}]}]
    deltas = [chunk(choices=[{"index": 0, "delta": delta, "finish_reason": None}], id="x1") for delta in calls]
    passed = opening[0] + b"".join(b"data: " + json.dumps(delta).encode() + b"\n\n" for delta in deltas)
    async with (
        sdk_reading(stopped(Endpoint.CHAT, passed)) as sdk,
        sdk.chat.completions.stream(model="m", messages=HELLO) as stream,
    ):
        final = await cut_completion(stream)
    (choice,) = final.choices
    assert choice.finish_reason == "length"
    (made,) = [request.to_dict() for request in choice.message.tool_calls or ()]
    assert made["function"] == {"name": "look", "arguments": '{"a": [1', "parsed_arguments": None}


@pytest.mark.parametrize("usage", [{}, ASKED], ids=["no usage", "usage"])
async def test_the_sdk_reads_completions_that_were_stopped(usage: JSON) -> None:
    """All words of both choices, cut by length, and usage if and only if it was requested."""
    passed = beginning(simulated(Endpoint.COMPLETIONS, n=2, **usage), 6)
    expected = ["", ""]
    for each in chunks(passed):
        expected[each["choices"][0]["index"]] += each["choices"][0]["text"]
    async with sdk_reading(stopped(Endpoint.COMPLETIONS, passed, choices=2, shows_usage=bool(usage))) as sdk:
        read = [each async for each in await sdk.completions.create(model="m", prompt="x", n=2, stream=True)]
    texts, reasons = ["", ""], []
    for each in read:
        for choice in each.choices:
            texts[choice.index] += choice.text
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (texts, reasons) == (expected, ["length", "length"])
    assert [each.usage.to_dict() for each in read if each.usage] == [USAGE] * bool(usage)


@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
@pytest.mark.parametrize("words", [0, 1, 7])
async def test_the_sdk_reads_a_response_that_was_stopped(words: int, crlf: bool) -> None:
    """It is incomplete because of its length, with all words and its usage; the numbers have no gap."""
    passed = beginning(simulated(Endpoint.RESPONSES, crlf=crlf), words)
    text = text_of(chunks(passed), "output_text")
    async with sdk_reading(stopped(Endpoint.RESPONSES, passed, newline=b"\r\n" if crlf else b"\n")) as sdk:
        read = [event async for event in await sdk.responses.create(model="m", input="x", stream=True)]
    last = read[-1]
    assert last.type == "response.incomplete"
    assert (last.response.status, last.response.output_text) == ("incomplete", text)
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.usage is not None
    assert last.response.usage.to_dict() == RESPONSE_USAGE
    assert [event.sequence_number for event in read] == list(range(len(read)))


@pytest.mark.parametrize("cut", [0, *CUTS])
async def test_the_sdk_assembles_a_response_that_was_stopped_anywhere(cut: int) -> None:
    """After each event, even inside reasoning, a refusal or a tool call, its accumulator accepts the end."""
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in RESPONSE[:cut])
    async with (
        sdk_reading(stopped(Endpoint.RESPONSES, body)) as sdk,
        sdk.responses.stream(model="m", input="x") as stream,
    ):
        events = [event async for event in stream]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == text_of(RESPONSE[:cut], "output_text")
    done = {event.output_index: event.item for event in events if event.type == "response.output_item.done"}
    assert [done[index].to_dict() for index in sorted(done)] == [item.to_dict() for item in last.response.output]


async def test_the_helpers_of_the_sdk_raise_as_at_the_upstreams_own_maximum() -> None:
    """They return no final object of an answer that was cut; the error is the same, word for word."""
    errors = []
    for endpoint in (Endpoint.CHAT, Endpoint.RESPONSES):
        maximum: Any = {MAXIMUM[endpoint]: 5}
        theirs = beginning(simulated(endpoint, **maximum), 5, closing=9)
        ours = stopped(endpoint, beginning(simulated(endpoint), 5))
        for body in (theirs, ours):
            with pytest.raises((LengthFinishReasonError, RuntimeError)) as raised:
                await _final(endpoint, body)
            errors.append((type(raised.value), str(raised.value)))
    assert errors[0] == errors[1]
    assert errors[2] == errors[3] == (RuntimeError, "Didn't receive a `response.completed` event.")


async def _final(endpoint: Endpoint, body: bytes) -> None:
    async with sdk_reading(body) as sdk:
        if endpoint is Endpoint.CHAT:
            async with sdk.chat.completions.stream(model="m", messages=HELLO) as chat:
                await chat.get_final_completion()
        else:
            async with sdk.responses.stream(model="m", input="x") as response:
                await response.get_final_response()
