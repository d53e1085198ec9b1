"""Starting, stopping and restarting one process."""

import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from proxy.ledger.store import StoreInUse
from proxy.server import InheritedResources, Server, repeat
from tests.bare_client import bare_client, get
from tests.stage import STAFF, UPSTREAM_KEY, Clock, config_of, key_of, loaded, stage

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
server: {{api: "127.0.0.1:0", admin: null}}
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
