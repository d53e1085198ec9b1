"""`GET /v1/models` lists what its caller may call, also in an open policy (T100)."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from tests.bare_upstream import connections
from tests.stage import STAFF, Stage, fast_timers, key_of, stage

LISTED = ["gpt-4o", "o3", "claude-x", "ft:gpt-4o:acme::abc", "../../x", "text-embedding-3-small"]
# No `models`: every name goes to the upstream.
OPEN = """
groups:
  staff: {quotas: {daily: {tokens: 1M, per: day}}}
  lab: {models: ["gpt-*", "gpt-lab", "ft:gpt-4o:acme::lab"], quotas: {daily: {tokens: 1M, per: day}}}
  narrow: {quotas: {daily: {models: ["o*", "gpt-4.1", "text-*"], tokens: 1M, per: day}}}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
  bob: {groups: [lab], keys: ["key-of-bob-0123456789abcdef"]}
  carol: {groups: [narrow], keys: ["key-of-carol-0123456789abcdef"]}
"""


class ListingUpstream:
    """An upstream that lists `models` when `gate` is open, and answers every POST with one word."""

    def __init__(self, models: list[Any]) -> None:
        self.models = models
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head.split(" HTTP/")[0])
        length = int(head.lower().partition("content-length:")[2].split("\r\n")[0])
        await reader.readexactly(length)
        if head.startswith("GET"):
            await self.gate.wait()
            data = [{"id": each, "object": "model"} if isinstance(each, str) else each for each in self.models]
            body = json.dumps({"object": "list", "data": data, "has_more": False}).encode()
        else:
            usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
            choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
            body = json.dumps({"id": "c", "choices": [choice], "usage": usage}).encode()
        lines = ("HTTP/1.1 200 OK", "Content-Type: application/json", f"Content-Length: {len(body)}", "", "")
        writer.write("\r\n".join(lines).encode() + body)
        writer.close()


@asynccontextmanager
async def listing_stage(
    folder: Path, policy: str = OPEN, models: list[Any] = LISTED, **more: Any
) -> AsyncIterator[tuple[Stage, ListingUpstream]]:
    """A stage in front of an upstream that lists these models."""
    source = ListingUpstream(models)
    async with (
        connections(source.serve) as port,
        stage(policy, folder=folder, upstream=f"http://127.0.0.1:{port}/v1", **more) as on,
    ):
        yield on, source
        source.gate.set()


async def names(on: Stage, user: str = "alice") -> list[str]:
    """The ids that this user's list has."""
    reply = await on.get("/v1/models", user=user)
    assert reply.status == 200
    return [model["id"] for model in reply.json()["data"]]


async def test_an_open_policy_lists_the_upstream_s_models_that_the_user_may_call(tmp_path: Path) -> None:
    """Beside the plain names in the user's quotas and lists, first. Names that show the account are left out."""
    async with listing_stage(tmp_path) as (on, source):
        assert await names(on) == ["gpt-4o", "o3", "claude-x", "text-embedding-3-small"]
        assert await names(on, "bob") == ["gpt-lab", "ft:gpt-4o:acme::lab", "gpt-4o"]
        assert await names(on, "carol") == ["gpt-4.1", "o3", "text-embedding-3-small"]
        assert source.requests == ["GET /v1/models"]
        for user in ("alice", "bob", "carol"):
            for name in await names(on, user):
                body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
                assert (await on.post("/v1/chat/completions", body, user=user)).status == 200
                assert (await on.get(f"/v1/models/{name}", user=user)).json()["id"] == name


async def test_listed_models_come_first_and_show_fine_tuned_ones(tmp_path: Path) -> None:
    """With `"*"`, `models:` is an open list too."""
    policy = 'models: {fast: {upstream: simulated, model: o3}, "ft:gpt-4o:acme::abc": {}, "*": {}}\n' + OPEN
    async with listing_stage(tmp_path, policy) as (on, _):
        assert await names(on) == [
            "fast",
            "ft:gpt-4o:acme::abc",
            "gpt-4o",
            "o3",
            "claude-x",
            "text-embedding-3-small",
        ]
        assert await names(on, "bob") == ["gpt-lab", "ft:gpt-4o:acme::lab", "gpt-4o"]


async def test_a_closed_list_is_listed_without_the_upstream(tmp_path: Path) -> None:
    """It is the whole truth."""
    async with listing_stage(tmp_path, STAFF) as (on, source):
        assert await names(on) == ["gpt-4o-mini", "fast"]
        assert source.requests == []


async def test_an_upstream_that_hangs_delays_the_first_list_by_two_seconds_at_most(tmp_path: Path) -> None:
    """Until then the list has the configured names, and afterwards those of the upstream."""
    async with listing_stage(tmp_path) as (on, source):
        source.gate.clear()
        with fast_timers(5):
            assert await names(on, "bob") == ["gpt-lab", "ft:gpt-4o:acme::lab"]
        source.gate.set()
        while "gpt-4o" not in await names(on, "bob"):
            pass
        assert source.requests == ["GET /v1/models"]


@pytest.mark.parametrize("name", ["../../x", "..%2f..%2fx", "a/../b", "%20gpt-4o", "gpt-4o%0a", "x" * 300, "."])
@pytest.mark.parametrize("policy", [OPEN, 'models: {"*": {}}\n' + OPEN], ids=["open", "star"])
async def test_a_name_that_no_call_could_have_is_not_confirmed(name: str, policy: str, tmp_path: Path) -> None:
    """The same names are refused in a call."""
    async with listing_stage(tmp_path, policy) as (on, _):
        reply = await on.get(f"/v1/models/{name.replace('../', '%2e%2e%2f')}")
        assert reply.status == 404


async def test_a_name_is_confirmed_if_the_user_may_call_it(tmp_path: Path) -> None:
    """An open policy takes any name, listed or not, that the user's groups and quotas cover."""
    async with listing_stage(tmp_path) as (on, source):
        for user, name, status in (
            ("alice", "gpt-9", 200),
            ("alice", "openai/gpt-9", 200),
            ("bob", "gpt-9", 200),
            ("bob", "o3", 404),
            ("carol", "o3", 200),
            ("carol", "gpt-4o", 404),
        ):
            reply = await on.get(f"/v1/models/{name}", user=user)
            assert (reply.status, user, name) == (status, user, name)
            if status == 404:
                assert reply.error["code"] == "model_not_found"
        assert source.requests == []


def _as_open_webui(key: str) -> tuple[str, Mapping[str, str]]:
    """How Open WebUI lists the models of a connection: `{base URL}/models`, for each signed-in user."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json", "x-openwebui-user-name": "Al"}
    return "/v1/models", headers


def _as_librechat(key: str) -> tuple[str, Mapping[str, str]]:
    """How LibreChat does for a custom endpoint with `fetch: true`; it gives up after 5 s."""
    return "/v1/models?user=abc", {"authorization": f"Bearer {key}", "accept": "application/json, text/plain, */*"}


def _as_librechat_for_anthropic(key: str) -> tuple[str, Mapping[str, str]]:
    """How LibreChat does for its Anthropic endpoint."""
    return "/v1/models", {"x-api-key": key, "anthropic-version": "2023-06-01"}


@pytest.mark.parametrize("client", [_as_open_webui, _as_librechat, _as_librechat_for_anthropic])
async def test_the_lists_of_chat_clients_show_the_upstream_s_models(client: Any, tmp_path: Path) -> None:
    """They read `data[].id`, and also on a base URL without /v1."""
    async with listing_stage(tmp_path) as (on, _):
        path, headers = client(key_of("alice"))
        for prefix in ("", "/v1"):
            async with on.http.get(on.url + path.removeprefix(prefix), headers=headers) as response:
                listed = await response.json()
            assert [model["id"] for model in listed["data"]] == ["gpt-4o", "o3", "claude-x", "text-embedding-3-small"]
            assert listed["object"] == "list"


async def test_the_sdks_of_both_vendors_list_the_models(tmp_path: Path) -> None:
    """Anthropic's reads its own members and does not ask for a second page."""
    async with listing_stage(tmp_path, kind="anthropic", models=["claude-x", "claude-y"]) as (on, source):
        assert [model.id async for model in on.sdk().models.list()] == ["claude-x", "claude-y"]
        async with AsyncAnthropic(base_url=on.url, api_key=key_of("alice"), max_retries=0) as anthropic:
            page = await anthropic.models.list()
            assert (page.has_more, page.first_id, page.last_id) == (False, "claude-x", "claude-y")
            assert [(model.id, model.type, model.display_name) async for model in page] == [
                ("claude-x", "model", "claude-x"),
                ("claude-y", "model", "claude-y"),
            ]
            assert (await anthropic.models.retrieve("claude-y")).type == "model"
        assert source.requests == ["GET /v1/models?limit=1000"]


@pytest.mark.parametrize(("configured", "held"), [("", 8192), (", context: 2000", 2000)])
async def test_hidden_input_is_bounded_by_the_context_that_the_upstream_states(
    configured: str, held: int, tmp_path: Path
) -> None:
    """Where the configuration states none, from the first call on. Other calls do not ask for the list."""
    policy = f"models: {{fast: {{upstream: simulated, model: m{configured}}}}}\n" + OPEN
    models = [{"id": "m", "max_model_len": 8192}]
    async with listing_stage(tmp_path, policy, models, kind="vllm") as (on, source):
        video = {"type": "video_url", "video_url": {"url": "https://example.com/v.mp4"}}
        ask = {"model": "fast", "max_tokens": 10, "messages": [{"role": "user", "content": "Hi"}]}
        assert (await on.post("/v1/chat/completions", ask)).status == 200
        assert source.requests == ["POST /v1/chat/completions"]
        ask["messages"] = [{"role": "user", "content": [video]}]
        for _ in range(2):
            assert (await on.post("/v1/chat/completions", ask)).status == 200
        lists = [] if configured else ["GET /v1/models"]
        assert source.requests[1:] == [*lists, *["POST /v1/chat/completions"] * 2]
        assert sorted(row["hold_input"] for row in await on.rows("calls"))[1:] == [held, held]
