"""The simulated answer as bytes: JSON bodies, and the events of streams, in the shapes that OpenAI gives them.

One word of the text is one event. The chunk around it is written once for each stream and then only filled in.

Pure: takes a script, gives bytes; `simulator` sends them.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from proxy.simulator.text import Choice, Endpoint, Script, Tool

JSON = dict[str, Any]

MARK = "\0"  # stands where the word goes; nothing of a request's own comes after it in a chunk
MARK_WRITTEN = b"\\u0000"
STREAM_ERROR = {"code": "server_error", "message": "The server had an error processing your request.", "param": None}


@dataclass(frozen=True, slots=True)
class Stream:
    """A streamed answer: events before the text, one for each word, events after it; the error to break it with."""

    opening: list[bytes]
    text: Iterator[bytes]
    closing: list[bytes]
    usage_at: int | None  # which of the closing events carries the usage
    error: list[bytes]


# -------------------------------------------------------------------------------------------------- whole answers


def write_whole(script: Script, *, id: str, created: int) -> bytes:
    """Return the JSON body of the answer."""
    if script.endpoint is Endpoint.RESPONSES:
        return orjson.dumps(_finished_response(script, id, created))
    if script.endpoint is Endpoint.EMBEDDINGS:
        answer = _embeddings(script)
    else:
        is_chat = script.endpoint is Endpoint.CHAT
        answer = _head(script, id, created, "chat.completion" if is_chat else "text_completion")
        write = partial(_chat_choice, script.tool) if is_chat else _text_choice
        answer["choices"] = [write(index, choice) for index, choice in enumerate(script.choices)]
    if not script.directions.no_usage:
        answer["usage"] = _usage(script)
    return orjson.dumps(answer)


def _head(script: Script, id: str, created: int, kind: str) -> JSON:
    head = {"id": id, "object": kind, "created": created, "model": script.asked["model"]}
    return {**head, "service_tier": "default", "system_fingerprint": "fp_simulated"}


def _chat_choice(tool: Tool | None, index: int, choice: Choice) -> JSON:
    message: JSON = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
    if tool is not None:
        message |= {"content": None, "tool_calls": [_tool_call(tool, index, tool.arguments(choice))]}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": _finish_reason(tool, choice)}


def _tool_call(tool: Tool, index: int, arguments: str) -> JSON:
    called = {"name": tool.name, "arguments": arguments}
    return {"id": f"call_{index}", "type": "function", "function": called}


def _finish_reason(tool: Tool | None, choice: Choice) -> str:
    return "tool_calls" if tool is not None and not choice.is_cut_short else choice.finish_reason


def _text_choice(index: int, choice: Choice) -> JSON:
    return {"text": choice.text, "index": index, "logprobs": None, "finish_reason": choice.finish_reason}


def _embeddings(script: Script) -> JSON:
    is_base64 = script.asked.get("encoding_format") == "base64"
    vectors = (
        base64.b64encode(vector.tobytes()).decode() if is_base64 else vector.tolist() for vector in script.vectors
    )
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": script.asked["model"]}


def _usage(script: Script) -> JSON:
    prompt, completion = script.reported
    if script.endpoint is Endpoint.EMBEDDINGS:
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


def _response(script: Script, id: str, created: int, status: str) -> JSON:
    """Return a response as it stands before anything was said."""
    asked = script.asked
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": script.maximum,
        "model": asked["model"],
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": asked.get("store") is not False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None,
        "metadata": asked.get("metadata") or {},
    }


def _finished_response(script: Script, id: str, created: int) -> JSON:
    choice = script.choices[0]
    response = _response(script, id, created, "incomplete" if choice.is_cut_short else "completed")
    if choice.is_cut_short:
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    response["output"] = [_output(script.tool, id, response["status"], choice)]
    if not script.directions.no_usage:
        taken, given = script.reported
        response["usage"] = {
            "input_tokens": taken,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": given,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": taken + given,
        }
    return response


def _output(tool: Tool | None, id: str, status: str, choice: Choice) -> JSON:
    if tool is None:
        return _message(id, status, [_text_part(choice.text)])
    return _function_call(tool, id, status, tool.arguments(choice))


def _function_call(tool: Tool, id: str, status: str, arguments: str) -> JSON:
    said = {"call_id": f"call_{id}", "name": tool.name, "arguments": arguments}
    return {"type": "function_call", "id": f"fc_{id}", "status": status, **said}


def _message(id: str, status: str, content: list[JSON]) -> JSON:
    return {"type": "message", "id": f"msg_{id}", "status": status, "role": "assistant", "content": content}


def _text_part(text: str) -> JSON:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


# -------------------------------------------------------------------------------------------------------- streams


def write_stream(script: Script, *, id: str, created: int) -> Stream:
    """Return the events of the answer."""
    end = b"\r\n" if script.directions.crlf else b"\n"
    if script.endpoint is Endpoint.RESPONSES:
        return _response_stream(script, id, created, end)
    return _chunk_stream(script, id, created, end)


def _chunk_stream(script: Script, id: str, created: int, end: bytes) -> Stream:
    is_chat = script.endpoint is Endpoint.CHAT
    directions, tool = script.directions, script.tool
    head = _head(script, id, created, "chat.completion.chunk" if is_chat else "text_completion")
    # Once usage is asked for, every chunk but the one with the figures says null.
    usage: JSON = {"usage": None} if script.is_usage_asked and not directions.no_usage else {}

    def chunk(choices: list[JSON], **more: JSON) -> bytes:
        return b"data: " + orjson.dumps({**head, "choices": choices, **usage, **more}) + end + end

    def piece(index: int, text: str | None, finish: str | None = None) -> JSON:
        said: JSON = {"text": text or ""}
        if is_chat:
            said = {"delta": {} if text is None else _delta(tool, text)}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}

    indices = range(len(script.choices))
    opening = []
    if is_chat:
        opening = [
            chunk([{"index": i, "delta": _first_delta(tool, i), "logprobs": None, "finish_reason": None}])
            for i in indices
        ]
    frames = [chunk([piece(i, MARK)]) for i in indices]
    reason_of = partial(_finish_reason, tool if is_chat else None)
    finishes = [piece(i, None, reason_of(choice)) for i, choice in enumerate(script.choices)]
    closing = [chunk([piece(i, tool.closing)]) for i in indices] if is_chat and tool else []
    closing += [chunk([finish]) for finish in finishes]
    usage_at = None
    if directions.usage_early:
        usage_at = len(closing) - 1
        closing[-1] = chunk([finishes[-1]], usage=_usage(script))
    elif usage:
        usage_at = len(closing)
        closing.append(chunk([], usage=_usage(script)))
    done = [] if directions.no_done else [b"data: [DONE]" + end + end]
    error = b"data: " + orjson.dumps({"error": {**STREAM_ERROR, "type": "server_error"}}) + end + end
    return Stream(opening, _interleave(script.choices, frames), closing + done, usage_at, [error, *done])


def _delta(tool: Tool | None, text: str) -> JSON:
    """What a chunk adds: words to a message, or to the argument of what it calls."""
    return {"content": text} if tool is None else {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}


def _first_delta(tool: Tool | None, index: int) -> JSON:
    first: JSON = {"role": "assistant", "content": "", "refusal": None}
    if tool is not None:
        first |= {"content": None, "tool_calls": [{"index": 0, **_tool_call(tool, index, tool.opening)}]}
    return first


def _interleave(choices: tuple[Choice, ...], frames: list[bytes]) -> Iterator[bytes]:
    """Yield one chunk for each word, the choices in turn."""
    halves = [frame.rpartition(MARK_WRITTEN) for frame in frames]
    for position in range(max(len(choice.words) for choice in choices)):
        space = b" " if position else b""
        for (before, _, after), choice in zip(halves, choices, strict=True):
            if position < len(choice.words):
                yield before + space + choice.words[position] + after


Said = tuple[str, JSON]  # the type of an event, and what it says


@dataclass(frozen=True, slots=True)
class _Item:
    """The events of the one item of a response: before its words, the frame of each of them, and after."""

    opening: list[Said]
    delta: Said
    closing: list[Said]


def _response_stream(script: Script, id: str, created: int, end: bytes) -> Stream:
    words = script.choices[0].words
    finished = _finished_response(script, id, created)
    begun = {"response": _response(script, id, created, "in_progress")}
    item = _said_item(script.choices[0], id) if script.tool is None else _called_item(script.tool, finished, id)
    opening = [("response.created", begun), ("response.in_progress", begun), *item.opening]
    done = {"output_index": 0, "item": finished["output"][0]}
    closing = [*item.closing, ("response.output_item.done", done)]
    closing.append((f"response.{finished['status']}", {"response": finished}))

    def event(number: int, type: str, said: JSON) -> bytes:
        body = orjson.dumps({"type": type, "sequence_number": number, **said})
        return b"event: " + type.encode() + end + b"data: " + body + end + end

    def deltas() -> Iterator[bytes]:
        before, _, after = event(0, *item.delta).rpartition(MARK_WRITTEN)
        before, _, between = before.partition(b'"sequence_number":0')
        for position, word in enumerate(words):
            space = b" " if position else b""
            number = len(opening) + position
            yield b'%b"sequence_number":%d%b%b%b%b' % (before, number, between, space, word, after)

    broken_at = len(opening) + min(script.directions.fault_after, len(words))
    return Stream(
        [event(number, *said) for number, said in enumerate(opening)],
        deltas(),
        [event(number, *said) for number, said in enumerate(closing, len(opening) + len(words))],
        None if script.directions.no_usage else len(closing) - 1,
        [event(broken_at, "error", STREAM_ERROR)],
    )


def _said_item(choice: Choice, id: str) -> _Item:
    place = {"item_id": f"msg_{id}", "output_index": 0, "content_index": 0}
    added = {"output_index": 0, "item": _message(id, "in_progress", [])}
    return _Item(
        [("response.output_item.added", added), ("response.content_part.added", {**place, "part": _text_part("")})],
        ("response.output_text.delta", {**place, "logprobs": [], "delta": MARK}),
        [
            ("response.output_text.done", {**place, "logprobs": [], "text": choice.text}),
            ("response.content_part.done", {**place, "part": _text_part(choice.text)}),
        ],
    )


def _called_item(tool: Tool, finished: JSON, id: str) -> _Item:
    place = {"item_id": f"fc_{id}", "output_index": 0}
    added = {"output_index": 0, "item": _function_call(tool, id, "in_progress", "")}
    delta = "response.function_call_arguments.delta"
    arguments = finished["output"][0]["arguments"]
    return _Item(
        [("response.output_item.added", added), (delta, {**place, "delta": tool.opening})],
        (delta, {**place, "delta": MARK}),
        [
            (delta, {**place, "delta": tool.closing}),
            ("response.function_call_arguments.done", {**place, "arguments": arguments}),
        ],
    )
