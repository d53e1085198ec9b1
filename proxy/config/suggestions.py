"""What was probably meant by a word, a window or a number that the file can't have.

A suggestion is one of the known words, or it is made of the number and the unit that were written. It is always valid
where it is suggested.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fractions import Fraction
from zoneinfo import ZoneInfo

from proxy.policy.amounts import TOKENS_MAX
from proxy.policy.windows import Duration, parse_per

_UTC = ZoneInfo("UTC")
# The comparison takes quadratic time, and a word may be megabytes long.
_WORD_MAX = 50
# How many letters a word needs to stand for a longer one that begins with it: `mon` for monday.
_BEGINNING_MIN = 3

# The units of durations and of the calendar, by the words that people write for them.
_UNIT_OF = {
    word: unit
    for unit, words in {
        "s": "s sec secs second seconds",
        "m": "m min mins minute minutes",
        "h": "h hr hrs hour hours",
        "d": "d day days",
        "w": "w wk wks week weeks",
        "month": "mo mos mon mth mths month months",
        "quarter": "q qtr quarter quarters",
        "year": "y yr yrs year years",
    }.items()
    for word in words.split()
}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_SECONDS |= {"month": 30 * 86_400, "quarter": 91 * 86_400, "year": 365 * 86_400}
_INTERVALS = {(1, "month"): "month", (3, "month"): "quarter", (12, "month"): "year", (1, "quarter"): "quarter"}
_INTERVALS |= {(4, "quarter"): "year", (1, "year"): "year"}
# A unit alone is an interval of the calendar.
_INTERVAL_OF = {
    word: {"m": "minute", "h": "hour", "d": "day", "w": "week"}.get(unit, unit)
    for word, unit in _UNIT_OF.items()
    if unit != "s"
}
_INTERVAL_OF |= {f"{unit}ly": unit for unit in ("minute", "hour", "week", "month", "quarter", "year")}
_INTERVAL_OF |= {"daily": "day", "annual": "year", "annually": "year"}
_PART = r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*([a-z]+)"
_PARTS = re.compile(rf"(?:{_PART}[\s,]*)+")

# Numbers with the thousands apart, a power of ten, a word for thousands or millions, and the name of what is counted.
_TIMES = {
    word: times
    for times, words in {
        1: "",
        10**3: "k t tsd thousand thousands",
        10**6: "m mn mio mil mill million millions",
        10**9: "b bn billion billions",
    }.items()
    for word in (words.split() or [""])
}
_NUMBER = re.compile(
    r"([0-9]{1,3}(?:[ ,'_’][0-9]{3}){1,4}|[0-9]{1,15})(?:\.([0-9]{1,6}))?(?:e\+?([0-9]{1,2}))?\s*"
    rf"({'|'.join(sorted(_TIMES, key=len, reverse=True))})\s*"
    r"(?:(?:input |output )?(?:token|tok|request|req|call)s?)?",
    re.IGNORECASE,
)
_NO_LIMIT = frozenset("-1 unlimited infinite infinity inf .inf none no_limit nolimit".split())


def similar_word(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most similar, or that begins with this one; None if there is none."""
    by_lower = {each.lower(): each for each in reversed(tuple(known))}
    lower = word[:_WORD_MAX].lower().strip()
    if lower in by_lower:
        return by_lower[lower]
    if len(lower) >= _BEGINNING_MIN:
        longer = [each for each in by_lower if each.startswith(lower)]
        shorter = [each for each in by_lower if len(each) >= _BEGINNING_MIN and lower.startswith(each)]
        if len(longer) == 1 or (len(shorter) == 1 and not longer):
            return by_lower[(longer or shorter)[0]]
    matches = get_close_matches(lower, list(by_lower), n=1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean "…"?` with the most similar known word, or an empty text if none is similar."""
    similar = similar_word(word, known)
    return "" if similar is None else f'did you mean "{similar}"?'


def similar_window(text: str) -> str | None:
    """The window that this text probably means: `6h` for `6 hours`, `day` for `daily`; None if nothing is likely."""
    words = _lower(text)
    if words.isalpha() and words != "m":  # which could be minutes or months
        similar = similar_word(words, _INTERVAL_OF)
        return None if similar is None else _INTERVAL_OF[similar]
    [(number, unit), *others] = _parts(words) or [(Fraction(), "")]
    interval = None if others or number.denominator != 1 else _INTERVALS.get((int(number), unit))
    return interval or _similar_duration(text)


def similar_duration(value: object, *, unit: str, bounds: tuple[int, int]) -> str | None:
    """The same for a duration within these bounds, in ms. `unit` is that of a number alone."""
    text = str(value)
    found = f"{text}{unit}" if text.isdecimal() else _similar_duration(text)
    length = as_duration(found)
    return found if length and bounds[0] <= length.length_ms <= bounds[1] else None


def _similar_duration(text: str) -> str | None:
    parts = _parts(_lower(text))
    if len(parts) == 1 and len(parts[0][1]) == 1 and parts[0][0].denominator == 1:
        found = f"{parts[0][0]}{parts[0][1]}"  # in its own unit: 24h, not 1d
    else:
        found = _in_largest_unit(sum((number * _SECONDS.get(unit, 0) for number, unit in parts), Fraction()))
    return found if found != text and as_duration(found) else None


def _lower(text: str) -> str:
    return re.sub(r"^(?:per|each|every|an?|the)\s+", "", text[:_WORD_MAX].strip().lower())


def _parts(text: str) -> list[tuple[Fraction, str]]:
    """The numbers of a duration with their units: `1h 30min` is 1 `h` and 30 `m`. Empty if it is none."""
    if not _PARTS.fullmatch(text):
        return []
    found = [(Fraction(number), _unit(word)) for number, word in re.findall(_PART, text)]
    return found if all(unit for _, unit in found) else []


def _unit(word: str) -> str:
    similar = similar_word(word, _UNIT_OF) if len(word) >= _BEGINNING_MIN else word
    return _UNIT_OF.get(similar or "", "")


def _in_largest_unit(seconds: Fraction) -> str:
    units = (unit for unit in ("d", "h", "m", "s") if (seconds / _SECONDS[unit]).denominator == 1)
    return next((f"{seconds / _SECONDS[unit]}{unit}" for unit in units), "")


def as_duration(value: object) -> Duration | None:
    """The duration of this text; None if it is none."""
    try:
        found = parse_per(value, _UTC) if isinstance(value, str) else None
    except ValueError:
        return None
    return found if isinstance(found, Duration) else None


def similar_count(value: object) -> str | None:
    """The whole number that this probably means, as the file would have it: `5M` for `5m`, `200k` for `200,000`."""
    match = _NUMBER.fullmatch(str(value)[:_WORD_MAX].strip())
    if not match or (match[2] and not match[3] and not match[4]):  # 1.000 may be one or a thousand
        return None
    whole, decimals, power, word = match.groups(default="")
    number = Fraction(f"{re.sub('[^0-9]', '', whole)}.{decimals or 0}") * 10 ** int(power or 0) * _TIMES[word.lower()]
    if number.denominator != 1 or number > TOKENS_MAX:
        return None
    return count_text(int(number))


def count_text(number: int) -> str:
    """A number as a person would write it into the file: 200k, 5M."""
    for times, suffix in ((10**6, "M"), (10**3, "k")):
        if number and number % times == 0:
            return f"{number // times}{suffix}"
    return str(number)


def means_no_limit(value: object) -> bool:
    """Whether somebody writes this for a limit that does not exist."""
    return str(value).strip().lower() in _NO_LIMIT
