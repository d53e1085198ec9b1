"""Answers to clients that read slowly, that have disconnected, and that wait for a silent stream."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from proxy.config.loader import ConnectionLimits
from proxy.metrics import Metrics
from proxy.tasks import Tasks
from proxy.web.cors import Cors
from proxy.web.listener import Listener
from proxy.web.middleware import add_server_name
from proxy.web.request_log import RequestLog
from proxy.web.response import HEARTBEAT, WebResponder, WholeAnswer, whole_answer
from tests.bare_client import bare_client
from tests.builders import NOON, log_line
from tests.stage import movable_time, until


@asynccontextmanager
async def _served(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], *, before_head: Callable[..., Any] | None = None
) -> AsyncIterator[int]:
    application = web.Application()
    if before_head is not None:
        application.on_response_prepare.append(before_head)
    application.router.add_get("/", handler)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def _ask(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await writer.drain()
    return reader, writer


async def test_a_client_that_accepts_no_data_is_disconnected() -> None:
    """T22: after the time limit of a write its connection is cut. Otherwise its upstream would go on generating."""
    tasks = Tasks()
    done: asyncio.Future[WebResponder] = asyncio.get_running_loop().create_future()

    async def pour(client: WebResponder) -> None:
        notified: list[bool] = []
        client.on_disconnected(lambda: notified.append(True))
        await client.start(200, {})
        while not client.is_disconnected:
            await client.write(b"x" * 65536)
        assert notified == [True]
        await client.end()  # does nothing
        done.set_result(client)

    async def handler(request: web.Request) -> web.StreamResponse:
        # In a task of its own, as in production: the handler is cancelled when the connection is cut.
        await asyncio.shield(tasks.start("pour", pour(WebResponder(request, log_line(), write_s=0.05))))
        raise AssertionError

    async with _served(handler) as port:
        _, writer = await _ask(port)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        assert (await done).is_disconnected
        writer.close()


async def test_a_callback_that_is_set_after_the_disconnect_is_called_at_once() -> None:
    """And only once. Nothing is sent to a client that has disconnected."""
    notified: list[int] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        client = WebResponder(request, log_line())
        client.note_disconnect()
        client.on_disconnected(lambda: notified.append(1))
        client.note_disconnect()
        client.on_disconnected(None)
        client.send(200, {}, b"not sent")
        assert client.response is None
        return web.Response(text="ok")

    async with _served(handler) as port:
        reader, writer = await _ask(port)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
    assert notified == [1]


async def test_a_streamed_answer_arrives_as_it_is_written() -> None:
    """Head, pieces and end in this order. An empty piece is not sent: an empty chunk would end the answer."""

    async def handler(request: web.Request) -> web.StreamResponse:
        client = WebResponder(request, log_line())
        await client.start(201, {"content-type": "text/event-stream"})
        for piece in (b"one", b"", b"two"):
            await client.write(piece)
        await client.end()
        assert client.response
        return client.response

    async with _served(handler) as port:
        reader, writer = await _ask(port)
        seen = await reader.readuntil(b"0\r\n\r\n")
        assert seen.startswith(b"HTTP/1.1 201")
        assert b"x-request-id: req_1" in seen
        assert seen.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        writer.close()


async def test_a_silent_stream_gets_heartbeats_but_never_inside_an_event() -> None:
    """From its head on, after every interval without a write; none before an event is complete or after the block."""
    is_between = True
    may_go_on, ended = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal is_between
        client = WebResponder(request, log_line(), heartbeat_s=0.001)
        await client.start(200, {})
        with client.heartbeat(lambda: is_between):
            await may_go_on.wait()
            is_between = False
            await client.write(b"data: begins")
            await _turns()
            await client.write(b" and ends\n\n")
        await _turns()
        await client.end()
        await _turns()
        assert client.response
        ended.set()
        return client.response

    async def _turns() -> None:
        """Wait for a few intervals."""
        loop = asyncio.get_running_loop()
        for _ in range(3):
            passed = asyncio.Event()
            loop.call_later(0.002, passed.set)
            await passed.wait()

    async with _served(handler) as port:
        reader, writer = await _ask(port)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            assert await reader.readuntil(HEARTBEAT + b"\r\n") == b"e\r\n" + HEARTBEAT + b"\r\n"
        may_go_on.set()
        rest = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert rest.endswith(b"c\r\ndata: begins\r\nb\r\n and ends\n\n\r\n0\r\n\r\n")
        await ended.wait()
        writer.close()


async def test_a_heartbeat_is_not_sent_if_its_block_has_ended() -> None:
    """The timer may fire just before the end of the block, and the task that sends the comment runs after it."""

    async def handler(request: web.Request) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        client = WebResponder(request, log_line(), heartbeat_s=0.001)
        await client.start(200, {})
        with client.heartbeat(lambda: True):
            begun = loop.time()
            while loop.time() < begun + 0.002:
                pass  # blocks the loop until the timer is overdue
            await asyncio.sleep(0)  # the timer fires
            await asyncio.sleep(0)
        await client.write(b"data: begins")
        await asyncio.sleep(0)
        await client.end()
        assert client.response
        return client.response

    async with _served(handler) as port:
        reader, writer = await _ask(port)
        seen = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert HEARTBEAT not in seen
        writer.close()


async def test_a_slow_client_gets_no_heartbeats() -> None:
    """Its connection has traffic, and comments would only queue up behind the write that it has not accepted."""
    tasks = Tasks()
    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def pour(request: web.Request) -> None:
        client = WebResponder(request, log_line(), write_s=0.05, heartbeat_s=0.001)
        checks: list[bool] = []

        def is_between_events() -> bool:
            checks.append(True)
            return True

        await client.start(200, {})
        with client.heartbeat(is_between_events):
            while not client.is_disconnected:
                await client.write(b"x" * 65536)
        done.set_result(len(checks))

    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.shield(tasks.start("pour", pour(request)))
        raise AssertionError

    async with _served(handler) as port:
        _, writer = await _ask(port)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        assert await done == 0
        writer.close()


async def test_a_silent_upstream_gives_the_client_the_head_and_comments() -> None:
    """Not before `every_s`, counted from the first block of this kind, and each `every_s` after that."""
    may_end = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        client = WebResponder(request, log_line())

        async def start() -> None:
            await client.start(200, {"content-type": "text/event-stream"})

        with movable_time() as move:
            async with client.heartbeat_before_answer(100, start):
                move(60)
                await _turns()
                assert not client.has_begun
            assert not client.has_begun
            async with client.heartbeat_before_answer(100, start):
                move(30)
                await _turns()
                assert not client.has_begun
                move(11)
                await until(lambda: client.has_begun)
                await _turns()
                move(101)
                await may_end.wait()
            move(500)
            await _turns()
            await client.write(b"data: answer\n\n")
            await client.end()
        assert client.response
        return client.response

    async def _turns() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async with _served(handler) as port:
        reader, writer = await _ask(port)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        comment = b"e\r\n" + HEARTBEAT + b"\r\n"
        assert await reader.readexactly(2 * len(comment)) == 2 * comment
        may_end.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"e\r\ndata: answer\n\n\r\n0\r\n\r\n"
        writer.close()


async def test_the_head_of_a_silent_stream_is_whole_before_anything_else_is_written() -> None:
    """The upstream answers while the head is being sent. The answer waits for it."""
    is_starting, may_start = asyncio.Event(), asyncio.Event()

    async def before_head(request: web.Request, response: web.StreamResponse) -> None:
        is_starting.set()
        await may_start.wait()

    async def handler(request: web.Request) -> web.StreamResponse:
        client = WebResponder(request, log_line())
        async with client.heartbeat_before_answer(0.001, lambda: client.start(200, {})):
            await is_starting.wait()
            asyncio.get_running_loop().call_later(0.005, may_start.set)  # several intervals later
        await client.write(b"answer")
        await client.end()
        assert client.response
        return client.response

    async with _served(handler, before_head=before_head) as port:
        reader, writer = await _ask(port)
        seen = await reader.readuntil(b"0\r\n\r\n")
        assert seen.endswith(b"\r\n\r\ne\r\n" + HEARTBEAT + b"\r\n6\r\nanswer\r\n0\r\n\r\n")
        writer.close()


# ------------------------------------------------------------------------------------------------------ whole answers

PAGE = "https://app.example.com"
CORS = Cors([PAGE])
HEADERS = {"content-type": "application/json", "x-ratelimit-remaining-tokens": "7", "cache-control": "no-store"}


@asynccontextmanager
async def _answering(body: bytes) -> AsyncIterator[str]:
    """A server of ours. At `/ours` it answers with a whole answer, at other paths with the library's response."""

    async def handler(request: web.Request) -> web.StreamResponse:
        status, headers = int(request.query.get("status", 200)), {**HEADERS, "x-request-id": "req_1"}
        response: web.Response | WholeAnswer = web.Response(status=status, headers=headers, body=body)
        if request.path == "/ours":
            response = whole_answer(request, status, headers, body)
        if "close" in request.query:
            response.force_close()
        return response

    async def close_if_asked(request: web.Request, response: web.StreamResponse) -> None:
        if "x-close" in request.headers:
            response.force_close()
            response.headers["connection"] = "close"

    application = web.Application()
    application.on_response_prepare.extend([add_server_name, CORS.add_headers, close_if_asked])
    application.router.add_route("*", "/{any:.*}", handler)
    log = RequestLog(lambda: "all", metrics=Metrics(), clock=lambda: 5.5, now=lambda: NOON)
    runner = Listener(application, ConnectionLimits(), request_log=log)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _ask_for(path: str, *headers: str, method: str = "POST", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: x", "Content-Length: 0", *headers, "", ""]).encode()


@pytest.mark.parametrize("body", [b'{"id": "1"}', b"", b"x" * 3_000_000, bytearray(b"text")])
@pytest.mark.parametrize("headers", [(), (f"Origin: {PAGE}",), ("Origin: https://other.example.com",)])
async def test_a_whole_answer_has_the_bytes_that_the_library_would_write(
    body: bytes, headers: tuple[str, ...]
) -> None:
    """Its head is written by the proxy, with all that the library and the signal handlers add to others."""
    async with _answering(body) as url, bare_client(url) as client:
        written = []
        for path in ("/ours", "/library", "/ours"):  # on one connection, which stays open
            client.send(_ask_for(path, *headers))
            head = await client.reader.readuntil(b"\r\n\r\n")
            written.append(_without_date(head) + await client.reader.readexactly(len(body)))
        assert written[0] == written[1] == written[2]


@pytest.mark.parametrize(
    ("method", "query", "version"),
    [
        ("POST", "", "1.1"),
        ("POST", "", "1.0"),
        ("POST", "?status=404", "1.1"),
        ("POST", "?status=529", "1.1"),  # which has no phrase
        ("POST", "?status=204", "1.1"),
        ("POST", "?status=429&close=1", "1.1"),
        ("HEAD", "?status=404", "1.1"),
    ],
)
@pytest.mark.parametrize("headers", [(), ("Connection: close", f"Origin: {PAGE}"), ("X-Close: 1",)])
async def test_an_answer_of_any_kind_has_the_bytes_that_the_library_would_write(
    method: str, query: str, version: str, headers: tuple[str, ...]
) -> None:
    """Also one that closes the connection, and one that has no body by its status, version or method."""
    async with _answering(b"{}") as url:
        written = []
        for path in ("/ours", "/library"):
            async with bare_client(url) as client:
                client.send(_ask_for(path + query, *headers, method=method, version=version))
                if version == "1.1" and not headers and "close" not in query:
                    client.send(_ask_for("/library", "Connection: close"))  # the connection is still open
                written.append(_without_date(await client.reader.read()))
        assert written[0] == written[1]
        assert written[0].startswith(f"HTTP/{version} ".encode())


def _without_date(answer: bytes) -> bytes:
    """Without the seconds in which it was written."""
    date = rb"Date: [A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT\r\n"
    answer, found = re.subn(date, b"", answer)
    assert found, answer
    return answer
