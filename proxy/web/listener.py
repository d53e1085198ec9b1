"""One listener: the number of its connections, the time and size of a request's head, and errors outside of requests.

The server library closes idle connections, but it sets no time limit for a head or for the reading of an answer,
accepts any number of connections, and answers a head that it can't parse with plain text that quotes the head. It
also logs that text, which may contain a key. This module adds the limits and answers in JSON, without quoting
anything.

A client without a key can open connections too, and must not shut out those with one. So a full listener does not
refuse the next connection at once. It closes another one, the first that there is of:

1. The one that has been idle longest, for a second or more. A connection is idle if no request is being handled or
   waits to be, and the client has read the last answer. One that has sent a part of a head is idle, however often it
   sends another byte. So is one that still sends the body of a request that is answered already, for example with a
   401.
2. One that has shown no valid key and keeps its place all the same, the longest first: its client has not read an
   answer yet, has sent the next request before that, or sends one request after another.
3. The one that has been idle longest. A new connection is idle until its first head is complete, so the first two
   kinds are closed before it.

A connection has a valid key from the request that shows one until a later request without one is answered and all
answers are read. Such a connection is closed only while it is idle. The first request of a connection has the time
that its handler takes to look at the key. If no connection may be closed, the next one gets a 503. The same rule
holds for the connections of one client address, if they are limited.

What the listener refuses by itself has an id and a line in the log, like every other refusal without a key.

It overrides private methods of aiohttp and reads private attributes, so `pyproject.toml` allows only the minor
version for which it was written. `tests/web/test_listener.py` names each of them, and what to check in a new
version.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from itertools import islice
from typing import Any
from weakref import WeakValueDictionary

import structlog
from aiohttp import web

from proxy.calls.log_line import LogLine
from proxy.config.loader import ConnectionLimits
from proxy.errors import BadFraming, ClientLeft, InternalError, ProxyError, TooManyConnections, TooSlow
from proxy.formats.strict_json import dump
from proxy.identity.client_address import shared_address
from proxy.upstreams.headers import JSON_HEADERS, SERVER_NAME, header_lines
from proxy.upstreams.network import keep_alive
from proxy.web.middleware import IS_OUTSIDE_PREFIX, LOG_LINE, PREFIX, Handler, error_response
from proxy.web.request_log import RequestLog

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
# How many idle connections, and how many without a key, are looked at to find one that may be closed. The bound is
# reached only if so many clients are reading the end of an answer, or have just sent their first request.
_LOOKED_AT_MAX = 64
# A connection that is idle for less than this may be a new one whose first head is on its way, in seconds.
_IDLE_S_MIN = 1.0
# What the log shows instead of an endpoint if there was no request whose head could be read.
_NO_ENDPOINT = "connection"
# A client that has not read this much more of an answer after `unread_s` (60 s), nor all of it, has stopped reading.
_READ_BYTES_MIN = 16_384

log = structlog.get_logger("listener")


class Listener(web.AppRunner):
    """Serves an application with the limits of its connections. What it refuses by itself is in `request_log`.

    Paths are given without `prefix`, and those that do not begin with it marked `IS_OUTSIDE_PREFIX`. `serve` answers
    each request and may call the application, which it gets as its first argument; None: the application answers.
    """

    def __init__(
        self,
        application: web.Application,
        limits: ConnectionLimits,
        *,
        request_log: RequestLog,
        prefix: str = "",
        serve: Callable[[Handler, web.Request], Awaitable[web.StreamResponse]] | None = None,
    ) -> None:
        super().__init__(
            application,
            access_log=None,
            handler_cancellation=False,  # `Connection` cancels handlers, but not those that want to be told
            keepalive_timeout=limits.idle_s,
            max_field_size=_LINE_BYTES_MAX,
            max_line_size=_LINE_BYTES_MAX,
            max_headers=_LINES_MAX,
            auto_decompress=False,  # body.py decompresses, with limits
            shutdown_timeout=1.0,
        )
        self._limits = limits
        self._request_log = request_log
        self._prefix = prefix
        self._serve = serve

    async def stop_accepting(self) -> None:
        """Accept no more connections. Those that are open stay."""
        for site in list(self.sites):
            await site.stop()
        await asyncio.sleep(0)  # connections that were accepted before begin to be served

    async def all_answered(self) -> None:
        """Close idle connections, and the others when their clients have the answer. Ends when all are closed.

        Not by the library's `shutdown`: from its beginning it ignores the rest of a body that is still arriving.
        """
        assert isinstance(self.server, _Connections), "called between setup() and cleanup()"
        await self.server.all_answered()

    async def _make_server(self) -> web.Server:
        """Replace the library's server, which creates a RequestHandler for each connection, by ours."""
        made = await super()._make_server()
        factory = made.request_factory
        return _Connections(
            made.request_handler if self._serve is None else partial(self._serve, made.request_handler),
            request_factory=partial(_request_below, self._prefix, factory) if self._prefix else factory,
            handler_cancellation=made.handler_cancellation,
            limits=self._limits,
            request_log=self._request_log,
            **made._kwargs,
        )


def _request_below(prefix: str, factory: Callable[..., web.BaseRequest], *parts: Any) -> web.BaseRequest:
    """The request for this head, with its path as it is below the prefix: `/v1/models` for `/llm/v1/models`.

    So nothing else knows of the prefix but the texts of errors: neither the routes nor what is shown in the log.
    """
    request = factory(*parts)
    rest = request.raw_path.removeprefix(prefix)
    if rest == request.raw_path or rest[:1] not in ("", "/", "?", "#"):
        request[IS_OUTSIDE_PREFIX] = True
        return request
    url = request.rel_url
    path = url.raw_path.removeprefix(prefix) or "/"
    below = url.build(path=path, query_string=url.raw_query_string, fragment=url.raw_fragment, encoded=True)
    request = request.clone(rel_url=below)
    request[PREFIX] = prefix
    return request


class _Places:
    """The places of connections that share a limit: all of a listener, or those of one client address."""

    __slots__ = ("__weakref__", "_idle", "_limit", "_taken", "_without_key")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: set[Connection] = set()
        # In the order in which they became idle, and since when that is, by the event loop's clock.
        self._idle: dict[Connection, float] = {}
        # Those with a request and without a valid key, in the order in which they became so.
        self._without_key: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def make_room(self) -> bool:
        """Whether there is a place, if need be after closing a connection, by the rule of the module's docstring."""
        if len(self._taken) < self._limit:
            return True
        looked_at = list(islice(self._idle, _LOOKED_AT_MAX))
        idle = [connection for connection in looked_at if not connection.has_unread_answer]
        idle_until = asyncio.get_running_loop().time() - _IDLE_S_MIN
        without_key = (*islice(self._without_key, _LOOKED_AT_MAX), *looked_at)
        found = next((each for each in idle if self._idle[each] <= idle_until), None)
        found = found or next((each for each in without_key if each.keeps_its_place and not each.has_key), None)
        found = found or next(iter(idle), None)
        for connection in looked_at:
            if connection.has_unread_answer:  # others are looked at before it the next time
                self._idle[connection] = self._idle.pop(connection)
        if found is None:
            return False
        found.evict()
        return True

    def take(self, connection: "Connection") -> None:
        """Give a place to a new connection, which is idle."""
        self._taken.add(connection)
        self.note_idle(connection)

    def leave(self, connection: "Connection") -> None:
        """Free the place of a connection that is being closed."""
        self._taken.discard(connection)
        self.note_with_key(connection)

    def note_idle(self, connection: "Connection") -> None:
        """The connection has become idle now."""
        self._without_key.pop(connection, None)
        self._idle.pop(connection, None)  # it becomes the last one
        self._idle[connection] = asyncio.get_running_loop().time()

    def note_without_key(self, connection: "Connection") -> None:
        """The connection has a request, and no valid key is known. It keeps its turn if that was so before."""
        self._idle.pop(connection, None)
        self._without_key.setdefault(connection)

    def note_with_key(self, connection: "Connection") -> None:
        """The connection has a request with a valid key, so it is not closed."""
        self._idle.pop(connection, None)
        self._without_key.pop(connection, None)


class _Connections(web.Server):
    """Creates a Connection for each connection that is accepted, and has their places."""

    def __init__(self, *args: Any, limits: ConnectionLimits, request_log: RequestLog, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.request_log = request_log
        self._all_places = _Places(limits.connections)
        # An address is forgotten with its last connection.
        self._places_of: WeakValueDictionary[str, _Places] = WeakValueDictionary()
        self._all_closed = asyncio.Event()
        self.is_closing = False

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """The connection is closed, and its client has got what was written."""
        super().connection_lost(handler, exc)
        if not self._connections:
            self._all_closed.set()

    async def all_answered(self) -> None:
        """Close idle connections now, and the others after their answers. Ends when all are closed."""
        self.is_closing = True
        self._all_closed.clear()
        for connection in self.connections:
            assert isinstance(connection, Connection), "made by __call__"
            connection.close_if_idle()
        if self._connections:
            await self._all_closed.wait()

    def places_for(self, transport: asyncio.BaseTransport) -> tuple[_Places, ...]:
        """The places of which a new connection needs one each: of its address, if that is limited, and of all."""
        limit = self.limits.connections_per_address
        address = None if limit is None else _address_of(transport.get_extra_info("peername"))
        if limit is None or address is None:
            return (self._all_places,)
        return (self._places_of.setdefault(address, _Places(limit)), self._all_places)

    @property
    def has_many_rejected(self) -> bool:
        """Whether so many connections are being closed that a further one is not answered first."""
        return len(self._connections) - len(self._all_places) > _REJECTED_MAX

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)


def _address_of(peername: Any) -> str | None:
    """What counts as one client address; None for a Unix socket."""
    return shared_address(peername[0]) if isinstance(peername, tuple) else None


class Connection(web.RequestHandler):
    """One connection, which parses heads and rejects a client that exceeds a limit.

    `has_key` says that a valid key is known, as the module's docstring defines it. `on_lost` is called when the
    connection is lost; while it is None, the handler is cancelled.

    A head has `head_s` seconds from its first byte to its last, however many packets it takes. A client that sends
    `GET / HT` at 12:00:00 and one byte every second after that is rejected at 12:00:10, with the default of 10 s.
    """

    __slots__ = (
        *("_connections", "_places", "_transport"),
        *("_answers", "has_key", "on_lost"),
        *("_head_bytes", "_head_deadline"),
        *("_reading_deadline", "_unread_bytes"),
    )

    def __init__(self, connections: _Connections, **kwargs: Any) -> None:
        super().__init__(connections, **kwargs)
        self._connections = connections
        self._places: tuple[_Places, ...] = ()
        # The library forgets its `transport` when it closes the connection, also while data waits to be read.
        self._transport: asyncio.Transport | None = None
        self.has_key = False
        self.on_lost: Callable[[], object] | None = None
        self._answers = 0
        self._head_bytes = 0
        self._head_deadline: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        self._reading_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept the connection, or reject it if there are too many and none is idle."""
        super().connection_made(transport)
        self._transport = self.transport
        keep_alive(transport.get_extra_info("socket"))
        places = self._connections.places_for(transport)
        if all(each.make_room() for each in places):
            self._places = places
            for each in places:
                each.take(self)
        else:
            self._reject(TooManyConnections())

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection was closed. Tell the handler, or cancel it, also while nothing is being written."""
        self._leave()
        self._transport = None
        self._watch_reading()  # which stops
        # Taken from the library, which would count the connection as open until the handler has ended.
        handler, self._task_handler = self._task_handler, None
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()
        elif handler is not None:
            handler.cancel()

    @property
    def has_unread_answer(self) -> bool:
        """Whether a part of an answer could not be handed to the system yet, because the client reads slowly."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    @property
    def keeps_its_place(self) -> bool:
        """Whether there was more than the first request, which may have a key that was not looked at yet."""
        return bool(self._answers) or bool(self._messages) or self.has_unread_answer

    def evict(self) -> None:
        """Close the connection at once, because its place is needed. What the client has not read is lost."""
        self._leave()
        if self.has_unread_answer and self._transport is not None:
            self._transport.abort()  # a mere close would wait until it is read
        self.force_close()

    def close_if_idle(self) -> None:
        """Close the connection, unless a request is to be answered. What was written is sent first."""
        if self._request_count == self._answers:
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
        if self._request_count != requests:
            self.note_busy()
        if self._request_count != requests or self._messages or (self._waiter is None and self._request_count):
            if self._head_deadline is not None:
                self._end_head()
            return
        self._head_bytes += len(data)
        if self._head_bytes > _HEAD_BYTES_MAX:
            self._reject(BadFraming(_BAD_HEAD))
        elif self._head_deadline is None:
            self._head_deadline = self._loop.call_later(self._connections.limits.head_s, self._on_head_deadline)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer, or its end. Then the connection is idle, unless the next request has arrived already."""
        finished = await super().finish_response(request, resp, start_time)
        self._answers += 1
        line = request.get(LOG_LINE)
        if (line is None or not line.is_identified) and not self.has_unread_answer:
            self.has_key = False
        if self._messages:
            self.note_busy()
        else:
            for places in self._places:
                places.note_idle(self)
        self._watch_reading()
        if self._connections.is_closing:
            self.close()
        return finished

    def note_busy(self) -> None:
        """A request is being handled, or waits to be."""
        for places in self._places:
            if self.has_key:
                places.note_with_key(self)
            else:
                places.note_without_key(self)

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
        if request.get(LOG_LINE) is None:  # else a middleware writes the line
            line = request[LOG_LINE] = self._new_line(error)
            self._connections.request_log.write(line, error.status)
        response = error_response(error, request)
        response.force_close()
        return response

    def _new_line(self, error: ProxyError) -> LogLine:
        """The line of what the listener itself refuses, with a new id."""
        peername = None if self._transport is None else self._transport.get_extra_info("peername")
        address = peername[0] if isinstance(peername, tuple) else ""
        line = self._connections.request_log.begin(_NO_ENDPOINT, address=address)
        line.error = error
        return line

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _on_head_deadline(self) -> None:
        self._reject(TooSlow(f"The request's head took longer than {self._connections.limits.head_s:g} seconds."))

    def _watch_reading(self) -> None:
        """From now on, give the client `unread_s` seconds to read what waits for it, if anything does.

        A whole answer is sent by the library, which waits for the client without a limit, also when it closes the
        connection. A client that never reads would keep its place forever.
        """
        if self._reading_deadline is not None:
            self._reading_deadline.cancel()
            self._reading_deadline = None
        if self._transport is not None and (unread := self._transport.get_write_buffer_size()):
            self._unread_bytes, unread_s = unread, self._connections.limits.unread_s
            self._reading_deadline = self._loop.call_later(unread_s, self._on_reading_deadline)

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
        line = self._new_line(error)
        if self._connections.has_many_rejected:
            line.outcome = "not_answered"
            self._connections.request_log.write(line, ClientLeft.status)
            transport.abort()
            return
        self._connections.request_log.write(line, error.status)
        self.close()  # `data_received` ignores everything from now on
        transport.write(_as_bytes(error, line.request_id))
        if transport.can_write_eof():
            transport.write_eof()
        self._loop.call_later(_REJECTED_S, transport.abort)


def note_valid_key(request: web.Request) -> None:
    """Tell the connection of this request that the request has a valid key."""
    connection = request.protocol
    # One with a valid key noted the request when its head came. It is None if the client has left.
    if isinstance(connection, Connection) and not connection.has_key:
        connection.has_key = True
        connection.note_busy()


def when_lost(request: web.Request, notify: Callable[[], object] | None) -> None:
    """Call this when the connection of this request is lost, and do not cancel its handler; None cancels it again."""
    if isinstance(request.protocol, Connection):  # None if the client has left
        request.protocol.on_lost = notify


def _as_bytes(error: ProxyError, id: str) -> bytes:
    """The whole HTTP response for an error, for a connection without a request."""
    body = dump(error.body())
    own = {"content-length": str(len(body)), "connection": "close", "x-request-id": id, "server": SERVER_NAME}
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n".encode()
    return b"".join((head, header_lines({**JSON_HEADERS, **own, **error.headers}), b"\r\n", body))
