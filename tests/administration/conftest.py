"""What the tests of what administrators look at share: the rows that calls would have written."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import sqlalchemy as sa

from proxy.administration.change import Author, Changes
from proxy.identity.database import DirectoryDatabase
from proxy.ledger.queries import ledger_now
from proxy.ledger.schema import calls, counters, crossings, refusals
from tests.builders import HOUR, NOON


class Rows:
    """Writes rows as calls would. `now` is the time of the ledger: PostgreSQL goes by its own clock."""

    def __init__(self, store: Any, now: int) -> None:
        self.store = store
        self.now = now

    async def insert(self, table: sa.Table, rows: Iterable[Mapping[str, Any]]) -> None:
        """Insert rows of a table."""
        async with self.store.transaction(writes=True) as connection:
            await connection.execute(sa.insert(table), list(rows))

    async def counter(self, subject: str, quota_id: str, used: int, *, held: int = 0, level: int = 0, **more) -> None:
        """A counter of a window that is open from an hour ago to an hour from now. It was noted if it has a level."""
        window = {"opened_at": self.now - HOUR, "resets_at": self.now + HOUR} | more
        numbers = {"used_input": used, "used_output": 0, "used_requests": 1 if used else 0}
        numbers |= {"held_input": held, "held_output": 0, "held_requests": 1 if held else 0}
        await self.insert(counters, [{"subject": subject, "quota_id": quota_id, **window, **numbers}])
        if level:
            crossed = {"level": level, "crossed_at": self.now, "opened_at": window["opened_at"]}
            row = {"subject": subject, "quota_id": quota_id, "resets_at": window["resets_at"]}
            await self.insert(crossings, [row | crossed])

    async def refusal(self, number: int, user: str, quota_id: str, at: int, *, count: int = 1, **more: Any) -> str:
        """A refusal of this user at this instant. Returns the id of its request."""
        id = f"req_{at:012x}{number:020x}"
        row = {"request_id": id, "at": at, "user_name": user, "quota_id": quota_id, "model": "small"}
        row |= {"endpoint": "chat", "verdict": "exhausted", "measure": "tokens", "maximum": 1000, "used": 1000}
        row |= {"held": 0, "needed": 10, "resets_at": at + HOUR, "admissible_at": at + HOUR, "key_id": None}
        await self.insert(refusals, [row | {"count": count, "details": None} | more])
        return id

    async def call(self, id: str, user: str, *, through: str = "staff", state: str = "open", **more: Any) -> None:
        """A call that was reserved at noon."""
        row = {"id": id, "owner": "process-1", "state": state, "user_name": user, "model": "small"}
        row |= {"endpoint": "chat", "upstream": "openai", "through": through, "reserved_at": NOON, "hold_input": 100}
        await self.insert(calls, [row | {"hold_output": 400, "lines": "[]", "would_refuse": "[]"} | more])


@pytest.fixture
async def rows(store) -> Rows:
    async with store.transaction() as connection:
        return Rows(store, await ledger_now(connection, lambda: NOON))


@pytest.fixture
def changes(store) -> Changes:
    return Changes(
        DirectoryDatabase(store, now=lambda: NOON), Author("admin:ops", "192.0.2.1", "req_1"), lambda: NOON
    )
