"""Managers see nothing of other groups, however they ask."""

import asyncio
import json
from typing import Any

from proxy.web.admin import reports
from tests.admin import ADMINS, ask
from tests.stage import stage

# Max manages staff. Ann is in staff and in lab, zoe only in lab.
POLICY = f"""
models: {{gpt-4o-mini: {{upstream: simulated}}}}
groups:
  staff: {{quotas: {{daily: {{requests: 1, per: day}}}}}}
  lab: {{quotas: {{secret-pot: {{requests: 1, per: day, shared: true}}}}}}
users:
  ann: {{groups: [staff, lab], keys: ["key-of-ann-0123456789abcdef"]}}
  zoe: {{groups: [lab], keys: ["key-of-zoe-0123456789abcdef"]}}
{ADMINS}
"""
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
GRANT = {"quota": "staff/daily", "measure": "requests", "amount": 1, "until": 2**42, "reason": "x"}


async def test_an_explanation_has_nothing_of_groups_that_its_reader_does_not_manage(tmp_path):
    """Of a user of two groups, a manager of one gets the verdict, and the counters of that one."""
    async with stage(POLICY, folder=tmp_path) as on:
        statuses = [(await on.post("/v1/chat/completions", CHAT, user="ann")) for _ in range(3)]
        assert [each.status for each in statuses] == [200, 200, 429]
        await on.server.live.close()  # writes the refusal
        path = "/explain?user=ann&model=gpt-4o-mini"
        everything, shown = [(await ask(on, "GET", path, admin=name)).json() for name in ("ops", "max")]
        assert [each["quota"] for each in everything["quotas"]] == ["staff/daily", "lab/secret-pot"]
        assert (shown["admitted"], shown["reason"], shown["refused_by"]) == (False, "exhausted", ["staff/daily"])
        assert [each["quota"] for each in shown["quotas"]] == ["staff/daily"]
        assert shown["groups"] == ["staff"]
        assert "lab" not in json.dumps(shown)
        request = statuses[2].headers["x-request-id"]
        everything, shown = [
            (await ask(on, "GET", f"/refusals/{request}", admin=name)).json() for name in ("ops", "max")
        ]
        assert "secret-pot" in json.dumps(everything["refusal"])
        assert [each["quota"] for each in shown["refusal"]["details"]["quotas"]] == ["staff/daily"]
        assert "lab" not in json.dumps(shown)


async def test_a_manager_ends_only_grants_of_its_own(tmp_path):
    async with stage(POLICY.replace("requests: 1", "requests: 10"), folder=tmp_path) as on:
        grant = {**GRANT, "until": on.clock.ms + 60_000, "user": "ann"}
        made = {name: await ask(on, "POST", "/grants", admin=name, json=grant) for name in ("max", "ops")}
        assert [reply.status for reply in made.values()] == [201, 201]
        ended = {name: await ask(on, "DELETE", f"/grants/{made[name].json()['id']}", admin="max") for name in made}
        assert {name: reply.status for name, reply in ended.items()} == {"ops": 403, "max": 200}


async def test_a_manager_does_not_learn_who_there_is(tmp_path):
    """A user of another group and a name that nobody has are answered in the same words."""
    async with stage(POLICY, folder=tmp_path) as on:
        for method, path, body in (
            ("GET", "/explain?user={}&model=gpt-4o-mini", None),
            ("GET", "/counters?user={}", None),
            ("POST", "/counters/reset", {"user": "{}"}),
            ("POST", "/grants", {**GRANT, "until": on.clock.ms + 60_000, "user": "{}"}),
        ):
            replies = []
            for name in ("zoe", "nobody"):
                sent = None if body is None else {**body, "user": name}
                reply = await ask(on, method, path.format(name), admin="max", json=sent)
                replies.append(
                    (reply.status, reply.json()["detail"].replace(f"database:{name}", name).replace(name, "X"))
                )
            assert replies[0] == replies[1]
            assert replies[0][0] == 404


async def test_a_wrong_name_of_a_quota_suggests_none_of_another_group(tmp_path):
    """As `staff/secret-pot` would suggest `lab/secret-pot`."""
    async with stage(POLICY, folder=tmp_path) as on:
        asked = [
            await ask(on, "GET", "/groups/staff/quotas/secret-pot", admin="max"),
            await ask(
                on,
                "POST",
                "/grants",
                admin="max",
                json={**GRANT, "until": on.clock.ms + 1000, "quota": "staff/secret-pot"},
            ),
        ]
        for reply in asked:
            assert reply.status == 404
            assert "lab" not in reply.json()["detail"]


async def test_a_cursor_with_an_impossible_number_is_a_mistake_of_the_client(tmp_path):
    """2**63 as an instant."""
    async with stage(POLICY, folder=tmp_path) as on:
        for path, cursor in (("audit", "WzkyMjMzNzIwMzY4NTQ3NzU4MDgsICJhIl0"),):
            assert (await ask(on, "GET", f"/{path}?after={cursor}")).status == 422


async def test_files_are_checked_one_at_a_time(tmp_path, monkeypatch):
    """A check of 900 kB takes a thread for seconds, and calls need the same threads for large bodies."""
    running, most = 0, 0
    check = reports.check_policy

    async def counted(*args: Any, **more: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await check(*args, **more)
        finally:
            running -= 1

    monkeypatch.setattr(reports, "check_policy", counted)
    async with stage(POLICY, folder=tmp_path) as on:
        asked = [ask(on, "POST", "/policy/check", json={"yaml": "help: x"}) for _ in range(5)]
        assert {each.status for each in await asyncio.gather(*asked)} == {200}
    assert most == 1
