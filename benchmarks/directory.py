"""The command `python -m benchmarks.directory [USERS]`: what many users and keys in the database cost.

A proxy whose database has ten users with a key each is compared with one whose database has 100,000: the time until
it serves, its memory, and the processor time of a call of ten users who were seen before. Then each call is of a user
who was not, and then each is of another one of these. Last, a lookup alone is timed, on SQLite and on PostgreSQL. It
takes three minutes.
"""

import asyncio
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import sqlalchemy as sa

from benchmarks import servers
from benchmarks.ledgers import _postgres
from benchmarks.servers import Server
from proxy.config.values import digest
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import UserId
from proxy.identity.keys import NewKey, make_key
from proxy.ledger.schema import api_keys, users
from proxy.server import store_of

_FEW = 10
_MANY = 100_000
_CALLS = 9000  # of so many users, all of whom are remembered
_CLIENTS = 16
_LOOKUPS = 2000
_BODY = {"model": "short", "messages": [{"role": "user", "content": "What is the capital of France?"}]}


@dataclass(frozen=True, slots=True)
class _Costs:
    """What one proxy was measured to cost: time in s, memory in MB, processor time in µs."""

    start: float
    memory: float
    seen: float
    unseen: float
    again: float
    memory_after: float


def main() -> None:
    """Print the costs with few users and with many, and their ratios."""
    many = int(sys.argv[1]) if len(sys.argv) > 1 else _MANY
    with TemporaryDirectory() as folder, servers.whole_upstream(Path(folder)) as upstream:
        few_costs, many_costs = (_measure(Path(folder) / str(number), number, upstream) for number in (_FEW, many))
    _print("until it serves", "s", few_costs.start, many_costs.start)
    _print("memory at the start", "MB", few_costs.memory, many_costs.memory)
    _print("CPU of a call, users seen before", "µs", few_costs.seen, many_costs.seen)
    _print("CPU of a call, each of a new user", "µs", few_costs.seen, many_costs.unseen)
    _print("CPU of a call, each of another user", "µs", few_costs.seen, many_costs.again)
    _print("memory after these calls", "MB", few_costs.memory_after, many_costs.memory_after)
    with TemporaryDirectory() as folder:
        times = [asyncio.run(_lookup_us(f"sqlite:///{folder}/{number}.db", number)) for number in (_FEW, many)]
        _print("lookup of a key and its user, SQLite", "µs", *times)
    with _postgres() as (server, runner):
        times = [runner.run(_lookup_us(runner.run(server.fresh()), number)) for number in (_FEW, many)]
        _print("lookup of a key and its user, PostgreSQL", "µs", *times)


def _print(what: str, unit: str, few: float, many: float) -> None:
    print(f"{what:<42}{few:>10.2f} {unit:<4}{many:>10.2f} {unit:<4}{many / few:>6.2f} ×", flush=True)


def _measure(folder: Path, number: int, upstream: Server) -> _Costs:
    folder.mkdir()
    keys = asyncio.run(_fill(f"sqlite:///{folder}/quotas.db", number))
    began = time.monotonic()
    with servers.proxy(folder, upstream) as server:
        start, memory = time.monotonic() - began, server.memory_mb("Rss")
        seen = [key.text for key in keys[:_FEW]]
        asyncio.run(_call(server, islice(cycle(seen), 500)))
        cost = asyncio.run(_call(server, islice(cycle(seen), _CALLS)))
        unseen = asyncio.run(_call(server, islice(cycle(key.text for key in keys[_FEW:] or keys), _CALLS)))
        again = asyncio.run(_call(server, islice(cycle(key.text for key in keys[_FEW:] or keys), _CALLS)))
        return _Costs(start, memory, cost, unseen, again, server.memory_mb("Rss"))


async def _fill(database: str, number: int) -> list[NewKey]:
    """Users with a key each, in one change."""
    keys = [make_key() for _ in range(number)]
    common = {"created_at": 0, "created_by": "cli:root"}
    store = store_of(database)
    await store.open()
    async with DirectoryDatabase(store, now=lambda: 0).change() as (connection, _):
        for first in range(0, number, 1000):
            some = keys[first : first + 1000]
            await connection.execute(
                sa.insert(users),
                [
                    {
                        "source": "database",
                        "id": f"user {key.id}",
                        "groups": '["staff"]',
                        "is_service": False,
                        **common,
                    }
                    for key in some
                ],
            )
            await connection.execute(
                sa.insert(api_keys),
                [
                    {
                        **{"id": key.id, "digest": key.digest, "label": "", "takes_tag_header": False, **common},
                        **{"user_source": "database", "user_id": f"user {key.id}"},
                    }
                    for key in some
                ],
            )
    await store.close()
    return keys


async def _call(server: Server, keys: Iterable[str]) -> float:
    """Processor time of a call, in µs. All clients take the next key from the same list."""
    waiting, calls = iter(keys), 0

    async def client(http: aiohttp.ClientSession) -> None:
        nonlocal calls
        for key in waiting:
            headers = {"authorization": f"Bearer {key}"}
            async with http.post(
                f"http://127.0.0.1:{server.port}/v1/chat/completions", json=_BODY, headers=headers
            ) as response:
                assert response.status == 200, await response.text()
                await response.read()
            calls += 1

    before = server.cpu_us()
    async with aiohttp.ClientSession() as http:
        await asyncio.gather(*(client(http) for _ in range(_CLIENTS)))
    return (server.cpu_us() - before) / calls


async def _lookup_us(database: str, number: int) -> float:
    """The time of a lookup in µs, one after the other."""
    keys = await _fill(database, number)
    store = store_of(database)
    await store.attach()
    directory = DirectoryDatabase(store, now=lambda: 0)
    asked = list(islice(cycle(keys[:: max(1, number // 1000)]), _LOOKUPS))
    began = time.perf_counter()
    for key in asked:
        found = await directory.find_key(digest(key.text))
        assert found is not None
        assert await directory.find_user(UserId("database", f"user {key.id}")) is not None
    spent = time.perf_counter() - began
    await store.close()
    return spent / len(asked) * 1e6


if __name__ == "__main__":
    main()
