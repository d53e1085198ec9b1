"""The main promise, as the official SDK sees it: the same answers as from the upstream, until a quota is used up."""

import asyncio
import json
import random
from itertools import product
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


async def test_each_engine_is_really_used(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The engine in the name of a test is the one on which its stages run."""
    async with stage(folder=tmp_path) as on:
        assert on.database.startswith(request.node.callspec.params["_engine"])


async def test_the_sdk_gets_its_answers_and_each_token_is_charged(tmp_path: Path) -> None:
    """Models, chat, streams, completions, embeddings and responses work, and the usage they report is charged."""
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


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi", "store": False}),
    ],
    ids=["chat", "completions", "responses"],
)
async def test_a_stream_has_the_same_bytes_as_without_the_proxy(
    path: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """With and without `include_usage`. Only the usage that the proxy itself asked for is removed.

    A second simulator, which gets the same calls directly, says what the bytes are.
    """
    simulates = ("tokens=30", "tokens=30 crlf", "tokens=3 usage_early", "tokens=3 no_usage")
    options = ({},) if path == "/v1/responses" else ({}, _usage_option(True), _usage_option(False))
    direct, port = await serve_simulator(Simulator(UPSTREAM_KEY))
    async with stage(folder=tmp_path) as on:
        used_before = 0
        for simulate, option in product(simulates, options):
            body = {"model": "gpt-4o-mini", "stream": True, "metadata": {"simulate": simulate}, **fields, **option}
            sent = {"authorization": f"Bearer {UPSTREAM_KEY}"}
            async with on.http.post(f"http://127.0.0.1:{port}{path}", json=body, headers=sent) as response:
                expected = await response.read()
            reply = await on.post(path, body)
            assert reply.body == expected, (simulate, option)
            assert reply.headers["content-type"].startswith("text/event-stream")
            await on.all_settled()
            used, held = await on.used()
            assert used > used_before, (simulate, option)
            assert held == 0
            used_before = used
    await direct.cleanup()


def _usage_option(include_usage: bool) -> dict[str, Any]:
    return {"stream_options": {"include_usage": include_usage}}


async def test_a_used_up_quota_takes_one_request_and_states_its_reset(tmp_path: Path) -> None:
    """The SDK raises RateLimitError with code and reset after one request. At the reset a call is admitted again."""
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
        assert (error["quota"], error["help"], error["help_url"]) == ("staff/daily", None, None)
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
    """The requests that the SDK's HTTP client sends from now on."""
    seen: list[str] = []

    async def note(request: Any) -> None:
        seen.append(f"{request.method} {request.url.path}")

    sdk._client.event_hooks["request"].append(note)
    return seen


async def test_the_quota_equals_the_sum_of_usage_after_five_hundred_mixed_calls(tmp_path: Path) -> None:
    """64 in flight, streams and whole answers of all endpoints: the charge is exactly what the upstream reported."""
    policy = STAFF.replace("tokens: 1M", "tokens: 100M")
    rng = random.Random(7)
    async with stage(policy, folder=tmp_path) as on:
        calls_left = iter(range(500))

        async def client() -> None:
            for _ in calls_left:
                assert (await on.post(*_random_call(rng))).status == 200

        await asyncio.gather(*(client() for _ in range(64)))
        await on.all_settled()
        given = on.simulator.reported_usage
        assert given.calls == 500
        assert await on.used() == (given.input_tokens + given.output_tokens, 0)
        assert (await on.quota("staff/daily"))["requests"]["used"] == 500


def _random_call(rng: random.Random) -> tuple[str, dict[str, Any]]:
    words = " ".join(["word"] * rng.randint(1, 40))
    stream = rng.random() < 0.5
    common = {"model": "gpt-4o-mini", "metadata": {"simulate": f"tokens={rng.randint(1, 60)}"}}
    match rng.randrange(4):
        case 0:
            messages = [{"role": "user", "content": words}]
            return "/v1/chat/completions", {
                **common,
                "messages": messages,
                "stream": stream,
                "n": rng.randint(1, 3),
            }
        case 1:
            return "/v1/completions", {**common, "prompt": words, "stream": stream, "max_tokens": 50}
        case 2:
            return "/v1/embeddings", {"model": "gpt-4o-mini", "input": [words, "more"]}
        case _:
            return "/v1/responses", {**common, "input": words, "stream": stream}


async def test_many_clients_never_charge_more_than_the_limit(tmp_path: Path) -> None:
    """64 clients share 10,000 tokens: usage never exceeds them, and each refusal is necessary.

    That means: while no call was in flight, a call was refused only if what it needs was not free.
    """
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
        assert used == on.simulator.reported_usage.input_tokens + on.simulator.reported_usage.output_tokens
        for refused in refusals:
            tokens = next(item for item in refused["quotas"] if item["id"] == "staff/daily")["tokens"]
            assert tokens["held"] > 0 or tokens["limit"] - tokens["used"] <= need


async def test_headers_state_the_user_s_quota(tmp_path: Path) -> None:
    """Every metered answer has OpenAI's rate-limit headers and the IETF draft's, from the proxy's quotas alone."""
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


async def test_an_answer_is_shortened_to_what_is_free(tmp_path: Path) -> None:
    """If less is free than the call's maximum, the forwarded maximum is lowered, and a header says so."""
    async with stage(SMALL, folder=tmp_path) as on:
        metadata = {"simulate": "tokens=9999"}
        body = {"model": "gpt-4o-mini", "messages": HELLO, "max_tokens": 20_000, "metadata": metadata}
        reply = await on.post("/v1/chat/completions", body)
        maximum = json.loads(on.simulator.requests[-1].body)["max_tokens"]
        assert reply.headers["x-quota-capped"] == f'{maximum}; quota="staff/daily"'
        assert reply.json()["choices"][0]["finish_reason"] == "length"
        used, held = await on.used()
        assert used <= 10_000
        assert held == 0


async def test_the_upstream_gets_its_own_key_and_no_data_of_the_client(tmp_path: Path) -> None:
    """Credentials, cookies and addresses of the client are not sent on. The model has the upstream's name for it."""
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


async def test_bytes_are_passed_on_at_once(tmp_path: Path) -> None:
    """A stream sends three words and then stalls: the client has received them while the stream is still open."""
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
