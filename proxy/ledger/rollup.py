"""Usage by day: ended calls are added to the sums of their day, and old records are deleted.

    call ends ─▶ counted into its day ─▶ deleted after `keep.calls`        day ─▶ deleted after `keep.days`

This runs in the background in small steps, each in a transaction of its own. Any number of processes may run it at
once. A step adds calls to the sums of their days and marks them as counted, in one transaction. So each call is
counted once, even if the process is killed in the middle. `schema.py` says how a call is corrected that was counted
as lost and settled later.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from proxy.ledger.store import JobResult, Store, StoreUnavailable
from proxy.policy.policy import Keep

# Rows in one step. On SQLite no batch can be committed while a step runs.
_STEP = 500
# The pause between two steps, so that the database is free for batches most of the time, however many rows are left.
_PAUSE_S = 0.05
_DAY_MS = 86_400_000

log = structlog.get_logger("records")


class Rollup:
    """Maintains the usage records of one database.

    `now` returns milliseconds since 1970, `keep` how long the policy keeps calls and days.
    """

    def __init__(
        self, store: Store, *, now: Callable[[], int], keep: Callable[[], Keep], pause_s: float = _PAUSE_S
    ) -> None:
        self._store = store
        self._now = now
        self._keep = keep
        self._pause_s = pause_s

    async def run(self) -> None:
        """Count the calls that have ended, and delete old calls and days. To be called every few seconds."""
        keep, now, store = self._keep(), self._now(), self._store
        try:
            await self._repeat(store.roll_up)
            if keep.calls_ms is not None:
                calls_before = now - keep.calls_ms
                await self._repeat(lambda limit, after: store.delete_calls(limit, after, before=calls_before))
            if keep.days_ms is not None:
                # A day is deleted when its end is old enough. Example with `keep.days: 90d`: the sums of the 1st of
                # January, which ends at midnight UTC on the 2nd, are deleted 90 days after that midnight.
                days_before = now - keep.days_ms - _DAY_MS
                await self._repeat(lambda limit, after: store.delete_days(limit, after, before=days_before))
        except StoreUnavailable as error:
            log.warning("the records could not be tended", reason=str(error))

    async def _repeat(self, job: Callable[[int, str | None], Awaitable[JobResult]]) -> None:
        """Run a job in steps until a step finds fewer rows than it may touch.

        Each step starts after the last key of the one before. PostgreSQL keeps changed and deleted rows in its
        indexes until they are vacuumed, which a backup may delay for hours, and a step that started at the beginning
        would read all of them again. With 400,000 such rows a step took four times as long (counting) to sixteen
        times (deleting).
        """
        after = None
        while True:
            result = await job(_STEP, after)
            if result.rows < _STEP:
                return
            after = result.last
            await asyncio.sleep(self._pause_s)
