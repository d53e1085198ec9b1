"""Starting and stopping in order, and what a restart finds."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from proxy.ledger.store import StoreInUse
from proxy.server import Server, every, look_at
from tests.stage import STAFF, UPSTREAM_KEY, Clock, config_of, key_of, loaded, stage

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def _ask(simulate: str, **more: Any) -> dict[str, Any]:
    return {"model": "fast", "messages": HELLO, "metadata": {"simulate": simulate}, **more}


async def test_stopping_lets_calls_end(tmp_path: Path) -> None:
    """A stream that runs when the stop comes is finished, and charged, and its client sees the end."""
    async with stage(folder=tmp_path) as on:
        call = on.begin(CHAT, _ask("tokens=20 speed=400", stream=True))
        await on.simulator.until(lambda: on.simulator.chunks_sent > 2)
        await on.server.stop(grace_s=20)
        assert (await call).body.endswith(b"data: [DONE]\n\n")


async def test_what_does_not_end_in_time_is_cut_off_and_settled(tmp_path: Path) -> None:
    """Past the grace a call is ended; what passed is on the books of the next start."""
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
    """Counters and windows are where they were."""
    async with stage(folder=tmp_path) as on:
        await on.post(CHAT, _ask("tokens=9"))
        before = (await on.get("/v1/quota")).json()
    for _ in range(2):
        async with stage(folder=tmp_path) as on:
            assert (await on.get("/v1/quota")).json() == before


@pytest.mark.every_engine
async def test_what_was_used_is_added_up_and_kept_as_the_policy_says(tmp_path: Path, monkeypatch: Any) -> None:
    """In the background, by itself: the call goes when its time is over, and its day stays."""
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
    """Two that don't know of each other would both say yes."""
    async with stage(folder=tmp_path) as on:
        config = config_of(STAFF, folder=tmp_path, upstream="http://127.0.0.1:1/v1")
        second = Server(config, load=lambda: config, now=on.clock, tokenizers=loaded())
        with pytest.raises(StoreInUse, match="Another process"):
            await second.start()
        await second.stop()
        assert (await on.post(CHAT, _ask("tokens=1"))).status == 200


async def test_readiness_goes_before_the_end(tmp_path: Path) -> None:
    """A load balancer is told before connections are refused; liveness says only that the process answers."""
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


async def test_a_process_serves_reloads_and_ends_on_signals(tmp_path: Path) -> None:
    """As an operator runs it: SIGHUP takes the new file, a bad one changes nothing, SIGTERM ends with 0."""
    file = tmp_path / "quotas.yaml"
    _write(file, "1000")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--config", str(file)),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr
    try:
        url = (await process.stderr.readline()).decode().split()[-1]

        async def limit() -> int:
            headers = {"authorization": f"Bearer {key_of('alice')}"}
            async with aiohttp.ClientSession() as http, http.get(f"{url}/v1/quota", headers=headers) as response:
                tokens: int = (await response.json())["data"][0]["tokens"]["limit"]
                return tokens

        async def said(words: str) -> None:
            assert process.stderr
            while words not in (await process.stderr.readline()).decode():
                pass

        assert await limit() == 1000
        _write(file, "2000")
        process.send_signal(signal.SIGHUP)
        await said("policy reloaded")
        assert await limit() == 2000
        _write(file, "many")  # and without a signal: it is noticed
        await said("can't be taken")
        assert await limit() == 2000
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_chore_that_fails_is_done_again() -> None:
    """A lease that is renewed no more, or a file that is looked at no more, would be missed by nobody."""
    done: list[int] = []
    enough = asyncio.Event()

    async def chore() -> None:
        done.append(1)
        if len(done) == 3:
            enough.set()
        raise RuntimeError

    with capture_logs() as logged:
        running = asyncio.get_running_loop().create_task(every(0, chore))
        await enough.wait()
        running.cancel()
    assert [entry["event"] for entry in logged[:2]] == ["a chore failed"] * 2


def test_a_file_that_is_not_there_looks_like_none(tmp_path: Path) -> None:
    """A file that vanishes is a change too; and the same file looks the same twice."""
    file = tmp_path / "quotas.yaml"
    assert look_at(str(file)) is None
    file.write_text("a")
    assert look_at(str(file)) == look_at(str(file)) is not None


async def test_a_kill_in_the_middle_charges_what_was_held(tmp_path: Path) -> None:
    """The process is gone without a word: the next start finds its open calls and charges them, once."""
    clock = Clock()
    async with stage(folder=tmp_path, clock=clock) as on:
        call = on.begin(CHAT, _ask("hang", max_tokens=100))
        await on.simulator.until(lambda: on.simulator.received == 1)
        _, held = await on.used()
        assert held > 100
        for name in ("quotas.db", "quotas.db-wal"):  # what a crash leaves on the disk
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
