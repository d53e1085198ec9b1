"""Load of streams: many are open at once, and each is read to its end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from benchmarks.servers import KEY

_BODY = b'{"model": "long", "stream": true, "max_tokens": 1000, "messages": [{"role": "user", "content": "Go on."}]}'
_REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %b\r\n"
    b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
) % (KEY.encode(), len(_BODY), _BODY)
_DONE = b"data: [DONE]"
_OPEN_WITHIN_S = 30


class Streams:
    """All streams of one run: how many have begun, ended and been complete, and how many chunks have arrived."""

    def __init__(self) -> None:
        self.begun = self.ended = self.complete = self.chunks = 0
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Wake the waiting task."""
        self._changed.set()

    async def until_begun(self, count: int) -> None:
        """Wait until so many have received their first bytes."""
        async with asyncio.timeout(_OPEN_WITHIN_S):
            while self.begun < count:
                await self._wait()

    async def until_ended(self, count: int) -> None:
        """Wait until so many have ended."""
        while self.ended < count:
            await self._wait()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class _Stream(asyncio.Protocol):
    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._last = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(_REQUEST)

    def data_received(self, data: bytes) -> None:
        if not self._last:
            self._streams.begun += 1
            self._streams.changed()
        self._streams.chunks += data.count(b"data: ")
        self._last = (self._last + data)[-64:]

    def connection_lost(self, error: Exception | None) -> None:
        self._streams.ended += 1
        self._streams.complete += _DONE in self._last
        self._streams.changed()


@asynccontextmanager
async def open_streams(port: int, count: int, *, within_s: float) -> AsyncIterator[Streams]:
    """Open `count` streams, evenly within `within_s`; at the end of the block wait until all have ended.

    Exits with an error if one is not complete.
    """
    loop, streams = asyncio.get_running_loop(), Streams()
    for _ in range(count):
        await loop.create_connection(lambda: _Stream(streams), "127.0.0.1", port)
        await asyncio.sleep(within_s / count)
    await streams.until_begun(count)
    yield streams
    await streams.until_ended(count)
    if streams.complete != count:
        raise SystemExit(f"{count - streams.complete} of {count} streams broke, so the figures would be wrong.")
