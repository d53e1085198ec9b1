"""Bodies over a real socket: unpacked, bounded, invited only where they are wanted, and read in their time.

T21 slow bodies · T23 Expect: 100-continue · T28 other types · T29 content codings and bombs · T30 bodies over the cap
"""

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import brotli
import pytest
from backports import zstd

from proxy.config.loader import ConnectionLimits
from proxy.web.body import REQUEST_BYTES_MAX
from tests.bare_client import GOOD, KEY, bare_client, get, post
from tests.stage import Reply, Stage, stage

CHAT = "/v1/chat/completions"
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": partial(brotli.compress, quality=1),
    "zstd": zstd.compress,
    "ZSTD": zstd.compress,
    "identity": bytes,
}


async def _sent(on: Stage, coding: str, body: bytes) -> Reply:
    async with bare_client(on.url) as client:
        client.send(post(CHAT, KEY, f"Content-Encoding: {coding}", body=body))
        return await client.reply()


@pytest.mark.parametrize("coding", PACK)
async def test_a_packed_body_is_unpacked_and_sent_on_plain(coding: str, tmp_path: Path) -> None:
    """T29: whatever packed it, the upstream gets JSON, and no word of a coding that is undone."""
    async with stage(folder=tmp_path) as on:
        text = "Hello " * 100_000
        body = json.dumps({"model": "fast", "messages": [{"role": "user", "content": text}]}).encode()
        assert (await _sent(on, coding, PACK[coding](body))).status == 200
        (call,) = on.simulator.requests
        assert json.loads(call.body)["messages"][0]["content"] == text
        assert "content-encoding" not in call.headers
        assert call.headers.getall("content-length") == [str(len(call.body))]  # type: ignore[attr-defined]


async def test_a_bomb_is_a_413_and_takes_no_memory(tmp_path: Path) -> None:
    """T29: half a megabyte that becomes 512 is read no further than the cap."""
    async with stage(folder=tmp_path) as on:
        for coding in ("gzip", "br", "zstd"):
            bomb = PACK[coding](bytes(4 * REQUEST_BYTES_MAX))
            tracemalloc.start()
            reply = await _sent(on, coding, bomb)
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert (reply.status, reply.error["code"]) == (413, "request_too_large")
            # The body grows to the cap, by steps that each may copy what is there.
            assert most < 2.5 * REQUEST_BYTES_MAX
        assert on.simulator.received == 0
        assert await on.used() == (0, 0)


@pytest.mark.parametrize("coding", ["compress", "gzip, zstd", "gzip\r\nContent-Encoding: gzip", "aes128gcm"])
async def test_a_coding_that_is_unknown_or_one_of_several_is_a_415(coding: str, tmp_path: Path) -> None:
    """T29: in OpenAI's shape, with what would be taken."""
    async with stage(folder=tmp_path) as on:
        reply = await _sent(on, coding, gzip.compress(b"{}"))
        assert (reply.status, reply.headers["accept-encoding"]) == (415, "gzip, deflate, br, zstd")
        assert "can't be read here" in reply.error["message"]
        assert on.simulator.received == 0


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_a_body_that_is_not_what_it_says_is_a_400(coding: str, tmp_path: Path) -> None:
    """T29: plain JSON, or half of a body: the connection serves on."""
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        half = PACK[coding](json.dumps(GOOD).encode())[:-3]
        for body in (json.dumps(GOOD).encode(), half):
            client.send(post(CHAT, KEY, f"Content-Encoding: {coding}", body=body))
            reply = await client.reply()
            assert reply.status == 400
            assert "can't be unpacked" in reply.error["message"]
        client.send(get("/v1/models", KEY))
        assert (await client.reply()).status == 200


async def test_a_body_that_goes_on_and_on_is_a_413(tmp_path: Path) -> None:
    """T30: without a length, also where it becomes nothing at all when it is unpacked."""
    skipped = b"\x50\x2a\x4d\x18" + (2**31).to_bytes(4, "little")  # a zstd frame that decoders pass over
    async with stage(folder=tmp_path) as on:
        for begins in (b"", skipped):
            async with bare_client(on.url) as client:
                coding = "zstd" if begins else "identity"
                head = (KEY, f"Content-Encoding: {coding}", "Transfer-Encoding: chunked")
                client.send(post(CHAT, *head, body=b"%x\r\n%b" % (2**31, begins), length=False))
                client.send(bytes(REQUEST_BYTES_MAX + 1))
                reply = await client.reply()
                assert (reply.status, reply.headers["connection"]) == (413, "close")


HEADS = {
    "no key": (post(CHAT, "Expect: 100-continue", body=b"", length=False), 401),
    "a wrong key": (
        post(CHAT, "api-key: wrong", "Expect: 100-continue", "Content-Length: 5", body=b"", length=False),
        401,
    ),
    "too long": (post(CHAT, KEY, "Expect: 100-continue", "Content-Length: 99999999", body=b"", length=False), 413),
    "not read here": (
        post(CHAT, KEY, "Expect: 100-continue", "Content-Encoding: x", "Content-Length: 9", body=b"", length=False),
        415,
    ),
    "no such path": (post("/v1/x", KEY, "Expect: 100-continue", "Content-Length: 9", body=b"", length=False), 404),
    "no such method": (get(CHAT, KEY, "Expect: 100-continue"), 404),
}


@pytest.mark.parametrize("case", HEADS)
async def test_who_asks_first_is_told_no_before_the_body_comes(case: str, tmp_path: Path) -> None:
    """T23: the final answer at once and no 100; and the end of the connection, since the body may not come."""
    head, status = HEADS[case]
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(head)
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        assert "message" in reply.error


async def test_who_asks_first_and_may_is_invited_once_the_key_is_known(tmp_path: Path) -> None:
    """T23: then the body is read, and answered; an expectation that we don't know is none."""
    body = json.dumps(GOOD).encode()
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(post(CHAT, KEY, "Expect: 100-Continue", f"Content-Length: {len(body)}", body=b"", length=False))
        assert (await client.reply()).status == 100
        client.send(body)
        assert (await client.reply()).status == 200
        client.send(post(CHAT, KEY, "Expect: something-else"))
        assert (await client.reply()).status == 200


async def test_a_body_that_trickles_is_a_408(tmp_path: Path) -> None:
    """T21: in OpenAI's shape, and the end of the connection; nothing is charged."""
    async with (
        stage(folder=tmp_path, connection_limits=ConnectionLimits(body_s=0.01)) as on,
        bare_client(on.url) as client,
    ):
        client.send(post(CHAT, KEY, "Content-Length: 100", body=b"{", length=False))
        reply = await client.reply()
        assert (reply.status, reply.error["code"]) == (408, "request_timeout")
        assert reply.headers["connection"] == "close"
        assert await on.used() == (0, 0)


async def test_a_body_that_flows_has_the_longer_the_more_has_come(tmp_path: Path) -> None:
    """T21: with no time at all to begin with, but a second for each byte, half a body can wait for its other half."""
    body = json.dumps(GOOD).encode()
    limits = ConnectionLimits(body_s=0, body_bytes_per_s=1)
    async with stage(folder=tmp_path, connection_limits=limits) as on, bare_client(on.url) as client:
        client.send(post(CHAT, KEY, f"Content-Length: {len(body)}", body=body[:40], length=False))
        for _ in range(3):
            assert (await on.get("/healthz")).status == 200  # what was to be late would be so by now
        client.send(body[40:])
        assert (await client.reply()).status == 200
