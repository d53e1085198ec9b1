"""The simulated answer on Anthropic's surface: a message as JSON, and the events of its stream.

One word of the text is one event. What a request asks to be `cached` of its input is said apart from the rest, as
Anthropic does. Pure: takes a script, gives bytes; `simulator` sends them.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from proxy.simulator.directives import Complaint
from proxy.simulator.frames import Stream
from proxy.simulator.text import Script

JSON = dict[str, Any]

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_INPUT_DELTA = {"type": "input_json_delta"}
_OVERLOADED: JSON = {"type": "overloaded_error", "message": "Overloaded"}


def write_message(script: Script, *, id: str) -> bytes:
    """Return the JSON body of the answer."""
    message = _message(script, id)
    block, tool = _block(script), script.tool
    said = {"text": script.choices[0].text} if tool is None else {"input": {tool.argument: script.choices[0].text}}
    message["content"] = [{**block, **said}]
    message["stop_reason"] = _stop_reason(script)
    if not script.directions.no_usage:
        message["usage"] = {**_input(script), "output_tokens": script.reported[1]}
    return orjson.dumps(message)


def write_message_stream(script: Script, *, id: str) -> Stream:
    """Return the events of the answer."""
    tool = script.tool
    end = b"\r\n" if script.directions.crlf else b"\n"

    def event(type: str, **said: Any) -> bytes:
        return b"event: %b%bdata: %b%b%b" % (type.encode(), end, orjson.dumps({"type": type, **said}), end, end)

    def delta_of(text: str) -> bytes:
        said = {"type": "text_delta", "text": text} if tool is None else {**_INPUT_DELTA, "partial_json": text}
        return event("content_block_delta", index=0, delta=said)

    def deltas() -> Iterator[bytes]:
        for position, word in enumerate(script.choices[0].words):
            text = (b" " if position else b"") + word
            yield delta_of(text.decode())

    begun, usage = _message(script, id), {}
    if not script.directions.no_usage:
        begun["usage"] = {**_input(script), "output_tokens": min(1, script.reported[1])}
        usage = {"usage": {**_input(script), "output_tokens": script.reported[1]}}
    opening = [
        event("message_start", message=begun),
        event("content_block_start", index=0, content_block=_block(script)),
        event("ping"),
        *([delta_of(tool.opening)] if tool else []),
    ]
    delta = {"stop_reason": _stop_reason(script), "stop_sequence": None}
    closing = [delta_of(tool.closing)] if tool else []
    closing += [event("content_block_stop", index=0), event("message_delta", delta=delta, **usage)]
    done = [] if script.directions.no_done else [event("message_stop")]
    return Stream(
        opening,
        deltas(),
        closing + done,
        None if script.directions.no_usage else len(closing) - 1,
        [event("error", error=_OVERLOADED)],
    )


def write_complaint(complaint: Complaint, *, id: str) -> bytes:
    """Return the body of an error in Anthropic's shape."""
    usual = "invalid_request_error" if complaint.status < 500 else "api_error"
    type = "overloaded_error" if complaint.status == 529 else _TYPES.get(complaint.status, usual)
    error = {"type": type, "message": complaint.error["message"]}
    return orjson.dumps({"type": "error", "error": error, "request_id": id})


def _message(script: Script, id: str) -> JSON:
    head = {"id": id, "type": "message", "role": "assistant", "model": script.asked["model"]}
    return {**head, "content": [], "stop_reason": None, "stop_sequence": None}


def _block(script: Script) -> JSON:
    """The one block of its content, before anything is said."""
    if script.tool is None:
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": "toolu_0", "name": script.tool.name, "input": {}}


def _stop_reason(script: Script) -> str:
    if script.choices[0].is_cut_short:
        return "max_tokens"
    return "end_turn" if script.tool is None else "tool_use"


def _input(script: Script) -> JSON:
    """The input in three parts that add up: half of what is `cached` was read, the rest written."""
    taken = script.reported[0]
    cached = min(script.directions.cached, taken)
    read = cached // 2
    return {
        "input_tokens": taken - cached,
        "cache_creation_input_tokens": cached - read,
        "cache_read_input_tokens": read,
    }
