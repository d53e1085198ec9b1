"""One listener's connections: how many there are, how long a head may take, and JSON for what is no HTTP.

The server library closes connections that are idle, but gives a head all the time in the world, holds as many
connections as come, and answers what it can't read in plain text that quotes it (and logs it: it may hold a key).
"""

import asyncio
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import web

from proxy.config.loader import ConnectionLimits
from proxy.errors import BadFraming, ProxyError, TooManyConnections, TooSlow
from proxy.formats.strict_json import dump
from proxy.upstreams.headers import SERVER_NAME
from proxy.web.middleware import error_response

# Bearer tokens of several kilobytes are honest (JSON web tokens); the library would take 8190 bytes.
_LINE_BYTES_MAX = 32_768
_LINES_MAX = 128
# All lines together; what came with one packet more is read before it is noticed.
_HEAD_BYTES_MAX = 131_072
_UNREADABLE = (
    f"This is no HTTP/1.1 request, or its head is too large: at most {_LINES_MAX} lines of {_LINE_BYTES_MAX} bytes, "
    f"and {_HEAD_BYTES_MAX} bytes together."
)
# How long a client that is turned away may take to read why.
_FAREWELL_S = 1.0

log = structlog.get_logger("listener")


class Listener(web.AppRunner):
    """Serves an application."""

    def __init__(self, application: web.Application, limits: ConnectionLimits) -> None:
        super().__init__(
            application,
            access_log=None,
            # A handler only waits for its call, which runs in a task of its own; so it can be cancelled the moment
            # its client hangs up, and that is how we notice, also while nothing is being written.
            handler_cancellation=True,
            keepalive_timeout=limits.idle_s,
            max_field_size=_LINE_BYTES_MAX,
            max_line_size=_LINE_BYTES_MAX,
            max_headers=_LINES_MAX,
            auto_decompress=False,  # bodies are unpacked in `bodies`, with bounds and words of ours
            shutdown_timeout=1.0,
        )
        self._limits = limits

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Connections(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            limits=self._limits,
            **made._kwargs,
        )


class _Connections(web.Server):
    """Makes a connection of ours for each that comes."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits

    @property
    def is_full(self) -> bool:
        """Whether there are as many as there may be."""
        return len(self._connections) >= self.limits.connections

    def __call__(self) -> web.RequestHandler:
        return Connection(self, self.limits, loop=self._loop, **self._kwargs)


class Connection(web.RequestHandler):
    """One connection, from its first byte on."""

    __slots__ = ("_connections", "_head_bytes", "_head_deadline", "_head_s")

    def __init__(self, connections: _Connections, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(connections, **kwargs)
        self._connections = connections
        self._head_s = limits.head_s
        self._head_bytes = 0
        self._head_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take it, or say that there are too many."""
        is_full = self._connections.is_full  # before this one counts
        super().connection_made(transport)
        if is_full:
            self._turn_away(TooManyConnections())

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is over."""
        self._head_is_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; a head that has begun has to end."""
        if self._close:  # it was turned away, or all is over: nothing more is read
            return
        requests = self._request_count
        super().data_received(data)
        is_of_body = self._messages or (self._waiter is None and self._request_count)
        if self._request_count != requests or is_of_body:
            self._head_is_over()
            return
        self._head_bytes += len(data)
        if self._head_bytes > _HEAD_BYTES_MAX:
            self._turn_away(BadFraming(_UNREADABLE))
        elif self._head_deadline is None:
            self._head_deadline = self._loop.call_later(self._head_s, self._head_is_late)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be read, or what went wrong in spite of everything; nothing of it is quoted."""
        if request.writer.output_size > 0:
            raise ConnectionError("An answer has begun, so there can't be another.")
        error: ProxyError = BadFraming(_UNREADABLE)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log.error("a request failed", exc_info=exc)
            error = ProxyError("The proxy made a mistake. It has been logged.")
        response = error_response(error, request)
        response.force_close()
        return response

    def _head_is_over(self) -> None:
        self._head_bytes = 0
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _head_is_late(self) -> None:
        self._turn_away(TooSlow(f"The request's head took longer than {self._head_s:g} seconds."))

    def _turn_away(self, error: ProxyError) -> None:
        """Answer outside of any request, read no more, and close."""
        self._head_is_over()
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        self.close()  # what still comes is not read as a request
        transport.write(_as_bytes(error))
        if transport.can_write_eof():
            transport.write_eof()
        # Closed at once, with bytes of the client unread, its kernel could throw our answer away.
        self._loop.call_later(_FAREWELL_S, transport.abort)


def _as_bytes(error: ProxyError) -> bytes:
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
