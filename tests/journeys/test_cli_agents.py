"""What Codex and Claude Code send, replayed as it was recorded: it gets through, is charged, and meets its limit in
the words that each of them understands. tests/recorded/README.md says how the requests were taken.
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


def recorded(name: str, *, method: str = "POST") -> list[Any]:
    """The requests of one program that are to get through."""
    taken = json.loads((Path(__file__).parents[1] / "recorded" / f"{name}.json").read_text())
    return [one for one in taken if one["method"] == method and one["what"] != WEB_SEARCH_ON]


def agents(name: str, folder: Path, *, limit: int = 9, per: str = "day") -> AbstractAsyncContextManager[Stage]:
    """A stage with the upstream that this program needs, and so many requests for alice."""
    policy = POLICY.replace("LIMIT", str(limit)).replace("PER", per)
    return stage(policy, folder=folder, kind="openai" if name == CODEX else "anthropic")


async def replay(on: Stage, one: Any, *, coding: str | None = None) -> Reply:
    """Send it as it was sent, with alice's key."""
    body, headers = json.dumps(one["body"]).encode(), dict(one["headers"])
    if coding == "zstd":
        body, headers["content-encoding"] = zstd.compress(body), coding
    return await on.post(one["path"], body, headers=headers)


@pytest.mark.parametrize("name", [CODEX, CLAUDE])
async def test_a_session_gets_through_and_is_charged(name: str, tmp_path: Path) -> None:
    """Each turn is sent on with every field that it had, and the books have what the upstream reported."""
    async with agents(name, tmp_path) as on:
        for one in recorded(name):
            reply = await replay(on, one)
            assert reply.status == 200, one["what"]
            assert b"completed" in reply.body or b"message_stop" in reply.body
            assert json.loads(on.simulator.requests[-1].body) == one["body"]
        given = on.simulator.reported_usage
        assert given.calls == len(recorded(name)) > 1
        assert await on.used() == (given.input_tokens + given.output_tokens, 0)
        assert {call["provenance"] for call in await on.rows("calls")} == {"exactly"}
        await on.audit()


async def test_codex_may_pack_its_requests(tmp_path: Path) -> None:
    """With zstd, as it does where it is logged in."""
    async with agents(CODEX, tmp_path) as on:
        first, *_ = recorded(CODEX)
        assert (await replay(on, first, coding="zstd")).status == 200
        assert json.loads(on.simulator.requests[-1].body) == first["body"]


async def test_codex_goes_on_without_a_websocket(tmp_path: Path) -> None:
    """It tries one first where its provider says so; the 426 sends it to the same path over HTTP."""
    async with agents(CODEX, tmp_path) as on:
        [attempt] = recorded(CODEX, method="GET")
        headers = {**attempt["headers"], "connection": "Upgrade", "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        async with on.http.get(on.url + attempt["path"], headers=headers) as response:
            assert response.status == 426


async def test_codex_has_to_leave_the_upstream_s_search_alone(tmp_path: Path) -> None:
    """It offers web_search unless its user turns that off; the answer names the tool."""
    async with agents(CODEX, tmp_path) as on:
        taken = json.loads((Path(__file__).parents[1] / "recorded" / f"{CODEX}.json").read_text())
        [one] = [one for one in taken if one["what"] == WEB_SEARCH_ON]
        reply = await replay(on, one)
        assert (reply.status, reply.error["param"]) == (400, "tools")
        assert '"allow: {tools: [web_search]}"' in reply.error["message"]
        assert on.simulator.received == 0


async def test_claude_code_gets_the_betas_that_its_fields_need(tmp_path: Path) -> None:
    """All that it asks for but the one by which a long input costs more."""
    async with agents(CLAUDE, tmp_path) as on:
        for one in recorded(CLAUDE):
            await replay(on, one)
            asked = one["headers"]["anthropic-beta"].split(",")
            sent = on.simulator.requests[-1].headers["anthropic-beta"].split(",")
            assert sent == [beta for beta in asked if beta != "context-1m-2025-08-07"]
            assert "context-management-2025-06-27" in sent


async def test_at_the_limit_codex_shows_the_quota_and_its_reset(tmp_path: Path) -> None:
    """By this type, an instant in seconds and a header; it asks once and stops."""
    async with agents(CODEX, tmp_path, limit=1) as on:
        first, second = recorded(CODEX)
        await replay(on, first)
        reply = await replay(on, second)
        assert (reply.status, reply.error["type"]) == (429, "usage_limit_reached")
        assert reply.error["resets_at"] == (await on.quota("staff/daily"))["window"]["resets_at"]
        said = 'Quota "staff/daily" is used up: 1 of 1 requests (https://llm.example/usage)'
        assert reply.headers["x-codex-promo-message"] == said


async def test_at_the_limit_claude_code_shows_our_words(tmp_path: Path) -> None:
    """The message of the error, whole; told not to, it does not ask again."""
    async with agents(CLAUDE, tmp_path, limit=1) as on:
        first, second, *_ = recorded(CLAUDE)
        await replay(on, first)
        reply = await replay(on, second)
        assert (reply.status, reply.headers["x-should-retry"]) == (429, "false")
        answer = reply.json()
        assert (answer["type"], answer["error"]["type"]) == ("error", "rate_limit_error")
        assert answer["error"]["message"].startswith('Quota "staff/daily" is used up: 1 of 1 requests. Resets at ')


@pytest.mark.parametrize("name", [CODEX, CLAUDE])
async def test_a_short_wait_is_slept_through(name: str, tmp_path: Path) -> None:
    """Both wait for as long as the head says, and their next try is let in."""
    async with agents(name, tmp_path, limit=1, per="45s") as on:
        first, second, *_ = recorded(name)
        await replay(on, first)
        reply = await replay(on, second)
        assert (reply.status, reply.headers.get("x-should-retry")) == (429, None)
        on.clock.ms += 1000 * int(reply.headers["retry-after"])
        assert (await replay(on, second)).status == 200
