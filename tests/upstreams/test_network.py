"""How upstreams are reached: proxies, private certificates, headers, timeouts, and TCP keep-alive."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import UpstreamError, UpstreamTimeout
from proxy.policy.catalog import Secret, Transport, Upstream
from proxy.upstreams.client import Upstreams
from proxy.upstreams.network import keep_alive, proxy_authorization
from proxy.upstreams.sending import Route
from tests.bare_upstream import connections, opened
from tests.certificates import Authority
from tests.forward_proxy import forward_proxy

AUTHORITY = Authority("Test CA")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ANSWER = HEAD + b"Content-Length: 2\r\n\r\n{}"


class Requests:
    """Answers each request with `{}`, and keeps the heads. A connection serves several."""

    def __init__(self) -> None:
        self.heads: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            await reader.readexactly(int(head.lower().partition("content-length:")[2].split("\r\n")[0]))
            writer.write(ANSWER)


@asynccontextmanager
async def tls_upstream(folder: Path, seen: Requests) -> AsyncIterator[str]:
    """An upstream with a certificate of the test's authority. Yields its base_url."""
    async with connections(seen.serve, tls=AUTHORITY.server("127.0.0.1", folder)) as port:
        yield f"https://127.0.0.1:{port}/v1"


async def ask(upstreams: Upstreams, upstream: Upstream, body: bytes = b"{}", **headers: str) -> bytes:
    """Send one call, and return the body of its answer."""
    async with await upstreams.send(upstream, "/chat/completions", body, headers) as answer:
        return await answer.read()


async def failure_of(upstreams: Upstreams, upstream: Upstream, body: bytes = b"{}") -> UpstreamError:
    """The error that a call ends with."""
    with pytest.raises(UpstreamError) as failed:
        await ask(upstreams, upstream, body)
    return failed.value


def through(port: int, credentials: str = "") -> Transport:
    return Transport(proxy=Secret(f"http://{credentials}127.0.0.1:{port}"), ca=AUTHORITY.pem)


# ------------------------------------------------------------------------------------------------------------ proxies


async def test_a_call_to_https_goes_through_connect(tmp_path: Path) -> None:
    """With our user and password for the proxy, which the upstream does not see. The connection is used again."""
    seen = Requests()
    async with tls_upstream(tmp_path, seen) as url, forward_proxy() as proxy, opened() as upstreams:
        up = Upstream("up", url, None, transport=through(proxy.port, "us%C3%A9r:pass%20word%2Fof%3Aproxy@"))
        for _ in range(2):
            assert await ask(upstreams, up) == b"{}"
        authority = url.removeprefix("https://").removesuffix("/v1")
        assert proxy.requests == [f"CONNECT {authority} HTTP/1.1"]
        assert proxy.credentials == ["Basic dXPDqXI6cGFzcyB3b3JkL29mOnByb3h5"]
        assert [head.split("\r\n")[0] for head in seen.heads] == ["POST /v1/chat/completions HTTP/1.1"] * 2
        assert "proxy-authorization" not in "".join(seen.heads).lower()


async def test_a_call_to_http_has_its_whole_address_for_the_proxy() -> None:
    """And the same credentials."""
    seen = Requests()
    async with connections(seen.serve) as port, forward_proxy() as proxy, opened() as upstreams:
        up = Upstream("up", f"http://127.0.0.1:{port}/v1", None, transport=through(proxy.port, "me:secret@"))
        assert await ask(upstreams, up) == b"{}"
        assert proxy.requests == [f"POST http://127.0.0.1:{port}/v1/chat/completions HTTP/1.1"]
        assert proxy.credentials == ["Basic bWU6c2VjcmV0"]
        assert f"host: 127.0.0.1:{port}" in seen.heads[0].lower()


@pytest.mark.parametrize("body", [b"{}", b"x" * 2**21], ids=["small", "large"])
@pytest.mark.parametrize(
    ("scheme", "status", "why"),
    [
        ("https", b"407 Proxy Authentication Required", "it does not take our user and password (status 407)"),
        ("http", b"407 Proxy Authentication Required", "it does not take our user and password (status 407)"),
        ("https", b"403 Forbidden", "it makes no connection (status 403)"),
        ("https", b"", "it closed the connection"),
        ("https", None, "Connection refused"),
        ("http", None, "Connection refused"),
    ],
)
async def test_what_a_proxy_refuses_was_not_sent(scheme: str, status: bytes | None, why: str, body: bytes) -> None:
    """The log names the proxy, without the password. With http only a 407 is known to be the proxy's."""
    async with forward_proxy(status) as proxy, opened() as upstreams:
        port = 1 if status is None else proxy.port
        up = Upstream("up", f"{scheme}://127.0.0.1:2/v1", None, transport=through(port, "me:secret@"))
        error = await failure_of(upstreams, up, body)
        assert (error.was_sent, error.reason) == (False, f"the proxy 127.0.0.1:{port}: {why}")
        assert error.message == 'The upstream "up" can\'t be reached.'


async def test_an_upstream_that_a_proxy_does_not_find_is_named_with_the_proxy(tmp_path: Path) -> None:
    """What fails behind the proxy is the upstream's, such as its certificate."""
    async with tls_upstream(tmp_path, Requests()) as url, forward_proxy() as proxy, opened() as upstreams:
        transport = Transport(proxy=Secret(f"http://127.0.0.1:{proxy.port}"))
        error = await failure_of(upstreams, Upstream("up", url, None, transport=transport))
        server = url.removeprefix("https://").removesuffix("/v1")
        assert error.reason.startswith(f"{server}: its certificate is not valid: ")
        assert error.reason.endswith(f" (through the proxy 127.0.0.1:{proxy.port})")


async def test_a_proxy_that_does_not_answer_is_given_up_in_time() -> None:
    """It is a part of making the connection, so nothing was sent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with connections(serve) as port, opened() as upstreams:
        transport = Transport(connect_timeout_ms=200, proxy=Secret(f"http://127.0.0.1:{port}"))
        error = await failure_of(upstreams, Upstream("up", "https://llm.example/v1", None, transport=transport))
        assert (error.was_sent, type(error)) == (False, UpstreamError)
        assert error.reason == f"no connection within 0.2 s (through the proxy 127.0.0.1:{port})"


async def test_the_credentials_of_a_proxy() -> None:
    """They are decoded, and kept out of its address."""
    assert proxy_authorization("http://proxy:3128") is None
    assert proxy_authorization("http://:x@proxy:3128") is None
    assert proxy_authorization("http://me@proxy:3128") == "Basic bWU6"
    transport = Transport(proxy=Secret("http://me:p%40ss@proxy:3128"))
    route = Route(Upstream("up", "https://llm.example/v1", None, transport=transport), True)
    assert str(route.destination.proxy) == "http://proxy:3128"


# ------------------------------------------------------------------------------------------------------- certificates


async def test_a_private_authority_is_trusted_for_its_upstream_alone(tmp_path: Path) -> None:
    """A connection that trusts it is not used for another upstream at the same address."""
    seen = Requests()
    async with tls_upstream(tmp_path, seen) as url, opened() as upstreams:
        assert await ask(upstreams, Upstream("up", url, None, transport=Transport(ca=AUTHORITY.pem))) == b"{}"
        for transport in (Transport(), Transport(ca=Authority("Other CA").pem)):
            error = await failure_of(upstreams, Upstream("other", url, None, transport=transport))
            assert error.was_sent is False
            assert "its certificate is not valid" in error.reason
        assert len(seen.heads) == 1


async def test_many_calls_share_one_context_for_tls(tmp_path: Path) -> None:
    """Making one takes as long as ten calls. It is made anew when the certificates change."""
    async with tls_upstream(tmp_path, Requests()) as url, opened() as upstreams:
        ups = [Upstream("up", url, None, transport=Transport(ca=AUTHORITY.pem)) for _ in range(10)]
        await asyncio.gather(*(ask(upstreams, up) for up in ups))
        assert len(keys := {key.ssl for key in upstreams.connector._conns}) == 1
        changed = Transport(ca=AUTHORITY.pem + Authority("Other CA").pem)
        await ask(upstreams, Upstream("up", url, None, transport=changed))
        assert len({key.ssl for key in upstreams.connector._conns} - keys) == 1


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
@pytest.mark.parametrize("own", [True, False], ids=["beside ca", "alone"])
async def test_the_certificates_of_the_environment_are_trusted(variable: str, own: bool, tmp_path: Path) -> None:
    """`SSL_CERT_FILE` and `SSL_CERT_DIR` replace those of the system, also for an upstream with `ca`."""
    (tmp_path / "ca.pem").write_text(AUTHORITY.pem)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{AUTHORITY.subject_hash}.0").write_text(AUTHORITY.pem)
    script = (
        "import asyncio, sys\n"
        "from proxy.policy.catalog import Transport, Upstream\n"
        "from proxy.upstreams.client import Upstreams\n"
        "async def main(url, ca):\n"
        "    upstreams = Upstreams()\n"
        "    upstreams.open()\n"
        "    up = Upstream('up', url, None, transport=Transport(ca=ca or None))\n"
        "    async with await upstreams.send(up, '/x', b'{}', {}) as answer:\n"
        "        print(answer.status)\n"
        "    await upstreams.close()\n"
        "asyncio.run(main(*sys.argv[1:]))\n"
    )
    value = {"SSL_CERT_FILE": tmp_path / "ca.pem", "SSL_CERT_DIR": folder}[variable]
    async with tls_upstream(tmp_path, Requests()) as url:
        arguments = [sys.executable, "-c", script, url, Authority("Other CA").pem if own else ""]
        environ = {**os.environ, variable: str(value)}
        found = await asyncio.to_thread(subprocess.run, arguments, env=environ, capture_output=True, text=True)
        assert (found.stdout, found.stderr) == ("200\n", "")


# ------------------------------------------------------------------------------------------------------------ headers


async def test_headers_of_an_upstream_replace_those_of_the_call() -> None:
    """Each request to it has them, whatever it is for."""
    seen = Requests()
    async with connections(seen.serve) as port, opened() as upstreams:
        headers = (("x-tenant", Secret("blue")), ("user-agent", Secret("gateway")))
        up = Upstream("up", f"http://127.0.0.1:{port}", None, transport=Transport(headers=headers))
        await ask(upstreams, up, **{"user-agent": "a client", "x-title": "T"})
        async with await upstreams.send(up, "/models", b"", {}, method="GET"):
            pass
        assert "x-tenant: blue" in seen.heads[0]
        assert "user-agent: gateway" in seen.heads[0]
        assert "x-title: T" in seen.heads[0]
        assert "x-tenant: blue" in seen.heads[1]
        assert "a client" not in "".join(seen.heads)


# ----------------------------------------------------------------------------------------------------------- timeouts


async def test_a_connection_that_takes_too_long_was_not_sent() -> None:
    """TLS is a part of it. `idle_timeout` does not begin before."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with connections(serve) as port, opened() as upstreams:
        transport = Transport(connect_timeout_ms=300, idle_timeout_ms=100, first_byte_timeout_ms=50)
        error = await failure_of(upstreams, Upstream("up", f"https://127.0.0.1:{port}", None, transport=transport))
        assert (error.was_sent, error.reason) == (False, "no connection within 0.3 s")


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"\r\n"], ids=["nothing", "a half head", "a head"])
async def test_an_answer_that_does_not_begin_may_be_moved(sent: bytes) -> None:
    """Until the first byte of its body, whatever came before."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        await reader.read()

    async with connections(serve) as port, opened() as upstreams:
        transport = Transport(first_byte_timeout_ms=200)
        error = await failure_of(upstreams, Upstream("up", f"http://127.0.0.1:{port}", None, transport=transport))
        assert isinstance(error, UpstreamTimeout)
        assert (error.was_sent, error.may_be_moved) == (True, True)


async def test_the_longer_one_of_two_limits_has_no_effect() -> None:
    """An answer that does not begin within idle_timeout is a timeout like any other."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()

    async with connections(serve) as port, opened() as upstreams:
        transport = Transport(idle_timeout_ms=200, first_byte_timeout_ms=200)
        error = await failure_of(upstreams, Upstream("up", f"http://127.0.0.1:{port}", None, transport=transport))
        assert isinstance(error, UpstreamTimeout)
        assert not error.may_be_moved


async def test_an_answer_that_has_begun_may_pause() -> None:
    """Only the time to the first byte is limited, and it does not begin before a large body is written."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        await asyncio.sleep(1.2)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
        writer.write(HEAD + b"\r\n{")
        await asyncio.sleep(1.2)
        writer.write(b"}")

    async with connections(serve) as port, opened() as upstreams:
        up = Upstream("up", f"http://127.0.0.1:{port}", None, transport=Transport(first_byte_timeout_ms=1000))
        assert await ask(upstreams, up, b"x" * 2**25) == b"{}"


async def test_waiting_for_a_body_hands_all_of_it_out() -> None:
    """Also one that is empty."""
    for body in (b"{}", b""):

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD + b"\r\n" + body)  # noqa: B023

        async with connections(serve) as port, opened() as upstreams:
            up = Upstream("up", f"http://127.0.0.1:{port}", None, transport=Transport(first_byte_timeout_ms=60_000))
            async with await upstreams.send(up, "/x", b"{}", {}) as answer:
                assert answer.must_begin_in_time
                await answer.wait_for_body()
                await answer.wait_for_body()
                assert await answer.read() == body


# --------------------------------------------------------------------------------------------------------- keep-alive


def options_of(connection: Any) -> tuple[int, int]:
    """Whether keep-alive is on, and after how many seconds of silence it begins."""
    idle = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), idle


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system has another name for it")
async def test_connections_to_upstreams_are_kept_alive() -> None:
    """The system asks after 60 s of silence whether the other side is there."""
    seen = Requests()
    async with connections(seen.serve) as port, opened() as upstreams:
        up = Upstream("up", f"http://127.0.0.1:{port}", None)
        await ask(upstreams, up)
        [[(kept, _)]] = upstreams.connector._conns.values()
        assert options_of(kept.transport.get_extra_info("socket")) == (1, 60)


def test_only_tcp_is_kept_alive() -> None:
    """A Unix socket has no such options."""
    one, other = socket.socketpair()
    with one, other:
        keep_alive(one)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
