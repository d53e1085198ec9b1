"""The database as the ledger sees it: what every engine promises, and the ways in which it fails.

The ledger hands over acts and gets their answers; how they are locked, applied and written is the engine's own:
`sqlite` for the processes of one machine, `postgres` for as many as share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from proxy.ledger.book import Operation, Reply
from proxy.ledger.entry import Entry
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
class JobResult:
    """How many rows one step of a maintenance job touched, and the key after which the next step starts.

    `last` is None if the next step starts at the beginning.
    """

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

    async def roll_up(self, limit: int, after: str | None) -> JobResult:
        """Add up to `limit` ended calls, from behind the id `after` on, to the sums of their days.

        In one transaction that also marks them as counted, so each call is counted once, whoever is killed when.
        Raises StoreUnavailable, like the two below.
        """

    async def delete_calls(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete up to `limit` counted calls that were reserved before this instant, from behind the id `after` on."""

    async def delete_days(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete up to `limit` sums of days that began before this instant, from the day `after` on."""

    async def close(self) -> None:
        """Close the database."""
