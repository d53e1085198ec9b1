"""What is written is read back as it was, without a database between."""

import pytest

from proxy.ledger.book import Book, Expire, Operation, Release, Settle
from proxy.ledger.rows import CHANGING, Changes, changes_of, counters_of, entry_of, keys_of
from proxy.ledger.schema import calls
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Unspent
from tests.builders import DAY, NOON, binding, call, extend, quota, reserve

DAILY = quota("staff/daily", tokens=1000)
POT = quota("team-x/pot", tokens=450, shared=True)
WHO = binding([DAILY], [POT], shadows=[quota("watch/tiny", tokens=1, enforce="shadow")])
RESERVED = reserve("1", WHO, call(100, 800, 10, initial_hold=10))
GROWN = extend("1", WHO, 300)
COLUMNS = [column.name for column in calls.c]
ENDS = [
    Settle("1", Exactly(Tokens(90, 60, 30, 20)), "complete", response_id="resp_1"),
    Settle("1", AtLeast(Tokens(90, 6, 1, 2)), "client_left"),
    Settle("1", Unspent(1), "rejected"),
    Release("1"),
    Expire("1"),
]


def booked(*operations: Operation, books: Book | None = None, now: int = NOON) -> Book:
    """The books after these acts, and after what stands in others."""
    books = Book(books.counters, books.entries, now) if books else Book({}, {}, now)
    for operation in operations:
        books.apply(operation)
    return books


def changed(row):
    """A row of a call as an update leaves it."""
    return dict(zip([*CHANGING, "id"], row, strict=True))


@pytest.mark.parametrize("end", [None, *ENDS], ids=lambda end: getattr(end, "outcome", "open"))
def test_what_a_batch_leaves_is_read_as_it_was(end):
    """Call and counters, to the last field, whether it begins and ends in one batch or in two."""
    whole = booked(RESERVED, GROWN, *([end] if end else []))
    rows = changes_of(whole, known=[])
    assert [entry_of(row) for row in rows.opened] == [whole.entries["1"]]
    assert counters_of(rows.counters) == whole.counters
    assert rows.changed == []


@pytest.mark.parametrize("end", ENDS, ids=lambda end: getattr(end, "outcome", "lost"))
def test_an_update_writes_all_that_changes(end):
    """What an act changes in a call that is there already makes the row that would have been written at once."""
    first = booked(RESERVED)
    later = booked(GROWN, end, books=first, now=NOON + DAY)
    [opened] = changes_of(first, known=[]).opened
    rows = changes_of(later, known=["1"])
    row = {**dict(zip(COLUMNS, opened, strict=True)), **changed(rows.changed[0])}
    assert entry_of([row[name] for name in COLUMNS]) == later.entries["1"]
    assert rows.opened == []


def test_rows_are_in_one_order():
    """Whoever locks or writes them does so in the same order as everybody else."""
    whos = [binding([DAILY], user=user) for user in ("zoe", "ann", "Élodie")]
    rows = changes_of(booked(*(reserve(who.user, who, call(1)) for who in whos)), known=[])
    assert [row[0] for row in rows.counters] == sorted(row[0] for row in rows.counters)
    assert [row[0] for row in rows.opened] == ["ann", "zoe", "Élodie"]


def test_what_nothing_changed_is_not_written():
    """A refusal, or an end of nothing."""
    assert changes_of(booked(reserve("1", WHO, call(5000)), Release("2")), known=[]) == Changes([], [], [])


def test_a_row_that_was_only_made_to_be_locked_is_no_counter():
    """It has no window, so whoever comes first opens one."""
    assert counters_of([("ann", "staff/daily", *[0] * 8)]) == {}


def test_the_counters_of_acts_are_those_of_their_bindings():
    """Ends name none: theirs stand in the lines of their calls."""
    assert keys_of([RESERVED, extend("2", binding([DAILY], user="bob"), 1), Release("3")]) == {
        *WHO.keys(),
        DAILY.key_for("bob"),
    }
