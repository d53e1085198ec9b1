"""Several processes behind one port: a small parent, and the workers that it starts.

The parent takes the database, binds the listeners, and then serves nothing itself:

    SIGTERM, SIGINT   workers let their calls end; the parent goes when all have gone
    SIGHUP            is passed on: all take the policy as it is now
    SIGUSR2           new workers, with the code and the file of now; the old ones leave once those serve

A worker that ends by itself takes nothing with it: the others serve on, and another takes its place after a pause
that grows while workers keep ending. Whoever comes next charges what the dead one left open. A parent that dies
leaves nobody behind: its workers see their control to it break, and end in order.
"""

import asyncio
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog

from proxy.config.loader import Address, BadConfig, Config
from proxy.ledger.ledger import Ledger
from proxy.ledger.sqlite import SqliteStore
from proxy.metrics import forget
from proxy.server import GRACE_S, InheritedResources, Server, store_of, wall_clock_ms
from proxy.tasks import Tasks

# As many as the server library asks for by itself.
_BACKLOG = 128
_LINE_BYTES = 65_536
_SERVES, _LEAVE = b"serves\n", b"leave\n"
# How long a worker that leaves still answers on the connections that it has; who asks on one is told to connect anew.
_LINGER_S = 2.0
# How long its calls may go on after that. There is no hurry: others serve already.
_LEAVE_S = 600.0
# How much longer than its calls may take to end a worker may take before it is killed.
_END_S = 15.0
_PAUSE_S, _PAUSE_MAX_S = 0.1, 30.0
# Workers that end less often than this do not end in a row.
_CALM_S = 60.0

log = structlog.get_logger("workers")


class NotServing(Exception):
    """Workers end before they serve."""


@dataclass(frozen=True, slots=True)
class Command:
    """What starts a worker: these words, and then the number of its end of the control."""

    words: Sequence[str]
    environ: Mapping[str, str]


class ControlSocket:
    """What ties a worker to its parent, as the worker has it. Raises OSError where there is no parent."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self.inherited = receive(self._socket)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # it is for the parent; who sends it to all means no harm
        self._socket.setblocking(False)
        self._tasks = Tasks()

    def serves(self, server: Server) -> None:
        """Say so, and listen from now on."""
        self._socket.send(_SERVES)
        asyncio.get_running_loop().add_reader(self._socket, self._hear, server)

    def _hear(self, server: Server) -> None:
        said = b""
        with suppress(OSError):
            said = self._socket.recv(len(_LEAVE))
        if said == _LEAVE:
            self._tasks.start("leave", _leave(server))
        else:  # the parent is gone, and nobody would stop us any more
            asyncio.get_running_loop().remove_reader(self._socket)
            signal.raise_signal(signal.SIGTERM)


async def _leave(server: Server) -> None:
    await server.leave()
    await asyncio.sleep(_LINGER_S)
    try:
        async with asyncio.timeout(_LEAVE_S):
            await server.at_rest()
    except TimeoutError:
        log.warning("calls still run long after this worker was to leave")
    signal.raise_signal(signal.SIGTERM)


class _Worker:
    """One process, as its parent sees it. `decided` is set once it `serves`, or has ended before that."""

    def __init__(
        self, inherited: InheritedResources, process: asyncio.subprocess.Process, control: socket.socket
    ) -> None:
        self.inherited = inherited
        self.pid = process.pid
        self.serves = False
        self.decided = asyncio.Event()
        self._process = process
        self._control = control
        self._is_to_reload = False

    async def life(self) -> int:
        """Wait until it has ended; its exit code."""
        self.serves = await _heard(self._control) == _SERVES
        if self.serves and self._is_to_reload:
            self._signal(signal.SIGHUP)
        self.decided.set()
        code = await self._process.wait()
        self.serves = False
        self._control.close()
        return code

    def reload(self) -> None:
        """Take the policy as it is now. Who doesn't serve yet would die of the signal, so that waits."""
        self._is_to_reload = True
        if self.serves:
            self._signal(signal.SIGHUP)

    def leave(self) -> None:
        """Others have taken its place."""
        with suppress(OSError):  # it has ended just now
            self._control.send(_LEAVE)

    def stop(self) -> None:
        """End in order."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has ended just now
            self._process.send_signal(number)


class Parent:
    """`count` workers. `api` and `admin` are the listeners' addresses once they are bound; `load` reads the file."""

    def __init__(self, config: Config, count: int, *, command: Command, load: Callable[[], Config]) -> None:
        self.api: Address | None = None
        self.admin: Address | None = None
        self._config = config
        self._count = count
        self._command = command
        self._load = load
        self._inherited = InheritedResources("", config.settings.database)
        self._sockets: list[socket.socket] = []
        self._alive: dict[_Worker, asyncio.Task[None]] = {}
        # Those that are to serve: neither on trial nor leaving. Who is missing here is replaced.
        self._current: set[_Worker] = set()
        self._dead: set[str] = set()
        self._chores, self._lives = Tasks(), Tasks()
        self._one_restart = asyncio.Lock()
        self._stop = asyncio.Event()
        self._failure: NotServing | None = None
        self._pause_s, self._ended_at = 0.0, 0.0

    async def serve(self, started: Callable[["Parent"], None]) -> None:
        """Have workers serve until SIGTERM or SIGINT; `started` is called once all do.

        Raises NotServing, OSError where a port is taken, or what `store.Store.open` raises.
        """
        self._listen_to_signals()
        with tempfile.TemporaryDirectory(prefix="llm-quota-proxy-") as folder:
            try:
                self._inherited = replace(
                    self._inherited, lock=await _taken(self._inherited.database), metrics=folder
                )
                self._bind()
                self._chores.start("first workers", self._begin(started))
                await self._stop.wait()
            finally:
                await self._end()
        if self._failure is not None:
            raise self._failure

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGUSR2, lambda: self._chores.start("restart", self._restart()))

    def _bind(self) -> None:
        settings = self._config.settings
        api = listen(settings.api)
        self._sockets = api
        admin = listen(settings.admin) if settings.admin is not None else []
        self._sockets = api + admin
        self.api, self.admin = address_of(api), address_of(admin)
        numbers = [each.fileno() for each in self._sockets]
        self._inherited = replace(self._inherited, api=tuple(numbers[: len(api)]), admin=tuple(numbers[len(api) :]))

    async def _begin(self, started: Callable[["Parent"], None]) -> None:
        try:
            self._take(await self._start(self._count))
        except NotServing as error:
            self._give_up(error)
        else:
            started(self)

    async def _end(self) -> None:
        self._stop.set()  # who ends now is not replaced
        await self._chores.finish(0)
        for each in self._sockets:
            each.close()
        for worker in self._alive:
            worker.stop()
        if self._alive:
            await asyncio.wait(self._alive.values(), timeout=GRACE_S + _END_S)
        for worker in self._alive:
            log.error("a worker does not end, and is killed", pid=worker.pid)
            worker.kill()
        await self._lives.all_ended()
        if self._inherited.lock is not None:
            os.close(self._inherited.lock)

    # -------------------------------------------------------------------------------------------------------- workers

    async def _start(self, count: int) -> list[_Worker]:
        """So many new ones, once all of them serve. Raises NotServing, and then none of them is left."""
        new: list[_Worker] = []
        try:
            for _ in range(count):
                new.append(await self._spawn())
            for worker in new:
                await worker.decided.wait()
        except OSError as error:
            reason = f"no process can be started: {error}"
        else:
            reason = "what it said stands above"
            if all(worker.serves for worker in new):
                self._dead -= {owner for worker in new for owner in worker.inherited.dead}
                return new
        lives = [self._alive[worker] for worker in new if worker in self._alive]
        for worker in new:
            worker.stop()
        if lives:
            await asyncio.wait(lives)
        raise NotServing(f"A worker could not start: {reason}.")

    async def _spawn(self) -> _Worker:
        inherited = replace(self._inherited, owner=f"proxy-{secrets.token_hex(8)}", dead=tuple(self._dead))
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
                start_new_session=True,  # Ctrl-C is for the parent, which passes it on
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = _Worker(inherited, process, ours)
        self._alive[worker] = self._lives.start(f"worker {worker.pid}", self._watch(worker))
        return worker

    async def _watch(self, worker: _Worker) -> None:
        code = await worker.life()
        del self._alive[worker]
        self._dead.add(worker.inherited.owner)
        forget(worker.pid, self._inherited.metrics or "")
        if worker in self._current and not self._stop.is_set():
            self._current.discard(worker)
            log.error("a worker ended, another will take its place", pid=worker.pid, code=code)
            self._chores.start("replace", self._replace())

    def _take(self, new: Sequence[_Worker]) -> None:
        """Let new ones count as serving; one that has ended meanwhile is replaced."""
        for worker in new:
            log.info("a worker serves", pid=worker.pid, owner=worker.inherited.owner)
            if worker in self._alive:
                self._current.add(worker)
            else:
                self._chores.start("replace", self._replace())

    async def _replace(self) -> None:
        while len(self._current) < self._count:
            await asyncio.sleep(self._next_pause_s())
            try:
                new = await self._start(1)
            except NotServing as error:
                if not self._alive:
                    self._give_up(error)
                    return
                log.error("a worker that ended is not replaced yet", reason=str(error))
                continue
            if len(self._current) < self._count:
                self._take(new)
            else:  # a restart has brought enough of them
                new[0].leave()
            return

    def _next_pause_s(self) -> float:
        now = asyncio.get_running_loop().time()
        is_in_a_row = now - self._ended_at < _CALM_S + self._pause_s
        self._pause_s = min(_PAUSE_MAX_S, 2 * self._pause_s) if is_in_a_row and self._pause_s else _PAUSE_S
        self._ended_at = now
        return self._pause_s

    def _give_up(self, error: NotServing) -> None:
        self._failure = error
        self._stop.set()

    # -------------------------------------------------------------------------------------------------------- signals

    def _reload(self) -> None:
        for worker in self._alive:
            worker.reload()

    async def _restart(self) -> None:
        """New workers, and then the old ones leave; where the new ones can't serve, the old ones stay."""
        async with self._one_restart:
            try:
                config = await asyncio.to_thread(self._load)
                new = await self._start(self._count)
            except (BadConfig, NotServing) as error:
                log.error("the old workers stay", reason=str(error))
                return
            fixed = self._config.restart_only
            ignored = [name for name, value in config.restart_only.items() if value != fixed[name]]
            if ignored:
                log.warning("these sections change only when the parent is restarted", sections=ignored)
            old, self._current = self._current, set()
            self._take(new)
            for worker in old:
                worker.leave()
            log.info("new workers serve, the old ones leave", new=len(new), old=len(old))


async def _taken(database: str) -> int | None:
    """Bring the database up to date, and charge what was left open; the lock, of one that has it in a file."""
    store = store_of(database)
    ledger = Ledger(store, owner=f"proxy-{secrets.token_hex(8)}", now=wall_clock_ms)
    try:
        await ledger.start()
        return store.hand_over() if isinstance(store, SqliteStore) else None
    finally:
        await ledger.close()


async def _heard(control: socket.socket) -> bytes:
    try:
        return await asyncio.get_running_loop().sock_recv(control, len(_SERVES))
    except OSError:  # it ended before it had read what we wrote
        return b""


def receive(control: socket.socket) -> InheritedResources:
    """Wait for the line that the parent writes; raises OSError where there is none."""
    line = b""
    while not line.endswith(b"\n"):
        part = control.recv(_LINE_BYTES)
        if not part:
            raise OSError("The parent of this worker is gone.")
        line += part
    return InheritedResources.from_line(line)


def listen(address: Address) -> list[socket.socket]:
    """Sockets that listen at an address, one for each that its host's name stands for. Raises OSError."""
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, where in sorted({(family, where[:2]) for family, *_, where in found}):
            sockets.append(socket.create_server((str(where[0]), int(where[1])), family=family, backlog=_BACKLOG))
    except OSError:
        for each in sockets:
            each.close()
        raise
    return sockets


def address_of(sockets: list[socket.socket]) -> Address | None:
    """Where they listen: the first of them; None where there are none."""
    if not sockets:
        return None
    host, port = sockets[0].getsockname()[:2]
    return Address(host, port)
