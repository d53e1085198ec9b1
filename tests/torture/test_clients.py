"""The clients, against servers that give one answer only, and against the simulator."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import orjson
import pytest
from aiohttp import web

from proxy.torture.answers import Refusal
from proxy.torture.clients import Address, Clients, ProxyUnderTest, bearer
from proxy.torture.evidence import ClientRecord
from proxy.torture.plan import Plan
from proxy.torture.upstream import RecordingUpstream

NOW = 1_800_000_000_000
PLAN = Plan(clients=2, users=2, seconds=0.3, disconnects=0, limit=5000)
KEYS = ("key-of-0", "key-of-1")
USERS = [bearer(key) for key in KEYS]

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """A server that answers every request so; yields its base URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    await runner.cleanup()


async def run(url: str, plan: Plan = PLAN, **more: Any) -> list[ClientRecord]:
    """The records of the plan's clients at this base URL."""
    return await Clients(ProxyUnderTest([Address(url)], USERS, **more), plan, now=lambda: NOW).run()


def always(status: int, body: object) -> Answer:
    """The same answer to every request."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, body=orjson.dumps(body), headers={"x-request-id": "req-1"})

    return answer


def refusal_body(resets_at: int) -> dict[str, Any]:
    """The proxy's refusal: 30 tokens are free in a window that ends then."""
    quota = {"tokens": {"limit": 100, "used": 70}, "window": {"opened_at": 5, "resets_at": resets_at}}
    return {"error": {"code": "insufficient_quota", "resets_at": resets_at, "quotas": [quota]}}


async def test_clients_see_what_the_upstream_generated() -> None:
    """Word for word, streamed or not. A client that disconnects, before the status or later, never sees more."""
    upstream = RecordingUpstream(KEYS[0], 0, tokens_per_s=2000)
    await upstream.start()
    plan = Plan(clients=16, users=1, seconds=1, disconnects=0.4)
    records = await run(upstream.url, plan)
    await upstream.wait_until_idle(5)
    await upstream.stop()
    by_tag = {each.tag: each for each in upstream.records}
    assert {each.result for each in records} == {"complete", "disconnected"}
    for each in records:
        if each.result == "complete":
            assert each.usage in (None, by_tag[each.tag].reported)
            assert each.words == by_tag[each.tag].output_tokens
        elif each.tag in by_tag:
            assert each.words <= by_tag[each.tag].output_tokens
    disconnected = [each for each in records if each.result == "disconnected"]
    assert {each.status for each in disconnected} == {None, 200}
    assert any(each.words for each in disconnected)
    assert all(each.answered_s is not None for each in records if each.words and each.usage is None)


async def test_a_refused_call_is_repeated_at_the_reset() -> None:
    """Once, at that instant, without a disconnect, by a client that waits; the others make other calls."""
    received: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        received.append(await request.json())
        return await always(429, refusal_body(NOW // 1000))(request)

    async with server(answer) as url:
        records = await run(url, replace(PLAN, seconds=1))
    assert {(each.result, each.status, each.request_id) for each in records} == {("refused", 429, "req-1")}
    refusal = Refusal(free_tokens=30, window_opened_at=5, resets_at=NOW // 1000)
    assert {each.refusal for each in records} == {refusal}
    again = [each for each in records if each.retry_of]
    assert {each.retry_of for each in again} == {refusal}
    assert 0 < len(again) < len(records)
    bodies = {body.pop("model"): body for body in received}
    client = again[0].tag.rpartition("-")[0]
    number = int(again[0].tag.rpartition("-")[2])
    assert bodies[f"gpt-4o-{client}-{number}"] == bodies[f"gpt-4o-{client}-{number - 1}"]


@pytest.mark.parametrize("body", [refusal_body(NOW // 1000 + 60), {"error": {"resets_at": None}}])
async def test_no_client_waits_for_a_reset_after_the_end(body: dict[str, Any]) -> None:
    """Or if the refusal names none. After a moment it makes another call."""
    async with server(always(429, body)) as url:
        records = await run(url)
    assert 2 <= len(records) < 20
    assert not any(each.retry_of for each in records)


async def test_free_tokens_are_computed_if_a_refusal_does_not_state_them() -> None:
    """Other proxies' refusals state no figures."""
    async with server(always(429, {"error": {"message": "slow down"}})) as url:
        records = await run(url, free_tokens=lambda user: 70 + user)
    assert {(each.user, each.refusal and each.refusal.free_tokens) for each in records} == {(0, 70), (1, 71)}


async def test_a_call_that_never_fits_is_refused_with_the_whole_limit_free() -> None:
    """So the refusal is true only if the call needs more than the limit."""
    async with server(always(400, {"error": {"code": "context_length_exceeded"}})) as url:
        records = await run(url)
    assert {(each.result, each.refusal) for each in records} == {("refused", Refusal(free_tokens=5000))}


@pytest.mark.parametrize(("status", "result"), [(500, "failed"), (401, "failed"), (400, "failed"), (200, "broken")])
async def test_a_response_that_is_not_an_answer(status: int, result: str) -> None:
    """Another status has failed, a 200 with another body is broken."""
    plan = Plan(clients=1, users=1, seconds=0.05, disconnects=0)
    async with server(always(status, ["no answer"])) as url:
        records = await run(url, plan)
    assert {(each.result, each.status, each.refusal, each.disturbed) for each in records} == {
        (result, status, None, False)
    }


async def test_a_broken_stream_counts_the_words_that_arrived() -> None:
    """They were generated and passed on, so they have to be charged."""
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "two words"}, "text": "two words"}]}\n\n'

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": "1000"})
        await response.prepare(request)
        await response.write(event)
        assert request.transport
        request.transport.close()
        return response

    async with server(answer) as url:
        records = await run(url)
    assert {each.result for each in records} == {"broken"}
    # Half of an answer that is not streamed is not JSON, so no words are read.
    assert {each.words for each in records} == {0, 2}


async def test_clients_try_again_after_a_moment_if_they_cannot_connect() -> None:
    """Each attempt is recorded, and whether the proxy was down on purpose."""
    async with server(always(200, {})) as url:
        pass
    records = await run(url)
    assert 2 <= len(records) < 20
    assert {(each.result, each.disturbed) for each in records} == {("unreachable", False)}
    down = ProxyUnderTest([Address(url, epoch=lambda: 1)], USERS)
    assert {each.disturbed for each in await Clients(down, PLAN, now=lambda: NOW).run()} == {True}


async def test_a_call_during_a_kill_is_disturbed() -> None:
    """The epoch is higher after the call than before."""
    epochs = iter(range(0, 10_000, 2))
    async with server(always(500, {})) as url:
        target = ProxyUnderTest([Address(url, epoch=lambda: next(epochs))], USERS)
        records = await Clients(target, Plan(clients=1, users=1, seconds=0.05), now=lambda: NOW).run()
    assert {each.disturbed for each in records} == {True}


@pytest.mark.parametrize(("status", "is_disturbed"), [(503, True), (500, False)])
async def test_a_database_that_is_down_disturbs_only_a_503(status: int, is_disturbed: bool) -> None:
    """503 is the proxy's answer to it; any other failure is not explained by it."""
    epochs = iter(range(0, 10_000, 2))
    async with server(always(status, {})) as url:
        records = await run(url, database_epoch=lambda: next(epochs))
    assert {each.disturbed for each in records} == {is_disturbed}


async def test_calls_go_to_every_address_that_is_up() -> None:
    """And to none that is down, as long as another is up."""
    received: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        received.append(request.path.split("/")[1])
        return await always(500, {})(request)

    async with server(answer) as url:
        there = url.removesuffix("/v1")
        addresses = [
            Address(f"{there}/{name}/v1", epoch=partial(int, epoch)) for name, epoch in (("a", 0), ("b", 1), ("c", 2))
        ]
        records = await Clients(ProxyUnderTest(addresses, USERS), replace(PLAN, seconds=0.1), now=lambda: NOW).run()
    assert len(records) == len(received)
    assert set(received) == {"a", "c"}
