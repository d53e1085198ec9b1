"""Stored responses belong to the user whose call produced them, on both engines and after restarts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from proxy.config.loader import load_text
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from tests.stage import STAFF, UPSTREAM_KEY, Reply, Stage, key_of, stage, text_of

FORGETFUL = STAFF.replace("{upstream: simulated}", "{upstream: simulated, allow: {store: false}}").replace(
    "max_output_tokens: 100}", "max_output_tokens: 100, allow: {store: false}}"
)
ASK: dict[str, Any] = {"model": "fast", "input": "three small words", "max_output_tokens": 16}
PATHS = [("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")]


async def send(on: Stage, method: str, path: str, user: str = "alice") -> Reply:
    """One request without a body."""
    headers = {"authorization": f"Bearer {key_of(user)}"}
    async with on.http.request(method, on.url + path, headers=headers) as response:
        return Reply(response.status, response.headers.copy(), await response.read())


async def _stream(on: Stage) -> list[Any]:
    """All events of one streamed response."""
    return [event async for event in await on.sdk().responses.create(**ASK, stream=True)]


@pytest.mark.every_engine
async def test_the_owner_may_use_a_response_and_is_charged_once(tmp_path: Path) -> None:
    """The owner may retrieve it, stream it again, list its input and delete it, at no further charge."""
    async with stage(folder=tmp_path) as on:
        sdk = on.sdk()
        first_response = await sdk.responses.create(**ASK)
        used = await on.used()
        assert (await sdk.responses.retrieve(first_response.id)).output_text == first_response.output_text
        events = [
            event async for event in await sdk.responses.retrieve(first_response.id, stream=True, starting_after=3)
        ]
        assert (events[0].sequence_number, events[-1].type) == (4, "response.incomplete")
        assert events[-1].response.usage == first_response.usage
        [item] = (await sdk.responses.input_items.list(first_response.id)).data
        assert item.content[0].text == "three small words"
        with pytest.raises(openai.BadRequestError, match="Only a background response"):
            await sdk.responses.cancel(first_response.id)
        await sdk.responses.delete(first_response.id)
        with pytest.raises(openai.NotFoundError, match=first_response.id):
            await sdk.responses.retrieve(first_response.id)
        assert await on.used() == used == (first_response.usage.total_tokens, 0)
        assert (await on.quota("staff/daily"))["requests"]["used"] == 1
        await on.audit()


@pytest.mark.every_engine
async def test_another_users_response_and_an_unknown_one_get_the_same_answer(tmp_path: Path) -> None:
    """On every path, for whole and streamed responses. The upstream is not asked."""
    async with stage(folder=tmp_path) as on:
        whole = (await on.post("/v1/responses", ASK)).json()["id"]
        streamed = (await _stream(on))[0].response.id
        received = on.simulator.received
        for name in (whole, streamed):
            for method, rest in PATHS:
                of_alice = await send(on, method, f"/v1/responses/{name}{rest}", "bob")
                unknown = await send(on, method, f"/v1/responses/{name[::-1]}{rest}", "bob")
                assert (of_alice.status, of_alice.body) == (
                    404,
                    unknown.body.replace(name[::-1].encode(), name.encode()),
                )
                assert of_alice.headers.keys() == unknown.headers.keys()
                assert of_alice.error["message"] == f"Response with id '{name}' not found."
            of_alice, unknown = [
                await on.post("/v1/responses", {**ASK, "previous_response_id": each}, user="bob")
                for each in (name, name[::-1])
            ]
            assert (of_alice.status, of_alice.body) == (404, unknown.body.replace(name[::-1].encode(), name.encode()))
            assert (of_alice.error["code"], of_alice.error["param"]) == (
                *("previous_response_not_found", "previous_response_id"),
            )
        assert on.simulator.received == received
        assert await on.used(user="bob") == (0, 0)
        assert (await send(on, "GET", f"/responses/{whole}")).status == 200


@pytest.mark.parametrize("name", ["..", "%2e%2e", "a%2f..%2fmodels", "resp_1%3fa=b", "resp%00", "é", "x" * 600])
async def test_an_id_cannot_lead_to_another_path(name: str, tmp_path: Path) -> None:
    """A text that cannot be an id is not even looked up."""
    async with stage(folder=tmp_path) as on:
        assert (await send(on, "GET", f"/v1/responses/{name}/input_items")).status == 404
        assert on.simulator.received == 0


async def test_only_known_parameters_are_forwarded(tmp_path: Path) -> None:
    """Others could mean anything to the upstream."""
    async with stage(folder=tmp_path) as on:
        response_id = (await on.post("/v1/responses", ASK)).json()["id"]
        for rest, passed in (
            ("?api_base=x&include[]=a&include[]=b%26c&limit=3", "?include%5B%5D=a&include%5B%5D=b%26c"),
            ("/input_items?limit=3&stream=true&order=asc", "/input_items?limit=3&order=asc"),
        ):
            assert (await send(on, "GET", f"/v1/responses/{response_id}{rest}")).status == 200
            assert on.simulator.requests[-1].path == f"/v1/responses/{response_id}{passed}"


@pytest.mark.every_engine
async def test_a_conversation_continues_the_users_own_response(tmp_path: Path) -> None:
    """The stored conversation is held with the call as input, and charged as the upstream reports it."""
    async with stage(folder=tmp_path) as on:
        first = await on.sdk().responses.create(**ASK)
        later = await on.sdk().responses.create(**ASK, previous_response_id=first.id)
        assert later.usage.input_tokens == first.usage.total_tokens + 3
        assert (await on.used())[0] == first.usage.total_tokens + later.usage.total_tokens
        await on.sdk().responses.input_tokens.count(model="fast", input="x", previous_response_id=later.id)
        await on.sdk().responses.compact(model="fast", input="x", previous_response_id=later.id)
        holds = sorted(row["hold_input"] for row in await on.rows("calls") if row["endpoint"] == "responses")
        assert holds[1] - holds[0] > first.usage.total_tokens
        await on.audit()


async def test_a_call_that_continues_more_than_is_left_is_refused(tmp_path: Path) -> None:
    """A short question after a long conversation costs the whole conversation as input."""
    policy = STAFF.replace("tokens: 1M", "tokens: 360")
    async with stage(policy, folder=tmp_path) as on:
        first_response = await on.post("/v1/responses", {**ASK, "input": "word " * 160})
        continuing = {**ASK, "input": "more", "previous_response_id": first_response.json()["id"]}
        assert (await on.post("/v1/responses", {**ASK, "input": "more"})).status == 200
        refused = await on.post("/v1/responses", continuing)
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")


@pytest.mark.every_engine
async def test_a_response_keeps_its_owner_after_a_restart(tmp_path: Path) -> None:
    """Also in another process on the same database."""
    simulator = Simulator(UPSTREAM_KEY)
    async with stage(folder=tmp_path, simulator=simulator) as on:
        first_response = await on.sdk().responses.create(**ASK)
        database = on.database
    async with stage(folder=tmp_path, simulator=simulator, database=database) as on:
        assert (await on.sdk().responses.retrieve(first_response.id)).id == first_response.id
        with pytest.raises(openai.NotFoundError):
            await on.sdk("bob").responses.retrieve(first_response.id)
        continuing = await on.sdk().responses.create(**ASK, previous_response_id=first_response.id)
        assert continuing.usage.input_tokens > first_response.usage.total_tokens


@pytest.mark.every_engine
async def test_the_id_of_a_response_is_committed_before_its_end_is_sent(tmp_path: Path) -> None:
    """So a crash cannot leave a client with a complete response whose owner nobody knows."""
    async with stage(folder=tmp_path) as on:
        stream = await on.sdk().responses.create(**ASK, stream=True)
        async for event in stream:
            found = {row["response_id"] for row in await on.rows("calls")}
            if event.type == "response.incomplete":
                assert event.response.id in found
        assert event.type == "response.incomplete"  # so the loop has checked it
        reply = await on.post("/v1/responses", ASK)
        assert reply.json()["id"] in {row["response_id"] for row in await on.rows("calls")}


async def test_a_model_without_stored_responses_says_so(tmp_path: Path) -> None:
    """`store: false` is sent to the upstream. A client that continues a response learns what to do instead."""
    async with stage(FORGETFUL, folder=tmp_path) as on:
        first_response = await on.sdk().responses.create(**ASK)
        assert first_response.model_dump()["store"] is False
        with pytest.raises(openai.NotFoundError, match=first_response.id):
            await on.sdk().responses.retrieve(first_response.id)
        reply = await on.post("/v1/responses", {**ASK, "previous_response_id": "resp_of_nobody"})
        assert "send the earlier messages again" in reply.error["message"]
        reply = await on.post("/v1/responses", {**ASK, "store": True})
        assert (reply.status, reply.error["param"]) == (400, "store")
        assert '"allow: {store: true}"' in reply.error["message"]


async def test_a_response_at_an_upstream_that_was_removed_is_not_found(tmp_path: Path) -> None:
    """The upstream that the model goes to now does not have it either."""
    async with stage(folder=tmp_path) as on:
        response_id = (await on.post("/v1/responses", ASK)).json()["id"]
        url = on.config.catalog.upstreams["simulated"].base_url
        text = text_of(STAFF.replace("upstream: simulated", "upstream: other"), database=on.database, upstream=url)
        on.config = load_text(text.replace("  simulated:", "  other:"))
        await on.server.policies.reload()
        assert (await send(on, "GET", f"/v1/responses/{response_id}")).status == 404
        reply = await on.post("/v1/responses", {**ASK, "previous_response_id": response_id})
        assert reply.error["code"] == "previous_response_not_found"


async def test_a_response_is_continued_at_the_upstream_that_stores_it(tmp_path: Path) -> None:
    """The others do not know it. Weights and chance are ignored for such a call."""
    second = Simulator(api_key=UPSTREAM_KEY, seed=2)
    runner, port = await serve_simulator(second)
    upstream = f'  second: {{base_url: "http://127.0.0.1:{port}/v1", api_key: {UPSTREAM_KEY}, kind: simulator}}\n'
    targets = "{upstreams: [{upstream: simulated}, {upstream: second, model: gpt-4o-mini}], max_output_tokens: 100"
    both = upstream + STAFF.replace("{upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100", targets)
    try:
        async with stage(both, folder=tmp_path) as on:
            response_ids = {(await on.post("/v1/responses", ASK)).json()["id"] for _ in range(12)}
            kept_by = {row["response_id"]: row["upstream"] for row in await on.rows("calls")}
            assert {*kept_by.values()} == {"simulated", "second"}
            for id in response_ids:
                reply = await on.post("/v1/responses", {**ASK, "previous_response_id": id})
                assert reply.status == 200
                assert (await send(on, "GET", f"/v1/responses/{id}")).status == 200
                [upstream] = [
                    row["upstream"] for row in await on.rows("calls") if row["response_id"] == reply.json()["id"]
                ]
                assert upstream == kept_by[id]
            await on.audit()
    finally:
        await runner.cleanup()


async def test_errors_of_the_upstream_are_reported(tmp_path: Path) -> None:
    """A refused key, no answer, an answer that breaks off: as for any call, and nothing is charged."""
    key = b"HTTP/1.1 401 No\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
    half = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99\r\n\r\n: half\n\n"
    async with stage(folder=tmp_path) as on:
        response_id = (await on.post("/v1/responses", ASK)).json()["id"]
        used = await on.used()
        for answer, code in ((key, "upstream_error"), (b"", "upstream_error")):
            async with upstream_that_says(answer) as url:
                await move(on, url)
                reply = await send(on, "GET", f"/v1/responses/{response_id}")
            assert (reply.status, reply.error["code"]) == (502, code)
        async with upstream_that_says(half) as url:
            await move(on, url)
            with pytest.raises(aiohttp.ClientError):
                await send(on, "GET", f"/v1/responses/{response_id}?stream=true")
        assert await on.used() == used


async def test_leaving_a_stream_of_a_stored_response_closes_it_at_the_upstream(tmp_path: Path) -> None:
    """Nothing is held for it, so it is not drained."""
    is_closed = asyncio.Event()
    begun = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: begun\n\n"
    async with stage(folder=tmp_path) as on:
        response_id = (await on.post("/v1/responses", ASK)).json()["id"]
        async with upstream_that_says(begun, is_closed) as url:
            await move(on, url)
            headers = {"authorization": f"Bearer {key_of('alice')}"}
            async with on.http.get(f"{on.url}/v1/responses/{response_id}?stream=true", headers=headers) as response:
                assert await response.content.readline() == b": begun\n"
            await is_closed.wait()


@asynccontextmanager
async def upstream_that_says(answer: bytes, is_closed: asyncio.Event | None = None) -> AsyncIterator[str]:
    """A server that answers each request with these bytes and closes. With `is_closed`, it keeps the stream open."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if is_closed is not None:
            await reader.read()
            is_closed.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def move(on: Stage, url: str) -> None:
    """Reload a config in which the upstream has this `base_url`."""
    on.config = load_text(text_of(STAFF, database=on.database, upstream=url))
    await on.server.policies.reload()
