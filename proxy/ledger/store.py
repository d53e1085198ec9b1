"""The interface of a database engine to the ledger, and the ways in which a database fails.

The ledger passes a batch of operations to `Store.apply` and gets their replies. How rows are locked, loaded and
written is up to the engine: `sqlite` for the processes of one machine, `postgres` for any number of machines.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qs

from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.ledger.book import Operation, Reply
from proxy.ledger.entry import Entry
from proxy.policy.quota import Counter, CounterKey

# What `Store.transaction` gives.
Connection = AsyncConnection


class StoreInUse(Exception):
    """Another process, which is not one of our workers, has this database open for writing."""


class StoreUnavailable(Exception):
    """The database cannot be reached or written at the moment. The same operation may succeed later.

    `is_uncertain` means that it failed while it committed, so the batch may have been committed.
    """

    def __init__(self, message: str, *, is_uncertain: bool = False) -> None:
        super().__init__(message)
        self.is_uncertain = is_uncertain


class StoreRefused(Exception):
    """The database rejects a value in this batch, now and later. It may accept the other operations one by one."""


def shown_url(url: str) -> str:
    """The hosts, ports and name of the database in a URL of PostgreSQL, without its user and password."""
    hosts = ",".join(host_and_port(host, port) for host, port in hosts_of(url))
    _, slash, name = _authority_of(url)[1].partition("/")
    return f"{hosts}{slash}{name}"


def hosts_of(url: str) -> list[tuple[str, str]]:
    """The hosts and ports in a URL of PostgreSQL; a port may be empty, and so may be a host without a port.

    A host in the query replaces those in front, as for PostgreSQL's own programs. Several have commas in between,
    and there are as many ports, or one for all of them.
    """
    given, behind = _authority_of(url)
    if "host" in given:
        hosts = [(host.removeprefix("[").removesuffix("]"), "") for host in given["host"][0].split(",")]
    else:
        hosts = [_host_and_port_of(each) for each in behind.partition("/")[0].split(",")]
    ports = given.get("port", [""])[0].split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    return [(host, port or more) for (host, port), more in zip(hosts, ports, strict=False)]


def _authority_of(url: str) -> tuple[dict[str, list[str]], str]:
    """The parameters of a URL, and what is behind its user and password: hosts, slash and name."""
    before, _, query = url.partition("://")[2].partition("?")
    # From the last @ on, wherever it is: a password with a / ends the host for a parser.
    return parse_qs(query), before.rpartition("@")[2]


def _host_and_port_of(text: str) -> tuple[str, str]:
    """A host and its port in front of a URL's path, where IPv6 has brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or "]" in port:
        host, port = text, ""
    return host.removeprefix("[").removesuffix("]"), port


def host_and_port(host: str, port: str) -> str:
    """An address as in URLs, where IPv6 has brackets. No port is written if there is none."""
    return (f"[{host}]" if ":" in host and not host.startswith(("/", "[")) else host) + (f":{port}" if port else "")


@dataclass(frozen=True, slots=True)
class JobResult:
    """How many rows one step of a maintenance job touched, and the key after which the next step starts.

    `last` is None if the next step starts at the beginning.
    """

    rows: int
    last: str | None = None


class Store(Protocol):
    """A database that contains a ledger. Call `open()` before use and `close()` after it.

    The constructor does no I/O. Only one task at a time may call `apply`; all other methods may be called at any
    time. Instants are milliseconds since 1970. An engine whose processes share a clock (PostgreSQL) uses that clock
    instead of the `now` it is given.
    """

    async def open(self) -> None:
        """Migrate the schema, or only check it, and make the store ready.

        Raises StoreInUse, StoreUnavailable or schema.NewerSchema.
        """

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        """Apply these operations in this order, in one transaction, and return their replies.

        Raises StoreUnavailable or StoreRefused, or the exception that a rule or the driver raised for one of the
        operations. Then nothing was committed. If the StoreUnavailable is uncertain, either all or nothing was
        committed; every operation may be repeated.
        """

    async def renew(self, owner: str, now: int, *, lease_ms: int) -> int:
        """Let the lease of the process `owner` end `lease_ms` from now. Returns now, by the clock that decides.

        Raises StoreUnavailable.
        """

    async def orphans(self, owner: str, now: int, *, limit: int) -> list[str]:
        """The ids of open calls of dead processes, at most `limit`. `owner` is the process that asks.

        Raises StoreUnavailable.
        """

    async def open_calls(self, owner: str) -> list[str]:
        """The ids of the open calls of the process `owner`. Raises StoreUnavailable."""

    async def read_counters(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        """The committed counters with these keys, read without a lock. Raises StoreUnavailable."""

    async def find_response_entry(self, response_id: str) -> Entry | None:
        """The entry of the call that made this response; of several, the newest. Raises StoreUnavailable."""

    async def roll_up(self, limit: int, after: str | None) -> JobResult:
        """Add up to `limit` ended calls, whose ids come after `after`, to the sums of their days.

        The same transaction marks them as counted, so each call is counted once, even if the process is killed in the
        middle. Raises StoreUnavailable, as the two methods below do.
        """

    async def delete_calls(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete up to `limit` counted calls that were reserved before this instant; their ids come after `after`."""

    async def delete_days(self, limit: int, after: str | None, *, before: int) -> JobResult:
        """Delete up to `limit` sums of days that began before this instant, starting with the day `after`."""

    async def attach(self) -> None:
        """Make ready for `transaction` beside the processes that serve, instead of `open`. Changes nothing.

        Raises StoreUnavailable if there is no database with this release's schema.
        """

    def transaction(self, *, writes: bool = False) -> AbstractAsyncContextManager[Connection]:
        """A transaction of SQLAlchemy, for the directory and for reports. It is committed unless the block raises.

        On SQLite, one that `writes` has the database's one lock from its beginning. Entering, every statement and
        leaving raise StoreUnavailable, and StoreRefused for a value that the database rejects. Then nothing was
        committed.
        """

    def frozen(self) -> AbstractAsyncContextManager[Connection]:
        """A transaction without a time limit that reads everything while nobody can write. It changes nothing.

        Called instead of `open`. Entering raises StoreInUse if a process serves on this database, and
        StoreUnavailable if it has not exactly this release's schema.
        """

    def filling(self) -> AbstractAsyncContextManager[Connection]:
        """A transaction without a time limit that makes the tables where they are missing, and fills them.

        Called instead of `open`. If the block raises, nothing was changed. The errors are those of `transaction`, and
        schema.NewerSchema.
        """

    def on_failover(self, callback: Callable[[], object]) -> None:
        """Call `callback` whenever another server has the database than before.

        What was committed last may be missing there, and what was read before may not be true any more. SQLite has no
        server, so nothing is called.
        """

    async def close(self) -> None:
        """Close the database."""
