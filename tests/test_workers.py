"""Several processes behind one port: with real workers, then a parent with stand-ins, then the sockets alone."""

import asyncio
import fcntl
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from structlog.testing import capture_logs

from proxy.config.loader import Address, load_text
from proxy.identity.database import DirectoryDatabase
from proxy.ledger.sqlite import SqliteStore
from proxy.server import InheritedResources, store_of
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from proxy.workers import (
    _FOLDER_PREFIX,
    Command,
    ControlSocket,
    MetricsFolder,
    NotServing,
    Parent,
    address_of,
    listen,
    receive_inherited,
)
from tests import exposition
from tests.audit import audit, rows
from tests.bare_upstream import bare_upstream, stream_head
from tests.builders import NOON
from tests.directory import add_key, add_user, set_key
from tests.postgres import shared
from tests.stage import UPSTREAM_KEY, key_of, sqlite_in, until

CONFIG = """
server: {{api: "127.0.0.1:0", admin: "127.0.0.1:0", shutdown_delay: 0s}}
database: "{database}"
wait: 1s
upstreams:
  up: {{base_url: "{upstream}", api_key: "{key}", kind: simulator}}
  held: {{base_url: "{held}", api_key: "{key}", kind: simulator}}
models:
  fast: {{upstream: up, max_output_tokens: 100}}
  slow: {{upstream: held, max_output_tokens: 100}}
groups:
  staff: {{quotas: {{pot: {{requests: {requests}, tokens: 1M, per: 7d, shared: true}}}}}}
users: {{alice: {{groups: [staff], keys: ["{alice}"]}}}}
"""
NOWHERE = "http://127.0.0.1:1/v1"
ALICE = {"authorization": f"Bearer {key_of('alice')}"}
CHAT = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}]}


class Running:
    """A parent process, its log, and what its clients get. `pids` has the workers that serve, as it has logged."""

    def __init__(self, process: asyncio.subprocess.Process, simulator: Simulator) -> None:
        self.process = process
        self.simulator = simulator
        self.pids: list[int] = []
        self.url = self.admin_url = ""

    async def logged(self, words: str) -> str:
        """Read the log up to the first line that contains these words, and return that line."""
        assert self.process.stderr
        while line := (await self.process.stderr.readline()).decode():
            if '"a worker serves"' in line:
                self.pids.append(orjson.loads(line)["pid"])
            if words in line:
                return line
        raise AssertionError(f"the parent ended and never logged: {words}")

    async def all_serve(self, workers: int) -> None:
        """Wait until it has logged the addresses of its listeners, and that all workers serve."""
        while not (self.url and len(self.pids) == workers):
            line = orjson.loads(await self.logged(""))
            if line["event"] == "serving":
                self.url, self.admin_url = line["api"], line["admin"]

    async def chat(self, http: aiohttp.ClientSession, **more: Any) -> tuple[int, bytes]:
        """Send a call; the status and the body of its answer."""
        async with http.post(f"{self.url}/v1/chat/completions", headers=ALICE, json={**CHAT, **more}) as response:
            return response.status, await response.read()

    async def pot(self, http: aiohttp.ClientSession) -> dict[str, Any]:
        """The shared quota `pot`, as `/v1/quota` shows it."""
        async with http.get(f"{self.url}/v1/quota", headers=ALICE) as response:
            found: dict[str, Any] = (await response.json())["data"][0]
            return found

    @contextmanager
    def only(self, pid: int) -> Iterator[None]:
        """Pause all other workers within the block, so that this one accepts every new connection."""
        others = [other for other in self.pids if other != pid]
        for other in others:
            os.kill(other, signal.SIGSTOP)
        try:
            yield
        finally:
            for other in others:
                os.kill(other, signal.SIGCONT)


async def ended(pid: int) -> None:
    """Wait until a process has ended, also if it is not a child of this one."""
    try:
        file = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(file, over.set)
    await over.wait()
    asyncio.get_running_loop().remove_reader(file)
    os.close(file)


def client(**more: Any) -> aiohttp.ClientSession:
    """An HTTP client that opens a connection for each call, unless `more` says otherwise."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(**(more or {"force_close": True})))


@asynccontextmanager
async def running(
    folder: Path,
    workers: int,
    *,
    database: str | None = None,
    requests: int = 1000,
    held: str = NOWHERE,
    shutdown_delay: str = "0s",
) -> AsyncIterator[Running]:
    """A parent with this number of workers in front of a simulator. It is killed if the test has not stopped it."""
    simulator = Simulator(UPSTREAM_KEY)
    runner, port = await serve_simulator(simulator)
    file = folder / "quotas.yaml"
    upstream = f"http://127.0.0.1:{port}/v1"
    text = text_of(database or sqlite_in(folder), upstream=upstream, held=held, requests=requests)
    file.write_text(text.replace("shutdown_delay: 0s", f"shutdown_delay: {shutdown_delay}"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--workers", str(workers), "--config", str(file)),
        stderr=asyncio.subprocess.PIPE,
    )
    on = Running(process, simulator)
    try:
        await on.all_serve(workers)
        yield on
    finally:
        if process.returncode is None:
            process.kill()
        # asyncio waits for the end of the pipe too, which it does not see while it has unread lines.
        await process.communicate()
        for pid in on.pids:
            await ended(pid)
        await runner.cleanup()


def text_of(database: str, *, upstream: str = NOWHERE, held: str = NOWHERE, requests: int = 1000) -> str:
    """The YAML of the config."""
    given = {"key": UPSTREAM_KEY, "alice": key_of("alice"), "requests": requests}
    return CONFIG.format(database=database, upstream=upstream, held=held, **given)


async def called(on: "Running", http: aiohttp.ClientSession, pid: int) -> None:
    """Make a call through this worker.

    Another one may have been stopped while it had its turn at the file. Then the call is a 503, and is made again.
    """
    for _ in range(10):
        with on.only(pid):
            status, _ = await on.chat(http)
        if status == 200:
            return
    raise AssertionError(f"the last status was {status}")


@pytest.mark.journey
async def test_every_worker_serves_the_one_port(tmp_path: Path) -> None:
    """Each takes calls, and shows the sums of all in /metrics. SIGHUP reloads all; SIGTERM stops all, exit code 0."""
    async with running(tmp_path, 3) as on, client() as http:
        for pid in on.pids:
            await called(on, http, pid)
        assert len({row["owner"] for row in rows(tmp_path / "quotas.db", "calls")}) == 3
        for pid in on.pids:
            with on.only(pid):
                async with http.get(f"{on.admin_url}/metrics") as response:
                    text = await response.text()
                async with http.get(f"{on.admin_url}/readyz") as response:
                    assert response.status == 200
            found = exposition.Metrics.of(text)
            assert found.by("llm_quota_calls_total", "endpoint", "model", "outcome") == {
                ("chat", "fast", "complete"): 3
            }
            assert found.by("llm_quota_requests_total", "status")["200"] == 3
            assert found.by("llm_quota_duration_seconds_count", "endpoint") == {"chat": 3}
            assert found.value("llm_quota_calls_in_flight") == 0
            assert found.value("llm_quota_ledger_healthy") == 1
            assert len(found.by("llm_quota_policy_info", "hash")) == 1
            # Of all three workers: none takes less than 40 MB.
            assert found.value("process_resident_memory_bytes") > 120e6
        on.process.send_signal(signal.SIGHUP)
        for _ in on.pids:
            await on.logged("policy reloaded")
        on.process.terminate()
        assert await on.process.wait() == 0
        for pid in on.pids:
            await ended(pid)
        audit(tmp_path / "quotas.db")


@pytest.mark.journey
async def test_a_killed_worker_is_replaced_and_workers_of_a_killed_parent_stop(tmp_path: Path) -> None:
    """The other worker goes on serving, a new one charges the open call, and the counters of the dead one remain.
    Without their parent, all workers stop in order and release the lock on the file.
    """
    async with running(tmp_path, 2) as on, client() as http:
        first, second = on.pids
        with on.only(first):
            assert (await on.chat(http))[0] == 200
            call = asyncio.get_running_loop().create_task(on.chat(http, metadata={"simulate": "hang"}))
            await on.simulator.until(lambda: on.simulator.received == 2)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await call
        on.pids.remove(first)
        assert (await on.chat(http))[0] == 200
        await on.logged("a worker serves")
        assert len(on.pids) == 2
        assert second in on.pids
        pot = await on.pot(http)
        assert (pot["requests"]["used"], pot["tokens"]["held"]) == (3, 0)
        states = Counter(row["state"] for row in rows(tmp_path / "quotas.db", "calls"))
        assert states == {"settled": 2, "expired": 1}
        async with http.get(f"{on.admin_url}/metrics") as response:
            text = await response.text()
        assert 'outcome="complete"} 2.0' in text
        assert "llm_quota_calls_in_flight 0.0" in text
        on.process.kill()
        for pid in on.pids:
            await ended(pid)
        store = SqliteStore(tmp_path / "quotas.db")
        await store.open()
        await store.close()
        audit(tmp_path / "quotas.db")


@pytest.mark.journey
@pytest.mark.parametrize("shutdown_delay", [None, "0s", "10m"])
async def test_workers_of_a_killed_parent_do_not_wait_for_their_calls(
    shutdown_delay: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls are settled, the lock on the file is free, and the folder of the metrics is gone. Also if the workers are
    stopping already, because an operator or a service manager killed the parent: while they still take
    new calls, and after that.
    """
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    async with running(tmp_path, 2, shutdown_delay=shutdown_delay or "5s") as on, client() as http:
        hanging = {"simulate": "tokens=50 stall=5"}
        loop = asyncio.get_running_loop()
        calls = [loop.create_task(on.chat(http, stream=True, metadata=hanging)) for _ in range(4)]
        await on.simulator.until(lambda: on.simulator.chunks_sent >= 20)
        assert len(list(folder.iterdir())) == 1
        if shutdown_delay is not None:
            on.process.terminate()
            for _ in on.pids:
                await on.logged("stopping")
        if shutdown_delay == "0s":
            await until_refused(on.url)
        on.process.kill()
        async with asyncio.timeout(10):
            for pid in on.pids:
                await ended(pid)
        await asyncio.gather(*calls, return_exceptions=True)
        states = Counter(row["state"] for row in rows(tmp_path / "quotas.db", "calls"))
        assert states == {"settled": 4}
        assert list(folder.iterdir()) == []
        store = SqliteStore(tmp_path / "quotas.db")
        await store.open()
        await store.close()
        audit(tmp_path / "quotas.db")


@pytest.mark.journey
async def test_workers_stop_in_order_on_sigterm_and_at_once_on_sigint(tmp_path: Path) -> None:
    """SIGTERM to the parent: each worker still takes calls, with its delay. Then SIGINT: each cuts off its calls."""
    async with running(tmp_path, 2, shutdown_delay="10m") as on, client() as http:
        on.process.terminate()
        for _ in on.pids:
            assert orjson.loads(await on.logged("stopping"))["shutdown_delay_s"] == 600
        for pid in on.pids:
            with on.only(pid):
                assert (await on.chat(http))[0] == 200
                async with http.get(f"{on.admin_url}/readyz") as response:
                    assert response.status == 503
        hanging = {"simulate": "tokens=50 stall=5"}
        loop = asyncio.get_running_loop()
        calls = [loop.create_task(on.chat(http, stream=True, metadata=hanging)) for _ in range(4)]
        await on.simulator.until(lambda: on.simulator.chunks_sent >= 20)
        on.process.send_signal(signal.SIGINT)
        ends = [orjson.loads(await on.logged("calls_ended")) for _ in on.pids]
        assert sum(end["calls_cut_off"] for end in ends) == 4
        assert sum(end["calls_ended"] for end in ends) == 2
        assert await on.process.wait() == 0
        await asyncio.gather(*calls, return_exceptions=True)
        states = Counter((row["state"], row["outcome"]) for row in rows(tmp_path / "quotas.db", "calls"))
        assert states == {("settled", "complete"): 2, ("settled", "stopped"): 4}
        audit(tmp_path / "quotas.db")


async def until_refused(url: str) -> None:
    """Wait until nobody accepts connections at this address any more."""
    host, port = url.removeprefix("http://").split(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return
        writer.close()


@pytest.mark.journey
async def test_calls_through_all_workers_are_admitted_up_to_the_limit(tmp_path: Path) -> None:
    """A shared quota on one SQLite file admits exactly 40 of 90 calls. A second parent on the file gets an error."""
    async with running(tmp_path, 3, requests=40) as on:
        clients = [client(limit=5) for _ in on.pids]
        for pid, http in zip(on.pids, clients, strict=True):
            with on.only(pid):  # this client opens its connections to this worker, and keeps them
                await asyncio.gather(*(on.pot(http) for _ in range(5)))
        answers = await asyncio.gather(*(on.chat(http) for http in clients for _ in range(30)))
        for http in clients:
            await http.close()
        assert Counter(status for status, _ in answers) == {200: 40, 429: 50}
        assert len({row["owner"] for row in rows(tmp_path / "quotas.db", "calls")}) == 3
        audit(tmp_path / "quotas.db")
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "serve", "--workers", "2", "--config", str(tmp_path / "quotas.yaml")),
            stderr=asyncio.subprocess.PIPE,
        )
        _, printed = await second.communicate()
        assert second.returncode == 2
        assert b"Another process is using" in printed
        assert b"If the parent of --workers was killed, its workers are ending now" in printed


@pytest.mark.journey
async def test_a_restart_loses_no_call(tmp_path: Path) -> None:
    """On SIGUSR2, new workers serve before the old ones stop accepting: no connection is refused or cut, and a stream
    that is running is sent to its end.
    """
    has_begun, may_end, is_over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def hold(_: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream_head() + event("Hel"))
        has_begun.set()
        await may_end.wait()
        writer.write(event("lo", "stop") + b"data: [DONE]\n\n")

    async with (
        bare_upstream(hold) as held,
        running(tmp_path, 2, requests=100_000, held=held.url) as on,
        client() as reconnecting,
        client(limit=5) as keeping,
    ):
        old = list(on.pids)

        async def call_repeatedly(http: aiohttp.ClientSession) -> set[int]:
            statuses = set()
            while not is_over.is_set():
                statuses.add((await on.chat(http))[0])
            return statuses

        clients = (reconnecting, keeping, keeping)
        load = [asyncio.get_running_loop().create_task(call_repeatedly(http)) for http in clients]
        stream = asyncio.get_running_loop().create_task(on.chat(reconnecting, model="slow", stream=True, metadata={}))
        await has_begun.wait()
        on.process.send_signal(signal.SIGUSR2)
        await on.logged("the old ones leave")
        # From now on nobody reads the log. Each call has a line, so the pipe gets full, which must keep no worker.
        may_end.set()
        await asyncio.gather(*map(ended, old))
        assert (await stream)[1].endswith(b"data: [DONE]\n\n")
        before = on.simulator.received
        await on.simulator.until(lambda: on.simulator.received > before + 4)
        is_over.set()
        assert await asyncio.gather(*load) == [{200}] * 3
        assert len(on.pids) == 4
        audit(tmp_path / "quotas.db")


def event(text: str, finish: str | None = None) -> bytes:
    """One event of a streamed answer."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "slow", "choices": [choice]}
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


@pytest.mark.journey
async def test_a_change_of_keys_reaches_every_worker(tmp_path: Path) -> None:
    """T6: each polls for itself. A key that another process has made is known, and is refused when it is revoked."""

    async def answers(status: int) -> None:
        headers = {"authorization": f"Bearer {key.text}"}
        found = None
        while found != status:
            async with http.get(f"{on.url}/v1/models", headers=headers) as response:
                found = response.status

    async with running(tmp_path, 2) as on, client() as http:
        store = store_of(sqlite_in(tmp_path))
        await store.attach()
        users = DirectoryDatabase(store, now=lambda: NOON)
        key = await add_key(users, await add_user(users, "dora"))
        for pid in on.pids:
            with on.only(pid):
                await answers(200)
        await set_key(users, key, revoked_at=NOON)
        for pid in on.pids:
            with on.only(pid):
                await answers(401)
        await store.close()
        on.process.terminate()
        assert on.process.stderr
        await on.process.stderr.read()  # a line for each request; the process waits until they are read


@pytest.mark.journey
async def test_workers_share_a_postgresql_database(tmp_path: Path) -> None:
    """There is no file to lock; everything else is the same."""
    server = shared()
    url = await server.fresh()
    async with running(tmp_path, 2, database=url) as on, client() as http:
        for pid in on.pids:
            with on.only(pid):
                assert (await on.chat(http))[0] == 200
        assert (await on.pot(http))["requests"]["used"] == 2
        assert len(await server.run("SELECT DISTINCT owner FROM llm_quota_proxy.calls", url=url)) == 2
        on.process.terminate()
        assert await on.process.wait() == 0


# -------------------------------------------------------------------------------------------- a parent with stand-ins

# A worker that serves if a file exists. Otherwise it ends at once, as a worker does that finds an invalid config.
STAND_IN = r"""
import pathlib, socket, sys
control = socket.socket(fileno=int(sys.argv[2]))
control.recv(65536)
if not pathlib.Path(sys.argv[1]).exists():
    sys.exit(3)
control.send(b"serves\n")
control.recv(6)
"""


class Startable:
    """The file that lets stand-ins serve."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def forbid(self) -> None:
        """From now on, new workers end at once."""
        self.path.unlink()

    def allow(self) -> None:
        """From now on, new workers serve."""
        self.path.touch()


@pytest.fixture
def startable(tmp_path: Path) -> Startable:
    """Workers can start at first."""
    return Startable(tmp_path / "startable")


@pytest.fixture
def parent(tmp_path: Path, startable: Startable) -> Parent:
    """A parent of two stand-ins, in the process of the test."""
    config = load_text(text_of(sqlite_in(tmp_path)))
    command = Command((sys.executable, "-S", "-c", STAND_IN, str(startable.path)), {})
    return Parent(config, 2, command=command, load=lambda: config)


class Supervised:
    """A parent that runs in a task, and its log."""

    def __init__(self, task: "asyncio.Task[None]", log: list[Any]) -> None:
        self.task = task
        self._log = log

    async def logged(self, words: str, times: int = 1) -> list[Any]:
        """Wait until it has logged this event at least so often, and return these entries."""
        await until(lambda: len(self.entries(words)) >= times)
        return self.entries(words)

    def entries(self, words: str) -> list[Any]:
        """The entries of the log whose event contains these words."""
        return [entry for entry in self._log if words in entry["event"]]


@asynccontextmanager
async def supervised(parent: Parent) -> AsyncIterator[Supervised]:
    """Let the parent serve, and stop it at the end."""
    with capture_logs() as log:
        on = Supervised(asyncio.get_running_loop().create_task(parent.serve(lambda _: None)), log)
        await on.logged("a worker serves", 2)
        yield on
        if not on.task.done():
            signal.raise_signal(signal.SIGTERM)
            await on.task


@pytest.mark.journey
async def test_a_parent_whose_first_workers_cannot_start_ends_with_an_error(
    parent: Parent, startable: Startable
) -> None:
    """It does not try for ever."""
    startable.forbid()
    with pytest.raises(NotServing, match="could not start: see its log above"):
        await parent.serve(lambda _: pytest.fail("nobody serves"))


@pytest.mark.journey
async def test_a_missing_program_is_named_in_the_error(parent: Parent) -> None:
    """As if it had been deleted while the parent ran."""
    parent._command = Command(("/nowhere/python",), {})
    with pytest.raises(NotServing, match=r"no process can be started: .*nowhere"):
        await parent.serve(lambda _: pytest.fail("nobody serves"))


@pytest.mark.journey
async def test_a_failed_restart_keeps_the_old_workers(parent: Parent, startable: Startable) -> None:
    """They serve until a later restart succeeds."""
    async with supervised(parent) as on:
        startable.forbid()
        signal.raise_signal(signal.SIGUSR2)
        await on.logged("the old workers stay")
        startable.allow()
        signal.raise_signal(signal.SIGUSR2)
        [entry] = await on.logged("the old ones leave")
        assert (entry["new"], entry["old"]) == (2, 2)
        assert not on.entries("a worker ended")


@pytest.mark.journey
async def test_a_dead_worker_is_replaced_as_soon_as_one_can_start(parent: Parent, startable: Startable) -> None:
    """Failed starts are repeated while another worker serves."""
    async with supervised(parent) as on:
        first, _ = [entry["pid"] for entry in on.entries("a worker serves")]
        startable.forbid()
        os.kill(first, signal.SIGKILL)
        await on.logged("not replaced yet", 2)
        startable.allow()
        assert len({entry["pid"] for entry in await on.logged("a worker serves", 3)}) == 3


@pytest.mark.journey
async def test_a_parent_without_workers_that_can_start_ends_with_an_error(
    parent: Parent, startable: Startable
) -> None:
    """An open port on which nobody answers is worse than a closed one."""
    async with supervised(parent) as on:
        startable.forbid()
        for entry in on.entries("a worker serves"):
            os.kill(entry["pid"], signal.SIGKILL)
        with pytest.raises(NotServing):
            await on.task


@pytest.mark.journey
async def test_a_worker_that_does_not_stop_is_killed(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paused process does not handle SIGTERM. The parent ends nevertheless."""
    monkeypatch.setattr("proxy.workers.GRACE_S", 0)
    monkeypatch.setattr("proxy.workers.CLEANUP_S", 0.05)
    async with supervised(parent) as on:
        paused = on.entries("a worker serves")[0]["pid"]
        os.kill(paused, signal.SIGSTOP)
        # Wait until it is paused, because SIGTERM could end it before SIGSTOP takes effect.
        await asyncio.to_thread(os.waitid, os.P_PID, paused, os.WSTOPPED | os.WNOWAIT)
        signal.raise_signal(signal.SIGTERM)
        await on.task
        assert [entry["pid"] for entry in on.entries("is killed")] == [paused]


# ------------------------------------------------------------------------------------------------ the metrics' folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_stays_until_the_last_process_has_ended(temporary: Path) -> None:
    """Whoever that is: the parent, or a worker if the parent was killed."""
    parent = MetricsFolder.make()
    workers = [MetricsFolder(parent.path) for _ in range(2)]
    (temporary / parent.path / "counter_1.db").touch()
    for each in (workers[0], parent, workers[1]):
        assert os.path.exists(parent.path)
        each.close()
        each.remove_if_unused()
    assert os.listdir(temporary) == []
    workers[0].remove_if_unused()


def test_a_new_parent_removes_what_killed_processes_have_left(temporary: Path) -> None:
    """Not the folders of those that run, not of other programs, and nothing that a link leads to."""
    running_one, abandoned = MetricsFolder.make(), MetricsFolder.make()
    abandoned.close()
    other = temporary / "llm-quota-proxy-demo-x"
    other.mkdir()
    link = temporary / f"{_FOLDER_PREFIX}link"
    link.symlink_to(other)
    mine = MetricsFolder.make()
    assert {str(each) for each in temporary.iterdir()} == {running_one.path, mine.path, str(other), str(link)}
    running_one.close()
    mine.close()


def test_a_folder_that_another_parent_has_removed_is_made_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks abandoned until it is locked: before it is opened, or between that and the lock."""
    made: list[str] = []
    make, lock = tempfile.mkdtemp, fcntl.flock

    def removed_at_once(**options: Any) -> str:
        made.append(make(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    def removed_before_the_lock(descriptor: int, operation: int) -> None:
        if len(made) == 2 and os.path.exists(made[1]):
            os.rmdir(made[1])
        lock(descriptor, operation)

    monkeypatch.setattr("tempfile.mkdtemp", removed_at_once)
    monkeypatch.setattr("fcntl.flock", removed_before_the_lock)
    folder = MetricsFolder.make()
    assert (len(made), folder.path, os.listdir(temporary)) == (3, made[2], [os.path.basename(made[2])])
    folder.close()


@pytest.mark.parametrize("is_unread", [False, True])
def test_a_worker_knows_whether_its_parent_lives(is_unread: bool, temporary: Path) -> None:
    """Also if the parent died before it had read that the worker serves: then the socket was reset."""
    for lives in (True, False):
        folder = MetricsFolder.make()
        ours, theirs = socket.socketpair()
        ours.send(InheritedResources("me", "sqlite:///q.db", metrics=folder.path).to_line())
        before = signal.getsignal(signal.SIGUSR2)
        control = ControlSocket(theirs.detach())
        signal.signal(signal.SIGUSR2, before)
        if is_unread:
            control._socket.send(b"serves\n")
        folder.close()
        if not lives:
            ours.close()
        control.close()
        ours.close()
        assert os.path.exists(folder.path) is lives


# ------------------------------------------------------------------------------------------------------------ sockets


WHOLE = InheritedResources(
    "me", "sqlite:///q.db", (3, 4), (5,), lock=6, metrics="/tmp/x", dead=("you",), shutdown_delay_s=2.5
)


@pytest.mark.parametrize("inherited", [WHOLE, InheritedResources("me", "postgresql://u:secret@h/d")])
def test_a_worker_receives_every_inherited_resource(inherited: InheritedResources) -> None:
    """Through a socket, also if the line arrives in two parts."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = inherited.to_line()
        ours.send(line[:7])
        ours.send(line[7:])
        assert receive_inherited(theirs) == inherited


def test_a_worker_whose_parent_is_gone_ends_with_an_error() -> None:
    """The parent died before it had written the line."""
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(OSError, match="parent"):
        receive_inherited(theirs)


async def test_a_worker_whose_parent_dies_while_it_starts_does_not_serve() -> None:
    """Its start may take seconds, and it has the lock on the file meanwhile."""
    ours, theirs = socket.socketpair()
    ours.send(InheritedResources("me", "sqlite:///q.db").to_line())
    before = signal.getsignal(signal.SIGUSR2)
    with closing(ControlSocket(theirs.detach())) as control:
        signal.signal(signal.SIGUSR2, before)
        is_stopped = asyncio.Event()

        async def start() -> None:
            ours.close()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)  # stopping in order takes several steps, in which it is not cancelled again
                await asyncio.sleep(0)
                is_stopped.set()

        with pytest.raises(NotServing, match="The parent of this worker has ended"):
            await control.run(start())
        assert is_stopped.is_set()


def test_a_listening_socket_has_an_address_and_is_not_inherited_by_default() -> None:
    """It accepts connections at the address. Only `pass_fds` hands it to a worker."""
    [only] = listen(Address("127.0.0.1", 0), "server.api")
    with only:
        assert address_of([only]) == Address("127.0.0.1", only.getsockname()[1])
        socket.create_connection(only.getsockname()).close()
        assert not os.get_inheritable(only.fileno())
    assert address_of([]) is None


def test_a_port_in_use_leaves_no_socket_open() -> None:
    """Also if the host has several addresses and the port is free on some of them."""
    before = os.listdir("/dev/fd")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        listen(Address("localhost", taken.getsockname()[1]), "server.api")
    assert os.listdir("/dev/fd") == before
