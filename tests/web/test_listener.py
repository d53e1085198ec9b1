"""Connections: too many, too slow, idle; heads that are too large; and errors after an answer has begun.

T21 slow heads, idle connections, the limit of connections · T12 large heads (more of it in test_middleware)
"""

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from proxy.config.loader import ConnectionLimits
from proxy.web import listener
from proxy.web.listener import Listener
from tests.bare_client import bare_client, get, post

Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _ok(request: web.Request) -> web.StreamResponse:
    return web.Response(text=str(len(await request.read())))


@asynccontextmanager
async def _serving(limits: ConnectionLimits, handler: Handle = _ok) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_route("*", "/{any:.*}", handler)
    runner = Listener(application, limits)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


# ------------------------------------------------------------------------------------------------------ slow and idle


@pytest.mark.parametrize("before", [b"", get("/")], ids=["the first", "a later one"])
async def test_a_head_that_takes_too_long_is_a_408(before: bytes) -> None:
    """T21: measured from its first byte. The connection is closed, and the rest of the head is ignored."""
    async with _serving(ConnectionLimits(head_s=0.02)) as url, bare_client(url) as client:
        if before:
            client.send(before)
            assert (await client.reply()).status == 200
        client.send(b"GET / HTTP/1.1\r\nX-A: ")
        reply = await client.reply()
        assert (reply.status, reply.error["code"]) == (408, "request_timeout")
        assert (reply.headers["connection"], reply.headers["server"]) == ("close", "llm-quota-proxy")
        client.send(b"b\r\n\r\n")  # too late
        assert await client.is_closed()


async def test_a_head_in_several_packets_and_a_slow_body_are_served() -> None:
    """The time limit of a head ends with its last line. A body has a limit of its own."""
    request = post("/", body=b"x" * 200_000)
    async with _serving(ConnectionLimits(head_s=5)) as url, bare_client(url) as client:
        for piece in (request[:10], request[10:30], request[30:150_000], request[150_000:]):
            client.send(piece)
            await client.writer.drain()
        assert (await client.reply()).body == b"200000"
    received: list[bytes] = []

    async def read_slowly(request: web.Request) -> web.StreamResponse:
        received.append(await request.content.readexactly(1))
        return await _ok(request)

    async with _serving(ConnectionLimits(head_s=0.001), read_slowly) as url, bare_client(url) as client:
        client.send(request[:-1])
        for _ in range(3):  # when others have been answered, the time limit of the head is long over
            async with bare_client(url) as other:
                other.send(get("/", "Content-Length: 1") + b"x")
                await other.reply()
        client.send(request[-1:])
        assert (await client.reply()).body == b"199999"


async def test_an_idle_connection_is_closed() -> None:
    """T21: before the first request, and after one."""
    async with _serving(ConnectionLimits(idle_s=0.02)) as url, bare_client(url) as client, bare_client(url) as silent:
        client.send(get("/"))
        assert (await client.reply()).status == 200
        assert await client.is_closed()
        assert await silent.is_closed()


async def test_clients_with_slow_heads_do_not_stop_others() -> None:
    """T21: with 200 connections that have each sent half of a head, another client is served."""
    async with _serving(ConnectionLimits()) as url, AsyncExitStack() as held:
        for _ in range(200):
            slow = await held.enter_async_context(bare_client(url))
            slow.send(b"GET / HTT")
        async with bare_client(url) as client:
            client.send(get("/"))
            assert (await client.reply()).status == 200


# --------------------------------------------------------------------------------------------- too many and too large


async def test_a_head_without_an_end_is_a_400(caplog: pytest.LogCaptureFixture) -> None:
    """T12: each line is short enough, but all together are too large. What follows is ignored and not logged."""
    async with _serving(ConnectionLimits()) as url, bare_client(url) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n")
        for number in range(20):
            client.send(b"X-%d: %b\r\n" % (number, b"x" * 30_000))
        reply = await client.reply()
        assert (reply.status, reply.error["code"]) == (400, "bad_framing")
        assert await client.is_closed()
        await client.writer.drain()
    assert not caplog.records


async def test_one_connection_too_many_is_a_503_and_the_others_are_served() -> None:
    """T21: with Retry-After, before the client has sent anything. When connections close, new ones are accepted."""
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
        while status == 503:  # until the server has noticed the two that closed
            async with bare_client(url) as next_one:
                next_one.send(get("/"))
                status = (await next_one.reply()).status
        assert status == 200


# ------------------------------------------------------------------------------------------------------------- errors


async def test_an_exception_of_a_handler_is_a_500_without_its_text() -> None:
    """Also if no middleware catches it. The log has it."""

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


async def test_an_error_after_an_answer_has_begun_closes_the_connection() -> None:
    """A second head in the middle of a body would be taken for a part of that body."""

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


# -------------------------------------------------------------------------------------------------------- the library

# The minor version of aiohttp in which every sentence of INTERNALS was checked.
CHECKED = "3.14"

# What listener.py overrides or reads of aiohttp without a documented contract, and what it relies on.
INTERNALS = {
    (web.AppRunner, "_make_server"): "setup() awaits it once, and serves with the web.Server that it returns",
    (web.Server, "request_handler"): "the first argument of the constructor, the same for every connection",
    (web.Server, "request_factory"): "an argument of the constructor, which creates the Request of a parsed head",
    (web.Server, "handler_cancellation"): "an argument of the constructor",
    (web.Server, "_kwargs"): "the other arguments of the constructor, which __call__ passes to RequestHandler",
    (web.Server, "_loop"): "the event loop, which __call__ passes to RequestHandler",
    (web.Server, "_connections"): "has an item for each open connection, which connection_made adds",
    (web.Server, "__call__"): "creates the RequestHandler of each new connection, and does nothing else",
    (web.RequestHandler, "connection_made"): "is called once, before any data; adds the connection to the server",
    (web.RequestHandler, "connection_lost"): "is called once, at the end; removes the connection from the server",
    (web.RequestHandler, "data_received"): "is called with every packet; parses heads and feeds bodies",
    (web.RequestHandler, "handle_error"): "gives the response to a head that can't be parsed, and to an exception",
    (web.RequestHandler, "close"): "sets _close, and closes the connection when the running handler has ended",
    (web.RequestHandler, "transport"): "the connection, None after connection_lost",
    (web.RequestHandler, "_loop"): "the event loop",
    (web.RequestHandler, "_close"): "is true after close(), when data_received ignores all data",
    (web.RequestHandler, "_request_count"): "grows by one with each head that data_received has parsed",
    (web.RequestHandler, "_messages"): "has the requests that are parsed and not yet being handled",
    (web.RequestHandler, "_waiter"): "is a future while the connection waits for its next request, else None",
}


# What listener.py adds to aiohttp's classes.
ADDED = {
    web.AppRunner: ["_limits"],
    web.Server: ["limits", "is_full"],
    web.RequestHandler: [*listener.Connection.__slots__, "_end_head", "_on_head_deadline", "_reject"],
}
SUBCLASSES = {
    web.AppRunner: listener.Listener,
    web.Server: listener._Connections,
    web.RequestHandler: listener.Connection,
}


async def test_aiohttp_has_every_internal_that_the_listener_uses() -> None:
    """An upgrade of aiohttp fails here and names what to check, instead of disabling a limit without an error."""
    server = web.Server(_ok)  # type: ignore[arg-type]
    connection = web.RequestHandler(server, loop=asyncio.get_running_loop())
    objects = {web.AppRunner: web.AppRunner(web.Application()), web.Server: server, web.RequestHandler: connection}
    problems = [*_changes(objects), *_unlisted()]
    if not aiohttp.__version__.startswith(f"{CHECKED}."):
        problems.append("This is another minor version: check every sentence of INTERNALS, then change CHECKED.")
    if problems:
        advice = "Look into aiohttp's web_protocol.py, web_server.py and web_runner.py, and run this file."
        pytest.fail("\n".join([f"aiohttp {aiohttp.__version__}:", *problems, advice]), pytrace=False)


def _changes(objects: dict[type, Any]) -> Iterator[str]:
    """What aiohttp no longer has, has with other parameters, or now has under a name of ours."""
    for (base, name), contract in INTERNALS.items():
        if not hasattr(objects[base], name):
            yield f"{base.__name__}.{name} is gone. listener.py relies on it: {contract}."
        elif name in vars(SUBCLASSES[base]) and _parameters(base, name) != _parameters(SUBCLASSES[base], name):
            yield f"{base.__name__}.{name} has other parameters: {_parameters(base, name)}."
    for base, names in ADDED.items():
        for name in names:
            if hasattr(objects[base], name):
                yield f"{base.__name__} has its own {name}, which {SUBCLASSES[base].__name__} replaces: rename ours."


def _unlisted() -> Iterator[str]:
    """What listener.py overrides or reads and INTERNALS does not list."""
    listed = {name for _, name in INTERNALS}
    for base, subclass in SUBCLASSES.items():
        for name in vars(subclass).keys() - {"__init__"} - listed:
            if inspect.isfunction(getattr(base, name, None)):
                yield f"{subclass.__name__}.{name} overrides a method of aiohttp: add it to INTERNALS."
    source = Path(listener.__file__).read_text(encoding="utf-8")
    added = {name for names in ADDED.values() for name in names}
    for name in set(re.findall(r"\.(_[a-z]\w*)", source)) - listed - added:
        yield f"listener.py reads the private {name}: add it to INTERNALS, or to ADDED if it is ours."


def _parameters(owner: type, name: str) -> list[str]:
    return list(inspect.signature(getattr(owner, name)).parameters)
