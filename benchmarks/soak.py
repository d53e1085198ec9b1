"""The command `python -m benchmarks.soak [--seconds N] [--rate N]`: the ledger on PostgreSQL for a long time.

Two databases of one server get the same calls in turns. One has the tables as the migrations make them, the other the
settings of TRIED. So whatever else the machine does disturbs both alike. Two ledgers, as of two replicas, use each
database, with all the jobs that maintain it. Calls are made at a fixed rate: each reserves, grows its hold once if it
is a long one, and settles after up to two seconds. They hold two quotas of one of 20,000 users and one quota that all
users share. Calls are deleted after a tenth of the run, so that the tables reach their final size early.

PostgreSQL is a real server from a wheel with its default settings, so each commit waits for the disk, and autovacuum
runs as it does by default.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import uvloop

from proxy.errors import LedgerUnavailable
from proxy.ledger.book import Extend, Reserve, Settle
from proxy.ledger.entry import CallLabels, call_id_prefix
from proxy.ledger.ledger import Ledger
from proxy.ledger.rollup import Rollup
from proxy.ledger.store import Store
from proxy.policy.binding import Binding
from proxy.policy.policy import Keep
from proxy.server import repeat, store_of, wall_clock_ms
from tests.builders import call, exactly, group_quotas, quota
from tests.postgres import Postgres

# What is compared with the tables as they are.
TRIED = (
    "ALTER TABLE llm_quota_proxy.counters SET (fillfactor = 80)",
    "ALTER TABLE llm_quota_proxy.usage_by_day SET (fillfactor = 80)",
    "ALTER TABLE llm_quota_proxy.calls SET (fillfactor = 85)",
)
_PARTS = 10
_USERS = 20_000
_PLENTY = 10**12
_SETTINGS = ("max_connections=200", "log_min_messages=fatal")

_STAFF = group_quotas(
    "staff",
    quota("staff/daily", tokens=_PLENTY),
    quota("staff/15m", tokens=_PLENTY, per="15m"),
    quota("staff/pot", tokens=_PLENTY, shared=True),
)
_WHOLE, _STREAM = call(100, 400), call(100, 400, initial_hold=100)

_TABLES = """
    SELECT relname, n_live_tup, n_dead_tup, n_tup_upd, n_tup_hot_upd, autovacuum_count,
        pg_relation_size(relid) AS bytes, pg_indexes_size(relid) AS index_bytes
    FROM pg_stat_user_tables WHERE relname IN ('counters', 'calls', 'usage_by_day') ORDER BY relname
"""


@dataclass(slots=True)
class Side:
    """One of the two databases, its ledgers, and the latencies (s) of this part of the run."""

    name: str
    url: str
    ledgers: list[Ledger] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    reserves_s: list[float] = field(default_factory=list)
    settles_s: list[float] = field(default_factory=list)
    failed: int = 0
    updates: dict[str, tuple[int, int]] = field(default_factory=dict)


def main() -> None:
    """Run the load, and print a row for each tenth of the run and each database."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="The ledger for a long time.")
    parser.add_argument("--seconds", type=int, default=3600, help="how long (default: an hour)")
    parser.add_argument("--rate", type=int, default=40, help="calls a second in each database (default: 40)")
    given = parser.parse_args()
    server = Postgres.started(_SETTINGS)
    uvloop.run(_run(server, given.seconds, given.rate))


async def _run(server: Postgres, seconds: int, rate: int) -> None:
    sides = [await _side(server, name, statements) for name, statements in (("as it is", ()), ("tried", TRIED))]
    jobs = [job for side in sides for ledger in side.ledgers for job in _jobs(side, ledger, seconds / _PARTS)]
    running = [asyncio.create_task(repeat(job, every_s=every_s)) for job, every_s in jobs]
    print(_line("", "calls", "reserve p50/p99", "settle p50/p99", "calls", "counters", "usage_by_day"), flush=True)
    async with asyncio.TaskGroup() as calls:
        for part in range(1, _PARTS + 1):
            late_s = await _load(calls, sides, seconds / _PARTS, rate)
            for side in sides:
                print(await _row(server, side, f"{part * seconds / _PARTS / 60:.0f} min, {side.name}"), flush=True)
            if late_s > 1:
                print(f"The machine is too slow for this rate: {late_s:.0f} s late.", flush=True)
    for task in running:
        task.cancel()
    for side in sides:
        for ledger in side.ledgers:
            await ledger.close()


async def _side(server: Postgres, name: str, statements: Sequence[str]) -> Side:
    """A new database with two ledgers that have started."""
    side = Side(name, await server.migrated())
    await server.run(*statements, url=side.url)
    for number in range(2):
        store = store_of(side.url)
        ledger = Ledger(store, owner=f"replica-{number}", now=wall_clock_ms)
        await ledger.start()
        side.ledgers.append(ledger)
        side.stores.append(store)
    return side


def _jobs(side: Side, ledger: Ledger, kept_s: float) -> list[tuple[Callable[[], Awaitable[object]], float]]:
    """The jobs that maintain a database, and how often they run (s). Calls are kept for `kept_s`."""
    store = side.stores[side.ledgers.index(ledger)]
    rollup = Rollup(store, now=ledger.now, keep=lambda: Keep(calls_ms=round(kept_s * 1000)))
    return [(ledger.renew_lease, 15.0), (ledger.sweep, 30.0), (rollup.run, 10.0)]


async def _load(calls: asyncio.TaskGroup, sides: Sequence[Side], seconds: float, rate: int) -> float:
    """Begin calls at this rate in each database, in turns. Returns how late the last one began (s)."""
    begin = time.monotonic()
    for number in range(round(seconds * rate)):
        await asyncio.sleep(max(0, begin + number / rate - time.monotonic()))
        for side in sides:
            calls.create_task(_call(side, side.ledgers[number % 2]))
    return time.monotonic() - begin - seconds


async def _call(side: Side, ledger: Ledger) -> None:
    # The least of two numbers is low: most calls are of few users.
    binding = Binding(groups=(_STAFF,), user=f"user {int(_USERS * min(random.random(), random.random()))}")
    is_stream = random.random() < 0.5
    id = f"{call_id_prefix(wall_clock_ms())}{random.getrandbits(80):020x}"
    labels = CallLabels(binding.user, "gpt-4o-mini", "chat", "openai")
    operation = Reserve(id, ledger.owner, labels, binding, _STREAM if is_stream else _WHOLE)
    try:
        began = time.monotonic()
        await ledger.reserve(operation)
        side.reserves_s.append(time.monotonic() - began)
        await asyncio.sleep(random.random())
        if is_stream:
            await ledger.extend(Extend(id, binding, input=100, output=400, least=0))
        await asyncio.sleep(random.random())
        began = time.monotonic()
        await ledger.end(Settle(id, exactly(90, random.randrange(400)), "complete"))
        side.settles_s.append(time.monotonic() - began)
    except LedgerUnavailable:  # the disk did not answer for so long
        side.failed += 1


async def _row(server: Postgres, side: Side, name: str) -> str:
    calls = f"{len(side.settles_s):,}" + (f", {side.failed} failed" if side.failed else "")
    cells = [calls, _percentiles(side.reserves_s), _percentiles(side.settles_s)]
    side.reserves_s, side.settles_s, side.failed = [], [], 0
    for row in await server.run(_TABLES, url=side.url):
        before, hot_before = side.updates.get(row["relname"], (0, 0))
        side.updates[row["relname"]] = (row["n_tup_upd"], row["n_tup_hot_upd"])
        updates, hot = row["n_tup_upd"] - before, row["n_tup_hot_upd"] - hot_before
        cells.append(
            f"{row['bytes'] / 1e6:.1f}+{row['index_bytes'] / 1e6:.1f} MB, {row['n_dead_tup']:,} dead, "
            f"{100 * hot / max(1, updates):.1f} % HOT, {row['autovacuum_count']} vacuums"
        )
    return _line(name, *cells)


def _percentiles(latencies_s: Sequence[float]) -> str:
    ordered = sorted(latencies_s)
    p50, p99 = (ordered[len(ordered) * each // 100] * 1000 for each in (50, 99))
    return f"{p50:.1f}/{p99:.1f} ms"


def _line(what: str, calls: str, reserves: str, settles: str, *tables: str) -> str:
    return f"{what:19}{calls:>16}{reserves:>17}{settles:>17}" + "".join(f"{table:>50}" for table in tables)


if __name__ == "__main__":
    main()
