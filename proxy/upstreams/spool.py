"""A body that is too large for memory, kept in a temporary file from when it comes until it is sent.

The file has no name on the disk, so nothing is left behind by a crash. It is read and written in a thread.
"""

import asyncio
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator

from proxy.errors import NoSpace

# So much is kept in memory before the file is begun, and written or read at a time.
_PIECE_BYTES = 2**18
_MEMORY_BYTES = 2**20
# What uploads leave free of the disk, or a tenth of it where it is small: the books may stand on the same one.
_LEFT_FREE_BYTES = 2**30


def has_room(total: int, used: int, free: int) -> bool:
    """Whether a disk of so many bytes has room for an upload."""
    return free > min(_LEFT_FREE_BYTES, total // 10)


class Spool:
    """One body on the disk. `close()` when it isn't needed any more."""

    def __init__(self) -> None:
        self.size = 0
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115 - `close` does it
        self._unwritten = bytearray()
        self._reading = threading.Lock()

    async def write(self, chunk: bytes) -> None:
        """Take the next bytes. Raises NoSpace where the disk has no room for them."""
        self.size += len(chunk)
        self._unwritten += chunk
        if len(self._unwritten) >= _PIECE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write what has been taken: before it is read. Raises NoSpace."""
        piece, self._unwritten = bytes(self._unwritten), bytearray()
        try:
            await asyncio.to_thread(self._write, piece)
        except OSError as error:
            raise NoSpace from error

    def _write(self, piece: bytes) -> None:
        if self.size > _MEMORY_BYTES and not has_room(*shutil.disk_usage(tempfile.gettempdir())):
            raise NoSpace
        self._file.write(piece)

    async def read(self, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` to `end`, piece by piece."""
        while start < end:
            piece = await asyncio.to_thread(self._piece, start, min(_PIECE_BYTES, end - start))
            start += len(piece)
            yield piece

    def _piece(self, start: int, size: int) -> bytes:
        # A thread can't be stopped: the one of a try that was given up may still be reading.
        with self._reading:
            self._file.seek(start)
            return self._file.read(size)

    def close(self) -> None:
        """Let go of it."""
        self._file.close()


class Spliced:
    """A body that is sent from a spool, with the bytes from `start` to `end` replaced."""

    def __init__(self, spool: Spool, *, start: int, end: int, patch: bytes) -> None:
        self._spool = spool
        self._start = start
        self._end = end
        self._patch = patch

    def __len__(self) -> int:
        return self._spool.size - (self._end - self._start) + len(self._patch)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, piece by piece."""
        async for piece in self._spool.read(0, self._start):
            yield piece
        yield self._patch
        async for piece in self._spool.read(self._end, self._spool.size):
            yield piece
