"""HTTP to the upstreams: what broke, and whether the call can have been sent."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.errors import UpstreamError
from proxy.policy.policy import Upstream
from proxy.upstreams.client import WHOLE_BYTES_MAX, Upstreams

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def _upstream(answer: bytes, *, repeat: int = 1) -> AsyncIterator[tuple[Upstream, list[bytes]]]:
    """A server that reads one request whole, answers with these bytes, and closes."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.lower().split(b"\r\n") if b"content-length" in line).split()[1])
        seen.append(head + await reader.readexactly(length))
        try:
            for _ in range(repeat):
                writer.write(answer)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Upstream("up", f"http://127.0.0.1:{port}/v1", None), seen
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def _open() -> AsyncIterator[Upstreams]:
    upstreams = Upstreams()
    upstreams.open()
    try:
        yield upstreams
    finally:
        await upstreams.close()
        await upstreams.close()  # closing twice is closing


async def test_a_whole_answer_comes_back() -> None:
    """Status, headers and body, and the request as it was given."""
    async with _upstream(HEAD + b"Retry-After: 3\r\nContent-Length: 2\r\n\r\n{}") as (up, seen), _open() as upstreams:
        async with upstreams.send(up, "/chat/completions", b'{"a":1}', {"x-title": "T"}) as answer:
            assert (answer.status, answer.retry_after, answer.is_stream) == (200, "3", False)
            assert await answer.whole() == b"{}"
        assert seen[0].startswith(b"POST /v1/chat/completions HTTP/1.1")
        assert b"x-title: T" in seen[0]
        assert seen[0].endswith(b'{"a":1}')


async def test_a_large_body_is_sent_whole() -> None:
    """Megabytes of pictures go out as they came in."""
    body = b"x" * (3 * 2**20)
    async with _upstream(HEAD + b"Content-Length: 2\r\n\r\n{}") as (up, seen), _open() as upstreams:
        async with upstreams.send(up, "/chat/completions", body, {}) as answer:
            await answer.whole()
        assert seen[0].endswith(body)


async def test_nobody_there_means_nothing_was_sent() -> None:
    """Provably free."""
    async with _open() as upstreams:
        with pytest.raises(UpstreamError, match="can't be reached") as failed:
            async with upstreams.send(Upstream("up", "http://127.0.0.1:1/v1", None), "/x", b"{}", {}):
                raise AssertionError
        assert failed.value.was_sent is False
        assert failed.value.headers == {"retry-after": "2"}


@pytest.mark.parametrize(
    "answer",
    [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["length", "chunked"],
)
async def test_an_answer_that_breaks_off_says_so(answer: bytes) -> None:
    """A body cut short is no body, in either framing."""
    async with _upstream(HEAD + answer) as (up, _), _open() as upstreams:
        with pytest.raises(UpstreamError, match="broke off") as failed:
            async with upstreams.send(up, "/x", b"{}", {}) as begun:
                await begun.whole()
        assert failed.value.was_sent is True


async def test_redirects_are_not_followed() -> None:
    """They would carry our key to wherever they point."""
    async with _upstream(b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n") as (
        up,
        seen,
    ):
        async with _open() as upstreams, upstreams.send(up, "/x", b"{}", {}) as answer:
            assert answer.status == 307
        assert len(seen) == 1


async def test_a_whole_answer_has_a_bound() -> None:
    """An upstream without end is cut off instead of filling the memory."""
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    piece = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    async with _upstream(head + piece, repeat=1) as (up, _), _open() as upstreams:
        with pytest.raises(UpstreamError):
            async with upstreams.send(up, "/x", b"{}", {}) as answer:
                await answer.whole()
    endless = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (WHOLE_BYTES_MAX * 2)
    async with _upstream(endless + b"x" * (WHOLE_BYTES_MAX + 2)) as (up, _), _open() as upstreams:
        with pytest.raises(UpstreamError, match="larger than"):
            async with upstreams.send(up, "/x", b"{}", {}) as answer:
                await answer.whole()


async def test_an_answer_compressed_unasked_is_refused() -> None:
    """It could be neither metered nor, without its header, read."""
    async with (
        _upstream(HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx") as (up, _),
        _open() as upstreams,
    ):
        with pytest.raises(UpstreamError, match="compressed"):
            async with upstreams.send(up, "/x", b"{}", {}):
                raise AssertionError


async def test_an_upstream_that_takes_the_request_and_hangs_up_may_have_cost_something() -> None:
    """It had the whole of it; that no answer came does not make it free."""
    async with _upstream(b"") as (up, seen), _open() as upstreams:
        with pytest.raises(UpstreamError, match="without an answer") as failed:
            async with upstreams.send(up, "/x", b"{}", {}):
                raise AssertionError
        assert failed.value.was_sent is True
        assert seen


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there the library writes before anything else can happen")
async def test_a_kept_connection_that_closes_before_a_byte_was_written_was_sent_nothing() -> None:
    """Both ends may have the same thought at the same time; where nothing went out nothing can have run."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            if head.startswith(b"POST"):
                seen.append(head)
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(2)
                writer.write(HEAD + b"Content-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    up = Upstream("up", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", None)
    async with _open() as upstreams:
        async with upstreams.send(up, "/x", b"{}", {}) as answer:
            await answer.whole()
        [kept] = (proto for kept in _kept(upstreams) for proto, _ in kept)
        asyncio.get_running_loop().call_soon(kept.close)  # after it was taken up, before it is written to
        with pytest.raises(UpstreamError, match="without an answer") as failed:
            async with upstreams.send(up, "/x", b"{}", {}):
                raise AssertionError
        assert failed.value.was_sent is False
        async with upstreams.send(up, "/x", b"{}", {}) as answer:
            assert await answer.whole() == b"{}"
    assert len(seen) == 2
    server.close()
    await server.wait_closed()


def _kept(upstreams: Upstreams) -> Iterable[Any]:
    """The connections that wait to be used again: nothing outside tells of them."""
    connector = upstreams._session.connector if upstreams._session else None
    return connector._conns.values() if connector else ()


async def test_an_error_is_read_as_far_as_it_comes() -> None:
    """The status says enough; a body that breaks off, or has no end, changes nothing."""
    head = b"HTTP/1.1 503 X\r\nContent-Length: 4000000\r\n\r\n"
    async with _upstream(head + b"{") as (up, _), _open() as upstreams, upstreams.send(up, "/x", b"{}", {}) as answer:
        assert await answer.beginning() == b"{"
    assert await answer.beginning() == b"{"  # also when its connection is closed
    endless = head + b"x" * 3_000_000
    async with _upstream(endless) as (up, _), _open() as upstreams, upstreams.send(up, "/x", b"{}", {}) as answer:
        assert 2**20 < len(await answer.beginning()) < 2**21
