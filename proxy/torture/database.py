"""Read the database of the proxy under test with plain SQL: its SQLite file, or its schema in PostgreSQL.

The proxy's own code is not used, because the verdict is about that code.
"""

import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

from proxy.torture.changes import AuditRow
from proxy.torture.evidence import CallRow, CounterRow, HeldAmount, Snapshot

# Calls are known by their tag and not by their model's name, of which the proxy records 100 for each user and day.
_CALLS = (
    "SELECT id, tag, state, outcome, input_tokens, output_tokens, requests, lines, user_name, reserved_at, ended_at, "
    "maximum FROM calls"
)
_COUNTERS = (
    "SELECT subject, quota_id, opened_at, used_input, used_output, used_requests, held_input, held_output, "
    "held_requests, reset_at FROM counters"
)
_AUDIT = "SELECT actor, action, request_id, at FROM audit"
_OPEN_CALLS = "SELECT count(*) FROM calls WHERE state = 'open'"
_SCHEMA = "llm_quota_proxy"
_TIMEOUT_S = 5.0


class DatabaseUnusable(Exception):
    """The database can't be read, or contains data that is not ours."""


async def read_snapshot(url: str) -> Snapshot:
    """Return the committed calls and counters at one instant; the proxy may be writing meanwhile."""
    calls, counters = await _select(url, _CALLS, _COUNTERS)
    return Snapshot(
        [
            CallRow(
                id,
                tag or "",
                state,
                outcome,
                (input_tokens or 0, output_tokens or 0, requests or 0),
                _held_amounts(lines),
                *labels,
            )
            for id, tag, state, outcome, input_tokens, output_tokens, requests, lines, *labels in calls
        ],
        [
            CounterRow(
                (subject, quota, opened_at),
                used=(amounts[0], amounts[1], amounts[2]),
                held=(amounts[3], amounts[4], amounts[5]),
                reset_at=reset_at,
            )
            for subject, quota, opened_at, *amounts, reset_at in counters
        ],
    )


async def read_audit(url: str, actor: str) -> list[AuditRow]:
    """Return the rows of the audit log that this administrator has caused."""
    [rows] = await _select(url, _AUDIT)
    return [AuditRow(action, request_id, at) for by, action, request_id, at in rows if by == actor]


async def count_open_calls(url: str) -> int:
    """Return how many calls are in flight according to the database."""
    [[(count,)]] = await _select(url, _OPEN_CALLS)
    return int(count)


async def require_empty(url: str) -> None:
    """Raise DatabaseUnusable if this PostgreSQL database has the proxy's schema: somebody may need its data."""
    async with _connection(url) as connection:
        if await connection.fetchval(f"SELECT to_regnamespace('{_SCHEMA}')::oid"):
            raise DatabaseUnusable(
                f"This database already has a schema {_SCHEMA}, and torture needs an empty database. "
                f"If nobody needs the data: DROP SCHEMA {_SCHEMA} CASCADE"
            )


async def drop_schema(url: str) -> None:
    """Delete the proxy's schema from a PostgreSQL database."""
    async with _connection(url) as connection:
        await connection.execute(f"DROP SCHEMA IF EXISTS {_SCHEMA} CASCADE")


async def _select(url: str, *statements: str) -> list[Sequence[Sequence[Any]]]:
    """Return the rows of each statement. All of them run in one transaction, so calls and counters agree."""
    if url.startswith("sqlite:"):
        path = f"file:{url.removeprefix('sqlite:///')}?mode=ro"
        with closing(sqlite3.connect(path, uri=True, timeout=_TIMEOUT_S, isolation_level=None)) as file:
            file.execute("BEGIN")
            return [file.execute(statement).fetchall() for statement in statements]
    async with (
        _connection(url) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        await connection.execute(f"SET LOCAL search_path TO {_SCHEMA}")
        return [await connection.fetch(statement) for statement in statements]


@asynccontextmanager
async def _connection(url: str) -> AsyncIterator[Any]:
    try:
        import asyncpg  # the extra `postgres`, which a run on SQLite does not need
    except ModuleNotFoundError:
        raise DatabaseUnusable("PostgreSQL needs asyncpg: run pip install '.[postgres]' in a clone") from None
    try:
        # Without the cache the driver uses unnamed statements. pgbouncer may run each transaction on another server
        # connection, where a named statement doesn't exist.
        connection = await asyncpg.connect(url, timeout=_TIMEOUT_S, statement_cache_size=0)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise DatabaseUnusable(f"The database can't be reached: {error or type(error).__name__}") from error
    except ValueError:
        # Neither the driver's message nor the cause is shown, because the URL can contain a password.
        raise DatabaseUnusable("The driver can't read the database's URL.") from None
    try:
        yield connection
    finally:
        await connection.close()


def _held_amounts(lines: str) -> tuple[HeldAmount, ...]:
    """Parse the column `lines`: `[[["user:ann","staff/daily"],1795478400000,[100,400,1]]]`."""
    return tuple(
        HeldAmount((key[0], key[1]), opened_at, (amount[0], amount[1], amount[2]))
        for key, opened_at, *_, amount in json.loads(lines)
    )
