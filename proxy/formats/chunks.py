"""A chunk of a stream: read as leniently as clients do, and written as it would have come had nobody asked for usage.

What was put in for us is cut out of the bytes, so that all others stay as they were; where that is not to be done
safely the chunk is written anew.
"""

import json
from typing import Any

import orjson

from proxy.formats.sse import Event
from proxy.formats.strict_json import dump

# What every chunk has; one with no choices and nothing beyond these came only because usage was asked for.
_COMMON_KEYS = frozenset(
    ("id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage", "obfuscation")
)
# The member as servers write it that say "no usage yet" on every chunk, with the comma that goes with it. The zeros
# are Ollama's, on each chunk of /completions.
_PLACEHOLDERS = (
    b',"usage":null',
    b', "usage": null',
    b'"usage":null,',
    b'"usage": null, ',
    b',"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}',
)


def read_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in these bytes, or None."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:  # NaN, infinities and halves of surrogate pairs are no JSON, and there are clients that read them
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def more_than_usage(chunk: dict[str, Any]) -> set[str]:
    """What a chunk says beside what every chunk has."""
    return {key for key, value in chunk.items() if value is not None and key not in _COMMON_KEYS}


def is_finished(chunk: dict[str, Any]) -> bool:
    """Whether it is the last of its one choice."""
    match chunk.get("choices"):
        case [{"finish_reason": str()}]:
            return True
    return False


def with_timings(raw: bytes, chunk: dict[str, Any], of: Event, usage_chunk: dict[str, Any]) -> bytes:
    """The last chunk with the timings of the usage chunk, where llama.cpp writes them unasked: as its last member."""
    whole = {**chunk, "timings": usage_chunk["timings"]}
    place, start, end = raw.rfind(b"}"), of.raw.rfind(b'"timings":'), of.raw.rfind(b"}")
    moved = raw[:place] + b"," + of.raw[start:end] + raw[place:]
    return moved if start >= 0 and _says(moved, whole) else b"data: " + dump(whole) + b"\n\n"


def without_timings(event: Event, chunk: dict[str, Any]) -> bytes:
    """The event without its `timings`, which llama.cpp writes on every chunk when it is asked to."""
    raw, rest = event.raw, {key: value for key, value in chunk.items() if key != "timings"}
    start = raw.rfind(b',"timings":{')
    cut = raw[:start] + raw[raw.find(b"}", start) + 1 :]
    return cut if start >= 0 and _says(cut, rest) else b"data: " + dump(rest) + b"\n\n"


def without_usage(event: Event, chunk: dict[str, Any]) -> bytes:
    """The event without its `usage`, which stands there only because it was asked for.

    Where it is a placeholder it is cut out of the bytes, so that all others stay as they were; otherwise the event
    is written anew.
    """
    raw = event.raw
    rest = {key: value for key, value in chunk.items() if key != "usage"}
    # Inside a string the quotes would be escaped; but "usage" may be a whole string, or the name of an inner member.
    is_only_one = raw.count(b'"usage"') == 1
    for member in (*_PLACEHOLDERS, b',"usage":' + dump(chunk["usage"])):
        before, found, after = raw.partition(member)
        while found:
            if is_only_one or _says(before + after, rest):
                return before + after
            more, found, after = after.partition(member)
            before += member + more
    return b"data: " + dump(rest) + b"\n\n"


def _says(raw: bytes, chunk: dict[str, Any]) -> bool:
    return read_object(raw[raw.find(b"{") : raw.rfind(b"}") + 1]) == chunk
