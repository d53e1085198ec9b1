"""An HTTP proxy as companies have one: CONNECT for https, absolute addresses for http.

async with forward_proxy() as proxy:
    ...                                   # http://127.0.0.1:{proxy.port}
    assert proxy.requests == ["CONNECT 127.0.0.1:4711 HTTP/1.1"]
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from tests.bare_upstream import connections


class ForwardProxy:
    """A proxy that records the first line and the credentials of each request.

    With a `status` it refuses all of them, and with b"" it closes the connection instead.
    """

    def __init__(self, status: bytes | None) -> None:
        self.port = 0
        self.requests: list[str] = []
        self.credentials: list[str | None] = []
        self._status = status

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, with one request."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.requests.append(first)
        self.credentials.append(headers.pop("proxy-authorization", None))
        if self._status is not None:
            writer.write(self._status and b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % self._status)
            await writer.drain()
            return
        method, target, version = first.split()
        url = urlsplit(f"//{target}" if method == "CONNECT" else target)
        upstream, to_upstream = await asyncio.open_connection(url.hostname, url.port)
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            head = [
                f"{method} {url.path} {version}",
                *(f"{name}: {value}" for name, value in headers.items()),
                "",
                "",
            ]
            to_upstream.write("\r\n".join(head).encode())
        await asyncio.gather(_pump(reader, to_upstream), _pump(upstream, writer))


async def _pump(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65_536):
            to.write(data)
            await to.drain()
    finally:
        to.close()


@asynccontextmanager
async def forward_proxy(status: bytes | None = None) -> AsyncIterator[ForwardProxy]:
    """Start such a proxy on a free port."""
    proxy = ForwardProxy(status)
    async with connections(proxy.accept) as proxy.port:
        yield proxy
