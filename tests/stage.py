"""A running proxy in front of a running simulator, started as production starts them, on real sockets.

async with stage(POLICY, folder=tmp_path) as on:
    await on.sdk("alice").chat.completions.create(...)
    assert await on.used("staff/daily", "alice") == (48, 0)
"""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
from openai import AsyncOpenAI

from proxy.calls.disconnect import Disconnects
from proxy.calls.tokenizer import Tokenizers, table_folders
from proxy.config.loader import Config, ConnectionLimits, load_text
from proxy.ledger.schema import SCHEMA, metadata
from proxy.policy.key import Network
from proxy.server import Server
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from proxy.upstreams.client import Upstreams
from tests.audit import audit, balance, rows
from tests.builders import NOON
from tests.postgres import shared
from tests.sqlite import write_migrated

# The engine of stages that name no database; see `every_engine` in conftest.
ENGINE = "sqlite"

UPSTREAM_KEY = "sk-upstream-secret-0123456789"

BASE = """
server: {{api: "127.0.0.1:0", admin: "127.0.0.1:0", shutdown_delay: 0s}}
database: "{database}"
upstreams:
  simulated: {{base_url: "{upstream}", api_key: "{upstream_key}", kind: {kind}{more}}}
"""

STAFF = """
models:
  gpt-4o-mini: {upstream: simulated}
  fast: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
groups:
  staff: {quotas: {daily: {tokens: 1M, requests: 100k, per: day}}}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
  bob: {groups: [staff], keys: ["key-of-bob-0123456789abcdef"]}
"""


def key_of(user: str) -> str:
    """The key of a user in STAFF and in policies like it."""
    return f"key-of-{user}-0123456789abcdef"


@cache
def loaded() -> Tokenizers:
    """Tokenizers that all stages share, so that each table is read once."""
    return Tokenizers(table_folders({}))


class Clock:
    """The time as the proxy and its database see it; tests move it. Milliseconds since 1970.

    PostgreSQL's clock shows `database_ahead_ms` more. SQLite has no clock of its own.
    """

    def __init__(self, now: int = NOON, *, database_ahead_ms: int = 0) -> None:
        self._ms = now
        self._database_ahead_ms = database_ahead_ms
        self._on_change: Callable[[int], object] = lambda ms: None

    def __call__(self) -> int:
        return self._ms

    @property
    def ms(self) -> int:
        """The current time."""
        return self._ms

    @ms.setter
    def ms(self, ms: int) -> None:
        self._ms = ms
        self._on_change(ms + self._database_ahead_ms)

    def when_changed(self, on_change: Callable[[int], object]) -> None:
        """Call this with the database's time, now and whenever a test moves the clock."""
        self._on_change = on_change
        on_change(self._ms + self._database_ahead_ms)


class Stage:
    """A running proxy, its simulated upstream and a client. A reload loads `config`, which a test may replace."""

    def __init__(
        self, server: Server, simulator: Simulator, *, clock: Clock, http: aiohttp.ClientSession, config: Config
    ) -> None:
        self.config = config
        self.server = server
        self.simulator = simulator
        self.clock = clock
        self.http = http
        self.sdks: list[AsyncOpenAI] = []
        self.streams: list[aiohttp.ClientResponse] = []

    @property
    def url(self) -> str:
        """The URL of the API listener, without `/v1`."""
        assert self.server.api is not None
        return f"http://127.0.0.1:{self.server.api.port}"

    @property
    def connections(self) -> int:
        """How many connections the API listener has."""
        listener = self.server._listeners["server.api"].server
        assert listener is not None
        return len(listener.connections)

    @property
    def admin_url(self) -> str:
        """The URL of the admin listener."""
        assert self.server.admin is not None
        return f"http://127.0.0.1:{self.server.admin.port}"

    def sdk(self, user: str = "alice", **more: Any) -> AsyncOpenAI:
        """The official SDK with this user's key, without retries unless asked for."""
        sdk = AsyncOpenAI(**{"base_url": f"{self.url}/v1", "api_key": key_of(user), "max_retries": 0, **more})
        self.sdks.append(sdk)
        return sdk

    async def post(
        self, path: str, body: Any, *, user: str | None = "alice", headers: Mapping[str, str] | None = None
    ) -> "Reply":
        """POST JSON, or bytes unchanged, and read the whole reply."""
        sent = {**({"authorization": f"Bearer {key_of(user)}"} if user else {}), **(headers or {})}
        content = {"data": body} if isinstance(body, (bytes, io.IOBase)) else {"json": body}
        async with self.http.post(self.url + path, headers=sent, **content) as response:
            return Reply(response.status, response.headers.copy(), await response.read())

    async def get(self, path: str, *, user: str | None = "alice") -> "Reply":
        """GET and read the whole reply."""
        sent = {"authorization": f"Bearer {key_of(user)}"} if user else {}
        async with self.http.get(self.url + path, headers=sent) as response:
            return Reply(response.status, response.headers.copy(), await response.read())

    async def quota(self, quota_id: str, user: str = "alice") -> dict[str, Any]:
        """The item of `/v1/quota`."""
        listed = (await self.get("/v1/quota", user=user)).json()["data"]
        return next(item for item in listed if item["id"] == quota_id)

    async def used(self, quota_id: str = "staff/daily", user: str = "alice") -> tuple[int, int]:
        """Tokens used and held, as `/v1/quota` says."""
        tokens = (await self.quota(quota_id, user))["tokens"]
        return tokens["used"], tokens["held"]

    def begin(self, path: str, body: Any, *, user: str = "alice") -> "asyncio.Task[Reply]":
        """POST in the background. Cancelling the task closes the connection."""
        return asyncio.get_running_loop().create_task(self.post(path, body, user=user))

    async def hang_up(self, call: "asyncio.Task[Reply]") -> None:
        """Close the connection of a call that was begun."""
        call.cancel()
        await asyncio.wait([call])

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """Stop the server. At the end of the block another one starts, on the same database and the same ports."""
        addresses = {"api": self.server.api, "admin": self.server.admin}
        await self.server.stop(grace_s=0)
        yield
        self.config = replace(self.config, settings=replace(self.config.settings, **addresses))
        self.server = Server(self.config, load=lambda: self.config, now=self.clock, tokenizers=loaded())
        await self.server.start()

    async def rows(self, table: str) -> list[dict[str, Any]]:
        """The committed rows of a table of the ledger, on either engine."""
        if self.database.startswith("sqlite"):
            return rows(self._file, table)
        found = await shared().run(f"SELECT * FROM {SCHEMA}.{table} ORDER BY 1, 2", url=self.database)
        return [dict(row) for row in found]

    async def audit(self) -> None:
        """Check that each counter is the sum of its calls: held by the open ones, used by the ended ones."""
        if self.database.startswith("sqlite"):
            audit(self._file)
        else:
            balance(await self.rows("calls"), await self.rows("counters"))

    @property
    def database(self) -> str:
        """The URL of the ledger's database."""
        return self.config.settings.database

    @property
    def _file(self) -> Path:
        return Path(self.database.removeprefix("sqlite:///"))

    async def all_settled(self) -> None:
        """Wait until no call is in flight: every call that began is settled."""
        await self.server.all_settled()


class Reply:
    """A whole reply."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which must have OpenAI's four members."""
        error: dict[str, Any] = self.json()["error"]
        assert {"message", "type", "param", "code"} <= error.keys()
        return error


@asynccontextmanager
async def stage(
    policy: str = STAFF,
    *,
    folder: Path,
    clock: Clock | None = None,
    simulator: Simulator | None = None,
    disconnects: Disconnects | None = None,
    upstreams: Upstreams | None = None,
    upstream: str | None = None,
    on_disconnect: str | None = None,
    tokenizers: Tokenizers | None = None,
    database: str | None = None,
    connection_limits: ConnectionLimits | None = None,
    cors: tuple[str, ...] = (),
    trusted_proxies: tuple[Network, ...] = (),
    admin_url: str | None = None,
    admin_hosts: tuple[str, ...] = (),
    prefix: str = "",
    kind: str = "simulator",
    more: str = "",
) -> AsyncIterator[Stage]:
    """Start the simulator and the proxy, and stop them in order.

    Without a `database` the ledger is in a new migrated database of the engine under test: `quotas.db` in `folder`,
    or one of the shared PostgreSQL. An existing `quotas.db` is used, so a test can start the proxy again on it.
    """
    clock = clock or Clock()
    lent = None
    if database is None and ENGINE == "postgresql":
        lent = await _postgres_database()
        database = lent.url
        clock.when_changed(lent.set_time)
    elif database is None and not (folder / "quotas.db").exists():
        write_migrated(folder / "quotas.db")
    simulator = simulator or Simulator(UPSTREAM_KEY)
    runner, port = await serve_simulator(simulator)
    config = config_of(
        policy,
        folder=folder,
        database=database,
        upstream=upstream or f"http://127.0.0.1:{port}/v1",
        kind=kind,
        more=(f", on_disconnect: {on_disconnect}" if on_disconnect else "") + more,
    )
    config = replace(
        config,
        settings=replace(
            config.settings,
            cors=cors,
            connection_limits=connection_limits or ConnectionLimits(),
            trusted_proxies=trusted_proxies,
            admin_url=admin_url,
            admin_hosts=admin_hosts,
            prefix=prefix,
        ),
    )
    server = Server(
        config,
        load=lambda: on.config,
        now=clock,
        disconnects=disconnects,
        upstreams=upstreams,
        tokenizers=tokenizers or loaded(),
    )
    try:
        await server.start()
        try:
            async with aiohttp.ClientSession(auto_decompress=False) as http:
                on = Stage(server, simulator, clock=clock, http=http, config=config)
                try:
                    yield on
                finally:
                    for stream in on.streams:
                        stream.close()
                    for sdk in on.sdks:
                        await sdk.close()
        finally:
            await on.server.stop(grace_s=5)
    finally:
        await runner.cleanup()
    if lent is not None:
        _free_databases.append(lent)


@dataclass(frozen=True, slots=True)
class _PostgresDatabase:
    """A migrated database and the function that sets its time, in milliseconds since 1970."""

    url: str
    set_time: Callable[[int], object]


# Of stages that have ended. Their rows stay until another stage takes the database, so that a test can read them.
_free_databases: list[_PostgresDatabase] = []


async def _postgres_database() -> _PostgresDatabase:
    """A database without rows. A used one is emptied if there is one: that takes 5 ms, and creating one 100 ms."""
    if not _free_databases:
        setters: list[Callable[[int], object]] = []
        url = await shared().timed(setters.append)
        return _PostgresDatabase(url, *setters)
    database = _free_databases.pop()
    # The one row of `directory` is made by its migration.
    tables = (f"{SCHEMA}.{table.name}" for table in metadata.sorted_tables if table.name != "directory")
    await shared().run(*(f"DELETE FROM {table}" for table in tables), url=database.url)
    return database


def config_of(
    policy: str, *, folder: Path, upstream: str, database: str | None = None, kind: str = "simulator", more: str = ""
) -> Config:
    """A config with the listeners on free ports and one upstream, `simulated`."""
    database = database or sqlite_in(folder)
    return load_text(text_of(policy, database=database, upstream=upstream, kind=kind, more=more))


def text_of(policy: str, *, database: str, upstream: str, kind: str = "simulator", more: str = "") -> str:
    """The YAML of such a config. Also with fast timers a call waits for a slow database, unless it says else."""
    base = BASE.format(database=database, upstream=upstream, upstream_key=UPSTREAM_KEY, kind=kind, more=more)
    return ("" if "ledger_wait" in policy else "ledger_wait: 10m\n") + base + policy


def sqlite_in(folder: Path) -> str:
    """The database URL of a stage in this folder on SQLite."""
    return f"sqlite:///{folder / 'quotas.db'}"


async def until(is_reached: Callable[[], bool]) -> None:
    """Yield to the event loop until our own tasks have made the condition true. The test's timeout bounds it."""
    while not is_reached():  # noqa: ASYNC110 - nothing here would set an event for a test
        await asyncio.sleep(0)


@contextmanager
def fast_timers(factor: float = 5) -> Iterator[None]:
    """Run the event loop's clock this many times as fast: a timeout of 2 s ends after 0.4 s.

    For tests in which calls and streams wait for their timeouts and for nothing else. The limits of connections and
    commits become shorter too, so with a large factor a busy machine may reach them.
    """
    loop: Any = asyncio.get_running_loop()
    selector = loop._selector
    time, select = loop.time, selector.select
    begun = time()
    loop.time = lambda: begun + factor * (time() - begun)
    selector.select = lambda timeout: select(timeout / factor if timeout else timeout)
    try:
        yield
    finally:
        ahead = loop.time() - time()
        loop.time = lambda: time() + ahead  # a loop's clock must not go back
        selector.select = select


@contextmanager
def movable_time() -> Iterator[Callable[[float], None]]:
    """A function that moves the event loop's clock by so many seconds, for timeouts that a test decides about."""
    loop: Any = asyncio.get_running_loop()
    time, ahead_s = loop.time, 0.0
    loop.time = lambda: time() + ahead_s

    def move(seconds: float) -> None:
        nonlocal ahead_s
        ahead_s += seconds

    yield move  # a loop's clock must not go back, so it stays ahead
