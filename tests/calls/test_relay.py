"""What an upstream may do, and what becomes of the call: what the client sees, and what is charged."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from proxy.formats.meter import Meter
from proxy.formats.sse import Event
from proxy.ledger.entry import Entry
from tests.stage import STAFF, UPSTREAM_KEY, Stage, stage, until

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def _ask(simulate: str, **more: Any) -> dict[str, Any]:
    return {"model": "fast", "messages": HELLO, "metadata": {"simulate": simulate}, **more}


async def _charged(on: Stage) -> tuple[int, int]:
    """Tokens and requests on the books, once all is settled; nothing may be held."""
    await on.all_settled()
    item = await on.quota("staff/daily")
    assert item["tokens"]["held"] == item["requests"]["held"] == 0
    return item["tokens"]["used"], item["requests"]["used"]


async def _entry(on: Stage, request_id: str) -> Entry:
    entry = await on.server.ledger.entry(request_id)
    assert entry is not None
    return entry


@pytest.mark.parametrize("status", [400, 404, 409, 422])
async def test_a_bad_request_counts_as_one_request_and_passes_on(status: int, tmp_path: Path) -> None:
    """The upstream's 4xx is the user's fault: its words reach the user, no tokens are charged."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(f"status={status}"))
        assert reply.status == status
        assert reply.error["message"]
        assert reply.headers["x-ratelimit-remaining-requests"] == "99999"
        assert await _charged(on) == (0, 1)
        assert (await _entry(on, reply.headers["x-request-id"])).outcome == "rejected"


@pytest.mark.parametrize(
    ("simulate", "status"),
    [
        ("status=500", 500),
        ("status=503", 503),
        ("status=401", 502),
        ("status=403", 502),
        ("html", 502),
        ("status=429", 429),
        ("status=429 code=insufficient_quota", 503),
    ],
)
async def test_what_the_upstream_fails_with_is_free(simulate: str, status: int, tmp_path: Path) -> None:
    """Its own troubles, and ours with its account: nothing is charged, and no key is in the answer."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(simulate))
        assert reply.status == status
        assert reply.error["message"]
        assert UPSTREAM_KEY[:12].encode() not in reply.body
        assert await _charged(on) == (0, 0)
        if status == 429:
            assert "upstream" in reply.error["message"]
            assert reply.headers["retry-after"] == "1"


async def test_an_upstream_that_is_down_is_a_502_and_free(tmp_path: Path) -> None:
    """Nothing was sent, so nothing can have been used."""
    async with stage(folder=tmp_path, upstream="http://127.0.0.1:1/v1") as on:
        reply = await on.post(CHAT, _ask("tokens=1"))
        assert (reply.status, reply.error["code"]) == (502, "upstream_error")
        assert await _charged(on) == (0, 0)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
async def test_a_broken_stream_is_charged_for_what_passed(path: str, tmp_path: Path) -> None:
    """An upstream that drops the connection after 5 words was not free: input and words are on the books."""
    async with stage(folder=tmp_path) as on:
        body = _ask("tokens=50 cut=5", stream=True, prompt="Hi", input="Hi")
        if path == "/v1/responses":
            del body["prompt"]
        reply = await on.post(path, body)
        assert reply.status == 200
        assert b"upstream_error" in reply.body
        assert b"[DONE]" not in reply.body
        entry = await _entry(on, reply.headers["x-request-id"])
        assert (entry.outcome, entry.usage and entry.usage.provenance) == ("upstream_broke", "at_least")
        assert entry.usage and entry.usage.tokens.output >= 5
        assert await _charged(on) == (entry.usage.tokens.input + entry.usage.tokens.output, 1)


async def test_the_sdk_raises_when_a_stream_breaks(tmp_path: Path) -> None:
    """Closing early would look like success to an SDK, so the break is said in band."""
    async with stage(folder=tmp_path) as on:
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in await on.sdk().chat.completions.create(**_ask("tokens=50 cut=5", stream=True)):
                pass
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in await on.sdk().responses.create(
                model="fast", input="Hi", stream=True, metadata={"simulate": "tokens=50 cut=5"}
            ):
                pass


async def test_an_estimate_is_never_more_than_the_hold(tmp_path: Path) -> None:
    """By their bytes these five words would be more than five tokens: a guess may not take a quota over."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=90 no_usage", stream=True, max_tokens=5))
        entry = await _entry(on, reply.headers["x-request-id"])
        assert entry.usage and entry.usage.tokens.output == 5


async def test_ended_calls_are_counted_also_when_the_upstream_failed(tmp_path: Path) -> None:
    """An operator can see in the metrics what the upstream does."""
    async with stage(folder=tmp_path) as on:
        await on.post(CHAT, _ask("status=500"))
        await on.post(CHAT, _ask("html"))
        async with on.http.get(f"{on.admin_url}/metrics") as response:
            assert 'outcome="upstream_failed"} 2.0' in await response.text()


async def test_a_mistake_of_ours_never_puts_a_second_answer_into_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the head it is a clean 500; after it the connection is cut, and what passed is charged."""

    def mistake(meter: Meter, event: Event) -> bytes:
        raise RuntimeError("a mistake")

    async with stage(folder=tmp_path) as on:
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "see_event", mistake)
            with pytest.raises(aiohttp.ClientPayloadError):
                await on.post(CHAT, _ask("tokens=9", stream=True))
        assert await _charged(on) != (0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "see_whole", mistake)
            reply = await on.post(CHAT, _ask("tokens=9"))
        assert (reply.status, "mistake" in reply.error["message"]) == (500, True)
        assert "a mistake" not in reply.error["message"].replace("made a mistake", "")


async def test_a_broken_whole_answer_is_a_502_and_charged(tmp_path: Path) -> None:
    """The call was sent, so it may have cost something: the input at least."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("cut=5"))
        assert (reply.status, reply.error["code"]) == (502, "upstream_error")
        tokens, requests = await _charged(on)
        assert tokens > 0
        assert requests == 1


async def test_an_error_inside_a_stream_passes_on_and_is_no_output(tmp_path: Path) -> None:
    """What came before it is charged; its text is not."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=50 error=3 no_done", stream=True))
        assert b'"error"' in reply.body
        entry = await _entry(on, reply.headers["x-request-id"])
        assert entry.outcome == "upstream_broke"
        assert entry.usage and 3 <= entry.usage.tokens.output <= 6


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_without_usage_is_counted_by_us(stream: bool, tmp_path: Path) -> None:
    """Marked as at least: never free."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=40 no_usage", stream=stream))
        entry = await _entry(on, reply.headers["x-request-id"])
        assert entry.usage and entry.usage.provenance == "at_least"
        assert entry.usage.tokens.output >= 40
        assert (await _charged(on))[0] == entry.usage.tokens.input + entry.usage.tokens.output


async def test_an_explicit_zero_is_a_zero(tmp_path: Path) -> None:
    """An upstream that says 0 is believed; the request counts."""
    async with stage(folder=tmp_path) as on:
        await on.post(CHAT, _ask("tokens=40 usage_zero"))
        assert await _charged(on) == (0, 1)


async def test_the_end_of_an_answer_waits_for_the_books(tmp_path: Path) -> None:
    """When a client has seen `[DONE]`, its call is charged: also when it asks at that very moment."""
    async with stage(folder=tmp_path) as on:
        for _ in range(20):
            before, _ = await on.used()
            reply = await on.post(CHAT, _ask("tokens=7", stream=True, stream_options={"include_usage": True}))
            assert reply.body.endswith(b"data: [DONE]\n\n")
            total = json.loads(reply.body.split(b"data: ")[-2])["usage"]["total_tokens"]
            assert await on.used() == (before + total, 0)


async def test_a_shadow_quota_never_refuses_and_is_reported(tmp_path: Path) -> None:
    """It keeps its own counter, and says what it would have done."""
    policy = STAFF.replace("per: day}", "per: day}, trial: {requests: 1, per: day, enforce: shadow}")
    async with stage(policy, folder=tmp_path) as on:
        for _ in range(3):
            reply = await on.post(CHAT, _ask("tokens=1"))
            assert reply.status == 200
        assert (await on.quota("staff/trial"))["requests"]["used"] == 1
        assert (await _entry(on, reply.headers["x-request-id"])).would_refuse == ("staff/trial",)
        async with on.http.get(f"{on.admin_url}/metrics") as response:
            assert 'llm_quota_shadow_refusals_total{quota="staff/trial"} 2.0' in await response.text()


async def test_after_counts_at_the_end_and_changes_no_request(tmp_path: Path) -> None:
    """The classic way: in while there is anything left, however much the call then uses."""
    policy = STAFF.replace("tokens: 1M, requests: 100k, per: day", "tokens: 10, per: day, enforce: after")
    async with stage(policy, folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask("tokens=40", max_tokens=90))).status == 200
        assert json.loads(on.simulator.requests[-1].body)["max_tokens"] == 90
        assert (await on.used())[0] > 40
        assert (await on.post(CHAT, _ask("tokens=1"))).status == 429


async def test_a_call_that_can_never_fit_is_a_400(tmp_path: Path) -> None:
    """Waiting would not help, so it is no 429; agents answer this code by compacting."""
    policy = STAFF.replace("tokens: 1M", "tokens: 1k")
    async with stage(policy, folder=tmp_path) as on:
        with pytest.raises(openai.BadRequestError) as refused:
            await on.sdk().chat.completions.create(model="fast", messages=[{"role": "user", "content": "so " * 2000}])
        assert refused.value.code == "context_length_exceeded"
        assert on.simulator.received == 0


async def test_a_call_in_flight_makes_the_next_one_busy_not_exhausted(tmp_path: Path) -> None:
    """Room that a call in flight holds comes back in a moment, and the refusal says so."""
    policy = STAFF.replace("tokens: 1M", "tokens: 150")
    async with stage(policy, folder=tmp_path, on_disconnect="stop") as on:
        first = on.begin(CHAT, _ask("hang", max_tokens=100, stream=True))
        await on.simulator.until(lambda: on.simulator.received == 1)
        reply = await on.post(CHAT, _ask("tokens=1", max_tokens=100), headers={"x-quota-max-wait": "0"})
        assert (reply.status, reply.error["code"], reply.error["type"]) == (429, "rate_limit_exceeded", "tokens")
        assert "calls in flight" in reply.error["message"]
        assert "x-should-retry" not in reply.headers
        await on.hang_up(first)


@asynccontextmanager
async def _raw_upstream(*pieces: bytes) -> AsyncIterator[str]:
    """An upstream that streams these bytes, whatever it is asked, and ends without a word; gives its base URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        await server.wait_closed()


WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'


async def test_what_looked_like_the_end_passes_on_when_more_comes(tmp_path: Path) -> None:
    """A usage chunk in the middle holds nothing back for long, and the last one counts; no [DONE] is forged."""
    async with (
        _raw_upstream(WORD + USAGE + WORD, USAGE.replace(b"2}", b"3}")) as url,
        stage(folder=tmp_path, upstream=url) as on,
    ):
        reply = await on.post(CHAT, _ask("", stream=True, stream_options={"include_usage": True}))
        assert reply.body == WORD + USAGE + WORD + USAGE.replace(b"2}", b"3}")
        assert await _charged(on) == (8, 1)


async def test_an_end_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    """Megabytes of comments after the usage are no end of an answer, and not ours to keep."""
    comments = b": " + b"x" * 65_000 + b"\n\n"
    async with _raw_upstream(WORD + USAGE, *[comments] * 400) as url, stage(folder=tmp_path, upstream=url) as on:
        reply = await on.post(CHAT, _ask("", stream=True))
        assert b"never ends" in reply.body
        assert len(reply.body) < 2**20
        assert await _charged(on) == (7, 1)


async def test_a_call_that_only_others_hold_up_waits_for_them(tmp_path: Path) -> None:
    """Nobody is refused because others might use what is left."""
    policy = STAFF.replace("tokens: 1M", "tokens: 250")
    async with stage(policy, folder=tmp_path) as on:
        first = on.begin(CHAT, _ask("tokens=5 speed=50", max_tokens=200))
        await on.simulator.until(lambda: on.simulator.received == 1)
        second = on.begin(CHAT, _ask("tokens=5", max_tokens=200))
        assert ((await first).status, (await second).status) == (200, 200)


async def test_a_client_that_goes_while_its_call_waits_leaves_nothing(tmp_path: Path) -> None:
    """Its place is given up; nothing was sent, nothing is held, nothing is charged."""
    policy = STAFF.replace("tokens: 1M", "tokens: 150")
    async with stage(policy, folder=tmp_path, on_disconnect="stop") as on:
        first = on.begin(CHAT, _ask("hang", max_tokens=100, stream=True))
        await on.simulator.until(lambda: on.simulator.received == 1)
        _, held = await on.used()
        second = on.begin(CHAT, _ask("tokens=1", max_tokens=100))
        await until(lambda: len(on.server.queue) == 1)
        await on.hang_up(second)
        await until(lambda: len(on.server.queue) == 0 and on.server.calls_in_flight == 1)
        assert await on.used() == (0, held)
        assert on.simulator.received == 1
        await on.hang_up(first)


@pytest.mark.parametrize("said", ["soon", "-1", "601", "1.5"])
async def test_a_wait_that_makes_no_sense_is_a_400(said: str, tmp_path: Path) -> None:
    """The header is checked like everything else."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=1"), headers={"x-quota-max-wait": said})
        assert (reply.status, reply.error["param"]) == (400, "X-Quota-Max-Wait")
