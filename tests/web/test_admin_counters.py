"""Who stands where over the admin API: counters, attention, refusals, calls, explanations; and what managers see."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.admin import ADMINS, ask, make_quota, problem, write_notices
from tests.builders import HOUR, MINUTE, NOON
from tests.events import watch
from tests.stage import STAFF, Stage, stage

pytestmark = pytest.mark.every_engine

CHAT = "/v1/chat/completions"
# Everything of the group that max does not manage has "zo" in its name.
POLICY = (
    STAFF.replace("requests: 100k, per: day", "requests: 3, per: 6h").replace(
        "users:\n",
        "  zoology: {quotas: {daily: {tokens: 1M, requests: 3, per: 6h}}}\nusers:\n  zoe: {groups: [zoology], "
        'keys: ["key-of-zoe-0123456789abcdef"]}\n',
    )
    + ADMINS
)


def chat(simulate: str = "tokens=5", model: str = "fast") -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 100,
        "metadata": {"simulate": simulate},
    }


@dataclass
class World:
    """A stage in which alice of staff and zoe of zoology have each done the same.

    Each has two calls that have ended, one in flight and one that was refused; `refused` and `in_flight` have the ids
    of their requests, and `grants` those of a grant to each group.
    """

    on: Stage
    refused: dict[str, str]
    in_flight: dict[str, str]
    grants: dict[str, str]


@asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with stage(f"wait: 0s\n{POLICY}", folder=tmp_path) as on:
        refused, tasks = {}, []
        for user, group in (("alice", "staff"), ("zoe", "zoology")):
            for _ in range(2):
                assert (await on.post(CHAT, chat(), user=user)).status == 200
            tasks.append(on.begin(CHAT, chat("hang"), user=user))
            while (await on.quota(f"{group}/daily", user))["requests"]["held"] == 0:
                pass
            reply = await on.post(CHAT, chat(), user=user)
            assert reply.status == 429
            refused[user] = reply.headers["x-request-id"]
            await make_quota(on, f"{group}/other", tokens=5, per="1h", models=["other"])
        await write_notices(on)
        calls = (await ask(on, "GET", "/calls")).json()["data"]
        grants = {}
        for group in ("staff", "zoology"):
            body = {
                "quota": f"{group}/other",
                "measure": "tokens",
                "amount": 1,
                "until": NOON + HOUR,
                "reason": "exam",
            }
            grants[group] = (await ask(on, "POST", "/grants", json=body)).json()["id"]
        yield World(on, refused, {call["user"]: call["id"] for call in calls}, grants)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        on.server.end_at_once()  # else the end of the stage waits for what hangs


# ----------------------------------------------------------------------------------------------------------- managers


async def test_a_manager_sees_nothing_of_other_groups(tmp_path: Path) -> None:
    """In no list, report or stream, whatever it asks for. A viewer sees all of it."""
    async with world(tmp_path) as here:
        on = here.on
        lists = [
            *(
                "/groups",
                "/quotas",
                "/grants",
                "/grants?ended=true",
                "/counters",
                "/attention",
                "/refusals",
                "/calls",
            ),
            *("/audit", "/audit?format=csv", "/quotas?model=other", "/groups/{}/members", "/groups/{}"),
            *("/groups/{}/quotas", "/groups/{}/quotas/daily", "/usage?by=user", "/usage?by=group&format=csv"),
            *("/counters?user={user}", "/counters?group={}", "/counters?quota={}/daily", "/calls?group={}"),
            *("/calls?user={user}", "/refusals?user={user}", "/refusals?quota={}/daily", "/usage?by=day&group={}"),
            *(
                "/usage?by=key&user={user}",
                "/explain?user={user}&model=fast",
                "/refusals/{request}",
                "/grants/{grant}",
            ),
            *("/audit?target={}/other", "/quotas?group={}", "/grants?quota={}/other"),
        ]
        for path in lists:
            for user, group in (("alice", "staff"), ("zoe", "zoology")):
                names = {"user": user, "request": here.refused[user], "grant": here.grants[group]}
                asked = path.format(group, **names)
                of_viewer = await ask(on, "GET", asked, admin="eve")
                assert of_viewer.status == 200, asked
                reply = await ask(on, "GET", asked, admin="max")
                shown = reply.body.decode().replace(f'"{asked}"', "")
                if group == "staff":
                    assert reply.status == 200, (asked, reply.body)
                    assert "staff" in shown or "alice" in shown or "by=day" in asked or "by=key" in asked, asked
                    assert "zo" not in shown, asked
                elif "{" not in path:
                    assert reply.status == 200
                elif reply.status != 404:
                    assert reply.status == 200
                    content = reply.json()
                    assert not content.get("data"), (asked, content)


async def test_a_manager_changes_nothing_of_other_groups(tmp_path: Path) -> None:
    """It resets and grants in its own groups alone, and grants no more than its share of a limit."""
    async with world(tmp_path) as here:
        on = here.on
        grant = {"quota": "zoology/daily", "measure": "tokens", "amount": 1, "until": NOON + HOUR, "reason": "exam"}
        refused = [
            ("POST", "/counters/reset", {"user": "zoe"}),
            ("POST", "/counters/reset", {"group": "zoology"}),
            ("POST", "/counters/reset", {"quota": "zoology/daily"}),
            ("POST", "/counters/reset", {"user": "alice", "quota": "zoology/daily"}),
            ("POST", "/grants", grant),
            ("DELETE", f"/grants/{here.grants['zoology']}", None),
        ]
        before = [await on.rows(table) for table in ("counters", "grants", "audit")]
        for method, path, body in refused:
            assert problem(await ask(on, method, path, admin="max", json=body)) == (404, "not-found"), path
        assert [await on.rows(table) for table in ("counters", "grants", "audit")] == before
        reply = await ask(on, "POST", "/counters/reset", admin="max", json={"user": "alice"})
        assert [each["quota"] for each in reply.json()["quotas"]] == ["staff/daily"]
        own = {**grant, "quota": "staff/daily", "user": "alice", "amount": 500_000}
        assert (await ask(on, "POST", "/grants", admin="max", json=own)).status == 201
        reply = await ask(on, "POST", "/grants", admin="max", json={**own, "amount": 1})
        assert (problem(reply), reply.json()["field"]) == ((422, "validation"), "amount")
        assert (await ask(on, "POST", "/grants", json={**own, "amount": 1})).status == 201
        assert problem(await ask(on, "DELETE", f"/grants/{here.grants['staff']}", admin="max")) == (403, "forbidden")


async def test_the_stream_of_a_manager_has_nothing_of_other_groups(tmp_path: Path) -> None:
    """Calls, counters, refusals and changes of its own groups, and the health of the process."""
    async with world(tmp_path) as here:
        on = here.on
        reader, of_all = await watch(on, "max"), await watch(on, "eve")
        shown = [await reader.next()]
        await of_all.next()
        assert [call["user"] for call in shown[0][1]["calls"]] == ["alice"]
        await ask(on, "POST", "/counters/reset", json={"group": "zoology"})
        await make_quota(on, "zoology/third", tokens=5, per="1h", models=["third"])
        assert (await on.post(CHAT, chat(), user="zoe")).status == 200
        await on.post(CHAT, chat(), user="alice")
        seen: set[str] = set()
        while not {"calls", "counters", "refusals", "change"} <= seen:
            name, data = await of_all.next()
            seen.add(name)
            seen |= {"alice"} if name == "refusals" and "alice" in str(data) else set()
        while shown[-1][0] != "refusals":
            shown.append(await reader.next())
        assert "alice" in str(shown[-1])
        await make_quota(on, "staff/third", tokens=5, per="1h", models=["third"])
        while shown[-1][1].get("target") != "staff/third":
            shown.append(await reader.next())
        assert shown[-1][1]["action"] == "quota.set"
        assert "zo" not in str(shown)


# ---------------------------------------------------------------------------------------------------- counters, reset


async def test_counters_are_filtered_and_paged(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        on = here.on

        async def found(query: str) -> list[tuple[str, str]]:
            reply = await ask(on, "GET", f"/counters{query}", admin="eve")
            assert reply.status == 200, reply.body
            return [(each["quota"], each["user"]) for each in reply.json()["data"]]

        both = [("staff/daily", "alice"), ("zoology/daily", "zoe")]
        assert await found("") == both
        assert await found("?quota=zoology/daily") == both[1:]
        assert await found("?group=staff") == both[:1]
        assert await found("?user=zoe&group=zoology") == [*both[1:], ("zoology/other", "zoe")]
        assert await found("?model=fast") == both
        assert await found("?model=gpt-4o-mini&group=staff") == both[:1]
        assert await found("?near=80") == []
        first = (await ask(on, "GET", "/counters?limit=1")).json()
        second = (await ask(on, "GET", f"/counters?limit=1&after={first['next']}")).json()
        assert [each["quota"] for page in (first, second) for each in page["data"]] == [
            "staff/daily",
            "zoology/daily",
        ]
        assert second["next"] is None
        assert problem(await ask(on, "GET", "/counters?quota=staff/nothing")) == (404, "not-found")
        assert problem(await ask(on, "GET", "/counters?user=nobody")) == (404, "not-found")
        reply = await ask(on, "GET", "/counters?after=nonsense")
        assert (problem(reply), reply.json()["field"]) == ((422, "validation"), "after")


async def test_a_reset_empties_what_is_used_and_keeps_what_is_held(tmp_path: Path) -> None:
    """So calls are let in at once, and those in flight settle into it. Without a target nothing is reset."""
    async with world(tmp_path) as here:
        on = here.on
        reply = await ask(on, "POST", "/counters/reset", json={})
        assert (problem(reply), reply.json()["field"]) == ((422, "validation"), "user")
        trial = await ask(on, "POST", "/counters/reset?dry_run=true", json={"user": "alice"})
        for reason in ("a\nb", "a" * 501):
            reply = await ask(on, "POST", "/counters/reset", json={"user": "alice", "reason": reason})
            assert (problem(reply), reply.json()["field"]) == ((422, "validation"), "reason")
        made = await ask(on, "POST", "/counters/reset", json={"user": "alice", "reason": "an outage"})
        assert trial.json() == made.json()
        assert [(each["quota"], each["counters"]) for each in made.json()["quotas"]] == [("staff/daily", 1)]
        level = (await on.quota("staff/daily"))["requests"]
        assert (level["used"], level["held"], level["remaining"]) == (0, 1, 2)
        assert (await on.quota("staff/daily"))["window"]["resets_at"] == (NOON + 6 * HOUR) // 1000
        assert (await on.post(CHAT, chat())).status == 200
        [row] = (await ask(on, "GET", "/audit?action=counters.reset")).json()["data"]
        assert row["before"]["used"]["staff/daily"]["requests"] == 2
        assert row["after"]["reason"] == "an outage"
        await ask(on, "POST", f"/calls/{here.in_flight['alice']}/end")
        while (await on.quota("staff/daily"))["requests"]["held"]:
            pass
        assert (await on.quota("staff/daily"))["requests"]["used"] == 2


async def test_a_reset_by_an_administrator_is_in_the_streams_at_once(tmp_path: Path) -> None:
    """With no call after it."""
    async with world(tmp_path) as here:
        reader = await watch(here.on, "eve")
        await reader.next()
        await ask(here.on, "POST", "/counters/reset", json={"quota": "staff/daily"})
        [counter] = (await reader.until("counters"))["counters"]
        assert (counter["user"], counter["limits"][1]["used"], counter["limits"][1]["held"]) == ("alice", 0, 1)


async def test_after_a_reset_of_very_many_counters_who_watches_reads_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only so many are told one by one."""
    monkeypatch.setattr("proxy.administration.counters.RESETS_SHOWN_MAX", 1)
    monkeypatch.setattr("proxy.web.admin.counters.RESETS_SHOWN_MAX", 1)
    async with world(tmp_path) as here:
        reader = await watch(here.on, "eve")
        await reader.next()
        reply = await ask(here.on, "POST", "/counters/reset", json={"quota": "staff/daily"})
        assert reply.json()["quotas"][0]["counters"] == 1
        assert (await reader.until("snapshot"))["replica"] == here.on.server.ledger.owner


# ------------------------------------------------------------------------------------------------ refusals, attention


async def test_a_refusal_is_found_by_its_request_and_explained(tmp_path: Path) -> None:
    """As it was, and as it is now."""
    async with world(tmp_path) as here:
        on = here.on
        reply = await ask(on, "GET", f"/refusals/{here.refused['alice']}", admin="eve")
        found, now = reply.json()["refusal"], reply.json()["now"]
        assert (found["user"], found["quota"], found["measure"]) == ("alice", "staff/daily", "requests")
        assert (found["verdict"], found["used"], found["held"], found["limit"]) == ("busy", 2, 1, 3)
        assert found["details"]["refused_by"] == ["staff/daily"]
        assert (now["admitted"], now["reason"], now["refused_by"]) == (False, "busy", ["staff/daily"])
        await ask(on, "POST", "/counters/reset", json={"user": "alice"})
        reply = await ask(on, "GET", f"/refusals/{here.refused['alice']}")
        assert reply.json()["refusal"] == found
        assert reply.json()["now"]["admitted"] is True
        assert problem(await ask(on, "GET", "/refusals/req_0")) == (404, "not-found")


async def test_refusals_are_filtered_by_user_quota_and_time(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        on = here.on
        on.clock.ms += 2 * MINUTE
        for _ in range(3):
            await on.post(CHAT, chat())
        await write_notices(on)

        async def found(query: str) -> list[tuple[int, str, int]]:
            rows = (await ask(on, "GET", f"/refusals{query}", admin="eve")).json()["data"]
            return [((row["minute_at"] - NOON) // MINUTE, row["user"], row["count"]) for row in rows]

        assert await found("") == [(2, "alice", 3), (0, "alice", 1), (0, "zoe", 1)]
        assert await found("?user=zoe") == [(0, "zoe", 1)]
        assert await found("?quota=staff/daily") == [(2, "alice", 3), (0, "alice", 1)]
        assert await found(f"?since={NOON + MINUTE}") == [(2, "alice", 3)]
        assert await found(f"?until={NOON + MINUTE}&user=alice") == [(0, "alice", 1)]
        page = (await ask(on, "GET", "/refusals?limit=2")).json()
        rest = (await ask(on, "GET", f"/refusals?limit=2&after={page['next']}")).json()
        assert (len(page["data"]), len(rest["data"]), rest["next"]) == (2, 1, None)


async def test_attention_has_who_was_refused_and_who_is_near(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        on = here.on
        await make_quota(on, "staff/pot", requests=4, per="6h", shared=True, models=["gpt-4o-mini"])
        await ask(on, "POST", "/counters/reset", json={"user": "alice"})
        for _ in range(2):
            on.clock.ms += MINUTE
            assert (await on.post(CHAT, chat(model="gpt-4o-mini"))).status == 200
        await on.post(CHAT, chat(model="gpt-4o-mini"), user="bob")
        await on.post(CHAT, chat(model="gpt-4o-mini"), user="bob")
        await write_notices(on)
        found = (await ask(on, "GET", "/attention", admin="eve")).json()
        assert {(each["user"], each["count"]) for each in found["refused"]} == {("zoe", 1), ("alice", 1)}
        near = {(each["quota"], each["user"]) for each in found["near"]}
        assert ("staff/pot", None) in near
        assert [(pot["quota"], pot["used"], pot["limit"]) for pot in found["pots"]] == [("staff/pot", 4, 4)]


# -------------------------------------------------------------------------------------------------------------- calls


async def test_calls_in_flight_are_filtered(tmp_path: Path) -> None:
    async with world(tmp_path) as here:

        async def found(query: str) -> list[str]:
            rows = (await ask(here.on, "GET", f"/calls{query}", admin="eve")).json()["data"]
            return sorted(row["user"] for row in rows)  # both began in the same millisecond

        assert await found("") == ["alice", "zoe"]
        assert await found("?user=alice") == ["alice"]
        assert await found("?group=zoology") == ["zoe"]
        assert await found("?model=fast") == ["alice", "zoe"]
        assert await found("?model=gpt-4o-mini") == []
        [call] = (await ask(here.on, "GET", "/calls?user=alice")).json()["data"]
        assert (call["began_at"], call["address"], call["endpoint"]) == (NOON, "127.0.0.1", "chat")
        assert call["held_output"] == 100
        first = (await ask(here.on, "GET", "/calls?limit=1")).json()
        second = (await ask(here.on, "GET", f"/calls?limit=1&after={first['next']}")).json()
        assert sorted(each["user"] for page in (first, second) for each in page["data"]) == ["alice", "zoe"]
        assert second["next"] is None


async def test_a_call_is_ended_and_charged_what_has_passed(tmp_path: Path) -> None:
    """Its client sees a stream that breaks off. It can be ended once."""
    async with stage(POLICY, folder=tmp_path) as on:
        body = {**chat("tokens=90 stall=7"), "stream": True}
        headers = {"authorization": "Bearer key-of-alice-0123456789abcdef"}
        async with on.http.post(on.url + CHAT, json=body, headers=headers) as response:
            id = response.headers["x-request-id"]
            text = b""
            while text.count(b'"content"') < 7:
                text += await response.content.readany()
            assert problem(await ask(on, "POST", f"/calls/{id}/end", admin="max")) == (403, "forbidden")
            reply = await ask(on, "POST", f"/calls/{id}/end")
            assert (reply.json()["id"], reply.json()["user"]) == (id, "alice")
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        await on.all_settled()
        used, held = await on.used()
        assert held == 0
        assert 7 < used < 60
        assert problem(await ask(on, "POST", f"/calls/{id}/end")) == (404, "not-found")
        [row] = (await ask(on, "GET", "/audit")).json()["data"]
        assert (row["action"], row["target"], row["before"]["model"]) == ("call.end", id, "fast")
        await on.audit()


async def test_explain_says_why_not(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        on = here.on
        found = (await ask(on, "GET", "/explain?user=bob&model=fast", admin="eve")).json()
        assert (found["admitted"], found["groups"], found["alternatives"]) == (True, ["staff"], [["staff/daily"]])
        found = (await ask(on, "GET", "/explain?user=alice&model=fast")).json()
        assert (found["admitted"], found["reason"], found["refused_by"]) == (False, "busy", ["staff/daily"])
        found = (await ask(on, "GET", "/explain?user=alice&model=nothing")).json()
        assert (found["admitted"], found["reason"]) == (False, "there is no such model in `models`")
        assert problem(await ask(on, "GET", "/explain?user=nobody&model=fast")) == (404, "not-found")
