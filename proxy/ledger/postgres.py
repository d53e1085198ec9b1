"""The books in PostgreSQL, which any number of processes share: exact by its row locks, and nothing else to run.

A batch is one transaction:

    begin ─▶ make missing counters ─▶ lock counters ─▶ lock calls ─▶ rules ─▶ write ─▶ commit

Everybody makes and locks in the same order, counters before calls, so that two batches can wait for each other but
not in a circle. Counters are made before any is locked: the other way round deadlocked in a third of all batches.
The locking select tells the time by which windows are decided, so that all processes go by one clock.

The timeouts are set in each transaction, and no statement has a name: so it works through pgbouncer too, where the
next transaction may be on another connection. A process that stops in the middle of a batch loses its transaction,
and its locks with it, after a few seconds.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncpg
import sqlalchemy as sa
from asyncpg.exceptions import DataError, IntegrityConstraintViolationError, PostgresError
from sqlalchemy import Connection, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from proxy.ledger.book import Book, Operation, Reply
from proxy.ledger.entry import Entry, call_id_prefix
from proxy.ledger.rows import CHANGING, Row, changes_of, counters_of, entry_of, keys_of
from proxy.ledger.schema import (
    ADDED_TO_DAYS,
    DAY_COLUMNS,
    DAY_KEY,
    SCHEMA,
    UNCOUNTED,
    UPSERT_DAYS,
    calls,
    counters,
    migrate,
)
from proxy.ledger.store import JobResult, StoreRefused, StoreUnavailable
from proxy.policy.quota import Counter, CounterKey

# Any number, as long as it is always this one: whoever holds it makes the schema, the others wait.
_MIGRATION_LOCK = 0x11_90_07_A5
# How often a batch that collided with another is tried again.
_TRIES = 5
_READERS = 2
# A process that has been dead for so long has no open calls any more.
_FORGET_OWNER_MS = 7 * 86_400_000

# What lies in what the database was given. All else lies in the database, and may pass.
_REFUSALS = (DataError, IntegrityConstraintViolationError)
# Deadlock, failure to serialise, and a lock that took too long: the same batch may get through a moment later.
_COLLISIONS = (
    asyncpg.exceptions.DeadlockDetectedError,
    asyncpg.exceptions.SerializationError,
    asyncpg.exceptions.LockNotAvailableError,
)
# The driver calls it a mistake of its own where a connection is used in the moment in which it breaks.
_FAILURES = (
    *(PostgresError, asyncpg.InterfaceError, asyncpg.exceptions.InternalClientError),
    *(DBAPIError, OSError, TimeoutError),
)

# ------------------------------------------------------------------------------------------------------- statements


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long is waited, in ms: for a client that has stopped, a lock, a statement; in all by the server, and by us.

    A client that has stopped must lose its locks before others give up waiting for them. A connection that does not
    answer to a mere begin for `probe_ms` is taken to be gone.
    """

    connect_ms: int = 4000
    probe_ms: int = 2000
    idle_ms: int = 3000
    lock_ms: int = 4000
    statement_ms: int = 6000
    batch_ms: int = 7000
    whole_ms: int = 9000


def begin(timeouts: Timeouts) -> str:
    """Every batch looks a few hundred keys up: that is never worth a walk through a table, whatever is estimated.

    A table of a million counters, once it was analysed, was walked through by each batch: 120 calls a second.
    """
    settings = {
        "idle_in_transaction_session_timeout": timeouts.idle_ms,
        "lock_timeout": timeouts.lock_ms,
        "statement_timeout": timeouts.statement_ms,
        **dict.fromkeys(("enable_hashjoin", "enable_mergejoin", "enable_seqscan", "jit"), "off"),
    }
    limits = "; ".join(f"SET LOCAL {name} = {value}" for name, value in settings.items())
    return f"BEGIN ISOLATION LEVEL READ COMMITTED; {limits}; {_BATCH_TIMEOUT.format(timeouts.batch_ms)}"


def _arrays(columns: Sequence[sa.Column[Any]]) -> str:
    """Parameters that are one array for each column: a statement has the same text for any number of rows."""
    kinds = ["bigint" if isinstance(column.type, sa.BigInteger) else "text" for column in columns]
    return ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(kinds, 1))


def _update(table: Table, names: Sequence[str]) -> str:
    """Write these columns of rows that are there, which are found by the table's key."""
    keys = [column.name for column in table.primary_key]
    sets = ", ".join(f"{name} = given.{name}" for name in names if name not in keys)
    same = " AND ".join(f"kept.{name} = given.{name}" for name in keys)
    given = f"unnest({_arrays([table.c[name] for name in names])}) AS given({', '.join(names)})"
    return f"UPDATE {SCHEMA}.{table.name} AS kept SET {sets} FROM {given} WHERE {same}"


# A client that stops between the two halves of a statement is not idle, and only this makes it lose its locks: from
# PostgreSQL 17 on. Before that there is no such setting, and one that nobody reads is set instead.
_BATCH_TIMEOUT = f"""
    SELECT set_config(CASE WHEN current_setting('server_version_num')::int < 170000 THEN '{SCHEMA}.none'
    ELSE 'transaction_timeout' END, '{{}}', true)
"""
_NOW = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_COUNTER, _CALL = (", ".join(column.name for column in table.c) for table in (counters, calls))
_GIVEN_KEYS = "unnest($1::text[], $2::text[]) AS given(subject, quota_id)"

_MAKE_COUNTERS = f"""
    INSERT INTO {SCHEMA}.counters ({_COUNTER})
    SELECT subject, quota_id, {", ".join("0" * (len(counters.c) - 2))} FROM {_GIVEN_KEYS}
    ORDER BY subject COLLATE "C", quota_id COLLATE "C"
    ON CONFLICT DO NOTHING
"""
# Those of the acts, and those that their calls hold something of. The time is told after the locks were got; there is
# one row also where there is no counter.
_LOCK_COUNTERS = f"""
    SELECT {_NOW}, locked.* FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
        SELECT kept.* FROM (
            SELECT subject COLLATE "C" AS subject, quota_id COLLATE "C" AS quota_id FROM {_GIVEN_KEYS}
            UNION
            SELECT line #>> '{{0,0}}', line #>> '{{0,1}}'
            FROM {SCHEMA}.calls, jsonb_array_elements(lines::jsonb) AS line WHERE id = ANY ($3::text[])
            ORDER BY subject, quota_id
        ) AS wanted CROSS JOIN LATERAL (
            SELECT {_COUNTER} FROM {SCHEMA}.counters
            WHERE subject = wanted.subject COLLATE "default" AND quota_id = wanted.quota_id COLLATE "default"
            FOR UPDATE
        ) AS kept
    ) AS locked ON true
"""
_LOCK_CALLS = f"""
    SELECT {_CALL} FROM {SCHEMA}.calls WHERE id = ANY ($1::text[]) ORDER BY id COLLATE "C" FOR UPDATE
"""
_PUT_COUNTERS = _update(counters, [column.name for column in counters.c])
_OPEN_CALLS = f"INSERT INTO {SCHEMA}.calls ({_CALL}) SELECT * FROM unnest({_arrays([*calls.c])})"
_CHANGE_CALLS = _update(calls, [*CHANGING, "id"])
_RENEW_LEASE = f"""
    WITH forgotten AS (DELETE FROM {SCHEMA}.owners WHERE alive_until < {_NOW} - $3::bigint)
    INSERT INTO {SCHEMA}.owners (id, alive_until) VALUES ($1::text, {_NOW} + $2::bigint)
    ON CONFLICT (id) DO UPDATE SET alive_until = excluded.alive_until
"""
# In the order of the fields of postgres' writer.
WRITING = (_MAKE_COUNTERS, _LOCK_COUNTERS, _LOCK_CALLS, _PUT_COUNTERS, _OPEN_CALLS, _CHANGE_CALLS, _RENEW_LEASE)

READ_COUNTERS = f"""
    SELECT kept.* FROM {_GIVEN_KEYS} CROSS JOIN LATERAL (
        SELECT {_COUNTER} FROM {SCHEMA}.counters WHERE subject = given.subject AND quota_id = given.quota_id OFFSET 0
    ) AS kept
"""
READ_CALL = f"SELECT {_CALL} FROM {SCHEMA}.calls WHERE id = $1"
READ_MAKER = f"SELECT {_CALL} FROM {SCHEMA}.calls WHERE response_id = $1 ORDER BY id DESC LIMIT 1"
ORPHANS = f"""
    SELECT id FROM {SCHEMA}.calls WHERE state = 'open' AND owner <> $1
    AND NOT EXISTS (SELECT FROM {SCHEMA}.owners WHERE owners.id = calls.owner AND alive_until > {_NOW})
    ORDER BY id LIMIT $2
"""

# The maintenance jobs. Parameters: $1 the limit, $2 the key after which to start, $3 the instant, $4 an id of then. Each
# is one statement that returns how many rows it touched and the last key. Rows that another process has locked (it is
# counting, deleting or settling them) are left to it, or to the next run. Each is served by an index in its order.
ROLL_UP = f"""
    WITH chosen AS (
        SELECT id, counted_as FROM {SCHEMA}.calls WHERE {UNCOUNTED} AND id > coalesce($2::text, '')
        ORDER BY id LIMIT $1::bigint FOR UPDATE SKIP LOCKED
    ),
    counted AS (
        UPDATE {SCHEMA}.calls AS kept SET counted_as = state FROM chosen WHERE kept.id = chosen.id
        RETURNING kept.*, chosen.counted_as AS was
    ),
    added AS (INSERT INTO {SCHEMA}.usage_by_day ({DAY_COLUMNS}) {ADDED_TO_DAYS} FROM counted {UPSERT_DAYS})
    SELECT count(*), max(id) FROM counted
"""
DELETE_CALLS = f"""
    WITH old AS (
        SELECT id FROM {SCHEMA}.calls WHERE id > coalesce($2::text, '') AND id < $4::text AND reserved_at < $3::bigint
        AND counted_as = state AND state <> 'open' ORDER BY id LIMIT $1::bigint FOR UPDATE SKIP LOCKED
    ),
    deleted AS (DELETE FROM {SCHEMA}.calls AS kept USING old WHERE kept.id = old.id RETURNING kept.id)
    SELECT count(*), max(id) FROM deleted
"""
DELETE_DAYS = f"""
    WITH old AS (
        SELECT {DAY_KEY} FROM {SCHEMA}.usage_by_day WHERE day >= coalesce(CAST($2::text AS bigint), 0)
        AND day < $3::bigint ORDER BY {DAY_KEY} LIMIT $1::bigint FOR UPDATE SKIP LOCKED
    ),
    deleted AS (
        DELETE FROM {SCHEMA}.usage_by_day WHERE ({DAY_KEY}) IN (SELECT {DAY_KEY} FROM old) RETURNING day
    )
    SELECT count(*), CAST(max(day) AS text) FROM deleted
"""


# ------------------------------------------------------------------------------------------------------------ store

T = TypeVar("T")


class PostgresStore:
    """One PostgreSQL database, by its URL; see `store.Store`. One connection writes, up to two read."""

    def __init__(self, url: str, *, timeouts: Timeouts | None = None) -> None:
        self._url = url
        self._timeouts = timeouts or Timeouts()
        self._begin = begin(self._timeouts)
        self._writer: _Writer | None = None
        self._writing = asyncio.Lock()
        self._idle_readers: list[Any] = []
        self._reading = asyncio.Semaphore(_READERS)

    async def open(self) -> None:
        """Bring the schema up to date, which several processes may want at once; one does it.

        Raises StoreUnavailable, or tables.NewerSchema.
        """
        engine = create_async_engine("postgresql+asyncpg://", async_creator=self._connect, poolclass=NullPool)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(_migrate)
        except _FAILURES as error:
            raise StoreUnavailable(f"PostgreSQL can't be used: {_said(error)}") from error
        finally:
            await engine.dispose()

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        """Do these acts in order, in one transaction, and answer each; by the database's time, not by `now`."""
        return await self._transaction(lambda writer: _apply(writer, operations))

    async def renew(self, owner: str, now: int, *, lease_ms: int) -> None:
        """Say that the process `owner` is alive for so long from now, which the database knows."""
        await self._transaction(lambda writer: writer.renew(owner, lease_ms, _FORGET_OWNER_MS))

    async def orphans(self, owner: str, now: int, *, limit: int) -> list[str]:
        """The ids of open calls of other processes whose lease has run out, by the database's time."""
        return [row[0] for row in await self._read(ORPHANS, owner, limit)]

    async def read_counters(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        """How these counters stand, read without a lock."""
        return counters_of(await self._read(READ_COUNTERS, *_columns(keys, 2)))

    async def read_entry(self, entry_id: str) -> Entry | None:
        """One call in the books."""
        return next(map(entry_of, await self._read(READ_CALL, entry_id)), None)

    async def find_response_entry(self, response_id: str) -> Entry | None:
        """The call that made this response."""
        return next(map(entry_of, await self._read(READ_MAKER, response_id)), None)

    async def roll_up(self, limit: int, after: str | None) -> JobResult:
        """Add ended calls to the sums of their days."""
        return await self._run_job(ROLL_UP, limit, after)

    async def delete_calls(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete old calls."""
        return await self._run_job(DELETE_CALLS, limit, after, before, call_id_prefix(max(0, before)))

    async def delete_days(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete old sums."""
        return await self._run_job(DELETE_DAYS, limit, after, before)

    async def close(self) -> None:
        """Close the connections."""
        connections = [*self._idle_readers, *([self._writer.connection] if self._writer else [])]
        self._idle_readers, self._writer = [], None
        for connection in connections:
            try:
                await connection.close(timeout=self._timeouts.probe_ms / 1000)
            except _FAILURES:
                connection.terminate()

    async def _run_job(self, statement: str, *given: object) -> JobResult:
        """Run one step of a maintenance job beside the batches, in a transaction with their timeouts and plans."""
        try:
            async with asyncio.timeout(self._timeouts.whole_ms / 1000), self._reader() as connection:
                await connection.execute(self._begin)
                rows, last = await connection.fetchrow(statement, *given)
                await connection.execute("COMMIT")
                return JobResult(rows, last)
        except _FAILURES as error:
            raise StoreUnavailable(_said(error)) from error

    async def _connect(self) -> Any:
        try:
            # Without a cache the driver gives statements no names.
            return await asyncpg.connect(self._url, timeout=self._timeouts.connect_ms / 1000, statement_cache_size=0)
        except ValueError:
            raise StoreUnavailable("the driver can't read the database's URL") from None  # nor may it be shown

    async def _transaction(self, work: "Callable[[_Writer], Awaitable[T]]") -> T:
        """Do `work` in a transaction of its own; again, where it collided with that of somebody else."""
        async with self._writing:
            for attempt in range(_TRIES):
                try:
                    return await self._try(work)
                except _COLLISIONS as error:
                    collision = error
                await asyncio.sleep(random.uniform(0, 0.01 * 2**attempt))
        raise StoreUnavailable(_said(collision)) from collision

    async def _try(self, work: "Callable[[_Writer], Awaitable[T]]") -> T:
        is_committing = False
        try:
            async with asyncio.timeout(self._timeouts.whole_ms / 1000):
                writer = await self._begun()
                done = await work(writer)
                is_committing = True
                await writer.connection.execute("COMMIT")
                return done
        except (*_REFUSALS, *_COLLISIONS) as error:
            await self._roll_back()
            if isinstance(error, _REFUSALS):
                raise StoreRefused(_said(error)) from error
            raise
        except _FAILURES as error:
            self._drop_writer()  # also where it would still answer: it may be a server that can't write any more
            raise StoreUnavailable(_said(error), is_uncertain=is_committing) from error
        except Exception:
            await self._roll_back()
            raise
        except BaseException:
            self._drop_writer()
            raise

    async def _begun(self) -> "_Writer":
        """The writing connection, in a transaction; a new one, where that of the last batch has gone meanwhile."""
        if self._writer is not None:
            try:
                await self._writer.connection.execute(self._begin, timeout=self._timeouts.probe_ms / 1000)
                return self._writer
            except _FAILURES:
                self._drop_writer()
        self._writer = await _Writer.on(await self._connect())
        await self._writer.connection.execute(self._begin)
        return self._writer

    async def _roll_back(self) -> None:
        """Leave no transaction open; a connection on which that fails is of no more use."""
        if self._writer is None:
            return
        try:
            await self._writer.connection.execute("ROLLBACK", timeout=self._timeouts.probe_ms / 1000)
        except _FAILURES:
            self._drop_writer()

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.connection.terminate()
            self._writer = None

    async def _read(self, statement: str, *given: object) -> list[Row]:
        try:
            async with self._reader() as connection:
                rows: list[Row] = await connection.fetch(
                    statement, *given, timeout=self._timeouts.statement_ms / 1000
                )
                return rows
        except _FAILURES as error:
            raise StoreUnavailable(_said(error)) from error

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Any]:
        async with self._reading:
            self._idle_readers = [reader for reader in self._idle_readers if not reader.is_closed()]
            connection = self._idle_readers.pop() if self._idle_readers else await self._connect()
            try:
                yield connection
            except BaseException:
                connection.terminate()
                raise
            self._idle_readers.append(connection)


@dataclass(frozen=True, slots=True)
class _Writer:
    """A connection and its statements: their types were asked for once, their text is sent each time."""

    connection: Any
    make_counters: Any
    lock_counters: Any
    lock_calls: Any
    put_counters: Any
    open_calls: Any
    change_calls: Any
    renew_lease: Any

    @classmethod
    async def on(cls, connection: Any) -> "_Writer":
        try:
            return cls(connection, *[await connection.prepare(text) for text in WRITING])
        except BaseException:
            connection.terminate()
            raise

    async def renew(self, owner: str, lease_ms: int, forget_ms: int) -> None:
        await self.renew_lease.fetch(owner, lease_ms, forget_ms)


async def _apply(writer: _Writer, operations: Sequence[Operation]) -> list[Reply]:
    books = await _load(writer, operations)
    known = list(books.entries)
    answers = [books.apply(operation) for operation in operations]
    changes = changes_of(books, known)
    for statement, rows in (
        (writer.put_counters, changes.counters),
        (writer.open_calls, changes.opened),
        (writer.change_calls, changes.changed),
    ):
        if rows:
            await statement.fetch(*zip(*rows, strict=True))
    return answers


async def _load(writer: _Writer, operations: Sequence[Operation]) -> Book:
    """Lock what the acts touch, in the one order; what nobody else can change any more is what they are applied to.

    Which counters a call holds something of is read while it may still be growing: it then holds more of the same.
    """
    subjects, quota_ids = _columns(sorted(keys_of(operations)), 2)
    if subjects:
        await writer.make_counters.fetch(subjects, quota_ids)
    ids = sorted({operation.id for operation in operations})
    locked = await writer.lock_counters.fetch(subjects, quota_ids, ids)
    now = max(row[0] for row in locked)
    entries = {entry.id: entry for entry in map(entry_of, await writer.lock_calls.fetch(ids))}
    return Book(counters_of(row[1:] for row in locked if row[1] is not None), entries, now)


def _columns(rows: Sequence[Sequence[Any]], width: int) -> list[list[Any]]:
    return [[row[place] for row in rows] for place in range(width)]


def _said(error: BaseException) -> str:
    """What an error says, without what it was given: a statement's parameters are nobody's business."""
    if isinstance(error, DBAPIError):
        return str(error.orig)
    if isinstance(error, TimeoutError):
        return "the database did not answer in time"
    return str(error) or type(error).__name__


def _migrate(connection: Connection) -> None:
    """Make the schema, or bring it up to date; in one transaction, and by one process at a time."""
    connection.execute(sa.text("SET LOCAL lock_timeout = '60s'"))
    connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
    # Who has been given the schema need not have the right to make one.
    if not connection.scalar(sa.text("SELECT to_regnamespace(:name)::oid").bindparams(name=SCHEMA)):
        connection.execute(sa.text(f"CREATE SCHEMA {SCHEMA}"))
    connection.execute(sa.text(f"SET LOCAL search_path TO {SCHEMA}"))
    migrate(connection)
