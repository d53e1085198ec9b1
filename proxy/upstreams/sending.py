"""One request to an upstream on its way, and the bytes of its answer as they arrive.

Errors are distinguished by whether the upstream can have received the call. A request that got no connection, also
because a proxy refused one, is provably free. Head and body are one write unless the body is large, so a request is
either sent or not. The times of connecting, of waiting for the head and of a silence in the body are limited one
after another, each from its own beginning.

Only the lower half of the HTTP library is used: its connector (pool, names, proxies, TLS) and its protocol of a
connection (parser, back pressure). These have no documented contract: `tests/upstreams/test_library.py` lists what is
relied on.
"""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from math import inf

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.tracing import Trace
from yarl import URL

from proxy.errors import UpstreamError, UpstreamTimeout, drop_frames
from proxy.formats.kinds import kind_of
from proxy.policy.catalog import FETCHED_KEYS, Upstream
from proxy.tasks import Tasks
from proxy.upstreams.failures import mask_of
from proxy.upstreams.headers import CONTROL, SERVER_NAME, header_lines
from proxy.upstreams.network import proxy_authorization, upstream_socket
from proxy.upstreams.spool import Spliced

# A large body may take longer to send: with 64 KiB/s, one of 512 MB has two hours and a quarter more.
_SENT_BYTES_PER_S = 64 * 1024
# The largest body that is sent with one write. A larger one is sent in pieces, as the upstream takes them.
_ONE_WRITE_BYTES_MAX = 2**20
_PIECE_BYTES = 2**18
_BROKE_OFF = "The upstream broke off in the middle of its answer."
# Sent with a call that has no such header. A client's own name passes; the library would name itself and Python.
_DEFAULT_HEADERS = {"accept": "*/*", "user-agent": SERVER_NAME}


class Route:
    """How requests get to an upstream, and the part of their heads that is always the same.

    `destination` tells the connector where to connect to, and is never sent; `key` is that of its kept connections.
    `proxy` is host and port of the proxy; its password is in the headers that the library sends with CONNECT alone,
    and in the fixed part of a head that the proxy reads itself. `mask` masks the key, if it is a fixed one, and the
    other secrets. `tls` is True if only the system's certificates are trusted.
    """

    def __init__(self, upstream: Upstream, tls: ssl.SSLContext | bool) -> None:
        transport = upstream.transport
        base = URL(upstream.base_url, encoded=True)
        host = base.host_port_subcomponent or ""
        proxy = "" if transport.proxy is None else transport.proxy.reveal()
        proxy_url = URL(proxy).origin() if proxy else None
        credentials = {"proxy-authorization": found} if (found := proxy_authorization(proxy)) else {}
        self.upstream = upstream
        self.tls = tls
        self.destination = aiohttp.ClientRequest(
            "GET",
            base,
            ssl=tls,
            proxy=proxy_url,
            # With the host, because the library adds it: these headers are a part of the key of kept connections.
            proxy_headers={**credentials, "Host": host} if credentials else None,
        )
        self.key = self.destination.connection_key
        self.proxy = None if proxy_url is None else proxy_url.authority
        connect_s, self.idle_s = transport.connect_timeout_ms / 1000, transport.idle_timeout_ms / 1000
        self.timeout = aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s)
        first_byte_s = (transport.first_byte_timeout_ms or inf) / 1000
        # Only one that is shorter than the other limit has an effect.
        self.first_byte_s = first_byte_s if first_byte_s < self.idle_s else None
        # A proxy reads requests to http:// itself. With https it only passes bytes on.
        self.is_read_by_proxy = self.proxy is not None and base.scheme == "http"
        own_key = None if isinstance(upstream.api_key, FETCHED_KEYS) else upstream.api_key
        fixed = {
            "host": host,
            **(credentials if self.is_read_by_proxy else {}),
            **kind_of(upstream.kind).key_headers(own_key),
            **{name: value.reveal() for name, value in transport.headers},
        }
        self._fixed = fixed.keys()
        self._fixed_lines = header_lines(fixed)
        self.mask = mask_of(upstream)
        self._origin = f"http://{host}" if self.is_read_by_proxy else ""
        self._base_path = base.raw_path_qs if base.raw_path_qs != "/" else ""

    def head(self, method: str, path: str, headers: Mapping[str, str], *, body_bytes: int) -> bytes:
        """The head of a request with these headers, unless the upstream has its own of the same name.

        Raises ValueError if one of them, or the path, has a control character.
        """
        target = self._origin + (self._base_path + path or "/")
        if CONTROL.search(target):
            raise ValueError("the address has a control character")
        own = {**_DEFAULT_HEADERS, **headers}
        for name in self._fixed & own.keys():
            del own[name]
        # With a length, because some servers read no forms from chunked bodies.
        length = b"Content-Length: %d\r\n\r\n" % body_bytes
        return b"".join((f"{method} {target} HTTP/1.1\r\n".encode(), self._fixed_lines, header_lines(own), length))

    def unreachable(self, reason: str) -> UpstreamError:
        """The error for a call that got no connection."""
        text = f'The upstream "{self.upstream.name}" can\'t be reached.'
        return UpstreamError(text, was_sent=False, headers={"retry-after": "2"}, reason=reason)


class Connector(aiohttp.TCPConnector):
    """Makes connections and keeps them, apart for each upstream with another proxy or other certificates.

    It closes a kept connection on which bytes have come that no request asked for. The library would take them for
    the answer to the next request. So an upstream that answers twice would give one user's answer to another.
    """

    def __init__(self) -> None:
        # No limit on connections: quotas bound the calls, and calls that queued here would show up nowhere.
        super().__init__(limit=0, ttl_dns_cache=60, socket_factory=upstream_socket)
        self._factory = partial(_Protocol, loop=self._loop)  # type: ignore[assignment]

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        # Without a parser the connection keeps the bytes as they are, and `should_close` says that there are some.
        parser, protocol._parser = protocol._parser, None
        if parser is not None and not (should_close or protocol.should_close):
            try:
                should_close = parser.feed_eof() is not None  # a further answer has begun
            except HttpProcessingError:
                should_close = True
        super()._release(key, protocol, should_close=should_close)

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        while (kept := await super()._get(key, traces)) is not None:
            if kept.protocol is not None and not kept.protocol.should_close:
                break
            kept.close()
        return kept


class _Protocol(ResponseHandler):
    """A connection that tells whoever reads the body of an answer that it has changed."""

    on_change: Callable[[], None] | None = None  # called after the body has got bytes, its end, or a failure

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if data and self.on_change is not None:  # without data it is called while the body is being read
            self.on_change()

    def resume_reading(self, resume_parser: bool = True) -> None:
        # The library resumes after each read, also what was not paused, and runs its parser for that.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        super().set_exception(exc, *cause)
        if self.on_change is not None:
            self._loop.call_soon(self.on_change)  # not at once: a read of the body may have led to it


class Exchange:
    """One request and the bytes of its answer, on one connection.

    There is one timer for the whole exchange, not one for each of its thousands of reads. With an idle timeout of
    600 s, an answer that begins at 12:00 and sends its last bytes at 12:07 has its timer at 12:10. The silence is
    only 180 s then, so the timer is set again for 12:17, when the silence is 600 s.
    """

    def __init__(self, route: Route, *, has_body: bool) -> None:
        self.is_kept = False  # the connection was used before
        self.was_sent = False  # the upstream may have received the call
        self._has_body = has_body  # whether the answer to this method has one
        self._is_complete = False  # the whole body was read
        self.route = route
        self._connection: Connection | None = None  # None before and after
        self._content: aiohttp.StreamReader | None = None  # None until the head has come
        self._upload: asyncio.Task[None] | None = None  # writes a body that is sent in pieces
        self._timer: asyncio.TimerHandle
        self._loop = asyncio.get_running_loop()
        self._until = inf  # when the wait for the next bytes ends; `inf` while nobody waits
        self.first_byte_until: float | None = None

    async def begin(self, connector: Connector, uploads: Tasks, head: bytes, body: bytes | Spliced) -> None:
        """Send a request and wait for the head of its answer.

        `uploads` has the tasks that write large bodies. Raises UpstreamError and UpstreamTimeout.
        """
        try:
            protocol = await self._connect(connector)
            self._send(protocol, uploads, head, body)
            del body  # a long answer must not keep it in memory
            message, content = await protocol.read()
            while 100 <= message.code < 200 and message.code != 101:
                message, content = await protocol.read()
            if message.code == 407 and self.route.is_read_by_proxy:
                raise self.route.unreachable(_refused_by_proxy(self.route, 407))
            self._content = content
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            drop_frames(error)  # the library's frames have the body
            raise self._failure(error) from None
        finally:
            if self._content is None:
                self.end()
        self.status, self.headers = message.code, message.headers
        self._is_until_closed = not message.chunked and "content-length" not in message.headers
        self._until = inf

    async def read(self) -> bytes:
        """The next bytes of the body; none at its end. Raises UpstreamError and UpstreamTimeout."""
        chunks: list[bytes] = []

        def take(chunk: bytes) -> bool:
            chunks.append(chunk)
            return False

        await self.pass_on(take)
        return b"".join(chunks)

    async def pass_on(self, take: Callable[[bytes], bool]) -> bool:
        """Call `take` with the bytes of the body as they arrive, without waking a task for each of them.

        Returns True as soon as `take` returns False: the rest can be read later. Returns False at the body's end.
        Raises UpstreamError and UpstreamTimeout, and what `take` raises.
        """
        if self._connection is None:
            if self._is_complete:
                return False
            raise UpstreamError(_BROKE_OFF)
        is_stopped = self._take(take)
        if is_stopped is not None:
            return is_stopped
        changed: asyncio.Future[bool] = self._loop.create_future()

        def on_change() -> None:
            if changed.done():  # the task that waits has not gone on yet
                return
            try:
                is_stopped = self._take(take)
                self._until = self.first_byte_until or self._loop.time() + self.route.idle_s
                if is_stopped is not None and not changed.done():  # `take` may have led to its cancellation
                    changed.set_result(is_stopped)
            except Exception as error:  # noqa: BLE001 - whatever `take` raises is raised to whoever waits
                if not changed.done():
                    changed.set_exception(error)

        self._until = self.first_byte_until or self._loop.time() + self.route.idle_s
        self._protocol.on_change = on_change
        try:
            return await changed
        finally:
            self._until = inf

    def _take(self, take: Callable[[bytes], bool]) -> bool | None:
        """Call `take` with what has arrived. Returns and raises what `pass_on` does; None if more may come."""
        content, is_stopped = self._content, False
        assert content is not None, "begin() first"
        while not is_stopped and content.exception() is None and (chunk := content.read_nowait()):
            self.first_byte_until = None
            is_stopped = not take(chunk)
        # The library's parser forgets the body when it finds an error in the chunks (`zz` where a length belongs),
        # and so does a connector that is closed.
        failure = content.exception() or self._protocol.exception()
        # A body without a length or chunks ends with its connection, but not if that was reset.
        is_end = not self._is_until_closed or isinstance(failure, aiohttp.ServerDisconnectedError | None)
        if is_end and content.at_eof() and content.exception() is None:
            self._is_complete = True
            self.end()
        elif not is_stopped:
            if isinstance(failure, TimeoutError):
                raise self._late("The upstream stopped sending in the middle of its answer.")
            if failure is not None:
                raise UpstreamError(_BROKE_OFF)
            return None
        return is_stopped

    def end(self) -> None:
        """Give the connection back for other calls, or close it, if it is in the middle of a request or an answer."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._timer.cancel()
        self._protocol.on_change = None
        is_written = self._upload is None or self._upload.done()
        if is_written and self._content is not None and not self._protocol.should_close:
            connection.release()
            return
        if self._upload is not None:
            self._upload.cancel()
        self._protocol.abort()  # what is not written yet is not sent any more
        connection.close()

    async def _connect(self, connector: Connector) -> _Protocol:
        route = self.route
        self._connection = await connector._get(route.key, [])
        self.is_kept = self._connection is not None
        if self._connection is None:
            self._connection = await connector.connect(route.destination, [], route.timeout)
        protocol = self._connection.protocol
        assert isinstance(protocol, _Protocol), "the connector makes no others"
        protocol.set_response_params(skip_payload=not self._has_body, read_until_eof=True, auto_decompress=False)
        self._protocol = protocol
        return protocol

    def _send(self, protocol: _Protocol, uploads: Tasks, head: bytes, body: bytes | Spliced) -> None:
        # For body and head together: an upstream may send one line of it every minute, or 103 again and again.
        self._until = self._loop.time() + self.route.idle_s + len(body) / _SENT_BYTES_PER_S
        self._check_time()
        transport = protocol.transport
        if transport is None or transport.is_closing():
            raise aiohttp.ClientConnectionError("the connection is gone")
        self.was_sent = True
        if isinstance(body, bytes) and len(body) <= _ONE_WRITE_BYTES_MAX:
            transport.write(head + body)
            self._note_written()
        else:
            transport.write(head)
            pieces = _pieces(body) if isinstance(body, bytes) else body.chunks()
            self._upload = uploads.start("send body", self._write(transport, pieces))

    async def _write(self, transport: asyncio.Transport, pieces: AsyncIterator[bytes]) -> None:
        """Write a body in pieces, each when the upstream has taken the one before. A failure ends the exchange."""
        try:
            async for piece in pieces:
                if transport.is_closing():
                    raise aiohttp.ClientConnectionError("the connection is gone")
                transport.write(piece)
                await self._protocol._drain_helper()
        except (aiohttp.ClientError, OSError, ValueError):  # ValueError: the file on the disk was closed
            self._protocol.set_exception(aiohttp.ClientConnectionError("the body was not sent"))
        else:
            self._note_written()

    def _note_written(self) -> None:
        """The whole body is written, so the time until the first byte of the answer begins."""
        if self.route.first_byte_s is not None and self._content is None:
            self._until = self.first_byte_until = self._loop.time() + self.route.first_byte_s
            self._timer.cancel()
            self._check_time()

    def _check_time(self) -> None:
        """End the wait for the next bytes if its time is over. Otherwise check again before any other can be over."""
        now = self._loop.time()
        if now >= self._until:
            self._protocol.set_exception(TimeoutError())
        else:
            next_check = min(self._until, now + self.route.idle_s)
            self._timer = self._loop.call_at(next_check, self._check_time)

    def _failure(self, error: Exception) -> UpstreamError:
        """What is raised for a request without an answer."""
        if self._connection is None:
            return self.route.unreachable(why_unreachable(error, self.route))
        if not isinstance(error, TimeoutError):
            return UpstreamError("The upstream closed the connection without an answer.", was_sent=self.was_sent)
        return self._late("The upstream did not answer in time.")

    def _late(self, text: str) -> UpstreamTimeout:
        """The error for an answer that did not come in time. Until its first byte the call may be moved."""
        may_be_moved = self.first_byte_until is not None
        error = UpstreamTimeout("The upstream did not begin its answer in time." if may_be_moved else text)
        error.may_be_moved = may_be_moved
        return error


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _PIECE_BYTES):
        yield body[start : start + _PIECE_BYTES]


def why_unreachable(error: BaseException, route: Route) -> str:
    """Why no connection was made, for the log: the address, and what is wrong with it or with its certificate.

    If connections are made through a proxy, it is named, and whether it is the proxy that failed.
    """
    proxy = route.destination.proxy
    through = "" if proxy is None else f" (through the proxy {route.proxy})"
    match error:
        case aiohttp.ClientHttpProxyError():
            return _refused_by_proxy(route, error.status)
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
        case TimeoutError():
            return f"no connection within {route.timeout.connect:g} s{through}"
        case _:
            return str(error) if proxy is None else f"the proxy {route.proxy}: it closed the connection"
    if proxy is not None and (error.host, error.port) == (proxy.raw_host, proxy.port):
        return f"the proxy {route.proxy}: {why}"
    host = f"[{error.host}]" if ":" in error.host else error.host
    return f"{host}:{error.port}: {why}{through}"


def _refused_by_proxy(route: Route, status: int) -> str:
    what = "it does not take our user and password" if status == 407 else "it makes no connection"
    return f"the proxy {route.proxy}: {what} (status {status})"
