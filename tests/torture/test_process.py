"""The proxy as a process: it is started, killed and restarted, paused, and stopped."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from proxy.config.loader import load
from proxy.torture.plan import Plan
from proxy.torture.process import NotStarted, ProxyProcess, UpstreamSettings

KEYS = ("sk-torture-0123456789abcdef-0", "sk-torture-0123456789abcdef-1")


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[ProxyProcess]:
    """A proxy that is not started yet; nothing listens at its upstream's address."""
    plan = Plan(clients=2, users=2, limit=777, per="5s", shared=True, seconds=20)
    proxy = ProxyProcess(tmp_path, plan, upstream=UpstreamSettings("http://127.0.0.1:9/v1", "sk-upstream"), keys=KEYS)
    yield proxy
    await proxy.kill()


def pid_of(proxy: ProxyProcess) -> int:
    """The id of its process."""
    assert proxy._process
    return proxy._process.pid


async def test_it_is_killed_and_restarted_with_the_same_database_and_port(
    proxy: ProxyProcess, tmp_path: Path
) -> None:
    """As another process with another `on_disconnect`; then it stops cleanly."""
    await proxy.start()
    first = pid_of(proxy)
    assert proxy.epoch == 0
    assert "on_disconnect: drain" in (tmp_path / "quotas.yaml").read_text()
    await proxy.kill_and_restart()
    assert pid_of(proxy) != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert "on_disconnect: stop" in (tmp_path / "quotas.yaml").read_text()
    assert (proxy.epoch, proxy.kills, proxy.crashes) == (2, 1, 0)
    headers = {"authorization": f"Bearer {KEYS[1]}"}
    url = f"http://127.0.0.1:{proxy.port}/v1/quota"
    async with aiohttp.ClientSession(headers=headers) as http, http.get(url) as response:
        (quota,) = (await response.json())["data"]
    assert (quota["tokens"]["limit"], quota["window"]["per"], quota["shared"]) == (777, "5s", True)
    await proxy.stop()
    assert proxy.crashes == 0
    assert proxy.database == f"sqlite:///{tmp_path / 'quotas.db'}"
    assert (tmp_path / "quotas.db").exists()
    assert load(str(tmp_path / "quotas.yaml"), {}).policy.wait_s == 10


async def test_a_paused_proxy_accepts_connections_and_answers_later(proxy: ProxyProcess) -> None:
    """To a client it looks slow; its epoch says that it was paused."""
    await proxy.start()
    pausing = asyncio.ensure_future(proxy.pause(0.2))
    await asyncio.sleep(0)
    assert proxy.epoch == 1
    async with aiohttp.ClientSession() as http:
        asked = asyncio.ensure_future(http.get(f"http://127.0.0.1:{proxy.port}/healthz"))
        await asyncio.wait([pausing, asked], return_when=asyncio.FIRST_COMPLETED)
        assert pausing.done()
        assert (await asked).status == 200
    assert (proxy.epoch, proxy.pauses, proxy.kills) == (2, 1, 0)
    await proxy.stop()
    assert proxy.crashes == 0


async def test_a_proxy_that_exited_by_itself_has_crashed(proxy: ProxyProcess) -> None:
    """It is noticed at the next kill or at the stop."""
    await proxy.start()
    os.kill(pid_of(proxy), signal.SIGKILL)
    assert proxy._process
    await proxy._process.wait()
    await proxy.kill_and_restart()
    assert proxy.crashes == 1
    os.kill(pid_of(proxy), signal.SIGKILL)
    await proxy._process.wait()
    await proxy.stop()
    assert proxy.crashes == 2


async def test_the_error_of_a_proxy_that_does_not_start(proxy: ProxyProcess) -> None:
    """It is the end of the proxy's log."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", proxy.port))
        taken.listen()
        with pytest.raises(NotStarted, match="address already in use"):
            await proxy.start()
