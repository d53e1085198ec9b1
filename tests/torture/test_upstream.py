"""The upstream's own account: all that it took and made, for whoever stayed and whoever left."""

import asyncio

import aiohttp

from proxy.torture.evidence import Given
from proxy.torture.plan import Ask, Leave, Wish
from proxy.torture.upstream import Accountant


def ask(client: int, *, tokens: int = 5, stream: bool = False) -> Ask:
    """A call for so many tokens; its input are 3."""
    wish = Wish("completions", "one two three", tokens, 1000, "max_tokens", 1, stream, True, Leave("before_the_end"))
    return Ask(f"call-{client}-1", client, wish)


async def test_each_call_is_on_the_account_of_its_client() -> None:
    """Whole and streamed alike; what others ask is given too, but is nobody's."""
    upstream = Accountant("key", 0, tokens_per_s=10_000)
    await upstream.start()
    headers = {"authorization": "Bearer key"}
    async with aiohttp.ClientSession(headers=headers) as http:
        for each in (ask(0), ask(1, stream=True), ask(3, tokens=7)):
            async with http.post(f"{upstream.url}/completions", json=each.body()) as response:
                await response.read()
        async with http.post(f"{upstream.url}/completions", json={"model": "m", "prompt": "hi"}) as response:
            await response.read()
    await upstream.at_rest(5)
    await upstream.stop()
    *ours, other = upstream.given
    assert ours == [
        Given("call-0-1", 3, 5, (3, 5)),
        Given("call-1-1", 3, 5, (3, 5)),
        Given("call-3-1", 3, 7, (3, 7)),
    ]
    assert (other.mark, other.taken) == ("hi", 1)
    assert [upstream.tokens_of(pot, 2) for pot in (0, 1)] == [8, 18]
    assert upstream.tokens_of(0, 1) == 26


async def test_what_was_made_for_a_client_that_left_is_on_the_account() -> None:
    """A part of it, and no usage was said; nothing is open any more."""
    upstream = Accountant("key", 0, tokens_per_s=100)
    await upstream.start()
    async with aiohttp.ClientSession(headers={"authorization": "Bearer key"}) as http:
        for stream in (True, False):
            body = ask(0, tokens=1000, stream=stream).body()
            call = asyncio.ensure_future(_read(http, f"{upstream.url}/completions", body))
            await asyncio.wait([call], timeout=0.1)
            call.cancel()
            await asyncio.wait([call])
    await upstream.at_rest(5)
    await upstream.stop()
    assert [(each.taken, each.reported) for each in upstream.given] == [(3, None), (3, None)]
    assert all(0 < each.made < 1000 for each in upstream.given)


async def test_waiting_for_rest_has_an_end() -> None:
    """A proxy that keeps a call open for ever must not keep the verdict from us."""
    upstream = Accountant("key", 0, tokens_per_s=1)
    await upstream.start()
    async with aiohttp.ClientSession(headers={"authorization": "Bearer key"}) as http:
        call = asyncio.ensure_future(_read(http, f"{upstream.url}/completions", ask(0, tokens=1000).body()))
        await asyncio.wait([call], timeout=0.05)
        await upstream.at_rest(0.01)
        assert not call.done()
        call.cancel()
        await asyncio.wait([call])
    await upstream.stop()


async def _read(http: aiohttp.ClientSession, url: str, body: object) -> None:
    async with http.post(url, json=body) as response:
        await response.read()
