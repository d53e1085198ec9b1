"""Counters and entries become rows and are read back equal. No database is needed for this."""

from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ledger.book import Book, Expire, Operation, Release, Settle
from proxy.ledger.rows import CHANGING, Changes, changes_of, counters_of, entry_of, keys_of, names_of
from proxy.ledger.schema import calls
from proxy.policy.amounts import Amount, AtLeast, Exactly, Tokens, Unspent
from tests.builders import DAY, NOON, binding, call, extend, quota, reserve

DAILY = quota("staff/daily", tokens=1000)
POT = quota("team-x/pot", tokens=450, shared=True)
WHO = binding([DAILY], [POT], shadows=[quota("watch/tiny", tokens=1, enforce="shadow")])
RESERVED = reserve("1", WHO, call(100, 800, 10, initial_hold=10))
EXTENDED = extend("1", WHO, 300)
COLUMNS = [column.name for column in calls.c]
ENDS = [
    Settle("1", Exactly(Tokens(90, 60, 30, 20)), "complete", response_id="resp_1"),
    Settle("1", AtLeast(Tokens(90, 6, 1, 2)), "client_left"),
    Settle("1", Unspent(1), "rejected"),
    Release("1"),
    Expire("1"),
]


def book_after(*operations: Operation, before: Book | None = None, now: int = NOON) -> Book:
    """A book after these operations. It starts empty, or with what is in the book `before`."""
    book = Book(before.counters, before.entries, now) if before else Book({}, {}, now)
    for operation in operations:
        book.apply(operation)
    return book


def changed(row):
    """The columns of a call that an update writes, by name."""
    return dict(zip([*CHANGING, "id"], row, strict=True))


@pytest.mark.parametrize("end", [None, *ENDS], ids=lambda end: getattr(end, "outcome", "open"))
def test_new_rows_are_read_as_they_were_written(end):
    """Calls and counters, equal to the last field."""
    whole = book_after(RESERVED, EXTENDED, *([end] if end else []))
    rows = changes_of(whole, known=[])
    assert [entry_of(row) for row in rows.opened] == [whole.entries["1"]]
    assert counters_of(rows.counters) == whole.counters
    assert rows.changed == []


LABELS = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=512)


@given(key_id=LABELS, tag=LABELS)
def test_the_key_and_the_tag_of_a_call_are_read_as_they_were_written(key_id, tag):
    """Empty ones are stored as NULL, as are those of calls of earlier releases."""
    labels = RESERVED.labels._replace(key_id=key_id, tag=tag)
    book = book_after(replace(RESERVED, labels=labels), ENDS[0])
    [opened] = changes_of(book, known=[]).opened
    row = dict(zip(COLUMNS, opened, strict=True))
    assert (row["key_id"], row["tag"]) == (key_id or None, tag or None)
    assert entry_of(opened).labels == labels


@pytest.mark.parametrize(
    ("stored", "amount"),
    [([100, 10, 1], Amount(100, 10, 1)), ([100, 10], Amount(100, 10)), ([100, 10, 1, 7], Amount(100, 10, 1))],
    ids=["this release", "a release with fewer quantities", "a release with more"],
)
def test_held_amounts_of_other_releases_are_read(stored, amount):
    """Missing quantities are 0, and quantities that this release does not count are ignored."""
    [opened] = changes_of(book_after(RESERVED), known=[]).opened
    row = dict(zip(COLUMNS, opened, strict=True))
    lines = [[key, at, stored] for key, at, _ in orjson.loads(row["lines"])]
    entry = entry_of([*{**row, "lines": orjson.dumps(lines).decode()}.values()])
    assert [held.amount for held in entry.held_amounts] == [amount] * len(lines)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: getattr(end, "outcome", "lost"))
def test_an_update_writes_all_columns_that_change(end):
    """A row that is inserted and then updated is read as the entry after the update."""
    first = book_after(RESERVED)
    later = book_after(EXTENDED, end, before=first, now=NOON + DAY)
    [opened] = changes_of(first, known=[]).opened
    rows = changes_of(later, known=["1"])
    row = {**dict(zip(COLUMNS, opened, strict=True)), **changed(rows.changed[0])}
    assert entry_of([row[name] for name in COLUMNS]) == later.entries["1"]
    assert rows.opened == []


def test_rows_are_sorted_by_their_keys():
    """So all processes write them in the same order."""
    whos = [binding([DAILY], user=user) for user in ("zoe", "ann", "Élodie")]
    rows = changes_of(book_after(*(reserve(who.user, who, call(1)) for who in whos)), known=[])
    assert [row[0] for row in rows.counters] == sorted(row[0] for row in rows.counters)
    assert [row[0] for row in rows.opened] == ["ann", "zoe", "Élodie"]


def test_rows_that_did_not_change_are_not_written():
    """A refused call and an end of an unknown call change nothing."""
    assert changes_of(book_after(reserve("1", WHO, call(5000)), Release("2")), known=[]) == Changes([], [], [])


def test_a_row_that_was_only_made_to_be_locked_is_no_counter():
    """It has no window. The first call opens one."""
    assert counters_of([("ann", "staff/daily", *[0] * 8)]) == {}


def test_the_keys_of_operations_are_those_of_their_bindings():
    """Ends have no binding. Their counters are in the held amounts of their calls."""
    assert keys_of([RESERVED, extend("2", binding([DAILY], user="bob"), 1), Release("3")]) == {
        *WHO.keys(),
        DAILY.key_for("bob"),
    }


def test_names_of_a_column():
    """NULL is not an empty list: it means that there is no list."""
    assert names_of(None) is None
    assert names_of("[]") == ()
    assert names_of('["staff","lab"]') == ("staff", "lab")
