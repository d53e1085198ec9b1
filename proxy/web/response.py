"""The program at the other end of one request: what is sent to it, and that it has gone.

The handler of a request does nothing but wait; when the client hangs up, the server cancels the handler at once,
also while nothing is being written, and the handler says so here (`note_disconnect`). The call itself runs in a task of its
own, which asks `is_disconnected` or is told through `on_disconnected`. Writing to a client that has gone does nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from aiohttp import web

from proxy.tasks import Tasks
from proxy.upstreams.headers import SERVER_NAME

# A client that takes nothing for this long is taken to be gone: it must not hold an upstream's generation.
_WRITE_S = 60
# What is between may take a connection on which nothing moves for dead: load balancers after 60 s, Node after 300.
_SILENCE_S = 15
# A line that begins with a colon is a comment (WHATWG, HTML section 9.2.6): every SDK passes over it.
KEEP_ALIVE = b": keep-alive\n\n"


class WebResponder:
    """One client and the response to it. `id` is the request's id, sent as `x-request-id`."""

    def __init__(
        self, request: web.Request, *, id: str, write_s: float = _WRITE_S, heartbeat_s: float = _SILENCE_S
    ) -> None:
        self.id = id
        self.headers: Sequence[tuple[str, str]] = list(request.headers.items())
        self.api_version = request.query.get("api-version")  # as Azure's clients send it
        self.is_disconnected = False
        self.response: web.StreamResponse | None = None
        self._request = request
        self._write_s = write_s
        self._silence_s = heartbeat_s
        self._when_gone: Callable[[], object] | None = None
        self._writes = 0  # under way
        self._written_at = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._tasks = Tasks()

    def on_disconnected(self, act: Callable[[], object] | None) -> None:
        """Call `act` once the client has gone (None: no longer)."""
        self._when_gone = act
        if self.is_disconnected:
            self.note_disconnect()

    @property
    def has_begun(self) -> bool:
        """Whether an answer has begun."""
        return self.response is not None

    def note_disconnect(self) -> None:
        """Take note that the client has gone."""
        self.is_disconnected = True
        act, self._when_gone = self._when_gone, None
        if act is not None:
            act()

    def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer."""
        if self.is_disconnected:
            return
        self.response = web.Response(
            status=status, headers={**headers, "x-request-id": self.id, "server": SERVER_NAME}, body=body
        )

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of an answer that is written piece by piece."""
        response = web.StreamResponse(
            status=status, headers={**headers, "x-request-id": self.id, "server": SERVER_NAME}
        )
        self.response = response
        await self._to_client(lambda: response.prepare(self._request))

    async def write(self, data: bytes) -> None:
        """Send a piece; waits while the client is slow."""
        response = self.response
        assert response is not None, "start() first"
        if data:
            await self._to_client(lambda: response.write(data))

    @contextmanager
    def heartbeat(self, is_between_events: Callable[[], bool]) -> Iterator[None]:
        """Within the block a stream on which nothing moves is told from time to time that it is alive.

        In a comment of its own, so only where `is_between_events`: within an event it would be a part of it.
        """
        self._set_alarm(self._silence_s, is_between_events)
        try:
            yield
        finally:
            self._stop_alarm()

    async def end(self) -> None:
        """Say that the answer is over."""
        self._stop_alarm()
        response = self.response
        assert response is not None, "start() first"
        await self._to_client(response.write_eof)

    def abort(self) -> None:
        """Cut the connection: the client is to see that the answer is not whole."""
        if self._request.transport is not None:
            self._request.transport.abort()
        self.note_disconnect()

    async def _to_client(self, act: Callable[[], Awaitable[object]]) -> None:
        """Do what writes to the client; one that takes longer than it may is cut off."""
        if self.is_disconnected:
            return
        # A bare timer: a stream has thousands of writes, and asyncio.timeout would cost each of them five times this.
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(self._write_s, self.abort)
        self._writes += 1
        try:
            await act()
        except ConnectionError:
            self.abort()
        finally:
            deadline.cancel()
            self._writes -= 1
            self._written_at = loop.time()

    def _set_alarm(self, after_s: float, is_between_events: Callable[[], bool]) -> None:
        self._alarm = asyncio.get_running_loop().call_later(after_s, self._look_for_silence, is_between_events)

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _look_for_silence(self, is_between_events: Callable[[], bool]) -> None:
        # One timer for all the stream, which looks back, and none for each of its thousand writes.
        silent_s = asyncio.get_running_loop().time() - self._written_at
        if silent_s >= self._silence_s:
            self._tasks.start("keep alive", self._say_alive(is_between_events))
            silent_s = 0
        self._set_alarm(self._silence_s - silent_s, is_between_events)

    async def _say_alive(self, is_between_events: Callable[[], bool]) -> None:
        # Asked only here: the stream may have moved since the timer rang. Nothing awaits between this and the bytes.
        if self._alarm is not None and self._writes == 0 and is_between_events():
            await self.write(KEEP_ALIVE)
