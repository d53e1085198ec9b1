"""What administrators change through one process is soon in force in the others, beside the file.

Two servers on one PostgreSQL database, on real sockets and with real time. It takes 2 s at the most; these tests wait
longer, because other tests use the processor too.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.server import wall_clock_ms
from tests.admin import ADMINS, ask, change, make_quota, problem
from tests.events import watch
from tests.postgres import shared
from tests.stage import STAFF, Clock, Stage, config_of, stage

pytestmark = pytest.mark.journey

CHAT = "/v1/chat/completions"
POLICY = STAFF + ADMINS
PATIENCE_S = 20.0


class RunningClock(Clock):
    """The real time: processes look at each other every second of it."""

    def __call__(self) -> int:
        return wall_clock_ms()


def chat(model: str = "fast", simulate: str = "tokens=3") -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 50,
        "metadata": {"simulate": simulate},
    }


@asynccontextmanager
async def replicas(tmp_path: Path) -> AsyncIterator[tuple[Stage, Stage]]:
    """Two servers with the same file, each with an upstream of its own, on a new migrated database."""
    url = await shared().migrated()
    async with (
        stage(POLICY, folder=tmp_path, clock=RunningClock(), database=url) as one,
        stage(POLICY, folder=tmp_path, clock=RunningClock(), database=url) as two,
    ):
        yield one, two


async def becomes_so(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Wait until this is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not await is_so():  # noqa: ASYNC110 - what it asks is another process
            await asyncio.sleep(0.02)


async def status(on: Stage, key: str | None = None, user: str = "alice", model: str = "fast") -> int:
    """The status of a small call."""
    headers = {"authorization": f"Bearer {key}"} if key else None
    return (await on.post(CHAT, chat(model), user=None if key else user, headers=headers)).status


async def test_a_group_a_member_and_a_key_that_are_made_here_are_in_force_there(tmp_path: Path) -> None:
    """And so is their end: of the key, the membership and the group."""
    async with replicas(tmp_path) as (one, two):
        assert (await ask(one, "POST", "/groups", json={"name": "art"})).status == 201
        await make_quota(one, "art/hourly", requests=3, per="1h")
        assert (await ask(one, "POST", "/users", json={"id": "dora", "groups": ["art"]})).status == 201
        key = (await ask(one, "POST", "/users/dora/keys", json={})).json()["key"]
        await becomes_so(lambda: _is(two, key, 200))
        assert await status(one, key) == 200
        assert await status(two, key) == 200
        assert await status(two, key) == 429
        assert await status(one, key) == 429
        versions = {(await ask(on, "GET", "/policy")).json()["made_version"] for on in (one, two)}
        assert len(versions) == 1
        await change(two, "DELETE", "/groups/art")
        await becomes_so(lambda: _is(one, key, 404))


async def _is(on: Stage, key: str, wanted: int) -> bool:
    return await status(on, key) == wanted


async def test_a_lowered_quota_a_grant_and_a_reset_reach_the_other_process(tmp_path: Path) -> None:
    """The change is made through one, and the calls go through the other."""
    async with replicas(tmp_path) as (one, two):
        await make_quota(one, "staff/hourly", requests=2, per="24h")
        path = "/groups/staff/quotas/hourly"
        await becomes_so(lambda: _has_limit(two, 2))
        for _ in range(2):
            assert await status(two) == 200
        assert await status(two) == 429
        grant = {"quota": "staff/hourly", "measure": "requests", "amount": 2, "reason": "exam"}
        until = wall_clock_ms() + 3_600_000
        assert (await ask(one, "POST", "/grants", json={**grant, "until": until})).status == 201
        await becomes_so(lambda: _has_limit(two, 4))
        for _ in range(2):
            assert await status(two) == 200
        assert await status(two) == 429
        await change(one, "PUT", path, {"requests": 1, "per": "24h"})
        await becomes_so(lambda: _has_limit(two, 3))
        await ask(one, "POST", "/counters/reset", json={"user": "alice", "quota": "staff/hourly"})
        for _ in range(3):  # a reset is in force at once: the counter is in the database
            assert await status(two) == 200
        assert await status(two) == 429


async def _has_limit(on: Stage, limit: int) -> bool:
    listed = (await on.get("/v1/quota")).json()["data"]
    found = [item["requests"]["limit"] for item in listed if item["id"] == "staff/hourly"]
    return found == [limit]


async def test_of_two_administrators_at_two_processes_the_second_is_told(tmp_path: Path) -> None:
    """However many save at the same moment, the version of one of them is in force."""
    async with replicas(tmp_path) as (one, two):
        made = await make_quota(one, "staff/hourly", requests=5, per="1h")
        seen = {"if-match": made.headers["etag"]}
        path = "/groups/staff/quotas/hourly"
        replies = await asyncio.gather(
            *(
                ask(on, "PUT", path, admin="ops", headers=seen, json={"requests": number, "per": "1h"})
                for number, on in enumerate((one, two) * 3, 6)
            )
        )
        assert sorted(reply.status for reply in replies) == [200, *[412] * 5]
        [won] = [reply for reply in replies if reply.status == 200]
        limit = won.json()["quota"]["fields"]["requests"]
        assert [(await ask(on, "GET", path)).json()["fields"]["requests"] for on in (one, two)] == [limit] * 2
        await becomes_so(lambda: _has_limit(two, limit))
        await becomes_so(lambda: _has_limit(one, limit))


async def test_a_call_is_ended_through_another_process(tmp_path: Path) -> None:
    """And its end, the refusal of another one and the change are in the streams of both."""
    async with replicas(tmp_path) as (one, two):
        reader = await watch(one, "eve")
        await reader.next()
        await becomes_so(lambda: _knows_of_a_reader(two))
        in_flight = two.begin(CHAT, chat(simulate="hang"))
        begun = await reader.until("calls")
        assert begun["replica"] == two.server.ledger.owner
        [call] = (await ask(one, "GET", "/calls")).json()["data"]
        assert (call["replica"], call["user"]) == (two.server.ledger.owner, "alice")
        assert (await ask(one, "POST", f"/calls/{call['id']}/end")).status == 200
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([in_flight])
        assert in_flight.exception() is not None  # its connection was cut
        await two.all_settled()
        assert problem(await ask(two, "POST", f"/calls/{call['id']}/end")) == (404, "not-found")
        ended: list[Any] = []
        while not ended:
            ended = (await reader.until("calls"))["ended"]
        assert ended[0]["id"] == call["id"]


async def _knows_of_a_reader(on: Stage) -> bool:
    return on.server.live.activity.is_watched


# -------------------------------------------------------------------------------------------------- the file and this


async def load(on: Stage, policy: str, folder: Path) -> None:
    """Reload with another file."""
    upstream = on.config.catalog.upstreams["simulated"].base_url
    config = config_of(policy, folder=folder, upstream=upstream, database=on.database)
    on.config = replace(config, settings=on.config.settings)
    assert await on.server.policies.reload()


@pytest.mark.every_engine
async def test_the_file_wins_and_the_report_of_the_reload_says_so(tmp_path: Path) -> None:
    """If it has the id of something that was made here. When it is removed from the file, that is back."""
    quota = POLICY.replace("daily: {", "hourly: {requests: 3, per: 24h}, daily: {")
    group = POLICY.replace("users:\n", "  art: {quotas: {own: {requests: 7, per: 24h}}}\nusers:\n")
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/hourly", requests=1, per="24h")
        assert (await ask(on, "POST", "/groups", json={"name": "art"})).status == 201
        await make_quota(on, "art/hourly", requests=9, per="24h")
        assert await status(on) == 200
        assert await status(on) == 429

        await load(on, quota, tmp_path)
        reply = (await ask(on, "GET", "/policy")).json()["last_reload"]
        assert [each["id"] for each in reply["without_effect"]] == ["staff/hourly"]
        assert "which wins" in reply["without_effect"][0]["reason"]
        shown = (await ask(on, "GET", "/quotas?group=staff")).json()["data"]
        by_origin = {each["origin"]: each for each in shown if each["id"] == "staff/hourly"}
        assert (by_origin["file"]["fields"]["requests"], by_origin["file"]["without_effect"]) == (3, None)
        assert "which wins" in by_origin["database"]["without_effect"]
        assert [await status(on) for _ in range(3)] == [200, 200, 429]  # the usage is that of the id

        await load(on, group, tmp_path)
        report = {
            each["id"]: each["reason"]
            for each in (await ask(on, "GET", "/policy")).json()["last_reload"]["without_effect"]
        }
        assert report.keys() == {"art"}
        groups = {
            each["origin"]: each for each in (await ask(on, "GET", "/groups")).json()["data"] if each["name"] == "art"
        }
        assert groups["file"]["quotas"] == ["art/own", "art/hourly"]
        assert "which wins" in groups["database"]["without_effect"]
        assert await status(on) == 429  # the limit of the one that was made here, which is back

        await load(on, POLICY, tmp_path)
        assert (await ask(on, "GET", "/policy")).json()["last_reload"]["without_effect"] == []
        names = [each["name"] for each in (await ask(on, "GET", "/groups")).json()["data"]]
        assert names == ["staff", "art"]
