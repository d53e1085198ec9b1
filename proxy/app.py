"""The roof: builds the parts once, starts them in order, and stops them in order.

Starting: tokenizers → ledger (its schema, and what a dead process left) → connections to the upstreams → listeners.
Stopping: readiness off → no new connections → let calls end → settle what is left → close the ledger.
"""

import asyncio
import gc
import resource
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from aiohttp import web

from proxy.admin import Admin
from proxy.api import Api
from proxy.config import Address, Config
from proxy.departure import Departures
from proxy.health import Health
from proxy.ledger import LEASE_MS, Ledger
from proxy.metrics import Metrics
from proxy.policy import Policy
from proxy.relay import Relay
from proxy.reload import Look, Policies
from proxy.sqlite import SqliteStore
from proxy.store import Store, StoreUnavailable
from proxy.tasks import Tasks
from proxy.tokens import Tokenizers
from proxy.upstream import Upstreams
from proxy.waiting import WaitingRoom

_LOOK_EVERY_S = 1.0
# What is still running this long after the stop is cut off, and settled.
GRACE_S = 30.0
# Bearer tokens of several kilobytes are honest (JSON web tokens); the library's 8190 would answer them in plain text.
_HEADER_BYTES_MAX = 32_768
_IDLE_S = 75.0

log = structlog.get_logger("app")


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Server:
    """One running proxy. `api` and `admin` are its listeners' addresses once it has started."""

    def __init__(
        self,
        config: Config,
        *,
        load: Callable[[], Config],
        tokenizers: Tokenizers,
        look: Callable[[], Look] = lambda: None,
        now: Callable[[], int] = wall_clock_ms,
        departures: Departures | None = None,
    ) -> None:
        self.metrics = Metrics()
        self._tokenizers = tokenizers
        self._load = load
        self.policies = Policies(config, load=self._load_whole, look=look, metrics=self.metrics, now=now)
        self.ledger = Ledger(
            store_of(config.settings.database),
            owner=f"proxy-{secrets.token_hex(8)}",
            now=now,
            lease_ms=config.settings.lease_ms or LEASE_MS,
            wait_s=lambda: self.policies.current.ledger_wait_s,
        )
        self.upstreams = Upstreams()
        self.waiting = WaitingRoom(self.ledger)
        relay = Relay(
            self.waiting,
            self.upstreams,
            tokenizers=tokenizers,
            metrics=self.metrics,
            departures=departures or Departures(),
            now=now,
        )
        self.health = Health(self.ledger, self.policies)
        self._api = Api(self.policies, self.ledger, relay=relay, health=self.health, now=now)
        self._admin = Admin(self.metrics, self.health)
        self._settings = config.settings
        self._chores = Tasks()
        self._runners: list[web.AppRunner] = []
        self.api: Address | None = None
        self.admin: Address | None = None

    @property
    def calls_in_flight(self) -> int:
        """How many calls have begun and are not settled."""
        return len(self._api.calls)

    async def at_rest(self) -> None:
        """Wait until no call is in flight: all that was begun is settled."""
        await self._api.calls.all_ended()

    async def start(self) -> None:
        """Begin to serve. Raises what `store.Store.open` raises, or OSError where a port is taken."""
        self._tokenizers.load(_encodings_of(self.policies.current))
        await self.ledger.start()
        self.upstreams.open()
        self.api = await self._listen(self._api.application(), self._settings.api)
        if self._settings.admin is not None:
            self.admin = await self._listen(self._admin.application(), self._settings.admin)
        self._chores.start("lease", every(self.ledger.lease_ms / 4000, self.ledger.renew_lease))
        self._chores.start("sweep", every(self.ledger.lease_ms / 2000, self.ledger.sweep))
        self._chores.start("look at the policy", every(_LOOK_EVERY_S, self.policies.reload_if_changed))

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """End in order; calls get `grace_s` to end by themselves, and are then cut off and settled."""
        self.health.is_stopping = True
        for runner in self._runners:
            for site in list(runner.sites):
                await site.stop()
            if runner.server is not None:
                runner.server.pre_shutdown()  # connections that are kept alive bring no more calls
        cut_off = await self._api.calls.finish(grace_s)
        if cut_off:
            log.warning("calls were cut off and settled", calls=cut_off)
        await self._chores.finish(0)
        for runner in self._runners:
            await runner.cleanup()
        await self.upstreams.close()
        await self.ledger.close()

    def _load_whole(self) -> Config:
        """The config as it is now, with the tokenizers that its models need."""
        config = self._load()
        self._tokenizers.load(_encodings_of(config.policy))
        return config

    async def _listen(self, application: web.Application, address: Address) -> Address:
        runner = web.AppRunner(
            application,
            access_log=None,
            # A handler only waits for its call, which runs in a task of its own; so it can be cancelled the moment
            # its client hangs up, and that is how we notice, also while nothing is being written.
            handler_cancellation=True,
            keepalive_timeout=_IDLE_S,
            max_field_size=_HEADER_BYTES_MAX,
            max_line_size=_HEADER_BYTES_MAX,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, address.host, address.port, reuse_address=True).start()
        host, port = runner.addresses[0][:2]
        return Address(host, port)


def _encodings_of(policy: Policy) -> set[str]:
    """The tokenizers of the models that are named, and the usual ones where clients may name others."""
    models = policy.models or {}
    usual = () if models and "*" not in models else ("o200k_base", "cl100k_base")
    return {*usual, *(Tokenizers.encoding_of(model).name for name, model in models.items() if name != "*")}


async def serve(server: Server, started: Callable[[Server], None] = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads the policy. `started` is called once it serves."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    reloads = Tasks()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: reloads.start("reload", server.policies.reload()))
    _raise_file_limit()
    try:
        await server.start()
        # What was imported and built lives as long as the process: a full collection must not walk it each time,
        # which took 50 µs of every call and paused all streams for up to 50 ms.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        started(server)
        await stop.wait()
    finally:
        await server.stop()


def _raise_file_limit() -> None:
    """A stream takes two descriptors, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def store_of(database: str) -> Store:
    """The engine that a database's URL asks for. Raises StoreUnavailable where it is not installed."""
    if database.startswith("sqlite:"):
        return SqliteStore(sqlite_path(database))
    try:
        from proxy.postgres import PostgresStore  # its driver is an extra, and takes 10 MB that SQLite doesn't need
    except ModuleNotFoundError as error:
        raise StoreUnavailable(
            f"PostgreSQL needs {error.name}, which is not installed: pip install 'llm-quota-proxy[postgres]'"
        ) from error
    return PostgresStore(database)


def sqlite_path(database: str) -> Path:
    """The file that `sqlite:///…` names."""
    return Path(database.removeprefix("sqlite:///"))


def look_at(path: str) -> Look:
    """What tells that a file was changed or replaced; None where it is not there."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)


async def every(seconds: float, chore: Callable[[], Awaitable[object]]) -> None:
    """Do a chore again and again; one that fails is logged, and done again."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await chore()
        except Exception as error:
            log.error("a chore failed", exc_info=error)
