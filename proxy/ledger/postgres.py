"""The ledger in a PostgreSQL database, which any number of processes on any number of machines share.

A batch is one transaction of four round trips:

    begin ─▶ make missing counters, lock counters, lock calls ─▶ apply operations ─▶ write ─▶ commit

The second and the fourth step are functions in the database (migration 0008): there each statement sees what was
committed before it began. In one statement with several parts, all parts would see what was committed before the
first. Rows are passed to the functions as JSON, because asyncpg takes ten times as long for arrays.

The row locks make the ledger exact: until the commit no other process can change what the operations were applied to.

All processes make and lock rows in the same order, counters by key and then calls by id. So batches can wait for each
other, but never in a circle. Example: one batch needs the counters A and B, another B and A. If each locked in its
own order, the first could hold A and wait for B while the second holds B and waits for A: a deadlock. As both begin
with A, the second waits for A and holds nothing that the first needs. Missing counters are made before any counter is
locked; locking first and inserting later deadlocked in a third of all batches.

The statement that locks the counters also returns the time that decides windows, so all processes go by one clock.

The timeouts are set in each transaction and no statement has a name, so the store works through pgbouncer, where the
next transaction may run on another connection. A process that stops in the middle of a batch loses its transaction,
and with it its locks, after a few seconds.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncpg
import orjson
import sqlalchemy as sa
import structlog
from asyncpg.exceptions import DataError, IntegrityConstraintViolationError
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from proxy.ledger.book import Book, Operation, Reply
from proxy.ledger.entry import Entry, call_id_prefix
from proxy.ledger.primary import FAILURES, WAL_FILE, Primary, Server, Timeouts, reason_of, state_of
from proxy.ledger.rows import Row, as_json, changes_of, counters_of, entry_of, keys_of
from proxy.ledger.schema import (
    ADDED_TO_DAYS,
    DAY_COLUMNS,
    DAY_KEY,
    SCHEMA,
    UNCOUNTED,
    UPSERT_DAYS,
    calls,
    check_schema,
    counters,
    has_schema,
    metadata,
    migrate,
)
from proxy.ledger.store import JobResult, StoreInUse, StoreRefused
from proxy.policy.quota import Counter, CounterKey

log = structlog.get_logger("ledger")

# An arbitrary number that must not change: the process that holds this advisory lock migrates, the others wait.
_MIGRATION_LOCK = 0x11_90_07_A5
# How often a transaction is run if each run collides with a transaction of another process.
_RUNS_MAX = 5
_READERS = 2
# Connections for the directory and reports: one is left for its polls while two look up callers.
_CHANGERS = 3
# A process that has been dead for a week has no open calls any more. Each start has a new name, so old ones add up.
_FORGET_OWNER_MS = 7 * 86_400_000

# Errors that are caused by a value in the batch. All other errors are caused by the database, and may pass.
_REFUSALS = (DataError, IntegrityConstraintViolationError, orjson.JSONEncodeError)
_REFUSED_STATES = ("22", "23")  # their SQLSTATEs, which are left when SQLAlchemy has wrapped them
# Deadlock, serialization failure and lock timeout: the same transaction may succeed a moment later.
_COLLISIONS = (
    asyncpg.exceptions.DeadlockDetectedError,
    asyncpg.exceptions.SerializationError,
    asyncpg.exceptions.LockNotAvailableError,
)


# --------------------------------------------------------------------------------------------------------- statements


# `idle_ms` does not end the transaction of a client that stops in the middle of sending a statement, because the
# server is then not idle but reading. Only `transaction_timeout` does. It exists since PostgreSQL 17; an older server
# is given a setting of ours instead, which has no effect.
_SET_BATCH_TIMEOUT = f"""
    SELECT set_config(CASE WHEN current_setting('server_version_num')::int < 170000 THEN '{SCHEMA}.none'
    ELSE 'transaction_timeout' END, '{{}}', true)
"""


def begin(timeouts: Timeouts) -> str:
    """The statements that begin a transaction, with settings that end with it.

    A batch looks up at most a few hundred keys, for which a scan of a table is always slower than its index. The
    planner is not left to decide that: with a million counters, and after the table was analyzed, it scanned the
    table in each batch, which left 120 calls a second.
    """
    settings = {
        **_timeout_settings(timeouts),
        **dict.fromkeys(("enable_hashjoin", "enable_mergejoin", "enable_seqscan", "jit"), "off"),
    }
    limits = "; ".join(f"SET LOCAL {name} = {value}" for name, value in settings.items())
    return f"BEGIN ISOLATION LEVEL READ COMMITTED; {limits}; {_SET_BATCH_TIMEOUT.format(timeouts.batch_ms)}"


def _timeout_settings(timeouts: Timeouts) -> dict[str, int]:
    """The server's timeouts in a transaction, by the names of its settings, in ms."""
    return {
        "idle_in_transaction_session_timeout": timeouts.idle_ms,
        "lock_timeout": timeouts.lock_ms,
        "statement_timeout": timeouts.statement_ms,
    }


# A server may have limits for all sessions, which a migration or a copy may exceed.
_UNLIMITED = {"statement_timeout": 0, "idle_in_transaction_session_timeout": 0, "lock_timeout": "10s"}
_LOCK_TABLES = f"LOCK TABLE {', '.join(f'{SCHEMA}.{name}' for name in metadata.tables)} IN {{}} MODE"
_NOW = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_COUNTER, _CALL = (", ".join(column.name for column in table.c) for table in (counters, calls))
_GIVEN_KEYS = "unnest($1::text[], $2::text[]) AS given(subject, quota_id)"

# By the fields of `_Writer`. A row of `begin_batch` is a counter or a call, and has the columns of both. Behind a
# pooler the server may be replaced while our connection stays, so the renewal asks for the timeline too.
WRITER_STATEMENTS = {
    "begin_batch": f"SELECT * FROM {SCHEMA}.begin_batch_v1($1::jsonb, $2::jsonb)",
    "end_batch": f"SELECT {SCHEMA}.end_batch_v1($1::jsonb, $2::jsonb, $3::jsonb)",
    "renew_lease": f"""
        WITH forgotten AS (DELETE FROM {SCHEMA}.owners WHERE alive_until < {_NOW} - $3::bigint)
        INSERT INTO {SCHEMA}.owners (id, alive_until) VALUES ($1::text, {_NOW} + $2::bigint)
        ON CONFLICT (id) DO UPDATE SET alive_until = excluded.alive_until
        RETURNING alive_until - $2::bigint, {WAL_FILE}
    """,
}
_CALL_AT = 1 + len(counters.c)

READ_OPEN_CALLS = f"SELECT id FROM {SCHEMA}.calls WHERE state = 'open' AND owner = $1"
# OFFSET 0 keeps the planner from merging the lookups into one join, which could scan the whole table.
READ_COUNTERS = f"""
    SELECT kept.* FROM {_GIVEN_KEYS} CROSS JOIN LATERAL (
        SELECT {_COUNTER} FROM {SCHEMA}.counters WHERE subject = given.subject AND quota_id = given.quota_id OFFSET 0
    ) AS kept
"""
READ_RESPONSE_CALL = f"SELECT {_CALL} FROM {SCHEMA}.calls WHERE response_id = $1 ORDER BY id DESC LIMIT 1"
READ_ORPHANS = f"""
    SELECT id FROM {SCHEMA}.calls WHERE state = 'open' AND owner <> $1
    AND NOT EXISTS (SELECT FROM {SCHEMA}.owners WHERE owners.id = calls.owner AND alive_until > {_NOW})
    ORDER BY id LIMIT $2
"""

# The maintenance jobs. Parameters: $1 the limit, $2 the key after which to start, $3 an instant, $4 the id prefix of
# that instant. Each is one statement that returns how many rows it touched and the last key. It skips rows that
# another process has locked, because that process counts, deletes or settles them; the next run finds what is left of
# them. Each reads an index in its order, so no step scans a table.
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

# -------------------------------------------------------------------------------------------------------------- store

T = TypeVar("T")


class PostgresStore:
    """One PostgreSQL database, by its URL; see `store.Store`. One connection writes, and at most two read.

    Without `migrates`, `open` only checks the schema.
    """

    def __init__(self, url: str, *, timeouts: Timeouts | None = None, migrates: bool = True) -> None:
        self._migrates = migrates
        self._timeouts = timeouts or Timeouts()
        self._primary = Primary(url, self._timeouts)
        self._primary.on_failover(self._forget_readers)
        self._begin = begin(self._timeouts)
        # For a change: a process that stops in the middle of it must not keep others from changing anything.
        self._set_timeouts = sa.select(
            *(sa.func.set_config(name, str(ms), True) for name, ms in _timeout_settings(self._timeouts).items())
        )
        self._writer: _Writer | None = None
        self._writing = asyncio.Lock()
        self._idle_readers: list[Any] = []
        self._change_engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._primary.connect,
            pool_size=_CHANGERS,
            max_overflow=0,
            pool_pre_ping=True,
            execution_options={"schema_translate_map": {None: SCHEMA}},
        )
        self._reading = asyncio.Semaphore(_READERS)
        # Connections to the server before the last failover are not used again.
        sa.event.listen(self._change_engine.sync_engine, "connect", self._mark_connection)
        sa.event.listen(self._change_engine.sync_engine, "checkout", self._check_connection)

    # Opening and closing

    async def open(self) -> None:
        """Migrate the schema. If several processes start at once, one migrates and the others wait.

        Raises StoreUnavailable or schema.NewerSchema.
        """
        if not self._migrates:
            await self.attach()
            return
        async with self._unlimited() as connection:
            is_new = await connection.run_sync(_migrate, self._primary.name)
        if is_new:
            log.warning("a new database was made, in which all quotas are unused", database=self._primary.name)

    async def close(self) -> None:
        """Close the connections, all at the same time. If the server does not answer, they are cut off."""
        connections = [*self._idle_readers, *([self._writer.connection] if self._writer else [])]
        self._idle_readers, self._writer = [], None
        await asyncio.gather(self._close_pool(), *map(self._close_connection, connections))

    async def _close_pool(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeouts.probe_ms / 1000):
                await self._change_engine.dispose()

    async def _close_connection(self, connection: Any) -> None:
        try:
            await connection.close(timeout=self._timeouts.probe_ms / 1000)
        except FAILURES:
            connection.terminate()

    def on_failover(self, callback: Callable[[], object]) -> None:
        """Call `callback` whenever another server has the database than before."""
        self._primary.on_failover(callback)

    def _forget_readers(self) -> None:
        idle, self._idle_readers = self._idle_readers, []
        for reader in idle:
            reader.terminate()

    def _mark_connection(self, _: Any, record: Any) -> None:
        record.info["server"] = self._primary.server

    def _check_connection(self, _: Any, record: Any, __: Any) -> None:
        if record.info["server"] != self._primary.server:
            raise sa.exc.DisconnectionError  # then the pool makes a new one

    # Writing

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        """Apply these operations in this order, in one transaction, at the database's time instead of `now`."""
        return await self._transaction(lambda writer: _apply(writer, operations))

    async def renew(self, owner: str, now: int, *, lease_ms: int) -> int:
        """Let the lease of the process `owner` end `lease_ms` from now, by the database's clock. Returns its time."""
        now, wal_file = await self._transaction(
            lambda writer: writer.renew_lease.fetchrow(owner, lease_ms, _FORGET_OWNER_MS)
        )
        self._primary.note_timeline(wal_file)
        return now

    async def _transaction(self, work: "Callable[[_Writer], Awaitable[T]]") -> T:
        """Run `work` in a transaction of its own, and again if it collided with another process."""
        async with self._writing:
            for run in range(_RUNS_MAX):
                try:
                    return await self._run_transaction(work)
                except _COLLISIONS as error:
                    collision = error
                # A random pause, so that two processes that collided do not collide again.
                await asyncio.sleep(random.uniform(0, 0.01 * 2**run))
        raise self._primary.unavailable(collision) from collision

    async def _run_transaction(self, work: "Callable[[_Writer], Awaitable[T]]") -> T:
        is_committing = False
        try:
            async with asyncio.timeout(self._timeouts.whole_ms / 1000):
                writer = await self._begin_transaction()
                result = await work(writer)
                is_committing = True
                await writer.connection.execute("COMMIT")
                return result
        except (*_REFUSALS, *_COLLISIONS) as error:
            await self._roll_back()
            if isinstance(error, _REFUSALS):
                raise StoreRefused(reason_of(error)) from error
            raise
        except FAILURES as error:
            # The connection is dropped even if it still works: after a failover it may lead to a server that is now
            # read-only, and a new connection to the new primary.
            self._drop_writer()
            raise self._primary.unavailable(error, is_uncertain=is_committing) from error
        except Exception:  # a rule raised it: the connection is fine
            await self._roll_back()
            raise
        except BaseException:  # cancelled: a statement may be running, so the connection cannot be used again
            self._drop_writer()
            raise

    async def _begin_transaction(self) -> "_Writer":
        """The writing connection, in a new transaction. A connection that has broken meanwhile is replaced."""
        if self._writer is not None and self._writer.server != self._primary.server:
            self._drop_writer()
        if self._writer is not None:
            try:
                await self._writer.connection.execute(self._begin, timeout=self._timeouts.probe_ms / 1000)
                return self._writer
            except FAILURES:
                self._drop_writer()
        self._writer = await _Writer.on(await self._primary.connect(), self._primary.server)
        await self._writer.connection.execute(self._begin)
        return self._writer

    async def _roll_back(self) -> None:
        """End the transaction. A connection that cannot do that is dropped."""
        if self._writer is None:
            return
        try:
            await self._writer.connection.execute("ROLLBACK", timeout=self._timeouts.probe_ms / 1000)
        except FAILURES:
            self._drop_writer()

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.connection.terminate()
            self._writer = None

    # Reading, and maintenance beside the batches

    async def orphans(self, owner: str, now: int, *, limit: int) -> list[str]:
        """The ids of open calls of other processes whose lease has run out, by the database's clock."""
        return [row[0] for row in await self._read(READ_ORPHANS, owner, limit)]

    async def open_calls(self, owner: str) -> list[str]:
        """The ids of the open calls of the process `owner`."""
        return [row[0] for row in await self._read(READ_OPEN_CALLS, owner)]

    async def read_counters(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        """The committed counters with these keys."""
        subjects, quota_ids = [key[0] for key in keys], [key[1] for key in keys]
        return counters_of(await self._read(READ_COUNTERS, subjects, quota_ids))

    async def find_response_entry(self, response_id: str) -> Entry | None:
        """The entry of the call that made this response."""
        return next(map(entry_of, await self._read(READ_RESPONSE_CALL, response_id)), None)

    async def roll_up(self, limit: int, after: str | None) -> JobResult:
        """Add ended calls to the sums of their days."""
        return await self._run_job(ROLL_UP, limit, after)

    async def delete_calls(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete old calls."""
        return await self._run_job(DELETE_CALLS, limit, after, before, call_id_prefix(max(0, before)))

    async def delete_days(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete old sums of days."""
        return await self._run_job(DELETE_DAYS, limit, after, before)

    async def attach(self) -> None:
        """Make ready for `transaction` beside the processes that serve."""
        async with self.transaction() as connection:
            await connection.execute(sa.text(f"SET LOCAL search_path TO {SCHEMA}"))
            await connection.run_sync(check_schema, f"The database {self._primary.name}")

    @asynccontextmanager
    async def transaction(self, *, writes: bool = False) -> AsyncIterator[AsyncConnection]:
        """A transaction for the directory and for reports."""
        try:
            async with asyncio.timeout(self._timeouts.whole_ms / 1000), self._change_engine.begin() as connection:
                if writes:
                    await connection.execute(self._set_timeouts)
                yield connection
        except FAILURES as error:
            raise self._translated(error) from error

    # Copying the database as a whole

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that reads everything while nobody can write, neither a proxy nor a command."""
        async with self._unlimited() as connection:
            await connection.execute(sa.text(f"SET LOCAL search_path TO {SCHEMA}"))
            await connection.run_sync(check_schema, f"The database {self._primary.name}", exactly=True)
            await self._refuse_live_processes(connection)
            await connection.execute(sa.text(_LOCK_TABLES.format("SHARE")))
            # One may have started while the locks were waited for.
            await self._refuse_live_processes(connection)
            yield connection

    async def _refuse_live_processes(self, connection: AsyncConnection) -> None:
        """Raise StoreInUse if the lease of any process has not run out."""
        if await connection.scalar(sa.text(f"SELECT count(*) FROM owners WHERE alive_until > {_NOW}")):
            raise StoreInUse(
                f"A proxy uses the database {self._primary.name}, or did so less than a minute ago. Stop all "
                "replicas, and try again a minute later."
            )

    @asynccontextmanager
    async def filling(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that makes the tables where they are missing, and fills them."""
        async with self._unlimited() as connection:
            await connection.run_sync(_migrate, self._primary.name)
            await connection.execute(sa.text(_LOCK_TABLES.format("EXCLUSIVE")))
            yield connection

    @asynccontextmanager
    async def _unlimited(self) -> AsyncIterator[AsyncConnection]:
        """A transaction on a connection of its own. It may take as long as it needs, but waits 10 s for a lock."""
        engine = create_async_engine("postgresql+asyncpg://", async_creator=self._primary.connect, poolclass=NullPool)
        try:
            async with engine.begin() as connection:
                for name, limit in _UNLIMITED.items():
                    await connection.execute(sa.text(f"SET LOCAL {name} = '{limit}'"))
                yield connection
        except FAILURES as error:
            raise self._translated(error) from error
        finally:
            await engine.dispose()

    def _translated(self, error: BaseException) -> Exception:
        """The error of a transaction of SQLAlchemy."""
        if state_of(error).startswith(_REFUSED_STATES):
            return StoreRefused(reason_of(error))
        return self._primary.unavailable(error)

    async def _run_job(self, statement: str, *parameters: object) -> JobResult:
        """Run one step of a maintenance job on a reading connection, with the timeouts and settings of a batch."""
        try:
            async with asyncio.timeout(self._timeouts.whole_ms / 1000), self._reader() as connection:
                await connection.execute(self._begin)
                rows, last = await connection.fetchrow(statement, *parameters)
                await connection.execute("COMMIT")
                return JobResult(rows, last)
        except FAILURES as error:
            raise self._primary.unavailable(error) from error

    async def _read(self, statement: str, *parameters: object) -> list[Row]:
        try:
            async with self._reader() as connection:
                rows: list[Row] = await connection.fetch(
                    statement, *parameters, timeout=self._timeouts.statement_ms / 1000
                )
                return rows
        except FAILURES as error:
            raise self._primary.unavailable(error) from error

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Any]:
        """A connection for one read or job. It is kept for the next one, unless anything failed on it."""
        async with self._reading:
            self._idle_readers = [reader for reader in self._idle_readers if not reader.is_closed()]
            connection = self._idle_readers.pop() if self._idle_readers else await self._primary.connect()
            server = self._primary.server
            try:
                yield connection
            except BaseException:
                connection.terminate()
                raise
            if server == self._primary.server:
                self._idle_readers.append(connection)
            else:
                connection.terminate()


@dataclass(frozen=True, slots=True)
class _Writer:
    """The connection that writes, and its prepared statements.

    The types of their parameters are asked for once. As they have no names, their text is sent each time.
    """

    connection: Any
    server: Server | None
    begin_batch: Any
    end_batch: Any
    renew_lease: Any

    @classmethod
    async def on(cls, connection: Any, server: Server | None) -> "_Writer":
        statements = WRITER_STATEMENTS
        if server is None:  # it does not let us ask
            statements = {name: text.replace(WAL_FILE, "NULL") for name, text in statements.items()}
        try:
            prepared = {name: await connection.prepare(text) for name, text in statements.items()}
            return cls(connection, server, **prepared)
        except BaseException:
            connection.terminate()
            raise


async def _apply(writer: _Writer, operations: Sequence[Operation]) -> list[Reply]:
    book = await _load(writer, operations)
    known = {*book.entries}
    replies = [book.apply(operation) for operation in operations]
    changes = changes_of(book, known)
    if changes.counters or changes.opened or changes.changed:
        await writer.end_batch.fetch(*map(as_json, (changes.counters, changes.opened, changes.changed)))
    return replies


async def _load(writer: _Writer, operations: Sequence[Operation]) -> Book:
    """Lock and load the counters and calls that the operations touch.

    The counters of a call are read from its row before that row is locked. Another process may extend the call in
    between. That does not matter, because an extend adds no counter: it raises what is held of the same ones.
    """
    ids = [operation.id for operation in operations]
    rows = await writer.begin_batch.fetch(as_json(list(keys_of(operations))), as_json(ids))
    now = max(row[0] for row in rows if row[0] is not None)
    found = counters_of(row[1:_CALL_AT] for row in rows if row[1] is not None)
    entries = {row[_CALL_AT]: entry_of(row[_CALL_AT:]) for row in rows if row[_CALL_AT] is not None}
    return Book({**found}, entries, now)


def _migrate(connection: Connection, name: str) -> bool:
    """Create or migrate the schema, in one transaction and in one process at a time. Returns whether it is new."""
    connection.execute(sa.text("SET LOCAL lock_timeout = '60s'"))
    connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
    # Not CREATE SCHEMA IF NOT EXISTS, which needs the right to create a schema even if it is there. An operator may
    # have created it for a user that has no such right.
    if not connection.scalar(sa.text("SELECT to_regnamespace(:name)::oid").bindparams(name=SCHEMA)):
        connection.execute(sa.text(f"CREATE SCHEMA {SCHEMA}"))
    connection.execute(sa.text(f"SET LOCAL search_path TO {SCHEMA}"))
    is_new = not has_schema(connection)
    migrate(connection, f"The database {name}")
    return is_new
