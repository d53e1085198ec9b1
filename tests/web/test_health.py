"""Liveness and readiness on both listeners, without a key."""

from pathlib import Path

from tests.stage import stage


async def test_both_listeners_answer_without_a_key(tmp_path: Path) -> None:
    """Readiness names the policy in force, so a rollout can be watched."""
    async with stage(folder=tmp_path) as on:
        for url in (on.url, on.admin_url):
            async with on.http.get(f"{url}/healthz") as response:
                assert (response.status, await response.json()) == (200, {"status": "ok"})
            async with on.http.get(f"{url}/readyz") as response:
                state = await response.json()
        assert state == {"status": "ready", "ledger": "ok", "policy": on.server.policies.current.hash}


async def test_a_ledger_that_cannot_be_used_is_not_ready_but_alive(tmp_path: Path) -> None:
    """Killing the process would not bring the database back."""
    async with stage(folder=tmp_path) as on:
        on.server.ledger.is_healthy = False
        reply = await on.get("/readyz", user=None)
        assert (reply.status, reply.json()["ledger"]) == (503, "unavailable")
        assert (await on.get("/healthz", user=None)).status == 200
