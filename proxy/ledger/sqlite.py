"""The ledger in one SQLite file, for the processes of one machine.

A batch is one synchronous function on one connection, in a thread of its own: load what the batch touches, apply the
operations, write what changed, commit. This holds SQLite's write lock for 0.3 ms. One statement at a time through a
busy event loop held it for 42 ms. Reads for display go through aiosqlite beside it.

The statements of a batch are compiled once by SQLAlchemy and run on the driver's own connection. What a batch has
loaded or written is kept in memory for the next ones: counters and open calls, the most recent of each. `PRAGMA
data_version`, read when the batch has the lock, says whether another connection has changed the file: another worker,
an administrator, or a program of the operator. Then all of it is forgotten, and also after any failure. So a batch
never decides on what is not in the file.

Two advisory locks (flock) on files beside the database coordinate processes:

- `quotas.db.lock` is held while a store is open, so a second proxy on the same file is refused. It would take the
  open calls of the first for those of a dead process, and expire them. The workers of one parent share this lock.
  Once a database has been made, this file stays, empty, and shows later that there was one. If the database is gone
  then, it is not made anew, because all quotas would be unused again.
- `quotas.db.turn` is locked by a worker for each transaction. The system grants this lock in the order in which it
  was asked for. SQLite's own lock has no queue: a process that finds it taken sleeps and tries again, and may find it
  taken again and again. Without turns one process got 1 batch while another got 5,393.
"""

import asyncio
import fcntl
import os
import sqlite3
import stat
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import sqlalchemy as sa
import structlog
from sqlalchemy import URL, Connection, Dialect, bindparam, create_engine, event, func, select, tuple_
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool, StaticPool

from proxy.ledger.book import Book, Operation, Reply
from proxy.ledger.entry import Entry, call_id_prefix
from proxy.ledger.rows import CHANGING, Row, as_json, changes_of, counters_of, entry_of, keys_of
from proxy.ledger.schema import (
    ADDED_TO_DAYS,
    DAY_COLUMNS,
    DAY_KEY,
    UNCOUNTED,
    UPSERT_DAYS,
    calls,
    check_schema,
    counters,
    has_schema,
    migrate,
    owners,
)
from proxy.ledger.sqlite_files import (
    MAKING,
    SUFFIXES,
    has_content,
    lock_file,
    open_file,
    refuse_foreign_log,
    refuse_hard_links,
    remedy_of,
    stat_of,
)
from proxy.ledger.store import JobResult, StoreRefused, StoreUnavailable
from proxy.policy.quota import Counter, CounterKey

log = structlog.get_logger("ledger")

# Those that must stay what they are while the database is in use, and what to do if one does not.
_PUT_BACK = "put it back, or restart the proxy to use the file that is there now"
_STOP = "stop the proxy with SIGTERM, with which it writes all it has to the database, and start it again"
_IN_USE = {"": _PUT_BACK, "-wal": _STOP, "-shm": _STOP, ".lock": _STOP}
# How long a transaction waits for a lock that another program has on the file, in seconds.
_BUSY_TIMEOUT_S = 5.0
# Connections that read beside the batches: two for the directory's lookups, one for its polls, one for displays.
_READERS = 4
# Errors that are caused by a value in the batch. All other errors are caused by the database, and may pass.
_REFUSALS = (
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.NotSupportedError,
    sqlite3.ProgrammingError,
)
# Takes the write lock before the first read. A transaction that reads first and locks later would decide on counters
# that another process changes in between.
_BEGIN = "BEGIN IMMEDIATE"
# How many counters and open calls are kept in memory. A counter takes about 0.6 kB and a call 1.5 kB.
_COUNTERS_KEPT = 10_000
_CALLS_KEPT = 4_000

# --------------------------------------------------------------------------------------------------------- statements


class _Statements:
    """The statements of batches and reads as text, compiled once: compiling one takes longer than running it."""

    def __init__(self, dialect: Dialect) -> None:
        # Keys and ids are passed as one JSON array, so their number is not limited. As single parameters there could
        # be at most 32,766 of them in a statement.
        given = func.json_each(bindparam("given")).table_valued("value").c.value
        subject, quota_id = (func.json_extract(given, sa.literal_column(f"'$[{index}]'")) for index in (0, 1))
        is_given = tuple_(counters.c.subject, counters.c.quota_id).in_(select(subject, quota_id))
        put = insert(counters)
        values = {column.name: put.excluded[column.name] for column in counters.c if not column.primary_key}
        put = put.on_conflict_do_update(index_elements=[*counters.primary_key], set_=values)
        lease = insert(owners)
        lease = lease.on_conflict_do_update(index_elements=["id"], set_={"alive_until": lease.excluded.alive_until})
        change = sa.update(calls).where(calls.c.id == bindparam("call_id"))
        by_response = select(calls).where(calls.c.response_id == bindparam("response_id")).order_by(calls.c.id.desc())
        self.read_counters = str(select(counters).where(is_given).compile(dialect=dialect))
        self.read_calls = str(select(calls).where(calls.c.id.in_(select(given))).compile(dialect=dialect))
        self.read_response_call = f"{by_response.compile(dialect=dialect)} LIMIT 1"
        self.put_counters = str(put.compile(dialect=dialect))
        self.put_owner = str(lease.compile(dialect=dialect))
        self.open_calls = str(sa.insert(calls).compile(dialect=dialect))
        self.change_calls = str(change.compile(dialect=dialect, column_keys=CHANGING))


# The maintenance jobs. Parameters: ?1 the limit, ?2 the key after which to start, ?3 an instant, ?4 the id prefix of
# that instant. Each reads an index in its order (`calls_uncounted`, the primary keys), so no step scans a table.
# Both statements of ROLL_UP select the same calls, because they run in one transaction.
_UNCOUNTED_CALLS = f"FROM calls WHERE {UNCOUNTED} AND id > coalesce(?2, '') ORDER BY id LIMIT ?1"
ROLL_UP = (
    f"INSERT INTO usage_by_day ({DAY_COLUMNS}) {ADDED_TO_DAYS} FROM (SELECT *, counted_as AS was {_UNCOUNTED_CALLS}) "
    f"WHERE true {UPSERT_DAYS}",
    f"UPDATE calls SET counted_as = state WHERE id IN (SELECT id {_UNCOUNTED_CALLS})",
)
DELETE_CALLS = (
    "DELETE FROM calls WHERE id IN (SELECT id FROM calls WHERE id > coalesce(?2, '') AND id < ?4 "
    "AND reserved_at < ?3 AND counted_as = state AND state <> 'open' ORDER BY id LIMIT ?1)",
)
DELETE_DAYS = (
    f"DELETE FROM usage_by_day WHERE ({DAY_KEY}) IN (SELECT {DAY_KEY} FROM usage_by_day "
    f"WHERE day >= coalesce(CAST(?2 AS bigint), 0) AND day < ?3 ORDER BY {DAY_KEY} LIMIT ?1)",
)

# -------------------------------------------------------------------------------------------------------------- store

K = TypeVar("K")
T = TypeVar("T")


class _Recent(OrderedDict[K, T]):
    """Up to `most` values, those that were put last. A batch takes what it needs, and puts it back at its end."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def take(self, keys: Iterable[K]) -> tuple[dict[K, T], list[K]]:
        """Remove and return the values of these keys, and the keys that have none."""
        found: dict[K, T] = {}
        missing: list[K] = []
        for key in keys:
            if key in self:
                found[key] = self.pop(key)
            else:
                missing.append(key)
        return found, missing

    def put(self, values: Mapping[K, T]) -> None:
        """Add these values as the newest, and remove the oldest beyond the bound."""
        self.update(values)
        while len(self) > self._most:
            self.popitem(last=False)


class SqliteStore:
    """One SQLite file; see `store.Store`.

    `busy_timeout_s` is how long a transaction waits for a lock that another program has on the file. `lock` is the
    file descriptor of the lock that a parent holds for all its workers, as `hand_over` returned it. Without it, this
    process is the only one on the file. `may_be_new` allows it to make a database anew where there was one; a worker
    must not do that. Without `migrates`, the schema is only checked. A batch is decided at the time of `now` (ms
    since 1970) when it has the lock; without `now` at the time that `apply` is given.
    """

    def __init__(
        self,
        path: Path,
        *,
        busy_timeout_s: float = _BUSY_TIMEOUT_S,
        lock: int | None = None,
        may_be_new: bool = False,
        migrates: bool = True,
        now: Callable[[], int] | None = None,
    ) -> None:
        self._now = now
        self._path = path.resolve()  # a file has one lock, whether it is opened by a link or by a relative path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        arguments = {"timeout": busy_timeout_s}
        # One connection for all that the thread does. A second one would change the file behind what is kept.
        self._engine = create_engine(_url("sqlite", self._path), connect_args=arguments, poolclass=StaticPool)
        self._read_engine = create_async_engine(
            _url("sqlite+aiosqlite", self._path),
            connect_args=arguments,
            pool_size=_READERS,
            max_overflow=0,
            pool_timeout=busy_timeout_s,
        )
        self._may_be_new = may_be_new and lock is None
        self._migrates = migrates
        self._sql = _Statements(self._engine.dialect)
        self._db: sqlite3.Connection | None = None  # that of the engine, which stays open
        self._version: int | None = None  # of the file, when what is kept was read
        self._counters: _Recent[CounterKey, Counter | None] = _Recent(_COUNTERS_KEPT)  # None: it has no row
        self._calls: _Recent[str, Entry] = _Recent(_CALLS_KEPT)  # open ones
        self._opened_files: list[tuple[str, str, tuple[int, int]]] = []  # suffix, name, device and inode
        self._is_only_process = lock is None
        self._lock_file = -1 if lock is None else lock
        self._turn_file = -1
        # For rare transactions that write beside the batches: each has a connection of its own.
        self._change_engine = create_async_engine(
            _url("sqlite+aiosqlite", self._path), connect_args=arguments, poolclass=NullPool
        )
        for engine in (self._engine, self._change_engine.sync_engine):
            event.listen(engine, "connect", _configure)
            event.listen(engine, "begin", _begin_immediate)

    # Opening and closing

    async def open(self) -> None:
        """Lock the file, unless the parent has locked it, and migrate its schema.

        If the caller is cancelled, the thread still ends the migration, and `close` waits for it.
        Raises StoreInUse, StoreUnavailable (also if there was a database and it is gone) or schema.NewerSchema.
        """
        await self._in_thread(self._open)

    def hand_over(self) -> int:
        """A duplicate of the lock's file descriptor, for a worker.

        The file stays locked until all duplicates are closed, also after this store is closed.
        """
        return os.dup(self._lock_file)

    async def close(self) -> None:
        """Close the file and free its lock."""
        self._thread.shutdown()
        await self._read_engine.dispose()
        await self._change_engine.dispose()
        self._engine.dispose()
        for descriptor in (self._turn_file, self._lock_file):
            if descriptor >= 0:
                os.close(descriptor)
        # The system may give these numbers to other files now: closing twice must not close those.
        self._turn_file = self._lock_file = -1

    def _open(self) -> None:
        if os.path.isdir(self._path):
            raise StoreUnavailable(f"{self._path} is a folder: write the path of a file in `database`")
        lock = f"{self._path}.lock"
        if self._is_only_process:
            self._lock_file = lock_file(lock, self._path)
            had_database = os.pread(self._lock_file, len(MAKING), 0) != MAKING
            refuse_hard_links(self._path)
        else:
            self._turn_file = open_file(f"{self._path}.turn", os.O_CREAT)
            had_database = os.path.exists(lock)
        self._in_turn(self._migrate, had_database)
        if self._is_only_process:
            os.ftruncate(self._lock_file, 0)
        # The connection that has migrated stays open, so SQLite does not delete the log and its index meanwhile.
        for suffix in _IN_USE:
            file = f"{self._path}{suffix}"
            found = stat_of(file)
            if found is not None:
                self._opened_files.append((suffix, file, (found.st_dev, found.st_ino)))

    def _migrate(self, had_database: bool) -> None:
        has_database, has_log = (has_content(f"{self._path}{suffix}") for suffix in ("", "-wal"))
        # Checked before SQLite opens the file, because it deletes the log of a database that is gone or empty.
        if not has_database and (had_database or has_log):
            self._refuse_new()
        refuse_foreign_log(self._path)
        if not has_database:
            if not self._migrates:
                raise StoreUnavailable(f"{self._path} is not a database yet: run `llm-quota-proxy migrate`")
            os.close(open_file(str(self._path), os.O_CREAT))
        self._restrict_files()
        with self._translated_errors(), self._engine.begin() as connection:
            is_new = not has_schema(connection)
            if is_new and had_database:
                self._refuse_new()
            (migrate if self._migrates else check_schema)(connection, f"The database {self._path}")
        if is_new:
            log.warning("a new database was made, in which all quotas are unused", database=str(self._path))

    def _refuse_new(self) -> None:
        """Raise StoreUnavailable, unless a database may be made where there was one."""
        if not self._may_be_new:
            raise StoreUnavailable(
                f"{self._path} is gone or empty, and the files beside it show that it was a database. Put it back, "
                "from a backup if need be, or correct `database`. To make a new one, with all quotas unused, run "
                "`llm-quota-proxy migrate`, or `serve --new-database` once."
            )

    def _restrict_files(self) -> None:
        """Let only the owner read and write the files: they have the names of users, and what they use.

        Files that SQLite makes later get the mode of the database's own.
        """
        for suffix in SUFFIXES:
            file = f"{self._path}{suffix}"
            try:
                mode = stat.S_IMODE(os.stat(file).st_mode)
                if mode & ~0o600:
                    os.chmod(file, mode & 0o600)
                    log.warning("others could use a file of the database; now only its owner can", file=file)
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("others can use a file of the database", file=file, reason=error.strerror)

    def _check_files(self) -> None:
        """Raise StoreUnavailable if a file that was opened has another name now, is gone, or was emptied.

        A connection that is open would go on writing to a file that was deleted or replaced. What is written to such
        a database is lost when the connection is closed, and what is written to such a log (`-wal`) if the process
        dies. Without the index (`-shm`) or the lock file, another process would know nothing of this one.
        """
        for suffix, file, opened in self._opened_files:
            try:
                found = os.stat(file)
            except OSError:
                found = None
            if found is None or (found.st_dev, found.st_ino) != opened:
                raise StoreUnavailable(f"{file} was moved, deleted or replaced while in use: {_IN_USE[suffix]}")
            if not suffix and not found.st_size:
                raise StoreUnavailable(
                    f"{file} was emptied while in use: stop the proxy, put back a backup, and start it again"
                )

    # Writing: in the one thread, and as a worker in turn

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        """Apply these operations in this order, in one transaction, and return their replies."""
        return await self._in_thread(self._apply, operations, now)

    async def renew(self, owner: str, now: int, *, lease_ms: int) -> int:
        """Let the lease of the process `owner` end `lease_ms` from now. Returns `now`, which decides."""
        await self._run_job([self._sql.put_owner], owner, now + lease_ms)
        return now

    async def orphans(self, owner: str, now: int, *, limit: int) -> list[str]:
        """The ids of open calls of dead processes.

        If this is the only process on the file, all others are dead. Workers go by the leases.
        """
        statement = select(calls.c.id).where(calls.c.state == "open", calls.c.owner != owner)
        if not self._is_only_process:
            alive = select(owners.c.id).where(owners.c.alive_until > now)
            statement = statement.where(calls.c.owner.not_in(alive))
        async with self.transaction() as connection:
            return [*await connection.scalars(statement.limit(limit))]

    async def open_calls(self, owner: str) -> list[str]:
        """The ids of the open calls of the process `owner`."""
        statement = select(calls.c.id).where(calls.c.state == "open", calls.c.owner == owner)
        async with self.transaction() as connection:
            return [*await connection.scalars(statement)]

    def on_failover(self, callback: Callable[[], object]) -> None:
        """Do nothing: a file has no server that could be replaced."""

    async def roll_up(self, limit: int, after: str | None) -> JobResult:
        """Add ended calls to the sums of their days."""
        return await self._run_job(ROLL_UP, limit, after)

    async def delete_calls(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete old calls."""
        return await self._run_job(DELETE_CALLS, limit, after, before, call_id_prefix(max(0, before)))

    async def delete_days(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete old sums of days."""
        return await self._run_job(DELETE_DAYS, limit, after, before)

    async def _run_job(self, statements: Sequence[str], *parameters: object) -> JobResult:
        """Run these statements between two batches, in one transaction, such as one step of a maintenance job.

        The result has the rows of the last statement. SQLite leaves no deleted rows in its indexes, so the next step
        may start at the beginning.
        """
        return JobResult(await self._in_thread(self._job, statements, parameters))

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._in_turn, work, *arguments)

    def _in_turn(self, work: Callable[..., T], *arguments: Any) -> T:
        if self._turn_file < 0:
            return work(*arguments)
        fcntl.flock(self._turn_file, fcntl.LOCK_EX)
        try:
            return work(*arguments)
        finally:
            fcntl.flock(self._turn_file, fcntl.LOCK_UN)

    def _apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        db = self._db or self._connect()
        is_committing = False
        try:
            self._check_files()
            db.execute(_BEGIN)
            if self._now is not None:
                # It has waited for the lock, perhaps for a reset of these counters. What this batch does must not
                # seem to be older than that.
                now = self._now()
            book = self._load(db, operations, now)
            known = {*book.entries}
            replies = [book.apply(operation) for operation in operations]
            changes = changes_of(book, known)
            for statement, rows in (
                (self._sql.put_counters, changes.counters),
                (self._sql.open_calls, changes.opened),
                (self._sql.change_calls, changes.changed),
            ):
                if rows:
                    db.executemany(statement, rows)
            is_committing = True
            db.execute("COMMIT")
        except BaseException as error:
            self._forget()
            with suppress(sqlite3.Error):  # if it fails, the next batch fails too, and tries it again
                db.rollback()
            if translated := self._translated(error, is_uncertain=is_committing):
                raise translated from error
            raise
        self._counters.put(book.counters)
        self._calls.put({entry.id: entry for entry in book.entries.values() if entry.state == "open"})
        return replies

    def _connect(self) -> sqlite3.Connection:
        """The driver's connection, which stays that of the engine."""
        with self._translated_errors():
            pooled = self._engine.raw_connection()
        db = self._db = cast(sqlite3.Connection, pooled.driver_connection)
        pooled.close()
        return db

    def _load(self, db: sqlite3.Connection, operations: Sequence[Operation], now: int) -> Book:
        """What the operations touch: what was kept of it, and the rest from the file.

        It is taken out of what is kept until it is committed. So nothing is kept that is not in the file.
        """
        [version] = db.execute("PRAGMA data_version").fetchone()
        if version != self._version:
            self._forget()
            self._version = version
        entries, ids = self._calls.take({operation.id for operation in operations})
        if ids:
            for row in db.execute(self._sql.read_calls, (as_json(ids),)):
                entries[row[0]] = entry_of(row)
        keys = keys_of(operations)
        for entry in entries.values():
            for held in entry.held_amounts:
                keys.add(held.key)
        counters, missing = self._counters.take(keys)
        if missing:
            counters |= dict.fromkeys(missing)
            counters |= counters_of(db.execute(self._sql.read_counters, (as_json(missing),)))
        return Book(counters, entries, now)

    def _forget(self) -> None:
        self._counters.clear()
        self._calls.clear()

    def _job(self, statements: Sequence[str], parameters: tuple[object, ...]) -> int:
        self._check_files()
        rows = 0
        with self._translated_errors(), self._engine.begin() as connection:
            for statement in statements:
                rows = connection.exec_driver_sql(statement, parameters).rowcount
        return rows

    # Reading for display: beside the thread, without a lock

    async def read_counters(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        """The committed counters with these keys."""
        return counters_of(await self._read(self._sql.read_counters, (as_json(keys),)))

    async def find_response_entry(self, response_id: str) -> Entry | None:
        """The entry of the call that made this response."""
        return next(map(entry_of, await self._read(self._sql.read_response_call, (response_id,))), None)

    async def _read(self, statement: str, parameters: tuple[str]) -> Sequence[Row]:
        self._check_files()
        with self._translated_errors():
            async with self._read_engine.connect() as connection:
                return (await connection.exec_driver_sql(statement, parameters)).all()

    # The directory and reports

    async def attach(self) -> None:
        """Make ready for `transaction` beside the processes that serve."""
        if not has_content(str(self._path)):
            raise StoreUnavailable(
                f"{self._path} is not a database: correct `database`, or start the proxy, which makes it"
            )
        refuse_foreign_log(self._path)
        # Of the other files SQLite makes and deletes some while this process has no connection.
        found = self._path.stat()
        self._opened_files = [("", str(self._path), (found.st_dev, found.st_ino))]
        async with self.transaction() as connection:
            await connection.run_sync(check_schema, f"The database {self._path}")

    @asynccontextmanager
    async def transaction(self, *, writes: bool = False) -> AsyncIterator[AsyncConnection]:
        """A transaction for the directory and for reports."""
        self._check_files()
        engine = self._change_engine if writes else self._read_engine
        with self._translated_errors():
            async with engine.begin() as connection:
                yield connection

    # Copying the database as a whole

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that reads everything while nobody can write, neither a proxy nor a command."""
        lock = f"{self._path}.lock"
        had_lock = stat_of(lock) is not None
        if not has_content(str(self._path)):
            raise StoreUnavailable(f"{self._path} is not a database: correct the URL")
        descriptor = lock_file(lock, self._path)
        try:
            refuse_hard_links(self._path)
            await self.attach()
            # Not through `_change_engine`, which would change the journal mode of a backup.
            with self._translated_errors():
                async with self._read_engine.connect() as connection:
                    await connection.exec_driver_sql(_BEGIN)
                    await connection.run_sync(check_schema, f"The database {self._path}", exactly=True)
                    yield connection
        finally:
            os.close(descriptor)
            if not had_lock:
                os.unlink(lock)

    @asynccontextmanager
    async def filling(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that makes the tables in an empty file and fills them."""
        async with self.transaction(writes=True) as connection:
            await connection.run_sync(migrate, f"The database {self._path}")
            yield connection

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if translated := self._translated(error):
                raise translated from error
            raise

    def _translated(self, error: BaseException, *, is_uncertain: bool = False) -> Exception | None:
        """StoreRefused (caused by a value) or StoreUnavailable (may be repeated) for an error of the database."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(cause, _REFUSALS):
            return StoreRefused(str(cause))
        if isinstance(cause, sqlite3.Error):
            text = f"{self._path} can't be used ({cause}): {remedy_of(cause)}"
            return StoreUnavailable(text, is_uncertain=is_uncertain)
        if isinstance(cause, PoolTimeout):
            return StoreUnavailable(f"{self._path} is not read fast enough: check its disk")
        return None


def _url(driver: str, path: Path) -> URL:
    """The URL of a file that exists. SQLite makes no file, and so none with an empty ledger or with a wide mode."""
    return URL.create(driver, database=f"file:{quote(str(path))}", query={"mode": "rw", "uri": "true"})


def _configure(connection: Any, _: object) -> None:
    """Set up a new connection that writes.

    With isolation_level None the driver does not begin transactions by itself; `_begin_immediate` does. WAL allows
    reads during a write. Only with synchronous=FULL does a commit survive a power failure.
    """
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql(_BEGIN)
