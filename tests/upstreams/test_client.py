"""HTTP to the upstreams: which errors there are, and whether the upstream can have received the call."""

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from proxy.errors import UpstreamError, UpstreamTimeout, UpstreamUnreadable
from proxy.formats.content_encoding import PIECE_BYTES
from proxy.policy.catalog import Transport, Upstream
from proxy.upstreams.client import ANSWER_BYTES_MAX, Upstreams
from proxy.upstreams.sending import Route, why_unreachable
from tests.bare_upstream import connections, opened
from tests.stage import until

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def _upstream(answer: bytes, *, repeat: int = 1) -> AsyncIterator[tuple[Upstream, list[bytes]]]:
    """A server that reads one whole request, answers with these bytes, and closes the connection."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.lower().split(b"\r\n") if b"content-length" in line).split()[1])
        seen.append(head + await reader.readexactly(length))
        for _ in range(repeat):
            writer.write(answer)
            await writer.drain()

    async with connections(serve) as port:
        yield Upstream("up", f"http://127.0.0.1:{port}/v1", None), seen


async def test_an_answer_has_status_headers_and_body() -> None:
    """The request arrives at the upstream as it was given."""
    async with (
        _upstream(HEAD + b"Retry-After: 3\r\nContent-Length: 2\r\n\r\n{}") as (up, seen),
        opened() as upstreams,
    ):
        async with await upstreams.send(up, "/chat/completions", b'{"a":1}', {"x-title": "T"}) as answer:
            assert (answer.status, answer.retry_after, answer.is_event_stream) == (200, "3", False)
            assert await answer.read() == b"{}"
        assert seen[0].startswith(b"POST /v1/chat/completions HTTP/1.1")
        assert b"x-title: T" in seen[0]
        assert seen[0].endswith(b'{"a":1}')


async def test_a_large_body_is_sent_completely() -> None:
    """Megabytes of images arrive at the upstream unchanged."""
    body = b"x" * (3 * 2**20)
    async with _upstream(HEAD + b"Content-Length: 2\r\n\r\n{}") as (up, seen), opened() as upstreams:
        async with await upstreams.send(up, "/chat/completions", body, {}) as answer:
            await answer.read()
        assert seen[0].endswith(body)


async def test_the_reason_for_the_log_says_why_an_upstream_cannot_be_reached() -> None:
    """With the address, which the message for the client must not name."""
    async with opened() as upstreams:
        for url, reason in (
            ("http://127.0.0.1:1", "127.0.0.1:1: Connection refused"),
            ("http://no-such-host.invalid", "no-such-host.invalid:80: the name of its host can't be resolved"),
        ):
            with pytest.raises(UpstreamError) as failed:
                async with await upstreams.send(Upstream("up", url, None), "/chat/completions", b"{}", {}):
                    pass
            assert failed.value.reason == reason
            assert "127.0.0.1" not in failed.value.message


async def test_the_reason_names_what_is_wrong_with_a_certificate() -> None:
    """So that the operator need not try with another program."""
    key = SimpleNamespace(host="llm.example", port=443, ssl=True, is_ssl=True)
    route = Route(Upstream("up", "https://llm.example", None), True)
    invalid = ssl.SSLCertVerificationError(1, "certificate verify failed")
    invalid.verify_message = "self-signed certificate"
    error = aiohttp.ClientConnectorCertificateError(key, invalid)  # type: ignore[arg-type]
    assert why_unreachable(error, route) == "llm.example:443: its certificate is not valid: self-signed certificate"
    no_tls = aiohttp.ClientConnectorSSLError(key, OSError(1, "wrong version number"))  # type: ignore[arg-type]
    assert why_unreachable(no_tls, route) == "llm.example:443: no TLS connection: wrong version number"
    assert why_unreachable(TimeoutError(), route) == "no connection within 5 s"


async def test_the_reason_of_a_redirect_says_where_it_leads() -> None:
    """Without a user, a path and a query, which may have secrets. It is not followed."""
    location = b"Location: https://u:secret@llm.example/login?token=secret\r\n"
    head = b"HTTP/1.1 302 Found\r\n" + location + b"Content-Length: 0\r\n\r\n"
    plain = HEAD + b"Content-Length: 2\r\n\r\n{}"
    for sent, reason in ((head, "status 302, to https://llm.example"), (plain, "status 200")):
        async with (
            _upstream(sent) as (up, _),
            opened() as upstreams,
            await upstreams.send(up, "/chat/completions", b"{}", {}) as answer,
        ):
            assert answer.status_reason == reason


async def test_a_refused_connection_means_that_nothing_was_sent() -> None:
    """T38: such a call is provably free."""
    async with opened() as upstreams:
        with pytest.raises(UpstreamError, match="can't be reached") as failed:
            async with await upstreams.send(Upstream("up", "http://127.0.0.1:1/v1", None), "/x", b"{}", {}):
                raise AssertionError
        assert failed.value.was_sent is False
        assert failed.value.headers == {"retry-after": "2"}


@pytest.mark.parametrize(
    "answer",
    [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["length", "chunked"],
)
async def test_an_answer_that_breaks_off_raises(answer: bytes) -> None:
    """A body that ends too early is an error, with a length and with chunks."""
    async with _upstream(HEAD + answer) as (up, _), opened() as upstreams:
        with pytest.raises(UpstreamError, match="broke off") as failed:
            async with await upstreams.send(up, "/x", b"{}", {}) as begun:
                await begun.read()
        assert failed.value.was_sent is True


@pytest.mark.parametrize("packed", [gzip.compress(b"{}", mtime=0)[:-1], gzip.compress(b"{}", mtime=0) + b"{}"])
async def test_an_answer_that_leaves_its_encoding_says_so(packed: bytes) -> None:
    """The upstream did not break off: its administrator has to look for another mistake."""
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    async with _upstream(head + packed) as (up, _), opened() as upstreams:
        with pytest.raises(UpstreamError, match="not in the format that its Content-Encoding names, or its end"):
            async with await upstreams.send(up, "/x", b"{}", {}) as begun:
                await begun.read()


async def test_redirects_are_not_followed() -> None:
    """T44, T50: the library would send our key to whatever address they name."""
    async with _upstream(b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n") as (
        up,
        seen,
    ):
        async with opened() as upstreams, await upstreams.send(up, "/x", b"{}", {}) as answer:
            assert answer.status == 307
        assert len(seen) == 1


async def test_a_whole_answer_has_a_largest_size() -> None:
    """T42: an answer without end is cut off instead of filling the memory."""
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    piece = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    async with _upstream(head + piece, repeat=1) as (up, _), opened() as upstreams:
        with pytest.raises(UpstreamError):
            async with await upstreams.send(up, "/x", b"{}", {}) as answer:
                await answer.read()
    endless = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (ANSWER_BYTES_MAX * 2)
    async with _upstream(endless + b"x" * (ANSWER_BYTES_MAX + 2)) as (up, _), opened() as upstreams:
        with pytest.raises(UpstreamError, match="larger than"):
            async with await upstreams.send(up, "/x", b"{}", {}) as answer:
                await answer.read()


async def test_a_compressed_answer_is_bounded_after_decompression() -> None:
    """A bomb of 64 kB becomes more than an answer may have. It is unpacked piece by piece and given up there."""
    bomb = gzip.compress(bytes(ANSWER_BYTES_MAX + 1))
    async with _upstream(HEAD + b"Content-Encoding: gzip\r\n\r\n" + bomb) as (up, _), opened() as upstreams:
        async with await upstreams.send(up, "/x", b"{}", {}) as answer:
            assert len(await anext(answer.chunks())) <= PIECE_BYTES
        with pytest.raises(UpstreamError, match="larger than"):
            async with await upstreams.send(up, "/x", b"{}", {}) as answer:
                await answer.read()


async def test_a_compressed_answer_leaves_others_their_turn() -> None:
    """One packet may become many megabytes. The event loop is free after each piece."""
    packed = gzip.compress(bytes(16 * PIECE_BYTES))
    async with (
        _upstream(HEAD + b"Content-Encoding: gzip\r\n\r\n" + packed) as (up, _),
        opened() as upstreams,
        await upstreams.send(up, "/x", b"{}", {}) as answer,
    ):
        turns = 0

        def count() -> None:
            nonlocal turns
            turns += 1
            asyncio.get_running_loop().call_soon(count)

        await anext(chunks := answer.chunks())
        count()
        assert len([chunk async for chunk in chunks]) == 15
        assert turns >= 15


async def test_a_compressed_transfer_is_decompressed_too() -> None:
    """RFC 9112 §7.2 allows compression as a transfer coding. The library undoes only the chunks."""
    packed = gzip.compress(b"{}")
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed)
    async with (
        _upstream(HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + body) as (up, _),
        opened() as upstreams,
        await upstreams.send(up, "/x", b"{}", {}) as answer,
    ):
        assert await answer.read() == b"{}"


async def test_an_answer_in_an_unknown_encoding_counts_as_not_sent() -> None:
    """Nobody can read it. The status of an error is enough without its body."""
    body = b"Content-Encoding: lzma\r\nContent-Length: 2\r\n\r\nxx"
    async with _upstream(HEAD + body) as (up, _), opened() as upstreams:
        with pytest.raises(UpstreamUnreadable, match="compressed") as failed:
            async with await upstreams.send(up, "/x", b"{}", {}):
                raise AssertionError
        assert failed.value.was_sent is False
    async with (
        _upstream(HEAD.replace(b"200", b"400") + body) as (up, _),
        opened() as upstreams,
        await upstreams.send(up, "/x", b"{}", {}) as answer,
    ):
        assert (answer.status, await answer.error_body()) == (400, b"")


async def test_blank_lines_do_not_keep_an_answer_undecided_for_ever() -> None:
    """After 16 kB of them the header decides, and all of them are handed out."""
    blank = b"\n" * 100_000
    for content_type, is_stream in ((b"text/event-stream", True), (b"text/plain", False)):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n\r\n" % content_type
        async with (
            _upstream(head + blank) as (up, _),
            opened() as upstreams,
            await upstreams.send(up, "/x", b"{}", {}) as answer,
        ):
            assert await answer.carries_events() is is_stream
            assert await answer.read() == blank


async def test_a_cookie_of_an_upstream_is_not_sent_with_the_next_call() -> None:
    """T44: it may be another user's. The upstream has a name, because the library keeps no cookies of bare IPs."""
    cookies = b"Connection: close\r\nSet-Cookie: user=ann; Path=/\r\nSet-Cookie: __cf_bm=x\r\n"
    async with _upstream(HEAD + cookies + b"Content-Length: 2\r\n\r\n{}") as (up, seen), opened() as upstreams:
        named = replace(up, base_url=up.base_url.replace("127.0.0.1", "localhost"))
        for _ in range(2):
            async with await upstreams.send(named, "/x", b"{}", {}) as answer:
                await answer.read()
        assert len(seen) == 2
        assert not any(b"cookie" in request.lower() for request in seen)


async def test_a_connection_closed_without_an_answer_counts_as_sent() -> None:
    """T49: the upstream had the whole request, so it may have run although no answer came."""
    async with _upstream(b"") as (up, seen), opened() as upstreams:
        with pytest.raises(UpstreamError, match="without an answer") as failed:
            async with await upstreams.send(up, "/x", b"{}", {}):
                raise AssertionError
        assert failed.value.was_sent is True
        assert seen


def _kept(upstreams: Upstreams) -> Iterable[Any]:
    """The kept connections. The library has no public way to list them."""
    return upstreams.connector._conns.values()


async def test_the_body_of_an_error_is_read_within_bounds() -> None:
    """The status says enough. A body that breaks off, or that has no end, raises nothing."""
    head = b"HTTP/1.1 503 X\r\nContent-Length: 4000000\r\n\r\n"
    async with (
        _upstream(head + b"{") as (up, _),
        opened() as upstreams,
        await upstreams.send(up, "/x", b"{}", {}) as answer,
    ):
        assert await answer.error_body() == b"{"
    assert await answer.error_body() == b"{"  # also after its connection was closed
    endless = head + b"x" * 3_000_000
    async with (
        _upstream(endless) as (up, _),
        opened() as upstreams,
        await upstreams.send(up, "/x", b"{}", {}) as answer,
    ):
        assert 2**20 < len(await answer.error_body()) < 2**21


@pytest.mark.parametrize("together", [True, False], ids=["at once", "later"])
async def test_a_second_answer_is_not_taken_for_that_of_the_next_call(together: bool) -> None:
    """An upstream that answers a request twice would answer one user with the answer of another."""
    first, stray, own = (HEAD + b"Content-Length: 1\r\n\r\n" + digit for digit in (b"1", b"2", b"3"))
    answered = asyncio.Event()
    connected = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        answers = [[first, stray], [own]] if connected == 1 else [[own]]
        for parts in answers:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
            if together:
                writer.write(b"".join(parts))
            else:
                writer.write(parts[0])
                await answered.wait()
                for part in parts[1:]:
                    writer.write(part)
        await reader.read()
        writer.close()

    async with connections(serve) as port, opened() as upstreams:
        up = Upstream("up", f"http://127.0.0.1:{port}/v1", None)
        async with await upstreams.send(up, "/x", b"{}", {}) as answer:
            assert await answer.read() == b"1"
        answered.set()
        # Until the second answer has arrived on the kept connection, or the connection is closed.
        kept = [proto for kept in _kept(upstreams) for proto, _ in kept]
        await until(lambda: together or any(proto.should_close for proto in kept))
        async with await upstreams.send(up, "/x", b"{}", {}) as answer:
            assert await answer.read() == b"3"


@pytest.mark.parametrize("line", [b"X-Line: 1\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n"], ids=["lines", "103"])
async def test_a_head_that_never_ends_is_a_timeout(line: bytes) -> None:
    """T38: the time is that of the whole head, and does not begin again with each line of it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(line if line.startswith(b"HTTP") else b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(line)
            await writer.drain()
            await asyncio.sleep(0.05)

    upstreams = Upstreams()
    upstreams.open()
    async with connections(serve) as port:
        up = Upstream("up", f"http://127.0.0.1:{port}/v1", None, transport=Transport(idle_timeout_ms=200))
        with pytest.raises(UpstreamTimeout, match="did not answer in time"):
            async with await upstreams.send(up, "/x", b"{}", {}):
                raise AssertionError
        await upstreams.close()


async def test_an_answer_may_take_longer_than_a_silence() -> None:
    """Only the time between two reads counts, and not the time that the caller takes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + b"\r\n")
        for _ in range(8):
            writer.write(b"x")
            await asyncio.sleep(0.1)
        await reader.read()  # silent from now on

    upstreams = Upstreams()
    upstreams.open()
    async with connections(serve) as port:
        up = Upstream("up", f"http://127.0.0.1:{port}/v1", None, transport=Transport(idle_timeout_ms=400))
        async with await upstreams.send(up, "/x", b"{}", {}) as answer:
            received = 0
            with pytest.raises(UpstreamTimeout, match="stopped sending"):
                async for chunk in answer.chunks():
                    received += len(chunk)
            assert received == 8
        await upstreams.close()


@pytest.mark.parametrize("status", [b"42", b"1000", b"0", b"-200", b"2OO", b""])
async def test_a_status_that_is_no_number_of_three_digits_is_no_answer(status: bytes) -> None:
    """Its call may have run, so it is not sent again."""
    answer = b"HTTP/1.1 %b X\r\nContent-Length: 2\r\n\r\n{}" % status
    async with _upstream(answer) as (up, _), opened() as upstreams:
        with pytest.raises(UpstreamError) as caught:
            async with await upstreams.send(up, "/chat/completions", b"{}", {}):
                pass
        assert (caught.value.status, caught.value.was_sent) == (502, True)


async def test_an_upstream_does_not_learn_which_library_asks() -> None:
    """A client's own name is sent, and ours if it has none."""
    async with _upstream(HEAD + b"Content-Length: 2\r\n\r\n{}") as (up, seen), opened() as upstreams:
        for headers in ({}, {"user-agent": "curl/8"}):
            async with await upstreams.send(up, "/models", b"", headers, method="GET") as answer:
                assert answer.status == 200
        assert b"User-Agent: llm-quota-proxy\r\n" in seen[0].replace(b"user-agent", b"User-Agent")
        assert b"curl/8" in seen[1]
        assert not [head for head in seen if b"python" in head.lower() or b"aiohttp" in head.lower()]
