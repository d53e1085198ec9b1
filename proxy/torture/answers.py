"""What a client of a torture run reads in an answer: whether it is complete, its usage, and how many words it has.

It reads an answer as any client does and shares nothing with the modules of the proxy that read answers, so a mistake
of theirs shows here.

Pure: takes bytes, returns values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

Tokens = tuple[int, int]  # input, output
JSON = dict[str, Any]

_FINAL_EVENTS = ("response.completed", "response.incomplete")


@dataclass(frozen=True, slots=True)
class ReceivedAnswer:
    """An answer, as much of it as arrived. `words` counts the words of its text; each is one simulated token."""

    is_complete: bool = False
    usage: Tokens | None = None
    words: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A 429 as its client reads it. `free_tokens`, `quota` and `window_opened_at` are of the one with the least left.

    Both times are seconds since 1970. `window_opened_at` is None if that quota's window is not open yet. `limits` has
    the tokens that each quota allows, by its id.
    """

    free_tokens: int | None = None
    window_opened_at: int | None = None
    resets_at: int | None = None
    quota: str | None = None
    limits: tuple[tuple[str, int], ...] = ()


def read_whole(body: bytes) -> ReceivedAnswer:
    """Read the body of an answer that is not streamed."""
    answer = _object(body)
    if answer is None:
        return ReceivedAnswer()
    texts = [choice.get("text") or choice.get("message", {}).get("content") for choice in answer.get("choices", ())]
    texts += [part.get("text") for item in answer.get("output", ()) for part in item.get("content", ())]
    is_complete = answer.get("error") is None  # /responses has `"error": null` in a good answer
    return ReceivedAnswer(is_complete, _usage(answer), _words(texts))


def read_stream(data: bytes) -> ReceivedAnswer:
    """Read a stream, or the beginning of one. It is complete if its last event arrived."""
    is_complete, usage, words = False, None, 0
    for chunk in _events(data):
        if chunk is None:
            is_complete = True
            continue
        texts = [
            choice.get("text") or choice.get("delta", {}).get("content") for choice in chunk.get("choices") or ()
        ]
        words += _words([*texts, chunk.get("delta")])
        final = chunk.get("response") if chunk.get("type") in _FINAL_EVENTS else None
        is_complete = is_complete or final is not None
        usage = _usage(final or chunk) or usage
    return ReceivedAnswer(is_complete, usage, words)


def is_between_text_and_end(chunk: bytes) -> bool:
    """Whether the text of a stream ends in this chunk, but the usage and the last event are still to come."""
    is_text_over = (
        b'"finish_reason":"' in chunk or b'"finish_reason": "' in chunk or b"response.output_text.done" in chunk
    )
    return is_text_over and b"[DONE]" not in chunk and not any(event.encode() in chunk for event in _FINAL_EVENTS)


def read_refusal(body: bytes) -> Refusal:
    """Read a 429: how many tokens are free according to the proxy, and when it says the quota resets."""
    error = (_object(body) or {}).get("error")
    if not isinstance(error, dict):
        return Refusal()
    quotas = [quota for quota in error.get("quotas") or () if quota.get("tokens")]
    resets_at = error.get("resets_at")
    if not quotas:
        return Refusal(resets_at=resets_at)
    tightest = min(quotas, key=_free_tokens)
    return Refusal(
        _free_tokens(tightest),
        tightest["window"]["opened_at"],
        resets_at,
        quota=tightest.get("id"),
        limits=tuple((quota["id"], quota["tokens"]["limit"]) for quota in quotas if "id" in quota),
    )


def _free_tokens(quota: Mapping[str, Any]) -> int:
    free: int = quota["tokens"]["limit"] - quota["tokens"]["used"]
    return free


def _events(data: bytes) -> Iterator[JSON | None]:
    """Yield the objects of a stream's complete events; None for `[DONE]`."""
    for event in data.replace(b"\r\n", b"\n").split(b"\n\n")[:-1]:
        payload = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if payload == b"[DONE]":
            yield None
        elif (chunk := _object(payload)) is not None:
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
    input_tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
    output_tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
    if isinstance(input_tokens, int) and isinstance(output_tokens, int):
        return input_tokens, output_tokens
    return None


def _words(texts: list[Any]) -> int:
    return sum(len(text.split()) for text in texts if isinstance(text, str))
