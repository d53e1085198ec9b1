"""What the four acts do to counters and entries: by scenarios with numbers, and by random histories.

A batch is a `Books` over what the batches before it wrote, as in the ledger. The clock starts on the 24th of November
2026 at noon, UTC.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from proxy.books import (
    Act,
    Booked,
    Books,
    Entry,
    Expire,
    Facts,
    Line,
    NotBooked,
    Release,
    Reply,
    Settle,
    Unknown,
)
from proxy.quotas import Binding, Counter, CounterKey, Demand, Quota, Route, Verdict
from proxy.usage import NOTHING, TOKENS_MAX, Amount, AtLeast, Exactly, Tokens, Unspent, charge_of
from proxy.windows import Window
from tests.builders import DAY, HOUR, NOON, amount, binding, call, counters, exactly, instant, quota, reserve, route
from tests.random_rules import demands, quota_lists


class Ledger:
    """What the real one keeps: counters and entries, of which each batch writes back only what it says it changed."""

    def __init__(self, who: Binding, now: int = NOON, *, used: Mapping[str, Amount | int] | None = None) -> None:
        self.counters = counters(who, used=used, opened=now)
        self.entries: dict[str, Entry] = {}
        self.now = now

    def apply(self, *acts: Act) -> list[Reply]:
        books = Books(self.counters, self.entries, self.now)
        answers = [books.apply(act) for act in acts]
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
    ("acts", "state", "usage", "outcome", "used"),
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
def test_an_entry_ends_once(acts, state, usage, outcome, used, batches):
    """Whatever comes again, or late, in one batch or in several: the first end counts, and nothing stays held."""
    ledger = Ledger(ANN)
    if batches == "one":
        [*_, last] = ledger.apply(reserve("1", ANN, CALL), *acts)
    else:
        [last] = [ledger.apply(act) for act in (reserve("1", ANN, CALL), *acts)][-1]
    entry = ledger.entries["1"]
    assert (entry.state, entry.usage, entry.outcome) == (state, usage, outcome)
    assert ledger.levels(DAILY) == (used, NOTHING if acts else HELD)
    assert last == Booked(entry, ledger.counters)
    assert entry.ended_at == (NOON if acts else None)


def test_an_entry_says_who_called_what_and_what_it_holds():
    """It is the reservation first, and the record afterwards."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    assert ledger.entries["1"] == Entry(
        id="1",
        owner="process-1",
        facts=Facts("ann", "gpt-4o-mini", "chat", "openai"),
        through="staff",
        reserved_at=NOON,
        hold=HELD,
        charge_if_lost=Tokens(100, 400),
        lines=(Line(("user:ann", "staff/daily"), NOON - 12 * HOUR, HELD),),
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


def test_a_record_names_what_shortened_the_answer_and_what_would_have_refused():
    """By the quotas' ids, since quotas come and go."""
    watching = quota("staff/new", tokens=10, enforce="shadow")
    who = binding([DAILY], shadows=[watching])
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, call(100, 4000, 1)))
    entry = ledger.entries["1"]
    assert (entry.capped_by, entry.would_refuse) == (DAILY.id, (watching.id,))
    assert entry.hold == Amount(100, 900, 1)
    assert watching.key_for("ann") not in ledger.counters


@pytest.mark.parametrize(
    "act", [Settle("2", exactly(1), "complete"), Release("2"), Expire("2")], ids=lambda act: type(act)
)
def test_the_end_of_an_unknown_call_changes_nothing(act):
    """It was never reserved, or has been deleted since."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    before = (dict(ledger.counters), dict(ledger.entries))
    assert ledger.apply(act) == [Unknown("2")]
    assert (ledger.counters, ledger.entries) == before


# ------------------------------------------------------------------------------------------------------------ reserve


def test_a_refused_call_changes_nothing():
    """No charge, no request, no window opened, no entry left; the answer says how things stand."""
    never_used = quota("staff/6h", tokens=5000, per="6h")
    who = binding([DAILY, never_used])
    books = Books(counters(who, used={DAILY.id: 600}), {}, NOON)
    before = dict(books.counters)
    answer = books.apply(reserve("1", who, call(401)))
    assert isinstance(answer, NotBooked)
    assert answer.refused.verdict is Verdict.EXHAUSTED
    assert answer.counters == books.counters == before
    assert (books.entries, books.entries_changed, books.counters_changed) == ({}, set(), set())


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
        assert ledger.apply(again) == [Booked(ledger.entries["1"], ledger.counters)]
    assert (ledger.counters, ledger.entries) == before


def test_a_reserve_that_was_refused_may_be_repeated():
    """So a call can wait for others and ask again under its own id."""
    ledger = Ledger(ANN)
    full = reserve("1", ANN, call(600, 400))
    [_, refused] = ledger.apply(full, reserve("2", ANN, CALL))
    assert isinstance(refused, NotBooked)
    assert refused.refused.verdict is Verdict.BUSY
    [_, let_in] = ledger.apply(SETTLE, reserve("2", ANN, CALL))
    assert isinstance(let_in, Booked)


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
    assert [type(answer) for answer in answers] == [Booked, NotBooked, Booked, Booked, NotBooked]
    assert ledger.levels(DAILY) == (Amount(90, 60, 1), HELD)


@pytest.mark.parametrize("each", [DAILY, SIX_HOURS], ids=["calendar", "duration"])
def test_of_64_calls_at_once_as_many_are_let_in_as_fit(each):
    """Also if they are the first ever: 60 + 40 tokens each, 10 fit into 1000."""
    who = binding([each])
    ledger = Ledger(who)
    answers = ledger.apply(*(reserve(str(number), who, call(60, 40)) for number in range(64)))
    assert [isinstance(answer, Booked) for answer in answers] == [True] * 10 + [False] * 54
    ledger.apply(*(Settle(str(number), exactly(60, 40), "complete") for number in range(64)))
    assert ledger.levels(each) == (Amount(600, 400, 10), NOTHING)


def test_a_call_that_nothing_binds_is_on_the_books_all_the_same():
    """Where `unmatched: allow`, or for an unlimited group: the record says what it used, no counter does."""
    who = binding(route("admins"))
    ledger = Ledger(who)
    ledger.apply(reserve("1", who, call(10**6, 10**6)), SETTLE)
    entry = ledger.entries["1"]
    assert (entry.through, entry.lines, entry.usage) == ("admins", (), exactly(90, 60))
    assert not ledger.counters


def test_members_have_their_own_counters_and_share_a_pot():
    """What bob holds of the pot stands in ann's way, what he holds of his own does not."""
    own, pot = quota("team/own", tokens=600), quota("team/pot", tokens=1000, shared=True)
    ann, bob = binding([own, pot], user="ann"), binding([own, pot], user="bob")
    ledger = Ledger(ann)
    answers = ledger.apply(reserve("1", ann, call(500)), reserve("2", bob, call(500)), reserve("3", ann, call(1)))
    assert [type(answer) for answer in answers] == [Booked, Booked, NotBooked]
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
    assert isinstance(refused, NotBooked)
    assert refused.refused.let_in_at == NOON + 6 * HOUR


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
    assert isinstance(booked, Booked)


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
    assert isinstance(refused, NotBooked)
    assert refused.refused.let_in_at == instant("2026-11-25 00:00")
    ledger.now = instant("2026-11-25 00:00")
    ledger.apply(reserve("1", hourly, CALL))
    assert ledger.counters[DAILY.key_for("ann")].window.resets_at == instant("2026-11-25 01:00")


def test_a_changed_limit_keeps_what_was_used():
    """Lowered below the use, raised again: the counter is the same."""
    ledger = Ledger(ANN, used={DAILY.id: 500})
    [lowered, raised] = [binding([quota("staff/daily", tokens=maximum)]) for maximum in (400, 600)]
    [refused, booked] = ledger.apply(reserve("1", lowered, call(9)), reserve("2", raised, call(9)))
    assert isinstance(refused, NotBooked)
    assert isinstance(booked, Booked)
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
    assert isinstance(full, NotBooked)


def test_a_clock_that_goes_astray_gives_nobody_back_what_others_hold():
    """A day ahead and back again, with a call in flight from before: nothing is negative, no limit is passed."""
    ledger = Ledger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    ledger.now = NOON + DAY
    ledger.apply(reserve("2", ANN, CALL), Release("2"))
    ledger.now = NOON
    ledger.apply(reserve("3", ANN, call(600, 400)), RELEASE)
    assert ledger.levels(DAILY) == (NOTHING, Amount(600, 400, 1))


# ------------------------------------------------------------------------------------------ what is fit for the books


@pytest.mark.parametrize("text", ["a" * 513, "a\0b", "a\nb", "\x1b[2J", "\ud800", "a\u2028b"])
@pytest.mark.parametrize("place", range(4))
def test_text_that_databases_and_logs_choke_on_is_not_booked(text, place):
    """It is refused when the act is built, before it stands in a batch with others."""
    texts = ["ann", "gpt-4o-mini", "chat", "openai"]
    texts[place] = text
    with pytest.raises(ValueError, match="not fit for the books"):
        Facts(*texts)


def test_names_in_any_language_are_booked():
    """Also the longest, and none."""
    assert Facts("Élodie 李", "a" * 512, "chat", "").user == "Élodie 李"


@pytest.mark.parametrize(
    "demand", [call(-1), call(TOKENS_MAX + 1), call(0, -1), call(0, TOKENS_MAX + 1), call(2**63), call(0, 10**30)]
)
def test_a_demand_beyond_all_bounds_is_not_booked(demand):
    """Integers are stored in 64 bits; a negative one would give tokens away."""
    with pytest.raises(ValueError, match="beyond all bounds"):
        reserve("1", ANN, demand)


def test_the_largest_demand_is_an_ordinary_one():
    """It fits no quota, but the books are well."""
    assert isinstance(Ledger(ANN).apply(reserve("1", ANN, call(TOKENS_MAX, TOKENS_MAX)))[0], NotBooked)


@pytest.mark.parametrize(
    "usage", [exactly(-1), exactly(0, -1), exactly(TOKENS_MAX + 1), AtLeast(Tokens(0, 2**63)), Unspent(requests=-1)]
)
def test_a_usage_beyond_all_bounds_is_not_booked(usage):
    """As for demands: refused when the act is built, so that it can't fail its neighbours in the batch."""
    with pytest.raises(ValueError, match="beyond all bounds"):
        Settle("1", usage, "complete")


# --------------------------------------------------------------------------------------------------- random histories


# So few that a history comes back to the same window now and then.
PERS = ("hour", "day", "6h")


class Histories(RuleBasedStateMachine):
    """Calls of two users under changing quotas and a clock that goes both ways, against books kept another way.

    It begins when hour, day and month have just begun together, so that windows are easily taken for one another.
    The ghost books give each opening of a counter's window a number of its own and note with which number each call
    holds what. So they can't take one window for another, and add up everything anew each time.
    """

    calls = Bundle("calls")

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.ledger = Ledger(binding(), instant("2026-12-01 00:00") + 5000)
        # Few quotas, and calls that are small beside them: what is refused leaves nothing to go wrong.
        drawn = (
            *data.draw(quota_lists("everyone", most=1, pers=PERS)),
            *data.draw(quota_lists("a", least=1, most=2, pers=PERS)),
            *data.draw(quota_lists("b", least=1, most=1, pers=PERS)),
            *data.draw(quota_lists("watch", most=1, pers=PERS, enforce=("shadow",))),
        )
        self.quotas = {each.id: each for each in drawn}
        self.combine = data.draw(st.sampled_from(["any_group", "every_group"]))
        self.openings: dict[CounterKey, int] = {}
        self.highest: dict[tuple[CounterKey, int], dict[str, int]] = {}
        self.lines: dict[str, list[tuple[CounterKey, int, Amount]]] = {}
        self.overrun: set[tuple[CounterKey, int]] = set()

    def binding_of(self, user: str) -> Binding:
        def of(group: str) -> tuple[Quota, ...]:
            return tuple(each for each in self.quotas.values() if each.group == group)

        routes = tuple(Route(group, of(group)) for group in {"ann": "ab", "bob": "b"}[user])
        return Binding(user, of("everyone"), routes, of("watch"), self.combine)

    @rule(target=calls, user=st.sampled_from(["ann", "bob"]), demand=demands(most=9))
    def reserve(self, user: str, demand: Demand) -> object:
        who, entry_id = self.binding_of(user), str(len(self.lines))
        before, entries = dict(self.ledger.counters), dict(self.ledger.entries)
        [answer] = self.ledger.apply(reserve(entry_id, who, demand))
        if isinstance(answer, NotBooked):
            assert (self.ledger.counters, self.ledger.entries) == (before, entries)
            return multiple()
        self.lines[entry_id] = []
        held = {line.key: line.amount for line in answer.entry.lines}
        assert len(held) == len(answer.entry.lines)
        for each in who.quotas:
            key = each.key_for(user)
            if key in held:
                self.opened(key, before.get(key))
                self.lines[entry_id].append((key, self.openings[key], held[key]))
                self.note_limits(each, key)
        return entry_id

    def opened(self, key: CounterKey, before: Counter | None) -> None:
        if before is None or not before.is_open or before.window.resets_at <= self.ledger.now:
            self.openings[key] = self.openings.get(key, 0) + 1

    def note_limits(self, each: Quota, key: CounterKey) -> None:
        if each.enforce == "exact":
            highest = self.highest.setdefault((key, self.openings[key]), {})
            for limit in each.limits:
                highest[limit.measure] = max(highest.get(limit.measure, 0), limit.maximum)

    @rule(entry_id=calls, user=st.sampled_from(["ann", "bob"]), demand=demands(most=9))
    def repeat(self, entry_id: str, user: str, demand: Demand) -> None:
        self.changes_nothing(reserve(entry_id, self.binding_of(user), demand))

    @rule(entry_id=calls, part=st.integers(0, 100), whole=st.booleans(), at_least=st.booleans())
    def settle(self, entry_id: str, part: int, whole: bool, at_least: bool) -> None:
        """Within its hold."""
        hold = self.ledger.entries[entry_id].hold
        tokens = Tokens(hold.input * (100 - part) // 100, hold.output if whole else hold.output * part // 100)
        self.end(Settle(entry_id, (AtLeast if at_least else Exactly)(tokens), "complete"))

    @rule(entry_id=calls, tokens=st.builds(Tokens, st.integers(0, 99), st.integers(0, 99)))
    def settle_anyhow(self, entry_id: str, tokens: Tokens) -> None:
        """Possibly above its hold: the upstream charged what the request didn't show."""
        hold = self.ledger.entries[entry_id].hold
        if tokens.input > hold.input or tokens.output > hold.output:
            self.overrun |= {(key, opening) for key, opening, _ in self.lines[entry_id]}
        self.end(Settle(entry_id, Exactly(tokens), "complete"))

    @rule(entry_id=calls, requests=st.sampled_from([0, 1]))
    def settle_unspent(self, entry_id: str, requests: int) -> None:
        self.end(Settle(entry_id, Unspent(requests), "rejected"))

    @rule(entry_id=calls)
    def release(self, entry_id: str) -> None:
        self.end(Release(entry_id))

    @rule(entry_id=calls)
    def expire(self, entry_id: str) -> None:
        self.end(Expire(entry_id))

    def end(self, act: Settle | Release | Expire) -> None:
        entry = self.ledger.entries[act.id]
        comes_back = entry.state == "expired" and isinstance(act, Settle)
        if entry.state != "open" and not comes_back:
            self.changes_nothing(act)
            return
        [answer] = self.ledger.apply(act)
        assert answer.entry == self.ledger.entries[act.id]
        states = {Settle: "settled", Release: "released", Expire: "expired"}
        assert (answer.entry.state, answer.entry.ended_at) == (states[type(act)], self.ledger.now)

    def changes_nothing(self, act: Act) -> None:
        before = (dict(self.ledger.counters), dict(self.ledger.entries))
        [answer] = self.ledger.apply(act)
        assert isinstance(answer, Booked)
        assert answer.entry == self.ledger.entries[act.id]
        assert (self.ledger.counters, self.ledger.entries) == before

    @rule(step=st.sampled_from([1, HOUR, DAY]))
    def later(self, step: int) -> None:
        self.ledger.now += step

    @rule(step=st.sampled_from([1, HOUR, DAY]))
    def clock_jumps_back(self, step: int) -> None:
        self.ledger.now -= step

    @rule(data=st.data(), maximum=st.integers(0, 80))
    def new_limit(self, data: st.DataObject, maximum: int) -> None:
        each = self.quotas[data.draw(st.sampled_from(sorted(self.quotas)))]
        first, *rest = each.limits
        self.quotas[each.id] = replace(each, limits=(replace(first, maximum=maximum), *rest))

    @rule(data=st.data(), per=st.sampled_from(PERS))
    def new_window(self, data: st.DataObject, per: str) -> None:
        each = self.quotas[data.draw(st.sampled_from(sorted(self.quotas)))]
        self.quotas[each.id] = replace(each, per=quota("x/y", per=per).per)

    @invariant()
    def counters_are_the_sums_of_the_entries(self) -> None:
        """Held: what the open calls of this window hold. Used: what its ended calls are charged. None negative."""
        for key, counter in getattr(self, "ledger", Ledger(binding())).counters.items():
            used, held = NOTHING, NOTHING
            for entry_id, lines in self.lines.items():
                for line_key, opening, share in lines:
                    if (line_key, opening) == (key, self.openings[key]):
                        entry = self.ledger.entries[entry_id]
                        held += share if entry.state == "open" else NOTHING
                        used += charge_of(entry.usage) if entry.usage else NOTHING
            assert (counter.used, counter.held) == (used, held)
            assert min(used.input, used.output, used.requests, held.input, held.output, held.requests) >= 0

    @invariant()
    def no_exact_quota_is_over_its_limit(self) -> None:
        """Promise 1: as long as no call used more than it held, whatever else happened."""
        for (key, opening), highest in getattr(self, "highest", {}).items():
            if opening == self.openings[key] and (key, opening) not in self.overrun:
                counter = self.ledger.counters[key]
                for measure, maximum in highest.items():
                    if measure != "output_tokens" or counter.used.output or counter.held.output:
                        assert counter.used.of(measure) <= maximum


Histories.TestCase.settings = settings(max_examples=120, stateful_step_count=50)
TestHistories = Histories.TestCase
