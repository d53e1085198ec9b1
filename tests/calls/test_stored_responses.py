"""Responses belong to the user who made them, on both engines and through restarts."""

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


async def asked(on: Stage, method: str, path: str, user: str = "alice") -> Reply:
    """One request without a body."""
    headers = {"authorization": f"Bearer {key_of(user)}"}
    async with on.http.request(method, on.url + path, headers=headers) as response:
        return Reply(response.status, response.headers.copy(), await response.read())


async def _played(on: Stage) -> list[Any]:
    """All events of one stream."""
    return [event async for event in await on.sdk().responses.create(**ASK, stream=True)]


@pytest.mark.every_engine
async def test_a_response_is_its_users_and_costs_nothing_more(tmp_path: Path) -> None:
    """Who made it may read it, play it again, list what it was asked and delete it; it was charged once."""
    async with stage(folder=tmp_path) as on:
        sdk = on.sdk()
        made = await sdk.responses.create(**ASK)
        used = await on.used()
        assert (await sdk.responses.retrieve(made.id)).output_text == made.output_text
        played = [event async for event in await sdk.responses.retrieve(made.id, stream=True, starting_after=3)]
        assert (played[0].sequence_number, played[-1].type) == (4, "response.incomplete")
        assert played[-1].response.usage == made.usage
        [item] = (await sdk.responses.input_items.list(made.id)).data
        assert item.content[0].text == "three small words"
        with pytest.raises(openai.BadRequestError, match="Only a background response"):
            await sdk.responses.cancel(made.id)
        await sdk.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError, match=made.id):
            await sdk.responses.retrieve(made.id)
        assert await on.used() == used == (made.usage.total_tokens, 0)
        assert (await on.quota("staff/daily"))["requests"]["used"] == 1
        await on.audit()


@pytest.mark.every_engine
async def test_somebody_elses_response_is_as_unknown_as_one_that_never_was(tmp_path: Path) -> None:
    """On every path, whole or streamed, and the upstream is not asked."""
    async with stage(folder=tmp_path) as on:
        whole = (await on.post("/v1/responses", ASK)).json()["id"]
        streamed = (await _played(on))[0].response.id
        received = on.simulator.received
        for name in (whole, streamed):
            for method, rest in PATHS:
                theirs = await asked(on, method, f"/v1/responses/{name}{rest}", "bob")
                never = await asked(on, method, f"/v1/responses/{name[::-1]}{rest}", "bob")
                assert (theirs.status, theirs.body) == (404, never.body.replace(name[::-1].encode(), name.encode()))
                assert theirs.headers.keys() == never.headers.keys()
                assert theirs.error["message"] == f"Response with id '{name}' not found."
            theirs, never = [
                await on.post("/v1/responses", {**ASK, "previous_response_id": each}, user="bob")
                for each in (name, name[::-1])
            ]
            assert (theirs.status, theirs.body) == (404, never.body.replace(name[::-1].encode(), name.encode()))
            assert (theirs.error["code"], theirs.error["param"]) == (
                *("previous_response_not_found", "previous_response_id"),
            )
        assert on.simulator.received == received
        assert await on.used(user="bob") == (0, 0)
        assert (await asked(on, "GET", f"/responses/{whole}")).status == 200


@pytest.mark.parametrize("name", ["..", "%2e%2e", "a%2f..%2fmodels", "resp_1%3fa=b", "resp%00", "é", "x" * 600])
async def test_an_id_is_never_a_way_to_another_path(name: str, tmp_path: Path) -> None:
    """What no upstream calls a response is not even looked up."""
    async with stage(folder=tmp_path) as on:
        assert (await asked(on, "GET", f"/v1/responses/{name}/input_items")).status == 404
        assert on.simulator.received == 0


async def test_only_known_parameters_pass_on(tmp_path: Path) -> None:
    """The others may mean anything to what is behind us."""
    async with stage(folder=tmp_path) as on:
        made = (await on.post("/v1/responses", ASK)).json()["id"]
        for rest, passed in (
            ("?api_base=x&include[]=a&include[]=b%26c&limit=3", "?include%5B%5D=a&include%5B%5D=b%26c"),
            ("/input_items?limit=3&stream=true&order=asc", "/input_items?limit=3&order=asc"),
        ):
            assert (await asked(on, "GET", f"/v1/responses/{made}{rest}")).status == 200
            assert on.simulator.requests[-1].path == f"/v1/responses/{made}{passed}"


@pytest.mark.every_engine
async def test_a_conversation_goes_on_from_ones_own_response(tmp_path: Path) -> None:
    """What stands at the upstream is held with the call, and charged as the upstream says it."""
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


async def test_a_call_that_reads_more_than_is_left_is_refused(tmp_path: Path) -> None:
    """A short question after a long answer costs what the long one has."""
    policy = STAFF.replace("tokens: 1M", "tokens: 360")
    async with stage(policy, folder=tmp_path) as on:
        made = await on.post("/v1/responses", {**ASK, "input": "word " * 160})
        again = {**ASK, "input": "more", "previous_response_id": made.json()["id"]}
        assert (await on.post("/v1/responses", {**ASK, "input": "more"})).status == 200
        refused = await on.post("/v1/responses", again)
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")


@pytest.mark.every_engine
async def test_a_response_stays_its_users_through_a_restart(tmp_path: Path) -> None:
    """And through another process."""
    simulator = Simulator(UPSTREAM_KEY)
    async with stage(folder=tmp_path, simulator=simulator) as on:
        made = await on.sdk().responses.create(**ASK)
        database = on.database
    async with stage(folder=tmp_path, simulator=simulator, database=database) as on:
        assert (await on.sdk().responses.retrieve(made.id)).id == made.id
        with pytest.raises(openai.NotFoundError):
            await on.sdk("bob").responses.retrieve(made.id)
        again = await on.sdk().responses.create(**ASK, previous_response_id=made.id)
        assert again.usage.input_tokens > made.usage.total_tokens


@pytest.mark.every_engine
async def test_a_crash_before_the_settle_leaves_nobody_with_a_whole_answer(tmp_path: Path) -> None:
    """At the moment in which the end of an answer goes out, its id is on the books already."""
    async with stage(folder=tmp_path) as on:
        stream = await on.sdk().responses.create(**ASK, stream=True)
        async for event in stream:
            found = {row["response_id"] for row in await on.rows("calls")}
            if event.type == "response.incomplete":
                assert event.response.id in found
        assert event.type == "response.incomplete"  # so it was looked at
        reply = await on.post("/v1/responses", ASK)
        assert reply.json()["id"] in {row["response_id"] for row in await on.rows("calls")}


async def test_what_is_not_stored_is_said_so(tmp_path: Path) -> None:
    """With `store: false` the upstream is told to keep none; who goes on from one learns what to do instead."""
    async with stage(FORGETFUL, folder=tmp_path) as on:
        made = await on.sdk().responses.create(**ASK)
        assert made.model_dump()["store"] is False
        with pytest.raises(openai.NotFoundError, match=made.id):
            await on.sdk().responses.retrieve(made.id)
        reply = await on.post("/v1/responses", {**ASK, "previous_response_id": "resp_of_nobody"})
        assert "send what was said before" in reply.error["message"]
        reply = await on.post("/v1/responses", {**ASK, "store": True})
        assert (reply.status, reply.error["param"]) == (400, "store")
        assert '"allow: {store: true}"' in reply.error["message"]


async def test_an_upstream_that_was_struck_out_keeps_nothing(tmp_path: Path) -> None:
    """Nor does one that the model goes to now have what another made."""
    async with stage(folder=tmp_path) as on:
        made = (await on.post("/v1/responses", ASK)).json()["id"]
        there = on.config.policy.upstreams["simulated"].base_url
        text = text_of(STAFF.replace("upstream: simulated", "upstream: other"), database=on.database, upstream=there)
        on.config = load_text(text.replace("  simulated:", "  other:"))
        await on.server.policies.reload()
        assert (await asked(on, "GET", f"/v1/responses/{made}")).status == 404
        reply = await on.post("/v1/responses", {**ASK, "previous_response_id": made})
        assert reply.error["code"] == "previous_response_not_found"


async def test_of_several_upstreams_the_one_that_keeps_it_goes_on(tmp_path: Path) -> None:
    """The others would not know it; so also where chance or a weight would send the call elsewhere."""
    second = Simulator(api_key=UPSTREAM_KEY, seed=2)
    runner, port = await serve_simulator(second)
    there = f'  second: {{base_url: "http://127.0.0.1:{port}/v1", api_key: {UPSTREAM_KEY}, kind: simulator}}\n'
    places = "{upstreams: [{upstream: simulated}, {upstream: second, model: gpt-4o-mini}], max_output_tokens: 100"
    both = there + STAFF.replace("{upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100", places)
    try:
        async with stage(both, folder=tmp_path) as on:
            made = {(await on.post("/v1/responses", ASK)).json()["id"] for _ in range(12)}
            kept_by = {row["response_id"]: row["upstream"] for row in await on.rows("calls")}
            assert {*kept_by.values()} == {"simulated", "second"}
            for id in made:
                reply = await on.post("/v1/responses", {**ASK, "previous_response_id": id})
                assert reply.status == 200
                assert (await asked(on, "GET", f"/v1/responses/{id}")).status == 200
                [upstream] = [
                    row["upstream"] for row in await on.rows("calls") if row["response_id"] == reply.json()["id"]
                ]
                assert upstream == kept_by[id]
            await on.audit()
    finally:
        await runner.cleanup()


async def test_what_the_upstream_has_against_it_passes_on(tmp_path: Path) -> None:
    """Our key refused, nobody there, an answer that breaks off: said as of any call, and no call is charged."""
    key = b"HTTP/1.1 401 No\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
    half = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99\r\n\r\n: half\n\n"
    async with stage(folder=tmp_path) as on:
        made = (await on.post("/v1/responses", ASK)).json()["id"]
        used = await on.used()
        for answer, code in ((key, "upstream_error"), (b"", "upstream_error")):
            async with upstream_that_says(answer) as there:
                await move(on, there)
                reply = await asked(on, "GET", f"/v1/responses/{made}")
            assert (reply.status, reply.error["code"]) == (502, code)
        async with upstream_that_says(half) as there:
            await move(on, there)
            with pytest.raises(aiohttp.ClientError):
                await asked(on, "GET", f"/v1/responses/{made}?stream=true")
        assert await on.used() == used


async def test_who_leaves_a_stream_that_is_played_again_leaves_it_at_the_upstream_too(tmp_path: Path) -> None:
    """Nothing is held for it, so nothing has to be read on."""
    gone = asyncio.Event()
    begun = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: begun\n\n"
    async with stage(folder=tmp_path) as on:
        made = (await on.post("/v1/responses", ASK)).json()["id"]
        async with upstream_that_says(begun, gone) as there:
            await move(on, there)
            headers = {"authorization": f"Bearer {key_of('alice')}"}
            async with on.http.get(f"{on.url}/v1/responses/{made}?stream=true", headers=headers) as response:
                assert await response.content.readline() == b": begun\n"
            await gone.wait()


@asynccontextmanager
async def upstream_that_says(answer: bytes, gone: asyncio.Event | None = None) -> AsyncIterator[str]:
    """A server that answers each request with these bytes and closes, or, with `gone`, waits for its client to go."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if gone is not None:
            await reader.read()
            gone.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def move(on: Stage, there: str) -> None:
    """Let the upstream's name mean another server from now on."""
    on.config = load_text(text_of(STAFF, database=on.database, upstream=there))
    await on.server.policies.reload()
