"""One listener: the number of its connections, the time and size of a request's head, and errors outside of requests.

The server library closes idle connections, but it sets no time limit for a head, accepts any number of connections,
and answers a head that it can't parse with plain text that quotes the head. It also logs that text, which may contain
a key. This module adds the limits and answers in JSON, without quoting anything.

It overrides private methods of aiohttp and reads private attributes, so `pyproject.toml` allows only the minor
version for which it was written. `tests/web/test_listener.py` names each of them, and what to check in a new
version.
"""

import asyncio
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import web

from proxy.config.loader import ConnectionLimits
from proxy.errors import BadFraming, InternalError, ProxyError, TooManyConnections, TooSlow
from proxy.formats.strict_json import dump
from proxy.upstreams.headers import SERVER_NAME
from proxy.web.middleware import error_response

# JSON web tokens of several kilobytes are used as keys. The library's default is 8190 bytes.
_LINE_BYTES_MAX = 32_768
_LINES_MAX = 128
# For all lines of a head together; the library has no such limit, and 128 lines of 32 KiB are 4 MiB. It is checked
# after each packet, so a head may exceed it by one packet.
_HEAD_BYTES_MAX = 131_072
_BAD_HEAD = (
    f"This is no HTTP/1.1 request, or its head is too large: at most {_LINES_MAX} lines of {_LINE_BYTES_MAX} bytes, "
    f"and {_HEAD_BYTES_MAX} bytes together."
)
# How long a rejected client has to read the answer before its connection is aborted.
_REJECTED_S = 1.0

log = structlog.get_logger("listener")


class Listener(web.AppRunner):
    """Serves an application with the limits of its connections."""

    def __init__(self, application: web.Application, limits: ConnectionLimits) -> None:
        super().__init__(
            application,
            access_log=None,
            # Cancels the handler as soon as its client disconnects, also while nothing is being written. A handler
            # only waits for its call, which runs in a task of its own and is not cancelled.
            handler_cancellation=True,
            keepalive_timeout=limits.idle_s,
            max_field_size=_LINE_BYTES_MAX,
            max_line_size=_LINE_BYTES_MAX,
            max_headers=_LINES_MAX,
            auto_decompress=False,  # body.py decompresses, with limits
            shutdown_timeout=1.0,
        )
        self._limits = limits

    async def _make_server(self) -> web.Server:
        """Replace the library's server, which creates a RequestHandler for each connection, by ours."""
        made = await super()._make_server()
        return _Connections(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            limits=self._limits,
            **made._kwargs,
        )


class _Connections(web.Server):
    """Creates a Connection for each connection that is accepted."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits

    @property
    def is_full(self) -> bool:
        """Whether the number of open connections has reached the limit."""
        return len(self._connections) >= self.limits.connections

    def __call__(self) -> web.RequestHandler:
        return Connection(self, self.limits, loop=self._loop, **self._kwargs)


class Connection(web.RequestHandler):
    """One connection, which parses heads and rejects a client that exceeds a limit.

    A head has `head_s` seconds from its first byte to its last, however many packets it takes. A client that sends
    `GET / HT` at 12:00:00 and one byte every second after that is rejected at 12:00:10, with the default of 10 s.
    """

    __slots__ = ("_connections", "_head_bytes", "_head_deadline", "_head_s")

    def __init__(self, connections: _Connections, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(connections, **kwargs)
        self._connections = connections
        self._head_s = limits.head_s
        self._head_bytes = 0
        self._head_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept the connection, or reject it if there are too many."""
        is_full = self._connections.is_full  # read before the next line, which adds this connection
        super().connection_made(transport)
        if is_full:
            self._reject(TooManyConnections())

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection was closed."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse a packet, and start or stop the time of a head.

        The library's parser does not say whether a head is incomplete. That follows from what the packet did:

        - The number of requests grew: a head was complete in this packet.
        - Requests are queued, or one is being handled: the packet belongs to a body, or to a head that will be
          parsed later. `_waiter` is set while the library waits for the next request, and also None before its loop
          has started, when no request was read yet.
        - Otherwise the packet is a part of a head.
        """
        if self._close:  # the client was rejected, or the server is stopping: nothing more is parsed
            return
        requests = self._request_count
        super().data_received(data)
        is_handling = self._messages or (self._waiter is None and self._request_count)
        if self._request_count != requests or is_handling:
            self._end_head()
            return
        self._head_bytes += len(data)
        if self._head_bytes > _HEAD_BYTES_MAX:
            self._reject(BadFraming(_BAD_HEAD))
        elif self._head_deadline is None:
            self._head_deadline = self._loop.call_later(self._head_s, self._on_head_deadline)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a head that could not be parsed (400), or an exception that the middlewares did not catch (500).

        `exc` and `message` may quote the head: the client gets neither, and only the exception of a 500 is logged.
        """
        if request.writer.output_size > 0:
            # A second head would be taken for a part of the first answer's body. The library closes the connection
            # on this error.
            raise ConnectionError("An answer has begun, so there can't be another.")
        error: ProxyError = BadFraming(_BAD_HEAD)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log.error("a request failed", exc_info=exc)
            error = InternalError()
        response = error_response(error, request)
        response.force_close()
        return response

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _on_head_deadline(self) -> None:
        self._reject(TooSlow(f"The request's head took longer than {self._head_s:g} seconds."))

    def _reject(self, error: ProxyError) -> None:
        """Answer outside of any request, parse nothing more, and close the connection.

        It is not closed at once. If data of the client is still unread when a socket is closed, the kernel sends a
        reset, on which the client's kernel may discard the answer before the client has read it. So only our
        direction is closed now, and the connection is aborted a second later.
        """
        self._end_head()
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        self.close()  # `data_received` ignores everything from now on
        transport.write(_as_bytes(error))
        if transport.can_write_eof():
            transport.write_eof()
        self._loop.call_later(_REJECTED_S, transport.abort)


def _as_bytes(error: ProxyError) -> bytes:
    """The whole HTTP response for an error, for a connection without a request."""
    body = dump(error.body())
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        "connection": "close",
        "server": SERVER_NAME,
        **error.headers,
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
