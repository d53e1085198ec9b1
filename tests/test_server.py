"""Starting, stopping and restarting one process."""

import asyncio
import errno
import json
import os
import re
import signal
import sqlite3
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from structlog.testing import capture_logs

from proxy.config.loader import Address
from proxy.ledger.notices import Crossing
from proxy.ledger.postgres import _MIGRATION_LOCK, PostgresStore
from proxy.ledger.primary import Timeouts
from proxy.ledger.store import StoreInUse
from proxy.server import InheritedResources, Server, cannot_listen, repeat
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from tests.audit import audit, rows
from tests.bare_client import KEY, bare_client, get, post
from tests.builders import NOON
from tests.postgres import Postgres, shared
from tests.stage import STAFF, UPSTREAM_KEY, Clock, config_of, key_of, loaded, movable_time, stage, until

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def _ask(simulate: str, **more: Any) -> dict[str, Any]:
    return {"model": "fast", "messages": HELLO, "metadata": {"simulate": simulate}, **more}


async def test_a_stop_lets_calls_end(tmp_path: Path) -> None:
    """T52: a stream that is running when the stop begins is sent to its end."""
    async with stage(folder=tmp_path) as on:
        call = on.begin(CHAT, _ask("tokens=20 speed=400", stream=True))
        await on.simulator.until(lambda: on.simulator.chunks_sent > 2)
        await on.server.stop(grace_s=20)
        assert (await call).body.endswith(b"data: [DONE]\n\n")


async def test_a_call_that_does_not_end_in_time_is_cut_off_and_settled(tmp_path: Path) -> None:
    """The next start finds it charged for the tokens that were streamed, and holding nothing."""
    async with stage(folder=tmp_path) as on:
        call = on.begin(CHAT, _ask("tokens=50 stall=5", stream=True))
        await on.simulator.until(lambda: on.simulator.chunks_sent >= 5)
        await on.server.stop(grace_s=0.01)
        with pytest.raises(aiohttp.ClientError):
            await call
    async with stage(folder=tmp_path) as on:
        used, held = await on.used()
        assert held == 0
        assert used >= 5


async def test_what_waits_for_a_call_does_not_wait_for_its_connection(tmp_path: Path) -> None:
    """The client keeps the connection open after the answer."""
    async with stage(folder=tmp_path) as on:
        stream = on.begin(CHAT, _ask("tokens=5 speed=400", stream=True))
        await on.simulator.until(lambda: on.simulator.chunks_sent > 0)
        settled = asyncio.get_running_loop().create_task(on.server.all_settled())
        assert (await stream).body.endswith(b"data: [DONE]\n\n")
        await asyncio.wait_for(settled, 30)


async def test_new_calls_are_taken_during_the_shutdown_delay(tmp_path: Path) -> None:
    """Until a load balancer has seen that the process is not ready. Their answers close its pooled connections."""
    with movable_time() as move, capture_logs() as logged:
        async with stage(folder=tmp_path) as on:
            stop = asyncio.get_running_loop().create_task(on.server.stop(delay_s=60))
            await until(lambda: on.server.health.is_stopping)
            for url in (on.url, on.admin_url):
                async with on.http.get(f"{url}/readyz") as response:
                    assert response.status == 503
            for _ in range(2):
                reply = await on.post(CHAT, _ask("tokens=3"))
                assert (reply.status, reply.headers["connection"]) == (200, "close")
            stream = on.begin(CHAT, _ask("tokens=20 speed=400", stream=True))
            await on.simulator.until(lambda: on.simulator.chunks_sent > 2)
            move(60)
            assert (await stream).body.endswith(b"data: [DONE]\n\n")
            await stop
            with pytest.raises(aiohttp.ClientConnectorError):
                await on.post(CHAT, _ask("tokens=3"))
    begin, _, end = _lines_of_a_stop(logged)
    assert begin == {"event": "stopping", "shutdown_delay_s": 60, "calls_in_flight": 0}
    assert end == {"event": "stopped", "calls_ended": 3, "calls_cut_off": 0, "charges_pending": 0}


def _lines_of_a_stop(logged: list[Any]) -> list[Any]:
    """What the first stop has logged about itself, without the levels."""
    lines = [{name: entry[name] for name in entry.keys() - {"log_level"}} for entry in logged]
    ours = [line for line in lines if line["event"] in _STOP_EVENTS]
    return ours[: 1 + [line["event"] for line in ours].index("stopped")]


_STOP_EVENTS = (
    *("stopping", "accepting no more calls", "ending at once", "calls were cut off and settled", "stopped"),
)


async def test_the_admin_listener_serves_until_the_last_call_is_settled(tmp_path: Path) -> None:
    """So the last metrics are scraped. Then the call that does not end is cut off, and the stop says so."""
    with capture_logs() as logged:
        async with stage(folder=tmp_path) as on:
            call = on.begin(CHAT, _ask("tokens=50 stall=5", stream=True))
            await on.simulator.until(lambda: on.simulator.chunks_sent >= 5)
            stop = asyncio.get_running_loop().create_task(on.server.stop())
            await until(lambda: "accepting no more calls" in {line["event"] for line in logged})
            with pytest.raises(aiohttp.ClientConnectorError):
                await on.get("/readyz")
            async with on.http.get(f"{on.admin_url}/readyz") as response:
                assert response.status == 503
            async with on.http.get(f"{on.admin_url}/metrics") as response:
                assert "llm_quota_calls_in_flight 1.0" in await response.text()
            on.server.end_at_once()
            on.server.end_at_once()  # as if Ctrl-C was pressed twice
            await stop
            with pytest.raises(aiohttp.ClientError):
                await call
    assert _lines_of_a_stop(logged) == [
        {"event": "stopping", "shutdown_delay_s": 0, "calls_in_flight": 1},
        {"event": "accepting no more calls", "grace_s": 30, "calls_in_flight": 1},
        {"event": "ending at once", "calls_in_flight": 1},
        {"event": "calls were cut off and settled", "calls": 1},
        {"event": "stopped", "calls_ended": 0, "calls_cut_off": 1, "charges_pending": 0},
    ]


async def test_a_stop_waits_for_a_body_that_is_still_arriving(tmp_path: Path) -> None:
    """It is no call yet, and its client has sent a part of it already."""
    request = post("/v1/chat/completions", KEY)
    with capture_logs() as logged:
        async with stage(folder=tmp_path) as on, bare_client(on.url) as idle, bare_client(on.url) as client:
            idle.send(get("/healthz"))
            assert (await idle.reply()).status == 200
            client.send(request[:-10])
            await until(lambda: bool(on.server._api._running))
            stop = asyncio.get_running_loop().create_task(on.server.stop(grace_s=60))
            assert await idle.is_closed()
            assert on.server.calls_in_flight == 0
            client.send(request[-10:])
            assert (await client.reply()).status == 200
            assert await client.is_closed()
            await stop
    assert _lines_of_a_stop(logged)[-1]["calls_ended"] == 1


async def test_a_process_that_has_left_its_connections_to_others_does_not_wait(tmp_path: Path) -> None:
    """A retired worker, and one whose parent has died: others serve, or nobody can."""
    async with stage(folder=tmp_path) as on:
        await on.server.retire()
        await on.server.stop(delay_s=600)


async def test_charges_that_cannot_be_committed_are_counted_at_the_end(tmp_path: Path) -> None:
    """The database is away. The next start charges these calls their holds."""
    with capture_logs() as logged:
        async with stage(folder=tmp_path) as on:
            call = on.begin(CHAT, _ask("tokens=50 stall=5", stream=True))
            await on.simulator.until(lambda: on.simulator.chunks_sent >= 5)
            (tmp_path / "quotas.db").rename(tmp_path / "moved.db")
            await on.server.stop(grace_s=0)
            with pytest.raises(aiohttp.ClientError):
                await call
            (tmp_path / "moved.db").rename(tmp_path / "quotas.db")
    [end] = [line for line in logged if line["event"] == "stopped"][:1]
    assert (end["calls_cut_off"], end["charges_pending"]) == (1, 1)


async def test_a_restart_changes_no_number(tmp_path: Path) -> None:
    """Counters and windows are the same, after two restarts as well."""
    async with stage(folder=tmp_path) as on:
        await on.post(CHAT, _ask("tokens=9"))
        before = (await on.get("/v1/quota")).json()
    for _ in range(2):
        async with stage(folder=tmp_path) as on:
            assert (await on.get("/v1/quota")).json() == before


@pytest.mark.every_engine
async def test_usage_is_rolled_up_and_old_calls_are_deleted(tmp_path: Path, monkeypatch: Any) -> None:
    """In the background. After `keep.calls` the call is deleted, and the sums of its day stay."""
    monkeypatch.setattr("proxy.server._ROLLUP_EVERY_S", 0.01)
    async with stage(folder=tmp_path) as on:
        await on.post(CHAT, _ask("tokens=9"))
        await on.all_settled()
        while not (days := await on.rows("usage_by_day")):
            await on.get("/healthz", user=None)
        [call] = await on.rows("calls")
        assert [(day["calls"], day["output_tokens"]) for day in days] == [(1, call["output_tokens"])]
        on.clock.ms += 91 * 86_400_000
        while await on.rows("calls"):
            await on.get("/healthz", user=None)
        assert await on.rows("usage_by_day") == days


async def test_a_second_process_on_the_same_file_is_refused(tmp_path: Path) -> None:
    """Two processes that don't know of each other would both admit calls up to the limit."""
    async with stage(folder=tmp_path) as on:
        config = config_of(STAFF, folder=tmp_path, upstream="http://127.0.0.1:1/v1")
        second = Server(config, load=lambda: config, now=on.clock, tokenizers=loaded())
        with pytest.raises(StoreInUse, match="Another process"):
            await second.start()
        await second.stop()
        assert (await on.post(CHAT, _ask("tokens=1"))).status == 200


async def test_a_stopping_process_is_live_but_not_ready(tmp_path: Path) -> None:
    """So a load balancer stops sending calls, and nobody kills the process before its calls have ended."""
    async with stage(folder=tmp_path) as on:
        assert (await on.get("/readyz", user=None)).json()["status"] == "ready"
        assert (await on.get("/healthz", user=None)).status == 200
        on.server.health.is_stopping = True
        assert (await on.get("/readyz", user=None)).status == 503
        assert (await on.get("/healthz", user=None)).status == 200


CONFIG = """
server: {{api: "127.0.0.1:0", admin: null, shutdown_delay: 0s}}
database: "sqlite:///{folder}/quotas.db"
upstreams: {{up: {{base_url: "http://127.0.0.1:1/v1", api_key: "{key}"}}}}
groups: {{staff: {{quotas: {{daily: {{tokens: {tokens}, per: day}}}}}}}}
users: {{alice: {{groups: [staff], keys: ["{alice}"]}}}}
"""


def _write(file: Path, tokens: str) -> None:
    text = CONFIG.format(folder=file.parent, key=UPSTREAM_KEY, alice=key_of("alice"), tokens=tokens)
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").replace(file)


async def test_a_process_serves_reloads_and_stops_on_signals(tmp_path: Path) -> None:
    """SIGHUP reloads the file, an invalid file changes nothing, and SIGTERM ends the process with exit code 0."""
    file = tmp_path / "quotas.yaml"
    _write(file, "1000")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--config", str(file)),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr
    try:
        line: dict[str, Any] = {}
        while line.get("event") != "serving":
            line = json.loads(await process.stderr.readline())
        url = line["api"]

        async def limit() -> int:
            headers = {"authorization": f"Bearer {key_of('alice')}"}
            async with aiohttp.ClientSession() as http, http.get(f"{url}/v1/quota", headers=headers) as response:
                tokens: int = (await response.json())["data"][0]["tokens"]["limit"]
                return tokens

        async def logged(words: str) -> None:
            assert process.stderr
            while words not in (await process.stderr.readline()).decode():
                pass

        assert await limit() == 1000
        _write(file, "2000")
        process.send_signal(signal.SIGHUP)
        await logged("policy reloaded")
        assert await limit() == 2000
        _write(file, "many")  # noticed without a signal
        await logged("can't be taken")
        assert await limit() == 2000
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_sigterm_stops_in_order_and_sigint_at_once(tmp_path: Path) -> None:
    """After SIGTERM new calls are taken, and a second one changes nothing. SIGINT cuts off and settles what runs."""
    file = tmp_path / "quotas.yaml"
    runner, port = await serve_simulator(Simulator(UPSTREAM_KEY))
    text = CONFIG.replace("http://127.0.0.1:1/v1", f"http://127.0.0.1:{port}/v1").replace("delay: 0s", "delay: 10m")
    file.write_text(text.format(folder=tmp_path, key=UPSTREAM_KEY, alice=key_of("alice"), tokens="1M"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--config", str(file)), stderr=asyncio.subprocess.PIPE
    )

    async def logged(event: str) -> dict[str, Any]:
        assert process.stderr
        while line := await process.stderr.readline():
            found: dict[str, Any] = json.loads(line)
            if found["event"] == event:
                return found
        raise AssertionError(f"it never logged: {event}")

    try:
        url = (await logged("serving"))["api"]
        process.send_signal(signal.SIGTERM)
        assert (await logged("stopping"))["shutdown_delay_s"] == 600
        process.send_signal(signal.SIGTERM)
        async with aiohttp.ClientSession(headers={"authorization": f"Bearer {key_of('alice')}"}) as http:
            async with http.get(f"{url}/readyz") as response:
                assert response.status == 503
            async with http.post(f"{url}{CHAT}", json=_ask("tokens=3", model="any", max_tokens=50)) as response:
                assert response.status == 200
            hanging = _ask("tokens=20 stall=5", model="any", max_tokens=50, stream=True)
            async with http.post(f"{url}{CHAT}", json=hanging) as response:
                await response.content.readuntil(b"\n\n")
                process.send_signal(signal.SIGINT)
                with pytest.raises(aiohttp.ClientError):
                    await response.read()
        end = await logged("stopped")
        assert (end["calls_ended"], end["calls_cut_off"], end["charges_pending"]) == (1, 1, 0)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await runner.cleanup()
    audit(tmp_path / "quotas.db")
    assert sorted(row["outcome"] for row in rows(tmp_path / "quotas.db", "calls")) == ["complete", "stopped"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_start_is_stopped_by_a_signal(tmp_path: Path, number: signal.Signals, workers: int) -> None:
    """The process waits for another one that migrates. It ends without serving, and its session is closed."""
    url = await shared().fresh()
    file = tmp_path / "quotas.yaml"
    text = CONFIG.format(folder=tmp_path, key=UPSTREAM_KEY, alice=key_of("alice"), tokens="1000")
    file.write_text(text.replace(f"sqlite:///{tmp_path}/quotas.db", url))
    other = await asyncpg.connect(url)
    await other.execute(f"SELECT pg_advisory_lock({_MIGRATION_LOCK})")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--config", str(file), "--workers", str(workers)),
        stderr=asyncio.subprocess.PIPE,
    )
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    try:
        while not await other.fetchval(f"{sessions} AND wait_event = 'advisory'"):
            assert process.returncode is None
        process.send_signal(number)
        # The lock would be waited for twice as long.
        _, printed = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0
        assert "serving" not in {json.loads(line)["event"] for line in printed.splitlines()}
        while await other.fetchval(sessions):
            pass
        assert not await other.fetchval("SELECT to_regnamespace('llm_quota_proxy')")
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
        await other.close()


async def test_a_start_that_is_stopped_while_it_migrates_frees_the_file(tmp_path: Path) -> None:
    """The migration in the thread is ended first, so the next start finds a whole database."""
    config = config_of(STAFF, folder=tmp_path, upstream="http://127.0.0.1:1/v1")
    held = sqlite3.connect(tmp_path / "quotas.db", isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    server = Server(config, load=lambda: config, now=Clock(), tokenizers=loaded())
    start = asyncio.get_running_loop().create_task(server.start())
    await until(lambda: (tmp_path / "quotas.db.lock").exists())
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    held.close()
    await server.stop()
    assert server.api is None
    async with stage(folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask("tokens=1"))).status == 200


async def test_a_stop_ends_in_time_while_the_database_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is frozen, and by its own timeouts each statement would wait for minutes.

    A call is cut off and a crossing is not written yet. The charge stays pending.
    """
    minutes = Timeouts(connect_ms=300_000, statement_ms=300_000, batch_ms=300_000, whole_ms=300_000)
    monkeypatch.setattr("proxy.server.store_of", lambda url, *_, **__: PostgresStore(url, timeouts=minutes))
    monkeypatch.setattr("proxy.web.live._NOTICES_EVERY_S", 600)
    server = Postgres.started()
    try:
        with capture_logs() as logged:
            async with stage(folder=tmp_path, database=await server.migrated()) as on:
                call = on.begin(CHAT, _ask("tokens=50 stall=5", stream=True))
                await on.simulator.until(lambda: on.simulator.chunks_sent >= 5)
                crossing = Crossing(
                    "alice", "staff/daily", opened_at=NOON, resets_at=NOON + 1, level=80, crossed_at=NOON
                )
                on.server.live.notices.add(crossed=[crossing])
                with server.frozen():
                    await asyncio.wait_for(on.server.stop(grace_s=0), 30)
                with pytest.raises(aiohttp.ClientError):
                    await call
    finally:
        server.remove()
    events = [line["event"] for line in logged]
    assert any("were not written" in event for event in events)
    [end] = [line for line in logged if line["event"] == "stopped"][:1]
    assert (end["calls_cut_off"], end["charges_pending"]) == (1, 1)


async def test_a_low_limit_of_open_files_shuts_nobody_out(tmp_path: Path) -> None:
    """T97: more idle connections than the process may have files. A new client is served, and a warning says why."""
    file = tmp_path / "quotas.yaml"
    _write(file, "1000")
    command = 'ulimit -n 256 && exec "$0" -m proxy serve --config "$1"'
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", command, sys.executable, str(file)),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr
    try:
        url, warning = None, None
        while url is None or warning is None:
            line = json.loads(await process.stderr.readline())
            if "open_files" in line:
                warning = line
            elif line["event"] == "serving":
                url = line["api"]
        assert (warning["open_files"], warning["connections"]) == (256, 96)
        async with AsyncExitStack() as held:
            for _ in range(300):
                await held.enter_async_context(bare_client(url))
            async with bare_client(url) as client:
                client.send(get("/healthz"))
                assert (await client.reply()).status == 200
    finally:
        process.terminate()
        assert await process.wait() == 0


async def test_a_job_that_fails_is_repeated() -> None:
    """Otherwise one error would end the renewal of the lease, or the check of the file, for as long as it runs."""
    runs: list[int] = []
    enough = asyncio.Event()

    async def job() -> None:
        runs.append(1)
        if len(runs) == 3:
            enough.set()
        raise RuntimeError

    with capture_logs() as logged:
        running = asyncio.get_running_loop().create_task(repeat(job, every_s=0))
        await enough.wait()
        running.cancel()
    assert [entry["event"] for entry in logged[:2]] == ["a chore failed"] * 2


async def test_a_call_that_a_crash_interrupts_is_charged_its_reservation(tmp_path: Path) -> None:
    """By the next start, and not again by the one after that."""
    clock = Clock()
    async with stage(folder=tmp_path, clock=clock) as on:
        call = on.begin(CHAT, _ask("hang", max_tokens=100))
        await on.simulator.until(lambda: on.simulator.received == 1)
        _, held = await on.used()
        assert held > 100
        for name in ("quotas.db", "quotas.db-wal"):  # the files as a crash would leave them
            (tmp_path / f"crashed-{name}").write_bytes((tmp_path / name).read_bytes())
        await on.hang_up(call)
        await on.server.stop(grace_s=0.01)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for name in ("quotas.db", "quotas.db-wal"):
        (tmp_path / f"crashed-{name}").rename(crashed / name)
    for _ in range(2):
        async with stage(folder=crashed, clock=clock) as on:
            assert await on.used() == (held, 0)
            assert (await on.quota("staff/daily"))["requests"]["used"] == 1


async def test_a_listener_that_cannot_listen_says_which_and_what_to_do(tmp_path: Path) -> None:
    """An address of another machine, a name that nothing has, and a port that the process has no right to."""
    for host, text in (
        (
            "192.0.2.1",
            "cannot assign requested address; write an address of this machine, or 0.0.0.0 for all of them",
        ),
        ("no-such-host.invalid", "the host can't be resolved; write an address of this machine"),
    ):
        config = config_of(STAFF, folder=tmp_path, upstream="http://127.0.0.1:1/v1")
        config = replace(config, settings=replace(config.settings, api=Address(host, 1)))
        server = Server(config, load=partial(replace, config), now=Clock(), tokenizers=loaded())
        with pytest.raises(OSError, match=re.escape(f"server.api can't listen on {host}:1: {text}")):
            await server.start()
        await server.stop(grace_s=0)
    denied = cannot_listen("server.admin", Address("::1", 80), PermissionError(errno.EACCES, "no"))
    assert str(denied) == (
        "server.admin can't listen on [::1]:80: permission denied; write a port from 1024 on there or as "
        "--admin-port, or let the process use this one"
    )


# ------------------------------------------------------------------------------------------------ inherited resources


def test_a_worker_understands_a_parent_of_another_release() -> None:
    """A restart starts the code that is on the disk: fields that it does not know are ignored."""
    assert InheritedResources.from_line(
        b'{"owner": "me", "database": "d", "api": [3], "later": 1}'
    ) == InheritedResources("me", "d", api=(3,))


def test_every_descriptor_is_inherited() -> None:
    """Those of the sockets and, if there is one, that of the lock."""
    whole = InheritedResources(
        "me", "sqlite:///q.db", api=(3, 4), admin=(5,), lock=6, metrics="/tmp/x", dead=("you",)
    )
    assert whole.descriptors == (3, 4, 5, 6)
    assert InheritedResources("me", "d", api=(3,)).descriptors == (3,)
