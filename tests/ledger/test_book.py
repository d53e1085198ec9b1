"""What the five acts do to counters and entries: by scenarios with numbers.

A batch is a `Book` over what the batches before it wrote, as in the ledger. The clock starts on the 24th of November
2026 at noon, UTC.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from proxy.ledger.book import (
    Accepted,
    Book,
    Expire,
    Extend,
    Operation,
    Refused,
    Release,
    Reply,
    Settle,
    Unknown,
    split_charge,
)
from proxy.ledger.entry import CallLabels, Entry, HeldAmount
from proxy.policy.admission import NeedsCount, Verdict
from proxy.policy.amounts import NOTHING, TOKENS_MAX, Amount, AtLeast, Tokens, Unspent
from proxy.policy.quota import Binding, Quota
from proxy.policy.windows import Window
from tests.builders import (
    DAY,
    HOUR,
    NOON,
    amount,
    binding,
    call,
    counters,
    estimated,
    exactly,
    extend,
    instant,
    quota,
    reserve,
    route,
)


class Ledger:
    """What the real one keeps: counters and entries, of which each batch writes back only what it says it changed."""

    def __init__(self, who: Binding, now: int = NOON, *, used: Mapping[str, Amount | int] | None = None) -> None:
        self.counters = counters(who, used=used, opened=now)
        self.entries: dict[str, Entry] = {}
        self.now = now

    def apply(self, *operations: Operation) -> list[Reply]:
        books = Book(self.counters, self.entries, self.now)
        answers = [books.apply(operation) for operation in operations]
        self.counters |= {key: books.counters[key] for key in books.counters_changed}
        self.entries |= {entry_id: books.entries[entry_id] for entry_id in books.entries_changed}
        assert books.counters == self.counters
        assert books.entries == self.entries
        return answers

    def levels(self, each: Quota, user: str = "ann") -> tuple[Amount, Amount]:
        """What is used and held of a quota."""
        counter = self.counters[each.key_for(user)]
        return counter.used, counter.held


DAILY = quota("staff/daily", tokens=1000)
SIX_HOURS = quota("staff/6h", tokens=1000, per="6h")
ANN = binding([DAILY])
CALL = call(100, 400)
HELD = Amount(100, 400, 1)
STREAM = call(100, 900, 100, initial_hold=100)
BAD_REQUEST = Unspent(requests=1)


# ----------------------------------------------------------------------------------------------- the life of an entry


SETTLE = Settle("1", exactly(90, 60), "complete")
SETTLE_MORE = Settle("1", exactly(900, 600), "complete")
SETTLE_AT_LEAST = Settle("1", AtLeast(Tokens(90, 20)), "client_left")
SETTLE_ZERO = Settle("1", exactly(0, 0), "complete")
SETTLE_REJECTED = Settle("1", BAD_REQUEST, "rejected")
RELEASE = Release("1")
EXPIRE = Expire("1")
LOST = AtLeast(Tokens(100, 400))


@pytest.mark.parametrize(
    ("operations", "state", "usage", "outcome", "used"),
    [
        pytest.param([], "open", None, None, NOTHING, id="in flight"),
        pytest.param(
            [SETTLE], "settled", exactly(90, 60), "complete", Amount(90, 60, 1), id="the rest is given back"
        ),
        pytest.param(
            [SETTLE_MORE],
            "settled",
            exactly(900, 600),
            "complete",
            Amount(900, 600, 1),
            id="more than it held: in full",
        ),
        pytest.param(
            [SETTLE_AT_LEAST], "settled", AtLeast(Tokens(90, 20)), "client_left", Amount(90, 20, 1), id="client left"
        ),
        pytest.param([SETTLE_ZERO], "settled", exactly(0, 0), "complete", Amount(0, 0, 1), id="a zero is a zero"),
        pytest.param([SETTLE_REJECTED], "settled", BAD_REQUEST, "rejected", Amount(0, 0, 1), id="4xx: one request"),
        pytest.param([RELEASE], "released", None, "upstream_failed", NOTHING, id="5xx: nothing"),
        pytest.param([EXPIRE], "expired", LOST, "lost", Amount(100, 400, 1), id="the proxy died: its hold"),
        # once only
        pytest.param(
            [SETTLE, SETTLE_MORE], "settled", exactly(90, 60), "complete", Amount(90, 60, 1), id="settle twice"
        ),
        pytest.param(
            [SETTLE, RELEASE], "settled", exactly(90, 60), "complete", Amount(90, 60, 1), id="settle, release"
        ),
        pytest.param(
            [SETTLE, EXPIRE], "settled", exactly(90, 60), "complete", Amount(90, 60, 1), id="settle, expire"
        ),
        pytest.param([RELEASE, SETTLE], "released", None, "upstream_failed", NOTHING, id="release, settle"),
        pytest.param([RELEASE, RELEASE], "released", None, "upstream_failed", NOTHING, id="release twice"),
        pytest.param([RELEASE, EXPIRE], "released", None, "upstream_failed", NOTHING, id="release, expire"),
        pytest.param([EXPIRE, EXPIRE], "expired", LOST, "lost", Amount(100, 400, 1), id="expire twice"),
        pytest.param([EXPIRE, RELEASE], "expired", LOST, "lost", Amount(100, 400, 1), id="expire, release"),
        # but for the process that comes back
        pytest.param(
            [EXPIRE, SETTLE], "settled", exactly(90, 60), "complete", Amount(90, 60, 1), id="expire, settle: less"
        ),
        pytest.param(
            [EXPIRE, SETTLE_MORE],
            "settled",
            exactly(900, 600),
            "complete",
            Amount(900, 600, 1),
            id="expire, settle: more",
        ),
        pytest.param(
            [EXPIRE, SETTLE_REJECTED], "settled", BAD_REQUEST, "rejected", Amount(0, 0, 1), id="expire, 4xx"
        ),
        pytest.param(
            [EXPIRE, SETTLE, SETTLE_MORE, EXPIRE, RELEASE],
            "settled",
            exactly(90, 60),
            "complete",
            Amount(90, 60, 1),
            id="expire, settle: the difference is booked once",
        ),
    ],
)
@pytest.mark.parametrize("batches", ["one", "many"])
def test_an_entry_ends_once(operations, state, usage, outcome, used, batches):
    """Whatever comes again, or late, in one batch or in several: the first end counts, and nothing stays held."""
    ledger = Ledger(ANN)
    if batches == "one":
        [*_, last] = ledger.apply(reserve("1", ANN, CALL), *operations)
    else:
        [last] = [ledger.apply(operation) for operation in (reserve("1", ANN, CALL), *operations)][-1]
    entry = ledger.entries["1"]
    assert (entry.state, entry.usage, entry.outcome) == (state, usage, outcome)
    assert ledger.levels(DAILY) == (used, NOTHING if operations else HELD)
    freed = set(ledger.counters) if len(operations) == 1 else set()
    assert last == Accepted(entry, ledger.counters, freed=frozenset(freed))
    assert entry.ended_at == (NOON if operations else None)


def test_an_entry_says_who_called_what_and_what_it_holds():
    """It is the reservation first, and the record afterwards."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    assert ledger.entries["1"] == Entry(
        id="1",
        owner="process-1",
        labels=CallLabels("ann", "gpt-4o-mini", "chat", "openai"),
        admitted_via="staff",
        reserved_at=NOON,
        hold=HELD,
        maximum=400,
        held_amounts=(HeldAmount(("user:ann", "staff/daily"), NOON - 12 * HOUR, HELD),),
    )


def test_the_end_changes_only_how_it_ended():
    """Who called, through which group and when stays as it was, also when the clock went on."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    before = ledger.entries["1"]
    ledger.now += HOUR
    ledger.apply(SETTLE)
    ended = {"state": "settled", "ended_at": NOON + HOUR, "usage": exactly(90, 60), "outcome": "complete"}
    assert ledger.entries["1"] == replace(before, **ended)


@pytest.mark.parametrize("end", [Settle("1", exactly(100, 50), "complete", "spare"), Release("1", upstream="spare")])
def test_the_end_may_say_who_had_the_call(end):
    """Where another upstream answered than was to be asked at first; of what is lost nobody can say."""
    who = binding([quota("staff/daily", tokens=1000)])
    for operation, upstream in ((end, "spare"), (replace(end, upstream=None), "openai"), (Expire("1"), "openai")):
        books = Book({}, {}, NOON)
        books.apply(reserve("1", who, call(100, 400)))
        ended = books.apply(operation)
        assert isinstance(ended, Accepted)
        assert ended.entry.labels == CallLabels("ann", "gpt-4o-mini", "chat", upstream)


def test_a_record_names_what_shortened_the_answer_and_what_would_have_refused():
    """By the quotas' ids, since quotas come and go."""
    watching = quota("staff/new", tokens=10, enforce="shadow")
    who = binding([DAILY], shadows=[watching])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, call(100, 4000, 1)))
    entry = ledger.entries["1"]
    assert (entry.capped_by, entry.would_refuse) == (DAILY.id, (watching.id,))
    assert (entry.hold, entry.maximum) == (Amount(100, 900, 1), 900)
    assert watching.key_for("ann") not in ledger.counters


@pytest.mark.parametrize(
    "operation",
    [Settle("2", exactly(1), "complete"), Release("2"), Expire("2"), extend("2", ANN, 400)],
    ids=lambda operation: type(operation),
)
def test_the_end_or_growth_of_an_unknown_call_changes_nothing(operation):
    """It was never reserved, or has been deleted since."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    before = (dict(ledger.counters), dict(ledger.entries))
    assert ledger.apply(operation) == [Unknown("2")]
    assert (ledger.counters, ledger.entries) == before


# ------------------------------------------------------------------------------------------------------------ reserve


def test_a_refused_call_changes_nothing():
    """No charge, no request, no window opened, no entry left; the answer says how things stand."""
    never_used = quota("staff/6h", tokens=5000, per="6h")
    who = binding([DAILY, never_used])
    books = Book(counters(who, used={DAILY.id: 600}), {}, NOON)
    before = dict(books.counters)
    answer = books.apply(reserve("1", who, call(401)))
    assert isinstance(answer, Refused)
    assert answer.decision.verdict is Verdict.EXHAUSTED
    assert answer.counters == books.counters == before
    assert (books.entries, books.entries_changed, books.counters_changed) == ({}, set(), set())


def test_a_call_that_has_to_be_counted_first_changes_nothing():
    """It comes again with the same id once its tokens are known, and is decided on like any other."""
    ledger = Ledger(ANN)
    operation = reserve("1", ANN, CALL)
    assert ledger.apply(replace(operation, demand=estimated(operation.demand))) == [NeedsCount()]
    assert (ledger.counters, ledger.entries) == ({}, {})
    [booked] = ledger.apply(operation)
    assert isinstance(booked, Accepted)


def test_a_stream_holds_its_first_part():
    """And the entry says how far that may grow; where nobody knows, nothing."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, STREAM), reserve("2", ANN, replace(STREAM, output_maximum=400, is_unbounded=True)))
    known, unknown = ledger.entries["1"], ledger.entries["2"]
    assert known.hold == unknown.hold == Amount(100, 100, 1)
    assert (known.maximum, unknown.maximum) == (900, None)
    assert ledger.levels(DAILY) == (NOTHING, Amount(200, 200, 2))


def test_a_reserve_is_all_or_nothing():
    """Room in one quota is not held where another refuses."""
    who = binding(
        [DAILY, quota("staff/hourly", tokens=100, per="hour")], always=[quota("everyone/calls", requests=9)]
    )
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, call(101)))
    assert not ledger.counters


@pytest.mark.parametrize(
    "ending", [[], [SETTLE], [RELEASE], [EXPIRE]], ids=["open", "settled", "released", "expired"]
)
def test_a_reserve_that_is_repeated_books_nothing_more(ending):
    """The first one's commit may have been answered by a broken line; the entry is found as it is."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL), *ending)
    before = (dict(ledger.counters), dict(ledger.entries))
    for again in (reserve("1", ANN, CALL), reserve("1", ANN, call(1001))):
        assert ledger.apply(again) == [Accepted(ledger.entries["1"], ledger.counters)]
    assert (ledger.counters, ledger.entries) == before


def test_a_reserve_that_was_refused_may_be_repeated():
    """So a call can wait for others and ask again under its own id."""
    ledger = Ledger(ANN)
    full = reserve("1", ANN, call(600, 400))
    [_, refused] = ledger.apply(full, reserve("2", ANN, CALL))
    assert isinstance(refused, Refused)
    assert refused.decision.verdict is Verdict.BUSY
    [_, let_in] = ledger.apply(SETTLE, reserve("2", ANN, CALL))
    assert isinstance(let_in, Accepted)


def test_acts_of_one_batch_see_each_other_in_order():
    """What one call gives back the next one may take, and what one takes the next one may not."""
    ledger = Ledger(ANN)
    answers = ledger.apply(
        reserve("1", ANN, call(600, 400)),
        reserve("2", ANN, CALL),
        SETTLE,
        reserve("3", ANN, CALL),
        reserve("4", ANN, CALL),
    )
    assert [type(answer) for answer in answers] == [Accepted, Refused, Accepted, Accepted, Refused]
    assert ledger.levels(DAILY) == (Amount(90, 60, 1), HELD)


@pytest.mark.parametrize("each", [DAILY, SIX_HOURS], ids=["calendar", "duration"])
def test_of_64_calls_at_once_as_many_are_let_in_as_fit(each):
    """Also if they are the first ever: 60 + 40 tokens each, 10 fit into 1000."""
    who = binding([each])
    ledger = Ledger(who)
    answers = ledger.apply(*(reserve(str(number), who, call(60, 40)) for number in range(64)))
    assert [isinstance(answer, Accepted) for answer in answers] == [True] * 10 + [False] * 54
    ledger.apply(*(Settle(str(number), exactly(60, 40), "complete") for number in range(64)))
    assert ledger.levels(each) == (Amount(600, 400, 10), NOTHING)


def test_a_call_that_nothing_binds_is_on_the_books_all_the_same():
    """Where `unmatched: allow`, or for an unlimited group: the record says what it used, no counter does."""
    who = binding(route("admins"))
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, call(10**6, 10**6)), SETTLE)
    entry = ledger.entries["1"]
    assert (entry.admitted_via, entry.held_amounts, entry.usage) == ("admins", (), exactly(90, 60))
    assert not ledger.counters


def test_members_have_their_own_counters_and_share_a_pot():
    """What bob holds of the pot stands in ann's way, what he holds of his own does not."""
    own, pot = quota("team/own", tokens=600), quota("team/pot", tokens=1000, shared=True)
    ann, bob = binding([own, pot], user="ann"), binding([own, pot], user="bob")
    ledger = Ledger(ann)
    answers = ledger.apply(reserve("1", ann, call(500)), reserve("2", bob, call(500)), reserve("3", ann, call(1)))
    assert [type(answer) for answer in answers] == [Accepted, Accepted, Refused]
    ledger.apply(Settle("1", exactly(500), "complete"), Release("2"))
    assert ledger.levels(own, "ann") == (amount(500), NOTHING)
    assert ledger.levels(own, "bob") == (NOTHING, NOTHING)
    assert ledger.levels(pot) == (amount(500), NOTHING)


def test_what_is_charged_is_what_was_held():
    """A group's quota that could not carry the call is left alone at its end too, and so is another group's pot."""
    small, pot = quota("lab/small", tokens=499), quota("team/pot", tokens=5000, shared=True)
    who = binding([DAILY], [small], [pot])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, CALL), SETTLE)
    assert ledger.counters.keys() == {DAILY.key_for("ann")}


def test_a_call_that_ends_after_its_user_was_moved_charges_what_it_was_let_in_through():
    """Its lines say where, no policy is asked."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    elsewhere = binding([quota("team/daily", tokens=1000)])
    ledger.apply(SETTLE, reserve("2", elsewhere, CALL))
    assert ledger.levels(DAILY) == (Amount(90, 60, 1), NOTHING)


def test_after_counts_tokens_and_requests_once_they_are_known():
    """It holds the mark of a call, is charged all, and may end over its limit; then it is out."""
    classic = quota("staff/classic", tokens=1000, per="6h", enforce="after")
    who = binding([classic])
    ledger = Ledger(who)
    first, second = reserve("1", who, call(900, 900)), reserve("2", who, call(900, 900))
    ledger.apply(first, second)
    assert ledger.levels(classic) == (NOTHING, Amount(requests=2))
    ledger.now += HOUR
    ledger.apply(Settle("1", exactly(900, 300), "complete"))
    assert ledger.levels(classic) == (Amount(900, 300, 1), Amount(requests=1))
    [refused] = ledger.apply(reserve("3", who, call(1)))
    assert isinstance(refused, Refused)
    assert refused.decision.admissible_at == NOON + 6 * HOUR


def test_a_quota_in_shadow_is_charged_like_any_other():
    """Its counter shows what it would have counted."""
    watching = quota("staff/new", tokens=600, enforce="shadow")
    who = binding([DAILY], shadows=[watching])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, CALL), SETTLE)
    assert ledger.levels(watching) == ledger.levels(DAILY) == (Amount(90, 60, 1), NOTHING)


# ------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("end", [SETTLE, RELEASE, EXPIRE], ids=["settle", "release", "expire"])
@pytest.mark.parametrize("each", [DAILY, SIX_HOURS], ids=["calendar", "duration"])
def test_a_call_belongs_to_the_window_in_which_it_was_reserved(each, end):
    """It began before midnight and ends after: the new window, in which another call runs, does not notice."""
    who = binding([each])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, CALL))
    ledger.now += DAY
    ledger.apply(reserve("2", who, call(30)), end)
    assert ledger.levels(each) == (NOTHING, Amount(30, 0, 1))
    assert ledger.entries["1"].state != "open"


@pytest.mark.parametrize("each", [DAILY, SIX_HOURS], ids=["calendar", "duration"])
def test_a_late_settle_after_an_expire_does_not_touch_the_next_window(each):
    """The difference belongs to the window that has closed."""
    who = binding([each])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, CALL), EXPIRE)
    ledger.now += DAY
    ledger.apply(reserve("2", who, call(30)), SETTLE)
    assert ledger.levels(each) == (NOTHING, Amount(30, 0, 1))


def test_a_settle_into_a_window_that_has_passed_but_has_no_successor_counts_there():
    """Nobody has called since, so the counter still is that window's: what it used is true, and soon forgotten."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    ledger.now += DAY
    ledger.apply(SETTLE)
    assert ledger.levels(DAILY) == (Amount(90, 60, 1), NOTHING)
    [booked] = ledger.apply(reserve("2", ANN, call(1000)))
    assert isinstance(booked, Accepted)


def test_a_settle_whose_counter_was_reset_writes_the_entry_only():
    """An operator may have set the counter back to nothing."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    ledger.counters.clear()
    ledger.apply(SETTLE)
    assert not ledger.counters
    assert ledger.entries["1"].usage == exactly(90, 60)


@pytest.mark.parametrize(
    ("end", "opened_at"),
    [
        pytest.param(RELEASE, NOON + HOUR, id="nothing was generated: the window was never open"),
        pytest.param(Settle("1", Unspent(), "upstream_failed"), NOON + HOUR, id="nothing was charged: likewise"),
        pytest.param(SETTLE_REJECTED, NOON, id="a bad request is a request: it is open"),
        pytest.param(SETTLE, NOON, id="it is open"),
    ],
)
def test_a_window_in_which_nothing_was_used_is_not_open(end, opened_at):
    """The next call opens its own, and has all of its six hours."""
    who = binding([SIX_HOURS])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, CALL), end)
    ledger.now += HOUR
    ledger.apply(reserve("2", who, call(30)))
    counter = ledger.counters[SIX_HOURS.key_for("ann")]
    assert counter.window == Window(opened_at, opened_at + 6 * HOUR)


def test_a_change_of_per_lets_the_running_window_end_first():
    """From day to hour: what was used today counts until midnight."""
    ledger = Ledger(ANN, used={DAILY.id: 950})
    hourly = binding([replace(DAILY, per=quota("x/y", per="hour").per)])
    [refused] = ledger.apply(reserve("1", hourly, CALL))
    assert isinstance(refused, Refused)
    assert refused.decision.admissible_at == instant("2026-11-25 00:00")
    ledger.now = instant("2026-11-25 00:00")
    ledger.apply(reserve("1", hourly, CALL))
    assert ledger.counters[DAILY.key_for("ann")].window.resets_at == instant("2026-11-25 01:00")


def test_a_changed_limit_keeps_what_was_used():
    """Lowered below the use, raised again: the counter is the same."""
    ledger = Ledger(ANN, used={DAILY.id: 500})
    [lowered, raised] = [binding([quota("staff/daily", tokens=maximum)]) for maximum in (400, 600)]
    [refused, booked] = ledger.apply(reserve("1", lowered, call(9)), reserve("2", raised, call(9)))
    assert isinstance(refused, Refused)
    assert isinstance(booked, Accepted)
    assert ledger.levels(DAILY) == (amount(500), Amount(9, 0, 1))


def test_two_windows_that_begin_alike_are_still_two():
    """Hour becomes day while a call of the hour 00:00 is in flight: its end is not the day's, which begins 00:00 too.

    Else what others hold in the new window would be given back by a call that holds nothing of it.
    """
    hourly = quota("staff/daily", tokens=500, per="hour")
    daily = binding([quota("staff/daily", tokens=500, per="day")])
    ledger = Ledger(ANN, instant("2026-11-24 00:30"))
    ledger.apply(reserve("1", binding([hourly]), CALL))
    ledger.now = instant("2026-11-24 01:00")
    ledger.apply(reserve("2", daily, CALL), RELEASE)
    assert ledger.levels(hourly) == (NOTHING, HELD)
    [full] = ledger.apply(reserve("3", daily, CALL))
    assert isinstance(full, Refused)


def test_a_clock_that_goes_astray_gives_nobody_back_what_others_hold():
    """A day ahead and back again, with a call in flight from before: nothing is negative, no limit is passed."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    ledger.now = NOON + DAY
    ledger.apply(reserve("2", ANN, CALL), Release("2"))
    ledger.now = NOON
    ledger.apply(reserve("3", ANN, call(600, 400)), RELEASE)
    assert ledger.levels(DAILY) == (NOTHING, Amount(600, 400, 1))


@pytest.mark.parametrize("is_full", [True, False], ids=["refused", "let in"])
def test_what_a_clock_ahead_of_its_time_has_opened_ends_when_it_was_first_said(is_full):
    """A day ahead it opened six hours; they end six hours after the first call at the true time, whoever comes."""
    who = binding([SIX_HOURS])
    ledger = Ledger(who, NOON + DAY, used={SIX_HOURS.id: 1000 if is_full else 0})
    for hours in (0, 1, 5):
        ledger.now = NOON + hours * HOUR
        [answer] = ledger.apply(reserve(str(hours), who, call(1)))
        assert isinstance(answer, Refused) is is_full
        assert answer.counters[SIX_HOURS.key_for("ann")].window == Window(NOON + DAY, NOON + 6 * HOUR)
    ledger.now = NOON + 6 * HOUR
    [booked] = ledger.apply(reserve("6", who, call(1)))
    assert isinstance(booked, Accepted)
    assert ledger.levels(SIX_HOURS) == (NOTHING, Amount(1, 0, 1))


def test_who_is_refused_while_the_clock_was_ahead_opens_no_window():
    """What has ended is left as it is; a call that is let in later has all of its six hours."""
    small = quota("staff/6h", tokens=9, per="6h")
    who = binding([small])
    for used, hours in ((9, 7), (0, 0)):
        ledger = Ledger(who, NOON + DAY, used={small.id: used})
        ledger.now = NOON
        ledger.apply(reserve("1", who, call(10)))
        before = dict(ledger.counters)
        ledger.now = NOON + hours * HOUR
        ledger.apply(reserve("1", who, call(10)))
        assert ledger.counters == before
        ledger.now += HOUR
        ledger.apply(reserve("2", who, call(9)))
        assert ledger.counters[small.key_for("ann")].window.resets_at == ledger.now + 6 * HOUR


# ------------------------------------------------------------------------------------------------- holds that grow


def held_by(ledger: Ledger, entry_id: str = "1") -> list[tuple[str, int, Amount]]:
    """The lines of an entry, in short: quota, opening of the window, amount."""
    return [
        (held_amount.key[1], held_amount.opened_at, held_amount.amount)
        for held_amount in ledger.entries[entry_id].held_amounts
    ]


LAB = quota("lab/output", output_tokens=500)
ANN_OF_TWO = binding([DAILY], [LAB])
TODAY = NOON - 12 * HOUR
TOMORROW = NOON + 12 * HOUR
IN_SIX_HOURS = NOON + 6 * HOUR


@pytest.mark.parametrize(
    ("operations", "hold", "verdict"),
    [
        pytest.param([extend("1", ANN, 400)], Amount(100, 400, 1), "ALLOW", id="grows"),
        pytest.param([extend("1", ANN, 900)], Amount(100, 900, 1), "ALLOW", id="to the last token"),
        pytest.param([extend("1", ANN, 901)], Amount(100, 900, 1), "ALLOW", id="as far as there is room"),
        pytest.param([extend("1", ANN, 1200, least=901)], Amount(100, 900, 1), "EXHAUSTED", id="which is too little"),
        pytest.param([extend("1", ANN, 1200, least=900)], Amount(100, 900, 1), "ALLOW", id="which is just enough"),
        pytest.param([extend("1", ANN, 50)], Amount(100, 100, 1), "ALLOW", id="never shrinks"),
        pytest.param([extend("1", ANN, 400)] * 2, Amount(100, 400, 1), "ALLOW", id="repeated"),
        pytest.param(
            [extend("1", ANN, 400), extend("1", ANN, 600), extend("1", ANN, 400)],
            Amount(100, 600, 1),
            "ALLOW",
            id="repeated late",
        ),
        pytest.param([extend("1", ANN, 400, input_tokens=30)], Amount(30, 400, 1), "ALLOW", id="a smaller input"),
        pytest.param([extend("1", ANN, 400, input_tokens=30)] * 2, Amount(30, 400, 1), "ALLOW", id="told twice"),
        pytest.param([extend("1", ANN, 0, input_tokens=0)], Amount(0, 100, 1), "ALLOW", id="no input at all"),
        pytest.param(
            [extend("1", ANN, 0, input_tokens=101)], Amount(100, 100, 1), "ALLOW", id="a larger input: as it is"
        ),
        pytest.param(
            [extend("1", ANN, 0, input_tokens=30), extend("1", ANN, 0, input_tokens=60)],
            Amount(30, 100, 1),
            "ALLOW",
            id="what was given back is not taken again",
        ),
        pytest.param(
            [extend("1", ANN, 970, least=970, input_tokens=30)],
            Amount(30, 970, 1),
            "ALLOW",
            id="what the input gives back the answer may take",
        ),
    ],
)
@pytest.mark.parametrize("batches", ["one", "many"])
def test_a_hold_grows_to_what_is_asked_in_all(operations, hold, verdict, batches):
    """It takes absolute numbers, so that repeating one, or an old one that comes late, changes nothing."""
    ledger = Ledger(ANN)
    for batch in [operations] if batches == "one" else [[operation] for operation in operations]:
        [*_, answer] = ledger.apply(*([] if "1" in ledger.entries else [reserve("1", ANN, STREAM)]), *batch)
    entry = ledger.entries["1"]
    assert (answer.entry, answer.counters, answer.verdict) == (entry, ledger.counters, Verdict[verdict])
    assert (entry.hold, entry.maximum, entry.state) == (hold, 900, "open")
    assert held_by(ledger) == [(DAILY.id, TODAY, hold)]
    assert ledger.levels(DAILY) == (NOTHING, hold)


@pytest.mark.parametrize(
    ("operations", "freed"),
    [
        pytest.param([extend("1", ANN_OF_TWO, 400)], [], id="more is held"),
        pytest.param([extend("1", ANN_OF_TWO, 100, input_tokens=99)], [DAILY, LAB], id="of the input"),
        pytest.param([extend("1", ANN_OF_TWO, 100, input_tokens=99)] * 2, [], id="but only once"),
        pytest.param([extend("1", ANN_OF_TWO, 501)], [LAB], id="what is left alone"),
        pytest.param([extend("1", ANN_OF_TWO, 501), SETTLE], [DAILY], id="and is left alone at its end"),
        pytest.param([RELEASE], [DAILY, LAB], id="released"),
        pytest.param([EXPIRE], [DAILY, LAB], id="lost"),
        pytest.param([EXPIRE, SETTLE], [], id="came back: nothing was held any more"),
        pytest.param([RELEASE, extend("1", ANN_OF_TWO, 100, input_tokens=0)], [], id="ended"),
        pytest.param([reserve("1", ANN_OF_TWO, STREAM)], [], id="let in"),
    ],
)
def test_an_answer_says_where_something_was_given_back(operations, freed):
    """So that whoever waits for room in one of these quotas asks again, and nobody else."""
    ledger = Ledger(ANN_OF_TWO)
    *_, answer = ledger.apply(reserve("1", ANN_OF_TWO, STREAM), *operations)
    assert answer.freed == {each.key_for("ann") for each in freed}


def test_what_others_hold_stops_an_answer_until_they_give_it_back():
    """It takes what there is meanwhile, and the rest when it asks again."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, STREAM), reserve("2", ANN, call(600)))
    more = extend("1", ANN, 500, least=400)
    [busy] = ledger.apply(more)
    assert (busy.verdict, busy.entry.hold) == (Verdict.BUSY, Amount(100, 300, 1))
    [_, grown] = ledger.apply(Settle("2", exactly(300), "complete"), more)
    assert (grown.verdict, grown.entry.hold) == (Verdict.ALLOW, Amount(100, 500, 1))
    assert ledger.levels(DAILY) == (amount(300), Amount(100, 500, 1))


def test_growing_makes_room_in_one_quota_and_is_stopped_by_another():
    """Each counts what it limits: the input that was given back is room for tokens, not for output."""
    each = quota("staff/daily", tokens=300, output_tokens=150)
    who = binding([each])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, STREAM))
    [grown] = ledger.apply(extend("1", who, 400, least=151, input_tokens=10))
    assert (grown.verdict, grown.entry.hold) == (Verdict.EXHAUSTED, Amount(10, 150, 1))


@pytest.mark.parametrize("end", [SETTLE, RELEASE, EXPIRE], ids=["settled", "released", "expired"])
def test_a_call_that_has_ended_does_not_grow(end):
    """The answer is its record, in which its process sees that it was taken for dead."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, STREAM), end)
    before = (dict(ledger.counters), dict(ledger.entries))
    [answer] = ledger.apply(extend("1", ANN, 400, input_tokens=0))
    assert answer == Accepted(ledger.entries["1"], ledger.counters)
    assert answer.entry.state != "open"
    assert (ledger.counters, ledger.entries) == before


def test_a_call_that_nothing_binds_grows_without_a_line():
    """Its record says how far."""
    who = binding(route("admins"))
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, STREAM), extend("1", who, TOKENS_MAX))
    assert (ledger.entries["1"].hold, held_by(ledger)) == (Amount(100, TOKENS_MAX, 1), [])
    assert not ledger.counters


def test_what_a_lost_call_is_charged_is_all_that_it_had_come_to_hold():
    """Nobody saw more than that: nothing passes that is not held. If it comes back the difference is booked."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, STREAM), extend("1", ANN, 400, input_tokens=30), EXPIRE)
    assert ledger.entries["1"].usage == AtLeast(Tokens(30, 400))
    assert ledger.levels(DAILY) == (Amount(30, 400, 1), NOTHING)
    ledger.apply(Settle("1", exactly(30, 450), "complete"))
    assert ledger.levels(DAILY) == (Amount(30, 450, 1), NOTHING)


# -------------------------------------------------------------------------------------- growing over a window's end


@pytest.mark.parametrize(("each", "next_opening"), [(DAILY, TOMORROW), (SIX_HOURS, NOON + DAY)], ids=["day", "6h"])
def test_an_answer_that_outlives_its_window_grows_in_the_next(each, next_opening):
    """By a line of its own, which grows on in place; what it held before stays where it was."""
    who = binding([each])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, STREAM))
    first = (each.id, each.per.opening(NOON).opened_at, Amount(100, 100, 1))
    ledger.now = NOON + DAY
    for output in (300, 300, 700):
        [grown] = ledger.apply(extend("1", who, output))
        assert held_by(ledger) == [first, (each.id, next_opening, Amount(output=output - 100))]
        assert ledger.levels(each) == (NOTHING, Amount(output=output - 100))
        assert (grown.entry.hold, grown.verdict) == (Amount(100, output, 1), Verdict.ALLOW)


def test_in_the_next_window_only_what_is_held_there_counts():
    """900 are held by a call of today, 300 by it tomorrow; of the 1000 of tomorrow another one may have 700."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, call(100, 900, 800, initial_hold=800)))
    ledger.now = NOON + DAY
    ledger.apply(extend("1", ANN, 1100))
    assert ledger.levels(DAILY) == (NOTHING, Amount(output=300))
    [full, let_in] = ledger.apply(reserve("2", ANN, call(701)), reserve("3", ANN, call(700)))
    assert isinstance(full, Refused)
    assert isinstance(let_in, Accepted)
    [stopped] = ledger.apply(extend("1", ANN, 1200, least=1101))
    assert (stopped.verdict, stopped.entry.hold.output) == (Verdict.BUSY, 1100)
    [used_up] = ledger.apply(Settle("3", exactly(700), "complete"), extend("1", ANN, 1200, least=1101))[1:]
    assert (used_up.verdict, used_up.entry.hold.output) == (Verdict.EXHAUSTED, 1100)


def test_it_may_grow_in_a_window_that_another_call_has_opened():
    """It joins that window; it does not open one of its own."""
    who = binding([SIX_HOURS])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, STREAM))
    ledger.now = IN_SIX_HOURS + 5
    ledger.apply(reserve("2", who, call(600)))
    ledger.now += HOUR
    ledger.apply(extend("1", who, 300))
    assert held_by(ledger)[1] == (SIX_HOURS.id, IN_SIX_HOURS + 5, Amount(output=200))
    assert ledger.levels(SIX_HOURS) == (NOTHING, Amount(600, 200, 1))


def test_growth_that_is_nothing_opens_no_window():
    """Whoever asks for what it holds already has no line in the new one."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    ledger.now = NOON + DAY
    ledger.apply(extend("1", ANN, 100))
    assert held_by(ledger) == [(DAILY.id, TODAY, Amount(100, 100, 1))]
    assert ledger.levels(DAILY) == (NOTHING, Amount(100, 100, 1))


def test_an_input_is_given_back_where_it_was_held():
    """Of the line that it stands in: in its window, if that is still there; the growth knows of no input."""
    for later, levels in ((HOUR, (NOTHING, Amount(30, 300, 1))), (DAY, (NOTHING, Amount(output=200)))):
        ledger = Ledger(ANN)
        ledger.apply(reserve("1", ANN, STREAM))
        ledger.now += later
        ledger.apply(extend("1", ANN, 300), extend("1", ANN, 300, input_tokens=30))
        assert held_by(ledger)[0][2].input == 30
        assert ledger.levels(DAILY) == levels


TWO_WINDOWS = [("staff/daily", TODAY, Amount(100, 100, 1)), ("staff/daily", TOMORROW, Amount(output=300))]


@pytest.mark.parametrize(
    ("ends", "used"),
    [
        pytest.param([Settle("1", exactly(90, 60), "complete")], NOTHING, id="all of it in the first"),
        pytest.param([Settle("1", exactly(90, 100), "complete")], NOTHING, id="just all of it"),
        pytest.param([Settle("1", exactly(90, 250), "complete")], Amount(output=150), id="the rest in the second"),
        pytest.param([Settle("1", exactly(100, 400), "complete")], Amount(output=300), id="as held"),
        pytest.param([Settle("1", exactly(150, 500), "complete")], Amount(50, 400, 0), id="more than was held"),
        pytest.param([Settle("1", BAD_REQUEST, "rejected")], NOTHING, id="the request is of the first"),
        pytest.param([RELEASE], NOTHING, id="released"),
        pytest.param([EXPIRE], Amount(output=300), id="lost: as held"),
        pytest.param([EXPIRE, Settle("1", exactly(90, 250), "complete")], Amount(output=150), id="came back: less"),
        pytest.param(
            [EXPIRE, Settle("1", exactly(90, 60), "complete")], NOTHING, id="came back: the second had none"
        ),
        pytest.param([EXPIRE, Settle("1", exactly(150, 500), "complete")], Amount(50, 400, 0), id="came back: more"),
    ],
)
def test_of_two_windows_each_is_charged_up_to_what_it_held_and_the_last_the_rest(ends, used):
    """The first has closed, so it is in the record alone; what is charged to the second is on its counter."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    ledger.now = NOON + DAY
    ledger.apply(extend("1", ANN, 400))
    assert held_by(ledger) == TWO_WINDOWS
    ledger.apply(*ends)
    assert ledger.levels(DAILY) == (used, NOTHING)
    assert held_by(ledger) == TWO_WINDOWS


def test_an_answer_may_outlive_any_number_of_windows():
    """Each holds what it grew by in it; of what it used, the last open one gets what the others did not hold."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    for days in (1, 2, 3):
        ledger.now = NOON + days * DAY
        ledger.apply(extend("1", ANN, 100 + 200 * days))
    assert [amount for _, _, amount in held_by(ledger)] == [Amount(100, 100, 1)] + [Amount(output=200)] * 3
    ledger.apply(Settle("1", exactly(100, 620), "complete"))
    assert ledger.levels(DAILY) == (Amount(output=120), NOTHING)


@pytest.mark.parametrize(
    ("amounts", "charge", "parts"),
    [
        pytest.param([], Amount(9, 9, 1), [], id="no line"),
        pytest.param([("a", Amount(1, 1, 1))], Amount(9, 9, 1), [Amount(9, 9, 1)], id="one line: all"),
        pytest.param(
            [("a", Amount(1, 1, 1)), ("b", Amount(1, 1, 1))],
            Amount(9, 9, 1),
            [Amount(9, 9, 1)] * 2,
            id="one each: all",
        ),
        pytest.param(
            [("a", Amount(5, 5, 1)), ("a", Amount(0, 5))], Amount(5, 7, 1), [Amount(5, 5, 1), Amount(0, 2)], id="two"
        ),
        pytest.param(
            [("a", Amount(5, 5, 1)), ("a", Amount(0, 5))],
            Amount(7, 3, 1),
            [Amount(5, 3, 1), Amount(2, 0)],
            id="input",
        ),
        pytest.param(
            [("a", Amount(5, 5, 1)), ("a", Amount(0, 5))], Amount(0, 0, 1), [Amount(0, 0, 1), NOTHING], id="a request"
        ),
        pytest.param([("a", Amount(5, 5, 1)), ("a", Amount(0, 5))], NOTHING, [NOTHING, NOTHING], id="nothing"),
        pytest.param(
            [("a", Amount(0, 1)), ("a", Amount(0, 2)), ("a", Amount(0, 3))],
            Amount(0, 9),
            [Amount(0, 1), Amount(0, 2), Amount(0, 6)],
            id="three",
        ),
        pytest.param(
            [("a", Amount(5, 5, 1)), ("b", Amount(5, 8, 1)), ("a", Amount(0, 3))],
            Amount(5, 9, 1),
            [Amount(5, 5, 1), Amount(5, 9, 1), Amount(0, 4)],
            id="two of one counter, one of another",
        ),
        pytest.param(
            [("a", Amount(requests=1)), ("b", Amount(5, 8, 1))],
            Amount(5, 9, 1),
            [Amount(5, 9, 1)] * 2,
            id="a mark is charged all",
        ),
    ],
)
def test_a_charge_is_shared_among_the_windows_of_each_counter(amounts, charge, parts):
    """Each counter is charged all of it once: each of its windows up to what it held, in order, the last the rest."""
    held_amounts = tuple(
        HeldAmount(("user:ann", name), place, amount) for place, (name, amount) in enumerate(amounts)
    )
    assert split_charge(held_amounts, charge) == parts


# ---------------------------------------------------------------------------------------- other quotas, other clocks


def test_a_quota_beside_that_can_not_carry_the_growth_is_left_alone():
    """What was held of it is given back, it is charged nothing, and it is not taken up again."""
    ledger = Ledger(ANN_OF_TWO)
    ledger.apply(reserve("1", ANN_OF_TWO, STREAM), extend("1", ANN_OF_TWO, 500))
    assert ledger.levels(LAB) == (NOTHING, Amount(100, 500, 1))
    [grown] = ledger.apply(extend("1", ANN_OF_TWO, 501))
    assert held_by(ledger) == [(DAILY.id, TODAY, Amount(100, 501, 1))]
    assert ledger.levels(LAB) == (NOTHING, NOTHING)
    assert grown.counters.keys() == {DAILY.key_for("ann")}
    ledger.apply(extend("1", ANN_OF_TWO, 502), Settle("1", exactly(90, 502), "complete"))
    assert ledger.levels(LAB) == (NOTHING, NOTHING)
    assert ledger.levels(DAILY) == (Amount(90, 502, 1), NOTHING)


def test_what_is_left_alone_in_the_next_window_is_left_alone_in_the_last_too():
    """A call is charged to a quota as a whole or not at all; others there keep what they hold."""
    ledger = Ledger(ANN_OF_TWO)
    ledger.apply(reserve("1", ANN_OF_TWO, STREAM))
    ledger.now = NOON + DAY
    ledger.apply(reserve("2", ANN_OF_TWO, call(1, 99)), extend("1", ANN_OF_TWO, 500), extend("1", ANN_OF_TWO, 502))
    assert {quota_id for quota_id, _, _ in held_by(ledger)} == {DAILY.id}
    assert ledger.levels(LAB) == (NOTHING, Amount(1, 99, 1))
    assert ledger.levels(DAILY) == (NOTHING, Amount(1, 501, 1))


def test_through_a_pot_an_answer_takes_from_the_pot_as_it_grows():
    """Another member finds only what is left of it."""
    pot = quota("team/pot", tokens=1000, shared=True)
    ann, bob = binding([pot], user="ann"), binding([pot], user="bob")
    ledger = Ledger(ann)
    ledger.apply(reserve("1", ann, STREAM), extend("1", ann, 500), reserve("2", bob, STREAM))
    [stopped] = ledger.apply(extend("2", bob, 400, least=400))
    assert (stopped.verdict, stopped.entry.hold) == (Verdict.BUSY, Amount(100, 300, 1))
    assert ledger.levels(pot) == (NOTHING, Amount(200, 800, 2))


def test_after_keeps_the_mark_of_a_call_that_grows_and_shadow_watches_it_grow():
    """`after` is charged in the window in which the call was let in; in the next it has no mark."""
    classic = quota("staff/classic", tokens=100, enforce="after")
    watching = quota("staff/new", tokens=300, enforce="shadow")
    who = binding([DAILY, classic], shadows=[watching])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, STREAM), extend("1", who, 400))
    mark, whole = Amount(requests=1), Amount(100, 400, 1)
    assert [amount for _, _, amount in held_by(ledger)] == [whole, mark, whole]
    assert [ledger.levels(each)[1] for each in (DAILY, classic, watching)] == [whole, mark, whole]
    ledger.now = NOON + DAY
    ledger.apply(extend("1", who, 600))
    assert held_by(ledger)[3:] == [
        (DAILY.id, TOMORROW, Amount(output=200)),
        (watching.id, TOMORROW, Amount(output=200)),
    ]
    assert ledger.counters[classic.key_for("ann")].window.opened_at == TODAY


def test_an_overdraft_lets_an_answer_end_and_nobody_in():
    """It grows to 1200 of 1000; whoever comes meanwhile is refused."""
    each = quota("staff/daily", tokens=1000, overdraft=200)
    who = binding([each])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, call(100, 4000, 100, initial_hold=100)))
    [grown, stopped] = ledger.apply(extend("1", who, 1100, least=1100), extend("1", who, 1101, least=1101))
    assert [answer.verdict for answer in (grown, stopped)] == [Verdict.ALLOW, Verdict.EXHAUSTED]
    [_, refused] = ledger.apply(Settle("1", exactly(100, 1100), "complete"), reserve("2", who, call(0, 1)))
    assert refused.decision.verdict is Verdict.EXHAUSTED
    assert ledger.levels(each)[0].tokens == 1200


def test_an_answer_grows_by_the_limits_under_which_it_was_let_in():
    """A reload meanwhile is for the calls that come after it: each act brings its own quotas."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    lowered = binding([quota("staff/daily", tokens=150)])
    [grown, refused] = ledger.apply(extend("1", ANN, 900, least=900), reserve("2", lowered, call(1)))
    assert (grown.verdict, grown.entry.hold) == (Verdict.ALLOW, Amount(100, 900, 1))
    assert isinstance(refused, Refused)


@pytest.mark.parametrize("each", [DAILY, SIX_HOURS], ids=["calendar", "duration"])
def test_after_a_clock_that_goes_back_an_answer_grows_where_it_began(each):
    """Its window is still the last one, by whatever clock."""
    who = binding([each])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, STREAM))
    ledger.now = NOON - 2 * DAY
    ledger.apply(extend("1", who, 400), extend("1", who, 400))
    assert held_by(ledger) == [(each.id, each.per.opening(NOON).opened_at, Amount(100, 400, 1))]
    assert ledger.levels(each) == (NOTHING, Amount(100, 400, 1))


def test_after_a_clock_that_went_ahead_an_answer_grows_in_the_window_that_it_left_there():
    """A day ahead it grew into tomorrow; back again tomorrow's window is the one that counts."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    ledger.now = NOON + DAY
    ledger.apply(extend("1", ANN, 300))
    ledger.now = NOON
    ledger.apply(reserve("2", ANN, call(50)), extend("1", ANN, 400))
    assert held_by(ledger) == TWO_WINDOWS
    assert ledger.levels(DAILY) == (NOTHING, Amount(50, 300, 1))
    ledger.apply(Settle("1", exactly(100, 400), "complete"), RELEASE)
    assert ledger.levels(DAILY) == (Amount(output=300), Amount(50, 0, 1))


def test_a_call_whose_counter_was_reset_grows_in_a_window_of_its_own():
    """What it held there stays in its record; it holds of the new window only what it grows by."""
    who = binding([SIX_HOURS])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, STREAM))
    ledger.counters.clear()
    ledger.now += HOUR
    ledger.apply(extend("1", who, 300))
    assert ledger.levels(SIX_HOURS) == (NOTHING, Amount(output=200))
    ledger.apply(Settle("1", exactly(100, 250), "complete"))
    assert ledger.levels(SIX_HOURS) == (Amount(output=150), NOTHING)


# ------------------------------------------------------------------------------------------ what is fit for the books


@pytest.mark.parametrize("text", ["a" * 513, "a\0b", "a\nb", "\x1b[2J", "\ud800", "a\u2028b"])
@pytest.mark.parametrize("place", range(4))
def test_text_that_databases_and_logs_choke_on_is_not_booked(text, place):
    """It is refused when the act is built, before it stands in a batch with others."""
    texts = ["ann", "gpt-4o-mini", "chat", "openai"]
    texts[place] = text
    with pytest.raises(ValueError, match="not fit for the ledger"):
        CallLabels(*texts)


def test_names_in_any_language_are_booked():
    """Also the longest, and none."""
    assert CallLabels("Élodie 李", "a" * 512, "chat", "").user == "Élodie 李"


@pytest.mark.parametrize(
    "demand", [call(-1), call(TOKENS_MAX + 1), call(0, -1), call(0, TOKENS_MAX + 1), call(2**63), call(0, 10**30)]
)
def test_a_demand_beyond_all_bounds_is_not_booked(demand):
    """Integers are stored in 64 bits; a negative one would give tokens away."""
    with pytest.raises(ValueError, match="beyond all bounds"):
        reserve("1", ANN, demand)


def test_the_largest_demand_is_an_ordinary_one():
    """It fits no quota, but the books are well."""
    assert isinstance(Ledger(ANN).apply(reserve("1", ANN, call(TOKENS_MAX, TOKENS_MAX)))[0], Refused)


@pytest.mark.parametrize(
    "usage", [exactly(-1), exactly(0, -1), exactly(TOKENS_MAX + 1), AtLeast(Tokens(0, 2**63)), Unspent(requests=-1)]
)
def test_a_usage_beyond_all_bounds_is_not_booked(usage):
    """As for demands: refused when the act is built, so that it can't fail its neighbours in the batch."""
    with pytest.raises(ValueError, match="beyond all bounds"):
        Settle("1", usage, "complete")


@pytest.mark.parametrize("numbers", [(-1, 0, 0), (0, -1, -1), (0, 0, -1), (TOKENS_MAX + 1, 0, 0), (0, 2**63, 0)])
def test_a_growth_beyond_all_bounds_is_not_booked(numbers):
    """Likewise."""
    with pytest.raises(ValueError, match="beyond all bounds"):
        Extend("1", ANN, *numbers)


def test_a_growth_that_contradicts_itself_is_not_booked():
    """Nobody needs more than he asks for."""
    with pytest.raises(ValueError, match="401 tokens at the least are more than the 400 asked for"):
        extend("1", ANN, 400, least=401)
