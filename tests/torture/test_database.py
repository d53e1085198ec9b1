"""The database as plain SQL reads it, on both engines, while the proxy's own store is open."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.ledger.book import Expire, Release, Settle
from proxy.ledger.postgres import PostgresStore
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import Store
from proxy.torture.database import DatabaseUnusable, count_open_calls, drop_schema, read_snapshot, require_empty
from proxy.torture.evidence import CounterRow, WindowKey
from tests.builders import NOON, binding, call, exactly, quota, reserve
from tests.postgres import shared

WHO = binding([quota("staff/daily", tokens=1000)], always=[quota("everyone/pot", tokens=10_000, shared=True)])
WINDOWS = {("user:ann", "staff/daily"), ("~everyone", "everyone/pot")}


@pytest.fixture(params=["sqlite", "postgresql"])
async def opened(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Store, str]]:
    """An open database with one call in each state, and its URL."""
    store: Store
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'quotas.db'}"
        store = SqliteStore(tmp_path / "quotas.db")
    else:
        url = await shared().fresh()
        store = PostgresStore(url)
    await store.open()
    reserves = [reserve(id, WHO, call(10, 20)) for id in ("a", "b", "c", "d")]
    await store.apply([replace(one, labels=one.labels._replace(tag=f"call-0-{one.id}")) for one in reserves], NOON)
    await store.apply([Settle("a", exactly(7, 9), "complete"), Release("b"), Expire("c")], NOON + 1)
    yield store, url
    await store.close()


async def test_calls_and_counters_are_read_as_they_are_committed(opened: tuple[Store, str]) -> None:
    """Each call with its state, its charge and its held amounts; each counter with its used and held amounts."""
    snapshot = await read_snapshot(opened[1])
    rows = {row.request_id: row for row in snapshot.calls}
    assert {id: (row.state, row.outcome) for id, row in rows.items()} == {
        "a": ("settled", "complete"),
        "b": ("released", "upstream_failed"),
        "c": ("expired", "lost"),
        "d": ("open", None),
    }
    assert (rows["a"].charge, rows["b"].charge, rows["d"].charge) == ((7, 9, 1), (0, 0, 0), (0, 0, 0))
    assert rows["c"].charge[0] == 10
    assert rows["a"].tag == "call-0-a"
    windows: set[WindowKey] = {held.window for held in rows["a"].held}
    assert {window[:2] for window in windows} == WINDOWS
    assert {held.amount for held in rows["d"].held} == {(10, 20, 1)}
    used = tuple(map(sum, zip(*(row.charge for row in snapshot.calls), strict=True)))
    assert sorted(snapshot.counters, key=lambda row: row.window) == [
        CounterRow(window, used=used, held=(10, 20, 1))  # type: ignore[arg-type]
        for window in sorted(windows)
    ]


async def test_open_calls_are_counted(opened: tuple[Store, str]) -> None:
    """So a run can wait until there are none."""
    store, url = opened
    assert await count_open_calls(url) == 1
    await store.apply([Release("d")], NOON + 2)
    assert await count_open_calls(url) == 0


def test_reading_never_creates_a_file(tmp_path: Path) -> None:
    """A wrong path is an error, not an empty database."""
    with pytest.raises(Exception, match="unable to open"):
        asyncio.run(read_snapshot(f"sqlite:///{tmp_path / 'nowhere.db'}"))
    assert not list(tmp_path.iterdir())


async def test_a_database_with_the_proxy_s_schema_is_refused() -> None:
    """Its data may be needed. Without the schema, or once it is dropped, the database is accepted."""
    url = await shared().fresh()
    await require_empty(url)
    store = PostgresStore(url)
    await store.open()
    await store.close()
    with pytest.raises(DatabaseUnusable, match="DROP SCHEMA llm_quota_proxy CASCADE"):
        await require_empty(url)
    await drop_schema(url)
    await require_empty(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:secret-word@127.0.0.1:9/none", "can't be reached"),
        ("postgresql://me:secret-word@127.0.0.1:port/none", "can't read the database's URL"),
    ],
)
async def test_the_error_for_an_unreachable_database(url: str, message: str) -> None:
    """It does not contain the password."""
    with pytest.raises(DatabaseUnusable, match=message) as caught:
        await read_snapshot(url)
    assert "secret-word" not in str(caught.value)


async def test_the_error_for_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the extra to install."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(DatabaseUnusable, match=r"pip install '\.\[postgres\]'"):
        await require_empty("postgresql://127.0.0.1:1/none")
