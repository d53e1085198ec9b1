"""A window contains the instant that it was asked for, and the next one opens where it resets, as the calendar says.

Times are written as a wall clock in the zone shows them, with the offset, so that a row can be checked against one.
The rows are those of threats T73 and T74.
"""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.policy.windows import UNITS, WEEKDAYS, Calendar, Duration, Unit, Window, parse_per, rfc3339

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = sorted(available_timezones())

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


def ms(text: str) -> int:
    """A time with an offset, in ms since 1970."""
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def rows(table: str) -> list[list[str]]:
    """The rows of a table, without its comments."""
    return [line.split() for line in table.splitlines() if line.split() and not line.lstrip().startswith("#")]


def opening(zone: str, unit: Unit, now: str, week_starts: int = 0) -> tuple[str, str]:
    """The opening and the reset of the window that is open at `now`, in the zone's wall time."""
    window = Calendar(unit, ZoneInfo(zone), week_starts).opening(ms(now))
    return rfc3339(window.opened_at, ZoneInfo(zone)), rfc3339(window.resets_at, ZoneInfo(zone))


# ------------------------------------------------------------------------------------------------------- the calendar


@pytest.mark.parametrize(
    ("unit", "now", "opened_at", "resets_at"),
    [
        ("minute", "2026-11-23T18:48:30+01:00", "2026-11-23T18:48:00+01:00", "2026-11-23T18:49:00+01:00"),
        ("hour", "2026-11-23T18:48:30+01:00", "2026-11-23T18:00:00+01:00", "2026-11-23T19:00:00+01:00"),
        ("day", "2026-11-23T18:48:00+01:00", "2026-11-23T00:00:00+01:00", "2026-11-24T00:00:00+01:00"),
        ("week", "2026-11-25T18:48:00+01:00", "2026-11-23T00:00:00+01:00", "2026-11-30T00:00:00+01:00"),
        ("month", "2026-11-23T18:48:00+01:00", "2026-11-01T00:00:00+01:00", "2026-12-01T00:00:00+01:00"),
        ("quarter", "2026-11-23T18:48:00+01:00", "2026-10-01T00:00:00+02:00", "2027-01-01T00:00:00+01:00"),
        ("year", "2026-11-23T18:48:00+01:00", "2026-01-01T00:00:00+01:00", "2027-01-01T00:00:00+01:00"),
        # The first instant belongs to the window, the reset to the next one.
        ("day", "2026-11-23T00:00:00+01:00", "2026-11-23T00:00:00+01:00", "2026-11-24T00:00:00+01:00"),
        ("day", "2026-11-23T23:59:59.999+01:00", "2026-11-23T00:00:00+01:00", "2026-11-24T00:00:00+01:00"),
        ("day", "2026-11-24T00:00:00+01:00", "2026-11-24T00:00:00+01:00", "2026-11-25T00:00:00+01:00"),
        # Leap days, and years without one.
        ("day", "2028-02-29T12:00:00+01:00", "2028-02-29T00:00:00+01:00", "2028-03-01T00:00:00+01:00"),
        ("month", "2028-02-29T12:00:00+01:00", "2028-02-01T00:00:00+01:00", "2028-03-01T00:00:00+01:00"),
        ("day", "2027-02-28T12:00:00+01:00", "2027-02-28T00:00:00+01:00", "2027-03-01T00:00:00+01:00"),
        ("month", "2027-02-28T12:00:00+01:00", "2027-02-01T00:00:00+01:00", "2027-03-01T00:00:00+01:00"),
        ("week", "2028-03-01T12:00:00+01:00", "2028-02-28T00:00:00+01:00", "2028-03-06T00:00:00+01:00"),
        # A month of 31 days before one of 30, and one of 30 before one of 31.
        ("month", "2026-10-31T23:59:59+01:00", "2026-10-01T00:00:00+02:00", "2026-11-01T00:00:00+01:00"),
        ("month", "2026-04-30T23:59:59+02:00", "2026-04-01T00:00:00+02:00", "2026-05-01T00:00:00+02:00"),
        # The last day of each quarter.
        ("quarter", "2026-03-31T23:59:59+02:00", "2026-01-01T00:00:00+01:00", "2026-04-01T00:00:00+02:00"),
        ("quarter", "2026-06-30T23:59:59+02:00", "2026-04-01T00:00:00+02:00", "2026-07-01T00:00:00+02:00"),
        ("quarter", "2026-09-30T23:59:59+02:00", "2026-07-01T00:00:00+02:00", "2026-10-01T00:00:00+02:00"),
        # The end of the year.
        ("minute", "2026-12-31T23:59:59+01:00", "2026-12-31T23:59:00+01:00", "2027-01-01T00:00:00+01:00"),
        ("hour", "2026-12-31T23:59:59+01:00", "2026-12-31T23:00:00+01:00", "2027-01-01T00:00:00+01:00"),
        ("day", "2026-12-31T23:59:59+01:00", "2026-12-31T00:00:00+01:00", "2027-01-01T00:00:00+01:00"),
        ("week", "2026-12-31T23:59:59+01:00", "2026-12-28T00:00:00+01:00", "2027-01-04T00:00:00+01:00"),
        ("month", "2026-12-31T23:59:59+01:00", "2026-12-01T00:00:00+01:00", "2027-01-01T00:00:00+01:00"),
        ("year", "2026-12-31T23:59:59+01:00", "2026-01-01T00:00:00+01:00", "2027-01-01T00:00:00+01:00"),
        # In UTC it is still the day, the month and the year before.
        ("day", "2027-01-01T00:30:00+01:00", "2027-01-01T00:00:00+01:00", "2027-01-02T00:00:00+01:00"),
        ("year", "2027-01-01T00:30:00+01:00", "2027-01-01T00:00:00+01:00", "2028-01-01T00:00:00+01:00"),
    ],
)
def test_a_calendar_window_follows_the_wall_clock(unit, now, opened_at, resets_at):
    """A day, a month and a year begin and reset at local midnight, whatever the time is in UTC."""
    assert opening("Europe/Berlin", unit, now) == (opened_at, resets_at)


@pytest.mark.parametrize(
    ("week_starts", "opened_on"),
    [
        ("monday", "2026-11-23"),
        ("tuesday", "2026-11-24"),
        ("wednesday", "2026-11-25"),
        ("thursday", "2026-11-19"),
        ("friday", "2026-11-20"),
        ("saturday", "2026-11-21"),
        ("sunday", "2026-11-22"),
    ],
)
def test_a_week_starts_on_the_day_that_the_policy_names(week_starts, opened_on):
    """The week of a Wednesday contains it, has seven days, and begins on the day that the policy names."""
    first = date.fromisoformat(opened_on)
    window = opening("Europe/Berlin", "week", "2026-11-25T12:00:00+01:00", WEEKDAYS.index(week_starts))
    assert window == (f"{first}T00:00:00+01:00", f"{first + timedelta(days=7)}T00:00:00+01:00")


@pytest.mark.parametrize(
    ("zone", "unit", "now", "opened_at", "resets_at"),
    rows("""
        # Nepal is 5:45 ahead of UTC: neither its days nor its hours begin when those of UTC do.
        Asia/Kathmandu       day    2026-11-24T00:00:00+05:45  2026-11-24T00:00:00+05:45  2026-11-25T00:00:00+05:45
        Asia/Kathmandu       hour   2026-11-23T23:59:59+05:45  2026-11-23T23:00:00+05:45  2026-11-24T00:00:00+05:45
        # Samoa crossed the date line: 29 December 2011 was followed by the 31st.
        Pacific/Apia         day    2011-12-29T23:59:59-10:00  2011-12-29T00:00:00-10:00  2011-12-31T00:00:00+14:00
        Pacific/Apia         day    2011-12-31T00:00:00+14:00  2011-12-31T00:00:00+14:00  2012-01-01T00:00:00+14:00
        Pacific/Apia         hour   2011-12-29T23:59:59-10:00  2011-12-29T23:00:00-10:00  2011-12-31T00:00:00+14:00
        Pacific/Apia         week   2011-12-31T12:00:00+14:00  2011-12-26T00:00:00-10:00  2012-01-02T00:00:00+14:00
        # Clocks in Brazil went from midnight to 01:00: that day began at 01:00.
        America/Sao_Paulo    day    2017-10-14T23:59:59-03:00  2017-10-14T00:00:00-03:00  2017-10-15T01:00:00-02:00
        America/Sao_Paulo    day    2017-10-15T12:00:00-02:00  2017-10-15T01:00:00-02:00  2017-10-16T00:00:00-02:00
        America/Sao_Paulo    hour   2017-10-15T01:30:00-02:00  2017-10-15T01:00:00-02:00  2017-10-15T02:00:00-02:00
        # … and from midnight back to 23:00: the day before had its last hour twice.
        America/Sao_Paulo    day    2018-02-17T23:30:00-03:00  2018-02-17T00:00:00-02:00  2018-02-18T00:00:00-03:00
        America/Sao_Paulo    hour   2018-02-17T23:30:00-02:00  2018-02-17T23:00:00-02:00  2018-02-17T23:00:00-03:00
        # Clocks in Cuba show midnight twice: the day begins at the first one.
        America/Havana       day    2026-10-31T23:59:59-04:00  2026-10-31T00:00:00-04:00  2026-11-01T00:00:00-04:00
        America/Havana       day    2026-11-01T00:30:00-04:00  2026-11-01T00:00:00-04:00  2026-11-02T00:00:00-05:00
        America/Havana       day    2026-11-01T00:30:00-05:00  2026-11-01T00:00:00-04:00  2026-11-02T00:00:00-05:00
        America/Havana       month  2026-11-01T00:30:00-05:00  2026-11-01T00:00:00-04:00  2026-12-01T00:00:00-05:00
        # Lord Howe shifts by half an hour. Hours stay an hour long, so the last window of that day has half an hour.
        Australia/Lord_Howe  hour   2026-10-04T02:45:00+11:00  2026-10-04T02:30:00+11:00  2026-10-04T03:30:00+11:00
        Australia/Lord_Howe  hour   2026-10-04T23:45:00+11:00  2026-10-04T23:30:00+11:00  2026-10-05T00:00:00+11:00
        Australia/Lord_Howe  minute 2026-10-04T01:59:30+10:30  2026-10-04T01:59:00+10:30  2026-10-04T02:30:00+11:00
        # Clocks in Berlin show 02:00 twice, which are two windows of an hour each; in spring they never show 02:00.
        Europe/Berlin        hour   2026-10-25T02:30:00+02:00  2026-10-25T02:00:00+02:00  2026-10-25T02:00:00+01:00
        Europe/Berlin        hour   2026-10-25T02:30:00+01:00  2026-10-25T02:00:00+01:00  2026-10-25T03:00:00+01:00
        Europe/Berlin        minute 2026-10-25T02:59:30+02:00  2026-10-25T02:59:00+02:00  2026-10-25T02:00:00+01:00
        Europe/Berlin        hour   2026-03-29T01:30:00+01:00  2026-03-29T01:00:00+01:00  2026-03-29T03:00:00+02:00
        # Chatham is 13:45 ahead of UTC in summer and 12:45 in winter.
        Pacific/Chatham      day    2026-04-05T12:00:00+12:45  2026-04-05T00:00:00+13:45  2026-04-06T00:00:00+12:45
        # Until 2011 St. John's set its clocks back from 00:01 to 23:01 of the day before, and Casey once from 02:00
        # to 23:00. A day that has begun is not left again.
        America/St_Johns     day    2010-11-06T23:00:59-02:30  2010-11-06T00:00:00-02:30  2010-11-07T00:00:00-02:30
        America/St_Johns     day    2010-11-07T00:00:30-02:30  2010-11-07T00:00:00-02:30  2010-11-08T00:00:00-03:30
        America/St_Johns     day    2010-11-06T23:30:00-03:30  2010-11-07T00:00:00-02:30  2010-11-08T00:00:00-03:30
        America/St_Johns     month  2009-10-31T23:30:00-03:30  2009-11-01T00:00:00-02:30  2009-12-01T00:00:00-03:30
        America/St_Johns     hour   2010-11-06T23:40:00-03:30  2010-11-07T00:00:00-02:30  2010-11-07T00:00:00-03:30
        America/St_Johns     minute 2010-11-06T23:40:30-03:30  2010-11-06T23:40:00-03:30  2010-11-06T23:41:00-03:30
        Antarctica/Casey     day    2010-03-04T23:30:00+08:00  2010-03-05T00:00:00+11:00  2010-03-06T00:00:00+08:00
    """),
)
def test_a_window_is_right_when_clocks_are_shifted(zone, unit, now, opened_at, resets_at):
    """Skipped days, midnights that do not exist or come twice, half hours: resets are those of the wall clock."""
    assert opening(zone, unit, now) == (opened_at, resets_at)


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Berlin", "2026-03-28", 24),
        ("Europe/Berlin", "2026-03-29", 23),
        ("Europe/Berlin", "2026-10-25", 25),
        ("America/Sao_Paulo", "2017-10-15", 23),
        ("America/Sao_Paulo", "2018-02-17", 25),
        ("America/Havana", "2026-03-08", 23),
        ("America/Havana", "2026-11-01", 25),
        ("Australia/Lord_Howe", "2026-10-04", 23.5),
        ("Australia/Lord_Howe", "2026-04-05", 24.5),
        ("Antarctica/Troll", "2026-03-29", 22),
        ("Antarctica/Troll", "2026-10-25", 26),
        ("Asia/Kathmandu", "2026-03-29", 24),
        ("UTC", "2026-03-29", 24),
        ("UTC", "2016-12-31", 24),  # a leap second: it is smeared, so no clock here shows it
    ],
)
def test_the_window_of_a_day_is_as_long_as_the_local_day(zone, day, hours):
    """Daylight saving time makes days of 23 and 25 hours (T74)."""
    noon = datetime.fromisoformat(f"{day}T12:00").replace(tzinfo=ZoneInfo(zone))
    window = Calendar("day", ZoneInfo(zone)).opening(round(noon.timestamp() * 1000))
    assert window.resets_at - window.opened_at == hours * HOUR


def test_ten_years_of_berlin_have_ten_short_and_ten_long_days():
    """From reset to reset no day is skipped and none comes twice; two days a year do not have 24 hours."""
    per, now, lengths = Calendar("day", BERLIN), ms("2026-01-01T00:00:00+01:00"), []
    while now < ms("2036-01-01T00:00:00+01:00"):
        window = per.opening(now)
        assert window.opened_at == now
        lengths.append((window.resets_at - now) // HOUR)
        now = window.resets_at
    assert len(lengths) == (date(2036, 1, 1) - date(2026, 1, 1)).days
    assert (lengths.count(23), lengths.count(25)) == (10, 10)


# ----------------------------------------------------------------------------------------- what is true in every zone


@cache
def shifts(zone: str, first_year: int = 1990, end_year: int = 2038) -> list[int]:
    """When a zone's clocks are shifted, in seconds. No zone keeps an offset for less than the step of five days."""
    tz, step = ZoneInfo(zone), 5 * 86_400

    def offset(second: int) -> timedelta | None:
        return datetime.fromtimestamp(second, tz).utcoffset()

    found = []
    start, end = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (first_year, end_year))
    for second in range(start, end, step):
        if offset(second) != offset(second + step):
            before, after = second, second + step
            while after - before > 1:
                middle = (before + after) // 2
                before, after = (middle, after) if offset(middle) == offset(before) else (before, middle)
            found.append(after)
    return found


@st.composite
def places(draw: st.DrawFn) -> tuple[str, int]:
    """A zone and an instant of 1990 to 2037, in half of the cases close to a shift of that zone's clocks."""
    zone = draw(st.sampled_from(ZONES))
    anywhere = st.integers(ms("1990-01-01T00:00:00Z"), ms("2037-12-31T23:59:59Z"))
    if shifts(zone):
        near = st.integers(-26 * HOUR, 26 * HOUR)
        anywhere |= st.builds(lambda shift, away: shift * 1000 + away, st.sampled_from(shifts(zone)), near)
    return zone, draw(anywhere)


def assert_contiguous(per: Calendar, now: int) -> Window:
    """The window contains `now`, both its ends give the same window, and the next one opens where it resets."""
    window = computed(per, now)
    assert window.opened_at <= now < window.resets_at
    assert computed(per, window.opened_at) == window
    assert computed(per, window.resets_at - 1) == window
    assert computed(per, window.resets_at).opened_at == window.resets_at
    assert computed(per, window.opened_at - 1).resets_at == window.opened_at
    return window


def computed(per: Calendar, now: int) -> Window:
    """The window at `now`, by a value that remembers none."""
    return replace(per).opening(now)


@settings(max_examples=400)
@given(place=places(), unit=st.sampled_from(UNITS), week_starts=st.integers(0, 6), part=st.floats(0, 1))
def test_windows_partition_time_in_every_zone(place, unit, week_starts, part):
    """Each instant is in exactly one window, and every instant of a window gives that window."""
    zone, now = place
    per = Calendar(unit, ZoneInfo(zone), week_starts)
    window = assert_contiguous(per, now)
    inside = window.opened_at + int(part * (window.resets_at - window.opened_at - 1))
    assert computed(per, inside) == window


@given(place=places(), unit=st.sampled_from(UNITS), steps=st.lists(st.integers(-2 * DAY, 2 * DAY)))
def test_a_window_that_is_remembered_is_the_one_that_is_computed(place, unit, steps):
    """Instants come in any order."""
    zone, now = place
    per = Calendar(unit, ZoneInfo(zone))
    for step in [0, *steps]:
        now += step
        assert per.opening(now) == computed(per, now)


def test_days_are_contiguous_at_every_shift_until_2037():
    """In every zone, so that no call is between two days (T74)."""
    for zone in ZONES:
        per = Calendar("day", ZoneInfo(zone))
        for shift in shifts(zone, 2026, 2038):
            for away in (-HOUR, -1, 0, HOUR - 1):
                assert_contiguous(per, shift * 1000 + away)


@given(place=places(), per=st.sampled_from([("minute", MINUTE), ("hour", HOUR)]))
def test_no_window_of_a_minute_or_an_hour_is_longer(place, per):
    """The hour that a clock shows twice is two windows, so nobody waits two hours for an hourly quota."""
    zone, now = place
    unit, length = per
    window = Calendar(unit, ZoneInfo(zone)).opening(now)
    assert window.resets_at - window.opened_at <= length


# ---------------------------------------------------------------------------------------------------------- durations


@given(now=st.integers(0, ms("2037-12-31T23:59:59Z")), length_ms=st.integers(1, 3660 * DAY))
def test_a_duration_opens_now_and_lasts_its_length(now, length_ms):
    """`6h` is six hours from the first admitted call, to the millisecond, also across a shift of the clocks."""
    per = Duration("6h", length_ms)
    window = per.opening(now)
    assert (window.opened_at, window.resets_at) == (now, now + length_ms)


@pytest.mark.parametrize(
    ("now", "is_open"),
    [(-DAY, True), (999, True), (1000, True), (1999, True), (2000, False), (2001, False), (DAY, False)],
)
def test_only_its_end_closes_a_window(now, is_open):
    """T76: a clock that jumps back does not close a window, so the limit cannot be used a second time (T73)."""
    assert Window(1000, 2000).is_open(now) is is_open


def test_a_window_says_of_which_kind_it_is():
    """What is shown to users tells a calendar interval from a window that opens with the first call."""
    assert parse_per("day", BERLIN).kind == "calendar"
    assert parse_per("24h", BERLIN).kind == "first_call"


# ----------------------------------------------------------------------------------------------------------- `per: …`


@pytest.mark.parametrize(
    ("text", "length_ms"),
    [
        ("1s", 1000),
        ("90s", 90_000),
        ("15m", 15 * MINUTE),
        ("1m", MINUTE),
        ("6h", 6 * HOUR),
        ("24h", DAY),
        ("7d", 7 * DAY),
        ("2w", 14 * DAY),
        ("3660d", 3660 * DAY),
    ],
)
def test_per_takes_durations(text, length_ms):
    """A number and one of s, m, h, d, w; `1m` is a minute."""
    assert parse_per(text, BERLIN) == Duration(text, length_ms)


@pytest.mark.parametrize("unit", UNITS)
def test_per_takes_calendar_units(unit):
    """They get the policy's time zone and the day on which weeks start."""
    assert parse_per(unit, BERLIN, 6) == Calendar(unit, BERLIN, 6)


@pytest.mark.parametrize("text", ["1M", "M"])
def test_per_refuses_a_capital_m_as_ambiguous(text):
    """`1M` could be a minute or a month. The text says what to write for each."""
    with pytest.raises(ValueError, match=f'^"{text}" could be minutes or months: write "1m" .* or "month"'):
        parse_per(text, BERLIN)


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("0s", "is too short: write a duration of at least 1s"),
        ("0d", "is too short: write a duration of at least 1s"),
        ("3661d", r"is too long: write a duration of at most 3660d \(about ten years\)"),
        ("999999999w", r"is too long: write a duration of at most 3660d \(about ten years\)"),
    ],
)
def test_per_refuses_durations_that_are_too_short_or_too_long(text, mistake):
    """A window of no length and one of more than about ten years are mistakes; the text says what to write."""
    with pytest.raises(ValueError, match=f'^"{text}" {mistake}$'):
        parse_per(text, BERLIN)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "h",
            "s",
            "6",
            "60",
            "-1h",
            "+1h",
            "1.5h",
            "1,5h",
            "1_0h",
            "1e3s",
            "6 h",
            " 6h",
            "6h ",
            "6h\n",
            "1h30m",
        ),
        *(
            "6H",
            "7D",
            "3M",
            "1y",
            "1mo",
            "1min",
            "10ms",
            "days",
            "Day",
            "DAY",
            "day ",
            "monthly",
            "fortnight",
            "decade",
        ),
        *("٦h", "²h", "1234567890s", "6h;", "day,week", "None", "first_call"),
    ],
)
def test_per_says_what_to_write_instead(text):
    """The text of any other mistake shows both ways of writing a window, with examples."""
    with pytest.raises(ValueError, match=r"is no window: write a duration .*6h.* or one of minute, .*year$"):
        parse_per(text, BERLIN)


@given(text=st.text(max_size=12))
def test_per_gives_a_window_or_a_value_error(text):
    """Any text gives a window that is not empty, or a ValueError."""
    try:
        per = parse_per(text, BERLIN)
    except ValueError:
        return
    window = per.opening(ms("2026-11-23T18:48:00+01:00"))
    assert window.opened_at < window.resets_at


# ----------------------------------------------------------------------------------------------------------- RFC 3339


@pytest.mark.parametrize(
    ("instant", "zone", "text"),
    [
        ("2026-11-23T23:00:00Z", "Europe/Berlin", "2026-11-24T00:00:00+01:00"),
        ("2026-07-01T10:00:00Z", "Europe/Berlin", "2026-07-01T12:00:00+02:00"),
        ("2026-07-01T10:00:00Z", "UTC", "2026-07-01T10:00:00+00:00"),
        ("2026-07-01T10:00:00Z", "Asia/Kathmandu", "2026-07-01T15:45:00+05:45"),
        ("2026-10-25T00:30:00Z", "Europe/Berlin", "2026-10-25T02:30:00+02:00"),
        ("2026-10-25T01:30:00Z", "Europe/Berlin", "2026-10-25T02:30:00+01:00"),
    ],
)
def test_an_instant_is_written_with_its_offset(instant, zone, text):
    """In the policy's zone. The two hours that a clock shows alike differ in the offset."""
    assert rfc3339(ms(instant), ZoneInfo(zone)) == text


@given(place=places())
def test_a_written_instant_is_never_too_early(place):
    """Whole seconds, rounded up: a client that returns at the written time is not refused again."""
    zone, now = place
    assert now <= ms(rfc3339(now, ZoneInfo(zone))) < now + 1000
