"""Content codings of request bodies (RFC 9110 §8.4.1), undone in pieces: what a bomb becomes is never there at once.

OpenAI's Codex compresses what it sends with zstd unless told not to; gzip, deflate and br come from gateways and
from HTTP libraries. The server library would undo some of them too, but answers what it can't undo in plain text.
"""

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import brotli

from proxy.errors import InvalidRequest

if sys.version_info >= (3, 14):  # pragma: no cover
    from compression import zstd
else:
    from backports import zstd

# More than nearly every body has, so that those come out in one piece.
PIECE_BYTES = 256 * 1024
# A body is one member; this is for who writes many. Each costs a new decoder, and an empty one is only nine bytes.
MEMBERS_MAX = 1000
# RFC 9659: no zstd body may need a window of more than 8 MiB. Without it, one frame could ask us for 128.
_ZSTD_WINDOW_LOG_MAX = 23


class _Decoder(Protocol):
    """One member of a body; what `zstd` has, and the others are brought to."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Zlib:
    def __init__(self, wbits: int) -> None:
        self._inflate = zlib.decompressobj(wbits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        piece = self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)
        # A full piece may leave more behind inside, also where no input is left over.
        self.needs_input = len(piece) < max_length
        return piece


class _Brotli:
    unused_data = b""  # it refuses by itself what follows its end

    def __init__(self) -> None:
        self._decoder = brotli.Decompressor()
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return bool(self._decoder.is_finished())

    def decompress(self, data: bytes, max_length: int) -> bytes:
        # It fills the last of its buffers all the same, and each is up to four times as large as the one before.
        piece = bytes(self._decoder.process(data, output_buffer_limit=max_length // 4))
        # It notices its end only when asked for more than the last byte.
        self.needs_input = not piece and bool(self._decoder.can_accept_more_data())
        return piece


def _gzip(_: bytes) -> _Decoder:
    return _Zlib(16 + zlib.MAX_WBITS)


def _deflate(data: bytes) -> _Decoder:
    # The coding is zlib's format, but there are clients that leave its two bytes of head out. The first says which.
    return _Zlib(zlib.MAX_WBITS if data[0] & 0x0F == zlib.DEFLATED else -zlib.MAX_WBITS)


def _br(_: bytes) -> _Decoder:
    return _Brotli()


def _zstd(_: bytes) -> _Decoder:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG_MAX})


CONTENT_ENCODINGS: Mapping[str, Callable[[bytes], _Decoder]] = {
    "gzip": _gzip,
    "deflate": _deflate,
    "br": _br,
    "zstd": _zstd,
}


class BodyDecoder:
    """One body in one of CODINGS. Both methods raise InvalidRequest where it is not what its coding says."""

    def __init__(self, coding: str) -> None:
        self._begin = CONTENT_ENCODINGS[coding]
        self._decoder: _Decoder | None = None
        self._members = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What these bytes stand for, in pieces of at most PIECE_BYTES. Nothing is done ahead of the reader."""
        try:
            yield from self._pieces(data)
        except (zlib.error, brotli.error, zstd.ZstdError):
            raise InvalidRequest("The body can't be unpacked: it isn't what its Content-Encoding says.") from None

    def end(self) -> None:
        """No more will come."""
        if self._decoder is not None and not self._decoder.eof:
            raise InvalidRequest("The body can't be unpacked: its end is missing.")

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        while data or not (self._decoder is None or self._decoder.needs_input or self._decoder.eof):
            if self._decoder is None or self._decoder.eof:
                self._members += 1
                if self._members > MEMBERS_MAX:
                    raise InvalidRequest(f"The body can't be unpacked: it has more than {MEMBERS_MAX} members.")
                self._decoder = self._begin(data)
            if piece := self._decoder.decompress(data, PIECE_BYTES):
                yield piece
            data = self._decoder.unused_data if self._decoder.eof else b""
