"""Connections: too many, too slow, idle; heads that are too large; and errors after an answer has begun.

T21 slow heads, idle connections, slow reading, the limits of connections
T12 large heads (more of it in test_middleware)
"""

import asyncio
import inspect
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from structlog.testing import capture_logs

from proxy.config.loader import ConnectionLimits
from proxy.metrics import Metrics
from proxy.web import listener
from proxy.web.listener import Listener, note_valid_key
from proxy.web.request_log import RequestLog
from proxy.web.response import WholeAnswer
from tests.bare_client import KEY, BareClient, bare_client, get, post
from tests.builders import NOON
from tests.library import gone, unlisted
from tests.stage import Stage, stage, until

Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _ok(request: web.Request) -> web.StreamResponse:
    return web.Response(text=str(len(await request.read())))


@asynccontextmanager
async def _running(limits: ConnectionLimits, handler: Handle = _ok) -> AsyncIterator[tuple[str, Listener]]:
    application = web.Application()
    application.router.add_route("*", "/{any:.*}", handler)
    log = RequestLog(lambda: "all", metrics=Metrics(), clock=lambda: 5.5, now=lambda: NOON)
    runner = Listener(application, limits, request_log=log)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", runner
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _serving(limits: ConnectionLimits, handler: Handle = _ok) -> AsyncIterator[str]:
    async with _running(limits, handler) as (url, _):
        yield url


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system has another name for it")
async def test_the_system_asks_whether_a_silent_client_is_still_there() -> None:
    """After 60 s, before firewalls forget the connection."""

    async def options(request: web.Request) -> web.Response:
        assert request.transport is not None
        accepted = request.transport.get_extra_info("socket")
        is_on = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return web.Response(text=f"{is_on} {accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)}")

    async with (
        _serving(ConnectionLimits(), options) as url,
        aiohttp.ClientSession() as http,
        http.get(url) as response,
    ):
        assert await response.text() == "1 60"


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


# --------------------------------------------------------------------------------------------- a full listener

BIG = 32 * 2**20  # far more than the kernel's buffers of one connection


class Doors:
    """A handler whose answer depends on the path, and that can be waited for."""

    def __init__(self) -> None:
        self.arrived = 0
        self.sent = 0
        self.may_answer = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.arrived += 1
        if "key" in request.query:
            note_valid_key(request)
        match request.path:
            case "/waits":
                await self.may_answer.wait()
            case "/big":
                return web.Response(body=bytes(BIG))
            case "/full":  # ends when the kernel takes no more, so that the rest waits in the proxy
                response = web.StreamResponse()
                await response.prepare(request)
                assert request.transport is not None
                while not request.transport.get_write_buffer_size():  # type: ignore[attr-defined]
                    self.sent += 16_384
                    await response.write(bytes(16_384))
                if "wait" in request.query:
                    await self.may_answer.wait()
                return response
            case "/refused":  # answered without reading the body, as a request without a valid key is
                return web.Response(status=401)
        return await _ok(request)


async def _is_served(url: str) -> bool:
    """Whether a new connection is served. It is closed afterwards."""
    async with bare_client(url) as client:
        client.send(get("/"))
        return (await client.reply()).status == 200


def _endless() -> bytes:
    """A call whose answer is a stream that goes on during the test."""
    return json.dumps(
        {
            "model": "fast",
            "stream": True,
            "max_tokens": 400,
            "messages": [{"role": "user", "content": "Hi"}],
            "metadata": {"simulate": "tokens=50 speed=50"},
        }
    ).encode()


async def _serve_one(client: BareClient) -> None:
    client.send(get("/"))
    assert (await client.reply()).status == 200


async def test_a_full_listener_closes_the_connection_that_is_idle_longest() -> None:
    """T21: measured from the end of its last request. The others and the new one are served."""
    async with _serving(ConnectionLimits(connections=3)) as url, AsyncExitStack() as held:
        first, second, third = [await held.enter_async_context(bare_client(url)) for _ in range(3)]
        for client in (first, second, third, first):
            await _serve_one(client)
        async with bare_client(url) as late:
            await _serve_one(late)
            assert await second.is_closed()
            for client in (first, third, late):
                await _serve_one(client)


async def test_connections_that_never_send_a_whole_head_shut_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """T21: whether they are silent, or send another byte of a head now and then. The oldest is closed first."""
    monkeypatch.setattr(listener, "_IDLE_S_MIN", 0)
    async with _serving(ConnectionLimits(connections=40)) as url, AsyncExitStack() as held:
        silent = [await held.enter_async_context(bare_client(url)) for _ in range(20)]
        slow = [await held.enter_async_context(bare_client(url)) for _ in range(20)]
        for text in (b"GET / HTTP/1.1\r\n", b"X", b"-", b"A"):
            for client in slow:
                client.send(text)
                await client.writer.drain()
        for client in [*silent, *slow]:
            assert await _is_served(url)  # it is closed itself before the next one connects
            late = await held.enter_async_context(bare_client(url))
            await _serve_one(late)
            assert await client.is_closed()


async def test_connections_in_use_are_not_closed_and_the_next_one_gets_a_503() -> None:
    """T21: with a call of a user in flight, its body on its way, or an answer that is read slowly.

    503 with Retry-After.
    """
    doors = Doors()
    async with _serving(ConnectionLimits(connections=3), doors.handle) as url, AsyncExitStack() as held:
        waits, sends, reads = [await held.enter_async_context(bare_client(url)) for _ in range(3)]
        waits.send(get("/waits?key"))
        sends.send(post("/?key", body=b"x" * 200_000)[:-1])
        reads.send(get("/big?key"))
        await until(lambda: doors.arrived == 3)
        for _ in range(3):
            async with bare_client(url) as late:
                late.send(post("/", body=b"x" * 100_000))
                reply = await late.reply()
                assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
                assert (reply.headers["retry-after"], reply.headers["connection"]) == ("5", "close")
                assert await late.is_closed()
        doors.may_answer.set()
        sends.send(b"x")
        assert (await waits.reply()).status == 200
        assert (await sends.reply()).body == b"200000"
        assert len((await reads.reply()).body) == BIG
        assert await _is_served(url)
        assert await waits.is_closed()  # it became idle first


async def test_a_pipelined_request_keeps_the_connection_busy() -> None:
    """T21: also while its client has the answer to the request before it."""
    doors = Doors()
    async with _serving(ConnectionLimits(connections=1), doors.handle) as url, bare_client(url) as client:
        client.send(get("/") + get("/waits?key"))
        assert (await client.reply()).status == 200
        await until(lambda: doors.arrived == 2)
        async with bare_client(url) as late:
            assert (await late.reply()).status == 503
        doors.may_answer.set()
        assert (await client.reply()).status == 200


class Known:
    """A connection as `_Places` knows it."""

    keeps_its_place = True

    def __init__(self, places: Any, *, has_unread_answer: bool = False, has_key: bool = True) -> None:
        self.has_unread_answer = has_unread_answer
        self.has_key = has_key
        self.places = places
        self.is_evicted = False
        places.take(self)

    def evict(self) -> None:
        self.is_evicted = True
        self.places.leave(self)


async def test_slow_readers_are_looked_at_a_few_at_a_time() -> None:
    """T21: so a flood of new connections costs little, and the idle ones behind the slow readers are found."""
    places = listener._Places(listener._LOOKED_AT_MAX + 2)
    slow = [Known(places, has_unread_answer=True) for _ in range(listener._LOOKED_AT_MAX)]
    idle = [Known(places) for _ in range(2)]
    assert not places.make_room()
    assert places.make_room()
    assert [connection.is_evicted for connection in (*slow, *idle)] == [False] * len(slow) + [True, False]
    assert places.make_room()  # the place is free at once, before the connection is closed
    assert not idle[1].is_evicted


async def test_the_order_in_which_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """T21: idle for a second or more; without a key and more than a first request; idle. Not with a key."""
    places: Any = listener._Places(8)
    names = "with_key first_request loops pipelines unread new_idle idle".split()
    known = {name: Known(places, has_key=name == "with_key") for name in names}
    for name in names[:4]:
        places.note_without_key(known[name])
    places.note_without_key(known["loops"])  # its next request: it keeps its turn
    places.note_with_key(known["with_key"])
    known["unread"].has_unread_answer = True
    for name in ("first_request", "new_idle"):
        known[name].keeps_its_place = False
    places._idle[known["idle"]] -= listener._IDLE_S_MIN
    order = []
    for limit in range(len(known), 0, -1):
        places._limit = limit
        before = {name for name in names if known[name].is_evicted}
        if places.make_room():
            order += [name for name in names if known[name].is_evicted and name not in before]
    assert order == ["idle", "loops", "pipelines", "unread", "new_idle"]


@asynccontextmanager
async def _without_key(on: Stage, send: bytes, number: int) -> AsyncIterator[list[socket.socket]]:
    """Connections that send this and read nothing, with small buffers, once the proxy can send them no more."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.connect(("127.0.0.1", urlsplit(on.url).port))
            each.setblocking(False)
            with suppress(BlockingIOError):
                each.send(send)
            await asyncio.sleep(0)
        yield sockets
    finally:
        for each in sockets:
            each.close()


@pytest.mark.parametrize(
    "request_",
    [
        get("/v1/nothing"),
        get("/v1/models"),
        post(body=b"x" * 100),
        get("/healthz"),
        get("/v1/models", "Authorization: Bearer wrong"),
    ],
)
async def test_pipelines_without_a_key_shut_out_nobody_with_one(tmp_path: Path, request_: bytes) -> None:
    """T21: 8 clients without a key send thousands of requests at once, and read a few bytes of the answers each time.

    They are never idle. A stream of a user goes on meanwhile, and further users are served.
    """
    limits = ConnectionLimits(connections=9)
    async with stage(folder=tmp_path, connection_limits=limits) as on, bare_client(on.url) as streams:
        streams.send(post("/v1/chat/completions", KEY, body=_endless()))
        await streams.reader.readuntil(b"data: ")
        async with _without_key(on, request_ * (200_000 // len(request_)), 8) as held:
            for _ in range(12):
                for each in held:
                    with suppress(BlockingIOError, ConnectionError):
                        each.recv(30)
                async with bare_client(on.url) as late:
                    late.send(get("/v1/quota", KEY, "Connection: close"))
                    assert (await late.reply()).status == 200
            await streams.reader.readuntil(b"data: ")


async def test_requests_without_a_key_in_a_loop_shut_out_nobody_with_one(tmp_path: Path) -> None:
    """T21: each sends its next request as soon as it has its 401, so each is idle for moments only."""
    limits = ConnectionLimits(connections=4)
    async with stage(folder=tmp_path, connection_limits=limits) as on, AsyncExitStack() as held:
        answers = [0, 0, 0, 0]

        async def loops(number: int) -> None:
            while True:
                async with bare_client(on.url) as client:
                    with suppress(ConnectionError, asyncio.IncompleteReadError):
                        while True:
                            client.send(get("/v1/models"))
                            await client.reply()
                            answers[number] += 1

        tasks = [asyncio.ensure_future(loops(number)) for number in range(4)]
        held.callback(lambda: [task.cancel() for task in tasks])
        await until(lambda: min(answers) > 1)
        for _ in range(20):
            async with bare_client(on.url) as late:
                late.send(get("/v1/quota", KEY))
                assert (await late.reply()).status == 200


async def test_half_sent_bodies_without_a_key_shut_out_nobody_with_one(tmp_path: Path) -> None:
    """T21: also if further requests were sent before, or if they wait for a 100."""
    half = post(body=b"x" * 100_000)[:-1]
    limits = ConnectionLimits(connections=4)
    async with stage(folder=tmp_path, connection_limits=limits) as on, AsyncExitStack() as held:
        for request_ in (
            half,
            get("/v1/nothing") * 50 + half,
            post(body=b"x" * 10)[:-10],
            b"GET / HTTP/1.1\r\nX",
        ) * 2:
            client = await held.enter_async_context(bare_client(on.url))
            client.send(request_)
            await client.writer.drain()
        for _ in range(8):
            late = await held.enter_async_context(bare_client(on.url))
            late.send(get("/v1/quota", KEY))
            assert (await late.reply()).status == 200


async def test_a_key_counts_until_a_later_request_has_none(tmp_path: Path) -> None:
    """T21: so one request with a key does not keep a connection whose later requests have none."""
    doors = Doors()
    async with _running(ConnectionLimits(connections=1), doors.handle) as (url, runner), bare_client(url) as client:
        [connection] = await _connections(runner)
        client.send(get("/?key"))
        await client.reply()
        client.send(get("/") + get("/waits"))
        await client.reply()
        await until(lambda: doors.arrived == 3)
        assert not connection.has_key
        assert await _is_served(url)
        assert await client.is_closed()


async def test_what_the_listener_refuses_has_an_id_and_a_line_in_the_log() -> None:
    """T21: a 503 because it is full, a 408, and a 400 of a head that is too large or can't be parsed."""
    doors = Doors()
    refused = {}
    with capture_logs() as logged:
        async with _serving(ConnectionLimits(connections=1), doors.handle) as url, bare_client(url) as client:
            client.send(get("/waits?key"))
            await until(lambda: doors.arrived == 1)
            async with bare_client(url) as late:
                refused["too_many_connections"] = await late.reply()
            doors.may_answer.set()
            await client.reply()
        async with _serving(ConnectionLimits(head_s=0.01)) as url, bare_client(url) as client:
            client.send(b"GET / HT")
            refused["request_timeout"] = await client.reply()
        for text in (b"secret text \r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X-A: %b\r\n" % (b"x" * 30_000) * 10):
            async with _serving(ConnectionLimits()) as url, bare_client(url) as client:
                client.send(text)
                reply = await client.reply()
                assert (reply.status, reply.error["code"]) == (400, "bad_framing")
                refused[f"bad_framing {len(refused)}"] = reply
    lines = {line["request"]: line for line in logged if line["event"] == "request"}
    assert len(lines) == 4
    for code, reply in refused.items():
        line = lines[reply.headers["x-request-id"]]
        assert (line["code"], line["status"], line["endpoint"]) == (code.split()[0], reply.status, "connection")
        assert line["address"] == "127.0.0.1"
    assert "secret" not in str(logged)


async def test_few_of_the_connections_that_are_refused_have_a_line() -> None:
    """T21: 10 a second of one address, also if they are not even answered."""
    doors = Doors()
    with capture_logs() as logged:
        async with _serving(ConnectionLimits(connections=1), doors.handle) as url, bare_client(url) as client:
            client.send(get("/waits?key"))
            await until(lambda: doors.arrived == 1)
            for _ in range(30):
                async with bare_client(url) as late:
                    assert (await late.reply()).status == 503
            doors.may_answer.set()
            await client.reply()
    assert len([line for line in logged if line["event"] == "request"]) == 10


async def test_the_place_of_a_closed_connection_is_free_at_once() -> None:
    """T21: many connections may arrive before the event loop has closed the first one."""
    async with _running(ConnectionLimits(connections=1)) as (url, runner), bare_client(url):
        [connection] = await _connections(runner)
        connection.evict()
        assert len(connection._connections._all_places) == 0
        assert len(_server(runner).connections) == 1


async def test_a_body_after_its_answer_does_not_keep_a_place() -> None:
    """T21: a client without a key gets its 401 at once. It is idle then, although it has more of a body to send."""
    doors = Doors()
    async with _serving(ConnectionLimits(connections=2), doors.handle) as url, AsyncExitStack() as held:
        clients = [await held.enter_async_context(bare_client(url)) for _ in range(2)]
        for client in clients:
            client.send(post("/refused", body=b"x" * 100_000)[:-1])
            assert (await client.reply()).status == 401
        async with bare_client(url) as late:
            await _serve_one(late)
            assert await clients[0].is_closed()


async def test_the_end_of_an_answer_is_not_cut_off() -> None:
    """T21: a client that has not read all of an answer yet is not idle, although nothing is being handled."""
    doors = Doors()
    limits = ConnectionLimits(connections=2)
    async with (
        _running(limits, doors.handle) as (url, runner),
        bare_client(url) as reads,
        bare_client(url) as other,
    ):
        reads.send(get("/full?key"))
        [connection, _] = await _connections(runner, 2)
        await until(lambda: bool(doors.sent) and not connection._request_in_progress)
        await _serve_one(other)
        async with bare_client(url) as late:
            await _serve_one(late)
            assert await other.is_closed()
            late.send(get("/waits?key"))
            await until(lambda: doors.arrived == 4)
            async with bare_client(url) as refused:
                assert (await refused.reply()).status == 503
            doors.may_answer.set()
            assert (await late.reply()).status == 200
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += await reads.reader.read(2**20)
        assert received.count(0) == doors.sent
        assert await _is_served(url)
        assert await _is_served(url)


async def test_a_client_that_does_not_read_its_answer_loses_its_connection() -> None:
    """T21: not while it reads on, however slowly. The library would wait for it forever."""
    limits = ConnectionLimits(connections=1, unread_s=3600)
    async with _running(limits, Doors().handle) as (url, runner), bare_client(url) as client:
        client.send(get("/big"))
        [connection] = await _connections(runner)
        await until(lambda: connection._reading_deadline is not None)
        for _ in range(3):
            await client.reader.readexactly(2**20)
            before, deadline = connection._unread_bytes, connection._reading_deadline
            await until(lambda: connection._transport.get_write_buffer_size() <= before - 16_384)  # noqa: B023
            connection._on_reading_deadline()
            assert connection._reading_deadline is not deadline
            assert connection._reading_deadline.when() > asyncio.get_running_loop().time() + 3000
        await _stand_still(connection)
        connection._watch_reading()
        connection._on_reading_deadline()
        assert await _is_served(url)
    doors, limits = Doors(), ConnectionLimits(unread_s=0.01)
    async with _running(limits, doors.handle) as (url, runner), bare_client(url) as client:
        client.send(get("/full", "Connection: close"))
        await until(lambda: bool(doors.sent))
        await until(lambda: not _server(runner).connections)


def _server(runner: Listener) -> web.Server:
    assert runner.server is not None
    return runner.server


async def _connections(runner: Listener, number: int = 1) -> list[Any]:
    await until(lambda: len(_server(runner).connections) == number)
    return _server(runner).connections


async def test_an_answer_that_is_still_being_written_is_not_given_up() -> None:
    """T21: what waits may have been read and written again. A stream has a deadline for each write."""
    doors = Doors()
    async with _running(ConnectionLimits(), doors.handle) as (url, runner), bare_client(url) as client:
        client.send(get("/full?wait=1"))
        [connection] = await _connections(runner)
        await until(lambda: bool(doors.sent) and connection.has_unread_answer)
        await _stand_still(connection)
        connection._watch_reading()
        connection._on_reading_deadline()
        assert not connection._transport.is_closing()
        doors.may_answer.set()
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += await client.reader.read(2**20)
        await until(lambda: not connection.has_unread_answer)
        await until(lambda: not connection._request_in_progress)
        connection._on_reading_deadline()
        assert connection._reading_deadline is None  # nothing waits any more
        await _serve_one(client)


async def _stand_still(connection: Any) -> None:
    """Wait until the client has taken all that it takes."""
    before = -1
    while before != (before := connection._transport.get_write_buffer_size()):
        for _ in range(100):
            await asyncio.sleep(0)


async def test_a_flood_of_rejected_connections_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """T21: each of them stays for a second to read its 503. Beyond a bound they are closed at once."""
    monkeypatch.setattr(listener, "_REJECTED_MAX", 3)
    doors = Doors()
    async with _running(ConnectionLimits(connections=1), doors.handle) as (url, runner), AsyncExitStack() as held:
        logged = held.enter_context(capture_logs())
        waits = await held.enter_async_context(bare_client(url))
        waits.send(get("/waits?key"))
        await until(lambda: doors.arrived == 1)
        late = [await held.enter_async_context(bare_client(url)) for _ in range(8)]
        await until(lambda: len(_server(runner).connections) == 1 + 3)
        texts = [await client.reader.read() for client in late]
        assert [text[:12] for text in texts if text] == [b"HTTP/1.1 503"] * 3
        lines = [line for line in logged if line["event"] == "request"]
        assert sorted(line["status"] for line in lines) == [499] * 5 + [503] * 3
        doors.may_answer.set()
        assert (await waits.reply()).status == 200


async def test_rejected_connections_take_no_place() -> None:
    """T21: those that are still reading a 408 or a 503 are not counted, so they shut nobody out."""
    async with _serving(ConnectionLimits(connections=1, head_s=0.01)) as url, bare_client(url) as slow:
        slow.send(b"GET / HT")
        assert (await slow.reply()).status == 408
        async with bare_client(url) as late:
            await _serve_one(late)


async def test_one_address_may_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """T21: by the same rule, with its own connections only. Other addresses keep theirs."""
    monkeypatch.setattr(listener, "_IDLE_S_MIN", 0)
    doors = Doors()
    limits = ConnectionLimits(connections=100, connections_per_address=2)
    async with _serving(limits, doors.handle) as url, AsyncExitStack() as held:
        other = await held.enter_async_context(bare_client(url, address="127.0.0.2"))
        await _serve_one(other)
        first, second = [await held.enter_async_context(bare_client(url)) for _ in range(2)]
        await _serve_one(first)
        third = await held.enter_async_context(bare_client(url))
        await _serve_one(third)
        assert await second.is_closed()
        for client in (first, third):
            client.send(get("/waits?key"))
        await until(lambda: doors.arrived == 5)
        async with bare_client(url) as late:
            assert (await late.reply()).error["code"] == "too_many_connections"
        await _serve_one(other)
        async with bare_client(url, address="127.0.0.2") as another:
            await _serve_one(another)
        doors.may_answer.set()
        for client in (first, third):
            assert (await client.reply()).status == 200
    async with (
        _serving(ConnectionLimits(connections=1, connections_per_address=1)) as url,
        bare_client(url) as client,
        bare_client(url, address="127.0.0.2") as late,
    ):
        await _serve_one(late)  # the limit of all connections holds too
        assert await client.is_closed()


@pytest.mark.parametrize(
    ("peername", "address"),
    [
        (("192.0.2.1", 1), "192.0.2.1"),
        (("::ffff:192.0.2.1", 1, 0, 0), "192.0.2.1"),
        (("2001:db8:1:2:3:4:5:6", 1, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:2::9", 1, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::/64"),
        ("", None),
        (None, None),
    ],
)
def test_an_address_is_an_ipv4_address_or_an_ipv6_network(peername: object, address: str | None) -> None:
    """T21: one user of IPv6 has 2^64 addresses, which are one here. The clients of a Unix socket have none."""
    assert listener._address_of(peername) == address


async def test_both_listeners_admit_new_connections_when_they_are_full(tmp_path: Path) -> None:
    """T21: 4,000 connections without a key shut nobody out, and monitoring neither."""
    limits = ConnectionLimits(connections=4)
    async with stage(folder=tmp_path, connection_limits=limits) as on, AsyncExitStack() as held:
        for url in (on.url, on.admin_url):
            for _ in range(10):
                silent = await held.enter_async_context(bare_client(url))
                silent.send(b"GET /heal")
            async with bare_client(url) as late:
                late.send(get("/healthz"))
                assert (await late.reply()).status == 200
        assert (await on.post("/v1/chat/completions", {"model": "fast", "messages": []})).status != 503


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
    (web.Server, "handler_cancellation"): "an argument of the constructor; False: connection_lost cancels nothing",
    (web.Server, "_kwargs"): "the other arguments of the constructor, which __call__ passes to RequestHandler",
    (web.Server, "_loop"): "the event loop, which __call__ passes to RequestHandler",
    (web.Server, "_connections"): "has an item for each open connection, which connection_made adds",
    (web.Server, "connections"): "lists these items",
    (
        web.Server,
        "connection_lost",
    ): "is called by that of RequestHandler; removes the item if no task handles requests",
    (web.Server, "__call__"): "creates the RequestHandler of each new connection, and does nothing else",
    (web.RequestHandler, "connection_made"): "is called once, before any data; adds the connection to the server",
    (web.RequestHandler, "connection_lost"): "is called once, at the end; removes the connection from the server",
    (web.RequestHandler, "data_received"): "is called with every packet; parses heads and feeds bodies",
    (web.RequestHandler, "finish_response"): "sends an answer; is awaited once for each request that was handled",
    (web.RequestHandler, "pause_writing"): "is called when more than 64 KiB wait to be read, as asyncio does",
    (web.RequestHandler, "writing_paused"): "is true until most of that is read",
    (web.RequestHandler, "force_close"): "closes the connection at once, after what waits to be read",
    (
        web.RequestHandler,
        "_request_in_progress",
    ): "is true from the call of the handler to the end of finish_response",
    (web.RequestHandler, "handle_error"): "gives the response to a head that can't be parsed, and to an exception",
    (web.RequestHandler, "close"): "sets _close, and closes the connection when the running handler has ended",
    (web.RequestHandler, "transport"): "the connection, None after connection_lost",
    (web.RequestHandler, "_loop"): "the event loop",
    (web.RequestHandler, "_task_handler"): "the task that handles the requests, which connection_lost may cancel",
    (web.RequestHandler, "_close"): "is true after close(), when data_received ignores all data",
    (web.RequestHandler, "_request_count"): "grows by one with each head that data_received has parsed",
    (web.RequestHandler, "_messages"): "has the requests that are parsed and not yet being handled",
    (web.RequestHandler, "_waiter"): "is a future while the connection waits for its next request, else None",
}


# The same for response.py and routes.py.
INTERNALS_OF_ANSWERS = {
    (web.StreamResponse, "prepare"): "finish_response of a connection awaits it once, before write_eof",
    (web.StreamResponse, "write_eof"): "finish_response awaits it once, with nothing to write",
    (web.StreamResponse, "_keep_alive"): "says whether the connection stays open; force_close() sets it to False",
    (web.Request, "_match_info"): "is set once, to the match of the router, and names the signal handlers",
    (
        web.Request,
        "_prepare_hook",
    ): "awaits the handlers of the signal on_response_prepare",
}


# What listener.py adds to aiohttp's classes.
ADDED = {
    web.AppRunner: ["_limits", "_prefix", "_request_log", "_serve", "all_answered", "stop_accepting"],
    web.Server: [
        *("limits", "request_log", "places_for", "has_many_rejected", "_all_places", "_places_of"),
        *("all_answered", "is_closing", "_all_closed"),
    ],
    web.RequestHandler: [
        *listener.Connection.__slots__,
        *("has_unread_answer", "keeps_its_place", "evict", "_leave", "_reject", "note_busy"),
        *("_new_line", "close_if_idle"),
        *("_end_head", "_on_head_deadline", "_watch_reading", "_on_reading_deadline"),
    ],
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
    answers = {web.StreamResponse: web.StreamResponse(), web.Request: make_mocked_request("GET", "/")}
    problems = [*_changes(objects), *_unlisted(), *gone(INTERNALS_OF_ANSWERS, answers, "response.py or routes.py")]
    problems += [
        f"WholeAnswer.{name} overrides a method: add it to INTERNALS_OF_ANSWERS"
        for name in (vars(WholeAnswer).keys() & vars(web.StreamResponse).keys()) - {"_abc_impl"}
        if name[:2] != "__" and (web.StreamResponse, name) not in INTERNALS_OF_ANSWERS
    ]
    if not aiohttp.__version__.startswith(f"{CHECKED}."):
        problems.append("This is another minor version: check every sentence of INTERNALS, then change CHECKED.")
    if problems:
        advice = "Look into aiohttp's web_protocol.py, web_server.py and web_runner.py, and run this file."
        pytest.fail("\n".join([f"aiohttp {aiohttp.__version__}:", *problems, advice]), pytrace=False)


def _changes(objects: dict[type, Any]) -> Iterator[str]:
    """What aiohttp no longer has, has with other parameters, or now has under a name of ours."""
    yield from gone(INTERNALS, objects, "listener.py")
    for base, name in INTERNALS:
        subclass = SUBCLASSES[base]
        if name in vars(subclass) and hasattr(base, name) and _parameters(base, name) != _parameters(subclass, name):
            yield f"{base.__name__}.{name} has other parameters: {_parameters(base, name)}."
    for base, names in ADDED.items():
        for name in names:
            if hasattr(objects[base], name):
                yield f"{base.__name__} has its own {name}, which {SUBCLASSES[base].__name__} replaces: rename ours."


def _unlisted() -> Iterator[str]:
    """What listener.py overrides or reads and INTERNALS does not list."""
    added = {*listener._Places.__slots__, *(name for names in ADDED.values() for name in names)}
    return unlisted(INTERNALS, SUBCLASSES, listener, ours=added)


def _parameters(owner: type, name: str) -> list[str]:
    return list(inspect.signature(getattr(owner, name)).parameters)
