"""A client on a plain socket, with which a test chooses every byte that is sent.

async with bare_client(on.url) as client:
    client.send(post(body=b"{}"))
    assert (await client.reply()).status == 400
    assert await client.is_closed()
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from multidict import CIMultiDict

from tests.stage import Reply, key_of

GOOD = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}]}
KEY = f"Authorization: Bearer {key_of('alice')}"


def post(
    path: str = "/v1/chat/completions",
    *headers: str,
    body: bytes | None = None,
    host: str = "Host: proxy",
    length: bool = True,
    version: str = "HTTP/1.1",
) -> bytes:
    """A POST with these header lines after `host`. Without a `body` it is a valid call."""
    body = json.dumps(GOOD).encode() if body is None else body
    lines = [f"POST {path} {version}", host, *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    """A request without a body."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: proxy", *headers, "", ""]).encode("latin-1")


class BareClient:
    """One connection to a listener."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        """Queue bytes to be sent, without waiting."""
        self.writer.write(data)

    async def reply(self) -> Reply:
        """Read the next reply, which has to have a Content-Length."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers: CIMultiDict[str] = CIMultiDict()
        for line in head[1:-2]:
            name, _, value = line.partition(": ")
            headers.add(name, value)
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Reply(int(head[0].split()[1]), headers, body)

    async def is_closed(self) -> bool:
        """Wait until the server closes the connection. False if it sends something instead."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def bare_client(url: str, *, address: str = "127.0.0.1") -> AsyncIterator[BareClient]:
    """Connect to a listener, from this address."""
    port = urlsplit(url).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    try:
        yield BareClient(reader, writer)
    finally:
        writer.transport.abort()
