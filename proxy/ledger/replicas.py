"""What the processes of one database exchange: their status, and what happens in them while somebody watches.

A process whose events somebody reads says so in `replicas`, until when. Only then do the others write what happens
in them to `feed`, and it reads their rows. Rows of `feed` are deleted by their process after a few seconds, in the
transaction of a later one; `notices.Notices.clean` deletes those of dead processes.

Instants are ms since 1970 by the ledger's clock, which all processes share on PostgreSQL.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import sqlalchemy as sa

from proxy.ledger.schema import audit, feed, insert_of, replicas
from proxy.ledger.store import Store

# How long a process's own rows stay in the feed: others read it several times a second.
_FEED_KEPT_MS = 10_000
# How many changes are read at a time.
_CHANGES_MAX = 50


class FeedRow(NamedTuple):
    """What happened in the process `owner`, as JSON. `seq` grows with each row of a process."""

    owner: str
    seq: int
    body: str


class AuditedChange(NamedTuple):
    """A change by an administrator, from the audit log."""

    at: int
    actor: str
    action: str
    target: str


class Replicas:
    """The rows of the process `owner`, and those of the others. Each method raises StoreUnavailable."""

    def __init__(self, store: Store, *, owner: str, now: Callable[[], int]) -> None:
        self.owner = owner
        self._store = store
        self._now = now
        self._seq = 0

    async def write_status(self, status: str, *, watching_until: int) -> None:
        """Write the status of this process (JSON), and until when it reads the feed; 0: it does not."""
        row = {"owner": self.owner, "at": self._now(), "status": status, "watching_until": watching_until}
        async with self._store.transaction(writes=True) as connection:
            put = insert_of(connection)(replicas).values(row)
            await connection.execute(put.on_conflict_do_update(index_elements=["owner"], set_=row))

    async def is_watched(self) -> bool:
        """Whether another process reads the feed."""
        watching = sa.select(replicas.c.owner).where(
            replicas.c.watching_until > self._now(), replicas.c.owner != self.owner
        )
        async with self._store.transaction() as connection:
            return (await connection.execute(watching.limit(1))).first() is not None

    async def publish(self, body: str) -> None:
        """Write a row to the feed, and delete old rows of this process."""
        self._seq += 1
        now = self._now()
        async with self._store.transaction(writes=True) as connection:
            await connection.execute(
                sa.delete(feed).where(feed.c.owner == self.owner, feed.c.at < now - _FEED_KEPT_MS)
            )
            await connection.execute(sa.insert(feed).values(owner=self.owner, seq=self._seq, at=now, body=body))

    async def positions(self) -> dict[str, int]:
        """The last row of each other process in the feed."""
        last = sa.select(feed.c.owner, sa.func.max(feed.c.seq)).where(feed.c.owner != self.owner)
        async with self._store.transaction() as connection:
            return {owner: seq for owner, seq in await connection.execute(last.group_by(feed.c.owner))}

    async def read(self, after: Mapping[str, int]) -> list[FeedRow]:
        """The rows of other processes after these positions, in order. Of others all rows are new."""
        is_new = sa.or_(
            feed.c.owner.not_in(after),
            *(sa.and_(feed.c.owner == owner, feed.c.seq > seq) for owner, seq in after.items()),
        )
        rows = sa.select(feed.c.owner, feed.c.seq, feed.c.body).where(feed.c.owner != self.owner, is_new)
        async with self._store.transaction() as connection:
            return [FeedRow(*row) for row in await connection.execute(rows.order_by(feed.c.owner, feed.c.seq))]

    async def changes(self, after: int, until: int) -> list[AuditedChange]:
        """The changes after the version `after` of the directory, up to and with `until`; of many the newest."""
        first, last = (f"aud_{version:016x}" for version in (after, until))
        rows = sa.select(audit.c.at, audit.c.actor, audit.c.action, audit.c.target).where(
            audit.c.id > first, audit.c.id <= last
        )
        async with self._store.transaction() as connection:
            found = await connection.execute(rows.order_by(audit.c.id.desc()).limit(_CHANGES_MAX))
            return [AuditedChange(*row) for row in reversed(found.all())]
