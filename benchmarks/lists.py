"""The command `python -m benchmarks.lists [USERS]`: how long the lists of administrators take with 100,000 users.

The database has so many users, keys, counters (half of them near a limit), refusals of the last week, rows of the
audit log and sums of days, and 2,000 calls in flight. Of each list the first page and one in the middle are read, of
100 rows each, on SQLite and on PostgreSQL. Each is read nine times and the least counts, because other programs only
add to the time. PostgreSQL is a real server with its default settings, and its tables were analyzed, as autovacuum
does it. It takes about two minutes.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from benchmarks.ledgers import _postgres
from proxy.administration.attention import attention
from proxy.administration.audit import AuditFilter, audit
from proxy.administration.change import Author, Changes
from proxy.administration.counters import CounterFilter, counters
from proxy.administration.directory import DirectoryAdministration
from proxy.administration.in_flight import CallFilter, calls_in_flight
from proxy.administration.pages import Paging, cursor_of
from proxy.administration.refusals import RefusalFilter, refusals
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import FileDirectory, UserId
from proxy.ledger import schema
from proxy.ledger.queries import Asked, usage
from proxy.ledger.store import Store
from proxy.policy.amounts import Measure
from proxy.policy.policy import Group, Policy
from proxy.policy.quota import Limit, Quota
from proxy.policy.windows import Duration
from proxy.server import store_of

_MANY = 100_000
_IN_FLIGHT = 2000
_ROUNDS = 9
_AIM_MS = 50
_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000
_NOW = 20_000 * _DAY_MS + 12 * _HOUR_MS
_AT_ONCE = 2000
_GROUPS = ("staff", "lab", "guests")
_PER = Duration("24h", _DAY_MS)
_POLICY = Policy(
    {name: Group(name, (Quota(name, "daily", (Limit(Measure.TOKENS, 1000),), _PER),)) for name in _GROUPS}
)

Read = Callable[[AsyncConnection], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _List:
    """A list: what reads its first page, and what reads one in the middle, if it has pages."""

    name: str
    first: Read
    deep: Read | None = None


def main() -> None:
    """Print a line for each list and engine."""
    many = int(sys.argv[1]) if len(sys.argv) > 1 else _MANY
    print(f"{'':<44}{'first page':>12}{'in the middle':>16}{'aim met':>10}")
    with TemporaryDirectory() as folder:
        asyncio.run(_measure("SQLite", f"sqlite:///{folder}/quotas.db", many))
    with _postgres() as (server, runner):
        runner.run(_measure("PostgreSQL", runner.run(server.fresh()), many))


async def _measure(engine: str, url: str, many: int) -> None:
    store = store_of(url)
    await store.open()
    await _fill(store, many)
    administration = _administration(store)
    for each in (*_directory_lists(administration, many), *_lists(many)):
        times = [await _least_ms(store, read) for read in (each.first, each.deep) if read is not None]
        shown = "".join(f"{ms:>13.1f} ms" for ms in times).ljust(32)
        print(f"{engine + ', ' + each.name:<44}{shown}{'yes' if max(times) < _AIM_MS else 'NO':>6}", flush=True)
    await store.close()


async def _least_ms(store: Store, read: Read) -> float:
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        async with store.transaction() as connection:
            await read(connection)
        times.append((time.perf_counter() - began) * 1000)
    return min(times)


# --------------------------------------------------------------------------------------------------------- the lists


def _administration(store: Store) -> DirectoryAdministration:
    changes = Changes(DirectoryDatabase(store, now=lambda: _NOW), Author("cli:root"), lambda: _NOW)
    return DirectoryAdministration(changes, FileDirectory([]), _GROUPS)


def _directory_lists(administration: DirectoryAdministration, many: int) -> list[_List]:
    name = _user(many // 2)
    middle, rare = Paging(cursor_of((1, "database", name))), name[:7]
    return [
        _List("users", lambda _: administration.users(Paging()), lambda _: administration.users(middle)),
        _List("users of a group", lambda _: administration.users(Paging(), group="guests")),
        _List("users, search for many", lambda _: administration.users(Paging(), text="leo")),
        _List("users, search for one", lambda _: administration.users(Paging(), text=rare)),
        _List("users, search for none", lambda _: administration.users(Paging(), text="nobody")),
        _List("keys", lambda _: administration.keys(), lambda _: administration.keys(after=f"key{many // 2:013x}")),
        _List("keys of a user", lambda _: administration.keys(owner=UserId("database", name))),
        _List("keys, search for one", lambda _: administration.keys(text=rare)),
    ]


def _lists(many: int) -> list[_List]:
    middle = many // 2
    name, at = _user(middle), _refused_at(middle, many)

    def counted(asked: CounterFilter, after: str | None = None) -> Read:
        return lambda connection: counters(connection, _POLICY, asked, Paging(after), _NOW)

    def refused(asked: RefusalFilter, after: str | None = None) -> Read:
        return lambda connection: refusals(connection, asked, Paging(after))

    def audited(asked: AuditFilter, after: str | None = None) -> Read:
        return lambda connection: audit(connection, asked, Paging(after))

    def used(by: Any, asked: Asked) -> Read:
        return lambda connection: usage(connection, by, asked)

    def flying(asked: CallFilter, after: str | None = None) -> Read:
        return lambda connection: calls_in_flight(connection, asked, Paging(after))

    of_staff = cursor_of(("staff/daily", f"user:{name}"))
    minute = cursor_of((at // 60_000 * 60_000, "", ""))
    week = Asked(_NOW - 6 * _DAY_MS)
    return [
        _List("counters", counted(CounterFilter()), counted(CounterFilter(), of_staff)),
        _List(
            "counters of a quota",
            counted(CounterFilter(quota="staff/daily")),
            counted(CounterFilter(quota="staff/daily"), of_staff),
        ),
        _List("counters of a user", counted(CounterFilter(user=name, user_groups=["staff"]))),
        _List("near a limit", counted(CounterFilter(near=80)), counted(CounterFilter(near=80), of_staff)),
        _List(
            "near a limit, of a group",
            counted(CounterFilter(near=80, group="staff")),
            counted(CounterFilter(near=80, group="staff"), of_staff),
        ),
        _List("refusals", refused(RefusalFilter()), refused(RefusalFilter(), minute)),
        _List("refusals of a user", refused(RefusalFilter(user=name))),
        _List(
            "refusals by a quota",
            refused(RefusalFilter(quota="lab/daily")),
            refused(RefusalFilter(quota="lab/daily"), minute),
        ),
        _List("refusals in a group", refused(RefusalFilter(groups=["guests"]))),
        _List("attention", lambda connection: attention(connection, _POLICY, now=_NOW)),
        _List("calls in flight", flying(CallFilter()), flying(CallFilter(), cursor_of((_call_id(1000),)))),
        _List("audit log", audited(AuditFilter()), audited(AuditFilter(), cursor_of((_NOW - middle * 1000, "")))),
        _List("audit log, an actor", audited(AuditFilter(actor="admin:rare"))),
        _List("audit log, an action", audited(AuditFilter(action="group.set"))),
        _List("audit log, a user", audited(AuditFilter(target=f"database:{name}"))),
        _List("audit log, a day", audited(AuditFilter(since=_NOW - _DAY_MS, until=_NOW - _DAY_MS // 2))),
        _List("audit log, of a group", audited(AuditFilter(groups=["guests"]))),
        _List("usage by day", used("day", week)),
        _List("usage by group", used("group", week)),
        _List("usage by model", used("model", week)),
        _List("usage of a user by day", used("day", Asked(week.since, where={"user": name}))),
    ]


# ------------------------------------------------------------------------------------------------------------ filling


def _user(number: int) -> str:
    # Neighbours in time are not neighbours by name.
    return f"u{number * 7919 % 100_003:06d}.{'kate leo max nina omar'.split()[number % 5]}"


def _call_id(number: int) -> str:
    return f"req_{_NOW - (_IN_FLIGHT - number) * 1000:012x}{number:020x}"


def _refused_at(number: int, many: int) -> int:
    """In the last seven days, and more of them lately."""
    return _NOW - round(7 * _DAY_MS * (number / many) ** 2)


async def _fill(store: Store, many: int) -> None:
    for table, rows in (
        (schema.users, map(_user_row, range(many))),
        (schema.api_keys, map(_key_row, range(many))),
        (schema.counters, map(_counter_row, range(many))),
        (schema.crossings, map(_crossing_row, range(0, many, 2))),
        (schema.refusals, (_refusal_row(number, many) for number in range(many))),
        (schema.audit, map(_audit_row, range(many))),
        (schema.usage_by_day, map(_day_row, range(many))),
        (schema.calls, [*map(_ended_call_row, range(many)), *map(_call_row, range(_IN_FLIGHT))]),
    ):
        async for connection, some in _in_steps(store, rows):
            await connection.execute(sa.insert(table), some)
    async with store.transaction(writes=True) as connection:
        if connection.dialect.name != "sqlite":
            await connection.execute(sa.text(f"SET LOCAL search_path TO {schema.SCHEMA}"))
            await connection.execute(sa.text("ANALYZE"))


async def _in_steps(
    store: Store, rows: Iterable[Mapping[str, object]]
) -> AsyncIterator[tuple[AsyncConnection, Sequence[Mapping[str, object]]]]:
    left = list(rows)
    for first in range(0, len(left), _AT_ONCE):
        async with store.transaction(writes=True) as connection:
            yield connection, left[first : first + _AT_ONCE]


def _user_row(number: int) -> dict[str, object]:
    name, group = _user(number), _GROUPS[number % 3]
    row = {"source": "database", "id": name, "groups": f'["{group}"]', "email": f"{name}@example.org"}
    return row | {"is_service": False, "created_at": _NOW, "created_by": "cli:root"}


def _key_row(number: int) -> dict[str, object]:
    row = {"id": f"key{number:013x}", "digest": f"digest {number}", "user_source": "database", "label": "laptop"}
    row |= {"user_id": _user(number), "takes_tag_header": False}
    return row | {"created_at": _NOW, "created_by": "cli:root"}


def _counter_row(number: int) -> dict[str, object]:
    # Of one in three the window has ended.
    opened_at = _NOW - (_HOUR_MS if number % 3 or number % 2 == 0 else 2 * _DAY_MS)
    row = {"subject": f"user:{_user(number)}", "quota_id": f"{_GROUPS[number % 3]}/daily", "opened_at": opened_at}
    row |= {"resets_at": opened_at + _DAY_MS, "used_input": 900 if number % 2 == 0 else 100, "used_output": 0}
    return row | {"used_requests": 1, "held_input": 0, "held_output": 0, "held_requests": 0}


def _crossing_row(number: int) -> dict[str, object]:
    kept = ("subject", "quota_id", "opened_at", "resets_at")
    row = {name: value for name, value in _counter_row(number).items() if name in kept}
    return row | {"level": 80, "crossed_at": _NOW}


def _refusal_row(number: int, many: int) -> dict[str, object]:
    at = _refused_at(number, many)
    quota_id = f"{_GROUPS[0 if number % 50 else 1]}/daily"
    row = {"request_id": f"req_{at:012x}{number:020x}", "at": at, "user_name": _user(number), "quota_id": quota_id}
    row |= {"model": "small", "endpoint": "chat", "verdict": "exhausted", "measure": "tokens", "maximum": 1000}
    row |= {"used": 1000, "held": 0, "needed": 10, "resets_at": at + _HOUR_MS, "admissible_at": at + _HOUR_MS}
    return row | {"key_id": None, "count": 1, "details": '{"quotas": []}' * 20}


def _audit_row(number: int) -> dict[str, object]:
    row = {"id": f"aud_{number:016x}", "at": _NOW - (100_000 - number) * 1000, "actor": "admin:ops"}
    row |= {"action": "user.set", "target": f"database:{_user(number)}", "before": '{"groups": ["staff"]}'}
    if number == 7:
        row |= {"actor": "admin:rare", "action": "group.set", "target": "guests"}
    return row | {"after": '{"groups": ["staff", "lab"]}', "address": "192.0.2.1", "request_id": None}


def _day_row(number: int) -> dict[str, object]:
    row = {"day": _NOW // _DAY_MS * _DAY_MS - number % 30 * _DAY_MS, "user_name": _user(number)}
    row |= {"through": _GROUPS[number % 3], "model": "small", "calls": 1, "requests": 1, "input_tokens": 90}
    return row | {"output_tokens": 60, "cached_tokens": 0, "reasoning_tokens": 0, "estimated": 0}


def _call_row(number: int) -> dict[str, object]:
    row = {"id": _call_id(number), "owner": "process-1", "state": "open", "user_name": _user(number)}
    row |= {"model": "small", "endpoint": "chat", "upstream": "openai", "through": "staff", "reserved_at": _NOW}
    row |= {"hold_input": 100, "hold_output": 400, "lines": "[]", "would_refuse": "[]", "address": "192.0.2.1"}
    return row | {"ended_at": None, "provenance": None, "counted_as": None}


def _ended_call_row(number: int) -> dict[str, object]:
    at = _NOW - _DAY_MS - number
    row = _call_row(number) | {"id": f"req_{at:012x}{number:020x}", "state": "settled", "reserved_at": at}
    return row | {"ended_at": at, "provenance": "exactly", "counted_as": "settled"}


if __name__ == "__main__":
    main()
