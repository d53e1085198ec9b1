"""The books as plain SQL shows them, in either engine, while the program that writes them is at work."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.ledger.book import Expire, Release, Settle
from proxy.ledger.postgres import PostgresStore
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import Store
from proxy.torture.database import NoBooks, count_open, need_none, read_books, remove_books
from proxy.torture.evidence import Level, WindowKey
from tests.builders import NOON, binding, call, exactly, quota, reserve
from tests.postgres import shared

WHO = binding([quota("staff/daily", tokens=1000)], always=[quota("everyone/pot", tokens=10_000, shared=True)])
WINDOWS = {("user:ann", "staff/daily"), ("~everyone", "everyone/pot")}


@pytest.fixture(params=["sqlite", "postgresql"])
async def opened(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Store, str]]:
    """A database in use, with one call in each state, and its URL."""
    store: Store
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'quotas.db'}"
        store = SqliteStore(tmp_path / "quotas.db")
    else:
        url = await shared().fresh()
        store = PostgresStore(url)
    await store.open()
    await store.apply([reserve(id, WHO, call(10, 20)) for id in ("a", "b", "c", "d")], NOON)
    await store.apply([Settle("a", exactly(7, 9), "complete"), Release("b"), Expire("c")], NOON + 1)
    yield store, url
    await store.close()


async def test_calls_and_counters_are_read_as_they_are_committed(opened: tuple[Store, str]) -> None:
    """Each call with its state, what it is charged and the lines that it is charged to; each counter's levels."""
    books = await read_books(opened[1])
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
    windows: set[WindowKey] = {line.window for line in rows["a"].lines}
    assert {window[:2] for window in windows} == WINDOWS
    assert {line.amount for line in rows["d"].lines} == {(10, 20, 1)}
    used = tuple(map(sum, zip(*(row.charge for row in books.rows), strict=True)))
    assert sorted(books.levels, key=lambda level: level.window) == [
        Level(window, used=used, held=(10, 20, 1))  # type: ignore[arg-type]
        for window in sorted(windows)
    ]


async def test_what_is_in_flight_is_counted(opened: tuple[Store, str]) -> None:
    """So one can wait until nothing is."""
    store, url = opened
    assert await count_open(url) == 1
    await store.apply([Release("d")], NOON + 2)
    assert await count_open(url) == 0


def test_reading_never_makes_a_file(tmp_path: Path) -> None:
    """A mistaken path is an error, not an empty set of books."""
    with pytest.raises(Exception, match="unable to open"):
        asyncio.run(read_books(f"sqlite:///{tmp_path / 'nowhere.db'}"))
    assert not list(tmp_path.iterdir())


async def test_somebodys_own_books_are_not_touched() -> None:
    """A database that has some is refused; whose were removed, or that never had any, is not."""
    url = await shared().fresh()
    await need_none(url)
    store = PostgresStore(url)
    await store.open()
    await store.close()
    with pytest.raises(NoBooks, match="DROP SCHEMA llm_quota_proxy CASCADE"):
        await need_none(url)
    await remove_books(url)
    await need_none(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:secret-word@127.0.0.1:9/none", "can't be reached"),
        ("postgresql://me:secret-word@127.0.0.1:port/none", "can't read the database's URL"),
    ],
)
async def test_a_database_that_is_not_there_is_said(url: str, said: str) -> None:
    """Without its password."""
    with pytest.raises(NoBooks, match=said) as caught:
        await read_books(url)
    assert "secret-word" not in str(caught.value)


async def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(NoBooks, match=r"pip install 'llm-quota-proxy\[postgres\]'"):
        await need_none("postgresql://127.0.0.1:1/none")
