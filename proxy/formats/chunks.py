"""Chunks of /chat/completions and /completions streams: parse them, and remove what only the proxy asked for.

The proxy asks for usage in the client's place (`formats.request`), so the upstream adds members to chunks. They are
cut out of the bytes, and all other bytes stay the same: numbers, escapes, spaces and line ends. Example:

    data: {"id":"c","x":1.50,"choices":[…],"usage":null}     from the upstream
    data: {"id":"c","x":1.50,"choices":[…]}                  to the client

If a member cannot be cut out safely, because it has an unusual spelling or another member looks like it, the chunk is
serialized anew from the parsed object. Pure.
"""

import json
from typing import Any

import orjson

from proxy.formats.sse import Event
from proxy.formats.strict_json import dump

# Members that any chunk may have. A chunk without choices that has no others was sent only because usage was
# requested.
_COMMON_KEYS = frozenset(
    ("id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage", "obfuscation")
)
# The spellings of "no usage yet" on a chunk, with the comma that has to be removed too: a comma before the member, or
# behind it if the member is the first. The zeros are Ollama's, on every chunk of /completions.
_PLACEHOLDERS = (
    b',"usage":null',
    b', "usage": null',
    b'"usage":null,',
    b'"usage": null, ',
    b',"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}',
)


def read_object(data: bytes) -> dict[str, Any] | None:
    """Parse the data of an event; None if it is no JSON object.

    NaN, infinities and unpaired surrogates are accepted. They are not JSON, but some clients parse them.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def extra_members(chunk: dict[str, Any]) -> set[str]:
    """The names of members with a value, beyond those that any chunk may have."""
    return {key for key, value in chunk.items() if value is not None and key not in _COMMON_KEYS}


def is_finish_chunk(chunk: dict[str, Any]) -> bool:
    """Whether the chunk has exactly one choice and states its `finish_reason`."""
    match chunk.get("choices"):
        case [{"finish_reason": str()}]:
            return True
    return False


def with_timings(raw: bytes, chunk: dict[str, Any], usage_event: Event, usage_chunk: dict[str, Any]) -> bytes:
    """The finish chunk (`raw`, parsed as `chunk`) with the `timings` of the usage chunk as its last member.

    That is where llama.cpp writes them if no usage is requested.
    """
    expected = {**chunk, "timings": usage_chunk["timings"]}
    # In the usage chunk the timings are the last member too: `…,"timings":{…}}`. Everything between the name and the
    # last brace is copied in front of the last brace of the finish chunk.
    insert_at = raw.rfind(b"}")
    start, end = usage_event.raw.rfind(b'"timings":'), usage_event.raw.rfind(b"}")
    moved = raw[:insert_at] + b"," + usage_event.raw[start:end] + raw[insert_at:]
    return moved if start >= 0 and _parses_to(moved, expected) else _serialize(expected)


def without_timings(event: Event, chunk: dict[str, Any]) -> bytes:
    """The event without `timings`, which llama.cpp writes on every chunk if `timings_per_token` is set."""
    raw, expected = event.raw, {key: value for key, value in chunk.items() if key != "timings"}
    start = raw.rfind(b',"timings":{')
    cut = raw[:start] + raw[raw.find(b"}", start) + 1 :]  # timings contain only numbers, so the first } ends them
    return cut if start >= 0 and _parses_to(cut, expected) else _serialize(expected)


def without_usage(event: Event, chunk: dict[str, Any]) -> bytes:
    """The event without `usage`, which is there only because the proxy asked for it."""
    raw = event.raw
    expected = {key: value for key, value in chunk.items() if key != "usage"}
    # Quotes inside a string are escaped, so `"usage"` with plain quotes is a name or a whole string. If it occurs
    # once, it is the member. Otherwise it may also be a string (`"note":"usage"`) or the member of an inner object
    # (`{"a":{"x":1,"usage":null},"usage":null}`), so each place where it could be cut is checked by parsing the
    # result.
    is_only_one = raw.count(b'"usage"') == 1
    for member in (*_PLACEHOLDERS, b',"usage":' + dump(chunk["usage"])):
        before, found, after = raw.partition(member)
        while found:
            if is_only_one or _parses_to(before + after, expected):
                return before + after
            skipped, found, after = after.partition(member)
            before += member + skipped
    return _serialize(expected)


def _parses_to(raw: bytes, chunk: dict[str, Any]) -> bool:
    return read_object(raw[raw.find(b"{") : raw.rfind(b"}") + 1]) == chunk


def _serialize(chunk: dict[str, Any]) -> bytes:
    return b"data: " + dump(chunk) + b"\n\n"
