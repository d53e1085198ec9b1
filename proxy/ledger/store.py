"""The database as the ledger sees it: what every engine promises, and the ways in which it fails.

The ledger hands over acts and gets their answers; how they are locked, applied and written is the engine's own:
`sqlite` for the processes of one machine, `postgres` for as many as share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from proxy.ledger.book import Entry, Operation, Reply
from proxy.policy.quota import Counter, CounterKey


class StoreInUse(Exception):
    """Another process has this database open for writing, and is none of ours."""


class StoreUnavailable(Exception):
    """The database can't be reached or written right now; the same act may work later.

    `is_uncertain` where it failed while committing, so that what was asked may have been done.
    """

    def __init__(self, message: str, *, is_uncertain: bool = False) -> None:
        super().__init__(message)
        self.is_uncertain = is_uncertain


class StoreRefused(Exception):
    """The database would not take this batch; it may take the acts one by one."""


@dataclass(frozen=True, slots=True)
class Chore:
    """A small piece of upkeep, as each engine does it; what is given stands in its text as $1, or ?1, and so on.

    PostgreSQL's is one statement that says how many rows it was, and where it ended; of SQLite's the last one touches
    so many.
    """

    postgres: str
    sqlite: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """How many rows a piece of upkeep was, and the key after which the next one may begin; None: at the beginning."""

    rows: int
    last: str | None = None


class Store(Protocol):
    """Where the books are kept. `open()` before use, `close()` after; making one touches nothing.

    `apply` is called by one task at a time, the others by any. Instants are milliseconds since 1970; an engine with a
    clock that all its processes share goes by that one instead of the `now` that it is given.
    """

    async def open(self) -> None:
        """Bring the schema up to date and be ready. Raises StoreInUse, StoreUnavailable, or tables.NewerSchema."""

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        """Do these acts in order, in one transaction, and answer each.

        Raises StoreUnavailable or StoreRefused, or what a rule or a driver raises at a bad act; then nothing was
        done, or, where that is uncertain, all of it: every act may be repeated.
        """

    async def renew(self, owner: str, now: int, *, lease_ms: int) -> None:
        """Say that the process `owner` is alive for so long from now. Raises StoreUnavailable."""

    async def orphans(self, owner: str, now: int, *, limit: int) -> list[str]:
        """The ids of open calls of dead processes, `owner` being the one that asks. Raises StoreUnavailable."""

    async def read_counters(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        """How these counters stand, read without a lock. Raises StoreUnavailable."""

    async def read_entry(self, entry_id: str) -> Entry | None:
        """One call in the books. Raises StoreUnavailable."""

    async def find_response_entry(self, response_id: str) -> Entry | None:
        """The call that made this response, the newest of several. Raises StoreUnavailable."""

    async def tend(self, chore: Chore, *given: object) -> Done:
        """Do it in a transaction of its own. Raises StoreUnavailable."""

    async def close(self) -> None:
        """Let go of the database."""
