"""The end of a message of Anthropic's that we stop at a limit, as `ending` writes those of OpenAI's.

It is what the upstream sends where `max_tokens` ends an answer: the block that is open is closed, `message_delta`
says `stop_reason: "max_tokens"` and the usage, and `message_stop` is the last event. Pure.
"""

from typing import Any

from proxy.policy.amounts import Tokens

JSON = dict[str, Any]

# For a stream that is stopped before anything of it passed; see `ending`.
_UNSEEN: JSON = {
    "id": "msg_unknown",
    "type": "message",
    "role": "assistant",
    "model": "",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
}


class MessageEnding:
    """The end of one stream. `is_over` once nothing of the answer itself can follow."""

    __slots__ = ("_has_begun", "_open", "_usage", "is_over")

    def __init__(self) -> None:
        self.is_over = False
        self._has_begun = False
        self._open: int | None = None  # the index of the block that is
        self._usage: JSON = {}  # as the beginning said it

    def see(self, event: JSON) -> None:
        """Take note of one event that passed; what has an odd shape is passed over."""
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
            delta = event.get("delta")
            self.is_over = isinstance(delta, dict) and delta.get("stop_reason") is not None
        elif kind in ("message_stop", "error"):
            self.is_over = True

    def closing(self, usage: Tokens) -> list[JSON]:
        """The events that are still missing; none after an error or the upstream's own end."""
        if self.is_over:
            return []
        said = {**self._usage, "output_tokens": usage.output}
        begun: JSON = {
            "type": "message_start",
            "message": {**_UNSEEN, "usage": {**_plain(usage), "output_tokens": 0}},
        }
        delta: JSON = {"stop_reason": "max_tokens", "stop_sequence": None}
        return [
            *([] if self._has_begun else [begun]),
            *([] if self._open is None else [{"type": "content_block_stop", "index": self._open}]),
            {"type": "message_delta", "delta": delta, "usage": said if self._usage else _plain(usage)},
            {"type": "message_stop"},
        ]


def _plain(usage: Tokens) -> JSON:
    return {
        "input_tokens": usage.input - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
    }
