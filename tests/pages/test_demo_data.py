"""The company of the screenshots has something to show in each view."""

from pathlib import Path
from typing import Any

from tests.admin import ask
from tests.pages.demo_data import HIRED, demo
from tests.stage import Stage


async def _get(on: Stage, path: str) -> Any:
    reply = await ask(on, "GET", path)
    assert reply.status == 200, reply.body
    return reply.json()


async def test_each_view_has_something_to_show(tmp_path: Path) -> None:
    """Refusals, users near a limit, pots that run out, calls in flight, a cooldown, quotas, usage, changes."""
    async with demo(tmp_path) as on:
        attention = await _get(on, "/attention")
        while len(attention["refused"]) < 3:  # refusals are written in a moment
            attention = await _get(on, "/attention")
        assert {each["user"] for each in attention["refused"]} == {"farid", "liam", "zoe"}
        assert len(attention["near"]) >= 5
        assert "marketing/campaign" in {each["quota"] for each in attention["pots"]}
        assert len((await _get(on, "/calls"))["data"]) >= 8
        assert {each["origin"] for each in (await _get(on, "/quotas"))["data"]} == {"file", "database"}
        assert len((await _get(on, "/keys?user=database:build-server"))["data"]) == 2
        users = (await _get(on, "/users"))["data"]
        assert {f"database:{user}" for user in HIRED} <= {each["user"] for each in users}
        assert len((await _get(on, "/usage?by=day"))["data"]) >= 25
        assert len((await _get(on, "/usage?by=hour"))["data"]) >= 20
        assert len((await _get(on, "/audit"))["data"]) >= 20
        while not any(await _cooldowns(on)):  # after the fifth failed call
            pass


async def _cooldowns(on: Stage) -> list[int]:
    upstreams = (await _get(on, "/upstreams"))["data"]
    return [state["cooldown_until_at"] or 0 for upstream in upstreams for state in upstream["states"]]
