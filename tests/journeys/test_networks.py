"""Calls through a company's network: a proxy with CONNECT, a private certificate, and headers of a gateway."""

import asyncio
import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.bare_upstream import connections, stream_head
from tests.certificates import Authority
from tests.forward_proxy import forward_proxy
from tests.stage import STAFF, stage

AUTHORITY = Authority("Test CA")
SECRET = "gateway-secret-0123456789"
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


class Gateway:
    """Answers chat completions with a text that repeats the headers that it got. `heads` has all requests."""

    def __init__(self) -> None:
        self.heads: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            length = head.lower().partition("content-length:")[2].split("\r\n")[0]
            body = json.loads(await reader.readexactly(int(length)) or b"{}")
            choice = {"index": 0, "finish_reason": "stop"}
            if body.get("stream"):
                chunk = {"choices": [{**choice, "delta": {"content": head}}], "usage": USAGE}
                text = b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(chunk).encode()
                writer.write(stream_head(f"Content-Length: {len(text)}") + text)
            else:
                answer = {"choices": [{**choice, "message": {"content": head}}], "usage": USAGE}
                text = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)


@pytest.mark.parametrize("scheme", ["https", "http"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_call_through_a_proxy_to_an_upstream_with_a_private_certificate(
    scheme: str, stream: bool, tmp_path: Path
) -> None:
    """It is charged as usual. The log and the client get neither the password of the proxy nor the header."""
    gateway = Gateway()
    (tmp_path / "ca.pem").write_text(AUTHORITY.pem)
    tls = AUTHORITY.server("127.0.0.1", tmp_path) if scheme == "https" else None
    with capture_logs() as logs:
        async with connections(gateway.serve, tls=tls) as port, forward_proxy() as proxy:
            more = (
                f', ca: {tmp_path}/ca.pem, proxy: "http://me:proxy-password-0123@127.0.0.1:{proxy.port}"'
                f', headers: {{X-Gateway: "{SECRET}"}}'
            )
            upstream = f"{scheme}://127.0.0.1:{port}/v1"
            async with stage(STAFF, folder=tmp_path, upstream=upstream, kind="openai", more=more) as on:
                reply = await on.post("/v1/chat/completions", {"model": "fast", "stream": stream, **HELLO})
                assert (reply.status, SECRET.encode() in reply.body) == (200, False)
                assert b"x-gateway: ***" in reply.body
                await on.all_settled()
                assert await on.used() == (12, 0)
            assert len(proxy.requests) == 1
            assert proxy.requests[0].startswith("CONNECT " if scheme == "https" else "POST http://")
            assert f"x-gateway: {SECRET}" in gateway.heads[0]
    assert SECRET not in repr(logs)
    assert "proxy-password" not in repr(logs)


async def test_a_proxy_that_refuses_is_named_in_the_log_and_cools_its_upstream_down(tmp_path: Path) -> None:
    """The client is not told of it, and pays nothing."""
    with capture_logs() as logs:
        async with forward_proxy(b"407 Proxy Authentication Required") as proxy:
            more = f', proxy: "http://me:proxy-password-0123@127.0.0.1:{proxy.port}"'
            upstream = "https://llm.example/v1"
            async with stage(STAFF, folder=tmp_path, upstream=upstream, kind="openai", more=more) as on:
                reply = await on.post("/v1/chat/completions", {"model": "fast", **HELLO})
                assert reply.status == 502
                assert "proxy 127" not in reply.error["message"]
                await on.all_settled()
                assert await on.used() == (0, 0)
                assert on.server._relay._dispatcher.cooldowns.last["simulated"].outcome == "unreachable"
            reasons = {entry["reason"] for entry in logs if entry["event"] == "a try failed"}
            assert reasons == {
                f"the proxy 127.0.0.1:{proxy.port}: it does not take our user and password (status 407)"
            }
    assert "proxy-password" not in repr(logs)
