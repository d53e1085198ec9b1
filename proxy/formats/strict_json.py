"""Read request bodies as strict JSON, so that every program that parses the same bytes sees the same values.

Quotas and permissions are decided on the values read here, and the upstream reads the request after us. Parsers
differ: Go's `encoding/json` accepts `MODEL` for `model`, and protobuf's accepts `maxTokens` for `max_tokens`. A body
that could be read in two ways is therefore refused: outermost keys that are two spellings of one name, `NaN` and
`Infinity`, fractions beyond the range of a double, bytes that are not UTF-8.

Of equal keys in one object the last counts. The upstream gets the key once, because what is sent is written anew from
what was read here. To refuse equal keys would take another parser for every body, which needs three times as long.

How deep a body may be nested is found with its meaning (`body`).
"""

import codecs
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import orjson

from proxy.errors import InvalidRequest

DEPTH_MAX = 64
# orjson reads integers below -2^63 and from 2^64 on as floats.
INTEGERS_MAX = float(2**63)
# The time to parse, check and read a body grows with the number of its values, not of its bytes: 1.4 MB of `{},` took
# 2.4 s. It also bounds how long the interpreter can't run anything else, because orjson parses without a pause.
VALUES_MAX = 100_000
# Every value except the first has a comma before it, or the bracket of a container that is not empty.
_SEPARATORS = (b",", b"{", b"[")
_PIECE_BYTES = 65_536
# A member of an object has two strings, and a string two quotes.
_QUOTES_MAX = 4 * VALUES_MAX
_BYTES_OF_A_VALUE = 32
_COUNTED_BYTES_MIN = 16_384
_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")
# The mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_TOO_DEEP = f"it is nested more than {DEPTH_MAX} levels deep"
# int() takes time quadratic in the number of digits. 40 characters hold any 128-bit integer with its sign.
DIGITS_MAX = 40
# Each outermost key is brought into its plain spelling and looked up among all others.
_KEYS_MAX = 1000


def parse_object(
    body: bytes | bytearray, known: frozenset[str], *, usual: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Parse the JSON object in a request's body. Raises InvalidRequest, whose message says what to correct.

    `known` are the fields that the proxy decides on. Another spelling of one of them (`MODEL`, `maxTokens`) is
    refused even if the field itself is absent, because some server would read it. `usual` are those and others, none
    of which is a spelling of another: a body that has only these gets no closer look. Depth is not checked.

    An integer beyond 64 bits becomes a float. If a float is so large, `parse_exactly` reads the body again.
    """
    # A value and its separator take two bytes, so short bodies have fewer values.
    if len(body) >= 2 * VALUES_MAX:
        _refuse_too_many_values(body)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        # Halves of surrogate pairs are legal JSON. For all else the message is clearer.
        value = parse_exactly(body)
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    if not usual.issuperset(value):
        _refuse_other_spellings(value, known)
    return value


def parse_exactly(body: bytes | bytearray) -> Any:
    """Parse JSON of any kind, with integers of up to 40 digits. Raises InvalidRequest as `parse_object` does.

    It reads whatever orjson reads, and takes three times as long.
    """
    _refuse_other_encoding(body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8 (byte {error.start}).", code="invalid_json") from None
    if not text.strip():
        raise InvalidRequest("The body is empty: send a JSON object.", code="invalid_json")
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {_reason(error)}.", code="invalid_json") from None


def _refuse_other_encoding(body: bytes | bytearray) -> None:
    """Raise InvalidRequest for a byte order mark, and for the beginning of JSON in UTF-16 or UTF-32 without one.

    RFC 8259 §8.1 forbids the mark. Some servers ignore it, and others refuse the body or read it as a character.
    """
    found = next((name for mark, name in _BYTE_ORDER_MARKS if body.startswith(mark)), None)
    if found == "UTF-8":
        raise InvalidRequest(
            "The body begins with a byte order mark (the bytes EF BB BF). Send the JSON without it.",
            code="invalid_json",
        )
    if found is not None or 0 in body[:2]:
        shown = found or "UTF-16 or UTF-32"
        raise InvalidRequest(f"The body is in {shown}. Send the JSON in UTF-8.", code="invalid_json")


def reading_cost(body: bytes | bytearray) -> int:
    """How much work it is to parse, check and read a body: the length of a single text that takes as long, in bytes.

    One value takes as long as 32 bytes or more of text: 8,192 values in 20 kB cost as much as 256 KiB, some 20 ms.
    """
    # A value and its separator take two bytes. In a long body even the most values that it may have make no
    # difference, and counting them would take 30 ms on the event loop.
    if not _COUNTED_BYTES_MIN < len(body) < _BYTES_OF_A_VALUE * VALUES_MAX:
        return len(body)
    return max(len(body), _BYTES_OF_A_VALUE * separators_in(body))


def separators_in(body: bytes | bytearray) -> int:
    """How many commas and opening brackets JSON has, also inside of strings. It has at most one value more.

    More than VALUES_MAX are not counted to the end.
    """
    found = 0
    for start in range(0, len(body), _PIECE_BYTES):
        piece = body[start : start + _PIECE_BYTES]
        for separator in _SEPARATORS:  # to remove them takes a fifth of the time of `count` where there are few
            found += len(piece) - len(piece.replace(separator, b""))
        if found > VALUES_MAX:
            break
    return found


def _refuse_too_many_values(body: bytes | bytearray) -> None:
    """Raise InvalidRequest if a body has more than VALUES_MAX values, before it is parsed.

    Counted are the separators outside of strings, without those of empty containers. If the body is not valid JSON,
    the count is right up to the first mistake, where the parser stops.
    """
    # Nearly all bodies have few separators even with those inside their texts.
    if separators_in(body) < VALUES_MAX:
        return
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') <= _QUOTES_MAX:
        # Every second piece is inside a string. One quote stays for each string, so that [""] does not look empty.
        outside = b'"'.join(unescaped.split(b'"')[::2]).translate(_BRACES_TO_BRACKETS, b" \t\r\n:")
        if 1 + outside.count(b",") + outside.count(b"[") - outside.count(b"[]") <= VALUES_MAX:
            return
        if b"[" * (DEPTH_MAX + 1) in outside.replace(b'"', b""):  # the more helpful message
            raise InvalidRequest(f"The body is not valid JSON: {_TOO_DEEP}.", code="invalid_json")
    raise InvalidRequest(
        f"The body has more than {VALUES_MAX} JSON values. Send fewer messages, parts or numbers in one request; "
        "a text counts as one value, however long it is.",
        code="invalid_json",
    )


def dump(value: object) -> bytes:
    """Serialise a value as compact JSON in UTF-8."""
    try:
        return orjson.dumps(value)
    except TypeError:  # orjson refuses integers beyond 64 bits and lone surrogates; both are legal JSON and are kept
        return json.dumps(value, separators=(",", ":")).encode()


def walk(value: object, members: Callable[[dict[str, Any]], Iterable[object]] = dict.values) -> Iterator[object]:
    """Yield a JSON value and all values below it: depth first, in the order in which they are written.

    `members` returns the values of an object that are walked; by default all of them. The walk is not recursive, so
    no depth overflows the stack.

        walk({"a": [1, {"b": 2}], "c": 3})  →  the object itself, [1, {"b": 2}], 1, {"b": 2}, 2, 3
    """
    pending = [value]
    while pending:
        value = pending.pop()
        yield value
        # Reversed, because the last value of the list is popped first.
        if isinstance(value, list):
            pending += reversed(value)
        elif isinstance(value, dict):
            pending += reversed([*members(value)])


def refuse_equal_keys(body: bytes | bytearray) -> None:
    """Raise InvalidRequest if a key appears twice in an object of this JSON, which `parse_object` has read.

    For the administration: a mistake in what is stored should not be corrected in silence.
    """
    try:
        json.loads(body, object_pairs_hook=_object_without_equal_keys)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {_reason(error)}.", code="invalid_json") from None


def _object_without_equal_keys(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f'the key "{key[:80]}" appears twice')
        seen.add(key)


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e999 became infinity, which can't be written as JSON again
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return number


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _bounded_int(text: str) -> int:
    if len(text) > DIGITS_MAX:
        raise ValueError("a number has too many digits")
    return int(text)


# `strict` refuses control characters inside strings, as RFC 8259 §7 does.
_DECODER = json.JSONDecoder(
    parse_float=_finite_float,
    parse_int=_bounded_int,
    parse_constant=_refuse_constant,
    strict=True,
)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if isinstance(error, json.JSONDecodeError):  # some of Python's messages end with " at", which is doubled here
        return f"{error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno}"
    return str(error)


def plain_name(name: str) -> str:
    """A name in the one spelling that all its spellings share: `max_tokens`, `MAX_TOKENS`, `maxTokens`, `max-tokens`.

    Go's decoder ignores case. It also takes a long s (U+017F) for "s" and a Kelvin sign (U+212A) for "k". casefold()
    maps both to the plain letter; lower() would leave the long s. Protobuf's JSON has each name in camel case too.
    """
    return name.casefold().replace("_", "").replace("-", "")


@lru_cache(maxsize=8)  # in production there is one set of known fields
def _by_plain_name(known: frozenset[str]) -> Mapping[str, str]:
    return {plain_name(field): field for field in known}


def _refuse_other_spellings(value: dict[str, Any], known: frozenset[str]) -> None:
    if len(value) > _KEYS_MAX:
        raise InvalidRequest(f"The body has more than {_KEYS_MAX} keys.", code="invalid_json")
    known_names = _by_plain_name(known)
    by_case: dict[str, str] = {}
    for key in value:
        if key in known:
            continue
        first = known_names.get(plain_name(key)) or by_case.setdefault(key.casefold(), key)
        if first != key:
            difference = "differ only in case" if first.casefold() == key.casefold() else "are one name"
            raise InvalidRequest(
                f'The keys "{first[:80]}" and "{key[:80]}" {difference}: use only the first.',
                code="invalid_json",
            )
