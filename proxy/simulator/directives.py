"""How the simulated upstream is told to answer or to fail: a request's directives, and errors as OpenAI words them.

A request can ask it to behave in its `metadata`: `{"simulate": "tokens=300 cut=5"}`, directives between spaces; or,
for clients that send no such field, behind the name of its model: `gpt-4o-mini+tokens=300+cut=5`.

    tokens=300           the answer is this long (a maximum still holds)
    cached=40            so much of a message's input comes from the cache or goes there
    speed=100            tokens a second; a whole answer takes as long as its tokens would
    delay=0.5            seconds before the head of the answer
    status=500           an error in OpenAI's words, of any status: 401 shows part of the key, 429 is a rate limit
    code=…               the `code` of that error; insufficient_quota and context_length_exceeded are worded as theirs
    html                 502 with an HTML body, as from a load balancer
    hang                 no head at all, until the client goes
    header=Name:value    one more header on the answer; may be given several times
    cut=5                the connection ends after 5 words of text; a whole answer in the middle of its body
    stall=4              silence after 4 words, until the client goes; a whole answer in the middle of its body
    error=3              stream: an error event after 3 words, inside the 200
    crlf                 stream: lines end in CRLF
    no_done              stream: no [DONE]
    no_usage             no usage anywhere, as from a server that doesn't know `include_usage`
    usage_early          chat and completions streams: usage on the last chunk that has a choice, asked for or not,
                         and none after it
    usage_zero           the usage says 0
    tool                 chat, responses and messages: the words are the argument of the first tool that was offered

A stream's text is one event a word, so "after 5 words" is after 5 tokens; what comes before the text isn't counted.

A directive that can't be understood is an error, not a silence: a test that misspells its fault would otherwise pass.

No sockets, no clock; only `hang` waits. Apart from `errors` on purpose: those are our own words, these are an
upstream's.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]

TOKENS_MAX = 1_000_000  # so that a slip of the finger in `tokens=` doesn't fill the memory


@dataclass(frozen=True, slots=True)
class Directions:
    """How one answer is to be given. The fault happens after `fault_after` words of text."""

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


class Complaint(Exception):
    """The simulated upstream answers with an error, in OpenAI's shape."""

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


BEHIND_THE_NAME = "+"  # no model of anyone's has it in its name
FLAGS = frozenset("no_done no_usage usage_early usage_zero tool crlf hang html".split())
FAULTS = frozenset("cut error stall".split())


def _between(smallest: float, largest: float, number: float) -> float:
    if not smallest <= number <= largest:
        raise ValueError(number)
    return number


def _count(text: str) -> int:
    return int(_between(0, TOKENS_MAX, int(text)))


VALUES: dict[str, tuple[str, Callable[[str], object]]] = {
    "tokens": ("tokens", _count),
    "cached": ("cached", _count),
    "speed": ("tokens_per_s", lambda text: _between(0.001, 1e6, float(text))),
    "delay": ("delay_s", lambda text: _between(0, 86_400, float(text))),
    "status": ("status", lambda text: _between(200, 599, int(text))),
    "code": ("code", str),
}


def read_directions(asked: JSON) -> Directions:
    """Return what the request's `metadata.simulate` asks for, or else what stands behind its model's name."""
    metadata = asked.get("metadata")
    wish = metadata.get("simulate", "") if isinstance(metadata, dict) else ""
    if wish == "":
        wish = str(asked.get("model")).partition(BEHIND_THE_NAME)[2].replace(BEHIND_THE_NAME, " ")
    if wish == "":
        return NO_DIRECTIONS
    said: JSON = {}
    try:
        for word in wish.split():
            _read_word(word, said)
    except (AttributeError, KeyError, ValueError):
        message = f"Invalid value for 'metadata.simulate': {wish!r} is not a list of the simulator's directives."
        raise Complaint(400, message, param="metadata") from None
    return Directions(**said)


NO_DIRECTIONS = Directions()


def _read_word(word: str, said: JSON) -> None:
    name, equals, value = word.partition("=")
    if name in FLAGS and not equals:
        said[name] = True
    elif name in FAULTS:
        said["fault"], said["fault_after"] = name, _count(value)
    elif name == "header":
        header, content = value.split(":", 1)
        said["headers"] = (*said.get("headers", ()), (header, content))
    else:
        field, read = VALUES[name]
        said[field] = read(value)


def complaint_of(status: int, code: str | None, key: str) -> Complaint:
    """Return the error of this status as OpenAI words it; `key` is the one that the request came with."""
    if status == 401:
        return wrong_key(key)
    if code == "insufficient_quota":
        message = "You exceeded your current quota, please check your plan and billing details."
        return Complaint(status, message, type="insufficient_quota", code=code)
    if code == "context_length_exceeded":
        message = "This model's maximum context length is 8192 tokens. Please reduce the length of the messages."
        return Complaint(status, message, code=code, param="messages")
    if status == 429:
        message = (
            "Rate limit reached for this model in organization org-simulated on requests per min (RPM): "
            "Limit 3, Used 3, Requested 1. Please try again in 1s."
        )
        return Complaint(status, message, type="requests", code=code or "rate_limit_exceeded")
    if status >= 500:
        message = "The server had an error while processing your request. Sorry about that!"
        return Complaint(status, message, type="server_error", code=code)
    return Complaint(status, "Your request can't be answered as it is (simulated).", code=code)


def wrong_key(key: str) -> Complaint:
    """Return the 401 for this key. It shows the key's ends, as OpenAI's does: nothing that may reach a user."""
    if not key:
        message = (
            "You didn't provide an API key. You need to provide it in an Authorization header using Bearer auth."
        )
        return Complaint(401, message)
    shown = key[:8] + "*" * 12 + key[-4:] if len(key) > 12 else key[:2] + "***"
    message = f"Incorrect API key provided: {shown}. You can find your API key in your account settings."
    return Complaint(401, message, code="invalid_api_key")


async def hang() -> None:
    """Wait for nothing, until the client goes and the call is cancelled."""
    await asyncio.get_running_loop().create_future()
