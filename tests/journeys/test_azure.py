"""Azure's clients and Azure's servers: the official SDK for Azure as a client, and deployments as upstreams.

docs/wire.md §2.2 and §3.5 describe both.
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


def last_document(on: Stage) -> dict:
    """The JSON body of the last request that the upstream received."""
    return json.loads(on.simulator.requests[-1].body)


# ---------------------------------------------------------------------------------------------------- Azure's clients


async def test_the_sdk_for_azure_works_unchanged(tmp_path: Path) -> None:
    """All its paths are sent to OpenAI's paths at the upstream. `test_client_sdks` checks its answers in detail."""
    async with stage(POLICY, folder=tmp_path) as on, client(on) as azure:
        whole = await azure.chat.completions.create(model="fast", messages=MESSAGES)
        assert whole.usage and whole.choices[0].message.content
        assert last_document(on)["model"] == "gpt-4o-mini"
        stream = await azure.chat.completions.create(model="fast", messages=MESSAGES, stream=True)
        assert [chunk async for chunk in stream if chunk.choices]
        assert last_document(on)["stream_options"] == {"include_usage": True}
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


async def test_the_deployment_in_the_path_is_the_model_that_is_sent(tmp_path: Path) -> None:
    """As at Azure, for JSON and for multipart bodies. The model in the body is ignored."""
    async with stage(POLICY, folder=tmp_path) as on, client(on, azure_deployment="fast") as azure:
        assert (await azure.chat.completions.create(model="gpt-99", messages=MESSAGES)).choices
        assert last_document(on)["model"] == "gpt-4o-mini"
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
    """Model names of OpenRouter and vLLM have one, and SDKs send it plain or percent-encoded."""
    async with stage(POLICY, folder=tmp_path) as on:
        assert (await on.post(f"/openai/deployments/{name}/chat/completions", CHAT)).status == 200
        assert (await on.post("/openai/v1/chat/completions", {**CHAT, "model": "vendor/fast"})).status == 200


async def test_a_closed_endpoint_is_closed_under_azure_s_paths_too(tmp_path: Path) -> None:
    """The request does not reach the upstream. `test_client_sdks` checks the SDK's other errors."""
    async with stage(POLICY, folder=tmp_path) as on, client(on) as azure:
        with pytest.raises(openai.NotFoundError, match="not available on this proxy"):
            await azure.files.list()
        assert on.simulator.received == 0


@pytest.mark.parametrize("name", ["..", "%2e%2e", ".", "%20fast", "fast%0a"])
async def test_an_invalid_deployment_name_is_refused(name: str, tmp_path: Path) -> None:
    """Dots, a leading space or a newline in the path: a 400 or 404, and nothing reaches the upstream."""
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await on.post(f"/openai/deployments/{name}/chat/completions", CHAT)
        assert reply.status in (400, 404)
        assert on.simulator.received == 0


# ---------------------------------------------------------------------------------------------------- Azure's servers

AnswerTo = Callable[[web.Request, dict], web.Response]


@asynccontextmanager
async def upstream_of(
    kind: str, answer_to: AnswerTo, folder: Path, *, path: str = "", more: str = ""
) -> AsyncIterator[tuple[Stage, list[tuple[web.Request, dict]]]]:
    """A stage with an upstream of this kind, which answers by `answer_to`; and the requests that it received."""
    received: list[tuple[web.Request, dict]] = []

    async def handle(request: web.Request) -> web.Response:
        document = json.loads(await request.read())
        received.append((request, document))
        return answer_to(request, document)

    application = web.Application()
    application.router.add_route("*", "/{anything:.*}", handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}{path}"
    try:
        async with stage(POLICY, folder=folder, upstream=url, kind=kind, more=more) as on:
            yield on, received
    finally:
        await runner.cleanup()


def whole_answer(request: web.Request, document: dict) -> web.Response:
    """An answer that is not streamed."""
    message = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
    return web.json_response({"choices": [message], "usage": {"prompt_tokens": 7, "completion_tokens": 1}})


async def test_azure_is_addressed_by_deployment_version_and_its_own_header(tmp_path: Path) -> None:
    """The client's `api-version` is sent on, without the rest of its query; if it has none, the configured one is."""
    async with upstream_of("azure", whole_answer, tmp_path, more=", api_version: 2024-06-01") as (on, received):
        query = "?api-version=2025-04-01-preview&api-key=mine&x=1"
        assert (await on.post("/openai/deployments/fast/chat/completions" + query, CHAT)).status == 200
        assert (await on.post("/v1/chat/completions", {**CHAT, "model": "fast"})).status == 200
        requests = [request for request, _ in received]
        path = "/openai/deployments/gpt-4o-mini/chat/completions?api-version="
        assert [request.path_qs for request in requests] == [path + "2025-04-01-preview", path + "2024-06-01"]
        for request in requests:
            assert request.headers["api-key"] == UPSTREAM_KEY
            assert "authorization" not in request.headers


async def test_azure_s_newer_surface_is_addressed_as_openai_s(tmp_path: Path) -> None:
    """The paths and bodies are OpenAI's; only the key is in Azure's own header."""
    async with upstream_of("azure", whole_answer, tmp_path, path="/openai/v1") as (on, received):
        assert (await on.post("/v1/chat/completions?api-version=2024-10-21", {**CHAT, "model": "fast"})).status == 200
        [(request, document)] = received
        assert (request.path_qs, document["model"]) == ("/openai/v1/chat/completions", "gpt-4o-mini")
        assert request.headers["api-key"] == UPSTREAM_KEY


async def test_a_refusal_by_azure_s_content_filter_is_passed_on(tmp_path: Path) -> None:
    """The client gets the 400 with its code and the filter's results. It is charged one request and no tokens."""
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


# ----------------------------------------------------------------------------- upstreams that reject `stream_options`

STREAM = {**CHAT, "model": "fast", "stream": True}
FRAMES = b"".join(
    b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"
    for choice in ({"delta": {"content": "ok"}}, {"delta": {}, "finish_reason": "stop"})
)
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"


def old_server(request: web.Request, document: dict) -> web.Response:
    """A server that rejects `stream_options`. It sends its usage if the request has the field `with_usage`."""
    if "stream_options" in document:
        error = {"message": "Unknown parameter: 'stream_options'.", "code": "unknown_parameter"}
        return web.json_response({"error": error}, status=400)
    usage = USAGE if "with_usage" in document else b""
    return web.Response(body=FRAMES + usage + DONE, content_type="text/event-stream")


async def test_an_upstream_that_rejects_stream_options_gets_the_call_without_it(tmp_path: Path) -> None:
    """The client does not notice, one request is counted, and the next call is sent without it at once."""
    async with upstream_of("openai", old_server, tmp_path) as (on, received):
        first = await on.post("/v1/chat/completions", STREAM)
        assert (first.status, first.body) == (200, FRAMES + DONE)
        assert ["stream_options" in document for _, document in received] == [True, False]
        assert (await on.post("/v1/chat/completions", STREAM)).body == FRAMES + DONE
        assert ["stream_options" in document for _, document in received] == [True, False, False]
        await on.all_settled()
        calls = await on.rows("calls")
        assert [(call["provenance"], call["output_tokens"]) for call in calls] == [("at_least", 1)] * 2
        assert (await on.quota("staff/daily"))["requests"]["used"] == 2


async def test_a_usage_chunk_that_the_proxy_did_not_ask_for_is_not_removed(tmp_path: Path) -> None:
    """Without the proxy the client would have received it too."""
    async with upstream_of("openai", old_server, tmp_path) as (on, _):
        for _ in range(2):
            reply = await on.post("/v1/chat/completions", {**STREAM, "with_usage": 1})
            assert reply.body == FRAMES + USAGE + DONE
        await on.all_settled()
        calls = await on.rows("calls")
        assert {(call["provenance"], call["input_tokens"]) for call in calls} == {("exactly", 40)}


async def test_the_client_s_own_stream_options_are_not_removed(tmp_path: Path) -> None:
    """The client gets the upstream's error about them, and the call is sent once."""
    async with upstream_of("openai", old_server, tmp_path) as (on, received):
        reply = await on.post("/v1/chat/completions", {**STREAM, "stream_options": {"include_usage": True}})
        assert (reply.status, reply.json()["error"]["code"]) == (400, "unknown_parameter")
        assert len(received) == 1


async def test_an_error_about_something_else_is_sent_once(tmp_path: Path) -> None:
    """The error is passed on unchanged."""

    def refuse(request: web.Request, document: dict) -> web.Response:
        return web.json_response({"error": {"message": "Bad temperature."}}, status=400)

    async with upstream_of("openai", refuse, tmp_path) as (on, received):
        reply = await on.post("/v1/chat/completions", STREAM)
        assert (reply.status, reply.json()) == (400, {"error": {"message": "Bad temperature."}})
        assert len(received) == 1
