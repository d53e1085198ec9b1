"""Write answers in OpenAI's formats: JSON bodies, and the events of streams.

In a stream each word of the text is one event. The JSON around the word is serialised once for each stream, with a
placeholder, and each event is made by replacing the placeholder.

Pure: takes an answer, returns bytes; `server` sends them.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from proxy.simulator.text import Answer, Choice, Endpoint, Tool

JSON = dict[str, Any]

# The placeholder for a word, and how JSON spells it. The model's name is in the chunk too and may contain the same
# bytes, but it comes before the word, so the last occurrence in a chunk is the placeholder.
PLACEHOLDER = "\0"
PLACEHOLDER_JSON = b"\\u0000"
STREAM_ERROR = {"code": "server_error", "message": "The server had an error processing your request.", "param": None}


@dataclass(frozen=True, slots=True)
class EventStream:
    """A streamed answer: the events before the text, one event for each word, and the events after the text.

    `usage_at` is the index in `closing` of the event that reports the usage, None if no event does. `error` are the
    events that replace the rest of the stream if it fails.
    """

    opening: list[bytes]
    text: Iterator[bytes]
    closing: list[bytes]
    usage_at: int | None
    error: list[bytes]


# -------------------------------------------------------------------------------------------------- whole answers


def write_whole(answer: Answer, *, id: str, created: int) -> bytes:
    """Return the JSON body of the answer."""
    if answer.endpoint is Endpoint.RESPONSES:
        return orjson.dumps(_finished_response(answer, id, created))
    if answer.endpoint is Endpoint.EMBEDDINGS:
        body = _embeddings(answer)
    else:
        is_chat = answer.endpoint is Endpoint.CHAT
        body = _head(answer, id, created, "chat.completion" if is_chat else "text_completion")
        write = partial(_chat_choice, answer.tool) if is_chat else _text_choice
        body["choices"] = [write(index, choice) for index, choice in enumerate(answer.choices)]
    if not answer.directives.no_usage:
        body["usage"] = _usage(answer)
    return orjson.dumps(body)


def _head(answer: Answer, id: str, created: int, object: str) -> JSON:
    """The fields that a whole answer and each chunk of a stream begin with."""
    head = {"id": id, "object": object, "created": created, "model": answer.params["model"]}
    return {**head, "service_tier": "default", "system_fingerprint": "fp_simulated"}


def _chat_choice(tool: Tool | None, index: int, choice: Choice) -> JSON:
    message: JSON = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
    if tool is not None:
        message |= {"content": None, "tool_calls": [_tool_call(tool, index, tool.arguments(choice))]}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": _finish_reason(tool, choice)}


def _tool_call(tool: Tool, index: int, arguments: str) -> JSON:
    function = {"name": tool.name, "arguments": arguments}
    return {"id": f"call_{index}", "type": "function", "function": function}


def _finish_reason(tool: Tool | None, choice: Choice) -> str:
    return "tool_calls" if tool is not None and not choice.is_cut_short else choice.finish_reason


def _text_choice(index: int, choice: Choice) -> JSON:
    return {"text": choice.text, "index": index, "logprobs": None, "finish_reason": choice.finish_reason}


def _embeddings(answer: Answer) -> JSON:
    is_base64 = answer.params.get("encoding_format") == "base64"
    vectors = (
        base64.b64encode(vector.tobytes()).decode() if is_base64 else vector.tolist() for vector in answer.vectors
    )
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": answer.params["model"]}


def _usage(answer: Answer) -> JSON:
    prompt, completion = answer.usage
    if answer.endpoint is Endpoint.EMBEDDINGS:
        return {"prompt_tokens": prompt, "total_tokens": prompt}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


# ------------------------------------------------------------------------------------------------------ responses


def _response(answer: Answer, id: str, created: int, status: str) -> JSON:
    """Return a response object without output and usage, as it is when the answer begins."""
    params = answer.params
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": params.get("instructions"),
        "max_output_tokens": answer.maximum,
        "model": params["model"],
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": params.get("store") is not False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None,
        "metadata": params.get("metadata") or {},
    }


def _finished_response(answer: Answer, id: str, created: int) -> JSON:
    choice = answer.choices[0]
    response = _response(answer, id, created, "incomplete" if choice.is_cut_short else "completed")
    if choice.is_cut_short:
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    response["output"] = [_output_item(answer.tool, id, response["status"], choice)]
    if not answer.directives.no_usage:
        input_tokens, output_tokens = answer.usage
        response["usage"] = {
            "input_tokens": input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input_tokens + output_tokens,
        }
    return response


def _output_item(tool: Tool | None, id: str, status: str, choice: Choice) -> JSON:
    if tool is None:
        return _message(id, status, [_text_part(choice.text)])
    return _function_call(tool, id, status, tool.arguments(choice))


def _function_call(tool: Tool, id: str, status: str, arguments: str) -> JSON:
    call = {"call_id": f"call_{id}", "name": tool.name, "arguments": arguments}
    return {"type": "function_call", "id": f"fc_{id}", "status": status, **call}


def _message(id: str, status: str, content: list[JSON]) -> JSON:
    return {"type": "message", "id": f"msg_{id}", "status": status, "role": "assistant", "content": content}


def _text_part(text: str) -> JSON:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


# -------------------------------------------------------------------------------------------------------- streams


def write_stream(answer: Answer, *, id: str, created: int) -> EventStream:
    """Return the events of the answer."""
    newline = b"\r\n" if answer.directives.crlf else b"\n"
    if answer.endpoint is Endpoint.RESPONSES:
        return _response_stream(answer, id, created, newline)
    return _chunk_stream(answer, id, created, newline)


def _chunk_stream(answer: Answer, id: str, created: int, newline: bytes) -> EventStream:
    is_chat = answer.endpoint is Endpoint.CHAT
    directives, tool = answer.directives, answer.tool
    head = _head(answer, id, created, "chat.completion.chunk" if is_chat else "text_completion")
    # If usage was requested, OpenAI sends `"usage": null` in each chunk but the one that reports it.
    usage: JSON = {"usage": None} if answer.is_usage_requested and not directives.no_usage else {}

    def chunk(choices: list[JSON], **more: JSON) -> bytes:
        return b"data: " + orjson.dumps({**head, "choices": choices, **usage, **more}) + newline + newline

    def choice_chunk(index: int, text: str | None, finish: str | None = None) -> JSON:
        content: JSON = {"text": text or ""}
        if is_chat:
            content = {"delta": {} if text is None else _delta(tool, text)}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish}

    indices = range(len(answer.choices))
    opening = []
    if is_chat:
        opening = [
            chunk([{"index": i, "delta": _first_delta(tool, i), "logprobs": None, "finish_reason": None}])
            for i in indices
        ]
    templates = [chunk([choice_chunk(i, PLACEHOLDER)]) for i in indices]
    reason_of = partial(_finish_reason, tool if is_chat else None)
    finishes = [choice_chunk(i, None, reason_of(choice)) for i, choice in enumerate(answer.choices)]
    closing = [chunk([choice_chunk(i, tool.closing)]) for i in indices] if is_chat and tool else []
    closing += [chunk([finish]) for finish in finishes]
    usage_at = None
    if directives.usage_early:
        usage_at = len(closing) - 1
        closing[-1] = chunk([finishes[-1]], usage=_usage(answer))
    elif usage:
        usage_at = len(closing)
        closing.append(chunk([], usage=_usage(answer)))
    done = [] if directives.no_done else [b"data: [DONE]" + newline + newline]
    error = b"data: " + orjson.dumps({"error": {**STREAM_ERROR, "type": "server_error"}}) + newline + newline
    return EventStream(opening, _interleave(answer.choices, templates), closing + done, usage_at, [error, *done])


def _delta(tool: Tool | None, text: str) -> JSON:
    """What a chunk adds: words of the message, or a part of the tool call's arguments."""
    return {"content": text} if tool is None else {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}


def _first_delta(tool: Tool | None, index: int) -> JSON:
    first: JSON = {"role": "assistant", "content": "", "refusal": None}
    if tool is not None:
        first |= {"content": None, "tool_calls": [{"index": 0, **_tool_call(tool, index, tool.opening)}]}
    return first


def _interleave(choices: tuple[Choice, ...], templates: list[bytes]) -> Iterator[bytes]:
    """Yield one chunk for each word: the first word of each choice, then the second of each, and so on."""
    halves = [template.rpartition(PLACEHOLDER_JSON) for template in templates]
    for position in range(max(len(choice.words) for choice in choices)):
        space = b" " if position else b""
        for (before, _, after), choice in zip(halves, choices, strict=True):
            if position < len(choice.words):
                yield before + space + choice.words[position] + after


TypedEvent = tuple[str, JSON]  # the type of an event of /responses, and its other fields


@dataclass(frozen=True, slots=True)
class _Item:
    """The events of a response's one output item: before the words, the template for a word, and after the words."""

    opening: list[TypedEvent]
    delta: TypedEvent
    closing: list[TypedEvent]


def _response_stream(answer: Answer, id: str, created: int, newline: bytes) -> EventStream:
    words = answer.choices[0].words
    finished = _finished_response(answer, id, created)
    started = {"response": _response(answer, id, created, "in_progress")}
    item = _text_item(answer.choices[0], id) if answer.tool is None else _tool_item(answer.tool, finished, id)
    opening = [("response.created", started), ("response.in_progress", started), *item.opening]
    done = {"output_index": 0, "item": finished["output"][0]}
    closing = [*item.closing, ("response.output_item.done", done)]
    closing.append((f"response.{finished['status']}", {"response": finished}))

    def event(number: int, type: str, fields: JSON) -> bytes:
        body = orjson.dumps({"type": type, "sequence_number": number, **fields})
        return b"event: " + type.encode() + newline + b"data: " + body + newline + newline

    def deltas() -> Iterator[bytes]:
        # Two places of the template change with each word: the word, and the number before it.
        before, _, after = event(0, *item.delta).rpartition(PLACEHOLDER_JSON)
        before, _, between = before.partition(b'"sequence_number":0')
        for position, word in enumerate(words):
            space = b" " if position else b""
            number = len(opening) + position
            yield b'%b"sequence_number":%d%b%b%b%b' % (before, number, between, space, word, after)

    fault_at = len(opening) + min(answer.directives.fault_after, len(words))
    return EventStream(
        [event(number, *each) for number, each in enumerate(opening)],
        deltas(),
        [event(number, *each) for number, each in enumerate(closing, len(opening) + len(words))],
        None if answer.directives.no_usage else len(closing) - 1,
        [event(fault_at, "error", STREAM_ERROR)],
    )


def _text_item(choice: Choice, id: str) -> _Item:
    part = {"item_id": f"msg_{id}", "output_index": 0, "content_index": 0}
    added = {"output_index": 0, "item": _message(id, "in_progress", [])}
    return _Item(
        [("response.output_item.added", added), ("response.content_part.added", {**part, "part": _text_part("")})],
        ("response.output_text.delta", {**part, "logprobs": [], "delta": PLACEHOLDER}),
        [
            ("response.output_text.done", {**part, "logprobs": [], "text": choice.text}),
            ("response.content_part.done", {**part, "part": _text_part(choice.text)}),
        ],
    )


def _tool_item(tool: Tool, finished: JSON, id: str) -> _Item:
    item = {"item_id": f"fc_{id}", "output_index": 0}
    added = {"output_index": 0, "item": _function_call(tool, id, "in_progress", "")}
    delta = "response.function_call_arguments.delta"
    arguments = finished["output"][0]["arguments"]
    return _Item(
        [("response.output_item.added", added), (delta, {**item, "delta": tool.opening})],
        (delta, {**item, "delta": PLACEHOLDER}),
        [
            (delta, {**item, "delta": tool.closing}),
            ("response.function_call_arguments.done", {**item, "arguments": arguments}),
        ],
    )
