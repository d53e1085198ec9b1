"""The SQL of the ledger: load what a batch touches, apply it to the books, write what changed; one transaction.

`Store` is the database as the ledger sees it. Its writing is one synchronous function on one connection in a
thread of its own: on SQLite that holds the lock for a fraction of a millisecond, where going statement by
statement through a busy event loop holds it for tens of them. Reading for pages goes through aiosqlite beside it.

Two processes must not write to one SQLite file without knowing of each other, so the store takes an advisory
lock on a side file for as long as it is open.
"""

import fcntl
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection, Row, create_engine, event, select, tuple_
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from proxy.books import Act, Answer, Books, Entry, Facts, Line, Reserve
from proxy.quotas import Counter, CounterKey
from proxy.tables import calls, counters, migrate, owners
from proxy.usage import Amount, AtLeast, Exactly, Tokens, Unspent, Usage, charge_of
from proxy.windows import Window

# How long a transaction waits for the file's lock, in seconds.
_BUSY_TIMEOUT_S = 5
# SQLite reads this many keys in one statement at most (two variables a key, 32,766 variables).
_KEYS_MAX = 10_000


class StoreInUse(Exception):
    """Another process has this database file open for writing."""


class StoreUnavailable(Exception):
    """The database can't be reached or written right now; the same act may work later.

    `is_uncertain` where it failed while committing, so that what was asked may have been done.
    """

    def __init__(self, message: str, *, is_uncertain: bool = False) -> None:
        super().__init__(message)
        self.is_uncertain = is_uncertain


class StoreRefused(Exception):
    """The database would not take this batch; it may take the acts one by one."""


class Store:
    """One SQLite file. `open()` before use, `close()` after; `apply` may be called from one task at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": _BUSY_TIMEOUT_S})
        self._reading = create_async_engine(f"sqlite+aiosqlite:///{path}", pool_size=2, max_overflow=0)
        self._lock = -1
        event.listen(self._engine, "connect", _set_up)
        event.listen(self._engine, "begin", _begin_immediate)

    @property
    def thread(self) -> ThreadPoolExecutor:
        """Where `apply` and its like have to run."""
        return self._thread

    def open(self) -> None:
        """Take the file for this process and bring its schema up to date.

        Raises StoreInUse, StoreUnavailable, or tables.NewerSchema.
        """
        self._lock = os.open(f"{self._path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StoreInUse(
                f"Another process is using {self._path}. Stop it first, or use PostgreSQL to run several."
            ) from None
        with _translated(), self._engine.begin() as connection:
            migrate(connection)

    def apply(self, acts: Sequence[Act], now: int) -> list[Answer]:
        """Do these acts in order, in one transaction, and answer each.

        Raises StoreUnavailable or StoreRefused; then nothing was done, or, where that is uncertain, all of it:
        every act may be repeated.
        """
        with _translated(), self._engine.connect() as connection:
            books = _load(connection, acts, now)
            before = set(books.entries)
            answers = [books.apply(act) for act in acts]
            _write(connection, books, before)
            with _translated(is_uncertain=True):
                connection.commit()
        return answers

    def renew(self, owner: str, alive_until: int) -> None:
        """Say that the process `owner` is alive until then."""
        row = {"id": owner, "alive_until": alive_until}
        with _translated(), self._engine.begin() as connection:
            statement = insert(owners)
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["id"], set_={"alive_until": statement.excluded.alive_until}
                ),
                row,
            )

    def orphans(self, owner: str, limit: int) -> list[str]:
        """The ids of open calls whose process is not `owner`: as only one has the file, those are dead."""
        statement = select(calls.c.id).where(calls.c.state == "open", calls.c.owner != owner).limit(limit)
        with _translated(), self._engine.connect() as connection:
            return list(connection.execute(statement).scalars())

    async def read_counters(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        """How these counters stand, read without a lock."""
        with _translated():
            async with self._reading.connect() as connection:
                return _counters((await connection.execute(_counters_of(keys))).all())

    async def read_entry(self, entry_id: str) -> Entry | None:
        """One call in the books."""
        with _translated():
            async with self._reading.connect() as connection:
                row = (await connection.execute(select(calls).where(calls.c.id == entry_id))).one_or_none()
        return _entry(row) if row else None

    async def close(self) -> None:
        """Let go of the file."""
        await self._reading.dispose()
        self._engine.dispose()
        self._thread.shutdown()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class _translated:
    """SQLAlchemy's errors become the store's: worth repeating, or not."""

    def __init__(self, *, is_uncertain: bool = False) -> None:
        self._is_uncertain = is_uncertain

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OperationalError, InterfaceError)):
            raise StoreUnavailable(str(error.orig), is_uncertain=self._is_uncertain) from error
        if isinstance(error, DBAPIError):
            raise StoreRefused(str(error.orig)) from error


def _set_up(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions on its own: we do, at once
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _load(connection: Connection, acts: Sequence[Act], now: int) -> Books:
    rows = connection.execute(select(calls).where(calls.c.id.in_([act.id for act in acts]))).all()
    entries = {row.id: _entry(row) for row in rows}
    touched = {line.key for entry in entries.values() for line in entry.lines}
    for act in acts:
        if isinstance(act, Reserve):
            touched.update(act.binding.keys())
    found = connection.execute(_counters_of(sorted(touched))).all() if touched else []
    return Books(_counters(found), entries, now)


def _counters_of(keys: Sequence[CounterKey]) -> sa.Select[Any]:
    return select(counters).where(tuple_(counters.c.subject, counters.c.quota_id).in_(keys[:_KEYS_MAX]))


def _write(connection: Connection, books: Books, before: set[str]) -> None:
    changed = [_counter_row(key, books.counters[key]) for key in sorted(books.counters_changed)]
    if changed:
        statement = insert(counters)
        columns = [column.name for column in counters.columns if not column.primary_key]
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["subject", "quota_id"],
                set_={name: statement.excluded[name] for name in columns},
            ),
            changed,
        )
    opened = [_call_row(books.entries[entry_id]) for entry_id in books.entries_changed - before]
    if opened:
        connection.execute(sa.insert(calls), opened)
    ended = [_ending_row(books.entries[entry_id]) for entry_id in books.entries_changed & before]
    if ended:
        connection.execute(sa.update(calls).where(calls.c.id == sa.bindparam("call_id")), ended)


def _counters(rows: Iterable[Row[Any]]) -> dict[CounterKey, Counter]:
    return {
        (row.subject, row.quota_id): Counter(
            Window(row.opened_at, row.resets_at),
            used=Amount(row.used_input, row.used_output, row.used_requests),
            held=Amount(row.held_input, row.held_output, row.held_requests),
        )
        for row in rows
    }


def _counter_row(key: CounterKey, counter: Counter) -> dict[str, object]:
    return {
        "subject": key[0],
        "quota_id": key[1],
        "opened_at": counter.window.opened_at,
        "resets_at": counter.window.resets_at,
        "used_input": counter.used.input,
        "used_output": counter.used.output,
        "used_requests": counter.used.requests,
        "held_input": counter.held.input,
        "held_output": counter.held.output,
        "held_requests": counter.held.requests,
    }


def _entry(row: Row[Any]) -> Entry:
    return Entry(
        id=row.id,
        owner=row.owner,
        facts=Facts(user=row.user_name, model=row.model, endpoint=row.endpoint, upstream=row.upstream),
        through=row.through,
        reserved_at=row.reserved_at,
        hold=Amount(row.hold_input, row.hold_output, 1),
        charge_if_lost=Tokens(row.lost_input, row.lost_output),
        lines=tuple(Line((key[0], key[1]), at, Amount(*amount)) for key, at, amount in orjson.loads(row.lines)),
        capped_by=row.capped_by,
        would_refuse=tuple(orjson.loads(row.would_refuse)),
        state=row.state,
        ended_at=row.ended_at,
        usage=_usage(row),
        outcome=row.outcome,
    )


def _usage(row: Row[Any]) -> Usage | None:
    match row.provenance:
        case "exactly":
            return Exactly(_tokens(row))
        case "at_least":
            return AtLeast(_tokens(row))
        case "unspent":
            return Unspent(row.requests)
    return None


def _tokens(row: Row[Any]) -> Tokens:
    return Tokens(row.input_tokens, row.output_tokens, row.cached_tokens, row.reasoning_tokens)


def _call_row(entry: Entry) -> dict[str, object]:
    lines = [
        (line.key, line.opened_at, (line.amount.input, line.amount.output, line.amount.requests))
        for line in entry.lines
    ]
    ending = _ending_row(entry)
    del ending["call_id"]
    return {
        "id": entry.id,
        "owner": entry.owner,
        "user_name": entry.facts.user,
        "model": entry.facts.model,
        "endpoint": entry.facts.endpoint,
        "upstream": entry.facts.upstream,
        "through": entry.through,
        "reserved_at": entry.reserved_at,
        "hold_input": entry.hold.input,
        "hold_output": entry.hold.output,
        "lost_input": entry.charge_if_lost.input,
        "lost_output": entry.charge_if_lost.output,
        "lines": orjson.dumps(lines).decode(),
        "capped_by": entry.capped_by,
        "would_refuse": orjson.dumps(entry.would_refuse).decode(),
        **ending,
    }


def _ending_row(entry: Entry) -> dict[str, object]:
    tokens = entry.usage.tokens if entry.usage else None
    return {
        "call_id": entry.id,
        "state": entry.state,
        "ended_at": entry.ended_at,
        "input_tokens": tokens.input if tokens else None,
        "output_tokens": tokens.output if tokens else None,
        "cached_tokens": tokens.cached if tokens else None,
        "reasoning_tokens": tokens.reasoning if tokens else None,
        "requests": charge_of(entry.usage).requests if entry.usage else None,
        "provenance": entry.usage.provenance if entry.usage else None,
        "outcome": entry.outcome,
    }
