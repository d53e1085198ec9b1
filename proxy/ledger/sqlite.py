"""The books in one SQLite file, for one machine: load what a batch touches, apply it, write what changed.

Writing is one synchronous function on one connection in a thread of its own: that holds the lock for a fraction of
a millisecond, where going statement by statement through a busy event loop holds it for tens of them. Reading for
pages goes through aiosqlite beside it.

Two processes must not write to one SQLite file without knowing of each other, so the store takes an advisory
lock on a side file for as long as it is open. Workers of one parent share that lock, and take turns: each waits in
the system's queue of another lock for every transaction. SQLite's own has no queue, only who happens to look at the
right moment: without turns one process got 1 batch while another got 5,393.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import orjson
import sqlalchemy as sa
from sqlalchemy import URL, Connection, Dialect, bindparam, create_engine, event, func, select, tuple_
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, NotSupportedError, ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine

from proxy.ledger.book import Book, Operation, Reply
from proxy.ledger.entry import Entry, call_id_prefix
from proxy.ledger.rows import CHANGING, changes_of, counters_of, entry_of, keys_of
from proxy.ledger.schema import (
    ADDED_TO_DAYS,
    DAY_COLUMNS,
    DAY_KEY,
    UNCOUNTED,
    UPSERT_DAYS,
    calls,
    counters,
    migrate,
    owners,
)
from proxy.ledger.store import JobResult, StoreInUse, StoreRefused, StoreUnavailable
from proxy.policy.quota import Counter, CounterKey

# How long a transaction waits for the file's lock, in seconds.
_BUSY_TIMEOUT_S = 5.0
# The database's errors that lie in what it was given. All others lie in the database, and may pass.
_REFUSALS = (DataError, IntegrityError, InterfaceError, NotSupportedError, ProgrammingError)

# The maintenance jobs. Parameters: ?1 the limit, ?2 the key after which to start, ?3 the instant, ?4 an id of then.
# Each is served by an index in its order (`calls_uncounted`, the primary keys).
_NEXT = f"FROM calls WHERE {UNCOUNTED} AND id > coalesce(?2, '') ORDER BY id LIMIT ?1"
ROLL_UP = (
    f"INSERT INTO usage_by_day ({DAY_COLUMNS}) {ADDED_TO_DAYS} FROM (SELECT *, counted_as AS was {_NEXT}) "
    f"WHERE true {UPSERT_DAYS}",
    f"UPDATE calls SET counted_as = state WHERE id IN (SELECT id {_NEXT})",
)
DELETE_CALLS = (
    "DELETE FROM calls WHERE id IN (SELECT id FROM calls WHERE id > coalesce(?2, '') AND id < ?4 AND reserved_at < ?3 "
    "AND counted_as = state AND state <> 'open' ORDER BY id LIMIT ?1)",
)
DELETE_DAYS = (
    f"DELETE FROM usage_by_day WHERE ({DAY_KEY}) IN (SELECT {DAY_KEY} FROM usage_by_day "
    f"WHERE day >= coalesce(CAST(?2 AS bigint), 0) AND day < ?3 ORDER BY {DAY_KEY} LIMIT ?1)",
)

T = TypeVar("T")


class SqliteStore:
    """One SQLite file; see `store.Store`.

    `busy_timeout_s` is how long a transaction waits for a lock that somebody else has on the file. `lock` is the
    lock that a parent has taken for all its workers, as `hand_over` gave it; without it the process is alone.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = _BUSY_TIMEOUT_S, lock: int | None = None) -> None:
        self._path = path.resolve()  # by whatever name it is called: one file, one lock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        file, waits = str(self._path), {"timeout": busy_timeout_s}
        self._engine = create_engine(URL.create("sqlite", database=file), connect_args=waits)
        self._reading = create_async_engine(
            URL.create("sqlite+aiosqlite", database=file), connect_args=waits, pool_size=2, max_overflow=0
        )
        self._sql = _Statements(self._engine.dialect)
        self._opened: tuple[int, int] | None = None
        self._is_alone = lock is None
        self._lock = -1 if lock is None else lock
        self._turn = -1
        event.listen(self._engine, "connect", _set_up)
        event.listen(self._engine, "begin", _begin_immediate)

    async def open(self) -> None:
        """Take the file, where nobody took it for us, and bring its schema up to date.

        Raises StoreInUse, StoreUnavailable, or tables.NewerSchema.
        """
        await self._in_thread(self._open)

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        """Do these acts in order, in one transaction, and answer each."""
        return await self._in_thread(self._apply, operations, now)

    async def renew(self, owner: str, now: int, *, lease_ms: int) -> None:
        """Say that the process `owner` is alive for so long from now."""
        await self._in_thread(self._renew, {"id": owner, "alive_until": now + lease_ms})

    async def orphans(self, owner: str, now: int, *, limit: int) -> list[str]:
        """The ids of open calls of others: who is alone on the file knows that they are dead.

        Else those are whose lease has run out.
        """
        return await self._in_thread(self._orphans, owner, now, limit)

    async def read_counters(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        """How these counters stand, read without a lock."""
        self._look_for_it()  # connecting to a file that is gone would make an empty one
        with _translated():
            async with self._reading.connect() as connection:
                return counters_of(await connection.exec_driver_sql(self._sql.counters_of, _given(keys)))

    async def read_entry(self, entry_id: str) -> Entry | None:
        """One call in the books."""
        return await self._read_one(self._sql.calls_of, _given([entry_id]))

    async def find_response_entry(self, response_id: str) -> Entry | None:
        """The call that made this response."""
        return await self._read_one(self._sql.maker_of, (response_id,))

    def hand_over(self) -> int:
        """The lock of an open store, to outlive it: nobody else gets the file until all who have it are gone."""
        return os.dup(self._lock)

    async def roll_up(self, limit: int, after: str | None) -> JobResult:
        """Add ended calls to the sums of their days."""
        return JobResult(await self._run_job(ROLL_UP, limit, after))

    async def delete_calls(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete old calls."""
        return JobResult(await self._run_job(DELETE_CALLS, limit, after, before, call_id_prefix(max(0, before))))

    async def delete_days(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete old sums."""
        return JobResult(await self._run_job(DELETE_DAYS, limit, after, before))

    async def close(self) -> None:
        """Close the file and release its lock."""
        self._thread.shutdown()
        await self._reading.dispose()
        self._engine.dispose()
        for file in filter(_is_open, (self._turn, self._lock)):
            os.close(file)
        self._turn = self._lock = -1

    async def _run_job(self, statements: Sequence[str], *given: object) -> int:
        """Run a maintenance job between two batches, in a transaction of its own; the rows of its last statement.

        Deleted rows leave nothing behind in SQLite that the next step would walk over, so each starts at the beginning.
        """
        return await self._in_thread(self._job, statements, given)

    async def _read_one(self, statement: str, given: tuple[str]) -> Entry | None:
        self._look_for_it()
        with _translated():
            async with self._reading.connect() as connection:
                found = await connection.exec_driver_sql(statement, given)
        return next(map(entry_of, found), None)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._in_turn, work, *arguments)

    def _in_turn(self, work: Callable[..., T], *arguments: Any) -> T:
        if self._turn < 0:
            return work(*arguments)
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            return work(*arguments)
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    def _open(self) -> None:
        if self._is_alone:
            self._lock = self._take_lock()
        else:
            self._turn = self._side_file("turn")
        self._in_turn(self._migrate)
        self._opened = self._found()

    def _migrate(self) -> None:
        with _translated(), self._engine.begin() as connection:
            migrate(connection)

    def _apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        self._look_for_it()
        with _translated(), self._engine.connect() as connection:
            books = self._load(connection, operations, now)
            known = list(books.entries)
            answers = [books.apply(operation) for operation in operations]
            self._write(connection, books, known)
            with _translated(is_uncertain=True):
                connection.commit()
        return answers

    def _renew(self, row: dict[str, object]) -> None:
        self._look_for_it()
        with _translated(), self._engine.begin() as connection:
            statement = insert(owners)
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["id"], set_={"alive_until": statement.excluded.alive_until}
                ),
                row,
            )

    def _orphans(self, owner: str, now: int, limit: int) -> list[str]:
        self._look_for_it()  # connecting to a file that is gone would make an empty one
        statement = select(calls.c.id).where(calls.c.state == "open", calls.c.owner != owner).limit(limit)
        if not self._is_alone:
            alive = select(owners.c.id).where(owners.c.alive_until > now)
            statement = statement.where(calls.c.owner.not_in(alive))
        with _translated(), self._engine.connect() as connection:
            return list(connection.execute(statement).scalars())

    def _job(self, statements: Sequence[str], given: tuple[object, ...]) -> int:
        self._look_for_it()
        rows = 0
        with _translated(), self._engine.begin() as connection:
            for statement in statements:
                rows = connection.exec_driver_sql(statement, given).rowcount
        return rows

    def _side_file(self, kind: str) -> int:
        try:
            return os.open(f"{self._path}.{kind}", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StoreUnavailable(f"{self._path}.{kind} can't be opened: {error.strerror}") from error

    def _take_lock(self) -> int:
        lock = self._side_file("lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StoreInUse(
                f"Another process is using {self._path}. Stop it first; to run several, use --workers, or PostgreSQL."
            ) from None
        return lock

    def _found(self) -> tuple[int, int] | None:
        """Which file goes by our name now."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return (found.st_dev, found.st_ino)

    def _look_for_it(self) -> None:
        # What is written to a file that has lost its name is gone with the process.
        if self._found() != self._opened:
            raise StoreUnavailable(f"{self._path} was moved, deleted or replaced while in use")

    def _load(self, connection: Connection, operations: Sequence[Operation], now: int) -> Book:
        rows = connection.exec_driver_sql(self._sql.calls_of, _given([operation.id for operation in operations]))
        entries = {entry.id: entry for entry in map(entry_of, rows.all())}
        keys = keys_of(operations).union(
            held_amount.key for entry in entries.values() for held_amount in entry.held_amounts
        )
        found = connection.exec_driver_sql(self._sql.counters_of, _given(sorted(keys)))
        return Book(counters_of(found.all()), entries, now)

    def _write(self, connection: Connection, books: Book, known: Sequence[str]) -> None:
        changes = changes_of(books, known)
        for statement, rows in (
            (self._sql.put_counters, changes.counters),
            (self._sql.open_calls, changes.opened),
            (self._sql.change_calls, changes.changed),
        ):
            if rows:
                connection.exec_driver_sql(statement, rows)


class _Statements:
    """What a batch runs, as text: made once, because making a statement takes longer than running it."""

    def __init__(self, dialect: Dialect) -> None:
        given = func.json_each(bindparam("given")).table_valued("value").c.value
        subject, quota_id = (func.json_extract(given, sa.literal_column(f"'$[{place}]'")) for place in (0, 1))
        is_given = tuple_(counters.c.subject, counters.c.quota_id).in_(select(subject, quota_id))
        put = insert(counters)
        values = {column.name: put.excluded[column.name] for column in counters.c if not column.primary_key}
        put = put.on_conflict_do_update(index_elements=[*counters.primary_key], set_=values)
        change = sa.update(calls).where(calls.c.id == bindparam("call_id"))
        # Keys and ids are given as one JSON array, so that there may be as many as a batch needs.
        self.counters_of = str(select(counters).where(is_given).compile(dialect=dialect))
        self.calls_of = str(select(calls).where(calls.c.id.in_(select(given))).compile(dialect=dialect))
        made = select(calls).where(calls.c.response_id == bindparam("made")).order_by(calls.c.id.desc())
        self.maker_of = f"{made.compile(dialect=dialect)} LIMIT 1"
        self.put_counters = str(put.compile(dialect=dialect))
        self.open_calls = str(sa.insert(calls).compile(dialect=dialect))
        self.change_calls = str(change.compile(dialect=dialect, column_keys=CHANGING))


class _translated:
    """SQLAlchemy's errors become the store's: worth repeating, or not."""

    def __init__(self, *, is_uncertain: bool = False) -> None:
        self._is_uncertain = is_uncertain

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _REFUSALS):
            raise StoreRefused(str(error.orig)) from error
        if isinstance(error, DBAPIError):
            raise StoreUnavailable(str(error.orig), is_uncertain=self._is_uncertain) from error


def _set_up(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions on its own: we do, at once
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _is_open(file: int) -> bool:
    return file >= 0


def _given(keys: Sequence[object]) -> tuple[str]:
    return (orjson.dumps(keys).decode(),)
