"""What users see of themselves: their quotas, a warning near a limit, and what they have used."""

from pathlib import Path

import pytest

from tests.stage import STAFF, stage

CHAT = "/v1/chat/completions"
GOOD = {"model": "fast", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
SMALL = STAFF.replace("tokens: 1M, requests: 100k", "requests: 5")


async def test_quota_says_who_one_is_and_what_one_may_use(tmp_path: Path) -> None:
    policy = STAFF.replace("staff: {", "admins: {unlimited: true}\n  staff: {").replace(
        "bob: {groups: [staff]", "bob: {groups: [admins, staff]"
    )
    async with stage(policy, folder=tmp_path) as on:
        alice = (await on.get("/v1/quota")).json()
        bob = (await on.get("/v1/quota", user="bob")).json()
    assert (alice["user"], alice["groups"], alice["unlimited"]) == ("alice", ["staff"], False)
    assert alice["models"] == ["gpt-4o-mini", "fast"]
    assert (bob["user"], bob["groups"], bob["unlimited"]) == ("bob", ["admins", "staff"], True)


async def test_from_80_percent_on_an_answer_warns(tmp_path: Path) -> None:
    """The header is a list of RFC 9651: the quota with its unit, percent used, what remains, seconds to the reset."""
    async with stage(SMALL, folder=tmp_path) as on:
        replies = [await on.post(CHAT, GOOD) for _ in range(6)]
        shown = await on.quota("staff/daily")
    warnings = [reply.headers.get("x-quota-warning") for reply in replies]
    assert warnings[:3] == [None, None, None]
    assert warnings[3] == '"staff/daily";u="requests";p=80;r=1;t=43200'
    assert warnings[4] == '"staff/daily";u="requests";p=100;r=0;t=43200'
    assert (replies[5].status, warnings[5]) == (429, warnings[4])
    assert shown["near"] is True


@pytest.mark.every_engine
async def test_usage_by_day_and_by_model_is_ones_own(tmp_path: Path) -> None:
    async with stage(folder=tmp_path) as on:
        for user in ("alice", "alice", "bob"):
            await on.post(CHAT, GOOD, user=user)
        by_day = (await on.get("/v1/quota/usage")).json()
        by_model = (await on.get("/v1/quota/usage?by=model&since=2026-11-01")).json()
        none = (await on.get("/v1/quota/usage?since=2026-11-25")).json()
    [day] = by_day["data"]
    assert (day["day"], day["calls"], day["requests"]) == ("2026-11-24", 2, 2)
    assert (by_day["by"], by_day["since"]) == ("day", "2026-10-25")
    [model] = by_model["data"]
    assert (model["model"], model["output_tokens"]) == ("fast", day["output_tokens"])
    assert none["data"] == []


@pytest.mark.parametrize(
    "query", ["since=7h", "since=0d", "since=99999d", "since=2026-13-01", "by=user", "since=9999-99"]
)
async def test_a_bad_parameter_is_a_400_that_names_it(tmp_path: Path, query: str) -> None:
    async with stage(folder=tmp_path) as on:
        reply = await on.get(f"/v1/quota/usage?{query}")
    assert (reply.status, reply.error["param"]) == (400, query.partition("=")[0])


async def test_it_can_be_turned_off(tmp_path: Path) -> None:
    async with stage(f"self_service: false\n{SMALL}", folder=tmp_path) as on:
        replies = [await on.post(CHAT, GOOD) for _ in range(5)]
        gone = [await on.get(path) for path in ("/v1/quota", "/quota/usage")]
    assert [reply.headers.get("x-quota-warning") for reply in replies] == [None] * 5
    assert [reply.status for reply in gone] == [404, 404]
