"""The command `python -m benchmarks.records [ROWS]`: the cost of many stored calls.

It measures the ledger's rate in an empty database and in one with so many calls, and then one step of each
maintenance job, on SQLite and on PostgreSQL. The calls belong to a hundred users and ninety days; half of them are
counted into their days already. PostgreSQL is a real server from a wheel with its default settings, on the same
cores. A million calls take about three minutes.
"""

import asyncio
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.ledgers import Load, _measure, _postgres
from proxy.ledger.store import JobResult
from proxy.server import store_of

_STEP = 500
_STEPS = 20
_DAY_MS = 86_400_000
_FIRST_DAY = 20_000 * _DAY_MS
_LOAD = Load(64, 1000)


def main() -> None:
    """Print the rates, and a line for each maintenance job and engine."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with TemporaryDirectory() as folder:
        for many in (0, rows):
            path = Path(folder) / f"{many}.db"
            asyncio.run(_migrate(url := f"sqlite:///{path}"))
            with closing(sqlite3.connect(path)) as connection, connection:
                connection.execute(f"{_NUMBERS} {_INSERT} SELECT {_values(many, _SQLITE_ID)} FROM numbers", [many])
            _measure(f"SQLite, {many:,} calls", url, _LOAD)
        asyncio.run(_time("SQLite", url))
    with _postgres() as (server, runner):
        for many in (0, rows):
            runner.run(_migrate(url := runner.run(server.fresh())))
            fill = f"{_INSERT} SELECT {_values(many, _POSTGRES_ID)} FROM generate_series(1, {many}::bigint) AS number"
            runner.run(server.run("SET search_path = llm_quota_proxy", fill, "VACUUM ANALYZE calls", url=url))
            _measure(f"PostgreSQL, {many:,} calls", url, _LOAD)
        runner.run(_time("PostgreSQL", url))


# `generate_series` is an extension that not every build of SQLite has.
_NUMBERS = """
    WITH RECURSIVE numbers(number) AS (
        SELECT 1 WHERE ?1 > 0 UNION ALL SELECT number + 1 FROM numbers WHERE number < ?1
    )
"""
_SQLITE_ID = "printf('req_%012x%020d', {at}, number)"
_POSTGRES_ID = "'req_' || lpad(to_hex({at}), 12, '0') || lpad(number::text, 20, '0')"
_INSERT = """
    INSERT INTO calls (id, owner, state, user_name, model, endpoint, upstream, through, reserved_at, ended_at,
        hold_input, hold_output, maximum, lines, would_refuse, input_tokens, output_tokens, cached_tokens,
        reasoning_tokens, requests, provenance, outcome, counted_as)
"""


def _values(rows: int, entry_id: str) -> str:
    """The SELECT list of calls in order of time, the first half of which is counted."""
    at = f"{_FIRST_DAY} + number * {90 * _DAY_MS // max(1, rows)}"
    return f"""
        {entry_id.format(at=at)}, 'process-1', 'settled', 'user ' || number % 100, 'gpt-4o-mini', 'chat', 'openai',
        'staff', {at}, {at} + 900, 100, 400, 400, '[[["user:ann","staff/daily"],1795478400000,[100,400,1]]]', '[]',
        90, 60, 0, 0, 1, 'exactly', 'complete', CASE WHEN number < {rows // 2} THEN 'settled' END
    """


async def _migrate(url: str) -> None:
    store = store_of(url)
    await store.open()
    await store.close()


async def _time(engine: str, url: str) -> None:
    before = _FIRST_DAY + 30 * _DAY_MS
    store = store_of(url)
    await store.open()
    for name, job in (
        ("counting", store.roll_up),
        ("deleting", partial(store.delete_calls, before=before)),
        ("deleting days", partial(store.delete_days, before=before)),
    ):
        times = [await _timed(job) for _ in range(_STEPS)]
        first, *later = times
        print(
            f"{engine}, {name}, {_STEP} rows: {first * 1000:.1f} ms the first time, then "
            f"{sorted(later)[len(later) // 2] * 1000:.1f} ms, at most {max(later) * 1000:.1f} ms"
        )
    await store.close()


async def _timed(job: Callable[[int, str | None], Awaitable[JobResult]]) -> float:
    began = time.perf_counter()
    await job(_STEP, None)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
