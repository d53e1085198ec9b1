"""Groups, their members, quotas and grants over the admin API, on real sockets and both engines."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from proxy.config.loader import load_text
from tests.admin import ADMINS, ask, change, make_quota, problem
from tests.builders import HOUR, NOON
from tests.stage import STAFF, Reply, Stage, stage

CHAT = "/v1/chat/completions"
POLICY = STAFF.replace("users:\n", "  lab: {quotas: {daily: {tokens: 1M, per: day}}}\nusers:\n") + ADMINS
GOOD: Any = {"model": "fast", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


async def names(on: Stage, path: str, admin: str = "eve", key: str = "id") -> list[str]:
    """The ids, or other members, of a list."""
    reply = await ask(on, "GET", path, admin=admin)
    assert reply.status == 200, reply.body
    return [each[key] for each in reply.json()["data"]]


# ------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.every_engine
async def test_a_group_is_made_filled_ordered_changed_and_deleted(tmp_path: Path) -> None:
    """Its members use its quotas with their next call, and none of them after it is gone."""
    async with stage(POLICY, folder=tmp_path) as on:
        made = await ask(on, "POST", "/groups", json={"name": "art", "models": ["gpt-4o-mini"]})
        assert made.status == 201
        group = made.json()["group"]
        assert (group["name"], group["origin"], group["position"], group["models"]) == (
            "art",
            "database",
            2,
            ["gpt-4o-mini"],
        )
        assert made.headers["etag"] == group["etag"]
        assert made.json()["effects"]["members"] == 0
        assert (await ask(on, "POST", "/groups", json={"name": "bio"})).status == 201
        assert problem(await ask(on, "POST", "/groups", json={"name": "staff"})) == (409, "conflict")
        assert await names(on, "/groups", key="name") == ["staff", "lab", "art", "bio"]
        assert await names(on, "/groups", admin="max", key="name") == ["staff"]
        reply = await change(on, "PUT", "/groups", {"names": ["bio", "art"]})
        assert [each["name"] for each in reply.json()["data"]] == ["staff", "lab", "bio", "art"]
        reply = await change(on, "PUT", "/groups", {"names": ["bio"]})
        assert (problem(reply), reply.json()["field"]) == ((422, "validation"), "names")
        await make_quota(on, "art/hourly", requests=1, per="1h")
        assert (await ask(on, "POST", "/users", json={"id": "dora"})).status == 201
        key = (await ask(on, "POST", "/users/dora/keys", json={})).json()["key"]
        head = {"authorization": f"Bearer {key}"}
        mini = {**GOOD, "model": "gpt-4o-mini"}
        assert (await on.post(CHAT, mini, user=None, headers=head)).status == 404
        assert (await ask(on, "PUT", "/groups/art/members/dora")).json()["groups"] == ["art"]
        assert await names(on, "/groups/art/members", key="user") == ["database:dora"]
        assert (await on.post(CHAT, GOOD, user=None, headers=head)).status == 404  # not one of its models
        assert (await on.post(CHAT, mini, user=None, headers=head)).status == 200
        assert (await on.post(CHAT, mini, user=None, headers=head)).status == 429
        reply = await change(on, "PUT", "/groups/art", {"models": None, "unlimited": False})
        assert (reply.json()["group"]["models"], reply.json()["effects"]["members"]) == (None, 1)
        assert (await ask(on, "DELETE", "/groups/art/members/dora")).json()["groups"] == []
        assert (await on.post(CHAT, mini, user=None, headers=head)).status == 404
        for user in ("dora", "alice"):
            await ask(on, "PUT", f"/groups/art/members/{user}")
        trial = await change(on, "DELETE", "/groups/art?dry_run=true", of="/groups/art")
        reply = await change(on, "DELETE", "/groups/art")
        assert trial.json() == reply.json()
        assert reply.json()["effects"]["members"] == 2
        assert problem(await ask(on, "GET", "/groups/art")) == (404, "not-found")
        assert (await ask(on, "GET", "/users/dora")).json()["groups"] == []
        assert (await on.post(CHAT, mini, user=None, headers=head)).status == 404


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/groups/staff", {"unlimited": True}),
        ("DELETE", "/groups/staff", None),
        ("PUT", "/groups/staff/quotas/daily", {"tokens": 5, "per": "day"}),
        ("DELETE", "/groups/staff/quotas/daily", None),
    ],
)
async def test_what_is_in_the_file_is_changed_there(method: str, path: str, body: Any, tmp_path: Path) -> None:
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await change(on, method, path, body)
        assert problem(reply) == (409, "conflict")
        assert "file" in reply.json()["detail"]


@pytest.mark.every_engine
async def test_members_are_listed_in_pages(tmp_path: Path) -> None:
    """Users of the file first. A user of the file who was put into the group here is among them."""
    async with stage(POLICY, folder=tmp_path) as on:
        users = [{"id": f"u{number}", "groups": ["lab"]} for number in range(3)]
        assert (await ask(on, "POST", "/users/import", json={"users": users})).status == 200
        assert (await ask(on, "POST", "/groups", json={"name": "art"})).status == 201
        for user in ("bob", "u0", "u1", "u2"):
            assert (await ask(on, "PUT", f"/groups/art/members/{user}")).status == 200
        reply = await ask(on, "PUT", "/groups/lab/members/bob")
        assert (problem(reply), reply.json()["field"]) == ((422, "validation"), "group")
        found, after = [], ""
        for _ in range(3):
            page = (await ask(on, "GET", f"/groups/art/members?limit=2{after}", admin="eve")).json()
            found += [user["user"] for user in page["data"]]
            if page["next"] is None:
                break
            after = f"&after={page['next']}"
        assert found == ["bob", "database:u0", "database:u1", "database:u2"]


# ------------------------------------------------------------------------------------------------------------- quotas


@pytest.mark.every_engine
async def test_quotas_are_listed_by_group_and_by_model(tmp_path: Path) -> None:
    """Each with the YAML that would make it."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "lab/fast", tokens="2k", per="6h", models=["fast"], enforce="after")
        assert await names(on, "/quotas") == ["staff/daily", "lab/daily", "lab/fast"]
        assert await names(on, "/quotas?group=lab") == ["lab/daily", "lab/fast"]
        assert await names(on, "/groups/lab/quotas") == ["lab/daily", "lab/fast"]
        assert await names(on, "/quotas?model=fast") == ["lab/fast"]
        assert await names(on, "/quotas", admin="max") == ["staff/daily"]
        assert problem(await ask(on, "GET", "/quotas?group=nobody")) == (404, "not-found")
        quota = (await ask(on, "GET", "/groups/lab/quotas/fast")).json()
        assert (quota["origin"], quota["created_by"], quota["created_at"]) == ("database", "admin:ops", NOON)
        assert (quota["fields"]["tokens"], quota["fields"]["enforce"]) == (2000, "after")
        made = load_text(quota["yaml"] + "upstreams: {simulated: {base_url: 'http://127.0.0.1:9'}}\n")
        in_force = on.server.policies.current.policy.groups["lab"].quotas
        assert made.policy.groups["lab"].quotas == in_force[1:]


@pytest.mark.every_engine
async def test_the_second_of_two_administrators_is_told(tmp_path: Path) -> None:
    """Also if both save at the same moment: one version is in force, and it is the one of who was first."""
    async with stage(POLICY, folder=tmp_path) as on:
        path = "/groups/staff/quotas/hourly"
        made = await make_quota(on, "staff/hourly", requests=5, per="1h")
        seen = {"if-match": made.headers["etag"]}

        def save(requests: int) -> Any:
            return ask(on, "PUT", path, admin="ops", headers=seen, json={"requests": requests, "per": "1h"})

        replies: list[Reply] = await asyncio.gather(*(save(number) for number in (6, 7, 8)))
        assert sorted(reply.status for reply in replies) == [200, 412, 412]
        [won] = [reply.json()["quota"]["fields"]["requests"] for reply in replies if reply.status == 200]
        assert (await ask(on, "GET", path)).json()["fields"]["requests"] == won
        assert (await on.quota("staff/hourly"))["requests"]["limit"] == won
        late = await save(9)
        assert problem(late) == (412, "precondition-failed")
        assert "read it again" in late.json()["detail"]
        assert len(await on.rows("audit")) == 2


async def test_a_change_says_whom_it_touches_and_warns(tmp_path: Path) -> None:
    """In a trial too: how many members, how many are over now, and what probably is not meant."""
    async with stage(POLICY, folder=tmp_path) as on:
        for _ in range(2):
            assert (await on.post(CHAT, GOOD)).status == 200
        await make_quota(on, "staff/hourly", requests=5, per="day")
        path = "/groups/staff/quotas/hourly"
        match = {"if-match": "*"}
        for _ in range(2):
            assert (await on.post(CHAT, GOOD)).status == 200
        reply = await ask(
            on, "PUT", f"{path}?dry_run=true", admin="ops", headers=match, json={"requests": 2, "per": "day"}
        )
        assert reply.json()["effects"]["members"] == 2
        assert reply.json()["effects"]["members_over"] == 1
        would = "Each of 2 members may use 2 requests a day of any model; 1 of them would be over now."
        assert reply.json()["sentence"] == would
        assert (await on.post(CHAT, GOOD)).status == 200
        reply = await ask(on, "POST", "/groups?dry_run=true", json={"name": "art"})
        assert "art" in str(reply.json()["effects"]["warnings"])


# ------------------------------------------------------------------------------------------------------------- grants


@pytest.mark.every_engine
async def test_a_grant_lets_calls_pass_until_its_end(tmp_path: Path) -> None:
    """It ends by the clock, or when it is ended. What was used of it stays used."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/hourly", requests=1, per="24h")
        body = {"quota": "staff/hourly", "user": "alice", "measure": "requests", "amount": 1, "reason": "exam"}
        assert (await on.post(CHAT, GOOD)).status == 200
        assert (await on.post(CHAT, GOOD)).status == 429
        made = await ask(on, "POST", "/grants", json={**body, "until": NOON + HOUR})
        assert made.status == 201
        assert (await on.post(CHAT, GOOD)).status == 200
        assert (await on.post(CHAT, GOOD)).status == 429
        level = await on.quota("staff/hourly")
        assert (level["requests"]["limit"], level["requests"]["used"], level["grants"][0]["amount"]) == (2, 2, 1)
        [counter] = (await ask(on, "GET", "/counters?quota=staff/hourly")).json()["data"]
        assert counter["grants"] == [made.json()["id"]]
        second = await ask(on, "POST", "/grants", json={**body, "amount": 5, "until": NOON + 2 * HOUR})
        assert (await on.post(CHAT, GOOD)).status == 200
        assert (await ask(on, "DELETE", f"/grants/{second.json()['id']}")).json()["ended_at"] == NOON
        assert (await on.post(CHAT, GOOD)).status == 429
        assert await names(on, "/grants") == [made.json()["id"]]
        on.clock.ms += HOUR
        assert (await on.quota("staff/hourly"))["requests"]["remaining"] == 0
        assert await names(on, "/grants") == []
        assert len(await names(on, "/grants?ended=true")) == 2


@pytest.mark.every_engine
async def test_grants_are_filtered_and_paged(tmp_path: Path) -> None:
    async with stage(POLICY, folder=tmp_path) as on:
        ids = {}
        for quota, user in (("staff/daily", None), ("staff/daily", "alice"), ("lab/daily", None)):
            body = {"quota": quota, "user": user, "measure": "tokens", "amount": 1, "until": NOON + 1, "reason": "x"}
            ids[quota, user] = (await ask(on, "POST", "/grants", json=body)).json()["id"]
        assert await names(on, "/grants") == sorted(ids.values())
        assert set(await names(on, "/grants?quota=staff/daily")) == {
            ids["staff/daily", None],
            ids["staff/daily", "alice"],
        }
        assert await names(on, "/grants?user=alice") == [ids["staff/daily", "alice"]]
        page = (await ask(on, "GET", "/grants?limit=2")).json()
        rest = await names(on, f"/grants?limit=2&after={page['next']}")
        assert [each["id"] for each in page["data"]] + rest == sorted(ids.values())


@pytest.mark.parametrize(
    ("changed", "status", "field"),
    [
        ({"quota": "staff/nothing"}, 404, "quota"),
        ({"user": "nobody"}, 404, "user"),
        ({"measure": "input_tokens"}, 422, "measure"),
        ({"measure": "bananas"}, 422, "measure"),
        ({"amount": 0}, 422, "amount"),
        ({"until": NOON}, 422, "until"),
        ({"reason": " "}, 422, "reason"),
    ],
)
async def test_a_wrong_grant_is_refused_by_its_field(
    changed: dict[str, Any], status: int, field: str, tmp_path: Path
) -> None:
    async with stage(POLICY, folder=tmp_path) as on:
        body = {"quota": "staff/daily", "measure": "tokens", "amount": 1, "until": NOON + 1, "reason": "exam"}
        reply = await ask(on, "POST", "/grants", json={**body, **changed})
        assert (reply.status, reply.json()["field"]) == (status, field)
        assert await on.rows("grants") == []
