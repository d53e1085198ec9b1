"""The upstream records the tokens of each call, whether its client stayed or disconnected."""

import asyncio

import aiohttp

from proxy.torture.evidence import UpstreamRecord
from proxy.torture.plan import CallSpec, Disconnect, PlannedCall
from proxy.torture.upstream import RecordingUpstream


def planned(client: int, *, tokens: int = 5, stream: bool = False) -> PlannedCall:
    """A call with 3 input tokens and so many output tokens."""
    spec = CallSpec(
        "completions", "one two three", tokens, 1000, "max_tokens", 1, stream, True, Disconnect("after_text")
    )
    return PlannedCall(f"call-{client}-1", client, spec)


async def test_each_call_is_recorded_for_its_client() -> None:
    """Streamed or not. A call without a tag is recorded too, but counts for no client."""
    upstream = RecordingUpstream("key", 0, tokens_per_s=10_000)
    await upstream.start()
    headers = {"authorization": "Bearer key"}
    async with aiohttp.ClientSession(headers=headers) as http:
        for each in (planned(0), planned(1, stream=True), planned(3, tokens=7)):
            async with http.post(f"{upstream.url}/completions", json=each.body()) as response:
                await response.read()
        async with http.post(f"{upstream.url}/completions", json={"model": "m", "prompt": "hi"}) as response:
            await response.read()
    await upstream.wait_until_idle(5)
    await upstream.stop()
    *ours, other = upstream.records
    assert ours == [
        UpstreamRecord("call-0-1", 3, 5, (3, 5)),
        UpstreamRecord("call-1-1", 3, 5, (3, 5)),
        UpstreamRecord("call-3-1", 3, 7, (3, 7)),
    ]
    assert (other.tag, other.input_tokens) == ("hi", 1)
    assert [upstream.tokens_of(counter, 2) for counter in (0, 1)] == [8, 18]
    assert upstream.tokens_of(0, 1) == 26


async def test_a_call_whose_client_disconnected_is_recorded() -> None:
    """With the tokens that were generated until then and without usage; it is not open any more."""
    upstream = RecordingUpstream("key", 0, tokens_per_s=100)
    await upstream.start()
    async with aiohttp.ClientSession(headers={"authorization": "Bearer key"}) as http:
        for stream in (True, False):
            body = planned(0, tokens=1000, stream=stream).body()
            call = asyncio.ensure_future(_read(http, f"{upstream.url}/completions", body))
            await asyncio.wait([call], timeout=0.1)
            call.cancel()
            await asyncio.wait([call])
    await upstream.wait_until_idle(5)
    await upstream.stop()
    assert [(each.input_tokens, each.reported) for each in upstream.records] == [(3, None), (3, None)]
    assert all(0 < each.output_tokens < 1000 for each in upstream.records)


async def test_waiting_until_idle_has_a_timeout() -> None:
    """A proxy that keeps a call open for ever must not prevent the verdict."""
    upstream = RecordingUpstream("key", 0, tokens_per_s=1)
    await upstream.start()
    async with aiohttp.ClientSession(headers={"authorization": "Bearer key"}) as http:
        call = asyncio.ensure_future(_read(http, f"{upstream.url}/completions", planned(0, tokens=1000).body()))
        await asyncio.wait([call], timeout=0.05)
        await upstream.wait_until_idle(0.01)
        assert not call.done()
        call.cancel()
        await asyncio.wait([call])
    await upstream.stop()


async def _read(http: aiohttp.ClientSession, url: str, body: object) -> None:
    async with http.post(url, json=body) as response:
        await response.read()
