"""Usage, models, upstreams, replicas, the policy, the audit log and events over the admin API."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from proxy.config.document import Diagnostic
from proxy.config.loader import BadConfig
from proxy.web import events
from tests.admin import ADMINS, ask, change, make_quota, problem
from tests.builders import DAY, HOUR, NOON
from tests.events import watch
from tests.stage import STAFF, UPSTREAM_KEY, Stage, stage

CHAT = "/v1/chat/completions"
LAB = "  lab: {quotas: {daily: {tokens: 1M, per: day}}}\n"
POLICY = (
    STAFF.replace("users:\n", f"{LAB}users:\n")
    .replace("models:\n", 'models:\n  "@sum": {upstream: simulated, model: gpt-4o-mini}\n')
    .replace("bob: {groups: [staff]", "bob: {groups: [lab]")
    + ADMINS
)


def chat(model: str = "fast") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


async def call(on: Stage, user: str = "alice", model: str = "fast") -> None:
    assert (await on.post(CHAT, chat(model), user=user)).status == 200


# -------------------------------------------------------------------------------------------------------------- usage


@pytest.mark.every_engine
@pytest.mark.parametrize("is_rolled_up", [False, True])
async def test_usage_by_each_dimension(is_rolled_up: bool, tmp_path: Path) -> None:
    """Whether the sums of days are written yet or not."""
    async with stage(POLICY, folder=tmp_path) as on:
        await call(on)
        await call(on, "bob", "gpt-4o-mini")
        on.clock.ms += DAY
        await call(on)
        if is_rolled_up:
            await on.server.rollup.run()

        async def calls(query: str, admin: str = "eve") -> dict[str, int]:
            reply = await ask(on, "GET", f"/usage?{query}", admin=admin)
            assert reply.status == 200, reply.body
            return {row["value"]: row["calls"] for row in reply.json()["data"]}

        assert await calls("") == {"2026-11-24": 1 + 1, "2026-11-25": 1}
        assert await calls("by=hour") == {"2026-11-24T12:00Z": 2, "2026-11-25T12:00Z": 1}
        assert await calls("by=user") == {"alice": 2, "bob": 1}
        assert await calls("by=group") == {"staff": 2, "lab": 1}
        assert await calls("by=model") == {"fast": 2, "gpt-4o-mini": 1}
        assert sorted((await calls("by=key")).values()) == [1, 2]
        assert await calls("by=tag") == {"": 3}
        assert await calls(f"by=user&since={NOON + DAY}") == {"alice": 1}
        assert await calls(f"by=user&until={NOON + DAY // 2}") == {"alice": 1, "bob": 1}
        assert await calls("by=day&user=bob") == {"2026-11-24": 1}
        assert await calls("by=user&group=lab") == {"bob": 1}
        assert await calls("by=user&model=fast") == {"alice": 2}
        assert await calls("by=user", "max") == {"alice": 2}
        row = (await ask(on, "GET", "/usage?by=user&user=bob")).json()["data"][0]
        assert (row["requests"], row["output_tokens"], row["estimated"]) == (1, 5, 0)
        assert problem(await ask(on, "GET", "/usage?by=color")) == (400, "bad-request")


@pytest.mark.every_engine
async def test_usage_as_csv_has_no_formulas(tmp_path: Path) -> None:
    """A spreadsheet would compute a cell that begins with =, +, - or @."""
    async with stage(POLICY, folder=tmp_path) as on:
        await call(on, model="@sum")
        await call(on)
        reply = await ask(on, "GET", "/usage?by=model&format=csv", admin="eve")
        assert reply.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(reply.body.decode())))
        assert {row["model"]: row["calls"] for row in rows} == {"'@sum": "1", "fast": "1"}
        assert {row["value"] for row in (await ask(on, "GET", "/usage?by=model")).json()["data"]} == {"@sum", "fast"}


# --------------------------------------------------------------------------------------------------- what is in force


async def test_models_and_upstreams_are_shown_without_their_keys(tmp_path: Path) -> None:
    """With the cooldown and the last failure that each process knows."""
    async with stage(POLICY, folder=tmp_path) as on:
        models = (await ask(on, "GET", "/models", admin="eve")).json()["data"]
        fast = next(model for model in models if model["name"] == "fast")
        assert (fast["targets"], fast["max_output_tokens"]) == (
            [{"upstream": "simulated", "model": "gpt-4o-mini", "weight": 1}],
            100,
        )
        await on.post(CHAT, {**chat(), "metadata": {"simulate": "status=429"}})
        on.server.live.events.on_watching()  # so that the status is written at once
        await on.server.live.exchange.run()
        reply = await ask(on, "GET", "/upstreams", admin="eve")
        [upstream] = reply.json()["data"]
        assert (upstream["name"], upstream["kind"], upstream["has_api_key"]) == ("simulated", "simulator", True)
        [state] = upstream["states"]
        assert state["replica"] == on.server.ledger.owner
        assert state["cooldown_until_at"] == NOON + 1000
        assert state["last_failure"]["reason"] == "status 429"
        assert (upstream["max_in_flight"], state["in_flight"], state["waiting"]) == (None, 0, 0)
        assert UPSTREAM_KEY not in reply.body.decode()
        for path in ("/models", "/upstreams", "/replicas", "/policy"):
            assert problem(await ask(on, "GET", path, admin="max")) == (403, "forbidden")


async def test_the_policy_says_what_is_in_force_and_what_the_last_reload_did(tmp_path: Path) -> None:
    """And each process which one it has. A file with mistakes changes nothing."""
    async with stage(POLICY, folder=tmp_path) as on:
        before = (await ask(on, "GET", "/policy", admin="eve")).json()
        assert (before["hash"], before["made_version"]) == (before["file_hash"], 0)
        assert (before["combine"], before["groups"]) == ("any_group", ["staff", "lab"])
        assert any("staff" in sentence for sentence in before["sentences"])
        await make_quota(on, "lab/other", tokens=5, per="1h", models=["other"])
        on.server.live.events.on_watching()
        await on.server.live.exchange.run()
        after = (await ask(on, "GET", "/policy")).json()
        assert after["hash"] != after["file_hash"] == before["file_hash"]
        assert after["hashes"] == {on.server.ledger.owner: after["hash"]}
        [replica] = (await ask(on, "GET", "/replicas", admin="eve")).json()["data"]
        assert (replica["replica"], replica["status"]["policy"]) == (on.server.ledger.owner, after["hash"])

        def fail() -> Any:
            raise BadConfig([Diagnostic("quotas.yaml", 3, "wrong")])

        on.server.policies._load = fail
        on.clock.ms += 5
        await on.server.policies.reload()
        failed = (await ask(on, "GET", "/policy")).json()
        assert (failed["hash"], failed["last_reload"]["at"]) == (after["hash"], NOON + 5)
        assert "quotas.yaml:3" in str(failed["last_reload"]["mistakes"])


async def test_a_check_says_what_a_file_would_change(tmp_path: Path) -> None:
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "lab/other", tokens=5, per="1h")
        text = """
upstreams: {a: {base_url: "http://127.0.0.1:9"}}
groups:
  staff: {quotas: {daily: {tokens: 5, per: day}, weekly: {tokens: 9, per: week}}}
users: {alice: {groups: [staff]}, carl: {groups: [staff]}}
"""
        found = (await ask(on, "POST", "/policy/check", json={"yaml": text})).json()
        assert found["mistakes"] == []
        assert (found["quotas_added"], found["quotas_changed"]) == (["staff/weekly"], ["staff/daily"])
        assert (found["groups_removed"], found["quotas_removed"]) == (["lab"], ["lab/daily", "lab/other"])
        assert (found["users_added"], found["users_removed"]) == (["carl"], ["bob"])
        assert found["without_effect"] == {"lab/other": 'there is no group "lab"'}
        found = (await ask(on, "POST", "/policy/check", json={"yaml": "foo: 3"})).json()
        assert found["mistakes"][0]["line"] == 1


# ------------------------------------------------------------------------------------------------------ the audit log


@pytest.mark.every_engine
async def test_the_audit_log_is_filtered_paged_and_exported(tmp_path: Path) -> None:
    async with stage(POLICY, folder=tmp_path) as on:
        for number, group in enumerate(("staff", "lab", "staff")):
            await make_quota(on, f"{group}/q{number}", tokens=5, per="1h", models=["other"])
            on.clock.ms += HOUR
        await change(on, "DELETE", "/groups/lab/quotas/q1")

        async def targets(query: str, admin: str = "eve") -> list[str]:
            rows = (await ask(on, "GET", f"/audit{query}", admin=admin)).json()["data"]
            return [row["target"] for row in rows]

        assert await targets("") == ["lab/q1", "staff/q2", "lab/q1", "staff/q0"]
        assert await targets("", "max") == ["staff/q2", "staff/q0"]
        assert await targets("?action=quota.delete") == ["lab/q1"]
        assert await targets("?target=lab/q1") == ["lab/q1", "lab/q1"]
        assert await targets("?target=lab/q1", "max") == []
        assert await targets("?actor=admin:eve") == []
        assert await targets(f"?since={NOON + 2 * HOUR}") == ["lab/q1", "staff/q2"]
        assert await targets(f"?until={NOON + HOUR}") == ["staff/q0"]
        page = (await ask(on, "GET", "/audit?limit=3")).json()
        rest = (await ask(on, "GET", f"/audit?limit=3&after={page['next']}")).json()
        assert [row["target"] for row in page["data"] + rest["data"]] == await targets("")
        assert rest["next"] is None
        reply = await ask(on, "GET", "/audit?format=csv", admin="eve")
        assert [row["target"] for row in csv.DictReader(io.StringIO(reply.body.decode()))] == await targets("")


# ------------------------------------------------------------------------------------------------------------- events


@pytest.mark.every_engine
async def test_a_stream_shows_calls_counters_refusals_and_changes_of_others(tmp_path: Path) -> None:
    """And is resumed after the last event that was read, so nothing is missed or shown twice."""
    async with stage(POLICY.replace("requests: 100k", "requests: 1"), folder=tmp_path) as on:
        reader = await watch(on, "eve")
        name, snapshot = await reader.next()
        assert (name, snapshot["calls"], snapshot["health"]["ledger"]) == ("snapshot", [], "ok")
        await call(on)
        begun = await reader.until("calls")
        assert [(each["user"], each["model"]) for each in begun["begun"]] == [("alice", "fast")]
        counter = (await reader.until("counters"))["counters"][0]
        assert (counter["user"], counter["quota"]) == ("alice", "staff/daily")
        await on.all_settled()
        refused = await on.post(CHAT, chat())
        found = await reader.until("refusals")
        assert [each["request_id"] for each in found["refusals"]] == [refused.headers["x-request-id"]]
        last_id = reader.last_id
        reader.response.close()
        await make_quota(on, "staff/other", tokens=5, per="1h", models=["other"])
        resumed = await watch(on, "eve", headers={"last-event-id": last_id})
        changed = await resumed.until("change")
        assert (changed["actor"], changed["action"], changed["target"]) == ("admin:ops", "quota.set", "staff/other")


@pytest.mark.every_engine
async def test_a_stream_ends_with_its_key_and_with_its_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at every few seconds. What a manager of other groups may see changes too."""
    monkeypatch.setattr(events, "_CHECK_S", 0.0)
    async with stage(POLICY, folder=tmp_path) as on:
        made = (await ask(on, "POST", "/admin-keys", json={"name": "ann", "role": "viewer"})).json()
        sent = {"authorization": f"Bearer {made['key']}"}
        cookie = (await ask(on, "POST", "/session", headers=sent)).headers["set-cookie"].partition(";")[0]
        by_key = await watch(on, key=made["key"])
        response = await on.http.get(f"{on.admin_url}/admin/api/events", headers={"cookie": cookie})
        on.streams.append(response)
        assert response.status == 200
        await by_key.next()
        await call(on)
        await by_key.until("calls")
        of_key = f"/admin-keys/{made['id']}"
        assert (await change(on, "POST", f"{of_key}/revoke", of=of_key)).status == 200
        await by_key.to_end()
        await response.read()
        assert (await on.http.get(f"{on.admin_url}/admin/api/events", headers={"cookie": cookie})).status == 401
