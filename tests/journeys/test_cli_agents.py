"""Recorded requests of Codex and Claude Code: they are accepted and charged, and at a limit each gets its own error.

tests/recorded/README.md says how the requests were recorded.
"""

import json
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from tests.stage import Reply, Stage, key_of, stage

pytestmark = pytest.mark.journey

CODEX, CLAUDE = "codex-0.169.0", "claude-code-2.1.197"
POLICY = f"""
help: "https://llm.example/usage"
models: {{"*": {{upstream: simulated}}}}
groups:
  staff:
    quotas:
      daily: {{tokens: 1M, requests: LIMIT, per: PER}}
users:
  alice: {{groups: [staff], keys: ["{key_of("alice")}"]}}
"""
WEB_SEARCH_ON = "a first turn with web_search left on"


def all_recorded(name: str) -> list[Any]:
    """All recorded requests of one program."""
    return json.loads((Path(__file__).parents[1] / "recorded" / f"{name}.json").read_text())


def recorded(name: str, *, method: str = "POST") -> list[Any]:
    """The requests of one program that the proxy must accept."""
    return [each for each in all_recorded(name) if each["method"] == method and each["what"] != WEB_SEARCH_ON]


def agent_stage(name: str, folder: Path, *, limit: int = 9, per: str = "day") -> AbstractAsyncContextManager[Stage]:
    """A stage with the upstream that this program needs, and this many requests for alice."""
    policy = POLICY.replace("LIMIT", str(limit)).replace("PER", per)
    return stage(policy, folder=folder, kind="openai" if name == CODEX else "anthropic")


async def replay(on: Stage, request: Any, *, is_compressed: bool = False) -> Reply:
    """Send a recorded request again, with alice's key."""
    body, headers = json.dumps(request["body"]).encode(), dict(request["headers"])
    if is_compressed:
        body, headers["content-encoding"] = zstd.compress(body), "zstd"
    return await on.post(request["path"], body, headers=headers)


@pytest.mark.parametrize("name", [CODEX, CLAUDE])
async def test_a_session_is_accepted_and_charged(name: str, tmp_path: Path) -> None:
    """Each turn is sent on with all of its fields, and the usage that the upstream reports is charged."""
    async with agent_stage(name, tmp_path) as on:
        for request in recorded(name):
            reply = await replay(on, request)
            assert reply.status == 200, request["what"]
            assert b"completed" in reply.body or b"message_stop" in reply.body
            assert json.loads(on.simulator.requests[-1].body) == request["body"]
        given = on.simulator.reported_usage
        assert given.calls == len(recorded(name)) > 1
        assert await on.used() == (given.input_tokens + given.output_tokens, 0)
        assert {call["provenance"] for call in await on.rows("calls")} == {"exactly"}
        await on.audit()


async def test_codex_may_compress_its_requests(tmp_path: Path) -> None:
    """With zstd, as it does when its user is logged in."""
    async with agent_stage(CODEX, tmp_path) as on:
        first, *_ = recorded(CODEX)
        assert (await replay(on, first, is_compressed=True)).status == 200
        assert json.loads(on.simulator.requests[-1].body) == first["body"]


async def test_codex_goes_on_without_a_websocket(tmp_path: Path) -> None:
    """It tries one first if its provider's configuration says so. After the 426 it uses the same path over HTTP."""
    async with agent_stage(CODEX, tmp_path) as on:
        [attempt] = recorded(CODEX, method="GET")
        headers = {**attempt["headers"], "connection": "Upgrade", "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        async with on.http.get(on.url + attempt["path"], headers=headers) as response:
            assert response.status == 426


async def test_codex_may_not_use_the_upstream_s_web_search(tmp_path: Path) -> None:
    """Codex offers web_search to the model unless its user turns it off. The 400 names the tool and the setting."""
    async with agent_stage(CODEX, tmp_path) as on:
        [request] = [each for each in all_recorded(CODEX) if each["what"] == WEB_SEARCH_ON]
        reply = await replay(on, request)
        assert (reply.status, reply.error["param"]) == (400, "tools")
        assert '"allow: {tools: [web_search]}"' in reply.error["message"]
        assert on.simulator.received == 0


async def test_claude_code_gets_the_betas_that_its_fields_need(tmp_path: Path) -> None:
    """All betas that it asks for are sent on, except the one with which a long input costs more."""
    async with agent_stage(CLAUDE, tmp_path) as on:
        for request in recorded(CLAUDE):
            await replay(on, request)
            requested = request["headers"]["anthropic-beta"].split(",")
            sent = on.simulator.requests[-1].headers["anthropic-beta"].split(",")
            assert sent == [beta for beta in requested if beta != "context-1m-2025-08-07"]
            assert "context-management-2025-06-27" in sent


async def test_at_the_limit_codex_shows_the_quota_and_its_reset(tmp_path: Path) -> None:
    """It reads the error's type, the reset in seconds since 1970 and a header. It sends one request and stops."""
    async with agent_stage(CODEX, tmp_path, limit=1) as on:
        first, second = recorded(CODEX)
        await replay(on, first)
        reply = await replay(on, second)
        assert (reply.status, reply.error["type"]) == (429, "usage_limit_reached")
        assert reply.error["resets_at"] == (await on.quota("staff/daily"))["window"]["resets_at"]
        message = 'Quota "staff/daily" is used up: 1 of 1 requests (https://llm.example/usage)'
        assert reply.headers["x-codex-promo-message"] == message


async def test_at_the_limit_claude_code_shows_the_proxy_s_message(tmp_path: Path) -> None:
    """It shows the whole message of the error. `x-should-retry: false` tells it not to try again."""
    async with agent_stage(CLAUDE, tmp_path, limit=1) as on:
        first, second, *_ = recorded(CLAUDE)
        await replay(on, first)
        reply = await replay(on, second)
        assert (reply.status, reply.headers["x-should-retry"]) == (429, "false")
        answer = reply.json()
        assert (answer["type"], answer["error"]["type"]) == ("error", "rate_limit_error")
        assert answer["error"]["message"].startswith('Quota "staff/daily" is used up: 1 of 1 requests. Resets at ')


@pytest.mark.parametrize("name", [CODEX, CLAUDE])
async def test_an_agent_waits_until_a_short_window_ends(name: str, tmp_path: Path) -> None:
    """Both agents wait as long as `Retry-After` says, and their next request is admitted."""
    async with agent_stage(name, tmp_path, limit=1, per="45s") as on:
        first, second, *_ = recorded(name)
        await replay(on, first)
        reply = await replay(on, second)
        assert (reply.status, reply.headers.get("x-should-retry")) == (429, None)
        on.clock.ms += 1000 * int(reply.headers["retry-after"])
        assert (await replay(on, second)).status == 200
