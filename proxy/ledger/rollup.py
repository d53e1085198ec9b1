"""What was used: calls that have ended are added up by day, and what is old is deleted.

    call ends ─▶ counted into its day ─▶ deleted after `keep.calls`        day ─▶ deleted after `keep.days`

In the background, in small steps, each a transaction of its own; any number of processes may do so at once. A step
marks calls as counted and adds their sums to their days, or does neither. So each call is counted once, whoever is
killed when; and `tables` says how a call that was charged as lost, and then settled after all, is put right.
"""

import asyncio
from collections.abc import Callable

import structlog

from proxy.ledger.schema import SCHEMA, UNCOUNTED
from proxy.ledger.store import Chore, Store, StoreUnavailable
from proxy.policy.policy import Keep

# Calls in one step: SQLite's batches wait for it.
_STEP = 500
# Between two steps: the ledger has the database for most of the time, however much there is to do.
_PAUSE_S = 0.05
_DAY_MS = 86_400_000

log = structlog.get_logger("records")


def call_id_prefix(instant: int) -> str:
    """How the id of a call begins that comes at this instant: ids are in the order of time."""
    return f"req_{instant:012x}"


class Rollup:
    """Keeps the records of one database. `now` gives milliseconds since 1970, `keep` the policy's times."""

    def __init__(
        self, store: Store, *, now: Callable[[], int], keep: Callable[[], Keep], pause_s: float = _PAUSE_S
    ) -> None:
        self._store = store
        self._now = now
        self._keep = keep
        self._pause_s = pause_s

    async def tend(self) -> None:
        """Count what has ended and delete what is old; to be called now and then."""
        keep, now = self._keep(), self._now()
        try:
            await self._do(COUNT)
            if keep.calls_ms is not None:
                await self._do(DELETE_CALLS, now - keep.calls_ms, call_id_prefix(max(0, now - keep.calls_ms)))
            if keep.days_ms is not None:
                await self._do(DELETE_DAYS, now - keep.days_ms - _DAY_MS)  # whole days only
        except StoreUnavailable as error:
            log.warning("the records could not be tended", reason=str(error))

    async def _do(self, chore: Chore, *given: object) -> None:
        """Step by step. Each begins where the last one ended; what that had to leave is for the next time.

        Rows that were changed or deleted stay in PostgreSQL's indexes until they are vacuumed, which a backup delays
        for hours. Walked over from the beginning, 400,000 of them made a step four (counting) to sixteen (deleting)
        times as long.
        """
        after = None
        while True:
            done = await self._store.tend(chore, _STEP, after, *given)
            if done.rows < _STEP:
                return
            after = done.last
            await asyncio.sleep(self._pause_s)


# --------------------------------------------------------------------------------------------------------- statements

_KEY = "day, user_name, through, model"
# A call that was counted before was then expired: as one call that is charged what it held. That is taken back.
_ONCE = "CASE WHEN was IS NULL THEN 0 ELSE 1 END"
_SUMS = {
    "calls": f"1 - {_ONCE}",
    "requests": f"coalesce(requests, 0) - {_ONCE}",
    "input_tokens": f"coalesce(input_tokens, 0) - hold_input * {_ONCE}",
    "output_tokens": f"coalesce(output_tokens, 0) - hold_output * {_ONCE}",
    "cached_tokens": "coalesce(cached_tokens, 0)",
    "reasoning_tokens": "coalesce(reasoning_tokens, 0)",
    "estimated": f"CASE WHEN provenance = 'at_least' THEN 1 ELSE 0 END - {_ONCE}",
}
_DAY = f"reserved_at / {_DAY_MS} * {_DAY_MS}"
_ADDED = f"""
    SELECT {_DAY}, user_name, through, model, {", ".join(f"CAST(sum({each}) AS bigint)" for each in _SUMS.values())}
"""
# In one order, so that two who add to the same days don't wait for each other in a circle.
_MORE = ", ".join(f"{each} = usage_by_day.{each} + excluded.{each}" for each in _SUMS)
_ADD = f"GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4 ON CONFLICT ({_KEY}) DO UPDATE SET {_MORE}"
_INTO = f"usage_by_day ({_KEY}, {', '.join(_SUMS)})"
# Each is served by an index in its order. The first step looks at what was done since the last vacuum too, all others
# at no more rows than the limit and what is locked or in flight.
_NEXT = f"FROM {{}}calls WHERE {UNCOUNTED} AND id > coalesce({{}}, '') ORDER BY id LIMIT"
_OLD = (
    "SELECT id FROM {}calls WHERE id > coalesce({}, '') AND id < {} AND reserved_at < {} "
    "AND counted_as = state AND state <> 'open' ORDER BY id"
)
_OLD_DAYS = (
    f"SELECT {_KEY} FROM {{}}usage_by_day "
    f"WHERE day >= coalesce(CAST({{}} AS bigint), 0) AND day < {{}} ORDER BY {_KEY}"
)
_OURS = f"{SCHEMA}."
# What somebody else is just counting, deleting or settling is left to them, or for the next time.
_LOCKED = "LIMIT $1::bigint FOR UPDATE SKIP LOCKED"

COUNT = Chore(
    postgres=f"""
        WITH chosen AS (SELECT id, counted_as {_NEXT.format(_OURS, "$2::text")} $1::bigint FOR UPDATE SKIP LOCKED),
        counted AS (
            UPDATE {_OURS}calls AS kept SET counted_as = state FROM chosen WHERE kept.id = chosen.id
            RETURNING kept.*, chosen.counted_as AS was
        ),
        added AS (INSERT INTO {_OURS}{_INTO} {_ADDED} FROM counted {_ADD})
        SELECT count(*), max(id) FROM counted
    """,
    sqlite=(
        f"INSERT INTO {_INTO} {_ADDED} FROM (SELECT *, counted_as AS was {_NEXT.format('', '?2')} ?1) "
        f"WHERE true {_ADD}",
        f"UPDATE calls SET counted_as = state WHERE id IN (SELECT id {_NEXT.format('', '?2')} ?1)",
    ),
)
DELETE_CALLS = Chore(
    postgres=f"""
        WITH old AS ({_OLD.format(_OURS, "$2::text", "$4::text", "$3::bigint")} {_LOCKED}),
        gone AS (DELETE FROM {_OURS}calls AS kept USING old WHERE kept.id = old.id RETURNING kept.id)
        SELECT count(*), max(id) FROM gone
    """,
    sqlite=(f"DELETE FROM calls WHERE id IN ({_OLD.format('', '?2', '?4', '?3')} LIMIT ?1)",),
)
DELETE_DAYS = Chore(
    postgres=f"""
        WITH old AS ({_OLD_DAYS.format(_OURS, "$2::text", "$3::bigint")} {_LOCKED}),
        gone AS (DELETE FROM {_OURS}usage_by_day WHERE ({_KEY}) IN (SELECT {_KEY} FROM old) RETURNING day)
        SELECT count(*), CAST(max(day) AS text) FROM gone
    """,
    sqlite=(f"DELETE FROM usage_by_day WHERE ({_KEY}) IN ({_OLD_DAYS.format('', '?2', '?3')} LIMIT ?1)",),
)
