"""What is said to PostgreSQL: the statements of the books as text, made once from the tables.

asyncpg sends them as they are, so no column is named twice and none of them has a name on the server. Rows are given
as one array for each column: the text is the same for any number of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Table

from proxy.ledger.rows import CHANGING
from proxy.ledger.schema import SCHEMA, calls, counters


@dataclass(frozen=True, slots=True)
class Patience:
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


def begin(patience: Patience) -> str:
    """Every batch looks a few hundred keys up: that is never worth a walk through a table, whatever is estimated.

    A table of a million counters, once it was analysed, was walked through by each batch: 120 calls a second.
    """
    settings = {
        "idle_in_transaction_session_timeout": patience.idle_ms,
        "lock_timeout": patience.lock_ms,
        "statement_timeout": patience.statement_ms,
        **dict.fromkeys(("enable_hashjoin", "enable_mergejoin", "enable_seqscan", "jit"), "off"),
    }
    limits = "; ".join(f"SET LOCAL {name} = {value}" for name, value in settings.items())
    return f"BEGIN ISOLATION LEVEL READ COMMITTED; {limits}; {_BATCH_TIMEOUT.format(patience.batch_ms)}"


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
