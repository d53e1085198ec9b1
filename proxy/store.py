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
from sqlalchemy import URL, Connection, Dialect, bindparam, create_engine, event, func, select, tuple_
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, NotSupportedError, ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine

from proxy.books import Act, Books, Entry, Extend, Facts, Line, Reply, Reserve
from proxy.quotas import Counter, CounterKey
from proxy.tables import calls, counters, migrate, owners
from proxy.usage import Amount, AtLeast, Exactly, Tokens, Unspent, Usage, charge_of
from proxy.windows import Window

# How long a transaction waits for the file's lock, in seconds.
_BUSY_TIMEOUT_S = 5.0
# What changes in the row of a call after it was let in, in the table's order.
_CHANGING = (
    "state ended_at hold_input hold_output lines "
    "input_tokens output_tokens cached_tokens reasoning_tokens requests provenance outcome"
).split()
# The database's errors that lie in what it was given. All others lie in the database, and may pass.
_REFUSALS = (DataError, IntegrityError, InterfaceError, NotSupportedError, ProgrammingError)

# A row as it is read and written, its values in the table's order.
_Row = Sequence[Any]


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
    """One SQLite file. `open()` before use, `close()` after; `apply` may be called from one task at a time.

    `busy_timeout_s` is how long a transaction waits for a lock that somebody else has on the file.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = _BUSY_TIMEOUT_S) -> None:
        self._path = path.resolve()  # by whatever name it is called: one file, one lock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        file, waits = str(self._path), {"timeout": busy_timeout_s}
        self._engine = create_engine(URL.create("sqlite", database=file), connect_args=waits)
        self._reading = create_async_engine(
            URL.create("sqlite+aiosqlite", database=file), connect_args=waits, pool_size=2, max_overflow=0
        )
        self._sql = _Statements(self._engine.dialect)
        self._opened: tuple[int, int] | None = None
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
        self._lock = self._take_lock()
        with _translated(), self._engine.begin() as connection:
            migrate(connection)
        self._opened = self._found()

    def apply(self, acts: Sequence[Act], now: int) -> list[Reply]:
        """Do these acts in order, in one transaction, and answer each.

        Raises StoreUnavailable or StoreRefused, or what a rule or a driver raises at a bad act; then nothing was
        done, or, where that is uncertain, all of it: every act may be repeated.
        """
        self._look_for_it()
        with _translated(), self._engine.connect() as connection:
            books = self._load(connection, acts, now)
            before = set(books.entries)
            answers = [books.apply(act) for act in acts]
            self._write(connection, books, before)
            with _translated(is_uncertain=True):
                connection.commit()
        return answers

    def renew(self, owner: str, alive_until: int) -> None:
        """Say that the process `owner` is alive until then."""
        row = {"id": owner, "alive_until": alive_until}
        self._look_for_it()
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
        self._look_for_it()  # connecting to a file that is gone would make an empty one
        with _translated():
            async with self._reading.connect() as connection:
                return _counters(await connection.exec_driver_sql(self._sql.counters_of, _given(keys)))

    async def read_entry(self, entry_id: str) -> Entry | None:
        """One call in the books."""
        self._look_for_it()
        with _translated():
            async with self._reading.connect() as connection:
                found = await connection.exec_driver_sql(self._sql.calls_of, _given([entry_id]))
        return next(map(_entry, found), None)

    async def close(self) -> None:
        """Let go of the file."""
        self._thread.shutdown()
        await self._reading.dispose()
        self._engine.dispose()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take_lock(self) -> int:
        try:
            lock = os.open(f"{self._path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StoreUnavailable(f"{self._path}.lock can't be opened: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StoreInUse(
                f"Another process is using {self._path}. Stop it first, or use PostgreSQL to run several."
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

    def _load(self, connection: Connection, acts: Sequence[Act], now: int) -> Books:
        rows = connection.exec_driver_sql(self._sql.calls_of, _given([act.id for act in acts]))
        entries = {entry.id: entry for entry in map(_entry, rows.all())}
        touched = {line.key for entry in entries.values() for line in entry.lines}
        for act in acts:
            if isinstance(act, Reserve | Extend):
                touched.update(act.binding.keys())
        found = connection.exec_driver_sql(self._sql.counters_of, _given(sorted(touched)))
        return Books(_counters(found.all()), entries, now)

    def _write(self, connection: Connection, books: Books, before: set[str]) -> None:
        entries, changed = books.entries, sorted(books.entries_changed)
        counters_now = [_counter_row(key, books.counters[key]) for key in sorted(books.counters_changed)]
        opened = [_call_row(entries[entry_id]) for entry_id in changed if entry_id not in before]
        changes = [(*_changing(entries[entry_id]), entry_id) for entry_id in changed if entry_id in before]
        for statement, rows in (
            (self._sql.put_counters, counters_now),
            (self._sql.open_calls, opened),
            (self._sql.change_calls, changes),
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
        self.put_counters = str(put.compile(dialect=dialect))
        self.open_calls = str(sa.insert(calls).compile(dialect=dialect))
        self.change_calls = str(change.compile(dialect=dialect, column_keys=_CHANGING))


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


def _given(keys: Sequence[object]) -> tuple[str]:
    return (orjson.dumps(keys).decode(),)


def _counters(rows: Iterable[_Row]) -> dict[CounterKey, Counter]:
    return {
        (subject, quota_id): Counter(Window(opened_at, resets_at), used=Amount(*levels[:3]), held=Amount(*levels[3:]))
        for subject, quota_id, opened_at, resets_at, *levels in rows
    }


def _counter_row(key: CounterKey, counter: Counter) -> _Row:
    window, used, held = counter.window, counter.used, counter.held
    return (
        *key,
        window.opened_at,
        window.resets_at,
        used.input,
        used.output,
        used.requests,
        held.input,
        held.output,
        held.requests,
    )


def _entry(row: _Row) -> Entry:
    entry_id, owner, state, user, model, endpoint, upstream, through, reserved_at, ended_at, *rest = row
    hold_input, hold_output, maximum, lines, capped_by, would_refuse, *used, outcome = rest
    return Entry(
        id=entry_id,
        owner=owner,
        facts=Facts(user=user, model=model, endpoint=endpoint, upstream=upstream),
        through=through,
        reserved_at=reserved_at,
        hold=Amount(hold_input, hold_output, 1),
        maximum=maximum,
        lines=tuple(Line((key[0], key[1]), at, Amount(*amount)) for key, at, amount in orjson.loads(lines)),
        capped_by=capped_by,
        would_refuse=tuple(orjson.loads(would_refuse)),
        state=state,
        ended_at=ended_at,
        usage=_usage(*used),
        outcome=outcome,
    )


def _call_row(entry: Entry) -> _Row:
    facts = entry.facts
    state, ended_at, hold_input, hold_output, lines, *used = _changing(entry)
    return (
        *(entry.id, entry.owner, state, facts.user, facts.model, facts.endpoint, facts.upstream, entry.through),
        *(entry.reserved_at, ended_at, hold_input, hold_output, entry.maximum),
        *(lines, entry.capped_by, orjson.dumps(entry.would_refuse).decode()),
        *used,
    )


def _changing(entry: Entry) -> _Row:
    lines = [
        (line.key, line.opened_at, (line.amount.input, line.amount.output, line.amount.requests))
        for line in entry.lines
    ]
    return (
        *(entry.state, entry.ended_at, entry.hold.input, entry.hold.output, orjson.dumps(lines).decode()),
        *(*_used(entry.usage), entry.outcome),
    )


def _usage(
    input_tokens: int, output_tokens: int, cached: int, reasoning: int, requests: int, provenance: str | None
) -> Usage | None:
    match provenance:
        case "exactly":
            return Exactly(Tokens(input_tokens, output_tokens, cached, reasoning))
        case "at_least":
            return AtLeast(Tokens(input_tokens, output_tokens, cached, reasoning))
        case "unspent":
            return Unspent(requests)
    return None


def _used(usage: Usage | None) -> _Row:
    if usage is None:
        return (None,) * 6
    tokens, requests = usage.tokens, charge_of(usage).requests
    return (tokens.input, tokens.output, tokens.cached, tokens.reasoning, requests, usage.provenance)
