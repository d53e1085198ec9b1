"""One listener: the number of its connections, the time and size of a request's head, and errors outside of requests.

The server library closes idle connections, but it sets no time limit for a head or for the reading of an answer,
accepts any number of connections, and answers a head that it can't parse with plain text that quotes the head. It
also logs that text, which may contain a key. This module adds the limits and answers in JSON, without quoting
anything.

A client without a key can open connections too. So a full listener does not refuse the next connection: it closes the
one that has been idle longest. A connection is idle unless

- a request is being handled or waits to be, so its whole head has arrived; or
- the client has not read all of the last answer yet, for as long as it goes on reading.

A connection that has sent a part of a head is idle, however often it sends another byte. So is one that still sends
the body of a request that is answered already, for example with a 401. If no connection is idle, the next one gets a
503. The same rule holds for the connections of one client address, if they are limited.

It overrides private methods of aiohttp and reads private attributes, so `pyproject.toml` allows only the minor
version for which it was written. `tests/web/test_listener.py` names each of them, and what to check in a new
version.
"""

import asyncio
from http import HTTPStatus
from ipaddress import IPv6Address, IPv6Network, ip_address
from itertools import islice
from typing import Any
from weakref import WeakValueDictionary

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
# How many rejected clients may have that time at once. Beyond it their connections are aborted without an answer, so
# that a flood of them does not use up the descriptors of the process.
_REJECTED_MAX = 1000
# How many idle connections are looked at to find one that may be closed. The bound is reached only if so many clients
# are reading the end of an answer.
_LOOKED_AT_MAX = 64
# A client that has not read this much more of an answer after `unread_s` (60 s), nor all of it, has stopped reading.
_READ_BYTES_MIN = 16_384

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


class _Places:
    """The places of connections that share a limit: all of a listener, or those of one client address."""

    __slots__ = ("__weakref__", "_idle", "_limit", "_taken")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # in the order in which they became idle

    def __len__(self) -> int:
        return len(self._taken)

    def make_room(self) -> bool:
        """Whether there is a place, if need be after closing the connection that has been idle longest."""
        if len(self._taken) < self._limit:
            return True
        for connection in list(islice(self._idle, _LOOKED_AT_MAX)):
            if not connection.has_unread_answer:
                connection.evict()
                return True
            self.note_idle(connection)  # others are looked at before it the next time
        return False

    def take(self, connection: "Connection") -> None:
        """Give a place to a new connection, which is idle."""
        self._taken.add(connection)
        self._idle[connection] = None

    def leave(self, connection: "Connection") -> None:
        """Free the place of a connection that is being closed."""
        self._taken.discard(connection)
        self._idle.pop(connection, None)

    def note_idle(self, connection: "Connection") -> None:
        """The connection has become idle now."""
        self._idle.pop(connection, None)
        self._idle[connection] = None

    def note_busy(self, connection: "Connection") -> None:
        """The connection has got a request."""
        self._idle.pop(connection, None)


class _Connections(web.Server):
    """Creates a Connection for each connection that is accepted, and has their places."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self._all_places = _Places(limits.connections)
        # An address is forgotten with its last connection.
        self._places_of: WeakValueDictionary[str, _Places] = WeakValueDictionary()

    def places_for(self, transport: asyncio.BaseTransport) -> tuple[_Places, ...]:
        """The places of which a new connection needs one each: of its address, if that is limited, and of all."""
        limit = self.limits.connections_per_address
        address = None if limit is None else _address_of(transport.get_extra_info("peername"))
        if limit is None or address is None:
            return (self._all_places,)
        places = self._places_of.get(address)
        if places is None:
            places = self._places_of[address] = _Places(limit)
        return (places, self._all_places)

    @property
    def has_many_rejected(self) -> bool:
        """Whether so many connections are being closed that a further one is not answered first."""
        return len(self._connections) - len(self._all_places) > _REJECTED_MAX

    def __call__(self) -> web.RequestHandler:
        return Connection(self, self.limits, loop=self._loop, **self._kwargs)


def _address_of(peername: Any) -> str | None:
    """What counts as one client address: an IPv4 address, or an IPv6 network of 64 bits. None for a Unix socket.

    A user of IPv6 usually has a whole /64 network, and could connect from another address of it each time.
    """
    if not isinstance(peername, tuple):
        return None
    address = ip_address(peername[0].partition("%")[0])  # without the zone of a link-local address
    if isinstance(address, IPv6Address):
        # An IPv4 client of a dual-stack socket: ::ffff:192.0.2.1.
        return str(address.ipv4_mapped or IPv6Network((int(address), 64), strict=False))
    return str(address)


class Connection(web.RequestHandler):
    """One connection, which parses heads and rejects a client that exceeds a limit.

    A head has `head_s` seconds from its first byte to its last, however many packets it takes. A client that sends
    `GET / HT` at 12:00:00 and one byte every second after that is rejected at 12:00:10, with the default of 10 s.
    """

    __slots__ = (
        *("_connections", "_limits", "_places", "_transport"),
        *("_head_bytes", "_head_deadline"),
        *("_reading_deadline", "_unread_bytes"),
    )

    def __init__(self, connections: _Connections, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(connections, **kwargs)
        self._connections = connections
        self._limits = limits
        self._places: tuple[_Places, ...] = ()
        # The library forgets its `transport` when it closes the connection, also while data waits to be read.
        self._transport: asyncio.Transport | None = None
        self._head_bytes = 0
        self._head_deadline: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        self._reading_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept the connection, or reject it if there are too many and none is idle."""
        super().connection_made(transport)
        self._transport = self.transport
        places = self._connections.places_for(transport)
        if all(each.make_room() for each in places):
            self._places = places
            for each in places:
                each.take(self)
        else:
            self._reject(TooManyConnections())

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection was closed."""
        self._leave()
        self._stop_watching()
        self._transport = None
        super().connection_lost(exc)

    @property
    def has_unread_answer(self) -> bool:
        """Whether a part of an answer could not be handed to the system yet, because the client reads slowly."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def evict(self) -> None:
        """Close the connection, which is idle, because its place is needed."""
        self._leave()
        self.force_close()

    def _leave(self) -> None:
        """Free the place of this connection, which is being closed."""
        self._end_head()
        for places in self._places:
            places.leave(self)
        self._places = ()

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
        if self._request_count != requests:
            for places in self._places:
                places.note_busy(self)
        if self._request_count != requests or is_handling:
            self._end_head()
            return
        self._head_bytes += len(data)
        if self._head_bytes > _HEAD_BYTES_MAX:
            self._reject(BadFraming(_BAD_HEAD))
        elif self._head_deadline is None:
            self._head_deadline = self._loop.call_later(self._limits.head_s, self._on_head_deadline)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer, or its end. Then the connection is idle, unless the next request has arrived already."""
        finished = await super().finish_response(request, resp, start_time)
        if not self._messages:
            for places in self._places:
                places.note_idle(self)
        self._watch_reading()
        return finished

    def pause_writing(self) -> None:
        """More than 64 KiB of an answer wait for the client to read them."""
        super().pause_writing()
        self._watch_reading()

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
        self._reject(TooSlow(f"The request's head took longer than {self._limits.head_s:g} seconds."))

    def _watch_reading(self) -> None:
        """From now on, give the client `unread_s` seconds to read what waits for it, if anything does.

        A whole answer is sent by the library, which waits for the client without a limit, also when it closes the
        connection. A client that never reads would keep its place forever.
        """
        self._stop_watching()
        if self._transport is not None and (unread := self._transport.get_write_buffer_size()):
            self._unread_bytes = unread
            self._reading_deadline = self._loop.call_later(self._limits.unread_s, self._on_reading_deadline)

    def _stop_watching(self) -> None:
        if self._reading_deadline is not None:
            self._reading_deadline.cancel()
            self._reading_deadline = None

    def _on_reading_deadline(self) -> None:
        """Abort the connection, unless the client is reading or an answer is still being written."""
        assert self._transport is not None, "cancelled in connection_lost"
        unread = self._transport.get_write_buffer_size()
        is_writing = self._request_in_progress and not self.writing_paused
        if unread and not is_writing and unread > self._unread_bytes - _READ_BYTES_MIN:
            self._transport.abort()
        else:
            self._watch_reading()

    def _reject(self, error: ProxyError) -> None:
        """Answer outside of any request, parse nothing more, and close the connection.

        It is not closed at once. If data of the client is still unread when a socket is closed, the kernel sends a
        reset, on which the client's kernel may discard the answer before the client has read it. So only our
        direction is closed now, and the connection is aborted a second later.
        """
        self._leave()
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self._connections.has_many_rejected:
            transport.abort()
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
