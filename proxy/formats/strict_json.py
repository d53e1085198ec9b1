"""Request bodies as JSON, read so that everybody who reads them again reads the same.

Quotas and permissions are decided on what is read here, and other servers read the same bytes after us. Go's
decoder takes `MODEL` for `model` and the last of two twins wins or loses by the language; so what could be read
in two ways is refused: keys that stand twice, keys of the outermost object that differ only in case, `NaN` and
`Infinity`, fractions beyond a double, bytes that are not UTF-8. Depth is bounded, so that no body can overflow a
stack, ours or the upstream's.
"""

import json
import math
from typing import Any

import orjson

from proxy.errors import InvalidRequest

DEPTH_MAX = 64
# What takes long to read is many values: 15 MB of `{},` two seconds, 30 MB of `1,` more than one. So many take 0.9 s
# at worst, for which nobody else is served.
_VALUES_MAX = 1_000_000
_DIGITS_MAX = 40
_KEYS_MAX = 1000
_SEPARATORS = (b",", b"{", b"[")


def parse_object(body: bytes, known: frozenset[str]) -> dict[str, Any]:
    """The JSON object in a request's body; raises InvalidRequest with what to mend.

    `known` are the fields that something is decided on: another spelling of one of them is refused.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8 (byte {error.start}).", code="invalid_json") from None
    if sum(map(body.count, _SEPARATORS)) > _VALUES_MAX:
        raise InvalidRequest(f"The body has more than {_VALUES_MAX} commas and brackets.", code="invalid_json")
    if not text.strip():
        raise InvalidRequest("The body is empty: send a JSON object.", code="invalid_json")
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {_reason(error)}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    _refuse_case_twins(value, known)
    if not _is_shallow(value):
        raise InvalidRequest(f"The body is nested more than {DEPTH_MAX} levels deep.", code="invalid_json")
    return value


def dump(value: object) -> bytes:
    """A value as compact JSON in UTF-8."""
    try:
        return orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits and lone surrogates: legal JSON, which is passed on as it came
        return json.dumps(value, separators=(",", ":")).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f'the key "{twin[:80]}" stands twice')
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return number


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _bounded(text: str) -> int:
    if len(text) > _DIGITS_MAX:
        raise ValueError("a number has too many digits")
    return int(text)


# `strict` refuses control characters inside strings, as the standard does.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_int=_bounded, parse_constant=_no_constant, strict=True
)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"it is nested more than {DEPTH_MAX} levels deep"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno}"
    return str(error)


def _refuse_case_twins(value: dict[str, Any], known: frozenset[str]) -> None:
    if len(value) > _KEYS_MAX:
        raise InvalidRequest(f"The body has more than {_KEYS_MAX} keys.", code="invalid_json")
    by_case = {field: field for field in known}
    for key in value:
        # Folded as Go's decoder does: it takes a long s (U+017F) for an s, which lower() would leave.
        twin = by_case.setdefault(key.casefold(), key)
        if twin != key:
            raise InvalidRequest(
                f'The keys "{twin[:80]}" and "{key[:80]}" differ only in case: write it as the first.',
                code="invalid_json",
            )


def _is_shallow(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(DEPTH_MAX):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)  # type: ignore[attr-defined]
            if isinstance(child, (dict, list))
        ]
        if not level:
            return True
    return False
