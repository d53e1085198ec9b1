"""Directives, with which a request tells the simulated upstream how to answer or fail, and the errors of OpenAI.

A request carries directives in its `metadata`, separated by spaces: `{"simulate": "tokens=300 cut=5"}`. A client that
sends no such field puts them after the name of the model: `gpt-4o-mini+tokens=300+cut=5`.

    tokens=300           length of the answer (a maximum of the request still applies)
    cached=40            input tokens of a message that are read from the cache or written to it
    speed=100            tokens per second; an answer that is not streamed takes as long as its tokens would
    delay=0.5            seconds before the status line and headers
    status=500           an error of any status, worded as OpenAI does: 401 shows part of the key, 429 is a rate limit
    code=…               the `code` of that error; insufficient_quota and context_length_exceeded have OpenAI's texts
    html                 502 with an HTML body, as a load balancer sends it
    hang                 no status line at all, until the client disconnects
    header=Name:value    one more response header; may be repeated
    cut=5                close the connection after 5 words of text; in the middle of the body if not streamed
    stall=4              send nothing after 4 words until the client disconnects; in the middle of the body if not
                         streamed
    error=3              stream: an error event after 3 words, although the status is 200
    crlf                 stream: lines end in CRLF
    no_done              stream: no [DONE]
    no_usage             no usage anywhere, as from a server that doesn't know `include_usage`
    usage_early          streams of chat and completions: usage on the last chunk that has a choice, whether or not it
                         was requested, and none after it
    usage_zero           the usage says 0
    tool                 chat, responses and messages: call the first tool offered, with the text as its argument

In a stream one word is one event and one token, so "after 5 words" is after 5 tokens. Events before the text are not
counted.

A directive that is unknown or invalid is answered with 400. A test that misspells its fault would otherwise pass.

No sockets, no clock; only `hang` waits. The error texts are an upstream's, so `proxy.errors`, which has the proxy's
own, is not used.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]

# A typing error in `tokens=` (3000000000 for 3000) must not exhaust the memory.
TOKENS_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Directives:
    """How to give one answer. The fault happens after `fault_after` words of text."""

    tokens: int | None = None
    cached: int = 0
    tokens_per_s: float | None = None
    delay_s: float = 0.0
    status: int | None = None
    code: str | None = None
    fault: str | None = None
    fault_after: int = 0
    no_done: bool = False
    no_usage: bool = False
    usage_early: bool = False
    usage_zero: bool = False
    tool: bool = False
    crlf: bool = False
    hang: bool = False
    html: bool = False
    headers: tuple[tuple[str, str], ...] = ()


class ApiError(Exception):
    """An error response of the simulated upstream. `error` is the object of that name in OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error: JSON = {"message": message, "type": type, "param": param, "code": code}


MODEL_SEPARATOR = "+"  # no vendor uses it in the name of a model
FLAGS = frozenset("no_done no_usage usage_early usage_zero tool crlf hang html".split())
FAULTS = frozenset("cut error stall".split())


def _between(smallest: float, largest: float, number: float) -> float:
    if not smallest <= number <= largest:
        raise ValueError(number)
    return number


def _count(text: str) -> int:
    return int(_between(0, TOKENS_MAX, int(text)))


# The field of `Directives` that each directive sets, and how its value is parsed.
VALUES: dict[str, tuple[str, Callable[[str], object]]] = {
    "tokens": ("tokens", _count),
    "cached": ("cached", _count),
    "speed": ("tokens_per_s", lambda text: _between(0.001, 1e6, float(text))),
    "delay": ("delay_s", lambda text: _between(0, 86_400, float(text))),
    "status": ("status", lambda text: _between(200, 599, int(text))),
    "code": ("code", str),
}


def read_directives(params: JSON) -> Directives:
    """Return the directives in `metadata.simulate`, or else those after the model's name.

    Raises ApiError, a 400, if one of them is unknown or its value invalid.
    """
    metadata = params.get("metadata")
    text = metadata.get("simulate", "") if isinstance(metadata, dict) else ""
    # Metadata without `simulate` does not hide the suffix: Anthropic's clients send `{"user_id": "7"}`, and then
    # `m+tool` still means the directive `tool`.
    if text == "":
        text = str(params.get("model")).partition(MODEL_SEPARATOR)[2].replace(MODEL_SEPARATOR, " ")
    if text == "":
        return NO_DIRECTIVES
    fields: JSON = {}
    try:
        for word in text.split():
            _read_word(word, fields)
    except (AttributeError, KeyError, ValueError):
        message = f"Invalid value for 'metadata.simulate': {text!r} is not a list of the simulator's directives."
        raise ApiError(400, message, param="metadata") from None
    return Directives(**fields)


NO_DIRECTIVES = Directives()


def _read_word(word: str, fields: JSON) -> None:
    name, equals, value = word.partition("=")
    if name in FLAGS and not equals:
        fields[name] = True
    elif name in FAULTS:
        fields["fault"], fields["fault_after"] = name, _count(value)
    elif name == "header":
        header, content = value.split(":", 1)
        fields["headers"] = (*fields.get("headers", ()), (header, content))
    else:
        field, parse = VALUES[name]
        fields[field] = parse(value)


def error_for_status(status: int, code: str | None, key: str) -> ApiError:
    """Return the error of this status with OpenAI's text; `key` is the API key that the request was sent with."""
    if status == 401:
        return invalid_key_error(key)
    if code == "insufficient_quota":
        message = "You exceeded your current quota, please check your plan and billing details."
        return ApiError(status, message, type="insufficient_quota", code=code)
    if code == "context_length_exceeded":
        message = "This model's maximum context length is 8192 tokens. Please reduce the length of the messages."
        return ApiError(status, message, code=code, param="messages")
    if status == 429:
        message = (
            "Rate limit reached for this model in organization org-simulated on requests per min (RPM): "
            "Limit 3, Used 3, Requested 1. Please try again in 1s."
        )
        return ApiError(status, message, type="requests", code=code or "rate_limit_exceeded")
    if status >= 500:
        message = "The server had an error while processing your request. Sorry about that!"
        return ApiError(status, message, type="server_error", code=code)
    return ApiError(status, "Your request can't be answered as it is (simulated).", code=code)


def invalid_key_error(key: str) -> ApiError:
    """Return the 401 for this key.

    Its message shows both ends of the key, as OpenAI's does. The proxy must never pass such a message to a user.
    """
    if not key:
        message = (
            "You didn't provide an API key. You need to provide it in an Authorization header using Bearer auth."
        )
        return ApiError(401, message)
    shown = key[:8] + "*" * 12 + key[-4:] if len(key) > 12 else key[:2] + "***"
    message = f"Incorrect API key provided: {shown}. You can find your API key in your account settings."
    return ApiError(401, message, code="invalid_api_key")


async def hang() -> None:
    """Wait until the client disconnects, which cancels the call."""
    await asyncio.get_running_loop().create_future()
