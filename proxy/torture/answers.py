"""What a client of a torture run reads out of an answer: whether it is whole, its usage, and how much text there was.

It reads as any client would and on purpose shares nothing with the modules of the proxy that read answers, so that
a mistake of theirs can't hide here.

Pure: takes bytes, gives values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

Tokens = tuple[int, int]  # input, output
JSON = dict[str, Any]

_RESPONSE_ENDS = ("response.completed", "response.incomplete")


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer as far as it came. `words` are the words of its text; one is a token of the simulated upstream."""

    is_whole: bool = False
    usage: Tokens | None = None
    words: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A 429 as its client reads it. `free` and `window` speak of the quota that has the least left.

    `window` is the second in which that quota's window opened; None: it is not open.
    """

    free: int | None = None
    window: int | None = None
    resets_at: int | None = None


def read_whole(body: bytes) -> Reading:
    """Read the body of an answer that is not a stream."""
    answer = _object(body)
    if answer is None:
        return Reading()
    texts = [choice.get("text") or choice.get("message", {}).get("content") for choice in answer.get("choices", ())]
    texts += [part.get("text") for item in answer.get("output", ()) for part in item.get("content", ())]
    return Reading("error" not in answer or answer["error"] is None, _usage(answer), _words(texts))


def read_stream(data: bytes) -> Reading:
    """Read a stream, or the beginning of one: it is whole when its last event has come."""
    is_whole, usage, words = False, None, 0
    for chunk in _events(data):
        if chunk is None:
            is_whole = True
            continue
        texts = [
            choice.get("text") or choice.get("delta", {}).get("content") for choice in chunk.get("choices") or ()
        ]
        words += _words([*texts, chunk.get("delta")])
        ended = chunk.get("response") if chunk.get("type") in _RESPONSE_ENDS else None
        is_whole = is_whole or ended is not None
        usage = _usage(ended or chunk) or usage
    return Reading(is_whole, usage, words)


def is_near_the_end(chunk: bytes) -> bool:
    """Whether a piece of a stream says that the text is over, but not that all is."""
    is_over = b'"finish_reason":"' in chunk or b'"finish_reason": "' in chunk or b"response.output_text.done" in chunk
    return is_over and b"[DONE]" not in chunk and not any(end.encode() in chunk for end in _RESPONSE_ENDS)


def read_refusal(body: bytes) -> Refusal:
    """Read a 429: what is free by its own words, and when it promises to let the call in."""
    error = (_object(body) or {}).get("error")
    if not isinstance(error, dict):
        return Refusal()
    quotas = [quota for quota in error.get("quotas") or () if quota.get("tokens")]
    resets_at = error.get("resets_at")
    if not quotas:
        return Refusal(resets_at=resets_at)
    tightest = min(quotas, key=_free)
    return Refusal(free=_free(tightest), window=tightest["window"]["opened_at"], resets_at=resets_at)


def _free(quota: Mapping[str, Any]) -> int:
    free: int = quota["tokens"]["limit"] - quota["tokens"]["used"]
    return free


def _events(data: bytes) -> Iterator[JSON | None]:
    """The objects of a stream's whole events; None for `[DONE]`."""
    for event in data.replace(b"\r\n", b"\n").split(b"\n\n")[:-1]:
        said = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if said == b"[DONE]":
            yield None
        elif (chunk := _object(said)) is not None:
            yield chunk


def _object(data: bytes) -> JSON | None:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _usage(answer: JSON) -> Tokens | None:
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    taken = usage.get("prompt_tokens", usage.get("input_tokens"))
    given = usage.get("completion_tokens", usage.get("output_tokens", 0))
    return (taken, given) if isinstance(taken, int) and isinstance(given, int) else None


def _words(texts: list[Any]) -> int:
    return sum(len(text.split()) for text in texts if isinstance(text, str))
