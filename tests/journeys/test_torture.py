"""Load tests with faults, of this proxy and of others: a correct proxy passes, and incorrect ones are found out."""

import asyncio
import json
import shlex
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from proxy.cli import main
from proxy.server import wall_clock_ms
from proxy.torture.answers import read_stream, read_whole
from proxy.torture.database import require_empty
from proxy.torture.plan import Plan
from proxy.torture.process import ProxyProcess, UpstreamSettings
from proxy.torture.report import Report
from proxy.torture.run import CounterUnreadable, ExternalProxy, compare, run_external
from tests.postgres import shared

pytestmark = pytest.mark.journey

KEY = "sk-torture-0123456789abcdef-0"
UNLIMITED_KEY = "sk-unlimited-0123456789abcdef"
UPSTREAM_KEY = "sk-upstream-0123456789abcdef"


def _torture(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["torture", *arguments])


def test_ten_seconds_of_torture_break_no_promise() -> None:
    """32 clients, a fifth of whose calls disconnect, and two kills, on quotas that are used up and reset."""
    options = "--seconds 10 --clients 32 --users 2 --kill-every 4 --per 5s --limit 20000 --json".split()
    result = _torture(*options)
    report = json.loads(result.stdout)
    assert report["broken"] == []
    assert result.exit_code == 0
    figures = {name: figure["value"] for name, figure in report["figures"].items()}
    assert figures["kills"] == 2
    assert figures["upstream tokens"] > 0
    assert figures["refusals"] > 0
    for kind in ("complete", "disconnected", "refused"):
        assert kind in report["figures"]["calls"]["note"]


def test_an_administrator_who_changes_things_all_the_time_breaks_no_promise() -> None:
    """Quotas, grants, counters, users and keys change while the quotas are used up and the proxy is killed."""
    result = _torture(*"--seconds 10 --clients 32 --users 6 --kill-every 6 --administrator --json".split())
    report = json.loads(result.stdout)
    assert report["broken"] == []
    assert result.exit_code == 0
    assert "quota.set" in report["figures"]["changes"]["note"]
    assert report["figures"]["changes"]["value"] >= 2  # on a busy machine there are few


REPLICAS = "--seconds 6.5 --clients 16 --users 2 --replicas 3 --kill-every 2.5 --pause-every 3 --limit 20000 --json"
DELETE_CALLS = """
import asyncio, asyncpg, sys

async def delete():
    connection = await asyncpg.connect(sys.argv[1])
    await connection.execute("DELETE FROM llm_quota_proxy.calls WHERE state = 'settled'")
    await connection.close()

asyncio.run(delete())
"""


def test_three_replicas_on_one_database_break_no_promise() -> None:
    """With two kills, a pause of three leases and a restart of the database, which is empty again afterwards."""
    server = shared()
    url = asyncio.run(server.fresh())
    result = _torture(*REPLICAS.split(), "--database", url, "--restart-database", server.restart_command)
    report = json.loads(result.stdout)
    assert report["broken"] == []
    assert result.exit_code == 0
    figures = {name: figure["value"] for name, figure in report["figures"].items()}
    assert [figures[name] for name in ("kills", "pauses", "restarts")] == [2, 1, 1]
    assert figures["refusals"] > 0
    asyncio.run(require_empty(url))


def test_a_database_that_loses_commits_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the restart calls are missing, as after a power cut with `fsync=off`.

    The data is kept for inspection, and no other run begins in that database.
    """
    server = shared()
    url = asyncio.run(server.fresh())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # for the logs that are kept
    options = "--seconds 2 --clients 4 --users 2 --replicas 2 --kill-every 0 --limit 100000 --json".split()
    arguments = [
        *options,
        "--database",
        url,
        "--restart-database",
        shlex.join([sys.executable, "-c", DELETE_CALLS, url]),
    ]
    result = _torture(*arguments)
    assert set(json.loads(result.stdout)["broken"]) >= {"lost", "unbalanced"}
    assert result.exit_code == 1
    assert "The data is kept in the database for inspection" in result.stderr
    again = _torture(*arguments)
    assert "This database already has a schema llm_quota_proxy" in again.stderr
    assert again.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "2"], "Several replicas, or a database to restart, need PostgreSQL"),
        (["--restart-database", "true"], "need PostgreSQL"),
        (["--replicas", "2", "--database", "sqlite:///quotas.db"], "--database takes a PostgreSQL URL"),
        (["--database", "postgresql://me:word@127.0.0.1:9/none"], "The database can't be reached"),
        (["--clients", "2", "--users", "3"], "3 users need as many clients or more"),
        (["--per", "1M"], '"1M" could be minutes or months'),
        (["--target", "http://127.0.0.1:9/v1"], "--target needs --key"),
        (["--behind", "sk-unlimited"], "--behind compares another proxy: it needs --target"),
        (["--target", "http://127.0.0.1:9/v1", "--administrator"], "--administrator tests only this proxy"),
    ],
)
def test_options_that_do_not_fit_are_an_error(arguments: list[str], message: str) -> None:
    """With exit code 2, before anything is started."""
    result = _torture(*arguments)
    assert message in result.stderr
    assert result.exit_code == 2


# ---------------------------------------------------------------------------------------------------- other proxies


class Gateway:
    """A proxy that checks its counter before a call and adds to it afterwards, as many do.

    With `skips_streams` it does not count streams. Calls with the `unlimited_key` are not counted.
    """

    def __init__(
        self, upstream_port: int, limit: int, *, skips_streams: bool = False, unlimited_key: str | None = None
    ) -> None:
        self.used = 0
        self._unlimited = f"Bearer {unlimited_key}"
        self._upstream = f"http://127.0.0.1:{upstream_port}"
        self._limit = limit
        self._skips_streams = skips_streams

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Forward one call and its answer."""
        is_limited = request.headers["authorization"] != self._unlimited
        if is_limited and self.used >= self._limit:
            return web.json_response({"error": {"message": "used up"}}, status=429)
        body = await request.json()
        if body.get("stream") and "input" not in body:
            body["stream_options"] = {"include_usage": True}
        headers = {"authorization": f"Bearer {UPSTREAM_KEY}"}
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.post(self._upstream + request.path, json=body) as answer,
        ):
            response = web.StreamResponse(status=answer.status, headers={"content-type": answer.content_type})
            await response.prepare(request)
            received = b""
            async for chunk in answer.content.iter_any():
                received += chunk
                await response.write(chunk)
        read = read_stream if body.get("stream") else read_whole
        if is_limited and not (self._skips_streams and body.get("stream")):
            self.used += sum(read(received).usage or ())
        return response


@asynccontextmanager
async def serving(gateway: Gateway) -> AsyncIterator[str]:
    """Serve the gateway; yields its base URL."""
    app = web.Application()
    app.router.add_post("/{path:.*}", gateway.forward)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    await runner.cleanup()


def free_port() -> int:
    """A port for the upstream. A gateway needs its number before the upstream is started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def report_on(url: str, plan: Plan, port: int, *, counter: str | None = None) -> Report:
    """The report on the proxy at this base URL."""
    external = ExternalProxy(url, (KEY,), "gpt-4o", upstream_port=port, upstream_key=UPSTREAM_KEY, counter=counter)
    return await run_external(plan, external, now=wall_clock_ms, say=lambda text: None)


async def test_a_proxy_that_checks_first_and_counts_later_is_found_out() -> None:
    """Sixteen calls that each find one token left use far more than that; the upstream's count shows it."""
    plan, port = Plan(clients=16, users=1, seconds=1, limit=10_000, disconnects=0, tokens_per_s=2000), free_port()
    async with serving(Gateway(port, plan.tokens)) as url:
        report = await report_on(url, plan, port)
    assert report.broken == ["upstream overshoot"]


async def test_the_same_proxy_behind_this_one_keeps_to_the_limit() -> None:
    """In the second of two runs, which are judged and printed side by side."""
    plan, port = Plan(clients=16, users=1, seconds=2, limit=20_000, tokens_per_s=2000), free_port()
    async with serving(Gateway(port, plan.tokens, unlimited_key=UNLIMITED_KEY)) as url:
        external = ExternalProxy(url, (KEY,), "gpt-4o", upstream_port=port, upstream_key=UPSTREAM_KEY)
        found = await compare(plan, external, unlimited_key=UNLIMITED_KEY, now=wall_clock_ms, say=lambda text: None)
    # Not the false refusals: on a busy machine the calls in flight may hold the rest for longer than others wait.
    assert [found.alone["upstream overshoot"].is_kept, found.behind["upstream overshoot"].is_kept] == [False, True]
    assert found.behind["refusals"].value
    assert found.behind["upstream calls"].value


async def test_a_proxy_that_does_not_count_streams_is_found_out(tmp_path: Path) -> None:
    """Its own counter, read before and after, adds less than the usage that its clients received."""
    plan, port = Plan(clients=8, users=1, seconds=1, limit=10**9, disconnects=0, tokens_per_s=2000), free_port()
    gateway = Gateway(port, plan.tokens, skips_streams=True)
    count, next_count = tmp_path / "count", tmp_path / "next"

    async def write_counter() -> None:
        while True:
            next_count.write_text(f"used: {gateway.used}")
            next_count.replace(count)  # atomic: the command never reads half a file
            await asyncio.sleep(0.01)

    writing = asyncio.get_running_loop().create_task(write_counter())
    async with serving(gateway) as url:
        await asyncio.sleep(0)
        report = await report_on(url, plan, port, counter=f"sleep 0.1; cat {count}")
    writing.cancel()
    assert report.broken == ["lost"]


async def test_this_proxy_passes_as_an_external_one_too(tmp_path: Path) -> None:
    """Started separately, as any other proxy would be, and judged by the upstream's own count."""
    plan, port = Plan(clients=16, users=1, seconds=2, limit=20_000, tokens_per_s=2000), free_port()
    upstream = f"http://127.0.0.1:{port}/v1"
    proxy = ProxyProcess(tmp_path, plan, upstream=UpstreamSettings(upstream, UPSTREAM_KEY), keys=(KEY,))
    await proxy.start()
    try:
        report = await report_on(f"http://127.0.0.1:{proxy.port}/v1", plan, port)
    finally:
        await proxy.kill()
    assert report.broken == []
    assert report["refusals"].value


@pytest.mark.parametrize("counter", ["echo none", "echo 7; false"])
async def test_a_counter_that_cannot_be_read_is_an_error(counter: str) -> None:
    """A verdict without the counter would be wrong."""
    with pytest.raises(CounterUnreadable, match="printed no number"):
        await report_on("http://127.0.0.1:9/v1", Plan(clients=1, users=1, limit=1), free_port(), counter=counter)
