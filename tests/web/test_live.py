"""The parts of a process that show what happens live, as the server connects them."""

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.config.document import Diagnostic
from proxy.config.loader import BadConfig
from proxy.policy.amounts import Measure
from proxy.policy.quota import Grant, grants_by_quota
from proxy.web.live import quota_in
from tests.builders import NOON, group, policy, quota
from tests.stage import stage

HELLO: Any = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.every_engine
async def test_a_process_writes_its_status(tmp_path: Path) -> None:
    """Its policy and last reload, its upstreams and which are in cooldown, how long commits take."""
    async with stage(folder=tmp_path) as on:
        await on.post("/v1/chat/completions", {**HELLO, "metadata": {"simulate": "status=429"}})
        on.server.live.events.on_watching()  # so that the status is written at once
        await on.server.live.exchange.run()
        [row] = await on.rows("replicas")
        status = json.loads(row["status"])
        assert row["owner"] == status["replica"] == on.server.ledger.owner
        assert row["at"] == NOON
        assert (status["ledger"], status["policy"]) == ("ok", on.server.policies.current.policy.hash)
        assert (status["reloaded_at"], status["reload_mistakes"], status["started_at"]) == (NOON, 0, NOON)
        assert status["commit_ms"] >= 0
        assert status["calls_in_flight"] == 0
        failure = {"at": NOON, "outcome": "limited", "reason": "status 429"}
        assert status["upstreams"] == [
            {
                "name": "simulated",
                "cooldown_until_at": NOON + 1000,
                "last_failure": failure,
                "in_flight": 0,
                "waiting": 0,
            }
        ]


async def test_a_failed_reload_is_shown_as_the_health_of_the_process(tmp_path: Path) -> None:
    """With the number of mistakes, and the hash of the policy that stays in force."""

    def fail() -> Any:
        raise BadConfig([Diagnostic("quotas.yaml", 3, "wrong")])

    async with stage(folder=tmp_path) as on:
        policies = on.server.policies
        policies._load = fail
        await policies.reload()
        health = on.server.live.events._health()
        assert (health["reload_mistakes"], health["policy"]) == (1, policies.current.policy.hash)


async def test_a_user_whose_limit_is_0_is_noted_too(tmp_path: Path) -> None:
    """The body of the request was not read, so the model is not known."""
    closed = """
models: {fast: {upstream: simulated, model: gpt-4o-mini}}
groups: {staff: {quotas: {daily: {tokens: 0, per: day}}}}
users: {alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
"""
    async with stage(closed, folder=tmp_path) as on:
        big = {"model": "fast", "messages": [{"role": "user", "content": "x" * 900_000}]}
        refused = await on.post("/v1/chat/completions", big)
        assert refused.status == 429
        await on.server.live.close()
        [row] = await on.rows("refusals")
        assert (row["request_id"], row["model"], row["maximum"]) == (refused.headers["x-request-id"], "other", 0)
        assert await on.rows("crossings") == []


def test_the_quota_of_a_counter_is_that_of_the_policy_in_force() -> None:
    """None if its group or the quota is gone."""
    daily = quota("staff/daily", tokens=5)
    rules = policy(group("staff", daily))
    assert quota_in(rules, ("user:ann", "staff/daily"), NOON) == daily
    assert quota_in(rules, ("user:ann", "staff/hourly"), NOON) is None
    assert quota_in(rules, ("user:ann", "lab/daily"), NOON) is None


def test_a_counter_is_shown_with_what_grants_have_added() -> None:
    """To whom they are given, and as long as they run."""
    daily, pot = quota("staff/daily", tokens=5), quota("staff/pot", tokens=5, shared=True)
    own = Grant("gr_1", "staff/daily", "ann", Measure.TOKENS, 3, NOON + 1)
    of_all = Grant("gr_2", "staff/pot", None, Measure.TOKENS, 4, NOON + 1)
    rules = policy(group("staff", daily, pot), grants=grants_by_quota([own, of_all]))

    def limit(subject: str, quota_id: str, at: int = NOON) -> int:
        found = quota_in(rules, (subject, quota_id), at)
        assert found is not None
        return found.limits[0].maximum

    assert limit("user:ann", "staff/daily") == 8
    assert limit("user:ann", "staff/daily", NOON + 1) == 5
    assert limit("user:bob", "staff/daily") == 5
    assert limit("~staff", "staff/pot") == 9
