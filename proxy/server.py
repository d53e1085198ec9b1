"""The roof: builds the parts once, starts them in order, and stops them in order.

Starting: tokenizers → ledger (its schema, and what a dead process left) → connections to the upstreams → listeners.
Stopping: readiness off → no new connections → let calls end → settle what is left → close the ledger.
"""

import asyncio
import gc
import resource
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import getrandbits

import orjson
import structlog
from aiohttp import web

from proxy.calls.disconnect import Disconnects
from proxy.calls.dispatch import Dispatcher
from proxy.calls.relay import Relay
from proxy.calls.stored_responses import StoredResponses
from proxy.calls.tokenizer import Tokenizers
from proxy.config.loader import Address, Config
from proxy.config.reload import Fingerprint, Policies
from proxy.ledger.ledger import LEASE_MS, Ledger
from proxy.ledger.queue import AdmissionQueue
from proxy.ledger.rollup import Rollup
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import Store, StoreUnavailable
from proxy.metrics import Metrics
from proxy.policy.policy import Policy
from proxy.tasks import Tasks
from proxy.upstreams.client import Upstreams
from proxy.web.admin import Admin
from proxy.web.health import Health
from proxy.web.listener import Listener
from proxy.web.routes import Api

_LOOK_EVERY_S = 1.0
_ROLLUP_EVERY_S = 10.0
# What is still running this long after the stop is cut off, and settled.
GRACE_S = 30.0

log = structlog.get_logger("app")


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def random_number() -> int:
    """From 0 on, far larger than any sum of weights."""
    return getrandbits(64)


@dataclass(frozen=True, slots=True)
class InheritedResources:
    """What a worker inherits from its parent. A process without a parent has only a name and a database.

    `owner` is the process's name in the ledger. `api` and `admin` are descriptors of sockets that listen already, `lock`
    that of the lock on the SQLite file, if there is one; `metrics` is the folder in which all workers count; `dead` are
    owners that have certainly ended, whatever is left of their leases.
    """

    owner: str
    database: str
    api: tuple[int, ...] = ()
    admin: tuple[int, ...] = ()
    lock: int | None = None
    metrics: str | None = None
    dead: tuple[str, ...] = ()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All files that the worker inherits."""
        return (*self.api, *self.admin, *(() if self.lock is None else (self.lock,)))

    def to_line(self) -> bytes:
        """The line that the parent writes into the control socket. It holds the database's password."""
        return orjson.dumps(self) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "InheritedResources":
        """What the parent wrote. Fields that only a later release knows are ignored.

        A restart starts the code that is on the disk by then, so parent and worker may be of different releases:
        fields are only ever added.
        """
        given = {name: value for name, value in orjson.loads(line).items() if name in cls.__slots__}
        lists = {name: tuple(given[name]) for name in ("api", "admin", "dead") if name in given}
        return cls(**{**given, **lists})


class Server:
    """One running proxy. `api` and `admin` are its listeners' addresses once it has started."""

    def __init__(  # noqa: PLR0913 - see EXEMPT in tests/test_house.py
        self,
        config: Config,
        *,
        load: Callable[[], Config],
        tokenizers: Tokenizers,
        look: Callable[[], Fingerprint] = lambda: None,
        now: Callable[[], int] = wall_clock_ms,
        disconnects: Disconnects | None = None,
        inherited: InheritedResources | None = None,
        draw: Callable[[], int] = random_number,
    ) -> None:
        self._inherited = inherited or InheritedResources(f"proxy-{secrets.token_hex(8)}", config.settings.database)
        self.metrics = Metrics(self._inherited.metrics)
        self._tokenizers = tokenizers
        self._load = load
        self.policies = Policies(config, load=self._load_whole, fingerprint=look, metrics=self.metrics, now=now)
        store = store_of(self._inherited.database, self._inherited.lock)
        self.rollup = Rollup(store, now=now, keep=lambda: self.policies.current.keep)
        self.ledger = Ledger(
            store,
            owner=self._inherited.owner,
            now=now,
            lease_ms=config.settings.lease_ms or LEASE_MS,
            wait_s=lambda: self.policies.current.ledger_wait_s,
        )
        self.upstreams = Upstreams()
        self.queue = AdmissionQueue(self.ledger)
        relay = Relay(
            self.queue,
            Dispatcher(self.upstreams, metrics=self.metrics, now=now, draw=draw),
            tokenizers=tokenizers,
            metrics=self.metrics,
            disconnects=disconnects or Disconnects(),
            now=now,
        )
        self.health = Health(self.ledger, self.policies)
        stored = StoredResponses(self.ledger, self.upstreams)
        self._api = Api(self.policies, stored, relay=relay, health=self.health, settings=config.settings, now=now)
        self._admin = Admin(self.metrics, self.health)
        self._settings = config.settings
        self._chores = Tasks()
        self._runners: list[web.AppRunner] = []
        self._is_leaving = False
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
        await self.ledger.start(self._inherited.dead)
        self.upstreams.open()
        inherited, settings = self._inherited, self._settings
        self.api = await self._listen(self._api.application(), inherited.api or settings.api)
        admin = inherited.admin or (None if inherited.api else settings.admin)
        if admin is not None:
            self.admin = await self._listen(self._admin.application(), admin)
        self._chores.start("lease", every(self.ledger.lease_ms / 4000, self.ledger.renew_lease))
        self._chores.start("sweep", every(self.ledger.lease_ms / 2000, self.ledger.sweep))
        self._chores.start("records", every(_ROLLUP_EVERY_S, self.rollup.run))
        self._chores.start("look at the policy", every(_LOOK_EVERY_S, self.policies.reload_if_changed))

    async def leave(self) -> None:
        """Make way for others on the same sockets: no new connections, and each one ends with its next answer.

        So nobody asks into a connection that is just being closed, as happens when those at rest are closed at once.
        """
        self._is_leaving = True
        await self._accept_no_more()

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """End in order; calls get `grace_s` to end by themselves, and are then cut off and settled."""
        self.health.is_stopping = True
        await self._accept_no_more()
        for runner in self._runners:
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

    async def _accept_no_more(self) -> None:
        for runner in self._runners:
            for site in list(runner.sites):
                await site.stop()

    def _load_whole(self) -> Config:
        """The config as it is now, with the tokenizers that its models need."""
        config = self._load()
        self._tokenizers.load(_encodings_of(config.policy))
        return config

    async def _listen(self, application: web.Application, where: Address | tuple[int, ...]) -> Address:
        """Serve it at an address, or on sockets that we inherited."""
        if not isinstance(where, Address):
            application.on_response_prepare.append(self._part_when_leaving)
        runner = Listener(application, self._settings.connection_limits)
        await runner.setup()
        self._runners.append(runner)
        if isinstance(where, Address):
            await web.TCPSite(runner, where.host, where.port, reuse_address=True).start()
        else:
            for number in where:
                await web.SockSite(runner, socket.socket(fileno=number)).start()
        host, port = runner.addresses[0][:2]
        return Address(host, port)

    async def _part_when_leaving(self, request: web.Request, response: web.StreamResponse) -> None:
        if self._is_leaving:
            response.force_close()
            response.headers["connection"] = "close"  # the library has decided on its headers before it asks us


def _encodings_of(policy: Policy) -> set[str]:
    """The tokenizers of the models that are named, and the usual ones where clients may name others."""
    models = policy.models or {}
    usual = () if models and "*" not in models else ("o200k_base", "cl100k_base")
    named = (place for name, model in models.items() if name != "*" for place in model.targets)
    return {*usual, *(Tokenizers.encoding_of(place).name for place in named)}


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


def store_of(database: str, lock: int | None = None) -> Store:
    """The engine that a database's URL asks for; `lock` is on a file that workers share.

    Raises StoreUnavailable where it is not installed.
    """
    if database.startswith("sqlite:"):
        return SqliteStore(sqlite_path(database), lock=lock)
    try:
        from proxy.ledger.postgres import (
            PostgresStore,  # its driver is an extra, and takes 10 MB that SQLite doesn't need
        )
    except ModuleNotFoundError as error:
        raise StoreUnavailable(
            f"PostgreSQL needs {error.name}, which is not installed: pip install 'llm-quota-proxy[postgres]'"
        ) from error
    return PostgresStore(database)


def sqlite_path(database: str) -> Path:
    """The file that `sqlite:///…` names."""
    return Path(database.removeprefix("sqlite:///"))


def look_at(path: str) -> Fingerprint:
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
