"""Errors that an upstream reports inside a successful answer: whether there is one, in any of the forms in use.

    {"error": {"message": …}}                            OpenAI, as a body or as a chunk of a stream
    {"error": "text"}                                    Ollama
    {"type": "response.failed", "response": {…}}         /responses, whose whole response has `error`
    {"type": "error", …}, event: error                   /responses, /messages, speech and images
    {"choices": [{"error": …}]}                          OpenRouter
    {"object": "error", "message": …}, {"detail": …}     vLLM until 0.10, FastAPI
    text that is no JSON object                          proxies and load balancers

Such a text may name the proxy's account, so it is masked before it passes to a client; other answers are not searched
for it. A key is masked in everything that passes (see `mask`), so an error in a form that is not listed here does not
show it. Pure.
"""

import re

from proxy.formats.meter import JSON

# A member `error` or `errors` that has a value, at any depth. Quotes inside a string are escaped, so this is no text.
_ERROR_MEMBER = re.compile(rb'"errors?"\s*+:(?!\s*+(?:null|""|\{\s*+\}|\[\s*+\]))')
# The other signs of an error, for a body of which only pieces are seen: typed events, and the name of an event.
_ERROR_TYPE = re.compile(rb'"(?:type|object)"\s*+:\s*+"(?:[a-z_]+\.)*(?:error|failed)"|[\r\n]event: ?[eE]rror')


def reports_error(data: bytes, answer: JSON | None, *, name: str | None = None) -> bool:
    """Whether a body, or the data of the event `name`, reports an error. `answer` is its JSON object.

    Data without an object may be an error in plain text, so it counts as one. `[DONE]` does not.
    """
    if answer is None:
        return data != b"[DONE]"
    if answer.get("error") is not None or answer.get("errors") or (name or "").casefold() == "error":
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


def may_report_error(data: bytes) -> bool:
    """Whether a body of which only `data` is seen may report an error. It is searched for the usual signs only."""
    return any(sign.search(data) for sign in (_ERROR_MEMBER, _ERROR_TYPE))
