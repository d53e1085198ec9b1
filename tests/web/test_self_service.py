"""What users see of themselves: their quotas, also live, a warning near a limit, and what they have used."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.config.loader import ConnectionLimits
from proxy.web import events
from proxy.web.events import Bounds
from tests.admin import ADMINS, ask, problem
from tests.events import watch, watch_own
from tests.stage import STAFF, stage, until

CHAT = "/v1/chat/completions"
GOOD = {"model": "fast", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
SMALL = STAFF.replace("tokens: 1M, requests: 100k", "requests: 5")


async def test_quota_says_who_one_is_and_what_one_may_use(tmp_path: Path) -> None:
    policy = STAFF.replace("staff: {", "admins: {unlimited: true}\n  staff: {").replace(
        "bob: {groups: [staff]", "bob: {groups: [admins, staff]"
    )
    async with stage(f"{policy}timezone: Europe/Berlin\n", folder=tmp_path) as on:
        alice = (await on.get("/v1/quota")).json()
        bob = (await on.get("/v1/quota", user="bob")).json()
    assert (alice["user"], alice["groups"], alice["unlimited"]) == ("alice", ["staff"], False)
    assert (alice["models"], alice["timezone"]) == (["gpt-4o-mini", "fast"], "Europe/Berlin")
    assert (bob["user"], bob["groups"], bob["unlimited"]) == ("bob", ["admins", "staff"], True)


OPEN = """
groups:
  everyone: {quotas: {some: {models: ["o3", "gpt-4.?"], requests: 5, per: day}}}
  default: {unlimited: true}
  staff: {quotas: {daily: {tokens: 1M, per: day}}}
  lab: {models: ["gpt-*", "mine"], quotas: {daily: {tokens: 1M, per: day}}}
  admins: {unlimited: true}
  narrow: {quotas: {daily: {models: ["text-*", "o1"], tokens: 1M, per: day}}}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
  bob: {groups: [lab], keys: ["key-of-bob-0123456789abcdef"]}
  carol: {keys: ["key-of-carol-0123456789abcdef"]}
  dave:
    groups: [staff, admins]
    keys:
      - key-of-dave-0123456789abcdef
      - {key: key-of-build-0123456789abcdef, groups: [staff], models: ["gpt-4o*", o3]}
"""


@pytest.mark.parametrize(
    ("user", "more", "models", "unlimited"),
    [
        ("alice", "", ["o3", "*"], False),
        ("bob", "", ["mine", "gpt-*", "gpt-4.?"], False),
        ("carol", "", ["o3", "*"], True),  # in no group, so that default applies
        ("dave", "", ["o3", "*"], True),
        ("build", "", ["o3", "gpt-4o*"], False),  # a key of dave that is limited to one group and some models
        ("alice", "models: {mini: {}, '*': {}}\n", ["mini", "o3", "*"], False),
        ("bob", "models: {mini: {}, gpt-5: {}, '*': {}}\n", ["gpt-5", "mine", "gpt-*", "gpt-4.?"], False),
        ("alice", "models: {mini: {}, gpt-5: {}}\n", ["mini", "gpt-5"], False),
        ("bob", "models: {mini: {}, gpt-5: {}}\n", ["gpt-5"], False),
    ],
)
async def test_quota_says_which_models_one_may_use(
    tmp_path: Path, user: str, more: str, models: list[str], unlimited: bool
) -> None:
    """If the list of models is open, the patterns of further names follow; `*` stands for all of them."""
    async with stage(OPEN + more, folder=tmp_path) as on:
        shown = (await on.get("/v1/quota", user=user)).json()
    assert (shown["models"], shown["unlimited"]) == (models, unlimited)
    assert shown["user"] == ("dave" if user == "build" else user)


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
        gone = [await on.get(path) for path in ("/v1/quota", "/quota/usage", "/v1/quota/events")]
    assert [reply.headers.get("x-quota-warning") for reply in replies] == [None] * 5
    assert [reply.status for reply in gone] == [404, 404, 404]


# ------------------------------------------------------------------------------------------------------------- events


EVENTS = "/v1/quota/events"
POT = STAFF.replace("quotas: {daily", "quotas: {pot: {shared: true, tokens: 1M, per: day}, daily")


@pytest.mark.every_engine
@pytest.mark.parametrize("path", [EVENTS, "/quota/events"])
async def test_the_own_counters_are_shown_as_they_change(tmp_path: Path, path: str) -> None:
    """And those that the group shares. Nothing else: no calls, and nothing of what others use alone."""
    async with stage(POT, folder=tmp_path) as on:
        reader = await watch_own(on, path=path)
        headers = reader.response.headers
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["x-request-id"].startswith("req_")
        assert await reader.next() == ("snapshot", {"counters": []})
        await on.post(CHAT, GOOD, user="bob")
        name, found = await reader.next()
        assert (name, found.keys()) == ("counters", {"counters"})
        assert {(each["user"], each["quota"]) for each in found["counters"]} == {(None, "staff/pot")}
        tokens = (await on.post(CHAT, GOOD)).json()["usage"]["total_tokens"]
        shown: dict[str, Any] = {}
        while shown.get("staff/daily", {}).get("limits", [{}])[0].get("used") != tokens:
            _, found = await reader.next()
            shown |= {each["quota"]: each for each in found["counters"]}
        assert {each["user"] for each in shown.values()} == {None, "alice"}
        again = await watch_own(on, path=path)
        _, found = await again.next()
        assert {(each["user"], each["quota"]) for each in found["counters"]} == {
            ("alice", "staff/daily"),
            (None, "staff/pot"),
        }


async def test_the_stream_is_resumed_after_the_last_event(tmp_path: Path) -> None:
    async with stage(folder=tmp_path) as on:
        reader = await watch_own(on)
        await reader.next()
        last_id = reader.last_id
        reader.response.close()
        await on.post(CHAT, GOOD)
        await on.all_settled()
        resumed = await watch_own(on, headers={"last-event-id": last_id})
        assert (await resumed.next())[0] == "counters"


@pytest.mark.every_engine
async def test_a_counter_that_an_administrator_resets_is_shown_at_once(tmp_path: Path) -> None:
    """Without a further call of the user."""
    async with stage(STAFF + ADMINS, folder=tmp_path) as on:
        await on.post(CHAT, GOOD)
        reader = await watch_own(on)
        await reader.next()
        assert (await ask(on, "POST", "/counters/reset?dry_run=true", json={"user": "alice"})).status == 200
        assert (await ask(on, "POST", "/counters/reset", json={"user": "alice"})).status == 200
        levels = None
        while levels != [("tokens", 0), ("requests", 0)]:  # the end of the call may be shown before it
            [counter] = (await reader.until("counters"))["counters"]
            levels = [(each["measure"], each["used"]) for each in counter["limits"]]


@pytest.mark.every_engine
async def test_the_stream_ends_when_its_key_is_revoked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Within the time of a check, and at once if the calls of the key are cut."""
    monkeypatch.setattr(events, "_CHECK_S", 0.0)
    async with stage(STAFF + ADMINS, folder=tmp_path) as on:
        for body in ({}, {"cut": True}):
            made = (await ask(on, "POST", "/users/alice/keys", json={})).json()
            reader = await watch_own(on, key=made["key"])
            await reader.next()
            match = {"if-match": (await ask(on, "GET", f"/keys/{made['id']}")).headers["etag"]}
            reply = await ask(on, "POST", f"/keys/{made['id']}/revoke", admin="ops", headers=match, json=body)
            assert reply.status == 200
            await reader.to_end()


async def test_the_stream_ends_when_self_service_is_turned_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(events, "_CHECK_S", 0.0)
    async with stage(folder=tmp_path) as on:
        reader = await watch_own(on)
        await reader.next()
        off = replace(on.config.policy, self_service=False)
        on.config = replace(on.config, policy=off)
        await on.server.policies.reload()
        await reader.to_end()


async def test_one_user_has_only_so_many_streams(tmp_path: Path) -> None:
    """Others, and administrators, still get theirs."""
    async with stage(STAFF + ADMINS, folder=tmp_path) as on:
        readers = [await watch_own(on) for _ in range(Bounds().streams_of_user)]
        refused = await on.get(EVENTS)
        assert (refused.status, refused.error["code"]) == (503, "too_many_streams")
        await watch_own(on, "bob")
        for reader in readers:
            reader.response.close()
        await until(lambda: on.server.live.events.streams == 1)
        await watch_own(on)


async def test_without_a_key_there_is_no_stream(tmp_path: Path) -> None:
    async with stage(folder=tmp_path) as on:
        assert (await on.get(EVENTS, user=None)).status == 401


async def test_a_stream_that_nothing_happens_on_outlives_the_limits_of_answers(tmp_path: Path) -> None:
    """What was sent is read, so the time for unread answers does not end it; and it keeps its place."""
    limits = ConnectionLimits(unread_s=0.05, idle_s=0.05, head_s=0.05, connections=2)
    async with stage(folder=tmp_path, connection_limits=limits) as on:
        reader = await watch_own(on)
        await reader.next()
        for _ in range(5):  # each on a connection of its own, so that one has to be closed
            async with aiohttp.ClientSession() as http, http.get(f"{on.url}/healthz") as response:
                assert response.status == 200
            await asyncio.sleep(0.05)
        await on.post(CHAT, GOOD)
        assert (await reader.next())[0] == "counters"


async def test_users_do_not_take_the_streams_of_administrators(tmp_path: Path) -> None:
    async with stage(STAFF + ADMINS, folder=tmp_path) as on:
        on.server.live.events._bounds = Bounds(streams=1, own_streams=1)
        await watch_own(on)
        assert (await on.get(EVENTS, user="bob")).status == 503
        await watch(on)
        assert problem(await ask(on, "GET", "/events")) == (503, "too-many-streams")
