"""Connections over real sockets: too many, too slow, idle; and errors that have begun an answer already.

T21 slow heads, idle connections, the cap · T12 large heads (more of it in test_framing)
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from proxy.config.loader import ConnectionLimits
from proxy.web.listener import Listener
from tests.bare_client import bare_client, get, post

Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _ok(request: web.Request) -> web.StreamResponse:
    return web.Response(text=str(len(await request.read())))


@asynccontextmanager
async def _serving(limits: ConnectionLimits, handler: Handle = _ok) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_route("*", "/{any:.*}", handler)
    listener = Listener(application, limits)
    await listener.setup()
    await web.TCPSite(listener, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{listener.addresses[0][1]}"
    finally:
        await listener.cleanup()


@pytest.mark.parametrize("before", [b"", get("/")], ids=["the first", "a later one"])
async def test_a_head_that_takes_too_long_is_a_408_and_the_end(before: bytes) -> None:
    """T21: from its first byte on, however the rest trickles in."""
    async with _serving(ConnectionLimits(head_s=0.02)) as url, bare_client(url) as client:
        if before:
            client.send(before)
            assert (await client.reply()).status == 200
        client.send(b"GET / HTTP/1.1\r\nX-A: ")
        reply = await client.reply()
        assert (reply.status, reply.error["code"]) == (408, "request_timeout")
        assert (reply.headers["connection"], reply.headers["server"]) == ("close", "llm-quota-proxy")
        client.send(b"b\r\n\r\n")  # too late: nobody reads it
        assert await client.is_closed()


async def test_a_head_in_pieces_and_a_long_body_are_in_time() -> None:
    """The time is for a head alone: it ends with its last line, and a body has its own."""
    request = post("/", body=b"x" * 200_000)
    async with _serving(ConnectionLimits(head_s=5)) as url, bare_client(url) as client:
        for piece in (request[:10], request[10:30], request[30:150_000], request[150_000:]):
            client.send(piece)
            await client.writer.drain()
        assert (await client.reply()).body == b"200000"
    received: list[bytes] = []

    async def patient(request: web.Request) -> web.StreamResponse:
        received.append(await request.content.readexactly(1))
        return await _ok(request)

    async with _serving(ConnectionLimits(head_s=0.001), patient) as url, bare_client(url) as client:
        client.send(request[:-1])
        for _ in range(3):  # the head's time is long over when others have been answered
            async with bare_client(url) as other:
                other.send(get("/", "Content-Length: 1") + b"x")
                await other.reply()
        client.send(request[-1:])
        assert (await client.reply()).body == b"199999"


async def test_a_head_without_end_is_a_400_and_no_more_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """T12: lines that are each short enough, but too much together; what follows is dropped unseen."""
    async with _serving(ConnectionLimits()) as url, bare_client(url) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n")
        for number in range(20):
            client.send(b"X-%d: %b\r\n" % (number, b"x" * 30_000))
        reply = await client.reply()
        assert (reply.status, reply.error["code"]) == (400, "bad_framing")
        assert await client.is_closed()
        await client.writer.drain()
    assert not caplog.records


async def test_an_idle_connection_is_closed() -> None:
    """T21: before the first request, and after one."""
    async with _serving(ConnectionLimits(idle_s=0.02)) as url, bare_client(url) as client, bare_client(url) as silent:
        client.send(get("/"))
        assert (await client.reply()).status == 200
        assert await client.is_closed()
        assert await silent.is_closed()


async def test_one_connection_too_many_is_told_so_and_the_others_are_served() -> None:
    """T21: a 503 that says when to come back, also to who sends nothing; as soon as one has gone there is room."""
    async with _serving(ConnectionLimits(connections=3)) as url, AsyncExitStack() as held:
        clients = [await held.enter_async_context(bare_client(url)) for _ in range(3)]
        for client in clients:
            client.send(get("/"))
            assert (await client.reply()).status == 200
        async with bare_client(url) as late:
            late.send(post("/", body=b"x" * 100_000))
            reply = await late.reply()
            assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
            assert (reply.headers["retry-after"], reply.headers["connection"]) == ("5", "close")
        clients[0].send(get("/"))
        assert (await clients[0].reply()).status == 200
        for client in clients[:2]:
            client.writer.close()
            await client.writer.wait_closed()
        status = 503
        while status == 503:  # until the two that closed are noticed
            async with bare_client(url) as next_one:
                next_one.send(get("/"))
                status = (await next_one.reply()).status
        assert status == 200


async def test_slow_heads_stop_nobody() -> None:
    """T21: with hundreds of connections open that say nothing whole, others are served."""
    async with _serving(ConnectionLimits()) as url, AsyncExitStack() as held:
        for _ in range(200):
            slow = await held.enter_async_context(bare_client(url))
            slow.send(b"GET / HTT")
        async with bare_client(url) as client:
            client.send(get("/"))
            assert (await client.reply()).status == 200


async def test_a_mistake_of_ours_is_a_500_that_tells_nothing() -> None:
    """What even the middlewares let through; in the log it is whole."""

    async def fails(request: web.Request) -> web.StreamResponse:
        raise RuntimeError("secret detail")

    with capture_logs() as logged:
        async with _serving(ConnectionLimits(), fails) as url, bare_client(url) as client:
            client.send(get("/"))
            reply = await client.reply()
            assert (reply.status, reply.error["type"]) == (500, "api_error")
            assert "secret" not in str(reply.body)
            assert await client.is_closed()
    assert "secret detail" in str(logged)


async def test_an_answer_that_has_begun_is_cut_off() -> None:
    """A second head in the middle of a body would be a part of that body."""

    async def begins(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"x")
        raise RuntimeError

    async with _serving(ConnectionLimits(), begins) as url, bare_client(url) as client:
        client.send(get("/"))
        seen = await asyncio.wait_for(client.reader.read(), 10)
        assert seen.count(b"HTTP/1.1") == 1
        assert seen.endswith(b"1\r\nx\r\n")
