"""The main job, as the official SDK sees it: answers as from the upstream itself, until the quota is up."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from tests.stage import STAFF, UPSTREAM_KEY, Stage, key_of, stage

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

HELLO: Any = [{"role": "user", "content": "Hello there, how are you?"}]

SMALL = STAFF.replace("tokens: 1M, requests: 100k", "tokens: 10k")


async def test_the_sdk_gets_its_answers_and_the_books_have_each_token(tmp_path: Path) -> None:
    """Models, chat, streams, completions, embeddings and responses work, and what they used is charged."""
    async with stage(folder=tmp_path) as on:
        sdk = on.sdk()
        assert [model.id async for model in sdk.models.list()] == ["gpt-4o-mini", "fast"]
        assert (await sdk.models.retrieve("fast")).id == "fast"
        total = 0
        chat = await sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=20)
        assert chat.usage and chat.choices[0].message.content
        total += chat.usage.total_tokens
        completion = await sdk.completions.create(model="gpt-4o-mini", prompt=["One", "Two"], max_tokens=5)
        assert completion.usage and len(completion.choices) == 2
        total += completion.usage.total_tokens
        embeddings = await sdk.embeddings.create(model="gpt-4o-mini", input=["One two three", "four"])
        assert len(embeddings.data) == 2
        total += embeddings.usage.total_tokens
        response = await sdk.responses.create(model="fast", input="Hello", max_output_tokens=16)
        assert response.usage and response.output_text
        total += response.usage.total_tokens
        async for event in await sdk.responses.create(model="fast", input="Hello", max_output_tokens=16, stream=True):
            if event.type in ("response.completed", "response.incomplete"):
                assert event.response.usage
                total += event.response.usage.total_tokens
        assert await on.used() == (total, 0)
        assert (await on.quota("staff/daily"))["requests"]["used"] == 5


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"include_usage": False}])
@pytest.mark.parametrize("simulate", ["tokens=30", "tokens=30 crlf", "tokens=3 usage_early", "tokens=3 no_usage"])
async def test_a_stream_is_byte_for_byte_what_the_upstream_would_have_sent(
    path: str, options: dict[str, bool] | None, simulate: str, tmp_path: Path
) -> None:
    """With and without include_usage: the client sees the bytes of the upstream, but for what only we asked for."""
    body: dict[str, Any] = {"model": "gpt-4o-mini", "stream": True, "metadata": {"simulate": simulate}}
    body |= (
        {"input": "Hi", "store": False}
        if path == "/v1/responses"
        else {"prompt": "Hi"}
        if "chat" not in path
        else {"messages": HELLO}
    )
    if options is not None and path != "/v1/responses":
        body["stream_options"] = options
    direct, port = await serve_simulator(Simulator(UPSTREAM_KEY))
    async with stage(folder=tmp_path) as on:
        sent = {"authorization": f"Bearer {UPSTREAM_KEY}"}
        async with on.http.post(f"http://127.0.0.1:{port}{path}", json=body, headers=sent) as response:
            expected = await response.read()
        reply = await on.post(path, body)
        assert reply.body == expected
        assert reply.headers["content-type"].startswith("text/event-stream")
        await on.all_settled()
        used, held = await on.used()
        assert used > 0
        assert held == 0
    await direct.cleanup()


async def test_a_used_up_quota_is_one_request_and_a_true_reset(tmp_path: Path) -> None:
    """RateLimitError with code and reset, exactly one request on the wire, and in again at that very instant."""
    policy = STAFF.replace("tokens: 1M, requests: 100k", "requests: 2")
    async with stage(policy, folder=tmp_path) as on:
        sdk = on.sdk(max_retries=2)
        for _ in range(2):
            await sdk.chat.completions.create(model="fast", messages=HELLO)
        received = on.simulator.received
        seen = _count_requests(sdk)
        with pytest.raises(openai.RateLimitError) as refused:
            await sdk.chat.completions.create(model="fast", messages=HELLO)
        assert seen == ["POST /v1/chat/completions"]
        assert on.simulator.received == received
        error: Any = refused.value.body
        assert refused.value.code == "insufficient_quota"
        assert error["reset_at"] == "2026-11-25T00:00:00+00:00"
        assert error["retry_after"] == 12 * 3600
        assert refused.value.response.headers["x-should-retry"] == "false"
        assert 'Quota "staff/daily" is used up: 2 of 2 requests.' in str(refused.value)
        on.clock.ms = error["resets_at"] * 1000 - 1
        with pytest.raises(openai.RateLimitError):
            await on.sdk().chat.completions.create(model="fast", messages=HELLO)
        on.clock.ms += 1
        await on.sdk().chat.completions.create(model="fast", messages=HELLO)


def _count_requests(sdk: openai.AsyncOpenAI) -> list[str]:
    """The requests that an SDK really puts on the wire from now on."""
    seen: list[str] = []

    async def note(request: Any) -> None:
        seen.append(f"{request.method} {request.url.path}")

    sdk._client.event_hooks["request"].append(note)
    return seen


async def test_quota_equals_the_sum_of_usage_after_a_thousand_mixed_calls(tmp_path: Path) -> None:
    """64 in flight, streams and whole answers of all endpoints: to the token what the upstream reported."""
    policy = STAFF.replace("tokens: 1M", "tokens: 100M")
    chance = random.Random(7)
    async with stage(policy, folder=tmp_path) as on:
        waiting = list(range(1000))

        async def client() -> None:
            while waiting:
                waiting.pop()
                assert (await on.post(*_some_call(chance))).status == 200

        await asyncio.gather(*(client() for _ in range(64)))
        await on.all_settled()
        given = on.simulator.given
        assert given.calls == 1000
        assert await on.used() == (given.input_tokens + given.output_tokens, 0)
        assert (await on.quota("staff/daily"))["requests"]["used"] == 1000


def _some_call(chance: random.Random) -> tuple[str, dict[str, Any]]:
    words = " ".join(["word"] * chance.randint(1, 40))
    stream = chance.random() < 0.5
    common = {"model": "gpt-4o-mini", "metadata": {"simulate": f"tokens={chance.randint(1, 60)}"}}
    match chance.randrange(4):
        case 0:
            messages = [{"role": "user", "content": words}]
            return "/v1/chat/completions", {
                **common,
                "messages": messages,
                "stream": stream,
                "n": chance.randint(1, 3),
            }
        case 1:
            return "/v1/completions", {**common, "prompt": words, "stream": stream, "max_tokens": 50}
        case 2:
            return "/v1/embeddings", {"model": "gpt-4o-mini", "input": [words, "more"]}
        case _:
            return "/v1/responses", {**common, "input": words, "stream": stream}


async def test_many_clients_never_charge_more_than_the_limit(tmp_path: Path) -> None:
    """64 clients on 10,000 tokens: never over, and nobody refused while a call's worth was free and none flew."""
    body = {"model": "gpt-4o-mini", "messages": HELLO, "max_tokens": 50, "metadata": {"simulate": "tokens=200"}}
    async with stage(SMALL, folder=tmp_path) as on:
        refusals: list[dict[str, Any]] = []

        async def client() -> None:
            while True:
                reply = await on.post("/v1/chat/completions", body)
                if reply.status == 429:
                    refusals.append(reply.error)
                    if reply.error["code"] == "insufficient_quota":
                        return
                    await on.all_settled()

        await asyncio.gather(*(client() for _ in range(64)))
        used, held = await on.used()
        need = len(json.dumps(body, separators=(",", ":"))) + 50
        assert held == 0
        assert used <= 10_000
        assert used > 10_000 - need
        assert used == on.simulator.given.input_tokens + on.simulator.given.output_tokens
        for refused in refusals:
            tokens = next(item for item in refused["quotas"] if item["id"] == "staff/daily")["tokens"]
            assert tokens["held"] > 0 or tokens["limit"] - tokens["used"] <= need


async def test_headers_tell_where_the_user_stands(tmp_path: Path) -> None:
    """Every metered answer has OpenAI's rate-limit headers and the IETF draft's, from our quotas alone."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post("/v1/chat/completions", {"model": "fast", "messages": HELLO})
        total = reply.json()["usage"]["total_tokens"]
        assert reply.headers["x-ratelimit-limit-tokens"] == "1000000"
        assert reply.headers["x-ratelimit-remaining-tokens"] == str(1_000_000 - total)
        assert reply.headers["x-ratelimit-reset-tokens"] == "12h0m0s"
        assert reply.headers["x-ratelimit-remaining-requests"] == "99999"
        assert reply.headers["ratelimit-policy"].startswith('"staff/daily";q=')
        assert reply.headers["x-request-id"].startswith("req_")
        for name in ("set-cookie", "openai-organization"):
            assert name not in reply.headers


async def test_an_answer_is_shortened_to_what_is_left_and_says_so(tmp_path: Path) -> None:
    """Where less is free than the call wants, the forwarded maximum is lowered, and the answer's head says it."""
    async with stage(SMALL, folder=tmp_path) as on:
        long = {"simulate": "tokens=9999"}
        body = {"model": "gpt-4o-mini", "messages": HELLO, "max_tokens": 20_000, "metadata": long}
        reply = await on.post("/v1/chat/completions", body)
        maximum = json.loads(on.simulator.requests[-1].body)["max_tokens"]
        assert reply.headers["x-quota-capped"] == f'{maximum}; quota="staff/daily"'
        assert reply.json()["choices"][0]["finish_reason"] == "length"
        used, held = await on.used()
        assert used <= 10_000
        assert held == 0


async def test_the_upstream_sees_its_own_key_and_nothing_of_the_client(tmp_path: Path) -> None:
    """Credentials, cookies and addresses of the client stay here; the model goes out under the upstream's name."""
    async with stage(folder=tmp_path) as on:
        headers = {
            "cookie": "a=b",
            "openai-organization": "org-mine",
            "x-forwarded-for": "10.1.2.3",
            "x-api-key": key_of("alice"),
            "openai-beta": "assistants=v2",
        }
        await on.post("/chat/completions", {"model": "fast", "messages": HELLO}, headers=headers)
        seen = {name.lower(): value for name, value in on.simulator.requests[-1].headers.items()}
        assert seen["authorization"] == f"Bearer {UPSTREAM_KEY}"
        assert seen["openai-beta"] == "assistants=v2"
        assert not {"cookie", "openai-organization", "x-forwarded-for", "x-api-key"} & seen.keys()
        assert key_of("alice") not in str(seen)
        assert json.loads(on.simulator.requests[-1].body)["model"] == "gpt-4o-mini"


async def test_bytes_pass_on_at_once(tmp_path: Path) -> None:
    """The first words of a stream that then falls silent are with the client while the upstream still sends."""
    body = {"model": "fast", "messages": HELLO, "stream": True, "metadata": {"simulate": "stall=3"}}
    async with stage(folder=tmp_path, on_disconnect="stop") as on:
        async with _open(on, body) as response:
            seen = b""
            while seen.count(b'"content"') < 4:  # the opening chunk and three words
                seen += await response.content.readany()
        await on.all_settled()


def _open(on: Stage, body: dict[str, Any]) -> Any:
    headers = {"authorization": f"Bearer {key_of('alice')}"}
    timeout = aiohttp.ClientTimeout(total=20)
    return on.http.post(f"{on.url}/v1/chat/completions", json=body, headers=headers, timeout=timeout)
