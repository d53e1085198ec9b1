"""Several processes behind one port: a small parent, and the workers that it starts.

The parent migrates the database, opens the listening sockets, starts the workers, and serves nothing itself. Its
signals:

    SIGTERM           stop: each worker takes new calls for `shutdown_delay` and lets its calls end; the parent
                      ends when all workers have ended
    SIGINT            end: each worker cuts off and settles its calls; also during a stop
    SIGHUP            reload: passed on to every worker
    SIGUSR2           restart: start new workers with the code and the file as they are now, then retire the old ones

If a worker dies, the others go on serving. The parent starts another one after a pause, which grows while workers
keep dying. The new worker charges the calls that the dead one left open.

If the parent dies, its workers notice that their control sockets have closed, and stop without a delay; one that is
still starting gives up. Calls in flight have a second to end before they are cut off and settled, because the workers
hold the lock on the SQLite file, and nobody can serve until they have ended. The last of them removes the folder with
the metrics.

Parent and worker talk over a control socket, a pair of connected sockets:

    parent ──▶ worker   one line of JSON: InheritedResources
    worker ──▶ parent   "serves"   when it serves
    parent ──▶ worker   "leave"    when new workers serve and it has to retire
"""

import asyncio
import fcntl
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import structlog

from proxy.config.loader import Address, BadConfig, Config, Settings
from proxy.config.reload import log_mistakes
from proxy.ledger.ledger import Ledger
from proxy.ledger.sqlite import SqliteStore
from proxy.metrics import remove_gauges
from proxy.server import CLEANUP_S, GRACE_S, InheritedResources, Server, cannot_listen, store_of, wall_clock_ms
from proxy.tasks import Tasks, first_of

# The library's own default for a listening socket.
_BACKLOG = 128
_LINE_BYTES = 65_536
# The messages on the control socket. They must not change: in a restart an old parent starts workers of a new
# release.
_SERVES, _RETIRE = b"serves\n", b"leave\n"
# How long a retired worker still answers on its connections, and tells each client to open a new one. Clients that
# were about to send on an idle connection get their answer.
_LINGER_S = 2.0
# How long its calls may run after that. There is no hurry, because other workers serve already.
_RETIRED_CALLS_S = 600.0
# How long its calls may run when the parent has died.
_ORPHANED_CALLS_S = 1.0
# How long the parent waits for its last commit when its start has failed or was stopped.
_LAST_COMMIT_S = 3.0
# The pause before a dead worker is replaced; see `_next_pause_s`.
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.1, 30.0
_PAUSE_RESET_S = 60.0

_FOLDER_PREFIX = "llm-quota-workers-"

log = structlog.get_logger("workers")


class NotServing(Exception):
    """A new worker could not be started, or ended before it served."""


@dataclass(frozen=True, slots=True)
class Command:
    """The command line of a worker, to which the number of its control socket is added, and its environment."""

    words: Sequence[str]
    environ: Mapping[str, str]


# ------------------------------------------------------------------------------------------------------ in the worker


class ControlSocket:
    """The worker's end of the control socket. Raises OSError if the descriptor is not one."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self.inherited = receive_inherited(self._socket)
        self._folder = None if self.inherited.metrics is None else MetricsFolder(self.inherited.metrics)
        # SIGUSR2 is for the parent, but its default action would kill a worker, for example after `pkill -USR2`.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._socket.setblocking(False)
        self._tasks = Tasks()

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, which starts a server, calls `report_serving` and serves.

        If the parent dies before that, the work is cancelled. Raises NotServing then.
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def cancel() -> None:
            loop.remove_reader(self._socket)  # the end of the stream can be read again and again
            task.cancel()

        loop.add_reader(self._socket, cancel)
        try:
            await work
        except asyncio.CancelledError:
            raise NotServing("The parent of this worker has ended.") from None

    def report_serving(self, server: Server) -> None:
        """Tell the parent that the server serves, and obey its messages from now on."""
        with suppress(OSError):  # the parent has died, which the reader finds next
            self._socket.send(_SERVES)
        asyncio.get_running_loop().add_reader(self._socket, self._on_readable, server)

    def _on_readable(self, server: Server) -> None:
        message = b""
        with suppress(OSError):
            message = self._socket.recv(len(_RETIRE))
        if message == _RETIRE:
            self._tasks.start("retire", _retire(server))
        else:  # the end of the stream: the parent has died, and nobody could stop or restart this worker any more
            asyncio.get_running_loop().remove_reader(self._socket)
            log.error("the parent has ended, so this worker stops")
            self._tasks.start("end", _end_without_parent(server))

    def close(self) -> None:
        """Close the socket. If the parent has died, its last worker also removes the folder with the metrics."""
        try:
            is_orphaned = self._socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:  # the parent lives and has sent nothing
            is_orphaned = False
        except OSError:  # the parent died before it had read "serves"
            is_orphaned = True
        self._socket.close()
        if self._folder is not None:
            self._folder.close()
            if is_orphaned:
                self._folder.remove_if_unused()


def receive_inherited(control: socket.socket) -> InheritedResources:
    """Wait for the line that the parent writes. Raises OSError if the parent has died."""
    line = b""
    while not line.endswith(b"\n"):
        part = control.recv(_LINE_BYTES)
        if not part:
            raise OSError("The parent of this worker has ended.")
        line += part
    return InheritedResources.from_line(line)


async def _retire(server: Server) -> None:
    """Let connections and calls end, then stop the process.

    For example: at 12:00:00 no new connections are accepted. Until 12:00:02 a request on an open connection is still
    answered, with `Connection: close`. Calls in flight may run until 12:10:02.
    """
    await server.retire()
    await asyncio.sleep(_LINGER_S)
    try:
        async with asyncio.timeout(_RETIRED_CALLS_S):
            await server.all_settled()
    except TimeoutError:
        log.warning("calls still run long after this worker was to leave")
    signal.raise_signal(signal.SIGTERM)


async def _end_without_parent(server: Server) -> None:
    """Accept no more calls, let those that run end for a moment, and cut off the rest.

    The server may be stopping already, with its longer limits.
    """
    await server.retire()
    signal.raise_signal(signal.SIGTERM)
    await first_of(server.all_settled(), timeout_s=_ORPHANED_CALLS_S)
    server.end_at_once()


# ------------------------------------------------------------------------------------------------ the metrics' folder


class MetricsFolder:
    """The folder in which all workers count. The parent and each worker lock it, shared, until they have ended.

    So a folder whose lock is free belongs to nobody any more, however its processes have ended.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    @classmethod
    def make(cls) -> "MetricsFolder":
        """A new folder. Those that killed processes have left are removed."""
        for name in os.listdir(tempfile.gettempdir()):
            if name.startswith(_FOLDER_PREFIX):
                _remove_if_unused(os.path.join(tempfile.gettempdir(), name))
        while True:
            path = tempfile.mkdtemp(prefix=_FOLDER_PREFIX)
            with suppress(FileNotFoundError):
                folder = cls(path)
                # Another parent that starts at this moment may have taken the unlocked folder for an old one.
                if os.path.exists(path):
                    return folder
                folder.close()

    def close(self) -> None:
        """Free the lock."""
        os.close(self._descriptor)

    def remove_if_unused(self) -> None:
        """Remove the folder if no process has it locked. To be called after `close`."""
        _remove_if_unused(self.path)


def _remove_if_unused(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it is gone, or not ours
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------ in the parent


class _Worker:
    """One worker process. `start_is_over` is set when it serves, or when it has ended before it served."""

    def __init__(
        self, inherited: InheritedResources, process: asyncio.subprocess.Process, control: socket.socket
    ) -> None:
        self.inherited = inherited
        self.pid = process.pid
        self.serves = False
        self.start_is_over = asyncio.Event()
        self._process = process
        self._control = control
        self._reload_when_serving = False

    async def wait(self) -> int:
        """Wait until the process has ended, and return its exit code."""
        self.serves = await _receive_report(self._control) == _SERVES
        if self.serves and self._reload_when_serving:
            self._signal(signal.SIGHUP)
        self.start_is_over.set()
        code = await self._process.wait()
        self.serves = False
        self._control.close()
        return code

    def reload(self) -> None:
        """Make it reload the policy, as soon as it serves.

        Not before: until it has installed its handler, SIGHUP would kill it. It may have read the file already, so
        the reload is not simply dropped.
        """
        self._reload_when_serving = True
        if self.serves:
            self._signal(signal.SIGHUP)

    def retire(self) -> None:
        """Make it retire, because new workers serve."""
        with suppress(OSError):  # it has just ended
            self._control.send(_RETIRE)

    def stop(self) -> None:
        """Make it stop in order."""
        self._signal(signal.SIGTERM)

    def end_at_once(self) -> None:
        """Make it cut off its calls and end. It is stopping already."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            self._process.send_signal(number)


async def _receive_report(control: socket.socket) -> bytes:
    try:
        return await asyncio.get_running_loop().sock_recv(control, len(_SERVES))
    except OSError:  # the worker ended before it had read its line
        return b""


class Parent:
    """Keeps `count` workers serving. `api` and `admin` are the addresses of the listeners once they are bound.

    `load` loads the config again, to validate it before a restart.
    """

    def __init__(self, config: Config, count: int, *, command: Command, load: Callable[[], Config]) -> None:
        self.api: Address | None = None
        self.admin: Address | None = None
        self._config = config
        self._count = count
        self._command = command
        self._load = load
        settings = config.settings
        self._inherited = InheritedResources("", settings.database, shutdown_delay_s=settings.shutdown_delay_s)
        self._sockets: list[socket.socket] = []
        # Every worker process that runs, with the task that waits for its end.
        self._running: dict[_Worker, asyncio.Task[None]] = {}
        # Those that are meant to serve: they have started and are not retired. If one of them ends, it is replaced.
        self._current: set[_Worker] = set()
        # Owners that have ended and whose calls a new worker has to charge.
        self._dead_owners: set[str] = set()
        self._jobs, self._watchers = Tasks(), Tasks()
        self._restart_lock = asyncio.Lock()
        self._stop, self._end = asyncio.Event(), asyncio.Event()
        self._failure: NotServing | None = None
        self._pause_s, self._paused_at = 0.0, 0.0

    async def serve(self, on_started: Callable[["Parent"], None]) -> None:
        """Keep the workers serving until SIGTERM or SIGINT. `on_started` is called when all of them serve.

        Raises NotServing, OSError if a port is in use, and what `Store.open` raises.
        """
        self._handle_signals()
        folder = MetricsFolder.make()
        try:
            lock = await _prepare_database(self._config.settings, self._stop)
            self._inherited = replace(self._inherited, lock=lock, metrics=folder.path)
            if not self._stop.is_set():
                self._bind()
                self._jobs.start("start", self._start_first_workers(on_started))
                await self._stop.wait()
        finally:
            await self._stop_workers()
            folder.close()
            folder.remove_if_unused()
        if self._failure is not None:
            raise self._failure

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(signal.SIGINT, self._end_at_once)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGUSR2, lambda: self._jobs.start("restart", self._restart()))

    def _end_at_once(self) -> None:
        self._end.set()
        self._stop.set()

    def _bind(self) -> None:
        settings = self._config.settings
        # Stored after each step: if the port of the admin listener is in use, the API's sockets have to be closed.
        api = self._sockets = listen(settings.api, "server.api")
        admin = listen(settings.admin, "server.admin") if settings.admin is not None else []
        self._sockets = api + admin
        self.api, self.admin = address_of(api), address_of(admin)
        numbers = [each.fileno() for each in self._sockets]
        self._inherited = replace(self._inherited, api=tuple(numbers[: len(api)]), admin=tuple(numbers[len(api) :]))

    async def _start_first_workers(self, on_started: Callable[["Parent"], None]) -> None:
        try:
            self._make_current(await self._start(self._count))
        except NotServing as error:
            self._fail(error)
        else:
            on_started(self)

    async def _stop_workers(self) -> None:
        """Stop everything in order: restarts and replacements, the sockets, the workers, and at last the lock.

        The workers listen on their own copies of the sockets for as long as they need them. One that hangs is killed:
        with the delay of 5 s after 5 + GRACE_S + CLEANUP_S = 50 s, and after a SIGINT within CLEANUP_S. The
        lock on the SQLite file is released when the last worker has ended, so that no other process can open the file
        before.
        """
        self._stop.set()  # also if the parent failed: workers that end from now on are not replaced
        delay_s = self._config.settings.shutdown_delay_s
        await self._jobs.finish(0)
        for each in self._sockets:
            each.close()
        for worker in self._running:
            worker.stop()
        await first_of(self._watchers.all_ended(), self._end.wait(), timeout_s=delay_s + GRACE_S + CLEANUP_S)
        if self._end.is_set():
            for worker in self._running:
                worker.end_at_once()
            await first_of(self._watchers.all_ended(), timeout_s=CLEANUP_S)
        for worker in self._running:
            log.error("a worker does not end, and is killed", pid=worker.pid)
            worker.kill()
        await self._watchers.all_ended()
        if self._inherited.lock is not None:
            os.close(self._inherited.lock)

    # ---------------------------------------------------------------------------------------------- start and replace

    async def _start(self, count: int) -> list[_Worker]:
        """Start `count` workers and return them when all of them serve.

        Raises NotServing if one of them can't serve; then all of them have been stopped.
        """
        new: list[_Worker] = []
        try:
            for _ in range(count):
                new.append(await self._spawn())
            for worker in new:
                await worker.start_is_over.wait()
        except OSError as error:
            reason = f"no process can be started: {error}"
        else:
            reason = "see its log above"
            if all(worker.serves for worker in new):
                # A worker charges the calls of the dead owners in `inherited.dead` before it serves.
                self._dead_owners -= {owner for worker in new for owner in worker.inherited.dead}
                return new
        watchers = [self._running[worker] for worker in new if worker in self._running]
        for worker in new:
            worker.stop()
        if watchers:
            await asyncio.wait(watchers)
        raise NotServing(f"A worker could not start: {reason}.")

    async def _spawn(self) -> _Worker:
        """Start one process and its watcher."""
        inherited = replace(self._inherited, owner=f"proxy-{secrets.token_hex(8)}", dead=tuple(self._dead_owners))
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            ours.send(inherited.to_line())
            process = await asyncio.create_subprocess_exec(
                *self._command.words,
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *inherited.descriptors),
                env={**self._command.environ, "PROMETHEUS_MULTIPROC_DIR": inherited.metrics or ""},
                # In a session of its own, so that Ctrl-C reaches only the parent, which stops the workers in order.
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = _Worker(inherited, process, ours)
        self._running[worker] = self._watchers.start(f"worker {worker.pid}", self._watch(worker))
        return worker

    async def _watch(self, worker: _Worker) -> None:
        """Wait until the worker has ended, and replace it if it was meant to serve."""
        code = await worker.wait()
        del self._running[worker]
        self._dead_owners.add(worker.inherited.owner)
        remove_gauges(worker.pid, self._inherited.metrics or "")
        if worker in self._current and not self._stop.is_set():
            self._current.discard(worker)
            log.error("a worker ended, another will take its place", pid=worker.pid, code=code)
            self._jobs.start("replace", self._replace())

    def _make_current(self, new: Sequence[_Worker]) -> None:
        """Count these workers as current. One that has ended since it served is replaced."""
        for worker in new:
            log.info("a worker serves", pid=worker.pid, owner=worker.inherited.owner)
            if worker in self._running:
                self._current.add(worker)
            else:
                self._jobs.start("replace", self._replace())

    async def _replace(self) -> None:
        """Start a worker in place of one that has ended. Tries again until it succeeds, or no worker is running."""
        while len(self._current) < self._count:
            await asyncio.sleep(self._next_pause_s())
            try:
                new = await self._start(1)
            except NotServing as error:
                if not self._running:
                    # An open port on which nobody answers is worse than a closed one: the parent ends.
                    self._fail(error)
                    return
                log.error("a worker that ended is not replaced yet", reason=str(error))
                continue
            if len(self._current) < self._count:
                self._make_current(new)
            else:  # a restart has started enough workers meanwhile
                new[0].retire()
            return

    def _next_pause_s(self) -> float:
        """The pause before the next start: it doubles while starts follow one another, from 0.1 s up to 30 s.

        For example, a worker that has run for days dies at 12:00:00 and is replaced 0.1 s later. If the new one dies
        at 12:00:05, the pause is 0.2 s, then 0.4 s, 0.8 s and so on; the tenth is 30 s. When no worker has died for a
        minute after a pause, the next one is 0.1 s again.
        """
        now = asyncio.get_running_loop().time()
        is_in_a_row = now - self._paused_at < _PAUSE_RESET_S + self._pause_s
        self._pause_s = min(_PAUSE_MAX_S, 2 * self._pause_s) if is_in_a_row and self._pause_s else _PAUSE_MIN_S
        self._paused_at = now
        return self._pause_s

    def _fail(self, error: NotServing) -> None:
        """Stop the parent, which then raises this error."""
        self._failure = error
        self._stop.set()

    # ------------------------------------------------------------------------------------------------ reload, restart

    def _reload(self) -> None:
        for worker in self._running:
            worker.reload()

    async def _restart(self) -> None:
        """Start new workers, then retire the old ones. If the new ones can't serve, the old ones stay.

        The order loses no call: both accept from the same sockets, so while the old ones stop accepting, every new
        connection is accepted by a new one.
        """
        async with self._restart_lock:
            try:
                config = await asyncio.to_thread(self._load)
                new = await self._start(self._count)
            except BadConfig as error:
                log_mistakes(error)
                log.error("the old workers stay", mistakes=len(error.mistakes))
                return
            except NotServing as error:
                log.error("the old workers stay", reason=str(error))
                return
            fixed = self._config.restart_only
            ignored = [name for name, value in config.restart_only.items() if value != fixed[name]]
            if ignored:
                log.warning("these sections change only when the parent is restarted", sections=ignored)
            # Exchanged before the old ones end, so that `_watch` does not replace them.
            old, self._current = self._current, set()
            self._make_current(new)
            for worker in old:
                worker.retire()
            log.info("new workers serve, the old ones leave", new=len(new), old=len(old))


async def _prepare_database(settings: Settings, stop: asyncio.Event) -> int | None:
    """Migrate the database and charge the calls that were left open. Returns the lock on a SQLite file, else None.

    If `stop` is set before that is done, it is given up, and the result is None.

    The parent does that before it starts workers. Otherwise all workers would migrate at once, and another process
    could take the file between the end of one worker and the start of the next.
    """
    store = store_of(settings.database, may_be_new=settings.may_be_new_database, migrates=settings.migrates)
    ledger = Ledger(store, owner=f"proxy-{secrets.token_hex(8)}", now=wall_clock_ms)
    try:
        await first_of(ledger.start(), stop.wait())
        return store.hand_over() if isinstance(store, SqliteStore) and not stop.is_set() else None
    finally:
        await ledger.close(_LAST_COMMIT_S)


# ------------------------------------------------------------------------------------------------------------ sockets


def listen(address: Address, setting: str) -> list[socket.socket]:
    """Listening sockets, one for each IP address of the host in this setting.

    Raises OSError with a text that says what to do, and then leaves none open.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # An address may be found twice, and one of IPv6 has four members, of which the first two are needed.
        for family, (host, port) in sorted({(family, sockaddr[:2]) for family, *_, sockaddr in found}):
            sockets.append(socket.create_server((str(host), int(port)), family=family, backlog=_BACKLOG))
    except OSError as error:
        for each in sockets:
            each.close()
        raise cannot_listen(setting, address, error) from None
    return sockets


def address_of(sockets: list[socket.socket]) -> Address | None:
    """The address of the first of these sockets; None if there are none."""
    if not sockets:
        return None
    host, port = sockets[0].getsockname()[:2]
    return Address(host, port)
