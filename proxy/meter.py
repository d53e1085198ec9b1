"""What one answer used, learned by watching it go by.

A meter is fed an answer in order, as events of a stream or as one whole body, and says of each event what the
client is to see of it: the very bytes that came, unless we asked for usage in the client's place; then the chunk
that came only because of that is taken out again, and nothing else. It can be asked for the usage at any moment,
also after a broken stream: what it knows then is what gets settled.

Pure: no sockets, no clock. Knows the answers of the OpenAI format; framing comes from `sse`.
"""

from typing import Any

import orjson

from proxy.sse import Event
from proxy.strict_json import dump
from proxy.usage import AtLeast, Exactly, Tokens, Usage, read_tokens
from proxy.wire import BYTES_PER_TOKEN, Call

# What every chunk has; one with no choices and nothing beyond these came only because usage was asked for.
_COMMON_KEYS = frozenset(
    ("id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage", "obfuscation")
)
_RESPONSE_ENDS = frozenset(("response.completed", "response.incomplete", "response.failed", "error"))
# What stands inside a choice and is no text that the model wrote: names, verdicts, the text once more as single
# tokens, sound as base64.
_NOT_TEXT = frozenset(
    "role type id call_id status finish_reason native_finish_reason stop_reason logprobs prompt_logprobs "
    "content_filter_results data".split()
)
# The member as servers write it that say "no usage yet" on every chunk, with the comma that goes with it. The zeros
# are Ollama's, on each chunk of /completions.
_PLACEHOLDERS = (
    b',"usage":null',
    b', "usage": null',
    b'"usage":null,',
    b'"usage": null, ',
    b',"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}',
)


class Meter:
    """Watches one answer. `input_estimate` is the tokens of its input where the answer doesn't say its usage."""

    def __init__(self, call: Call, *, input_estimate: int) -> None:
        self.is_at_end = False
        self.is_over = False
        self.has_error = False
        self._generates = call.endpoint.generates
        self._choices = call.choices
        self._strips = call.adds_usage
        self._is_responses = call.endpoint.name == "responses"
        self._input_estimate = input_estimate
        self._reported: Tokens | None = None
        self._text_bytes = 0
        self._text_chunks = 0

    def see_event(self, event: Event) -> bytes:
        """Take note of one event and return what of it the client is to see.

        `is_at_end` turns true with the event from which on everything belongs to the end of the answer: the
        usage chunk, `[DONE]`, or the event that ends a response; `is_over` with the last event there is.
        """
        data = event.data
        if data is None:
            return event.raw
        if data.startswith(b"[DONE]"):
            self.is_at_end = self.is_over = True
            return event.raw
        chunk = _object(data)
        if chunk is None:
            return event.raw
        if self._is_responses:
            self._see_response_event(chunk)
            return event.raw
        return self._see_chunk(chunk, event)

    def see_whole(self, body: bytes) -> None:
        """Take note of an answer that is not a stream."""
        self.is_at_end = True
        answer = _object(body)
        if answer is None:
            self.has_error = True
            self._text_bytes += len(body)
            return
        self._see_error(answer)
        self._reported = read_tokens(answer.get("usage"))
        self._text_bytes += _text_in(answer.get("choices")) + _text_in(answer.get("output"))

    def usage(self) -> Usage:
        """What was used, as far as is known now."""
        if self._reported is None:
            output = max(self._text_chunks, -(-self._text_bytes // BYTES_PER_TOKEN))
            return AtLeast(Tokens(self._input_estimate, output if self._generates else 0))
        return Exactly(self._reported)

    def _see_chunk(self, chunk: dict[str, Any], event: Event) -> bytes:
        self._see_error(chunk)
        choices = chunk.get("choices")
        if choices:
            self.is_at_end = self.is_over  # a usage chunk that came early was not the end
        if choices and (text_bytes := _text_in(choices)):
            self._text_bytes += text_bytes
            self._text_chunks += 1
        if "usage" not in chunk:
            return event.raw
        usage = chunk["usage"]
        # Zeros beside a choice are no count but a place kept for one, and so is null.
        is_placeholder = usage is None or (isinstance(usage, dict) and bool(choices) and not any(usage.values()))
        if isinstance(usage, dict) and not is_placeholder:
            self._reported = read_tokens(usage) or self._reported
            if not choices:
                return self._see_usage_chunk(chunk, event)
        return _without_usage(event, chunk) if is_placeholder and self._strips else event.raw

    def _see_usage_chunk(self, chunk: dict[str, Any], event: Event) -> bytes:
        """Return the chunk as it would have come unasked: not at all, unless it carries something else too."""
        # llama.cpp sends one for each of several choices, as soon as it is finished: then only [DONE] is the end.
        self.is_at_end = self.is_at_end or self._choices == 1
        if not self._strips:
            return event.raw
        carries_more = any(value is not None and key not in _COMMON_KEYS for key, value in chunk.items())
        return _without_usage(event, chunk) if carries_more else b""

    def _see_response_event(self, chunk: dict[str, Any]) -> None:
        self._see_error(chunk)
        kind = chunk.get("type")
        if kind in _RESPONSE_ENDS:
            self.is_at_end = self.is_over = True
            self.has_error = self.has_error or kind in ("error", "response.failed")
            response = chunk.get("response")
            if isinstance(response, dict):
                self._reported = read_tokens(response.get("usage"))
        elif isinstance(kind, str) and kind.endswith(".delta") and isinstance(delta := chunk.get("delta"), str):
            self._text_bytes += _text_in(delta)
            self._text_chunks += 1

    def _see_error(self, answer: dict[str, Any]) -> None:
        self.has_error = self.has_error or answer.get("error") is not None


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _text_in(value: object) -> int:
    """Bytes of text in a part of an answer, however it is nested (content, refusals, arguments of tool calls)."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, list):
        return sum(map(_text_in, value))
    if isinstance(value, dict):
        return sum(_text_in(part) for key, part in value.items() if key not in _NOT_TEXT)
    return 0


def _without_usage(event: Event, chunk: dict[str, Any]) -> bytes:
    """The event without its `usage`, which stands there only because it was asked for.

    Where it is a placeholder it is cut out of the bytes, so that all others stay as they were; otherwise the event
    is written anew.
    """
    raw = event.raw
    rest = {key: value for key, value in chunk.items() if key != "usage"}
    # Inside a string the quotes would be escaped; but "usage" may be a whole string, or the name of an inner member.
    is_only_one = raw.count(b'"usage"') == 1
    for member in _PLACEHOLDERS:
        before, found, after = raw.partition(member)
        while found:
            if is_only_one or _says(before + after, rest):
                return before + after
            more, found, after = after.partition(member)
            before += member + more
    return b"data: " + dump(rest) + b"\n\n"


def _says(raw: bytes, chunk: dict[str, Any]) -> bool:
    return _object(raw[raw.find(b"{") : raw.rfind(b"}") + 1]) == chunk
