"""Request bodies: when they are asked for, their time, their size, and their decompression.

T21 slow bodies · T23 Expect: 100-continue · T28 other types · T29 content encodings and bombs · T30 too large bodies
"""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from backports import zstd

from proxy.config.loader import ConnectionLimits
from proxy.web.body_memory import REQUEST_BYTES_MAX
from tests.bare_client import GOOD, KEY, bare_client, get, post
from tests.formats.test_content_encoding import COMPRESS
from tests.stage import Reply, Stage, stage

CHAT = "/v1/chat/completions"
# The values of Content-Encoding that are accepted, with other spellings.
ACCEPTED = {**COMPRESS, "x-gzip": gzip.compress, "ZSTD": zstd.compress, "identity": bytes}


# --------------------------------------------------------------------------------------- compressed bodies, over HTTP


async def _send(on: Stage, encoding: str, body: bytes) -> Reply:
    async with bare_client(on.url) as client:
        client.send(post(CHAT, KEY, f"Content-Encoding: {encoding}", body=body))
        return await client.reply()


@pytest.mark.parametrize("encoding", ACCEPTED)
async def test_a_compressed_body_reaches_the_upstream_as_plain_json(encoding: str, tmp_path: Path) -> None:
    """T29: whatever the client used, the upstream gets JSON without Content-Encoding, and with the right length."""
    async with stage(folder=tmp_path) as on:
        text = "Hello " * 100_000
        body = json.dumps({"model": "fast", "messages": [{"role": "user", "content": text}]}).encode()
        assert (await _send(on, encoding, ACCEPTED[encoding](body))).status == 200
        (call,) = on.simulator.requests
        assert json.loads(call.body)["messages"][0]["content"] == text
        assert "content-encoding" not in call.headers
        assert call.headers.getall("content-length") == [str(len(call.body))]  # type: ignore[attr-defined]


async def test_a_decompression_bomb_is_a_413_and_takes_little_memory(tmp_path: Path) -> None:
    """T29: a small body that decompresses to 128 MiB is decompressed only up to the limit of 32 MiB."""
    async with stage(folder=tmp_path) as on:
        for encoding in ("gzip", "br", "zstd"):
            bomb = COMPRESS[encoding](bytes(4 * REQUEST_BYTES_MAX))
            tracemalloc.start()
            reply = await _send(on, encoding, bomb)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert (reply.status, reply.error["code"]) == (413, "request_too_large")
            # The body grows up to the limit; when it grows, it may be copied once.
            assert peak < 2.5 * REQUEST_BYTES_MAX
        assert on.simulator.received == 0
        assert await on.used() == (0, 0)


@pytest.mark.parametrize("encoding", ["compress", "gzip, zstd", "gzip\r\nContent-Encoding: gzip", "aes128gcm"])
async def test_an_unknown_encoding_and_several_encodings_are_a_415(encoding: str, tmp_path: Path) -> None:
    """T29: the answer lists the encodings that are accepted."""
    async with stage(folder=tmp_path) as on:
        reply = await _send(on, encoding, gzip.compress(b"{}"))
        assert (reply.status, reply.headers["accept-encoding"]) == (415, "gzip, deflate, br, zstd")
        assert "is not supported" in reply.error["message"]
        assert on.simulator.received == 0


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
async def test_a_body_that_cannot_be_decompressed_is_a_400(encoding: str, tmp_path: Path) -> None:
    """T29: plain JSON, or an incomplete body. The connection can be used for further requests."""
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        incomplete = COMPRESS[encoding](json.dumps(GOOD).encode())[:-3]
        for body in (json.dumps(GOOD).encode(), incomplete):
            client.send(post(CHAT, KEY, f"Content-Encoding: {encoding}", body=body))
            reply = await client.reply()
            assert reply.status == 400
            assert "can't be decompressed" in reply.error["message"]
        client.send(get("/v1/models", KEY))
        assert (await client.reply()).status == 200


async def test_an_endless_body_without_a_length_is_a_413(tmp_path: Path) -> None:
    """T30: also if it decompresses to nothing, so the bytes before decompression are limited too."""
    skipped = b"\x50\x2a\x4d\x18" + (2**31).to_bytes(4, "little")  # the head of a zstd frame that decoders skip
    async with stage(folder=tmp_path) as on:
        for beginning in (b"", skipped):
            async with bare_client(on.url) as client:
                encoding = "zstd" if beginning else "identity"
                head = (KEY, f"Content-Encoding: {encoding}", "Transfer-Encoding: chunked")
                client.send(post(CHAT, *head, body=b"%x\r\n%b" % (2**31, beginning), length=False))
                client.send(bytes(REQUEST_BYTES_MAX + 1))
                reply = await client.reply()
                assert (reply.status, reply.headers["connection"]) == (413, "close")


# ------------------------------------------------------------------------------------------------------- 100-continue


HEADS = {
    "no key": (post(CHAT, "Expect: 100-continue", body=b"", length=False), 401),
    "a wrong key": (
        post(CHAT, "api-key: wrong", "Expect: 100-continue", "Content-Length: 5", body=b"", length=False),
        401,
    ),
    "too long": (post(CHAT, KEY, "Expect: 100-continue", "Content-Length: 99999999", body=b"", length=False), 413),
    "an unknown encoding": (
        post(CHAT, KEY, "Expect: 100-continue", "Content-Encoding: x", "Content-Length: 9", body=b"", length=False),
        415,
    ),
    "no such path": (post("/v1/x", KEY, "Expect: 100-continue", "Content-Length: 9", body=b"", length=False), 404),
    "no such method": (get(CHAT, KEY, "Expect: 100-continue"), 404),
}


@pytest.mark.parametrize("case", HEADS)
async def test_expect_100_continue_gets_the_error_and_no_100(case: str, tmp_path: Path) -> None:
    """T23: the final answer comes at once. The connection is closed, because the body may follow or not."""
    head, status = HEADS[case]
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(head)
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        assert "message" in reply.error


async def test_expect_100_continue_gets_a_100_once_the_key_is_known(tmp_path: Path) -> None:
    """T23: then the body is read and the call answered. An expectation with another value is ignored."""
    body = json.dumps(GOOD).encode()
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(post(CHAT, KEY, "Expect: 100-Continue", f"Content-Length: {len(body)}", body=b"", length=False))
        assert (await client.reply()).status == 100
        client.send(body)
        assert (await client.reply()).status == 200
        client.send(post(CHAT, KEY, "Expect: something-else"))
        assert (await client.reply()).status == 200


# -------------------------------------------------------------------------------------------------------- slow bodies


async def test_a_body_that_is_too_slow_is_a_408(tmp_path: Path) -> None:
    """T21: the connection is closed, and nothing is charged."""
    async with (
        stage(folder=tmp_path, connection_limits=ConnectionLimits(body_s=0.01)) as on,
        bare_client(on.url) as client,
    ):
        client.send(post(CHAT, KEY, "Content-Length: 100", body=b"{", length=False))
        reply = await client.reply()
        assert (reply.status, reply.error["code"]) == (408, "request_timeout")
        assert reply.headers["connection"] == "close"
        assert await on.used() == (0, 0)


async def test_received_bytes_extend_the_time_of_a_body(tmp_path: Path) -> None:
    """T21: with no time to begin with and a second for each byte, the second half of a body may come later."""
    body = json.dumps(GOOD).encode()
    limits = ConnectionLimits(body_s=0, body_bytes_per_s=1)
    async with stage(folder=tmp_path, connection_limits=limits) as on, bare_client(on.url) as client:
        client.send(post(CHAT, KEY, f"Content-Length: {len(body)}", body=body[:40], length=False))
        for _ in range(3):
            assert (await on.get("/healthz")).status == 200  # without more time, the body would be too late by now
        client.send(body[40:])
        assert (await client.reply()).status == 200
