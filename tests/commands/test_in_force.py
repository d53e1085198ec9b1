"""What commands change is in force in a proxy that runs on the same database within two seconds."""

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from proxy.cli import main
from proxy.server import wall_clock_ms
from tests.stage import Clock, Stage, stage, text_of

POLICY = """
models: {fast: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}}
groups: {staff: {quotas: {daily: {requests: 2, per: day}}}}
users: {alice: {groups: [staff], keys: [key-of-alice-0123456789abcdef]}}
"""
# It takes 2 s at the most, but other tests use the processor too.
PATIENCE_S = 20.0
HELLO: Any = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}]}


async def command(on: Stage, folder: Path, *arguments: str) -> Any:
    """Run a command on the database of a stage, with an event loop of its own. Returns what it prints as JSON."""
    file = folder / "commands.yaml"
    file.write_text(text_of(POLICY, database=on.database, upstream="http://127.0.0.1:1/v1"))
    called = partial(CliRunner().invoke, main, [*arguments, "--json", "--config", str(file)])
    result = await asyncio.to_thread(called)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


async def status(on: Stage) -> int:
    return (await on.post("/v1/chat/completions", HELLO)).status


async def is_in_force(on: Stage, wanted: int) -> None:
    """Call until the status is this one."""
    async with asyncio.timeout(PATIENCE_S):
        while await status(on) != wanted:
            pass


@pytest.mark.every_engine
async def test_what_commands_change_is_in_force_in_a_running_proxy(tmp_path: Path) -> None:
    """A reset, a grant and its end, a quota and its deletion; each has its row in the audit log of the API."""
    async with stage(POLICY, folder=tmp_path, clock=Clock(wall_clock_ms())) as on:
        assert [await status(on) for _ in range(3)] == [200, 200, 429]
        done = await command(on, tmp_path, "reset", "alice")
        assert done["quotas"] == [{"quota": "staff/daily", "counters": 1, "used": done["quotas"][0]["used"]}]
        assert done["quotas"][0]["used"]["requests"] == 2
        await is_in_force(on, 200)
        assert [await status(on) for _ in range(2)] == [200, 429]
        more = ("--quota", "staff/daily", "--requests", "100000", "--until", "24h", "--reason", "a deadline")
        [given] = await command(on, tmp_path, "grant", "alice", *more)
        await is_in_force(on, 200)
        await command(on, tmp_path, "grants", "end", given["id"])
        await is_in_force(on, 429)
        await command(on, tmp_path, "reset", "--group", "staff")
        await command(on, tmp_path, "quotas", "set", "staff/hourly", "--requests", "1", "--per", "1h")
        await asyncio.wait_for(_has(on, "staff/hourly"), PATIENCE_S)
        assert [await status(on) for _ in range(2)] == [200, 429]
        await command(on, tmp_path, "quotas", "delete", "staff/hourly")
        await is_in_force(on, 200)
        actions = [row["action"] for row in await command(on, tmp_path, "audit")]
        assert actions == [
            *("quota.delete", "quota.set", "counters.reset", "grant.end", "grant.create", "counters.reset")
        ]


async def _has(on: Stage, quota: str) -> None:
    while quota not in [each["id"] for each in (await on.get("/v1/quota")).json()["data"]]:
        pass
