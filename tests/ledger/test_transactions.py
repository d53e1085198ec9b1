"""Transactions of the directory and of reports, beside the batches of the ledger, on both engines."""

import asyncio
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa

from proxy.ledger.postgres import PostgresStore
from proxy.ledger.primary import Timeouts
from proxy.ledger.schema import HEAD, SCHEMA, calls, directory, owners
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import StoreRefused, StoreUnavailable
from tests.audit import connected
from tests.builders import NOON, binding, call, quota, reserve
from tests.postgres import shared
from tests.sqlite import write_migrated

SHORT = Timeouts(connect_ms=600, probe_ms=200, idle_ms=300, lock_ms=100, statement_ms=700, whole_ms=1000)
ANN = binding([quota("staff/daily", tokens=1000, per="365d")])
NEEDS_MIGRATION = f"and this release needs {HEAD}: run .*migrate"
RAISED = sa.update(directory).values(version=directory.c.version + 1)
VERSION = sa.select(directory.c.version)


class Engine:
    """A migrated database of one engine, and stores on it: as a server opens them, or as a command attaches."""

    def __init__(self, name, place):
        self.name, self.place = name, place

    def store(self):
        """A new store, which is neither open nor attached."""
        if self.name == "sqlite":
            return SqliteStore(self.place, busy_timeout_s=0.3)
        return PostgresStore(self.place, timeouts=SHORT)

    @asynccontextmanager
    async def opened(self):
        """As a server uses it."""
        store = self.store()
        await store.open()
        try:
            yield store
        finally:
            await store.close()

    @asynccontextmanager
    async def attached(self):
        """As a command uses it, beside a server or without one."""
        store = self.store()
        await store.attach()
        try:
            yield store
        finally:
            await store.close()

    async def run(self, statement):
        """Run a statement as an operator would, and return its rows."""
        if self.name == "sqlite":
            with connected(self.place) as connection:
                return connection.execute(statement.replace(f"{SCHEMA}.", "")).fetchall()
        return [tuple(row) for row in await shared().run(statement, url=self.place)]


@pytest.fixture(params=["sqlite", "postgresql"])
async def engine(request, tmp_path):
    if request.param == "sqlite":
        write_migrated(tmp_path / "quotas.db")
        return Engine("sqlite", tmp_path / "quotas.db")
    return Engine("postgresql", await shared().migrated())


async def version(store):
    async with store.transaction() as connection:
        return await connection.scalar(VERSION)


async def test_a_change_is_committed_unless_the_block_raises(engine):
    """A command that fails half-way has changed nothing."""
    async with engine.opened() as store:
        async with store.transaction(writes=True) as connection:
            await connection.execute(RAISED)
        assert await version(store) == 2
        with pytest.raises(RuntimeError):
            async with store.transaction(writes=True) as connection:
                await connection.execute(RAISED)
                raise RuntimeError
        assert await version(store) == 2


async def test_a_command_works_beside_a_server(engine):
    """It changes nothing by attaching, takes no lock that the server has, and each sees what the other writes."""
    async with engine.opened() as server, engine.attached() as command:
        async with command.transaction(writes=True) as connection:
            await connection.execute(RAISED)
        assert await version(server) == 2
        await server.apply([reserve("1", ANN, call(100, 400))], NOON)
        async with command.transaction() as connection:
            assert (await connection.execute(sa.select(calls.c.id))).scalars().all() == ["1"]


async def test_a_command_works_without_a_server(engine):
    """Keys can be made before the first start, if the database was migrated."""
    async with engine.attached() as command:
        assert await version(command) == 1


async def test_a_change_waits_for_another(engine):
    """T150: both are made, one after the other, so that no two changes have one version."""
    async with engine.opened() as store, engine.attached() as command:

        async def raise_version(of):
            async with of.transaction(writes=True) as connection:
                return await connection.scalar(RAISED.returning(directory.c.version))

        versions = await asyncio.gather(*(raise_version(of) for of in (store, command) * 4))
    assert sorted(versions) == list(range(2, 10))


async def test_a_change_that_can_t_get_its_lock_raises_store_unavailable(engine):
    """Another one has begun and does not end."""
    async with engine.attached() as first, engine.attached() as second:
        async with first.transaction(writes=True) as connection:
            await connection.execute(RAISED)
            with pytest.raises(StoreUnavailable):
                async with second.transaction(writes=True) as other:
                    await other.execute(RAISED)
            assert await version(second) == 1
        assert await version(second) == 2


async def test_a_value_that_the_database_rejects_raises_store_refused(engine):
    """Such as an id that exists already. The next transaction is not affected."""
    async with engine.attached() as store:
        row = {"id": "me", "alive_until": 1}
        async with store.transaction(writes=True) as connection:
            await connection.execute(sa.insert(owners), row)
        with pytest.raises(StoreRefused):
            async with store.transaction(writes=True) as connection:
                await connection.execute(RAISED)
                await connection.execute(sa.insert(owners), row)
        assert await version(store) == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (f"UPDATE {SCHEMA}.alembic_version SET version_num = '0004'", f"has schema 0004, {NEEDS_MIGRATION}"),
        (
            f"UPDATE {SCHEMA}.alembic_version SET version_num = '9999'",
            "has schema 9999, which this release does not know: use the release that wrote it",
        ),
        (f"DROP TABLE {SCHEMA}.alembic_version", f"has no schema of ours, {NEEDS_MIGRATION}"),
    ],
)
async def test_a_command_needs_the_schema_of_its_release(engine, change, found):
    """It does not migrate: the server of an older release may be running on this database."""
    await engine.run(change)
    store = engine.store()
    try:
        with pytest.raises(StoreUnavailable, match=found):
            await store.attach()
    finally:
        await store.close()


async def test_a_command_works_on_the_schema_of_the_next_release(engine):
    """As a server of this release does while the replicas are replaced one by one."""
    await engine.run(f"UPDATE {SCHEMA}.alembic_version SET version_num = '{int(HEAD) + 1:04}'")
    async with engine.attached() as command:
        assert await version(command) == 1


@pytest.mark.parametrize("content", [None, b"", b"no database"])
async def test_a_file_that_is_no_database_is_not_made_one(tmp_path, content):
    """A command with a wrong `database` leaves nothing behind."""
    path = tmp_path / "quotas.db"
    if content is not None:
        path.write_bytes(content)
    store = SqliteStore(path)
    with pytest.raises(StoreUnavailable, match=r"quotas\.db"):
        await store.attach()
    await store.close()
    assert [each.name for each in tmp_path.iterdir()] == ([] if content is None else ["quotas.db"])
    assert content is None or path.read_bytes() == content


async def test_a_database_that_is_replaced_in_use_is_unavailable(tmp_path):
    """A change would be made in a file that nobody reads any more."""
    path = tmp_path / "quotas.db"
    write_migrated(path)
    async with Engine("sqlite", path).attached() as command:
        path.rename(tmp_path / "moved.db")
        write_migrated(path)
        with pytest.raises(StoreUnavailable, match="moved, deleted or replaced"):
            await version(command)


async def test_more_readers_than_connections_wait_and_then_raise_store_unavailable(tmp_path):
    """The error is that of a database that is too slow, not one of ours."""
    path = tmp_path / "quotas.db"
    write_migrated(path)
    async with Engine("sqlite", path).attached() as store:
        entered, is_over = asyncio.Semaphore(0), asyncio.Event()

        async def read():
            async with store.transaction():
                entered.release()
                await is_over.wait()

        readers = [asyncio.ensure_future(read()) for _ in range(4)]
        for _ in readers:
            await entered.acquire()
        with pytest.raises(StoreUnavailable, match="not read fast enough"):
            await version(store)
        is_over.set()
        await asyncio.gather(*readers)
        assert await version(store) == 1


# ------------------------------------------------------------------------------------------------------- PostgreSQL


async def test_a_command_that_stops_in_the_middle_of_a_change_loses_its_lock():
    """T152: otherwise nobody could change anything until somebody finds it."""
    engine = Engine("postgresql", await shared().migrated())
    async with engine.attached() as stopped, engine.attached() as other:
        with pytest.raises(StoreUnavailable):
            async with stopped.transaction(writes=True) as connection:
                await connection.execute(RAISED)
                await asyncio.sleep(SHORT.idle_ms * 2 / 1000)  # the server's own timeout passes
                async with other.transaction(writes=True) as ours:
                    await ours.execute(RAISED)
        assert await version(other) == 2


async def test_the_timeouts_of_a_change_end_with_it():
    """Behind pgbouncer another process may have the connection next."""
    engine = Engine("postgresql", await shared().migrated())
    show = sa.text("SELECT current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')")
    async with engine.attached() as store:
        async with store.transaction(writes=True) as connection:
            assert tuple((await connection.execute(show)).one()) == ("100ms", "300ms")
        async with store.transaction() as connection:
            assert tuple((await connection.execute(show)).one()) == ("0", "0")


async def test_no_statement_of_a_transaction_has_a_name():
    """Behind pgbouncer a name is unknown on the next connection, or known for another statement."""
    engine = Engine("postgresql", await shared().migrated())
    async with engine.attached() as store, store.transaction(writes=True) as connection:
        for _ in range(3):
            await connection.execute(RAISED)
            await connection.execute(VERSION)
        named = await connection.execute(sa.text("SELECT name FROM pg_prepared_statements"))
        assert named.all() == []


async def test_after_a_restart_of_the_server_transactions_work_again():
    """The connections in the pool are broken, and are replaced."""
    server = shared()
    engine = Engine("postgresql", await server.migrated())
    async with engine.attached() as store:
        assert await version(store) == 1
        await asyncio.to_thread(server.stop)
        with pytest.raises(StoreUnavailable):
            await version(store)
        await asyncio.to_thread(server.start)
        assert await version(store) == 1
