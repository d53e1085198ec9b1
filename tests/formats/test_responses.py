"""Answers of /responses: what is charged, what the client gets, and how a stream is stopped.

The end of a stopped stream is checked after each event of a response, and the official SDK reads the beginning of an
answer followed by the proxy's end from a real socket. Source: docs/wire.md, section 2.4 (events of /responses).
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import UpstreamError
from proxy.formats.endpoints import (
    COMPACT,
    RESPONSES,
)
from proxy.formats.meter import JSON
from proxy.formats.responses import RESPONSE_ENDS
from proxy.formats.surfaces import error_event
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Usage
from proxy.simulator.text import Endpoint as Simulated
from tests.formats.streams import (
    ANYTHING,
    COUNTED,
    DONE,
    REPORTED,
    RESPONSE_USAGE,
    USED,
    beginning,
    end_of,
    ending_of,
    event,
    new,
    parsed,
    request,
    sdk_reading,
    simulated,
    stopped,
    usage_of,
    watch,
    whole,
)


def response_event(kind: str, **more: object) -> bytes:
    """An event of a response."""
    return f"event: {kind}\n".encode() + event({"type": kind, "sequence_number": 1, **more})


HELLO = response_event("response.output_text.delta", delta="Hello") + response_event(
    "response.output_text.delta", delta=" world!"
)


@pytest.mark.parametrize(
    ("kind", "has_error"),
    [("response.completed", False), ("response.incomplete", False), ("response.failed", True), ("error", True)],
)
@pytest.mark.parametrize(
    ("response", "expected"), [({"usage": RESPONSE_USAGE}, REPORTED), ({}, COUNTED), ({"usage": None}, COUNTED)]
)
def test_a_response_ends_with_one_of_four_events(kind: str, has_error: bool, response: dict, expected: Usage) -> None:
    """With each of them the reported usage is charged, or else the counted text; all bytes are forwarded."""
    stream = (
        response_event("response.created", response={"usage": None}) + HELLO + response_event(kind, response=response)
    )
    meter, shown = watch(stream, request(RESPONSES))
    assert shown == stream
    assert (meter.is_at_end, meter.is_over, meter.has_error) == (True, True, has_error)
    assert meter.usage() == expected


def test_a_flat_error_ends_a_response() -> None:
    """`{"type":"error","code":…,"message":…}` contains no response."""
    meter, _ = watch(
        HELLO + response_event("error", code="server_error", message="It broke.", param=None), request(RESPONSES)
    )
    assert (meter.is_over, meter.has_error, meter.usage()) == (True, True, COUNTED)


def test_events_before_the_end_of_a_response_are_not_kept() -> None:
    """Nothing is kept, and text that `.done` events repeat is counted once."""
    stream = b"".join(
        [
            response_event("response.created", response={"usage": None, "error": None}),
            HELLO,
            response_event("response.output_text.done", text="Hello world"),
            response_event("response.output_item.done", item={"content": [{"text": "Hello world"}]}),
        ]
    )
    meter, shown = watch(stream, request(RESPONSES))
    assert (meter.is_at_end, meter.has_error, shown) == (False, False, stream)
    assert meter.usage() == COUNTED


@pytest.mark.parametrize(
    "events",
    [
        response_event("response.output_text.done", text="Hello world!"),
        response_event("response.refusal.done", refusal="Hello world!"),
        response_event("response.function_call_arguments.done", arguments="Hello world!"),
        response_event("response.custom_tool_call_input.done", input="Hello world!"),
        response_event("response.content_part.done", part={"type": "output_text", "text": "Hello world!"}),
        response_event("response.output_item.done", item={"type": "message", "content": [{"text": "Hello world!"}]}),
        response_event("response.completed", response={"output": [{"content": [{"text": "Hello world!"}]}]}),
        response_event("response.output_text.delta", delta="Hello")
        + response_event("response.output_text.done", text="Hello world!"),
    ],
)
def test_a_text_that_comes_only_as_a_whole_is_counted(events: bytes) -> None:
    """Some servers send no deltas, or not all. Text that came in deltas is not counted again."""
    assert usage_of(events, request(RESPONSES)) == COUNTED
    assert usage_of(events * 3, request(RESPONSES)) == (
        AtLeast(Tokens(0, 12 + 2 * 5)) if b".delta" in events else COUNTED
    )


def test_the_id_of_a_response_is_known_from_its_first_event() -> None:
    """Also from a whole response. A value that could not be used in a path is ignored."""
    begun = response_event("response.created", response={"id": "resp_1"})
    assert new(request(RESPONSES)).response_id is None
    assert watch(begun, request(RESPONSES))[0].response_id == "resp_1"
    strange = response_event("response.completed", response={"id": "resp/../2"})
    assert watch(begun + strange, request(RESPONSES))[0].response_id == "resp_1"
    assert whole({"id": "resp_3"}, RESPONSES).response_id == "resp_3"
    for strange in (None, 3, ["resp_3"], "", "x" * 600):
        assert whole({"id": strange}, RESPONSES).response_id is None
    assert whole({"id": "chatcmpl-1"}).response_id is None


def test_a_response_that_the_upstream_has_not_finished_has_an_error() -> None:
    """A stream without its last event, and a whole response that is in progress: the rest could be read later."""
    begun = response_event("response.created", response={"id": "resp_1"})
    for last in ("completed", "incomplete"):
        meter = watch(begun + response_event(f"response.{last}", response={}), request(RESPONSES))[0]
        meter.end()
        assert not meter.has_error
        assert not whole({"id": "resp_1", "status": last}, RESPONSES).has_error
    meter = watch(begun, request(RESPONSES))[0]
    assert not meter.has_error
    meter.end()
    assert meter.has_error
    for status in ("queued", "in_progress", "failed", "cancelled", "pending", "QUEUED", "", 1, ["completed"]):
        assert whole({"id": "resp_1", "status": status}, RESPONSES).has_error
        last = response_event("response.completed", response={"id": "resp_1", "status": status})
        assert watch(begun + last, request(RESPONSES))[0].has_error


@pytest.mark.parametrize(
    ("tools", "tokens"),
    [
        ({"image_gen": {"input_tokens": 7, "output_tokens": 272, "total_tokens": 279}}, Tokens(17, 277)),
        ({"image_gen": {"input_tokens": 0, "output_tokens": 0}, "web_search": {"num_requests": 2}}, Tokens(10, 5)),
        ({"image_gen": None}, Tokens(10, 5)),
        ("none", Tokens(10, 5)),
    ],
)
def test_the_tokens_of_the_image_tool_are_added_to_the_usage(tools: object, tokens: Tokens) -> None:
    """The usage of a response does not include them. Without that usage nothing is exact."""
    response = {"id": "resp_1", "usage": {"input_tokens": 10, "output_tokens": 5}, "tool_usage": tools}
    assert whole(response, RESPONSES).usage() == Exactly(tokens)
    assert usage_of(response_event("response.completed", response=response), request(RESPONSES)) == Exactly(tokens)
    del response["usage"]
    assert isinstance(whole(response, RESPONSES).usage(), AtLeast)


def test_a_done_after_a_response_is_accepted() -> None:
    """Some compatible servers send it."""
    end = response_event("response.completed", response={"usage": RESPONSE_USAGE})
    meter, shown = watch(HELLO + end + DONE, request(RESPONSES))
    assert (meter.is_over, meter.usage(), shown) == (True, REPORTED, HELLO + end + DONE)


@pytest.mark.parametrize(
    ("kind", "delta", "tokens"),
    [
        ("response.refusal.delta", "x" * 400, 400),
        ("response.function_call_arguments.delta", "x" * 400, 400),
        ("response.reasoning_summary_text.delta", "x" * 400, 400),
        ("response.custom_tool_call_input.delta", "é" * 200, 400),
        ("response.output_text.delta", "", 0),
        ("response.output_text.delta", None, 0),
        ("response.output_text.delta", {"text": "x"}, 1),
        ("response.output_text.done", "x" * 400, 0),
        (None, "x" * 400, 400),
        (7, "x" * 400, 400),
    ],
)
def test_every_delta_of_text_is_counted(kind: object, delta: object, tokens: int) -> None:
    """Whatever it is a part of. The padding in `obfuscation` is not counted."""
    raw = event({"type": kind, "delta": delta, "obfuscation": "xyz" * 99, "item_id": "m" * 99})
    assert usage_of(raw, request(RESPONSES)) == AtLeast(Tokens(0, tokens))


@pytest.mark.parametrize("response", [None, "x", [], {"usage": []}, {"usage": {"input_tokens": -1}}])
def test_an_end_event_with_an_invalid_response_ends_it(response: object) -> None:
    """The text is then counted by the proxy."""
    meter, _ = watch(HELLO + response_event("response.completed", response=response), request(RESPONSES))
    assert (meter.is_over, meter.usage()) == (True, COUNTED)


def test_a_compaction_without_usage_is_counted() -> None:
    """It is billed in tokens like any response."""
    assert whole({"output": [], "usage": RESPONSE_USAGE}, COMPACT).usage() == Exactly(Tokens(11, 5))
    silent = whole({"output": [{"type": "compaction", "id": "c", "encrypted_content": "secret"}]}, COMPACT)
    assert (silent.usage(), silent.uncounted_texts) == (AtLeast(Tokens(0, 0)), ["secret"])


# ------------------------------------------------------------------------------------------- streams that are stopped


CHARGED_USAGE = {
    "input_tokens": 11,
    "input_tokens_details": {"cached_tokens": 3},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 16,
}
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
            "usage": CHARGED_USAGE,
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
    ending.see({"type": kind, "sequence_number": len(RESPONSE), "response": HEAD}, b"")
    assert ending.has_finished
    assert ending.at_limit(USED, shows_usage=True) == b""


KINDS = [f"response.{kind}" for kind, _, _ in EVENTS] + [
    "response.reasoning_text.delta",
    "response.queued",
    "error",
    "x",
]
ITEM = st.sampled_from([REASONING, MESSAGE, FUNCTION, CUSTOM]) | ANYTHING
PART = st.sampled_from([TEXT, REFUSAL, SUMMARY]) | st.fixed_dictionaries({"type": ANYTHING}) | ANYTHING
ANY_EVENT = st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3) | st.fixed_dictionaries(
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
        "choices": ANYTHING,
        "usage": ANYTHING,
        "id": ANYTHING,
    },
)


@given(st.integers(0, len(EVENTS)), st.lists(ANY_EVENT, max_size=8))
def test_any_event_leaves_a_readable_end(cut: int, events: list[JSON]) -> None:
    """Wherever in a response it comes, the end states the usage, unless the event was an end itself."""
    ending = ending_of("responses", [*RESPONSE[:cut], *events])
    end = parsed(ending.at_limit(USED, shows_usage=False))
    assert ending.has_finished == any(event.get("type") in sorted(RESPONSE_ENDS) for event in events)
    assert [event["response"]["usage"] for event in end[-1:]] == [CHARGED_USAGE] * (not ending.has_finished)


# ------------------------------------------------------------------------------------------- read by the official SDK


@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
@pytest.mark.parametrize("words", [0, 1, 7])
async def test_the_sdk_reads_a_response_that_was_stopped(words: int, crlf: bool) -> None:
    """It is incomplete because of its length, with all words and its usage; the numbers have no gap."""
    passed = beginning(simulated(Simulated.RESPONSES, crlf=crlf), words)
    text = text_of(parsed(passed), "output_text")
    async with sdk_reading(stopped(Simulated.RESPONSES, passed, newline=b"\r\n" if crlf else b"\n")) as sdk:
        read = [event async for event in await sdk.responses.create(model="m", input="x", stream=True)]
    last = read[-1]
    assert last.type == "response.incomplete"
    assert (last.response.status, last.response.output_text) == ("incomplete", text)
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.usage is not None
    assert last.response.usage.to_dict() == CHARGED_USAGE
    assert [event.sequence_number for event in read] == list(range(len(read)))


@pytest.mark.parametrize("cut", [0, *CUTS])
async def test_the_sdk_assembles_a_response_that_was_stopped_anywhere(cut: int) -> None:
    """After each event, even inside reasoning, a refusal or a tool call, its accumulator accepts the end."""
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in RESPONSE[:cut])
    async with (
        sdk_reading(stopped(Simulated.RESPONSES, body)) as sdk,
        sdk.responses.stream(model="m", input="x") as stream,
    ):
        events = [event async for event in stream]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == text_of(RESPONSE[:cut], "output_text")
    done = {event.output_index: event.item for event in events if event.type == "response.output_item.done"}
    assert [done[index].to_dict() for index in sorted(done)] == [item.to_dict() for item in last.response.output]


# -------------------------------------------------------------------------------------------------- errors in streams


def test_an_error_in_a_stream_of_responses_has_both_forms() -> None:
    """Older SDKs raise if there is a member `error`, newer ones if the event has that name."""
    error = UpstreamError("It broke\nhalf way.")
    first, second, *rest = error_event(RESPONSES, error).split(b"\n")
    assert (first, rest) == (b"event: error", [b"", b""])
    flat = {"type": "error", "code": "upstream_error", "message": "It broke\nhalf way.", "param": None}
    assert json.loads(second.removeprefix(b"data: ")) == {**flat, **error.body()}


def test_only_its_last_event_ends_a_response() -> None:
    """Not `[DONE]`: the upstream may go on with it, and it could then be read there."""
    for rest, is_broken in ((DONE, True), (response_event("response.completed", response={}) + DONE, False)):
        meter, _ = watch(HELLO + rest, request(RESPONSES))
        meter.end()
        assert (meter.is_over, meter.has_error) == (True, is_broken)
