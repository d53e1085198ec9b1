"""Stored responses belong to the user whose call produced them, on both engines and after restarts.

One whose answer did not pass to its end does not exist, and reads are bounded (T99).
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from structlog.testing import capture_logs

from proxy.calls.disconnect import Disconnects
from proxy.calls.read_limit import READS_AT_ONCE_MAX, READS_PER_MINUTE_MAX
from proxy.config.loader import load_text
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from tests.audit import connected
from tests.bare_upstream import BareUpstream, bare_upstream, connections, stream_head
from tests.stage import (
    STAFF,
    UPSTREAM_KEY,
    Clock,
    Reply,
    Stage,
    fast_timers,
    key_of,
    sqlite_in,
    stage,
    text_of,
    until,
)

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


async def test_the_log_says_what_the_client_of_a_stored_response_got(tmp_path: Path) -> None:
    """Also if it left: the status that was sent, the upstream, and the time without that of the upstream."""
    is_closed = asyncio.Event()
    begun = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: begun\n\n"
    async with stage(folder=tmp_path) as on:
        response_id = (await on.post("/v1/responses", ASK)).json()["id"]
        with capture_logs() as logged:
            assert (await send(on, "GET", f"/v1/responses/{response_id}")).status == 200
            async with upstream_that_says(begun, is_closed) as url:
                await move(on, url)
                headers = {"authorization": f"Bearer {key_of('alice')}"}
                async with on.http.get(
                    f"{on.url}/v1/responses/{response_id}?stream=true", headers=headers
                ) as response:
                    assert await response.content.readline() == b": begun\n"
                    await asyncio.wait([asyncio.ensure_future(is_closed.wait())], timeout=0.3)
                await is_closed.wait()
            await until(lambda: sum(line["event"] == "request" for line in logged) == 2)
    whole, left = [line for line in logged if line["event"] == "request"]
    assert (whole["status"], left["status"]) == (200, 200)
    assert {line["endpoint"] for line in (whole, left)} == {"GET /v1/responses/{id}"}
    assert {line["upstream"] for line in (whole, left)} == {"simulated"}
    assert whole["own_ms"] < whole["total_ms"]
    assert left["own_ms"] < 200 < left["total_ms"]  # the upstream had it for 300 ms
    assert "code" not in left


# ------------------------------------------------------------------------- responses that did not pass to their end


async def _check_gone(on: Stage, response_id: str) -> None:
    """Check that its own user gets the answer for an unknown id on every path, and cannot continue it."""
    received = on.simulator.received
    for method, rest in PATHS:
        reply = await send(on, method, f"/v1/responses/{response_id}{rest}")
        assert (reply.status, reply.error["code"]) == (404, None)
        assert reply.error["message"] == f"Response with id '{response_id}' not found."
    reply = await on.post("/v1/responses", {**ASK, "previous_response_id": response_id})
    assert (reply.status, reply.error["code"]) == (404, "previous_response_not_found")
    assert reply.error["message"] == f"Previous response with id '{response_id}' not found."
    assert on.simulator.received == received


def _deleted(on: Stage) -> list[str]:
    """The paths of the DELETE requests that the simulator received."""
    return [request.path for request in on.simulator.requests if request.method == "DELETE"]


@pytest.mark.every_engine
async def test_streams_that_end_at_a_limit_cannot_be_read_whole_afterwards(tmp_path: Path) -> None:
    """T99: the client is charged what passed. The upstream has all of it, and deletes it."""
    policy = STAFF.replace("tokens: 1M", "tokens: 9k").replace("max_output_tokens: 100", "max_output_tokens: 8000")
    policy = "wait: 0s\n" + policy
    ask = {"model": "fast", "input": "Hi", "stream": True, "metadata": {"simulate": "tokens=8000"}}
    async with stage(policy, folder=tmp_path) as on:
        replies = await asyncio.gather(*(on.post("/v1/responses", ask) for _ in range(8)))
        ended = [reply.body for reply in replies if reply.status == 200]
        assert len(ended) > 1
        assert all(b'"response.incomplete"' in body for body in ended)
        ids = [json.loads(body.split(b"data: ")[1].split(b"\n")[0])["response"]["id"] for body in ended]
        await on.simulator.until(lambda: len(_deleted(on)) == len(ids))
        assert sorted(_deleted(on)) == sorted(f"/v1/responses/{each}" for each in ids)
        for each in ids:
            await _check_gone(on, each)
        assert (await on.used())[0] <= 9000
        await on.audit()


@pytest.mark.parametrize("fault", ["cut=3", "error=3"])
async def test_a_response_that_the_upstream_broke_off_does_not_exist(fault: str, tmp_path: Path) -> None:
    """Neither after an error event nor after a broken connection."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post("/v1/responses", {**ASK, "stream": True, "metadata": {"simulate": fault}})
        await on.simulator.until(lambda: len(_deleted(on)) == 1)
        [response_id] = [row["response_id"] for row in await on.rows("calls")]
        assert response_id.encode() in reply.body
        await _check_gone(on, response_id)


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


BEGUN = _event("response.created", response={"id": "resp_1", "status": "in_progress"})
WORD = _event("response.output_text.delta", output_index=0, content_index=0, delta="word")
COMPLETED = _event("response.completed", response={"id": "resp_1", "status": "completed"})
USED = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}


@asynccontextmanager
async def _bare_stage(folder: Path, *parts: bytes, **more: Any) -> AsyncIterator[tuple[Stage, BareUpstream, Any]]:
    """A stage whose upstream sends these parts of a stream: the first at once, the others when the gate is opened."""
    gate = asyncio.Event()

    async def serve(_: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader
        writer.write(stream_head("Connection: close") + parts[0])
        await gate.wait()
        for part in parts[1:]:
            writer.write(part)

    async with bare_upstream(serve) as upstream, stage(folder=folder, upstream=upstream.url, **more) as on:
        try:
            yield on, upstream, gate
        finally:
            gate.set()


async def _leave_after(on: Stage, text: bytes, **fields: Any) -> None:
    """Begin a response, read up to this text, and close the connection."""
    body = {**ASK, "stream": True, "metadata": {}, **fields}
    headers = {"authorization": f"Bearer {key_of('alice')}"}
    async with on.http.post(f"{on.url}/v1/responses", json=body, headers=headers) as response:
        await response.content.readuntil(text)


async def test_a_response_whose_client_left_is_deleted_at_once_where_nothing_is_drained(tmp_path: Path) -> None:
    """With `on_disconnect: stop`."""
    async with _bare_stage(tmp_path, BEGUN + WORD, on_disconnect="stop") as (on, upstream, _):
        await _leave_after(on, b"word")
        await until(lambda: upstream.deleted == ["/v1/responses/resp_1"])
        await _check_gone(on, "resp_1")


@pytest.mark.parametrize("first", [BEGUN + WORD, WORD], ids=["at its beginning", "at its end"])
async def test_a_response_whose_client_left_is_deleted_after_its_drain(first: bytes, tmp_path: Path) -> None:
    """The whole answer is charged, and still not readable: it never passed. The id may come late."""
    last = _event("response.completed", response={"id": "resp_1", "usage": USED})
    async with _bare_stage(tmp_path, first, last, on_disconnect="drain") as (on, upstream, gate):
        await _leave_after(on, b"word")
        assert (await send(on, "GET", "/v1/responses/resp_1")).status == 404
        assert upstream.deleted == []
        gate.set()
        await until(lambda: upstream.deleted == ["/v1/responses/resp_1"])
        await on.all_settled()
        assert await on.used() == (7, 0)
        await _check_gone(on, "resp_1")


async def test_a_response_whose_drain_was_cut_is_deleted(tmp_path: Path) -> None:
    """The drain may take no time here."""
    async with _bare_stage(tmp_path, BEGUN + WORD, on_disconnect="drain", disconnects=Disconnects(drain_s=0)) as (
        on,
        upstream,
        _,
    ):
        await _leave_after(on, b"word")
        await until(lambda: upstream.deleted == ["/v1/responses/resp_1"])
        await _check_gone(on, "resp_1")


async def test_a_whole_response_whose_client_left_is_deleted(tmp_path: Path) -> None:
    """It is drained and charged, but nobody got it."""
    body = json.dumps({"id": "resp_1", "object": "response", "status": "completed", "usage": USED}).encode()
    received, gate = asyncio.Event(), asyncio.Event()

    async def serve(_: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader
        received.set()
        await gate.wait()
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)

    async with bare_upstream(serve) as upstream, stage(folder=tmp_path, upstream=upstream.url) as on:
        call = on.begin("/v1/responses", {**ASK, "metadata": {}})
        await received.wait()
        await on.hang_up(call)
        gate.set()
        await until(lambda: upstream.deleted == ["/v1/responses/resp_1"])
        assert await on.used() == (7, 0)
        await _check_gone(on, "resp_1")


@pytest.mark.parametrize(
    "last",
    [b"", _event("response.failed", response={"id": "resp_1", "status": "failed", "usage": USED})],
    ids=["no last event", "failed"],
)
async def test_a_stream_that_ends_without_its_answer_did_not_pass_to_its_end(last: bytes, tmp_path: Path) -> None:
    """The upstream closes the stream regularly, but the last event is missing, or says that the response failed."""
    async with _bare_stage(tmp_path, BEGUN + WORD, last) as (on, upstream, gate):
        gate.set()
        await on.post("/v1/responses", {**ASK, "stream": True, "metadata": {}})
        await until(lambda: upstream.deleted == ["/v1/responses/resp_1"])
        assert [row["outcome"] for row in await on.rows("calls")] == ["upstream_broke"]
        await _check_gone(on, "resp_1")


async def test_a_response_can_be_read_only_when_its_answer_has_passed(tmp_path: Path) -> None:
    """Not while its stream runs. Without usage it can be read too: it was charged what was counted."""
    async with _bare_stage(tmp_path, BEGUN + WORD, COMPLETED) as (on, upstream, gate):
        call = on.begin("/v1/responses", {**ASK, "stream": True, "metadata": {}})
        await until(lambda: bool(upstream.open))
        assert (await send(on, "GET", "/v1/responses/resp_1")).status == 404
        gate.set()
        assert (await call).status == 200
        async with upstream_that_says(_whole(b'{"id": "resp_1"}')) as url:
            await move(on, url)
            assert (await send(on, "GET", "/v1/responses/resp_1")).json() == {"id": "resp_1"}
        assert [row["provenance"] for row in await on.rows("calls")] == ["at_least"]
        assert upstream.deleted == []


async def test_a_response_that_the_stop_of_the_proxy_cut_is_deleted_before_it_ends(tmp_path: Path) -> None:
    """And a later process does not find it."""
    async with _bare_stage(tmp_path, BEGUN + WORD) as (on, upstream, _):
        headers = {"authorization": f"Bearer {key_of('alice')}"}
        body = {**ASK, "stream": True, "metadata": {}}
        async with on.http.post(f"{on.url}/v1/responses", json=body, headers=headers) as response:
            await response.content.readuntil(b"word")
            await on.server.stop(grace_s=0)
        assert upstream.deleted == ["/v1/responses/resp_1"]
    async with stage(folder=tmp_path, database=sqlite_in(tmp_path)) as on:
        await _check_gone(on, "resp_1")


async def test_a_response_that_an_earlier_release_recorded_is_judged_by_its_outcome(tmp_path: Path) -> None:
    """Earlier releases let the owner read responses of any outcome. The newest call with an id decides."""
    async with stage(folder=tmp_path) as on:
        response_id = (await on.post("/v1/responses", ASK)).json()["id"]
        assert (await send(on, "GET", f"/v1/responses/{response_id}")).status == 200
    for outcome in ("at_limit", "client_left", "stopped", "upstream_broke", "proxy_broke", "lost"):
        with connected(tmp_path / "quotas.db") as connection:
            connection.execute("UPDATE calls SET outcome = ?", (outcome,))
            connection.commit()
        async with stage(folder=tmp_path) as on:
            await _check_gone(on, response_id)


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({"store": False}, {}),
        ({}, {"more": ", allow: {store: false}"}),
        ({}, {"kind": "ollama"}),
        ({}, {"kind": "llamacpp"}),
    ],
    ids=["the client", "the policy", "ollama", "llama.cpp"],
)
async def test_what_is_not_stored_is_not_deleted(fields: Any, more: Any, tmp_path: Path) -> None:
    """The client or the policy said so, or the upstream stores nothing."""
    async with _bare_stage(tmp_path, BEGUN + WORD, b"", **more) as (on, upstream, gate):
        gate.set()
        await on.post("/v1/responses", {**ASK, "stream": True, "metadata": {}, **fields})
        await on.all_settled()
    assert upstream.deleted == []


@pytest.mark.parametrize(
    ("statuses", "attempts"),
    [([404, 503, 200], 3), ([404, 404, 404, 200], 3), ([500, 500, 500, 200], 3), ([405, 200], 1), ([200, 200], 1)],
)
async def test_a_deletion_that_may_succeed_later_is_tried_again(
    statuses: list[int], attempts: int, tmp_path: Path
) -> None:
    """The upstream may store the response only after its connection was closed. At most three attempts."""
    async with _bare_stage(tmp_path, BEGUN + WORD, b"") as (on, upstream, gate):
        upstream.delete_statuses = statuses
        gate.set()
        with fast_timers(100):
            await on.post("/v1/responses", {**ASK, "stream": True, "metadata": {}})
            await until(lambda: len(upstream.deleted) == attempts)
    assert len(upstream.deleted) == attempts


async def test_an_upstream_that_is_away_does_not_delay_the_client(tmp_path: Path) -> None:
    """The end of an answer does not wait for a deletion, and a stop tries once more and goes on."""
    async with _bare_stage(tmp_path, BEGUN + WORD, b"") as (on, upstream, gate):
        upstream.delete_statuses = [503] * 9
        gate.set()
        reply = await on.post("/v1/responses", {**ASK, "stream": True, "metadata": {}})
        assert reply.body.endswith(WORD)
        await on.all_settled()
    assert 1 <= len(upstream.deleted) <= 3


# --------------------------------------------------------------------------------------------- how reads are bounded


def _whole(body: bytes, *, length: int | None = None) -> bytes:
    """A whole answer; a `length` beyond the body's makes the client wait for more."""
    length = len(body) if length is None else length
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (length, body)


async def test_a_stored_response_is_passed_on_in_pieces(tmp_path: Path) -> None:
    """The client gets the first bytes while the upstream still sends. A response that breaks off is no whole one."""
    half = _whole(b'{"id": ', length=10**9)
    async with stage(folder=tmp_path) as on:
        response_id = (await on.post("/v1/responses", ASK)).json()["id"]
        headers = {"authorization": f"Bearer {key_of('alice')}"}
        async with upstream_that_says(half, asyncio.Event()) as url:
            await move(on, url)
            async with on.http.get(f"{on.url}/v1/responses/{response_id}", headers=headers) as response:
                assert response.headers["content-type"] == "application/json"
                assert await response.content.readexactly(7) == b'{"id": '
        async with upstream_that_says(half) as url:
            await move(on, url)
            with pytest.raises(aiohttp.ClientError):
                await send(on, "GET", f"/v1/responses/{response_id}")


async def test_a_user_may_read_four_stored_responses_at_once(tmp_path: Path) -> None:
    """Others are not affected, and a read that ended makes room for the next."""
    begun = stream_head() + b": begun\n\n"
    async with stage(folder=tmp_path) as on:
        ids = {user: (await on.post("/v1/responses", ASK, user=user)).json()["id"] for user in ("alice", "bob")}
        used = await on.used()
        async with upstream_that_says(begun, asyncio.Event()) as url:
            await move(on, url)
            reads = [await _read(on, "alice", ids["alice"]) for _ in range(READS_AT_ONCE_MAX)]
            reply = await send(on, "GET", f"/v1/responses/{ids['alice']}")
            assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
            assert reply.headers["retry-after"] == "1"
            (await _read(on, "bob", ids["bob"])).close()
            reads.pop().close()
            while (reply := await send(on, "GET", "/v1/responses/resp_unknown")).status == 429:
                pass
            assert reply.status == 404
            for read in reads:
                read.close()
        assert await on.used() == used


async def _read(on: Stage, user: str, response_id: str) -> aiohttp.ClientResponse:
    """Begin to read a response."""
    headers = {"authorization": f"Bearer {key_of(user)}"}
    response = await on.http.get(f"{on.url}/v1/responses/{response_id}?stream=true", headers=headers)
    assert await response.content.readline() == b": begun\n"
    return response


async def test_a_user_may_read_stored_responses_sixty_times_a_minute(tmp_path: Path) -> None:
    """Every request counts, also for ids that do not exist. The refusal says when the next one is possible.

    A used-up quota does not refuse a read, and a refused read is charged to no quota.
    """
    clock = Clock()
    async with stage(STAFF.replace("requests: 100k", "requests: 1"), folder=tmp_path, clock=clock) as on:
        path = f"/v1/responses/{(await on.post('/v1/responses', ASK)).json()['id']}"
        used = await on.used()
        assert (await send(on, "GET", path)).status == 200
        clock.ms += 1000
        for number in range(READS_PER_MINUTE_MAX - 1):
            reply = await send(on, "GET" if number % 2 else "DELETE", "/v1/responses/resp_unknown")
            assert reply.status == 404
        for later_ms, wait_s in ((0, 59), (58_500, 1), (499, 1)):
            clock.ms += later_ms
            reply = await send(on, "GET", path)
            assert (reply.status, reply.error["type"]) == (429, "requests")
            assert reply.error["code"] == "rate_limit_exceeded"
            assert (reply.headers["retry-after"], reply.error["retry_after"]) == (str(wait_s), wait_s)
            assert reply.error["reset_at"] == "2026-11-24T12:01:00+00:00"
            assert f"Try again in {wait_s} s." in reply.error["message"]
            assert (await send(on, "GET", path, "bob")).status == 404
        clock.ms += 1
        assert (await send(on, "GET", path)).status == 200
        assert (await send(on, "GET", path)).status == 429  # the other 59 began a second later
        assert (await on.used(), (await on.quota("staff/daily"))["requests"]["used"]) == (used, 1)


@asynccontextmanager
async def upstream_that_says(answer: bytes, is_closed: asyncio.Event | None = None) -> AsyncIterator[str]:
    """A server that answers each request with these bytes and closes. With `is_closed`, it keeps the stream open."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if is_closed is not None:
            await reader.read()
            is_closed.set()

    async with connections(serve) as port:
        yield f"http://127.0.0.1:{port}/v1"


async def move(on: Stage, url: str) -> None:
    """Reload a config in which the upstream has this `base_url`."""
    on.config = load_text(text_of(STAFF, database=on.database, upstream=url))
    await on.server.policies.reload()
