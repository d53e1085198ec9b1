"""Connections to the PostgreSQL server that has the database now, and what their errors mean.

Of several hosts it is the primary. After a failover that is another server, which with asynchronous replication may
not have what was committed last. It is noticed by the timeline, which grows with each promotion of a standby.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import asyncpg
import structlog
from asyncpg.exceptions import PostgresError, TargetServerAttributeNotMatched
from sqlalchemy.exc import DBAPIError

from proxy.ledger.store import StoreUnavailable, host_and_port, hosts_of, shown_url

log = structlog.get_logger("ledger")

# asyncpg raises InternalClientError if a connection is used in the moment in which it breaks.
FAILURES = (
    *(PostgresError, asyncpg.InterfaceError, asyncpg.exceptions.InternalClientError),
    *(DBAPIError, OSError, TimeoutError),
)
# The name of this file begins with the timeline, in eight hexadecimal digits. The control file has the timeline too,
# but the new one only since the first checkpoint after a promotion, which may be minutes later.
WAL_FILE = "pg_walfile_name(pg_current_wal_lsn())"
_READ_SYSTEM = "SELECT system_identifier FROM pg_control_system()"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait, in milliseconds.

    A process that has stopped must lose its locks before others give up waiting for them. Example with the defaults:
    process A stops in the middle of its batch, and B begins to wait for its locks at once. After 3 s the server ends
    A's transaction, and B continues, one second before its lock timeout.
    """

    connect_ms: int = 4000  # to connect
    probe_ms: int = 2000  # for the reply to BEGIN, ROLLBACK or a close; after it the connection counts as broken
    idle_ms: int = 3000  # until the server ends a transaction whose client sends nothing
    lock_ms: int = 4000  # for one lock
    statement_ms: int = 6000  # for one statement
    batch_ms: int = 7000  # for a whole transaction, enforced by the server (PostgreSQL 17 or newer)
    whole_ms: int = 9000  # for a whole transaction, enforced by us


@dataclass(frozen=True, slots=True)
class Server:
    """The server that has the database: the history of its data.

    A cluster and its copies have one system identifier. The timeline grows by one with each promotion of a standby.
    """

    system: int
    timeline: int

    def __str__(self) -> str:
        return f"timeline {self.timeline} of system {self.system}"


class Primary:
    """The server that has the database of this URL. `name` is the URL without user and password.

    `server` is the one to which the last connection led; None if it does not say who it is.
    """

    def __init__(self, url: str, timeouts: Timeouts) -> None:
        self.name = shown_url(url)
        self.server: Server | None = None
        self._url = url
        self._timeouts = timeouts
        # Several hosts are tried one after the other, the one that was the primary last first.
        self._hosts = [(host, port) for host, port in hosts_of(url) if host]
        self._callbacks: list[Callable[[], object]] = []

    def on_failover(self, callback: Callable[[], object]) -> None:
        """Call `callback` whenever another server has the database than before."""
        self._callbacks.append(callback)

    def unavailable(self, error: BaseException, *, is_uncertain: bool = False) -> StoreUnavailable:
        """The error to raise for this one: with the server and the database, without the password."""
        text = f"PostgreSQL can't be used at {self.name}: {reason_of(error)}{_remedy(error)}"
        return StoreUnavailable(text, is_uncertain=is_uncertain)

    async def connect(self) -> Any:
        """A new connection to the primary, on which a failover has been noticed."""
        try:
            connection = await self._connect_to_primary()
        except TargetServerAttributeNotMatched as error:
            raise self.unavailable(error) from error
        except ValueError:
            # `from None`, because the text of the ValueError may contain parts of the URL, and with it the password.
            raise StoreUnavailable(
                f"the driver can't read the database's URL (host and name: {self.name}): correct `database`"
            ) from None
        try:
            await self._identify(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _connect_to_primary(self) -> Any:
        """Try the hosts until one is the primary.

        The driver could do that, but not in a limited time for each host: a host that is switched off would take all
        of it, and the next one would never be tried.
        """
        if len(self._hosts) < 2:
            return await self._connect_to()
        problems = []
        for host, port in tuple(self._hosts):
            try:
                connection = await self._connect_to(host, port)
            except FAILURES as error:
                problems.append((host, port, error))
            else:
                self._hosts.remove((host, port))
                self._hosts.insert(0, (host, port))
                return connection
        reasons = "; ".join(f"{host_and_port(host, port)}: {reason_of(error)}" for host, port, error in problems)
        raise StoreUnavailable(f"PostgreSQL can't be used at {self.name}: {reasons}{_UNREACHABLE}")

    async def _connect_to(self, host: str | None = None, port: str | None = None) -> Any:
        """A connection to this host, or to the one in the URL.

        A standby that still waits for its promotion is not accepted: what is read there may be old.
        """
        only = {"host": host, "port": int(port)} if host and port else {"host": host} if host else {}
        # With a cache of 0 statements asyncpg gives statements no names.
        return await asyncpg.connect(
            self._url,
            **only,
            timeout=self._timeouts.connect_ms / 1000 / max(1, len(self._hosts)),
            statement_cache_size=0,
            target_session_attrs="primary",
        )

    async def _identify(self, connection: Any) -> None:
        """Note which server this connection leads to. Some managed services do not say it; then nothing is noted."""
        timeout_s = self._timeouts.probe_ms / 1000
        try:
            timeline = _timeline_of(await connection.fetchval(f"SELECT {WAL_FILE}", timeout=timeout_s))
            system = await connection.fetchval(_READ_SYSTEM, timeout=timeout_s)
        except PostgresError as error:
            log.debug("the timeline of the database can't be read", reason=str(error))
            self.server = None
        else:
            self._note_server(Server(system, timeline))

    def note_timeline(self, wal_file: str | None) -> None:
        """Note the timeline, which a connection that is open has read by WAL_FILE; None if it could not."""
        if wal_file is not None and self.server is not None:
            self._note_server(replace(self.server, timeline=_timeline_of(wal_file)))

    def _note_server(self, server: Server) -> None:
        before, self.server = self.server, server
        if before is None or before == server:
            return
        log.warning(
            "another server has the database now, as after a failover: if replication is asynchronous, what was "
            'committed last may be missing; see "Failover" in docs/postgresql.md',
            database=self.name,
            before=str(before),
            now=str(server),
        )
        for callback in self._callbacks:
            callback()


def _timeline_of(wal_file: str) -> int:
    return int(wal_file[:8], 16)


def state_of(error: BaseException) -> str:
    """The SQLSTATE of an error of the server, also if SQLAlchemy has wrapped it. Empty for other errors."""
    return getattr(getattr(error, "orig", error), "sqlstate", None) or ""


def _remedy(error: BaseException) -> str:
    """What to do about an error, by its SQLSTATE (PostgreSQL, appendix A). Empty if the error says it."""
    if isinstance(error, TargetServerAttributeNotMatched):
        return f"; {_REMEDIES['25006']}"
    if not (state := state_of(error)):
        return _UNREACHABLE if isinstance(error, OSError | TimeoutError) else ""
    return next((f"; {remedy}" for prefix, remedy in _REMEDIES.items() if state.startswith(prefix)), "")


# asyncio's text, with the address of a socket: ('::1', 5432, 0, 0).
_CONNECT_FAILED = re.compile(r"\[Errno (\d+)\] Connect call failed \('([^']*)', (\d+)[^)]*\)")
_UNREACHABLE = "; check that the server runs, and the host, the port and sslmode in `database`"
_REMEDIES = {
    "28": "check both in `database`, where a ${…} is taken literally and not decoded, and pg_hba.conf of the server",
    "3D000": "create the database, or correct its name in `database`",
    "42501": "give the user this right, for example with GRANT CREATE ON DATABASE",
    "25006": "wait until it is promoted, or write the host of the primary in `database`",
    "53100": "free space on the server's disk",
    "53300": "raise max_connections of the server, or run fewer processes",
    "57P": "the server is starting or stopping; it may accept connections in a moment",
}


def reason_of(error: BaseException) -> str:
    """The text of an error for logs, without the parameters of its statement, which contain names of users."""
    if state_of(error).startswith("28"):
        # The server's text has the user's name, which has the password in it if `database` has a colon too few.
        return "the server does not accept this user with this password"
    if isinstance(error, DBAPIError):
        return str(error.orig)
    if isinstance(error, TargetServerAttributeNotMatched):
        return "this server is a standby"
    if isinstance(error, TimeoutError):
        return "the database did not answer in time"
    return _CONNECT_FAILED.sub(_failed_address, str(error)) or type(error).__name__


def _failed_address(found: re.Match[str]) -> str:
    """An address to which asyncio could not connect, as people write it, and why."""
    number, host, port = found.groups()
    return f"{host_and_port(host, port)}: {os.strerror(int(number))}"
