"""The calls in flight, of all processes, and the end of one."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.change import Change, NotFound
from proxy.administration.pages import Page, Paging
from proxy.ledger.queries import admitted_by
from proxy.ledger.schema import call_cuts, calls
from proxy.ledger.store import Store

# Not the bare column, so that neither engine reads the primary key, which has all calls that ever were: those in
# flight have an index of their own.
_ID: sa.ColumnElement[str] = calls.c.id + ""


@dataclass(frozen=True, slots=True)
class CallInFlight:
    """A call that has not ended: who calls what since when, from which address, and what it holds (tokens).

    `group` is the group that admitted it, `replica` the process that runs it.
    """

    id: str
    user: str
    key_id: str | None
    model: str
    endpoint: str
    upstream: str
    group: str
    held_input: int
    held_output: int
    began_at: int
    address: str | None
    replica: str


@dataclass(frozen=True, slots=True)
class CallFilter:
    """Which calls are asked for; None: any. `groups`: only calls that one of these has admitted."""

    user: str | None = None
    group: str | None = None
    model: str | None = None
    groups: Collection[str] | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The conditions for rows of `calls`."""
        chosen = [calls.c.state == "open"]
        if self.user is not None:
            chosen.append(calls.c.user_name == self.user)
        if self.group is not None:
            chosen.append(admitted_by(calls.c.through, [self.group]))
        if self.model is not None:
            chosen.append(calls.c.model == self.model)
        if self.groups is not None:
            chosen.append(admitted_by(calls.c.through, self.groups))
        return chosen


async def calls_in_flight(connection: AsyncConnection, asked: CallFilter, paging: Paging) -> Page[CallInFlight]:
    """The calls in flight, the oldest first. Raises ChangeRefused for a wrong cursor."""
    after = paging.key(str)
    chosen = sa.select(calls).where(*asked.conditions()).order_by(_ID).limit(paging.size + 1)
    if after is not None:
        chosen = chosen.where(sa.tuple_(_ID) > after)
    return paging.page((await connection.execute(chosen)).all(), lambda row: (row.id,), _call)


async def end_call(
    change: Change, id: str, *, groups: Collection[str] | None = None, now: Callable[[], int]
) -> CallInFlight:
    """Have a call ended by the process that runs it, within 2 s. It is charged what has passed.

    `groups` are the groups whose calls the admin may end (None: all). Raises NotFound if it is not in flight.
    """
    asked = CallFilter(groups=groups).conditions()
    row = (await change.connection.execute(sa.select(calls).where(calls.c.id == id, *asked))).first()
    if row is None:
        raise NotFound("call", "no call with this id is in flight: it may have ended")
    await change.connection.execute(sa.delete(call_cuts).where(call_cuts.c.call_id == id))
    await change.connection.execute(sa.insert(call_cuts).values(call_id=id, version=change.version, at=now()))
    found = _call(row)
    # Without the user, whom the record of the call has: it may be made anonymous.
    change.note({"model": found.model, "began_at": found.began_at}, None)
    return found


async def delete_ended_cuts(store: Store) -> None:
    """Delete what asked for the end of calls that have ended. Raises StoreUnavailable."""
    runs = sa.exists().where(calls.c.id == call_cuts.c.call_id, calls.c.state == "open")
    async with store.transaction(writes=True) as connection:
        await connection.execute(sa.delete(call_cuts).where(~runs))


def _call(row: sa.Row[Any]) -> CallInFlight:
    return CallInFlight(
        id=row.id,
        user=row.user_name,
        key_id=row.key_id,
        model=row.model,
        endpoint=row.endpoint,
        upstream=row.upstream,
        group=row.through,
        held_input=row.hold_input,
        held_output=row.hold_output,
        began_at=row.reserved_at,
        address=row.address,
        replica=row.owner,
    )
