"""What the five operations do to counters and entries, in scenarios with numbers.

The clock starts on 24 November 2026 at noon, UTC.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ledger.book import (
    Accepted,
    Book,
    Expire,
    Extend,
    Operation,
    Refused,
    Release,
    Reply,
    Restore,
    Settle,
    Unknown,
    split_charge,
)
from proxy.ledger.entry import CallLabels, Entry, HeldAmount
from proxy.policy.admission import NeedsCount, NotAdmitted, Verdict, decide
from proxy.policy.amounts import NO_AMOUNT, TOKENS_MAX, Amount, AtLeast, Tokens, Unspent
from proxy.policy.binding import Binding
from proxy.policy.quota import Quota
from proxy.policy.windows import Window
from tests.builders import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    amount,
    binding,
    call,
    counters,
    estimated,
    exactly,
    extend,
    grant,
    group_quotas,
    instant,
    make_requests_concurrent,
    quota,
    reserve,
)


class InMemoryLedger:
    """Counters and entries in memory. A batch is a `Book`; only what the book says it changed is written back."""

    def __init__(self, who: Binding, now: int = NOON, *, used: Mapping[str, Amount | int] | None = None) -> None:
        self.counters = counters(who, used=used, opened=now)
        self.entries: dict[str, Entry] = {}
        self.now = now

    def apply(self, *operations: Operation) -> list[Reply]:
        book = Book(dict(self.counters), dict(self.entries), self.now)
        replies = [book.apply(operation) for operation in operations]
        self.counters |= {key: book.counters[key] for key in book.counters_changed}
        self.entries |= {entry_id: book.entries[entry_id] for entry_id in book.entries_changed}
        assert book.counters == self.counters
        assert book.entries == self.entries
        return replies

    def levels(self, each: Quota, user: str = "ann") -> tuple[Amount, Amount]:
        """What is used and what is held of a quota."""
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
        pytest.param([], "open", None, None, NO_AMOUNT, id="in flight"),
        pytest.param([SETTLE], "settled", exactly(90, 60), "complete", Amount(90, 60, 1), id="the rest is freed"),
        pytest.param(
            [SETTLE_MORE],
            "settled",
            exactly(900, 600),
            "complete",
            Amount(900, 600, 1),
            id="more than its hold: in full",
        ),
        pytest.param(
            [SETTLE_AT_LEAST], "settled", AtLeast(Tokens(90, 20)), "client_left", Amount(90, 20, 1), id="client left"
        ),
        pytest.param([SETTLE_ZERO], "settled", exactly(0, 0), "complete", Amount(0, 0, 1), id="an explicit zero"),
        pytest.param(
            [SETTLE_REJECTED], "settled", BAD_REQUEST, "rejected", Amount(0, 0, 1), id="4xx: one request, no tokens"
        ),
        pytest.param([RELEASE], "released", None, "upstream_failed", NO_AMOUNT, id="5xx: nothing"),
        pytest.param([EXPIRE], "expired", LOST, "lost", Amount(100, 400, 1), id="the process died: its hold"),
        # an entry ends once
        pytest.param(
            [SETTLE, SETTLE_MORE], "settled", exactly(90, 60), "complete", Amount(90, 60, 1), id="settle twice"
        ),
        pytest.param(
            [SETTLE, RELEASE], "settled", exactly(90, 60), "complete", Amount(90, 60, 1), id="settle, release"
        ),
        pytest.param(
            [SETTLE, EXPIRE], "settled", exactly(90, 60), "complete", Amount(90, 60, 1), id="settle, expire"
        ),
        pytest.param([RELEASE, SETTLE], "released", None, "upstream_failed", NO_AMOUNT, id="release, settle"),
        pytest.param([RELEASE, RELEASE], "released", None, "upstream_failed", NO_AMOUNT, id="release twice"),
        pytest.param([RELEASE, EXPIRE], "released", None, "upstream_failed", NO_AMOUNT, id="release, expire"),
        pytest.param([EXPIRE, EXPIRE], "expired", LOST, "lost", Amount(100, 400, 1), id="expire twice"),
        pytest.param([EXPIRE, RELEASE], "expired", LOST, "lost", Amount(100, 400, 1), id="expire, release"),
        # except that an expired call may be settled
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
            id="expire, settle: corrected once",
        ),
    ],
)
@pytest.mark.parametrize("batches", ["one", "many"])
def test_an_entry_ends_once(operations, state, usage, outcome, used, batches):
    """The first end counts, whatever is repeated or comes late, in one batch or in several. Nothing stays held."""
    ledger = InMemoryLedger(ANN)
    if batches == "one":
        [*_, last] = ledger.apply(reserve("1", ANN, CALL), *operations)
    else:
        [last] = [ledger.apply(operation) for operation in (reserve("1", ANN, CALL), *operations)][-1]
    entry = ledger.entries["1"]
    assert (entry.state, entry.usage, entry.outcome) == (state, usage, outcome)
    assert ledger.levels(DAILY) == (used, NO_AMOUNT if operations else HELD)
    freed = set(ledger.counters) if len(operations) == 1 else set()
    assert last == Accepted(entry, ledger.counters, freed=frozenset(freed))
    assert entry.ended_at == (NOON if operations else None)


def test_a_reserve_makes_an_entry():
    """The entry says who called which model, when, through which group, and what the call holds of which counter."""
    ledger = InMemoryLedger(ANN)
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


def test_an_end_changes_only_the_fields_of_the_end():
    """Who called, through which group and when it was reserved stay the same."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    before = ledger.entries["1"]
    ledger.now += HOUR
    ledger.apply(SETTLE)
    ended = {"state": "settled", "ended_at": NOON + HOUR, "usage": exactly(90, 60), "outcome": "complete"}
    assert ledger.entries["1"] == replace(before, **ended)


@pytest.mark.parametrize("end", [Settle("1", exactly(100, 50), "complete", "spare"), Release("1", upstream="spare")])
def test_an_end_may_name_another_upstream(end):
    """If another upstream answered than the entry names. An end that names none, and an Expire, change nothing."""
    who = binding([quota("staff/daily", tokens=1000)])
    for operation, upstream in ((end, "spare"), (replace(end, upstream=None), "openai"), (Expire("1"), "openai")):
        book = Book({}, {}, NOON)
        book.apply(reserve("1", who, call(100, 400)))
        ended = book.apply(operation)
        assert isinstance(ended, Accepted)
        assert ended.entry.labels == CallLabels("ann", "gpt-4o-mini", "chat", upstream)


def test_an_entry_names_the_quotas_that_capped_or_would_have_refused_the_call():
    """By their ids, because a quota may be removed later."""
    shadow = quota("staff/new", tokens=10, enforce="shadow")
    who = binding([DAILY], shadows=[shadow])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, call(100, 4000, 1)))
    entry = ledger.entries["1"]
    assert (entry.capped_by, entry.would_refuse) == (DAILY.id, (shadow.id,))
    assert (entry.hold, entry.maximum) == (Amount(100, 900, 1), 900)
    assert shadow.key_for("ann") not in ledger.counters


@pytest.mark.parametrize(
    "operation",
    [Settle("2", exactly(1), "complete"), Release("2"), Expire("2"), extend("2", ANN, 400)],
    ids=lambda operation: type(operation),
)
def test_an_operation_on_an_unknown_call_changes_nothing(operation):
    """The call was never reserved, or was deleted since."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    before = (dict(ledger.counters), dict(ledger.entries))
    assert ledger.apply(operation) == [Unknown("2")]
    assert (ledger.counters, ledger.entries) == before


# ------------------------------------------------------------------------------------------------------------ reserve


def test_a_refused_call_changes_nothing():
    """No charge, no request, no new window and no entry. The reply has the counters."""
    never_used = quota("staff/6h", tokens=5000, per="6h")
    who = binding([DAILY, never_used])
    book = Book(counters(who, used={DAILY.id: 600}), {}, NOON)
    before = dict(book.counters)
    reply = book.apply(reserve("1", who, call(401)))
    assert isinstance(reply, Refused)
    assert reply.decision.verdict is Verdict.EXHAUSTED
    assert reply.counters == book.counters == before
    assert (book.entries, book.entries_changed, book.counters_changed) == ({}, {}, {})


def test_a_call_whose_input_must_be_counted_first_changes_nothing():
    """It is reserved again with the same id when its tokens are counted."""
    ledger = InMemoryLedger(ANN)
    operation = reserve("1", ANN, CALL)
    assert ledger.apply(replace(operation, demand=estimated(operation.demand))) == [NeedsCount()]
    assert (ledger.counters, ledger.entries) == ({}, {})
    [reply] = ledger.apply(operation)
    assert isinstance(reply, Accepted)


def test_a_stream_is_reserved_with_its_initial_hold():
    """The entry has the maximum of the answer; None if it is not known."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, STREAM), reserve("2", ANN, replace(STREAM, output_maximum=400, is_unbounded=True)))
    known, unknown = ledger.entries["1"], ledger.entries["2"]
    assert known.hold == unknown.hold == Amount(100, 100, 1)
    assert (known.maximum, unknown.maximum) == (900, None)
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(200, 200, 2))


def test_a_reserve_is_applied_as_a_whole_or_not_at_all():
    """T65: if one quota refuses, nothing is held of the others."""
    who = binding(
        [DAILY, quota("staff/hourly", tokens=100, per="hour")], always=[quota("everyone/calls", requests=9)]
    )
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, call(101)))
    assert not ledger.counters


@pytest.mark.parametrize(
    "ending", [[], [SETTLE], [RELEASE], [EXPIRE]], ids=["open", "settled", "released", "expired"]
)
def test_a_repeated_reserve_changes_nothing(ending):
    """The connection may have broken before the first one was answered. The reply has the entry as it is."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL), *ending)
    before = (dict(ledger.counters), dict(ledger.entries))
    for again in (reserve("1", ANN, CALL), reserve("1", ANN, call(1001))):
        assert ledger.apply(again) == [Accepted(ledger.entries["1"], ledger.counters)]
    assert (ledger.counters, ledger.entries) == before


def test_a_refused_reserve_may_be_repeated():
    """So a busy call can wait and ask again with the same id."""
    ledger = InMemoryLedger(ANN)
    full = reserve("1", ANN, call(600, 400))
    [_, refused] = ledger.apply(full, reserve("2", ANN, CALL))
    assert isinstance(refused, Refused)
    assert refused.decision.verdict is Verdict.BUSY
    [_, admitted] = ledger.apply(SETTLE, reserve("2", ANN, CALL))
    assert isinstance(admitted, Accepted)


def test_operations_of_a_batch_see_what_those_before_them_did():
    """Tokens that one call frees, the next one may hold; tokens that one call holds, the next one may not."""
    ledger = InMemoryLedger(ANN)
    replies = ledger.apply(
        reserve("1", ANN, call(600, 400)),
        reserve("2", ANN, CALL),
        SETTLE,
        reserve("3", ANN, CALL),
        reserve("4", ANN, CALL),
    )
    assert [type(reply) for reply in replies] == [Accepted, Refused, Accepted, Accepted, Refused]
    assert ledger.levels(DAILY) == (Amount(90, 60, 1), HELD)


@pytest.mark.parametrize("each", [DAILY, SIX_HOURS], ids=["calendar", "duration"])
def test_of_64_calls_in_one_batch_as_many_are_admitted_as_fit(each):
    """Also if they are the first ever. Each has 60 + 40 tokens, so 10 fit into 1000."""
    who = binding([each])
    ledger = InMemoryLedger(who)
    replies = ledger.apply(*(reserve(str(number), who, call(60, 40)) for number in range(64)))
    assert [isinstance(reply, Accepted) for reply in replies] == [True] * 10 + [False] * 54
    ledger.apply(*(Settle(str(number), exactly(60, 40), "complete") for number in range(64)))
    assert ledger.levels(each) == (Amount(600, 400, 10), NO_AMOUNT)


def test_a_call_that_no_quota_binds_has_an_entry_too():
    """With `unmatched: allow`, or in an unlimited group. Its usage is in the entry, but in no counter."""
    who = binding(group_quotas("admins"))
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, call(10**6, 10**6)), SETTLE)
    entry = ledger.entries["1"]
    assert (entry.admitted_via, entry.held_amounts, entry.usage) == ("admins", (), exactly(90, 60))
    assert not ledger.counters


def test_members_have_their_own_counters_and_one_counter_of_a_shared_quota():
    """What bob holds of the shared quota is missing for ann. What he holds of his own counter is not."""
    own, shared = quota("team/own", tokens=600), quota("team/pot", tokens=1000, shared=True)
    ann, bob = binding([own, shared], user="ann"), binding([own, shared], user="bob")
    ledger = InMemoryLedger(ann)
    replies = ledger.apply(reserve("1", ann, call(500)), reserve("2", bob, call(500)), reserve("3", ann, call(1)))
    assert [type(reply) for reply in replies] == [Accepted, Accepted, Refused]
    ledger.apply(Settle("1", exactly(500), "complete"), Release("2"))
    assert ledger.levels(own, "ann") == (amount(500), NO_AMOUNT)
    assert ledger.levels(own, "bob") == (NO_AMOUNT, NO_AMOUNT)
    assert ledger.levels(shared) == (amount(500), NO_AMOUNT)


def test_an_end_charges_only_quotas_of_which_the_call_held_something():
    """Not a quota of another group that could not carry the call, and not a shared quota of another group."""
    small, shared = quota("lab/small", tokens=499), quota("team/pot", tokens=5000, shared=True)
    who = binding([DAILY], [small], [shared])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, CALL), SETTLE)
    assert ledger.counters.keys() == {DAILY.key_for("ann")}


def test_a_call_is_charged_to_the_group_that_admitted_it():
    """Also if its user was moved to another group meanwhile: the held amounts decide, not the policy."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    elsewhere = binding([quota("team/daily", tokens=1000)])
    ledger.apply(SETTLE, reserve("2", elsewhere, CALL))
    assert ledger.levels(DAILY) == (Amount(90, 60, 1), NO_AMOUNT)


def test_a_quota_with_enforce_after_is_charged_at_the_end():
    """A call holds one request of it and no tokens, and may end above its limit. Then the next call is refused."""
    after = quota("staff/classic", tokens=1000, per="6h", enforce="after")
    who = binding([after])
    ledger = InMemoryLedger(who)
    first, second = reserve("1", who, call(900, 900)), reserve("2", who, call(900, 900))
    ledger.apply(first, second)
    assert ledger.levels(after) == (NO_AMOUNT, Amount(requests=2))
    ledger.now += HOUR
    ledger.apply(Settle("1", exactly(900, 300), "complete"))
    assert ledger.levels(after) == (Amount(900, 300, 1), Amount(requests=1))
    [refused] = ledger.apply(reserve("3", who, call(1)))
    assert isinstance(refused, Refused)
    assert refused.decision.admissible_at == NOON + 6 * HOUR


def test_a_quota_with_enforce_shadow_is_charged_like_any_other():
    """Its counter shows what it would have counted."""
    shadow = quota("staff/new", tokens=600, enforce="shadow")
    who = binding([DAILY], shadows=[shadow])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, CALL), SETTLE)
    assert ledger.levels(shadow) == ledger.levels(DAILY) == (Amount(90, 60, 1), NO_AMOUNT)


# ------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("end", [SETTLE, RELEASE, EXPIRE], ids=["settle", "release", "expire"])
@pytest.mark.parametrize("each", [DAILY, SIX_HOURS], ids=["calendar", "duration"])
def test_a_call_belongs_to_the_window_in_which_it_was_reserved(each, end):
    """A call begins before midnight and ends after it. The counter, which another call has moved on, is unchanged."""
    who = binding([each])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, CALL))
    ledger.now += DAY
    ledger.apply(reserve("2", who, call(30)), end)
    assert ledger.levels(each) == (NO_AMOUNT, Amount(30, 0, 1))
    assert ledger.entries["1"].state != "open"


@pytest.mark.parametrize("each", [DAILY, SIX_HOURS], ids=["calendar", "duration"])
def test_a_settle_after_an_expire_does_not_change_the_next_window(each):
    """The correction belongs to the window that has closed."""
    who = binding([each])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, CALL), EXPIRE)
    ledger.now += DAY
    ledger.apply(reserve("2", who, call(30)), SETTLE)
    assert ledger.levels(each) == (NO_AMOUNT, Amount(30, 0, 1))


@pytest.mark.parametrize("end", [RELEASE, SETTLE, EXPIRE], ids=["release", "settle", "expire"])
@pytest.mark.parametrize("per", ["day", "6h"])
def test_a_concurrent_quantity_is_held_until_the_call_ends_in_whichever_window(per, end, monkeypatch):
    """With a limit of two calls at once, a call of the window before takes one of the two places."""
    make_requests_concurrent(monkeypatch)
    each = quota("staff/calls", requests=2, per=per)
    who = binding([each])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, CALL))
    ledger.now += DAY
    [_, refused] = ledger.apply(reserve("2", who, call(30)), reserve("3", who, call(40)))
    assert isinstance(refused, Refused)
    assert refused.decision.verdict is Verdict.BUSY
    assert ledger.levels(each) == (NO_AMOUNT, Amount(30, 0, 2))
    [ended, admitted] = ledger.apply(end, reserve("3", who, call(40)))
    assert ended.freed == {each.key_for("ann")}
    assert isinstance(admitted, Accepted)
    assert ledger.levels(each) == (NO_AMOUNT, Amount(70, 0, 2))


def test_a_settle_is_charged_to_a_window_that_has_ended_if_no_other_has_opened():
    """No call was reserved since, so the counter still has that window. The next call opens a new one."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    ledger.now += DAY
    ledger.apply(SETTLE)
    assert ledger.levels(DAILY) == (Amount(90, 60, 1), NO_AMOUNT)
    [reply] = ledger.apply(reserve("2", ANN, call(1000)))
    assert isinstance(reply, Accepted)


def test_a_settle_whose_counter_was_deleted_writes_the_entry_only():
    """An operator may have done that."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    ledger.counters.clear()
    ledger.apply(SETTLE)
    assert not ledger.counters
    assert ledger.entries["1"].usage == exactly(90, 60)


@pytest.mark.parametrize(
    ("end", "opened_at"),
    [
        pytest.param(RELEASE, NOON + HOUR, id="nothing was generated: the window is not open"),
        pytest.param(
            Settle("1", Unspent(), "upstream_failed"), NOON + HOUR, id="nothing was charged: the window is not open"
        ),
        pytest.param(SETTLE_REJECTED, NOON, id="one request was charged: the window is open"),
        pytest.param(SETTLE, NOON, id="tokens were charged: the window is open"),
    ],
)
def test_a_window_in_which_nothing_was_used_is_not_open(end, opened_at):
    """The next call opens a new window, which lasts all of its six hours."""
    who = binding([SIX_HOURS])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, CALL), end)
    ledger.now += HOUR
    ledger.apply(reserve("2", who, call(30)))
    counter = ledger.counters[SIX_HOURS.key_for("ann")]
    assert counter.window == Window(opened_at, opened_at + 6 * HOUR)


def of_rule(per: str, *, zone: str = "UTC") -> Binding:
    """Ann with DAILY in windows of another rule."""
    return binding([replace(DAILY, per=quota("x/y", per=per, zone=zone).per)])


def end_of(ledger: InMemoryLedger) -> int:
    """When the stored window of DAILY ends."""
    return ledger.counters[DAILY.key_for("ann")].window.resets_at


@pytest.mark.parametrize("used", [1000, 0], ids=["refused", "admitted"])
def test_after_a_change_of_per_the_open_window_ends_no_later_than_one_that_opens_at_the_first_call(used):
    """A year became six hours. The first call stores the end, also if it is refused, and the end stays."""
    ledger = InMemoryLedger(of_rule("year"), used={DAILY.id: used or 1})
    for hours in (1, 2, 5):
        ledger.now = NOON + hours * HOUR
        [reply] = ledger.apply(reserve(str(hours), of_rule("6h"), call(1)))
        assert isinstance(reply, Refused) is bool(used)
        assert not isinstance(reply, Refused) or reply.decision.admissible_at == NOON + 7 * HOUR
        assert end_of(ledger) == NOON + 7 * HOUR
    ledger.now = NOON + 7 * HOUR
    [reply] = ledger.apply(reserve("7", of_rule("6h"), call(1)))
    assert isinstance(reply, Accepted)
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(1, 0, 1))


def test_a_longer_per_changes_nothing_for_the_open_window():
    """Its end was announced. The next window has the new length."""
    ledger = InMemoryLedger(of_rule("hour"), used={DAILY.id: 1000})
    [refused] = ledger.apply(reserve("1", of_rule("year"), call(1)))
    assert isinstance(refused, Refused)
    assert refused.decision.admissible_at == end_of(ledger) == NOON + HOUR
    ledger.now = NOON + HOUR
    ledger.apply(reserve("2", of_rule("year"), call(1)))
    assert end_of(ledger) == instant("2027-01-01 00:00")


def test_a_window_that_a_later_rule_opened_is_not_shortened_by_a_call_of_an_earlier_one():
    """A minute became a year. A stream of the minute grows after another call has opened the year."""
    minute, year = of_rule("minute"), of_rule("year")
    ledger = InMemoryLedger(minute)
    ledger.apply(reserve("1", minute, STREAM))
    ledger.now += 2 * MINUTE
    ledger.apply(reserve("2", year, call(100)))
    ledger.apply(extend("1", minute, 300))
    assert end_of(ledger) == instant("2027-01-01 00:00")
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(100, 200, 1))


def test_a_call_of_an_earlier_rule_keeps_what_it_holds_when_its_window_is_shortened():
    """A day became a minute while a stream is in flight. It is settled into the window in which it was reserved."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    ledger.now += HOUR
    ledger.apply(reserve("2", of_rule("minute"), call(500)))
    assert end_of(ledger) == NOON + HOUR + MINUTE
    ledger.apply(SETTLE)
    assert ledger.levels(DAILY) == (Amount(90, 60, 1), Amount(500, 0, 1))
    ledger.now += MINUTE
    ledger.apply(reserve("3", of_rule("minute"), call(1000)), Settle("2", exactly(500), "complete"))
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(1000, 0, 1))


def test_a_grant_that_ends_before_the_shortened_end_does_not_delay_the_reset():
    """The reset that is told is the stored one, and the call is admitted at it."""
    quota_of_minute = of_rule("minute")
    raised = replace(quota_of_minute, grants={DAILY.id: (grant(DAILY.id, tokens=5, until=NOON + 1),)})
    ledger = InMemoryLedger(of_rule("year"), used={DAILY.id: 1005})
    refused = decide(call(1), raised, ledger.counters, NOON)
    assert isinstance(refused, NotAdmitted)
    assert refused.admissible_at == NOON + MINUTE


RULES = st.sampled_from(
    [
        *((per, "UTC") for per in ("90s", "6h", "48h", "minute", "hour", "day", "week", "month", "year")),
        *((per, zone) for per in ("hour", "day") for zone in ("Asia/Kathmandu", "America/New_York", "Pacific/Apia")),
    ]
)
# How long until the next call, and whether the rule is changed before it.
STEPS = st.lists(
    st.tuples(st.sampled_from([0, 1, MINUTE, HOUR, 7 * HOUR, DAY]), st.none() | RULES), min_size=1, max_size=12
)


@given(rule=RULES, steps=STEPS, maximum=st.sampled_from([1000, 0]))
def test_an_end_is_computed_once_for_each_rule_and_told_truly(rule, steps, maximum):
    """The window's end, kept beside the ledger: computed at its opening, and once at the first call of each new rule.

    With a limit of 0 all calls are refused, and the window is that of a call that was admitted before.
    """

    def of(rule: tuple[str, str]) -> Binding:
        per, zone = rule
        return binding([replace(quota("staff/daily", tokens=maximum), per=quota("x/y", per=per, zone=zone).per)])

    def end(rule: tuple[str, str]) -> int:
        return of(rule).quotas[0].per.opening(ledger.now).resets_at

    ledger = InMemoryLedger(of(rule), used={DAILY.id: 1})
    expected = end(rule)
    for number, (step, changed) in enumerate(steps):
        ledger.now += step
        is_new_rule, rule = changed is not None and changed != rule, changed or rule
        if ledger.now >= expected:
            if not maximum:
                return
            expected = end(rule)
        elif is_new_rule:
            expected = min(expected, end(rule))
        ledger.apply(reserve(str(number), of(rule), call(1)))
        assert end_of(ledger) == expected


def test_a_changed_limit_keeps_the_usage():
    """T69: the limit is lowered below the usage and then raised: the counter stays the same."""
    ledger = InMemoryLedger(ANN, used={DAILY.id: 500})
    [lowered, raised] = [binding([quota("staff/daily", tokens=maximum)]) for maximum in (400, 600)]
    [refused, admitted] = ledger.apply(reserve("1", lowered, call(9)), reserve("2", raised, call(9)))
    assert isinstance(refused, Refused)
    assert isinstance(admitted, Accepted)
    assert ledger.levels(DAILY) == (amount(500), Amount(9, 0, 1))


def test_two_windows_that_begin_at_the_same_instant_are_told_apart():
    """`per` changes from hour to day while a call of the hour 00:00 is in flight. The day begins at 00:00 too.

    If the two were taken for one, the end of that call would free what others hold in the day.
    """
    hourly = quota("staff/daily", tokens=500, per="hour")
    daily = binding([quota("staff/daily", tokens=500, per="day")])
    ledger = InMemoryLedger(ANN, instant("2026-11-24 00:30"))
    ledger.apply(reserve("1", binding([hourly]), CALL))
    ledger.now = instant("2026-11-24 01:00")
    ledger.apply(reserve("2", daily, CALL), RELEASE)
    assert ledger.levels(hourly) == (NO_AMOUNT, HELD)
    [full] = ledger.apply(reserve("3", daily, CALL))
    assert isinstance(full, Refused)


def test_a_clock_that_jumps_does_not_free_what_other_calls_hold():
    """The clock goes a day ahead and back while a call is in flight. Nothing is negative and no limit is exceeded."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    ledger.now = NOON + DAY
    ledger.apply(reserve("2", ANN, CALL), Release("2"))
    ledger.now = NOON
    ledger.apply(reserve("3", ANN, call(600, 400)), RELEASE)
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(600, 400, 1))


@pytest.mark.parametrize("is_full", [True, False], ids=["refused", "admitted"])
def test_a_window_that_a_clock_ahead_of_time_opened_ends_at_the_end_that_was_told_first(is_full):
    """A clock that was a day ahead opened six hours. They end six hours after the first call at the right time."""
    who = binding([SIX_HOURS])
    ledger = InMemoryLedger(who, NOON + DAY, used={SIX_HOURS.id: 1000 if is_full else 0})
    for hours in (0, 1, 5):
        ledger.now = NOON + hours * HOUR
        [reply] = ledger.apply(reserve(str(hours), who, call(1)))
        assert isinstance(reply, Refused) is is_full
        assert reply.counters[SIX_HOURS.key_for("ann")].window == Window(NOON + DAY, NOON + 6 * HOUR)
    ledger.now = NOON + 6 * HOUR
    [reply] = ledger.apply(reserve("6", who, call(1)))
    assert isinstance(reply, Accepted)
    assert ledger.levels(SIX_HOURS) == (NO_AMOUNT, Amount(1, 0, 1))


def test_a_refused_call_opens_no_window_after_the_clock_was_ahead():
    """A window that has ended stays as it is. A call that is admitted later opens one of six whole hours."""
    small = quota("staff/6h", tokens=9, per="6h")
    who = binding([small])
    for used, hours in ((9, 7), (0, 0)):
        ledger = InMemoryLedger(who, NOON + DAY, used={small.id: used})
        ledger.now = NOON
        ledger.apply(reserve("1", who, call(10)))
        before = dict(ledger.counters)
        ledger.now = NOON + hours * HOUR
        ledger.apply(reserve("1", who, call(10)))
        assert ledger.counters == before
        ledger.now += HOUR
        ledger.apply(reserve("2", who, call(9)))
        assert ledger.counters[small.key_for("ann")].window.resets_at == ledger.now + 6 * HOUR


# ------------------------------------------------------------------------------------------------------------- extend


def held_by(ledger: InMemoryLedger, entry_id: str = "1") -> list[tuple[str, int, Amount]]:
    """The held amounts of an entry, in short: quota, opening of the window, amount."""
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
        pytest.param([extend("1", ANN, 400)], Amount(100, 400, 1), "ALLOW", id="raised"),
        pytest.param([extend("1", ANN, 900)], Amount(100, 900, 1), "ALLOW", id="to the last token"),
        pytest.param([extend("1", ANN, 901)], Amount(100, 900, 1), "ALLOW", id="as far as there is room"),
        pytest.param([extend("1", ANN, 1200, least=901)], Amount(100, 900, 1), "EXHAUSTED", id="less than the least"),
        pytest.param([extend("1", ANN, 1200, least=900)], Amount(100, 900, 1), "ALLOW", id="exactly the least"),
        pytest.param([extend("1", ANN, 50)], Amount(100, 100, 1), "ALLOW", id="never lowered"),
        pytest.param([extend("1", ANN, 400)] * 2, Amount(100, 400, 1), "ALLOW", id="repeated"),
        pytest.param(
            [extend("1", ANN, 400), extend("1", ANN, 600), extend("1", ANN, 400)],
            Amount(100, 600, 1),
            "ALLOW",
            id="repeated late",
        ),
        pytest.param([extend("1", ANN, 400, input_tokens=30)], Amount(30, 400, 1), "ALLOW", id="a smaller input"),
        pytest.param(
            [extend("1", ANN, 400, input_tokens=30)] * 2, Amount(30, 400, 1), "ALLOW", id="a smaller input twice"
        ),
        pytest.param([extend("1", ANN, 0, input_tokens=0)], Amount(0, 100, 1), "ALLOW", id="no input at all"),
        pytest.param(
            [extend("1", ANN, 0, input_tokens=101)], Amount(100, 100, 1), "ALLOW", id="a larger input changes nothing"
        ),
        pytest.param(
            [extend("1", ANN, 0, input_tokens=30), extend("1", ANN, 0, input_tokens=60)],
            Amount(30, 100, 1),
            "ALLOW",
            id="what was freed is not held again",
        ),
        pytest.param(
            [extend("1", ANN, 970, least=970, input_tokens=30)],
            Amount(30, 970, 1),
            "ALLOW",
            id="the answer may take what the input frees",
        ),
    ],
)
@pytest.mark.parametrize("batches", ["one", "many"])
def test_an_extend_raises_the_hold_to_a_total(operations, hold, verdict, batches):
    """The numbers are totals, so repeating an Extend, or an old one that comes late, changes nothing."""
    ledger = InMemoryLedger(ANN)
    for batch in [operations] if batches == "one" else [[operation] for operation in operations]:
        [*_, reply] = ledger.apply(*([] if "1" in ledger.entries else [reserve("1", ANN, STREAM)]), *batch)
    entry = ledger.entries["1"]
    assert (reply.entry, reply.counters, reply.verdict) == (entry, ledger.counters, Verdict[verdict])
    assert (entry.hold, entry.maximum, entry.state) == (hold, 900, "open")
    assert held_by(ledger) == [(DAILY.id, TODAY, hold)]
    assert ledger.levels(DAILY) == (NO_AMOUNT, hold)


@pytest.mark.parametrize(
    ("operations", "freed"),
    [
        pytest.param([extend("1", ANN_OF_TWO, 400)], [], id="a higher hold frees nothing"),
        pytest.param([extend("1", ANN_OF_TWO, 100, input_tokens=99)], [DAILY, LAB], id="a smaller input"),
        pytest.param([extend("1", ANN_OF_TWO, 100, input_tokens=99)] * 2, [], id="a smaller input twice frees once"),
        pytest.param([extend("1", ANN_OF_TWO, 501)], [LAB], id="a quota that cannot carry the increase"),
        pytest.param([extend("1", ANN_OF_TWO, 501), SETTLE], [DAILY], id="the end does not free it again"),
        pytest.param([RELEASE], [DAILY, LAB], id="released"),
        pytest.param([EXPIRE], [DAILY, LAB], id="expired"),
        pytest.param([EXPIRE, SETTLE], [], id="settled after it expired: nothing was held"),
        pytest.param([RELEASE, extend("1", ANN_OF_TWO, 100, input_tokens=0)], [], id="extend after the end"),
        pytest.param([reserve("1", ANN_OF_TWO, STREAM)], [], id="reserved twice"),
    ],
)
def test_a_reply_names_the_counters_on_which_a_hold_was_lowered(operations, freed):
    """So only the calls that wait for room on these counters ask again."""
    ledger = InMemoryLedger(ANN_OF_TWO)
    *_, reply = ledger.apply(reserve("1", ANN_OF_TWO, STREAM), *operations)
    assert reply.freed == {each.key_for("ann") for each in freed}


def test_an_extend_is_busy_while_others_hold_the_rest():
    """It gets what is available, and the rest when it asks again after they have freed it."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, STREAM), reserve("2", ANN, call(600)))
    more = extend("1", ANN, 500, least=400)
    [busy] = ledger.apply(more)
    assert (busy.verdict, busy.entry.hold) == (Verdict.BUSY, Amount(100, 300, 1))
    [_, grown] = ledger.apply(Settle("2", exactly(300), "complete"), more)
    assert (grown.verdict, grown.entry.hold) == (Verdict.ALLOW, Amount(100, 500, 1))
    assert ledger.levels(DAILY) == (amount(300), Amount(100, 500, 1))


def test_an_input_that_is_lowered_makes_room_for_tokens_but_not_for_output():
    """The limit on tokens counts both; the limit on output tokens then stops the extend."""
    each = quota("staff/daily", tokens=300, output_tokens=150)
    who = binding([each])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, STREAM))
    [grown] = ledger.apply(extend("1", who, 400, least=151, input_tokens=10))
    assert (grown.verdict, grown.entry.hold) == (Verdict.EXHAUSTED, Amount(10, 150, 1))


@pytest.mark.parametrize("end", [SETTLE, RELEASE, EXPIRE], ids=["settled", "released", "expired"])
def test_a_call_that_has_ended_is_not_extended(end):
    """The reply has the entry as it is, so a process whose call has expired learns it."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, STREAM), end)
    before = (dict(ledger.counters), dict(ledger.entries))
    [reply] = ledger.apply(extend("1", ANN, 400, input_tokens=0))
    assert reply == Accepted(ledger.entries["1"], ledger.counters)
    assert reply.entry.state != "open"
    assert (ledger.counters, ledger.entries) == before


def test_a_call_that_no_quota_binds_is_extended_without_a_held_amount():
    """Its entry has the hold."""
    who = binding(group_quotas("admins"))
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, STREAM), extend("1", who, TOKENS_MAX))
    assert (ledger.entries["1"].hold, held_by(ledger)) == (Amount(100, TOKENS_MAX, 1), [])
    assert not ledger.counters


def test_an_expired_call_is_charged_its_hold_as_it_was_extended():
    """Its client cannot have got more, because nothing passes that is not held. A late settle corrects the charge."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, STREAM), extend("1", ANN, 400, input_tokens=30), EXPIRE)
    assert ledger.entries["1"].usage == AtLeast(Tokens(30, 400))
    assert ledger.levels(DAILY) == (Amount(30, 400, 1), NO_AMOUNT)
    ledger.apply(Settle("1", exactly(30, 450), "complete"))
    assert ledger.levels(DAILY) == (Amount(30, 450, 1), NO_AMOUNT)


# -------------------------------------------------------------------------------------- extend after the window's end


@pytest.mark.parametrize(("each", "next_opening"), [(DAILY, TOMORROW), (SIX_HOURS, NOON + DAY)], ids=["day", "6h"])
def test_after_the_end_of_its_window_a_call_holds_the_increase_in_the_next(each, next_opening):
    """The increase is a second held amount, which further extends raise. The first one stays as it was."""
    who = binding([each])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, STREAM))
    first = (each.id, each.per.opening(NOON).opened_at, Amount(100, 100, 1))
    ledger.now = NOON + DAY
    for output in (300, 300, 700):
        [grown] = ledger.apply(extend("1", who, output))
        assert held_by(ledger) == [first, (each.id, next_opening, Amount(output=output - 100))]
        assert ledger.levels(each) == (NO_AMOUNT, Amount(output=output - 100))
        assert (grown.entry.hold, grown.verdict) == (Amount(100, output, 1), Verdict.ALLOW)


def test_in_the_next_window_only_what_is_held_there_counts():
    """A call holds 900 today and 300 tomorrow. Of the 1000 of tomorrow, another call may hold 700."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, call(100, 900, 800, initial_hold=800)))
    ledger.now = NOON + DAY
    ledger.apply(extend("1", ANN, 1100))
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(output=300))
    [refused, admitted] = ledger.apply(reserve("2", ANN, call(701)), reserve("3", ANN, call(700)))
    assert isinstance(refused, Refused)
    assert isinstance(admitted, Accepted)
    [stopped] = ledger.apply(extend("1", ANN, 1200, least=1101))
    assert (stopped.verdict, stopped.entry.hold.output) == (Verdict.BUSY, 1100)
    [used_up] = ledger.apply(Settle("3", exactly(700), "complete"), extend("1", ANN, 1200, least=1101))[1:]
    assert (used_up.verdict, used_up.entry.hold.output) == (Verdict.EXHAUSTED, 1100)


def test_an_increase_may_be_held_in_a_window_that_another_call_has_opened():
    """It opens no window of its own."""
    who = binding([SIX_HOURS])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, STREAM))
    ledger.now = IN_SIX_HOURS + 5
    ledger.apply(reserve("2", who, call(600)))
    ledger.now += HOUR
    ledger.apply(extend("1", who, 300))
    assert held_by(ledger)[1] == (SIX_HOURS.id, IN_SIX_HOURS + 5, Amount(output=200))
    assert ledger.levels(SIX_HOURS) == (NO_AMOUNT, Amount(600, 200, 1))


def test_an_increase_of_0_opens_no_window():
    """An extend to what the call holds already adds no held amount in the new window."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    ledger.now = NOON + DAY
    ledger.apply(extend("1", ANN, 100))
    assert held_by(ledger) == [(DAILY.id, TODAY, Amount(100, 100, 1))]
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(100, 100, 1))


def test_a_smaller_input_is_freed_in_the_window_in_which_it_was_held():
    """If that window has closed, no counter changes. The increase in the next window contains no input."""
    for later, levels in ((HOUR, (NO_AMOUNT, Amount(30, 300, 1))), (DAY, (NO_AMOUNT, Amount(output=200)))):
        ledger = InMemoryLedger(ANN)
        ledger.apply(reserve("1", ANN, STREAM))
        ledger.now += later
        ledger.apply(extend("1", ANN, 300), extend("1", ANN, 300, input_tokens=30))
        assert held_by(ledger)[0][2].input == 30
        assert ledger.levels(DAILY) == levels


TWO_WINDOWS = [("staff/daily", TODAY, Amount(100, 100, 1)), ("staff/daily", TOMORROW, Amount(output=300))]


@pytest.mark.parametrize(
    ("ends", "used"),
    [
        pytest.param([Settle("1", exactly(90, 60), "complete")], NO_AMOUNT, id="all of it in the first"),
        pytest.param([Settle("1", exactly(90, 100), "complete")], NO_AMOUNT, id="exactly what the first held"),
        pytest.param([Settle("1", exactly(90, 250), "complete")], Amount(output=150), id="the rest in the second"),
        pytest.param([Settle("1", exactly(100, 400), "complete")], Amount(output=300), id="as held"),
        pytest.param([Settle("1", exactly(150, 500), "complete")], Amount(50, 400, 0), id="more than was held"),
        pytest.param([Settle("1", BAD_REQUEST, "rejected")], NO_AMOUNT, id="the request belongs to the first"),
        pytest.param([RELEASE], NO_AMOUNT, id="released"),
        pytest.param([EXPIRE], Amount(output=300), id="expired: as held"),
        pytest.param(
            [EXPIRE, Settle("1", exactly(90, 250), "complete")], Amount(output=150), id="expired, then settled: less"
        ),
        pytest.param(
            [EXPIRE, Settle("1", exactly(90, 60), "complete")],
            NO_AMOUNT,
            id="expired, then settled: nothing in the second",
        ),
        pytest.param(
            [EXPIRE, Settle("1", exactly(150, 500), "complete")], Amount(50, 400, 0), id="expired, then settled: more"
        ),
    ],
)
def test_of_two_windows_each_is_charged_up_to_what_it_held_and_the_last_the_rest(ends, used):
    """The first has closed, so its part is only in the entry. The part of the second is charged to the counter."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    ledger.now = NOON + DAY
    ledger.apply(extend("1", ANN, 400))
    assert held_by(ledger) == TWO_WINDOWS
    ledger.apply(*ends)
    assert ledger.levels(DAILY) == (used, NO_AMOUNT)
    assert held_by(ledger) == TWO_WINDOWS


def test_a_call_may_hold_increases_in_any_number_of_windows():
    """Each window holds its increase. The last one is charged what the others did not hold."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    for days in (1, 2, 3):
        ledger.now = NOON + days * DAY
        ledger.apply(extend("1", ANN, 100 + 200 * days))
    assert [amount for _, _, amount in held_by(ledger)] == [Amount(100, 100, 1)] + [Amount(output=200)] * 3
    ledger.apply(Settle("1", exactly(100, 620), "complete"))
    assert ledger.levels(DAILY) == (Amount(output=120), NO_AMOUNT)


@pytest.mark.parametrize(
    ("amounts", "charge", "parts"),
    [
        pytest.param([], Amount(9, 9, 1), [], id="no held amount"),
        pytest.param([("a", Amount(1, 1, 1))], Amount(9, 9, 1), [Amount(9, 9, 1)], id="one: all"),
        pytest.param(
            [("a", Amount(1, 1, 1)), ("b", Amount(1, 1, 1))],
            Amount(9, 9, 1),
            [Amount(9, 9, 1)] * 2,
            id="one of each counter: all",
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
            [("a", Amount(5, 5, 1)), ("a", Amount(0, 5))],
            Amount(0, 0, 1),
            [Amount(0, 0, 1), NO_AMOUNT],
            id="a request",
        ),
        pytest.param([("a", Amount(5, 5, 1)), ("a", Amount(0, 5))], NO_AMOUNT, [NO_AMOUNT, NO_AMOUNT], id="nothing"),
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
            id="one that holds a request only: all",
        ),
    ],
)
def test_a_charge_is_split_among_the_windows_of_each_counter(amounts, charge, parts):
    """Each counter is charged all of it: each of its windows up to what it held, in order, and the last the rest."""
    held_amounts = tuple(
        HeldAmount(("user:ann", name), opened_at, amount) for opened_at, (name, amount) in enumerate(amounts)
    )
    assert split_charge(held_amounts, charge) == parts


# ----------------------------------------------------------------------------------------- other quotas, other clocks


def test_a_quota_of_another_group_that_cannot_carry_the_increase_is_freed():
    """Tokens held in it are freed, it is charged nothing, and later extends do not hold any of it."""
    ledger = InMemoryLedger(ANN_OF_TWO)
    ledger.apply(reserve("1", ANN_OF_TWO, STREAM), extend("1", ANN_OF_TWO, 500))
    assert ledger.levels(LAB) == (NO_AMOUNT, Amount(100, 500, 1))
    [grown] = ledger.apply(extend("1", ANN_OF_TWO, 501))
    assert held_by(ledger) == [(DAILY.id, TODAY, Amount(100, 501, 1))]
    assert ledger.levels(LAB) == (NO_AMOUNT, NO_AMOUNT)
    assert grown.counters.keys() == {DAILY.key_for("ann")}
    ledger.apply(extend("1", ANN_OF_TWO, 502), Settle("1", exactly(90, 502), "complete"))
    assert ledger.levels(LAB) == (NO_AMOUNT, NO_AMOUNT)
    assert ledger.levels(DAILY) == (Amount(90, 502, 1), NO_AMOUNT)


def test_a_quota_that_is_freed_in_the_next_window_is_freed_in_the_first_too():
    """A call is charged to a quota as a whole or not at all. Tokens that other calls hold in it stay held."""
    ledger = InMemoryLedger(ANN_OF_TWO)
    ledger.apply(reserve("1", ANN_OF_TWO, STREAM))
    ledger.now = NOON + DAY
    ledger.apply(reserve("2", ANN_OF_TWO, call(1, 99)), extend("1", ANN_OF_TWO, 500), extend("1", ANN_OF_TWO, 502))
    assert {quota_id for quota_id, _, _ in held_by(ledger)} == {DAILY.id}
    assert ledger.levels(LAB) == (NO_AMOUNT, Amount(1, 99, 1))
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(1, 501, 1))


def test_a_quota_that_is_freed_in_the_next_window_is_freed_of_concurrent_quantities_too(monkeypatch):
    """The place that the call took of the window before becomes free; its place in the other quota does not."""
    make_requests_concurrent(monkeypatch)
    ledger = InMemoryLedger(ANN_OF_TWO)
    ledger.apply(reserve("1", ANN_OF_TWO, STREAM))
    ledger.now = NOON + DAY
    ledger.apply(reserve("2", ANN_OF_TWO, call(1, 99)))
    assert ledger.levels(LAB) == (NO_AMOUNT, Amount(1, 99, 2))
    ledger.apply(extend("1", ANN_OF_TWO, 500), extend("1", ANN_OF_TWO, 502))
    assert ledger.levels(LAB) == (NO_AMOUNT, Amount(1, 99, 1))
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(1, 501, 2))


def test_an_extend_holds_more_of_a_shared_quota():
    """Another member gets only what is left of it."""
    shared = quota("team/pot", tokens=1000, shared=True)
    ann, bob = binding([shared], user="ann"), binding([shared], user="bob")
    ledger = InMemoryLedger(ann)
    ledger.apply(reserve("1", ann, STREAM), extend("1", ann, 500), reserve("2", bob, STREAM))
    [stopped] = ledger.apply(extend("2", bob, 400, least=400))
    assert (stopped.verdict, stopped.entry.hold) == (Verdict.BUSY, Amount(100, 300, 1))
    assert ledger.levels(shared) == (NO_AMOUNT, Amount(200, 800, 2))


def test_an_extend_raises_the_hold_of_a_shadow_quota_but_not_of_an_after_quota():
    """A quota with `enforce: after` is charged in the window of the reserve, and nothing of the next is held."""
    after = quota("staff/classic", tokens=100, enforce="after")
    shadow = quota("staff/new", tokens=300, enforce="shadow")
    who = binding([DAILY, after], shadows=[shadow])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, STREAM), extend("1", who, 400))
    one_request, whole = Amount(requests=1), Amount(100, 400, 1)
    assert [amount for _, _, amount in held_by(ledger)] == [whole, one_request, whole]
    assert [ledger.levels(each)[1] for each in (DAILY, after, shadow)] == [whole, one_request, whole]
    ledger.now = NOON + DAY
    ledger.apply(extend("1", who, 600))
    assert held_by(ledger)[3:] == [
        (DAILY.id, TOMORROW, Amount(output=200)),
        (shadow.id, TOMORROW, Amount(output=200)),
    ]
    assert ledger.counters[after.key_for("ann")].window.opened_at == TODAY


def test_an_overdraft_is_for_answers_that_have_begun_and_admits_no_call():
    """An answer is extended to 1200 of 1000. Then the next call is refused."""
    each = quota("staff/daily", tokens=1000, overdraft=200)
    who = binding([each])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, call(100, 4000, 100, initial_hold=100)))
    [grown, stopped] = ledger.apply(extend("1", who, 1100, least=1100), extend("1", who, 1101, least=1101))
    assert [reply.verdict for reply in (grown, stopped)] == [Verdict.ALLOW, Verdict.EXHAUSTED]
    [_, refused] = ledger.apply(Settle("1", exactly(100, 1100), "complete"), reserve("2", who, call(0, 1)))
    assert refused.decision.verdict is Verdict.EXHAUSTED
    assert ledger.levels(each)[0].tokens == 1200


def test_a_call_is_extended_by_the_limits_with_which_it_was_admitted():
    """A reload applies to the calls that come after it: each operation has the quotas of its call."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    lowered = binding([quota("staff/daily", tokens=150)])
    [grown, refused] = ledger.apply(extend("1", ANN, 900, least=900), reserve("2", lowered, call(1)))
    assert (grown.verdict, grown.entry.hold) == (Verdict.ALLOW, Amount(100, 900, 1))
    assert isinstance(refused, Refused)


@pytest.mark.parametrize("each", [DAILY, SIX_HOURS], ids=["calendar", "duration"])
def test_after_the_clock_went_back_a_call_is_extended_in_its_window(each):
    """Its window is still the last one that was opened."""
    who = binding([each])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, STREAM))
    ledger.now = NOON - 2 * DAY
    ledger.apply(extend("1", who, 400), extend("1", who, 400))
    assert held_by(ledger) == [(each.id, each.per.opening(NOON).opened_at, Amount(100, 400, 1))]
    assert ledger.levels(each) == (NO_AMOUNT, Amount(100, 400, 1))


def test_after_the_clock_went_ahead_a_call_is_extended_in_the_window_that_was_opened_then():
    """The clock was a day ahead, and the call was extended in tomorrow's window. That window stays the open one."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, STREAM))
    ledger.now = NOON + DAY
    ledger.apply(extend("1", ANN, 300))
    ledger.now = NOON
    ledger.apply(reserve("2", ANN, call(50)), extend("1", ANN, 400))
    assert held_by(ledger) == TWO_WINDOWS
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(50, 300, 1))
    ledger.apply(Settle("1", exactly(100, 400), "complete"), RELEASE)
    assert ledger.levels(DAILY) == (Amount(output=300), Amount(50, 0, 1))


def test_a_call_whose_counter_was_deleted_is_extended_in_a_new_window():
    """What it held before stays in its entry. Of the new window it holds only the increase."""
    who = binding([SIX_HOURS])
    ledger = InMemoryLedger(who)
    ledger.apply(reserve("1", who, STREAM))
    ledger.counters.clear()
    ledger.now += HOUR
    ledger.apply(extend("1", who, 300))
    assert ledger.levels(SIX_HOURS) == (NO_AMOUNT, Amount(output=200))
    ledger.apply(Settle("1", exactly(100, 250), "complete"))
    assert ledger.levels(SIX_HOURS) == (Amount(output=150), NO_AMOUNT)


# ------------------------------------------------------------------------------------------------------------- grants


def test_calls_are_admitted_by_a_grant_until_it_ends():
    """At 12:30 the limit is 1,000 again, of which 1,200 are used: the next call is refused until midnight."""
    who = binding([DAILY], grants=[grant(DAILY.id, tokens=500, until=NOON + HOUR // 2)])
    ledger = InMemoryLedger(who, used={DAILY.id: 900})
    assert isinstance(ledger.apply(reserve("1", who, call(300)), Settle("1", exactly(300), "complete"))[0], Accepted)
    ledger.now += HOUR // 2
    [refused] = ledger.apply(reserve("2", who, call(1)))
    assert isinstance(refused, Refused)
    assert refused.decision.blocks[0].limit.maximum == 1000
    assert refused.decision.admissible_at == instant("2026-11-25 00:00")


def test_a_stream_grows_into_a_grant_while_it_runs():
    """It was admitted with the grant. When that has ended, the stream keeps what it holds and gets no more."""
    who = binding([DAILY], grants=[grant(DAILY.id, tokens=500, until=NOON + HOUR // 2)])
    ledger = InMemoryLedger(who, used={DAILY.id: 800})
    ledger.apply(reserve("1", who, call(100, 900, 100, initial_hold=100)))
    [extended] = ledger.apply(extend("1", who, 300, least=300))
    assert (extended.verdict, extended.entry.hold.output) == (Verdict.ALLOW, 300)
    ledger.now += HOUR // 2
    [ended] = ledger.apply(extend("1", who, 400, least=400))
    assert (ended.verdict, ended.entry.hold.output) == (Verdict.EXHAUSTED, 300)
    ledger.apply(Settle("1", exactly(100, 300), "complete"))
    assert ledger.levels(DAILY) == (Amount(900, 300, 2), NO_AMOUNT)


# ------------------------------------------------------------------------------------------------- invalid operations


@pytest.mark.parametrize("text", ["a" * 513, "a\0b", "a\nb", "\x1b[2J", "\ud800", "a\u2028b"])
@pytest.mark.parametrize("index", range(4))
def test_text_that_a_database_or_a_log_cannot_take_is_rejected(text, index):
    """It is rejected when the operation is built, before it is in a batch with others."""
    texts = ["ann", "gpt-4o-mini", "chat", "openai"]
    texts[index] = text
    with pytest.raises(ValueError, match="not fit for the ledger"):
        replace(reserve("1", binding([DAILY]), call(1)), labels=CallLabels(*texts))


def test_names_in_any_language_are_accepted():
    """Also a name of the greatest length, and an empty one."""
    labels = CallLabels("Élodie 李", "a" * 512, "chat", "")
    assert replace(reserve("1", binding([DAILY]), call(1)), labels=labels).labels.user == "Élodie 李"


@pytest.mark.parametrize(
    "demand", [call(-1), call(TOKENS_MAX + 1), call(0, -1), call(0, TOKENS_MAX + 1), call(2**63), call(0, 10**30)]
)
def test_a_demand_out_of_range_is_rejected(demand):
    """Integers are stored in 64 bits, and a negative one would free tokens."""
    with pytest.raises(ValueError, match="beyond all bounds"):
        reserve("1", ANN, demand)


def test_the_largest_demand_is_decided_like_any_other():
    """It is refused, because it fits into no quota."""
    assert isinstance(InMemoryLedger(ANN).apply(reserve("1", ANN, call(TOKENS_MAX, TOKENS_MAX)))[0], Refused)


@pytest.mark.parametrize(
    "usage", [exactly(-1), exactly(0, -1), exactly(TOKENS_MAX + 1), AtLeast(Tokens(0, 2**63)), Unspent(requests=-1)]
)
def test_a_usage_out_of_range_is_rejected(usage):
    """When the operation is built, so that it cannot fail the others in its batch."""
    with pytest.raises(ValueError, match="beyond all bounds"):
        Settle("1", usage, "complete")


@pytest.mark.parametrize("numbers", [(-1, 0, 0), (0, -1, -1), (0, 0, -1), (TOKENS_MAX + 1, 0, 0), (0, 2**63, 0)])
def test_an_extend_out_of_range_is_rejected(numbers):
    """When the operation is built."""
    with pytest.raises(ValueError, match="beyond all bounds"):
        Extend("1", ANN, *numbers)


def test_an_extend_that_needs_more_than_it_asks_for_is_rejected():
    """`least` is at most `output`."""
    with pytest.raises(ValueError, match="401 tokens at the least are more than the 400 asked for"):
        extend("1", ANN, 400, least=401)


# ------------------------------------------------------------------------------------------------------------- resets


def _reset(ledger: InMemoryLedger, each: Quota) -> None:
    """An administrator resets ann's counter of a quota."""
    counter = ledger.counters[each.key_for("ann")]
    ledger.counters[each.key_for("ann")] = replace(counter, used=NO_AMOUNT, reset_at=ledger.now)


def test_calls_in_flight_are_charged_to_a_counter_that_was_reset():
    """They are extended in it too."""
    ledger = InMemoryLedger(ANN, used={DAILY.id: 500})
    ledger.apply(reserve("1", ANN, STREAM))
    _reset(ledger, DAILY)
    ledger.apply(extend("1", ANN, 900))
    assert ledger.levels(DAILY) == (NO_AMOUNT, Amount(100, 900, 1))
    ledger.apply(SETTLE)
    assert ledger.levels(DAILY) == (Amount(90, 60, 1), NO_AMOUNT)


def test_a_window_that_was_reset_keeps_its_start_and_its_end():
    """They were announced. The window after it begins as ever."""
    who = binding([SIX_HOURS])
    ledger = InMemoryLedger(who, used={SIX_HOURS.id: 600})
    ledger.now += HOUR
    _reset(ledger, SIX_HOURS)
    ledger.apply(reserve("1", who, CALL), SETTLE)
    counter = ledger.counters[SIX_HOURS.key_for("ann")]
    assert (counter.window, counter.used) == (Window(NOON, NOON + 6 * HOUR), Amount(90, 60, 1))
    ledger.now = NOON + 7 * HOUR
    ledger.apply(reserve("2", who, CALL), Release("2"))
    assert not ledger.counters[SIX_HOURS.key_for("ann")].is_open


@pytest.mark.parametrize(
    ("reset_first", "used"),
    [
        pytest.param(True, Amount(90 + 9, 60, 2), id="reset, then expired: the charge is corrected"),
        pytest.param(False, Amount(9, 0, 1), id="expired, then reset: there is nothing to correct"),
    ],
)
def test_a_late_settle_corrects_only_a_charge_that_is_still_counted(reset_first, used):
    """The call was charged its hold of 100 + 400 when it expired, and it used 90 + 60."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL))
    for step in [_reset, None] if reset_first else [None, _reset]:
        ledger.now += 1
        if step is None:
            ledger.apply(EXPIRE)
        else:
            step(ledger, DAILY)
    ledger.apply(reserve("2", ANN, call(9)), Settle("2", exactly(9), "complete"), SETTLE)
    assert ledger.levels(DAILY) == (used, NO_AMOUNT)


@pytest.mark.parametrize(
    ("others", "used"),
    [
        pytest.param(0, Amount(0, 0, 1), id="nothing else was used"),
        pytest.param(400, Amount(390, 0, 1), id="more was used of the input"),
    ],
)
def test_a_late_settle_takes_nothing_below_0_if_the_clock_was_set_back_before_the_reset(others, used):
    """The call expired at 12:00. At 11:59 the counter is reset, which seems to be before that."""
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL), EXPIRE)
    ledger.now -= MINUTE
    _reset(ledger, DAILY)
    ledger.apply(reserve("2", ANN, call(others)), Settle("2", exactly(others), "complete"), SETTLE)
    assert ledger.levels(DAILY) == (used, NO_AMOUNT)


def test_a_late_settle_of_a_call_whose_counter_was_deleted_writes_the_entry_only():
    ledger = InMemoryLedger(ANN)
    ledger.apply(reserve("1", ANN, CALL), EXPIRE)
    ledger.counters.clear()
    ledger.apply(SETTLE)
    assert (ledger.counters, ledger.entries["1"].state) == ({}, "settled")


# ---------------------------------------------------------------------------------- reservations that were lost


def restored(before: InMemoryLedger, after: InMemoryLedger) -> Reply:
    """Put the call `1` of one ledger back into another one, which has lost it."""
    [reply] = after.apply(Restore(before.entries["1"], before.counters))
    return reply


def test_a_lost_reservation_is_put_back_with_what_it_holds() -> None:
    """It ends as if nothing had happened. To repeat it changes nothing, also after the end."""
    before, after = InMemoryLedger(ANN, used={"staff/daily": 300}), InMemoryLedger(ANN, used={"staff/daily": 200})
    before.apply(reserve("1", ANN, CALL))
    for _ in range(2):
        reply = restored(before, after)
        assert isinstance(reply, Accepted)
        assert reply.entry == before.entries["1"]
        assert after.levels(DAILY) == (amount(200), HELD)
    after.apply(SETTLE)
    assert after.levels(DAILY) == (Amount(290, 60, 2), NO_AMOUNT)
    reply = restored(before, after)
    assert isinstance(reply, Accepted)
    assert reply.entry.state == "settled"
    assert after.levels(DAILY) == (Amount(290, 60, 2), NO_AMOUNT)


@pytest.mark.parametrize("is_row_lost", [True, False])
def test_a_window_that_was_lost_with_the_reservation_is_opened_again(is_row_lost: bool) -> None:
    """When it was open before, with nothing used: the other calls in it were lost too. An old one is replaced."""
    who = binding([SIX_HOURS])
    before, after = InMemoryLedger(who, NOON + DAY), InMemoryLedger(who, used={} if is_row_lost else {"staff/6h": 10})
    before.apply(reserve("1", who, CALL))
    after.now = NOON + DAY + MINUTE
    restored(before, after)
    [counter] = after.counters.values()
    assert (counter.window.opened_at, counter.used, counter.held) == (NOON + DAY, NO_AMOUNT, HELD)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_lost_reservation_of_a_window_that_has_ended_is_only_in_the_entry(is_known: bool) -> None:
    """As for every call whose window has ended; and if its window is not known."""
    who = binding([SIX_HOURS])
    before, after = InMemoryLedger(who), InMemoryLedger(who)
    before.apply(reserve("1", who, CALL))
    after.now = NOON + DAY
    if not is_known:
        before.counters = {}
    restored(before, after)
    after.apply(SETTLE)
    assert after.entries["1"].state == "settled"
    assert after.counters == {}
