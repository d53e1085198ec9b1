"""The headers and bytes that pass from clients to upstreams and back, over sockets.

The tests for each threat to the HTTP server (docs/threats.md):

T9  keys of the proxy       here
T11 keys of clients         here, upstreams/test_headers
T12 large heads             test_middleware, test_listener
T13 lengths, encodings      test_middleware
T14 new framing             here
T15 line ends in headers    here, upstreams/test_headers
T16 hosts and targets       test_middleware
T17 other protocols         test_middleware
T18 pipelined requests      test_middleware
T19 paths                   test_middleware, test_routes
T20 other endpoints         test_routes
T21 slow, idle, too many    test_listener, test_body
T22 slow readers            test_response
T23 Expect: 100-continue    test_body
T28 other types             test_body
T29 content encodings       test_body
T30 too large bodies        test_body, test_routes
T39 broken streams          calls/test_relay, journeys/test_cuts
T44 headers of upstreams    here, upstreams/test_headers
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from proxy.config.loader import ConnectionLimits
from proxy.web.response import HEARTBEAT
from tests.bare_client import GOOD, bare_client, post
from tests.bare_upstream import bare_upstream, stream_head
from tests.stage import STAFF, UPSTREAM_KEY, key_of, stage

CHAT = "/v1/chat/completions"
STREAM = json.dumps({**GOOD, "metadata": {}, "stream": True}).encode()
MARK = "of-the-client"


async def test_no_credential_and_no_address_of_a_client_reaches_the_upstream(tmp_path: Path) -> None:
    """T11, T14, T133: no key in any form, account, cookie, address, or header that concerns only this connection."""
    sent = [
        f"Authorization: Bearer {key_of('alice')}",
        f"api-key: {key_of('alice')}",
        f"x-api-key: {key_of('alice')}",
        *(
            f"{name}: {MARK}"
            for name in (
                "x-goog-api-key Proxy-Authorization Cookie OpenAI-Organization OpenAI-Project X-Forwarded-For "
                "X-Forwarded-Host X-Forwarded-Proto Forwarded X-Real-IP CF-Connecting-IP CF-Ray Via X-Request-ID "
                "Origin Referer TE Keep-Alive Proxy-Connection X-Hop Sec-WebSocket-Protocol X-OpenWebUI-User-Id "
                "X-OpenWebUI-User-Email X-OpenWebUI-User-Jwt X-OpenWebUI-Groups X-Forwarded-User X-Forwarded-Email "
                "X-Forwarded-Groups X-Quota-Tag"
            ).split()
        ),
        "Connection: keep-alive, X-Hop, OpenAI-Beta",
        f"OpenAI-Beta: {MARK}",
        "HTTP-Referer: https://app.example",
        "Accept-Encoding: gzip, br",
    ]
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(post(f"{CHAT}?key={MARK}&api-key={MARK}", *sent))
        assert (await client.reply()).status == 200
        (call,) = on.simulator.requests
        seen = f"{call.path} {list(call.headers.items())} {call.body!r}"
        assert MARK not in seen
        assert key_of("alice") not in seen
        assert {name.lower(): value for name, value in call.headers.items()} == {
            "host": call.headers["host"],
            "authorization": f"Bearer {UPSTREAM_KEY}",
            "content-type": "application/json",
            "accept-encoding": "identity",
            "http-referer": "https://app.example",
            "user-agent": "llm-quota-proxy",
            "content-length": str(len(call.body)),
        } | {"accept": "*/*"}


REMOVED = [
    f"Set-Cookie: __cf_bm={MARK}; domain=.upstream.example",
    f"Server: {MARK}",
    f"openai-organization: {MARK}",
    f"x-litellm-key-spend: {MARK}",
    f"x-ratelimit-remaining-tokens-of: {MARK}",
    f"Strict-Transport-Security: {MARK}",
    f"Alt-Svc: {MARK}",
    f"Access-Control-Allow-Origin: {MARK}",
    f"Access-Control-Expose-Headers: {MARK}",
    f"CF-Ray: {MARK}",
    f"Via: {MARK}",
    f"X-Upstream-Key: {MARK}",
    f"Trailer: {MARK}",
    f"openai-processing-ms: {MARK}",
    "Connection: close, openai-processing-ms",
]


@pytest.mark.parametrize("is_stream", [True, False])
async def test_nothing_of_the_account_behind_our_key_reaches_a_client(is_stream: bool, tmp_path: Path) -> None:
    """T9, T44: cookies, names of the account, and the upstream's CORS and security headers are removed."""
    whole = b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}'

    async def serve(metadata: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if is_stream:
            writer.write(stream_head(*REMOVED) + b"data: [DONE]\n\n")
        else:
            head = ["HTTP/1.1 200 OK", "Content-Type: application/json", f"Content-Length: {len(whole)}", *REMOVED]
            writer.write("\r\n".join([*head, "", ""]).encode() + whole)
        await writer.drain()

    async with bare_upstream(serve) as upstream, stage(folder=tmp_path, upstream=upstream.url) as on:
        reply = await on.post(CHAT, {**GOOD, "metadata": {}, "stream": is_stream})
        assert reply.status == 200
        assert MARK not in str(reply.headers)
        assert reply.headers["server"] == "llm-quota-proxy"
        assert reply.headers["x-request-id"].startswith("req_")


def _chunk(text: str) -> bytes:
    return b'data: {"choices": [{"index": 0, "delta": {"content": "%b"}}]}\n\n' % text.encode()


async def test_a_silent_stream_gets_heartbeats_and_no_other_change(tmp_path: Path) -> None:
    """Before its first event, between two events, and after half an event. Without the comments it is what the
    upstream sent.
    """
    pieces = [_chunk("one"), _chunk("two")[:20], _chunk("two")[20:], b"data: [DONE]\n\n"]
    seen = bytearray()
    commented = asyncio.Event()

    async def serve(metadata: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream_head())
        for piece in pieces:
            commented.clear()
            await commented.wait()
            writer.write(piece)
        await writer.drain()

    limits = ConnectionLimits(heartbeat_s=0.01)
    async with (
        bare_upstream(serve) as upstream,
        stage(folder=tmp_path, upstream=upstream.url, connection_limits=limits) as on,
        on.http.post(on.url + CHAT, data=STREAM, headers={"api-key": key_of("alice")}) as response,
    ):
        async for data in response.content.iter_any():
            seen += data
            if HEARTBEAT in data:
                commented.set()
        assert seen.count(HEARTBEAT) >= len(pieces)
        assert seen.replace(HEARTBEAT, b"") == b"".join(pieces)


async def test_no_heartbeat_is_sent_inside_an_event_that_is_sent_in_pieces(tmp_path: Path) -> None:
    """An event of 9 MiB is too large to be buffered: the client has its beginning and waits for the rest."""
    event = b"data: " + b"x" * (9 * 2**20) + b"\n\n"
    rest = asyncio.Event()

    async def serve(metadata: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream_head() + event[:-10])
        await writer.drain()
        await rest.wait()
        writer.write(event[-10:] + b"data: [DONE]\n\n")
        await writer.drain()

    policy, limits = STAFF.replace("tokens: 1M", "tokens: 1000M"), ConnectionLimits(heartbeat_s=0.001)
    ask = {**GOOD, "model": "gpt-4o-mini", "metadata": {}, "stream": True}
    async with (
        bare_upstream(serve) as upstream,
        stage(policy, folder=tmp_path, upstream=upstream.url, connection_limits=limits) as on,
        on.http.post(on.url + CHAT, json=ask, headers={"api-key": key_of("alice")}) as response,
    ):
        seen = bytearray()
        async for data in response.content.iter_any():
            seen += data
            if len(seen) > 8 * 2**20 and not rest.is_set():
                for _ in range(10):  # takes several heartbeat intervals
                    await on.get("/healthz")
                rest.set()
        assert event in seen
