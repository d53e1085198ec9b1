"""The end of an Anthropic message (/v1/messages) that the proxy stops at a limit; `ending` has the OpenAI formats.

It consists of the events that the upstream sends if `max_tokens` ends an answer: the open block is closed,
`message_delta` states `stop_reason: "max_tokens"` and the usage, and `message_stop` is the last event. Pure.
"""

from typing import Any

from proxy.policy.amounts import Tokens

JSON = dict[str, Any]

# Used if a stream is stopped before any event of it passed. As in `ending`, the id is not made to look real.
_UNKNOWN_MESSAGE: JSON = {
    "id": "msg_unknown",
    "type": "message",
    "role": "assistant",
    "model": "",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
}


class MessageEnding:
    """Watches one stream and can write its end. `is_over` is true once the answer is complete."""

    __slots__ = ("_has_begun", "_open", "_usage", "is_over")

    def __init__(self) -> None:
        self.is_over = False
        self._has_begun = False
        self._open: int | None = None  # the index of the open content block
        self._usage: JSON = {}  # the usage that `message_start` stated

    def see(self, event: JSON) -> None:
        """Record one event that passed; an event of an unexpected shape is ignored."""
        kind, index = event.get("type"), event.get("index")
        if kind == "message_start":
            message = event.get("message")
            usage = message.get("usage") if isinstance(message, dict) else None
            self._has_begun, self._usage = True, usage if isinstance(usage, dict) else {}
        elif kind == "content_block_start":
            self._open = index if isinstance(index, int) else None
        elif kind == "content_block_stop":
            self._open = None
        elif kind == "message_delta":
            # A `message_delta` without a stop reason only states the usage so far.
            delta = event.get("delta")
            self.is_over = isinstance(delta, dict) and delta.get("stop_reason") is not None
        elif kind in ("message_stop", "error"):
            self.is_over = True

    def missing_events(self, usage: Tokens) -> list[JSON]:
        """The events that end the message here; none after an error or the upstream's own end."""
        if self.is_over:
            return []
        final_usage = {**self._usage, "output_tokens": usage.output} if self._usage else _usage(usage)
        start: JSON = {  # SDKs accept no event of a message before this one
            "type": "message_start",
            "message": {**_UNKNOWN_MESSAGE, "usage": {**_usage(usage), "output_tokens": 0}},
        }
        delta: JSON = {"stop_reason": "max_tokens", "stop_sequence": None}
        return [
            *([] if self._has_begun else [start]),
            *([] if self._open is None else [{"type": "content_block_stop", "index": self._open}]),
            {"type": "message_delta", "delta": delta, "usage": final_usage},
            {"type": "message_stop"},
        ]


def _usage(usage: Tokens) -> JSON:
    # Anthropic's input_tokens do not include the cached ones: an input of 11 with 3 from the cache is 8 and 3.
    return {
        "input_tokens": usage.input - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
    }
