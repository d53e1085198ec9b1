"""Writes the answer of one request to its client, and notices that the client has disconnected.

When the client closes the connection, the listener calls `note_disconnect` at once, also while nothing is being
written. The call reads `is_disconnected`, or is notified through `on_disconnected`. Writing to a client that has
disconnected does nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Any

from aiohttp import hdrs, web
from aiohttp.helpers import rfc822_formatted_time

from proxy.calls.log_line import LogLine
from proxy.identity.keys import Headers
from proxy.tasks import Tasks
from proxy.upstreams.headers import SERVER_NAME, header_lines

# A client that accepts no data for this long counts as disconnected: its upstream would go on generating meanwhile.
_WRITE_S = 60
# Load balancers close a connection without traffic after 60 s, Node's HTTP client after 300 s.
_HEARTBEAT_S = 15
# A line that begins with a colon is a comment (WHATWG, HTML §9.2.6), which every SDK ignores.
HEARTBEAT = b": keep-alive\n\n"

_WITHOUT_BODY = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)


def whole_answer(
    request: web.BaseRequest, status: int, headers: Mapping[str, str], body: bytes
) -> web.StreamResponse:
    """A response to this request that is sent as a whole. The handler returns it."""
    if request.version != (1, 1) or request.method == hdrs.METH_HEAD or status in _WITHOUT_BODY:
        return web.Response(status=status, headers=headers, body=body)
    return WholeAnswer(status, headers, body)


class WholeAnswer(web.StreamResponse):
    """A response of HTTP/1.1 whose head and body are one write.

    The library's `Response` writes the same bytes, in many more steps.
    """

    _keep_alive = True

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(status=status, headers=headers)
        self.body = body

    async def prepare(self, request: web.BaseRequest) -> None:
        """Send the answer. Raises ConnectionError if the client has disconnected."""
        headers = self.headers
        if self.body:
            headers.setdefault("Content-Type", "application/octet-stream")
        headers["Content-Length"], headers["Date"] = str(len(self.body)), rfc822_formatted_time()
        headers["server"] = SERVER_NAME
        self._keep_alive = self._keep_alive and request.keep_alive
        if not self._keep_alive:
            headers["Connection"] = "close"
        await request._prepare_hook(self)  # the application's signal `on_response_prepare`
        line = f"HTTP/1.1 {self.status} {self.reason}\r\n".encode()
        data = b"".join((line, header_lines(headers), b"\r\n", self.body))
        self.body = b""  # a connection keeps its last response until the next request
        writer: Any = request.writer
        await writer.write(data, drain=False)
        await writer.drain()

    async def write_eof(self, data: bytes = b"") -> None:
        """Does nothing: `prepare` has sent everything."""


class WebResponder:
    """One client and the response to it. `line` is what the log will say of the request.

    `task` is set when the request becomes a call. `response` is None until an answer has begun. The request's id is
    sent as `x-request-id`.
    """

    task: asyncio.Task[Any]

    def __init__(
        self, request: web.Request, line: LogLine, *, write_s: float = _WRITE_S, heartbeat_s: float = _HEARTBEAT_S
    ) -> None:
        self.id = line.request_id
        self.line = line
        self.headers: Headers = request.headers
        self.api_version = request.query.get("api-version")  # a query parameter of Azure's clients
        self.is_disconnected = False
        self.response: web.StreamResponse | None = None
        self._request = request
        self._write_s = write_s
        self._heartbeat_s = heartbeat_s
        self._on_disconnected: Callable[[], object] | None = None
        self._writes_in_progress = 0
        self._loop = request.task.get_loop()
        self._is_chunked = False
        self._written_at = 0.0  # by the event loop's clock
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._tasks = Tasks()

    @property
    def has_begun(self) -> bool:
        """Whether an answer has begun."""
        return self.response is not None

    def on_disconnected(self, notify: Callable[[], object] | None) -> None:
        """Call `notify` once the client has disconnected, at once if it has already; None removes it."""
        self._on_disconnected = notify
        if self.is_disconnected:
            self.note_disconnect()

    def note_disconnect(self) -> None:
        """Record that the client has disconnected, and call the callback the first time."""
        self.is_disconnected = True
        self.line.mark_left()
        notify, self._on_disconnected = self._on_disconnected, None
        if notify is not None:
            notify()

    def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer. It is sent when the handler returns it."""
        if self.is_disconnected:
            return
        self.line.mark_first_byte(status)
        self.response = whole_answer(self._request, status, {**headers, "x-request-id": self.id}, body)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of a streamed answer."""
        response = web.StreamResponse(status=status, headers={**headers, "x-request-id": self.id})
        self.response = response
        self.line.mark_first_byte(status)
        await self._write_in_time(lambda: response.prepare(self._request))
        self._is_chunked = "transfer-encoding" in response.headers  # not for HTTP/1.0

    async def write(self, data: bytes) -> None:
        """Send a piece of a streamed answer; waits while the client reads slowly."""
        if not self.write_now(data):
            await self.drain()

    def write_now(self, data: bytes) -> bool:
        """Send a piece of a streamed answer, and return whether the client keeps up. If not, `drain` waits for it."""
        if not data or self.is_disconnected:
            return True
        protocol = self._request.protocol
        assert self.response is not None and protocol is not None, "start() first"
        transport = protocol.transport
        if transport is None or transport.is_closing():
            self.abort()
            return True
        # Not by the library's writer, which would add three steps to each chunk of a stream.
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        self._written_at = self._loop.time()
        return not protocol.writing_paused

    async def drain(self) -> None:
        """Wait while the client reads slowly, and cut the connection if it reads nothing for too long."""
        await self._write_in_time(self._request.writer.drain)

    @contextmanager
    def heartbeat(self, is_between_events: Callable[[], bool]) -> Iterator[None]:
        """Within the block, send a comment whenever nothing was sent for `heartbeat_s` seconds.

        It is sent only if `is_between_events`: inside an event that is sent in pieces, the comment would become a
        part of that event.
        """

        async def beat() -> None:
            if is_between_events():
                await self.write(HEARTBEAT)

        self._schedule_heartbeat(self._heartbeat_s, self._heartbeat_s, beat)
        try:
            yield
        finally:
            self._cancel_heartbeat()

    @asynccontextmanager
    async def heartbeat_before_answer(
        self, every_s: float, start: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        """Within the block, send a comment whenever nothing was sent for `every_s` seconds.

        `start` sends the head of the stream before the first comment, unless it is sent already. A client that waits
        for a second upstream has waited since the first block of this kind began.
        """

        async def beat() -> None:
            if not self.has_begun:
                await start()
            await self.write(HEARTBEAT)

        now = self._loop.time()
        self._written_at = self._written_at or now
        self._schedule_heartbeat(max(0, every_s - (now - self._written_at)), every_s, beat)
        try:
            yield
        finally:
            self._cancel_heartbeat()
            await self._tasks.all_ended()  # nothing else may be written before the head is

    async def end(self) -> None:
        """End a streamed answer."""
        self._cancel_heartbeat()
        response = self.response
        assert response is not None, "start() first"
        await self._write_in_time(response.write_eof)

    def abort(self) -> None:
        """Cut the connection, so that the client sees that the answer is incomplete."""
        if self._request.transport is not None:
            self._request.transport.abort()
        self.note_disconnect()

    async def _write_in_time(self, write: Callable[[], Awaitable[object]]) -> None:
        """Perform a write, and cut the connection if it takes longer than `write_s`.

        Does nothing if the client has disconnected.
        """
        if self.is_disconnected:
            return
        deadline = self._loop.call_later(self._write_s, self.abort)
        self._writes_in_progress += 1
        try:
            await write()
        except ConnectionError:
            self.abort()
        finally:
            deadline.cancel()
            self._writes_in_progress -= 1
            self._written_at = self._loop.time()

    def _schedule_heartbeat(self, after_s: float, every_s: float, beat: Callable[[], Awaitable[None]]) -> None:
        self._heartbeat_timer = self._loop.call_later(after_s, self._on_heartbeat_timer, every_s, beat)

    def _cancel_heartbeat(self) -> None:
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
            self._heartbeat_timer = None

    def _on_heartbeat_timer(self, every_s: float, beat: Callable[[], Awaitable[None]]) -> None:
        """Send a heartbeat if the stream was silent, and start the timer again.

        There is one timer for the whole stream, not one for each of its thousands of writes. With 15 s, a stream
        that begins at 12:00:00 and writes last at 12:00:06 has its timer at 12:00:15. The silence is only 9 s then,
        so the timer is set for 6 s later. At 12:00:21 the silence is 15 s: a comment is sent, and the next check is
        at 12:00:36.
        """
        silent_s = self._loop.time() - self._written_at
        if silent_s >= every_s:
            self._tasks.start("heartbeat", self._send_heartbeat(beat))
            silent_s = 0
        self._schedule_heartbeat(every_s - silent_s, every_s, beat)

    async def _send_heartbeat(self, beat: Callable[[], Awaitable[None]]) -> None:
        # Checked here and not when the timer fires: the stream may have written, or ended its block, before this task
        # runs. Nothing is awaited between the check and the write. A client that still takes an earlier write gets no
        # comment: it has traffic, and comments would only queue up behind it.
        if self._heartbeat_timer is not None and self._writes_in_progress == 0:
            await beat()
