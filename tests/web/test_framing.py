"""What could be read in two ways, or is no HTTP, is a 400 of OpenAI's shape, and its connection is closed.

T12 large heads · T13 lengths and codings that contradict each other · T16 hosts and targets · T17 other protocols ·
T18 pipelined requests · T19 paths
"""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.bare_client import KEY, bare_client, get, post
from tests.stage import Stage, key_of, stage

CHAT = "/v1/chat/completions"
CHUNKED = b"2\r\n{}\r\n0\r\n\r\n"
# Behind each of these: were it taken for a request, there would be two replies, and a call.
BEHIND = post(CHAT, KEY)

UNCLEAR = {
    "T13 CL.TE": post(CHAT, KEY, "Transfer-Encoding: chunked", body=CHUNKED),
    "T13 TE.CL": post(CHAT, KEY, "Transfer-Encoding: chunked", "Content-Length: 3", body=CHUNKED, length=False),
    "T13 two lengths": post(CHAT, KEY, "Content-Length: 3"),
    "T13 xchunked": post(CHAT, KEY, "Transfer-Encoding: xchunked", body=CHUNKED, length=False),
    "T13 identity": post(CHAT, KEY, "Transfer-Encoding: identity", body=CHUNKED, length=False),
    "T13 a coding before chunked": post(CHAT, KEY, "Transfer-Encoding: gzip, chunked", body=CHUNKED, length=False),
    "T13 chunked twice": post(CHAT, KEY, *["Transfer-Encoding: chunked"] * 2, body=CHUNKED, length=False),
    "T13 chunked in 1.0": post(
        CHAT, KEY, "Transfer-Encoding: chunked", body=CHUNKED, length=False, version="HTTP/1.0"
    ),
    **{
        f"T13 length {length}": post(CHAT, KEY, f"Content-Length: {length}", length=False)
        for length in ("+5", "-1", "5,5", "1_0", "\xb2")
    },
    "T13 bare LF": post(CHAT, KEY).replace(b"\r\n", b"\n", 3),
    "T13 folded line": post(CHAT, KEY, "X-A: b\r\n c"),
    "T13 NUL": post(CHAT, KEY, "X-A: b\0c"),
    "T13 blank before the colon": post(CHAT, KEY, "X-A : b"),
    "T16 two hosts": post(CHAT, KEY, "Host: other"),
    "T16 no host": post(CHAT, KEY, host="X-A: b"),
    "T16 host with a path": post(CHAT, KEY, host="Host: proxy/v1/models?"),
    "T16 host with a blank": post(CHAT, KEY, host="Host: a b"),
    "T16 host without its bracket": post(CHAT, KEY, host="Host: [::"),
    "T16 absolute target": post(f"http://proxy{CHAT}", KEY),
    "T19 fragment": post(f"{CHAT}#/../x", KEY),
    "T17 HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "T17 HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "T17 TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "T17 CONNECT": get("upstream:443", method="CONNECT"),
    "T12 a line of 64 KiB": post(CHAT, f"Authorization: Bearer {'x' * 65536}"),
    "T12 a target of 64 KiB": post(f"/v1/{'x' * 65536}", KEY),
    "T12 200 lines": post(CHAT, KEY, *[f"X-{n}: 1" for n in range(200)]),
}


async def test_what_can_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_read(tmp_path: Path) -> None:
    """400 in OpenAI's shape and the end of the connection; no key is quoted, in the answer or in the log."""
    async with stage(folder=tmp_path) as on:
        with capture_logs() as logged:
            for case, request in UNCLEAR.items():
                async with bare_client(on.url) as client:
                    client.send(request + BEHIND)
                    reply = await client.reply()
                    assert (reply.status, reply.error["code"]) == (400, "bad_framing"), case
                    assert reply.headers["content-type"] == "application/json", case
                    assert reply.headers["server"] == "llm-quota-proxy", case
                    assert key_of("alice") not in str(reply.body), case
                    assert await client.is_closed(), case
        assert on.simulator.received == 0
        assert key_of("alice") not in str(logged)


@pytest.mark.parametrize("length", [9_000, 30_000])
async def test_a_long_token_is_a_wrong_key_and_no_broken_request(length: int, tmp_path: Path) -> None:
    """JSON web tokens of nine kilobytes are honest; who sends one learns that it is not known here."""
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(post(CHAT, f"Authorization: Bearer {'x' * length}") + get("/v1/models", KEY))
        refused, served = await client.reply(), await client.reply()
        assert (refused.status, refused.error["code"], served.status) == (401, "invalid_api_key", 200)


NO_PATHS = [
    "/v1/../admin",
    "/v1/%2e%2e/metrics",
    "/v1/x/../chat/completions",
    "/v1/%2e/chat/completions",
    "/v1%2fchat%2fcompletions",
    "//v1/chat/completions",
    "/v1//chat/completions",
    "/v1\\chat\\completions",
    "/v1/chat/completions;a=b",
    "/v1/chat/completions%00",
    "/v1/chat/completions/",
    "/V1/chat/completions",
    "/v1/chat%2Fcompletions",
    "/v1/models/../chat/completions",
]


async def _not_served(on: Stage, request: bytes) -> str:
    async with bare_client(on.url) as client:
        client.send(request)
        reply = await client.reply()
        assert (reply.status, reply.headers["content-type"]) == (404, "application/json"), request
        return str(reply.error["message"])


async def test_only_the_paths_of_the_list_are_served(tmp_path: Path) -> None:
    """T19: no other way of writing a path leads anywhere, and the answer shows it as it was sent."""
    async with stage(folder=tmp_path) as on:
        for path in NO_PATHS:
            assert await _not_served(on, post(path, KEY)) == f"Invalid URL (POST {path})"
        assert on.simulator.received == 0


async def test_an_escaped_letter_of_a_path_is_that_letter_and_the_upstream_never_sees_it(tmp_path: Path) -> None:
    """T19: what was matched is what is metered, and what is sent is ours, without the client's query."""
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(post("/v1/%63hat/completions?key=secret&x=../..", KEY))
        assert (await client.reply()).status == 200
        assert [call.path for call in on.simulator.requests] == [CHAT]


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_no_protocol_is_changed(upgrade: str, tmp_path: Path) -> None:
    """T17: who asks for another one is answered in this one, and what follows is a request like any other."""
    wishes = (f"Upgrade: {upgrade}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk")
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(get("/v1/models", KEY, *wishes))
        assert (await client.reply()).status == 200
        client.send(get("/v1/models"))
        assert (await client.reply()).status == 401
        assert "TRACE" in await _not_served(on, get("/v1/models", KEY, method="TRACE"))


async def test_pipelined_requests_are_each_let_in_for_themselves(tmp_path: Path) -> None:
    """T18: in order, and one with a key lends it to none that follows."""
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        for turn in range(100):
            client.send(get("/v1/models", KEY) if turn % 2 else get("/v1/models"))
        assert [(await client.reply()).status for _ in range(100)] == [401, 200] * 50
