"""Usage by day: calls that have ended are added to the sums of their day, and old records are deleted.

    call ends ─▶ counted into its day ─▶ deleted after `keep.calls`        day ─▶ deleted after `keep.days`

This runs in the background, in small steps, each a transaction of its own; any number of processes may run it at once.
A step marks calls as counted and adds their sums to their days, or does neither. So each call is counted once, whoever
is killed when. `ledger.schema` says how a call that was charged as lost and settled after all is corrected.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from proxy.ledger.store import JobResult, Store, StoreUnavailable
from proxy.policy.policy import Keep

# Calls in one step: SQLite's batches wait while it runs.
_STEP = 500
# The pause between two steps, so that the ledger has the database for most of the time, however much there is to do.
_PAUSE_S = 0.05
_DAY_MS = 86_400_000

log = structlog.get_logger("records")


class Rollup:
    """Maintains the usage records of one database. `now` gives milliseconds since 1970, `keep` the policy's times."""

    def __init__(
        self, store: Store, *, now: Callable[[], int], keep: Callable[[], Keep], pause_s: float = _PAUSE_S
    ) -> None:
        self._store = store
        self._now = now
        self._keep = keep
        self._pause_s = pause_s

    async def run(self) -> None:
        """Count what has ended and delete what is old; to be called every few seconds."""
        keep, now, store = self._keep(), self._now(), self._store
        try:
            await self._repeat(store.roll_up)
            if keep.calls_ms is not None:
                old = now - keep.calls_ms
                await self._repeat(lambda limit, after: store.delete_calls(limit, after, before=old))
            if keep.days_ms is not None:
                ended = now - keep.days_ms - _DAY_MS  # a day is deleted when all of it is old enough
                await self._repeat(lambda limit, after: store.delete_days(limit, after, before=ended))
        except StoreUnavailable as error:
            log.warning("the records could not be tended", reason=str(error))

    async def _repeat(self, job: Callable[[int, str | None], Awaitable[JobResult]]) -> None:
        """Run a job step by step until a step finds less than a full batch.

        Each step starts after the last key of the one before. PostgreSQL keeps changed and deleted rows in its indexes
        until they are vacuumed, which a backup delays for hours; a step that started at the beginning would walk over
        them. 400,000 such rows made a step four (counting) to sixteen (deleting) times as long.
        """
        after = None
        while True:
            done = await job(_STEP, after)
            if done.rows < _STEP:
                return
            after = done.last
            await asyncio.sleep(self._pause_s)
