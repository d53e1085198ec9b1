"""The functions of PostgreSQL that begin and end a batch, so that each of the two is one round trip.

A later release that needs other functions gives them other names, because this release may run beside it.
"""

from alembic import op

from proxy.ledger.schema import SCHEMA

revision = "0008"
down_revision = "0007"

_COUNTER = """
    subject text, quota_id text, opened_at bigint, resets_at bigint, used_input bigint, used_output bigint,
    used_requests bigint, held_input bigint, held_output bigint, held_requests bigint, reset_at bigint
"""
_CALL = """
    id text, owner text, state text, user_name text, model text, endpoint text, upstream text, through text,
    reserved_at bigint, ended_at bigint, hold_input bigint, hold_output bigint, maximum bigint, lines text,
    capped_by text, would_refuse text, input_tokens bigint, output_tokens bigint, cached_tokens bigint,
    reasoning_tokens bigint, requests bigint, provenance text, outcome text, counted_as text, response_id text,
    key_id text, tag text, address text
"""
_CHANGED = """
    state text, upstream text, ended_at bigint, hold_input bigint, hold_output bigint, lines text,
    input_tokens bigint, output_tokens bigint, cached_tokens bigint, reasoning_tokens bigint, requests bigint,
    provenance text, outcome text, response_id text, address text, id text
"""


def _names(columns: str) -> str:
    return ", ".join(column.split()[0] for column in columns.split(","))


def _nulls(columns: str) -> str:
    return ", ".join(f"NULL::{column.split()[1]}" for column in columns.split(","))


def _values(columns: str) -> str:
    """The values of these columns in `line`, a JSON array."""
    return ", ".join(f"(line ->> {index})::{column.split()[1]}" for index, column in enumerate(columns.split(",")))


# The lookups are planned once in each connection.
_PLANNED_ONCE = "LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan"

# `keys` is a JSON array of [subject, quota id], and `ids` one of the ids of calls. Makes missing counters, locks the
# counters that are named and those that the calls hold something of, and locks the calls: each in the order of their
# keys, sorted with COLLATE "C", by bytes, so that the order does not depend on the locale of the database. COLLATE
# "default" in the lookup lets it use the primary key. Each of the statements sees what was committed before it began.
#
# Each counter has the time at which it had been locked, and the latest one decides. Example: a batch asks at 11:59:59
# and gets its last lock at 12:00:01. It decides in the window of 12:00, as the batch for which it waited may have
# done. The left join returns the time also if there is no counter to lock.
BEGIN_BATCH = f"""
CREATE FUNCTION {SCHEMA}.begin_batch_v1(keys jsonb, ids jsonb)
RETURNS TABLE (locked_at bigint, {_COUNTER}, {_CALL}) {_PLANNED_ONCE} AS $$
#variable_conflict use_column
DECLARE
    call_ids text[] := ARRAY(SELECT jsonb_array_elements_text(ids));
BEGIN
    INSERT INTO {SCHEMA}.counters ({_names(_COUNTER)})
    SELECT line ->> 0 AS subject, line ->> 1 AS quota_id, 0, 0, 0, 0, 0, 0, 0, 0, 0
    FROM jsonb_array_elements(keys) AS line ORDER BY (line ->> 0) COLLATE "C", (line ->> 1) COLLATE "C"
    ON CONFLICT DO NOTHING;

    RETURN QUERY
    SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint, locked.*, {_nulls(_CALL)}
    FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
        SELECT kept.* FROM (
            SELECT (line ->> 0) COLLATE "C" AS subject, (line ->> 1) COLLATE "C" AS quota_id
            FROM jsonb_array_elements(keys) AS line
            UNION
            SELECT line #>> '{{0,0}}', line #>> '{{0,1}}'
            FROM {SCHEMA}.calls, jsonb_array_elements(lines::jsonb) AS line WHERE id = ANY (call_ids)
            ORDER BY subject, quota_id
        ) AS wanted CROSS JOIN LATERAL (
            SELECT {_names(_COUNTER)} FROM {SCHEMA}.counters
            WHERE subject = wanted.subject COLLATE "default" AND quota_id = wanted.quota_id COLLATE "default"
            FOR UPDATE
        ) AS kept
    ) AS locked ON true;

    RETURN QUERY
    SELECT NULL::bigint, {_nulls(_COUNTER)}, {_names(_CALL)} FROM {SCHEMA}.calls
    WHERE id = ANY (call_ids) ORDER BY id COLLATE "C" FOR UPDATE;
END $$
"""

# Each parameter is a JSON array of rows, which are arrays too.
END_BATCH = f"""
CREATE FUNCTION {SCHEMA}.end_batch_v1(put_counters jsonb, open_calls jsonb, change_calls jsonb)
RETURNS void {_PLANNED_ONCE} AS $$
#variable_conflict use_column
BEGIN
    UPDATE {SCHEMA}.counters SET ({_names(_COUNTER)}) = ROW ({_values(_COUNTER)})
    FROM jsonb_array_elements(put_counters) AS line WHERE subject = line ->> 0 AND quota_id = line ->> 1;

    INSERT INTO {SCHEMA}.calls ({_names(_CALL)})
    SELECT {_values(_CALL)} FROM jsonb_array_elements(open_calls) AS line;

    UPDATE {SCHEMA}.calls SET ({_names(_CHANGED)}) = ROW ({_values(_CHANGED)})
    FROM jsonb_array_elements(change_calls) AS line WHERE id = line ->> -1;
END $$
"""


def upgrade() -> None:
    """Create the functions. SQLite needs none."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(BEGIN_BATCH)
        op.execute(END_BATCH)
