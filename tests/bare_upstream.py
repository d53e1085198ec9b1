"""An upstream on a plain socket, with which a test chooses every byte that is sent, and when.

async with bare_upstream(serve) as upstream:     # `serve` gets the field `metadata` of the request
    async with stage(folder=tmp_path, upstream=upstream.url) as on: ...
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from proxy.upstreams.client import Upstreams

Serve = Callable[[dict[str, Any], asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class BareUpstream:
    """A server whose answers are written by `serve`. `open` has the connections that are not closed yet.

    A DELETE is answered by the server itself, with the next of `delete_statuses` or 200; `deleted` has its paths.
    """

    def __init__(self, serve: Serve) -> None:
        self.url = ""
        self.deleted: list[str] = []
        self.delete_statuses: list[int] = []
        self.open: set[asyncio.Task[None] | None] = set()
        self._serve = serve

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, with one request."""
        self.open.add(asyncio.current_task())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"DELETE "):
                status = self.delete_statuses.pop(0) if self.delete_statuses else 200
                self.deleted.append(head.split()[1].decode())
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}" % status)
                return
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await self._serve(json.loads(await reader.readexactly(length))["metadata"], reader, writer)
            writer.close()
            await writer.wait_closed()
        except ConnectionError:
            pass  # the proxy has closed it first
        finally:
            self.open.discard(asyncio.current_task())

    async def all_closed(self) -> None:
        """Wait until no connection is open."""
        while self.open:
            await asyncio.wait({task for task in self.open if task})


@asynccontextmanager
async def opened() -> AsyncIterator[Upstreams]:
    """The proxy's client for such servers, open."""
    upstreams = Upstreams()
    upstreams.open()
    try:
        yield upstreams
    finally:
        await upstreams.close()
        await upstreams.close()  # closing twice does no harm


@asynccontextmanager
async def connections(
    accept: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    *,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Accept connections on a free port, which is yielded. A connection is closed when `accept` returns.

    Those that are still open at the end of the block are cut, also if the other side does not read. Otherwise the
    garbage collector would find them while another test runs, which would fail.
    """
    serving: set[asyncio.Task[None]] = set()
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        writers.add(writer)
        try:
            await accept(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the proxy has closed it first
        finally:
            writer.close()
            serving.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()
        await asyncio.sleep(0)  # the event loop closes their sockets


@asynccontextmanager
async def bare_upstream(serve: Serve) -> AsyncIterator[BareUpstream]:
    """Start an upstream on a free port."""
    upstream = BareUpstream(serve)
    async with connections(upstream.accept) as port:
        upstream.url = f"http://127.0.0.1:{port}/v1"
        yield upstream


def stream_head(*more: str) -> bytes:
    """The head of a streamed answer, with these header lines in addition."""
    return "\r\n".join(("HTTP/1.1 200 OK", "Content-Type: text/event-stream", *more, "", "")).encode()
