"""What `/v1/quota` shows, and how a call's own hold is left out of its headers."""

from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.limit_headers import rate_limit_headers
from proxy.ledger.book import Accepted, Book, Settle
from proxy.ledger.entry import Entry
from proxy.policy.admission import NotAdmitted, decide
from proxy.policy.amounts import NO_AMOUNT, Amount, Measure
from proxy.policy.binding import Binding
from proxy.policy.quota import Counter, CounterKey, Demand, Quota
from proxy.policy.status import duration_text, quota_statuses
from proxy.policy.windows import Window
from tests.builders import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    binding,
    call,
    counters,
    exactly,
    extend,
    quota,
    reserve,
)
from tests.random_rules import bindings, counters_of, demands

UTC = ZoneInfo("UTC")
BERLIN = ZoneInfo("Europe/Berlin")


def item(one: Quota, counter: Counter | None = None, now: int = NOON, zone: ZoneInfo = UTC) -> dict:
    """How `/v1/quota` shows this quota."""
    who = binding([one])
    return quota_statuses(who, {one.key_for(who.user): counter} if counter else {}, now)[one.id].as_json(zone)


def test_an_item_has_all_members_of_the_contract():
    """A limit that a quota does not have is null, so a program need not check which members exist."""
    shown = item(
        quota("team-x/pot", tokens=5000, requests=100, per="month", shared=True, models=("gpt-4o", "o*")),
        Counter(quota("a/b", per="month", tokens=1).per.opening(NOON), Amount(1200, 34, 7), Amount(100, 400, 1)),
    )
    assert shown == {
        "id": "team-x/pot",
        "group": "team-x",
        "models": ["gpt-4o", "o*"],
        "shared": True,
        "enforce": "exact",
        "window": {
            "kind": "calendar",
            "per": "month",
            "opened_at": 1793491200,
            "resets_at": 1796083200,
            "reset_at": "2026-12-01T00:00:00+00:00",
        },
        "tokens": {"limit": 5000, "used": 1234, "held": 500, "remaining": 3266, "percent": 24.7},
        "input_tokens": None,
        "output_tokens": None,
        "requests": {"limit": 100, "used": 7, "held": 1, "remaining": 92, "percent": 7.0},
        "near": False,
        "grants": [],
    }


def test_each_limit_shows_its_own_measure():
    """Tokens, input, output and requests are shown separately."""
    one = quota("staff/all", tokens=100, input_tokens=50, output_tokens=60, requests=10)
    shown = item(one, Counter(one.per.opening(NOON), Amount(20, 30, 2), Amount(1, 2, 1)))
    assert {measure: (shown[measure]["used"], shown[measure]["held"]) for measure in Measure} == {
        "tokens": (50, 3),
        "input_tokens": (20, 1),
        "output_tokens": (30, 2),
        "requests": (2, 1),
    }


@pytest.mark.parametrize(
    ("limit", "used", "held", "remaining", "percent"),
    [
        (1000, 0, 0, 1000, 0.0),
        (1000, 333, 0, 667, 33.3),
        (1000, 1000, 0, 0, 100.0),
        (1000, 600, 400, 0, 60.0),
        (1000, 1416, 0, 0, 141.6),  # an answer above its hold, or a limit lowered below its usage (T69)
        (1000, 900, 400, 0, 90.0),
        (0, 0, 0, 0, 100.0),
        (0, 5, 0, 0, 100.0),
        (3, 1, 0, 2, 33.3),
    ],
)
def test_remaining_is_never_negative(limit, used, held, remaining, percent):
    """T69: it is what is neither used nor held. `percent` is of what was used, and can be more than 100."""
    one = quota("staff/daily", tokens=limit)
    assert item(one, Counter(one.per.opening(NOON), Amount(used), Amount(held)))["tokens"] == {
        "limit": limit,
        "used": used,
        "held": held,
        "remaining": remaining,
        "percent": percent,
    }


ENDED = Counter(Window(NOON - 7 * HOUR, NOON - HOUR), Amount(100, 0, 1))
RUNNING = Counter(Window(NOON - HOUR, NOON + 5 * HOUR), Amount(100, 0, 1))
HOLDING = Counter(Window(NOON - HOUR, NOON + 5 * HOUR), NO_AMOUNT, Amount(100, 0, 1))
EMPTY = Counter(Window(NOON - HOUR, NOON + 5 * HOUR))


@pytest.mark.parametrize("counter", [None, ENDED, EMPTY], ids=["never used", "has ended", "used and held nothing"])
def test_a_window_that_no_call_has_opened_has_no_times(counter):
    """It opens with the next call. Its times are null, because they would be others at each request."""
    shown = item(quota("staff/six", tokens=1000, per="6h"), counter)
    assert shown["window"] == {
        "kind": "first_call",
        "per": "6h",
        "opened_at": None,
        "resets_at": None,
        "reset_at": None,
    }
    assert (shown["tokens"]["used"], shown["tokens"]["held"], shown["tokens"]["remaining"]) == (0, 0, 1000)


@pytest.mark.parametrize("counter", [RUNNING, HOLDING], ids=["used", "held"])
def test_a_window_that_a_call_has_opened_shows_its_times(counter):
    """Also while the first call is still in flight."""
    assert item(quota("staff/six", tokens=1000, per="6h"), counter, zone=BERLIN)["window"] == {
        "kind": "first_call",
        "per": "6h",
        "opened_at": (NOON - HOUR) // 1000,
        "resets_at": (NOON + 5 * HOUR) // 1000,
        "reset_at": "2026-11-24T18:00:00+01:00",
    }


@pytest.mark.parametrize("counter", [None, Counter(Window(NOON - 2 * DAY, NOON - DAY), Amount(100))])
def test_a_calendar_window_is_always_shown(counter):
    """Its opening and end do not depend on calls."""
    shown = item(quota("staff/daily", tokens=1000, zone="Europe/Berlin"), counter, zone=BERLIN)
    assert shown["window"]["reset_at"] == "2026-11-25T00:00:00+01:00"
    assert shown["window"]["resets_at"] - shown["window"]["opened_at"] == 86_400
    assert shown["tokens"]["used"] == 0


def test_resets_are_rounded_up_and_openings_down():
    """A window can open between two seconds, and a client that returns at its shown end must not be too early."""
    one = quota("staff/six", tokens=1000, per="6h")
    window = item(one, Counter(one.per.opening(NOON + 500), Amount(1)), NOON + 600)["window"]
    assert window["opened_at"] == NOON // 1000
    assert window["resets_at"] == (NOON + 6 * HOUR) // 1000 + 1


@pytest.mark.parametrize(
    ("per", "resets_at"), [("7d", NOON + 5 * HOUR), ("1h", NOON + HOUR), ("minute", NOON + MINUTE)]
)
def test_a_running_window_is_shown_with_the_end_that_a_call_would_find(per, resets_at):
    """After `per` was changed, also before a call has stored that end. The new `per` is shown."""
    who = binding([quota("staff/daily", tokens=100, per=per)])
    shown = item(quota("staff/daily", tokens=100, per=per), RUNNING)
    assert shown["window"]["per"] == per
    assert shown["window"]["resets_at"] == resets_at // 1000
    refused = decide(call(1), who, {("user:ann", "staff/daily"): RUNNING}, NOON)
    assert isinstance(refused, NotAdmitted)
    assert refused.admissible_at == resets_at


# -------------------------------------------------------------------------------------- a call's own hold is left out


def reserved(who: Binding, demand: Demand, found: dict[CounterKey, Counter], now: int) -> tuple[Book, Entry]:
    """The book after a call was admitted, and the call's entry."""
    book = Book(dict(found), {}, now)
    answer = book.apply(reserve("call-1", who, demand))
    assert isinstance(answer, Accepted)
    return book, answer.entry


def test_a_calls_own_hold_is_left_out_and_other_holds_are_not():
    """The headers say what remains for other calls: 1000 − 100 used − 200 that another call holds."""
    who = binding([quota("staff/daily", tokens=1000, requests=10)])
    found = counters(who, used={"staff/daily": 100}, held={"staff/daily": Amount(100, 100, 1)})
    book, entry = reserved(who, call(100, 400), found, NOON)
    assert (
        rate_limit_headers(who, quota_statuses(who, book.counters, NOON), NOON)["x-ratelimit-remaining-tokens"]
        == "200"
    )
    headers = rate_limit_headers(who, quota_statuses(who, book.counters, NOON, without=entry.open_amounts), NOON)
    assert headers["x-ratelimit-remaining-tokens"] == "700"
    assert headers["x-ratelimit-remaining-requests"] == "8"


def test_a_call_that_has_ended_holds_nothing_to_leave_out():
    """After it was settled, its charge counts like any other usage."""
    who = binding([quota("staff/daily", tokens=1000)])
    book, entry = reserved(who, call(100, 400), {}, NOON)
    settled = book.apply(Settle(entry.id, exactly(100, 50), "complete"))
    assert isinstance(settled, Accepted)
    statuses = quota_statuses(who, book.counters, NOON, without=settled.entry.open_amounts)
    assert statuses["staff/daily"].counter.held == NO_AMOUNT
    assert rate_limit_headers(who, statuses, NOON)["x-ratelimit-remaining-tokens"] == "850"


@pytest.mark.parametrize("per", ["minute", "90s"])
def test_a_hold_of_a_closed_window_is_not_subtracted_in_the_next(per):
    """A call that outlives its window holds nothing of the next one, so no more than the limit can remain (T77)."""
    who = binding([quota("staff/short", tokens=1000, requests=5, per=per)])
    book, entry = reserved(who, call(100, 400), {}, NOON)
    later = NOON + 2 * MINUTE
    statuses = quota_statuses(who, book.counters, later, without=entry.open_amounts)
    assert statuses["staff/short"].counter.held == NO_AMOUNT
    headers = rate_limit_headers(who, statuses, later)
    assert headers["x-ratelimit-remaining-tokens"] == "1000"
    assert headers["x-ratelimit-remaining-requests"] == "5"


@pytest.mark.parametrize("per", ["minute", "90s"])
def test_a_hold_of_a_closed_window_does_not_hide_what_others_hold_in_the_next(per):
    """What another call holds in the next window is shown as a whole."""
    one = quota("staff/short", tokens=1000, per=per)
    who = binding([one])
    _, entry = reserved(who, call(100, 400), {}, NOON)
    later = NOON + 2 * MINUTE
    other = Counter(one.per.opening(later), NO_AMOUNT, Amount(50, 50, 1))
    statuses = quota_statuses(who, {one.key_for(who.user): other}, later, without=entry.open_amounts)
    assert statuses["staff/short"].counter.held == Amount(50, 50, 1)


def test_a_call_that_increased_its_hold_in_the_next_window_is_left_out_there():
    """Its first 100 + 100 belong to the hour in which it began. In the next it holds 300, and another call 50."""
    hourly = quota("staff/hourly", tokens=1000, per="hour")
    who = binding([hourly])
    book, _ = reserved(who, call(100, 900, 100, initial_hold=100), {}, NOON)
    later = Book(book.counters, book.entries, NOON + HOUR)
    later.apply(reserve("call-2", who, call(50)))
    extended = later.apply(extend("call-1", who, 400))
    assert isinstance(extended, Accepted)
    statuses = quota_statuses(who, later.counters, NOON + HOUR, without=extended.entry.open_amounts)
    assert statuses[hourly.id].counter.held == Amount(50, 0, 1)
    assert rate_limit_headers(who, statuses, NOON + HOUR)["x-ratelimit-remaining-tokens"] == "950"


@given(who=bindings(), data=st.data())
def test_without_its_own_hold_a_call_sees_what_was_held_before_it(who, data):
    """In every quota that it holds tokens of."""
    found, demand = data.draw(counters_of(who)), data.draw(demands())
    if isinstance(decide(demand, who, found, NOON), NotAdmitted):
        return
    book, entry = reserved(who, demand, found, NOON)
    before, after = (
        quota_statuses(who, found, NOON),
        quota_statuses(who, book.counters, NOON, without=entry.open_amounts),
    )
    assert {name: each.counter.held for name, each in after.items()} == {
        name: each.counter.held for name, each in before.items()
    }


@pytest.mark.parametrize(
    ("length_ms", "text"),
    [
        (-1, "0s"),
        (0, "0s"),
        (1, "1s"),
        (45_000, "45s"),
        (60_000, "1m"),
        (61_000, "1m 1s"),
        (59 * MINUTE + 59_001, "1h"),
        (5 * HOUR + 12 * MINUTE, "5h 12m"),
        (5 * HOUR + 12 * MINUTE + 59_000, "5h 12m"),
        (DAY, "1d"),
        (3 * DAY + 4 * HOUR + 5 * MINUTE, "3d 4h"),
        (31 * DAY, "31d"),
    ],
)
def test_a_duration_is_written_in_at_most_two_units(length_ms, text):
    """Short enough to be read at a glance. A unit that is 0 is left out."""
    assert duration_text(length_ms) == text
