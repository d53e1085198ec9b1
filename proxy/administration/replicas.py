"""The processes that share the database, as each has described itself."""

from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.ledger.schema import owners
from proxy.ledger.schema import replicas as table

# A process writes its status every few seconds.
_ALIVE_MS = 30_000


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """One process: when it last wrote its status, and until when its calls are taken for running (`leased_until_at`).

    `status` is what `web.live` writes: its health, version, policy hash, commit time (ms), calls and upstreams.
    """

    replica: str
    at: int
    leased_until_at: int | None
    status: dict[str, Any]


async def replicas(connection: AsyncConnection, now: int) -> tuple[ReplicaRecord, ...]:
    """The processes that have written their status in the 30 s before `now` (ms, by the ledger's clock)."""
    joined = sa.select(table, owners.c.alive_until).outerjoin(owners, owners.c.id == table.c.owner)
    found = joined.where(table.c.at > now - _ALIVE_MS).order_by(table.c.owner)
    return tuple(
        ReplicaRecord(row.owner, row.at, row.alive_until, orjson.loads(row.status))
        for row in await connection.execute(found)
    )
