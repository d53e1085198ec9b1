"""Upgrades: replicas are replaced one by one under load, and two releases share one database.

The processes are real, and so are PostgreSQL and the connections between them. The balancer is part of the test, so
that it knows what nginx would know of its replicas, and no more.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy import __version__
from proxy.ledger.schema import HEAD
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from tests.audit import balance
from tests.postgres import Postgres, shared
from tests.printed import blocks
from tests.stage import UPSTREAM_KEY, key_of

# Ten processes are started one after the other, which takes minutes on a busy machine.
pytestmark = [pytest.mark.journey, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
NEXT_HEAD = f"{int(HEAD) + 1:04}"
POLICY = """
server: {{api: "127.0.0.1:0", admin: "127.0.0.1:0", shutdown_delay: {shutdown_delay}}}
database: "{database}"
upstreams: {{simulated: {{base_url: "{upstream}", api_key: "{upstream_key}", kind: simulator}}}}
models: {{fast: {{upstream: simulated, max_output_tokens: 100}}}}
groups:
  staff: {{quotas: {{pot: {{requests: {requests}, tokens: 100M, per: 365d, shared: true}}}}}}
users: {{alice: {{groups: [staff], keys: ["{alice}"]}}}}
"""
CHAT = "/v1/chat/completions"
ALICE = {"authorization": f"Bearer {key_of('alice')}"}


def policy(database: str, upstream: str, *, shutdown_delay: str = "0s", requests: str = "1M") -> str:
    """The YAML of all replicas."""
    secrets = {"upstream_key": UPSTREAM_KEY, "alice": key_of("alice")}
    given = {"database": database, "upstream": upstream, "shutdown_delay": shutdown_delay, "requests": requests}
    return POLICY.format(**given, **secrets)


@dataclass
class Replica:
    """A process that serves, and its log."""

    process: asyncio.subprocess.Process
    log: Path
    url: str = ""

    async def logged(self, event: str) -> dict[str, Any]:
        """Wait until it has logged this event, and return the first such line."""
        while True:
            # The last line may be half written.
            lines = [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line[-1] == "\n"]
            if found := [line for line in lines if line["event"] == event]:
                return found[0]
            assert self.process.returncode is None, self.log.read_text()
            await asyncio.sleep(0.02)

    async def ended(self, number: signal.Signals) -> dict[str, Any]:
        """Send this signal, and return what the process says when it has stopped."""
        self.process.send_signal(number)
        assert await self.process.wait() == 0, self.log.read_text()
        return await self.logged("stopped")


def command(root: Path, *arguments: str) -> Awaitable[asyncio.subprocess.Process]:
    """Start a command of the release in this folder. Its output can be read as one stream."""
    return asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", *arguments),
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def printed(root: Path, *arguments: str) -> tuple[int | None, str]:
    """Run a command of the release in this folder; its exit code and its output."""
    process = await command(root, *arguments)
    out, _ = await process.communicate()
    return process.returncode, out.decode()


class Replicas:
    """Starts replicas in a folder, each with a log of its own, and kills those that are left at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._all: list[Replica] = []
        self._numbers = count()

    async def start(self, config: Path, *options: str, root: Path = ROOT) -> Replica:
        """Start `serve` of the release in this folder, and wait until it serves."""
        log = self._folder / f"replica-{next(self._numbers)}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "proxy", "serve", "--config", str(config), *options),
                cwd=root,
                env={**os.environ, "PYTHONPATH": str(root)},
                stderr=stderr,
            )
        replica = Replica(process, log)
        self._all.append(replica)
        replica.url = (await replica.logged("serving"))["api"]
        return replica

    async def kill(self) -> None:
        """End those that run."""
        for replica in self._all:
            if replica.process.returncode is None:
                replica.process.kill()
                await replica.process.wait()


@asynccontextmanager
async def replicas_in(folder: Path) -> AsyncIterator[tuple[Replicas, str]]:
    """What starts replicas, and the URL of the simulated upstream."""
    runner, port = await serve_simulator(Simulator(UPSTREAM_KEY))
    replicas = Replicas(folder)
    try:
        yield replicas, f"http://127.0.0.1:{port}/v1"
    finally:
        await replicas.kill()
        await runner.cleanup()


# ---------------------------------------------------------------------------------------------------- the balancer

READINESS_EVERY_S = 3.0
# They are about one connection, or are written anew.
_HOP_BY_HOP = {"connection", "content-length", "date", "host", "keep-alive", "server", "transfer-encoding"}


class Balancer:
    """Sends calls to replicas in turn, as nginx does: over connections that it keeps and uses again.

    It asks each replica every READINESS_EVERY_S whether it is ready, believes that until it asks again, and sends no
    call twice. A call whose header `x-sticky` has the URL of a ready replica goes there.
    """

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
        self._ready: dict[str, bool] = {}
        self._turn = 0
        self._asked = asyncio.Condition()

    def add(self, replica: Replica) -> None:
        """Ask this replica too, from the next time on."""
        self._ready[replica.url] = False

    async def knows(self, is_reached: Callable[[dict[str, bool]], bool]) -> None:
        """Wait until all replicas were asked once more, and then until this is so."""
        async with self._asked:
            await self._asked.wait()
            await self._asked.wait_for(lambda: is_reached(self._ready))

    async def ask_forever(self) -> None:
        """Ask all replicas again and again."""
        while True:
            for url in list(self._ready):
                try:
                    async with self._http.get(f"{url}/readyz") as response:
                        self._ready[url] = response.status == 200
                except aiohttp.ClientError:
                    self._ready[url] = False
            async with self._asked:
                self._asked.notify_all()
            await asyncio.sleep(READINESS_EVERY_S)

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Forward a call, and its answer as it comes."""
        ready = [url for url, is_ready in self._ready.items() if is_ready]
        self._turn += 1
        url = request.headers.get("x-sticky")
        url = url if url in ready else ready[self._turn % len(ready)]
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        body = await request.read()
        async with self._http.post(url + request.path, headers=headers, data=body) as reply:
            kept = {name: value for name, value in reply.headers.items() if name.lower() not in _HOP_BY_HOP}
            response = web.StreamResponse(status=reply.status, headers=kept)
            await response.prepare(request)
            async for chunk in reply.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


@asynccontextmanager
async def balancer() -> AsyncIterator[tuple[Balancer, str]]:
    """A balancer without replicas, and its URL."""
    async with AsyncExitStack() as stack:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=75)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        balancer = Balancer(http)
        application = web.Application()
        application.router.add_post("/{path:.*}", balancer.forward)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        asking = asyncio.get_running_loop().create_task(balancer.ask_forever())
        try:
            yield balancer, f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            asking.cancel()
            await asyncio.wait([asking])


@dataclass
class Answers:
    """What clients got: how many calls by status, and the usage of the complete answers."""

    statuses: Counter[int] = field(default_factory=Counter)
    input: int = 0
    output: int = 0

    async def call(
        self, http: aiohttp.ClientSession, url: str, simulate: str, *, sticky: str = "", **more: Any
    ) -> None:
        """Send one call and read its whole answer. Raises what a client sees of a broken connection."""
        body = {
            "model": "fast",
            "messages": [{"role": "user", "content": "Hello"}],
            "metadata": {"simulate": simulate},
            **more,
        }
        async with http.post(f"{url}{CHAT}", json=body, headers={"x-sticky": sticky}) as response:
            text = await response.read()
            self.statuses[response.status] += 1
            if response.status != 200:
                return
        if "stream" in body:
            assert text.endswith(b"data: [DONE]\n\n"), "the stream is not complete"
            text = text.removesuffix(b"data: [DONE]\n\n").rpartition(b"data: ")[2]
        usage = json.loads(text)["usage"]
        self.input += usage["prompt_tokens"]
        self.output += usage["completion_tokens"]


STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


async def check_sums(server: Postgres, url: str, answers: Answers) -> None:
    """Nothing is open, and what is charged is what the clients got."""
    calls, counters = [
        [dict(row) for row in await server.run(f"SELECT * FROM llm_quota_proxy.{table}", url=url)]
        for table in ("calls", "counters")
    ]
    balance(calls, counters)
    assert Counter(row["state"] for row in calls if row["state"] != "released") == {"settled": answers.statuses[200]}
    [pot] = counters
    assert (pot["held_input"], pot["held_output"]) == (0, 0)
    assert (pot["used_requests"], pot["used_input"], pot["used_output"]) == (
        answers.statuses[200],
        answers.input,
        answers.output,
    )


async def test_a_rolling_update_fails_no_call(tmp_path: Path) -> None:
    """T52: two replicas are replaced one after the other, behind a balancer that learns of it only every 3 s.

    Each takes new calls after SIGTERM, and lets a stream end that began then and lasts longer than the delay.
    """
    server, answers, is_over = shared(), Answers(), asyncio.Event()
    database = await server.fresh()
    config = tmp_path / "quotas.yaml"
    async with (
        replicas_in(tmp_path) as (replicas, upstream),
        balancer() as (front, url),
        aiohttp.ClientSession(headers=ALICE) as http,
        asyncio.TaskGroup() as clients,
    ):
        config.write_text(policy(database, upstream, shutdown_delay="6s"))

        async def call_repeatedly(simulate: str, **more: Any) -> None:
            while not is_over.is_set():
                await answers.call(http, url, simulate, **more)

        old = await asyncio.gather(*(replicas.start(config) for _ in range(2)))
        for replica in old:
            front.add(replica)
        await front.knows(lambda ready: all(ready.values()))
        for _ in range(3):
            clients.create_task(call_repeatedly("tokens=5 speed=50"))
            clients.create_task(call_repeatedly("tokens=20 speed=50", **STREAM))
            clients.create_task(call_repeatedly("tokens=50 speed=10", **STREAM))
        for replica in old:
            starting = clients.create_task(replicas.start(config))
            await front.knows(lambda ready: True)  # it was asked a moment ago, so it does not ask for another 3 s
            replica.process.send_signal(signal.SIGTERM)
            stopping = await replica.logged("stopping")
            await answers.call(http, url, "tokens=80 speed=10", sticky=replica.url, **STREAM)
            end = await replica.ended(signal.SIGTERM)  # a second one changes nothing
            assert (stopping["shutdown_delay_s"], end["calls_cut_off"], end["charges_pending"]) == (6, 0, 0)
            assert end["calls_ended"] > stopping["calls_in_flight"], "it took new calls"
            assert (await replica.logged("accepting no more calls"))["calls_in_flight"] >= 1
            new = await starting
            front.add(new)
            await front.knows(lambda ready, url=new.url: ready[url])
        is_over.set()
    assert answers.statuses.keys() == {200}
    await check_sums(server, database, answers)


# ---------------------------------------------------------------------------------------------- the next release


MIGRATION = f'''"""What a later release may add: a column and a table."""

import sqlalchemy as sa
from alembic import op

revision = "{NEXT_HEAD}"
down_revision = "{HEAD}"


def upgrade() -> None:
    op.add_column("calls", sa.Column("note", sa.Text, nullable=False, server_default=""))
    op.add_column("counters", sa.Column("used_cost", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table("notes", sa.Column("id", sa.Text, primary_key=True))
'''


def next_release(folder: Path) -> Path:
    """A copy of this release with a higher version, and with one more migration."""
    package = folder / "next" / "proxy"
    shutil.copytree(ROOT / "proxy", package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in (
        (package / "__init__.py", f'__version__ = "{__version__}"', '__version__ = "99.0.0"'),
        (package / "ledger" / "schema.py", f'HEAD = "{HEAD}"', f'HEAD = "{NEXT_HEAD}"'),
    ):
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
    (package / "ledger" / "migrations" / "versions" / f"{NEXT_HEAD}_next.py").write_text(MIGRATION)
    return package.parent


async def test_two_releases_share_one_database(tmp_path: Path) -> None:
    """The next release migrates as a job while this one serves, and then both serve, exactly, on one quota.

    Those that serve may not change the schema. The one that came too early says what is missing.
    """
    server, answers = shared(), Answers()
    owned = await server.fresh()
    role = owned.partition("?")[0].rpartition("/")[2]  # roles belong to all databases of a server
    served = owned.replace("//postgres:@", f"//{role}:@")
    new = next_release(tmp_path)
    job, config = tmp_path / "job.yaml", tmp_path / "quotas.yaml"
    async with replicas_in(tmp_path) as (replicas, upstream), aiohttp.ClientSession(headers=ALICE) as http:
        job.write_text(policy(owned, upstream, requests="40"))
        config.write_text(policy(served, upstream, requests="40"))
        migrate = ("migrate", "--config", str(job))
        done = await asyncio.gather(*(printed(ROOT, *migrate) for _ in range(2)))
        assert {code for code, _ in done} == {0}, done
        rights = blocks("upgrading.md", "Migrations as a job")[1]
        grants = rights.replace(" proxy;", f" {role};").replace(" proxy ", f" {role} ")
        await server.run(*(text for text in grants.split(";") if text.strip()), url=owned)

        old = await replicas.start(config, "--no-migrate")
        code, text = await printed(new, "serve", "--config", str(config), "--no-migrate")
        assert code == 2
        assert f"has schema {HEAD}, and this release needs {NEXT_HEAD}: run `llm-quota-proxy migrate`" in text

        async def migrate_with_next() -> list[tuple[int | None, str]]:
            return await asyncio.gather(*(printed(new, *migrate) for _ in range(2)))

        migrating = asyncio.get_running_loop().create_task(migrate_with_next())
        for _ in range(10):
            await answers.call(http, old.url, "tokens=5")
        done = await migrating
        assert {code for code, _ in done} == {0}, done

        beside = await replicas.start(config, "--no-migrate", root=new)
        assert (await beside.logged("starting"))["version"] == "99.0.0"
        urls = (old.url, beside.url)
        await asyncio.gather(*(answers.call(http, urls[number % 2], "tokens=7") for number in range(50)))
        assert answers.statuses == {200: 40, 429: 20}
        assert len(await server.run("SELECT DISTINCT owner FROM llm_quota_proxy.calls", url=owned)) == 2
        await check_sums(server, owned, answers)

        await old.ended(signal.SIGINT)
        again = await replicas.start(config, "--no-migrate")
        await answers.call(http, again.url, "tokens=7")
        assert answers.statuses == {200: 40, 429: 21}
        await check_sums(server, owned, answers)
