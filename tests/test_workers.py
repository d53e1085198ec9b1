"""Several processes behind one port, as an operator runs them: real processes, sockets and signals."""

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from structlog.testing import capture_logs

from proxy.config.loader import load_text
from proxy.ledger.sqlite import SqliteStore
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from proxy.workers import Command, NotServing, Parent
from tests.audit import audit, rows
from tests.bare_upstream import bare_upstream, stream_head
from tests.postgres import shared
from tests.stage import UPSTREAM_KEY, key_of, sqlite_in, until

pytestmark = pytest.mark.journey

CONFIG = """
server: {{api: "127.0.0.1:0", admin: "127.0.0.1:0"}}
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
    """A parent, its log, and what clients see of it. `pids` are the workers that it has said serve."""

    def __init__(self, process: asyncio.subprocess.Process, simulator: Simulator) -> None:
        self.process = process
        self.simulator = simulator
        self.pids: list[int] = []
        self.url = self.admin_url = ""

    async def said(self, words: str) -> str:
        """Wait until the log has a line with these words; all lines till then are read."""
        assert self.process.stderr
        while line := (await self.process.stderr.readline()).decode():
            if '"a worker serves"' in line:
                self.pids.append(orjson.loads(line)["pid"])
            if words in line:
                return line
        raise AssertionError(f"it ended and never said: {words}")

    async def serves(self, workers: int) -> None:
        """Wait until it says where it listens, and which its workers are."""
        while not (self.url and self.admin_url and len(self.pids) == workers):
            kind, _, address = (await self.said("")).partition(" on http")
            if address:
                setattr(self, {"API": "url", "admin": "admin_url"}[kind], f"http{address.strip()}")

    async def chat(self, http: aiohttp.ClientSession, **more: Any) -> tuple[int, bytes]:
        """One call."""
        async with http.post(f"{self.url}/v1/chat/completions", headers=ALICE, json={**CHAT, **more}) as response:
            return response.status, await response.read()

    async def pot(self, http: aiohttp.ClientSession) -> dict[str, Any]:
        """How the pot stands."""
        async with http.get(f"{self.url}/v1/quota", headers=ALICE) as response:
            found: dict[str, Any] = (await response.json())["data"][0]
            return found

    @contextmanager
    def only(self, pid: int) -> Iterator[None]:
        """All other workers stand still meanwhile, so that this one gets whoever connects."""
        others = [other for other in self.pids if other != pid]
        for other in others:
            os.kill(other, signal.SIGSTOP)
        try:
            yield
        finally:
            for other in others:
                os.kill(other, signal.SIGCONT)


async def ended(pid: int) -> None:
    """Wait until a process has ended, also one that is not ours."""
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
    """One that connects anew for each call, unless told otherwise."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(**(more or {"force_close": True})))


@asynccontextmanager
async def running(
    folder: Path, workers: int, *, database: str | None = None, requests: int = 1000, held: str = NOWHERE
) -> AsyncIterator[Running]:
    """A parent with so many workers, before a simulator; it is killed where the test did not stop it."""
    simulator = Simulator(UPSTREAM_KEY)
    runner, port = await serve_simulator(simulator)
    file = folder / "quotas.yaml"
    upstream = f"http://127.0.0.1:{port}/v1"
    file.write_text(text_of(database or sqlite_in(folder), upstream=upstream, held=held, requests=requests))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--workers", str(workers), "--config", str(file)),
        stderr=asyncio.subprocess.PIPE,
    )
    on = Running(process, simulator)
    try:
        await on.serves(workers)
        yield on
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        for pid in on.pids:
            await ended(pid)
        await runner.cleanup()


def text_of(database: str, *, upstream: str = NOWHERE, held: str = NOWHERE, requests: int = 1000) -> str:
    """The file."""
    given = {"key": UPSTREAM_KEY, "alice": key_of("alice"), "requests": requests}
    return CONFIG.format(database=database, upstream=upstream, held=held, **given)


async def test_one_port_and_every_worker_serves_it(tmp_path: Path) -> None:
    """Whichever takes the call; /metrics are sums whoever answers; SIGHUP reaches all; SIGTERM ends with 0."""
    async with running(tmp_path, 3) as on, client() as http:
        for pid in on.pids:
            with on.only(pid):
                assert (await on.chat(http))[0] == 200
        assert len({row["owner"] for row in rows(tmp_path / "quotas.db", "calls")}) == 3
        for pid in on.pids:
            with on.only(pid):
                async with http.get(f"{on.admin_url}/metrics") as response:
                    text = await response.text()
                async with http.get(f"{on.admin_url}/readyz") as response:
                    assert response.status == 200
            assert 'llm_quota_calls_total{endpoint="chat",model="fast",outcome="complete"} 3.0' in text
            assert "llm_quota_calls_in_flight 0.0" in text
        on.process.send_signal(signal.SIGHUP)
        for _ in on.pids:
            await on.said("policy reloaded")
        on.process.terminate()
        assert await on.process.wait() == 0
        for pid in on.pids:
            await ended(pid)
        audit(tmp_path / "quotas.db")


async def test_who_is_killed_takes_nothing_with_it(tmp_path: Path) -> None:
    """A worker: the others serve on, another takes its place and charges its open call, its counts stay. The parent:
    its workers end in order, and let go of the file.
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
        await on.said("a worker serves")
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


async def test_of_all_that_come_through_any_worker_as_many_are_let_in_as_fit(tmp_path: Path) -> None:
    """One pot for all, on one SQLite file; who is none of this parent's is refused the file."""
    async with running(tmp_path, 3, requests=40) as on:
        clients = [client(limit=5) for _ in on.pids]
        for pid, http in zip(on.pids, clients, strict=True):
            with on.only(pid):  # its connections are with this worker, and stay there
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
        _, said = await second.communicate()
        assert second.returncode == 2
        assert b"Another process is using" in said


async def test_a_restart_loses_no_call(tmp_path: Path) -> None:
    """On SIGUSR2 others serve before the old ones leave: no connection is refused, none is cut, a stream ends."""
    has_begun, may_end, is_over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def hold(_: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream_head() + event("Hel"))
        has_begun.set()
        await may_end.wait()
        writer.write(event("lo", "stop") + b"data: [DONE]\n\n")

    async with (
        bare_upstream(hold) as held,
        running(tmp_path, 2, requests=100_000, held=held.url) as on,
        client() as new,
        client(limit=5) as kept,
    ):
        old = list(on.pids)

        async def come_again(http: aiohttp.ClientSession) -> set[int]:
            seen = set()
            while not is_over.is_set():
                seen.add((await on.chat(http))[0])
            return seen

        load = [asyncio.get_running_loop().create_task(come_again(http)) for http in (new, kept, kept)]
        stream = asyncio.get_running_loop().create_task(on.chat(new, model="slow", stream=True, metadata={}))
        await has_begun.wait()
        on.process.send_signal(signal.SIGUSR2)
        await on.said("the old ones leave")
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


async def test_workers_share_a_postgresql(tmp_path: Path) -> None:
    """There is no file to be locked; all else is the same."""
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


# ----------------------------------------------------------------------------------------------------- with stand-ins

# Serves as long as a file is there; else it ends at once, as on a config that can't be taken.
STAND_IN = r"""
import pathlib, socket, sys
tie = socket.socket(fileno=int(sys.argv[2]))
tie.recv(65536)
if not pathlib.Path(sys.argv[1]).exists():
    sys.exit(3)
tie.send(b"serves\n")
tie.recv(6)
"""


class Fine:
    """The file without which stand-ins don't serve."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def no_more(self) -> None:
        """From now on new ones end at once."""
        self.path.unlink()

    def again(self) -> None:
        """From now on new ones serve."""
        self.path.touch()


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    """All is fine to begin with."""
    return Fine(tmp_path / "fine")


@pytest.fixture
def parent(tmp_path: Path, fine: Fine) -> Parent:
    """A parent of two stand-ins, in this very process."""
    config = load_text(text_of(sqlite_in(tmp_path)))
    command = Command((sys.executable, "-S", "-c", STAND_IN, str(fine.path)), {})
    return Parent(config, 2, command=command, load=lambda: config)


class Stood:
    """A parent that runs, and what it logs."""

    def __init__(self, task: "asyncio.Task[None]", log: list[Any]) -> None:
        self.task = task
        self._log = log

    async def said(self, words: str, times: int = 1) -> list[Any]:
        """Wait until it has logged this so often."""
        await until(lambda: len(self.lines(words)) >= times)
        return self.lines(words)

    def lines(self, words: str) -> list[Any]:
        """What it has logged with these words."""
        return [line for line in self._log if words in line["event"]]


@asynccontextmanager
async def stood(parent: Parent) -> AsyncIterator[Stood]:
    """Let it serve, and stop it."""
    with capture_logs() as log:
        on = Stood(asyncio.get_running_loop().create_task(parent.serve(lambda _: None)), log)
        await on.said("a worker serves", 2)
        yield on
        if not on.task.done():
            signal.raise_signal(signal.SIGTERM)
            await on.task


async def test_who_cannot_start_workers_gives_up(parent: Parent, fine: Fine) -> None:
    """It says so instead of trying for ever, and leaves nobody behind."""
    fine.no_more()
    with pytest.raises(NotServing, match="could not start: what it said"):
        await parent.serve(lambda _: pytest.fail("nobody serves"))


async def test_a_command_that_is_not_there_is_said(parent: Parent) -> None:
    """As when the program was taken away meanwhile."""
    parent._command = Command(("/nowhere/python",), {})
    with pytest.raises(NotServing, match=r"no process can be started: .*nowhere"):
        await parent.serve(lambda _: pytest.fail("nobody serves"))


async def test_a_restart_that_fails_changes_nothing(parent: Parent, fine: Fine) -> None:
    """The old workers stay as long as new ones can't serve."""
    async with stood(parent) as on:
        fine.no_more()
        signal.raise_signal(signal.SIGUSR2)
        await on.said("the old workers stay")
        fine.again()
        signal.raise_signal(signal.SIGUSR2)
        [line] = await on.said("the old ones leave")
        assert (line["new"], line["old"]) == (2, 2)
        assert not on.lines("a worker ended")


async def test_who_ends_is_replaced_as_soon_as_that_can_be(parent: Parent, fine: Fine) -> None:
    """Attempts that fail are repeated while somebody still serves."""
    async with stood(parent) as on:
        first, _ = [line["pid"] for line in on.lines("a worker serves")]
        fine.no_more()
        os.kill(first, signal.SIGKILL)
        await on.said("not replaced yet", 2)
        fine.again()
        assert len({line["pid"] for line in await on.said("a worker serves", 3)}) == 3


async def test_when_nobody_serves_any_more_it_gives_up(parent: Parent, fine: Fine) -> None:
    """A port on which nobody ever answers is worse than none."""
    async with stood(parent) as on:
        fine.no_more()
        for line in on.lines("a worker serves"):
            os.kill(line["pid"], signal.SIGKILL)
        with pytest.raises(NotServing):
            await on.task


async def test_a_worker_that_will_not_end_is_killed(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stands still takes no SIGTERM; the parent must go all the same."""
    monkeypatch.setattr("proxy.workers.GRACE_S", 0)
    monkeypatch.setattr("proxy.workers._END_S", 0.05)
    async with stood(parent) as on:
        stopped = on.lines("a worker serves")[0]["pid"]
        os.kill(stopped, signal.SIGSTOP)
        # Else the SIGTERM might overtake it.
        await asyncio.to_thread(os.waitid, os.P_PID, stopped, os.WSTOPPED | os.WNOWAIT)
        signal.raise_signal(signal.SIGTERM)
        await on.task
        assert [line["pid"] for line in on.lines("is killed")] == [stopped]
