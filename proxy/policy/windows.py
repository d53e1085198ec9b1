"""Which window of a quota is open at an instant, and when it resets.

A window's end is computed from the clock on every access, so no reset job is needed. There are two kinds:

* `Duration` ("6h", "7d") opens with a subject's first admitted call and ends that long after it.
* `Calendar` ("day", "month") is an interval of the civil calendar in a time zone, including daylight saving time: in
  Berlin, 29 March 2026 has 23 hours and 25 October 2026 has 25.

Instants are integers: milliseconds since 1970 in UTC. One function (`_start_of_day`) converts local wall time to UTC,
and every calendar window starts where the window before it ends.
"""

import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Literal, NamedTuple
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
# A little more than ten years. A longer window is taken for a typing error.
_LONGEST_MS = 3660 * _DAY_MS


class Window(NamedTuple):
    """The interval in which a counter counts, in ms: from `opened_at` (included) to `resets_at` (excluded)."""

    opened_at: int
    resets_at: int

    def is_open(self, now: int) -> bool:
        """Whether the window has not ended at `now`.

        Only the end is compared. If a clock jumps back from 12:00:05 to 11:59:58, a window that opened at 12:00:00
        stays open: a new one would give the subject the whole limit a second time.
        """
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
    # The interval that was computed last: nearly every instant that is asked for is in it.
    _last: Window = field(default=Window(0, 0), init=False, repr=False, compare=False)

    def opening(self, now: int) -> Window:
        """The calendar interval that contains `now`."""
        window = self._last
        if not window.opened_at <= now < window.resets_at:
            window = self._interval(now)
            object.__setattr__(self, "_last", window)
        return window

    def _interval(self, now: int) -> Window:
        if self.text in ("minute", "hour"):
            return self._part_of_a_day(now, _MINUTE_MS if self.text == "minute" else _HOUR_MS)
        # The window ends at a local midnight, not 24 hours after it opened. In Berlin, 29 March 2026 lasts from
        # 00:00+01:00 to 00:00+02:00 on the 30th, which is 23 hours later.
        first, after = _first_days(_local_date(now, self.zone), self.text, self.week_starts)
        return Window(_start_of_day(first, self.zone), _start_of_day(after, self.zone))

    def _part_of_a_day(self, now: int, step_ms: int) -> Window:
        # Minutes and hours are counted from local midnight in elapsed time, not read from the wall clock:
        #   Berlin, 25 October 2026: clocks go back from 03:00 to 02:00. 02:00 to 03:00 is shown twice and is two
        #   windows of an hour each, so nobody waits two hours for an hourly quota.
        #   Lord Howe, 4 October 2026: clocks go from 02:00 to 02:30, and the day has 23.5 hours. The third hour is
        #   02:30 to 03:30, and the last window of the day is half an hour long, 23:30 to 24:00.
        today = _local_date(now, self.zone)
        midnight = _start_of_day(today, self.zone)
        next_midnight = _start_of_day(today + timedelta(days=1), self.zone)
        opened_at = now - (now - midnight) % step_ms
        return Window(opened_at, min(opened_at + step_ms, next_midnight))


Per = Duration | Calendar


def parse_per(text: str, zone: ZoneInfo, week_starts: int = 0) -> Per:
    """The window that `per: …` names. Raises ValueError with a text that says what to write instead."""
    for unit in UNITS:
        if text == unit:
            return Calendar(unit, zone, week_starts)
    if text in ("1M", "M"):
        raise ValueError(
            f'"{text}" could be minutes or months: write "1m" for a minute or "month" for a calendar month'
        )
    if match := _DURATION.fullmatch(text):
        length_ms = int(match[1]) * _SUFFIX_MS[match[2]]
        if length_ms == 0:
            raise ValueError(f'"{text}" is too short: write a duration of at least 1s')
        if length_ms > _LONGEST_MS:
            raise ValueError(f'"{text}" is too long: write a duration of at most 3660d (about ten years)')
        return Duration(text, length_ms)
    raise ValueError(f'"{text}" is no window: write a duration (90s, 15m, 6h, 7d) or one of {", ".join(UNITS)}')


@lru_cache(1024)
def rfc3339(instant: int, zone: ZoneInfo) -> str:
    """An instant in RFC 3339 with the offset of `zone`, such as `2026-11-24T00:00:00+01:00`.

    Rounded up to a whole second: a client that returns at the time it reads is never too early.
    """
    return datetime.fromtimestamp(-(-instant // MS), tz=zone).isoformat()


def _first_days(today: date, unit: str, week_starts: int) -> tuple[date, date]:
    """The first day of the interval that contains `today`, and the first day of the next interval."""
    if unit == "day":
        return today, today + timedelta(days=1)
    if unit == "week":
        first = today - timedelta(days=(today.weekday() - week_starts) % 7)
        return first, first + timedelta(days=7)
    months = {"month": 1, "quarter": 3, "year": 12}[unit]
    # November (11) in quarters: (11 - 1) // 3 * 3 + 1 is 10, so the quarter runs from 1 October to 1 January.
    first = date(today.year, (today.month - 1) // months * months + 1, 1)
    last_month = first.month + months - 1
    return first, date(first.year + last_month // 12, last_month % 12 + 1, 1)


def _local_date(now: int, zone: ZoneInfo) -> date:
    """The day that began last in `zone`, which can be later than the date that a wall clock shows.

    St. John's, 7 November 2010: one minute after midnight, clocks went back from 00:01 to 23:01, and showed the 6th
    for another 59 minutes. The 7th had begun and stays: the window of the 6th must not open a second time.
    """
    shown = datetime.fromtimestamp(now // MS, tz=zone).date()
    tomorrow = shown + timedelta(days=1)
    return tomorrow if _start_of_day(tomorrow, zone) <= now else shown


@lru_cache(maxsize=1024)  # each decision asks for the same few days, and time zone arithmetic is slow
def _start_of_day(day: date, zone: ZoneInfo) -> int:
    """When `day` begins in `zone`, in ms.

    `fold=0` (the default) takes the first of two midnights: in Havana, 1 November 2026 shows 00:00 twice. For a
    midnight that does not exist it uses the offset from before the shift, which gives exactly the instant of the
    shift (PEP 495): in São Paulo, 15 October 2017 began at 01:00.
    """
    local = datetime.combine(day, time(0), tzinfo=zone)
    return round((local.astimezone(UTC) - _EPOCH).total_seconds()) * MS


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
