"""A body that is too large for memory, kept in a temporary file from its arrival until it is sent.

The file has no name on the disk, so a crash leaves nothing behind. It is read and written in a thread.
"""

import asyncio
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator

from proxy.errors import NoSpace

# How many bytes are written or read at a time.
_CHUNK_BYTES = 2**18
# Bodies up to this size stay in memory, and no file is made. It is small, because thousands may be in flight.
_MEMORY_BYTES = 2**18
# How much of the disk uploads leave free, or a tenth of a small disk. The database may be on the same disk: if
# uploads filled it, no call could be admitted.
_FREE_BYTES_MIN = 2**30


def has_room(total: int, used: int, free: int) -> bool:
    """Whether a disk with these sizes (in bytes) has room for an upload."""
    return free > min(_FREE_BYTES_MIN, total // 10)


class Spool:
    """One body. Call `close()` when it is no longer needed."""

    def __init__(self) -> None:
        self.size = 0
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115 - closed by `close`
        self._unwritten = bytearray()
        self._read_lock = threading.Lock()

    async def write(self, chunk: bytes) -> None:
        """Append bytes. Raises NoSpace if the disk has no room for them."""
        self.size += len(chunk)
        self._unwritten += chunk
        if len(self._unwritten) >= _CHUNK_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write what is still buffered; required before the first read. Raises NoSpace."""
        chunk, self._unwritten = bytes(self._unwritten), bytearray()
        try:
            await asyncio.to_thread(self._write, chunk)
        except OSError as error:
            raise NoSpace from error

    def _write(self, chunk: bytes) -> None:
        if self.size > _MEMORY_BYTES and not has_room(*shutil.disk_usage(tempfile.gettempdir())):
            raise NoSpace
        self._file.write(chunk)

    async def read(self, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` to `end`, in chunks of at most 256 KiB."""
        while start < end:
            chunk = await asyncio.to_thread(self._read, start, min(_CHUNK_BYTES, end - start))
            start += len(chunk)
            yield chunk

    def _read(self, start: int, size: int) -> bytes:
        # A thread cannot be cancelled: while an attempt that was given up is still reading, the next attempt may
        # begin. Without the lock one of them would read at the position to which the other one moved the file.
        with self._read_lock:
            self._file.seek(start)
            return self._file.read(size)

    def close(self) -> None:
        """Close the file, which deletes it."""
        self._file.close()


class Spliced:
    """The body in a spool, with the bytes from `start` to `end` replaced by `patch` while it is sent.

    Only the model's name in a form is replaced, so an upload of any size is never copied. Example: in a form whose
    field `model` has the value "fast" at bytes 120 to 124, `patch` is b"gpt-4o-mini", and the body is 7 bytes longer.
    """

    def __init__(self, spool: Spool, *, start: int, end: int, patch: bytes) -> None:
        self._spool = spool
        self._start = start
        self._end = end
        self._patch = patch

    def __len__(self) -> int:
        return self._spool.size - (self._end - self._start) + len(self._patch)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in chunks."""
        async for chunk in self._spool.read(0, self._start):
            yield chunk
        yield self._patch
        async for chunk in self._spool.read(self._end, self._spool.size):
            yield chunk
