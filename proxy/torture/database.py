"""The books of a tortured proxy, read with plain SQL: from its SQLite file, or from its schema in PostgreSQL.

Nothing of the proxy's own code stands between them and the verdict: what is judged may not be its own witness.
"""

import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

from proxy.torture.evidence import Books, Level, Line, Row
from proxy.torture.plan import MODEL_PREFIX

_ROWS = "SELECT id, model, state, outcome, input_tokens, output_tokens, requests, lines FROM calls"
_LEVELS = (
    "SELECT subject, quota_id, opened_at, used_input, used_output, used_requests, held_input, held_output, "
    "held_requests FROM counters"
)
_OPEN = "SELECT count(*) FROM calls WHERE state = 'open'"
_SCHEMA = "llm_quota_proxy"
_WAIT_S = 5.0


class NoBooks(Exception):
    """The database can't be read, or is not for us to use."""


async def read_books(database: str) -> Books:
    """What is committed, at one instant; the database, by its URL, may be in use."""
    calls, counters = await _select(database, _ROWS, _LEVELS)
    rows = [
        Row(id, _mark(model), state, outcome, (taken or 0, made or 0, requests or 0), _lines(lines))
        for id, model, state, outcome, taken, made, requests, lines in calls
    ]
    levels = [
        Level((subject, quota, opened_at), used=(found[0], found[1], found[2]), held=(found[3], found[4], found[5]))
        for subject, quota, opened_at, *found in counters
    ]
    return Books(rows, levels)


async def count_open(database: str) -> int:
    """How many calls are in flight by the books."""
    [[(count,)]] = await _select(database, _OPEN)
    return int(count)


async def need_none(url: str) -> None:
    """Raise NoBooks where there are some in this PostgreSQL database: they may be somebody's own."""
    async with _connection(url) as connection:
        if await connection.fetchval(f"SELECT to_regnamespace('{_SCHEMA}')::oid"):
            raise NoBooks(
                f"There are books in this database already, and torture needs one without. If nobody needs them: "
                f"DROP SCHEMA {_SCHEMA} CASCADE"
            )


async def remove_books(url: str) -> None:
    """Take them out of a PostgreSQL database again."""
    async with _connection(url) as connection:
        await connection.execute(f"DROP SCHEMA IF EXISTS {_SCHEMA} CASCADE")


async def _select(database: str, *statements: str) -> list[Sequence[Sequence[Any]]]:
    """What they find, all at one moment, so that calls and counters fit each other."""
    if database.startswith("sqlite:"):
        path = f"file:{database.removeprefix('sqlite:///')}?mode=ro"
        with closing(sqlite3.connect(path, uri=True, timeout=_WAIT_S, isolation_level=None)) as file:
            file.execute("BEGIN")
            return [file.execute(statement).fetchall() for statement in statements]
    async with (
        _connection(database) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        await connection.execute(f"SET LOCAL search_path TO {_SCHEMA}")
        return [await connection.fetch(statement) for statement in statements]


@asynccontextmanager
async def _connection(url: str) -> AsyncIterator[Any]:
    try:
        import asyncpg  # an extra, which SQLite doesn't need
    except ModuleNotFoundError:
        raise NoBooks("PostgreSQL needs asyncpg: pip install 'llm-quota-proxy[postgres]'") from None
    try:
        # Without a cache the driver gives statements no names, which pgbouncer would lose.
        connection = await asyncpg.connect(url, timeout=_WAIT_S, statement_cache_size=0)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise NoBooks(f"The database can't be reached: {error or type(error).__name__}") from error
    except ValueError:
        raise NoBooks("The driver can't read the database's URL.") from None  # which may hold a password
    try:
        yield connection
    finally:
        await connection.close()


def _mark(model: str) -> str:
    return model.removeprefix(MODEL_PREFIX)


def _lines(text: str) -> tuple[Line, ...]:
    return tuple(
        Line((key[0], key[1]), opened_at, (amount[0], amount[1], amount[2]))
        for key, opened_at, *_, amount in json.loads(text)
    )
