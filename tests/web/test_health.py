"""Liveness and readiness on both listeners, without a key."""

from pathlib import Path

from tests.stage import stage


async def test_both_listeners_answer_without_a_key(tmp_path: Path) -> None:
    """Readiness has the hash of the policy in force, so an operator can watch a rollout."""
    async with stage(folder=tmp_path) as on:
        for url in (on.url, on.admin_url):
            async with on.http.get(f"{url}/healthz") as response:
                assert (response.status, await response.json()) == (200, {"status": "ok"})
            async with on.http.get(f"{url}/readyz") as response:
                state = await response.json()
        assert state == {"status": "ready", "ledger": "ok", "policy": on.server.policies.current.policy.hash}


async def test_without_its_database_the_proxy_is_live_but_not_ready(tmp_path: Path) -> None:
    """A restart of the process would not bring the database back."""
    async with stage(folder=tmp_path) as on:
        on.server.ledger.is_healthy = False
        reply = await on.get("/readyz", user=None)
        assert (reply.status, reply.json()["ledger"]) == (503, "unavailable")
        assert (await on.get("/healthz", user=None)).status == 200
