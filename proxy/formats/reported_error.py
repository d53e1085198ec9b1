"""Errors that an upstream reports inside a successful answer: whether there is one, in any of the forms in use.

    {"error": {"message": …}}                            OpenAI, as a body or as a chunk of a stream
    {"error": "text"}                                    Ollama
    {"type": "response.failed", "response": {…}}         /responses, whose whole response has `error`
    {"type": "error", …}, event: error                   /responses, /messages, speech and images
    {"choices": [{"error": …}]}                          OpenRouter
    {"object": "error", "message": …}, {"detail": …}     vLLM until 0.10, FastAPI
    text that is no JSON object                          proxies and load balancers

Such a text may repeat the proxy's key or name its account, so it is masked before it passes to a client. Other
answers are not searched for them. Pure.
"""

import re
from typing import Protocol

from proxy.formats.meter import JSON

# A member `error` or `errors` that has a value, at any depth. Quotes inside a string are escaped, so this is no text.
_ERROR_MEMBER = re.compile(rb'"errors?"\s*+:(?!\s*+(?:null|""|\{\s*+\}|\[\s*+\]))')
# The other signs of an error, for a body of which only pieces are seen: typed events, and the name of an event.
_ERROR_TYPE = re.compile(rb'"(?:type|object)"\s*+:\s*+"(?:[a-z_]+\.)*(?:error|failed)"|[\r\n]event: ?error')
# How many bytes are kept back of a body that is masked in pieces. No key is longer.
_OVERLAP = 4096
# No sign of an error is longer.
_SIGN_BYTES_MAX = 64


class Mask(Protocol):
    """Returns the data with `***` in the place of what no client may see.

    `is_cut` says that the data may break off within it.
    """

    def __call__(self, data: bytes, *, is_cut: bool = False) -> bytes: ...


def reports_error(data: bytes, answer: JSON | None, *, name: str | None = None) -> bool:
    """Whether a body, or the data of the event `name`, reports an error. `answer` is its JSON object.

    Data without an object may be an error in plain text, so it counts as one. `[DONE]` does not.
    """
    if answer is None:
        return data != b"[DONE]"
    if answer.get("error") is not None or answer.get("errors") or name == "error":
        return True
    choices, kind = answer.get("choices"), answer.get("type")
    # The two frequent kinds of events first: a search of their bytes takes longer than parsing them.
    if isinstance(choices, list) and choices:
        return any(isinstance(choice, dict) and _is_failed(choice) for choice in choices)
    if isinstance(kind, str) and kind.endswith("delta"):
        return False
    return (
        (isinstance(kind, str) and kind.endswith(("error", "failed")))
        or answer.get("object") == "error"
        or "detail" in answer
        or isinstance(answer.get("message"), str)
        or _ERROR_MEMBER.search(data) is not None
    )


def _is_failed(choice: JSON) -> bool:
    return choice.get("error") is not None or choice.get("finish_reason") == "error"


class PieceMask:
    """Masks a body that passes in pieces, from the piece on in which it reports an error.

    From then on the last 4 kB are kept back until the next piece, because a key may be cut in two.
    """

    def __init__(self, mask: Mask) -> None:
        self._mask = mask
        self._seen = b"\n"  # the end of what passed, because a sign of an error may be cut in two
        self._kept = b""
        self._has_error = False

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece, and return what may pass."""
        if not self._has_error:
            seen = self._seen + piece
            self._has_error = any(sign.search(seen) for sign in (_ERROR_MEMBER, _ERROR_TYPE))
            self._seen = seen[-_SIGN_BYTES_MAX:]
            if not self._has_error:
                return piece
        masked = self._mask(self._kept + piece)
        self._kept = masked[-_OVERLAP:]
        return masked[: -len(self._kept)] if self._kept else b""

    def end(self) -> bytes:
        """Return the rest."""
        kept, self._kept = self._kept, b""
        return self._mask(kept, is_cut=True)
