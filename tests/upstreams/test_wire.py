"""The client and what an upstream may do on the wire: framing, kept connections, broken answers, cancelled calls.

The upstreams are raw sockets, so a test chooses every byte and sees whether it was received. Each test runs on
asyncio's event loop and on uvloop, which `serve` uses: they close connections and report errors in different ways.

What has a file of its own: proxies, certificates and timeouts (`test_network`), compression (`test_client`), and what
a break costs (`tests/journeys/test_breaks.py`).
"""

import asyncio
import contextlib
import functools
import inspect
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from proxy.errors import UpstreamError, UpstreamTimeout
from proxy.policy.catalog import Secret, Transport, Upstream
from proxy.upstreams.client import Upstreams
from proxy.upstreams.sending import Connector
from proxy.upstreams.spool import Spliced, Spool
from tests.bare_upstream import connections, opened
from tests.certificates import Authority
from tests.stage import until

OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = OK + b"Content-Length: 0\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
AUTHORITY = Authority("Test CA")
# How long a test waits for what must not happen.
GRACE_S = 0.3
# A process has no more than about this many bytes in the buffers of one connection, on both sides.
BUFFERED_MAX = 8 * 2**20


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on asyncio's event loop and on uvloop."""

    @pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    @functools.wraps(test)
    def run(loop: Callable[[], asyncio.AbstractEventLoop], **given: Any) -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(test(**given))

    parameters = (
        inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY),
        *inspect.signature(test).parameters.values(),
    )
    run.__signature__ = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))  # type: ignore[attr-defined]
    return run


def length(body: bytes) -> bytes:
    """An answer with this body and its length."""
    return OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


class Wire:
    """A server that passes each request to `answer` with its number, from 1, and the writer of its connection.

    `answer` may return False to end the connection.
    """

    def __init__(self, answer: "Answer", *, reads_body: bool = True) -> None:
        self.requests: list[bytes] = []
        self.connected = 0
        self.closed = 0
        self.up = Upstream("up", "", None)
        self._answer = answer
        self._reads_body = reads_body

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connected += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                self.requests.append(head + (await reader.readexactly(size) if self._reads_body else b""))
                if await self._answer(len(self.requests), writer) is False:
                    return
        finally:
            self.closed += 1


Answer = Callable[[int, asyncio.StreamWriter], Awaitable[bool | None]]


@asynccontextmanager
async def wire(answer: Answer, *, reads_body: bool = True, **transport: Any) -> AsyncIterator[tuple[Wire, Upstreams]]:
    """Such a server, its `up`, and a client."""
    server = Wire(answer, reads_body=reads_body)
    async with connections(server.accept) as port, opened() as upstreams:
        server.up = Upstream("up", f"http://127.0.0.1:{port}/v1", None, transport=Transport(**transport))
        yield server, upstreams


def answering(*answers: bytes, ends: bool = False) -> Answer:
    """Answers the n-th request with the n-th of these texts, and all further ones with the last."""

    async def answer(number: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(answers[min(number, len(answers)) - 1])
        await writer.drain()
        return not (ends and number == 1)

    return answer


async def ask(upstreams: Upstreams, up: Upstream, body: bytes | Spliced = b"{}", **more: Any) -> bytes:
    """Send one call and return the body of its answer."""
    async with await upstreams.send(up, "/x", body, {}, **more) as answer:
        return await answer.read()


async def failure(upstreams: Upstreams, up: Upstream, body: bytes | Spliced = b"{}", **more: Any) -> UpstreamError:
    """The error that a call ends with."""
    with pytest.raises(UpstreamError) as failed:
        await ask(upstreams, up, body, **more)
    return failed.value


def kept(upstreams: Upstreams) -> list[Any]:
    """The connections that are kept for further calls. The library has no public way to list them."""
    connector: Any = upstreams.connector
    return [protocol for queue in connector._conns.values() for protocol, _ in queue]


def reset(writer: asyncio.StreamWriter) -> None:
    """Have the connection reset when it is closed."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# ----------------------------------------------------------------------------------------------------------- requests


@on_both_loops
async def test_the_request_has_each_header_once_and_its_body_as_it_is() -> None:
    """What is the upstream's own replaces what the call has. The body has a length, also when it is empty."""
    async with wire(answering(EMPTY)) as (server, upstreams):
        headers = (("x-tenant", Secret("blue")), ("user-agent", Secret("gateway")))
        up = Upstream("up", server.up.base_url, Secret("sk-1"), transport=Transport(headers=headers))
        own = {"content-type": "application/json", "x-title": "Ünïcode", "user-agent": "client", "x-tenant": "red"}
        async with await upstreams.send(up, "/a%20b?api-version=1", b'{"a":1}', own):
            pass
        async with await upstreams.send(up, "/models", b"", {}, method="GET"):
            pass
        first, second = (request.decode().split("\r\n\r\n") for request in server.requests)
        line, *lines = first[0].split("\r\n")
        assert line == "POST /v1/a%20b?api-version=1 HTTP/1.1"
        sent = sorted((name.lower(), value) for name, _, value in (line.partition(": ") for line in lines))
        assert [header for header in sent if header[0] not in ("accept", "accept-encoding")] == [
            ("authorization", "Bearer sk-1"),
            ("content-length", "7"),
            ("content-type", "application/json"),
            ("host", up.base_url.removeprefix("http://").removesuffix("/v1")),
            ("user-agent", "gateway"),
            ("x-tenant", "blue"),
            ("x-title", "Ünïcode"),
        ]
        assert first[1] == '{"a":1}'
        assert second[0].startswith("GET /v1/models HTTP/1.1\r\n")
        assert "content-length: 0" in second[0].lower()


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "a\0b", "a\x7fb"], ids=repr)
@on_both_loops
async def test_no_header_and_no_path_ends_its_line(value: str) -> None:
    """It would begin a header of its own. Such a request is not sent."""
    async with wire(answering(EMPTY)) as (server, upstreams):
        for path, headers in (("/x", {"x-title": value}), ("/x", {value: "1"}), (f"/{value}", {})):
            with pytest.raises(ValueError, match="control character"):
                async with await upstreams.send(server.up, path, b"{}", headers):
                    pass
        assert server.requests == []
        assert await ask(upstreams, server.up) == b""


# --------------------------------------------------------------------------------------------------- complete answers


@pytest.mark.parametrize(
    ("answer", "body", "is_kept"),
    [
        (length(b"abc"), b"abc", True),
        (CHUNKED + b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", b"abc", True),
        (CHUNKED + b'1;x=y\r\na\r\n2;z="q"\r\nbc\r\n0;end\r\n\r\n', b"abc", True),
        (CHUNKED + b"3\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n", b"abc", True),
        (CHUNKED + b"00003\r\nabc\r\n000\r\n\r\n", b"abc", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", b"", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + length(b"abc"), b"abc", True),
        (b"HTTP/1.1 103 Early Hints\r\nX-Hint: 1\r\n\r\n" * 3 + length(b"abc"), b"abc", True),
        (OK + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc", b"abc", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc", b"abc", True),
    ],
    ids=[
        *("length", "chunks", "extensions", "trailer", "zeros", "204", "304", "100", "103"),
        *("close", "1.0", "1.0 keep-alive"),
    ],
)
@pytest.mark.parametrize("step", [0, 1], ids=["at once", "byte by byte"])
@on_both_loops
async def test_a_complete_answer(answer: bytes, body: bytes, is_kept: bool, step: int) -> None:
    """Its connection is used again, unless the upstream says that it closes it."""

    async def write(_: int, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(answer), step or len(answer)):
            writer.write(answer[start : start + (step or len(answer))])
            await writer.drain()
            await asyncio.sleep(0)

    async with wire(write) as (server, upstreams):
        for _ in range(2):
            async with await upstreams.send(server.up, "/x", b"{}", {}) as found:
                assert found.status == (int(answer[9:12]) if answer[9:10] != b"1" else 200)
                assert await found.read() == body
                assert not {"x-hint", "x-trailer"} & {name.lower() for name in found.headers}
        assert server.connected == (1 if is_kept else 2)


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
@on_both_loops
async def test_a_body_without_a_length_ends_with_its_connection(version: bytes) -> None:
    """It is complete if the upstream closes the connection, and not if it is reset."""

    async def write(number: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(version + b" 200 OK\r\n\r\nab")
        await received.wait()
        writer.write(b"c")
        await writer.drain()
        if number == 2:
            reset(writer)
        return False

    async with wire(write) as (server, upstreams):
        for is_complete in (True, False):
            received = asyncio.Event()
            async with await upstreams.send(server.up, "/x", b"{}", {}) as answer:
                chunks, body = answer.chunks(), b""
                body += await anext(chunks)
                received.set()
                with contextlib.nullcontext() if is_complete else pytest.raises(UpstreamError, match="broke off"):
                    async for chunk in chunks:
                        body += chunk
            assert body == b"abc" or (not is_complete and body == b"ab")  # a reset may overtake data
        assert kept(upstreams) == []


@on_both_loops
async def test_an_answer_to_head_has_no_body() -> None:
    """Its length is that of the answer to GET."""
    async with wire(answering(OK + b"Content-Length: 5\r\n\r\n", length(b"abc"))) as (server, upstreams):
        assert await ask(upstreams, server.up, b"", method="HEAD") == b""
        assert await ask(upstreams, server.up) == b"abc"
        assert server.connected == 1


@on_both_loops
async def test_headers_are_handed_out_as_they_came() -> None:
    """Repeated ones too, and bytes that are not UTF-8."""
    head = OK + b"Set-Cookie: a\r\nset-cookie: b\r\nX-Text: caf\xe9 \xc3\xa9\r\nContent-Length: 0\r\n\r\n"
    async with (
        wire(answering(head)) as (server, upstreams),
        await upstreams.send(server.up, "/x", b"{}", {}) as answer,
    ):
        assert answer.headers.getall("set-cookie") == ["a", "b"]
        assert answer.headers["X-Text"] == "caf\udce9 é"


@on_both_loops
async def test_what_takes_a_body_may_cancel_whoever_waits_for_its_end() -> None:
    """As the call of a client that has disconnected. Nothing is raised into the event loop."""
    loop, go_on, taken, raised = asyncio.get_running_loop(), asyncio.Event(), bytearray(), list[Any]()
    loop.set_exception_handler(lambda _, context: raised.append(context))

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"1\r\na\r\n")
        await go_on.wait()
        writer.write(b"1\r\nb\r\n1\r\nc\r\n")

    def take(chunk: bytes) -> bool:
        taken.extend(chunk)
        return b"b" not in chunk or not reading.cancel()

    async with wire(answer) as (server, upstreams), await upstreams.send(server.up, "/x", b"{}", {}) as found:
        reading = loop.create_task(found.pass_on(take))
        await until(lambda: taken == b"a")
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert not raised


# ----------------------------------------------------------------------------------------------------- broken answers


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        OK + b"Content-Length: x\r\n\r\n",
        OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        OK + b"X-Large: " + b"x" * 2**20 + b"\r\n\r\n",
        OK + b"x" * 2**20,
        OK + b"X-Many: 1\r\n" * (2**20 // 11) + b"\r\n",
        b"HTTP/1.1 200 " + b"x" * 2**20 + b"\r\n\r\n",
    ],
    ids=[
        *("garbage", "ssh", "http2", "no length", "two lengths", "large value", "large name", "many headers"),
        "large reason",
    ],
)
@on_both_loops
async def test_a_head_that_is_none_ends_the_call_at_once(answer: bytes) -> None:
    """A large one is not collected without a limit. The upstream has the call, and its connection is closed."""
    async with wire(answering(answer)) as (server, upstreams):
        error = await asyncio.wait_for(failure(upstreams, server.up), 10)
        assert (error.was_sent, isinstance(error, UpstreamTimeout)) == (True, False)
        await until(lambda: server.closed == 1)
        assert kept(upstreams) == []


@pytest.mark.parametrize("ends", [True, False], ids=["closed", "silent"])
@pytest.mark.parametrize(
    "bad", [b"zz\r\n", b"-1\r\nab\r\n", b"g\r\n", b"3\r\nabcd\r\n", b"1" * 40 + b"\r\n"], ids=repr
)
@on_both_loops
async def test_a_bad_chunk_ends_the_answer_at_once(bad: bytes, ends: bool) -> None:
    """Also if the upstream sends nothing more. What came before is handed out."""

    async def write(_: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(CHUNKED + b"2\r\nok\r\n")
        await received.wait()
        writer.write(bad)
        await writer.drain()
        return not ends

    received = asyncio.Event()
    async with wire(write) as (server, upstreams), await upstreams.send(server.up, "/x", b"{}", {}) as answer:
        chunks = answer.chunks()
        assert await anext(chunks) == b"ok"
        received.set()
        with pytest.raises(UpstreamError, match="broke off"):
            async with asyncio.timeout(10):
                async for chunk in chunks:
                    assert b"abc".startswith(chunk)
        await until(lambda: server.closed == 1)
        assert kept(upstreams) == []


@on_both_loops
async def test_an_error_that_comes_right_after_the_head_is_not_overlooked() -> None:
    """uvloop may read several packets before the call goes on. Then nobody has asked for the body yet."""
    answered = asyncio.Event()

    async def write(_: int, writer: asyncio.StreamWriter) -> None:
        answered.set()

    async with wire(write) as (server, upstreams):
        call = asyncio.get_running_loop().create_task(failure(upstreams, server.up))
        await answered.wait()
        connector: Any = upstreams.connector
        [protocol] = connector._acquired
        for packet in (CHUNKED, b"zz\r\n"):
            protocol.data_received(packet)
        assert "broke off" in (await asyncio.wait_for(call, 10)).message


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(
    "answer", [OK + b"Content-Length: 9\r\n\r\nabc", CHUNKED + b"9\r\nabc"], ids=["length", "chunk"]
)
@on_both_loops
async def test_a_body_that_is_cut_short_is_an_error_after_its_bytes(answer: bytes, how: str) -> None:
    """The bytes that have come are charged, so they are handed out first."""

    async def write(_: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer)
        await received.wait()
        if how == "rst":
            reset(writer)
        return False

    received = asyncio.Event()
    async with wire(write) as (server, upstreams):
        async with await upstreams.send(server.up, "/x", b"{}", {}) as found:
            chunks = found.chunks()
            assert await anext(chunks) == b"abc"
            received.set()
            with pytest.raises(UpstreamError, match="broke off"):
                await anext(chunks)
        assert kept(upstreams) == []


# --------------------------------------------------------------------------------------------------- kept connections


@on_both_loops
async def test_a_connection_is_used_again() -> None:
    """One after another on one connection, and at the same time on no more than there are calls."""
    async with wire(answering(length(b"abc"))) as (server, upstreams):
        for _ in range(20):
            assert await ask(upstreams, server.up) == b"abc"
        assert server.connected == 1
        for _ in range(3):
            await asyncio.gather(*(ask(upstreams, server.up) for _ in range(10)))
        assert server.connected <= 10


@pytest.mark.parametrize(
    ("answer", "stray", "body"),
    [
        (length(b"1"), length(b"2"), b"1"),
        (length(b"1"), b"2", b"1"),
        (length(b"1"), b"HTTP/1.1 200 OK\r\nContent-Le", b"1"),
        (length(b"1"), b"H", b"1"),
        (CHUNKED + b"1\r\n1\r\n0\r\n\r\n", b"0\r\n\r\n", b"1"),
        (CHUNKED + b"1\r\n1\r\n0\r\n\r\n", length(b"2"), b"1"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", length(b"2"), b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1\r\n\r\n", b"2", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + length(b"1"), b"HTTP/1.1 100 Continue\r\n\r\n", b"1"),
        (OK + b"Connection: close\r\nContent-Length: 1\r\n\r\n1", length(b"2"), b"1"),
    ],
    ids=[
        *("answer", "longer body", "half a head", "one byte", "second end", "answer after chunks", "after 204"),
        *("body of 304", "100", "close"),
    ],
)
@pytest.mark.parametrize("together", [True, False], ids=["at once", "later"])
@on_both_loops
async def test_bytes_after_an_answer_never_reach_another_call(
    answer: bytes, stray: bytes, body: bytes, together: bool
) -> None:
    """Otherwise an upstream that sends too much would give one user's answer to another. The connection is closed."""

    async def write(number: int, writer: asyncio.StreamWriter) -> None:
        if number > 1:
            writer.write(length(b"own"))
        else:
            writer.write(answer + stray if together else answer)
            if not together:
                await answered.wait()
                writer.write(stray)

    answered = asyncio.Event()
    async with wire(write) as (server, upstreams):
        try:
            assert await ask(upstreams, server.up) == body
        except UpstreamError as error:  # the parser has found the error before the answer was handed out
            assert together and error.was_sent
        found = kept(upstreams)
        answered.set()
        # Until the bytes have arrived on the kept connection, or it is closed.
        await until(lambda: together or all(protocol.should_close for protocol in found))
        for _ in range(3):
            assert await ask(upstreams, server.up) == b"own"
        assert server.connected == 2
        assert server.closed == 1


@pytest.mark.parametrize("how", ["fin", "rst"])
@on_both_loops
async def test_a_kept_connection_that_was_closed_is_not_used(how: str) -> None:
    """Neither for a call, which would fail, nor at all."""

    async def write(number: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(length(b"abc"))
        await writer.drain()
        if number == 1:
            await answered.wait()
            if how == "rst":
                reset(writer)
        return number > 1

    answered = asyncio.Event()
    async with wire(write) as (server, upstreams):
        assert await ask(upstreams, server.up) == b"abc"
        [protocol] = kept(upstreams)
        answered.set()
        await until(lambda: not protocol.is_connected())
        assert await ask(upstreams, server.up) == b"abc"
        assert server.connected == 2


@on_both_loops
async def test_a_call_on_a_connection_that_closes_is_sent_again_only_if_that_is_harmless() -> None:
    """The upstream may have run a POST (RFC 9110 §9.2.2). A GET goes to a new connection, once."""

    async def write(number: int, writer: asyncio.StreamWriter) -> bool:
        if number in (1, 3, 5):
            writer.write(length(b"%d" % number))
            await writer.drain()
        return number in (1, 3, 5)

    async with wire(write) as (server, upstreams):
        assert await ask(upstreams, server.up) == b"1"
        error = await failure(upstreams, server.up)
        assert (error.was_sent, len(server.requests)) == (True, 2)
        assert await ask(upstreams, server.up) == b"3"
        assert await ask(upstreams, server.up, b"", method="GET") == b"5"
        assert (await failure(upstreams, server.up, b"", method="DELETE")).was_sent
        assert [request.split()[0] for request in server.requests[3:]] == [b"GET", b"GET", b"DELETE", b"DELETE"]


@pytest.mark.parametrize("turns", range(8))
@on_both_loops
async def test_what_was_not_sent_was_not_received(turns: int) -> None:
    """T38: whenever the connection closes. Only such a call may be sent to another upstream at no charge."""
    async with wire(answering(length(b"abc"))) as (server, upstreams):
        assert await ask(upstreams, server.up) == b"abc"
        [protocol] = kept(upstreams)
        loop = asyncio.get_running_loop()

        def close(in_turns: int) -> None:
            if in_turns:
                loop.call_soon(close, in_turns - 1)
            else:
                protocol.transport and protocol.transport.abort()

        close(turns)
        try:
            assert await ask(upstreams, server.up, b"second") == b"abc"
        except UpstreamError as error:
            for _ in range(20):
                await asyncio.sleep(0)
            was_received = any(b"second" in request for request in server.requests)
            assert error.was_sent or not was_received


@on_both_loops
async def test_a_connection_that_is_closed_when_it_is_made_may_not_have_the_call() -> None:
    """T38: the call counts as sent if it was written at all."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reset(writer)

    async with connections(accept) as port, opened() as upstreams:
        errors = [await failure(upstreams, Upstream("up", f"http://127.0.0.1:{port}", None)) for _ in range(20)]
        assert not any(isinstance(error, UpstreamTimeout) for error in errors)
        assert kept(upstreams) == []


@on_both_loops
async def test_a_call_without_a_connection_when_it_is_written_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """T38: nothing is written to a connection that has closed since it was made."""
    async with wire(answering(EMPTY)) as (server, upstreams):
        connect = Connector.connect

        async def closed(*arguments: Any) -> Any:
            connection: Any = await connect(*arguments)
            connection.transport.abort()
            return connection

        monkeypatch.setattr(Connector, "connect", closed)
        error = await failure(upstreams, server.up)
        assert (error.was_sent, error.message) == (False, "The upstream closed the connection without an answer.")
        assert (server.requests, kept(upstreams)) == ([], [])


@on_both_loops
async def test_many_refused_connects_leave_nothing_behind() -> None:
    """T38: each of them was not sent."""
    async with opened() as upstreams:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        up = Upstream("up", f"http://127.0.0.1:{port}", None)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            errors = await asyncio.gather(*(failure(upstreams, up) for _ in range(100)))
            assert {(error.was_sent, error.reason) for error in errors} == {
                (False, f"127.0.0.1:{port}: Connection refused")
            }
        assert len(os.listdir("/proc/self/fd")) <= before


@on_both_loops
async def test_a_certificate_with_another_name_is_not_accepted(tmp_path: Path) -> None:
    """Nothing is sent to such a server."""
    server = Wire(answering(EMPTY))
    async with (
        connections(server.accept, tls=AUTHORITY.server("llm.example", tmp_path)) as port,
        opened() as upstreams,
    ):
        up = Upstream("up", f"https://127.0.0.1:{port}", None, transport=Transport(ca=AUTHORITY.pem))
        error = await failure(upstreams, up)
        assert error.was_sent is False
        assert "its certificate is not valid: IP address mismatch" in error.reason
        assert server.requests == []


# ------------------------------------------------------------------------------------------------------ back pressure


@on_both_loops
async def test_an_upstream_waits_for_a_client_that_does_not_read() -> None:
    """Otherwise a slow client would have its whole answer in the memory of the proxy."""
    total, piece = 64 * 2**20, b"x" * 2**16
    written = 0

    async def write(_: int, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % total)
        while written < total:
            writer.write(piece)
            await writer.drain()
            written += len(piece)

    async with wire(write) as (server, upstreams), await upstreams.send(server.up, "/x", b"{}", {}) as answer:
        chunks = answer.chunks()
        received = len(await anext(chunks))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await until(lambda: written > BUFFERED_MAX)
        async for chunk in chunks:
            received += len(chunk)
        assert received == total


@asynccontextmanager
async def spliced(size: int) -> AsyncIterator[Spliced]:
    """A body on the disk, with a few bytes replaced."""
    spool = Spool()
    for _ in range(size // 2**16):
        await spool.write(b"x" * 2**16)
    await spool.flush()
    try:
        yield Spliced(spool, start=10, end=12, patch=b"model")
    finally:
        spool.close()


@pytest.mark.parametrize("form", ["memory", "disk"])
@on_both_loops
async def test_a_large_body_waits_for_an_upstream_that_does_not_read(form: str) -> None:
    """It is not read from the disk before it can be sent. It arrives as it is."""
    size = 32 * 2**20

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        head = await reader.readuntil(b"\r\n\r\n")
        await may_read.wait()
        received.append(await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0])))
        writer.write(length(b"abc"))
        await reader.read()

    may_read, received = asyncio.Event(), list[bytes]()
    async with connections(accept) as port, opened() as upstreams, spliced(size) as on_disk:
        read = 0
        body: bytes | Spliced = on_disk if form == "disk" else b"y" * size
        chunks = on_disk.chunks

        async def counted() -> AsyncIterator[bytes]:
            nonlocal read
            async for chunk in chunks():
                read += len(chunk)
                yield chunk

        on_disk.chunks = counted  # type: ignore[method-assign]
        call = asyncio.get_running_loop().create_task(
            ask(upstreams, Upstream("up", f"http://127.0.0.1:{port}", None), body)
        )
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await until(lambda: read > BUFFERED_MAX)
        may_read.set()
        assert await call == b"abc"
        expected = b"".join([chunk async for chunk in chunks()]) if form == "disk" else body
        assert received == [expected]
        assert len(kept(upstreams)) == 1


@pytest.mark.parametrize("form", ["memory", "disk"])
@pytest.mark.parametrize("closes", [False, True])
@on_both_loops
async def test_an_answer_may_come_before_the_whole_body_is_sent(form: str, closes: bool) -> None:
    """A server that refuses a large body does not read it. The connection is then in the middle of a request."""

    async def write(number: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nabc")
        await writer.drain()
        if not closes:
            await answered.wait()
        return False

    answered = asyncio.Event()
    async with wire(write, reads_body=False) as (server, upstreams), spliced(32 * 2**20) as on_disk:
        body: bytes | Spliced = on_disk if form == "disk" else b"y" * 32 * 2**20
        try:
            async with asyncio.timeout(10), await upstreams.send(server.up, "/x", body, {}) as answer:
                assert (answer.status, await answer.error_body()) == (413, b"abc")
        except UpstreamError as error:
            assert closes  # the reset of a server that closes with unread bytes may overtake its answer
            assert error.was_sent
        assert kept(upstreams) == []
        answered.set()


@on_both_loops
async def test_a_body_that_cannot_be_read_from_the_disk_ends_the_call() -> None:
    """The upstream may have begun to work on it."""
    async with wire(answering(EMPTY)) as (server, upstreams), spliced(2**20) as body:
        body._spool.close()
        error = await asyncio.wait_for(failure(upstreams, server.up, body), 10)
        assert error.was_sent
        assert (server.requests, kept(upstreams)) == ([], [])
        await until(lambda: server.closed == server.connected)


@on_both_loops
async def test_an_upstream_that_leaves_in_the_middle_of_a_body_may_have_the_call() -> None:
    """It has a part of it, and no answer comes."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with connections(accept) as port, opened() as upstreams, spliced(32 * 2**20) as body:
        up = Upstream("up", f"http://127.0.0.1:{port}", None)
        assert (await asyncio.wait_for(failure(upstreams, up, body), 10)).was_sent
        assert kept(upstreams) == []


# ---------------------------------------------------------------------------------------------------------- cancelled


@pytest.mark.parametrize(
    "when", ["connecting", "sending", "before the head", "in the head", "in the body", "at the end"]
)
@on_both_loops
async def test_a_cancelled_call_closes_its_connection(when: str) -> None:
    """At once, so that the upstream may stop. It is not kept, unless the answer is complete."""
    events = {name: asyncio.Event() for name in ("begun", "gone")}

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if when != "connecting":
            await reader.readuntil(b"\r\n\r\n")
            if when == "sending":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            else:
                await reader.readexactly(2)
            texts = {
                "in the head": OK,
                "in the body": OK + b"Content-Length: 9\r\n\r\nabc",
                "at the end": length(b"abc"),
            }
            writer.write(texts.get(when, b""))
            await writer.drain()
        events["begun"].set()
        with contextlib.suppress(ConnectionError):
            while await reader.read(2**16):
                pass
        events["gone"].set()

    async def call(up: Upstream) -> None:
        body: bytes = b"y" * 32 * 2**20 if when == "sending" else b"{}"
        async with await upstreams.send(up, "/x", body, {}) as answer:
            with contextlib.suppress(UpstreamError):
                await answer.read()
            read.set()
            await asyncio.Event().wait()

    read = asyncio.Event()
    async with connections(accept) as port, opened() as upstreams:
        scheme = "https" if when == "connecting" else "http"
        task = asyncio.get_running_loop().create_task(call(Upstream("up", f"{scheme}://127.0.0.1:{port}", None)))
        await events["begun"].wait()
        if when == "at the end":
            await read.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if when == "at the end":
            assert len(kept(upstreams)) == 1
        else:
            await asyncio.wait_for(events["gone"].wait(), 10)
            assert kept(upstreams) == []


@pytest.mark.parametrize("when", ["before the head", "in the body"])
@on_both_loops
async def test_a_client_that_is_closed_ends_its_calls(when: str) -> None:
    """They would wait for their timeouts otherwise."""
    begun = asyncio.Event()

    async def write(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Content-Length: 9\r\n\r\nabc" if when == "in the body" else b"")
        await writer.drain()
        begun.set()

    async with wire(write) as (server, upstreams):
        task = asyncio.get_running_loop().create_task(failure(upstreams, server.up))
        await begun.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        await upstreams.close()
        assert (await asyncio.wait_for(task, 10)).was_sent


@on_both_loops
async def test_an_answer_that_is_not_read_to_its_end_is_not_kept() -> None:
    """Its rest would be taken for the answer to the next call."""
    async with wire(answering(OK + b"Content-Length: 9\r\n\r\nabc", length(b"own"))) as (server, upstreams):
        async with await upstreams.send(server.up, "/x", b"{}", {}) as answer:
            assert await anext(answer.chunks()) == b"abc"
        assert kept(upstreams) == []
        assert await ask(upstreams, server.up) == b"own"


@pytest.fixture(autouse=True)
def no_unclosed_connection(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The library complains of connections that nobody has closed through the logger of asyncio."""
    yield
    assert not [record for record in caplog.records if record.name.startswith(("asyncio", "aiohttp"))]
