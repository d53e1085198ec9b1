"""HTTP to the upstreams: sends one request and hands out its answer as it arrives.

Errors are distinguished by whether the upstream can have received the call. `UpstreamError` with `was_sent=False` is
provably free; every other failure may have cost something. Where a default of the HTTP library is wrong for a proxy,
it is set here with the reason.
"""

import asyncio
import io
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from yarl import URL

from proxy.errors import UpstreamError, UpstreamTimeout, UpstreamUnreadable, drop_frames
from proxy.formats.content_encoding import (
    CONTENT_ENCODINGS,
    PIECE_BYTES,
    BodyDecoder,
    NotDecodable,
    encoding_of,
)
from proxy.formats.sse import begins_with_event, is_cut_off_event
from proxy.policy.catalog import Upstream
from proxy.upstreams.spool import Spliced

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.tracing import Trace

# SDKs wait ten minutes for an answer, and a retry is billed again. Giving up earlier would only cost more.
_SILENCE_S = 600
_CONNECT_S = 5
# Scheme, host and port of an address, without a user.
_SERVER = re.compile(r"(https?://)(?:[^/?#@]{0,200}@)?([A-Za-z0-9._:\[\]-]{1,200})(?:[/?#]|$)")
# A large body may take longer to send: with 64 KiB/s, one of 512 MB has two hours and a quarter more.
_SENT_BYTES_PER_S = 64 * 1024
# The largest answer that is read as a whole. A stream may have any length.
ANSWER_BYTES_MAX = 64 * 2**20
# The largest body that is sent with one write. The HTTP library warns of larger ones.
_ONE_WRITE_BYTES_MAX = 2**20
# How much of the body of an error is read, and for how long. The status alone decides almost everything.
_ERROR_BYTES_MAX = 2**20
_ERROR_S = 5.0
# We ask for `identity`, but servers in front of a model compress without being asked. Every encoding that the proxy
# can decompress is accepted: the decoders work on pieces as they arrive, within bounds. An answer may consist of one
# member for each event, and has no limit of its length.
_MEMBERS_MAX = 2**40
# What servers write into `Content-Encoding` although it names no compression: charsets, `chunked`, and values of
# `Content-Transfer-Encoding`. Amazon S3 keeps `aws-chunked` of an upload.
_PLAIN = frozenset(
    (
        "none null off plain text utf-8 utf8 us-ascii ascii iso-8859-1 latin1 7bit 8bit binary chunked aws-chunked"
    ).split()
)
# After so many bytes of blank lines the header alone decides whether an answer is a stream.
_BEGINNING_BYTES_MAX = 2**14


class Answer:
    """An upstream's answer: the status and headers are there, the body is still arriving.

    `is_event_stream` is what its header says; `carries_events` is the truth.
    """

    def __init__(self, response: aiohttp.ClientResponse, watch: "_Watch") -> None:
        self.status = response.status
        self.headers = list(response.headers.items())
        self.retry_after = response.headers.get("retry-after")
        self.is_event_stream = response.content_type == "text/event-stream"
        encoding = _answer_encoding(response)
        self.is_readable = encoding in ("", *CONTENT_ENCODINGS)
        self._is_compressed = encoding != ""
        self._body = _body(response.content, watch)
        if self._is_compressed and self.is_readable:
            self._body = _decompressed(self._body, BodyDecoder(encoding, members_max=_MEMBERS_MAX))
        self._beginning: list[bytes] = []  # chunks that were looked at and not handed out yet
        self._error_body: bytes | None = None

    @property
    def status_reason(self) -> str:
        """The status for the log, and which server a redirect leads to: `status 302, to https://llm.example`.

        Redirects are not followed. A `base_url` with http instead of https is often answered with one. The rest of
        the address is left out, because it may repeat what the client sent.
        """
        location = next((value for name, value in self.headers if name.lower() == "location"), "")
        server = _SERVER.match(location) if self.status // 100 == 3 else None
        return f"status {self.status}" if server is None else f"status {self.status}, to {server[1]}{server[2]}"

    async def is_decodable(self) -> bool:
        """Whether the body can be decompressed, as far as its beginning shows. Raises like `chunks`.

        It waits for the first bytes of a compressed body, because another upstream can be asked only before
        anything has passed to the client.
        """
        if not self.is_readable or not self._is_compressed:
            return self.is_readable
        try:
            first = await anext(self._body, None)
        except UpstreamUnreadable:
            return False
        self._beginning = [first] if first is not None else []
        return True

    async def carries_events(self) -> bool:
        """Whether the body is a stream of events, whatever the header says. Waits for its first bytes.

        If the body has only blanks, or broke off in its first line, the header decides.

        Raises like `chunks`, which hands out the whole body after this as well.
        """
        beginning = bytearray().join(self._beginning)
        while (answer := begins_with_event(beginning)) is None and len(beginning) <= _BEGINNING_BYTES_MAX:
            chunk = await anext(self._body, None)
            if chunk is None:
                break
            self._beginning.append(chunk)
            beginning += chunk
        if answer is None:
            return self.is_event_stream and is_cut_off_event(beginning)
        return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive, decompressed.

        Raises UpstreamError if the body breaks off or can't be decompressed, UpstreamTimeout if it stalls, and
        UpstreamUnreadable if it does not begin in the encoding that its header names.
        """
        beginning, self._beginning = self._beginning, []
        for chunk in beginning:
            yield chunk
        async for chunk in self._body:
            yield chunk

    async def read(self) -> bytes:
        """The whole body. Raises like `chunks`, and UpstreamError if it has more than ANSWER_BYTES_MAX bytes."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > ANSWER_BYTES_MAX:
                raise UpstreamError(f"The upstream's answer is larger than {ANSWER_BYTES_MAX} bytes.")
        return bytes(body)

    async def error_body(self) -> bytes:
        """The body of an error, as far as it arrives within the bounds; never raises, because the status says enough.

        It is read once and kept, so it can be asked for again after the connection was closed.
        """
        if self._error_body is not None:
            return self._error_body
        body = bytearray()
        if not self.is_readable:
            self._error_body = b""
            return b""
        try:
            async with asyncio.timeout(_ERROR_S):
                async for chunk in self.chunks():
                    body += chunk
                    if len(body) > _ERROR_BYTES_MAX:
                        break
        except (UpstreamError, TimeoutError):
            pass
        self._error_body = bytes(body)
        return self._error_body


class Upstreams:
    """The connections to all upstreams, kept open and reused. Call `open()` before use and `close()` after.

    An upstream may take `silence_s` seconds for its head, and be silent for as long in the middle of its body.
    """

    def __init__(self, *, silence_s: float = _SILENCE_S) -> None:
        self._silence_s = silence_s
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Create the session. Must be called while the event loop runs."""
        self._session = aiohttp.ClientSession(
            # No total time limit, because a long answer is no failure. The library's limit of a silence does not
            # notice every one, so `send` and `_Watch` have their own. No limit on connections: quotas bound the
            # calls, and calls that queued here would show up nowhere.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=None),
            connector=_Connector(limit=0, ttl_dns_cache=60),
            # A shared cookie jar would send one user's Cloudflare cookie with the calls of another.
            cookie_jar=aiohttp.DummyCookieJar(),
            # The library would decompress as much as arrives at once, and one megabyte can become 400 MB. We ask for
            # `identity`, and `Answer` decompresses what comes nevertheless, in pieces.
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    @asynccontextmanager
    async def send(
        self,
        upstream: Upstream,
        path: str,
        body: bytes | Spliced,
        headers: Mapping[str, str],
        *,
        method: str = "POST",
    ) -> AsyncIterator[Answer]:
        """Send `body` and hand out the answer. Leaving the block closes the connection, or keeps it for another call.

        Raises UpstreamError if no answer came, UpstreamTimeout if it did not come in time, and UpstreamUnreadable for
        a successful answer in an unknown encoding, or in another one than its header names. The status of an error
        says enough without its body.
        """
        assert self._session is not None, "open() first"
        payload = _payload(body)
        request = self._session.request(
            method,
            URL(upstream.base_url + path, encoded=True),
            data=payload,
            # With a length the library does not send chunks. Some servers read no forms from chunked bodies.
            headers={**headers, "content-length": str(len(body))},
            # The library would send the `api-key` header to whatever address a redirect names.
            allow_redirects=False,
        )
        head_s = self._silence_s + len(body) / _SENT_BYTES_PER_S
        try:
            # For the whole head: an upstream may send one line of it every minute, or 103 again and again.
            async with asyncio.timeout(head_s):
                response = await request
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            drop_frames(error)  # the library's frames have the body
            raise UpstreamError(
                f'The upstream "{upstream.name}" can\'t be reached.',
                was_sent=False,
                headers={"retry-after": "2"},
                reason=why_unreachable(error),
            ) from None
        except TimeoutError as error:
            drop_frames(error)
            raise UpstreamTimeout("The upstream did not answer in time.") from None
        except (aiohttp.ClientError, OSError) as error:
            drop_frames(error)
            was_sent = not isinstance(payload, _OneWritePayload) or payload.was_written
            raise UpstreamError("The upstream closed the connection without an answer.", was_sent=was_sent) from None
        finally:
            del body, payload  # a long answer must not keep them in memory
        async with response:
            watch = _Watch(response, self._silence_s)
            try:
                answer = Answer(response, watch)
                if answer.status // 100 == 2 and not await answer.is_decodable():
                    raise UpstreamUnreadable(
                        f'The upstream "{upstream.name}" compressed its answer in a way that this proxy can\'t read, '
                        "or named a compression that it did not use. The operator of this proxy has to turn that "
                        "compression off.",
                        was_sent=False,
                    )
                yield answer
            finally:
                watch.stop()


def why_unreachable(error: aiohttp.ClientError) -> str:
    """Why no connection was made, for the log: the address, and what is wrong with it or with its certificate."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            certificate = error.certificate_error
            why = f"its certificate is not valid: {getattr(certificate, 'verify_message', None) or certificate}"
        case aiohttp.ClientConnectorSSLError():
            why = f"no TLS connection: {error.os_error.strerror or error.os_error}"
        case aiohttp.ClientConnectorDNSError():
            why = "the name of its host can't be resolved"
        case aiohttp.ClientConnectorError():
            # The library's own text does not say "refused". There is no number if several addresses were tried.
            why = os.strerror(error.os_error.errno) if error.os_error.errno else str(error.os_error)
        case _:
            return f"no connection within {_CONNECT_S} s"
    return f"{error.host}:{error.port}: {why}"


def _answer_encoding(response: aiohttp.ClientResponse) -> str:
    """The encoding in which the body arrives, in the terms of `encoding_of`.

    Compression may be named as a transfer coding too (RFC 9112 §7.2). The library undoes only `chunked`.
    """
    codings = (*response.headers.getall("content-encoding", ()), *response.headers.getall("transfer-encoding", ()))
    return ",".join(name for name in encoding_of(codings).split(",") if name not in _PLAIN)


class _Connector(aiohttp.TCPConnector):
    """Closes a kept connection on which bytes have come that no request asked for.

    The library would take them for the answer to the next request. So an upstream that answers a request twice would
    give one user's answer to another.
    """

    def _release(self, key: "ConnectionKey", protocol: ResponseHandler, *, should_close: bool = False) -> None:
        super()._release(key, protocol, should_close=should_close)
        # Without a parser the connection keeps the bytes as they are, and `should_close` says that there are some.
        protocol._parser = None

    async def _get(self, key: "ConnectionKey", traces: list["Trace"]) -> Connection | None:
        while (kept := await super()._get(key, traces)) is not None:
            if kept.protocol is None or not kept.protocol.should_close:
                break
            kept.close()
        return kept


class _Watch:
    """Ends the wait for the next bytes of a body when its connection is gone, or after a silence of `silence_s`.

    The library ends it in most cases itself. But its parser in C forgets the body when it finds an error in the
    chunks (`zz` where a length belongs), and then nothing wakes the reader: neither the closed connection nor the
    library's limit of a silence.

    There is one timer for the whole answer, not one for each of its thousands of reads. With 600 s, an answer that
    begins at 12:00 and sends its last bytes at 12:07 has its timer at 12:10. The silence is only 180 s then, so the
    timer is set for 420 s later. At 12:17 the silence is 600 s.
    """

    def __init__(self, response: aiohttp.ClientResponse, silence_s: float) -> None:
        self.waits_since: float | None = None  # by the event loop's clock; None while nobody reads
        self.is_broken = False  # the connection is gone, and the body is not complete
        self._content = response.content
        self._silence_s = silence_s
        self._timer = asyncio.get_running_loop().call_later(silence_s, self._check_silence)
        # Without a length or chunks a body ends with its connection. If that was reset, it is not complete.
        chunked = "chunked" in response.headers.get("transfer-encoding", "").lower()
        self._ends_with_connection = not chunked and "content-length" not in response.headers
        # None if the body has arrived with its head. The connection is in the pool again then.
        connection = response.connection
        self._closed = None if connection is None or connection.protocol is None else connection.protocol.closed
        if self._closed is not None:
            self._closed.add_done_callback(self._note_closed)

    def stop(self) -> None:
        """Stop to watch: the connection is closed, or it is used for another call."""
        self._timer.cancel()
        if self._closed is not None:
            self._closed.remove_done_callback(self._note_closed)
            # The future lives as long as the connection. It logs an error that nobody has asked for.
            self._closed.remove_done_callback(_forget_error)
            self._closed.add_done_callback(_forget_error)

    def _check_silence(self) -> None:
        loop = asyncio.get_running_loop()
        silent_s = 0.0 if self.waits_since is None else loop.time() - self.waits_since
        if silent_s >= self._silence_s:
            self._content.set_exception(TimeoutError())
        else:
            self._timer = loop.call_later(self._silence_s - silent_s, self._check_silence)

    def _note_closed(self, closed: asyncio.Future[None]) -> None:
        was_reset = closed.exception() is not None
        self.is_broken = not self._content.is_eof() or (was_reset and self._ends_with_connection)
        if not self._content.is_eof() and self._content.exception() is None:
            self._content.set_exception(aiohttp.ClientPayloadError("the connection is gone"))


def _forget_error(closed: asyncio.Future[None]) -> None:
    closed.exception()


# No methods of Answer, so that an answer that is given up halfway is no cycle of references.
async def _body(content: aiohttp.StreamReader, watch: _Watch) -> AsyncIterator[bytes]:
    """The bytes of a body as they arrive. Raises UpstreamError and UpstreamTimeout."""
    time = asyncio.get_running_loop().time
    try:
        while True:
            watch.waits_since = time()
            chunk = await content.readany()
            watch.waits_since = None
            if not chunk:
                break
            yield chunk
        if watch.is_broken:
            raise aiohttp.ClientPayloadError("the connection was reset")
    except TimeoutError:
        raise UpstreamTimeout("The upstream stopped sending in the middle of its answer.") from None
    # The library raises a RuntimeError for a read after its connection is gone.
    except (aiohttp.ClientError, ConnectionError, RuntimeError):
        raise UpstreamError("The upstream broke off in the middle of its answer.") from None


async def _decompressed(body: AsyncIterator[bytes], decoder: BodyDecoder) -> AsyncIterator[bytes]:
    """The bytes of a compressed body. Raises like `_body`, and UpstreamUnreadable if nothing can be decompressed."""
    has_begun = False
    try:
        async for chunk in body:
            for piece in decoder.feed(chunk):
                has_begun = True
                yield piece
                if len(piece) == PIECE_BYTES:
                    await asyncio.sleep(0)  # one packet can become hundreds of megabytes; others get their turn
        has_begun = True  # what has no end has begun
        decoder.end()
    except NotDecodable:
        if not has_begun:
            raise UpstreamUnreadable(
                "The upstream named a compression that it did not use.", was_sent=False
            ) from None
        raise UpstreamError(
            "The upstream's answer can't be decompressed: it is not in the format that its Content-Encoding names, "
            "or its end is missing."
        ) from None


class _OneWritePayload(aiohttp.BytesPayload):
    """A body that is written together with the head, in one write, and that records whether this write happened.

    An upstream may close a kept connection at the moment at which we use it again. If nothing was written, the call
    was not sent and may go elsewhere. If head and body were written separately, the upstream could have the head
    alone.
    """

    was_written = False

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        await super().write_with_length(writer, content_length)
        self.was_written = True


def _payload(body: bytes | Spliced) -> object:
    """The body in the form in which the HTTP library is to send it."""
    if isinstance(body, Spliced):
        return body.chunks()
    # The library sends a file in chunks, but bytes in one write.
    return io.BytesIO(body) if len(body) > _ONE_WRITE_BYTES_MAX else _OneWritePayload(body)
