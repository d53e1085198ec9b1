"""Errors that an upstream reports inside a successful answer: whether there is one, in any of the forms in use.

    {"error": {"message": …}}                            OpenAI, as a body or as a chunk of a stream
    {"error": "text"}                                    Ollama
    {"type": "response.failed", "response": {…}}         /responses, whose whole response has `error`
    {"type": "error", …}, event: error                   /responses, /messages, speech and images
    {"choices": [{"error": …}]}                          OpenRouter
    {"object": "error", "message": …}, {"detail": …}     vLLM until 0.10, FastAPI
    {"choices": null, "base_resp": {…}}, {"msg": …}      MiniMax, others
    an object with nothing that an answer has            any other
    text that is no JSON object                          proxies and load balancers

Such a text may name the proxy's account, so it is masked before it passes to a client; other answers are not searched
for it. A key is masked in everything that passes (see `mask`), so an error in a form that is not listed here does not
show it. Pure.
"""

import re

import orjson

from proxy.formats.meter import JSON
from proxy.formats.strict_json import plain_name

# Members in which other vendors state an error, by their plain names.
_OTHER_MEMBERS = frozenset(
    "baseresp detail errmsg error errordescription errormessage errormsg errors exception fault message msg reason "
    "statusmsg".split()
)
# Every answer, and every event of a stream, has one of these.
_MEMBERS_OF_ANSWERS = frozenset(
    "choices content data delta input_tokens object output response results text type usage".split()
)
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
    if answer.get("error") is not None or answer.get("errors") or (name is not None and name.casefold() == "error"):
        return True
    choices, kind = answer.get("choices"), answer.get("type")
    # The two frequent kinds of events first: a search of their bytes takes longer than parsing them.
    if isinstance(choices, list) and choices:
        for choice in choices:
            if isinstance(choice, dict) and (
                choice.get("error") is not None or choice.get("finish_reason") == "error"
            ):
                return True
        return False
    if isinstance(kind, str) and kind.endswith("delta"):
        return False
    return (
        (isinstance(kind, str) and kind.endswith(("error", "failed")))
        or answer.get("object") == "error"
        or is_only_error(answer)
        or any(_states_error(name, value) for name, value in answer.items())
        or _ERROR_MEMBER.search(data) is not None
    )


def status_of_error(body: bytes) -> int | None:
    """The status that a body states which is an error and nothing else; None if there is none.

    OpenRouter answers with status 200 before it knows whether a provider takes the call, and states the provider's
    status in the body: {"error": {"code": 429, "message": …}}. With choices, or with anything else that an answer
    has, a part of an answer was generated.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(answer, dict) or not is_only_error(answer):
        return None
    error = answer.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    if not isinstance(code, int | str) or not re.fullmatch(r"[45][0-9]{2}", str(code)):
        return None
    return int(code)


def is_only_error(answer: JSON) -> bool:
    """Whether a JSON object that reports an error has nothing that an answer has."""
    return _MEMBERS_OF_ANSWERS.isdisjoint(answer)


def _states_error(name: str, value: object) -> bool:
    """Whether a member of an answer states an error. Of a message that begins, `message` is an object."""
    is_message = plain_name(name) in _OTHER_MEMBERS and bool(value)
    return is_message and not (name == "message" and isinstance(value, dict))


def may_report_error(data: bytes) -> bool:
    """Whether a body of which only `data` is seen may report an error. It is searched for the usual signs only."""
    return any(sign.search(data) for sign in (_ERROR_MEMBER, _ERROR_TYPE))
