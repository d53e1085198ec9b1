"""A stream that we stop ends as if the upstream's own maximum had ended it there.

Shown three ways: by what the simulated upstream itself writes at its maximum, by the events one after the other, and
by the official SDK, which reads the beginning of an answer and then our end from a real socket. wire §2.2 (usage in
streams), §2.4 (events of /responses).
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


def recorded(endpoint: Endpoint, *, crlf: bool = False, **asked: Any) -> EventStream:
    """An answer of the simulated upstream."""
    params = {"model": "m", endpoint.input_field: _content(endpoint), "stream": True, **asked}
    return write_stream(generator(0).answer(endpoint, params, Directives(crlf=crlf)), id="x1", created=7)


def beginning(stream: EventStream, words: int, closing: int = 0) -> bytes:
    """The opening of an answer, so many of its text events, and so many of those after them."""
    return b"".join([*stream.opening, *(event for event, _ in zip(stream.text, range(words), strict=False))]) + (
        b"".join(stream.closing[:closing])
    )


def chunks(raw: bytes) -> list[JSON]:
    """The JSON of each event, but not `[DONE]`; every event is whole, and named as its type or not at all."""
    splitter = Splitter()
    read = []
    for event in splitter.feed(raw):
        if event.data != b"[DONE]":
            chunk = json.loads(event.data or b"")
            assert event.name in (None, chunk.get("type"))
            read.append(chunk)
    assert splitter.end() == b""
    return read


def ending_of(endpoint: EndpointName, passed: Sequence[JSON], *, choices: int = 1) -> Ending:
    """An ending that saw these pass."""
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
    """What is written after these, read again."""
    return chunks(ending_of(endpoint, passed, choices=choices).at_limit(used, shows_usage=shows_usage))


def stopped(
    endpoint: Endpoint, passed: bytes, *, choices: int = 1, shows_usage: bool = False, newline: bytes = b"\n"
) -> bytes:
    """What a client gets: what had passed, and then our end."""
    ending = ending_of(NAMES[endpoint], chunks(passed), choices=choices)
    return passed + ending.at_limit(USED, shows_usage=shows_usage, newline=newline)


@asynccontextmanager
async def sdk_reading(body: bytes) -> AsyncIterator[AsyncOpenAI]:
    """The official SDK before a server that answers everything with this stream."""

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


# ----------------------------------------------------------------------------------------- as the upstream would have


def plain(chunk: JSON) -> JSON:
    """Without what tells our end from the upstream's: details of usage, and the maximum that was asked for."""
    chunk.get("response", {}).pop("max_output_tokens", None)
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        (chunk.get("usage") or {}).pop(name, None)
    return chunk


@pytest.mark.parametrize("words", [1, 5])
@pytest.mark.parametrize("usage", [{}, ASKED], ids=["unasked", "asked"])
@pytest.mark.parametrize(
    ("endpoint", "choices"),
    [(endpoint, n) for endpoint in NAMES for n in (1, 3) if (endpoint, n) != (Endpoint.RESPONSES, 3)],
)
def test_our_end_is_the_one_that_the_upstream_writes_at_its_maximum(
    endpoint: Endpoint, choices: int, usage: JSON, words: int
) -> None:
    """Chunk for chunk, for each endpoint and number of choices, with and without usage."""
    asked = {**usage, **({"n": choices} if choices > 1 else {})}
    maximum: Any = {MAXIMUM[endpoint]: words}
    theirs = recorded(endpoint, **asked, **maximum)
    passed = chunks(beginning(recorded(endpoint, **asked), words * choices))
    answer = generator(0).answer(endpoint, {"model": "m", endpoint.input_field: _content(endpoint), **asked})
    used = Tokens(answer.input_tokens, words * choices)
    ours = end_of(NAMES[endpoint], passed, choices=choices, shows_usage=bool(usage), used=used)
    assert [plain(chunk) for chunk in ours] == [plain(chunk) for chunk in chunks(b"".join(theirs.closing))]


# ----------------------------------------------------------------------------------------------- chat and completions


def chunk(index: int = 0, finish: str | None = None, **more: Any) -> JSON:
    """A chunk of a chat stream with a word, or with the reason to finish."""
    choice = {"index": index, "delta": {} if finish else {"content": "x"}, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


def indices(end: list[JSON]) -> list[int]:
    """The choices that an end finishes; each by itself, with no word more, for its length."""
    finished = [each["choices"][0] for each in end if each["choices"]]
    assert all(each["finish_reason"] == "length" and each["logprobs"] is None for each in finished)
    assert all(len(each["choices"]) < 2 for each in end)
    return [each["index"] for each in finished]


@pytest.mark.parametrize(
    ("passed", "finished", "rest"),
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
        *("nothing passed", "none finished", "one finished", "two finished", "all finished", "the same one again"),
        *("all in one chunk", "no reason is none", "not asked for", "below the first", "no index is the first"),
    ],
)
def test_every_choice_finishes_once(passed: list[JSON], finished: bool, rest: list[int]) -> None:
    """Those that have no reason to finish yet get one; the others are left alone."""
    ending = ending_of("chat", passed, choices=3)
    assert ending.has_finished == finished
    assert indices(chunks(ending.at_limit(USED, shows_usage=False))) == rest
    assert end_of("chat", passed, choices=3, shows_usage=True)[-1]["usage"] == USAGE


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([None, "stop", "length"]))), st.integers(1, 6))
def test_whatever_passed_every_choice_has_one_reason(history: list[tuple[int, str | None]], choices: int) -> None:
    """For every order of words and finishes: theirs or ours, never none, and ours only where there was none."""
    ending = ending_of("chat", [chunk(index, finish) for index, finish in history], choices=choices)
    theirs = {index for index, finish in history if finish and index < choices}
    ours = indices(chunks(ending.at_limit(USED, shows_usage=False)))
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
    # Azure's first chunk, and one of its annotations in the middle
    ([{"id": "", "model": "", "created": 0, "choices": [], "prompt_filter_results": []}, chunk()], {}),
    ([chunk(), {"id": "", "model": "", "created": 0, "choices": []}], {}),
]


@pytest.mark.parametrize(("passed", "more"), HEADS)
def test_our_chunks_look_like_those_before(passed: list[JSON], more: JSON) -> None:
    """The same id, time and model, and what else all chunks of an answer share; nothing that was one chunk's own."""
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
    """A whole stream all the same, with an id that nobody could take for one of the upstream's."""
    cut, usage = end_of(endpoint, [], shows_usage=True)
    for each in (cut, usage):
        assert (each["id"], each["object"], each["created"], each["model"]) == (f"{prefix}unknown", object, 0, "")
    assert "usage" not in cut


def test_the_first_chunk_of_a_choice_says_whose_message_it_is() -> None:
    """Also where it is ours; where there was one before, it has nothing to say."""
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
    ids=["null before", "left out before", "counts before", "null, but taken out for the client", "not asked"],
)
def test_usage_is_shown_as_it_was_asked_for(passed: list[JSON], shows_usage: bool, expected: list[object]) -> None:
    """One chunk without choices, before the end; null on ours only where those before had it and it is shown."""
    assert [each.get("usage", "none") for each in end_of("chat", passed, shows_usage=shows_usage)] == expected


@pytest.mark.parametrize("endpoint", list(NAMES.values()))
def test_lines_end_as_those_of_the_stream(endpoint: EndpointName) -> None:
    """The same end, with the other ends of lines, everywhere; and `[DONE]` in its exact form, but for responses."""
    ending = ending_of(endpoint, [chunk()])
    plain_end = ending.at_limit(USED, shows_usage=True)
    odd = ending.at_limit(USED, shows_usage=True, newline=b"\r\n")
    assert odd.replace(b"\r\n", b"\n") == plain_end
    assert odd.count(b"\r\n") == odd.count(b"\n") > 4
    assert plain_end.endswith(b"\n\ndata: [DONE]\n\n") == (endpoint != "responses")
    assert plain_end.count(b"[DONE]") == (endpoint != "responses")


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

_THOUGHT = {"item_id": "rs_1", "output_index": 0, "summary_index": 0}
_SAID = {"item_id": "msg_1", "output_index": 1, "content_index": 0}
_REFUSED = {"item_id": "msg_1", "output_index": 1, "content_index": 1}
_CALLED = {"item_id": "fc_1", "output_index": 2}
_RUN = {"item_id": "ct_1", "output_index": 3}
_SUMMARY = "reasoning_summary_text.done reasoning_summary_part.done output_item.done"
_PART = "content_part.done output_item.done"

# One event a line: its type, what it says, and what is still to be written if the stream is stopped after it.
EVENTS: list[tuple[str, JSON, str]] = [
    ("created", {"response": HEAD}, ""),
    ("in_progress", {"response": HEAD}, ""),
    ("output_item.added", {"output_index": 0, "item": REASONING}, "output_item.done"),
    ("reasoning_summary_part.added", {**_THOUGHT, "part": SUMMARY}, _SUMMARY),
    ("reasoning_summary_text.delta", {**_THOUGHT, "delta": "I "}, _SUMMARY),
    ("reasoning_summary_text.delta", {**_THOUGHT, "delta": "think"}, _SUMMARY),
    ("reasoning_summary_text.done", {**_THOUGHT, "text": "I think"}, "reasoning_summary_part.done output_item.done"),
    ("reasoning_summary_part.done", {**_THOUGHT, "part": {**SUMMARY, "text": "I think"}}, "output_item.done"),
    (
        "output_item.done",
        {
            "output_index": 0,
            "item": {**REASONING, "summary": [{**SUMMARY, "text": "I think"}], "encrypted_content": "de"},
        },
        "",
    ),
    ("output_item.added", {"output_index": 1, "item": MESSAGE}, "output_item.done"),
    ("content_part.added", {**_SAID, "part": TEXT}, f"output_text.done {_PART}"),
    ("output_text.delta", {**_SAID, "delta": "Hello", "logprobs": []}, f"output_text.done {_PART}"),
    ("output_text.delta", {**_SAID, "delta": " wörld", "logprobs": []}, f"output_text.done {_PART}"),
    ("output_text.done", {**_SAID, "text": "Hello wörld", "logprobs": []}, _PART),
    ("content_part.done", {**_SAID, "part": {**TEXT, "text": "Hello wörld"}}, "output_item.done"),
    ("content_part.added", {**_REFUSED, "part": REFUSAL}, f"refusal.done {_PART}"),
    ("refusal.delta", {**_REFUSED, "delta": "No."}, f"refusal.done {_PART}"),
    ("refusal.done", {**_REFUSED, "refusal": "No."}, _PART),
    ("content_part.done", {**_REFUSED, "part": {**REFUSAL, "refusal": "No."}}, "output_item.done"),
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
    ("function_call_arguments.delta", {**_CALLED, "delta": '{"a"'}, "output_item.done"),
    ("function_call_arguments.delta", {**_CALLED, "delta": ":1}"}, "output_item.done"),
    ("function_call_arguments.done", {**_CALLED, "arguments": '{"a":1}'}, "output_item.done"),
    (
        "output_item.done",
        {"output_index": 2, "item": {**FUNCTION, "status": "completed", "arguments": '{"a":1}'}},
        "",
    ),
    ("output_item.added", {"output_index": 3, "item": CUSTOM}, "output_item.done"),
    ("custom_tool_call_input.delta", {**_RUN, "delta": "rm -r"}, "output_item.done"),
    ("custom_tool_call_input.done", {**_RUN, "input": "rm -r"}, "output_item.done"),
    ("output_item.done", {"output_index": 3, "item": {**CUSTOM, "status": "completed", "input": "rm -r"}}, ""),
]
RESPONSE: list[JSON] = [
    {"type": f"response.{kind}", "sequence_number": number, **said} for number, (kind, said, _) in enumerate(EVENTS)
]
CUTS = range(1, len(EVENTS) + 1)


def response_of(end: list[JSON]) -> JSON:
    """The response as the last event says it."""
    assert end[-1]["type"] == "response.incomplete"
    response: JSON = end[-1]["response"]
    return response


def said_in(events: list[JSON], kind: str) -> str:
    """The text of these deltas."""
    return "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut}-{EVENTS[cut - 1][0]}")
def test_what_is_open_is_closed_in_order(cut: int) -> None:
    """After each event: what a real stream would still send, numbered on, then the response as far as it came."""
    end = end_of("responses", RESPONSE[:cut])
    missing = EVENTS[cut - 1][2].split()
    assert [event["type"] for event in end] == [f"response.{kind}" for kind in (*missing, "incomplete")]
    assert [event["sequence_number"] for event in end] == list(range(cut, cut + len(end)))


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut}-{EVENTS[cut - 1][0]}")
def test_a_response_has_all_that_passed_and_nothing_else(cut: int) -> None:
    """After each event: what was done stands as it was said, the rest is incomplete, and no text is lost."""
    passed = RESPONSE[:cut]
    response = response_of(end_of("responses", passed))
    done = {event["output_index"]: event["item"] for event in passed if event["type"] == "response.output_item.done"}
    added = [event["item"]["id"] for event in passed if event["type"] == "response.output_item.added"]
    output = response["output"]
    assert [item["id"] for item in output] == added
    assert {index: item for index, item in enumerate(output) if item.get("status") != "incomplete"} == done
    parts = [part for item in output for part in item.get("summary") or item.get("content") or []]
    for kind, part_type in (("reasoning_summary_text", "summary_text"), ("output_text", "output_text")):
        assert "".join(part["text"] for part in parts if part["type"] == part_type) == said_in(passed, kind)
    assert "".join(part.get("refusal", "") for part in parts) == said_in(passed, "refusal")
    assert "".join(item.get("arguments", "") for item in output) == said_in(passed, "function_call_arguments")
    assert "".join(item.get("input", "") for item in output) == said_in(passed, "custom_tool_call_input")


def test_a_response_says_why_it_ended_and_what_it_used() -> None:
    """Whether or not anybody asked for usage; all else stands as the upstream said it last."""
    later = {**HEAD, "model": "m-2026", "service_tier": "flex"}
    passed = [RESPONSE[0], {"type": "response.in_progress", "sequence_number": 1, "response": later}]
    for shows_usage in (False, True):
        assert response_of(end_of("responses", passed, shows_usage=shows_usage)) == {
            **later,
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "usage": RESPONSE_USAGE,
        }


def test_the_closing_events_say_what_was_said() -> None:
    """In the members that a real one has; and each closes its own part of its own item."""
    end = end_of("responses", RESPONSE[:12])
    said = {**TEXT, "text": "Hello"}
    item = {**MESSAGE, "status": "incomplete", "content": [said]}
    assert [{name: value for name, value in event.items() if name != "sequence_number"} for event in end[:-1]] == [
        {"type": "response.output_text.done", **_SAID, "text": "Hello", "logprobs": []},
        {"type": "response.content_part.done", **_SAID, "part": said},
        {"type": "response.output_item.done", "output_index": 1, "item": item},
    ]
    assert response_of(end)["output"][1] == item


def test_a_summary_that_was_interrupted_says_so() -> None:
    """As OpenAI's do; one whose text was said to its end was not interrupted."""
    _, part, *_ = end_of("responses", RESPONSE[:6])
    assert (part["part"]["text"], part["status"]) == ("I think", "incomplete")
    part, *_ = end_of("responses", RESPONSE[:7])
    assert "status" not in part


def test_half_a_tool_call_is_never_called_final() -> None:
    """Its item ends with a status that says so, and no `.done` invites a client to run `rm -r`."""
    item, last = end_of("responses", RESPONSE[:27])
    assert item["item"] == {**CUSTOM, "input": "rm -r", "status": "incomplete"}
    assert last["type"] == "response.incomplete"


def _item(item: JSON, *events: JSON) -> list[JSON]:
    """A response with one item, of which these events tell."""
    added = {"type": "response.output_item.added", "output_index": 0, "item": item}
    return [RESPONSE[0], added, *({"output_index": 0, "content_index": 0, **event} for event in events)]


OLD = {**TEXT, "text": "old"}


@pytest.mark.parametrize(
    ("passed", "kinds", "said"),
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
            "a part that only ends",
            "a part in the item",
            "odd parts",
        ),
        *("arguments begun in the item", "a part that we don't know", "no text in its events", "text of no item"),
    ],
)
def test_servers_that_leave_events_out(passed: list[JSON], kinds: str, said: JSON) -> None:
    """What was never opened is not closed; what was said is kept wherever it was said."""
    end = end_of("responses", passed)
    assert [event["type"] for event in end[:-1]] == [f"response.{kind}" for kind in kinds.split()]
    (item,) = response_of(end)["output"]
    assert {name: item[name] for name in said} == said
    assert item["status"] == "incomplete"


@pytest.mark.parametrize(
    "odd",
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
def test_an_event_that_makes_no_sense_changes_nothing(odd: JSON) -> None:
    """Of a kind that we don't know, of nothing that is open, or empty: the end is the same as without it."""
    passed = RESPONSE[:12]
    assert end_of("responses", [*passed, odd]) == end_of("responses", passed)


def test_items_and_parts_stand_by_their_index() -> None:
    """Whichever of them came first: clients find them by it."""
    late = {"type": "response.output_item.added", "output_index": 0, "item": MESSAGE}
    words = [
        {"type": "response.output_text.delta", "output_index": 0, "content_index": index, "delta": f"{index}"}
        for index in (2, 0, 1)
    ]
    response = response_of(end_of("responses", [RESPONSE[0], RESPONSE[20], late, *words]))
    message, function = response["output"]
    assert [part["text"] for part in message["content"]] == ["0", "1", "2"]
    assert function["id"] == FUNCTION["id"]


def test_text_after_its_item_was_done_is_no_part_of_it() -> None:
    """The item as it was ended is the last word."""
    late = {"type": "response.output_text.delta", **_SAID, "delta": "late"}
    response = response_of(end_of("responses", [*RESPONSE[:20], late]))
    assert response["output"][1] == RESPONSE[19]["item"]


def test_a_response_of_which_nothing_passed() -> None:
    """It is created first, since SDKs take nothing else before; its id is nobody's."""
    created, last = end_of("responses", [])
    assert (created["type"], created["sequence_number"], last["sequence_number"]) == ("response.created", 0, 1)
    assert created["response"]["status"] == "in_progress"
    assert created["response"]["id"] == last["response"]["id"] == "resp_unknown"


@pytest.mark.parametrize("kind", sorted(RESPONSE_ENDS))
def test_a_response_that_has_ended_gets_no_second_end(kind: str) -> None:
    """Its own last event was the end."""
    ending = ending_of("responses", RESPONSE)
    assert not ending.has_finished
    ending.see({"type": kind, "sequence_number": len(RESPONSE), "response": HEAD})
    assert ending.has_finished
    assert ending.at_limit(USED, shows_usage=True) == b""


# ------------------------------------------------------------------------------------------------------ odd upstreams

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
ODD_CHUNK = st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3) | st.fixed_dictionaries(
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


@given(st.lists(ODD_CHUNK, max_size=8), st.sampled_from(["chat", "completions"]), st.integers(1, 3))
def test_no_chunk_is_too_odd(passed: list[JSON], endpoint: EndpointName, choices: int) -> None:
    """Whatever JSON an upstream sends: it is taken note of or passed over, and the end is one that can be read."""
    end = end_of(endpoint, passed, choices=choices, shows_usage=True)
    assert end[-1]["usage"] == USAGE


@given(st.integers(0, len(EVENTS)), st.lists(ODD_CHUNK, max_size=8))
def test_no_event_is_too_odd(cut: int, odd: list[JSON]) -> None:
    """Wherever in a response it comes: then there is an end that can be read, unless it was an end itself."""
    ending = ending_of("responses", [*RESPONSE[:cut], *odd])
    end = chunks(ending.at_limit(USED, shows_usage=False))
    assert ending.has_finished == any(event.get("type") in sorted(RESPONSE_ENDS) for event in odd)
    assert [event["response"]["usage"] for event in end[-1:]] == [RESPONSE_USAGE] * (not ending.has_finished)


# ------------------------------------------------------------------------------------------- read by the official SDK


async def cut_completion(stream: AsyncChatCompletionStream[Any]) -> ChatCompletion:
    """What the SDK has gathered of a chat. It gives it in an error, as it does with every answer cut by length."""
    with pytest.raises(LengthFinishReasonError) as cut:
        await stream.get_final_completion()
    return cut.value.completion


@pytest.mark.parametrize("usage", [{}, ASKED], ids=["unasked", "asked"])
@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
@pytest.mark.parametrize("words", [0, 1, 7])
async def test_the_sdk_reads_a_chat_that_was_stopped(words: int, crlf: bool, usage: JSON) -> None:
    """All words that passed, cut by length, usage if and only if it was asked for; in both ways to read a stream."""
    newline = b"\r\n" if crlf else b"\n"
    passed = beginning(recorded(Endpoint.CHAT, crlf=crlf, **usage), words)
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
    """The finished one keeps its reason, the others are cut by length, and each has its own words."""
    stream = recorded(Endpoint.CHAT, n=3)
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
    """A message of the assistant without a word, not half an object."""
    passed = beginning(recorded(Endpoint.CHAT), 3)
    async with (
        sdk_reading(stopped(Endpoint.CHAT, passed, choices=2)) as sdk,
        sdk.chat.completions.stream(model="m", messages=HELLO, n=2) as reading,
    ):
        final = await cut_completion(reading)
    assert [choice.finish_reason for choice in final.choices] == ["length", "length"]
    assert (final.choices[1].message.role, final.choices[1].message.content) == ("assistant", "")


async def test_the_sdk_reads_a_chat_that_was_stopped_in_a_tool_call() -> None:
    """The reason says that its arguments are not whole; what passed of them is there."""
    opening = recorded(Endpoint.CHAT).opening
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


@pytest.mark.parametrize("usage", [{}, ASKED], ids=["unasked", "asked"])
async def test_the_sdk_reads_completions_that_were_stopped(usage: JSON) -> None:
    """All words of both that passed, cut by length, usage if and only if it was asked for."""
    passed = beginning(recorded(Endpoint.COMPLETIONS, n=2, **usage), 6)
    expected = ["", ""]
    for said in chunks(passed):
        expected[said["choices"][0]["index"]] += said["choices"][0]["text"]
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
    """Incomplete, because of its length, with all words that passed and its usage; numbered without a gap."""
    passed = beginning(recorded(Endpoint.RESPONSES, crlf=crlf), words)
    text = said_in(chunks(passed), "output_text")
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
async def test_the_sdk_gathers_a_response_that_was_stopped_anywhere(cut: int) -> None:
    """After each event, in the middle of thoughts, refusals and tool calls: its accumulator takes our end."""
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in RESPONSE[:cut])
    async with (
        sdk_reading(stopped(Endpoint.RESPONSES, body)) as sdk,
        sdk.responses.stream(model="m", input="x") as stream,
    ):
        events = [event async for event in stream]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == said_in(RESPONSE[:cut], "output_text")
    done = {event.output_index: event.item for event in events if event.type == "response.output_item.done"}
    assert [done[index].to_dict() for index in sorted(done)] == [item.to_dict() for item in last.response.output]


async def test_the_helpers_of_the_sdk_raise_as_at_the_upstreams_own_maximum() -> None:
    """They give no final object of any answer that was cut, whoever cut it; the error is the same, word for word."""
    said = []
    for endpoint in (Endpoint.CHAT, Endpoint.RESPONSES):
        maximum: Any = {MAXIMUM[endpoint]: 5}
        theirs = beginning(recorded(endpoint, **maximum), 5, closing=9)
        ours = stopped(endpoint, beginning(recorded(endpoint), 5))
        for body in (theirs, ours):
            with pytest.raises((LengthFinishReasonError, RuntimeError)) as raised:
                await _final(endpoint, body)
            said.append((type(raised.value), str(raised.value)))
    assert said[0] == said[1]
    assert said[2] == said[3] == (RuntimeError, "Didn't receive a `response.completed` event.")


async def _final(endpoint: Endpoint, body: bytes) -> None:
    async with sdk_reading(body) as sdk:
        if endpoint is Endpoint.CHAT:
            async with sdk.chat.completions.stream(model="m", messages=HELLO) as chat:
                await chat.get_final_completion()
        else:
            async with sdk.responses.stream(model="m", input="x") as response:
                await response.get_final_response()
