"""Content encodings (RFC 9110 §8.4.1): decompresses a body piece by piece, within bounds.

Half a megabyte of gzip can become 512 MB. So the output is made in pieces of at most PIECE_BYTES, and only when the
caller asks for the next one; a caller that stops at its limit never holds more. Pure.
"""

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import brotli

if sys.version_info >= (3, 14):  # pragma: no cover
    from compression import zstd
else:
    from backports import zstd

# Decompressed data is produced in pieces of at most this size. Nearly every body is smaller and comes in one piece.
PIECE_BYTES = 256 * 1024
# gzip and zstd allow several members (frames) in a row; a real body has one. Each costs a new decoder, and an empty
# zstd frame has only nine bytes, so 32 MiB could ask for 3.7 million decoders.
MEMBERS_MAX = 1000
# RFC 9659: a zstd body may need a window of at most 8 MiB (2^23). Without the limit a frame could ask for 128 MiB.
_ZSTD_WINDOW_LOG_MAX = 23
# RFC 9110 §8.4.1.3: x-gzip is an older name of gzip.
_ALIASES = {"x-gzip": "gzip"}


class NotDecodable(ValueError):
    """A body that is not in the format of its encoding, that lacks its end, or that has too many members."""


def encoding_of(headers: Iterable[str]) -> str:
    """The encoding that the values of the header name, in lower case; "" if they name none but `identity`.

    Several encodings in a row are one text with commas, which is no key of CONTENT_ENCODINGS.
    """
    named = [item.strip().lower() for value in headers for item in value.split(",")]
    return ",".join(_ALIASES.get(item, item) for item in named if item not in ("", "identity"))


class BodyDecoder:
    """Decompresses one body in one of CONTENT_ENCODINGS, piece by piece.

    Both methods raise NotDecodable.
    """

    def __init__(self, encoding: str, *, members_max: int = MEMBERS_MAX) -> None:
        self._new_member = CONTENT_ENCODINGS[encoding]
        self._padding = b"\0" if encoding == "gzip" else b""  # tapes and block devices add it; gzip(1) ignores it
        self._members_max = members_max
        self._member: _Decoder | None = None
        self._members = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The decompressed bytes of `data`, in pieces of at most PIECE_BYTES.

        A piece is made only when the iterator is asked for it, so a caller that stops at a limit never holds more.
        """
        try:
            yield from self._pieces(data)
        except (zlib.error, brotli.error, zstd.ZstdError):
            raise NotDecodable(
                "The body can't be decompressed: it is not in the format that its Content-Encoding names."
            ) from None

    def end(self) -> None:
        """Check that the body is complete."""
        if self._member is not None and not self._member.eof:
            raise NotDecodable("The body can't be decompressed: its end is missing.")

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        # Goes on without data while the current member has output left that did not fit into the last piece.
        if self._member is not None and self._member.eof:
            data = data.lstrip(self._padding)
        while data or not (self._member is None or self._member.needs_input or self._member.eof):
            if self._member is None or self._member.eof:
                self._members += 1
                if self._members > self._members_max:
                    raise NotDecodable(
                        f"The body can't be decompressed: it has more than {self._members_max} members."
                    )
                self._member = self._new_member(data)
            if piece := self._member.decompress(data, PIECE_BYTES):
                yield piece
            data = self._member.unused_data.lstrip(self._padding) if self._member.eof else b""


class _Decoder(Protocol):
    """Decompresses one member. This is the interface of ZstdDecompressor; the classes below adapt zlib and brotli.

    `eof` is true after the member's last byte; `unused_data` is what follows it. While `needs_input` is false, more
    output can be had with an empty `data`.
    """

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _ZlibDecoder:
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
        # After a full piece zlib may have more output inside, even if it has consumed all input.
        self.needs_input = len(piece) < max_length
        return piece


class _BrotliDecoder:
    unused_data = b""  # brotli itself raises an error if bytes follow its end

    def __init__(self) -> None:
        self._decoder = brotli.Decompressor()
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return bool(self._decoder.is_finished())

    def decompress(self, data: bytes, max_length: int) -> bytes:
        # brotli checks the limit only when a buffer is full, and each buffer is up to four times as large as the one
        # before. With a quarter of the length as its limit, the output never exceeds the length.
        piece = bytes(self._decoder.process(data, output_buffer_limit=max_length // 4))
        # brotli notices its end only when it is asked again after the last byte of output.
        self.needs_input = not piece and bool(self._decoder.can_accept_more_data())
        return piece


def _gzip(_: bytes) -> _Decoder:
    return _ZlibDecoder(16 + zlib.MAX_WBITS)  # 16 selects gzip's header and checksum


def _deflate(data: bytes) -> _Decoder:
    # RFC 9110 §8.4.1.2: the encoding is the zlib format, but some clients send raw deflate without the header of two
    # bytes. The first byte tells them apart: its low four bits are 8 in a zlib header. In raw deflate they are 8
    # only if a padding bit is set, which encoders leave 0 (RFC 1951 §3.2.4).
    # `{` and `[` begin no raw deflate: the first byte of its text would be 160 or more. So plain JSON is refused at
    # once by the decoder for zlib, where the other one might make something of it.
    is_zlib = data[0] & 0x0F == zlib.DEFLATED or data[:1] in (b"{", b"[")
    return _ZlibDecoder(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)


def _br(_: bytes) -> _Decoder:
    return _BrotliDecoder()


def _zstd(_: bytes) -> _Decoder:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG_MAX})


# Each encoding with the function that creates a decoder for a member that begins with the given bytes.
CONTENT_ENCODINGS: Mapping[str, Callable[[bytes], _Decoder]] = {
    "gzip": _gzip,
    "deflate": _deflate,
    "br": _br,
    "zstd": _zstd,
}
