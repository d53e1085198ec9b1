"""Which window of a quota is open at an instant, and when it resets.

A window is computed from the clock whenever it is looked at; there is no reset job. Two kinds:

* `Duration` ("6h", "7d") opens with a subject's first admitted call and ends that long after it.
* `Calendar` ("day", "month") is an interval of the civil calendar in a time zone, daylight saving
  included: the 29th of March 2026 in Berlin has 23 hours, the 25th of October 25.

Instants are integers: milliseconds since 1970 in UTC. Local wall time is turned into UTC in one place
(`_instant`), and every calendar window starts where the one before it ends.
"""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Literal
from zoneinfo import ZoneInfo

MS = 1000
_MINUTE_MS = 60 * MS
_HOUR_MS = 60 * _MINUTE_MS
_DAY_MS = 24 * _HOUR_MS

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
Unit = Literal["minute", "hour", "day", "week", "month", "quarter", "year"]
UNITS: tuple[Unit, ...] = ("minute", "hour", "day", "week", "month", "quarter", "year")

_SUFFIX_MS = {"s": MS, "m": _MINUTE_MS, "h": _HOUR_MS, "d": _DAY_MS, "w": 7 * _DAY_MS}
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])")
_LONGEST_MS = 3660 * _DAY_MS


@dataclass(frozen=True, slots=True)
class Window:
    """One interval in which a counter counts: from `opened_at` up to, not including, `resets_at`."""

    opened_at: int
    resets_at: int

    def is_open(self, now: int) -> bool:
        """Whether `now` still belongs to it. A clock that jumps back does not close a window."""
        return now < self.resets_at


@dataclass(frozen=True, slots=True)
class Duration:
    """A window that opens with the first admitted call and lasts `length_ms`."""

    text: str
    length_ms: int
    kind: Literal["first_call"] = "first_call"

    def opening(self, now: int) -> Window:
        """The window that a call admitted at `now` opens."""
        return Window(now, now + self.length_ms)


@dataclass(frozen=True, slots=True)
class Calendar:
    """A window of the civil calendar in `zone`; weeks start on `week_starts` (0 is Monday)."""

    text: Unit
    zone: ZoneInfo
    week_starts: int = 0
    kind: Literal["calendar"] = "calendar"

    def opening(self, now: int) -> Window:
        """The calendar interval that holds `now`."""
        if self.text in ("minute", "hour"):
            return self._part_of_a_day(now, _MINUTE_MS if self.text == "minute" else _HOUR_MS)
        first, after = _dates(_local_date(now, self.zone), self.text, self.week_starts)
        return Window(_instant(first, self.zone), _instant(after, self.zone))

    def _part_of_a_day(self, now: int, step_ms: int) -> Window:
        # Counted from local midnight, not by the wall clock: the hour that is shown twice in autumn is two
        # windows of an hour each, and where the clock shifts by half an hour the day's last window is short.
        today = _local_date(now, self.zone)
        midnight, next_midnight = _instant(today, self.zone), _instant(today + timedelta(days=1), self.zone)
        opened_at = now - (now - midnight) % step_ms
        return Window(opened_at, min(opened_at + step_ms, next_midnight))


Per = Duration | Calendar


def parse_per(text: str, zone: ZoneInfo, week_starts: int = 0) -> Per:
    """The window that `per: …` names; raises ValueError that says what to write instead."""
    for unit in UNITS:
        if text == unit:
            return Calendar(unit, zone, week_starts)
    if text in ("1M", "M"):
        raise ValueError(
            f'"{text}" could be minutes or months: write "1m" for a minute or "month" for a calendar month'
        )
    if match := _DURATION.fullmatch(text):
        length_ms = int(match[1]) * _SUFFIX_MS[match[2]]
        if not 0 < length_ms <= _LONGEST_MS:
            raise ValueError(f'"{text}" is not between 1s and 3660d')
        return Duration(text, length_ms)
    raise ValueError(f'"{text}" is no window: write a duration (90s, 15m, 6h, 7d) or one of {", ".join(UNITS)}')


def rfc3339(instant: int, zone: ZoneInfo) -> str:
    """An instant as people write it in `zone`, with the offset: `2026-11-24T00:00:00+01:00`."""
    return datetime.fromtimestamp(-(-instant // MS), tz=zone).isoformat()


def _dates(today: date, unit: str, week_starts: int) -> tuple[date, date]:
    """The first day of the interval that holds `today`, and the first day after it."""
    if unit == "day":
        return today, today + timedelta(days=1)
    if unit == "week":
        first = today - timedelta(days=(today.weekday() - week_starts) % 7)
        return first, first + timedelta(days=7)
    months = {"month": 1, "quarter": 3, "year": 12}[unit]
    first = date(today.year, (today.month - 1) // months * months + 1, 1)
    last_month = first.month + months - 1
    return first, date(first.year + last_month // 12, last_month % 12 + 1, 1)


def _local_date(now: int, zone: ZoneInfo) -> date:
    """The day that has begun last. Where clocks go back over midnight, the wall shows the day before once more."""
    shown = datetime.fromtimestamp(now // MS, tz=zone).date()
    tomorrow = shown + timedelta(days=1)
    return tomorrow if _instant(tomorrow, zone) <= now else shown


@lru_cache(maxsize=1024)  # each decision asks for the same few, and time zones take their time
def _instant(day: date, zone: ZoneInfo) -> int:
    """When `day` begins in `zone`.

    fold=0 takes the first of two midnights; for a midnight that does not exist it uses the offset from before
    the shift, which is exactly the instant of the shift (PEP 495).
    """
    local = datetime.combine(day, time(0), tzinfo=zone)
    return round((local.astimezone(UTC) - _EPOCH).total_seconds()) * MS


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
