"""What is said to PostgreSQL is understood by a real one, and says how long it may be waited for."""

import asyncpg
import pytest

from proxy.ledger.postgres import (
    READ_CALL,
    READ_COUNTERS,
    READ_ORPHANS,
    WRITER_STATEMENTS,
    PostgresStore,
    Timeouts,
    begin,
)
from tests.postgres import shared


@pytest.fixture
async def connection():
    url = await shared().fresh()
    store = PostgresStore(url)
    await store.open()
    await store.close()
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@pytest.mark.parametrize("statement", [*WRITER_STATEMENTS.values(), READ_COUNTERS, READ_CALL, READ_ORPHANS])
async def test_each_statement_is_of_the_tables_that_migrations_make(connection, statement):
    """The server finds all tables, columns and types, in whatever schema it looks by itself."""
    await connection.execute("SET search_path TO nowhere")
    await connection.prepare(statement)


async def test_a_batch_begins_with_its_timeouts_and_they_end_with_it(connection):
    """Behind a pool of connections the next transaction is somebody else's."""
    names = ("idle_in_transaction_session_timeout", "lock_timeout", "statement_timeout", "enable_seqscan")

    async def settings():
        return [await connection.fetchval(f"SHOW {name}") for name in names]

    before = await settings()
    await connection.execute(begin(Timeouts(idle_ms=1001, lock_ms=1002, statement_ms=1003)))
    assert await settings() == ["1001ms", "1002ms", "1003ms", "off"]
    await connection.execute("COMMIT")
    assert await settings() == before
