"""The command `python -m benchmarks.sizes [CALLS]`: what a call takes on the disk, on SQLite and on PostgreSQL.

Each call is admitted, settled and counted into its day as in production, in batches of 32, with an id, a key, a tag
and an address as long as real ones, and two quotas. So the tables have the dead rows and half-empty pages that this
leaves. Then 100 days of 300 users and three models are added to the sums of days. PostgreSQL is a real server from a
wheel with its default settings. 100,000 calls take some minutes.
"""

import asyncio
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import sqlalchemy as sa

from benchmarks.ledgers import _postgres
from proxy.ledger.book import Reserve, Settle
from proxy.ledger.entry import CallLabels, call_id_prefix
from proxy.ledger.schema import DAY_SUMS, usage_by_day
from proxy.ledger.store import Store
from proxy.server import store_of, wall_clock_ms
from tests.builders import binding, call, exactly, quota

_USERS, _BATCH, _STEP, _DAYS = 300, 32, 500, 100
_MODELS = ("gpt-4o-mini", "gpt-4o", "claude-sonnet-4-5")
_PLENTY = 10**15
_QUOTAS = [quota("staff/daily", tokens=_PLENTY), quota("staff/monthly", tokens=_PLENTY, per="month")]
_TABLES = ("calls", "usage_by_day", "counters")


def main() -> None:
    """Print bytes a call, by table and index, and those of the log."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with TemporaryDirectory() as folder:
        path = Path(folder) / "quotas.db"
        log_bytes = asyncio.run(_fill(store_of(f"sqlite:///{path}"), count, log=Path(f"{path}-wal")))
        print(f"SQLite, {count:,} calls of {_USERS} users; the log (-wal) had {log_bytes / 2**20:.1f} MB")
        with closing(sqlite3.connect(path)) as connection:
            found = connection.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name").fetchall()
            rows = _rows(connection)
        _print(((name, size) for name, size in found), rows, count)
    with _postgres() as (server, runner):
        url = runner.run(server.fresh())
        runner.run(_fill(store_of(url), count))
        sizes = (
            "SELECT relname, pg_relation_size(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
            "WHERE nspname = 'llm_quota_proxy' AND relkind IN ('r', 'i')"
        )
        counts = {
            name: runner.run(server.run(f"SELECT count(*) FROM llm_quota_proxy.{name}", url=url))[0][0]
            for name in _TABLES
        }
        print(f"PostgreSQL, {count:,} calls of {_USERS} users")
        _print((tuple(row) for row in runner.run(server.run(sizes, url=url))), counts, count)


def _rows(connection: sqlite3.Connection) -> dict[str, int]:
    return {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in _TABLES}


async def _fill(store: Store, count: int, *, log: Path | None = None) -> int:
    """Make these calls. Returns the largest size of the log in bytes."""
    await store.open()
    largest, after = 0, None
    for first in range(0, count, _BATCH):
        now = wall_clock_ms() + first
        admitted = list(_reserves(first, now))
        await store.apply(admitted, now)
        await store.apply([Settle(each.id, exactly(900, 600), "complete") for each in admitted], now + 900)
        if first % (_BATCH * 16) == 0:
            after = (await store.roll_up(_STEP, after)).last
            largest = max(largest, await asyncio.to_thread(_size, log))
    while (result := await store.roll_up(_STEP, after)).rows:
        after = result.last
    for day in range(_DAYS):
        sums = dict.fromkeys(DAY_SUMS, 12_345)
        rows = [
            {"day": day * 86_400_000, "user_name": _user(number), "through": "staff", "model": model, **sums}
            for number in range(_USERS)
            for model in _MODELS
        ]
        async with store.transaction(writes=True) as connection:
            await connection.execute(sa.insert(usage_by_day), rows)
    await store.close()
    return largest


def _reserves(first: int, now: int) -> Iterator[Reserve]:
    for number in range(first, first + _BATCH):
        user = _user(number * 7919 % _USERS)
        labels = CallLabels(
            user, _MODELS[number % 3], "chat", "openai", "zjdexuzyrs", f"project-{number % 40}", "10.20.30.40"
        )
        yield Reserve(
            f"{call_id_prefix(now)}{number:020x}",
            "a1b2c3d4e5f6a7b8",
            labels,
            binding(_QUOTAS, user=user),
            call(1000, 800),
        )


def _user(number: int) -> str:
    return f"user-{number}@example.org"


def _size(file: Path | None) -> int:
    return file.stat().st_size if file else 0


def _print(sizes: Iterator[tuple[str, int]], rows: dict[str, int], count: int) -> None:
    for name, size in sorted(sizes):
        table = next((each for each in _TABLES if each in name), None)
        if table is not None and size > 2**17:
            per = count if table == "calls" else rows[table]
            print(f"    {name:28} {size / 2**20:8.1f} MB   {size / per:7.0f} bytes a row of {table}")
    print(f"    rows: {rows}")


if __name__ == "__main__":
    main()
