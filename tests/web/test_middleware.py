"""Validation of requests, over a socket, and the conversion of errors to responses.

T12 large heads · T13 lengths and encodings that contradict each other · T16 hosts and targets · T17 other protocols ·
T18 pipelined requests · T19 paths
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from structlog.testing import capture_logs

from proxy.errors import BodyTooLarge, LedgerUnavailable
from proxy.web.middleware import LOG_LINE, response_to
from tests.bare_client import KEY, bare_client, get, post
from tests.builders import log_line
from tests.stage import Stage, key_of, stage

CHAT = "/v1/chat/completions"

# --------------------------------------------------------------------------------------------------------- validation

CHUNKED = b"2\r\n{}\r\n0\r\n\r\n"
# Sent behind each request of AMBIGUOUS. If it were parsed as a request, there would be a second reply, and a call.
BEHIND = post(CHAT, KEY)

AMBIGUOUS = {
    "T13 CL.TE": post(CHAT, KEY, "Transfer-Encoding: chunked", body=CHUNKED),
    "T13 TE.CL": post(CHAT, KEY, "Transfer-Encoding: chunked", "Content-Length: 3", body=CHUNKED, length=False),
    "T13 two lengths": post(CHAT, KEY, "Content-Length: 3"),
    "T13 xchunked": post(CHAT, KEY, "Transfer-Encoding: xchunked", body=CHUNKED, length=False),
    "T13 identity": post(CHAT, KEY, "Transfer-Encoding: identity", body=CHUNKED, length=False),
    "T13 gzip before chunked": post(CHAT, KEY, "Transfer-Encoding: gzip, chunked", body=CHUNKED, length=False),
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
    "T13 space before the colon": post(CHAT, KEY, "X-A : b"),
    "T16 two hosts": post(CHAT, KEY, "Host: other"),
    "T16 no host": post(CHAT, KEY, host="X-A: b"),
    "T16 host with a path": post(CHAT, KEY, host="Host: proxy/v1/models?"),
    "T16 host with a space": post(CHAT, KEY, host="Host: a b"),
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


async def test_an_ambiguous_request_is_a_400_and_nothing_behind_it_is_parsed(tmp_path: Path) -> None:
    """T13, T16: the connection is closed. No key is in the answer or in the log."""
    async with stage(folder=tmp_path) as on:
        with capture_logs() as logged:
            for case, request in AMBIGUOUS.items():
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
async def test_a_key_of_many_kilobytes_is_a_401_and_not_a_400(length: int, tmp_path: Path) -> None:
    """A JSON web token can have nine kilobytes. Its client learns that the key is unknown, and may go on."""
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(post(CHAT, f"Authorization: Bearer {'x' * length}") + get("/v1/models", KEY))
        refused, served = await client.reply(), await client.reply()
        assert (refused.status, refused.error["code"], served.status) == (401, "invalid_api_key", 200)


OTHER_SPELLINGS = [
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

# Those that a client with a wrong base_url sends.
LIKE_A_SERVED_ONE = [path for path in OTHER_SPELLINGS if path.lower().rstrip("/").endswith("/chat/completions")]


async def _message_of_404(on: Stage, request: bytes) -> str:
    async with bare_client(on.url) as client:
        client.send(request)
        reply = await client.reply()
        assert (reply.status, reply.headers["content-type"]) == (404, "application/json"), request
        return str(reply.error["message"])


async def test_other_spellings_of_a_path_are_a_404(tmp_path: Path) -> None:
    """T19: the answer quotes the path as it was sent."""
    async with stage(folder=tmp_path) as on:
        for path in OTHER_SPELLINGS:
            message, _, instead = (await _message_of_404(on, post(path, KEY))).partition(". Use POST /v1/")
            assert message == f"Invalid URL (POST {path})"
            assert bool(instead) == (path in LIKE_A_SERVED_ONE)
        assert on.simulator.received == 0


async def test_an_escaped_letter_matches_its_path_and_is_not_sent_upstream(tmp_path: Path) -> None:
    """T19: the path sent upstream is that of the matched endpoint, without the client's query."""
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(post("/v1/%63hat/completions?key=secret&x=../..", KEY))
        assert (await client.reply()).status == 200
        assert [call.path for call in on.simulator.requests] == [CHAT]


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_an_upgrade_to_another_protocol_is_ignored(upgrade: str, tmp_path: Path) -> None:
    """T17: the answer is in HTTP/1.1, and what follows is parsed as another request."""
    headers = (f"Upgrade: {upgrade}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk")
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(get("/v1/models", KEY, *headers))
        assert (await client.reply()).status == 200
        client.send(get("/v1/models"))
        assert (await client.reply()).status == 401
        assert "TRACE" in await _message_of_404(on, get("/v1/models", KEY, method="TRACE"))


async def test_pipelined_requests_are_authenticated_one_by_one(tmp_path: Path) -> None:
    """T18: they are answered in order, and the key of one does not count for the next."""
    async with stage(folder=tmp_path) as on, bare_client(on.url) as client:
        for turn in range(100):
            client.send(get("/v1/models", KEY) if turn % 2 else get("/v1/models"))
        assert [(await client.reply()).status for _ in range(100)] == [401, 200] * 50


# ------------------------------------------------------------------------------------------------------------- errors


def _answer(error: Exception) -> tuple[web.StreamResponse, dict[str, Any]]:
    request = make_mocked_request("POST", "/v1/x")
    request[LOG_LINE] = log_line()
    response = response_to(error, request)
    assert isinstance(response.body, bytes)
    return response, json.loads(response.body)["error"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (LedgerUnavailable(), 503, "ledger"),
        (web.HTTPNotFound(), 404, "Invalid URL (POST /v1/x)"),
        (web.HTTPMethodNotAllowed("POST", ["GET"]), 404, "Invalid URL"),
        (BodyTooLarge("larger than 1000 bytes"), 413, "larger than 1000 bytes"),
    ],
)
def test_every_error_has_openai_s_shape(error: Exception, status: int, message: str) -> None:
    """Errors of the proxy and errors of the server library."""
    response, shown = _answer(error)
    assert response.status == status
    assert message in shown["message"]
    assert shown.keys() >= {"message", "type", "param", "code"}
    assert response.headers["x-request-id"] == "req_1"


def test_an_unexpected_exception_is_a_500_without_its_text() -> None:
    """The text may contain anything, so only the log has it."""
    with capture_logs() as logged:
        response, shown = _answer(RuntimeError("secret detail"))
    assert response.status == 500
    assert "secret" not in json.dumps(shown)
    assert "secret detail" in str(logged)


def test_errors_on_anthropic_s_paths_have_its_shape() -> None:
    """The id is in the header that Anthropic's SDK reads, and in the body."""
    request = make_mocked_request("POST", "/v1/messages/x")
    request[LOG_LINE] = log_line()
    response = response_to(LedgerUnavailable(), request)
    assert isinstance(response.body, bytes)
    body = json.loads(response.body)
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", "overloaded_error", "req_1")
    assert (response.headers["request-id"], response.headers["retry-after"]) == ("req_1", "5")


async def test_no_answer_names_the_library_or_python(tmp_path: Path) -> None:
    """On both listeners: answers, errors of every step, health, pages, a preflight, and what no handler answers."""
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
    ask_first = ("Origin: https://app.example", "Access-Control-Request-Method: POST")
    requests = [
        get("/healthz"),
        get("/readyz"),
        get("/healthz", "Expect: 200-ok"),
        get("/healthz", method="DELETE"),
        get("/v1/models", KEY),
        get("/v1/models"),
        get("/v1/nothing"),
        get(CHAT, KEY, *upgrade),
        get(CHAT, *ask_first, method="OPTIONS"),
        get("/usage"),
        get("/usage", "Expect: 200-ok"),
        get("/metrics"),
        get("/admin/"),
        get("/admin"),
        get("/admin/api/session"),
        get("/admin/api/nothing"),
        post(CHAT, KEY),
        post(CHAT, KEY, body=b"{"),
        post(CHAT, KEY, "Expect: 200-ok"),
        post(CHAT, KEY, "Transfer-Encoding: xchunked", length=False),
        b"GET / HTTP/9.9\r\n\r\n",
        b"no request\r\n\r\n",
    ]
    async with stage(folder=tmp_path, cors=("https://app.example",)) as on:
        for url, request in product((on.url, on.admin_url), requests):
            async with bare_client(url) as client:
                client.send(request)
                reply = await client.reply()
                servers = [value for name, value in reply.headers.items() if name.lower() == "server"]
                assert servers == ["llm-quota-proxy"], request
