"""Builds the parts of one process, and starts and stops them in order. It is the only module that knows all parts.

A part is started when everything that it uses has been started:

1. ledger: the database is migrated, and calls that a dead process left open are charged
2. HTTP client for the upstreams; keys that are not fixed are fetched in the background
3. listeners: from now on the process serves
4. maintenance jobs

They are stopped so that calls which a load balancer still sends are not refused, and calls that can still end by
themselves are not cut off:

1. `/readyz` becomes 503. For `shutdown_delay` new calls are still taken, because a load balancer learns of that only
   when it asks the next time. Each answer closes its connection, so that a pool of connections drains.
2. The API listener accepts no new connections, and idle connections and streams of events are closed.
3. Requests that are being answered get `grace_s` seconds. Then calls are cancelled, and charged what they have used.
4. Responses whose answers were cut are deleted at the upstreams, for a few seconds at most.
5. Maintenance jobs, the admin listener and the HTTP client are stopped. So metrics can be read until every call is
   settled. The ledger is last, because it settles the calls.

SIGTERM does that. SIGINT, also during such a stop, skips the delay and the grace.
"""

import asyncio
import contextlib
import ctypes
import errno
import gc
import os
import resource
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import getrandbits
from typing import TYPE_CHECKING

import orjson
import structlog
from aiohttp import web

from proxy import logs
from proxy.administration.refresh import Refresh
from proxy.administration.upkeep import delete_old
from proxy.calls.body_threads import BodyThreads
from proxy.calls.disconnect import Disconnects
from proxy.calls.dispatch import Dispatcher
from proxy.calls.relay import Relay
from proxy.calls.stored_responses import StoredResponses
from proxy.calls.tokenizer import Tokenizers
from proxy.config.loader import Address, Config, ConnectionLimits
from proxy.config.reload import Changes, Policies
from proxy.identity.admins import AdminDatabase
from proxy.identity.authentication import Snapshot
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import Cuts, Directory
from proxy.ledger.ledger import LEASE_MS, Ledger
from proxy.ledger.queue import AdmissionQueue
from proxy.ledger.rollup import Rollup
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import Store, StoreUnavailable, shown_url
from proxy.metrics import Metrics
from proxy.tasks import Tasks, first_of
from proxy.upstreams.client import Upstreams
from proxy.web.gauges import Gauges
from proxy.web.health import Health
from proxy.web.listener import Listener
from proxy.web.live import Live
from proxy.web.middleware import Handler
from proxy.web.request_log import RequestLog
from proxy.web.routes import Api

if TYPE_CHECKING:
    from proxy.web.admin.application import Admin

_RELOAD_CHECK_EVERY_S = 1.0
_ROLLUP_EVERY_S = 10.0
# A change of users or keys is in force on every replica within twice this time.
_DIRECTORY_POLL_EVERY_S = 1.0
# Keys show the minute in which they were last used.
_USED_KEYS_EVERY_S = 30.0
# How late the key of an upstream can be fetched after it is due, or after a reload has brought it in.
_KEYS_EVERY_S = 1.0
# How late the name of a forgotten user can be free after its last window has ended.
_FORGOTTEN_EVERY_S = 60.0
_DELETE_OLD_EVERY_S = 60.0
# Descriptors that are no connections: the database, the listeners, the log, uploads.
_OTHER_DESCRIPTORS = 64
# How often the garbage collector looks at everything. Bodies and answers are freed without it, so this is for small
# leftovers: the library's cycles of connections and requests, of some kilobytes each. It takes 0.1 µs an object.
_COLLECT_EVERY_S = 60.0
# Blocks of memory from this size on are returned to the system when they are freed. It is above what is read from a
# connection at a time (256 KiB), because asking the system for memory costs more than reusing it.
_RETURNED_BYTES_MIN = 512 * 1024
# How long requests may still run after the API listener has stopped accepting connections. Then calls are cut off and
# settled.
GRACE_S = 30.0
# What a stop takes at most after that, also if the database hangs: to settle calls and close their connections
# (3 s), `_ENDING_S`, and to close those to the database (2 s).
CLEANUP_S = 15.0
# From the end of the last call until the ledger gives up its last commit. Deletions at the upstreams take 5 s of it
# at most.
_ENDING_S = 9.0
# How long the last refusals and uses of keys are written. They are only displayed, so nobody waits long for them.
_NOTES_S = 2.0
# What is left at least for the last commit.
_LAST_COMMIT_S = 1.0

log = structlog.get_logger("server")


def wall_clock_ms() -> int:
    """The time in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def random_number() -> int:
    """A random integer from 0 to 2^64 - 1. That is far larger than any sum of weights, which it chooses among."""
    return getrandbits(64)


@dataclass(frozen=True, slots=True)
class InheritedResources:
    """What a worker inherits from its parent. A process without a parent has only an owner and a database.

    `owner` is the process's name in the ledger. `api` and `admin` are descriptors of listening sockets, and `lock` is
    the descriptor of the lock on the SQLite file, if the database is one. `metrics` is the folder with the metrics of
    all workers. `dead` has owners that have certainly ended: their calls are charged without waiting until their
    leases lapse. `shutdown_delay_s` is the parent's, which kills a worker that takes longer; None: the worker's own.
    """

    owner: str
    database: str
    api: tuple[int, ...] = ()
    admin: tuple[int, ...] = ()
    lock: int | None = None
    metrics: str | None = None
    dead: tuple[str, ...] = ()
    shutdown_delay_s: float | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All descriptors that the worker inherits."""
        return (*self.api, *self.admin, *(() if self.lock is None else (self.lock,)))

    def to_line(self) -> bytes:
        """The line of JSON that the parent writes to the control socket.

        It contains the password of the database, so it is not passed as an argument, which `ps` would show.
        """
        return orjson.dumps(self) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "InheritedResources":
        """Parse what the parent wrote. Unknown fields are ignored.

        A restart with SIGUSR2 starts workers with the code that is on the disk at that time, so parent and worker may
        be of different releases. Fields are therefore only added, each with a default.
        """
        given = {name: value for name, value in orjson.loads(line).items() if name in cls.__slots__}
        lists = {name: tuple(given[name]) for name in ("api", "admin", "dead") if name in given}
        return cls(**{**given, **lists})


class Server:
    """One proxy process. `api` and `admin` are the addresses of its listeners once it has started.

    `load` loads the config again and raises BadConfig if it is invalid; `changes` returns the files that have changed
    since. `now` returns the time in milliseconds since the epoch, `clock` seconds that only grow, `draw` a random
    integer.
    """

    def __init__(  # noqa: PLR0913 - see EXEMPT in tests/test_house.py
        self,
        config: Config,
        *,
        load: Callable[[], Config],
        tokenizers: Tokenizers,
        changes: Callable[[], Changes] = dict,
        now: Callable[[], int] = wall_clock_ms,
        disconnects: Disconnects | None = None,
        upstreams: Upstreams | None = None,
        inherited: InheritedResources | None = None,
        draw: Callable[[], int] = random_number,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inherited = inherited or InheritedResources(f"proxy-{secrets.token_hex(8)}", config.settings.database)
        self.metrics = Metrics(self._inherited.metrics)
        self._tokenizers = tokenizers
        self._load = load
        store = store_of(
            self._inherited.database,
            self._inherited.lock,
            may_be_new=config.settings.may_be_new_database,
            migrates=config.settings.migrates,
            now=now,
        )
        self._users = DirectoryDatabase(store, now=now)
        self.directory = Directory(
            self._users, clock=clock, now=now, on_cut=self._end_calls_of, on_change=self._note_change
        )
        self.policies = Policies(
            config,
            load=self._load_config,
            build=partial(Snapshot.of, directory=self.directory, now=now, on_ignored_headers=self.metrics.ignored),
            changes=changes,
            metrics=self.metrics,
            now=now,
        )
        self._delete_old = lambda: delete_old(store, self.policies.current.policy.keep, now=now())
        self.refresh = Refresh(self.directory, self._users, self.policies, clock=clock, now=now)
        self.policies.confirm_with(self.refresh.ensure_recent)
        self.ledger = Ledger(
            store,
            owner=self._inherited.owner,
            now=now,
            lease_ms=config.settings.lease_ms or LEASE_MS,
            wait_s=lambda: self.policies.current.policy.ledger_wait_s,
        )
        self.ledger.metrics = self.metrics
        store.on_failover(self._read_again)
        # Records are as old as the ledger's clock says, which stamped them, and ids sort by that clock too.
        self.rollup = Rollup(store, now=self.ledger.now, keep=lambda: self.policies.current.policy.keep)
        self.live = Live.of(store, self.ledger, self.policies)
        self.upstreams = upstreams or Upstreams()
        self.upstreams.credentials.when_fetched(self.metrics.key_fetched)
        self.queue = AdmissionQueue(self.ledger)
        self._stored_responses = StoredResponses(self.ledger, self.upstreams, now=now)
        self._threads = BodyThreads()
        self._relay = self._make_relay(disconnects or Disconnects(), now=now, draw=draw)
        self.health = Health(self.ledger, self.policies)
        self._request_log = RequestLog(
            lambda: self.policies.current.logged_calls, metrics=self.metrics, clock=clock, now=self.ledger.now
        )
        self._api = Api(
            self.policies,
            self._stored_responses,
            relay=self._relay,
            settings=config.settings,
            request_log=self._request_log,
            now=self.ledger.now,
        )
        self._clock = clock
        self._settings = config.settings
        self._admin = None if self._admin_at is None else self._admin_listener(store)
        self._jobs = Tasks()
        self._listeners: dict[str, Listener] = {}  # by the settings of their addresses
        self._is_retiring = False
        self._delay_is_over, self._grace_is_over = asyncio.Event(), asyncio.Event()
        self.api: Address | None = None
        self.admin: Address | None = None

    def _make_relay(self, disconnects: Disconnects, *, now: Callable[[], int], draw: Callable[[], int]) -> Relay:
        dispatcher = Dispatcher(
            self.upstreams,
            tokenizers=self._tokenizers,
            threads=self._threads,
            metrics=self.metrics,
            now=now,
            draw=draw,
        )
        self.policies.on_replaced(lambda snapshot: dispatcher.set_catalog(snapshot.catalog))
        self.live.show_upstreams(dispatcher.cooldowns, dispatcher.slots)
        self.gauges = Gauges(dispatcher, self.queue, self.policies, now=now)
        return Relay(
            self.queue,
            dispatcher,
            stored_responses=self._stored_responses,
            activity=self.live.activity,
            disconnects=disconnects,
            now=now,
        )

    @property
    def _admin_at(self) -> Address | tuple[int, ...] | None:
        """Where the admin listener listens.

        A worker uses only inherited sockets. If its parent has no admin listener, it must not open one by itself.
        """
        return self._inherited.admin or (None if self._inherited.api else self._settings.admin)

    @property
    def shutdown_delay_s(self) -> float:
        """How long new calls are still taken after SIGTERM."""
        inherited = self._inherited.shutdown_delay_s
        return self._settings.shutdown_delay_s if inherited is None else inherited

    @property
    def calls_in_flight(self) -> int:
        """The number of calls that have begun and are not settled."""
        return len(self._api.calls)

    async def all_settled(self) -> None:
        """Wait until no call is in flight: every call that began is settled."""
        await self._api.calls.all_ended()

    async def start(self) -> None:
        """Start to serve. Raises what `Store.open` raises, and OSError if a port is in use."""
        await self.ledger.start(self._inherited.dead)
        await self._poll_directory()
        await self.gauges.measure_process()
        self.upstreams.open()
        await self._fetch_keys()
        inherited, settings = self._inherited, self._settings
        limits = _within_file_limit(settings.connection_limits)
        api = self._api.application(self.health, self.live.events)
        self.api = await self._listen(
            api,
            inherited.api or settings.api,
            setting="server.api",
            limits=limits,
            prefix=settings.prefix,
            serve=self._api.serve,
        )
        if self._admin is not None and self._admin_at is not None:
            application = self._admin.application(after_change=self._poll_directory)
            self.admin = await self._listen(application, self._admin_at, setting="server.admin", limits=limits)
        self._start_jobs()

    def _start_jobs(self) -> None:
        # With a lease of 60 s, renewed at 12:00:00 and due to lapse at 12:01:00, there are three more renewals in
        # time: at :15, :30 and :45. A sweep every 30 s finds the calls of a crashed process within 90 s.
        lease_s = self.ledger.lease_ms / 1000
        self._jobs.start("renew lease", repeat(self.ledger.renew_lease, every_s=lease_s / 4))
        self._jobs.start("sweep", repeat(self.ledger.sweep, every_s=lease_s / 2))
        self._jobs.start("roll up", repeat(self.rollup.run, every_s=_ROLLUP_EVERY_S))
        self._jobs.start("collect garbage", repeat(_collect_garbage, every_s=_COLLECT_EVERY_S))
        self._jobs.start("read directory", repeat(self._poll_directory, every_s=_DIRECTORY_POLL_EVERY_S))
        self._jobs.start("delete old", repeat(self._delete_old, every_s=_DELETE_OLD_EVERY_S))
        self._jobs.start("free forgotten", repeat(self._users.free_forgotten, every_s=_FORGOTTEN_EVERY_S))
        self._jobs.start("note used keys", repeat(self.directory.write_used, every_s=_USED_KEYS_EVERY_S))
        self._jobs.start("fetch keys", repeat(self._fetch_keys, every_s=_KEYS_EVERY_S))
        self._jobs.start("reload", repeat(self.policies.reload_if_changed, every_s=_RELOAD_CHECK_EVERY_S))
        for job in (*self.live.jobs(), *self.gauges.jobs()):
            self._jobs.start(job.name, repeat(job.run, every_s=job.every_s))

    async def retire(self) -> None:
        """Leave new connections to other workers on the same sockets; close each connection after its next answer.

        Streams of events end: their clients resume at another worker. A stop that follows has no delay.
        Idle connections are not closed now: a client could send a request at the same moment and would get no answer.
        """
        self._is_retiring = True
        self._delay_is_over.set()
        self.live.events.close()
        for listener in self._listeners.values():
            await listener.stop_accepting()

    async def stop(self, *, delay_s: float = 0.0, grace_s: float = GRACE_S) -> None:
        """Stop in order. New calls are taken for `delay_s` seconds; then those that run have `grace_s` to end.

        The rest is cut off and settled. `end_at_once` ends both times, before or while it stops.
        """
        calls, in_flight, started = self._api.calls, self.calls_in_flight, self._api.calls.started
        delay_s = 0.0 if self._delay_is_over.is_set() else delay_s
        log.info("stopping", shutdown_delay_s=delay_s, calls_in_flight=in_flight)
        self.health.is_stopping = True
        if delay_s:
            await first_of(self._delay_is_over.wait(), timeout_s=delay_s)
        cut_off = await self._stop_api(grace_s)
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + _ENDING_S
        # Together, because each takes 2 s if the database hangs.
        await asyncio.gather(self._jobs.finish(0), self.refresh.close(), self.directory.close())
        await asyncio.gather(self._stored_responses.close(), self._write_notes())
        if admin := self._listeners.get("server.admin"):
            await admin.cleanup()
        await self._relay.model_lists.close()
        await self.upstreams.close()
        pending = await self.ledger.close(max(_LAST_COMMIT_S, ends_s - loop.time()))
        self.metrics.publish()
        self._threads.close()
        ended = in_flight + calls.started - started - cut_off
        log.info("stopped", calls_ended=ended, calls_cut_off=cut_off, charges_pending=pending)

    async def _write_notes(self) -> None:
        """Write the last refusals and uses of keys, unless the database is away or takes too long."""
        if not self.ledger.is_healthy:
            return
        try:
            async with asyncio.timeout(_NOTES_S):
                await asyncio.gather(self.live.close(), self.directory.write_used())
        except TimeoutError:
            log.warning("the last refusals and uses of keys were not written: the database does not answer")

    def end_at_once(self) -> None:
        """Cut off and settle what runs, without delay and grace, in the stop that runs or begins now."""
        if self._grace_is_over.is_set():
            return
        log.info("ending at once", calls_in_flight=self.calls_in_flight)
        self._delay_is_over.set()
        self._grace_is_over.set()

    async def _stop_api(self, grace_s: float) -> int:
        """Accept no more calls, wait for those that run, and cut off the rest. Returns how many were cut off."""
        api = self._listeners.get("server.api")
        if api is None or api.server is None:  # it could not start, or was stopped before
            return 0
        await api.stop_accepting()
        self.live.events.close()
        grace_s = 0.0 if self._grace_is_over.is_set() else grace_s
        log.info("accepting no more calls", grace_s=grace_s, calls_in_flight=self.calls_in_flight)

        async def all_ended() -> None:
            await api.all_answered()
            await self.all_settled()  # also those whose clients have left

        await first_of(all_ended(), self._grace_is_over.wait(), timeout_s=grace_s)
        cut_off = await self._api.calls.finish(0)
        if cut_off:
            log.warning("calls were cut off and settled", calls=cut_off)
        await api.cleanup()
        return cut_off

    def _admin_listener(self, store: Store) -> "Admin":
        # Imported here, because a proxy without this listener does not need their 60 classes.
        from proxy.web.admin.access import Access
        from proxy.web.admin.admin_keys import AdminKeys
        from proxy.web.admin.application import Admin
        from proxy.web.admin.counters import Counters
        from proxy.web.admin.directory import Users
        from proxy.web.admin.quotas import Quotas
        from proxy.web.admin.reports import Reports
        from proxy.web.admin.session import Sessions

        access = Access(
            self.policies,
            AdminDatabase(store, now=self.ledger.now),
            settings=self._settings,
            metrics=self.metrics,
            now=self.ledger.now,
            clock=self._clock,
        )
        # The rows of the admin API: a line for each resource.
        operations = [
            *Sessions(access, self.policies, settings=self._settings, api_port=self._api_port).operations(),
            *Users(self.policies, self._users, now=self.ledger.now).operations(),
            *AdminKeys(self.policies, self._users, now=self.ledger.now).operations(),
            *Quotas(self.policies, self._users, now=self.ledger.now).operations(),
            *Counters(self.policies, self._users, activity=self.live.activity, now=self.ledger.now).operations(),
            *Reports(
                self.policies,
                self._users,
                access=access,
                events=self.live.events,
                made_version=lambda: self.refresh.policy_version,
                now=self.ledger.now,
            ).operations(),
        ]
        return Admin(
            self.metrics,
            self.health,
            access=access,
            operations=operations,
            settings=self._settings,
            request_log=self._request_log,
        )

    def _api_port(self) -> int:
        assert self.api is not None, "the listeners are served after they have started"
        return self.api.port

    def _end_calls_of(self, cuts: Cuts) -> None:
        self._api.end_calls_of(cuts)

    def _note_change(self, old: int, new: int) -> None:
        self.live.exchange.note_change(old, new)

    def _read_again(self) -> None:
        """Another server has the database: what was read before may not be true there."""
        self.metrics.ledger_failovers.inc()
        self.refresh.read_again()

    async def _poll_directory(self) -> None:
        await self.refresh.run()
        self.metrics.directory_polled(self.directory.entries, age_s=self._clock() - self.directory.confirmed_s)

    async def _fetch_keys(self) -> None:
        """Begin to fetch the upstreams' keys that are due. Nothing waits for them: an issuer may be down."""
        self.upstreams.credentials.refresh(self.policies.current.catalog.upstreams.values())

    def _load_config(self) -> Config:
        config = self._load()
        logs.set_format(config.log.format)
        return config

    async def _listen(
        self,
        application: web.Application,
        at: Address | tuple[int, ...],
        *,
        setting: str,
        limits: ConnectionLimits,
        prefix: str = "",
        serve: Callable[[Handler, web.Request], Awaitable[web.StreamResponse]] | None = None,
    ) -> Address:
        """Serve the application at the address of a setting, or on the inherited sockets with these descriptors."""
        application.on_response_prepare.append(self._close_after_answer)
        listener = Listener(application, limits, request_log=self._request_log, prefix=prefix, serve=serve)
        await listener.setup()
        self._listeners[setting] = listener
        if isinstance(at, Address):
            try:
                await web.TCPSite(listener, at.host, at.port, reuse_address=True).start()
            except OSError as error:
                raise cannot_listen(setting, at, error) from None
        else:
            for number in at:
                await web.SockSite(listener, socket.socket(fileno=number)).start()
        host, port = listener.addresses[0][:2]
        return Address(host, port)

    async def _close_after_answer(self, request: web.Request, response: web.StreamResponse) -> None:
        """Close the connection after this answer if the process is stopping or retiring."""
        if self._is_retiring or self.health.is_stopping:
            response.force_close()
            response.headers["connection"] = "close"  # the library sets its headers before it sends this signal


async def serve(
    server: Server, on_started: Callable[[Server], None] = lambda _: None, *, grace_s: float = GRACE_S
) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads the policy. `on_started` is called when the server serves.

    After SIGTERM, new calls are taken for the server's `shutdown_delay_s`, and then `grace_s` is left for those that
    run. A second SIGTERM changes nothing. SIGINT ends at once, also after SIGTERM. Both end a start that has not
    ended, and then `on_started` is not called.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    reloads = Tasks()

    def end_at_once() -> None:
        server.end_at_once()
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, end_at_once)
    loop.add_signal_handler(signal.SIGHUP, lambda: reloads.start("reload", server.policies.reload()))
    _raise_file_limit()
    _return_freed_bodies()
    delay_s = 0.0  # nobody sends calls to a server that has not started
    try:
        await first_of(server.start(), stop.wait())
        if not stop.is_set():
            set_up_collector()
            on_started(server)
            await stop.wait()
            delay_s = server.shutdown_delay_s
    finally:
        await server.stop(delay_s=delay_s, grace_s=grace_s)


def cannot_listen(setting: str, address: Address, error: OSError) -> OSError:
    """The error for a listener that can't listen. Its text says which one it is, why it can't, and what to do."""
    option = {"server.api": "--port", "server.admin": "--admin-port"}[setting]
    if isinstance(error, socket.gaierror):
        why, remedy = "the host can't be resolved", "write an address of this machine"
    else:
        number = error.errno or errno.EADDRNOTAVAIL  # asyncio states none if it could bind to no address of a host
        why = os.strerror(number).lower()
        remedy = {
            errno.EADDRINUSE: f"stop the program that has it, or write another port there or as {option}",
            errno.EACCES: f"write a port from 1024 on there or as {option}, or let the process use this one",
        }.get(number, "write an address of this machine, or 0.0.0.0 for all of them")
    return OSError(f"{setting} can't listen on {address}: {why}; {remedy}")


def set_up_collector() -> None:
    """Exclude everything that exists now from garbage collection, and have it run less often.

    Imported modules and the parts of the server live as long as the process. Walking over them took 50 µs of every
    call and paused all streams for up to 50 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _return_freed_bodies() -> None:
    """Have glibc return large blocks to the system when they are freed; other C libraries are left as they are.

    By default glibc raises the size from which it does so up to 32 MiB, as soon as one such block was freed. Then it
    keeps freed bodies for itself: 900 refused calls of 1 MB left 68 MB, and with a fixed size they leave 3 MB.
    """
    m_mmap_threshold = -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).mallopt(m_mmap_threshold, _RETURNED_BYTES_MIN)


def _raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit.

    A stream needs two descriptors, for its client and its upstream, so the usual soft limit of 1024 allows some 500.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _within_file_limit(limits: ConnectionLimits) -> ConnectionLimits:
    """The limits with as many connections as the limit of open files allows.

    A listener that is full closes an idle connection for the next one. A process without a free descriptor can accept
    none, however many are idle. Example: with `ulimit -n 1024` each listener has (1024 - 64) / 2 = 480 connections.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = max(1, (files - _OTHER_DESCRIPTORS) // 2)
    if files == resource.RLIM_INFINITY or limits.connections <= connections:
        return limits
    log.warning(
        "the limit of open files is too low for `server.connections`: raise it (ulimit -n)",
        open_files=files,
        connections=connections,
    )
    return replace(limits, connections=connections)


def store_of(
    database: str,
    lock: int | None = None,
    *,
    may_be_new: bool = False,
    migrates: bool = True,
    now: Callable[[], int] | None = None,
) -> Store:
    """The store for a database URL. `lock` is the inherited descriptor of the lock on a SQLite file.

    `may_be_new` allows a SQLite file to be made anew where there was one. Unless it `migrates`, `open` only checks
    the schema. `now` (ms since 1970) is the clock of a SQLite file, which has none of its own.

    Raises StoreUnavailable if the driver for PostgreSQL is not installed.
    """
    if database.startswith("sqlite:"):
        path = sqlite_path(database)
        return SqliteStore(path, lock=lock, may_be_new=may_be_new, migrates=migrates, now=now)
    try:
        # Imported here, because its driver is an extra and takes 10 MB of memory that SQLite does not need.
        from proxy.ledger.postgres import PostgresStore
    except ModuleNotFoundError as error:
        raise StoreUnavailable(
            f"PostgreSQL needs {error.name}, which is not installed: run pip install '.[postgres]' in a clone"
        ) from error
    return PostgresStore(database, migrates=migrates)


def public_address(database: str) -> str:
    """A database URL without its user, its password and its parameters, for the log."""
    return database if database.startswith("sqlite:") else f"postgresql://{shown_url(database)}"


def sqlite_path(database: str) -> Path:
    """The path in a URL of the form `sqlite:///…`."""
    return Path(database.removeprefix("sqlite:///"))


async def _collect_garbage() -> None:
    gc.collect()


async def repeat(job: Callable[[], Awaitable[object]], *, every_s: float) -> None:
    """Run a maintenance job again and again, with a pause of `every_s` seconds. A failure is only logged."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await job()
        except Exception as error:
            log.error("a chore failed", exc_info=error)
