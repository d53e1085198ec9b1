"""The other end of a request: gone, slow, or there."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from proxy.tasks import Tasks
from proxy.web.response import KEEP_ALIVE, WebResponder


@asynccontextmanager
async def _served(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[int]:
    application = web.Application()
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


async def test_a_client_that_takes_nothing_is_taken_to_be_gone() -> None:
    """It must not hold an upstream's generation: after the write limit its connection is cut."""
    tasks = Tasks()
    done: asyncio.Future[WebResponder] = asyncio.get_running_loop().create_future()

    async def pour(client: WebResponder) -> None:
        told: list[bool] = []
        client.on_disconnected(lambda: told.append(True))
        await client.start(200, {})
        while not client.is_disconnected:
            await client.write(b"x" * 65536)
        assert told == [True]
        await client.end()  # to nobody: does nothing
        done.set_result(client)

    async def handler(request: web.Request) -> web.StreamResponse:
        # In a task of its own, as in production: this one is cancelled when the connection is cut.
        await asyncio.shield(tasks.start("pour", pour(WebResponder(request, id="1", write_s=0.05))))
        raise AssertionError

    async with _served(handler) as port:
        _, writer = await _ask(port)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        assert (await done).is_disconnected
        writer.close()


async def test_who_asks_late_is_told_at_once() -> None:
    """A client that left before anybody watched is not missed, and is reported once."""
    told: list[int] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        client = WebResponder(request, id="1")
        client.note_disconnect()
        client.on_disconnected(lambda: told.append(1))
        client.note_disconnect()
        client.on_disconnected(None)
        client.send(200, {}, b"nobody reads this")
        assert client.response is None
        return web.Response(text="ok")

    async with _served(handler) as port:
        reader, writer = await _ask(port)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
    assert told == [1]


async def test_pieces_arrive_as_they_are_written() -> None:
    """Head, pieces and end in order; an empty piece is none."""

    async def handler(request: web.Request) -> web.StreamResponse:
        client = WebResponder(request, id="req_1")
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


async def test_a_silent_stream_is_told_that_it_is_alive_but_never_within_an_event() -> None:
    """From its head on, again and again while nothing moves; not before an event has ended, and not after the end."""
    is_between = True
    may_go_on, ended = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal is_between
        client = WebResponder(request, id="1", heartbeat_s=0.001)
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
        """As long as some silences take."""
        loop = asyncio.get_running_loop()
        for _ in range(3):
            passed = asyncio.Event()
            loop.call_later(0.002, passed.set)
            await passed.wait()

    async with _served(handler) as port:
        reader, writer = await _ask(port)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            assert await reader.readuntil(KEEP_ALIVE + b"\r\n") == b"e\r\n" + KEEP_ALIVE + b"\r\n"
        may_go_on.set()
        rest = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert rest.endswith(b"c\r\ndata: begins\r\nb\r\n and ends\n\n\r\n0\r\n\r\n")
        await ended.wait()
        writer.close()


async def test_what_moved_just_before_a_comment_keeps_it_back() -> None:
    """The timer may ring, and the stream end its block before the comment has its turn: then nothing is said."""

    async def handler(request: web.Request) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        client = WebResponder(request, id="1", heartbeat_s=0.001)
        await client.start(200, {})
        with client.heartbeat(lambda: True):
            begun = loop.time()
            while loop.time() < begun + 0.002:
                pass  # nothing else has its turn, and the timer is overdue
            await asyncio.sleep(0)  # it rings
            await asyncio.sleep(0)
        await client.write(b"data: begins")
        await asyncio.sleep(0)
        await client.end()
        assert client.response
        return client.response

    async with _served(handler) as port:
        reader, writer = await _ask(port)
        seen = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert KEEP_ALIVE not in seen
        writer.close()


async def test_a_slow_client_is_not_told_that_it_is_alive() -> None:
    """What it has not taken yet moves all the same: comments would only pile up behind it."""
    tasks = Tasks()
    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def pour(request: web.Request) -> None:
        client = WebResponder(request, id="1", write_s=0.05, heartbeat_s=0.001)
        asked: list[bool] = []

        def is_between_events() -> bool:
            asked.append(True)
            return True

        await client.start(200, {})
        with client.heartbeat(is_between_events):
            while not client.is_disconnected:
                await client.write(b"x" * 65536)
        done.set_result(len(asked))

    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.shield(tasks.start("pour", pour(request)))
        raise AssertionError

    async with _served(handler) as port:
        _, writer = await _ask(port)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        assert await done == 0
        writer.close()
