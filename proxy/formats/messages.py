"""Anthropic's API, /v1/messages: versions and betas, errors, usage, and the answers with their streams of events.

    event: message_start         data: {"type":"message_start","message":{…,"usage":{"input_tokens":11,…}}}
    event: content_block_start   data: {"type":"content_block_start","index":0,"content_block":{"type":"text",…}}
    event: content_block_delta   data: {"type":"content_block_delta","index":0,"delta":{"text":"Hi",…}}
    event: content_block_stop    data: {"type":"content_block_stop","index":0}
    event: message_delta         data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{…}}
    event: message_stop          data: {"type":"message_stop"}

A stream always states its usage, so the proxy adds no option and removes nothing.

An error is `{"type": "error", "error": {"type", "message", …}, "request_id"}`. Its type follows from the HTTP status.
The members that the proxy adds (`code`, `param`, `reset_at`, …) are inside `error`, as in an OpenAI error. Sources:
Anthropic's published API description and its SDK. Pure.
"""

from collections.abc import Callable

from proxy.errors import ProxyError
from proxy.formats.meter import JSON, Ending, Meter, write_events
from proxy.formats.request import Request
from proxy.formats.sse import Event
from proxy.formats.usage import CACHE_PARTS, INPUT_PARTS, Stated
from proxy.policy.amounts import Tokens

# The types of events; those of other types are none of this API.
_EVENTS = frozenset(
    "message_start content_block_start content_block_delta content_block_stop message_delta message_stop ping "
    "error".split()
)
# What Amazon Bedrock adds to the last event, with its names of the parts of a usage.
_BEDROCK_METRICS = "amazon-bedrock-invocationMetrics"
_BEDROCK_NAMES = {
    "inputTokenCount": "input_tokens",
    "outputTokenCount": "output_tokens",
    "cacheReadInputTokenCount": "cache_read_input_tokens",
    "cacheWriteInputTokenCount": "cache_creation_input_tokens",
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
# Used if a stream is stopped before any event of it passed. The id is not made to look real, because no message can
# be found by it.
_UNKNOWN_MESSAGE: JSON = {
    "id": "msg_unknown",
    "type": "message",
    "role": "assistant",
    "model": "",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
}


def error_body(error: ProxyError, request_id: str | None = None) -> dict[str, object]:
    """The JSON body of an error in Anthropic's shape. Members without a value are left out.

    An error event inside a stream has no `request_id`.
    """
    standard = {"type": type_of(error.status), "message": error.message}
    added = {name: value for name, value in (("code", error.code), ("param", error.param)) if value is not None}
    id_member = {} if request_id is None else {"request_id": request_id}
    return {"type": "error", "error": {**standard, **added, **error.members}, **id_member}


def error_event(error: ProxyError) -> bytes:
    """An error inside a stream. The SDK raises if the event is named `error`, and reads its member `error`."""
    return write_events([error_body(error)])


def type_of(status: int) -> str:
    """Anthropic's error type for an HTTP status."""
    return _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


class MessagesMeter(Meter):
    """Measures a message. All bytes are forwarded unchanged."""

    # At OpenAI the cached tokens are a part of the input; here they are separate. Example: input_tokens 7,
    # cache_creation_input_tokens 100 and cache_read_input_tokens 1000 are an input of 1107.
    _has_separate_cache = True

    def __init__(self, request: Request, *, count: Callable[[str], int], kind: str) -> None:
        super().__init__(request, count=count, kind=kind)
        self._input_parts: JSON = {}  # the parts of the input, merged from the events
        self._early_output = 0  # the output that `message_start` states

    def _new_ending(self, request: Request) -> Ending:
        return MessagesEnding()

    def _see_answer(self, answer: JSON) -> None:
        self._see_usages(answer)

    def _output_of(self, answer: JSON) -> object:
        return answer.get("content")

    def _see_object(self, chunk: JSON, event: Event) -> bytes:
        """Record an event of a message. `message_start` reports the input, each `message_delta` the total so far."""
        # SDKs go by the name of the event, and need no type.
        kind, delta = chunk.get("type") or event.name, chunk.get("delta")
        self.has_error = self.has_error or kind == "error"
        if kind == "message_start":
            message = chunk.get("message")
            if isinstance(message, dict):
                self._see_usage(message.get("usage"), is_early=True)
                self._count_texts(message.get("content"))
        elif kind == "content_block_start":
            self.is_at_end = False  # a block follows, so a `message_delta` before it was not the end
            self._count_texts(chunk.get("content_block"))
        elif kind == "content_block_delta":
            self.is_at_end = False
            self._count_texts(delta)
        elif kind in ("message_delta", "message_stop"):
            for part in (chunk, delta):
                self._see_usages(part)
            self.is_at_end = True
            self.is_over = self.is_over or kind == "message_stop"
            self._see_early_output()
        elif kind == "error":
            self.is_at_end = self.is_over = True
        elif kind not in _EVENTS:
            self._count_other_shape(chunk, kind)
            for part in (chunk, chunk.get("response")):
                self._see_usages(part)
        return event.raw

    def _see_usages(self, part: object) -> None:
        """Record the usages in an answer, an event, or a part of one, wherever they are."""
        if isinstance(part, dict):
            self._see_usage(part.get("usage"))
            self._see_usage(_usage_of_bedrock(part.get(_BEDROCK_METRICS)))
            self._see_usages_elsewhere(part)

    def _see_early_output(self) -> None:
        """Record, at the end of a message, the output that its beginning stated if nothing later is larger.

        It is usually a guess at the first tokens, such as 1. A server that knows the whole message before it streams
        it may state all of its output there, and zeros at the end.
        """
        if self.is_over and max(self._output_stated, self._counted) < self._early_output <= self.output_bound:
            self._record(Stated(output=self._early_output))

    def _see_usage(self, usage: object, *, is_early: bool = False) -> None:
        """Record a usage of a message. Parts of the input that it lacks, or that are 0 in it, keep an earlier value.

        message_start  {"input_tokens": 4, "cache_read_input_tokens": 5, "output_tokens": 1}   input 9
        message_delta  {"input_tokens": 0, "output_tokens": 9}                                 input 9, output 9
        """
        # A usage that makes no sense must not spoil those before and after it.
        if not isinstance(usage, dict) or self._read(usage) is None:
            return
        # An input that is the sum of the earlier parts includes the cached tokens, so those are not added again:
        #     message_start  {"input_tokens": 31, "cache_read_input_tokens": 20}   input 51
        #     message_delta  {"input_tokens": 51}                                  input 51
        earlier = self._read(self._input_parts)
        if earlier and self._input_parts.keys() & CACHE_PARTS and not any(usage.get(name) for name in CACHE_PARTS):
            alone = self._read({"input_tokens": usage.get("input_tokens")})
            if alone and alone.input == earlier.input:
                usage = {name: value for name, value in usage.items() if name not in INPUT_PARTS}
        # No message has an empty input. A server that reports 0 at the beginning counts the input at the end.
        parts = {name: usage.get(name) for name in INPUT_PARTS if usage.get(name) or not is_early}
        parts |= {name: earlier for name, earlier in self._input_parts.items() if not parts.get(name)}
        self._input_parts = {name: value for name, value in parts.items() if value and self._read({name: value})}
        stated = self._read({**{name: value for name, value in usage.items() if name not in INPUT_PARTS}, **parts})
        if stated and is_early:
            # The early output is a guess at the first tokens. They are counted when they come, so it is left out.
            self._early_output = stated.known_output or 0
            stated = Stated(stated.input, cached=stated.cached)
        self._record(stated)


def _usage_of_bedrock(metrics: object) -> JSON | None:
    """The usage that the metrics of Amazon Bedrock state, with Anthropic's names."""
    if not isinstance(metrics, dict):
        return None
    return {ours: metrics[name] for name, ours in _BEDROCK_NAMES.items() if name in metrics}


class MessagesEnding(Ending):
    """Watches the events of a message, and can write its end.

    These are the events that the upstream sends if `max_tokens` ends an answer: the open block is closed,
    `message_delta` states `stop_reason: "max_tokens"` and the usage, and `message_stop` is the last event.
    """

    __slots__ = ("_has_begun", "_open", "_usage")

    def __init__(self) -> None:
        super().__init__()
        self._has_begun = False
        self._open: int | None = None  # the index of the open content block
        self._usage: JSON = {}  # the usage that `message_start` stated

    def see(self, chunk: JSON, data: bytes) -> None:
        """Record one event that passed."""
        kind, index = chunk.get("type"), chunk.get("index")
        if kind == "message_start":
            message = chunk.get("message")
            usage = message.get("usage") if isinstance(message, dict) else None
            self._has_begun, self._usage = True, usage if isinstance(usage, dict) else {}
        elif kind == "content_block_start":
            self._open = index if isinstance(index, int) else None
        elif kind == "content_block_stop":
            self._open = None
        elif kind == "message_delta":
            # A `message_delta` without a stop reason only states the usage so far.
            delta = chunk.get("delta")
            self.has_finished = isinstance(delta, dict) and delta.get("stop_reason") is not None
        elif kind in ("message_stop", "error"):
            self.has_finished = True

    def at_limit(self, usage: Tokens, *, shows_usage: bool, newline: bytes = b"\n") -> bytes:
        """The bytes that end the message here; empty after an error or the upstream's own end.

        They always state the usage.
        """
        return write_events(self._missing_events(usage), newline)

    def _missing_events(self, usage: Tokens) -> list[JSON]:
        if self.has_finished:
            return []
        final_usage = {**self._usage, "output_tokens": usage.output} if self._usage else _message_usage(usage)
        start: JSON = {  # SDKs accept no event of a message before this one
            "type": "message_start",
            "message": {**_UNKNOWN_MESSAGE, "usage": {**_message_usage(usage), "output_tokens": 0}},
        }
        delta: JSON = {"stop_reason": "max_tokens", "stop_sequence": None}
        return [
            *([] if self._has_begun else [start]),
            *([] if self._open is None else [{"type": "content_block_stop", "index": self._open}]),
            {"type": "message_delta", "delta": delta, "usage": final_usage},
            {"type": "message_stop"},
        ]


def _message_usage(usage: Tokens) -> JSON:
    # Anthropic's input_tokens do not include the cached ones: an input of 11 with 3 from the cache is 8 and 3.
    return {
        "input_tokens": usage.input - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
    }
