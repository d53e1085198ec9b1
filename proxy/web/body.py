"""The body of a request: invited, read in the time it may take, unpacked, and bounded in what it becomes."""

import asyncio
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

import brotli
from aiohttp import hdrs, web

from proxy.config.loader import ConnectionLimits
from proxy.errors import BodyTooLarge, InvalidRequest, TooSlow, UnsupportedEncoding
from proxy.formats.multipart import Form, FormReader
from proxy.upstreams.spool import Spool

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


# OpenAI takes tens of megabytes (pictures and files as base64); this is after unpacking, and before it too.
REQUEST_BYTES_MAX = 32 * 2**20
# Sounds and pictures, which go to the disk; OpenAI takes no file that is larger.
FORM_BYTES_MAX = 512 * 2**20
_TOO_LARGE = f"The request's body is larger than {REQUEST_BYTES_MAX} bytes."
_ACCEPTED = ", ".join(CONTENT_ENCODINGS)
# RFC 9110 §8.4.1.3: an older name of the same.
_ALIASES = {"x-gzip": "gzip"}


async def expect_when_read(request: web.Request) -> None:
    """For routes, as `expect_handler`: `Expect: 100-continue` is answered when the body is read, and not before.

    The server library would invite a body of any size from anybody.
    """


async def read_body(request: web.Request, limits: ConnectionLimits) -> bytes:
    """The whole body, for a client that is known.

    Raises BodyTooLarge, InvalidRequest, TooSlow and UnsupportedEncoding.
    """
    if request.content_type.startswith("multipart/"):
        raise UnsupportedEncoding("This endpoint takes JSON: send `Content-Type: application/json`.")
    unpacking = _unpacking_of(request)
    if request.content_length is not None and request.content_length > REQUEST_BYTES_MAX:
        raise BodyTooLarge(_TOO_LARGE)
    async with _in_time(request, limits) as grant:
        body = await _gather(request, unpacking, grant)
    if unpacking is not None:
        unpacking.end()
    return bytes(body)


async def read_form(request: web.Request, spool: Spool, limits: ConnectionLimits) -> Form:
    """The form in a body, which goes to `spool` as it comes, for a client that is known; raises as `read_body`.

    And NoSpace.
    """
    reader = FormReader(request.headers.get(hdrs.CONTENT_TYPE, ""))
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedEncoding("Send a form without a content coding.")
    too_large = BodyTooLarge(f"The form is larger than {FORM_BYTES_MAX} bytes.")
    if request.content_length is not None and request.content_length > FORM_BYTES_MAX:
        raise too_large
    async with _in_time(request, limits) as grant:
        async for chunk in request.content.iter_any():
            if spool.size + len(chunk) > FORM_BYTES_MAX:
                raise too_large
            reader.feed(chunk)
            await spool.write(chunk)
            grant(spool.size)
    await spool.flush()
    return reader.end()


@asynccontextmanager
async def _in_time(request: web.Request, limits: ConnectionLimits) -> AsyncIterator[Callable[[int], None]]:
    """Invite the body and give it its time, and more for what has arrived, which the yielded function is told."""
    await _invite(request)
    begun_at = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(limits.body_s) as deadline:
            yield lambda arrived: deadline.reschedule(begun_at + limits.body_s + arrived / limits.body_bytes_per_s)
    except TimeoutError:
        raise TooSlow("The request's body came too slowly.") from None
    except web.RequestPayloadError:
        raise InvalidRequest("The body could not be read: it is cut short or badly framed.") from None


async def _gather(request: web.Request, unpacking: BodyDecoder | None, grant: Callable[[int], None]) -> bytearray:
    """The body, unpacked; `grant` is told how many bytes have arrived, which gives it more time."""
    arrived, body = 0, bytearray()
    # Not `request.read()`, which would keep a second copy for as long as the answer streams.
    async for chunk in request.content.iter_any():
        arrived += len(chunk)
        grant(arrived)
        if arrived > REQUEST_BYTES_MAX:
            raise BodyTooLarge(_TOO_LARGE)
        for piece in (chunk,) if unpacking is None else unpacking.feed(chunk):
            body += piece
            if len(body) > REQUEST_BYTES_MAX:
                raise BodyTooLarge(_TOO_LARGE)
            if len(piece) == PIECE_BYTES:
                await asyncio.sleep(0)  # a few packets can hold all that is allowed: others have their turn
    return body


def _unpacking_of(request: web.Request) -> BodyDecoder | None:
    """What undoes the body's coding; None where it has none."""
    named = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).strip().lower()
    coding = _ALIASES.get(named, named)
    if coding in ("", "identity"):
        return None
    if coding not in CONTENT_ENCODINGS:
        raise UnsupportedEncoding(
            f"The content coding {coding[:40]!r} can't be read here: send one of {_ACCEPTED}, or none.",
            headers={"accept-encoding": _ACCEPTED},  # RFC 9110 §15.5.16
        )
    return BodyDecoder(coding)


async def _invite(request: web.Request) -> None:
    """Tell a client that asked first that its body is wanted."""
    if request.version == (1, 1) and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the response itself has not begun
