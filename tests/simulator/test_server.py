"""The simulated upstream on a real socket: the official SDKs work with it, and faults happen as directed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import orjson
import pytest
from openai import AsyncOpenAI

from proxy.formats.sse import Event, Splitter
from proxy.simulator.server import MODELS, REQUESTS_KEPT, Served, Simulator, serve

KEY = "sk-upstream-0123456789"
HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture
async def simulator() -> Simulator:
    """A simulator that is not served yet."""
    return Simulator(KEY, seed=3, now=lambda: 1_764_000_000.5)


@pytest.fixture
async def address(simulator: Simulator) -> AsyncIterator[str]:
    """The base URL at which it is served."""
    runner, port = await serve(simulator)
    yield f"http://127.0.0.1:{port}/v1"
    await runner.cleanup()


@pytest.fixture
async def sdk(address: str) -> AsyncIterator[AsyncOpenAI]:
    """The official SDK with the simulator as its base URL."""
    async with AsyncOpenAI(api_key=KEY, base_url=address, max_retries=0) as client:
        yield client


@pytest.fixture
async def http(address: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A plain client with the right key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(f"{address}/", headers=headers) as session:
        yield session


def chat(directives: str, **params: Any) -> dict[str, Any]:
    """The body of a chat call with these directives."""
    return {"model": "gpt-4o", "messages": HELLO, "metadata": {"simulate": directives}, **params}


async def read_events(
    http: aiohttp.ClientSession, body: dict[str, Any], path: str = "chat/completions"
) -> list[Event]:
    """Read a streamed answer to its end."""
    async with http.post(path, json={**body, "stream": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        return Splitter().feed(await response.read())


# -------------------------------------------------------------------------------------------------------- the SDK


async def test_chat(sdk: AsyncOpenAI, simulator: Simulator) -> None:
    """The SDK reads a whole answer and the same one streamed; the reported usage is added up."""
    answer = await sdk.chat.completions.create(model="gpt-4o", messages=HELLO, n=2, max_tokens=10)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.created == 1_764_000_000
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 20)
    texts = ["", ""]
    usages = []
    stream = await sdk.chat.completions.create(
        model="gpt-4o", messages=HELLO, n=2, max_tokens=10, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1] == answer.usage
    usage = simulator.reported_usage
    assert (usage.calls, usage.input_tokens, usage.output_tokens) == (2, 10, 40)


async def test_a_stream_without_requested_usage_reports_none(sdk: AsyncOpenAI, simulator: Simulator) -> None:
    """So the simulator doesn't add it to the reported usage."""
    async for chunk in await sdk.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True):
        assert "usage" not in chunk.to_dict()
    assert (simulator.reported_usage.calls, simulator.received) == (0, 1)


async def test_completions(sdk: AsyncOpenAI) -> None:
    """Several prompts in one call, whole and streamed."""
    answer = await sdk.completions.create(model="gpt-3.5-turbo-instruct", prompt=["one two", "three"])
    texts = ["", ""]
    async for chunk in await sdk.completions.create(
        model="gpt-3.5-turbo-instruct", prompt=["one two", "three"], stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 32)


async def test_embeddings(sdk: AsyncOpenAI) -> None:
    """The SDK requests base64 by default, and returns the same floats as if floats are requested."""
    by_default = await sdk.embeddings.create(model="text-embedding-3-small", input=["one two", "three"])
    as_floats = await sdk.embeddings.create(
        model="text-embedding-3-small", input=["one two", "three"], encoding_format="float"
    )
    assert [len(each.embedding) for each in by_default.data] == [1536, 1536]
    assert [each.embedding for each in by_default.data] == [each.embedding for each in as_floats.data]
    assert by_default.usage.total_tokens == 3


async def test_responses(sdk: AsyncOpenAI) -> None:
    """A whole response, and the same one at the end of its stream."""
    answer = await sdk.responses.create(model="gpt-4o", input="hello there", max_output_tokens=6)
    assert answer.status == "incomplete"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (2, 6)
    text = ""
    async for event in await sdk.responses.create(
        model="gpt-4o", input="hello there", max_output_tokens=6, stream=True
    ):
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == answer.output_text
    assert event.type == "response.incomplete"
    assert event.response.usage == answer.usage


async def test_models(sdk: AsyncOpenAI) -> None:
    """It lists a few, although it serves any name."""
    assert [model.id for model in (await sdk.models.list()).data] == list(MODELS)
    assert (await sdk.models.retrieve("gpt-4o")).id == "gpt-4o"
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.models.retrieve("gpt-99")
    assert caught.value.code == "model_not_found"


async def test_an_invalid_key_is_a_401(address: str, http: aiohttp.ClientSession) -> None:
    """It shows both ends of the key, at every endpoint. A header without a key is a 401 too."""
    async with AsyncOpenAI(api_key="sk-wrong-0123456789", base_url=address, max_retries=0) as sdk:
        with pytest.raises(openai.AuthenticationError, match=r"sk-wrong\*+6789"):
            await sdk.chat.completions.create(model="gpt-4o", messages=HELLO)
        with pytest.raises(openai.AuthenticationError):
            await sdk.models.list()
    for header in ("Basic x", "Bearer \udcff\u00e9"):
        async with http.post("chat/completions", json=chat(""), headers={"Authorization": header}) as response:
            assert response.status == 401


# ------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "files"), ("POST", "models"), ("GET", "chat/completions"), ("POST", "videos")]
)
async def test_an_unknown_path_is_a_404(http: aiohttp.ClientSession, method: str, path: str) -> None:
    """In OpenAI's format; it names the method and the path."""
    async with http.request(method, path) as response:
        assert response.status == 404
        assert (await response.json())["error"]["message"] == f"Invalid URL ({method} /v1/{path})"


async def test_it_keeps_the_latest_requests(http: aiohttp.ClientSession, simulator: Simulator) -> None:
    """As they were on the wire, so a test can check what the proxy sent; the oldest are dropped."""
    body = orjson.dumps(chat("tokens=1"))
    async with http.post("chat/completions?a=b%26c", data=body, headers={"X-Mark": "7"}) as response:
        assert response.status == 200
    (received,) = simulator.requests
    assert (received.method, received.path, received.body) == ("POST", "/v1/chat/completions?a=b%26c", body)
    assert received.headers["x-mark"] == "7"
    for _ in range(REQUESTS_KEPT):
        async with http.get("files") as response:
            assert response.status == 404
    assert (len(simulator.requests), simulator.received) == (REQUESTS_KEPT, REQUESTS_KEPT + 1)
    assert simulator.requests[0].path == "/v1/files"


async def test_no_two_answers_have_the_same_id(http: aiohttp.ClientSession) -> None:
    """Also if all calls are open before the first is answered: a meter may distinguish answers by their id."""

    async def ask() -> tuple[str, str]:
        async with http.post("chat/completions", json=chat("delay=0.001 tokens=1")) as response:
            return (await response.json())["id"], response.headers["x-request-id"]

    ids = await asyncio.gather(*(ask() for _ in range(8)))
    assert len({id for pair in ids for id in pair}) == 16


@pytest.mark.parametrize(
    ("body", "param"),
    [(b"{", None), (orjson.dumps(chat("nonsense")), "metadata"), (orjson.dumps({"model": "m"}), "messages")],
)
async def test_an_invalid_request_is_a_400(http: aiohttp.ClientSession, body: bytes, param: str | None) -> None:
    """Whether the JSON, a parameter or a directive is invalid."""
    async with http.post("chat/completions", data=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == param


# --------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("directives", "error", "code"),
    [
        ("status=400", openai.BadRequestError, None),
        ("status=401", openai.AuthenticationError, "invalid_api_key"),
        ("status=429", openai.RateLimitError, "rate_limit_exceeded"),
        ("status=429 code=insufficient_quota", openai.RateLimitError, "insufficient_quota"),
        ("status=500", openai.InternalServerError, None),
    ],
)
async def test_an_error_status(
    sdk: AsyncOpenAI, simulator: Simulator, directives: str, error: type[openai.APIStatusError], code: str | None
) -> None:
    """The SDK raises the same exception as for the real upstream."""
    with pytest.raises(error) as caught:
        await sdk.chat.completions.create(model="gpt-4o", messages=HELLO, metadata={"simulate": directives})
    assert caught.value.code == code
    assert ("retry-after" in caught.value.response.headers) == (code == "rate_limit_exceeded")
    assert simulator.reported_usage.calls == 0


async def test_headers(http: aiohttp.ClientSession) -> None:
    """Answers and errors have OpenAI's headers, a request id of their own, and the headers of the directives."""
    for directives in ("", "status=429", "html"):
        async with http.post("chat/completions", json=chat(f"{directives} header=Retry-After:7")) as response:
            assert response.headers["openai-organization"] == "org-simulated"
            assert response.headers["retry-after"] == "7"
            first = response.headers["x-request-id"]
        async with http.post("chat/completions", json=chat("header=Content-Type:x/y", stream=True)) as response:
            assert response.headers["x-request-id"] != first
            assert response.headers["content-type"] == "x/y"


async def test_an_html_error(http: aiohttp.ClientSession) -> None:
    """As a load balancer sends it if it can't reach the server."""
    async with http.post("chat/completions", json=chat("html")) as response:
        assert (response.status, response.content_type) == (502, "text/html")
        assert "<html>" in await response.text()


async def test_a_stream_that_is_cut(http: aiohttp.ClientSession, simulator: Simulator) -> None:
    """The words before it arrive, then the connection closes, which a client recognises as incomplete."""
    splitter = Splitter()
    events: list[Event] = []
    async with http.post("chat/completions", json=chat("cut=5", stream=True)) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            async for chunk in response.content.iter_any():
                events += splitter.feed(chunk)
    assert len(events) == 1 + 5  # the role, and five words
    assert (simulator.chunks_sent, simulator.reported_usage.calls) == (5, 0)


async def test_a_whole_answer_that_is_cut(http: aiohttp.ClientSession, simulator: Simulator) -> None:
    """The first half of the body arrives."""
    received = b""
    async with http.post("chat/completions", json=chat("cut=5")) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            async for chunk in response.content.iter_any():
                received += chunk
        assert len(received) == int(response.headers["content-length"]) // 2
    assert simulator.reported_usage.calls == 0


async def test_an_error_inside_a_stream(sdk: AsyncOpenAI, http: aiohttp.ClientSession, simulator: Simulator) -> None:
    """The SDK raises it after the words before it; no usage is reported."""
    words = 0
    with pytest.raises(openai.APIError, match="had an error"):
        async for chunk in await sdk.chat.completions.create(
            **chat("error=3", stream=True, stream_options={"include_usage": True})
        ):
            words += bool(chunk.choices[0].delta.content)
    assert words == 3
    *_, last = await read_events(http, {**chat("error=3"), "input": "hello"}, "responses")
    assert last.name == "error"
    assert simulator.reported_usage.calls == 0


async def test_a_stream_without_done_with_early_usage_and_crlf(
    http: aiohttp.ClientSession, simulator: Simulator
) -> None:
    """Variants of other servers, as directed. Usage that was not requested is added up too, because it was sent."""
    *_, last = await read_events(http, chat("no_done usage_early crlf tokens=4"))
    data = orjson.loads(last.data or b"")
    assert data["usage"]["completion_tokens"] == 4
    assert last.raw.endswith(b"\r\n\r\n")
    assert (simulator.reported_usage.calls, simulator.reported_usage.output_tokens) == (1, 4)


@pytest.mark.parametrize(("directives", "calls"), [("no_usage", 0), ("usage_zero", 1)])
async def test_whole_answers_without_usage_or_with_usage_of_zero(
    http: aiohttp.ClientSession, simulator: Simulator, directives: str, calls: int
) -> None:
    """Without usage the answer is not counted as reported; with a usage of 0 it is."""
    async with http.post("chat/completions", json=chat(directives)) as response:
        assert ("usage" in await response.json()) == bool(calls)
    assert (simulator.reported_usage.calls, simulator.reported_usage.output_tokens) == (calls, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stalled_answer_ends_when_the_client_disconnects(
    http: aiohttp.ClientSession, simulator: Simulator, stream: bool
) -> None:
    """The disconnect is noticed at once, although nothing is being written."""
    async with http.post("chat/completions", json=chat("stall=4", stream=stream)) as response:
        assert await response.content.readany()
        if stream:
            await simulator.until(lambda: simulator.chunks_sent == 4)
            assert simulator.open_streams == 1
        assert simulator.open_calls == 1
        response.close()
    await simulator.until(lambda: simulator.open_calls == 0)
    assert (simulator.open_streams, simulator.disconnects) == (0, 1)


@pytest.mark.parametrize("directives", ["hang", "delay=3600", "speed=0.01"])
async def test_a_call_that_is_not_answered_yet_ends_when_the_client_disconnects(
    http: aiohttp.ClientSession, simulator: Simulator, directives: str
) -> None:
    """The client has received nothing, not even a status."""
    call = asyncio.ensure_future(http.post("chat/completions", json=chat(directives)))
    await simulator.until(lambda: simulator.open_calls == 1)
    assert not call.done()
    call.cancel()
    await simulator.until(lambda: simulator.open_calls == 0)
    assert simulator.disconnects == 1


async def test_generation_stops_when_the_client_disconnects(
    http: aiohttp.ClientSession, simulator: Simulator
) -> None:
    """Also at full speed: an answer of a million words ends soon after the disconnect."""
    async with http.post("chat/completions", json=chat("tokens=1000000", stream=True)) as response:
        await simulator.until(lambda: simulator.chunks_sent >= 10)
        response.close()
    await simulator.until(lambda: simulator.open_streams == 0)
    assert simulator.chunks_sent < 1_000_000
    assert simulator.disconnects == 1


async def test_the_speed_of_answers() -> None:
    """The simulator's speed applies to every call; the directive `speed` overrides it."""
    simulator = Simulator(KEY, tokens_per_s=0.01)
    runner, port = await serve(simulator)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}/v1/", headers=headers) as http:
        events = await read_events(http, chat("speed=1000 tokens=3"))
        assert len(events) == 1 + 3 + 2
        async with http.post("chat/completions", json=chat("", stream=True)) as response:
            (first,) = Splitter().feed(await response.content.readany())
            assert b'"role"' in first.raw
            assert (simulator.open_streams, simulator.chunks_sent) == (1, 3)
    await simulator.until(lambda: simulator.open_calls == 0)
    await runner.cleanup()


@pytest.mark.parametrize("stream", [False, True])
async def test_on_served_gets_each_call_with_its_generated_tokens(stream: bool) -> None:
    """All tokens and the usage of a call that ended; a part of them if the client disconnected before."""
    served: list[Served] = []
    simulator = Simulator(KEY, on_served=served.append)
    runner, port = await serve(simulator)
    headers = {"Authorization": f"Bearer {KEY}"}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}/v1/", headers=headers) as http:
        async with http.post("chat/completions", json=chat("tokens=7", n=2, stream=stream, **options)) as response:
            await response.read()
        async with http.post("chat/completions", json=chat("status=500")) as response:
            await response.read()
        call = asyncio.ensure_future(read_words(http, chat("tokens=100 speed=100", stream=stream)))
        await asyncio.wait([call], timeout=0.2)
        call.cancel()
        await simulator.until(lambda: simulator.open_calls == 0)
    await runner.cleanup()
    whole, partial = served
    assert (whole.generated, whole.reported) == (14, (5, 14))
    assert whole.answer.params["n"] == 2
    assert 0 < partial.generated < 100
    assert partial.reported is None


async def read_words(http: aiohttp.ClientSession, body: dict[str, Any]) -> None:
    """Read an answer until it ends or the task is cancelled."""
    async with http.post("chat/completions", json=body) as response:
        await response.read()


async def test_several_tasks_can_wait_for_a_condition(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    """A waiting task is woken although another one was cancelled."""
    waiting = asyncio.ensure_future(simulator.until(lambda: simulator.received == 2))
    cancelled = asyncio.ensure_future(simulator.until(lambda: simulator.received == 2))
    async with http.get("models"):
        pass
    assert not waiting.done()
    cancelled.cancel()
    async with http.get("models"):
        pass
    await waiting


async def test_serving_on_a_taken_port_raises(simulator: Simulator, address: str) -> None:
    """The runner is cleaned up before."""
    with pytest.raises(OSError, match="address already in use"):
        await serve(Simulator(KEY), port=int(address.rpartition(":")[2].removesuffix("/v1")))
