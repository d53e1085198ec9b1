"""The file as plain SQL shows it, while the program that writes it is at work."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.books import Expire, Release, Settle
from proxy.sqlite import SqliteStore
from proxy.torture_books import count_open, read_books
from proxy.torture_records import Level
from tests.builders import NOON, binding, call, exactly, quota, reserve

WHO = binding([quota("staff/daily", tokens=1000)], always=[quota("everyone/pot", tokens=10_000, shared=True)])
MIDNIGHT = NOON - 12 * 3_600_000


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    """A file in use, with one call in each state."""
    store = SqliteStore(tmp_path / "quotas.db")
    await store.open()
    await store.apply([reserve(id, WHO, call(10, 20)) for id in ("a", "b", "c", "d")], NOON)
    await store.apply([Settle("a", exactly(7, 9), "complete"), Release("b"), Expire("c")], NOON + 1)
    yield store
    await store.close()


async def test_calls_and_counters_are_read_as_they_are_committed(store: SqliteStore, tmp_path: Path) -> None:
    """Each call with its state, what it is charged and the lines that it is charged to; each counter's levels."""
    books = read_books(tmp_path / "quotas.db")
    rows = {row.id: row for row in books.rows}
    assert {id: (row.state, row.outcome) for id, row in rows.items()} == {
        "a": ("settled", "complete"),
        "b": ("released", "upstream_failed"),
        "c": ("expired", "lost"),
        "d": ("open", None),
    }
    assert (rows["a"].charge, rows["b"].charge, rows["d"].charge) == ((7, 9, 1), (0, 0, 0), (0, 0, 0))
    assert rows["c"].charge[0] == 10
    assert rows["a"].mark == "mini"
    windows = {("user:ann", "staff/daily", MIDNIGHT), ("~everyone", "everyone/pot", MIDNIGHT)}
    assert {line.window for line in rows["a"].lines} == windows
    assert {line.amount for line in rows["d"].lines} == {(10, 20, 1)}
    used = tuple(map(sum, zip(*(row.charge for row in books.rows), strict=True)))
    assert sorted(books.levels, key=lambda level: level.window) == [
        Level(window, used=used, held=(10, 20, 1))  # type: ignore[arg-type]
        for window in sorted(windows)
    ]


async def test_what_is_in_flight_is_counted(store: SqliteStore, tmp_path: Path) -> None:
    """So one can wait until nothing is."""
    assert count_open(tmp_path / "quotas.db") == 1
    await store.apply([Release("d")], NOON + 2)
    assert count_open(tmp_path / "quotas.db") == 0


def test_reading_never_makes_a_file(tmp_path: Path) -> None:
    """A mistaken path is an error, not an empty set of books."""
    with pytest.raises(Exception, match="unable to open"):
        read_books(tmp_path / "nowhere.db")
    assert not list(tmp_path.iterdir())
