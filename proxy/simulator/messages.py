"""Write answers in Anthropic's format: a message as a JSON body, the events of its stream, and errors.

In a stream each word of the text is one event. Input tokens that the directive `cached` names are reported apart from
the rest, as Anthropic does.

Pure: takes an answer, returns bytes; `server` sends them.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from proxy.simulator.directives import ApiError
from proxy.simulator.frames import EventStream
from proxy.simulator.text import Answer

JSON = dict[str, Any]

_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_INPUT_DELTA = {"type": "input_json_delta"}
_OVERLOADED: JSON = {"type": "overloaded_error", "message": "Overloaded"}


def write_message(answer: Answer, *, id: str) -> bytes:
    """Return the JSON body of the answer."""
    message = _message(answer, id)
    block, tool, text = _content_block(answer), answer.tool, answer.choices[0].text
    content = {"text": text} if tool is None else {"input": {tool.argument: text}}
    message["content"] = [{**block, **content}]
    message["stop_reason"] = _stop_reason(answer)
    if not answer.directives.no_usage:
        message["usage"] = {**_input_usage(answer), "output_tokens": answer.usage[1]}
    return orjson.dumps(message)


def write_message_stream(answer: Answer, *, id: str) -> EventStream:
    """Return the events of the answer."""
    tool = answer.tool
    newline = b"\r\n" if answer.directives.crlf else b"\n"

    def event(type: str, **fields: Any) -> bytes:
        data = orjson.dumps({"type": type, **fields})
        return b"event: %b%bdata: %b%b%b" % (type.encode(), newline, data, newline, newline)

    def delta_event(text: str) -> bytes:
        delta = {"type": "text_delta", "text": text} if tool is None else {**_INPUT_DELTA, "partial_json": text}
        return event("content_block_delta", index=0, delta=delta)

    def deltas() -> Iterator[bytes]:
        for position, word in enumerate(answer.choices[0].words):
            text = (b" " if position else b"") + word
            yield delta_event(text.decode())

    started, usage = _message(answer, id), {}
    if not answer.directives.no_usage:
        # As Anthropic: `message_start` reports the whole input and about one output token, `message_delta` the
        # totals.
        started["usage"] = {**_input_usage(answer), "output_tokens": min(1, answer.usage[1])}
        usage = {"usage": {**_input_usage(answer), "output_tokens": answer.usage[1]}}
    opening = [
        event("message_start", message=started),
        event("content_block_start", index=0, content_block=_content_block(answer)),
        event("ping"),
        *([delta_event(tool.opening)] if tool else []),
    ]
    delta = {"stop_reason": _stop_reason(answer), "stop_sequence": None}
    closing = [delta_event(tool.closing)] if tool else []
    closing += [event("content_block_stop", index=0), event("message_delta", delta=delta, **usage)]
    done = [] if answer.directives.no_done else [event("message_stop")]
    return EventStream(
        opening,
        deltas(),
        closing + done,
        None if answer.directives.no_usage else len(closing) - 1,
        [event("error", error=_OVERLOADED)],
    )


def write_error(error: ApiError, *, id: str) -> bytes:
    """Return the body of an error in Anthropic's format."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    type = "overloaded_error" if error.status == 529 else _ERROR_TYPES.get(error.status, default)
    return orjson.dumps(
        {"type": "error", "error": {"type": type, "message": error.error["message"]}, "request_id": id}
    )


def _message(answer: Answer, id: str) -> JSON:
    head = {"id": id, "type": "message", "role": "assistant", "model": answer.params["model"]}
    return {**head, "content": [], "stop_reason": None, "stop_sequence": None}


def _content_block(answer: Answer) -> JSON:
    """The message's one content block, still empty."""
    if answer.tool is None:
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": "toolu_0", "name": answer.tool.name, "input": {}}


def _stop_reason(answer: Answer) -> str:
    if answer.choices[0].is_cut_short:
        return "max_tokens"
    return "end_turn" if answer.tool is None else "tool_use"


def _input_usage(answer: Answer) -> JSON:
    """The input in three parts: with `cached=3`, 5 input tokens are 2 not cached, 2 written and 1 read."""
    total = answer.usage[0]
    cached = min(answer.directives.cached, total)
    read = cached // 2
    return {
        "input_tokens": total - cached,
        "cache_creation_input_tokens": cached - read,
        "cache_read_input_tokens": read,
    }
