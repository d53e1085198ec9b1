"""HTTP to the upstreams: sends one request and hands out its answer as it arrives.

Errors are distinguished by whether the upstream can have received the call. `UpstreamError` with `was_sent=False` is
provably free; every other failure may have cost something. Where a default of the HTTP library is wrong for a proxy,
it is set here with the reason.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from proxy.errors import UpstreamError, UpstreamTimeout, UpstreamUnreadable
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

# SDKs wait ten minutes for an answer, and a retry is billed again. Giving up earlier would only cost more.
_SILENCE_S = 600
_CONNECT_S = 5
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

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers = list(response.headers.items())
        self.retry_after = response.headers.get("retry-after")
        self.is_event_stream = response.content_type == "text/event-stream"
        encoding = _answer_encoding(response)
        self.is_readable = encoding in ("", *CONTENT_ENCODINGS)
        self._is_compressed = encoding != ""
        decoder = BodyDecoder(encoding, members_max=_MEMBERS_MAX) if encoding and self.is_readable else None
        self._body = _body(response.content, decoder)
        self._beginning: list[bytes] = []  # chunks that were looked at and not handed out yet
        self._error_body: bytes | None = None

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
    """The connections to all upstreams, kept open and reused. Call `open()` before use and `close()` after."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Create the session. Must be called while the event loop runs."""
        self._session = aiohttp.ClientSession(
            # No total time limit, because a long answer is no failure. No limit on connections: quotas bound the
            # calls, and calls that queued here would show up nowhere.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S),
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
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
        try:
            response = await request
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise UpstreamError(
                f'The upstream "{upstream.name}" can\'t be reached.', was_sent=False, headers={"retry-after": "2"}
            ) from None
        except TimeoutError:
            raise UpstreamTimeout("The upstream did not answer in time.") from None
        except (aiohttp.ClientError, OSError):
            was_sent = not isinstance(payload, _OneWritePayload) or payload.was_written
            raise UpstreamError("The upstream closed the connection without an answer.", was_sent=was_sent) from None
        finally:
            del body, payload  # a long answer must not keep them in memory
        async with response:
            answer = Answer(response)
            if answer.status // 100 == 2 and not await answer.is_decodable():
                raise UpstreamUnreadable(
                    f'The upstream "{upstream.name}" compressed its answer in a way that this proxy can\'t read, '
                    "or named a compression that it did not use. The operator of this proxy has to turn that "
                    "compression off.",
                    was_sent=False,
                )
            yield answer


def _answer_encoding(response: aiohttp.ClientResponse) -> str:
    """The encoding in which the body arrives, in the terms of `encoding_of`.

    Compression may be named as a transfer coding too (RFC 9112 §7.2). The library undoes only `chunked`.
    """
    codings = (*response.headers.getall("content-encoding", ()), *response.headers.getall("transfer-encoding", ()))
    return ",".join(name for name in encoding_of(codings).split(",") if name not in _PLAIN)


# No method of Answer, so that an answer that is given up halfway is no cycle of references.
async def _body(content: aiohttp.StreamReader, decoder: BodyDecoder | None) -> AsyncIterator[bytes]:
    """The bytes of a body as they arrive, decompressed. Raises UpstreamError and UpstreamTimeout.

    If nothing can be decompressed, it raises UpstreamUnreadable.
    """
    has_begun = decoder is None
    try:
        async for chunk in content.iter_any():
            if decoder is None:
                yield chunk
                continue
            for piece in decoder.feed(chunk):
                has_begun = True
                yield piece
                if len(piece) == PIECE_BYTES:
                    await asyncio.sleep(0)  # one packet can become hundreds of megabytes; others get their turn
        has_begun = True  # what has no end has begun
        if decoder is not None:
            decoder.end()
    except TimeoutError:
        raise UpstreamTimeout("The upstream stopped sending in the middle of its answer.") from None
    except NotDecodable:
        if not has_begun:
            raise UpstreamUnreadable(
                "The upstream named a compression that it did not use.", was_sent=False
            ) from None
        raise UpstreamError(
            "The upstream's answer can't be decompressed: it is not in the format that its Content-Encoding names, "
            "or its end is missing."
        ) from None
    except (aiohttp.ClientError, ConnectionError):
        raise UpstreamError("The upstream broke off in the middle of its answer.") from None


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
