"""What is noted for attention: calls that quotas refused, and counters that came near a limit or reached it.

Both are for display. They are written in batches outside of the calls, and a call never waits for them. While the
database is away, as many rows are kept as `rows_max` says; `dropped` counts the others. The log has all refusals.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.ledger.schema import crossings, feed, insert_of, refusals, replicas
from proxy.ledger.store import Store, StoreRefused, StoreUnavailable
from proxy.policy.quota import CounterKey

# How many rows of each kind wait for the database. A refusal takes about 2 kB.
ROWS_MAX = 5_000
# Rows in one transaction, which has SQLite's one write lock, and the pause between two.
_ROWS_AT_ONCE = 500
_PAUSE_S = 0.05
REFUSALS_KEPT_MS = 7 * 86_400_000
# Crossings are kept for a day after the end of their window.
CROSSINGS_KEPT_MS = 86_400_000
# A process writes its status every few seconds, and reads what the others write within a second.
REPLICAS_KEPT_MS = 600_000
FEED_KEPT_MS = 60_000

log = structlog.get_logger("notices")


@dataclass(frozen=True, slots=True)
class RefusalRow:
    """The first refusal of a user by a quota in one second, as it is in the table `refusals`.

    `count` is how many there were in that second. `measure`, `maximum`, `used`, `held` and `needed` are those of the
    limit that the error named. `details` is JSON with all quotas that the decision read.
    """

    request_id: str
    at: int
    user_name: str
    quota_id: str
    model: str
    endpoint: str
    verdict: str
    measure: str
    maximum: int
    used: int
    held: int
    needed: int
    resets_at: int | None
    admissible_at: int | None
    key_id: str | None
    count: int
    details: str


@dataclass(frozen=True, slots=True)
class Crossing:
    """A counter has reached 80 % or 100 % (`level`) of a limit in the window that opened at `opened_at`."""

    subject: str
    quota_id: str
    opened_at: int
    resets_at: int
    level: int
    crossed_at: int


class Notices:
    """Writes refusals and crossings. `now` gives ms since 1970."""

    def __init__(
        self, store: Store, *, now: Callable[[], int], rows_max: int = ROWS_MAX, pause_s: float = _PAUSE_S
    ) -> None:
        self.dropped = 0
        self._store = store
        self._now = now
        self._rows_max = rows_max
        self._pause_s = pause_s
        self._refusals: deque[RefusalRow] = deque()
        self._crossings: dict[CounterKey, Crossing] = {}
        self._writing = asyncio.Lock()  # each row is written once
        self._is_away = False

    def add(self, refused: Iterable[RefusalRow] = (), crossed: Iterable[Crossing] = ()) -> None:
        """Note these. `write` writes them. Of a counter only the newest crossing is kept."""
        for row in refused:
            if len(self._refusals) < self._rows_max:
                self._refusals.append(row)
            else:
                self.dropped += 1
        for each in crossed:
            key = (each.subject, each.quota_id)
            if key in self._crossings or len(self._crossings) < self._rows_max:
                self._crossings[key] = each
            else:
                self.dropped += 1

    async def write(self) -> None:
        """Write what was added, in small transactions. If the database is away, the next run tries again."""
        try:
            async with self._writing:
                await self._write_all()
        except StoreUnavailable as error:
            if not self._is_away:
                log.warning("refusals and crossings can't be written", reason=str(error))
            self._is_away = True
        else:
            self._is_away = False

    async def _write_all(self) -> None:
        while self._refusals:
            rows = list(islice(self._refusals, _ROWS_AT_ONCE))
            await self._write(_insert_refusals, [asdict(row) for row in rows])
            for _ in rows:
                self._refusals.popleft()
        while self._crossings:
            some = dict(islice(self._crossings.items(), _ROWS_AT_ONCE))
            # Sorted, so that two processes lock the rows in the same order.
            await self._write(_put_crossings, [asdict(some[key]) for key in sorted(some)])
            for key, crossing in some.items():
                if self._crossings[key] is crossing:  # else a newer one was added meanwhile
                    del self._crossings[key]

    async def clean(self) -> None:
        """Delete what is too old, also what dead processes left in `replicas` and `feed`. Raises StoreUnavailable."""
        now = self._now()
        for table, instant, kept_ms in (
            (refusals, refusals.c.at, REFUSALS_KEPT_MS),
            (crossings, crossings.c.resets_at, CROSSINGS_KEPT_MS),
            (replicas, replicas.c.at, REPLICAS_KEPT_MS),
            (feed, feed.c.at, FEED_KEPT_MS),
        ):
            while True:
                if await self._delete(table, instant < now - kept_ms) < _ROWS_AT_ONCE:
                    break
                await asyncio.sleep(self._pause_s)

    async def _delete(self, table: sa.Table, is_old: sa.ColumnElement[bool]) -> int:
        """Delete some old rows, and return how many. Rows that another process deletes or writes are skipped."""
        key = sa.tuple_(*table.primary_key)
        old = sa.select(*table.primary_key).where(is_old).limit(_ROWS_AT_ONCE).with_for_update(skip_locked=True)
        async with self._store.transaction(writes=True) as connection:
            return (await connection.execute(sa.delete(table).where(key.in_(old)))).rowcount

    async def _write(
        self, statement: Callable[[AsyncConnection], sa.Insert], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write rows in one transaction. If the database rejects a value in them, only that row is dropped."""
        try:
            async with self._store.transaction(writes=True) as connection:
                await connection.execute(statement(connection), rows)
        except StoreRefused as error:
            if len(rows) > 1:
                for row in rows:
                    await self._write(statement, [row])
            else:
                self.dropped += 1
                log.error("the database rejects a refusal or a crossing", reason=str(error))


def _insert_refusals(connection: AsyncConnection) -> sa.Insert:
    """Inserts refusals. Repeating it after an uncertain commit changes nothing."""
    insert: sa.Insert = insert_of(connection)(refusals).on_conflict_do_nothing()
    return insert


def _put_crossings(connection: AsyncConnection) -> sa.Insert:
    """Inserts crossings. Of each counter the newest window stays, with its highest level and when it was reached.

    The end of a window is moved forward if the window was shortened.
    """
    put = insert_of(connection)(crossings)
    new, old = put.excluded, crossings.c
    is_further = sa.or_(new.level > old.level, new.resets_at < old.resets_at)
    upsert: sa.Insert = put.on_conflict_do_update(
        index_elements=[*crossings.primary_key],
        set_={column.name: new[column.name] for column in old if not column.primary_key},
        where=sa.or_(new.opened_at > old.opened_at, sa.and_(new.opened_at == old.opened_at, is_further)),
    )
    return upsert
