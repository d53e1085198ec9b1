"""Anthropic's endpoint with its official SDK, streamed or not: the reported usage is charged, and errors are raised.

docs/wire.md describes its usage (§1.3), its events (§2.5) and its client (§3.2 and §3.6).
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from anthropic import AsyncAnthropic

from proxy.calls.disconnect import Disconnects
from tests.stage import STAFF, UPSTREAM_KEY, Stage, key_of, stage

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

HELLO: Any = [{"role": "user", "content": "hello there"}]
INPUT_TOKENS = 5  # as the simulator counts: two words, and three for the message
LIMITED = STAFF.replace("tokens: 1M", "tokens: 300").replace("gpt-4o-mini: {", "gpt-4o-mini: {smallest_answer: 10, ")


def anthropic_stage(folder: Path, policy: str = STAFF, *, more: str = "") -> AbstractAsyncContextManager[Stage]:
    """A stage whose upstream has the kind `anthropic`."""
    return stage(policy, folder=folder, kind="anthropic", more=more)


@asynccontextmanager
async def client(on: Stage, user: str = "alice", **more: Any) -> AsyncIterator[AsyncAnthropic]:
    """The SDK with this user's key, without retries."""
    async with AsyncAnthropic(base_url=on.url, **{"api_key": key_of(user), "max_retries": 0, **more}) as sdk:
        yield sdk


def request(simulate: str = "tokens=7", **more: Any) -> dict[str, Any]:
    """A request with directives for the simulator."""
    return {
        "model": "gpt-4o-mini",
        "max_tokens": 50,
        "messages": HELLO,
        "metadata": {"simulate": simulate},
        **more,
    }


# ----------------------------------------------------------------------------------------------------------- charges


async def test_a_message_is_charged_as_its_usage_says(tmp_path: Path) -> None:
    """Tokens read from the cache and written to it are input too, in addition to `input_tokens`."""
    async with anthropic_stage(tmp_path) as on, client(on) as sdk:
        message = await sdk.messages.create(**request("tokens=7 cached=3"))
        assert (message.usage.input_tokens, message.usage.output_tokens) == (INPUT_TOKENS - 3, 7)
        assert (message.usage.cache_creation_input_tokens, message.usage.cache_read_input_tokens) == (2, 1)
        assert await on.used() == (INPUT_TOKENS + 7, 0)
        [call] = await on.rows("calls")
        assert (call["input_tokens"], call["output_tokens"], call["provenance"]) == (INPUT_TOKENS, 7, "exactly")
        assert (call["endpoint"], call["outcome"]) == ("messages", "complete")
        assert message._request_id == call["id"]
        await on.audit()


@pytest.mark.parametrize("simulate", ["tokens=7 cached=3", "tokens=7 cached=3 crlf"])
async def test_a_stream_is_charged_as_its_usage_says(simulate: str, tmp_path: Path) -> None:
    """The SDK assembles the whole answer, and the charge is committed before the SDK gets the last event."""
    async with anthropic_stage(tmp_path) as on, client(on) as sdk:
        async with sdk.messages.stream(**request(simulate)) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            message = await stream.get_final_message()
        assert await on.used() == (INPUT_TOKENS + 7, 0)
        assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 7)
        assert message.content[0].type == "text"
        assert message.content[0].text == text
        assert len(text.split()) == 7
        [call] = await on.rows("calls")
        assert (call["provenance"], call["outcome"]) == ("exactly", "complete")
        await on.audit()


async def test_counting_tokens_costs_nothing(tmp_path: Path) -> None:
    """Neither tokens nor a request, because no model runs."""
    async with anthropic_stage(tmp_path) as on, client(on) as sdk:
        counted = await sdk.messages.count_tokens(model="gpt-4o-mini", messages=HELLO, system="be brief")
        assert counted.input_tokens == INPUT_TOKENS + 2
        assert await on.used() == (0, 0)
        assert (await on.quota("staff/daily"))["requests"]["used"] == 0


async def test_the_proxy_counts_a_message_without_usage(tmp_path: Path) -> None:
    """Streamed or not, from a server that is otherwise compatible with Anthropic's."""
    async with anthropic_stage(tmp_path) as on, client(on) as sdk:
        await sdk.messages.create(**request("tokens=7 no_usage"))
        raw = await sdk.messages.create(**request("tokens=7 no_usage"), stream=True)
        assert [event.type async for event in raw][-1] == "message_stop"
        first, second = await on.rows("calls")
        assert first["provenance"] == second["provenance"] == "at_least"
        assert 7 <= first["output_tokens"] <= second["output_tokens"] <= 14
        await on.audit()


# ----------------------------------------------------------------------------------------- requests to the upstream


async def test_the_upstream_gets_our_key_and_the_client_s_version(tmp_path: Path) -> None:
    """In Anthropic's headers. Only betas that the operator allows are sent on, and no header with the user's key."""
    async with anthropic_stage(tmp_path, more=", allow: {betas: [context-1m-2025-08-07]}") as on, client(on) as sdk:
        betas = {"anthropic-beta": "files-api-2025-04-14,context-1m-2025-08-07"}
        await sdk.messages.create(**request(), extra_headers=betas)
        await on.post("/v1/messages", request(), headers={"x-api-key": key_of("alice")}, user=None)
        first, second = (request.headers for request in on.simulator.requests)
        assert first["x-api-key"] == second["x-api-key"] == UPSTREAM_KEY
        assert first["anthropic-version"] == anthropic._constants.ANTHROPIC_API_VERSION
        assert first["anthropic-beta"] == "context-1m-2025-08-07"
        assert second["anthropic-version"] == "2023-06-01"
        assert "authorization" not in first
        assert key_of("alice") not in str([*first.items(), *second.items()])
        assert [request.path for request in on.simulator.requests] == ["/v1/messages"] * 2


async def test_requests_are_not_translated_between_vendors(tmp_path: Path) -> None:
    """A model of Anthropic's kind on OpenAI's endpoint, and the reverse: the 400 names the right endpoint."""
    async with anthropic_stage(tmp_path) as on:
        with pytest.raises(openai.BadRequestError, match="send it to /v1/messages"):
            await on.sdk().chat.completions.create(model="fast", messages=HELLO)
        assert on.simulator.received == 0
    (tmp_path / "quotas.db").unlink(missing_ok=True)
    async with stage(STAFF, folder=tmp_path, kind="openai") as on, client(on) as sdk:
        with pytest.raises(anthropic.BadRequestError, match="send it to /v1/chat/completions"):
            await sdk.messages.create(**request())
        assert on.simulator.received == 0
        assert await on.used() == (0, 0)


# ------------------------------------------------------------------------------------------------------------ errors


async def test_a_wrong_request_raises_the_exception_of_its_status(tmp_path: Path) -> None:
    """With Anthropic's error type and a request id. The request does not reach the upstream."""
    async with anthropic_stage(tmp_path) as on, client(on) as sdk, client(on, api_key="sk-of-nobody") as unknown_sdk:
        with pytest.raises(anthropic.AuthenticationError) as unknown:
            await unknown_sdk.messages.create(**request())
        with pytest.raises(anthropic.NotFoundError) as missing:
            await sdk.messages.create(**request(model="claude-9"))
        with pytest.raises(anthropic.BadRequestError) as hosted:
            await sdk.messages.create(**request(tools=[{"type": "web_search_20250305", "name": "web_search"}]))
        with pytest.raises(anthropic.NotFoundError, match="one by one") as batched:
            await sdk.messages.batches.list()
        with pytest.raises(anthropic.APIStatusError) as large:
            await sdk.messages.create(**request(system="x" * (32 * 2**20)))
        raised = [error.value for error in (unknown, missing, hosted, batched, large)]
        assert [(error.status_code, error.type) for error in raised] == [
            (401, "authentication_error"),
            (404, "not_found_error"),
            (400, "invalid_request_error"),
            (404, "not_found_error"),
            (413, "request_too_large"),
        ]
        for error in raised:
            assert isinstance(error.body, dict)
            assert error.request_id == error.body["request_id"]
        assert on.simulator.received == 0
        assert await on.used() == (0, 0)


async def test_a_quota_that_is_used_up_raises_with_its_reset(tmp_path: Path) -> None:
    """The SDK sends one request. Without `x-should-retry: false` it would sleep until the reset and try again."""
    policy = "smallest_answer: 100\n" + STAFF.replace("tokens: 1M", "tokens: 100")
    async with anthropic_stage(tmp_path, policy) as on, client(on, max_retries=2) as sdk:
        await sdk.messages.create(**request("tokens=50"))
        with pytest.raises(anthropic.RateLimitError, match="Resets at 2026-11-25T00:00:00") as refused:
            await sdk.messages.create(**request(max_tokens=80))
        assert isinstance(refused.value.body, dict)
        error = refused.value.body["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "insufficient_quota")
        assert (error["quota"], error["reset_at"]) == ("staff/daily", "2026-11-25T00:00:00+00:00")
        headers = refused.value.response.headers
        assert headers["anthropic-ratelimit-tokens-limit"] == "100"
        assert headers["anthropic-ratelimit-tokens-remaining"] == str(100 - 50 - INPUT_TOKENS)
        assert headers["anthropic-ratelimit-tokens-reset"] == "2026-11-25T00:00:00Z"
        assert (headers["x-should-retry"], headers["retry-after"]) == ("false", "43200")
        assert on.simulator.received == 1


@pytest.mark.parametrize(
    ("simulate", "status", "type"),
    [
        ("status=401", 502, "api_error"),
        ("status=429", 429, "rate_limit_error"),
        ("status=500", 500, "api_error"),
        ("status=529", 529, "overloaded_error"),
        ("html", 502, "api_error"),
    ],
)
async def test_a_failed_call_is_free(simulate: str, status: int, type: str, tmp_path: Path) -> None:
    """It raises an error of Anthropic's form, also if a load balancer answered. The proxy's key is never in it."""
    async with anthropic_stage(tmp_path) as on, client(on) as sdk:
        with pytest.raises(anthropic.APIStatusError) as failed:
            await sdk.messages.create(**request(simulate))
        assert (failed.value.status_code, failed.value.type) == (status, type)
        assert UPSTREAM_KEY[:8] not in str(failed.value.body)
        assert await on.used() == (0, 0)


async def test_a_400_from_the_upstream_costs_a_request(tmp_path: Path) -> None:
    """The client gets the upstream's message."""
    async with anthropic_stage(tmp_path) as on, client(on) as sdk:
        with pytest.raises(anthropic.BadRequestError, match="can't be answered as it is"):
            await sdk.messages.create(**request("status=400"))
        quota = await on.quota("staff/daily")
        assert (quota["tokens"]["used"], quota["requests"]["used"]) == (0, 1)


@pytest.mark.parametrize("simulate", ["tokens=9 error=4", "tokens=9 cut=4"])
async def test_a_stream_that_breaks_raises_and_is_charged_for_what_passed(simulate: str, tmp_path: Path) -> None:
    """With the upstream's own error, or with the proxy's if it broke off. The input and four words are charged."""
    async with anthropic_stage(tmp_path) as on, client(on) as sdk:
        words: list[str] = []
        with pytest.raises(anthropic.APIStatusError) as broken:
            async with sdk.messages.stream(**request(simulate)) as stream:
                words += [piece async for piece in stream.text_stream]
        assert broken.value.type in ("overloaded_error", "api_error")
        [call] = await on.rows("calls")
        charged = call["input_tokens"], call["provenance"], call["outcome"]
        assert charged == (INPUT_TOKENS, "at_least", "upstream_broke")
        assert call["output_tokens"] >= 4
        assert await on.used() == (INPUT_TOKENS + call["output_tokens"], 0)
        await on.audit()


# ------------------------------------------------------------------------------------------------------ at the limit


async def test_a_stream_that_the_proxy_ends_is_a_complete_message_for_the_sdk(tmp_path: Path) -> None:
    """Of 300 tokens a call that disconnects is charged 159, so the stream ends after 5 of input and 136 of output.

    It ends as if `max_tokens` had ended it, with the charged usage. The input is the number from its first event.
    """
    disconnects = Disconnects(drains_max=0)
    async with (
        stage(LIMITED, folder=tmp_path, kind="anthropic", disconnects=disconnects) as on,
        client(on) as sdk,
    ):
        other = on.begin("/v1/messages", request("hang", max_tokens=150))
        await on.simulator.until(lambda: on.simulator.received == 1)
        async with sdk.messages.stream(**request("tokens=250", max_tokens=250)) as stream:
            await on.hang_up(other)
            text = "".join([piece async for piece in stream.text_stream])
            message = await stream.get_final_message()
        assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == (
            "max_tokens",
            INPUT_TOKENS,
            136,
        )
        assert message.content[0].type == "text"
        assert message.content[0].text == text
        assert len(text.split()) == 135  # the first word, "waits", is two tokens by the proxy's count
        await on.all_settled()
        assert await on.used() == (300, 0)
        assert {call["outcome"] for call in await on.rows("calls")} == {"client_left", "at_limit"}
        await on.audit()


async def test_a_maximum_that_does_not_fit_is_lowered(tmp_path: Path) -> None:
    """The upstream gets the lower maximum and ends the answer itself. A header states the reason."""
    async with stage(LIMITED, folder=tmp_path, kind="anthropic") as on, client(on) as sdk:
        raw = await sdk.messages.with_raw_response.create(**request("tokens=900", max_tokens=900))
        message = await raw.parse()
        assert (message.stop_reason, raw.headers["x-quota-capped"]) == ("max_tokens", '291; quota="staff/daily"')
        assert (message.usage.output_tokens, await on.used()) == (291, (INPUT_TOKENS + 291, 0))
