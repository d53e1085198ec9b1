"""The clients, against servers that answer one thing and nothing else, and against the simulator itself."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import orjson
import pytest
from aiohttp import web

from proxy.torture.answers import Refusal
from proxy.torture.clients import Clients, Door, Target
from proxy.torture.evidence import Seen
from proxy.torture.plan import Plan
from proxy.torture.upstream import Accountant

NOW = 1_800_000_000_000
PLAN = Plan(clients=2, users=2, seconds=0.3, disconnects=0, limit=5000)
KEYS = ("key-of-0", "key-of-1")

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """Whoever is asked, answers so."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    await runner.cleanup()


async def run(url: str, plan: Plan = PLAN, **more: Any) -> list[Seen]:
    """What the plan's clients saw there."""
    return await Clients(Target([Door(url)], KEYS, **more), plan, now=lambda: NOW).run()


def always(status: int, body: object) -> Answer:
    """The same to everybody."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, body=orjson.dumps(body), headers={"x-request-id": "req-1"})

    return answer


def refusing(resets_at: int) -> dict[str, Any]:
    """A refusal as ours: 30 tokens are left in a window that ends then."""
    quota = {"tokens": {"limit": 100, "used": 70}, "window": {"opened_at": 5, "resets_at": resets_at}}
    return {"error": {"code": "insufficient_quota", "resets_at": resets_at, "quotas": [quota]}}


async def test_all_that_the_upstream_gives_is_seen() -> None:
    """Streams and whole answers of every kind, word for word; who hangs up, before the head or later, saw no more."""
    upstream = Accountant(KEYS[0], 0, tokens_per_s=2000)
    await upstream.start()
    plan = Plan(clients=16, users=1, seconds=1, disconnects=0.4)
    seen = await run(upstream.url, plan)
    await upstream.at_rest(5)
    await upstream.stop()
    given = {each.mark: each for each in upstream.given}
    assert {each.end for each in seen} == {"complete", "hung_up"}
    for each in seen:
        if each.end == "complete":
            assert each.usage in (None, given[each.mark].reported)
            assert each.words == given[each.mark].made
        elif each.mark in given:
            assert each.words <= given[each.mark].made
    left = [each for each in seen if each.end == "hung_up"]
    assert {each.status for each in left} == {None, 200}
    assert any(each.words for each in left)
    assert all(each.answered_s is not None for each in seen if each.words and each.usage is None)


async def test_a_refusal_is_read_and_the_call_made_again_at_the_reset() -> None:
    """At the very instant, once, to its end, and only by those who wait for it; the others go on with other calls."""
    asked: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        return await always(429, refusing(NOW // 1000))(request)

    async with server(answer) as url:
        seen = await run(url, replace(PLAN, seconds=1))
    assert {(each.end, each.status, each.id) for each in seen} == {("refused", 429, "req-1")}
    told = Refusal(free=30, window=5, resets_at=NOW // 1000)
    assert {each.refusal for each in seen} == {told}
    again = [each for each in seen if each.retries]
    assert {each.retries for each in again} == {told}
    assert 0 < len(again) < len(seen)
    by_mark = {body.pop("model"): body for body in asked}
    client = again[0].mark.rpartition("-")[0]
    number = int(again[0].mark.rpartition("-")[2])
    assert by_mark[f"gpt-4o-{client}-{number}"] == by_mark[f"gpt-4o-{client}-{number - 1}"]


@pytest.mark.parametrize("body", [refusing(NOW // 1000 + 60), {"error": {"resets_at": None}}])
async def test_nobody_waits_for_a_reset_that_comes_after_the_end(body: dict[str, Any]) -> None:
    """Or for one that was not promised: other calls are made meanwhile, after a moment."""
    async with server(always(429, body)) as url:
        seen = await run(url)
    assert 2 <= len(seen) < 20
    assert not any(each.retries for each in seen)


async def test_what_is_left_is_asked_for_where_a_refusal_does_not_say_it() -> None:
    """Other proxies' refusals carry no figures."""
    async with server(always(429, {"error": {"message": "slow down"}})) as url:
        seen = await run(url, free_of=lambda user: 70 + user)
    assert {(each.user, each.refusal and each.refusal.free) for each in seen} == {(0, 70), (1, 71)}


async def test_a_call_that_can_never_fit_is_refused_with_all_that_there_is() -> None:
    """So it was right only if it is larger than the limit."""
    async with server(always(400, {"error": {"code": "context_length_exceeded"}})) as url:
        seen = await run(url)
    assert {(each.end, each.refusal) for each in seen} == {("refused", Refusal(free=5000))}


@pytest.mark.parametrize(("status", "end"), [(500, "failed"), (401, "failed"), (400, "failed"), (200, "broken")])
async def test_what_is_no_answer_is_noted_as_such(status: int, end: str) -> None:
    """Another status, or a body that is none."""
    plan = Plan(clients=1, users=1, seconds=0.05, disconnects=0)
    async with server(always(status, ["no answer"])) as url:
        seen = await run(url, plan)
    assert {(each.end, each.status, each.refusal, each.disturbed) for each in seen} == {(end, status, None, False)}


async def test_an_answer_that_breaks_off_is_seen_as_far_as_it_came() -> None:
    """Its words count, since they were given."""
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "two words"}, "text": "two words"}]}\n\n'

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": "1000"})
        await response.prepare(request)
        await response.write(event)
        assert request.transport
        request.transport.close()
        return response

    async with server(answer) as url:
        seen = await run(url)
    assert {each.end for each in seen} == {"broken"}
    assert {each.words for each in seen} == {0, 2}  # whole answers are read as JSON, and half of one is none


async def test_where_nobody_is_clients_come_back_after_a_moment() -> None:
    """It is noted each time, and whether the proxy was down on purpose."""
    async with server(always(200, {})) as url:
        pass
    seen = await run(url)
    assert 2 <= len(seen) < 20
    assert {(each.end, each.disturbed) for each in seen} == {("unreached", False)}
    down = Target([Door(url, era=lambda: 1)], KEYS)
    assert {each.disturbed for each in await Clients(down, PLAN, now=lambda: NOW).run()} == {True}


async def test_what_broke_while_the_proxy_was_killed_is_no_fault() -> None:
    """Known by the era, which is another after the call than before."""
    eras = iter(range(0, 10_000, 2))
    async with server(always(500, {})) as url:
        target = Target([Door(url, era=lambda: next(eras))], KEYS)
        seen = await Clients(target, Plan(clients=1, users=1, seconds=0.05), now=lambda: NOW).run()
    assert {each.disturbed for each in seen} == {True}


@pytest.mark.parametrize(("status", "is_excused"), [(503, True), (500, False)])
async def test_only_a_503_is_excused_by_a_database_that_is_down(status: int, is_excused: bool) -> None:
    """That is what it is for; anything else must go on as if nothing were."""
    eras = iter(range(0, 10_000, 2))
    async with server(always(status, {})) as url:
        seen = await run(url, database_era=lambda: next(eras))
    assert {each.disturbed for each in seen} == {is_excused}


async def test_calls_go_to_all_that_are_well() -> None:
    """And to nobody who is known to be down, as long as there are others."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.path.split("/")[1])
        return await always(500, {})(request)

    async with server(answer) as url:
        there = url.removesuffix("/v1")
        doors = [Door(f"{there}/{name}/v1", era=partial(int, era)) for name, era in (("a", 0), ("b", 1), ("c", 2))]
        seen = await Clients(Target(doors, KEYS), replace(PLAN, seconds=0.1), now=lambda: NOW).run()
    assert len(seen) == len(asked)
    assert set(asked) == {"a", "c"}
