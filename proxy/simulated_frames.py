"""The simulated answer as bytes: JSON bodies, and the events of streams, in the shapes that OpenAI gives them.

One word of the text is one event. The chunk around it is written once for each stream and then only filled in.

Pure: takes a script, gives bytes; `simulator` sends them.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.simulated_text import Choice, Endpoint, Script

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
        write = _chat_choice if is_chat else _text_choice
        answer["choices"] = [write(index, choice) for index, choice in enumerate(script.choices)]
    if not script.directions.no_usage:
        answer["usage"] = _usage(script)
    return orjson.dumps(answer)


def _head(script: Script, id: str, created: int, kind: str) -> JSON:
    head = {"id": id, "object": kind, "created": created, "model": script.asked["model"]}
    return {**head, "service_tier": "default", "system_fingerprint": "fp_simulated"}


def _chat_choice(index: int, choice: Choice) -> JSON:
    message: JSON = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}


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
    response["output"] = [_message(id, response["status"], [_text_part(choice.text)])]
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
    directions = script.directions
    head = _head(script, id, created, "chat.completion.chunk" if is_chat else "text_completion")
    # Once usage is asked for, every chunk but the one with the figures says null.
    usage: JSON = {"usage": None} if script.is_usage_asked and not directions.no_usage else {}

    def chunk(choices: list[JSON], **more: JSON) -> bytes:
        return b"data: " + orjson.dumps({**head, "choices": choices, **usage, **more}) + end + end

    def piece(index: int, text: str | None, finish: str | None = None) -> JSON:
        said: JSON = {"text": text or ""}
        if is_chat:
            said = {"delta": {} if text is None else {"content": text}}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}

    indices = range(len(script.choices))
    opening = []
    if is_chat:
        first = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        opening = [chunk([{"index": i, **first, "logprobs": None, "finish_reason": None}]) for i in indices]
    frames = [chunk([piece(i, MARK)]) for i in indices]
    finishes = [piece(i, None, choice.finish_reason) for i, choice in enumerate(script.choices)]
    closing = [chunk([finish]) for finish in finishes]
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


def _interleave(choices: tuple[Choice, ...], frames: list[bytes]) -> Iterator[bytes]:
    """Yield one chunk for each word, the choices in turn."""
    halves = [frame.rpartition(MARK_WRITTEN) for frame in frames]
    for position in range(max(len(choice.words) for choice in choices)):
        space = b" " if position else b""
        for (before, _, after), choice in zip(halves, choices, strict=True):
            if position < len(choice.words):
                yield before + space + choice.words[position] + after


def _response_stream(script: Script, id: str, created: int, end: bytes) -> Stream:
    choice = script.choices[0]
    words = choice.words
    finished = _finished_response(script, id, created)
    place = {"item_id": f"msg_{id}", "output_index": 0, "content_index": 0}

    def event(number: int, type: str, **said: Any) -> bytes:
        body = orjson.dumps({"type": type, "sequence_number": number, **said})
        return b"event: " + type.encode() + end + b"data: " + body + end + end

    def deltas() -> Iterator[bytes]:
        frame = event(0, "response.output_text.delta", **place, logprobs=[], delta=MARK)
        before, _, after = frame.rpartition(MARK_WRITTEN)
        before, _, between = before.partition(b'"sequence_number":0')
        for position, word in enumerate(words):
            space = b" " if position else b""
            yield b'%b"sequence_number":%d%b%b%b%b' % (before, 4 + position, between, space, word, after)

    opening = [
        event(0, "response.created", response=_response(script, id, created, "in_progress")),
        event(1, "response.in_progress", response=_response(script, id, created, "in_progress")),
        event(2, "response.output_item.added", output_index=0, item=_message(id, "in_progress", [])),
        event(3, "response.content_part.added", **place, part=_text_part("")),
    ]
    last = 4 + len(words)
    closing = [
        event(last, "response.output_text.done", **place, logprobs=[], text=choice.text),
        event(last + 1, "response.content_part.done", **place, part=_text_part(choice.text)),
        event(last + 2, "response.output_item.done", output_index=0, item=finished["output"][0]),
        event(last + 3, f"response.{finished['status']}", response=finished),
    ]
    broken_at = 4 + min(script.directions.fault_after, len(words))
    usage_at = None if script.directions.no_usage else 3
    return Stream(opening, deltas(), closing, usage_at, [event(broken_at, "error", **STREAM_ERROR)])
