"""The admin listener serves metrics and health, and nothing of the API."""

from pathlib import Path
from typing import Any

from tests.stage import UPSTREAM_KEY, key_of, stage


async def test_metrics_count_calls_and_tokens_and_contain_no_secret(tmp_path: Path) -> None:
    """T91: by model and outcome. They contain no key, no user name, and no model name that a client made up."""
    body: dict[str, Any] = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}]}
    async with stage(folder=tmp_path) as on:
        total = (await on.post("/v1/chat/completions", body)).json()["usage"]
        await on.post("/v1/chat/completions", {**body, "model": "made-up"})
        async with on.http.get(f"{on.admin_url}/metrics") as response:
            assert response.status == 200
            text = await response.text()
        assert 'llm_quota_calls_total{endpoint="chat",model="fast",outcome="complete"} 1.0' in text
        assert f'direction="output",model="fast",provenance="exactly"}} {float(total["completion_tokens"])}' in text
        assert "llm_quota_calls_in_flight 0.0" in text
        for secret in (UPSTREAM_KEY, key_of("alice"), "alice", "made-up"):
            assert secret not in text


async def test_the_admin_listener_does_not_serve_the_api(tmp_path: Path) -> None:
    """T91: a path of the API is a 404, also with a valid key."""
    async with stage(folder=tmp_path) as on:
        headers = {"authorization": f"Bearer {key_of('alice')}"}
        async with on.http.get(f"{on.admin_url}/v1/models", headers=headers) as response:
            assert response.status == 404
            assert response.content_type == "application/problem+json"
            assert (await response.json())["type"] == "/admin/api/problems/not-found"
