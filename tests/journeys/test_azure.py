"""Azure's clients and Azure's servers: the official SDK for Azure at our door, and deployments behind us.

wire §2.2, §3.5.
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
from aiohttp import web

from tests.stage import STAFF, UPSTREAM_KEY, Stage, key_of, stage

MESSAGES = [{"role": "user", "content": "Hello there"}]
CHAT = {"messages": MESSAGES}
POLICY = """
models:
  fast: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  vendor/fast: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  vector: {upstream: simulated, model: text-embedding-3-small}
  scribe: {upstream: simulated, model: gpt-4o-transcribe}
  painter: {upstream: simulated, model: gpt-image-2}
""" + STAFF[STAFF.index("groups:") :]


@asynccontextmanager
async def client(on: Stage, **more: str) -> AsyncIterator[openai.AsyncAzureOpenAI]:
    """The official SDK for Azure, without retries."""
    async with openai.AsyncAzureOpenAI(
        azure_endpoint=on.url, api_key=key_of("alice"), api_version="2024-10-21", max_retries=0, **more
    ) as azure:
        yield azure


def sent(on: Stage) -> dict:
    """The document that the upstream got last."""
    return json.loads(on.simulator.requests[-1].body)


# ------------------------------------------------------------------------------------------------------- its clients


async def test_the_sdk_for_azure_works_unchanged(tmp_path: Path) -> None:
    """All its paths lead to OpenAI's at the upstream; what it gets is played in `test_client_sdks`."""
    async with stage(POLICY, folder=tmp_path) as on, client(on) as azure:
        whole = await azure.chat.completions.create(model="fast", messages=MESSAGES)
        assert whole.usage and whole.choices[0].message.content
        assert sent(on)["model"] == "gpt-4o-mini"
        stream = await azure.chat.completions.create(model="fast", messages=MESSAGES, stream=True)
        assert [chunk async for chunk in stream if chunk.choices]
        assert sent(on)["stream_options"] == {"include_usage": True}
        vectors = await azure.embeddings.create(model="vector", input="Hello there")
        assert vectors.data[0].embedding
        assert (await azure.completions.create(model="fast", prompt="Hello")).choices
        assert (await azure.responses.create(model="fast", input="Hello")).output
        assert (await azure.images.generate(model="painter", prompt="a fox")).data
        assert (await azure.audio.transcriptions.create(model="scribe", file=("a.mp3", b"x"))).text
        assert [each.id async for each in azure.models.list()]
        await on.all_settled()
        assert (await on.quota("staff/daily"))["requests"]["used"] == 7
        assert not any("api-version" in call.path or "openai" in call.path for call in on.simulator.requests)


async def test_what_the_path_names_is_what_is_sent(tmp_path: Path) -> None:
    """As at Azure the deployment decides, in JSON and in forms; the model in the body is passed over."""
    async with stage(POLICY, folder=tmp_path) as on, client(on, azure_deployment="fast") as azure:
        assert (await azure.chat.completions.create(model="gpt-99", messages=MESSAGES)).choices
        assert sent(on)["model"] == "gpt-4o-mini"
        reply = await on.post("/openai/deployments/fast/chat/completions?api-version=2024-10-21", CHAT)
        assert reply.status == 200
        parts = ('name="model"\r\n\r\nfast', 'name="file"; filename="f"\r\n\r\nx')
        body = "".join(f"--b\r\nContent-Disposition: form-data; {part}\r\n" for part in parts).encode() + b"--b--\r\n"
        headers = {"content-type": "multipart/form-data; boundary=b"}
        reply = await on.post("/openai/deployments/scribe/audio/transcriptions", body, headers=headers)
        assert reply.status == 200
        assert b"\r\n\r\ngpt-4o-transcribe\r\n" in on.simulator.requests[-1].body
        assert sorted(call["model"] for call in await on.rows("calls")) == ["fast", "fast", "scribe"]


@pytest.mark.parametrize("name", ["vendor/fast", "vendor%2Ffast", "vendor%2ffast"])
async def test_a_deployment_may_have_a_slash(name: str, tmp_path: Path) -> None:
    """Models of OpenRouter and vLLM have one, and SDKs write it in either way."""
    async with stage(POLICY, folder=tmp_path) as on:
        assert (await on.post(f"/openai/deployments/{name}/chat/completions", CHAT)).status == 200
        assert (await on.post("/openai/v1/chat/completions", {**CHAT, "model": "vendor/fast"})).status == 200


async def test_what_is_closed_is_closed_to_azure_s_clients(tmp_path: Path) -> None:
    """Under their paths as well; its other errors are played in `test_client_sdks`."""
    async with stage(POLICY, folder=tmp_path) as on, client(on) as azure:
        with pytest.raises(openai.NotFoundError, match="not open on this proxy"):
            await azure.files.list()
        assert on.simulator.received == 0


@pytest.mark.parametrize("name", ["..", "%2e%2e", ".", "%20fast", "fast%0a"])
async def test_a_deployment_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    """What is no name is none in a path either."""
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await on.post(f"/openai/deployments/{name}/chat/completions", CHAT)
        assert reply.status in (400, 404)
        assert on.simulator.received == 0


# ------------------------------------------------------------------------------------------------------- its servers

Answering = Callable[[web.Request, dict], web.Response]


@asynccontextmanager
async def upstream_of(kind: str, answer: Answering, folder: Path, *, path: str = "", more: str = "") -> AsyncIterator:
    """A stage before a server of this kind, which answers each request with `answer`; and what it was sent."""
    seen: list[tuple[web.Request, dict]] = []

    async def handle(request: web.Request) -> web.Response:
        document = json.loads(await request.read())
        seen.append((request, document))
        return answer(request, document)

    application = web.Application()
    application.router.add_route("*", "/{anything:.*}", handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}{path}"
    try:
        async with stage(POLICY, folder=folder, upstream=url, kind=kind, more=more) as on:
            yield on, seen
    finally:
        await runner.cleanup()


def whole(request: web.Request, document: dict) -> web.Response:
    """An answer in JSON."""
    message = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
    return web.json_response({"choices": [message], "usage": {"prompt_tokens": 7, "completion_tokens": 1}})


async def test_azure_is_addressed_by_deployment_version_and_its_own_header(tmp_path: Path) -> None:
    """The client's version goes along, and nothing else of its query."""
    async with upstream_of("azure", whole, tmp_path, more=", api_version: 2024-06-01") as (on, seen):
        query = "?api-version=2025-04-01-preview&api-key=mine&x=1"
        assert (await on.post("/openai/deployments/fast/chat/completions" + query, CHAT)).status == 200
        assert (await on.post("/v1/chat/completions", {**CHAT, "model": "fast"})).status == 200
        requests = [request for request, _ in seen]
        path = "/openai/deployments/gpt-4o-mini/chat/completions?api-version="
        assert [request.path_qs for request in requests] == [path + "2025-04-01-preview", path + "2024-06-01"]
        for request in requests:
            assert request.headers["api-key"] == UPSTREAM_KEY
            assert "authorization" not in request.headers


async def test_azure_s_newer_surface_is_addressed_as_openai_s(tmp_path: Path) -> None:
    """But for the header of the key."""
    async with upstream_of("azure", whole, tmp_path, path="/openai/v1") as (on, seen):
        assert (await on.post("/v1/chat/completions?api-version=2024-10-21", {**CHAT, "model": "fast"})).status == 200
        [(request, document)] = seen
        assert (request.path_qs, document["model"]) == ("/openai/v1/chat/completions", "gpt-4o-mini")
        assert request.headers["api-key"] == UPSTREAM_KEY


async def test_what_azure_s_filter_refuses_is_the_user_s_to_mend(tmp_path: Path) -> None:
    """A 400 with its code and what it found, which costs a request."""
    error = {
        "message": "The response was filtered.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}},
    }

    def refuse(request: web.Request, document: dict) -> web.Response:
        return web.json_response({"error": error}, status=400)

    async with upstream_of("azure", refuse, tmp_path) as (on, _), client(on) as azure:
        with pytest.raises(openai.BadRequestError) as caught:
            await azure.chat.completions.create(model="fast", messages=MESSAGES)
        assert caught.value.body == error
        await on.all_settled()
        quota = await on.quota("staff/daily")
        assert (quota["tokens"]["used"], quota["requests"]["used"]) == (0, 1)


# ---------------------------------------------------------------------------------------- who takes no stream_options

STREAM = {**CHAT, "model": "fast", "stream": True}
FRAMES = b"".join(
    b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"
    for choice in ({"delta": {"content": "ok"}}, {"delta": {}, "finish_reason": "stop"})
)
UNASKED = b'data: {"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"


def old(request: web.Request, document: dict) -> web.Response:
    """A server that knows no such field, and may say its usage all the same."""
    if "stream_options" in document:
        error = {"message": "Unknown parameter: 'stream_options'.", "code": "unknown_parameter"}
        return web.json_response({"error": error}, status=400)
    says = UNASKED if "says" in document else b""
    return web.Response(body=FRAMES + says + DONE, content_type="text/event-stream")


async def test_who_takes_no_option_gets_the_call_without_it(tmp_path: Path) -> None:
    """The client notices nothing, one request is counted, and the next call goes without it at once."""
    async with upstream_of("openai", old, tmp_path) as (on, seen):
        first = await on.post("/v1/chat/completions", STREAM)
        assert (first.status, first.body) == (200, FRAMES + DONE)
        assert ["stream_options" in document for _, document in seen] == [True, False]
        assert (await on.post("/v1/chat/completions", STREAM)).body == FRAMES + DONE
        assert ["stream_options" in document for _, document in seen] == [True, False, False]
        await on.all_settled()
        calls = await on.rows("calls")
        assert [(call["provenance"], call["output_tokens"]) for call in calls] == [("at_least", 1)] * 2
        assert (await on.quota("staff/daily"))["requests"]["used"] == 2


async def test_what_was_not_asked_for_is_not_taken_out(tmp_path: Path) -> None:
    """A usage chunk that comes without our asking would have come without us."""
    async with upstream_of("openai", old, tmp_path) as (on, _):
        for _ in range(2):
            assert (await on.post("/v1/chat/completions", {**STREAM, "says": 1})).body == FRAMES + UNASKED + DONE
        await on.all_settled()
        calls = await on.rows("calls")
        assert {(call["provenance"], call["input_tokens"]) for call in calls} == {("exactly", 40)}


async def test_an_option_of_the_client_s_own_is_not_taken_away(tmp_path: Path) -> None:
    """It hears what the upstream says of it."""
    async with upstream_of("openai", old, tmp_path) as (on, seen):
        reply = await on.post("/v1/chat/completions", {**STREAM, "stream_options": {"include_usage": True}})
        assert (reply.status, reply.json()["error"]["code"]) == (400, "unknown_parameter")
        assert len(seen) == 1


async def test_an_error_about_something_else_is_sent_once(tmp_path: Path) -> None:
    """It passes on whole."""

    def refuse(request: web.Request, document: dict) -> web.Response:
        return web.json_response({"error": {"message": "Bad temperature."}}, status=400)

    async with upstream_of("openai", refuse, tmp_path) as (on, seen):
        reply = await on.post("/v1/chat/completions", STREAM)
        assert (reply.status, reply.json()) == (400, {"error": {"message": "Bad temperature."}})
        assert len(seen) == 1
