"""Copies of whole databases, from either engine to either: every row of every table, or nothing."""

import asyncio
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sqlalchemy as sa
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Boolean, Text

from proxy.ledger.book import Refused, Settle
from proxy.ledger.copy import CopyDiffers, TargetNotEmpty, copy_database
from proxy.ledger.postgres import PostgresStore
from proxy.ledger.schema import HEAD, NEXT, SCHEMA, NewerSchema, metadata
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import StoreInUse, StoreRefused, StoreUnavailable
from tests.audit import connected, contents
from tests.builders import NOON, binding, call, exactly, quota, reserve
from tests.postgres import shared
from tests.sqlite import write_migrated

ENGINES = ("sqlite", "postgresql")
DIRECTIONS = [ENGINES, ENGINES[::-1]]
_numbers = count(1)

# Any 64-bit integer, and any text that PostgreSQL can store.
INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 2**42)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


def quiet(table, rows):
    """Nobody wants to see the progress."""


def values_of(column):
    """Values of a column."""
    strategy = st.booleans() if isinstance(column.type, Boolean) else INTEGERS
    if isinstance(column.type, Text):
        strategy = TEXTS
    return st.none() | strategy if column.nullable else strategy


def is_unique(column):
    """Whether no two rows may have the same value, at least together with that of another column."""
    return column.primary_key or column.unique or column.name == "idempotency_key"


@st.composite
def databases(draw):
    """Rows of every table: at least one of each."""
    found = {}
    for table in metadata.sorted_tables:
        size = 1 if table.name == "directory" else draw(st.integers(1, 3))
        rows = draw(
            st.lists(
                st.fixed_dictionaries({column.name: values_of(column) for column in table.c}),
                min_size=size,
                max_size=size,
            )
        )
        for number, row in enumerate(rows):
            for column in table.c:
                if is_unique(column) and row[column.name] is not None:
                    is_text = isinstance(column.type, Text)
                    row[column.name] = f"{number}{row[column.name]}" if is_text else number + 1
            if table.name == "owners":  # a process whose lease has not run out would be using the database
                row["alive_until"] = -abs(row["alive_until"])
        found[table.name] = rows
    return found


@asynccontextmanager
async def store_of(engine, folder, *, migrated=False):
    """A store of a new database, with tables or without. It is not open."""
    if engine == "sqlite":
        path = Path(folder) / f"{next(_numbers)}.db"
        if migrated:
            write_migrated(path)
        else:
            path.touch()
        store = SqliteStore(path, busy_timeout_s=0)
    else:
        store = PostgresStore(await (shared().migrated() if migrated else shared().fresh()))
    yield store
    await store.close()


async def fill(store, rows):
    """Write these rows into a database that has the tables."""
    async with store.transaction(writes=True) as connection:
        await connection.execute(sa.delete(metadata.tables["directory"]))
        for table in metadata.sorted_tables:
            if rows[table.name]:
                await connection.execute(sa.insert(table), rows[table.name])


async def read(store):
    """The rows of all tables that the database has, but alembic's."""
    schema = SCHEMA if isinstance(store, PostgresStore) else None
    async with store.transaction() as connection:
        names = await connection.run_sync(lambda plain: sa.inspect(plain).get_table_names(schema=schema))
        found = {}
        for name in names:
            quoted = f'"{name}"' if schema is None else f'{schema}."{name}"'
            rows = (await connection.exec_driver_sql(f"SELECT * FROM {quoted}")).mappings()
            # SQLite has 0 and 1 for booleans, which are equal to those of PostgreSQL.
            found[name] = sorted((dict(row) for row in rows), key=lambda row: repr(sorted(row.items())))
    assert found.pop("alembic_version") == [{"version_num": HEAD}]
    return found


def booleans(name, row):
    """The booleans of a row as SQLite returns them."""
    return {
        column.name: int(row[column.name]) for column in metadata.tables[name].c if isinstance(column.type, Boolean)
    }


def as_numbers(rows):
    """Rows with booleans as numbers, sorted."""
    plain = {name: [{**row, **booleans(name, row)} for row in each] for name, each in rows.items()}
    return {name: sorted(each, key=lambda row: repr(sorted(row.items()))) for name, each in plain.items()}


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
@settings(max_examples=3, phases=[Phase.generate])
@given(rows=databases())
def test_every_row_of_every_table_is_copied(source, target, rows):
    """All tables and columns that a database has, with any values; what is added to the schema is copied too."""

    async def check():
        with TemporaryDirectory() as folder:
            async with store_of(source, folder, migrated=True) as one, store_of(target, folder) as other:
                await fill(one, rows)
                before = await read(one)
                comparison = await copy_database(one, other, progress=quiet)
                copied = as_numbers(await read(other))
                assert copied == as_numbers(rows) == as_numbers(before)
                assert copied.keys() == metadata.tables.keys()
                assert all(copied.values())
                assert as_numbers(await read(one)) == as_numbers(before)
        assert comparison.is_equal
        for name, table in metadata.tables.items():
            sums = comparison.target[name]
            assert sums.rows == len(rows[name])
            assert {*sums.sums, *sums.lengths} == set(table.c.keys())
            for column in table.c:
                values = [row[column.name] for row in rows[name] if row[column.name] is not None]
                assert sums.values[column.name] == len(values)
                if isinstance(column.type, Text):
                    assert sums.lengths[column.name] == sum(map(len, values))
                else:
                    assert sums.sums[column.name] == sum(values)

    asyncio.run(check())


@pytest.fixture
async def source(request, tmp_path):
    """A database with a quota that is used up, an open call, and several parts of rows."""
    async with store_of(request.param, tmp_path, migrated=True) as store:
        await store.apply([reserve(each, USED_UP, call(50)) for each in ("1", "2")], NOON)
        await store.apply([Settle("1", exactly(50), "complete")], NOON)
        async with store.transaction(writes=True) as connection:
            days = [{"day": day, **DAY} for day in range(2500)]
            await connection.execute(sa.insert(metadata.tables["usage_by_day"]), days)
        yield store


LIMITED = quota("staff/daily", tokens=100, per="3000d")
USED_UP, KEYS = binding([LIMITED]), [LIMITED.key_for("ann")]
DAY = {
    **dict.fromkeys(("user_name", "through", "model"), "x"),
    **dict.fromkeys(("calls", "requests", "input_tokens", "output_tokens", "cached_tokens"), 2**62),
    **dict.fromkeys(("reasoning_tokens", "estimated"), -1),
}


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("source", ENGINES, indirect=True)
async def test_the_copy_decides_as_the_source(source, target, tmp_path):
    """A used-up quota is used up, with the same reset. Sums beyond 64 bits are right, and progress is told."""
    told = []
    async with store_of(target, tmp_path) as copy:
        comparison = await copy_database(source, copy, progress=lambda *each: told.append(each))
        assert comparison.target["usage_by_day"].sums["calls"] == 2500 * 2**62
        assert [rows for table, rows in told if table == "usage_by_day"] == [1000, 2000, 2500]
        await copy.open()
        # SQLite has no clock of its own, and must not be before the beginning of a window of PostgreSQL.
        now = max(counter.window.opened_at for counter in (await source.read_counters(KEYS)).values())
        [first] = await source.apply([reserve("3", USED_UP, call(1))], now)
        [second] = await copy.apply([reserve("3", USED_UP, call(1))], now)
        assert isinstance(second, Refused)
        assert isinstance(first, Refused)
        counters = [await each.read_counters(KEYS) for each in (source, copy)]
        assert counters[0] == counters[1]
        assert counters[0][KEYS[0]].used.tokens == 50


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("has_tables", [False, True])
@pytest.mark.parametrize("source", ["sqlite"], indirect=True)
async def test_an_interrupted_copy_leaves_nothing(source, target, has_tables, tmp_path):
    """Neither rows nor tables that were not there. It can be made again."""

    def stop(table, rows):
        if rows > 1000:
            raise KeyboardInterrupt

    async with store_of(target, tmp_path, migrated=has_tables) as copy:
        with pytest.raises(KeyboardInterrupt):
            await copy_database(source, copy, progress=stop)
        schema = SCHEMA if target == "postgresql" else None
        async with copy.transaction() as connection:
            found = await connection.run_sync(lambda plain: sa.inspect(plain).get_table_names(schema=schema))
        assert bool(found) == has_tables
        if has_tables:
            empty = await read(copy)
            assert {name for name, rows in empty.items() if rows} == {"directory"}
        assert (await copy_database(source, copy, progress=quiet)).is_equal


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", ["sqlite"], indirect=True)
@pytest.mark.parametrize("changed", ["owners", "directory"])
async def test_a_target_with_rows_is_refused(source, engine, changed, tmp_path):
    """Even one: a proxy has been started on it, or a user was made."""
    change = {
        "owners": sa.insert(metadata.tables["owners"]).values(id="x", alive_until=1),
        "directory": sa.update(metadata.tables["directory"]).values(version=2),
    }[changed]
    async with store_of(engine, tmp_path, migrated=True) as target:
        async with target.transaction(writes=True) as connection:
            await connection.execute(change)
        before = await read(target)
        with pytest.raises(TargetNotEmpty, match=f"rows in the table {changed}"):
            await copy_database(source, target, progress=quiet)
        assert await read(target) == before


TRIGGERS = {
    "sqlite": [
        "CREATE TRIGGER wrong AFTER INSERT ON usage_by_day WHEN NEW.day = 7 "
        "BEGIN UPDATE usage_by_day SET estimated = 5 WHERE day = 7; END"
    ],
    "postgresql": [
        f"CREATE FUNCTION {SCHEMA}.wrong() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF NEW.day = 7 THEN NEW.estimated = 5; END IF; RETURN NEW; END $$",
        f"CREATE TRIGGER wrong BEFORE INSERT ON {SCHEMA}.usage_by_day FOR EACH ROW EXECUTE FUNCTION {SCHEMA}.wrong()",
    ],
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", ["sqlite"], indirect=True)
async def test_a_copy_that_differs_is_not_kept(source, engine, tmp_path):
    """One number of 2,500 rows is another one."""
    async with store_of(engine, tmp_path, migrated=True) as target:
        async with target.transaction(writes=True) as connection:
            for statement in TRIGGERS[engine]:
                await connection.exec_driver_sql(statement)
        with pytest.raises(CopyDiffers) as raised:
            await copy_database(source, target, progress=quiet)
        assert raised.value.comparison.target["usage_by_day"].sums["estimated"] == -2499 + 5
        assert raised.value.comparison.source["usage_by_day"].sums["estimated"] == -2500
        assert not (await read(target))["usage_by_day"]


@pytest.mark.parametrize("source", ENGINES, indirect=True)
async def test_nothing_can_be_written_to_the_source_meanwhile(source, tmp_path):
    """A call that is admitted, or a key that is made, would be missing in the copy."""
    if isinstance(source, PostgresStore):
        source._timeouts = source._timeouts.__class__(lock_ms=1)
        source._set_timeouts = sa.select(sa.func.set_config("lock_timeout", "1", True))
    async with source.frozen() as connection:
        before = (await connection.execute(sa.text("SELECT count(*) FROM calls"))).scalar()
        with pytest.raises(StoreUnavailable):
            async with source.transaction(writes=True) as other:
                await other.execute(sa.insert(metadata.tables["owners"]).values(id="x", alive_until=1))
        assert (await connection.execute(sa.text("SELECT count(*) FROM calls"))).scalar() == before


async def test_a_sqlite_source_that_is_in_use_is_refused(tmp_path):
    """Its lock says so. A source without a lock, such as a backup, has none afterwards either."""
    path = tmp_path / "quotas.db"
    write_migrated(path)
    store, other = SqliteStore(path), SqliteStore(path)
    async with store_of("sqlite", tmp_path) as target:
        assert (await copy_database(other, target, progress=quiet)).is_equal
        assert not path.with_name("quotas.db.lock").exists()
        await store.open()
        with pytest.raises(StoreInUse):
            await copy_database(other, target, progress=quiet)
        await store.close()
        async with store_of("sqlite", tmp_path) as second:
            assert (await copy_database(other, second, progress=quiet)).is_equal
        assert path.with_name("quotas.db.lock").exists()
    await other.close()


async def test_a_postgresql_source_that_is_in_use_is_refused(tmp_path):
    """A process has a lease that has not run out."""
    async with store_of("postgresql", tmp_path, migrated=True) as source, store_of("sqlite", tmp_path) as target:
        await source.renew("process-1", 0, lease_ms=60_000)
        with pytest.raises(StoreInUse, match="Stop all replicas"):
            await copy_database(source, target, progress=quiet)
        await source.renew("process-1", 0, lease_ms=0)
        assert (await copy_database(source, target, progress=quiet)).is_equal


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("revision", "error"),
    [(NEXT, "of a newer release"), ("0006", "run `llm-quota-proxy migrate`"), (None, "no schema of ours|is not a")],
)
async def test_a_source_of_another_release_is_refused(engine, revision, error, tmp_path):
    """Of a newer one this release would lose columns that it does not know. A source is not migrated."""
    async with store_of(engine, tmp_path, migrated=revision is not None) as source:
        if revision is not None:
            table = "alembic_version" if engine == "sqlite" else f"{SCHEMA}.alembic_version"
            async with source.transaction(writes=True) as connection:
                await connection.exec_driver_sql(f"UPDATE {table} SET version_num = '{revision}'")
        async with store_of("sqlite", tmp_path) as target:
            with pytest.raises(StoreUnavailable, match=error):
                await copy_database(source, target, progress=quiet)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", ["sqlite"], indirect=True)
async def test_a_target_of_a_newer_release_is_refused(source, engine, tmp_path):
    """It may have columns that must have a value."""
    async with store_of(engine, tmp_path, migrated=True) as target:
        table = "alembic_version" if engine == "sqlite" else f"{SCHEMA}.alembic_version"
        async with target.transaction(writes=True) as connection:
            await connection.exec_driver_sql(f"UPDATE {table} SET version_num = '0999'")
        with pytest.raises(NewerSchema):
            await copy_database(source, target, progress=quiet)


async def test_a_text_that_postgresql_cannot_store_fails_with_its_reason(tmp_path):
    """A NUL, which SQLite takes. Nothing was committed."""
    async with store_of("sqlite", tmp_path, migrated=True) as source, store_of("postgresql", tmp_path) as target:
        async with source.transaction(writes=True) as connection:
            await connection.execute(sa.insert(metadata.tables["owners"]).values(id="a\0b", alive_until=1))
        with pytest.raises(StoreRefused, match="0x00"):
            await copy_database(source, target, progress=quiet)


async def test_the_source_is_the_same_file_afterwards(tmp_path):
    """Not even the journal mode of a backup is changed."""
    path = tmp_path / "quotas.db"
    write_migrated(path)
    with connected(path) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    before, text = path.read_bytes(), contents(path)
    source = SqliteStore(path)
    async with store_of("sqlite", tmp_path) as target:
        await copy_database(source, target, progress=quiet)
    await source.close()
    assert (path.read_bytes(), contents(path)) == (before, text)
