"""What the client gets and what is charged, for each thing that an upstream may do."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from proxy.calls.tokenizer import Tokenizers
from proxy.formats.meter import Meter
from proxy.formats.sse import Event
from proxy.ledger.entry import Entry
from tests.bare_upstream import connections
from tests.builders import entry_in
from tests.stage import STAFF, UPSTREAM_KEY, Stage, stage, until

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def _ask(simulate: str, **more: Any) -> dict[str, Any]:
    return {"model": "fast", "messages": HELLO, "metadata": {"simulate": simulate}, **more}


async def _charged(on: Stage) -> tuple[int, int]:
    """The tokens and requests that are charged, after all calls are settled. Nothing may be held."""
    await on.all_settled()
    item = await on.quota("staff/daily")
    assert item["tokens"]["held"] == item["requests"]["held"] == 0
    return item["tokens"]["used"], item["requests"]["used"]


async def _entry(on: Stage, request_id: str) -> Entry:
    entry = await entry_in(on.server.ledger, request_id)
    assert entry is not None
    return entry


@pytest.mark.parametrize("status", [400, 404, 409, 422])
async def test_a_rejected_request_is_forwarded_and_costs_one_request(status: int, tmp_path: Path) -> None:
    """A 4xx of the upstream is the user's fault. The user gets its message, and no tokens are charged."""
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
async def test_a_failure_of_the_upstream_is_free(simulate: str, status: int, tmp_path: Path) -> None:
    """So is a problem with our key or account. No key is in the answer."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(simulate))
        assert reply.status == status
        assert reply.error["message"]
        assert UPSTREAM_KEY[:12].encode() not in reply.body
        assert await _charged(on) == (0, 0)
        if status == 429:
            assert "upstream" in reply.error["message"]
            assert reply.headers["retry-after"] == "1"


class RecordingTokenizers(Tokenizers):
    """Tokenizers without tables that record how often a count was requested."""

    def __init__(self) -> None:
        super().__init__(())
        self.requests = 0

    async def count_all(self, texts: Sequence[str], encoding: str, *, timeout_s: float = 10) -> int | None:
        self.requests += 1
        return None


async def test_a_call_that_an_error_answer_has_ended_is_not_counted(tmp_path: Path) -> None:
    """Its status says what is charged, so its input is not counted. The input of an answer without usage is."""
    tokenizers = RecordingTokenizers()
    async with stage(folder=tmp_path, tokenizers=tokenizers) as on:
        for simulate, status in (("status=401", 502), ("html", 502), ("status=429", 429)):
            assert (await on.post(CHAT, _ask(simulate))).status == status
        assert tokenizers.requests == 0
        await on.post(CHAT, _ask("tokens=40 no_usage"))
        assert tokenizers.requests > 0


async def test_an_upstream_that_is_down_gives_a_502_and_is_free(tmp_path: Path) -> None:
    """T38: nothing was sent, so nothing can have been used."""
    async with stage(folder=tmp_path, upstream="http://127.0.0.1:1/v1") as on:
        reply = await on.post(CHAT, _ask("tokens=1"))
        assert (reply.status, reply.error["code"]) == (502, "upstream_error")
        assert await _charged(on) == (0, 0)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
async def test_a_broken_stream_is_charged_for_what_passed(path: str, tmp_path: Path) -> None:
    """T39: the upstream closes the connection after 5 words. The input and these words are charged."""
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
    """A stream that just ended would look complete to an SDK, so an error is sent as an event."""
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
    """By their bytes the words are more than five tokens. An estimate must not take a quota over its limit."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=90 no_usage", stream=True, max_tokens=5))
        entry = await _entry(on, reply.headers["x-request-id"])
        assert entry.usage and entry.usage.tokens.output == 5


async def test_metrics_count_calls_whose_upstream_failed(tmp_path: Path) -> None:
    """An operator sees the failures of an upstream in the metrics."""
    async with stage(folder=tmp_path) as on:
        await on.post(CHAT, _ask("status=500"))
        await on.post(CHAT, _ask("html"))
        async with on.http.get(f"{on.admin_url}/metrics") as response:
            assert 'outcome="upstream_failed"} 2.0' in await response.text()


async def test_a_bug_in_the_proxy_never_puts_an_error_into_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the head the client gets a 500. After it the connection is cut, and what passed is charged."""

    def fail(meter: Meter, event: Event) -> bytes:
        raise RuntimeError("a mistake")

    async with stage(folder=tmp_path) as on:
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "see_event", fail)
            with pytest.raises(aiohttp.ClientPayloadError):
                await on.post(CHAT, _ask("tokens=9", stream=True))
        assert await _charged(on) != (0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "see_whole", fail)
            reply = await on.post(CHAT, _ask("tokens=9"))
        assert (reply.status, reply.error["message"]) == (500, "Internal error of the proxy. It has been logged.")


async def test_a_whole_answer_that_breaks_off_is_a_502_and_is_charged(tmp_path: Path) -> None:
    """The call was sent, so it may have cost at least the input."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("cut=5"))
        assert (reply.status, reply.error["code"]) == (502, "upstream_error")
        tokens, requests = await _charged(on)
        assert tokens > 0
        assert requests == 1


async def test_an_error_event_in_a_stream_is_forwarded_and_not_counted(tmp_path: Path) -> None:
    """The text before it is charged, its own message is not."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=50 error=3 no_done", stream=True))
        assert b'"error"' in reply.body
        entry = await _entry(on, reply.headers["x-request-id"])
        assert entry.outcome == "upstream_broke"
        assert entry.usage and 3 <= entry.usage.tokens.output <= 6


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_without_usage_is_counted_by_the_proxy(stream: bool, tmp_path: Path) -> None:
    """It is recorded as `at_least`, and is never free."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=40 no_usage", stream=stream))
        entry = await _entry(on, reply.headers["x-request-id"])
        assert entry.usage and entry.usage.provenance == "at_least"
        assert entry.usage.tokens.output >= 40
        assert (await _charged(on))[0] == entry.usage.tokens.input + entry.usage.tokens.output


async def test_of_a_usage_of_zero_without_text_the_output_is_believed(tmp_path: Path) -> None:
    """The input is not, because the prompt contradicts it: it is counted."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=0 usage_zero"))
        entry = await _entry(on, reply.headers["x-request-id"])
        assert entry.usage and entry.usage.provenance == "at_least"
        assert (entry.usage.tokens.input > 0, entry.usage.tokens.output) == (True, 0)
        assert await _charged(on) == (entry.usage.tokens.input, 1)


@pytest.mark.parametrize("more", [{}, {"stream": True}])
async def test_a_usage_of_zero_beside_text_does_not_make_it_free(tmp_path: Path, more: dict) -> None:
    """The text contradicts it, so input and text are counted, streamed and whole."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=40 usage_zero", **more))
        entry = await _entry(on, reply.headers["x-request-id"])
        assert entry.usage and entry.usage.provenance == "at_least"
        assert entry.usage.tokens.input > 0
        assert entry.usage.tokens.output >= 40


async def test_the_end_of_an_answer_waits_for_the_commit(tmp_path: Path) -> None:
    """A client that has received `[DONE]` sees its call charged, even if it asks at once."""
    async with stage(folder=tmp_path) as on:
        for _ in range(20):
            before, _ = await on.used()
            reply = await on.post(CHAT, _ask("tokens=7", stream=True, stream_options={"include_usage": True}))
            assert reply.body.endswith(b"data: [DONE]\n\n")
            total = json.loads(reply.body.split(b"data: ")[-2])["usage"]["total_tokens"]
            assert await on.used() == (before + total, 0)


async def test_a_shadow_quota_never_refuses_but_is_reported(tmp_path: Path) -> None:
    """It has a counter of its own, and the record and the metric say which calls it would have refused."""
    policy = STAFF.replace("per: day}", "per: day}, trial: {requests: 1, per: day, enforce: shadow}")
    async with stage(policy, folder=tmp_path) as on:
        for _ in range(3):
            reply = await on.post(CHAT, _ask("tokens=1"))
            assert reply.status == 200
        assert (await on.quota("staff/trial"))["requests"]["used"] == 1
        assert (await _entry(on, reply.headers["x-request-id"])).would_refuse == ("staff/trial",)
        async with on.http.get(f"{on.admin_url}/metrics") as response:
            assert 'llm_quota_shadow_refusals_total{quota="staff/trial"} 2.0' in await response.text()


async def test_enforce_after_counts_at_the_end_and_changes_no_request(tmp_path: Path) -> None:
    """A call is admitted while anything is left, however much it then uses."""
    policy = STAFF.replace("tokens: 1M, requests: 100k, per: day", "tokens: 10, per: day, enforce: after")
    async with stage(policy, folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask("tokens=40", max_tokens=90))).status == 200
        assert json.loads(on.simulator.requests[-1].body)["max_tokens"] == 90
        assert (await on.used())[0] > 40
        assert (await on.post(CHAT, _ask("tokens=1"))).status == 429


async def test_a_call_that_can_never_fit_is_a_400(tmp_path: Path) -> None:
    """T63: waiting would not help, so it is not a 429. Agents react to this code by shortening the input."""
    policy = STAFF.replace("tokens: 1M", "tokens: 1k")
    async with stage(policy, folder=tmp_path) as on:
        with pytest.raises(openai.BadRequestError) as refused:
            await on.sdk().chat.completions.create(model="fast", messages=[{"role": "user", "content": "so " * 2000}])
        assert refused.value.code == "context_length_exceeded"
        assert on.simulator.received == 0


async def test_room_held_by_a_call_in_flight_is_busy_and_not_exhausted(tmp_path: Path) -> None:
    """It is free again soon, and the refusal says so."""
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
    """An upstream that answers every request with these bytes as a stream and closes. Yields its base URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    async with connections(serve) as port:
        yield f"http://127.0.0.1:{port}/v1"


WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'


async def test_an_event_that_looked_like_the_end_is_forwarded_when_more_comes(tmp_path: Path) -> None:
    """A usage chunk in the middle delays nothing for long, and the last one counts. No `[DONE]` is invented."""
    async with (
        _raw_upstream(WORD + USAGE + WORD, USAGE.replace(b"2}", b"3}")) as url,
        stage(folder=tmp_path, upstream=url) as on,
    ):
        reply = await on.post(CHAT, _ask("", stream=True, stream_options={"include_usage": True}))
        assert reply.body == WORD + USAGE + WORD + USAGE.replace(b"2}", b"3}")
        assert await _charged(on) == (8, 1)


async def test_an_end_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    """Megabytes of comments after the usage chunk are not kept in memory until the stream closes."""
    comments = b": " + b"x" * 65_000 + b"\n\n"
    async with _raw_upstream(WORD + USAGE, *[comments] * 400) as url, stage(folder=tmp_path, upstream=url) as on:
        reply = await on.post(CHAT, _ask("", stream=True))
        assert b"never ends" in reply.body
        assert len(reply.body) < 2**20
        assert await _charged(on) == (7, 1)


async def test_a_call_waits_for_calls_in_flight(tmp_path: Path) -> None:
    """No call is refused only because others might use what is left."""
    policy = STAFF.replace("tokens: 1M", "tokens: 250")
    async with stage(policy, folder=tmp_path) as on:
        first = on.begin(CHAT, _ask("tokens=5 speed=50", max_tokens=200))
        await on.simulator.until(lambda: on.simulator.received == 1)
        second = on.begin(CHAT, _ask("tokens=5", max_tokens=200))
        assert ((await first).status, (await second).status) == (200, 200)


async def test_a_client_that_leaves_while_its_call_waits_is_charged_nothing(tmp_path: Path) -> None:
    """The call leaves the queue. Nothing is sent, held or charged."""
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


@pytest.mark.parametrize("header", ["soon", "-1", "601", "1.5"])
async def test_an_invalid_x_quota_max_wait_is_a_400(header: str, tmp_path: Path) -> None:
    """It must be whole seconds, at most 600."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask("tokens=1"), headers={"x-quota-max-wait": header})
        assert (reply.status, reply.error["param"]) == (400, "X-Quota-Max-Wait")
