"""The simulated upstream on a real socket: the official SDK takes it for the real one, and faults happen as asked."""

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
    """A simulator, not served yet."""
    return Simulator(KEY, seed=3, now=lambda: 1_764_000_000.5)


@pytest.fixture
async def address(simulator: Simulator) -> AsyncIterator[str]:
    """Where it is served."""
    runner, port = await serve(simulator)
    yield f"http://127.0.0.1:{port}/v1"
    await runner.cleanup()


@pytest.fixture
async def sdk(address: str) -> AsyncIterator[AsyncOpenAI]:
    """The official SDK, pointed at it."""
    async with AsyncOpenAI(api_key=KEY, base_url=address, max_retries=0) as client:
        yield client


@pytest.fixture
async def http(address: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A plain client with the right key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(f"{address}/", headers=headers) as session:
        yield session


def wish(directives: str, **asked: Any) -> dict[str, Any]:
    """The body of a chat call that asks for these directives."""
    return {"model": "gpt-4o", "messages": HELLO, "metadata": {"simulate": directives}, **asked}


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
    """A whole answer, and the same one streamed, are what the SDK expects; usage as reported is counted."""
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
    given = simulator.given
    assert (given.calls, given.input_tokens, given.output_tokens) == (2, 10, 40)


async def test_a_stream_that_was_not_asked_for_usage_reports_none(sdk: AsyncOpenAI, simulator: Simulator) -> None:
    """So it isn't counted either: what is counted is what could be read."""
    async for chunk in await sdk.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True):
        assert "usage" not in chunk.to_dict()
    assert (simulator.given.calls, simulator.received) == (0, 1)


async def test_completions(sdk: AsyncOpenAI) -> None:
    """Several prompts, whole and streamed."""
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
    """The SDK asks for base64 by itself, and gives the same floats as when asked for floats."""
    quietly = await sdk.embeddings.create(model="text-embedding-3-small", input=["one two", "three"])
    openly = await sdk.embeddings.create(
        model="text-embedding-3-small", input=["one two", "three"], encoding_format="float"
    )
    assert [len(each.embedding) for each in quietly.data] == [1536, 1536]
    assert [each.embedding for each in quietly.data] == [each.embedding for each in openly.data]
    assert quietly.usage.total_tokens == 3


async def test_responses(sdk: AsyncOpenAI) -> None:
    """A whole response, and the same at the end of the streamed one, after all its deltas."""
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
    """It lists some, though it serves any name."""
    assert [model.id for model in (await sdk.models.list()).data] == list(MODELS)
    assert (await sdk.models.retrieve("gpt-4o")).id == "gpt-4o"
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.models.retrieve("gpt-99")
    assert caught.value.code == "model_not_found"


async def test_a_wrong_key(address: str, http: aiohttp.ClientSession) -> None:
    """Is a 401 that shows its ends, for every endpoint; no key at all is one too."""
    async with AsyncOpenAI(api_key="sk-wrong-0123456789", base_url=address, max_retries=0) as sdk:
        with pytest.raises(openai.AuthenticationError, match=r"sk-wrong\*+6789"):
            await sdk.chat.completions.create(model="gpt-4o", messages=HELLO)
        with pytest.raises(openai.AuthenticationError):
            await sdk.models.list()
    for header in ("Basic x", "Bearer \udcff\u00e9"):
        async with http.post("chat/completions", json=wish(""), headers={"Authorization": header}) as response:
            assert response.status == 401


# ------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "files"), ("POST", "models"), ("GET", "chat/completions"), ("POST", "videos")]
)
async def test_everything_else_is_a_404(http: aiohttp.ClientSession, method: str, path: str) -> None:
    """In OpenAI's shape, naming what was asked."""
    async with http.request(method, path) as response:
        assert response.status == 404
        assert (await response.json())["error"]["message"] == f"Invalid URL ({method} /v1/{path})"


async def test_it_remembers_what_it_was_sent(http: aiohttp.ClientSession, simulator: Simulator) -> None:
    """The last requests as they were on the wire, so a test can see what the proxy made of them; not all of them."""
    body = orjson.dumps(wish("tokens=1"))
    async with http.post("chat/completions?a=b%26c", data=body, headers={"X-Mark": "7"}) as response:
        assert response.status == 200
    (seen,) = simulator.requests
    assert (seen.method, seen.path, seen.body) == ("POST", "/v1/chat/completions?a=b%26c", body)
    assert seen.headers["x-mark"] == "7"
    for _ in range(REQUESTS_KEPT):
        async with http.get("files") as response:
            assert response.status == 404
    assert (len(simulator.requests), simulator.received) == (REQUESTS_KEPT, REQUESTS_KEPT + 1)
    assert simulator.requests[0].path == "/v1/files"


async def test_no_two_answers_have_the_same_id(http: aiohttp.ClientSession) -> None:
    """Also of calls that were all there before the first was answered: a meter may tell answers apart by it."""

    async def ask() -> tuple[str, str]:
        async with http.post("chat/completions", json=wish("delay=0.001 tokens=1")) as response:
            return (await response.json())["id"], response.headers["x-request-id"]

    ids = await asyncio.gather(*(ask() for _ in range(8)))
    assert len({id for pair in ids for id in pair}) == 16


@pytest.mark.parametrize(
    ("body", "param"),
    [(b"{", None), (orjson.dumps(wish("nonsense")), "metadata"), (orjson.dumps({"model": "m"}), "messages")],
)
async def test_a_bad_request(http: aiohttp.ClientSession, body: bytes, param: str | None) -> None:
    """Is a 400, be it no JSON, no call, or no directive."""
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
async def test_errors(
    sdk: AsyncOpenAI, simulator: Simulator, directives: str, error: type[openai.APIStatusError], code: str | None
) -> None:
    """The SDK raises for each what it raises for the real one."""
    with pytest.raises(error) as caught:
        await sdk.chat.completions.create(model="gpt-4o", messages=HELLO, metadata={"simulate": directives})
    assert caught.value.code == code
    assert ("retry-after" in caught.value.response.headers) == (code == "rate_limit_exceeded")
    assert simulator.given.calls == 0


async def test_headers(http: aiohttp.ClientSession) -> None:
    """Answers have the headers of the real one, an id of their own, and what was asked for on top, errors too."""
    for directives in ("", "status=429", "html"):
        async with http.post("chat/completions", json=wish(f"{directives} header=Retry-After:7")) as response:
            assert response.headers["openai-organization"] == "org-simulated"
            assert response.headers["retry-after"] == "7"
            first = response.headers["x-request-id"]
        async with http.post("chat/completions", json=wish("header=Content-Type:x/y", stream=True)) as response:
            assert response.headers["x-request-id"] != first
            assert response.headers["content-type"] == "x/y"


async def test_html(http: aiohttp.ClientSession) -> None:
    """What comes when a load balancer answers in the server's place."""
    async with http.post("chat/completions", json=wish("html")) as response:
        assert (response.status, response.content_type) == (502, "text/html")
        assert "<html>" in await response.text()


async def test_a_stream_that_is_cut(http: aiohttp.ClientSession, simulator: Simulator) -> None:
    """The words before it arrive, then the connection ends in a way that no client takes for the end."""
    splitter = Splitter()
    events: list[Event] = []
    async with http.post("chat/completions", json=wish("cut=5", stream=True)) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            async for chunk in response.content.iter_any():
                events += splitter.feed(chunk)
    assert len(events) == 1 + 5  # the role, and five words
    assert (simulator.chunks_sent, simulator.given.calls) == (5, 0)


async def test_a_whole_answer_that_is_cut(http: aiohttp.ClientSession, simulator: Simulator) -> None:
    """Half of the body arrives."""
    received = b""
    async with http.post("chat/completions", json=wish("cut=5")) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            async for chunk in response.content.iter_any():
                received += chunk
        assert len(received) == int(response.headers["content-length"]) // 2
    assert simulator.given.calls == 0


async def test_an_error_inside_a_stream(sdk: AsyncOpenAI, http: aiohttp.ClientSession, simulator: Simulator) -> None:
    """The SDK raises it after the words before it; no usage follows."""
    words = 0
    with pytest.raises(openai.APIError, match="had an error"):
        async for chunk in await sdk.chat.completions.create(
            **wish("error=3", stream=True, stream_options={"include_usage": True})
        ):
            words += bool(chunk.choices[0].delta.content)
    assert words == 3
    *_, last = await read_events(http, {**wish("error=3"), "input": "hello"}, "responses")
    assert last.name == "error"
    assert simulator.given.calls == 0


async def test_streams_without_done_with_early_usage_in_crlf(
    http: aiohttp.ClientSession, simulator: Simulator
) -> None:
    """The habits of other servers, as directed; usage that was not asked for counts, since it was sent."""
    *_, last = await read_events(http, wish("no_done usage_early crlf tokens=4"))
    said = orjson.loads(last.data or b"")
    assert said["usage"]["completion_tokens"] == 4
    assert last.raw.endswith(b"\r\n\r\n")
    assert (simulator.given.calls, simulator.given.output_tokens) == (1, 4)


@pytest.mark.parametrize(("directives", "calls"), [("no_usage", 0), ("usage_zero", 1)])
async def test_whole_answers_without_true_usage(
    http: aiohttp.ClientSession, simulator: Simulator, directives: str, calls: int
) -> None:
    """No usage is not counted, a zero is counted as the zero it says."""
    async with http.post("chat/completions", json=wish(directives)) as response:
        assert ("usage" in await response.json()) == bool(calls)
    assert (simulator.given.calls, simulator.given.output_tokens) == (calls, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stalled_answer_ends_when_the_client_goes(
    http: aiohttp.ClientSession, simulator: Simulator, stream: bool
) -> None:
    """Silence after what was asked for; the client's going is noticed at once, though nothing is being written."""
    async with http.post("chat/completions", json=wish("stall=4", stream=stream)) as response:
        assert await response.content.readany()
        if stream:
            await simulator.until(lambda: simulator.chunks_sent == 4)
            assert simulator.open_streams == 1
        assert simulator.open_calls == 1
        response.close()
    await simulator.until(lambda: simulator.open_calls == 0)
    assert (simulator.open_streams, simulator.clients_gone) == (0, 1)


@pytest.mark.parametrize("directives", ["hang", "delay=3600", "speed=0.01"])
async def test_a_call_without_a_head_ends_when_the_client_goes(
    http: aiohttp.ClientSession, simulator: Simulator, directives: str
) -> None:
    """Nothing arrives, not even a status, and the call is over when nobody waits for it."""
    call = asyncio.ensure_future(http.post("chat/completions", json=wish(directives)))
    await simulator.until(lambda: simulator.open_calls == 1)
    assert not call.done()
    call.cancel()
    await simulator.until(lambda: simulator.open_calls == 0)
    assert simulator.clients_gone == 1


async def test_generation_stops_when_the_client_goes(http: aiohttp.ClientSession, simulator: Simulator) -> None:
    """Also at full speed: an answer of a million words ends within a few after its reader left."""
    async with http.post("chat/completions", json=wish("tokens=1000000", stream=True)) as response:
        await simulator.until(lambda: simulator.chunks_sent >= 10)
        response.close()
    await simulator.until(lambda: simulator.open_streams == 0)
    assert simulator.chunks_sent < 1_000_000
    assert simulator.clients_gone == 1


async def test_a_speed_sets_the_pace_of_all_answers() -> None:
    """The simulator's own speed holds for every call, a call's own goes before it."""
    simulator = Simulator(KEY, tokens_per_s=0.01)
    runner, port = await serve(simulator)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}/v1/", headers=headers) as http:
        events = await read_events(http, wish("speed=1000 tokens=3"))
        assert len(events) == 1 + 3 + 2
        async with http.post("chat/completions", json=wish("", stream=True)) as response:
            (first,) = Splitter().feed(await response.content.readany())
            assert b'"role"' in first.raw
            assert (simulator.open_streams, simulator.chunks_sent) == (1, 3)
    await simulator.until(lambda: simulator.open_calls == 0)
    await runner.cleanup()


@pytest.mark.parametrize("stream", [False, True])
async def test_who_watches_is_told_of_each_call_what_was_made_for_it(stream: bool) -> None:
    """All of one that went to its end, with the usage it was told; a part of one whose client went before."""
    watched: list[Served] = []
    simulator = Simulator(KEY, watch=watched.append)
    runner, port = await serve(simulator)
    headers = {"Authorization": f"Bearer {KEY}"}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}/v1/", headers=headers) as http:
        async with http.post("chat/completions", json=wish("tokens=7", n=2, stream=stream, **options)) as response:
            await response.read()
        async with http.post("chat/completions", json=wish("status=500")) as response:
            await response.read()
        call = asyncio.ensure_future(read_words(http, wish("tokens=100 speed=100", stream=stream)))
        await asyncio.wait([call], timeout=0.2)
        call.cancel()
        await simulator.until(lambda: simulator.open_calls == 0)
    await runner.cleanup()
    whole, left = watched
    assert (whole.generated, whole.reported) == (14, (5, 14))
    assert whole.script.asked["n"] == 2
    assert 0 < left.generated < 100
    assert left.reported is None


async def read_words(http: aiohttp.ClientSession, body: dict[str, Any]) -> None:
    """Read an answer, for as long as one is let."""
    async with http.post("chat/completions", json=body) as response:
        await response.read()


async def test_several_may_wait_for_it(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    """Whoever waits is told of what it waits for, also when another gave up waiting."""
    patient = asyncio.ensure_future(simulator.until(lambda: simulator.received == 2))
    gone = asyncio.ensure_future(simulator.until(lambda: simulator.received == 2))
    async with http.get("models"):
        pass
    assert not patient.done()
    gone.cancel()
    async with http.get("models"):
        pass
    await patient


async def test_a_port_that_is_taken(simulator: Simulator, address: str) -> None:
    """Is an error of whoever asked for it, and leaves nothing behind."""
    with pytest.raises(OSError, match="address already in use"):
        await serve(Simulator(KEY), port=int(address.rpartition(":")[2].removesuffix("/v1")))
