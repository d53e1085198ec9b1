"""`server: {prefix: /llm}`: all paths of the API begin with it."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs
from yarl import URL

from tests.admin import ADMINS, ask
from tests.stage import STAFF, stage

CHAT = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


@pytest.mark.parametrize("base", ["/llm/v1", "/llm", "/llm/openai/v1", "/llm/openai"])
async def test_the_whole_api_is_served_below_the_prefix(tmp_path: Path, base: str) -> None:
    """Calls, models and the caller's quotas, with their queries. The log shows the paths as without a prefix."""
    async with stage(folder=tmp_path, prefix="/llm") as on:
        with capture_logs() as logged:
            assert (await on.post(f"{base}/chat/completions", CHAT)).status == 200
            assert (await on.get(f"{base}/models")).status == 200
            assert (await on.get(f"{base}/models/fast")).json()["id"] == "fast"
            assert (await on.get(f"{base}/quota")).json()["user"] == "alice"
            assert (await on.get(f"{base}/quota/usage?by=model&since=3d")).json()["by"] == "model"
            assert (await on.get(f"{base}/quota/usage?by=year")).status == 400
        shown = [line["endpoint"] for line in logged if line["event"] == "request"]
        assert f"GET {base.removeprefix('/llm')}/models" in shown
        assert not any("llm" in endpoint for endpoint in shown)


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/chat/completions", "/llmv1/chat/completions", "/LLM/v1/chat/completions", "/"]
)
async def test_other_paths_are_a_404_that_names_the_prefix(tmp_path: Path, path: str) -> None:
    """Nothing is sent to the upstream."""
    async with stage(folder=tmp_path, prefix="/llm") as on:
        reply = await on.post(path, CHAT)
        assert reply.status == 404
        assert "begin with /llm" in reply.error["message"]
        assert on.simulator.received == 0


@pytest.mark.parametrize(
    "path", ["/llm", "/llm/", "/llm?x=1", "/llm/v1/unknown", "/llm/llm/v1/models", "/llm/v1/files"]
)
async def test_what_is_not_served_below_the_prefix_is_a_404_too(tmp_path: Path, path: str) -> None:
    """With the messages that there are without a prefix."""
    async with stage(folder=tmp_path, prefix="/llm") as on:
        reply = await on.get(path)
        assert reply.status == 404
        assert "begin with /llm" not in reply.error["message"]


async def test_a_hint_names_the_path_with_the_prefix(tmp_path: Path) -> None:
    """So that it can be used as it is."""
    async with stage(folder=tmp_path, prefix="/llm") as on:
        reply = await on.post("/llm/v1//chat/completions", CHAT)
        assert reply.error["message"].startswith(
            "Invalid URL (POST /llm/v1//chat/completions). Use POST /llm/v1/chat/completions: "
        )


async def test_errors_of_anthropic_s_api_keep_their_shape_below_the_prefix(tmp_path: Path) -> None:
    """Also for a request without a key."""
    async with stage(folder=tmp_path, prefix="/llm") as on:
        reply = await on.post("/llm/v1/messages", {}, user=None)
        assert (reply.status, reply.json()["type"]) == (401, "error")


async def test_health_checks_are_served_with_the_prefix_and_without(tmp_path: Path) -> None:
    """A load balancer asks the process, and a monitor the address of the users. They have no line in the log."""
    async with stage(folder=tmp_path, prefix="/team-a/llm") as on:
        with capture_logs() as logged:
            for path in ("/healthz", "/readyz", "/team-a/llm/healthz", "/team-a/llm/readyz"):
                assert (await on.get(path, user=None)).status == 200
        assert [line for line in logged if line["event"] == "request"] == []
        async with on.http.get(f"{on.admin_url}/healthz") as response:
            assert response.status == 200
        async with on.http.get(f"{on.admin_url}/team-a/llm/healthz") as response:
            assert response.status == 404


async def test_the_page_of_users_and_its_files_are_below_the_prefix(tmp_path: Path) -> None:
    """Its addresses are relative, so they need no change."""
    async with stage(folder=tmp_path, prefix="/llm") as on:
        for path in ("/usage", "/usage/common/api.js", "/usage/usage/app.js"):
            assert (await on.get(f"/llm{path}", user=None)).status == 200
            assert (await on.get(path, user=None)).status == 404


async def test_administrators_are_shown_the_address_with_the_prefix(tmp_path: Path) -> None:
    """At the host by which they address the admin page."""
    async with stage(f"{STAFF}{ADMINS}", folder=tmp_path, prefix="/llm") as on:
        assert on.server.api is not None
        session = (await ask(on, "GET", "/session")).json()
        assert session["api_url"] == f"http://127.0.0.1:{on.server.api.port}/llm/v1"
    async with stage(f"{STAFF}{ADMINS}", folder=tmp_path, prefix="/llm", admin_url="https://q.example") as on:
        assert on.server.api is not None
        session = (await ask(on, "GET", "/session", admin="ops", headers={"host": "q.example"})).json()
        assert session["api_url"] == f"https://q.example:{on.server.api.port}/llm/v1"


async def test_an_sdk_works_below_the_prefix(tmp_path: Path) -> None:
    """Its base URL ends in the prefix and /v1."""
    async with stage(folder=tmp_path, prefix="/llm") as on:
        sdk = on.sdk(base_url=f"{on.url}/llm/v1")
        answer = await sdk.chat.completions.create(model="fast", messages=[{"role": "user", "content": "Hello"}])
        assert answer.choices
        assert [each async for each in sdk.models.list()]


async def test_slashes_after_the_prefix_are_no_error_of_ours(tmp_path: Path) -> None:
    """A client that joins base URL and path with two slashes gets a 404 as without a prefix."""
    async with stage(folder=tmp_path, prefix="/llm") as on:
        for path in ("/llm//v1/models", "/llm//", "/llm/v1//models"):
            async with on.http.get(URL(on.url + path, encoded=True)) as response:
                assert response.status == 404
