"""HTTP to the upstreams: sends one request and hands out its answer as it arrives.

Errors are distinguished by whether the upstream can have received the call. `UpstreamError` with `was_sent=False` is
provably free; every other failure may have cost something. Redirects are not followed and cookies are not kept: the
one would send our key to whatever address a redirect names, the other one user's cookie with the calls of another.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Self

from proxy.errors import UpstreamError, UpstreamTimeout, UpstreamUnreadable
from proxy.formats.content_encoding import PIECE_BYTES, BodyDecoder, NotDecodable, encoding_of
from proxy.formats.kinds import kind_of
from proxy.formats.mask import Mask
from proxy.formats.sse import begins_with_event, is_cut_off_event
from proxy.policy.catalog import FETCHED_KEYS, Secret, Upstream
from proxy.tasks import Tasks
from proxy.upstreams.credentials import Credentials
from proxy.upstreams.failures import mask_of
from proxy.upstreams.network import tls_context
from proxy.upstreams.sending import Connector, Exchange, Route
from proxy.upstreams.spool import Spliced

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
# Requests that a server may get twice (RFC 9110 §9.2.2).
_IDEMPOTENT = ("GET", "HEAD", "DELETE")
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

    It has to be closed, by `close` or at the end of a block.
    """

    def __init__(self, exchange: Exchange, mask: Mask, fetched_key: Secret | None) -> None:
        headers = self.headers = exchange.headers
        self.mask = mask
        self.fetched_key = fetched_key
        self.status = exchange.status
        content_type, _, _ = headers.get("content-type", "").partition(";")
        self.is_event_stream = content_type.strip().lower() == "text/event-stream"
        self.must_begin_in_time = exchange.first_byte_until is not None and self.status // 100 == 2
        self._next: Callable[[], Awaitable[bytes]] = exchange.read  # the next bytes of the body; none at its end
        self.is_compressed = False
        # Compression may be named as a transfer coding too (RFC 9112 §7.2). The library undoes only `chunked`.
        if "content-encoding" in headers or "transfer-encoding" in headers:
            codings = headers.getall("content-encoding", []) + headers.getall("transfer-encoding", [])
            if encoding := ",".join(name for name in encoding_of(codings).split(",") if name not in _PLAIN):
                self.is_compressed = True
                self._next = partial(anext, _decompressed(exchange, encoding), b"")
        self._beginning: list[bytes] = []  # chunks that were looked at and not handed out yet
        self._error_body: bytes | None = None
        self._exchange = exchange

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, or keep it for another call if the whole body was read."""
        self._exchange.end()

    @property
    def retry_after(self) -> str | None:
        """The value of its `Retry-After`."""
        return self.headers.get("retry-after")

    @property
    def status_reason(self) -> str:
        """The status for the log, and which server a redirect leads to: `status 302, to https://llm.example`.

        Redirects are not followed. A `base_url` with http instead of https is often answered with one. The rest of
        the address is left out, because it may repeat what the client sent.
        """
        if self.status // 100 == 3 and (server := _SERVER.match(self.headers.get("location", ""))):
            return f"status {self.status}, to {server[1]}{server[2]}"
        return f"status {self.status}"

    async def wait_for_body(self) -> None:
        """Wait for the first bytes of the body. Raises like `chunks`, which hands them out after this as well."""
        await self._beginning_until(bool, 0)

    async def carries_events(self) -> bool:
        """Whether the body is a stream of events, whatever the header says. Waits for its first bytes.

        If the body has only blanks, or broke off in its first line, the header decides.

        Raises like `chunks`, which hands out the whole body after this as well.
        """
        begins = await self._beginning_until(lambda body: begins_with_event(body) is not None, _BEGINNING_BYTES_MAX)
        answer = begins_with_event(begins)
        return self.is_event_stream and is_cut_off_event(begins) if answer is None else answer

    async def error_in_body(self) -> bytes | None:
        """The body of a successful answer, if it may be an error instead: a short JSON object that is complete.

        It waits for the body as far as that may be so. Never raises: `chunks` hands out the whole body, and raises
        what the upstream did, after this as well.
        """
        try:
            body = await self._beginning_until(_NO_OBJECT.match, _SHORT_ERROR_BYTES_MAX)
        except UpstreamError as error:
            self._next = partial(_raise, error)
            return None
        may_be_error = len(body) <= _SHORT_ERROR_BYTES_MAX and not _NO_OBJECT.match(body) and b'"error"' in body
        return bytes(body) if may_be_error else None

    async def _beginning_until(self, is_enough: Callable[[bytearray], object], bytes_max: int) -> bytearray:
        """The beginning of the body: until it `is_enough`, has more than `bytes_max` bytes, or is all of it."""
        beginning = bytearray().join(self._beginning)
        while not is_enough(beginning) and len(beginning) <= bytes_max and (chunk := await self._next()):
            self._beginning.append(chunk)
            beginning += chunk
        return beginning

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive, decompressed.

        Raises UpstreamError if the body breaks off or can't be decompressed, UpstreamTimeout if it stalls or does not
        begin in time, and UpstreamUnreadable if it does not begin in an encoding that is known and that its header
        names.
        """
        while chunk := self._beginning.pop(0) if self._beginning else await self._next():
            yield chunk

    async def pass_on(self, take: Callable[[bytes], bool]) -> bool:
        """Call `take` with the same bytes, without waking a task for each chunk. Raises like `chunks`.

        Returns True as soon as `take` returns False: the rest can be read later. Returns False at the body's end.
        """
        while self._beginning:
            if not take(self._beginning.pop(0)):
                return True
        if not self.is_compressed:
            return await self._exchange.pass_on(take)
        while chunk := await self._next():
            if not take(chunk):
                return True
        return False

    async def read(self) -> bytes:
        """The whole body. Raises like `chunks`, and UpstreamError if it has more than ANSWER_BYTES_MAX bytes."""
        body = bytearray()
        if await self._read_into(body, ANSWER_BYTES_MAX):
            raise UpstreamError(f"The upstream's answer is larger than {ANSWER_BYTES_MAX} bytes.")
        return bytes(body)

    async def error_body(self) -> bytes:
        """The body of an error, as far as it arrives within the bounds; never raises, because the status says enough.

        It is read once and kept, so it can be asked for again after the connection was closed.
        """
        if self._error_body is None:
            body = bytearray()
            with suppress(UpstreamError, TimeoutError):
                async with asyncio.timeout(_ERROR_S):
                    await self._read_into(body, _ERROR_BYTES_MAX)
            self._error_body = bytes(body)
        return self._error_body

    async def _read_into(self, body: bytearray, bytes_max: int) -> bool:
        """Append the body. Returns whether it has more than `bytes_max` bytes, of which the rest is not read."""

        def take(chunk: bytes) -> bool:
            body.extend(chunk)
            return len(body) <= bytes_max

        return await self.pass_on(take)


class Upstreams:
    """The connections to all upstreams, kept open and reused. Call `open()` before use and `close()` after."""

    def __init__(self) -> None:
        self.credentials = Credentials(self._post_form, clock=lambda: asyncio.get_running_loop().time())
        self.uploads = Tasks()
        self.connector: Connector | None = None
        self._routes: dict[str, Route] = {}  # by the names of upstreams
        self._making_route = asyncio.Lock()

    def open(self) -> None:
        """Create the pool of connections. Must be called while the event loop runs."""
        self.connector = Connector()

    async def close(self) -> None:
        """Close all connections, and end the fetches of keys."""
        await self.credentials.close()
        await self.uploads.finish(0)
        if self.connector is not None:
            await self.connector.close()

    async def send(
        self,
        upstream: Upstream,
        path: str,
        body: bytes | Spliced,
        headers: Mapping[str, str],
        *,
        method: str = "POST",
    ) -> Answer:
        """Send `body` with our key and return the answer as soon as its head has come. The caller closes it.

        A key that has to be fetched and is not there yet is waited for. If the upstream rejects it (401), another one
        is fetched in the background.

        The upstream's own `headers` replace those of the same name.

        Raises UpstreamError if no answer came, UpstreamTimeout if it did not come in time, and UpstreamUnreadable for
        a successful answer in an unknown encoding, or in another one than its header names. The status of an error
        says enough without its body. Raises UpstreamWithoutKey if the key could not be fetched, and ValueError if a
        header has a control character.
        """
        route = await self.route_to(upstream)
        mask, fetched_key = route.mask, None
        if isinstance(upstream.api_key, FETCHED_KEYS):
            keys = await self.credentials.keys(upstream)
            mask, fetched_key = mask_of(upstream, keys.all), keys.current
            key_headers = kind_of(upstream.kind).key_headers(fetched_key, is_access_token=keys.is_access_token)
            headers = {**headers, **key_headers}
        exchange = await self._begin(route, method, route.head(method, path, headers, body_bytes=len(body)), body)
        try:
            answer = Answer(exchange, mask, fetched_key)
            if answer.status == 401 and fetched_key is not None:
                self.credentials.note_rejected(upstream, fetched_key)
            if answer.is_compressed and answer.status // 100 == 2:
                await answer.wait_for_body()  # because now another upstream can still be asked
        except BaseException:
            exchange.end()
            raise
        return answer

    async def _begin(self, route: Route, method: str, head: bytes, body: bytes | Spliced) -> Exchange:
        """Send the request, and send it again if that is harmless and a kept connection was closed meanwhile."""
        assert self.connector is not None, "open() first"
        while True:
            exchange = Exchange(route, has_body=method != "HEAD")
            try:
                await exchange.begin(self.connector, self.uploads, head, body)
                return exchange
            except UpstreamError as error:
                if method not in _IDEMPOTENT or isinstance(error, UpstreamTimeout) or not exchange.is_kept:
                    raise

    async def _post_form(self, server: Upstream, form: bytes) -> tuple[int, bytes]:
        """Send a form to a server that issues access tokens, and return the status and body of its answer."""
        async with await self.send(server, "", form, _FORM_HEADERS) as answer:
            return answer.status, await answer.error_body()  # within the bounds for errors

    async def route_to(self, upstream: Upstream) -> Route:
        """The route to an upstream, which is made anew if it is new, or if its configuration has changed."""
        route = self._routes.get(upstream.name)
        if route is not None and route.upstream is upstream:
            return route
        async with self._making_route:  # many calls may come at once, and one context for TLS is enough
            route, ca = self._routes.get(upstream.name), upstream.transport.ca
            if route is not None and route.upstream.transport.ca == ca:
                tls = route.tls
            else:
                tls = True if ca is None else await asyncio.to_thread(tls_context, ca)
            route = self._routes[upstream.name] = Route(upstream, tls)
            return route


async def _raise(error: UpstreamError) -> bytes:
    raise error


# No method of Answer, so that an answer that is given up halfway is no cycle of references.
async def _decompressed(exchange: Exchange, encoding: str) -> AsyncIterator[bytes]:
    """The bytes of a compressed body. Raises what `Exchange.read` does, and UpstreamUnreadable before the first."""
    has_begun = False
    try:
        decoder = BodyDecoder(encoding, members_max=_MEMBERS_MAX)
        while chunk := await exchange.read():
            for piece in decoder.feed(chunk):
                has_begun = True
                yield piece
                if len(piece) == PIECE_BYTES:
                    await asyncio.sleep(0)  # one packet can become hundreds of megabytes; others get their turn
        has_begun = True  # what has no end has begun
        decoder.end()
    except (KeyError, NotDecodable):  # KeyError: the encoding is not known
        if not has_begun:
            raise UpstreamUnreadable(
                f'The upstream "{exchange.route.upstream.name}" compressed its answer in a way that this proxy '
                "can't read, or named a compression that it did not use. The operator of this proxy has to turn that "
                "compression off.",
                was_sent=False,
            ) from None
        raise UpstreamError(
            "The upstream's answer can't be decompressed: it is not in the format that its Content-Encoding names, "
            "or its end is missing."
        ) from None
