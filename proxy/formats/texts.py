"""The model's texts in an answer, and in a part of it.

What an answer does not state is counted from its texts. A client may understand an answer that is broken, or that is
no JSON at all, so texts are found there too. Other bytes of an answer are never counted: names, ids, numbers. Pure.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import orjson

from proxy.formats.strict_json import DIGITS_MAX, VALUES_MAX, separators_in, walk

# Members of a choice or an item that contain no text of the model: names and ids, reasons, filter results, the same
# text again as single tokens (logprobs), and audio as base64 (data). Counting them would charge a broken stream
# several times too much.
_NOT_TEXT = frozenset(
    "role type id index call_id status finish_reason native_finish_reason stop_reason logprobs prompt_logprobs "
    "content_filter_results data signature".split()
)
_PLAIN_CHOICE = frozenset(("index", "delta", "finish_reason", "logprobs"))
# The same in an answer in the shape of another API, where all members are looked at: what the answer is and whose,
# what it repeats of the request, what a server adds to it, and what it states of its usage.
_NOT_TEXT_ELSEWHERE = _NOT_TEXT - {"data"} | frozenset(
    "object model version modelVersion created created_at createTime updated_at expires_at completed_at date "
    "system_fingerprint service_tier provider region obfuscation language lang event event_type "
    "error errors warning warnings code param detail details trace debug metadata meta usage usageMetadata timings "
    "usage_metadata x_groq prompt_filter_results content_filter_offsets safetyRatings safety_ratings promptFeedback "
    "citationMetadata groundingMetadata urlContextMetadata moderation stop stop_sequence stop_details "
    "incomplete_details finishReason done_reason avgLogprobs logprobsResult context_management container "
    "instructions tools tool_choice prompt context user reasoning_effort truncation generation_settings parameters "
    "annotations citations sources search_results search_queries related_questions images url urls "
    "encrypted_content thoughtSignature thought_signature b64_json partial_image_b64 mime_type mimeType "
    "index amazon-bedrock-invocationMetrics".split()
)
# Members that are base64 if they are a string, and an error if it is a message. Objects of these names have texts.
_NOT_TEXT_AS_STRING = frozenset("data audio image message".split())
_IDS = ("_id", "Id", "_ids", "_type", "_key", "_tier")
# Members that contain text of the model, in JSON that can't be parsed. There it is unknown what a member is a part
# of, so only names that have no other meaning are in this list.
_TEXT = frozenset(
    "content text reasoning reasoning_content reasoning_text refusal arguments thinking partial_json transcript "
    "delta output_text response completion generated_text".split()
)
# A string, whether it is closed, and whether a colon follows, which makes it a name. Possessive repeats never go
# back, so a search takes time proportional to the length of the text, even if its last string is never closed.
_STRING = re.compile(r'"((?:[^"\\]++|\\.)*+)"?+\s*+(:?)', re.DOTALL)
# The most strings that are looked at in JSON that can't be parsed: they block the event loop for about 0.3 s.
_STRINGS_MAX = 250_000


def read_object(data: bytes) -> dict[str, Any] | None:
    """Parse the data of an event; None if it is no JSON object.

    NaN, infinities and unpaired surrogates are accepted. They are not JSON, but some clients parse them.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        value = _parse_leniently(data)
    return value if isinstance(value, dict) else None


def read_list(data: bytes) -> list[Any] | None:
    """The same for a JSON list."""
    value = _parse(data)
    return value if isinstance(value, list) else None


def _parse(data: bytes) -> object:
    """Parse JSON; None if that is not possible, or if it is `null`."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return _parse_leniently(data)


def _parse_leniently(data: bytes) -> object:
    # Python's parser takes three times as long as orjson, and longer still if numbers need special care.
    if len(data) > VALUES_MAX and separators_in(data) > VALUES_MAX:
        return None
    try:
        return json.loads(data, parse_int=_bounded_int)
    except (ValueError, RecursionError):
        return None


def _bounded_int(digits: str) -> float:
    return int(digits) if len(digits) <= DIGITS_MAX else math.inf


def texts_in(part: object) -> Iterator[str]:
    """The texts in a part of an answer, at any depth: content, refusals, arguments of tool calls."""
    return (value for value in walk(part, _members_with_text) if isinstance(value, str) and value)


def plain_text(choices: object) -> str | None:
    """The text of a chunk with one choice that has a text and nothing else, as nearly all chunks; None otherwise."""
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    delta = choices[0].get("delta")
    if not isinstance(delta, dict) or len(delta) != 1 or not _PLAIN_CHOICE.issuperset(choices[0]):
        return None
    text = delta.get("content")
    return text if isinstance(text, str) else None


def _members_with_text(members: dict[str, Any]) -> list[object]:
    return [value for name, value in members.items() if name not in _NOT_TEXT]


def texts_in_other_shape(answer: dict[str, Any]) -> Iterator[str]:
    """The texts in an answer or event whose shape is unknown: all strings, but those in members that have none.

    {"model": "m", "response": "Hi", "done": false}                                    Hi       (Ollama)
    {"candidates": [{"content": {"role": "model", "parts": [{"text": "Hi"}]}}]}        Hi       (Gemini)
    """
    return (value for value in walk(answer, _members_in_other_shape) if isinstance(value, str) and value)


def _members_in_other_shape(members: dict[str, Any]) -> list[object]:
    if members.get("object") == "response":  # it repeats much of the request
        return [members.get("output"), members.get("output_text")]
    return [
        value
        for name, value in members.items()
        if name not in _NOT_TEXT_ELSEWHERE
        and not name.endswith(_IDS)
        and not (name in _NOT_TEXT_AS_STRING and isinstance(value, str))
    ]


def is_error(answer: dict[str, Any]) -> bool:
    """Whether an answer or event is an error, whose message is no text of the model."""
    kind = answer.get("type")
    return (
        answer.get("error") is not None
        or (isinstance(kind, str) and kind.endswith(("error", "failed")))
        or answer.get("object") == "error"
    )


def texts_of_body(body: bytes) -> Iterator[str]:
    """The texts in a whole answer or an event that is no JSON object: all of it, unless it is JSON or was to be.

    A number and other JSON without texts have none. `null` counts as text, because it is short anyway.
    """
    beginning = body.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]  # servers write blank lines while they are busy
    if beginning in (b"{", b"["):
        return texts_of_broken_json(body)
    value = _parse(body) if beginning == b'"' or beginning.isdigit() or beginning == b"-" else None
    if value is None:
        return iter([body.decode("utf-8", "replace")])
    return iter([value] if isinstance(value, str) else [])


def texts_of_broken_json(data: bytes) -> Iterator[str]:
    """The texts in JSON that can't be parsed: the strings in members that have the model's text, never other bytes.

    `{"id":"c","choices":[{"message":{"content":"Hello","n":1e` has the text "Hello", and so has `["Hello"`.
    """
    name = "text" if data.lstrip()[:1] == b"[" else ""  # strings in an array without a name are text
    for string, _ in zip(_STRING.finditer(data.decode("utf-8", "replace")), range(_STRINGS_MAX), strict=False):
        if string[2]:
            name = string[1]
        elif name in _TEXT and string[1]:
            yield _unescaped(string[1])


def _unescaped(string: str) -> str:
    if "\\" not in string:
        return string
    try:
        return str(json.loads(f'"{string}"', strict=False))
    except ValueError:  # an escape that does not exist, or that broke off
        return string
