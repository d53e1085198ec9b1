"""HTTP to the upstreams: sends one request and hands out its answer as it arrives.

Errors are distinguished by whether the upstream can have received the call. `UpstreamError` with `was_sent=False` is
provably free; every other failure may have cost something. Where a default of the HTTP library is wrong for a proxy,
it is set here, or in `sending`, with the reason.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from yarl import URL

from proxy.errors import UpstreamError, UpstreamTimeout, UpstreamUnreadable
from proxy.formats.content_encoding import (
    CONTENT_ENCODINGS,
    PIECE_BYTES,
    BodyDecoder,
    NotDecodable,
    encoding_of,
)
from proxy.formats.kinds import kind_of
from proxy.formats.sse import begins_with_event, is_cut_off_event
from proxy.policy.catalog import FETCHED_KEYS, Upstream
from proxy.upstreams.credentials import Credentials, Keys
from proxy.upstreams.failures import mask_of
from proxy.upstreams.headers import SERVER_NAME
from proxy.upstreams.network import tls_context, upstream_socket
from proxy.upstreams.sending import Sending, Settings, head_of, no_first_byte, payload_of, settings_of
from proxy.upstreams.spool import Spliced

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.tracing import Trace

# Scheme, host and port of an address, without a user.
_SERVER = re.compile(r"(https?://)(?:[^/?#@]{0,200}@)?([A-Za-z0-9._:\[\]-]{1,200})(?:[/?#]|$)")
# The largest answer that is read as a whole. A stream may have any length.
ANSWER_BYTES_MAX = 64 * 2**20
# How much of the body of an error is read, and for how long. The status alone decides almost everything.
_ERROR_BYTES_MAX = 2**20
_ERROR_S = 5.0
# An error in the place of an answer is not longer. A longer body is not read before it is passed on.
_SHORT_ERROR_BYTES_MAX = 2**16
_NO_OBJECT = re.compile(rb"\s*[^\s{]")
_FORM_HEADERS = {
    "content-type": "application/x-www-form-urlencoded",
    "accept": "application/json",
    "accept-encoding": "identity",
}
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

    `is_event_stream` is what its header says; `carries_events` is the truth. `must_begin_in_time` says that
    its body has a limit for its first byte (`first_byte_timeout`). `mask` masks our key in it, and `fetched_key` is
    the key with which it was asked for, if that is not a fixed one.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        watch: "_Watch",
        upstream: Upstream,
        keys: Keys | None,
        *,
        first_byte_until: float | None = None,
    ) -> None:
        self.mask = mask_of(upstream, () if keys is None else keys.all)
        self.fetched_key = None if keys is None else keys.current
        self.status = response.status
        self.headers = list(response.headers.items())
        self.retry_after = response.headers.get("retry-after")
        self.request_id = response.headers.get("x-request-id") or response.headers.get("request-id")
        self.is_event_stream = response.content_type == "text/event-stream"
        encoding = _answer_encoding(response)
        self.is_readable = encoding in ("", *CONTENT_ENCODINGS)
        self._is_compressed = encoding != ""
        self._body = _body(response.content, watch)
        self.must_begin_in_time = first_byte_until is not None and self.status // 100 == 2
        if first_byte_until is not None:
            self._body = _begun_until(first_byte_until, self._body)
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
            await self.wait_for_body()
        except UpstreamUnreadable:
            return False
        return True

    async def wait_for_body(self) -> None:
        """Wait for the first bytes of the body. Raises like `chunks`, which hands them out after this as well."""
        if not self._beginning:
            first = await anext(self._body, None)
            self._beginning = [first] if first is not None else []

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

    async def error_in_body(self) -> bytes | None:
        """The body of a successful answer, if it may be an error instead: a short JSON object that is complete.

        It waits for the body as far as that may be so. Never raises: `chunks` hands out the whole body, and raises
        what the upstream did, after this as well.
        """
        body = bytearray().join(self._beginning)
        try:
            while len(body) <= _SHORT_ERROR_BYTES_MAX and not _NO_OBJECT.match(body):
                chunk = await anext(self._body, None)
                if chunk is None:
                    return bytes(body) if b'"error"' in body else None
                self._beginning.append(chunk)
                body += chunk
        except UpstreamError as error:
            self._body = _raising(error)
        return None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive, decompressed.

        Raises UpstreamError if the body breaks off or can't be decompressed, UpstreamTimeout if it stalls or does not
        begin in time, and UpstreamUnreadable if it does not begin in the encoding that its header names.
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
        self.credentials = Credentials(self._post_form, clock=lambda: asyncio.get_running_loop().time())
        self._session: aiohttp.ClientSession | None = None
        self._settings: dict[str, Settings] = {}  # by the names of upstreams
        self._making_settings = asyncio.Lock()

    def open(self) -> None:
        """Create the session. Must be called while the event loop runs."""
        self._session = aiohttp.ClientSession(
            # No limit on connections: quotas bound the calls, and calls that queued here would show up nowhere.
            # Connections with another proxy or other certificates are kept apart by the library.
            connector=_Connector(limit=0, ttl_dns_cache=60, socket_factory=upstream_socket),
            # A shared cookie jar would send one user's Cloudflare cookie with the calls of another.
            cookie_jar=aiohttp.DummyCookieJar(),
            # For clients without one. The library would name itself and Python, with their versions.
            headers={"user-agent": SERVER_NAME},
            # The library would decompress as much as arrives at once, and one megabyte can become 400 MB. We ask for
            # `identity`, and `Answer` decompresses what comes nevertheless, in pieces.
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close all connections, and end the fetches of keys."""
        await self.credentials.close()
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
        """Send `body` with our key and hand out the answer.

        Leaving the block closes the connection, or keeps it for another call. A key that has to be fetched and is not
        there yet is waited for. If the upstream rejects it (401), another one is fetched in the background.

        The upstream's own `headers` replace those of the same name.

        Raises UpstreamError if no answer came, UpstreamTimeout if it did not come in time, and UpstreamUnreadable for
        a successful answer in an unknown encoding, or in another one than its header names. The status of an error
        says enough without its body. Raises UpstreamWithoutKey if the key could not be fetched.
        """
        assert self._session is not None, "open() first"
        keys = await self.credentials.keys(upstream) if isinstance(upstream.api_key, FETCHED_KEYS) else None
        settings = self._settings.get(upstream.name)
        if settings is None or not settings.fit(upstream):
            settings = await self._make_settings(upstream)
        if settings.proxy_headers is not None and upstream.base_url.startswith("http:"):
            headers = {**headers, **settings.proxy_headers}  # the proxy reads the request itself
        sending = Sending(settings, body_bytes=len(body))
        request = self._session.request(
            method,
            URL(upstream.base_url + path, encoded=True),
            data=payload_of(body, sending),
            # With a length the library does not send chunks. Some servers read no forms from chunked bodies.
            headers={
                **headers,
                **_key_headers(upstream, keys),
                **settings.headers,
                "content-length": str(len(body)),
            },
            # The library would send the `api-key` header to whatever address a redirect names.
            allow_redirects=False,
            timeout=settings.timeout,
            ssl=settings.tls,
            proxy=settings.proxy,
            proxy_headers=settings.proxy_headers,
        )
        del body  # a long answer must not keep it in memory
        async with await head_of(request, upstream, settings, sending) as response:
            del request
            watch = _Watch(response, settings.idle_s)
            try:
                answer = Answer(response, watch, upstream, keys, first_byte_until=sending.first_byte_until)
                if answer.status == 401 and keys is not None:
                    self.credentials.note_rejected(upstream, keys.current)
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

    async def _post_form(self, server: Upstream, form: bytes) -> tuple[int, bytes]:
        """Send a form to a server that issues access tokens, and return the status and body of its answer."""
        async with self.send(server, "", form, _FORM_HEADERS) as answer:
            return answer.status, await answer.error_body()  # within the bounds for errors

    async def _make_settings(self, upstream: Upstream) -> Settings:
        """The settings for an upstream that is new, or whose configuration has changed."""
        async with self._making_settings:  # many calls may come at once, and one context for TLS is enough
            settings = self._settings.get(upstream.name)
            if settings is None or not settings.fit(upstream):
                ca = upstream.transport.ca
                tls = True if ca is None else await asyncio.to_thread(tls_context, ca)
                settings = self._settings[upstream.name] = settings_of(upstream.transport, tls)
            return settings


def _key_headers(upstream: Upstream, keys: Keys | None) -> dict[str, str]:
    """The header with the key of an upstream: a fixed one, or the current one of `keys`."""
    kind, fixed = kind_of(upstream.kind), upstream.api_key
    if keys is not None:
        return kind.key_headers(keys.current, is_access_token=keys.is_access_token)
    assert not isinstance(fixed, FETCHED_KEYS), "keys has it"
    return kind.key_headers(fixed)


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


async def _begun_until(time: float, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The bytes of a body. Raises like `_body`, also if none has come at this time of the event loop."""
    try:
        async with asyncio.timeout_at(time):
            first = await anext(body, None)
    except TimeoutError:
        raise no_first_byte() from None
    if first is not None:
        yield first
    async for chunk in body:
        yield chunk


async def _raising(error: UpstreamError) -> AsyncIterator[bytes]:
    """The rest of a body of which no more came."""
    raise error
    yield b""  # so that this is an iterator


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
